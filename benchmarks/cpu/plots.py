"""The pictures of the results: ratio by shape and tokens, and the roofline. Drawn from the JSON alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import NullFormatter  # noqa: E402

from benchmarks.cpu import ceilings  # noqa: E402
from benchmarks.cpu.cell import OURS, Row  # noqa: E402

DENSE, SPARSE, LOSS = "#9aa5b1", "#1f6feb", "#d1242f"


def linear_ratios(rows: Sequence[Row], path: Path) -> None:
    """One panel a dtype; groups by cache and M, in each the shapes in order; filled: one thread, hollow: two."""
    timed = [row for row in rows if "seconds" in row]
    dtypes = list(dict.fromkeys(row["dtype"] for row in timed))
    shapes = list(dict.fromkeys((row["K"], row["N"]) for row in timed))
    groups = sorted({(row["cache"], row["M"]) for row in timed}, key=lambda group: (group[0] == "hot", group[1]))
    colours = pyplot.get_cmap("viridis").resampled(max(2, len(shapes)))
    figure, panels = _panels(len(dtypes), 2.1)
    for axes, dtype in zip(panels, dtypes, strict=True):
        for row in timed:
            if row["dtype"] != dtype:
                continue
            shape = shapes.index((row["K"], row["N"]))
            x = groups.index((row["cache"], row["M"])) + (shape + 0.5) / len(shapes) * 0.84 - 0.42
            _point(axes, x, row, colours(shape))
        axes.set_xticks(range(len(groups)), [f"{cache}\nM = {tokens}" for cache, tokens in groups])
        _ratio_axis(axes, dtype)
    handles = [pyplot.Line2D([], [], marker="o", ls="", color=colours(i)) for i in range(len(shapes))]
    labels = [f"{columns} x {outputs}" for columns, outputs in shapes]
    _legend(figure, handles, labels, columns=5)
    _write(figure, path)


def conv_ratios(rows: Sequence[Row], path: Path) -> None:
    """One panel a dtype, the layers of each network in a row."""
    timed = [row for row in rows if "seconds" in row]
    dtypes = list(dict.fromkeys(row["dtype"] for row in timed))
    layers = list(dict.fromkeys((row["network"], row["layer"]) for row in timed))
    networks = list(dict.fromkeys(network for network, _ in layers))
    colours = pyplot.get_cmap("viridis").resampled(max(2, len(networks)))
    figure, panels = _panels(len(dtypes), 2.6)
    for axes, dtype in zip(panels, dtypes, strict=True):
        for row in timed:
            if row["dtype"] == dtype:
                x = layers.index((row["network"], row["layer"]))
                _point(axes, x, row, colours(networks.index(row["network"])))
        axes.set_xticks(range(len(layers)), [layer for _, layer in layers], rotation=90, fontsize=6)
        _ratio_axis(axes, dtype)
    handles = [pyplot.Line2D([], [], marker="o", ls="", color=colours(i)) for i in range(len(networks))]
    _legend(figure, handles, networks, columns=3)
    _write(figure, path)


def _point(axes: Axes, x: float, row: Row, colour: Any) -> None:
    """A ratio with its spread. Hollow: two threads or more."""
    median, low, high = row["ratio"]
    fill = colour if row["threads"] == 1 else "white"
    axes.errorbar(
        x, median, yerr=[[median - low], [high - median]], fmt="o", ms=3.5, lw=0.8, color=colour, mfc=fill, mew=0.8
    )


def _ratio_axis(axes: Axes, title: str) -> None:
    axes.set_yscale("log", base=2)
    ticks = [0.5, 0.7, 1, 1.4, 2, 2.8, 4, 5.6, 8]
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.9), max(high, 2))
    low, high = axes.get_ylim()
    axes.set_yticks([tick for tick in ticks if low <= tick <= high], [f"{t:g}" for t in ticks if low <= t <= high])
    axes.minorticks_off()
    axes.axhline(1, color=LOSS, lw=1)
    axes.grid(axis="y", lw=0.3)
    axes.set_title(f"{title}: fastest dense / 2:4", fontsize=9, loc="left")


def roofline(rows: Sequence[Row], limits: ceilings.Ceilings, path: Path) -> None:
    """One thread: dense-equivalent rate over operational intensity, below what memory and ports allow.

    Weights are cold up to M = 16 and hot from M = 64.
    """
    timed = [row for row in rows if "seconds" in row and row["threads"] == 1]
    timed = [row for row in timed if row["cache"] == "cold" or row["M"] >= 64]
    dtypes = list(dict.fromkeys(row["dtype"] for row in timed))
    figure, panels = _panels(len(dtypes), 2.6, columns=2)
    for axes, dtype in zip(panels, dtypes, strict=True):
        mine = [row for row in timed if row["dtype"] == dtype]
        at = [ceilings.intensity(row) for row in mine]
        for name, colour in ((None, DENSE), (OURS, SPARSE)):
            seconds = [row["seconds"][name or row["best"]][0] for row in mine]
            rates = [ceilings.flops(row) / s * 1e-9 for row, s in zip(mine, seconds, strict=True)]
            axes.plot(at, rates, "o", ms=3, color=colour, label="2:4" if name else "fastest dense, at the same place")
        dense = limits[ceilings.arithmetic(dtype)]
        ends = [min(at) / 2, max(at) * 2]
        line = [ends[0] * 1.02**i for i in range(2000) if ends[0] * 1.02**i <= ends[1]]
        roof = [min(ceilings.products(dtype, limits), x * limits["memory"]) for x in line]
        axes.plot(line, roof, color=SPARSE, lw=1, label="limit: memory, then products")
        axes.plot(ends, [dense, dense], color=DENSE, lw=1, ls="--", label="dense peak")
        axes.loglog()
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_formatter(NullFormatter())
        axes.grid(lw=0.3)
        axes.set_title(f"{dtype}, 1 thread", fontsize=9, loc="left")
        axes.set_ylabel("GFLOP/s, dense-equivalent", fontsize=8)
    for axes in panels[-2:]:
        axes.set_xlabel("operations a byte of packed weight, x and y", fontsize=8)
    _legend(figure, *panels[0].get_legend_handles_labels(), columns=2)
    _write(figure, path)


def encoders(rows: Sequence[Row], path: Path) -> None:
    """Time of 2:4 relative to the fastest dense path of its dtype, by model, batch and threads."""
    timed = [row for row in rows if "seconds" in row]
    dtypes = list(dict.fromkeys(row["dtype"] for row in timed))
    figure, panels = _panels(len(dtypes), 2.2)
    for axes, dtype in zip(panels, dtypes, strict=True):
        mine = [row for row in timed if row["dtype"] == dtype]
        for place, row in enumerate(mine):
            median, low, high = (1 / gain for gain in row["ratio"])
            colour = LOSS if median > 1 else SPARSE
            error = [[median - high], [low - median]]
            axes.bar(place, median, 0.6, yerr=error, color=colour, error_kw={"lw": 0.8})
            dense_ms, ours_ms = (1e3 * row["seconds"][name][0] for name in (row["best"], OURS))
            text = f"{row['ratio'][0]:.2f}x\n{dense_ms:.3g} →\n{ours_ms:.3g} ms"
            axes.annotate(text, (place, 0.03), ha="center", va="bottom", fontsize=6, color="white")
        labels = [f"{row['model'].split(' ')[0]}\nbatch {row['batch']}, {row['threads']} T" for row in mine]
        axes.set_xticks(range(len(mine)), labels, fontsize=6)
        axes.axhline(1, color=DENSE, lw=1)
        axes.set_title(f"{dtype}: time of 2:4, fastest dense = 1", fontsize=9, loc="left")
    _write(figure, path)


def _panels(count: int, height: float, columns: int = 1) -> tuple[Any, list[Axes]]:
    """`count` panels, row by row."""
    rows = -(-count // columns)
    size = (10, 0.6 + height * rows)
    figure, grid = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=7)
    for axes in grid.flat[count:]:
        axes.remove()
    return figure, list(grid.flat)[:count]


def _legend(figure: Any, handles: Sequence[Any], labels: Sequence[str], columns: int) -> None:
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def _write(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
