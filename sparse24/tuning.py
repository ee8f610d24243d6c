"""tune(): measures which CPU kernels are fastest for the layers of a model, and keeps it for this machine.

What is measured replaces the shipped table for the same CPU, instruction set, number of threads and version.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse24 import ops
from sparse24.library import WEIGHT_NAMES, cache_folder
from sparse24.library import ops as _ops
from sparse24.nn import SparseLinear
from sparse24.reporting import Report, progress

_FORMAT = "sparse24 tuned kernels, 1"
_SECONDS = 0.1  # for each kernel of a product
_ROUNDS = (5, 200)  # at least, at most


@dataclass(frozen=True)
class Measured:
    """What was measured for one product."""

    dtype: str  # of the weight
    weight_only: bool
    x_dtype: str
    tokens: int
    out_features: int
    in_features: int
    isa: str
    threads: int
    kernels: str  # the fastest
    microseconds: float
    gain: float  # the time of F.linear with the dense weight over that
    date: str

    @property
    def key(self) -> tuple[Any, ...]:
        return tuple(asdict(self).values())[:8]

    @property
    def line(self) -> str:
        text = " ".join(str(int(word) if isinstance(word, bool) else word) for word in (*self.key, self.kernels))
        return f"{text} tuned: measured {self.gain:.2f}x of dense on {self.date}"


def default_path() -> Path:
    """Where tune() keeps what it measured: one file for each model of CPU and version."""
    from sparse24 import __version__

    cpu = re.sub(r"[^A-Za-z0-9]+", "-", _ops.cpu_name()).strip("-").lower()
    return cache_folder() / f"tuned-{cpu}-{__version__}.json"


def tune(
    model: nn.Module | Iterable[SparseLinear],
    example_inputs: Any = None,
    *,
    tokens: Iterable[int] = (1, 8, 16, 64, 197),
    path: str | Path | None = None,
) -> Report[Measured]:
    """Measure every kernel, and the dense hand-over, for each distinct product of the packed layers on the CPU.

    example_inputs: what the model is called with once, as for report(): then each M that its layers see is measured
    instead of `tokens`. path: the file, default_path() by default. It is written after each product, and a product that
    it holds already is not measured again: an interrupted call goes on where it was. What it holds is used from now on.
    """
    file = default_path() if path is None else Path(path)
    done = {one.key: one for one in _read(file)}
    rows: list[Measured] = []
    layers = list(_layers(model))
    seen = _tokens_seen(model, layers, example_inputs) if example_inputs is not None else {}
    products: dict[tuple[Any, ...], SparseLinear] = {}
    for layer in layers:
        for m in seen.get(id(layer), ()) if example_inputs is not None else tokens:
            products.setdefault(_key(layer, m), layer)
    for key, layer in progress(products.items(), "measuring"):
        if key not in done:
            done[key] = _measure(layer, key)
            _write(file, done.values())
        rows.append(done[key])
    load_tuned(file)
    return Report("sparse24 tuned", rows, (f"kept in {file}",))


def load_tuned(path: str | Path | None = None) -> bool:
    """Use what tune() measured and kept. Returns whether the file was there and of this CPU and version."""
    file = default_path() if path is None else Path(path)
    measured = _read(file)
    _ops.set_tuned_kernels("\n".join(one.line for one in measured))
    return bool(measured)


def _layers(model: nn.Module | Iterable[SparseLinear]) -> Iterator[SparseLinear]:
    modules = model.modules() if isinstance(model, nn.Module) else model
    return (
        m for m in modules if isinstance(m, SparseLinear) and m.packed is not None and m.packed.device.type == "cpu"
    )


def _tokens_seen(model: Any, layers: list[SparseLinear], example_inputs: Any) -> dict[int, set[int]]:
    seen: dict[int, set[int]] = {id(layer): set() for layer in layers}

    def record(layer: nn.Module, args: tuple[Any, ...]) -> None:
        seen[id(layer)].add(args[0].shape[:-1].numel())

    handles = [layer.register_forward_pre_hook(record) for layer in layers]
    try:
        with torch.no_grad():
            if isinstance(example_inputs, dict):
                model(**example_inputs)
            else:
                model(*((example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _key(layer: SparseLinear, tokens: int) -> tuple[Any, ...]:
    types = (WEIGHT_NAMES[layer.weight_dtype, layer.pattern], layer.weight_only, _name(layer.dtype))
    return (*types, tokens, layer.out_features, layer.in_features, ops.cpu_isa(), torch.get_num_threads())


def _measure(layer: SparseLinear, key: tuple[Any, ...]) -> Measured:
    x = torch.randn(key[3], layer.in_features).to(layer.dtype)
    dense = layer._detached_weight()
    names: list[str] = _ops.cpu_kernels(*key[:3]).split()

    def forced(name: str) -> Callable[[], object]:
        def run() -> object:
            _ops.force_cpu_kernels(name)
            try:
                return layer(x)
            finally:
                _ops.force_cpu_kernels("")

        return run

    runs = [lambda: F.linear(x, dense, layer.bias), *map(forced, names)]
    with torch.inference_mode():
        times = _interleaved(runs)
    best = min(range(len(names)), key=lambda i: times[i + 1])
    seconds = times[best + 1]
    today = datetime.date.today().isoformat()
    return Measured(*(*key, names[best], seconds * 1e6, times[0] / seconds, today))


def _interleaved(runs: list[Callable[[], object]]) -> list[float]:
    """The median time of each, one round after the other, so that what disturbs the machine disturbs all alike."""
    times: list[list[float]] = [[] for _ in runs]
    end = time.perf_counter() + _SECONDS * len(runs)
    while len(times[0]) < _ROUNDS[0] or (time.perf_counter() < end and len(times[0]) < _ROUNDS[1]):
        for run, own in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            own.append(time.perf_counter() - start)
    return [statistics.median(own) for own in times]


def _read(file: Path) -> list[Measured]:
    """What the file holds; nothing, with a warning that names it, where it is damaged or of another CPU or version."""
    from sparse24 import __version__

    try:
        content = json.loads(file.read_text())
        head = (content["format"], content["cpu"], content["version"])
        if head != (_FORMAT, _ops.cpu_name(), __version__):
            raise ValueError(f"it is of {head}")
        return [Measured(**one) for one in content["measured"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{file} is ignored: no kernels tuned on this machine ({error})", stacklevel=3)
        return []


def _write(file: Path, measured: Iterable[Measured]) -> None:
    from sparse24 import __version__

    content = {"format": _FORMAT, "cpu": _ops.cpu_name(), "version": __version__}
    content["measured"] = [asdict(one) for one in measured]
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".json", delete=False) as temporary:
        json.dump(content, temporary, indent=1)
    os.replace(temporary.name, file)
