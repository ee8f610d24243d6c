"""cvt of the PTX emulator against exact fractions, torch and ml_dtypes; from small formats exhaustively."""

from __future__ import annotations

import functools
import itertools
from fractions import Fraction
from typing import Any

import elementwise
import ml_dtypes
import numpy as np
import pytest
import torch
from elementwise import DTYPES, apply, every, expand
from floats import (
    FORMATS,
    ZERO,
    Format,
    Number,
    assert_codes,
    bits_of,
    decode,
    edges,
    encode,
    finite,
    flush,
    rectify,
    saturate,
    to_integer,
)

Array = np.ndarray[Any, Any]
INTEGERS = [kind + bits for kind in "us" for bits in ("8", "16", "32", "64")]
FLOATS = ["f16", "bf16", "f32", "f64"]
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered")


# ---- integers --------------------------------------------------------------------------------------------------------


def holds_all(target: str, source: str) -> bool:
    low, high = np.iinfo(DTYPES[target]), np.iinfo(DTYPES[source])
    return int(low.min) <= int(high.min) and int(low.max) >= int(high.max)


INTEGER_CASES = [f"cvt.{d}.{s}" for d in INTEGERS for s in INTEGERS]
INTEGER_CASES += [f"cvt.sat.{d}.{s}" for d in INTEGERS for s in INTEGERS if not holds_all(d, s)]


@pytest.mark.parametrize("name", INTEGER_CASES)
def test_integers(name: str) -> None:
    target, source = (DTYPES[kind] for kind in name.split(".")[-2:])
    (a,) = elementwise.samples(source, count=500)
    values = elementwise.exact(a)
    if ".sat" in name:
        info = np.iinfo(target)
        values = np.minimum(np.maximum(values, int(info.min)), int(info.max))
    elementwise.assert_same(apply(name, a, out=target), elementwise.wrap(values, target), a, what=name)


# ---- one number to another -------------------------------------------------------------------------------------------


@functools.cache
def inputs(kind: str) -> list[int]:
    """The bits of numbers at which conversions change."""
    if kind in INTEGERS:
        dtype = DTYPES[kind]
        bits = 8 * dtype.itemsize
        (some,) = elementwise.samples(dtype, count=200)
        near = [1 << i for i in range(bits)]
        # Between two floats of 8, 11, 24 and 53 digits, and beside the middle of them.
        ties = [(1 << (bits - 2)) + (1 << (bits - 2 - digits)) for digits in (8, 11, 24, 53) if bits - 2 > digits]
        codes = [int(one) for one in bits_of(some)] + [one + off for one in near + ties for off in (-1, 0, 1)]
        return [code & (2**bits - 1) for code in codes]
    form = FORMATS[kind]
    if form.bits <= 16:
        return list(range(0, 2**form.bits, 37)) + edges(form)
    generator = np.random.default_rng(form.bits)
    codes = edges(form)
    integral = [Fraction(n) + Fraction(part, 4) for n in (0, 1, 2, 5, 100, 2**31 - 1) for part in range(4)]
    for power in (7, 8, 15, 16, 31, 32, 63, 64):
        integral += [Fraction(2) ** power + off for off in (-1, Fraction(-1, 2), 0, Fraction(1, 2), 1)]
    # The middle of two numbers of every narrower format, and its neighbours; normal, subnormal and at overflow.
    for narrow in FORMATS.values():
        if narrow.mantissa >= form.mantissa:
            continue
        for code in {0, 1, 2, 3, narrow.largest, narrow.largest - 1, narrow.bias << narrow.mantissa}:
            low, high = decode(code, narrow), decode(min(code + 1, narrow.largest), narrow)
            step = high.value - low.value or low.value - decode(code - 1, narrow).value
            integral += [low.value + step / 2, low.value + step, low.value + step / 2 * (1 + Fraction(1, 2**10))]
            integral += [low.value + step / 2 * (1 - Fraction(1, 2**10)), low.value]
    for value in integral:
        code = encode(finite(value), form)
        codes += [code, code | 1 << (form.bits - 1)]
    for _ in range(300):
        near = int(generator.integers(form.bias - 40, form.bias + 70))
        digits = int(generator.integers(0, 2**form.mantissa))
        codes.append(near << form.mantissa | digits | int(generator.integers(0, 2)) << (form.bits - 1))
    return codes


