"""Fixtures that more than one test file uses."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def build_native(build_type: str) -> Path:
    """Builds tests/native and returns the folder of the programs; incremental."""
    folder = ROOT / "build" / f"native-{build_type.lower()}"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    environment = {**os.environ}
    if not shutil.which("nvcc"):  # then requirements/nvcc.txt has put one beside torch
        environment.setdefault("CUDA_HOME", str(Path(torch.__file__).parents[1] / "nvidia" / "cu13"))
    configure = ["-DSPARSE24_NATIVE_TESTS=ON", f"-DCMAKE_BUILD_TYPE={build_type}"]
    package = ROOT / "build" / "package"
    configure += [f"-DSPARSE24_DEVICE_CODE={package if package.exists() else ''}"]  # what ships, and minutes less
    command = ["cmake", "-S", ROOT, "-B", folder, *generator, *configure]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", folder], check=True, stdout=subprocess.DEVNULL)
    return folder


@pytest.fixture(scope="session")
def native_release() -> Path:
    return build_native("Release")


@pytest.fixture(scope="session")
def native_sanitize() -> Path:
    return build_native("Sanitize")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
