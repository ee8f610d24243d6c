"""Launches on the GPU: graphs, streams, devices, threads, modules, and the known-answer test."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from problems import DTYPES, assert_exact, make, tokens
from torch import Tensor, nn

import sparse24
from sparse24 import ops

ROOT = Path(__file__).parents[2]
every_name = pytest.mark.parametrize("name", DTYPES)
SLEEP_CYCLES = 50_000_000  # tens of milliseconds: long enough to see what does not wait


def out_dtype(name: str) -> torch.dtype:
    return torch.int32 if name == "s8" else torch.float32


@every_name
def test_the_kernels_pass_their_known_answers(name: str) -> None:
    assert ops.device_problem(torch.device("cuda"), DTYPES[name]) == ""


KNOWN_ANSWER = """
import time, torch
x = torch.zeros(1 << 20, device="cuda"); x.add_(1); torch.cuda.synchronize()
from sparse24 import ops
for dtype in (torch.float16, torch.bfloat16, torch.int8):
    begin = time.perf_counter()
    problem = ops.device_problem(torch.device("cuda"), dtype)
    torch.cuda.synchronize()
    print(f"{dtype} {(time.perf_counter() - begin) * 1e3:.3f} {problem}")
"""


def test_known_answers_take_at_most_5_ms(record_property: Callable[[str, object], None]) -> None:
    """In a fresh process, the loading of the cubins included."""
    command = [sys.executable, "-c", KNOWN_ANSWER]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    took = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.startswith("torch.")}
    record_property("known answers, ms", done.stdout.strip())
    assert len(took) == 3 and all(len(one) == 1 and float(one[0]) <= 5 for one in took.values()), done.stdout


@every_name
@pytest.mark.parametrize("count", [3, 16, 130])
def test_capture_and_replay(name: str, count: int) -> None:
    problem = make(name, 256, 1024, "cuda", integers=True)
    x = tokens(problem, count, integers=True).contiguous()
    assert ops.device_problem(torch.device("cuda"), DTYPES[name]) == ""  # what comes before a capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = problem.linear(x, out_dtype=out_dtype(name))
    for shift in (1, 2):
        new = x.roll(shift, 0)
        x.copy_(new)
        y.zero_()
        graph.replay()
        assert_exact(y, new, problem.weight)


@every_name
def test_runs_on_the_current_stream(name: str) -> None:
    """x is written, on the same stream, behind a long wait: a launch elsewhere would read what was there before."""
    problem = make(name, 256, 512, "cuda", integers=True)
    for count in (5, 70):
        right = tokens(problem, count, integers=True)
        x = torch.zeros_like(right)
        problem.linear(x, out_dtype=out_dtype(name))
        torch.cuda.synchronize()
        stream, done = torch.cuda.Stream(), torch.cuda.Event()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(SLEEP_CYCLES)
            x.copy_(right)
            y = problem.linear(x, out_dtype=out_dtype(name))
            done.record()
        assert not done.query(), "the launch waited for the device"
        torch.cuda.current_stream().wait_event(done)
        assert_exact(y, right, problem.weight)


def test_streams_at_once() -> None:
    problem = make("f16", 512, 1024, "cuda", integers=True)
    streams = [torch.cuda.Stream() for _ in range(4)]
    inputs = [tokens(problem, 17 + 8 * i, integers=True) for i in range(4)]
    torch.cuda.synchronize()
    outputs: list[Tensor] = []
    for _ in range(10):
        for stream, x in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                outputs.append(problem.linear(x, out_dtype=torch.float32))
    torch.cuda.synchronize()
    for i, y in enumerate(outputs):
        assert_exact(y, inputs[i % 4], problem.weight)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@every_name
def test_two_devices(name: str) -> None:
    for device in ("cuda:1", "cuda:0", "cuda:1"):  # the current one stays 0
        problem = make(name, 192, 256, device, integers=True)
        for count in (5, 70):
            y = problem.linear(tokens(problem, count, integers=True), out_dtype=out_dtype(name))
            assert y.device == torch.device(device)
            assert_exact(y, tokens(problem, count, integers=True), problem.weight)
    first = make(name, 192, 256, "cuda:0", integers=True)
    with pytest.raises(RuntimeError, match="device"):
        first.linear(tokens(make(name, 192, 256, "cuda:1", integers=True), 5, integers=True))
    assert torch.cuda.current_device() == 0


def test_cold_threads() -> None:
    """A new thread has no context of its own; what it raises is seen here."""
    problem = make("f16", 192, 256, "cuda", integers=True)
    failures: list[BaseException] = []

    def work(count: int) -> None:
        try:
            x = tokens(problem, count, integers=True)
            for _ in range(20):
                assert_exact(problem.linear(x, out_dtype=torch.float32), x, problem.weight)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(count,)) for count in (1, 9, 33, 130)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


COLD_AUTOGRAD = """
import torch
from sparse24 import ops
w = torch.randn(96, 128).half()
values, meta = ops.prune_compress(w)
dense = ops.decompress(values, meta, in_features=128).cuda()
packed = ops.pack(values.cuda(), meta.cuda(), in_features=128)
x = torch.randint(-3, 4, (40, 128), device="cuda").half().requires_grad_()
y = ops.linear(x, packed, out_features=96, in_features=128, dtype=torch.float16)
y.sum().backward()  # in a thread of autograd that has met no CUDA yet
exact = torch.ones(40, 96, device="cuda").double() @ dense.double()
bound = 96 * 2**-10 * dense.double().abs().sum(0) + 1e-6
assert ((x.grad.double() - exact).abs() <= bound).all()
print("right")
"""


def test_autograd_in_a_cold_thread() -> None:
    command = [sys.executable, "-c", COLD_AUTOGRAD]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip() == "right", done.stderr[-3000:]


def test_autocast_and_gradients_of_a_layer() -> None:
    torch.manual_seed(0)
    dense = nn.Linear(264, 136).half()
    model = nn.Sequential(copy.deepcopy(dense))
    sparse24.prune(model)
    sparse24.convert(model)
    model.cuda()
    x = torch.randn(2, 21, 264, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.float16):
        y = model(x)
    assert y.dtype == torch.float16
    y.float().square().sum().backward()
    weight = model[0].weight.cuda().double() if not model[0].weight.is_cuda else model[0].weight.double()
    assert x.grad is not None
    near = 2 * y.double() @ weight
    assert ((x.grad.double() - near).norm() / near.norm()).item() < 2e-3


@pytest.mark.parametrize("name", ["f32", *DTYPES])  # float32 runs dense
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_goes_to_the_gpu_and_back_unchanged(name: str, bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(68, 40, bias=bias))
    dtype = torch.float32 if name in ("f32", "s8") else DTYPES[name]
    model.to(dtype)
    sparse24.prune(model)
    if name == "s8":
        sparse24.quantize(model)
    sparse24.convert(model)
    state = copy.deepcopy(model.state_dict())
    x = torch.randn(5, 68).to(dtype)
    with torch.inference_mode():
        here = model(x)
        there = model.cuda()(x.cuda()).cpu()
    assert (model[0].packed is None) == (name == "f32")
    on_gpu = {key: value.cpu() for key, value in model.state_dict().items()}
    back = model.cpu().state_dict()
    for key, value in state.items():
        assert torch.equal(on_gpu[key], value) and torch.equal(back[key], value), key
    step = {"f32": 2**-17, "f16": 2**-9, "bf16": 2**-6, "s8": 2**-17}[
        name
    ]  # twice two roundings of y, or its float32 sums
    assert (here - there).abs().max() <= step * here.abs().max()
    with torch.inference_mode():
        assert torch.equal(model(x), here)
