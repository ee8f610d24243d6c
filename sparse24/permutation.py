"""permute(model): channels in an order in which 2:4 keeps more, the network computing what it did.

A channel is a column of some weights and a row, or an entry, of others: what writes it and what reads it. The model is
exported to a graph of torch operators, and every dimension of every tensor in it belongs to a *space*: dimensions that
must be permuted together. Operators that this module knows join spaces; whatever it does not know fixes the order of
all that it touches, and so do inputs and outputs. What is left can be permuted in the weights once and for all.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

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

    Of two groups, the eight columns fall into the best of their 35 splits; the pair of groups that gains most is split
    anew until none gains. Then the columns of three random groups are shuffled and the same starts again from there,
    `escapes` times; an order that keeps no more is given up (after Pool and Yu 2021, "Channel Permutations for N:M
    Sparsity": their stripes of two groups, and an escape of our own).
    The same `seed` gives the same order. The last group, where K is no multiple of four, stays short.
    """
    columns = scores.shape[1]
    sizes = F.pad(scores.detach().cpu().float().abs().T, (0, 0, 0, -columns % GROUP)).contiguous()  # [K, N]
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
    return _fillers_last(state.order, columns)


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
        kept = _ops.kept_by_splits(self.sizes, self.order[pairs].flatten(1))
        gain, best = (kept - kept[:, :1]).max(1)  # split 0 leaves all as it is
        self.gains[pairs[:, 0], pairs[:, 1]], self.best[pairs[:, 0], pairs[:, 1]] = gain, best

    def climb(self) -> None:
        """Splits the pair of groups that gains most, until none does."""
        groups = len(self.order)
        while True:
            place = int(self.gains.argmax())
            a, b = place // groups, place % groups
            if float(self.gains[a, b]) <= self.least:
                return
            eight = self.order[[a, b]].flatten()
            split = int(self.best[a, b])
            self.order[a], self.order[b] = eight[_FIRST[split]], eight[_SECOND[split]]
            self._refresh(a, b)

    def disturb(self, random: torch.Generator) -> None:
        groups = torch.randperm(len(self.order), generator=random)[: self.DISTURBED]
        columns = self.order[groups].flatten()
        self.order[groups] = columns[torch.randperm(len(columns), generator=random)].view(-1, GROUP)
        self._refresh(*groups.tolist())

    def _refresh(self, *changed: int) -> None:
        others = torch.arange(len(self.order))
        pairs = [torch.stack([others[others != one], torch.full((len(others) - 1,), one)], 1) for one in changed]
        self.evaluate(torch.unique(torch.cat(pairs).sort(1).values, dim=0))


# ---- Which dimensions belong together --------------------------------------------------------------------------------


class _Spaces:
    """Dimensions by the permutation they share: a union-find whose sets may be fixed."""

    def __init__(self) -> None:
        self.parents: list[int] = []
        self.sizes: list[int] = []
        self.fixed: list[bool] = []
        self.members: list[list[tuple[str, int]]] = []  # (parameter, dimension)

    def new(self, size: int, fixed: bool = False, member: tuple[str, int] | None = None) -> int:
        self.parents.append(len(self.parents))
        self.sizes.append(size)
        self.fixed.append(fixed)
        self.members.append([member] if member else [])
        return len(self.parents) - 1

    def find(self, space: int) -> int:
        while self.parents[space] != space:
            space = self.parents[space]
        return space

    def join(self, *spaces: int) -> int:
        first, *rest = map(self.find, spaces)
        for other in rest:
            if other == first:
                continue
            self.fixed[first] |= self.fixed[other] or self.sizes[other] != self.sizes[first]
            self.fixed[other] = self.fixed[first]
            if self.sizes[other] == self.sizes[first]:
                self.members[first] += self.members[other]
                self.parents[other] = first
        return first

    def fix(self, *spaces: int) -> None:
        for space in spaces:
            self.fixed[self.find(space)] = True


