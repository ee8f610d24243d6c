"""Kernels that others wrote, and ours, as PTX: compiled once and kept in build/ptx/ under a hash of what made them."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "ptx"
ORDERS = [("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)]  # of blocks and warps: name and seed


@functools.cache
def nvcc() -> str:
    """The CUDA compiler: of the machine, of $CUDA_HOME, or the one that requirements/nvcc.txt puts beside torch."""
    found = shutil.which("nvcc")
    torch = importlib.util.find_spec("torch")
    assert torch is not None and torch.origin is not None
    beside_torch = Path(torch.origin).parents[1] / "nvidia" / "cu13"
    for home in filter(None, [os.environ.get("CUDA_HOME"), str(beside_torch)]):
        found = found or shutil.which("nvcc", path=f"{home}/bin")
    if found is None:
        pytest.fail("no nvcc: pip install -r requirements/nvcc.txt")
    return found


@functools.cache
def nvcc_release() -> str:
    """As it names itself: "release 13.0, V13.0.88"."""
    (line,) = (line for line in _nvcc_version().splitlines() if "release" in line)
    return line[line.index("release") :]


@functools.cache
def _nvcc_version() -> str:
    return subprocess.run([nvcc(), "--version"], check=True, capture_output=True, text=True).stdout


def compiled(source: Path, suffix: str, options: Sequence[str], headers: Sequence[Path] = ()) -> Path:
    """The file that nvcc makes of `source`; made only where the source, `headers`, options or nvcc are new."""
    content = hashlib.sha256(_nvcc_version().encode())
    for part in (source, *headers):
        content.update(part.read_bytes())
    content.update("\0".join(options).encode())
    path = BUILD / f"{source.stem}-{content.hexdigest()[:20]}{suffix}"
    if not path.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{os.getpid()}-{path.name}")  # so that nobody meets half a file
        command = [nvcc(), "-std=c++17", *options, str(source), "-o", str(unfinished)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
        unfinished.rename(path)
    return path


@functools.cache
def kernels(name: str, architecture: str = "80", *options: str) -> str:
    """The PTX text of kernels/<name>.cu."""
    arguments = ["--ptx", f"-arch=sm_{architecture}", "-O3", "-lineinfo", *options]
    headers = sorted((HERE / "kernels").glob("*.cuh"))
    return compiled(HERE / "kernels" / f"{name}.cu", ".ptx", arguments, headers).read_text()


@functools.cache
def edited(name: str, *edits: tuple[str, str], architecture: str = "80") -> str:
    """The PTX text of kernels/<name>.cu with each edit's first text, which is there once, replaced by its second."""
    text = (HERE / "kernels" / f"{name}.cu").read_text()
    for old, new in edits:
        assert text.count(old) == 1, f"{name}.cu has {text.count(old)} times: {old}"
        text = text.replace(old, new)
    folder = BUILD / "edited" / hashlib.sha256(text.encode()).hexdigest()[:20]
    source = folder / f"{name}.cu"
    if not source.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f"{os.getpid()}.cu"
        unfinished.write_text(text)
        unfinished.rename(source)
    return compiled(source, ".ptx", ["--ptx", f"-arch=sm_{architecture}", "-O3", "-lineinfo"]).read_text()


@functools.cache
def _cutlass_includes() -> list[str]:
    """The headers of requirements/oracles.txt."""
    package = importlib.util.find_spec("cutlass_library")
    if package is None or package.origin is None:
        pytest.fail("no CUTLASS headers: pip install --no-deps -r requirements/oracles.txt")
    source = Path(package.origin).parent / "source"
    return [f"-I{source}/include", f"-I{source}/tools/util/include", "-w"]


@functools.cache
def cutlass_kernel(gemm: str) -> str:
    """The PTX text of one of cutlass/gemms.h."""
    options = ["--ptx", "-arch=sm_80", "-O3", "-lineinfo", f"-DGEMM={gemm}", *_cutlass_includes()]
    return compiled(HERE / "cutlass" / "device.cu", ".ptx", options, [HERE / "cutlass" / "gemms.h"]).read_text()


@functools.cache
def cutlass_host() -> Path:
    """The library of cutlass/host.cu."""
    libraries = Path(nvcc()).resolve().parents[1] / "lib"  # where pip puts them, and its nvcc does not look
    options = ["-shared", "-arch=sm_80", "-O1", "-DNDEBUG", "-Xcompiler=-fPIC", f"-L{libraries}", *_cutlass_includes()]
    return compiled(HERE / "cutlass" / "host.cu", ".so", options, [HERE / "cutlass" / "gemms.h"])


def assert_silent(report: object) -> None:
    """Not one finding of any check."""
    assert report.ok and not report.errors, "\n".join(str(error) for error in report.errors[:5])
