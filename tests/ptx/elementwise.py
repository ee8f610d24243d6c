"""Runs single PTX instructions over numpy arrays, one thread an element, and reads the table of what is supported.

``apply("add.s32", a, b, out=np.int32)`` executes ``add.s32 %d, %a, %b``. Text with operands is taken as it is, and may
be several instructions: ``apply("setp.lt.s32 %p, %a, %b; selp.u32 %d, 1, 0, %p", a, b, out=np.uint32)``.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from sparse24 import ptx

INPUTS = "abcefg"  # %a, %b, ... in the order of the arrays
# What the types of PTX are in numpy; bf16 and pairs as their bits.
DTYPES: dict[str, Any] = {
    **{f"{letter}{bits}": np.dtype(f"uint{bits}") for letter in "ub" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{"f16": np.dtype(np.float16), "bf16": np.dtype(np.uint16), "f32": np.dtype(np.float32)},
    **{"f64": np.dtype(np.float64)},
    **dict.fromkeys(("f16x2", "bf16x2", "u16x2", "s16x2"), np.dtype(np.uint32)),
}
executed: set[str] = set()  # the opcodes, with modifiers, of everything that apply() has run


def _bits(dtype: np.dtype[Any]) -> int:
    """Of the register that holds it."""
    return max(16, 8 * dtype.itemsize)


def _access(dtype: np.dtype[Any]) -> str:
    """The type with which ld and st move it."""
    kind = "s" if dtype.kind == "i" else "u"
    return f"{kind}{8 * dtype.itemsize}" if dtype.itemsize == 1 else f"b{8 * dtype.itemsize}"


def source(
    instruction: str, inputs: Sequence[np.dtype[Any]], outputs: Sequence[np.dtype[Any]], registers: str, target: str
) -> str:
    """The PTX of a kernel that executes the instruction for each element."""
    results = ["%d"] if len(outputs) == 1 else [f"%d{i}" for i in range(len(outputs))]
    sources = [f"%{letter}" for letter in INPUTS[: len(inputs)]]
    if "%" not in instruction:
        instruction = f"{instruction} {', '.join(results + sources)}"
    names = results + sources
    dtypes = [*outputs, *inputs]
    parameters = [f".param .u64 array{i}" for i in range(len(dtypes))] + [".param .u32 count"]
    lines = [
        f".version 8.8\n.target {target}\n.address_size 64",
        f".visible .entry elementwise({', '.join(parameters)})",
        "{",
        ".reg .pred %outside, %p, %q, %r; .reg .b32 %block, %threads, %index; .reg .b64 %address, %offset;",
        *(f".reg .b{_bits(dtype)} {name};" for name, dtype in zip(names, dtypes, strict=True)),
        registers,
        "mov.u32 %index, %tid.x; mov.u32 %block, %ctaid.x; mov.u32 %threads, %ntid.x;",
        "mad.lo.u32 %index, %block, %threads, %index;",
        "ld.param.u32 %block, [count]; setp.ge.u32 %outside, %index, %block; @%outside bra DONE;",
    ]

    def address(i: int) -> str:
        size = dtypes[i].itemsize
        return (
            f"ld.param.u64 %address, [array{i}]; mul.wide.u32 %offset, %index, {size}; "
            "add.u64 %address, %address, %offset;"
        )

    for i in range(len(outputs), len(dtypes)):
        lines.append(f"{address(i)} ld.global.{_access(dtypes[i])} {names[i]}, [%address];")
    lines.append(f"{instruction};")
    for i in range(len(outputs)):
        lines.append(f"{address(i)} st.global.{_access(dtypes[i])} [%address], {names[i]};")
    return "\n".join([*lines, "DONE:", "ret;", "}"]) + "\n"


@functools.lru_cache(maxsize=256)
def _module(text: str) -> ptx.Module:
    return ptx.load(text)


def apply(
    instruction: str,
    *inputs: Any,
    out: Any,
    registers: str = "",
    block: int = 96,
    target: str = "sm_90",
    checks: str = "all",
) -> Any:
    """The results of an instruction for each element of the inputs.

    instruction: without operands they are %d (%d0, %d1, ... for several results), then %a, %b, ... in the order of the
        inputs. The text may use the predicates %p, %q, %r and what `registers` declares.
    inputs: arrays or scalars, broadcast against each other. A bf16 or a pair is given as its bits.
    out: a dtype, or a tuple of them; the result is an array, or a tuple.
    block: threads; the last warp, and the last block, are in general not full.

    Raises PtxError where the instruction is not supported, and KernelError for anything that the checks find.
    """
    arrays = np.broadcast_arrays(*inputs)
    shape = arrays[0].shape
    contiguous = [np.ascontiguousarray(array).reshape(-1).copy() for array in arrays]
    wanted = out if isinstance(out, tuple) else (out,)
    results = [np.zeros(contiguous[0].size, np.dtype(dtype)) for dtype in wanted]
    text = source(instruction, [a.dtype for a in contiguous], [r.dtype for r in results], registers, target)
    count = contiguous[0].size
    grid = max(1, -(-count // block))
    report = _module(text).launch(
        "elementwise", grid, block, [*map(_plain, results), *map(_plain, contiguous), count], checks=checks
    )
    report.raise_for_errors()
    executed.update(name for name, warps in report.counters.opcodes.items() if warps)
    shaped = tuple(result.reshape(shape) for result in results)
    return shaped if isinstance(out, tuple) else shaped[0]


def _plain(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The bytes as unsigned integers, which every buffer protocol has."""
    return array.view(f"uint{8 * array.dtype.itemsize}")


