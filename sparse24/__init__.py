"""2:4 structured sparsity for PyTorch: prune, compress and run, on sparse tensor cores and on plain CPUs."""

import importlib
from typing import TYPE_CHECKING, Any

from sparse24.conv import SparseConv2d
from sparse24.conversion import convert
from sparse24.library import cache_folder
from sparse24.nn import SparseLinear
from sparse24.ops import compress, decompress, prune_compress, prune_mask, validate
from sparse24.pruning import prune
from sparse24.quantization import quantize
from sparse24.reporting import report

if TYPE_CHECKING:
    from sparse24.chaining import chain
    from sparse24.emulation import emulate
    from sparse24.gradual import GradualPruning
    from sparse24.io import load, save
    from sparse24.mask_check import check_masks
    from sparse24.onnx_export import export_onnx
    from sparse24.permutation import permute
    from sparse24.retraining import paper_skips, retrain
    from sparse24.training import train_sparse
    from sparse24.tuning import load_tuned, tune

__version__ = "0.1.0"

__all__ = [
    "GradualPruning",
    "SparseConv2d",
    "SparseLinear",
    "chain",
    "check_masks",
    "compress",
    "convert",
    "decompress",
    "emulate",
    "export_onnx",
    "load",
    "load_tuned",
    "paper_skips",
    "permute",
    "prune",
    "prune_compress",
    "prune_mask",
    "ptx",
    "quantize",
    "report",
    "retrain",
    "save",
    "train_sparse",
    "tune",
    "validate",
]


if cache_folder().is_dir():  # tune() may have kept something for this CPU and version
    from sparse24.tuning import default_path, load_tuned

    if default_path().exists():
        load_tuned()


_LATER = {  # imported when first used, so that `import sparse24` stays quick
    "GradualPruning": "gradual",
    "chain": "chaining",
    "check_masks": "mask_check",
    "emulate": "emulation",
    "export_onnx": "onnx_export",
    "load": "io",
    "load_tuned": "tuning",
    "paper_skips": "retraining",
    "permute": "permutation",
    "retrain": "retraining",
    "save": "io",
    "train_sparse": "training",
    "tune": "tuning",
}


def __getattr__(name: str) -> Any:
    if name == "ptx":
        return importlib.import_module("sparse24.ptx")
    if name in _LATER:
        return getattr(importlib.import_module(f"sparse24.{_LATER[name]}"), name)
    raise AttributeError(f"module 'sparse24' has no attribute {name!r}")
