"""`python -m studies [fashion] [trained]`: runs what is named, or all; --markdown prints docs/training.md's tables.

Each part of a study is kept in .cache as it ends: an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import measure
from studies import fashion, plots, trained
from studies.jobs import side_by_side

STUDIES = ("fashion", "trained")


def run_fashion(folder: Path) -> dict[str, Any]:
    fashion.read(folder, "t10k")  # before any process asks
    pairs = [(model, seed) for model in fashion.MODELS for seed in range(fashion.SEEDS)]
    jobs = {f"fashion-{model}-{seed}": (fashion.job, folder, model, seed) for model, seed in pairs}
    done = dict(side_by_side(jobs, "Fashion-MNIST"))
    return {model: [done[f"fashion-{model}-{seed}"] for seed in range(fashion.SEEDS)] for model in fashion.MODELS}


def run_trained() -> dict[str, Any]:
    pairs = [(model, method) for model in trained.MODELS for method in trained.METHODS]
    jobs = {f"trained-{model}-{method}": (trained.job, model, method) for model, method in pairs}
    done = dict(side_by_side(jobs, "trained models"))
    return {
        model: {method: done[f"trained-{model}-{method}"] for method in trained.METHODS} for model in trained.MODELS
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m studies", description=__doc__)
    parser.add_argument("studies", nargs="*", choices=[*STUDIES, []], default=[])
    parser.add_argument("--fashion-mnist", type=Path, default=fashion.FOLDER, metavar="DIR", help="its four .gz files")
    parser.add_argument("--markdown", action="store_true", help="only print the tables of the committed results")
    options = parser.parse_args()
    wanted = options.studies or STUDIES
    try:
        for study in wanted:
            path = measure.RESULTS / f"study-{study}.json"
            if not options.markdown:
                found = run_fashion(options.fashion_mnist) if study == "fashion" else run_trained()
                measure.save(path.stem, {"results": found})
                plots.draw(study, found, path.with_suffix(".png"))
            table = fashion.markdown if study == "fashion" else trained.markdown
            print(table(json.loads(path.read_text())["results"]) + "\n")
    except fashion.Missing as gap:
        print(gap, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped: what was done is kept, and the next run goes on from it", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
