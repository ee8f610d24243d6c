"""sparse24.ptx from outside: loading, arguments, reports, threads, interrupts; and the libraries behind it."""

from __future__ import annotations

import ctypes
import json
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from small_kernels import kernel

import sparse24
from sparse24 import ptx

PACKAGE = Path(sparse24.__file__).parent


# ---- Loading ---------------------------------------------------------------------------------------------------------


def test_load_takes_text_bytes_and_paths(axpy: str, tmp_path: Path) -> None:
    path = tmp_path / "axpy.ptx"
    path.write_text(axpy)
    for source in (axpy, axpy.encode(), path, str(path)):
        module = ptx.load(source)
        assert list(module.kernels) == ["axpy"] and module.target == "sm_80" and module.version == "8.5"


def test_kernel_is_described(axpy: str) -> None:
    described = ptx.load(axpy).kernels["axpy"]
    assert [str(parameter) for parameter in described.parameters] == ["y: .u64", "x: .u64", "a: .f32", "n: .u32"]
    assert [(parameter.offset, parameter.size) for parameter in described.parameters] == [
        (0, 8),
        (8, 8),
        (16, 4),
        (20, 4),
    ]
    assert described.unsupported == () and described.max_threads is None
    assert described.registers == {"pred": 2, "b32": 8, "f32": 8, "b64": 8}
    assert described.instructions["ld.global.f32"] == 3 and sum(described.instructions.values()) == 20


def test_kernel_directives_are_described() -> None:
    text = kernel("", ".shared .align 4 .b8 s[100]; .local .align 8 .b8 l[24]; ret;")
    described = ptx.load(text.replace("\n{", "\n.maxntid 64, 2\n{")).kernels["k"]
    assert (described.shared_bytes, described.local_bytes, described.max_threads) == (100, 24, (64, 2, 1))
    required = ptx.load(text.replace("\n{", "\n.reqntid 96\n{")).kernels["k"]
    assert required.required_threads == (96, 1, 1)


@pytest.mark.parametrize(
    "source, error", [("missing.ptx", FileNotFoundError), (Path("missing.ptx"), FileNotFoundError)]
)
def test_missing_files(source: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="missing.ptx"):
        ptx.load(source)


@pytest.mark.parametrize("text", ["", "\n", "\0", b"\xff\xfe", ".version 8.5\n.target sm_80\n.address_size 32\n"])
def test_text_that_is_no_ptx(text: Any) -> None:
    with pytest.raises(ptx.PtxError) as caught:
        ptx.load(text)
    assert caught.value.line >= 1 and caught.value.column >= 1
    assert str(caught.value).startswith(f"line {caught.value.line}, column {caught.value.column}: ")


def test_unsupported_instructions_are_named() -> None:
    text = kernel("", "  ret;\n  frobnicate.u32 %r1, %r2;\n  add.s32.wild %r1, %r2, %r3;")
    module = ptx.load(text)
    line = text[: text.index("frobnicate")].count("\n") + 1
    described = module.kernels["k"].unsupported
    assert len(described) == 2 and "frobnicate" in described[0] and "wild" in described[1]
    with pytest.raises(ptx.PtxError, match="frobnicate") as caught:
        module.launch("k", 1, 1, [])
    assert (caught.value.line, caught.value.column) == (line, 3)


def test_undecodable_kernel_does_not_hide_the_others(axpy: str) -> None:
    module = ptx.load(axpy + ".visible .entry bad() { frobnicate; }\n")
    assert not module.kernels["axpy"].unsupported and module.kernels["bad"].unsupported
    y = np.zeros(4, np.float32)
    assert module.launch("axpy", 1, 4, [y, y + 1, 1.0, 4]).ok and (y == 2).all()


# ---- Arguments -------------------------------------------------------------------------------------------------------


def array() -> Any:
    return np.zeros(8, np.uint8)


def frozen() -> Any:
    made = array()
    made.flags.writeable = False
    return made


