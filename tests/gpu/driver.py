"""A little of the CUDA driver through ctypes: loads a PTX text and launches its kernels on the GPU.

Nothing but libcuda.so.1 is needed: what the emulator runs, the GPU runs, from the same text.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

LOG_BYTES = 8192
ERROR_LOG_BUFFER, ERROR_LOG_BUFFER_SIZE_BYTES = 5, 6  # CUjit_option


class DriverError(RuntimeError):
    """A call of the driver failed."""


class Driver:
    """The driver with the primary context of a device, which is torch's, current in this thread."""

    def __init__(self, device: int = 0, library: str = "libcuda.so.1") -> None:
        self._cuda = ctypes.CDLL(library)
        self.call("cuInit", 0)
        handle, context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuDeviceGet", ctypes.byref(handle), device)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
        self.call("cuCtxSetCurrent", context)

    def call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._cuda, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(status, ctypes.byref(text))
            raise DriverError(f"{name}: {(text.value or b'unknown error').decode()} ({status})")

    def load(self, text: str) -> ctypes.c_void_p:
        """The module of a PTX text, which the driver compiles. Raises DriverError with the compiler's words."""
        module, log = ctypes.c_void_p(), ctypes.create_string_buffer(LOG_BYTES)
        options = (ctypes.c_int * 2)(ERROR_LOG_BUFFER, ERROR_LOG_BUFFER_SIZE_BYTES)
        values = (ctypes.c_void_p * 2)(ctypes.addressof(log), LOG_BYTES)
        try:
            self.call("cuModuleLoadDataEx", ctypes.byref(module), text.encode() + b"\0", 2, options, values)
        except DriverError as error:
            raise DriverError(f"{error}\n{log.value.decode(errors='replace')}") from None
        return module

    def launch(self, module: ctypes.c_void_p, kernel: str, grid: int, block: int, addresses: Sequence[int]) -> None:
        """Runs a kernel whose parameters are all pointers, to its end."""
        function = ctypes.c_void_p()
        self.call("cuModuleGetFunction", ctypes.byref(function), module, kernel.encode())
        values = [ctypes.c_uint64(address) for address in addresses]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        self.call("cuLaunchKernel", function, grid, 1, 1, block, 1, 1, 0, None, pointers, None)
        self.call("cuCtxSynchronize")

    def run(self, text: str, kernel: str, grid: int, block: int, arrays: Sequence[np.ndarray[Any, Any]]) -> None:
        """Runs a kernel on copies of the arrays in device memory, and copies them back."""
        module, addresses = self.load(text), []
        try:
            for array in arrays:
                address = ctypes.c_uint64()
                self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(array.nbytes))
                addresses.append(address.value)
                self.call("cuMemcpyHtoD_v2", address, ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes))
            self.launch(module, kernel, grid, block, addresses)
            for address, array in zip(addresses, arrays, strict=True):
                size = ctypes.c_size_t(array.nbytes)
                self.call("cuMemcpyDtoH_v2", ctypes.c_void_p(array.ctypes.data), ctypes.c_uint64(address), size)
        finally:
            for address in addresses:
                self._cuda.cuMemFree_v2(ctypes.c_uint64(address))
            self._cuda.cuModuleUnload(module)
