"""Fashion-MNIST: what rounding does to accuracy, after training and trained with it, dense and sparse, over seeds.

All models of a seed come from one dense model: trained by the schedule of fashion.py, pruned or not, trained by it once
more. Then each is rounded and measured, trained on for a third of an epoch at a tenth of the learning rate and measured
again; float models too, so that what more training gives is not taken for what rounding in training gives.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

import sparse24
from studies.fashion import MODELS, Data, converted, interval
from studies.quantised import BASES, DENSE, FLOAT, POST, TRAINED, quantised

SHORT = {"length": 1 / 9, "pace": 0.1}  # a third of an epoch

Found = dict[str, dict[str, dict[str, float]]]  # by base and format, the accuracies of POST and TRAINED


def bases(data: Data, model: str, seed: int) -> Iterator[tuple[str, nn.Module]]:
    torch.manual_seed(seed)
    dense = MODELS[model]()
    data.train(dense, seed)
    for name in BASES:
        base = copy.deepcopy(dense)
        if name != DENSE:
            sparse24.prune(base, name, skip=sparse24.paper_skips())
        data.train(base, seed + 1000)
        yield name, base


def job(folder: Path, model: str, seed: int) -> Found:
    """Of one model and seed, on one thread."""
    torch.set_num_threads(1)
    data = Data(folder)
    found: Found = {}
    for base, trained in bases(data, model, seed):
        found[base] = {}
        for name in (FLOAT, *BASES[base]):
            one = quantised(trained, name, sparse24.paper_skips(), data.calibration())
            found[base][name] = {POST: data.accuracy(converted(one))}
            data.train(one, seed + 2000, **SHORT)
            found[base][name][TRAINED] = data.accuracy(converted(one))
    return found


# ---- The table -------------------------------------------------------------------------------------------------------


def markdown(found: dict[str, list[Found]]) -> str:
    """found: by model, what job() returned for each seed."""
    head = " | ".join(f"{model} | to dense | {TRAINED} | to dense" for model in found)
    lines = [f"| accuracy on Fashion-MNIST, % | {head} |", "|---" + "|--:" * 4 * len(found) + "|"]
    for base, formats in next(iter(found.values()))[0].items():
        for name in formats:
            cells = []
            for seeds in found.values():
                for stage in (POST, TRAINED):
                    cells.append(f"{statistics.mean(one[base][name][stage] for one in seeds):.2f}")
                    differences = to_dense(seeds, base, name, stage)
                    cells.append("{:+.2f} ± {:.2f}".format(*interval(differences)) if any(differences) else "")
            lines.append(f"| {base}, {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def to_dense(seeds: list[Found], base: str, name: str, stage: str) -> list[float]:
    """Points of accuracy to the dense float model of the same seed, before it was trained on."""
    return [one[base][name][stage] - one[DENSE][FLOAT][POST] for one in seeds]
