"""Quantisation: training computes what integer layers do; observers, learnt scales, state, and what goes with it."""

import copy
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparse24
from sparse24 import observers, ops, rounding
from sparse24.conv import pad, split_padding
from sparse24.observers import BINS, MaxObserver, PercentileObserver
from sparse24.quantization import FakeQuantize, fake_quantization
from sparse24.rounding import LEVELS, quantize_by, quantize_rows, round_by
from sparse24.sparse_module import SparseModule

INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
PATTERNS = {torch.int8: "2:4", INT4: "pair 4:8"}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(50, 21),
    "wide": lambda: nn.Linear(2500, 9, bias=False),  # more products than one exact sum of float32 takes
    "conv": lambda: nn.Conv2d(12, 10, 3, padding=1, stride=(2, 1)),
    "grouped": lambda: nn.Conv2d(16, 8, (3, 2), groups=2, padding="same", padding_mode="reflect"),
    "deep": lambda: nn.Conv2d(160, 6, 3, bias=False),
    "patch": lambda: nn.Conv2d(3, 9, 4, stride=4),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)
every_dtype = pytest.mark.parametrize("dtype", PATTERNS, ids=str)
every_scale = pytest.mark.parametrize("activations", ["token", "max", "percentile"])


def inputs(layer: nn.Module, count: int = 7, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if isinstance(layer, nn.Conv2d):
        return torch.randn(count, layer.in_channels, 9, 12, generator=generator)
    return torch.randn(count, 3, layer.in_features, generator=generator)


def quantised(kind: str, dtype: torch.dtype, activations: str, float_dtype: torch.dtype, learn: bool) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS[kind]()).to(float_dtype)
    sparse24.prune(model, PATTERNS[dtype])
    calibration = None if activations == "token" else [inputs(model[0], seed=s).to(float_dtype) for s in (1, 2)]
    report = sparse24.quantize(
        model, dtype, activations=activations, calibration=calibration, percentile=99.0, learn_scales=learn
    )
    assert report.rows[0].outcome == "quantized", report
    return model


# ---- Exactness -------------------------------------------------------------------------------------------------------


@every_layer
@every_dtype
@every_scale
@pytest.mark.parametrize("learn", [False, True], ids=["observed", "learnt"])
@pytest.mark.parametrize("float_dtype", FLOATS, ids=str)
def test_training_computes_what_the_integer_layer_does(kind, dtype, activations, learn, float_dtype):
    model = quantised(kind, dtype, activations, float_dtype, learn)
    rule = fake_quantization(model[0])
    if learn:  # no longer where calibration left them
        with torch.no_grad():
            rule.scales.mul_(torch.linspace(-1.1, 0.7, len(rule.scales)))
            if rule.x_scale is not None:
                rule.x_scale.mul_(0.8)
    x = inputs(model[0], seed=5).to(float_dtype)
    fake, weight = model(x).detach(), model[0].weight.detach().clone()
    report = sparse24.convert(model)
    assert report.rows[0].outcome == "converted", report
    layer = model[0]
    assert isinstance(layer, SparseModule) and layer.weight_dtype is dtype
    with torch.no_grad():
        assert torch.equal(layer._dense_weight().to(float_dtype), weight)
        assert torch.equal(layer(x), fake)
        for isa in ("portable", "avx2"):
            try:
                with ops.force_cpu_isa(isa):
                    assert torch.equal(layer(x), fake), isa
            except RuntimeError as error:
                assert "cannot run" in str(error) or "does not" in str(error)
        assert torch.equal(layer.unpack()(x), fake)


@every_dtype
@every_scale
def test_whole_numbers_are_those_of_numpy(dtype, activations):
    """By arithmetic that shares no line with the package: sums of int64, float32 scales one after another."""
    model = quantised("linear", dtype, activations, torch.float32, False)
    mask, rule = model[0].parametrizations.weight[0].mask, fake_quantization(model[0])
    weight = np.where(mask.numpy(), model[0].parametrizations.weight.original.detach().numpy(), np.float32(0))
    x = inputs(model[0], seed=5)
    x[0, 0] = 0
    x[1, 1] *= 1e-38  # subnormal
    x[2, 2] *= 1e30
    y = model(x).detach().numpy().reshape(-1, 21)
    rows = x.numpy().reshape(-1, 50)

    amax = np.abs(rows).max(1, keepdims=True)
    x_scale = amax / np.float32(127) if rule.x_scale is None else np.full_like(amax, rule.x_scale)
    x_scale[x_scale == 0] = 1
    q_x = np.clip(np.rint(rows / x_scale), -127, 127).astype(np.int64)
    scales = np.abs(weight).max(1) / np.float32(LEVELS[dtype])
    q = np.clip(np.rint(weight / scales[:, None]), -LEVELS[dtype], LEVELS[dtype]).astype(np.int64)
    expected = (q_x @ q.T).astype(np.float32) * (x_scale * scales) + model[0].bias.detach().numpy()
    assert expected.dtype == np.float32 and (y == expected).all()


