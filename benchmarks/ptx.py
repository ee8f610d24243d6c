"""What the PTX emulator costs: a sparse GEMM of 1024^3 on tensor cores, and reading a PTX text of 5,000 lines.

    python -m benchmarks.ptx

The kernel is tests/ptx/kernels/sparse_gemm.cu: mma.sp in half precision, summed in float, a ring of cp.async. Two
threads; interleaved medians with the 20th and 80th percentile, after the product was compared with torch's. Memory is
the peak above what the process held before the launch, in a process of its own, in bytes and as a multiple of what the
kernel itself has. Written to
benchmarks/results/ptx-<cpu>.json.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import sparse24.ptx
from benchmarks import measure

sys.path.insert(0, str(measure.ROOT / "tests" / "ptx"))
import oracles  # noqa: E402
from workloads import Workload, sparse_gemm  # noqa: E402

SIZE = 1024
THREADS = 2
LINES = 5000
MODES: dict[str, dict[str, Any]] = {  # options of the launch
    "all checks, ieee": dict(checks="all", numerics="ieee"),
    "all checks, sm_80": dict(checks="all", numerics="sm_80"),
    "all checks, sm_90": dict(checks="all", numerics="sm_90"),
    "no checks, ieee": dict(checks="none", numerics="ieee"),
    "nothing on, ieee": dict(checks="none", numerics="ieee", counters=False),
    "nothing on, sm_80": dict(checks="none", numerics="sm_80", counters=False),
}
GOALS = {  # seconds
    "all checks, ieee": 0.25,
    "all checks, sm_80": 1.0,
    "nothing on, ieee": 0.15,
    f"parse {LINES} lines": 0.05,
}


def problem() -> tuple[sparse24.ptx.Module, Workload]:
    return sparse24.ptx.load(oracles.kernels("sparse_gemm")), sparse_gemm(np.random.default_rng(0), SIZE, SIZE, SIZE)


def launch(module: sparse24.ptx.Module, work: Workload, options: dict[str, Any]) -> sparse24.ptx.Report:
    """Without the wishes of the tests: plain arrays."""
    arguments = [work.result(i) for i in range(4)] + work.arguments[4:]
    return module.launch("sparse_gemm", work.grid, work.block, arguments, work.shared, threads=THREADS, **options)


def long_text() -> str:
    """The kernel again and again under other names, until there are LINES lines."""
    text = oracles.kernels("sparse_gemm")
    start = text.index(".visible .entry")
    kernel = text[start : text.index("\n}\n", start) + 3]
    copies = [text[:start], kernel]
    while sum(copy.count("\n") for copy in copies) < LINES:
        copies.append(re.sub(r"\bsparse_gemm", f"sparse_gemm_{len(copies)}", kernel))
    return "".join(copies)


def memory(options: dict[str, Any]) -> dict[str, int]:
    """Bytes: what the kernel itself has (arrays, and the shared memory of as many blocks as there are threads), and the
    peak of the process above what it had before the launch, which holds the arrays already."""
    module, work = problem()
    own = sum(work.result(i).nbytes for i in range(4)) + THREADS * work.shared
    _ = module.kernels
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    before = _status("VmRSS")
    launch(module, work, options)
    return {"own": own, "beside": _status("VmHWM") - before}


def cpu_seconds(run: Callable[[], object], repeats: int = 3) -> float:
    """Of all threads: what a run costs whoever else is busy on the machine."""
    begin = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - begin) / repeats


def _status(field: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-save", action="store_true", help="print only; leave benchmarks/results alone")
    parser.add_argument("--memory", choices=list(MODES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print(json.dumps(memory(MODES[arguments.memory])))
        return

    module, work = problem()
    contenders: dict[str, Callable[[], object]] = {}
    for name, options in MODES.items():
        report = launch(module, work, options)
        work.assert_results()
        report.raise_for_errors()
        contenders[name] = lambda options=options: launch(module, work, options)
    instructions = report.counters.instructions
    text = long_text()
    contenders[f"parse {LINES} lines"] = lambda: sparse24.ptx.load(text)
    contenders["parse, decode the same"] = lambda: sparse24.ptx.load(text).kernels
    timings = measure.interleaved(contenders, arguments.rounds, slice_s=0)

    table = Table(title=f"PTX emulator, {SIZE}^3 f16 mma.sp, {THREADS} threads", title_justify="left")
    for column in ("what", "ms [20 %, 80 %]", "goal", "memory"):
        table.add_column(column, justify="left" if column == "what" else "right", no_wrap=True)
    rows = []
    for name, timing in timings.items():
        row: dict[str, Any] = {"what": name, "goal": GOALS.get(name), **asdict(timing)}
        beside = ""
        if name in MODES:
            command = [sys.executable, "-m", "benchmarks.ptx", "--memory", name]
            done = subprocess.run(command, cwd=measure.ROOT, check=True, capture_output=True, text=True)
            row["memory"] = json.loads(done.stdout)
            row["instructions"] = instructions
            row["cpu"] = cpu_seconds(contenders[name])
            times = row["memory"]["beside"] / row["memory"]["own"]
            beside = f"{row['memory']['beside'] / 1e6:.1f} MB = {times:.1f} x"
        verdict = ""
        if name in GOALS:
            verdict = f"{GOALS[name] * 1e3:.0f} {'met' if timing.median <= GOALS[name] else 'missed'}"
        median, low, high = (
            f"{1e3 * seconds:.{0 if seconds > 0.1 else 1}f}" for seconds in (timing.median, timing.p20, timing.p80)
        )
        table.add_row(name, f"{median} [{low}, {high}]", verdict, beside)
        rows.append(row)
    Console().print(table)
    if not arguments.no_save:
        machine = measure.machine()
        cpu = re.sub(r"[^a-z0-9]+", "-", machine["cpu"].lower().split(" processor")[0]).strip("-")
        tools = {
            "nvcc": oracles.nvcc_release(),
            "numpy": np.__version__,
            "isa of the emulator": sparse24._ptx.isa(None),
        }
        path = measure.save(
            f"ptx-{cpu}",
            {"unit": "seconds, bytes", "threads": THREADS, "tools": tools, "rows": rows, "lines": text.count("\n")},
        )
        Console().print(f"written to {path.relative_to(measure.ROOT)}")


if __name__ == "__main__":
    main()
