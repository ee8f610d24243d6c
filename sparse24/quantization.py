"""quantize(model): int8 or int4 weights and int8 activations, learnt by fake quantisation or set after training."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparse24.conv import SparseConv2d, axis_of
from sparse24.pruning import MaskRule
from sparse24.reporting import Outcome, Report, own_parametrizations, product_layers
from sparse24.rounding import LEVELS, fake_quantize
from sparse24.sparse_module import INT4, SparseModule


class FakeQuantize(nn.Module):
    """Parametrisation of a weight: rounded to integers and back per output, with a straight gradient."""

    def __init__(self, dtype: torch.dtype = torch.int8, weight_only: bool = False) -> None:
        super().__init__()
        self.dtype = dtype
        self.weight_only = weight_only

    def forward(self, weight: Tensor) -> Tensor:
        return fake_quantize(weight.flatten(1), LEVELS[self.dtype]).view(weight.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    def extra_repr(self) -> str:
        return f"dtype={self.dtype}" + (", weight_only=True" if self.weight_only else "")


def fake_quantize_input(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: x rounded to int8 and back, as the integer kernels do, with a straight gradient."""
    rounded = partial(_round_input, module)
    if args:
        return (rounded(args[0]), *args[1:]), kwargs
    return args, {name: rounded(x) for name, x in kwargs.items()}


def _round_input(module: nn.Module, x: Tensor) -> Tensor:
    if not isinstance(module, nn.Conv2d):
        return fake_quantize(x)  # per token
    axis, _ = axis_of(module)
    return SparseConv2d.fake_quantize_images(x, axis, module.kernel_size)


def quantize(model: nn.Module, dtype: torch.dtype = torch.int8, *, weight_only: bool = False) -> Report[Outcome]:
    """Quantise the sparse layers of `model`, in place: weights per output, activations to int8 as they come.

    A pruned nn.Linear or nn.Conv2d gets fake quantisation after its mask: it stays dense and trainable (a zero stays
    zero), and convert() turns it into the layer with the very integers it used. A sparse layer, after convert(), is
    rounded at once. Activations are rounded per token, of a convolution per image; with weight_only they stay as they
    are. The rule is rounding.quantize_rows. Other layers are left alone.
    dtype: torch.int8, or torch.int4, whose weights must be pruned to "pair 4:8": int4 kernels keep pairs of columns.
    Returns one row per layer: "quantized", or "skipped" with the reason.
    Raises RuntimeError if dtype is another.
    """
    if dtype not in LEVELS:
        raise RuntimeError(f"dtype must be torch.int8 or torch.int4; got {dtype}")
    name = str(dtype).removeprefix("torch.")
    rows = []
    for found in product_layers(model):
        reason, detail = found.reason, ""
        if isinstance(found.module, SparseModule):
            reason, detail = _quantize_sparse(found.module, dtype, weight_only), f"{found.module.pattern} {name}"
        elif not reason and isinstance(found.module, (nn.Linear, nn.Conv2d)):
            reason, detail = _quantize_dense(found.module, dtype, weight_only), f"{name} rounding in training"
        rows.append(Outcome(found.name, found.shape, "skipped" if reason else "quantized", reason or detail))
    return Report(f"quantize to {name}{', weights only' if weight_only else ''}", rows)


def _quantize_sparse(layer: SparseModule, dtype: torch.dtype, weight_only: bool) -> str:
    if layer.weight_dtype in LEVELS:
        return f"it is {str(layer.weight_dtype).removeprefix('torch.')} already"
    try:
        layer.quantize(dtype, weight_only=weight_only)
    except RuntimeError as error:
        return str(error)
    return ""


def _quantize_dense(layer: nn.Linear | nn.Conv2d, dtype: torch.dtype, weight_only: bool) -> str:
    rules = own_parametrizations(layer)
    if not rules:
        return "it is not pruned: only sparse layers run in integers"
    if fake_quantization(layer) is not None:
        return "it is quantised already"
    pattern = next((rule.pattern for rule in rules if isinstance(rule, MaskRule)), "2:4")
    if (dtype is INT4) != (pattern == "pair 4:8"):
        return f"it is pruned to {pattern}: {'int4 needs' if dtype is INT4 else 'int8 takes 2:4 or 1:2, not'} pair 4:8"
    parametrize.register_parametrization(layer, "weight", FakeQuantize(dtype, weight_only))
    if not weight_only:
        layer.register_forward_pre_hook(fake_quantize_input, with_kwargs=True)
    return ""


def fake_quantization(layer: nn.Module) -> FakeQuantize | None:
    """The rounding that quantize() put on the weight of a layer."""
    return next((rule for rule in own_parametrizations(layer) if isinstance(rule, FakeQuantize)), None)


def remove_input_hook(layer: nn.Module) -> None:
    """Take fake_quantize_input off a layer, however it came there (its handle does not survive a copy)."""
    for key in [key for key, hook in layer._forward_pre_hooks.items() if hook is fake_quantize_input]:
        del layer._forward_pre_hooks[key]
        layer._forward_pre_hooks_with_kwargs.pop(key, None)
