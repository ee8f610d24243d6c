"""What lies in this folder needs a GPU: `make gpu` runs it. Elsewhere it is skipped, by tests/conftest.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
for folder in (HERE.parent, HERE.parents[1]):  # bounds.py; sparse24 where it is not installed
    sys.path.insert(0, str(folder))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def capability() -> int:
    """Of the current device: 80, 90, ..."""
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor
