"""2:4 linear on the CPU against every dense path torch has for the same dtype.

    python -m benchmarks.linear                            all of it, about ten minutes on two quiet cores
    python -m benchmarks.linear --shapes 768x3072 --tokens 1 197 --dtypes bfloat16 --threads 1

Through the public operator: the output is allocated by every call, Python is included. Hot means that one weight is
used again and again, cold that enough copies of it take turns to fill COLD_BYTES. float16, bfloat16 and float32 run in
their own type; int8 takes float32 in and out, quantises the rows of x on the way, and meets torch's dynamic
quantisation. What is timed is checked first, in the same run. FLOORS are the ratios this project holds itself to.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import asdict

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from benchmarks import measure
from sparse24 import ops

# (K, N) of the layers of DeiT-S, ViT-B and ViT-L, and two of a 7B language model.
SHAPES = [
    *[(384, 1152), (384, 1536), (1536, 384), (768, 2304), (768, 3072), (3072, 768)],
    *[(1024, 4096), (4096, 1024), (4096, 4096), (4096, 11008)],
]
TOKENS = {"cold": [1, 8, 16], "hot": [1, 8, 16, 64, 197, 1576]}  # 197: one image of 224 px; 1576: eight
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
COLD_BYTES = 96 << 20  # three times the last-level cache of the machine this was written on
F16_LIMIT = 4e9  # products; torch's float16 path makes 7 of them a nanosecond, so beyond this a cell takes minutes

# Regime: which rows it holds, and the geometric mean over them that is the floor for float32, bfloat16 and int8.
FLOORS: dict[str, tuple[Callable[[dict], bool], tuple[float, float, float]]] = {
    "M = 1 cold, 4096 x 4096 and up": (
        lambda row: row["M"] == 1 and row["cache"] == "cold" and row["K"] * row["N"] >= 4096 * 4096,
        (1.8, 2.0, 1.1),
    ),
    "M = 8, 16": (lambda row: row["M"] in (8, 16), (1.4, 1.6, 1.5)),
    "M = 64, 197": (lambda row: row["M"] in (64, 197), (1.4, 1.37, 1.5)),
    "M = 1576": (lambda row: row["M"] == 1576, (1.3, 1.35, 1.3)),
}

PREPACKED = "mkldnn prepacked"  # for a number of tokens

Layer = Callable[[Tensor], Tensor]


class Weight:
    """One 2:4 weight of one dtype, and every layer that multiplies by it."""

    def __init__(self, columns: int, rows: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        full = torch.randn(rows, columns, generator=generator)
        self.columns, self.rows, self.dtype = columns, rows, dtype
        self.x_dtype = torch.float32 if dtype == torch.int8 else dtype
        self.bias = torch.randn(rows, generator=generator).to(self.x_dtype)
        if dtype == torch.int8:
            full = torch.where(ops.prune_mask(full), full, 0)
            self.scales = full.abs().amax(1) / 127
            full = torch.round(full / self.scales[:, None])
        self.values, self.meta = ops.prune_compress(full.to(dtype))
        self.dense = ops.decompress(self.values, self.meta, in_features=columns)
        self.made: dict[tuple[str, int, int], list[Layer]] = {}  # by name, number of copies, and tokens if they matter

    def sparse(self) -> Layer:
        packed = ops.pack(self.values, self.meta, in_features=self.columns)
        scales = self.scales if self.dtype == torch.int8 else None
        return lambda x: ops.linear(
            x, packed, self.bias, scales, out_features=self.rows, in_features=self.columns, dtype=self.dtype
        )

    def rivals(self, tokens: int) -> dict[str, Callable[[], Layer]]:
        """Makers of the dense layers, each with a copy of the weight of its own."""
        if self.dtype == torch.int8:
            return {f"quantize_dynamic {engine}": lambda engine=engine: self._dynamic(engine) for engine in _engines()}
        rivals = {"F.linear": self._plain}
        if torch.backends.mkldnn.is_available() and (self.dtype != torch.float16 or _has_mkldnn_f16()):
            rivals[PREPACKED] = lambda: self._prepacked(tokens)
        return rivals

    def _plain(self) -> Layer:
        dense = self.dense.clone()
        return lambda x: F.linear(x, dense, self.bias)

    def _prepacked(self, tokens: int) -> Layer:
        dense = torch.ops.mkldnn._reorder_linear_weight(self.dense, tokens)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, dense, self.bias, "none", [], "")

    def _dynamic(self, engine: str) -> Layer:
        torch.backends.quantized.engine = engine
        layer = nn.Linear(self.columns, self.rows)
        layer.weight.data, layer.bias.data = self.dense * self.scales[:, None], self.bias
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear}, dtype=torch.qint8)[0]

    def check(self, layer: Layer, x: Tensor) -> None:
        """The first rows of a sparse layer's output: int8 to the bit, floats within the rounding of their sums."""
        y, x = layer(x)[:16], x[:16]
        if self.dtype == torch.int8:
            s = x.abs().amax(1, keepdim=True) / 127
            product = F.linear(torch.round(x / s).double(), self.dense.double()).float()
            assert torch.equal(y, product * (s * self.scales) + self.bias)
            return
        x, dense, bias = x.double(), self.dense.double(), self.bias.double()
        exact = F.linear(x, dense, bias)
        bound = (self.columns + 2) * 2**-24 * F.linear(x.abs(), dense.abs(), bias.abs())
        assert ((y - exact).abs() <= bound + torch.finfo(y.dtype).eps / 2 * exact.abs()).all()


def _engines() -> list[str]:
    return [engine for engine in ("x86", "onednn") if engine in torch.backends.quantized.supported_engines]


def _has_mkldnn_f16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()


