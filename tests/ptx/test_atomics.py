"""atom and red, against the same operations in Python and numpy."""

from __future__ import annotations

import numpy as np
import pytest
from handwritten import DTYPES, REGISTERS, RNG, Handwritten, random_bytes, vector


def wrapped(value: int, dtype: type) -> int:
    bits = np.dtype(dtype).itemsize * 8
    value &= (1 << bits) - 1
    return value - (1 << bits) if np.issubdtype(dtype, np.signedinteger) and value >> (bits - 1) else value


INTEGER_ATOMICS = {
    "add": (lambda old, b: old + b, ["u32", "s32", "u64", "s64"]),
    "min": (min, ["u32", "s32", "u64", "s64"]),
    "max": (max, ["u32", "s32", "u64", "s64"]),
    "inc": (lambda old, b: 0 if old >= b else old + 1, ["u32"]),
    "dec": (lambda old, b: b if old == 0 or old > b else old - 1, ["u32"]),
    "and": (lambda old, b: old & b, ["b32", "b64"]),
    "or": (lambda old, b: old | b, ["b32", "b64"]),
    "xor": (lambda old, b: old ^ b, ["b32", "b64"]),
    "exch": (lambda old, b: b, ["b32", "b64"]),
}


@pytest.mark.parametrize("space", ["global", "shared", "generic"])
@pytest.mark.parametrize(("op", "name"), [(op, name) for op, (_, names) in INTEGER_ATOMICS.items() for name in names])
def test_integer_atomics_return_the_old_value_lane_after_lane(op, name, space):
    dtype = DTYPES[name]
    size = np.dtype(dtype).itemsize
    register = REGISTERS[size * 8]
    body = f"""
    mad.wide.u32 %d40, %lane, {size}, %a0;
    mad.wide.u32 %d41, %lane, {size}, %a1;
    ld.global.b{size * 8} {register}0, [%d40];
    ld.global.b{size * 8} {register}1, [%a2];
    st.shared.b{size * 8} [%s], {register}1;
    cvta.shared.u64 %d42, buffer;
    bar.warp.sync 0xffffffff;
"""
    place = {"global": "global.", "shared": "shared.", "generic": ""}[space]
    address = {"global": "%a2", "shared": "%s", "generic": "%d42"}[space]
    body += f"    atom.{place}{op}.{name} {register}2, [{address}], {register}0;\n"
    if op != "exch":
        body += f"    red.relaxed.gpu.{place}{op}.{name} [{address}], {register}0;\n"
    body += f"    st.global.b{size * 8} [%d41], {register}2;\n    bar.warp.sync 0xffffffff;\n"
    if space != "global":
        body += f"    ld.shared.b{size * 8} {register}3, [%s];\n    setp.eq.u32 %p0, %lane, 0;\n"
        body += f"    @%p0 st.global.b{size * 8} [%a2], {register}3;\n"
    kernel = Handwritten(body, pointers=3, shared=size)
    if op in ("inc", "dec"):
        operands = RNG.integers(0, 6, 32).astype(dtype)
        start = 3
    else:
        operands = random_bytes(32 * size).view(dtype)
        start = int(random_bytes(size).view(dtype)[0])
    old, memory = np.zeros(32, dtype), np.array([start], dtype)
    report = kernel.launch(operands, old, memory)
    assert report.ok, str(report)
    apply = INTEGER_ATOMICS[op][0]
    value = start
    for lane in range(32):
        assert old[lane] == value, lane
        value = wrapped(apply(value, int(operands[lane])), dtype)
    for lane in range(32) if op != "exch" else ():
        value = wrapped(apply(value, int(operands[lane])), dtype)
    assert memory[0] == value


