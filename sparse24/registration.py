"""What torch needs to know of each operator: shapes without data, autocast, gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from sparse24.library import NAMES, ops
from sparse24.rounding import of_columns

# ---- The format ------------------------------------------------------------------------------------------------------


def columns_of(meta: Tensor, *, in_features: int, pattern: str = "2:4") -> Tensor:
    """The column each entry of values came from: int64, of the shape of (unpacked) values; beyond in_features too."""
    pair = pattern == "pair 4:8"
    groups = -(-in_features // (8 if pair else 4))
    codes = torch.stack([meta & 15, meta >> 4], dim=-1).flatten(1)[:, :groups].long()
    units = torch.stack([codes & 3, codes >> 2], dim=-1) + 4 * torch.arange(groups, device=meta.device)[:, None]
    if pair:
        units = torch.stack([2 * units, 2 * units + 1], dim=-1)
    return units.flatten(1)


def pack_int4(columns: Tensor) -> Tensor:
    """int8 [N, K] of -8 to 7 to uint8 [N, ceil(K / 2)]; the inverse of unpack_int4 for even K."""
    even, odd = columns[:, 0::2], columns[:, 1::2]
    if odd.shape[1] < even.shape[1]:
        odd = torch.cat([odd, odd.new_zeros(odd.shape[0], 1)], dim=1)
    return (even & 15 | (odd & 15) << 4).view(torch.uint8)


def unpack_int4(packed: Tensor) -> Tensor:
    """uint8 [N, B] of packed int4 to int8 [N, 2 * B] of -8 to 7: the even column is in the low half of a byte."""
    halves = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1).to(torch.int8)
    return torch.where(halves < 8, halves, halves - 16)


# ---- Shapes ----------------------------------------------------------------------------------------------------------

# A fake kernel repeats what decides the shape of its output, in the words of csrc/ops.cpp.


def _compressed_shapes(
    rows: int, in_features: int, pattern: str, dtype: str
) -> tuple[tuple[int, int], tuple[int, int]]:
    columns, kept = (8, 4) if pattern == "pair 4:8" else (4, 2)
    groups = (in_features + columns - 1) // columns
    return (rows, groups * kept // (2 if dtype.startswith("int4") else 1)), (rows, (groups + 1) // 2)


def _check_compressed(values: Tensor, meta: Tensor, in_features: int, dtype: str, pattern: str) -> None:
    rows = values.shape[0] if values.dim() else 0
    values_shape, meta_shape = _compressed_shapes(rows, in_features, pattern, dtype)
    if values.shape != values_shape:
        raise RuntimeError(
            f"values must be [N, {values_shape[1]}] for in_features = {in_features}; got {list(values.shape)}"
        )
    if meta.shape != meta_shape:
        raise RuntimeError(
            f"meta must be {list(meta_shape)} to match values {list(values.shape)} and in_features = {in_features}; "
            f"got {list(meta.shape)}"
        )


def _weight_columns(weight: Tensor) -> int:
    if weight.dim() != 2:
        raise RuntimeError(f"weight must be [N, K]; got {list(weight.shape)}")
    return weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)


@torch.library.register_fake("sparse24::prune_mask")
def _(weight: Tensor, pattern: str) -> Tensor:
    columns = _weight_columns(weight)
    return weight.new_empty((weight.shape[0], columns), dtype=torch.bool)


@torch.library.register_fake("sparse24::compress")
@torch.library.register_fake("sparse24::prune_compress")
def _(weight: Tensor, pattern: str) -> tuple[Tensor, Tensor]:
    columns = _weight_columns(weight)
    values, meta = _compressed_shapes(weight.shape[0], columns, pattern, NAMES[weight.dtype])
    return weight.new_empty(values), weight.new_empty(meta, dtype=torch.uint8)


@torch.library.register_fake("sparse24::decompress")
def _(values: Tensor, meta: Tensor, in_features: int, dtype: str, pattern: str) -> Tensor:
    _check_compressed(values, meta, in_features, dtype, pattern)
    return values.new_empty((values.shape[0], (in_features + 1) // 2 if dtype == "int4" else in_features))


@torch.library.register_fake("sparse24::validate")
def _(values: Tensor, meta: Tensor, in_features: int, dtype: str, pattern: str) -> None:
    _check_compressed(values, meta, in_features, dtype, pattern)


@torch.library.register_fake("sparse24::pack")
def _(values: Tensor, meta: Tensor, in_features: int, dtype: str, group_size: int = 0) -> Tensor:
    _check_compressed(values, meta, in_features, dtype, _packed_pattern(dtype))
    size = ops.packed_bytes(int(values.shape[0]), int(in_features), dtype, values.device.type, group_size)
    return values.new_empty((size,), dtype=torch.uint8)


@torch.library.register_fake("sparse24::unpack")
def _(packed: Tensor, out_features: int, in_features: int, dtype: str, group_size: int = 0) -> tuple[Tensor, Tensor]:
    values, meta = _compressed_shapes(out_features, in_features, _packed_pattern(dtype), dtype)
    return packed.new_empty(values, dtype=_storage(dtype)), packed.new_empty(meta)


def _packed_pattern(dtype: str) -> str:
    """What the kernels take a packed weight for; 1:2 is a stricter 2:4."""
    return "pair 4:8" if dtype == "int4" else "2:4"


def _storage(dtype: str) -> torch.dtype:
    storage: torch.dtype = torch.uint8 if dtype.startswith("int4") else getattr(torch, dtype)
    return storage


def check_residual(residual: Tensor, shape: torch.Size) -> None:
    if residual.shape != shape:
        raise RuntimeError(f"residual must be of the shape of y, {list(shape)}; got {list(residual.shape)}")


def _y_shape(x: Tensor, out_features: int, in_features: int) -> torch.Size:
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise RuntimeError(
            f"x must be [..., {in_features}] to match weight [{out_features}, {in_features}]; got {list(x.shape)}"
        )
    return torch.Size((*x.shape[:-1], out_features))


@torch.library.register_fake("sparse24::quantize")
def _(x: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.int8)


@torch.library.register_fake("sparse24::linear")
@torch.library.register_fake("sparse24::linear_inference")
def _(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    scales: Tensor | None,
    out_features: int,
    in_features: int,
    dtype: str,
    activation: str,
    weight_only: bool = False,
    group_size: int = 0,
) -> Tensor:
    return x.new_empty(_y_shape(x, out_features, in_features))


@torch.library.register_fake("sparse24::linear_fused")
def _(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    scales: Tensor | None,
    x_scales: Tensor | None,
    residual: Tensor | None,
    y_scale: Tensor | None,
    out_features: int,
    in_features: int,
    dtype: str,
    activation: str,
    weight_only: bool,
    out_dtype: str,
    group_size: int = 0,
) -> Tensor:
    shape = _y_shape(x, out_features, in_features)
    return x.new_empty(shape, dtype=_fused_dtype(out_dtype, residual, shape))


def _fused_dtype(out_dtype: str, residual: Tensor | None, shape: torch.Size) -> torch.dtype:
    if out_dtype not in ("float32", "float16", "bfloat16", "int8", "int32"):
        raise RuntimeError(f"out_dtype must be float32, float16, bfloat16, int8 or int32; got {out_dtype}")
    if residual is not None:
        check_residual(residual, shape)
    dtype: torch.dtype = getattr(torch, out_dtype)
    return dtype


def _conv_shapes(
    out_channels: int, in_channels: int, kernel_size: list[int], groups: int, dtype: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    values, meta = _compressed_shapes(1, in_channels // groups, _packed_pattern(dtype), dtype)
    return (out_channels, *kernel_size, values[1]), (out_channels, *kernel_size, meta[1])


@torch.library.register_fake("sparse24::conv2d_pack")
def _(values: Tensor, meta: Tensor, in_channels: int, groups: int, dtype: str) -> Tensor:
    out_channels, height, width = map(int, values.shape[:3])
    columns = 8 if _packed_pattern(dtype) == "pair 4:8" else 4
    segment = -(-int(in_channels) // groups // columns) * columns
    size = groups * ops.packed_bytes(out_channels // groups, height * width * segment, dtype, "cpu")
    return values.new_empty((size,), dtype=torch.uint8)


@torch.library.register_fake("sparse24::conv2d_unpack")
def _(
    packed: Tensor, out_channels: int, in_channels: int, kernel_size: list[int], groups: int, dtype: str
) -> tuple[Tensor, Tensor]:
    values, meta = _conv_shapes(out_channels, in_channels, kernel_size, groups, dtype)
    return packed.new_empty(values, dtype=_storage(dtype)), packed.new_empty(meta)


@torch.library.register_fake("sparse24::conv2d")
def _(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    scales: Tensor | None,
    x_scales: Tensor | None,
    residual: Tensor | None,
    y_scale: Tensor | None,
    out_channels: int,
    in_channels: int,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    dtype: str,
    activation: str,
    weight_only: bool,
    out_dtype: str,
) -> Tensor:
    if x.dim() != 4 or x.shape[1] != in_channels:
        raise RuntimeError(f"x must be [B, {in_channels}, H, W] for in_channels = {in_channels}; got {list(x.shape)}")
    extents = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    ]
    if min(extents) < 1:
        raise RuntimeError(f"x must be at least as large as the kernel, {list(kernel_size)}; got {list(x.shape)}")
    shape = torch.Size((x.shape[0], out_channels, *extents))
    channels_last = (x.shape[1] <= 1 or x.stride(1) == 1) and not x.is_contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=_fused_dtype(out_dtype, residual, shape), device=x.device, memory_format=layout)


# ---- Autocast --------------------------------------------------------------------------------------------------------

# Under autocast a float x is cast, as for F.linear. As a kernel of its own it costs nothing where autocast is off.
_autocast = torch.library.Library("sparse24", "FRAGMENT")


def _under_autocast(operator: Any, device: str) -> Callable[..., Tensor]:
    def cast_and_call(x: Tensor, *arguments: Any) -> Tensor:
        with torch.autocast(device, enabled=False):
            return operator(x.to(torch.get_autocast_dtype(device)) if x.is_floating_point() else x, *arguments)

    return cast_and_call


for _operator in (ops.linear.default, ops.linear_inference.default, ops.linear_fused.default, ops.conv2d.default):
    for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _autocast.impl(_operator, _under_autocast(_operator, _device), _key)


# ---- Gradients -------------------------------------------------------------------------------------------------------


def _decompress_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, meta, ctx.in_features, _, ctx.pattern = inputs
    ctx.save_for_backward(meta)


def _decompress_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (meta,) = ctx.saved_tensors
    columns = columns_of(meta, in_features=ctx.in_features, pattern=ctx.pattern)
    inside = columns < ctx.in_features
    gathered = grad.gather(1, torch.where(inside, columns, 0))
    return torch.where(inside, gathered, 0), None, None, None, None


torch.library.register_autograd("sparse24::decompress", _decompress_backward, setup_context=_decompress_context)


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, bias, scales, ctx.out_features, ctx.in_features, ctx.dtype, activation, _, ctx.group_size = inputs
    if activation != "none":
        raise RuntimeError("sparse24::linear is differentiated without its activation; call sparse24.ops.linear")
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(packed, scales)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        packed, scales = ctx.saved_tensors
        values, meta = ops.unpack(packed, ctx.out_features, ctx.in_features, ctx.dtype, ctx.group_size)
        if scales is not None:
            scales = of_columns(scales.T, ctx.in_features, ctx.group_size) if ctx.group_size else scales[:, None]
        weight = _dense_weight(values, meta, ctx.in_features, ctx.dtype, scales)
        grad_x = grad @ weight.to(grad.dtype)
    if ctx.needs_input_grad[2]:
        grad_bias = grad.reshape(-1, ctx.out_features).sum(0).to(ctx.bias_dtype)
    return grad_x, None, grad_bias, *(None,) * 7


def _dense_weight(values: Tensor, meta: Tensor, in_features: int, dtype: str, scales: Tensor | None) -> Tensor:
    """W [N, in_features] as numbers; float32, times scales that broadcast, where it is of integers."""
    int4 = dtype.startswith("int4")
    weight = ops.decompress(values, meta, in_features, "int4" if int4 else dtype, _packed_pattern(dtype))
    if int4:
        weight = unpack_int4(weight)[:, :in_features]
    return weight if scales is None else weight * scales


torch.library.register_autograd("sparse24::linear", _linear_backward, setup_context=_linear_context)


def _conv2d_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, bias, scales, x_scales, residual, y_scale, *geometry, dtype, activation, _, _ = inputs
    if activation != "none" or not (x_scales is residual is y_scale is None):
        raise RuntimeError("sparse24::conv2d is differentiated without its epilogue; call sparse24.ops.conv2d")
    ctx.x_shape, ctx.geometry, ctx.dtype = x.shape, geometry, dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(packed, scales)


def _conv2d_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        packed, scales = ctx.saved_tensors
        out_channels, in_channels, kernel_size, stride, padding, dilation, groups = ctx.geometry
        values, meta = ops.conv2d_unpack(packed, out_channels, in_channels, kernel_size, groups, ctx.dtype)
        positions = kernel_size[0] * kernel_size[1]
        position_scales = None if scales is None else scales.repeat_interleave(positions)[:, None]
        channels = in_channels // groups
        weight = _dense_weight(values.flatten(0, 2), meta.flatten(0, 2), channels, ctx.dtype, position_scales)
        weight = weight.view(out_channels, *kernel_size, channels).permute(0, 3, 1, 2)
        grad_x = conv2d_input(
            ctx.x_shape, weight.to(grad.dtype), grad, stride=stride, padding=padding, dilation=dilation, groups=groups
        )
    if ctx.needs_input_grad[2]:
        grad_bias = grad.sum((0, 2, 3)).to(ctx.bias_dtype)
    return grad_x, None, grad_bias, *(None,) * 15


torch.library.register_autograd("sparse24::conv2d", _conv2d_backward, setup_context=_conv2d_context)
