"""Reports: what a step of the flow did to each layer, why a layer stays dense, what each layer costs."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparse24 import ops
from sparse24.calling import arguments_of, evaluating
from sparse24.conv import SparseConv2d, axis_of
from sparse24.nn import SparseLinear
from sparse24.sparse_module import SparseModule
from sparse24.support import FLOAT_TYPES, INT4, autocast_dtype


@dataclass(frozen=True)
class Outcome:
    """What prune, quantize or convert did to one layer."""

    name: str
    shape: tuple[int, ...]  # of the weight, outputs first
    outcome: str  # "pruned", "quantized", "converted" or "skipped"
    detail: str  # the format it has now, or the reason why it was skipped


@dataclass(frozen=True)
class Cost:
    """What one layer of a model costs, and what runs it."""

    name: str
    shape: tuple[int, ...]  # of the weight, outputs first
    pattern: str  # "2:4", "1:2", "pair 4:8" or "dense"
    dtype: str  # of the weight
    tokens: tuple[int, ...]  # each M, the tokens or pixels of y, that was seen; empty if the layer was never called
    kernel: str  # where it depends on M, what each M runs
    reason: str  # why this kernel
    resident_bytes: int  # parameters and buffers of the layer as it is
    dense_bytes: int  # of a dense layer of this shape in the layer's float type
    expected_gain_at_m1: float | None  # dense bytes / sparse bytes, same dtype; None where the product is dense


Row = TypeVar("Row")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Report(Generic[Row]):
    """Rows of a table, with `str(report)` the table as plain text and `to_dict()` all of it for JSON."""

    title: str
    rows: list[Row]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        if not self.rows:
            return "\n".join([self.title, "no linear layer, no convolution", *self.notes])
        head = [field.name.replace("_", " ") for field in dataclasses.fields(cast(Any, self.rows[0]))]
        table = [head] + [[_cell(value) for value in vars(row).values()] for row in self.rows]
        widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
        table.insert(1, ["-" * width for width in widths])
        lines: list[str] = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table]
        return "\n".join([self.title, *lines, *self.notes])


def _cell(value: Any) -> str:
    if isinstance(value, tuple):
        return str(list(value)) if value else "-"
    if isinstance(value, float):
        return f"{value:.2f}x"
    return f"{value:,}" if isinstance(value, int) else str("-" if value is None else value)


@dataclass(frozen=True)
class Found:
    """A product of a model with a weight; `reason` says why it cannot become a sparse layer, or is empty."""

    name: str
    module: nn.Module
    shape: tuple[int, ...]
    reason: str


def product_layers(model: nn.Module) -> Iterator[Found]:
    """Every nn.Linear, nn.Conv2d and sparse layer, and nn.MultiheadAttention's own weights; each once."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            owners.setdefault(id(parameter), []).append(f"{name}.{key}".lstrip("."))
    read_by_attention = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}

    for name, module in list(model.named_modules()):
        if isinstance(module, SparseModule):
            yield Found(name, module, module._weight_shape(), "it is sparse already")
        elif isinstance(module, nn.MultiheadAttention):
            for key in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
                weight = getattr(module, key)
                if weight is not None:
                    reason = "nn.MultiheadAttention multiplies by it itself: there is no layer to swap"
                    yield Found(f"{name}.{key}".lstrip("."), module, tuple(weight.shape), reason)
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            if id(module) in read_by_attention:
                reason = "nn.MultiheadAttention reads its weight and never calls it"
            else:
                reason = _why_not(module, owners)
            yield Found(name, module, _shape(module), reason)


def _shape(layer: nn.Linear | nn.Conv2d) -> tuple[int, ...]:
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size


def own_parametrizations(layer: nn.Module) -> list[nn.Module]:
    """What sparse24 has put on the weight, in order of application."""
    return [rule for rule in parametrizations(layer) if type(rule).__module__.startswith("sparse24.")]


def parametrizations(layer: nn.Module) -> nn.ModuleList:
    """All that is registered on the weight: a ParametrizationList, empty if there is nothing."""
    if not parametrize.is_parametrized(layer, "weight"):
        return nn.ModuleList()
    return cast(parametrize.ParametrizationList, cast(nn.ModuleDict, layer.parametrizations)["weight"])


def ours_alone(layer: nn.Module) -> bool:
    """Whether all that is registered on the layer, on its weight or elsewhere, is of sparse24."""
    names = cast(nn.ModuleDict, layer.parametrizations).keys() if parametrize.is_parametrized(layer) else ()
    return set(names) <= {"weight"} and len(own_parametrizations(layer)) == len(parametrizations(layer))


