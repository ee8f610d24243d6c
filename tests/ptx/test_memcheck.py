"""memcheck: out of bounds in every space, misaligned, freed, read-only. A bad access is never performed."""

from __future__ import annotations

import re

import numpy as np
import pytest
from handwritten import Handwritten, assert_silent, the_error

from sparse24.ptx import Buffer

WORDS = np.arange(100, 164, dtype=np.uint32)


def launch(kernel: Handwritten, *args, **options):
    return kernel.launch(*args, checks={"memory"}, **options)


def test_a_missing_tail_predicate_is_a_read_and_a_write_beyond_the_end():
    body = """
    mad.lo.u32 %r0, %block, %threads, %tid;
    setp.lt.u32 %p0, %r0, %n0;
    mad.wide.u32 %d0, %r0, 4, %a0;
    mad.wide.u32 %d1, %r0, 4, %a1;
    mov.u32 %r1, 5;
    {guard} ld.global.u32 %r1, [%d0]; // READ
    {guard} st.global.u32 [%d1], %r1; // WRITE
"""
    buggy, clean = (Handwritten(body.format(guard=guard), pointers=2, numbers=1) for guard in ("", "@%p0"))
    given, got = np.arange(70, dtype=np.uint32), np.zeros(70, np.uint32)
    assert_silent(clean, given, got, 70, grid=2, block=64)
    np.testing.assert_array_equal(got, given)

    source, target = Buffer(given), Buffer(got)
    report = launch(buggy, source, target, 70, grid=2, block=64)
    read, write = report.errors
    assert (read.kind, read.line, read.count) == ("out_of_bounds", buggy.line("READ"), 58)
    assert (write.kind, write.line, write.count) == ("out_of_bounds", buggy.line("WRITE"), 58)
    assert (read.block, read.warp, read.lane) == ((1, 0, 0), 0, 6)
    assert read.address == source.address + 280 and write.address == target.address + 280
    assert "global read of 4 bytes at offset 280 of a buffer of 280 bytes" in read.message
    assert "global write of 4 bytes at offset 280 of a buffer of 280 bytes" in write.message
    np.testing.assert_array_equal(got, given)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("%a0 + -4", "at offset -4 of a buffer of 256 bytes"),
        ("%a0 + 256", "at offset 256 of a buffer of 256 bytes"),
        ("%a0 + 1000000000", "at offset 1000000000 of a buffer"),
        ("%a0 + -1000000000", "at offset -1000000000 of a buffer of 256 bytes"),
        ("0", "at address 0x0, where no buffer is"),
        ("16", "at address 0x10, where no buffer is"),
        ("0xfffffffffffffffc", "at address 0xfffffffffffffffc, where no buffer is"),
    ],
)
@pytest.mark.parametrize("space", ["global.", ""])
def test_global_addresses_that_are_nobodys(address, message, space):
    kernel = Handwritten(
        f"""
    mov.u32 %r0, 77;
    ld.{space}u32 %r0, [{address}]; // READ
    st.global.u32 [%a0], %r0;
    st.{space}u32 [{address}], 9; // WRITE
    atom.{space}add.u32 %r1, [{address}], 9; // ATOMIC
    st.global.u32 [%a0 + 4], %r1;
"""
    )
    memory = WORDS.copy()
    report = launch(kernel, memory, block=1)
    assert [(e.kind, e.line) for e in report.errors] == [
        ("out_of_bounds", kernel.line(mark)) for mark in ("READ", "WRITE", "ATOMIC")
    ]
    for error, access in zip(report.errors, ("read", "write", "atomic"), strict=True):
        assert re.search(f"global {access} of 4 bytes .*({message})", error.message), error.message
    np.testing.assert_array_equal(memory, [0, 0, *WORDS[2:]])  # loads and atomics that are not performed give 0


@pytest.mark.parametrize("missing", [1, 4, 15])
def test_an_access_that_begins_inside_and_ends_outside(missing):
    kernel = Handwritten("ld.global.v4.u32 {%r0, %r1, %r2, %r3}, [%a0 + 16]; // BUG")
    assert_silent(kernel, np.zeros(32, np.uint8), block=1)
    error = the_error(launch(kernel, np.zeros(32 - missing, np.uint8), block=1))
    assert (error.kind, error.line) == ("out_of_bounds", kernel.line())
    assert f"read of 16 bytes at offset 16 of a buffer of {32 - missing} bytes" in error.message


