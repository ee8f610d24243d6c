"""What a sparse layer may be: its element types, patterns and scales; and what runs it where."""

import warnings

import torch
from torch import Tensor

from sparse24 import ops

FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)
INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]
GROUP_QUANTUM = 64  # columns of W that share a scale are a multiple of it
FLOAT32_ON_CUDA = "float32 has no sparse kernel on CUDA; half() or bfloat16() makes the layer sparse there"
WANTS_GRADIENT = "x or bias wants a gradient, which there is for x_rounding 'tensor' in the dense product alone"
ONE_SCALE = "{} must be one positive finite number; got {}"


# ---- Devices ---------------------------------------------------------------------------------------------------------


def device_problem(device: torch.device, weight_dtype: torch.dtype) -> str:
    """Why none of our kernels can run on a device, or ""; the first to meet a reason is warned."""
    return "" if device.type in ("cpu", "meta") else _accelerator_problem(device, weight_dtype)


def _accelerator_problem(device: torch.device, weight_dtype: torch.dtype) -> str:
    if device.type != "cuda":
        problem = f"there are no kernels for {device.type}"
    else:
        problem = ops.device_problem(device, weight_dtype)
    if problem and _warned.setdefault((device, problem), token := object()) is token:  # once, in any number of threads
        warnings.warn(f"sparse24 runs dense on {device}: {problem}", stacklevel=2)
    return problem


# What torch.compiler.assume_constant_result does, which would import torch._dynamo: seconds at every import of ours.
_accelerator_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]


_warned: dict[tuple[torch.device, str], object] = {}


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast makes of x on such a device, or None where it is off."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


# ---- Checks: each raises RuntimeError ------------------------------------------------------------------------------


def check_pattern(pattern: str, weight_dtype: torch.dtype, weight_only: bool = False) -> None:
    """Raises RuntimeError unless a layer with weights of this element type can run the pattern."""
    if weight_dtype is INT4:
        if weight_only and pattern not in ops.PATTERNS:
            raise RuntimeError(f"pattern must be one of {', '.join(map(repr, ops.PATTERNS))}; got {pattern!r}")
        if pattern != "pair 4:8" and not weight_only:
            raise RuntimeError(f"pattern must be 'pair 4:8' for an int4 weight; got {pattern!r}")
    elif pattern == "pair 4:8":
        raise RuntimeError(
            f"pattern must be '2:4' or '1:2' for a {_name(weight_dtype)} weight; 'pair 4:8' is for int4: "
            "quantize(dtype=torch.int4) before convert()"
        )
    elif pattern not in ("2:4", "1:2"):
        raise RuntimeError(f"pattern must be '2:4' or '1:2'; got {pattern!r}")


def check_group_size(group_size: int | None, integer: bool) -> None:
    if group_size is None:
        return
    if not isinstance(group_size, int) or group_size <= 0 or group_size % GROUP_QUANTUM:
        raise RuntimeError(f"group_size must be None or a positive multiple of {GROUP_QUANTUM}; got {group_size!r}")
    if not integer:
        raise RuntimeError(
            f"group_size is for a weight_dtype of torch.int8 or torch.int4; got {group_size} for another"
        )


def check_x_rounding(x_rounding: str, integer_x: bool) -> None:
    if x_rounding not in ("token", "tensor"):
        raise RuntimeError(f"x_rounding must be 'token' or 'tensor'; got {x_rounding!r}")
    if x_rounding == "tensor" and not integer_x:
        raise RuntimeError("x_rounding 'tensor' is for an integer weight_dtype without weight_only: x stays as it is")


def check_x_scale(x_scale: Tensor) -> None:
    if x_scale.shape != () or not 0 < x_scale.item() < float("inf"):
        raise RuntimeError(ONE_SCALE.format("x_scale", x_scale.tolist()))


def checked_scales(scales: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Scales [outputs] or [groups, outputs] as float32 [outputs, 1] or [outputs, groups], on the CPU."""
    given = scales.detach().cpu().float()
    if given.shape != shape or not ((given > 0) & given.isfinite()).all():
        what = list(given.shape) if given.shape != shape else f"a least of {given.min()}, a largest of {given.max()}"
        raise RuntimeError(f"scales must be {list(shape)} positive finite numbers; got {what}")
    return given.view(-1, 1) if len(shape) == 1 else given.T


def check_finite(scale: Tensor, dtype: torch.dtype) -> None:
    if not scale.isfinite().all():
        row = int(scale.isfinite().logical_not().nonzero()[0, 0])
        raise RuntimeError(f"a weight must be finite to become {_name(dtype)}; row {row} is not")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_float(dtype: torch.dtype) -> None:
    if dtype not in FLOAT_TYPES:
        raise RuntimeError(f"dtype must be float32, float16 or bfloat16; got {dtype}")
