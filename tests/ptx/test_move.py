"""mov, cvta, isspacep and control flow of the PTX emulator."""

from __future__ import annotations

from typing import Any

import elementwise
import numpy as np
import pytest
from elementwise import DTYPES, apply, assert_same, edges, expand, random

from sparse24 import ptx

TYPES = ["b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64", "f32", "f64"]


def bits(type_name: str) -> int:
    return 8 * DTYPES[type_name].itemsize


# ---- mov -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES)
def test_mov_keeps_every_bit(kind: str) -> None:
    """NaNs included."""
    dtype = np.dtype(f"uint{bits(kind)}")
    a = np.concatenate([edges(DTYPES[kind]).view(dtype), random(dtype, 500)])
    assert_same(apply(f"mov.{kind}", a, out=dtype), a, a, what=kind)
    guarded = f"setp.ne.u32 %p, %b, 0; mov.{kind} %d, 0; @%p mov.{kind} %d, %a"
    b = np.arange(a.size, dtype=np.uint32) % 3
    assert_same(apply(guarded, a, b, out=dtype, block=33), np.where(b != 0, a, 0).astype(dtype), a, b, what=kind)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        *[
            ("s16", "-2", -2),
            ("u32", "0xfffffffe", 0xFFFFFFFE),
            ("s64", "-2", -2),
            ("b64", "0x8000000000000000", 2**63),
        ],
        *[("f32", "0fC0490FDB", np.float32(-np.pi)), ("f64", "0d400921FB54442D18", np.pi), ("f64", "0.1", 0.1)],
    ],
)
def test_mov_of_constants(kind: str, text: str, value: Any) -> None:
    assert apply(f"mov.{kind} %d, {text}", np.uint32([0]), out=DTYPES[kind])[0] == np.array(value).astype(DTYPES[kind])


def test_mov_of_predicates() -> None:
    a = np.arange(70, dtype=np.uint32)
    setup = "setp.ne.u32 %p, %b, 0; setp.ne.u32 %q, %c, 0; "
    p, q = (a & 1) != 0, (a & 2) != 0
    for source, value in [("%p", p), ("!%p", ~p), ("1", p | ~p), ("0", p & ~p)]:
        program = f"{setup} mov.pred %r, %p; @%q mov.pred %r, {source}; selp.u32 %d, 1, 0, %r"
        assert_same(
            apply(program, a, a & 1, a & 2, out=np.uint32), np.where(q, value, p).astype(np.uint32), a, what=source
        )


# Bits of the whole, number of parts.
SHAPES = [(16, 2), (32, 2), (32, 4), (64, 2), (64, 4)]


@pytest.mark.parametrize(("whole", "parts"), SHAPES)
def test_packing(whole: int, parts: int) -> None:
    size = whole // parts
    array = np.concatenate([edges(f"uint{whole}"), random(f"uint{whole}", 500)])
    names = [f"%x{i}" for i in range(parts)]
    registers = f".reg .b{size} %x<{parts}>;"
    # The first part lies lowest, as in an array of little-endian words.
    columns = array.view(f"uint{size}").reshape(-1, parts)
    for i in range(parts):
        sinks = ["_"] * parts
        sinks[i] = names[i]
        for unpacked in (names, sinks):
            program = f"mov.b{whole} {{{', '.join(unpacked)}}}, %a; cvt.u32.u{size} %d, {names[i]}"
            assert_same(
                apply(program, array, out=np.uint32, registers=registers), columns[:, i].astype(np.uint32), array
            )
    reversed_ = np.ascontiguousarray(columns[:, ::-1]).view(array.dtype).reshape(-1)
    program = f"mov.b{whole} {{{', '.join(names)}}}, %a; mov.b{whole} %d, {{{', '.join(names[::-1])}}}"
    assert_same(apply(program, array, out=array.dtype, registers=registers), reversed_, array)


def test_packing_of_constants_and_under_a_guard() -> None:
    a = np.arange(70, dtype=np.uint32)
    program = """setp.lt.u32 %p, %a, 35; mov.b64 %d0, {%a, 7}; @%p mov.b64 %d0, {0xffffffff, %a};
        mov.u32 %x, 1; mov.u32 %y, 2; @%p mov.b64 {%y, %x}, %d0; mov.b64 %d1, {%x, %y}"""
    first, second = apply(program, a, out=(np.uint64, np.uint64), registers=".reg .b32 %x, %y;")
    wide = a.astype(np.uint64)
    high = np.uint64(32)
    assert_same(first, np.where(a < 35, wide << high | np.uint64(2**32 - 1), wide | np.uint64(7) << high), a)
    assert_same(second, np.where(a < 35, wide | np.uint64(2**32 - 1) << high, np.uint64(1 | 2 << 32)), a)


