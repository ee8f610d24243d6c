"""prune by Wanda and SparseGPT against their definitions, spelled out; order, resumption, errors."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparse24
from sparse24 import calibration
from sparse24.masks import bad_groups

LAYERS: dict[str, nn.Module] = {
    "linear": nn.Linear(13, 6),
    "conv": nn.Conv2d(6, 8, 3, padding=1, stride=2),
    "groups, reflect": nn.Conv2d(10, 8, (1, 2), groups=2, padding=1, padding_mode="reflect"),
    "patch": nn.Conv2d(3, 8, 2, stride=2),
}


def correlated(*shape: int, seed: int) -> Tensor:
    """Inputs whose channels depend on each other and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    channels = shape[1]
    mix = torch.randn(channels, channels, generator=generator) / channels**0.5
    mix = (mix + torch.eye(channels)) * torch.logspace(-1, 1, channels)[
        torch.randperm(channels, generator=generator), None
    ]
    return torch.einsum("ij,bj...->bi...", mix, torch.randn(shape, generator=generator))


def batches_for(layer: nn.Module) -> list[Tensor]:
    shape = (20, 13) if isinstance(layer, nn.Linear) else (2, layer.in_channels, 8, 6)
    return [correlated(*shape, seed=seed) for seed in range(3)]


def inputs_of_output(layer: nn.Module, x: Tensor, output: int) -> Tensor:
    """What each entry of layer.weight[output] is multiplied by, for every pixel: [tokens, *weight.shape[1:]].

    By the gradient of the layer itself.
    """
    rows = []
    twin = copy.deepcopy(layer).double()
    y = twin(x.double())
    y = y if isinstance(layer, nn.Linear) else y.movedim(1, -1)
    for one in y[..., output].flatten():
        (grad,) = torch.autograd.grad(one, twin.weight, retain_graph=True)
        rows.append(grad[output])
    return torch.stack(rows)


def ordered(row: Tensor, layer: nn.Module) -> tuple[Tensor, list[int]]:
    """The entries of [..., *weight.shape[1:]] in the order of their groups, and where each segment begins."""
    if isinstance(layer, nn.Linear):
        return row, [0]
    if layer.in_channels // layer.groups < 4:
        return row.flatten(-3), [0]
    last = row.movedim(-3, -1)
    return last.flatten(-3), list(range(0, last[0].numel() if last.dim() > 3 else last.numel(), row.shape[-3]))


def groups_of(columns: int, segments: list[int]) -> list[range]:
    ends = [*segments[1:], columns]
    return [range(k, min(k + 4, end)) for begin, end in zip(segments, ends, strict=True) for k in range(begin, end, 4)]


def outputs_of(layer: nn.Module, batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor, list[range]]]:
    """For each output: inputs [tokens, columns], weights [columns] and groups, all in the order of the groups."""
    for output in range(len(layer.weight)):
        x = torch.cat([inputs_of_output(layer, batch, output) for batch in batches])
        flat, segments = ordered(x, layer)
        weight, _ = ordered(layer.weight[output].detach().double(), layer)
        yield flat, weight, groups_of(len(weight), segments)


def keep_two(scores: Tensor, groups: list[range]) -> Tensor:
    kept = torch.zeros(scores.shape, dtype=torch.bool)
    for group in groups:
        largest = sorted(group, key=lambda k: (-float(scores[k]), k))[:2]
        kept[largest] = True
    return kept


@pytest.mark.parametrize("name", LAYERS)
def test_wanda_is_its_definition(name: str) -> None:
    layer = copy.deepcopy(LAYERS[name])
    batches = batches_for(layer)
    expected = []
    for flat, weight, groups in outputs_of(layer, batches):
        expected.append(keep_two(weight.abs() * flat.square().sum(0).sqrt(), groups))
    model = nn.Sequential(layer)
    before = layer.weight.detach().clone()
    (row,) = sparse24.prune(model, method="wanda", calibration=batches).rows
    assert row.outcome == "pruned"
    mask = layer.parametrizations.weight[0].mask
    assert torch.equal(torch.stack([ordered(one, layer)[0] for one in mask]), torch.stack(expected))
    assert torch.equal(layer.weight, torch.where(mask, before, 0))


def obs_by_definition(weight: Tensor, moments: Tensor, groups: list[range]) -> Tensor:
    """SparseGPT of one row: from left to right, each dropped entry is made up for by those to its right, at the
    optimum of the quadratic that the second moments are. The inverse is made anew at every column."""
    moments = moments + calibration.DAMPING * moments.diagonal().mean() * torch.eye(len(weight), dtype=torch.float64)
    weight = weight.clone()
    for group in groups:
        inverses = {k: torch.linalg.inv(moments[k:, k:]) for k in group}
        cost = torch.stack([weight[k] ** 2 / inverses[k][0, 0] for k in group])
        kept = keep_two(cost, [range(len(group))])
        for place, k in enumerate(group):
            if not kept[place]:
                weight[k:] -= weight[k] / inverses[k][0, 0] * inverses[k][0]
                weight[k] = 0
    return weight


