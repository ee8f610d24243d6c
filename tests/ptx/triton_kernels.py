"""Kernels in Triton, compiled to PTX without a GPU: what test_triton.py runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from oracles import BUILD
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

triton.knobs.cache.dir = str(BUILD / "triton")


@dataclass(frozen=True)
class Compiled:
    """A kernel's PTX and what its launch needs beside its own arguments."""

    ptx: str
    name: str
    threads: int
    shared: int


def compiled(
    kernel: Any,
    signature: dict[str, str],
    target: int,
    warps: int = 4,
    stages: int = 3,
    multiples: Sequence[str] = (),
    **constants: Any,
) -> Compiled:
    """A kernel for compute capability `target`.

    signature: the types of the arguments, in order ("*fp16", "i32"); multiples: the arguments that are multiples of 16,
    which lets Triton load vectors; constants: the values of the constexprs.
    """
    names = signature | dict.fromkeys(constants, "constexpr")

    def index(name: str) -> tuple[int]:
        return (kernel.arg_names.index(name),)

    source = ASTSource(
        kernel,
        names,
        {index(name): value for name, value in constants.items()},
        {index(name): [["tt.divisibility", 16]] for name in multiples},
    )
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    result = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    metadata = result.metadata
    return Compiled(result.asm["ptx"], metadata.name, 32 * metadata.num_warps, metadata.shared)


@triton.jit
def matmul(a_ptr, b_ptr, c_ptr, M, N, K, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr):
    """c = a @ b: a [M, K], b [K, N], row-major; a pipeline of cp.async where there are stages enough."""
    rows = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    columns = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    depth = tl.arange(0, TILE_K)
    a_ptrs = a_ptr + rows[:, None] * K + depth[None, :]
    b_ptrs = b_ptr + depth[:, None] * N + columns[None, :]
    sums = tl.zeros((TILE_M, TILE_N), dtype=tl.float32)
    for k in range(0, K, TILE_K):
        a = tl.load(a_ptrs, mask=(rows[:, None] < M) & (depth[None, :] < K - k), other=0.0)
        b = tl.load(b_ptrs, mask=(depth[:, None] < K - k) & (columns[None, :] < N), other=0.0)
        sums = tl.dot(a, b, sums)
        a_ptrs += TILE_K
        b_ptrs += TILE_K * N
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(c_ptr + rows[:, None] * N + columns[None, :], sums.to(c_ptr.dtype.element_ty), mask=inside)


@triton.jit
def softmax(x_ptr, y_ptr, columns, TILE: tl.constexpr):
    """y = softmax of each row of x; a block has a row."""
    row = tl.program_id(0)
    column = tl.arange(0, TILE)
    x = tl.load(x_ptr + row * columns + column, mask=column < columns, other=-float("inf"))
    exponentials = tl.exp(x - tl.max(x, axis=0))
    tl.store(y_ptr + row * columns + column, exponentials / tl.sum(exponentials, axis=0), mask=column < columns)


@triton.jit
def layer_norm(x_ptr, weight_ptr, bias_ptr, y_ptr, columns, epsilon, TILE: tl.constexpr):
    """y = (x - mean) / sqrt(variance + epsilon) * weight + bias, of each row."""
    row = tl.program_id(0)
    column = tl.arange(0, TILE)
    inside = column < columns
    x = tl.load(x_ptr + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / columns
    centred = tl.where(inside, x - mean, 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, axis=0) / columns + epsilon)
    weight = tl.load(weight_ptr + column, mask=inside)
    bias = tl.load(bias_ptr + column, mask=inside)
    y = centred * scale * weight + bias
    tl.store(y_ptr + row * columns + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def column_sums(x_ptr, sums_ptr, rows, columns, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr):
    """sums += x summed over rows: each block adds its tile's sums by atomics."""
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    x = tl.load(x_ptr + row[:, None] * columns + column[None, :], mask=inside, other=0.0)
    tl.atomic_add(sums_ptr + column, tl.sum(x, axis=0), mask=column < columns)


@triton.jit
def cast(x_ptr, y_ptr, count, TILE: tl.constexpr):
    """y = x in y's type, by its own rounding."""
    index = tl.program_id(0) * TILE + tl.arange(0, TILE)
    x = tl.load(x_ptr + index, mask=index < count)
    tl.store(y_ptr + index, x.to(y_ptr.dtype.element_ty), mask=index < count)
