"""Counters: waves of shared memory and sectors of global memory, against numbers counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
from handwritten import Handwritten

WORDS = np.zeros(4096, np.uint32)


def counted(kernel: Handwritten, *args, mark: str = "HERE", **options):
    report = kernel.launch(*args, checks={"memory"}, **options)
    assert report.ok, str(report)
    line = kernel.line(mark)
    return next(one for one in report.counters.per_instruction if one.line == line)


@pytest.mark.parametrize(
    ("width", "address", "waves", "ideal"),
    [
        # %r0 is the lane
        ("u32", "shl.b32 %r1, %r0, 2;", 1, 1),  # lane i in bank i
        ("u32", "xor.b32 %r1, %r0, 13; shl.b32 %r1, %r1, 2;", 1, 1),  # permuted
        ("u32", "shl.b32 %r1, %r0, 3;", 2, 1),  # every second word: two lanes a bank
        ("u32", "shl.b32 %r1, %r0, 4;", 4, 1),
        ("u32", "shl.b32 %r1, %r0, 7;", 32, 1),  # a column of a 32 x 32 matrix
        ("u32", "mul.lo.u32 %r1, %r0, 132;", 1, 1),  # the same with rows padded by a word
        ("u32", "mov.u32 %r1, 64;", 1, 1),  # broadcast
        ("u32", "and.b32 %r1, %r0, 1; shl.b32 %r1, %r1, 7;", 2, 1),  # two words of one bank, shared by many
        ("u32", "and.b32 %r1, %r0, 24; shl.b32 %r1, %r1, 4;", 4, 1),  # four words of one bank
        ("u8", "mov.u32 %r1, %r0;", 1, 1),  # four lanes a word
        ("u16", "shl.b32 %r1, %r0, 1;", 1, 1),
        ("u8", "shl.b32 %r1, %r0, 7;", 32, 1),
        ("u64", "shl.b32 %r1, %r0, 3;", 2, 2),  # two half-warps
        ("u64", "shl.b32 %r1, %r0, 4;", 4, 2),
        ("u64", "mov.u32 %r1, 0;", 2, 1),
        ("v2.u32", "shl.b32 %r1, %r0, 3;", 2, 2),
        ("v4.u32", "shl.b32 %r1, %r0, 4;", 4, 4),  # four quarter-warps
        ("v4.u32", "shl.b32 %r1, %r0, 5;", 8, 4),
        ("v4.u32", "shl.b32 %r1, %r0, 7;", 32, 4),  # rows of 128 bytes, as a tile of 64 halves without a swizzle
        ("v4.u32", "mul.lo.u32 %r1, %r0, 144;", 4, 4),  # with 16 bytes of padding
        ("v4.u32", "mov.u32 %r1, 16;", 4, 1),
    ],
)
def test_waves_of_shared_memory(width, address, waves, ideal):
    registers = {"u8": "%h1", "u16": "%h1", "u64": "%d1", "v2.u32": "{%r4, %r5}", "v4.u32": "{%r4, %r5, %r6, %r7}"}
    register = registers.get(width, "%r4")
    size = {"u8": 1, "u16": 2, "u32": 4, "u64": 8, "v2.u32": 8, "v4.u32": 16}[width]
    for access in (f"ld.shared.{width} {register}, [%r1]", f"st.shared.{width} [%r1], {register}"):
        kernel = Handwritten(
            f"mov.u32 %r0, %lane; {address} add.u32 %r1, %r1, %s;\n{access}; // HERE\n", shared=32 * 160
        )
        one = counted(kernel, WORDS)
        assert (one.shared_waves, one.shared_ideal, one.bytes) == (waves, ideal, 32 * size)
        assert (one.global_sectors, one.global_ideal) == (0, 0)
        # Each warp and block adds the same.
        many = counted(kernel, WORDS, grid=3, block=64)
        assert (many.shared_waves, many.shared_ideal, many.warps, many.lanes) == (6 * waves, 6 * ideal, 6, 192)


def test_waves_of_some_of_the_lanes():
    kernel = Handwritten(
        """
    mad.lo.u32 %r0, %lane, 128, %s;
    setp.lt.u32 %p0, %lane, 5;
    @%p0 ld.shared.u32 %r1, [%r0]; // FIVE
    mad.lo.u32 %r2, %lane, 16, %s;
    setp.ge.u32 %p1, %lane, 24;
    @%p1 ld.shared.v4.u32 {%r4, %r5, %r6, %r7}, [%r2]; // EIGHT
