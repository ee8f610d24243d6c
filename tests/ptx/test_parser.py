"""What PTX texts mean, by what their kernels are and compute, and what is said of texts that are wrong.

The tree itself, and damaged texts in numbers: tests/native/ptx/test_parser.cpp, test_random_kernels.cpp.
"""

import random
import re
import struct
from typing import Any

import numpy as np
import pytest

from sparse24 import ptx

HEAD = ".version 8.6\n.target sm_90\n.address_size 64\n"
KERNEL = HEAD + ".visible .entry k()\n{\n.reg .b32 %r<3>;\nmov.u32 %r1, %tid.x;\nret;\n}\n"
REGISTERS = (
    ".reg .pred %p<4>; .reg .b16 %h<4>; .reg .b32 %r<9>; .reg .b64 %d<9>; .reg .f32 %f<4>; .reg .f64 %g<4>; "
    "ld.param.u64 %d0, [a];"
)


def kernel(body: str, header: str = "", parameters: str = ".param .u64 a") -> str:
    """The first line of `body` is line 8."""
    return f"{HEAD}{header}\n.entry k({parameters})\n{{\n{REGISTERS}\n{body}\nret;\n}}\n"


def run(body: str, count: int = 1, dtype: Any = np.uint64, header: str = "", block: int = 1) -> list[Any]:
    out = np.zeros(count, dtype)
    ptx.load(kernel(body, header)).launch("k", 1, block, [out]).raise_for_errors()
    return list(out.tolist())


def global_bytes(declaration: str, name: str = "x") -> bytes:
    return bytes(memoryview(ptx.load(HEAD + declaration + "\n").globals[name]).cast("B"))


# ---- Kernels ---------------------------------------------------------------------------------------------------------


def test_parameters_are_laid_out_by_their_alignment() -> None:
    parameters = (
        ".param .u8 b, .param .u64 .ptr .global .align 32 p, .param .align 16 .b8 s[20], .param .u16 h,\n"
        ".param .v2 .f32 v, .param .f64 d, .param .u32 m[2][3], .param .u64 .ptr q"
    )
    found = ptx.load(f"{HEAD}.entry k({parameters}) {{ ret; }}").kernels["k"]
    layout = [(p.name, p.type, p.offset, p.size, p.align, p.pointer, p.pointer_align) for p in found.parameters]
    assert layout == [
        ("b", "u8", 0, 1, 1, False, 0),
        ("p", "u64", 8, 8, 8, True, 32),
        ("s", "b8", 16, 20, 16, False, 0),
        ("h", "u16", 36, 2, 2, False, 0),
        ("v", "f32", 40, 8, 8, False, 0),
        ("d", "f64", 48, 8, 8, False, 0),
        ("m", "u32", 56, 24, 4, False, 0),
        ("q", "u64", 80, 8, 8, True, 0),
    ]
    assert found.parameter_bytes == 88 and not found.unsupported


def test_memory_and_thread_limits_of_a_kernel() -> None:
    text = HEAD + (
        ".shared .align 8 .b8 used[5]; .shared .b8 unused[999]; .extern .shared .align 16 .b8 dynamic[];\n"
        '.entry k() .maxntid 64, 2 .minnctapersm 3 .maxnreg 40 .pragma "nounroll";\n'
        "{ .reg .b32 %r<3>; .local .align 4 .b8 depot[10]; .shared .u64 own; { .local .u16 more; }\n"
        "mov.u32 %r1, used; mov.u32 %r2, dynamic; st.local.u32 [depot], %r1; ret; }\n"
        ".visible .weak .entry other() .reqntid 8, 4, 2 { }\n"
    )
    kernels = ptx.load(text).kernels
    assert list(kernels) == ["k", "other"]
    found = kernels["k"]
    assert (found.shared_bytes, found.local_bytes) == (16, 12)
    assert (found.max_threads, found.required_threads) == ((64, 2, 1), None)
    assert (kernels["other"].max_threads, kernels["other"].required_threads) == (None, (8, 4, 2))


