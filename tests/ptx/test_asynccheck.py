"""async check: bytes of a cp.async that are touched before its thread has waited for its group."""

from __future__ import annotations

import numpy as np
import pytest
from handwritten import Handwritten, assert_silent, the_error

WORDS = np.arange(100, 164, dtype=np.uint32)


@pytest.mark.parametrize(
    "touch",
    [
        "ld.shared.u32 %r1, [%r0];",
        "ld.shared.u8 %h1, [%r0 + 2];",
        "st.shared.u32 [%r0], %lane;",
        "st.shared.u8 [%r0 + 3], %h0;",
        "atom.shared.add.u32 %r1, [%r0], 1;",
        "cp.async.ca.shared.global [%r0], [%d0], 4;",
        "cvta.shared.u64 %d4, buffer; cvt.u64.u32 %d5, %r2; add.u64 %d4, %d4, %d5; ld.u32 %r1, [%d4];",
    ],
)
def test_touched_before_it_has_come(touch):
    head = """
    mov.u16 %h0, 0;
    shl.b32 %r2, %lane, 2;
    add.u32 %r0, %r2, %s;
    mad.wide.u32 %d0, %lane, 4, %a0;
    st.shared.u32 [%r0], 0;
    cp.async.ca.shared.global [%r0], [%d0], 4;
    cp.async.commit_group;
"""
    buggy = Handwritten(f"{head}\n{touch} // BUG\ncp.async.wait_all;", shared=128)
    clean = Handwritten(f"{head}\ncp.async.wait_group 0;\n{touch}\ncp.async.wait_all;", shared=128)
    assert_silent(clean, WORDS)
    error = the_error(buggy.launch(WORDS))
    assert (error.kind, error.line, error.lane, error.count) == ("async_in_flight", buggy.line(), 0, 32)
    assert "where a cp.async that has not been waited for writes" in error.message


def pipeline(pending: int, stages: int = 3) -> Handwritten:
    """A ring of stages: one group a stage, and wait_group that leaves ``pending`` of them under way."""
    return Handwritten(
        f"""
    mad.wide.u32 %d0, %tid, 16, %a0;
    mad.lo.u32 %r0, %tid, 16, %s;
    mov.u32 %r1, 0;
FILL:
    mad.lo.u32 %r2, %r1, 1024, %r0;
    mad.wide.u32 %d1, %r1, 1024, %d0;
    cp.async.cg.shared.global [%r2], [%d1], 16;
    cp.async.commit_group;
    add.u32 %r1, %r1, 1;
    setp.lt.u32 %p0, %r1, {stages - 1};
    @%p0 bra FILL;
    mov.u32 %r3, 0;
    mov.u32 %r20, 0;
STEP:
    cp.async.wait_group {pending};
    bar.sync 0;
    rem.u32 %r4, %r3, {stages};
    xor.b32 %r5, %tid, 32;
    mad.lo.u32 %r5, %r5, 16, %s;
    mad.lo.u32 %r5, %r4, 1024, %r5;
    ld.shared.v4.u32 {{%r10, %r11, %r12, %r13}}, [%r5]; // BUG
    add.u32 %r20, %r20, %r10;
    add.u32 %r20, %r20, %r13;
    add.u32 %r6, %r3, {stages - 1};
    setp.ge.u32 %p1, %r6, 8;
    @%p1 bra COMMIT;
    rem.u32 %r7, %r6, {stages};
    mad.lo.u32 %r2, %r7, 1024, %r0;
    mad.wide.u32 %d1, %r6, 1024, %d0;
    cp.async.cg.shared.global [%r2], [%d1], 16; // ISSUE
COMMIT:
    cp.async.commit_group;
    add.u32 %r3, %r3, 1;
    setp.lt.u32 %p2, %r3, 8;
    @%p2 bra STEP;
    mad.wide.u32 %d2, %tid, 4, %a1;
    st.global.u32 [%d2], %r20;
""",
        pointers=2,
        shared=stages * 1024,
    )


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_wait_group_off_by_one(stages):
    given, got = np.arange(8 * 64 * 4, dtype=np.uint32), np.zeros(64, np.uint32)
    clean, buggy = pipeline(stages - 2, stages), pipeline(stages - 1, stages)
    assert_silent(clean, given, got, block=64)
    quads = given.reshape(8, 64, 4)[:, np.arange(64) ^ 32]
    np.testing.assert_array_equal(got, quads[..., [0, 3]].sum((0, 2)))
    report = buggy.launch(given, got, block=64, checks={"async"})
    error = the_error(report)
    assert (error.kind, error.line, error.address) == ("async_in_flight", buggy.line(), 512 * (1 - error.warp))


