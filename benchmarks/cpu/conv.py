"""Convolutions: the distinct layers of ResNet-50, the 1x1s of MobileNetV2 (224 px), two of an SRGAN generator (96 px).

Batch 1. sparse24 counts with channels_last, as a sparse model would run; its time on contiguous tensors is recorded
beside it. Dense is F.conv2d and oneDNN prepacked, in both formats, and for float32 onnxruntime on contiguous tensors.
For int8 it is torch's quantized.conv2d_dynamic, which does what ours does: float32 in and out, the scale of x found on
the way. ResNet's stem has three input channels, too few for 2:4, and is not among the layers.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparse24
from benchmarks.cpu import rivals
from benchmarks.cpu.cell import ONNX, OURS, Cell, Place, attempt
from benchmarks.cpu.checks import Exact
from sparse24 import ops

# (input channels, output channels, kernel, stride, side of the input)
NETWORKS: dict[str, list[tuple[int, int, int, int, int]]] = {
    "ResNet-50": [
        *[(64, 64, 1, 1, 56), (64, 64, 3, 1, 56), (64, 256, 1, 1, 56), (256, 64, 1, 1, 56)],
        *[(256, 128, 1, 1, 56), (128, 128, 3, 2, 56), (256, 512, 1, 2, 56)],
        *[(128, 128, 3, 1, 28), (128, 512, 1, 1, 28), (512, 128, 1, 1, 28)],
        *[(512, 256, 1, 1, 28), (256, 256, 3, 2, 28), (512, 1024, 1, 2, 28)],
        *[(256, 256, 3, 1, 14), (256, 1024, 1, 1, 14), (1024, 256, 1, 1, 14)],
        *[(1024, 512, 1, 1, 14), (512, 512, 3, 2, 14), (1024, 2048, 1, 2, 14)],
        *[(512, 512, 3, 1, 7), (512, 2048, 1, 1, 7), (2048, 512, 1, 1, 7)],
    ],
    "MobileNetV2 1x1": [
        (inputs, outputs, 1, 1, side)
        for inputs, outputs, side in [
            *[(32, 16, 112), (16, 96, 112), (96, 24, 56), (24, 144, 56), (144, 24, 56), (144, 32, 28), (32, 192, 28)],
            *[(192, 32, 28), (192, 64, 14), (64, 384, 14), (384, 64, 14), (384, 96, 14), (96, 576, 14), (576, 96, 14)],
            *[(576, 160, 7), (160, 960, 7), (960, 160, 7), (960, 320, 7), (320, 1280, 7)],
        ]
    ],
    "SRGAN": [(64, 64, 3, 1, 96), (64, 256, 3, 1, 96)],  # a residual block's, and that before a pixel shuffle
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.float32}  # the dtype of x
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def name_of(layer: tuple[int, int, int, int, int]) -> str:
    """Such as 64-256 3x3/2 @56."""
    inputs, outputs, kernel, stride, side = layer
    return f"{inputs}-{outputs} {kernel}x{kernel}{f'/{stride}' if stride > 1 else ''} @{side}"


LAYERS = {(network, name_of(layer)): layer for network, layers in NETWORKS.items() for layer in layers}


class Layer:
    """One convolution of one dtype, pruned 2:4 along its input channels; dense and sparse."""

    def __init__(self, layer: tuple[int, int, int, int, int], dtype: str) -> None:
        inputs, outputs, kernel, stride, side = layer
        torch.manual_seed(0)
        self.x = torch.randn(1, inputs, side, side).to(DTYPES[dtype])
        self.dense = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, dtype=DTYPES[dtype]).requires_grad_(False)
        rows = self.dense.weight.permute(0, 2, 3, 1)
        kept = ops.prune_mask(rows.reshape(-1, inputs)).view(rows.shape).permute(0, 3, 1, 2)
        self.dense.weight.copy_(torch.where(kept, self.dense.weight, 0))
        self.integer = dtype == "int8"
        self.geometry = {"stride": self.dense.stride, "padding": self.dense.padding}

    def sparse(self) -> nn.Module:
        layer = sparse24.SparseConv2d.from_dense(self.dense)
        if self.integer:
            layer.quantize()
        weight, scales = self.dense.weight, None
        if self.integer:
            state, (outputs, inputs, *kernel) = layer.state_dict(), weight.shape
            values, meta = (state[name].reshape(-1, state[name].shape[-1]) for name in ("values", "meta"))
            rows = ops.decompress(values, meta, in_features=inputs)
            weight, scales = rows.view(outputs, *kernel, inputs).permute(0, 3, 1, 2), state["scales"]
        self.exact = Exact(weight, scales, self.dense.bias, partial(F.conv2d, **self.geometry))
        self.products = self.exact.products(self.x)
        return layer.pack()

    def rivals(self, threads: int) -> dict[str, Callable[[Tensor], Tensor]]:
        weight, bias = self.dense.weight, self.dense.bias
        if self.integer:
            return {f"conv2d_dynamic {engine}": self._dynamic(engine) for engine in rivals.int8_engines()}
        by_format = {name: weight.contiguous(memory_format=FORMATS[name]) for name in FORMATS}
        found: dict[str, Callable[[Tensor], Tensor]] = {
            f"F.conv2d {name}": partial(F.conv2d, weight=weight, bias=bias, **self.geometry)
            for name, weight in by_format.items()
        }
        if rivals.has_mkldnn(weight.dtype):
            geometry = ([*self.dense.padding], [*self.dense.stride], [1, 1], 1)
            blocked = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, [*self.x.shape])
            for name in FORMATS:
                found[f"oneDNN prepacked {name}"] = lambda x: torch.ops.mkldnn._convolution_pointwise(
                    x, blocked, bias, *geometry, "none", [], ""
                )
        if weight.dtype == torch.float32:
            model = rivals.onnx_conv2d(weight, bias, self.dense.stride, self.dense.padding)
            session = rivals.onnx_layer(model, threads)
            found[ONNX] = lambda x: torch.as_tensor(session(x))
        return found

    def _dynamic(self, engine: str) -> Callable[[Tensor], Tensor]:
        torch.backends.quantized.engine = engine
        weight = self.dense.weight
        scales = weight.abs().amax((1, 2, 3)) / 127
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its deprecation
            q = torch.quantize_per_channel(weight, scales, torch.zeros(len(scales), dtype=torch.long), 0, torch.qint8)
        geometry = ([*self.dense.stride], [*self.dense.padding], [1, 1], 1)
        packed = torch.ops.quantized.conv2d_prepack(q, self.dense.bias, *geometry)
        return lambda x: torch.ops.quantized.conv2d_dynamic(x, packed, False)

    def check(self, name: str, y: Tensor) -> None:
        if not self.integer:
            self.exact.check_reals(name, y, self.products, roundings=1 if name.startswith(OURS) else 2)
        elif name.startswith(OURS):
            self.exact.check_rounded_x(name, y, self.x)
        else:
            self.exact.check_within(name, y, self.products[0], self.exact.own_rounding(self.x, self.x))


class Conv:
    name = "conv"
    budget_s = 0.12
    least_rounds = 3

    def __init__(
        self,
        networks: Sequence[str] = tuple(NETWORKS),
        dtypes: Sequence[str] = tuple(DTYPES),
        threads: Sequence[int] = (1, 2),
    ) -> None:
        self.axes = networks, [dtype for dtype in dtypes if dtype in DTYPES], threads
        self.made: dict[tuple[str, str, str, int], tuple[Layer, dict[str, Callable[[Tensor], Tensor]]]] = {}

    def places(self) -> list[Place]:
        networks, dtypes, threads = self.axes
        return [
            {"network": network, "layer": layer, "dtype": dtype, "threads": count}
            for (network, layer), dtype, count in itertools.product(LAYERS, dtypes, threads)
            if network in networks
        ]

    @torch.no_grad()
    def prepare(self, place: Place) -> Cell:
        key = place["network"], place["layer"], place["dtype"], place["threads"]
        if key not in self.made:
            layer = Layer(LAYERS[key[:2]], key[2])
            sparse = attempt(layer.sparse)
            self.made = {key: (layer, {OURS: sparse, f"{OURS} contiguous": sparse} | layer.rivals(place["threads"]))}
        layer, contenders = self.made[key]
        inputs = {name: layer.x.contiguous(memory_format=memory_format) for name, memory_format in FORMATS.items()}
        calls = {}
        for name, contender in contenders.items():
            x = inputs["contiguous" if name.endswith(("contiguous", ONNX)) else "channels_last"]
            if layer.integer and not name.startswith(OURS):
                x = inputs["contiguous"]  # in which conv2d_dynamic is the faster
            calls[name] = partial(contender, x)
            layer.check(name, attempt(calls[name]) if name.startswith(OURS) else calls[name]())
        return Cell(calls)
