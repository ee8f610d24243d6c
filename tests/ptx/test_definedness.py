"""initcheck through registers: undefined values are passed on silently, and found where something depends on them."""

from __future__ import annotations

import numpy as np
import pytest
from handwritten import Handwritten, assert_silent, the_error

# 64 words of shared memory, of which lanes below 16 have written theirs: each lane's %r0 is undefined from lane 16 on.
HEAD = """
    mad.lo.u32 %r9, %lane, 4, %s;
    mad.wide.u32 %d0, %lane, 4, %a0;
    setp.lt.u32 %p0, %lane, 16;
    @%p0 st.shared.u32 [%r9], %lane;
    bar.sync 0;
    ld.shared.u32 %r0, [%r9]; // LOAD
"""
LOW = "@%p0 "  # lanes whose value is defined


def kernel(body: str) -> Handwritten:
    return Handwritten(HEAD + body, shared=256)


def run(body: str) -> list[tuple[str, int, int]]:
    """Kind, line and lane of what is found, lines counted from the load."""
    one = kernel(body)
    errors = one.launch(np.zeros(64, np.uint32)).errors
    return [(error.kind, error.line - one.line("LOAD"), error.lane) for error in errors]


FOUND = [("uninitialized", 0, 16)]  # at the load, by the first lane that has nothing
USES = {
    "global store": "st.global.u32 [%d0], %r0;",
    "branch": "setp.eq.u32 %p1, %r0, 3; @%p1 bra END; mov.u32 %r1, 2; END: mov.u32 %r2, %r1;",
    "guard": "setp.eq.u32 %p1, %r0, 3; @%p1 mov.u32 %r1, 2;",
    "address": "and.b32 %r1, %r0, 4; add.u32 %r1, %r1, %s; ld.shared.u32 %r2, [%r1];",
    "address of a store": "and.b32 %r1, %r0, 0; add.u32 %r1, %r1, %r9; st.shared.u32 [%r1], 1;",
    "atomic": "red.global.add.u32 [%a0], %r0;",
    "another lane": "shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;",
    "vote": "setp.eq.u32 %p1, %r0, 3; vote.sync.ballot.b32 %r1, %p1, -1;",
    "metadata": "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%f0,%f1,%f2,%f3}, "
    "{%r9,%r9,%r9,%r9}, {%r9,%r9,%r9,%r9}, {%f0,%f1,%f2,%f3}, %r0, 0;",
}
PASSED_ON = {
    "moves": "mov.u32 %r1, %r0; mov.b32 {%h0, %h1}, %r1; mov.b32 %r2, {%h1, %h0};",
    "arithmetic": "add.u32 %r1, %r0, 5; mul.lo.u32 %r2, %r1, %r1; cvt.rn.f32.u32 %f0, %r2; "
    "fma.rn.f32 %f1, %f0, %f0, %f0;",
    "comparison": "setp.eq.u32 %p1, %r0, 3; selp.u32 %r1, 1, 2, %p1;",
    "wider registers": "cvt.u64.u32 %d1, %r0; shl.b64 %d2, %d1, 3; cvt.u32.u64 %r1, %d2;",
    "shared memory and back": "st.shared.u32 [%r9+128], %r0; ld.shared.u32 %r1, [%r9+128];",
}


@pytest.mark.parametrize("use", USES)
def test_a_use_is_found_at_the_load(use: str) -> None:
    found = [one for one in run(USES[use]) if one[0] == "uninitialized"]
    assert found == FOUND


@pytest.mark.parametrize("use", ["global store", "branch", "guard", "address", "address of a store", "atomic"])
def test_lanes_with_a_value_may_use_it(use: str) -> None:
    """What the other lanes do not execute, they do not use."""
    assert run(f"@!%p0 bra OUT;\n{USES[use]}\nOUT: mov.u32 %r5, 0;") == []


@pytest.mark.parametrize("way", PASSED_ON)
def test_passing_on_is_silent_and_loses_nothing(way: str) -> None:
    assert run(PASSED_ON[way]) == []
    result = PASSED_ON[way].rstrip(";").split(";")[-1].split("//")[0].replace(",", " ").split()[1]
    store = {"f": "f32", "h": "u16", "r": "u32", "d": "u64"}[result[1]]
    found = run(f"{PASSED_ON[way]}\nst.global.{store} [%d0], {result};")
    assert [(kind, lane) for kind, _, lane in found] == [("uninitialized", 16)]
    assert run(f"{PASSED_ON[way]}\n{LOW}st.global.{store} [%d0], {result};") == []


