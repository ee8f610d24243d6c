"""PTX programs as trees, and an interpreter of them on numpy arrays with an entry for each thread.

A program is a tree of statements. Each statement writes its PTX and knows what it does to the registers of the threads
that come to it; so nothing is parsed, decoded or scheduled here. Registers are unsigned arrays of their width
(predicates are bool, .f32 are their bits); "%d7" is of kind "d".
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
BITS = {"h": 16, "r": 32, "d": 64, "f": 32}
TYPES = {"h": "b16", "r": "b32", "d": "b64", "f": "f32", "p": "pred"}
MAIN = {"h": 4, "r": 6, "d": 4, "f": 4, "p": 3}  # registers that live all through, of each kind
MAIN_NAMES = [f"%{kind}{i}" for kind, count in MAIN.items() for i in range(count)]
INPUTS = sum(MAIN.values()) - MAIN["p"]
SCRATCH = 32  # bytes of each space that a thread has to itself
_NAME = re.compile(r"%[hrdfp]t?\d+\b")


class Frame(dict[str, Array]):
    """The registers of a function, of all threads."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __missing__(self, name: str) -> Array:
        self[name] = np.zeros(self.count, bool if name[1] == "p" else f"uint{BITS[name[1]]}")
        return self[name]

    def write(self, name: str, value: Any, lanes: Array) -> None:
        old, value = self[name], np.asarray(value)
        if value.dtype.kind == "f":
            value = value.view("u4")
        self[name] = np.where(lanes, value.astype(old.dtype), old)


class Threads:
    """What is the same in all functions: who the threads are, and their memory."""

    def __init__(self, grid: int, block: int) -> None:
        self.count = grid * block
        index = np.arange(self.count)
        self.thread, self.block = index % block, index // block
        self.lane = self.thread % 32
        self.first = index - self.lane  # of the warp
        self.last = np.minimum(31, block - 1 - (self.thread - self.lane))  # lane of the warp
        self.size = block
        self.memory = {space: np.zeros((self.count, SCRATCH), np.uint8) for space in ("global", "shared", "local")}


Left = dict[str, Array]  # the threads that went to a label further on


@dataclass(eq=False)
class Op:
    """Instructions for all threads, or those that the guard lets pass."""

    lines: list[str]
    effect: Callable[[Threads, Frame, Array], None]
    defines: tuple[str, ...] = ()
    guard: tuple[str, bool] | None = None

    @property
    def names(self) -> frozenset[str]:
        return frozenset(_NAME.findall(" ".join(self.text())))

    def text(self) -> Iterator[str]:
        guard = f"@{'!' * self.guard[1]}{self.guard[0]} " if self.guard else ""
        for line in self.lines:
            yield f"{guard}{line};"

    def run(self, threads: Threads, frame: Frame, lanes: Array, left: Left) -> Array:
        on = lanes & (frame[self.guard[0]] != self.guard[1]) if self.guard else lanes
        if on.any():
            self.effect(threads, frame, on)
        return lanes

    def parts(self) -> list[list[Any]]:
        return []


@dataclass(eq=False)
class Branch:
    """if, else."""

    predicate: str
    negated: bool
    then: list[Any]
    other: list[Any]
    label: str
    defines: tuple[str, ...] = ()

    @property
    def names(self) -> frozenset[str]:
        return frozenset({self.predicate})

    def text(self) -> Iterator[str]:
        yield f"@{'!' * (not self.negated)}{self.predicate} bra {self.label}_else;"
        yield from text_of(self.then)
        if self.other:
            yield f"bra {self.label}_end;"
        yield f"{self.label}_else:"
        yield from text_of(self.other)
        yield f"{self.label}_end:"

    def run(self, threads: Threads, frame: Frame, lanes: Array, left: Left) -> Array:
        taken = frame[self.predicate] != self.negated
        one = run_all(self.then, threads, frame, lanes & taken, left)
        return one | run_all(self.other, threads, frame, lanes & ~taken, left)

    def parts(self) -> list[list[Any]]:
        return [self.then, self.other]


