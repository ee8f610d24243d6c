"""Triton's kernels, compiled for three architectures, against torch: no check says a word."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracles
import pytest
import torch
import triton_kernels as kernels
from torch import Tensor

import sparse24.ptx

TARGETS = [80, 89, 120]
U32, U16 = 2.0**-24, 2.0**-11  # half an ulp, relative: float32, float16


def run(kernel: kernels.Compiled, grid: int | tuple[int, ...], arguments: list[Any], **options: Any) -> None:
    """Launches with the scratch pointers that Triton appends, and expects silence."""
    module = sparse24.ptx.load(kernel.ptx)
    scratch = len(module.kernels[kernel.name].parameters) - len(arguments)
    assert 0 <= scratch <= 2
    arguments = arguments + [np.zeros(16, np.uint8) for _ in range(scratch)]
    report = module.launch(kernel.name, grid, kernel.threads, arguments, shared=kernel.shared, **options)
    oracles.assert_silent(report)


def assert_within(y: Tensor, exact: Tensor, bound: Tensor) -> None:
    """Element by element; the worst is named."""
    ratio = (y.double() - exact).abs() / bound
    worst = int(ratio.argmax())
    message = f"element {worst}: {y.flatten()[worst]} for {exact.flatten()[worst]}, {ratio.max():.2f} of the bound"
    assert y.shape == exact.shape and (ratio <= 1).all(), message


def matmul(target: int, stages: int, multiples: bool = True) -> kernels.Compiled:
    pointers = dict(a_ptr="*fp16", b_ptr="*fp16", c_ptr="*fp32", M="i32", N="i32", K="i32")
    names = ("a_ptr", "b_ptr", "c_ptr", "N", "K") if multiples else ()
    return kernels.compiled(
        kernels.matmul, pointers, target, stages=stages, multiples=names, TILE_M=64, TILE_N=64, TILE_K=32
    )


def test_the_pipeline_is_one() -> None:
    text = matmul(80, stages=4).ptx
    assert "cp.async.cg.shared.global" in text and "ldmatrix" in text and "mma.sync" in text
    assert "cp.async" not in matmul(80, stages=1).ptx


@pytest.mark.parametrize("order, seed", oracles.ORDERS)
@pytest.mark.parametrize("target", TARGETS)
def test_matmul_exact(target: int, order: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(-4, 5, (80, 176), generator=generator).half()
    b = torch.randint(-4, 5, (176, 112), generator=generator).half()
    c = torch.full((80, 112), torch.nan)
    run(matmul(target, stages=4), (2, 2), [a, b, c, 80, 112, 176], order=order, seed=seed)
    assert torch.equal(c, a.float() @ b.float())


@pytest.mark.parametrize("stages, multiples", [(1, True), (3, True), (3, False)])
def test_matmul_of_odd_shapes(stages: int, multiples: bool) -> None:
    rows, columns, depth = (65, 48, 112) if multiples else (67, 51, 37)
    a = torch.randint(-4, 5, (rows, depth)).half()
    b = torch.randint(-4, 5, (depth, columns)).half()
    c = torch.full((rows, columns), torch.nan)
    run(matmul(80, stages, multiples), (2, 1), [a, b, c, rows, columns, depth])
    assert torch.equal(c, a.float() @ b.float())


@pytest.mark.parametrize("numerics, unit", [("ieee", U32), ("sm_80", 2 * U32), ("sm_90", 2 * U32), ("float64", U32)])
def test_matmul_of_reals(numerics: str, unit: float) -> None:
    """Truncation, where the numerics truncate, is twice as far off as rounding to nearest, for each of K terms."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(64, 256, generator=generator).half()
    b = torch.randn(256, 64, generator=generator).half()
    c = torch.full((64, 64), torch.nan)
    run(matmul(80, stages=3), (1, 1), [a, b, c, 64, 64, 256], numerics=numerics, threads=2)
    size = a.double().abs() @ b.double().abs()
    assert_within(c, a.double() @ b.double(), 256 * unit * size)


