"""CUTLASS's own kernels: bit-exact against its host reference, with its own metadata reorder, and no check says a word.

Integers so small that every partial sum is exact, whatever the order: equality is of bits.
"""

from __future__ import annotations

import numpy as np
import oracles
import pytest
from cutlass_problems import problem

from sparse24.ptx import Report

TILE_K = {  # of a block, whose tile is 64x64
    "sparse_f16": 64,
    "sparse_bf16": 64,
    "sparse_s8": 128,
    "sparse_s4": 256,
    "sparse_tf32": 32,
    "dense_f16": 32,
    "dense_f16_transposed": 32,
    "dense_s8": 64,
    "dense_f16_split": 32,
}
STAGES = dict.fromkeys(TILE_K, 3) | {"dense_f16": 4}
SPLITS = dict.fromkeys(TILE_K, 1) | {"dense_f16_split": 3}
MMA_K = {"sparse_f16": 32, "sparse_bf16": 32, "sparse_s8": 64, "sparse_s4": 128, "sparse_tf32": 16}


def depth(gemm: str, steps: int) -> int:
    """K for that many steps of each block."""
    return steps * SPLITS[gemm] * TILE_K[gemm]


def findings(report: Report) -> set[tuple[str, str]]:
    return {(error.kind, error.opcode.split(".")[0]) for error in report.errors}


@pytest.mark.parametrize("order, seed", oracles.ORDERS)
@pytest.mark.parametrize("gemm", TILE_K)
def test_exact_and_silent(gemm: str, order: str, seed: int) -> None:
    """Four tiles (two of three blocks each), twice round the ring of stages, with a C to add."""
    work = problem(gemm, 128, 64 if SPLITS[gemm] > 1 else 128, depth(gemm, 6), alpha=2, beta=-1)
    for threads in (1, 2):
        d, report = work.run(order=order, seed=seed, threads=threads)
        oracles.assert_silent(report)
        np.testing.assert_array_equal(d, work.expected)
    if SPLITS[gemm] > 1:
        assert not work.metadata.any()  # the semaphores by which blocks wait for each other, given back


@pytest.mark.parametrize("gemm", TILE_K)
def test_one_step_of_k(gemm: str) -> None:
    work = problem(gemm, 64, 64, depth(gemm, 1), beta=0)
    d, report = work.run()
    oracles.assert_silent(report)
    np.testing.assert_array_equal(d, work.expected)


@pytest.mark.parametrize("gemm", TILE_K)
def test_tiles_cut_off(gemm: str) -> None:
    """Exact, and silent but for metadata, where what is reported is true although it reaches no stored result.

    Rows beyond the edges are copied to shared memory only in the first stages, as zeros: later stages keep what was
    there, which ldmatrix and mma read all the same, for rows that nobody stores. But which products mma.sp adds
    depends on metadata: those that were never written, and zeros, which are none.
    """
    work = problem(gemm, 96, 96, depth(gemm, 6), alpha=2, beta=-1)
    d, report = work.run()
    np.testing.assert_array_equal(d, work.expected)
    assert findings(report) == ({("bad_metadata", "mma"), ("uninitialized", "ldmatrix")} if gemm in MMA_K else set()), (
        str(report)
    )
    d, report = work.run(checks={"memory", "race", "sync", "async"})
    oracles.assert_silent(report)
    np.testing.assert_array_equal(d, work.expected)


@pytest.mark.parametrize("gemm", TILE_K)
def test_one_stage_never_written(gemm: str) -> None:
    """With one step of K fewer than stages, fragments are loaded from the stage left over, and never used."""
    work = problem(gemm, 64, 64, depth(gemm, STAGES[gemm] - 1))
    d, report = work.run()
    np.testing.assert_array_equal(d, work.expected)
    oracles.assert_silent(report)


@pytest.mark.parametrize("numerics", ["ieee", "sm_80", "sm_90", "float64"])
@pytest.mark.parametrize("gemm", ["sparse_f16", "sparse_bf16", "sparse_tf32", "dense_f16", "dense_f16_transposed"])
def test_exact_in_every_numerics(gemm: str, numerics: str) -> None:
    work = problem(gemm, 64, 64, depth(gemm, 6), seed=1)
    d, report = work.run(numerics=numerics, threads=2)
    oracles.assert_silent(report)
    np.testing.assert_array_equal(d, work.expected)


@pytest.mark.parametrize(
    "gemm, k", [("dense_f16", 8), ("dense_f16", 168), ("dense_f16_transposed", 200), ("dense_s8", 400)]
)
def test_k_that_is_no_multiple_of_the_tile(gemm: str, k: int) -> None:
    work = problem(gemm, 64, 128, k, seed=2)
    d, report = work.run()
    oracles.assert_silent(report)
    np.testing.assert_array_equal(d, work.expected)


@pytest.mark.parametrize("gemm", MMA_K)
def test_mma_count(gemm: str) -> None:
    """One mma.sp for each 16 x 8 of the result and each step of k."""
    k = 3 * TILE_K[gemm]
    _, report = problem(gemm, 64, 128, k, beta=0).run()
    assert report.counters.mma == (64 // 16) * (128 // 8) * (k // MMA_K[gemm])


def test_the_reference_is_no_constant() -> None:
    """What the tests above compare with has many values, and changes with the seed."""
    first, second = (problem("sparse_f16", 96, 96, 128, alpha=2, beta=-1, seed=seed) for seed in (0, 3))
    assert len(np.unique(first.expected.view(np.float16))) > 50
    assert (first.expected != second.expected).any()
