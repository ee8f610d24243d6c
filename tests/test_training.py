"""Training on the sparse kernels: gradients, the three modes, and what training meets: AMP, checkpoints, processes."""

import copy
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bounds import ROUNDING, assert_linear
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import sparse24
from benchmarks import measure
from benchmarks import training as benchmark
from sparse24 import training
from sparse24.masks import Columns, bad_groups, transposable_mask
from sparse24.pruning import masked
from sparse24.training import MODES, MaskedLinear, StraightThrough, linear_masked

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 8, 4), (5, 30, 21), (33, 64, 48), (70, 257, 131)]  # tokens, K, N


@pytest.fixture(autouse=True)
def at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sparse kernels, also where a dense product would be faster."""
    monkeypatch.setattr(training, "MIN_TOKENS", dict.fromkeys(FLOATS, 0))


@pytest.fixture
def compressed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the weights that the block compresses: one for each product on the sparse kernels."""
    shapes: list[tuple[int, ...]] = []
    compress = sparse24.ops.compress

    def spy(weight: Tensor, pattern: str = "2:4") -> tuple[Tensor, Tensor]:
        shapes.append(tuple(weight.shape))
        return compress(weight, pattern)

    monkeypatch.setattr(sparse24.ops, "compress", spy)
    return shapes


def operands(
    tokens: int, k: int, n: int, dtype: torch.dtype, transposable: bool, whole: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, a weight that is 2:4, bias, and the gradient of y; small integers if `whole`."""
    generator = torch.Generator().manual_seed(tokens * k * n)

    def numbers(*shape: int) -> Tensor:
        if whole:
            return torch.randint(-4, 5, shape, generator=generator).to(dtype)
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    weight = numbers(n, k)
    mask = transposable_mask(weight) if transposable else sparse24.prune_mask(weight.float())
    return numbers(tokens, k), torch.where(mask, weight, 0), numbers(n), numbers(tokens, n)


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in tensors]


def dense_masked(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> list[Tensor]:
    """y and the gradients of x, weight and bias by torch's autograd in float64."""
    inputs = leaves(x.double(), weight.double(), bias.double())
    y = F.linear(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad.double())]


# ---- The product -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposable", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_integers_are_those_of_dense_masked_autograd(shape, transposable, compressed):
    x, weight, bias, grad = operands(*shape, torch.float32, transposable, whole=True)
    inputs = leaves(x, weight, bias)
    y = linear_masked(*inputs, transposable)
    assert compressed == [weight.shape]
    found = [y, *torch.autograd.grad(y, inputs, grad)]
    assert compressed == [weight.shape] + transposable * [weight.t().shape]
    for one, exact in zip(found, dense_masked(x, weight, bias, grad), strict=True):
        assert torch.equal(one.double(), exact)


@pytest.mark.parametrize("transposable", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_gradient_is_within_its_bound(shape, dtype, transposable, compressed):
    x, weight, bias, grad = operands(*shape, dtype, transposable)
    inputs = leaves(x, weight, bias)
    y = linear_masked(*inputs, transposable)
    grad_x, grad_weight, grad_bias = torch.autograd.grad(y, inputs, grad)
    assert len(compressed) == 1 + transposable
    assert {one.dtype for one in (y, grad_x, grad_weight, grad_bias)} == {dtype}
    assert_linear(y, x, weight, bias)
    assert_linear(grad_x, grad, weight.t())
    assert_linear(grad_weight, grad.t(), x.t())
    exact, sizes = grad.double().sum(0), grad.double().abs().sum(0)
    assert ((grad_bias.double() - exact).abs() <= len(x) * 2**-24 * sizes + ROUNDING[dtype] * exact.abs()).all()


@pytest.mark.parametrize("transposable", [False, True])
def test_gradcheck_and_twice(transposable):
    x, weight, bias, _ = operands(6, 12, 8, torch.float64, transposable)
    inputs = leaves(x.view(2, 3, 12), weight, bias)
    assert torch.autograd.gradcheck(lambda *args: linear_masked(*args, transposable), inputs)
    assert torch.autograd.gradgradcheck(lambda *args: linear_masked(*args, transposable), inputs)
    assert torch.autograd.gradcheck(lambda *args: linear_masked(*args, None, transposable), leaves(x[0], weight))


GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "of a sum": lambda y: y.sum(),
    "of one token": lambda y: y[3].sum(),
    "transposed": lambda y: (y.t().contiguous() * torch.arange(y.numel()).view(y.t().shape)).sum(),
    "every other column": lambda y: y[:, ::2].square().sum(),
    "batched": lambda y: y.unflatten(0, (3, -1)).transpose(0, 1).square().sum(),
}