# ---- Initializers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("declaration", "words"),
    [
        (".global .u32 x[4] = {1, -1};", struct.pack("<4I", 1, 0xFFFFFFFF, 0, 0)),
        (".global .u32 x[2][2] = {{7}, {9}};", struct.pack("<4I", 7, 0, 9, 0)),
        (".global .u16 x[][3] = {{1, 2, 3}, {4}};", struct.pack("<6H", 1, 2, 3, 4, 0, 0)),
        (".global .u8 x[2][2][2] = {{{1}}, {{2, 3}, {4}}};", bytes([1, 0, 0, 0, 2, 3, 4, 0])),
        (".global .v2 .u32 x[2] = {{1, 2}, {3, 4}};", struct.pack("<4I", 1, 2, 3, 4)),
        (".global .v4 .f32 x = {1.0, -2.5, 0f3F800000, 1e2};", struct.pack("<4f", 1, -2.5, 1, 100)),
        (".const .f64 x[2] = {0d3FF0000000000000, -0.1};", struct.pack("<2d", 1, -0.1)),
        (".global .u64 x = 0xFFFFFFFFFFFFFFFF;", b"\xff" * 8),
        (".global .b8 x[3] = {'A'};".replace("'A'", "65"), b"A\0\0"),
        (".global .u32 x[4] = {0b101, 017, 0X1f, 12U};", struct.pack("<4I", 5, 15, 31, 12)),
        (".global .u8 x = 300;", bytes([44])),
        (".global .u32 x[3];", bytes(12)),
        (".global .u32 x[2] = {};", bytes(8)),
        (".global .u32 y = 1, x = 2, z = 3;", struct.pack("<I", 2)),
    ],
)
def test_initializer(declaration: str, words: bytes) -> None:
    assert global_bytes(declaration) == words


def test_addresses_in_initializers() -> None:
    header = (
        ".global .u64 x[6] = {target, target+4, generic(target)+8, target-4, generic(y), 0};\n"
        ".global .u8 y[9] = {0xFF(target), 0xFF00(target), 0xFF0000(target), 0xFF000000(target),\n"
        "  0xFF00000000(target), 0xFF0000000000(target), 0xFF000000000000(target), 0xFF00000000000000(target),\n"
        "  0xFF(generic(target))};\n"
        ".global .align 8 .u32 target[4] = {1, 2, 3, 4};"
    )
    module = ptx.load(kernel("mov.u64 %d1, target; st.global.u64 [%d0], %d1; mov.u64 %d1, x; mov.u64 %d1, y;", header))
    out = np.zeros(1, np.uint64)
    module.launch("k", 1, 1, [out]).raise_for_errors()
    target = int(out[0])
    words = module.globals["x"].tolist()
    assert words[:4] == [target, target + 4, target + 8, target - 4] and words[4] not in (0, target) and words[5] == 0
    assert bytes(module.globals["y"].tolist()) == target.to_bytes(8, "little") + bytes([target & 0xFF])


