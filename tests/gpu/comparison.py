"""An instruction on the hardware and in the emulator, compared bit by bit. `Machine` is either."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from instructions import NUMERICS, PRODUCTS, Instruction, Words, equal, first_difference

import sparse24.ptx

SENTINEL = 0x7FC0DEAD  # in every result before the launch
Machine = Callable[[str, str, int, int, Sequence[Words]], None]  # text, kernel, grid, block, arrays: in place


def emulator(numerics: str = "sm_80", products: int = 0, order: str = "forward") -> Machine:
    def run(text: str, kernel: str, grid: int, block: int, arrays: Sequence[Words]) -> None:
        module = sparse24.ptx.load(text)
        options = {"numerics": numerics, "sparse_products": products, "order": order, "counters": False}
        module.launch(kernel, grid, block, arrays, **options).raise_for_errors()

    return run


def results(machine: Machine, instruction: Instruction, data: Words) -> Words:
    out = np.full((len(data), instruction.results, 32), SENTINEL, np.uint32)
    machine(instruction.text(), "k", len(data), 32, [data, out])
    return out


def sample(instruction: Instruction, warps: int) -> Words:
    return np.ascontiguousarray(instruction.sample(np.random.default_rng(0), warps), dtype=np.uint32)


def compare(hardware: Machine, instruction: Instruction, numerics: str, warps: int) -> str:
    """Empty where both agree. Where sums differ, also which other order of summing would have given the hardware's."""
    data = sample(instruction, warps)
    got = results(hardware, instruction, data)
    difference = first_difference(instruction, data, got, results(emulator(numerics), instruction, data))
    if difference and instruction.sums_floats:
        shares = models(instruction, data, got)
        difference += "\n" + "\n".join(f"{name}: {share:.4%} equal" for name, share in shares.items())
    return difference


def models(instruction: Instruction, data: Words, got: Words) -> dict[str, float]:
    """Of every way to sum that the emulator knows, the share of results that are those of the hardware."""
    shares = {}
    for numerics in NUMERICS:
        for products in PRODUCTS if "mma.sp" in instruction.name else (0,):
            emulated = results(emulator(numerics, products), instruction, data)
            shares[f"{numerics}, {products or 'default'} products"] = float(equal(instruction, got, emulated).mean())
    return dict(sorted(shares.items(), key=lambda item: -item[1]))
