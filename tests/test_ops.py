"""The operators as torch sees them: opcheck, gradients, and one table of bad calls for every backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import sparse24
from sparse24 import ops

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
PATTERNS = ["2:4", "1:2", "pair 4:8"]


def random_weight(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(rows, columns, generator=generator).to(dtype)
    low, high = (0, 256) if dtype == torch.uint8 else (-128, 128)
    return torch.randint(low, high, (rows, columns), generator=generator).to(dtype)


def packed_weight(rows: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A packed 2:4 weight and its dense equal."""
    values, meta = ops.prune_compress(random_weight(rows, columns, dtype))
    dense = ops.decompress(values, meta, in_features=columns)
    return ops.pack(values, meta, in_features=columns), dense


# ---- opcheck ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize("columns", [4, 16, 37])
def test_opcheck_format(dtype: torch.dtype, pattern: str, columns: int) -> None:
    weight = random_weight(5, columns, dtype)
    in_features = columns * (2 if dtype == torch.uint8 else 1)
    name = "int4" if dtype == torch.uint8 else str(dtype).removeprefix("torch.")
    torch.library.opcheck(torch.ops.sparse24.prune_mask, (weight, pattern))
    torch.library.opcheck(torch.ops.sparse24.prune_compress, (weight, pattern))
    values, meta = ops.prune_compress(weight, pattern)
    dense = ops.decompress(values, meta, in_features=in_features, pattern=pattern)
    torch.library.opcheck(torch.ops.sparse24.compress, (dense, pattern))
    values.requires_grad_(dtype.is_floating_point)
    torch.library.opcheck(torch.ops.sparse24.decompress, (values, meta, in_features, name, pattern))
    torch.library.opcheck(torch.ops.sparse24.validate, (values.detach(), meta, in_features, name, pattern))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8], ids=str)
@pytest.mark.parametrize("columns", [8, 37])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)], ids=str)
def test_opcheck_linear(dtype: torch.dtype, columns: int, leading: tuple[int, ...]) -> None:
    name = str(dtype).removeprefix("torch.")
    values, meta = ops.prune_compress(random_weight(6, columns, dtype))
    torch.library.opcheck(torch.ops.sparse24.pack, (values, meta, columns, name))
    packed = ops.pack(values, meta, in_features=columns)
    torch.library.opcheck(torch.ops.sparse24.unpack, (packed, 6, columns, name))
    x = torch.randn(*leading, columns)
    bias = torch.randn(6)
    scales = torch.rand(6) if dtype == torch.int8 else None
    arguments = (packed, bias, scales, 6, columns, name)
    torch.library.opcheck(torch.ops.sparse24.linear_inference, (x, *arguments, "gelu"))
    torch.library.opcheck(torch.ops.sparse24.linear, (x.requires_grad_(), *arguments, "none"))


# ---- Gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("in_features", [1, 3, 8, 13])
def test_gradient_of_decompress_is_the_kept_part(pattern: str, in_features: int) -> None:
    values, meta = ops.prune_compress(random_weight(3, in_features, torch.float32), pattern)
    grad = torch.randn(3, in_features)
    values.requires_grad_()
    ops.decompress(values, meta, in_features=in_features, pattern=pattern).backward(grad)
    assert values.grad is not None
    # Where column k of the dense weight comes from slot s, slot s gets the gradient of column k: so decompressing the
    # gradient gives the dense gradient at the kept places and 0 elsewhere.
    ones = torch.ones_like(values).detach()
    columns = ops.columns_of(meta, in_features=in_features, pattern=pattern)
    mask = torch.zeros(3, columns.max() + 1).scatter_(1, columns, ones)[:, :in_features]
    assert torch.equal(ops.decompress(values.grad, meta, in_features=in_features, pattern=pattern), grad * mask)


