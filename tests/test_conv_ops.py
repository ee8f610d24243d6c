"""sparse24.ops.conv2d on the CPU, on every instruction set, against torch's dense convolution in float64."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from bounds import EXACT
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse24 import ops

ALL_ISAS = ["portable", "avx2", "avx512", "avx512_bf16", "amx"]
ISAS = ALL_ISAS[: ALL_ISAS.index(ops.cpu_isa()) + 1]
INT4: torch.dtype = torch.int4
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
KINDS = [*((dtype, False) for dtype in (*FLOATS, torch.int8, INT4)), (torch.int8, True), (INT4, True)]
GEOMETRIES = 60  # drawn for each instruction set and kind of weight


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with ops.force_cpu_isa(request.param):
        yield request.param


@dataclass
class Geometry:
    channels: int  # of a group
    outputs: int  # of a group
    groups: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    batch: int
    size: tuple[int, int]

    @classmethod
    def draw(cls, source: random.Random) -> Geometry:
        def pair(*choices: int) -> tuple[int, int]:
            return source.choice(choices), source.choice(choices)

        while True:
            channels = source.choice([1, 3, 4, 5, 7, 8, 12, 16, 32, 33, 64, 70])
            drawn = cls(
                *(channels, source.choice([1, 5, 16, 20]), source.choice([1, 1, 2, 3]), pair(1, 1, 2, 3)),
                *(pair(1, 1, 2, 3), pair(0, 0, 1, 2), pair(1, 1, 2), source.choice([0, 1, 2, 3])),
                size=(source.randint(1, 9), source.randint(1, 9)),
            )
            sides = zip(drawn.dilation, drawn.kernel_size, drawn.padding, strict=True)
            spans = [d * (k - 1) + 1 - 2 * p for d, k, p in sides]
            if all(size >= span for size, span in zip(drawn.size, spans, strict=True)):
                return drawn

    @property
    def sizes(self) -> dict[str, int]:
        return {"out_channels": self.outputs * self.groups, "in_channels": self.channels * self.groups}

    def conv(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class Weight:
    """A random weight of a geometry: packed, and dense as F.conv2d takes it, of whole numbers or not."""

    def __init__(self, geometry: Geometry, dtype: torch.dtype, weight_only: bool, integers: bool) -> None:
        self.geometry, self.dtype, self.weight_only = geometry, dtype, weight_only
        outputs, (r, s), channels = geometry.sizes["out_channels"], geometry.kernel_size, geometry.channels
        rows = (outputs * r * s, channels)
        self.integer = dtype in (torch.int8, INT4)
        if dtype == INT4:
            matrix = torch.randint(-8, 8, rows, dtype=torch.int8)
            matrix = torch.where(ops.prune_mask(matrix, "pair 4:8"), matrix, 0)
            values, meta = ops.compress(ops.pack_int4(matrix), "pair 4:8")
        else:
            full = torch.randint(-4, 5, rows) if integers or self.integer else torch.randn(rows)
            values, meta = ops.prune_compress(full.to(dtype))
            matrix = ops.decompress(values, meta, in_features=channels)
        self.values, self.meta = values.view(outputs, r, s, -1), meta.view(outputs, r, s, -1)
        self.packed = ops.conv2d_pack(
            self.values, self.meta, in_channels=geometry.sizes["in_channels"], groups=geometry.groups
        )
        self.dense = matrix.view(outputs, r, s, channels).permute(0, 3, 1, 2).double()
        self.scales = None
        if self.integer:
            self.scales = torch.ones(outputs) if integers else torch.rand(outputs) + 0.5

    def conv(self, x: Tensor, bias: Tensor | None = None, **options: object) -> Tensor:
        g = self.geometry
        scales = None if options.get("out_dtype") is torch.int32 else self.scales
        geometry = {"stride": g.stride, "padding": g.padding, "dilation": g.dilation, "groups": g.groups}
        options |= {"dtype": self.dtype, "weight_only": self.weight_only, "kernel_size": g.kernel_size}
        return ops.conv2d(x, self.packed, bias, scales, **g.sizes, **geometry, **options)

    def seen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x as the kernels see it, and the scale of each image: the int8 rule in torch, else x and 1."""
        if not self.integer or self.weight_only:
            x = x.bfloat16() if self.dtype == torch.bfloat16 else x
            return x.double(), torch.ones(len(x))
        amax = x.float().abs().amax((1, 2, 3)) if x.numel() else x.new_zeros(len(x))
        scale = torch.where(amax == 0, 1, amax / 127)
        finite = x.isfinite().all(3).all(2).all(1)
        q = torch.round(x.float() / scale[:, None, None, None]).clamp(-127, 127)
        return torch.where(finite[:, None, None, None], q, 0).double(), torch.where(finite, scale, torch.nan)


