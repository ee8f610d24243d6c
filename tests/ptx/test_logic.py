"""Logic, shifts and bit fields of the PTX emulator against Python's integers and the ISA's own loops over bits."""

from __future__ import annotations

from typing import Any

import elementwise
import numpy as np
import pytest
from elementwise import DTYPES, apply, assert_same, edges, every, exact, expand, random, samples, wrap

WORDS = ["b16", "b32", "b64"]
Ints = Any


def bits(dtype: Any) -> int:
    return 8 * np.dtype(dtype).itemsize


# ---- and, or, xor, not, cnot -----------------------------------------------------------------------------------------

BINARY = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@pytest.mark.parametrize("type_name", WORDS)
@pytest.mark.parametrize("opcode", BINARY)
def test_binary(opcode: str, type_name: str) -> None:
    dtype = DTYPES[type_name]
    a, b = samples(dtype, dtype, count=2**16 if type_name == "b16" else 4096)
    assert_same(apply(f"{opcode}.{type_name}", a, b, out=dtype), BINARY[opcode](a, b), a, b, what=opcode)


@pytest.mark.parametrize("type_name", WORDS)
def test_unary(type_name: str) -> None:
    dtype = DTYPES[type_name]
    a = every(dtype) if type_name == "b16" else samples(dtype)[0]
    assert_same(apply(f"not.{type_name}", a, out=dtype), ~a, a, what="not")
    assert_same(apply(f"cnot.{type_name}", a, out=dtype), (a == 0).astype(dtype), a, what="cnot")


@pytest.mark.parametrize("block", [32, 33])
@pytest.mark.parametrize("opcode", BINARY)
def test_binary_of_predicates(opcode: str, block: int) -> None:
    a = np.arange(64, dtype=np.uint32)
    program = """setp.ne.u32 %p, %b, 0; setp.ne.u32 %q, %c, 0; setp.ne.u32 %r, %e, 0;
        @%r {opcode}.pred %p, {operands}; selp.u32 %d, 1, 0, %p"""
    p, q, guard = a & 1, a >> 1 & 1, a >> 2 & 1
    for operands, left, right in [
        ("%p, %q", p, q),
        ("!%p, %q", 1 - p, q),
        ("%q, !%p", q, 1 - p),
        ("%q, 1", q, 0 * q + 1),
    ]:
        expected = np.where(guard != 0, BINARY[opcode](left, right), p).astype(np.uint32)
        actual = apply(program.format(opcode=opcode, operands=operands), a, p, q, guard, out=np.uint32, block=block)
        assert_same(actual, expected, p, q, guard, what=operands)


def test_not_of_predicates() -> None:
    a = np.arange(70, dtype=np.uint32)
    program = "setp.ne.u32 %p, %b, 0; setp.ne.u32 %q, %c, 0; @%q not.pred %p, %p; selp.u32 %d, 1, 0, %p"
    expected = np.where(a & 2, 1 - (a & 1), a & 1).astype(np.uint32)
    assert_same(apply(program, a, a & 1, a & 2, out=np.uint32), expected, a)


# ---- lop3 ------------------------------------------------------------------------------------------------------------


def lookup(table: int, a: Ints, b: Ints, c: Ints) -> Ints:
    result = np.zeros_like(a)
    for row in range(8):
        if table >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result


def test_lop3_by_every_table() -> None:
    a, b, c = (random(np.uint32, 64, seed) for seed in range(3))
    a[:8], b[:8], c[:8] = 0xF0F0F0F0, 0xCCCCCCCC, 0xAAAAAAAA
    for first in range(0, 256, 32):
        tables = range(first, first + 32)
        program = "; ".join(f"lop3.b32 %d{i}, %a, %b, %c, {table:#x}" for i, table in enumerate(tables))
        results = apply(program, a, b, c, out=(np.uint32,) * 32)
        for table, result in zip(tables, results, strict=True):
            assert result[0] & 0xFF == table  # how the ISA defines the operand
            assert_same(result, lookup(table, a, b, c), a, b, c, what=f"lop3 {table:#x}")


@pytest.mark.parametrize("operation", ["or", "and"])
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("negated", ["", "!"])
def test_lop3_with_a_predicate(operation: str, sink: bool, negated: str) -> None:
    a, b, c, q = samples(np.uint32, np.uint32, np.uint32, np.uint32, count=300)
    a[::3], b[::3] = 0, 0
    q &= 1
    program = f"""mov.u32 %d0, 0; setp.ne.u32 %q, %e, 0;
        lop3.{operation}.b32 {"_" if sink else "%d0"}|%p, %a, %b, %c, 0xc8, {negated}%q; selp.u32 %d1, 1, 0, %p"""
    result, p = apply(program, a, b, c, q, out=(np.uint32, np.uint32))
    value = lookup(0xC8, a, b, c)
    with_q = 1 - q if negated else q
    expected = BINARY[operation]((value != 0).astype(np.uint32), with_q)
    assert_same(result, 0 * value if sink else value, a, b, c)
    assert_same(p, expected, a, b, c, q)


