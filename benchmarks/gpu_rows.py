"""The rows of `benchmarks.gpu`: one process that measures cell after cell and appends each to a file as it is done.

    python -m benchmarks.gpu_rows --output rows.jsonl --until 1234567890 --kind rows
    python -m benchmarks.gpu_rows --machine

A cell is one layer, dtype and number of tokens. `rows` compares with other libraries, `tune` this project's kernels
with each other. A cell that was begun and never finished has taken the process down: it is not tried again.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import sparse24
from benchmarks.gpu_contenders import CUBLAS, DTYPES, SPARSE24, Contender, Layer, contenders, wrong
from sparse24 import ops

ROOT = Path(__file__).parents[1]
LAYERS = {  # (K, N)
    **{"DeiT-S qkv": (384, 1152), "DeiT-S fc1": (384, 1536), "DeiT-S fc2": (1536, 384)},
    **{"ViT-B qkv": (768, 2304), "ViT-B, BERT proj": (768, 768)},
    **{"ViT-B, BERT fc1": (768, 3072), "ViT-B, BERT fc2": (3072, 768)},
    **{"ViT-L, BERT-L fc1": (1024, 4096), "ViT-L, BERT-L fc2": (4096, 1024)},
    **{"Llama 7B proj": (4096, 4096), "Llama 7B up": (4096, 11008), "Llama 7B down": (11008, 4096)},
}
TOKENS = [1, 8, 16, 64, 197, 1576, 4096]  # 197: an image of 224 px; 1576: eight of them
RUNS, TUNE_RUNS = 30, 10
SPLITS = [1, 2, 3, 4, 6, 8]
BROKEN = 3  # exit status: the device no longer answers this process

# Published dense peaks, TFLOP/s of 16-bit floats and TOP/s of int8, and TB/s of memory; sparse ones are twice that.
PEAKS = {
    **{"A100": (312, 624, 2.04), "H100 80GB HBM3": (989, 1979, 3.35), "H100 PCIe": (756, 1513, 2.0)},
    **{"H200": (989, 1979, 4.8), "B200": (2250, 4500, 8.0), "L40S": (362, 733, 0.864), "A40": (150, 299, 0.696)},
    **{"A10": (125, 250, 0.6), "RTX 4090": (165, 661, 1.008), "RTX 3090": (71, 284, 0.936)},
}


def cells(kind: str) -> Iterator[tuple[str, str, str, int]]:
    """(kind, dtype, layer, tokens); what matters most first, so that a cut costs least."""
    for dtype in ("float16", "int8", "bfloat16"):
        for layer in LAYERS:
            for count in TOKENS:
                yield kind, dtype, layer, count


# ---- One row ---------------------------------------------------------------------------------------------------------


def peaks_of(gpu: str) -> tuple[float, float, float] | None:
    names = [name for name in PEAKS if name in gpu]
    return PEAKS[max(names, key=len)] if names else None


def spread(seconds: list[float]) -> dict[str, float]:
    quintiles = statistics.quantiles(seconds, n=5, method="inclusive")
    return {"p20": quintiles[0] * 1e6, "p50": statistics.median(seconds) * 1e6, "p80": quintiles[3] * 1e6}


def row(
    shape: tuple[int, int, int], dtype: str, kernel: str, sparse: bool, seconds: list[float], gpu: str
) -> dict[str, Any]:
    """shape: tokens, N, K. TFLOP/s counts the dense product, 2 tokens N K; bytes are W (values and metadata where
    sparse), x and y. of_bound: the time that the GPU's published peaks allow, over the median."""
    tokens, rows, columns = shape
    size, y_size = DTYPES[dtype].itemsize, 4 if dtype == "int8" else DTYPES[dtype].itemsize
    weight = rows * columns * size
    if sparse:
        weight = weight // 2 + rows * columns // 8
    moved = weight + tokens * columns * size + tokens * rows * y_size
    work = 2 * tokens * rows * columns
    us = spread(seconds)
    median = us["p50"] * 1e-6
    result: dict[str, Any] = {"tokens": tokens, "N": rows, "K": columns, "dtype": dtype, "kernel": kernel}
    result |= {"us": us, "runs": len(seconds), "tflops": work / median / 1e12, "gbs": moved / median / 1e9}
    if peaks := peaks_of(gpu):
        rate = peaks[1 if dtype == "int8" else 0] * 1e12 * (2 if sparse else 1)
        result["of_bound"] = max(work / rate, moved / (peaks[2] * 1e12)) / median
    return result


