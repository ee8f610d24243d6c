"""quantize(model): int8 weights and activations, learnt by fake quantisation or set after training."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparse24.nn import SparseLinear
from sparse24.reporting import Outcome, Report, linear_layers, own_parametrizations
from sparse24.rounding import fake_quantize


class FakeQuantize(nn.Module):
    """Parametrisation of a weight [out_features, in_features]: rounded to int8 per row and back, straight gradient."""

    def forward(self, weight: Tensor) -> Tensor:
        return fake_quantize(weight)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


def fake_quantize_input(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: x rounded to int8 per token and back, as the int8 kernels do, with a straight gradient."""
    if args:
        return (fake_quantize(args[0]), *args[1:]), kwargs
    return args, {name: fake_quantize(x) for name, x in kwargs.items()}


def quantize(model: nn.Module, dtype: torch.dtype = torch.int8) -> Report[Outcome]:
    """Quantise the sparse layers of `model` to int8, in place: weights per output channel, activations per token.

    A pruned nn.Linear gets fake quantisation after its mask: it stays dense and trainable (a zero stays zero), and
    convert() turns it into the int8 layer with the very integers it used. A SparseLinear, after convert(), is rounded
    at once. The rule is rounding.quantize_rows. Other layers are left alone.
    Returns one row per layer: "quantized", or "skipped" with the reason.
    Raises RuntimeError if dtype is not torch.int8.
    """
    if dtype is not torch.int8:
        raise RuntimeError(f"dtype must be torch.int8; got {dtype}")
    rows = []
    for found in linear_layers(model):
        reason, detail = found.reason, ""
        if isinstance(found.module, SparseLinear):
            reason, detail = _quantize_sparse(found.module), f"{found.module.pattern} int8"
        elif not reason and isinstance(found.module, nn.Linear):
            reason, detail = _quantize_dense(found.module), "int8 rounding in training"
        rows.append(Outcome(found.name, found.shape, "skipped" if reason else "quantized", reason or detail))
    return Report("quantize to int8", rows)


def _quantize_sparse(layer: SparseLinear) -> str:
    if layer.weight_dtype is torch.int8:
        return "it is int8 already"
    try:
        layer.quantize()
    except RuntimeError as error:
        return str(error)
    return ""


def _quantize_dense(linear: nn.Linear) -> str:
    rules = own_parametrizations(linear)
    if not rules:
        return "it is not pruned: only sparse layers run in int8"
    if is_fake_quantized(linear):
        return "it is quantised already"
    parametrize.register_parametrization(linear, "weight", FakeQuantize())
    linear.register_forward_pre_hook(fake_quantize_input, with_kwargs=True)
    return ""


def is_fake_quantized(linear: nn.Linear) -> bool:
    return any(isinstance(rule, FakeQuantize) for rule in own_parametrizations(linear))


def remove_input_hook(linear: nn.Linear) -> None:
    """Take fake_quantize_input off a layer, however it came there (its handle does not survive a copy)."""
    for key in [key for key, hook in linear._forward_pre_hooks.items() if hook is fake_quantize_input]:
        del linear._forward_pre_hooks[key]
        linear._forward_pre_hooks_with_kwargs.pop(key, None)
