"""export_onnx: onnxruntime, with its optimisations and without, gives what the kernels give.

Scales are powers of two wherever numbers are compared exactly: then no sum of the runtime in float32 has a rounding.
"""

import copy
import types
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from bounds import assert_linear
from torch import nn

import sparse24
from sparse24 import SparseConv2d, SparseLinear, onnx_export, ops
from sparse24.rounding import quantize_by, quantize_rows

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL")
X_SCALE, W_SCALE = 2.0**-5, 2.0**-7
FORMATS = {
    "int8 by token": {"weight_dtype": torch.int8},
    "int8 by tensor": {"weight_dtype": torch.int8, "x_scale": X_SCALE},
    "int8 weight only": {"weight_dtype": torch.int8, "weight_only": True},
    "int4 by token": {"weight_dtype": torch.int4, "pattern": "pair 4:8"},
    "int4 by tensor": {"weight_dtype": torch.int4, "pattern": "pair 4:8", "x_scale": X_SCALE},
    "int4 weight only": {"weight_dtype": torch.int4, "weight_only": True},
}
GROUPED = {name: {**options, "group_size": 64} for name, options in FORMATS.items()}


def in_onnxruntime(path, x, level):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    y, *_ = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(y)


def assert_exported(model, x, path, **options):
    """That onnxruntime gives the same bits for the exported model; returns what was reported and written."""
    report = sparse24.export_onnx(model, x, path, **options)
    with torch.no_grad():
        wanted = model(x)
    for level in LEVELS:
        y = in_onnxruntime(path, x, level)
        assert y.dtype is wanted.dtype and torch.equal(y, wanted), f"{level}: {(y - wanted).abs().max()}"
    return report, onnx.load(path)


def whole(shape, scale, limit):
    """Multiples of `scale`, up to limit times it, which the first of each row is: so that it is that row's scale."""
    x = torch.randint(-limit, limit + 1, shape).float()
    x.flatten(1)[:, 0] = limit
    return x * scale


def kept(dense, pattern, axis="channels"):
    """The layer with its weight pruned."""
    weight = dense.weight.detach()
    matrix = weight.permute(0, *range(2, weight.dim()), 1) if axis == "channels" and weight.dim() == 4 else weight
    flat = matrix.reshape(-1, weight.shape[1]) if matrix is not weight else weight.flatten(1)
    mask = ops.prune_mask(flat.contiguous(), pattern).view(matrix.shape)
    mask = mask.permute(0, 3, 1, 2) if matrix is not weight else mask
    dense.weight = nn.Parameter(torch.where(mask, weight, 0))
    return dense


