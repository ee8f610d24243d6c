// y = epilogue(x W^T) on the CPU, W sparse and in the packed form of this family. No torch.
#pragma once
#include <cstdint>

#include "kernels/format.cuh"
#include "kernels/linear.cuh"

namespace sparse24::cpu {

// F32, F16, BF16, I8 and I4_TWO_FOUR weights are 2:4, I4 weights pair 4:8.
SPARSE24_INLINE constexpr Pattern pattern_of(Element weight) {
  return weight == Element::I4 ? Pattern::PAIR_FOUR_EIGHT : Pattern::TWO_FOUR;
}

SPARSE24_INLINE constexpr bool is_integer(Element element) { return element == Element::I8 || is_int4(element); }

// Columns of an integer weight may share scales in groups: group_size of them, a multiple of GROUP_QUANTUM, the last
// group perhaps fewer. 0: all columns are one group.
constexpr int64_t GROUP_QUANTUM = 64;
SPARSE24_INLINE constexpr int64_t scale_groups(int64_t in_features, int64_t group_size) {
  return group_size == 0 || in_features <= group_size ? 1 : (in_features + group_size - 1) / group_size;
}

// Size in bytes of the packed form of W [out_features, in_features].
int64_t packed_bytes(Element weight, int64_t out_features, int64_t in_features, int64_t group_size = 0);

// Canonical <-> packed, exact to the bit both ways; memory-safe for any bytes.
void pack(const void* values, const uint8_t* meta, Element weight, int64_t out_features, int64_t in_features,
          uint8_t* packed, int64_t group_size = 0);
void unpack(const uint8_t* packed, Element weight, int64_t out_features, int64_t in_features, void* values,
            uint8_t* meta, int64_t group_size = 0);

struct Linear {
  const void* x;          // [tokens, in_features], unit inner stride
  int64_t x_stride;       // elements between rows of x, may be any value
  Element x_element;      // F32, F16 or BF16; for I8 and I4 weights also I8
  const uint8_t* packed;  // W, 64-byte aligned
  Element weight;
  bool weight_only;     // I8 and I4, always I4_TWO_FOUR: x is multiplied as it is, not rounded; x_element is not I8
  int64_t in_features;  // K
  Epilogue epilogue;    // kernels/linear.cuh; x_scales for an I8 x alone
  // 0, or how many tokens a plane of y has: then y [tokens / plane][y_stride][plane] is written, not
  // [tokens][y_stride].
  int64_t plane = 0;
  int64_t group_size = 0;  // with one, y_type is not I32

  int64_t y_index(int64_t token, int64_t n) const {
    if (plane == 0) return token * epilogue.y_stride + n;
    return (token / plane * epilogue.y_stride + n) * plane + token % plane;
  }
};

// I8 and I4 weights, unless weight_only: each row of a float x is quantised by its own s = amax / 127 (1 where that is
// 0), q = clamp(round-to-nearest-even(x / s), -127, 127), and s is its x_scale. A row that is not finite gives NaN. The
// sums are exact for in_features up to 2^18.
// BF16 weights round x to bfloat16 first. Dropped entries of W take no part: Inf there gives no NaN. Any number of
// threads may call at once.
void linear(const Linear& call);

// The same for rows of x that are put together of segments, one after the other, each of segment_features columns. That
// is a multiple of what fills 64 bytes, or there is one segment. find(context, token, count, segment, scratch, rows)
// finds the segment of `count` rows from `token` on, at most 16, which it may have written to `scratch`, of `count`
// times scratch_bytes. call.x is not used. Float x are not quantised on the way.
struct RowSource {
  void (*find)(const void* context, int64_t token, int count, int64_t segment, uint8_t* scratch, const void** rows);
  const void* context;
  int64_t segments, segment_features;
  int64_t scratch_bytes;
};
void linear(const Linear& call, const RowSource& source);

// ---- Which kernels run ----

// The kernels of a call: the name and what decided, for reports and measurements.
struct Choice {
  const char* kernels;  // "perm", "gather", ..., or "dense" where a dense product is faster than any of them
  const char* reason;
};
Choice choose(Element weight, bool weight_only, Element x_element, int64_t tokens, int64_t out_features,
              int64_t in_features);

}  // namespace sparse24::cpu
