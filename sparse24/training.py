"""train_sparse(model): pruned linear layers run the sparse kernels while they train, forward and backward.

A pruned layer keeps its dense weight, for the optimiser. With its mask on, that weight is 2:4: `linear_masked`
compresses it anew at each call and multiplies on the sparse kernels. Of the three products of a training step

    y  = x W^T           sparse
    dX = dY W            sparse where W is 2:4 along its columns too (transposable masks), else dense
    dW = dY^T x          dense: both factors are; what the gradient of W becomes is up to the mask
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparse24 import ops
from sparse24.masks import Columns, bad_groups
from sparse24.pruning import Mask, MaskRule, dense_class, mask_rule, masked, reclass
from sparse24.quantization import fake_quantization
from sparse24.reporting import Outcome, Report, parametrizations, product_layers
from sparse24.support import FLOAT32_ON_CUDA, FLOAT_TYPES, autocast_dtype, device_problem

MODES = ("fixed", "sr-ste", "dense-gradient")

# Below, compressing W takes longer on a CPU than the sparse product saves (measured on Zen 4, docs/training.md).
MIN_TOKENS = {torch.float32: 128, torch.float16: 128, torch.bfloat16: 512}


# ---- The product -----------------------------------------------------------------------------------------------------


def why_dense(x: Tensor, weight: Tensor) -> str:
    """Why linear_masked(x, weight) is a dense product; "" where it runs a sparse kernel."""
    if weight.dtype not in FLOAT_TYPES:
        return f"{weight.dtype} has no sparse kernel"
    if weight.is_cuda or (ops.emulating and ops.emulated_arch()):
        return FLOAT32_ON_CUDA if weight.dtype is torch.float32 else device_problem(weight.device, weight.dtype)
    least = MIN_TOKENS[weight.dtype]
    if x.numel() < least * x.shape[-1]:
        return f"fewer than {least} tokens: compressing the weight would take longer than it saves"
    return device_problem(weight.device, weight.dtype)


def linear_masked(x: Tensor, weight: Tensor, bias: Tensor | None = None, transposable: bool = False) -> Tensor:
    """y = x @ weight^T + bias for a dense weight [N, K] that is 2:4 along K, and with `transposable` along N too.

    x [..., K], weight and bias of one float dtype, any strides. Differentiable in all three, any number of times; the
    gradient of weight is dense. Where nothing sparse runs, or W would take longer to compress than that saves, the
    product is torch's own (why_dense()). Raises RuntimeError for dtypes that differ, and, naming row and group, where
    weight does not fit.
    Accuracy: see ops.linear.
    """
    if x.dtype is not weight.dtype:
        raise RuntimeError(f"x must be {weight.dtype}, the dtype of weight, outside autocast; got {x.dtype}")
    y: Tensor = _linear_masked(x, weight, bias, transposable)
    return y


@torch.library.custom_op("sparse24::linear_masked", mutates_args=())
def _linear_masked(x: Tensor, weight: Tensor, bias: Tensor | None, transposable: bool) -> Tensor:
    if why_dense(x, weight):
        return F.linear(x, weight, bias)
    out_features, in_features = weight.shape
    packed = ops.pack(*ops.compress(weight), in_features=in_features)
    return ops.linear(x, packed, bias, out_features=out_features, in_features=in_features, dtype=weight.dtype)


@_linear_masked.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, transposable: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.transposable = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = linear_masked(grad, weight.t(), None, True) if ctx.transposable else grad @ weight
    if ctx.needs_input_grad[1]:
        grad_weight = grad.flatten(0, -2).t() @ x.flatten(0, -2) if x.dim() > 1 else grad.outer(x)
    if ctx.needs_input_grad[2]:
        grad_bias = grad.flatten(0, -2).sum(0) if x.dim() > 1 else grad
    return grad_x, grad_weight, grad_bias, None


_linear_masked.register_autograd(_backward, setup_context=_context)


class MaskedLinear(nn.Linear):
    """A pruned nn.Linear whose products run the sparse kernels; train_sparse() makes it, convert() ends it."""

    transposable: bool

    def forward(self, x: Tensor) -> Tensor:
        return linear_masked(*self._operands(x), self.transposable)

    def why_dense(self, x: Tensor) -> str:
        """Why forward(x) is a dense product; "" where it runs a sparse kernel."""
        return why_dense(*self._operands(x)[:2])

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        cast = autocast_dtype(x.device.type)
        if cast is None:
            return x, self.weight, self.bias
        return x.to(cast), self.weight.to(cast), None if self.bias is None else self.bias.to(cast)


# ---- Masks that follow the weights -----------------------------------------------------------------------------------


class StraightThrough(MaskRule):
    """Parametrisation of a weight: magnitude's mask of the weight as it is, whose gradient goes straight to all of W.

    SR-STE (Zhou et al. 2021, arXiv 2102.04010): to that gradient comes decay * W where the mask drops W. With decay = 0
    it is the straight-through estimator alone. Each forward brings the decay: where a step sums the gradients of many
    (accumulation, a layer used twice), it has it as often.
    """

    def __init__(self, columns: Columns, pattern: str, transposable: bool, decay: float) -> None:
        super().__init__(pattern)
        self.columns, self.transposable, self.decay = columns, transposable, decay

    @torch.no_grad()
    def mask_of(self, weight: Tensor) -> Tensor:
        columns = self.columns
        return columns.back(columns.mask(columns.of(weight), self.pattern, self.transposable))

    def forward(self, weight: Tensor) -> Tensor:
        kept: Tensor = _Straight.apply(weight, self.mask_of(weight.detach()), self.decay)  # type: ignore[no-untyped-call]
        return kept

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, decay={self.decay}" + (", transposable" if self.transposable else "")


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, decay: float) -> Tensor:
        ctx.decay = decay
        if decay:
            ctx.save_for_backward(weight, mask)
        return masked(weight, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if ctx.decay:
            weight, mask = ctx.saved_tensors
            grad = grad + ctx.decay * masked(weight, ~mask)
        return grad, None, None


# ---- The model -------------------------------------------------------------------------------------------------------


def train_sparse(model: nn.Module, mode: str = "fixed", *, decay: float = 2e-4) -> Report[Outcome]:
    """Have what prune() masked run the sparse kernels while it trains, in place; convert() comes after, as ever.

    mode: "fixed": the masks stay as they are, and so does what they drop.
          "sr-ste": each forward chooses the masks anew, by the magnitudes of the weights as they are; all weights get
          the gradient, and those that are dropped `decay` times themselves with it, which draws them to zero.
          "dense-gradient": the same without decay.
          Masks of convolutions follow the mode too; their products stay dense.
    decay: of "sr-ste", for each forward; 2e-4 is that of its authors, for SGD. It is part of the gradient.
    Whether masks stay transposable follows from how they were pruned. Calling it again changes the mode.
    Returns one row per layer: "sparse", or "dense" with the reason; what was not pruned is "skipped".
    Raises RuntimeError for arguments that do not fit.
    """
    if mode not in MODES:
        raise RuntimeError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
    if decay < 0:
        raise RuntimeError(f"decay must not be negative; got {decay}")
    rows = []
    for found in product_layers(model):
        layer, reason = found.module, found.reason
        rule = mask_rule(layer)
        if rule is None or not isinstance(layer, (nn.Linear, nn.Conv2d)):
            rows.append(Outcome(found.name, found.shape, "skipped", reason or "it is not pruned"))
            continue
        rule = _put_mode(layer, rule, mode, decay)
        reason = _why_products_stay_dense(layer, rule)
        if not reason and isinstance(layer, nn.Linear):
            _run_sparse(layer, _is_transposable(layer, rule))
        rows.append(Outcome(found.name, found.shape, "dense" if reason else "sparse", reason or _detail(layer, mode)))
    return Report(f"train: {mode}", rows)


def _put_mode(layer: nn.Linear | nn.Conv2d, rule: MaskRule, mode: str, decay: float) -> MaskRule:
    """The mask of a layer in this mode, in the place of `rule`."""
    stack = parametrizations(layer)
    assert isinstance(stack, parametrize.ParametrizationList)
    new: MaskRule
    if mode == "fixed":
        new = rule if isinstance(rule, Mask) else Mask(rule.mask_of(stack.original), rule.pattern)
    else:
        transposable = rule.pattern == "2:4" and _is_transposable(layer, rule)
        new = StraightThrough(Columns(layer), rule.pattern, transposable, decay if mode == "sr-ste" else 0)
    stack[list(stack).index(rule)] = new
    return new


def _is_transposable(layer: nn.Linear | nn.Conv2d, rule: MaskRule) -> bool:
    """Whether what the mask keeps is 2:4 along the outputs as well."""
    if isinstance(rule, StraightThrough):
        return rule.transposable
    assert isinstance(rule, Mask)
    columns = Columns(layer).of(rule.mask)
    return not any(bad_groups(group.t(), "2:4") for group in columns)


def _why_products_stay_dense(layer: nn.Linear | nn.Conv2d, rule: MaskRule) -> str:
    if isinstance(layer, nn.Conv2d):
        return "convolutions train dense"
    if rule.pattern == "pair 4:8":
        return "'pair 4:8' has sparse kernels of int4 alone"
    if isinstance(rule, Mask) and bad_groups(rule.mask, "2:4"):
        return "its mask keeps more than 2:4 does so far: call train_sparse() again when it is chosen to the end"
    if dense_class(layer) is not nn.Linear:
        return f"it is a {dense_class(layer).__name__}, not an nn.Linear"
    rounding = fake_quantization(layer)
    if rounding is not None and not rounding.weight_only:
        return "fake quantisation multiplies in whole numbers"
    weight = layer.weight
    if weight.is_cuda and weight.dtype is torch.float32:
        return FLOAT32_ON_CUDA
    return device_problem(weight.device, weight.dtype)


def _run_sparse(layer: nn.Linear, transposable: bool) -> None:
    """Make a parametrised nn.Linear a parametrised MaskedLinear: the same class, on another base."""
    if not isinstance(layer, MaskedLinear):
        reclass(layer, MaskedLinear)
    assert isinstance(layer, MaskedLinear)
    layer.transposable = transposable


def _detail(layer: nn.Module, mode: str) -> str:
    transposable = isinstance(layer, MaskedLinear) and layer.transposable
    return f"forward and gradient of x, {mode}" if transposable else f"forward, {mode}; the mask is not transposable"
