"""What can be said of a kernel's speed without a GPU: one row for each kernel and architecture, CUTLASS's beside ours.

    python -m benchmarks.kernel_report                           # benchmarks/results/kernels.json and kernels.md
    python -m benchmarks.kernel_report --source FILE.cu          # that file alone, at once; --arch 80,89 --kernel 64x64
    python -m benchmarks.kernel_report --source FILE.cu --gaps   # what stands between the products; --dump: the loop

Machine code comes from the cubins of build/package, memory counts from the emulator running the PTX that they were
assembled from. kernels.md says what each column means, and what it cannot tell.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import sass

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "package"
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Architecture:
    """A multiprocessor: CUDA C++ Programming Guide, "Compute Capabilities"; bytes.

    tensor: cycles of one full-K sparse product on a tensor core, from published peaks: A100 624 TFLOP/s, AGX Orin 170
    TOP/s, A40 and L40S (half an A100's rate a multiprocessor; GeForce cards are slower still where sums are float32).
    None: newer ones reach their peaks by other instructions, and the rate of this one is not published.
    """

    shared: int
    shared_of_block: int
    threads: int
    blocks: int
    tensor: int | None


ARCHITECTURES = {
    "80": Architecture(164 << 10, 163 << 10, 2048, 32, 8),
    "86": Architecture(100 << 10, 99 << 10, 1536, 16, 16),
    "87": Architecture(164 << 10, 163 << 10, 1536, 16, 8),
    "89": Architecture(100 << 10, 99 << 10, 1536, 24, 16),
    "90a": Architecture(228 << 10, 227 << 10, 2048, 32, None),
    "100f": Architecture(228 << 10, 227 << 10, 2048, 32, None),
    "120f": Architecture(100 << 10, 99 << 10, 1536, 24, None),
}
REGISTERS = 64 << 10  # of a multiprocessor
RESERVED_SHARED = 1 << 10  # of a block, for the system


def blocks(architecture: Architecture, threads: int, registers: int, shared: int) -> tuple[int, str]:
    """How many blocks a multiprocessor holds, and what limits them. Registers go by 256 to warps of one sub-core."""
    warps = -(-threads // 32)
    warp_registers = -(-registers * 32 // 256) * 256
    taken = -(-(shared + RESERVED_SHARED) // 128) * 128
    limits = {
        "registers": REGISTERS // 4 // warp_registers * 4 // (-(-warps // 4) * 4),
        "shared memory": architecture.shared // taken if shared <= architecture.shared_of_block else 0,
        "threads": architecture.threads // (32 * warps),
        "blocks": architecture.blocks,
    }
    limit = min(limits, key=lambda name: limits[name])
    return limits[limit], limit


# ---- Rows ------------------------------------------------------------------------------------------------------------


def static_row(kernel: sass.Kernel) -> dict[str, Any]:
    """What the machine code of one kernel says."""
    row: dict[str, Any] = {
        "registers": kernel.registers,
        "local": kernel.local,
        "spill_stores": kernel.spill_stores,
        "spill_loads": kernel.spill_loads,
        "instructions": len(kernel.instructions),
        "foreign": kernel.foreign,
    }
    if kernel.loop is None:
        return row
    nearest = kernel.loop.distances[:1]
    row["loop"] = {
        "instructions": len(kernel.loop.body),
        "mma": kernel.loop.mma,
        "opcodes": sorted({x.opcode for x in kernel.loop.body if x.is_mma}),
        "stalls": kernel.loop.stalls,
        "waits": kernel.loop.waits,
        "fences": kernel.loop.fences,
        "load_to_use": {"instructions": nearest[0].instructions, "stalls": nearest[0].stalls} if nearest else None,
    }
    return row


def with_launch(row: dict[str, Any], architecture: str, counted: dict[str, Any]) -> dict[str, Any]:
    """The row with what also depends on how the kernel is launched: blocks a multiprocessor, and cycles by pipe."""
    has = ARCHITECTURES[architecture]
    held, limit = blocks(has, counted["threads"], row["registers"], counted["shared"] + counted["static_shared"])
    row = row | {"blocks": held, "blocks_limit": limit}
    if "loop" in row and counted["products"]:
        pipes = {
            "tensor": has.tensor,
            "shared memory": round(counted["shared_cycles"], 3),
            "issue": round(row["loop"]["instructions"] / row["loop"]["mma"], 3),
        }
        known = {name: cycles for name, cycles in pipes.items() if cycles is not None}
        row["pipes"] = pipes
        row["binding"] = max(known, key=lambda name: known[name]) if has.tensor else None
    return row


def shipped_modules() -> list[str]:
    """The stems of kernels/*.cu."""
    return sorted(path.stem for path in (ROOT / "kernels").glob("*.cu"))


def shipped_ptx(module: str) -> str:
    """The text that every cubin of the module is assembled from."""
    return (BUILD / f"{module}.ptx").read_text()


def static_rows(cubin: Path) -> dict[str, dict[str, Any]]:
    """static_row of each kernel of a cubin; kept in build/sass/ while neither it nor the code that reads it changes."""
    content = [cubin.read_bytes().hex(), Path(__file__).read_text(), Path(sass.__file__).read_text()]

    def write(path: Path) -> None:
        path.write_text(json.dumps({name: static_row(kernel) for name, kernel in sass.read(cubin).items()}))

    rows: dict[str, dict[str, Any]] = json.loads(sass.kept(".json", content, write).read_text())
    return rows


def shipped(architecture: str) -> dict[str, dict[str, Any]]:
    """The rows of all kernels that the package has for an architecture."""
    found = {}
    for module in shipped_modules():
        cubin = BUILD / f"{module}.sm_{architecture}.cubin"
        if not cubin.exists():
            raise FileNotFoundError(f"{cubin}: run `make build`")
        found |= static_rows(cubin)
    return found


def is_product(kernel: str) -> bool:
    return kernel.startswith("linear_") and not kernel.startswith("linear_reduce")


def counts() -> dict[str, dict[str, Any]]:
    """What the emulator counts, of each of our kernels that a product or decompress launches."""
    from benchmarks import kernel_counters  # imports sparse24, which --source can do without

    found: dict[str, dict[str, Any]] = {}
    around = kernel_counters.others()
    for module in shipped_modules():
        for name, kernel in kernel_counters.ptx.load(shipped_ptx(module)).kernels.items():
            counted = kernel_counters.linear(name) if is_product(name) else around.get(name)
            if counted is not None:
                found[name] = counted.told(kernel.shared_bytes)
    return found


def ours(architectures: Sequence[str] = tuple(ARCHITECTURES)) -> dict[str, dict[str, Any]]:
    """Every kernel that ships: {"counted": ..., "machine": {architecture: row}}."""
    with ThreadPoolExecutor() as pool:
        machine = dict(zip(architectures, pool.map(shipped, architectures), strict=True))
    counted = counts()
    return {name: _rows(counted.get(name), {a: machine[a][name] for a in machine}) for name in machine["80"]}


def cutlass() -> dict[str, dict[str, Any]]:
    """The same of CUTLASS's kernels, by "CUTLASS f16 128x128"."""
    from benchmarks import kernel_counters

    def one(name: str) -> dict[str, Any]:
        text = kernel_counters.cutlass_ptx(name)
        (kernel,) = kernel_counters.ptx.load(text).kernels.values()
        machine = {a: static_rows(sass.assemble(text, a))[kernel.name] for a in ARCHITECTURES}
        return _rows(kernel_counters.cutlass(name).told(kernel.shared_bytes), machine)

    with ThreadPoolExecutor() as pool:
        names = [f"CUTLASS {name.replace('_', ' ')}" for name in kernel_counters.CUTLASS]
        return dict(zip(names, pool.map(one, kernel_counters.CUTLASS), strict=True))


def _rows(counted: dict[str, Any] | None, machine: dict[str, dict[str, Any]]) -> dict[str, Any]:
    if counted is not None:
        machine = {architecture: with_launch(row, architecture, counted) for architecture, row in machine.items()}
    return {"counted": counted, "machine": machine}


# ---- The gates -------------------------------------------------------------------------------------------------------

TOLERANCE = 1.02  # by which these may grow a product from what is committed
LINT = {"stalls": ["stalls"], "stalls and waits": ["stalls", "waits"], "instructions": ["instructions"]}


def problems(name: str, kernel: dict[str, Any]) -> list[str]:
    """What no kernel that ships may have, in sentences."""
    found = []
    for architecture, row in kernel["machine"].items():
        where = f"{name} on sm_{architecture}"
        if row["local"] or row["spill_stores"] or row["spill_loads"]:
            spills = f"{row['spill_stores']} stores and {row['spill_loads']} loads"
            found.append(f"{where}: {row['local']} bytes of local memory a thread, {spills} there")
        if row["foreign"]:
            found.append(f"{where}: {', '.join(row['foreign'])} where native sparse products belong")
    counted = kernel["counted"]
    if counted is None:
        return found
    if counted["products"] and counted["steady_conflicts"]:
        found.append(f"{name}: {counted['steady_conflicts']} bank conflicts in the steady state of one block")
    # Kernels around the product reorder or write a number a row; loaders for less alignment read sectors repeatedly.
    ways = () if not is_product(name) else ("store",) if re.search(r"_by[0-9]$", name) else ("load", "store")
    for way in ways:
        sectors, least = counted[f"{way}_sectors"], -(-counted[f"{way}_bytes"] // 32)
        if sectors > least:
            found.append(f"{name}: {sectors} global sectors to {way} what fits in {least}")
    return found


def worse(committed: dict[str, Any], fresh: dict[str, Any]) -> list[str]:
    """Where a kernel's main loop needs more than the committed report says, beyond the tolerance."""
    found = []
    for name in committed.keys() & fresh.keys():
        for architecture, row in fresh[name]["machine"].items():
            before = committed[name]["machine"].get(architecture, {}).get("loop")
            if not before or "loop" not in row:
                continue
            for what, parts in LINT.items():
                old, new = (sum(loop[part] for part in parts) / loop["mma"] for loop in (before, row["loop"]))
                if new > old * TOLERANCE:
                    found.append(f"{name} on sm_{architecture}: {what} a product {new:.2f}, committed {old:.2f}")
    return sorted(found)


# ---- The tables ------------------------------------------------------------------------------------------------------

ABOUT = """# Kernels without a GPU

Written by `python -m benchmarks.kernel_report`; `tests/test_kernel_report.py` compares it with a fresh build. Nothing
here was timed. The columns rank kernels; they do not predict seconds.

* **registers, blocks**: of a thread; and how many blocks, of how many threads, a multiprocessor holds by registers,
  shared memory and threads. No kernel spills or uses local memory: the tests refuse it.
* **loop**: instructions in the main loop, and the matrix products among them: the innermost loop that has any.
* **stalls**: sum of the stall counts in the loop, for each product. What one warp alone would need at least, if every
  load came in time. ptxas writes these counts; their place in the control word is community knowledge, not NVIDIA's.
* **+ waits**: the same with the waits for loads of shared memory, which stall counts leave out, if each took 30 cycles
  (an estimate; more warps fill such waits). **load to use**: the shortest way from such a load to the first instruction
  that reads it, in instructions and in stall cycles.
* **tensor, shared, issue**: cycles a product on each pipe of a sub-core. Tensor: from published peaks. Shared: four
  sub-cores share a memory of 128 bytes a cycle; passes over its banks, of reads and of copies that fill it, as the
  emulator counts them in the steady state. That filling and reading share the port is an assumption. Issue: one
  instruction a cycle. The largest is what binds, however many warps there are.
* **reads, fills**: passes over the banks of shared memory for each product of a warp. **conflicts**: passes beyond
  those that the bytes need, in the steady state; **outside** it: filling the pipeline, and the epilogue.
* **sectors**: 32-byte sectors of global memory that one block loads and stores, and the fewest for as many bytes.

Not seen: caches, DRAM, the L2's rate, latencies other than ptxas's own estimates, clocks, and errors of ptxas.
"""


def _table(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines) + "\n"


PRODUCT_HEAD = [
    "kernel",
    "registers",
    "blocks",
    "loop / mma",
    "stalls",
    "+ waits",
    "load to use",
    "tensor",
    "shared",
    "issue",
    "binds",
]
MEMORY_HEAD = ["kernel", "shared bytes", "reads", "fills", "conflicts", "outside", "sectors loaded", "stored"]


def _product_line(name: str, kernel: dict[str, Any], architecture: str) -> list[str]:
    row, counted = kernel["machine"][architecture], kernel["counted"]
    loop, pipes = row["loop"], row["pipes"]
    near = loop["load_to_use"]
    return [
        name,
        str(row["registers"]),
        f"{row['blocks']} x {counted['threads']}" if row["blocks"] else "does not fit",
        f"{loop['instructions']} / {loop['mma']}",
        f"{loop['stalls'] / loop['mma']:.2f}",
        f"{(loop['stalls'] + loop['waits']) / loop['mma']:.2f}",
        f"{near['instructions']} / {near['stalls']}" if near else "-",
        str(pipes["tensor"] or "?"),
        f"{pipes['shared memory']:.2f}",
        f"{pipes['issue']:.2f}",
        row["binding"] or "?",
    ]


def _memory_line(name: str, counted: dict[str, Any]) -> list[str]:
    conflicts = counted["steady_conflicts"]
    steady = [f"{counted['reads']:.2f}", f"{counted['fills']:.2f}", str(conflicts)]
    return [
        name,
        str(counted["shared"] + counted["static_shared"]),
        *(steady if counted["products"] else "---"),
        str(counted["conflicts"] - conflicts),
        *(f"{counted[f'{way}_sectors']} / {-(-counted[f'{way}_bytes'] // 32)}" for way in ("load", "store")),
    ]


def markdown(report: dict[str, Any]) -> str:
    """The committed table."""
    kernels = report["kernels"]
    counted = {name: kernel["counted"] for name, kernel in kernels.items() if kernel["counted"]}
    products = [name for name in counted if counted[name]["products"]]
    tiles = [name for name in products if "_few_" not in name]
    parts = [ABOUT, ", ".join(f"{tool} {version}" for tool, version in report["tools"].items()) + ".\n"]
    for architecture in ARCHITECTURES:
        lines = [_product_line(name, kernels[name], architecture) for name in tiles]
        parts += [f"## sm_{architecture}\n", _table(PRODUCT_HEAD, lines)]
    parts += ["## linear_few on sm_80\n", "Bound by reading W from memory, not by a pipe of a multiprocessor.\n"]
    lines = [_product_line(name, kernels[name], "80")[:7] for name in products if name not in tiles]
    parts.append(_table(PRODUCT_HEAD[:7], lines))
    lines = [_memory_line(name, told) for name, told in counted.items()]
    parts += ["## Memory\n", _table(MEMORY_HEAD, lines)]
    ours = [name for name in kernels if not name.startswith("CUTLASS")]
    lines = [[name, *(str(kernels[name]["machine"][a]["registers"]) for a in ARCHITECTURES)] for name in ours]
    parts += ["## Registers of all kernels\n", _table(["kernel", *(f"sm_{a}" for a in ARCHITECTURES)], lines)]
    return "\n".join(parts)


def write() -> None:
    from benchmarks import kernel_counters

    tools = {name: sass.version(name) for name in ("nvcc", "nvdisasm")}
    report = {"tools": tools | {"CUTLASS": kernel_counters.cutlass_version()}, "kernels": ours() | cutlass()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "kernels.json").write_text(json.dumps(report, indent=1) + "\n")
    (RESULTS / "kernels.md").write_text(markdown(report))


# ---- One file --------------------------------------------------------------------------------------------------------


def show(source: Path, architectures: list[str], pattern: str, gaps: bool, dump: bool, emulate: bool) -> None:
    """Prints the kernels of a .cu or .ptx file."""
    text = sass.compile_ptx(source) if source.suffix == ".cu" else source.read_text()
    for architecture in architectures:
        for name, kernel in sorted(sass.read(sass.assemble(text, architecture)).items()):
            if pattern in name:
                _show_kernel(kernel, architecture, gaps, dump)
                if emulate and is_product(name):
                    from benchmarks import kernel_counters

                    counted = kernel_counters.linear(name, source.stem, text).told(0)
                    told = with_launch(static_row(kernel), architecture, counted)
                    print(f"    {told['blocks']} blocks ({told['blocks_limit']}), pipes {told['pipes']}, {counted}")


def _show_kernel(kernel: sass.Kernel, architecture: str, gaps: bool, dump: bool) -> None:
    print(
        f"sm_{architecture} {kernel.name[-60:]}: {kernel.registers} registers, {kernel.local} bytes local, spills "
        f"{kernel.spill_stores}/{kernel.spill_loads}, {len(kernel.instructions)} instructions, products "
        f"{sum(kernel.products.values())}" + (f"; NOT NATIVE: {', '.join(kernel.foreign)}" if kernel.foreign else "")
    )
    loop = kernel.loop
    if loop is None:
        return
    print(
        f"    loop {len(loop.body)} instructions / {loop.mma} products = {len(loop.body) / loop.mma:.2f}, stalls "
        f"{loop.stalls} = {loop.stalls / loop.mma:.2f}, with waits {(loop.stalls + loop.waits) / loop.mma:.2f}, fences "
        f"{loop.fences}\n    " + " ".join(f"{family} {count}" for family, count in loop.mix.items())
    )
    for near in loop.distances[:3]:
        print(
            f"    load to use: {near.instructions} instructions, {near.stalls} stalls: {near.load.opcode} "
            f"{','.join(near.load.operands)} -> {near.use.opcode} {','.join(near.use.operands)}"
        )
    for length, between in loop.gaps if gaps else []:
        if length > 8:
            told = [f"{x.family}:{x.stall}{'w' if x.wait else ''}" for x in between]
            print(f"    {length} cycles to the next product: {' '.join(told)}")
    for x in loop.body if dump else []:
        print(f"    {x.address:05x} {x.stall:2} {x.wait:02x} {x.predicate:5} {x.opcode} {', '.join(x.operands)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="a .cu or .ptx file; by default the report on all is written")
    parser.add_argument("--arch", default="80", help="with --source: architectures, by commas (%(default)s)")
    parser.add_argument("--kernel", default="", help="with --source: kernels with this in their names")
    parser.add_argument("--gaps", action="store_true", help="with --source: what delays products for over 8 cycles")
    parser.add_argument("--dump", action="store_true", help="with --source: the main loop")
    parser.add_argument("--emulate", action="store_true", help="with --source: memory and pipes, by the emulator")
    asked = parser.parse_args()
    if asked.source:
        show(asked.source, asked.arch.split(","), asked.kernel, asked.gaps, asked.dump, asked.emulate)
    else:
        write()


if __name__ == "__main__":
    main()
