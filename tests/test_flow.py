"""The flow: prune, train, quantize, convert, report. On small nets, on nn.Transformer's, on models of transformers."""

import copy
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from bounds import assert_linear
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparse24 import ops
from sparse24.conversion import convert
from sparse24.nn import SparseLinear
from sparse24.pruning import Mask, prune
from sparse24.quantization import FakeQuantize, quantize
from sparse24.reporting import Report, report
from sparse24.rounding import fake_quantize, quantize_rows


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(18, 33), nn.GELU(), nn.Linear(33, 10))


def samples(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outcomes(report: Report) -> dict[str, tuple[str, str]]:
    return {row.name: (row.outcome, row.detail) for row in report.rows}


def assert_no_worse(y: Tensor, dense: Tensor, exact: Tensor) -> None:
    """y errs no more against float64 than a few times what torch's own dense float32 does on the same model."""
    own = (dense.double() - exact).abs().max()
    assert (y.double() - exact).abs().max() <= 4 * own + 2**-22 * exact.abs().max()


def train(model: nn.Module, x: Tensor, target: Tensor, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


# ---- prune


@pytest.mark.parametrize("pattern", ["2:4", "1:2"])
def test_prune_masks_by_magnitude_and_stays_dense(pattern: str) -> None:
    model, plain = mlp(), mlp()
    result = prune(model, pattern)
    assert outcomes(result) == {"0": ("pruned", pattern), "2": ("pruned", pattern)}
    for layer, before in ((model[0], plain[0]), (model[2], plain[2])):
        mask = ops.prune_mask(before.weight.detach(), pattern)
        assert torch.equal(layer.weight, torch.where(mask, before.weight, 0))
        assert isinstance(layer, nn.Linear) and layer.parametrizations.weight[0].pattern == pattern


def test_a_dropped_entry_reads_as_zero_whatever_it_holds() -> None:
    model = mlp()
    prune(model)
    rule = model[0].parametrizations.weight
    with torch.no_grad():
        rule.original[~rule[0].mask] = float("inf")
    assert (model[0].weight[~rule[0].mask] == 0).all() and model(samples(3, 18)).isfinite().all()


def test_training_learns_and_keeps_the_mask() -> None:
    model = mlp()
    prune(model)
    masks = [model[i].parametrizations.weight[0].mask.clone() for i in (0, 2)]
    x = samples(64, 18)
    losses = train(model, x, mlp(seed=3)(x).detach(), steps=60)
    assert losses[-1] < 0.5 * losses[0]
    for layer, mask in zip((model[0], model[2]), masks, strict=True):
        assert torch.equal(layer.weight != 0, mask)
    convert(model)
    for layer, mask in zip((model[0], model[2]), masks, strict=True):
        assert torch.equal(layer.weight != 0, mask)


@pytest.mark.parametrize(
    "skip", ["body", ["body.0", "body.2"], ("body",), lambda name, module: module.out_features != 10], ids=str
)
def test_skip_by_name_by_parent_and_by_rule(skip: object) -> None:
    model = nn.ModuleDict({"body": mlp(), "body2": nn.Linear(8, 10)})
    model["body"][2] = nn.Linear(33, 11)
    asked = ("skipped", "asked to")
    assert outcomes(prune(model, skip=skip)) == {"body.0": asked, "body.2": asked, "body2": ("pruned", "2:4")}


def test_skip_refuses_a_name_that_is_not_there() -> None:
    with pytest.raises(RuntimeError, match=r"skip must name modules of the model; it has no 'haed'"):
        prune(mlp(), skip=["0", "haed"])


def test_prune_refuses_a_pattern_that_does_not_exist() -> None:
    model = mlp()
    with pytest.raises(RuntimeError, match="pattern must be '2:4', '1:2' or 'pair 4:8'; got '3:4'"):
        prune(model, "3:4")
    assert not parametrize.is_parametrized(model[0])


def test_pruning_twice_keeps_the_first_mask() -> None:
    model = mlp()
    prune(model)
    assert outcomes(prune(model, "1:2"))["0"] == ("skipped", "it is pruned already")
    assert len(model[0].parametrizations.weight) == 1


class Overridden(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def _tied() -> nn.Module:
    model = nn.ModuleDict({"layer": nn.Linear(8, 20, bias=False), "embedding": nn.Embedding(20, 8)})
    model["embedding"].weight = model["layer"].weight
    return model


def _replaced_forward() -> nn.Module:
    model = nn.ModuleDict({"layer": nn.Linear(8, 8)})
    model["layer"].forward = lambda x: x
    return model


def _foreign(name: str) -> nn.Module:
    model = nn.ModuleDict({"layer": nn.Linear(8, 8)})
    parametrize.register_parametrization(model["layer"], name, Doubled())
    return model


MISFITS = {
    "overridden": (lambda: nn.ModuleDict({"layer": Overridden(8, 8)}), "Overridden overrides nn.Linear.forward"),
    "replaced": (_replaced_forward, "its forward was replaced on the instance"),
    "tied": (_tied, "its weight is tied: layer.weight = embedding.weight"),
    "foreign-bias": (lambda: _foreign("bias"), "it has a parametrisation of others"),
    "foreign": (lambda: _foreign("weight"), "it has a parametrisation of others"),
    "float64": (lambda: nn.ModuleDict({"layer": nn.Linear(8, 8, dtype=torch.float64)}), "its weight is torch.float64"),
    "meta": (lambda: nn.ModuleDict({"layer": nn.Linear(8, 8, device="meta")}), "its weight is on the meta device"),
    "lazy": (lambda: nn.ModuleDict({"layer": nn.LazyLinear(8)}), "its weight is a UninitializedParameter"),
    "empty": (lambda: nn.ModuleDict({"layer": nn.Linear(8, 0)}), "its weight is empty"),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("step", [prune, quantize, convert], ids=lambda step: step.__name__)
@pytest.mark.parametrize("name", MISFITS)
def test_a_layer_that_does_not_qualify_is_left_alone_with_the_reason(name: str, step) -> None:
    build, reason = MISFITS[name]
    model = build()
    layer, rules = model["layer"], len(list(model.modules()))
    outcome, detail = outcomes(step(model))["layer"]
    assert outcome == "skipped" and detail.startswith(reason)
    assert model["layer"] is layer and len(list(model.modules())) == rules


def test_a_weight_tied_after_pruning_stays_dense_and_masked() -> None:
    model = nn.ModuleDict({"layer": nn.Linear(8, 20, bias=False), "embedding": nn.Embedding(20, 8)})
    prune(model)
    model["embedding"].weight = model["layer"].parametrizations.weight.original
    outcome, reason = outcomes(convert(model))["layer"]
    assert outcome == "skipped" and "its weight is tied" in reason
    assert not parametrize.is_parametrized(model["layer"])


# ---- convert


@pytest.mark.parametrize("pattern", ["2:4", "1:2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_convert_swaps_and_cleans_up(pattern: str, dtype: torch.dtype) -> None:
    model = mlp().to(dtype).eval()
    prune(model, pattern)
    weights = [model[i].weight.detach().clone() for i in (0, 2)]
    result = convert(model)
    name = str(dtype).removeprefix("torch.")
    assert outcomes(result) == {"0": ("converted", f"{pattern} {name}"), "2": ("converted", f"{pattern} {name}")}
    for layer, weight in zip((model[0], model[2]), weights, strict=True):
        assert type(layer) is SparseLinear and layer.packed is not None
        assert layer.pattern == pattern and not layer.training and layer.dtype is dtype
        assert torch.equal(layer.weight.detach(), weight)
    assert list(model.state_dict()) == ["0.values", "0.meta", "0.bias", "2.values", "2.meta", "2.bias"]
    x = samples(5, 18).to(dtype)
    with torch.no_grad():
        assert_linear(model[0](x), x, weights[0], model[0].bias)


def test_convert_takes_a_sparse_checkpoint_without_masks() -> None:
    model = mlp()
    with torch.no_grad():
        model[0].weight.mul_(ops.prune_mask(model[0].weight))
    result = outcomes(convert(model))
    assert result["0"] == ("converted", "2:4 float32")
    outcome, reason = result["2"]
    assert outcome == "skipped" and "row 0, group 0" in reason and type(model[2]) is nn.Linear


def test_convert_packs_layers_that_are_sparse_already() -> None:
    model = nn.Sequential(SparseLinear(8, 8), SparseLinear(8, 8).pack())
    assert outcomes(convert(model)) == {"0": ("converted", "2:4 float32"), "1": ("skipped", "it is sparse already")}
    assert model[0].packed is not None


def test_a_module_used_twice_stays_one_module() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(nn.ReLU(), shared)})
    assert list(outcomes(prune(model))) == ["a"]
    convert(model)
    assert isinstance(model["a"], SparseLinear) and model["a"] is model["b"][1]


def test_the_model_itself_cannot_be_swapped() -> None:
    model = nn.Linear(8, 8)
    prune(model)
    weight = model.weight.detach().clone()
    outcome, reason = outcomes(convert(model))[""]
    assert outcome == "skipped" and "the model itself" in reason
    assert type(model) is nn.Linear and torch.equal(model.weight, weight)


@pytest.mark.parametrize("int8", [False, True])
def test_hooks_of_others_move_along_and_their_handles_still_work(int8: bool) -> None:
    model, seen = mlp(), []
    prune(model)
    if int8:
        quantize(model)
    handle = model[0].register_forward_hook(lambda module, args, y: seen.append((type(module), y.shape)))
    before = model[0].register_forward_pre_hook(lambda module, args, kwargs: seen.append("pre"), with_kwargs=True)
    convert(model)
    model(samples(3, 18))
    assert seen == ["pre", (SparseLinear, (3, 33))]
    handle.remove(), before.remove()
    model(samples(3, 18))
    assert len(seen) == 2


def test_bias_that_is_frozen_or_absent_stays_so() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, bias=False))
    model[0].bias.requires_grad_(False)
    prune(model)
    convert(model)
    assert not model[0].bias.requires_grad and model[1].bias is None


@pytest.mark.parametrize("int8", [False, True])
def test_copies_and_pickles_of_the_model_at_every_step(int8: bool) -> None:
    model = mlp().eval()
    prune(model)
    if int8:
        quantize(model)
    twin = copy.deepcopy(model)
    x = samples(3, 18)
    assert torch.equal(twin(x), model(x))
    convert(model)
    convert(twin)  # a copy's hooks have no handle, and must go all the same
    assert not twin[0]._forward_pre_hooks and not model[0]._forward_pre_hooks
    for other in (twin, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))


# ---- quantize


def test_fake_quantisation_is_dense_trainable_and_after_the_mask() -> None:
    model = mlp()
    prune(model)
    masked = model[0].weight.detach().clone()
    assert outcomes(quantize(model))["0"] == ("quantized", "int8 rounding in training")
    assert [type(rule) for rule in model[0].parametrizations.weight] == [Mask, FakeQuantize]
    assert torch.equal(model[0].weight, fake_quantize(masked)) and (model[0].weight[masked == 0] == 0).all()
    x = samples(64, 18)
    exact = (fake_quantize(x).double(), fake_quantize(masked).double(), model[0].bias.detach())
    assert_linear(model[0](x).detach(), *exact, roundings=4)
    assert torch.equal(model[0](input=x), model[0](x))
    losses = train(model, x, mlp(seed=3)(x).detach(), steps=60)
    assert losses[-1] < 0.5 * losses[0]
    mask = model[0].parametrizations.weight[0].mask
    assert (model[0].weight[~mask] == 0).all()


def test_the_gradient_passes_the_rounding_straight() -> None:
    model = nn.Sequential(nn.Linear(8, 4, bias=False))
    prune(model)
    mask = model[0].parametrizations.weight[0].mask
    quantize(model)
    x, grad = samples(5, 8).requires_grad_(), samples(5, 4, seed=2)
    model(x).backward(grad)
    weight = model[0].weight.detach()
    assert torch.equal(x.grad, grad @ weight)
    assert torch.equal(model[0].parametrizations.weight.original.grad, torch.where(mask, grad.T @ fake_quantize(x), 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_convert_keeps_the_very_integers_of_training(dtype: torch.dtype) -> None:
    model = mlp().to(dtype)
    prune(model)
    quantize(model)
    x = samples(64, 18).to(dtype)
    train(model, x, mlp(seed=3).to(dtype)(x).detach(), steps=5)
    rule = model[0].parametrizations.weight
    q, scale = quantize_rows(torch.where(rule[0].mask, rule.original, 0).detach().float())
    fake = model[0](x).detach()
    assert outcomes(convert(model))["0"] == ("converted", "2:4 int8")
    layer = model[0]
    assert (layer.weight_dtype, layer.dtype) == (torch.int8, dtype) and not layer._forward_pre_hooks
    state = layer.state_dict()
    dense = ops.decompress(state["values"], state["meta"], in_features=18)
    assert torch.equal(dense, q.to(torch.int8)) and torch.equal(state["scales"], scale.squeeze(1))
    qx, sx = quantize_rows(x.float())
    arguments = qx.double() * sx.double(), q.double() * scale.double(), layer.bias.detach()
    assert_linear(layer(x).detach(), *arguments)
    if dtype is torch.float32:  # both are the product of the same integers; fake quantisation rounds q * scale as well
        assert_linear(fake, *arguments, roundings=4)


def test_quantising_a_converted_model_is_the_shortcut_after_training() -> None:
    model = mlp().eval()
    prune(model)
    masked = model[0].weight.detach().clone()
    learnt = copy.deepcopy(model)
    convert(model)
    layer = model[0]
    assert outcomes(quantize(model)) == {"0": ("quantized", "2:4 int8"), "2": ("quantized", "2:4 int8")}
    assert model[0] is layer and layer.packed is not None and layer.weight_dtype is torch.int8
    q, scale = quantize_rows(masked)
    assert torch.equal(layer.weight.detach(), (q * scale))
    quantize(learnt)
    convert(learnt)
    x = samples(3, 18)
    assert torch.equal(model(x), learnt(x))
    assert outcomes(quantize(model))["0"] == ("skipped", "it is int8 already")


def test_quantize_leaves_dense_layers_and_says_so() -> None:
    model = mlp()
    prune(model, skip="2")
    result = outcomes(quantize(model))
    assert result["2"] == ("skipped", "it is not pruned: only sparse layers run in integers")
    assert outcomes(quantize(model))["0"] == ("skipped", "it is quantised already")
    assert len(model[0].parametrizations.weight) == 2 and len(model[0]._forward_pre_hooks) == 1
    with pytest.raises(RuntimeError, match="dtype must be torch.int8 or torch.int4; got torch.float16"):
        quantize(model, torch.float16)


def test_a_weight_that_is_not_finite_does_not_become_int8() -> None:
    model = mlp()
    prune(model)
    rule = model[0].parametrizations.weight
    with torch.no_grad():
        rule.original[3, 5] = float("inf")
        rule[0].mask[3, 4:8] = torch.tensor([False, True, True, False])
    quantize(model)
    outcome, reason = outcomes(convert(model))["0"]
    assert outcome == "skipped" and "must be finite to become int8; row 3 is not" in reason
    assert type(model[0]) is nn.Linear and not parametrize.is_parametrized(model[0])
    assert model[0].weight[3, 5].isinf()


# ---- Attention and transformers


def encoder(norm_first: bool = False, activation: str = "relu") -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        16, 2, 36, dropout=0.0, activation=activation, batch_first=True, norm_first=norm_first
    )
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
def test_transformer_encoder_runs_our_layers(norm_first: bool, training: bool, grad: bool) -> None:
    model = encoder(norm_first).train(training)
    result = outcomes(prune(model))
    for i in (0, 1):
        assert result[f"layers.{i}.linear1"] == result[f"layers.{i}.linear2"] == ("pruned", "2:4")
        for name in ("in_proj_weight", "out_proj"):
            outcome, reason = result[f"layers.{i}.self_attn.{name}"]
            assert outcome == "skipped" and reason.startswith("nn.MultiheadAttention")
    dense = copy.deepcopy(model)
    convert(model)
    x = samples(3, 5, 16)
    mask = torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 2 + [True] * 3])
    seen: list[int] = []
    forward = SparseLinear.forward
    with torch.set_grad_enabled(grad), pytest.MonkeyPatch.context() as patch:
        patch.setattr(SparseLinear, "forward", lambda self, x: seen.append(1) or forward(self, x))
        y = model(x, src_key_padding_mask=mask)
    assert len(seen) == 4  # the fused path, which would read weights instead, is not taken
    exact = copy.deepcopy(dense).double()(x.double(), src_key_padding_mask=mask)
    assert_no_worse(y[~mask], dense(x, src_key_padding_mask=mask)[~mask], exact[~mask])