def in_turn(layers: list[Layer], x: Tensor) -> Callable[[], Tensor]:
    turn = itertools.cycle(layers)
    return lambda: next(turn)(x)


def measure_cell(weight: Weight, tokens: int, cache: str, rounds: int) -> dict[str, measure.Timing]:
    """Every contender of one dtype at one shape; sparse24 first."""
    x = torch.randn(tokens, weight.columns, generator=torch.Generator().manual_seed(1)).to(weight.x_dtype)
    makers = {"sparse24": weight.sparse} | weight.rivals(tokens)
    contenders = {}
    for name, make in makers.items():
        nbytes = weight.values.nbytes + weight.meta.nbytes if name == "sparse24" else weight.dense.nbytes
        copies = 1 if cache == "hot" else math.ceil(COLD_BYTES / nbytes)
        layers = weight.made.setdefault((name, copies, tokens if name == PREPACKED else 0), [])
        layers.extend(make() for _ in range(copies - len(layers)))
        if name == "sparse24":
            weight.check(layers[0], x)
        contenders[name] = in_turn(layers, x)
    long = tokens * weight.columns * weight.rows > 3e9
    return measure.interleaved(contenders, 3 if long else rounds, slice_s=0.01)


def geometric_mean(numbers: list[float]) -> float:
    return math.exp(sum(map(math.log, numbers)) / len(numbers))


def summary(rows: list[dict]) -> tuple[Table, list[dict]]:
    """Geometric means of the ratios by regime, beside their floors."""
    table = Table(title="geometric mean of best dense / sparse24 (range), and its floor", title_justify="left")
    for column in ("regime", *DTYPES):
        table.add_column(column, justify="left" if column == "regime" else "right")
    records = []
    regimes = FLOORS | {"M = 1, all": (lambda row: row["M"] == 1, (math.nan,) * 3)}
    for regime, (holds, floors) in regimes.items():
        floor_of = dict(zip(("float32", "bfloat16", "int8"), floors, strict=True))
        cells = [regime]
        for dtype in DTYPES:
            ratios = [row["ratio"] for row in rows if holds(row) and row["dtype"] == dtype]
            floor = floor_of.get(dtype, math.nan)
            if not ratios:
                cells.append("")
                continue
            mean = geometric_mean(ratios)
            color = "[red]" if mean < floor else "[green]" if mean >= floor else ""
            wanted = "" if math.isnan(floor) else f", floor {floor:.2f}"
            cells.append(f"{color}{mean:.2f} ({min(ratios):.2f} to {max(ratios):.2f}){wanted}")
            records.append(
                {"regime": regime, "dtype": dtype, "mean": mean, "floor": None if math.isnan(floor) else floor}
            )
        table.add_row(*cells)
    return table, records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", metavar="KxN", default=[f"{k}x{n}" for k, n in SHAPES])
    parser.add_argument("--tokens", nargs="+", type=int, metavar="M", default=TOKENS["hot"])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--cache", nargs="+", choices=list(TOKENS), default=list(TOKENS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-save", action="store_true", help="print only; leave benchmarks/results alone")
    arguments = parser.parse_args()

    cells = [
        (tuple(int(size) for size in shape.split("x")), dtype, cache, tokens, threads)
        for shape in arguments.shapes
        for dtype in arguments.dtypes
        for cache in arguments.cache
        for tokens in arguments.tokens
        if tokens in TOKENS[cache]
        for threads in arguments.threads
    ]
    cells = [cell for cell in cells if cell[1] != "float16" or math.prod(cell[0]) * cell[3] <= F16_LIMIT]
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    rows = []
    table = Table(title="linear on the CPU, us: median [20 %, 80 %]", title_justify="left")
    for column in ("K x N", "dtype", "cache", "M", "threads", "sparse24", "best dense", "which", "ratio"):
        table.add_column(column, justify="left" if column in ("dtype", "cache", "which") else "right")
    before = torch.get_num_threads(), torch.backends.quantized.engine
    with Progress(console=console) as progress:
        task = progress.add_task("measuring", total=len(cells))
        weights: dict[tuple, Weight] = {}
        for (columns, outputs), dtype, cache, tokens, threads in cells:
            torch.set_num_threads(threads)
            if (columns, outputs, dtype) not in weights:
                weights = {(columns, outputs, dtype): Weight(columns, outputs, DTYPES[dtype])}
            timings = measure_cell(weights[columns, outputs, dtype], tokens, cache, arguments.rounds)
            ours = timings.pop("sparse24")
            best = min(timings, key=lambda name: timings[name].median)
            ratio = timings[best].median / ours.median
            rows.append(
                {"K": columns, "N": outputs, "dtype": dtype, "cache": cache, "M": tokens, "threads": threads}
                | {"ratio": ratio, "sparse24": asdict(ours)}
                | {"dense": {name: asdict(timing) for name, timing in timings.items()}}
            )
            table.add_row(
                *(f"{columns} x {outputs}", dtype, cache, str(tokens), str(threads)),
                *(ours.text(1e-6), timings[best].text(1e-6), best, f"{'[red]' if ratio < 1 else ''}{ratio:.2f}"),
            )
            progress.advance(task)
    torch.set_num_threads(before[0])
    torch.backends.quantized.engine = before[1]
    console.print(table)
    means_table, means = summary(rows)
    console.print(means_table)
    if not arguments.no_save:
        cpu = re.sub(r"[^a-z0-9]+", "-", measure.machine()["cpu"].lower()).strip("-")
        path = measure.save(f"linear-{cpu}", {"unit": "seconds", "geometric means": means, "rows": rows})
        console.print(f"written to {path.relative_to(measure.ROOT)}")


if __name__ == "__main__":
    main()
