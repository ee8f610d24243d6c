"""GradualPruning: the schedule, the masks on the way, and training through it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import sparse24
from sparse24 import GradualPruning
from sparse24.masks import Columns


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(64, 30), nn.Linear(30, 9))


def masks(of: nn.Module) -> list[Tensor]:
    return [m.parametrizations.weight[0].mask for m in of.modules() if hasattr(m, "parametrizations")]


def test_the_schedule_and_the_masks_on_the_way() -> None:
    net = model()
    expected = copy.deepcopy(net)
    sparse24.prune(expected)
    gradual = GradualPruning(net, steps=8, start=0.05)
    assert [row.outcome for row in gradual.report.rows] == ["pruned"] * 3
    before = [torch.ones_like(mask) for mask in masks(net)]
    for taken in range(9):
        wanted = 0.5 + (0.05 - 0.5) * (1 - taken / 8) ** 3
        assert gradual.sparsity() == pytest.approx(wanted)
        for mask, last, final in zip(masks(net), before, masks(expected), strict=True):
            assert (~mask).sum() == min(round(wanted * mask.numel()), (~final).sum())
            assert not (final & ~mask).any() and not (mask & ~last).any()  # weights stand still: nothing comes back
        before = [mask.clone() for mask in masks(net)]
        gradual.step()
    assert all(torch.equal(one, two) for one, two in zip(masks(net), masks(expected), strict=True))
    assert {row.outcome for row in sparse24.convert(net).rows} == {"converted"}


def test_the_smallest_of_what_the_pattern_drops_go_first() -> None:
    net = nn.Sequential(nn.Linear(8, 2, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 2, 3, 4, 50, 60, 70, 80], [5, 6, 7, 8, 0.1, 0.2, 0.3, 0.4]]))
    GradualPruning(net, steps=10, start=4 / 16)
    assert (net[0].weight == 0).nonzero().tolist() == [[0, 0], [0, 1], [1, 4], [1, 5]]


def test_entries_come_back_and_masks_are_chosen_when_it_is_time() -> None:
    net = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 2, 3, 4]]))
    gradual = GradualPruning(net, steps=4, start=0.5, every=3)
    original = net[0].parametrizations.weight.original
    assert masks(net)[0].tolist() == [[False, False, True, True]]
    with torch.no_grad():
        original.copy_(torch.tensor([[9.0, 2, 3, 4]]))
    gradual.step(), gradual.step()
    assert masks(net)[0].tolist() == [[False, False, True, True]]
    gradual.step()
    assert masks(net)[0].tolist() == [[True, False, False, True]]
    with torch.no_grad():
        original.copy_(torch.tensor([[9.0, 20, 3, 4]]))
    gradual.step()  # the last, though not the third since
    assert masks(net)[0].tolist() == [[True, True, False, False]]
    with torch.no_grad():
        original.copy_(torch.tensor([[0.0, 0, 3, 4]]))
    gradual.step(), gradual.step()
    assert masks(net)[0].tolist() == [[True, True, False, False]]


def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped() -> None:
    x, target = torch.randn(32, 8, 4, 4, generator=torch.Generator().manual_seed(1)), torch.arange(32) % 9

    def start(state: dict | None = None) -> tuple[nn.Module, torch.optim.Optimizer, GradualPruning]:
        net = model()
        gradual = GradualPruning(net, steps=10, every=2)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, weight_decay=0.1)
        if state is not None:
            net.load_state_dict(state["model"]), optimizer.load_state_dict(state["optimizer"])
            gradual.load_state_dict(state["gradual"])
        return net, optimizer, gradual

    def train(net: nn.Module, optimizer: torch.optim.Optimizer, gradual: GradualPruning, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), target).backward()
            optimizer.step()
            gradual.step()

    whole = start()
    train(*whole, 12)
    half = start()
    train(*half, 5)
    parts = [part.state_dict() for part in half]
    again = start(dict(zip(("model", "optimizer", "gradual"), copy.deepcopy(parts), strict=True)))
    train(*again, 7)
    assert torch.equal(whole[0](x), again[0](x))
    for module in whole[0].modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            columns = Columns(module)
            kept = columns.of(module.weight.detach()) != 0
            assert torch.equal(kept & columns.mask(kept.float(), "2:4"), kept)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"steps": 0}, "steps and every must be at least 1; got 0 and 1"),
        ({"steps": 5, "every": 0}, "got 5 and 0"),
        ({"steps": 5, "start": 0.6}, "start must be from 0 to 0.5.*got 0.6"),
        ({"steps": 5, "pattern": "3:4"}, "pattern must be"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        GradualPruning(model(), **arguments)