def draw_x(geometry: Geometry, dtype: torch.dtype, source: random.Random, integers: bool) -> Tensor:
    """x in one of the orders in which it may lie in memory."""
    shape = (geometry.batch, geometry.sizes["in_channels"], *geometry.size)
    x = (torch.randint(-4, 5, shape) if integers else torch.randn(shape)).to(dtype)
    order = source.choice(["contiguous", "channels last", "sliced", "sliced last", "turned"])
    if order == "channels last":
        return x.contiguous(memory_format=torch.channels_last)
    if order == "turned":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if order.startswith("sliced"):
        wide = torch.full((shape[0], shape[1] + 3, shape[2] + 2, shape[3] + 1), torch.nan).to(dtype)
        if order == "sliced last":
            wide = wide.contiguous(memory_format=torch.channels_last)
        wide[:, 2 : 2 + shape[1], 1 : 1 + shape[2], : shape[3]] = x
        return wide[:, 2 : 2 + shape[1], 1 : 1 + shape[2], : shape[3]]
    return x


def assert_order(y: Tensor, x: Tensor) -> None:
    """y lies channels last where x does, else it is contiguous."""
    last = x.stride(1) == 1 and not x.is_contiguous() or x.shape[1] == 1 and not x.is_contiguous()
    assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@pytest.mark.parametrize("dtype,weight_only", KINDS, ids=str)
def test_integers_are_exact(isa: str, dtype: torch.dtype, weight_only: bool) -> None:
    source = random.Random(f"{dtype}{weight_only}")
    torch.manual_seed(0)
    for _ in range(GEOMETRIES):
        geometry = Geometry.draw(source)
        weight = Weight(geometry, dtype, weight_only, integers=True)
        int8_x = weight.integer and not weight_only
        x = draw_x(geometry, torch.int8 if int8_x else source.choice(FLOATS), source, integers=True)
        outputs = geometry.sizes["out_channels"]
        bias = torch.randint(-3, 4, (outputs,)).float() if source.random() < 0.5 else None
        exact = geometry.conv(x.double(), weight.dense)
        options: dict[str, object] = {"out_dtype": torch.float32}
        if int8_x:
            options["x_scales"] = torch.full((source.choice([1, geometry.batch]),), 2.0)
        expected = exact * (2 if int8_x else 1) + (0 if bias is None else bias[:, None, None])
        if source.random() < 0.3:
            residual = torch.randint(-3, 4, exact.shape).half()
            residual = residual.contiguous(memory_format=source.choice([torch.channels_last, torch.contiguous_format]))
            options["residual"], expected = residual, expected + residual
        if source.random() < 0.3:
            options["activation"], expected = "relu", expected.relu()
        y = weight.conv(x, bias, **options)
        assert torch.equal(y, expected.float()), geometry
        assert_order(y, x)
        options |= {"out_dtype": torch.int8, "y_scale": torch.tensor(4.0)}
        assert torch.equal(weight.conv(x, bias, **options), torch.round(expected / 4).clamp(-127, 127).to(torch.int8))
        if int8_x:
            assert torch.equal(weight.conv(x, out_dtype=torch.int32), exact.int())


