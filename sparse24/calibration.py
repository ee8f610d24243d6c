"""Wanda and SparseGPT: what calibration batches say of a layer's inputs, and the masks that follow from it.

Wanda (Sun et al. 2023, arXiv 2306.11695): an entry's score is |W| times the 2-norm of its input. SparseGPT (Frantar and
Alistarh 2023, arXiv 2301.00774): entries are dropped column by column, and what stays makes up for what goes, by the
inverse of the inputs' second moments. Layers come in the order in which the model calls them, each seeing inputs that
the layers pruned before it make; what is kept at a time is of one layer.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse24.calling import arguments_of, evaluating
from sparse24.masks import Columns, score_mask

DAMPING = 0.01  # of the mean second moment, added to each: SparseGPT's own default
BLOCK_COLUMNS = 128  # compensated within, before all columns to the right are at once
Layer = nn.Linear | nn.Conv2d


class Calibration:
    """Batches that a model is called with: each a Tensor, a tuple of positional arguments or a mapping of keywords.

    They are gone through once for each layer, in eval mode and without gradients. Raises RuntimeError for an iterator,
    which could be gone through only once, and for no batches at all.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any]) -> None:
        if isinstance(batches, (Tensor, Mapping)):
            batches = [batches]
        if iter(batches) is batches:
            raise RuntimeError("calibration must be a list or a DataLoader: an iterator can be gone through only once")
        self.model, self.batches = model, batches

    def order(self, layers: Iterable[nn.Module]) -> dict[int, int]:
        """id of each layer that the first batch reaches, in the order of its last call: how often it is called."""
        calls: dict[int, int] = {}

        def count(layer: nn.Module, _: Any) -> None:
            calls[id(layer)] = calls.pop(id(layer), 0) + 1

        handles = [layer.register_forward_pre_hook(count) for layer in layers]
        try:
            for batch in self.batches:
                self.call(batch)
                return calls
        finally:
            for handle in handles:
                handle.remove()
        raise RuntimeError("calibration must hold at least one batch; it is empty")

    def inputs(self, layer: nn.Module, calls: int) -> Iterator[Tensor]:
        """What the layer is called with, of every batch. Each batch stops at the layer's last call."""
        seen: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append((args[0] if args else next(iter(kwargs.values()))).detach())
            if len(seen) == calls:
                raise _Reached

        for batch in self.batches:
            handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
            try:
                self.call(batch)
            except _Reached:
                pass
            finally:
                handle.remove()
            yield from seen
            seen.clear()

    def call(self, batch: Any) -> None:
        arguments, keywords = arguments_of(batch)
        with evaluating(self.model):
            self.model(*arguments, **keywords)


class _Reached(Exception):
    """All of a layer's inputs of this batch are known."""


def columns_of_inputs(layer: Layer, columns: Columns, x: Tensor) -> Tensor:
    """What the columns of the layer's weight are multiplied by: [groups, tokens, columns] of float32."""
    x = x.float()
    if not isinstance(layer, nn.Conv2d):
        return x.reshape(1, -1, x.shape[-1])
    x = x if x.dim() == 4 else x.unsqueeze(0)
    around: list[int] = layer._reversed_padding_repeated_twice
    x = F.pad(x, around, "constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    unfolded = F.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride)  # [B, C * R * S, pixels]
    images, width, pixels = unfolded.shape
    tokens = unfolded.view(images, columns.groups, -1, pixels).permute(1, 0, 3, 2)
    if columns.axis == "channels":  # [groups, B, pixels, C, R * S] to [..., R * S, C]
        positions = layer.kernel_size[0] * layer.kernel_size[1]
        tokens = tokens.reshape(*tokens.shape[:3], columns.segment, positions).transpose(3, 4)
    return tokens.reshape(columns.groups, images * pixels, width // columns.groups)


# ---- The two methods: a weight with the mask, and what becomes of it -------------------------------------------------


def wanda(
    layer: Layer, columns: Columns, pattern: str, inputs: Iterator[Tensor], transposable: bool = False
) -> tuple[Tensor, Tensor]:
    """mask, and the weight as it was, both in the shape of the layer's weight."""
    squares: Tensor | float = 0.0
    for x in inputs:
        squares = squares + columns_of_inputs(layer, columns, x).double().square().sum(1, keepdim=True)
    weight = layer.weight.detach()
    scores = columns.of(weight).double().abs() * torch.as_tensor(squares).sqrt()
    return columns.back(columns.mask(scores.float(), pattern, transposable)), weight


def sparsegpt(layer: Layer, columns: Columns, pattern: str, inputs: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """mask, and the weight that makes up for what it drops, both in the shape of the layer's weight."""
    moments: Tensor | float = 0.0
    for x in inputs:
        rows = columns_of_inputs(layer, columns, x)
        moments = moments + (rows.mT @ rows).double()
    weight = layer.weight.detach()
    found = [
        _compensated(rows, own, columns, pattern)
        for rows, own in zip(columns.of(weight).double(), torch.as_tensor(moments), strict=True)
    ]
    mask, solved = (columns.back(torch.stack(list(parts))) for parts in zip(*found, strict=True))
    return mask, solved.to(weight.dtype)


def _compensated(weight: Tensor, moments: Tensor, columns: Columns, pattern: str) -> tuple[Tensor, Tensor]:
    """SparseGPT on one matrix [outputs, columns], all in float64, with the second moments of its columns."""
    unit = 8 if pattern == "pair 4:8" else 4
    weight, moments = weight.clone(), moments.clone()
    diagonal = moments.diagonal()
    weight[:, diagonal == 0] = 0  # an input that never is anything but zero
    diagonal[diagonal == 0] = 1
    diagonal += DAMPING * diagonal.mean()
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moments)), upper=True)
    mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    for block in _blocks(weight.shape[1], columns.segment, unit):
        begin, end = block[0][0], block[-1][1]
        errors = torch.zeros(len(weight), end - begin, dtype=weight.dtype, device=weight.device)
        for first, last in block:  # a group of the pattern
            own = weight[:, first:last]
            mask[:, first:last] = score_mask((own / inverse.diagonal()[first:last]).square().float(), pattern)
            for k in range(first, last):
                error = torch.where(mask[:, k], 0, weight[:, k]) / inverse[k, k]
                weight[:, k:end] -= error[:, None] * inverse[k, k:end]
                errors[:, k - begin] = error
        weight[:, end:] -= errors @ inverse[begin:end, end:]
    return mask, torch.where(mask, weight, 0)


def _blocks(columns: int, segment: int, unit: int) -> Iterator[list[tuple[int, int]]]:
    """Groups [first, last) of `unit` columns, which run across no segment, in lists of about BLOCK_COLUMNS."""
    groups = [
        (first, min(first + unit, begin + segment))
        for begin in range(0, columns, segment)
        for first in range(begin, begin + segment, unit)
    ]
    step = BLOCK_COLUMNS // unit
    return (groups[i : i + step] for i in range(0, len(groups), step))
