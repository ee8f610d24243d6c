"""The static report on kernels: its gates for every kernel that ships, and that each gate and its parser bite."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent / "ptx")]
import oracles  # noqa: E402
import workloads  # noqa: E402

import sparse24.ptx  # noqa: E402
from benchmarks import kernel_counters, kernel_report, sass  # noqa: E402

COMMITTED = json.loads((kernel_report.RESULTS / "kernels.json").read_text())
OURS = {name: row for name, row in COMMITTED["kernels"].items() if not name.startswith("CUTLASS")}


# ---- What ships ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fresh() -> dict[str, dict[str, Any]]:
    return kernel_report.ours(["80"])


def test_every_kernel_passes_the_gates(fresh: dict[str, dict[str, Any]]) -> None:
    assert not [problem for name, kernel in fresh.items() for problem in kernel_report.problems(name, kernel)]


@pytest.mark.parametrize("architecture", kernel_report.ARCHITECTURES)
def test_no_architecture_has_local_memory(architecture: str) -> None:
    for module in kernel_report.shipped_modules():
        local = sass.local_memory(kernel_report.BUILD / f"{module}.sm_{architecture}.cubin")
        assert local and not any(local.values()), local


def test_the_committed_report_passes_the_gates_on_every_architecture() -> None:
    assert all(set(kernel["machine"]) == set(kernel_report.ARCHITECTURES) for kernel in OURS.values())
    assert not [problem for name, kernel in OURS.items() for problem in kernel_report.problems(name, kernel)]


def test_every_product_was_counted(fresh: dict[str, dict[str, Any]]) -> None:
    products = [name for name in fresh if kernel_report.is_product(name)]
    assert len(products) > 3
    for name in products:
        assert fresh[name]["counted"]["products"] > 0 and "loop" in fresh[name]["machine"]["80"], name


def test_main_loops_are_no_worse_than_committed(fresh: dict[str, dict[str, Any]]) -> None:
    assert not kernel_report.worse(OURS, fresh)


def test_the_committed_report_is_up_to_date(fresh: dict[str, dict[str, Any]]) -> None:
    if COMMITTED["tools"]["nvcc"] != sass.version("nvcc"):
        pytest.skip(f"the committed report was made with nvcc {COMMITTED['tools']['nvcc']}")
    remedy = "run python -m benchmarks.kernel_report and commit benchmarks/results/kernels.*"
    assert json.loads(json.dumps(fresh)) == {
        name: kernel | {"machine": {"80": kernel["machine"]["80"]}} for name, kernel in OURS.items()
    }, remedy
    assert (kernel_report.RESULTS / "kernels.md").read_text() == kernel_report.markdown(COMMITTED), remedy


def test_large_tiles_beat_cutlass_on_what_binds() -> None:
    """On sm_80: the best of our tiles against the best of CUTLASS's, for each type."""

    def best(prefix: str) -> float:
        rows = [k["machine"]["80"] for name, k in COMMITTED["kernels"].items() if name.startswith(prefix)]
        return min(max(filter(None, row["pipes"].values())) for row in rows if row["blocks"])

    for dtype in kernel_counters.TYPES:
        assert best(f"linear_{dtype}_") < best(f"CUTLASS {dtype} ")


# ---- The parser ------------------------------------------------------------------------------------------------------


def read_as_text(cubin: Path) -> list[tuple[str, int, int]]:
    """Opcode, operands' branch target and stall of each instruction, from nvdisasm's other output."""
    told = subprocess.run(
        [sass.tool("nvdisasm"), "-c", "-hex", cubin], check=True, capture_output=True, text=True
    ).stdout
    labels: dict[str, int] = {}
    found: list[list[Any]] = []
    for line in told.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(found)
        elif code := re.match(r"\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", line):
            branch = re.search(r"\.L_x_\d+", code[2]) if code[1].startswith("BRA") else None
            found.append([code[1], branch, None])
        elif word := re.fullmatch(r"\s+/\* 0x([0-9a-f]{16}) \*/", line):
            found[-1][2] = int(word[1], 16) >> 41 & 15
    return [(opcode, labels[target[0]] if target else -1, stall) for opcode, target, stall in found]


