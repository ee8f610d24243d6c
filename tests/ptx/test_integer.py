"""Integer arithmetic of the PTX emulator against Python's integers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import elementwise
import numpy as np
import pytest
from elementwise import DTYPES, apply, assert_same, every, exact, expand, samples, wrap

U16_TO_S64 = "u16|u32|u64|s16|s32|s64"
Ints = Any  # arrays of Python's integers


def bits(dtype: Any) -> int:
    return 8 * np.dtype(dtype).itemsize


def clamp(values: Ints, dtype: Any) -> Ints:
    info = np.iinfo(dtype)
    return np.minimum(np.maximum(values, int(info.min)), int(info.max))


def truncated_division(a: Ints, b: Ints) -> tuple[Ints, Ints]:
    """Quotients and remainders as C's; the quotient by 0 is -1, of which the remainder is the dividend."""
    divisor = np.where(b == 0, 1, b)
    quotient = abs(a) // abs(divisor) * np.where((a < 0) == (divisor < 0), 1, -1)
    return np.where(b == 0, -1, quotient), np.where(b == 0, a, a - quotient * divisor)


def low24(values: Ints, dtype: Any) -> Ints:
    low = values & 0xFFFFFF
    return low - (low >> 23 << 24) if np.dtype(dtype).kind == "i" else low


# Opcode, modifiers (see elementwise.expand), number of operands; the exact result of Python's integers, given the type.
# It is then cut to the type of the result.
Oracle = Callable[..., Ints]
UNIFORM: list[tuple[str, str, Oracle]] = [
    ("add", U16_TO_S64, lambda t, a, b: a + b),
    ("add", "sat s32", lambda t, a, b: clamp(a + b, t)),
    ("sub", U16_TO_S64, lambda t, a, b: a - b),
    ("sub", "sat s32", lambda t, a, b: clamp(a - b, t)),
    ("mul", f"lo {U16_TO_S64}", lambda t, a, b: a * b),
    ("mul", f"hi {U16_TO_S64}", lambda t, a, b: a * b >> bits(t)),
    ("mad", f"lo {U16_TO_S64}", lambda t, a, b, c: a * b + c),
    ("mad", f"hi {U16_TO_S64}", lambda t, a, b, c: (a * b >> bits(t)) + c),
    ("mad", "hi sat s32", lambda t, a, b, c: clamp((a * b >> 32) + c, t)),
    ("mul24", "lo u32|s32", lambda t, a, b: low24(a, t) * low24(b, t)),
    ("mul24", "hi u32|s32", lambda t, a, b: low24(a, t) * low24(b, t) >> 16),
    ("mad24", "lo u32|s32", lambda t, a, b, c: low24(a, t) * low24(b, t) + c),
    ("mad24", "hi u32|s32", lambda t, a, b, c: (low24(a, t) * low24(b, t) >> 16) + c),
    ("mad24", "hi sat s32", lambda t, a, b, c: clamp((low24(a, t) * low24(b, t) >> 16) + c, t)),
    ("sad", U16_TO_S64, lambda t, a, b, c: c + abs(a - b)),
    ("div", U16_TO_S64, lambda t, a, b: truncated_division(a, b)[0]),
    ("rem", U16_TO_S64, lambda t, a, b: truncated_division(a, b)[1]),
    ("abs", "s16|s32|s64", lambda t, a: abs(a)),
    ("neg", "s16|s32|s64", lambda t, a: -a),
    ("min", U16_TO_S64, lambda t, a, b: np.minimum(a, b)),
    ("min", "relu s32", lambda t, a, b: np.maximum(np.minimum(a, b), 0)),
    ("max", U16_TO_S64, lambda t, a, b: np.maximum(a, b)),
    ("max", "relu s32", lambda t, a, b: np.maximum(np.maximum(a, b), 0)),
]
CASES = [(opcode + name, oracle) for opcode, modifiers, oracle in UNIFORM for name in expand(modifiers)]


def operands_of(oracle: Oracle) -> int:
    return oracle.__code__.co_argcount - 1


