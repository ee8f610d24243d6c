"""Fashion-MNIST, a CNN and a small ViT from scratch: what each way to 2:4 does to accuracy, paired over seeds.

A seed decides the initial weights and the order of the images; all ways of one seed share the dense model that it
gives. Trained again means: the same schedule once more, the optimiser made anew, as in "Accelerating Sparse Deep Neural
Networks". The 60,000 images train, the 10,000 of the test set are only looked at for the table.
"""

from __future__ import annotations

import copy
import gzip
import itertools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparse24
from benchmarks.cpu.encoders import Block
from sparse24.quantization import FakeQuantize

FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of Debian's dataset-fashion-mnist (MIT)
SEEDS = 5
EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 3, 128, 2e-3, 0.02
SCALE_PACE = 10
CALIBRATION = 512  # training images for Wanda and SparseGPT
DENSE = "dense"


class Missing(Exception):
    """The data is not there; the message says how to get it."""


# ---- Data and models -------------------------------------------------------------------------------------------------


def read(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images [B, 1, 28, 28], of mean 0 and deviation 1 over the training set, and labels; part: "train" or "t10k"."""
    arrays = []
    for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
        file = folder / f"{part}-{kind}-ubyte.gz"
        if not file.exists():
            raise Missing(
                f"{file} is not there: apt-get install dataset-fashion-mnist; or apt-get download it, dpkg -x it into "
                "a folder, and name that with --fashion-mnist"
            )
        arrays.append(np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8, offset=header))
    pixels, labels = (torch.from_numpy(array.copy()) for array in arrays)
    return (pixels.view(-1, 1, 28, 28).float() / 255 - 0.2860) / 0.3530, labels.long()


def cnn() -> nn.Module:
    def block(channels: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    pool = nn.MaxPool2d(2)
    head = [nn.Flatten(), nn.Linear(64 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, 10)]
    return nn.Sequential(*block(1, 16), pool, *block(16, 32), pool, *block(32, 64), *head)


class Vit(nn.Module):
    """16 patches of 7 x 7, width 64, four blocks, the mean of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 64, 7, stride=7)
        self.positions = nn.Parameter(0.02 * torch.randn(16, 64))
        self.blocks = nn.Sequential(*(Block(64, 4) for _ in range(4)))
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits


MODELS: dict[str, Callable[[], nn.Module]] = {"CNN": cnn, "ViT": Vit}


# ---- Training --------------------------------------------------------------------------------------------------------


class Data:
    def __init__(self, folder: Path) -> None:
        self.x, self.y = read(folder, "train")
        self.test_x, self.test_y = read(folder, "t10k")

    def train(self, model: nn.Module, seed: int, length: float = 1, pace: float = 1) -> None:
        """One schedule: AdamW, the learning rate warming up over 5 % of the steps and falling to zero as a cosine.

        length, pace: so many times its steps, and its learning rate. Adam's steps do not know the size of what they
        change, and learnt scales are small: each tensor of them has the rate times SCALE_PACE times its mean.
        """
        order = torch.Generator().manual_seed(seed)
        rate, per_epoch = pace * LEARNING_RATE, len(self.x) // BATCH
        scales = [p for module in model.modules() if isinstance(module, FakeQuantize) for p in module.parameters()]
        known = {id(scale) for scale in scales}
        groups: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if id(p) not in known], "lr": rate}]
        for scale in scales:
            size = float(scale.detach().abs().mean())
            groups.append({"params": [scale], "lr": rate * SCALE_PACE * size, "weight_decay": 0.0})
        optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)
        steps = int(length * EPOCHS * per_epoch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, [group["lr"] for group in groups], steps, pct_start=0.05, cycle_momentum=False
        )
        shuffled = (torch.randperm(len(self.x), generator=order).split(BATCH)[:per_epoch] for _ in itertools.count())
        model.train()
        for batch in itertools.islice(itertools.chain.from_iterable(shuffled), steps):
            optimizer.zero_grad()
            F.cross_entropy(model(self.x[batch]), self.y[batch]).backward()
            optimizer.step()
            schedule.step()
        model.eval()

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """In percent, of the test set."""
        right = [model(x).argmax(1) == y for x, y in zip(self.test_x.split(1000), self.test_y.split(1000), strict=True)]
        return 100 * float(torch.cat(right).float().mean())

    def calibration(self) -> list[Tensor]:
        return list(self.x[:CALIBRATION].split(128))


def ways(dense: nn.Module, start: nn.Module, data: Data, seed: int) -> Iterator[tuple[str, nn.Module]]:
    """Each way of the table by name, as a model to be measured; the last is trained from `start`, as dense was."""
    skip = sparse24.paper_skips()

    def pruned(model: nn.Module, **how: Any) -> nn.Module:
        copied = copy.deepcopy(model)
        sparse24.prune(copied, skip=skip, **how)
        return copied

    yield DENSE, dense
    again = copy.deepcopy(dense)
    data.train(again, seed + 1000)
    yield "dense, trained again", again
    permuted = copy.deepcopy(dense)
    sparse24.permute(permuted, data.x[:2])
    one_shot, of_permuted = pruned(dense), pruned(permuted)
    yield "2:4, one-shot", one_shot
    yield "2:4, one-shot, permuted", of_permuted
    yield "2:4, one-shot by Wanda", pruned(dense, method="wanda", calibration=data.calibration())
    yield "2:4, one-shot by SparseGPT", pruned(dense, method="sparsegpt", calibration=data.calibration())
    for name, model in (("2:4, trained again", one_shot), ("2:4, permuted, trained again", of_permuted)):
        sparse24.train_sparse(model)
        data.train(model, seed + 1000)
        yield name, model
    straight = pruned(start)
    sparse24.train_sparse(straight, "sr-ste")
    data.train(straight, seed)
    yield "2:4, SR-STE from scratch", straight


def job(folder: Path, model: str, seed: int) -> dict[str, float]:
    """Accuracy by way, of one model and seed, on one thread. What is measured has been converted."""
    torch.set_num_threads(1)
    data = Data(folder)
    torch.manual_seed(seed)
    start = MODELS[model]()
    dense = copy.deepcopy(start)
    data.train(dense, seed)
    found = {}
    for name, trained in ways(dense, start, data, seed):
        found[name] = data.accuracy(converted(trained))
    return found


def converted(trained: nn.Module) -> nn.Module:
    """A copy that runs on the sparse kernels; `trained` stays trainable."""
    model = copy.deepcopy(trained).eval()
    sparse24.convert(model)
    return model


# ---- The table -------------------------------------------------------------------------------------------------------

# Of Student's t, two-sided 95 %, by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def interval(differences: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval."""
    spread = statistics.stdev(differences) / len(differences) ** 0.5
    return statistics.mean(differences), T95[len(differences) - 1] * spread


def markdown(found: dict[str, list[dict[str, float]]]) -> str:
    """found: by model, the accuracies of each seed."""
    lines = ["| accuracy on Fashion-MNIST, % | " + " | ".join(f"{model} | to dense" for model in found) + " |"]
    lines.append("|---" + "|--:" * 2 * len(found) + "|")
    for way in next(iter(found.values()))[0]:
        cells = []
        for seeds in found.values():
            cells.append(f"{statistics.mean(one[way] for one in seeds):.2f}")
            mean, half = interval([one[way] - one[DENSE] for one in seeds])
            cells.append("" if way == DENSE else f"{mean:+.2f} ± {half:.2f}")
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