def read(code: int, kind: str) -> Number:
    if kind in FORMATS:
        return decode(code, FORMATS[kind])
    bits = 8 * DTYPES[kind].itemsize
    return finite(Fraction(code - (code >> (bits - 1) << bits) if kind[0] == "s" else code))


def convert(code: int, name: str) -> int:
    *modifiers, target, source = name.split(".")[1:]
    number = read(code, source)
    if "ftz" in modifiers and source == "f32":
        number = flush(number, FORMATS["f32"])
    rounding = next((one[1:] for one in modifiers if one[:2] in ("rn", "rz", "rm", "rp")), "n")
    mode = rounding[0] if rounding != "na" else "na"
    if rounding.endswith("i") and number.kind == "finite":
        number = finite(Fraction(to_integer(number.value, mode)), number.negative)
    if target in INTEGERS:
        bits = 8 * DTYPES[target].itemsize
        if number.kind == "nan":
            return 1 << (bits - 1) if source == "f64" or bits == 64 else 0
        info = np.iinfo(DTYPES[target])
        if number.kind == "inf":
            return int(info.min if number.negative else info.max) & (2**bits - 1)
        return min(max(int(number.value), int(info.min)), int(info.max)) & (2**bits - 1)
    if "sat" in modifiers:
        number = saturate(number)
    if "relu" in modifiers:
        number = rectify(number)
    form = FORMATS[target]
    code = encode(number, form, mode, satfinite="satfinite" in modifiers)
    if "ftz" in modifiers and target == "f32" and (code & form.ones) >> form.mantissa == 0:
        code &= ~form.ones
    return code


def float_names() -> list[str]:
    """What PTX ISA allows: a rounding where numbers may be lost, and to integral values between equal types."""
    names = []
    for d, s in itertools.product(INTEGERS + FLOATS, repeat=2):
        if d in INTEGERS and s in INTEGERS:
            continue
        ftz = "ftz? " if "f32" in (d, s) else ""
        sat = "" if d == "bf16" else "sat? "
        to_float, from_float = d in FLOATS, s in FLOATS
        if not to_float:
            row = "rni|rzi|rmi|rpi "
        elif not from_float:
            row = "rn|rz|rm|rp "
        else:
            digits = {"f16": (10, 5), "bf16": (7, 8), "f32": (23, 8), "f64": (52, 11)}
            exact = all(to >= of for to, of in zip(digits[d], digits[s], strict=True))
            row = "" if exact else "rn|rz|rm|rp "
            if s == "bf16" and d in ("f32", "f64"):
                row = "rn|rz|rm|rp? "
        names += expand(f"{row}{ftz}{sat}{d} {s}")
        if d == s:
            names += expand(f"rni|rzi|rmi|rpi {ftz}{sat}{d} {s}")
    names += expand("rn|rz relu? satfinite? f16|bf16 f32")
    return ["cvt" + name for name in dict.fromkeys(names)]


FLOAT_CASES = float_names()


def dtype_of(kind: str) -> Any:
    return np.dtype(f"uint{FORMATS[kind].bits if kind in FORMATS else 8 * DTYPES[kind].itemsize}")


@pytest.mark.parametrize("pair", sorted({tuple(name.split(".")[-2:]) for name in FLOAT_CASES}), ids=".".join)
def test_floats(pair: tuple[str, str]) -> None:
    target, source = pair
    codes = inputs(source)
    given = np.array(codes, dtype_of(source))
    for name in (name for name in FLOAT_CASES if tuple(name.split(".")[-2:]) == pair):
        expected = [convert(code, name) for code in codes]
        any_nan = FORMATS["f64"] if target == "f64" else None
        assert_codes(apply(name, given, out=dtype_of(target)), expected, [codes], any_nan=any_nan)


