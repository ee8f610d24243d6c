"""kernels/epilogue.cuh on every float16 number: y = epilogue(0 W^T + residual), through the operator."""

from __future__ import annotations

import bounds
import pytest
import torch
from torch import Tensor

import sparse24
from sparse24 import ops

EVERY_F16 = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16).view(256, 256)


def finished(residual: Tensor, activation: str = "none", out_dtype: torch.dtype | None = None) -> Tensor:
    tokens, features = residual.shape
    packed = ops.pack(*sparse24.compress(torch.zeros(features, 4, dtype=torch.float16)), in_features=4)
    with sparse24.emulate("sm_80"):
        return ops.linear(
            torch.zeros(tokens, 4, dtype=torch.float16),
            packed,
            residual=residual,
            activation=activation,
            out_dtype=out_dtype,
            out_features=features,
            in_features=4,
            dtype=torch.float16,
        )


@pytest.mark.parametrize("activation", bounds.EXACT)
def test_activation_of_every_float16(activation: str) -> None:
    x = EVERY_F16.double()
    y, exact = finished(EVERY_F16.float(), activation, torch.float32).double(), bounds.EXACT[activation](x)
    finite = x.isfinite()
    error = (y - exact).abs()[finite] / (2**-20 * x.abs()[finite] + 1e-36)
    assert error.max() <= 1, x[finite][error.argmax()]
    assert torch.equal(y[~finite].isnan(), exact[~finite].isnan())
    assert torch.equal(y[~finite].nan_to_num(0), exact[~finite].nan_to_num(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_types_are_read_and_rounded_once(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    """Halfway cases, overflow to Inf, subnormals, NaN; a sum of +0 and -0.0 is +0."""
    residual = (EVERY_F16.float() * 1.0009765).to(dtype)
    y, expected = finished(residual, out_dtype=out_dtype), (residual.float() + 0.0).to(out_dtype)
    known = ~expected.isnan()
    assert torch.equal(y[known].view(torch.uint8), expected[known].view(torch.uint8))
    assert y[~known].isnan().all()
    assert torch.equal(finished(residual[:, :255], out_dtype=out_dtype)[known[:, :255]], y[:, :255][known[:, :255]])
