"""The plots of docs/training.md: what each way to 2:4 does, with intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from studies import fashion, trained


def draw(study: str, found: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(1, len(found), figsize=(4.5 * len(found), 3.6), layout="constrained")
    for axis, (model, results) in zip(axes, found.items(), strict=True):
        if study == "fashion":
            _differences(axis, results)
        else:
            _stages(axis, model, results)
        axis.set_title(model, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _differences(axis: Any, seeds: list[dict[str, float]]) -> None:
    """Points of accuracy lost or gained to the dense model of the same seed: every seed, and the 95 % interval."""
    ways = [way for way in seeds[0] if way != fashion.DENSE]
    for place, way in enumerate(ways):
        differences = [one[way] - one[fashion.DENSE] for one in seeds]
        mean, half = fashion.interval(differences)
        axis.errorbar(mean, -place, xerr=half, fmt="o", color="C0", capsize=3)
        axis.plot(differences, [-place] * len(differences), "|", color="C1")
    axis.set_yticks([-place for place in range(len(ways))], ways, fontsize=8)
    axis.axvline(0, color="0.6", linewidth=0.8)
    axis.set_xlabel("points of accuracy to dense", fontsize=8)


def _stages(axis: Any, model: str, methods: dict[str, dict[str, Any]]) -> None:
    """Each photograph's quality, dense, one-shot and distilled, by method."""
    stages = ("dense", "one-shot", "distilled")
    for number, (method, found) in enumerate(methods.items()):
        means = [sum(found[stage]) / len(found[stage]) for stage in stages]
        axis.plot(stages, means, "o-", color=f"C{number}", label=method)
        for stage in stages:
            axis.plot([stage] * len(found[stage]), found[stage], ".", color=f"C{number}", markersize=3)
    axis.set_ylabel(trained.MODELS[model].unit, fontsize=8)
    axis.legend(fontsize=7)