def sparse(dense, options, axis="channels", activation="none"):
    """A packed sparse layer with scales that are powers of two, and a bias of multiples of their product."""
    options = dict(options)
    limit = 7 if options["weight_dtype"] is torch.int4 else 127
    dense.weight = nn.Parameter(torch.randint(-limit, limit + 1, dense.weight.shape) * W_SCALE)
    dense.bias = nn.Parameter(torch.randint(-999, 999, dense.bias.shape) * (options.get("x_scale", X_SCALE) * W_SCALE))
    outputs, columns = len(dense.weight), dense.weight[0].numel()
    groups = () if "group_size" not in options else (-(-columns // options["group_size"]),)
    options["scales"] = torch.full((*groups, outputs), W_SCALE)
    kind = SparseLinear if isinstance(dense, nn.Linear) else SparseConv2d
    pruned = kept(dense, options.get("pattern", "2:4"), axis)
    return kind.from_dense(pruned, activation=activation, **options).pack()


@pytest.mark.parametrize(
    "options", [*FORMATS.values(), *GROUPED.values()], ids=[*FORMATS, *[f"{n}, groups" for n in FORMATS]]
)
@pytest.mark.parametrize("shape", [(5, 200), (2, 3, 200)])
def test_linear_layers_give_the_same_bits(tmp_path, options, shape):
    torch.manual_seed(0)
    layer = sparse(nn.Linear(200, 33), options, activation="relu")
    x = whole((shape[0], *shape[1:-1], 200), X_SCALE, 127)
    x[..., 0] = 127 * X_SCALE  # of each token
    report, proto = assert_exported(nn.Sequential(layer), x, tmp_path / "a.onnx")
    assert [row.outcome for row in report.rows] == ["exported"]
    kinds = {one.data_type for one in proto.graph.initializer if list(one.dims) == [33, 200]}
    int4 = options["weight_dtype"] is torch.int4
    assert kinds == {onnx.TensorProto.INT4 if int4 else onnx.TensorProto.INT8}
    assert "QuantizeLinear" in {node.op_type for node in proto.graph.node} or "x_scale" not in options


CONVOLUTIONS = {
    "3x3": nn.Conv2d(8, 12, 3, padding=1),
    "strided, dilated": nn.Conv2d(8, 12, 3, stride=2, dilation=2, padding=(2, 1)),
    "groups": nn.Conv2d(16, 12, 3, groups=2),
    "same, reflected": nn.Conv2d(8, 12, (2, 3), padding="same", padding_mode="reflect"),
    "patch": nn.Conv2d(3, 12, 4, stride=4),
}


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_give_the_same_bits(tmp_path, options, name):
    torch.manual_seed(0)
    dense = copy.deepcopy(CONVOLUTIONS[name])
    layer = sparse(dense, options, "patch" if name == "patch" else "channels")
    x = whole((2, dense.in_channels, 12, 12), X_SCALE, 127)
    x[:, 0, ::4, ::4] = 127 * X_SCALE  # of each patch
    assert_exported(nn.Sequential(layer), x, tmp_path / "a.onnx")


@pytest.mark.parametrize("options", GROUPED.values(), ids=GROUPED)
def test_patch_convolutions_with_groups_give_the_same_bits(tmp_path, options):
    torch.manual_seed(0)
    layer = sparse(nn.Conv2d(3, 12, 6, stride=6), options, "patch")
    x = whole((2, 3, 12, 18), X_SCALE, 127)
    x[:, 0, ::6, ::6] = 127 * X_SCALE
    assert_exported(nn.Sequential(layer), x, tmp_path / "a.onnx")


def test_what_is_out_of_range_or_between_two_numbers(tmp_path):
    torch.manual_seed(0)
    layer = sparse(nn.Linear(8, 4), FORMATS["int8 by tensor"])
    halves = torch.tensor([-127.5, -128, -1000, 126.5, 127.5, 0.5, 1.5, -2.5])
    tiny = torch.tensor([-0.0, 1e-40, -1e-40, 0.0, 1e30, -1e30, 0.49999997, -0.5])
    assert_exported(nn.Sequential(layer), torch.stack([halves, tiny]) * X_SCALE, tmp_path / "a.onnx")
    by_token = sparse(nn.Linear(8, 4), FORMATS["int8 by token"])
    assert_exported(nn.Sequential(by_token), torch.zeros(3, 8), tmp_path / "b.onnx")


@pytest.mark.parametrize("name", ["int8 by token", "int8 by tensor"])
def test_ordinary_scales_stay_within_the_bound_of_sums(tmp_path, name):
    torch.manual_seed(0)
    x, scale = torch.randn(37, 200), torch.tensor(0.0231)
    options = {**FORMATS[name], **({"x_scale": scale} if "x_scale" in FORMATS[name] else {})}
    layer = SparseLinear.from_dense(kept(nn.Linear(200, 33), "2:4"), **options).pack()
    q, by = quantize_rows(x) if name == "int8 by token" else (quantize_by(x, scale), scale)
    sparse24.export_onnx(nn.Sequential(layer), x, tmp_path / "a.onnx")
    for level in LEVELS:
        y = in_onnxruntime(tmp_path / "a.onnx", x, level)
        # q * scale and w * scale are rounded once each before they are multiplied.
        assert_linear(y, q.double() * by, layer.weight, layer.bias.detach(), roundings=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_float_layers_keep_the_zeros_of_the_pattern(tmp_path, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 32), nn.GELU(), nn.Linear(32, 10))
    sparse24.prune(model)
    sparse24.convert(model.to(dtype))
    x = torch.randn(5, 48, dtype=dtype)
    sparse24.export_onnx(model, x, tmp_path / "a.onnx")
    proto = onnx.load(tmp_path / "a.onnx")
    weights = {one.name: onnx.numpy_helper.to_array(one) for one in proto.graph.initializer}
    for name in ("0", "2"):
        found = next(w for w in weights.values() if sorted(w.shape) == sorted(model.get_submodule(name).weight.shape))
        assert np.array_equal(
            found if found.shape[0] == len(model.get_submodule(name).bias) else found.T,
            model.get_submodule(name).weight.detach().numpy(),
        )
    y = in_onnxruntime(tmp_path / "a.onnx", x, LEVELS[1])
    # Two layers, each off by the roundings of its sums and of its output.
    torch.testing.assert_close(y, model(x), rtol=0, atol=2e-6 if dtype is torch.float32 else 4e-3)


def chained():
    torch.manual_seed(0)
    static = FORMATS["int8 by tensor"]
    model = nn.Sequential(
        sparse(nn.Conv2d(8, 16, 3, padding=1), static),
        nn.ReLU(),
        nn.MaxPool2d(2),
        sparse(nn.Conv2d(16, 8, 3), {**static, "x_scale": 4.0}),
        nn.Flatten(),
        sparse(nn.Linear(8 * 4 * 4, 10), {**static, "x_scale": 8.0}),
    )
    return model.eval(), whole((3, 8, 12, 12), X_SCALE, 127)


def test_chained_layers_give_the_same_bits(tmp_path):
    model, x = chained()
    assert_exported(model, x, tmp_path / "plain.onnx")
    assert [row.outcome for row in sparse24.chain(model, x).rows] == ["int8", "int8", "float"]
    assert_exported(model, x, tmp_path / "chained.onnx")


class Attention(nn.Module):
    """Three layers that round one x, each by its own scale."""

    def __init__(self):
        super().__init__()
        static = FORMATS["int8 by tensor"]
        self.norm = nn.LayerNorm(32, elementwise_affine=False)
        self.parts = nn.ModuleList(sparse(nn.Linear(32, 32), {**static, "x_scale": 2.0**-i}) for i in (4, 5, 6))

    def forward(self, x):
        q, k, v = (part(self.norm(x)) for part in self.parts)
        return q.relu() - k.relu() + v


def test_layers_of_different_scales_share_an_x(tmp_path):
    torch.manual_seed(0)
    x = torch.randint(0, 2, (3, 7, 32)) * 2.0 - 1  # which the norm leaves, but for its epsilon
    assert_exported(Attention(), x, tmp_path / "a.onnx")


def test_any_batch_where_asked_for(tmp_path):
    model, x = chained()
    batch = torch.export.Dim("batch", min=1, max=64)
    assert_exported(model, x, tmp_path / "a.onnx", dynamic_shapes=({0: batch},), input_names=["x"])
    other = torch.cat([x, -x])
    assert torch.equal(in_onnxruntime(tmp_path / "a.onnx", other, LEVELS[1]), model(other).detach())


def test_a_layer_alone_and_an_image_alone(tmp_path):
    torch.manual_seed(0)
    assert_exported(
        sparse(nn.Linear(24, 8), FORMATS["int4 by tensor"]), whole((3, 24), X_SCALE, 127), tmp_path / "a.onnx"
    )
    x = whole((1, 8, 6, 6), X_SCALE, 127)[0]
    assert_exported(sparse(nn.Conv2d(8, 4, 3), FORMATS["int8 by tensor"]), x, tmp_path / "b.onnx")


def test_the_model_stays_as_it_is(tmp_path):
    model, x = chained()
    model.train()
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    sparse24.export_onnx(model, x, tmp_path / "a.onnx")
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True)) and model[0].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_fake_quantisation_is_refused_by_name(tmp_path):
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8))
    sparse24.prune(model)
    sparse24.quantize(model)
    with pytest.raises(RuntimeError, match=r"must be converted .* \['0', '1'\]"):
        sparse24.export_onnx(model, torch.zeros(1, 16), tmp_path / "a.onnx")
    assert not (tmp_path / "a.onnx").exists()


# ---- Do the tests bite? ----------------------------------------------------------------------------------------------

PLANTED = {
    "no clip: ONNX rounds to -128": ("LEVELS[torch.int8]", "1e9", test_what_is_out_of_range_or_between_two_numbers),
    "scales of activations are left out": ("if self.x_scale is not None:", "if False:", test_any_batch_where_asked_for),
    "the bias is lost": ("self._dense_weight(), self.bias)", "self._dense_weight())", test_any_batch_where_asked_for),
    "padding is lost": ("self.conv._inner_padding, ", "(0, 0), ", test_chained_layers_give_the_same_bits),
    "activations are lost": ("ops.ACTIVATIONS[self.activation]", "", test_chained_layers_give_the_same_bits),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_caught(tmp_path, monkeypatch, bug):
    right, wrong, test = PLANTED[bug]
    source = Path(onnx_export.__file__).read_text()
    assert source.count(right) == 1
    changed = types.ModuleType("changed")
    exec(compile(source.replace(right, wrong), "changed.py", "exec"), vars(changed))
    monkeypatch.setattr(sparse24, "export_onnx", changed.export_onnx)
    with pytest.raises((AssertionError, RuntimeError)):
        test(tmp_path)
