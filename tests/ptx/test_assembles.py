"""What the emulator's table of integer, logic, comparison and move instructions has, ptxas assembles.

The operands are written by the table's own rules (csrc/ptx/isa.h), in registers of the types that they name.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from elementwise import DTYPES, forms
from oracles import nvcc

INTEGER = "add addc sub subc mul mad madc mul24 mad24 sad div rem abs neg min max dp4a dp2a"
LOGIC = "and or xor not cnot lop3 shl shr shf prmt popc clz bfind fns brev bfe bfi szext bmsk"
MOVES = "mov cvta isspacep setp set selp slct"
CONTROL = "ret exit trap brkpt nanosleep pmevent griddepcontrol"
OPCODES = f"{INTEGER} {LOGIC} {MOVES} {CONTROL}".split()

FLOATS = {"f16", "bf16", "f16x2", "bf16x2", "f32", "f32x2", "f64"}  # of them, only comparisons and moves are here

HEADER = """.version 8.8
.target sm_90a
.address_size 64
.visible .entry everything()
{
.reg .pred %p<9>; .reg .b8 %x8_<9>; .reg .b16 %x16_<9>; .reg .b32 %x32_<9>; .reg .b64 %x64_<9>;
"""


def bits(type_name: str) -> int:
    return 8 * DTYPES[type_name].itemsize


def instruction(name: str, rules: str) -> str:
    modifiers = name.split(".")[1:]
    types = [one for one in modifiers if one in DTYPES]
    boolean = bool({"and", "or", "xor"} & set(modifiers))
    written = []
    for i, rule in enumerate(filter(None, rules.split(", "))):
        rule = rule.removeprefix("=")
        if rule in ("p", "!p"):
            written.append(f"{rule[:-1]}%p{i}")
        elif rule == "!p?":  # the Boolean operator's
            written += [f"!%p{i}"] if boolean else []
        elif rule == "p|p?":
            written.append("%p0" if types[0] in ("f16", "bf16") else "%p0|%p1")
        elif rule == "i":
            written.append("3")
        elif rule.startswith("*"):
            size = bits(types[0]) // 2
            written.append(f"{{%x{size}_{i}, %x{size}_{i + 4}}}")
        else:
            kind = rule.removesuffix("|p?").removesuffix("w")
            size = bits(types[int(kind)] if kind.isdigit() else kind) * (2 if rule.endswith("w") else 1)
            written.append(f"%x{size}_{i}" + ("|%p0" if rule.endswith("|p?") and boolean else ""))
    return f"{name} {', '.join(written)};"


def test_ptxas_assembles_every_form(tmp_path: Path) -> None:
    names = [
        (name, rules)
        for name, rules in forms(OPCODES)
        if name.split(".")[0] in MOVES.split() or not FLOATS & set(name.split("."))
    ]
    lines = sorted({instruction(name, rules) for name, rules in names})
    assert len(lines) > 4000
    text = HEADER + "\n".join(lines) + "\n}\n"
    file = tmp_path / "everything.ptx"
    file.write_text(text)
    command = [Path(nvcc()).with_name("ptxas"), "-arch=sm_90a", file, "-o", tmp_path / "everything.cubin"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