def test_every_half_is_widened_exactly() -> None:
    for kind, dtype in (("f16", np.float16), ("bf16", ml_dtypes.bfloat16)):
        codes = every(np.uint16)
        wanted = bits_of(codes.view(dtype).astype(np.float32))
        nan = np.isnan(codes.view(dtype))
        got = apply(f"cvt.f32.{kind}", codes, out=np.uint32)
        assert (got == np.where(nan, np.uint32(0x7FFFFFFF), wanted)).all()
        back = apply(f"cvt.rn.{kind}.f32", got, out=np.uint16)
        assert (back == np.where(nan, np.uint16(0x7FFF), codes)).all()


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_torch_narrows_alike(kind: str, dtype: torch.dtype) -> None:
    """All upper halves of f32 with the lower ones at which rounding changes."""
    lower = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    codes = (np.arange(2**16, dtype=np.uint32)[:, None] << 16 | lower).reshape(-1)
    wanted = torch.from_numpy(codes.view(np.float32)).to(dtype)
    got = apply(f"cvt.rn.{kind}.f32", codes, out=np.uint16)
    nan = torch.isnan(wanted).numpy()
    assert (got == np.where(nan, np.uint16(0x7FFF), wanted.view(torch.int16).numpy().view(np.uint16))).all()
    packed = apply(f"cvt.rn.{kind}x2.f32", codes, np.roll(codes, 1), out=np.uint32)
    assert (packed >> 16 == got).all() and (packed & 0xFFFF == np.roll(got, 1)).all()


def test_registers_may_be_wider() -> None:
    a = np.array([-1, 300, -129, 2**31 - 1], np.int32)
    assert (apply("cvt.s8.s32", a, out=np.int32) == a.astype(np.int8)).all()
    assert (apply("cvt.u8.s32", a, out=np.uint32) == a.astype(np.uint8)).all()
    assert (apply("cvt.s64.s16 %d, %a", a, out=np.int64) == a.astype(np.int16)).all()
    assert (apply("cvt.rzi.s8.f32", np.float32([-3.7, 200, -200, 5]), out=np.int64) == [-3, 127, -128, 5]).all()


# ---- tf32 and pairs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", expand("rna satfinite? tf32 f32") + expand("rn|rz relu? satfinite? tf32 f32"))
def test_tf32(name: str) -> None:
    codes = inputs("f32")
    expected = [convert(code, "cvt" + name) << 13 for code in codes]
    expected = [0x7FFFFFFF if code & 0x7FFFFFFF > 0x7F800000 else code for code in expected]
    assert_codes(apply("cvt" + name, np.array(codes, np.uint32), out=np.uint32), expected, [codes])


SMALL = ["e4m3", "e5m2", "e2m3", "e3m2", "e2m1"]
STRIDES = {"f16": 16, "bf16": 16, "e4m3": 8, "e5m2": 8, "e2m3": 8, "e3m2": 8, "e2m1": 4}
PAIRS_OF_SINGLES = expand("rn|rz relu? satfinite? f16x2|bf16x2 f32")
PAIRS_OF_SINGLES += expand(f"rn satfinite relu? {'|'.join(one + 'x2' for one in SMALL)} f32")
PAIRS_OF_PAIRS = expand(f"rn satfinite relu? {'|'.join(one + 'x2' for one in SMALL)} f16x2|bf16x2")
PAIRS_OF_PAIRS += expand(f"rn relu? f16x2 {'|'.join(one + 'x2' for one in SMALL)}")


def convert_pair(name: str, given: list[Array], out: Any) -> Array:
    """e2m1x2 is held in registers of 8 bits, which ld and st reach through wider ones."""
    if ".e2m1x2." in name:
        operands = ", ".join(f"%{letter}" for letter in "ab"[: len(given)])
        return apply(
            f"cvt{name} %x, {operands}; cvt.u16.u8 %d, %x", *given, out=out, registers=".reg .b8 %x;", target="sm_100a"
        )
    if name.endswith(".e2m1x2"):
        return apply(
            f"cvt.u8.u16 %x, %a; cvt{name} %d, %x", *given, out=out, registers=".reg .b8 %x;", target="sm_100a"
        )
    return apply("cvt" + name, *given, out=out, target="sm_100a")


def pair_dtype(kind: str) -> Any:
    return np.uint32 if STRIDES[kind] == 16 else np.uint16


