"""docs/emulator.md: its example runs, its table is the decoder's. As a program, this writes the table."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from sparse24 import ptx

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "emulator.md"
FINDINGS = ROOT / "csrc" / "ptx" / "findings.cpp"


def between(text: str, start: str, end: str) -> str:
    return text[text.index(start) + len(start) : text.index(end)]


def test_table_of_instructions_is_current() -> None:
    written = between(PAGE.read_text(), "<!-- instructions -->\n", "<!-- end of instructions -->")
    assert written == ptx.instructions(), "run `python tests/ptx/test_docs.py`"


def test_table_has_every_kind_of_finding_under_its_check() -> None:
    rows = re.findall(
        r"^\| (?:`(\w+)`|(always)) \| ([`\w, ]+) \|", between(PAGE.read_text(), "## Checks", "## Counters"), re.M
    )
    told = {kind: check or always for check, always, kinds in rows for kind in re.findall(r"`(\w+)`", kinds)}
    found = re.findall(r'\{Kind::\w+, "(\w+)", (?:bit\(Check::(\w+)\)|0)\}', FINDINGS.read_text())
    assert told == {kind: check.lower() or "always" for kind, check in found} and len(told) > 15


def test_every_option_is_told() -> None:
    page = PAGE.read_text()
    counters = [name for name in ptx.Counters.__dataclass_fields__ if not name.startswith("_")]
    for name in (*ptx.CHECKS, *ptx.NUMERICS, *counters, "per_instruction"):
        assert f"`{name}`" in page or f'`"{name}"`' in page or f".{name}`" in page, name


def test_example_runs(tmp_path: Path) -> None:
    example = between(PAGE.read_text(), "```python\n", "```\n<!-- end of example -->")
    path = tmp_path / "example.py"  # a file: Triton reads the source of its kernels
    path.write_text(example)
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("softmax: no errors; ")

    # "Launch it with `columns` of 201 and the report names the load and the store that leave their buffers".
    path.write_text(example.replace("[x, y, 200, ", "[x, y, 201, "))
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, cwd=tmp_path)
    lines = [line for line in done.stdout.splitlines() if "out_of_bounds" in line]
    assert done.returncode == 1 and "KernelError" in done.stderr
    assert {opcode for line in lines for opcode in re.findall(r"\b(ld|st)\.global", line)} == {"ld", "st"}
    assert all("example.py:" in line and "block (4, 0, 0)" in line for line in lines)


if __name__ == "__main__":
    page = PAGE.read_text()
    start = page.index("<!-- instructions -->\n") + len("<!-- instructions -->\n")
    PAGE.write_text(page[:start] + ptx.instructions() + page[page.index("<!-- end of instructions -->") :])
