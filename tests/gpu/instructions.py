"""Instructions one at a time, as PTX kernels that a GPU and the emulator both run, and inputs to tell them apart.

Every kernel has one warp a block and two pointers: 32-bit operands [warp][operand][lane], results in the same order.
In the body %x0, %x1, ... are the operands of a lane, %d0, %d1, ... its results, %rd2 the address of %x0, %r0 the lane.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Words = np.ndarray  # uint32
Sample = Callable[[np.random.Generator, int], Words]  # of that many warps: [warps, operands, 32]

KERNEL = """.version 8.5
.target {target}
.address_size 64
.visible .entry k(.param .u64 operands, .param .u64 results)
{{
.reg .b32 %x<{inputs}>, %d<{results}>, %r<8>;
.reg .b64 %rd<8>;
.reg .b16 %h<8>;
.reg .pred %p<4>;
{declarations}
ld.param.u64 %rd0, [operands];
ld.param.u64 %rd1, [results];
mov.u32 %r0, %tid.x;
mov.u32 %r1, %ctaid.x;
mad.lo.u32 %r2, %r1, {input_words}, %r0;
mad.wide.u32 %rd2, %r2, 4, %rd0;
mad.lo.u32 %r3, %r1, {result_words}, %r0;
mad.wide.u32 %rd3, %r3, 4, %rd1;
{body}
ret;
}}
"""


@dataclass(frozen=True)
class Instruction:
    """ulps: 0 where the PTX ISA fixes every bit, else how far two right results in float32 may lie apart."""

    name: str
    body: str
    inputs: int
    results: int
    sample: Sample
    ulps: int = 0
    declarations: str = ""
    any_nan: bool = False  # the ISA leaves the bits of a NaN open
    sums_floats: bool = False  # on tensor cores: the order of the sum is the hardware's own
    target: str = "sm_80"

    def text(self) -> str:
        loads = [f"ld.global.b32 %x{i}, [%rd2+{128 * i}];" for i in range(self.inputs)]
        stores = [f"st.global.b32 [%rd3+{128 * i}], %d{i};" for i in range(self.results)]
        return KERNEL.format(
            target=self.target,
            inputs=self.inputs,
            results=self.results,
            declarations=self.declarations,
            input_words=32 * self.inputs,
            result_words=32 * self.results,
            body="\n".join([*loads, self.body, *stores]),
        )


# ---- Inputs ----------------------------------------------------------------------------------------------------------

STYLES = ("reals", "wide", "integers", "special", "cancelling")
SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    np.inf,
    -np.inf,
    np.nan,
    65504.0,
    -65504.0,
    2.0**-24,
    -(2.0**-15),
    2.0**-126,
    2.0**-140,
]


def floats(rng: np.random.Generator, shape: tuple[int, ...], style: str, reach: int) -> np.ndarray:
    """float32; exponents within +-reach but for `special`."""
    normal = rng.standard_normal(shape).astype(np.float32)
    if style == "reals":
        return normal
    if style == "wide":
        return (np.sign(normal) * np.exp2(rng.uniform(-reach, reach, shape))).astype(np.float32)
    if style == "integers":
        return rng.integers(-4, 5, shape).astype(np.float32)
    if style == "special":
        return np.where(rng.random(shape) < 0.15, rng.choice(np.array(SPECIAL, np.float32), shape), normal)
    large = rng.choice(np.array([2.0 ** (reach // 2), -(2.0 ** (reach // 2))], np.float32), shape)
    return np.where(rng.random(shape) < 0.5, large, normal)  # what is left of it depends on the order of the sum


def words_of(values: np.ndarray, kind: str) -> Words:
    """Elements of `kind` in 32-bit words, the first lowest; the last axis holds the elements of one word."""
    with np.errstate(over="ignore", invalid="ignore"):
        if kind in ("f32", "tf32"):
            return values[..., 0].astype(np.float32).view(np.uint32)
        if kind == "f16":
            bits = values.astype(np.float16).view(np.uint16).astype(np.uint32)
        else:  # bf16, to nearest even
            wide = values.astype(np.float32).view(np.uint32).astype(np.uint64)
            bits = ((wide + 0x7FFF + (wide >> 16 & 1)) >> 16).astype(np.uint32)
            bits = np.where(np.isnan(values), 0x7FC0, bits).astype(np.uint32)
    return bits[..., 0] | bits[..., 1] << 16


def operands(rng: np.random.Generator, warps: int, count: int, kind: str, style: str) -> Words:
    if kind[0] in "su":
        return rng.integers(0, 2**32, (warps, count, 32), dtype=np.uint32)
    reach = {"f16": 14, "bf16": 30, "tf32": 30, "f32": 30}[kind]
    shape = (warps, count, 32, 1 if kind in ("f32", "tf32") else 2)
    return words_of(floats(rng, shape, style, reach), kind)


LEGAL = {"tf32": [0x4, 0xE]}
ORDERED = [0x4, 0x8, 0x9, 0xC, 0xD, 0xE]  # the two indices of a group of four, increasing


def metadata(rng: np.random.Generator, warps: int, kind: str) -> Words:
    nibbles = rng.choice(np.array(LEGAL.get(kind, ORDERED), np.uint32), (warps, 1, 32, 8))
    return np.bitwise_or.reduce(nibbles << np.arange(0, 32, 4, dtype=np.uint32), axis=-1).astype(np.uint32)


def tensor_sample(kind: str, accumulator: str, a: int, b: int, sparse: bool) -> Sample:
    def sample(rng: np.random.Generator, warps: int) -> Words:
        parts = []
        for index, style in enumerate(STYLES):
            n = warps // len(STYLES) + (index < warps % len(STYLES))
            fragments = [operands(rng, n, a + b, kind, style), operands(rng, n, 4, accumulator, style)]
            parts.append(np.concatenate(fragments + [metadata(rng, n, kind)] * sparse, axis=1))
        return np.concatenate(parts)

    return sample


def scalar_sample(*kinds: str) -> Sample:
    """One operand of each kind: "f32", "f16" or "bf16" (two in a word), "u32", "small" (0 to 40), or "moderate", an f32
    that is neither zero nor subnormal nor near overflow."""

    def one(rng: np.random.Generator, warps: int, kind: str) -> Words:
        if kind == "small":
            return rng.integers(0, 41, (warps, 1, 32), dtype=np.uint32)
        if kind == "moderate":
            return operands(rng, warps, 1, "f32", "wide")
        shares = [n for n in np.array_split(np.arange(warps), len(STYLES) + 1)]
        bits = rng.integers(0, 2**32, (len(shares[-1]), 1, 32), dtype=np.uint32)
        return np.concatenate(
            [operands(rng, len(n), 1, kind, style) for n, style in zip(shares, STYLES, strict=False)] + [bits]
        )

    return lambda rng, warps: np.concatenate([rng.permutation(one(rng, warps, kind)) for kind in kinds], axis=1)


# ---- Tensor cores ----------------------------------------------------------------------------------------------------


def tensor(shape: str, kind: str, a: int, b: int, selector: int | None = None) -> Instruction:
    accumulator = "s32" if kind[0] == "s" else "f32"
    sparse = selector is not None
    registers = iter(range(a + b + 5))
    group = [", ".join(f"%x{next(registers)}" for _ in range(n)) for n in (a, b, 4)]
    form = f"{shape}.row.col.{accumulator}.{kind}.{kind}.{accumulator}"
    name = f"mma.sp::ordered_metadata.sync.aligned.{form}" if sparse else f"mma.sync.aligned.{form}"
    tail = f", %x{a + b + 4}, {selector}" if sparse else ""
    return Instruction(
        name=name + (f" selector {selector}" if sparse else ""),
        body=f"{name} {{%d0, %d1, %d2, %d3}}, {{{group[0]}}}, {{{group[1]}}}, {{{group[2]}}}{tail};",
        inputs=a + b + 4 + sparse,
        results=4,
        sample=tensor_sample(kind, accumulator, a, b, sparse),
        sums_floats=accumulator == "f32",
    )


TENSOR = [
    *(tensor("m16n8k16", kind, 4, 2) for kind in ("f16", "bf16")),
    tensor("m16n8k8", "tf32", 4, 2),
    tensor("m16n8k32", "s8", 4, 2),
    *(tensor("m16n8k32", kind, 4, 4, selector) for kind in ("f16", "bf16") for selector in (0, 1)),
    tensor("m16n8k64", "s8", 4, 4, 0),
    *(tensor("m16n8k16", "f16", 2, 2, selector) for selector in range(4)),
    *(tensor("m16n8k16", "tf32", 4, 4, selector) for selector in (0, 1)),
    tensor("m16n8k128", "s4", 4, 4, 0),
]


# ---- Moves -----------------------------------------------------------------------------------------------------------

SHARED = ".shared .align 128 .b8 tile[1024];"
TO_SHARED = """mov.u32 %r4, tile;
shl.b32 %r5, %r0, 2;
add.u32 %r5, %r4, %r5;
""" + "\n".join(f"st.shared.b32 [%r5+{128 * i}], %x{i};" for i in range(4))  # fmt: skip


def ldmatrix(count: int, transposed: bool) -> Instruction:
    form = f"ldmatrix.sync.aligned.m8n8.x{count}{'.trans' if transposed else ''}.shared.b16"
    registers = ", ".join(f"%d{i}" for i in range(count))
    # %x4 chooses the 16 bytes of each lane's row.
    body = f"{TO_SHARED}\nbar.warp.sync -1;\nand.b32 %r6, %x4, 31;\nmad.lo.u32 %r6, %r6, 16, %r4;"
    return Instruction(
        f"{form}", f"{body}\n{form} {{{registers}}}, [%r6];", 5, count, scalar_sample(*["u32"] * 5), 0, SHARED
    )


def cp_async(cache: str, size: int, form: str) -> Instruction:
    """Over a sentinel, from 16 bytes a lane of the operands; %x4 % (size + 1) of them, or none, by a predicate."""
    source = {"all": "", "bytes": ", %r7", "ignored": ", %p0"}[form]
    name = f"cp.async.{cache}.shared.global"
    body = f"""mov.u32 %r4, tile;
