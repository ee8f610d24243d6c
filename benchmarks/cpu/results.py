"""What a run keeps: each cell as it comes, so that an interrupted run can go on; in the end one JSON a family."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.cpu.cell import Place, Row

KEPT = measure.ROOT / ".cache"
PACKAGES = ("torch", "onnxruntime", "transformers", "numpy")


def about() -> dict[str, Any]:
    """The machine, the software and the day."""
    machine = measure.machine()
    return {
        "cpu": measure.cpu(),
        "cpus": machine["cpus"],
        "kernels": machine["isa"],
        "versions": {"sparse24": machine["sparse24"], "python": machine["python"]}
        | {name: version(name) for name in PACKAGES},
        "commit": machine["commit"],
        "date": machine["date"],
    }


class Rows:
    """The rows of a family so far, kept in a file of one line a row below a line about the machine.

    resume: go on with the rows there are, if they come from this machine, software and commit.
    file: None keeps nothing.
    """

    def __init__(self, about: dict[str, Any], file: Path | None, resume: bool) -> None:
        self.rows: list[Row] = []
        self.file = file
        if file is None:
            return
        same = {name: value for name, value in about.items() if name != "date"}
        if resume and file.exists():
            first, *rows = (json.loads(line) for line in file.read_text().splitlines())
            if first != same:
                raise SystemExit(f"{file} is of another machine or commit: run without --resume")
            self.rows = rows
        else:
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(same) + "\n")

    def find(self, place: Place) -> Row | None:
        return next((row for row in self.rows if place.items() <= row.items()), None)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        if self.file is not None:
            with self.file.open("a") as lines:
                lines.write(json.dumps(row) + "\n")


def path_of(family: str, cpu: str, folder: Path = measure.RESULTS) -> Path:
    return folder / f"cpu-{family}-{measure.stem(cpu)}.json"


def committed(family: str, folder: Path = measure.RESULTS) -> list[Path]:
    """The results of a family, one file a machine."""
    return sorted(folder.glob(f"cpu-{family}-*.json"))


def write(path: Path, result: dict[str, Any]) -> None:
    """As JSON, one line a row."""
    *head, (last, rows) = result.items()
    assert last == "rows"
    lines = [f" {json.dumps(name)}: {json.dumps(value)},\n" for name, value in head]
    path.parent.mkdir(exist_ok=True)
    path.write_text("{\n" + "".join(lines) + ' "rows": [\n' + _joined(rows) + "\n ]\n}\n")


def _joined(rows: Iterable[Row]) -> str:
    return ",\n".join(f"  {json.dumps(row)}" for row in rows)
