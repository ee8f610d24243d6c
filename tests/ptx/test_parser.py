"""Syntax errors as Python sees them. The grammar itself: tests/native/ptx/test_parser.cpp."""

import random

import pytest

from sparse24 import ptx

HEAD = ".version 8.6\n.target sm_90\n.address_size 64\n"
KERNEL = HEAD + ".visible .entry k()\n{\n.reg .b32 %r<3>;\nmov.u32 %r1, %tid.x;\nret;\n}\n"


@pytest.mark.parametrize(
    ("text", "line", "column"),
    [
        (KERNEL.replace("ret;", "ret"), 9, 1),
        (KERNEL.replace("%tid.x;", "0x;"), 7, 14),
        (KERNEL.removesuffix("}\n"), 9, 1),
        (HEAD + ".visible .entry ()", 4, 17),
    ],
)
def test_place_of_an_error(text: str, line: int, column: int) -> None:
    ptx.load(KERNEL)
    with pytest.raises(ptx.PtxError, match=rf"line {line}, column {column}: "):
        ptx.load(text)


def test_damaged_text_gives_an_error_or_a_module() -> None:
    dice = random.Random(24)
    errors = 0
    for _ in range(500):
        at = dice.randrange(len(HEAD), len(KERNEL))
        marks = dice.choice('{}()[]<>,;:+-!?@_."\n0x%é') * dice.randrange(1, 40)
        text = KERNEL[:at] + marks + KERNEL[at + dice.randrange(4) :]
        try:
            ptx.load(text)
        except ptx.PtxError:
            errors += 1
    assert 250 < errors < 500
