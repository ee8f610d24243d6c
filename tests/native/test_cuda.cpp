// The decompress kernels, on the PTX that ships, through their launches and the driver's machine; the driver is
// tests/native/fake_libcuda.cpp. Expected: csrc/cpu's decompress.
#include <fstream>
#include <iterator>
#include <vector>

#include "csrc/cpu/format/format.h"
#include "csrc/cuda/driver.h"
#include "csrc/cuda/linear.h"
#include "tests/native/device_memory.h"

using namespace sparse24;
using test::DeviceCopy;
using test::fake;
using test::Random;

namespace {

void decompress_equals_cpu(Element element, Pattern pattern, int64_t rows, int64_t in_features, Random& random) {
  const int64_t row_bytes = dense_row_bytes(element, in_features);
  std::vector<uint8_t> dense(rows * row_bytes), values(rows * values_row_bytes(pattern, element, in_features));
  std::vector<uint8_t> meta(rows * meta_row_bytes(pattern, in_features)), expected(dense.size());
  for (uint8_t& byte : dense) byte = static_cast<uint8_t>(random.bits());
  cpu::compress({dense.data(), row_bytes, rows, in_features, element}, pattern, cpu::Selection::MAGNITUDE,
                {values.data(), meta.data()});
  cpu::decompress({values.data(), meta.data()}, rows, in_features, element, pattern, expected.data());

  std::vector<uint8_t> got(dense.size(), 0xA5);
  const size_t alignment = std::max(element_bits(element) / 8, 1);
  const DeviceCopy on_values(values.data(), values.size(), alignment), on_meta(meta.data(), meta.size());
  const DeviceCopy on_dense(got.data(), got.size(), alignment);
  cuda::DriverMachine(0, nullptr)
      .run(cuda::describe_decompress(on_values.get<void>(), on_meta.get<uint8_t>(), on_dense.get<void>(), rows,
                                     in_features, element, pattern));
  on_dense.read(got.data());
  CHECK(expected == got, "element ", static_cast<int>(element), " pattern ", static_cast<int>(pattern), " rows ", rows,
        " in_features ", in_features);
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

}  // namespace

// With an argument, the name of a PTX file: that runs in the place of what ships.
int main(int argc, char** argv) {
  fake();  // with the shipped modules, before anything asks for them
  if (argc == 2) {
    std::ifstream file(argv[1]);
    fake().edited_ptx["decompress"].assign(std::istreambuf_iterator<char>(file), {});
  }
  every_element_pattern_and_tail();
  CHECK(fake().launches.size() > 600);
  CHECK(fake().allocations == 0);
  CHECK(fake().findings.empty(), fake().findings);
  return 0;
}