# PTX ISA, "Integer Constant Expression Evaluation". ptxas gives the same.
@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2 + 3 * 4 - 10 / 3", 11),
        ("(2 + 3) * 4", 20),
        ("20 / 2 / 5", 2),
        ("10 - 3 - 2", 5),
        ("7 % 4 * 2", 6),
        ("1 << 2 + 1", 8),
        ("1 | 6 ^ 3 & 2", 5),
        ("(1 | 6 ^ 3) & 2", 0),
        ("1 < 2 == 1", 1),
        ("5 & 3 == 3", 1),
        ("0 && 0 || 1", 1),
        ("1 || 0 && 0", 1),
        ("1 ? 2 : 0 ? 3 : 4", 2),
        ("0 ? 2 : 0 ? 3 : 4", 4),
        ("1 + 1 ? 5 : 6", 5),
        ("!5 + !0", 1),
        ("~0 & 0xF0", 0xF0),
        ("- -3", 3),
        ("-7 / 2", -3),
        ("-7 % 3", 0),
        ("-8 >> 1", -4),
        ("-8U >> 1", 0x7FFFFFFFFFFFFFFC),
        ("~0 / 2", 0x7FFFFFFFFFFFFFFF),
        ("(.s64)~0 / 2", 0),
        ("(.u64)(-2) / 2", 0x7FFFFFFFFFFFFFFF),
        ("((1 | 2) - 4) / 2", 0),
        ("0x8000000000000000 / -1", 0),
        ("(0 == 1) - 4 / 3", -1),
        ("WARP_SZ * 2", 64),
        ("3 >= 3", 1),
        ("3 <= 2", 0),
        ("3 != 2", 1),
        ("-1 < 0", 1),
        ("-1 < 0U", 0),
    ],
)
def test_constant_expression(expression: str, value: int) -> None:
    assert struct.unpack("<q", global_bytes(f".global .s64 x = {expression};"))[0] == (value + 2**63) % 2**64 - 2**63
    assert run(f"mov.s64 %d1, {expression}; st.global.u64 [%d0], %d1;") == [value % 2**64]


# ---- Statements ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "value"),
    [
        ("mov.u64 %d1, 7; { .reg .b64 %d1; mov.u64 %d1, 9; } st.global.u64 [%d0], %d1;", 7),
        ("mov.u64 %d1, 1; { bra L; L: add.u64 %d1, %d1, 1; } L: add.u64 %d1, %d1, 4; st.global.u64 [%d0], %d1;", 6),
        ("mov.u64 %d1, 1; { bra L; } add.u64 %d1, %d1, 9; L: st.global.u64 [%d0], %d1;", 1),
        ("mov.u64 %d1, 5; st.global.v2.u32 [%d0], {%r1, _}; st.global.u64 [%d0], %d1;".replace("%r1, _", "3, 4"), 5),
        ("mov.b32 %r1, {1, 2}; cvt.u64.u32 %d1, %r1; st.global.u64 [%d0], {%d1};", 0x20001),
        ("mov.u64 %d1, 6; add.u64 %d2, %d0, 16; st.global.u64 [%d2+-16], %d1;", 6),
        ("mov.u64 %d1, 6; add.u64 %d2, %d0, 16; st.global.u64 [%d2-4*4], %d1;", 6),
        ("st.global.u64 [ % d0 ], 1;".replace("% d0", "%d0"), 1),
        ("setp.lt.u32 %p1|%p2, 1, 2; selp.u64 %d1, 3, 4, %p2; st.global.u64 [%d0], %d1;", 4),
        ("setp.lt.u32 %p1|_, 1, 2; selp.u64 %d1, 3, 4, %p1; st.global.u64 [%d0], %d1;", 3),
        ("setp.eq.u32 %p1, 1, 2; mov.u64 %d1, 8; @!%p1 st.global.u64 [%d0], %d1; @%p1 trap;", 8),
        ("t: .branchtargets A, B; mov.u32 %r1, 1; brx.idx %r1, t; A: trap; B: st.global.u64 [%d0], 2;", 2),
        ("/* a ; } */ st.global.u64 // ; }\n [%d0], 3; /**/ /* \n */", 3),
        ("; ; {} { { } } st.global.u64 [%d0], 3;", 3),
        (
            "mov.u32 %r1, %ntid.x; mad.lo.u32 %r1, %r1, 10, %nctaid.z; cvt.u64.u32 %d1, %r1; st.global.u64 [%d0], %d1;",
            11,
        ),
        (
            'mov.u64 %d1, 2; .pragma "x ; y"; .loc 1 2 3, function_name L, inlined_at 1 2 3\nst.global.u64 [%d0], %d1;',
            2,
        ),
        (".reg .b64 a1<12>, b; mov.u64 a110, 2; mov.u64 a11, 3; mov.u64 b, a110; st.global.u64 [%d0], b;", 2),
        ("mov.f64 %g1, 1.5e1; cvt.rzi.u64.f64 %d1, %g1; st.global.u64 [%d0], %d1;", 15),
        ("mov.f32 %f1, 1.5; mov.b32 %r1, %f1; cvt.u64.u32 %d1, %r1; st.global.u64 [%d0], %d1;", 0x3FC00000),
        ("mov.u64 %d1, shared+8; .shared .align 8 .b8 before[12]; .shared .u64 shared; st.global.u64 [%d0], %d1;", 24),
    ],
)
def test_statement(body: str, value: int) -> None:
    assert run(body) == [value]


