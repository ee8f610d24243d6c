"""Scales of groups of columns, and int4 in 2:4: training computes what runs, on every instruction set."""

import copy
import pickle
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparse24
from sparse24 import SparseConv2d, SparseLinear, ops, rounding
from sparse24.quantization import FakeQuantize, fake_quantization
from sparse24.rounding import LEVELS, quantize_rows
from sparse24.sparse_module import SparseModule
from tests.bounds import assert_linear
from tests.fake_cuda import CUDA, FakeCuda

INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
PATTERNS = {torch.int8: "2:4", INT4: "pair 4:8"}
ALL_ISAS = ["portable", "avx2", "avx512", "avx512_bf16", "amx"]
ISAS = ALL_ISAS[: ALL_ISAS.index(ops.cpu_isa()) + 1] if ops.cpu_isa() in ALL_ISAS else [ops.cpu_isa(), "portable"]
KERNELS = ("", "perm", "amx", "portable", "dense")
LAYERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "less than a group": (lambda: nn.Linear(50, 21), 64),
    "whole groups": (lambda: nn.Linear(256, 16), 128),
    "a short last group": (lambda: nn.Linear(330, 35), 64),
    "wide groups": (lambda: nn.Linear(2500, 9, bias=False), 1216),  # more products than one exact sum of float32 takes
    "patch": (lambda: nn.Conv2d(3, 9, 8, stride=8), 64),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)
every_dtype = pytest.mark.parametrize("dtype", PATTERNS, ids=str)
every_scale = pytest.mark.parametrize("activations", ["token", "max"])


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Any:
    with ops.force_cpu_isa(request.param):
        yield request.param