@dataclass(eq=False)
class Switch:
    """brx.idx over the low bits of a register."""

    index: str
    source: str
    arms: list[list[Any]]
    label: str
    defines: tuple[str, ...] = ()

    @property
    def names(self) -> frozenset[str]:
        return frozenset({self.index, self.source})

    def text(self) -> Iterator[str]:
        labels = [f"{self.label}_{i}" for i in range(len(self.arms))]
        yield f"rem.u32 {self.index}, {self.source}, {len(self.arms)};"
        yield f"{self.label}_list: .branchtargets {', '.join(labels)};"
        yield f"brx.idx {self.index}, {self.label}_list;"
        for label, arm in zip(labels, self.arms, strict=True):
            yield f"{label}:"
            yield from text_of(arm)
            yield f"bra {self.label}_end;"
        yield f"{self.label}_end:"

    def run(self, threads: Threads, frame: Frame, lanes: Array, left: Left) -> Array:
        choice, stay = frame[self.source] % np.uint32(len(self.arms)), np.zeros_like(lanes)
        for i, arm in enumerate(self.arms):
            stay |= run_all(arm, threads, frame, lanes & (choice == i), left)
        return stay

    def parts(self) -> list[list[Any]]:
        return self.arms


@dataclass(eq=False)
class Loop:
    """As many rounds as the low bits of a register say, one more if it is tested at the bottom."""

    counter: str
    predicate: str
    source: str
    mask: int
    bottom: bool
    body: list[Any]
    label: str
    defines: tuple[str, ...] = ()

    @property
    def names(self) -> frozenset[str]:
        return frozenset({self.counter, self.predicate, self.source})

    def text(self) -> Iterator[str]:
        yield f"and.b32 {self.counter}, {self.source}, {self.mask};"
        yield f"{self.label}:"
        if not self.bottom:
            yield f"setp.eq.u32 {self.predicate}, {self.counter}, 0;"
            yield f"@{self.predicate} bra {self.label}_end;"
        yield from text_of(self.body)
        if self.bottom:
            yield f"setp.ne.u32 {self.predicate}, {self.counter}, 0;"
        yield f"sub.u32 {self.counter}, {self.counter}, 1;"
        yield f"@{self.predicate} bra {self.label};" if self.bottom else f"bra {self.label};"
        yield f"{self.label}_end:"

    def run(self, threads: Threads, frame: Frame, lanes: Array, left: Left) -> Array:
        rounds = (frame[self.source] & np.uint32(self.mask)) + np.uint32(self.bottom)
        done = lanes & (rounds == 0)
        inside = lanes & ~done
        while inside.any():
            inside = run_all(self.body, threads, frame, inside, left)
            rounds = rounds - inside
            done |= inside & (rounds == 0)
            inside = inside & (rounds != 0)
        return done

    def parts(self) -> list[list[Any]]:
        return [self.body]


@dataclass(eq=False)
class Region:
    """Statements that may be left for their end. One without a label is only there to stay together."""

    label: str
    body: list[Any]
    defines: tuple[str, ...] = ()
    names: frozenset[str] = frozenset()

    def text(self) -> Iterator[str]:
        yield from text_of(self.body)
        if self.label:
            yield f"{self.label}:"

    def run(self, threads: Threads, frame: Frame, lanes: Array, left: Left) -> Array:
        stay = run_all(self.body, threads, frame, lanes, left)
        return stay | left.pop(self.label, np.zeros_like(stay))

    def parts(self) -> list[list[Any]]:
        return [self.body]


@dataclass(eq=False)
class Leave:
    """To the end of a region; or, from a function, back."""

    predicate: str
    negated: bool
    label: str
    returns: bool
    defines: tuple[str, ...] = ()

    @property
    def names(self) -> frozenset[str]:
        return frozenset({self.predicate})

    def text(self) -> Iterator[str]:
        yield f"@{'!' * self.negated}{self.predicate} {'ret' if self.returns else f'bra {self.label}'};"

    def run(self, threads: Threads, frame: Frame, lanes: Array, left: Left) -> Array:
        go = lanes & (frame[self.predicate] != self.negated)
        left[self.label] = left.get(self.label, np.zeros_like(go)) | go
        return lanes & ~go

    def parts(self) -> list[list[Any]]:
        return []


@dataclass(eq=False)
class Function:
    """A device function; parameters are registers or, in_memory, .param variables."""

    name: str
    parameters: list[str]
    result: str
    in_memory: bool
    body: list[Any] = field(default_factory=list)

    def text(self) -> str:
        own = [name for name in registers_of(self.body) if name not in (*self.parameters, self.result)]
        if self.in_memory:
            own += [*self.parameters, self.result]
            head = f".func (.param .{TYPES[self.result[1]]} out) {self.name} ("
            head += ", ".join(f".param .{TYPES[one[1]]} in{i}" for i, one in enumerate(self.parameters))
            first = [f"ld.param.{TYPES[one[1]]} {one}, [in{i}];" for i, one in enumerate(self.parameters)]
            last = [f"st.param.{TYPES[self.result[1]]} [out], {self.result};"]
        else:
            head = f".func (.reg .{TYPES[self.result[1]]} {self.result}) {self.name} ("
            head += ", ".join(f".reg .{TYPES[one[1]]} {one}" for one in self.parameters)
            first, last = [], []
        return "\n".join([head + ")", "{", declare(own), *first, *text_of(self.body), *last, "ret;", "}\n"])


