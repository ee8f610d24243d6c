"""Observers: by what scale to round activations, from what calibration batches show of them, as it streams by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparse24.calibration import Calibration
from sparse24.reporting import progress
from sparse24.rounding import scale_of

BINS = 2048


class MaxObserver:
    """The largest |x| of all."""

    def __init__(self) -> None:
        self.amax = torch.zeros(())

    def add(self, x: Tensor) -> None:
        if x.numel():
            self.amax = torch.maximum(self.amax, x.detach().abs().amax().float().cpu())

    def scale(self) -> Tensor:
        return scale_of(self.amax)


class PercentileObserver:
    """The |x| that `percentile` % of all do not exceed, to one part in BINS / 2 of the largest.

    Counts in a histogram whose range doubles, its bins going together two by two, whenever a larger |x| comes: what
    was counted stays counted exactly, in a memory that does not grow.
    """

    def __init__(self, percentile: float) -> None:
        self.percentile = percentile
        self.largest = MaxObserver()
        self.range = 0.0
        self.counts = torch.zeros(BINS, dtype=torch.int64)

    def add(self, x: Tensor) -> None:
        self.largest.add(x)
        amax = float(self.largest.amax)
        if not math.isfinite(amax):
            return  # scale() will tell
        self.range = self.range or amax
        while self.range < amax:
            self.range *= 2
            self.counts = torch.cat([self.counts.view(-1, 2).sum(1), self.counts.new_zeros(BINS // 2)])
        for part in torch.split(x.detach().flatten(), 1 << 24):  # beyond, float32 counts are not exact
            counts = part.abs().float().histc(BINS, 0, self.range or 1.0)
            self.counts += counts.cpu().long()

    def scale(self) -> Tensor:
        total = int(self.counts.sum())
        wanted = math.ceil(round(total * self.percentile / 100, 6))  # 99.9 % of 1,000 is not 999.0000000001
        bin_ = int(torch.searchsorted(self.counts.cumsum(0), max(1, wanted)))
        amax = torch.tensor(self.range * (bin_ + 1) / BINS)
        return scale_of(torch.minimum(amax, self.largest.amax))


Observer = MaxObserver | PercentileObserver


def observe(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any], percentile: float | None
) -> dict[str, Tensor]:
    """x_scale, [] float32, of each of `layers` that the batches reach, all in one pass.

    percentile: None for the largest |x|. Raises RuntimeError where there are no batches, or naming the layer whose
    inputs are not finite; the model is as it was.
    """
    observers: dict[str, Observer] = {
        name: MaxObserver() if percentile is None else PercentileObserver(percentile) for name in layers
    }
    reached: set[str] = set()

    def watch(name: str) -> Any:
        def add(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            observers[name].add(args[0] if args else next(iter(kwargs.values())))
            reached.add(name)

        return add

    handles = [layer.register_forward_pre_hook(watch(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        calibration = Calibration(model, batches)
        called = 0
        for batch in progress(calibration.batches, "observing activations"):
            calibration.call(batch)
            called += 1
    finally:
        for handle in handles:
            handle.remove()
    if not called:
        raise RuntimeError("calibration must hold at least one batch; it is empty")
    scales = {name: observers[name].scale() for name in layers if name in reached}
    for name, scale in scales.items():
        if not scale.isfinite():
            raise RuntimeError(f"calibration must give every layer finite inputs; those of {name} are not")
    return scales
