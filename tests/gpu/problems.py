"""Sparse linear problems on any device, and what their result must be. No test in here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from bounds import EXACT, ROUNDING
from torch import Tensor

from sparse24 import ops

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "s8": torch.int8}
# Around the edges of every tile, of the blocks of W and of the copies of x: tokens, out_features, in_features.
SHAPES = [
    *[(1, 1, 1), (1, 64, 4), (2, 65, 12), (3, 16, 20), (7, 63, 36), (8, 128, 64), (9, 129, 127)],
    *[(15, 192, 128), (16, 193, 200), (17, 256, 256), (31, 300, 260), (33, 127, 512), (63, 320, 129)],
    *[(64, 64, 96), (65, 257, 513), (100, 191, 136), (127, 512, 72), (128, 384, 640), (129, 385, 1000)],
    *[(197, 768, 768), (255, 200, 260), (256, 256, 1024), (257, 321, 257), (511, 449, 320)],
]


@dataclass
class Problem:
    """W [N, K] 2:4 of an element type, in packed form on a device, and what it multiplies."""

    name: str  # of the element type, in DTYPES
    device: str
    weight: Tensor  # dense, what the product multiplies: scales are apart
    packed: Tensor
    scales: Tensor | None

    @property
    def sizes(self) -> dict[str, Any]:
        rows, columns = self.weight.shape
        return {"out_features": rows, "in_features": columns, "dtype": DTYPES[self.name]}

    def linear(self, x: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
        return ops.linear(x, self.packed, bias, self.scales, **self.sizes, **options)


def make(name: str, rows: int, columns: int, device: str, *, integers: bool, scaled: bool = False) -> Problem:
    """integers: small ones, so that every sum is exact in any order. scaled: int8 with scales."""
    generator = torch.Generator().manual_seed(rows * 10007 + columns)
    if integers or name == "s8":
        limit = 4 if integers else 127
        full = torch.randint(-limit, limit + 1, (rows, columns), generator=generator).to(DTYPES[name])
    else:
        full = torch.randn(rows, columns, generator=generator).to(DTYPES[name])
    values, meta = ops.prune_compress(full)
    weight = ops.decompress(values, meta, in_features=columns)
    scales = torch.rand(rows, generator=generator) * 0.02 + 0.001 if scaled else None
    packed = ops.pack(values.to(device), meta.to(device), in_features=columns)
    return Problem(name, device, weight.to(device), packed, None if scales is None else scales.to(device))


def tokens(problem: Problem, count: int, *, integers: bool, layout: str = "rows") -> Tensor:
    """x [count, K]. layout: "rows" lie one behind the other; "odd" is a slice of wider rows, one element in; "even"
    one whose rows are four bytes aligned; "same" is one row for all tokens."""
    generator = torch.Generator().manual_seed(count)
    columns = problem.weight.shape[1]
    dtype = DTYPES[problem.name]
    wide = {"rows": columns, "odd": columns + 3, "even": columns + 4 - columns % 2, "same": columns}[layout]
    first = {"odd": 1, "even": 2}.get(layout, 0)
    shape = (1 if layout == "same" else count, wide)
    if dtype == torch.int8:
        limit = 4 if integers else 127
        x = torch.randint(-limit, limit + 1, shape, generator=generator)
    else:
        x = torch.randint(-4, 5, shape, generator=generator) if integers else torch.randn(shape, generator=generator)
    return x.to(dtype).to(problem.device)[:, first : first + columns].expand(count, columns)


def poison(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """Leaves memory where the next tensor of this size is likely to come to lie full of NaN, or of 77."""
    torch.full(shape, float("nan") if dtype.is_floating_point else 77, dtype=dtype, device=device)


def assert_exact(y: Tensor, x: Tensor, weight: Tensor) -> None:
    """y is the product of small integers, each sum exact, rounded once to y's type."""
    exact = (x.double() @ weight.double().T).to(y.dtype)
    if not torch.equal(y, exact):
        wrong = (y != exact) | y.isnan()
        m, n = (int(i) for i in wrong.nonzero()[0])
        raise AssertionError(f"{int(wrong.sum())} of {y.numel()} differ; [{m}, {n}] is {y[m, n]}, not {exact[m, n]}")


def assert_near(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    slack: float = 1.0,
) -> None:
    """|y - exact| within the bound of tests/bounds.py, computed in float64 where y is."""
    x64, w64 = x.double(), weight.double()
    product, magnitude = x64 @ w64.T, x64.abs() @ w64.abs().T
    for term in (bias, residual):
        if term is not None:
            product, magnitude = product + term.double(), magnitude + term.double().abs()
    exact = EXACT[activation](product)
    own = 0.0 if activation == "none" else 2**-20 * product.abs()
    sums = (weight.shape[1] + 8) * 2**-23 * magnitude  # tensor cores truncate: a whole unit a step
    bound = slack * (1.13 * sums + own + ROUNDING[y.dtype] * exact.abs() + 2**-24)
    ratio = (y.double() - exact).abs() / bound
    ratio = torch.where(ratio.isnan(), torch.inf, ratio)
    if ratio.numel() and float(ratio.max()) > 1:
        m, n = divmod(int(ratio.argmax()), y.shape[-1])
        raise AssertionError(f"[{m}, {n}] is {y[m, n]}, not {exact[m, n]}: {float(ratio.max()):.2f} of the bound")


def force(kernel: str, splits: int = 1) -> AbstractContextManager[None]:
    """A kernel by name instead of the table's choice; "" leaves it to the table."""
    return ops.force_linear_kernel(kernel, splits) if kernel else nullcontext()


def cannot_run(error: RuntimeError) -> bool:
    """Whether an operator refused a forced kernel for this shape or alignment."""
    return "linear_kernel must be one of" in str(error)


def kernels(name: str) -> list[str]:
    return ops.linear_kernels(DTYPES[name])


def every_kernel() -> Iterator[tuple[str, str]]:
    for name in DTYPES:
        for kernel in ["", *kernels(name)]:
            yield name, kernel
