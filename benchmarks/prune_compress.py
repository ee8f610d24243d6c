"""Prune and compress 4096 x 4096 on the CPU against what torch has for each step.

    python -m benchmarks.prune_compress

Interleaved medians with the 20th and 80th percentile. Every output is checked first, in the same run.
"""

from __future__ import annotations

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
        "torch: prune by topk + scatter": lambda: topk_scatter(weight),
        "torch: compress, from_dense_cutlass": lambda: sparse_semi_structured_from_dense_cutlass(dense_12),
    }
    if weight.is_floating_point():
        sparsifier = sparsifier_of(weight.clone())
        result["torch.ao: WeightNormSparsifier.step"] = sparsifier.step
    return result


def main() -> None:
    console = Console()
    rows = []
    table = Table(title=f"prune and compress {SIZE} x {SIZE}, ms: median [20 %, 80 %]", title_justify="left")
    for column in ("dtype", "threads", "what", "ms", "GB/s", "x prune_compress"):
        table.add_column(column, justify="left" if column in ("dtype", "what") else "right")
    threads_before = torch.get_num_threads()
    for dtype in track(DTYPES, console=console, description="measuring"):
        generator = torch.Generator().manual_seed(0)
        weight = (
            (torch.randn(SIZE, SIZE, generator=generator) * (30 if dtype == torch.int8 else 1))
            .clamp(-127, 127)
            .to(dtype)
        )
        dense = ops.decompress(*ops.prune_compress(weight), in_features=SIZE)
        # torch compresses float32 as tf32, one of each two.
        dense_12 = torch.where(ops.prune_mask(weight, "1:2"), weight, 0) if dtype == torch.float32 else dense
        check(weight, dense, dense_12)
        moved = weight.nbytes + sum(tensor.nbytes for tensor in ops.prune_compress(weight))
        traffic = {
            "sparse24.prune_compress": moved,
            "sparse24.compress (pruned before)": moved,
            "sparse24.prune_mask": weight.nbytes + weight.numel(),
            "sparse24.decompress": moved,
            "torch: copy_ of the matrix": 2 * weight.nbytes,
        }
        for threads in (1, 2):
            torch.set_num_threads(threads)
            timings = measure.interleaved(contenders(weight, dense, dense_12), ROUNDS)
            ours = timings["sparse24.prune_compress"].median
            for name, timing in timings.items():
                gigabytes = traffic[name] / timing.median * 1e-9 if name in traffic else None
                dtype_name = str(dtype).removeprefix("torch.")
                rows.append(
                    {"dtype": dtype_name, "threads": threads, "what": name, "GB/s": gigabytes, **asdict(timing)}
                )
                table.add_row(
                    dtype_name,
                    str(threads),
                    name,
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
