"""The command line, in this process through typer's runner and as a program."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_kernels import kernel
from typer.testing import CliRunner

from sparse24 import cli

AXPY_ARGS = ["--kernel", "axpy", "--grid", "4", "--block", "32", "--arg", "f32[100]=ones", "--arg", "f32[100]=arange"]
AXPY_ARGS += ["--arg", "f32=0.5", "--arg", "u32=100"]


@pytest.fixture
def file(axpy: str, tmp_path: Path) -> str:
    path = tmp_path / "axpy.ptx"
    path.write_text(axpy)
    return str(path)


def ptx(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, ["ptx", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_help_at_every_level() -> None:
    for arguments in ([], ["ptx"], ["ptx", "info"], ["ptx", "run"], ["ptx", "check"]):
        result = CliRunner().invoke(cli.app, [*arguments, "--help"])
        assert result.exit_code == 0 and "Usage:" in result.stdout
    assert all(word in result.stdout for word in ("--kernel", "--grid", "--arg", "f16[128,64]=random", "Status 1"))


def test_info(file: str, axpy: str) -> None:
    status, out, _ = ptx("info", file)
    assert status == 0
    for part in ("PTX 8.5, sm_80, 1 kernel\n", "factor (4 bytes), table (16 bytes)", "y: .u64", "n: .u32", "nothing"):
        assert part in out
    assert "20 instructions" in out and "3 ld.global.f32" in out and "others (--all)" in out
    status, out, _ = ptx("info", file, "--all", "--kernel", "axpy")
    assert status == 0 and "1 fma.rn.f32" in out and "others" not in out


def test_info_names_what_is_not_supported(tmp_path: Path) -> None:
    path = tmp_path / "k.ptx"
    path.write_text(kernel("", "  frobnicate.b32 %r1;\n  ret;"))
    status, out, _ = ptx("info", str(path))
    assert status == 0 and "frobnicate" in out and "nothing" not in out


def test_run_saves_results(file: str, tmp_path: Path) -> None:
    out_file = tmp_path / "y.npy"
    status, out, _ = ptx(
        "run", file, *AXPY_ARGS, "--out", f"y={out_file}", "--out", f"1={tmp_path / 'x.npy'}", "--lines"
    )
    assert status == 0 and out.startswith("axpy: no errors; ")
    assert (np.load(out_file) == 1 + np.arange(100)).all() and (np.load(tmp_path / "x.npy") == np.arange(100)).all()
    assert "axpy.cu:9" in out and "ld.global.f32" in out and "400 global" in out


def test_run_reads_arrays(file: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.asfortranarray(np.arange(100, dtype=np.float32).reshape(10, 10)))
    arguments = [argument.replace("f32[100]=arange", str(tmp_path / "x.npy")) for argument in AXPY_ARGS]
    status, _, error = ptx("run", file, *arguments, "--out", f"0={tmp_path / 'y.npy'}")
    assert status == 0, error
    assert (np.load(tmp_path / "y.npy") == 1 + np.arange(100)).all()
    assert (np.load(tmp_path / "x.npy") == np.arange(100).reshape(10, 10)).all()


def test_run_prints_findings_and_exits_with_1(file: str) -> None:
    arguments = [argument.replace("f32[100]=ones", "f32[90]") for argument in AXPY_ARGS]
    status, out, _ = ptx("run", file, *arguments)
    assert status == 1 and "axpy: 2 errors" in out and "out_of_bounds: line" in out and "axpy.cu:9" in out
    status, out, _ = ptx("run", file, *arguments, "--checks", "race,sync")
    assert status == 0 and "no errors" in out


@pytest.mark.parametrize(
    "fill, expected",
    [
        ("f16[4]=random", None),
        ("bf16[3]=1.5", [1.5, 1.5, 1.5]),
        ("e4m3[2]=ones", [1, 1]),
        ("s32[2,2]=-7", [-7, -7, -7, -7]),
        ("u8[3]=0xff", [255, 255, 255]),
        ("i64[3]=arange", [0, 1, 2]),
        ("f32[2]=nan", [float("nan")] * 2),
        ("u32[2]", [0, 0]),
    ],
)
def test_fills(fill: str, expected: list[float] | None) -> None:
    value = cli._parsed(fill, 0, seed=5).make()
    kind = fill.split("[")[0]
    assert isinstance(value, torch.Tensor) == (kind in ("bf16", "e4m3"))
    numbers = (value.float().numpy() if isinstance(value, torch.Tensor) else value).flatten()
    if expected is None:
        assert value.dtype == np.float16 and len(set(numbers.tolist())) == 4 and (abs(numbers) <= 1).all()
        assert (cli._parsed(fill, 0, seed=5).make() == value).all()
        assert (cli._parsed(fill, 0, seed=6).make() != value).any()
        assert (cli._parsed(fill, 1, seed=5).make() != value).any()
    else:
        np.testing.assert_array_equal(numbers, np.array(expected))


def test_random_integers_have_all_values() -> None:
    values = cli._parsed("s8[20000]=random", 0, seed=0).make()
    assert set(values.tolist()) == set(range(-128, 128))


ERRORS = [
    (["info", "missing.ptx"], "No such file or directory: 'missing.ptx'"),
    (["info", "FILE", "--kernel", "other"], "no kernel 'other'; there is: axpy"),
    (["run", "FILE", "--kernel", "other"], "no kernel 'other'; there is: axpy"),
    (["run", "FILE"], "kernel 'axpy' has 4 parameters (y: .u64, x: .u64, a: .f32, n: .u32); got 0"),
    (["run", "FILE", "--grid", "4x1"], "'4x1' is no extent: write 4 or 4,2,1"),
    (["run", "FILE", "--arg", "f16[4]=many"], "--arg 0 'f16[4]=many': 'many' is not zeros, ones,"),
    (["run", "FILE", "--arg", "u8[4]=256"], "--arg 0 'u8[4]=256': "),
    (["run", "FILE", "--arg", "i32=x"], "'x' is no number of type i32"),
    (["run", "FILE", "--arg", "i32"], "has no value: write i32=5, or i32[64,64]=random for an array"),
    (["run", "FILE", "--arg", "x.npy"], "--arg 0 'x.npy': is no file, and starts with no type (f16 "),
    (["run", "FILE", "--arg", "FILE"], "--arg 0 '"),
    (["run", "FILE", "--arg", "bytes=zz"], "--arg 0 'bytes=zz': "),
    (["run", "FILE", *AXPY_ARGS, "--out", "7=y.npy"], "--out '7=y.npy' is no N=FILE with N from 0 to 3"),
    (["run", "FILE", *AXPY_ARGS, "--out", "y"], "--out 'y' is no N=FILE"),
    (["run", "FILE", *AXPY_ARGS, "--checks", "speed"], "checks must be 'all', 'none' or some of"),
    (["run", "FILE", *AXPY_ARGS, "--order", "sideways"], "order must be one of forward, reverse, random"),
    (["check", "FILE", *AXPY_ARGS, "--block", "2000"], "block is (2000, 1, 1): x must be 1 to 1024"),
]


@pytest.mark.parametrize("arguments, message", ERRORS)
def test_errors_are_one_line(file: str, arguments: list[str], message: str) -> None:
    status, out, error = ptx(*[argument.replace("FILE", file) for argument in arguments])
    assert status == 2 and out == ""
    assert error.startswith("sparse24: error: ") and error.count("\n") == 1 and message in error, error


def test_syntax_errors_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.ptx"
    path.write_text(kernel("", "  mov.u32 %r1 %r2;"))
    line = path.read_text()[: path.read_text().index("mov.u32")].count("\n") + 1
    status, _, error = ptx("info", str(path))
    assert status == 2 and error.startswith(f"sparse24: error: line {line}, column ") and error.count("\n") == 1


def test_check_of_a_clean_kernel(file: str) -> None:
    status, out, _ = ptx("check", file, *AXPY_ARGS)
    assert status == 0
    assert [line.split(":")[0] for line in out.splitlines()] == ["forward", "reverse", "random (0)", "random (1)"]
    assert out.count(" 0 findings, 0 new; ") == 4


def test_check_starts_each_order_from_the_same_arrays(file: str) -> None:
    """axpy adds to y: did one run see the last one's y, results would differ from the forward order's."""
    _, out, _ = ptx("check", file, *AXPY_ARGS)
    assert "argument" not in out


def test_check_prints_each_finding_once(file: str) -> None:
    arguments = [argument.replace("f32[100]=arange", "f32[100]=uninitialized") for argument in AXPY_ARGS]
    status, out, _ = ptx("check", file, *arguments)
    assert status == 1 and out.count("uninitialized: line") == 1 and out.count("1 finding, ") == 4


def test_check_finds_what_only_one_order_shows(tmp_path: Path) -> None:
    """Block 1 traps if block 0 has not been there: the forward order cannot show it."""
    body = """
  mov.u32 %r1, %ctaid.x; ld.param.u64 %rd1, [p];
  setp.eq.u32 %p1, %r1, 0;
  @%p1 red.global.add.u32 [%rd1], 1;
  @%p1 bra END;
  atom.global.add.u32 %r2, [%rd1], 0;
  setp.ne.u32 %p2, %r2, 0;
  @%p2 bra END;
  trap;
