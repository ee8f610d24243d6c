"""The kernels of kernels/*.cu with inputs, a launch and the results to expect. Integers, or floats that stay exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import sparse24.ptx

Random = np.random.Generator
PATTERNS = np.array([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)])  # of the two that a group of four keeps


@dataclass
class Output:
    """An array that the kernel writes whole: it counts as uninitialised, and starts as garbage."""

    array: np.ndarray


@dataclass
class Workload:
    """One launch. `expected` holds what the arguments of these numbers are afterwards."""

    kernel: str
    grid: int | tuple[int, ...]
    block: int | tuple[int, ...]
    arguments: list[Any]
    expected: dict[int, np.ndarray]
    shared: int = 0
    freed: Sequence[int] = field(default_factory=tuple)  # arguments whose buffers are freed before the launch

    def run(self, text: str, **options: Any) -> sparse24.ptx.Report:
        """Launches the kernel of that name in `text`; the arrays have the results."""
        buffers: list[sparse24.ptx.Buffer] = []
        values = []
        for number, argument in enumerate(self.arguments):
            if isinstance(argument, Output):
                argument = sparse24.ptx.Buffer(argument.array, initialized=False)
            elif isinstance(argument, np.ndarray):
                argument = sparse24.ptx.Buffer(argument)
            if isinstance(argument, sparse24.ptx.Buffer):
                buffers.append(argument)
                values.append(argument.address if number in self.freed else argument)
                if number in self.freed:
                    argument.free()
            else:
                values.append(argument)
        module = sparse24.ptx.load(text)
        report = module.launch(self.kernel, self.grid, self.block, values, shared=self.shared, **options)
        for buffer in buffers:
            buffer.free()
        return report

    def result(self, number: int) -> np.ndarray:
        argument = self.arguments[number]
        return argument.array if isinstance(argument, Output) else argument

    def assert_results(self) -> None:
        for number, expected in self.expected.items():
            np.testing.assert_array_equal(self.result(number), expected, err_msg=f"{self.kernel}, argument {number}")


def _garbage(shape: Any, dtype: Any) -> Output:
    return Output(np.full(shape, np.nan if np.dtype(dtype).kind == "f" else -77, dtype))


def sparse_operand(rows: int, columns: int, random: Random) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values and metadata as sparse_gemm.cu takes them, and the dense matrix that they stand for."""
    kept = PATTERNS[random.integers(0, 6, (rows, columns // 4))]
    values = random.integers(-4, 5, (rows, columns // 4, 2)).astype(np.float16)
    dense = np.zeros((rows, columns // 4, 4), np.float16)
    np.put_along_axis(dense, kept, values, axis=2)
    # Sixteen bits for sixteen columns; rows that are not there keep 0 and 1.
    codes = np.full(((rows + 127) // 128 * 128, columns // 4), 0x4, np.uint32)
    codes[:rows] = kept[..., 0] | kept[..., 1] << 2
    words = (codes.reshape(len(codes), -1, 4) << (4 * np.arange(4, dtype=np.uint32))).sum(2).astype(np.uint32)
    tiles = words.reshape(-1, 8, 2, 8, columns // 64, 4)  # [M/128][8][half of 16][lane / 4][K/64][lane % 4]
    pairs = tiles[:, :, 0] | tiles[:, :, 1] << 16
    metadata = np.ascontiguousarray(pairs.transpose(0, 3, 1, 2, 4))
    return values.reshape(rows, -1), metadata, dense.reshape(rows, columns)


def sparse_gemm(random: Random, m: int = 136, n: int = 144, k: int = 256) -> Workload:
    values, metadata, dense = sparse_operand(m, k, random)
    b = random.integers(-4, 5, (n, k)).astype(np.float16)
    expected = dense.astype(np.float32) @ b.astype(np.float32).T
    return Workload(
        "sparse_gemm",
        ((n + 127) // 128, (m + 127) // 128),
        128,
        [values, metadata, b, _garbage((m, n), np.float32), m, n, k],
        {3: expected},
        shared=76800,
    )


def dense_gemm(random: Random) -> Workload:
    a = random.integers(-4, 5, (64, 96)).astype(np.float16)
    b = random.integers(-4, 5, (96, 128)).astype(np.float16)
    expected = a.astype(np.float32) @ b.astype(np.float32)
    return Workload("dense_gemm", (2, 1), 128, [a, b, _garbage((64, 128), np.float32), 128, 96], {2: expected})


def transpose(random: Random) -> Workload:
    x = random.standard_normal((70, 45)).astype(np.float32)
    return Workload("transpose", (2, 3), (32, 8), [x, _garbage((45, 70), np.float32), 70, 45], {1: x.T.copy()})


def reduce(random: Random) -> Workload:
    x = random.integers(-9, 10, 1000).astype(np.float32)
    start = np.array([5], np.float32)
    return Workload("reduce", 3, 128, [x, start.copy(), len(x)], {1: start + x.sum(dtype=np.float32)})


def scan(random: Random) -> Workload:
    x = random.integers(-100, 100, 500).astype(np.int32)
    expected = np.concatenate([x[:256].cumsum(), x[256:].cumsum()]).astype(np.int32)
    return Workload("scan", 2, 256, [x, _garbage(500, np.int32), 500], {1: expected})


def histogram(random: Random) -> Workload:
    x = random.integers(0, 64, 3000).astype(np.uint8)
    start = random.integers(0, 10, 64).astype(np.int32)
    expected = start + np.bincount(x, minlength=64).astype(np.int32)
    return Workload("histogram", 4, 128, [x, start, len(x)], {1: expected})


def stencil(random: Random) -> Workload:
    x = random.integers(-100, 100, (37, 50)).astype(np.float32)
    padded = np.pad(x, 1)
    around = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
    arguments = [x, _garbage(x.shape, np.float32), 37, 50]
    return Workload("stencil", (4, 3), (16, 16), arguments, {1: (np.float32(0.25) * around - x)})


def moving_sum(random: Random) -> Workload:
    x = random.integers(-100, 100, 300).astype(np.int32)
    padded = np.pad(x, (0, 3))
    expected = sum(padded[i : i + 300] for i in range(4))
    return Workload("moving_sum", 3, 128, [x, _garbage(300, np.int32), 300], {1: expected})


def last_block(random: Random) -> Workload:
    x = random.integers(-100, 100, 300).astype(np.int32)
    arguments = [x, _garbage(5, np.int32), np.zeros(1, np.int32), _garbage(1, np.int32), 300]
    parts = np.array([x[i : i + 64].sum() for i in range(0, 320, 64)], np.int32)
    return Workload("last_block", 5, 64, arguments, {1: parts, 3: parts.sum(keepdims=True, dtype=np.int32)})


def handover(random: Random) -> Workload:
    x = random.integers(0, 1000, (7, 32)).astype(np.int32)
    return Workload("handover", 1, 64, [x, _garbage(x.shape, np.int32), 7], {1: x[:, ::-1]})


def warp_exchange(random: Random) -> Workload:
    x = random.integers(0, 1000, (8, 32)).astype(np.int32)
    reversed_bits = [int(f"{i:05b}"[::-1], 2) for i in range(32)]
    expected = x[:, reversed_bits][:, ::-1]
    return Workload("warp_exchange", 2, 128, [x, _garbage(x.shape, np.int32)], {1: expected})


def spin_lock(random: Random) -> Workload:
    x = random.integers(-100, 100, 96).astype(np.int32)
    arguments = [x, np.zeros(1, np.int32), np.array([7], np.int32)]
    return Workload("spin_lock", 1, 96, arguments, {1: np.zeros(1), 2: np.array([7 + x.sum()])})


def sort(random: Random) -> Workload:
    x = random.standard_normal((70, 16)).astype(np.float32)
    return Workload("sort", 3, 32, [x, 70], {0: np.sort(x, axis=1)})


def count_keys(random: Random) -> Workload:
    keys = random.integers(0, 10, 500).astype(np.int32)
    expected = np.bincount(keys, minlength=10).astype(np.int32)
    return Workload("count_keys", 4, 128, [keys, np.zeros(10, np.int32), 500], {1: expected})


def polynomial(random: Random) -> Workload:
    x = random.standard_normal(4 * 75).astype(np.float32)
    sums = np.zeros_like(x)
    for coefficient in (0.25, 0.5, -2.0, 1.0):
        sums = sums * x + np.float32(coefficient)  # two roundings, as the kernel asks for
    arguments = [x, _garbage(len(x), np.float16), 75]
    return Workload("polynomial", 3, 32, arguments, {0: np.zeros_like(x), 1: sums.astype(np.float16)})


WORKLOADS: dict[str, Callable[[Random], Workload]] = {
    make.__name__: make
    for make in (
        sparse_gemm,
        dense_gemm,
        transpose,
        reduce,
        scan,
        histogram,
        stencil,
        moving_sum,
        last_block,
        handover,
        warp_exchange,
        spin_lock,
        sort,
        count_keys,
        polynomial,
    )
}


def workload(name: str, seed: int = 0) -> Workload:
    return WORKLOADS[name](np.random.default_rng(seed))
