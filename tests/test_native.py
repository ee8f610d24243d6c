"""The tests of the kernels without torch (tests/native): as they ship, under sanitizers, and with bugs planted."""

import json
import os
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = [path.stem for path in sorted((ROOT / "tests" / "native").glob("test_*.cpp"))]


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


@dataclass(frozen=True)
class Mutant:
    """One planted bug: in `file`, `right` becomes `wrong`; `program` must then fail. `unit` is what is recompiled."""

    program: str
    file: str
    right: str
    wrong: str
    unit: str = ""


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
    source = (ROOT / mutant.file).read_text()
    assert source.count(mutant.right) == 1, f"{mutant.right!r} is not in {mutant.file} exactly once"
    mutated = tmp_path / mutant.file
    mutated.parent.mkdir(parents=True)
    mutated.write_text(source.replace(mutant.right, mutant.wrong))

    # Recompile the one unit, with the changed file found first, and relink as the build does, in a folder of its own.
    unit = mutant.unit or mutant.file
    commands = json.loads((native_release / "compile_commands.json").read_text())
    entry = next(entry for entry in commands if entry["file"] == str(ROOT / unit))
    command = shlex.split(entry["command"])
    changed_object = tmp_path / "changed.o"
    command[command.index("-o") + 1] = str(changed_object)
    command[command.index("-c") + 1] = str(mutated if unit == mutant.file else ROOT / unit)
    command[1:1] = ["-O1", f"-I{tmp_path}", f"-I{ROOT / 'kernels'}"]
    subprocess.run(command, cwd=native_release, check=True)

    target = "fake/libcuda.so.1" if unit.endswith("fake_libcuda.cpp") else mutant.program
    listing = subprocess.run(
        ["ninja", "-C", native_release, "-t", "commands", "-s", target], check=True, capture_output=True, text=True
    ).stdout
    link = next(part for part in listing.split(" && ") if " -o " in part).split(" && ")[0]
    output = tmp_path / Path(target).name
    arguments = [str(changed_object) if argument.endswith(f"/{unit}.o") else argument for argument in shlex.split(link)]
    arguments[arguments.index("-o") + 1] = str(output)
    assert str(changed_object) in arguments
    subprocess.run(arguments, cwd=native_release, check=True)

    mutated_library = target.startswith("fake")
    done = run(
        native_release / mutant.program if mutated_library else output,
        tmp_path if mutated_library else native_release / "fake",
    )
    assert done.returncode != 0, f"{mutant.program} did not notice: {name}"
