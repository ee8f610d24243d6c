"""chain: what int8 layers hand on is what they would have rounded anyway; everything else stays float."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse24
from sparse24.sparse_module import SparseModule


class Net(nn.Module):
    """Convolutions, pooling and patches; then a transformer's block of two branches."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 8, 2, stride=2)
        self.first, self.second = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.entry, self.norm = nn.Linear(32, 24), nn.LayerNorm(24)
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 24)
        self.activation, self.drop = activation, nn.Dropout(0.5)
        self.out = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.patches(x))
        x = self.pool(torch.relu(self.second(self.first(x).relu())))
        x = self.entry(x.flatten(1))
        x = x + self.down(self.drop(self.activation(self.up(self.norm(x)))))
        return self.out(x)


def images(count: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def converted(model: nn.Module, *batches: Any, dtype: torch.dtype = torch.int8) -> nn.Module:
    sparse24.prune(model, "pair 4:8" if dtype is torch.int4 else "2:4")
    sparse24.quantize(model, dtype, activations="max", calibration=batches)
    sparse24.convert(model)
    return model.eval()


def outcomes(report: Any) -> dict[str, tuple[str, str]]:
    return {row.name: (row.outcome, row.detail) for row in report.rows}


def dtypes_of_x(model: nn.Module, *inputs: Tensor) -> dict[str, torch.dtype]:
    """What each sparse layer is called with."""
    seen: dict[str, torch.dtype] = {}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].dtype}))
        for name, layer in model.named_modules()
        if isinstance(layer, SparseModule)
    ]
    with torch.no_grad():
        model(*inputs)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("dtype", [torch.int8, torch.int4], ids=str)
def test_a_chain_gives_the_same_bits(dtype):
    model, x = converted(Net(nn.ReLU()), images(), dtype=dtype), images(seed=2)
    with torch.no_grad():
        before = model(x)
        found = outcomes(sparse24.chain(model, x))
        after = model(x)
    assert torch.equal(after, before)
    assert found == {
        "patches": ("int8", "to first"),
        "first": ("int8", "to second"),
        "second": ("int8", "to entry"),
        "entry": ("float", "its output goes to layer_norm in norm; its output goes to add"),
        "up": ("int8", "to down, activation fused"),
        "down": ("float", "its output goes to add"),
        "out": ("float", "its output is one of the model's"),
    }
    integer = {name for name, one in dtypes_of_x(model, x).items() if one is torch.int8}
    assert integer == {"first", "second", "entry", "down"}
    assert isinstance(model.activation, nn.Identity) and model.up.activation == "relu"
    assert "int8_y=True" in repr(model.first)
    with torch.no_grad():
        assert outcomes(sparse24.chain(model, x))["first"] == ("int8", "to second")  # again: as it is
        assert torch.equal(model(x), before)
        for layer in model.modules():
            if isinstance(layer, SparseModule):
                layer.unpack()
        assert torch.equal(model(x), before)  # the dense form as well


