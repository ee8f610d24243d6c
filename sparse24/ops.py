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

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_LIBRARY = Path(__file__).with_name("_C.so")
if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
    raise ImportError(f"sparse24 needs torch >= 2.11; this is torch {torch.__version__}")
if not _LIBRARY.exists():
    raise ImportError(f"{_LIBRARY} is missing: build it with `make build`, or install the wheel")
torch.ops.load_library(_LIBRARY)
_ops = torch.ops.sparse24
_linear = _ops.linear.default
_linear_inference = _ops.linear_inference.default
_linear_fused = _ops.linear_fused.default
if not _ops.device_archs():
    warnings.warn("this build of sparse24 has no device code: CUDA tensors are refused", stacklevel=2)

PATTERNS = ("2:4", "1:2", "pair 4:8")


class _Names(dict[torch.dtype, str]):
    """How the operators call an element type; they refuse a name they do not know."""

    def __missing__(self, dtype: torch.dtype) -> str:
        return str(dtype)


_NAMES = _Names(
    {
        torch.float32: "float32",
        torch.float16: "float16",
        torch.bfloat16: "bfloat16",
        torch.int8: "int8",
        torch.int4: "int4",  # type: ignore[attr-defined]
        torch.uint8: "int4",  # how int4 lies in memory
    }
)

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