@pytest.mark.parametrize("dtype,weight_only", KINDS, ids=str)
def test_within_the_bound(isa: str, dtype: torch.dtype, weight_only: bool) -> None:
    source = random.Random(f"{dtype}{weight_only}")
    torch.manual_seed(1)
    for _ in range(GEOMETRIES // 3):
        geometry = Geometry.draw(source)
        weight = Weight(geometry, dtype, weight_only, integers=False)
        x = draw_x(geometry, source.choice(FLOATS), source, integers=False)
        bias = torch.randn(geometry.sizes["out_channels"]).to(x.dtype)
        y = weight.conv(x, bias)
        assert y.dtype == x.dtype
        seen, s = weight.seen(x)
        scales = torch.ones(len(bias)) if weight.scales is None else weight.scales
        if weight.integer and not weight_only:  # every operation rounds to float32
            product = geometry.conv(seen, weight.dense).float() * (s[:, None, None, None] * scales[:, None, None])
            assert torch.equal(y, (product + bias.float()[:, None, None]).to(x.dtype))
            continue
        dense = weight.dense * scales.double()[:, None, None, None]
        exact = geometry.conv(seen, dense, bias.double())
        features = geometry.channels * geometry.kernel_size[0] * geometry.kernel_size[1]
        bound = (features + 2) * 2**-24 * geometry.conv(seen.abs(), dense.abs(), bias.double().abs())
        assert ((y - exact).abs() <= bound + torch.finfo(x.dtype).eps / 2 * exact.abs() + 2**-24).all(), geometry


@pytest.mark.parametrize("activation", EXACT)
def test_activations(isa: str, activation: str) -> None:
    geometry = Geometry(8, 20, 1, (3, 3), (1, 1), (1, 1), (1, 1), 2, (7, 5))
    weight = Weight(geometry, torch.float32, False, integers=True)
    x = torch.randint(-2, 3, (2, 8, 7, 5)).float()
    expected = EXACT[activation](geometry.conv(x.double(), weight.dense) / 1)
    assert (weight.conv(x, activation=activation) - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("dtype,weight_only", KINDS, ids=str)
def test_what_is_not_finite_stays_where_it_is(isa: str, dtype: torch.dtype, weight_only: bool) -> None:
    geometry = Geometry(8, 5, 1, (3, 3), (1, 1), (0, 0), (1, 1), 2, (6, 6))
    weight = Weight(geometry, dtype, weight_only, integers=True)
    x = torch.ones(2, 8, 6, 6)
    clean = weight.conv(x)
    x[1, :, 0, 0] = torch.nan
    y = weight.conv(x)
    assert torch.equal(y[0], clean[0]) and y[1, :, 0, 0].isnan().any()
    if weight.integer and not weight_only:
        assert y[1].isnan().all()  # its scale is that of the image
    else:
        assert torch.equal(y[1, :, 1:, 1:], clean[1, :, 1:, 1:])


def test_dropped_channels_are_not_touched(isa: str) -> None:
    geometry = Geometry(4, 3, 1, (1, 1), (1, 1), (0, 0), (1, 1), 1, (2, 2))
    weight = Weight(geometry, torch.float32, False, integers=True)
    values, meta = ops.compress(torch.tensor([[1.0, 0, 2, 0]] * 3))
    weight.packed = ops.conv2d_pack(values.view(3, 1, 1, 2), meta.view(3, 1, 1, 1), in_channels=4)
    x = torch.full((1, 4, 2, 2), torch.inf)
    x[:, 0::2] = 1
    assert torch.equal(weight.conv(x), torch.full((1, 3, 2, 2), 3.0))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8, INT4], ids=str)
