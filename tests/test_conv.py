"""SparseConv2d against torch's dense convolution: geometry, forms, state, and its place in the flow."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import sparse24
from sparse24 import SparseConv2d, ops
from sparse24.conv import as_matrix
from sparse24.rounding import LEVELS, quantize_rows

INT4: torch.dtype = torch.int4
GEOMETRIES: dict[str, dict] = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "1x1 stride 2": {"kernel_size": 1, "stride": 2},
    "same, dilated": {"kernel_size": 3, "padding": "same", "dilation": 2},
    "same, uneven": {"kernel_size": (2, 4), "padding": "same"},
    "valid": {"kernel_size": (1, 5), "padding": "valid", "padding_mode": "replicate"},
    "groups, reflect": {"kernel_size": 3, "groups": 2, "padding": 1, "padding_mode": "reflect"},
    "circular": {"kernel_size": 5, "padding": (2, 1), "padding_mode": "circular", "bias": False},
    "replicate, stride": {"kernel_size": 3, "stride": (2, 1), "padding": (1, 0), "padding_mode": "replicate"},
}
PATCH = {"kernel_size": 4, "stride": 4}
KINDS: dict[str, dict] = {
    "f32": {},
    "f16": {"dtype": torch.float16},
    "bf16": {"dtype": torch.bfloat16},
    "i8": {"weight_dtype": torch.int8},
    "i8 only": {"weight_dtype": torch.int8, "weight_only": True},
    "i4": {"weight_dtype": INT4, "pattern": "pair 4:8"},
    "i4 only": {"weight_dtype": INT4, "pattern": "pair 4:8", "weight_only": True},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES)


def dense_of(layer: SparseConv2d) -> nn.Conv2d:
    """The dense convolution with the layer's weight, in float64."""
    dense = layer._dense_layer(layer.bias is not None, "cpu", torch.float64)
    with torch.no_grad():
        dense.weight.copy_(layer._dense_weight())
        if dense.bias is not None and layer.bias is not None:
            dense.bias.copy_(layer.bias)
    return dense


def whole_numbers(layer: SparseConv2d) -> SparseConv2d:
    """The same layer with weights of small whole numbers, so that every sum is exact."""
    state = layer.state_dict()
    generator = torch.Generator().manual_seed(3)
    if layer.weight_dtype in LEVELS:
        state["scales"] = torch.ones_like(state["scales"])
        # What torch's convolution is given for int8 has a scale of 1 if x reaches 127.
    else:
        state["values"] = torch.randint(-3, 4, state["values"].shape, generator=generator).to(layer.dtype)
        state["values"][state["values"] == 0] = 1
    if layer.bias is not None:
        state["bias"] = torch.randint(-3, 4, state["bias"].shape, generator=generator).to(layer.dtype)
    layer.load_state_dict(state)
    return layer


def draw(layer: SparseConv2d, *shape: int) -> Tensor:
    """Whole numbers that reach 127 in each image where they are rounded to int8, which makes the scale 1."""
    x = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(4)).to(layer.dtype)
    if layer.weight_dtype in LEVELS and not layer.weight_only:
        x.view(-1, shape[-3] * shape[-2] * shape[-1])[:, 0] = 127
    return x


def assert_exact(layer: SparseConv2d, x: Tensor) -> None:
    y, expected = layer(x), dense_of(layer)(x.double())
    assert y.dtype == x.dtype and y.shape == expected.shape
    assert torch.equal(y, expected.to(y.dtype))
    if x.dim() == 4:
        last = not x.is_contiguous()
        assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


# ---- Numbers ---------------------------------------------------------------------------------------------------------


@every_geometry
@every_kind
def test_as_torch(kind: str, geometry: str) -> None:
    torch.manual_seed(0)
    layer = whole_numbers(SparseConv2d(16, 24, **GEOMETRIES[geometry], **KINDS[kind]))
    for packed in (False, True):
        if packed:
            layer.pack()
        x = draw(layer, 2, 16, 9, 11)
        with torch.no_grad():
            assert_exact(layer, x)
            assert_exact(layer, x.contiguous(memory_format=torch.channels_last))
            assert_exact(layer, draw(layer, 16, 8, 8))


