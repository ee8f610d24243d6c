"""The emulator against the hardware, one instruction at a time."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from comparison import Machine, compare, emulator, models, results, sample
from driver import Driver
from instructions import ALL, TENSOR, Instruction

WARPS = 600


@pytest.fixture(scope="module")
def hardware() -> Machine:
    return Driver().run


@pytest.mark.parametrize("instruction", ALL, ids=lambda instruction: instruction.name)
def test_emulator_gives_the_hardware_bits(hardware: Machine, instruction: Instruction, capability: int) -> None:
    difference = compare(hardware, instruction, "sm_90" if capability >= 90 else "sm_80", WARPS)
    assert not difference, "\n" + difference


@pytest.mark.parametrize(
    "instruction", [one for one in TENSOR if one.sums_floats], ids=lambda instruction: instruction.name
)
def test_which_order_of_summing_the_hardware_has(
    hardware: Machine, instruction: Instruction, record_property: Callable[[str, object], None]
) -> None:
    """One of those that the emulator knows; all shares go into the results."""
    data = sample(instruction, WARPS)
    shares = models(instruction, data, results(hardware, instruction, data))
    record_property(f"models {instruction.name}", json.dumps(shares))
    assert max(shares.values()) == 1, json.dumps(shares, indent=1)


def test_a_planted_difference_is_seen(hardware: Machine) -> None:
    """That the two machines are not one: a result that the emulator is given wrongly is told."""
    instruction = next(one for one in TENSOR if "s8" in one.name)
    data = sample(instruction, 4)
    right, wrong = results(hardware, instruction, data), data.copy()
    wrong[2, 0, 5] ^= 1
    assert (right != results(emulator(), instruction, wrong)).any()