@pytest.mark.parametrize("activation", list(ops.ACTIVATIONS))
@pytest.mark.parametrize("leading", [(), (5,), (2, 3)], ids=str)
def test_gradients_of_linear_equal_the_dense_ones(activation: str, leading: tuple[int, ...]) -> None:
    packed, dense = packed_weight(10, 12, torch.float32)
    x, bias = torch.randn(*leading, 12, requires_grad=True), torch.randn(10, requires_grad=True)
    x64, bias64 = x.detach().double().requires_grad_(), bias.detach().double().requires_grad_()
    grad = torch.randn(*leading, 10)
    y = ops.linear(x, packed, bias, out_features=10, in_features=12, dtype=torch.float32, activation=activation)
    y.backward(grad)
    reference = ops.ACTIVATIONS[activation](F.linear(x64, dense.double(), bias64))
    reference.backward(grad.double())
    # Ten products and an activation whose slope float32 knows to a few ulps: 2^-20 of the sum of magnitudes.
    scale = grad.abs().double() @ dense.abs().double() + 1
    assert ((x.grad - x64.grad).abs() <= 2**-20 * scale).all()
    assert ((bias.grad - bias64.grad).abs() <= 2**-20 * (grad.abs().reshape(-1, 10).sum(0) + 1)).all()


def test_gradient_passes_an_int8_layer_by_its_dequantised_weight() -> None:
    packed, dense = packed_weight(10, 12, torch.int8)
    scales = torch.rand(10) + 0.5
    x = torch.randn(3, 12, requires_grad=True)
    grad = torch.randn(3, 10)
    ops.linear(x, packed, None, scales, out_features=10, in_features=12, dtype=torch.int8).backward(grad)
    weight = (dense * scales[:, None]).double()
    expected = grad.double() @ weight
    assert ((x.grad - expected).abs() <= 12 * 2**-23 * (grad.abs().double() @ weight.abs())).all()


# ---- Bad calls -------------------------------------------------------------------------------------------------------

VALUES, META = ops.prune_compress(random_weight(6, 16, torch.float32))
PACKED = ops.pack(VALUES, META, in_features=16)
PACKED_I8 = ops.pack(*ops.prune_compress(random_weight(6, 16, torch.int8)), in_features=16)
X, BIAS, SCALES = torch.randn(3, 16), torch.randn(6), torch.rand(6)


def linear(x=X, packed=PACKED, bias=None, scales=None, out=6, k=16, dtype=torch.float32, **options):
    return ops.linear(x, packed, bias, scales, out_features=out, in_features=k, dtype=dtype, **options)


def corrupt(meta: torch.Tensor, row: int, byte: int, value: int) -> torch.Tensor:
    meta = meta.clone()
    meta[row, byte] = value
    return meta


