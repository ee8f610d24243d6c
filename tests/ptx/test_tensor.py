"""mma and mma.sp: fragments against the PTX ISA's formulas, sums against a slow model in exact fractions."""

import itertools
import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest

import sparse24.ptx

# ---- Elements: bits to exact values ----------------------------------------------------------------------------------

FORMATS = {"f16": (5, 10), "bf16": (8, 7), "tf32": (8, 10), "e4m3": (4, 3), "e5m2": (5, 2), "f32": (8, 23)}
BITS = {"f16": 16, "bf16": 16, "tf32": 32, "e4m3": 8, "e5m2": 8, "f32": 32, "f64": 64, "s32": 32}
BITS |= {"s8": 8, "u8": 8, "s4": 4, "u4": 4, "b1": 1}
INTEGERS = ("s8", "u8", "s4", "u4", "b1", "s32")


def value_of(kind, bits):
    """The number an element stands for, exactly: a float, which holds all of them."""
    if kind in INTEGERS:
        width = BITS[kind]
        return bits - (1 << width) if kind[0] == "s" and bits >> (width - 1) else bits
    exponents, mantissas = FORMATS[kind]
    if kind == "tf32":
        bits >>= 13
    mantissa, exponent = bits & ((1 << mantissas) - 1), (bits >> mantissas) & ((1 << exponents) - 1)
    bias, top = (1 << (exponents - 1)) - 1, (1 << exponents) - 1
    value = math.ldexp(mantissa + ((1 << mantissas) if exponent else 0), max(exponent, 1) - bias - mantissas)
    if kind == "e4m3":
        value = math.nan if exponent == top and mantissa == 7 else value
    elif exponent == top:
        value = math.nan if mantissa else math.inf
    return -value if bits >> (exponents + mantissas) else value


def bits_of_integers(kind, values):
    """Bits of small integers, in any type that has them."""
    if kind in INTEGERS:
        return values.astype(np.int64) & ((1 << BITS[kind]) - 1)
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16).astype(np.int64)
    if kind == "f64":
        return values.astype(np.float64).view(np.int64)
    if kind in ("e4m3", "e5m2"):
        table = {value_of(kind, b): b for b in range(255, -1, -1)}
        return np.vectorize(lambda v: table[float(v)], otypes=[np.int64])(values)
    wide = values.astype(np.float32).view(np.uint32).astype(np.int64)
    return wide >> 16 if kind == "bf16" else wide


# ---- Fragments, as the PTX ISA writes them: g is the group, t the thread in it, i the element ------------------------

