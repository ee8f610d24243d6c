"""cp.async: sizes, zeros, groups of each thread. test_asynccheck.py has the check."""

from __future__ import annotations

import numpy as np
import pytest
from handwritten import Handwritten, assert_silent, random_bytes


@pytest.mark.parametrize(("cache", "size"), [("ca", 4), ("ca", 8), ("ca", 16), ("cg", 16)])
@pytest.mark.parametrize("third", ["", ", %r0", ", %p0", ", 3"])
def test_async_copies_fill_up_with_zeros(cache, size, third):
    kernel = Handwritten(
        f"""
    mad.wide.u32 %d0, %lane, {size}, %a0;
    mad.lo.u32 %r1, %lane, {size}, %s;
    rem.u32 %r0, %lane, {size + 1};
    setp.gt.u32 %p0, %lane, 20;
    cp.async.{cache}.shared.global [%r1], [%d0], {size}{third};
    cp.async.commit_group;
    cp.async.wait_group 0;
    bar.sync 0;
    mad.wide.u32 %d1, %lane, {size}, %a1;
    mov.u32 %r2, 0;
COPY:
    ld.shared.u32 %r3, [%r1];
    st.global.u32 [%d1], %r3;
    add.u32 %r1, %r1, 4;
    add.u64 %d1, %d1, 4;
    add.u32 %r2, %r2, 4;
    setp.lt.u32 %p1, %r2, {size};
    @%p1 bra COPY;
""",
        pointers=2,
        shared=512,
    )
    given, got = random_bytes(32 * size).reshape(32, size), np.zeros((32, size), np.uint8)
    # Of a source that is not read at all, not even the address has to be good: only what is copied is given.
    lanes = np.arange(32)
    used = {
        "": np.full(32, size),
        ", %r0": lanes % (size + 1),
        ", %p0": np.where(lanes > 20, 0, size),
        ", 3": np.full(32, 3),
    }[third]
    length = max(lane * size + used[lane] for lane in range(32))
    assert_silent(kernel, given.ravel()[:length].copy(), got)
    np.testing.assert_array_equal(got, np.where(np.arange(size) < used[:, None], given, 0))


def test_async_groups_are_counted_by_each_thread():
    """Odd lanes commit a group more than even ones: wait_group 1 completes different copies in them."""
    kernel = Handwritten(
        """
    mad.lo.u32 %r0, %lane, 4, %s;
    st.shared.u32 [%r0], 7;
    st.shared.u32 [%r0 + 128], 7;
    bar.sync 0;
    mad.wide.u32 %d0, %lane, 4, %a0;
    and.b32 %r1, %lane, 1;
    setp.eq.u32 %p0, %r1, 1;
    cp.async.ca.shared.global [%r0], [%d0], 4;
    cp.async.commit_group;
    @%p0 cp.async.ca.shared.global [%r0 + 128], [%d0 + 128], 4;
    @%p0 cp.async.commit_group;
    cp.async.wait_group 1;
    ld.shared.u32 %r2, [%r0];
    ld.shared.u32 %r3, [%r0 + 128];
    mad.wide.u32 %d1, %lane, 4, %a1;
    st.global.u32 [%d1], %r2;
    st.global.u32 [%d1 + 128], %r3;
""",
        pointers=2,
        shared=256,
    )
    given, got = np.arange(1000, 1064, dtype=np.uint32), np.zeros(64, np.uint32)
    report = kernel.launch(given, got, checks={"memory"})
    assert report.ok, str(report)
    odd = np.arange(32) % 2 == 1
    np.testing.assert_array_equal(got[:32], np.where(odd, given[:32], 7))
    np.testing.assert_array_equal(got[32:], 7)


def test_async_copies_take_their_bytes_when_issued_and_bring_them_when_waited_for():
    kernel = Handwritten(
        """
    st.shared.u32 [%s], 1;
    cp.async.ca.shared.global [%s], [%a0], 4;
    st.global.u32 [%a0], 3;
    ld.shared.u32 %r0, [%s];
    st.global.u32 [%a1], %r0;
    cp.async.wait_all;
    ld.shared.u32 %r1, [%s];
    st.global.u32 [%a1 + 4], %r1;
    cp.async.ca.shared.global [%s], [%a0], 4;
""",
        pointers=2,
        shared=4,
    )
    got = np.zeros(2, np.uint32)
    assert kernel.launch(np.array([2], np.uint32), got, block=1, checks={"memory"}).ok
    np.testing.assert_array_equal(got, [1, 2])
