"""What integers give besides: latency of one image on this CPU, and the bytes that models keep resident.

Neither asks how good a model is: the trained ones are pruned by magnitude in one shot, those of Fashion-MNIST have
random weights. All rows of a model are timed in turns, in one process, on all cores. The dense rival in int8 is torch's
own dynamic quantisation, which has linear layers alone.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from rich.progress import track
from torch import Tensor, nn

import sparse24
from benchmarks import measure
from benchmarks.cpu.rivals import dynamic_int8, int8_engines
from demo import restoration, vision
from demo.photographs import HELD_OUT, centre, photograph
from sparse24.pruning import Skip
from sparse24.sparse_module import SparseModule
from studies import fashion, trained
from studies.fashion import converted
from studies.quantised import BASES, DENSE, FLOAT, quantised

FORMATS = {"2:4": (FLOAT, "int8 by token", "int8 by percentile"), "pair 4:8": ("int4 by token",)}
CHAINED = "int8 by percentile, chained"
# Bits of float32 over those of a group in its format: two of four values of 32 or 8 bits, or four of eight of 4, and
# four bits that say where they were.
NOMINAL = {FLOAT: 128 / (64 + 4), "int8": 128 / (16 + 4), "int4": 256 / (16 + 4)}
BUDGET_S, ROUNDS = 40.0, 15  # of timing, for each model

Found = dict[str, dict[str, Any]]  # by row: latency and gain as spreads, resident and weights in bytes


class Subject(NamedTuple):
    load: Callable[[], nn.Module]
    skip: Skip
    input: Callable[[], Tensor]  # one image


def _square() -> Tensor:
    return centre(photograph(HELD_OUT[0]), 128)[None]


MODELS = {
    **{
        name: Subject(make, sparse24.paper_skips(), lambda: torch.randn(1, 1, 28, 28))
        for name, make in fashion.MODELS.items()
    },
    **{
        name: Subject(trained.MODELS[name].load, trained.MODELS[name].skip, image)
        for name, image in (
            ("DAT-light x2", lambda: restoration.downscale(_square())),
            ("demosaicnet", lambda: trained.mosaic_of(_square())),
            ("DINOv2 ViT-S/14", lambda: vision.held_out()[:1]),
        )
    },
}


def contenders(dense: nn.Module, skip: Skip, x: Tensor) -> Iterator[tuple[str, nn.Module]]:
    """Each row of the table by name, as it runs; `dense` first."""
    yield f"{DENSE}, {FLOAT}", dense
    if any(isinstance(module, nn.Linear) for module in dense.modules()):
        for engine in int8_engines():
            yield f"{DENSE}, int8 of torch.ao ({engine})", dynamic_int8(dense, engine)
    for base, names in FORMATS.items():
        pruned = copy.deepcopy(dense)
        sparse24.prune(pruned, base, skip=skip)
        for name in names:
            assert name in (FLOAT, *BASES[base])
            yield f"{base}, {name}", converted(quantised(pruned, name, skip, [x]))
        if base == "2:4":
            chained = converted(quantised(pruned, "int8 by percentile", skip, [x]))
            sparse24.chain(chained, x)
            yield f"{base}, {CHAINED}", chained


def weight_bytes(model: nn.Module, names: list[str]) -> int:
    """Of the weights of the named layers, as they lie: codes, scales and padding included, biases not."""
    total = 0
    for name in names:
        layer = model.get_submodule(name)
        if isinstance(layer, SparseModule):
            tensors = [t for key, t in [*layer.named_parameters(), *layer.named_buffers()] if key != "bias"]
        else:
            weight = layer.weight
            tensors = [weight if isinstance(weight, Tensor) else weight()]  # a method of torch.ao's layers
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return total


def of(subject: Subject, budget_s: float) -> Found:
    torch.manual_seed(0)
    dense, x = subject.load().eval().requires_grad_(False), subject.input()
    models = dict(contenders(dense, subject.skip, x))
    report = sparse24.prune(copy.deepcopy(dense), skip=subject.skip)
    names = [row.name for row in report.rows if row.outcome == "pruned"]
    with torch.inference_mode():
        seconds = measure.within({way: functools.partial(one, x) for way, one in models.items()}, budget_s, ROUNDS)
    reference = seconds[f"{DENSE}, {FLOAT}"]
    return {
        way: {
            "latency_ms": measure.Spread.of(1e3 * second for second in seconds[way]).to_dict(),
            "gain": measure.ratio(reference, seconds[way]).to_dict(),
            "resident": vision.resident_bytes(one),
            "weights": weight_bytes(one, names),
        }
        for way, one in models.items()
    }


def run() -> dict[str, Found]:
    return {name: of(MODELS[name], BUDGET_S) for name in track(MODELS, "quantised-speed")}


# ---- The table -------------------------------------------------------------------------------------------------------


def nominal(way: str) -> float:
    """How many times smaller than in float32 a weight of this row is, by its format."""
    base, name = way.split(", ", 1)
    if base == DENSE:
        return 1.0 if name == FLOAT else 4.0
    return next(times for kind, times in NOMINAL.items() if name.startswith(kind))


def markdown(found: dict[str, Found]) -> str:
    lines = [
        "| one image | ms | gain | resident, kB | smaller | pruned weights, kB | smaller | nominal |",
        "|---" + "|--:" * 7 + "|",
    ]
    for model, ways in found.items():
        dense = ways[f"{DENSE}, {FLOAT}"]
        lines.append(f"| **{model}** |" + " |" * 7)
        for way, row in ways.items():
            ms, gain = row["latency_ms"], row["gain"]
            cells = [f"{ms['median']:.3g} ({ms['p20']:.3g}–{ms['p80']:.3g})"]
            cells.append("" if row is dense else f"{gain['median']:.2f}x ({gain['p20']:.2f}–{gain['p80']:.2f})")
            for key in ("resident", "weights"):
                cells += [f"{row[key] / 1e3:,.0f}", "" if row is dense else f"{dense[key] / row[key]:.2f}x"]
            cells.append("" if row is dense else f"{nominal(way):.2f}x")
            lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
