"""Which entries of a weight stay: the largest scores of each group along rows, or along rows and columns at once."""

from __future__ import annotations

import itertools
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse24 import library, ops
from sparse24.conv import as_matrix, axis_of, from_matrix

TILE = 4  # rows and columns of a tile whose rows and columns are groups of 2:4
# Tiles scored at a time: 90 candidates each, in float64.
_TILES_AT_ONCE = 1 << 16


def score_mask(scores: Tensor, pattern: str) -> Tensor:
    """prune_mask of scores [N, K] of any float dtype, on any device: bool [N, K] on the device of the scores."""
    return ops.prune_mask(scores.detach().cpu(), pattern).to(scores.device)


# An operator, so that torch.compile does not look into it.
@torch.library.custom_op("sparse24::transposable_mask", mutates_args=())
def _transposable_mask(scores: Tensor) -> Tensor:
    *batch, rows, columns = scores.shape
    if rows == 0 or columns == 0:
        return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    whole_rows, whole_columns = rows // TILE * TILE, columns // TILE * TILE
    bands = [(0, whole_rows, TILE), (whole_rows, rows, rows - whole_rows)]
    stripes = [(0, whole_columns, TILE), (whole_columns, columns, columns - whole_columns)]
    for (top, bottom, height), (left, right, width) in itertools.product(bands, stripes):
        if top == bottom or left == right:
            continue
        part = scores[..., top:bottom, left:right]
        whole = height == width == TILE and not scores.is_cuda and scores.dtype is not torch.float64
        mask[..., top:bottom, left:right] = _whole_tiles(part) if whole else _best(_ranked(part), height, width)
    return mask


def _whole_tiles(scores: Tensor) -> Tensor:
    tiles: Tensor = library.ops.transposable_tiles(scores.reshape(-1, scores.shape[-1]).float())
    return tiles.view(scores.shape)


@_transposable_mask.register_fake
def _(scores: Tensor) -> Tensor:
    return torch.empty(scores.shape, dtype=torch.bool, device=scores.device)


def transposable_mask(scores: Tensor) -> Tensor:
    """The mask that is 2:4 along rows and along columns and keeps the largest sum of |scores|: the exact optimum.

    scores: [..., N, K], any float dtype and device; N and K need not be multiples of four. Returns bool [..., N, K].
    Each 4 x 4 tile is a problem of its own, with 90 ways to keep exactly two entries of every row and column (Hubara et
    al. 2021, "transposable" masks). A tile at an edge, with fewer rows or columns, keeps at most two, to which none can
    be added. Sums are made in float64; of equal ones the first wins, in an order that is the same everywhere. Inf ranks
    above all numbers and NaN above Inf.
    """
    mask: Tensor = _transposable_mask(scores.detach())
    return mask


def _ranked(scores: Tensor) -> Tensor:
    """|scores| as float64 that add up: Inf and NaN become numbers larger than what sixteen others can sum to.

    They are powers of two, so that sums of them are exact, in whatever order.
    """
    sizes = scores.abs().double()
    return sizes.masked_fill(sizes.isinf(), 2.0**1010).masked_fill(scores.isnan(), 2.0**1018)


def _best(sizes: Tensor, height: int, width: int) -> Tensor:
    """The best mask of each tile of [height, width], of which sizes has a whole number both ways."""
    *batch, rows, columns = sizes.shape
    grid = (*batch, rows // height, height, columns // width, width)
    tiles = sizes.reshape(grid).transpose(-3, -2).reshape(-1, height * width)
    candidates = _candidates(height, width).to(sizes.device)
    best = [(part @ candidates.T.double()).argmax(1) for part in torch.split(tiles, _TILES_AT_ONCE)]
    kept = candidates[torch.cat(best)]
    return kept.view(*grid[:-3], grid[-2], height, width).transpose(-3, -2).reshape(sizes.shape)


@cache
def _candidates(height: int, width: int) -> Tensor:
    """The ways to keep two entries of each row and column, at edges as many up to two as go: bool [ways, entries]."""
    rows = [row for row in itertools.product((True, False), repeat=width) if sum(row) <= 2]
    ways = []
    for tile in itertools.product(rows, repeat=height):
        by_row, by_column = [sum(row) for row in tile], [sum(column) for column in zip(*tile, strict=True)]
        if max(by_column) > 2:
            continue
        entries = itertools.product(range(height), range(width))
        full = all(tile[r][c] or by_row[r] == 2 or by_column[c] == 2 for r, c in entries)
        if sum(by_row) == 2 * TILE if height == width == TILE else full:
            ways.append([entry for row in tile for entry in row])
    return torch.tensor(ways)


GROUP_COLUMNS = {"2:4": 4, "1:2": 2, "pair 4:8": 8}


def bad_groups(matrix: Tensor, pattern: str) -> int:
    """How many groups along the rows of a matrix [N, K] keep more than the pattern allows. -0.0 is zero, NaN is not."""
    group = GROUP_COLUMNS[pattern]
    kept = F.pad(matrix != 0, (0, -matrix.shape[1] % group)).view(len(matrix), -1, group)
    if pattern == "pair 4:8":
        kept = kept.view(len(matrix), -1, 4, 2).any(3)
    return int((kept.sum(2) > (1 if pattern == "1:2" else 2)).sum())


class Columns:
    """The weight of a layer as matrices [groups, outputs, columns], one for each group of a convolution.

    axis: "" for nn.Linear; of a convolution "channels", columns in the order [R, S, C / groups], or "patch", [C, R, S].
    segment: columns that no group of the pattern runs across: of an input channel's kernel positions each has its own.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        self.shape = tuple(layer.weight.shape)
        self.axis = axis_of(layer)[0] if isinstance(layer, nn.Conv2d) else ""
        self.groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
        self.segment = self.shape[1] if self.axis == "channels" else layer.weight[0].numel()

    def of(self, weight: Tensor) -> Tensor:
        """[groups, outputs, columns] of a tensor in the shape of the weight."""
        rows = as_matrix(weight, self.axis) if self.axis else weight
        return rows.reshape(self.groups, self.shape[0] // self.groups, -1)

    def back(self, columns: Tensor) -> Tensor:
        """The inverse of of()."""
        rows = columns.reshape(-1, self.segment)
        return from_matrix(rows, self.shape, self.axis) if self.axis else rows

    def mask(self, scores: Tensor, pattern: str, transposable: bool = False) -> Tensor:
        """The mask that keeps the largest |scores| [groups, outputs, columns] of each segment."""
        if not transposable:
            return score_mask(scores.reshape(-1, self.segment), pattern).view(scores.shape)
        by_segment = scores.reshape(*scores.shape[:2], -1, self.segment).transpose(1, 2)
        return transposable_mask(by_segment).transpose(1, 2).reshape(scores.shape)
