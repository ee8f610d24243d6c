"""Layers and models on the device path: which form they hold where, and what the emulated GPU computes.

There is no GPU here: moves and decisions run on a device that is acted out (fake_cuda), kernels on the emulator.
"""

import contextlib
import copy
import pickle
import re
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from bounds import assert_linear
from fake_cuda import CUDA, FakeCuda
from torch import Tensor, nn

import sparse24
from sparse24 import ops, sparse_module, support
from sparse24.emulation import Emulation, emulate
from sparse24.nn import SparseLinear
from sparse24.rounding import quantize_rows
from sparse24.support import FLOAT32_ON_CUDA

KINDS: dict[str, dict] = {
    "f32": {},
    "f16": {"dtype": torch.float16},
    "bf16": {"dtype": torch.bfloat16},
    "1:2": {"pattern": "1:2", "dtype": torch.float16},
    "i8": {"weight_dtype": torch.int8},
    "i8-bf16": {"weight_dtype": torch.int8, "dtype": torch.bfloat16},
    "no-bias": {"bias": False, "dtype": torch.float16},
}
K, N = 19, 7

every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind: str, seed: int = 0, **arguments) -> SparseLinear:
    torch.manual_seed(seed)
    return SparseLinear(K, N, **{**KINDS[kind], **arguments})


def tokens(layer: SparseLinear, *shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, layer.in_features, generator=torch.Generator().manual_seed(seed)).to(layer.dtype)


def dense_weight(layer: SparseLinear) -> Tensor:
    """What the layer multiplies by, in float64, from its saved state alone."""
    state = {key: t.cpu() for key, t in layer.state_dict().items()}
    weight = ops.decompress(state["values"], state["meta"], in_features=layer.in_features, pattern=layer.pattern)
    return weight.double() * (state["scales"].double()[:, None] if "scales" in state else 1)


def rounded(layer: SparseLinear, x: Tensor) -> Tensor:
    """x as the layer multiplies it: an int8 layer rounds each row."""
    if layer.weight_dtype is not torch.int8:
        return x.double()
    q, scale = quantize_rows(x.float())
    return q.double() * scale.double()


def saved(layer: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.cpu().clone() for key, tensor in layer.state_dict().items()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert list(left) == list(right)
    for key in left:
        assert left[key].dtype is right[key].dtype and torch.equal(left[key], right[key]), key


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    monkeypatch.setattr(support, "_warned", {})
    with torch._C._AutoDispatchBelowAutograd(), torch.no_grad(), FakeCuda(monkeypatch) as fake:
        yield fake


# ---- Which form where


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8], ids=str)
def test_which_form_on_which_device(dtype: torch.dtype, cuda: FakeCuda) -> None:
    types = {"weight_dtype": dtype} if dtype is torch.int8 else {"dtype": dtype}
    why_dense = SparseLinear(8, 8, device="meta", **types)._why_canonical
    for device in ("cpu", "meta"):
        assert why_dense(torch.device(device)) == ""
    assert why_dense(CUDA) == (FLOAT32_ON_CUDA if dtype is torch.float32 else "")
    with pytest.warns(UserWarning, match="sparse24 runs dense on xpu: there are no kernels for xpu"):
        assert why_dense(torch.device("xpu")) == "there are no kernels for xpu"
    cuda.problem = "it is broken"
    with pytest.warns(UserWarning, match="sparse24 runs dense on cuda:0: it is broken"):
        assert why_dense(CUDA) == "it is broken"
    with pytest.warns(UserWarning, match="sparse24 runs dense on cuda:1: it is broken"):
        assert why_dense(torch.device("cuda:1")) == "it is broken"
    for device in ("cpu", "meta"):
        assert why_dense(torch.device(device)) == ""


