"""convert(model): dense layers with a sparse weight become sparse ones, packed; all parametrisations of ours go."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from sparse24.conv import SparseConv2d
from sparse24.nn import SparseLinear
from sparse24.pruning import MaskRule, dense_class, mask_rule
from sparse24.quantization import FakeQuantize, fake_quantization, remove_hook
from sparse24.reporting import Outcome, Report, ours_alone, own_parametrizations, parametrizations, product_layers
from sparse24.sparse_module import SparseModule

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def convert(model: nn.Module) -> Report[Outcome]:
    """Swap each nn.Linear and nn.Conv2d whose weight is 2:4 for a packed sparse layer, in place, and remove what the
    flow added.

    A layer that prune masked keeps that mask's pattern; any other weight is tried as 2:4. Fake-quantised layers become
    integer layers with the very integers the fake quantisation used; those without a mask stay. Hooks of others move to
    the new layer. Layers that nothing sparse can run where they are (float32 on CUDA) hold the compressed weight and
    run dense (report() says so), until they move to a device or a dtype where they pack.
    Returns one row per layer: "converted", or "skipped" with the reason; a skipped layer keeps its (masked) weight.
    """
    rows = []
    replacements: dict[int, nn.Module] = {}
    for found in product_layers(model):
        layer, reason = found.module, found.reason
        if fake_quantization(layer) is not None and mask_rule(layer) is None:
            reason = "it is not pruned: fake quantisation stays"
        elif isinstance(layer, (nn.Linear, nn.Conv2d)):
            pattern, rounding = _bake(layer)
            if layer is model:
                reason = f"the model itself cannot be swapped in place: use {_sparse_class(layer).__name__}.from_dense"
            if not reason:
                try:
                    replacements[id(layer)] = layer = _sparse_layer(layer, pattern, rounding)
                except RuntimeError as error:
                    reason = str(error)
        elif isinstance(layer, SparseModule) and layer.packed is None:
            layer.pack()
            reason = ""
        detail = reason
        if not reason and isinstance(layer, SparseModule):
            detail = f"{layer.pattern} {layer.weight_dtype}".replace("torch.", "")
            detail += "" if layer.group_size is None else f" in groups of {layer.group_size}"
            detail += ", weights only" if layer.weight_only else ""
            detail += ", x by tensor" if layer.x_rounding == "tensor" else ""
            detail += f", axis={layer.axis}" if isinstance(layer, SparseConv2d) else ""
        rows.append(Outcome(found.name, found.shape, "skipped" if reason else "converted", detail))
    replace_modules(model, replacements)
    return Report("convert", rows)


def _sparse_class(layer: nn.Module) -> type[SparseLinear] | type[SparseConv2d]:
    return SparseConv2d if isinstance(layer, nn.Conv2d) else SparseLinear


def _sparse_layer(layer: nn.Linear | nn.Conv2d, pattern: str, rounding: FakeQuantize | None) -> SparseModule:
    options: dict[str, Any] = {"pattern": pattern}
    if rounding is not None:
        options |= {"weight_dtype": rounding.dtype, "weight_only": rounding.weight_only}
        options["group_size"] = rounding.group_size
        options |= {"scales": rounding.weight_scales(), "x_scale": rounding.activation_scale()}
    if isinstance(layer, nn.Conv2d):
        return SparseConv2d.from_dense(layer, **options).pack()
    return SparseLinear.from_dense(layer, **options).pack()


def _bake(layer: nn.Linear | nn.Conv2d) -> tuple[str, FakeQuantize | None]:
    """Turn a weight that is parametrised by us alone into a plain one, masked; its pattern, and how it was rounded.

    Not by parametrize.remove_parametrizations: that takes the property `weight` off the class, which a deep copy of the
    layer (a teacher, say) still shares, and writes into the parameter, which another layer may share.
    """
    rules, mask = own_parametrizations(layer), mask_rule(layer)
    pattern = "2:4" if mask is None else mask.pattern
    rounding = fake_quantization(layer)
    stack = parametrizations(layer)
    if isinstance(stack, parametrize.ParametrizationList) and ours_alone(layer):
        remove_hook(layer)
        weight = stack.original
        for rule in rules:
            if isinstance(rule, MaskRule):  # integers are rounded from the masked weight, as they were in training
                weight = rule(weight)
        layer.__class__ = dense_class(layer)  # type: ignore[assignment]
        vars(layer).pop("transposable", None)
        del layer._modules["parametrizations"]
        layer.weight = nn.Parameter(weight.detach(), requires_grad=stack.original.requires_grad)
    return pattern, rounding


def replace_modules(model: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    """Put replacements[id(old)] wherever `old` stands below `model`; mode and hooks of the old module carry over."""
    for parent in list(model.modules()):
        for name, old in parent._modules.items():
            new = replacements.get(id(old))
            if old is not None and new is not None:
                new.train(old.training)
                for hooks in _HOOKS:  # the dictionaries themselves, so that handles given out still remove theirs
                    setattr(new, hooks, getattr(old, hooks))
                parent._modules[name] = new
