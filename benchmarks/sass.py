"""What ptxas makes of a kernel: its registers, its machine code, and the loop that its matrix products stand in.

The cubin says registers and local memory, nvdisasm the instructions and where branches go. Stall counts are read from
the control word of each instruction, whose fields NVIDIA does not document: they are community knowledge. A stall count
is how long this warp waits at least before its next instruction; waits for loads (scoreboards) come on top.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CACHE = ROOT / "build" / "sass"
INSTRUCTION_BYTES = 16  # since sm_70
REGISTER_COUNT, FRAME_SIZE = 0x2F, 0x11  # attributes in a cubin's .nv.info
LOAD_CYCLES = (
    30  # from a load of shared memory to its use: microbenchmarks of A100s have 23 (ld) to about 33 (ldmatrix)
)
# The full-K sparse products. Any other product is what ptxas emulates where the architecture lacks the instruction.
NATIVE = re.compile(r"HMMA\.SP\.16832\.F32(\.BF16)?|IMMA\.SP\.16864\.S8\.S8(\.SAT)?")


# ---- Tools -----------------------------------------------------------------------------------------------------------


@functools.cache
def tool(name: str) -> str:
    """The path of nvcc, ptxas or nvdisasm: of the machine or $CUDA_HOME, or what pip has put beside torch.

    Of nvdisasm what pip has put there comes first: its text is what this file reads.
    """
    torch = importlib.util.find_spec("torch")
    assert torch is not None and torch.origin is not None
    folders = [str(Path(torch.origin).parents[1] / "nvidia" / "cu13" / "bin")]
    if name != "nvdisasm":
        folders.insert(0, os.environ.get("PATH", ""))
        folders.insert(1, os.path.join(os.environ.get("CUDA_HOME", ""), "bin"))
    found = shutil.which(name, path=os.pathsep.join(folders)) or shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"no {name}: pip install -r requirements/nvcc.txt -r requirements/test.txt")
    return found


@functools.cache
def version(name: str) -> str:
    """As the tool names itself: "release 13.0, V13.0.88"."""
    told = run([tool(name), "--version"])
    (line,) = (line for line in told.splitlines() if "release" in line)
    return line[line.index("release") :]


def run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}{done.stdout}")
    return done.stdout


def kept(suffix: str, content: Sequence[str], write: Callable[[Path], object]) -> Path:
    """A file of build/sass/, named by a hash of `content`; made by `write` where it is not there yet."""
    path = CACHE / f"{hashlib.sha256(chr(0).join(content).encode()).hexdigest()[:20]}{suffix}"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{os.getpid()}-{threading.get_ident()}-{path.name}")  # nobody meets half a file
        write(unfinished)
        unfinished.rename(path)
    return path


def compile_ptx(source: Path) -> str:
    """The PTX of a .cu file as the package ships it (CMakeLists.txt): of compute_80, written as PTX 8.5."""
    text = run([tool("nvcc"), "-O3", "-std=c++20", "-lineinfo", "-ptx", "-arch=compute_80", str(source), "-o", "-"])
    return re.sub(r"^\.version .*$", ".version 8.5", text, count=1, flags=re.M)


def assemble(ptx: str, architecture: str) -> Path:
    """The cubin of a PTX text for "80", "90a", "100f", ...; spills do not fail, as they do in the package's build."""
    text = kept(".ptx", [ptx], lambda path: path.write_text(ptx))
    command = [tool("ptxas"), f"-arch=sm_{architecture}", str(text), "-o"]
    return kept(".cubin", [version("ptxas"), architecture, ptx], lambda path: run([*command, str(path)]))