mad.lo.u32 %r5, %r0, 16, %r4;
mul.wide.u32 %rd4, %r0, 4;
sub.s64 %rd5, %rd2, %rd4;
mad.wide.u32 %rd5, %r0, 16, %rd5;
mov.b32 %r6, 0xA5A5A5A5;
st.shared.v4.b32 [%r5], {{%r6, %r6, %r6, %r6}};
rem.u32 %r7, %x4, {size + 1};
setp.eq.u32 %p0, %r7, 0;
{name} [%r5], [%rd5], {size}{source};
cp.async.commit_group;
cp.async.wait_group 0;
bar.warp.sync -1;
ld.shared.v4.b32 {{%d0, %d1, %d2, %d3}}, [%r5];"""
    return Instruction(f"{name} {size} bytes, {form}", body, 5, 4, scalar_sample(*["u32"] * 5), 0, SHARED)


MOVES = [
    *(ldmatrix(count, transposed) for count in (1, 2, 4) for transposed in (False, True)),
    *(cp_async("ca", size, form) for size in (4, 8, 16) for form in ("all", "bytes", "ignored")),
    *(cp_async("cg", 16, form) for form in ("all", "bytes", "ignored")),
    *(
        Instruction(
            f"shfl.sync.{mode}.b32",
            f"shfl.sync.{mode}.b32 %d0|%p0, %x0, %x1, {clamp}, -1;\nselp.u32 %d1, 1, 0, %p0;",
            2,
            2,
            scalar_sample("u32", "small"),
        )
        for mode, clamp in (("bfly", 31), ("idx", 31), ("down", 31), ("up", 0))
    ),
]


# ---- Arithmetic ------------------------------------------------------------------------------------------------------


def scalar(opcode: str, *kinds: str, ulps: int = 0, any_nan: bool = False) -> Instruction:
    """32-bit operands in, a 32-bit result."""
    registers = ", ".join(f"%x{i}" for i in range(len(kinds)))
    body, sample = f"{opcode} %d0, {registers};", scalar_sample(*kinds)
    return Instruction(opcode, body, len(kinds), 1, sample, ulps, any_nan=any_nan or ulps > 0)


def to_16(opcode: str, kind: str) -> Instruction:
    return Instruction(opcode, f"{opcode} %h0, %x0;\ncvt.u32.u16 %d0, %h0;", 1, 1, scalar_sample(kind))


def from_16(opcode: str, kind: str) -> Instruction:
    return Instruction(opcode, f"mov.b32 {{%h0, %h1}}, %x0;\n{opcode} %d0, %h1;", 1, 1, scalar_sample(kind))


EXACT = [
    *(scalar(f"{op}.f32", "f32", "f32") for op in ("add", "sub", "mul", "min", "max", "add.ftz", "mul.ftz")),
    *(scalar(f"{op}.f32", "f32", "f32") for op in ("add.rn", "sub.rn", "mul.rn", "div.rn", "min.NaN", "max.NaN")),
    *(scalar(f"{op}.f32", "f32") for op in ("rcp.rn", "sqrt.rn", "cvt.sat.f32")),
    *(scalar(f"{op}.f32", "f32", any_nan=True) for op in ("abs", "neg")),
    scalar("copysign.f32", "f32", "f32", any_nan=True),
    *(scalar(f"fma.rn{ftz}.f32", "f32", "f32", "f32") for ftz in ("", ".ftz", ".sat")),
    scalar("fma.rm.f32", "f32", "f32", "f32"),
    *(scalar(f"cvt.{mode}.f32.f32", "f32") for mode in ("rni", "rzi", "rmi", "rpi")),
    *(scalar(f"cvt.{mode}.{kind}.f32", "f32") for mode in ("rni", "rzi", "rmi", "rpi") for kind in ("s32", "u32")),
    *(scalar(f"cvt.rn.f32.{kind}", "u32") for kind in ("s32", "u32")),
    *(to_16(f"cvt.{mode}.{kind}.f32", "f32") for mode in ("rn", "rz") for kind in ("f16", "bf16")),
    *(from_16(f"cvt.f32.{kind}", kind) for kind in ("f16", "bf16")),
    *(scalar(f"cvt.rn.{kind}x2.f32", "f32", "f32") for kind in ("f16", "bf16")),
    *(scalar(f"fma.rn.{kind}", kind[:-2], kind[:-2], kind[:-2]) for kind in ("f16x2", "bf16x2")),
    *(scalar(f"{op}.f16x2", "f16", "f16") for op in ("add.rn", "mul.rn", "min", "max")),
    scalar("prmt.b32", "u32", "u32", "u32"),
    Instruction("bfi.b32", "bfi.b32 %d0, %x0, %x1, %x2, %x3;", 4, 1, scalar_sample("u32", "u32", "small", "small")),
    scalar("bfe.u32", "u32", "small", "small"),
    scalar("bfe.s32", "u32", "small", "small"),
    scalar("shf.l.wrap.b32", "u32", "u32", "u32"),
    scalar("shf.r.clamp.b32", "u32", "u32", "small"),
    scalar("shl.b32", "u32", "small"),
    scalar("shr.s32", "u32", "small"),
    *(scalar(f"dp4a.{a}32.{b}32", "u32", "u32", "u32") for a in "su" for b in "su"),
    *(scalar(f"mul.hi.{sign}32", "u32", "u32") for sign in "su"),
    *(scalar(f"{op}.b32", "u32") for op in ("popc", "clz", "brev")),
]

# PTX ISA: the largest error, of which two right results may be twice apart.
APPROXIMATE = [
    *(scalar(f"ex2.approx{ftz}.f32", "f32", ulps=4) for ftz in ("", ".ftz")),
    *(scalar(f"rcp.approx{ftz}.f32", "f32", ulps=2) for ftz in ("", ".ftz")),
    *(scalar(f"div.full{ftz}.f32", "f32", "f32", ulps=4) for ftz in ("", ".ftz")),
    scalar("div.approx.f32", "moderate", "moderate", ulps=4),
    scalar("rsqrt.approx.f32", "f32", ulps=4),
    scalar("sqrt.approx.f32", "f32", ulps=4),
    scalar("tanh.approx.f32", "f32", ulps=2**13),  # 2^-11, relative
]

ALL = [*TENSOR, *MOVES, *EXACT, *APPROXIMATE]
NUMERICS = ("sm_80", "sm_90")
PRODUCTS = (0, 4, 8, 16, 32)  # that mma.sp sums at once; 0: as many as mma


# ---- Comparison ------------------------------------------------------------------------------------------------------


def equal(instruction: Instruction, one: Words, other: Words) -> np.ndarray:
    """Where two results agree: to the bit, or as far as `ulps` and `any_nan` allow."""
    if not instruction.any_nan:
        return one == other
    a, b = one.view(np.float32), other.view(np.float32)
    ordered = [np.where(w >> 31 == 1, -(w & 0x7FFFFFFF).astype(np.int64), w.astype(np.int64)) for w in (one, other)]
    near = np.abs(ordered[0] - ordered[1]) <= instruction.ulps
    return np.where(np.isnan(a) | np.isnan(b), np.isnan(a) & np.isnan(b), near)


def first_difference(instruction: Instruction, data: Words, hardware: Words, emulated: Words) -> str:
    """Where they first differ, with all that went in; empty where they agree."""
    different = ~equal(instruction, hardware, emulated)
    if not different.any():
        return ""
    warp, result, lane = (int(i) for i in np.argwhere(different)[0])
    lines = [
        f"{instruction.name}: {int(different.sum())} of {different.size} results differ; the first: warp {warp}, "
        f"lane {lane}, result {result}: hardware {describe(hardware[warp, result, lane])}, "
        f"emulator {describe(emulated[warp, result, lane])}",
        "operands of that lane: " + " ".join(describe(word) for word in data[warp, :, lane]),
    ]
    if instruction in TENSOR:  # which depends on all lanes
        lines += [f"x{i}: " + " ".join(f"{word:08x}" for word in row) for i, row in enumerate(data[warp])]
    return "\n".join(lines)


def describe(word: np.uint32) -> str:
    return f"{int(word):#010x} ({np.uint32(word).view(np.float32):.9g})"
