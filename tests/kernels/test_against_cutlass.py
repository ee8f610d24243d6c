"""Our kernels against CUTLASS's on the same product, both on the emulator; torch orders the metadata for CUTLASS."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cutlass_problems import problem
from test_linear_kernels import DTYPES, KERNELS, multiply, tokens_of, weight_of
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

OUTPUTS = {"f16": np.float16, "bf16": np.float32, "s8": np.int32}  # of tests/ptx/cutlass/gemms.h


@pytest.mark.parametrize("name", DTYPES)
def test_equal_on_shapes_that_cutlass_accepts(name: str) -> None:
    rows, columns, tokens = 256, 384, 128
    weight, x = weight_of(rows, columns, DTYPES[name]), tokens_of(tokens, columns, DTYPES[name]).contiguous()
    values, metadata = sparse_semi_structured_from_dense_cutlass(weight)

    work = problem(f"sparse_{name}", rows, tokens, columns, beta=0)
    for array, tensor in ((work.a, values), (work.b, x), (work.metadata, metadata)):
        array[:] = tensor.contiguous().view(torch.uint8).flatten().numpy()
    theirs, report = work.run()
    assert report.ok

    theirs = torch.from_numpy(theirs.view(OUTPUTS[name]).reshape(rows, tokens).T)
    for kernel in KERNELS:
        ours, _ = multiply(x, weight, f"linear_{name}_{kernel.tile}")
        assert torch.equal(ours, theirs.to(ours.dtype))  # theirs may be wider: one rounding