@pytest.mark.parametrize("order, seed", oracles.ORDERS)
@pytest.mark.parametrize("target", TARGETS)
def test_softmax(target: int, order: str, seed: int) -> None:
    x = 4 * torch.randn(5, 200, generator=torch.Generator().manual_seed(seed))
    y = torch.full_like(x, torch.nan)
    kernel = kernels.compiled(kernels.softmax, dict(x_ptr="*fp32", y_ptr="*fp32", columns="i32"), target, TILE=256)
    run(kernel, 5, [x, y, 200], order=order, seed=seed)
    exact = torch.softmax(x.double(), 1)
    # exp(t) is ex2.approx(t log2 e): 2^-22 of its own; t, and its product, lose half an ulp each, which exp multiplies
    # by |t|. The same holds for the sum, which adds 200 terms; the division costs 2 ulp at most (div.full).
    t = (x - x.max(1, keepdim=True).values).double().abs()
    of_one = 2.0**-22 + 3 * U32 * t
    bound = exact * (of_one + (of_one * exact).sum(1, keepdim=True) + 200 * U32 + 4 * U32) * 1.01
    assert_within(y, exact, bound + 2.0**-126)


@pytest.mark.parametrize("order, seed", oracles.ORDERS)
@pytest.mark.parametrize("target", TARGETS)
def test_layer_norm(target: int, order: str, seed: int) -> None:
    columns, epsilon = 250, 1e-5
    generator = torch.Generator().manual_seed(seed)
    x = (3 * torch.randn(4, columns, generator=generator) + 1).half()
    weight, bias = torch.randn(columns, generator=generator), torch.randn(columns, generator=generator)
    y = torch.full_like(x, torch.nan)
    signature = dict(x_ptr="*fp16", weight_ptr="*fp32", bias_ptr="*fp32", y_ptr="*fp16", columns="i32", epsilon="fp32")
    kernel = kernels.compiled(kernels.layer_norm, signature, target, TILE=256)
    run(kernel, 4, [x, weight, bias, y, columns, epsilon], order=order, seed=seed)
    x64, w64, b64 = x.double(), weight.double(), bias.double()
    exact = torch.nn.functional.layer_norm(x64, (columns,), w64, b64, epsilon)
    # The mean is off by (columns + 1) ulp of mean |x|; the same again is in each x - mean. The variance sums `columns`
    # squares, each with two such errors; its root halves that.
    deviation = (x64.var(1, correction=0, keepdim=True) + epsilon).sqrt()
    of_mean = (columns + 2) * U32 * x64.abs().mean(1, keepdim=True)
    of_scale = (columns + 8) * U32 + 2 * of_mean / deviation
    normal = (x64 - x64.mean(1, keepdim=True)).abs() / deviation
    bound = w64.abs() * (of_mean / deviation + normal * (of_scale + 4 * U32)) + 2 * U32 * (b64.abs() + exact.abs())
    assert_within(y, exact, bound * 1.01 + U16 * exact.abs() + 2.0**-25)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("order, seed", oracles.ORDERS)
@pytest.mark.parametrize("target", TARGETS)
def test_column_sums_by_atomics(target: int, order: str, seed: int, threads: int) -> None:
    """Blocks add to the same sums: exact on integers, in any order, from any thread."""
    x = torch.randint(-8, 9, (150, 100), generator=torch.Generator().manual_seed(seed)).float()
    start = torch.arange(100).float()
    sums = start.clone()
    signature = dict(x_ptr="*fp32", sums_ptr="*fp32", rows="i32", columns="i32")
    kernel = kernels.compiled(kernels.column_sums, signature, target, TILE_ROWS=32, TILE_COLUMNS=64)
    run(kernel, (5, 2), [x, sums, 150, 100], order=order, seed=seed, threads=threads)
    assert torch.equal(sums, start + x.sum(0))


@pytest.mark.parametrize("target, kind", [(80, "e5m2"), (89, "e4m3fn"), (89, "e5m2"), (120, "e4m3fn"), (120, "e5m2")])
def test_fp8_cast(target: int, kind: str) -> None:
    """All float16 values within the range of the type and random float32 ones: the same bits as torch's cast."""
    kind8 = getattr(torch, f"float8_{kind}")
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16).float()
    x = torch.cat([halves, torch.randn(5000), torch.randn(5000) * 2.0**-7])
    x = x[x.abs() <= torch.finfo(kind8).max]
    y = torch.zeros(len(x), dtype=torch.uint8)
    name = {"e4m3fn": "fp8e4nv", "e5m2": "fp8e5"}[kind]
    kernel = kernels.compiled(kernels.cast, dict(x_ptr="*fp32", y_ptr=f"*{name}", count="i32"), target, TILE=256)
    run(kernel, (len(x) + 255) // 256, [x, y, len(x)])
    assert torch.equal(y, x.to(kind8).view(torch.uint8))
