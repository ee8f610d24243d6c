"""sparse24.emulate, mostly on decompress: the CPU's numbers, reports, bugs planted in the kernel, launches that a
driver refuses, and the state of threads, generators, compiled functions and Ctrl-C."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

import sparse24
from sparse24 import ops
from sparse24.emulation import Emulation, emulate
from tests.ptx.oracles import BUILD, ORDERS, compiled

ROOT = Path(__file__).parents[1]
ARCHS = ["sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_100f", "sm_120", "sm_120f"]
K = 70  # neither the groups of a row nor the bytes of its meta are full


@pytest.fixture
def weight() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return sparse24.prune_compress(torch.randn(19, K).half())


def decompress(weight: tuple[Tensor, Tensor]) -> Tensor:
    return sparse24.decompress(*weight, in_features=K)


def emulates(weight: tuple[Tensor, Tensor]) -> bool:
    """Whether this thread does: only the CPU's operator looks at meta before it runs."""
    try:
        decompress((weight[0], torch.zeros_like(weight[1])))
    except RuntimeError as error:
        return "meta is corrupt" not in str(error)
    return True


def edited(*edits: tuple[str, str]) -> Path:
    """PTX of kernels/decompress.cu with each edit's first text, which is there once, replaced by its second."""
    text = (ROOT / "kernels" / "decompress.cu").read_text()
    for old, new in edits:
        assert text.count(old) == 1, f"decompress.cu has {text.count(old)} times: {old}"
        text = text.replace(old, new)
    source = BUILD / "edited" / hashlib.sha256(text.encode()).hexdigest()[:20] / "decompress.cu"
    if not source.exists():
        source.parent.mkdir(parents=True, exist_ok=True)
        unfinished = source.with_name(f"{os.getpid()}.cu")
        unfinished.write_text(text)
        unfinished.rename(source)
    headers = sorted((ROOT / "kernels").glob("*.cuh"))
    options = ["--ptx", "-arch=compute_80", "-O3", "-lineinfo", f"-I{ROOT / 'kernels'}"]
    return compiled(source, ".ptx", options, headers)


# ---- What it computes and reports ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["2:4", "1:2", "pair 4:8"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "int4"])
def test_equals_the_cpu(dtype: str, pattern: str) -> None:
    torch.manual_seed(1)
    for rows, columns in ((1, 4), (3, 1), (9, 66), (33, 264)):
        if dtype == "int4":
            columns += columns % 2  # as many as whole bytes hold
            dense = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)
        else:
            dense = (4 * torch.randn(rows, columns)).to(getattr(torch, dtype))
        arguments = (*sparse24.prune_compress(dense, pattern=pattern), columns, dtype, pattern)
        expected = torch.ops.sparse24.decompress(*arguments)
        with emulate() as run:
            actual = torch.ops.sparse24.decompress(*arguments)
        assert torch.equal(actual, expected), (rows, columns)
        assert len(run.reports) == 1


@pytest.mark.parametrize("arch", ARCHS)
def test_every_arch(weight: tuple[Tensor, Tensor], arch: str) -> None:
    with emulate(arch) as run:
        assert torch.equal(decompress(weight), decompress(weight))
    assert run.arch == arch and len(run.reports) == 2


def test_orders_and_threads(weight: tuple[Tensor, Tensor]) -> None:
    expected = decompress(weight)
    for order, seed in ORDERS:
        for threads in (1, 3):
            with emulate(order=order, seed=seed, threads=threads):
                assert torch.equal(decompress(weight), expected)


def test_reports_are_in_order_and_stay(weight: tuple[Tensor, Tensor]) -> None:
    other = sparse24.prune_compress(torch.randn(4, K))
    with emulate() as run:
        assert run.reports == []
        decompress(weight)
        assert [report.kernel for report in run.reports] == ["decompress_b16"]
        decompress(other)
        sparse24.prune_compress(torch.randn(4, K))  # stays the CPU's
        decompress(weight)
        inside = run.reports
    assert [report.kernel for report in run.reports] == ["decompress_b16", "decompress_b32", "decompress_b16"]
    assert run.reports == inside and all(report.ok for report in inside)
    with run:  # once more: its reports come on top
        decompress(other)
    assert [report.kernel for report in run.reports][3:] == ["decompress_b32"]


