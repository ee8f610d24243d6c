// The tensor cores' arithmetic: one multiplication D = A B + C whose fragments are known.
//
// There is a portable version and one for AVX-512, which agree in every bit. What they compute, by LaunchOptions:
//
// IEEE     a chain of float32 fused multiply-adds from c on, in the order of A's stored elements, each rounded to
//          nearest even. f16 accumulators are rounded to f16 once, at the end.
// FLOAT64  the same in float64, rounded once to f32 or f16 at the end.
// SM_80, SM_90
//          blocks of `products` consecutive stored elements, chained through c:
//            p_i = a_i b_i exactly, of exponent e_i = exp(a_i) + exp(b_i), not normalised; exp() of a subnormal is that
//            of the smallest normal; zero products take no part
//            E   = max(e_i, exp(c), floor); the exponent of a subnormal f32 c is -126; c = 0 takes no part
//            all terms, c too, are truncated toward zero to `fraction` bits after the point relative to 2^E and summed
//            exactly; the sum is truncated toward zero to `significant` bits of an f32, or rounded to nearest even to
//            an f16 where C and D are f16
//          A sum of 0 is +0, whatever the signs [?]; one that truncation or rounding makes 0 keeps its sign [?]. From
//          2^128 (f16: 65520) on it overflows to infinity, where it stays. With an infinity or NaN among the operands:
//          NaN if there is a NaN, 0 * inf or inf - inf, otherwise the infinity. fp8 under SM_90 goes `through_f16`, as
//          ptxas has it do on sm_90 and sm_100: elements become f16; of each four consecutive stored elements the first
//          two are summed first, in blocks from 0 on, then the others; c is added last, rounded to nearest even. These
//          reproduce the published outputs of real GPUs for dense f16, bf16, tf32 and fp8 (see model_of). Not known, by
//          anyone: how mma.sp groups its products. It is taken to group its stored elements as a dense mma does;
//          LaunchOptions::sparse_products says otherwise.
//
// Results that are NaN are 0x7fffffff in f32, 0x7fff in f16. Integers are summed exactly; without satfinite the sum
// wraps, with it the sum of c and all products is clamped, once: what hardware clamps is not known [?].
#pragma once
#include <cstdint>
#include <string_view>

#include "csrc/ptx/machine.h"
#include "csrc/ptx/types.h"

namespace sparse24::ptx::tensor {

constexpr int MAX_DEPTH = 64;  // stored elements of a row of A: m16n8k64 of 4 bits, m16n8k128 of mma.sp
constexpr int MAX_K = 128;     // rows of B

struct Model {
  Numerics numerics = Numerics::IEEE;
  int products = 0;     // of a block
  int fraction = 0;     // bits
  int floor = 0;        // smallest E
  int significant = 0;  // bits of the result
  bool through_f16 = false;
};

// Of A's type; both types of a multiplication have the same parameters. half: C and D are f16.
Model model_of(Numerics numerics, Type type, bool half, uint32_t products);

struct Multiplication {
  Type a_type = Type::NONE, b_type = Type::NONE;
  int rows = 16;              // of A, C and D
  int depth = 0;              // stored elements of a row of A
  int k = 0;                  // rows of B
  const uint32_t* a[4] = {};  // registers, 32 lanes each; fragments.h says what they hold
  const uint32_t* b[4] = {};
  const uint16_t* source = nullptr;  // [rows][source_stride]: SOURCE_SCALE times the row of B of each stored element
  int source_stride = 0;             // 0: all rows are the same
  bool half = false;                 // C and D are f16
  bool satfinite = false;
  bool both_bits = false;  // b1: and, otherwise xor
  Model model;
};

// Which stored element is summed as the i-th of a row.
inline int summed(const Multiplication& multiplication, int i) {
  if (!multiplication.model.through_f16 || multiplication.depth < 32) return i;
  return i % 16 / 2 * 4 + i / 16 * 2 + i % 2;
}

// The `source` of a dense A.
const uint16_t* dense_source();

// C becomes D; rows of 8. Values of f16 accumulators are in floats.
using Floats = void (*)(const Multiplication& multiplication, float* c);
using Integers = void (*)(const Multiplication& multiplication, int32_t* c);

struct Arithmetic {
  const char* name;  // "avx512", "portable"
  Floats floats;
  Integers integers;  // 8, 4 and 1 bits
};

namespace portable {
void floats(const Multiplication& multiplication, float* c);
void integers(const Multiplication& multiplication, int32_t* c);
}  // namespace portable
namespace avx512 {
void floats(const Multiplication& multiplication, float* c);
void integers(const Multiplication& multiplication, int32_t* c);
}  // namespace avx512

// The one in use: the best that the processor has, or what was last forced.
const Arithmetic& arithmetic();
// Returns false for a name that is unknown or that the processor cannot run; "" goes back to the best.
bool force_arithmetic(std::string_view name);

const float* fp8_values(Type type);   // of all 256 bytes
int smallest_exponent(Type type);     // of a normal number
float rounded_to_half(double value);  // to the nearest f16, ties to even

}  // namespace sparse24::ptx::tensor
