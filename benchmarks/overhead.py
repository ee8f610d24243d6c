"""What a call costs beyond its arithmetic: the operator and the module on 16 numbers, against nn.Linear.

    python -m benchmarks.overhead

One thread, [1, 16] times [16, 16]. Interleaved medians over runs of 100 calls, with the 20th and 80th percentile.
Goals: 3 us an operator, 6 us a module, under inference_mode and no_grad alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks import measure
from sparse24 import ops
from sparse24.nn import SparseLinear

CALLS = 100  # 0.5 ms: shorter than the slice of a scheduler, so that most runs are undisturbed
ROUNDS = 201
GOALS = {"operator": 3e-6, "module": 6e-6}  # seconds
MODES = {"inference_mode": torch.inference_mode, "no_grad": torch.no_grad}


def contenders(dtype: torch.dtype, int8: bool) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    layer = SparseLinear(16, 16, dtype=dtype, weight_dtype=torch.int8 if int8 else None).pack().eval()
    dense = nn.Linear(16, 16, dtype=dtype).eval()
    x = torch.randn(1, 16, dtype=dtype)
    packed, bias, scales, weight_dtype = layer.packed, layer.bias, layer.scales, layer.weight_dtype
    assert packed is not None

    def operator() -> torch.Tensor:
        return ops.linear(x, packed, bias, scales, out_features=16, in_features=16, dtype=weight_dtype)

    assert torch.equal(operator(), layer(x))
    return {"operator": operator, "module": lambda: layer(x), "torch: nn.Linear": lambda: dense(x)}


def repeated(call: Callable[[], object], mode: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        with mode():  # type: ignore[attr-defined]
            for _ in range(CALLS):
                call()

    return run


def main() -> None:
    console = Console()
    table = Table(title="call overhead, us: median [20 %, 80 %]", title_justify="left")
    for column in ("weight", "mode", "call", "us", "goal"):
        table.add_column(column, justify="right" if column in ("us", "goal") else "left", no_wrap=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    for weight, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("int8", torch.float32)):
        calls = contenders(dtype, int8=weight == "int8")
        runs = {(m, name): repeated(call, mode) for m, mode in MODES.items() for name, call in calls.items()}
        timings = measure.interleaved({" ".join(key): run for key, run in runs.items()}, ROUNDS, slice_s=0)
        for mode, name in runs:
            timing = timings[f"{mode} {name}"]
            timing = replace(timing, **{name: getattr(timing, name) / CALLS for name in ("median", "p20", "p80")})
            goal = GOALS.get(name)
            verdict = "" if goal is None else f"{goal * 1e6:.0f} {'met' if timing.median <= goal else 'missed'}"
            table.add_row(weight, mode, name, timing.text(1e-6), verdict)
            rows.append({"weight": weight, "mode": mode, "call": name, "goal": goal, **asdict(timing)})
        table.add_section()
    torch.set_num_threads(threads)
    console.print(table)
    path = measure.save("overhead", {"shape": [1, 16, 16], "threads": 1, "unit": "seconds", "rows": rows})
    console.print(f"written to {path.relative_to(measure.ROOT)}")


if __name__ == "__main__":
    main()
