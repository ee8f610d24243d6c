"""ld, st and the hints around them, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from handwritten import DTYPES, REGISTERS, Handwritten, assert_silent, random_bytes, vector

import sparse24.ptx
from sparse24.ptx import PtxError


@pytest.mark.parametrize(
    ("name", "count"),
    [(name, count) for name, dtype in DTYPES.items() for count in (1, 2, 4) if np.dtype(dtype).itemsize * count <= 16],
)
def test_load_and_store_carry_every_type_through_every_space(name, count):
    size = np.dtype(DTYPES[name]).itemsize * count
    registers = vector([f"{REGISTERS[size * 8 // count]}{i}" for i in range(count)])
    vec = f".v{count}" if count > 1 else ""
    kernel = Handwritten(
        f"""
    mul.lo.u32 %r40, %tid, {size};
    cvt.u64.u32 %d40, %r40;
    add.u64 %d41, %a0, %d40;
    add.u64 %d42, %a1, %d40;
    add.u32 %r41, %s, %r40;
    ld.global{vec}.{name} {registers}, [%d41];
    st.shared{vec}.{name} [%r41], {registers};
    ld.shared{vec}.{name} {registers}, [%r41];
    st.local{vec}.{name} [place + 16], {registers};
    ld.local{vec}.{name} {registers}, [place + 16];
    cvta.shared.u64 %d43, buffer;
    add.u64 %d43, %d43, %d40;
    st{vec}.{name} [%d43], {registers};
    ld{vec}.{name} {registers}, [%d43];
    cvta.local.u64 %d44, place;
    st{vec}.{name} [%d44], {registers};
    ld{vec}.{name} {registers}, [%d44];
    st{vec}.{name} [%d42], {registers};
""",
        pointers=2,
        shared=64 * 16,
        variables=".local .align 16 .b8 place[32];",
    )
    given, got = random_bytes(64 * size), np.zeros(64 * size, np.uint8)
    assert_silent(kernel, given, got, block=64)
    np.testing.assert_array_equal(got, given)


@pytest.mark.parametrize("form", ["v8.b32", "v8.f32", "v4.b64", "v4.u64"])
def test_vectors_of_32_bytes_and_sinks_in_them(form):
    count = int(form[1])
    register = "%r" if form.endswith("32") else "%d"
    all_of_it = vector([f"{register}{i}" for i in range(count)])
    but_one = vector([f"{register}{i}" if i != 1 else "_" for i in range(count)])
    kernel = Handwritten(
        f"""
    mul.wide.u32 %d40, %tid, 32;
    add.u64 %d41, %a0, %d40;
    add.u64 %d42, %a1, %d40;
    add.u64 %d43, %a2, %d40;
    ld.global.{form} {all_of_it}, [%d41];
    st.global.{form} [%d42], {all_of_it};
    ld.global.nc.{form} {but_one}, [%d41];
    st.global.L2::evict_last.{form} [%d43], {but_one};
""",
        pointers=3,
        target="sm_100",
    )
    given = random_bytes(32 * 32)
    whole, holes = np.full(32 * 32, 7, np.uint8), np.full(32 * 32, 7, np.uint8)
    assert_silent(kernel, given, whole, holes, align=32)
    np.testing.assert_array_equal(whole, given)
    size = 32 // count
    wanted = given.reshape(32, count, size).copy()
    wanted[:, 1] = 7
    np.testing.assert_array_equal(holes, wanted.ravel())


@pytest.mark.parametrize(
    ("load", "store", "register", "wanted"),
    [
        ("s8", "b32", "%r0", np.int32),
        ("u8", "b32", "%r0", np.uint32),
        ("s16", "b32", "%r0", np.int32),
        ("u16", "b32", "%r0", np.uint32),
        ("s8", "b64", "%d0", np.int64),
        ("u8", "b64", "%d0", np.uint64),
        ("s16", "b64", "%d0", np.int64),
        ("s32", "b64", "%d0", np.int64),
        ("u32", "b64", "%d0", np.uint64),
        ("b32", "b64", "%d0", np.uint64),
        ("s8", "b16", "%h0", np.int16),
        ("u8", "b16", "%h0", np.uint16),
    ],
)
def test_loads_into_wider_registers_extend(load, store, register, wanted):
    given = random_bytes(32 * np.dtype(DTYPES[load]).itemsize).view(DTYPES[load])
    given[:2] = [np.iinfo(given.dtype).min, np.iinfo(given.dtype).max]
    got = np.zeros(32, wanted)
    kernel = Handwritten(
        f"""
    mad.wide.u32 %d40, %tid, {given.itemsize}, %a0;
    mad.wide.u32 %d41, %tid, {got.itemsize}, %a1;
    ld.global.{load} {register}, [%d40];
    st.global.{store} [%d41], {register};