def _why_not(layer: nn.Linear | nn.Conv2d, owners: dict[int, list[str]]) -> str:
    rules = parametrizations(layer)
    weight = rules.original if isinstance(rules, parametrize.ParametrizationList) else layer.weight
    names = owners.get(id(weight), [])
    base = nn.Linear if isinstance(layer, nn.Linear) else nn.Conv2d
    if type(layer).forward is not base.forward and not type(layer).forward.__module__.startswith("sparse24."):
        return f"{type(layer).__name__} overrides nn.{base.__name__}.forward"
    if isinstance(layer, nn.Conv2d) and type(layer)._conv_forward is not nn.Conv2d._conv_forward:
        return f"{type(layer).__name__} overrides nn.Conv2d._conv_forward"
    if "forward" in vars(layer):
        return "its forward was replaced on the instance"
    if not ours_alone(layer):
        return "it has a parametrisation of others, which would be lost"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}, not an nn.Parameter"
    if len(names) > 1:
        return f"its weight is tied: {' = '.join(names)}"
    if weight.dtype not in FLOAT_TYPES:
        return f"its weight is {weight.dtype}; float32, float16 and bfloat16 can be sparse"
    if weight.is_meta:
        return "its weight is on the meta device and has no values"
    if weight.numel() == 0:
        return "its weight is empty"
    return axis_of(layer)[1] if isinstance(layer, nn.Conv2d) else ""


def report(model: nn.Module, example_inputs: Any) -> Report[Cost]:
    """What runs each linear layer and convolution of `model`, why, and what it holds.

    example_inputs: what the model is called with, once, in eval mode and without gradients: a Tensor, a tuple of
    positional arguments or a mapping of keyword arguments. The model is left as it was. On CUDA, and under
    sparse24.emulate(), the kernel is named that the table picks for each M, and its splits of K.

    The expected gain is the ratio of weight bytes, dense over sparse in the same dtype: what a product bound by memory
    (M = 1) gains at most. It is arithmetic, not a measurement; products of many tokens are bound by half the
    multiplications, 2x at most.
    """
    layers = list(product_layers(model))
    seen: dict[int, dict[int, tuple[str, str]]] = {id(found.module): {} for found in layers}  # M: kernel, reason

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        outputs = module.out_features if isinstance(module, (nn.Linear, SparseLinear)) else module.out_channels
        tokens = y.numel() // cast(int, outputs) if outputs else 0
        seen[id(module)][tokens] = (
            _choice(module, x, tokens) if isinstance(module, SparseModule) else _masked(module, x)
        )

    called = [found.module for found in layers if not isinstance(found.module, nn.MultiheadAttention)]
    handles = [module.register_forward_hook(record, with_kwargs=True) for module in called]
    arguments, keywords = arguments_of(example_inputs)
    try:
        with evaluating(model):
            model(*arguments, **keywords)
    finally:
        for handle in handles:
            handle.remove()

    rows = [_cost(found, dict(sorted(seen[id(found.module)].items()))) for found in layers]
    total = _bytes(model)
    saved = sum(row.dense_bytes - row.resident_bytes for row in rows if row.pattern != "dense")
    notes = (
        f"whole model: {total:,} bytes resident, {total + saved:,} with every sparse layer dense",
        f"expected gain: dense bytes / sparse bytes of the weight in the same dtype, the most that M = 1 can gain; "
        f"not measured on this machine ({_machine()})",
    )
    return Report("sparse24 report", rows, notes)