END: ret;"""
    path = tmp_path / "order.ptx"
    path.write_text(kernel(".param .u64 p", body))
    arguments = [str(path), "--grid", "2", "--block", "1", "--arg", "u32[1]", "--threads", "1"]
    assert ptx("run", *arguments)[0] == 0
    status, out, _ = ptx("check", *arguments)
    assert status == 1 and out.splitlines()[0].startswith("forward: 0 findings") and "  trap: line" in out


def test_check_tells_results_that_depend_on_the_order(tmp_path: Path) -> None:
    body = """
  mov.u32 %r1, %ctaid.x; ld.param.u64 %rd1, [p];
  atom.global.exch.b32 %r2, [%rd1], %r1; ret;"""
    path = tmp_path / "last.ptx"
    path.write_text(kernel(".param .u64 p", body))
    status, out, _ = ptx("check", str(path), "--grid", "2", "--block", "1", "--arg", "u32[1]", "--threads", "1")
    assert status == 0 and "argument 0 is not what it was in the forward order" in out


def test_printed_text_comes_out(tmp_path: Path) -> None:
    header = """
.extern .func (.param .b32 result) vprintf (.param .b64 format, .param .b64 arguments);
.global .align 1 .b8 text[4] = {104, 105, 10, 0};"""
    body = """
  mov.u64 %rd1, text; cvta.global.u64 %rd1, %rd1; mov.u64 %rd2, 0;
  { .param .b64 p0; .param .b64 p1; .param .b32 r0;
    st.param.b64 [p0], %rd1; st.param.b64 [p1], %rd2;
    call.uni (r0), vprintf, (p0, p1); }
  ret;"""
    path = tmp_path / "print.ptx"
    path.write_text(kernel("", body, header))
    status, out, error = ptx("run", str(path), "--block", "1")
    assert status == 0 and out.startswith("hi\nk: no errors"), out + error


# ---- As a program ----------------------------------------------------------------------------------------------------


def test_program(file: str) -> None:
    for command in ([sys.executable, "-m", "sparse24"], [str(Path(sys.executable).with_name("sparse24"))]):
        done = subprocess.run([*command, "ptx", "run", file, *AXPY_ARGS], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("axpy: no errors; ")
    done = subprocess.run([sys.executable, "-m", "sparse24", "ptx", "run", file], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("missing", ["typer", "rich.table", "numpy"])
def test_missing_extra_is_one_line(missing: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None; import runpy; runpy.run_module('sparse24', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = done.stderr.splitlines()  # torch has a warning of its own where numpy is missing
    assert done.returncode == 1 and (len(lines) == 1 or missing == "numpy") and "Traceback" not in done.stderr
    assert re.fullmatch(rf"sparse24: the command line needs {missing}: pip install 'sparse24\[cli\]'", lines[-1])


def test_ctrl_c_of_the_program(tmp_path: Path, spin: str) -> None:
    path = tmp_path / "spin.ptx"
    path.write_text(spin)
    code = f"""
import signal, sys
from sparse24 import cli, ptx
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs start with it ignored
launch = ptx.Module.launch
def announced(*args, **options):
    print("started", flush=True)
    return launch(*args, **options)
ptx.Module.launch = announced
sys.argv = ["sparse24", "ptx", "run", {str(path)!r}, "--budget", "2000000000"]
cli.main()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error == "sparse24: interrupted\n"