def test_fake_quantised_transformer_rounds_activations_in_eval_too() -> None:
    model = encoder().eval()
    prune(model)
    quantize(model)
    x = samples(3, 5, 16)
    with torch.no_grad():
        fused = model(x)
    convert(model)
    with torch.no_grad():
        # Both round the same activations to int8; where a value sits at a tie, one step of 1/127 may differ.
        assert (model(x) - fused).abs().max() < 2e-2 * fused.abs().max()


@pytest.mark.parametrize("kdim", [None, 12])
def test_multihead_attention_is_left_as_it_is(kdim: int | None) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2, kdim=kdim, vdim=kdim, batch_first=True)}).eval()
    q, k = samples(2, 5, 16), samples(2, 5, kdim or 16, seed=2)
    y = model["attention"](q, k, k)[0]
    result = outcomes(prune(model)) | outcomes(quantize(model)) | outcomes(convert(model))
    names = ["in_proj_weight"] if kdim is None else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    assert list(result) == [f"attention.{name}" for name in [*names, "out_proj"]]
    assert {outcome for outcome, _ in result.values()} == {"skipped"}
    assert torch.equal(model["attention"](q, k, k)[0], y)


def test_a_module_that_only_reads_the_weight_still_works() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    with torch.no_grad():
        attention.out_proj.weight.mul_(ops.prune_mask(attention.out_proj.weight))
    x = samples(2, 5, 16)
    with torch.no_grad():
        y = attention(x, x, x)[0]
        attention.out_proj = SparseLinear.from_dense(attention.out_proj).pack()
        assert torch.allclose(attention(x, x, x)[0], y, rtol=0, atol=1e-6)
        attention.train()
        assert torch.allclose(attention(x, x, x)[0], y, rtol=0, atol=1e-6)


