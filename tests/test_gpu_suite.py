"""What `make gpu` does, without a GPU: its control flow with stand-ins for the device, its kernels on the emulator."""

from __future__ import annotations

import ctypes
import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "gpu"), str(ROOT / "tests" / "ptx"), str(ROOT / "tests"), str(ROOT)]

import comparison  # noqa: E402
import driver  # noqa: E402
import instructions  # noqa: E402
import problems  # noqa: E402
from oracles import nvcc  # noqa: E402

import sparse24  # noqa: E402
from benchmarks import gpu, gpu_contenders, gpu_rows  # noqa: E402

every_instruction = pytest.mark.parametrize("instruction", instructions.ALL, ids=lambda one: one.name)


# ---- Instructions ----------------------------------------------------------------------------------------------------


@every_instruction
def test_two_orders_of_the_emulator_agree(instruction: instructions.Instruction) -> None:
    """The comparison with the hardware, with the emulator in its place: no finding, no difference."""
    hardware = comparison.emulator("sm_90", order="reverse")
    assert comparison.compare(hardware, instruction, "sm_90", warps=40) == ""


def test_ptxas_assembles_every_instruction(tmp_path: Path) -> None:
    for target in ("sm_80", "sm_90a"):
        whole = []
        for index, instruction in enumerate(instructions.ALL):
            text = instruction.text().replace(".entry k(", f".entry k{index}(")
            whole.append(text if not whole else text[text.index(".visible") :])
        file = tmp_path / f"{target}.ptx"
        file.write_text("\n".join(whole))
        command = [Path(nvcc()).with_name("ptxas"), f"-arch={target}", file, "-o", tmp_path / "all.cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def one_bit_off(instruction: instructions.Instruction, bit: int) -> comparison.Machine:
    right = comparison.emulator("sm_90")

    def machine(text: str, kernel: str, grid: int, block: int, arrays: Sequence[np.ndarray]) -> None:
        right(text, kernel, grid, block, arrays)
        arrays[-1][3, instruction.results - 1, 7] ^= np.uint32(1 << bit)

    return machine


@every_instruction
def test_a_wrong_bit_is_found_and_told(instruction: instructions.Instruction) -> None:
    """The lowest one, or the sign of an approximation that is not small."""
    machine = one_bit_off(instruction, 30 if instruction.ulps else 0)
    told = comparison.compare(machine, instruction, "sm_90", warps=40)
    lane = r"the first: warp 3, lane 7, result \d+: hardware 0x[0-9a-f]{8} \(.*\), emulator 0x"
    assert re.search(rf"1 of \d+ results differ; {lane}", told), told
    assert ("sm_90, default products: 99." in told) == instruction.sums_floats


def test_the_way_that_hardware_sums_is_named() -> None:
    instruction = next(one for one in instructions.TENSOR if "m16n8k32" in one.name and ".bf16" in one.name)
    told = comparison.compare(comparison.emulator("sm_80", products=4), instruction, "sm_80", warps=60)
    assert "\nsm_80, 4 products: 100.0000% equal\n" in told and "\nsm_80, 8 products: 100" not in told


SHIPPED = ROOT / "build" / "package"
# Not arithmetic, or checked by every other kernel: moves of registers and plain accesses, control, integer arithmetic
# on addresses and sizes.
PLAIN = re.compile(
    r"(mov|ld|st|cvta|bra|ret|exit|bar|barrier|setp|selp|and|or|xor|not|prefetch|membar|fence|nanosleep|trap)\b"
    r"|(add|sub|mul|mad|neg|abs|min|max|shl|shr|div|rem|cvt)\.((lo|hi|wide|sat)\.)?[sub](16|32|64)"
)


def test_every_instruction_that_ships_is_compared() -> None:
    """Float and tensor instructions and asynchronous copies of the shipped kernels each have a case here."""
    texts = sorted(SHIPPED.glob("*.ptx"))
    assert texts, "no PTX in build/package: make build"
    have = "\n".join(one.body for one in instructions.ALL)
    missing: dict[str, str] = {}
    for path in texts:
        for kernel in sparse24.ptx.load(path).kernels.values():
            for opcode in kernel.instructions:
                known = opcode.replace(".L2::128B", "").replace(".L2::256B", "")
                if not PLAIN.match(known) and not re.search(rf"(^|\s){re.escape(known)}[\s;]", have):
                    missing[opcode] = f"{path.stem} {kernel.name}"
    assert not missing, missing


FAKE_DRIVER = r"""
#include <stdint.h>
#include <string.h>
static int steps; char log_of_calls[4096];
static int note(const char* name) { strcat(log_of_calls, name); strcat(log_of_calls, " "); steps++; return 0; }
int cuInit(unsigned flags) { return note("init"); }
int cuDeviceGet(int* device, int ordinal) { *device = ordinal; return 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { *context = (void*)0x77; return 0; }
int cuCtxSetCurrent(void* context) { return context == (void*)0x77 ? 0 : 201; }
int cuCtxSynchronize(void) { return note("synchronize"); }
int cuGetErrorString(int error, const char** text) { *text = "it went wrong"; return 0; }
int cuModuleLoadDataEx(void** module, const void* image, unsigned count, int* options, void** values) {
  *module = (void*)0x88;
  if (strstr(image, "damaged")) { strcpy((char*)values[0], "ptxas says why"); return 218; }
  return count == 2 && options[0] == 5 && options[1] == 6 && (uintptr_t)values[1] == 8192 ? note("load") : 1;
}
int cuModuleUnload(void* module) { return note("unload"); }
int cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = (void*)0x99;
  return module == (void*)0x88 && strcmp(name, "k") == 0 ? 0 : 500;
}
static uint32_t memory[1 << 16]; static int used;
int cuMemAlloc_v2(uint64_t* address, size_t bytes) {
  *address = (uint64_t)(uintptr_t)(memory + used);
  used += bytes / 4;
  return 0;
}
int cuMemFree_v2(uint64_t address) { return note("free"); }
int cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t bytes) {
  memcpy((void*)(uintptr_t)to, from, bytes);
  return 0;
}
int cuMemcpyDtoH_v2(void* to, uint64_t from, size_t bytes) {
  memcpy(to, (void*)(uintptr_t)from, bytes);
  return 0;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** arguments, void** extra) {
  if (function != (void*)0x99 || gy * gz * by * bz != 1 || shared || stream || extra) return 1;
  uint32_t* from = *(uint32_t**)arguments[0]; uint32_t* to = *(uint32_t**)arguments[1];
  for (unsigned i = 0; i < gx * bx; ++i) to[i] = from[i] + 1;
  return note("launch");
}
"""


@pytest.fixture(scope="module")
def fake_driver(tmp_path_factory: pytest.TempPathFactory) -> driver.Driver:
    folder = tmp_path_factory.mktemp("driver")
    (folder / "fake.c").write_text(FAKE_DRIVER)
    command = ["cc", "-shared", "-fPIC", folder / "fake.c", "-o", folder / "libcuda.so.1"]
    subprocess.run(command, check=True)
    return driver.Driver(library=str(folder / "libcuda.so.1"))


def test_driver_copies_launches_and_frees(fake_driver: driver.Driver) -> None:
    data, out = np.arange(96, dtype=np.uint32), np.zeros(96, np.uint32)
    fake_driver.run("text", "k", 3, 32, [data, out])
    assert np.array_equal(out, data + 1)
    calls = (ctypes.c_char * 4096).in_dll(fake_driver._cuda, "log_of_calls")
    assert calls.value.split() == b"init load launch synchronize free free unload".split()


def test_driver_tells_what_the_compiler_says(fake_driver: driver.Driver) -> None:
    with pytest.raises(driver.DriverError, match=r"(?s)cuModuleLoadDataEx: it went wrong \(218\).*ptxas says why"):
        fake_driver.run("damaged", "k", 1, 32, [np.zeros(32, np.uint32)])
    with pytest.raises(driver.DriverError, match=r"cuModuleGetFunction: it went wrong \(500\)"):
        fake_driver.run("text", "other", 1, 32, [np.zeros(32, np.uint32)])


# ---- Rows ------------------------------------------------------------------------------------------------------------


class FakeClock:
    """Runs nothing; the seconds of each contender come from a list that repeats."""

    def __init__(self, seconds: float = 1e-4, broken: bool = False) -> None:
        self.seconds, self.broken, self.runs = itertools.cycle([seconds, 1.1 * seconds, 0.9 * seconds]), broken, 0

    def host_seconds(self, run: Callable[[], object]) -> float:
        return 1e-5

    def once(self, run: Callable[[], object], host_seconds: float) -> Callable[[], float]:
        self.runs += 1
        seconds = next(self.seconds)
        return lambda: seconds

    def wait(self) -> None:
        if self.broken:
            raise RuntimeError("an illegal memory access was encountered")


def test_row_is_in_the_units_that_it_says() -> None:
    one = gpu_rows.row((64, 4096, 2048), "float16", "sparse24: k", True, [1e-5] * 29 + [3e-5], "NVIDIA H100 80GB HBM3")
    assert one["us"] == pytest.approx({"p20": 10, "p50": 10, "p80": 10})
    assert one["tflops"] == pytest.approx(2 * 64 * 4096 * 2048 / 1e-5 / 1e12)
    weight = 4096 * 2048 * 2 // 2 + 4096 * 2048 // 8
    moved = weight + 2 * 64 * (2048 + 4096)
    assert one["gbs"] == pytest.approx(moved / 1e-5 / 1e9)
    assert one["of_bound"] == pytest.approx(moved / 3.35e12 / 1e-5)
    dense = gpu_rows.row((4096, 4096, 4096), "int8", "cuBLAS", False, [1e-4] * 30, "NVIDIA A100-SXM4-80GB")
    assert dense["of_bound"] == pytest.approx(2 * 4096**3 / 624e12 / 1e-4)
    assert "of_bound" not in gpu_rows.row((1, 64, 64), "int8", "cuBLAS", False, [1e-4] * 30, "Voodoo 2")


def test_rows_are_compared_with_cublas_and_the_fastest_cusparselt() -> None:
    names = {"sparse24: linear_f16_64x64": 10, "cuBLAS": 15, "torch cuSPARSELt": 30, "torch cuSPARSELt, searched": 20}
    rows = [gpu_rows.row((1, 64, 64), "float16", name, True, [us * 1e-6] * 30, "") for name, us in names.items()]
    gpu_rows.compare(rows)
    assert [one["x_cublas"] for one in rows] == pytest.approx([1.5, 1, 0.5, 0.75])
    assert [one["x_cusparselt"] for one in rows] == pytest.approx([2, 4 / 3, 2 / 3, 1])
    line = gpu_rows.text(rows[0])
    assert re.match(r" +1x64x64 float16  sparse24: linear_f16_64x64 +\| +10.0 \[10.0, 10.0\] us \| ", line)
    assert line.endswith("- % of bound | 1.50 x cuBLAS | 2.00 x cuSPARSELt")
    gpu_rows.compare(rows[:1])
    assert gpu_rows.text(rows[0]).endswith("- x cuBLAS | - x cuSPARSELt")


def test_every_contender_runs_once_a_round() -> None:
    clock = FakeClock()
    seconds = gpu_rows.interleaved(clock, {"a": int, "b": int, "c": int}, 30)
    assert {name: len(runs) for name, runs in seconds.items()} == {"a": 30, "b": 30, "c": 30} and clock.runs == 90


@pytest.fixture
def few_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_rows, "LAYERS", {"small": (64, 48), "odd": (68, 40)})
    monkeypatch.setattr(gpu_rows, "TOKENS", [1, 20])


