"""racecheck: global memory between blocks."""

from __future__ import annotations

import numpy as np
import pytest
from handwritten import ORDERS, Handwritten, assert_found, assert_silent, the_error

WORDS = np.arange(100, 164, dtype=np.uint32)


@pytest.mark.parametrize("threads", [1, 2])
def test_plain_adds_instead_of_atomics(threads):
    clean = Handwritten("red.global.add.u32 [%a0], 1;")
    buggy = Handwritten("ld.global.u32 %r0, [%a0]; // BUG\nadd.u32 %r0, %r0, 1;\nst.global.u32 [%a0], %r0; // BUG")
    got = np.zeros(1, np.uint32)
    assert_silent(clean, got, grid=20, block=1, threads=threads)
    assert got[0] == 20 * len(ORDERS)
    assert_found(buggy, "race_global", got, grid=20, block=1, threads=threads)


@pytest.mark.parametrize(
    ("first", "second", "races"),
    [
        ("ld.global.u32 %r0, [%a0];", "ld.global.u32 %r0, [%a0];", False),
        ("ld.global.u32 %r0, [%a0];", "st.global.u32 [%a0], 1;", True),
        ("st.global.u32 [%a0], 1;", "ld.global.u32 %r0, [%a0];", True),
        ("st.global.u32 [%a0], 1;", "st.global.u32 [%a0], 2;", True),
        ("st.global.u32 [%a0], 1;", "atom.global.add.u32 %r0, [%a0], 2;", True),
        ("atom.global.add.u32 %r0, [%a0], 2;", "st.global.u32 [%a0], 1;", True),
        ("atom.global.add.u32 %r0, [%a0], 2;", "ld.global.u32 %r0, [%a0];", True),
        ("atom.global.add.u32 %r0, [%a0], 2;", "red.global.max.u32 [%a0], 2;", False),
        ("atom.global.add.u32 %r0, [%a0], 2;", "ld.volatile.global.u32 %r0, [%a0];", False),
        ("st.relaxed.gpu.global.u32 [%a0], 2;", "ld.acquire.gpu.global.u32 %r0, [%a0];", False),
        ("st.volatile.global.u32 [%a0], 2;", "st.volatile.global.u32 [%a0], 3;", False),
        ("st.global.u32 [%a0], 1;", "cp.async.ca.shared.global [%s], [%a0], 4;", True),
        ("st.global.v4.u32 [%a0], {%r9, %r9, %r9, %r9};", "ld.global.u8 %h0, [%a0 + 15];", True),
        ("st.global.v2.u32 [%a0], {%r9, %r9};", "ld.global.u8 %h0, [%a0 + 8];", False),
        ("st.global.u8 [%a0 + 1], %h9;", "st.global.u8 [%a0 + 2], %h9;", False),
        ("st.global.u16 [%a0 + 2], %h9;", "ld.global.u8 %h0, [%a0 + 3];", True),
        ("ld.global.u16 %h0, [%a0 + 2];", "st.global.u16 [%a0], %h9;", False),
    ],
)
def test_two_blocks_that_nothing_orders(first, second, races):
    kernel = Handwritten(
        f"""
    mov.u16 %h9, 1;
    mov.u32 %r9, 1;
    setp.eq.u32 %p0, %block, 0;
    @%p0 bra FIRST;
    {second} // BUG
    bra DONE;
FIRST:
    {first} // BUG
DONE:
    cp.async.wait_all;
""",
        shared=16,
    )
    if not races:
        assert_silent(kernel, WORDS.copy(), grid=2, block=1, threads=1)
        return
    assert_found(kernel, "race_global", WORDS.copy(), grid=2, block=1, threads=1)
    error = the_error(kernel.launch(WORDS.copy(), grid=2, block=1, threads=1))
    assert error.block == (1, 0, 0)
    assert "where block 0 has " + ("read" if first.startswith("ld") else "written") in error.message


def test_a_stencil_in_place():
    """Each block reads beyond its own part, which a neighbour overwrites."""
    body = """
    mad.lo.u32 %r0, %block, %threads, %tid;
    mad.wide.u32 %d0, %r0, 4, %a0;
    mad.wide.u32 %d1, %r0, 4, {target};
    ld.global.u32 %r1, [%d0]; // BUG
    ld.global.u32 %r2, [%d0 + 4]; // BUG
    add.u32 %r1, %r1, %r2;
    st.global.u32 [%d1], %r1; // BUG
"""
    clean, buggy = (Handwritten(body.format(target=target), pointers=2) for target in ("%a1", "%a0"))
    given, got = np.arange(8 * 32 + 1, dtype=np.uint32), np.zeros(8 * 32, np.uint32)
    assert_silent(clean, given, got, grid=8)
    np.testing.assert_array_equal(got, given[:-1] + given[1:])
    assert_found(buggy, "race_global", given, got, grid=8, threads=1)