@every_kind
@pytest.mark.parametrize("frozen", [True, False], ids=["packed", "unpacked"])
def test_moves_to_cuda_and_back_are_bit_exact(kind: str, frozen: bool, cuda: FakeCuda) -> None:
    layer = make(kind)
    layer = layer.pack() if frozen else layer
    x, state = tokens(layer, 5), saved(layer)
    y = layer(x)
    sparse = frozen and kind != "f32"

    assert layer.to(CUDA) is layer and layer.device == layer.weight.device == CUDA
    assert all(t.device == CUDA for t in layer.state_dict().values())
    assert (layer.packed is not None) == sparse
    assert sparse or layer.values.requires_grad == (not frozen and kind[0] != "i")
    assert_same(saved(layer), state)
    cuda.called.clear()
    on_cuda = layer(x.to(CUDA))
    assert cuda.called == (["linear_inference"] if sparse else ["decompress"])
    assert_linear(on_cuda.cpu(), rounded(layer, x), dense_weight(layer), state.get("bias"))
    assert torch.equal(layer._detached_weight().cpu(), dense_weight(layer).to(layer.dtype))

    twin = copy.deepcopy(layer).to("meta")
    assert all(t.is_meta for t in twin.state_dict().values()) and (twin.packed is not None) == frozen
    layer.cpu()
    assert (layer.packed is not None) == frozen and layer.device.type == "cpu"
    assert_same(saved(layer), state)
    assert torch.equal(layer(x), y)


@every_kind
def test_meta_to_cuda(kind: str, cuda: FakeCuda) -> None:
    source = make(kind).pack()
    x = tokens(source, 3)
    for layer in (make(kind, device="meta").pack(), make(kind, device="meta")):
        frozen = layer.packed is not None
        layer.to_empty(device=CUDA).load_state_dict(source.state_dict())
        assert (layer.packed is not None) == (frozen and kind != "f32") and layer.device == CUDA
        assert_same(saved(layer), saved(source))
        assert_linear(layer(x.to(CUDA)).cpu(), rounded(layer, x), dense_weight(layer), source.bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dtype_moves_on_cuda_change_the_form(dtype: torch.dtype, cuda: FakeCuda) -> None:
    layer = make("f32").pack().to(CUDA)
    state = saved(layer)
    assert layer.packed is None
    layer.to(dtype)
    assert layer.packed is not None and layer.packed.device == CUDA
    expected = {key: t.to(dtype) if t.is_floating_point() else t for key, t in state.items()}
    assert_same(saved(layer), expected)
    layer.float()
    assert layer.packed is None and not layer.values.requires_grad
    assert_same(saved(layer), {key: t.float() if t.is_floating_point() else t for key, t in expected.items()})


def test_both_in_one_move(cuda: FakeCuda) -> None:
    layer = make("f32").pack()
    reference = copy.deepcopy(layer).half()
    assert layer.to(CUDA, torch.float16).packed is not None
    assert_same(saved(layer), saved(reference))
    assert_same(saved(layer.to("cpu", torch.float32)), saved(reference.float()))


def test_quantize_on_cuda(cuda: FakeCuda) -> None:
    layer, reference = make("f32").pack().to(CUDA), make("f32").pack().quantize()
    assert layer.packed is None
    assert layer.quantize().packed is not None and layer.scales.device == CUDA
    assert_same(saved(layer), saved(reference))


@every_kind
@pytest.mark.parametrize("frozen", [True, False], ids=["packed", "unpacked"])
def test_copies_pickles_and_loads_on_cuda(kind: str, frozen: bool, cuda: FakeCuda) -> None:
    layer = make(kind).to(CUDA)
    layer = layer.pack() if frozen else layer
    x = tokens(layer, 3).to(CUDA)
    assert layer.packed is not None or layer.values.requires_grad == (not frozen and kind[0] != "i")
    other = make(kind, seed=5)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert (twin.packed is None) == (layer.packed is None) and twin.device == CUDA
        assert_same(saved(twin), saved(layer))
        assert torch.equal(twin(x).cpu(), layer(x).cpu())
        twin.load_state_dict(other.state_dict())
        assert_same(saved(twin), saved(other))
        assert (twin.packed is None) == (layer.packed is None) and twin.device == CUDA
        assert not torch.equal(twin(x).cpu(), layer(x).cpu())
    state = {key: t.to(CUDA) for key, t in other.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    assert_same(saved(layer), saved(other))


@pytest.mark.parametrize("int8", [False, True])
def test_from_dense_save_and_load_on_cuda(int8: bool, cuda: FakeCuda, tmp_path) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(18, 33), nn.GELU(), nn.Linear(33, 10)).half().eval()
    for layer in (dense[0], dense[2]):
        layer.weight.mul_(ops.prune_mask(layer.weight))
    models = []
    for device in ("cpu", CUDA):
        model = copy.deepcopy(dense).to(device)
        for name in ("0", "2"):
            layer = SparseLinear.from_dense(getattr(model, name)).pack()
            model.set_submodule(name, layer.quantize() if int8 else layer)
        models.append(model)
    sparse24.save(models[0], tmp_path / "model.safetensors")
    models.append(sparse24.load(tmp_path / "model.safetensors", copy.deepcopy(dense).to(CUDA)))
    cuda.called.clear()
    x = torch.randn(3, 18).half()
    y = models[0](x)
    for model in models[1:]:
        assert all(layer.packed.device == CUDA for layer in (model[0], model[2]))
        assert_same(saved(model), saved(models[0]))
        assert torch.equal(model(x.to(CUDA)).cpu(), y)


# ---- A device that cannot be used


@every_kind
@pytest.mark.parametrize("frozen", [True, False], ids=["packed", "unpacked"])
def test_a_device_with_a_problem_runs_dense_by_torch_alone(kind: str, frozen: bool, cuda: FakeCuda) -> None:
    layer = make(kind)
    layer = layer.pack() if frozen else layer
    x, state = tokens(layer, 5), saved(layer)
    cuda.problem = "its driver is from the stone age"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer.to(CUDA)
        assert layer.packed is None and layer.values.requires_grad == (not frozen and kind[0] != "i")
        y = layer(x.to(CUDA))
        twins = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), make(kind, seed=5).pack().to(CUDA)
        assert all(twin.packed is None for twin in twins)
    assert [str(w.message) for w in caught] == ["sparse24 runs dense on cuda:0: its driver is from the stone age"]
    assert cuda.called == []
    assert_linear(y.cpu(), rounded(layer, x), dense_weight(layer), state.get("bias"))
    layer.cpu()
    assert (layer.packed is not None) == frozen
    assert_same(saved(layer), state)


