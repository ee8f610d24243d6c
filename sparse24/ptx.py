"""Run and check CUDA kernels, as PTX, on the CPU.

``module = load(path_or_text)`` reads PTX of nvcc, Triton or CUTLASS; ``module.launch(kernel, grid, block, args)`` runs
one of its kernels on arrays of the host and returns a Report: what the checks found, and counters. docs/emulator.md
says what is modelled and what is not, and lists the instructions.

Sizes are in bytes, shapes in (x, y, z), lines and columns count from 1. Several threads may launch the same module.
"""

from __future__ import annotations

import json
import math
import numbers
import operator
import os
import re
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

try:
    from sparse24 import _ptx
except ImportError as error:
    raise ImportError(f"the PTX emulator is not built ({error}): run `make build`, or install the wheel") from error

from sparse24._ptx import PtxError
from sparse24.ptx_report import Counters, Error, InstructionCounters, KernelError, Report, read_report, short_name

__all__ = [
    "CHECKS",
    "NUMERICS",
    "ORDERS",
    "Buffer",
    "Counters",
    "Error",
    "InstructionCounters",
    "Kernel",
    "KernelError",
    "Module",
    "Parameter",
    "PtxError",
    "Report",
    "instructions",
    "load",
]

CHECKS = {"memory": 1, "init": 2, "race": 4, "sync": 8, "async": 16, "tensor": 32}
NUMERICS = ("ieee", "sm_80", "sm_90", "float64")
ORDERS = ("forward", "reverse", "random")


