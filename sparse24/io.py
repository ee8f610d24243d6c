"""save and load: one safetensors file with a model's canonical state, and which of its layers are sparse.

The file is the state_dict() of the model plus one entry of metadata, "sparse24": a JSON object with
    format_version  1
    layers          of each sparse layer, by name: kind ("linear" or "conv2d"), its sizes and options as the arguments
                    of SparseLinear and SparseConv2d, bias as true or false, dtypes by name, such as "float16"
    aliases         of each entry that is the same tensor as another one: the name under which that is stored
"""

import json
import os
import uuid
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from sparse24.conv import SparseConv2d
from sparse24.conversion import replace_modules
from sparse24.nn import SparseLinear
from sparse24.sparse_module import SparseModule

FORMAT_VERSION = 1
_OPTIONS = ("pattern", "activation", "dtype", "weight_dtype", "weight_only", "x_rounding", "int8_y", "group_size")
_DEFAULTS = {"x_rounding": "token", "int8_y": False, "group_size": None}  # files from before there were such lack them
_SIZES = {
    "linear": ("in_features", "out_features"),
    "conv2d": (
        *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
        "axis",
    ),
}
_CLASSES: dict[str, tuple[type[nn.Module], type[SparseModule]]] = {
    "linear": (nn.Linear, SparseLinear),
    "conv2d": (nn.Conv2d, SparseConv2d),
}


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the state of `model`, of dense and sparse layers alike, to one safetensors file: all of it, or nothing.

    Raises RuntimeError where the state holds anything but tensors with data; ImportError without safetensors.
    """
    safetensors = _safetensors()
    if isinstance(model, SparseModule):
        kind = type(model).__name__
        raise RuntimeError(f"model must hold its layers as children; of a lone {kind}, save state_dict()")
    layers = {
        name: _config(layer)
        for name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, SparseModule)
    }
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}  # the key under which a tensor was met first
    for key, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor) or tensor.is_meta:
            raise RuntimeError(f"the state of a model must be tensors with data; {key} is not")
        storage = tensor.untyped_storage()
        place = (storage.data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and first.setdefault(place, key) != key:
            aliases[key] = first[place]
        else:  # safetensors refuses views of a larger storage
            whole = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes
            tensors[key] = tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
    header = {"format_version": FORMAT_VERSION, "layers": layers, "aliases": aliases}

    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        safetensors.torch.save_file(tensors, temporary, metadata={"sparse24": json.dumps(header)})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Load a file of save() into a freshly built `model`, in place; returns the model.

    Its layers that the file calls sparse, dense so far, become packed sparse layers; all other state must be in the
    file, no more and no less, with the shapes and dtypes of the model. A model on the meta device takes the tensors of
    the file, on the CPU; else they are copied, and the sparse layers go to the devices of the dense ones.
    Raises RuntimeError, with the model untouched, for a file that is damaged, not of save(), of another version, or not
    of this model; ImportError without safetensors.
    """
    layers, state = _read(path)
    prefixes = tuple(name + "." for name in layers)
    expected = {k: t for k, t in model.state_dict(keep_vars=True).items() if not k.startswith(prefixes)}
    rest = {k: t for k, t in state.items() if not k.startswith(prefixes)}
    problems = list(_mismatches(model, expected, rest, prefixes))
    replacements: dict[int, nn.Module] = {}
    for name, config in layers.items():
        try:
            dense = model.get_submodule(name)
            if id(dense) not in replacements:
                replacements[id(dense)] = _sparse_layer(name, dense, config, state)
        except (RuntimeError, AttributeError) as error:
            problems.append(f"layer {name}: {error}")
    if problems:
        raise RuntimeError("\n    ".join([f"{path} does not fit the model:", *problems]))

    replace_modules(model, replacements)
    assign = any(tensor.is_meta for tensor in expected.values())
    if assign:  # one new tensor for one old one: weights that the model ties stay tied
        new = {id(old): _like(old, rest[key]) for key, old in expected.items()}
        rest = {key: new[id(old)] for key, old in expected.items()}
    model.load_state_dict(rest, strict=False, assign=assign)
    return model


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """The layers and the whole state of a file, its aliases resolved."""
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict
    except safetensors.SafetensorError as error:
        raise RuntimeError(f"{path} is not a whole safetensors file: {error}") from error
    if "sparse24" not in metadata:
        raise RuntimeError(f"{path} is a safetensors file, but not one of sparse24.save")
    try:
        header = json.loads(metadata["sparse24"])
        version = header["format_version"]
        if version != FORMAT_VERSION:
            raise RuntimeError(f"{path} has format version {version}; this sparse24 reads {FORMAT_VERSION}")
        layers = {
            str(name): {field: config[field] for field in ("kind", "bias", *_SIZES[config["kind"]], *_OPTIONS)}
            for name, config in ((name, _DEFAULTS | config) for name, config in header["layers"].items())
        }
        state |= {alias: state[key] for alias, key in header["aliases"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RuntimeError(f"{path} has a damaged sparse24 header: {error!r}") from error
    return layers, state


def _mismatches(
    model: nn.Module, expected: dict[str, Tensor], rest: dict[str, Tensor], prefixes: tuple[str, ...]
) -> list[str]:
    """What keeps the dense state of a file from filling the model."""
    problems = [f"{key} is in the model and not in the file" for key in expected.keys() - rest.keys()]
    problems += [f"{key} is in the file and not in the model" for key in rest.keys() - expected.keys()]
    for key in expected.keys() & rest.keys():
        old, new = expected[key], rest[key]
        if old.shape != new.shape or (old.dtype is not new.dtype and not old.is_meta):
            was = f"{list(old.shape)} {old.dtype}"
            problems.append(f"{key} is {was} in the model and {list(new.shape)} {new.dtype} in the file")
    for key, buffer in model.named_buffers(remove_duplicate=False):
        if buffer.is_meta and key not in expected and not key.startswith(prefixes):
            problems.append(f"{key} is a buffer on the meta device that no file has: build the model on a real device")
    return sorted(problems)


def _config(layer: SparseModule) -> dict[str, Any]:
    kind = next(kind for kind, (_, sparse) in _CLASSES.items() if isinstance(layer, sparse))
    fields = {field: _plain(getattr(layer, field)) for field in (*_SIZES[kind], *_OPTIONS)}
    return {"kind": kind, "bias": layer.bias is not None} | fields


def _sparse_layer(name: str, dense: nn.Module, config: dict[str, Any], state: dict[str, Tensor]) -> SparseModule:
    """The layer that the file describes, to stand where `dense` stands."""
    kind, options = config["kind"], {field: value for field, value in config.items() if field != "kind"}
    plain_class, sparse_class = _CLASSES[kind]
    if not isinstance(dense, (plain_class, sparse_class)):
        raise RuntimeError(f"it is {type(dense).__name__} in the model and {kind} in the file")
    sizes = [field for field in _SIZES[kind] if field != "axis"]
    ours = [_listed(getattr(dense, field)) for field in sizes] + [dense.bias is not None]
    theirs = [_listed(config[field]) for field in sizes] + [config["bias"]]
    if ours != theirs:
        names = ", ".join([*sizes, "bias"])
        raise RuntimeError(f"({names}) is {tuple(ours)} in the model and {tuple(theirs)} in the file")
    options |= {field: _dtype(config[field]) for field in ("dtype", "weight_dtype")}
    layer = sparse_class(**options, device="meta")
    missing: list[str] = []
    unexpected: list[str] = []
    problems: list[str] = []
    assign = {"assign_to_params_buffers": True}
    layer._load_from_state_dict(state, name + ".", assign, True, missing, unexpected, problems)
    problems += [f"{key} is missing" for key in missing] + [f"{key} is not of this layer" for key in unexpected]
    if problems:
        raise RuntimeError("; ".join(problems))
    if layer.bias is not None and isinstance(dense.bias, Tensor):
        layer.bias.requires_grad_(dense.bias.requires_grad)
    weight = dense.weight
    assert isinstance(weight, Tensor)
    return layer.pack() if weight.device.type == "meta" else layer.to(weight.device).pack()


def _listed(value: Any) -> Any:
    """As JSON has it: lists for tuples."""
    return list(value) if isinstance(value, tuple) else value


def _like(old: Tensor, new: Tensor) -> Tensor:
    new = new if old.is_meta else new.to(old.device)
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


def _plain(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _dtype(name: Any) -> torch.dtype:
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype):
        raise RuntimeError(f"{name!r} is not a dtype")
    return dtype


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("sparse24.save and load need safetensors: pip install 'sparse24[io]'") from error
    return safetensors
