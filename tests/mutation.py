"""Planted bugs: one source recompiled with a change, and one program or library relinked with it, elsewhere."""

import json
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Mutant:
    """In `file`, `right` becomes `wrong`; `caught_by` must then fail. `unit` is what is recompiled, if not the file."""

    caught_by: str
    file: str
    right: str
    wrong: str
    unit: str = ""


def build(mutant: Mutant, native_release: Path, target: str, folder: Path) -> Path:
    """The mutated `target` of the build in native_release, made in `folder`."""
    source = (ROOT / mutant.file).read_text()
    assert source.count(mutant.right) == 1, f"{mutant.right!r} is not in {mutant.file} exactly once"
    mutated = folder / mutant.file
    mutated.parent.mkdir(parents=True)
    mutated.write_text(source.replace(mutant.right, mutant.wrong))

    # Recompile the one unit, with the changed file found first, and relink as the build does.
    unit = mutant.unit or mutant.file
    commands = json.loads((native_release / "compile_commands.json").read_text())
    entry = next(entry for entry in commands if entry["file"] == str(ROOT / unit))
    command = shlex.split(entry["command"])
    changed_object = folder / "changed.o"
    command[command.index("-o") + 1] = str(changed_object)
    command[command.index("-c") + 1] = str(mutated if unit == mutant.file else ROOT / unit)
    command[1:1] = [f"-I{folder}", f"-I{ROOT / 'kernels'}"]
    # The templates of csrc/cpu/linear take long to compile, programs of csrc/ptx long to run.
    command += ["-O0" if unit.startswith("csrc/cpu/linear") else "-O1", "-Wno-error"]  # a variable may be left unused
    subprocess.run(command, cwd=native_release, check=True)

    listing = subprocess.run(
        ["ninja", "-C", native_release, "-t", "commands", "-s", target], check=True, capture_output=True, text=True
    ).stdout
    link = next(part for part in listing.split(" && ") if " -o " in part).split(" && ")[0]
    output = folder / Path(target).name
    arguments = [str(changed_object) if argument.endswith(f"/{unit}.o") else argument for argument in shlex.split(link)]
    arguments[arguments.index("-o") + 1] = str(output)
    assert str(changed_object) in arguments
    subprocess.run(arguments, cwd=native_release, check=True)
    return output
