"""Problems for CUTLASS's kernels: inputs, launches and expected results by its own host code (cutlass/host.cu)."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import oracles

import sparse24.ptx


class Shape(ctypes.Structure):
    _fields_ = [("m", ctypes.c_int32), ("n", ctypes.c_int32), ("k", ctypes.c_int32)]


class Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("a", "b", "c", "metadata")]


class Tensors(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("a", "b", "c", "d", "metadata")]


class LaunchShape(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32),
        ("shared", ctypes.c_uint32),
        ("argument_bytes", ctypes.c_uint32),
    ]


@functools.cache
def host() -> ctypes.CDLL:
    library = ctypes.CDLL(str(oracles.cutlass_host()))
    for function in (library.cutlass_sizes, library.cutlass_make, library.cutlass_launch):
        function.restype = ctypes.c_bool
    return library


@dataclass
class Problem:
    """The tensors of one product as bytes, and what CUTLASS's reference makes of them."""

    gemm: str
    shape: Shape
    alpha: int
    beta: int
    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    metadata: np.ndarray
    expected: np.ndarray

    def run(
        self, text: str | None = None, align: int = 0, accepted: bool = True, **options: Any
    ) -> tuple[np.ndarray, sparse24.ptx.Report]:
        """D and the report of a launch of the kernel, or of `text` in its place.

        align: of the tensors' addresses, by default the least that CUTLASS takes; accepted: whether it says that the
            kernel takes this problem.
        """
        module = sparse24.ptx.load(text or oracles.cutlass_kernel(self.gemm))
        (kernel,) = module.kernels
        # It wants of an address what it wants of a stride, for which 32 elements of four bits are 16 bytes.
        align = align or (32 if self.gemm == "sparse_s4" else 16)
        d = np.full_like(self.c, 0xA5)
        buffers = [sparse24.ptx.Buffer(x, align) for x in (self.a, self.b, self.c)]
        buffers.append(sparse24.ptx.Buffer(d, initialized=False))
        buffers.append(sparse24.ptx.Buffer(self.metadata))
        addresses = Tensors(*[buffer.address for buffer in buffers])
        name, arguments = self.gemm.encode(), (self.shape, self.alpha, self.beta, addresses)
        launch = LaunchShape()
        assert host().cutlass_launch(name, *arguments, ctypes.byref(launch), None) == accepted
        params = (ctypes.c_uint8 * launch.argument_bytes)()
        host().cutlass_launch(name, *arguments, ctypes.byref(launch), params)
        report = module.launch(
            kernel, tuple(launch.grid), launch.threads, [bytes(params)], shared=launch.shared, **options
        )
        for buffer in buffers:
            buffer.free()
        return d, report


@functools.cache
def problem(gemm: str, m: int, n: int, k: int, alpha: int = 1, beta: int = 1, seed: int = 0) -> Problem:
    shape, sizes = Shape(m, n, k), Sizes()
    assert host().cutlass_sizes(gemm.encode(), shape, ctypes.byref(sizes))
    arrays = [np.zeros(size, np.uint8) for size in (sizes.a, sizes.b, sizes.c, max(16, sizes.metadata), sizes.c)]
    a, b, c, metadata, d = arrays
    tensors = Tensors(*[x.ctypes.data for x in (a, b, c, d, metadata)])
    assert host().cutlass_make(gemm.encode(), shape, seed, alpha, beta, tensors)
    return Problem(gemm, shape, alpha, beta, a, b, c, metadata, d)
