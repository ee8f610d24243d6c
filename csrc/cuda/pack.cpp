// The launches of kernels/pack.cu.
#include "kernels/pack.cuh"

#include <stdexcept>

#include "csrc/cuda/linear.h"
#include "kernels/packed.cuh"

namespace sparse24::cuda {

namespace {

Launch describe(bool packs, void* values, uint8_t* meta, Element element, int64_t out_features, int64_t in_features,
                uint8_t* packed) {
  constexpr int64_t MAX_GRID_X = (int64_t{1} << 31) - 1;  // CUDA C++ Programming Guide, compute capabilities
  const bool bytes = element == Element::I8;
  const int64_t size = packed_bytes(element, out_features, in_features);
  const int64_t blocks = (size / 4 + packed::THREADS - 1) / packed::THREADS;
  if (blocks > MAX_GRID_X) throw std::runtime_error("the weight is too large to be packed in one launch");

  Launch launch;
  launch.module = &PACK_MODULE;
  launch.kernel = packs ? (bytes ? "pack_b8" : "pack_b16") : (bytes ? "unpack_b8" : "unpack_b16");
  launch.grid = {static_cast<unsigned>(blocks)};
  launch.block = {packed::THREADS};
  launch.pass(PackArguments{values, meta, packed, out_features, in_features});
  const auto range = [&](size_t offset, void* data, uint64_t bytes, size_t alignment, bool written) {
    if (written)
      launch.writes(offset, data, bytes, alignment);
    else
      launch.reads(offset, data, bytes, alignment);
  };
  range(offsetof(PackArguments, values), values,
        out_features * values_row_bytes(Pattern::TWO_FOUR, element, in_features), 1, !packs);
  range(offsetof(PackArguments, meta), meta, out_features * meta_row_bytes(Pattern::TWO_FOUR, in_features), 1, !packs);
  range(offsetof(PackArguments, packed), packed, size, 4, packs);
  return launch;
}

}  // namespace

int64_t packed_bytes(Element element, int64_t out_features, int64_t in_features) {
  return packed::bytes(element_bits(element), out_features, in_features);
}

Launch describe_pack(const void* values, const uint8_t* meta, Element element, int64_t out_features,
                     int64_t in_features, uint8_t* packed) {
  return describe(true, const_cast<void*>(values), const_cast<uint8_t*>(meta), element, out_features, in_features,
                  packed);
}

Launch describe_unpack(const uint8_t* packed, Element element, int64_t out_features, int64_t in_features, void* values,
                       uint8_t* meta) {
  return describe(false, values, meta, element, out_features, in_features, const_cast<uint8_t*>(packed));
}

}  // namespace sparse24::cuda
