"""One bug for each row, planted in a kernel of kernels/*.cu by an edit of its source: what test_planted_bugs.py finds.

A row names a kernel, what is edited, and the kind of error to be found. `also` are kinds of errors that follow from it:
where a barrier is missing, a warp that comes too early may meet bytes that nobody has written yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

CHECK_OF = {
    "out_of_bounds": "memory",
    "misaligned": "memory",
    "freed": "memory",
    "read_only": "memory",
    "uninitialized": "init",
    "race_shared": "race",
    "race_warp": "race",
    "race_global": "race",
    "divergent_barrier": "sync",
    "divergent_instruction": "sync",
    "wrong_mask": "sync",
    "exited_lane": "sync",
    "async_in_flight": "async",
    "bad_selector": "tensor",
    "bad_metadata": "tensor",
    "deadlock": None,  # reported whatever checks are on
    "illegal": None,
    "budget": None,
    "trap": None,
}


@dataclass
class Bug:
    name: str
    kernel: str
    kind: str
    edits: Sequence[tuple[str, str]]
    also: Sequence[str] = ()
    freed: Sequence[int] = ()  # arguments whose buffers the host has freed
    still_right: bool = False  # the results are what they should be: only the check knows
    options: dict[str, int] = field(default_factory=dict)  # of the launch

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


BUGS = [
    # ---- memory
    Bug("tail predicate missing", "moving_sum", "out_of_bounds", [("if (start + thread < count) y", "y")]),
    Bug("pitch of another matrix", "sparse_gemm", "out_of_bounds", [("pitch = K / 2;", "pitch = K / 2 + 8;")]),
    Bug(
        "rows and columns swapped",
        "stencil",
        "out_of_bounds",
        [("y[row * columns + column]", "y[column * columns + row]")],
    ),
    Bug("border of the tile forgotten", "stencil", "out_of_bounds", [("tile[WIDTH][WIDTH]", "tile[WIDTH - 1][WIDTH]")]),
    Bug("array one element short", "sort", "out_of_bounds", [("float sorted[COLUMNS];", "float sorted[COLUMNS - 1];")]),
    Bug(
        "vector load off its alignment",
        "polynomial",
        "misaligned",
        [("<const float4*>(x)", "<const float4*>(x + 1)")],
        also=["out_of_bounds"],  # the last
    ),
    Bug("rows of ldmatrix unaligned", "dense_gemm", "misaligned", [("A_PITCH = TILE_K + 8", "A_PITCH = TILE_K + 4")]),
    Bug("input freed", "histogram", "freed", [], freed=[0]),
    Bug("output freed", "transpose", "freed", [], freed=[1]),
    Bug(
        "write to constant memory",
        "polynomial",
        "read_only",
        [
            (
                "auto value =",
                'asm volatile("{ .reg .u64 a; mov.u64 a, coefficients; cvta.const.u64 a, a; "\n'
                '    "st.f32 [a], 0f3f800000; }");\n'
                "  auto value =",
            )
        ],
    ),
    # ---- init
    Bug("half of the metadata not loaded", "sparse_gemm", "uninitialized", [("META_BYTES / 16)", "META_BYTES / 32)")]),
    Bug(
        "half of the bins not cleared",
        "histogram",
        "uninitialized",
        [("i < BINS; i += blockDim.x) own[i] = 0", "i < BINS / 2; i += blockDim.x) own[i] = 0")],
    ),
    Bug(
        "first part not written",
        "last_block",
        "uninitialized",
        [("if (threadIdx.x == 0) parts", "if (threadIdx.x == 0 && blockIdx.x > 0) parts")],
    ),
    Bug(
        "first place of the array not written",
        "sort",
        "uninitialized",
        [("  sorted[place] = value;", "  if (place > 0) sorted[place] = value;")],
    ),
    # ---- race
    Bug(
        "barrier dropped",
        "transpose",
        "race_shared",
        [("  __syncthreads();\n", "")],
        also=["race_warp", "uninitialized"],
    ),
    Bug(
        "barrier before the overwriting dropped",
        "dense_gemm",
        "race_shared",
        [("__syncthreads();  // the tiles may be overwritten", "")],
        also=["race_warp"],
    ),
    Bug(
        "barrier of the pipeline dropped",
        "sparse_gemm",
        "race_shared",
        [("__syncthreads();  // the stage", "// the stage")],
        also=["race_warp", "uninitialized"],
    ),
    Bug(
        "load before the barrier",
        "sparse_gemm",
        "race_shared",
        [
            ("    if (step + STAGES - 1 < steps) load(step + STAGES - 1);\n", ""),
            (
                "    __syncthreads();  // the stage",
                "if (step + STAGES - 1 < steps) load(step + STAGES - 1);\n__syncthreads();  // the stage",
            ),
        ],
        also=["race_warp", "async_in_flight"],  # of others, and of bytes that are on their way already
        still_right=True,
    ),
    Bug(
        "ring of one stage too few",
        "sparse_gemm",
        "race_shared",
        [("shared + (step % STAGES)", "shared + (step % 2)"), ("stage = (step % STAGES)", "stage = (step % 2)")],
        also=["async_in_flight"],
    ),
    Bug(
        "plain add for a shared atomic",
        "histogram",
        "race_shared",
        [("atomicAdd(&own[x[i] % BINS], 1)", "own[x[i] % BINS] += 1")],
        also=["race_warp"],
    ),
    Bug(
        "exchange without syncwarp",
        "warp_exchange",
        "race_warp",
        [("own[lane] = x[i];\n  __syncwarp();", "own[lane] = x[i];")],
        still_right=True,
    ),
    Bug(
        "overwriting without syncwarp",
        "warp_exchange",
        "race_warp",
        [("__syncwarp();  // all", "// all")],
        still_right=True,
    ),
    Bug(
        "plain add for a global atomic",
        "histogram",
        "race_global",
        [("atomicAdd(&bins[i], own[i])", "bins[i] += own[i]")],
    ),
    Bug("plain sum of blocks", "reduce", "race_global", [("atomicAdd(sum, value)", "*sum += value")]),
    Bug(
        "in place across blocks",
        "stencil",
        "race_global",
        [("y[row * columns + column] =", "const_cast<float*>(x)[row * columns + column] =")],
    ),
    Bug(
        "ticket without a fence",
        "last_block",
        "race_global",
        [("  __threadfence();  // what this block has written", "  // what this block has written")],
    ),
    # ---- sync
    Bug(
        "barrier in a loop that some leave early",
        "histogram",
        "divergent_barrier",
        [("    atomicAdd(&own[x[i] % BINS], 1);", "    { atomicAdd(&own[x[i] % BINS], 1); __syncthreads(); }")],
        also=["exited_lane"],
    ),
    Bug(
        "ldmatrix by half a warp",
        "dense_gemm",
        "divergent_instruction",
        [('asm volatile("ldmatrix.sync.aligned.m8n8.x4', 'if (lane < 16) asm volatile("ldmatrix.sync.aligned.m8n8.x4')],
    ),
    Bug(
        "shuffle with half a mask",
        "reduce",
        "wrong_mask",
        [("__shfl_down_sync(0xffffffff", "__shfl_down_sync(0x0000ffff")],
    ),
    Bug(
        "match with the leader's mask",
        "count_keys",
        "wrong_mask",
        [("__match_any_sync(present", "__match_any_sync(1u")],
    ),
    Bug(
        "return before the barrier",
        "moving_sum",
        "exited_lane",
        [("  __syncthreads();\n", "  if (start + thread >= count) return;\n  __syncthreads();\n")],
        still_right=True,
    ),
    Bug(
        "return before syncwarp",
        "warp_exchange",
        "exited_lane",
        [("int value = own", "if (lane == 31) { y[i] = 0; return; }\n  int value = own")],
    ),
    # ---- async. Without this check, the bytes count as not yet written.
    Bug(
        "wait_group off by one",
        "sparse_gemm",
        "async_in_flight",
        [('"n"(STAGES - 2)', '"n"(STAGES - 1)')],
        also=["uninitialized", "race_shared", "race_warp"],  # the bytes arrive after the barrier
    ),
    Bug(
        "border not waited for",
        "moving_sum",
        "async_in_flight",
        [("__pipeline_wait_prior(0)", "__pipeline_wait_prior(1)")],
        also=["uninitialized"],
    ),
    Bug(
        "no wait at all",
        "moving_sum",
        "async_in_flight",
        [("  __pipeline_wait_prior(0);\n", "")],
        also=["uninitialized"],
    ),
    # ---- tensor
    Bug("selector that k32 does not have", "sparse_gemm", "bad_selector", [("multiply<1>", "multiply<3>")]),
    Bug("metadata of zeros", "sparse_gemm", "bad_metadata", [("words[m] = *", "words[m] = 0 & *")]),
    Bug(
        "metadata shifted by one index",
        "sparse_gemm",
        "bad_metadata",
        [("column, words[m]);\n          if (half == 1)", "column, words[m] >> 2);\n          if (half == 1)")],
    ),
    # ---- always reported
    Bug(
        "giver leaves early",
        "handover",
        "deadlock",
        [("++i) {\n      if (i >= 2) wait", "++i) {\n      if (i == 4) return;\n      if (i >= 2) wait")],
    ),
    Bug(
        "barrier counts too many",
        "handover",
        "illegal",
        [('"bar.sync %0, 64;"', '"bar.sync %0, 96;"'), ('"bar.arrive %0, 64;"', '"bar.arrive %0, 96;"')],
        also=["race_shared", "uninitialized"],
    ),
    Bug(
        "lock never released",
        "spin_lock",
        "budget",
        [("      atomicExch(lock, 0);\n", "")],
        options={"budget": 100_000},
    ),
    Bug("endless loop", "sort", "budget", [("    --place;\n", "")], options={"budget": 100_000}),
    Bug("trap", "polynomial", "trap", [("if (i >= quads) return;", "if (i >= quads) __trap();")]),
]
