"""Linear layers: ten shapes of transformers, few tokens and many, weights in the caches and out of them.

Hot means that one weight is used again and again, cold that enough copies of it take turns to overflow the last-level
cache. Float weights run in their own type. int8 and int4 (pair 4:8) take float32 in and out, quantise the rows of x on
the way, and meet the dense int8 paths; their weight-only forms take bfloat16 as it is.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cpu import rivals
from benchmarks.cpu.cell import ONNX, OURS, Cell, Place, attempt
from benchmarks.cpu.checks import Exact
from benchmarks.cpu.rivals import Layer
from sparse24 import ops

# (K, N) of the layers of DeiT-S, ViT-B and ViT-L, and two of a 7B language model.
SHAPES = [
    *[(384, 1152), (384, 1536), (1536, 384), (768, 2304), (768, 3072), (3072, 768)],
    *[(1024, 4096), (4096, 1024), (4096, 4096), (4096, 11008)],
]
TOKENS = {"cold": [1, 8, 16], "hot": [1, 8, 16, 64, 197, 1576]}  # 197: one image of 224 px; 1576: eight
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WEIGHT_ONLY = ("int8 weight-only", "int4 weight-only")
WEIGHT_ONLY_TOKENS = [1, 8]
DTYPES = [*FLOATS, "int8", "int4", *WEIGHT_ONLY]
F16_LIMIT = 5e8  # products; torch's own float16 path makes 7 of them a nanosecond: beyond, it is left out
CHECKED = 4  # tokens at either end of x


# Of a cache that many cores share a guest has a part: on one with 480 MB these are read at the speed of memory.
MAX_COLD_BYTES = 256 << 20


def last_level_cache() -> int:
    """Bytes; 32 MiB where Linux does not tell."""
    file = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return int(file.read_text().strip().removesuffix("K")) << 10 if file.exists() else 32 << 20


class Weight:
    """One 2:4 weight [N, K] of one dtype, and what it makes of x in exact arithmetic."""

    def __init__(self, full: Tensor, dtype: str) -> None:
        self.rows, self.columns = full.shape
        self.name = dtype
        self.weight_only = dtype in WEIGHT_ONLY
        self.integer = dtype not in FLOATS
        self.x_dtype = FLOATS.get(dtype, torch.bfloat16 if self.weight_only else torch.float32)
        self.bias = torch.randn(self.rows, generator=torch.Generator().manual_seed(1)).to(self.x_dtype)
        self.scales = None
        self.dtype = FLOATS.get(dtype, torch.int4 if dtype.startswith("int4") else torch.int8)
        if self.dtype == torch.int4:
            self.q = self._rounded(full, "pair 4:8", 7)
            nibbles = (self.q[:, ::2] & 15) | (self.q[:, 1::2] << 4)
            self.values, self.meta = ops.compress(nibbles.view(torch.uint8), "pair 4:8")
        elif self.integer:
            self.q = self._rounded(full, "2:4", 127)
            self.values, self.meta = ops.compress(self.q)
        else:
            self.values, self.meta = ops.prune_compress(full.to(self.dtype))
            self.q = ops.decompress(self.values, self.meta, in_features=self.columns)
        self.exact = Exact(self.q, self.scales, self.bias)
        self.products: dict[int, tuple[Tensor, Tensor]] = {}  # of Exact, by number of tokens
        self.own_rounding: dict[int, Tensor] = {}  # likewise

    def _rounded(self, full: Tensor, pattern: str, most: int) -> Tensor:
        full = torch.where(ops.prune_mask(full, pattern), full, 0)
        self.scales = full.abs().amax(1) / most
        return torch.round(full / self.scales[:, None]).to(torch.int8)

    @cached_property
    def dense(self) -> Tensor:
        """In the type of x."""
        return self.q if self.scales is None else (self.q * self.scales[:, None]).to(self.x_dtype)

    @cached_property
    def onnx(self) -> bytes:
        """As a model of onnxruntime."""
        if self.integer:
            return rivals.onnx_int8(self.q, self.scales, self.bias)
        return rivals.onnx_float32(self.dense, self.bias)

    def x(self, tokens: int) -> Tensor:
        return torch.randn(tokens, self.columns, generator=torch.Generator().manual_seed(2)).to(self.x_dtype)

    def sparse(self) -> Layer:
        packed = ops.pack(self.values, self.meta, in_features=self.columns)
        sizes = {"out_features": self.rows, "in_features": self.columns, "dtype": self.dtype}
        if self.weight_only:
            sizes["weight_only"] = True
        return lambda x: ops.linear(x, packed, self.bias, self.scales, **sizes)

    def check(self, name: str, y: Tensor, x: Tensor) -> None:
        """The first and last tokens of what a layer made of x."""
        ends = torch.tensor(sorted({*range(len(x))[:CHECKED], *range(len(x))[-CHECKED:]}))
        y = y[ends]
        if len(x) not in self.products:
            self.products[len(x)] = self.exact.products(x[ends])
        products = self.products[len(x)]
        if not self.integer or self.weight_only:
            # A rival may round the weight, which is of whole numbers for us, and the sum before its bias is added.
            self.exact.check_reals(name, y, products, roundings=1 if name == OURS else 2)
        elif name == OURS:
            self.exact.check_rounded_x(name, y, x[ends])
        else:
            if len(x) not in self.own_rounding:
                self.own_rounding[len(x)] = self.exact.own_rounding(x[ends], x)
            self.exact.check_within(name, y, products[0], self.own_rounding[len(x)])


class Linear:
    name = "linear"
    budget_s = 0.12
    least_rounds = 3

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]] = tuple(SHAPES),
        tokens: Sequence[int] = tuple(TOKENS["hot"]),
        dtypes: Sequence[str] = tuple(DTYPES),
        threads: Sequence[int] = (1, 2),
        caches: Sequence[str] = tuple(TOKENS),
    ) -> None:
        self.axes = shapes, dtypes, caches, tokens, threads
        self.cold_bytes = min(3 * last_level_cache(), MAX_COLD_BYTES)
        self.full: dict[tuple[int, int], Tensor] = {}  # of the shape at hand
        self.weights: dict[tuple[int, int, str], Weight] = {}  # of the shape and dtype at hand
        self.made: dict[tuple[str, int], list[Layer]] = {}  # of that weight, by contender and what they are tied to

    def places(self) -> list[Place]:
        return [
            {"K": columns, "N": rows, "dtype": dtype, "cache": cache, "M": tokens, "threads": threads}
            for (columns, rows), dtype, cache, tokens, threads in itertools.product(*self.axes)
            if tokens in TOKENS[cache] and (dtype not in WEIGHT_ONLY or tokens in WEIGHT_ONLY_TOKENS)
        ]

    def prepare(self, place: Place) -> Cell:
        weight = self._weight(place["K"], place["N"], place["dtype"])
        x = weight.x(place["M"])
        calls, first_s = {}, {}
        for name, (make, kept_for) in self._makers(weight, place["M"], place["threads"]).items():
            nbytes = weight.values.nbytes + weight.meta.nbytes if name == OURS else weight.q.nbytes
            copies = 1 if place["cache"] == "hot" else math.ceil(self.cold_bytes / nbytes)
            layers = self.made.setdefault((name, kept_for), [])
            tried = attempt if name == OURS else (lambda make: make())
            layers.extend(tried(make) for _ in range(copies - len(layers)))
            begin = time.perf_counter()
            y = tried(lambda layer=layers[0]: layer(x))
            first_s[name] = time.perf_counter() - begin
            weight.check(name, torch.as_tensor(y), x)
            calls[name] = _in_turn(layers[:copies], x)
        return Cell(calls, {"weight_bytes": weight.values.nbytes + weight.meta.nbytes}, first_s)

    def _weight(self, columns: int, rows: int, dtype: str) -> Weight:
        if (columns, rows) not in self.full:
            full = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
            self.full = {(columns, rows): full}
        if (columns, rows, dtype) not in self.weights:
            self.made = {}
            self.weights = {(columns, rows, dtype): Weight(self.full[columns, rows], dtype)}
        return self.weights[columns, rows, dtype]

    def _makers(self, weight: Weight, tokens: int, threads: int) -> dict[str, tuple[Callable[[], Layer], int]]:
        """By contender: what makes its layer, with a copy of the weight of its own, and what that layer is tied to."""
        dense, bias = weight.dense, weight.bias
        makers: dict[str, tuple[Callable[[], Layer], int]] = {OURS: (weight.sparse, 0)}
        if weight.integer and not weight.weight_only:
            for engine in rivals.int8_engines():
                makers[f"quantize_dynamic {engine}"] = (partial(rivals.dynamic_int8_layer, dense, bias, engine), 0)
            makers[ONNX] = (lambda: rivals.onnx_layer(weight.onnx, threads), threads)
            return makers
        if weight.name != "float16" or tokens * dense.numel() <= F16_LIMIT:
            makers["F.linear"] = (lambda: rivals.plain(dense.clone(), bias), 0)
        if weight.name == "float16":
            makers["F.linear, weight kept in float32"] = (lambda: rivals.widened(dense, bias), 0)
        if rivals.has_mkldnn(weight.x_dtype):
            makers["oneDNN prepacked"] = (lambda: rivals.prepacked_layer(dense, bias, tokens), tokens)
        if weight.name == "float32":
            makers[ONNX] = (lambda: rivals.onnx_layer(weight.onnx, threads), threads)
        if weight.weight_only:
            makers["_weight_int8pack_mm"] = (lambda: rivals.weight_only_int8(weight.q.clone(), weight.scales, bias), 0)
        return makers


def _in_turn(layers: list[Layer], x: Tensor) -> Callable[[], object]:
    turn = itertools.cycle(layers)
    return lambda: next(turn)(x)
