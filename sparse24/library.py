"""The library of operators (_C.so), loaded into torch."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch

_LIBRARY = Path(__file__).with_name("_C.so")
if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
    raise ImportError(f"sparse24 needs torch >= 2.11; this is torch {torch.__version__}")
if not _LIBRARY.exists():
    raise ImportError(f"{_LIBRARY} is missing: build it with `make build`, or install the wheel")
torch.ops.load_library(_LIBRARY)
ops = torch.ops.sparse24
if not ops.device_archs():
    warnings.warn("this build of sparse24 has no device code: CUDA tensors are refused", stacklevel=2)


def cache_folder() -> Path:
    """Of this user; tune() keeps there what it measured."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparse24"


class _Names(dict[torch.dtype, str]):
    """How the operators call an element type; they refuse a name they do not know."""

    def __missing__(self, dtype: torch.dtype) -> str:
        return str(dtype)


NAMES = _Names(
    {
        torch.float32: "float32",
        torch.float16: "float16",
        torch.bfloat16: "bfloat16",
        torch.int8: "int8",
        torch.int4: "int4",  # type: ignore[attr-defined]
        torch.uint8: "int4",  # how int4 lies in memory
    }
)


class _WeightNames(dict[tuple[torch.dtype, str | None], str]):
    """The same of a weight that products take, in a pattern; None: int4 in pair 4:8, others in 2:4."""

    def __missing__(self, key: tuple[torch.dtype, str | None]) -> str:
        dtype, pattern = key
        if dtype not in NAMES:
            return NAMES[dtype]
        rule = " or ".join(repr(known) for other, known in self if other is dtype and known is not None)
        raise RuntimeError(f"pattern must be {rule} for a weight of {NAMES[dtype]}; got {pattern!r}")


WEIGHT_NAMES = _WeightNames()
for _dtype, _name in NAMES.items():
    WEIGHT_NAMES[_dtype, None] = _name
    for _pattern in ("2:4", "1:2"):
        WEIGHT_NAMES[_dtype, _pattern] = "int4-2:4" if _name == "int4" else _name
    if _name == "int4":
        WEIGHT_NAMES[_dtype, "pair 4:8"] = _name
