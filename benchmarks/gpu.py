"""`make gpu`: the GPU tests and benchmarks within eight minutes, into benchmarks/results/<gpu>.json.

    python -m benchmarks.gpu [--minutes 8] [--fresh] [--only NAME ...]

Runs on the Python that runs it, which needs a CUDA build of torch >= 2.11 and pytest; rich, CuPy and compute-sanitizer
are used where they are. Each step is a process of its own with a time limit, so that whatever happens in one, the next
goes on; the results are written anew after each, and every few seconds while it measures. A second run goes on with
the cells that the first left, unless the GPU, torch, the commit or the libraries have changed. Exit status: 0 if every
step passed, 1 if one failed or ran out of time, 2 without a CUDA device.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sparse24"
BUILD = ROOT / "build" / "gpu"
RESULTS = ROOT / "benchmarks" / "results"
RESERVE = 15.0  # seconds at the end for what is left to write
TAIL = 4000  # characters of a failed step's output that are kept
MAX_RESTARTS = 12
BROKEN = 3  # benchmarks.gpu_rows: the device no longer answers that process


@dataclass
class Step:
    """A command with its limit in seconds. `gather` reads what it left behind, whatever became of it."""

    name: str
    command: list[str]
    limit: float
    gather: Callable[[], dict[str, Any]] = dict
    environment: dict[str, str] = field(default_factory=dict)
    statuses: tuple[int, ...] = (0,)


class Session:
    """The budget, the steps so far, and the file they are written to."""

    def __init__(self, seconds: float, folder: Path, output: Path, say: Callable[[str], None] = print) -> None:
        self.begin, self.end = time.time(), time.time() + seconds
        self.folder, self.output, self.say = folder, output, say
        self.content: dict[str, Any] = {"machine": {}, "date": datetime.now(UTC).isoformat(timespec="seconds")}
        self.steps: list[dict[str, Any]] = []

        self.tick: Callable[[], None] = lambda: None  # called several times a second

    def left(self) -> float:
        return self.end - RESERVE - time.time()

    def write(self) -> None:
        """All there is, in place of what was there before; never half a file."""
        rows = read_rows(self.folder / "rows.jsonl")
        content = self.content | {"steps": self.steps, "seconds": round(time.time() - self.begin, 1)} | rows
        self.output.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.output.with_name(f".{self.output.name}.{os.getpid()}")
        unfinished.write_text(json.dumps(content, indent=1) + "\n")
        unfinished.replace(self.output)

    def run(self, step: Step) -> dict[str, Any]:
        """Runs a step to its end or limit and records it. Never raises for what the step does."""
        begin, limit = time.time(), min(step.limit, self.left())
        record: dict[str, Any] = {"step": step.name, "command": " ".join(step.command)}
        self.steps.append(record)
        self.say(f"== {step.name} (at most {max(limit, 0):.0f} s; {max(self.left(), 0):.0f} s are left)")
        log = self.folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', step.name)}.log"
        if limit < 2:
            record |= {"failed": True, "reason": "no time is left"}
        else:
            try:
                status, timed_out = self._supervise(step, log, limit)
                failed = timed_out or status not in step.statuses
                record |= {"status": status, "timed_out": timed_out, "failed": failed}
            except OSError as error:
                record |= {"failed": True, "reason": str(error)}
        try:
            record |= step.gather()
        except Exception as error:
            record |= {"failed": True, "gather": f"{type(error).__name__}: {error}"}
        record["seconds"] = round(time.time() - begin, 1)
        if record["failed"] and log.exists():
            record["output"] = log.read_text(errors="replace")[-TAIL:]
            self.say(record["output"])
        self.say(f"   {step.name}: {'FAILED' if record['failed'] else 'passed'} in {record['seconds']} s")
        self.write()
        return record

    def _supervise(self, step: Step, log: Path, limit: float) -> tuple[int, bool]:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **step.environment}
        deadline, shown, timed_out, written = time.time() + limit, 0, False, time.time()
        with log.open("wb") as sink:
            process = subprocess.Popen(
                step.command, cwd=ROOT, env=environment, stdout=sink, stderr=sink, start_new_session=True
            )
        try:
            while process.poll() is None:
                time.sleep(0.1)
                self.tick()
                shown = self._show(log, shown)
                if time.time() - written > 3:
                    self.write()
                    written = time.time()
                if time.time() > deadline:
                    timed_out = True
                    break
        finally:
            if process.poll() is None:  # pytest writes its report when it is interrupted
                for sent, patience in ((signal.SIGINT, 6), (signal.SIGTERM, 2), (signal.SIGKILL, 10)):
                    try:
                        os.killpg(process.pid, sent)
                        process.wait(patience)
                        break
                    except (ProcessLookupError, subprocess.TimeoutExpired):
                        continue
        self._show(log, shown)
        return process.returncode if process.returncode is not None else -9, timed_out

    def _show(self, log: Path, shown: int) -> int:
        """Passes on the rows of measurements, which end in a known word, as they come."""
        with log.open("rb") as file:
            file.seek(shown)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        for line in whole.decode(errors="replace").splitlines():
            if "x cuSPARSELt" in line or "passed" in line or "failed" in line:
                self.say(line)
        return shown + len(whole)


# ---- What steps leave behind -----------------------------------------------------------------------------------------


def read_rows(path: Path) -> dict[str, Any]:
    """The cells of benchmarks.gpu_rows by kind; half a line at the end counts as nothing."""
    cells: dict[str, list[Any]] = {"rows": [], "tune": []}
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if "cell" in record:
            cells[record["cell"].split(" / ")[0]].append(record)
    return cells


def read_junit(path: Path) -> dict[str, Any]:
    """Counts, failures with their first lines, and what tests recorded."""
    if not path.exists():
        return {"failed": True, "reason": "pytest left no report"}
    counts = {"tests": 0, "failures": 0, "skipped": 0}
    failures, recorded, skips = [], {}, {}
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        counts["tests"] += 1
        for kind in ("failure", "error"):
            for one in case.findall(kind):
                counts["failures"] += 1
                message = one.get("message") or (one.text or "")
                failures.append({"test": name, "message": message[:1500], "seconds": float(case.get("time", 0))})
        for one in case.findall("skipped"):
            counts["skipped"] += 1
            skips[name] = (one.get("message") or "")[:200]
        for one in case.iter("property"):
            recorded[one.get("name", "")] = one.get("value", "")
    ran = counts["tests"] - counts["skipped"]
    result: dict[str, Any] = {"counts": counts, "failures": failures, "recorded": recorded, "skips": skips}
    return result | ({"failed": True, "reason": "no test ran"} if ran == 0 else {})


# ---- The steps -------------------------------------------------------------------------------------------------------


def build_steps(python: str, importable: Callable[[str], bool], archs: str) -> list[Step]:
    """What this Python cannot load of the package is built: all of it for this GPU alone, or the emulator's module."""
    if importable("import sparse24, sparse24.ptx"):
        return []
    have_library = importable("import sparse24")
    folder = BUILD / "cmake"
    configure = [
        *["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", f"-DPython_EXECUTABLE={python}"],
        *[f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={PACKAGE}", f"-DSPARSE24_ARCHS={'' if have_library else archs}"],
    ]
    if not have_library:
        code = "import importlib.util as u, pathlib; print(pathlib.Path(u.find_spec('torch').origin).parent)"
        torch = subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()
        configure.append(f"-DTORCH_DIR={torch}")
    targets = ["_ptx"] if have_library else ["_C", "sparse24ptx", "_ptx"]
    return [
        Step("configure", configure, 40),
        Step("build", ["cmake", "--build", str(folder), "--target", *targets], 200),
    ]


def test_step(python: str, folder: Path, file: Path, limit: float) -> Step:
    report = folder / f"{file.stem}.xml"
    report.unlink(missing_ok=True)
    command = [python, "-m", "pytest", str(file), "-m", "gpu", "-p", "no:cacheprovider", "--maxfail=150", "--tb=short"]
    return Step(file.stem, [*command, f"--junitxml={report}"], limit, lambda: read_junit(report))


def sanitizer_steps(python: str, which: Callable[[str], str | None] = shutil.which) -> list[Step]:
    sanitizer = which("compute-sanitizer")
    if not sanitizer:
        return []
    command = [python, str(ROOT / "tests" / "gpu" / "sanitized.py")]
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Step(
            f"compute-sanitizer {tool}", [sanitizer, "--tool", tool, "--error-exitcode", "9", *command], 60, dict, alone
        )
        for tool in ("memcheck", "racecheck", "synccheck")
    ]


