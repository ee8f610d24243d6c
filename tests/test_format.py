"""The format: every instruction set against sparse24/reference.py, torch's converter, brute force and properties."""

from __future__ import annotations

import doctest
import itertools
import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from sparse24 import ops, reference

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.sparse._semi_structured_conversions import (
        sparse_semi_structured_from_dense_cutlass,
        sparse_semi_structured_to_dense_cutlass,
    )

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8]  # uint8: packed int4
PATTERNS = ["2:4", "1:2", "pair 4:8"]
ALL_ISAS = ["portable", "avx2", "avx512", "avx512_bf16", "amx"]
ISAS = ALL_ISAS[: ALL_ISAS.index(ops.cpu_isa()) + 1][:3]  # beyond AVX-512 there is nothing for the format
INF, NAN = math.inf, math.nan

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
every_pattern = pytest.mark.parametrize("pattern", PATTERNS)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with ops.force_cpu_isa(request.param):
        yield request.param


def bits(tensor: Tensor) -> Tensor:
    """The same bits as integers, so that NaN equals NaN and -0.0 differs from 0."""
    return tensor.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def assert_same(got: Tensor | tuple[Tensor, ...], expected: Tensor | tuple[Tensor, ...]) -> None:
    if isinstance(got, Tensor):
        got, expected = (got,), (expected,)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        assert torch.equal(bits(ours), bits(theirs))


def weight_of(rows: list[list[float]], dtype: torch.dtype) -> Tensor:
    """The weight that holds these numbers; integers take NaN as their most negative number."""
    if dtype.is_floating_point:
        return torch.tensor(rows, dtype=dtype)
    lowest = -128 if dtype == torch.int8 else -8
    columns = torch.tensor([[lowest if x != x else int(x) for x in row] for row in rows], dtype=torch.int8)
    return reference.pack_int4(columns) if dtype == torch.uint8 else columns


SPECIAL = {
    torch.float32: [0, 0x80000000, 0x3F800000, 0xBF800000, 1, 0x80000001, 0x7F800000, 0x7F800001, 0xFFC00123],
    torch.float16: [0, 0x8000, 0x3C00, 0xBC00, 1, 0x8001, 0x3FF, 0x400, 0x7C00, 0xFC00, 0x7C01, 0xFE12, 0x7BFF],
    torch.bfloat16: [0, 0x8000, 0x3F80, 0xBF80, 1, 0x8001, 0x7F80, 0xFF80, 0x7F81, 0xFFC1],
    torch.int8: [0, 1, 255, 127, 128, 129],
    torch.uint8: [0, 1, 15, 16, 0x78, 0x87, 0x99],
}