""",
        pointers=2,
    )
    assert_silent(kernel, given, got)
    np.testing.assert_array_equal(got, given.astype(wanted))


@pytest.mark.parametrize("name", ["u8", "s8", "u16", "b32"])
def test_stores_from_wider_registers_take_the_low_bits(name):
    given, got = random_bytes(32 * 8).view(np.uint64), np.zeros(32, DTYPES[name])
    kernel = Handwritten(
        f"""
    mad.wide.u32 %d40, %tid, 8, %a0;
    mad.wide.u32 %d41, %tid, {got.itemsize}, %a1;
    ld.global.b64 %d0, [%d40];
    st.global.{name} [%d41], %d0;
""",
        pointers=2,
    )
    assert_silent(kernel, given, got)
    np.testing.assert_array_equal(got, given.astype(np.dtype(f"u{got.itemsize}")).view(got.dtype))


def test_lanes_of_one_generic_instruction_may_be_in_four_spaces():
    kernel = Handwritten(
        """
    cvta.shared.u64 %d0, buffer;
    cvta.local.u64 %d1, place;
    cvta.param.u64 %d2, n0;
    st.shared.u32 [buffer], 100;
    st.local.u32 [place], 200;
    bar.warp.sync 0xffffffff;
    and.b32 %r0, %lane, 3;
    setp.eq.u32 %p0, %r0, 0;
    setp.eq.u32 %p1, %r0, 1;
    setp.eq.u32 %p2, %r0, 2;
    selp.u64 %d3, %d1, %d2, %p1;
    selp.u64 %d3, %d0, %d3, %p0;
    selp.u64 %d3, %a0, %d3, %p2;
    ld.u32 %r1, [%d3];
    mad.wide.u32 %d4, %lane, 4, %a1;
    st.u32 [%d4], %r1;
""",
        pointers=2,
        numbers=1,
        shared=4,
        variables=".local .align 4 .b8 place[4];",
    )
    got = np.zeros(32, np.uint32)
    assert_silent(kernel, np.array([300], np.uint32), got, 400)
    np.testing.assert_array_equal(got, np.tile([100, 200, 300, 400], 8))


def test_predicated_lanes_neither_load_nor_store():
    kernel = Handwritten(
        """
    mad.wide.u32 %d0, %lane, 4, %a0;
    mov.u32 %r0, 7;
    setp.lt.u32 %p0, %lane, 5;
    @%p0 ld.global.u32 %r0, [%d0];
    add.u32 %r0, %r0, 1;
    mad.wide.u32 %d1, %lane, 4, %a1;
    @!%p0 st.global.u32 [%d1], %r0;
    @%p0 st.global.u32 [%d1 + 128], %r0;
