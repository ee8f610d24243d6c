"""f32 and f64 of the PTX emulator against exact fractions, numpy, and for approximations the ISA's bounds."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import elementwise
import numpy as np
import pytest
from elementwise import apply, expand
from floats import FORMATS, OPERANDS, assert_codes, bits_of, decode, encode, flush, result_of, samples

Array = np.ndarray[Any, Any]
ROUNDINGS = "rn|rz|rm|rp"
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")
TYPES = {"f32": np.float32, "f64": np.float64, "f16": np.float16, "bf16": np.uint16}


def arrays(columns: list[list[int]], kinds: list[str]) -> list[Array]:
    return [np.array(column, f"uint{FORMATS[kind].bits}") for column, kind in zip(columns, kinds, strict=True)]


@functools.cache
def inputs(kinds: tuple[str, ...]) -> list[list[int]]:
    return samples([FORMATS[kind] for kind in kinds], 300)


# ---- rounded arithmetic ----------------------------------------------------------------------------------------------

F32_ROWS = [
    ("add", f"{ROUNDINGS}? ftz? sat? f32"),
    ("sub", f"{ROUNDINGS}? ftz? sat? f32"),
    ("mul", f"{ROUNDINGS}? ftz? sat? f32"),
    ("fma", f"{ROUNDINGS} ftz? sat? f32"),
    ("mad", f"{ROUNDINGS} ftz? sat? f32"),
    ("div", f"{ROUNDINGS} ftz? f32"),
    ("rcp", f"{ROUNDINGS} ftz? f32"),
    ("sqrt", f"{ROUNDINGS} ftz? f32"),
]
F64_ROWS = [(opcode, f"{ROUNDINGS}{'?' * (opcode in ('add', 'sub', 'mul'))} f64") for opcode in OPERANDS]
PAIR_ROWS = [(opcode, f"{ROUNDINGS}{'?' * (opcode != 'fma')} ftz? f32x2") for opcode in ("add", "sub", "mul", "fma")]
MIXED_ROWS = [(opcode, f"{ROUNDINGS}{'?' * (opcode != 'fma')} sat? f32 f16|bf16") for opcode in ("add", "sub", "fma")]


def names(rows: list[tuple[str, str]]) -> list[str]:
    return [opcode + modifiers for opcode, row in rows for modifiers in expand(row)]


@pytest.mark.parametrize("name", names(F32_ROWS) + names(F64_ROWS))
def test_arithmetic(name: str) -> None:
    opcode, *modifiers = name.split(".")
    form = FORMATS[modifiers[-1]]
    columns = inputs((modifiers[-1],) * OPERANDS[opcode])
    expected = [result_of(opcode, modifiers, codes, [form] * len(codes), form) for codes in zip(*columns, strict=True)]
    given = arrays(columns, [modifiers[-1]] * len(columns))
    got = apply(name, *given, out=given[0].dtype)
    assert_codes(got, expected, columns, any_nan=form if form.bits == 64 else None)


@pytest.mark.parametrize("name", names(PAIR_ROWS))
def test_pairs_are_two_singles(name: str) -> None:
    given = [np.array(column, np.uint32) for column in inputs(("f32",) * OPERANDS[name.split(".")[0]])]
    packed = [one.astype(np.uint64) | np.roll(one, 1).astype(np.uint64) << np.uint64(32) for one in given]
    got = apply(name, *packed, out=np.uint64, target="sm_100")
    single = apply(name.replace("f32x2", "f32"), *given, out=np.uint32)
    assert (got.astype(np.uint32) == single).all()
    assert (got >> np.uint64(32) == np.roll(single, 1)).all()


@pytest.mark.parametrize("name", names(MIXED_ROWS))
def test_mixed_precision(name: str) -> None:
    opcode, *modifiers = name.split(".")
    kinds = [modifiers[-1]] * (OPERANDS[opcode] - 1) + ["f32"]
    forms = [FORMATS[kind] for kind in kinds]
    columns = inputs(tuple(kinds))
    expected = [result_of(opcode, modifiers, codes, forms, FORMATS["f32"]) for codes in zip(*columns, strict=True)]
    assert_codes(apply(name, *arrays(columns, kinds), out=np.uint32, target="sm_100"), expected, columns)


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_numpy_agrees(kind: str) -> None:
    """On many random numbers, with an oracle that is not ours."""
    a, b = (elementwise.random(TYPES[kind], 20000, seed) for seed in (1, 2))
    with np.errstate(all="ignore"):
        b = np.where(np.arange(b.size) % 2 == 0, b, a * TYPES[kind](0.7))
        cases = {"add": a + b, "sub": a - b, "mul": a * b, "div.rn": a / b}
        for name, expected in cases.items():
            got = apply(f"{name}.{kind}", a, b, out=a.dtype)
            same = (bits_of(got) == bits_of(expected)) | (np.isnan(got) & np.isnan(expected))
            assert same.all(), name
            if kind == "f32":
                assert (bits_of(got)[np.isnan(got)] == 0x7FFFFFFF).all()
        got = apply(f"sqrt.rn.{kind}", abs(a), out=a.dtype)
        assert ((got == np.sqrt(abs(a))) | np.isnan(a)).all()


def test_lanes_that_are_off_keep_their_values() -> None:
    a = np.arange(64, dtype=np.float32)
    for instruction in ("fma.rn.f32 %d, %a, %a, %a", "add.f32 %d, %a, %a", "fma.rz.ftz.f32 %d, %a, %a, %a"):
        text = f"mov.b32 %d, 7; and.b32 %x, %index, 3; setp.eq.u32 %p, %x, 1; @%p {instruction}"
        got = apply(text, a, out=np.uint32, registers=".reg .b32 %x;")
        on = np.arange(64) % 4 == 1
        assert (got[~on] == 7).all()
        expected = a + a if instruction.startswith("add") else a * a + a
        assert (got.view(np.float32)[on] == expected[on]).all()


# ---- signs, min, max, testp ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*expand("abs|neg ftz? f32"), *expand("abs|neg f64")])
def test_signs(name: str) -> None:
    name = name[1:]
    opcode, *modifiers = name.split(".")
    form = FORMATS[modifiers[-1]]
    (column,) = inputs((modifiers[-1],))
    expected = []
    for code in column:
        number = flush(decode(code, form), form) if "ftz" in modifiers else decode(code, form)
        number = -number if opcode == "neg" or number.negative else number
        expected.append(code if name == "abs.f64" and number.kind == "nan" else encode(number, form))
    (given,) = arrays([column], [modifiers[-1]])
    any_nan = form if name == "neg.f64" else None
    assert_codes(apply(name, given, out=given.dtype), expected, [column], any_nan=any_nan)


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_copysign(kind: str) -> None:
    columns = inputs((kind, kind))
    given = arrays(columns, [kind, kind])
    top = 1 << (FORMATS[kind].bits - 1)
    expected = [(a & top) | (b & (top - 1)) for a, b in zip(*columns, strict=True)]
    assert_codes(apply(f"copysign.{kind}", *given, out=given[0].dtype), expected, columns)


EXTREMA = [("min|max ftz? NaN? f32", 2), ("min|max ftz? NaN? xorsign abs f32", 2), ("min|max ftz? NaN? abs? f32", 3)]
EXTREMUM_CASES = [(name[1:], count) for row, count in [*EXTREMA, ("min|max f64", 2)] for name in expand(row)]


@pytest.mark.parametrize(("name", "count"), EXTREMUM_CASES)
def test_extrema(name: str, count: int) -> None:
    opcode, *modifiers = name.split(".")
    form = FORMATS[modifiers[-1]]
    columns = inputs((modifiers[-1],) * count)

    def expected(*codes: int) -> int:
        numbers = [decode(code, form) for code in codes]
        if "ftz" in modifiers:
            numbers = [flush(number, form) for number in numbers]
        odd = sum(code >> (form.bits - 1) for code in codes) % 2 == 1  # of NaN as well
        if "abs" in modifiers:
            numbers = [-number if number.negative else number for number in numbers]
        real = [number for number in numbers if number.kind != "nan"]
        if not real or ("NaN" in modifiers and len(real) < len(numbers)):
            return form.ones

        def order(number: Any) -> tuple[float, Any, bool]:
            infinite = number.kind == "inf" and (-1 if number.negative else 1)
            return (infinite or 0, number.value, not number.negative)

        best = encode((min if opcode == "min" else max)(real, key=order), form)
        return (best & form.ones) | odd << (form.bits - 1) if "xorsign" in modifiers else best

    given = arrays(columns, [modifiers[-1]] * count)
    wanted = [expected(*codes) for codes in zip(*columns, strict=True)]
    got = apply(name, *given, out=given[0].dtype, target="sm_100")
    assert_codes(got, wanted, columns, any_nan=form if form.bits == 64 else None)


TESTS: dict[str, Callable[[Array, Array], Array]] = {
    "finite": lambda x, tiny: np.isfinite(x),
    "infinite": lambda x, tiny: np.isinf(x),
    "number": lambda x, tiny: ~np.isnan(x),
    "notanumber": lambda x, tiny: np.isnan(x),
    "normal": lambda x, tiny: np.isfinite(x) & (tiny | (x == 0)),  # zeros are normal: PTX ISA, testp
    "subnormal": lambda x, tiny: np.isfinite(x) & ~tiny & (x != 0),
}


@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("test", list(TESTS))
def test_testp(test: str, kind: str) -> None:
    (given,) = arrays(inputs((kind,)), [kind])
    x = given.view(TYPES[kind])
    got = apply(f"testp.{test}.{kind} %p, %a; selp.u32 %d, 1, 0, %p", given, out=np.uint32)
    assert (got == TESTS[test](x, abs(x) >= np.finfo(x.dtype).tiny)).all()


# ---- approximations --------------------------------------------------------------------------------------------------


def ulp(values: Array) -> Array:
    """Of f32, at values given as f64."""
    exponents = np.frexp(np.where(np.isfinite(values), values, 1.0))[1] - 1
    return np.ldexp(1.0, np.maximum(exponents, -126) - 23)


def relative(bound: float) -> Callable[[Array, Array], Array]:
    return lambda x, y: bound * abs(y)


def whole_range(dtype: Any = np.float32) -> Array:
    """Every sign, exponent, and both ends and some random mantissas of each."""
    bits = 8 * np.dtype(dtype).itemsize
    digits = {32: 23, 64: 52}[bits]
    upper = np.arange(2 ** (bits - digits), dtype=f"uint{bits}") << np.array(digits, f"uint{bits}")
    ends = np.array([0, 1, 2**digits - 1, 2 ** (digits - 1)], upper.dtype)
    more = np.random.default_rng(3).integers(0, 2**digits, 12).astype(upper.dtype)
    return (upper[:, None] | np.concatenate([ends, more])[None, :]).reshape(-1).view(dtype)


# Function of f64, and the absolute error that the ISA allows where it says something: of the operand and the result.
Bound = Callable[[Array, Array], Array]
TURN = 2 * math.pi


def sine_bound(x: Array, y: Array) -> Array:
    return np.where(abs(x) <= TURN, 2**-20.5, np.where(abs(x) <= 50 * TURN, 2**-14.7, np.inf))


def logarithm_bound(x: Array, y: Array) -> Array:
    return np.where((x > 0.5) & (x < 2), 2**-22, abs(y) * 2**-22)


APPROXIMATE: dict[str, tuple[Callable[[Array], Array], Bound]] = {
    "ex2": (np.exp2, lambda x, y: 2.5 * ulp(y)),  # 2 ulp from the correctly rounded result, which is off by half
    "lg2": (np.log2, logarithm_bound),
    "sin": (np.sin, sine_bound),
    "cos": (np.cos, sine_bound),
    "tanh": (np.tanh, relative(2**-11)),
    "rsqrt": (lambda x: 1 / np.sqrt(x), relative(2**-22.9)),
    "rcp": (lambda x: 1 / x, lambda x, y: ulp(y)),
    "sqrt": (np.sqrt, relative(2**-23)),
}
APPROXIMATE_NAMES = [f"{opcode}.approx{ftz}.f32" for opcode in APPROXIMATE for ftz in ("", ".ftz")]
APPROXIMATE_NAMES.remove("tanh.approx.ftz.f32")


@pytest.mark.parametrize("name", APPROXIMATE_NAMES)
def test_approximations_are_within_the_bounds(name: str) -> None:
    function, bound = APPROXIMATE[name.split(".")[0]]
    a = whole_range()
    if name.startswith(("sin", "cos")):
        a = np.concatenate([a, np.linspace(-400, 400, 20000, dtype=np.float32)])
    got = apply(name, a, out=np.float32)
    x = a.astype(np.float64)
    tiny = np.finfo(np.float32).tiny
    if ".ftz" in name:
        x = np.where(abs(x) < tiny, np.copysign(0.0, x), x)
    with np.errstate(all="ignore"):
        y = function(x)
        if ".ftz" in name:
            assert not ((got != 0) & (abs(got) < tiny)).any()
            y = np.where(abs(y) < tiny, np.copysign(0.0, y), y)
        special = np.isnan(y) | np.isinf(y.astype(np.float32)) | (y == 0)
        # sin and cos of more than 100 pi are best effort; here they are as exact as the others.
        expected = y.astype(np.float32)
        expected_bits = np.where(np.isnan(expected), np.uint32(0x7FFFFFFF), bits_of(expected))
        assert (bits_of(got) == expected_bits)[special].all()
        error = abs(got.astype(np.float64) - y)
        allowed = np.maximum(bound(x, y), np.where(abs(y) < tiny, 2.0**-149, 0))
        assert (error <= allowed)[~special].all()
    assert np.isnan(got).sum() == np.isnan(y).sum()


@pytest.mark.parametrize("name", [f"div.{kind}{ftz}.f32" for kind in ("approx", "full") for ftz in ("", ".ftz")])
def test_approximate_division(name: str) -> None:
    columns = inputs(("f32", "f32"))
    a, b = (one.view(np.float32) for one in arrays(columns, ["f32", "f32"]))
    more = np.array([2.0**126, 1.5 * 2.0**126, -(2.0**127), 3.4e38], np.float32)
    a, b = (np.concatenate([one, two]) for one, two in ((a, np.resize(a, 4 * a.size)), (b, np.repeat(more, a.size))))
    got = apply(name, a, b, out=np.float32)
    x, y = a.astype(np.float64), b.astype(np.float64)
    tiny = np.finfo(np.float32).tiny
    if "ftz" in name:
        x, y = (np.where(abs(one) < tiny, np.copysign(0.0, one), one) for one in (x, y))
    with np.errstate(all="ignore"):
        quotient = x / y
        if "approx" in name:
            great = (abs(y) > 2.0**126) & np.isfinite(y)
            quotient = np.where(great, x * np.copysign(0.0, y), quotient)
        rounded = quotient.astype(np.float32)
        if "ftz" in name:
            rounded = np.where(abs(rounded) < tiny, np.copysign(np.float32(0), rounded), rounded)
        special = ~np.isfinite(rounded) | (rounded == 0)
        expected = np.where(np.isnan(rounded), np.uint32(0x7FFFFFFF), bits_of(rounded))
        assert (bits_of(got) == expected)[special].all()
        assert (abs(got.astype(np.float64) - quotient) <= 2 * ulp(quotient))[~special].all()


@pytest.mark.parametrize("name", ["rcp.approx.ftz.f64", "rsqrt.approx.ftz.f64", "rsqrt.approx.f64"])
def test_approximations_of_f64(name: str) -> None:
    a = whole_range(np.float64)
    got = apply(name, a, out=np.float64)
    upper = np.uint64(0xFFFFFFFF00000000)
    x = a
    tiny = np.finfo(np.float64).tiny
    if "ftz" in name:
        assert (bits_of(got) & ~upper == 0).all()
        x = (bits_of(a) & upper).view(np.float64)
        x = np.where(abs(x) < tiny, np.copysign(0.0, x), x)
        assert (bits_of(got)[np.isnan(got)] == 0x7FFFFFFF00000000).all()
    with np.errstate(all="ignore"):
        # The root of -0 is -0, whose reciprocal is -infinity.
        y = 1 / x if name.startswith("rcp") else 1 / np.sqrt(x)
        if "ftz" in name:
            y = np.where(abs(y) < tiny, np.copysign(0.0, y), y)
        special = ~np.isfinite(y) | (y == 0)
        same = (bits_of(got) == bits_of(y)) | (np.isnan(got) & np.isnan(y))
        assert same[special].all()
        assert (abs(got - y) <= abs(y) * (2.0**-20 if "ftz" in name else 2.0**-50))[~special].all()


# ---- nothing left out ------------------------------------------------------------------------------------------------


def test_every_form_is_tested() -> None:
    tested = {*names(F32_ROWS), *names(F64_ROWS), *names(PAIR_ROWS), *names(MIXED_ROWS)}
    tested |= {name[1:] for row in ("abs|neg ftz? f32", "abs|neg f64", "copysign f32|f64") for name in expand(row)}
    tested |= {name for name, _ in EXTREMUM_CASES} | {
        f"testp.{test}.{kind}" for test in TESTS for kind in ("f32", "f64")
    }
    tested |= {*APPROXIMATE_NAMES, "rcp.approx.ftz.f64", "rsqrt.approx.ftz.f64", "rsqrt.approx.f64"}
    tested |= {f"div.{kind}{ftz}.f32" for kind in ("approx", "full") for ftz in ("", ".ftz")}
    supported = elementwise.supported(sorted({name.split(".")[0] for name in tested}))
    kinds = {"f32", "f64", "f32x2"}
    assert {name for name in supported if kinds & set(name.split("."))} == tested


@pytest.mark.parametrize(
    "instruction",
    [
        *("fma.f32 %d, %a, %a, %a", "div.f32 %d, %a, %a", "min.xorsign.f32 %d, %a, %a", "min.abs.f32 %d, %a, %a"),
        *("max.xorsign.abs.f32 %d, %a, %a, %a", "add.sat.f64 %d, %a, %a", "sqrt.f32 %d, %a", "ex2.f32 %d, %a"),
        *("add.f16.f32 %d, %a, %a", "fma.f32.f16 %d, %a, %a, %a", "add.ftz.f32.f16 %d, %a, %a"),
        *("add.rna.f32 %d, %a, %a", "mul.rn.sat.f32x2 %d, %a, %a", "tanh.approx.ftz.f32 %d, %a", "rcp.full.f32 %d, %a"),
    ],
)
def test_what_ptxas_refuses_is_refused(instruction: str) -> None:
    with pytest.raises(elementwise.ptx.PtxError, match="is not supported|are not supported together"):
        apply(instruction, np.zeros(1, np.uint64), out=np.uint64)
