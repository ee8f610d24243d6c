"""racecheck: shared memory between barriers, lanes of a warp."""

from __future__ import annotations

import numpy as np
import pytest
from handwritten import ORDERS, Handwritten, assert_found, assert_silent, the_error

WORDS = np.arange(100, 164, dtype=np.uint32)


# ---- shared memory, between warps ------------------------------------------------------------------------------------


def exchange(barrier: str) -> Handwritten:
    """Each thread reads what its counterpart in the other warp has written."""
    return Handwritten(
        f"""
    mad.lo.u32 %r0, %tid, 4, %s;
    xor.b32 %r1, %tid, 32;
    mad.lo.u32 %r1, %r1, 4, %s;
    st.shared.u32 [%r0], %tid; // BUG
    {barrier}
    ld.shared.u32 %r2, [%r1]; // BUG
    mad.wide.u32 %d0, %tid, 4, %a0;
    st.global.u32 [%d0], %r2;
""",
        shared=256,
    )


def test_a_dropped_barrier():
    got = np.zeros(64, np.uint32)
    clean = exchange("bar.sync 0;")
    assert_silent(clean, got, block=64)
    np.testing.assert_array_equal(got, np.arange(64) ^ 32)
    buggy = exchange("")
    assert_found(buggy, "race_shared", got, block=64, checks={"race"})
    # Forward: warp 1 reads what warp 0 has written, then writes what warp 0 has read.
    report = buggy.launch(got, block=64, checks={"race"})
    write, read = sorted(report.errors, key=lambda error: error.line)
    assert (read.warp, read.lane, read.address, read.count) == (1, 0, 0, 32)
    assert "read of 4 bytes of shared memory that warp 0, lane 0 has written without a barrier" in read.message
    assert (write.warp, write.lane, write.address, write.count) == (1, 0, 128, 32)
    assert "that warp 0, lane 0 has read without a barrier in between" in write.message


def test_a_barrier_of_the_warp_is_none_of_the_block():
    assert_found(
        exchange("bar.warp.sync 0xffffffff;"), "race_shared", np.zeros(64, np.uint32), block=64, checks={"race"}
    )


def test_barriers_that_only_other_warps_take_part_in():
    got = np.zeros(128, np.uint32)
    body = """
    mad.lo.u32 %r0, %tid, 4, %s;
    xor.b32 %r1, %tid, {partner};
    mad.lo.u32 %r1, %r1, 4, %s;
    shr.u32 %r3, %warp, 1;
    add.u32 %r3, %r3, 1;
    st.shared.u32 [%r0], %tid; // BUG
    barrier.sync %r3, 64;
    ld.shared.u32 %r2, [%r1]; // BUG
"""
    clean, buggy = (Handwritten(body.format(partner=partner), shared=512) for partner in (32, 64))
    assert_silent(clean, got, block=128)
    assert_found(buggy, "race_shared", got, block=128, checks={"race"})


def test_a_producer_that_arrives_and_a_consumer_that_waits():
    """bar.arrive orders what comes before it, not what comes after."""
    body = """
    mad.lo.u32 %r0, %lane, 4, %s;
    setp.ne.u32 %p0, %warp, 0;
    @%p0 bra CONSUMER;
    st.shared.u32 [%r0{early}], %tid; // BUG
    bar.arrive 1, 64;
    st.shared.u32 [%r0{late}], %tid; // BUG
    bra DONE;
CONSUMER:
    bar.sync 1, 64;
    ld.shared.u32 %r2, [%r0]; // BUG
DONE:
"""
    clean = Handwritten(body.format(early="", late=" + 128"), shared=256)
    buggy = Handwritten(body.format(early=" + 128", late=""), shared=256)
    assert_silent(clean, WORDS, block=64)
    assert_found(buggy, "race_shared", WORDS, block=64, checks={"race"})