@pytest.mark.parametrize("order", ["ld.volatile.global.v2.u32", "ld.global.cg.v2.u32", "ld.relaxed.gpu.global.v2.u32"])
def test_modifiers(order: str) -> None:
    out = run(f"st.global.u64 [%d0], 0x200000001; {order} {{%r1, %r2}}, [%d0]; st.global.v2.u32 [%d0], {{%r2, %r1}};")
    assert out == [0x100000002]


def test_calls_pass_arguments_and_results() -> None:
    header = (
        ".func (.param .b64 out, .reg .b32 more) f(.param .align 8 .b8 s[12], .reg .b64 r);\n"
        ".func (.param .b64 out, .reg .b32 more) f(.param .align 8 .b8 s[12], .reg .b64 r) {\n"
        ".reg .b64 %d<3>; .reg .b32 %r1; ld.param.u64 %d1, [s]; ld.param.u32 %r1, [s+8];\n"
        "add.u64 %d1, %d1, r; st.param.b64 [out], %d1; mul.lo.u32 more, %r1, 10; ret; }"
    )
    body = (
        "{ .param .align 8 .b8 s[12]; .param .b64 o; st.param.b64 [s], 5; st.param.b32 [s+8], 7;\n"
        "call.uni (o, %r3), f, (s, 30); ld.param.b64 %d2, [o]; }\n"
        "cvt.u64.u32 %d3, %r3; st.global.v2.u64 [%d0], {%d2, %d3};"
    )
    assert run(body, 2, header=header) == [35, 70]


def test_findings_name_the_line_of_the_source() -> None:
    header = '.file 2 "dir/a \\"b\\".cu", 12, 34'
    module = ptx.load(
        kernel(".loc 2 77 5\nld.global.u32 %r1, [%d0+64];\n.loc 2 78 1\nst.global.u32 [%d0], %r1;", header)
    )
    (error,) = module.launch("k", 1, 1, [np.zeros(1, np.uint32)]).errors
    assert (error.line, error.opcode) == (9, "ld.global.u32")
    assert "77" in str(error.source) and ".cu" in str(error.source)


