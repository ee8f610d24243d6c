"""The operators on the device, through all of the launch path, by its kernels' PTX on the emulator (sparse24.emulate).

What is expected is the CPU operators, to the bit on integers, and otherwise the bounds of tests/bounds.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import sparse24
from sparse24 import ops
from tests.bounds import EXACT, ROUNDING, assert_linear
from tests.test_linear import Weight, quantize, random_x

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
WEIGHTS = [torch.float16, torch.bfloat16, torch.int8]
SHORT = {torch.float16: "f16", torch.bfloat16: "bf16", torch.int8: "s8"}
TILES = ["256x128", "192x256", "192x128", "128x128", "64x128", "64x64"]


def x_type(weight: Weight) -> torch.dtype:
    """A dtype of x that goes with the weight."""
    return torch.float32 if weight.dtype == torch.int8 else weight.dtype


def integers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return random_x(*shape, dtype=dtype, seed=seed, integers=True)


@pytest.fixture
def device() -> Iterator[sparse24.Emulation]:
    with sparse24.emulate() as run:
        yield run


def kernels(run: sparse24.Emulation) -> list[str]:
    return [report.kernel for report in run.reports]


# ---- Numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", WEIGHTS, ids=str)
@pytest.mark.parametrize("bias_dtype", [None, *FLOATS], ids=str)
@pytest.mark.parametrize(
    "tokens, rows, columns",
    [(1, 1, 1), (2, 7, 4), (3, 17, 12), (16, 65, 20), (17, 64, 130), (63, 129, 64), (65, 63, 260), (130, 200, 100)],
)
def test_integers_are_exact(
    dtype: torch.dtype, bias_dtype: torch.dtype | None, tokens: int, rows: int, columns: int
) -> None:
    weight = Weight(rows, columns, dtype, integers=True)
    x = integers(tokens, columns, dtype=x_type(weight))
    bias = None if bias_dtype is None else integers(rows, dtype=bias_dtype, seed=2)
    for activation in ("none", "relu"):
        expected = weight.linear(x, bias, activation)
        with sparse24.emulate():
            assert torch.equal(weight.linear(x, bias, activation), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", list(EXACT))
@pytest.mark.parametrize("tokens", [5, 70])
def test_reals_are_within_the_bound(device: object, dtype: torch.dtype, activation: str, tokens: int) -> None:
    weight = Weight(70, 300, dtype)
    x, bias = random_x(tokens, 300, dtype=dtype), random_x(70, dtype=torch.float32, seed=2)
    assert_linear(weight.linear(x, bias, activation), x, weight.dense, bias, activation)


@pytest.mark.parametrize("x_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tokens", [9, 40])
def test_int8_equals_the_cpu_to_the_bit(x_dtype: torch.dtype, tokens: int) -> None:
    weight = Weight(70, 1030, torch.int8)
    bias = random_x(70, dtype=torch.float32, seed=3)
    x = random_x(tokens, 1030, dtype=x_dtype) * torch.logspace(-6, 3, tokens)[:, None].to(x_dtype)
    x[3] = 0
    x[4] = torch.nan
    x[5, 7] = torch.inf
    x[6, :2] = torch.tensor([torch.finfo(x_dtype).max, -torch.finfo(x_dtype).max])
    expected = weight.linear(x, bias)
    assert expected.isnan().all(-1).sum() == 2
    with sparse24.emulate():
        torch.testing.assert_close(weight.linear(x, bias), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [3, 20])
def test_dropped_columns_take_no_part(dtype: torch.dtype, tokens: int) -> None:
    dense = integers(20, 40, dtype=dtype)
    dense[:, 0::4], dense[:, 3::4] = 0, 0
    dense[:, 1::4], dense[:, 2::4] = 2, -1  # both kept columns nonzero: no free slot falls on a dropped one
    packed = ops.pack(*ops.compress(dense), in_features=40)
    x = integers(tokens, 40, dtype=dtype)
    expected = F.linear(x.float(), dense.float()).to(dtype)
    x[:, 0::4], x[:, 3::4] = torch.inf, torch.nan
    with sparse24.emulate():
        assert torch.equal(ops.linear(x, packed, out_features=20, in_features=40, dtype=dtype), expected)


# ---- Shapes and strides ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", WEIGHTS, ids=str)
@pytest.mark.parametrize("leading", [(), (1,), (0,), (4, 0), (2, 3), (2, 3, 1, 5)], ids=str)
def test_leading_dimensions(dtype: torch.dtype, leading: tuple[int, ...]) -> None:
    weight = Weight(19, 37, dtype, integers=True)
    x = integers(*leading, 37, dtype=x_type(weight))
    expected = weight.linear(x)
    with sparse24.emulate():
        y = weight.linear(x)
    assert torch.equal(y, expected) and y.shape == (*leading, 19)


@pytest.mark.parametrize("dtype", WEIGHTS, ids=str)
@pytest.mark.parametrize("rows, columns", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("tokens", [0, 1, 30])
def test_empty(dtype: torch.dtype, rows: int, columns: int, tokens: int) -> None:
    weight = Weight(rows, columns, dtype, integers=True)
    x, bias = integers(tokens, columns, dtype=x_type(weight)), integers(rows) - 0.5
    residual = integers(tokens, rows, seed=4)
    for activation in EXACT:
        expected = weight.linear(x, bias, activation)
        with sparse24.emulate() as run:
            torch.testing.assert_close(weight.linear(x, bias, activation), expected, rtol=2**-19, atol=0)
            assert kernels(run) == (
                ["linear_reduce_" + ("i32" if dtype == torch.int8 else "f32")] if expected.numel() else []
            )
    with sparse24.emulate():
        y = weight.linear(x, bias, residual=residual, out_dtype=torch.float32)
    assert torch.equal(y, bias + residual)


def views(columns: int, dtype: torch.dtype) -> dict[str, Tensor]:
    base = integers(12, 9, columns + 16, dtype=dtype)
    beside = integers(20, 100, dtype=dtype)  # its rows begin at multiples of 4 bytes, and not of 16
    beside[:, columns:] = torch.nan if dtype.is_floating_point else 127
    return {
        "beside what must not be read": beside[:, :columns],
        "columns of wider rows": base[:, :, 3 : 3 + columns],
        "aligned to 4 bytes": base[:, :, 4 // base.element_size() :][:, :, :columns],
        "every second row": base[::2, :, 5 : 5 + columns],
        "transposed rows": base[:, :, 7 : 7 + columns].transpose(0, 1),
        "strided columns": integers(18, 2 * columns, dtype=dtype)[:, ::2],
        "one row for all": base[0, :1, :columns].expand(20, columns),
        "one column for all": base[0, :, :1].expand(9, columns),
        "column-major": integers(columns, 21, dtype=dtype).t(),
        "one row of wider ones": base[3, 2:3, 1 : 1 + columns],
    }


@pytest.mark.parametrize("dtype", WEIGHTS, ids=str)
@pytest.mark.parametrize("columns", [45, 64])
def test_views(dtype: torch.dtype, columns: int) -> None:
    weight = Weight(70, columns, dtype, integers=True)
    for name, x in views(columns, x_type(weight)).items():
        expected = weight.linear(x)
        with sparse24.emulate():
            assert torch.equal(weight.linear(x), expected), name


@pytest.mark.parametrize("columns", [45, 64])
def test_views_of_int8(columns: int) -> None:
    weight = Weight(70, columns, torch.int8)
    for name, x in views(columns, torch.int8).items():
        expected = F.linear(x.double(), weight.dense.double()).int()
        weight.scales = None
        with sparse24.emulate():
            assert torch.equal(weight.linear(x, out_dtype=torch.int32), expected), name


# ---- Fused operands --------------------------------------------------------------------------------------------------


def activated(before: Tensor, activation: str) -> Tensor:
    return EXACT[activation](before.double())


@pytest.mark.parametrize("dtype", WEIGHTS, ids=str)
@pytest.mark.parametrize("residual_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tokens", [4, 33])
def test_residual_comes_before_the_activation(
    device: object, dtype: torch.dtype, residual_dtype: torch.dtype, tokens: int
) -> None:
    weight = Weight(40, 60, dtype, integers=True)
    x, bias = integers(tokens, 60, dtype=x_type(weight)), integers(40)
    wide = integers(tokens, 55, dtype=residual_dtype, seed=5) * 8
    for residual in (wide[:, :40].clone(), wide[:, 3:43], wide[:1, 5:45].expand(tokens, 40), wide.t()[:40].t()):
        expected = F.relu(weight.expected(x, bias) + residual.float()).to(x.dtype)
        assert (expected == 0).any() and (expected > 0).any()
        assert torch.equal(weight.linear(x, bias, "relu", residual=residual), expected)
    leading = weight.linear(x.view(tokens, 1, 60), residual=wide[:, None, :40])
    assert torch.equal(leading[:, 0], (weight.expected(x) + wide[:, :40].float()).to(x.dtype))


@pytest.mark.parametrize("dtype", WEIGHTS, ids=str)
@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tokens", [4, 33])
def test_out_dtype_is_one_rounding_from_float32(
    device: object, dtype: torch.dtype, out_dtype: torch.dtype, tokens: int
) -> None:
    weight = Weight(40, 600, dtype, integers=True)
    x = integers(tokens, 600, dtype=x_type(weight)) * 7
    bias = torch.rand(40) / 8 + 1e-3  # float32 has room for it where float16 and bfloat16 have not
    y = weight.linear(x, bias, out_dtype=out_dtype)
    assert torch.equal(y, weight.expected(x, bias).to(out_dtype)) and y.dtype == out_dtype


def requantised(before: Tensor, y_scale: Tensor) -> Tensor:
    return torch.where(before.isnan(), 0, torch.round(before / y_scale).clamp(-127, 127)).to(torch.int8)


@pytest.mark.parametrize("dtype", WEIGHTS, ids=str)
@pytest.mark.parametrize("tokens", [4, 33])
def test_int8_out(device: object, dtype: torch.dtype, tokens: int) -> None:
    weight = Weight(40, 60, dtype, integers=True)
    x, bias = integers(tokens, 60, dtype=x_type(weight)), integers(40) / 4
    bias[3], bias[4], bias[5] = torch.nan, torch.inf, -torch.inf
    for y_scale in (torch.tensor(0.25), torch.tensor([3.0])):
        y = weight.linear(x, bias, y_scale=y_scale, out_dtype=torch.int8)
        assert torch.equal(y, requantised(weight.expected(x, bias), y_scale))
        assert (y[:, 3] == 0).all() and (y[:, 4] == 127).all() and (y[:, 5] == -127).all()


@pytest.mark.parametrize("out_dtype", [*FLOATS, torch.int8], ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 50])
def test_int8_in(device: object, out_dtype: torch.dtype, tokens: int) -> None:
    weight = Weight(33, 70, torch.int8)
    x, s = quantize(random_x(tokens, 70, dtype=torch.float32))
    q, bias = x.to(torch.int8), random_x(33, dtype=torch.float32, seed=7)
    q[0, :3] = torch.tensor([-128, 127, -127], dtype=torch.int8)
    sums = F.linear(q.double(), weight.dense.double()).float()
    y_scale = torch.tensor(0.5) if out_dtype == torch.int8 else None
    for x_scales in (s[:, 0], torch.tensor(0.037), torch.tensor([0.037]), torch.rand(2 * tokens)[::2]):
        before = sums * (x_scales.reshape(-1, 1) * weight.scales) + bias
        y = weight.linear(q, bias, x_scales=x_scales, y_scale=y_scale, out_dtype=out_dtype)
        assert torch.equal(y, before.to(out_dtype) if y_scale is None else requantised(before, y_scale))


@pytest.mark.parametrize("tokens", [1, 16, 50])
def test_int32_out_is_the_plain_sum(device: object, tokens: int) -> None:
    weight = Weight(33, 700, torch.int8)
    weight.scales = None
    q = torch.randint(-128, 128, (tokens, 700), dtype=torch.int8)
    y = weight.linear(q, out_dtype=torch.int32)
    assert y.dtype == torch.int32 and torch.equal(y, F.linear(q.double(), weight.dense.double()).int())


@pytest.mark.parametrize("activation", [name for name in EXACT if name != "none"])
def test_everything_at_once(device: object, activation: str) -> None:
    weight = Weight(40, 100, torch.int8)
    weight.scales = weight.scales / 2000  # so that the sums are of the size where activations bend
    x, bias, residual = (
        random_x(*shape, dtype=torch.float16, seed=n) for n, shape in enumerate([(30, 100), (40,), (30, 40)])
    )
    y = weight.linear(x, bias, activation, residual=residual, out_dtype=torch.float32)
    before = weight.expected(x, bias) + residual.float()
    exact = activated(before, activation)
    bound = 12 * ROUNDING[torch.float32] * exact.abs() + 2**-23 * before.abs() + 2**-25
    assert ((y.double() - exact).abs() <= bound).all()


# ---- The choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", WEIGHTS, ids=str)
@pytest.mark.parametrize("tile", [*TILES, "64x64_by4", "64x64_by1"])
@pytest.mark.parametrize("splits", [1, 3])
def test_every_kernel_gives_the_same_integers(dtype: torch.dtype, tile: str, splits: int) -> None:
    weight = Weight(259, 640, dtype, integers=True)
    x, bias = integers(131, 640, dtype=x_type(weight)), integers(259)
    expected = weight.linear(x, bias, "relu")
    name = f"linear_{SHORT[dtype]}_{tile}"
    with sparse24.emulate(linear_kernel=name, splits=splits) as run:
        assert torch.equal(weight.linear(x, bias, "relu"), expected)
    assert name in kernels(run) and any("linear_reduce" in kernel for kernel in kernels(run)) == (splits > 1)


@pytest.mark.parametrize("dtype", WEIGHTS, ids=str)
@pytest.mark.parametrize("tile", ["16x8", "32x8", "32x16", "64x16"])
@pytest.mark.parametrize("splits", [1, 4])
def test_every_kernel_for_few_tokens_gives_the_same_integers(dtype: torch.dtype, tile: str, splits: int) -> None:
    tokens = int(tile.split("x")[1])
    weight = Weight(130, 1000, dtype, integers=True)
    x, bias = integers(tokens, 1000, dtype=x_type(weight)), integers(130)
    expected = weight.linear(x, bias)
    name = f"linear_few_{SHORT[dtype]}_{tile}"
    with sparse24.emulate(linear_kernel=name, splits=splits) as run:
        assert torch.equal(weight.linear(x, bias), expected)
    assert name in kernels(run)


def test_a_kernel_that_cannot_is_refused_by_name() -> None:
    weight = Weight(64, 40, torch.float16)
    few, many = random_x(17, 40, dtype=torch.float16), random_x(17, 41, dtype=torch.float16)[:, :40]
    for name, x in [("linear_few_f16_32x16", few), ("linear_f16_64x64", many), ("linear_f16_128x128", few), ("x", few)]:
        with (
            sparse24.emulate(linear_kernel=name),
            pytest.raises(RuntimeError, match=f"linear_kernel must be.*got {name}"),
        ):
            weight.linear(x)
    with sparse24.emulate("sm_86", linear_kernel="linear_f16_192x256"), pytest.raises(RuntimeError, match="192x256"):
        Weight(192, 40, torch.float16).linear(few)  # more shared memory than a block of sm_86 may have


def test_the_choice_follows_the_shape() -> None:
    weight = Weight(256, 2048, torch.float16, integers=True)
    seen = {}
    for tokens, multiprocessors in [(1, 108), (16, 108), (17, 108), (17, 2), (300, 1)]:
        x = integers(tokens, 2048, dtype=torch.float16)
        with sparse24.emulate(checks=False, multiprocessors=multiprocessors) as run:
            y = weight.linear(x)
        assert torch.equal(y, weight.linear(x))
        seen[tokens, multiprocessors] = kernels(run)[1:]
    assert all("few" in seen[tokens, 108][0] for tokens in (1, 16))
    assert seen[17, 108][1:] == ["linear_reduce_f32"]  # 4 blocks would leave 104 multiprocessors idle
    assert len(seen[300, 1]) == 1 and "64x64" not in seen[300, 1][0]
    assert len(seen[17, 2]) == 1


@pytest.mark.parametrize("arch", ["sm_86", "sm_90", "sm_120"])
def test_every_arch(arch: str) -> None:
    weight = Weight(200, 96, torch.float16, integers=True)
    x = integers(40, 96, dtype=torch.float16)
    expected = weight.linear(x)
    with sparse24.emulate(arch):
        assert torch.equal(weight.linear(x), expected)


@pytest.mark.parametrize("order", ["reverse", "random"])
def test_splits_do_not_depend_on_the_order_of_blocks(order: str) -> None:
    weight, x = Weight(64, 1024, torch.bfloat16), random_x(20, 1024, dtype=torch.bfloat16)
    with sparse24.emulate(splits=4):
        expected = weight.linear(x)
    with sparse24.emulate(splits=4, order=order, seed=3):
        assert torch.equal(weight.linear(x), expected)


# ---- Decompress ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ops.PATTERNS)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize("columns", [1, 8, 37])
def test_decompress(dtype: torch.dtype, pattern: str, columns: int) -> None:
    weight = torch.randint(0, 120, (9, columns)).to(dtype)
    values, meta = ops.prune_compress(weight, pattern)
    in_features = columns * (2 if dtype == torch.uint8 else 1)
    expected = ops.decompress(values, meta, in_features=in_features, pattern=pattern)
    with sparse24.emulate() as run:
        assert torch.equal(ops.decompress(values, meta, in_features=in_features, pattern=pattern), expected)
    assert [name.split("_")[0] for name in kernels(run)] == ["decompress"]


# ---- torch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", WEIGHTS, ids=str)
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_gradients_equal_those_of_the_cpu(dtype: torch.dtype, activation: str) -> None:
    weight = Weight(24, 40, dtype, integers=True)
    if weight.scales is not None:
        weight.scales = torch.ones_like(weight.scales)
    grad = integers(3, 5, 24, dtype=x_type(weight))

    def gradients() -> list[Tensor]:
        x, bias = integers(3, 5, 40, dtype=x_type(weight)).requires_grad_(), integers(24).requires_grad_()
        residual = integers(3, 5, 24, seed=6).requires_grad_()
        y = weight.linear(x, bias, activation, residual=residual)
        assert y.dtype == x.dtype
        y.backward(grad)
        return [y.detach(), x.grad, bias.grad, residual.grad]

    expected = gradients()
    with sparse24.emulate() as run:
        got = gradients()
    assert any(name.startswith("decompress") for name in kernels(run))
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("name", ["x_scales", "y_scale", "int32"])
def test_no_gradient_of_what_has_none(name: str) -> None:
    weight = Weight(6, 16, torch.int8)
    q, bias = torch.ones(2, 16, dtype=torch.int8), torch.zeros(6, requires_grad=True)
    options = {
        "x_scales": {"x_scales": torch.tensor(1.0), "out_dtype": torch.float32},
        "y_scale": {"x_scales": torch.tensor(1.0), "y_scale": torch.tensor(1.0), "out_dtype": torch.int8},
        "int32": {"out_dtype": torch.int32},
    }[name]
    with pytest.raises(RuntimeError, match="linear has no gradient with x_scales, y_scale or an integer out_dtype"):
        weight.linear(q, bias, **options)
    if name != "int32":
        with sparse24.emulate(), torch.no_grad():
            weight.linear(q, bias, **options)


@pytest.mark.parametrize("dtype", WEIGHTS, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    weight = Weight(6, 37, dtype)
    float_type = x_type(weight)
    x, bias, residual = random_x(2, 3, 37, dtype=float_type), random_x(6, dtype=float_type), torch.randn(2, 3, 6)
    sizes = (6, 37, name)
    with sparse24.emulate():
        fused = torch.ops.sparse24.linear_fused
        nothing = (None, None, None)
        utilities = ("test_schema", "test_faketensor")
        torch.library.opcheck(
            torch.ops.sparse24.linear_inference,
            (x, weight.packed, bias, weight.scales, *sizes, "gelu"),
            test_utils=utilities,
        )
        arguments = (x, weight.packed, bias, weight.scales, None, residual, None, *sizes, "gelu", False, "float32")
        torch.library.opcheck(fused, arguments, test_utils=utilities)
        arguments = (
            x,
            weight.packed,
            None,
            weight.scales,
            None,
            None,
            torch.tensor(0.1),
            *sizes,
            "none",
            False,
            "int8",
        )
        torch.library.opcheck(fused, arguments, test_utils=utilities)
        if dtype == torch.int8:
            q = torch.ones(2, 3, 37, dtype=torch.int8)
            arguments = (q, weight.packed, None, None, *nothing, *sizes, "none", False, "int32")
            torch.library.opcheck(fused, arguments, test_utils=utilities)
    arguments = (x, weight.packed, bias, weight.scales, *nothing, *sizes, "gelu", False, str(float_type)[6:])
    torch.library.opcheck(fused, arguments)  # what the CPU's kernels have, under AOTAutograd too


def test_autocast_casts_a_float_x_and_no_other() -> None:
    half, int8 = Weight(6, 16, torch.float16, integers=True), Weight(6, 16, torch.int8, integers=True)
    x, q, residual = integers(3, 16), torch.ones(3, 16, dtype=torch.int8), integers(3, 6)
    with sparse24.emulate(), torch.autocast("cpu", dtype=torch.float16):
        y = half.linear(x, residual=residual)
        assert torch.equal(y, (half.expected(x) + residual).half()) and y.dtype == torch.float16
        assert half.linear(x, residual=residual, out_dtype=torch.float32).dtype == torch.float32
        y = int8.linear(q, x_scales=torch.tensor(1.0), out_dtype=torch.float32)
    assert torch.equal(y, F.linear(q.float(), int8.dense.float()) * int8.scales)


def test_a_traced_graph_for_cuda_reads_no_data() -> None:
    """Shapes alone decide: nothing that would wait for a device, or keep a CUDA graph from being captured."""
    with FakeTensorMode():
        values = torch.empty(70, 20, dtype=torch.int8, device="cuda")
        meta = torch.empty(70, 5, dtype=torch.uint8, device="cuda")
        scales, residual = torch.empty(70, device="cuda"), torch.empty(2, 9, 70, device="cuda")

        def run(x: Tensor) -> Tensor:
            packed = ops.pack(values, meta, in_features=40)
            assert packed.numel() == torch.ops.sparse24.packed_bytes(70, 40, "int8", "cuda")
            sizes = {"out_features": 70, "in_features": 40, "dtype": torch.int8}
            y = ops.linear(x, packed, None, scales, **sizes, residual=residual, out_dtype=torch.bfloat16)
            back = ops.unpack(packed, **sizes)
            assert (back[0].shape, back[1].shape) == (values.shape, meta.shape)
            return ops.linear(x, packed, None, scales, **sizes) + y

        x = torch.empty(2, 9, 40, device="cuda")
        graph = make_fx(run)(x)
        y = graph(x)
    assert (y.shape, y.dtype, y.device.type) == ((2, 9, 70), torch.float32, "cuda")


# ---- Bad calls -------------------------------------------------------------------------------------------------------

HALF, INT8, SINGLE = Weight(6, 16, torch.float16), Weight(6, 16, torch.int8), Weight(6, 16, torch.float32)
X, X_INT8 = torch.ones(3, 16, dtype=torch.float16), torch.ones(3, 16, dtype=torch.int8)
RESIDUAL, ONE, PER_TOKEN = torch.ones(3, 6), torch.ones(1), torch.ones(3)
INT32 = {"out_dtype": torch.int32}


def without_scales() -> Weight:
    weight = Weight(6, 16, torch.int8)
    weight.scales = None
    return weight


# name: (the call, what the error must say).
BAD_CALLS = {
    "x-features": (lambda: HALF.linear(X[:, :15], residual=RESIDUAL), r"x must be \[\.\.\., 16\] .*got \[3, 15\]"),
    "x-dtype": (lambda: HALF.linear(X.double(), residual=RESIDUAL), r"x must be float32, .* or int8; got float64"),
    "x-int8-unfused": (lambda: INT8.linear(X_INT8), r"x must be float32, float16 or bfloat16; got int8"),
    "x-int8-float-weight": (
        lambda: HALF.linear(X_INT8, x_scales=ONE, out_dtype=torch.float16),
        r"x must be of a float dtype for a float weight; got int8",
    ),
    "residual-shape": (lambda: HALF.linear(X, residual=RESIDUAL[:2]), r"residual must be of .* \[3, 6\]; got \[2, 6\]"),
    "residual-broadcast": (lambda: HALF.linear(X, residual=RESIDUAL[0]), r"residual must be of .*; got \[6\]"),
    "residual-dtype": (lambda: HALF.linear(X, residual=RESIDUAL.double()), r"residual must be float32.*got float64"),
    "bias-shape": (lambda: HALF.linear(X, torch.ones(5), residual=RESIDUAL), r"bias must be \[6\]; got \[5\]"),
    "x_scales-missing": (
        lambda: INT8.linear(X_INT8, out_dtype=torch.float32),
        r"x_scales are required for an int8 x; got none",
    ),
    "x_scales-unwanted": (
        lambda: INT8.linear(X, x_scales=ONE),
        r"x_scales are for an int8 x alone; got some for float16",
    ),
    "x_scales-shape": (
        lambda: INT8.linear(X_INT8, x_scales=torch.ones(2), out_dtype=torch.float32),
        r"x_scales must be float32 \[\], \[1\] or \[3\], one a token; got float32 \[2\]",
    ),
    "x_scales-dtype": (
        lambda: INT8.linear(X_INT8, x_scales=ONE.half(), out_dtype=torch.float32),
        r"x_scales must be float32 .*got float16 \[1\]",
    ),
    "y_scale-missing": (
        lambda: HALF.linear(X, out_dtype=torch.int8),
        r"y_scale is required for out_dtype int8; got none",
    ),
    "y_scale-unwanted": (lambda: HALF.linear(X, y_scale=ONE), r"y_scale is for out_dtype int8 alone; got one"),
    "y_scale-shape": (
        lambda: HALF.linear(X, y_scale=PER_TOKEN, out_dtype=torch.int8),
        r"y_scale must be float32 \[\] or \[1\]; got float32 \[3\]",
    ),
    "out_dtype": (lambda: HALF.linear(X, out_dtype=torch.float64), r"out_dtype must be .*; got float64"),
    "int32-float-x": (lambda: without_scales().linear(X, **INT32), r"out_dtype int32.* needs an int8 x; got float16"),
    "int32-bias": (lambda: without_scales().linear(X_INT8, ONE.expand(6), **INT32), r"int32 .*: bias must be none"),
    "int32-scales": (lambda: INT8.linear(X_INT8, **INT32), r"int32 .*: scales must be none"),
    "int32-x_scales": (lambda: without_scales().linear(X_INT8, x_scales=ONE, **INT32), r"x_scales must be none"),
    "int32-residual": (lambda: without_scales().linear(X_INT8, residual=RESIDUAL, **INT32), r"residual must be none"),
    "int32-activation": (lambda: without_scales().linear(X_INT8, None, "relu", **INT32), r"activation must be none"),
    "scales-missing": (
        lambda: without_scales().linear(X_INT8, x_scales=ONE, out_dtype=torch.float32),
        r"scales are required for an int8 weight",
    ),
    "packed-size": (
        lambda: ops.linear(
            X, HALF.packed[:-64], out_features=6, in_features=16, dtype=torch.float16, residual=RESIDUAL
        ),
        r"packed must be contiguous uint8 \[\d+\]",
    ),
    "activation": (lambda: HALF.linear(X, None, "tanh", residual=RESIDUAL), r"activation must be .*got 'tanh'"),
}


@pytest.mark.parametrize("where", ["cpu", "emulated"])
@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call(name: str, where: str) -> None:
    call, message = BAD_CALLS[name]
    if where == "emulated":
        with sparse24.emulate(), pytest.raises(RuntimeError, match=message):
            call()
    else:
        with pytest.raises(RuntimeError, match=message):
            call()


@pytest.mark.parametrize("name", ["x-features", "residual-shape", "residual-broadcast", "out_dtype"])
def test_bad_shape_without_data(name: str) -> None:
    call, message = BAD_CALLS[name]
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match=message):
        call()


@pytest.mark.parametrize(
    "weight, x, message",
    [
        (HALF, X.float(), r"x must be float16, the dtype of the weight, on a GPU; got float32"),
        (HALF, X.bfloat16(), r"x must be float16, the dtype of the weight, on a GPU; got bfloat16"),
        (SINGLE, X.float(), r"dtype must be float16, bfloat16 or int8 on a GPU: .*; got float32"),
    ],
)
def test_the_device_refuses_what_it_has_no_kernel_for(weight: Weight, x: Tensor, message: str) -> None:
    weight.linear(x)
    with sparse24.emulate(), pytest.raises(RuntimeError, match=message):
        weight.linear(x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8], ids=str)
def test_the_cpu_and_the_device_agree(dtype: torch.dtype) -> None:
    """The same fused call of both: equal in all that is exact."""
    weight = Weight(21, 70, dtype, integers=True)
    if weight.scales is not None:
        weight.scales = torch.full((21,), 0.5)
    x = random_x(9, 70, dtype=torch.int8 if dtype == torch.int8 else dtype, integers=True)
    common = {"bias": random_x(21, dtype=torch.float32, integers=True), "activation": "relu"}
    common |= {"x_scales": torch.tensor(2.0)} if dtype == torch.int8 else {}
    residual = random_x(9, 21, dtype=torch.float16, seed=3, integers=True)
    calls = [
        {"out_dtype": torch.float32},
        {"residual": residual, "out_dtype": torch.bfloat16},
        {"residual": residual, "out_dtype": torch.int8, "y_scale": torch.tensor(4.0)},
    ]
    for options in calls:
        y = weight.linear(x, **common, **options)
        with sparse24.emulate():
            assert torch.equal(weight.linear(x, **common, **options), y)


def test_the_cpu_takes_what_its_kernels_have() -> None:
    assert torch.equal(HALF.linear(X, out_dtype=torch.float16), HALF.linear(X))


def test_packed_bytes() -> None:
    bytes_of = torch.ops.sparse24.packed_bytes
    assert bytes_of(1, 1, "float16", "cuda") == 4 * 1152  # 64 rows by 64 columns
    assert bytes_of(65, 129, "int8", "cuda") == 8 * 2 * 1280
    assert bytes_of(6, 16, "float16") == bytes_of(6, 16, "float16", "cpu") == HALF.packed.numel()
    with pytest.raises(RuntimeError, match="dtype must be float16, bfloat16 or int8 on a GPU"):
        bytes_of(6, 16, "float32", "cuda")


def test_device_problem_says_why() -> None:
    if not torch.cuda.is_available():
        assert "no CUDA device" in ops.device_problem(torch.device("cuda"), torch.float16)
