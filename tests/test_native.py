"""The tests of the kernels without torch (tests/native): as they ship, under sanitizers, and with bugs planted."""

import os
import subprocess
from pathlib import Path

import mutation
import pytest
from mutation import Mutant

ROOT = Path(__file__).parents[1]
PROGRAMS = [path.stem for path in sorted((ROOT / "tests" / "native").rglob("test_*.cpp"))]


def run(program: Path, fake: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(fake)}  # where tests/native/fake_libcuda.cpp is libcuda.so.1
    return subprocess.run([program], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("build", ["native_release", "native_sanitize"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_native(request: pytest.FixtureRequest, build: str, program: str) -> None:
    folder = request.getfixturevalue(build)
    done = run(folder / program, folder / "fake")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


# ---- Do the tests bite? ----------------------------------------------------------------------------------------------


MUTANTS = {
    "decompress kernel: one column too many": Mutant(
        "test_cuda",
        "kernels/decompress.cu",
        "if (column >= columns) break;",
        "if (column > columns) break;",
        "tests/native/fake_libcuda.cpp",
    ),
    "decompress kernel: the two groups of a byte swapped": Mutant(
        "test_cuda",
        "kernels/decompress.cu",
        "const T* kept = values + (row * groups + group) * 2 * PAIR;",
        "const T* kept = values + (row * groups + (group ^ 1)) * 2 * PAIR;",
        "tests/native/fake_libcuda.cpp",
    ),
    "launch: a row of blocks short": Mutant(
        "test_cuda", "csrc/cuda/decompress.cpp", "(row_bytes + BLOCK_BYTES - 1)", "(row_bytes + BLOCK_BYTES - 2)"
    ),
    "driver: the context is not bound": Mutant(
        "test_cuda", "csrc/cuda/driver.cpp", "  bind_context(driver, device);\n", "  (void)bind_context;\n"
    ),
    "driver: no PTX for refused cubins": Mutant(
        "test_cuda",
        "csrc/cuda/driver.cpp",
        "{static_cast<const void*>(module.fatbin), static_cast<const void*>(module.ptx)}",
        "{static_cast<const void*>(module.fatbin)}",
    ),
    "format: the unused half byte is written": Mutant(
        "test_format", "csrc/cpu/format.cpp", "if (row.half_meta) block.meta[row.rest.meta - 1] &= 15;", ""
    ),
    "format: a slot at in_features may hold anything": Mutant(
        "test_format", "csrc/cpu/format.cpp", "if (column >= in_features &&", "if (column > in_features &&"
    ),
    "format, AVX-512: NaNs rank by their payload": Mutant(
        "test_format", "csrc/cpu/format_avx512.cpp", "_mm512_set1_epi32(0x7f800001)", "_mm512_set1_epi32(0x7fffffff)"
    ),
    "linear: a panel one token long": Mutant(
        "test_linear",
        "csrc/cpu/linear.cpp",
        "while (token >= first_token(panel + 1)) ++panel;",
        "while (token > first_token(panel + 1)) ++panel;",
    ),
    "linear: compensation off by one": Mutant(
        "test_linear", "csrc/cpu/packed.cpp", "compensation[row] += 128u *", "compensation[row] += 127u *"
    ),
    "linear, portable: the second code of a byte is the first": Mutant(
        "test_linear", "csrc/cpu/linear_portable.cpp", "(codes >> slot % 4 * 2 & 3)", "(codes >> slot % 2 * 2 & 3)"
    ),
    "linear, AVX-512: control of the chunk before": Mutant(
        "test_linear",
        "csrc/cpu/linear_avx512.h",
        "Dot::template control<ROOM>(w + CHUNK_BYTES, 0)",
        "Dot::template control<ROOM>(w, 0)",
        "csrc/cpu/linear_avx512.cpp",
    ),
    "linear, AVX-512: the last columns are stored unmasked": Mutant(
        "test_linear",
        "csrc/cpu/linear_avx512.h",
        "const __mmask16 mask = first_lanes(call.out_features - column);",
        "const __mmask16 mask = first_lanes(BLOCK_ROWS);",
        "csrc/cpu/linear_avx512.cpp",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_caught(name: str, native_release: Path, tmp_path: Path) -> None:
    mutant = MUTANTS[name]
    mutated_library = mutant.unit.endswith("fake_libcuda.cpp")
    target = "fake/libcuda.so.1" if mutated_library else mutant.caught_by
    output = mutation.build(mutant, native_release, target, tmp_path)
    done = run(
        native_release / mutant.caught_by if mutated_library else output,
        tmp_path if mutated_library else native_release / "fake",
    )
    assert done.returncode != 0, f"{mutant.caught_by} did not notice: {name}"
