"""The demo's picture: a held-out photograph restored by each model, and the latencies of the vision model."""

from pathlib import Path

import matplotlib
from matplotlib import pyplot
from torch import Tensor

from demo.photographs import centre
from demo.results import BATCHES, Row

ZOOM = 96  # pixels of the pictures that are shown
DENSE, SPARSE = "#9aa5b1", "#1f6feb"


def draw(pictures: dict[str, Tensor], restored: list[Row], timed: list[Row], path: Path) -> None:
    """Write the PNG. pictures: [3, H, W] by title, in the order shown; restored: the rows that made them."""
    matplotlib.use("agg")
    quality = {row.model: row.quality[0] for row in restored}
    rows = [row for row in timed if row.latency_ms]
    figure = pyplot.figure(figsize=(11, 2.9 + 0.28 * len(rows)), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[2.6, 0.3 + 0.28 * len(rows)])

    for axes, (title, picture) in zip(above.subplots(1, len(pictures)), pictures.items(), strict=True):
        axes.imshow(centre(picture, ZOOM).permute(1, 2, 0).numpy(), interpolation="nearest")
        below_title = f"{quality[title]:.2f} dB" if title in quality else ""
        axes.set_title("\n".join([*title.split(", "), below_title]), fontsize=9)
        axes.axis("off")

    names = [row.model for row in rows]
    colours = [SPARSE if row.gain else DENSE for row in rows]
    for axes, batch in zip(below.subplots(1, len(BATCHES), sharey=True), BATCHES, strict=True):
        spreads = [row.latency_ms[batch] for row in rows]
        errors = [[s.median - s.p20 for s in spreads], [s.p80 - s.median for s in spreads]]
        axes.barh(names, [s.median for s in spreads], xerr=errors, color=colours, error_kw={"lw": 1})
        axes.set_xlabel(f"ms, batch {batch}")
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    below.axes[1].invert_yaxis()  # the axis is shared: inverted once is enough
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
