"""initcheck: bytes that are used before anything has been written there, in shared, local and global memory.

A load of such bytes is an error where its value is used: each kernel here stores what it has loaded.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
from handwritten import Handwritten, assert_silent, the_error

from sparse24.ptx import Buffer

WORDS = np.arange(100, 164, dtype=np.uint32)


def test_shared_memory_that_one_warp_has_not_filled():
    body = """
    mad.lo.u32 %r0, %tid, 4, %s;
    setp.lt.u32 %p0, %tid, {filled};
    @%p0 st.shared.u32 [%r0], %tid;
    bar.sync 0;
    ld.shared.u32 %r1, [%r0]; // BUG
    mad.wide.u32 %d0, %tid, 4, %a0;
    st.global.u32 [%d0], %r1;
"""
    buggy, clean = (Handwritten(body.format(filled=filled), shared=256) for filled in (40, 64))
    got = np.zeros(64, np.uint32)
    assert_silent(clean, got, block=64)
    np.testing.assert_array_equal(got, np.arange(64))
    error = the_error(buggy.launch(got, block=64))
    assert (error.kind, error.line, error.warp) == ("uninitialized", buggy.line(), 1)
    assert 8 <= error.lane < 32 and error.address == 128 + 4 * error.lane
    assert f"read of 4 bytes at offset {error.address} of shared memory" in error.message


@pytest.mark.parametrize(
    ("written", "read", "hole"),
    [
        ("st.shared.u8 [%s], %h0; st.shared.u8 [%s + 1], %h0; st.shared.u8 [%s + 3], %h0;", "u32 %r0, [%s]", 2),
        ("st.shared.u16 [%s + 2], %h0;", "u16 %h1, [%s]", 0),
        ("st.shared.u16 [%s + 2], %h0;", "u8 %h1, [%s + 1]", 1),
        ("st.shared.u32 [%s], %r9; st.shared.u16 [%s + 4], %h0;", "v2.u32 {%r0, %r1}, [%s]", 6),
        ("st.shared.v2.u32 [%s], {%r9, %r9}; st.shared.u32 [%s + 12], %r9;", "v4.u32 {%r0, %r1, %r2, %r3}, [%s]", 8),
    ],
)
def test_bytes_are_known_one_by_one(written, read, hole):
    head = "mov.u16 %h0, 1; mov.u32 %r9, 1;"
    use = "".join(f"st.global.u{16 if r[1] == 'h' else 32} [%a0], {r};" for r in re.findall(r"%[rh]\d", read))
    buggy = Handwritten(f"{head}\n{written}\nld.shared.{read}; // BUG\n{use}", shared=16)
    error = the_error(buggy.launch(WORDS, block=1))
    assert (error.kind, error.line) == ("uninitialized", buggy.line())
    assert f"the byte at offset {hole} has never been written" in error.message
    rest = "".join(f"st.shared.u8 [%s + {byte}], %h0;\n" for byte in range(hole + 1, 16))
    clean = Handwritten(f"{head}\n{written}\nst.shared.u8 [%s + {hole}], %h0;\n{rest}ld.shared.{read};{use}", shared=16)
    assert_silent(clean, WORDS, block=1)


def test_shared_memory_is_unwritten_again_in_each_block():
    body = """
    setp.eq.u32 %p0, %block, 0;
    @%p0 st.shared.u32 [%s], 5;
    ld.shared.u32 %r0, [%s]; // BUG
    mad.wide.u32 %d0, %block, 4, %a0;
    st.global.u32 [%d0], %r0;
"""
    kernel = Handwritten(body, shared=4)
    error = the_error(kernel.launch(WORDS, grid=3, block=1, threads=1))
    assert (error.kind, error.count, error.block) == ("uninitialized", 2, (1, 0, 0))


def test_atomics_read():
    kernel = Handwritten("atom.shared.add.u32 %r0, [%s], 1; // BUG\nld.shared.u32 %r1, [%s];", shared=4)
    error = the_error(kernel.launch(WORDS, block=1))
    assert (error.kind, error.line) == ("uninitialized", kernel.line())
    assert "of 4 bytes at offset 0 of shared memory" in error.message


def test_ldmatrix_of_rows_that_nobody_has_written():
    body = """
    mad.lo.u32 %r0, %lane, 16, %s;
    mov.u32 %r1, 0;
    setp.lt.u32 %p0, %lane, {rows};
    @%p0 st.shared.v4.u32 [%r0], {{%r1, %r1, %r1, %r1}};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r2, %r3, %r4, %r5}}, [%r0]; // BUG
    mad.wide.u32 %d0, %lane, 4, %a0;
    st.global.u32 [%d0], %r2;
    st.global.u32 [%d0], %r5;
"""
    buggy, clean = (Handwritten(body.format(rows=rows), shared=512) for rows in (30, 32))
    assert_silent(clean, WORDS)
    error = the_error(buggy.launch(WORDS))
    assert (error.kind, error.line) == ("uninitialized", buggy.line())
    assert error.lane in (30, 31) and error.address == 16 * error.lane


def test_async_copies_write_their_zeros_too():
    kernel = Handwritten(
        """
    cp.async.cg.shared.global [%s], [%a0], 16, 4;
    cp.async.wait_all;
    ld.shared.v4.u32 {%r0, %r1, %r2, %r3}, [%s];
    st.global.v4.u32 [%a0], {%r0, %r1, %r2, %r3};
    ld.shared.u32 %r4, [%s + 16]; // BUG
    st.global.u32 [%a0], %r4;
