// Prune, compress, decompress and check 2:4 matrices on the CPU. No torch: pointers, sizes in elements, strides in
// bytes.
#pragma once
#include <cstdint>

#include "kernels/format.cuh"

namespace sparse24::cpu {

// A dense matrix [rows, in_features] as it lies in memory; rows are contiguous inside, row_stride bytes apart.
struct Dense {
  const void* data;
  int64_t row_stride;   // bytes, may be negative or unaligned
  int64_t rows;         // N, out_features
  int64_t in_features;  // K; for I4 the number of nibbles in a row
  Element element;
};

// A canonical pair of contiguous arrays (docs/format.md).
struct Compressed {
  void* values;
  uint8_t* meta;
};

// The first place, in row order, where an input breaks its pattern; row < 0 where none does.
struct Misfit {
  int64_t row = -1;
  int64_t group = -1;
};

enum class Selection {
  STRICT,     // every group must fit; nonzeros first, then the lowest unused index
  MAGNITUDE,  // the two largest units of each group stay
};

// values, meta = compress(dense). STRICT leaves the output unspecified when it returns a misfit.
Misfit compress(const Dense& dense, Pattern pattern, Selection selection, Compressed out);

// mask[n, k] = 1 where MAGNITUDE keeps column k; mask is contiguous [rows, in_features] bytes of 0 or 1.
void prune_mask(const Dense& dense, Pattern pattern, uint8_t* mask);

// The first group whose code is illegal, or that has anything but +0 in a slot beyond in_features, or whose unused
// half of the last meta byte is not zero; that half is named as the group after the row's last.
Misfit validate(Compressed in, int64_t rows, int64_t in_features, Element element, Pattern pattern);

// dense = decompress(values, meta): `dense` is contiguous [rows, dense_row_bytes]; the caller has validated. Reads and
// writes stay in bounds whatever the codes are.
void decompress(Compressed in, int64_t rows, int64_t in_features, Element element, Pattern pattern, void* dense);

}  // namespace sparse24::cpu