def test_only_the_lanes_outside_are_kept_from_it():
    kernel = Handwritten(
        """
    mad.wide.u32 %d0, %lane, 4, %a0;
    ld.global.u32 %r0, [%d0 + 64]; // READ
    mad.wide.u32 %d1, %lane, 4, %a1;
    st.global.u32 [%d1], %r0;
    mad.wide.s32 %d2, %lane, -4, %a1;
    st.global.u32 [%d2 + 204], %r0; // WRITE
""",
        pointers=2,
    )
    got = np.zeros(48, np.uint32)
    report = launch(kernel, np.arange(1, 33, dtype=np.uint32), got)
    read, write = report.errors
    assert (read.lane, read.count, read.line) == (16, 16, kernel.line("READ"))
    assert (write.lane, write.count, write.line) == (0, 4, kernel.line("WRITE"))
    loaded = [*range(17, 33), *[0] * 16]
    wanted = np.array([*loaded, *[0] * 16])
    for lane in range(4, 32):
        wanted[51 - lane] = loaded[lane]
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    ("instruction", "access", "size"),
    [
        ("ld.shared.u32 %r0, [{}];", "read", 4),
        ("st.shared.v2.u32 [{}], {{%r1, %r2}};", "write", 8),
        ("atom.shared.add.u32 %r0, [{}], 1;", "atomic", 4),
        ("cp.async.ca.shared.global [{}], [%a0], 8;", "cp.async write", 8),
        ("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r0}}, [{}];", "read", 16),
        ("stmatrix.sync.aligned.m8n8.x1.shared.b16 [{}], {{%r1}};", "write", 16),
    ],
)
@pytest.mark.parametrize("offset", [64, -16, 1 << 20])
def test_shared_memory_out_of_bounds(instruction, access, size, offset):
    kernel = Handwritten(
        f"""
    mov.u32 %r0, 1;
    mov.u32 %r1, 2;
    mov.u32 %r2, 3;
    add.u32 %r5, %s, {offset};
    {instruction.format("%r5")} // BUG
    cp.async.wait_all;
""",
        shared=64,
    )
    for checks in ({"memory"}, {"memory", "race", "init", "async"}):
        report = kernel.launch(WORDS.copy(), checks=checks)
        error = the_error(report)
        assert (error.kind, error.line, error.lane) == ("out_of_bounds", kernel.line(), 0)
        assert error.address == offset % (1 << 32)
        assert error.message.startswith(f"{access} of {size} bytes at offset {offset % (1 << 32)} of the block's 64")


def test_shared_memory_out_of_bounds_of_a_wrong_pitch():
    """Rows of 36 words in memory for rows of 32: the last warps run out of it."""
    body = """
    mad.lo.u32 %r0, %warp, {pitch}, %lane;
    mad.lo.u32 %r0, %r0, 4, %s;
    st.shared.u32 [%r0], %tid; // BUG
"""
    buggy, clean = (Handwritten(body.format(pitch=pitch), shared=8 * 32 * 4) for pitch in (36, 32))
    assert_silent(clean, WORDS, block=256)
    error = the_error(launch(buggy, WORDS, block=256))
    assert (error.kind, error.line, error.warp, error.lane) == ("out_of_bounds", buggy.line(), 7, 4)
    assert "at offset 1024 of the block's 1024 bytes of shared memory" in error.message
    assert error.count == 28


@pytest.mark.parametrize("generic", [False, True])
def test_local_memory_has_bounds_for_each_lane(generic):
    body = """
    mov.u32 %r9, {top};
    setp.eq.u32 %p0, %lane, 13;
    selp.u32 %r0, %r9, 0, %p0;
    mov.u64 %d1, place;
    {cvta}
    cvt.u64.u32 %d2, %r0;
    add.u64 %d1, %d1, %d2;
    st{local}.u32 [%d1], %lane; // WRITE
    ld{local}.u32 %r1, [%d1]; // READ
    mad.wide.u32 %d3, %lane, 4, %a0;
    st.global.u32 [%d3], %r1;
"""
    cvta, local = ("cvta.local.u64 %d1, %d1;", "") if generic else ("", ".local")
    buggy, clean = (
        Handwritten(body.format(top=top, cvta=cvta, local=local), variables=".local .align 8 .b8 place[16];")
        for top in (16, 12)
    )
    got = np.zeros(32, np.uint32)
    assert_silent(clean, got)
    np.testing.assert_array_equal(got, np.arange(32))
    write, read = launch(buggy, got).errors
    assert (write.kind, write.line, write.lane, write.count) == ("out_of_bounds", buggy.line("WRITE"), 13, 1)
    assert (read.kind, read.line, read.lane, read.count) == ("out_of_bounds", buggy.line("READ"), 13, 1)
    assert "local read of 4 bytes at offset 16 of a thread's local memory of 16 bytes" in read.message
    assert got[13] == 0 and got[14] == 14