# (rows of A, k, bits): row and column of a_i
A_DENSE = {
    (8, 16, 8): lambda g, t, i: (g, 4 * t + i),
    (8, 32, 4): lambda g, t, i: (g, 8 * t + i),
    (8, 128, 1): lambda g, t, i: (g, 32 * t + i),
    (8, 4, 64): lambda g, t, i: (g, t),
    (16, 4, 32): lambda g, t, i: (g if i == 0 else g + 8, t),
    (16, 8, 32): lambda g, t, i: (g if i in (0, 2) else g + 8, t if i < 2 else t + 4),
    (16, 8, 16): lambda g, t, i: (g if i < 2 else g + 8, 2 * t + (i & 1)),
    (16, 16, 16): lambda g, t, i: (g if i < 2 or 4 <= i < 6 else g + 8, 2 * t + (i & 1) + (8 if i >= 4 else 0)),
    (16, 16, 8): lambda g, t, i: (g if i < 4 else g + 8, 4 * t + (i & 3)),
    (16, 32, 8): lambda g, t, i: (g if i < 4 or 8 <= i < 12 else g + 8, 4 * t + (i & 3) + (16 if i >= 8 else 0)),
    (16, 32, 4): lambda g, t, i: (g if i < 8 else g + 8, 8 * t + (i & 7)),
    (16, 64, 4): lambda g, t, i: (g if i < 8 or 16 <= i < 24 else g + 8, 8 * t + (i & 7) + (32 if i >= 16 else 0)),
    (16, 128, 1): lambda g, t, i: (g if i < 32 else g + 8, 32 * t + (i & 31)),
    (16, 256, 1): lambda g, t, i: (g if i < 32 or 64 <= i < 96 else g + 8, 32 * t + (i & 31) + (128 if i >= 64 else 0)),
    (16, 4, 64): lambda g, t, i: (g if i == 0 else g + 8, t),
    (16, 8, 64): lambda g, t, i: (g if i in (0, 2) else g + 8, t if i < 2 else t + 4),
    (16, 16, 64): lambda g, t, i: (g, 2 * i + t) if i % 2 == 0 else (g + 8, 2 * i - 2 + t),
}
# (k, bits): row (k) and column (n) of b_i
B_ALL = {
    (4, 64): lambda g, t, i: (t, g),
    (8, 64): lambda g, t, i: (t + 4 * i, g),
    (16, 64): lambda g, t, i: (t + 4 * i, g),
    (4, 32): lambda g, t, i: (t, g),
    (8, 32): lambda g, t, i: (t + 4 * i, g),
    (16, 32): lambda g, t, i: (t + 4 * i, g),
    (8, 16): lambda g, t, i: (2 * t + i, g),
    (16, 16): lambda g, t, i: (2 * t + (i & 1) + (8 if i >= 2 else 0), g),
    (32, 16): lambda g, t, i: (2 * t + (i & 1) + 8 * (i // 2), g),
    (16, 8): lambda g, t, i: (4 * t + i, g),
    (32, 8): lambda g, t, i: (4 * t + (i & 3) + (16 if i >= 4 else 0), g),
    (64, 8): lambda g, t, i: (4 * t + (i & 3) + 16 * (i // 4), g),
    (32, 4): lambda g, t, i: (8 * t + i, g),
    (64, 4): lambda g, t, i: (8 * t + (i & 7) + (32 if i >= 8 else 0), g),
    (128, 4): lambda g, t, i: (8 * t + (i & 7) + 32 * (i // 8), g),
    (128, 1): lambda g, t, i: (32 * t + i, g),
    (256, 1): lambda g, t, i: (32 * t + (i & 31) + (128 if i >= 32 else 0), g),
}
# (k, bits) of mma.sp: row of a_i, the first column of A that its thread's element may be from, and which it is there
A_SPARSE = {
    (16, 16): lambda g, t, i: (g if i < 2 else g + 8, 4 * t, i & 1),
    (32, 16): lambda g, t, i: (g if i < 2 or 4 <= i < 6 else g + 8, 4 * t + (16 if i >= 4 else 0), i & 1),
    (8, 32): lambda g, t, i: (g if i == 0 else g + 8, 2 * t, 0),
    (16, 32): lambda g, t, i: (g if i in (0, 2) else g + 8, 2 * t + (8 if i >= 2 else 0), 0),
    (32, 8): lambda g, t, i: (g if i < 4 else g + 8, 8 * t, i & 3),
    (64, 8): lambda g, t, i: (g if i < 4 or 8 <= i < 12 else g + 8, 8 * t + (32 if i >= 8 else 0), i & 3),
    (64, 4): lambda g, t, i: (g if i < 8 else g + 8, 16 * t, i & 7),
    (128, 4): lambda g, t, i: (g if i < 8 or 16 <= i < 24 else g + 8, 16 * t + (64 if i >= 16 else 0), i & 7),
}


def c_cell(g, t, i):
    return g if i < 2 else g + 8, 2 * t + (i & 1)


def stored_cell(k, bits):
    """Row and column among A's stored elements, which are half as many as its columns."""

    def cell(g, t, i):
        row, first, which = A_SPARSE[k, bits](g, t, i)
        return row, first // 2 + which

    return cell


def pack(matrices, cell, bits):
    """Registers [matrix][register][lane] of matrices of element bits [matrix][row][column]."""
    count, rows, columns = matrices.shape
    per = max(1, 32 // bits)
    registers = rows * columns // 32 // per
    packed = np.zeros((count, registers, 32), np.uint64 if bits == 64 else np.uint32)
    for lane in range(32):
        for i in range(registers * per):
            row, column = cell(lane >> 2, lane & 3, i)
            shift = np.uint64(bits * (i % per)) if bits == 64 else np.uint32(bits * (i % per))
            packed[:, i // per, lane] |= matrices[:, row, column].astype(packed.dtype) << shift
    return packed


def unpack(packed, cell, bits, rows):
    count, registers, _ = packed.shape
    per = max(1, 32 // bits)
    matrices = np.zeros((count, rows, 8), np.int64)
    for lane in range(32):
        for i in range(registers * per):
            row, column = cell(lane >> 2, lane & 3, i)
            word = packed[:, i // per, lane] >> packed.dtype.type(bits * (i % per))
            matrices[:, row, column] = (word & packed.dtype.type((1 << bits) - 1)).astype(np.int64)
    return matrices


# ---- Instructions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mma:
    rows: int
    k: int
    d: str
    a: str
    b: str
    c: str
    sparse: str = ""  # "sp", "sp::ordered_metadata"
    before_types: str = ""
    after_types: str = ""

    @property
    def text(self):
        parts = ["mma", self.sparse, "sync.aligned", f"m{self.rows}n8k{self.k}", "row.col", self.before_types]
        return ".".join(filter(None, [*parts, self.d, self.a, self.b, self.c, self.after_types]))

    @property
    def stored(self):
        return self.k // 2 if self.sparse else self.k

    @property
    def a_cell(self):
        bits = BITS[self.a]
        return stored_cell(self.k, bits) if self.sparse else A_DENSE[self.rows, self.k, bits]

    @property
    def b_cell(self):
        return B_ALL[self.k, BITS[self.b]]

    def __str__(self):
        return self.text


def registers_of(rows, columns, bits):
    return rows * columns * bits // max(bits if bits == 64 else 32, 32) // 32


def run(text, inputs, results, wide=False, selector=None, **options):
    """Runs one instruction on registers [warp][operand register][lane], a warp a block.

    inputs: arrays of the operands a, b, c (and metadata). results: how many registers d has.
    """
    kind, size = ("b64", 8) if wide else ("b32", 4)
    counts = [array.shape[1] for array in inputs]
    data = np.ascontiguousarray(np.concatenate(inputs, axis=1))
    total, warps = sum(counts), len(data)
    starts = [sum(counts[:n]) for n in range(len(counts))]
    operands = ["{" + ", ".join(f"%x{s + i}" for i in range(n)) + "}" for s, n in zip(starts, counts, strict=True)]
    if selector is not None:
        operands[3] = operands[3].strip("{}")
        operands.append(str(selector))
    d = "{" + ", ".join(f"%d{i}" for i in range(results)) + "}"
    lines = [f"ld.global.{kind} %x{i}, [%rd2+{128 * i * size // 4}];" for i in range(total)]
    lines += [f"{text} {d}, {', '.join(operands)};"]
    lines += [f"st.global.{kind} [%rd3+{128 * i * size // 4}], %d{i};" for i in range(results)]
    body = "\n".join(lines)
    source = f"""
.version 8.7
.target sm_80
.address_size 64
.visible .entry k(.param .u64 data, .param .u64 out)
{{
.reg .{kind} %x<{total}>, %d<{results}>;
.reg .b32 %r<4>;
.reg .b64 %rd<8>;
ld.param.u64 %rd0, [data];
ld.param.u64 %rd1, [out];
mov.u32 %r0, %tid.x;
mov.u32 %r1, %ctaid.x;
mad.lo.u32 %r2, %r1, {32 * total}, %r0;
mad.wide.u32 %rd2, %r2, {size}, %rd0;
mad.lo.u32 %r3, %r1, {32 * results}, %r0;
mad.wide.u32 %rd3, %r3, {size}, %rd1;
{body}
ret;
}}
"""
    out = np.zeros((warps, results, 32), data.dtype)
    report = sparse24.ptx.load(source).launch("k", warps, 32, [data, out], counters=False, **options)
    return out, report


def multiply(mma, a, b, c, metadata=None, selector=0, clean=True, **options):
    """D of matrices of element bits: a [warp][row][stored], b [warp][k][n], c [warp][row][n]."""
    inputs = [pack(a, mma.a_cell, BITS[mma.a]), pack(b, mma.b_cell, BITS[mma.b]), pack(c, c_cell, BITS[mma.c])]
    if mma.sparse:
        inputs.append(metadata.reshape(-1, 1, 32).astype(np.uint32))
    results = registers_of(mma.rows, 8, BITS[mma.d])
    wide = mma.a == "f64"
    out, report = run(mma.text, inputs, results, wide, selector if mma.sparse else None, **options)
    if clean:
        assert report.ok, str(report)
        return unpack(out, c_cell, BITS[mma.d], mma.rows)
    return unpack(out, c_cell, BITS[mma.d], mma.rows), report


FLOATS = [
    *(Mma(16, k, acc, "f16", "f16", acc) for k in (8, 16) for acc in ("f16", "f32")),
    *(Mma(16, k, "f32", "bf16", "bf16", "f32") for k in (8, 16)),
    *(Mma(16, k, "f32", "tf32", "tf32", "f32") for k in (4, 8)),
    *(
        Mma(16, k, acc, a, b, acc)
        for k in (16, 32)
        for acc in ("f16", "f32")
        for a, b in (("e4m3", "e4m3"), ("e5m2", "e5m2"), ("e4m3", "e5m2"), ("e5m2", "e4m3"))
    ),
    Mma(16, 32, "f32", "e4m3", "e5m2", "f32", before_types="kind::f8f6f4"),
]
DOUBLES = [Mma(rows, k, "f64", "f64", "f64", "f64") for rows, k in ((8, 4), (16, 4), (16, 8), (16, 16))]
INTEGER = [
    *(
        Mma(rows, k, "s32", a, b, "s32")
        for rows, k in ((8, 16), (16, 16), (16, 32))
        for a in ("s8", "u8")
        for b in ("s8", "u8")
    ),
    *(
        Mma(rows, k, "s32", a, b, "s32")
        for rows, k in ((8, 32), (16, 32), (16, 64))
        for a in ("s4", "u4")
        for b in ("s4", "u4")
    ),
]
SINGLE_BIT = [
    Mma(rows, k, "s32", "b1", "b1", "s32", after_types=f"{operation}.popc")
    for rows, k in ((8, 128), (16, 128), (16, 256))
    for operation in ("xor", "and")
]
SPARSE_FLOATS = [
    *(Mma(16, k, acc, "f16", "f16", acc, "sp::ordered_metadata") for k in (16, 32) for acc in ("f16", "f32")),
    *(Mma(16, k, "f32", "bf16", "bf16", "f32", "sp::ordered_metadata") for k in (16, 32)),
    *(Mma(16, k, "f32", "tf32", "tf32", "f32", "sp::ordered_metadata") for k in (8, 16)),
    Mma(16, 64, "f32", "e4m3", "e5m2", "f32", "sp::ordered_metadata"),
    Mma(16, 64, "f16", "e5m2", "e4m3", "f16", "sp::ordered_metadata", before_types="kind::f8f6f4"),
    Mma(16, 32, "f32", "f16", "f16", "f32", "sp"),
]
SPARSE_INTEGERS = [
    *(
        Mma(16, k, "s32", a, b, "s32", "sp::ordered_metadata")
        for k in (32, 64)
        for a in ("s8", "u8")
        for b in ("s8", "u8")
    ),
    *(
        Mma(16, k, "s32", a, b, "s32", "sp::ordered_metadata")
        for k in (64, 128)
        for a in ("s4", "u4")
        for b in ("s4", "u4")
    ),
    Mma(16, 64, "s32", "s8", "s8", "s32", "sp"),
]

# ---- Metadata, from hardware.md's table ------------------------------------------------------------------------------

PATTERNS = {0x4: (0, 1), 0x8: (0, 2), 0x9: (1, 2), 0xC: (0, 3), 0xD: (1, 3), 0xE: (2, 3)}
UNORDERED = {0x1: (1, 0), 0x2: (2, 0), 0x6: (2, 1), 0x3: (3, 0), 0x7: (3, 1), 0xB: (3, 2)}
ONE_OF_TWO = {0x4: (0,), 0xE: (1,)}


def chunk_of(kind):
    """Columns of A that four bits of metadata are about."""
    return {4: 8, 32: 2}.get(BITS[kind], 4)


def codes_for(kind, sparse="sp::ordered_metadata"):
    if kind == "tf32":
        return ONE_OF_TWO
    return PATTERNS if sparse == "sp::ordered_metadata" else PATTERNS | UNORDERED


def selectors_of(mma):
    words = mma.k // chunk_of(mma.a) * 16 * 4 // 32 // 8  # of each group of four lanes
    return 4 // words


def place_of_code(mma, row, chunk, selector):
    """The lane and the bit that the code of a chunk starts at."""
    g, high = row % 8, row // 8
    if BITS[mma.a] in (16, 32):  # rows g and g + 8 share a word, which has four chunks of each
        per_selector = mma.k // chunk_of(mma.a) // 4
        return 4 * g + per_selector * selector + chunk // 4, 16 * high + 4 * (chunk % 4)
    if mma.k // chunk_of(mma.a) == 8:
        return 4 * g + 2 * selector + high, 4 * chunk
    return 4 * g + high + 2 * (chunk // 8), 4 * (chunk % 8)


def metadata_of(mma, codes, selector, rubbish):
    """Words [warp][lane] of codes [warp][row][chunk]; lanes that the selector leaves out keep their rubbish."""
    words = rubbish.astype(np.int64)
    for row in range(16):
        for chunk in range(codes.shape[2]):
            lane, shift = place_of_code(mma, row, chunk, selector)
            words[:, lane] = (words[:, lane] & ~(15 << shift)) | (codes[:, row, chunk] << shift)
    return words


def dense_columns(mma, codes):
    """The column of A that each stored element [warp][row][stored] is."""
    kind, chunk = mma.a, chunk_of(mma.a)
    kept = chunk // 2
    table = codes_for(kind, mma.sparse)
    columns = np.zeros((*codes.shape[:2], mma.stored), np.int64)
    for index, code in np.ndenumerate(codes):
        places = table[int(code)]
        if BITS[kind] == 4:
            places = [2 * p + j for p in places for j in (0, 1)]
        warp, row, number = index
        columns[warp, row, kept * number : kept * (number + 1)] = [chunk * number + p for p in places]
    return columns


def decompressed(mma, stored, columns):
    dense = np.zeros((*stored.shape[:2], mma.k), stored.dtype)
    np.put_along_axis(dense, columns, stored, axis=2)
    return dense


def random_codes(mma, rng, warps):
    return rng.choice(list(codes_for(mma.a, mma.sparse)), (warps, 16, mma.k // chunk_of(mma.a)))


# ---- Layouts and exact sums ------------------------------------------------------------------------------------------


def small_integers(kind, rng, shape):
    low = 0 if kind[0] in "ub" else -4 if kind in FORMATS or kind == "f64" else -8
    high = 2 if kind == "b1" else 4 if kind in FORMATS or kind == "f64" else 8
    return rng.integers(low, high, shape)


@pytest.mark.parametrize("mma", FLOATS + DOUBLES + INTEGER, ids=str)
def test_one_element_of_a_or_b_at_a_time(mma):
    rng = np.random.default_rng(1)
    for rows, columns, is_a in ((mma.rows, mma.k, True), (mma.k, 8, False)):
        warps = rows * columns
        one = np.zeros((warps, rows, columns), np.int64)
        one[np.arange(warps), np.arange(warps) // columns, np.arange(warps) % columns] = 1
        other = small_integers(mma.b if is_a else mma.a, rng, (warps, mma.k, 8) if is_a else (warps, mma.rows, mma.k))
        a, b = (one, other) if is_a else (other, one)
        c = np.zeros((warps, mma.rows, 8), np.int64)
        got = multiply(mma, bits_of_integers(mma.a, a), bits_of_integers(mma.b, b), c)
        np.testing.assert_array_equal(got, bits_of_integers(mma.d, a @ b))


@pytest.mark.parametrize("mma", FLOATS + DOUBLES + INTEGER, ids=str)
def test_small_integers_are_summed_exactly_into_any_c(mma):
    rng = np.random.default_rng(2)
    warps = 20
    a, b = small_integers(mma.a, rng, (warps, mma.rows, mma.k)), small_integers(mma.b, rng, (warps, mma.k, 8))
    c = rng.integers(-100, 100, (warps, mma.rows, 8))
    want = bits_of_integers(mma.d, a @ b + c)
    for numerics in sparse24.ptx.NUMERICS:
        got = multiply(
            mma, bits_of_integers(mma.a, a), bits_of_integers(mma.b, b), bits_of_integers(mma.c, c), numerics=numerics
        )
        np.testing.assert_array_equal(got, want, err_msg=numerics)


def full_range(kind, rng, shape):
    bits = rng.integers(0, 1 << BITS[kind], shape)
    return bits, bits - ((bits >> (BITS[kind] - 1)) << BITS[kind]) if kind[0] == "s" else bits


@pytest.mark.parametrize("satfinite", ["", "satfinite"])
@pytest.mark.parametrize("mma", INTEGER, ids=str)
def test_integers_wrap_or_saturate(mma, satfinite):
    rng = np.random.default_rng(3)
    a_bits, a = full_range(mma.a, rng, (30, mma.rows, mma.k))
    b_bits, b = full_range(mma.b, rng, (30, mma.k, 8))
    c = rng.choice([2**31 - 1, -(2**31), 2**31 - 5000, -(2**31) + 5000, 0], (30, mma.rows, 8))
    exact = a @ b + c
    assert exact.max() > 2**31 - 1 and (exact.min() < -(2**31) or mma.a[0] == mma.b[0] == "u")
    want = np.clip(exact, -(2**31), 2**31 - 1) if satfinite else exact
    saturating = Mma(**{**mma.__dict__, "before_types": satfinite})
    np.testing.assert_array_equal(multiply(saturating, a_bits, b_bits, c & 0xFFFFFFFF), want & 0xFFFFFFFF)


@pytest.mark.parametrize("mma", SINGLE_BIT, ids=str)
def test_single_bits(mma):
    rng = np.random.default_rng(4)
    a, b = rng.integers(0, 2, (20, mma.rows, mma.k)), rng.integers(0, 2, (20, mma.k, 8))
    c = rng.integers(-(2**31), 2**31, (20, mma.rows, 8))
    both = a @ b
    counted = both if "and" in mma.text else a.sum(2, keepdims=True) + b.sum(1, keepdims=True) - 2 * both
    np.testing.assert_array_equal(multiply(mma, a, b, c & 0xFFFFFFFF), (counted + c) & 0xFFFFFFFF)


@pytest.mark.parametrize("mma", SPARSE_FLOATS + SPARSE_INTEGERS, ids=str)
def test_sparse_a_is_the_dense_a_it_was_compressed_from(mma):
    rng = np.random.default_rng(5)
    for selector in range(selectors_of(mma)):
        warps = 24
        codes = random_codes(mma, rng, warps)
        names = list(codes_for(mma.a, mma.sparse))
        for n, code in enumerate(names):  # each code in every lane at once
            codes[n] = code
        columns = dense_columns(mma, codes)
        stored = small_integers(mma.a, rng, (warps, 16, mma.stored))
        b = small_integers(mma.b, rng, (warps, mma.k, 8))
        c = rng.integers(-100, 100, (warps, 16, 8))
        words = metadata_of(mma, codes, selector, rng.integers(0, 1 << 32, (warps, 32)))
        want = decompressed(mma, stored, columns) @ b + c
        got = multiply(
            mma,
            bits_of_integers(mma.a, stored),
            bits_of_integers(mma.b, b),
            bits_of_integers(mma.c, c),
            words,
            selector,
        )
        np.testing.assert_array_equal(got, bits_of_integers(mma.d, want), err_msg=f"selector {selector}")


@pytest.mark.parametrize("satfinite", ["", "satfinite"])
@pytest.mark.parametrize("mma", SPARSE_INTEGERS, ids=str)
def test_sparse_integers_wrap_or_saturate(mma, satfinite):
    rng = np.random.default_rng(6)
    codes = random_codes(mma, rng, 20)
    a_bits, a = full_range(mma.a, rng, (20, 16, mma.stored))
    b_bits, b = full_range(mma.b, rng, (20, mma.k, 8))
    c = rng.choice([2**31 - 1, -(2**31), 0], (20, 16, 8))
    exact = decompressed(mma, a, dense_columns(mma, codes)) @ b + c
    want = np.clip(exact, -(2**31), 2**31 - 1) if satfinite else exact
    saturating = Mma(**{**mma.__dict__, "before_types": satfinite})
    words = metadata_of(mma, codes, 0, rng.integers(0, 1 << 32, (20, 32)))
    np.testing.assert_array_equal(multiply(saturating, a_bits, b_bits, c & 0xFFFFFFFF, words), want & 0xFFFFFFFF)


@pytest.mark.parametrize("layouts", ["row.row", "row.col", "col.row", "col.col"])
@pytest.mark.parametrize("types", ["f16.f16.f16.f16", "f32.f16.f16.f16", "f32.f16.f16.f32"])
def test_four_products_of_m8n8k4(layouts, types):
    rng = np.random.default_rng(7)
    a_by_columns, b_by_columns = (part == "col" for part in layouts.split("."))
    half_d, half_c = types.startswith("f16"), types.endswith("f16")
    warps = 10
    a, b = rng.integers(-4, 4, (warps, 4, 8, 4)), rng.integers(-4, 4, (warps, 4, 4, 8))
    c = rng.integers(1990, 2049, (warps, 4, 8, 8))  # sums beyond 2048, of which f16 has every other
    registers = [np.zeros((warps, n, 32), np.uint32) for n in (2, 2, 4 if half_c else 8)]

    def half(x):
        return bits_of_integers("f16", x).astype(np.uint32)

    for lane in range(32):
        q, low, high = lane % 16 // 4, lane % 4, 0 if lane < 16 else 4
        for i in range(4):
            at = (i % 4 + high, low) if a_by_columns else (low + high, i)
            registers[0][:, i // 2, lane] |= half(a[:, q, at[0], at[1]]) << np.uint32(16 * (i % 2))
            at = (i, low + high) if b_by_columns else (low, i + high)
            registers[1][:, i // 2, lane] |= half(b[:, q, at[0], at[1]]) << np.uint32(16 * (i % 2))

    def accumulator(lane, i, is_half):
        high = 0 if lane < 16 else 4
        if is_half:
            return lane % 4 + high, i
        return (lane & 1) + (i & 2) + high, (i & 4) + (lane & 2) + (i & 1)

    for lane in range(32):
        for i in range(8):
            row, column = accumulator(lane, i, half_c)
            value = c[:, lane % 16 // 4, row, column]
            if half_c:
                registers[2][:, i // 2, lane] |= half(value) << np.uint32(16 * (i % 2))
            else:
                registers[2][:, i, lane] = bits_of_integers("f32", value)
    out, report = run(f"mma.sync.aligned.m8n8k4.{layouts}.{types}", registers, 4 if half_d else 8)
    assert report.ok, str(report)
    want = a @ b + c
    for lane in range(32):
        for i in range(8):
            row, column = accumulator(lane, i, half_d)
            bits = bits_of_integers("f16" if half_d else "f32", want[:, lane % 16 // 4, row, column])
            got = (out[:, i // 2, lane] >> np.uint32(16 * (i % 2))) & 0xFFFF if half_d else out[:, i, lane]
            np.testing.assert_array_equal(got, bits, err_msg=f"lane {lane}, element {i}")


# ---- Rounding: the models in exact fractions -------------------------------------------------------------------------


def exponent_of(value):
    """Of the leading bit of a nonzero float."""
    return math.frexp(value)[1] - 1


def truncated(x):
    return x.numerator // x.denominator if x >= 0 else -(-x.numerator // x.denominator)


def power(exponent):
    return Fraction(2) ** exponent


def to_nearest(x, kind):
    """The nearest number of a type, ties to even, of a fraction."""
    if x == 0:
        return 0.0
    exponents, mantissas = FORMATS[kind]
    bias = (1 << (exponents - 1)) - 1
    magnitude = abs(x)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    exponent = exponent if power(exponent) <= magnitude else exponent - 1
    unit = power(max(exponent, 1 - bias) - mantissas)
    rounded = round(magnitude / unit) * unit  # Python rounds ties to even
    value = math.inf if rounded >= power(bias + 1) else float(rounded)
    return -value if x < 0 else value


def to_zero(x, significant):
    """Truncated to an f32 of that many significant bits."""
    if x == 0:
        return 0.0
    magnitude = abs(x)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    exponent = exponent if power(exponent) <= magnitude else exponent - 1
    unit = power(max(exponent, -126) - significant + 1)
    value = truncated(magnitude / unit) * unit
    value = math.inf if value >= power(128) else float(value)
    return -value if x < 0 else value


def in_blocks(a, b, c, kinds, half, generation, products):
    """One element of D by hardware.md's model: a and b are floats in the order of k, c too."""
    hopper = generation == "sm_90"
    fp8 = kinds[0] in ("e4m3", "e5m2")
    if fp8 and hopper:  # two mma of f16, which take two of each register's four elements, and an addition
        order = (
            [i for part in ((0, 1), (2, 3)) for i in range(len(a)) if i % 4 in part] if len(a) == 32 else range(len(a))
        )
        a, b = [a[i] for i in order], [b[i] for i in order]
        total = in_blocks(a, b, 0.0, ("f16", "f16"), half, generation, products)
        return total if math.isinf(total) else to_nearest(Fraction(total) + Fraction(c), "f16" if half else "f32")
    per_block = {"tf32": 4, "e4m3": 16, "e5m2": 16}.get(kinds[0], 8) * (2 if hopper else 1)
    per_block = products or per_block
    fraction = 13 if fp8 else 23 + (2 if hopper else 1)
    lowest = (-21 if hopper else -20) if half else (-133 if hopper else -132)
    least = [2 - (1 << (FORMATS[kind][0] - 1)) for kind in kinds]
    for start in range(0, len(a), per_block):
        terms = []
        for x, y in zip(a[start : start + per_block], b[start : start + per_block], strict=True):
            if x != 0 and y != 0:
                exponent = max(exponent_of(x), least[0]) + max(exponent_of(y), least[1])
                terms.append((Fraction(x) * Fraction(y), exponent))
        if c != 0:
            terms.append((Fraction(c), max(exponent_of(c), -126)))
        top = max([lowest, *(exponent for _, exponent in terms)])
        total = sum(truncated(value * power(fraction - top)) for value, _ in terms) * power(top - fraction)
        c = to_nearest(total, "f16") if half else to_zero(total, 14 if fp8 else 24)
        if math.isinf(c):
            break
    return c


def one_element(a, b, c, kinds, half, numerics, products=0):
    """What D must be, as a float, from floats in the order of k."""
    plain = (
        math.fsum([c, *(x * y for x, y in zip(a, b, strict=True))]) if all(map(math.isfinite, [*a, *b, c])) else None
    )
    if plain is None:
        products_and_c = [x * y for x, y in zip(a, b, strict=True)] + [c]
        infinite = {x for x in products_and_c if math.isinf(x)}
        return math.nan if any(map(math.isnan, products_and_c)) or len(infinite) > 1 else infinite.pop()
    if numerics in ("sm_80", "sm_90"):
        return in_blocks(a, b, c, kinds, half, numerics, products)
    if numerics == "float64":
        total = c
        for x, y in zip(a, b, strict=True):
            total += x * y
        return to_nearest(Fraction(total), "f16" if half else "f32")
    for x, y in zip(a, b, strict=True):
        c = to_nearest(Fraction(x) * Fraction(y) + Fraction(c), "f32")
        if math.isinf(c):
            break
    return to_nearest(Fraction(c), "f16") if half and math.isfinite(c) else c


def random_floats(kind, rng, shape, spread):
    """Element bits whose exponents are spread so or so; some zeros, both signs."""
    exponents, mantissas = FORMATS[kind]
    top, bias = (1 << exponents) - 1, (1 << (exponents - 1)) - 1
    exponent = {
        "narrow": lambda: rng.integers(bias - 2, bias + 2, shape),
        "wide": lambda: rng.integers(0, top, shape),
        "tiny": lambda: rng.integers(0, 3, shape),
        "huge": lambda: rng.integers(top - 3, top, shape),
        "special": lambda: np.where(rng.random(shape) < 0.02, top, rng.integers(bias - 2, bias + 2, shape)),
    }[spread]()
    mantissa = rng.integers(0, 1 << mantissas, shape)
    if spread == "special":
        mantissa = np.where((exponent == top) & (rng.random(shape) < 0.8), 0, mantissa)
    bits = rng.integers(0, 2, shape) << (exponents + mantissas) | exponent << mantissas | mantissa
    bits = np.where(rng.random(shape) < 0.1, bits & (1 << (exponents + mantissas)), bits)
    return bits << 13 | rng.integers(0, 1 << 13, shape) if kind == "tf32" else bits


def values_of(kind, bits):
    return np.vectorize(lambda b: value_of(kind, int(b)), otypes=[np.float64])(bits)


SPREADS = ["narrow", "wide", "tiny", "huge", "special"]


def check_numerics(mma, numerics, seed, products=None):
    rng = np.random.default_rng(seed)
    warps, half = len(SPREADS), mma.c == "f16"

    def draw(kind, *shape):
        return np.stack([random_floats(kind, rng, shape, spread) for spread in SPREADS])

    a, b, c = draw(mma.a, 16, mma.stored), draw(mma.b, mma.k, 8), draw(mma.c, 16, 8)
    options = {"numerics": numerics, "sparse_products": products}
    if mma.sparse:
        codes = random_codes(mma, rng, warps)
        columns = dense_columns(mma, codes)
        words = metadata_of(mma, codes, 0, np.zeros((warps, 32)))
        got = multiply(mma, a, b, c, words, **options)
    else:
        columns = np.broadcast_to(np.arange(mma.k), a.shape)
        got = multiply(mma, a, b, c, **options)
    av, bv, cv = values_of(mma.a, a), values_of(mma.b, b), values_of(mma.c, c)
    for warp, m, n in itertools.product(range(warps), range(16), range(8)):
        if (m + n + warp) % 3:  # a third of them: the model is slow
            continue
        x, y = av[warp, m].tolist(), bv[warp, columns[warp, m], n].tolist()
        want = one_element(x, y, cv[warp, m, n].item(), (mma.a, mma.b), half, numerics, products or 0)
        bits = int(got[warp, m, n])
        place = f"{SPREADS[warp]}, row {m}, column {n}: a {x}, b {y}, c {cv[warp, m, n]}"
        if math.isnan(want):
            assert bits == (0x7FFF if half else 0x7FFFFFFF), place
        else:
            value = value_of(mma.d, bits)
            assert value == want, f"{place}: got {value.hex()}, expected {want.hex()}"
            # A zero has the sign of what was cut off, if anything was.
            assert math.copysign(1, value) == math.copysign(1, want) or want == 0, place


@pytest.mark.parametrize("numerics", sparse24.ptx.NUMERICS)
@pytest.mark.parametrize("mma", [m for m in FLOATS if not m.before_types], ids=str)
def test_rounding(mma, numerics):
    check_numerics(mma, numerics, 8)


@pytest.mark.parametrize("numerics", sparse24.ptx.NUMERICS)
@pytest.mark.parametrize("mma", SPARSE_FLOATS, ids=str)
def test_rounding_with_sparse_a(mma, numerics):
    check_numerics(mma, numerics, 9)


@pytest.mark.parametrize("products", [1, 4, 8, 16, 64])
@pytest.mark.parametrize("numerics", ["sm_80", "sm_90"])
def test_how_many_products_mma_sp_sums_at_once_is_an_option(numerics, products):
    for mma in SPARSE_FLOATS[:3]:
        check_numerics(mma, numerics, 10, products)


def test_the_models_differ_where_they_should():
    """2^11 * 2^11 + 1 in blocks: what is cut off says how wide the sum is."""
    mma = Mma(16, 16, "f32", "f16", "f16", "f32")
    a, b = np.zeros((1, 16, 16), np.int64), np.zeros((1, 16, 8), np.int64)
    half = {value: int(bits_of_integers("f16", np.array([value]))[0]) for value in (1.0, 2048.0, -2048.0, 0.25)}
    a[:, :, 0], b[:, 0] = half[2048.0], half[2048.0]  # 2^22
    a[:, :, 1], b[:, 1] = half[0.25], half[0.25]  # 2^-4: the 26th bit
    a[:, :, 2], b[:, 2] = half[-2048.0], half[2048.0]
    c = np.zeros((1, 16, 8), np.int64)
    results = {n: value_of("f32", int(multiply(mma, a, b, c, numerics=n)[0, 0, 0])) for n in sparse24.ptx.NUMERICS}
    assert results == {"sm_80": 0.0, "sm_90": 0.0, "ieee": 0.0, "float64": 2.0**-4}
    a[:, :, 1], b[:, 1] = half[0.25], half[1.0]  # 2^-2: the 24th bit after the point
    results = {n: value_of("f32", int(multiply(mma, a, b, c, numerics=n)[0, 0, 0])) for n in sparse24.ptx.NUMERICS}
    assert results == {"sm_80": 0.25, "sm_90": 0.25, "ieee": 0.0, "float64": 0.25}


def test_doubles_are_fused_in_the_order_of_k():
    mma = Mma(16, 16, "f64", "f64", "f64", "f64")
    rng = np.random.default_rng(11)
    a, b, c = (rng.standard_normal(shape) for shape in ((2, 16, 16), (2, 16, 8), (2, 16, 8)))
    a[0, 0, 0], b[1, 1, 1] = np.inf, np.nan
    got = multiply(mma, a.view(np.int64), b.view(np.int64), c.view(np.int64)).view(np.float64)
    for warp, m, n in itertools.product(range(2), range(16), range(8)):
        total = float(c[warp, m, n])
        for x, y in zip(a[warp, m].tolist(), b[warp, :, n].tolist(), strict=True):
            if math.isfinite(x * y) and math.isfinite(total):
                total = float(Fraction(x) * Fraction(y) + Fraction(total))
            else:
                total = x * y + total
        assert np.array_equal(got[warp, m, n], total, equal_nan=True), (warp, m, n)


# ---- What the ISA leaves undefined -----------------------------------------------------------------------------------


def undefined(mma, codes, selector=0, **options):
    rng = np.random.default_rng(12)
    stored, b = small_integers(mma.a, rng, (1, 16, mma.stored)), small_integers(mma.b, rng, (1, mma.k, 8))
    words = metadata_of(mma, codes, selector % selectors_of(mma), np.zeros((1, 32)))
    c = np.zeros((1, 16, 8), np.int64)
    return multiply(
        mma, bits_of_integers(mma.a, stored), bits_of_integers(mma.b, b), c, words, selector, clean=False, **options
    )


@pytest.mark.parametrize("mma", SPARSE_FLOATS + SPARSE_INTEGERS, ids=str)
def test_selectors_beyond_the_shape_are_found(mma):
    codes = np.full((1, 16, mma.k // chunk_of(mma.a)), 0xE)
    for selector in range(5):
        _, report = undefined(mma, codes, selector)
        if selector < selectors_of(mma):
            assert report.ok
            continue
        (error,) = report.errors
        assert error.kind == "bad_selector" and f"selector {selector} " in error.message
        assert mma.a in error.message and f"m16n8k{mma.k}" in error.message
        assert undefined(mma, codes, selector, checks={"memory", "race"})[1].ok


@pytest.mark.parametrize("mma", SPARSE_FLOATS + SPARSE_INTEGERS, ids=str)
def test_undefined_metadata_is_found_wherever_it_is(mma):
    legal = set(codes_for(mma.a, mma.sparse))
    chunks = mma.k // chunk_of(mma.a)
    rng = np.random.default_rng(13)
    for selector in range(selectors_of(mma)):
        # The native test has all sixteen everywhere.
        for code in [*rng.choice([c for c in range(16) if c not in legal], 2), rng.choice(list(legal))]:
            row, chunk = int(rng.integers(16)), int(rng.integers(chunks))
            codes = np.full((1, 16, chunks), 0x4)
            codes[0, row, chunk] = code
            _, report = undefined(mma, codes, selector)
            if code in legal:
                assert report.ok, f"{code:#x}"
                continue
            (error,) = report.errors
            assert error.kind == "bad_metadata" and f"0b{code:04b} of row {row}, chunk {chunk} " in error.message
            assert error.lane == place_of_code(mma, row, chunk, selector)[0]
            assert undefined(mma, codes, selector, checks="none")[1].ok


def test_only_words_that_the_selector_names_are_looked_at():
    mma = Mma(16, 32, "f32", "f16", "f16", "f32", "sp::ordered_metadata")
    codes = np.full((1, 16, 8), 0x4)
    assert undefined(mma, codes, 0)[1].ok  # the other lanes hold zeros
    assert undefined(mma, codes, 1)[1].ok


# ---- Registers, lanes, refusals --------------------------------------------------------------------------------------


def test_results_may_overwrite_operands():
    """d in the registers of c, of a, and of the metadata."""
    source = """
.version 8.5
.target sm_80
.address_size 64
.visible .entry k(.param .u64 out)
{
.reg .b32 %x<8>;
.reg .b64 %rd<3>;
.reg .b32 %r0;
ld.param.u64 %rd0, [out];
mov.u32 %r0, %tid.x;
mul.wide.u32 %rd1, %r0, 16;
add.s64 %rd0, %rd0, %rd1;
mov.b32 %x0, 0x3c003c00;
mov.b32 %x1, 0x3c003c00;
mov.b32 %x2, 0x44444444;
mov.b32 %x3, 0x3f800000;
mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32
  {%x0, %x1, %x2, %x3}, {%x0, %x0, %x1, %x1}, {%x1, %x0, %x1, %x0}, {%x3, %x3, %x3, %x3}, %x2, 0x1;
st.global.v4.b32 [%rd0], {%x0, %x1, %x2, %x3};
ret;
}
"""
    out = np.zeros(128, np.float32)
    sparse24.ptx.load(source).launch("k", 1, 32, [out]).raise_for_errors()
    assert (out == 17).all()


def fragments(*counts):
    return ", ".join("{" + ", ".join(["%x0"] * count) + "}" for count in counts)


@pytest.mark.parametrize(
    "opcode, operands",
    [
        ("sync.aligned.m16n8k16.row.col.f32.f16.bf16.f32", fragments(4, 4, 2, 4)),
        ("sync.aligned.m16n8k16.row.row.f32.f16.f16.f32", fragments(4, 4, 2, 4)),
        ("sync.aligned.m16n8k16.row.col.f16.f16.f16.f32", fragments(2, 4, 2, 4)),
        ("sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", fragments(4, 3, 2, 4)),
        ("sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", fragments(4, 4, 2, 4).replace("%x0", "_", 1)),
        ("sync.m16n8k16.row.col.f32.f16.f16.f32", fragments(4, 4, 2, 4)),
        ("sync.aligned.m8n8k4.row.col.f16.f16.f16.f32", fragments(4, 2, 2, 8)),
        ("sync.aligned.m16n8k32.row.col.kind::f8f6f4.f32.e2m1.e2m1.f32", fragments(4, 4, 2, 4)),
        ("sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s4.s32", fragments(4, 4, 2, 4)),
        ("sync.aligned.m8n8k4.row.col.rz.f64.f64.f64.f64", fragments(2, 1, 1, 2)),
        ("sp.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32", fragments(4, 2, 2, 4) + ", %x0, 0"),
        ("sp.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", fragments(4, 2, 2, 4) + ", %x0, %x0"),
    ],
)
def test_what_does_not_exist_is_refused(opcode, operands):
    source = f"""
.version 8.7
.target sm_120a
.address_size 64
.visible .entry k()
{{
.reg .b32 %x<4>;
mma.{opcode} {operands};
ret;
}}
"""
    module = sparse24.ptx.load(source)
    with pytest.raises(sparse24.ptx.PtxError, match="line 8.*(mma|expected a register)"):
        module.launch("k", 1, 32, [])
