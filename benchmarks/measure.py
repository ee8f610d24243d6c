"""What the benchmarks share: interleaved timing, the facts about the machine, and results as JSON."""

from __future__ import annotations

import json
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import sparse24
from sparse24 import ops

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@dataclass
class Timing:
    """Seconds: the median and the 20th and 80th percentile of `runs` runs."""

    median: float
    low: float
    high: float
    runs: int

    def text(self, unit: float = 1e-3) -> str:
        return f"{self.median / unit:.2f}  [{self.low / unit:.2f}, {self.high / unit:.2f}]"


def interleaved(contenders: dict[str, Callable[[], object]], rounds: int, slice_s: float = 0.05) -> dict[str, Timing]:
    """Times every contender in every round, in an order shuffled anew, so that all meet the same disturbances.

    In a round a contender runs once, or as often as fits into slice_s seconds.
    """
    once = {}
    for name, run in contenders.items():
        run()
        begin = time.perf_counter()
        run()
        once[name] = time.perf_counter() - begin
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            for _ in range(max(1, int(slice_s / once[name]))):
                begin = time.perf_counter()
                contenders[name]()
                seconds[name].append(time.perf_counter() - begin)
    result = {}
    for name, runs in seconds.items():
        quintiles = statistics.quantiles(runs, n=5, method="inclusive")
        result[name] = Timing(statistics.median(runs), quintiles[0], quintiles[3], len(runs))
    return result


def machine() -> dict[str, Any]:
    """What a reader needs to know about where the numbers come from."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    model = [
        line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith(("cpu family", "model\t"))
    ]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cpu family, model": ", ".join(model[:2]),
        "cpus": len(names),
        "isa": ops.cpu_isa(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "sparse24": sparse24.__version__,
        "commit": git("rev-parse", "--short", "HEAD") + (" and changes" if git("status", "--porcelain") else ""),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def save(name: str, content: dict[str, Any]) -> Path:
    """Writes benchmarks/results/<name>.json with the machine's facts in front."""
    path = RESULTS / f"{name}.json"
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": machine()} | content, indent=1) + "\n")
    return path


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