def test_a_buffer_that_is_filled_again_too_early():
    """Two barriers a step; with only one, the next step's write meets reads of the step before."""
    body = """
    mad.lo.u32 %r0, %tid, 4, %s;
    xor.b32 %r1, %tid, 32;
    mad.lo.u32 %r1, %r1, 4, %s;
    mov.u32 %r5, 0;
STEP:
    add.u32 %r6, %tid, %r5;
    st.shared.u32 [%r0], %r6; // BUG
    bar.sync 0;
    ld.shared.u32 %r2, [%r1]; // BUG
    {second}
    add.u32 %r5, %r5, 1;
    setp.lt.u32 %p0, %r5, 4;
    @%p0 bra STEP;
"""
    clean = Handwritten(body.format(second="bar.sync 0;"), shared=256)
    buggy = Handwritten(body.format(second=""), shared=256)
    assert_silent(clean, WORDS, block=64)
    assert_found(buggy, "race_shared", WORDS, block=64)
    kinds = [error.message for error in buggy.launch(WORDS, block=64).errors]
    assert any("write of 4 bytes of shared memory that warp" in text and "has read" in text for text in kinds)


def test_a_load_before_the_barrier_that_sees_the_right_value_all_the_same():
    body = """
    mad.lo.u32 %r0, %tid, 4, %s;
    st.shared.u32 [%r0], 5;
    bar.sync 0;
    setp.eq.u32 %p0, %tid, 0;
    @%p0 st.shared.u32 [%s + 128], 5; // BUG
    {before}
    bar.sync 0;
    {after}
"""
    read = "ld.shared.u32 %r2, [%s + 128]; // BUG"
    clean = Handwritten(body.format(before="", after=read), shared=256)
    buggy = Handwritten(body.format(before=read, after=""), shared=256)
    assert_silent(clean, WORDS, block=64)
    report = buggy.launch(WORDS, block=64)
    assert {error.kind for error in report.errors} == {"race_shared", "race_warp"}


def test_equal_values_may_be_written_by_all():
    body = """
    mov.u32 %r0, {value};
    st.shared.u32 [%s], %r0; // BUG
    bar.sync 0;
    ld.shared.u32 %r1, [%s];
"""
    assert_silent(Handwritten(body.format(value="7"), shared=4), WORDS, block=128)
    assert_found(Handwritten(body.format(value="%warp"), shared=4), "race_shared", WORDS, block=128)
    report = Handwritten(body.format(value="%tid"), shared=4).launch(WORDS, block=32)
    error = the_error(report)
    assert (error.kind, error.lane, error.count) == ("race_warp", 1, 31)
    assert "write of 4 bytes of shared memory that warp 0, lane 0 has written" in error.message


@pytest.mark.parametrize(
    ("width", "store", "clean"),
    [
        ("u8", "mov.b16 %h0, 1;", True),
        ("u16", "mov.b16 %h0, 1;", True),
        ("u8", "and.b32 %r9, %tid, 62;", False),  # two lanes a byte, with different values
    ],
)
def test_bytes_of_one_word_are_apart(width, store, clean):
    size = int(width[1:]) // 8
    kernel = Handwritten(
        f"""
    mov.u32 %r9, %tid;
    {store}
    cvt.u16.u32 %h0, %tid;
    mad.lo.u32 %r0, %r9, {size}, %s;
    st.shared.{width} [%r0], %h0; // BUG
    bar.sync 0;
    ld.shared.u32 %r1, [%s]; // AFTER
    bar.sync 0;
    st.shared.u32 [%s], 0;
    bar.sync 0;
    ld.shared.{width} %h1, [%r0];
""",
        shared=128,
    )
    if clean:
        assert_silent(kernel, WORDS, block=64)
    else:
        assert_found(kernel, "race_warp", WORDS, block=64, checks={"race"})


def test_a_byte_written_apart_from_its_word_stays_so_when_the_word_is_read():
    body = """
    setp.eq.u32 %p0, %tid, 0;
    setp.eq.u32 %p1, %tid, 32;
    mov.u16 %h0, 5;
    @%p0 st.shared.u32 [%s], 0;
    bar.sync 0;
    @%p0 st.shared.u8 [%s + 1], %h0; // BUG
    @%p0 ld.shared.u32 %r1, [%s];
    @%p1 ld.shared.u8 %h1, [%s + {byte}]; // BUG
"""
    assert_silent(Handwritten(body.format(byte=2), shared=4), WORDS, block=64)
    assert_found(Handwritten(body.format(byte=1), shared=4), "race_shared", WORDS, block=64)