def test_mov_of_special_registers() -> None:
    a = np.zeros(100, np.uint32)
    index = np.arange(100)
    for name, expected in {
        **{"%tid.x": index % 33, "%ctaid.x": index // 33, "%ntid.x": 0 * index + 33, "%laneid": index % 33 % 32},
        **{"%warpid": index % 33 // 32, "%nctaid.x": 0 * index + 4},
        "%lanemask_lt": (1 << index % 33 % 32) - 1,
    }.items():
        assert_same(apply(f"mov.u32 %d, {name}", a, out=np.uint32, block=33), expected.astype(np.uint32), what=name)


# ---- addresses -------------------------------------------------------------------------------------------------------

SPACES = ["global", "const", "shared", "local", "param"]
ADDRESSES = """.version 8.8
.target sm_90
.address_size 64
.global .align 8 .b32 global_words[4] = {10, 11, 12, 13};
.const .align 8 .b32 const_words[4] = {20, 21, 22, 23};
.visible .entry addresses(.param .align 8 .b8 param_words[16], .param .u64 out)
{
.reg .pred %p<8>; .reg .b32 %r<8>; .reg .b64 %d<16>;
.shared .align 8 .b32 shared_words[4];
.local .align 8 .b32 local_words[4];
ld.param.u64 %d0, [out];
mov.u32 %r0, 31; st.shared.u32 [shared_words+4], %r0;
mov.u32 %r0, 41; st.local.u32 [local_words+4], %r0;
{body}
ret;
}
"""
PARAM_WORDS = np.array([50, 51, 52, 53], np.uint32)


def run(body: str) -> np.ndarray[Any, Any]:
    out = np.zeros(32, np.uint32)
    module = ptx.load(ADDRESSES.replace("{body}", body))
    module.launch("addresses", 1, 1, [PARAM_WORDS.tobytes(), out]).raise_for_errors()
    return out


QUALIFIED = {"shared": ["shared", "shared::cta", "shared::cluster"], "param": ["param", "param::entry"]}
VALUES = {"global": 11, "const": 21, "shared": 31, "local": 41, "param": 51}


@pytest.mark.parametrize("space", [name for space in SPACES for name in QUALIFIED.get(space, [space])])
def test_generic_addresses(space: str) -> None:
    """Of a variable, with and without offset, and of an address in a register; and back into the space."""
    plain = space.split("::")[0]
    value = VALUES[plain]
    out = run(f"""
        cvta.{space}.u64 %d1, {plain}_words+4; ld.u32 %r1, [%d1];
        mov.b64 %d2, {plain}_words; cvta.{space}.u64 %d3, %d2; ld.u32 %r2, [%d3+4];
        cvta.to.{space}.u64 %d4, %d1; ld.{plain}.u32 %r3, [%d4]; sub.u64 %d5, %d4, %d2; cvt.u32.u64 %r4, %d5;
        st.global.v4.u32 [%d0], {{%r1, %r2, %r3, %r4}};""")
    np.testing.assert_array_equal(out[:4], [value, value, value, 4])


def test_isspacep() -> None:
    """Every space against addresses of every space. Parameters are in .global as well, and null is."""
    names = {name: space for space in SPACES for name in QUALIFIED.get(space, [space])}
    sources = [*SPACES, "null"]
    for row, source in enumerate(sources):
        take = "mov.b64 %d1, 0;" if source == "null" else f"cvta.{source}.u64 %d1, {source}_words;"
        body = [take]
        for column, name in enumerate(names):
            body.append(f"isspacep.{name} %p1, %d1; selp.u32 %r1, 1, 0, %p1; st.global.u32 [%d0+{4 * column}], %r1;")
        inside = {source} if source != "null" else set()
        inside |= {"global"} & ({"global"} if source in ("param", "null") else set())
        expected = [int(space in inside) for space in names.values()]
        np.testing.assert_array_equal(run("\n".join(body))[: len(expected)], expected, err_msg=f"{row} {source}")


@pytest.mark.parametrize("space", ["shared", "local", "param"])
def test_an_address_outside_the_window_is_of_no_use(space: str) -> None:
    """A cut to 32 bits, as code for shared memory makes, does not turn it into a valid one."""
    body = (
        f"cvta.to.{space}.u64 %d1, %d0; cvt.u32.u64 %r1, %d1; ld.{space}.u32 %r2, [%r1]; ld.{space}.u32 %r2, [%d1+4];"
    )
    module = ptx.load(ADDRESSES.replace("{body}", body))
    report = module.launch("addresses", 1, 1, [PARAM_WORDS.tobytes(), np.zeros(4, np.uint32)], checks={"memory"})
    assert [error.kind for error in report.errors] == ["out_of_bounds"] * 2


@pytest.mark.parametrize(
    "instruction",
    [
        *(
            "mov.b128 %x, {%a, %a}",
            "mov.f16 %b, %b",
            "mov.b8 %b, %b",
            "mov.u32 %c, {%b, %b}",
        ),
        *("mov.b64 %a, {%c, _}", "mapa.u64 %a, %a, %c", "cvta.shared.u32 %c, %c"),
        *("isspacep.texture %p, %a", "pmevent 16", "pmevent.mask 65536", "exit.uni", "nanosleep.u64 %a"),
    ],
)
def test_what_is_not_supported_is_named(instruction: str) -> None:
    opcode = instruction.split(".")[0].split(" ")[0]
    named = rf"'{opcode}.*(is not supported|are not supported together)|expected a register or an immediate of type"
    with pytest.raises(ptx.PtxError, match=named):
        apply(f"mov.u32 %d, %c; {instruction}", *(np.zeros(1, t) for t in ("u8", "u2", "u4")), out=np.uint32)


@pytest.mark.parametrize("instruction", ["mov.b32 %c, {%b, %b, %b}", "mov.b64 {%b, %b, %b}, %a", "mov.b32 %c, {%b}"])
def test_vectors_that_do_not_fit_are_refused(instruction: str) -> None:
    with pytest.raises(ptx.PtxError, match="line 18"):
        apply(f"mov.u32 %d, %c; {instruction}", *(np.zeros(1, t) for t in ("u8", "u2", "u4")), out=np.uint32)


# ---- control flow ----------------------------------------------------------------------------------------------------

NOTHING = ["brkpt", "nanosleep.u32 20", "nanosleep.u32 %a", "pmevent 3", "pmevent.mask 0xffff"]
NOTHING += ["griddepcontrol.wait", "griddepcontrol.launch_dependents"]


@pytest.mark.parametrize("instruction", NOTHING)
def test_what_leaves_no_trace(instruction: str) -> None:
    a = random(np.uint32, 100)
    assert_same(apply(f"mov.u32 %d, %a; {instruction}; add.u32 %d, %d, 1", a, out=np.uint32), a + np.uint32(1), a)


@pytest.mark.parametrize("leave", ["ret", "ret.uni", "exit"])
@pytest.mark.parametrize("block", [32, 33, 96])
def test_lanes_that_leave(leave: str, block: int) -> None:
    """Those whose guard is true do no more; the others go on."""
    a = random(np.uint32, 200) & 3
    program = f"mov.u32 %d, 5; setp.eq.u32 %p, %a, 1; @%p {leave}"
    assert_same(apply(program, a, out=np.uint32, block=block), np.where(a == 1, 0, 5).astype(np.uint32), a)


@pytest.mark.parametrize("uni", ["", ".uni"])
def test_branches_by_label_and_by_index(uni: str) -> None:
    """.uni promises what is not so here only for whole warps: each warp goes one way."""
    a = np.repeat(np.array([2, 0, 1, 1, 2, 0], np.uint32), 32) if uni else np.arange(200, dtype=np.uint32) % 3
    program = f"""mov.u32 %d, 1; brx.idx{uni} %a, targets; targets: .branchtargets ZERO, ONE, TWO;
        TWO: mad.lo.u32 %d, %d, 10, 2; bra{uni} END; ONE: mad.lo.u32 %d, %d, 10, 1; bra{uni} TWO;
        ZERO: add.u32 %d, %d, 1; END: add.u32 %d, %d, 1000"""
    expected = np.choose(a, [1002, 1112, 1012]).astype(np.uint32)
    assert_same(apply(program, a, out=np.uint32, block=32 if uni else 50), expected, a)


def test_an_index_beyond_the_labels_is_found() -> None:
    program = "mov.u32 %d, 1; brx.idx %a, targets; targets: .branchtargets END; END:"
    with pytest.raises(ptx.KernelError, match="illegal.*index 3 into a list of 1"):
        apply(program, np.array([0, 3, 0], np.uint32), out=np.uint32)


def test_trap() -> None:
    with pytest.raises(ptx.KernelError, match="trap"):
        apply("mov.u32 %d, 1; setp.eq.u32 %p, %a, 7; @%p trap", np.arange(9, dtype=np.uint32), out=np.uint32)
    apply("mov.u32 %d, 1; setp.eq.u32 %p, %a, 7; @%p trap", np.arange(7, dtype=np.uint32), out=np.uint32)


# ---- nothing left out ------------------------------------------------------------------------------------------------


def test_every_form_is_tested() -> None:
    names = {f"mov.{kind}" for kind in (*TYPES, "pred")}
    spaces = "const|global|local|shared|shared::cta|shared::cluster|param|param::entry"
    names |= {"cvta" + one for one in expand(f"to? {spaces} u64")} | {"isspacep" + one for one in expand(spaces)}
    names |= {"bra", "bra.uni", "brx.idx", "brx.idx.uni", "ret", "ret.uni", "exit", "trap", "pmevent", "pmevent.mask"}
    names |= {"brkpt", "nanosleep.u32", "griddepcontrol.wait", "griddepcontrol.launch_dependents"}
    assert elementwise.supported({name.split(".")[0] for name in names}) == names
