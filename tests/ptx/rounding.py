"""The oracle of floating-point arithmetic: exact fractions, rounded once to a format. Slow, and nothing of the emulator's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Format:
    mantissa: int  # bits after the point
    exponent_bits: int
    has_infinity: bool = True  # e4m3 has none, and one NaN

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa

    @property
    def sign(self) -> int:
        return 1 << (self.bits - 1)

    @property
    def infinity(self) -> int:
        return ((1 << self.exponent_bits) - 1) << self.mantissa

    @property
    def nan(self) -> int:
        """All ones but the sign, as the PTX ISA says."""
        return self.sign - 1

    @property
    def largest(self) -> int:
        return self.infinity - 1 if self.has_infinity else self.nan - 1


FORMATS = {
    "f16": Format(10, 5),
    "bf16": Format(7, 8),
    "f32": Format(23, 8),
    "f64": Format(52, 11),
    "tf32": Format(10, 8),
    "e4m3": Format(3, 4, has_infinity=False),
    "e5m2": Format(2, 5),
}


def decode(code: int, form: Format) -> Fraction | float:
    """The number that a code stands for: a fraction, or an infinity, NaN or -0.0 as a float."""
    magnitude, negative = code & (form.sign - 1), bool(code & form.sign)
    if form.has_infinity and magnitude >= form.infinity:
        return math.nan if magnitude > form.infinity else -math.inf if negative else math.inf
    if not form.has_infinity and magnitude == form.nan:
        return math.nan
    if magnitude == 0:
        return -0.0 if negative else Fraction(0)
    exponent, mantissa = magnitude >> form.mantissa, magnitude & ((1 << form.mantissa) - 1)
    units = mantissa if exponent == 0 else mantissa | 1 << form.mantissa
    value = units * Fraction(2) ** (max(exponent, 1) - form.bias - form.mantissa)
    return -value if negative else value


def encode(value: Fraction | float, form: Format, mode: str = "rn", satfinite: bool = False) -> int:
    """The code of a number, rounded by mode rn, rz, rm, rp or rna; floats are for infinities, NaN and zeros."""
    if isinstance(value, float):
        if math.isnan(value):
            return form.nan
        sign = form.sign if math.copysign(1, value) < 0 else 0
        if value == 0:
            return sign
        assert math.isinf(value)
        return sign | (form.largest if satfinite else form.infinity if form.has_infinity else form.nan)
    if value == 0:
        return 0
    negative, value = value < 0, abs(value)
    sign = form.sign if negative else 0
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    exponent -= value < Fraction(2) ** exponent
    exponent = max(exponent, 1 - form.bias)
    scaled = value / Fraction(2) ** (exponent - form.mantissa)
    units, rest = divmod(scaled.numerator, scaled.denominator)
    half = Fraction(rest, scaled.denominator) - Fraction(1, 2)
    up = {
        "rn": half > 0 or (half == 0 and units % 2 == 1),
        "rna": half >= 0,
        "rz": False,
        "rm": negative and rest > 0,
        "rp": not negative and rest > 0,
    }[mode]
    code = ((exponent + form.bias - 1) << form.mantissa) + units + up
    if code <= form.largest:
        return sign | code
    inwards = mode == "rz" or mode == ("rp" if negative else "rm")
    if satfinite or inwards:
        return sign | form.largest
    return sign | (form.infinity if form.has_infinity else form.nan)


def is_negative(value: Fraction | float) -> bool:
    return value < 0 if isinstance(value, Fraction) else math.copysign(1, value) < 0


def _sum(a: Fraction | float, b: Fraction | float, mode: str) -> Fraction | float:
    if isinstance(a, float) and not math.isfinite(a) or isinstance(b, float) and not math.isfinite(b):
        return float(a if isinstance(a, float) else 0) + float(b if isinstance(b, float) else 0)
    total = Fraction(a) + Fraction(b)
    if total != 0:
        return total
    if is_negative(a) == is_negative(b):
        return -0.0 if is_negative(a) else Fraction(0)
    return -0.0 if mode == "rm" else Fraction(0)


def _product(a: Fraction | float, b: Fraction | float) -> Fraction | float:
    negative = is_negative(a) != is_negative(b)
    if any(isinstance(one, float) and not math.isfinite(one) for one in (a, b)):
        return math.nan if any(one != one or one == 0 for one in (a, b)) else -math.inf if negative else math.inf
    product = Fraction(a) * Fraction(b)
    return product if product != 0 else -0.0 if negative else Fraction(0)


def _quotient(a: Fraction | float, b: Fraction | float) -> Fraction | float:
    negative = is_negative(a) != is_negative(b)
    infinite = [isinstance(one, float) and math.isinf(one) for one in (a, b)]
    if a != a or b != b or all(infinite) or (a == 0 and b == 0):
        return math.nan
    if infinite[0] or b == 0:
        return -math.inf if negative else math.inf
    if infinite[1] or a == 0:
        return -0.0 if negative else Fraction(0)
    return Fraction(a) / Fraction(b)


def _root(a: Fraction | float) -> Fraction | float:
    if a == 0 or a != a or a == math.inf:
        return a
    if a < 0:
        return math.nan
    # Enough digits to tell on which side of every number and every middle the root lies.
    value, shift = Fraction(a), 2200
    square = value.numerator * value.denominator << 2 * shift
    root = math.isqrt(square)
    low = Fraction(root, value.denominator << shift)
    return low if root * root == square else low + Fraction(1, value.denominator << (shift + 1))


OPERATIONS: dict[str, Any] = {
    "add": lambda mode, a, b: _sum(a, b, mode),
    "sub": lambda mode, a, b: _sum(a, -b if b == b and b != 0 else _negated_zero(b), mode),
    "mul": lambda mode, a, b: _product(a, b),
    "fma": lambda mode, a, b, c: _sum(_product(a, b), c, mode),
    "mad": lambda mode, a, b, c: _sum(_product(a, b), c, mode),
    "div": lambda mode, a, b: _quotient(a, b),
    "rcp": lambda mode, a: _quotient(Fraction(1), a),
    "sqrt": lambda mode, a: _root(a),
}


def _negated_zero(value: Fraction | float) -> Fraction | float:
    if value != value:
        return value
    return Fraction(0) if is_negative(value) else -0.0


def flushed(code: int, form: Format) -> int:
    return code & form.sign if code & (form.sign - 1) < 1 << form.mantissa else code


def calculate(
    operation: str,
    form: Format,
    *arrays: np.ndarray[Any, Any],
    mode: str = "rn",
    ftz: bool = False,
    sat: bool = False,
    relu: bool = False,
) -> np.ndarray[Any, Any]:
    """The codes of operation(arrays...), each rounded once. arrays: codes, as unsigned integers."""
    function = OPERATIONS[operation]
    results = []
    for codes in zip(*(array.tolist() for array in arrays), strict=True):
        given = [decode(flushed(code, form) if ftz else code, form) for code in codes]
        value = function(mode, *given)
        if sat:
            value = Fraction(0) if not value > 0 else min(value, Fraction(1))
        if relu and value == value and not value > 0:
            value = Fraction(0)
        code = encode(value, form, mode)
        results.append(flushed(code, form) if ftz else code)
    return np.array(results, arrays[0].dtype)
