"""Build the libraries of sparse24/ with CMake. Everything else about the package is in pyproject.toml."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
TORCH = Path(importlib.util.find_spec("torch").origin).parent  # found without importing torch


class CMakeBuild(build_ext):
    def get_ext_filename(self, name: str) -> str:
        if name.endswith("_ptx"):
            return super().get_ext_filename(name)
        return name.replace(".", "/") + ".so"  # not loaded by Python: no ABI tag

    def build_extensions(self) -> None:  # all at once
        output = Path(self.get_ext_fullpath(self.extensions[0].name)).resolve().parent
        build = (ROOT / "build" / "package").resolve()  # one folder for all builds, so that each is incremental
        configure = [f"-DTORCH_DIR={TORCH}", f"-DPython_EXECUTABLE={sys.executable}"]
        configure += [f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}"]
        arguments = os.environ.get("CMAKE_ARGS", "").split()
        subprocess.run(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *configure, *arguments], check=True)
        subprocess.run(["cmake", "--build", build, "--target", "_C", "sparse24ptx", "_ptx"], check=True)


# The wheel is for one CPython: that of _ptx. The others use no Python API.
LIBRARIES = ["sparse24._C", "sparse24.libsparse24ptx", "sparse24._ptx"]
setup(ext_modules=[Extension(name, []) for name in LIBRARIES], cmdclass={"build_ext": CMakeBuild})