def test_counters(weight: tuple[Tensor, Tensor]) -> None:
    with emulate() as run:
        decompress(weight)
    with emulate(counters=True) as counted:
        decompress(weight)
    plain, full = run.reports[0].counters, counted.reports[0].counters
    assert plain.instructions == full.instructions > 0 and not plain.bytes
    values, meta = weight
    moved = meta.numel() + values.numel() * 2 + 19 * K * 2  # at least: some values are read twice
    assert full.bytes["global"] >= moved and full.global_sectors >= full.global_ideal > 0


def test_launches_give_their_addresses_back(weight: tuple[Tensor, Tensor]) -> None:
    """A process has 1,023 of them; each launch takes three."""
    small = (weight[0][:1], weight[1][:1])
    with emulate(threads=1, checks=False) as run:
        for _ in range(400):
            decompress(small)
    assert len(run.reports) == 400


def test_innermost_counts(weight: tuple[Tensor, Tensor]) -> None:
    with emulate() as outer:
        decompress(weight)
        with emulate("sm_90") as inner:
            decompress(weight)
            decompress(weight)
        decompress(weight)
    assert (len(outer.reports), len(inner.reports)) == (2, 2)
    assert not emulates(weight)


def test_as_decorator(weight: tuple[Tensor, Tensor]) -> None:
    run = emulate()

    @run
    def twice(depth: int) -> Tensor:
        """Its documentation."""
        return decompress(weight) if depth == 0 else twice(depth - 1)

    assert torch.equal(twice(2), decompress(weight))
    assert len(run.reports) == 1 and twice.__doc__ == "Its documentation."

    def generator() -> Iterator[int]:
        yield 1

    async def coroutine() -> None:
        pass

    async def both() -> AsyncIterator[int]:
        yield 1

    for function in (generator, coroutine, both):
        with pytest.raises(TypeError, match=f"{function.__name__} runs after its call has returned"):
            run(function)


def test_backward_is_emulated(weight: tuple[Tensor, Tensor]) -> None:
    values, meta = weight
    values.requires_grad_()
    with emulate() as run:
        dense = sparse24.decompress(values, meta, in_features=K)
        dense.sum().backward()
    assert [report.kernel for report in run.reports] == ["decompress_b16"]
    assert values.grad is not None and set(values.grad.flatten().tolist()) <= {0.0, 1.0}


# ---- The linear product ----------------------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T of a weight that is 2:4 already."""
    out_features, in_features = weight.shape
    packed = ops.pack(*sparse24.compress(weight), in_features=in_features)
    return ops.linear(x, packed, out_features=out_features, in_features=in_features, dtype=weight.dtype)


def test_kernel_and_splits_as_asked() -> None:
    torch.manual_seed(3)
    weight = torch.randint(-4, 5, (40, 256)).half()
    weight = torch.where(sparse24.prune_mask(weight), weight, 0)
    x = torch.randint(-4, 5, (33, 256)).half()
    expected = linear(x, weight)
    kernels = {}
    for name, options in {
        "as planned": {},
        "tile": {"linear_kernel": "linear_f16_64x64"},
        "split": {"linear_kernel": "linear_f16_64x64", "splits": 2},
    }.items():
        with emulate(**options) as run:
            assert torch.equal(linear(x, weight), expected), name
        kernels[name] = [report.kernel for report in run.reports]
    assert kernels["as planned"][0] == "pack_b16"
    assert kernels["tile"] == ["pack_b16", "linear_f16_64x64"]
    assert kernels["split"][:2] == kernels["tile"] and kernels["split"][2:] == ["linear_reduce_f32"]
    with emulate(linear_kernel="linear_f16_1x1"), pytest.raises(RuntimeError, match="linear_f16_64x64.*linear_f16_1x1"):
        linear(x, weight)


def test_tensor_cores_sum_as_the_archs() -> None:
    """2^22 - 2^22 + 2 * 2^-3: an eighth is lost with 24 bits below the largest product, not with 25."""
    weight = torch.tensor([[2048, -2048, 0, 0, 0.125, 0.125, 0, 0]]).half()
    x = torch.tensor([[2048, 2048, 0, 0, 1, 1, 0, 0]]).half()
    told = {("sm_80", None): 0, ("sm_87", None): 0, ("sm_89", None): 0, ("sm_86", "float64"): 0.25}
    told |= {("sm_90", None): 0.25, ("sm_100", None): 0.25, ("sm_120", None): 0.25, ("sm_90", "sm_80"): 0}
    for (arch, numerics), expected in told.items():
        with emulate(arch, numerics=numerics, linear_kernel="linear_f16_64x64"):
            assert linear(x, weight).item() == expected, (arch, numerics)


