"""Bugs planted in linear_sm80.cuh and epilogue.cuh: each is found, by wrong numbers or by the check it is for."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import test_linear_kernels as sweep
import torch
from emulated import text_of

SOURCE = """#include "linear_sm80.cuh"
extern "C" __global__ void __launch_bounds__(sparse24::tiles::TILE_{tile}.threads())
    linear_f16_{name}(const __grid_constant__ sparse24::LinearArguments arguments) {{
  using namespace sparse24::tiles;
  linear_tile<sparse24::F16Weight, TILE_{tile}, Loader::{loader}>(arguments);
}}
"""


@dataclass(frozen=True)
class Bug:
    """The text that goes and what comes in its place; `found`: a word of the error, or "numbers" for wrong ones."""

    name: str
    old: str
    new: str
    found: str
    kernel: str = "64x64"
    shape: tuple[int, int, int] = (200, 421, 75)  # rows, columns, tokens: a tail in each, seven column blocks
    splits: int | None = None


BUGS = [
    Bug(
        "no wait before the first block",
        "ptx::cp_async_wait<STAGES - 2>();\n  __syncthreads();\n  unroll",
        "__syncthreads();\n  unroll",
        "async",
    ),
    Bug("no barrier before the first block", "  __syncthreads();\n  unroll<STRIPS>", "  unroll<STRIPS>", "race"),
    Bug(
        "a group too many in flight",
        "          ptx::cp_async_wait<STAGES - 2>();",
        "          ptx::cp_async_wait<STAGES - 1>();",
        "async",
    ),
    Bug("no barrier between blocks", "          __syncthreads();  // the next", "          // the next", "race"),
    Bug("one block copied too many", "left > STAGES - 1;", "left >= STAGES - 1;", "out_of_bounds"),
    Bug("one block copied too few", "left > STAGES - 1;", "left > STAGES;", "bad_metadata"),
    Bug("selector of the other step", "Weight::template mma<STEP>", "Weight::template mma<1 - STEP>", "numbers"),
    Bug("values of the other step", "Index<(STEP + 1) % packed::STEPS>{}", "Index<STEP>{}", "numbers"),
    Bug(
        "A of the stage before",
        "load_a(strip, Index<(STEP + 1) % packed::STEPS>{}, LAST ? next_stage : stage)",
        "load_a(strip, Index<(STEP + 1) % packed::STEPS>{}, stage)",
        "async",
    ),
    Bug(
        "B of the stage before",
        "load_b(Index<(SLOT + 1) % SLOTS>{}, LAST ? next_stage : stage)",
        "load_b(Index<(SLOT + 1) % SLOTS>{}, stage)",
        "async",
    ),
    Bug("x not swizzled", "((thread % 8) ^ (line % 8)) * 16", "(thread % 8) * 16", "numbers"),
    Bug(
        "x swizzled by another rule",
        "(((at.lane / 8) ^ (at.lane % 8)) * 16)",
        "(((at.lane / 8) ^ (at.lane % 4)) * 16)",
        "numbers",
    ),
    Bug(
        "ragged end not cut",
        "copies.copy(q, true, column_block, true)",
        "copies.copy(q, true, column_block, false)",
        "out_of_bounds",
        shape=(64, 100, 3),
    ),
    Bug(
        "ragged end cut short",
        "min(16, row_bytes - column_block * LINE - place)",
        "min(16, row_bytes - 1 - column_block * LINE - place)",
        "numbers",
    ),
    Bug("first blocks counted from the last", "copies.go_to(1 - left);", "copies.go_to(2 - left);", "out_of_bounds"),
    Bug("a line beyond the last token", "max(last_line - line, 0)", "max(last_line - line + 1, 0)", "out_of_bounds"),
    Bug(
        "first line beyond the last token",
        "min(line, last_line)) * arguments.x_stride",
        "line) * arguments.x_stride",
        "out_of_bounds",
        shape=(64, 64, 5),
    ),
    Bug(
        "tile that does not slide back",
        "row_block = min(row_tile * BLOCKS, row_blocks - BLOCKS);",
        "row_block = row_tile * BLOCKS;",
        "out_of_bounds",
        "128x128",
        (130, 421, 75),
    ),
    Bug(
        "features stored twice",
        "if (first_feature + feature >= own_feature)",
        "if (true)",
        "race",
        "128x128",
        (192, 100, 9),
    ),
    Bug(
        "features of the tile before",
        "const int own_feature = to.row_tile * TILE.rows;",
        "const int own_feature = to.row_tile * TILE.rows + 4;",
        "numbers",
    ),
    Bug(
        "store before all have read the ring",
        "  ptx::cp_async_wait<0>();\n  __syncthreads();  // the ring is free",
        "  ptx::cp_async_wait<0>();",
        "race",
    ),
    Bug(
        "store over the group before",
        "first_group += TURNED) {\n    __syncwarp();",
        "first_group += TURNED) {",
        "race",
        "128x128",
    ),
    Bug(
        "read before the warp has written",
        "        }\n    __syncwarp();\n    const int first_token",
        "        }\n    const int first_token",
        "race",
    ),
    Bug(
        "split's sums one row off",
        "const int64_t row = int64_t{blockIdx.z} * e.tokens + token;",
        "const int64_t row = int64_t{blockIdx.z} * e.tokens + token + 1;",
        "out_of_bounds",
        splits=2,
    ),
    Bug(
        "a token beyond the last stored",
        "if (token >= e.tokens || count <= 0) return;",
        "if (count <= 0) return;",
        "out_of_bounds",
    ),
    Bug(
        "a feature beyond the last stored",
        "    if (i >= count) continue;",
        "    if (i > count) continue;",
        "out_of_bounds|race",
        shape=(199, 421, 75),
    ),
    Bug(
        "quads where rows are not aligned",
        "return bytes % (QUAD * number_bytes(type)) == 0;",
        "return bytes % number_bytes(type) == 0;",
        "misaligned",
        shape=(199, 421, 75),
    ),
    Bug(
        "splits overlap",
        "const int first_block = blockIdx.z * arguments.split_blocks;",
        "const int first_block = blockIdx.z * (arguments.split_blocks - 1);",
        "numbers",
        splits=2,
    ),
    Bug(
        "4-byte pieces not cut at the end",
        "max(0, min(4, row_bytes",
        "max(4, min(4, row_bytes",
        "out_of_bounds",
        "64x64_by4",
    ),
    Bug(
        "4-byte pieces swizzled by the wrong line",
        "^ (line % 8)) * 16) + piece % 4 * 4",
        "^ (thread / PIECES_A_LINE % 8)) * 16) + piece % 4 * 4",
        "numbers",
        "64x64_by4",
    ),
    Bug(
        "elements not cut at the end",
        "const uint32_t unit = i * int(sizeof(Unit)) < bytes ?",
        "const uint32_t unit = i * int(sizeof(Unit)) <= bytes ?",
        "out_of_bounds",
        "64x64_by1",
    ),
]


def planted(kernel: str, *edits: tuple[str, str]) -> str:
    """The PTX of one kernel with these edits."""
    tile, _, by = kernel.partition("_by")
    return text_of("linear_f16", SOURCE.format(tile=tile, name=kernel, loader=f"BY_{by or 16}"), *edits)


def run(text: str, kernel: str, shape: tuple[int, int, int], splits: int | None) -> bool:
    """Whether the numbers are right; findings raise."""
    rows, columns, tokens = shape
    (unit,) = (k.unit for k in sweep.KERNELS if k.tile == kernel)
    weight = sweep.weight_of(rows, columns, torch.float16)
    x = sweep.tokens_of(tokens, columns, torch.float16, unit)
    y, _ = sweep.multiply(x, weight, f"linear_f16_{kernel}", splits, modules={"linear_f16": text})
    return torch.equal(y, sweep.product(x, weight).to(y.dtype))


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: re.sub(r"\W+", "-", bug.name))
def test_found(bug: Bug) -> None:
    text = planted(bug.kernel, (bug.old, bug.new))
    if bug.found == "numbers":
        assert not run(text, bug.kernel, bug.shape, bug.splits)
    else:
        with pytest.raises(RuntimeError, match=bug.found):
            run(text, bug.kernel, bug.shape, bug.splits)


@pytest.mark.parametrize("kernel", sorted({bug.kernel for bug in BUGS}))
def test_without_a_bug_nothing_is_found(kernel: str) -> None:
    text = planted(kernel)
    for bug in BUGS:
        if bug.kernel == kernel:
            assert run(text, kernel, bug.shape, bug.splits)
