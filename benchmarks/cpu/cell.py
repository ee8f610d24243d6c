"""A cell of a benchmark: one place (shape, dtype, threads, ...), its contenders, and the row that it becomes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from benchmarks import measure

OURS, ONNX = "sparse24", "onnxruntime"
Place = dict[str, Any]  # what makes a cell the one it is; plain values, as JSON has them
Row = dict[str, Any]


class Refused(Exception):
    """sparse24 does not run this cell; the message says why. The cell is skipped, and printed as such."""


@dataclass
class Cell:
    """Contenders that were checked, and facts for the row. OURS is one; other names that begin so are no rivals."""

    calls: dict[str, Callable[[], object]]
    facts: dict[str, Any] = field(default_factory=dict)
    first_s: dict[str, float] = field(default_factory=dict)  # of calls that were made already


class Family(Protocol):
    """Cells of one kind. Its places are measured in order, so that neighbours can share what is made for them."""

    name: str
    budget_s: float  # of a cell; slow cells take longer
    least_rounds: int

    def places(self) -> list[Place]: ...

    def prepare(self, place: Place) -> Cell:
        """Makes and checks the contenders. Raises Refused, or checks.Wrong."""


def run(family: Family, place: Place, budget_s: float | None = None) -> Row:
    """Checks and times one cell. "seconds" are spreads by contender; "ratio" is over the fastest rival, by round."""
    torch.set_num_threads(place["threads"])
    try:
        cell = family.prepare(place)
    except Refused as refusal:
        return place | {"refused": str(refusal)}
    with torch.inference_mode():
        # onnxruntime has threads of its own; see measure.turns.
        pauses = {ONNX: 0.015} if place["threads"] > 1 else {}
        budget_s = budget_s or family.budget_s
        samples = measure.within(cell.calls, budget_s, 7, family.least_rounds, pauses, cell.first_s)
    spreads = {name: measure.Spread.of(seconds) for name, seconds in samples.items()}
    rivals = [name for name in spreads if not name.startswith(OURS)]
    best = min(rivals, key=lambda name: spreads[name].median)
    return (
        place
        | cell.facts
        | {"best": best, "ratio": _short(measure.ratio(samples[best], samples[OURS]))}
        | {"seconds": {name: _short(spread) for name, spread in spreads.items()}}
    )


def _short(spread: measure.Spread) -> list[float]:
    """[median, 20th percentile, 80th percentile], to four digits."""
    return [float(f"{value:.4g}") for value in (spread.median, spread.p20, spread.p80)]


def attempt(make: Callable[[], Any]) -> Any:
    """What make() returns, where it is sparse24 that may refuse."""
    try:
        return make()
    except RuntimeError as error:  # what sparse24 raises for what it cannot run; anything else is a bug, and shows
        raise Refused(str(error).split("\n")[0]) from error