# ---- shifts ----------------------------------------------------------------------------------------------------------

AMOUNTS = np.array([*range(70), 127, 128, 255, 256, 257, 2**16, 2**31, 2**32 - 1], np.uint32)
SHIFTS = [f"shl.{kind}" for kind in WORDS] + [f"shr{kind}" for kind in expand("b16|b32|b64|u16|u32|u64|s16|s32|s64")]


@pytest.mark.parametrize("name", SHIFTS)
def test_shifts(name: str) -> None:
    dtype = DTYPES[name.rpartition(".")[2]]
    values = np.concatenate([edges(dtype), random(dtype, 40)])
    a, amount = (grid.reshape(-1) for grid in np.meshgrid(values, AMOUNTS, indexing="ij"))
    clamped = np.minimum(exact(amount), bits(dtype))
    expected = wrap(exact(a) << clamped if name.startswith("shl") else exact(a) >> clamped, dtype)
    assert_same(apply(name, a, amount, out=dtype), expected, a, amount, what=name)


@pytest.mark.parametrize("name", [f"shf{one}" for one in expand("l|r clamp|wrap b32")])
def test_funnel_shifts(name: str) -> None:
    a, b = samples(np.uint32, np.uint32, count=1000)
    c = np.resize(AMOUNTS, a.size)
    both = exact(b) * 2**32 + exact(a)
    amount = np.minimum(exact(c), 32) if ".clamp" in name else exact(c) % 32
    expected = wrap((both << amount) >> 32 if ".l." in name else both >> amount, np.uint32)
    assert_same(apply(name, a, b, c, out=np.uint32), expected, a, b, c, what=name)


# ---- prmt ------------------------------------------------------------------------------------------------------------

# The ISA's table: for each mode and c % 4 the source bytes of d's bytes 3 to 0.
PERMUTATIONS = {
    "f4e": ["3210", "4321", "5432", "6543"],
    "b4e": ["5670", "6701", "7012", "0123"],
    "rc8": ["0000", "1111", "2222", "3333"],
    "ecl": ["3210", "3211", "3222", "3333"],
    "ecr": ["0000", "1110", "2210", "3210"],
    "rc16": ["1010", "3232", "1010", "3232"],
}


def bytes_of(a: Ints, b: Ints) -> list[Ints]:
    return [word >> shift & 0xFF for word in (a, b) for shift in (0, 8, 16, 24)]


def expected_bytes(a: int, b: int, selectors: int) -> int:
    """One prmt."""
    result = 0
    for i in range(4):
        selector = selectors >> 4 * i & 0xF
        byte = (b << 32 | a) >> 8 * (selector & 7) & 0xFF
        result |= (255 * (byte >> 7) if selector & 8 else byte) << 8 * i
    return result


def test_permute_by_every_selector() -> None:
    c = np.arange(2**16, dtype=np.uint32)
    c |= random(np.uint32, c.size, 7) << np.uint32(16)  # the upper half says nothing
    a, b = random(np.uint32, c.size, 1), random(np.uint32, c.size, 2)
    sources = np.stack(bytes_of(a, b))
    expected = np.zeros_like(a)
    for i in range(4):
        selector = c >> np.uint32(4 * i) & 0xF
        byte = np.take_along_axis(sources, (selector & 7)[None].astype(int), 0)[0]
        byte = np.where(selector & 8, np.where(byte & 0x80, 0xFF, 0), byte).astype(np.uint32)
        expected |= byte << np.uint32(8 * i)
    assert_same(apply("prmt.b32", a, b, c, out=np.uint32), expected, a, b, c, what="prmt")
    # Each selector for a whole warp of different values, too.
    some = np.concatenate([np.arange(0, 2**16, 251), [0x5410, 0x7632, 0xFEDC, 0x8888]])
    rows = np.array(
        [
            [expected_bytes(x, y, z) for x, y in zip(a[:32].tolist(), b[:32].tolist(), strict=True)]
            for z in some.tolist()
        ]
    )
    shape = rows.shape
    a, b, c = (np.broadcast_to(one, shape) for one in (a[:32], b[:32], some.astype(np.uint32)[:, None]))
    assert_same(apply("prmt.b32", a, b, c, out=np.uint32, block=32), rows.astype(np.uint32), what="prmt")