def test_parameters_have_bounds_and_are_constant():
    kernel = Handwritten(
        """
    cvta.param.u64 %d0, n0;
    ld.u32 %r0, [%d0 + 4]; // READ
    st.u32 [%d0], 5; // WRITE
""",
        numbers=1,
    )
    read, write = launch(kernel, WORDS, 7, block=1).errors
    assert (read.kind, read.line) == ("out_of_bounds", kernel.line("READ"))
    assert "param read of 4 bytes at offset 12 of the kernel's parameters of 12 bytes" in read.message
    assert (write.kind, write.line) == ("read_only", kernel.line("WRITE"))


def test_constant_variables_have_bounds_and_are_constant():
    kernel = Handwritten(
        """
    mov.u64 %d0, table;
    ld.const.u32 %r0, [%d0 + 12];
    ld.const.u32 %r1, [%d0 + 16]; // READ
    st.u32 [%d0], 5; // WRITE
    atom.global.add.u32 %r2, [%d0], 5; // ATOMIC
    ld.const.u32 %r3, [table];
    st.global.v2.u32 [%a0], {%r0, %r3};
""",
        globals=".const .align 4 .u32 table[4] = {1, 2, 3, 4};",
    )
    got = np.zeros(2, np.uint32)
    read, write, atomic = launch(kernel, got, block=1).errors
    assert (read.kind, read.line) == ("out_of_bounds", kernel.line("READ"))
    assert (write.kind, write.line) == ("read_only", kernel.line("WRITE"))
    assert (atomic.kind, atomic.line) == ("read_only", kernel.line("ATOMIC"))
    assert "write of 4 bytes at offset 0 of a constant variable of 16 bytes" in write.message
    np.testing.assert_array_equal(got, [4, 1])


@pytest.mark.parametrize(
    ("instruction", "space"),
    [
        ("ld.global.v4.u32 {%r0, %r1, %r2, %r3}, [%a0 + 8];", "global"),
        ("ld.global.v2.u32 {%r0, %r1}, [%a0 + 4];", "global"),
        ("ld.global.u32 %r0, [%a0 + 2];", "global"),
        ("ld.global.u16 %h0, [%a0 + 1];", "global"),
        ("st.global.b64 [%a0 + 4], %d9;", "global"),
        ("atom.global.add.u64 %d0, [%a0 + 4], 1;", "global"),
        ("st.shared.v4.u32 [%s + 8], {%r8, %r9, %r10, %r11};", "shared"),
        ("ld.shared.u16 %h0, [%s + 1];", "shared"),
        ("atom.shared.or.b32 %r0, [%s + 2], 1;", "shared"),
        ("cp.async.cg.shared.global [%s + 8], [%a0], 16;", "shared"),
        ("cp.async.cg.shared.global [%s], [%a0 + 8], 16;", "global"),
        ("cp.async.cg.shared.global [%s], [%a0 + 8], 16, 4;", "global"),
        ("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r0}, [%s + 8];", "shared"),
        ("st.local.u32 [place + 2], %r8;", "local"),
        ("ld.local.v2.u32 {%r0, %r1}, [place + 4];", "local"),
        ("discard.global.L2 [%a0 + 64], 128;", "discard"),
    ],
)
def test_misaligned_accesses(instruction, space):
    kernel = Handwritten(
        f"""
    mov.u64 %d9, 0;
    mov.u32 %r8, 0;
    mov.u32 %r9, 0;
    mov.u32 %r10, 0;
    mov.u32 %r11, 0;
    {instruction} // BUG
    cp.async.wait_all;
""",
        shared=64,
        variables=".local .align 16 .b8 place[32];",
    )
    memory = WORDS.copy()
    with Buffer(memory, align=128) as buffer:
        error = the_error(launch(kernel, buffer))
    assert (error.kind, error.line) == ("misaligned", kernel.line())
    assert space in error.message
    np.testing.assert_array_equal(memory, WORDS)


