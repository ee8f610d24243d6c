"""The operators, as functions: prune, compress, check and multiply 2:4 weights.

Each function is a thin door to an operator of the same name in ``torch.ops.sparse24`` (csrc/ops.cpp), where the
arguments are checked. ``weight`` is [N, K]; its element type is float32, float16, bfloat16, int8, or uint8 for packed
int4 (two columns a byte, the even one in the low half; then K is twice the number of bytes). ``pattern`` is "2:4" (two
of four adjacent columns stay), "1:2" (one of each two) or "pair 4:8" (two of four adjacent pairs of columns).
docs/format.md gives ``values`` and ``meta`` bit by bit; sparse24/reference.py says the same in plain Python.

Accuracy and rounding rules are those of docs/format.md; every error is a RuntimeError that names the argument, the
rule and what came.

CPU tensors go to the CPU kernels and CUDA tensors to the device's, which multiply float16, bfloat16 and int8 weights.
Within sparse24.emulate() linear and decompress run the device's kernels on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse24 import library
from sparse24.registration import check_residual
from sparse24.registration import columns_of as columns_of
from sparse24.registration import pack_int4 as pack_int4
from sparse24.registration import unpack_int4 as unpack_int4
from sparse24.rounding import quantize_by

_ops = library.ops
_NAMES = library.NAMES
_WEIGHT_NAMES = library.WEIGHT_NAMES
_linear = _ops.linear.default
_linear_inference = _ops.linear_inference.default
_linear_fused = _ops.linear_fused.default
_conv2d = _ops.conv2d.default

PATTERNS = ("2:4", "1:2", "pair 4:8")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}


# ---- Format ----------------------------------------------------------------------------------------------------------


def prune_mask(weight: Tensor, pattern: str = "2:4") -> Tensor:
    """Which entries magnitude pruning keeps: bool [N, K], True where the entry stays.

    Of each group the two largest |x| stay (1:2: the larger of each half; pair 4:8: the two pairs with the largest
    |a| + |b|). Of equals the lower index stays. NaN ranks largest.
    """
    return _ops.prune_mask(weight, pattern)


def compress(weight: Tensor, pattern: str = "2:4") -> tuple[Tensor, Tensor]:
    """values, meta of a weight that fits the pattern already. Nothing is ever dropped.

    Returns values [N, 2 * ceil(K / 4)] (pair 4:8: [N, 4 * ceil(K / 8)]; int4: half as many bytes) and meta
    uint8 [N, ceil(groups / 2)].
    Raises RuntimeError on a weight that does not fit, naming the first row, its group and the values there. Nonzero
    means x != 0 or NaN, so -0.0 counts as zero.
    """
    return _ops.compress(weight, pattern)


def prune_compress(weight: Tensor, pattern: str = "2:4") -> tuple[Tensor, Tensor]:
    """compress(torch.where(prune_mask(weight), weight, 0)), in one pass over the weight."""
    return _ops.prune_compress(weight, pattern)


def decompress(
    values: Tensor, meta: Tensor, *, in_features: int, dtype: torch.dtype | None = None, pattern: str = "2:4"
) -> Tensor:
    """The dense weight [N, in_features] (int4: uint8 [N, ceil(in_features / 2)]); the inverse of compress.

    dtype: the element type; by default that of values, and torch.int4 for uint8. Differentiable in float values.
    On the CPU the metadata is checked first, as by validate(). On CUDA it is not (that would wait for the device):
    illegal codes give wrong numbers there, never an access out of bounds.
    """
    return _ops.decompress(values, meta, in_features, _NAMES[dtype or values.dtype], pattern)


def validate(
    values: Tensor, meta: Tensor, *, in_features: int, dtype: torch.dtype | None = None, pattern: str = "2:4"
) -> None:
    """Raises RuntimeError unless values and meta are a legal pair, naming the first row and group that are not.

    Legal: shapes as compress() makes them; every code names two units in increasing order (1:2: one of each half); the
    unused half of a row's last byte is 0; slots beyond in_features hold +0.
    """
    _ops.validate(values, meta, in_features, _NAMES[dtype or values.dtype], pattern)


# ---- Linear ----------------------------------------------------------------------------------------------------------


def pack(
    values: Tensor, meta: Tensor, *, in_features: int, pattern: str | None = None, group_size: int | None = None
) -> Tensor:
    """The same weight in the order of the kernels of its device: one uint8 tensor, aligned to 64 bytes.

    values: float32, float16, bfloat16 or int8, in 2:4 or 1:2; or uint8, which is int4. On CUDA float16, bfloat16 or
    int8. Exact; unpack() is its inverse.
    pattern: of int4, "pair 4:8" by default. One in "2:4" or "1:2" is for linear() with weight_only.
    group_size: the columns that will share scales in linear(), as it says; not on CUDA.
    Metadata is not checked (validate() does that), yet whatever it holds, nothing is read or written out of bounds.
    """
    return _ops.pack(values, meta, in_features, _WEIGHT_NAMES[values.dtype, pattern], group_size or 0)


def unpack(
    packed: Tensor,
    *,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    pattern: str | None = None,
    group_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """values, meta of a packed weight of element type `dtype`, exact to the bit; arguments as for pack()."""
    return _ops.unpack(packed, out_features, in_features, _WEIGHT_NAMES[dtype, pattern], group_size or 0)


def linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None = None,
    scales: Tensor | None = None,
    *,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    pattern: str | None = None,
    group_size: int | None = None,
    activation: str = "none",
    weight_only: bool = False,
    x_scales: Tensor | None = None,
    residual: Tensor | None = None,
    y_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """activation(x @ W.T + bias + residual) with W packed; x [..., in_features], any row stride.

    dtype: element type of W. x: float32, float16 or bfloat16; on CUDA a float W wants x in its own dtype.
    pattern: of an int4 W, "pair 4:8" by default; "2:4" and "1:2" with weight_only.
    For int8 and int4 W, scales is float32 [out_features], and each row of x is quantised on the way:
    s = amax / 127 (1 for a row of zeros), q = clamp(round_half_even(x / s), -127, 127), y = sum(q * w) * (s * scales)
    + bias; a row that is not finite gives NaN. With weight_only x stays as it is: y = sum(x * w) * scales + bias; not
    on CUDA, nor is int4.
    group_size: a multiple of 64, for int8 and int4 W: so many columns share scales, the last group perhaps fewer, and
    scales is [ceil(in_features / group_size), out_features]. The total of the groups, in order, each rounded to float32
    as it is scaled and as it is added, takes the place of sum * scales: y = total * s + bias. Not on CUDA.
    bias: [out_features], any float dtype. activation: "none", "relu", "gelu" (erf), "gelu_tanh" or "silu".
    Returns y [..., out_features] in the dtype of x. Under autocast x is cast first, as for F.linear.

    residual:  [..., out_features], any float dtype, added before the activation.
    out_dtype: of y. float32, float16 or bfloat16, one rounding from float32; int8, which needs y_scale, float32 [] or
               [1]: clamp(round_half_even(y / y_scale), -127, 127), NaN gives 0; or int32, for int8 x and W without
               anything else: the plain sums.
    x_scales:  float32 [], [1] or [tokens], for an int8 x and an int8 or int4 W: y = sum(x * w) * (x_scales * scales)
               + ... in_features up to 2^18 (4 less for int8 x) keep sums of integers exact; more is refused.

    Differentiable in x, bias and residual; W is frozen (integer W: the gradient passes straight through the rounding
    of x). With gradients, residual, activation and out_dtype are torch's own operations on y in the dtype of x; there
    are none for x_scales, y_scale and integer out_dtype. Raises RuntimeError for arguments that do not fit.
    Error before the activation: |y - ref| <= (K + 2) 2^-24 (|x| |W|^T + |bias| + |residual|) + u |ref|, u half an ulp
    of y's dtype (weight_only: W with its scales); on the CPU a bfloat16 W rounds x to bfloat16 first. Dropped entries
    of W contribute nothing, so 0 * Inf there gives no NaN.
    """
    name, columns = _WEIGHT_NAMES[dtype, pattern], group_size or 0
    if residual is not None or out_dtype is not None or x_scales is not None or y_scale is not None:
        weight = (packed, out_features, in_features, name, weight_only, columns)
        return _linear_with(x, weight, bias, scales, x_scales, residual, y_scale, activation, out_dtype)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        y = _linear(x, packed, bias, scales, out_features, in_features, name, "none", weight_only, columns)
        return _activation(activation)(y)
    sizes = (out_features, in_features)
    return _linear_inference(x, packed, bias, scales, *sizes, name, activation, weight_only, columns)


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    if name not in ACTIVATIONS:
        raise RuntimeError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {name!r}")
    return ACTIVATIONS[name]


def _linear_with(
    x: Tensor,
    weight: tuple[Tensor, int, int, str, bool, int],
    bias: Tensor | None,
    scales: Tensor | None,
    x_scales: Tensor | None,
    residual: Tensor | None,
    y_scale: Tensor | None,
    activation: str,
    out_dtype: torch.dtype | None,
) -> Tensor:
    packed, out_features, in_features, dtype, weight_only, group_size = weight
    if _wants_gradient("linear", x, bias, x_scales, residual, y_scale, out_dtype):
        y = _linear(x, packed, bias, scales, out_features, in_features, dtype, "none", weight_only, group_size)
        return _finished(y, residual, activation, out_dtype)
    name = _out_name(x, out_dtype)
    fused = (x_scales, residual, y_scale, out_features, in_features, dtype)
    return _linear_fused(x, packed, bias, scales, *fused, activation, weight_only, name, group_size)


def _wants_gradient(
    name: str,
    x: Tensor,
    bias: Tensor | None,
    x_scales: Tensor | None,
    residual: Tensor | None,
    y_scale: Tensor | None,
    out_dtype: torch.dtype | None,
) -> bool:
    operands = (x, bias, x_scales, residual, y_scale)
    if not (torch.is_grad_enabled() and any(operand is not None and operand.requires_grad for operand in operands)):
        return False
    if x_scales is not None or y_scale is not None or not (out_dtype is None or out_dtype.is_floating_point):
        raise RuntimeError(
            f"{name} has no gradient with x_scales, y_scale or an integer out_dtype: call it under torch.no_grad()"
        )
    return True


def _finished(y: Tensor, residual: Tensor | None, activation: str, out_dtype: torch.dtype | None) -> Tensor:
    """The epilogue that is left, by torch's own operations, which have gradients."""
    y_dtype = out_dtype or y.dtype
    if residual is not None:
        check_residual(residual, y.shape)
        y = y + residual
    return _activation(activation)(y).to(y_dtype)