# ---- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "column", "message"),
    [
        (KERNEL.replace("ret;", "ret"), 9, 1, "expected an operand"),
        (KERNEL.replace("%tid.x;", "0x;"), 7, 14, "is not an integer of 64 bits"),
        (KERNEL.removesuffix("}\n"), 9, 1, "expected '}' at the end of 'k'"),
        (HEAD + ".visible .entry ()", 4, 17, "the name of a function"),
        ("\n.target sm_80", 2, 1, "expected '.version'"),
        (HEAD.replace("64", "32"), 3, 15, "only 64-bit addresses are supported"),
        (HEAD + "/* no end", 4, 1, "a comment does not end"),
        (HEAD + '.file 1 "no end\n', 4, 9, "a string does not end"),
        (HEAD + ".global .align 12 .u32 x;", 4, 16, "power of two; got 12"),
        (HEAD + ".global .align 8192 .u32 x;", 4, 16, "at most 4096; got 8192"),
        (HEAD + ".global .u32 x = 0xFFFFFFFFFFFFFFFFF;", 4, 18, "is not an integer of 64 bits"),
        (HEAD + ".global .f32 x = 1e999;", 4, 18, "is not a floating-point number"),
        (HEAD + ".global .f32 x = 3;", 4, 18, "an integer cannot initialise a .f32"),
        (HEAD + ".global .u32 x = 08;", 4, 18, "'08' is not an integer"),
        (HEAD + ".global .u32 x = 4 % 0;", 4, 20, "division by zero"),
        (HEAD + ".global .u32 x[2] = {1, 2, 3};", 4, 21, "room for 2 elements"),
        (HEAD + ".global .u32 x[2][2] = {1, {2}};", 4, 25, "'{' before the elements"),
        (HEAD + ".global .v2 .u32 x[2] = {{1, 2}, {3}};", 4, 34, "a vector has 2 elements; got 1"),
        (HEAD + ".global .u8 x = 0xF0(y);", 4, 17, "a mask selects one byte"),
        (HEAD + ".shared .u32 x = 1;", 4, 18, "only .global and .const have initialisers"),
        (HEAD + ".global .u32 x;\n.const .u32 x;", 5, 13, "variable 'x' is there twice"),
        (HEAD + ".func f() { }\n.entry f() { }", 5, 8, "function 'f' is there twice"),
        (kernel("L: L: mov.u32 %r1, 1;"), 8, 4, "label 'L' is there twice"),
        (kernel("ld.global.u32 %r1, [%d0;"), 8, 24, "']' after an address; got ';'"),
        (kernel("mov.u32 %r1, 1 2;"), 8, 16, "',' or ';' after an operand of 'mov'; got '2'"),
        (kernel("mov.f32 %f1, 0f123;"), 8, 14, "0f has 8 hexadecimal digits"),
        (kernel("mov.u32 %r1, #1;"), 8, 14, "unexpected character '#'"),
        (kernel("\x80"), 8, 1, "unexpected character"),
    ],
)
def test_place_of_an_error(text: str, line: int, column: int, message: str) -> None:
    ptx.load(KERNEL)
    with pytest.raises(ptx.PtxError, match=rf"^line {line}, column {column}: .*{re.escape(message)}"):
        ptx.load(text)


F = ".func (.reg .b32 o) f(.param .b64 x, .reg .b32 y) { ret; }"