def test_neighbouring_warps_that_share_a_word():
    """Warp 0 writes halves 0 to 32, warp 1 from 32 on: one half too many."""
    body = """
    cvt.u16.u32 %h0, %tid;
    mad.lo.u32 %r0, %tid, 2, %s;
    st.shared.u16 [%r0], %h0; // BUG
    setp.eq.u32 %p0, %tid, 31;
    {extra} // BUG
    bar.sync 0;
    ld.shared.u16 %h1, [%r0];
"""
    clean = Handwritten(body.format(extra="@%p0 st.shared.u16 [%r0], %h0;"), shared=128)
    buggy = Handwritten(body.format(extra="@%p0 st.shared.u32 [%s + 62], %tid;").replace("+ 62", "+ 64"), shared=128)
    assert_silent(clean, WORDS, block=64)
    assert_found(buggy, "race_shared", WORDS, block=64)


def test_atomics_do_not_race_with_each_other_but_with_plain_accesses():
    body = """
    setp.eq.u32 %p0, %tid, 0;
    @%p0 st.shared.u32 [%s], 0;
    bar.sync 0;
    {add} // BUG
    {barrier}
    ld.shared.u32 %r1, [%s]; // BUG
    setp.eq.u32 %p0, %tid, 64;
    @%p0 st.global.u32 [%a0], %r1;
"""
    add = "red.shared.add.u32 [%s], 1;"
    got = np.zeros(1, np.uint32)
    assert_silent(Handwritten(body.format(add=add, barrier="bar.sync 0;"), shared=4), got, block=96)
    assert got[0] == 96
    buggy = Handwritten(body.format(add=add, barrier=""), shared=4)
    for order in ORDERS:
        kinds = {error.kind for error in buggy.launch(got, block=96, **order).errors}
        assert "race_shared" in kinds and kinds <= {"race_shared", "race_warp"}
    plain = "ld.shared.u32 %r2, [%s]; // BUG\nadd.u32 %r2, %r2, 1;\nst.shared.u32 [%s], %r2;"
    report = Handwritten(body.format(add=plain, barrier="bar.sync 0;"), shared=4).launch(got, block=96)
    assert {error.kind for error in report.errors} <= {"race_shared", "race_warp"} and not report.ok


@pytest.mark.parametrize("fence", ["fence.acq_rel.cta;", "membar.cta;", "fence.sc.gpu;", "release", "volatile", ""])
def test_a_flag_in_shared_memory_orders_warps_if_there_is_a_fence(fence):
    """Warp 0 fills, raises a flag; warp 1 waits for the flag in a loop, reads."""
    raise_flag = {
        "release": "st.release.cta.shared.u32 [%s + 128], 1;",
        "volatile": "membar.cta; st.volatile.shared.u32 [%s + 128], 1;",
    }.get(fence, f"{fence} st.relaxed.cta.shared.u32 [%s + 128], 1;")
    wait = "ld.volatile.shared.u32" if fence == "volatile" else "ld.acquire.cta.shared.u32"
    kernel = Handwritten(
        f"""
    mad.lo.u32 %r0, %lane, 4, %s;
    setp.eq.u32 %p0, %tid, 0;
    @%p0 st.shared.u32 [%s + 128], 0;
    bar.sync 0;
    setp.ne.u32 %p1, %warp, 0;
    @%p1 bra CONSUMER;
    st.shared.u32 [%r0], %lane; // BUG
    bar.warp.sync 0xffffffff;
    @%p0 bra RAISE;
    bra DONE;
RAISE:
    {raise_flag}
    bra DONE;
CONSUMER:
    {wait} %r1, [%s + 128];
    setp.eq.u32 %p2, %r1, 0;
    @%p2 bra CONSUMER;
    ld.shared.u32 %r2, [%r0]; // BUG
    mad.wide.u32 %d0, %lane, 4, %a0;
    st.global.u32 [%d0], %r2;
DONE:
""",
        shared=132,
    )
    got = np.zeros(32, np.uint32)
    if fence:
        assert_silent(kernel, got, block=64)
        np.testing.assert_array_equal(got, np.arange(32))
    else:
        assert_found(kernel, "race_shared", got, block=64)


