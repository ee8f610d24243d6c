"""f16, bf16 and their pairs of the PTX emulator against exact fractions, numpy and ml_dtypes."""

from __future__ import annotations

import functools
from fractions import Fraction
from typing import Any

import elementwise
import ml_dtypes
import numpy as np
import pytest
from elementwise import apply, every, expand
from floats import FORMATS, OPERANDS, assert_codes, bits_of, decode, result_of, samples

Array = np.ndarray[Any, Any]
TYPES: dict[str, Any] = {"f16": np.float16, "bf16": ml_dtypes.bfloat16}
ALL = every(np.uint16)
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")


def kind_of(name: str) -> str:
    return name.rpartition(".")[2].removesuffix("x2")


def run(name: str, *inputs: Array) -> Array:
    """16-bit patterns in and out; of pairs, both halves are computed, and have to agree."""
    if not name.endswith("x2"):
        return apply(name, *inputs, out=np.uint16)
    packed = [one.astype(np.uint32) | np.roll(one, 1).astype(np.uint32) << 16 for one in inputs]
    got = apply(name, *packed, out=np.uint32)
    assert (got >> 16 == np.roll(got & 0xFFFF, 1)).all()
    return got.astype(np.uint16)


# ---- rounded arithmetic ----------------------------------------------------------------------------------------------

ROWS = [f"{opcode} rn? ftz? sat? f16|f16x2" for opcode in ("add", "sub", "mul")]
ROWS += [f"{opcode} rn? bf16|bf16x2" for opcode in ("add", "sub", "mul")]
ROWS += ["fma rn ftz? sat? f16|f16x2", "fma rn ftz? relu f16|f16x2", "fma rn relu? bf16|bf16x2"]
ARITHMETIC = [name[1:] for row in ROWS for name in expand(row)]


@functools.cache
def inputs(kind: str, count: int) -> list[list[int]]:
    return samples([FORMATS[kind]] * count, 1500)


@functools.cache
def expected(opcode: str, modifiers: tuple[str, ...], kind: str) -> list[int]:
    form = FORMATS[kind]
    columns = inputs(kind, OPERANDS[opcode])
    return [result_of(opcode, modifiers, codes, [form] * len(codes), form) for codes in zip(*columns, strict=True)]


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic(name: str) -> None:
    opcode, *modifiers = name.split(".")
    kind = kind_of(name)
    columns = inputs(kind, OPERANDS[opcode])
    got = run(name, *[np.array(column, np.uint16) for column in columns])
    wanted = expected(opcode, tuple(one for one in modifiers[:-1] if one != "rn"), kind)
    assert_codes(got, wanted, columns)


@pytest.mark.parametrize("kind", list(TYPES))
@pytest.mark.parametrize("opcode", ["add", "sub", "mul"])
def test_numpy_agrees(opcode: str, kind: str) -> None:
    """Every number with some others, with an oracle that is not ours."""
    function = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[opcode]
    a = ALL.view(TYPES[kind])
    for other in (np.uint16(0x3C01), np.uint16(0x0001), np.uint16(0xC2AB), np.uint16(0x7BFF)):
        b = np.full_like(ALL, other).view(TYPES[kind])
        with np.errstate(all="ignore"):
            wanted = bits_of(function(a, b))
            nan = np.isnan(function(a, b))
        got = run(f"{opcode}.{kind}", ALL, bits_of(b))
        assert (got == np.where(nan, np.uint16(0x7FFF), wanted)).all()


def test_fma_is_rounded_once() -> None:
    """Where rounding the sum to float first gives something else, or the product to f16."""
    form = FORMATS["f16"]
    a, b, c = (np.random.default_rng(seed).integers(0, 0x7C00, 200000).astype(np.uint16) for seed in range(3))
    x, y, z = (one.view(np.float16).astype(np.float32) for one in (a, b, c))
    got = run("fma.rn.f16", a, b, c)
    with np.errstate(over="ignore"):
        differ = np.flatnonzero(bits_of((x * y + z).astype(np.float16)) != got)
    assert differ.size > 3
    for i in differ.tolist():
        assert got[i] == result_of("fma", ["rn"], [int(a[i]), int(b[i]), int(c[i])], [form] * 3, form)


