"""Random instructions for random_programs.py: the text of each, and what it gives for all threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from random_statements import Frame, Op, Threads

Array = np.ndarray[Any, Any]
Value = Callable[[Any], Any]  # of the registers of a function
Read = tuple[str, Value]
KINDS = {8: "h", 16: "h", 32: "r", 64: "d"}
INTEGERS = [f"{sign}{bits}" for bits in (8, 16, 32, 64) for sign in "us"]


def dtype(type_name: str) -> np.dtype[Any]:
    return np.dtype(f"{'int' if type_name[0] == 's' else 'uint'}{type_name[1:]}")


def ones(bits: int) -> Any:
    return np.array([2**bits - 1], f"uint{bits}")


def low_mask(length: Array, bits: int) -> Array:
    """As many ones."""
    one, width = np.array([1], f"uint{bits}"), length.astype(f"uint{bits}")
    return np.where(length >= bits, ones(bits), (one << np.minimum(width, bits - 1)) - one)


def shifted_left(a: Array, by: Array, bits: int) -> Array:
    return np.where(by >= bits, a.dtype.type(0), a << np.minimum(by, bits - 1).astype(a.dtype))


def shifted_right(a: Array, by: Array, bits: int) -> Array:
    """Clamped; signed numbers keep their sign."""
    far = a >> np.array([bits - 1], a.dtype) if a.dtype.kind == "i" else np.zeros_like(a)
    return np.where(by >= bits, far, a >> np.minimum(by, bits - 1).astype(a.dtype))


def extracted(a: Array, position: Array, length: Array, bits: int) -> Array:
    position, length = (one.astype(np.int64) & 255 for one in (position, length))
    plain = a.view(f"uint{bits}")
    inside = low_mask(np.minimum(length, np.maximum(bits - position, 0)), bits)
    field = shifted_right(plain, position, bits) & inside
    if a.dtype.kind == "u":
        return field
    last = np.clip(position + length - 1, 0, bits - 1)
    sign = (shifted_right(plain, last, bits) & plain.dtype.type(1)).astype(bool) & (length != 0)
    return np.where(sign, field | ~inside, field)


def inserted(a: Array, b: Array, position: Array, length: Array, bits: int) -> Array:
    position, length = (one.astype(np.int64) & 255 for one in (position, length))
    mask = shifted_left(low_mask(length, bits), position, bits)
    return (b & ~mask) | (shifted_left(a, position, bits) & mask)


def product_high(a: Array, b: Array) -> Array:
    if a.dtype.itemsize < 8:
        wide = a.astype(f"{a.dtype.kind}8") * b.astype(f"{a.dtype.kind}8")
        return wide >> np.array([8 * a.dtype.itemsize], wide.dtype)
    return np.array((a.astype(object) * b.astype(object)) >> 64, dtype=object).astype(a.dtype)


def quotient(a: Array, b: Array) -> Array:
    """Towards zero, of a positive divisor."""
    down = a // b
    return np.where((a < 0) & (down * b != a), down + down.dtype.type(1), down)


def reversed_bits(a: Array, bits: int) -> Array:
    result = np.zeros_like(a)
    for i in range(bits):
        result |= ((a >> a.dtype.type(i)) & a.dtype.type(1)) << a.dtype.type(bits - 1 - i)
    return result


def leading_zeros(a: Array, bits: int) -> Array:
    result = np.full(a.shape, bits, np.uint32)
    for i in range(bits):
        result[(a >> a.dtype.type(i)) & a.dtype.type(1) != 0] = bits - 1 - i
    return result


def permuted(a: Array, b: Array, selector: Array) -> Array:
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.uint64(0)
    for i in range(4):
        nibble = (selector.astype(np.uint64) >> np.uint64(4 * i)) & np.uint64(15)
        byte = (both >> ((nibble & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        byte = np.where(nibble > 7, (byte >> np.uint64(7)) * np.uint64(255), byte)
        result = result | byte << np.uint64(8 * i)
    return result


def looked_up(table: int, a: Array, b: Array, c: Array) -> Array:
    result = np.zeros_like(a ^ b ^ c)
    for i in range(8):
        if table >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


def funnel(a: Array, b: Array, by: Array, left: bool, wrap: bool) -> Array:
    amount = (by & np.uint32(31) if wrap else np.minimum(by, np.uint32(32))).astype(np.uint64)
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    return (both << amount) >> np.uint64(32) if left else both >> amount


def f32(bits: Array) -> Array:
    return np.ascontiguousarray(bits).view(np.float32)


def canonical(value: Array) -> Array:
    value = np.asarray(value).astype(np.float32)
    return np.where(np.isnan(value), np.uint32(0x7FFFFFFF), value.view(np.uint32))


def fused(a: Array, b: Array, c: Array) -> Array:
    """The product is exact in double; the sum is rounded to odd there, so that rounding it again is right."""
    product, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    even = total.view(np.int64) & 1 == 0
    odd = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    return np.where(np.isfinite(total) & (error != 0) & even, odd, total)


def extremum(a: Array, b: Array, maximum: bool) -> Array:
    """The number if the other is none; -0 is below +0."""
    result = np.fmax(a, b) if maximum else np.fmin(a, b)
    zeros = (a == 0) & (b == 0)
    negative = np.signbit(a) & np.signbit(b) if maximum else np.signbit(a) | np.signbit(b)
    return np.where(zeros, np.where(negative, np.float32(-0.0), np.float32(0)), result)


def saturated(value: Array, to: str) -> Array:
    """Integers clipped to a type."""
    info = np.iinfo(dtype(to))
    if value.dtype.kind == "u":
        return np.minimum(value, np.uint64(info.max))
    return np.maximum(np.minimum(value, min(info.max, 2**63 - 1)), max(info.min, -(2**63)))


def held(value: Array, type_name: str, kind: str) -> Array:
    """A value of a type in a register that may be wider: extended as its sign says."""
    return value.astype(dtype(type_name)).astype(f"int{dict(h=16, r=32, d=64)[kind]}")


RELATIONS: dict[str, Callable[[Any, Any], Any]] = {
    **{"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal},
    **{"gt": np.greater, "ge": np.greater_equal},
}
PLAIN: dict[str, Callable[[Any, Any], Any]] = {
    "add": np.add, "sub": np.subtract, "mul.lo": np.multiply, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "mul.hi": product_high,
}  # fmt: skip


class Operations:
    def __init__(self, random: np.random.Generator) -> None:
        self.random = random
        self.scopes: list[list[str]] = []
        self.in_kernel = False
        self.count = 0

    # ---- dice ----

    def below(self, limit: int) -> int:
        return int(self.random.integers(limit))

    def pick(self, some: Sequence[Any]) -> Any:
        return some[self.below(len(some))]

    def chance(self, probability: float) -> bool:
        return bool(self.random.random() < probability)

    # ---- registers ----

    def number(self) -> int:
        self.count += 1
        return self.count

    def name(self, kind: str) -> str:
        return f"%{kind}t{self.number()}"

    def choose(self, kind: str) -> str:
        """One that is defined, more often a recent one."""
        every = [name for scope in self.scopes for name in scope if name[1] == kind]
        if not every:
            return ""
        recent = every[-4:]
        name: str = self.pick(recent) if self.chance(0.5) else self.pick(every)
        return name

    def target(self, kind: str, guard: tuple[str, bool] | None) -> tuple[str, tuple[str, ...]]:
        """Where to write, and what that defines."""
        if guard is None and self.chance(0.45):
            name = self.name(kind)
            self.scopes[-1].append(name)
            return name, (name,)
        name = self.choose(kind)
        if name:
            return name, ()
        assert guard is None
        return self.target(kind, None)

    def guard(self) -> tuple[str, bool]:
        return self.choose("p"), self.chance(0.5)

    def read(self, type_name: str, wider: bool = False, register: bool = False) -> Read:
        """An operand: a register, of which the low bits are read where it may be wider, or an immediate."""
        if type_name == "f32":
            name = self.choose("f")
            if name and not self.chance(0.15):
                return name, lambda frame: f32(frame[name])
            bits = int(self.pick([0, 0x80000000, 0x3F800000, 0x7F800000, 0x7FC00001, 1, self.below(2**32)]))
            return f"0f{bits:08X}", lambda frame: f32(np.array([bits], np.uint32))
        bits = int(type_name[1:])
        kinds = "".join(kind for kind, size in dict(h=16, r=32, d=64).items() if size >= bits)
        name = self.choose(self.pick(kinds) if wider else KINDS[bits])
        to = dtype(type_name)
        if name and (register or not self.chance(0.15)):
            return name, lambda frame: frame[name].astype(f"uint{bits}").view(to)
        value = int(self.pick([0, 1, 2, 31, 32, 33, 2**bits - 1, 2 ** (bits - 1), self.below(2**63) % 2**bits]))
        constant = np.array([value % 2**bits], f"uint{bits}").view(to)
        return str(int(constant[0])), lambda frame: constant

    # ---- instructions with one result: text with {} for it, and its value ----

    def operation(self, kind: str, target: str) -> Op:
        """An instruction without a guard that writes this register."""
        text, value = self.result(kind)
        return self.writing(text, value, target)

    def simple(self) -> Op:
        guard = self.guard() if self.chance(0.35) else None
        kind = self.pick("hrrrddfp")
        text, value = self.result(kind)
        target, defines = self.target(kind, guard)
        return self.writing(text, value, target, defines, guard)

    def writing(
        self,
        text: str,
        value: Value,
        target: str,
        defines: tuple[str, ...] = (),
        guard: tuple[str, bool] | None = None,
    ) -> Op:
        def effect(threads: Threads, frame: Frame, lanes: Array) -> None:
            frame.write(target, value(frame), lanes)

        return Op([text.replace("{}", target)], effect, defines, guard)

    def result(self, kind: str) -> tuple[str, Value]:
        if kind == "p":
            return self.predicate()
        if kind == "f":
            return self.real()
        makers: list[Callable[[str], tuple[str, Value]]] = [self.integer] * 4 + [self.convert] * 2
        makers += [self.select, self.word if kind == "r" else self.integer]
        makers += [self.wide] if kind in "rd" else []
        makers += [self.bits] if kind in "rd" else []
        text, value = self.pick(makers)(kind)
        return text, value

    def integer(self, kind: str) -> tuple[str, Value]:
        bits = dict(h=16, r=32, d=64)[kind]
        t = self.pick("us") + str(bits)
        which = self.below(12)
        if which < 4:
            name = self.pick(list(PLAIN))
            (a, x), (b, y) = self.read(t), self.read(t)
            shown = f"b{bits}" if name in ("and", "or", "xor") else t
            return f"{name}.{shown} {{}}, {a}, {b}", lambda r: PLAIN[name](x(r), y(r))
        if which == 4:
            (a, x), (b, y), (c, z) = self.read(t), self.read(t), self.read(t)
            if self.chance(0.5):
                return f"mad.lo.{t} {{}}, {a}, {b}, {c}", lambda r: x(r) * y(r) + z(r)
            return (
                f"mad.hi.{t} {{}}, {a}, {b}, {c}",
                lambda r: product_high(x(r), y(r)).astype(dtype(t)) + z(r),
            )
        if which == 5:
            name, (a, x) = self.pick(["neg", "abs", "not"]), self.read(f"s{bits}")
            shown = f"b{bits}" if name == "not" else f"s{bits}"
            return f"{name}.{shown} {{}}, {a}", lambda r: {"neg": np.negative, "abs": np.abs, "not": np.invert}[name](
                x(r)
            )
        if which == 6:
            name, (a, x), divisor = self.pick(["div", "rem"]), self.read(t), 1 + self.below(2 ** self.pick([3, 7, 14]))
            by = np.array([divisor], dtype(t))
            if name == "div":
                return f"div.{t} {{}}, {a}, {divisor}", lambda r: quotient(x(r), by)
            return f"rem.{t} {{}}, {a}, {divisor}", lambda r: x(r) - quotient(x(r), by) * by
        if which < 10:
            (a, x), (b, y) = self.read(t), self.read("u32")
            if self.chance(0.5):
                return f"shl.b{bits} {{}}, {a}, {b}", lambda r: shifted_left(x(r), y(r), bits)
            return f"shr.{t} {{}}, {a}, {b}", lambda r: shifted_right(x(r), y(r), bits)
        if kind == "r" and which == 10:
            name, (a, x), (b, y) = self.pick(["add", "sub"]), self.read("s32"), self.read("s32")
            return f"{name}.sat.s32 {{}}, {a}, {b}", lambda r: saturated(
                PLAIN[name](x(r).astype(np.int64), y(r).astype(np.int64)), "s32"
            )
        a, x = self.read(t)
        return f"mov.b{bits} {{}}, {a}", x

    def convert(self, kind: str) -> tuple[str, Value]:
        """To a type that may be narrower than the register, from one that may be."""
        bits = dict(h=16, r=32, d=64)[kind]
        to = self.pick([one for one in INTEGERS if int(one[1:]) <= bits])
        if self.chance(0.2) and to not in ("s64", "u64"):
            (a, x), mode, info = self.read("f32", register=True), self.pick(["rzi", "rni"]), np.iinfo(dtype(to))

            def rounded(r: Any) -> Array:
                value = x(r).astype(np.float64)
                value = np.nan_to_num(np.trunc(value) if mode == "rzi" else np.rint(value), posinf=1e30, neginf=-1e30)
                return held(np.clip(value, info.min, info.max).astype(np.int64), to, kind)

            return f"cvt.{mode}.{to}.f32 {{}}, {a}", rounded
        source = self.pick(INTEGERS)
        a, x = self.read(source, wider=True, register=True)
        low, high = np.iinfo(dtype(to)), np.iinfo(dtype(source))
        if (low.min > high.min or low.max < high.max) and self.chance(0.4):
            return (
                f"cvt.sat.{to}.{source} {{}}, {a}",
                lambda r: held(saturated(x(r).astype(f"{dtype(source).kind}8"), to), to, kind),
            )
        return f"cvt.{to}.{source} {{}}, {a}", lambda r: held(x(r), to, kind)

    def select(self, kind: str) -> tuple[str, Value]:
        t = f"u{dict(h=16, r=32, d=64)[kind]}"
        (a, x), (b, y), p = self.read(t), self.read(t), self.choose("p")
        if not p:
            return self.integer(kind)
        return f"selp.b{t[1:]} {{}}, {a}, {b}, {p}", lambda r: np.where(r[p], x(r), y(r))

    def wide(self, kind: str) -> tuple[str, Value]:
        t = self.pick("us") + ("16" if kind == "r" else "32")
        full = t[0] + str(2 * int(t[1:]))
        (a, x), (b, y), (c, z) = self.read(t), self.read(t), self.read(full)
        if self.chance(0.5):
            return f"mul.wide.{t} {{}}, {a}, {b}", lambda r: x(r).astype(dtype(full)) * y(r).astype(dtype(full))
        return (
            f"mad.wide.{t} {{}}, {a}, {b}, {c}",
            lambda r: x(r).astype(dtype(full)) * y(r).astype(dtype(full)) + z(r),
        )

    def bits(self, kind: str) -> tuple[str, Value]:
        bits = dict(r=32, d=64)[kind]
        (a, x), (b, y) = self.read(f"u{bits}"), self.read(f"u{bits}")
        (c, z), (d, w) = self.read("u32"), self.read("u32")
        which = self.below(3)
        if which == 0:
            return f"bfi.b{bits} {{}}, {a}, {b}, {c}, {d}", lambda r: inserted(x(r), y(r), z(r), w(r), bits)
        if which == 1:
            t = self.pick("us") + str(bits)
            e, v = self.read(t)
            return f"bfe.{t} {{}}, {e}, {c}, {d}", lambda r: extracted(v(r), z(r), w(r), bits)
        return f"brev.b{bits} {{}}, {a}", lambda r: reversed_bits(x(r), bits)

    def word(self, kind: str) -> tuple[str, Value]:
        (a, x), (b, y), (c, z), which = self.read("u32"), self.read("u32"), self.read("u32"), self.below(6)
        if which == 0:
            return f"prmt.b32 {{}}, {a}, {b}, {c}", lambda r: permuted(x(r), y(r), z(r))
        if which == 1:
            table = self.below(256)
            return f"lop3.b32 {{}}, {a}, {b}, {c}, {table}", lambda r: looked_up(table, x(r), y(r), z(r))
        if which == 2:
            side, mode = self.pick("lr"), self.pick(["wrap", "clamp"])
            return (
                f"shf.{side}.{mode}.b32 {{}}, {a}, {b}, {c}",
                lambda r: funnel(x(r), y(r), z(r), side == "l", mode == "wrap"),
            )
        if which == 3:
            name = self.choose("f")
            if name:
                return f"mov.b32 {{}}, {name}", lambda r: r[name]
        bits = self.pick([32, 64])
        e, v = self.read(f"u{bits}")
        if which == 4:
            return f"popc.b{bits} {{}}, {e}", lambda r: np.bitwise_count(v(r))
        return f"clz.b{bits} {{}}, {e}", lambda r: leading_zeros(v(r), bits)

    def real(self) -> tuple[str, Value]:
        which = self.below(12)
        if which < 2 or not self.choose("f"):
            a, x = self.read("u32", register=True)
            return f"mov.b32 {{}}, {a}", x
        if which < 4:
            t = self.pick(INTEGERS)
            a, x = self.read(t, wider=True, register=True)
            return f"cvt.rn.f32.{t} {{}}, {a}", lambda r: canonical(x(r).astype(np.float32))
        (a, x), (b, y), (c, z) = (self.read("f32") for _ in range(3))
        if which == 4:
            return f"fma.rn.f32 {{}}, {a}, {b}, {c}", lambda r: canonical(fused(x(r), y(r), z(r)))
        if which == 5:
            p = self.choose("p")
            if p:
                return f"selp.f32 {{}}, {a}, {b}, {p}", lambda r: np.where(r[p], x(r).view("u4"), y(r).view("u4"))
        if which == 6:
            a, x = self.read("f32", register=True)
            name, sign = self.pick([("neg", np.negative), ("abs", np.abs)])
            return f"{name}.f32 {{}}, {a}", lambda r: canonical(sign(x(r)))
        if which < 9:
            name = self.pick(["min", "max"])
            return f"{name}.f32 {{}}, {a}, {b}", lambda r: canonical(extremum(x(r), y(r), name == "max"))
        name, f = self.pick([("add", np.add), ("sub", np.subtract), ("mul", np.multiply)])
        return f"{name}.f32 {{}}, {a}, {b}", lambda r: canonical(f(x(r), y(r)))

    def comparison(self) -> tuple[str, Value]:
        """The text behind "setp." up to the results, then the sources; whether it holds."""
        t = self.pick(["u16", "s16", "u32", "s32", "u64", "s64", "f32"])
        (a, x), (b, y) = self.read(t), self.read(t)
        name = self.pick(list(RELATIONS))
        if t != "f32":
            return f"{name}%.{t} {{}}, {a}, {b}", lambda r: RELATIONS[name](x(r), y(r))
        unordered = self.chance(0.4)

        def holds(r: Any) -> Array:
            none = np.isnan(x(r)) | np.isnan(y(r))
            return none | RELATIONS[name](x(r), y(r)) if unordered else ~none & RELATIONS[name](x(r), y(r))

        return f"{name}{'u' * unordered}%.f32 {{}}, {a}, {b}", holds

    def predicate(self) -> tuple[str, Value]:
        p, q, no = self.choose("p"), self.choose("p"), self.chance(0.5)
        which = self.below(8)
        if p and which == 0:
            name = self.pick(["and", "or", "xor"])
            return f"{name}.pred {{}}, {p}, {q}", lambda r: PLAIN[name](r[p], r[q])
        if p and which == 1:
            return f"{self.pick(['not'])}.pred {{}}, {p}", lambda r: ~r[p]
        text, holds = self.comparison()
        if p and which < 5:
            name = self.pick(["and", "or", "xor"])
            return (
                f"setp.{text.replace('%.', f'.{name}.', 1)}, {'!' * no}{q}",
                lambda r: PLAIN[name](holds(r), r[q] != no),
            )
        return f"setp.{text.replace('%.', '.', 1)}", holds
