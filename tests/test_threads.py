"""Threads: the kernels run on torch's, no more of them than it is told, and small products on the caller's alone."""

import subprocess
import sys

import pytest

# How many threads the process has started: OpenMP starts its own with the first parallel region.
PROGRAM = """
import os, torch
from sparse24 import ops
def count():
    return len(os.listdir("/proc/self/task"))
torch.set_num_threads(1)
at_first = count()
values, meta = ops.prune_compress(torch.randn({n}, {k}))
packed = ops.pack(values, meta, in_features={k})
x = torch.randn({tokens}, {k})
torch.set_num_threads({threads})
for _ in range(3):
    ops.linear(x, packed, out_features={n}, in_features={k}, dtype=torch.float32)
print(count() - at_first)
torch.randn(1024, 1024) @ torch.randn(1024, 1024)
print(count() - at_first)
"""


def threads_of(threads, tokens, n, k):
    program = PROGRAM.format(threads=threads, tokens=tokens, n=n, k=k)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.parametrize("threads", [1, 2])
def test_no_more_threads_than_torch_is_told(threads):
    assert threads_of(threads, tokens=256, n=2048, k=1024) == [threads - 1, threads - 1]


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_small_products_enter_no_parallel_region():
    assert threads_of(2, tokens=1, n=64, k=64) == [0, 1]