def random_weight(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Random bits; half of the entries are special: zeros of both signs, ties, subnormals, infinities, NaN payloads."""
    generator = torch.Generator().manual_seed(seed)
    width = 8 * dtype.itemsize
    shape = rows, columns // 2 if dtype == torch.uint8 else columns
    anything = torch.randint(0, 2**width, shape, generator=generator)
    special = torch.tensor(SPECIAL[dtype])
    chosen = special[torch.randint(0, len(special), shape, generator=generator)]
    raw = torch.where(torch.rand(shape, generator=generator) < 0.5, anything, chosen)
    return raw.to({8: torch.uint8, 16: torch.int16, 32: torch.int32}[width]).view(dtype)


def pruned(weight: Tensor, pattern: str) -> Tensor:
    """where(prune_mask, weight, 0) without torch.where, for packed int4 too."""
    columns = (reference.unpack_int4(weight) if weight.dtype == torch.uint8 else weight).clone()
    columns[~reference.prune_mask(weight, pattern)] = 0
    return reference.pack_int4(columns) if weight.dtype == torch.uint8 else columns


def in_features_of(weight: Tensor) -> int:
    return weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)


def fits(group: tuple[float, ...], pattern: str) -> bool:
    nonzero = [x != 0 for x in group]
    if pattern == "1:2":
        return sum(nonzero[:2]) < 2 and sum(nonzero[2:]) < 2
    if pattern == "pair 4:8":
        nonzero = [a or b for a, b in zip(nonzero[::2], nonzero[1::2], strict=True)]
    return sum(nonzero) <= 2


# ---- Brute force -----------------------------------------------------------------------------------------------------


@every_dtype
@every_pattern
def test_every_assignment_of_a_group_compresses_or_is_refused(isa: str, dtype: torch.dtype, pattern: str) -> None:
    if pattern == "pair 4:8":
        pairs = [(0.0, 0.0), (-0.0, 0.0), (2.0, 0.0), (-0.0, NAN), (-3.0, 1.0)]
        groups = [sum(group, ()) for group in itertools.product(pairs, repeat=4)]
    else:
        groups = list(itertools.product([0.0, -0.0, 2.0, -3.0, NAN], repeat=4))
    good = [group for group in groups if fits(group, pattern)]
    assert 0 < len(good) < len(groups)

    weight = weight_of([sum(good, ())], dtype)
    assert_same(ops.compress(weight, pattern), reference.compress(weight, pattern))
    for bad in [group for group in groups if not fits(group, pattern)]:
        with pytest.raises(RuntimeError, match="row 1, group 0"):
            ops.compress(weight_of([good[0], bad], dtype), pattern)


@every_dtype
@every_pattern
def test_every_order_of_magnitudes(isa: str, dtype: torch.dtype, pattern: str) -> None:
    """Every way in which four magnitudes can compare, ties included, against sorting by hand."""
    sizes = [0.0, 1.0, 2.0, NAN] if dtype.is_floating_point else [0.0, 1.0, 2.0, 7.0]
    groups = list(itertools.product(sizes, repeat=4))
    rows = [[x * (-1) ** (i + n) for i, x in enumerate(group)] for n, group in enumerate(groups)]
    if pattern == "pair 4:8":
        rows = [[part for i, x in enumerate(row) for part in ((x, 0.0) if i % 2 else (0.0, x))] for row in rows]
    mask = ops.prune_mask(weight_of(rows, dtype), pattern)
    for group, kept in zip(groups, mask.tolist(), strict=True):
        rank = [INF if x != x else x for x in group]
        if pattern == "1:2":
            expected = [rank[0] >= rank[1], rank[1] > rank[0], rank[2] >= rank[3], rank[3] > rank[2]]
        else:
            order = sorted(range(4), key=lambda i: (-rank[i], i))  # noqa: B023
            expected = [i in order[:2] for i in range(4)]
        assert kept == [e for e in expected for _ in range(len(kept) // 4)], group


# ---- Against the reference -------------------------------------------------------------------------------------------


@every_dtype
@every_pattern
def test_every_short_row_equals_the_reference(dtype: torch.dtype, pattern: str) -> None:
    for columns in [*range(1, 71), 128, 129, 255, 256]:
        if dtype == torch.uint8 and columns % 2:
            continue  # a weight of packed int4 holds whole bytes; decompress has a test of its own for odd rows
        weight = random_weight(2, columns, dtype, seed=columns)
        mask = reference.prune_mask(weight, pattern)
        compressed = reference.prune_compress(weight, pattern)
        dense = pruned(weight, pattern)
        for isa in ISAS:
            with ops.force_cpu_isa(isa):
                assert_same(ops.prune_mask(weight, pattern), mask)
                assert_same(ops.prune_compress(weight, pattern), compressed)
                assert_same(ops.compress(dense, pattern), compressed)
                assert_same(ops.decompress(*compressed, in_features=columns, pattern=pattern), dense)
        assert_same(reference.decompress(*compressed, in_features=columns, pattern=pattern), dense)


@hypothesis.settings(deadline=None, max_examples=150, derandomize=True, database=None)
@hypothesis.given(
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from(DTYPES),
    pattern=st.sampled_from(PATTERNS),
    isa=st.sampled_from(ISAS),
    rows=st.integers(0, 3),
    columns=st.integers(0, 70),
)
def test_round_trip(seed: int, dtype: torch.dtype, pattern: str, isa: str, rows: int, columns: int) -> None:
    """compress, then decompress, gives the same bits back."""
    columns -= columns % 2 if dtype == torch.uint8 else 0
    weight = random_weight(rows, columns, dtype, seed=seed)
    dense = pruned(weight, pattern)
    if dtype.is_floating_point:
        # A -0.0 that is not in a slot comes back as +0.
        dense = torch.where(dense == 0, torch.zeros((), dtype=dtype), dense)
    with ops.force_cpu_isa(isa):
        values, meta = ops.compress(dense, pattern)
        ops.validate(values, meta, in_features=columns, pattern=pattern)
        assert_same(ops.decompress(values, meta, in_features=columns, pattern=pattern), dense)
        assert_same((values, meta), reference.compress(dense, pattern))


@every_pattern
def test_int4_rows_of_odd_length(isa: str, pattern: str) -> None:
    """in_features may be odd: the last byte of a dense row then has an unused half, which comes back as 0."""
    slots = 4 if pattern == "pair 4:8" else 2
    for columns in range(1, 71, 2):
        weight = random_weight(3, columns + 1, torch.uint8, seed=columns)
        weight[:, -1] &= 15
        dense = pruned(weight, pattern)
        values, meta = ops.compress(dense, pattern)
        assert values.shape[1] == -(-columns // (2 * slots)) * slots // 2
        assert_same(ops.decompress(values, meta, in_features=columns, dtype=torch.int4, pattern=pattern), dense)


def test_negative_zero_keeps_its_sign_only_in_a_slot(isa: str) -> None:
    values, meta = ops.compress(torch.tensor([[-0.0, -0.0, -0.0, 5.0]]))
    assert torch.signbit(values).tolist() == [[True, False]]
    assert meta.tolist() == [[0b1100]]
    dense = ops.decompress(values, meta, in_features=4)
    assert torch.signbit(dense).tolist() == [[True, False, False, False]]
    assert dense.tolist() == [[0.0, 0.0, 0.0, 5.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_weight_that_lies_column_by_column(dtype, isa):
    whole = torch.randint(-99, 99, (77, 131), generator=torch.Generator().manual_seed(0)).to(dtype)
    parts = [whole, whole[:16, :32], whole[:, 3:], whole[5:, :64], whole[:1], whole[:, :1], whole[:0], whole[:, :0]]
    for part in parts:
        for one, other in zip(ops.prune_compress(part.t()), ops.prune_compress(part.t().contiguous()), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("pattern", ["2:4", "1:2"])
def test_subnormals_count_where_arithmetic_flushes_them(isa: str, pattern: str) -> None:
    weight = torch.tensor([[1, 2, 0x80000003 - 2**32, 2]], dtype=torch.int32).view(torch.float32)
    torch.set_flush_denormal(True)
    try:
        mask = ops.prune_mask(weight, pattern)
    finally:
        torch.set_flush_denormal(False)
    assert mask.tolist() == [[False, True, True, False]]


def test_pair_magnitude_is_one_float32_addition(isa: str) -> None:
    # 2^24 + 1 rounds to 2^24, a tie that the lower index wins; in exact arithmetic the later pair would.
    f32 = torch.tensor([[2.0**24, 0, 2.0**24, 1, 0, 2.0**24, 3, 0]])
    assert ops.prune_mask(f32, "pair 4:8").tolist() == [[True] * 4 + [False] * 4]
    # 60000 + 60000 overflows float16, not the float32 it is added in: the infinity still wins.
    f16 = torch.tensor([[60000, 60000, 60000, 59968, 0, INF, 1, 1]], dtype=torch.float16)
    assert ops.prune_mask(f16, "pair 4:8").tolist() == [[True, True, False, False, True, True, False, False]]


def test_integer_magnitudes_do_not_wrap(isa: str) -> None:
    i8 = torch.tensor([[127, -128, 126, -128, 0, 0, 0, 0]], dtype=torch.int8)
    assert ops.prune_mask(i8).tolist() == [[False, True, False, True, True, True, False, False]]
    pairs = torch.tensor([[127, 127, -128, -128, 127, -128, 1, 1]], dtype=torch.int8)
    assert ops.prune_mask(pairs, "pair 4:8").tolist() == [[False, False, True, True, True, True, False, False]]
    i4 = reference.pack_int4(torch.tensor([[7, -8, 7, -8]], dtype=torch.int8))
    assert ops.prune_mask(i4).tolist() == [[False, True, False, True]]


# ---- Against torch ---------------------------------------------------------------------------------------------------

CUTLASS_TYPES = [(torch.float16, "2:4"), (torch.bfloat16, "2:4"), (torch.int8, "2:4"), (torch.float32, "1:2")]


@pytest.mark.parametrize("dtype, pattern", CUTLASS_TYPES, ids=str)
@pytest.mark.parametrize("shape", [(32, 128), (32, 256), (64, 128), (64, 256), (96, 64), (160, 192)], ids=str)
def test_full_groups_equal_torchs_converter_to_the_byte(
    isa: str, dtype: torch.dtype, pattern: str, shape: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(shape[0] + shape[1])
    weight = torch.randint(1, 127, shape, generator=generator).to(dtype)
    weight[torch.rand(shape, generator=generator) < 0.5] *= -1
    values, meta = ops.prune_compress(weight, pattern)
    dense = ops.decompress(values, meta, in_features=shape[1], pattern=pattern)
    theirs = sparse_semi_structured_from_dense_cutlass(dense)
    assert_same(reference.to_cutlass(values, meta), theirs)
    assert_same(reference.from_cutlass(*theirs), (values, meta))


@pytest.mark.parametrize("dtype, pattern", CUTLASS_TYPES, ids=str)
def test_sparser_groups_decompress_as_torchs_do(isa: str, dtype: torch.dtype, pattern: str) -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randint(-3, 4, (64, 128), generator=generator).to(dtype)
    dense = torch.where(ops.prune_mask(weight, pattern), weight, 0)
    dense[torch.rand(dense.shape, generator=generator) < 0.5] = 0
    ours = ops.compress(dense, pattern)
    theirs = reference.from_cutlass(*sparse_semi_structured_from_dense_cutlass(dense))
    assert not torch.equal(ours[1], theirs[1])  # the free slots differ, hence the comparison of what they decompress to
    assert_same(ops.decompress(*theirs, in_features=128, pattern=pattern), dense)
    assert_same(sparse_semi_structured_to_dense_cutlass(*reference.to_cutlass(*ours)), dense)


def test_magnitudes_agree_with_topk(isa: str) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(5))
    chosen = weight.abs().view(64, 64, 4).topk(2, dim=-1).indices
    expected = torch.zeros(64, 64, 4, dtype=torch.bool).scatter_(-1, chosen, True).view(64, 256)
    assert_same(ops.prune_mask(weight), expected)


# ---- Refusals --------------------------------------------------------------------------------------------------------


@every_dtype
@every_pattern
@pytest.mark.parametrize("place", [(0, 0), (2, 7), (1, 15), (2, 16), (2, 33)], ids=str)
def test_a_misfit_names_row_group_and_values(
    isa: str, dtype: torch.dtype, pattern: str, place: tuple[int, int]
) -> None:
    row, group = place
    columns = 8 if pattern == "pair 4:8" else 4
    weight = weight_of([[0.0] * 34 * columns] * 3, dtype)
    bad = [3.0, 1.0, 0.0, -2.0] if columns == 4 else [3.0, 0.0, 0.0, 1.0, 0.0, 0.0, -2.0, 0.0]
    per = weight.shape[1] // 34
    weight[row, per * group : per * (group + 1)] = weight_of([bad], dtype)[0]
    weight[2, 33 * per :] = weight_of([bad], dtype)[0]  # a later misfit is not the one that is named
    text = ", ".join(f"{x:g}" for x in bad)
    with pytest.raises(RuntimeError, match=rf"row {row}, group {group} .*\[{text}\]") as error:
        ops.compress(weight, pattern)
    assert f"columns {group * columns} to {(group + 1) * columns - 1}" in str(error.value)
    with pytest.raises(RuntimeError, match=f"row {row}, group {group} is"):
        reference.compress(weight, pattern)


def test_nan_is_a_nonzero(isa: str) -> None:
    with pytest.raises(RuntimeError, match=r"row 0, group 1 .*\[nan, 1, nan, 0\]"):
        ops.compress(torch.tensor([[0, 0, 0, 0, NAN, 1, NAN, 0]]))


@every_dtype
@every_pattern
def test_validate_refuses_every_corruption(dtype: torch.dtype, pattern: str) -> None:
    columns = 2 * 3 * 8 * 4 + 2  # many whole words of codes, and a last group with columns past the end
    values, meta = ops.prune_compress(random_weight(3, columns, dtype, seed=9), pattern)
    check = {"in_features": columns, "pattern": pattern}
    ops.validate(values, meta, **check)
    groups = -(-columns // (8 if pattern == "pair 4:8" else 4))
    legal = {0xC, 0xD, 0x8, 0x9} if pattern == "1:2" else {0x4, 0x8, 0x9, 0xC, 0xD, 0xE}
    for row, group in [(0, 0), (1, 13), (2, groups - 2)]:
        for code in range(16):
            corrupt = meta.clone()
            corrupt[row, group // 2] &= 0xF0 if group % 2 == 0 else 0x0F
            corrupt[row, group // 2] |= code << 4 * (group % 2)
            for validate in (ops.validate, reference.validate) if code in (0, 4, 7) else (ops.validate,):
                if code in legal:
                    validate(values, corrupt, **check)
                else:
                    with pytest.raises(RuntimeError, match=f"row {row}, group {group} "):
                        validate(values, corrupt, **check)
            if code not in legal:
                with pytest.raises(RuntimeError, match=f"row {row}, group {group} "):
                    ops.decompress(values, corrupt, **check)


@every_dtype
@every_pattern
def test_validate_refuses_what_lies_beyond_in_features(dtype: torch.dtype, pattern: str) -> None:
    values, meta = ops.compress(weight_of([[0.0] * 10] * 2, dtype), pattern)
    slots = 4 if pattern == "pair 4:8" else 2
    # 10 columns end two columns into the third (pair 4:8: second) group; keep its last two units, which do not exist.
    last = -(-10 // (2 * slots)) - 1
    beyond = meta.clone()
    code = 0b1101 if pattern == "1:2" else 0b1110
    beyond[1, last // 2] &= 0x0F if last % 2 else 0xF0
    beyond[1, last // 2] |= code << 4 * (last % 2)
    ops.validate(values, beyond, in_features=10, pattern=pattern)
    reference.validate(values, beyond, in_features=10, pattern=pattern)
    bad = values.clone()
    bad[1, -1] = -0.0 if dtype.is_floating_point else 0x70 if dtype == torch.uint8 else 1
    for validate in (ops.validate, reference.validate):
        with pytest.raises(RuntimeError, match=f"row 1, group {last} "):
            validate(bad, beyond, in_features=10, pattern=pattern)
    if last % 2 == 0:
        unused = meta.clone()
        unused[1, -1] |= 0x40
        for validate in (ops.validate, reference.validate):
            with pytest.raises(RuntimeError, match="row 1"):
                validate(values, unused, in_features=10, pattern=pattern)


# ---- Memory as it comes ----------------------------------------------------------------------------------------------


@every_dtype
@every_pattern
def test_any_strides(isa: str, dtype: torch.dtype, pattern: str) -> None:
    def strided(weight: Tensor) -> dict[str, Tensor]:
        rows, columns = weight.shape
        wide = torch.zeros(rows + 2, columns + 7, dtype=dtype)
        wide[1:-1, 3:-4] = weight
        spread = torch.zeros(rows, 2 * columns, dtype=dtype)
        spread[:, 1::2] = weight
        shifted = torch.zeros(rows * columns + 1, dtype=dtype)
        shifted[1:] = weight.flatten()
        return {
            "sliced at odd offsets": wide[1:-1, 3:-4],
            "every other column": spread[:, 1::2],
            "transposed": weight.t().contiguous().t(),
            "off by one element": shifted[1:].view(rows, columns),
            "every other row": weight.repeat_interleave(2, dim=0)[::2],
        }

    weight = random_weight(5, 74, dtype, seed=11)
    dense = pruned(weight, pattern)
    mask, compressed = reference.prune_mask(weight, pattern), reference.prune_compress(weight, pattern)
    for name, view in strided(weight).items():
        assert torch.equal(bits(view), bits(weight)), name
        assert_same(ops.prune_mask(view, pattern), mask)
        assert_same(ops.prune_compress(view, pattern), compressed)
    for view in strided(dense).values():
        assert_same(ops.compress(view, pattern), compressed)
    repeated = weight[:1].expand(5, weight.shape[1])  # a row stride of 0
    assert_same(ops.prune_mask(repeated, pattern), mask[:1].expand(5, 74))
    values, meta = compressed
    for other in strided(values).values():
        assert_same(ops.decompress(other, meta, in_features=74, pattern=pattern), dense)
    wide_meta = torch.zeros(meta.shape[0], meta.shape[1] + 1, dtype=torch.uint8)
    wide_meta[:, 1:] = meta
    assert_same(ops.decompress(values, wide_meta[:, 1:], in_features=74, pattern=pattern), dense)


@every_dtype
@every_pattern
@pytest.mark.parametrize("shape", [(0, 0), (0, 8), (3, 0), (0, 9)], ids=str)
def test_empty(isa: str, dtype: torch.dtype, pattern: str, shape: tuple[int, int]) -> None:
    weight = torch.zeros(shape, dtype=dtype)
    columns = in_features_of(weight)
    assert ops.prune_mask(weight, pattern).shape == (shape[0], columns)
    for function in (ops.compress, ops.prune_compress, reference.compress, reference.prune_compress):
        values, meta = function(weight, pattern)
        for decompress in (ops.decompress, reference.decompress):
            assert_same(decompress(values, meta, in_features=columns, pattern=pattern), weight)


# ---- The document ----------------------------------------------------------------------------------------------------


def test_format_md_tells_the_truth() -> None:
    """The examples of docs/format.md are run, and their output compared."""
    path = Path(__file__).parents[1] / "docs" / "format.md"
    result = doctest.testfile(str(path), module_relative=False)
    assert result.attempted >= 10
    assert result.failed == 0