def reduction(fence: str, atomic: str) -> Handwritten:
    """Each block stores a partial sum; the last one to come adds them up (threadFenceReduction of the CUDA samples)."""
    return Handwritten(
        f"""
    setp.ne.u32 %p0, %tid, 0;
    mad.wide.u32 %d0, %block, 4, %a0;
    @%p0 bra JOIN;
    add.u32 %r0, %block, 1;
    st.global.u32 [%d0], %r0; // STORE
    {fence}
    mov.u32 %r9, %nctaid.x;
    sub.u32 %r9, %r9, 1;
    {atomic}
    setp.eq.u32 %p1, %r1, %r9;
    selp.u32 %r2, 1, 0, %p1;
    st.shared.u32 [%s], %r2;
JOIN:
    bar.sync 0;
    ld.shared.u32 %r3, [%s];
    setp.eq.u32 %p2, %r3, 0;
    @%p2 bra DONE;
    mov.u32 %r4, 0;
    mov.u32 %r5, %tid;
    mov.u32 %r9, %nctaid.x;
SUM:
    setp.ge.u32 %p3, %r5, %r9;
    @%p3 bra STORE;
    mad.wide.u32 %d1, %r5, 4, %a0;
    ld.global.u32 %r6, [%d1]; // BUG
    add.u32 %r4, %r4, %r6;
    add.u32 %r5, %r5, %threads;
    bra SUM;
STORE:
    red.global.add.u32 [%a1 + 4], %r4;
DONE:
""",
        pointers=2,
        shared=4,
    )


@pytest.mark.parametrize("host_threads", [1, 2])
@pytest.mark.parametrize(
    ("fence", "atomic", "clean"),
    [
        ("membar.gl;", "atom.global.inc.u32 %r1, [%a1], %r9;", True),
        ("fence.acq_rel.gpu;", "atom.relaxed.gpu.global.inc.u32 %r1, [%a1], %r9;", True),
        ("", "atom.acq_rel.gpu.global.inc.u32 %r1, [%a1], %r9;", True),
        ("", "atom.global.inc.u32 %r1, [%a1], %r9;", False),
        ("membar.cta;", "atom.global.inc.u32 %r1, [%a1], %r9;", False),
        ("", "atom.acq_rel.cta.global.inc.u32 %r1, [%a1], %r9;", False),
    ],
)
def test_the_last_block_reduces(fence, atomic, clean, host_threads):
    kernel = reduction(fence, atomic)
    blocks = 40
    for order in ORDERS:
        partial, result = np.zeros(blocks, np.uint32), np.array([0, 0, blocks - 1], np.uint32)
        report = kernel.launch(partial, result, grid=blocks, block=64, threads=host_threads, **order)
        if clean:
            assert report.ok, f"{order}: {report}"
            assert result[1] == blocks * (blocks + 1) // 2
        elif host_threads == 1:
            error = the_error(report)
            assert (error.kind, error.line) == ("race_global", kernel.line())


def semaphore(wait: str, release: str) -> Handwritten:
    """Split-K in turn: block b waits until the semaphore is b, adds to the output, and sets it to b + 1."""
    return Handwritten(
        f"""
    setp.ne.u32 %p0, %tid, 0;
    @%p0 bra READY;
WAIT:
    {wait} %r0, [%a1];
    setp.ne.u32 %p1, %r0, %block;
    @%p1 bra WAIT;
READY:
    bar.sync 0;
    mad.wide.u32 %d0, %tid, 4, %a0;
    ld.global.u32 %r2, [%d0]; // BUG
    add.u32 %r2, %r2, %block;
    st.global.u32 [%d0], %r2; // BUG
    bar.sync 0;
    add.u32 %r3, %block, 1;
    @%p0 bra DONE;
    {release}
DONE:
""",
        pointers=2,
    )


@pytest.mark.parametrize("host_threads", [1, 2])
@pytest.mark.parametrize(
    ("wait", "release", "clean"),
    [
        ("ld.global.acquire.gpu.b32", "st.global.release.gpu.b32 [%a1], %r3;", True),
        ("ld.volatile.global.b32", "membar.gl; st.volatile.global.b32 [%a1], %r3;", True),
        ("ld.relaxed.gpu.global.b32", "fence.acq_rel.gpu; red.relaxed.gpu.global.add.u32 [%a1], 1;", True),
        ("ld.volatile.global.b32", "atom.release.sys.global.exch.b32 %r4, [%a1], %r3;", True),
        ("ld.global.acquire.gpu.b32", "st.relaxed.gpu.global.b32 [%a1], %r3;", False),
        ("ld.global.acquire.gpu.b32", "st.global.release.cta.b32 [%a1], %r3;", False),
        ("ld.global.acquire.gpu.b32", "red.global.add.u32 [%a1], 1;", False),
    ],
)
def test_blocks_in_turn_by_a_semaphore(wait, release, clean, host_threads):
    """The last block knows of the first only through those between."""
    kernel = semaphore(wait, release)
    blocks = 4
    for order in ({"order": "forward"}, {"order": "reverse"}):
        got, flag = np.zeros(64, np.uint32), np.zeros(1, np.uint32)
        report = kernel.launch(got, flag, grid=blocks, block=64, threads=host_threads, **order)
        if clean:
            assert report.ok, f"{order}: {report}"
            np.testing.assert_array_equal(got, sum(range(blocks)))
        else:
            marked = {n for n, line in enumerate(kernel.text.splitlines(), 1) if line.endswith("// BUG")}
            assert report.errors
            assert all(error.kind == "race_global" and error.line in marked for error in report.errors), str(report)


