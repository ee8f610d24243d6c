"""What all measuring here shares: contenders timed in turns, spreads, the facts about the machine, results as JSON."""

from __future__ import annotations

import json
import platform
import random
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytest_benchmark.plugin import pytest_benchmark_generate_machine_info
from pytest_benchmark.stats import Stats
from pytest_benchmark.utils import get_commit_info

import sparse24
from sparse24 import ops

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LONG_S, SLOW_S = 0.1, 20.0


# ---- Timing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """Where the middle of some samples lies, and between which values the middle 60 % of them."""

    median: float
    p20: float
    p80: float
    samples: int

    to_dict = asdict

    @classmethod
    def of(cls, samples: Iterable[float]) -> Spread:
        values = np.fromiter(samples, float)
        p20, median, p80 = np.percentile(values, [20, 50, 80])
        return cls(float(median), float(p20), float(p80), len(values))

    def text(self, unit: float = 1e-3) -> str:
        return f"{self.median / unit:.2f}  [{self.p20 / unit:.2f}, {self.p80 / unit:.2f}]"


def turns(
    calls: Mapping[str, Callable[[], object]],
    rounds: Iterable[object],
    length: int | Mapping[str, int],
    clock: Callable[[], float] = time.perf_counter,
    pauses: Mapping[str, float] | None = None,
) -> dict[str, list[Stats]]:
    """Seconds of each call: pytest-benchmark's Stats of each of its turns.

    In every round each callable has one turn of `length` calls in a row, in an order shuffled anew, so that whatever
    else the machine does hits all alike. The first call of a turn, which finds the caches as others left them, is left
    out unless it is the only one. Turns of one round belong together: ratios are taken round by round.
    pauses: seconds of rest before each turn of a call that brings threads of its own, so that those of OpenMP, which
    spin for some 10 ms after their last loop, leave it the cores.
    """
    lengths = length if isinstance(length, Mapping) else dict.fromkeys(calls, length)
    result: dict[str, list[Stats]] = {name: [] for name in calls}
    order = list(calls)
    shuffle = random.Random(0).shuffle
    for _ in rounds:
        shuffle(order)
        for name in order:
            call, stats = calls[name], Stats()
            if pauses and name in pauses:
                time.sleep(pauses[name])
            if lengths[name] > 1:
                call()
            for _ in range(max(1, lengths[name] - 1)):
                start = clock()
                call()
                stats.update(clock() - start)
            result[name].append(stats)
    return result


def medians(turns: Mapping[str, list[Stats]]) -> dict[str, list[float]]:
    """One number a turn."""
    return {name: [float(turn.median) for turn in mine] for name, mine in turns.items()}


def interleaved(calls: Mapping[str, Callable[[], object]], rounds: int, slice_s: float = 0.05) -> dict[str, Spread]:
    """The spread of all runs of each call, in turns of slice_s seconds, or of one call where that is longer."""
    lengths = {name: max(1, int(slice_s / once)) for name, once in _once(calls).items()}
    timed = turns(calls, range(rounds), lengths)
    return {name: Spread.of(second for turn in mine for second in turn.data) for name, mine in timed.items()}


def within(
    calls: Mapping[str, Callable[[], object]],
    budget_s: float,
    rounds: int = 7,
    least_rounds: int = 3,
    pauses: Mapping[str, float] | None = None,
    first_s: Mapping[str, float] | None = None,
) -> dict[str, list[float]]:
    """The median second of each turn, of as many rounds and as long turns as fit into about budget_s seconds.

    Fast calls get `rounds` rounds with many calls in a turn. Slow ones get least_rounds of one call each, of which the
    first is the one by which they were found to be slow; a round of more than SLOW_S seconds is the only one.
    first_s: what calls took that were made already, if any.
    """
    once = _once(calls, pauses, first_s)
    round_s = sum(once.values())
    if round_s * least_rounds > budget_s:
        more = range(0 if round_s > SLOW_S else least_rounds - 1)
        timed = medians(turns(calls, more, 1, pauses=pauses))
        return {name: [once[name], *timed[name]] for name in calls}
    rounds = min(rounds, int(budget_s / round_s))
    slice_s = budget_s / rounds / len(calls)
    lengths = {name: max(1, int(slice_s / one)) for name, one in once.items()}
    return medians(turns(calls, range(rounds), lengths, pauses=pauses))


def _once(
    calls: Mapping[str, Callable[[], object]],
    pauses: Mapping[str, float] | None = None,
    first_s: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """What a call takes. The first call may set things up, so only a long one counts as it is."""
    seconds = {}
    for name, call in calls.items():
        if first_s and first_s.get(name, 0) > LONG_S:
            seconds[name] = first_s[name]
            continue
        time.sleep(pauses.get(name, 0) if pauses else 0)
        for _ in range(2):
            start = time.perf_counter()
            call()
            seconds[name] = time.perf_counter() - start
            if seconds[name] > LONG_S:
                break
    return seconds


def ratio(slow: list[float], fast: list[float]) -> Spread:
    """How many times faster the second is: the spread of the ratios within each round."""
    return Spread.of(a / b for a, b in zip(slow, fast, strict=True))


def milliseconds(spread: Iterable[float]) -> str:
    """A median with its 20th and 80th percentile, in seconds, as text."""
    median, low, high = (1e3 * second for second in spread)
    return f"{median:.3g} [{low:.3g}, {high:.3g}]"


# ---- The machine -----------------------------------------------------------------------------------------------------


def cpu() -> str:
    """The processor's name, with family and model number where they are known: some names are shared by many."""
    info = pytest_benchmark_generate_machine_info()["cpu"]
    name = info.get("brand_raw") or platform.processor() or platform.machine()
    return f"{name} (family {info['family']}, model {info['model']})" if "family" in info else name


def commit() -> str:
    """HEAD, and whether anything but results, which a run before this one may have written, differs from it."""
    sources = ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"]
    changed = subprocess.run(sources, cwd=ROOT, capture_output=True, text=True).stdout
    return str(get_commit_info()["id"][:7]) + ("-dirty" if changed else "")


def machine() -> dict[str, Any]:
    """What a reader needs to know about where the numbers come from."""
    info = pytest_benchmark_generate_machine_info()
    return {
        "cpu": info["cpu"].get("brand_raw") or info["machine"],
        "cpu family, model": f"{info['cpu'].get('family')}, {info['cpu'].get('model')}",
        "cpus": info["cpu"].get("count"),
        "isa": ops.cpu_isa(),
        "torch": torch.__version__,
        "python": info["python_version"],
        "sparse24": sparse24.__version__,
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def stem(text: str) -> str:
    """As a part of a file's name: lower case, words joined by "-"."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def save(name: str, content: dict[str, Any]) -> Path:
    """Writes benchmarks/results/<name>.json with the machine's facts in front."""
    path = RESULTS / f"{name}.json"
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": machine()} | content, indent=1) + "\n")
    return path
