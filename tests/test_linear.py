"""sparse24.ops.linear on the CPU, on every instruction set, against torch's dense product in float64."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse24 import ops
from sparse24.registration import pack_int4, unpack_int4
from tests.bounds import EXACT, assert_linear

ALL_ISAS = ["portable", "avx2", "avx512", "avx512_bf16", "amx"]
ISAS = ALL_ISAS[: ALL_ISAS.index(ops.cpu_isa()) + 1]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
INTEGERS = [torch.int8, torch.int4]
WEIGHTS = [*FLOATS, *INTEGERS]
SHAPES = [(384, 152), (1024, 40), (70, 33)]  # (K, N): whole chunks, several, and tails of both


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with ops.force_cpu_isa(request.param):
        yield request.param


class Weight:
    """A random 2:4 weight: packed, and dense as F.linear takes it."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, seed: int = 0, integers: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        if dtype in INTEGERS:
            limit = 128 if dtype == torch.int8 else 8
            full = torch.randint(-limit, limit, (rows, columns), generator=generator).to(torch.int8)
        elif integers:
            full = torch.randint(-4, 5, (rows, columns), generator=generator).to(dtype)
        else:
            full = torch.randn(rows, columns, generator=generator).to(dtype)
        self.dtype = dtype
        pattern = "pair 4:8" if dtype == torch.int4 else "2:4"
        values, meta = ops.prune_compress(pack_int4(full) if dtype == torch.int4 else full, pattern)
        self.dense = ops.decompress(values, meta, in_features=columns, pattern=pattern)
        if dtype == torch.int4:
            self.dense = unpack_int4(self.dense)[:, :columns]
        self.values, self.meta = values, meta
        self.packed = ops.pack(values, meta, in_features=columns)
        self.scales = torch.rand(rows, generator=generator) + 0.5 if dtype in INTEGERS else None

    def linear(self, x: Tensor, bias: Tensor | None = None, activation: str = "none", **fused: object) -> Tensor:
        rows, columns = self.dense.shape
        return ops.linear(
            x,
            self.packed,
            bias,
            self.scales,
            out_features=rows,
            in_features=columns,
            dtype=self.dtype,
            activation=activation,
            **fused,
        )

    def expected(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product before the activation, in float32: int8 by its rule, every operation rounded as it says."""
        if self.scales is None:
            exact = F.linear(x.double(), self.dense.double())
            return (exact if bias is None else exact + bias.double()).float()
        q, s = quantize(x)
        y = F.linear(q.double(), self.dense.double()).float() * (s * self.scales)
        return y if bias is None else y + bias.float()


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Per row: s = amax / 127, or 1 where that is 0; q = round_half_even(x / s); s is NaN where x is not finite."""
    s = x.float().abs().amax(-1, keepdim=True) / 127
    s = torch.where(s == 0, 1, s)
    q = torch.round(x.float() / s).clamp(-127, 127)
    finite = x.isfinite().all(-1, keepdim=True)
    return torch.where(finite, q, 0), torch.where(finite, s, torch.nan)


def random_x(*shape: int, dtype: torch.dtype, seed: int = 1, integers: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if integers:
        return torch.randint(-3, 4, shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator).to(dtype)


# ---- Numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_within_the_bound(isa: str, dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    for columns, rows in SHAPES:
        weight = Weight(rows, columns, dtype)
        x = random_x(31, columns, dtype=x_dtype)
        bias = random_x(rows, dtype=x_dtype, seed=2)
        seen = x.bfloat16() if dtype == torch.bfloat16 else x
        for activation in EXACT:
            y = weight.linear(x, bias, activation)
            assert y.dtype == x_dtype
            assert_linear(y, seen, weight.dense, bias, activation)


@pytest.mark.parametrize("x_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", WEIGHTS, ids=str)
@pytest.mark.parametrize("bias_dtype", [None, *FLOATS], ids=str)
def test_integers_are_exact(isa: str, dtype: torch.dtype, x_dtype: torch.dtype, bias_dtype: torch.dtype | None) -> None:
    for tokens, rows, columns in [(1, 16, 32), (3, 17, 65), (28, 33, 130), (29, 64, 64), (85, 100, 200)]:
        weight = Weight(rows, columns, dtype, integers=True)
        x = random_x(tokens, columns, dtype=x_dtype, integers=True)
        bias = None if bias_dtype is None else random_x(rows, dtype=bias_dtype, integers=True)
        assert torch.equal(weight.linear(x, bias), weight.expected(x, bias).to(x_dtype))
        assert torch.equal(weight.linear(x, bias, "relu"), F.relu(weight.expected(x, bias)).to(x_dtype))


@pytest.mark.parametrize("x_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_rounding_of_x_follows_its_rule_to_the_bit(isa: str, dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    weight = Weight(70, 1030, dtype)
    bias = random_x(70, dtype=torch.float32, seed=3)
    x = random_x(40, 1030, dtype=x_dtype) * torch.logspace(-6, 3, 40)[:, None].to(x_dtype)
    x[3] = 0
    x[4] = torch.nan
    x[5, 7] = torch.inf
    x[6, :2] = torch.tensor([torch.finfo(x_dtype).max, -torch.finfo(x_dtype).max])
    x[7] = 0
    x[7, 5] = torch.finfo(x_dtype).smallest_normal
    y = weight.linear(x, bias)
    assert torch.equal(y.isnan().all(-1), ~x.isfinite().all(-1))
    torch.testing.assert_close(y, weight.expected(x, bias).to(x_dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("x_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_weight_only(isa: str, dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    """x is not rounded: exact on whole numbers, and within the bound of a float product elsewhere."""
    for tokens, rows, columns in [(1, 16, 32), (3, 17, 90), (9, 40, 130), (31, 33, 300)]:
        weight = Weight(rows, columns, dtype)
        assert weight.scales is not None
        x = random_x(tokens, columns, dtype=x_dtype, integers=True)
        bias = random_x(rows, dtype=x_dtype, seed=2)
        sums = F.linear(x.double(), weight.dense.double()).float()
        expected = sums * weight.scales + bias.float()
        assert torch.equal(weight.linear(x, bias, weight_only=True), expected.to(x_dtype))
        x = random_x(tokens, columns, dtype=x_dtype)
        scaled = weight.dense.double() * weight.scales.double()[:, None]
        for activation in EXACT:
            assert_linear(weight.linear(x, bias, activation, weight_only=True), x, scaled, bias, activation)


@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", WEIGHTS, ids=str)
def test_residual_before_the_activation(isa: str, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    weight = Weight(33, 130, dtype, integers=True)
    x = random_x(19, 130, dtype=torch.float32, integers=True)
    bias = random_x(33, dtype=torch.float32, integers=True)
    residual = random_x(19, 40, dtype=out_dtype, seed=5, integers=True)[:, :33]  # rows further apart than they are long
    y = weight.linear(x, bias, "relu", residual=residual, out_dtype=out_dtype)
    assert torch.equal(y, F.relu(weight.expected(x, bias) + residual.float()).to(out_dtype))


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("per_token", [False, True])
def test_int8_x_and_y(isa: str, dtype: torch.dtype, per_token: bool) -> None:
    """x already rounded, with one scale or one a token; y as float, rounded to int8 by y_scale, or the sums alone."""
    weight = Weight(35, 200, dtype)
    assert weight.scales is not None
    generator = torch.Generator().manual_seed(4)
    x = torch.randint(-128, 128, (21, 200), dtype=torch.int8, generator=generator)
    sums = F.linear(x.double(), weight.dense.double())
    x_scales = torch.rand(21 if per_token else 1, generator=generator) + 0.1
    expected = sums.float() * (x_scales[:, None] * weight.scales)
    given = {"x_scales": x_scales}
    assert torch.equal(weight.linear(x, out_dtype=torch.float32, **given), expected)
    y_scale = (expected.abs().max() / 100).reshape(1)  # so that some saturate after the bias
    bias = (expected.abs().max() / 2).expand(35).contiguous()
    y = weight.linear(x, bias, out_dtype=torch.int8, y_scale=y_scale, **given)
    rounded = torch.round((expected + bias) / y_scale)
    assert rounded.max() > 127 and torch.equal(y, rounded.clamp(-127, 127).to(torch.int8))
    plain = ops.linear(
        x, weight.packed, out_features=35, in_features=200, dtype=dtype, out_dtype=torch.int32
    )  # no scales: the sums themselves
    assert torch.equal(plain, sums.to(torch.int32))


@pytest.mark.parametrize("activation", [name for name in EXACT if name != "none"])
@pytest.mark.parametrize("x_dtype", FLOATS, ids=str)
def test_activation_after_int8(isa: str, x_dtype: torch.dtype, activation: str) -> None:
    weight = Weight(40, 100, torch.int8)
    weight.scales = weight.scales / 2000  # so that the sums are of the size where activations bend
    x = random_x(30, 100, dtype=x_dtype)
    before = weight.expected(x)
    exact = EXACT[activation](before.double())
    half_ulp = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}[x_dtype]
    bound = (half_ulp + 12 * 2**-24) * exact.abs() + 2**-24 * before.abs() + 2**-25
    assert ((weight.linear(x, activation=activation).double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("activation", [name for name in EXACT if name != "none"])
def test_activations_at_the_ends_of_the_line(isa: str, activation: str) -> None:
    weight = Weight(7, 0, torch.float32)
    bias = torch.tensor([torch.nan, -torch.inf, torch.inf, 0.0, -0.0, -200.0, 200.0])
    y = weight.linear(torch.empty(2, 0), bias, activation)
    expected = EXACT[activation](bias.double()).float().expand(2, 7)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-36, equal_nan=True)


# ---- Non-finite numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("special", [torch.inf, -torch.inf, torch.nan])
def test_dropped_columns_take_no_part(isa: str, dtype: torch.dtype, special: float) -> None:
    dense = random_x(20, 40, dtype=dtype, integers=True)
    dense[:, 0::4] = 0
    dense[:, 3::4] = 0
    dense[:, 1::4] = 2  # both kept columns nonzero: no free slot falls on a dropped one
    dense[:, 2::4] = -1
    packed = ops.pack(*ops.compress(dense), in_features=40)
    x = random_x(5, 40, dtype=torch.float32, integers=True)
    expected = F.linear(x, dense.float())
    x[:, 0::4] = special
    x[:, 3::4] = -special
    y = ops.linear(x, packed, out_features=20, in_features=40, dtype=dtype)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_kept_zero_times_inf_is_nan_as_in_dense(isa: str, dtype: torch.dtype) -> None:
    packed = ops.pack(*ops.compress(torch.zeros(3, 8, dtype=dtype)), in_features=8)  # free slots keep columns 0 and 1
    x = torch.zeros(2, 8)
    x[0, 4] = torch.inf
    x[1, 6] = torch.inf
    y = ops.linear(x, packed, out_features=3, in_features=8, dtype=dtype)
    assert y[0].isnan().all() and (y[1] == 0).all()


# ---- Shapes and strides ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", WEIGHTS, ids=str)
@pytest.mark.parametrize("leading", [(), (1,), (0,), (4, 0), (2, 3), (2, 3, 1, 5)], ids=str)
def test_leading_dimensions(isa: str, dtype: torch.dtype, leading: tuple[int, ...]) -> None:
    weight = Weight(19, 37, dtype, integers=True)
    x = random_x(*leading, 37, dtype=torch.float32, integers=True)
    assert torch.equal(weight.linear(x), weight.expected(x))


@pytest.mark.parametrize("dtype", WEIGHTS, ids=str)
@pytest.mark.parametrize("rows, columns", [(0, 5), (5, 0), (1, 1), (0, 0)])
def test_empty(isa: str, dtype: torch.dtype, rows: int, columns: int) -> None:
    weight = Weight(rows, columns, dtype, integers=True)
    bias = random_x(rows, dtype=torch.float32, integers=True)
    x = random_x(3, columns, dtype=torch.float32, integers=True)
    expected = bias.expand(3, rows) if columns == 0 else weight.expected(x, bias)
    assert torch.equal(weight.linear(x, bias), expected)


@pytest.mark.parametrize("dtype", WEIGHTS, ids=str)
@pytest.mark.parametrize("x_dtype", FLOATS, ids=str)
def test_views(isa: str, dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    weight = Weight(21, 45, dtype, integers=True)
    base = random_x(12, 9, 61, dtype=x_dtype, integers=True)
    views = {
        "columns of wider rows": base[:, :, 3:48],
        "every second row": base[::2, :, 5:50],
        "transposed rows": base[:, :, 7:52].transpose(0, 1),
        "strided columns": random_x(8, 90, dtype=x_dtype, integers=True)[:, ::2],
        "one row for all": base[0, :1, :45].expand(6, 45),
        "one column for all": base[0, :, :1].expand(9, 45),
        "column-major": random_x(45, 11, dtype=x_dtype, integers=True).t(),
    }
    for name, x in views.items():
        assert torch.equal(weight.linear(x), weight.expected(x).to(x_dtype)), name


@pytest.mark.parametrize("dtype", WEIGHTS, ids=str)
def test_pack_is_exact(dtype: torch.dtype) -> None:
    for rows, columns in [(1, 1), (16, 32), (17, 33), (40, 131)]:
        weight = Weight(rows, columns, dtype, seed=rows)
        values, meta = weight.values, weight.meta
        back = ops.unpack(weight.packed, out_features=rows, in_features=columns, dtype=dtype)
        assert torch.equal(back[0].view(torch.uint8), values.view(torch.uint8)) and torch.equal(back[1], meta)


# ---- Threads ---------------------------------------------------------------------------------------------------------


def test_thread_counts_agree() -> None:
    weights = [Weight(1030, 515, dtype, integers=True) for dtype in WEIGHTS]
    x = random_x(61, 515, dtype=torch.float32, integers=True)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            for weight in weights:
                assert torch.equal(weight.linear(x), weight.expected(x))
    finally:
        torch.set_num_threads(before)


def test_eight_callers_at_once() -> None:
    weights = [Weight(64 + 9 * i, 300 + 11 * i, WEIGHTS[i % 5], seed=i, integers=True) for i in range(8)]

    def work(i: int) -> bool:
        for repeat in range(30):
            weight = weights[(i + repeat) % 8]
            x = random_x(1 + 13 * (repeat % 6), weight.dense.shape[1], dtype=torch.float32, seed=repeat, integers=True)
            if not torch.equal(weight.linear(x), weight.expected(x)):
                return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