""",
        shared=32,
    )
    error = the_error(kernel.launch(WORDS, block=1))
    assert (error.kind, error.line) == ("uninitialized", kernel.line())


def test_local_memory():
    body = """
    mov.u64 %d0, place;
    and.b32 %r0, %lane, 3;
    setp.ne.u32 %p0, %lane, {skipped};
    @%p0 st.local.u32 [place + 4], %lane;
    st.local.u8 [place + 3], %h0;
    mov.u32 %r9, 3;
    ld.local.u8 %h1, [place + 3];
    ld.local.u32 %r1, [place + 4]; // BUG
    mad.wide.u32 %d1, %lane, 4, %a0;
    st.global.u32 [%d1], %r1;
"""
    variables = ".local .align 4 .b8 place[8];"
    buggy, clean = (Handwritten(body.format(skipped=skipped), variables=variables) for skipped in (9, 99))
    assert_silent(clean, WORDS)
    error = the_error(buggy.launch(WORDS))
    assert (error.kind, error.line, error.lane, error.count) == ("uninitialized", buggy.line(), 9, 1)
    assert "local read of 4 bytes at offset 4 of a thread's local memory of 8 bytes" in error.message


def test_global_memory_that_has_only_been_allocated():
    body = """
    mad.lo.u32 %r0, %block, %threads, %tid;
    mad.wide.u32 %d0, %r0, 4, %a0;
    st.global.u32 [%d0], %r0;
    ld.global.u32 %r1, [%d0 + {offset}]; // BUG
    st.global.u32 [%a1], %r1;
"""
    buggy, clean = (Handwritten(body.format(offset=offset), pointers=2) for offset in (128, 0))
    memory, used = np.zeros(64, np.uint32), np.zeros(1, np.uint32)
    with Buffer(memory, initialized=False) as buffer:
        error = the_error(buggy.launch(buffer, used))
        assert (error.kind, error.line) == ("uninitialized", buggy.line())
        offset = 128 + 4 * error.lane
        assert error.address == buffer.address + offset
        assert f"read of 4 bytes at offset {offset} of a buffer of 256 bytes; the byte at offset" in error.message
        assert clean.launch(buffer, used, block=64).ok
        assert buggy.launch(buffer, used).ok  # what an earlier launch has written counts
    with Buffer(memory) as buffer:
        assert buggy.launch(buffer, used).ok


@pytest.mark.parametrize(
    "read",
    [
        "ld.global.u8 %h1, [%a0 + 6]; st.global.u8 [%a0 + 8], %h1;",
        "ld.global.v2.u32 {%r0, %r1}, [%a0]; st.global.u32 [%a0 + 8], %r1;",
        "atom.global.add.u32 %r0, [%a0 + 4], 1;",
        "red.global.add.u32 [%a0 + 4], 1;",
        "cp.async.ca.shared.global [%s], [%a0], 8;",
        "cp.async.cg.shared.global [%s], [%a0], 16, 7;",
        "ld.u32 %r0, [%a0 + 4]; st.u32 [%a0 + 8], %r0;",
    ],
)
def test_what_reads_global_memory(read):
    body = """
    mov.u16 %h0, 1;
    mov.u32 %r5, 1;
    st.global.u32 [%a0], %r5;
    st.global.u16 [%a0 + 4], %h0;
    st.global.u8 [%a0 + 7], %h0;
    {more}
    {read} // BUG
    cp.async.wait_all;
"""
    buggy = Handwritten(body.format(read=read, more=""), shared=16)
    clean = Handwritten(body.format(read=read, more="st.global.u8 [%a0 + 6], %h0;"), shared=16)
    for kernel in (buggy, clean):
        with Buffer(np.zeros(16, np.uint8), initialized=False) as buffer:
            report = kernel.launch(buffer, block=1)
            if kernel is clean:
                assert report.ok, str(report)
            else:
                error = the_error(report)
                assert (error.kind, error.line) == ("uninitialized", buggy.line())
                assert "the byte at offset 6 has never been written" in error.message


def test_discard_makes_a_line_unwritten():
    kernel = Handwritten(
        """
    st.global.u32 [%a0 + 124], 1;
    st.global.u32 [%a0 + 128], 1;
    discard.global.L2 [%a0], 128;
    ld.global.u32 %r0, [%a0 + 128];
    st.global.u32 [%a0 + 132], %r0;
    ld.global.u32 %r1, [%a0 + 124]; // BUG
    st.global.u32 [%a0 + 132], %r1;
"""
    )
    with Buffer(np.zeros(64, np.uint32), align=128, initialized=False) as buffer:
        error = the_error(kernel.launch(buffer, block=1))
    assert (error.kind, error.line) == ("uninitialized", kernel.line())


def test_a_value_that_nobody_uses_is_no_error():
    kernel = Handwritten(
        """
    ld.shared.u32 %r0, [%s];
    add.u32 %r1, %r0, 1;
    mov.u32 %r1, 7;
    st.global.u32 [%a0], %r1;
""",
        shared=4,
    )
    assert_silent(kernel, WORDS.copy(), block=1)
