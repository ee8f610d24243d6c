"""Kernels written by hand: a body of PTX, with the registers and addresses that they all use."""

from __future__ import annotations

from typing import Any

import numpy as np

import sparse24.ptx
from sparse24.ptx import Error, Report

ORDERS = [{"order": "forward"}, {"order": "reverse"}, *({"order": "random", "seed": seed} for seed in range(3))]

_HEAD = """.version 8.8
.target {target}
.address_size 64
{globals}
.visible .entry kernel({parameters})
{{
    .reg .pred %p<16>;
    .reg .b16 %h<32>;
    .reg .b32 %r<64>;
    .reg .f32 %f<32>;
    .reg .f64 %g<16>;
    .reg .b64 %d<64>;
    .reg .b32 %tid, %lane, %warp, %block, %threads, %s, %n<8>;
    .reg .b64 %a<8>;
    {variables}
    mov.u32 %tid, %tid.x;
    and.b32 %lane, %tid, 31;
    shr.u32 %warp, %tid, 5;
    mov.u32 %block, %ctaid.x;
    mov.u32 %threads, %ntid.x;
    {loads}
"""


class Handwritten:
    """A kernel around ``body``.

    pointers: how many array parameters it has; their addresses are in %a0, %a1, ... numbers: of u32 parameters, in %n0,
    %n1, ... shared: bytes of static shared memory; its address is in %s. Lines marked with a comment "// BUG" (or
    another word) are found by line(). %tid, %lane, %warp, %block and %threads hold what they say; %p, %h, %r, %f, %g
    and %d are free registers of 1, 16, 32, 32, 64 and 64 bits.
    """

    def __init__(
        self,
        body: str,
        pointers: int = 1,
        numbers: int = 0,
        shared: int = 0,
        variables: str = "",
        globals: str = "",
        target: str = "sm_90",
    ) -> None:
        parameters = [f".param .u64 a{i}" for i in range(pointers)] + [f".param .u32 n{i}" for i in range(numbers)]
        loads = [f"ld.param.u64 %a{i}, [a{i}];" for i in range(pointers)]
        loads += [f"ld.param.u32 %n{i}, [n{i}];" for i in range(numbers)]
        if shared:
            variables += f" .shared .align 128 .b8 buffer[{shared}];"
            loads.append("mov.u32 %s, buffer;")
        head = _HEAD.format(
            target=target,
            globals=globals,
            parameters=", ".join(parameters),
            variables=variables,
            loads=" ".join(loads),
        )
        self.text = head + body + "\n    ret;\n}\n"
        self.module = sparse24.ptx.load(self.text)

    def line(self, mark: str = "BUG") -> int:
        """The number of the one line with the comment ``// mark``."""
        lines = [number for number, line in enumerate(self.text.splitlines(), 1) if line.endswith(f"// {mark}")]
        assert len(lines) == 1, f"{len(lines)} lines are marked {mark}"
        return lines[0]

    def launch(self, *args: Any, grid: Any = 1, block: Any = 32, **options: Any) -> Report:
        return self.module.launch("kernel", grid, block, list(args), **options)


def the_error(report: Report) -> Error:
    """The one error that there should be."""
    assert len(report.errors) == 1, str(report)
    return report.errors[0]


def assert_silent(kernel: Handwritten, *args: Any, **options: Any) -> None:
    """No check says anything, in whichever order blocks and warps run."""
    for order in ORDERS:
        report = kernel.launch(*args, **options, **order)
        assert report.ok, f"{order}: {report}"


def assert_found(kernel: Handwritten, kind: str, *args, **options) -> None:
    """Something of this kind, and nothing else, at the marked lines, in whichever order the warps run."""
    marked = {n for n, line in enumerate(kernel.text.splitlines(), 1) if line.endswith("// BUG")}
    for order in ORDERS:
        report = kernel.launch(*args, **options, **order)
        assert report.errors, order
        for error in report.errors:
            assert error.kind == kind and error.line in marked, f"{order}: {error}"


# ---- operands -----------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(24)

DTYPES = {
    **{"b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16},
    **{"b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32},
    **{"b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64},
}
# Names in a Handwritten, by bits.
REGISTERS = {8: "%h", 16: "%h", 32: "%r", 64: "%d"}


def random_bytes(count: int) -> np.ndarray:
    return RNG.integers(0, 256, count, dtype=np.uint8)


def braced(registers: list[str]) -> str:
    return "{" + ", ".join(registers) + "}"


def vector(registers: list[str]) -> str:
    return registers[0] if len(registers) == 1 else braced(registers)