# ---- What it finds ---------------------------------------------------------------------------------------------------

KEPT = "const T* kept = values + (row * groups + group) * 2 * PAIR;"
LOAD = "const T first = kept[i], second = kept[PAIR + i];"
CHOSEN = "unit == second_of(code) ? second : T(0);"
SIGNATURE = "void NAME("
WIDE_LOAD = (
    "const uint32_t both = *reinterpret_cast<const uint32_t*>(kept); const T first = T(both), second = T(both >> 16);"
)


@pytest.mark.parametrize(
    "kind, edit",
    [
        ("out_of_bounds", (KEPT, KEPT.replace("group)", "group + 1)"))),
        ("uninitialized", (CHOSEN, CHOSEN.replace("T(0)", "dense[row * columns + column]"))),
    ],
)
def test_planted_bug_is_named(weight: tuple[Tensor, Tensor], kind: str, edit: tuple[str, str]) -> None:
    path = edited(edit)
    with emulate("sm_87", modules={"decompress": path}) as run:
        with pytest.raises(RuntimeError) as caught:
            decompress(weight)
    first, finding, *_ = str(caught.value).splitlines()
    assert re.fullmatch(r"kernel 'decompress_b16' on an emulated sm_87: \d+ findings?", first)
    (report,) = run.reports
    assert report.errors[0].kind == kind and not report.ok
    assert finding == f"  {report.errors[0]}"  # in the same words
    assert "decompress.cu:" in finding

    with emulate(checks=False, modules={"decompress": path}) as run:
        decompress(weight)  # what is out of bounds is never touched, found or not
    assert run.reports[0].ok
    others = {"memory", "init", "race", "sync", "async", "tensor"} - {"memory" if kind == "out_of_bounds" else "init"}
    with emulate(checks=others, modules={"decompress": path}):
        decompress(weight)


def test_many_findings_are_cut_short(weight: tuple[Tensor, Tensor]) -> None:
    with emulate(modules={"decompress": edited((KEPT, KEPT.replace("group)", "group + 1000000)")))}) as run:
        with pytest.raises(RuntimeError) as caught:
            decompress(weight)
    count = len(run.reports[0].errors)
    assert count > 5
    lines = str(caught.value).splitlines()
    assert len(lines) == 7 and f"{count} findings" in lines[0] and lines[6] == f"  and {count - 5} more"


def test_trap_is_found_without_checks(weight: tuple[Tensor, Tensor]) -> None:
    trap = edited((KEPT, KEPT + ' if (row == 3) asm volatile("trap;");'))
    with emulate(checks="none", modules={"decompress": trap}), pytest.raises(RuntimeError, match="  trap: line "):
        decompress(weight)


def test_alignment_is_no_better_than_the_tensors() -> None:
    """Values that start at 2 bytes past a multiple of 4, and a kernel that loads two at once."""
    torch.manual_seed(2)
    values, meta = sparse24.prune_compress(torch.randn(5, 8).half())
    shifted = torch.empty(values.numel() + 1, dtype=torch.float16)[1:].view_as(values).copy_(values)
    assert shifted.data_ptr() % 4 == 2
    expected = sparse24.decompress(values, meta, in_features=8)
    with emulate():
        assert torch.equal(sparse24.decompress(shifted, meta, in_features=8), expected)
    with emulate(modules={"decompress": edited((LOAD, WIDE_LOAD))}):
        assert torch.equal(sparse24.decompress(values, meta, in_features=8), expected)
        with pytest.raises(RuntimeError, match="misaligned"):
            sparse24.decompress(shifted, meta, in_features=8)


def test_what_a_kernel_leaves_out_shows(weight: tuple[Tensor, Tensor]) -> None:
    """Not a finding: nothing reads it. The memory held ones before."""
    skip = edited((LOAD, f"if (column == 3) continue; {LOAD}"))
    expected = decompress(weight)
    with emulate(modules={"decompress": skip}):
        dense = decompress(weight)
    assert dense[:, 3].isnan().all()
    dense[:, 3] = expected[:, 3]
    assert torch.equal(dense, expected)


def test_bounds_of_the_kernel_are_kept(weight: tuple[Tensor, Tensor]) -> None:
    bounded = edited((SIGNATURE, "void __launch_bounds__(128) NAME("))
    message = (
        r"kernel 'decompress_b16' on an emulated sm_80: block is \(32, 8, 1\): 256 threads, more than .* \.maxntid"
    )
    with emulate(modules={"decompress": bounded}) as run, pytest.raises(RuntimeError, match=message):
        decompress(weight)
    assert run.reports == []


