"""Real kernels with one bug planted in each: found by the check that exists for it, and nothing else is reported."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import oracles
import pytest
import test_triton
import triton_kernels
from cutlass_problems import problem
from planted_bugs import BUGS, CHECK_OF, Bug
from workloads import workload

import sparse24.ptx


def kinds(report: sparse24.ptx.Report) -> set[str]:
    return {error.kind for error in report.errors}


def told(report: sparse24.ptx.Report) -> str:
    """The first error of each kind."""
    return "\n".join(
        str({error.kind: error for error in reversed(report.errors)}[kind]) for kind in sorted(kinds(report))
    )


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_planted(bug: Bug, order: str) -> None:
    text = oracles.edited(bug.kernel, *bug.edits)
    work = workload(bug.kernel)
    work.freed = bug.freed
    report = work.run(text, order=order, threads=1, **bug.options)
    assert bug.kind in kinds(report) <= {bug.kind, *bug.also}, told(report)
    if bug.still_right:
        work.assert_results()

    check = CHECK_OF[bug.kind]
    work = workload(bug.kernel)
    work.freed = bug.freed
    report = work.run(text, order=order, threads=1, checks=[check] if check else "none", **bug.options)
    assert bug.kind in kinds(report), f"not by its check alone: {told(report)}"
    work = workload(bug.kernel)
    work.freed = bug.freed
    others = set(sparse24.ptx.CHECKS) - {check}
    report = work.run(text, order=order, threads=1, checks=others, **bug.options)
    assert kinds(report) <= set(bug.also) | ({bug.kind} if check is None else set()), f"by others: {told(report)}"


def test_every_kind_has_a_bug() -> None:
    assert {bug.kind for bug in BUGS} == set(CHECK_OF)


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_place(bug: Bug) -> None:
    """The error names a line of the kernel's own source, and an instruction at the line of the PTX that it names."""
    text = oracles.edited(bug.kernel, *bug.edits)
    work = workload(bug.kernel)
    work.freed = bug.freed
    report = work.run(text, threads=1, **bug.options)
    for error in report.errors:
        assert error.opcode.split(".")[0] in text.splitlines()[error.line - 1]
        assert error.source is not None and re.fullmatch(r".+\.(cu|h|hpp):\d+", error.source)
        assert error.count >= 1 and error.message


# ---- In kernels that are not ours: edits of their PTX ----------------------------------------------------------------


def replaced(pattern: str, new: str, text: str, count: int = 0) -> str:
    edited, found = re.subn(pattern, new, text, count=count)
    assert found, f"nowhere: {pattern}"
    return edited


def waits_late(text: str) -> str:
    """Every cp.async.wait_group lets one more group be under way."""
    return re.sub(r"cp\.async\.wait_group\s+(\d+)", lambda m: f"cp.async.wait_group {int(m[1]) + 1}", text)


def has_no_barriers(text: str) -> str:
    return replaced(r"bar\.sync\s+0;", "", text)


def selects_3(text: str) -> str:
    return replaced(r"(mma\.sp[^;]*, )(0x)?[01];", r"\g<1>3;", text)


def stores_beyond_the_edges(text: str) -> str:
    return replaced(r"@!?%?p\d*\s+(st\.global)", r"\1", text)


def loads_a_matrix_with_half_a_warp(text: str) -> str:
    text = replaced(r"(\.reg \.b32[^;]*;)", r"\1 .reg .pred %half; .reg .b32 %own;", text, count=1)
    return replaced("ldmatrix", "mov.u32 %own, %laneid; setp.lt.u32 %half, %own, 16; @%half ldmatrix", text, count=1)


def releases_nothing(text: str) -> str:
    return replaced(r"st\.global\.release\.gpu\.b32", "st.global.b32", text)


LATE = ["uninitialized", "race_shared", "race_warp"]  # what it also is when bytes arrive after the barrier
EARLY = ["uninitialized", "race_warp"]  # what it also is when nobody waits