def test_a_barrier_of_the_whole_grid():
    """Twice: everybody publishes to the counter and acquires what all others have."""
    body = """
    mov.u32 %r10, %nctaid.x;
    mad.wide.u32 %d0, %block, 4, %a0;
    add.u32 %r11, %block, 1;
    rem.u32 %r11, %r11, %r10;
    mad.wide.u32 %d1, %r11, 4, %a0;
    mov.u32 %r0, 0;
    mov.u32 %r5, %block;
ROUND:
    st.global.u32 [%d0], %r5; // BUG
    {barrier1}
    ld.global.u32 %r5, [%d1]; // BUG
    {barrier2}
    add.u32 %r0, %r0, 1;
    setp.lt.u32 %p0, %r0, 2;
    @%p0 bra ROUND;
    mad.wide.u32 %d2, %block, 4, %a2;
    st.global.u32 [%d2], %r5;
"""

    def barrier(name: str) -> str:
        return f"""
    fence.acq_rel.gpu;
    atom.add.relaxed.gpu.global.u32 %r1, [%a1], 1;
    div.u32 %r1, %r1, %r10;
    mad.lo.u32 %r1, %r1, %r10, %r10;
{name}:
    ld.relaxed.gpu.global.u32 %r2, [%a1];
    setp.lt.u32 %p1, %r2, %r1;
    @%p1 bra {name};
    fence.acq_rel.gpu;
"""

    blocks = 5
    clean = Handwritten(body.format(barrier1=barrier("A"), barrier2=barrier("B")), pointers=3)
    for order in ({"order": "forward"}, {"order": "reverse"}):
        ring, counter, got = np.zeros(blocks, np.uint32), np.zeros(1, np.uint32), np.zeros(blocks, np.uint32)
        report = clean.launch(ring, counter, got, grid=blocks, block=1, **order)
        assert report.ok, f"{order}: {report}"
        np.testing.assert_array_equal(got, (np.arange(blocks) + 2) % blocks)
    buggy = Handwritten(body.format(barrier1="", barrier2=barrier("A")), pointers=3)
    ring, counter, got = np.zeros(blocks, np.uint32), np.zeros(1, np.uint32), np.zeros(blocks, np.uint32)
    report = buggy.launch(ring, counter, got, grid=blocks, block=1, threads=1)
    assert {error.kind for error in report.errors} == {"race_global"}


def test_launches_after_one_another_do_not_race():
    kernel = Handwritten("mad.wide.u32 %d0, %block, 4, %a0; st.global.u32 [%d0], %block; // BUG")
    other = Handwritten("sub.u32 %r0, 7, %block; mad.wide.u32 %d0, %r0, 4, %a0; st.global.u32 [%d0], %block;")
    memory = np.zeros(8, np.uint32)
    assert kernel.launch(memory, grid=8).ok
    assert other.launch(memory, grid=8).ok
    assert kernel.launch(memory, grid=8).ok


@pytest.mark.parametrize(
    "relay", ["st.release.gpu.global.u32 [%a1 + 4], 1;", "st.relaxed.gpu.global.u32 [%a1 + 4], 1;"]
)
def test_a_block_hands_on_what_it_has_learned(relay):
    """Block 0 tells block 1 by one flag, block 1 tells block 2 by another: block 2 knows what block 0 has written."""
    kernel = Handwritten(
        f"""
    setp.eq.u32 %p0, %block, 1;
    setp.eq.u32 %p1, %block, 2;
    @%p0 bra MIDDLE;
    @%p1 bra LAST;
    st.global.u32 [%a0], 42;
    st.release.gpu.global.u32 [%a1], 1;
    bra DONE;
MIDDLE:
    ld.acquire.gpu.global.u32 %r0, [%a1];
    setp.eq.u32 %p2, %r0, 0;
    @%p2 bra MIDDLE;
    {relay}
    bra DONE;
LAST:
    ld.acquire.gpu.global.u32 %r0, [%a1 + 4];
    setp.eq.u32 %p2, %r0, 0;
    @%p2 bra LAST;
    ld.global.u32 %r1, [%a0]; // BUG
    st.global.u32 [%a0 + 4], %r1;
DONE:
""",
        pointers=2,
    )
    for order in ({"order": "forward"}, {"order": "reverse"}):
        memory, flags = np.zeros(2, np.uint32), np.zeros(2, np.uint32)
        report = kernel.launch(memory, flags, grid=3, block=1, **order)
        np.testing.assert_array_equal(memory, [42, 42])
        if "release" in relay:
            assert report.ok, f"{order}: {report}"
        else:
            error = the_error(report)
            assert (error.kind, error.line, error.block) == ("race_global", kernel.line(), (2, 0, 0))
            assert "where block 0 has written" in error.message