@every_kind
def test_patches_as_torch(kind: str) -> None:
    torch.manual_seed(0)
    layer = whole_numbers(SparseConv2d(3, 20, **PATCH, axis="patch", **KINDS[kind]))
    x = draw(layer, 2, 3, 10, 13)  # what does not fill a patch is left out
    if layer.weight_dtype in LEVELS and not layer.weight_only:
        x[:, :, ::4, ::4] = 127  # of every patch
    for packed in (False, True):
        if packed:
            layer.pack()
        with torch.no_grad():
            assert_exact(layer, x)
            assert_exact(layer, x.contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_activation(activation: str) -> None:
    layer = SparseConv2d(8, 6, 3, activation=activation)
    x = torch.randn(1, 8, 5, 5)
    expected = layer(x)
    assert (layer.pack()(x) - expected).abs().max() < 1e-6


def test_gradients() -> None:
    layer = whole_numbers(SparseConv2d(8, 6, 3, padding=1))
    x = torch.randint(-3, 4, (2, 8, 5, 5)).float().requires_grad_()
    grads = []
    for packed in (False, True):
        if packed:
            layer.pack()
        x.grad = layer.bias.grad = None
        layer(x).square().sum().backward()
        grads.append((x.grad, layer.bias.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    layer.unpack()
    layer(x).sum().backward()
    assert layer.values.grad is not None and layer.values.grad.shape == layer.values.shape


def test_autocast() -> None:
    layer = SparseConv2d(16, 8, 3).pack()
    x = torch.randn(1, 16, 6, 6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert (y - layer(x)).abs().max() < 0.05
    with pytest.raises(RuntimeError, match="x must be torch.float32, the dtype of this layer"):
        layer(x.bfloat16())


def test_compile_has_no_graph_break() -> None:
    layers = nn.Sequential(SparseConv2d(16, 24, 3, padding=1).pack(), nn.ReLU(), SparseConv2d(24, 8, 1).pack()).eval()
    x = torch.randn(2, 16, 7, 7)
    with torch.no_grad():
        assert torch.equal(torch.compile(layers, fullgraph=True, backend="aot_eager")(x), layers(x))


def test_emulation_runs_dense_and_says_so() -> None:
    layer = SparseConv2d(16, 8, 3).pack()
    x = torch.randn(1, 16, 6, 6)
    with torch.no_grad(), sparse24.emulate("sm_80"):
        y = layer(x)
        row = sparse24.report(nn.Sequential(layer), x).rows[0]
    assert row.kernel == "dense" and "no sparse convolution on a GPU" in row.reason
    assert (y - layer(x)).abs().max() < 1e-5


# ---- State -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@every_kind
def test_round_trips(kind: str, packed: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [
        SparseConv2d(20, 12, (3, 2), groups=2, **KINDS[kind]),
        SparseConv2d(3, 12, **PATCH, axis="patch", **KINDS[kind]),
    ]
    for layer in layers:
        layer.eval()
        if packed:
            layer.pack()
        x = torch.randn(2, layer.in_channels, 9, 8, dtype=layer.dtype)
        with torch.no_grad():
            y = layer(x)
            state = layer.state_dict()
            assert state["values"].shape == layer._shapes()["values"] and state["meta"].dtype == torch.uint8
            options = {name: getattr(layer, name) for name in ("kernel_size", "stride", "groups", "axis")}
            fresh = SparseConv2d(layer.in_channels, 12, **options, **KINDS[kind])
            fresh.load_state_dict(state)
            assert torch.equal((fresh.pack() if packed else fresh)(x), y)
            on_meta = SparseConv2d(layer.in_channels, 12, **options, **KINDS[kind], device="meta")
            on_meta.load_state_dict(state, assign=True)
            assert torch.equal((on_meta.pack() if packed else on_meta)(x), y)
            assert torch.equal(copy.deepcopy(layer)(x), y)
            assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)
            safetensors.torch.save_file(state, tmp_path / "state.safetensors")
            fresh.load_state_dict(safetensors.torch.load_file(tmp_path / "state.safetensors"))
            buffer = io.BytesIO()
            torch.save(state, buffer)
            buffer.seek(0)
            fresh.load_state_dict(torch.load(buffer, weights_only=True))
            assert torch.equal((fresh.pack() if packed else fresh)(x), y)
            assert torch.equal(layer.unpack().pack()(x), fresh.pack()(x))


def test_a_cast_keeps_scales_in_float32() -> None:
    layer = SparseConv2d(16, 8, 3, weight_dtype=torch.int8).pack()
    assert layer.bfloat16()(torch.randn(1, 16, 5, 5).bfloat16()).dtype == torch.bfloat16
    assert layer.scales.dtype == torch.float32 and layer.packed is not None


def test_damaged_state_is_refused() -> None:
    layer = SparseConv2d(16, 8, 3)
    state = layer.state_dict()
    state["meta"] = state["meta"].clone()
    state["meta"][1, 2, 0, 1] = 0
    before = layer.values.clone()
    with pytest.raises(RuntimeError, match=r"meta is corrupt: row 15, group 2 has the code 0"):
        layer.load_state_dict(state)
    assert torch.equal(layer.values, before)
    with pytest.raises(RuntimeError, match=r"values must be \[8, 3, 3, 8\]"):
        layer.load_state_dict({**layer.state_dict(), "values": torch.zeros(8, 3, 3, 6)})


def test_the_weight_as_others_see_it() -> None:
    layer = SparseConv2d(16, 8, 3, groups=2).pack()
    assert layer.weight.shape == (8, 8, 3, 3) and layer.weight.dtype == torch.float32
    assert torch.equal(layer.weight + 0, layer._dense_weight())
    with pytest.raises(AttributeError, match="weight is read-only"):
        layer.weight = torch.zeros(8, 8, 3, 3)
    with pytest.raises(AttributeError, match="a packed SparseConv2d has no values"):
        layer.values  # noqa: B018


# ---- From dense, and the flow ----------------------------------------------------------------------------------------


class Block(nn.Module):
    """As in a ResNet, with a patch embedding before and a depthwise convolution in it."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 4, 4)
        self.down = nn.Conv2d(32, 16, 1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.middle = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.up = nn.Conv2d(16, 32, 1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).relu()
        y = self.depthwise(self.middle(self.norm(self.down(x)).relu()).relu())
        return self.head((x + self.up(y)).mean((2, 3)))


def outcomes(report) -> dict[str, tuple[str, str]]:
    return {row.name: (row.outcome, row.detail) for row in report.rows}


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block().eval()


def test_prune_masks_channels(block: Block) -> None:
    result = outcomes(sparse24.prune(block))
    assert result["patch"] == ("pruned", "2:4, axis=patch") and result["down"] == ("pruned", "2:4, axis=channels")
    assert result["depthwise"] == ("skipped", "it has 1 input channels a group; a group of 2:4 is four")
    for name, axis in (("patch", "patch"), ("middle", "channels"), ("up", "channels")):
        matrix = as_matrix(getattr(block, name).weight.detach(), axis)
        assert ((matrix.unflatten(1, (-1, 4)) != 0).sum(-1) == 2).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convert_changes_nothing(block: Block, dtype: torch.dtype) -> None:
    block.to(dtype)
    sparse24.prune(block)
    dense = copy.deepcopy(block)
    exact = copy.deepcopy(block).double()
    result = outcomes(sparse24.convert(block))
    name = str(dtype).removeprefix("torch.")
    assert result["middle"] == ("converted", f"2:4 {name}, axis=channels") and result["depthwise"][0] == "skipped"
    x = torch.randn(2, 3, 32, 32).to(dtype)
    with torch.no_grad():
        y, reference, truth = block(x), dense(x), exact(x.double())
    assert (y - truth).abs().max() <= 2 * (reference - truth).abs().max() + 1e-6
    rows = {row.name: row for row in sparse24.report(block, x).rows}
    assert rows["middle"].tokens == (2 * 8 * 8,) and rows["patch"].tokens == (2 * 8 * 8,)
    assert rows["middle"].kernel != "dense" and rows["depthwise"].kernel == "dense"


@pytest.mark.parametrize("weight_only", [False, True])
@pytest.mark.parametrize("dtype", [torch.int8, INT4], ids=str)
def test_the_integers_are_those_of_fake_quantisation(
    block: Block, dtype: torch.dtype, weight_only: bool, tmp_path: Path
) -> None:
    fresh = copy.deepcopy(block)
    pattern = "pair 4:8" if dtype is INT4 else "2:4"
    sparse24.prune(block, pattern)
    masked = {name: getattr(block, name).weight.detach().clone() for name in ("patch", "middle", "head")}
    assert outcomes(sparse24.quantize(block, dtype, weight_only=weight_only))["middle"][0] == "quantized"
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        fake = block(x)
    sparse24.convert(block)
    for name, weight in masked.items():
        layer = getattr(block, name)
        q, scale = quantize_rows(weight.flatten(1), LEVELS[dtype])
        assert layer.weight_dtype is dtype and layer.weight_only is weight_only
        assert torch.equal(layer.scales, scale.squeeze(1))
        assert torch.equal(layer._dense_weight(), (q * scale).view(weight.shape))
    with torch.no_grad():
        y = block(x)
        assert (y - fake).abs().max() <= 1e-5 * fake.abs().max()
        sparse24.save(block, tmp_path / "block.safetensors")
        assert torch.equal(sparse24.load(tmp_path / "block.safetensors", fresh)(x), y)


def test_int4_of_a_2_4_mask_is_refused(block: Block) -> None:
    sparse24.prune(block)
    result = outcomes(sparse24.quantize(block, INT4))
    assert result["middle"] == ("skipped", "it is pruned to 2:4: int4 needs pair 4:8; reprune=True chooses such a mask")
    sparse24.convert(block)
    assert "int4 keeps pairs of columns" in outcomes(sparse24.quantize(block, INT4))["middle"][1]
    assert outcomes(sparse24.quantize(block))["middle"] == ("quantized", "2:4 int8")


def test_training_keeps_the_mask_and_rounds(block: Block) -> None:
    block.train()
    sparse24.prune(block)
    sparse24.quantize(block)
    optimizer = torch.optim.SGD(block.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        block(torch.randn(4, 3, 16, 16)).square().mean().backward()
        optimizer.step()
    block.eval()
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        fake = block(x)
        sparse24.convert(block)
        assert (block(x) - fake).abs().max() <= 1e-4 * fake.abs().max()


# ---- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"in_channels": 3}, r"in_channels / groups must be at least 4; got 3 / 1"),
        ({"axis": "patch"}, r"axis 'patch' needs stride = kernel_size"),
        ({"axis": "rows"}, r"axis must be 'channels' or 'patch'; got 'rows'"),
        ({"groups": 3}, r"in_channels must be divisible by groups"),
        ({"padding": "some"}, r"[Ii]nvalid padding string"),
        ({"padding_mode": "none"}, r"padding_mode must be one of"),
        ({"pattern": "pair 4:8"}, r"pattern must be '2:4' or '1:2' for a float32 weight"),
        ({"weight_dtype": INT4}, r"pattern must be 'pair 4:8' for an int4 weight; got '2:4'"),
        ({"weight_only": True}, r"weight_only is for a weight_dtype of torch.int8 or torch.int4; got torch.float32"),
    ],
)
def test_bad_argument(arguments: dict, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        SparseConv2d(**{"in_channels": 16, "out_channels": 8, "kernel_size": 3, **arguments})


def test_bad_input() -> None:
    layer = SparseConv2d(16, 8, 3).pack()
    for shape in ([1, 15, 5, 5], [16, 5], [1, 1, 16, 5, 5]):
        with pytest.raises(
            RuntimeError, match=r"x must be \[B, 16, H, W\] or \[16, H, W\] to match weight \[8, 16, 3, 3\]"
        ):
            layer(torch.zeros(shape))
    with pytest.raises(RuntimeError, match=r"x must be at least as large as the kernel, \[3, 3\]"):
        layer(torch.zeros(1, 16, 2, 5))
    assert layer(torch.zeros(0, 16, 5, 5)).shape == (0, 8, 3, 3)


@pytest.mark.parametrize("given", [{}, {"stride": 2}, {"padding": 1}, {"groups": 2}, {"kernel_size": 3}], ids=str)
@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format], ids=str)
def test_only_a_product_of_pixels_is_handed_over(order: torch.memory_format, given: dict[str, int]) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 24, **{"kernel_size": 1, **given})
    model = nn.Sequential(conv).eval()
    sparse24.prune(model)
    x = torch.randn(2, 16, 5, 6).contiguous(memory_format=order)
    with torch.no_grad():
        expected = conv(x)
        sparse24.convert(model)
        with ops.force_cpu_kernels("dense"):
            y = model(x)
            (row,) = sparse24.report(model, x).rows
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert row.kernel.startswith("dense") == (not given and order is torch.channels_last), row


def test_from_dense_refuses_what_is_not_sparse() -> None:
    with pytest.raises(RuntimeError, match=r"weight does not fit 2:4: row 0, group 0"):
        SparseConv2d.from_dense(nn.Conv2d(16, 8, 3))
    with pytest.raises(RuntimeError, match=r"has to stay dense: it has 1 input channels a group"):
        SparseConv2d.from_dense(nn.Conv2d(16, 16, 3, groups=16))
