"""The photographs of the demo, all shipped inside scikit-image: some are trained on, the others only measured on."""

from functools import cache

import skimage.data
import torch
from torch import Tensor

HELD_OUT = ("astronaut", "chelsea", "coffee", "rocket")
TRAINING = (
    "stereo_motorcycle",  # its left view
    "camera",
    "coins",
    "brick",
    "grass",
    "gravel",
    "moon",
    "immunohistochemistry",
    "retina",
    "hubble_deep_field",
)


@cache
def photograph(name: str) -> Tensor:
    """[3, H, W] float32 in [0, 1]; a grey one has three equal channels."""
    pixels = getattr(skimage.data, name)()
    if isinstance(pixels, tuple):
        pixels = pixels[0]
    image = torch.from_numpy(pixels).float() / 255
    return image.expand(3, -1, -1) if image.ndim == 2 else image.permute(2, 0, 1).contiguous()


def centre(image: Tensor, side: int) -> Tensor:
    """The square of `side` pixels in the middle of [..., H, W]."""
    top, left = ((size - side) // 2 for size in image.shape[-2:])
    return image[..., top : top + side, left : left + side]


def training_crop(generator: torch.Generator, smallest: int, largest: int) -> Tensor:
    """A random square of a random training photograph, mirrored half of the time: [3, side, side].

    The side lies between `smallest` and `largest` pixels, or the shorter side of the photograph if that is less.
    """

    def pick(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    image = photograph(TRAINING[pick(len(TRAINING))])
    height, width = image.shape[-2:]
    side = smallest + pick(min(height, width, largest) - smallest + 1)
    top, left = pick(height - side + 1), pick(width - side + 1)
    crop = image[:, top : top + side, left : left + side]
    return crop.flip(-1) if pick(2) else crop