def test_shared_memory_is_the_devices(weight: tuple[Tensor, Tensor]) -> None:
    """sm_86 has 99 KB a block, sm_80 163 and sm_90 227, whatever the text was compiled for."""
    expected = decompress(weight)
    for kilobytes, allowed in ((99, "86 80 90"), (100, "80 90"), (163, "80 90"), (164, "90"), (227, "90"), (228, "")):
        touch = f"__shared__ volatile char big[{kilobytes * 1024}]; big[threadIdx.y * 32 + threadIdx.x] = 1; {KEPT}"
        path = edited((KEPT, touch))
        for arch in ("86", "80", "90"):
            with emulate(f"sm_{arch}", modules={"decompress": path}):
                if arch in allowed.split():
                    assert torch.equal(decompress(weight), expected)
                else:
                    with pytest.raises(RuntimeError, match=f"needs {kilobytes * 1024} bytes of shared memory"):
                        decompress(weight)


# ---- What holds it together ------------------------------------------------------------------------------------------


@pytest.fixture
def refused() -> dict[str, str]:
    """A module without kernels: no launch succeeds."""
    return {"decompress": ".version 8.5\n.target sm_80\n.address_size 64\n"}


def test_errors_leave_nothing_behind(weight: tuple[Tensor, Tensor], refused: dict[str, str]) -> None:
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            with emulate(modules=refused):
                assert emulates(weight)
                raise ZeroDivisionError
        assert not emulates(weight)
    with emulate(modules=refused):
        with pytest.raises(RuntimeError, match="no kernel"):
            decompress(weight)
        with emulate() as inner:
            decompress(weight)
        assert len(inner.reports) == 1 and emulates(weight)
    assert not emulates(weight)


def test_threads_emulate_each_for_itself(weight: tuple[Tensor, Tensor], refused: dict[str, str]) -> None:
    with emulate(modules=refused), ThreadPoolExecutor(1) as pool:
        assert pool.submit(emulates, weight).result() is False
        assert emulates(weight)
    assert not emulates(weight)

    expected, gate = decompress(weight), threading.Barrier(8, timeout=60)

    def work(index: int) -> int:
        with emulate(ARCHS[index], threads=1) as run:
            for _ in range(5):
                gate.wait()
                assert torch.equal(decompress(weight), expected)
        return len(run.reports)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [5] * 8


def test_is_left_where_it_was_entered(weight: tuple[Tensor, Tensor]) -> None:
    run = emulate()
    message = "must be left in the thread that entered it"
    with run, ThreadPoolExecutor(1) as pool:
        with pytest.raises(RuntimeError, match=message):
            pool.submit(run.__exit__, None, None, None).result()
        with pytest.raises(RuntimeError, match=message):
            pool.submit(lambda: run.reports).result()
        with pytest.raises(RuntimeError, match="entered already"):
            run.__enter__()
        decompress(weight)
    assert len(run.reports) == 1


def test_generators_may_leave_in_any_order(weight: tuple[Tensor, Tensor], refused: dict[str, str]) -> None:
    def emulating(run: Emulation) -> Iterator[None]:
        with run:
            yield

    runs = [emulate(), emulate(modules=refused), emulate()]
    first, second, third = generators = [emulating(run) for run in runs]
    for generator in generators:
        next(generator)
    first.close()
    decompress(weight)
    third.close()
    assert emulates(weight)
    second.close()
    assert not emulates(weight)
    assert [len(run.reports) for run in runs] == [0, 0, 1]


def test_compiled_models_inside(weight: tuple[Tensor, Tensor]) -> None:
    """What torch.compile has made calls the same operators: it emulates, also where it was compiled before."""
    expected = decompress(weight) + 1
    compiled_before = torch.compile(lambda: decompress(weight) + 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled_before(), expected)
    compiled_inside = torch.compile(lambda: decompress(weight) + 1, backend="aot_eager", fullgraph=True)
    with emulate() as run:
        for function in (compiled_before, compiled_inside):
            for _ in range(2):
                assert torch.equal(function(), expected)
    assert [report.kernel for report in run.reports] == ["decompress_b16"] * 4
    assert torch.equal(compiled_inside(), expected)