# name: (the call, what the error must say). The same rules hold for tensors without data, where only shapes count.
BAD_CALLS = {
    "weight-dtype": (lambda: ops.compress(torch.zeros(4, 8, dtype=torch.float64)), r"weight must be float32.*float64"),
    "weight-bool": (lambda: ops.prune_mask(torch.zeros(4, 8, dtype=torch.bool)), r"weight must be float32.*bool"),
    "weight-1d": (lambda: ops.compress(torch.zeros(8)), r"weight must be \[N, K\]; got \[8\]"),
    "weight-3d": (lambda: ops.prune_compress(torch.zeros(2, 4, 8)), r"weight must be \[N, K\]; got \[2, 4, 8\]"),
    "pattern": (lambda: ops.compress(torch.zeros(4, 8), "4:2"), r"pattern must be '2:4'.*got '4:2'"),
    "misfit": (
        lambda: ops.compress(torch.tensor([[1.0, 0, 0, 0, 2, 3, 0, 4], [0.0] * 8])),
        r"weight does not fit 2:4: row 0, group 1 \(columns 4 to 7\) is \[2, 3, 0, 4\].*prune",
    ),
    "misfit-1:2": (lambda: ops.compress(torch.tensor([[1.0, 2, 0, 0]]), "1:2"), r"row 0, group 0 .*\[1, 2, 0, 0\]"),
    "misfit-pair": (
        lambda: ops.compress(torch.tensor([[1.0, 0, 1, 0, 1, 0, 0, 0]]), "pair 4:8"),
        r"\[1, 0, 1, 0, 1, 0, 0, 0\], more than two nonzero pairs",
    ),
    "misfit-int4": (
        lambda: ops.compress(torch.tensor([[0x21, 0xF0]], dtype=torch.uint8)),
        r"row 0, group 0 .*\[1, 2, 0, -1\]",
    ),
    "misfit-nan": (
        lambda: ops.compress(torch.tensor([[float("nan"), float("inf"), 0, -1]], dtype=torch.float16)),
        r"\[nan, inf, 0, -1\]",
    ),
    "values-dtype": (
        lambda: ops.decompress(VALUES, META, in_features=16, dtype=torch.int8),
        r"values must be int8 .*got float32",
    ),
    "dtype": (lambda: ops.decompress(VALUES, META, in_features=16, dtype=torch.float64), r"dtype must be .*float64"),
    "values-shape": (
        lambda: ops.decompress(VALUES, META, in_features=20),
        r"values must be \[N, 10\] for in_features = 20; got \[6, 8\]",
    ),
    "meta-shape": (
        lambda: ops.decompress(VALUES, META[:5], in_features=16),
        r"meta must be \[6, 2\] to match values \[6, 8\].*got \[5, 2\]",
    ),
    "meta-dtype": (lambda: ops.decompress(VALUES, META.short(), in_features=16), r"meta must be uint8; got int16"),
    "in_features-negative": (lambda: ops.decompress(VALUES, META, in_features=-4), r"in_features must not be negative"),
    "code-zero": (
        lambda: ops.decompress(VALUES, corrupt(META, 4, 1, 0x40), in_features=16),
        r"meta is corrupt: row 4, group 2 has the code 0, which names columns 0 and 0",
    ),
    "code-decreasing": (
        lambda: ops.validate(VALUES, corrupt(META, 1, 0, 0x14), in_features=16),
        r"meta is corrupt: row 1, group 1 has the code 1",
    ),
    "code-not-1:2": (
        lambda: ops.validate(VALUES, corrupt(META, 0, 0, 0x44), in_features=16, pattern="1:2"),
        r"row 0, group 0 has the code 4.*one of each half",
    ),
    "beyond-k": (
        lambda: ops.validate(torch.ones(1, 2), torch.tensor([[0xE]], dtype=torch.uint8), in_features=3),
        r"values are corrupt: row 0, group 0 .* beyond in_features = 3",
    ),
    "unused-half": (
        lambda: ops.validate(torch.ones(1, 2), torch.tensor([[0x4E]], dtype=torch.uint8), in_features=4),
        r"meta is corrupt: row 0 ends in an unused half byte of 4",
    ),
    "pack-int4": (  # as 2:4 would have it: int4 is packed in pair 4:8
        lambda: ops.pack(torch.zeros(2, 4, dtype=torch.uint8), META[:2], in_features=16),
        r"meta must be \[2, 1\] to match values \[2, 4\] and in_features = 16; got \[2, 2\]",
    ),
    "pack-shape": (lambda: ops.pack(VALUES, META, in_features=12), r"values must be \[N, 6\]"),
    "packed-size": (lambda: linear(packed=PACKED[:-64]), r"packed must be contiguous uint8 \[\d+\] for a \[6, 16\]"),
    "packed-dtype": (lambda: linear(packed=PACKED.view(torch.int8)), r"packed must be .*got int8"),
    "packed-unaligned": (
        lambda: linear(packed=torch.zeros(len(PACKED) + 1, dtype=torch.uint8)[1:]),
        r"packed must start at a multiple of 64 bytes",
    ),
    "packed-of-other-type": (lambda: linear(packed=PACKED_I8), r"packed must be .*\[6, 16\] float32 weight"),
    "unpack-size": (
        lambda: ops.unpack(PACKED, out_features=60, in_features=16, dtype=torch.float32),
        r"packed must be .*\[60, 16\]",
    ),
    "x-features": (lambda: linear(x=X[:, :15]), r"x must be \[\.\.\., 16\] to match weight \[6, 16\]; got \[3, 15\]"),
    "x-scalar": (lambda: linear(x=torch.tensor(1.0)), r"x must be \[\.\.\., 16\].*got \[\]"),
    "x-dtype": (lambda: linear(x=X.double()), r"x must be float32, float16 or bfloat16; got float64"),
    "x-int": (lambda: linear(x=X.int()), r"x must be float32, float16 or bfloat16; got int32"),
    "bias-shape": (lambda: linear(bias=BIAS[:5]), r"bias must be \[6\]; got \[5\]"),
    "bias-dtype": (lambda: linear(bias=BIAS.double()), r"bias must be float32, .*; got float64"),
    "scales-missing": (lambda: linear(packed=PACKED_I8, dtype=torch.int8), r"scales are required for an int8 weight"),
    "scales-unwanted": (lambda: linear(scales=SCALES), r"scales are for int8 and int4 weights alone"),
    "scales-shape": (
        lambda: linear(packed=PACKED_I8, dtype=torch.int8, scales=SCALES[:4]),
        r"scales must be float32 \[6\]; got float32 \[4\]",
    ),
    "scales-dtype": (
        lambda: linear(packed=PACKED_I8, dtype=torch.int8, scales=SCALES.half()),
        r"scales must be float32 \[6\]; got float16",
    ),
    "int8-features": (
        lambda: linear(x=torch.zeros(1, 2**18 + 1), k=2**18 + 1, packed=PACKED_I8, dtype=torch.int8, scales=SCALES),
        r"in_features must be at most 262144 for an int8 weight; got 262145",
    ),
    "packed-int4": (lambda: linear(dtype=torch.int4, scales=SCALES), r"packed must be .*\[6, 16\] int4 weight"),
    "scales-int4": (lambda: linear(dtype=torch.int4), r"scales are required for an int4 weight; got none"),
    "weight-only-float": (
        lambda: linear(weight_only=True),
        r"weight_only is for an int8 or int4 weight; got .* float32",
    ),
    "weight-only-int8-x": (
        lambda: linear(
            x=X.to(torch.int8), packed=PACKED_I8, dtype=torch.int8, scales=SCALES, weight_only=True, x_scales=SCALES[:1]
        ),
        r"x must be of a float dtype with weight_only; got int8",
    ),
    "activation": (lambda: linear(activation="tanh"), r"activation must be .*got 'tanh'"),
    "activation-grad": (
        lambda: linear(x=X.clone().requires_grad_(), activation="tanh"),
        r"activation must be .*'tanh'",
    ),
    "isa": (lambda: ops.force_cpu_isa("avx10").__enter__(), r"isa must be one that this machine runs.*got 'avx10'"),
}


