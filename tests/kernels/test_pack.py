"""pack_* and unpack_*: equal to a pack written from the PTX ISA, inverse to each other, silent at every edge."""

from __future__ import annotations

import pytest
import torch
from emulated import PackArguments, module, pack
from oracles import ORDERS, assert_silent
from torch import Tensor

from sparse24 import ops
from sparse24.ptx import Buffer, Report

DTYPES = {"b16": torch.float16, "b8": torch.int8}
THREADS = 256  # kernels/pack.cuh
SHAPES = [
    (n, k) for n in (1, 15, 16, 17, 63, 64, 65, 130) for k in (1, 3, 4, 5, 12, 20, 63, 64, 65, 127, 128, 129, 261)
]


def canonical(n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """values and meta of a matrix in which every code comes, and groups with fewer than two nonzeros too."""
    weight = torch.randint(-9, 10, (n, k), generator=torch.Generator().manual_seed(n * 1000 + k)).to(dtype)
    if dtype.is_floating_point:
        weight[:: max(1, n // 3)] *= -0.0
    return ops.prune_compress(weight)


def launch(direction: str, values: Tensor, meta: Tensor, packed: Tensor, k: int, *edits: tuple[str, str]) -> Report:
    """Reads values and meta and writes packed, or the other way round; every check, in every order."""
    kernel = f"{direction}_{'b8' if values.dtype is torch.int8 else 'b16'}"
    packs = direction == "pack"
    for order, seed in ORDERS:
        buffers = [Buffer(tensor, align, initialized) for tensor, align, initialized in (
            (values, values.itemsize, packs), (meta, 1, packs), (packed, 16, not packs))]  # fmt: skip
        arguments = PackArguments(*(buffer.address for buffer in buffers), len(values), k)
        grid = -(-packed.numel() // 4 // THREADS)
        report = module("pack", *edits).launch(kernel, grid, THREADS, [bytes(arguments)], order=order, seed=seed)
        for buffer in buffers:
            buffer.free()
        assert_silent(report)
    return report


def check(name: str, n: int, k: int, *edits: tuple[str, str]) -> None:
    values, meta = canonical(n, k, DTYPES[name])
    codes = torch.stack([meta & 15, meta >> 4], -1).flatten(1)[:, : values.shape[1] // 2].long()
    expected, _, _ = pack(values, torch.stack([codes & 3, codes >> 2], -1).flatten(1))

    packed = torch.full_like(expected, 0xA5)
    launch("pack", values, meta, packed, k, *edits)
    assert torch.equal(packed, expected)

    back = torch.full_like(values, 77), torch.full_like(meta, 0xA5)
    launch("unpack", *back, packed, k, *edits)
    assert torch.equal(back[0].view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(back[1], meta)


@pytest.mark.parametrize("name", DTYPES)
def test_every_edge(name: str) -> None:
    for n, k in SHAPES:
        check(name, n, k)


@pytest.mark.parametrize("name", DTYPES)
def test_illegal_codes_stay_within_bounds(name: str) -> None:
    values, meta = canonical(33, 100, DTYPES[name])
    meta.fill_(0xFF)
    packed, _, _ = pack(values, torch.zeros_like(values, dtype=torch.long))
    launch("pack", values, meta, packed, 100)


BUGS = {
    "padding of values": ("row < arguments.out_features && byte + i < row_bytes, 0, word", "true, 0, word"),
    "filler is zero": ("FILLER * 0x11", "0"),
    "unused half byte kept": ("word |= uint32_t{FILLER} << (shift + 4)", "word |= 0"),
    "half byte not cleared": ("word &= ~(0xf0u << shift)", "word &= ~0u"),
    "groups rounded down": (
        "const int64_t groups = (arguments.in_features + 3) / 4",
        "const int64_t groups = arguments.in_features / 4",
    ),
    "blocks in the other order": (
        "block % rows * BLOCK_ROWS, column_block = block / rows",
        "block / column_blocks(BITS, arguments.in_features) * BLOCK_ROWS, column_block = block % "
        "column_blocks(BITS, arguments.in_features)",
    ),
    "a word beyond the last": ("if (index >= words) return;", "if (index > words) return;"),
    "halves of metadata swapped": (
        "word / 4 + 8 * half, 2 * (word % 4)",
        "word / 4 + 8 * (1 - half), 2 * (word % 4)",
    ),
    "steps of metadata swapped": ("step = word / 32, t = lane % 4", "step = 1 - word / 32, t = lane % 4"),
    "registers transposed": (
        "lane / 4 + 8 * (i & 1), STEP_VALUE_BYTES * step + 16 * (i >> 1)",
        "lane / 4 + 8 * (i >> 1), STEP_VALUE_BYTES * step + 16 * (i & 1)",
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_bug_is_found(bug: str) -> None:
    with pytest.raises(AssertionError):
        for name in DTYPES:
            for n, k in ((65, 65), (130, 261), (17, 12)):
                check(name, n, k, BUGS[bug])
