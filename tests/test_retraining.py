"""The paper's workflow: what is pruned, what training keeps, what is reset, in which order things happen."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparse24
from sparse24 import SparseLinear, paper_skips, retrain
from sparse24.retraining import reset


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(256, 32, generator=generator)
    return x, (x @ torch.randn(32, 4, generator=generator)).argmax(1)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))


def train(model: nn.Module, epochs: int = 60, **options: float) -> float:
    x, target = data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **{"momentum": 0.9, "weight_decay": 1e-3, **options})
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        schedule.step()
    return loss.item()


def test_pruned_once_and_trained_again() -> None:
    model = network()
    dense = train(model)
    one_shot = copy.deepcopy(model)
    sparse24.prune(one_shot)
    x, target = data()
    pruned = nn.functional.cross_entropy(one_shot(x), target).item()
    losses: list[float] = []
    reports = retrain(model, lambda twin: losses.append(train(twin)))
    assert [report.title for report in reports] == ["prune to 2:4", "convert"]
    assert losses[0] < pruned and losses[0] < dense + 0.05
    assert all(isinstance(model[i], SparseLinear) for i in (0, 2, 4))
    assert {row.verdict for row in sparse24.check_masks(model).rows} == {"runs sparse"}
    assert nn.functional.cross_entropy(model(x), target).item() == pytest.approx(losses[0], abs=0.02)


def test_everything_in_order_with_permutation_and_integers() -> None:
    model, done = network(), []
    train(model)
    x, _ = data()
    reports = retrain(
        model,
        lambda twin: done.append(("train", type(twin[0]).__name__, train(twin, 20))),
        reorder_for=x,
        dtype=torch.int8,
        train_quantized=lambda twin: done.append(("quantised", len(twin[0].parametrizations.weight), train(twin, 5))),
        method="wanda",
        calibration=[x],
    )
    titles = [report.title for report in reports]
    assert titles == ["permute for 2:4", "prune to 2:4 by wanda", "quantize to int8", "convert"]
    assert [step[:2] for step in done] == [("train", "ParametrizedLinear"), ("quantised", 2)]
    assert model[2].weight_dtype is torch.int8


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_masks_hold_through_momentum_weight_decay_and_reload(optimizer: type) -> None:
    model = network()
    sparse24.prune(model)
    before = [layer.weight != 0 for layer in model if isinstance(layer, nn.Linear)]
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    steps = optimizer(model.parameters(), lr=0.05, weight_decay=0.1, **options)
    x, target = data()
    for step in range(10):
        steps.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        steps.step()
        if step == 5:
            twin = network()
            sparse24.prune(twin)
            twin.load_state_dict(model.state_dict())
            assert torch.equal(twin(x), model(x))
    after = [layer.weight != 0 for layer in model if isinstance(layer, nn.Linear)]
    assert all(not (one & ~two).any() for one, two in zip(after, before, strict=True))


def test_masks_hold_under_autocast_and_a_gradient_scaler() -> None:
    model = network()
    sparse24.prune(model)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), torch.amp.GradScaler("cpu")
    x, target = data()
    for _ in range(5):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert {row.verdict for row in sparse24.check_masks(model).rows} == {"runs sparse"}


def _one_of_two_processes(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = network()
    sparse24.prune(model)
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    x, target = data()
    for step in range(5):
        part = slice(64 * (2 * (step % 2) + rank), 64 * (2 * (step % 2) + rank) + 64)
        optimizer.zero_grad()
        nn.functional.cross_entropy(parallel(x[part]), target[part]).backward()
        optimizer.step()
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    del parallel  # before the group: torch would wait for a thread of the group that waits for the interpreter's lock
    torch.distributed.destroy_process_group()


def test_masks_hold_in_two_processes_that_share_gradients(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_one_of_two_processes, (str(tmp_path),), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(tensor, two[key]) for key, tensor in one.items())
    model = network()
    sparse24.prune(model)
    masks = [layer.weight != 0 for layer in model if isinstance(layer, nn.Linear)]
    model.load_state_dict(one)
    for layer, mask in zip([layer for layer in model if isinstance(layer, nn.Linear)], masks, strict=True):
        assert not ((layer.weight != 0) & ~mask).any()

    # One process that sees both halves takes the same steps: the gradient is the mean of theirs.
    alone = network()
    sparse24.prune(alone)
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    x, target = data()
    for step in range(5):
        part = slice(128 * (step % 2), 128 * (step % 2) + 128)
        optimizer.zero_grad()
        nn.functional.cross_entropy(alone(x[part]), target[part]).backward()
        optimizer.step()
    for key, tensor in alone.state_dict().items():
        torch.testing.assert_close(tensor, one[key], rtol=1e-4, atol=1e-6)


def test_the_papers_rule() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 64, 7), nn.Conv2d(8, 8, 2), nn.Linear(48, 8), nn.Linear(24, 8), nn.Embedding(10, 8)
    )
    rows = {row.name: row.outcome for row in sparse24.prune(copy.deepcopy(model), skip=paper_skips()).rows}
    assert rows == {"0": "skipped", "1": "pruned", "2": "pruned", "3": "skipped"}  # 147, 32, 48, 24
    rows = {row.name: row.outcome for row in sparse24.prune(copy.deepcopy(model), skip=paper_skips(8)).rows}
    assert rows == {"0": "skipped", "1": "pruned", "2": "skipped", "3": "skipped"}
    with pytest.raises(RuntimeError, match="bits must be 8 or 16; got 4"):
        paper_skips(4)


def test_reset_forgets_momenta_and_the_schedule() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    model(data()[0]).sum().backward()
    optimizer.step(), schedule.step()
    assert optimizer.state and optimizer.param_groups[0]["lr"] == 0.05
    reset(optimizer)
    assert not optimizer.state and optimizer.param_groups[0]["lr"] == 0.1
    assert torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5).get_last_lr() == [0.1]


def test_a_mask_that_training_takes_off_is_an_error() -> None:
    def careless(model: nn.Module) -> None:
        nn.utils.parametrize.remove_parametrizations(model[2], "weight")

    with pytest.raises(RuntimeError, match="training took the masks off 2"):
        retrain(network(), careless)
