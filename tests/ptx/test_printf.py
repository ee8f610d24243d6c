"""vprintf and __assertfail, called as nvcc calls them."""

import numpy as np
import pytest
from machine import Source

DECLARATIONS = """.extern .func (.param .b32 result) vprintf(.param .b64 format, .param .b64 arguments);
.extern .func __assertfail(.param .b64 message, .param .b64 file, .param .b32 line, .param .b64 function,
                           .param .b64 size);
"""
PRINT = """cvta.local.u64 %rd10, %rd11;
mov.u64 %rd12, format;
cvta.global.u64 %rd12, %rd12;
{
.param .b64 p0;
st.param.b64 [p0], %rd12;
.param .b64 p1;
st.param.b64 [p1], %rd10;
.param .b32 r0;
call.uni (r0), vprintf, (p0, p1);
ld.param.b32 %r20, [r0];
}
"""


def text(name, value):
    data = [*value.encode(), 0]
    return f".global .align 1 .b8 {name}[{len(data)}] = {{{', '.join(map(str, data))}}};\n"


def printed(format, stores, block=1):
    """Runs printf(format, arguments), which `stores` puts at [%rd11]; the text, and what printf returned."""
    body = "mov.u64 %rd11, buffer;\n" + stores + PRINT + "mul.wide.u32 %rd30, %r0, 4;\nadd.s64 %rd31, %rd0, %rd30;\n"
    source = Source(
        body + "st.global.u32 [%rd31], %r20;",
        declarations=".local .align 16 .b8 buffer[64];",
        functions=DECLARATIONS + text("format", format) + text("word", "hello"),
    )
    out = np.zeros(block, np.int32)
    report = source.launch(1, block, out)
    return report, out


def test_conversions_and_the_layout_of_arguments():
    report, out = printed(
        "%d|%5u|%lld|%-7.3f|%s|%c|%#x|%%|%*d|%e\n",
        """st.local.u32 [%rd11], -3;
st.local.u32 [%rd11+4], 7;
st.local.u64 [%rd11+8], -5000000000;
st.local.f64 [%rd11+16], 0d4004000000000000;
mov.u64 %rd13, word;
cvta.global.u64 %rd13, %rd13;
st.local.u64 [%rd11+24], %rd13;
st.local.u32 [%rd11+32], 122;
st.local.u32 [%rd11+36], 255;
st.local.u32 [%rd11+40], 4;
st.local.u32 [%rd11+44], 9;
st.local.f64 [%rd11+48], 0d3FF0000000000000;
""",
    )
    report.raise_for_errors()
    assert report.printed == "-3|    7|-5000000000|2.500  |hello|z|0xff|%|   9|1.000000e+00\n"
    assert out.tolist() == [10]


def test_an_argument_of_8_bytes_is_aligned_after_one_of_4():
    report, _ = printed("%d %ld", "st.local.u32 [%rd11], 1;\nst.local.u64 [%rd11+8], 2;\n")
    assert report.printed == "1 2"


def test_lanes_print_in_turn():
    report, out = printed("<%u>", "st.local.u32 [%rd11], %r0;\n", block=40)
    assert report.printed == "".join(f"<{i}>" for i in range(40))
    assert out.tolist() == [1] * 40


def test_text_without_arguments():
    report, out = printed("50 %y nothing\n", "")
    assert report.printed == "50 %y nothing\n" and out.tolist() == [0]


@pytest.mark.parametrize("format, stores", [("%s", "st.local.u64 [%rd11], 64;\n"), ("%f" * 40, "")])
def test_arguments_that_are_nowhere(format, stores):
    report, out = printed(format, stores)
    assert "out_of_bounds" in {error.kind for error in report.errors}
    assert out.tolist() == [-2] and report.printed == ""


def test_a_failed_assertion_is_a_trap_that_says_which():
    source = Source(
        """setp.ne.u32 %p1, %r0, 33;
@%p1 bra END;
mov.u64 %rd10, message;
mov.u64 %rd11, file;
{
.param .b64 p0;
st.param.b64 [p0], %rd10;
.param .b64 p1;
st.param.b64 [p1], %rd11;
.param .b32 p2;
st.param.b32 [p2], 12;
.param .b64 p3;
st.param.b64 [p3], %rd11;
.param .b64 p4;
st.param.b64 [p4], 1;
call.uni __assertfail, (p0, p1, p2, p3, p4);
}
END:""",
        functions=DECLARATIONS + text("message", "x > 0") + text("file", "a.cu"),
    )
    (error,) = source.launch(1, 64, np.zeros(1, np.uint32)).errors
    assert (error.kind, error.warp, error.lane) == ("trap", 1, 1)
    assert error.message == "a.cu:12: a.cu: assertion `x > 0` failed"
