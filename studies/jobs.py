"""The parts of a study, side by side in processes, each kept as it ends so that a stopped run can go on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import measure

CACHE = measure.ROOT / ".cache" / "studies"


def kept(name: str, make: Callable[..., Any], *arguments: Any) -> Any:
    """make(*arguments), or what it returned before; of these very sources."""
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    path = CACHE / f"{name.replace('/', '-')}-{hashlib.sha256(sources).hexdigest()[:12]}.json"
    if not path.exists():
        found = make(*arguments)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps(found))
        new.replace(path)
    return json.loads(path.read_text())


def side_by_side(jobs: dict[str, tuple[Any, ...]], title: str) -> Iterator[tuple[str, Any]]:
    """kept(name, *job) for each job, a process and a core each, as they end."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool, Progress(*columns) as progress:
        task = progress.add_task(title, total=len(jobs))
        futures = {pool.submit(kept, name, *job): name for name, job in jobs.items()}
        for future in as_completed(futures):
            progress.advance(task)
            yield futures[future], future.result()
