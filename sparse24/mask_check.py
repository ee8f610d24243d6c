"""check_masks: along which axis each weight of a model or a checkpoint is sparse, and whether that can run."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse24.masks import GROUP_COLUMNS, bad_groups
from sparse24.ops import PATTERNS
from sparse24.reporting import Report
from sparse24.sparse_module import SparseModule

_MASKED = ".parametrizations.weight.original"


@dataclass(frozen=True)
class Found:
    """What the zeros of one weight are.

    zeros: share of the entries, in %.
    along: for each axis along which it fits a pattern, the patterns; of a linear weight [N, K] "in_features" and
    "out_features", of a conv weight [O, C, R, S] "channels" (C at each kernel position), "out_channels" (O at each),
    "C*R*S" (the rows flattened), "R*S*C".
    verdict: what runs, or why nothing does.
    """

    name: str
    shape: tuple[int, ...]
    zeros: str
    along: str
    verdict: str


def check_masks(source: nn.Module | Mapping[str, Any] | str | Path) -> Report[Found]:
    """Tell along which axis each weight of `source` is 2:4, 1:2 or pair 4:8, and whether sparse kernels can run it.

    source: a model (pruned, converted or neither), a state_dict, or a file: safetensors, or what torch.save wrote (read
    with weights_only). Each float or int8 tensor of two dimensions and more is a row; masks of prune() that lie beside
    a weight are applied. Compressed weights of a state_dict are left out: they cannot be anything but sparse. A mask
    whose groups run along the flattened C*R*S of a convolution, across kernel positions, is found and named: no kernel
    for convolutions can run it.
    Raises RuntimeError for a source of another kind, and what the reader raises for a file that cannot be read.
    """
    if isinstance(source, (str, Path)):
        source = _read(Path(source))
    if isinstance(source, nn.Module):
        weights = dict(_of_model(source))
    elif isinstance(source, Mapping):
        weights = dict(_of_state(source))
    else:
        raise RuntimeError(f"source must be a model, a state_dict or a file; got {type(source).__name__}")
    rows = [_found(name, weight) for name, weight in weights.items()]
    return Report("masks", rows)


def _read(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".safetensors":
        import safetensors.torch

        return safetensors.torch.load_file(path)
    state: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _of_model(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, SparseModule):
            yield name, module._detached_weight()
        elif nn.utils.parametrize.is_parametrized(module, "weight"):
            yield name, module.weight.detach()
        for key, parameter in module.named_parameters(recurse=False):
            if not isinstance(module, (SparseModule, nn.utils.parametrize.ParametrizationList)):
                if id(parameter) not in seen and _is_weight(parameter):
                    yield f"{name}.{key}".lstrip(".").removesuffix(".weight"), parameter.detach()
                seen.add(id(parameter))


def _of_state(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for key, tensor in state.items():
        compressed = key.endswith(".values") and key.removesuffix("values") + "meta" in state
        if compressed or not isinstance(tensor, Tensor) or not _is_weight(tensor):
            continue
        mask = state.get(key.replace(_MASKED, ".parametrizations.weight.0.mask")) if key.endswith(_MASKED) else None
        if mask is not None:
            tensor = torch.where(mask, tensor, 0)
        yield key.removesuffix(_MASKED).removesuffix(".weight"), tensor


def _is_weight(tensor: Tensor) -> bool:
    return tensor.dim() >= 2 and tensor.numel() > 0 and (tensor.is_floating_point() or tensor.dtype is torch.int8)


def _axes(weight: Tensor) -> dict[str, Tensor]:
    """The weight as a matrix whose rows are cut into groups, for each way to cut it."""
    if weight.dim() == 2:
        return {"in_features": weight, "out_features": weight.T}
    by_position = weight.flatten(2)  # [O, C, R * S]
    return {
        "channels": by_position.permute(0, 2, 1).flatten(0, 1),
        "out_channels": by_position.permute(1, 2, 0).flatten(0, 1),
        "C*R*S": weight.flatten(1),
        "R*S*C": by_position.permute(0, 2, 1).flatten(1),
    }


def _found(name: str, weight: Tensor) -> Found:
    axes = _axes(weight)
    bad = {axis: {pattern: bad_groups(matrix, pattern) for pattern in PATTERNS} for axis, matrix in axes.items()}
    fits = {  # a row of less than a group would fit whatever it holds
        axis: [name for name, count in bad[axis].items() if count == 0 and matrix.shape[1] >= GROUP_COLUMNS[name]]
        for axis, matrix in axes.items()
    }
    along = "; ".join(f"{axis}: {', '.join(patterns)}" for axis, patterns in fits.items() if patterns)
    zeros = 1 - int((weight != 0).sum()) / weight.numel()
    first = next(iter(axes))  # the axis that kernels take
    if weight.dim() > 2 and weight.shape[1] < 4:
        verdict = "runs as a patch convolution, if its stride is its kernel" if fits["C*R*S"] else "dense"
    elif fits[first]:
        verdict = "runs sparse" + (", its transpose as well" if len(list(axes)) > 1 and fits[list(axes)[1]] else "")
    elif any(fits.values()):
        groups = -(-axes[first].shape[1] // 4) * len(axes[first])
        other = next(axis for axis, patterns in fits.items() if patterns)
        verdict = (
            f"cannot run: sparse along {other}; along {first} {bad[first]['2:4']} of {groups} groups keep too many"
        )
    else:
        verdict = "dense"
    return Found(name, tuple(weight.shape), f"{100 * zeros:.1f} %", along, verdict)
