"""Random straight-line programs with branches forward, against an interpreter of a few lines of numpy.

The interpreter shares nothing with the emulator: a program is a list of (text, function of the registers), and lanes
that a branch skips keep their registers.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sparse24 import ptx

THREADS, NARROW, WIDE, FLOATS = 96, 6, 4, 4
Registers = dict[str, np.ndarray[Any, Any]]
Step = tuple[str, str, Callable[[Registers], Any]]  # text, the result's register, its value


def u64(values: Any) -> Any:
    return values.astype(np.uint64)


def signed(values: Any) -> Any:
    return values.view(f"int{8 * values.dtype.itemsize}")


def permuted(a: Any, b: Any, selector: Any) -> Any:
    both, result = u64(a) | u64(b) << np.uint64(32), np.zeros(a.shape, np.uint64)
    for i in range(4):
        nibble = u64(selector) >> np.uint64(4 * i) & np.uint64(15)
        byte = both >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        sign = (byte >> np.uint64(7)) * np.uint64(255)
        result |= np.where(nibble > 7, sign, byte) << np.uint64(8 * i)
    return result


def looked_up(table: int, a: Any, b: Any, c: Any) -> Any:
    result = np.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


def step(dice: random.Random) -> Step:
    a, b, c, d = (f"%r{dice.randrange(NARROW)}" for _ in range(4))
    x, y, z = (f"%d{dice.randrange(WIDE)}" for _ in range(3))
    f, g, h = (f"%f{dice.randrange(FLOATS)}" for _ in range(3))
    p = f"%p{dice.randrange(2)}"
    shift, position, length, table = dice.randrange(32), dice.randrange(32), dice.randrange(1, 33), dice.randrange(256)
    mask = np.uint64(2**length - 1)
    operation = dice.choice(["add", "sub", "and", "or", "xor", "min", "max"])
    plain: dict[str, Callable[[Any, Any], Any]] = {
        "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
        "min": np.minimum, "max": np.maximum,
    }  # fmt: skip
    kind = "b" if operation in ("and", "or", "xor") else "u"
    compare = dice.choice(["lt", "le", "gt", "ge", "eq", "ne"])
    relation = getattr(np, {"lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal"}.get(
        compare, {"eq": "equal", "ne": "not_equal"}.get(compare, "")))  # fmt: skip
    guard = dice.choice(["min", "max"])
    steps: list[Step] = [
        (f"{operation}.{kind}32 {d}, {a}, {b}", d, lambda r: plain[operation](r[a], r[b])),
        (f"{operation}.{kind}64 {z}, {x}, {y}", z, lambda r: plain[operation](r[x], r[y])),
        (f"{guard}.s32 {d}, {a}, {b}", d, lambda r: plain[guard](signed(r[a]), signed(r[b])).view(np.uint32)),
        (f"mul.lo.u32 {d}, {a}, {b}", d, lambda r: r[a] * r[b]),
        (f"mul.hi.u32 {d}, {a}, {b}", d, lambda r: u64(r[a]) * u64(r[b]) >> np.uint64(32)),
        (f"mul.wide.s32 {z}, {a}, {b}", z, lambda r: (signed(r[a]).astype(np.int64) * signed(r[b])).view(np.uint64)),
        (f"mul.lo.u64 {z}, {x}, {y}", z, lambda r: r[x] * r[y]),
        (f"mad.lo.u32 {d}, {a}, {b}, {c}", d, lambda r: r[a] * r[b] + r[c]),
        (f"mad.wide.u32 {z}, {a}, {b}, {x}", z, lambda r: u64(r[a]) * u64(r[b]) + r[x]),
        (f"shl.b32 {d}, {a}, {shift}", d, lambda r: r[a] << np.uint32(shift)),
        (f"shr.u32 {d}, {a}, {shift}", d, lambda r: r[a] >> np.uint32(shift)),
        (f"shr.s32 {d}, {a}, {shift}", d, lambda r: (signed(r[a]) >> np.int32(shift)).view(np.uint32)),
        (f"shr.s64 {z}, {x}, {shift}", z, lambda r: (signed(r[x]) >> np.int64(shift)).view(np.uint64)),
        (f"prmt.b32 {d}, {a}, {b}, {c}", d, lambda r: permuted(r[a], r[b], r[c])),
        (f"lop3.b32 {d}, {a}, {b}, {c}, {table}", d, lambda r: looked_up(table, r[a], r[b], r[c])),
        (f"bfe.u32 {d}, {a}, {position}, {length}", d, lambda r: u64(r[a]) >> np.uint64(position) & mask),
        (f"bfi.b32 {d}, {a}, {b}, {position}, {length}", d, lambda r:
            (u64(r[b]) & ~(mask << np.uint64(position)) | (u64(r[a]) & mask) << np.uint64(position))
            & np.uint64(2**32 - 1)),
        (f"cvt.u64.u32 {z}, {a}", z, lambda r: r[a]),
        (f"cvt.s64.s32 {z}, {a}", z, lambda r: signed(r[a]).astype(np.int64).view(np.uint64)),
        (f"cvt.u32.u64 {d}, {x}", d, lambda r: r[x] & np.uint64(2**32 - 1)),
        (f"cvt.s32.s8 {d}, {a}", d, lambda r: r[a].astype(np.uint8).view(np.int8).astype(np.int32).view(np.uint32)),
        (f"cvt.u32.u16 {d}, {a}", d, lambda r: r[a] & np.uint32(65535)),
        (f"setp.{compare}.s32 {p}, {a}, {b}", p, lambda r: relation(signed(r[a]), signed(r[b]))),
        (f"setp.{compare}.u64 {p}, {x}, {y}", p, lambda r: relation(r[x], r[y])),
        (f"setp.{compare}.f32 {p}, {f}, {g}", p, lambda r: relation(r[f], r[g])),
        (f"selp.b32 {d}, {a}, {b}, {p}", d, lambda r: np.where(r[p], r[a], r[b])),
        (f"add.f32 {h}, {f}, {g}", h, lambda r: r[f] + r[g]),
        (f"mul.f32 {h}, {f}, {g}", h, lambda r: r[f] * r[g]),
        (f"min.f32 {h}, {f}, {g}", h, lambda r: np.fmin(r[f], r[g])),
        (f"cvt.rn.f32.s8 {h}, {a}", h, lambda r: r[a].astype(np.uint8).view(np.int8).astype(np.float32)),
    ]  # fmt: skip
    return dice.choice(steps)


def build(dice: random.Random, length: int) -> tuple[list[str], Callable[[Registers], None]]:
    lines: list[str] = []
    skips: list[tuple[int, int, str, bool]] = []  # from here, to there, the predicate, whether it is negated
    steps: list[tuple[Step, str, bool]] = []
    at = 0
    while at < length:
        skips.append((at, min(length, at + dice.randrange(1, 12)), f"%p{dice.randrange(2)}", dice.random() < 0.5))
        at += dice.randrange(2, 9)
    for i in range(length + 1):
        lines += [f"L{n}:" for n, skip in enumerate(skips) if skip[1] == i]
        lines += [f"@{'!' * no}{p} bra L{n};" for n, (first, _, p, no) in enumerate(skips) if first == i]
        if i == length:
            break
        one = step(dice)
        guard = dice.choice(["", "", "", "%p0", "%p1"])
        negated = dice.random() < 0.5
        lines.append(f"@{'!' * negated}{guard} {one[0]};" if guard else f"{one[0]};")
        steps.append((one, guard, negated))

    def run(registers: Registers) -> None:
        resume = np.zeros(THREADS, np.int64)  # where each lane goes on
        for i, ((_, target, value), guard, negated) in enumerate(steps):
            for first, end, p, no in skips:
                if first == i:
                    taken = (resume <= i) & (registers[p] != no)
                    resume[taken] = end
            lanes = resume <= i
            if guard:
                lanes &= registers[guard] != negated
            with np.errstate(all="ignore"):
                result = np.asarray(value(registers))
            registers[target] = np.where(lanes, result, registers[target]).astype(registers[target].dtype)

    return lines, run


def source(lines: list[str]) -> str:
    moves = [("%r", "b32", NARROW, 4, "n"), ("%d", "b64", WIDE, 8, "w"), ("%f", "f32", FLOATS, 4, "f")]
    text = [".version 8.6\n.target sm_90\n.address_size 64"]
    text += [".visible .entry k(.param .u64 n, .param .u64 w, .param .u64 f)"]
    text += [
        "{\n.reg .pred %p<2>; .reg .b32 %r<6>, %t; .reg .b64 %d<4>, %q<4>; .reg .f32 %f<4>;",
        "mov.u32 %t, %tid.x;",
    ]
    for action in ("ld", "st"):
        for i, (prefix, kind, count, size, name) in enumerate(moves):
            if action == "ld":
                text.append(f"ld.param.u64 %q{i}, [{name}]; mul.wide.u32 %q3, %t, {count * size};")
                text.append(f"add.u64 %q{i}, %q{i}, %q3;")
            for n in range(count):
                address = f"[%q{i}+{n * size}]"
                text.append(
                    f"ld.global.{kind} {prefix}{n}, {address};"
                    if action == "ld"
                    else f"st.global.{kind} {address}, {prefix}{n};"
                )
        if action == "ld":
            text += ["setp.lt.s32 %p0, %r0, 0; setp.lt.s32 %p1, %r1, 0;", *lines]
    return "\n".join([*text, "ret;", "}"]) + "\n"


@pytest.mark.parametrize("seed", range(60))
def test_random_program(seed: int) -> None:
    dice, generator = random.Random(seed), np.random.default_rng(seed)
    lines, run = build(dice, 80)
    narrow = generator.integers(0, 2**32, (THREADS, NARROW), dtype=np.uint32)
    wide = generator.integers(0, 2**64, (THREADS, WIDE), dtype=np.uint64)
    narrow[::3] >>= np.uint32(26)
    floats = generator.standard_normal((THREADS, FLOATS)).astype(np.float32)

    registers: Registers = {f"%r{i}": narrow[:, i].copy() for i in range(NARROW)}
    registers |= {f"%d{i}": wide[:, i].copy() for i in range(WIDE)}
    registers |= {f"%f{i}": floats[:, i].copy() for i in range(FLOATS)}
    registers |= {"%p0": signed(registers["%r0"]) < 0, "%p1": signed(registers["%r1"]) < 0}
    run(registers)

    text = source(lines)
    ptx.load(text).launch("k", 1, THREADS, [narrow, wide, floats]).raise_for_errors()
    for array, prefix in ((narrow, "%r"), (wide, "%d"), (floats, "%f")):
        for i in range(array.shape[1]):
            actual, expected = np.ascontiguousarray(array[:, i]), registers[f"{prefix}{i}"]
            if array is floats:  # which NaN numpy gives depends on the processor
                actual, expected = (np.where(np.isnan(v), np.float32(np.nan), v) for v in (actual, expected))
            same = actual.view(np.uint8) == np.ascontiguousarray(expected).view(np.uint8)
            assert same.all(), f"{prefix}{i} of {seed}:\n{text}"
