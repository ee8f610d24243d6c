// The portable version of the tensor cores' arithmetic: whole numbers, one element of D at a time.
#include "csrc/ptx/tensor/arithmetic.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "csrc/ptx/numbers.h"
#include "csrc/ptx/tensor/integer_products.h"

namespace sparse24::ptx::tensor {
namespace {

// The elements of a register's row of 16 bytes; returns how many.
int unpack_row(Type type, const uint32_t* row, float* values) {
  switch (type) {
    case Type::F16:
    case Type::BF16:
      for (int i = 0; i < 8; ++i) {
        const uint32_t bits = row[i / 2] >> 16 * (i % 2) & 0xffff;
        values[i] = type == Type::F16 ? half_to_float(bits) : bfloat16_to_float(bits);
      }
      return 8;
    case Type::TF32:  // the low 13 bits are not part of the value
      for (int i = 0; i < 4; ++i) values[i] = std::bit_cast<float>(row[i] & ~0x1fffu);
      return 4;
    default: {
      const float* const table = fp8_values(type);
      for (int i = 0; i < 16; ++i) values[i] = table[row[i / 4] >> 8 * (i % 4) & 255];
      return 16;
    }
  }
}

struct Values {
  float a[16 * MAX_DEPTH], b[8 * MAX_K];
};

void unpack(const Multiplication& multiplication, Values& values) {
  const int high = multiplication.rows / 8;
  for (int m = 0; m < multiplication.rows; ++m) {
    for (int first = 0, reg = m / 8; first < multiplication.depth; reg += high) {
      float row[16];
      const int count = unpack_row(multiplication.a_type, multiplication.a[reg] + 4 * (m % 8), row);
      for (int i = 0; i < count && first + i < multiplication.depth; ++i) {
        values.a[m * multiplication.depth + first + i] = row[i];
      }
      first += count;
    }
  }
  for (int n = 0; n < 8; ++n) {
    for (int first = 0, reg = 0; first < multiplication.k; ++reg) {
      float column[16];
      const int count = unpack_row(multiplication.b_type, multiplication.b[reg] + 4 * n, column);
      for (int i = 0; i < count && first + i < multiplication.k; ++i) values.b[8 * (first + i) + n] = column[i];
      first += count;
    }
  }
}

// significand * 2^(exponent - fraction bits)
struct Parts {
  int64_t significand;
  int exponent;
};

// Of a finite value; 23 fraction bits.
Parts parts_of(float value, int smallest) {
  if (value == 0) return {0, smallest};
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const int biased = static_cast<int>(bits >> 23 & 255);
  int exponent = std::max(biased, 1) - 127;
  int64_t significand = (bits & 0x7fffff) | (biased != 0 ? 0x800000 : 0);
  if (exponent < smallest) {
    significand >>= smallest - exponent;  // exact: the type has fewer bits
    exponent = smallest;
  }
  return {bits >> 31 ? -significand : significand, exponent};
}

// value * 2^shift, truncated toward zero.
int64_t shifted(int64_t value, int shift) {
  if (shift >= 0) return value * (int64_t{1} << shift);
  return shift <= -63 ? 0 : value / (int64_t{1} << -shift);
}

// sum * 2^exponent, truncated toward zero to `significant` bits of a float32.
float truncated(int64_t sum, int exponent, int significant) {
  const uint64_t magnitude = static_cast<uint64_t>(std::llabs(sum));
  const int bits = 64 - std::countl_zero(magnitude);
  const int drop = std::max({bits - significant, -126 - (significant - 1) - exponent, 0});
  const float kept = drop > 63 ? 0.0f : static_cast<float>(magnitude >> drop);  // at most 24 bits
  const float value = std::ldexp(kept, exponent + drop);
  return sum < 0 ? -value : value;
}

// The rules of infinities and NaNs, for operands that are not all finite.
float exceptional(const float* a, const Values& values, const uint16_t* source, int depth, int n, float c) {
  double sum = c;  // products of finite values cannot overflow a double
  for (int i = 0; i < depth; ++i) sum += static_cast<double>(a[i]) * values.b[source[i] + n];
  return static_cast<float>(sum);
}

float in_blocks(const Multiplication& multiplication, const float* a, const Values& values, const uint16_t* source,
                int n, float c) {
  const Model& model = multiplication.model;
  const auto smallest = [&](Type type) { return smallest_exponent(model.through_f16 ? Type::F16 : type); };
  const int a_smallest = smallest(multiplication.a_type), b_smallest = smallest(multiplication.b_type);
  bool finite = std::isfinite(c);
  for (int i = 0; i < multiplication.depth; ++i) {
    finite = finite && std::isfinite(a[i]) && std::isfinite(values.b[source[i] + n]);
  }
  if (!finite) return exceptional(a, values, source, multiplication.depth, n, c);
  float total = model.through_f16 ? 0.0f : c;
  for (int first = 0; first < multiplication.depth && std::isfinite(total); first += model.products) {
    const int count = std::min(model.products, multiplication.depth - first);
    Parts products[MAX_DEPTH];
    int top = model.floor;
    for (int i = 0; i < count; ++i) {
      const int at = summed(multiplication, first + i);
      const Parts x = parts_of(a[at], a_smallest), y = parts_of(values.b[source[at] + n], b_smallest);
      // 10 fraction bits hold every type's significand.
      products[i] = {(x.significand / 8192) * (y.significand / 8192), x.exponent + y.exponent};
      if (products[i].significand != 0) top = std::max(top, products[i].exponent);
    }
    const Parts start = parts_of(total, -126);
    if (total != 0) top = std::max(top, start.exponent);
    int64_t sum = shifted(start.significand, model.fraction - 23 - (top - start.exponent));
    for (int i = 0; i < count; ++i) {
      if (products[i].significand != 0) {
        sum += shifted(products[i].significand, model.fraction - 20 - (top - products[i].exponent));
      }
    }
    // A sum has fewer than 40 bits: exact as a double.
    total = multiplication.half ? rounded_to_half(std::ldexp(static_cast<double>(sum), top - model.fraction))
                                : truncated(sum, top - model.fraction, model.significant);
  }
  if (!model.through_f16) return total;
  return multiplication.half ? rounded_to_half(static_cast<double>(total) + c) : total + c;
}

float chained(const Multiplication& multiplication, const float* a, const Values& values, const uint16_t* source, int n,
              float c) {
  for (int i = 0; i < multiplication.depth; ++i) c = std::fma(a[i], values.b[source[i] + n], c);
  return multiplication.half ? rounded_to_half(c) : c;
}

float in_double(const Multiplication& multiplication, const float* a, const Values& values, const uint16_t* source,
                int n, float c) {
  double sum = c;
  for (int i = 0; i < multiplication.depth; ++i) sum += static_cast<double>(a[i]) * values.b[source[i] + n];
  return multiplication.half ? rounded_to_half(sum) : static_cast<float>(sum);
}

template <auto ELEMENT>
void each_element(const Multiplication& multiplication, float* c) {
  Values values;
  unpack(multiplication, values);
  for (int m = 0; m < multiplication.rows; ++m) {
    const uint16_t* source = multiplication.source + m * multiplication.source_stride;
    for (int n = 0; n < 8; ++n) {
      const float d = ELEMENT(multiplication, values.a + m * multiplication.depth, values, source, n, c[8 * m + n]);
      c[8 * m + n] = std::isnan(d) ? NAN_SINGLE : d;
    }
  }
}

// ---- Integers ----

template <class T>
inline int unpack_bytes(const uint32_t* row, int32_t* values) {
  T bytes[16];
  std::memcpy(bytes, row, 16);
  for (int i = 0; i < 16; ++i) values[i] = bytes[i];
  return 16;
}

template <bool SIGNED>
inline int unpack_nibbles(const uint32_t* row, int32_t* values) {
  for (int i = 0; i < 32; ++i) {
    const uint32_t high = row[i / 8] << (28 - 4 * (i % 8));
    values[i] = SIGNED ? static_cast<int32_t>(high) >> 28 : static_cast<int32_t>(high >> 28);
  }
  return 32;
}

// The elements of a register's row of 16 bytes; returns how many.
inline int unpack_integers(Type type, const uint32_t* row, int32_t* values) {
  switch (type) {
    case Type::S8:
      return unpack_bytes<int8_t>(row, values);
    case Type::U8:
      return unpack_bytes<uint8_t>(row, values);
    case Type::S4:
      return unpack_nibbles<true>(row, values);
    default:
      return unpack_nibbles<false>(row, values);
  }
}

inline void unpack_integers(const Multiplication& multiplication, int32_t* a, int32_t* b) {
  const int high = multiplication.rows / 8;
  const int per_row = multiplication.a_type == Type::S8 || multiplication.a_type == Type::U8 ? 16 : 32;
  for (int m = 0; m < multiplication.rows; ++m) {
    for (int first = 0, reg = m / 8; first < multiplication.depth; first += per_row, reg += high) {
      unpack_integers(multiplication.a_type, multiplication.a[reg] + 4 * (m % 8), a + m * multiplication.depth + first);
    }
  }
  for (int n = 0; n < 8; ++n) {
    for (int first = 0, reg = 0; first < multiplication.k; first += per_row, ++reg) {
      int32_t values[32];
      const int count = unpack_integers(multiplication.b_type, multiplication.b[reg] + 4 * n, values);
      for (int i = 0; i < count; ++i) b[8 * (first + i) + n] = values[i];
    }
  }
}

inline void multiply_integers(const Multiplication& multiplication, int32_t* c) {
  alignas(64) int32_t a[16 * MAX_DEPTH], b[8 * MAX_K];
  unpack_integers(multiplication, a, b);
  for (int m = 0; m < multiplication.rows; ++m) {
    const uint16_t* source = multiplication.source + m * multiplication.source_stride;
    const int32_t* row = a + m * multiplication.depth;
    int32_t sums[8] = {};
    for (int i = 0; i < multiplication.depth; ++i) {
      for (int n = 0; n < 8; ++n) sums[n] += row[i] * b[source[i] + n];
    }
    add_sums(multiplication, sums, c + 8 * m);
  }
}

}  // namespace

namespace portable {

void floats(const Multiplication& multiplication, float* c) {
  switch (multiplication.model.numerics) {
    case Numerics::IEEE:
      return each_element<chained>(multiplication, c);
    case Numerics::FLOAT64:
      return each_element<in_double>(multiplication, c);
    default:
      return each_element<in_blocks>(multiplication, c);
  }
}

void integers(const Multiplication& multiplication, int32_t* c) {
  if (multiplication.a_type == Type::B1) return multiply_bits(multiplication, c);
  multiply_integers(multiplication, c);
}

}  // namespace portable
}  // namespace sparse24::ptx::tensor