def _bert() -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=20, num_hidden_layers=2, num_attention_heads=2, intermediate_size=42
    )
    return transformers.BertForMaskedLM(config), {"input_ids": torch.arange(14).reshape(2, 7)}


def _dinov2() -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(hidden_size=20, num_hidden_layers=2, num_attention_heads=2, image_size=28)
    return transformers.Dinov2Model(config), {"pixel_values": samples(2, 3, 28, 28)}


def _t5() -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=50, d_model=20, d_kv=10, d_ff=42, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    ids = torch.arange(14).reshape(2, 7)
    return transformers.T5ForConditionalGeneration(config), {"input_ids": ids, "decoder_input_ids": ids}


@pytest.mark.parametrize("build", [_bert, _dinov2, _t5], ids=["bert", "dinov2", "t5"])
def test_models_of_transformers(build) -> None:
    torch.manual_seed(0)
    model, inputs = build()
    model.eval()
    result = outcomes(prune(model))
    pruned = [name for name, (outcome, _) in result.items() if outcome == "pruned"]
    tied = [name for name, (_, detail) in result.items() if "tied" in detail]
    assert len(pruned) >= 10 and tied == [] if build is _dinov2 else tied != []
    dense = copy.deepcopy(model)
    exact = copy.deepcopy(model).double()
    result = outcomes(convert(model))
    patches = {name for name in pruned if "patch_embeddings" in name}  # DINOv2's first layer, a convolution
    detail = {name: "2:4 float32" + (", axis=patch" if name in patches else "") for name in pruned}
    assert all(result[name] == ("converted", detail[name]) for name in pruned)
    with torch.no_grad():
        doubled = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
        assert_no_worse(model(**inputs)[0], dense(**inputs)[0], exact(**doubled)[0])
    quantize(model)
    with torch.no_grad():
        y, reference = model(**inputs)[0], dense(**inputs)[0]
        assert F.cosine_similarity(y.flatten(), reference.flatten(), dim=0) > 0.99
        assert (
            copy.deepcopy(model)
            .bfloat16()(**{key: x.bfloat16() if x.is_floating_point() else x for key, x in inputs.items()})[0]
            .dtype
            is torch.bfloat16
        )


