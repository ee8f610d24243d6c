"""prune(model): magnitude masks on the weights of a model, as parametrisations that training respects."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparse24 import ops
from sparse24.nn import check_pattern
from sparse24.reporting import Outcome, Report, linear_layers, own_parametrizations

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
    """Mask every nn.Linear of `model` by magnitude, in place; the model stays dense and trainable.

    pattern: "2:4", or the stricter "1:2". The mask is chosen now, from the weights as they are, and stays.
    skip: names of modules to leave alone, each with all below it; or a function of (name, module).
    Returns one row per layer: "pruned", or "skipped" with the reason.
    Raises RuntimeError if the pattern cannot run, or if skip names a module that the model does not have.
    """
    check_pattern(pattern)
    skips = _skip_rule(model, skip)
    rows = []
    for found in linear_layers(model):
        linear, reason = found.module, found.reason
        if not reason and skips(found.name, linear):
            reason = "asked to"
        if not reason and isinstance(linear, nn.Linear):
            if own_parametrizations(linear):
                reason = "it is pruned already"
            else:
                mask = ops.prune_mask(linear.weight.detach().cpu(), pattern).to(linear.weight.device)
                parametrize.register_parametrization(linear, "weight", Mask(mask, pattern))
        rows.append(Outcome(found.name, found.shape, "skipped" if reason else "pruned", reason or pattern))
    return Report(f"prune to {pattern}", rows)


def _skip_rule(model: nn.Module, skip: Skip) -> Callable[[str, nn.Module], bool]:
    if callable(skip):
        return skip
    names = [skip] if isinstance(skip, str) else list(skip)
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise RuntimeError(f"skip must name modules of the model; it has no {', '.join(map(repr, unknown))}")
    return lambda name, _: any(name == skipped or name.startswith(skipped + ".") for skipped in names)
