// Prune, compress, validate and decompress on the CPU (format.h): rows in parallel, cut into blocks of 64 units for the
// kernels of the instruction set in use, and the portable kernels.
#include "csrc/cpu/format/format.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <limits>

#include "csrc/cpu/format/format_kernels.h"
#include "csrc/cpu/isa.h"
#include "csrc/cpu/parallel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sparse24::cpu {
namespace {

static_assert(std::endian::native == std::endian::little, "keep and code words are stored as bytes, lowest first");

template <int BITS>
struct UnsignedOf;
template <>
struct UnsignedOf<8> {
  using Type = uint8_t;
};
template <>
struct UnsignedOf<16> {
  using Type = uint16_t;
};
template <>
struct UnsignedOf<32> {
  using Type = uint32_t;
};
template <>
struct UnsignedOf<64> {
  using Type = uint64_t;
};

// Items of 4 to 64 bits in unaligned memory; 4-bit ones lie two to a byte, the even one low.
template <int BITS>
uint64_t item_at(const uint8_t* data, int64_t index) {
  if constexpr (BITS == 4) {
    return (data[index / 2] >> (index % 2 * 4)) & 15;
  } else {
    typename UnsignedOf<BITS>::Type item;
    memcpy(&item, data + index * (BITS / 8), sizeof item);
    return item;
  }
}

template <int BITS>
void set_item(uint8_t* data, int64_t index, uint64_t value) {
  if constexpr (BITS == 4) {
    const int shift = index % 2 * 4;
    data[index / 2] = static_cast<uint8_t>((data[index / 2] & (0xf0 >> shift)) | (value << shift));
  } else {
    const auto item = static_cast<typename UnsignedOf<BITS>::Type>(value);
    memcpy(data + index * (BITS / 8), &item, sizeof item);
  }
}

struct Portable {
  template <Element ELEMENT, bool PAIR>
  static Beats<uint64_t> beats(const uint8_t* block) {
    constexpr int BITS = element_bits(ELEMENT);
    uint32_t size[BLOCK_UNITS];
    for (int unit = 0; unit < BLOCK_UNITS; ++unit) {
      if constexpr (PAIR) {
        size[unit] = pair_magnitude<ELEMENT>(item_at<BITS>(block, 2 * unit), item_at<BITS>(block, 2 * unit + 1));
      } else {
        size[unit] = magnitude<ELEMENT>(item_at<BITS>(block, unit));
      }
    }
    Beats<uint64_t> beats{0, 0};
    for (int unit = 0; unit < BLOCK_UNITS; unit += 4) {
      const uint32_t* s = size + unit;
      const uint64_t next = (s[1] > s[0]) | ((s[2] > s[1]) << 1) | ((s[3] > s[2]) << 2) | ((s[3] > s[0]) << 3);
      const uint64_t opposite = (s[2] > s[0]) | ((s[3] > s[1]) << 1);
      beats.next |= next << unit;
      beats.opposite |= opposite << unit;
    }
    return beats;
  }

  template <Element ELEMENT, bool PAIR>
  static uint64_t nonzero(const uint8_t* block) {
    constexpr int BITS = element_bits(ELEMENT) * (PAIR ? 2 : 1);
    uint64_t result = 0;
    for (int unit = 0; unit < BLOCK_UNITS; ++unit) {
      const bool set = (item_at<BITS>(block, unit) & unit_magnitude_bits(ELEMENT, PAIR)) != 0;
      result |= uint64_t{set} << unit;
    }
    return result;
  }

  template <int UNIT_BITS>
  static void compact(const uint8_t* block, uint64_t keep, uint8_t* values, bool) {
    const uint64_t codes = codes_of(keep);
    for (int group = 0; group < BLOCK_GROUPS; ++group) {
      const int code = (codes >> (4 * group)) & 15;
      set_item<UNIT_BITS>(values, 2 * group, item_at<UNIT_BITS>(block, 4 * group + first_of(code)));
      set_item<UNIT_BITS>(values, 2 * group + 1, item_at<UNIT_BITS>(block, 4 * group + second_of(code)));
    }
  }