Dims = list[int]  # the space of each dimension of a tensor
_ELEMENTWISE = set(
    "relu relu6 gelu silu mish elu selu celu square leaky_relu hardtanh hardswish hardsigmoid softplus tanh "
    "sigmoid exp log sqrt rsqrt reciprocal neg abs sin cos erf pow clamp clamp_min clamp_max add sub rsub mul div "
    "maximum minimum where dropout feature_dropout alpha_dropout clone contiguous to _to_copy type_as alias "
    "detach detach_ lift_fresh_copy softmax _softmax log_softmax bernoulli threshold logical_not eq ne lt le gt "
    "ge masked_fill zeros_like ones_like full_like".split()
)
_REDUCTIONS = {"mean", "sum", "amax", "amin", "var", "std", "prod", "norm", "linalg_vector_norm"}
_POOLS = {"avg_pool", "max_pool", "adaptive_avg_pool", "adaptive_max_pool", "upsample_nearest", "upsample_bilinear"}


class _Walk:
    """The spaces of an exported graph, node by node."""

    def __init__(self, program: Any, tensors: Mapping[str, Tensor]) -> None:
        self.spaces = _Spaces()
        self.dims: dict[fx.Node, Any] = {}
        signature = program.graph_signature
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        first_name: dict[int, str] = {}  # of a tensor that has several
        made: dict[str, Dims] = {}
        for node in program.graph.nodes:
            if node.op == "placeholder":
                name = names.get(node.name)
                tensor = tensors.get(name) if name else None
                if tensor is None:
                    self.dims[node] = self._fixed(node)
                    continue
                name = first_name.setdefault(id(tensor), str(name))
                if name not in made:
                    made[name] = [self.spaces.new(size, member=(name, dim)) for dim, size in enumerate(tensor.shape)]
                self.dims[node] = made[name]
            elif node.op == "call_function":
                self.dims[node] = self._call(node)
            elif node.op == "output":
                for argument in node.all_input_nodes:
                    self._fix_all(argument)

    def _shape(self, node: fx.Node) -> list[int]:
        return list(node.meta["val"].shape)

    def _fixed(self, node: fx.Node) -> Any:
        """Dimensions of their own, whose order cannot change."""

        def of(value: Any) -> Any:
            if isinstance(value, Tensor):
                return [self.spaces.new(int(size), fixed=True) for size in value.shape]
            return [of(one) for one in value] if isinstance(value, (list, tuple)) else None

        return of(node.meta.get("val"))

    def _fix_all(self, node: fx.Node) -> None:
        def every(dims: Any) -> Iterator[int]:
            for one in dims or ():
                yield from [one] if isinstance(one, int) else every(one)

        self.spaces.fix(*every(self.dims[node]))

    def _call(self, node: fx.Node) -> Any:
        if getattr(node.target, "__name__", "") == "getitem":
            return self.dims[node.args[0]][node.args[1]]  # type: ignore[index]
        name = getattr(getattr(node.target, "_schema", None), "name", "").removeprefix("aten::").removesuffix("_")
        rule = self._rule(name)
        found = rule(node) if rule is not None and isinstance(node.meta.get("val"), Tensor) else None
        if found is None:
            for argument in node.all_input_nodes:
                self._fix_all(argument)
            return self._fixed(node)
        return found

    def _rule(self, name: str) -> Callable[[fx.Node], Dims | None] | None:
        if name in _ELEMENTWISE:
            return self._broadcast
        if name in _REDUCTIONS:
            return self._reduce
        if name.rstrip("123d") in _POOLS:
            return self._pool
        return {
            "linear": self._linear,
            "conv1d": self._conv,
            "conv2d": self._conv,
            "conv3d": self._conv,
            "convolution": self._conv,
            "batch_norm": self._batch_norm,
            "prelu": self._prelu,
            "layer_norm": self._norm,
            "rms_norm": self._norm,
            "embedding": lambda node: [*self._of(node, 1), self._of(node, 0)[1]],
            "matmul": self._matmul,
            "bmm": self._matmul,
            "scaled_dot_product_attention": self._attention,
            "view": self._reshape,
            "reshape": self._reshape,
            "_unsafe_view": self._reshape,
            "flatten": self._reshape,
            "unflatten": self._reshape,
            "squeeze": self._reshape,
            "unsqueeze": self._reshape,
            "expand": self._expand,
            "permute": lambda node: [self._of(node, 0)[dim] for dim in node.args[1]],  # type: ignore[union-attr, index]
            "transpose": self._transpose,
            "t": lambda node: self._of(node, 0)[::-1],
            "cat": self._cat,
            "slice": self._slice,
            "select": self._select,
        }.get(name)

    # Each returns the dims of the node's tensor, or None where the rule does not hold.

    def _of(self, node: fx.Node, place: int) -> Dims:
        argument = node.args[place]
        assert isinstance(argument, fx.Node)
        found: Dims = self.dims[argument]
        return found

    def _argument(self, node: fx.Node, name: str, default: Any = None) -> Any:
        for place, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
            if argument.name == name:
                return node.args[place] if place < len(node.args) else node.kwargs.get(name, default)
        return default

    def _join_vectors(self, node: fx.Node, space: int, *names: str) -> None:
        for name in names:
            vector = self._argument(node, name)
            if isinstance(vector, fx.Node):
                self.spaces.join(space, self.dims[vector][0])

    def _broadcast(self, node: fx.Node) -> Dims:
        shape = self._shape(node)
        out: list[int | None] = [None] * len(shape)
        for argument in node.all_input_nodes:
            for back, space in enumerate(reversed(self.dims[argument]), 1):
                if self.spaces.sizes[space] == shape[-back]:
                    known = out[-back]
                    out[-back] = space if known is None else self.spaces.join(known, space)
        return [self.spaces.new(size, fixed=True) if one is None else one for one, size in zip(out, shape, strict=True)]

    def _reduce(self, node: fx.Node) -> Dims | None:
        dims, removed = self._of(node, 0), self._argument(node, "dim")
        if removed is None or removed == []:
            return [self.spaces.new(1, fixed=True) for _ in self._shape(node)]
        removed = {dim % len(dims) for dim in ([removed] if isinstance(removed, int) else removed)}
        if len(self._shape(node)) == len(dims):
            return [self.spaces.new(1, fixed=True) if i in removed else dim for i, dim in enumerate(dims)]
        return [dim for i, dim in enumerate(dims) if i not in removed]

    def _pool(self, node: fx.Node) -> Dims | None:
        dims, shape = self._of(node, 0), self._shape(node)
        if len(dims) < 3:
            return None
        kept = len(dims) - 1 if len(dims) == 3 and "1d" not in str(node.target) else 2
        if len(dims) == 3 and "1d" not in str(node.target):
            return None
        self.spaces.fix(*dims[kept:])
        return [*dims[:kept], *(self.spaces.new(size, fixed=True) for size in shape[kept:])]

    def _linear(self, node: fx.Node) -> Dims:
        x, weight = self._of(node, 0), self._of(node, 1)
        self.spaces.join(x[-1], weight[1])
        self._join_vectors(node, weight[0], "bias")
        return [*x[:-1], weight[0]]

    def _conv(self, node: fx.Node) -> Dims | None:
        x, weight = self._of(node, 0), self._of(node, 1)
        if len(x) != len(weight) or self._argument(node, "transposed", False):
            return None
        groups = self._argument(node, "groups", 1)
        if groups == 1:
            self.spaces.join(x[1], weight[1])
        elif groups == self.spaces.sizes[x[1]] == self.spaces.sizes[weight[0]]:
            self.spaces.join(x[1], weight[0])  # depthwise: a channel is read and written by one row
        else:
            return None
        self._join_vectors(node, weight[0], "bias")
        self.spaces.fix(*x[2:], *weight[2:])
        return [x[0], weight[0], *(self.spaces.new(size, fixed=True) for size in self._shape(node)[2:])]

    def _batch_norm(self, node: fx.Node) -> Dims:
        x = self._of(node, 0)
        self._join_vectors(node, x[1], "weight", "bias", "running_mean", "running_var")
        return x

    def _prelu(self, node: fx.Node) -> Dims:
        x, slopes = self._of(node, 0), self._of(node, 1)
        if self.spaces.sizes[slopes[0]] > 1:
            self.spaces.join(x[1], slopes[0])
        return x

    def _norm(self, node: fx.Node) -> Dims | None:
        x = self._of(node, 0)
        if len(self._argument(node, "normalized_shape")) != 1:
            return None
        self._join_vectors(node, x[-1], "weight", "bias")
        return x

    def _matmul(self, node: fx.Node) -> Dims | None:
        a, b = self._of(node, 0), self._of(node, 1)
        if len(a) < 2 or len(a) != len(b):
            return None
        self.spaces.join(a[-1], b[-2])
        if any(self.spaces.sizes[one] != self.spaces.sizes[two] for one, two in zip(a[:-2], b[:-2], strict=True)):
            return None
        batch = [self.spaces.join(one, two) for one, two in zip(a[:-2], b[:-2], strict=True)]
        return [*batch, a[-2], b[-1]]

    def _attention(self, node: fx.Node) -> Dims | None:
        q, k, v = (self._of(node, place) for place in range(3))
        if not len(q) == len(k) == len(v) or self._argument(node, "attn_mask") is not None:
            return None
        if self._argument(node, "is_causal", False) or self._argument(node, "enable_gqa", False):
            return None
        self.spaces.join(q[-1], k[-1])
        self.spaces.join(k[-2], v[-2])
        batch = [self.spaces.join(*three) for three in zip(q[:-2], k[:-2], v[:-2], strict=True)]
        return [*batch, q[-2], v[-1]]

    def _reshape(self, node: fx.Node) -> Dims:
        """A dimension that stays whole keeps its space; what is split or merged keeps its order."""
        dims, shape = self._of(node, 0), self._shape(node)
        old = [(self.spaces.sizes[dim], dim) for dim in dims if self.spaces.sizes[dim] != 1]
        new = [size for size in shape if size != 1]
        found: list[int] = []
        while old or new:
            left, right = [old.pop(0)] if old else [], [new.pop(0)] if new else []
            while (before := math.prod(size for size, _ in left)) != (after := math.prod(right)):
                if before < after:
                    left.append(old.pop(0))
                else:
                    right.append(new.pop(0))
            if len(left) == len(right) == 1:
                found.append(left[0][1])
            else:
                self.spaces.fix(*(dim for _, dim in left))
                found += [self.spaces.new(size, fixed=True) for size in right]
        return [self.spaces.new(1, fixed=True) if size == 1 else found.pop(0) for size in shape]

    def _expand(self, node: fx.Node) -> Dims:
        dims, shape = self._of(node, 0), self._shape(node)
        dims = [self.spaces.new(1, fixed=True)] * (len(shape) - len(dims)) + dims
        same = [self.spaces.sizes[dim] == size for dim, size in zip(dims, shape, strict=True)]
        return [
            dim if one else self.spaces.new(size, fixed=True) for dim, size, one in zip(dims, shape, same, strict=True)
        ]

    def _transpose(self, node: fx.Node) -> Dims:
        dims = list(self._of(node, 0))
        a, b = int(node.args[1]), int(node.args[2])  # type: ignore[arg-type]
        dims[a], dims[b] = dims[b], dims[a]
        return dims

    def _cat(self, node: fx.Node) -> Dims:
        parts = [self.dims[part] for part in self._argument(node, "tensors")]
        shape = self._shape(node)
        along = int(self._argument(node, "dim", 0)) % len(shape)
        out = [self.spaces.join(*dims) if i != along else dims[0] for i, dims in enumerate(zip(*parts, strict=True))]
        self.spaces.fix(*(part[along] for part in parts))
        out[along] = self.spaces.new(shape[along], fixed=True)
        return out

    def _slice(self, node: fx.Node) -> Dims:
        dims, along = list(self._of(node, 0)), int(self._argument(node, "dim", 0))
        if self._shape(node)[along] != self.spaces.sizes[dims[along]]:
            self.spaces.fix(dims[along])
            dims[along] = self.spaces.new(self._shape(node)[along], fixed=True)
        return dims

    def _select(self, node: fx.Node) -> Dims:
        dims = list(self._of(node, 0))
        along = int(self._argument(node, "dim")) % len(dims)
        self.spaces.fix(dims[along])
        return dims[:along] + dims[along + 1 :]


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
    arguments: tuple[Any, ...] = ()
    keywords: dict[str, Any] = {}
    if isinstance(example_inputs, Mapping):
        keywords = dict(example_inputs)
    else:
        arguments = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            before = model(*arguments, **keywords)
            program = torch.export.export(model, arguments, keywords, strict=False)
            spaces = list(_permutable(model, _Walk(program, tensors).spaces, tensors))
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
    finally:
        for module, mode in modes:
            module.training = mode
    return Report("permute for 2:4", [_permuted(space) for space in spaces])


def _permutable(model: nn.Module, spaces: _Spaces, tensors: Mapping[str, Tensor]) -> Iterator[_Space]:
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
