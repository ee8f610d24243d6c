"""The `weight` of a sparse layer: a tensor to those who look at it, decompressed for those who read it."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sparse24.sparse_module import SparseModule


class SparseWeight(torch.Tensor):
    """The weight of a sparse layer as others see it: shape, dtype and device at no cost; reading its data decompresses.

    Read-only and detached. Being a subclass that handles torch functions, it makes nn.TransformerEncoderLayer leave
    its fused path, which reads weights, and call the layers.
    """

    _layer: "SparseModule"

    @staticmethod
    def __new__(cls, layer: "SparseModule") -> "SparseWeight":
        shape = layer._weight_shape()
        weight: SparseWeight = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=layer.dtype, device=layer.device)
        weight._layer = layer
        return weight

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0]  # so that weight.data.normal_() is refused like weight.normal_()
        if func is Tensor.__setitem__ and isinstance(args[0], SparseWeight):
            raise RuntimeError(READ_ONLY)
        with torch._C.DisableTorchFunctionSubclass():
            if func in _READS_STORAGE:
                args = (args[0].detach(), *args[1:])
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for place, argument in enumerate(func._schema.arguments):
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            if argument.is_write and isinstance(value, SparseWeight):
                raise RuntimeError(READ_ONLY)
        args, kwargs = torch.utils._pytree.tree_map_only(SparseWeight, _decompressed, (args, kwargs))
        return func(*args, **kwargs)


class TracedWeight(torch.Tensor):
    """What SparseWeight is under torch.compile, which cannot trace a wrapper: the dense weight, dropped if unused."""


READ_ONLY = "weight is read-only: load values and meta, or make a new layer by from_dense()"
_READS_STORAGE = (Tensor.numpy, Tensor.tolist, Tensor.__deepcopy__, Tensor.__reduce_ex__)  # these never dispatch


def _decompressed(weight: SparseWeight) -> Tensor:
    return weight._layer._detached_weight()
