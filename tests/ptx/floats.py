"""Floating-point arithmetic with fractions: exact, then rounded once. The oracle of the floating-point tests."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Format:
    mantissa: int  # bits after the point
    exponent_bits: int
    bias: int
    specials: str = "ieee"  # "ieee": infinity and NaN; "nan": all ones is NaN; "none": neither

    @property
    def bits(self) -> int:
        return 1 + self.mantissa + self.exponent_bits

    @property
    def ones(self) -> int:
        return 2 ** (self.bits - 1) - 1

    @property
    def infinity(self) -> int:
        return self.ones - (2**self.mantissa - 1)

    @property
    def largest(self) -> int:
        return {"ieee": self.infinity - 1, "nan": self.ones - 1, "none": self.ones}[self.specials]


FORMATS = {
    "f16": Format(10, 5, 15),
    "bf16": Format(7, 8, 127),
    "tf32": Format(10, 8, 127),
    "f32": Format(23, 8, 127),
    "f64": Format(52, 11, 1023),
    "e4m3": Format(3, 4, 7, "nan"),
    "e5m2": Format(2, 5, 15),
    "e2m3": Format(3, 2, 1, "none"),
    "e3m2": Format(2, 3, 3, "none"),
    "e2m1": Format(1, 2, 1, "none"),
}


@dataclass(frozen=True)
class Number:
    kind: str  # "finite", "inf", "nan"
    value: Fraction = Fraction(0)
    negative: bool = False

    def __neg__(self) -> Number:
        return Number(self.kind, -self.value, not self.negative)

    @property
    def is_zero(self) -> bool:
        return self.kind == "finite" and self.value == 0


NAN = Number("nan")
ZERO = Number("finite")


def finite(value: Fraction, negative_zero: bool = False) -> Number:
    return Number("finite", value, value < 0 or (value == 0 and negative_zero))


@functools.cache
def decode(code: int, form: Format) -> Number:
    negative, magnitude = bool(code >> (form.bits - 1) & 1), code & form.ones
    if form.specials == "ieee" and magnitude >= form.infinity:
        return NAN if magnitude > form.infinity else Number("inf", negative=negative)
    if form.specials == "nan" and magnitude == form.ones:
        return NAN
    exponent, digits = magnitude >> form.mantissa, magnitude & (2**form.mantissa - 1)
    if exponent:
        digits += 2**form.mantissa
    value = Fraction(digits) * Fraction(2) ** (max(exponent, 1) - form.bias - form.mantissa)
    return Number("finite", -value if negative else value, negative)


def floor_log2(value: Fraction) -> int:
    guess = value.numerator.bit_length() - value.denominator.bit_length()
    return guess if Fraction(2) ** guess <= value else guess - 1


def to_integer(value: Fraction, mode: str) -> int:
    """The modes are n (to nearest even), z, m (down), p (up), na (to nearest, away from zero)."""
    down = math.floor(value)
    rest = value - down
    if mode == "n":
        return down + (rest > Fraction(1, 2) or (rest == Fraction(1, 2) and down % 2 == 1))
    if mode == "na":
        return down + (rest > Fraction(1, 2) or (rest == Fraction(1, 2) and value > 0))
    return down + (rest > 0 and (mode == "p" or (mode == "z" and value < 0)))


def encode(number: Number, form: Format, mode: str = "n", satfinite: bool = False) -> int:
    """NaN is all ones but the sign, or the largest number of formats that have none."""
    sign = int(number.negative) << (form.bits - 1)
    without_infinity = form.largest if satfinite or form.specials == "none" else form.ones
    if number.kind == "nan":
        return form.largest if form.specials == "none" else form.ones
    beyond = form.infinity if form.specials == "ieee" and not satfinite else without_infinity
    if number.kind == "inf":
        return sign | beyond
    if number.value == 0:
        return sign
    least = 1 - form.bias
    exponent = max(floor_log2(abs(number.value)), least)
    units = abs(to_integer(number.value * Fraction(2) ** (form.mantissa - exponent), mode))
    code = ((exponent - least) << form.mantissa) + units
    if code <= form.largest:
        return sign | code
    inwards = mode == "z" or mode == ("p" if number.negative else "m")
    return sign | (form.largest if inwards else beyond)


# ---- arithmetic: exact; `mode` decides the sign of a sum of zero ----


def multiply(a: Number, b: Number) -> Number:
    if "nan" in (a.kind, b.kind) or (a.kind != b.kind and (a.is_zero or b.is_zero)):
        return NAN
    negative = a.negative != b.negative
    if "inf" in (a.kind, b.kind):
        return Number("inf", negative=negative)
    return finite(a.value * b.value, negative)


def add(a: Number, b: Number, mode: str) -> Number:
    if "nan" in (a.kind, b.kind):
        return NAN
    if "inf" in (a.kind, b.kind):
        if a.kind == b.kind and a.negative != b.negative:
            return NAN
        return a if a.kind == "inf" else b
    return finite(a.value + b.value, a.negative if a.negative == b.negative else mode == "m")


def divide(a: Number, b: Number) -> Number:
    negative = a.negative != b.negative
    if "nan" in (a.kind, b.kind) or (a.kind == b.kind == "inf") or (a.is_zero and b.is_zero):
        return NAN
    if a.kind == "inf" or b.is_zero:
        return Number("inf", negative=negative)
    return finite(Fraction(0) if b.kind == "inf" else a.value / b.value, negative)


def root(a: Number) -> Number:
    """With some hundred digits, the last of which says whether there are more."""
    if a.kind != "finite" or a.value <= 0:
        return a if a.is_zero or (a.kind == "inf" and not a.negative) else NAN
    scale = 1400  # more than twice the digits of the least f64
    scaled = a.value.numerator * 4**scale // a.value.denominator
    digits = math.isqrt(scaled)
    inexact = digits * digits * a.value.denominator != a.value.numerator * 4**scale
    return finite(Fraction(2 * digits + inexact, 2 ** (scale + 1)))


ARITHMETIC: dict[str, Callable[..., Number]] = {
    "add": add,
    "sub": lambda a, b, mode: add(a, -b, mode),
    "mul": lambda a, b, mode: multiply(a, b),
    "fma": lambda a, b, c, mode: add(multiply(a, b), c, mode),
    "mad": lambda a, b, c, mode: add(multiply(a, b), c, mode),
    "div": lambda a, b, mode: divide(a, b),
    "rcp": lambda a, mode: divide(finite(Fraction(1)), a),
    "sqrt": lambda a, mode: root(a),
}
OPERANDS = {"add": 2, "sub": 2, "mul": 2, "fma": 3, "mad": 3, "div": 2, "rcp": 1, "sqrt": 1}


def flush(number: Number, form: Format) -> Number:
    tiny = number.kind == "finite" and abs(number.value) < Fraction(2) ** (1 - form.bias)
    return Number("finite", negative=number.negative) if tiny else number


def saturate(number: Number) -> Number:
    if number.kind == "nan" or number.negative:
        return ZERO
    return finite(Fraction(1)) if number.kind == "inf" else finite(min(number.value, Fraction(1)))


def rectify(number: Number) -> Number:
    return number if number.kind == "nan" or not number.negative else ZERO


def result_of(
    opcode: str, modifiers: Sequence[str], codes: Sequence[int], sources: Sequence[Format], form: Format
) -> int:
    """The bits that an instruction gives; f64's NaN is all ones but the sign."""
    mode = next((one[1:] for one in modifiers if one in ("rn", "rz", "rm", "rp")), "n")
    numbers = [decode(code, source) for code, source in zip(codes, sources, strict=True)]
    if "ftz" in modifiers:
        numbers = [flush(number, source) for number, source in zip(numbers, sources, strict=True)]
    result = ARITHMETIC[opcode](*numbers, mode=mode)
    if "sat" in modifiers:
        result = saturate(result)
    if "relu" in modifiers:
        result = rectify(result)
    code = encode(result, form, mode)
    if "ftz" in modifiers and (code & form.ones) >> form.mantissa == 0:
        code &= ~form.ones
    return code


