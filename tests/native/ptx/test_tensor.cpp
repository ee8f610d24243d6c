// The tensor cores' arithmetic: the instruction sets against each other, and both against the model written with plain
// doubles; the metadata of mma.sp against its definition, code by code.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "csrc/ptx/tensor/arithmetic.h"
#include "csrc/ptx/tensor/fragments.h"
#include "tests/native/check.h"

namespace sparse24::ptx::tensor {
namespace {

std::mt19937_64 generator(24);
uint64_t random_bits() { return generator(); }
int random_below(int end) { return static_cast<int>(random_bits() % static_cast<uint64_t>(end)); }

// ---- Floats ----

struct Format {
  Type type;
  int bits, exponent_bits, mantissa_bits;
  bool has_infinity;
};
constexpr Format F16{Type::F16, 16, 5, 10, true}, BF16{Type::BF16, 16, 8, 7, true}, TF32{Type::TF32, 32, 8, 10, true},
    E4M3{Type::E4M3, 8, 4, 3, false}, E5M2{Type::E5M2, 8, 5, 2, true};

int bias_of(const Format& format) { return (1 << (format.exponent_bits - 1)) - 1; }

// From the bits, by the definition of a floating-point format.
double value_of(const Format& format, uint32_t bits) {
  if (format.type == Type::TF32) bits >>= 13;
  const int top = (1 << format.exponent_bits) - 1, exponent = bits >> format.mantissa_bits & top;
  const int mantissa = bits & ((1 << format.mantissa_bits) - 1);
  const bool negative = bits >> (format.mantissa_bits + format.exponent_bits) & 1;
  double value = exponent == 0 ? std::ldexp(mantissa, 1 - bias_of(format) - format.mantissa_bits)
                               : std::ldexp(mantissa + (1 << format.mantissa_bits),
                                            exponent - bias_of(format) - format.mantissa_bits);
  if (format.has_infinity && exponent == top) value = mantissa == 0 ? INFINITY : NAN;
  if (!format.has_infinity && exponent == top && mantissa == (1 << format.mantissa_bits) - 1) value = NAN;
  return negative ? -value : value;
}

// How the exponents of random values are spread.
enum Spread { NARROW, WIDE, TINY, HUGE_VALUES, SPECIAL, SPREADS };

uint32_t random_element(const Format& format, Spread spread) {
  const int top = (1 << format.exponent_bits) - 1, bias = bias_of(format);
  int exponent = random_below(top);
  if (spread == NARROW) exponent = bias - 2 + random_below(4);
  if (spread == TINY) exponent = random_below(3);
  if (spread == HUGE_VALUES) exponent = top - 1 - random_below(3);
  if (spread == SPECIAL && random_below(60) == 0) exponent = top;
  uint32_t mantissa = static_cast<uint32_t>(random_bits()) & ((1u << format.mantissa_bits) - 1);
  if (random_below(8) == 0) mantissa = 0;
  const uint32_t sign = random_below(2);
  uint32_t bits = (sign << (format.exponent_bits + format.mantissa_bits)) |
                  (static_cast<uint32_t>(exponent) << format.mantissa_bits) | mantissa;
  if (random_below(16) == 0) bits = sign << (format.exponent_bits + format.mantissa_bits);
  // The low bits of a tf32 register mean nothing.
  return format.type == Type::TF32 ? bits << 13 | (random_bits() & 0x1fff) : bits;
}

float random_c(Spread spread, bool half) {
  if (random_below(10) == 0) return random_below(2) ? 0.0f : -0.0f;
  const Format single{Type::F32, 32, 8, 23, true};
  const Format& format = half ? F16 : single;
  const uint32_t bits = random_element(format, spread == WIDE && random_below(2) ? NARROW : spread);
  return half ? static_cast<float>(value_of(F16, bits)) : std::bit_cast<float>(bits);
}

// The matrices themselves, apart from registers.
struct Case {
  Format a, b;
  int rows, depth, k;
  std::vector<uint32_t> a_bits, b_bits;  // [row][stored], [k][n]
  std::vector<float> c;                  // [row][8]
  std::vector<int> place;                // [row][stored]: row of B
  std::vector<uint32_t> a_registers, b_registers;
  std::vector<uint16_t> source;
};

// Puts `bits` where lane, register and element say, by the rule of the PTX ISA's figures.
void put(std::vector<uint32_t>& registers, int reg, int lane, int element, int width, uint32_t bits) {
  registers[32 * reg + lane] |= bits << (width * element);
}

Case make_case(const Format& a, const Format& b, int rows, int depth, bool sparse, Spread spread, bool half) {
  const int k = sparse ? 2 * depth : depth;
  Case made{a, b, rows, depth, k, {}, {}, {}, {}, {}, {}, {}};
  const int per = 32 / a.bits, width = 4 * per;
  made.a_registers.assign(32 * (rows / 8) * std::max(1, depth / width), 0);
  made.b_registers.assign(32 * std::max(1, k / width), 0);
  for (int m = 0; m < rows; ++m) {
    for (int i = 0; i < depth; ++i) {
      const uint32_t bits = random_element(a, spread);
      made.a_bits.push_back(bits);
      put(made.a_registers, (rows / 8) * (i / width) + m / 8, 4 * (m % 8) + i % width / per, i % per, a.bits, bits);
      const int chunk = a.bits == 32 ? 2 : 4, kept = chunk / 2;
      const int place =
          sparse ? chunk * (i / kept) + (a.bits == 32 ? random_below(2) : 2 * (i % 2) + random_below(2)) : i;
      made.place.push_back(place);
      made.source.push_back(static_cast<uint16_t>(8 * place));
    }
    for (int n = 0; n < 8; ++n) made.c.push_back(random_c(spread, half));
  }
  for (int i = 0; i < k; ++i) {
    for (int n = 0; n < 8; ++n) {
      const uint32_t bits = random_element(b, spread);
      made.b_bits.push_back(bits);
      put(made.b_registers, i / width, 4 * n + i % width / per, i % per, b.bits, bits);
    }
  }
  return made;
}

Multiplication multiplication_of(const Case& made, Numerics numerics, bool half, uint32_t products) {
  Multiplication multiplication;
  multiplication.a_type = made.a.type, multiplication.b_type = made.b.type;
  multiplication.rows = made.rows, multiplication.depth = made.depth, multiplication.k = made.k;
  for (size_t i = 0; i < made.a_registers.size() / 32; ++i) multiplication.a[i] = made.a_registers.data() + 32 * i;
  for (size_t i = 0; i < made.b_registers.size() / 32; ++i) multiplication.b[i] = made.b_registers.data() + 32 * i;
  multiplication.source = made.source.data(), multiplication.source_stride = made.depth;
  multiplication.half = half;
  multiplication.model = model_of(numerics, made.a.type, half, products);
  return multiplication;
}

// ---- The reference: hardware as published, in doubles ----

int exponent_of(const Format& format, double value) { return std::max(std::ilogb(value), 1 - bias_of(format)); }

double truncated_to_float(double value, int significant) {
  const int exponent = std::max(value == 0 ? -126 : std::ilogb(value), -126) - (significant - 1);
  const double kept = std::ldexp(std::trunc(std::ldexp(value, -exponent)), exponent);
  return std::fabs(kept) >= 0x1p128 ? std::copysign(INFINITY, value) : kept;
}

double nearest_half(double value) {
  if (!std::isfinite(value) || value == 0) return value;
  const int exponent = std::max(std::ilogb(value), -14) - 10;
  const double scaled = std::ldexp(value, -exponent), below = std::floor(scaled), rest = scaled - below;
  const bool up = rest > 0.5 || (rest == 0.5 && std::fmod(below, 2) != 0);
  const double rounded = std::ldexp(below + up, exponent);
  return std::fabs(rounded) > 65504 ? std::copysign(INFINITY, value) : rounded == 0 ? std::copysign(0, value) : rounded;
}

struct Parameters {
  int products, fraction, floor, significant;
};
// hardware.md, section 3, and the model files of MATLAB-tensor-core.
Parameters parameters_of(Numerics numerics, Type type, bool half) {
  const bool ampere = numerics == Numerics::SM_80;
  const int floor = half ? (ampere ? -20 : -21) : (ampere ? -132 : -133);
  if (type == Type::TF32) return {ampere ? 4 : 8, ampere ? 24 : 25, floor, 24};
  // On sm_90 an fp8 mma becomes two of f16; only sm_89 has its own.
  if (ampere && (type == Type::E4M3 || type == Type::E5M2)) return {16, 13, floor, 14};
  return {ampere ? 8 : 16, ampere ? 24 : 25, floor, 24};
}

double expected(const Case& made, Numerics numerics, bool half, uint32_t products, int m, int n) {
  std::vector<double> a, b;
  double c = made.c[8 * m + n];
  bool exceptional = !std::isfinite(c);
  double plain = c;
  for (int i = 0; i < made.depth; ++i) {
    a.push_back(value_of(made.a, made.a_bits[m * made.depth + i]));
    b.push_back(value_of(made.b, made.b_bits[8 * made.place[m * made.depth + i] + n]));
    exceptional = exceptional || !std::isfinite(a[i]) || !std::isfinite(b[i]);
    plain += a[i] * b[i];
  }
  if (numerics == Numerics::IEEE) {
    float sum = static_cast<float>(c);
    for (int i = 0; i < made.depth; ++i) sum = std::fma(static_cast<float>(a[i]), static_cast<float>(b[i]), sum);
    return half ? nearest_half(sum) : sum;
  }
  if (numerics == Numerics::FLOAT64) return half ? nearest_half(plain) : static_cast<float>(plain);
  const bool through_f16 = numerics == Numerics::SM_90 && made.a.bits == 8;
  if (exceptional) return plain;
  const Format &a_format = through_f16 ? F16 : made.a, &b_format = through_f16 ? F16 : made.b;
  const double added = c;
  if (through_f16) {
    c = 0;
    std::vector<double> a_pairs[2], b_pairs[2];  // registers hold four elements, that is two f16 registers' worth
    for (int i = 0; i < made.depth; ++i) {
      const int second = made.depth == 32 && i % 4 >= 2;
      a_pairs[second].push_back(a[i]), b_pairs[second].push_back(b[i]);
    }
    a = a_pairs[0], b = b_pairs[0];
    a.insert(a.end(), a_pairs[1].begin(), a_pairs[1].end()), b.insert(b.end(), b_pairs[1].begin(), b_pairs[1].end());
  }
  Parameters parameters = parameters_of(numerics, made.a.type, half);
  if (products != 0) parameters.products = static_cast<int>(products);
  for (int first = 0; first < made.depth && std::isfinite(c); first += parameters.products) {
    const int end = std::min(first + parameters.products, made.depth);
    int top = parameters.floor;
    if (c != 0) top = std::max(top, std::max(std::ilogb(c), -126));
    for (int i = first; i < end; ++i) {
      if (a[i] * b[i] != 0) top = std::max(top, exponent_of(a_format, a[i]) + exponent_of(b_format, b[i]));
    }
    double sum = std::trunc(std::ldexp(c, parameters.fraction - top));
    for (int i = first; i < end; ++i) sum += std::trunc(std::ldexp(a[i] * b[i], parameters.fraction - top));
    const double exact = std::ldexp(sum, top - parameters.fraction);
    c = half ? nearest_half(exact) : truncated_to_float(exact, parameters.significant);
  }
  if (through_f16) return half ? nearest_half(c + added) : static_cast<float>(c) + static_cast<float>(added);
  return c;
}

bool same(float got, double wanted) {
  const float value = static_cast<float>(wanted);
  if (std::isnan(value)) return std::bit_cast<uint32_t>(got) == 0x7fffffff;
  // The model gives no sign to a sum of 0.
  return value == 0 ? got == 0 : std::bit_cast<uint32_t>(got) == std::bit_cast<uint32_t>(value);
}

void test_floats(const Format& a, const Format& b, int rows, int depth, bool sparse, bool half, int count) {
  for (const Numerics numerics : {Numerics::IEEE, Numerics::SM_80, Numerics::SM_90, Numerics::FLOAT64}) {
    for (int round = 0; round < count; ++round) {
      const Spread spread = static_cast<Spread>(round % SPREADS);
      const Case made = make_case(a, b, rows, depth, sparse, spread, half);
      const uint32_t products = sparse && round % 4 == 3 ? 4u << random_below(4) : 0;
      const Multiplication multiplication = multiplication_of(made, numerics, half, products);
      std::vector<float> got = made.c, other = made.c;
      arithmetic().floats(multiplication, got.data());
      portable::floats(multiplication, other.data());
      for (int i = 0; i < rows * 8; ++i) {
        CHECK(std::bit_cast<uint32_t>(got[i]) == std::bit_cast<uint32_t>(other[i]), arithmetic().name,
              " and portable differ: ", got[i], " and ", other[i], " numerics ", static_cast<int>(numerics), " spread ",
              spread, " element ", i);
      }
      if (round % 16 >= SPREADS) continue;  // the reference is slow
      for (int i = 0; i < rows * 8; ++i) {
        const double wanted = expected(made, numerics, half, products, i / 8, i % 8);
        CHECK(same(got[i], wanted), "got ", got[i], ", expected ", wanted, " type ", name_of(a.type), " numerics ",
              static_cast<int>(numerics), " spread ", spread, " half ", half, " depth ", depth, " element ", i);
      }
    }
  }
}

// Sums of the products of 16 that come within c of 2^31 units, which 32-bit sums cannot hold.
void test_widest_sums() {
  for (const float c : {0.0f, 3.9999f, 1.0f, -3.9999f}) {
    Case made = make_case(F16, F16, 16, 16, false, NARROW, false);
    for (uint32_t& bits : made.a_registers) bits = 0x3fff3fff;  // just below 2
    for (uint32_t& bits : made.b_registers) bits = 0x3fff3fff;
    for (uint32_t& bits : made.a_bits) bits = 0x3fff;
    for (uint32_t& bits : made.b_bits) bits = 0x3fff;
    for (float& value : made.c) value = c;
    std::vector<float> got = made.c;
    arithmetic().floats(multiplication_of(made, Numerics::SM_90, false, 0), got.data());
    for (int i = 0; i < 128; ++i) CHECK(same(got[i], expected(made, Numerics::SM_90, false, 0, i / 8, i % 8)), got[i]);
  }
}

// x0 y0 + x1 y1 where both exponents are below the lowest, which decides what of the second is kept.
void check_lowest(const Format& format, Numerics numerics, bool half, std::array<uint32_t, 2> x,
                  std::array<uint32_t, 2> y, double wanted) {
  Case made = make_case(format, format, 16, 8, false, NARROW, half);
  for (std::vector<uint32_t>* words : {&made.a_registers, &made.b_registers})
    std::fill(words->begin(), words->end(), 0);
  std::fill(made.c.begin(), made.c.end(), 0.0f);
  for (int g = 0; g < 8; ++g) {
    made.a_registers[4 * g] = made.a_registers[32 + 4 * g] = x[0] | x[1] << 16;
    made.b_registers[4 * g] = y[0] | y[1] << 16;
  }
  std::vector<float> got = made.c;
  arithmetic().floats(multiplication_of(made, numerics, half, 0), got.data());
  for (const float value : got) CHECK(value == wanted, value, " expected ", wanted);
}

void test_lowest_exponents() {
  // 2^-25, a tie between the f16 0 and 2^-24, and 2^-n, a product of subnormals that breaks it if any of it is kept.
  const auto half = [](Numerics numerics, int n, double wanted) {
    const uint32_t small = n <= 45 ? 1u << (45 - n) : 1;                          // 2^(21 - n), or 2^-24
    const uint32_t other = n <= 45 ? 0x0008 : 1u << (48 - n);                     // 2^-21, or 2^(24 - n)
    check_lowest(F16, numerics, true, {0x0400, small}, {0x1000, other}, wanted);  // 2^-14 * 2^-11
  };
  half(Numerics::SM_80, 44, 0x1p-24);
  half(Numerics::SM_80, 45, 0);
  half(Numerics::SM_90, 46, 0x1p-24);
  half(Numerics::SM_90, 47, 0);
  // 2^-149, the least f32, less 2^-n: truncated to 0 if any of it is kept.
  const auto single = [](Numerics numerics, int n, double wanted) {
    const auto power = [](int exponent) { return static_cast<uint32_t>(127 + exponent) << 7; };
    check_lowest(BF16, numerics, false, {power(-75), power(-80) | 0x8000}, {power(-74), power(80 - n)}, wanted);
  };
  single(Numerics::SM_80, 156, 0);
  single(Numerics::SM_80, 157, 0x1p-149);
  single(Numerics::SM_90, 158, 0);
  single(Numerics::SM_90, 159, 0x1p-149);
}

void test_conversions() {
  for (uint32_t bits = 0; bits < 256; ++bits) {
    for (const Format& format : {E4M3, E5M2}) {
      const double wanted = value_of(format, bits);
      const float got = fp8_values(format.type)[bits];
      CHECK(std::isnan(wanted) ? std::isnan(got) : got == wanted, bits);
    }
  }
  for (int round = 0; round < 1000000; ++round) {
    const double value = std::ldexp(static_cast<double>(random_bits() >> 11), random_below(60) - 90) *
                         (random_below(2) ? 1 : 1 + 0x1p-11);
    CHECK(rounded_to_half(value) == nearest_half(value), value);
    const double tie = (random_below(2048) + 0.5) * std::ldexp(1.0, random_below(30) - 24);
    CHECK(rounded_to_half(tie) == nearest_half(tie), tie);
  }
  CHECK(rounded_to_half(65519.99) == 65504 && std::isinf(rounded_to_half(65520)));
}

// ---- Integers ----

void test_integers(Type a, Type b, int rows, int depth, bool sparse) {
  const int bits = bits_of(a), per = 32 / bits, width = 4 * per, k = sparse ? 2 * depth : depth;
  const auto random = [&](Type type) {
    const int raw = random_below(1 << bits);
    return is_signed(type) && raw >= 1 << (bits - 1) ? raw - (1 << bits) : raw;
  };
  for (int round = 0; round < 200; ++round) {
    std::vector<int> a_values, b_values, places;
    std::vector<uint16_t> source;
    std::vector<uint32_t> a_registers(32 * 4), b_registers(32 * 4);
    std::vector<int32_t> c;
    const uint32_t mask = (1u << bits) - 1;
    for (int m = 0; m < rows; ++m) {
      for (int i = 0; i < depth; ++i) {
        a_values.push_back(random(a));
        put(a_registers, (rows / 8) * (i / width) + m / 8, 4 * (m % 8) + i % width / per, i % per, bits,
            static_cast<uint32_t>(a_values.back()) & mask);
        places.push_back(sparse ? 2 * i + random_below(2) : i);
        source.push_back(static_cast<uint16_t>(8 * places.back()));
      }
      for (int n = 0; n < 8; ++n) c.push_back(static_cast<int32_t>(random_bits() >> random_below(20)));
    }
    for (int i = 0; i < k; ++i) {
      for (int n = 0; n < 8; ++n) {
        b_values.push_back(random(b));
        put(b_registers, i / width, 4 * n + i % width / per, i % per, bits,
            static_cast<uint32_t>(b_values.back()) & mask);
      }
    }
    if (round == 0) std::fill(c.begin(), c.end(), std::numeric_limits<int32_t>::max());
    if (round == 1) std::fill(c.begin(), c.end(), std::numeric_limits<int32_t>::min());
    Multiplication multiplication;
    multiplication.a_type = a, multiplication.b_type = b;
    multiplication.rows = rows, multiplication.depth = depth, multiplication.k = k;
    for (int i = 0; i < 4; ++i) multiplication.a[i] = a_registers.data() + 32 * i;
    for (int i = 0; i < 4; ++i) multiplication.b[i] = b_registers.data() + 32 * i;
    multiplication.source = source.data(), multiplication.source_stride = depth;
    for (const bool satfinite : {false, true}) {
      multiplication.satfinite = satfinite;
      std::vector<int32_t> got = c, other = c;
      arithmetic().integers(multiplication, got.data());
      portable::integers(multiplication, other.data());
      CHECK(got == other);
      for (int m = 0; m < rows; ++m) {
        for (int n = 0; n < 8; ++n) {
          int64_t sum = c[8 * m + n];
          for (int i = 0; i < depth; ++i)
            sum += int64_t{a_values[m * depth + i]} * b_values[8 * places[m * depth + i] + n];
          const int64_t low = std::numeric_limits<int32_t>::min(), high = std::numeric_limits<int32_t>::max();
          if (satfinite) sum = sum < low ? low : sum > high ? high : sum;
          CHECK(got[8 * m + n] == static_cast<int32_t>(sum), name_of(a), name_of(b), " row ", m, " column ", n);
        }
      }
    }
  }
}

void test_bits(int rows, int k) {
  for (int round = 0; round < 50; ++round) {
    std::vector<uint32_t> a(32 * 4), b(32 * 2);
    for (uint32_t& word : a) word = static_cast<uint32_t>(random_bits());
    for (uint32_t& word : b) word = static_cast<uint32_t>(random_bits());
    Multiplication multiplication;
    multiplication.a_type = multiplication.b_type = Type::B1;
    multiplication.rows = rows, multiplication.depth = multiplication.k = k;
    for (int i = 0; i < 4; ++i) multiplication.a[i] = a.data() + 32 * i;
    for (int i = 0; i < 2; ++i) multiplication.b[i] = b.data() + 32 * i;
    for (const bool both : {false, true}) {
      multiplication.both_bits = both;
      std::vector<int32_t> got(rows * 8, 1000), other = got;
      arithmetic().integers(multiplication, got.data());
      portable::integers(multiplication, other.data());
      CHECK(got == other);
      for (int m = 0; m < rows; ++m) {
        for (int n = 0; n < 8; ++n) {
          int sum = 1000;
          for (int i = 0; i < k; ++i) {
            const int a_bit = a[32 * (m / 8 + rows / 8 * (i / 128)) + 4 * (m % 8) + i % 128 / 32] >> i % 32 & 1;
            const int b_bit = b[32 * (i / 128) + 4 * n + i % 128 / 32] >> i % 32 & 1;
            sum += both ? a_bit & b_bit : a_bit != b_bit;
          }
          CHECK(got[8 * m + n] == sum, "row ", m, " column ", n);
        }
      }
    }
  }
}

// ---- Metadata ----

// Every selector of every shape, every code in every chunk of every row: where it lands and whether it is found.
void test_metadata(int bits, int depth, int words) {
  const Sparsity sparsity{bits, depth};
  CHECK(sparsity.words() == words);
  CHECK(sparsity.selectors() * words == 4);
  const uint32_t legal = bits == 32 ? 0x44444444u : 0x99999999u;
  for (int selector = 0; selector < sparsity.selectors(); ++selector) {
    for (int row = 0; row < 16; ++row) {
      for (int chunk = 0; chunk < sparsity.chunks(); ++chunk) {
        for (uint32_t code = 0; code < 16; ++code) {
          std::vector<uint32_t> e(32);
          // What the selector leaves out is rubbish, and must not matter.
          for (int lane = 0; lane < 32; ++lane) {
            e[lane] = (lane % 4) / words == selector ? legal : static_cast<uint32_t>(random_bits());
          }
          int lane, shift;
          if (bits >= 16) {
            lane = words * selector + chunk / 4, shift = 4 * (chunk % 4) + (row >= 8 ? 16 : 0);
          } else {
            lane = words * selector + (row >= 8 ? 1 : 0) + (chunk >= 8 ? 2 : 0), shift = 4 * (chunk % 8);
          }
          uint32_t& word = e[4 * (row % 8) + lane];
          word = (word & ~(15u << shift)) | code << shift;
          uint64_t rows[16];
          rows_of_metadata(sparsity, selector, e.data(), rows);
          std::vector<uint16_t> source(16 * depth);
          expand_metadata(sparsity, rows, source.data());
          for (int m = 0; m < 16; ++m) {
            for (int i = 0; i < depth; ++i) {
              const int stored = bits == 32 ? 1 : bits == 4 ? 4 : 2, mine = i / stored;
              const uint32_t here = m == row && mine == chunk ? code : legal & 15;
              int place;
              if (bits == 32) {
                place = 2 * mine + static_cast<int>(here >> 3);
              } else if (bits == 4) {
                place = 8 * mine + 2 * static_cast<int>(here >> (i % 4 / 2 * 2) & 3) + i % 2;
              } else {
                place = 4 * mine + static_cast<int>(here >> (i % 2 * 2) & 3);
              }
              CHECK(source[m * depth + i] == 8 * place, "bits ", bits, " row ", m, " element ", i, " code ", here);
            }
          }
          for (const bool ordered : {false, true}) {
            bool wanted = bits == 32 ? code != 4 && code != 14 : code == 0 || code == 5 || code == 10 || code == 15;
            if (ordered && bits != 32) {
              wanted = code != 0x4 && code != 0x8 && code != 0x9 && code != 0xc && code != 0xd && code != 0xe;
            }
            Defect defect{};
            CHECK(find_defect(sparsity, selector, ordered, e.data(), &defect) == wanted, "code ", code);
            if (wanted) {
              CHECK(defect.row == row && defect.chunk == chunk && defect.code == code &&
                    defect.lane == 4 * (row % 8) + lane);
            }
          }
        }
      }
    }
  }
}

void test_everything() {
  test_conversions();
  for (const bool half : {false, true}) {
    test_floats(F16, F16, 16, 8, false, half, 640);
    test_floats(F16, F16, 16, 16, false, half, 1280);
    test_floats(F16, F16, 16, 8, true, half, 640);
    test_floats(F16, F16, 16, 16, true, half, 1280);
    test_floats(F16, F16, 8, 4, false, half, 160);
    test_floats(E4M3, E5M2, 16, 32, false, half, 320);
    test_floats(E5M2, E4M3, 16, 16, false, half, 320);
    test_floats(E4M3, E4M3, 16, 32, true, half, 320);
  }
  test_floats(BF16, BF16, 16, 8, false, false, 640);
  test_floats(BF16, BF16, 16, 16, true, false, 1280);
  test_floats(TF32, TF32, 16, 4, false, false, 640);
  test_floats(TF32, TF32, 16, 8, false, false, 640);
  test_floats(TF32, TF32, 16, 4, true, false, 640);
  test_floats(TF32, TF32, 16, 8, true, false, 640);
  test_widest_sums();
  test_lowest_exponents();
  for (const bool a_signed : {false, true}) {
    for (const bool b_signed : {false, true}) {
      const Type a8 = a_signed ? Type::S8 : Type::U8, b8 = b_signed ? Type::S8 : Type::U8;
      const Type a4 = a_signed ? Type::S4 : Type::U4, b4 = b_signed ? Type::S4 : Type::U4;
      test_integers(a8, b8, 8, 16, false);
      test_integers(a8, b8, 16, 16, false);
      test_integers(a8, b8, 16, 32, false);
      test_integers(a8, b8, 16, 32, true);
      test_integers(a4, b4, 8, 32, false);
      test_integers(a4, b4, 16, 64, false);
      test_integers(a4, b4, 16, 64, true);
    }
  }
  test_bits(8, 128);
  test_bits(16, 128);
  test_bits(16, 256);
}

}  // namespace
}  // namespace sparse24::ptx::tensor

int main() {
  using namespace sparse24::ptx::tensor;
  for (const auto [bits, depth, words] :
       {std::array{16, 8, 1}, {16, 16, 2}, {32, 4, 1}, {32, 8, 2}, {8, 16, 2}, {8, 32, 4}, {4, 32, 2}, {4, 64, 4}}) {
    test_metadata(bits, depth, words);
  }
  for (const char* name : {"portable", "avx512"}) {
    if (!force_arithmetic(name)) continue;  // what this processor lacks
    test_everything();
  }
  CHECK(!force_arithmetic("avx9000"));
  CHECK(force_arithmetic(""));
}