def test_waiting_for_it_does_not_make_it_known_to_other_threads():
    body = """
    mad.wide.u32 %d0, %tid, 4, %a0;
    mad.lo.u32 %r0, %tid, 4, %s;
    cp.async.ca.shared.global [%r0], [%d0], 4;
    cp.async.wait_all;
    {barrier}
    xor.b32 %r1, %tid, {partner};
    mad.lo.u32 %r1, %r1, 4, %s;
    ld.shared.u32 %r2, [%r1]; // BUG
"""
    for barrier in ("bar.sync 0;",):
        for partner in (0, 1, 32):
            assert_silent(Handwritten(body.format(barrier=barrier, partner=partner), shared=256), WORDS, block=64)
    assert_silent(Handwritten(body.format(barrier="", partner=0), shared=256), WORDS, block=64)
    assert_silent(Handwritten(body.format(barrier="bar.warp.sync -1;", partner=1), shared=256), WORDS, block=64)
    for partner, kind in ((1, "race_warp"), (32, "race_shared")):
        buggy = Handwritten(body.format(barrier="", partner=partner), shared=256)
        report = buggy.launch(WORDS, block=64)
        read = next(error for error in report.errors if error.line == buggy.line() and error.kind == kind)
        assert (read.warp, read.lane, read.address) == ((1, 0, 0) if partner == 32 else (0, 0, 4))
        assert f"that warp 0, lane {partner % 32} has written" in read.message


def test_another_thread_touches_it():
    body = """
    mad.wide.u32 %d0, %tid, 4, %a0;
    mad.lo.u32 %r0, %tid, 4, %s;
    st.shared.u32 [%r0], 1;
    bar.sync 0;
    cp.async.ca.shared.global [%r0], [%d0], 4;
    cp.async.commit_group;
    {early}
    bar.sync 0;
    xor.b32 %r1, %tid, 32;
    mad.lo.u32 %r1, %r1, 4, %s;
    ld.shared.u32 %r2, [%r1]; // BUG
    bar.sync 0;
    cp.async.wait_all;
"""
    clean, buggy = (Handwritten(body.format(early=early), shared=256) for early in ("cp.async.wait_group 0;", ""))
    assert_silent(clean, WORDS, block=64)
    error = the_error(buggy.launch(WORDS, block=64))
    assert (error.kind, error.line, error.count) == ("async_in_flight", buggy.line(), 64)


def test_a_copy_into_what_others_still_read():
    """The barrier between the last read of a stage and the copy that fills it again."""
    body = """
    mad.wide.u32 %d0, %tid, 4, %a0;
    mad.lo.u32 %r0, %tid, 4, %s;
    xor.b32 %r1, %tid, 32;
    mad.lo.u32 %r1, %r1, 4, %s;
    st.shared.u32 [%r0], 1;
    bar.sync 0;
    ld.shared.u32 %r2, [%r1]; // READ
    {barrier}
    cp.async.ca.shared.global [%r0], [%d0], 4; // BUG
    cp.async.wait_all;
"""
    clean, buggy = (Handwritten(body.format(barrier=barrier), shared=256) for barrier in ("bar.sync 0;", ""))
    assert_silent(clean, WORDS, block=64)
    report = buggy.launch(WORDS, block=64)
    write = next(error for error in report.errors if error.line == buggy.line())
    assert (write.kind, write.count) == ("race_shared", 32)
    assert f"cp.async write of 4 bytes of shared memory that warp {1 - write.warp}, lane 0 has read" in write.message


def test_without_the_async_check_it_is_a_race():
    body = """
    mad.wide.u32 %d0, %tid, 4, %a0;
    mad.lo.u32 %r0, %tid, 4, %s;
    xor.b32 %r1, %tid, 32;
    mad.lo.u32 %r1, %r1, 4, %s;
    st.shared.u32 [%r0], 1;
    bar.sync 0;
    cp.async.ca.shared.global [%r0], [%d0], 4;
    bar.sync 0;
    ld.shared.u32 %r2, [%r1]; // READ
    {barrier}
    cp.async.wait_all; // WAIT
"""
    # Without a barrier after the reads, one warp's copies are written before the other reads.
    for barrier, marks in (("bar.sync 0;", set()), ("", {"READ", "WAIT"})):
        kernel = Handwritten(body.format(barrier=barrier), shared=256)
        report = kernel.launch(WORDS, block=64, checks={"race"})
        assert {(error.kind, error.line) for error in report.errors} == {
            ("race_shared", kernel.line(mark)) for mark in marks
        }


def test_copies_that_nobody_waits_for():
    """They are dropped, and that alone is no error."""
    kernel = Handwritten("cp.async.ca.shared.global [%s], [%a0], 4;\ncp.async.commit_group;", shared=4)
    assert_silent(kernel, WORDS, grid=3, block=1)


def test_only_uncommitted_copies_are_left_by_wait_group_0():
    kernel = Handwritten(
        """
    cp.async.ca.shared.global [%s], [%a0], 4;
    cp.async.commit_group;
    cp.async.ca.shared.global [%s + 4], [%a0], 4;
    cp.async.wait_group 0;
    ld.shared.u32 %r0, [%s];
    ld.shared.u32 %r1, [%s + 4]; // BUG
""",
        shared=8,
    )
    error = the_error(kernel.launch(WORDS, block=1, checks={"async"}))
    assert (error.kind, error.line, error.address) == ("async_in_flight", kernel.line(), 4)
