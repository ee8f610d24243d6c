"""Bugs planted in the emulator itself: the tests named for them fail when they run on the mutated library."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mutation import ROOT, Mutant, build

MUTANTS = {
    "parser: offsets lose their sign": Mutant(
        "test_parser.py",
        "csrc/ptx/parser.cpp",
        "sum = minus ? sum - term : sum + term;",
        "sum += term;",
    ),
    "decoder: loads into wider registers lose their sign": Mutant(
        "test_memory.py",
        "csrc/ptx/decode_operands.cpp",
        "hidden(is_signed(type) ? hidden::widen_signed : hidden::widen_unsigned,",
        "hidden(hidden::widen_unsigned,",
    ),
    "registers: a guarded write ends the old value's life": Mutant(
        "test_random_programs.py",
        "csrc/ptx/compact_registers.cpp",
        "if (!result || operation.guard != NO_SLOT)",
        "if (!result)",
    ),
    "integers: the upper half is a bit off": Mutant(
        "test_integer.py",
        "csrc/ptx/execute/integer.cpp",
        "product(a, b) >> BITS<T>;",
        "product(a, b) >> (BITS<T> - 1);",
    ),
    "tensor cores: one extra bit too many": Mutant(
        "test_tensor.py", "csrc/ptx/tensor/numerics.cpp", "ada ? 13 : hopper ? 25 : 24;", "ada ? 13 : hopper ? 25 : 25;"
    ),
    "memcheck: one byte beyond": Mutant(
        "test_memcheck.py",
        "csrc/ptx/execute/access.cpp",
        "const uint64_t base = allocation->base, limit = allocation->size - access.size;",
        "const uint64_t base = allocation->base, limit = allocation->size - access.size + 1;",
    ),
    "initcheck: arithmetic forgets": Mutant(
        "test_definedness.py",
        "csrc/ptx/definedness.cpp",
        "for (uint32_t i = 0; i < operation.results; ++i) set(operation.slot[i], lanes, marked, &origin);",
        "for (uint32_t i = 0; i < operation.results; ++i) set(operation.slot[i], lanes, 0, &origin);",
    ),
    "racecheck: warps are always ordered": Mutant(
        "test_racecheck.py",
        "csrc/ptx/shared_memory.cpp",
        "return time < block_->synced[access.warp.index][warp];",
        "return true;",
    ),
    "racecheck: a barrier orders nothing": Mutant(
        "test_nvcc.py -k reduce",
        "csrc/ptx/block.cpp",
        "synced[w][b] = std::max(synced[w][b], barrier.clock[b]);",
        "synced[w][b] = std::min(synced[w][b], barrier.clock[b]);",
    ),
    "cp.async: one group too few is waited for": Mutant(
        "test_async_copy.py test_asynccheck.py",
        "csrc/ptx/execute/async_copy.cpp",
        "before[lane] = warp.committed[lane] > pending ? warp.committed[lane] - pending : 0;",
        "before[lane] = warp.committed[lane] > pending + 1 ? warp.committed[lane] - pending - 1 : 0;",
    ),
    "synccheck: masks may leave out who executes": Mutant(
        "test_synccheck.py", "csrc/ptx/convergence.cpp", "if ((lanes & ~mask) != 0) {", "if (false) {"
    ),
    "machine: a waiting group never gets its turn": Mutant(
        "test_control.py -k lock_between",
        "csrc/ptx/warp.cpp",
        "constexpr uint64_t QUANTUM = 2048;",
        "constexpr uint64_t QUANTUM = 1ull << 60;",
    ),
    "counters: conflicts are counted by word": Mutant(
        "test_counters.py",
        "csrc/ptx/execute/traffic.cpp",
        "most = std::max(most, ++by_bank[word % BANKS]);",
        "most = std::max(most, ++by_bank[word % WAVE]);",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_caught(name: str, native_release: Path, tmp_path: Path) -> None:
    mutant = MUTANTS[name]
    library = build(mutant, native_release, "libsparse24ptx.so", tmp_path)
    # The interface is C: the mutated library's functions come before those that the module was linked with.
    words = [str(ROOT / "tests" / "ptx" / word) if word.endswith(".py") else word for word in mutant.caught_by.split()]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *words]
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    try:
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return  # it hangs: noticed
    assert done.returncode == 1, (
        f"{mutant.caught_by} did not notice: {name}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    )
