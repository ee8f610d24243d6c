"""quantize(model): int8 or int4 weights and int8 activations, learnt by fake quantisation or set after training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparse24.conv import GROUPS_OF_LINEAR, SparseConv2d, axis_of, integer_conv2d, pad, split_padding
from sparse24.pruning import Mask, MaskRule, dense_class, mask_rule, reclass
from sparse24.reporting import Found, Outcome, Report, own_parametrizations, parametrizations, product_layers
from sparse24.rounding import LEVELS, Rounded, linear, quantize_groups, quantize_rows, round_weight, round_x
from sparse24.sparse_module import SparseModule
from sparse24.support import INT4, autocast_dtype, check_group_size

ACTIVATIONS = ("token", "max", "percentile")
PERCENTILE = 99.99
SMALLEST = 1e-30  # of a learnt scale


class FakeQuantize(nn.Module):
    """Parametrisation of a weight, the last one: rounded to integers and back per output; and how x is rounded.

    scales:  [outputs] float32, or [groups, outputs], where group_size columns share one; learnt, or None: those of the
             largest weight that shares it.
    x_scale: [] float32 of all x, learnt or set, or None: each token by its own.
    Both stay float32 through .half(). What is learnt follows LSQ (Esser et al. 2020, arXiv 1902.08153).
    """

    scales: nn.Parameter | None
    x_scale: Tensor | None

    def __init__(
        self,
        dtype: torch.dtype = torch.int8,
        weight_only: bool = False,
        scales: Tensor | None = None,
        x_scale: Tensor | None = None,
        learn: bool = False,
        group_size: int | None = None,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.weight_only = weight_only
        self.group_size = group_size
        self.register_parameter("scales", nn.Parameter(scales) if scales is not None else None)
        if x_scale is not None and learn:
            self.x_scale = nn.Parameter(x_scale)
        else:
            self.register_buffer("x_scale", x_scale)

    def weight_scales(self) -> Tensor | None:
        """What weights are divided by, of the shape of `scales`: positive, whatever the optimiser made of those."""
        return None if self.scales is None else self.scales.abs().clamp_min(SMALLEST)

    def activation_scale(self) -> Tensor | None:
        return None if self.x_scale is None else self.x_scale.abs().clamp_min(SMALLEST)

    def rounded(self, weight: Tensor) -> Rounded:
        return round_weight(weight, self.weight_scales(), LEVELS[self.dtype], self.group_size)

    def forward(self, weight: Tensor) -> Tensor:
        return self.rounded(weight).value.to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype is tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def extra_repr(self) -> str:
        groups = "" if self.group_size is None else f", group_size={self.group_size}"
        if self.weight_only:
            return f"dtype={self.dtype}{groups}, weight_only=True"
        learnt = ", learnt scales" if self.scales is not None else ""
        return f"dtype={self.dtype}{groups}, x_rounding={'token' if self.x_scale is None else 'tensor'}{learnt}"


# ---- Forward in whole numbers ----------------------------------------------------------------------------------------


def _linear_forward(self: nn.Linear, input: Tensor) -> Tensor:
    """nn.Linear.forward of a layer with fake quantisation: what the integer kernels compute, with gradients."""
    x, rule, weight = _operands(self, input)
    with torch.autocast(x.device.type, enabled=False):
        y = linear(round_x(x, rule.activation_scale()), rule.rounded(weight), self.bias)
    return y.to(x.dtype)


def _conv2d_forward(self: nn.Conv2d, input: Tensor) -> Tensor:
    x, rule, weight = _operands(self, input)
    with torch.autocast(x.device.type, enabled=False):
        images = x if x.dim() == 4 else x.unsqueeze(0)
        inner, outer = split_padding(self)
        images = pad(images, outer, self.padding_mode)
        geometry = {"stride": self.stride, "padding": inner, "dilation": self.dilation, "groups": self.groups}
        quantised = rule.rounded(weight)
        y = integer_conv2d(images, quantised, self.bias, axis_of(self)[0], rule.activation_scale(), **geometry)
    return (y if x.dim() == 4 else y.squeeze(0)).to(x.dtype)


def _operands(layer: nn.Linear | nn.Conv2d, x: Tensor) -> tuple[Tensor, FakeQuantize, Tensor]:
    """x as autocast wants it, the rounding of the layer, and its weight as it comes to that."""
    *rules, rounding = cast(parametrize.ParametrizationList, parametrizations(layer))
    weight: Tensor = cast(Any, parametrizations(layer)).original
    cast_to = autocast_dtype(x.device.type)
    if cast_to is None and x.dtype is not weight.dtype:
        raise RuntimeError(f"x must be {weight.dtype}, the dtype of weight, outside autocast; got {x.dtype}")
    for rule in rules:
        weight = rule(weight)
    assert isinstance(rounding, FakeQuantize)
    return x if cast_to is None else x.to(cast_to), rounding, weight


def leave_fused_paths(module: nn.Module, args: Any) -> None:
    """Forward pre-hook that does nothing: nn.TransformerEncoderLayer calls a layer that has one, not its weights."""


# ---- The model -------------------------------------------------------------------------------------------------------


def quantize(
    model: nn.Module,
    dtype: torch.dtype = torch.int8,
    *,
    group_size: int | None = None,
    weight_only: bool = False,
    activations: str = "token",
    calibration: Iterable[Any] | None = None,
    percentile: float = PERCENTILE,
    learn_scales: bool = False,
    reprune: bool = False,
    unpruned: bool = False,
) -> Report[Outcome]:
    """Quantise the sparse layers of `model`, in place: weights per output, activations to int8.

    A pruned nn.Linear or nn.Conv2d gets fake quantisation after its mask: it stays dense and trainable (a zero stays
    zero), computes in whole numbers what the integer kernels will, and convert() turns it into the layer with the very
    integers it used. A sparse layer, after convert(), is rounded at once. The rule is rounding.quantize_rows. Other
    layers are left alone.
    dtype: torch.int8, or torch.int4, whose weights must be pruned to "pair 4:8": int4 kernels keep pairs of columns.
    group_size: so many columns of the pruned matrix, a multiple of 64, share a scale, the last group perhaps fewer; by
    default all of an output. For linear layers and patch convolutions.
    weight_only: activations stay as they are; int4 weights may have any pattern then.
    activations: "token": each token, or image of a convolution, by its own largest value, as it comes. "max" and
    "percentile": all by one scale of the layer, which is observed now over the batches of `calibration` (as for
    prune), in one pass through the model as it is: of the largest |x|, or of the |x| that `percentile` % of all do not
    exceed; what is larger is cut off.
    learn_scales: scales of weights, and of activations that are not rounded by token, are parameters to train, by LSQ.
    reprune: for int4, give a mask of another pattern up for the best of "pair 4:8" by the magnitude of what it keeps.
    unpruned: layers without a mask get fake quantisation too, to learn with the others or to compare with. Nothing runs
    them in integers: convert() leaves them as they are.
    Returns one row per layer: "quantized", or "skipped" with the reason.
    Raises RuntimeError for arguments that do not fit each other, and for inputs that are not finite in calibration.
    """
    _check(dtype, weight_only, activations, calibration, percentile, learn_scales, reprune)
    check_group_size(group_size, True)
    every = list(product_layers(model))
    options = (weight_only, group_size, reprune, learn_scales, unpruned)
    reasons = {found.name: _why_not(found, dtype, *options) for found in every}
    layers = {found.name: found.module for found in every if not reasons[found.name]}
    before = [_reprune(layer) for layer in layers.values() if reprune and mask_rule(layer) is not None]
    x_scales: dict[str, Tensor] = {}
    if calibration is not None:
        from sparse24.observers import observe  # here, so that `import sparse24` stays quick

        try:
            x_scales = observe(model, layers, calibration, percentile if activations == "percentile" else None)
        except BaseException:
            for stack, place, mask in before:
                stack[place] = mask
            raise
        unreached = [name for name in layers if name not in x_scales]
        reasons |= dict.fromkeys(unreached, "the calibration batches do not reach it")
    name = str(dtype).removeprefix("torch.")
    rows = []
    for found in every:
        layer, reason, detail = found.module, reasons[found.name], ""
        x_scale = x_scales.get(found.name)
        if not reason and isinstance(layer, SparseModule):
            reason, detail = _quantize_sparse(layer, dtype, weight_only, x_scale, group_size), f"{layer.pattern} {name}"
        elif not reason and isinstance(layer, (nn.Linear, nn.Conv2d)):
            _quantize_dense(layer, dtype, weight_only, x_scale, learn_scales, group_size)
            detail = f"{name} rounding in training" + (", dense" if mask_rule(layer) is None else "")
        rows.append(Outcome(found.name, found.shape, "skipped" if reason else "quantized", reason or detail))
    how = "" if group_size is None else f" in groups of {group_size}"
    how += ", weights only" if weight_only else "" if activations == "token" else f", activations by {activations}"
    return Report(f"quantize to {name}{how}", rows)


def _check(
    dtype: torch.dtype,
    weight_only: bool,
    activations: str,
    calibration: Iterable[Any] | None,
    percentile: float,
    learn_scales: bool,
    reprune: bool,
) -> None:
    if dtype not in LEVELS:
        raise RuntimeError(f"dtype must be torch.int8 or torch.int4; got {dtype}")
    if activations not in ACTIVATIONS:
        raise RuntimeError(f"activations must be one of {', '.join(ACTIVATIONS)}; got {activations!r}")
    if weight_only and (activations != "token" or learn_scales):
        raise RuntimeError("weight_only leaves activations as they are: it takes no `activations` and no learn_scales")
    if (calibration is None) != (activations == "token"):
        what = "needs calibration batches" if calibration is None else "takes no calibration batches"
        raise RuntimeError(f"activations {activations!r} {what}")
    if not 0 < percentile <= 100:
        raise RuntimeError(f"percentile must be above 0 and at most 100; got {percentile}")
    if reprune and dtype is not INT4:
        raise RuntimeError(f"reprune is for torch.int4, which needs another pattern; got {dtype}")


def _why_not(
    found: Found,
    dtype: torch.dtype,
    weight_only: bool,
    group_size: int | None,
    reprune: bool,
    learn_scales: bool,
    unpruned: bool,
) -> str:
    """Why quantize() leaves a layer alone, or ""."""
    layer = found.module
    if group_size is not None and _axis(layer) == "channels":
        return f"{GROUPS_OF_LINEAR}, not for convolutions along channels"
    if isinstance(layer, SparseModule):
        if layer.weight_dtype in LEVELS:
            return f"it is {str(layer.weight_dtype).removeprefix('torch.')} already"
        return "it is converted, and has nothing to learn scales with" if learn_scales else ""
    if found.reason:
        return found.reason
    if fake_quantization(layer) is not None:
        return "it is quantised already"
    rule = mask_rule(layer)
    if rule is None:
        return "" if unpruned else "it is not pruned: only sparse layers run in integers"
    pattern = rule.pattern
    if (dtype is INT4) == (pattern == "pair 4:8") or (dtype is INT4 and weight_only):
        return ""
    if dtype is not INT4:
        return f"it is pruned to {pattern}: int8 takes 2:4 or 1:2, not pair 4:8"
    return "" if reprune else f"it is pruned to {pattern}: int4 needs pair 4:8; reprune=True chooses such a mask"


def _reprune(layer: nn.Module) -> tuple[parametrize.ParametrizationList, int, nn.Module]:
    """Put the best "pair 4:8" mask of what a mask of another pattern keeps in its place; returns where, and the old."""
    from sparse24.masks import Columns  # here, so that `import sparse24` stays quick

    stack = cast(parametrize.ParametrizationList, parametrizations(layer))
    rule = cast(MaskRule, mask_rule(layer))
    place = list(stack).index(rule)
    if rule.pattern != "pair 4:8":
        columns, weight = Columns(cast(nn.Linear | nn.Conv2d, layer)), stack.original.detach()
        kept = columns.back(columns.mask(columns.of(rule(weight)), "pair 4:8", False))
        stack[place] = Mask(kept & rule.mask_of(weight), "pair 4:8")  # what was dropped was not trained: not back
    return stack, place, rule


def _axis(layer: nn.Module) -> str:
    """Along which a convolution is cut into groups; "" for another layer."""
    if isinstance(layer, SparseConv2d):
        return layer.axis
    return axis_of(layer)[0] if isinstance(layer, nn.Conv2d) else ""


def _quantize_sparse(
    layer: SparseModule, dtype: torch.dtype, weight_only: bool, x_scale: Tensor | None, group_size: int | None
) -> str:
    try:
        layer.quantize(dtype, weight_only=weight_only, x_scale=x_scale, group_size=group_size)
    except RuntimeError as error:
        return str(error)
    return ""


def _quantize_dense(
    layer: nn.Linear | nn.Conv2d,
    dtype: torch.dtype,
    weight_only: bool,
    x_scale: Tensor | None,
    learn: bool,
    group_size: int | None,
) -> None:
    scales = None
    if learn:
        rows = layer.weight.detach().float().flatten(1)
        if group_size is None:
            scales = quantize_rows(rows, LEVELS[dtype])[1].squeeze(1)
        else:
            scales = quantize_groups(rows, group_size, LEVELS[dtype])[1].T.contiguous()
    rule = FakeQuantize(dtype, weight_only, scales, x_scale, learn, group_size).to(layer.weight.device)
    parametrize.register_parametrization(layer, "weight", rule)
    if not weight_only:
        reclass(layer, dense_class(layer), forward=_conv2d_forward if isinstance(layer, nn.Conv2d) else _linear_forward)
        vars(layer).pop("transposable", None)  # of a layer that trained with sparse kernels
        layer.register_forward_pre_hook(leave_fused_paths)


def fake_quantization(layer: nn.Module) -> FakeQuantize | None:
    """The rounding that quantize() put on the weight of a layer."""
    return next((rule for rule in own_parametrizations(layer) if isinstance(rule, FakeQuantize)), None)


def remove_hook(layer: nn.Module) -> None:
    """Take leave_fused_paths off a layer, however it came there (its handle does not survive a copy)."""
    for key in [key for key, hook in layer._forward_pre_hooks.items() if hook is leave_fused_paths]:
        del layer._forward_pre_hooks[key]
