"""`python -m benchmarks.cpu`; what it measures, and how it is called, is told in benchmarks/cpu/__init__.py."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import benchmarks.cpu
from benchmarks import measure
from benchmarks.cpu import ceilings, cell, plots, results, summary
from benchmarks.cpu.conv import NETWORKS, Conv
from benchmarks.cpu.encoders import MODELS, Encoders
from benchmarks.cpu.linear import DTYPES, TOKENS, Linear

FAMILIES = ("linear", "conv", "encoders")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu",
        description=benchmarks.cpu.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--threads", nargs="+", type=int, metavar="T")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--shapes", nargs="+", metavar="KxN", help="of linear, such as 768x3072")
    parser.add_argument("--tokens", nargs="+", type=int, metavar="M", choices=TOKENS["hot"], help="of linear")
    parser.add_argument("--caches", nargs="+", choices=list(TOKENS), help="of linear")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), help="of conv")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), help="of encoders")
    parser.add_argument("--batches", nargs="+", type=int, metavar="B", help="of encoders")
    parser.add_argument("--seconds", type=float, metavar="S", help="for a cell, instead of each family's own")
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted run of all stopped")
    parser.add_argument("--results", type=Path, metavar="DIR", help="write there, also what is only a part")
    parser.add_argument("--draw", action="store_true", help="only draw the plots, from the committed results")
    parser.add_argument("--markdown", action="store_true", help="only print the tables of README.md and docs/cpu.md")
    return parser.parse_args(arguments)


def families(options: argparse.Namespace) -> list[cell.Family]:
    """Those asked for, with the axes that were given."""

    def given(**axes: str) -> dict[str, Any]:
        chosen = {axis: getattr(options, name) for axis, name in axes.items()}
        return {axis: values for axis, values in chosen.items() if values is not None}

    axes = {
        "linear": given(tokens="tokens", dtypes="dtypes", threads="threads", caches="caches"),
        "conv": given(networks="networks", dtypes="dtypes", threads="threads"),
        "encoders": given(models="models", batches="batches", dtypes="dtypes", threads="threads"),
    }
    if options.shapes:
        axes["linear"]["shapes"] = [tuple(int(size) for size in shape.split("x")) for shape in options.shapes]
    kinds: dict[str, Any] = {"linear": Linear, "conv": Conv, "encoders": Encoders}
    return [kinds[name](**axes[name]) for name in options.only]


def is_part(options: argparse.Namespace) -> bool:
    """Whether a family is measured in part only."""
    names = ("threads", "dtypes", "shapes", "tokens", "caches", "networks", "models", "batches")
    return any(getattr(options, name) is not None for name in names)


def run(family: cell.Family, options: argparse.Namespace, console: Console) -> None:
    """Measures a family, prints what was found, and writes it unless it is a part without a folder of its own."""
    folder = options.results or (None if is_part(options) else measure.RESULTS)
    about = results.about()
    kept = results.KEPT / f"benchmark-{family.name}.jsonl" if folder and not is_part(options) else None
    done = results.Rows(about, kept, options.resume)
    places = family.places()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task(family.name, total=len(places))
        for place in places:
            progress.update(task, description=f"{family.name}: {summary.place_text(place)}")
            if done.find(place) is None:
                start = time.monotonic()
                row = cell.run(family, place, options.seconds)
                done.add(row | {"took_s": round(time.monotonic() - start, 2)})
            progress.advance(task)
        progress.update(task, description=family.name)

    rows = [row for row in map(done.find, places) if row is not None]
    found: dict[str, Any] = {"about": about | {"seconds": round(sum(row["took_s"] for row in rows))}, "unit": "seconds"}
    found["means"] = summary.means(family.name, rows)
    if family.name == "linear":
        limits = {str(threads): ceilings.measured(threads) for threads in dict.fromkeys(row["threads"] for row in rows)}
        found |= {"ceilings": limits, "of port limit": summary.of_port_limit(rows, limits)}
    found["rows"] = rows
    show(family.name, found, console, each=is_part(options))
    if folder:
        path = results.path_of(family.name, about["cpu"], folder)
        results.write(path, found)
        for drawn in (path, *draw(family.name, found, path)):
            console.print(f"written: {drawn}")
    if kept:
        kept.unlink()


def show(family: str, found: dict[str, Any], console: Console, each: bool) -> None:
    """Prints the means, what was lost and what was refused; and the rows, if each is asked for."""
    if each:
        for row in found["rows"]:
            if "seconds" in row:
                spreads = "  ".join(f"{name} {measure.milliseconds(s)}" for name, s in row["seconds"].items())
                console.print(f"{summary.place_text(row)}: [bold]{row['ratio'][0]:.2f}[/]  {spreads}", highlight=False)
    console.print(summary.means_table(found["means"]))
    if "of port limit" in found:
        console.print(summary.limit_table(found["of port limit"]))
    for title, lines in (("losses", summary.losses(found["rows"])), ("skipped", summary.refusals(found["rows"]))):
        for line in lines:
            console.print(f"{title}: {line}", highlight=False)
    console.print(f"{family}: {found['about']['seconds']} s")


def draw(family: str, found: dict[str, Any], path: Path) -> list[Path]:
    """The plots beside the JSON."""
    rows = found["rows"]
    if not any("seconds" in row for row in rows):
        return []
    picture = path.with_suffix(".png")
    {"linear": plots.linear_ratios, "conv": plots.conv_ratios, "encoders": plots.encoders}[family](rows, picture)
    if family != "linear" or "1" not in found["ceilings"]:
        return [picture]
    roofline = path.with_name(path.name.replace("cpu-linear", "cpu-roofline")).with_suffix(".png")
    plots.roofline(rows, found["ceilings"]["1"], roofline)
    return [picture, roofline]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 150)
    if options.markdown:
        for path in results.committed("encoders"):
            print(summary.marked(path.stem, summary.markdown(json.loads(path.read_text()))))
        for path in results.committed("linear"):
            both = path, path.with_name(path.name.replace("linear", "conv"))
            layers = [json.loads(one.read_text()) for one in both if one.exists()]
            print(summary.marked(path.stem, summary.means_markdown(layers)))
        return 0
    if options.draw:
        for family in options.only:
            for path in results.committed(family):
                draw(family, json.loads(path.read_text()), path)
        return 0
    before = torch.get_num_threads(), torch.backends.quantized.engine
    try:
        for family in families(options):
            run(family, options, console)
    except KeyboardInterrupt:
        console.print("stopped; --resume goes on from here, unless only a part was asked for")
        return 130
    finally:
        torch.set_num_threads(before[0])
        torch.backends.quantized.engine = before[1]
    return 0


if __name__ == "__main__":
    sys.exit(main())