def compare(rows: list[dict[str, Any]]) -> None:
    """Adds how many times as fast as cuBLAS, and as the fastest cuSPARSELt, each row is."""
    medians = {one["kernel"].split(":")[0]: one["us"]["p50"] for one in rows}
    lt = min((us for name, us in medians.items() if "cuSPARSELt" in name), default=None)
    for one in rows:
        one["x_cublas"] = medians[CUBLAS] / one["us"]["p50"] if CUBLAS in medians else None
        one["x_cusparselt"] = lt / one["us"]["p50"] if lt is not None else None


def text(one: dict[str, Any]) -> str:
    def shown(key: str, form: str, factor: float = 1) -> str:
        return format(one[key] * factor, form) if one.get(key) is not None else "-"

    shape = f"{one['tokens']}x{one['N']}x{one['K']}"
    us = one["us"]
    return (
        f"{shape:>16} {one['dtype']:8} {one['kernel']:42} | {us['p50']:8.1f} [{us['p20']:.1f}, {us['p80']:.1f}] us | "
        f"{shown('tflops', '6.1f')} TFLOP/s | {shown('gbs', '6.0f')} GB/s | {shown('of_bound', '4.0f', 100)} % of bound"
        f" | {shown('x_cublas', '.2f')} x cuBLAS | {shown('x_cusparselt', '.2f')} x cuSPARSELt"
    )


# ---- Timing ----------------------------------------------------------------------------------------------------------


class Clock:
    """Device time of single runs by CUDA events, with L2 emptied before each. A kernel that does nothing keeps the
    device busy while the host prepares, so that the host's time is not in it."""

    CYCLES_PER_SECOND = 2e9  # of a busy device, roughly; a longer wait only takes longer
    LONGEST_WAIT = 2e-3

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(0)
        l2 = getattr(properties, "L2_cache_size", 0) or 64 << 20
        self._scratch = torch.empty(2 * l2, dtype=torch.uint8, device="cuda")

    def host_seconds(self, run: Callable[[], object]) -> float:
        run()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        took = time.perf_counter() - begin
        torch.cuda.synchronize()
        return took

    def once(self, run: Callable[[], object], host_seconds: float) -> Callable[[], float]:
        """Queues one run; the function returned gives its seconds once the device is done."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._scratch.zero_()
        torch.cuda._sleep(int(min(2 * host_seconds + 2e-5, self.LONGEST_WAIT) * self.CYCLES_PER_SECOND))
        begin.record()
        run()
        end.record()
        return lambda: begin.elapsed_time(end) * 1e-3

    def wait(self) -> None:
        torch.cuda.synchronize()


def interleaved(clock: Any, runs_of: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run; each contender once a round, in an order shuffled anew."""
    host = {name: clock.host_seconds(run) for name, run in runs_of.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs_of}
    order, shuffle = list(runs_of), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        queued = [(name, clock.once(runs_of[name], host[name])) for name in order]
        clock.wait()
        for name, told in queued:
            seconds[name].append(told())
    return seconds


# ---- Cells -----------------------------------------------------------------------------------------------------------


def measure_rows(layer: Layer, count: int, clock: Any, gpu: str) -> dict[str, Any]:
    x = layer.tokens(count)
    able, reasons = contenders(layer, x)
    for name in list(able):
        if problem := wrong(able[name], layer, x):
            reasons[name] = f"wrong: {problem}"
            del able[name]
    times = interleaved(clock, {name: one.run for name, one in able.items()}, RUNS)
    rows, columns = layer.weight.shape
    made = []
    for name, one in able.items():
        kernel = name
        if name == SPARSE24:
            kernel += ": " + ops.linear_plan(x, out_features=rows, dtype=DTYPES[layer.dtype])
        made.append(row((count, rows, columns), layer.dtype, kernel, one.sparse, times[name], gpu))
    compare(made)
    return {"rows": made, "left_out": reasons, "failed": SPARSE24 in reasons}


