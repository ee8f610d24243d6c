"""What a launch reports: findings and counters. Public names are those of sparse24.ptx."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from typing import Any


def short_name(name: str) -> str:
    """Compilers call parameters <kernel>_param_0, and mangled names of templates fill pages."""
    return name if len(name) <= 60 else "..." + name[-40:]


@dataclass(frozen=True)
class Error:
    """What a check found: the first place, and how often it came at this instruction.

    kind: docs/emulator.md lists them ("out_of_bounds"). line: in the PTX text. source: "file:line" of the kernel's own
    source where the PTX has .loc, else None. block: (x, y, z). warp: in the block; lane: in the warp. address: as the
    kernel sees it, of the space accessed; 0 where none is. count: how many executions by a lane or warp were so.
    """

    kind: str
    line: int
    source: str | None
    opcode: str
    block: tuple[int, int, int]
    warp: int
    lane: int
    address: int
    message: str
    count: int

    def __str__(self) -> str:
        source = f" ({self.source})" if self.source else ""
        address = f", address {self.address:#x}" if self.address else ""
        count = f" [{self.count} times]" if self.count > 1 else ""
        where = f"block {self.block}, warp {self.warp}, lane {self.lane}{address}"
        return f"{self.kind}: line {self.line}{source}, {self.opcode}, {where}: {self.message}{count}"


@dataclass(frozen=True)
class InstructionCounters:
    """What one instruction of the text did, added up over all warps.

    warps, lanes: executions by a warp, by a lane whose guard predicate was true. diverged: of a branch, executions that
    split the warp. shared_waves: passes over the 32 banks; shared_ideal: the fewest that its bytes need.
    global_sectors: 32-byte sectors touched; global_ideal: the fewest. bytes: moved, in its space.
    """

    line: int
    source: str | None
    opcode: str
    space: str
    warps: int
    lanes: int
    diverged: int
    shared_waves: int
    shared_ideal: int
    global_sectors: int
    global_ideal: int
    bytes: int


@dataclass(frozen=True)
class Counters:
    """Sums over a launch; docs/emulator.md defines each. With counters=False only instructions and barriers are kept.

    instructions: executed by warps. opcodes: the same, by opcode with its modifiers. mma: tensor-core instructions
    among them. barriers: completed, over all blocks. divergent_branches: executions of a branch that split a warp.
    bytes: moved, by space ("global", "shared", ...). The rest as in InstructionCounters.
    """

    instructions: int
    opcodes: dict[str, int]
    mma: int
    barriers: int
    divergent_branches: int
    shared_waves: int
    shared_ideal: int
    global_sectors: int
    global_ideal: int
    bytes: dict[str, int]
    _rows: list[tuple[Any, ...]] = field(repr=False)

    @functools.cached_property
    def per_instruction(self) -> list[InstructionCounters]:
        """Of each instruction that was executed, in the order of the text."""
        return [InstructionCounters(*row) for row in self._rows]


class KernelError(RuntimeError):
    """Raised by Report.raise_for_errors; ``report`` has it all."""

    def __init__(self, report: Report) -> None:
        super().__init__(str(report))
        self.report = report


@dataclass(frozen=True)
class Report:
    """Of one launch. errors: in the order in which they were met. printed: what the kernel's printf wrote.

    grid, block: (x, y, z). shared: dynamic shared memory, bytes.
    """

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    errors: list[Error]
    counters: Counters
    printed: str

    @property
    def ok(self) -> bool:
        return not self.errors

    def raise_for_errors(self) -> None:
        """Raises KernelError if there are errors."""
        if self.errors:
            raise KernelError(self)

    def __str__(self) -> str:
        number = len(self.errors)
        counters = self.counters
        parts = [f"{counters.instructions:,} warp instructions"]
        parts += [f"{value:,} {name}" for name, value in _told(counters) if value]
        title = "no errors" if number == 0 else "1 error" if number == 1 else f"{number} errors"
        return "\n".join(
            [f"{short_name(self.kernel)}: {title}; {', '.join(parts)}", *(f"  {error}" for error in self.errors)]
        )


def _told(counters: Counters) -> list[tuple[str, int]]:
    return [
        ("mma", counters.mma),
        ("barriers", counters.barriers),
        ("divergent branches", counters.divergent_branches),
        (f"shared waves (ideal {counters.shared_ideal:,})", counters.shared_waves),
        (f"global sectors (ideal {counters.global_ideal:,})", counters.global_sectors),
    ]


def _source(told: dict[str, Any]) -> str | None:
    return f"{told['source_file']}:{told['source_line']}" if told["source_file"] else None


def read_report(kernel: str, told: dict[str, Any]) -> Report:
    errors = [
        Error(
            kind=finding["kind"],
            line=finding["line"],
            source=_source(finding),
            opcode=finding["opcode"],
            block=tuple(finding["block"]),
            warp=finding["warp"],
            lane=finding["lane"],
            address=finding["address"],
            message=finding["message"],
            count=finding["count"],
        )
        for finding in told["findings"]
    ]
    files, opcode_names, spaces = told["files"], told["opcodes"], told["spaces"]
    rows = []
    opcodes: dict[str, int] = {}
    moved: dict[str, int] = {}
    for line, file, source_line, opcode_index, space_index, *counts in told["counters"]:
        source = f"{files[file]}:{source_line}" if 0 < file < len(files) else None
        opcode, space = opcode_names[opcode_index], spaces[space_index]
        opcodes[opcode] = opcodes.get(opcode, 0) + counts[0]
        if counts[-1]:
            moved[space] = moved.get(space, 0) + counts[-1]
        rows.append((line, source, opcode, space, *counts))
    names = list(InstructionCounters.__dataclass_fields__)
    sums = {
        name: sum(row[index] for row in rows)
        for index, name in enumerate(names)
        if name.startswith(("shared", "global", "diverged"))
    }
    counters = Counters(
        instructions=told["instructions"],
        opcodes=opcodes,
        mma=sum(count for opcode, count in opcodes.items() if re.match(r"(wmma\.)?mma\.", opcode)),
        barriers=told["barriers"],
        divergent_branches=sums.pop("diverged"),
        **sums,
        bytes=moved,
        _rows=rows,
    )
    return Report(
        kernel=kernel,
        grid=tuple(told["grid"]),
        block=tuple(told["block"]),
        shared=told["shared"],
        errors=errors,
        counters=counters,
        printed=told["printed"],
    )