ARGUMENT_ERRORS: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("u64", lambda: np.zeros(16, np.uint8)[::2], ValueError, "is not contiguous in C order"),
    ("u64", lambda: np.asfortranarray(np.zeros((2, 3))), ValueError, "is not contiguous in C order"),
    ("u64", lambda: np.zeros(8, ml_dtypes.bfloat16)[::2], ValueError, "is not contiguous in C order"),
    ("u64", lambda: torch.zeros(4, 2).t(), ValueError, "is not contiguous in C order"),
    ("u64", frozen, ValueError, "is read-only"),
    ("u64", lambda: b"12345678", ValueError, "is read-only"),
    ("u64", lambda: torch.zeros(4, requires_grad=True), ValueError, "cannot be shared: .*gradient"),
    ("u64", lambda: torch.zeros(4, device="meta"), ValueError, "cannot be shared: .*meta"),
    ("u64", lambda: torch.zeros(4).to_sparse(), ValueError, "cannot be shared: .*strided"),
    ("u64", lambda: OnCuda(), ValueError, r"is on a device \(DLPack type 2\)"),
    ("u64", lambda: NoCapsule(), TypeError, "gives no DLPack capsule"),
    ("u64", lambda: [1, 2], TypeError, "must be an array.*got list"),
    ("u64", lambda: "text", TypeError, "must be an array.*got str"),
    ("u64", lambda: 1.5, TypeError, "is an integer; got 1.5"),
    (
        "u64",
        lambda: 1 << 64,
        ValueError,
        "takes -9223372036854775808 to 18446744073709551615; got 18446744073709551616",
    ),
    ("u32", lambda: 1 << 32, ValueError, "takes -2147483648 to 4294967295; got 4294967296"),
    ("s32", lambda: 1 << 31, ValueError, "takes -2147483648 to 2147483647; got 2147483648"),
    ("u8", lambda: -129, ValueError, "takes -128 to 255; got -129"),
    ("u32", lambda: 1.0, TypeError, "is an integer; got 1.0"),
    ("u32", lambda: np.float32(1), TypeError, r"is an integer; got np.float32\(1.0\)"),
    ("b32", lambda: 1.0, TypeError, "has no type: pass a numpy scalar of 4 bytes; got 1.0"),
    ("b32", lambda: np.float64(1), TypeError, "has no type: pass a numpy scalar of 4 bytes"),
    ("u32", lambda: np.zeros(3), TypeError, r"is a number; got numpy.ndarray of shape \(3,\)"),
    ("f32", lambda: np.array(1.0), TypeError, r"is a number; got numpy.ndarray of shape \(\)"),
    ("f32", lambda: torch.tensor(1.0), TypeError, r"is a number; got torch.Tensor of shape \(\)"),
    ("u32", lambda: None, TypeError, "is a number; got None"),
    ("u32", lambda: ptx.Buffer(array()), TypeError, "is a number; got a Buffer"),
    ("u32", lambda: "5", TypeError, "is a number; got str"),
    ("u32", lambda: 1j, TypeError, "is a number; got complex"),
    ("f32", lambda: 1e39, ValueError, "cannot hold 1e\\+39"),
    ("f32", lambda: 10**400, ValueError, "cannot hold"),
    ("align 4 .b8 value[12]", lambda: b"123", ValueError, "is a struct of 12 bytes; got 3"),
    ("align 4 .b8 value[12]", lambda: 5, TypeError, "is a struct by value: pass bytes; got int"),
]


class OnCuda:
    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, **options: Any) -> Any:
        raise AssertionError("not to be asked")


class NoCapsule:
    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, **options: Any) -> Any:
        return 5


@pytest.mark.parametrize("declared, value, error, message", ARGUMENT_ERRORS)
def test_argument_errors(declared: str, value: Callable[[], Any], error: type[Exception], message: str) -> None:
    name = "" if "value" in declared else " value"
    module = ptx.load(kernel(f".param .u64 other, .param .{declared}{name}", "ret;"))
    with pytest.raises(error) as caught:
        module.launch("k", 1, 1, [array(), value()])
    text = str(caught.value)
    assert text.startswith("argument 1 ('value', .") and re.search(message, text), text
    assert type(caught.value) is error


CALL_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"args": []}, ValueError, r"kernel 'k' has 1 parameters \(value: .u32\); got 0"),
    ({"args": [1, 2]}, ValueError, r"kernel 'k' has 1 parameters \(value: .u32\); got 2"),
    ({"args": 5}, TypeError, "args must be a list or tuple; got int"),
    ({"name": "missing"}, ValueError, "no kernel 'missing'; there is: k"),
    ({"grid": 0}, ValueError, r"grid is \(0, 1, 1\): x must be 1 to 2147483647"),
    ({"grid": (1, 65536)}, ValueError, "y must be 1 to 65535"),
    ({"grid": (1, 1, 65536)}, ValueError, "z must be 1 to 65535"),
    ({"grid": (1 << 31, 1, 1)}, ValueError, "x must be 1 to 2147483647"),
    ({"grid": (65536, 65535, 2)}, ValueError, "2\\^32 blocks or more"),
    ({"grid": (1, 1, 1, 1)}, ValueError, "grid must be one to three ints; got 4"),
    ({"grid": ()}, ValueError, "grid must be one to three ints; got 0"),
    ({"grid": 1.5}, TypeError, "grid must be an int; got float"),
    ({"block": "x"}, TypeError, "block must be an int; got str"),
    ({"block": -1}, ValueError, "block must be 0 to 4294967295; got -1"),
    ({"block": 1025}, ValueError, "x must be 1 to 1024"),
    ({"block": (1, 1, 65)}, ValueError, "z must be 1 to 64"),
    ({"block": (32, 33)}, ValueError, "1056 threads; at most 1024 fit in a block"),
    ({"shared": 163 * 1024 + 1}, ValueError, r"166913 bytes .* \(0 static, 166913 dynamic\), sm_80 has 166912"),
    ({"checks": "memory,race"}, ValueError, "checks must be 'all', 'none' or some of memory, init"),
    ({"checks": {"memory", "speed"}}, ValueError, "got 'speed'"),
    ({"numerics": "sm_70"}, ValueError, "numerics must be one of ieee, sm_80, sm_90, float64; got 'sm_70'"),
    ({"order": "sideways"}, ValueError, "order must be one of forward, reverse, random"),
    ({"seed": -1}, ValueError, "seed must be 0 to"),
    ({"threads": 1.0}, TypeError, "threads must be an int"),
    ({"budget": "much"}, TypeError, "budget must be an int"),
]