@pytest.mark.parametrize("transposable", [False, True])
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_of_any_strides(name, transposable):
    x, weight, bias, _ = operands(33, 64, 48, torch.float32, transposable, whole=True)
    inputs = leaves(x.t().contiguous().t(), weight.t().contiguous().t(), bias.repeat_interleave(2)[::2])
    doubles = leaves(x.double(), weight.double(), bias.double())
    found = torch.autograd.grad(GRADIENTS[name](linear_masked(*inputs, transposable)), inputs)
    exact = torch.autograd.grad(GRADIENTS[name](F.linear(*doubles)), doubles)
    assert all(torch.equal(one.double(), other) for one, other in zip(found, exact, strict=True))


@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 0, 3), (2, 3)], ids=str)
def test_any_batch(leading):
    _, weight, bias, _ = operands(1, 64, 48, torch.float32, True, whole=True)
    x = torch.ones(*leading, 64, requires_grad=True)
    weight.requires_grad_()
    y = linear_masked(x, weight, bias, True)
    y.sum().backward()
    assert torch.equal(y, F.linear(x, weight, bias)) and x.grad.shape == x.shape
    assert torch.equal(weight.grad, torch.full((48, 64), x.numel() / 64))


def test_only_what_is_asked_for_is_computed(compressed):
    x, weight, bias, grad = operands(33, 64, 48, torch.float32, True)
    weight.requires_grad_()
    linear_masked(x, weight, bias, True).backward(grad)
    assert compressed == [(48, 64)] and x.grad is None


def test_a_weight_that_is_not_sparse_is_refused():
    with pytest.raises(RuntimeError, match="row 0"):
        linear_masked(torch.ones(8, 8), torch.ones(4, 8))
    x, weight, _, grad = operands(8, 8, 8, torch.float32, False)
    weight = torch.where(sparse24.prune_mask(torch.ones(8, 8)), 1.0, 0.0)  # 2:4 along rows, full along columns
    y = linear_masked(x.requires_grad_(), weight, None, True)
    with pytest.raises(RuntimeError, match="row 0"):
        y.backward(grad)


def test_dtypes_must_agree():
    with pytest.raises(RuntimeError, match="x must be torch.bfloat16"):
        linear_masked(torch.ones(8, 8), torch.zeros(4, 8, dtype=torch.bfloat16))
    model = pruned().bfloat16()
    with pytest.raises(RuntimeError, match="x must be torch.bfloat16"):
        model(data()[0])


def test_few_tokens_run_dense(monkeypatch, compressed):
    monkeypatch.undo()
    x, weight, bias, _ = operands(8, 64, 48, torch.float32, False)
    assert "tokens" in training.why_dense(x, weight)
    assert not compressed and torch.equal(linear_masked(x, weight, bias), F.linear(x, weight, bias))


# ---- The modes -------------------------------------------------------------------------------------------------------


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10)).to(dtype)