def test_a_new_value_ends_it() -> None:
    assert run("mov.u32 %r0, 7; st.global.u32 [%d0], %r0;") == []
    assert run("@!%p0 mov.u32 %r0, 7; st.global.u32 [%d0], %r0;") == []
    assert run(f"{LOW}mov.u32 %r0, 7; st.global.u32 [%d0], %r0;") == FOUND
    assert run("@!%p0 st.shared.u32 [%r9], 3; ld.shared.u32 %r0, [%r9]; st.global.u32 [%d0], %r0;") == []


def test_local_memory_keeps_it() -> None:
    variables = ".local .align 4 .b8 room[8];"
    body = HEAD + "mov.u64 %d1, room; st.local.u32 [%d1], %r0; st.local.u32 [%d1+4], %lane; {use}"
    silent = Handwritten(
        body.replace("{use}", "ld.local.u32 %r1, [%d1+4]; st.global.u32 [%d0], %r1;"), 1, 0, 256, variables
    )
    assert_silent(silent, np.zeros(64, np.uint32))
    buggy = Handwritten(
        body.replace("{use}", "ld.local.u32 %r1, [%d1]; // BUG\nst.global.u32 [%d0], %r1;"), 1, 0, 256, variables
    )
    error = the_error(buggy.launch(np.zeros(64, np.uint32)))
    assert (error.kind, error.line) == ("uninitialized", buggy.line())


def test_it_is_said_once_and_where_it_is_used() -> None:
    one = kernel("st.global.u32 [%d0], %r0; // USE\nst.global.u32 [%d0], %r0;")
    error = the_error(one.launch(np.zeros(64, np.uint32)))
    assert error.count == 1 and error.message.endswith(f"used at line {one.line('USE')}")


# ---- mma.m16n8k16: which results an undefined operand reaches --------------------------------------------------------

MMA = """
    mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f0,%f1,%f2,%f3}, {A}, {B}, {%f4,%f5,%f6,%f7};
    setp.eq.u32 %p2, %lane, %n0;
    @%p2 st.global.f32 [%d0], %f{part};
"""


def reached(a: str, b: str, lane: int) -> np.ndarray:
    """Which elements of the 16x8 result are undefined where %r0 is so in one lane, among the operands."""
    undefined = np.zeros((16, 8), bool)
    for part in range(4):
        head = HEAD.replace("setp.lt.u32 %p0, %lane, 16", f"setp.ne.u32 %p0, %lane, {lane}")
        zero = "mov.u32 %r1, 0; mov.f32 %f4, 0f00000000; mov.f32 %f5, %f4; mov.f32 %f6, %f4; mov.f32 %f7, %f4;"
        body = MMA.replace("A}", f"{a}}}").replace("{B}", f"{{{b}}}").replace("{part}", str(part))
        one = Handwritten(head + zero + body.replace("{A}", f"{{{a}}}"), 1, 1, 256)
        for reader in range(32):
            errors = one.launch(np.zeros(64, np.uint32), reader, checks={"init"}).errors
            undefined[reader // 4 + 8 * (part // 2), reader % 4 * 2 + part % 2] = bool(errors)
    return undefined


@pytest.mark.parametrize("register", range(4))
def test_a_row_of_a_reaches_its_row(register: int) -> None:
    a = ", ".join("%r0" if i == register else "%r1" for i in range(4))
    expected = np.zeros((16, 8), bool)
    expected[5 + 8 * (register % 2)] = True  # lane 22 holds row 22 / 4
    np.testing.assert_array_equal(reached(a, "%r1, %r1", 22), expected)


@pytest.mark.parametrize("register", range(2))
def test_a_column_of_b_reaches_its_column(register: int) -> None:
    b = ", ".join("%r0" if i == register else "%r1" for i in range(2))
    expected = np.zeros((16, 8), bool)
    expected[:, 5] = True
    np.testing.assert_array_equal(reached("%r1, %r1, %r1, %r1", b, 22), expected)
