"""What the machine can do at most, measured in the same run: multiply-adds in registers, and reading memory.

On AVX-512 and AMX by a small program (ceilings.cpp, compiled when it is asked for); elsewhere torch's matrix product
and copy stand in, which come close.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path

import torch

from benchmarks import measure
from sparse24 import ops

# Dense-equivalent over dense: each multiply-add of a nonzero needs one permutation, and three vector operations of such
# a pair of kinds fit into two cycles of Zen 4 (measured), while the multiply-adds of a dense product fit one a cycle.
SPARSE_OVER_DENSE = 1.5

Ceilings = dict[str, float]  # GFLOP/s or GOP/s by type, "memory" in GB/s; "tiles" where those of two types are of AMX


def measured(threads: int) -> Ceilings:
    if ops.cpu_isa().startswith(("avx512", "amx")):
        with tempfile.TemporaryDirectory() as folder:
            program = Path(folder) / "ceilings"
            source = Path(__file__).with_name("ceilings.cpp")
            compiler = os.environ.get("CXX", "c++")
            subprocess.run([compiler, "-O2", "-std=c++20", "-pthread", str(source), "-o", str(program)], check=True)
            printed = subprocess.run([str(program), str(threads)], check=True, capture_output=True, text=True)
            found: Ceilings = json.loads(printed.stdout)
            return found
    torch.set_num_threads(threads)
    a, b = (torch.randn(768, 768) for _ in range(2))
    narrow = {"float32": (a, b), "bfloat16": (a.bfloat16(), b.bfloat16())}
    calls = {name: lambda pair=pair: torch.mm(*pair) for name, pair in narrow.items()}
    calls["int8"] = lambda: torch._int_mm(a.to(torch.int8), b.to(torch.int8))
    rates = {name: 2 * 768**3 / min(times) * 1e-9 for name, times in measure.within(calls, 1.0).items()}
    large = torch.zeros(1 << 26)
    (times,) = measure.within({"memory": large.sum}, 1.0).values()
    return rates | {"memory": large.nbytes / min(times) * 1e-9}


def of(row: dict, ceilings: Ceilings) -> float:
    """GFLOP/s, dense-equivalent, that a linear cell could reach at most: by its products, or by the bytes it moves."""
    return min(products(row["dtype"], ceilings), intensity(row) * ceilings["memory"])


def products(dtype: str, ceilings: Ceilings) -> float:
    """The same by its products alone. A tile has no sparse product."""
    dense = arithmetic(dtype)
    return (1 if "tiles" in ceilings and dense != "float32" else SPARSE_OVER_DENSE) * ceilings[dense]


def arithmetic(dtype: str) -> str:
    """The type in which the products of a weight type are made."""
    if dtype in ("int8", "int4"):
        return "int8"
    return "float32" if dtype in ("float32", "float16") else "bfloat16"


def flops(row: dict) -> float:
    return 2.0 * row["M"] * row["N"] * row["K"]


def intensity(row: dict) -> float:
    """Dense-equivalent operations for each byte of weight, x and y."""
    x_bytes = 4 if row["dtype"] in ("float32", "int8", "int4") else 2
    return flops(row) / (row["weight_bytes"] + x_bytes * row["M"] * (row["K"] + row["N"]))
