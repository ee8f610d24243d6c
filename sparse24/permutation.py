"""permute(model): channels in an order in which 2:4 keeps more, the network computing what it did.

A channel is a column of some weights and a row, or an entry, of others: what reads it and what writes it. The model is
exported to a graph; channel_spaces.py finds in it what must be permuted together; each such set gets the order that
search() finds, in the weights, once and for all.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse24.calling import arguments_of, evaluating
from sparse24.channel_spaces import Spaces, Walk
from sparse24.conv import axis_of
from sparse24.library import ops as _ops
from sparse24.reporting import Report, progress

GROUP = 4


# ---- The search ------------------------------------------------------------------------------------------------------


def kept_magnitude(scores: Tensor) -> float:
    """What 2:4 keeps of scores [N, K]: the sum of the two largest |scores| of each group, in float64."""
    groups = F.pad(scores.abs().double(), (0, -scores.shape[1] % GROUP)).view(len(scores), -1, GROUP)
    return float(groups.topk(2, -1).values.sum())


def search(scores: Tensor, *, escapes: int = 0, seed: int = 0) -> Tensor:
    """An order of the columns of scores [N, K] in which 2:4 keeps more: int64 [K].

    Of two groups, the eight columns fall into the best of their 35 splits; pairs are split anew, those that gain most
    first, until none gains. Then the columns of three random groups are shuffled and the same starts again from there,
    `escapes` times; an order that keeps no more is given up (after Pool and Yu 2021, "Channel Permutations for N:M
    Sparsity": their stripes of two groups, and an escape of our own).
    The same `seed` gives the same order. The last group, where K is no multiple of four, stays short. What is not
    finite counts as zero.
    """
    columns = scores.shape[1]
    numbers = torch.nan_to_num(scores.detach().cpu().float(), nan=0.0, posinf=0.0, neginf=0.0)
    sizes = F.pad(numbers.abs().T, (0, 0, 0, -columns % GROUP)).contiguous()  # [K, N]
    order = torch.arange(len(sizes)).view(-1, GROUP)
    if len(order) < 2:
        return order.flatten()[:columns]
    state = _Search(sizes, order)
    state.climb()
    random = torch.Generator().manual_seed(seed)
    for _ in range(escapes):
        before = state.copy()
        state.disturb(random)
        state.climb()
        if state.kept() <= before.kept() * (1 + 1e-12):
            state = before
    found = _fillers_last(state.order, columns)  # which may join columns of several short groups
    if kept_magnitude(numbers[:, found]) < kept_magnitude(numbers):
        return torch.arange(columns)
    return found


def _fillers_last(order: Tensor, columns: int) -> Tensor:
    """The order without the columns from `columns` on, mere zeros: the groups that hold some come last."""
    filled = (order < columns).all(1)
    flat = torch.cat([order[filled].flatten(), order[~filled].flatten()])
    return flat[flat < columns]


# The ways to cut eight columns into four and four, in the order of kept_by_splits (csrc/cpu/permutation/permutation.h).
_FIRST = torch.tensor([(0, *rest) for rest in itertools.combinations(range(1, 8), 3)])
_SECOND = torch.tensor([sorted(set(range(8)) - set(one)) for one in _FIRST.tolist()])


class _Search:
    """Groups of columns, and of each two groups what the best split would gain."""

    PAIRS_AT_ONCE = 1 << 16  # 18 MB of numbers
    CANDIDATES = 4  # pairs a group that a round looks at
    DISTURBED = 3  # groups

    def __init__(self, sizes: Tensor, order: Tensor) -> None:
        self.sizes, self.order = sizes, order
        self.least = 1e-6 * float(sizes.sum(dtype=torch.float64)) / len(order)  # a gain above rounding, of a pair
        groups = len(order)
        self.gains = torch.full((groups, groups), -torch.inf, dtype=torch.float64)
        self.best = torch.zeros(groups, groups, dtype=torch.long)
        self.evaluate(torch.combinations(torch.arange(groups)))

    def copy(self) -> _Search:
        twin = copy.copy(self)
        twin.order, twin.gains, twin.best = self.order.clone(), self.gains.clone(), self.best.clone()
        return twin

    def kept(self) -> float:
        return float(self.sizes[self.order].topk(2, 1).values.sum(dtype=torch.float64))

    def evaluate(self, pairs: Tensor) -> None:
        """Fill in gains and best for pairs [P, 2] of groups, the smaller first."""
        for part in torch.split(pairs, self.PAIRS_AT_ONCE):
            kept = _ops.kept_by_splits(self.sizes, self.order[part].flatten(1))
            gain, best = (kept - kept[:, :1]).max(1)  # split 0 leaves all as it is
            self.gains[part[:, 0], part[:, 1]], self.best[part[:, 0], part[:, 1]] = gain, best

    def climb(self) -> None:
        """Splits pairs of groups anew, best gain first and each group once a round, until none gains."""
        groups = len(self.order)
        while True:
            gains = self.gains.flatten()
            found = torch.topk(gains, min(len(gains), self.CANDIDATES * groups))
            changed: set[int] = set()
            for gain, place in zip(found.values.tolist(), found.indices.tolist(), strict=True):
                a, b = place // groups, place % groups
                if gain <= self.least:
                    break
                if a in changed or b in changed:
                    continue
                changed |= {a, b}
                eight, split = self.order[[a, b]].flatten(), int(self.best[a, b])
                self.order[a], self.order[b] = eight[_FIRST[split]], eight[_SECOND[split]]
            if not changed:
                return
            self._refresh(*changed)

    def disturb(self, random: torch.Generator) -> None:
        groups = torch.randperm(len(self.order), generator=random)[: self.DISTURBED]
        columns = self.order[groups].flatten()
        self.order[groups] = columns[torch.randperm(len(columns), generator=random)].view(-1, GROUP)
        self._refresh(*groups.tolist())

    def _refresh(self, *changed: int) -> None:
        is_changed = torch.zeros(len(self.order), dtype=torch.bool)
        is_changed[list(changed)] = True
        pairs = torch.combinations(torch.arange(len(self.order)))
        self.evaluate(pairs[is_changed[pairs].any(1)])


# ---- On a model ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Permuted:
    """One set of channels, and what 2:4 keeps of the magnitude of all that reads them, before and after."""

    read_by: str
    channels: int
    before: str
    after: str
    efficacy: str  # of the way from `before` to as many entries of each row, the largest wherever they are


@dataclass
class _Space:
    readers: list[str]
    members: list[tuple[str, int]]
    scores: Tensor  # [rows of all readers, channels]
    order: Tensor = field(default_factory=lambda: torch.empty(0))


def permute(
    model: nn.Module, example_inputs: Any, *, escapes: int = 0, tolerance: float = 1e-4, seed: int = 0
) -> Report[Permuted]:
    """Reorder channels of `model`, in place, so that prune(model) keeps more magnitude; the model computes what it did.

    example_inputs: what the model is called with, as for report(); torch.export follows it once, in eval mode. Channels
    are reordered in every weight, bias and statistic that has them: through residual sums, norms, depthwise
    convolutions and elementwise operators. Of attention the inputs and the hidden channels around it are; heads stay as
    they are, and so does all that an operator touches whose meaning here is not known. Call it before prune().
    escapes, seed: of search(); more escapes take longer and keep a little more.
    tolerance: how far the outputs on example_inputs may be off afterwards, relative to the largest: sums in another
    order round differently. Beyond it everything is put back, and RuntimeError is raised.
    Returns one row for each set of channels. Raises RuntimeError if the model is pruned already, and what torch.export
    raises for a model that it cannot follow. Nothing is changed before all orders are found.
    """
    if any(type(module).__module__.startswith("sparse24.") for module in model.modules()):
        raise RuntimeError("model must not be pruned yet: masks chosen before would not fit the new order")
    arguments, keywords = arguments_of(example_inputs)
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    with evaluating(model):
        before = model(*arguments, **keywords)
        program = torch.export.export(model, arguments, keywords, strict=False)
        spaces = list(_permutable(model, Walk(program, tensors).spaces, tensors))
        for space in progress(spaces, "searching orders"):
            space.order = search(space.scores, escapes=escapes, seed=seed)
        _reorder(spaces, tensors, [space.order for space in spaces])
        off = _difference(before, model(*arguments, **keywords))
        if not off <= tolerance:
            _reorder(spaces, tensors, [space.order.argsort() for space in spaces])
            raise RuntimeError(
                f"permuting changed the outputs by {off:.3g} of the largest, more than tolerance {tolerance}: "
                "the model is as it was"
            )
    return Report("permute for 2:4", [_permuted(space) for space in spaces])


def _permutable(model: nn.Module, spaces: Spaces, tensors: Mapping[str, Tensor]) -> Iterator[_Space]:
    """The sets that may be reordered and that some prunable weight reads, as its columns."""
    readable = {}
    for name, module in model.named_modules():
        conv = isinstance(module, nn.Conv2d) and module.groups == 1 and axis_of(module) == ("channels", "")
        if conv or isinstance(module, nn.Linear):
            readable[f"{name}.weight".lstrip(".")] = name
    for space, parent in enumerate(spaces.parents):
        if space != parent or spaces.fixed[space] or spaces.sizes[space] <= GROUP:
            continue
        members = list(dict.fromkeys(spaces.members[space]))
        read = [name for name, dim in members if dim == 1 and name in readable]
        if read:
            scores = torch.cat([tensors[name].detach().float().movedim(1, -1).flatten(0, -2) for name in read])
            yield _Space([readable[name] for name in read], members, scores)


def _reorder(spaces: list[_Space], tensors: Mapping[str, Tensor], orders: list[Tensor]) -> None:
    for space, order in zip(spaces, orders, strict=True):
        for name, dim in space.members:
            tensor = tensors[name]
            tensor.copy_(tensor.index_select(dim, order.to(tensor.device)))


def _difference(before: Any, after: Any) -> float:
    """The largest difference of two outputs, relative to the largest number; NaN where both have one is none."""
    pairs = zip(*(torch.utils._pytree.tree_leaves(one) for one in (before, after)), strict=True)
    worst = 0.0
    for a, b in pairs:
        if isinstance(a, Tensor) and a.is_floating_point() and a.numel():
            same = (a == b) | (a.isnan() & b.isnan())
            off = torch.where(same, 0, (a - b).abs().double()).max()
            worst = max(worst, float(off / a.nan_to_num(posinf=0, neginf=0).abs().max().clamp(min=1e-30)))
    return worst


def _permuted(space: _Space) -> Permuted:
    sizes = space.scores.double().abs()
    total, before = float(sizes.sum()) or 1.0, kept_magnitude(space.scores)
    after = kept_magnitude(space.scores[:, space.order])
    groups, rest = divmod(sizes.shape[1], GROUP)
    most = float(sizes.topk(2 * groups + min(rest, 2), 1).values.sum())
    names = ", ".join(space.readers[:3]) + (f" and {len(space.readers) - 3} more" if len(space.readers) > 3 else "")
    way = (after - before) / (most - before) if most > before else 0.0
    shares = [f"{100 * one / total:.2f} %" for one in (before, after)]
    return Permuted(names, sizes.shape[1], shares[0], shares[1], f"{100 * way:.1f} %")