# ---- Instructions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instruction:
    """One machine instruction. address: in its function, bytes. target: of a branch.

    stall: cycles until the warp may issue again. wait: the scoreboards that it waits for before it issues, as bits.
    """

    address: int
    predicate: str
    opcode: str
    operands: tuple[str, ...]
    stall: int
    wait: int
    target: int | None

    @functools.cached_property
    def family(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def is_mma(self) -> bool:
        return self.family in ("HMMA", "IMMA", "BMMA", "QMMA", "OMMA", "DMMA", "HGMMA", "IGMMA", "QGMMA", "UTCHMMA")

    @property
    def is_shared_load(self) -> bool:
        return self.family in ("LDSM", "LDS") and self.operands[0] != "RZ"

    @property
    def is_fence(self) -> bool:
        """A load that never runs, of which ptxas puts three before a copy that follows a load from shared memory."""
        return self.family == "LDS" and self.operands[0] == "RZ" and self.predicate == "@!PT"

    @functools.cached_property
    def writes(self) -> frozenset[int]:
        """Registers of the destination: all of them for loads and products, the first ones for the rest."""
        if not self.operands or self.family in ("STS", "STSM", "STG", "STL", "ST", "RED", "LDGSTS"):
            return frozenset()
        width = 1
        if self.family == "LDSM":
            width = int(self.opcode[-1])
        elif self.is_mma or ".128" in self.opcode:
            width = 4
        elif ".64" in self.opcode or ".WIDE" in self.opcode or self.family == "CS2R":
            width = 2
        return _registers(self.operands[0], width)

    @functools.cached_property
    def reads(self) -> frozenset[int]:
        """Registers of the other operands; of a product with A, B and C four each, and one word of metadata."""
        found: frozenset[int] = frozenset()
        for place, operand in enumerate(self.operands[1:] if self.writes else self.operands):
            width = 1
            if self.is_mma:
                width = 4 if place < 3 else 1
            elif "[" not in operand and ".128" in self.opcode:
                width = 4
            elif "[" not in operand and (".64" in self.opcode or (".WIDE" in self.opcode and place == 2)):
                width = 2
            found |= _registers(operand, width)
        return found


def _registers(operand: str, width: int) -> frozenset[int]:
    """`width` registers from each on that the operand names; "R8.64" are two."""
    named = re.findall(r"\bR(\d+)(\.64)?", operand)
    return frozenset(int(first) + i for first, wide in named for i in range(2 if wide else width))


# ---- The main loop ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Distance:
    """From a load of shared memory to the first instruction that reads what it loaded."""

    instructions: int
    stalls: int
    load: Instruction
    use: Instruction


@dataclass(frozen=True)
class Loop:
    """The innermost loop with matrix products; of several, the one with the most of them."""

    body: list[Instruction]

    @functools.cached_property
    def mma(self) -> int:
        return sum(instruction.is_mma for instruction in self.body)

    @property
    def stalls(self) -> int:
        return sum(instruction.stall for instruction in self.body)

    @property
    def fences(self) -> int:
        return sum(instruction.is_fence for instruction in self.body)

    @property
    def mix(self) -> dict[str, int]:
        return dict(Counter(instruction.family for instruction in self.body).most_common())

    @property
    def gaps(self) -> list[tuple[int, list[Instruction]]]:
        """Of each matrix product: stalls from it to the next one, and the instructions that it issues meanwhile."""
        first = next(at for at, instruction in enumerate(self.body) if instruction.is_mma)
        found: list[list[Instruction]] = []
        for instruction in self.body[first:] + self.body[:first]:
            if instruction.is_mma:
                found.append([])
            found[-1].append(instruction)
        return [(sum(instruction.stall for instruction in gap), gap) for gap in found]

    @property
    def waits(self) -> int:
        """Cycles that a turn takes beyond its stalls when it alone waits LOAD_CYCLES for each load of shared memory."""
        clock, ready, turn = 0, dict[int, int](), 0
        for _ in range(3):  # the last is steady
            begin = clock
            for instruction in self.body:
                clock = max([clock, *(ready.get(register, 0) for register in instruction.reads)])
                for register in instruction.writes:
                    ready[register] = clock + LOAD_CYCLES if instruction.is_shared_load else 0
                clock += instruction.stall
            turn = clock - begin
        return turn - self.stalls

    @functools.cached_property
    def distances(self) -> list[Distance]:
        """Of each load of shared memory that the loop uses, also round its back edge; the shortest first."""
        found = []
        for at, load in enumerate(self.body):
            if not load.is_shared_load:
                continue
            waiting, stalls = load.writes, load.stall
            for count, other in enumerate(self.body[at + 1 :] + self.body[:at], start=1):
                if waiting & other.reads:
                    found.append(Distance(count, stalls, load, other))
                    break
                if not other.predicate:
                    waiting -= other.writes
                stalls += other.stall
        return sorted(found, key=lambda distance: (distance.stalls, distance.instructions))


def _main_loop(instructions: list[Instruction]) -> Loop | None:
    ends: dict[int, int] = {}  # of loops, by where they begin
    for at, instruction in enumerate(instructions):
        if instruction.target is not None and instruction.target < instruction.address:
            begin = instruction.target // INSTRUCTION_BYTES
            ends[begin] = max(ends.get(begin, 0), at)
    spans = [(a, b) for a, b in ends.items() if any(x.is_mma for x in instructions[a : b + 1])]
    innermost = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    loops = [Loop(instructions[a : b + 1]) for a, b in innermost]
    # Of equals the shorter one: the other is for operands that are not aligned.
    return max(loops, key=lambda loop: (loop.mma, -len(loop.body)), default=None)


# ---- Kernels ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """registers: of a thread. local: bytes of local memory of a thread."""

    name: str
    registers: int
    local: int
    instructions: list[Instruction]

    def _count(self, *families: str) -> int:
        return sum(instruction.family in families for instruction in self.instructions)

    @property
    def spill_stores(self) -> int:
        """Instructions that write local memory: spilled registers, or an array that did not fit registers."""
        return self._count("STL")

    @property
    def spill_loads(self) -> int:
        return self._count("LDL")

    @functools.cached_property
    def loop(self) -> Loop | None:
        """None where no matrix product stands in a loop."""
        return _main_loop(self.instructions)

    @property
    def products(self) -> dict[str, int]:
        """Matrix products in the whole kernel, by opcode."""
        return dict(Counter(instruction.opcode for instruction in self.instructions if instruction.is_mma))

    @property
    def foreign(self) -> list[str]:
        """What stands in the place of native sparse products: other ones, and calls.

        Of functions of ptxas's own, by names such as "$__cuda_sm_9x_mma_sub_byte_...", anywhere, or any in the main
        loop. A call of an address is a jump: ptxas leaves some loops so.
        """
        inside = set(self.loop.body) if self.loop else set()
        calls = {
            x.operands[-1]
            for x in self.instructions
            if x.family == "CALL" and not x.operands[-1].startswith("0x") and (x in inside or "mma" in x.operands[-1])
        }
        return sorted(calls | {opcode for opcode in self.products if not NATIVE.fullmatch(opcode)})


def read(cubin: Path) -> dict[str, Kernel]:
    """The kernels of a cubin by name."""
    told = json.loads(run([tool("nvdisasm"), "-json", str(cubin)]))[1]
    elf = _Elf(cubin.read_bytes())
    registers, local = elf.attribute(REGISTER_COUNT), elf.attribute(FRAME_SIZE)
    kernels = {}
    for function in told:
        name, code = function["function-name"], elf.section(f".text.{function['function-name']}")
        instructions = [
            _instruction(index, entry, code, function["start"])
            for index, entry in enumerate(function["sass-instructions"])
        ]
        kernels[name] = Kernel(name, registers[name], local[name], instructions)
    return kernels


def local_memory(cubin: Path) -> dict[str, int]:
    """Bytes of a thread, by kernel; read from the file alone, without nvdisasm."""
    return _Elf(cubin.read_bytes()).attribute(FRAME_SIZE)


def _instruction(index: int, entry: dict[str, str], code: bytes, start: int) -> Instruction:
    (high,) = struct.unpack_from("<Q", code, start + INSTRUCTION_BYTES * index + 8)
    control = high >> 41  # stall 4 bits, yield 1, write barrier 3, read barrier 3, wait mask 6, reuse 4
    operands = tuple(entry["operands"].split(",")) if entry.get("operands") else ()
    branches = entry["opcode"].split(".")[0] == "BRA"
    return Instruction(
        address=INSTRUCTION_BYTES * index,
        predicate=entry.get("predicate", ""),
        opcode=entry["opcode"],
        operands=operands,
        stall=control & 15,
        wait=control >> 11 & 63,
        target=int(operands[-1], 16) if branches else None,
    )


class _Elf:
    """A cubin, which is an ELF64 file."""

    def __init__(self, content: bytes) -> None:
        assert content[:5] == b"\x7fELF\x02", "a cubin is an ELF64 file"
        self._content = content
        (table,) = struct.unpack_from("<Q", content, 0x28)
        size, count, names = struct.unpack_from("<HHH", content, 0x3A)
        headers = [struct.unpack_from("<IIQQQQII", content, table + size * index) for index in range(count)]
        self._sections: dict[str, tuple[Any, ...]] = {}
        for header in headers:
            self._sections[self._text(headers[names][4] + header[0])] = header
        symbols = self._sections[".symtab"]
        strings = headers[symbols[6]][4]
        self._symbols = [
            self._text(strings + struct.unpack_from("<I", content, symbols[4] + at)[0])
            for at in range(0, symbols[5], 24)
        ]

    def _text(self, at: int) -> str:
        return self._content[at : self._content.index(b"\0", at)].decode()

    def section(self, name: str) -> bytes:
        header = self._sections[name]
        return self._content[header[4] : header[4] + header[5]]

    def attribute(self, kind: int) -> dict[str, int]:
        """A number of each kernel, from .nv.info: entries of format, kind, size, and there a symbol and the number."""
        info, found, at = self.section(".nv.info"), {}, 0
        while at < len(info):
            form, its_kind, size = struct.unpack_from("<BBH", info, at)
            at += 4
            if form == 4:  # `size` bytes follow; otherwise `size` is the value
                if its_kind == kind:
                    symbol, value = struct.unpack_from("<II", info, at)
                    found[self._symbols[symbol]] = value
                at += size
        return found