@pytest.mark.parametrize("pattern", ["2:4", "1:2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("in_features", [1, 2, 3, 4, 5, 8, 19, 64])
def test_torch_alone_decompresses_to_the_bit(in_features: int, dtype: torch.dtype, pattern: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (100 * torch.randn(9, in_features, generator=generator)).to(dtype)
    values, meta = ops.prune_compress(weight, pattern)
    found = sparse_module._decompress_by_torch(values, meta, in_features=in_features, pattern=pattern)
    assert torch.equal(found, ops.decompress(values, meta, in_features=in_features, pattern=pattern))


def test_training_on_a_device_with_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, twin = make("f32"), make("f32")
    x = tokens(layer, 5)
    layer(x).square().sum().backward()
    monkeypatch.setattr(sparse_module, "device_problem", lambda device, dtype: "it is broken")
    monkeypatch.setattr(ops, "decompress", None)
    twin(x).square().sum().backward()
    torch.testing.assert_close(twin.values.grad, layer.values.grad, rtol=1e-5, atol=1e-5)


# ---- What the GPU's kernels compute, on the emulator

SPARSE = {kind: KINDS[kind] for kind in ("f16", "bf16", "1:2", "i8", "i8-bf16")}
every_sparse_kind = pytest.mark.parametrize("kind", SPARSE)


def net(kind: str, frozen: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    layers = SparseLinear(40, 72, **KINDS[kind]), SparseLinear(72, 21, activation="relu", **KINDS[kind])
    if frozen:
        layers = layers[0].pack(), layers[1].pack()
    return nn.Sequential(layers[0], nn.GELU(), layers[1])


def checked(model: nn.Module) -> list[SparseLinear]:
    """From now on each layer's output is held to the bound from float64 of its own input; returns the layers called."""
    called: list[SparseLinear] = []

    def check(layer: SparseLinear, args: tuple[Tensor, ...], y: Tensor) -> None:
        x = args[0].detach().flatten(0, -2)
        with torch.no_grad():
            assert_linear(
                y.detach().flatten(0, -2), rounded(layer, x), weights[id(layer)], layer.bias, layer.activation
            )
        called.append(layer)

    layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
    weights = {id(layer): dense_weight(layer) for layer in layers}
    for layer in layers:
        layer.register_forward_hook(check)
    return called


def kernels(run: Emulation) -> list[str]:
    return [report.kernel for report in run.reports]


@every_sparse_kind
@pytest.mark.parametrize("tokens", [(1,), (5,), (2, 17)], ids=str)
def test_a_model_on_the_emulated_gpu(kind: str, tokens: tuple[int, ...]) -> None:
    model = net(kind)
    called = checked(model)
    x = torch.randn(*tokens, 40).to(model[0].dtype)
    with torch.no_grad():
        on_cpu = model(x)
        with emulate("sm_80") as run:
            y = model(x)
        assert called == [model[0], model[2]] * 2
        assert y.dtype is on_cpu.dtype and y.shape == on_cpu.shape
        assert len([name for name in kernels(run) if name.startswith("linear_") and "reduce" not in name]) == 2
        assert kernels(run).count("quantize_rows") == (2 if kind[0] == "i" else 0)
        assert torch.equal(model(x), on_cpu) and ops.emulating == 0  # all is as it was


@pytest.mark.parametrize("kind", ["f16", "i8-bf16"])
@pytest.mark.parametrize("activation", list(ops.ACTIVATIONS))
def test_the_activation_is_fused(kind: str, activation: str) -> None:
    layer = make(kind, activation=activation).pack()
    called = checked(layer)
    with torch.no_grad(), emulate() as run:
        layer(tokens(layer, 9))
    assert called and sum(name.startswith("linear_") for name in kernels(run)) == 1


def test_float32_runs_dense_as_on_cuda() -> None:
    layer, unpacked = make("f32").pack(), make("f32")
    x = tokens(layer, 5)
    with torch.no_grad(), emulate() as run:
        y = layer(x)
    assert len(run.reports) == 1 and kernels(run)[0].startswith("decompress")
    assert torch.equal(y, unpacked(x))
    assert not torch.equal(layer.packed, torch.zeros_like(layer.packed))
    with emulate(), emulate() as run:
        assert_linear(layer.half()(x.half()).detach(), x.half(), dense_weight(layer), layer.bias)
    assert any(name.startswith("linear_") for name in kernels(run))


def test_autocast_to_another_dtype_runs_dense() -> None:
    layer = make("f16").pack()
    x = tokens(layer, 5)
    for dtype, sparse in ((torch.float16, True), (torch.bfloat16, False)):
        with torch.no_grad(), torch.autocast("cpu", dtype=dtype), emulate() as run:
            y = layer(x)
        assert y.dtype is dtype
        assert any(name.startswith("linear_") for name in kernels(run)) == sparse
        assert any(name.startswith("decompress") for name in kernels(run)) != sparse
        assert_linear(y, x.to(dtype), dense_weight(layer).to(dtype), layer.bias.to(dtype))
    layer = make("i8-bf16").pack()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16), emulate() as run:
        y = layer(tokens(layer, 5))
    assert y.dtype is torch.float16 and "quantize_rows" in kernels(run)
    assert_linear(y, rounded(layer, tokens(layer, 5).half()), dense_weight(layer), layer.bias)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "1:2"])
def test_a_training_step_through_the_device_kernel(kind: str) -> None:
    """Forward and backward of an unpacked model equal those of a dense one with masked weights."""
    model = net(kind, frozen=False)
    weights = [dense_weight(layer).to(layer.dtype).requires_grad_() for layer in (model[0], model[2])]
    x = torch.randn(6, 40).to(model[0].dtype)
    target = torch.randn(6, 21).to(model[0].dtype)
    with emulate() as run:
        y = model(x)
        y.backward(target)
    assert len(run.reports) == 2 and all(name.startswith("decompress") for name in kernels(run))
    hidden = F.gelu(F.linear(x, weights[0], model[0].bias.detach()))
    expected = F.relu(F.linear(hidden, weights[1], model[2].bias.detach()))
    expected.backward(target)
    assert torch.equal(y, expected)
    for layer, weight in zip((model[0], model[2]), weights, strict=True):
        columns = ops.columns_of(layer.meta, in_features=layer.in_features)
        assert torch.equal(layer.values.grad, weight.grad.gather(1, columns))


@pytest.mark.parametrize("kind", ["f16", "i8"])
def test_gradients_of_a_packed_layer(kind: str) -> None:
    layer = make(kind).pack()
    grads = []
    for where in (contextlib.nullcontext(), emulate()):
        x = tokens(layer, 5).requires_grad_()
        layer.bias.grad = None
        with where:
            layer(x).backward(torch.ones(5, N, dtype=layer.dtype))
        grads.append((x.grad, layer.bias.grad))
    assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1])