  template <int UNIT_BITS>
  static void expand(const uint8_t* values, uint64_t keep, uint8_t* block) {
    memset(block, 0, BLOCK_UNITS * UNIT_BITS / 8);
    const uint64_t codes = codes_of(keep);
    for (int group = 0; group < BLOCK_GROUPS; ++group) {
      const int code = (codes >> (4 * group)) & 15;
      set_item<UNIT_BITS>(block, 4 * group + first_of(code), item_at<UNIT_BITS>(values, 2 * group));
      set_item<UNIT_BITS>(block, 4 * group + second_of(code), item_at<UNIT_BITS>(values, 2 * group + 1));
    }
  }

  static void spread(uint64_t bits, uint8_t* bytes) {
    for (int i = 0; i < 64; ++i) bytes[i] = (bits >> i) & 1;
  }
};

FormatKernels active_kernels(Element element, Pattern pattern, Selection selection) {
#if defined(__x86_64__)
  if (active_isa() >= Isa::AVX512) return avx512_format_kernels(element, pattern, selection);
  if (active_isa() >= Isa::AVX2) return avx2_format_kernels(element, pattern, selection);
#endif
  return format_kernels<Portable>(element, pattern, selection);
}

// The sizes of a piece of a row.
struct Extent {
  Extent(Pattern pattern, Element element, int64_t columns)
      : columns(columns),
        dense(dense_row_bytes(element, columns)),
        values(values_row_bytes(pattern, element, columns)),
        meta(meta_row_bytes(pattern, columns)) {}

  int64_t columns;
  int64_t dense, values, meta;  // bytes
};

// A row is `blocks` whole blocks, the body, and a rest of fewer than 64 units, perhaps none.
struct Row {
  Row(Pattern pattern, Element element, int64_t in_features)
      : blocks(in_features / (BLOCK_UNITS * unit_columns(pattern))),
        body(pattern, element, blocks * BLOCK_UNITS * unit_columns(pattern)),
        rest(pattern, element, in_features - body.columns),
        half_dense(element == Element::I4 && rest.columns % 2 == 1),
        half_meta(group_count(pattern, rest.columns) % 2 == 1) {}

  int64_t values_bytes() const { return body.values + rest.values; }
  int64_t meta_bytes() const { return body.meta + rest.meta; }