def test_buffers_begin_at_the_least_aligned_address_that_is_asked_for():
    kernel = Handwritten("ld.global.v4.u32 {%r0, %r1, %r2, %r3}, [%a0]; // BUG")
    for align in (16, 32, 256, 4096):
        with Buffer(WORDS.copy(), align=align) as buffer:
            assert buffer.address % align == 0 and buffer.address % (2 * align) != 0
            assert kernel.launch(buffer).ok
    for align in (1, 2, 4, 8):
        with Buffer(WORDS.copy(), align=align) as buffer:
            assert buffer.address % align == 0 and buffer.address % (2 * align) != 0
            error = the_error(launch(kernel, buffer, block=1))
            assert error.kind == "misaligned"
            assert "is not a multiple of 16" in error.message


def test_a_freed_buffer():
    kernel = Handwritten("ld.global.u32 %r0, [%a0 + 8]; // READ\nst.global.u32 [%a0 + 12], %r0; // WRITE")
    memory = WORDS.copy()
    buffer = Buffer(memory)
    address = buffer.address
    assert kernel.launch(buffer, block=1).ok
    memory[:] = WORDS
    buffer.free()
    read, write = launch(kernel, address, block=1).errors
    assert (read.kind, read.line, read.address) == ("freed", kernel.line("READ"), address + 8)
    assert (write.kind, write.line) == ("freed", kernel.line("WRITE"))
    assert "global read of 4 bytes at offset 8 of a freed buffer of 256 bytes" in read.message
    np.testing.assert_array_equal(memory, WORDS)


def test_an_address_is_not_given_again_soon():
    addresses = []
    for _ in range(50):
        buffer = Buffer(WORDS.copy())
        addresses.append(buffer.address)
        buffer.free()
    assert len(set(addresses)) == 50


def test_all_addresses_can_be_used_again_and_again():
    for _ in range(2500):
        Buffer(WORDS).free()
    buffers = [Buffer(WORDS) for _ in range(900)]
    assert len({buffer.address for buffer in buffers}) == 900
    for buffer in buffers:
        buffer.free()


def test_atomics_on_local_memory_and_matrices_elsewhere_than_in_shared_are_illegal():
    kernel = Handwritten(
        """
    cvta.local.u64 %d0, place;
    atom.add.u32 %r0, [%d0], 1; // ATOMIC
    ldmatrix.sync.aligned.m8n8.x1.b16 {%r1}, [%a0]; // MATRIX
""",
        variables=".local .align 4 .b8 place[4];",
    )
    atomic, matrix = launch(kernel, WORDS).errors
    assert (atomic.kind, atomic.line) == ("illegal", kernel.line("ATOMIC"))
    assert (matrix.kind, matrix.line, matrix.count) == ("illegal", kernel.line("MATRIX"), 8)


@pytest.mark.parametrize("checks", ["none", {"race"}, {"init"}])
def test_a_bad_access_is_not_performed_whatever_is_checked(checks):
    """The host's memory around the buffer stays as it is."""
    kernel = Handwritten(
        """
    mad.wide.u32 %d0, %lane, 16, %a0;
    mov.u32 %r0, 0xffffffff;
    st.global.v4.u32 [%d0 + -512], {%r0, %r0, %r0, %r0};
    st.global.u32 [%a0 + 64], %r0;
    red.global.add.u32 [%a0 + 64], 1;
    atom.global.exch.b32 %r1, [%a0 + -4], 1;
    st.shared.u32 [%s + 64], %r0;
    st.shared.u32 [%s + 0x7fffff00], %r0;
    ld.shared.v4.u32 {%r2, %r3, %r4, %r5}, [%s + 0x7fffff00];
    cp.async.cg.shared.global [%s + 64], [%a0 + 64], 16;
    cp.async.wait_all;
    st.global.u32 [1234567], %r0;
    cvta.local.u64 %d1, place;
    st.u32 [%d1 + 0x7fffff00], %r0;
    ld.u32 %r6, [%d1 + -4];
""",
        shared=64,
        variables=".local .align 4 .b8 place[4];",
    )
    storage = np.full(16 * 3, 0xABABABAB, np.uint32)
    assert kernel.launch(storage[16:32], checks=checks).ok
    np.testing.assert_array_equal(storage, 0xABABABAB)