def measure(session: Session, python: str, kind: str, seconds: float) -> None:
    """benchmarks.gpu_rows until its time is over, in a new process where one dies."""
    rows = session.folder / "rows.jsonl"
    until = time.time() + min(seconds, session.left() - 5)
    for attempt in range(MAX_RESTARTS):
        if until - time.time() < 5:
            break
        before = rows.stat().st_size if rows.exists() else 0
        command = [
            python,
            "-m",
            "benchmarks.gpu_rows",
            "--kind",
            kind,
            "--output",
            str(rows),
            "--until",
            f"{until:.0f}",
        ]
        name = f"measure {kind}" + (f", attempt {attempt + 1}" if attempt else "")

        def gather() -> dict[str, Any]:
            cells = read_rows(rows)[kind]
            failed = [cell["cell"] for cell in cells if cell.get("failed")]
            return {"cells": len(cells), "failed_cells": failed} | ({"failed": True} if failed else {})

        record = session.run(Step(name, command, until - time.time() + 15, gather))
        died = record.get("status") not in (0, 2) or record.get("timed_out")
        if not died or (rows.stat().st_size if rows.exists() else 0) == before:
            break


def fingerprint(machine: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps([machine.get(key) for key in ("gpu", "torch", "commit")]).encode())
    for library in sorted(PACKAGE.glob("*.so")):
        digest.update(library.read_bytes())
    return digest.hexdigest()[:16]