@pytest.mark.parametrize("architecture", ["80", "90a", "120f"])
def test_parser_agrees_with_the_text_of_nvdisasm(architecture: str) -> None:
    cubin = sass.assemble(oracles.kernels("sparse_gemm"), architecture)
    (kernel,) = sass.read(cubin).values()
    ours = [
        (x.opcode, -1 if x.target is None else x.target // sass.INSTRUCTION_BYTES, x.stall) for x in kernel.instructions
    ]
    assert ours == read_as_text(cubin)
    told = subprocess.run(
        [sass.tool("ptxas"), "-v", f"-arch=sm_{architecture}", "-o", "/dev/null", "/dev/stdin"],
        input=oracles.kernels("sparse_gemm"),
        check=True,
        capture_output=True,
        text=True,
    ).stderr
    assert re.search(r"Used (\d+) registers", told)[1] == str(kernel.registers)


def test_main_loop_of_cutlass() -> None:
    """Its published prologue, loop and epilogue: one loop of 64 products in two steps of K."""
    kernel = sass.read(sass.assemble(kernel_counters.cutlass_ptx("f16_128x128"), "80")).popitem()[1]
    assert kernel.loop is not None and kernel.loop.mma == 64
    assert kernel.products == {"HMMA.SP.16832.F32": 64} and kernel.foreign == []
    mix = kernel.loop.mix
    assert (mix["LDGSTS"], mix["LDSM"], mix["BAR"], kernel.loop.fences) == (13, 26, 1, 3)
    assert 8 * 64 <= kernel.loop.stalls < 10 * 64
    assert sum(length for length, _ in kernel.loop.gaps) == kernel.loop.stalls


def test_counts_of_cutlass_are_what_its_tiles_need() -> None:
    """A warp's 64 x 64 x 64: 4096 + 512 bytes of A, 8192 of B; a block's stage of 25600 bytes; 64 products a warp."""
    counted = kernel_counters.cutlass("f16_128x128")
    assert counted.reads == 12800 / 128 / 64 and counted.fills == 25600 / 128 / 256
    assert counted.shared_cycles == 9.375
    assert counted.steady_conflicts == 0 and counted.store_sectors == 128 * 128 * 2 / 32


def instruction(opcode: str, operands: str, stall: int = 1, predicate: str = "") -> sass.Instruction:
    return sass.Instruction(0, predicate, opcode, tuple(operands.split(",")), stall, 0, None)


def test_distance_goes_round_the_back_edge_and_stops_at_the_first_reader() -> None:
    mma = instruction("HMMA.SP.16832.F32", "R0,R16.reuse,R24,R0,R40.reuse,0x0", 4)
    body = [
        mma,
        instruction("LDSM.16.M88.4", "R24,[R60]", 2),
        instruction("LDGSTS.E.BYPASS.128", "[R23+0x800][R26.64],P0", 3),
        instruction("LDS", "R40,[R61]", 5),
        instruction("LDSM.16.M88.4", "R80,[R60+UR4]", 1),
        instruction("MOV", "R80,RZ", 1),
        instruction("BRA", "0x0", 6),
    ]
    found = sass.Loop(body).distances
    # R26 comes 28 cycles after the copy could go, R40 17 after the next product could.
    assert sass.Loop(body).waits == 28 + 17
    # R26 is read as an address at once; R40 by the product of the next turn; R81 to R83 by nobody.
    assert [(x.load.operands[0], x.instructions, x.stalls) for x in found] == [("R24", 1, 2), ("R40", 4, 13)]


def test_of_nested_and_peeled_loops_the_innermost_with_most_products_counts() -> None:
    def line(at: int, opcode: str, target: int | None = None) -> sass.Instruction:
        return sass.Instruction(16 * at, "", opcode, (), 1, 0, None if target is None else 16 * target)

    code = ["MOV", "HMMA.SP.16832.F32", "BRA", "HMMA.SP.16832.F32", "HMMA.SP.16832.F32", "BRA", "BRA", "BRA"]
    targets = {2: 1, 5: 3, 6: 0, 7: 7}  # a peeled loop of one product, the main one, one around both, the last padding
    kernel = sass.Kernel("k", 1, 0, [line(at, opcode, targets.get(at)) for at, opcode in enumerate(code)])
    assert kernel.loop is not None
    assert [x.address // 16 for x in kernel.loop.body] == [3, 4, 5]


def test_blocks_of_a_multiprocessor() -> None:
    a100, rtx = kernel_report.ARCHITECTURES["80"], kernel_report.ARCHITECTURES["86"]
    assert kernel_report.blocks(a100, 128, 254, 76800) == (2, "registers")
    assert kernel_report.blocks(rtx, 128, 254, 76800) == (1, "shared memory")
    assert kernel_report.blocks(rtx, 256, 128, 104448) == (0, "shared memory")
    assert kernel_report.blocks(a100, 96, 168, 0) == (3, "registers")  # three warps take the room of four
    assert kernel_report.blocks(a100, 256, 16, 0) == (8, "threads")
    assert kernel_report.blocks(a100, 64, 16, 0) == (32, "registers")  # as many as may be at all
    assert kernel_report.blocks(rtx, 128, 16, 0) == (12, "threads")
    assert kernel_report.blocks(rtx, 64, 16, 0) == (16, "blocks")


# ---- The gates bite --------------------------------------------------------------------------------------------------


def rows(text: str, architecture: str = "80", counted: kernel_counters.Counted | None = None) -> dict[str, Any]:
    (kernel,) = sass.read(sass.assemble(text, architecture)).values()
    told = None if counted is None else counted.told(0)
    return {"counted": told, "machine": {architecture: kernel_report.static_row(kernel)}}


def compiled(tmp_path: Path, text: str) -> str:
    source = tmp_path / "planted.cu"
    source.write_text(text)
    return sass.compile_ptx(source)


SUMS = """
extern "C" __global__ void __launch_bounds__(%d) sums(const float* x, float* y, int n) {
  float sums[96] = {};
  for (int i = 0; i < n; ++i)
#pragma unroll
    for (int j = 0; j < 96; ++j) sums[j] = sums[j] * x[i * 96 + j] + 1.0f;
#pragma unroll
  for (int j = 0; j < 96; ++j) y[threadIdx.x * 96 + j] = sums[j];
}
"""


def test_a_spill_is_refused(tmp_path: Path) -> None:
    assert kernel_report.problems("sums", rows(compiled(tmp_path, SUMS % 256))) == []
    (problem,) = kernel_report.problems("sums", rows(compiled(tmp_path, SUMS % 1024)))
    assert "sums on sm_80" in problem and "bytes of local memory" in problem


PRODUCTS = """
extern "C" __global__ void products(int* y, int n) {
  int d[4] = {};
  const int a = threadIdx.x;
  for (int i = 0; i < n; ++i)
    asm("mma.sp::ordered_metadata.sync.aligned.m16n8k128.row.col.s32.s4.s4.s32 {%0, %1, %2, %3}, {%4, %4, %4, %4}, "
        "{%5, %5, %5, %5}, {%0, %1, %2, %3}, %6, 0x0;"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a), "r"(i), "r"(0x44444444));
  y[a] = d[0] + d[1] + d[2] + d[3];
}
"""


def test_products_that_are_emulated_are_refused(tmp_path: Path) -> None:
    """Four-bit ones have no instruction on sm_90."""
    (problem,) = kernel_report.problems("products", rows(compiled(tmp_path, PRODUCTS), "90a"))
    assert "native sparse products" in problem


def multiplied(text: str) -> kernel_counters.Counted:
    def run(k: int) -> sparse24.ptx.Report:
        return workloads.sparse_gemm(np.random.default_rng(0), 128, 128, k).run(text)

    return kernel_counters.counted(run(512), run(768))


def test_bank_conflicts_in_the_loop_are_refused() -> None:
    right = oracles.kernels("sparse_gemm")
    assert kernel_report.problems("sparse_gemm", {"counted": multiplied(right).told(0), "machine": {}}) == []
    wrong = oracles.edited("sparse_gemm", ("((chunk ^ (row & 7)) << 4)", "(chunk << 4)"))
    (problem,) = kernel_report.problems("sparse_gemm", {"counted": multiplied(wrong).told(0), "machine": {}})
    assert "bank conflicts in the steady state" in problem


STORES = """
extern "C" __global__ void stores(float4* y) {
  reinterpret_cast<float*>(y)[threadIdx.x + %d] = 1.0f;
}
"""


@pytest.mark.parametrize("offset, sectors", [(0, 4), (1, 5)])
def test_stores_beside_the_sectors_are_refused(tmp_path: Path, offset: int, sectors: int) -> None:
    module = sparse24.ptx.load(compiled(tmp_path, STORES % offset))
    report = module.launch("stores", 1, 32, [np.zeros(64, np.float32)])
    assert (report.grid, report.block, report.shared) == ((1, 1, 1), (32, 1, 1), 0)
    found = kernel_report.problems(
        "linear_stores", {"counted": kernel_counters.counted(report, report).told(0), "machine": {}}
    )
    assert found == ([] if offset == 0 else [f"linear_stores: {sectors} global sectors to store what fits in 4"])


@pytest.mark.parametrize("what", ["stalls", "waits", "instructions"])
def test_a_loop_that_got_worse_is_told(what: str) -> None:
    name = next(name for name in OURS if "loop" in OURS[name]["machine"]["80"])
    committed = OURS[name]["machine"]["80"]["loop"]
    whole = committed["instructions"] if what == "instructions" else committed["stalls"] + committed["waits"]

    def grown(share: float) -> list[str]:
        fresh = copy.deepcopy(OURS)
        fresh[name]["machine"]["80"]["loop"][what] += int(whole * share)
        return kernel_report.worse(OURS, fresh)

    assert grown(0.01) == []
    assert any(f"{name} on sm_80: " in problem and what in problem for problem in grown(0.05))