@pytest.mark.parametrize("mode", PERMUTATIONS)
def test_permute_by_mode(mode: str) -> None:
    a, b, c = (random(np.uint32, 1000, seed) for seed in range(3))
    sources = bytes_of(a, b)
    expected = np.zeros_like(a)
    for number, row in enumerate(PERMUTATIONS[mode]):
        word = sum(sources[int(digit)] << np.uint32(24 - 8 * place) for place, digit in enumerate(row))
        expected = np.where(c % 4 == number, word, expected).astype(np.uint32)
    assert_same(apply(f"prmt.b32.{mode}", a, b, c, out=np.uint32), expected, a, b, c, what=mode)


# ---- counting and finding bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("type_name", ["b32", "b64"])
def test_counts_and_reversal(type_name: str) -> None:
    dtype = DTYPES[type_name]
    (a,) = samples(dtype)
    digits = [f"{value:0{bits(dtype)}b}" for value in a.tolist()]
    counts = {
        "popc": np.array([text.count("1") for text in digits], np.uint32),
        "clz": np.array([len(text) - len(text.lstrip("0")) for text in digits], np.uint32),
        "brev": np.array([int(text[::-1], 2) for text in digits], dtype),
    }
    for opcode, expected in counts.items():
        assert_same(apply(f"{opcode}.{type_name}", a, out=expected.dtype), expected, a, what=opcode)


@pytest.mark.parametrize("type_name", ["u32", "u64", "s32", "s64"])
def test_find_highest_bit(type_name: str) -> None:
    dtype = DTYPES[type_name]
    (a,) = samples(dtype)
    found = np.array([(~value if value < 0 else value).bit_length() - 1 for value in a.tolist()])
    expected = wrap(exact(found), np.uint32)  # -1 where there is none
    assert_same(apply(f"bfind.{type_name}", a, out=np.uint32), expected, a, what="bfind")
    expected = wrap(exact(np.where(found < 0, -1, bits(dtype) - 1 - found)), np.uint32)
    assert_same(apply(f"bfind.shiftamt.{type_name}", a, out=np.uint32), expected, a, what="bfind.shiftamt")


def find_nth(mask: int, base: int, offset: int) -> int:
    ones = [place for place in range(32) if mask >> place & 1]
    if offset == 0:
        return base if base in ones else -1
    towards = [place for place in ones if place >= base] if offset > 0 else [p for p in ones[::-1] if p <= base]
    return towards[abs(offset) - 1] if abs(offset) <= len(towards) else -1


def test_find_nth_bit() -> None:
    generator = np.random.default_rng(0)
    mask = random(np.uint32, 4000)
    mask[:20] = edges(np.uint32)[:20]
    base = generator.integers(0, 32, mask.size).astype(np.uint32)
    offset = generator.integers(-20, 21, mask.size).astype(np.int32)
    offset[-2:] = [np.iinfo(np.int32).min, np.iinfo(np.int32).max]
    found = [find_nth(*one) for one in zip(mask.tolist(), base.tolist(), offset.tolist(), strict=True)]
    expected = wrap(np.array(found, dtype=object), np.uint32)
    assert_same(apply("fns.b32", mask, base, offset, out=np.uint32), expected, mask, base, offset, what="fns")
    assert apply("fns.b32", np.uint32([7]), np.uint32([2**31]), np.int32([1]), out=np.uint32)[0] == 2**32 - 1


# ---- bit fields ------------------------------------------------------------------------------------------------------

PLACES = np.array([0, 1, 7, 15, 16, 30, 31, 32, 33, 62, 63, 64, 65, 127, 128, 254, 255, 256, 257, 2**32 - 1], np.uint32)


def fields(dtype: Any, words: int) -> list[Any]:
    """Some words, with all pairs of PLACES and some random positions and lengths."""
    position, length = (grid.reshape(-1) for grid in np.meshgrid(PLACES, PLACES, indexing="ij"))
    generator = np.random.default_rng(1)
    position = np.concatenate([position, generator.integers(0, 66, 1500, dtype=np.uint32)])
    length = np.concatenate([length, generator.integers(0, 66, 1500, dtype=np.uint32)])
    return [random(dtype, position.size, seed) for seed in range(words)] + [position, length]


def extracted(a: int, b: int, c: int, width: int, signed: bool) -> int:
    """The loop of the ISA's section on bfe."""
    position, length = b & 0xFF, c & 0xFF
    sign = 0 if not signed or length == 0 else a >> min(position + length - 1, width - 1) & 1
    return sum((a >> (position + i) & 1 if i < length and position + i < width else sign) << i for i in range(width))


@pytest.mark.parametrize("type_name", ["u32", "u64", "s32", "s64"])
def test_extract(type_name: str) -> None:
    dtype = DTYPES[type_name]
    a, b, c = fields(dtype, 1)
    width = bits(dtype)
    unsigned = a.view(f"uint{width}").tolist()
    values = [extracted(*one, width, type_name[0] == "s") for one in zip(unsigned, b.tolist(), c.tolist(), strict=True)]
    expected = wrap(np.array(values, dtype=object), dtype)
    assert_same(apply(f"bfe.{type_name}", a, b, c, out=dtype), expected, a, b, c, what="bfe")


