"""Every kernel once on ragged shapes, for compute-sanitizer: `make gpu` runs it under each of its tools.

The tails of x and y lie at the ends of allocations of their own, so that an access beyond them is seen:
PYTORCH_NO_CUDA_MEMORY_CACHING=1 makes each tensor one.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

import torch  # noqa: E402
from problems import assert_exact, cannot_run, every_kernel, force, make, tokens  # noqa: E402

SHAPES = [(1, 65, 20), (13, 200, 133), (70, 321, 140), (130, 449, 272)]


def main() -> None:
    ran = set()
    for name, kernel in every_kernel():
        for splits in (1, 2):
            for count, rows, columns in SHAPES:
                problem = make(name, rows, columns, "cuda", integers=True)
                x = tokens(problem, count, integers=True)
                try:
                    with force(kernel, splits):
                        y = problem.linear(x, out_dtype=torch.int32 if name == "s8" else torch.float32)
                except RuntimeError as error:
                    if not cannot_run(error):
                        raise
                    continue
                assert_exact(y, x, problem.weight)
                ran.add(kernel)
    torch.cuda.synchronize()
    print(f"ran {len(ran)} kernels: {', '.join(sorted(filter(None, ran)))}")


if __name__ == "__main__":
    main()
