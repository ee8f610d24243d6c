"""What the built library is: what it links, which device code it carries, how large it is, how fast it imports."""

import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import torch

import sparse24
from sparse24 import ops

ROOT = Path(__file__).parents[1]
LIBRARY = Path(ops.__file__).with_name("_C.so")


def test_links_neither_python_nor_cuda() -> None:
    headers = subprocess.run(["readelf", "-d", LIBRARY], check=True, capture_output=True, text=True).stdout
    needed = set(re.findall(r"Shared library: \[(.*?)\]", headers))
    allowed = r"lib(sparse24ptx|torch_cpu)\.so|lib(stdc\+\+|m|c)\.so\.6|libgcc_s\.so\.1|libdl\.so\.2|ld-linux.*"
    assert "libtorch_cpu.so" in needed
    assert [name for name in needed if not re.fullmatch(allowed, name)] == []


def test_exports_no_symbol_of_ours() -> None:
    symbols = subprocess.run(
        ["nm", "-DC", "--defined-only", LIBRARY], check=True, capture_output=True, text=True
    ).stdout
    assert "sparse24::" not in symbols


def test_carries_device_code_of_every_architecture() -> None:
    archs = torch.ops.sparse24.device_archs().split()
    assert archs == ["80", "86", "87", "89", "90a", "100f", "120f"]
    content = LIBRARY.read_bytes()
    kernels = [path.stem for path in (ROOT / "kernels").glob("*.cu")]
    cubins = content.count(b"\x7fELF") - 1  # the library itself is one
    assert cubins == len(kernels) * len(archs)
    # The PTX that an older driver compiles: version 8.5, for any architecture from sm_80 on.
    assert len(re.findall(rb"\.version 8\.5\n\.target sm_80\n", content)) == len(kernels)
    assert b".visible .entry decompress_pair_b32(" in content


def test_names_no_folder_of_the_machine_that_built_it() -> None:
    content = LIBRARY.read_bytes()
    assert re.findall(rb'\.file\t\d+ "/', content) == []
    assert b'.file\t1 "kernels/decompress.cu"' in content


def test_libraries_are_small() -> None:
    assert LIBRARY.stat().st_size < 16 << 20
    assert LIBRARY.with_name("libsparse24ptx.so").stat().st_size < 4 << 20


def test_wheel_is_for_one_python_and_holds_the_libraries(tmp_path: Path) -> None:
    """Only sparse24._ptx ties the wheel to a CPython; what it links is in test_api.py."""
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check", "--no-build-isolation"]
    subprocess.run([*command, "--no-deps", "-w", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert re.fullmatch(rf"sparse24-{sparse24.__version__}-{python}-{python}-linux_\w+\.whl", wheel.name)
    assert wheel.stat().st_size < 8 << 20
    with zipfile.ZipFile(wheel) as archive:
        names = {Path(name).name for name in archive.namelist() if name.startswith("sparse24/")}
        scripts = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "sparse24 = sparse24.cli:main" in archive.read(scripts).decode()
    module = f"_ptx{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert {name for name in names if ".so" in name} == {"_C.so", "libsparse24ptx.so", module}
    assert {"ptx.py", "cli.py", "__main__.py", "_ptx.pyi", "py.typed"} <= names


def test_import_is_light() -> None:
    """At most 60 ms beyond torch, compiled as pip installs it; the median of five fresh interpreters after a first."""
    code = (
        "import time, sys, torch; t = time.perf_counter(); import sparse24; print(time.perf_counter() - t);"
        "late = ('safetensors', 'rich', 'matplotlib', 'transformers', 'typer', 'sparse24.ptx', 'sparse24._ptx');"
        "sys.exit(any(m in sys.modules for m in late))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", code]
    _, *runs = [
        subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout for _ in range(6)
    ]
    assert sorted(float(run) for run in runs)[2] < 0.060


def test_version_is_told_once() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## {sparse24.__version__}" in changelog
