"""The dense layers that a sparse one has to beat: torch's own paths, and onnxruntime's."""

from __future__ import annotations

import contextlib
import copy
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import onnxruntime
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import quantization
from torch import Tensor, nn

Layer = Callable[[Tensor], object]


def has_mkldnn(dtype: torch.dtype) -> bool:
    """Whether oneDNN has this type on this machine."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype != torch.float16 or bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def plain(dense: Tensor, bias: Tensor) -> Layer:
    return lambda x: F.linear(x, dense, bias)


def prepacked_layer(dense: Tensor, bias: Tensor, tokens: int) -> Layer:
    """oneDNN's own layout for this number of tokens."""
    blocked = torch.ops.mkldnn._reorder_linear_weight(dense, tokens)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, blocked, bias, "none", [], "")


def widened(dense: Tensor, bias: Tensor) -> Layer:
    """A half-precision layer that keeps its weight in float32, twice the bytes, and runs there."""
    wide, wide_bias = dense.float(), bias.float()
    return lambda x: F.linear(x.float(), wide, wide_bias).to(x.dtype)


def dynamic_int8_layer(dense: Tensor, bias: Tensor, engine: str) -> Layer:
    layer = nn.Linear(dense.shape[1], dense.shape[0], device="meta")
    layer.weight, layer.bias = nn.Parameter(dense, requires_grad=False), nn.Parameter(bias, requires_grad=False)
    return dynamic_int8(nn.Sequential(layer), engine, inplace=True)[0]


def weight_only_int8(q: Tensor, scales: Tensor, bias: Tensor) -> Layer:
    scales = scales.to(bias.dtype)
    return lambda x: torch._weight_int8pack_mm(x, q, scales).add_(bias)


# ---- torch, whole models ---------------------------------------------------------------------------------------------


class PrepackedLinear(nn.Module):
    """nn.Linear with its weight in oneDNN's blocked layout, as torch.compile's freezing lays it out."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def prepacked(model: nn.Module) -> nn.Module:
    """A copy of the model that runs on PrepackedLinear."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(name, PrepackedLinear(module))
    return model


def int8_engines() -> list[str]:
    """torch's engines for dynamic int8 that may be the fastest on this machine."""
    supported = torch.backends.quantized.supported_engines
    return [engine for engine in ("x86", "onednn") if engine in supported] or ["qnnpack"]


def dynamic_int8(model: nn.Module, engine: str, inplace: bool = False) -> nn.Module:
    """The model, or a copy of it, by torch's own dynamic int8 quantisation, on one of its engines."""
    torch.backends.quantized.engine = engine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its deprecation
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=inplace)


# ---- onnxruntime -----------------------------------------------------------------------------------------------------


def onnx_float32(dense: Tensor, bias: Tensor) -> bytes:
    """x @ dense.T + bias as a model: MatMul and Add, which onnxruntime fuses."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["product"]), helper.make_node("Add", ["product", "bias"], ["y"])]
    return _model(nodes, {"w": dense.T, "bias": bias}, *dense.shape)


def onnx_int8(q: Tensor, scales: Tensor, bias: Tensor) -> bytes:
    """The same of an int8 weight, as onnxruntime.quantization.quantize_dynamic makes it per channel."""
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "x_scale", "x_zero"]),
        helper.make_node("MatMulInteger", ["xq", "w", "x_zero", "w_zero"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["product"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x_scale", "w_scale"], ["scale"]),
        helper.make_node("Mul", ["product", "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "bias"], ["y"]),
    ]
    zero = torch.zeros_like(scales, dtype=torch.int8)
    return _model(nodes, {"w": q.T, "w_zero": zero, "w_scale": scales, "bias": bias}, *q.shape)


def onnx_conv2d(weight: Tensor, bias: Tensor, stride: tuple[int, ...], padding: tuple[int, ...]) -> bytes:
    """A convolution of float32 as a model; x and y are contiguous."""
    node = helper.make_node("Conv", ["x", "w", "bias"], ["y"], strides=[*stride], pads=[*padding, *padding])
    size: list[str | int] = ["height", "width"]
    return _model([node], {"w": weight, "bias": bias}, *weight.shape[:2], size)


def _model(
    nodes: list, constants: dict[str, Tensor], outputs: int, inputs: int, size: Sequence[str | int] = ()
) -> bytes:
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", inputs, *size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", outputs, *(f"out_{one}" for one in size)])],
        [numpy_helper.from_array(tensor.contiguous().numpy(), name) for name, tensor in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return bytes(model.SerializeToString())


def onnx_export(model: nn.Module, x: Tensor) -> bytes:
    """A model of one input, whose first dimension may then be any, by torch's own exporter."""
    batch = ({0: torch.export.Dim.DYNAMIC},)
    with _quiet():
        program = torch.onnx.export(model, (x,), input_names=["x"], dynamic_shapes=batch, verbose=False)
    assert program is not None
    return bytes(program.model_proto.SerializeToString())


def onnx_quantize(model: bytes) -> bytes:
    """The same with int8 weights per channel and x rounded at every call, as onnxruntime quantizes it."""
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "model.onnx"
        path.write_bytes(model)
        products, integers = ["MatMul", "Gemm"], quantization.QuantType.QInt8
        quantization.quantize_dynamic(path, path, products, per_channel=True, weight_type=integers)
        return path.read_bytes()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's advice to install and to preprocess."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def onnx_layer(model: bytes, threads: int) -> Layer:
    """A session of its own, with as many threads as torch has, which sleep between calls."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x.numpy()})[0]