@pytest.mark.parametrize("name", LAYERS)
def test_sparsegpt_is_its_definition(name: str) -> None:
    layer = copy.deepcopy(LAYERS[name])
    batches = batches_for(layer)
    expected = []
    for flat, weight, groups in outputs_of(layer, batches):
        expected.append(obs_by_definition(weight, flat.T @ flat, groups))
    sparse24.prune(nn.Sequential(layer), method="sparsegpt", calibration=batches)
    found = torch.stack([ordered(row, layer)[0] for row in layer.weight.detach()])
    torch.testing.assert_close(found, torch.stack(expected).float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(found != 0, torch.stack(expected) != 0)


@pytest.mark.parametrize("pattern", ["2:4", "1:2", "pair 4:8"])
def test_each_method_is_nearer_to_the_dense_layer(pattern: str) -> None:
    """On inputs whose channels differ: SparseGPT before Wanda before magnitude, in what they are made for."""
    torch.manual_seed(0)
    dense = nn.Linear(256, 64)  # two blocks of columns
    batches = [correlated(400, 256, seed=1)]
    held_out = correlated(400, 256, seed=1)[200:]
    errors = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        model = nn.Sequential(copy.deepcopy(dense))
        sparse24.prune(model, pattern, method=method, calibration=None if method == "magnitude" else batches)
        assert bad_groups(model[0].weight, pattern) == 0
        errors[method] = float((model(held_out) - dense(held_out)).detach().square().mean())
    assert errors["sparsegpt"] < 0.9 * errors["wanda"] and errors["wanda"] < 0.9 * errors["magnitude"], errors


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    dense, batches = nn.Linear(70, 9), [correlated(100, 70, seed=0)]
    found = []
    for columns in (8, 32, 1024):
        monkeypatch.setattr(calibration, "BLOCK_COLUMNS", columns)
        model = nn.Sequential(copy.deepcopy(dense))
        sparse24.prune(model, method="sparsegpt", calibration=batches)
        found.append(model[0].weight.detach())
    for one in found[1:]:
        torch.testing.assert_close(one, found[0], rtol=1e-5, atol=1e-6)


def test_an_input_that_is_always_zero() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 16)
    x[:, 3] = x[:, 8:12] = 0
    for method in ("wanda", "sparsegpt"):
        model = nn.Sequential(nn.Linear(16, 8))
        sparse24.prune(model, method=method, calibration=[x])
        assert model[0].weight.isfinite().all() and bad_groups(model[0].weight, "2:4") == 0
        assert (model[0].weight[:, 3] == 0).all()


# ---- Models ----------------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """Declares its layers in another order than it calls them, one twice and one never."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.twice, self.never = nn.Linear(16, 4), nn.Linear(16, 16), nn.Linear(16, 16)
        self.first, self.drop = nn.Linear(12, 16), nn.Dropout(0.5)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        y = F.relu(self.first(self.drop(x)))
        return self.last(F.relu(self.twice(F.relu(self.twice(y)))) * scale)


def network() -> Branches:
    torch.manual_seed(0)
    return Branches().train()


def test_layers_see_what_the_pruned_layers_before_them_make() -> None:
    model, batches = network(), [{"x": correlated(30, 12, seed=seed), "scale": 2.0} for seed in range(2)]
    twin = copy.deepcopy(model)
    rows = {row.name: row for row in sparse24.prune(model, method="sparsegpt", calibration=batches).rows}
    assert rows["never"].outcome == "skipped" and "do not reach" in rows["never"].detail
    assert [row.outcome for name, row in rows.items() if name != "never"] == ["pruned"] * 3
    assert all(module.training for module in model.modules())
    for name in ("first", "twice", "last"):  # by hand, one layer a call
        every = {"first", "twice", "last", "never"}
        sparse24.prune(twin, method="sparsegpt", calibration=batches, skip=every - {name})
    for left, right in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(left, right)


def test_an_interrupted_call_is_gone_on_with() -> None:
    class Stopping(list):
        left = 8

        def __iter__(self):
            for item in list.__iter__(self):
                self.left -= 1
                if self.left == 0:
                    raise KeyboardInterrupt
                yield item

    batches = [correlated(30, 12, seed=seed) for seed in range(3)]
    model, twin = network(), network()
    with pytest.raises(KeyboardInterrupt):
        sparse24.prune(model, method="wanda", calibration=Stopping(batches))
    pruned = [name for name in ("first", "twice", "last") if hasattr(getattr(model, name), "parametrizations")]
    assert pruned == ["first", "twice"]
    rows = {row.name: row.detail for row in sparse24.prune(model, method="wanda", calibration=batches).rows}
    assert rows["first"] == "it is pruned already" and rows["last"] == "2:4"
    sparse24.prune(twin, method="wanda", calibration=batches)
    x = correlated(5, 12, seed=9)
    assert torch.equal(model.eval()(x), twin.eval()(x))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"method": "random"}, "method must be one of magnitude, wanda, sparsegpt; got 'random'"),
        ({"method": "wanda"}, "method 'wanda' needs calibration batches"),
        ({"calibration": [torch.ones(1, 12)]}, "method 'magnitude' takes no calibration batches"),
        ({"method": "wanda", "calibration": iter([])}, "an iterator can be gone through only once"),
        ({"method": "wanda", "calibration": []}, "calibration must hold at least one batch"),
        ({"transposable": True, "pattern": "1:2"}, "transposable masks are of pattern '2:4'.*got '1:2', 'magnitude'"),
        ({"transposable": True, "method": "sparsegpt", "calibration": [torch.ones(1, 12)]}, "not of sparsegpt"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict, message: str) -> None:
    model = network()
    with pytest.raises(RuntimeError, match=message):
        sparse24.prune(model, **arguments)
    assert not any(hasattr(module, "parametrizations") for module in model.modules())