@pytest.mark.parametrize("name", PAIRS_OF_SINGLES)
def test_pairs_of_singles(name: str) -> None:
    target = name.split(".")[-2].removesuffix("x2")
    codes = inputs("f32")
    upper, lower = np.array(codes, np.uint32), np.roll(np.array(codes, np.uint32), 1)
    halves = [convert(code, f"cvt{name}".replace(f"{target}x2", target)) for code in codes]
    expected = [high << STRIDES[target] | low for high, low in zip(halves, np.roll(halves, 1).tolist(), strict=True)]
    got = convert_pair(name, [upper, lower], pair_dtype(target))
    assert_codes(got, expected, [codes])


@pytest.mark.parametrize("name", PAIRS_OF_PAIRS)
def test_pairs_of_pairs(name: str) -> None:
    target, source = (kind.removesuffix("x2") for kind in name.split(".")[-2:])
    form = FORMATS[source]
    every_code = np.arange(2**form.bits, dtype=np.uint32)[:: 17 if form.bits == 16 else 1]
    codes = np.concatenate(
        [every_code, np.array([code for code in edges(FORMATS[source]) if form.bits == 16], np.uint32)]
    )
    scalar = f"cvt{name}".replace("x2", "")
    halves = np.array([convert(code, scalar) for code in codes.tolist()], np.uint32)
    packed = (codes << np.uint32(STRIDES[source]) | np.roll(codes, 1)).astype(pair_dtype(source))
    expected = halves << np.uint32(STRIDES[target]) | np.roll(halves, 1)
    got = convert_pair(name, [packed], pair_dtype(target))
    assert_codes(got, expected.tolist(), [packed.tolist()])


@pytest.mark.parametrize(
    ("kind", "dtype", "other"),
    [
        ("e4m3", torch.float8_e4m3fn, ml_dtypes.float8_e4m3fn),
        ("e5m2", torch.float8_e5m2, ml_dtypes.float8_e5m2),
        ("e2m3", None, ml_dtypes.float6_e2m3fn),
        ("e3m2", None, ml_dtypes.float6_e3m2fn),
        ("e2m1", None, ml_dtypes.float4_e2m1fn),
    ],
)
def test_torch_and_ml_dtypes_agree(kind: str, dtype: torch.dtype | None, other: Any) -> None:
    """On all small numbers, and all f16 within their range, where nothing is saturated."""
    codes = np.arange(2 ** FORMATS[kind].bits, dtype=np.uint8)
    values = codes.view(other).astype(np.float16)
    wide = convert_pair(f".rn.f16x2.{kind}x2", [codes.astype(np.uint16)], np.uint32) & 0xFFFF
    nan = np.isnan(values)
    assert (wide == np.where(nan, np.uint16(0x7FFF), bits_of(values))).all()
    if dtype:
        assert np.array_equal(torch.from_numpy(codes).view(dtype).to(torch.float16).numpy(), values, equal_nan=True)
    halves = every(np.uint16)
    numbers = halves.view(np.float16).astype(np.float32)
    inside = abs(numbers) <= float(ml_dtypes.finfo(other).max)
    narrow = convert_pair(f".rn.satfinite.{kind}x2.f32", [np.zeros_like(numbers), numbers], np.uint16) & 0xFF
    assert (narrow == numbers.astype(other).view(np.uint8))[inside].all()
    from_pair = convert_pair(f".rn.satfinite.{kind}x2.f16x2", [halves.astype(np.uint32)], np.uint16)
    assert (from_pair == narrow).all()
    if dtype:
        assert (narrow == torch.from_numpy(numbers).to(dtype).view(torch.uint8).numpy())[inside].all()
        assert (narrow[np.isnan(numbers)] == 0x7F).all()