@dataclass(eq=False)
class Call:
    function: Function
    arguments: list[tuple[str, Callable[[Frame], Any]]]
    target: str
    defines: tuple[str, ...] = ()
    guard: tuple[str, bool] | None = None

    @property
    def names(self) -> frozenset[str]:
        return frozenset(_NAME.findall(" ".join(self.text()))) | {self.function.name}

    def text(self) -> Iterator[str]:
        if not self.function.in_memory:
            guard = f"@{'!' * self.guard[1]}{self.guard[0]} " if self.guard else ""
            yield f"{guard}call ({self.target}), {self.function.name}, ({', '.join(one for one, _ in self.arguments)});"
            return
        yield "{"
        types = [TYPES[one[1]] for one in self.function.parameters]
        for i, (argument, _) in enumerate(self.arguments):
            yield f".param .{types[i]} to{i}; st.param.{types[i]} [to{i}], {argument};"
        yield f".param .{TYPES[self.target[1]]} back;"
        yield f"call (back), {self.function.name}, ({', '.join(f'to{i}' for i in range(len(types)))});"
        yield f"ld.param.{TYPES[self.target[1]]} {self.target}, [back];"
        yield "}"

    def run(self, threads: Threads, frame: Frame, lanes: Array, left: Left) -> Array:
        on = lanes & (frame[self.guard[0]] != self.guard[1]) if self.guard else lanes
        callee = Frame(threads.count)
        for name, (_, value) in zip(self.function.parameters, self.arguments, strict=True):
            callee.write(name, value(frame), on)
        run_all(self.function.body, threads, callee, on, {})
        frame.write(self.target, callee[self.function.result], on)
        return lanes

    def parts(self) -> list[list[Any]]:
        return []


def text_of(statements: list[Any]) -> Iterator[str]:
    for one in statements:
        yield from one.text()


def run_all(statements: list[Any], threads: Threads, frame: Frame, lanes: Array, left: Left) -> Array:
    for one in statements:
        if not lanes.any():
            break
        lanes = one.run(threads, frame, lanes, left)
    return lanes


def walk(statements: list[Any]) -> Iterator[Any]:
    for one in statements:
        yield one
        for part in one.parts():
            yield from walk(part)


def registers_of(statements: list[Any]) -> list[str]:
    names = {name for one in walk(statements) for name in (*one.names, *one.defines)}
    return sorted(name for name in names if name.startswith("%"))


def declare(names: Iterable[str]) -> str:
    kinds: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        kinds[name[1]].append(name)
    return " ".join(f".reg .{TYPES[kind]} {', '.join(some)};" for kind, some in sorted(kinds.items()))


@dataclass
class Program:
    body: list[Any]
    functions: list[Function]

    def lists(self) -> list[list[Any]]:
        """All lists of statements."""
        roots = [self.body, *(function.body for function in self.functions)]
        return roots + [part for root in roots for one in walk(root) for part in one.parts()]

    def called(self) -> list[Function]:
        names = {name for some in self.lists() for one in some for name in one.names}
        return [function for function in self.functions if function.name in names]

    def run(self, threads: Threads, inputs: Array) -> dict[str, Array]:
        """The main registers at the end."""
        frame = Frame(threads.count)
        everyone = np.ones(threads.count, bool)
        for i, name in enumerate(MAIN_NAMES[:INPUTS]):
            frame.write(name, inputs[:, i], everyone)
        for i in range(MAIN["p"]):
            frame[f"%p{i}"] = frame[f"%r{i}"].view(np.int32) < 0
        for memory in threads.memory.values():
            memory.view(np.uint64)[:] = np.stack([frame[f"%d{i}"] for i in range(4)], axis=1)
        with np.errstate(all="ignore"):
            assert run_all(self.body, threads, frame, everyone, {}).all()
        return {name: frame[name] for name in MAIN_NAMES}

    def size(self) -> int:
        return sum(len(some) for some in self.lists())