# ---- samples, as bits ----


def edges(form: Format, few: bool = False) -> list[int]:
    """Numbers at which something changes, NaN with a payload, of both signs."""
    one, unit = form.bias << form.mantissa, 1 << form.mantissa
    codes = [0, 1, unit, one, form.largest, form.infinity, form.infinity + 3]
    if not few:
        codes += [unit - 1, unit + 1, one - 1, one + 1, one + unit // 2, one + unit, form.largest - 1]
        codes += [one - (form.mantissa << form.mantissa) if form.mantissa < form.bias else 2, one - unit + 3]
        codes += [form.infinity + unit // 2]
    return [code | sign << (form.bits - 1) for code in codes for sign in (0, 1)]


def samples(forms: Sequence[Format], count: int, seed: int = 0) -> list[list[int]]:
    """All combinations of edges (of three operands a seventh), then random numbers, most of them of like magnitudes."""
    generator = np.random.default_rng(seed)
    grids = np.meshgrid(*[np.array(edges(form, few=len(forms) > 2), np.uint64) for form in forms], indexing="ij")
    columns = [[int(code) for code in grid.reshape(-1)[:: 7 if len(forms) > 2 else 1]] for grid in grids]
    for _ in range(count):
        near = generator.random() < 0.8
        exponent = int(generator.integers(-100, 100)) if near else 0
        for i, form in enumerate(forms):
            code = int(generator.integers(0, 2**63)) << 1 & (2**form.bits - 1)
            code |= int(generator.integers(0, 2))
            if near:
                spread = form.mantissa + 3
                here = (2 * exponent if len(forms) > 2 and i == 2 else exponent) + int(
                    generator.integers(-spread, spread)
                )
                here = min(max(here + form.bias, 0), 2**form.exponent_bits - 2)
                code = (code & ~(form.infinity)) | here << form.mantissa
            columns[i].append(code)
    return columns


def bits_of(values: Any) -> np.ndarray[Any, Any]:
    array = np.asarray(values)
    return array.view(f"uint{8 * array.dtype.itemsize}")


def assert_codes(
    actual: Any, expected: Sequence[int], inputs: Sequence[Sequence[int]], any_nan: Format | None = None
) -> None:
    """Bit for bit; with `any_nan`, all NaNs of this format are the same."""
    for i, (got, wanted) in enumerate(zip(actual.tolist(), expected, strict=True)):
        if got == wanted:
            continue
        if any_nan and all(code & any_nan.ones > any_nan.infinity for code in (got, wanted)):
            continue
        given = ", ".join(hex(column[i]) for column in inputs)
        raise AssertionError(f"of {given}: got {got:#x}, expected {wanted:#x}")
