"""Which dimensions of which weights must be permuted together, from a graph of torch operators (permutation.py).

Every dimension of every tensor in the graph belongs to a *space*. Operators that this file knows join spaces; whatever
it does not know fixes the order of all that it touches, and so do inputs and outputs.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, fx


class Spaces:
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


class Walk:
    """The spaces of an exported graph, node by node."""

    def __init__(self, program: Any, tensors: Mapping[str, Tensor]) -> None:
        self.spaces = Spaces()
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