def measured(path: Path, measure: Callable[..., dict[str, Any]], clock: Any = None, until: float = 1e12) -> int:
    before = gpu_rows.MEASURE["rows"]
    gpu_rows.MEASURE["rows"] = measure
    try:
        return gpu_rows.measure_all("rows", path, until, clock or FakeClock(), "", "cpu", lambda *a: a)
    finally:
        gpu_rows.MEASURE["rows"] = before


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.usefixtures("few_cells")
def test_cells_are_resumed_and_a_deadly_one_is_not_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    calls: list[int] = []

    def dies(layer: Any, count: int, clock: Any, gpu: str) -> dict[str, Any]:
        calls.append(count)
        if len(calls) == 3:
            raise SystemExit("killed")
        return {"rows": [], "failed": False}

    with pytest.raises(SystemExit):
        measured(path, dies)
    with path.open("a") as file:
        file.write('{"cell": "half a li')
    assert measured(path, dies) == 0
    cells = [one for one in records_of_whole_lines(path) if "cell" in one]
    assert len(cells) == 12 and len(calls) == 12  # 2 layers, 2 numbers of tokens, 3 dtypes; one was never tried again
    assert [one["cell"] for one in cells if one["failed"]] == ["rows / float16 / odd / 1"]
    assert "died" in next(one for one in cells if one["failed"])["error"]
    assert measured(path, dies) == 0 and len(calls) == 12
    assert len(gpu.read_rows(path)["rows"]) == 12


