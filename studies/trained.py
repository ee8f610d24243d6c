"""Trained models, one-shot to 2:4 by each method, then shortly distilled: how much of them is left.

DAT-light (x2 super-resolution) and demosaicnet (a Bayer mosaic to colours): PSNR in dB against the photograph. DINOv2
ViT-S/14: the cosine of its features to the dense ones. On photographs that nothing here trains or calibrates on.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn

import sparse24
from demo import restoration, vision
from demo.distillation import Recipe, distil
from demo.needs import package_file
from demo.photographs import HELD_OUT, centre, photograph, training_crop
from studies.fashion import converted

METHODS = ("magnitude", "wanda", "sparsegpt")
SIDE = 256  # pixels of a measured crop
MOSAIC = "demosaicnet"
DEMOSAIC_RECIPE = Recipe(steps=60, learning_rate=2e-4)
PATCH, BATCH = 64, 8  # of the distillation of demosaicnet
BORDER = 32  # pixels that its 15 convolutions without padding take from each side, at half the resolution


# ---- demosaicnet -----------------------------------------------------------------------------------------------------


class Demosaicnet(nn.Module):
    """The Bayer network of demosaicnet 0.0.14 (Gharbi et al. 2016), with the names of its weights."""

    def __init__(self) -> None:
        super().__init__()
        widths = [4, *[64] * 14, 128]
        layers: dict[str, nn.Module] = {"pack_mosaic": nn.Conv2d(3, 4, 2, stride=2)}
        for i in range(15):
            layers[f"conv{i + 1}"] = nn.Conv2d(widths[i], widths[i + 1], 3)
            layers[f"relu{i + 1}"] = nn.ReLU()
        self.main_processor = nn.Sequential()
        for name, layer in layers.items():
            self.main_processor.add_module(name, layer)
        self.residual_predictor = nn.Conv2d(64, 12, 1)
        self.upsampler = nn.ConvTranspose2d(12, 3, 2, stride=2, groups=3)
        self.fullres_processor = nn.Sequential()
        for name, layer in (
            ("post_conv", nn.Conv2d(6, 64, 3)),
            ("post_relu", nn.ReLU()),
            ("output", nn.Conv2d(64, 3, 1)),
        ):
            self.fullres_processor.add_module(name, layer)

    def forward(self, mosaic: Tensor) -> Tensor:
        filters, masks = self.main_processor(mosaic).chunk(2, dim=1)
        upsampled = self.upsampler(self.residual_predictor(filters * masks))
        margin = (mosaic.shape[-1] - upsampled.shape[-1]) // 2
        cropped = mosaic[..., margin:-margin, margin:-margin]
        colours: Tensor = self.fullres_processor(torch.cat([cropped, upsampled], 1))
        return colours


def demosaicnet() -> nn.Module:
    model = Demosaicnet()
    model.load_state_dict(torch.load(package_file(MOSAIC, "demosaicnet/data/bayer.pth"), weights_only=True))
    return model.eval()


def mosaic_of(image: Tensor) -> Tensor:
    """What a Bayer sensor sees of [..., 3, H, W], zeros elsewhere: G R over B G."""
    mosaic = torch.zeros_like(image)
    mosaic[..., 1, ::2, ::2] = image[..., 1, ::2, ::2]
    mosaic[..., 0, ::2, 1::2] = image[..., 0, ::2, 1::2]
    mosaic[..., 2, 1::2, ::2] = image[..., 2, 1::2, ::2]
    mosaic[..., 1, 1::2, 1::2] = image[..., 1, 1::2, 1::2]
    return mosaic


def demosaic_imitation(student: nn.Module, teacher: nn.Module) -> Callable[[int], Tensor]:
    def loss(step: int) -> Tensor:
        mosaics = mosaic_of(crops(step, 2 * BORDER + PATCH, BATCH))
        with torch.no_grad():
            target = teacher(mosaics)
        return F.l1_loss(student(mosaics), target)

    return loss


def demosaic_quality(model: nn.Module) -> list[float]:
    """PSNR over all channels, rounded to 8 bits, of the central crops."""
    found = []
    for name in HELD_OUT:
        truth = centre(photograph(name), SIDE)[None]
        colours = model(mosaic_of(truth))
        error = (colours.clamp(0, 1) * 255).round() / 255 - centre(truth, colours.shape[-1])
        found.append(float(-10 * error.double().square().mean().log10()))
    return found


# ---- All three -------------------------------------------------------------------------------------------------------


def crops(step: int, side: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.stack([training_crop(generator, side, side) for _ in range(count)])


def restoration_quality(model: nn.Module) -> list[float]:
    truths = [centre(photograph(name), SIDE)[None] for name in HELD_OUT]
    return [restoration.psnr(model(restoration.downscale(truth)), truth) for truth in truths]


def vision_quality(model: nn.Module) -> list[float]:
    x = vision.held_out()
    wanted = vision.load_model()(x).last_hidden_state
    return F.cosine_similarity(model(x).last_hidden_state, wanted, dim=-1).mean(1).tolist()


def vision_calibration() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    one = [vision.pixels(training_crop(generator, vision.SIDE // 2, 4 * vision.SIDE)) for _ in range(8)]
    return [torch.cat(one[:4]), torch.cat(one[4:])]


def is_convolution(_: str, layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d)


def is_narrow(_: str, layer: nn.Module) -> bool:
    """A convolution, or a layer of fewer than four columns."""
    return isinstance(layer, nn.Conv2d) or getattr(layer, "in_features", 4) < 4


class Study:
    """How one model is loaded, calibrated, distilled and measured."""

    def __init__(
        self,
        unit: str,
        load: Callable[[], nn.Module],
        skip: Any,
        calibration: Callable[[], list[Tensor]],
        imitation: Callable[[nn.Module, nn.Module], Callable[[int], Tensor]],
        recipe: Recipe,
        quality: Callable[[nn.Module], list[float]],
    ) -> None:
        self.unit, self.load, self.skip, self.calibration = unit, load, skip, calibration
        self.imitation, self.recipe, self.quality = imitation, recipe, quality

    def pair(self) -> tuple[nn.Module, nn.Module]:
        """The model twice: one that teaches, and one to change and train."""
        teacher = self.load().requires_grad_(False)
        student = copy.deepcopy(teacher)
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(not name.endswith("mask_token"))
        return teacher, student

    def prune(self, student: nn.Module, pattern: str, method: str) -> int:
        """Returns how many layers."""
        calibration = None if method == "magnitude" else self.calibration()
        report = sparse24.prune(student, pattern, skip=self.skip, method=method, calibration=calibration)
        return sum(row.outcome == "pruned" for row in report.rows)

    def distil(self, student: nn.Module, teacher: nn.Module, recipe: Recipe) -> None:
        """All steps, in place. A run that is stopped goes on where it was: distil() keeps what was learnt."""
        with Progress(disable=True) as progress:
            done = distil("study", student, self.imitation(student, teacher), recipe, math.inf, progress)
        if done.steps < done.planned:
            raise KeyboardInterrupt

    @torch.no_grad()
    def measured(self, model: nn.Module) -> list[float]:
        """The quality of each held-out photograph."""
        return self.quality(model)


MODELS = {
    "DAT-light x2": Study(
        "dB",
        restoration.load_model,
        is_narrow,
        lambda: [restoration.downscale(crops(0, 2 * restoration.PATCH, 2))],  # gone through once for each of 72 layers
        restoration.imitation,
        restoration.RECIPE,
        restoration_quality,
    ),
    "demosaicnet": Study(
        "dB",
        demosaicnet,
        ["main_processor.pack_mosaic", "upsampler", "fullres_processor.output"],
        lambda: list(mosaic_of(crops(0, 2 * BORDER + PATCH, 8)).split(4)),
        demosaic_imitation,
        DEMOSAIC_RECIPE,
        demosaic_quality,
    ),
    "DINOv2 ViT-S/14": Study(
        "cosine",
        vision.load_model,
        is_convolution,
        vision_calibration,
        vision.imitation,
        vision.RECIPE,
        vision_quality,
    ),
}


def job(model: str, method: str) -> dict[str, Any]:
    """Quality of one model on each held-out photograph: dense, one-shot by `method`, and then distilled."""
    torch.set_num_threads(1)
    study = MODELS[model]
    teacher, student = study.pair()
    found: dict[str, Any] = {"layers": study.prune(student, "2:4", method)}
    found["dense"], found["one-shot"] = study.measured(teacher), study.measured(converted(student))
    sparse24.train_sparse(student)
    study.distil(student, teacher, study.recipe)
    found["distilled"] = study.measured(converted(student))
    return found


# ---- The table -------------------------------------------------------------------------------------------------------


def markdown(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """found: by model and method, what job() returned."""
    head = " | ".join(f"{model}, {MODELS[model].unit}" for model in found)
    lines = [f"| mean of {len(HELD_OUT)} photographs | {head} |", "|---" + "|--:" * len(found) + "|"]

    def row(title: str, method: str, stage: str) -> str:
        cells = []
        for model, methods in found.items():
            values = methods[method][stage]
            cells.append(f"{sum(values) / len(values):.{3 if MODELS[model].unit == 'cosine' else 2}f}")
        return f"| {title} | " + " | ".join(cells) + " |"

    lines.append(row("dense", METHODS[0], "dense"))
    lines += [row(f"2:4, one-shot by {method}", method, "one-shot") for method in METHODS]
    lines += [row(f"2:4 by {method}, then distilled", method, "distilled") for method in METHODS]
    return "\n".join(lines)