def columns_of(meta: Tensor, *, in_features: int, pattern: str = "2:4") -> Tensor:
    """The column each entry of values came from: int64, of the shape of (unpacked) values; beyond in_features too."""
    pair = pattern == "pair 4:8"
    groups = -(-in_features // (8 if pair else 4))
    codes = torch.stack([meta & 15, meta >> 4], dim=-1).flatten(1)[:, :groups].long()
    units = torch.stack([codes & 3, codes >> 2], dim=-1) + 4 * torch.arange(groups, device=meta.device)[:, None]
    if pair:
        units = torch.stack([2 * units, 2 * units + 1], dim=-1)
    return units.flatten(1)


# ---- Linear ----------------------------------------------------------------------------------------------------------


def pack(values: Tensor, meta: Tensor, *, in_features: int) -> Tensor:
    """The same weight in the order of the kernels of its device: one uint8 tensor, aligned to 64 bytes.

    values: float32, float16, bfloat16 or int8, in 2:4 or 1:2; not float32 on CUDA. Exact; unpack() is its inverse.
    Metadata is not checked (validate() does that), yet whatever it holds, nothing is read or written out of bounds.
    """
    return _ops.pack(values, meta, in_features)


def unpack(packed: Tensor, *, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """values, meta of a packed weight of element type `dtype`, exact to the bit."""
    return _ops.unpack(packed, out_features, in_features, _NAMES[dtype])


def linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None = None,
    scales: Tensor | None = None,
    *,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    activation: str = "none",
    x_scales: Tensor | None = None,
    residual: Tensor | None = None,
    y_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """activation(x @ W.T + bias + residual) with W packed; x [..., in_features], any row stride.

    dtype: element type of W. x: float32, float16 or bfloat16; on CUDA a float W wants x in its own dtype.
    For int8 W, scales is float32 [out_features], and each row of x is quantised on the way:
    s = amax / 127 (1 for a row of zeros), q = clamp(round_half_even(x / s), -127, 127), y = sum(q * w) * (s * scales)
    + bias; a row that is not finite gives NaN.
    bias: [out_features], any float dtype. activation: "none", "relu", "gelu" (erf), "gelu_tanh" or "silu".
    Returns y [..., out_features] in the dtype of x. Under autocast x is cast first, as for F.linear.

    On CUDA, and where it is emulated, but not by the CPU's kernels:
    residual:  [..., out_features], any float dtype, added before the activation.
    out_dtype: of y. float32, float16 or bfloat16, one rounding from float32; int8, which needs y_scale, float32 [] or
               [1]: clamp(round_half_even(y / y_scale), -127, 127), NaN gives 0; or int32, for int8 x and W without
               anything else: the plain sums.
    x_scales:  float32 [], [1] or [tokens], for an int8 x and W: y = sum(x * w) * (x_scales * scales) + ...
               in_features up to 2^18 (4 less for int8 x) keep the sums of int8 exact; more is refused.

    Differentiable in x, bias and residual; W is frozen (int8: the gradient passes straight through the rounding of x).
    With gradients, residual, activation and out_dtype are torch's own operations on y in the dtype of x; there are none
    for x_scales, y_scale and integer out_dtype. Raises RuntimeError for arguments that do not fit.
    Error before the activation: |y - ref| <= (K + 2) 2^-24 (|x| |W|^T + |bias| + |residual|) + u |ref|, u half an ulp
    of y's dtype; on the CPU a bfloat16 W rounds x to bfloat16 first. Dropped entries of W contribute nothing, so
    0 * Inf there gives no NaN.
    """
    if residual is not None or out_dtype is not None or x_scales is not None or y_scale is not None:
        sizes = (out_features, in_features, dtype)
        return _linear_with(x, packed, bias, scales, x_scales, residual, y_scale, *sizes, activation, out_dtype)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        y = _linear(x, packed, bias, scales, out_features, in_features, _NAMES[dtype], "none")
        return _activation(activation)(y)
    return _linear_inference(x, packed, bias, scales, out_features, in_features, _NAMES[dtype], activation)


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    if name not in ACTIVATIONS:
        raise RuntimeError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {name!r}")
    return ACTIVATIONS[name]


def _linear_with(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    scales: Tensor | None,
    x_scales: Tensor | None,
    residual: Tensor | None,
    y_scale: Tensor | None,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    activation: str,
    out_dtype: torch.dtype | None,
) -> Tensor:
    operands = (x, bias, x_scales, residual, y_scale)
    if torch.is_grad_enabled() and any(operand is not None and operand.requires_grad for operand in operands):
        if x_scales is not None or y_scale is not None or not (out_dtype is None or out_dtype.is_floating_point):
            raise RuntimeError(
                "linear has no gradient with x_scales, y_scale or an integer out_dtype: call it under torch.no_grad()"
            )
        y = _linear(x, packed, bias, scales, out_features, in_features, _NAMES[dtype], "none")
        y_dtype = out_dtype or y.dtype
        if residual is not None:
            _check_residual(residual, y.shape)
            y = y + residual
        return _activation(activation)(y).to(y_dtype)
    if out_dtype is None:
        device = x.device.type
        cast = x.is_floating_point() and torch.is_autocast_enabled(device)
        out_dtype = torch.get_autocast_dtype(device) if cast else x.dtype
    fused = (x_scales, residual, y_scale)
    return _linear_fused(
        x,
        packed,
        bias,
        scales,
        *fused,
        out_features,
        in_features,
        _NAMES[dtype],
        activation,
        str(out_dtype).removeprefix("torch."),
    )


def _check_residual(residual: Tensor, shape: torch.Size) -> None:
    if residual.shape != shape:
        raise RuntimeError(f"residual must be of the shape of y, {list(shape)}; got {list(residual.shape)}")


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
    """The instruction set the CPU kernels use: "portable", "avx2", "avx512" or "avx512_bf16"."""
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


# ---- What torch needs to know of each operator -----------------------------------------------------------------------


# A fake kernel repeats what decides the shape of its output, in the words of csrc/ops.cpp.


def _compressed_shapes(
    rows: int, in_features: int, pattern: str, dtype: str
) -> tuple[tuple[int, int], tuple[int, int]]:
    columns, kept = (8, 4) if pattern == "pair 4:8" else (4, 2)
    groups = (in_features + columns - 1) // columns
    return (rows, groups * kept // (2 if dtype == "int4" else 1)), (rows, (groups + 1) // 2)


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
    values, meta = _compressed_shapes(weight.shape[0], columns, pattern, _NAMES[weight.dtype])
    return weight.new_empty(values), weight.new_empty(meta, dtype=torch.uint8)


@torch.library.register_fake("sparse24::decompress")
def _(values: Tensor, meta: Tensor, in_features: int, dtype: str, pattern: str) -> Tensor:
    _check_compressed(values, meta, in_features, dtype, pattern)
    return values.new_empty((values.shape[0], (in_features + 1) // 2 if dtype == "int4" else in_features))


@torch.library.register_fake("sparse24::validate")
def _(values: Tensor, meta: Tensor, in_features: int, dtype: str, pattern: str) -> None:
    _check_compressed(values, meta, in_features, dtype, pattern)


@torch.library.register_fake("sparse24::pack")
def _(values: Tensor, meta: Tensor, in_features: int) -> Tensor:
    _check_compressed(values, meta, in_features, _NAMES[values.dtype], "2:4")
    size = _ops.packed_bytes(int(values.shape[0]), int(in_features), _NAMES[values.dtype], values.device.type)
    return values.new_empty((size,), dtype=torch.uint8)


@torch.library.register_fake("sparse24::unpack")
def _(packed: Tensor, out_features: int, in_features: int, dtype: str) -> tuple[Tensor, Tensor]:
    values, meta = _compressed_shapes(out_features, in_features, "2:4", dtype)
    return packed.new_empty(values, dtype=getattr(torch, dtype)), packed.new_empty(meta)


def _y_shape(x: Tensor, out_features: int, in_features: int) -> torch.Size:
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise RuntimeError(
            f"x must be [..., {in_features}] to match weight [{out_features}, {in_features}]; got {list(x.shape)}"
        )
    return torch.Size((*x.shape[:-1], out_features))


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
    out_dtype: str,
) -> Tensor:
    shape = _y_shape(x, out_features, in_features)
    if out_dtype not in ("float32", "float16", "bfloat16", "int8", "int32"):
        raise RuntimeError(f"out_dtype must be float32, float16, bfloat16, int8 or int32; got {out_dtype}")
    if residual is not None:
        _check_residual(residual, shape)
    return x.new_empty(shape, dtype=getattr(torch, out_dtype))


# Under autocast a float x is cast, as for F.linear. As a kernel of its own it costs nothing where autocast is off.
_autocast = torch.library.Library("sparse24", "FRAGMENT")


def _under_autocast(operator: Any, device: str) -> Callable[..., Tensor]:
    def cast_and_call(x: Tensor, *arguments: Any) -> Tensor:
        with torch.autocast(device, enabled=False):
            return operator(x.to(torch.get_autocast_dtype(device)) if x.is_floating_point() else x, *arguments)

    return cast_and_call


for _operator in (_linear, _linear_inference, _linear_fused):
    for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _autocast.impl(_operator, _under_autocast(_operator, _device), _key)


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
    _, packed, bias, scales, ctx.out_features, ctx.in_features, ctx.dtype, activation = inputs
    if activation != "none":
        raise RuntimeError("sparse24::linear is differentiated without its activation; call sparse24.ops.linear")
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(packed, scales)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        packed, scales = ctx.saved_tensors
        values, meta = _ops.unpack(packed, ctx.out_features, ctx.in_features, ctx.dtype)
        weight = _ops.decompress(values, meta, ctx.in_features, ctx.dtype, "2:4")
        if scales is not None:
            weight = weight * scales[:, None]
        grad_x = grad @ weight.to(grad.dtype)
    if ctx.needs_input_grad[2]:
        grad_bias = grad.reshape(-1, ctx.out_features).sum(0).to(ctx.bias_dtype)
    return grad_x, None, grad_bias, None, None, None, None, None


torch.library.register_autograd("sparse24::linear", _linear_backward, setup_context=_linear_context)