@every_scale
@pytest.mark.parametrize("kind", ["linear", "conv", "patch"])
def test_activations_at_the_edges(kind, activations):
    model = quantised(kind, torch.int8, activations, torch.float32, False)
    x = inputs(model[0], count=8, seed=5)
    x[0] = 0
    x[1] = -0.0
    x[2] *= 1e-39
    x[3] *= 1e30  # saturates
    x[4].view(-1)[5] = float("inf")
    x[5].view(-1)[5] = -float("inf")
    x[6].view(-1)[5] = float("nan")
    fake = model(x).detach()
    sparse24.convert(model)
    with torch.no_grad():
        y = model(x)
    assert torch.equal(y.nan_to_num(12345.0), fake.nan_to_num(12345.0))
    assert y[:4].isfinite().all()
    if activations == "token":  # a token, image or patch that is not finite is NaN
        broken = y[4:7].isnan()
        assert broken.all() if kind == "conv" else broken.flatten(1).any(1).all()
    else:  # what is too large is cut off, NaN is 0
        assert y[4:].isfinite().all()
        limit = 127 * model[0].x_scale
        clipped = x.clone().nan_to_num(0.0, float(limit), -float(limit))
        assert torch.equal(model(clipped).detach(), y)


# ---- Oracles ---------------------------------------------------------------------------------------------------------


def test_torch_ao_agrees():
    """Its static linear layer: q + 128 of a quint8 x, per-channel qint8 weights, y rounded to quint8 again."""
    model = quantised("linear", torch.int8, "max", torch.float32, False)
    model[0].bias = None  # theirs is rounded to the scale of the sums
    x = inputs(model[0], seed=5).flatten(0, 1)
    exact = model(x).detach()
    sparse24.convert(model)
    layer, y_scale = model[0], float(exact.abs().max()) / 127
    scales, q = layer.scales, torch.round(layer.weight.detach() / layer.scales[:, None])
    theirs = torch._make_per_channel_quantized_tensor(q.char(), scales.double(), torch.zeros(21, dtype=torch.int64), 0)
    packed = torch.ops.quantized.linear_prepack(theirs, None)
    rounded = torch.quantize_per_tensor(x, float(layer.x_scale), 128, torch.quint8)
    found = torch.ops.quantized.linear(rounded, packed, y_scale, 128).int_repr().int() - 128

    q_x = ops.quantize(x, layer.x_scale)
    assert torch.equal(q_x.int(), (rounded.int_repr().int() - 128).clamp(-127))
    sizes = {"out_features": 21, "in_features": 50, "dtype": torch.int8}
    scale = torch.tensor(y_scale)
    ours = ops.linear(
        q_x, layer.packed, None, scales, **sizes, x_scales=layer.x_scale, y_scale=scale, out_dtype=torch.int8
    )
    position = exact.double() / y_scale  # they may differ where this lies between two whole numbers
    tie = ((position - position.floor()) - 0.5).abs() < 1e-4
    assert torch.equal(ours.int()[~tie], found[~tie]) and tie.float().mean() < 0.01