def inputs(layer: nn.Module, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if isinstance(layer, nn.Conv2d):
        return torch.randn(5, layer.in_channels, 17, 24, generator=generator)
    return torch.randn(7, 5, layer.in_features, generator=generator)


def uneven(layer: nn.Module) -> nn.Module:
    """The layer with columns of very different sizes, so that scales of groups are told from those of outputs."""
    with torch.no_grad():
        matrix = layer.weight.view(len(layer.weight), -1)
        matrix *= torch.linspace(-4, 3, matrix.shape[1]).exp2()
    return layer


def quantised(
    kind: str,
    dtype: torch.dtype,
    activations: str = "token",
    float_dtype: torch.dtype = torch.float32,
    learn: bool = False,
) -> nn.Sequential:
    torch.manual_seed(0)
    make, size = LAYERS[kind]
    model = nn.Sequential(uneven(make())).to(float_dtype)
    sparse24.prune(model, PATTERNS[dtype])
    calibration = None if activations == "token" else [inputs(model[0], seed).to(float_dtype) for seed in (1, 2)]
    options = {"group_size": size, "activations": activations, "calibration": calibration, "learn_scales": learn}
    report = sparse24.quantize(model, dtype, **options)
    assert report.rows[0].outcome == "quantized", report
    return model


def on_all_kernels(run: Callable[[], Tensor]) -> dict[str, Tensor]:
    """What comes of every family of kernels that there is for it, on every instruction set."""
    found = {}
    for isa in ISAS:
        with ops.force_cpu_isa(isa):
            for kernels in KERNELS:
                try:
                    with ops.force_cpu_kernels(kernels):
                        found[f"{isa} {kernels}"] = run()
                except RuntimeError as error:
                    if "do not exist" not in str(error):
                        raise
    assert len(found) >= 3 * len(ISAS) - 1
    return found


# ---- Exactness -------------------------------------------------------------------------------------------------------


@every_layer
@every_dtype
@every_scale
@pytest.mark.parametrize("learn", [False, True], ids=["observed", "learnt"])
@pytest.mark.parametrize("float_dtype", FLOATS, ids=str)
def test_training_computes_what_the_integer_layer_does(kind, dtype, activations, learn, float_dtype):
    model = quantised(kind, dtype, activations, float_dtype, learn)
    rule, size = fake_quantization(model[0]), LAYERS[kind][1]
    columns = model[0].weight[0].numel()
    if learn:  # no longer where they began
        with torch.no_grad():
            assert rule.scales.shape == (-(-columns // size), len(model[0].weight))
            rule.scales.mul_(torch.linspace(-1.1, 0.7, rule.scales.numel()).view_as(rule.scales))
    x = inputs(model[0], seed=5).to(float_dtype)
    fake, weight = model(x).detach(), model[0].weight.detach().clone()
    report = sparse24.convert(model)
    assert report.rows[0].outcome == "converted" and f"in groups of {size}" in report.rows[0].detail
    layer = model[0]
    assert isinstance(layer, SparseModule) and layer.group_size == size
    with torch.no_grad():
        assert torch.equal(layer._dense_weight().to(float_dtype), weight)
        for kernels, y in on_all_kernels(lambda: layer(x)).items():
            assert torch.equal(y, fake), kernels
        if kind != "patch" or activations == "token":
            with sparse24.emulate("sm_80"):
                assert torch.equal(layer(x), fake)
        assert torch.equal(layer.unpack()(x), fake)


@every_dtype
@every_scale
@pytest.mark.parametrize("kind", ["a short last group", "wide groups"])
def test_whole_numbers_are_those_of_numpy(dtype, activations, kind):
    """By arithmetic that shares no line with the package: sums of int64 a group, float32 operations one by one."""
    model = quantised(kind, dtype, activations)
    layer, size = model[0], LAYERS[kind][1]
    mask, rule = layer.parametrizations.weight[0].mask, fake_quantization(layer)
    weight = np.where(mask.numpy(), layer.parametrizations.weight.original.detach().numpy(), np.float32(0))
    weight[3, size:] = 0  # groups of zeros
    with torch.no_grad():
        layer.parametrizations.weight.original[3, size:] = 0
    x = inputs(layer, seed=5)
    x[0, 0] = 0
    x[1, 1] *= 1e-38  # subnormal
    x[2, 2] *= 1e30
    y = model(x).detach().numpy().reshape(-1, len(weight))
    rows = x.numpy().reshape(-1, weight.shape[1])

    amax = np.abs(rows).max(1, keepdims=True)
    x_scale = amax / np.float32(127) if rule.x_scale is None else np.full_like(amax, rule.x_scale)
    x_scale[x_scale == 0] = 1
    q_x = np.clip(np.rint(rows / x_scale), -127, 127).astype(np.int64)
    total = np.zeros_like(y)
    scales = []
    for begin in range(0, weight.shape[1], size):
        part = weight[:, begin : begin + size]
        scale = np.abs(part).max(1) / np.float32(LEVELS[dtype])
        scale[scale == 0] = 1
        q = np.clip(np.rint(part / scale[:, None]), -LEVELS[dtype], LEVELS[dtype]).astype(np.int64)
        total = total + (q_x[:, begin : begin + size] @ q.T).astype(np.float32) * scale
        scales.append(scale)
    expected = total * x_scale
    if layer.bias is not None:
        expected = expected + layer.bias.detach().numpy()
    assert expected.dtype == np.float32 and (y == expected).all()
    sparse24.convert(model)
    assert (model[0].scales.numpy() == np.stack(scales)).all()
    with torch.no_grad():
        for kernels, found in on_all_kernels(lambda: model(x)).items():
            assert (found.numpy().reshape(y.shape) == expected).all(), kernels


@every_scale
def test_activations_at_the_edges(activations):
    model = quantised("a short last group", torch.int8, activations)
    x = inputs(model[0], seed=5).flatten(0, 1)[:8]
    x[0] = 0
    x[1] = -0.0
    x[2] *= 1e-39
    x[3] *= 1e30  # saturates
    x[4, 5] = float("inf")
    x[5, 70] = -float("inf")
    x[6, 329] = float("nan")
    fake = model(x).detach()
    sparse24.convert(model)
    with torch.no_grad():
        for kernels, y in on_all_kernels(lambda: model(x)).items():
            assert torch.equal(y.nan_to_num(12345.0), fake.nan_to_num(12345.0)), kernels
            assert y[:4].isfinite().all() and (y[4:7].isnan().all() if activations == "token" else y.isfinite().all())


def test_x_of_any_strides():
    model = quantised("a short last group", torch.int8)
    sparse24.convert(model)
    wide = torch.randn(9, 4, 331, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for x in (wide[:, :, 1:], wide[::2, 1, :330], wide[:, :, :330].transpose(0, 1), wide[:0, :, :330]):
            assert torch.equal(model(x), model(x.contiguous()))


# ---- Weight-only, by the op ------------------------------------------------------------------------------------------


class Weight:
    """Random whole numbers in a pattern, and float32 scales of groups."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, pattern: str, size: int | None, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        limit = LEVELS[dtype]
        dense = torch.randint(-limit, limit + 1, (rows, columns), dtype=torch.int8, generator=generator)
        dense = torch.where(ops.prune_mask(dense, pattern), dense, 0)
        self.dense = dense
        self.values, self.meta = ops.compress(ops.pack_int4(dense) if dtype is INT4 else dense, pattern)
        self.sharing = {"pattern": pattern, "group_size": size}
        self.sizes = {"out_features": rows, "in_features": columns, "dtype": dtype}
        self.packed = ops.pack(self.values, self.meta, in_features=columns, **self.sharing)
        groups = 1 if size is None else max(1, -(-columns // size))
        self.scales = torch.rand((groups, rows), generator=generator) + 0.1
        if size is None:
            self.scales = self.scales[0]
        each = self.scales.view(groups, rows).T.repeat_interleave(size or max(columns, 1), 1)[:, :columns]
        self.weight = dense.double() * each.double()

    def linear(self, x: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
        return ops.linear(x, self.packed, bias, self.scales, **self.sizes, **self.sharing, **options)


KINDS = [(torch.int8, "2:4"), (INT4, "pair 4:8"), (INT4, "2:4")]
every_kind = pytest.mark.parametrize("dtype, pattern", KINDS, ids=["int8", "int4 pairs", "int4 2:4"])
SHAPES = [(1, 16, 64, 64), (3, 17, 90, 64), (9, 40, 130, 128), (29, 33, 300, 64), (31, 35, 1300, 1088), (2, 5, 7, 64)]


@every_kind
@pytest.mark.parametrize("x_dtype", FLOATS, ids=str)
def test_weight_only(dtype, pattern, x_dtype):
    """Exact on whole numbers and scales that are powers of two; within the bound of a float product elsewhere."""
    for tokens, rows, columns, size in SHAPES:
        weight = Weight(rows, columns, dtype, pattern, size)
        generator = torch.Generator().manual_seed(1)
        bias = torch.randn(rows, generator=generator).to(x_dtype)
        x = torch.randn(tokens, columns, generator=generator).to(x_dtype)
        for activation in ("none", "gelu"):
            options = {"activation": activation, "weight_only": True}
            for y in on_all_kernels(lambda w=weight, x=x, b=bias, o=options: w.linear(x, b, **o)).values():
                assert_linear(y, x, weight.weight, bias, activation)
        weight.scales = torch.exp2(torch.randint(0, 3, weight.scales.shape, generator=generator).float())
        whole = torch.randint(-3, 4, (tokens, columns), generator=generator).to(x_dtype)
        total = torch.zeros(tokens, rows, dtype=torch.float64)
        for group, begin in enumerate(range(0, columns, size)):
            part = slice(begin, begin + size)
            total += F.linear(whole[:, part].double(), weight.dense[:, part].double()) * weight.scales[group].double()
        run = on_all_kernels(lambda w=weight, x=whole: w.linear(x, weight_only=True))
        for kernels, y in run.items():
            assert torch.equal(y, total.to(x_dtype)), kernels


@pytest.mark.parametrize("size", [None, 64, 128])
@pytest.mark.parametrize("x_dtype", FLOATS, ids=str)
def test_int4_in_2_4_is_the_int8_product_of_the_same_numbers(isa, x_dtype, size):
    for tokens, rows, columns in [(1, 16, 64), (2, 20, 70), (30, 33, 333)]:
        four = Weight(rows, columns, INT4, "2:4", size)
        eight = Weight(rows, columns, torch.int8, "2:4", size)
        values, meta = ops.compress(four.dense)
        eight.packed = ops.pack(values, meta, in_features=columns, group_size=size)
        eight.scales = four.scales
        x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1)).to(x_dtype)
        y, other = (one.linear(x, weight_only=True, out_dtype=torch.float32) for one in (four, eight))
        size_of = F.linear(x.double().abs(), four.weight.abs())
        assert ((y - other).double().abs() <= 2 * (columns + 2) * 2**-24 * size_of).all()
        whole = x.sign() * 2
        assert torch.equal(four.linear(whole, weight_only=True), eight.linear(whole, weight_only=True))


@pytest.mark.parametrize("columns", [1, 4, 7, 64, 130, 333])
@pytest.mark.parametrize("rows", [0, 1, 17])
@every_kind
def test_packing_is_exact(rows, columns, dtype, pattern):
    for size in (None, 64, 128):
        weight = Weight(rows, columns, dtype, pattern, size)
        back = ops.unpack(weight.packed, **weight.sizes, **weight.sharing)
        assert torch.equal(back[0], weight.values) and torch.equal(back[1], weight.meta)


def test_bytes_of_the_packed_form():
    def bytes_of(dtype: torch.dtype, pattern: str, size: int | None) -> float:
        return (len(Weight(32, 512, dtype, pattern, size).packed) - 64) / (32 * 512)

    assert bytes_of(INT4, "2:4", None) == bytes_of(INT4, "2:4", 64) == 0.375  # no sums of W: x is not rounded
    assert bytes_of(torch.int8, "2:4", 128) == 0.625 + 4 / 128
    assert bytes_of(INT4, "pair 4:8", 64) == 0.3125 + 4 / 64


def test_int8_x_and_y():
    """x rounded already, y rounded by y_scale, with bias and residual: the whole epilogue, in its order."""
    weight = Weight(35, 200, torch.int8, "2:4", 64)
    generator = torch.Generator().manual_seed(4)
    x = torch.randint(-128, 128, (21, 200), dtype=torch.int8, generator=generator)
    x_scales = torch.rand(21, generator=generator) + 0.1
    bias, residual = torch.randn(35, generator=generator), torch.randn(21, 35, generator=generator)
    total = torch.zeros(21, 35)
    for group, begin in enumerate(range(0, 200, 64)):
        part = slice(begin, begin + 64)
        total = total + F.linear(x[:, part].double(), weight.dense[:, part].double()).float() * weight.scales[group]
    expected = F.relu(total * x_scales[:, None] + bias + residual)
    y_scale = expected.max() / 100
    options = {"x_scales": x_scales, "residual": residual, "activation": "relu"}
    for kernels, y in on_all_kernels(lambda: weight.linear(x, bias, out_dtype=torch.float32, **options)).items():
        assert torch.equal(y, expected), kernels
    rounded = torch.round(expected / y_scale).clamp(-127, 127).to(torch.int8)
    for kernels, y in on_all_kernels(
        lambda: weight.linear(x, bias, out_dtype=torch.int8, y_scale=y_scale, **options)
    ).items():
        assert torch.equal(y, rounded), kernels


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropped_columns_take_no_part(x_dtype):
    for dtype, pattern in KINDS:
        weight = Weight(20, 130, dtype, pattern, 64)
        weight.scales = weight.scales.sign()
        x = torch.randint(-3, 4, (18, 130)).to(x_dtype)
        expected = weight.linear(x, weight_only=True)
        kept = ops.decompress(
            torch.ones_like(weight.values) if dtype is torch.int8 else torch.full_like(weight.values, 0x11),
            weight.meta,
            in_features=132 if pattern == "2:4" else 136,
            dtype=dtype,
            pattern=pattern,
        )
        kept = ops.unpack_int4(kept) if dtype is INT4 else kept
        for row in (0, 7, 19):
            spoilt = torch.where(kept[row, :130] != 0, x, torch.inf)
            run = on_all_kernels(lambda w=weight, x=spoilt: w.linear(x, weight_only=True))
            for kernels, y in run.items():
                assert torch.equal(y[:, row], expected[:, row]), kernels


Z = torch.zeros
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "not a multiple": (
        lambda: ops.pack(*ops.compress(Z(4, 96, dtype=torch.int8)), in_features=96, group_size=48),
        "group_size must be a positive multiple of 64, or None; got 48",
    ),
    "negative": (
        lambda: ops.pack(*ops.compress(Z(4, 96, dtype=torch.int8)), in_features=96, group_size=-64),
        "group_size must be a positive multiple of 64, or None; got -64",
    ),
    "of floats": (
        lambda: ops.pack(*ops.compress(Z(4, 96)), in_features=96, group_size=64),
        "group_size is for an int8 or int4 weight; got 64",
    ),
    "shape of scales": (
        lambda: ops.linear(
            Z(1, 130), Z(0), scales=Z(2, 4), out_features=4, in_features=130, dtype=torch.int8, group_size=64
        ),
        r"scales must be float32 \[3, 4\]; got float32 \[2, 4\]",
    ),
    "scales of outputs": (
        lambda: ops.linear(
            Z(1, 130), Z(0), scales=Z(4), out_features=4, in_features=130, dtype=torch.int8, group_size=64
        ),
        r"scales must be float32 \[3, 4\]; got float32 \[4\]",
    ),
    "packed without groups": (
        lambda: ops.linear(
            Z(1, 130),
            ops.pack(*ops.compress(Z(4, 130, dtype=torch.int8)), in_features=130),
            scales=Z(3, 4),
            out_features=4,
            in_features=130,
            dtype=torch.int8,
            group_size=64,
        ),
        r"packed must be contiguous uint8 \[2176\]",
    ),
    "plain sums": (
        lambda: ops.linear(
            Z(1, 64, dtype=torch.int8),
            Z(0),
            out_features=4,
            in_features=64,
            dtype=torch.int8,
            group_size=64,
            out_dtype=torch.int32,
        ),
        "out_dtype int32 gives the plain sums: group_size must be none",
    ),
    "int4 in 2:4 with x rounded": (
        lambda: ops.linear(Z(1, 64), Z(0), scales=Z(4), out_features=4, in_features=64, dtype=INT4, pattern="2:4"),
        "weight_only must be true for an int4 weight in 2:4",
    ),
    "int4 in 2:4 packed as pairs": (
        lambda: ops.pack(Z(4, 17, dtype=torch.uint8), Z(4, 9, dtype=torch.uint8), in_features=68),
        r"values must be \[N, 18\] for in_features = 68; got \[4, 17\]",
    ),
    "pairs packed as int4 in 2:4": (
        lambda: ops.pack(Z(4, 18, dtype=torch.uint8), Z(4, 5, dtype=torch.uint8), in_features=68, pattern="2:4"),
        r"values must be \[N, 17\] for in_features = 68; got \[4, 18\]",
    ),
    "pairs of int8": (
        lambda: ops.pack(*ops.compress(Z(4, 64, dtype=torch.int8)), in_features=64, pattern="pair 4:8"),
        "pattern must be '2:4' or '1:2' for a weight of int8; got 'pair 4:8'",
    ),
    "no pattern": (
        lambda: ops.pack(Z(4, 16, dtype=torch.uint8), Z(4, 8, dtype=torch.uint8), in_features=64, pattern="3:4"),
        "pattern must be '2:4' or '1:2' or 'pair 4:8' for a weight of int4; got '3:4'",
    ),
    "a layer of floats": (
        lambda: SparseLinear(64, 8, group_size=64),
        "group_size is for a weight_dtype of torch.int8 or torch.int4; got 64",
    ),
    "a layer's groups": (
        lambda: SparseLinear(64, 8, weight_dtype=torch.int8, group_size=100),
        "group_size must be None or a positive multiple of 64; got 100",
    ),
    "a convolution along channels": (
        lambda: SparseConv2d(64, 8, 3, weight_dtype=torch.int8, group_size=64),
        "scales of groups are for linear layers and patch convolutions; got group_size 64 for axis 'channels'",
    ),
    "a layer of int4 in 2:4 with x rounded": (
        lambda: SparseLinear(64, 8, weight_dtype=INT4),
        "pattern must be 'pair 4:8' for an int4 weight; got '2:4'",
    ),
    "given scales": (
        lambda: SparseLinear.from_dense(
            masked(nn.Linear(130, 8)), weight_dtype=torch.int8, group_size=64, scales=torch.ones(8)
        ),
        r"scales must be \[3, 8\] positive finite numbers; got \[8\]",
    ),
    "quantize": (lambda: sparse24.quantize(nn.Linear(4, 4), group_size=96), "group_size must be None or a positive"),
}


def masked(linear: nn.Linear) -> nn.Linear:
    with torch.no_grad():
        linear.weight.mul_(ops.prune_mask(linear.weight.detach()))
    return linear


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    call, message = REFUSED[case]
    with pytest.raises(RuntimeError, match=message):
        call()


@every_kind
def test_opcheck(dtype, pattern):
    weight = Weight(6, 130, dtype, pattern, 64)
    name = "int4-2:4" if (dtype, pattern) == (INT4, "2:4") else str(dtype).removeprefix("torch.")
    check, entries = torch.library.opcheck, torch.ops.sparse24
    check(entries.pack, (weight.values, weight.meta, 130, name, 64))
    check(entries.unpack, (weight.packed, 6, 130, name, 64))
    only = pattern == "2:4" and dtype is INT4
    for x in (torch.randn(3, 130), torch.randn(2, 130, requires_grad=True)):
        bias = torch.randn(6, requires_grad=x.requires_grad)
        # Of what rounds x the gradient is that of x as it is, which no difference quotient has.
        tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        arguments = (x, weight.packed, bias, weight.scales, 6, 130, name, "none", only, 64)
        check(entries.linear, arguments, test_utils=tests)
    fused = (None, None, None, 6, 130, name, "relu", only, "float32", 64)
    check(entries.linear_fused, (torch.randn(3, 130), weight.packed, None, weight.scales, *fused))


def test_the_emulated_gpu_refuses_groups_by_name():
    weight = Weight(16, 64, torch.int8, "2:4", 64)
    with sparse24.emulate("sm_80"), pytest.raises(RuntimeError, match="group_size must be None on a GPU"):
        weight.linear(torch.ones(1, 64))


# ---- Layers ----------------------------------------------------------------------------------------------------------

FORMATS: dict[str, dict[str, Any]] = {
    "int8": {"pattern": "2:4", "dtype": torch.int8, "group_size": 64},
    "int8 only": {"pattern": "2:4", "dtype": torch.int8, "group_size": 128, "weight_only": True},
    "int4": {"pattern": "pair 4:8", "dtype": INT4, "group_size": 64},
    "int4 only": {"pattern": "pair 4:8", "dtype": INT4, "group_size": 64, "weight_only": True},
    "int4 2:4": {"pattern": "2:4", "dtype": INT4, "weight_only": True},
    "int4 2:4 in groups": {"pattern": "2:4", "dtype": INT4, "group_size": 64, "weight_only": True},
    "int4 1:2 in groups": {"pattern": "1:2", "dtype": INT4, "group_size": 64, "weight_only": True},
}
every_format = pytest.mark.parametrize("name", FORMATS)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 70, 4, stride=4), nn.Flatten(2), nn.Linear(9, 150), nn.ReLU(), nn.Linear(150, 8))


def images(seed: int = 1) -> Tensor:
    return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def in_format(name: str, model: nn.Module | None = None, convert: bool = True) -> nn.Sequential:
    model = network() if model is None else model
    options = dict(FORMATS[name])
    sparse24.prune(model, options.pop("pattern"))
    report = sparse24.quantize(model, **options)
    assert {row.outcome for row in report.rows} == {"quantized"}, report
    if convert:
        report = sparse24.convert(model)
        assert {row.outcome for row in report.rows} == {"converted"}, report
    return model


@every_format
def test_before_and_after_convert(name):
    model = in_format(name, convert=False)
    fake = model(images()).detach()
    sparse24.convert(model)
    with torch.no_grad():
        y = model(images())
    if "only" in name or ":" in name:
        torch.testing.assert_close(y, fake, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(y, fake)
    rounded = sorted({(layer.pattern, layer.weight_dtype, layer.group_size) for layer in sparse_layers(model)}, key=str)
    options = FORMATS[name]
    assert rounded == [(options["pattern"], options["dtype"], options.get("group_size"))]


def sparse_layers(model: nn.Module) -> list[SparseModule]:
    return [layer for layer in model.modules() if isinstance(layer, SparseModule)]


@pytest.mark.parametrize("name", [name for name in FORMATS if "pair" not in FORMATS[name]["pattern"]])
def test_rounding_after_convert_gives_the_same_layer(name):
    options = dict(FORMATS[name])
    first, second = in_format(name), network()
    sparse24.prune(second, options.pop("pattern"))
    sparse24.convert(second)
    report = sparse24.quantize(second, **options)
    assert {row.outcome for row in report.rows} == {"quantized"}, report
    with torch.no_grad():
        for one, other in zip(sparse_layers(first), sparse_layers(second), strict=True):
            assert torch.equal(one.scales, other.scales) and torch.equal(one._dense_weight(), other._dense_weight())
        assert torch.equal(first(images()), second(images()))


@every_format
def test_state_copies_pickles_and_files(name, tmp_path):
    model = in_format(name)
    with torch.no_grad():
        y = model(images())
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(images()), y)
        other = in_format(name)
        for layer in sparse_layers(other):
            layer.unpack().reset_parameters()
        assert not torch.equal(other(images()), y)
        other.load_state_dict(model.state_dict())
        for layer in sparse_layers(other):
            layer.pack()
        assert torch.equal(other(images()), y)
        sparse24.save(model, tmp_path / "model.safetensors")
        for device in ("cpu", "meta"):
            with torch.device(device):
                fresh = network()
            loaded = sparse24.load(tmp_path / "model.safetensors", fresh)
            assert torch.equal(loaded(images()), y)
            assert [layer.group_size for layer in sparse_layers(loaded)] == [FORMATS[name].get("group_size")] * 3
    half = copy.deepcopy(model).half()
    for layer, before in zip(sparse_layers(half), sparse_layers(model), strict=True):
        assert layer.scales.dtype is torch.float32 and torch.equal(layer.scales, before.scales)
    assert half(images().half()).isfinite().all()


def test_a_file_from_before_there_were_groups(tmp_path, monkeypatch):
    from sparse24 import io

    model = network()
    sparse24.prune(model)
    sparse24.quantize(model)
    sparse24.convert(model)
    monkeypatch.setattr(io, "_OPTIONS", tuple(option for option in io._OPTIONS if option != "group_size"))
    sparse24.save(model, tmp_path / "old.safetensors")
    monkeypatch.undo()
    loaded = sparse24.load(tmp_path / "old.safetensors", network())
    with torch.no_grad():
        assert torch.equal(loaded(images()), model(images()))


def test_state_of_other_groups_is_refused():
    model, other = in_format("int8"), in_format("int8 only")
    with pytest.raises(RuntimeError, match=r"4.scales must be \[2, 8\] torch.float32; got \[3, 8\]"):
        other.load_state_dict(model.state_dict())
    state = model.state_dict()
    state["4.scales"][2, 5] = float("nan")
    with pytest.raises(RuntimeError, match="4.scales must be finite; got nan in row 5 of group 2"):
        model.load_state_dict(state)


@every_format
def test_compiled_and_under_autocast(name):
    model = in_format(name)
    with torch.no_grad():
        torch._dynamo.reset()
        assert torch.equal(torch.compile(model, fullgraph=True)(images()), model(images()))
        with torch.autocast("cpu", torch.bfloat16):
            y = model(images())
        assert y.dtype is torch.bfloat16
        torch.testing.assert_close(y.float(), model(images()), rtol=0.05, atol=0.05)


def test_training_under_autocast_and_compiled():
    model = in_format("int8", convert=False)
    linear, x = model[2], torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        fake = linear(x).detach()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)(images())
    assert torch.equal(compiled, model(images()))
    compiled.sum().backward()
    sparse24.convert(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model[2](x), fake)


def test_learnt_scales_follow_lsq():
    """The gradient of each scale, from its own group alone, by the formula of the paper."""
    model = quantised("a short last group", torch.int8, learn=True)
    layer, rule, size = model[0], fake_quantization(model[0]), 64
    x = inputs(layer, seed=3).flatten(0, 1)
    with torch.no_grad():
        rule.scales.mul_(0.5)  # so that some are cut off
    layer(x).sum().backward()
    q_x, s_x = quantize_rows(x)
    each = (q_x * s_x).sum(0).expand(35, -1)  # the gradient of the weight
    mask = layer.parametrizations.weight[0].mask
    weight = torch.where(mask, layer.parametrizations.weight.original.detach(), 0)
    for group, begin in enumerate(range(0, 330, size)):
        part, scale = slice(begin, begin + size), rule.scales.detach()[group][:, None]
        exact = weight[:, part] / scale
        inside = exact.abs() <= 127
        assert not inside.all()
        q = exact.round().clamp(-127, 127)
        slope = torch.where(inside, q - exact, q)
        expected = (each[:, part] * slope).sum(1) / (size * 127) ** 0.5
        torch.testing.assert_close(rule.scales.grad[group], expected, rtol=1e-4, atol=1e-5)
        expected_weight = torch.where(mask[:, part] & inside, each[:, part], 0)
        found = layer.parametrizations.weight.original.grad[:, part]
        torch.testing.assert_close(found, expected_weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("learn", [False, True])
def test_training_goes_down_and_converts(learn):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(130, 32), nn.ReLU(), nn.Linear(32, 4))
    sparse24.prune(model)
    sparse24.quantize(model, group_size=64, learn_scales=learn)
    x, target = torch.randn(64, 130), torch.randn(64, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    fake = model(x).detach()
    sparse24.convert(model)
    with torch.no_grad():
        assert torch.equal(model(x), fake)


@pytest.mark.parametrize("name", ["int8", "int8 only", "int4 only", "int4 2:4 in groups"])
def test_gradients_through_a_converted_layer(name):
    model = in_format(name)
    layer = model[4]
    x = torch.randn(5, 150, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (grad,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(grad, layer._dense_weight().sum(0).expand(5, -1))
    assert layer.weight.detach().allclose(layer._dense_weight())


def test_an_independent_oracle_of_quantised_weights():
    """torch's own fake quantisation of each group, by its scales, gives the weight of the layer."""
    model = in_format("int8")
    layer = model[4]
    dense = network()
    sparse24.prune(dense)
    weight = dense[4].weight.detach()
    parts = [
        torch.fake_quantize_per_channel_affine(
            weight[:, 64 * g : 64 * g + 64], layer.scales[g], torch.zeros(8, dtype=torch.int32), 0, -127, 127
        )
        for g in range(3)
    ]
    torch.testing.assert_close(torch.cat(parts, 1), layer._dense_weight(), rtol=0, atol=0)


def test_more_scales_round_better():
    torch.manual_seed(0)
    linear = uneven(nn.Linear(1024, 32))
    errors = []
    for size in (None, 256, 64):
        model = nn.Sequential(copy.deepcopy(linear))
        sparse24.prune(model, "pair 4:8")
        kept = model[0].weight.detach().clone()
        sparse24.quantize(model, INT4, group_size=size)
        errors.append(float((model[0].weight.detach() - kept).square().sum()))
    assert errors[0] > 1.5 * errors[1] > 1.5 * errors[2]


# ---- What the reports say --------------------------------------------------------------------------------------------


def test_reports():
    model = network()
    sparse24.prune(model)
    report = sparse24.quantize(model, group_size=64)
    assert report.title == "quantize to int8 in groups of 64"
    assert "group_size=64" in repr(model[4])
    report = sparse24.convert(model)
    assert report.rows[2].detail == "2:4 int8 in groups of 64"
    assert "group_size=64" in repr(model[4])
    cost = sparse24.report(model, images()).rows[2]
    assert cost.dtype == "int8 in groups of 64" and cost.kernel != "dense"
    scale_bytes = 4 * 3 * 8
    assert cost.expected_gain_at_m1 == (1200 + scale_bytes) / (model[4].packed.nbytes + scale_bytes)
    with sparse24.emulate("sm_80"):
        cost = sparse24.report(model, images()).rows[2]
    assert (cost.kernel, cost.reason) == (
        "dense",
        "scales of groups have no sparse kernel on CUDA; decompressed at every call",
    )


def test_convolutions_along_channels_are_named():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(3, 8, 4, stride=4))
    sparse24.prune(model)
    reason = "scales of groups are for linear layers and patch convolutions, not for convolutions along channels"
    rows = sparse24.quantize(model, group_size=64).rows
    assert [row.outcome for row in rows] == ["skipped", "quantized"] and rows[0].detail == reason
    sparse24.convert(model)
    rows = sparse24.quantize(model, group_size=64).rows
    assert (rows[0].outcome, rows[0].detail) == ("skipped", reason)
    with pytest.raises(RuntimeError, match="linear layers and patch convolutions; got group_size 64"):
        model[0].quantize(group_size=64)
    assert model[0].weight_dtype is torch.float32 and model[0].group_size is None


def test_int4_in_2_4_wants_weight_only():
    model = network()
    sparse24.prune(model)
    rows = sparse24.quantize(model, INT4, group_size=64).rows
    assert rows[0].detail == "it is pruned to 2:4: int4 needs pair 4:8; reprune=True chooses such a mask"
    sparse24.convert(model)
    rows = sparse24.quantize(model, INT4).rows
    assert "int4 keeps pairs of columns" in rows[0].detail


def test_convolutions_take_int4_in_2_4(isa):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(24, 20, 3, padding=1, groups=2), nn.Conv2d(20, 9, 1))
    sparse24.prune(model)
    report = sparse24.quantize(model, INT4, weight_only=True)
    assert {row.outcome for row in report.rows} == {"quantized"}, report
    x = torch.randn(2, 24, 7, 9)
    fake = model(x).detach()
    sparse24.convert(model)
    assert all(layer.pattern == "2:4" and layer.weight_dtype is INT4 for layer in model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), fake, rtol=1e-5, atol=1e-5)
    assert model[0].values.dtype is torch.uint8 if model[0].packed is None else True
    assert model.state_dict()["0.values"].shape == (20, 3, 3, 3)


def test_on_cuda_groups_stay_canonical_and_dense(monkeypatch):
    with FakeCuda(monkeypatch) as machine:
        model = in_format("int8")
        layer = model[4]
        expected = layer(torch.ones(1, 150)).detach()
        layer.to(CUDA)
        assert layer.packed is None and layer._why_canonical(CUDA).startswith("scales of groups")
        with torch.no_grad():
            y = layer(torch.ones(1, 150).to(CUDA))
        assert torch.equal(y.raw, expected) and "linear_inference" not in machine.called
        layer.to("cpu")
        assert layer.packed is not None


@pytest.mark.parametrize("dtype", [torch.int8, INT4], ids=str)
def test_chained(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(130, 200), nn.ReLU(), nn.Linear(200, 140), nn.ReLU(), nn.Linear(140, 8))
    x = torch.randn(40, 130)
    sparse24.prune(model, PATTERNS[dtype])
    sparse24.quantize(model, dtype, group_size=64, activations="max", calibration=[x])
    sparse24.convert(model)
    with torch.no_grad():
        y = model(x)
        report = sparse24.chain(model, x)
        assert [row.outcome for row in report.rows] == ["int8", "int8", "float"], report
        for kernels, found in on_all_kernels(lambda: model(x)).items():
            assert torch.equal(found, y), kernels


def test_tune_measures_int4_in_2_4(tmp_path):
    model = in_format("int4 2:4 in groups")
    layer = model[4]
    report = sparse24.tune([layer], tokens=(1,), path=tmp_path / "tuned.json")
    try:
        assert report.rows[0].dtype == "int4-2:4" and report.rows[0].kernels in ("perm", "dense", "portable")
        sizes = {"tokens": 1, "out_features": 8, "in_features": 150, "weight_only": True, "pattern": "2:4"}
        _, why = ops.cpu_choice(dtype=INT4, x_dtype=torch.float32, **sizes)
        assert why.startswith("tuned")
    finally:
        torch.ops.sparse24.set_tuned_kernels("")


# ---- Planted bugs ----------------------------------------------------------------------------------------------------


def check_products(module: Any) -> None:
    """Sums beyond what float32 holds, in groups of which the last is short, with scales whose order tells."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (3, 2700), generator=generator).float()
    x[0], w = 127, torch.randint(-127, 128, (4, 2700), generator=generator).float()
    w[0] = 127
    w_scale = torch.rand(4, 3, generator=generator) + 0.5
    x_scale = torch.rand(3, 1, generator=generator)
    each = w_scale.repeat_interleave(1280, 1)[:, :2700]
    one = module.Rounded(x.char(), x_scale, (x * x_scale).requires_grad_())
    other = module.Rounded(w.char(), w_scale, (w * each).requires_grad_(), 1280)
    total = np.zeros((3, 4), np.float32)
    for group, part in enumerate((slice(0, 1280), slice(1280, 2560), slice(2560, 2700))):
        sums = (x[:, part].numpy().astype(np.int64) @ w[:, part].numpy().astype(np.int64).T).astype(np.float32)
        total = total + sums * w_scale[:, group].numpy()
    y = module.linear(one, other, None)
    assert (y.detach().numpy() == total * x_scale.numpy()).all()
    y.sum().backward()
    torch.testing.assert_close(one.value.grad, (w * each).sum(0).expand(3, -1))
    torch.testing.assert_close(other.value.grad, (x * x_scale).sum(0).expand(4, -1))


def check_rounding(module: Any) -> None:
    weight = torch.tensor([[4.0] * 64 + [-0.5] * 6, [0.0] * 64 + [7.0] * 6]).requires_grad_()
    rounded = module.round_weight(weight, None, 7, 64)
    assert rounded.scale.tolist() == pytest.approx(np.array([[4 / 7, 0.5 / 7], [1, 1]]))
    assert rounded.q[0].tolist() == [7] * 64 + [-7] * 6 and rounded.q[1].tolist() == [0] * 64 + [7] * 6
    torch.testing.assert_close(rounded.value, weight)
    q, scale = module.quantize_groups(weight.detach(), 64, 7)
    assert torch.equal(q, rounded.q.float()) and torch.equal(scale, rounded.scale)
    scales = torch.tensor([[1.0, 2], [0.25, 0.5]]).requires_grad_()
    rounded = module.round_weight(weight, scales, 7, 64)
    assert rounded.q[0].tolist() == [4] * 64 + [-2] * 6 and rounded.q[1].tolist() == [0] * 64 + [7] * 6
    rounded.value[0, 64:].sum().backward()
    assert scales.grad[0].tolist() == [0, 0] and scales.grad[1, 1] == 0
    module.round_weight(weight, scales, 7, 64).value[1, 64:].sum().backward()
    assert float(scales.grad[1, 1]) == pytest.approx(6 * 7 / (64 * 7) ** 0.5)


PLACES = "x.shape[1])).view(len(x), groups, group_size)"
ADDED = "total = total + _sums(x_columns, w_columns) * scale"
MUTANTS: dict[str, tuple[Callable[[Any], None], str, str]] = {
    "scales come on the whole sum": (check_products, "return total * x_scale", "return total * x_scale * scale"),
    "the last group alone": (check_products, ADDED, ADDED.replace("total + ", "")),
    "x_scale comes first": (
        check_products,
        f"{ADDED}\n        return total * x_scale",
        "total = total + _sums(x_columns, w_columns) * (x_scale * scale)\n        return total",
    ),
    "the gradient of x has the scales of outputs": (
        check_products,
        "w_scale = of_columns(w_scale, w.shape[1], ctx.group_size)",
        "w_scale = w_scale[:, :1]",
    ),
    "the last group is the first": (check_rounding, PLACES, f"{PLACES}.roll(1, 1)"),
    "one group too few": (check_rounding, "max(1, -(-x.shape[1] // group_size))", "max(1, x.shape[1] // group_size)"),
    "scales the other way round": (check_rounding, "scales.T.unsqueeze(-1)", "scales.unsqueeze(-1)"),
}


@pytest.mark.parametrize("name", ["", *MUTANTS])
def test_planted_bug_is_caught(name):
    if not name:
        check_products(rounding)
        check_rounding(rounding)
        return
    check, right, wrong = MUTANTS[name]
    source = Path(rounding.__file__).read_text()
    assert source.count(right) == 1
    mutant = types.ModuleType("mutant")
    exec(source.replace(right, wrong), vars(mutant))
    with pytest.raises((AssertionError, RuntimeError)):
        check(mutant)


def test_nothing_of_ours_is_left_behind():
    model = in_format("int8")
    assert not any(isinstance(module, FakeQuantize) for module in model.modules())
