"""Whether a layer computes what it should, before it is timed: integers to the bit, reals within their rounding."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


class Wrong(Exception):
    """A contender gives wrong numbers: nothing is timed."""


class Exact:
    """A layer in exact arithmetic: multiply(x, weight) * scales + bias.

    weight: floats, or whole numbers with one of `scales` for each output. multiply: F.linear, or a convolution, whose
    outputs lie in dimension 1. summands: terms of one output's sum.
    """

    def __init__(
        self,
        weight: Tensor,
        scales: Tensor | None,
        bias: Tensor | None,
        multiply: Callable[[Tensor, Tensor], Tensor] = F.linear,
    ) -> None:
        self.weight, self.magnitude = weight.double(), weight.double().abs()
        self.summands = weight[0].numel()
        self.multiply = multiply
        shape = (-1, *(1 for _ in weight.shape[2:]))
        self.scales = torch.ones(()) if scales is None else scales.reshape(shape)
        self.bias = torch.zeros(()) if bias is None else bias.reshape(shape)

    def products(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The product, and that of the magnitudes, which bounds what rounding can do to it."""
        x = x.double()
        product, magnitude = self.multiply(x, self.weight), self.multiply(x.abs(), self.magnitude)
        return product * self.scales.double(), magnitude * self.scales.double()

    def check_reals(self, name: str, y: Tensor, products: tuple[Tensor, Tensor], roundings: int = 1) -> None:
        """y summed in float32, in any order, and rounded to its own type; with two `roundings` before the bias too."""
        product, magnitude = products
        exact = product + self.bias.double()
        sums = (self.summands + 4) * 2**-24 * (magnitude + self.bias.double().abs())
        u = torch.finfo(y.dtype).eps / 2
        _within(name, y, exact, sums + u * exact.abs() + (roundings - 1) * u * (magnitude + exact.abs()))

    def check_rounded_x(self, name: str, y: Tensor, x: Tensor) -> None:
        """y of x rounded to int8, one scale a row (a convolution: an image): equal to the bit."""
        s = x.abs().amax(tuple(range(1, x.dim())), keepdim=True) / 127
        q = torch.round(x / torch.where(s == 0, 1, s)).clamp(-127, 127)
        wanted = self.multiply(q.double(), self.weight).float() * (s * self.scales) + self.bias
        if not torch.equal(y, wanted):
            raise Wrong(f"{name}: {int((y != wanted).sum())} of {y.numel()} numbers are not exact")

    def own_rounding(self, x: Tensor, whole: Tensor) -> Tensor:
        """How far a rival's y of x, a part of `whole`, may be off that rounds x and the weight by rules of its own.

        At the worst one step for all of x, of 7 bits as some engines do, and one for the whole weight.
        """
        x_step = (whole.max().clamp(min=0) - whole.min().clamp(max=0)).double() / 127
        largest = self.magnitude.flatten(1).amax(1) * self.scales.flatten()
        w_step = largest.max() / 127
        ones, all_ones = torch.ones_like(x[:1]).double(), torch.ones_like(self.magnitude[:1])
        of_x = x_step * self.multiply(ones, self.magnitude) * self.scales
        of_weight = w_step * self.multiply(x.double().abs(), all_ones)
        return of_x + of_weight + x_step * w_step * self.summands

    def check_within(self, name: str, y: Tensor, product: Tensor, bound: Tensor) -> None:
        _within(name, y, product + self.bias.double(), bound)


def _within(name: str, y: Tensor, exact: Tensor, bound: Tensor) -> None:
    """Raises Wrong unless |y - exact| <= bound everywhere; a NaN in y is wrong."""
    if y.shape != exact.shape:
        raise Wrong(f"{name}: {list(y.shape)} instead of {list(exact.shape)}")
    excess = (y.double() - exact).abs() / bound
    if not bool((excess <= 1).all()):
        raise Wrong(f"{name}: an error of {float(excess.max()):.3g} times what rounding explains")
