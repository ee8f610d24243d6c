"""What kernels do to memory, counted by the PTX emulator: ours, and CUTLASS's sparse GEMMs (cutlass_tiles.cu).

A product of one block is run twice, with fewer and with more steps of K. What the second does more is the steady state:
the difference of the two has no filling of the pipeline in it and no epilogue.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sparse24
from benchmarks import sass
from sparse24 import ops, ptx

HERE = Path(__file__).parent
SUB_CORES = 4  # of a multiprocessor; each issues a product of its own, and they share one shared memory


@dataclass(frozen=True)
class Counted:
    """Of a launch of one block, and of its steady state for each matrix product of a warp.

    reads, fills: passes over the banks of shared memory, by loads from it and by copies into it.
    conflicts: passes more than the bytes need, in the steady state and in the whole launch.
    sectors, bytes: of global memory in the whole launch.
    """

    threads: int
    shared: int  # dynamic, bytes
    products: int  # in the steady state; 0: then reads, fills and steady_conflicts have no meaning
    reads: float
    fills: float
    steady_conflicts: int
    conflicts: int
    load_sectors: int
    load_bytes: int
    store_sectors: int
    store_bytes: int

    @property
    def shared_cycles(self) -> float:
        """Cycles of shared memory while each sub-core issues one product."""
        return SUB_CORES * (self.reads + self.fills)

    def told(self, static_shared: int) -> dict[str, Any]:
        """As JSON has it; static_shared: bytes that the kernel itself declares."""
        return asdict(self) | {"static_shared": static_shared, "shared_cycles": self.shared_cycles}


def counted(short: ptx.Report, long: ptx.Report) -> Counted:
    """Of two launches that differ in K."""
    before = {(row.line, row.opcode): row for row in short.counters.per_instruction}
    products = long.counters.mma - short.counters.mma
    reads = fills = conflicts = 0
    for row in long.counters.per_instruction:
        earlier = before.get((row.line, row.opcode))
        waves = row.shared_waves - (earlier.shared_waves if earlier else 0)
        conflicts += waves - row.shared_ideal + (earlier.shared_ideal if earlier else 0)
        if row.opcode.startswith(("ldmatrix", "ld")):
            reads += waves
        else:
            fills += waves
    total = {False: [0, 0], True: [0, 0]}  # whether stored: sectors, bytes
    for row in long.counters.per_instruction:
        if row.global_sectors:
            pair = total[row.opcode.startswith(("st", "red", "atom"))]
            pair[0] += row.global_sectors
            pair[1] += row.bytes
    x, y, z = long.block
    return Counted(
        threads=x * y * z,
        shared=long.shared,
        products=products,
        reads=reads / products if products else 0.0,
        fills=fills / products if products else 0.0,
        steady_conflicts=conflicts,
        conflicts=long.counters.shared_waves - long.counters.shared_ideal,
        load_sectors=total[False][0],
        load_bytes=total[False][1],
        store_sectors=total[True][0],
        store_bytes=total[True][1],
    )


# ---- Ours ------------------------------------------------------------------------------------------------------------

TYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "s8": torch.int8}


def linear(kernel: str, module: str = "", text: str = "") -> Counted:
    """Of linear_<type>_<rows>x<tokens>... or linear_few_...; `text` is PTX to run in the place of that module."""
    named = re.fullmatch(r"linear_(few_)?(f16|bf16|s8)_(\d+)x(\d+).*", kernel)
    if named is None:
        raise ValueError(f"kernel must be linear_<type>_<rows>x<tokens>...; got {kernel}")
    few, dtype, rows, tokens = named[1], TYPES[named[2]], int(named[3]), int(named[4])
    steps = (64, 96) if few else (8, 12)  # column blocks; a warp of linear_few takes each eighth
    reports = []
    for count in steps:
        columns = count * 128 // dtype.itemsize
        with sparse24.emulate(
            counters=True, checks=False, linear_kernel=kernel, splits=1, modules={module: text} if text else None
        ) as run:
            _multiply(dtype, tokens, rows, columns)
        (report,) = (report for report in run.reports if report.kernel == kernel)
        reports.append(report)
    return counted(*reports)


def _multiply(dtype: torch.dtype, tokens: int, rows: int, columns: int, x_dtype: torch.dtype | None = None) -> None:
    random = torch.Generator().manual_seed(0)
    weight = torch.randint(-4, 5, (rows, columns), generator=random).to(dtype)
    x = torch.randint(-4, 5, (tokens, columns), generator=random).to(x_dtype or dtype)
    packed = ops.pack(*ops.prune_compress(weight), in_features=columns)
    scales = torch.ones(rows) if dtype == torch.int8 and x.is_floating_point() else None
    out = torch.int32 if x.dtype == torch.int8 else None
    with torch.inference_mode():
        ops.linear(x, packed, None, scales, out_features=rows, in_features=columns, dtype=dtype, out_dtype=out)


def others() -> dict[str, Counted]:
    """Of the kernels around the product, each on whole rows of aligned memory."""
    with sparse24.emulate(counters=True, checks=False, linear_kernel="linear_s8_64x64", splits=2) as run:
        _multiply(torch.int8, 64, 64, 512, torch.float16)
    reports = list(run.reports)
    with sparse24.emulate(counters=True, checks=False, linear_kernel="linear_f16_64x64", splits=2) as run:
        _multiply(torch.float16, 64, 64, 512)
        weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).half()
        ops.decompress(*ops.prune_compress(weight), in_features=512, dtype=torch.float16)
    reports += run.reports
    return {report.kernel: counted(report, report) for report in reports if report.counters.mma == 0}


# ---- CUTLASS's -------------------------------------------------------------------------------------------------------

CUTLASS = [f"{dtype}_{tile}" for dtype in TYPES for tile in ("128x128", "256x128", "128x256")]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32),
        ("shared", ctypes.c_uint32),
        ("argument_bytes", ctypes.c_uint32),
    ]


def cutlass_version() -> str:
    return importlib.metadata.version("nvidia-cutlass")


def _cutlass(suffix: str, *options: str) -> Path:
    package = importlib.util.find_spec("cutlass_library")
    if package is None or package.origin is None:
        raise FileNotFoundError("no CUTLASS headers: pip install --no-deps -r requirements/oracles.txt")
    source = HERE / "cutlass_tiles.cu"
    command = [*options, "-std=c++20", "-w", f"-I{Path(package.origin).parent}/source/include", str(source), "-o"]
    content = [sass.version("nvcc"), cutlass_version(), source.read_text(), *options]
    return sass.kept(suffix, content, lambda path: sass.run([sass.tool("nvcc"), *command, str(path)]))


def cutlass_ptx(kernel: str) -> str:
    """The PTX text of one of CUTLASS."""
    return _cutlass(".ptx", "--ptx", "-arch=compute_80", "-O3", "-lineinfo", f"-DKERNEL={kernel}").read_text()


@functools.cache
def _cutlass_library() -> Callable[..., bool]:
    libraries = Path(sass.tool("nvcc")).resolve().parents[1] / "lib"  # where pip puts them, and its nvcc does not look
    options = ["-shared", "-arch=sm_80", "-O1", "-DNDEBUG", "-Xcompiler=-fPIC", f"-L{libraries}"]
    launch = ctypes.CDLL(str(_cutlass(".so", *options))).cutlass_launch
    launch.restype = ctypes.c_bool
    return launch


def cutlass(kernel: str) -> Counted:
    """Of one of CUTLASS, on one tile."""
    dtype, tile = kernel.split("_")
    m, n = map(int, tile.split("x"))
    module = ptx.load(cutlass_ptx(kernel))
    (name,) = module.kernels
    reports = []
    for steps in (8, 12):
        row = steps * 128  # bytes of B along K
        k = row // TYPES[dtype].itemsize
        arrays = [np.zeros((m, row // 2), np.uint8), np.zeros((n, row), np.uint8)]
        arrays += [np.zeros((m, n), "i1" if dtype == "s8" else "i2"), np.full((m, k // 8), 0x44, np.uint8)]
        buffers = [ptx.Buffer(array) for array in arrays]
        addresses = (ctypes.c_uint64 * 4)(*[buffer.address for buffer in buffers])
        launch = _Launch()
        if not _cutlass_library()(kernel.encode(), m, n, k, addresses, ctypes.byref(launch), None):
            raise RuntimeError(f"cutlass_tiles.cu has no kernel {kernel}")
        arguments = (ctypes.c_uint8 * launch.argument_bytes)()
        _cutlass_library()(kernel.encode(), m, n, k, addresses, ctypes.byref(launch), arguments)
        grid = tuple(launch.grid)
        reports.append(module.launch(name, grid, launch.threads, [bytes(arguments)], launch.shared, "none"))
        for buffer in buffers:
            buffer.free()
    return counted(*reports)