  int64_t blocks;
  Extent body, rest;
  bool half_dense, half_meta;  // the last byte of the dense row, of the meta row holds one nibble
};

// One block in local memory, for the rest of a row.
struct Padded {
  uint8_t dense[BLOCK_UNITS * 8] = {};  // float32 in pair 4:8 has the widest units, 8 bytes
  uint8_t values[BLOCK_UNITS * 4] = {};
  uint8_t meta[BLOCK_META_BYTES] = {};
  uint8_t mask[BLOCK_UNITS * 2];
};

void load_rest(const Row& row, const uint8_t* dense, Padded& block) {
  memcpy(block.dense, dense + row.body.dense, row.rest.dense);
  if (row.half_dense) block.dense[row.rest.dense - 1] &= 15;
}

// Returns the first group that does not fit, or -1.
int64_t compress_row(const FormatKernels& kernels, const Row& row, const uint8_t* dense, uint8_t* values, uint8_t* meta,
                     bool stream) {
  if (row.blocks > 0) {
    const bool aligned = reinterpret_cast<uintptr_t>(values) % 32 == 0;
    const int64_t misfit = kernels.compress(dense, row.blocks, values, meta, stream && aligned);
    if (misfit >= 0) return misfit;
  }
  if (row.rest.columns == 0) return -1;
  Padded block;
  load_rest(row, dense, block);
  const int64_t misfit = kernels.compress(block.dense, 1, block.values, block.meta, false);
  if (misfit >= 0) return BLOCK_GROUPS * row.blocks + misfit;
  if (row.half_meta) block.meta[row.rest.meta - 1] &= 15;
  memcpy(values + row.body.values, block.values, row.rest.values);
  memcpy(meta + row.body.meta, block.meta, row.rest.meta);
  return -1;
}

void prune_mask_row(const FormatKernels& kernels, const Row& row, const uint8_t* dense, uint8_t* mask) {
  if (row.blocks > 0) kernels.prune_mask(dense, row.blocks, mask);
  if (row.rest.columns == 0) return;
  Padded block;
  load_rest(row, dense, block);
  kernels.prune_mask(block.dense, 1, block.mask);
  memcpy(mask + row.body.columns, block.mask, row.rest.columns);
}

void decompress_row(const FormatKernels& kernels, const Row& row, const uint8_t* values, const uint8_t* meta,
                    uint8_t* dense) {
  if (row.blocks > 0) kernels.decompress(values, meta, row.blocks, dense);
  if (row.rest.columns == 0) return;
  Padded block;
  memcpy(block.values, values + row.body.values, row.rest.values);
  memcpy(block.meta, meta + row.body.meta, row.rest.meta);
  kernels.decompress(block.values, block.meta, 1, block.dense);
  memcpy(dense + row.body.dense, block.dense, row.rest.dense);
}

// Returns the first group that is not as format.h says, or -1.
template <Pattern PATTERN, int BITS>
int64_t validate_row(const uint8_t* values, const uint8_t* meta, int64_t in_features) {
  const int64_t groups = group_count(PATTERN, in_features);
  for (int64_t group = 0; group < groups; group += BLOCK_GROUPS) {
    const int64_t count = std::min<int64_t>(BLOCK_GROUPS, groups - group);
    uint64_t codes = 0;
    memcpy(&codes, meta + group / 2, (count + 1) / 2);
    const uint64_t bad = illegal<PATTERN>(codes) & (~uint64_t{0} >> (64 - 4 * count));
    if (bad != 0) return group + std::countr_zero(bad) / 4;
  }
  constexpr int UNIT = unit_columns(PATTERN);
  const int64_t last = groups - 1;
  const int code = (meta[last / 2] >> (last % 2 * 4)) & 15;
  for (int slot = 0; slot < 2 * UNIT; ++slot) {
    const int unit = slot < UNIT ? first_of(code) : second_of(code);
    const int64_t column = last * group_columns(PATTERN) + unit * UNIT + slot % UNIT;
    if (column >= in_features && item_at<BITS>(values, last * 2 * UNIT + slot) != 0) return last;
  }
  return groups % 2 == 1 && (meta[last / 2] >> 4) != 0 ? groups : -1;
}

template <Pattern PATTERN>
auto validate_row_of(Element element) {
  switch (element_bits(element)) {
    case 4:
      return validate_row<PATTERN, 4>;
    case 8:
      return validate_row<PATTERN, 8>;
    case 16:
      return validate_row<PATTERN, 16>;
    default:
      return validate_row<PATTERN, 32>;
  }
}

auto validate_row_of(Pattern pattern, Element element) {
  switch (pattern) {
    case Pattern::ONE_TWO:
      return validate_row_of<Pattern::ONE_TWO>(element);
    case Pattern::PAIR_FOUR_EIGHT:
      return validate_row_of<Pattern::PAIR_FOUR_EIGHT>(element);
    default:
      return validate_row_of<Pattern::TWO_FOUR>(element);
  }
}

// Rows for one task: tens of microseconds of work, so that threads end together.
int64_t rows_per_task(int64_t in_features) { return std::max<int64_t>(1, (int64_t{1} << 16) / in_features); }

// The first bad place, found by many threads.
class FirstMisfit {
 public:
  explicit FirstMisfit(int64_t places_per_row) : places_per_row_(places_per_row) {}

  bool known_before(int64_t row) const { return first_.load(std::memory_order_relaxed) < row * places_per_row_; }

