"""Prune and compress 4096 x 4096 on the CPU against what torch has for each step.

    python -m benchmarks.prune_compress

Interleaved medians with the 20th and 80th percentile. Every output is checked first, in the same run. "fresh": the
outputs lie in memory just mapped, whose pages the system clears on the way, as the first large tensors of a process do.
"reused": in memory that malloc has had before, which shows the kernels themselves.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from dataclasses import asdict

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.ao.pruning import WeightNormSparsifier

from benchmarks import measure
from sparse24 import ops, reference

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

SIZE = 4096
ROUNDS = 9
DTYPES = [torch.float32, torch.float16, torch.int8]

_LIBC = ctypes.CDLL(None)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h


def use_fresh_memory() -> None:
    """Every large tensor is mapped anew, and unmapped when it is freed."""
    _LIBC.mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def reuse_memory() -> None:
    """From here on malloc serves large tensors too from memory that it keeps."""
    _LIBC.mallopt(_M_MMAP_MAX, 0)
    _LIBC.mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def topk_scatter(weight: Tensor) -> Tensor:
    """Magnitude pruning as it is usually written in torch."""
    groups = weight.view(-1, 4)
    chosen = groups.abs().topk(2, dim=-1).indices
    return groups * torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, chosen, True)


def sparsifier_of(weight: Tensor) -> WeightNormSparsifier:
    layer = nn.Linear(SIZE, SIZE, bias=False, dtype=weight.dtype)
    layer.weight.data = weight
    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(nn.Sequential(layer), config=[{"tensor_fqn": "0.weight"}])
    return sparsifier


def kept_magnitudes(weight: Tensor, mask: Tensor) -> Tensor:
    """What each group keeps, in order of size: the same however ties are broken."""
    return (weight.float().abs() * mask).view(-1, 4).sort(dim=-1).values


def check(weight: Tensor, dense: Tensor, dense_12: Tensor) -> None:
    """That the contenders agree, before anyone is timed."""
    mask = ops.prune_mask(weight)
    pruned = torch.where(mask, weight, 0)
    assert torch.equal(dense, pruned)
    values, meta = ops.prune_compress(weight)
    assert all(torch.equal(a, b) for a, b in zip(ops.compress(pruned), (values, meta), strict=True))
    assert torch.equal(mask[:64], reference.prune_mask(weight[:64]))
    kept = kept_magnitudes(weight, mask)
    assert torch.equal(kept, topk_scatter(weight).float().abs().view(-1, 4).sort(dim=-1).values)
    if weight.is_floating_point():
        sparsifier = sparsifier_of(weight.clone())
        sparsifier.step()
        theirs = sparsifier.groups[0]["module"].parametrizations.weight[0].mask
        assert torch.equal(kept, kept_magnitudes(weight, theirs))
    pattern = "1:2" if weight.dtype == torch.float32 else "2:4"
    theirs = reference.from_cutlass(*sparse_semi_structured_from_dense_cutlass(dense_12))
    assert torch.equal(ops.decompress(*theirs, in_features=SIZE, pattern=pattern), dense_12)


def contenders(weight: Tensor, dense: Tensor, dense_12: Tensor) -> dict[str, Callable[[], object]]:
    values, meta = ops.prune_compress(weight)
    target = torch.empty_like(weight)
    result: dict[str, Callable[[], object]] = {
        "sparse24.prune_compress": lambda: ops.prune_compress(weight),
        "sparse24.compress (pruned before)": lambda: ops.compress(dense),
        "sparse24.prune_mask": lambda: ops.prune_mask(weight),
        "sparse24.decompress": lambda: ops.decompress(values, meta, in_features=SIZE),
        "torch: copy_ of the matrix": lambda: target.copy_(weight),
        "torch: clone of the matrix": weight.clone,
        "torch: prune by topk + scatter": lambda: topk_scatter(weight),
        "torch: from_dense_cutlass": lambda: sparse_semi_structured_from_dense_cutlass(dense_12),
    }
    if weight.is_floating_point():
        sparsifier = sparsifier_of(weight.clone())
        result["torch.ao: WeightNormSparsifier"] = sparsifier.step
    return result


def main() -> None:
    console = Console(width=120)
    rows: list[dict[str, object]] = []
    table = Table(title=f"prune and compress {SIZE} x {SIZE}, ms: median [20 %, 80 %]", title_justify="left")
    for column in ("memory", "dtype", "threads", "what", "ms", "GB/s", "x prune_compress"):
        table.add_column(column, justify="left" if column in ("memory", "dtype", "what") else "right")
    threads_before = torch.get_num_threads()
    settings = [(memory, dtype) for memory in (use_fresh_memory, reuse_memory) for dtype in DTYPES]
    for prepare, dtype in track(settings, console=console, description="measuring"):
        prepare()
        fresh = prepare is use_fresh_memory
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(SIZE, SIZE, generator=generator)
        weight = (weight * 30).clamp(-127, 127).to(dtype) if dtype == torch.int8 else weight.to(dtype)
        dense = ops.decompress(*ops.prune_compress(weight), in_features=SIZE)
        # torch compresses float32 as tf32, one of each two.
        dense_12 = torch.where(ops.prune_mask(weight, "1:2"), weight, 0) if dtype == torch.float32 else dense
        if fresh:
            check(weight, dense, dense_12)
        moved = weight.nbytes + sum(tensor.nbytes for tensor in ops.prune_compress(weight))
        traffic = {
            "sparse24.prune_compress": moved,
            "sparse24.compress (pruned before)": moved,
            "sparse24.prune_mask": weight.nbytes + weight.numel(),
            "sparse24.decompress": moved,
            "torch: copy_ of the matrix": 2 * weight.nbytes,
            "torch: clone of the matrix": 2 * weight.nbytes,
        }
        for threads in (1, 2):
            torch.set_num_threads(threads)
            runs = contenders(weight, dense, dense_12)
            if fresh:
                runs = {name: runs[name] for name in ("sparse24.prune_compress", "torch: clone of the matrix")}
            timings = measure.interleaved(runs, ROUNDS)
            ours = timings["sparse24.prune_compress"].median
            for name, timing in timings.items():
                gigabytes = traffic[name] / timing.median * 1e-9 if name in traffic else None
                place = {
                    "memory": "fresh" if fresh else "reused",
                    "dtype": str(dtype).removeprefix("torch."),
                    "threads": threads,
                    "what": name,
                }
                rows.append({**place, "GB/s": gigabytes, **asdict(timing)})
                table.add_row(
                    *map(str, place.values()),
                    timing.text(),
                    f"{gigabytes:.1f}" if gigabytes else "",
                    f"{timing.median / ours:.2f}",
                )
            table.add_section()
    torch.set_num_threads(threads_before)
    console.print(table)
    path = measure.save("prune_compress", {"shape": [SIZE, SIZE], "unit": "seconds", "rows": rows})
    console.print(f"written to {path.relative_to(measure.ROOT)}")


if __name__ == "__main__":
    main()