@pytest.mark.parametrize("options, error, message", CALL_ERRORS)
def test_call_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    module = ptx.load(kernel(".param .u32 value", "ret;"))
    complete = {"name": "k", "grid": 1, "block": 1, "args": [5]} | options
    with pytest.raises(error, match=message):
        module.launch(**complete)


def test_thread_limits_of_the_kernel() -> None:
    limited = ptx.load(kernel("", "ret;").replace("\n{", "\n.maxntid 64, 1, 1\n{"))
    assert limited.launch("k", 1, 64, []).ok and limited.launch("k", 1, (2, 32), []).ok
    with pytest.raises(ValueError, match=r"65 threads, more than the kernel's .maxntid \(64, 1, 1\)"):
        limited.launch("k", 1, 65, [])
    exact = ptx.load(kernel("", "ret;").replace("\n{", "\n.reqntid 8, 4\n{"))
    assert exact.launch("k", 1, (8, 4), []).ok
    with pytest.raises(ValueError, match=r"compiled for .reqntid"):
        exact.launch("k", 1, 32, [])


@pytest.mark.parametrize(
    "target, kilobytes", [("sm_75", 64), ("sm_80", 163), ("sm_86", 99), ("sm_89", 99), ("sm_90", 227), ("sm_120a", 99)]
)
def test_shared_memory_limit(target: str, kilobytes: int) -> None:
    text = kernel("", ".shared .b8 s[1024]; ret;").replace("sm_80", target)
    module = ptx.load(text)
    assert module.launch("k", 1, 1, [], shared=(kilobytes - 1) * 1024).ok
    with pytest.raises(ValueError, match=r"1024 static"):
        module.launch("k", 1, 1, [], shared=(kilobytes - 1) * 1024 + 1)


def bf16(value: float) -> bytes:
    return np.array(value, ml_dtypes.bfloat16).tobytes()


VALUES: list[tuple[str, Any, bytes]] = [
    ("u8", 255, b"\xff"),
    ("s8", -1, b"\xff"),
    ("u16", -2, b"\xfe\xff"),
    ("u32", -1, b"\xff" * 4),
    ("u32", True, b"\1\0\0\0"),
    ("u32", np.bool_(True), b"\1\0\0\0"),
    ("u32", np.uint8(7), b"\7\0\0\0"),
    ("b32", np.float32(1), struct.pack("<f", 1)),
    ("b32", -5, struct.pack("<i", -5)),
    ("b16", np.float16(1), struct.pack("<e", 1)),
    ("b16", ml_dtypes.bfloat16(1.5), bf16(1.5)),
    ("b64", np.float64(0.1), struct.pack("<d", 0.1)),
    ("u64", 1 << 63, struct.pack("<Q", 1 << 63)),
    ("s64", -1, b"\xff" * 8),
    ("u64", None, b"\0" * 8),
    ("f32", 0.1, struct.pack("<f", 0.1)),
    ("f32", 3, struct.pack("<f", 3)),
    ("f32", np.float16(0.5), struct.pack("<f", 0.5)),
    ("f32", float("inf"), struct.pack("<f", float("inf"))),
    ("f64", np.float32(0.1), struct.pack("<d", float(np.float32(0.1)))),
    ("f16", 0.1, struct.pack("<e", 0.1)),
    *[("bf16", value, bf16(value)) for value in (1.0, 0.1, -1e-40, 3.3e38, float("inf"), 1.00390625, 1.01171875)],
]


@pytest.mark.parametrize("declared, value, expected", VALUES)
def test_scalars_arrive_as_their_type(declared: str, value: Any, expected: bytes) -> None:
    bits = 8 * len(expected)
    register = {8: "%r1", 16: "%h1", 32: "%r1", 64: "%rd2"}[bits]
    body = f"ld.param.u64 %rd1, [out]; ld.param.b{bits} {register}, [value]; st.global.b{bits} [%rd1], {register}; ret;"
    out = np.full(16, 0xAA, np.uint8)
    report = ptx.load(kernel(f".param .u64 out, .param .{declared} value", body)).launch("k", 1, 1, [out, value])
    assert report.ok, report
    assert out.tobytes() == expected + b"\xaa" * (16 - len(expected))


def test_bf16_nan_stays_nan() -> None:
    body = "ld.param.u64 %rd1, [out]; ld.param.b16 %h1, [value]; st.global.b16 [%rd1], %h1; ret;"
    out = np.zeros(1, ml_dtypes.bfloat16)
    ptx.load(kernel(".param .u64 out, .param .bf16 value", body)).launch("k", 1, 1, [out, float("nan")])
    assert np.isnan(out.astype(np.float32))[0]


def test_struct_by_value_and_its_neighbours() -> None:
    body = """
      ld.param.u64 %rd1, [out]; ld.param.u32 %r1, [s+4]; ld.param.u32 %r2, [s+8]; ld.param.u32 %r3, [after];
      st.global.u32 [%rd1], %r1; st.global.u32 [%rd1+4], %r2; st.global.u32 [%rd1+8], %r3; ret;"""
    module = ptx.load(kernel(".param .u64 out, .param .align 4 .b8 s[12], .param .u32 after", body))

    class Struct(ctypes.Structure):
        _fields_ = [("a", ctypes.c_uint32), ("b", ctypes.c_uint32), ("c", ctypes.c_uint32)]

    for value in (struct.pack("<3I", 1, 2, 3), Struct(1, 2, 3), np.array([1, 2, 3], np.uint32)):
        out = np.zeros(3, np.uint32)
        assert module.launch("k", 1, 1, [out, value, 4]).ok
        assert out.tolist() == [2, 3, 4]


