"""chain(model): int8 layers hand int8 on to one another, where everything between them leaves whole numbers whole.

A layer whose activations are rounded by one scale begins by rounding x. Where x comes from another such layer, through
nothing but operators that rounding commutes with, that layer can round: the same numbers, a quarter of the bytes, and
no pass of its own. The model is exported to a graph, which tells what is between.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from sparse24.calling import arguments_of, evaluating
from sparse24.conversion import replace_modules
from sparse24.reporting import Outcome, Report
from sparse24.sparse_module import SparseModule

# With a positive scale, q(f(x)) = f(q(x)) for what only moves numbers, and for relu and max. Not to(): of int8 it makes
# floats that have lost their scale.
COMMUTES = set(
    "relu max_pool2d view reshape flatten unflatten transpose permute contiguous clone alias detach dropout squeeze "
    "unsqueeze slice select expand chunk split split_with_sizes getitem t mT numpy_T movedim pixel_shuffle "
    "pixel_unshuffle constant_pad_nd pad flip roll narrow unbind".split()
)
_PRODUCTS = ("linear_fused", "conv2d")
_FUSED = ("relu", "gelu", "silu")  # activations that a layer can do itself


@dataclass
class _Way:
    """Where what a layer makes goes: the layers that round it, and what is in the way."""

    readers: list[str] = field(default_factory=list)
    obstacles: list[str] = field(default_factory=list)
    fused: list[tuple[str, str]] = field(default_factory=list)  # modules whose activation the layer would do itself


def chain(model: nn.Module, example_inputs: Any) -> Report[Outcome]:
    """Have converted int8 layers hand int8 on where the model allows it, in place.

    Of layers that quantize(activations="max" or "percentile") gave a scale: one whose output reaches nothing but such
    layers, of one and the same scale, through relu, max-pooling, reshapes and the like, rounds it for them. A module
    right after it that does nothing but gelu, silu or relu, and that nothing else uses, becomes part of it, and
    nn.Identity takes its place. What comes out is what came before, to the bit, but for this: GELU and SiLU are then
    the kernels' own, and half precision loses a rounding on the way, either of which may move a number that lies
    between two whole ones by one step; and a NaN is 0 from the rounding on. Layers that hand on int8 have no gradient:
    their biases are frozen, and what would want one through them raises.
    example_inputs: what the model is called with, as for report(). The model is exported with them.
    Returns one row for each layer with a scale: "int8" and where to, or "float" and what is in the way. Raises what
    torch.export raises for a model that it cannot follow.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SparseModule) and module.x_rounding == "tensor"
    }
    ways = _ways(model, layers, example_inputs)
    rows = []
    identities: dict[int, nn.Module] = {}
    for name, layer in layers.items():
        way = ways.get(name, _Way(obstacles=["it is not packed, or the example inputs do not reach it"]))
        scales = {float(x_scale) for reader in way.readers if (x_scale := layers[reader].x_scale) is not None}
        reasons = list(dict.fromkeys(way.obstacles))
        if not reasons and not scales:
            reasons.append("nothing becomes of its output")
        if len(scales) > 1:
            reasons.append(f"{', '.join(dict.fromkeys(way.readers))} round by different scales")
        if not reasons:
            layer.int8_y, layer.y_scale = True, torch.tensor(scales.pop(), device=layer.device)
            if layer.bias is not None:
                layer.bias.requires_grad_(False)
            for module, layer.activation in way.fused:
                identities[id(model.get_submodule(module))] = nn.Identity()
        detail = "; ".join(reasons) if reasons else f"to {', '.join(dict.fromkeys(way.readers))}"
        detail += "".join(f", {module} fused" for module, _ in way.fused if not reasons)
        rows.append(Outcome(name, layer._weight_shape(), "float" if reasons else "int8", detail))
    replace_modules(model, identities)
    return Report("chain int8", rows)


def _ways(model: nn.Module, layers: Mapping[str, SparseModule], example_inputs: Any) -> dict[str, _Way]:
    """By layer, where its output goes."""
    arguments, keywords = arguments_of(example_inputs)
    with evaluating(model):
        graph = torch.export.export(model, arguments, keywords, strict=False).graph

    own: dict[int, int] = {}  # how many operators a module calls itself, under all its names
    for node in graph.nodes:
        if node.op == "call_function":
            caller = id(model.get_submodule(_owner(node)))
            own[caller] = own.get(caller, 0) + 1
    ways: dict[str, _Way] = {}
    for node in graph.nodes:
        owner = _owner(node)
        if _name(node) in _PRODUCTS and owner in layers and _is_ours(node):
            way = ways.setdefault(owner, _Way())
            last = _fusable(node, layers[owner], model, own)
            if last is not None:
                way.fused.append((_owner(last), _activation(last)))
            for reader, obstacle in _followed(node if last is None else last, layers):
                way.readers += [reader] if reader else []
                way.obstacles += [obstacle] if obstacle else []
    for way in ways.values():
        if len(way.fused) > 1:
            way.obstacles.append("it is called more than once, each time before an activation of its own")
    return ways


def _followed(node: fx.Node, layers: Mapping[str, SparseModule]) -> Iterator[tuple[str, str]]:
    """(layer, "") for each that rounds what comes out of a node, ("", what is in the way) for everything else."""
    for user in node.users:
        if user.op == "output":
            yield "", "its output is one of the model's"
        elif _name(user) in ("quantize", *_PRODUCTS) and _is_ours(user) and _owner(user) in layers:
            yield _owner(user), ""  # it rounds x, or is handed int8 already
        elif _name(user) == "_assert_tensor_metadata":
            continue  # export puts one before each to()
        elif _commutes(user):
            yield from _followed(user, layers)
        else:
            owner = _owner(user)
            yield "", f"its output goes to {_name(user)}" + (f" in {owner}" if owner else "")


def _commutes(node: fx.Node) -> bool:
    name = _name(node)
    if name in ("constant_pad_nd", "pad"):
        return node.args[2:] in ((), (0,), ("constant",), ("constant", 0), ("constant", None))
    if name == "dropout":
        return not node.args[2]
    return name in COMMUTES


def _fusable(node: fx.Node, layer: SparseModule, model: nn.Module, own: Mapping[int, int]) -> fx.Node | None:
    """The activation that is all that becomes of a layer's output, and all that its module does, called once."""
    if layer.activation != "none":
        return None
    while len(node.users) == 1:
        (user,) = node.users
        module = model.get_submodule(_owner(user))
        if _name(user) in _FUSED and own.get(id(module)) == 1 and not list(module.children()):
            return user
        if not _commutes(user):
            return None
        node = user
    return None


def _activation(node: fx.Node) -> str:
    """In the words of SparseModule."""
    return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else _name(node)


def _name(node: fx.Node) -> str:
    if node.op != "call_function":
        return node.op
    schema = getattr(node.target, "_schema", None)
    name: str = getattr(node.target, "__name__", "") if schema is None else schema.name.split("::")[1]
    return name.removesuffix("_") if schema is not None else name


def _is_ours(node: fx.Node) -> bool:
    return getattr(node.target, "namespace", "") == "sparse24"


def _owner(node: fx.Node) -> str:
    """The name of the innermost module that a node was called in."""
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else ""