def measure_tune(layer: Layer, count: int, clock: Any, gpu: str) -> dict[str, Any]:
    """Every kernel, K in up to 8 splits, that takes this shape."""
    x = layer.tokens(count)
    rows, columns = layer.weight.shape
    able: dict[str, Contender] = {}
    reasons: dict[str, str] = {}
    for kernel in ops.linear_kernels(DTYPES[layer.dtype]):
        for splits in SPLITS if count <= 512 else SPLITS[:3]:

            def run(kernel: str = kernel, splits: int = splits) -> torch.Tensor:
                with ops.force_linear_kernel(kernel, splits):
                    return layer.linear(x)

            name, contender = f"{kernel}, {splits} splits", Contender(run, True)
            try:
                problem = wrong(contender, layer, x)
            except RuntimeError as error:
                if "linear_kernel must be one of" not in str(error):
                    raise
                continue
            if problem:
                reasons[name] = f"wrong: {problem}"
            else:
                able[name] = contender
    times = interleaved(clock, {name: one.run for name, one in able.items()}, TUNE_RUNS)
    made = [row((count, rows, columns), layer.dtype, name, True, seconds, gpu) for name, seconds in times.items()]
    made.sort(key=lambda one: one["us"]["p50"])
    chosen = ops.linear_plan(x, out_features=rows, dtype=DTYPES[layer.dtype])
    return {"rows": made, "chosen": chosen, "left_out": reasons, "failed": bool(reasons)}


MEASURE = {"rows": measure_rows, "tune": measure_tune}


def finished(path: Path) -> tuple[set[str], set[str]]:
    """Keys of cells that are done, and of those that were begun and not cut short by the clock; half a line at the
    end counts as nothing."""
    done, begun = set(), set()
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if "cut" in record:
            begun.discard(record["cut"])
        elif "begun" in record:
            begun.add(record["begun"])
        else:
            done.add(record["cell"])
    return done, begun


def measure_all(kind: str, path: Path, until: float, clock: Any, gpu: str, device: str, make: Any = Layer.make) -> int:
    done, begun = finished(path)
    todo = [cell for cell in cells(kind) if " / ".join(map(str, cell)) not in done]
    layer, made_for = None, None
    with path.open("a") as file:
        if path.stat().st_size and not path.read_text().endswith("\n"):
            file.write("\n")

        def write(record: dict[str, Any]) -> None:
            file.write(json.dumps(record) + "\n")
            file.flush()

        for index, (_, dtype, name, count) in enumerate(todo):
            key = " / ".join(map(str, (kind, dtype, name, count)))
            if time.time() > until:
                print(f"{len(todo) - index} cells of {kind} are left: out of time", flush=True)
                break
            if key in begun:
                write({"cell": key, "error": "the process died in this cell", "failed": True})
                continue
            write({"begun": key})
            try:
                if made_for != (dtype, name):
                    columns, rows = LAYERS[name]
                    layer = None  # its memory first
                    layer, made_for = make(dtype, rows, columns, device), (dtype, name)
                assert layer is not None
                result = MEASURE[kind](layer, count, clock, gpu)
            except KeyboardInterrupt:
                write({"cut": key})
                raise
            except Exception as error:
                result = {"error": f"{type(error).__name__}: {error}"[:1000], "failed": True}
            write({"cell": key, "layer": name} | result)
            for one in result.get("rows", [])[: 3 if kind == "tune" else None]:
                print(text(one), flush=True)
            if "error" in result:
                print(f"{key}: {result['error']}", flush=True)
                made_for = None
                try:
                    clock.wait()
                except Exception:
                    return BROKEN
    return 0


# ---- The machine -----------------------------------------------------------------------------------------------------


def told(*command: str) -> str:
    """What a program prints; empty where it is not there or fails."""
    if not shutil.which(command[0]):
        return ""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def machine() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,clocks_event_reasons.active"
    smi = told("nvidia-smi", "-i", "0", f"--query-gpu={fields}", "--format=csv,noheader")
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "memory_bytes": properties.total_memory,
        "devices": torch.cuda.device_count(),
        "nvidia-smi": dict(zip(fields.split(","), (one.strip() for one in smi.split(",")), strict=False)),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "sparse24": sparse24.__version__,
        "device code": torch.ops.sparse24.device_archs(),
        "commit": told("git", "rev-parse", "--short", "HEAD") + (" and changes" * bool(told("git", "status", "-s"))),
        "peaks": peaks_of(properties.name),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--until", type=float, default=float("inf"), help="seconds since the epoch")
    parser.add_argument("--kind", choices=MEASURE, default="rows")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"no CUDA device: torch {torch.__version__}", file=sys.stderr)
        return 2
    if arguments.machine:
        print(json.dumps(machine()))
        return 0
    with torch.no_grad():
        gpu = torch.cuda.get_device_name(0)
        return measure_all(arguments.kind, arguments.output, arguments.until, Clock(), gpu, "cuda")


if __name__ == "__main__":
    sys.exit(main())
