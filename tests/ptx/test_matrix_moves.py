"""ldmatrix, stmatrix and movmatrix, against the layout written out in numpy."""

from __future__ import annotations

import numpy as np
import pytest
from handwritten import Handwritten, assert_silent, braced, random_bytes


def fragments(matrix: np.ndarray) -> np.ndarray:
    """Row g = lane / 4, columns 2t and 2t + 1 with t = lane % 4 (PTX ISA, "ldmatrix"): a word a lane."""
    pairs = matrix.reshape(8, 4, 2).astype(np.uint32)
    return (pairs[..., 0] | pairs[..., 1] << 16).ravel()


@pytest.mark.parametrize("generic", [False, True])
@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("order", ["x before m8n8", "m8n8 before x"])
def test_ldmatrix(count, trans, generic, order):
    """The rows lie in a scrambled order in shared memory; the lanes give their addresses."""
    modifiers = f"x{count}.m8n8" if order.startswith("x") else f"m8n8.x{count}"
    modifiers += (".trans" if trans else "") + ("" if generic else ".shared")
    registers = [f"%r{i}" for i in range(count)]
    stores = "".join(f"st.global.u32 [%d1 + {128 * i}], %r{i};\n" for i in range(count))
    kernel = Handwritten(
        f"""
    mad.wide.u32 %d0, %lane, 16, %a0;
    ld.global.v4.u32 {{%r10, %r11, %r12, %r13}}, [%d0];
    mad.lo.u32 %r20, %lane, 16, %s;
    st.shared.v4.u32 [%r20], {{%r10, %r11, %r12, %r13}};
    bar.sync 0;
    mad.lo.u32 %r21, %lane, 7, 3;
    and.b32 %r21, %r21, 31;
    shl.b32 %r21, %r21, 4;
    cvta.shared.u64 %d2, buffer;
    cvt.u64.u32 %d3, %r21;
    add.u64 %d3, %d3, %d2;
    add.u32 %r21, %r21, %s;
    ldmatrix.sync.aligned.{modifiers}.b16 {braced(registers)}, [{"%d3" if generic else "%r21"}];
    mad.wide.u32 %d1, %lane, 4, %a1;
    {stores}
""",
        pointers=2,
        shared=512,
    )
    rows, got = random_bytes(512).view(np.uint16).reshape(32, 8), np.zeros((count, 32), np.uint32)
    assert_silent(kernel, rows, got)
    for i in range(count):
        matrix = rows[(np.arange(8 * i, 8 * i + 8) * 7 + 3) % 32]
        np.testing.assert_array_equal(got[i], fragments(matrix.T if trans else matrix))


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix(count, trans):
    registers = [f"%r{i}" for i in range(count)]
    loads = "".join(f"ld.global.u32 %r{i}, [%d0 + {128 * i}];\n" for i in range(count))
    kernel = Handwritten(
        f"""
    mad.wide.u32 %d0, %lane, 4, %a0;
    {loads}
    mad.lo.u32 %r21, %lane, 7, 3;
    and.b32 %r21, %r21, 31;
    mad.lo.u32 %r21, %r21, 16, %s;
    stmatrix.sync.aligned.m8n8.x{count}{".trans" if trans else ""}.shared.b16 [%r21], {braced(registers)};
    bar.sync 0;
    setp.lt.u32 %p0, %lane, {8 * count};
    mad.wide.u32 %d1, %lane, 16, %a1;
    @%p0 ld.shared.v4.u32 {{%r10, %r11, %r12, %r13}}, [%r21];
    @%p0 st.global.v4.u32 [%d1], {{%r10, %r11, %r12, %r13}};
""",
        pointers=2,
        shared=512,
    )
    matrices, got = random_bytes(count * 128).view(np.uint16).reshape(count, 8, 8), np.zeros((count, 8, 8), np.uint16)
    given = np.stack([fragments(matrix.T if trans else matrix) for matrix in matrices])
    assert_silent(kernel, given, got)
    np.testing.assert_array_equal(got, matrices)


def test_movmatrix_transposes():
    kernel = Handwritten(
        """
    mad.wide.u32 %d0, %lane, 4, %a0;
    ld.global.u32 %r0, [%d0];
    movmatrix.sync.aligned.m8n8.trans.b16 %r0, %r0;
    st.global.u32 [%d0], %r0;
"""
    )
    matrix = random_bytes(128).view(np.uint16).reshape(8, 8)
    words = fragments(matrix)
    assert kernel.launch(words).ok
    np.testing.assert_array_equal(words, fragments(matrix.T))
