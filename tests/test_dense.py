"""The dense hand-over gives what the sparse kernels give: exactly, on numbers whose sums are exact."""

import pytest
import torch

from sparse24 import ops
from sparse24.registration import pack_int4

_ops = torch.ops.sparse24
ISAS = ["portable", "avx2", "avx512", "avx512_bf16", "amx"]
SHAPES = [(1, 1, 2), (5, 17, 34), (37, 100, 130), (300, 40, 2500), (3, 16, 4100)]  # M, N, K


def product(kernels, x, packed, **operands):
    _ops.force_cpu_kernels(kernels)
    try:
        return ops.linear(x, packed, **operands)
    finally:
        _ops.force_cpu_kernels("")


def weight_of(dtype, n, k):
    if dtype is torch.int4:
        weight = pack_int4(torch.randint(-8, 8, (n, k), dtype=torch.int8))
        return ops.prune_compress(weight, "pair 4:8")
    low, high = (-128, 128) if dtype is torch.int8 else (-3, 4)
    return ops.prune_compress(torch.randint(low, high, (n, k)).to(dtype))


@pytest.fixture(params=ISAS)
def isa(request):
    try:
        with ops.force_cpu_isa(request.param):
            yield request.param
    except RuntimeError:
        pytest.skip(f"this machine has no {request.param}")


@pytest.mark.parametrize("m, n, k", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int4], ids=str)
def test_dense_is_exactly_the_sparse_product(isa, dtype, m, n, k):
    torch.manual_seed(0)
    packed = ops.pack(*weight_of(dtype, n, k), in_features=k)
    operands = {"out_features": n, "in_features": k, "dtype": dtype, "bias": torch.randint(-3, 4, (n,)).float()}
    if dtype in (torch.int8, torch.int4):
        operands["scales"] = torch.rand(n) + 0.1
        x = torch.randn(m, k)
    else:
        x = torch.randint(-4, 5, (m, k)).float()
    operands |= {"activation": "relu", "residual": torch.randint(-3, 4, (m, n)).float()}
    assert torch.equal(product("dense", x, packed, **operands), product("portable", x, packed, **operands))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("m, n, k", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_y_written_in_place_is_exactly_the_sparse_product(isa, dtype, m, n, k, bias):
    """With nothing but a bias after the product, aten writes y: into rows of the panel alone, all others being watched.

    The numbers are small enough for every sum to be exact in bfloat16 as well.
    """
    torch.manual_seed(0)
    weight = torch.zeros(n, k)
    weight[:, torch.randperm(k)[: min(k, 16)]] = 1
    values, meta = ops.prune_compress(weight.to(dtype))
    operands = {"out_features": n, "in_features": k, "dtype": dtype}
    operands["bias"] = torch.randint(-3, 4, (n,)).to(dtype) if bias else None
    x = torch.randint(-4, 5, (m, k)).to(dtype)
    packed = ops.pack(values, meta, in_features=k)
    assert torch.equal(product("dense", x, packed, **operands), product("portable", x, packed, **operands))


def test_no_nan_through_dropped_entries(isa):
    weight = torch.zeros(3, 40)
    weight[:, 1::4] = 1
    packed = ops.pack(*ops.compress(weight), in_features=40)
    x = torch.ones(5, 40)
    x[2, 2::4], x[3, 3::4] = float("inf"), float("nan")
    y = product("dense", x, packed, out_features=3, in_features=40, dtype=torch.float32)
    assert torch.equal(y, torch.full((5, 3), 10.0))


def test_large_integer_sums_are_exact(isa):
    torch.manual_seed(0)
    packed = ops.pack(*ops.prune_compress(torch.randint(100, 128, (20, 8200), dtype=torch.int8)), in_features=8200)
    x = torch.randint(100, 128, (9, 8200), dtype=torch.int8)
    operands = {"out_features": 20, "in_features": 8200, "dtype": torch.int8, "out_dtype": torch.int32}
    assert torch.equal(product("dense", x, packed, **operands), product("portable", x, packed, **operands))