def test_the_flow_within_and_outside_emulation() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(40, 72), nn.GELU(), nn.Linear(72, 21)).half().eval()
    inside, outside = copy.deepcopy(dense), copy.deepcopy(dense)
    with emulate() as run:
        for step in (sparse24.prune, sparse24.convert, sparse24.quantize):
            step(inside)
        assert_same(saved(inside), saved(copy.deepcopy(inside)))
    for step in (sparse24.prune, sparse24.convert, sparse24.quantize):
        step(outside)
    assert run.reports == []
    assert_same(saved(inside), saved(outside))
    x = torch.randn(3, 40).half()
    with torch.no_grad(), emulate():
        assert torch.equal(inside(x), outside(x))


def test_threads_emulate_each_for_themselves() -> None:
    model = net("f16")
    x = torch.randn(5, 40).half()
    archs = [None, "sm_80", "sm_89", None, "sm_90", "sm_120"]

    def work(arch: str | None) -> tuple[Tensor, int]:
        with torch.no_grad():
            if arch is None:
                return model(x), 0
            with emulate(arch, threads=1) as run:
                return model(x), len(run.reports)

    expected = [work(arch) for arch in archs]
    with ThreadPoolExecutor(len(archs)) as pool:
        for _ in range(3):
            for found, wanted in zip(pool.map(work, archs), expected, strict=True):
                assert torch.equal(found[0], wanted[0]) and found[1] == wanted[1]
    assert ops.emulating == 0


