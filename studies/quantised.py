"""What the studies of quantisation share: which models are rounded how. Results: docs/quantisation.md.

A model comes dense, or pruned to 2:4 for int8 and to "pair 4:8" for int4. The same layers are rounded in all three. A
dense model runs as fake quantisation, since no kernel of sparse24 runs it; a sparse one converted, on the kernels,
except that "pair 4:8" has none of float32: that runs dense.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import sparse24
from sparse24.pruning import Skip, skip_rule

DENSE, FLOAT = "dense", "float32"
POST, TRAINED = "post-training", "trained"

# By name, what quantize() is told; calibration batches come to it where activations are not by token.
FORMATS: dict[str, dict[str, Any]] = {
    "int8 by token": {},
    "int8 by max": {"activations": "max"},
    "int8 by percentile": {"activations": "percentile"},
    "int8 by percentile, scales learnt": {"activations": "percentile", "learn_scales": True},
    "int4 by token": {"dtype": torch.int4},
    "int4 by token, scales learnt": {"dtype": torch.int4, "learn_scales": True},
}
INT8, INT4 = ([name for name in FORMATS if name.startswith(dtype)] for dtype in ("int8", "int4"))
BASES = {DENSE: [*INT8, *INT4], "2:4": INT8, "pair 4:8": INT4}


@contextmanager
def left_alone(model: nn.Module, skip: Skip) -> Iterator[None]:
    """Within, quantize() passes over the layers of `skip`, which is that of prune(): their weights are dressed up."""
    skips = skip_rule(model, skip)
    products = [(name, one) for name, one in model.named_modules() if isinstance(one, (nn.Linear, nn.Conv2d))]
    layers = [layer for name, layer in products if skips(name, layer)]
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", nn.Identity())
    try:
        yield
    finally:
        for layer in layers:
            parametrize.remove_parametrizations(layer, "weight")


def quantised(base: nn.Module, name: str, skip: Skip, calibration: Iterable[Tensor]) -> nn.Module:
    """A copy of a base, which was pruned with this `skip` or would be, with fake quantisation of the named format."""
    model = copy.deepcopy(base)
    if name == FLOAT:
        return model
    options = dict(FORMATS[name])
    if "activations" in options:
        options["calibration"] = calibration
    with left_alone(model, skip):
        sparse24.quantize(model, unpruned=True, **options)
    return model
