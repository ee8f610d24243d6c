"""2:4 structured sparsity for PyTorch: prune, compress and run, on sparse tensor cores and on plain CPUs."""

from sparse24.ops import compress, decompress, prune_compress, prune_mask, validate

__version__ = "0.1.0"

__all__ = ["compress", "decompress", "prune_compress", "prune_mask", "validate"]