def test_other_threads_stay_on_the_cpu() -> None:
    layer = make("f32").pack()
    x = tokens(layer, 3)
    with emulate(), ThreadPoolExecutor(1) as pool:
        assert layer._why_dense(x) == FLOAT32_ON_CUDA
        assert pool.submit(layer._why_dense, x).result() == ""


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_a_compiled_model_is_traced_anew_for_emulation(kind: str) -> None:
    torch._dynamo.reset()
    model = net(kind)
    x = torch.randn(5, 40).to(model[0].dtype)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        on_cpu = model(x)
        assert torch.equal(compiled(x), on_cpu)
        with emulate() as run:
            assert torch.equal(compiled(x), model(x))
        names = {name.split("_")[0] for name in kernels(run)}
        assert names == ({"decompress"} if kind == "f32" else {"pack", "linear"})
        assert torch.equal(compiled(x), on_cpu)


# ---- What report tells


def test_report_names_the_kernel_of_each_m() -> None:
    class Twice(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x), self.layer(x[:1])

    layer = SparseLinear(512, 256, dtype=torch.float16).pack()
    with emulate("sm_86", multiprocessors=30) as run:
        (row,) = sparse24.report(Twice(layer), torch.randn(100, 512).half()).rows
    assert row.tokens == (1, 100) and row.pattern == "2:4"
    few, many = re.fullmatch(r"(.*) \(M = 1\), (.*) \(M = 100\)", row.kernel).groups()
    launched = [name for name in kernels(run) if name.startswith("linear_f") and "reduce" not in name]
    assert [many.split(",")[0], few.split(",")[0]] == launched
    assert row.reason == "packed, emulated sm_86"
    assert row.expected_gain_at_m1 == pytest.approx(2 * 256 * 512 / layer.packed.nbytes)

    with emulate("sm_80", linear_kernel="linear_f16_64x64", splits=2):
        (row,) = sparse24.report(nn.Sequential(layer), torch.randn(40, 512).half()).rows
    assert row.kernel == "linear_f16_64x64, K in 2 splits"


