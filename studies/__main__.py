"""`python -m studies [NAME ...]`: runs the named studies, or all; --markdown prints the tables of the documents.

Each part of a study is kept in .cache as it ends: an interrupted run goes on where it was. Not so quantised-speed,
which wants the machine for itself.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import measure
from studies import fashion, plots, quantised, quantised_fashion, quantised_speed, quantised_trained, trained
from studies.jobs import side_by_side


def over_seeds(study: str, job: Callable[[Path, str, int], Any], folder: Path) -> dict[str, Any]:
    """By model, what job(folder, model, seed) returns for each seed."""
    fashion.read(folder, "t10k")  # before any process asks
    pairs = [(model, seed) for model in fashion.MODELS for seed in range(fashion.SEEDS)]
    jobs = {f"{study}-{model}-{seed}": (job, folder, model, seed) for model, seed in pairs}
    done = dict(side_by_side(jobs, study))
    return {model: [done[f"{study}-{model}-{seed}"] for seed in range(fashion.SEEDS)] for model in fashion.MODELS}


def over_parts(study: str, job: Callable[[str, str], Any], parts: Iterable[str]) -> dict[str, Any]:
    """By trained model and part, what job(model, part) returns."""
    pairs = [(model, part) for model in trained.MODELS for part in parts]
    jobs = {f"{study}-{model}-{part}": (job, model, part) for model, part in pairs}
    done = dict(side_by_side(jobs, study))
    return {model: {part: done[f"{study}-{model}-{part}"] for part in parts} for model in trained.MODELS}


class Study(NamedTuple):
    run: Callable[[Path], dict[str, Any]]  # given the folder of Fashion-MNIST; results by model
    markdown: Callable[[Any], str]  # the table of such results
    draw: Callable[[Any, str, Any], None]  # on an axis, a model and its results


STUDIES = {
    "fashion": Study(
        lambda folder: over_seeds("fashion", fashion.job, folder),
        fashion.markdown,
        plots.differences,
    ),
    "trained": Study(
        lambda _: over_parts("trained", trained.job, trained.METHODS),
        trained.markdown,
        plots.stages,
    ),
    "quantised-fashion": Study(
        lambda folder: over_seeds("quantised-fashion", quantised_fashion.job, folder),
        quantised_fashion.markdown,
        plots.rounded,
    ),
    "quantised-trained": Study(
        lambda _: over_parts("quantised-trained", quantised_trained.job, quantised.BASES),
        quantised_trained.markdown,
        plots.rounded_photographs,
    ),
    "quantised-speed": Study(
        lambda _: quantised_speed.run(),
        quantised_speed.markdown,
        plots.latencies,
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m studies", description=__doc__)
    parser.add_argument(
        "studies", nargs="*", choices=[*STUDIES, []], default=[], metavar="NAME", help=", ".join(STUDIES)
    )
    parser.add_argument("--fashion-mnist", type=Path, default=fashion.FOLDER, metavar="DIR", help="its four .gz files")
    parser.add_argument("--markdown", action="store_true", help="only print the tables of the committed results")
    options = parser.parse_args()
    try:
        for name in options.studies or STUDIES:
            study, path = STUDIES[name], measure.RESULTS / f"study-{name}.json"
            if not options.markdown:
                found = study.run(options.fashion_mnist)
                measure.save(path.stem, {"results": found})
                plots.draw(study.draw, found, path.with_suffix(".png"))
            print(study.markdown(json.loads(path.read_text())["results"]) + "\n")
    except fashion.Missing as gap:
        print(gap, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped: what was done is kept, and the next run goes on from it", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
