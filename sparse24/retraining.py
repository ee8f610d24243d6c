"""The workflow of "Accelerating Sparse Deep Neural Networks" (Mishra et al. 2021, arXiv 2104.08378, sections 4 and 5).

Train dense, prune once, and train again as the first time: from the weights that are left, with the same optimiser,
schedule and number of steps, all of the optimiser's state reset and the masks fixed. Quantise after that, not before.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sparse24.conversion import convert
from sparse24.permutation import permute
from sparse24.pruning import Skip, prune, skip_rule
from sparse24.quantization import quantize
from sparse24.reporting import Report

Train = Callable[[nn.Module], object]


def paper_skips(bits: int = 16) -> Callable[[str, nn.Module], bool]:
    """The paper's rule of what not to prune, for prune(skip=): inner sizes no multiple of 16, for 8 bits of 32.

    The inner size is in_features, or C * R * S of a convolution (per group): the first 7 x 7 x 3 convolution of a
    ResNet has 147 and stays dense. The kernels here take any size; the rule matters to those who compare. Embeddings
    and products without weights are never pruned; layers that only training needs, such as auxiliary classifiers, are
    named by the user. Raises RuntimeError for other bits.
    """
    if bits not in (8, 16):
        raise RuntimeError(f"bits must be 8 or 16; got {bits}")
    unit = 32 if bits == 8 else 16

    def skips(_: str, module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        return isinstance(weight, torch.Tensor) and math.prod(weight.shape[1:]) % unit != 0

    return skips


def reset(optimizer: torch.optim.Optimizer) -> None:
    """Forget all state of the optimiser (momenta, step counts), and give each group the learning rate it began with.

    That is `initial_lr`, which schedulers write, else the present one. Make the scheduler anew afterwards.
    """
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group["lr"] = group.get("initial_lr", group["lr"])
        group.pop("initial_lr", None)


def retrain(
    model: nn.Module,
    train: Train,
    *,
    pattern: str = "2:4",
    skip: Skip | None = None,
    reorder_for: Any = None,
    dtype: torch.dtype | None = None,
    train_quantized: Train | None = None,
    **how: Any,
) -> list[Report[Any]]:
    """The whole workflow on a trained dense `model`, in place: prune, train as before, quantise, convert.

    train(model): the very function that trained the dense model, with an optimiser and a schedule of its own, so that
    both start anew. In multi-phase training it repeats the longest phase of which pruned layers are part: pre-training,
    if what follows has little data (pruning before it, fine-tuning with the masks held); the last phase, if that is
    large (pruning after the heads of detection were trained).
    skip: as for prune(); by default paper_skips(16), with a dtype paper_skips(8).
    reorder_for: example inputs; then permute(model, reorder_for) comes first.
    dtype, train_quantized: quantize(model, dtype) after training, and the fine-tuning that follows, if any.
    how: `method`, `calibration` and `transposable` of prune().
    Returns the reports of what was done, in order. Raises RuntimeError if training loosened a mask: an optimiser that
    replaces weights, say.
    """
    reports: list[Report[Any]] = []
    if reorder_for is not None:
        reports.append(permute(model, reorder_for))
    rule = skip_rule(model, skip) if skip is not None else paper_skips(16 if dtype is None else 8)
    reports.append(prune(model, pattern, skip=rule, **how))
    pruned = [row.name for row in reports[-1].rows if row.outcome == "pruned"]
    train(model)
    _check_held(model, pruned)
    if dtype is not None:
        reports.append(quantize(model, dtype))
        if train_quantized is not None:
            train_quantized(model)
            _check_held(model, pruned)
    reports.append(convert(model))
    return reports


def _check_held(model: nn.Module, pruned: list[str]) -> None:
    loose = [name for name in pruned if not nn.utils.parametrize.is_parametrized(model.get_submodule(name), "weight")]
    if loose:
        raise RuntimeError(f"training took the masks off {', '.join(loose)}: the weights there may be dense again")
