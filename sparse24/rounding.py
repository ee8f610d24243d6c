"""The rounding rule of integers, and products of what is rounded, as torch code: what the integer kernels compute.

Everything here is exact: the whole numbers are those of the kernels, sums of products have no rounding, and the scales
come on in the order of kernels/linear.cuh. So a layer in training gives what the integer layer gives that it becomes.
Gradients pass straight through the rounding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

# The largest whole number of each integer weight type; the smallest is its negative. x is rounded as int8.
LEVELS: dict[torch.dtype, int] = {torch.int8: 127, torch.int4: 7}  # type: ignore[attr-defined]

# So many products of int8 have a sum below 2^24, which float32 holds as it is, whatever the order.
EXACT_PRODUCTS = 1024


# ---- Whole numbers and their scales ----------------------------------------------------------------------------------


def quantize_rows(x: Tensor, levels: int = 127) -> tuple[Tensor, Tensor]:
    """Whole numbers and their scale, row by row: of a weight per output channel, of activations per token.

    x: [..., K] float32. Returns q [..., K] float32, whole numbers in [-levels, levels], and scale [..., 1] float32
    with scale = amax / levels (amax 0 gives 1) and q = clamp(round to nearest even(x / scale)). A row with an Inf or
    a NaN gets a scale that is not finite, and q * scale is NaN all along it.
    """
    amax = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros((*x.shape[:-1], 1))
    scale = scale_of(amax, levels)
    return torch.round(x / scale).clamp(-levels, levels), scale


def quantize_groups(x: Tensor, group_size: int, levels: int = 127) -> tuple[Tensor, Tensor]:
    """quantize_rows of each group of group_size columns of x [N, K]: q [N, K] and scale [N, groups]; see in_groups."""
    q, scale = quantize_rows(in_groups(x, group_size), levels)
    return q.flatten(1)[:, : x.shape[1]], scale.squeeze(-1)


def in_groups(x: Tensor, group_size: int) -> Tensor:
    """x [N, K] as [N, groups, group_size], where zeros fill up the last group; one group at least."""
    groups = max(1, -(-x.shape[1] // group_size))
    return F.pad(x, (0, groups * group_size - x.shape[1])).view(len(x), groups, group_size)


def of_columns(scale: Tensor, columns: int, group_size: int) -> Tensor:
    """scale [N, groups], each as often as it has columns: [N, columns]."""
    return scale.repeat_interleave(group_size, 1)[:, :columns]


def scale_of(amax: Tensor, levels: int = 127) -> Tensor:
    """amax / levels; 1 for an amax of 0."""
    scale = amax / torch.full_like(amax, levels)  # by a tensor: CUDA multiplies by the reciprocal of a Python number
    return torch.where(scale == 0, 1.0, scale)


def quantize_by(x: Tensor, scale: Tensor, levels: int = 127) -> Tensor:
    """clamp(round to nearest even(x / scale)), float32, by a scale that is given; NaN becomes 0."""
    return torch.round(x.float() / scale).clamp(-levels, levels).nan_to_num(0.0)


class Rounded(NamedTuple):
    """A tensor as whole numbers, and as the float32 that these stand for: q * scale, which gradients flow through."""

    q: Tensor  # int8
    scale: Tensor  # float32, broadcasts against q; [N, groups] where the columns of a weight share it in groups
    value: Tensor
    group_size: int | None = None


def round_rows(x: Tensor, levels: int = 127) -> Rounded:
    """x [..., K] by quantize_rows. The gradient passes straight. A row that is not finite has q = 0, scale NaN."""
    with torch.no_grad():
        q, scale = quantize_rows(x.float(), levels)
        finite = scale.isfinite()
        q, scale = torch.where(finite, q, 0.0), torch.where(finite, scale, torch.nan)
    value: Tensor = _Straight.apply(x, q, scale)  # type: ignore[no-untyped-call]
    return Rounded(q.to(torch.int8), scale, value)


def round_by(x: Tensor, scale: Tensor, levels: int = 127) -> Rounded:
    """x by quantize_by, by a scale that broadcasts. The gradient passes straight where x is in range, and is 0 beyond.

    That of scale, if it wants one, is of LSQ (Esser et al. 2020, arXiv 1902.08153): q - x / scale where x is in range,
    q beyond, summed with the gradient and divided by the root of levels times the entries that share the scale.
    """
    with torch.no_grad():
        q = quantize_by(x, scale, levels)
    value: Tensor = _Step.apply(x, scale, q, levels)  # type: ignore[no-untyped-call]
    return Rounded(q.to(torch.int8), scale.detach(), value)


def round_x(x: Tensor, scale: Tensor | None) -> Rounded:
    """Activations [..., K]: by the scale of the tensor, or without one row by row. int8 is rounded by it already."""
    if scale is not None and x.dtype is torch.int8:
        return Rounded(x, scale, x * scale)
    return round_rows(x) if scale is None else round_by(x, scale)


def round_weight(weight: Tensor, scales: Tensor | None, levels: int, group_size: int | None = None) -> Rounded:
    """A weight [N, ...] by round_rows, or by round_by and scales [N]; each group of columns by its own.

    group_size: of columns of the weight as [N, K] that share a scale; scales are [groups, N] then. A group that is not
    whole counts as whole in the gradient of its scale.
    """
    if group_size is None:
        ones = [1] * (weight.dim() - 1)
        if scales is not None:
            return round_by(weight, scales.view(-1, *ones), levels)
        rows = round_rows(weight.flatten(1), levels)
        return Rounded(rows.q.view_as(weight), rows.scale.view(-1, *ones), rows.value.view_as(weight))
    matrix = weight.flatten(1)
    groups = in_groups(matrix, group_size)
    each = round_rows(groups, levels) if scales is None else round_by(groups, scales.T.unsqueeze(-1), levels)
    q, value = (part.flatten(1)[:, : matrix.shape[1]].reshape(weight.shape) for part in (each.q, each.value))
    return Rounded(q, each.scale.squeeze(-1), value, group_size)


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return q * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.to(ctx.dtype), None, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, q: Tensor, levels: int) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.levels = levels
        return q * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        exact = x.float() / scale
        inside = exact.abs() <= ctx.levels
        grad_x = torch.where(inside, grad, 0).to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_scale = None
        if ctx.needs_input_grad[1]:
            q = quantize_by(x, scale, ctx.levels)
            each = grad * torch.where(inside, q - exact, q)
            shared = max(1, each.numel() // max(1, scale.numel()))
            grad_scale = each.sum_to_size(scale.shape) / (shared * ctx.levels) ** 0.5
        return grad_x, grad_scale, None, None


def fake_quantize(x: Tensor, levels: int = 127) -> Tensor:
    """x [..., K] rounded and back row by row (quantize_rows), dtype of x. The gradient passes straight."""
    return round_rows(x, levels).value.to(x.dtype)


# ---- Products --------------------------------------------------------------------------------------------------------


def linear(x: Rounded, weight: Rounded, bias: Tensor | None) -> Tensor:
    """sums * (x.scale * weight.scale) + bias, float32; x [..., K] with scales [..., 1] or [], weight [N, K], [N, 1].

    Where columns share scales in groups, total * x.scale + bias: for each group, total = total + sums * its scale.
    """
    operands = (*x[:2], *weight[:2], weight.group_size)
    y: Tensor = _Linear.apply(x.value, weight.value, *operands)  # type: ignore[no-untyped-call]
    return y if bias is None else y + bias.float()


class _Linear(torch.autograd.Function):
    """Of whole numbers and scales, with the gradients of what they stand for, the first two arguments."""

    @staticmethod
    def forward(
        ctx: Any,
        _: Tensor,
        __: Tensor,
        x: Tensor,
        x_scale: Tensor,
        w: Tensor,
        w_scale: Tensor,
        group_size: int | None,
    ) -> Tensor:
        ctx.save_for_backward(x, x_scale, w, w_scale)
        ctx.group_size = group_size
        if group_size is None:
            return _sums(x, w) * (x_scale * w_scale.flatten())
        total = x_scale.new_zeros(())
        groups = zip(*(torch.split(one, group_size, -1) for one in (x, w)), w_scale.unbind(1), strict=True)
        for x_columns, w_columns, scale in groups:
            total = total + _sums(x_columns, w_columns) * scale
        return total * x_scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, x_scale, w, w_scale = ctx.saved_tensors
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            if ctx.group_size is not None:
                w_scale = of_columns(w_scale, w.shape[1], ctx.group_size)
            grad_x = grad @ (w * w_scale)
        if ctx.needs_input_grad[1]:
            grad_w = grad.reshape(-1, len(w)).mT @ (x * x_scale).reshape(-1, w.shape[1])
        return grad_x, grad_w, None, None, None, None, None


def _sums(x: Tensor, w: Tensor) -> Tensor:
    """Of the products of whole numbers, x [..., K] and w [N, K], exact and then rounded to float32 once."""
    cuts = list(range(EXACT_PRODUCTS, x.shape[-1], EXACT_PRODUCTS))
    pieces = (one.float().tensor_split(cuts, -1) for one in (x, w))
    return _total([F.linear(*piece) for piece in zip(*pieces, strict=True)])


def _total(sums: list[Tensor]) -> Tensor:
    """Their sum, rounded to float32 once."""
    return sums[0] if len(sums) == 1 else torch.stack(sums).double().sum(0).float()


def conv2d(x: Rounded, weight: Rounded, bias: Tensor | None, **geometry: Any) -> Tensor:
    """The same of a convolution: x [B, C, H, W], weight [O, C / groups, R, S], scales [B, 1, 1, 1] or [], [O, 1, 1, 1].

    geometry: stride, padding, dilation and groups, as F.conv2d has them.
    """
    y: Tensor = _Conv2d.apply(x.value, weight.value, *x[:2], *weight[:2], geometry)  # type: ignore[no-untyped-call]
    return y if bias is None else y + bias.float().view(-1, 1, 1)


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        _: Tensor,
        __: Tensor,
        x: Tensor,
        x_scale: Tensor,
        w: Tensor,
        w_scale: Tensor,
        geometry: dict[str, Any],
    ) -> Tensor:
        ctx.save_for_backward(x, x_scale, w, w_scale)
        ctx.geometry = geometry
        groups, channels, (height, width) = geometry["groups"], w.shape[1], w.shape[2:]
        images, kernels = x.float().view(len(x), groups, channels, *x.shape[2:]), w.float()
        step = max(1, EXACT_PRODUCTS // (height * width))
        sums = []
        for i in range(0, channels, step):
            piece = images[:, :, i : i + step].flatten(1, 2)
            sums.append(F.conv2d(piece, kernels[:, i : i + step], **geometry))
        return _total(sums) * (x_scale * w_scale.view(-1, 1, 1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, x_scale, w, w_scale = ctx.saved_tensors
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_x = conv2d_input(x.shape, w * w_scale, grad, **ctx.geometry)  # type: ignore[no-untyped-call]
        if ctx.needs_input_grad[1]:
            grad_w = conv2d_weight(x * x_scale, w.shape, grad, **ctx.geometry)  # type: ignore[no-untyped-call]
        return grad_x, grad_w, None, None, None, None, None
