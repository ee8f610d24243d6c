"""What `benchmarks.gpu` compares on one layer: this project's product, dense cuBLAS, and other libraries' 2:4.

Each contender is a function without arguments that makes y = x W^T; `transposed` ones give y^T. What a library cannot
do (a shape, a dtype, this GPU, not installed) is a reason in words instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse24 import ops

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
SPARSE24, CUBLAS = "sparse24", "cuBLAS"


@dataclass
class Contender:
    run: Callable[[], Tensor]
    sparse: bool  # reads W compressed
    transposed: bool = False


@dataclass
class Layer:
    """One 2:4 weight [N, K] of random numbers: dense, compressed and packed for its device."""

    dtype: str
    weight: Tensor
    packed: Tensor

    @staticmethod
    def make(dtype: str, rows: int, columns: int, device: str) -> Layer:
        generator = torch.Generator().manual_seed(0)
        if dtype == "int8":
            full = torch.randint(-127, 128, (rows, columns), generator=generator, dtype=torch.int8)
        else:
            full = torch.randn(rows, columns, generator=generator).to(DTYPES[dtype])
        values, meta = ops.prune_compress(full)
        weight = ops.decompress(values, meta, in_features=columns).to(device)
        packed = ops.pack(values.to(device), meta.to(device), in_features=columns)
        return Layer(dtype, weight, packed)

    def tokens(self, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(count)
        shape = (count, self.weight.shape[1])
        if self.dtype == "int8":
            return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8).to(self.weight.device)
        return torch.randn(shape, generator=generator).to(self.weight)

    def linear(self, x: Tensor) -> Tensor:
        """int8 x and W: the plain sums in int32, as torch._int_mm gives them."""
        rows, columns = self.weight.shape
        out_dtype = torch.int32 if self.dtype == "int8" else None
        sizes = {"out_features": rows, "in_features": columns, "dtype": DTYPES[self.dtype]}
        return ops.linear(x, self.packed, out_dtype=out_dtype, **sizes)


def contenders(layer: Layer, x: Tensor) -> tuple[dict[str, Contender], dict[str, str]]:
    """Those that can run, each tried once, and for the others the reason why not."""
    makers: dict[str, Callable[[], Contender]] = {
        SPARSE24: lambda: Contender(lambda: layer.linear(x), True),
        CUBLAS: lambda: _dense(layer, x),
        "torch CUTLASS": lambda: _semi_structured("SparseSemiStructuredTensorCUTLASS", layer, x),
        "torch cuSPARSELt": lambda: _semi_structured("SparseSemiStructuredTensorCUSPARSELT", layer, x),
        "torch cuSPARSELt, searched": lambda: _searched(layer, x),
        "CuPy cuSPARSELt": lambda: _cupy(layer, x),
    }
    able: dict[str, Contender] = {}
    reasons: dict[str, str] = {}
    for name, make in makers.items():
        try:
            contender = make()
            contender.run()
            if x.is_cuda:
                torch.cuda.synchronize()
            able[name] = contender
        except Exception as error:
            if x.is_cuda:
                torch.cuda.synchronize()  # what broke the device is no mere refusal: this raises again
            reasons[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return able, reasons


def _dense(layer: Layer, x: Tensor) -> Contender:
    if layer.dtype == "int8":
        transposed = layer.weight.t()  # column-major, as int8 wants it
        return Contender(lambda: torch._int_mm(x, transposed), False)
    return Contender(lambda: F.linear(x, layer.weight), False)


def _semi_structured(backend: str, layer: Layer, x: Tensor) -> Contender:
    if layer.dtype == "int8":
        raise RuntimeError("its int8 product has an int8 result; see `searched` for int32")
    sparse: Any = getattr(torch.sparse, backend).from_dense(layer.weight)
    return Contender(lambda: F.linear(x, sparse), True)


def _searched(layer: Layer, x: Tensor) -> Contender:
    """cuSPARSELt's own search among its algorithms, as far as torch passes it on."""
    compressed = torch._cslt_compress(layer.weight)
    options: dict[str, Any] = {"out_dtype": torch.int32} if layer.dtype == "int8" else {}
    algorithm = int(torch._cslt_sparse_mm_search(compressed, x.t(), **options))
    return Contender(lambda: torch._cslt_sparse_mm(compressed, x.t(), alg_id=algorithm, **options), True, True)