""",
        pointers=2,
    )
    got = np.zeros(64, np.uint32)
    assert_silent(kernel, np.arange(100, 105, dtype=np.uint32), got)  # lanes 5 and up would be out of bounds
    wanted = np.zeros(64, np.uint32)
    wanted[5:32], wanted[32:37] = 8, np.arange(101, 106)
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    "load",
    [
        *(f"ld.global.{cache}.u32" for cache in ("ca", "cg", "cs", "lu", "cv")),
        *(f"ld.{weak}global.u32" for weak in ("weak.", "volatile.", "relaxed.gpu.", "acquire.sys.", "relaxed.cta.")),
        "ld.global.relaxed.gpu.u32",
        "ld.mmio.relaxed.sys.global.u32",
        *(f"ld.global.nc.L1::{p}.u32" for p in ("evict_normal", "evict_unchanged", "evict_first", "no_allocate")),
        "ld.global.nc.L1::evict_last.L2::256B.u32",
        "ld.global.ca.L2::64B.u32",
        "ld.global.L2::evict_first.L2::128B.u32",
        "ldu.global.u32",
        "ld.u32",
        "ldu.u32",
        "ld.volatile.u32",
    ],
)
def test_hints_and_semantics_load_the_same(load):
    kernel = Handwritten(f"{load} %r0, [%a0]; add.u32 %r0, %r0, 1; st.global.u32 [%a1], %r0;", pointers=2)
    got = np.zeros(1, np.uint32)
    assert_silent(kernel, np.array([41], np.uint32), got, block=1)
    assert got[0] == 42


@pytest.mark.parametrize(
    "store",
    [
        *(f"st.global.{cache}.u32" for cache in ("wb", "cg", "cs", "wt")),
        *(f"st.{weak}global.u32" for weak in ("weak.", "volatile.", "relaxed.gpu.", "release.sys.", "release.cta.")),
        "st.global.L1::no_allocate.u32",
        "st.mmio.relaxed.sys.global.u32",
        "st.u32",
        "st.volatile.u32",
    ],
)
def test_hints_and_semantics_store_the_same(store):
    kernel = Handwritten(f"{store} [%a0 + 4], 42;")
    got = np.zeros(2, np.uint32)
    assert_silent(kernel, got, block=1)
    np.testing.assert_array_equal(got, [0, 42])


def test_cache_policies_are_taken_and_change_nothing():
    kernel = Handwritten(
        """
    createpolicy.fractional.L2::evict_last.b64 %d0, 0.25;
    createpolicy.fractional.L2::evict_first.L2::evict_unchanged.b64 %d1;
    createpolicy.range.global.L2::evict_last.L2::evict_first.b64 %d2, [%a0], 4, 8;
    createpolicy.cvt.L2.b64 %d3, %d1;
    ld.global.L2::cache_hint.v2.u32 {%r0, %r1}, [%a0], %d0;
    ld.global.nc.L1::evict_first.L2::cache_hint.L2::128B.u32 %r2, [%a0 + 8], %d1;
    st.global.L2::cache_hint.v2.u32 [%a1], {%r1, %r0}, %d2;
    st.global.L1::no_allocate.L2::cache_hint.u32 [%a1 + 8], %r2, %d3;
    cp.async.ca.shared.global.L2::cache_hint [%s], [%a0], 4, %d0;
    cp.async.cg.shared.global.L2::cache_hint.L2::256B [%s + 16], [%a0], 16, 8, %d0;
    cp.async.wait_all;
    atom.global.add.L2::cache_hint.u32 %r3, [%a1 + 12], 5, %d0;
    red.global.add.L2::cache_hint.u32 [%a1 + 12], 6, %d0;
    ld.shared.v2.u32 {%r4, %r5}, [%s + 16];
    st.global.v2.u32 [%a1 + 16], {%r4, %r5};
    prefetch.global.L1 [%a0];
    prefetch.global.L2::evict_last [%a0];
    prefetch.L2 [%a0 + 1000000];
    prefetchu.L1 [%a0];
    applypriority.global.L2::evict_normal [%a0], 128;
