"""Time and memory of a training step on the sparse kernels, against the same step with masked dense products.

    python -m benchmarks.training [--markdown]

Twelve blocks of DeiT-S, 8 x 197 tokens: forward, backward and a step of SGD with momentum. Times are medians of rounds
that run all contenders in turn; memory is what a process of its own holds at its peak beyond what it held with torch
and sparse24 imported.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import sparse24
from benchmarks import measure
from benchmarks.cpu.encoders import encoder

BATCH, ROUNDS = 8, 7
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MASKED = "masked, dense"
CONTENDERS: dict[str, dict[str, Any] | None] = {
    "dense, not pruned": None,
    MASKED: {},
    "fixed": {"mode": "fixed"},
    "fixed, transposable": {"mode": "fixed", "transposable": True},
    "sr-ste": {"mode": "sr-ste"},
    "sr-ste, transposable": {"mode": "sr-ste", "transposable": True},
}


def step_of(name: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    """One training step of a contender; every call is the next one."""
    model, input_of = encoder(384, 6)
    model.to(dtype)
    how = CONTENDERS[name]
    if how is not None:
        sparse24.prune(model, transposable=how.get("transposable", False))
    if how:
        report = sparse24.train_sparse(model, how["mode"])
        assert {row.outcome for row in report.rows} == {"sparse"}
    x = input_of(BATCH).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), x)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _peak_of(name: str, dtype: torch.dtype, sender: Any) -> None:
    before = _most_resident()
    step = step_of(name, dtype)
    for _ in range(2):
        step()
    sender.send(_most_resident() - before)


def _most_resident() -> int:
    """Bytes; of this program alone, where getrusage() also tells of the one that started it."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def peak_bytes(name: str, dtype: torch.dtype) -> int:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_peak_of, args=(name, dtype, sender))
    process.start()
    peak: int = receiver.recv()
    process.join()
    return peak


def measured() -> list[dict[str, Any]]:
    rows = []
    for dtype_name, dtype in DTYPES.items():
        steps = {name: step_of(name, dtype) for name in CONTENDERS}
        seconds = measure.medians(measure.turns(steps, track(range(ROUNDS), f"steps in {dtype_name}"), 1))
        for name in track(CONTENDERS, f"memory in {dtype_name}"):
            gain = measure.ratio(seconds[MASKED], seconds[name])
            row = {"dtype": dtype_name, "contender": name, "peak_bytes": peak_bytes(name, dtype)}
            rows.append(row | {"seconds": asdict(measure.Spread.of(seconds[name])), "gain": asdict(gain)})
    return rows


def markdown(found: dict[str, Any]) -> str:
    lines = ["| a training step | " + " | ".join(f"{dtype}, ms | gain | memory, MB" for dtype in DTYPES) + " |"]
    lines.append("|---" + "|--:" * 3 * len(DTYPES) + "|")
    for name in CONTENDERS:
        cells = []
        for row in (row for row in found["rows"] if row["contender"] == name):
            gain = row["gain"]
            cells.append(f"{1000 * row['seconds']['median']:.0f}")
            cells.append(f"{gain['median']:.2f}x ({gain['p20']:.2f}–{gain['p80']:.2f})" if name != MASKED else "")
            cells.append(f"{row['peak_bytes'] / 1e6:.0f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    about = found["machine"]
    lines += ["", f"* {about['cpu']}, {found['threads']} threads, {about['date'][:10]}, commit {about['commit']}."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--markdown", action="store_true", help="only print the table of docs/training.md")
    if parser.parse_args().markdown:
        print(markdown(json.loads((measure.RESULTS / "training.json").read_text())))
        return
    found = {"batch": BATCH, "tokens": 197, "threads": torch.get_num_threads(), "unit": "seconds", "rows": measured()}
    path = measure.save("training", found)
    Console().print(markdown(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
