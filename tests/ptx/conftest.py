"""Small kernels as fixtures."""

import pytest
import small_kernels


@pytest.fixture
def axpy() -> str:
    """PTX of y[i] += a * factor * x[i] for i < n; ``factor`` is a global variable, 2 unless it is written."""
    return small_kernels.AXPY


@pytest.fixture
def spin() -> str:
    """A kernel that never ends."""
    return small_kernels.kernel("", "L: bra L;")