@pytest.mark.parametrize(("name", "oracle"), CASES, ids=[name for name, _ in CASES])
def test_arithmetic(name: str, oracle: Oracle) -> None:
    dtype = DTYPES[name.rpartition(".")[2]]
    count = operands_of(oracle)
    if bits(dtype) == 16 and count == 1:
        inputs = [every(dtype)]
    else:
        inputs = samples(*[dtype] * count, count=2**16 if bits(dtype) == 16 and count == 2 else 4096)
    expected = wrap(oracle(dtype, *map(exact, inputs)), dtype)
    assert_same(apply(name, *inputs, out=dtype), expected, *inputs, what=name)


@pytest.mark.parametrize("type_name", ["u16", "s16", "u32", "s32"])
def test_wide_products(type_name: str) -> None:
    dtype, twice = DTYPES[type_name], DTYPES[type_name[0] + str(2 * int(type_name[1:]))]
    a, b, c = samples(dtype, dtype, twice, count=4096)
    product = exact(a) * exact(b)
    assert_same(apply(f"mul.wide.{type_name}", a, b, out=twice), wrap(product, twice), a, b, what="mul.wide")
    expected = wrap(product + exact(c), twice)
    assert_same(apply(f"mad.wide.{type_name}", a, b, c, out=twice), expected, a, b, c, what="mad.wide")


# ---- pairs and dot products ------------------------------------------------------------------------------------------

PAIRS: list[tuple[str, str, Oracle]] = [
    ("add", "u16x2|s16x2", lambda a, b: a + b),
    ("min", "u16x2|s16x2", np.minimum),
    ("min", "relu s16x2", lambda a, b: np.maximum(np.minimum(a, b), 0)),
    ("max", "u16x2|s16x2", np.maximum),
    ("max", "relu s16x2", lambda a, b: np.maximum(np.maximum(a, b), 0)),
]
PAIR_CASES = [(opcode + name, oracle) for opcode, modifiers, oracle in PAIRS for name in expand(modifiers)]


