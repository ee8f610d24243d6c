"""The sparse product on the GPU: every kernel, dtype, tail, stride and epilogue, against float64 and torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from problems import DTYPES, SHAPES, assert_exact, assert_near, cannot_run, every_kernel, force, make, poison, tokens

import sparse24
from sparse24 import ops

ACTIVATIONS = ["none", "relu", "gelu", "gelu_tanh", "silu"]
every = pytest.mark.parametrize(("name", "kernel"), list(every_kernel()), ids=lambda value: value or "chosen")
every_name = pytest.mark.parametrize("name", DTYPES)


@every
@pytest.mark.parametrize("layout", ["rows", "odd", "even", "same"])
def test_exact_on_integers_at_every_edge(name: str, kernel: str, layout: str) -> None:
    out_dtype = torch.int32 if name == "s8" else torch.float32
    ran = 0
    for count, rows, columns in SHAPES:
        problem = make(name, rows, columns, "cuda", integers=True)
        x = tokens(problem, count, integers=True, layout=layout)
        poison((count, rows), out_dtype, "cuda")
        try:
            with force(kernel):
                y = problem.linear(x, out_dtype=out_dtype)
        except RuntimeError as error:
            if not cannot_run(error):
                raise
            continue
        try:
            assert_exact(y, x, problem.weight)
        except AssertionError as error:
            raise AssertionError(f"tokens {count}, W [{rows}, {columns}]: {error}") from None
        ran += 1
    if not ran:
        pytest.skip("takes no x of this layout")


@every
def test_splits_change_no_integer_and_no_bit_from_run_to_run(name: str, kernel: str) -> None:
    problem = make(name, 320, 2050, "cuda", integers=True)
    reals = make(name, 320, 2050, "cuda", integers=False)
    out_dtype = torch.int32 if name == "s8" else torch.float32
    for splits in (1, 2, 3, 7):
        for count in (5, 16, 90):
            x, z = tokens(problem, count, integers=True), tokens(reals, count, integers=False)
            try:
                with force(kernel, splits):
                    y = problem.linear(x, out_dtype=out_dtype)
                    runs = [reals.linear(z, out_dtype=out_dtype) for _ in range(5)]
            except RuntimeError as error:
                if not cannot_run(error):
                    raise
                continue
            assert_exact(y, x, problem.weight)
            assert all(torch.equal(run, runs[0]) for run in runs)


@every
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reals_stay_within_the_bound(name: str, kernel: str, activation: str) -> None:
    """With bias and residual."""
    for count, rows, columns in [(5, 130, 264), (16, 256, 1000), (130, 320, 776)]:
        problem = make(name, rows, columns, "cuda", integers=False, scaled=name == "s8")
        x = tokens(problem, count, integers=False)
        bias = torch.randn(rows, device="cuda")
        residual = torch.randn(count, rows, device="cuda").to(torch.float16)
        x_scales = torch.rand(count, device="cuda") * 0.01 + 0.001 if name == "s8" else None
        for out_dtype in (torch.float32, torch.float16, torch.bfloat16):
            options = dict(activation=activation, residual=residual, out_dtype=out_dtype)
            try:
                with force(kernel):
                    y = problem.linear(x, bias, x_scales=x_scales, **options)
            except RuntimeError as error:
                if not cannot_run(error):
                    raise
                continue
            real_x, real_w = x, problem.weight
            if problem.scales is not None and x_scales is not None:
                real_x, real_w = x * x_scales.double()[:, None], real_w * problem.scales.double()[:, None]
            assert_near(y, real_x, real_w, bias, residual, activation)


@pytest.mark.parametrize(("name", "kernel"), [one for one in every_kernel() if one[0] != "s8"])
def test_as_near_as_torch_dense(name: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both within the same bound of the exact product."""
    for kind in ("fp16", "bf16"):
        monkeypatch.setattr(torch.backends.cuda.matmul, f"allow_{kind}_reduced_precision_reduction", False)
    for count, rows, columns in [(1, 768, 768), (16, 768, 3072), (197, 768, 768)]:
        problem = make(name, rows, columns, "cuda", integers=False)
        x = tokens(problem, count, integers=False)
        try:
            with force(kernel):
                y = problem.linear(x)
        except RuntimeError as error:
            if not cannot_run(error):
                raise
            continue
        assert_near(y, x, problem.weight)
        assert_near(F.linear(x, problem.weight), x, problem.weight)


@every
def test_int8_and_int32_outputs(name: str, kernel: str) -> None:
    problem = make(name, 192, 320, "cuda", integers=False, scaled=name == "s8")
    for count in (3, 16, 70):
        x = tokens(problem, count, integers=False)
        scale = torch.tensor(0.5, device="cuda")
        x_scales = torch.rand(count, device="cuda") * 0.01 + 0.001 if name == "s8" else None
        try:
            with force(kernel):
                real = problem.linear(x, x_scales=x_scales, out_dtype=torch.float32)
                got = problem.linear(x, x_scales=x_scales, y_scale=scale, out_dtype=torch.int8)
        except RuntimeError as error:
            if not cannot_run(error):
                raise
            continue
        assert torch.equal(got, (real / scale).round().clamp(-127, 127).to(torch.int8))


