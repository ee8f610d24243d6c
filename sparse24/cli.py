"""The command line: ``sparse24 ptx info | run | check FILE``. Needs the extra ``cli`` (typer, rich, numpy)."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ParamSpec

try:
    import numpy as np
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
except ImportError as error:
    raise SystemExit(f"sparse24: the command line needs {error.name}: pip install 'sparse24[cli]'") from None

import torch

from sparse24 import ptx

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
commands = typer.Typer(no_args_is_help=True, help="Run and check CUDA kernels, as PTX, without a GPU.")
app.add_typer(commands, name="ptx")
_out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)


@app.callback()
def _root() -> None:
    """2:4 structured sparsity for PyTorch, and an emulator for PTX."""


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


# ---- Arguments on the command line -----------------------------------------------------------------------------------

_ARRAY_TYPES: dict[str, Any] = {
    **{"f16": np.float16, "f32": np.float32, "f64": np.float64},
    **{"u8": np.uint8, "u16": np.uint16, "u32": np.uint32, "u64": np.uint64},
    **{"s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64},
    **{"i8": np.int8, "i16": np.int16, "i32": np.int32, "i64": np.int64},
}
_TORCH_TYPES = {"bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_FILLS = "zeros, ones, arange, random, uninitialized or a number"


@dataclass
class Argument:
    """One --arg: what launch() gets, made anew for each launch."""

    make: Callable[[], Any]
    initialized: bool = True


def _filled(kind: str, shape: tuple[int, ...], fill: str, generator: np.random.Generator) -> Any:
    """random: floats uniform in [-1, 1), integers over all values of their type."""
    if kind in _TORCH_TYPES:
        return torch.from_numpy(_filled("f32", shape, fill, generator)).to(_TORCH_TYPES[kind])
    dtype = np.dtype(_ARRAY_TYPES[kind])
    if fill in ("zeros", "uninitialized"):
        return np.zeros(shape, dtype)
    if fill == "ones":
        return np.ones(shape, dtype)
    if fill == "arange":
        return np.arange(np.prod(shape, dtype=np.int64)).astype(dtype).reshape(shape)
    if fill == "random" and dtype.kind == "f":
        return generator.uniform(-1, 1, shape).astype(dtype)
    if fill == "random":
        limits = np.iinfo(dtype)
        return generator.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)
    try:
        return np.full(shape, float(fill) if dtype.kind == "f" else int(fill, 0), dtype)
    except (ValueError, OverflowError):
        raise ValueError(f"'{fill}' is not {_FILLS} of {kind}") from None


def _parsed(text: str, index: int, seed: int) -> Argument:
    if text.startswith("bytes="):
        content = bytes.fromhex(text.removeprefix("bytes="))
        return Argument(lambda: content)
    if text == "null":
        return Argument(lambda: None)
    match = re.fullmatch(r"(\w+?)(?:\[([\d, ]*)\])?(?:=(.*))?", text)
    kind = match[1] if match else ""
    if not match or (kind not in _ARRAY_TYPES and kind not in _TORCH_TYPES):
        if not Path(text).exists():
            raise ValueError(f"is no file, and starts with no type ({' '.join([*_ARRAY_TYPES, *_TORCH_TYPES])})")
        array = np.load(text, allow_pickle=False)
        return Argument(lambda: np.array(array, order="C"))
    if match[2] is None:
        if match[3] is None:
            raise ValueError(f"'{text}' has no value: write {kind}=5, or {kind}[64,64]=random for an array")
        try:
            number = float(match[3]) if kind.startswith(("f", "b", "e")) else int(match[3], 0)
        except ValueError:
            raise ValueError(f"'{match[3]}' is no number of type {kind}") from None
        return Argument(lambda: number)
    shape = tuple(int(extent) for extent in match[2].split(",") if extent.strip())
    fill = match[3] or "zeros"
    make = functools.partial(_filled, kind, shape, fill)
    make(np.random.default_rng(0))  # a wrong fill is an error now
    return Argument(lambda: make(np.random.default_rng([seed, index])), initialized=fill != "uninitialized")


def _extent(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"'{text}' is no extent: write 4 or 4,2,1") from None


def _kernel_of(module: ptx.Module, name: str | None) -> str:
    names = list(module.kernels)
    if name is None and len(names) == 1:
        return names[0]
    if name is None:
        raise ValueError(f"which kernel? --kernel is one of: {', '.join(names) or 'none'}")
    return name


@dataclass
class _Launch:
    """What `run` and `check` share."""

    module: ptx.Module
    kernel: str
    arguments: list[Argument]
    options: dict[str, Any]

    def __call__(self, **more: Any) -> tuple[ptx.Report, list[Any]]:
        values = [argument.make() for argument in self.arguments]
        passed = [
            value if argument.initialized else ptx.Buffer(value, self.options["align"], initialized=False)
            for argument, value in zip(self.arguments, values, strict=True)
        ]
        return self.module.launch(self.kernel, args=passed, **(self.options | more)), values


# ---- Commands --------------------------------------------------------------------------------------------------------

_Parameters = ParamSpec("_Parameters")


def _one_line_errors(command: Callable[_Parameters, None]) -> Callable[_Parameters, None]:
    """Status 2 and one line on stderr for what the user can mend."""

    @functools.wraps(command)
    def wrapped(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (ptx.PtxError, ValueError, TypeError, OSError, EOFError, MemoryError) as error:
            line = " ".join(str(error).split()) or type(error).__name__
            print(f"sparse24: error: {line}", file=sys.stderr)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            print("sparse24: interrupted", file=sys.stderr)
            raise typer.Exit(130) from None

    return wrapped


File = Annotated[Path, typer.Argument(help="PTX text, as nvcc --ptx, Triton or CUTLASS make it.", show_default=False)]
KernelName = Annotated[str | None, typer.Option("--kernel", help="Its name; not needed where there is only one.")]
Grid = Annotated[str, typer.Option(help="Blocks: x, x,y or x,y,z.")]
Block = Annotated[str, typer.Option(help="Threads of a block: x, x,y or x,y,z.")]
Args = Annotated[
    list[str] | None,
    typer.Option(
        "--arg",
        metavar="ARG",
        help=f"One a parameter, in order. An array: 'f16[128,64]=random' ({_FILLS}; none: zeros) or a .npy file. "
        "A number: 'i32=5', 'f32=0.5'. A struct by value: 'bytes=00ff' (hex). A null pointer: 'null'. "
        f"Types: {' '.join([*_ARRAY_TYPES, *_TORCH_TYPES])}.",
    ),
]
Shared = Annotated[int, typer.Option(help="Dynamic shared memory, bytes.")]
Checks = Annotated[str, typer.Option(help=f"all, none, or some of {','.join(ptx.CHECKS)}.")]
NumericsName = Annotated[
    str | None,
    typer.Option(
        "--numerics", help=f"How tensor cores sum: {', '.join(ptx.NUMERICS)}. By default as the file's .target."
    ),
]
Seed = Annotated[int, typer.Option(help="Of random arrays and orders.")]
Threads = Annotated[int, typer.Option(help="Of this machine; 0: one a core.")]
Budget = Annotated[int, typer.Option(help="Warp instructions a block may execute; 0: 100 million.")]
Align = Annotated[int, typer.Option(help="Arrays start at a multiple of this and of no greater power of two.")]


def _launch_of(
    file: Path,
    kernel: str | None,
    grid: str,
    block: str,
    arg: list[str] | None,
    shared: int,
    checks: str,
    numerics: str | None,
    seed: int,
    threads: int,
    budget: int,
    align: int,
) -> _Launch:
    module = ptx.load(file)
    arguments = []
    for index, text in enumerate(arg or []):
        try:
            arguments.append(_parsed(text, index, seed))
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"--arg {index} '{text}': {error}") from None
    options = {
        "grid": _extent(grid),
        "block": _extent(block),
        "shared": shared,
        "checks": checks if checks in ("all", "none") else [name.strip() for name in checks.split(",")],
        "numerics": numerics,
        "seed": seed,
        "threads": threads,
        "budget": budget,
        "align": align,
    }
    return _Launch(module, _kernel_of(module, kernel), arguments, options)


@commands.command()
@_one_line_errors
def info(
    file: File,
    kernel: KernelName = None,
    all_instructions: Annotated[bool, typer.Option("--all", help="The whole instruction mix, not its head.")] = False,
) -> None:
    """Kernels of a file: parameters, memory, registers, instruction mix, and what is not supported."""
    module = ptx.load(file)
    names = [kernel] if kernel else list(module.kernels)
    if names and names[0] not in module.kernels:
        raise ValueError(f"no kernel '{kernel}'; there is: {', '.join(module.kernels) or 'none'}")
    _out.print(escape(f"{file}: PTX {module.version}, {module.target}, {_counted(len(module.kernels), 'kernel')}"))
    if module.globals:
        _out.print(escape("variables: " + ", ".join(f"{name} ({view.nbytes} bytes)" for name, view in _views(module))))
    for name in names:
        _describe(module.kernels[name], all_instructions)


def _views(module: ptx.Module) -> list[tuple[str, memoryview[Any]]]:
    return [(name, module.globals[name]) for name in module.globals]


def _describe(kernel: ptx.Kernel, all_instructions: bool) -> None:
    table = Table(title=escape(kernel.name), title_justify="left", title_style="bold", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("parameters", escape("\n".join(map(str, kernel.parameters)) or "none"))
    table.add_row("shared memory", f"{kernel.shared_bytes} bytes static")
    table.add_row("local memory", f"{kernel.local_bytes} bytes a thread")
    for title, extents in (("at most", kernel.max_threads), ("exactly", kernel.required_threads)):
        if extents:
            table.add_row("threads", f"{title} {extents[0]} x {extents[1]} x {extents[2]}")
    declared = ", ".join(f"{count} .{name}" for name, count in kernel.registers.items())
    table.add_row("registers (virtual)", declared or "none")
    mix = sorted(kernel.instructions.items(), key=lambda item: (-item[1], item[0]))
    shown = mix if all_instructions else mix[:12]
    lines = [f"{count:6,} {opcode}" for opcode, count in shown]
    if len(mix) > len(shown):
        rest = sum(count for _, count in mix[len(shown) :])
        lines.append(f"{rest:6,} of {len(mix) - len(shown)} others (--all)")
    table.add_row(f"{sum(kernel.instructions.values()):,} instructions", escape("\n".join(lines)))
    table.add_row("not supported", escape("\n".join(kernel.unsupported) or "nothing"))
    _out.print(table)


@commands.command()
@_one_line_errors
def run(
    file: File,
    kernel: KernelName = None,
    grid: Grid = "1",
    block: Block = "32",
    arg: Args = None,
    shared: Shared = 0,
    checks: Checks = "all",
    numerics: NumericsName = None,
    order: Annotated[str, typer.Option(help=f"Of blocks and warps: {', '.join(ptx.ORDERS)}.")] = "forward",
    seed: Seed = 0,
    threads: Threads = 0,
    budget: Budget = 0,
    align: Align = 16,
    out: Annotated[
        list[str] | None,
        typer.Option(metavar="N=FILE", help="Saves argument N (from 0, or a parameter's name) as .npy after the run."),
    ] = None,
    lines: Annotated[bool, typer.Option("--lines", help="Counters of each instruction.")] = False,
) -> None:
    """Runs a kernel once; prints what it printed, what the checks found and the counters. Status 1 with findings."""
    launch = _launch_of(file, kernel, grid, block, arg, shared, checks, numerics, seed, threads, budget, align)
    saves = [_save_of(launch, text) for text in out or []]
    report, values = launch(order=order)
    if report.printed:
        sys.stdout.write(report.printed)
    _out.print(escape(str(report)))
    if lines:
        _print_lines(report)
    for index, path in saves:
        _save(values[index], path)
    if not report.ok:
        raise typer.Exit(1)


def _save_of(launch: _Launch, text: str) -> tuple[int, str]:
    which, separator, path = text.partition("=")
    names = [parameter.name for parameter in launch.module.kernels[launch.kernel].parameters]
    index = names.index(which) if which in names else int(which) if which.isdecimal() else -1
    if not separator or not path or not 0 <= index < len(launch.arguments):
        raise ValueError(
            f"--out '{text}' is no N=FILE with N from 0 to {len(launch.arguments) - 1}, or a parameter's name"
        )
    return index, path


def _save(value: Any, path: str) -> None:
    if isinstance(value, torch.Tensor):
        value = value.float().numpy()  # numpy has no such type
    np.save(path, np.asarray(value))


def _print_lines(report: ptx.Report) -> None:
    table = Table("line", "source", "opcode", "warps", "lanes", "diverged", "shared waves", "global sectors", "bytes")
    for counted in report.counters.per_instruction:
        table.add_row(
            str(counted.line),
            escape(counted.source or ""),
            escape(counted.opcode),
            f"{counted.warps:,}",
            f"{counted.lanes:,}",
            f"{counted.diverged:,}" if counted.diverged else "",
            f"{counted.shared_waves:,} / {counted.shared_ideal:,}" if counted.shared_waves else "",
            f"{counted.global_sectors:,} / {counted.global_ideal:,}" if counted.global_sectors else "",
            f"{counted.bytes:,} {counted.space}" if counted.bytes else "",
        )
    _out.print(table)


@commands.command()
@_one_line_errors
def check(
    file: File,
    kernel: KernelName = None,
    grid: Grid = "1",
    block: Block = "32",
    arg: Args = None,
    shared: Shared = 0,
    numerics: NumericsName = None,
    seed: Seed = 0,
    threads: Threads = 0,
    budget: Budget = 0,
    align: Align = 16,
) -> None:
    """Runs a kernel with all checks in four orders of blocks and warps: forward, reverse and two random ones.

    Each finding is printed once. Status 1 with findings. Results that depend on the order are told, but are no finding:
    sums of atomics in floats do.
    """
    launch = _launch_of(file, kernel, grid, block, arg, shared, "all", numerics, seed, threads, budget, align)
    seen: set[tuple[str, int]] = set()
    first: list[Any] | None = None
    for order, order_seed in (("forward", seed), ("reverse", seed), ("random", seed), ("random", seed + 1)):
        report, values = launch(order=order, seed=order_seed)
        new = [error for error in report.errors if (error.kind, error.line) not in seen]
        seen |= {(error.kind, error.line) for error in new}
        name = f"{order} ({order_seed})" if order == "random" else order
        instructions = f"{report.counters.instructions:,} warp instructions"
        _out.print(escape(f"{name}: {_counted(len(report.errors), 'finding')}, {len(new)} new; {instructions}"))
        for error in new:
            _out.print(escape(f"  {error}"))
        first = first or values
        for index, (value, before) in enumerate(zip(values, first, strict=True)):
            if _bytes_of(value) != _bytes_of(before):
                _out.print(escape(f"  argument {index} is not what it was in the forward order"))
    raise typer.Exit(1 if seen else 0)


def _bytes_of(value: Any) -> bytes:
    if isinstance(value, torch.Tensor):
        value = value.view(torch.uint8).numpy()
    return value.tobytes() if isinstance(value, np.ndarray) else b""


def main() -> None:
    app(prog_name="sparse24")


if __name__ == "__main__":
    main()
