"""prune(model): masks on the weights of a model, as parametrisations that training respects."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparse24 import ops
from sparse24.conv import axis_of
from sparse24.reporting import Outcome, Report, own_parametrizations, product_layers, progress

Skip = str | Iterable[str] | Callable[[str, nn.Module], bool]


def masked(weight: Tensor, mask: Tensor) -> Tensor:
    """weight where mask (bool, of its shape), +0 elsewhere, whatever was there; differentiable in weight."""
    # torch.where is not vectorised on CPUs: bits are, and five times as fast. The compiler does better with where.
    if weight.device.type != "cpu" or type(weight) not in (Tensor, nn.Parameter) or torch.compiler.is_compiling():
        return torch.where(mask, weight, 0)
    kept: Tensor = _Masked.apply(weight, mask)  # type: ignore[no-untyped-call]
    return kept


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Masked(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor) -> Tensor:
        bits = -mask.view(torch.int8)  # all ones where it keeps
        return (weight.view(_BITS[weight.itemsize]) & bits).view(weight.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return masked(grad, *ctx.saved_tensors), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return masked(tangent, *ctx.saved_tensors)


class MaskRule(nn.Module):
    """Parametrisation of a weight: what a mask drops reads as +0. Subclasses say which mask, and where gradients go."""

    def __init__(self, pattern: str) -> None:
        super().__init__()
        self.pattern = pattern

    def mask_of(self, weight: Tensor) -> Tensor:
        """The mask, bool, that a weight gets."""
        raise NotImplementedError

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    def extra_repr(self) -> str:
        return f"pattern={self.pattern}"


class Mask(MaskRule):
    """A mask that stays: what it drops gets no gradient."""

    mask: Tensor

    def __init__(self, mask: Tensor, pattern: str) -> None:
        super().__init__(pattern)
        self.register_buffer("mask", mask)

    def mask_of(self, weight: Tensor) -> Tensor:
        return self.mask

    def forward(self, weight: Tensor) -> Tensor:
        return masked(weight, self.mask)


METHODS = ("magnitude", "wanda", "sparsegpt")


def prune(
    model: nn.Module,
    pattern: str = "2:4",
    *,
    skip: Skip = (),
    method: str = "magnitude",
    calibration: Iterable[Any] | None = None,
    transposable: bool = False,
) -> Report[Outcome]:
    """Mask every nn.Linear and nn.Conv2d of `model`, in place; the model stays dense and trainable.

    pattern: "2:4", the stricter "1:2", or "pair 4:8", which int4 weights need (quantize(dtype=torch.int4)). The mask is
    chosen now, from the weights as they are, and stays. Of a convolution it runs along the input channels of each group
    at each kernel position; of a patch convolution of fewer than four channels along [C, R, S] flattened.
    skip: names of modules to leave alone, each with all below it; or a function of (name, module).
    method: "magnitude" keeps the largest |W|; "wanda" the largest |W| times the norm of what it is multiplied by, over
    the batches of `calibration`; "sparsegpt" also changes the weights that stay, so that they make up for those that
    go (calibration.py says where these come from). A batch is what the model is called with: a Tensor, a tuple of
    arguments or a mapping; `calibration` is gone through once for each layer, in eval mode. Layers are pruned in the
    order in which they are called. An interrupted call leaves every layer whole, pruned or not; calling again goes on
    with the rest, to the same result.
    transposable: 2:4 along columns as well (along the output channels), the best such mask (masks.transposable_mask):
    then the gradient of x multiplies by a 2:4 matrix too. Not with sparsegpt, whose weights follow one column after
    the other.
    Returns one row per layer: "pruned", or "skipped" with the reason.
    Raises RuntimeError for arguments that do not fit each other, or if skip names a module that the model does not
    have.
    """
    from sparse24.masks import Columns  # here, so that `import sparse24` stays quick

    if pattern not in ops.PATTERNS:
        raise RuntimeError(f"pattern must be '2:4', '1:2' or 'pair 4:8'; got {pattern!r}")
    if method not in METHODS:
        raise RuntimeError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if (calibration is None) != (method == "magnitude"):
        what = "needs calibration batches" if calibration is None else "takes no calibration batches"
        raise RuntimeError(f"method {method!r} {what}")
    if transposable and (pattern != "2:4" or method == "sparsegpt"):
        raise RuntimeError(f"transposable masks are of pattern '2:4' and not of sparsegpt; got {pattern!r}, {method!r}")
    skips = skip_rule(model, skip)
    reasons: dict[str, str] = {}
    layers: dict[str, nn.Linear | nn.Conv2d] = {}
    every = list(product_layers(model))
    for found in every:
        reasons[found.name] = found.reason
        if not found.reason and skips(found.name, found.module):
            reasons[found.name] = "asked to"
        elif not found.reason and isinstance(found.module, (nn.Linear, nn.Conv2d)):
            if own_parametrizations(found.module):
                reasons[found.name] = "it is pruned already"
            else:
                layers[found.name] = found.module
    if calibration is None:
        for layer in layers.values():
            columns = Columns(layer)
            kept = columns.mask(columns.of(layer.weight.detach()), pattern, transposable)
            _put(layer, Mask(columns.back(kept), pattern))
    else:
        unreached = _prune_by_inputs(model, layers, pattern, method, calibration, transposable)
        reasons |= dict.fromkeys(unreached, "the calibration batches do not reach it")

    rows = []
    for found in every:
        reason, detail = reasons[found.name], f"{pattern}{', transposable' if transposable else ''}"
        if isinstance(found.module, nn.Conv2d):
            detail += f", axis={axis_of(found.module)[0]}"
        rows.append(Outcome(found.name, found.shape, "skipped" if reason else "pruned", reason or detail))
    return Report(f"prune to {pattern}{'' if method == 'magnitude' else f' by {method}'}", rows)


def _prune_by_inputs(
    model: nn.Module,
    layers: dict[str, nn.Linear | nn.Conv2d],
    pattern: str,
    method: str,
    batches: Iterable[Any],
    transposable: bool,
) -> list[str]:
    """Prunes layer by layer; returns the names of those that the batches do not reach."""
    from sparse24.calibration import Calibration, sparsegpt, wanda
    from sparse24.masks import Columns

    calibration = Calibration(model, batches)
    calls = calibration.order(layers.values())
    places = {layer_id: place for place, layer_id in enumerate(calls)}
    reached = [layer for layer in layers.values() if id(layer) in calls]
    for layer in progress(sorted(reached, key=lambda layer: places[id(layer)]), f"pruning by {method}"):
        columns, inputs = Columns(layer), calibration.inputs(layer, calls[id(layer)])
        if method == "wanda":
            mask, weight = wanda(layer, columns, pattern, inputs, transposable)
        else:
            mask, weight = sparsegpt(layer, columns, pattern, inputs)
        with torch.no_grad():
            layer.weight.copy_(weight)
        _put(layer, Mask(mask, pattern))
    return [name for name, layer in layers.items() if id(layer) not in calls]


def _put(layer: nn.Module, mask: Mask) -> None:
    parametrize.register_parametrization(layer, "weight", mask)


def mask_rule(layer: nn.Module) -> MaskRule | None:
    """The mask that prune() put on the weight of a layer."""
    return next((rule for rule in own_parametrizations(layer) if isinstance(rule, MaskRule)), None)


def dense_class(layer: nn.Module) -> type[nn.Module]:
    """What a parametrised layer was before parametrize, and training with sparse kernels, made a class of its own."""
    base = type(layer).__bases__[0]
    return base.__bases__[0] if base.__module__.startswith("sparse24.") else base


def reclass(layer: nn.Module, base: type[nn.Module], **members: Any) -> None:
    """Give the class of a parametrised layer, which is its own, another base, and further members."""
    own = {name: member for name, member in vars(type(layer)).items() if name not in ("__dict__", "__weakref__")}
    layer.__class__ = type(f"Parametrized{base.__name__}", (base,), own | members)


def skip_rule(model: nn.Module, skip: Skip) -> Callable[[str, nn.Module], bool]:
    """`skip` as a function of (name, module). Raises RuntimeError if it names a module that the model does not have."""
    if callable(skip):
        return skip
    names = [skip] if isinstance(skip, str) else list(skip)
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise RuntimeError(f"skip must name modules of the model; it has no {', '.join(map(repr, unknown))}")
    return lambda name, _: any(name == skipped or name.startswith(skipped + ".") for skipped in names)