def _out_name(x: Tensor, out_dtype: torch.dtype | None) -> str:
    if out_dtype is None:
        device = x.device.type
        cast = x.is_floating_point() and torch.is_autocast_enabled(device)
        out_dtype = torch.get_autocast_dtype(device) if cast else x.dtype
    return str(out_dtype).removeprefix("torch.")


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """int8 clamp(round_half_even(x / scale), -127, 127) of the shape of x, NaN as 0: what `x_scales` belongs to.

    x: float32, float16 or bfloat16, any strides; channels last stays so. scale: one positive float32 number. No
    gradient. Raises RuntimeError for arguments that do not fit.
    """
    if x.device.type != "cpu":
        return quantize_by(x, scale).to(torch.int8)
    if x.dim() == 4 and x.stride(1) == 1 and not x.is_contiguous():
        return _ops.quantize(x.permute(0, 2, 3, 1), scale).permute(0, 3, 1, 2)
    return _ops.quantize(x, scale)


# ---- Convolution -----------------------------------------------------------------------------------------------------


def conv2d_pack(
    values: Tensor, meta: Tensor, *, in_channels: int, groups: int = 1, pattern: str | None = None
) -> Tensor:
    """A conv weight in the order of the CPU's kernels: one uint8 tensor, aligned to 64 bytes. Exact.

    values [out_channels, R, S, slots] and meta [out_channels, R, S, bytes] are compress() of each kernel position's
    channels, [out_channels * R * S, in_channels / groups]: groups of the pattern never straddle two positions. Dtypes
    and patterns as for pack(). conv2d_unpack() is the inverse.
    """
    return _ops.conv2d_pack(values, meta, in_channels, groups, _WEIGHT_NAMES[values.dtype, pattern])


