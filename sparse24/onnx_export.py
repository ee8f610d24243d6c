"""export_onnx(model): a converted model as ONNX, for runtimes that know nothing of sparse24.

Weights are dense there, with the zeros of the pattern in them, and integers what ONNX has for them: QuantizeLinear and
DequantizeLinear. Each sparse layer gives way to one that says its own product so, and torch.onnx does the rest.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse24 import ops
from sparse24.calling import arguments_of, evaluating
from sparse24.conv import SparseConv2d, pad, patches_of
from sparse24.conversion import replace_modules
from sparse24.quantization import fake_quantization
from sparse24.reporting import Outcome, Report
from sparse24.rounding import LEVELS, quantize_rows
from sparse24.sparse_module import SparseModule
from sparse24.support import INT4

OPSET = 21  # the first with int4 and with scales of groups


def export_onnx(model: nn.Module, example_inputs: Any, path: str | Path, **options: Any) -> Report[Outcome]:
    """Write `model` to `path` as ONNX of opset 21, for onnxruntime, TensorRT and the like; the model stays as it is.

    A float layer has its dense weight, in which the pattern's zeros stand (TensorRT runs such weights on sparse tensor
    cores of itself). An integer one has its whole numbers, int8 or int4, before a DequantizeLinear of their scales; x
    goes through QuantizeLinear and DequantizeLinear where the layer has a scale for it, clipped before to 127 times
    that, since ONNX rounds to -128 too. Rounding by token is made of Round and the like, because QuantizeLinear takes
    no scale of each row. Where chain() has layers hand on int8, QuantizeLinear and DequantizeLinear stand between them.

    example_inputs: what the model is called with, as for report(). options: those of torch.onnx.export, among them
    dynamic_shapes, input_names and output_names. Wants the packages onnx and onnxscript.
    Returns one row for each sparse layer: its weights' type there and how x is rounded. Raises RuntimeError where
    layers have fake quantisation still, and what torch.onnx.export raises for a model that it cannot follow.
    Accuracy: the same whole numbers; products are summed in the runtime's float32, so y is within the bound of
    ops.linear for x and W after rounding, and exact where their scales are powers of two. A later layer may round a sum
    that lies between two whole numbers to the other one; where chained layers become QLinearConv or the like, the bias
    is rounded to a multiple of the scales of x and W. NaN and Inf are the runtime's own matter.
    Speed: onnxruntime's CPU kernels multiply such layers in float32.
    """
    faked = [name for name, layer in model.named_modules() if fake_quantization(layer) is not None]
    if faked:
        raise RuntimeError(f"model must be converted before it is exported; fake quantisation stands in {faked}")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SparseModule)}
    exported = _swapped(copy.deepcopy(model))
    arguments, keywords = arguments_of(example_inputs)
    with evaluating(exported):
        program = torch.onnx.export(
            exported, arguments, kwargs=keywords, dynamo=True, opset_version=OPSET, verbose=False, **options
        )
    assert program is not None
    _store_int4(program.model, exported)
    program.save(str(path))
    rows = [Outcome(name, layer._weight_shape(), "exported", _detail(layer)) for name, layer in layers.items()]
    return Report("export onnx", rows)


def _detail(layer: SparseModule) -> str:
    weight = f"{layer.pattern} {layer.weight_dtype}".replace("torch.", "")
    weight += "" if layer.group_size is None else f" in groups of {layer.group_size}"
    return weight if layer.scales is None or layer.weight_only else f"{weight}, x int8 by {layer.x_rounding}"


def _swapped(model: nn.Module) -> nn.Module:
    if isinstance(model, SparseModule):
        return _Exported(model).train(model.training)
    replace_modules(
        model, {id(layer): _Exported(layer) for layer in model.modules() if isinstance(layer, SparseModule)}
    )
    return model


class _Exported(nn.Module):
    """A sparse layer in the words of ONNX: its forward can be exported, and gives nothing of use when it is called.

    weight: [outputs, K] where the product is one of matrices, [O, C, R, S] of a convolution; int8 of an integer layer.
    scales: as of SparseModule, but [outputs, groups].
    """

    weight: Tensor
    bias: Tensor | None
    scales: Tensor | None
    x_scale: Tensor | None
    y_scale: Tensor | None

    def __init__(self, layer: SparseModule) -> None:
        super().__init__()
        self.activation, self.dtype, self.weight_dtype = layer.activation, layer.dtype, layer.weight_dtype
        self.group_size, self.rounds_x = layer.group_size, layer.scales is not None and not layer.weight_only
        self.conv = layer if isinstance(layer, SparseConv2d) else None
        # A convolution is a product of matrices where patches are rounded one by one, or their columns share scales.
        by_token = self.rounds_x and layer.x_rounding == "token"
        patches = self.conv is not None and self.conv.axis == "patch"
        self.is_matrix = self.conv is None or (patches and (by_token or layer.group_size is not None))
        weight = layer._whole_weight().detach()
        self.register_buffer("weight", weight.flatten(1) if self.is_matrix else weight.contiguous())
        bias = None if layer.bias is None else layer.bias.detach()
        self.register_buffer("bias", bias if bias is None or layer.scales is None else bias.float())
        scales = layer.scales
        self.register_buffer("scales", scales if scales is None or scales.dim() == 1 else scales.T.contiguous())
        self.register_buffer("x_scale", layer.x_scale)
        self.register_buffer("y_scale", layer.y_scale)

    def forward(self, x: Tensor) -> Tensor:
        images = x.unsqueeze(0) if self.conv is not None and x.dim() == 3 else x
        y = ops.ACTIVATIONS[self.activation](self._product(images if self.scales is None else images.float()))
        if self.y_scale is not None:
            y = _rounded(y, self.y_scale)  # float32 until the next layer rounds it again, which changes nothing
        elif self.scales is not None:
            y = y.to(self.dtype)
        return y if images is x else y.squeeze(0)

    def _product(self, x: Tensor) -> Tensor:
        if self.conv is None:
            return self._matrix_product(x)
        x = pad(x, self.conv._outer_padding, self.conv.padding_mode)
        if self.is_matrix:
            return self._matrix_product(patches_of(x, self.conv.kernel_size)).permute(0, 3, 1, 2)
        geometry: Any = (self.conv.stride, self.conv._inner_padding, self.conv.dilation, self.conv.groups)
        flat = self._as_rounded(x.flatten(1)).view(x.shape)  # by image, where it has no scale of its own
        return F.conv2d(flat, self._dense_weight(), self.bias, *geometry)

    def _matrix_product(self, x: Tensor) -> Tensor:
        """Of a matrix, which becomes Gemm: of MatMul onnxruntime makes a MatMulNBits, which rounds x once more."""
        rows = self._as_rounded(x).reshape(-1, x.shape[-1])
        return F.linear(rows, self._dense_weight(), self.bias).view(*x.shape[:-1], len(self.weight))

    def _as_rounded(self, x: Tensor) -> Tensor:
        if not self.rounds_x:
            return x
        if self.x_scale is not None:
            return _rounded(x, self.x_scale)
        q, scale = quantize_rows(x)
        return q * scale

    def _dense_weight(self) -> Tensor:
        if self.scales is None:
            return self.weight
        if self.group_size is not None:
            return _dequantized(self.weight, self.scales, axis=1, block_size=self.group_size)
        return _dequantized(self.weight, self.scales, axis=0)


def _rounded(x: Tensor, scale: Tensor) -> Tensor:
    limit = scale * LEVELS[torch.int8]
    # Not x.clamp(): onnxscript 0.7 loses the operands of Min and Max where layers of different scales share an x.
    clipped = _symbolic("Clip", (x.float(), -limit, limit), {}, dtype=torch.float32, shape=x.shape)
    operands = (clipped, scale, torch.zeros((), dtype=torch.int8))
    return _dequantized(_symbolic("QuantizeLinear", operands, {}, dtype=torch.int8, shape=x.shape), scale)


def _dequantized(q: Tensor, scale: Tensor, **attributes: Any) -> Tensor:
    return _symbolic("DequantizeLinear", (q, scale), attributes, dtype=torch.float32, shape=q.shape)


def _symbolic(operator: str, operands: tuple[Tensor, ...], attributes: dict[str, Any], **y: Any) -> Tensor:
    """An operator of ONNX; y: dtype and shape of what it gives."""
    return torch.onnx.ops.symbolic(operator, operands, attributes, version=OPSET, **y)


def _store_int4(graph_model: Any, exported: nn.Module) -> None:
    """Weights of int4 layers, int8 until here because torch.export has nothing smaller, as INT4: half the bytes."""
    import ml_dtypes  # comes with onnxscript, as onnx_ir does
    import onnx_ir

    for name, layer in exported.named_modules():
        if isinstance(layer, _Exported) and layer.weight_dtype is INT4:
            value = graph_model.graph.initializers[f"{name}.weight" if name else "weight"]
            value.const_value = onnx_ir.tensor(layer.weight.numpy().astype(ml_dtypes.int4), name=value.name)
            value.dtype = onnx_ir.DataType.INT4
