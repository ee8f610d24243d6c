"""Small PTX texts for the tests of the API and of the command line."""

AXPY = """\
.version 8.5
.target sm_80
.address_size 64

.global .align 4 .f32 factor = 0f40000000;
.const .align 4 .b32 table[4] = {1, 2, 3, 4};

.visible .entry axpy(.param .u64 y, .param .u64 x, .param .f32 a, .param .u32 n)
{
  .reg .pred %p<2>;
  .reg .b32 %r<8>;
  .reg .f32 %f<8>;
  .reg .b64 %rd<8>;
  .loc 1 7 3
  ld.param.u64 %rd1, [y];
  ld.param.u64 %rd2, [x];
  ld.param.f32 %f1, [a];
  ld.param.u32 %r1, [n];
  mov.u32 %r2, %ctaid.x;
  mov.u32 %r3, %ntid.x;
  mov.u32 %r4, %tid.x;
  mad.lo.s32 %r5, %r2, %r3, %r4;
  setp.ge.s32 %p1, %r5, %r1;
  @%p1 bra DONE;
  mul.wide.s32 %rd3, %r5, 4;
  add.s64 %rd4, %rd1, %rd3;
  add.s64 %rd5, %rd2, %rd3;
  .loc 1 9 3
  ld.global.f32 %f2, [%rd4];
  ld.global.f32 %f3, [%rd5];
  ld.global.f32 %f5, [factor];
  mul.f32 %f3, %f3, %f5;
  fma.rn.f32 %f4, %f1, %f3, %f2;
  st.global.f32 [%rd4], %f4;
DONE:
  ret;
}
.file 1 "axpy.cu"
"""


def kernel(parameters: str, body: str, header: str = "") -> str:
    """PTX of one kernel "k"; registers %r, %f, %rd, %p."""
    return f""".version 8.5
.target sm_80
.address_size 64
{header}
.visible .entry k({parameters})
{{
  .reg .pred %p<8>;
  .reg .b16 %h<8>;
  .reg .b32 %r<16>;
  .reg .f32 %f<16>;
  .reg .b64 %rd<16>;
{body}
}}
"""