def test_report_says_what_runs_dense_and_why() -> None:
    model = nn.Sequential(SparseLinear(16, 16).pack(), SparseLinear(16, 16))
    with emulate("sm_80"):
        text = str(result := sparse24.report(model, torch.randn(3, 16)))
    rows = result.rows
    assert [row.kernel for row in rows] == ["dense", "dense"]
    assert rows[0].reason == f"{FLOAT32_ON_CUDA}; decompressed at every call" and rows[0].expected_gain_at_m1 is None
    assert "call pack()" in rows[1].reason
    assert "emulating sm_80" in text
    assert "emulating" not in str(sparse24.report(model, torch.randn(3, 16)))
    half = model[:1].half()
    with emulate(), torch.autocast("cpu", dtype=torch.bfloat16):
        (row,) = sparse24.report(half, torch.randn(3, 16).half()).rows
    assert row.kernel == "dense" and "autocast casts x to torch.bfloat16" in row.reason


@pytest.mark.parametrize("kind", ["f32", "f16", "i8"])
def test_report_on_cuda(kind: str, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[tuple] = []
    monkeypatch.setattr(
        ops, "linear_plan", lambda x, **sizes: plans.append((x.shape, x.device, sizes)) or "linear_f16_64x64"
    )
    model = nn.Sequential(make(kind).pack()).to(CUDA)
    x = tokens(model[0], 3).to(CUDA)
    (row,) = sparse24.report(model, x).rows
    if kind == "f32":
        assert (row.kernel, row.reason) == ("dense", f"{FLOAT32_ON_CUDA}; decompressed at every call")
    else:
        assert (row.kernel, row.reason) == ("linear_f16_64x64", "packed, cuda:0")
        assert plans == [((3, K), CUDA, {"out_features": N, "dtype": model[0].weight_dtype})]
    cuda.problem = "its driver is from the stone age"
    with pytest.warns(UserWarning, match="stone age"):
        (row,) = sparse24.report(nn.Sequential(make(kind).pack().to(CUDA)), x).rows
    assert row.kernel == "dense" and row.reason == f"{cuda.problem}; decompressed at every call"
    assert row.expected_gain_at_m1 is None


# ---- Real models


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_model_of_transformers(dtype: torch.dtype) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(hidden_size=40, num_hidden_layers=2, num_attention_heads=2, image_size=28)
    model = transformers.Dinov2Model(config).to(dtype).eval()
    sparse24.prune(model)
    sparse24.convert(model)
    called = checked(model)
    with torch.no_grad(), emulate():
        model(pixel_values=torch.randn(2, 3, 28, 28).to(dtype))
    assert len(called) == 12


@pytest.mark.slow
def test_a_block_of_dinov2_on_a_photograph() -> None:
    vision = pytest.importorskip("demo.vision")
    model, x = vision.load_model(), vision.held_out()[:1]
    with torch.no_grad():
        hidden = model.embeddings(x)
        block = model.encoder.layer[0].half()
        sparse24.prune(block)
        sparse24.convert(block)
        called = checked(block)
        with emulate("sm_80") as run:
            y = block(hidden.half())
        assert len(called) == 6 and hidden.shape == (1, 257, 384)
        assert F.cosine_similarity(y.float(), block(hidden.half()).float(), dim=-1).min() > 0.9999
    assert len([name for name in kernels(run) if name.startswith("linear_f16")]) == 6