@pytest.mark.parametrize("isa", ["portable", "best"])
@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call(name: str, isa: str) -> None:
    call, message = BAD_CALLS[name]
    with ops.force_cpu_isa(ops.cpu_isa() if isa == "best" else isa):
        with pytest.raises(RuntimeError, match=message):
            call()


# Calls whose shapes alone are wrong are refused without data too: by meta tensors and under torch.compile's fakes.
SHAPE_CALLS = {
    "weight-1d": (lambda d: ops.compress(torch.zeros(8, device=d)), r"weight must be \[N, K\]; got \[8\]"),
    "x-features": (
        lambda d: linear(x=X[:, :15].to(d), packed=PACKED.to(d)),
        r"x must be \[\.\.\., 16\] to match weight \[6, 16\]; got \[3, 15\]",
    ),
    "values-shape": (
        lambda d: ops.decompress(VALUES.to(d), META.to(d), in_features=20),
        r"values must be \[N, 10\] for in_features = 20; got \[6, 8\]",
    ),
    "pack-shape": (lambda d: ops.pack(VALUES.to(d), META.to(d), in_features=12), r"values must be \[N, 6\]"),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", SHAPE_CALLS)
def test_bad_shape_without_data(name: str, device: str) -> None:
    call, message = SHAPE_CALLS[name]
    with pytest.raises(RuntimeError, match=message):
        call(device)


def test_fake_cuda_tensors_have_shapes_on_a_cpu_build() -> None:
    with FakeTensorMode():
        weight = torch.empty(6, 18, dtype=torch.float16, device="cuda")
        values, meta = ops.compress(weight)
        assert (values.shape, meta.shape, values.device.type) == ((6, 10), (6, 3), "cuda")
        dense = ops.decompress(values, meta, in_features=18)
        assert (dense.shape, dense.dtype, dense.device.type) == ((6, 18), torch.float16, "cuda")


def test_public_names_are_the_documented_ones() -> None:
    assert all(getattr(sparse24, name).__doc__ for name in sparse24.__all__)