@pytest.mark.parametrize("activations", ["max", "percentile"])
def test_onnxruntime_agrees(activations):
    """Its execution of a QDQ model with the same scales."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    model = quantised("linear", torch.int8, activations, torch.float32, False)
    x = inputs(model[0], seed=5)
    sparse24.convert(model)
    layer = model[0]
    q = torch.round(layer.weight.detach() / layer.scales[:, None]).to(torch.int8)
    constants = {
        "x_scale": layer.x_scale.numpy(),
        "least": -127 * layer.x_scale.numpy(),
        "zero": np.int8(0),
        "q": q.T.contiguous().numpy(),
        "scales": layer.scales.numpy(),
        "zeros": np.zeros(21, np.int8),
        "bias": layer.bias.detach().numpy(),
    }
    make = onnx.helper.make_node
    nodes = [
        make("Max", ["x", "least"], ["x_clipped"]),  # QuantizeLinear goes down to -128
        make("QuantizeLinear", ["x_clipped", "x_scale", "zero"], ["q_x"]),
        make("DequantizeLinear", ["q_x", "x_scale", "zero"], ["x_hat"]),
        make("DequantizeLinear", ["q", "scales", "zeros"], ["w_hat"], axis=1),
        make("MatMul", ["x_hat", "w_hat"], ["product"]),
        make("Add", ["product", "bias"], ["y"]),
    ]
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        nodes,
        "qdq",
        [onnx.helper.make_tensor_value_info("x", kind, [None, 3, 50])],
        [onnx.helper.make_tensor_value_info("y", kind, [None, 3, 21])],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (theirs,) = session.run(None, {"x": x.numpy()})
    with torch.no_grad():
        ours = model(x)
    # Both are the same whole numbers; theirs may sum in float32 what ours sums exactly.
    size = F.linear(quantize_by(x, layer.x_scale).abs() * layer.x_scale, layer.weight.detach().abs(), layer.bias.abs())
    assert ((ours - torch.from_numpy(theirs)).abs() <= 54 * 2**-24 * size).all()
    assert not torch.equal(ours, F.linear(x, layer.weight.detach(), layer.bias))  # the rounding is there


# ---- Rounding activations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_quantize_op(dtype, isa):
    x = torch.randn(5, 7, 33, generator=torch.Generator().manual_seed(0)).mul(50).to(dtype)
    x[0, 0, :5] = torch.tensor([0.5, 1.5, -0.5, -2.5, 126.5], dtype=dtype)  # ties, with scale 1
    x[1, 0, :6] = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-30, -0.0, 6e4], dtype=dtype)
    try:
        with ops.force_cpu_isa(isa):
            for scale in (1.0, 0.37, 3e-39, 1e30):
                one = torch.tensor(scale)
                expected = quantize_by(x, one).to(torch.int8)
                assert torch.equal(ops.quantize(x, one), expected)
                assert torch.equal(ops.quantize(x[:, ::2, 1:], one.view(1)), expected[:, ::2, 1:])
                assert torch.equal(ops.quantize(x.mT, one), expected.mT)
                images = x.view(1, 5, 7, 33).contiguous(memory_format=torch.channels_last)
                q = ops.quantize(images, one)
                assert torch.equal(q[0], expected) and q.is_contiguous(memory_format=torch.channels_last)
    except RuntimeError as error:
        if isa == "portable" or "isa" not in str(error):
            raise
        pytest.skip(str(error))
    assert ops.quantize(x[:0], one).shape == (0, 7, 33)


@pytest.mark.parametrize(
    "x, scale, message",
    [
        (torch.ones(3, dtype=torch.float64), torch.tensor(1.0), "x must be float32, float16 or bfloat16"),
        (torch.ones(3), torch.ones(2), r"scale must be one float32 number; got \[2\]"),
        (torch.ones(3), torch.tensor(1.0, dtype=torch.float64), "scale must be one float32 number"),
        (torch.ones(3), torch.tensor(0.0), "scale must be a positive finite number; got 0"),
        (torch.ones(3), torch.tensor(float("nan")), "scale must be a positive finite number; got nan"),
        (torch.ones(3), torch.tensor(float("inf")), "scale must be a positive finite number; got inf"),
    ],
)
def test_quantize_op_refuses(x, scale, message):
    with pytest.raises(RuntimeError, match=message):
        ops.quantize(x, scale)


# ---- Observers -------------------------------------------------------------------------------------------------------


def test_max_observer():
    observer = MaxObserver()
    for batch in torch.randn(10, 100, generator=torch.Generator().manual_seed(0)):
        observer.add(batch)
    observer.add(torch.empty(0))
    observer.add(torch.tensor([-12.7]))
    assert float(observer.scale()) == pytest.approx(0.1)
    assert float(MaxObserver().scale()) == 1


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.9, 100.0])
@pytest.mark.parametrize("order", ["as it comes", "small first", "large first"])
def test_percentile_observer(percentile, order):
    x = torch.randn(30_000, generator=torch.Generator().manual_seed(0)) ** 3
    x = x if order == "as it comes" else x[x.abs().argsort(descending=order == "large first")]
    observer = PercentileObserver(percentile)
    for batch in x.split(777):
        observer.add(batch.view(-1, 1))
    assert int(observer.counts.sum()) == 30_000
    exact = float(x.abs().sort().values[round(300 * percentile) - 1])  # so many of 30,000 do not exceed it
    found, width = float(observer.scale()) * 127, 2 * float(x.abs().max()) / BINS
    assert exact - 1e-6 * exact <= found <= exact + width * (1 + 1e-6)


def test_percentile_observer_of_zeros_and_what_follows():
    observer = PercentileObserver(75.0)
    observer.add(torch.zeros(60))
    assert float(observer.scale()) == 1
    observer.add(torch.full((40,), 2.0))
    assert float(observer.scale()) * 127 == pytest.approx(2.0)
    observer = PercentileObserver(50.0)
    observer.add(torch.tensor([0.0, 0.0, 0.0, 2.0]))
    assert float(observer.scale()) * 127 <= 2 * 2.0 / BINS


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))


def batches(count: int = 3) -> list[Tensor]:
    return list(torch.randn(count, 16, 24, generator=torch.Generator().manual_seed(1)))


def test_each_layer_is_observed_in_one_pass():
    model = network()
    sparse24.prune(model, skip="4")
    seen: list[int] = []
    model.register_forward_hook(lambda *_: seen.append(1))
    hidden = [model[:2](batch) for batch in batches()]
    sparse24.quantize(model, activations="max", calibration=batches())
    assert len(seen) == 3 and model.training
    largest = max(float(batch.abs().max()) for batch in batches())
    assert float(fake_quantization(model[0]).x_scale) == pytest.approx(largest / 127)
    assert float(fake_quantization(model[2]).x_scale) == pytest.approx(max(float(h.max()) for h in hidden) / 127)
    assert fake_quantization(model[4]) is None
    assert all(not hooks for module in model for hooks in (module._forward_hooks,))


def test_a_generator_of_batches_is_not_gathered():
    """A list, a DataLoader, or anything that can be gone through: one batch at a time."""
    alive: list[Any] = []

    class Batches:
        def __iter__(self):
            import weakref

            for batch in batches(4):
                batch = batch.clone()
                alive.append(weakref.ref(batch))
                yield batch
                del batch
                assert sum(one() is not None for one in alive) <= 1

    model = network()
    sparse24.prune(model)
    sparse24.quantize(model, activations="max", calibration=Batches())
    assert len(alive) == 4


def test_inputs_that_are_not_finite_are_told():
    model = network()
    sparse24.prune(model)
    bad = batches()
    bad[1][3, 4] = float("nan")
    for activations in ("max", "percentile"):
        with pytest.raises(RuntimeError, match="calibration must give every layer finite inputs; those of 0 are not"):
            sparse24.quantize(model, activations=activations, calibration=bad)
    assert all(fake_quantization(layer) is None for layer in model)
    with pytest.raises(RuntimeError, match="at least one batch"):
        sparse24.quantize(model, activations="max", calibration=[])


def test_layers_that_no_batch_reaches_are_left_alone():
    model = network()
    sparse24.prune(model)
    model[4].forward_was_called = False
    whole = nn.ModuleDict({"used": model, "unused": nn.Linear(8, 8)})
    whole.forward = lambda x: model(x)
    sparse24.prune(whole)
    report = sparse24.quantize(whole, activations="max", calibration=batches())
    outcomes = {row.name: (row.outcome, row.detail) for row in report.rows}
    assert outcomes["unused"] == ("skipped", "the calibration batches do not reach it")
    assert outcomes["used.0"] == ("quantized", "int8 rounding in training")
    assert report.title == "quantize to int8, activations by max"


# ---- Learnt scales ---------------------------------------------------------------------------------------------------


def test_the_gradients_of_a_step_are_those_of_its_formula():
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(6, 40, generator=generator) * 3).requires_grad_()
    scale = torch.rand(6, 1, generator=generator).mul(0.05).add(0.005).requires_grad_()
    grad = torch.randn(6, 40, generator=generator)
    rounded = round_by(x, scale)
    assert rounded.q.abs().max() == 127 and (rounded.q.abs() < 127).any()
    found = torch.autograd.grad(rounded.value, [x, scale], grad)

    # round() as the identity for gradients: q = clamp(v), value = (q + the rest of the rounding) * scale.
    v = x / scale
    q = v.clamp(-127, 127)
    straight = (q + (torch.round(q) - q).detach()) * scale
    expected = torch.autograd.grad(straight, [x, scale], grad)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1] / (40 * 127) ** 0.5)


def test_gradients_of_a_layer_are_those_of_what_it_multiplies():
    for kind in LAYERS:
        model = quantised(kind, torch.int8, "max", torch.float32, True)
        rule, layer = fake_quantization(model[0]), model[0]
        x = inputs(layer, seed=5).requires_grad_()
        y = model(x)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
        wanted = [x, layer.parametrizations.weight.original, rule.scales, rule.x_scale]
        found = torch.autograd.grad(y, wanted, grad)

        inner, outer = split_padding(layer) if isinstance(layer, nn.Conv2d) else (0, [])
        met = x[:, :, :8] if kind == "patch" else pad(x, outer, getattr(layer, "padding_mode", ""))
        value = round_by(met, rule.activation_scale()).value
        if isinstance(layer, nn.Linear):
            float_y = F.linear(value, layer.weight, layer.bias)
        else:
            geometry = layer.stride, inner, layer.dilation, layer.groups
            float_y = F.conv2d(value, layer.weight, layer.bias, *geometry)
        expected = torch.autograd.grad(float_y, wanted, grad)
        for one, other in zip(found, expected, strict=True):
            assert (one - other).abs().max() <= 1e-4 * other.abs().max(), kind


def test_learning_scales_alone_lowers_the_loss_of_rounding():
    model, x = network(), batches(1)[0]
    sparse24.prune(model, "pair 4:8")
    target = model(x).detach()
    sparse24.quantize(model, INT4, activations="max", calibration=[x], learn_scales=True)
    rules = [fake_quantization(layer) for layer in model[::2]]
    scales = [one for rule in rules for one in (rule.scales, rule.x_scale)]
    optimizer = torch.optim.Adam([{"params": [one], "lr": 1e-3 * float(one.detach().mean())} for one in scales])
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.97 * losses[0]


# ---- State -----------------------------------------------------------------------------------------------------------


def static_model(learn: bool = False) -> nn.Sequential:
    model = network()
    sparse24.prune(model)
    sparse24.quantize(model, activations="percentile", calibration=batches(), learn_scales=learn)
    return model


@pytest.mark.parametrize("learn", [False, True])
def test_scales_stay_float32_and_come_back(learn, tmp_path: Path):
    model = static_model(learn)
    scales = [fake_quantization(layer).x_scale.clone() for layer in model[::2]]
    fresh = static_model(learn)
    with torch.no_grad():
        for layer in fresh[::2]:
            fake_quantization(layer).x_scale.fill_(3.0)
    fresh.load_state_dict(model.state_dict())
    x = batches()[0]
    assert torch.equal(fresh(x), model(x)) and torch.equal(copy.deepcopy(model)(x), model(x))

    half = copy.deepcopy(model).half()
    assert all(
        fake_quantization(layer).x_scale.dtype is torch.float32 and torch.equal(fake_quantization(layer).x_scale, scale)
        for layer, scale in zip(half[::2], scales, strict=True)
    )
    fake = half(x.half()).detach()
    sparse24.convert(half)
    with torch.no_grad():
        assert torch.equal(half[0](x.half()), model.half()[0](x.half()))
        assert (half(x.half()) - fake).abs().max() < 0.05
    assert all(torch.equal(layer.x_scale, scale) for layer, scale in zip(half[::2], scales, strict=True))

    sparse24.save(half, tmp_path / "model.safetensors")
    again = sparse24.load(tmp_path / "model.safetensors", network().half())
    assert [layer.x_rounding for layer in again[::2]] == ["tensor"] * 3
    with torch.no_grad():
        assert torch.equal(again(x.half()), half(x.half()))
        bf16 = copy.deepcopy(again).bfloat16()
        assert torch.equal(bf16[0].x_scale, scales[0]) and bf16(x.bfloat16()).dtype is torch.bfloat16
        for other in (copy.deepcopy(again), again.cpu()):
            assert torch.equal(other(x.half()), half(x.half()))


def test_a_file_from_before_there_was_x_rounding_is_read(tmp_path: Path):
    model, path = network(), tmp_path / "model.safetensors"
    sparse24.prune(model)
    sparse24.quantize(model)
    sparse24.convert(model)
    sparse24.save(model, path)
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["sparse24"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict
    for layer in header["layers"].values():
        del layer["x_rounding"]
    safetensors.torch.save_file(tensors, path, {"sparse24": json.dumps(header)})
    again = sparse24.load(path, network())
    with torch.no_grad():
        assert torch.equal(again(batches()[0]), model(batches()[0]))


def test_state_that_does_not_fit_is_refused():
    model = static_model()
    sparse24.convert(model)
    state = model.state_dict()
    for value, message in (
        (torch.tensor(0.0), "x_scale must be one positive finite number; got 0.0"),
        (torch.tensor(float("nan")), "x_scale must be one positive finite number; got nan"),
        (torch.ones(2), r"x_scale must be \[\] torch.float32; got \[2\]"),
        (torch.tensor(1.0, dtype=torch.float64), r"x_scale must be \[\] torch.float32; got \[\] torch.float64"),
    ):
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(state | {"0.x_scale": value})
    with pytest.raises(RuntimeError, match="Missing key.*0.x_scale"):
        model.load_state_dict({key: tensor for key, tensor in state.items() if key != "0.x_scale"})
    token = network()
    sparse24.prune(token)
    sparse24.quantize(token)
    sparse24.convert(token)
    with pytest.raises(RuntimeError, match="Unexpected key.*0.x_scale"):
        token.load_state_dict(state)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scales": torch.ones(3)}, r"scales must be \[8\] positive finite numbers; got \[3\]"),
        ({"scales": torch.zeros(8)}, r"scales must be \[8\] positive finite numbers; got a least of 0.0"),
        ({"x_scale": -1.0}, "x_scale must be one positive finite number; got -1.0"),
        ({"x_scale": torch.ones(2)}, r"x_scale must be one positive finite number; got \[1.0, 1.0\]"),
        (
            {"x_scale": 1.0, "weight_only": True},
            "x_rounding 'tensor' is for an integer weight_dtype without weight_only",
        ),
    ],
)
def test_scales_that_do_not_fit_are_refused(options, message):
    dense = nn.Linear(16, 8)
    with torch.no_grad():
        dense.weight.copy_(torch.where(ops.prune_mask(dense.weight), dense.weight, 0))
    with pytest.raises(RuntimeError, match=message):
        sparse24.SparseLinear.from_dense(dense, weight_dtype=torch.int8, **options)


def test_quantising_after_conversion_gives_the_same():
    learnt, shortcut = network(), network()
    for model in (learnt, shortcut):
        sparse24.prune(model)
    sparse24.convert(shortcut)
    for model in (learnt, shortcut):
        report = sparse24.quantize(model, activations="percentile", calibration=batches())
        assert [row.outcome for row in report.rows] == ["quantized"] * 3
    sparse24.convert(learnt)
    x = batches()[1]
    with torch.no_grad():
        assert torch.equal(learnt(x), shortcut(x))
    assert "x_rounding=tensor" in repr(shortcut[0])


# ---- Training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learn", [False, True])
def test_compiled(learn):
    torch._dynamo.reset()
    model, x = static_model(learn), batches()[0]
    compiled = torch.compile(model, fullgraph=True)
    found, expected = compiled(x), model(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)
    wanted = list(model.parameters())
    for one, other in zip(
        torch.autograd.grad(found.square().sum(), wanted),
        torch.autograd.grad(expected.square().sum(), wanted),
        strict=True,
    ):
        assert (one - other).abs().max() <= 0.05 * other.abs().max()
    sparse24.convert(model)
    with torch.no_grad():
        torch._dynamo.reset()
        assert torch.equal(torch.compile(model, fullgraph=True)(x), model(x))


@pytest.mark.parametrize("learn", [False, True])
def test_autocast_and_gradient_scaling(learn):
    model, x = static_model(learn), batches()[0]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype is torch.bfloat16
    before = [parameter.detach().clone() for parameter in model.parameters()]
    scaler.scale(y.float().square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(
        not torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True) if one.numel() > 1
    )
    fake = None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        fake = model[0](x)
        sparse24.convert(model)
        assert torch.equal(model[0](x), fake)  # the weight is rounded as it is, in float32


def _one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = static_model(learn=True)
    run = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for batch in batches():
        optimizer.zero_grad()
        run(batch[8 * rank : 8 * rank + 8]).square().mean().backward()
        optimizer.step()
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    del run  # before the group: torch would wait for a thread of the group that waits for the interpreter's lock
    torch.distributed.destroy_process_group()


def test_two_processes_learn_the_same_scales(tmp_path: Path):
    torch.multiprocessing.spawn(_one_of_two, (str(tmp_path),), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(tensor, two[key]) for key, tensor in one.items())
    alone = static_model(learn=True)
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.05)
    for batch in batches():
        optimizer.zero_grad()
        (sum(alone(half).square().mean() for half in batch.split(8)) / 2).backward()
        optimizer.step()
    for key, tensor in alone.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(one[key], tensor, rtol=1e-4, atol=1e-6)


# ---- The flow --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"activations": "minmax"}, "activations must be one of token, max, percentile; got 'minmax'"),
        ({"activations": "max"}, "activations 'max' needs calibration batches"),
        ({"calibration": [torch.ones(1, 24)]}, "activations 'token' takes no calibration batches"),
        ({"weight_only": True, "learn_scales": True}, "weight_only leaves activations as they are"),
        ({"percentile": 0.0}, "percentile must be above 0 and at most 100; got 0.0"),
        ({"reprune": True}, "reprune is for torch.int4"),
    ],
)
def test_bad_arguments(arguments, message):
    model = network()
    sparse24.prune(model)
    with pytest.raises(RuntimeError, match=message):
        sparse24.quantize(model, **arguments)


def test_a_mask_that_int4_cannot_run_is_refused_or_chosen_anew():
    model = network()
    sparse24.prune(model)
    report = sparse24.quantize(model, INT4)
    assert report.rows[0].detail == "it is pruned to 2:4: int4 needs pair 4:8; reprune=True chooses such a mask"
    before = model[0].parametrizations.weight[0].mask.clone()
    kept = model[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match="at least one batch"):
        sparse24.quantize(model, INT4, reprune=True, activations="max", calibration=[])
    assert model[0].parametrizations.weight[0].pattern == "2:4"  # as it was
    report = sparse24.quantize(model, INT4, reprune=True)
    assert [row.outcome for row in report.rows] == ["quantized"] * 3
    rule = model[0].parametrizations.weight[0]
    assert rule.pattern == "pair 4:8" and not (rule.mask & ~before).any()
    best = ops.prune_mask(kept, "pair 4:8")
    assert torch.equal(rule.mask, best & before)
    x = batches()[0]
    fake = model[0](x).detach()
    sparse24.convert(model)
    with torch.no_grad():
        assert torch.equal(model[0](x), fake) and model[0].weight_dtype is INT4


@every_dtype
@every_scale
def test_layers_without_a_mask_learn_the_same_rounding(dtype, activations):
    model, x = network(), batches()[0]
    calibration = None if activations == "token" else batches()
    sparse24.prune(model, PATTERNS[dtype], skip="2")
    report = sparse24.quantize(model, dtype, activations=activations, calibration=calibration, unpruned=True)
    name = str(dtype).removeprefix("torch.")
    details = [row.detail.removeprefix(f"{name} rounding in training") for row in report.rows]
    assert details == ["", ", dense", ""]
    rule, layer = fake_quantization(model[2]), model[2]
    assert (layer.weight != 0).float().mean() > 0.6
    q, scale = quantize_rows(layer.parametrizations.weight.original.detach(), LEVELS[dtype])
    assert torch.equal(layer.weight.detach(), q * scale)
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    q_x, x_scale = quantize_rows(hidden)
    if rule.x_scale is not None:
        q_x, x_scale = quantize_by(hidden, rule.x_scale), rule.x_scale
    sums = (q_x.double() @ q.double().T).float()
    assert torch.equal(layer(hidden).detach(), sums * (x_scale * scale.flatten()) + layer.bias.detach())
    fake = model(x).detach()
    report = sparse24.convert(model)
    assert [row.outcome for row in report.rows] == ["converted", "skipped", "converted"]
    assert report.rows[1].detail == "it is not pruned: fake quantisation stays" and model[2] is layer
    with torch.no_grad():
        assert torch.equal(model(x), fake)


def test_training_with_sparse_kernels_gives_way_to_whole_numbers():
    model = network()
    sparse24.prune(model)
    sparse24.train_sparse(model)
    sparse24.quantize(model)
    report = sparse24.train_sparse(model)
    assert {row.outcome for row in report.rows} == {"dense"}
    assert report.rows[0].detail == "fake quantisation multiplies in whole numbers"
    fake = model[0](batches()[0]).detach()
    sparse24.convert(model)
    with torch.no_grad():
        assert torch.equal(model[0](batches()[0]), fake)


def test_gradients_through_a_frozen_static_layer():
    model = static_model()
    sparse24.convert(model)
    x = batches()[0].requires_grad_()
    y = model(x)
    with torch.no_grad():
        assert torch.equal(model(x), y)
    (grad,) = torch.autograd.grad(y.sum(), x)
    layer = model[2]
    hidden = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).mul(3).requires_grad_()
    (found,) = torch.autograd.grad(layer(hidden).sum(), hidden)
    inside = (hidden / layer.x_scale).abs() <= 127
    assert not inside.all()
    expected = torch.where(inside, layer.weight.detach().sum(0).expand_as(hidden), 0)
    torch.testing.assert_close(found, expected)
    assert grad.abs().sum() > 0
    row = sparse24.report(model, batches()[0]).rows[0]
    assert row.kernel.split(",")[0] in ("perm", "amx", "dense", "portable") and not row.reason.startswith("x or bias")


@pytest.mark.parametrize("kind", ["linear", "wide"])
@every_scale
def test_the_emulated_gpu_computes_the_same(kind, activations):
    model = quantised(kind, torch.int8, activations, torch.float16, False)
    x = inputs(model[0], seed=5).half()
    fake = model(x).detach()
    sparse24.convert(model)
    with torch.no_grad(), sparse24.emulate("sm_80") as emulation:
        y = model(x)
    assert torch.equal(y, fake)
    names = [report.kernel for report in emulation.reports]
    assert any(name.startswith("linear_s8") for name in names), names
    assert any(name.startswith("quantize") for name in names) == (activations == "token")


def test_nothing_of_ours_is_left_behind():
    model = static_model()
    sparse24.convert(model)
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())
    assert not any(isinstance(module, FakeQuantize) for module in model.modules())
    q, scale = quantize_rows(torch.ones(1, 3))
    assert q.tolist() == [[127.0] * 3] and float(scale) == pytest.approx(1 / 127)


# ---- Planted bugs ----------------------------------------------------------------------------------------------------


def check_products(module: Any) -> None:
    """The largest sums there are, odd, beyond what float32 holds; of a linear layer and of a convolution."""
    x, w = torch.full((2, 2501), 127.0), torch.full((3, 2501), 127.0)
    w[:, 0], w[1, 1:] = 126, -127
    exact = (x.double() @ w.double().T).float()
    assert exact.abs().max() > 2**25
    one, other = (module.Rounded(t.char(), torch.ones(len(t), 1), t) for t in (x, w))
    assert torch.equal(module.linear(one, other, None), exact)
    images = module.Rounded(one.q.view(2, 2501, 1, 1), torch.ones(2, 1, 1, 1), one.value.view(2, 2501, 1, 1))
    kernel = module.Rounded(other.q.view(3, 2501, 1, 1), torch.ones(3, 1, 1, 1), other.value.view(3, 2501, 1, 1))
    y = module.conv2d(images, kernel, None, stride=1, padding=0, dilation=1, groups=1)
    assert torch.equal(y.flatten(1), exact)


def check_rounding(module: Any) -> None:
    x = torch.tensor([[0.5, 1.5, -2.5, 126.6, 200.0, float("nan"), -float("inf")], [0.0] * 7])
    assert module.quantize_by(x, torch.tensor(1.0))[0].tolist() == [0, 2, -2, 127, 127, 0, -127]
    rounded = module.round_rows(x)
    assert rounded.scale[0].isnan() and rounded.scale[1] == 1 and not rounded.q.any()
    assert module.round_rows(torch.tensor([[-127.0, 63.4]])).q.tolist() == [[-127, 63]]


def check_step(module: Any) -> None:
    x = torch.tensor([[0.7, 3.0, -1.0]], requires_grad=True)
    scale = torch.tensor([[0.5]], requires_grad=True)
    module.round_by(x, scale, 4).value.sum().backward()
    assert x.grad.tolist() == [[1, 0, 1]]
    assert float(scale.grad) == pytest.approx((1 - 1.4 + 4) / (3 * 4) ** 0.5)


def check_observers(module: Any) -> None:
    observer = module.PercentileObserver(50.0)
    for value, count in ((1.0, 60), (3.0, 30), (1000.0, 10)):
        observer.add(torch.full((count,), value))
    assert 0.99 < float(observer.scale()) * 127 < 2.1
    observer.add(torch.full((100,), -3.0))
    assert 2.99 < float(observer.scale()) * 127 < 4.1


MUTANTS: dict[str, tuple[str, Callable[[Any], None], str, str]] = {
    "sums in one piece": ("rounding", check_products, "EXACT_PRODUCTS = 1024", "EXACT_PRODUCTS = 4096"),
    "pieces are summed in float32": ("rounding", check_products, ".double().sum(0).float()", ".sum(0)"),
    "rounded towards zero": (
        "rounding",
        check_rounding,
        "torch.round(x.float() / scale)",
        "torch.trunc(x.float() / scale)",
    ),
    "down to -128": (
        "rounding",
        check_rounding,
        "clamp(-levels, levels).nan_to_num",
        "clamp(-levels - 1, levels).nan_to_num",
    ),
    "NaN stays": ("rounding", check_rounding, ".nan_to_num(0.0)", ".nan_to_num(1.0)"),
    "zeros have no scale": ("rounding", check_rounding, "torch.where(scale == 0, 1.0, scale)", "scale"),
    "a row that is not finite looks finite": (
        "rounding",
        check_rounding,
        "torch.where(finite, scale, torch.nan)",
        "scale.nan_to_num()",
    ),
    "what is cut off has a gradient": ("rounding", check_step, "torch.where(inside, grad, 0)", "grad"),
    "the scale learns from what is in range alone": (
        "rounding",
        check_step,
        "torch.where(inside, q - exact, q)",
        "torch.where(inside, q - exact, 0)",
    ),
    "the gradient of the scale is not divided": ("rounding", check_step, " / (shared * ctx.levels) ** 0.5", ""),
    "bins are lost as the range grows": (
        "observers",
        check_observers,
        "self.counts.view(-1, 2).sum(1)",
        "self.counts.view(-1, 2)[:, 0]",
    ),
    "the range grows, its bins do not": (
        "observers",
        check_observers,
        "            self.range *= 2\n",
        "            self.range = amax\n",
    ),
    "the sign counts": ("observers", check_observers, "part.abs().float()", "part.float()"),
    "the bin's lower end": ("observers", check_observers, "(bin_ + 1) / BINS", "bin_ / BINS"),
}


@pytest.mark.parametrize("name", ["", *MUTANTS])
def test_planted_bug_is_caught(name):
    files = {"rounding": rounding.__file__, "observers": observers.__file__}
    where, check, right, wrong = MUTANTS.get(name, ("", None, "", ""))
    if check is None:
        for check in (check_products, check_rounding, check_step):
            check(rounding)
        check_observers(observers)
        return
    source = Path(files[where]).read_text()
    assert source.count(right) == 1
    mutant = types.ModuleType("mutant")
    exec(source.replace(right, wrong), vars(mutant))
    with pytest.raises(AssertionError):
        check(mutant)
