"""Kernels for the tests of the machine: a body of PTX between the declarations that all of them need."""

import sparse24.ptx

KERNEL = """.version 8.6
.target sm_90
.address_size 64
{functions}
.visible .entry k({parameters})
{{
.reg .pred %p<16>;
.reg .b32 %r<64>;
.reg .b64 %rd<32>;
.reg .f32 %f<16>;
{declarations}
{loads}
mov.u32 %r0, %tid.x;
mov.u32 %r1, %ctaid.x;
mov.u32 %r2, %laneid;
mov.u32 %r3, %warpid;
{body}
ret;
}}
"""


class Source:
    """The PTX of one kernel `k` with `pointers` parameters, which are in %rd0, %rd1, ...

    In the body %r0 is %tid.x, %r1 %ctaid.x, %r2 %laneid, %r3 %warpid. A line that ends in `//name` can be asked for.
    """

    def __init__(self, body: str, pointers: int = 1, declarations: str = "", functions: str = "") -> None:
        self.text = KERNEL.format(
            functions=functions,
            parameters=", ".join(f".param .u64 a{i}" for i in range(pointers)),
            declarations=declarations,
            loads="\n".join(f"ld.param.u64 %rd{i}, [a{i}];" for i in range(pointers)),
            body=body,
        )
        self.module = sparse24.ptx.load(self.text)

    def line(self, name: str) -> int:
        lines = [n for n, text in enumerate(self.text.splitlines(), 1) if text.endswith("//" + name)]
        assert len(lines) == 1, f"{name}: {lines}"
        return lines[0]

    def launch(self, grid, block, *arrays, **options):
        return self.module.launch("k", grid, block, list(arrays), **options)


def store(register: str, pointer: str = "%rd0", index: str = "%r0", kind: str = "u32") -> str:
    """PTX that stores a 4-byte register at pointer[index]; it uses %rd30 and %rd31."""
    return f"""mul.wide.u32 %rd30, {index}, 4;
add.s64 %rd31, {pointer}, %rd30;
st.global.{kind} [%rd31], {register};"""


def load(register: str, pointer: str = "%rd0", index: str = "%r0", kind: str = "u32") -> str:
    """PTX that loads a 4-byte register from pointer[index]; it uses %rd30 and %rd31."""
    return f"""mul.wide.u32 %rd30, {index}, 4;
add.s64 %rd31, {pointer}, %rd30;
ld.global.{kind} {register}, [%rd31];"""


def kinds(report) -> set[str]:
    return {error.kind for error in report.errors}