@pytest.mark.parametrize(
    ("body", "column", "message"),
    [
        ("  frobnicate.u32 %r1, 1;", 3, "opcode 'frobnicate' is not supported"),
        ("add.u32.fast %r1, %r2, 1;", 1, "modifier '.fast' of 'add.u32.fast' is not supported"),
        ("add.rn.u32 %r1, %r2, 1;", 1, "the modifiers of 'add.rn.u32' are not supported together"),
        ("add.u32 %r1, %r9, 1;", 14, "'%r9' is neither a declared register"),
        ("add.u32 %r1, %r01, 1;", 14, "'%r01' is neither a declared register"),
        ("add.u32 x, %r1, 1;", 9, "expected a register of type .u32 for the result; got 'x'"),
        ("add.u32 %r1, x, 1;", 14, "'x' is not declared"),
        ("add.u32 %r1, [%d0], 1;", 1, "is not supported with these operands"),
        ("add.u32 %r1, {%r2}, 1;", 1, "is not supported with these operands"),
        ("add.u32 %r1, %r2;", 1, "is not supported with these operands"),
        ("add.u32 %r1, %d1, 1;", 14, "'%d1' has 64 bits; expected .u32"),
        ("add.u64 %d1, %d1, %r1;", 19, "'%r1' has 32 bits; expected .u64"),
        ("add.u32 %d1, %r1, 1;", 9, "'%d1' has 64 bits; the result is .u32"),
        ("add.u32 %r1, %p1, 1;", 14, "'%p1' is a predicate"),
        ("add.u32 %r1, %r2+4, 1;", 14, "no offset or negation here"),
        ("add.u32 %r1+4, %r2, 1;", 9, "expected a register"),
        ("add.u32 _, %r2, 1;", 9, "expected a register"),
        ("add.f32 %f1, %f2, 3;", 19, "an integer immediate cannot be a .f32"),
        ("add.u32 %r1, %r2, 1.5;", 19, "cannot be a .u32"),
        ("@%r1 mov.u32 %r1, 1;", 6, "expected a predicate"),
        ("setp.eq.u32 %r1, 1, 2;", 13, "expected a predicate for the result"),
        ("setp.eq.u32 %p1+1, 1, 2;", 13, "expected a predicate for the result"),
        ("bra nowhere;", 5, "there is no label 'nowhere'"),
        ("L: bra L+4;", 4, "is not supported with these operands"),
        ("{ L: } bra L;", 12, "there is no label 'L'"),
        ("brx.idx %r1, t;", 14, "there is no .branchtargets 't'"),
        ("t: .branchtargets L; brx.idx %r1, t;", 1, "there is no label 'L'"),
        ("call g, (%r1);", 6, "there is no function 'g'"),
        ("call (%r1), f, (%d1);", 1, "takes 2 arguments and gives 1 results; the call has 1 and 1"),
        ("call f, (%d1, %r1);", 1, "takes 2 arguments and gives 1 results; the call has 2 and 0"),
        ("call (%r1), f, (%d1, %r1);", 17, "expected a .param variable"),
        ("{ .param .b32 q; call (%r1), f, (q, %r1); }", 34, "'q' has 4 bytes; the function's has 8"),
        ("call %d1, ();", 1, "indirect calls are not supported"),
        ("call k, ();", 1, "a call of kernel 'k' is not supported"),
        ("mov.u64 %d1, f;", 14, "the address of function 'f' is not supported"),
        ("call recursive;", 1, "recursion through 'recursive' is not supported"),
        ("call outside;", 1, "the external function 'outside' is not supported"),
        (".reg .b32 %r<4>;", 11, "'%r' is declared twice"),
        (".reg .b32 one; .reg .b64 one;", 26, "'one' is declared twice"),
        (".reg .v2 .b32 v;", 15, "registers of type .b32 vectors are not supported"),
        (".local .b8 big[600000];", 0, "more than 512 KB of local memory"),
        (".shared .b8 big[20000000];", 13, "shared variables of more than 16 MB"),
        ("{ .shared .b32 s; } { .shared .b64 s; }", 36, "two shared variables of the name 's'"),
        (".shared .b32 s; ld.global.u32 %r1, [s];", 36, "'s' lies in .shared, not in .global"),
        ("ld.global.u32 %r1, [%h1];", 20, "an address needs a register of 32 or 64 bits"),
        ("ld.global.u32 %r1, [x];", 20, "'x' is not declared"),
        (".shared .b32 s; mov.u16 %h1, s;", 30, "the address of 's' cannot be a .u16"),
    ],
)
def test_what_a_kernel_cannot_do(body: str, column: int, message: str) -> None:
    header = F + " .func recursive() { call recursive; ret; } .extern .func outside();"
    module = ptx.load(kernel(body, header))
    (reason,) = module.kernels["k"].unsupported
    assert message in reason, reason
    if column:
        line = 4 if "recursion" in message else 8
        place = re.match(r"line (\d+), column (\d+): ", reason)
        assert place and int(place[1]) == line, reason
        assert line != 8 or int(place[2]) == column, reason
    with pytest.raises(ptx.PtxError, match=re.escape(message)):
        module.launch("k", 1, 1, [np.zeros(1, np.uint64)])


def test_damaged_text_gives_an_error_or_a_module() -> None:
    dice = random.Random(24)
    errors = 0
    for _ in range(500):
        at = dice.randrange(len(HEAD), len(KERNEL))
        marks = dice.choice('{}()[]<>,;:+-!?@_."\n0x%é') * dice.randrange(1, 40)
        text = KERNEL[:at] + marks + KERNEL[at + dice.randrange(4) :]
        try:
            ptx.load(text)
        except ptx.PtxError:
            errors += 1
    assert 250 < errors < 500
