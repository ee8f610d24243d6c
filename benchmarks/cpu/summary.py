"""What the rows say: geometric means by regime beside what this project holds itself to, losses, and README's table."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from benchmarks.cpu import ceilings
from benchmarks.cpu.cell import ONNX, OURS, Row


@dataclass(frozen=True)
class Regime:
    """Rows that belong together. floors, goals: ratios by dtype; the goal is what is thought possible.

    They were set against some of torch's paths: `without` names the rivals that do not count there.
    """

    title: str
    holds: Callable[[Row], bool]
    floors: dict[str, float] = field(default_factory=dict)
    goals: dict[str, float] = field(default_factory=dict)
    without: tuple[str, ...] = (ONNX,)


def _by_dtype(float32: float, bfloat16: float, int8: float) -> dict[str, float]:
    return {"float32": float32, "bfloat16": bfloat16, "int8": int8}


def _tokens(*counts: int) -> Callable[[Row], bool]:
    return lambda row: row["M"] in counts


REGIMES = {
    "linear": [
        Regime(
            "M = 1 cold, 4096 x 4096 and up",
            lambda row: row["M"] == 1 and row["cache"] == "cold" and row["K"] * row["N"] >= 4096 * 4096,
            _by_dtype(1.8, 2.0, 1.1),
            _by_dtype(2.3, 2.4, 1.5),
        ),
        Regime("M = 1", _tokens(1)),
        Regime("M = 8, 16", _tokens(8, 16), _by_dtype(1.4, 1.6, 1.5), _by_dtype(1.9, 2.0, 2.0)),
        Regime("M = 64, 197", _tokens(64, 197), _by_dtype(1.4, 1.37, 1.5), _by_dtype(1.6, 1.55, 1.75)),
        Regime("M = 1576", _tokens(1576), _by_dtype(1.3, 1.35, 1.3), _by_dtype(1.5, 1.5, 1.5)),
    ],
    "conv": [
        Regime(title, lambda row, title=title: row["network"] == title)
        for title in ("ResNet-50", "MobileNetV2 1x1", "SRGAN")
    ],
    "encoders": [
        Regime(
            "ViT-B, against torch's default path",
            lambda row: row["model"] == "ViT-B",
            _by_dtype(1.35, 1.35, 1.2),
            _by_dtype(1.7, 1.5, 1.5),
            without=(ONNX, "oneDNN prepacked"),
        ),
        *(
            Regime(title, lambda row, title=title: row["model"] == title)
            for title in ("ViT-B", "DeiT-S", "DINOv2 ViT-S/14", "MiniLM")
        ),
    ],
}


def geometric_mean(numbers: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, numbers)) / len(numbers))


def ratio(row: Row, without: Iterable[str] = ()) -> float:
    """The fastest rival's median over ours, of those whose name does not start with one of `without`."""
    rivals = [s[0] for name, s in row["seconds"].items() if not name.startswith((OURS, *without))]
    return float(min(rivals) / row["seconds"][OURS][0])


