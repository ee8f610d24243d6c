// The launch path: descriptions, the driver's loading, contexts and errors, and the decompress kernel itself, run by a
// stand-in for libcuda.so.1 that executes kernels/*.cu compiled for the host. Expected: csrc/cpu's decompress.
#include <dlfcn.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>

#include "csrc/cpu/format.h"
#include "csrc/cuda/launch.h"
#include "tests/native/check.h"
#include "tests/native/fake_libcuda.h"

using namespace sparse24;
using test::Guarded;
using test::Random;

namespace {

FakeCuda& fake() {
  static FakeCuda& state = [&]() -> FakeCuda& {
    void* library = dlopen("libcuda.so.1", RTLD_NOW);
    CHECK(library, dlerror());
    const auto get = reinterpret_cast<decltype(&fake_cuda)>(dlsym(library, "fake_cuda"));
    CHECK(get, "libcuda.so.1 is a real driver: set LD_LIBRARY_PATH to the stand-in's folder");
    return *get();
  }();
  return state;
}

void decompress_equals_cpu(Element element, Pattern pattern, int64_t rows, int64_t in_features, Random& random) {
  const int64_t row_bytes = dense_row_bytes(element, in_features);
  Guarded<uint8_t> dense(rows * row_bytes, 8);
  for (uint8_t& byte : dense) byte = static_cast<uint8_t>(random.bits());
  Guarded<uint8_t> values(rows * values_row_bytes(pattern, element, in_features), 8);
  Guarded<uint8_t> meta(rows * meta_row_bytes(pattern, in_features));
  cpu::compress({dense.data(), row_bytes, rows, in_features, element}, pattern, cpu::Selection::MAGNITUDE,
                {values.data(), meta.data()});

  const int64_t bytes = rows * row_bytes;
  Guarded<uint8_t> expected(bytes, 8), got(bytes, 8);
  std::memset(got.data(), 0xA5, bytes);
  cpu::decompress({values.data(), meta.data()}, rows, in_features, element, pattern, expected.data());
  int stream = 0;
  cuda::run_on_driver(
      cuda::describe_decompress(values.data(), meta.data(), got.data(), rows, in_features, element, pattern), 0,
      &stream);
  CHECK(fake().last_stream == &stream);
  CHECK(std::memcmp(expected.data(), got.data(), bytes) == 0, "element ", static_cast<int>(element), " pattern ",
        static_cast<int>(pattern), " rows ", rows, " in_features ", in_features);
}

void every_element_pattern_and_tail() {
  Random random(24);
  for (const Element element : {Element::F32, Element::F16, Element::BF16, Element::I8, Element::I4}) {
    for (const Pattern pattern : {Pattern::TWO_FOUR, Pattern::ONE_TWO, Pattern::PAIR_FOUR_EIGHT}) {
      for (int64_t in_features = 1; in_features <= 40; ++in_features) {
        decompress_equals_cpu(element, pattern, 1 + in_features % 19, in_features, random);
      }
      decompress_equals_cpu(element, pattern, 3, 8 * 32 * 2 - 1, random);  // one unit short of two blocks of meta
      decompress_equals_cpu(element, pattern, 3, 8 * 32 * 2 + 1, random);
    }
  }
  decompress_equals_cpu(Element::I8, Pattern::TWO_FOUR, 65535 * 8 + 9, 1, random);  // more rows than the grid's limit
}

// A thread that never touched CUDA has no context; one that used device 1 has the wrong one.
void cold_thread_and_second_device() {
  Random random(1);
  std::thread([&] { decompress_equals_cpu(Element::F16, Pattern::TWO_FOUR, 2, 16, random); }).join();
  CHECK(fake().last_device == 0);
  uint8_t values[2] = {7, 9}, meta[1] = {0xE}, dense[4];
  const auto launch = cuda::describe_decompress(values, meta, dense, 1, 4, Element::I8, Pattern::TWO_FOUR);
  cuda::run_on_driver(launch, 1, nullptr);
  CHECK(fake().last_device == 1);
  cuda::run_on_driver(launch, 0, nullptr);
  CHECK(fake().last_device == 0);
  CHECK(dense[0] == 0 && dense[1] == 0 && dense[2] == 7 && dense[3] == 9);
}

void refused_cubins_fall_back_to_ptx() {
  uint8_t values[2] = {7, 9}, meta[1] = {0x4}, dense[4];
  const auto launch = cuda::describe_decompress(values, meta, dense, 1, 4, Element::I8, Pattern::TWO_FOUR);
  CHECK(fake().ptx_loads == 0);
  fake().refuse_cubins = true;
  cuda::run_on_driver(launch, 2, nullptr);  // device 2 has loaded nothing yet
  CHECK(fake().ptx_loads == 1);
  CHECK(dense[0] == 7 && dense[1] == 9 && dense[2] == 0 && dense[3] == 0);
  fake().refuse_cubins = false;
}

void errors_carry_the_call_and_the_words_of_the_driver() {
  uint8_t values[2] = {7, 9}, meta[1] = {0x4}, dense[4];
  auto launch = cuda::describe_decompress(values, meta, dense, 1, 4, Element::I8, Pattern::TWO_FOUR);
  launch.grid.y = 70000;
  try {
    cuda::run_on_driver(launch, 0, nullptr);
    CHECK(false, "a grid beyond the limit was launched");
  } catch (const std::runtime_error& error) {
    const std::string text = error.what();
    CHECK(text.find("cuLaunchKernelEx decompress_b8") != std::string::npos, text);
    CHECK(text.find("an error of the stand-in (1)") != std::string::npos, text);
  }
}

}  // namespace

int main() {
  every_element_pattern_and_tail();
  cold_thread_and_second_device();
  refused_cubins_fall_back_to_ptx();
  errors_carry_the_call_and_the_words_of_the_driver();
  CHECK(fake().launches > 600);
  return 0;
}
