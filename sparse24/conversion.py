"""convert(model): dense layers with a sparse weight become SparseLinear, packed; all parametrisations of ours go."""

from collections.abc import Mapping

from torch import nn
from torch.nn.utils import parametrize

from sparse24.nn import SparseLinear
from sparse24.pruning import Mask
from sparse24.quantization import is_fake_quantized, remove_input_hook
from sparse24.reporting import Outcome, Report, linear_layers, own_parametrizations

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
    """Swap every nn.Linear whose weight is 2:4 for a packed SparseLinear, in place, and drop what prune and quantize added.

    A layer that prune masked keeps that mask's pattern; any other weight is tried as 2:4. Fake-quantised layers become
    int8 layers with the very integers the fake quantisation used. Hooks of others move to the new layer. Layers on
    CUDA hold the compressed weight and run dense in this version; they pack when they move to the CPU.
    Returns one row per layer: "converted", or "skipped" with the reason; a skipped layer keeps its (masked) weight.
    """
    rows = []
    replacements: dict[int, nn.Module] = {}
    for found in linear_layers(model):
        layer, reason, detail = found.module, found.reason, ""
        if isinstance(layer, SparseLinear) and layer.packed is None:
            layer.pack()
            reason = ""
        elif isinstance(layer, nn.Linear):
            reason = reason or ("the model itself cannot be swapped in place" if layer is model else "")
            new, misfit = _sparse_of(layer, build=not reason)
            reason = reason or misfit
            if new is not None:
                replacements[id(layer)] = layer = new
        if isinstance(layer, SparseLinear):
            detail = f"{layer.pattern} {layer.weight_dtype}".replace("torch.", "")
        rows.append(Outcome(found.name, found.shape, "skipped" if reason else "converted", reason or detail))
    replace_modules(model, replacements)
    return Report("convert", rows)


def _sparse_of(linear: nn.Linear, build: bool) -> tuple[SparseLinear | None, str]:
    """Bake our parametrisations into the weight; then the packed layer that replaces it, or why there is none."""
    rules = own_parametrizations(linear)
    ...
    return None, ""


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
