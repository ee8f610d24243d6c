"""convert(model): dense layers with a sparse weight become SparseLinear, packed; all parametrisations of ours go."""

from collections.abc import Mapping

from torch import nn
from torch.nn.utils import parametrize

from sparse24.nn import SparseLinear
from sparse24.pruning import Mask
from sparse24.quantization import is_fake_quantized, remove_input_hook
from sparse24.reporting import Outcome, Report, linear_layers, ours_alone, own_parametrizations, parametrizations

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
    """Swap each nn.Linear whose weight is 2:4 for a packed SparseLinear, in place, and remove what the flow added.

    A layer that prune masked keeps that mask's pattern; any other weight is tried as 2:4. Fake-quantised layers become
    int8 layers with the very integers the fake quantisation used. Hooks of others move to the new layer. Layers that
    nothing sparse can run where they are (float32 on CUDA) hold the compressed weight and run dense (report() says so),
    until they move to a device or a dtype where they pack.
    Returns one row per layer: "converted", or "skipped" with the reason; a skipped layer keeps its (masked) weight.
    """
    rows = []
    replacements: dict[int, nn.Module] = {}
    for found in linear_layers(model):
        layer, reason = found.module, found.reason
        if isinstance(layer, nn.Linear):
            pattern, int8 = _bake(layer)
            if layer is model:
                reason = "the model itself cannot be swapped in place: use SparseLinear.from_dense"
            if not reason:
                try:
                    sparse = SparseLinear.from_dense(layer, pattern=pattern)
                    replacements[id(layer)] = layer = (sparse.quantize() if int8 else sparse).pack()
                except RuntimeError as error:
                    reason = str(error)
        elif isinstance(layer, SparseLinear) and layer.packed is None:
            layer.pack()
            reason = ""
        dtype = f" {layer.weight_dtype}".replace("torch.", "") if isinstance(layer, SparseLinear) else ""
        detail = reason or f"{layer.pattern}{dtype}"
        rows.append(Outcome(found.name, found.shape, "skipped" if reason else "converted", detail))
    replace_modules(model, replacements)
    return Report("convert", rows)


def _bake(linear: nn.Linear) -> tuple[str, bool]:
    """Turn a weight that is parametrised by us alone into a plain one, masked; its pattern, and whether it is int8.

    Not by parametrize.remove_parametrizations: that takes the property `weight` off the class, which a deep copy of the
    layer (a teacher, say) still shares, and writes into the parameter, which another layer may share.
    """
    rules = own_parametrizations(linear)
    pattern = next((rule.pattern for rule in rules if isinstance(rule, Mask)), "2:4")
    int8 = is_fake_quantized(linear)
    stack = parametrizations(linear)
    if isinstance(stack, parametrize.ParametrizationList) and ours_alone(linear):
        remove_input_hook(linear)
        weight = stack.original
        for rule in rules:
            if isinstance(rule, Mask):  # int8 is rounded from the masked weight, as it was in training
                weight = rule(weight)
        linear.__class__ = type(linear).__bases__[0]
        del linear._modules["parametrizations"]
        linear.weight = nn.Parameter(weight.detach(), requires_grad=stack.original.requires_grad)
    return pattern, int8


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