def test_int8_weight_quantises_a_float_x_on_the_way() -> None:
    problem = make("s8", 200, 260, "cuda", integers=False, scaled=True)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for count in (1, 9, 130):
            x = torch.randn(count, 260, device="cuda").to(dtype)
            x[0] = 0
            amax = x.float().abs().amax(1)
            scale = torch.where(amax == 0, 1.0, amax / 127)
            q = (x.float() / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
            expected = problem.linear(q, x_scales=scale, out_dtype=dtype)
            assert torch.equal(problem.linear(x), expected)


@every_name
def test_not_finite_tokens_stay_in_their_rows(name: str) -> None:
    problem = make(name, 128, 256, "cuda", integers=False, scaled=name == "s8")
    for count in (4, 70):
        x = torch.randn(count, 256, device="cuda").to(torch.float16 if name == "s8" else DTYPES[name])
        clean = problem.linear(x)
        x[2] = float("nan")
        y = problem.linear(x)
        assert y[2].isnan().all()
        keep = [m for m in range(count) if m != 2]
        assert torch.equal(y[keep], clean[keep])


@every_name
def test_packed_form_is_exact_both_ways(name: str) -> None:
    for rows, columns in [(1, 1), (63, 5), (64, 128), (65, 130), (200, 1001)]:
        weight = make(name, rows, columns, "cpu", integers=False).weight
        values, meta = ops.compress(weight)
        packed = ops.pack(values.cuda(), meta.cuda(), in_features=columns)
        back = ops.unpack(packed, out_features=rows, in_features=columns, dtype=weight.dtype)
        assert torch.equal(back[0].cpu(), values) and torch.equal(back[1].cpu(), meta)
        dense = ops.decompress(values.cuda(), meta.cuda(), in_features=columns)
        assert torch.equal(dense.cpu(), weight)


@every_name
@pytest.mark.parametrize("dtype_out", ["same", "float32"])
def test_emulator_gives_what_the_gpu_gives(name: str, dtype_out: str, capability: int) -> None:
    """The whole operator in both machines, on integers, and on reals as far as the hardware's sums are known."""
    arch = {80: "sm_80", 86: "sm_86", 87: "sm_87", 89: "sm_89", 90: "sm_90"}.get(capability)
    arch = arch or ("sm_120" if capability >= 120 else "sm_100")
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    for count, rows, columns in [(3, 65, 70), (20, 130, 264), (70, 192, 520)]:
        for integers in (True, False):
            here = make(name, rows, columns, "cpu", integers=integers, scaled=name == "s8")
            there = make(name, rows, columns, "cuda", integers=integers, scaled=name == "s8")
            x = (
                torch.randn(count, columns).to(torch.float16)
                if name == "s8"
                else tokens(here, count, integers=integers)
            )
            options = {} if dtype_out == "same" else {"out_dtype": torch.float32}
            with sparse24.emulate(arch, multiprocessors=multiprocessors):
                emulated = here.linear(x, **options)
            got = there.linear(x.cuda(), **options).cpu()
            if integers or name == "s8":
                assert torch.equal(got, emulated)
            else:
                torch.testing.assert_close(got, emulated, rtol=2e-3 if got.dtype == torch.float32 else 2e-2, atol=1e-2)


def test_large_shapes() -> None:
    """Those of real layers, checked on some rows."""
    for name, count, rows, columns in [
        ("f16", 4096, 4096, 11008),
        ("bf16", 1576, 3072, 768),
        ("s8", 4096, 11008, 4096),
    ]:
        problem = make(name, rows, columns, "cuda", integers=True)
        x = tokens(problem, count, integers=True)
        y = problem.linear(x, out_dtype=torch.int32 if name == "s8" else torch.float32)
        some = torch.arange(0, count, 97, device="cuda")
        assert_exact(y[some], x[some], problem.weight)


def test_rows_far_apart() -> None:
    """x whose rows lie more than 2^31 bytes apart."""
    free, _ = torch.cuda.mem_get_info()
    if free < 12 << 30:
        pytest.skip("needs 12 GiB of free device memory")
    problem = make("f16", 128, 256, "cuda", integers=True)
    stride = (1 << 30) + 64
    base = torch.empty(4 * stride + 256, dtype=torch.float16, device="cuda")
    x = base.as_strided((5, 256), (stride, 1))
    x.copy_(tokens(problem, 5, integers=True))
    assert_exact(problem.linear(x), x, problem.weight)