COPY = """
  ld.param.u64 %rd1, [y]; ld.param.u64 %rd2, [x]; mov.u32 %r1, %tid.x; mul.wide.u32 %rd3, %r1, 1;
  add.s64 %rd1, %rd1, %rd3; add.s64 %rd2, %rd2, %rd3; ld.global.u8 %r2, [%rd2]; st.global.u8 [%rd1], %r2; ret;"""
TORCH_TYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8,
    torch.uint8, torch.int32, torch.uint32, torch.int64, torch.bool, torch.complex64,
]  # fmt: skip


@pytest.mark.parametrize("dtype", TORCH_TYPES, ids=str)
def test_torch_tensors_in_and_out(dtype: torch.dtype) -> None:
    module = ptx.load(kernel(".param .u64 y, .param .u64 x", COPY))
    x = (
        torch.arange(128, dtype=torch.uint8).view(dtype).clone()
        if dtype != torch.bool
        else torch.ones(128, dtype=dtype)
    )
    y = torch.zeros_like(x)
    report = module.launch("k", 1, 128, [y, x])
    assert report.ok and report.counters.bytes == {"param": 2 * 8 * 128, "global": 2 * 128}
    assert torch.equal(y.view(torch.uint8), x.view(torch.uint8))


def test_views_start_where_they_say() -> None:
    module = ptx.load(kernel(".param .u64 y, .param .u64 x", COPY))
    for whole in (torch.arange(64, dtype=torch.uint8), np.arange(64, dtype=np.uint8)):
        part = whole[16:48]
        y = bytearray(32)
        assert module.launch("k", 1, 32, [y, part]).ok and bytes(y) == bytes(range(16, 48))
        assert module.launch("k", 1, 33, [bytearray(33), part]).errors[0].kind == "out_of_bounds"


def test_same_array_twice_has_one_address() -> None:
    body = """
      ld.param.u64 %rd1, [a]; ld.param.u64 %rd2, [b]; ld.param.u64 %rd4, [out]; sub.s64 %rd3, %rd1, %rd2;
      st.global.u64 [%rd4], %rd3; ret;"""
    module = ptx.load(kernel(".param .u64 out, .param .u64 a, .param .u64 b", body))
    shared, out = np.zeros(4), np.ones(1, np.int64)
    module.launch("k", 1, 1, [out, shared, shared])
    assert out[0] == 0
    module.launch("k", 1, 1, [out, shared, shared.copy()])
    assert out[0] != 0


@pytest.mark.parametrize("align", [1, 4, 16, 256, 4096])
def test_alignment_is_exact(align: int, axpy: str) -> None:
    with ptx.Buffer(np.zeros(4), align=align) as buffer:
        assert buffer.address % align == 0 and buffer.address % (2 * align) == align
    out = np.zeros(1, np.uint64)
    body = "ld.param.u64 %rd1, [p]; ld.param.u64 %rd2, [out]; st.global.u64 [%rd2], %rd1; ret;"
    report = ptx.load(kernel(".param .u64 out, .param .u64 p", body)).launch("k", 1, 1, [out, np.zeros(3)], align=align)
    if align >= 8:
        assert report.ok and int(out[0]) % (2 * align) == align
    else:
        assert [error.kind for error in report.errors] == ["misaligned"]


@pytest.mark.parametrize("align, error", [(0, ValueError), (3, ValueError), (8192, ValueError), (1.5, TypeError)])
def test_bad_alignment(align: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="align must be"):
        ptx.Buffer(np.zeros(4), align=align)


def test_buffer_initialized_and_freed() -> None:
    module = ptx.load(kernel(".param .u64 y, .param .u64 x", COPY))
    buffer = ptx.Buffer(np.zeros(32, np.uint8), initialized=False)
    assert [error.kind for error in module.launch("k", 1, 32, [array().repeat(4), buffer]).errors] == ["uninitialized"]
    assert module.launch("k", 1, 32, [buffer, np.zeros(32, np.uint8)]).ok  # writes it
    assert module.launch("k", 1, 32, [np.zeros(32, np.uint8), buffer]).ok  # the launches share what is known of it
    address = buffer.address
    buffer.free()
    for dangling in (buffer, address):
        errors = module.launch("k", 1, 32, [np.zeros(32, np.uint8), dangling]).errors
        assert [error.kind for error in errors] == ["freed"] and errors[0].count == 32


def test_arrays_are_let_go() -> None:
    """numpy refuses to resize an array while somebody has its buffer; regions are given back too."""
    module = ptx.load(kernel(".param .u64 y, .param .u64 x", COPY))
    y, x = bytearray(4), bytearray(4)
    for _ in range(1500):  # more than there are regions
        module.launch("k", 1, 1, [y, x], threads=1)
    with pytest.raises(ValueError):
        module.launch("k", 1, 1, [y, 1 << 64])
    y.extend(b"1")
    x.extend(b"1")