@pytest.mark.parametrize(("name", "oracle"), PAIR_CASES, ids=[name for name, _ in PAIR_CASES])
def test_pairs(name: str, oracle: Oracle) -> None:
    half = np.dtype(np.int16 if ".s16x2" in name else np.uint16)
    a, b = samples(half, half, count=2**14)
    a, b = a[: a.size // 2 * 2], b[: b.size // 2 * 2]
    expected = wrap(oracle(exact(a), exact(b)), half).view(np.uint32)
    assert_same(apply(name, a.view(np.uint32), b.view(np.uint32), out=np.uint32), expected, what=name)


def test_modifiers_come_in_any_order() -> None:
    a = np.array([0x0001FFFF], np.uint32)
    assert apply("min.s16x2.relu", a, a, out=np.uint32)[0] == 0x00010000


@pytest.mark.parametrize("name", [f"dp{n}" for n in expand("u32|s32 u32|s32")])
@pytest.mark.parametrize("shape", ["dp4a", "dp2a.lo", "dp2a.hi"])
def test_dot_products(shape: str, name: str) -> None:
    a_type, b_type = name.removeprefix("dp.").split(".")
    a, b, c = samples(np.uint32, np.uint32, np.uint32, count=4096)
    width = 8 if shape == "dp4a" else 16
    a_parts = exact(a.view(f"{'int' if a_type == 's32' else 'uint'}{width}")).reshape(a.size, -1)
    b_parts = exact(b.view("int8" if b_type == "s32" else "uint8")).reshape(b.size, -1)
    if shape != "dp4a":
        b_parts = b_parts[:, 2:] if shape == "dp2a.hi" else b_parts[:, :2]
    expected = wrap(exact(c) + (a_parts * b_parts).sum(1), np.uint32)
    opcode = f"{shape}.{a_type}.{b_type}"
    assert_same(apply(opcode, a, b, c, out=np.uint32), expected, a, b, c, what=opcode)


# ---- carries ---------------------------------------------------------------------------------------------------------

CARRY_TYPES = ["u32", "s32", "u64", "s64"]
CARRY_CASES = [
    *(f"{opcode}{cc}" for opcode in ("add", "addc", "sub", "subc") for cc in ("", ".cc")),
    *(f"{opcode}.{half}{cc}" for opcode in ("mad", "madc") for half in ("lo", "hi") for cc in ("", ".cc")),
]


def carry_program(opcode: str, type_name: str, operands: str) -> str:
    """Sets the flag where %f is not 0, executes the instruction, and puts the flag in %d1."""
    if opcode.startswith("sub"):  # a borrow, told by 0 - 0 - borrow
        setup, read = "sub.cc.u32 %d1, 0, %f", "subc.u32 %d1, 0, 0; neg.s32 %d1, %d1"
    else:
        setup, read = "add.cc.u32 %d1, %f, 0xffffffff", "addc.u32 %d1, 0, 0"
    return f"{setup}; {opcode}.{type_name} {operands}; {read}"


def carry_oracle(opcode: str, dtype: Any, a: Ints, b: Ints, c: Ints, flag: Ints) -> tuple[Ints, Ints]:
    """The sum before it is cut to the type, and the flag afterwards."""
    full = 2 ** bits(dtype)
    carry = flag if opcode.split(".")[0].endswith("c") else 0 * flag
    if opcode.startswith("sub"):
        total = a - (b + carry)
        after = ((a % full) - (b % full) - carry < 0).astype(object)
    else:
        if opcode.startswith("mad"):
            a, b = (a * b >> bits(dtype) if ".hi" in opcode else a * b), c
        total = a + b + carry
        after = (a % full) + (b % full) + carry >> bits(dtype)
    return total, (after if opcode.endswith(".cc") else flag)


@pytest.mark.parametrize("type_name", CARRY_TYPES)
@pytest.mark.parametrize("opcode", CARRY_CASES)
def test_carries(opcode: str, type_name: str) -> None:
    dtype = DTYPES[type_name]
    a, b, c, flag = samples(dtype, dtype, dtype, np.uint32)
    flag &= 1
    operands = "%d0, %a, %b, %c" if opcode.startswith("mad") else "%d0, %a, %b"
    # %e is the fourth input's name, so the flag comes fourth and is copied to %f.
    program = "mov.u32 %f, %e; " + carry_program(opcode, type_name, operands)
    result, after = apply(program, a, b, c, flag, out=(dtype, np.uint32), registers=".reg .b32 %f;")
    total, expected_flag = carry_oracle(opcode, dtype, *map(exact, (a, b, c, flag)))
    assert_same(result, wrap(total, dtype), a, b, c, flag, what=opcode)
    assert_same(after, wrap(expected_flag, np.uint32), a, b, c, flag, what=f"the flag after {opcode}")


def test_the_carry_belongs_to_the_lane() -> None:
    """Only lanes whose guard is true write it."""
    a, guard = samples(np.uint32, np.uint32, count=500)
    program = (
        "setp.lt.s32 %p, %b, 0; add.cc.u32 %d, %a, 1; @%p add.cc.u32 %d, %a, 0x80000000; "
        "@%p bra L; sub.u32 %d, %d, %d; L: addc.u32 %d, 0, 0"
    )
    expected = np.where(guard.view(np.int32) < 0, a >= 2**31, a == 2**32 - 1).astype(np.uint32)
    assert_same(apply(program, a, guard, out=np.uint32), expected, a, guard)


def test_a_product_of_128_bits() -> None:
    """The example of the ISA's section on madc."""
    a, b = samples(np.uint64, np.uint64, count=5000)
    program = """
        mov.b64 {%r4, %r5}, %a; mov.b64 {%r6, %r7}, %b;
        mul.lo.u32 %r0, %r4, %r6; mul.hi.u32 %r1, %r4, %r6; mad.lo.cc.u32 %r1, %r5, %r6, %r1;
        madc.hi.u32 %r2, %r5, %r6, 0; mad.lo.cc.u32 %r1, %r4, %r7, %r1; madc.hi.cc.u32 %r2, %r4, %r7, %r2;
        addc.u32 %r3, 0, 0; mad.lo.cc.u32 %r2, %r5, %r7, %r2; madc.hi.u32 %r3, %r5, %r7, %r3;
        mov.b64 %d0, {%r0, %r1}; mov.b64 %d1, {%r2, %r3}"""
    low, high = apply(program, a, b, out=(np.uint64, np.uint64), registers=".reg .b32 %r<8>;")
    product = exact(a) * exact(b)
    assert_same(low, wrap(product, np.uint64), a, b)
    assert_same(high, wrap(product >> 64, np.uint64), a, b)


# ---- who executes, and operands that are no registers ----------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 31, 32, 33, 64])
@pytest.mark.parametrize("type_name", ["s16", "s32", "s64"])
def test_guards_and_partial_warps(type_name: str, block: int) -> None:
    dtype = DTYPES[type_name]
    a, b, condition = samples(dtype, dtype, np.uint32, count=100)
    program = f"setp.ne.u32 %p, %c, 0; mov.b{bits(dtype)} %d, %a; @%p sub.{type_name} %d, %d, %b"
    odd = condition & 1
    expected = np.where(odd != 0, wrap(exact(a) - exact(b), dtype), a)
    assert_same(apply(program, a, b, odd, out=dtype, block=block), expected, a, b, odd)
    negated = program.replace("@%p", "@!%p")
    expected = np.where(odd == 0, wrap(exact(a) - exact(b), dtype), a)
    assert_same(apply(negated, a, b, odd, out=dtype, block=block), expected, a, b, odd)


def test_the_result_may_be_an_operand() -> None:
    a, b = samples(np.int64, np.int64)
    assert_same(
        apply("mad.lo.s64 %a, %a, %b, %a; mov.b64 %d, %a", a, b, out=np.int64), wrap(exact(a) * (exact(b) + 1), "i8")
    )


@pytest.mark.parametrize(("operand", "value"), [("-7", -7), ("0x7fffffff", 2**31 - 1), ("4294967295U", -1)])
def test_immediates(operand: str, value: int) -> None:
    (a,) = samples(np.int32)
    assert_same(apply(f"sub.s32 %d, {operand}, %a", a, out=np.int32), wrap(value - exact(a), np.int32), a)
    assert_same(apply(f"mul.hi.s32 %d, %a, {operand}", a, out=np.int32), wrap(exact(a) * value >> 32, np.int32), a)


# ---- nothing left out ------------------------------------------------------------------------------------------------


def integer_forms() -> set[str]:
    opcodes = {opcode for opcode, _, _ in UNIFORM} | {"addc", "subc", "madc", "dp4a", "dp2a"}
    types = {*U16_TO_S64.split("|"), "u16x2", "s16x2"}
    return {name for name in elementwise.supported(opcodes) if name.rpartition(".")[2] in types}


def forms_with_a_test() -> set[str]:
    names = {name for name, _ in CASES} | {name for name, _ in PAIR_CASES}
    names |= {f"{opcode}.wide.{kind}" for opcode in ("mul", "mad") for kind in ("u16", "s16", "u32", "s32")}
    names |= {shape + kinds for shape in ("dp4a", "dp2a.lo", "dp2a.hi") for kinds in expand("u32|s32 u32|s32")}
    return names | {f"{opcode}.{kind}" for opcode, kind in itertools.product(CARRY_CASES, CARRY_TYPES)}


def test_every_form_is_tested() -> None:
    assert integer_forms() == forms_with_a_test()


@pytest.mark.parametrize(
    "instruction",
    [
        *("sub.u16x2 %d, %a, %a", "add.sat.u32 %d, %a, %a", "mad.lo.sat.s32 %d, %a, %a, %a", "mul.s32 %d, %a, %a"),
        *("max.relu.u32 %d, %a, %a", "abs.u32 %d, %a", "mad24.lo.sat.s32 %d, %a, %a, %a", "add.b32 %d, %a, %a"),
        *("add.cc.sat.s32 %d, %a, %a", "mul.wide.u64 %d, %a, %a", "add.u8 %d, %a, %a", "neg.u32 %d, %a"),
    ],
)
def test_what_ptxas_refuses_is_refused(instruction: str) -> None:
    with pytest.raises(elementwise.ptx.PtxError, match="is not supported|are not supported together"):
        apply(instruction, np.zeros(1, np.uint32), out=np.uint32)
