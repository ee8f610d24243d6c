"""The linear kernels on the PTX that ships, through the whole operator: allocation, choice, packing, launch.

Integers so small that every partial sum is exact: equality is of bits, and no check of the emulator says a word.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import bounds
import pytest
import torch
from torch import Tensor

import sparse24
from sparse24 import ops

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "s8": torch.int8}
COLUMN_BLOCK = {"f16": 64, "bf16": 64, "s8": 128}  # columns of W that a stage holds
CODES = (0x4, 0x8, 0x9, 0xC, 0xD, 0xE)


@dataclass(frozen=True)
class Kernel:
    """rows x tokens of a tile; unit: x begins and steps at multiples of so many bytes."""

    tile: str
    rows: int
    tokens: int
    unit: int


KERNELS = [
    Kernel("256x128", 256, 128, 16),
    Kernel("192x256", 192, 256, 16),
    Kernel("192x128", 192, 128, 16),
    Kernel("128x128", 128, 128, 16),
    Kernel("64x128", 64, 128, 16),
    Kernel("64x64", 64, 64, 16),
    Kernel("64x64_by4", 64, 64, 4),
    Kernel("64x64_by1", 64, 64, 1),
]
every_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.tile)
every_type = pytest.mark.parametrize("name", DTYPES)


def weight_of(rows: int, columns: int, dtype: torch.dtype, shift: int = 0, seed: int = 0) -> Tensor:
    """A 2:4 matrix of small nonzero integers; group g of row n has code (n + g + shift) % 6."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // 4)
    codes = torch.tensor(CODES)[(torch.arange(rows)[:, None] + torch.arange(groups) + shift) % 6]
    keep = torch.zeros(rows, groups, 4, dtype=torch.bool)
    keep.scatter_(2, torch.stack([codes & 3, codes >> 2], -1), True)
    values = torch.randint(1, 5, (rows, groups, 4), generator=generator)
    values *= 1 - 2 * torch.randint(0, 2, values.shape, generator=generator)
    return torch.where(keep, values, 0).flatten(1)[:, :columns].to(dtype).contiguous()