def test_dlpack_capsule_is_consumed_and_released_once() -> None:
    """As the protocol asks: renamed when taken, its deleter called when the launch is over."""

    class Exporter:
        def __init__(self, versioned: bool) -> None:
            self.versioned = versioned
            self.tensor = torch.zeros(64, dtype=torch.uint8)
            self.capsules: list[Any] = []

        def __dlpack_device__(self) -> tuple[int, int]:
            return 1, 0

        def __dlpack__(self, **options: Any) -> Any:
            if "max_version" in options and not self.versioned:
                raise TypeError("from before DLPack 1.0")
            self.capsules.append(self.tensor.__dlpack__(**options))
            return self.capsules[-1]

    module = ptx.load(kernel(".param .u64 y, .param .u64 x", COPY))
    for versioned, name in ((True, '"used_dltensor_versioned"'), (False, '"used_dltensor"')):
        exporter = Exporter(versioned)
        gone = weakref.ref(exporter.tensor)
        assert module.launch("k", 1, 1, [bytearray(4), exporter]).ok
        assert len(exporter.capsules) == 1 and name in repr(exporter.capsules[0])
        del exporter.tensor
        assert gone() is None


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]  # fmt: skip


class Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p), ("flags", ctypes.c_uint64), ("tensor", DLTensor),
    ]  # fmt: skip


class HandMade:
    """A DLPack exporter whose every field can be chosen: 3 x 2 elements of 2 x 16 bits, 8 bytes into 32."""

    def __init__(self, strides: list[int] | None = None, flags: int = 0, major: int = 1) -> None:
        self.bytes = np.arange(32, dtype=np.uint8)
        self.shape = (ctypes.c_int64 * 2)(3, 2)
        self.strides = (ctypes.c_int64 * 2)(*strides) if strides else None
        data = ctypes.c_void_p(self.bytes.ctypes.data)
        pointer = ctypes.POINTER(ctypes.c_int64)
        tensor = DLTensor(data, 1, 0, 2, 2, 16, 2, self.shape, ctypes.cast(self.strides, pointer), 8)
        self.managed = Versioned(major, 0, None, None, flags, tensor)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, **options: Any) -> Any:
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self.managed), b"dltensor_versioned", None)


def test_dlpack_fields() -> None:
    module = ptx.load(kernel(".param .u64 y, .param .u64 x", COPY))
    for strides in (None, [2, 1]):
        y = bytearray(24)
        assert module.launch("k", 1, 24, [y, HandMade(strides)]).ok and list(y) == list(range(8, 32))
        assert not module.launch("k", 1, 25, [bytearray(25), HandMade(strides)]).ok
    for made, message in (
        (HandMade([1, 3]), "not contiguous"),
        (HandMade([4, 1]), "not contiguous"),
        (HandMade(flags=1), "is read-only"),
        (HandMade(major=2), "a DLPack newer than 1.x"),
    ):
        with pytest.raises(ValueError, match=message):
            module.launch("k", 1, 1, [bytearray(1), made])


# ---- Reports ---------------------------------------------------------------------------------------------------------


def test_report_of_a_clean_launch(axpy: str) -> None:
    x, y = np.arange(100, dtype=np.float32), np.ones(100, np.float32)
    report = ptx.load(axpy).launch("axpy", 4, 32, [y, x, 0.5, 100])
    assert (y == 1 + x).all()
    assert report.ok and report.printed == "" and report.errors == []
    report.raise_for_errors()
    counters = report.counters
    # The last warp has 4 lanes left after the branch: it runs both ways of it.
    assert counters.opcodes["ld.global.f32"] == 12 and counters.opcodes["bra"] == 4
    assert counters.divergent_branches == 1 and counters.mma == 0 and counters.barriers == 0
    assert counters.instructions == sum(counters.opcodes.values())
    assert counters.bytes["global"] == 4 * 100 * 4
    # x, y and y again: 13 sectors each; factor: one a warp.
    assert (counters.global_sectors, counters.global_ideal) == (3 * 13 + 4, 3 * 13 + 4)
    load = next(counted for counted in counters.per_instruction if counted.opcode == "ld.global.f32")
    assert (load.warps, load.lanes, load.source, load.space, load.bytes) == (4, 100, "axpy.cu:9", "global", 400)
    assert axpy.splitlines()[load.line - 1].strip() == "ld.global.f32 %f2, [%rd4];"
    assert str(report).startswith("axpy: no errors; ")


def test_hidden_operations_are_not_counted() -> None:
    """A widening load is one instruction, whatever the machine makes of it."""
    body = "ld.param.s32 %rd1, [n]; ld.param.u64 %rd2, [out]; st.global.u64 [%rd2], %rd1; ret;"
    out = np.zeros(1, np.int64)
    report = ptx.load(kernel(".param .u64 out, .param .s32 n", body)).launch("k", 1, 1, [out, -5])
    assert out[0] == -5 and report.counters.instructions == 4
    opcodes = {"ld.param.s32": 1, "ld.param.u64": 1, "st.global.u64": 1, "ret": 1}
    assert report.counters.opcodes == opcodes and len(report.counters.per_instruction) == 4


def test_counters_can_be_off(axpy: str) -> None:
    y = np.zeros(32, np.float32)
    counters = ptx.load(axpy).launch("axpy", 1, 32, [y, y + 1, 1.0, 32], counters=False).counters
    assert counters.instructions > 0 and counters.opcodes == {} and counters.global_sectors == 0


