"""Random programs, branches, loops and calls in them, against the interpreter of random_statements.py, bit for bit."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from handwritten import Handwritten
from random_programs import Generator
from random_statements import INPUTS, MAIN, MAIN_NAMES, SCRATCH, TYPES, Program, Threads, declare, registers_of, text_of

PROGRAMS = 300
BLOCKS = (1, 32, 33, 64, 97)
WORDS = len(MAIN_NAMES) + 2 * SCRATCH // 8  # of results: registers, then local and shared memory


def launch_shape(seed: int) -> tuple[int, int]:
    return 2 + seed % 2, BLOCKS[seed % len(BLOCKS)]


def inputs_of(seed: int, count: int) -> Any:
    """Random bits, half of them shifted down to small numbers, some negated."""
    generator = np.random.default_rng([seed, 1])
    values = generator.integers(0, 2**64, (count, INPUTS), dtype=np.uint64)
    small = generator.integers(0, 64, values.shape, dtype=np.uint64)
    values = np.where(generator.random(values.shape) < 0.5, values >> small, values)
    return np.where(generator.random(values.shape) < 0.2, ~values, values)


def kernel_of(program: Program, block: int) -> Handwritten:
    """Loads the main registers and fills the scratch memory with %d0 to %d3; stores everything at the end."""
    own = [name for name in registers_of(program.body) if name not in MAIN_NAMES]
    variables = (
        f"{declare(own)} .reg .b32 %index, %own_shared, %exchange, %last, %everyone, %flag;"
        " .reg .b64 %in, %out, %own_global, %own_local, %word;"
        f" .local .align 16 .b8 stack[{SCRATCH}];"
    )
    lines = [
        "mad.lo.u32 %index, %block, %threads, %tid;",
        f"mul.wide.u32 %in, %index, {8 * INPUTS}; add.u64 %in, %in, %a0;",
        f"mul.wide.u32 %out, %index, {8 * WORDS}; add.u64 %out, %out, %a1;",
        f"mul.wide.u32 %own_global, %index, {SCRATCH}; add.u64 %own_global, %own_global, %a2;",
        f"mad.lo.u32 %own_shared, %tid, {SCRATCH}, %s; mov.u64 %own_local, stack;",
        f"mad.lo.u32 %exchange, %tid, 4, %s; add.u32 %exchange, %exchange, {SCRATCH * block};",
        "sub.u32 %last, %threads, %tid; add.u32 %last, %last, %lane;",
        "sub.u32 %last, %last, 1; min.u32 %last, %last, 31;",
        "sub.u32 %everyone, 31, %last; shr.u32 %everyone, 0xffffffff, %everyone;",
    ]
    lines += [f"ld.global.{TYPES[name[1]]} {name}, [%in+{8 * i}];" for i, name in enumerate(MAIN_NAMES[:INPUTS])]
    lines += [f"setp.lt.s32 %p{i}, %r{i}, 0;" for i in range(MAIN["p"])]
    for space in ("global", "shared", "local"):
        lines += [f"st.{space}.b64 [%own_{space}+{8 * i}], %d{i};" for i in range(SCRATCH // 8)]
    lines += text_of(program.body)
    for i, name in enumerate(MAIN_NAMES):
        if name[1] == "p":
            lines.append(f"selp.u32 %flag, 1, 0, {name}; st.global.u32 [%out+{8 * i}], %flag;")
        else:
            lines.append(f"st.global.{TYPES[name[1]]} [%out+{8 * i}], {name};")
    for i in range(2 * SCRATCH // 8):
        space, at = ("local", 8 * i) if 8 * i < SCRATCH else ("shared", 8 * i - SCRATCH)
        lines.append(f"ld.{space}.b64 %word, [%own_{space}+{at}];")
        lines.append(f"st.global.b64 [%out+{8 * (len(MAIN_NAMES) + i)}], %word;")
    functions = "".join(function.text() for function in program.called())
    return Handwritten("\n".join(lines), 3, shared=(SCRATCH + 4) * block, variables=variables, globals=functions)


def expected_of(program: Program, seed: int) -> dict[str, Any]:
    grid, block = launch_shape(seed)
    threads = Threads(grid, block)
    registers = program.run(threads, inputs_of(seed, threads.count))
    memory = {space: bytes_.view(np.uint64) for space, bytes_ in threads.memory.items()}
    return {**registers, **memory}


def difference(program: Program, seed: int, options: dict[str, Any]) -> str:
    """What is wrong with the emulator's run of the program; nothing if all is well."""
    grid, block = launch_shape(seed)
    count = grid * block
    expected = expected_of(program, seed)
    out, scratch = np.zeros((count, WORDS), np.uint64), np.zeros((count, SCRATCH // 8), np.uint64)
    report = kernel_of(program, block).launch(inputs_of(seed, count), out, scratch, grid=grid, block=block, **options)
    if not report.ok:
        return str(report)
    actual = {name: out[:, i].astype(expected[name].dtype) for i, name in enumerate(MAIN_NAMES)}
    actual["local"], actual["shared"] = np.split(out[:, len(MAIN_NAMES) :], 2, axis=1)
    actual["global"] = scratch
    for name, values in expected.items():
        wrong = np.argwhere(actual[name] != values)
        if wrong.size:
            at = tuple(int(i) for i in wrong[0])
            return f"{name}{list(at)} is {actual[name][at]:#x}, expected {values[at]:#x}"
    return ""


def shrink(program: Program, seed: int, options: dict[str, Any], seconds: float = 20) -> None:
    """Deletes statements, the large ones first, as long as something stays wrong and all registers stay defined."""
    end = time.monotonic() + seconds
    smaller = True
    while smaller:
        smaller = False
        for statements in sorted(program.lists(), key=len, reverse=True):
            for i in reversed(range(len(statements))):
                if time.monotonic() > end:
                    return
                one = statements.pop(i)
                defined = set(registers_of([one])) - set(MAIN_NAMES)
                lost = {name for name in defined if name in defines_of([one])}
                mentioned = {name for some in program.lists() for other in some for name in other.names}
                mentioned |= {function.result for function in program.called()}
                if not lost & mentioned and difference(program, seed, options):
                    smaller = True
                else:
                    statements.insert(i, one)


def defines_of(statements: list[Any]) -> set[str]:
    return {name for one in statements for name in one.defines}.union(
        *(defines_of(part) for one in statements for part in one.parts())
    )


@pytest.mark.parametrize("seed", range(PROGRAMS))
def test_random_program(seed: int) -> None:
    for options in (
        {"order": "forward", "threads": 1 + seed % 2},
        {"order": "random", "seed": seed, "threads": 1 + seed // 2 % 2},
    ):
        program = Generator(seed).program(60 + seed % 100)
        wrong = difference(program, seed, options)
        if wrong:
            shrink(program, seed, options)
            text = kernel_of(program, launch_shape(seed)[1]).text
            pytest.fail(f"seed {seed}, {options}: {wrong}; {difference(program, seed, options)} in\n{text}", False)