def data(tokens: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(tokens, 40, generator=generator), torch.randint(0, 10, (tokens,), generator=generator)


def pruned(mode: str = "fixed", transposable: bool = True, decay: float = 2e-4) -> nn.Sequential:
    model = network()
    sparse24.prune(model, transposable=transposable)
    sparse24.train_sparse(model, mode, decay=decay)
    return model


def originals(model: nn.Module) -> list[nn.Parameter]:
    return [layer.parametrizations["weight"].original for layer in model.modules() if isinstance(layer, MaskedLinear)]


def loss_of(model: Callable[[Tensor], Tensor], part: slice = slice(None)) -> Tensor:
    x, target = data()
    return F.cross_entropy(model(x[part]).float(), target[part])


def steps(model: nn.Module, count: int, optimizer: torch.optim.Optimizer | None = None) -> None:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    for _ in range(count):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


class ByHand:
    """The same training in float64, of plain tensors, with nothing of sparse24 but the masks of prune()."""

    def __init__(self, model: nn.Sequential, mode: str, transposable: bool, decay: float) -> None:
        self.mode, self.transposable, self.decay = mode, transposable, decay
        linears = [layer for layer in model if isinstance(layer, nn.Linear)]
        self.weights = [layer.weight.detach().double().requires_grad_() for layer in linears]
        self.biases = [layer.bias.detach().double().requires_grad_() for layer in linears]
        self.masks = [self.mask_of(weight) for weight in self.weights]
        self.momenta = [torch.zeros_like(one) for one in self.weights + self.biases]

    def mask_of(self, weight: Tensor) -> Tensor:
        weight = weight.detach().float()
        return transposable_mask(weight) if self.transposable else sparse24.prune_mask(weight)

    def step(self) -> None:
        x, target = data()
        y = x.double()
        if self.mode != "fixed":
            self.masks = [self.mask_of(weight) for weight in self.weights]
        seen = [
            torch.where(mask, w, 0).detach().requires_grad_() for mask, w in zip(self.masks, self.weights, strict=True)
        ]
        for i, (weight, bias) in enumerate(zip(seen, self.biases, strict=True)):
            y = F.linear(y if i == 0 else y.relu(), weight, bias)
        grads = list(torch.autograd.grad(F.cross_entropy(y, target), seen + self.biases))
        for i, (mask, weight) in enumerate(zip(self.masks, self.weights, strict=True)):
            if self.mode == "fixed":
                grads[i] = torch.where(mask, grads[i], 0)
            elif self.mode == "sr-ste":
                grads[i] = grads[i] + self.decay * ~mask * weight.detach()
        with torch.no_grad():
            for one, grad, momentum in zip(self.weights + self.biases, grads, self.momenta, strict=True):
                momentum.mul_(0.9).add_(grad + 1e-2 * one)
                one -= 0.1 * momentum


@pytest.mark.parametrize("transposable", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_training_is_that_of_dense_masked_weights_in_float64(mode, transposable):
    by_hand = ByHand(network(), mode, transposable, decay=0.05)
    model = pruned(mode, transposable, decay=0.05)
    for _ in range(6):
        by_hand.step()
    steps(model, 6)
    for weight, exact in zip(originals(model), by_hand.weights, strict=True):
        assert ((weight - exact).abs() <= 2**-17).all()  # weights are below 1; a wrong term moves them by 2^-8
    masks = by_hand.masks if mode == "fixed" else [by_hand.mask_of(weight) for weight in by_hand.weights]
    dense = [layer.weight for layer in model if isinstance(layer, MaskedLinear)]
    assert all(torch.equal(weight != 0, mask) for weight, mask in zip(dense, masks, strict=True))
    if mode != "fixed":
        first = [by_hand.mask_of(layer.weight) for layer in network() if isinstance(layer, nn.Linear)]
        assert any(not torch.equal(mask, before) for mask, before in zip(masks, first, strict=True))


def test_the_gradient_of_each_mode():
    torch.manual_seed(0)
    weight, grad = torch.randn(8, 16), torch.randn(8, 16)
    for mode, decay, extra in (
        ("fixed", 0.5, None),
        ("sr-ste", 0.5, 0.5),
        ("sr-ste", 0.0, 0),
        ("dense-gradient", 0.5, 0),
    ):
        model = nn.Sequential(nn.Linear(16, 8))
        model[0].weight.data.copy_(weight)
        sparse24.prune(model)
        sparse24.train_sparse(model, mode, decay=decay)
        mask = sparse24.prune_mask(weight)
        model[0].weight.backward(grad)
        expected = torch.where(mask, grad, 0) if extra is None else grad + extra * torch.where(mask, 0, weight)
        assert torch.equal(originals(model)[0].grad, expected)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_what_a_mask_drops_reads_as_positive_zero(dtype):
    weight = torch.tensor([[1.0, -0.0, torch.nan, torch.inf], [-1.0, 2.0, -torch.nan, -torch.inf]], dtype=dtype)
    for mask in (torch.rand(2, 4) < 0.5, torch.ones(2, 4, dtype=torch.bool), torch.zeros(2, 4, dtype=torch.bool)):
        pairs = [(weight, mask), (weight.t(), mask.t()), (weight[:, ::2], mask[:, ::2]), (weight[:0], mask[:0])]
        for one, keep in pairs:
            kept, expected = masked(one, keep).contiguous(), torch.where(keep, one, 0).contiguous()
            assert torch.equal(kept.flatten().view(torch.uint8), expected.flatten().view(torch.uint8))


def test_masking_under_torch_func():
    weight, mask = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.rand(3, 4) < 0.5
    assert torch.autograd.gradcheck(lambda w: masked(w, mask), weight, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda w: masked(w, mask), weight)
    rows = torch.func.vmap(masked)(weight, mask)
    assert torch.equal(rows, torch.where(mask, weight, 0))


@pytest.mark.parametrize("transposable", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_conversion_keeps_what_was_trained(mode, transposable):
    model = pruned(mode, transposable)
    steps(model, 3)
    before, x = model(data()[0]), data()[0]
    weights = [layer.weight.detach().clone() for layer in model if isinstance(layer, nn.Linear)]
    report = sparse24.convert(model)
    assert [row.outcome for row in report.rows] == ["converted"] * 3
    layers = [layer for layer in model if isinstance(layer, sparse24.SparseLinear)]
    assert all(torch.equal(layer.weight.detach(), weight) for layer, weight in zip(layers, weights, strict=True))
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-5)


def test_a_layer_that_is_not_converted_is_plain_again():
    model = pruned()
    layer = copy.deepcopy(model[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse24.SparseLinear, "from_dense", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no")))
        assert {row.outcome for row in sparse24.convert(model).rows} == {"skipped"}
    assert type(model[0]) is nn.Linear and torch.equal(model[0].weight, layer.weight)
    assert "transposable" not in vars(model[0]) and isinstance(layer, MaskedLinear)


def test_modes_follow_one_another():
    model = pruned("sr-ste")
    steps(model, 3)
    chosen = [layer.weight.detach().clone() for layer in model if isinstance(layer, MaskedLinear)]
    sparse24.train_sparse(model, "fixed")
    now = [layer.weight for layer in model if isinstance(layer, MaskedLinear)]
    assert all(torch.equal(one, other) for one, other in zip(now, chosen, strict=True))
    steps(model, 3)
    assert all(torch.equal(layer.weight != 0, one != 0) for layer, one in zip(model[::2], chosen, strict=True))
    assert sparse24.train_sparse(model, "sr-ste").rows[0].outcome == "sparse"


def test_the_report_says_what_runs_sparse():
    torch.manual_seed(0)
    model = nn.ModuleDict({
        "transposable": nn.Linear(16, 16),
        "rows": nn.Linear(16, 16),
        "pairs": nn.Linear(16, 16),
        "conv": nn.Conv2d(16, 16, 3),
        "dense": nn.Linear(16, 16),
    })  # fmt: skip
    others = ["transposable", "rows", "pairs", "conv", "dense"]
    sparse24.prune(model, transposable=True, skip=others[1:])
    sparse24.prune(model, skip=others[2:])
    sparse24.prune(model, "pair 4:8", skip=others[3:])
    sparse24.prune(model, skip="dense")
    rows = {row.name: row for row in sparse24.train_sparse(model, "sr-ste").rows}
    assert [rows[name].outcome for name in others] == ["sparse", "sparse", "dense", "dense", "skipped"]
    assert rows["transposable"].detail == "forward and gradient of x, sr-ste"
    assert "not transposable" in rows["rows"].detail and "int4" in rows["pairs"].detail
    assert "convolutions" in rows["conv"].detail and rows["dense"].detail == "it is not pruned"
    rules = [layer.parametrizations["weight"][0] for name, layer in model.items() if name != "dense"]
    assert all(isinstance(rule, StraightThrough) and rule.decay == 2e-4 for rule in rules)
    assert [rule.transposable for rule in rules] == [True, False, False, False]


def test_masks_that_still_grow_run_dense():
    model = network()
    gradual = sparse24.GradualPruning(model, steps=2)
    rows = sparse24.train_sparse(model).rows
    assert {row.outcome for row in rows} == {"dense"} and "so far" in rows[0].detail
    steps(model, 1)
    gradual.step()
    gradual.step()
    assert {row.outcome for row in sparse24.train_sparse(model).rows} == {"sparse"}
    steps(model, 1)


@pytest.mark.parametrize("mode", MODES)
def test_a_stricter_pattern_stays(mode):
    model = nn.Sequential(nn.Linear(16, 2))  # any mask of so few rows is 2:4 along columns
    sparse24.prune(model, "1:2")
    sparse24.train_sparse(model, mode)
    assert model[0](torch.ones(8, 16)).shape == (8, 2) and bad_groups(model[0].weight, "1:2") == 0


def test_what_the_costs_are(monkeypatch):
    monkeypatch.setitem(training.MIN_TOKENS, torch.float32, 16)
    model = pruned()
    (many,) = {(row.kernel, row.reason) for row in sparse24.report(model, data()[0]).rows}
    assert many == ("sparse", "pruned, not converted: compressed at every call")
    (few,) = {(row.kernel, row.reason) for row in sparse24.report(model, data(8)[0]).rows}
    assert few[0] == "dense" and "fewer than 16 tokens" in few[1]


@pytest.mark.parametrize("arguments", [{"mode": "dense"}, {"decay": -1.0}], ids=str)
def test_bad_arguments(arguments):
    model = network()
    sparse24.prune(model)
    (name,) = arguments
    with pytest.raises(RuntimeError, match=name):
        sparse24.train_sparse(model, **arguments)
    assert not any(isinstance(layer, MaskedLinear) for layer in model)


def test_training_of_rounded_weights_runs_sparse(compressed):
    model = pruned()
    sparse24.quantize(model, weight_only=True)
    steps(model, 2)
    assert len(compressed) == 2 * (3 + 2)  # the gradient of the model's x is not wanted
    assert {row.outcome for row in sparse24.convert(model).rows} == {"converted"}


# ---- What training meets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_gradient_scaling(dtype, mode, compressed):
    model, dense = pruned(mode), network()
    sparse24.prune(dense, transposable=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for one in (model, dense):
        with torch.autocast("cpu", dtype):
            y = one(data()[0])
            loss = F.cross_entropy(y, data()[1])
        assert y.dtype is dtype
        scaler.scale(loss).backward()
    assert len(compressed) == 3 + 2
    plain = [layer.parametrizations["weight"].original for layer in dense if isinstance(layer, nn.Linear)]
    masks = [layer.parametrizations["weight"][0].mask for layer in dense if isinstance(layer, nn.Linear)]
    for sparse, other, mask in zip(originals(model), plain, masks, strict=True):
        assert sparse.grad.dtype is torch.float32
        error = (torch.where(mask, sparse.grad, 0) - other.grad).abs().max()
        assert error <= 8 * ROUNDING[dtype] * other.grad.abs().max()  # both round each step to 8 or 11 bits
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler.step(optimizer)
    scaler.update()
    assert all(row.verdict.startswith("runs sparse") for row in sparse24.check_masks(model).rows)


def gradients(model: nn.Module, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
    model.zero_grad()
    loss_of(run).backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_gradient_checkpointing(mode, reentrant, compressed):
    model = pruned(mode)
    expected = gradients(model, model)
    count = len(compressed)

    def run(x: Tensor) -> Tensor:
        return checkpoint(model, x.requires_grad_(), use_reentrant=reentrant)

    assert all(torch.equal(one, other) for one, other in zip(gradients(model, run), expected, strict=True))
    assert len(compressed) - count == count + 3 + 1  # forward again, and the gradient of x is wanted


@pytest.mark.parametrize("mode", MODES)
def test_a_module_used_twice(mode):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 40))
    sparse24.prune(model, transposable=True)
    dense = copy.deepcopy(model)
    sparse24.train_sparse(model, mode, decay=0)
    x = torch.randint(-2, 3, (32, 40)).float()
    for one in (model, dense):
        one[0](one[0](x).round()).sum().backward()
        one(x).sum().backward()
    gradient, other = (one[0].parametrizations["weight"].original.grad for one in (model, dense))
    mask = dense[0].parametrizations["weight"][0].mask
    assert torch.equal(torch.where(mask, gradient, 0), other)


@pytest.mark.parametrize("mode", MODES)
def test_deepcopy_in_the_middle_of_training(mode):
    model = pruned(mode)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    steps(model, 3, optimizer)
    twin = copy.deepcopy(model)
    other = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(model, 3, optimizer)
    assert any(not torch.equal(a, b) for a, b in zip(originals(model), originals(twin), strict=True))
    steps(twin, 3, other)
    assert all(torch.equal(a, b) for a, b in zip(originals(model), originals(twin), strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_state_goes_on_in_another_process(mode, tmp_path):
    model = pruned(mode)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    steps(model, 3, optimizer)
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    steps(model, 3, optimizer)
    again = pruned(mode)
    other = torch.optim.AdamW(again.parameters(), lr=1e-2)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(state[0])
    other.load_state_dict(state[1])
    steps(again, 3, other)
    assert all(torch.equal(a, b) for a, b in zip(originals(model), originals(again), strict=True))


@pytest.mark.parametrize("packed", [True, False])
def test_lora_on_a_frozen_sparse_layer(packed):
    torch.manual_seed(0)
    base = network()
    sparse24.prune(base, transposable=True)
    sparse24.convert(base)
    if not packed:
        for layer in base[::2]:
            layer.unpack().requires_grad_(False)
    frozen = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    down, up = nn.Linear(40, 4, bias=False), nn.Linear(4, 64, bias=False)
    nn.init.zeros_(up.weight)
    base.requires_grad_(False)

    def run(x: Tensor) -> Tensor:
        return base[1:](base[0](x) + up(down(x)))

    optimizer = torch.optim.AdamW([*down.parameters(), *up.parameters()], lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = loss_of(run)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(frozen[key], tensor) for key, tensor in base.state_dict().items())

    weights = [layer.weight.detach().double() for layer in base[::2]]
    a, b = down.weight.detach().double().requires_grad_(), up.weight.detach().double().requires_grad_()
    x, target = data()
    hidden = F.linear(x.double(), weights[0] + b @ a, base[0].bias.double())
    for weight, layer in zip(weights[1:], base[2::2], strict=True):
        hidden = F.linear(hidden.relu(), weight, layer.bias.double())
    expected = torch.autograd.grad(F.cross_entropy(hidden, target), [a, b])
    optimizer.zero_grad()
    loss_of(run).backward()
    for found, exact in zip((down.weight.grad, up.weight.grad), expected, strict=True):
        assert (found - exact).abs().max() <= 2**-18 * exact.abs().max() * 64


@pytest.mark.parametrize("mode", MODES)
def test_compiled_forward_and_backward(mode, compressed):
    torch._dynamo.reset()
    model = pruned(mode)
    expected = gradients(model, model)
    count = len(compressed)
    assert count == 3 + 2
    compiled = torch.compile(model, fullgraph=True)
    found = gradients(model, compiled)
    assert len(compressed) == 2 * count  # the compiled graph has the kernels as well
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    steps(model, 2)
    assert torch.allclose(compiled(data()[0]), model(data()[0]), atol=1e-5)


def kernels_of(emulation: Any) -> list[str]:
    return [report.kernel for report in emulation.reports]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_emulated_gpu_runs_the_same_backward(dtype):
    x, weight, bias, grad = operands(33, 64, 48, dtype, True)
    inputs = leaves(x, weight, bias)
    with sparse24.emulate("sm_80") as emulation:
        y = linear_masked(*inputs, True)
        forward = kernels_of(emulation)
        grad_x, grad_weight, _ = torch.autograd.grad(y, inputs, grad)
    assert [name.split("_")[0] for name in forward] == ["pack", "linear"] and kernels_of(emulation) == 2 * forward
    assert not any(report.errors for report in emulation.reports)
    assert_linear(y, x, weight, bias)
    assert_linear(grad_x, grad, weight.t())
    assert_linear(grad_weight, grad.t(), x.t())


def test_the_emulated_gpu_trains_a_model():
    model = pruned().half()
    with sparse24.emulate("sm_80") as emulation:
        loss = F.cross_entropy(model(data()[0].half()).float(), data()[1])
        loss.backward()
    assert sum(name.startswith("linear") for name in kernels_of(emulation)) == 3 + 2
    on_cpu = pruned().half()
    F.cross_entropy(on_cpu(data()[0].half()).float(), data()[1]).backward()
    for one, other in zip(originals(model), originals(on_cpu), strict=True):
        assert (one.grad - other.grad).abs().max() <= 8 * ROUNDING[torch.float16] * other.grad.abs().max()
    with sparse24.emulate("sm_80"):
        assert "float32" in training.why_dense(torch.ones(4, 8), torch.ones(8, 8))


# ---- Processes -------------------------------------------------------------------------------------------------------


def _one_of_two(rank: int, folder: str, how: str, mode: str) -> None:
    training.MIN_TOKENS = dict.fromkeys(FLOATS, 0)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model: Any = pruned(mode)
    if how == "DDP":
        run = nn.parallel.DistributedDataParallel(model)
    else:
        for layer in model[::2]:
            fully_shard(layer)
        run = fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(4):
        optimizer.zero_grad()
        loss_of(run, slice(16 * rank, 16 * rank + 16)).backward()
        optimizer.step()
    state = {key: one.full_tensor() if hasattr(one, "full_tensor") else one for key, one in model.state_dict().items()}
    torch.save(state, f"{folder}/{rank}.pt")
    del run  # before the group: torch would wait for a thread of the group that waits for the interpreter's lock
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("mode", ["fixed", "sr-ste"])
@pytest.mark.parametrize("how", ["DDP", "FSDP2"])
def test_two_processes_train_as_one(how, mode, tmp_path: Path):
    torch.multiprocessing.spawn(_one_of_two, (str(tmp_path), how, mode), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(tensor, two[key]) for key, tensor in one.items())
    alone = pruned(mode, decay=1e-4)  # half, since each step has two forwards
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9)
    for _ in range(4):
        optimizer.zero_grad()
        halves = [loss_of(alone, slice(16 * rank, 16 * rank + 16)) for rank in range(2)]
        (sum(halves) / 2).backward()
        optimizer.step()
    assert one.keys() == alone.state_dict().keys()
    for key, tensor in alone.state_dict().items():
        torch.testing.assert_close(tensor, one[key], rtol=1e-4, atol=1e-5)


# ---- Planted bugs ----------------------------------------------------------------------------------------------------


def check_gradients(module: Any) -> None:
    for transposable in (False, True):
        x, weight, bias, grad = operands(33, 64, 48, torch.float32, transposable, whole=True)
        inputs = leaves(x, weight, bias)
        y = module.linear_masked(*inputs, transposable)
        found = [y, *torch.autograd.grad(y, inputs, grad)]
        assert all(torch.equal(a.double(), b) for a, b in zip(found, dense_masked(x, weight, bias, grad), strict=True))


def check_straight_through(module: Any) -> None:
    weight, grad = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)
    mask = sparse24.prune_mask(weight.detach())
    rule = module.StraightThrough(Columns(nn.Linear(16, 8)), "2:4", False, 0.5)
    masked = rule(weight)
    masked.backward(grad)
    assert torch.equal(masked, torch.where(mask, weight, 0))
    assert torch.equal(weight.grad, grad + 0.5 * torch.where(mask, 0, weight.detach()))


def test_the_document_has_the_committed_table():
    found = json.loads((measure.RESULTS / "training.json").read_text())
    assert benchmark.markdown(found) in (measure.ROOT / "docs" / "training.md").read_text()
    assert [row["contender"] for row in found["rows"]] == 2 * list(benchmark.CONTENDERS)


MUTANTS: dict[str, tuple[Callable[[Any], None], str, str]] = {
    "the gradient of x by W, not its transpose": (
        check_gradients,
        "linear_masked(grad, weight.t()",
        "linear_masked(grad, weight",
    ),
    "the gradient of W halved": (check_gradients, "grad.flatten(0, -2).t() @", "grad.flatten(0, -2).t() * 0.5 @"),
    "the gradient of the bias averaged": (check_gradients, ".sum(0) if x.dim() > 1", ".mean(0) if x.dim() > 1"),
    "bias left out": (check_gradients, "packed, bias, out_features", "packed, None, out_features"),
    "what stays decays": (check_straight_through, "masked(weight, ~mask)", "masked(weight, mask)"),
    "what goes grows": (check_straight_through, "grad + ctx.decay", "grad - ctx.decay"),
    "decay alone": (check_straight_through, "grad = grad + ctx.decay", "grad = ctx.decay"),
    "no mask": (check_straight_through, "return masked(weight, mask)", "return weight.clone()"),
}


@pytest.mark.parametrize("name", ["", *MUTANTS])
def test_planted_bug_is_caught(name):
    source = Path(training.__file__).read_text()
    checks, right, wrong = MUTANTS.get(name, (check_gradients, "", ""))
    assert not name or source.count(right) == 1
    mutant = types.ModuleType("mutant")
    place = f"sparse24_mutant_{list(MUTANTS).index(name) if name else 'none'}::"
    exec(source.replace(right, wrong).replace("sparse24::", place), vars(mutant))
    mutant.MIN_TOKENS = dict.fromkeys(FLOATS, 0)
    if not name:
        check_gradients(mutant)
        check_straight_through(mutant)
        return
    with pytest.raises((AssertionError, RuntimeError)):
        checks(mutant)
