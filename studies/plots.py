"""The plots of docs/training.md and docs/quantisation.md: what each way does to each model, with intervals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from studies import fashion, quantised_fashion, quantised_speed, quantised_trained, trained
from studies.quantised import DENSE, FLOAT, POST, TRAINED


def draw(one: Callable[[Any, str, Any], None], found: dict[str, Any], path: Path) -> None:
    """one(axis, model, results) for each model, three side by side."""
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.5 * columns, 3.6 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat[len(found) :]:
        axis.remove()
    for axis, (model, results) in zip(axes.flat, found.items(), strict=False):
        one(axis, model, results)
        axis.set_title(model, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def differences(axis: Any, _: str, seeds: list[dict[str, float]]) -> None:
    """Points of accuracy lost or gained to the dense model of the same seed: every seed, and the 95 % interval."""
    ways = [way for way in seeds[0] if way != fashion.DENSE]
    for place, way in enumerate(ways):
        _interval(axis, -place, [one[way] - one[fashion.DENSE] for one in seeds], "C0")
    _ways(axis, ways)


def rounded(axis: Any, _: str, seeds: list[quantised_fashion.Found]) -> None:
    """The same of each base and format, post-training and trained."""
    ways = [(base, name) for base, formats in seeds[0].items() for name in formats]
    for place, (base, name) in enumerate(ways):
        for stage, color, shift in ((POST, "C0", 0.17), (TRAINED, "C2", -0.17)):
            if (base, name, stage) != (DENSE, FLOAT, POST):
                found = quantised_fashion.to_dense(seeds, base, name, stage)
                _interval(axis, shift - place, found, color, stage if place == 1 else None)
    _ways(axis, [f"{base}, {name}" for base, name in ways])
    axis.legend(fontsize=7)


def rounded_photographs(axis: Any, model: str, bases: dict[str, quantised_trained.Found]) -> None:
    """What each photograph loses or gains to the dense float model, by base and format, and the mean of them."""
    ways = [(base, name) for base, formats in bases.items() for name in formats]
    dense = bases[DENSE][FLOAT][POST]
    for place, (base, name) in enumerate(ways):
        for stage, color, shift in ((POST, "C0", 0.17), (TRAINED, "C2", -0.17)):
            values = bases[base][name].get(stage)
            if values and (base, name) != (DENSE, FLOAT):
                found = [value - best for value, best in zip(values, dense, strict=True)]
                axis.plot(found, [shift - place] * len(found), "|", color="C1")
                label = stage if place == 1 else None
                axis.plot(sum(found) / len(found), shift - place, "o", color=color, markersize=4, label=label)
    _ways(axis, [f"{base}, {name}" for base, name in ways], f"{trained.MODELS[model].unit} to dense")
    axis.legend(fontsize=7)


def latencies(axis: Any, _: str, ways: quantised_speed.Found) -> None:
    """Milliseconds of each row, median and middle 60 %, and the bytes that its model holds."""
    for place, (way, row) in enumerate(ways.items()):
        ms = row["latency_ms"]
        spread = [[ms["median"] - ms["p20"]], [ms["p80"] - ms["median"]]]
        color = "0.6" if way.startswith(DENSE) else "C0"
        axis.barh(-place, ms["median"], xerr=spread, color=color, error_kw={"capsize": 3, "linewidth": 0.8})
        axis.text(0, -place, f" {row['resident'] / 1e6:.3g} MB", fontsize=7, va="center")
    axis.set_yticks([-place for place in range(len(ways))], list(ways), fontsize=8)
    axis.set_xlabel("ms", fontsize=8)


def _interval(axis: Any, y: float, found: list[float], color: str, label: str | None = None) -> None:
    mean, half = fashion.interval(found)
    axis.errorbar(mean, y, xerr=half, fmt="o", color=color, capsize=3, markersize=4, label=label)
    axis.plot(found, [y] * len(found), "|", color="C1")


def _ways(axis: Any, ways: list[str], label: str = "points of accuracy to dense") -> None:
    axis.set_yticks([-place for place in range(len(ways))], ways, fontsize=8)
    axis.axvline(0, color="0.6", linewidth=0.8)
    axis.set_xlabel(label, fontsize=8)


def stages(axis: Any, model: str, methods: dict[str, dict[str, Any]]) -> None:
    """Each photograph's quality, dense, one-shot and distilled, by method."""
    stages = ("dense", "one-shot", "distilled")
    for number, (method, found) in enumerate(methods.items()):
        means = [sum(found[stage]) / len(found[stage]) for stage in stages]
        axis.plot(stages, means, "o-", color=f"C{number}", label=method)
        for stage in stages:
            axis.plot([stage] * len(found[stage]), found[stage], ".", color=f"C{number}", markersize=3)
    axis.set_ylabel(trained.MODELS[model].unit, fontsize=8)
    axis.legend(fontsize=7)