def records_of_whole_lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            assert "half a li" in line
    return found


@pytest.mark.usefixtures("few_cells")
def test_cells_stop_at_their_time_and_go_on_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"

    def fails(layer: Any, count: int, clock: Any, gpu: str) -> dict[str, Any]:
        if count == 20:
            raise ValueError("no such thing")
        return {"rows": [], "failed": False}

    assert measured(path, fails, until=time.time() - 1) == 0 and records(path) == []
    assert measured(path, fails) == 0
    failed = [one for one in records(path) if one.get("failed")]
    assert len(failed) == 6 and all("ValueError: no such thing" in one["error"] for one in failed)
    assert measured(tmp_path / "other.jsonl", fails, FakeClock(broken=True)) == gpu_rows.BROKEN

    def interrupted(layer: Any, count: int, clock: Any, gpu: str) -> dict[str, Any]:
        raise KeyboardInterrupt

    cut = tmp_path / "cut.jsonl"
    with pytest.raises(KeyboardInterrupt):
        measured(cut, interrupted)
    assert gpu_rows.finished(cut) == (set(), set())


def test_a_wrong_product_is_told() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in ("float16", "bfloat16", "int8"):
        weight = torch.randint(-3, 4, (40, 64), generator=generator).to(gpu_contenders.DTYPES[dtype])
        layer = gpu_contenders.Layer(dtype, weight, torch.empty(0))
        x = torch.randint(-3, 4, (30, 64), generator=generator).to(weight.dtype)
        right = (x.double() @ weight.double().t()).to(torch.int32 if dtype == "int8" else weight.dtype)
        bad = right.clone()
        bad[-1, 39] += 1 if dtype == "int8" else max(1, abs(float(right[-1, 39])) / 16)
        check = gpu_contenders.wrong
        assert check(gpu_contenders.Contender(lambda right=right: right, True), layer, x) == ""
        assert check(gpu_contenders.Contender(lambda right=right: right.t(), True, True), layer, x) == ""
        told = check(gpu_contenders.Contender(lambda bad=bad: bad, True), layer, x)
        assert told.startswith("1 of 960 wrong; y[29, 39] is "), told
        assert "shape [40, 30]" in check(gpu_contenders.Contender(lambda right=right: right.t(), True), layer, x)
        nan = right.double() * float("nan") if dtype == "int8" else right * float("nan")
        assert "960 of 960" in check(gpu_contenders.Contender(lambda nan=nan: nan, True), layer, x)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_cells_are_measured_on_the_emulator(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell from its weight to its rows; only the clock is made up."""
    monkeypatch.setattr(gpu_rows, "SPLITS", [1, 2])
    with sparse24.emulate("sm_80"), torch.no_grad():
        layer = gpu_contenders.Layer.make(dtype, 80, 96, "cpu")
        for count in (5, 20):
            result = gpu_rows.measure_rows(layer, count, FakeClock(), "NVIDIA H200")
            kernels = [one["kernel"] for one in result["rows"]]
            assert not result["failed"] and kernels[0].startswith("sparse24: linear_"), result["left_out"]
            assert "cuBLAS" in kernels and all(one["x_cublas"] for one in result["rows"])
            assert {"torch CUTLASS", "torch cuSPARSELt", "CuPy cuSPARSELt"} <= set(result["left_out"])
        tuned = gpu_rows.measure_tune(layer, 20, FakeClock(), "")
        assert tuned["chosen"].startswith("linear_") and not tuned["failed"] and tuned["rows"][0]["tflops"] > 0
        assert "linear_{}_64x64, 2 splits".format({"float16": "f16", "bfloat16": "bf16", "int8": "s8"}[dtype]) in {
            one["kernel"] for one in tuned["rows"]
        }


@pytest.mark.parametrize("name", problems.DTYPES)
def test_problems_of_the_gpu_tests_on_the_emulator(name: str) -> None:
    """What tests/gpu checks of the GPU holds here, and does not where a result is wrong."""
    out_dtype = torch.int32 if name == "s8" else torch.float32
    for integers, layout in itertools.product((True, False), ("rows", "odd", "even", "same")):
        problem = problems.make(name, 65, 70, "cpu", integers=integers)
        for count in (3, 17):
            x = problems.tokens(problem, count, integers=integers, layout=layout)
            assert x.shape == (count, 70) and (x.stride(0) == 0) == (layout == "same")
            with sparse24.emulate("sm_80"):
                y = problem.linear(x, out_dtype=out_dtype)
            check = problems.assert_exact if integers or name == "s8" else problems.assert_near
            check(y, x, problem.weight)
            y[-1, 64] += 1
            with pytest.raises(AssertionError, match=rf"\[{count - 1}, 64\] is "):
                check(y, x, problem.weight)


def test_forced_kernels_are_named_and_refused() -> None:
    for name in problems.DTYPES:
        assert f"linear_{name}_64x64" in problems.kernels(name)
    with problems.force("linear_f16_64x64", 2), problems.force(""):
        pass


# ---- The session -----------------------------------------------------------------------------------------------------


def session(tmp_path: Path, seconds: float = 100) -> gpu.Session:
    return gpu.Session(seconds + gpu.RESERVE, tmp_path, tmp_path / "results" / "gpu.json", lambda text: None)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_every_step_is_recorded_and_the_next_goes_on(tmp_path: Path) -> None:
    run = session(tmp_path)
    broken: Callable[[], dict[str, Any]] = lambda: {}["nothing"]  # noqa: E731
    run.run(gpu.Step("right", python("print('fine')"), 20, lambda: {"found": 3}))
    run.run(gpu.Step("wrong", python("import sys; print('why it failed'); sys.exit(4)"), 20))
    run.run(gpu.Step("killed", python("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"), 20))
    run.run(gpu.Step("slow", python("import time; print('slept', flush=True); time.sleep(60)"), 2.5))
    run.run(gpu.Step("absent", ["/no/such/program"], 20))
    run.run(gpu.Step("gathers", python(""), 20, broken))
    content = json.loads(run.output.read_text())
    steps = {step["step"]: step for step in content["steps"]}
    assert [name for name, step in steps.items() if step["failed"]] == ["wrong", "killed", "slow", "absent", "gathers"]
    assert steps["right"]["found"] == 3 and "output" not in steps["right"]
    assert steps["wrong"]["status"] == 4 and "why it failed" in steps["wrong"]["output"]
    assert steps["killed"]["status"] == -11
    assert steps["slow"]["timed_out"] and steps["slow"]["seconds"] < 10 and "slept" in steps["slow"]["output"]
    assert "No such file" in steps["absent"]["reason"] and "KeyError" in steps["gathers"]["gather"]
    assert not list(run.output.parent.glob(".*"))


def test_nothing_starts_when_no_time_is_left(tmp_path: Path) -> None:
    run = session(tmp_path, seconds=1)
    record = run.run(gpu.Step("late", python("open('never', 'w')"), 50))
    assert record["failed"] and record["reason"] == "no time is left"


def test_a_process_that_ignores_signals_is_killed_with_its_children(tmp_path: Path) -> None:
    code = (
        "import signal, subprocess, sys, time\n"
        "for one in (signal.SIGINT, signal.SIGTERM): signal.signal(one, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    run = session(tmp_path)
    record = run.run(gpu.Step("stubborn", python(code), 2.5))
    assert record["timed_out"] and record["status"] == -9 and record["seconds"] < 20
    child = int(record["output"].split()[0])
    for _ in range(50):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the child lives on")


TESTS = """
import pytest
def test_right(record_property): record_property("models x", "1.0")
def test_wrong(): assert 1 == 2, "one is not two"
@pytest.mark.skip(reason="needs two devices")
def test_skipped(): pass
"""


def test_reports_of_pytest_are_read(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    step = gpu.test_step(sys.executable, tmp_path, tmp_path / "test_it.py", 60)
    step.command[step.command.index("-m", 3) : step.command.index("-m", 3) + 2] = ["--rootdir", str(tmp_path)]
    record = session(tmp_path).run(step)
    assert record["failed"] and record["counts"] == {"tests": 3, "failures": 1, "skipped": 1}
    assert record["failures"][0]["test"].endswith("test_wrong") and "one is not two" in record["failures"][0]["message"]
    assert record["recorded"] == {"models x": "1.0"} and "needs two devices" in next(iter(record["skips"].values()))
    assert gpu.read_junit(tmp_path / "absent.xml")["failed"]


def test_tests_that_all_skip_count_as_failed(tmp_path: Path) -> None:
    case = "<testcase classname='a' name='b'><skipped message='no'/></testcase>"
    (tmp_path / "x.xml").write_text(f"<testsuites><testsuite>{case}</testsuite></testsuites>")
    assert gpu.read_junit(tmp_path / "x.xml")["reason"] == "no test ran"


def test_measuring_restarts_what_dies_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, commands = session(tmp_path, 1000), []
    rows = tmp_path / "rows.jsonl"

    def step(one: gpu.Step) -> dict[str, Any]:
        commands.append(one.command)
        with rows.open("a") as file:
            if len(commands) < 4:
                file.write(json.dumps({"cell": f"rows / {len(commands)}", "failed": len(commands) == 2}) + "\n")
        return {"status": -11 if len(commands) < 4 else 0} | one.gather()

    monkeypatch.setattr(run, "run", step)
    gpu.measure(run, sys.executable, "rows", 500)
    assert len(commands) == 4
    assert step(gpu.Step("", [], 1, lambda: {}))["status"] == 0
    monkeypatch.setattr(run, "run", lambda one: commands.append([]) or {"status": -11})
    gpu.measure(run, sys.executable, "rows", 500)
    assert len(commands) == 6, "a process that dies without a line would die again"


def test_what_cannot_be_imported_is_built() -> None:
    assert gpu.build_steps(sys.executable, lambda code: True, "90a") == []
    only_module = gpu.build_steps(sys.executable, lambda code: "ptx" not in code, "90a")
    assert "-DSPARSE24_ARCHS=" in only_module[0].command and only_module[1].command[-1] == "_ptx"
    configure, build = gpu.build_steps(sys.executable, lambda code: False, "90a")
    assert "-DSPARSE24_ARCHS=90a" in configure.command and build.command[-3:] == ["_C", "sparse24ptx", "_ptx"]
    assert f"-DTORCH_DIR={Path(torch.__file__).parent}" in configure.command


@pytest.mark.parametrize(
    ("capability", "arch"),
    [(80, "80"), (86, "86"), (89, "89"), (90, "90a"), (100, "100f"), (103, "100f"), (120, "120f"), (110, "89")],
)
def test_arch_of_a_gpu(capability: int, arch: str) -> None:
    assert gpu.arch_of(capability) == arch


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for module in ("benchmarks.gpu", "benchmarks.gpu_rows"):
        done = subprocess.run([sys.executable, "-m", module], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and "no CUDA device" in done.stderr


def test_gpu_tests_are_skipped_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-rs", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "needs a CUDA device" in done.stdout, done.stdout[-3000:]
    assert not re.search(r"\d+ (passed|failed|error)", done.stdout)
