"""What the demo found: rows, the JSON they are kept in, and the one table made of it for terminal and README.md."""

import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.table import Column, Table

import sparse24
from benchmarks import measure
from benchmarks.measure import Spread
from demo.needs import FLAGS, pins
from sparse24 import ops

ROOT = Path(__file__).parent.parent
COMMITTED = ROOT / "benchmarks" / "results"
BATCHES = ("1", "8")
HEAD = ["model", "quality", "resident", *(cell for batch in BATCHES for cell in (f"ms, batch {batch}", "gain"))]


@dataclass(frozen=True)
class Row:
    """One way to run a model. What was not measured is None or empty."""

    model: str
    quality: list[float]  # one number for each held-out photograph
    resident_bytes: int | None = None  # of parameters and buffers
    latency_ms: dict[str, Spread] = field(default_factory=dict)  # by batch size, one of BATCHES
    gain: dict[str, Spread] = field(default_factory=dict)  # by batch size, over the fastest dense row of its dtype


@dataclass(frozen=True)
class Section:
    """The rows of one model, and the sentences that say what they mean."""

    title: str
    unit: str  # of quality, as it follows the number
    digits: int  # of quality, after the point
    rows: list[Row]
    notes: list[str]
    facts: dict[str, Any]  # for the JSON alone


def about() -> dict[str, Any]:
    """The machine, the software and the day."""
    packages = sorted({"torch"}.union(*map(pins, FLAGS)))
    return {
        "cpu": measure.cpu(),
        "threads": torch.get_num_threads(),
        "kernels": ops.cpu_isa(),
        "date": date.today().isoformat(),
        "commit": measure.commit(),
        "versions": {"sparse24": sparse24.__version__, "python": platform.python_version()}
        | {name: version(name) for name in packages},
    }


def stem(cpu: str) -> str:
    """The name of the files that hold the results of a machine, without suffix."""
    return f"demo-{measure.stem(cpu)}"


def write(result: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(result, indent=1) + "\n")


def result(about: dict[str, Any], seconds: float, sections: list[Section]) -> dict[str, Any]:
    """All that was found, as it is written to JSON."""
    return {"about": about | {"seconds": round(seconds)}, "sections": [asdict(section) for section in sections]}


def rich_table(result: dict[str, Any]) -> Table:
    """The table for a terminal, each spread below its number."""
    table = Table(HEAD[0], *(Column(head, justify="right") for head in HEAD[1:]))
    for section in result["sections"]:
        table.add_section()
        table.add_row(f"[bold]{section['title']}")
        for cells in _cells(section):
            table.add_row(*(cell.replace(" (", "\n(") for cell in cells))
    return table


def markdown(result: dict[str, Any]) -> str:
    """The table and its notes, as README.md has them."""
    lines = [_line(HEAD), _line(["---"] + ["--:"] * (len(HEAD) - 1))]
    for section in result["sections"]:
        lines.append(_line([f"**{section['title']}**"] + [""] * (len(HEAD) - 1)))
        lines += [_line(cells) for cells in _cells(section)]
    return "\n".join([*lines, "", *(f"* {note}" for note in notes(result))])


def notes(result: dict[str, Any]) -> list[str]:
    """What the numbers are, and where they come from."""
    about = result["about"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    return [
        "Quality: mean over the held-out photographs (lowest–highest). ms and gain: median (20th–80th percentile).",
        *(note for section in result["sections"] for note in section["notes"]),
        f"{about['cpu']}, {about['threads']} threads, {about['kernels']} kernels, {about['date']}, commit "
        f"{about['commit']}, {about['seconds']} s in all. {versions}.",
    ]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(section: dict[str, Any]) -> Iterator[list[str]]:
    """The table's text for each row of a section."""
    for row in section["rows"]:
        size = row["resident_bytes"]
        cells = [row["model"], _quality(row["quality"], section), f"{size / 1e6:.1f} MB" if size else ""]
        for batch in BATCHES:
            latency, gain = row["latency_ms"].get(batch), row["gain"].get(batch)
            cells.append(_spread(latency, "{:.1f}") if latency else "")
            cells.append(_spread(gain, "{:.2f}x") + (" loss" if gain["median"] < 1 else "") if gain else "")
        yield cells


def _quality(values: list[float], section: dict[str, Any]) -> str:
    digits = section["digits"]
    least, most = min(values), max(values)
    return f"{sum(values) / len(values):.{digits}f}{section['unit']} ({least:.{digits}f}–{most:.{digits}f})"


def _spread(spread: dict[str, float], form: str) -> str:
    median, p20, p80 = (form.format(spread[key]) for key in ("median", "p20", "p80"))
    return f"{median} ({p20}–{p80})"