  void report(int64_t row, int64_t group) {
    const int64_t place = row * places_per_row_ + group;
    int64_t first = first_.load(std::memory_order_relaxed);
    while (place < first && !first_.compare_exchange_weak(first, place, std::memory_order_relaxed)) {
    }
  }

  Misfit get() const {
    const int64_t place = first_.load(std::memory_order_relaxed);
    return place == NONE ? Misfit{} : Misfit{place / places_per_row_, place % places_per_row_};
  }

 private:
  static constexpr int64_t NONE = std::numeric_limits<int64_t>::max();
  int64_t places_per_row_;
  std::atomic<int64_t> first_{NONE};
};

const uint8_t* row_of(const Dense& dense, int64_t row) {
  return static_cast<const uint8_t*>(dense.data) + row * dense.row_stride;
}

// Values of this size would not stay in a core's caches: they are written past them, which saves reading the lines.
constexpr int64_t STREAM_BYTES = int64_t{4} << 20;

}  // namespace

Misfit compress(const Dense& dense, Pattern pattern, Selection selection, Compressed out) {
  if (dense.in_features == 0) return {};
  const FormatKernels kernels = active_kernels(dense.element, pattern, selection);
  const Row row(pattern, dense.element, dense.in_features);
  const bool stream = dense.rows * row.values_bytes() >= STREAM_BYTES;
  FirstMisfit misfit(group_count(pattern, dense.in_features));
  parallel_for(0, dense.rows, rows_per_task(dense.in_features), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end && !misfit.known_before(n); ++n) {
      const int64_t group =
          compress_row(kernels, row, row_of(dense, n), static_cast<uint8_t*>(out.values) + n * row.values_bytes(),
                       out.meta + n * row.meta_bytes(), stream);
      if (group >= 0) misfit.report(n, group);
    }
#if defined(__x86_64__)
    if (stream) _mm_sfence();
#endif
  });
  return misfit.get();
}

void prune_mask(const Dense& dense, Pattern pattern, uint8_t* mask) {
  if (dense.in_features == 0) return;
  const FormatKernels kernels = active_kernels(dense.element, pattern, Selection::MAGNITUDE);
  const Row row(pattern, dense.element, dense.in_features);
  parallel_for(0, dense.rows, rows_per_task(dense.in_features), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) prune_mask_row(kernels, row, row_of(dense, n), mask + n * dense.in_features);
  });
}

Misfit validate(Compressed in, int64_t rows, int64_t in_features, Element element, Pattern pattern) {
  if (in_features == 0) return {};
  const auto check = validate_row_of(pattern, element);
  const int64_t values_bytes = values_row_bytes(pattern, element, in_features);
  const int64_t meta_bytes = meta_row_bytes(pattern, in_features);
  FirstMisfit misfit(group_count(pattern, in_features) + 1);
  parallel_for(0, rows, rows_per_task(in_features), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end && !misfit.known_before(n); ++n) {
      const auto* values = static_cast<const uint8_t*>(in.values) + n * values_bytes;
      const int64_t group = check(values, in.meta + n * meta_bytes, in_features);
      if (group >= 0) misfit.report(n, group);
    }
  });
  return misfit.get();
}

void decompress(Compressed in, int64_t rows, int64_t in_features, Element element, Pattern pattern, void* dense) {
  if (in_features == 0) return;
  const FormatKernels kernels = active_kernels(element, pattern, Selection::STRICT);
  const Row row(pattern, element, in_features);
  const int64_t dense_bytes = row.body.dense + row.rest.dense;
  parallel_for(0, rows, rows_per_task(in_features), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      decompress_row(kernels, row, static_cast<const uint8_t*>(in.values) + n * row.values_bytes(),
                     in.meta + n * row.meta_bytes(), static_cast<uint8_t*>(dense) + n * dense_bytes);
    }
  });
}

}  // namespace sparse24::cpu