def tokens_of(
    tokens: int, columns: int, dtype: torch.dtype, unit: int = 16, seed: int = 1, low: int = -4, high: int = 5
) -> Tensor:
    """x [tokens, columns] of small integers, whose rows start at multiples of `unit` bytes and of nothing greater.

    What lies around it in memory is NaN, or 77.
    """
    generator = torch.Generator().manual_seed(seed)
    step = max(1, unit // dtype.itemsize)
    stride = -(-columns // step) * step
    stride += step * (1 - stride // step % 2)  # an odd multiple
    around = torch.full((tokens + 2, stride), float("nan") if dtype.is_floating_point else 77, dtype=dtype)
    x = around.flatten()[step:].as_strided((tokens, columns), (stride, 1), around.storage_offset() + step)
    return x.copy_(torch.randint(low, high, x.shape, generator=generator))


def product(x: Tensor, weight: Tensor) -> Tensor:
    return x.double() @ weight.double().T


def multiply(
    x: Tensor, weight: Tensor, kernel: str | None, splits: int | None = None, **emulation: object
) -> tuple[Tensor, list[sparse24.ptx.Report]]:
    """x W^T by that kernel on the emulator; integers give int32, floats their own type."""
    packed = ops.pack(*sparse24.compress(weight), in_features=weight.shape[1])
    arguments = {"out_features": weight.shape[0], "in_features": weight.shape[1], "dtype": weight.dtype}
    if weight.dtype is torch.int8:
        arguments["out_dtype"] = torch.int32
    with sparse24.emulate("sm_80", linear_kernel=kernel, splits=splits, **emulation) as run:
        y = ops.linear(x, packed, **arguments)
    return y, run.reports


def assert_exact(
    rows: int, columns: int, tokens: int, name: str, kernel: Kernel, splits: int | None = None, **emulation: object
) -> None:
    weight = weight_of(rows, columns, DTYPES[name])
    x = tokens_of(tokens, columns, DTYPES[name], kernel.unit)
    y, reports = multiply(x, weight, f"linear_{name}_{kernel.tile}", splits, **emulation)
    assert f"linear_{name}_{kernel.tile}" in [report.kernel for report in reports]
    expected = product(x, weight).to(y.dtype)
    assert torch.equal(y, expected), _first_difference(y, expected)


def _first_difference(y: Tensor, expected: Tensor) -> str:
    token, feature = (y != expected).nonzero()[0].tolist()
    place, count = f"y[{token}, {feature}]", int((y != expected).sum())
    return f"{place} is {y[token, feature]}, not {expected[token, feature]}; {count} of {y.numel()} differ"


# ---- Shapes ----------------------------------------------------------------------------------------------------------


def edge_shapes(kernel: Kernel, block: int) -> Iterator[tuple[int, int, int]]:
    """rows, columns, tokens around every edge of the tile, of the column blocks and of the ring."""
    rows, tokens = kernel.rows, kernel.tokens
    smallest = rows - 63  # W is padded to 64 rows, and the tile must fit
    for n in (smallest, rows - 1, rows, rows + 1, rows + 64, 2 * rows + 37):
        yield n, 3 * block, tokens
    for m in (1, 2, tokens - 1, tokens, tokens + 1, 2 * tokens + 3):
        yield rows, 2 * block, m
    for k in (1, 2, 3, 4, 5, 12, 20, block // 2 - 1, block // 2, block // 2 + 1):
        yield rows, k, 5
    for blocks in (1, 2, 3, 4, 5, 7):  # the ring has three stages
        for k in (blocks * block - 1, blocks * block, blocks * block + 1):
            yield rows, k, 9


@every_type
@every_kernel
def test_every_edge_of_the_tile(kernel: Kernel, name: str) -> None:
    orders = itertools.cycle([("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)])
    for (rows, columns, tokens), (order, seed) in zip(edge_shapes(kernel, COLUMN_BLOCK[name]), orders, strict=False):
        assert_exact(rows, columns, tokens, name, kernel, order=order, seed=seed)


@every_type
@every_kernel
def test_splits_of_k(kernel: Kernel, name: str) -> None:
    """As many as column blocks, one that is shorter than the others, and a ragged end."""
    block = COLUMN_BLOCK[name]
    for splits, columns in ((2, 2 * block), (3, 7 * block), (4, 5 * block + 4), (5, 5 * block - 1)):
        assert_exact(kernel.rows + 1, columns, kernel.tokens + 1, name, kernel, splits)


@every_type
@pytest.mark.parametrize("order, seed", [("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)])
def test_orders_and_threads(name: str, order: str, seed: int) -> None:
    """Several tiles each way, so that blocks and warps have something to disagree about."""
    for kernel, threads in itertools.product(KERNELS, (1, 2)):
        assert_exact(2 * kernel.rows + 1, 300, kernel.tokens + 9, name, kernel, order=order, seed=seed, threads=threads)


@every_type
@pytest.mark.parametrize("shift", range(6))
def test_every_code_in_every_lane(name: str, shift: int) -> None:
    """Over the six shifts each group of each row meets each code."""
    block = COLUMN_BLOCK[name]
    weight = weight_of(64, 2 * block, DTYPES[name], shift)
    for kernel in KERNELS[4:]:
        x = tokens_of(17, 2 * block, DTYPES[name], kernel.unit)
        y, _ = multiply(x, weight, f"linear_{name}_{kernel.tile}")
        assert torch.equal(y, product(x, weight).to(y.dtype))


@every_type
@every_kernel
def test_identity_gives_the_weight(kernel: Kernel, name: str) -> None:
    """x = I: every element of W, alone, at its own place."""
    columns = COLUMN_BLOCK[name] + 8
    weight = weight_of(kernel.rows, columns, DTYPES[name])
    x = tokens_of(columns, columns, DTYPES[name], kernel.unit)
    y, _ = multiply(x.copy_(torch.eye(columns)), weight, f"linear_{name}_{kernel.tile}")
    assert torch.equal(y.double(), weight.double().T)


# ---- Real numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["f16", "bf16"])
@every_kernel
def test_real_numbers_stay_within_the_bound(kernel: Kernel, name: str) -> None:
    torch.manual_seed(kernel.rows)
    weight = torch.randn(kernel.rows + 5, 333)
    weight = torch.where(sparse24.prune_mask(weight), weight, 0).to(DTYPES[name])
    x = tokens_of(33, 333, DTYPES[name], kernel.unit)
    x.copy_(torch.randn(x.shape))
    for numerics in ("sm_80", "ieee"):
        y, _ = multiply(x, weight, f"linear_{name}_{kernel.tile}", numerics=numerics)
        bounds.assert_linear(y, x, weight)


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_what_is_not_finite_stays_where_it_is(name: str) -> None:
    """NaN and Inf of a token, and of a row of W, reach their own outputs and no other, padding included."""
    weight = weight_of(70, 70, DTYPES[name])
    x = tokens_of(40, 70, DTYPES[name])
    kept = weight[3].nonzero()[0]
    x[7, kept], weight[20, weight[20].nonzero()[1]] = float("inf"), float("nan")
    clean = torch.ones(40, 70, dtype=torch.bool)
    clean[:, 20] = False
    clean[7] = weight[:, kept].squeeze(1) == 0
    clean[7, 20] = False
    for kernel in KERNELS[5:]:
        y, _ = multiply(x, weight, f"linear_{name}_{kernel.tile}")
        assert torch.equal(y[clean].double(), product(x.nan_to_num(0, 0), weight.nan_to_num(0))[clean])
        assert not y[~clean].isfinite().any()