# ---- the table of forms ----------------------------------------------------------------------------------------------


def expand(modifiers: str) -> list[str]:
    """All that "lo|hi sat? s32" stands for: [".lo.s32", ".lo.sat.s32", ".hi.s32", ".hi.sat.s32"]."""
    groups = []
    for group in modifiers.split():
        alternatives = ["." + one for one in group.removesuffix("?").split("|")]
        groups.append([""] * group.endswith("?") + alternatives)
    return ["".join(choice) for choice in itertools.product(*groups)]


def forms(opcodes: Iterable[str]) -> list[tuple[str, str]]:
    """Everything of these opcodes that the emulator's own table has: names with modifiers, and their operands."""
    found = []
    for line in ptx.instructions().splitlines()[2:]:
        opcode, modifiers, operands = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
        if opcode not in opcodes:
            continue
        groups = []
        for required, optional, single in re.findall(r"\(([^)]*)\)|\[([^]]*)\]|(\.\S+)", modifiers):
            alternatives = "|".join(one.removeprefix(".") for one in (required or optional or single).split())
            groups.append(alternatives + ("?" if optional else ""))
        found += [(opcode + one, operands.replace("\\|", "|")) for one in expand(" ".join(groups))]
    return found


def supported(opcodes: Iterable[str]) -> set[str]:
    return {name for name, _ in forms(opcodes)}


# ---- values ----------------------------------------------------------------------------------------------------------


def edges(dtype: Any) -> np.ndarray[Any, Any]:
    """Numbers of a type at which something changes: ends, powers of two and their neighbours, patterns; NaN, -0.0."""
    dtype = np.dtype(dtype)
    if dtype.kind == "f":
        info = np.finfo(dtype)
        numbers = [0.0, 1.0, 1.5, 2.0, 3.0, info.tiny, info.smallest_subnormal, info.max, np.inf, np.nan, info.eps]
        numbers += [float(info.tiny) - float(info.smallest_subnormal), 1.0 + float(info.eps), 7.0, 0.1, 65504.0]
        with np.errstate(over="ignore"):
            return np.array([sign * number for number in numbers for sign in (1, -1)]).astype(dtype)
    bits = 8 * dtype.itemsize
    values = {0, 1, 2, 3, 5, 7, 24, 100}
    for power in {4, 5, 6, 7, 8, bits // 2, bits // 2 + 1, bits - 1, bits}:
        values |= {2**power - 1, 2**power, 2**power + 1}
    values |= {-value for value in values} | {
        sum(1 << i for i in range(0, bits, 2)),
        sum(1 << i for i in range(1, bits, 2)),
    }
    return np.array(sorted({value % 2**bits for value in values}), dtype=f"uint{bits}").view(dtype)


def random(dtype: Any, count: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Random bits of a type; of half the integers only some low ones, so that there are as many small as great ones."""
    dtype = np.dtype(dtype)
    bits = 8 * dtype.itemsize
    generator = np.random.default_rng([seed, bits, ord(dtype.kind)])
    values = generator.integers(0, 2**64, count, dtype=np.uint64) >> np.uint64(64 - bits)
    if dtype.kind != "f":
        values[::2] >>= generator.integers(0, bits, values[::2].size, dtype=np.uint64)
        values[::4] = ~values[::4] & np.uint64(2**bits - 1)
    return values.astype(f"uint{bits}").view(dtype)


def samples(*dtypes: Any, count: int = 2048, seed: int = 0) -> list[np.ndarray[Any, Any]]:
    """Arrays to apply an instruction to: edges of the first two operands in all combinations, then `count` random ones.

    The other operands take edges, too, but not all with all.
    """
    generator = np.random.default_rng(seed)
    grids = [grid.reshape(-1) for grid in np.meshgrid(*map(edges, dtypes[:2]), indexing="ij")]
    grids += [generator.choice(edges(dtype), grids[0].size) for dtype in dtypes[2:]]
    return [
        np.concatenate([grid, random(dtype, count, seed + 10 * i)])
        for i, (grid, dtype) in enumerate(zip(grids, dtypes, strict=True))
    ]


def every(dtype: Any) -> np.ndarray[Any, Any]:
    """All values of a 16-bit type."""
    return np.arange(2**16, dtype=np.uint16).view(dtype)


def exact(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """As Python's integers, which do not overflow."""
    return array.astype(object)


def wrap(values: Any, dtype: Any) -> np.ndarray[Any, Any]:
    """Python's integers cut to a type."""
    dtype = np.dtype(dtype)
    bits = 8 * dtype.itemsize
    cut: np.ndarray[Any, Any] = np.asarray(values, dtype=object) & (2**bits - 1)
    return cut.astype(f"uint{bits}").view(dtype)


def assert_same(actual: np.ndarray[Any, Any], expected: np.ndarray[Any, Any], *inputs: Any, what: str = "") -> None:
    """Bit for bit; says which inputs the first difference is at."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    inputs = tuple(np.broadcast_to(one, actual.shape).reshape(-1) for one in inputs)
    actual, expected = actual.reshape(-1), expected.reshape(-1)
    bits = f"uint{8 * actual.dtype.itemsize}"
    wrong = np.flatnonzero(np.ascontiguousarray(actual).view(bits) != np.ascontiguousarray(expected).view(bits))
    if wrong.size:
        at = wrong[0]
        given = ", ".join(str(one[at]) for one in inputs)
        raise AssertionError(
            f"{what}({given}) gave {actual[at]}, expected {expected[at]} [{wrong.size} of {actual.size}]"
        )
