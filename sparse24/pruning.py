"""prune(model): magnitude masks on the weights of a model, as parametrisations that training respects."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparse24 import ops
from sparse24.conv import as_matrix, axis_of, from_matrix
from sparse24.reporting import Outcome, Report, own_parametrizations, product_layers

Skip = str | Iterable[str] | Callable[[str, nn.Module], bool]


class Mask(nn.Module):
    """Parametrisation of a weight: what the mask drops reads as +0, whatever it holds, and gets no gradient."""

    mask: Tensor

    def __init__(self, mask: Tensor, pattern: str) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.pattern = pattern

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(self.mask, weight, 0)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    def extra_repr(self) -> str:
        return f"pattern={self.pattern}"


def prune(model: nn.Module, pattern: str = "2:4", *, skip: Skip = ()) -> Report[Outcome]:
    """Mask every nn.Linear and nn.Conv2d of `model` by magnitude, in place; the model stays dense and trainable.

    pattern: "2:4", the stricter "1:2", or "pair 4:8", which int4 weights need (quantize(dtype=torch.int4)). The mask is
    chosen now, from the weights as they are, and stays. Of a convolution it runs along the input channels of each group
    at each kernel position; of a patch convolution of fewer than four channels along [C, R, S] flattened.
    skip: names of modules to leave alone, each with all below it; or a function of (name, module).
    Returns one row per layer: "pruned", or "skipped" with the reason.
    Raises RuntimeError if the pattern is unknown, or if skip names a module that the model does not have.
    """
    if pattern not in ops.PATTERNS:
        raise RuntimeError(f"pattern must be '2:4', '1:2' or 'pair 4:8'; got {pattern!r}")
    skips = _skip_rule(model, skip)
    rows = []
    for found in product_layers(model):
        layer, reason, detail = found.module, found.reason, pattern
        if not reason and skips(found.name, layer):
            reason = "asked to"
        if not reason and isinstance(layer, (nn.Linear, nn.Conv2d)):
            if own_parametrizations(layer):
                reason = "it is pruned already"
            else:
                axis = axis_of(layer)[0] if isinstance(layer, nn.Conv2d) else ""
                mask = _magnitude_mask(layer.weight.detach().cpu(), pattern, axis).to(layer.weight.device)
                parametrize.register_parametrization(layer, "weight", Mask(mask, pattern))
                detail += f", axis={axis}" if axis else ""
        rows.append(Outcome(found.name, found.shape, "skipped" if reason else "pruned", reason or detail))
    return Report(f"prune to {pattern}", rows)


def _magnitude_mask(weight: Tensor, pattern: str, axis: str) -> Tensor:
    if not axis:
        return ops.prune_mask(weight, pattern)
    return from_matrix(ops.prune_mask(as_matrix(weight, axis), pattern), tuple(weight.shape), axis)


def _skip_rule(model: nn.Module, skip: Skip) -> Callable[[str, nn.Module], bool]:
    if callable(skip):
        return skip
    names = [skip] if isinstance(skip, str) else list(skip)
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise RuntimeError(f"skip must name modules of the model; it has no {', '.join(map(repr, unknown))}")
    return lambda name, _: any(name == skipped or name.startswith(skipped + ".") for skipped in names)