def test_pack_is_exact_whatever_the_bytes(dtype: torch.dtype) -> None:
    source = random.Random(5)
    for _ in range(40):
        geometry = Geometry.draw(source)
        weight = Weight(geometry, dtype, False, integers=False)
        meta = torch.randint(0, 256, weight.meta.shape, dtype=torch.uint8)
        if -(-geometry.channels // (8 if dtype == INT4 else 4)) % 2:
            meta[..., -1] &= 15  # the unused half of a row's last byte, which is 0, is not kept
        packed = ops.conv2d_pack(weight.values, meta, in_channels=geometry.sizes["in_channels"], groups=geometry.groups)
        sizes = {**geometry.sizes, "kernel_size": geometry.kernel_size, "groups": geometry.groups}
        values_back, meta_back = ops.conv2d_unpack(packed, **sizes, dtype=dtype)
        assert torch.equal(values_back, weight.values) and torch.equal(meta_back, meta)


@pytest.mark.parametrize("dtype,weight_only", KINDS, ids=str)
def test_gradients(dtype: torch.dtype, weight_only: bool) -> None:
    source = random.Random(7)
    for _ in range(10):
        geometry = Geometry.draw(source)
        weight = Weight(geometry, dtype, weight_only, integers=True)
        shape = (geometry.batch, geometry.sizes["in_channels"], *geometry.size)
        x = torch.randint(-3, 4, shape).float().requires_grad_()
        bias = torch.randn(geometry.sizes["out_channels"]).requires_grad_()
        y = weight.conv(x, bias)
        grad = torch.randint(-3, 4, y.shape).float()
        ours = torch.autograd.grad(y, (x, bias), grad)
        reference = torch.autograd.grad(geometry.conv(x, weight.dense.float(), bias), (x, bias), grad)
        for mine, torchs in zip(ours, reference, strict=True):
            assert torch.equal(mine, torchs)


def test_shapes_and_order_without_data() -> None:
    source = random.Random(9)
    for _ in range(20):
        geometry = Geometry.draw(source)
        weight = Weight(geometry, torch.float32, False, integers=False)
        x = draw_x(geometry, torch.float32, source, integers=False)
        y = weight.conv(x)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = weight.conv(mode.from_tensor(x))
        assert fake.shape == y.shape and (fake.stride() == y.stride() or y.numel() == 0)


def test_opcheck() -> None:
    geometry = Geometry(8, 6, 2, (3, 2), (2, 1), (1, 0), (1, 2), 2, (6, 7))
    for dtype in (torch.float32, torch.int8):
        weight = Weight(geometry, dtype, False, integers=False)
        x, bias = torch.randn(2, 16, 6, 7), torch.randn(12)
        sizes = (12, 16, [3, 2], [2, 1], [1, 0], [1, 2], 2, str(dtype).removeprefix("torch."), "none", False, "float32")
        arguments = (x, weight.packed, bias, weight.scales, None, None, None, *sizes)
        torch.library.opcheck(torch.ops.sparse24.conv2d, arguments)
        last = (x.contiguous(memory_format=torch.channels_last), *arguments[1:])
        torch.library.opcheck(torch.ops.sparse24.conv2d, last, test_utils=("test_schema", "test_faketensor"))


def test_threads_do_not_change_a_bit() -> None:
    geometry = Geometry(64, 48, 1, (3, 3), (1, 1), (1, 1), (1, 1), 3, (40, 40))
    weight = Weight(geometry, torch.float32, False, integers=False)
    x = torch.randn(3, 64, 40, 40)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results += [weight.conv(x), weight.conv(x.contiguous(memory_format=torch.channels_last))]
    torch.set_num_threads(before)
    assert all(torch.equal(y, results[0]) for y in results)


G = Geometry(8, 6, 1, (3, 3), (1, 1), (0, 0), (1, 1), 1, (5, 5))
W = Weight(G, torch.float32, False, integers=True)
X = torch.zeros(1, 8, 5, 5)


def call(**options: object) -> Tensor:
    defaults = {"out_channels": 6, "in_channels": 8, "kernel_size": (3, 3), "dtype": torch.float32}
    return ops.conv2d(options.pop("x", X), options.pop("packed", W.packed), **{**defaults, **options})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"x": X[0]}, r"x must be \[B, 8, H, W\] for in_channels = 8; got \[8, 5, 5\]"),
        ({"x": X[:, :7]}, r"x must be \[B, 8, H, W\] .*got \[1, 7, 5, 5\]"),
        ({"x": X[:, :, :2]}, r"x must be at least as large as the kernel, \[3, 3\].*got \[1, 8, 2, 5\]"),
        ({"groups": 3}, r"groups must divide in_channels and out_channels; got groups 3"),
        ({"stride": (0, 1)}, r"stride must be two numbers of at least 1; got \[0, 1\]"),
        ({"padding": (-1, 0)}, r"padding must be two numbers of at least 0; got \[-1, 0\]"),
        ({"dilation": (1,)}, r"dilation must be two numbers"),
        ({"packed": W.packed[:-64]}, r"packed must be contiguous uint8"),
        ({"x": X.double()}, r"x must be float32, .*; got float64"),
        ({"bias": torch.zeros(5)}, r"bias must be \[6\]; got \[5\]"),
        (
            {"residual": torch.zeros(1, 6, 3, 2)},
            r"residual must be of the shape of y, \[1, 6, 3, 3\]; got \[1, 6, 3, 2\]",
        ),
        ({"weight_only": True}, r"weight_only is for an int8 or int4 weight"),
        ({"activation": "tanh"}, r"activation must be .*got 'tanh'"),
    ],
)
def test_bad_call(options: dict[str, object], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call(**options)


@pytest.mark.parametrize(
    "values, meta, message",
    [
        (W.values[0], W.meta[0], r"values must be \[O, R, S, slots\]; got \[3, 3, 4\]"),
        (W.values[..., :2], W.meta, r"values must be \[6, 3, 3, 4\] for in_channels = 8 and groups = 1; got"),
        (W.values, W.meta[:, :2], r"meta must be uint8 \[6, 3, 3, 1\] to match values"),
    ],
)
def test_bad_weight(values: Tensor, meta: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.conv2d_pack(values, meta, in_channels=8)
