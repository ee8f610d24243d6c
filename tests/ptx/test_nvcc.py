"""The kernels of kernels/*.cu from nvcc: right and silent on seven architectures, in every order, on two threads."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
from workloads import WORKLOADS, sparse_gemm, workload

ARCHITECTURES = ["80", "86", "87", "89", "90a", "100f", "120f"]


@pytest.mark.parametrize("name", WORKLOADS)
def test_same_results_on_every_architecture(name: str) -> None:
    texts = {architecture: oracles.kernels(name, architecture) for architecture in ARCHITECTURES}
    assert len(set(texts.values())) == len(ARCHITECTURES)  # at least .target differs
    for architecture, text in texts.items():
        work = workload(name)
        report = work.run(text)
        assert not report.errors, f"sm_{architecture}: {report}"
        work.assert_results()


@pytest.mark.parametrize("order, seed", oracles.ORDERS)
@pytest.mark.parametrize("name", WORKLOADS)
def test_silent_in_every_order(name: str, order: str, seed: int) -> None:
    for threads in (1, 2):
        work = workload(name, seed)
        report = work.run(oracles.kernels(name), order=order, seed=seed, threads=threads)
        oracles.assert_silent(report)
        work.assert_results()


@pytest.mark.parametrize("name", WORKLOADS)
def test_same_results_without_checks(name: str) -> None:
    work = workload(name, seed=5)
    oracles.assert_silent(work.run(oracles.kernels(name), checks="none", counters=False))
    work.assert_results()


@pytest.mark.parametrize("name", WORKLOADS)
def test_unoptimised(name: str) -> None:
    """-G: everything through local memory, device functions called. Other PTX of the same source."""
    work = workload(name, seed=6)
    oracles.assert_silent(work.run(oracles.kernels(name, "80", "-G")))
    work.assert_results()


@pytest.mark.parametrize("m, n, k", [(1, 2, 64), (128, 128, 64), (129, 130, 192), (300, 8, 320)])
@pytest.mark.parametrize("numerics", ["ieee", "sm_80", "sm_90", "float64"])
def test_sparse_gemm_shapes(m: int, n: int, k: int, numerics: str) -> None:
    work = sparse_gemm(np.random.default_rng(m), m, n, k)
    oracles.assert_silent(work.run(oracles.kernels("sparse_gemm"), numerics=numerics))
    work.assert_results()


@pytest.mark.parametrize("products", [4, 8, 16, 32])
def test_sparse_gemm_is_exact_however_many_products_are_summed_at_once(products: int) -> None:
    work = workload("sparse_gemm", seed=8)
    oracles.assert_silent(work.run(oracles.kernels("sparse_gemm"), sparse_products=products))
    work.assert_results()


# ---- Counters, where one can count by hand ---------------------------------------------------------------------------


def test_counts_of_transpose() -> None:
    """Whole tiles: 4 blocks of 8 warps, 4 rows a warp. Each warp reads 128 bytes at once, and writes them at once."""
    x = np.arange(64 * 64, dtype=np.float32).reshape(64, 64)
    work = workload("transpose")
    work.grid, work.arguments = (2, 2), [x, np.zeros_like(x), 64, 64]
    counters = work.run(oracles.kernels("transpose")).counters
    np.testing.assert_array_equal(work.arguments[1], x.T)
    accesses = 4 * 8 * 4
    assert counters.global_sectors == counters.global_ideal == 2 * accesses * 4
    assert counters.shared_waves == counters.shared_ideal == 2 * accesses
    assert counters.bytes["global"] == counters.bytes["shared"] == 2 * x.nbytes
    assert counters.barriers == 4


def test_bank_conflicts_of_transpose_without_padding() -> None:
    """A column of 32 rows of 32 words is in one bank: 32 waves for each read, as the writes' one."""
    x = np.arange(64 * 64, dtype=np.float32).reshape(64, 64)
    work = workload("transpose")
    work.grid, work.arguments = (2, 2), [x, np.zeros_like(x), 64, 64]
    text = oracles.edited("transpose", ("tile[TILE][TILE + 1]", "tile[TILE][TILE]"))
    report = work.run(text)
    oracles.assert_silent(report)
    accesses = 4 * 8 * 4
    assert report.counters.shared_ideal == 2 * accesses
    assert report.counters.shared_waves == accesses + 32 * accesses
    conflicts = [line for line in report.counters.per_instruction if line.shared_waves > line.shared_ideal]
    assert conflicts and all(line.opcode.startswith("ld.shared") for line in conflicts)


def test_counts_of_sparse_gemm() -> None:
    """One tile of 128 x 128 and two steps of 64: its ldmatrix and cp.async meet no bank twice."""
    work = sparse_gemm(np.random.default_rng(0), 128, 128, 128)
    report = work.run(oracles.kernels("sparse_gemm"))
    counters = report.counters
    assert counters.mma == (128 // 16) * (128 // 8) * (128 // 32)
    assert counters.barriers == 2
    assert counters.shared_waves == counters.shared_ideal
    in_shared = 2 * 128 * (64 + 128) + 2 * 1024  # both stages, written once
    written = [line for line in counters.per_instruction if line.opcode.startswith("cp.async.cg")]
    assert sum(line.bytes for line in written) == in_shared
    assert all(line.global_sectors == line.global_ideal for line in written)