def conv2d_unpack(
    packed: Tensor,
    *,
    out_channels: int,
    in_channels: int,
    kernel_size: tuple[int, int],
    groups: int = 1,
    dtype: torch.dtype,
    pattern: str | None = None,
) -> tuple[Tensor, Tensor]:
    """values, meta of a packed conv weight of element type `dtype`, exact to the bit."""
    name = _WEIGHT_NAMES[dtype, pattern]
    return _ops.conv2d_unpack(packed, out_channels, in_channels, kernel_size, groups, name)


def conv2d(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None = None,
    scales: Tensor | None = None,
    *,
    out_channels: int,
    in_channels: int,
    kernel_size: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    dtype: torch.dtype,
    pattern: str | None = None,
    activation: str = "none",
    weight_only: bool = False,
    x_scales: Tensor | None = None,
    residual: Tensor | None = None,
    y_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """activation(conv2d(x, W) + bias + residual) with W packed by conv2d_pack(), on the CPU.

    x: [B, in_channels, H, W], any strides; channels last is read in place, another order is copied to it once. y:
    [B, out_channels, OH, OW], channels last where the channels of x lie side by side, else contiguous. Zero padding.
    For int8 and int4 W each image of x is quantised by its own s = amax / 127 over the image (1 for zeros); an image
    that is not finite gives NaN. x_scales: float32 [], [1] or [B], of an int8 x.
    Everything else is as for linear(), without group_size, and with in_features the products of an output:
    in_channels / groups * R * S.
    """
    geometry = (out_channels, in_channels, kernel_size, stride, padding, dilation, groups)
    name = _WEIGHT_NAMES[dtype, pattern]
    if _wants_gradient("conv2d", x, bias, x_scales, residual, y_scale, out_dtype):
        plain = (None, None, None, *geometry, name, "none", weight_only, _out_name(x, None))
        return _finished(_conv2d(x, packed, bias, scales, *plain), residual, activation, out_dtype)
    fused = (x_scales, residual, y_scale, *geometry, name, activation, weight_only, _out_name(x, out_dtype))
    return _conv2d(x, packed, bias, scales, *fused)


# ---- Which kernels of the CPU ----------------------------------------------------------------------------------------


def cpu_choice(
    *,
    dtype: torch.dtype,
    x_dtype: torch.dtype,
    tokens: int,
    out_features: int,
    in_features: int,
    weight_only: bool = False,
    pattern: str | None = None,
) -> tuple[str, str]:
    """Which kernels linear() runs on this CPU for a packed weight of element type `dtype`, and why.

    The kernels are "perm", "gather", "amx" or "portable"; or "dense": the weight is decompressed, a few megabytes at a
    time, for torch's own product.
    """
    return _ops.cpu_choice(
        _WEIGHT_NAMES[dtype, pattern], weight_only, _NAMES[x_dtype], tokens, out_features, in_features
    )


@contextmanager
def force_cpu_kernels(kernels: str) -> Iterator[None]:
    """Within the block, this thread's products on the CPU run these kernels (cpu_choice).

    For tests and measurements. linear() raises RuntimeError where they do not exist for its element types.
    """
    _ops.force_cpu_kernels(kernels)
    try:
        yield
    finally:
        _ops.force_cpu_kernels("")


# ---- The device ------------------------------------------------------------------------------------------------------


def device_problem(device: torch.device | int, dtype: torch.dtype) -> str:
    """Why CUDA device `device` does not run the kernels for weights of element type `dtype`, or "" where it does.

    The first call for a device and a dtype runs them once, against known answers, which takes a few milliseconds;
    while a graph is captured that is put off.
    """
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    index = device if isinstance(device, int) else device.index
    return _ops.device_problem(torch.cuda.current_device() if index is None else index, _NAMES[dtype])


emulating = 0  # threads' emulate() blocks of this process; where there are none, emulated_arch() need not be asked


def emulated_arch() -> str:
    """What this thread emulates, such as "sm_80"; "" where it does not."""
    return _ops.emulated_arch()


def linear_plan(x: Tensor, *, out_features: int, dtype: torch.dtype) -> str:
    """The kernel that linear() would run for x [..., in_features], such as "linear_f16_64x64, K in 3 splits".

    x: a CUDA tensor, or a CPU tensor within emulate(); dtype: of W. By the shape, the alignment and the device alone.
    """
    return _ops.linear_plan(x, out_features, _NAMES[dtype])


def linear_kernels(dtype: torch.dtype) -> list[str]:
    """The device's kernels of linear() for weights of element type `dtype`, such as "linear_f16_64x64"."""
    names: str = _ops.linear_kernels(_NAMES[dtype])
    return names.split()


@contextmanager
def force_linear_kernel(kernel: str, splits: int = 1) -> Iterator[None]:
    """Within the block, this thread's products on CUDA run `kernel`, with in_features in up to `splits` parts.

    For tests and measurements. linear() raises RuntimeError where the kernel does not exist or cannot run the call.
    """
    _ops.force_linear_kernel(kernel, splits)
    try:
        yield
    finally:
        _ops.force_linear_kernel("", 0)


# ---- Instruction sets ------------------------------------------------------------------------------------------------


def cpu_isa() -> str:
    """The instruction set the CPU kernels use: "portable", "avx2", "avx512", "avx512_bf16" or "amx"."""
    return _ops.cpu_isa()


@contextmanager
def force_cpu_isa(isa: str) -> Iterator[None]:
    """Within the block, all threads' CPU kernels use `isa`. Raises RuntimeError if this machine cannot run it."""
    before = cpu_isa()
    _ops.force_cpu_isa(isa)
    try:
        yield
    finally:
        _ops.force_cpu_isa(before)