def _cost(found: Found, seen: dict[int, tuple[str, str]]) -> Cost:
    layer, tokens = found.module, tuple(seen)
    if not isinstance(layer, SparseModule):
        whole = isinstance(layer, (nn.Linear, nn.Conv2d))
        weight: Tensor = getattr(layer, "weight" if whole else found.name.rpartition(".")[2])
        resident = _bytes(layer) if whole else weight.nbytes
        kernel, reason = (
            _by_tokens({m: choice[i] for m, choice in (seen or {0: _masked(layer)}).items()}) for i in (0, 1)
        )
        dtype, reason = _name(weight.dtype), found.reason or reason
        return Cost(found.name, found.shape, "dense", dtype, tokens, kernel, reason, resident, resident, None)

    weights = math.prod(found.shape)
    dense_bytes = (weights + (found.shape[0] if layer.bias is not None else 0)) * layer.dtype.itemsize
    seen = seen or {0: _choice(layer, None, 0)}
    kernel, reason = (_by_tokens({m: choice[i] for m, choice in seen.items()}) for i in (0, 1))
    gain = None
    if any(choice[0] != "dense" for choice in seen.values()) and layer.packed is not None:
        weight_bytes = 0.5 if layer.weight_dtype is INT4 else layer.weight_dtype.itemsize
        shared = (
            0 if layer.group_size is None or layer.scales is None else layer.scales.nbytes
        )  # a dense one has them too
        gain = (weights * weight_bytes + shared) / (layer.packed.nbytes + shared)
    dtype = _name(layer.weight_dtype) + ("" if layer.group_size is None else f" in groups of {layer.group_size}")
    dtype += ", weights only" if layer.weight_only else ""
    return Cost(found.name, found.shape, layer.pattern, dtype, tokens, kernel, reason, _bytes(layer), dense_bytes, gain)


def _choice(layer: SparseModule, x: Tensor | None, tokens: int) -> tuple[str, str]:
    """The kernel that x runs in the layer, and why; without x as far as that can be said."""
    like = x if x is not None else torch.empty(0, layer._features(), dtype=layer.dtype, device=layer.device)
    assert isinstance(layer, (SparseLinear, SparseConv2d))
    reason = layer._why_dense(like)
    if reason:
        return "dense", f"{reason}; decompressed at every call"
    arch = ops.emulated_arch()
    if isinstance(layer, SparseLinear) and (layer.device.type == "cuda" or (layer.device.type == "cpu" and arch)):
        where = f"emulated {arch}" if arch else str(layer.device)
        if x is None:
            return "sparse linear, by M", f"packed, {where}"
        x = x if layer.weight_dtype is torch.int8 else x.to(layer.dtype)  # as autocast does
        plan = ops.linear_plan(x, out_features=layer.out_features, dtype=layer.weight_dtype)
        return plan, f"packed, {where}"
    if layer.device.type == "cpu":
        if x is None:
            return f"by M, {ops.cpu_isa()}", "packed"
        conv = isinstance(layer, SparseConv2d) and layer.axis == "channels" and not layer._is_one_product(x)
        shape = layer._weight_shape()
        kernel, why = ops.cpu_choice(
            dtype=layer.weight_dtype,
            x_dtype=autocast_dtype("cpu") or layer.dtype,
            tokens=tokens,
            out_features=shape[0] // layer.groups if isinstance(layer, SparseConv2d) else shape[0],
            in_features=math.prod(shape[1:]),
            weight_only=layer.weight_only,
            pattern=layer.pattern,
        )
        if conv and kernel == "dense":
            kernel, why = "sparse", "of convolutions only products of pixels as they lie are handed over to dense ones"
        return f"{kernel}, {ops.cpu_isa()}", f"packed; {why}"
    return "none", f"on the {layer.device.type} device"


def _machine() -> str:
    arch = ops.emulated_arch()
    return f"cpu: {ops.cpu_isa()}" + (f", emulating {arch}" if arch else "")


def _by_tokens(cells: dict[int, str]) -> str:
    """One text for all M where they agree, else one each."""
    if len(set(cells.values())) == 1:
        return next(iter(cells.values()))
    return ", ".join(f"{text} (M = {m})" for m, text in cells.items())


def _masked(layer: nn.Module, x: Tensor | None = None) -> tuple[str, str]:
    """What multiplies in a layer that is not converted, and why."""
    if not (isinstance(layer, (nn.Linear, nn.Conv2d)) and own_parametrizations(layer)):
        return "dense", "not pruned: call prune() and convert()"
    why_dense = getattr(layer, "why_dense", None)  # of MaskedLinear
    if x is None or why_dense is None:
        return "dense", "pruned, not converted: call convert()"
    reason = why_dense(x)
    return ("dense", reason) if reason else ("sparse", "pruned, not converted: compressed at every call")


def _bytes(module: nn.Module) -> int:
    """Bytes of the parameters and buffers of a module, shared ones once."""
    return sum(t.nbytes for t in {id(t): t for t in [*module.parameters(), *module.buffers()]}.values())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def progress(items: Iterable[Item], description: str) -> Iterable[Item]:
    """The items, one after the other, with a bar on the terminal where rich is installed."""
    try:
        from rich.progress import track
    except ImportError:
        return items
    return track(items, description=description, total=len(items) if isinstance(items, Sized) else None)