def test_refused_in_compiled_functions(weight: tuple[Tensor, Tensor]) -> None:
    outer = emulate()

    def inside(x: Tensor) -> Tensor:
        with emulate():
            return x + 1

    def entered(x: Tensor) -> Tensor:
        with outer:
            return x + 1

    @emulate()
    def decorated(x: Tensor) -> Tensor:
        return x + 1

    def called(x: Tensor) -> Tensor:
        return decorated(x) + 1

    def asked(x: Tensor) -> Tensor:
        return x + len(outer.reports)

    for function in (inside, entered, decorated, called):
        for fullgraph in (False, True):
            torch.compiler.reset()
            message = None if fullgraph else "emulate() cannot be used in a function that torch.compile compiles"
            with pytest.raises(RuntimeError, match=message and re.escape(message)):
                torch.compile(function, backend="eager", fullgraph=fullgraph)(torch.zeros(2))
            assert not emulates(weight)
    with outer:
        decompress(weight)
        with pytest.raises(RuntimeError, match="cannot be used"):
            torch.compile(asked, backend="eager")(torch.zeros(2))
    assert len(outer.reports) == 1
    torch.compiler.reset()


def test_ctrl_c() -> None:
    """Stops a launch, comes out as KeyboardInterrupt, past a handler of RuntimeError too, and leaves nothing behind."""
    code = """
import os, signal, threading, time, torch, sparse24
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs start with it ignored
weight = sparse24.prune_compress(torch.randn(8192, 2048).half())
sparse24.decompress(*weight, in_features=2048)  # starts torch's threads
def interrupt():
    while len(os.listdir("/proc/self/task")) == idle:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)  # a launch is running: it has threads of its own
thread = threading.Thread(target=interrupt)
caught, idle = 0, len(os.listdir("/proc/self/task")) + 1
thread.start()
try:
    with sparse24.emulate(threads=1) as run:
        while True:
            try:
                sparse24.decompress(*weight, in_features=2048)
            except RuntimeError as error:
                assert str(error).endswith("interrupted"), error
                caught += 1
                if caught == 3:
                    break
except KeyboardInterrupt:
    print("interrupted", caught)
sparse24.decompress(*weight, in_features=2048)
with sparse24.emulate() as run:
    sparse24.decompress(weight[0][:8], weight[1][:8], in_features=2048)
assert len(run.reports) == 1
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr, done.returncode) == ("interrupted 3\n", "", 0)


def test_arguments(weight: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    for options, error, message in (
        ({"checks": "memry"}, ValueError, "checks must be 'all', 'none' or some of memory"),
        ({"checks": ["race", "rac"]}, ValueError, "checks must be"),
        ({"numerics": "sm_70"}, ValueError, "numerics must be one of ieee, sm_80, sm_90, float64; got 'sm_70'"),
        ({"order": "sideways"}, ValueError, "order must be one of forward, reverse, random; got 'sideways'"),
        ({"seed": -1}, ValueError, "seed must be 0 to"),
        ({"threads": 0.5}, TypeError, "threads must be an int; got float"),
        ({"multiprocessors": 0}, ValueError, "multiprocessors must be 1 to"),
        ({"splits": 0}, ValueError, "splits must be 1 to"),
        ({"modules": {"decompress": tmp_path / "none.ptx"}}, FileNotFoundError, "none.ptx"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            emulate(**options)
    for arch, modules, message in (
        ("sm_75", {}, "arch must be one of sm_80, sm_86, .*; got 'sm_75'"),
        ("sm_80", {"decompres": "\n"}, "modules must be named .*decompress.*; got 'decompres'"),
        ("sm_80", {"decompress": "mov\n"}, "the PTX of 'decompress': line 1, column 1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            with emulate(arch, modules=modules):
                raise AssertionError
        assert not emulates(weight)


def test_example_of_the_documentation(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "emulator.md").read_text()
    marked = page[page.index("<!-- example: tests/test_emulate.py") : page.index("<!-- end of the GPU path's example")]
    path = tmp_path / "example.py"
    path.write_text(marked[marked.index("```python\n") + len("```python\n") : marked.rindex("```")])
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if ": no errors; " in line]
    assert sum(line.startswith("linear_") for line in told) >= 2 and "mma" in done.stdout

    archs = dict(re.findall(r"\| (`sm_[^|]*`) \| (\d+) \|", page))
    assert [name for names in archs for name in re.findall(r"`(\w+)`", names)] == ARCHS


def test_is_imported_when_it_is_used() -> None:
    code = "import sys, sparse24; assert 'sparse24.emulation' not in sys.modules; sparse24.emulate('sm_80')"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert sparse24.emulate is emulate and "emulate" in sparse24.__all__