def inserted(a: int, b: int, c: int, d: int, width: int) -> int:
    """The loop of the ISA's section on bfi."""
    position, length = c & 0xFF, d & 0xFF
    for i in range(length):
        if position + i < width:
            b = b & ~(1 << (position + i)) | (a >> i & 1) << (position + i)
    return b


@pytest.mark.parametrize("type_name", ["b32", "b64"])
def test_insert(type_name: str) -> None:
    dtype = DTYPES[type_name]
    inputs = fields(dtype, 2)
    values = [inserted(*one, bits(dtype)) for one in zip(*(array.tolist() for array in inputs), strict=True)]
    expected = np.array(values, dtype)
    assert_same(apply(f"bfi.{type_name}", *inputs, out=dtype), expected, *inputs, what="bfi")


@pytest.mark.parametrize("name", expand("clamp|wrap u32|s32"))
def test_extend(name: str) -> None:
    dtype = DTYPES[name.rpartition(".")[2]]
    (a, length) = (grid.reshape(-1) for grid in np.meshgrid(random(dtype, 50), AMOUNTS, indexing="ij"))
    count = exact(length) % 32
    full = (exact(length) >= 32) if ".clamp" in name else np.zeros(a.size, bool)
    low = exact(a) & ((1 << count) - 1)
    if dtype.kind == "i":
        low -= np.where(count > 0, low >> np.maximum(count - 1, 0) << np.maximum(count, 1), 0)
    expected = wrap(np.where(full, exact(a), low), dtype)
    assert_same(apply(f"szext{name}", a, length, out=dtype), expected, a, length, what=name)


@pytest.mark.parametrize("mode", ["clamp", "wrap"])
def test_mask(mode: str) -> None:
    a, b = (grid.reshape(-1) for grid in np.meshgrid(AMOUNTS, AMOUNTS, indexing="ij"))
    start, count = exact(a), exact(b)
    if mode == "wrap":
        start, count = start % 32, count % 32
    start, count = np.minimum(start, 32), np.minimum(count, 32)
    expected = wrap(((1 << count) - 1) << start, np.uint32)
    assert_same(apply(f"bmsk.{mode}.b32", a, b, out=np.uint32), expected, a, b, what=mode)


# ---- nothing left out ------------------------------------------------------------------------------------------------


def forms_with_a_test() -> set[str]:
    names = {f"{opcode}.{kind}" for opcode in (*BINARY, "not") for kind in (*WORDS, "pred")}
    names |= {f"cnot.{kind}" for kind in WORDS} | {"lop3" + one for one in expand("or|and? b32")} | set(SHIFTS)
    names |= {"shf" + one for one in expand("l|r clamp|wrap b32")} | {
        "prmt.b32",
        *(f"prmt.b32.{m}" for m in PERMUTATIONS),
    }
    names |= {opcode + kind for opcode in ("popc", "clz", "brev", "bfi") for kind in expand("b32|b64")}
    names |= {"bfind" + one for one in expand("shiftamt? u32|u64|s32|s64")} | {"fns.b32"}
    names |= {"bfe" + one for one in expand("u32|u64|s32|s64")} | {
        "szext" + one for one in expand("clamp|wrap u32|s32")
    }
    return names | {"bmsk" + one for one in expand("clamp|wrap b32")}


def test_every_form_is_tested() -> None:
    tested = forms_with_a_test()
    assert elementwise.supported({name.split(".")[0] for name in tested}) == tested


@pytest.mark.parametrize(
    "instruction",
    [
        *("and.u32 %d, %a, %a", "shl.s32 %d, %a, %a", "cnot.pred %p, %q", "lop3.b32 %d|%p, %a, %a, %a, 1"),
        *("lop3.or.b32 %d, %a, %a, %a, 1, %p", "lop3.or.b32 %d|_, %a, %a, %a, 1, %p", "lop3.b32 %d, %a, %a, %a, 256"),
        *("lop3.b32 _, %a, %a, %a, 1", "shf.l.b32 %d, %a, %a, %a", "bfe.b32 %d, %a, %a, %a", "popc.u32 %d, %a"),
        *("bmsk.b32 %d, %a, %a", "prmt.b32.f4e.b4e %d, %a, %a, %a", "lop3.b32 %d, %a, %a, %a, %a"),
    ],
)
def test_what_ptxas_refuses_is_refused(instruction: str) -> None:
    with pytest.raises(
        elementwise.ptx.PtxError, match="is not supported|are not supported together|expected a register"
    ):
        apply(instruction, np.zeros(1, np.uint32), out=np.uint32)