def _cupy(layer: Layer, x: Tensor) -> Contender:
    """y^T = W x^T by cuSPARSELt through CuPy's bindings."""
    import cupy
    import numpy as np
    from cupy_backends.cuda.libs import cusparse
    from cupy_backends.cuda.libs import cusparselt as lt

    if layer.dtype == "int8":
        raise RuntimeError("only float types are set up here")
    rows, columns = layer.weight.shape
    count = x.shape[0]
    y = torch.empty(rows, count, dtype=x.dtype, device=x.device)
    kind = {"float16": cupy.cuda.runtime.CUDA_R_16F, "bfloat16": cupy.cuda.runtime.CUDA_R_16BF}[layer.dtype]
    row_major, alignment = cusparse.CUSPARSE_ORDER_ROW, 16
    handle, plan, product, choice = lt.Handle(), lt.MatmulPlan(), lt.MatmulDescriptor(), lt.MatmulAlgSelection()
    w_matrix, x_matrix, y_matrix = lt.MatDescriptor(), lt.MatDescriptor(), lt.MatDescriptor()
    lt.init(handle)
    half = lt.CUSPARSELT_SPARSITY_50_PERCENT
    lt.structuredDescriptorInit(handle, w_matrix, rows, columns, columns, alignment, kind, row_major, half)
    lt.denseDescriptorInit(handle, x_matrix, count, columns, columns, alignment, kind, row_major)
    lt.denseDescriptorInit(handle, y_matrix, rows, count, count, alignment, kind, row_major)
    compute = getattr(lt, "CUSPARSE_COMPUTE_32F", None)  # its name since cuSPARSELt 0.5
    compute = lt.CUSPARSE_COMPUTE_16F if compute is None else compute
    as_it_is, transpose = cusparse.CUSPARSE_OPERATION_NON_TRANSPOSE, cusparse.CUSPARSE_OPERATION_TRANSPOSE
    lt.matmulDescriptorInit(handle, product, as_it_is, transpose, w_matrix, x_matrix, y_matrix, y_matrix, compute)
    lt.matmulAlgSelectionInit(handle, choice, product, lt.CUSPARSELT_MATMUL_ALG_DEFAULT)
    try:
        lt.matmulPlanInit(handle, plan, product, choice)
        workspace_bytes = int(lt.matmulGetWorkspace(handle, plan))
    except TypeError:  # the order of older releases
        workspace_bytes = int(lt.matmulGetWorkspace(handle, choice))
        lt.matmulPlanInit(handle, plan, product, choice, workspace_bytes)
    workspace = torch.empty(max(workspace_bytes, 16), dtype=torch.uint8, device=x.device)
    size: Any = lt.spMMACompressedSize(handle, plan)
    sizes = [int(s) for s in size] if isinstance(size, (tuple, list)) else [int(size)]
    compressed = [torch.empty(max(s, 16), dtype=torch.uint8, device=x.device) for s in sizes]
    lt.spMMACompress(handle, plan, layer.weight.data_ptr(), *(part.data_ptr() for part in compressed))
    one, zero = np.array(1, np.float32), np.array(0, np.float32)
    stream = torch.cuda.current_stream().cuda_stream
    kept = (handle, plan, product, choice, w_matrix, x_matrix, y_matrix, workspace, compressed, one, zero)

    def run() -> Tensor:
        assert kept
        with cupy.cuda.ExternalStream(stream):
            lt.matmul(
                handle,
                plan,
                one.ctypes.data,
                compressed[0].data_ptr(),
                x.data_ptr(),
                zero.ctypes.data,
                y.data_ptr(),
                y.data_ptr(),
                workspace.data_ptr(),
            )
        return y

    return Contender(run, True, True)


# ---- Correctness -----------------------------------------------------------------------------------------------------

CHECKED_TOKENS = 24


def wrong(contender: Contender, layer: Layer, x: Tensor) -> str:
    """Empty where y is right on some tokens, the first and the last among them: exactly for int8, else within
    (K + 8) 2^-23 (|x| |W|^T) and one rounding to the type; twice that for what libraries round on the way."""
    y = contender.run()
    y = y.t() if contender.transposed else y
    count, rows = x.shape[0], layer.weight.shape[0]
    if y.shape != (count, rows):
        return f"shape {list(y.shape)}"
    some = torch.linspace(0, count - 1, min(count, CHECKED_TOKENS)).round().long().to(x.device)
    x64, w64, got = x[some].double(), layer.weight.double(), y[some].double()
    exact = x64 @ w64.t()
    if layer.dtype == "int8":
        bad = got != exact
    else:
        unit = 2**-11 if layer.dtype == "float16" else 2**-8
        bound = (x.shape[1] + 8) * 2**-23 * (x64.abs() @ w64.abs().t()) + 2 * unit * exact.abs() + 2**-24
        bad = ~((got - exact).abs() <= bound)
    if not bad.any():
        return ""
    m, n = (int(i) for i in bad.nonzero()[0])
    return f"{int(bad.sum())} of {bad.numel()} wrong; y[{int(some[m])}, {n}] is {got[m, n]:.6g}, not {exact[m, n]:.6g}"
