"""The compiler and cache of tests/ptx serve the shipped kernels too."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "ptx"))
