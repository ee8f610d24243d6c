"""How far a float result may be from the exact one: element by element, from the precisions alone."""

import torch
import torch.nn.functional as F
from torch import Tensor

ROUNDING = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}  # half an ulp, relative
EXACT = {
    "none": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}


def assert_linear(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none", roundings: int = 1
) -> None:
    """y = activation(x @ weight^T + bias), summed in float32 in any order, rounded `roundings` times to its dtype.

    x and weight are what the product multiplied: for int8, the rounded values times their scales.
    """
    x64, w64 = x.double(), weight.double()
    b64 = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.double()
    product = F.linear(x64, w64, b64)
    exact = EXACT[activation](product)
    sums = (weight.shape[1] + 4) * 2**-24 * (F.linear(x64.abs(), w64.abs(), b64.abs()))
    # No activation is steeper than 1.13; 2^-20 |product| is what its own float32 evaluation may lose.
    own = 0.0 if activation == "none" else 2**-20 * product.abs()
    u = roundings * ROUNDING[y.dtype]
    bound = 1.13 * (sums + (roundings - 1) * u * product.abs()) + own + u * exact.abs() + 1e-30
    ratio = (y.double() - exact).abs() / bound
    assert y.shape == exact.shape
    worst = int(ratio.argmax()) if ratio.numel() else 0
    detail = f"element {worst}: {y.flatten()[worst]} for {exact.flatten()[worst]}" if ratio.numel() else ""
    assert (ratio <= 1).all(), f"{detail}; {float(ratio.max()):.2f} of the bound"
