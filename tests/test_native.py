"""The tests of the kernels without torch (tests/native), as they ship and under the address and UB sanitizers."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = [path.stem for path in sorted((ROOT / "tests" / "native").glob("test_*.cpp"))]
BUILD_TYPES = ["Release", "Sanitize"]  # CMakeLists.txt


@pytest.fixture(scope="session", params=BUILD_TYPES)
def build(request: pytest.FixtureRequest) -> Path:
    folder = ROOT / "build" / f"native-{request.param.lower()}"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = ["-DSPARSE24_NATIVE_TESTS=ON", f"-DCMAKE_BUILD_TYPE={request.param}"]
    subprocess.run(["cmake", "-S", ROOT, "-B", folder, *generator, *configure], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", folder], check=True, stdout=subprocess.DEVNULL)
    return folder


@pytest.mark.parametrize("program", PROGRAMS)
def test_native(build: Path, program: str) -> None:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(build / "fake")}  # tests/native/fake_libcuda.cpp
    done = subprocess.run([build / program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
