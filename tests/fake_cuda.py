"""A CUDA device that is not there: tensors of device cuda:0 whose data lie on the CPU.

What a layer decides and holds on CUDA is tested with it: the moves are torch's own, the kernels are stand-ins. The
packed form here is the CPU's, backwards behind a mark, so that a kernel given the wrong form fails.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from sparse24 import ops

CUDA = torch.device("cuda:0")
_MARK = torch.full((16,), 0x5A, dtype=torch.uint8)
_ops = torch.ops.sparse24


class FakeCuda(TorchDispatchMode):
    """Within the block there is a device cuda:0, in this thread; without autograd, which wants a real one.

    problem: what ops.device_problem says of it; not empty: every operator of sparse24 fails there.
    called: the names of those that ran there.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.problem = ""
        self.called: list[str] = []
        _CudaTensor.machine = self
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)  # set_data would lose the class
        patch.setattr(ops, "device_problem", lambda device, dtype: self.problem)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.to.device:
            with self:
                return func.decompose(*args, **kwargs)
        device = kwargs.get("device")
        on_cuda = any(isinstance(t, _CudaTensor) for t in tree_iter((args, kwargs)))
        if device is not None:
            on_cuda, kwargs = on_cuda or device.type == "cuda", {**kwargs, "device": _host(device)}
        target, (args, kwargs) = args[0] if args else None, tree_map_only(_CudaTensor, _raw, (args, kwargs))
        if on_cuda and func.namespace == "sparse24":
            result = self._kernel(func)(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        if func is torch.ops.aten.copy_.default:
            return target
        leaves = on_cuda if device is None else device.type == "cuda"
        return tree_map_only(Tensor, _CudaTensor, result) if leaves else result

    def _kernel(self, func: Any) -> Callable[..., Any]:
        name = func._schema.name.removeprefix("sparse24::")
        if self.problem:
            raise RuntimeError(f"{name} ran on a device that cannot run it: {self.problem}")
        self.called.append(name)
        return _KERNELS.get(name, func)


def _host(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "cuda" else device


def _raw(tensor: "_CudaTensor") -> Tensor:
    return tensor.raw


class _CudaTensor(Tensor):
    raw: Tensor
    machine: FakeCuda

    @staticmethod
    def __new__(cls, raw: Tensor) -> "_CudaTensor":
        place = {"strides": raw.stride(), "storage_offset": raw.storage_offset()}
        tensor = Tensor._make_wrapper_subclass(cls, raw.shape, dtype=raw.dtype, device=CUDA, **place)
        tensor.raw = raw
        return tensor

    def __reduce_ex__(self, protocol: int) -> Any:
        return Tensor.to, (self.raw, CUDA)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ or func is Tensor.copy_:  # before they dispatch they ask CUDA itself for a guard
            result = func(*tree_map_only(cls, _raw, args))
            return cls(result) if func is Tensor.__getitem__ else args[0]
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls.machine.__torch_dispatch__(func, types, args, kwargs)  # called by another subclass of Tensor


# ---- The kernels


def _pack(values: Tensor, meta: Tensor, in_features: int, dtype: str, group_size: int = 0) -> Tensor:
    assert values.dtype is not torch.float32, "CUDA has no kernel for float32"
    return torch.cat([_MARK, _ops.pack(values, meta, in_features, dtype, group_size).flip(0)])


def _cpu_form(packed: Tensor) -> Tensor:
    assert torch.equal(packed[:16], _MARK), "this packed weight is not of this device"
    aligned = torch.empty(len(packed) - 16 + 64, dtype=torch.uint8)
    aligned = aligned[-aligned.data_ptr() % 64 :][: len(packed) - 16]
    return aligned.copy_(packed[16:].flip(0))


def _unpack(packed: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _ops.unpack(_cpu_form(packed), *arguments)


def _linear(x: Tensor, packed: Tensor, *arguments: Any) -> Tensor:
    return _ops.linear_inference(x, _cpu_form(packed), *arguments)


_KERNELS = {"pack": _pack, "unpack": _unpack, "linear": _linear, "linear_inference": _linear}