# ---- What a module has -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel.

    type: of an element, without its dot ("u64"). size: bytes; more than the type's for a struct passed by value
    (``.b8 name[16]``). pointer: the PTX says so (.ptr); older compilers do not, so any 64-bit integer takes an array.
    """

    name: str
    type: str
    offset: int
    size: int
    align: int
    pointer: bool
    pointer_align: int

    def __str__(self) -> str:
        return f"{short_name(self.name)}: {_declaration(self)}"


@dataclass(frozen=True)
class Kernel:
    """A kernel as its module declares it.

    shared_bytes: static shared memory of a block. local_bytes: of a thread. max_threads, required_threads: .maxntid and
    .reqntid, None where they are not said. unsupported: why it cannot run here, in sentences; empty if it can.
    registers: declared ones by type (virtual: a GPU's compiler maps them to fewer). instructions: how often each
    instruction stands in the text of the kernel and of the functions it calls.
    parameters, shared_bytes and local_bytes are known only where nothing is unsupported.
    """

    name: str
    parameters: tuple[Parameter, ...]
    parameter_bytes: int
    shared_bytes: int
    local_bytes: int
    max_threads: tuple[int, int, int] | None
    required_threads: tuple[int, int, int] | None
    unsupported: tuple[str, ...]
    registers: dict[str, int] = field(repr=False)
    instructions: dict[str, int] = field(repr=False)


class Buffer:
    """An array at a device address, for a pointer with wishes, or one that several launches share.

    array: numpy array, torch CPU tensor, or anything else with the buffer protocol or ``__dlpack__``; contiguous in C
        order and writable. The kernels work in it, without a copy.
    align: its address is a multiple of this and of no greater power of two, so that an access which relies on more is
        found. A power of two up to 4096.
    initialized: False makes its bytes count as never written, for the init check.

    Raises ValueError for an array or alignment that is not so, TypeError for what is no array.
    """

    def __init__(self, array: Any, align: int = 16, initialized: bool = True) -> None:
        self._native = _ptx.Allocation(array, _integer(align, "align", 0, 1 << 31), bool(initialized))
        self.address: int = self._native.address
        self.size: int = self._native.size

    def free(self) -> None:
        """Gives the address back, as cudaFree does: later accesses there are found. The array itself stays."""
        self._native.free()

    def __enter__(self) -> Buffer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.free()

    def __repr__(self) -> str:
        return f"Buffer({self.size} bytes at {self.address:#x})"


# ---- Modules ---------------------------------------------------------------------------------------------------------


def load(path_or_text: str | bytes | os.PathLike[str]) -> Module:
    """Reads PTX from a file, or from a string that holds it (one with a line end, or bytes).

    Raises PtxError where the text is no PTX, with line and column, and OSError for a file that cannot be read.
    """
    return Module(read_text(path_or_text))


def read_text(path_or_text: str | bytes | os.PathLike[str]) -> bytes:
    """A file's content, or the text itself, as load() takes them."""
    if isinstance(path_or_text, bytes):
        return path_or_text
    if isinstance(path_or_text, str) and (not path_or_text or "\n" in path_or_text or "\0" in path_or_text):
        return path_or_text.encode()
    return Path(path_or_text).read_bytes()


def instructions() -> str:
    """The table of supported instructions, in markdown."""
    return _ptx.instructions()


class _Globals(Mapping[str, "memoryview[Any]"]):
    """A module's .global and .const variables by name, as views: what is written there the next launch reads."""

    def __init__(self, native: _ptx.Module, formats: dict[str, str]) -> None:
        self._native = native
        self._formats = formats

    def __getitem__(self, name: str) -> memoryview[Any]:
        view: Any = memoryview(self._native.variable(name))
        element: memoryview[Any] = view.cast("B").cast(self._formats[name])
        return element

    def __iter__(self) -> Iterator[str]:
        return iter(self._formats)

    def __len__(self) -> int:
        return len(self._formats)


class Module:
    """A PTX text, read. Made by load()."""

    def __init__(self, text: bytes) -> None:
        self._native = _ptx.Module(text)
        described = json.loads(self._native.describe())
        self._names: list[str] = described["kernels"]
        self._described: dict[str, Kernel] = {}
        self._lock = threading.Lock()
        self.target: str = described["target"]
        self.version: str = described["version"]
        self.globals: Mapping[str, memoryview[Any]] = _Globals(
            self._native, {variable["name"]: _FORMATS.get(variable["type"], "B") for variable in described["variables"]}
        )

    @property
    def kernels(self) -> dict[str, Kernel]:
        """All kernels by name. Decodes each of them once."""
        return {name: self._kernel(name) for name in self._names}

    def __repr__(self) -> str:
        return f"Module({self.target}, kernels {', '.join(self._names)})"

    def launch(
        self,
        name: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Sequence[Any],
        shared: int = 0,
        checks: str | Iterable[str] = "all",
        numerics: str | None = None,
        *,
        sparse_products: int | None = None,
        order: str = "forward",
        seed: int = 0,
        threads: int | None = None,
        budget: int | None = None,
        counters: bool = True,
        align: int = 16,
    ) -> Report:
        """Runs a kernel to its end and returns what was found and counted.

        grid, block: up to three extents, (x, y, z).
        args: one per parameter. For a pointer: a numpy array, torch CPU tensor or anything else with the buffer
            protocol or ``__dlpack__``, read and written in place; a Buffer; an address as int; None for null. For a
            number: an int, float or numpy scalar. For a struct by value: bytes of its size.
        shared: dynamic shared memory in bytes.
        checks: "all", "none", or some of the names in CHECKS.
        numerics: how tensor cores sum, one of NUMERICS; by default that of the module's .target.
        sparse_products: how many products mma.sp sums at once; by default as many as mma. What hardware does is not
            known.
        order: of blocks, and of the warps in a block: "forward", "reverse" or "random" (by ``seed``).
        threads: of the host; by default one a core.
        budget: warp instructions a block may execute before it is stopped as endless; by default 100 million.
        counters: False saves their time.
        align: of arrays that are no Buffer; see there.

        Raises ValueError and TypeError for arguments that do not fit the kernel or that a driver would refuse, PtxError
        where the kernel has an instruction that is not supported. What the kernel itself does wrong never raises.
        Ctrl-C stops a launch with KeyboardInterrupt.
        """
        kernel = self._kernel(name)
        if kernel.unsupported:
            self._native.decode(name)
            raise PtxError(f"kernel '{name}': " + "; ".join(kernel.unsupported))
        options: dict[str, Any] = {
            "grid": _extents(grid, "grid"),
            "block": _extents(block, "block"),
            "shared": _integer(shared, "shared", 0, 2**32 - 1),
            "checks": _check_bits(checks),
            "counters": bool(counters),
            "numerics": _choice(numerics or _default_numerics(self.target), NUMERICS, "numerics"),
            "sparse_products": _integer(sparse_products or 0, "sparse_products", 0, 64),
            "order": _choice(order, ORDERS, "order"),
            "seed": _integer(seed, "seed", 0, 2**64 - 1),
            "threads": _integer(threads or 0, "threads", 0, 2**32 - 1),
            "budget": _integer(budget or 0, "budget", 0, 2**64 - 1),
        }
        owned: list[Buffer] = []
        try:
            options["arguments"] = _pack(kernel, args, _integer(align, "align", 0, 2**31), owned)
            text = self._native.run(name, **options)
        finally:
            for buffer in owned:
                buffer.free()
        return read_report(name, json.loads(text))

    def _kernel(self, name: str) -> Kernel:
        with self._lock:
            if name not in self._described:
                self._described[name] = _kernel(json.loads(self._native.describe_kernel(name)))
            return self._described[name]


# ---- Arguments -------------------------------------------------------------------------------------------------------

# How the struct module writes a type; memoryviews have the same letters.
_FORMATS = {
    **{"u8": "B", "s8": "b", "b8": "B", "u16": "H", "s16": "h", "b16": "H", "u32": "I", "s32": "i", "b32": "I"},
    **{"u64": "Q", "s64": "q", "b64": "Q", "f32": "f", "f64": "d"},
}
_REALS = {"f16": "e", "bf16": "f", "f32": "f", "f64": "d"}


def _element_size(type_name: str) -> int:
    digits = re.findall(r"\d+", type_name.removesuffix("x2"))
    return int(digits[-1]) // 8 * (2 if type_name.endswith("x2") else 1) if digits else 0


def _declaration(parameter: Parameter) -> str:
    element = _element_size(parameter.type)
    count = "" if element == parameter.size else f"[{parameter.size // element}]"
    return f".{parameter.type}{count}" + (" .ptr" if parameter.pointer else "")


def _integer(value: Any, name: str, low: int, high: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int; got {type(value).__name__}") from None
    if not low <= number <= high:
        raise ValueError(f"{name} must be {low} to {high}; got {number}")
    return number


def _extents(value: int | Sequence[int], name: str) -> tuple[int, ...]:
    values = list(value) if isinstance(value, Iterable) else [value]
    if not 1 <= len(values) <= 3:
        raise ValueError(f"{name} must be one to three ints; got {len(values)}")
    return tuple(_integer(extent, name, 0, 2**32 - 1) for extent in [*values, 1, 1][:3])


def _choice(value: str, names: Sequence[str], what: str) -> int:
    if value not in names:
        raise ValueError(f"{what} must be one of {', '.join(names)}; got {value!r}")
    return names.index(value)


def _check_bits(checks: str | Iterable[str]) -> int:
    if checks == "all":
        return sum(CHECKS.values())
    if checks == "none":
        return 0
    names = [checks] if isinstance(checks, str) else list(checks)
    for name in names:
        if name not in CHECKS:
            raise ValueError(f"checks must be 'all', 'none' or some of {', '.join(CHECKS)}; got {name!r}")
    return sum(CHECKS[name] for name in set(names))


def _default_numerics(target: str) -> str:
    digits = re.match(r"sm_(\d+)", target)
    return "sm_90" if digits and int(digits[1]) >= 90 else "sm_80"


def _pack(kernel: Kernel, args: Sequence[Any], align: int, owned: list[Buffer]) -> bytes:
    """The parameter space. Arrays become Buffers in ``owned``; the same memory twice has one address."""
    if isinstance(args, (str, bytes)) or not isinstance(args, Sequence):
        raise TypeError(f"args must be a list or tuple; got {type(args).__name__}")
    if len(args) != len(kernel.parameters):
        declared = ", ".join(map(str, kernel.parameters)) or "none"
        raise ValueError(
            f"kernel '{kernel.name}' has {len(kernel.parameters)} parameters ({declared}); got {len(args)}"
        )
    space = bytearray(kernel.parameter_bytes)
    for index, (parameter, value) in enumerate(zip(kernel.parameters, args, strict=True)):
        try:
            packed = _pack_one(parameter, value, align, owned)
        except (TypeError, ValueError, BufferError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            which = f"argument {index} ('{short_name(parameter.name)}', {_declaration(parameter)})"
            raise kind(f"{which} {error}") from None
        space[parameter.offset : parameter.offset + parameter.size] = packed
    return bytes(space)


def _pack_one(parameter: Parameter, value: Any, align: int, owned: list[Buffer]) -> bytes:
    size = _element_size(parameter.type)
    if size != parameter.size:
        return _pack_struct(parameter, value)
    pointer = size == 8 and parameter.type in ("u64", "s64", "b64")
    if value is None or isinstance(value, Buffer):
        if not pointer:
            raise TypeError(f"is a number; got {'None' if value is None else 'a Buffer'}")
        return struct.pack("<Q", 0 if value is None else value.address)
    if _is_scalar(value):
        return _pack_number(parameter, value, size)
    if not pointer:
        raise TypeError(f"is a number; got {_described_type(value)}")
    buffer = Buffer(value, align)
    for known in owned:
        if buffer.size and (known._native.host, known.size) == (buffer._native.host, buffer.size):
            buffer.free()
            return struct.pack("<Q", known.address)
    owned.append(buffer)
    return struct.pack("<Q", buffer.address)


def _pack_struct(parameter: Parameter, value: Any) -> bytes:
    try:
        content = memoryview(value).tobytes()
    except TypeError:
        raise TypeError(f"is a struct by value: pass bytes; got {_described_type(value)}") from None
    if len(content) != parameter.size:
        raise ValueError(f"is a struct of {parameter.size} bytes; got {len(content)}")
    return content


def _is_scalar(value: Any) -> bool:
    """Python and numpy numbers, ml_dtypes's too; no arrays, those of one element included."""
    if isinstance(value, (numbers.Real, bool)):
        return True
    if hasattr(value, "__dlpack__"):
        return False
    return getattr(value, "shape", None) == () and hasattr(value, "__float__")


def _described_type(value: Any) -> str:
    kind = type(value)
    shape = getattr(value, "shape", None)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    return name if shape is None else f"{name} of shape {tuple(shape)}"


def _pack_number(parameter: Parameter, value: Any, size: int) -> bytes:
    kind = parameter.type
    integral = isinstance(value, numbers.Integral) or hasattr(value, "__index__")
    if kind in _REALS:
        return _pack_real(kind, value)
    if not integral and type(value).__name__ in ("bool_", "bool"):
        value, integral = bool(value), True
    if not integral:
        # f32 values in .b32 parameters are common; how wide a Python float is meant to be nobody can tell.
        if kind.startswith("b") and getattr(value, "itemsize", None) == size and hasattr(value, "tobytes"):
            return bytes(value.tobytes())
        if kind.startswith("b"):
            raise TypeError(f"has no type: pass a numpy scalar of {size} bytes; got {value!r}")
        raise TypeError(f"is an integer; got {value!r}")
    number = operator.index(value)
    bits = 8 * size
    low, high = -(1 << (bits - 1)), (1 << (bits - 1 if kind.startswith("s") else bits)) - 1
    # compilers write .u32 for a signed int, so that one takes the values of both
    if not low <= number <= high:
        raise ValueError(f"takes {low} to {high}; got {number}")
    return (number % (1 << bits)).to_bytes(size, "little")


def _pack_real(kind: str, value: Any) -> bytes:
    try:
        number = float(value)
        packed = struct.pack("<" + _REALS[kind], number)
    except OverflowError:
        raise ValueError(f"cannot hold {value!r}") from None
    if kind != "bf16":
        return packed
    bits = int.from_bytes(packed, "little")
    if not math.isnan(number):
        bits += 0x7FFF + (bits >> 16 & 1)  # to nearest, ties to even
    return (bits >> 16 | (0x40 if math.isnan(number) else 0)).to_bytes(2, "little")


# ---- From JSON -------------------------------------------------------------------------------------------------------


def _kernel(told: dict[str, Any]) -> Kernel:
    def extents(values: list[int]) -> tuple[int, int, int] | None:
        return (max(values[0], 1), max(values[1], 1), max(values[2], 1)) if any(values) else None

    return Kernel(
        name=told["name"],
        parameters=tuple(Parameter(**parameter) for parameter in told["parameters"]),
        parameter_bytes=told["parameter_bytes"],
        shared_bytes=told["shared_bytes"],
        local_bytes=told["local_bytes"],
        max_threads=extents(told["max_threads"]),
        required_threads=extents(told["required_threads"]),
        unsupported=tuple(told["unsupported"]),
        registers=told["registers"],
        instructions=told["instructions"],
    )