@pytest.mark.parametrize("name", ["b16", "b32", "b64"])
def test_compare_and_swap(name):
    dtype = DTYPES[name]
    size = np.dtype(dtype).itemsize
    register = REGISTERS[size * 8]
    kernel = Handwritten(
        f"""
    mad.wide.u32 %d40, %lane, {size}, %a0;
    mad.wide.u32 %d41, %lane, {size}, %a1;
    ld.global.{name} {register}1, [%d40];
    ld.global.{name} {register}2, [%d40 + {32 * size}];
    atom.global.cas.{name} {register}0, [%a2 + {size}], {register}1, {register}2;
    st.global.{name} [%d41], {register}0;
""",
        pointers=3,
    )
    # A chain: lane l swaps where the lanes before it have got to l, which they miss at every fifth.
    expected = np.arange(32, dtype=dtype)
    new = (np.arange(32) + 1 + (np.arange(32) % 5 == 4)).astype(dtype)
    old, memory = np.zeros(32, dtype), np.array([99, 0, 99], dtype)
    assert kernel.launch(np.concatenate([expected, new]), old, memory).ok
    value = 0
    for lane in range(32):
        assert old[lane] == value
        value = int(new[lane]) if value == expected[lane] else value
    np.testing.assert_array_equal(memory, [99, value, 99])


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """Rounds to nearest, ties to even; for finite values."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def bf16_values(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("form", ["f32", "f64", "noftz.f16", "noftz.bf16", "noftz.f16x2", "noftz.bf16x2"])
def test_float_atomics_add_lane_after_lane(form, space):
    name = form.split(".")[-1]
    kind, elements = (name.removesuffix("x2"), 2) if name.endswith("x2") else (name, 1)
    item = {"f32": 4, "f64": 8, "f16": 2, "bf16": 2}[kind]
    size = item * elements
    register = {"f32": "%f", "f64": "%g"}.get(kind, REGISTERS[size * 8])
    bits = f"b{size * 8}"
    address = "%a2" if space == "global" else "%s"
    kernel = Handwritten(
        f"""
    mad.wide.u32 %d40, %lane, {size}, %a0;
    mad.wide.u32 %d41, %lane, {size}, %a1;
    ld.global.{bits} {register}0, [%d40];
    ld.global.{bits} {register}1, [%a2];
    st.shared.{bits} [%s], {register}1;
    bar.warp.sync 0xffffffff;
    atom.{space}.add.{form} {register}2, [{address}], {register}0;
    st.global.{bits} [%d41], {register}2;
    red.{space}.add.{form} [{address}], {register}0;
    bar.warp.sync 0xffffffff;
    ld.shared.{bits} {register}3, [%s];
    setp.eq.u32 %p0, %lane, 0;
    {"@%p0 st.global." + bits + " [%a2], " + register + "3;" if space == "shared" else ""}
""",
        pointers=3,
        shared=size,
    )
    values = RNG.standard_normal((32, elements))
    storage = np.uint16 if kind == "bf16" else {2: np.float16, 4: np.float32, 8: np.float64}[item]
    to_bits = bf16_bits if kind == "bf16" else lambda x: x.astype(storage)
    to_values = bf16_values if kind == "bf16" else lambda x: x
    operands, old = to_bits(values), np.zeros((32, elements), storage)
    memory = to_bits(np.array([[1.5] * elements]))
    report = kernel.launch(operands, old, memory)
    assert report.ok, str(report)
    value = to_bits(np.array([1.5] * elements))
    for lane in range(32):
        np.testing.assert_array_equal(old[lane], value)
        value = to_bits(to_values(value) + to_values(operands[lane]))
    for lane in range(32):  # red
        value = to_bits(to_values(value) + to_values(operands[lane]))
    np.testing.assert_array_equal(memory[0], value)


def test_f32_atomics_flush_subnormals_in_global_memory_only():
    kernel = Handwritten(
        """
    ld.global.u32 %r0, [%a0];
    ld.global.f32 %f0, [%a0 + 4];
    st.shared.u32 [%s], %r0;
    atom.shared.add.f32 %f1, [%s], %f0;
    atom.global.add.f32 %f1, [%a0], %f0;
    ld.shared.u32 %r1, [%s];
    st.global.u32 [%a0 + 8], %r1;
    atom.global.add.f32 %f2, [%a0 + 12], 0f7FC12345;
""",
        shared=4,
    )
    memory = np.array([0x00000003, 0x80000001, 0, 0x3F800000], np.uint32)
    assert kernel.launch(memory, block=1).ok
    np.testing.assert_array_equal(memory, [0x00000000, 0x80000001, 0x00000002, 0x7FFFFFFF])


@pytest.mark.parametrize("form", ["v2.f32", "v4.f32", "v2.f16", "v4.f16", "v8.f16", "v4.bf16", "v2.f16x2", "v4.bf16x2"])
def test_vector_atomics(form):
    count, name = int(form[1]), form[3:]
    half = name != "f32"
    kind, elements = (name.removesuffix("x2"), count * 2) if name.endswith("x2") else (name, count)
    element = {"f32": "%f", "f16": "%h", "bf16": "%h"}.get(name, "%r")
    first, second = (vector([f"{element}{k * 8 + i}" for i in range(count)]) for k in (0, 1))
    bits = 32 if element != "%h" else 16
    loads = "".join(f"ld.global.b{bits} {element}{i}, [%d40 + {i * bits // 8}];\n" for i in range(count))
    stores = "".join(f"st.global.b{bits} [%d41 + {i * bits // 8}], {element}{8 + i};\n" for i in range(count))
    step = bits // 8 * count
    noftz = ".noftz" if half else ""
    kernel = Handwritten(
        f"""
    mad.wide.u32 %d40, %lane, {step}, %a0;
    mad.wide.u32 %d41, %lane, {step}, %a1;
    {loads}
    atom.global.add{noftz}.{form} {second}, [%a2], {first};
    red.global.add{noftz}.{form} [%a2], {first};
    {stores}