def probe(python: str, code: str) -> str:
    """What a line of Python prints; empty where it fails."""
    try:
        done = subprocess.run([python, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


GPU = """import torch
p = torch.cuda.get_device_properties(0)
print(p.name, p.major * 10 + p.minor, torch.__version__, sep='|')"""


def arch_of(capability: int) -> str:
    """What the build calls the code for a compute capability; the nearest of one that it does not know."""
    family = {9: "90a", 10: "100f", 12: "120f"}.get(capability // 10)
    return family or str(max((sm for sm in (80, 86, 87, 89) if sm <= capability), default=80))


@contextmanager
def bar_of(session: Session) -> Iterator[None]:
    """A bar of the time that is gone, below what is said, where rich is installed."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(soft_wrap=True), transient=True) as progress:
        task = progress.add_task("make gpu", total=session.end - session.begin)

        def tick() -> None:
            now = session.steps[-1]["step"] if session.steps else "make gpu"
            progress.update(task, completed=time.time() - session.begin, description=now)

        session.tick = tick
        session.say = lambda text: progress.console.print(text, markup=False, highlight=False)
        yield


def run_all(session: Session, python: str, arch: str, only: list[str] | None, fresh: bool) -> int:
    def wanted(part: str) -> bool:
        return only is None or part in only

    for step in build_steps(python, lambda code: bool(probe(python, code + "; print(1)")), arch):
        session.run(step)

    told = probe(python, "import sys, benchmarks.gpu_rows as g; sys.argv[1:] = ['--machine']; g.main()")
    try:
        session.content["machine"] = json.loads(told.splitlines()[-1])
    except (IndexError, ValueError):
        session.steps.append({"step": "machine", "failed": True, "output": told[-TAIL:]})
    session.folder = BUILD / fingerprint(session.content["machine"])
    if fresh:
        shutil.rmtree(session.folder, ignore_errors=True)
    session.folder.mkdir(parents=True, exist_ok=True)
    session.write()

    sanitizers = sanitizer_steps(python) if wanted("sanitizer") else []
    if wanted("tests"):
        for file in sorted((ROOT / "tests" / "gpu").glob("test_*.py")):
            session.run(test_step(python, session.folder, file, min(120, session.left() / 3)))
    if wanted("rows"):
        measure(session, python, "rows", max(session.left() - 110, session.left() / 2))
    for step in sanitizers[:1]:
        session.run(step)
    if wanted("tune"):
        measure(session, python, "tune", session.left() - 50 * bool(sanitizers))
    for step in sanitizers[1:]:
        if session.left() > 20:
            session.run(step)
    failed = [step["step"] for step in session.steps if step.get("failed")]
    session.content["failed"] = failed
    session.content["left_out"] = [] if sanitizers else ["compute-sanitizer: not asked for, or not on PATH"]
    session.write()
    session.say(f"{session.output}: {time.time() - session.begin:.0f} s; failed: {', '.join(failed) or 'nothing'}")
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--fresh", action="store_true", help="measure every cell anew")
    parser.add_argument("--only", nargs="+", choices=["tests", "rows", "sanitizer", "tune"], default=None)
    arguments = parser.parse_args()
    python, begin = sys.executable, time.time()
    gpu = probe(python, GPU).splitlines()[-1:]
    if not gpu:
        torch = probe(python, "import torch; print('torch', torch.__version__)") or "no torch"
        print(f"no CUDA device: {python} has {torch}. Another Python: make gpu PYTHON=...", file=sys.stderr)
        return 2
    name, capability, _ = gpu[0].split("|")
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    BUILD.mkdir(parents=True, exist_ok=True)
    session = Session(arguments.minutes * 60 - (time.time() - begin), BUILD, RESULTS / f"{slug}.json")
    session.content["machine"] = {"gpu": name}

    with bar_of(session):
        return run_all(session, python, arch_of(int(capability)), arguments.only, arguments.fresh)


if __name__ == "__main__":
    sys.exit(main())