# ---- report


def test_report_tells_what_runs_each_layer() -> None:
    model = nn.ModuleDict(
        {
            "sparse": SparseLinear(64, 128).pack(),
            "int8": SparseLinear(128, 64, weight_dtype=torch.int8).pack(),
            "unpacked": SparseLinear(64, 64, bias=False, dtype=torch.float32),
            "dense": nn.Linear(64, 64),
            "pruned": nn.Linear(64, 64),
            "idle": nn.Linear(4, 4),
            "norm": nn.BatchNorm1d(64),
        }
    )
    prune(nn.ModuleDict({"pruned": model["pruned"]}))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model

        def forward(self, x: Tensor) -> Tensor:
            for name in ("sparse", "int8", "unpacked", "dense", "pruned"):
                x = model[name](x)
            model["dense"](x[:1])
            return model["norm"](x.flatten(0, -2))

    net = Net()
    net.layers["dense"].eval()
    modes = [module.training for module in net.modules()]
    state = copy.deepcopy(net.state_dict())
    result = report(net, samples(2, 3, 64))
    assert [module.training for module in net.modules()] == modes
    assert not any(module._forward_pre_hooks for module in net.modules())
    assert all(torch.equal(left, right) for left, right in zip(net.state_dict().values(), state.values(), strict=True))

    rows = {row.name.removeprefix("layers."): row for row in result.rows}
    assert list(rows) == ["sparse", "int8", "unpacked", "dense", "pruned", "idle"]
    assert [row.tokens for row in rows.values()] == [(6,), (6,), (6,), (3, 6), (6,), ()]
    assert [row.pattern for row in rows.values()] == ["2:4"] * 3 + ["dense"] * 3
    assert [row.dtype for row in rows.values()] == ["float32", "int8", "float32", "float32", "float32", "float32"]
    sparse, int8 = rows["sparse"], rows["int8"]
    assert sparse.kernel == int8.kernel == f"perm, {ops.cpu_isa()}" and sparse.reason.startswith("packed; ")
    # Per 4 columns: 2 values and half a byte of meta. N and K are whole tiles here, so packing adds a cache line, and
    # to int8 four bytes a row.
    packed = {name: model[name].packed.nbytes for name in ("sparse", "int8")}
    assert 0 <= packed["sparse"] - (128 * 64 // 4 * 8 + 128 * 64 // 8) <= 64
    assert 0 <= packed["int8"] - (64 * 128 // 4 * 2 + 64 * 128 // 8) <= 64 + 4 * 64
    assert sparse.resident_bytes == packed["sparse"] + 128 * 4 and int8.resident_bytes == packed["int8"] + 2 * 64 * 4
    assert sparse.dense_bytes == 4 * (128 * 64 + 128)
    assert sparse.expected_gain_at_m1 == 128 * 64 * 4 / packed["sparse"]
    assert int8.expected_gain_at_m1 == 64 * 128 / packed["int8"]
    assert rows["unpacked"].kernel == "dense" and "call pack()" in rows["unpacked"].reason
    assert rows["unpacked"].expected_gain_at_m1 is None
    assert rows["dense"].reason == "not pruned: call prune() and convert()"
    assert rows["pruned"].reason == "pruned, not converted: call convert()"

    text = str(result)
    assert text.splitlines()[0] == "sparse24 report" and len(text.splitlines()) == 3 + 6 + 2
    assert "1.88x" in text and "not measured" in text and f"cpu: {ops.cpu_isa()}" in text
    assert json.loads(json.dumps(result.to_dict()))["rows"][0]["shape"] == [128, 64]


def test_report_takes_tuples_and_keywords_and_restores_after_an_error() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2), "head": nn.Linear(16, 4)})
    model.forward = lambda query, key: model["head"](model["attention"](query, key, key)[0])
    x = samples(5, 2, 16)
    by_position = report(model, (x, x))
    assert report(model, {"query": x, "key": x}).to_dict() == by_position.to_dict()
    rows = {row.name: row for row in by_position.rows}
    assert list(rows) == ["attention.in_proj_weight", "attention.out_proj", "head"]
    assert rows["attention.out_proj"].tokens == () and rows["head"].tokens == (10,)
    assert rows["attention.in_proj_weight"].resident_bytes == 48 * 16 * 4
    with pytest.raises(TypeError):
        report(model, (x,))
    assert model.training and not model["head"]._forward_pre_hooks


def test_reports_of_the_steps_print_as_tables() -> None:
    text = str(prune(mlp(), skip="2"))
    lines = text.splitlines()
    assert lines[0] == "prune to 2:4" and lines[1].split() == ["name", "shape", "outcome", "detail"]
    assert lines[3].split() == ["0", "[33,", "18]", "pruned", "2:4"]
    assert "no linear layer, no convolution" in str(prune(nn.Sequential(nn.ReLU())))
