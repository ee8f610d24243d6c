"""The shipped kernels launched one by one: their arguments as ctypes, sources with edits, and a pack of our own."""

from __future__ import annotations

import ctypes
import functools
import hashlib
from pathlib import Path

import oracles
import torch
from torch import Tensor

from sparse24 import ptx

SOURCES = Path(__file__).parents[2] / "kernels"
NUMBERS = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int32]  # in the order of linear.cuh
ACTIVATIONS = ["none", "relu", "gelu", "gelu_tanh", "silu"]


@functools.cache
def text_of(name: str, source: str, *edits: tuple[str, str]) -> str:
    """The PTX of `source`, as if it were kernels/<name>.cu, after edits: in each the first text, which is there or in
    one header once, goes."""
    texts = {path.name: path.read_text() for path in sorted(SOURCES.glob("*.cuh"))} | {f"{name}.cu": source}
    for old, new in edits:
        (place,) = (place for place, text in texts.items() if old in text)
        assert texts[place].count(old) == 1, f"{place} has {texts[place].count(old)} times: {old}"
        texts[place] = texts[place].replace(old, new)
    folder = oracles.BUILD / name / hashlib.sha256("\0".join(texts.values()).encode()).hexdigest()[:20]
    folder.mkdir(parents=True, exist_ok=True)
    for place, text in texts.items():
        (folder / place).write_text(text)
    options = ["--ptx", "-arch=compute_80", "-O3", "-std=c++20", "-lineinfo", "-w"]
    return oracles.compiled(folder / f"{name}.cu", ".ptx", options, sorted(folder.glob("*.cuh"))).read_text()


@functools.cache
def module(kernel: str, *edits: tuple[str, str]) -> ptx.Module:
    """kernels/<kernel>.cu, edited."""
    return ptx.load(text_of(kernel, (SOURCES / f"{kernel}.cu").read_text(), *edits))


class Epilogue(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("y", "bias", "residual", "scales", "x_scales", "y_scale")),
        *((name, ctypes.c_int64) for name in ("y_stride", "residual_stride")),
        *((name, ctypes.c_int32) for name in ("y_type", "bias_type", "residual_type", "activation")),
        *((name, ctypes.c_int32) for name in ("x_scale_step", "out_features", "tokens")),
    ]


class LinearArguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("packed", "x")),
        *(("x_stride", ctypes.c_int64), ("partial", ctypes.c_uint64)),
        *((name, ctypes.c_int32) for name in ("in_features", "row_blocks", "column_blocks", "split_blocks")),
        ("epilogue", Epilogue),
    ]


def pack(values: Tensor, places: Tensor) -> tuple[Tensor, int, int]:
    """The packed form of a compressed matrix, and its blocks down and across; written from the PTX ISA's fragments.

    values: [n, 2 * groups]. places: 0 to 3, where in its group each of them stands.
    """
    n, stored = values.shape
    size = values.itemsize
    width = 64 // size  # stored elements of a row in a block
    rows, columns = -(-n // 64) * 64, -(-stored // width) * width
    padded = torch.zeros(rows, columns, dtype=values.dtype)
    padded[:n, :stored] = values
    where = torch.tensor([0, 1]).repeat(rows, columns // 2)
    where[:n, :stored] = places

    def blocks(matrix: Tensor) -> Tensor:  # [across, down, 16, width]
        return matrix.view(rows // 16, 16, columns // width, width).permute(2, 0, 1, 3)

    step, lane = torch.arange(2).view(2, 1, 1, 1), torch.arange(32).view(1, 32, 1, 1)
    g, t = lane // 4, lane % 4
    i, e = torch.arange(4).view(4, 1), torch.arange(4 // size)
    row, column = g + 8 * (i & 1) + 0 * e, step * width // 2 + (16 * (i >> 1) + 4 * t) // size + e
    fragments = blocks(padded)[:, :, row, column].contiguous().view(torch.uint8)

    index = torch.arange(16).view(1, 1, 16)  # of the 2-bit indices in a word of metadata
    lane = lane.view(1, 32, 1)
    g, t = lane // 4, lane % 4
    if size == 2:  # a word serves both steps; each half of it is a row's
        row, column = g + 8 * (index // 8), 16 * (t // 2) + 8 * (t % 2) + index % 8
    else:
        row, column = g + 8 * (t % 2), 32 * torch.arange(2).view(2, 1, 1) + 16 * (t // 2) + index
    words = (blocks(where)[:, :, row, column] << 2 * index).sum(-1).to(torch.uint32).view(torch.uint8)
    across, down = columns // width, rows // 16
    packed = torch.cat([fragments.view(across, down, -1), words.view(across, down, -1)], dim=-1)
    return packed.flatten(), down, across


class PackArguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("values", "meta", "packed")),
        *((name, ctypes.c_int64) for name in ("out_features", "in_features")),
    ]