def means(family: str, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each regime and dtype, what was found and what was wanted."""
    found = []
    timed = [row for row in rows if "seconds" in row]
    for regime in REGIMES[family]:
        for dtype in dict.fromkeys(row["dtype"] for row in timed):
            mine = [row for row in timed if row["dtype"] == dtype and regime.holds(row)]
            if not mine:
                continue
            every, counted = [ratio(row) for row in mine], [ratio(row, regime.without) for row in mine]
            found.append(
                {
                    "regime": regime.title,
                    "dtype": dtype,
                    "cells": len(mine),
                    "losses": sum(one < 1 for one in every),
                    "mean": round(geometric_mean(every), 3),
                    "range": [round(min(every), 3), round(max(every), 3)],
                    "against torch": round(geometric_mean(counted), 3),
                    "floor": regime.floors.get(dtype),
                    "goal": regime.goals.get(dtype),
                }
            )
    return found


def means_table(found: list[dict[str, Any]]) -> Table:
    table = Table(title="geometric mean of fastest dense / sparse24", title_justify="left")
    for column in ("regime", "dtype", "cells", "of all (range)", "losses", "of torch", "floor", "ambitious"):
        table.add_column(column, justify="left" if column in ("regime", "dtype") else "right")
    for row in found:
        floor, goal, against = row["floor"], row["goal"], row["against torch"]
        colour = "" if floor is None else "[red]" if against < floor else "[green]" if against >= goal else "[yellow]"
        table.add_row(
            *(row["regime"], row["dtype"], str(row["cells"])),
            f"{row['mean']:.2f} ({row['range'][0]:.2f} to {row['range'][1]:.2f})",
            f"[red]{row['losses']}" if row["losses"] else "",
            f"{colour}{against:.2f}",
            *("" if number is None else f"{number:.2f}" for number in (floor, goal)),
        )
    return table


def losses(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each cell in which a dense path is faster."""
    for row in rows:
        if "seconds" in row and ratio(row) < 1:
            low, high = row["ratio"][1:]
            yield f"{place_text(row)}: {ratio(row):.2f} ({low:.2f} to {high:.2f}) of {row['best']}"


def refusals(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each reason why cells were skipped."""
    reasons = Counter((row["dtype"], row["refused"]) for row in rows if "refused" in row)
    for (dtype, reason), count in reasons.items():
        yield f"{count} cells of {dtype}: {reason}"


def place_text(row: Row) -> str:
    """The cell's place in words."""
    measured = ("seconds", "ratio", "best", "refused", "took_s", "weight_bytes", "layers")
    return ", ".join(f"{name} {value}" for name, value in row.items() if name not in measured)


def of_port_limit(rows: Sequence[Row], by_threads: dict[str, ceilings.Ceilings]) -> list[dict[str, Any]]:
    """By dtype, threads and tokens: the geometric mean of what linear cells reach of what the machine allows.

    Small M counts with cold weights, where memory is the limit; large M with hot ones.
    """
    found = []
    counted = [row for row in rows if "seconds" in row and (row["cache"] == "cold" or row["M"] >= 64)]
    keys = dict.fromkeys((row["dtype"], row["threads"], row["M"]) for row in counted)
    for key in sorted(keys, key=lambda key: (list(dict.fromkeys(k[0] for k in keys)).index(key[0]), *key[1:])):
        mine = [row for row in counted if (row["dtype"], row["threads"], row["M"]) == key]
        limits = by_threads[str(key[1])]
        shares = [ceilings.flops(row) * 1e-9 / row["seconds"][OURS][0] / ceilings.of(row, limits) for row in mine]
        names = ("dtype", "threads", "M")
        found.append(dict(zip(names, key, strict=True)) | {"share": round(geometric_mean(shares), 3)})
    return found


def limit_table(found: list[dict[str, Any]]) -> Table:
    """% of the limit, M across."""
    tokens = sorted({row["M"] for row in found})
    table = Table(title="% of the port or memory limit (geometric mean over the shapes)", title_justify="left")
    for column in ("dtype", "threads", *(f"M = {count}" for count in tokens)):
        table.add_column(column, justify="left" if column == "dtype" else "right")
    shares = {(row["dtype"], row["threads"], row["M"]): row["share"] for row in found}
    for dtype, threads in dict.fromkeys((row["dtype"], row["threads"]) for row in found):
        cells = [shares.get((dtype, threads, count)) for count in tokens]
        table.add_row(dtype, str(threads), *("" if share is None else f"{100 * share:.0f}" for share in cells))
    return table


# ---- README.md and docs/cpu.md ---------------------------------------------------------------------------------------


def marked(name: str, table: str) -> str:
    """The table between comments that name its source."""
    return f"<!-- {name}: python -m benchmarks.cpu --markdown -->\n{table}\n<!-- end of {name} -->"


def means_markdown(results: Sequence[dict[str, Any]]) -> str:
    """docs/cpu.md's table: the geometric mean of each regime, range and losses."""
    means = [row for result in results for row in result["means"]]
    dtypes = list(dict.fromkeys(row["dtype"] for row in means))
    lines = [_line(["", *dtypes]), _line(["---"] + ["--:"] * len(dtypes))]
    for regime in dict.fromkeys(row["regime"] for row in means):
        mine = {row["dtype"]: row for row in means if row["regime"] == regime}
        lines.append(_line([regime, *(_mean(mine[dtype]) if dtype in mine else "" for dtype in dtypes)]))
    return "\n".join(lines)


def _mean(row: dict[str, Any]) -> str:
    losses = f", {row['losses']} of {row['cells']} lost" if row["losses"] else ""
    return f"{row['mean']:.2f} ({row['range'][0]:.2f}–{row['range'][1]:.2f}{losses})"


def markdown(result: dict[str, Any]) -> str:
    """README.md's table of the encoders, and what it means."""
    about, rows = result["about"], [row for row in result["rows"] if "seconds" in row]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    head = ["encoder", "batch", "threads", *(cell for dtype in dtypes for cell in (f"{dtype}, ms", "gain"))]
    head.append("dense float32 → 2:4 int8")
    lines = [_line(head), _line(["---"] + ["--:"] * (len(head) - 1))]
    for model, batch, threads in dict.fromkeys((row["model"], row["batch"], row["threads"]) for row in rows):
        place = {"model": model, "batch": batch, "threads": threads}
        mine = {row["dtype"]: row for row in rows if place.items() <= row.items()}
        cells = [model, str(batch), str(threads)]
        for dtype in dtypes:
            cells += _cells(mine[dtype]) if dtype in mine else ["", ""]
        cells.append(_from_float32_to_int8(mine))
        lines.append(_line(cells))
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    notes = [
        "ms: of the fastest dense path of the same dtype → of 2:4; gain: median (20th–80th percentile) of rounds that "
        "run all in turn. Dense is torch's own layers, oneDNN prepacked or the whole model exported to onnxruntime; of "
        "int8 quantize_dynamic of either; the last column is over torch's own float32 layers.",
        "Everything through the public modules; but for onnxruntime only the linear layers differ, attention and norms "
        "are torch's own.",
        f"{about['cpu']}, {about['kernels']} kernels, {about['date'][:10]}, commit {about['commit']}. {versions}.",
    ]
    return "\n".join([*lines, "", *(f"* {note}" for note in notes)])


def _cells(row: Row) -> list[str]:
    dense, ours = row["seconds"][row["best"]][0], row["seconds"][OURS][0]
    median, low, high = row["ratio"]
    loss = " loss" if median < 1 else ""
    return [f"{1e3 * dense:.1f} → {1e3 * ours:.1f}", f"{median:.2f}x ({low:.2f}–{high:.2f}){loss}"]


def _from_float32_to_int8(by_dtype: dict[str, Row]) -> str:
    if not {"float32", "int8"} <= by_dtype.keys():
        return ""
    return f"{by_dtype['float32']['seconds']['dense'][0] / by_dtype['int8']['seconds'][OURS][0]:.1f}x"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