class OwnGelu(nn.Module):
    """As transformers has them."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(x)


@pytest.mark.parametrize("activation", [nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU(), OwnGelu()], ids=str)
def test_activations_of_the_kernels_move_a_number_by_a_step_at_most(activation):
    model = converted(Net(activation), images())
    x = images(200, seed=2)
    seen: dict[str, Tensor] = {}
    with torch.no_grad():
        model.down.register_forward_pre_hook(lambda layer, args: seen.update(x=args[0]))
        model(x)
        before = sparse24.ops.quantize(seen["x"], model.down.x_scale).int()
        assert outcomes(sparse24.chain(model, x))["up"] == ("int8", "to down, activation fused")
        model(x)
    after = seen["x"].int()
    assert seen["x"].dtype is torch.int8 and (after - before).abs().max() <= 1
    assert (after != before).float().mean() < 1e-3


def test_half_precision_loses_a_rounding():
    model = converted(Net(nn.ReLU()).bfloat16(), images().bfloat16())
    x = images(seed=2).bfloat16()
    with torch.no_grad():
        before = model(x)
        assert outcomes(sparse24.chain(model, x))["first"] == ("int8", "to second")
        after = model(x)
    assert after.dtype is torch.bfloat16 and (after - before).abs().max() < 0.05 * before.abs().max()


def test_layers_that_share_an_input_round_alike():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(5))

        def forward(self, x: Tensor) -> Tensor:
            x = self.before(x).relu()
            q, k, v = (one(x).unflatten(-1, (2, 8)).transpose(1, 2) for one in (self.q, self.k, self.v))
            attended = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.out(attended.transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    x = torch.randn(3, 5, 16)
    model = converted(Attention(), x)
    other = copy.deepcopy(model)
    with torch.no_grad():
        before = model(x)
        found = outcomes(sparse24.chain(model, x))
        assert torch.equal(model(x), before)
    assert found["before"] == ("int8", "to q, k, v")
    assert found["q"] == ("float", "its output goes to scaled_dot_product_attention")
    other.k.x_scale.mul_(2)
    assert outcomes(sparse24.chain(other, x))["before"] == ("float", "q, k, v round by different scales")


class Way(nn.Module):
    """Two layers, and something between them."""

    def __init__(self, between: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.between = nn.Linear(16, 16), nn.Linear(16, 16), between

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


@pytest.mark.parametrize(
    "between, obstacle",
    [
        (lambda x: x * 2, "its output goes to mul"),
        (lambda x: torch.sigmoid(x), "its output goes to sigmoid"),
        (lambda x: nn.functional.dropout(x, 0.0, True), "its output goes to dropout"),
        (lambda x: nn.functional.pad(x, (1, -1), value=3.0), "its output goes to pad"),
        (lambda x: x.to(torch.bfloat16).to(torch.float32), "its output goes to to"),
        (lambda x: x.float(), "its output goes to to"),
        (lambda x: nn.functional.gelu(x), "its output goes to gelu"),
        (nn.Sequential(nn.GELU(), nn.Sigmoid()), "its output goes to sigmoid in between.1"),
        (nn.BatchNorm1d(16), "its output goes to batch_norm in between"),
        (nn.LeakyReLU(), "its output goes to leaky_relu in between"),
        (lambda x: torch.cat([x[:, :8], x[:, 8:]], 1), "its output goes to cat"),
    ],
)
def test_what_does_not_commute_is_in_the_way(between, obstacle):
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    model = converted(Way(between), x)
    with torch.no_grad():
        before = model(x)
        found = outcomes(sparse24.chain(model, x))["a"]
        assert found == ("float", obstacle)
        assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x.relu(),
        lambda x: nn.functional.pad(x, (1, -1)),
        lambda x: x.view(5, 4, 4).transpose(1, 2).flatten(1),
        lambda x: x.contiguous().clone(),
        lambda x: nn.functional.dropout(x, 0.5, False).unsqueeze(0).squeeze(0),
        lambda x: nn.functional.max_pool2d(x.view(5, 1, 4, 4), 3, 1, 1).flatten(1),
        lambda x: x.chunk(2, 0)[0].flip(1),
    ],
)
def test_what_commutes_is_not(between):
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    model = converted(Way(between), x)
    with torch.no_grad():
        before = model(x)
        assert outcomes(sparse24.chain(model, x))["a"] == ("int8", "to b")
        assert torch.equal(model(x), before)


def test_a_layer_called_twice():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.act = nn.Linear(16, 16), nn.Linear(16, 16), nn.GELU()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.act(self.a(self.act(self.a(x)))))

    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    model = converted(Twice(), x)
    with torch.no_grad():
        before = model(x)
        assert outcomes(sparse24.chain(model, x))["a"] == ("float", "its output goes to gelu in act")
        assert torch.equal(model(x), before)
    relu = Twice()
    relu.act = nn.ReLU()
    relu = converted(relu, x)
    with torch.no_grad():
        before = relu(x)
        assert outcomes(sparse24.chain(relu, x))["a"][0] == "float"  # a and b round by scales of their own
        relu.b.x_scale.copy_(relu.a.x_scale)
        before = relu(x)
        assert outcomes(sparse24.chain(relu, x))["a"] == ("int8", "to a, b")
        assert torch.equal(relu(x), before)


def test_an_activation_under_two_names_stays():
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    shared = nn.GELU()
    model = nn.Sequential(nn.Linear(16, 16), shared, nn.Linear(16, 16), nn.Sequential(shared), nn.Linear(16, 16))
    model = converted(model, x)
    with torch.no_grad():
        before = model(x)
        found = outcomes(sparse24.chain(model, x))
        assert torch.equal(model(x), before)
    assert {outcome for outcome, _ in found.values()} == {"float"} and model[1] is shared


def test_what_is_not_run_is_left_alone():
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(16, 16) for _ in range(4))
            self.whole = True

        def forward(self, x: Tensor) -> Tensor:
            if self.whole:
                x = x + self.c(x)
            self.d(x)
            return self.b(self.a(x))

    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    model = converted(Half(), x)
    model.whole = False
    found = outcomes(sparse24.chain(model, x))
    assert found["c"] == ("float", "it is not packed, or the example inputs do not reach it")
    assert found["d"][0] == "float" and found["a"] == ("int8", "to b")


def test_state_and_compilation(tmp_path: Path):
    model, x = converted(Net(nn.ReLU()), images()), images(seed=2)
    sparse24.chain(model, x)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(copy.deepcopy(model)(x), expected)
        sparse24.save(model, tmp_path / "model.safetensors")
        fresh = Net(nn.Identity()).eval()
        assert torch.equal(sparse24.load(tmp_path / "model.safetensors", fresh)(x), expected)
        half = copy.deepcopy(model).half()
        assert half(x.half()).dtype is torch.float16 and half.first.y_scale.dtype is torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype is torch.bfloat16
        torch._dynamo.reset()
        assert torch.equal(torch.compile(model, fullgraph=True)(x), expected)
        row = next(row for row in sparse24.report(model, x).rows if row.name == "second")
        assert row.kernel.split(",")[0] in ("sparse", "perm", "amx")


def test_there_is_no_gradient_through_a_chain():
    model, x = converted(Net(nn.ReLU()), images()), images(seed=2)
    sparse24.chain(model, x)
    with pytest.raises(RuntimeError, match="a layer that hands on int8 has no gradient"):
        model(x)  # to the parameters of norm
    model.requires_grad_(False)
    assert model(x).dtype is torch.float32
    with pytest.raises(RuntimeError, match="a layer that hands on int8 has no gradient"):
        model(x.requires_grad_())


def test_int8_is_for_layers_that_round_by_a_scale():
    layer = sparse24.SparseLinear(16, 8, weight_dtype=torch.int8).pack()
    with pytest.raises(RuntimeError, match="x must be torch.float32, the dtype of this layer"):
        layer(torch.ones(2, 16, dtype=torch.int8))
    with pytest.raises(RuntimeError, match="int8_y is for x_rounding 'tensor'"):
        sparse24.SparseLinear(16, 8, weight_dtype=torch.int8, int8_y=True)
    model = converted(Way(nn.ReLU()), torch.ones(2, 16))
    sparse24.chain(model, torch.ones(2, 16))
    with pytest.raises(RuntimeError, match="y_scale must be one positive finite number; got 0.0"):
        model.load_state_dict(model.state_dict() | {"a.y_scale": torch.tensor(0.0)})


def test_the_emulated_gpu_hands_on_int8():
    model = converted(Way(nn.ReLU()).half(), torch.randn(4, 16).half())
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)).half()
    with torch.no_grad():
        expected = model(x)
        sparse24.chain(model, x)
        with sparse24.emulate("sm_80") as emulation:
            assert torch.equal(model(x), expected)
    names = [report.kernel for report in emulation.reports]
    assert sum(name.startswith("linear_") for name in names) == 2 and "quantize_rows" not in names, names
