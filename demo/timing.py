"""Latency: several callables timed in turns in one process, so that whatever else the machine does hits all alike."""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Spread:
    """Where the middle of some samples lies, and between which values the middle 60 % of them."""

    median: float
    p20: float
    p80: float
    samples: int

    to_dict = asdict

    @classmethod
    def of(cls, samples: Iterable[float]) -> "Spread":
        values = np.fromiter(samples, float)
        p20, median, p80 = np.percentile(values, [20, 50, 80])
        return cls(float(median), float(p20), float(p80), len(values))


def interleave(
    calls: dict[str, Callable[[], object]],
    rounds: Iterable[object],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each call: one sample a round, the median of `repeats` calls in a row.

    In every round each callable has its turn: one call that is not timed, which brings its weights back into the
    caches as they are where a model serves alone, then `repeats` timed ones. Samples of one round belong together:
    ratios are taken round by round.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in rounds:
        for name, call in calls.items():
            call()
            times = []
            for _ in range(repeats):
                start = clock()
                call()
                times.append(clock() - start)
            samples[name].append(float(np.median(times)))
    return samples


def ratio(slow: list[float], fast: list[float]) -> Spread:
    """How many times faster the second is: the spread of the ratios within each round."""
    return Spread.of(a / b for a, b in zip(slow, fast, strict=True))