""",
        pointers=3,
    )
    storage = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16}[kind]
    whole = RNG.integers(-3, 4, (32, elements))  # small integers: sums are exact in any order
    to_bits = bf16_bits if kind == "bf16" else lambda x: x.astype(storage)
    old, memory = np.zeros((32, elements), storage), np.zeros((1, elements), storage)
    assert kernel.launch(to_bits(whole.astype(np.float32)), old, memory).ok
    before = np.concatenate([np.zeros((1, elements)), np.cumsum(whole, 0)[:-1]])
    values = bf16_values if kind == "bf16" else lambda x: x.astype(np.float64)
    np.testing.assert_array_equal(values(old), before)
    np.testing.assert_array_equal(values(memory)[0], 2 * whole.sum(0))


def test_global_atomics_of_blocks_in_parallel_threads_lose_nothing():
    kernel = Handwritten(
        """
    mad.lo.u32 %r0, %block, %threads, %tid;
    mad.wide.u32 %d0, %r0, 4, %a0;
    ld.global.u32 %r1, [%d0];
    and.b32 %r2, %r1, 15;
    mad.wide.u32 %d1, %r2, 4, %a1;
    red.global.add.u32 [%d1], 1;
    mad.wide.u32 %d2, %r2, 8, %a2;
    cvt.u64.u32 %d3, %r1;
    atom.global.add.u64 %d4, [%d2], %d3;
    cvt.rn.f32.u32 %f0, %r2;
    red.global.add.f32 [%d1 + 64], %f0;
    atom.global.max.u32 %r3, [%d1 + 128], %r1;
    mov.b16 %h0, 0x3c00;
    red.global.add.noftz.f16 [%a2 + 128], %h0;
    red.global.add.noftz.f16 [%a2 + 130], %h0;
""",
        pointers=3,
    )
    blocks, threads = 200, 96
    values = RNG.integers(0, 1 << 32, blocks * threads, dtype=np.uint32)
    for host_threads in (1, 2):
        small, wide = np.zeros(48, np.uint32), np.zeros(17, np.uint64)
        report = kernel.launch(values, small, wide, grid=blocks, block=threads, threads=host_threads)
        assert report.ok, str(report)
        counts = np.bincount(values & 15, minlength=16)
        np.testing.assert_array_equal(small[:16], counts)
        np.testing.assert_array_equal(small[16:32].view(np.float32), counts * np.arange(16))
        largest, sums = np.zeros(16, np.uint32), np.zeros(16, np.uint64)
        np.maximum.at(largest, values & 15, values)
        np.add.at(sums, values & 15, values.astype(np.uint64))
        np.testing.assert_array_equal(small[32:], largest)
        np.testing.assert_array_equal(wide[:16], sums)
        np.testing.assert_array_equal(wide[16:].view(np.float16)[:2], [2048.0, 2048.0])  # where f16 stops counting


def test_atomics_on_a_buffer_that_the_host_has_misaligned():
    storage = np.zeros(65, np.uint8)
    memory = storage[1:65]
    kernel = Handwritten("mad.wide.u32 %d0, %lane, 0, %a0; red.global.add.u32 [%d0 + 4], 1;")
    assert kernel.launch(memory, grid=50, block=64, threads=2).ok
    np.testing.assert_array_equal(memory.tobytes(), np.array([0, 50 * 64] + [0] * 14, np.uint32).tobytes())


def test_a_lock_within_a_warp_and_a_block_lets_one_in_at_a_time():
    kernel = Handwritten(
        """
    setp.ne.u32 %p0, %tid, 0;
    @%p0 bra START;
    st.shared.u32 [%s], 0;
    st.shared.u32 [%s + 4], 0;
START:
    bar.sync 0;
TRY:
    atom.shared.cas.b32 %r0, [%s], 0, 1;
    setp.ne.u32 %p1, %r0, 0;
    @%p1 bra TRY;
    fence.acq_rel.cta;
    ld.shared.u32 %r1, [%s + 4];
    add.u32 %r1, %r1, %tid;
    st.shared.u32 [%s + 4], %r1;
    fence.acq_rel.cta;
    atom.shared.exch.b32 %r2, [%s], 0;
    bar.sync 0;
    ld.shared.u32 %r3, [%s + 4];
    @!%p0 st.global.u32 [%a0], %r3;
""",
        shared=8,
    )
    for order in ({"order": "forward"}, {"order": "random", "seed": 1}):
        got = np.zeros(1, np.uint32)
        report = kernel.launch(got, block=40, **order)
        assert report.ok, str(report)
        assert got[0] == sum(range(40))