@pytest.mark.parametrize("kind", list(TYPES))
def test_fma_whose_tail_no_double_holds(kind: str) -> None:
    """The product ends at the middle of two numbers, and c lies far below: only c's sign says which way to round."""
    form = FORMATS[kind]
    one, unit = form.bias << form.mantissa, 1 << form.mantissa
    factor = one + (1 << (form.mantissa - form.mantissa // 2 - 1))  # 1 + 2^-(m // 2 + 1)
    a, b = [], []
    for x in range(one, one + unit):
        for y in (factor, one + 1, one + 3):
            product = decode(x, form).value * decode(y, form).value
            scaled = product * 2**form.mantissa / (2 if product >= 2 else 1)
            if scaled % 1 == Fraction(1, 2):
                a.append(x + (form.bias // 2 << form.mantissa))  # great: c is beyond the last digit of a double
                b.append(y + (form.bias // 2 - 1 << form.mantissa))
    assert a
    for least in (1, 1 | 1 << (form.bits - 1)):
        columns = [a, b, [least] * len(a)]
        wanted = [result_of("fma", ["rn"], codes, [form] * 3, form) for codes in zip(*columns, strict=True)]
        assert_codes(run(f"fma.rn.{kind}", *[np.array(column, np.uint16) for column in columns]), wanted, columns)


# ---- signs, min, max: on the patterns --------------------------------------------------------------------------------


def flushed(codes: Array, kind: str) -> Array:
    exponent = np.uint16(0x7C00 if kind == "f16" else 0x7F80)
    return np.where(codes & exponent == 0, codes & np.uint16(0x8000), codes)


SIGNS = [name[1:] for name in (*expand("neg|abs ftz? f16|f16x2"), *expand("neg|abs bf16|bf16x2"))]


@pytest.mark.parametrize("name", SIGNS)
def test_signs(name: str) -> None:
    codes = flushed(ALL, kind_of(name)) if ".ftz" in name else ALL
    wanted = codes ^ np.uint16(0x8000) if name.startswith("neg") else codes & np.uint16(0x7FFF)
    number = ~np.isnan(ALL.view(TYPES[kind_of(name)]))
    got = run(name, ALL)
    assert (got == wanted)[number].all()
    assert np.isnan(got.view(TYPES[kind_of(name)]))[~number].all()


EXTREMA_ROWS = ["min|max ftz? NaN? f16|f16x2", "min|max ftz? NaN? xorsign abs f16|f16x2"]
EXTREMA_ROWS += ["min|max NaN? bf16|bf16x2", "min|max NaN? xorsign abs bf16|bf16x2"]
EXTREMA = [name[1:] for row in EXTREMA_ROWS for name in expand(row)]


@pytest.mark.parametrize("name", EXTREMA)
def test_extrema(name: str) -> None:
    kind = kind_of(name)
    others = np.array([0, 0x8000, 1, 0x8001, 0x3C00, 0xBC00, 0x7C00, 0xFF80, 0x7FFF, 0xFFFF, 0x7C01], np.uint16)
    stride = 7 if name.endswith("x2") else 1
    a, b = (one.reshape(-1) for one in np.meshgrid(ALL[::stride], others))
    got = run(name, a, b)
    sign = (a ^ b) & np.uint16(0x8000)
    nan_a, nan_b = (np.isnan(one.view(TYPES[kind])) for one in (a, b))
    if ".ftz" in name:
        a, b = flushed(a, kind), flushed(b, kind)
    if ".abs" in name:
        a, b = a & np.uint16(0x7FFF), b & np.uint16(0x7FFF)
    # Patterns in the order of the numbers: -0 before +0.
    ranks = [np.where(one < 0x8000, one.astype(int), 0x7FFF - one.astype(int)) for one in (a, b)]
    first = ranks[0] < ranks[1] if name.startswith("min") else ranks[0] > ranks[1]
    wanted = np.where(nan_b | (first & ~nan_a), a, b)
    if ".xorsign" in name:
        wanted = (wanted & np.uint16(0x7FFF)) | sign
    lost = nan_a | nan_b if ".NaN" in name else nan_a & nan_b
    wanted = np.where(lost, np.uint16(0x7FFF), wanted)
    assert (got == wanted).all()


# ---- approximations --------------------------------------------------------------------------------------------------

APPROXIMATE = [name[1:] for name in expand("ex2 approx f16|f16x2") + expand("ex2 approx ftz bf16|bf16x2")]
APPROXIMATE += [name[1:] for name in expand("tanh approx f16|f16x2|bf16|bf16x2")]


@pytest.mark.parametrize("name", APPROXIMATE)
def test_approximations_are_within_the_bounds(name: str) -> None:
    kind = kind_of(name)
    got = run(name, ALL)
    result = got.view(TYPES[kind]).astype(np.float64)
    codes = flushed(ALL, kind) if ".ftz" in name else ALL
    x = codes.view(TYPES[kind]).astype(np.float64)
    greatest = float(ml_dtypes.finfo(TYPES[kind]).max)
    tiny = float(ml_dtypes.finfo(TYPES[kind]).tiny)
    least = tiny if ".ftz" in name else tiny * 2.0 ** -(10 if kind == "f16" else 7)
    nan = np.isnan(x)
    assert (got[nan] == 0x7FFF).all()
    if name.startswith("tanh"):
        assert (got[codes & 0x7FFF == 0] == codes[codes & 0x7FFF == 0]).all()
        bound = 2**-10.987 if kind == "f16" else 2**-8
        assert (abs(result - np.tanh(x)) <= bound)[~nan].all()
        assert (abs(result[np.isinf(x)]) == 1).all()
        return
    with np.errstate(over="ignore"):
        y = np.exp2(x)
    assert (result[np.isinf(x)] == y[np.isinf(x)]).all()
    assert (result[codes & 0x7FFF == 0] == 1).all()
    if ".ftz" in name:
        assert (flushed(got, kind) == got).all()
    bound = 2**-9.9 if kind == "f16" else 2**-7
    inside = ~nan & (y <= greatest) & (y >= tiny)
    assert (abs(result - y) <= bound * y)[inside].all()
    assert (abs(result - y) <= least)[~nan & (y < tiny)].all()
    assert np.isinf(result[y > 1.01 * greatest]).all()


# ---- nothing left out ------------------------------------------------------------------------------------------------


def test_every_form_is_tested() -> None:
    tested = {*ARITHMETIC, *SIGNS, *EXTREMA, *APPROXIMATE}
    supported = elementwise.supported(sorted({name.split(".")[0] for name in tested}))
    kinds = {"f16", "bf16", "f16x2", "bf16x2"}
    assert {name for name in supported if kinds & set(name.split(".")) and ".f32." not in name} == tested


@pytest.mark.parametrize(
    "instruction",
    [
        *(
            "add.ftz.bf16 %d, %a, %a",
            "add.rz.f16 %d, %a, %a",
            "fma.rn.sat.relu.f16 %d, %a, %a, %a",
            "div.rn.f16 %d, %a, %a",
        ),
        *(
            "min.xorsign.f16 %d, %a, %a",
            "max.abs.bf16x2 %d, %a, %a",
            "ex2.approx.bf16 %d, %a",
            "fma.f16 %d, %a, %a, %a",
        ),
        *("fma.rn.oob.f16 %d, %a, %a, %a", "min.f16 %d, %a, %a, %a", "mad.rn.f16 %d, %a, %a, %a"),
    ],
)
def test_what_is_not_there_is_refused(instruction: str) -> None:
    with pytest.raises(elementwise.ptx.PtxError, match="is not supported|are not supported together"):
        apply(instruction, np.zeros(1, np.uint32), out=np.uint32)
