"""Run the GPU path of a model on CPU tensors: emulate(). docs/emulator.md has a section on it."""

from __future__ import annotations

import inspect
import json
import os
import signal
from collections.abc import Callable, Iterable, Mapping
from contextlib import ContextDecorator
from threading import Lock
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch._C._dynamo.eval_frame import get_eval_frame_callback

from sparse24 import ops, ptx
from sparse24.ptx_report import Report, read_report

__all__ = ["Emulation", "emulate"]

_ops = torch.ops.sparse24
_Function = TypeVar("_Function", bound=Callable[..., Any])
_counting = Lock()


def _count(change: int) -> None:
    with _counting:
        ops.emulating += change


def _refuse_compilation() -> None:
    """Tracing would run the native functions while it traces, too. A function that could not be traced to its end runs
    as it is, with what it calls still subject to compilation: that has to be refused as well."""
    if torch.compiler.is_compiling() or get_eval_frame_callback() not in (None, False):
        raise RuntimeError("emulate() cannot be used in a function that torch.compile compiles; use it around the call")


class Emulation(ContextDecorator):
    """What emulate() returns: a context manager, also usable as a decorator, and what its launches reported.

    May be entered again after it was left. As a decorator it is entered anew for each call, in any thread.
    """

    def __init__(self, options: tuple[Any, ...], modules: dict[str, str], reports: list[Report | str]) -> None:
        self._options = options
        self._modules = modules
        self._reports = reports  # str: a JSON array of reports that nobody has asked for
        self._id: int | None = None  # of the native emulation while entered

    @property
    def arch(self) -> str:
        """As given: "sm_80"."""
        arch: str = self._options[0]
        return arch

    @property
    def reports(self) -> list[Report]:
        """One for each kernel launched so far, in order, those with findings included.

        While entered, only the thread that entered may ask.
        """
        if self._id is not None:
            _refuse_compilation()
            self._reports.append(_ops.emulation_take_reports(self._id))
        read: list[Report] = []
        for item in self._reports:
            if isinstance(item, Report):
                read.append(item)
            else:
                read += [read_report(launch["kernel"], launch["report"]) for launch in json.loads(item)]
        self._reports[:] = read
        return read

    def __enter__(self) -> Emulation:
        _refuse_compilation()
        if self._id is not None:
            raise RuntimeError("this emulation is entered already; call emulate() again for a second one")
        number = _ops.emulation_push(*self._options)
        try:
            for module, text in self._modules.items():
                _ops.emulation_replace(number, module, text)
        except BaseException:
            _ops.emulation_pop(number)
            raise
        self._id = number
        _count(1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._id is not None
        self._reports.append(_ops.emulation_take_reports(self._id))
        interrupted = _ops.emulation_pop(self._id)
        _count(-1)
        self._id = None
        if interrupted:  # an operator cannot raise KeyboardInterrupt: Python's own handler does, here
            signal.raise_signal(signal.SIGINT)

    def __call__(self, function: _Function) -> _Function:
        later = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)
        if any(check(function) for check in later):
            raise TypeError(f"{function.__qualname__} runs after its call has returned; use `with emulate(...)` in it")
        return super().__call__(function)

    def _recreate_cm(self) -> Emulation:  # contextlib: what a decorated function's call enters
        return Emulation(self._options, self._modules, self._reports)


def emulate(
    arch: str = "sm_80",
    *,
    checks: bool | str | Iterable[str] = True,
    counters: bool = False,
    numerics: str | None = None,
    order: str = "forward",
    seed: int = 0,
    threads: int = 0,
    multiprocessors: int | None = None,
    linear_kernel: str | None = None,
    splits: int | None = None,
    modules: Mapping[str, str | bytes | os.PathLike[str]] | None = None,
) -> Emulation:
    """Within ``with emulate(...) as run:``, CPU tensors of this thread take the GPU's way, on the PTX emulator.

    The same choice of kernel, packing, launch and PTX as on a GPU, for linear (a layer's forward and backward) and
    decompress; anything a check finds raises RuntimeError from the operator, and ``run.reports`` has a Report for each
    kernel launched. Nests: the innermost counts. Slow, by design: thousands of times a GPU's time.

    arch: "sm_80", "sm_86", "sm_87", "sm_89", "sm_90" (or "sm_90a"), "sm_100" or "sm_120". Decides the multiprocessors
        and the shared memory that launches are planned for, and the default of ``numerics``.
    checks: True, False, or as in ptx.Module.launch. Deadlocks and traps are found in any case.
    counters: True fills in ``report.counters``, which costs time.
    numerics: how tensor cores sum, one of ptx.NUMERICS; by default "sm_80" below sm_90, from there on "sm_90".
    order, seed: of blocks and warps, as in ptx.Module.launch.
    threads: of the host; 0: one a core.
    multiprocessors: to plan for a smaller device of the arch.
    linear_kernel, splits: the kernel of the linear product, and into how many parts it splits in_features, instead of
        those that would be chosen. An operator that this kernel cannot run raises RuntimeError.
    modules: PTX, a file or its text, to run in the place of what ships of a file of kernels/: {"decompress": path}.

    Raises ValueError, TypeError and OSError for arguments that are not so; on entering, RuntimeError for an unknown
    arch or module, for a text that is no PTX, and in a function that torch.compile compiles. A compiled model may be
    called inside.
    """
    _refuse_compilation()
    if not _ops.device_archs():
        raise RuntimeError("emulate() needs the device code, which this build was made without")
    options = (
        arch,
        ptx._check_bits({True: "all", False: "none"}[checks] if isinstance(checks, bool) else checks),
        bool(counters),
        -1 if numerics is None else ptx._choice(numerics, ptx.NUMERICS, "numerics"),
        ptx._choice(order, ptx.ORDERS, "order"),
        ptx._integer(seed, "seed", 0, 2**63 - 1),
        ptx._integer(threads, "threads", 0, 2**31 - 1),
        0 if multiprocessors is None else ptx._integer(multiprocessors, "multiprocessors", 1, 2**31 - 1),
        linear_kernel or "",
        0 if splits is None else ptx._integer(splits, "splits", 1, 2**31 - 1),
    )
    texts = {name: ptx.read_text(source).decode(errors="replace") for name, source in (modules or {}).items()}
    return Emulation(options, texts, [])
