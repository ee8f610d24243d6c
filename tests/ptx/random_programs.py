"""Random legal PTX programs, as trees of random_statements.py."""

from __future__ import annotations

from typing import Any

import numpy as np
from random_operations import INTEGERS, PLAIN, Operations, dtype, held
from random_statements import (
    BITS,
    MAIN_NAMES,
    SCRATCH,
    Array,
    Branch,
    Call,
    Frame,
    Function,
    Leave,
    Loop,
    Op,
    Program,
    Region,
    Switch,
    Threads,
)


class Generator(Operations):
    """Makes a program. `scopes` holds the registers that are defined, of the blocks around the next statement."""

    def __init__(self, seed: int) -> None:
        super().__init__(np.random.default_rng(seed))
        self.functions: list[Function] = []
        self.regions: list[tuple[str, bool]] = []  # label, and whether leaving it is a ret

    def program(self, length: int) -> Program:
        for _ in range(self.below(4)):
            self.function()
        self.scopes = [list(MAIN_NAMES)]
        self.in_kernel = True
        return Program(self.block(length, top=True), self.functions)

    def function(self) -> None:
        kinds = [self.pick("rrdhf") for _ in range(1 + self.below(4))]
        names = [self.name(kind) for kind in kinds]
        result = self.name(self.pick("rrdhf"))
        one = Function(f"f{len(self.functions)}", names, result, self.chance(0.5))
        self.in_kernel, self.scopes = False, [list(names)]
        for target in [*map(self.name, "rdhfp"), result]:  # of each kind there has to be something to read
            one.body.append(self.operation(target[1], target))
            one.body[-1].defines = (target,)
            self.scopes[-1].append(target)
        label = f"L{self.number()}"
        self.regions = [(label, not one.in_memory)]
        one.body.append(Region(label, self.block(6 + self.below(15), depth=1)))
        self.regions = []
        self.functions.append(one)

    def block(self, length: int, depth: int = 0, top: bool = False) -> list[Any]:
        if not top:
            self.scopes.append([])
        statements: list[Any] = []
        while length > 0:
            some, cost = self.statement(min(length, 60), depth, top)
            statements.append(some)
            length -= cost
        if not top:
            self.scopes.pop()
        return statements

    def statement(self, length: int, depth: int, top: bool) -> tuple[Any, int]:
        dice = self.random.random()
        if length > 4 and depth < 4 and dice < 0.16:
            inner = 2 + self.below(min(length, 24))
            return self.structure(inner, depth), inner
        if self.regions and depth > 0 and dice < 0.21:
            label, returns = self.regions[self.below(len(self.regions))]
            predicate, negated = self.guard()
            return Leave(predicate, negated, label, returns), 1
        if self.functions and dice < 0.25:
            return self.call(), 3
        if dice < 0.30:
            return self.defined_twice(), 2
        if dice < 0.42 and self.in_kernel:
            return self.memory_access(), 1
        if dice < 0.50:
            return self.several_results(), 1
        if top and dice < 0.56:
            return self.across_lanes(), 1
        return self.simple(), 1

    def structure(self, length: int, depth: int) -> Any:
        label, kind = f"L{self.number()}", self.below(5)
        if kind == 0:
            predicate, negated = self.guard()
            other = self.block(length // 2, depth + 1) if self.chance(0.6) else []
            return Branch(predicate, negated, self.block(length // 2, depth + 1), other, label)
        if kind == 1:
            source = self.choose("r")
            arms = [self.block(length // 3, depth + 1) for _ in range(2 + self.below(3))]
            return Switch(self.name("r"), source, arms, label)
        if kind == 2:
            self.regions.append((label, False))
            body = self.block(length, depth + 1)
            self.regions.pop()
            return Region(label, body)
        source, counter, predicate = self.choose("r"), self.name("r"), self.name("p")
        return Loop(
            counter, predicate, source, int(self.pick("137")), self.chance(0.5), self.block(length, depth + 1), label
        )

    def defined_twice(self) -> Any:
        """A register that gets its value on either way, by guards or by branches."""
        kind = self.pick("hrdfp")
        target, (predicate, negated) = self.name(kind), self.guard()
        one, other = (self.operation(kind, target) for _ in range(2))
        one.defines = other.defines = (target,)
        if self.chance(0.5):
            one.guard, other.guard = (predicate, negated), (predicate, not negated)
            self.scopes[-1].append(target)
            return Region("", [one, other], (target,))
        ways = []
        for end in (one, other):
            ways.append([*self.block(self.below(3), 4), end])
        self.scopes[-1].append(target)
        return Branch(predicate, negated, ways[0], ways[1], f"L{self.number()}", (target,))

    def call(self) -> Call:
        function = self.functions[self.below(len(self.functions))]
        arguments = [self.read({"f": "f32", "h": "u16", "r": "u32", "d": "u64"}[one[1]]) for one in function.parameters]
        guard = self.guard() if not function.in_memory and self.chance(0.3) else None
        target, defines = self.target(function.result[1], guard)
        return Call(function, arguments, target, defines, guard)

    # ---- what reads or writes more than registers of one thread, or several of them ----

    def targets(self, kinds: str, guard: tuple[str, bool] | None) -> tuple[list[str], tuple[str, ...]]:
        """Different ones. Only the kernel has so many of each kind that they can be written under a guard."""
        while True:
            known = [list(scope) for scope in self.scopes]
            found = [self.target(kind, guard) for kind in kinds]
            if len({name for name, _ in found}) == len(kinds):
                return [name for name, _ in found], tuple(one for _, some in found for one in some)
            self.scopes = known

    def memory_access(self) -> Op:
        guard = self.guard() if self.in_kernel and self.chance(0.3) else None
        space, t = self.pick(["global", "shared", "local"]), self.pick([*INTEGERS, "b16", "b32", "b64", "f32"])
        size = int(t[1:]) // 8
        count = self.pick([1, 1, 1, *(n for n in (2, 4) if n * size <= 16)])
        offset = count * size * self.below(SCRATCH // (count * size))
        address = {"global": "%own_global", "shared": "%own_shared", "local": self.pick(["%own_local", "stack"])}[space]
        name = f".{space}{f'.v{count}' if count > 1 else ''}.{t} "
        load = self.chance(0.5)
        plain = np.dtype(np.float32) if t == "f32" else dtype(t)

        def shown(some: list[str]) -> str:
            return some[0] if count == 1 else "{" + ", ".join(some) + "}"

        if load:
            kinds = ["f"] if t == "f32" else [kind for kind in "hrd" if BITS[kind] >= 8 * size]
            names, defines = self.targets("".join(self.pick(kinds) for _ in range(count)), guard)

            def effect(threads: Threads, frame: Frame, lanes: Array) -> None:
                for i, target in enumerate(names):
                    at = offset + i * size
                    value = np.ascontiguousarray(threads.memory[space][:, at : at + size]).view(plain)[:, 0]
                    frame.write(target, value.view("u4") if t == "f32" else held(value, t, target[1]), lanes)

            return Op([f"ld{name}{shown(names)}, [{address}+{offset}]"], effect, defines, guard)
        values = [self.read("u" + t[1:] if t[0] == "b" else t, wider=True) for _ in range(count)]

        def write(threads: Threads, frame: Frame, lanes: Array) -> None:
            for i, (_, value) in enumerate(values):
                at = offset + i * size
                every = np.ascontiguousarray(np.broadcast_to(value(frame), threads.count)).view(np.uint8)
                threads.memory[space][lanes, at : at + size] = every.reshape(-1, size)[lanes]

        return Op([f"st{name}[{address}+{offset}], {shown([one for one, _ in values])}"], write, (), guard)

    def several_results(self) -> Op:
        guard = self.guard() if self.in_kernel and self.chance(0.3) else None
        if self.chance(0.4):
            text, holds = self.comparison()
            name, q, no = self.pick(["and", "or", "xor"]), self.choose("p"), self.chance(0.5)
            names, defines = self.targets("pp", guard)
            combine = PLAIN[name]

            def compare(threads: Threads, frame: Frame, lanes: Array) -> None:
                yes, other = holds(frame), frame[q] != no
                for target, value in zip(names, (combine(yes, other), combine(~yes, other)), strict=True):
                    frame.write(target, value, lanes)

            text = text.replace("%.", f".{name}.", 1).replace("{}", "|".join(names))
            return Op([f"setp.{text}, {'!' * no}{q}"], compare, defines, guard)
        whole, part, count = self.pick([("r", "h", 2), ("d", "r", 2), ("d", "h", 4)])
        bits = BITS[part]
        if self.chance(0.5):
            value = self.choose(whole)
            names, defines = self.targets(part * count, guard)

            def unpack(threads: Threads, frame: Frame, lanes: Array) -> None:
                source = frame[value]
                for i, target in enumerate(names):
                    if target != "_":
                        frame.write(target, source >> source.dtype.type(i * bits), lanes)

            if not defines and self.chance(0.2):
                names[self.below(count)] = "_"
            return Op([f"mov.b{BITS[whole]} {{{', '.join(names)}}}, {value}"], unpack, defines, guard)
        parts = [self.choose(part) for _ in range(count)]
        target, defines = self.target(whole, guard)

        def pack(threads: Threads, frame: Frame, lanes: Array) -> None:
            value = sum(frame[one].astype(np.uint64) << np.uint64(i * bits) for i, one in enumerate(parts))
            frame.write(target, value, lanes)

        return Op([f"mov.b{BITS[whole]} {target}, {{{', '.join(parts)}}}"], pack, defines, guard)

    def across_lanes(self) -> Op:
        """Where all threads are together. No lane reads of one that the block does not have."""
        which = self.below(6)
        if which == 0:
            name, what = self.pick([("tid.x", "thread"), ("ctaid.x", "block"), ("laneid", "lane")])
            target, defines = self.target("r", None)
            return Op(
                [f"mov.u32 {target}, %{name}"],
                lambda threads, frame, lanes: frame.write(target, getattr(threads, what), lanes),
                defines,
            )
        if which == 1:
            p, no = self.guard()
            target, defines = self.target("r", None)

            def ballot(threads: Threads, frame: Frame, lanes: Array) -> None:
                votes = np.zeros(threads.count, np.uint32)
                np.bitwise_or.at(votes, threads.first, (frame[p] != no).astype(np.uint32) << threads.lane.astype("u4"))
                frame.write(target, votes[threads.first], lanes)

            return Op([f"vote.sync.ballot.b32 {target}, {'!' * no}{p}, %everyone"], ballot, defines)
        if which == 2:
            source, distance = self.choose("r"), self.below(100)
            target, defines = self.target("r", None)
            own = self.name("r")

            def exchange(threads: Threads, frame: Frame, lanes: Array) -> None:
                there = threads.block * threads.size + (threads.thread + distance) % threads.size
                frame.write(target, frame[source][there], lanes)

            lines = [
                f"st.shared.b32 [%exchange], {source}",
                "bar.sync 0",
                f"add.u32 {own}, %tid, {distance}",
                f"rem.u32 {own}, {own}, %threads",
                f"sub.u32 {own}, {own}, %tid",
                f"mad.lo.u32 {own}, {own}, 4, %exchange",
                f"ld.shared.b32 {target}, [{own}]",
                "bar.sync 0",
            ]
            return Op(lines, exchange, (*defines, own))
        mode, source, (b, amount) = self.pick(["up", "down", "bfly", "idx"]), self.choose("r"), self.read("u32")
        (target, p), defines = self.targets("rp", None)

        def shuffle(threads: Threads, frame: Frame, lanes: Array) -> None:
            by = amount(frame).astype(np.int64) & 31
            there = {"up": threads.lane - by, "down": threads.lane + by, "bfly": threads.lane ^ by, "idx": by}[mode]
            inside = (there >= 0) & (there <= threads.last)
            frame.write(target, frame[source][threads.first + np.where(inside, there, threads.lane)], lanes)
            frame.write(p, inside, lanes)

        clamp = "0" if mode == "up" else "%last"
        return Op([f"shfl.sync.{mode}.b32 {target}|{p}, {source}, {b}, {clamp}, %everyone"], shuffle, defines)