""",
        shared=4096,
    )
    five, eight = counted(kernel, WORDS, mark="FIVE"), counted(kernel, WORDS, mark="EIGHT")
    assert (five.shared_waves, five.shared_ideal, five.lanes) == (5, 1, 5)
    assert (eight.shared_waves, eight.shared_ideal, eight.lanes) == (1, 1, 8)


@pytest.mark.parametrize(
    ("count", "pitch", "waves", "ideal"), [(1, 16, 1, 1), (2, 16, 2, 2), (4, 16, 4, 4), (4, 128, 32, 4), (4, 80, 4, 4)]
)
@pytest.mark.parametrize("loads", [True, False])
def test_waves_of_matrices(count, pitch, waves, ideal, loads):
    registers = "{" + ", ".join(f"%r{4 + i}" for i in range(count)) + "}"
    operands = f"{registers}, [%r0]" if loads else f"[%r0], {registers}"
    kernel = Handwritten(
        f"mad.lo.u32 %r0, %lane, {pitch}, %s;\n"
        f"{'ldmatrix' if loads else 'stmatrix'}.sync.aligned.m8n8.x{count}.shared.b16 {operands}; // HERE\n",
        shared=4096,
    )
    one = counted(kernel, WORDS)
    assert (one.shared_waves, one.shared_ideal, one.bytes) == (waves, ideal, 128 * count)


@pytest.mark.parametrize(
    ("width", "address", "sectors", "ideal"),
    [
        ("u32", "shl.b32 %r1, %r0, 2;", 4, 4),  # 128 contiguous bytes
        ("u32", "xor.b32 %r1, %r0, 21; shl.b32 %r1, %r1, 2;", 4, 4),
        ("u32", "shl.b32 %r1, %r0, 2; add.u32 %r1, %r1, 4;", 5, 4),  # from a misaligned offset
        ("u32", "shl.b32 %r1, %r0, 2; add.u32 %r1, %r1, 32;", 4, 4),
        ("u32", "shl.b32 %r1, %r0, 3;", 8, 4),
        ("u32", "shl.b32 %r1, %r0, 5;", 32, 4),  # a sector a lane
        ("u32", "shl.b32 %r1, %r0, 7;", 32, 4),
        ("u32", "mov.u32 %r1, 100;", 1, 1),  # the same word
        ("u32", "sub.u32 %r1, 31, %r0; shl.b32 %r1, %r1, 2;", 4, 4),  # backwards
        ("u32", "and.b32 %r1, %r0, 7; shl.b32 %r1, %r1, 2;", 1, 1),  # one sector, four times
        ("u32", "and.b32 %r1, %r0, 1; shl.b32 %r1, %r1, 8;", 2, 1),
        ("u8", "mov.u32 %r1, %r0;", 1, 1),
        ("u8", "add.u32 %r1, %r0, 1;", 2, 1),
        ("u16", "shl.b32 %r1, %r0, 1;", 2, 2),
        ("u64", "shl.b32 %r1, %r0, 3;", 8, 8),
        ("v4.u32", "shl.b32 %r1, %r0, 4;", 16, 16),
        ("v4.u32", "shl.b32 %r1, %r0, 4; add.u32 %r1, %r1, 16;", 17, 16),
        (
            "v4.u32",
            "shr.u32 %r1, %r0, 3; mul.lo.u32 %r1, %r1, 384; and.b32 %r2, %r0, 7; mad.lo.u32 %r1, %r2, 16, %r1;",
            16,
            16,
        ),
    ],
)
@pytest.mark.parametrize("align", [16, 256])
def test_sectors_of_global_memory(width, address, sectors, ideal, align):
    """The same wherever the buffer lies: they are counted from its beginning."""
    registers = {"u8": "%h1", "u16": "%h1", "u64": "%d1", "v4.u32": "{%r4, %r5, %r6, %r7}"}
    register = registers.get(width, "%r4")
    for access in (f"ld.global.{width} {register}, [%d0]", f"st.global.{width} [%d0], {register}"):
        kernel = Handwritten(
            f"mov.u32 %r0, %lane; {address} cvt.u64.u32 %d0, %r1; add.u64 %d0, %d0, %a0;\n{access}; // HERE\n"
        )
        one = counted(kernel, WORDS.copy(), align=align)
        assert (one.global_sectors, one.global_ideal) == (sectors, ideal)
        assert (one.shared_waves, one.shared_ideal) == (0, 0)


def test_sectors_of_an_address_that_is_less_aligned_than_the_buffer_would_be():
    """Offset 2 of a buffer at an address = 2 mod 4: the access is aligned, its bytes lie in two sectors."""
    kernel = Handwritten("ld.global.u32 %r0, [%a0 + 30]; // HERE")
    assert counted(kernel, WORDS, align=2, block=1).global_sectors == 2


def test_atomics_and_copies():
    kernel = Handwritten(
        """
    mad.wide.u32 %d0, %lane, 4, %a0;
    mad.lo.u32 %r0, %lane, 4, %s;
    mad.lo.u32 %r1, %lane, 128, %s;
    red.global.add.u32 [%d0], 1; // GLOBAL
    st.shared.u32 [%r0], 0;
    red.shared.add.u32 [%r0], 1; // SHARED
    mad.wide.u32 %d1, %lane, 16, %a0;
    mad.lo.u32 %r2, %lane, 16, %s;
    cp.async.cg.shared.global [%r2], [%d1], 16; // COPY
    cp.async.cg.shared.global [%r1], [%d1], 16, 0; // ZEROS
    cp.async.wait_all;
