"""The rounding rule of integers, as torch code: what the kernels do to each row of x, and what becomes of a weight."""

from typing import Any

import torch
from torch import Tensor

# The largest whole number of each integer weight type; the smallest is its negative. x is rounded as int8.
LEVELS: dict[torch.dtype, int] = {torch.int8: 127, torch.int4: 7}  # type: ignore[attr-defined]


def quantize_rows(x: Tensor, levels: int = 127) -> tuple[Tensor, Tensor]:
    """Whole numbers and their scale, row by row: of a weight per output channel, of activations per token.

    x: [..., K] float32. Returns q [..., K] float32, whole numbers in [-levels, levels], and scale [..., 1] float32
    with scale = amax / levels (amax 0 gives 1) and q = clamp(round to nearest even(x / scale)). A row with an Inf or
    a NaN gets a scale that is not finite, and q * scale is NaN all along it.
    """
    amax = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros((*x.shape[:-1], 1))
    scale = amax / torch.full_like(amax, levels)  # by a tensor: CUDA multiplies by the reciprocal of a Python number
    scale = torch.where(scale == 0, 1.0, scale)
    return torch.round(x / scale).clamp(-levels, levels), scale


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: int) -> Tensor:
        q, scale = quantize_rows(x.float(), levels)
        return (q * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def fake_quantize(x: Tensor, levels: int = 127) -> Tensor:
    """x [..., K] rounded and back row by row (quantize_rows), dtype of x. The gradient passes straight."""
    y: Tensor = _FakeQuantize.apply(x, levels)  # type: ignore[no-untyped-call]
    return y