def test_powers_of_two() -> None:
    codes = np.arange(256, dtype=np.uint16)
    wanted = codes.astype(np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    got = apply("cvt.rn.bf16x2.ue8m0x2", codes << 8 | codes[::-1], out=np.uint32, target="sm_100a")
    bits = np.where(np.isnan(wanted), np.uint32(0x7FFF), bits_of(wanted) >> 16)
    assert (got >> 16 == bits).all() and (got & 0xFFFF == bits[::-1]).all()


PACKS = expand("pack sat u16|s16 s32") + expand("pack sat u2|s2|u4|s4|u8|s8 s32 b32")


@pytest.mark.parametrize("name", PACKS)
def test_pack(name: str) -> None:
    kind = name.split(".")[3]
    bits = int(kind[1:])
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if kind[0] == "s" else (0, 2**bits - 1)
    a, b, c = elementwise.samples(np.int32, np.int32, np.uint32, count=500)
    x, y = (np.clip(elementwise.exact(one), low, high) & (2**bits - 1) for one in (a, b))
    wanted = x << bits | y
    given = [a, b]
    if bits < 16:
        wanted = wanted | elementwise.exact(c) << 2 * bits
        given.append(c)
    elementwise.assert_same(apply("cvt" + name, *given, out=np.uint32), elementwise.wrap(wanted, np.uint32), *given)


# ---- nothing left out ------------------------------------------------------------------------------------------------


def test_every_form_is_tested() -> None:
    tested = {*INTEGER_CASES, *FLOAT_CASES, "cvt.rn.bf16x2.ue8m0x2"}
    tested |= {"cvt" + name for name in (*PAIRS_OF_SINGLES, *PAIRS_OF_PAIRS, *PACKS)}
    tested |= {"cvt" + name for name in expand("rna satfinite? tf32 f32") + expand("rn|rz relu? satfinite? tf32 f32")}
    illegal = {f"cvt.sat.{d}.{s}" for d in INTEGERS for s in INTEGERS if holds_all(d, s)}
    assert elementwise.supported(["cvt"]) - illegal == tested


@pytest.mark.parametrize(
    "instruction",
    [
        *("cvt.f16.f32 %d, %a", "cvt.rn.f32.f16 %d, %a", "cvt.s32.f32 %d, %a", "cvt.rzi.s32.s16 %d, %a"),
        *("cvt.sat.s32.u8 %d, %a", "cvt.sat.u32.u16 %d, %a", "cvt.sat.u8.u8 %d, %a", "cvt.rn.sat.bf16.f32 %d, %a"),
        *("cvt.rn.e4m3x2.f32 %d, %a, %a", "cvt.rz.satfinite.e5m2x2.f32 %d, %a, %a", "cvt.rni.f16.f32 %d, %a"),
        *("cvt.rs.f16x2.f32 %d, %a, %a, %a", "cvt.rp.satfinite.ue8m0x2.f32 %d, %a, %a", "cvt.ftz.f16.f16 %d, %a"),
        *("cvt.rn.s32.f32 %d, %a", "cvt.rni.f32.s32 %d, %a", "cvt.rn.f32.tf32 %d, %a", "cvt.rn.f32.f16x2 %d, %a, %a"),
        *("cvt.rn.satfinite.f16x2.e4m3x2 %d, %a", "cvt.rn.e4m3x2.f16x2 %d, %a", "cvt.rn.ue8m0x2.bf16x2 %d, %a"),
        *("cvt.pack.sat.s32.u8.b32 %d, %a, %a, %a", "cvt.rn.relu.f32.f16 %d, %a", "cvt.rn.ftz.f64.s32 %d, %a"),
        *("cvt.rna.relu.tf32.f32 %d, %a", "cvt.pack.u8.s32.b32 %d, %a, %a, %a", "cvt.rn.relu.sat.f16.f32 %d, %a"),
    ],
)
def test_what_is_not_there_is_refused(instruction: str) -> None:
    with pytest.raises(elementwise.ptx.PtxError, match="is not supported|are not supported together"):
        apply(instruction, np.zeros(1, np.uint32), out=np.uint32)


def test_zero_is_rectified_to_plus_zero() -> None:
    assert rectify(Number("finite", negative=True)) == ZERO
    minus = np.array([0x80000000], np.uint32)
    assert apply("cvt.rn.relu.f16.f32", minus, out=np.uint16)[0] == 0


def test_formats_of_the_oracle() -> None:
    """Against ml_dtypes: what the other tests rest on."""
    others: dict[str, Any] = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "e4m3": ml_dtypes.float8_e4m3fn}
    for kind, other in others.items():
        form: Format = FORMATS[kind]
        info = ml_dtypes.finfo(other)
        assert decode(form.largest, form).value == Fraction(float(info.max))
        assert decode(1, form).value == Fraction(float(info.smallest_subnormal))