""",
        shared=4096,
    )
    one = counted(kernel, WORDS.copy(), mark="GLOBAL")
    assert (one.global_sectors, one.global_ideal, one.bytes, one.space) == (4, 4, 128, "global")
    one = counted(kernel, WORDS.copy(), mark="SHARED")
    assert (one.shared_waves, one.shared_ideal, one.bytes, one.space) == (1, 1, 128, "shared")
    one = counted(kernel, WORDS.copy(), mark="COPY")
    assert (one.shared_waves, one.shared_ideal, one.global_sectors, one.global_ideal) == (4, 4, 16, 16)
    one = counted(kernel, WORDS.copy(), mark="ZEROS")
    assert (one.shared_waves, one.shared_ideal, one.global_sectors, one.global_ideal) == (32, 4, 0, 0)


def test_totals_and_bytes_by_space():
    kernel = Handwritten(
        """
    mad.wide.u32 %d0, %lane, 4, %a0;
    mad.lo.u32 %r0, %lane, 8, %s;
    ld.global.u32 %r1, [%d0];
    st.shared.u32 [%r0], %r1;
    ld.shared.u32 %r2, [%r0];
    st.local.u32 [place], %r2;
    st.global.u32 [%d0 + 128], %r2;
""",
        shared=256,
        variables=".local .align 4 .b8 place[4];",
    )
    counters = kernel.launch(WORDS.copy(), grid=2).counters
    assert (counters.shared_waves, counters.shared_ideal) == (2 * 4, 2 * 2)
    assert (counters.global_sectors, counters.global_ideal) == (2 * 8, 2 * 8)
    assert counters.bytes["global"] == 2 * 256 and counters.bytes["shared"] == 2 * 256
    assert counters.bytes["local"] == 2 * 128


def test_without_counters_nothing_is_counted():
    kernel = Handwritten("mad.wide.u32 %d0, %lane, 4, %a0; ld.global.u32 %r1, [%d0]; st.shared.u32 [%s], 1;", shared=4)
    counters = kernel.launch(WORDS, counters=False).counters
    assert (counters.shared_waves, counters.global_sectors, sum(counters.bytes.values())) == (0, 0, 0)
