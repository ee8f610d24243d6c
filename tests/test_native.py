"""The tests of the kernels without torch (tests/native): as they ship, under sanitizers, and with bugs planted."""

import os
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import mutation
import pytest
from mutation import Mutant

ROOT = Path(__file__).parents[1]
HAS_AMX = "amx_int8" in Path("/proc/cpuinfo").read_text()
PROGRAMS = [path.stem for path in sorted((ROOT / "tests" / "native").rglob("test_*.cpp"))]


def run(program: Path, fake: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(fake)}  # where tests/native/fake_libcuda.cpp is libcuda.so.1
    return subprocess.run([program, *arguments], env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("build", ["native_release", "native_sanitize"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_native(request: pytest.FixtureRequest, build: str, program: str) -> None:
    folder = request.getfixturevalue(build)
    done = run(folder / program, folder / "fake")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


# ---- Do the tests bite? ----------------------------------------------------------------------------------------------


MUTANTS = {
    "launch: a row of blocks short": Mutant(
        "test_cuda", "csrc/cuda/decompress.cpp", "(row_bytes + BLOCK_BYTES - 1)", "(row_bytes + BLOCK_BYTES - 2)"
    ),
    "driver: another device's context is taken": Mutant(
        "test_driver", "csrc/cuda/driver_api.cpp", "if (handle == device) return;", "return;"
    ),
    "driver: a cold thread has no context": Mutant(
        "test_driver", "csrc/cuda/driver_api.cpp", "  if (current) {\n", "  if (!current) return;\n  {\n"
    ),
    "driver: the thread's context is lost": Mutant(
        "test_driver", "csrc/cuda/driver_api.cpp", "  before_ = current;\n", ""
    ),
    "driver: the stream is left out": Mutant(
        "test_driver", "csrc/cuda/driver.cpp", "config.hStream = static_cast<CUstream>(stream_);", "(void)stream_;"
    ),
    "driver: no PTX for refused cubins": Mutant(
        "test_driver", "csrc/cuda/driver.cpp", "load(module.ptx, kernel, loaded.library)", "CUDA_ERROR_INVALID_PTX"
    ),
    "driver: loading breaks a capture": Mutant(
        "test_driver", "csrc/cuda/driver.cpp", "  const RelaxedCapture relaxed;\n", ""
    ),
    "driver: a module is loaded again": Mutant(
        "test_driver", "csrc/cuda/driver.cpp", "  if (!loaded.library) load_module", "  load_module"
    ),
    "driver: shared memory is not asked for": Mutant(
        "test_driver", "csrc/cuda/driver.cpp", "if (dynamic > SHARED_BYTES_ALLOWED) {", "if (false) {"
    ),
    "images: sm_90a for a later minor": Mutant("test_driver", "csrc/cuda/image.cpp", "image.kind != 'a' && ", ""),
    "images: the oldest, not the latest": Mutant(
        "test_driver", "csrc/cuda/image.cpp", "image.sm > best->sm", "image.sm < best->sm"
    ),
    "limits: registers of warps are not rounded": Mutant(
        "test_driver",
        "csrc/cuda/image.cpp",
        "round_up(uint64_t{resources.registers} * 32, 256)",
        "uint64_t{resources.registers} * 32",
    ),
    "limits: static shared memory is left out": Mutant(
        "test_driver",
        "csrc/cuda/image.cpp",
        "uint64_t{launch.shared_bytes} + resources.shared_bytes;",
        "uint64_t{launch.shared_bytes};",
    ),
    "known answer: tried while a graph is captured": Mutant(
        "test_known_answer", "csrc/cuda/known_answer.cpp", "if (is_capturing(device, stream)) return none;", ""
    ),
    "known answer: y is not looked at": Mutant(
        "test_known_answer", "csrc/cuda/known_answer.cpp", "if (got[i] == expected[i]) continue;", "continue;"
    ),
    "known answer: the kernels that copy single elements are not tried": Mutant(
        "test_known_answer", "csrc/cuda/known_answer.cpp", "{problem.bytes, 4, 16}", "{4, 16}"
    ),
    "known answer: K is never split": Mutant(
        "test_known_answer", "csrc/cuda/known_answer.cpp", "alignment == LINE ? 2 : 1", "1"
    ),
    "known answer: another thread's capture is broken": Mutant(
        "test_known_answer",
        "csrc/cuda/known_answer.cpp",
        "  const RelaxedCapture relaxed;  // of other threads' streams\n",
        "",
    ),
    "known answer: no memory is for ever": Mutant(
        "test_known_answer", "csrc/cuda/known_answer.cpp", "error.code == CUDA_ERROR_OUT_OF_MEMORY", "false"
    ),
    "format: the unused half byte is written": Mutant(
        "test_format", "csrc/cpu/format/format.cpp", "if (row.half_meta) block.meta[row.rest.meta - 1] &= 15;", ""
    ),
    "format: a slot at in_features may hold anything": Mutant(
        "test_format", "csrc/cpu/format/format.cpp", "if (column >= in_features &&", "if (column > in_features &&"
    ),
    "format, AVX-512: NaNs rank by their payload": Mutant(
        "test_format",
        "csrc/cpu/format/format_avx512.cpp",
        "_mm512_set1_epi32(0x7f800001)",
        "_mm512_set1_epi32(0x7fffffff)",
    ),
    "linear: every sixteen rows are packed as the first": Mutant(
        "test_linear",
        "csrc/cpu/linear/linear.cpp",
        "static_cast<int>(token - begin * panels.strip_rows), own_scales",
        "static_cast<int>(0 * begin), own_scales",
    ),
    "linear: x_scales of the next rows": Mutant(
        "test_linear",
        "csrc/cpu/linear/linear.cpp",
        "epilogue.x_scales[(token + row) *",
        "epilogue.x_scales[(token + row + 1) *",
    ),
    "linear: compensation off by one": Mutant(
        "test_linear",
        "csrc/cpu/linear/packed.cpp",
        "* compensation_factor(ELEMENT)",
        "* (compensation_factor(ELEMENT) - 1)",
    ),
    "linear: the nibbles of int4 are packed the wrong way round": Mutant(
        "test_linear", "csrc/cpu/linear/packed.cpp", "return slot / 4 % 2 * 4; }", "return 4 - slot / 4 % 2 * 4; }"
    ),
    "groups: compensation of the next group": Mutant(
        "test_linear", "csrc/cpu/linear/packed.cpp", "chunk / group_chunks *", "(chunk + 1) / group_chunks *"
    ),
    "groups, portable: the short last group is lost": Mutant(
        "test_linear", "csrc/cpu/linear/linear_portable.cpp", "== 0 || chunk + 1 == chunks)", "== 0)"
    ),
    "groups, portable: sums of the group before stay": Mutant(
        "test_linear", "csrc/cpu/linear/linear_portable.cpp", "        std::memset(sums, 0, sizeof sums);\n", ""
    ),
    "groups, portable: every group has the first one's scales": Mutant(
        "test_linear",
        "csrc/cpu/linear/linear_portable.cpp",
        "call.epilogue.scales + group * out_features + first",
        "call.epilogue.scales + 0 * group + first",
    ),
    "groups, AVX-512: the last group alone": Mutant(
        "test_linear",
        "csrc/cpu/linear/linear_avx512.h",
        "if (call.group_size) add_group<",
        "if (call.group_size && is_last) add_group<",
        "csrc/cpu/linear/linear_avx512.cpp",
    ),
    "groups, AVX-512: every group has the first one's scales": Mutant(
        "test_linear",
        "csrc/cpu/linear/linear_avx512.h",
        "epilogue.scales + group * epilogue.out_features + column",
        "epilogue.scales + column",
        "csrc/cpu/linear/linear_avx512.cpp",
    ),
    "groups, AVX-512: every group has the first one's compensation": Mutant(
        "test_linear",
        "csrc/cpu/linear/linear_avx512.h",
        "first + group * COMPENSATION_BYTES",
        "first + 0 * group * COMPENSATION_BYTES",
        "csrc/cpu/linear/linear_avx512.cpp",
    ),
    "groups, AVX-512: each group is cut as the last": Mutant(
        "test_linear",
        "csrc/cpu/linear/linear_avx512.h",
        "cut = is_last && half;",
        "cut = half;",
        "csrc/cpu/linear/linear_avx512.cpp",
    ),
    "groups, AVX-512: totals are not scaled by x": Mutant(
        "test_linear",
        "csrc/cpu/linear/linear_avx512.h",
        "      if (groups && x_scales) v = _mm512_mul_ps(v, _mm512_set1_ps(x_scales[row]));\n",
        "",
        "csrc/cpu/linear/linear_avx512.cpp",
    ),
    "groups, AVX2: every group has the first one's scales": Mutant(
        "test_linear", "csrc/cpu/linear/linear_avx2.cpp", "from += shared, ++group;", "from += shared;"
    ),
    "groups, AVX2: one chunk too few": Mutant(
        "test_linear",
        "csrc/cpu/linear/linear_avx2.cpp",
        "const int64_t to = std::min(from + shared, chunks);",
        "const int64_t to = std::min(from + shared, chunks - 1);",
    ),
    "amx: groups: every group has the first one's scales": Mutant(
        "test_linear", "csrc/cpu/linear/linear_amx.cpp", "begin += shared, ++group;", "begin += shared;"
    ),
    "amx: groups: totals of the blocks before stay": Mutant(
        "test_linear",
        "csrc/cpu/linear/linear_amx.cpp",
        "if (call.group_size) std::memset(results, 0, run_bytes);",
        "",
    ),
    "amx: int4 in 2:4: the nibbles of another quad": Mutant(
        "test_linear", "csrc/cpu/linear/linear_amx.cpp", "group / 2 % 2 == 1", "group % 2 == 1"
    ),
    "int4, AVX-512: values of another quad": Mutant(
        "test_linear",
        "csrc/cpu/linear/linear_weight_only_avx512.cpp",
        "_mm512_loadu_si512(all + step / 8 * 64)",
        "_mm512_loadu_si512(all + step / 16 * 64)",
    ),
    "int4 in 2:4, BF16: the second value is the first": Mutant(
        "test_linear",
        "csrc/cpu/linear/linear_avx512_bf16.cpp",
        "i % 4 / 2 * 4 + j % 2 * 2);",
        "i % 4 / 2 * 4 + 0 * j);",
    ),
    "int4 in 2:4, BF16: the second group begins with the first": Mutant(
        "test_linear",
        "csrc/cpu/linear/linear_avx512_bf16.cpp",
        "static_cast<uint32_t>(8 * j + 4) << 16",
        "static_cast<uint32_t>(8 * j) << 16",
    ),
    "linear, portable: the second code of a byte is the first": Mutant(
        "test_linear",
        "csrc/cpu/linear/linear_portable.cpp",
        "(codes >> unit % 4 * 2 & 3)",
        "(codes >> unit % 2 * 2 & 3)",
    ),
    "linear, portable: the residual of another stride": Mutant(
        "test_linear",
        "csrc/cpu/linear/linear_portable.cpp",
        "m * epilogue.residual_stride + n",
        "m * epilogue.y_stride + n",
    ),
    "linear, AVX-512: the control of the next chunk is this chunk's": Mutant(
        "test_linear",
        "csrc/cpu/linear/linear_avx512.h",
        "Dot::template control<ROOM>(part.next_codes, 0)",
        "Dot::template control<ROOM>(part.codes, 0)",
        "csrc/cpu/linear/linear_avx512.cpp",
    ),
    "linear, AVX-512: the last columns are stored unmasked": Mutant(
        "test_linear",
        "csrc/cpu/linear/linear_avx512.h",
        "const __mmask16 mask = first_lanes(features);",
        "const __mmask16 mask = first_lanes(BLOCK_ROWS);",
        "csrc/cpu/linear/linear_avx512.cpp",
    ),
    "linear, AVX-512: half a chunk is left out where none is filling": Mutant(
        "test_linear",
        "csrc/cpu/linear/linear_avx512.h",
        "/ (COLUMNS / 2) % 2 == 1;",
        "/ (COLUMNS / 2) % 2 == 0;",
        "csrc/cpu/linear/linear_avx512.cpp",
    ),
    "linear, AVX-512: an int8 y reaches -128": Mutant(
        "test_linear",
        "csrc/cpu/linear/vector_avx512.h",
        "_mm512_max_ps(quotient, _mm512_set1_ps(-127))",
        "_mm512_max_ps(quotient, _mm512_set1_ps(-128))",
        "csrc/cpu/linear/linear_avx512.cpp",
    ),
    "linear, AVX-512: halves of y are rounded up": Mutant(
        "test_linear",
        "csrc/cpu/linear/vector_avx512.h",
        "_mm512_cvt_roundps_epi32(_mm512_min_ps(low, _mm512_set1_ps(127)), _MM_FROUND_TO_NEAREST_INT",
        "_mm512_cvt_roundps_epi32(_mm512_min_ps(low, _mm512_set1_ps(127)), _MM_FROUND_TO_POS_INF",
        "csrc/cpu/linear/linear_avx512.cpp",
    ),
    "linear, AVX-512: a weight alone is off by one": Mutant(
        "test_linear",
        "csrc/cpu/linear/linear_avx512.h",
        "(1 << (23 - AT)) + (1 << (WIDTH - 1))",
        "(1 << (23 - AT)) + (1 << (WIDTH - 1)) + 1",
        "csrc/cpu/linear/linear_weight_only_avx512.cpp",
    ),
    "linear, AVX-512: int4 keeps the other nibble": Mutant(
        "test_linear",
        "csrc/cpu/linear/linear_avx512.cpp",
        "_mm512_set1_epi8(static_cast<char>(0xf0))",
        "_mm512_set1_epi8(-1)",
    ),
    "linear, AVX-512: the second group's codes in a weight alone": Mutant(
        "test_linear",
        "csrc/cpu/linear/linear_avx512.h",
        "w + second * Dot::PART_CODES, w + CODES",
        "w + 0 * second, w + CODES",
        "csrc/cpu/linear/linear_weight_only_avx512.cpp",
    ),
    "linear, BF16: the pairs of int4 are swapped": Mutant(
        "test_linear",
        "csrc/cpu/linear/linear_avx512_bf16.cpp",
        "2 * first_of(i) + j % 2",
        "2 * first_of(i) + 1 - j % 2",
    ),
    "linear, AVX2: the second group of int8 is the first": Mutant(
        "test_linear",
        "csrc/cpu/linear/linear_avx2.cpp",
        "_mm256_set1_epi32(0x04040000)",
        "_mm256_set1_epi32(0x04000000)",
    ),
    "linear, AVX2: half a block too early": Mutant(
        "test_linear",
        "csrc/cpu/linear/linear_avx2.cpp",
        "w + group / 8 * CODES_BYTES + 32 * (begin + half)",
        "w + group / 8 * CODES_BYTES + 32 * half",
    ),
    "linear, gather: a strip one row short": Mutant(
        "test_linear", "csrc/cpu/linear/linear_gather_avx512.cpp", "i < strip.count", "i + 1 < strip.count"
    ),
    "linear, gather: rows of W are mixed up": Mutant(
        "test_linear",
        "csrc/cpu/linear/linear_gather_avx512.cpp",
        "return rows[0][row % 4][row / 4]",
        "return rows[0][row / 4][row % 4]",
    ),
    "linear, gather: the first slice adds to what was there": Mutant(
        "test_linear",
        "csrc/cpu/linear/linear_gather_avx512.cpp",
        "first ? _mm512_setzero_ps()",
        "false ? _mm512_setzero_ps()",
    ),
    "choice: what lies between two winners": Mutant(
        "test_choice", "csrc/cpu/linear/linear_choice.cpp", " && below->kernels == above->kernels", ""
    ),
    "choice: forced in every thread": Mutant(
        "test_choice", "csrc/cpu/linear/linear_choice.cpp", "thread_local const char* forced", "const char* forced"
    ),
    "conv: dilation is left out": Mutant(
        "test_conv",
        "csrc/cpu/conv/conv.cpp",
        "position % kernel_width * call.dilation_width",
        "position % kernel_width",
    ),
    "conv: what fills a segment is not cleared": Mutant(
        "test_conv", "csrc/cpu/conv/conv.cpp", "        std::memset(to + channels, 0, segment - channels);\n", ""
    ),
    "conv: every group has the first one's bias": Mutant(
        "test_conv", "csrc/cpu/conv/conv.cpp", "  epilogue.bias = advance(epilogue.bias, epilogue.bias_type);\n", ""
    ),
    "conv: every group has the first one's scales": Mutant(
        "test_conv", "csrc/cpu/conv/conv.cpp", "  if (epilogue.scales) epilogue.scales += first;\n", ""
    ),
    "conv: every group has the first one's residual": Mutant(
        "test_conv",
        "csrc/cpu/conv/conv.cpp",
        "  epilogue.residual = advance(epilogue.residual, epilogue.residual_type);\n",
        "",
    ),
    "conv: the first row is padding": Mutant(
        "test_conv", "csrc/cpu/conv/conv.cpp", "const bool inside = row >= 0 &&", "const bool inside = row > 0 &&"
    ),
    "conv: the row after the last is not padding": Mutant(
        "test_conv", "csrc/cpu/conv/conv.cpp", "extent - origin, 0), dilation", "extent + 1 - origin, 0), dilation"
    ),
    "conv: strided kernels of one position read every pixel": Mutant(
        "test_conv", "csrc/cpu/conv/conv.cpp", "call.stride_width == 1 && call.padding", "call.padding"
    ),
    "conv: rows of x with a gap are taken for none": Mutant(
        "test_conv", "csrc/cpu/conv/conv.cpp", "(call.height == 1 || call.row_stride == row) &&", ""
    ),
    "conv: every image has the first one's scale": Mutant(
        "test_conv", "csrc/cpu/conv/conv.cpp", "image_scales[token / pixels]", "image_scales[0 * pixels]"
    ),
    "conv: units of a panel are taken for smaller": Mutant(
        "test_conv", "csrc/cpu/conv/conv.cpp", "== Element::BF16) ? 32 : 16;", "== Element::BF16) ? 16 : 16;"
    ),
    "conv, AVX-512: planes run into each other": Mutant(
        "test_conv",
        "csrc/cpu/linear/linear_avx512.h",
        "const int last = left < count - first ? first + static_cast<int>(left) : count;",
        "const int last = left < 0 ? first + static_cast<int>(left) : count;",
        "csrc/cpu/linear/linear_avx512.cpp",
    ),
    "avx512_bf16: subnormal results are lost": Mutant(
        "test_linear",
        "csrc/cpu/linear/vector_avx512.h",
        "_mm512_fpclass_ps_mask(v, SUBNORMAL) == 0",
        "true",
        "csrc/cpu/linear/linear_avx512_bf16.cpp",
    ),
    "amx: the last strip begins behind its rows": Mutant(
        "test_linear",
        "csrc/cpu/linear/linear_amx.cpp",
        "return std::min(strip * height, rows - height);",
        "return strip * height;",
    ),
    "amx: zeros of W meet what is not finite": Mutant(
        "test_linear",
        "csrc/cpu/linear/linear_amx.cpp",
        "if (any_nan(zeros(row))) multiply_row(call, tile, block, begin + row);",
        "(void)multiply_row;",
    ),
    "amx: another lane's values": Mutant(
        "test_linear",
        "csrc/cpu/linear/linear_amx.cpp",
        "0x04040404u * (i % 4)",
        "0x04040404u * (i % 2)",
    ),
    "amx: the second strip is the first": Mutant(
        "test_linear",
        "csrc/cpu/linear/linear_amx.cpp",
        "_tile_loadd(5, x + strip_bytes, 64);",
        "_tile_loadd(5, x, 64);",
    ),
    "amx: sums of earlier pieces are lost": Mutant(
        "test_linear",
        "csrc/cpu/linear/linear_amx.cpp",
        "  if (first) {",
        "  if (true || first) {",
    ),
    "amx: an odd block counts as two": Mutant(
        "test_linear",
        "csrc/cpu/linear/linear_amx.cpp",
        "if (block + 1 < last) {",
        "if (true) {",
    ),
    "amx: no columns, no sums": Mutant(
        "test_linear",
        "csrc/cpu/linear/linear_amx.cpp",
        ", 1);  // of no columns, one",
        ", 0);",
    ),
    "amx: weight-only int4: the second pair is not found": Mutant(
        "test_linear",
        "csrc/cpu/linear/linear_amx.cpp",
        "_mm512_set1_epi32(4 * place)",
        "_mm512_set1_epi32(place)",
    ),
    "amx: weight-only int8: both groups of a lane are the first": Mutant(
        "test_linear",
        "csrc/cpu/linear/linear_amx.cpp",
        "bf16_of_bytes<true>(four, group % 2 * 2)",
        "bf16_of_bytes<true>(four, 0)",
    ),
    "quantize: halves away from zero": Mutant(
        "test_conv",
        "csrc/cpu/quantize.cpp",
        "clamped + 12582912.0f - 12582912.0f",
        "clamped + (clamped < 0 ? -0.5f : 0.5f)",
    ),
    "quantize: a NaN is the least number": Mutant(
        "test_conv", "csrc/cpu/quantize.cpp", "quotient == quotient ? quotient : 0.0f", "quotient"
    ),
    "quantize: what is too large becomes the least": Mutant(
        "test_conv",
        "csrc/cpu/linear/linear_avx512.cpp",
        "store_quantized(q + k, mask, load_floats(x, element, k, mask), s);",
        "_mm_mask_storeu_epi8(q + k, mask, quantized(load_floats(x, element, k, mask), s));",
    ),
}


@pytest.fixture(scope="module")
def planted(
    request: pytest.FixtureRequest, native_release: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Path]]]:
    """The programs with the planted bugs that are asked for, built side by side: most of a test is its compiler."""
    tests = [item for item in request.session.items if item.path == request.path]
    names = [item.callspec.params["name"] for item in tests if item.originalname == "test_planted_bug_is_caught"]
    names = [name for name in names if HAS_AMX or not name.startswith("amx:")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            name: pool.submit(
                mutation.build, MUTANTS[name], native_release, MUTANTS[name].caught_by, tmp_path_factory.mktemp("bug")
            )
            for name in names
        }
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_caught(name: str, native_release: Path, planted: dict[str, Future[Path]]) -> None:
    if name.startswith("amx:") and not HAS_AMX:
        pytest.skip("needs a CPU with AMX")
    program = planted[name].result()
    assert run(program, native_release / "fake").returncode != 0, f"{MUTANTS[name].caught_by} did not notice: {name}"


KERNEL_MUTANTS = {
    "one column too many": ("if (column >= columns) break;", "if (column > columns) break;"),
    "the two groups of a byte swapped": (
        "const T* kept = values + (row * groups + group) * 2 * PAIR;",
        "const T* kept = values + (row * groups + (group ^ 1)) * 2 * PAIR;",
    ),
}


@pytest.mark.parametrize("name", KERNEL_MUTANTS)
def test_planted_bug_in_decompress_is_caught(name: str, native_release: Path, tmp_path: Path) -> None:
    right, wrong = KERNEL_MUTANTS[name]
    source = (ROOT / "kernels" / "decompress.cu").read_text()
    assert source.count(right) == 1
    (tmp_path / "wrong.cu").write_text(source.replace(right, wrong))
    command = [nvcc(native_release), "-O3", "-std=c++20", "-ptx", "-arch=compute_80", "-I", ROOT / "kernels"]
    subprocess.run([*command, tmp_path / "wrong.cu", "-o", tmp_path / "wrong.ptx"], check=True)
    assert run(native_release / "test_cuda", native_release / "fake", tmp_path / "wrong.ptx").returncode != 0


# ---- What is read of a cubin -----------------------------------------------------------------------------------------


def nvcc(build: Path) -> str:
    return re.search(r"^NVCC:FILEPATH=(.*)$", (build / "CMakeCache.txt").read_text(), re.MULTILINE)[1]


def device_code(build: Path) -> Path:
    """Where its PTX is: in its own folder, or in that of the build it takes it from."""
    taken = re.search(r"^SPARSE24_DEVICE_CODE:PATH=(.+)$", (build / "CMakeCache.txt").read_text(), re.MULTILINE)
    return Path(taken[1]) if taken else build


@pytest.mark.parametrize("arch", ["80", "90a", "120f"])
@pytest.mark.parametrize("module", ["pack", "quantize", "linear_few"])
def test_resources_are_those_of_ptxas(native_release: Path, tmp_path: Path, module: str, arch: str) -> None:
    """Registers and static shared memory, with a launch bound and without."""
    ptx = device_code(native_release) / f"{module}.ptx"
    command = [nvcc(native_release), "-cubin", f"-arch=sm_{arch}", "-Xptxas", "-v", ptx, "-o", tmp_path / "cubin"]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    expected = {}
    for kernel, used in re.findall(r"entry function '(\w+)'.*?Used (.*?)$", told, re.DOTALL | re.MULTILINE):
        shared = re.search(r"(\d+) bytes smem", used)
        bound = re.search(rf"\.entry {kernel}\(.*?\)\s*(?:\.maxntid (\d+))?", ptx.read_text(), re.DOTALL)[1]
        expected[kernel] = (int(used.split()[0]), int(shared[1]) if shared else 0, int(bound or 0))
    assert expected

    done = run(native_release / "test_driver", native_release / "fake", "resources_are_read_from_every_cubin")
    assert done.returncode == 0
    rows = [line.split() for line in done.stdout.splitlines()]
    sm = arch.rstrip("af")
    assert {row[2]: tuple(map(int, row[3:])) for row in rows if row[:2] == [module, sm]} == expected
