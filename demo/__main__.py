"""`python -m demo`: what 2:4 costs in quality and gains in time and size, on two real transformers, in under 5 minutes.

Prune, distil, quantise, convert, save and load: all through sparse24's public functions. The table also goes to
demo/out as JSON and PNG, or with --write-results to benchmarks/results, from which --markdown makes README.md's table.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

from demo.needs import Missing, missing

OUT = Path(__file__).parent / "out"
LIMIT_S = 100  # keeps the demo below 5 minutes; results to be committed do all their steps


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument(
        "--write-results", action="store_true", help="write to benchmarks/results, and take as long as it takes"
    )
    parser.add_argument("--compile", action="store_true", help="also time torch.compile: some minutes more")
    parser.add_argument("--limit", type=float, metavar="S", help=f"seconds for each of two distillations ({LIMIT_S})")
    parser.add_argument("--markdown", action="store_true", help="only print the table of the committed results")
    options = parser.parse_args()
    try:
        if gaps := missing():
            raise Missing("\n  ".join(gaps))
        if options.markdown:
            print_committed()
        else:
            limit = options.limit if options.limit is not None else math.inf if options.write_results else LIMIT_S
            run(options.write_results, options.compile, limit)
    except Missing as gap:
        print(f"The demo needs what is not here:\n  {gap}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped before the end: nothing was written", file=sys.stderr)
        return 130
    return 0


def print_committed() -> None:
    from demo import results

    for path in sorted(results.COMMITTED.glob("demo-*.json")):
        print(results.markdown(json.loads(path.read_text())))


def run(write_results: bool, with_compile: bool, limit_s: float) -> None:
    """The whole demo. limit_s: for each of the two distillations."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from demo import figure, restoration, results, vision

    start = time.monotonic()
    console = Console(width=None if sys.stdout.isatty() else 120)  # a log has no width of its own
    about = results.about()
    console.print(
        f"{about['cpu']}, [bold]{about['threads']} threads[/], {about['kernels']} kernels, "
        f"torch {about['versions']['torch']}, sparse24 {about['versions']['sparse24']}. "
        f"Ctrl-C ends a distillation early and keeps what it learnt."
    )
    OUT.mkdir(exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        restored, pictures = restoration.run(limit_s, progress)
        seen = vision.run(limit_s, with_compile, OUT, progress)

    result = results.result(about, time.monotonic() - start, [restored, seen])
    console.print(results.rich_table(result))
    for note in results.notes(result):
        console.print(f"• {note}", highlight=False)
    path = (results.COMMITTED if write_results else OUT) / results.stem(about["cpu"])
    results.write(result, path.with_suffix(".json"))
    figure.draw(pictures, restored.rows, seen.rows, path.with_suffix(".png"))
    console.print(f"written: {path}.json and .png")


if __name__ == "__main__":
    sys.exit(main())