def test_report_of_a_bug(axpy: str) -> None:
    x, y = ptx.Buffer(np.zeros(90, np.float32)), np.zeros(100, np.float32)
    report = ptx.load(axpy).launch("axpy", 4, 32, [y, x, 0.5, 100])
    (error,) = report.errors
    assert (error.kind, error.opcode, error.count, error.source) == ("out_of_bounds", "ld.global.f32", 10, "axpy.cu:9")
    assert axpy.splitlines()[error.line - 1].strip() == "ld.global.f32 %f3, [%rd5];"
    index = (error.address - x.address) // 4  # whichever of the threads came first
    assert (error.address - x.address) % 4 == 0 and 90 <= index < 100
    assert (error.block, error.warp, error.lane) == ((index // 32, 0, 0), 0, index % 32)
    assert not report.ok
    with pytest.raises(ptx.KernelError) as caught:
        report.raise_for_errors()
    assert caught.value.report is report
    text = str(report)
    for part in ("1 error", "out_of_bounds", f"line {error.line}", "axpy.cu:9", f"{error.address:#x}", "[10 times]"):
        assert part in text
    assert str(caught.value) == text


def test_any_text_comes_out() -> None:
    """Quotes, control characters, UTF-8 and what is none, through printf and file names."""
    text = b'"\\\t\x01\x7f \xc3\xa9 \xf0\x9f\x8c\x8a \xff \xed\xa0\x80 \xc0\x80 \xe2\x82! \xe0\x80\x80\n'
    header = f"""
.extern .func (.param .b32 result) vprintf (.param .b64 format, .param .b64 arguments);
.global .align 1 .b8 text[{len(text) + 1}] = {{{", ".join(map(str, text))}, 0}};"""
    body = """
  .loc 1 5 1
  mov.u64 %rd1, text; cvta.global.u64 %rd1, %rd1; mov.u64 %rd2, 0;
  { .param .b64 p0; .param .b64 p1; .param .b32 r0;
    st.param.b64 [p0], %rd1; st.param.b64 [p1], %rd2;
    call.uni (r0), vprintf, (p0, p1); }
  ld.global.u32 %r1, [%rd2];
  ret;"""
    report = ptx.load(kernel("", body, header) + '.file 1 "a b/\xe9.cu"\n').launch("k", 1, 1, [])
    replaced = '"\\\t\x01\x7f é 🌊 \ufffd \ufffd\ufffd\ufffd \ufffd\ufffd \ufffd\ufffd! \ufffd\ufffd\ufffd\n'
    assert report.printed == replaced
    assert report.errors[0].source == "a b/é.cu:5"


def test_checks_can_be_chosen(axpy: str) -> None:
    x, y = np.zeros(90, np.float32), np.zeros(100, np.float32)
    module = ptx.load(axpy)
    for checks, kinds in (
        ("none", []),
        ({"race"}, []),
        ("memory", ["out_of_bounds"]),
        (["memory", "init"], ["out_of_bounds"]),
    ):
        assert [error.kind for error in module.launch("axpy", 4, 32, [y, x, 0.5, 100], checks=checks).errors] == kinds


def test_globals_are_views(axpy: str) -> None:
    module = ptx.load(axpy)
    assert list(module.globals) == ["factor", "table"] and len(module.globals) == 2
    assert module.globals["factor"].tolist() == [2.0] and module.globals["table"].tolist() == [1, 2, 3, 4]
    y = np.zeros(4, np.float32)
    x = np.ones(4, np.float32)
    module.globals["factor"][0] = 5.0
    assert module.launch("axpy", 1, 4, [y, x, 1.0, 4]).ok and (y == 5).all()
    np.asarray(module.globals["factor"])[:] = 7
    assert module.launch("axpy", 1, 4, [y, x, 1.0, 4]).ok and (y == 12).all()
    with pytest.raises(KeyError):
        module.globals["missing"]
    view = module.globals["factor"]
    del module
    assert view.tolist() == [7.0]  # the view keeps the module's memory


def test_initializers() -> None:
    header = """
      .global .align 8 .u64 pointer = target;
      .global .align 8 .u64 chain[2] = {pointer, target + 8};
      .global .align 4 .f32 reals[3] = {1.5, 0f40400000, -2.0};
      .global .align 8 .f64 wide = 0.1;
      .global .align 2 .b16 halves[3] = {1, -1};
      .global .align 4 .u32 target[4] = {10, 11, 12, 13};"""
    body = """
      ld.global.u64 %rd1, [chain]; ld.global.u64 %rd1, [%rd1]; ld.global.u32 %r1, [%rd1+4];
      ld.global.u64 %rd2, [chain+8]; ld.global.u32 %r2, [%rd2];
      ld.param.u64 %rd3, [out]; st.global.u32 [%rd3], %r1; st.global.u32 [%rd3+4], %r2; ret;"""
    module = ptx.load(kernel(".param .u64 out", body, header))
    out = np.zeros(2, np.uint32)
    assert module.launch("k", 1, 1, [out]).ok
    assert out.tolist() == [11, 12]
    assert module.globals["reals"].tolist() == [1.5, 3.0, -2.0]
    assert module.globals["wide"].tolist() == [0.1] and module.globals["halves"].tolist() == [1, 0xFFFF, 0]


def test_instruction_table() -> None:
    table = ptx.instructions()
    assert "| `mma`" in table or "mma" in table
    assert len(table.splitlines()) > 50


@pytest.mark.parametrize("name", ["avx512", "portable"])
def test_tensor_arithmetic_can_be_forced(name: str) -> None:
    best = ptx._ptx.isa()
    try:
        if name == "avx512" and best != "avx512":
            with pytest.raises(ValueError, match="avx512"):
                ptx._ptx.isa(name)
        else:
            assert ptx._ptx.isa(name) == name and ptx._ptx.isa() == name
        with pytest.raises(ValueError, match="quantum"):
            ptx._ptx.isa("quantum")
    finally:
        ptx._ptx.isa(best)


@pytest.mark.parametrize(
    "target, numerics", [("sm_80", "sm_80"), ("sm_89", "sm_80"), ("sm_90a", "sm_90"), ("sm_120a", "sm_90")]
)
def test_numerics_follow_the_target(target: str, numerics: str) -> None:
    assert ptx._default_numerics(target) == numerics


# ---- Threads and interrupts ------------------------------------------------------------------------------------------


def test_two_threads_launch_one_module(axpy: str) -> None:
    module = ptx.load(axpy)
    failures: list[str] = []

    def work(factor: int) -> None:
        x = np.arange(256, dtype=np.float32)
        for _ in range(50):
            y = np.zeros(256, np.float32)
            report = module.launch("axpy", 8, 32, [y, x, float(factor), 256], threads=2)
            if not report.ok or not (y == 2 * factor * x).all():
                failures.append(str(report))

    threads = [threading.Thread(target=work, args=(factor,)) for factor in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_other_threads_go_on_during_a_launch(spin: str) -> None:
    module = ptx.load(spin)
    launch = threading.Thread(target=module.launch, args=("k", 1, 1, []), kwargs={"budget": 20_000_000})
    launch.start()
    ticks = 0
    while launch.is_alive():
        time.sleep(0.001)
        ticks += 1
    assert ticks > 3


def test_budget_stops_an_endless_loop(spin: str) -> None:
    report = ptx.load(spin).launch("k", 1, 32, [], budget=1000)
    assert [error.kind for error in report.errors] == ["budget"]


def test_ctrl_c_interrupts_a_launch(spin: str, tmp_path: Path) -> None:
    path = tmp_path / "spin.ptx"
    path.write_text(spin)
    code = f"""
import signal
import sparse24.ptx
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs start with it ignored
module = sparse24.ptx.load({str(path)!r})
print("ready", flush=True)
try:
    module.launch("k", 64, 1024, [], budget=2_000_000_000)
except KeyboardInterrupt:
    print("interrupted", flush=True)
assert module.launch("k", 1, 1, [], budget=10).errors
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert output == "interrupted\n" and process.returncode == 0
    assert time.monotonic() - started < 10


def test_exception_of_a_signal_handler_comes_out(spin: str) -> None:
    class Alarm(Exception):
        pass

    def handler(number: int, frame: object) -> None:
        raise Alarm

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(Alarm):
            ptx.load(spin).launch("k", 1, 1, [], budget=2_000_000_000)
    finally:
        signal.signal(signal.SIGALRM, before)


# ---- The libraries ---------------------------------------------------------------------------------------------------


def needed(path: Path) -> set[str]:
    headers = subprocess.run(["readelf", "-d", path], check=True, capture_output=True, text=True).stdout
    return set(re.findall(r"Shared library: \[(.*?)\]", headers))


SYSTEM = r"libstdc\+\+\.so\.6|libm\.so\.6|libgcc_s\.so\.1|libc\.so\.6|libpthread\.so\.0|ld-linux.*"


def test_libraries_link_neither_torch_nor_python() -> None:
    (module,) = PACKAGE.glob("_ptx*.so")
    for library, allowed in ((PACKAGE / "libsparse24ptx.so", SYSTEM), (module, SYSTEM + r"|libsparse24ptx\.so")):
        assert [name for name in needed(library) if not re.fullmatch(allowed, name)] == []
    assert "libsparse24ptx.so" in needed(module)
    headers = subprocess.run(["readelf", "-d", module], check=True, capture_output=True, text=True).stdout
    assert re.search(r"R(UN)?PATH.*\[\$ORIGIN\]", headers)


def test_library_exports_only_its_c_interface() -> None:
    command = ["nm", "-D", "--defined-only", PACKAGE / "libsparse24ptx.so"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    names = {line.split()[-1] for line in lines if line.split()[-2] in "TDB"}
    declared = set(re.findall(r"\b(sparse24_ptx_\w+)\(", (PACKAGE.parent / "csrc" / "ptx" / "api.h").read_text()))
    assert names == declared


def test_the_module_needs_no_torch() -> None:
    """_ptx beside the library, alone in a process, without torch."""
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_ptx", {str(next(PACKAGE.glob("_ptx*.so")))!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.Module(b".version 8.5\\n.target sm_80\\n.address_size 64\\n")
assert not any(name.split(".")[0] in ("torch", "numpy") for name in sys.modules)
maps = open("/proc/self/maps").read()
assert "libsparse24ptx" in maps and "libtorch" not in maps
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import_of_sparse24_leaves_the_emulator_out() -> None:
    code = """if True:
        import sys, sparse24
        assert "sparse24._ptx" not in sys.modules
        sparse24.ptx.load
        assert "sparse24._ptx" in sys.modules"""
    subprocess.run([sys.executable, "-c", code], check=True)


class CLaunch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3), ("block", ctypes.c_uint32 * 3), ("arguments", ctypes.c_void_p),
        ("argument_bytes", ctypes.c_size_t), ("dynamic_shared", ctypes.c_uint32),
        ("shared_limit", ctypes.c_uint32), ("checks", ctypes.c_uint32), ("counters", ctypes.c_uint32),
        ("numerics", ctypes.c_uint32), ("sparse_products", ctypes.c_uint32), ("order", ctypes.c_uint32),
        ("seed", ctypes.c_uint64), ("threads", ctypes.c_uint32), ("budget", ctypes.c_uint64),
        ("interrupted", ctypes.c_void_p), ("context", ctypes.c_void_p),
    ]  # fmt: skip


def test_header_is_c() -> None:
    command = ["cc", "-x", "c", "-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror", "-fsyntax-only", "-I.", "-"]
    header = '#include "csrc/ptx/api.h"\n'
    subprocess.run(command, input=header, text=True, check=True, cwd=PACKAGE.parent)


def test_c_interface(axpy: str) -> None:
    library = ctypes.CDLL(str(PACKAGE / "libsparse24ptx.so"))
    for name in (
        "load",
        "describe",
        "describe_kernel",
        "variable",
        "run",
        "report_json",
        "report_text",
        "instructions",
        "error",
        "isa",
    ):
        text = name not in ("load", "variable", "run")
        getattr(library, f"sparse24_ptx_{name}").restype = ctypes.c_char_p if text else ctypes.c_void_p
    library.sparse24_ptx_allocate.restype = ctypes.c_uint64
    library.sparse24_ptx_allocate.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_int]
    library.sparse24_ptx_free.argtypes = [ctypes.c_uint64]
    for name in (
        *("unload", "describe", "decode", "discard", "describe_kernel"),
        *("finding_count", "run", "report_json", "report_text"),
    ):
        count = {"describe_kernel": 2, "decode": 2, "run": 3}.get(name, 1)
        getattr(library, f"sparse24_ptx_{name}").argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p][:count]
    library.sparse24_ptx_finding_count.restype = ctypes.c_size_t

    line, column = ctypes.c_uint32(), ctypes.c_uint32()
    assert library.sparse24_ptx_load(b"!", ctypes.c_size_t(1)) is None
    assert library.sparse24_ptx_error_kind(ctypes.byref(line), ctypes.byref(column)) == 1 and line.value == 1
    assert b"line 1" in library.sparse24_ptx_error()

    module = library.sparse24_ptx_load(axpy.encode(), ctypes.c_size_t(len(axpy)))
    assert json.loads(library.sparse24_ptx_describe(module))["kernels"] == ["axpy"]
    assert library.sparse24_ptx_error() == b"" and library.sparse24_ptx_error_kind(None, None) == 0
    assert library.sparse24_ptx_decode(module, b"axpy") == 0 and library.sparse24_ptx_decode(module, b"no") == 1
    assert library.sparse24_ptx_error_kind(None, None) == 2

    x, y = np.ones(32, np.float32), np.zeros(32, np.float32)
    addresses = [library.sparse24_ptx_allocate(a.ctypes.data, a.nbytes, 16, 1) for a in (y, x)]
    assert all(addresses)
    arguments = struct.pack("<QQfI", *addresses, 3.0, 32)
    launch = CLaunch(
        (1, 1, 1), (32, 1, 1), ctypes.cast(arguments, ctypes.c_void_p), len(arguments), checks=63, counters=1
    )
    report = library.sparse24_ptx_run(module, b"axpy", ctypes.byref(launch))
    assert report and library.sparse24_ptx_finding_count(report) == 0 and (y == 6).all()
    assert json.loads(library.sparse24_ptx_report_json(report))["findings"] == []
    assert library.sparse24_ptx_report_text(report) == b""
    library.sparse24_ptx_discard(report)

    for change in ({"order": 3}, {"numerics": 4}, {"checks": 64}, {"argument_bytes": 8}):
        wrong = CLaunch.from_buffer_copy(launch)
        for name, value in change.items():
            setattr(wrong, name, value)
        assert library.sparse24_ptx_run(module, b"axpy", ctypes.byref(wrong)) is None
        assert library.sparse24_ptx_error_kind(None, None) == 2

    launch.shared_limit, launch.dynamic_shared = 1000, 1001  # of a smaller device than the text's target
    assert library.sparse24_ptx_run(module, b"axpy", ctypes.byref(launch)) is None
    assert b"a block needs 1001 bytes" in library.sparse24_ptx_error()
    launch.dynamic_shared = 1000

    for address in addresses:
        library.sparse24_ptx_free(address)
    report = library.sparse24_ptx_run(module, b"axpy", ctypes.byref(launch))
    told = library.sparse24_ptx_report_text(report).decode().splitlines()
    assert library.sparse24_ptx_finding_count(report) == len(told) > 0
    assert all(line.startswith("  freed: line ") and "block (0, 0, 0), warp 0, lane 0" in line for line in told)
    library.sparse24_ptx_discard(report)
    library.sparse24_ptx_free(0)
    library.sparse24_ptx_unload(module)
