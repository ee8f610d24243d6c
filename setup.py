"""Build sparse24/_C.so with CMake. Everything else about the package is in pyproject.toml."""

import importlib.util
import os
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
TORCH = Path(importlib.util.find_spec("torch").origin).parent  # found without importing torch


class CMakeBuild(build_ext):
    def get_ext_filename(self, name: str) -> str:
        return name.replace(".", "/") + ".so"  # loaded by torch.ops, not by Python: no ABI tag

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = (ROOT / "build" / "package").resolve()  # one folder for all builds, so that each is incremental
        configure = [f"-DTORCH_DIR={TORCH}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}"]
        arguments = os.environ.get("CMAKE_ARGS", "").split()
        subprocess.run(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *configure, *arguments], check=True)
        subprocess.run(["cmake", "--build", build, "--target", "_C"], check=True)


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]  # the library uses no Python API: one wheel for every CPython


setup(ext_modules=[Extension("sparse24._C", [])], cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel})
