"""setp, set, selp and slct of the PTX emulator, of integers and of floating-point numbers, against numpy."""

from __future__ import annotations

import itertools
from typing import Any

import elementwise
import numpy as np
import pytest
from elementwise import DTYPES, apply, assert_same, edges, expand, random, samples

Array = Any
SIGNED = ["eq", "ne", "lt", "le", "gt", "ge"]
UNSIGNED = [*SIGNED, "lo", "ls", "hi", "hs"]
FLOATING = [*SIGNED, "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"]
COMPARISONS = {
    **dict.fromkeys(["b16", "b32", "b64"], ["eq", "ne"]),
    **dict.fromkeys(["s16", "s32", "s64"], SIGNED),
    **dict.fromkeys(["u16", "u32", "u64"], UNSIGNED),
    **dict.fromkeys(["f16", "bf16", "f32", "f64", "f16x2", "bf16x2"], FLOATING),
}
BOOLEANS = {"": None, "and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
CAN_FLUSH = ["f16", "f16x2", "f32"]
SOURCES = [(kind, ftz) for kind in COMPARISONS for ftz in ("", ".ftz") if not ftz or kind in CAN_FLUSH]

BF16_EDGES = np.array(
    [0, 1, 0x7F, 0x80, 0x81, 0x3F7F, 0x3F80, 0x3F81, 0x7F7F, 0x7F80, 0x7F81, 0x7FC0, 0x7FFF], np.uint16
)


def inputs(kind: str) -> tuple[Array, Array]:
    """Pairs of numbers, many of them equal; bf16 as its bits."""
    if kind == "bf16":
        values = np.concatenate([BF16_EDGES, BF16_EDGES | 0x8000])
        a, b = (grid.reshape(-1) for grid in np.meshgrid(values, values, indexing="ij"))
        a, b = (np.concatenate([one, random(np.uint16, 500, seed)]) for seed, one in enumerate((a, b)))
    else:
        a, b = samples(DTYPES[kind], DTYPES[kind], count=500)
    b[-100::2] = a[-100::2]
    return a, b


def numbers(values: Array, kind: str, ftz: str) -> Array:
    """What the bits stand for."""
    if kind == "bf16":
        values = (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if ftz:
        values = np.where(np.abs(values) < np.finfo(values.dtype).tiny, values.dtype.type(0), values)
    return values


def holds(comparison: str, a: Array, b: Array) -> Array:
    """The ISA's tables of comparison operators."""
    if a.dtype.kind != "f":
        return {"eq": a == b, "ne": a != b, "lo": a < b, "ls": a <= b, "hi": a > b, "hs": a >= b}.get(
            comparison, {"lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}.get(comparison)
        )
    unordered = np.isnan(a) | np.isnan(b)
    if comparison in ("num", "nan"):
        return unordered == (comparison == "nan")
    ordered = {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}[comparison[:2]]
    return ordered | unordered if comparison.endswith("u") else ordered & ~unordered


def combined(truth: Array, boolean: str, c: Array) -> Array:
    function = BOOLEANS[boolean]
    return truth if function is None else function(truth, c)


def word(one: Array, other: Array) -> Array:
    """Two halves as one 32-bit word."""
    return one.view(np.uint16).astype(np.uint32) | other.view(np.uint16).astype(np.uint32) << np.uint32(16)


def pick(p: str, q: str, result: str) -> str:
    """Two predicates as a number."""
    return f"selp.u32 {result}, 1, 0, {p}; @{q} add.u32 {result}, {result}, 2"


# ---- setp ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("boolean", BOOLEANS)
@pytest.mark.parametrize(("kind", "ftz"), SOURCES, ids=[kind + ftz for kind, ftz in SOURCES])
def test_setp(kind: str, ftz: str, boolean: str) -> None:
    pair, scalar = kind.endswith("x2"), kind.removesuffix("x2")
    a, b = inputs(scalar)
    low, high = (a, b), (np.roll(a, 11), np.roll(b, 5))
    given = [word(one, other) for one, other in zip(low, high, strict=True)] if pair else list(low)
    truths = [
        [holds(name, *(numbers(one, scalar, ftz) for one in half)) for name in COMPARISONS[kind]]
        for half in (low, high)
    ]
    c = np.arange(a.size, dtype=np.uint32) % 3 % 2  # not in step with the values
    names = COMPARISONS[kind]
    for negated in ("", "!") if boolean else ("",):
        with_c = (c == 0) if negated else (c != 0)
        program = ["setp.ne.u32 %r, %c, 0"]
        for i, name in enumerate(names):
            opcode = ".".join(filter(None, ["setp", name, boolean, ftz[1:], kind]))
            results = "%p" if scalar in ("f16", "bf16") and not pair else "%p|%q"
            program.append("setp.ne.u32 %q, 0, 0")
            program.append(f"{opcode} {results}, %a, %b{f', {negated}%r' if boolean else ''}")
            program.append(pick("%p", "%q", f"%d{i}"))
        actual = apply("; ".join(program), *given, c, out=(np.uint32,) * len(names))
        for i, name in enumerate(names):
            p = combined(truths[0][i], boolean, with_c)
            if pair:
                q = combined(truths[1][i], boolean, with_c)
            elif scalar in ("f16", "bf16"):
                q = np.zeros_like(p)
            else:
                q = combined(~truths[0][i], boolean, with_c)
            assert_same(actual[i], (p + 2 * q).astype(np.uint32), *given, c, what=f"setp.{name}.{boolean}{ftz}.{kind}")


@pytest.mark.parametrize(
    ("results", "p_is_set", "q_is_set"), [("%p", True, False), ("%p|_", True, False), ("_|%q", False, True)]
)
def test_results_of_setp_that_are_left_out(results: str, p_is_set: bool, q_is_set: bool) -> None:
    a, b = samples(np.int32, np.int32)
    program = f"setp.eq.s32 %p, 0, 1; setp.eq.s32 %q, 0, 1; setp.lt.s32 {results}, %a, %b; {pick('%p', '%q', '%d')}"
    expected = ((a < b) & p_is_set) + 2 * ((a >= b) & q_is_set)
    assert_same(apply(program, a, b, out=np.uint32), expected.astype(np.uint32), a, b)


@pytest.mark.parametrize("block", [32, 33])
def test_setp_writes_only_lanes_that_execute_it(block: int) -> None:
    a, b = samples(np.int32, np.int32, count=300)
    program = "setp.lt.s32 %p, %a, 0; setp.lt.s32 %q, %b, 0; @%q setp.ge.and.s32 %p|%q, %a, %b, %p;" + pick(
        "%p", "%q", "%d"
    )
    p, q = a < 0, b < 0
    expected = np.where(q, (a >= b) & p, p) + 2 * np.where(q, (a < b) & p, q)
    assert_same(apply(program, a, b, out=np.uint32, block=block), expected.astype(np.uint32), a, b)


def test_an_operand_may_be_a_constant() -> None:
    a = edges(np.float32)
    for text, value in [("0f80000000", -0.0), ("1.5", 1.5), ("0f7fc00000", np.nan), ("0f00000001", 1e-45)]:
        program = f"setp.geu.f32 %p, %a, {text}; selp.u32 %d, 1, 0, %p"
        expected = ~(a < np.float32(value))
        assert_same(apply(program, a, out=np.uint32), expected.astype(np.uint32), a, what=text)


# ---- set -------------------------------------------------------------------------------------------------------------

INTEGERS = [kind for kind in COMPARISONS if kind[0] in "bsu" and not kind.startswith("bf")]
# By the types of the sources: those of the result, without .ftz and with it.
SET: dict[str, tuple[list[str], list[str]]] = {
    **dict.fromkeys([*INTEGERS, "f64"], (["u32", "s32", "f32", "f16", "bf16"], [])),
    "f32": (["u32", "s32", "f32", "f16", "bf16"], ["u32", "s32", "f32", "f16"]),
    "f16": (["u16", "s16", "u32", "s32", "f16", "bf16"], ["u16", "s16", "u32", "s32", "f16"]),
    "bf16": (["u16", "s16", "u32", "s32", "bf16"], []),
    "f16x2": (["u32", "s32", "f16x2"], ["u32", "s32", "f16x2"]),
    "bf16x2": (["u32", "s32", "bf16x2"], []),
}
ONES = {"u16": 0xFFFF, "u32": 0xFFFFFFFF, "f32": 0x3F800000, "f16": 0x3C00, "bf16": 0x3F80}
SET_CASES = [(kind, ftz, to) for kind, ftz in SOURCES for to in SET[kind][bool(ftz)]]


@pytest.mark.parametrize(("kind", "ftz", "to"), SET_CASES, ids=[f"{to}-{kind}{ftz}" for kind, ftz, to in SET_CASES])
def test_set(kind: str, ftz: str, to: str) -> None:
    pair, scalar = kind.endswith("x2"), kind.removesuffix("x2")
    a, b = inputs(scalar)
    low, high = (a, b), (np.roll(a, 11), np.roll(b, 5))
    given = [word(one, other) for one, other in zip(low, high, strict=True)] if pair else list(low)
    names = COMPARISONS[kind]
    c = np.arange(a.size, dtype=np.uint32) % 3 % 2
    out = np.dtype(f"uint{8 * DTYPES[to].itemsize}")
    one = out.type(ONES[to.removesuffix("x2").replace("s", "u")] & (0xFFFF if pair else 0xFFFFFFFF))
    truths = [[holds(name, *(numbers(one, scalar, ftz) for one in half)) for name in names] for half in (low, high)]
    for boolean in BOOLEANS:
        program = ["setp.ne.u32 %r, %c, 0"]
        for i, name in enumerate(names):
            opcode = ".".join(filter(None, ["set", name, boolean, ftz[1:], to, kind]))
            program.append(f"{opcode} %d{i}, %a, %b{', !%r' if boolean else ''}")
        actual = apply("; ".join(program), *given, c, out=(out,) * len(names))
        for i, name in enumerate(names):
            expected = np.where(combined(truths[0][i], boolean, c == 0), one, out.type(0))
            if pair:
                expected |= np.where(combined(truths[1][i], boolean, c == 0), one, out.type(0)) << np.uint32(16)
            assert_same(actual[i], expected, *given, c, what=f"set.{name}.{boolean}{ftz}.{to}.{kind}")


# ---- selp, slct ------------------------------------------------------------------------------------------------------

SELECTED = [*INTEGERS, "f32", "f64"]


@pytest.mark.parametrize("kind", SELECTED)
def test_selp(kind: str) -> None:
    dtype = np.dtype(f"uint{8 * DTYPES[kind].itemsize}")
    a, b = (random(dtype, 1000, seed) for seed in range(2))
    c = random(np.uint32, 1000) & 1
    for negated in ("", "!"):
        program = f"setp.ne.u32 %p, %c, 0; selp.{kind} %d, %a, %b, {negated}%p"
        assert_same(apply(program, a, b, c, out=dtype), np.where((c == 0) == bool(negated), a, b), a, b, c, what=kind)


@pytest.mark.parametrize("by", [".s32", ".f32", ".ftz.f32"])
@pytest.mark.parametrize("kind", SELECTED)
def test_slct(kind: str, by: str) -> None:
    dtype = np.dtype(f"uint{8 * DTYPES[kind].itemsize}")
    c = np.concatenate([edges(DTYPES[by[-3:]]), random(DTYPES[by[-3:]], 300)])
    a, b = (random(dtype, c.size, seed) for seed in range(2))
    name = f"slct.ftz.{kind}.f32" if "ftz" in by else f"slct.{kind}{by}"
    expected = np.where(numbers(c, by[-3:], "ftz" if "ftz" in by else "") >= 0, a, b)
    assert_same(apply(name, a, b, c, out=dtype), expected, a, b, c, what=name)


# ---- nothing left out ------------------------------------------------------------------------------------------------


def forms_with_a_test() -> set[str]:
    def compared(opcode: str, types: str, ftz: str, kind: str) -> set[str]:
        return {
            f"{opcode}.{name}{boolean and '.' + boolean}{ftz}{types}"
            for name, boolean in itertools.product(COMPARISONS[kind], BOOLEANS)
        }

    names = set().union(*(compared("setp", f".{kind}", ftz, kind) for kind, ftz in SOURCES))
    names = names.union(*(compared("set", f".{to}.{kind}", ftz, kind) for kind, ftz, to in SET_CASES))
    names |= {f"selp.{kind}" for kind in SELECTED} | {f"slct.{kind}.s32" for kind in SELECTED}
    return names | {f"slct{ftz}.{kind}.f32" for kind in SELECTED for ftz in ("", ".ftz")}


def test_every_form_is_tested() -> None:
    assert elementwise.supported({"setp", "set", "selp", "slct"}) == forms_with_a_test()


@pytest.mark.parametrize(
    "instruction",
    [
        *("setp.lt.b32 %p, %a, %a", "setp.lo.s32 %p, %a, %a", "setp.ltu.s32 %p, %a, %a", "setp.nan.u32 %p, %a, %a"),
        *(
            "setp.lt.ftz.f64 %p, %e, %e",
            "setp.lt.ftz.bf16 %p, %b, %b",
            "setp.lt.f16 %p|%q, %b, %b",
            "setp.eq.ftz.u32 %p, %a, %a",
        ),
        *(
            "setp.eq.s32 %p, %a, %a, %q",
            "setp.eq.and.s32 %p, %a, %a",
            "set.eq.f64.f64 %e, %e, %e",
            "set.eq.u16.s32 %b, %a, %a",
        ),
        *("set.eq.f32.f16 %a, %b, %b", "set.eq.ftz.bf16.f32 %b, %a, %a", "set.eq.f16x2.bf16x2 %a, %a, %a"),
        *("slct.ftz.b32.s32 %a, %a, %a, %a", "slct.b32.u32 %a, %a, %a, %a", "selp.f16 %b, %b, %b, %p"),
        *("setp.eq.and.or.s32 %p, %a, %a, %q", "setp.and.s32 %p, %a, %a, %q", "set.lo.u32.s32 %a, %a, %a"),
    ],
)
def test_what_ptxas_refuses_is_refused(instruction: str) -> None:
    with pytest.raises(elementwise.ptx.PtxError, match="is not supported|are not supported together"):
        apply(f"mov.u32 %d, %a; {instruction}", *(np.zeros(1, t) for t in ("u4", "u2", "u4", "u8")), out=np.uint32)


def test_modifiers_come_in_any_order() -> None:
    for name in expand("ftz.lt|lt.ftz f32"):
        assert apply(f"setp{name} %p, %a, 0f00000001; selp.u32 %d, 1, 0, %p", np.float32([0]), out=np.uint32)[0] == 0