""",
        pointers=2,
        shared=32,
    )
    got = np.zeros(6, np.uint32)
    assert_silent(kernel, np.array([1, 2, 3, 4], np.uint32), got[:], block=1)
    np.testing.assert_array_equal(got, [2, 1, 3, 55, 1, 2])  # 11 in each of five launches


@pytest.mark.parametrize(
    ("instruction", "named"),
    [
        ("cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%s], [%a0], 16, [%s];", "bulk"),
        ("cp.async.mbarrier.arrive.shared.b64 [%s];", "mbarrier"),
        ("cp.async.cg.shared.global [%s], [%a0], 8;", "cp.async.cg"),
        ("cp.async.ca.shared.global [%s], [%a0], 2;", "cp.async.ca"),
        ("fence.proxy.async;", "proxy"),
        ("fence.proxy.tensormap::generic.release.gpu;", "proxy"),
        ("ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {%r0, %r1}, [%s];", "m16n16"),
        ("stmatrix.sync.aligned.m16n8.x1.trans.shared.b8 [%s], {%r0};", "m16n8"),
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r0, %r1}, [%s];", "ldmatrix"),
        ("ld.global.L1::evict_sometimes.u32 %r0, [%a0];", "L1::evict_sometimes"),
        ("ld.global.b128 %d0, [%a0];", "b128"),
        ("ld.relaxed.global.u32 %r0, [%a0];", "ld"),
        ("ld.shared.nc.u32 %r0, [%s];", "ld"),
        ("ld.shared.v8.b32 {%r0, %r1, %r2, %r3, %r4, %r5, %r6, %r7}, [%s];", "ld"),
        ("ld.global.v2.u32 {%r0, %r1, %r2}, [%a0];", "ld"),
        ("st.const.u32 [%a0], %r0;", "const"),
        ("atom.global.inc.s32 %r0, [%a0], 1;", "atom"),
        ("atom.global.add.b32 %r0, [%a0], 1;", "atom"),
        ("atom.global.max.f32 %f0, [%a0], %f1;", "f32"),
        ("atom.shared.add.v2.f32 {%f0, %f1}, [%s], {%f0, %f1};", "atom"),
        ("red.global.exch.b32 [%a0], 1;", "exch"),
        ("red.acquire.gpu.global.add.u32 [%a0], 1;", "acquire"),
    ],
)
def test_what_is_not_supported_is_named(instruction, named):
    with pytest.raises(PtxError, match=named.replace(".", r"\.")) as error:
        kernel = Handwritten(instruction, shared=64)
        kernel.launch(np.zeros(8, np.uint32))
    assert "line " in str(error.value)


def test_constant_and_global_variables():
    kernel = Handwritten(
        """
    mul.wide.u32 %d0, %lane, 2;
    mov.u64 %d1, table;
    add.u64 %d1, %d1, %d0;
    ld.const.s16 %r0, [%d1];
    mov.u64 %d2, table;
    ld.s16 %r1, [%d2 + 4];
    ld.const.s16 %r2, [table + 2];
    add.s32 %r0, %r0, %r1;
    add.s32 %r0, %r0, %r2;
    atom.global.add.s32 %r3, [total], %r0;
    mad.wide.u32 %d3, %lane, 4, %a0;
    st.global.s32 [%d3], %r0;
""",
        globals=".const .align 2 .s16 table[32] = {-5, 7, 1000, 3};\n.global .align 4 .s32 total = 10;",
    )
    got = np.zeros(32, np.int32)
    assert kernel.launch(got).ok
    table = np.zeros(32, np.int32)
    table[:4] = [-5, 7, 1000, 3]
    np.testing.assert_array_equal(got, table + 1000 + 7)
    assert kernel.module.globals["total"][0] == 10 + got.sum()


def test_all_instructions_of_this_family_are_in_the_table():
    table = sparse24.ptx.instructions()
    for opcode in ("ld", "ldu", "st", "atom", "red", "cp", "ldmatrix", "stmatrix", "movmatrix", "fence", "membar"):
        assert f"| {opcode} |" in table