CUTLASS_BUGS = [  # with the rows of the result: 96 are cut off in the second tile, as test_cutlass.py explains
    ("sparse_f16", 128, waits_late, "async_in_flight", LATE),
    ("dense_f16", 128, waits_late, "async_in_flight", LATE),
    ("sparse_s8", 128, has_no_barriers, "race_shared", EARLY),
    ("dense_f16", 128, has_no_barriers, "race_shared", EARLY),
    ("dense_f16_split", 128, releases_nothing, "race_global", []),
    ("sparse_bf16", 128, selects_3, "bad_selector", []),
    ("dense_s8", 96, stores_beyond_the_edges, "out_of_bounds", ["uninitialized"]),
]


@pytest.mark.parametrize(
    "gemm, rows, edit, kind, also", CUTLASS_BUGS, ids=lambda value: getattr(value, "__name__", None)
)
def test_planted_in_cutlass(gemm: str, rows: int, edit: Callable[[str], str], kind: str, also: list[str]) -> None:
    text = oracles.cutlass_kernel(gemm)
    edited = edit(text)
    assert edited != text
    _, report = problem(gemm, rows, 128, 1536).run(edited, threads=1)
    assert kind in kinds(report) <= {kind, *also}, told(report)


def test_cutlass_metadata_of_a_k_that_is_no_multiple_of_the_tile() -> None:
    """CUTLASS refuses it, because beyond K its cp.async fills metadata with zeros, which mma.sp does not take."""
    _, report = problem("sparse_f16", 64, 64, 224).run(accepted=False)
    assert kinds(report) == {"bad_metadata"}, told(report)


def test_cutlass_metadata_of_zeros() -> None:
    work = problem("sparse_s8", 64, 64, 384, seed=9)
    saved = work.metadata.copy()
    work.metadata[:] = 0
    _, report = work.run()
    work.metadata[:] = saved
    assert kinds(report) == {"bad_metadata"}, told(report)


def test_cutlass_of_unaligned_tensors() -> None:
    """Addresses of 8 bytes: CUTLASS's own check takes them, as it compares bytes with elements; its kernel does not."""
    _, report = problem("dense_f16", 64, 64, 64).run(align=8)
    assert kinds(report) == {"misaligned"}, told(report)


def launched(kernel: triton_kernels.Compiled, text: str, grid: tuple[int, int], arguments: list) -> sparse24.ptx.Report:
    module = sparse24.ptx.load(text)
    scratch = len(module.kernels[kernel.name].parameters) - len(arguments)
    arguments = arguments + [np.zeros(16, np.uint8) for _ in range(scratch)]
    return module.launch(kernel.name, grid, kernel.threads, arguments, shared=kernel.shared, threads=1)


TRITON_BUGS = [
    (waits_late, "async_in_flight", LATE),
    (has_no_barriers, "race_shared", EARLY),
    (stores_beyond_the_edges, "out_of_bounds", ["race_global"]),  # or in the next row
    (loads_a_matrix_with_half_a_warp, "divergent_instruction", []),
]


@pytest.mark.parametrize("edit, kind, also", TRITON_BUGS, ids=lambda value: getattr(value, "__name__", None))
def test_planted_in_tritons_matmul(edit: Callable[[str], str], kind: str, also: list[str]) -> None:
    kernel = test_triton.matmul(80, stages=4)
    edited = edit(kernel.ptx)
    assert edited != kernel.ptx
    a, b = np.ones((80, 176), np.float16), np.ones((176, 112), np.float16)
    report = launched(kernel, edited, (2, 2), [a, b, np.zeros((80, 112), np.float32), 80, 112, 176])
    assert kind in kinds(report) <= {kind, *also}, told(report)


def test_planted_in_tritons_reduction() -> None:
    """Its atomic add as a plain store: blocks overwrite each other."""
    signature = dict(x_ptr="*fp32", sums_ptr="*fp32", rows="i32", columns="i32")
    kernel = triton_kernels.compiled(triton_kernels.column_sums, signature, 80, TILE_ROWS=32, TILE_COLUMNS=64)
    edited, count = re.subn(r"atom\.[\w.]*add\.f32 %r\d+, (\[[^]]*\], %r\d+;)", r"st.global.b32 \1", kernel.ptx)
    assert count
    report = launched(kernel, edited, (5, 2), [np.ones((150, 100), np.float32), np.zeros(100, np.float32), 150, 100])
    assert kinds(report) == {"race_global"}, told(report)