# ---- within a warp ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["read after write", "write after read"])
@pytest.mark.parametrize("width", ["u32", "v4.u32"])
def test_lanes_that_exchange_without_bar_warp_sync(kind, width):
    size = 16 if width.startswith("v4") else 4
    registers = "{{%r2, %r3, %r4, %r5}}" if size == 16 else "%r2"
    body = f"""
    mad.lo.u32 %r0, %lane, {size}, %s;
    xor.b32 %r1, %lane, 1;
    mad.lo.u32 %r1, %r1, {size}, %s;
    mov.u32 %r2, %lane; mov.u32 %r3, 0; mov.u32 %r4, 0; mov.u32 %r5, 0;
    st.shared.{width} [%r0], {registers}; // {{write}}
    {{first}}
    ld.shared.{width} {registers}, [%r1]; // {{read}}
    {{second}}
    add.u32 %r2, %r2, 1;
    st.shared.{width} [%r0], {registers}; // {{again}}
"""
    sync = "bar.warp.sync 0xffffffff;"
    clean = Handwritten(body.format(first=sync, second=sync, write="A", read="B", again="C"), shared=512)
    assert_silent(clean, WORDS)
    if kind == "read after write":
        buggy = Handwritten(body.format(first="", second=sync, write="A", read="BUG", again="C"), shared=512)
        message = "that warp 0, lane 1 has written without bar.warp.sync in between"
    else:
        buggy = Handwritten(body.format(first=sync, second="", write="A", read="B", again="BUG"), shared=512)
        message = "that warp 0, lane 1 has read without bar.warp.sync in between"
    error = the_error(buggy.launch(WORDS))
    assert (error.kind, error.line, error.lane, error.count) == ("race_warp", buggy.line(), 0, 32)
    assert message in error.message


def test_a_partial_bar_warp_sync_orders_only_its_members():
    body = """
    mad.lo.u32 %r0, %lane, 4, %s;
    xor.b32 %r1, %lane, {partner};
    mad.lo.u32 %r1, %r1, 4, %s;
    st.shared.u32 [%r0], %lane;
    setp.lt.u32 %p0, %lane, 16;
    @%p0 bra LOW;
    bar.warp.sync 0xffff0000;
    bra JOIN;
LOW:
    bar.warp.sync 0x0000ffff;
JOIN:
    ld.shared.u32 %r2, [%r1]; // BUG
"""
    clean, buggy = (Handwritten(body.format(partner=partner), shared=128) for partner in (8, 16))
    assert_silent(clean, WORDS)
    assert_found(buggy, "race_warp", WORDS)


def test_a_lane_may_always_use_what_it_has_written_itself():
    kernel = Handwritten(
        """
    mad.lo.u32 %r0, %tid, 4, %s;
    mov.u32 %r1, 0;
LOOP:
    st.shared.u32 [%r0], %r1;
    ld.shared.u32 %r1, [%r0];
    add.u32 %r1, %r1, 1;
    setp.lt.u32 %p0, %r1, 10;
    @%p0 bra LOOP;
""",
        shared=256,
    )
    assert_silent(kernel, WORDS, block=64)


def test_ldmatrix_and_stmatrix_race_like_other_accesses():
    body = """
    mad.lo.u32 %r0, %tid, 16, %s;
    mov.u32 %r1, %tid; mov.u32 %r2, 1; mov.u32 %r3, 2; mov.u32 %r4, 3;
    {store} // BUG
    {barrier}
    xor.b32 %r5, %tid, 32;
    mad.lo.u32 %r5, %r5, 16, %s;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r1, %r2, %r3, %r4}}, [%r5]; // BUG
"""
    for store in (
        "st.shared.v4.u32 [%r0], {%r1, %r2, %r3, %r4};",
        "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r0], {%r1, %r2, %r3, %r4};",
    ):
        clean, buggy = (Handwritten(body.format(store=store, barrier=b), shared=1024) for b in ("bar.sync 0;", ""))
        assert_silent(clean, WORDS, block=64)
        assert_found(buggy, "race_shared", WORDS, block=64, checks={"race"})
