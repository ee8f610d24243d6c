// linear() for BF16 weights with AVX512_BF16: vdpbf16ps takes both values of a group at once.
#include "csrc/cpu/linear_avx512.h"

namespace sparse24::cpu {
namespace {

// Bf16Dot::control: the columns in the unit that both indices of a code name, for each group of the unit.
struct Bf16Tables {
  uint16_t columns[8][16][2];
  constexpr Bf16Tables() : columns() {
    for (int group = 0; group < 8; ++group) {
      for (int code = 0; code < 16; ++code) {
        columns[group][code][0] = static_cast<uint16_t>(4 * group + first_of(code));
        columns[group][code][1] = static_cast<uint16_t>(4 * group + second_of(code));
      }
    }
  }
};
alignas(64) constexpr Bf16Tables BF16_TABLES;

// acc += permute(x, control) . values, the two columns of a group a lane. Sums are rounded to nearest even and
// subnormals count as zero, as the instruction defines.
struct Bf16Dot {
  static constexpr Element WEIGHT = Element::BF16;
  static constexpr int STEPS = 8, UNIT_STEPS = 8;

  template <bool ROOM>
  static SPARSE24_INLINE __m512i control(const uint8_t* chunk, int step) {
    // vpermd reads the low four bits of each lane: one code.
    const __m512i codes = _mm512_srli_epi32(_mm512_loadu_si512(chunk), 4 * step);
    return _mm512_permutexvar_epi32(codes, constant<ROOM>(BF16_TABLES.columns[step]));
  }

  static SPARSE24_INLINE __m512i values(const uint8_t* chunk, int step) {
    return _mm512_loadu_si512(chunk + CODES_BYTES + 64 * step);
  }

  static SPARSE24_INLINE void add(__m512i& acc, __m512i control, const uint8_t* x, __m512i values) {
    __m512i permuted;
    asm volatile("vpermw %[x], %[control], %[permuted]\n\tvdpbf16ps %[values], %[permuted], %[acc]"
                 : [acc] "+v"(acc), [permuted] "=&v"(permuted)
                 : [control] "v"(control), [x] "m"(*reinterpret_cast<const __m512i*>(x)), [values] "v"(values));
  }

  static SPARSE24_INLINE __m512i sum(__m512i a, __m512i b) {
    return _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b)));
  }
};

void pack_bf16_row(const Linear& call, int64_t token, uint8_t* unit, int64_t unit_stride, float*) {
  const void* row = row_of_x(call, token);
  const int64_t columns = chunk_count(Element::BF16, call.in_features) * chunk_columns(Element::BF16);
  for (int64_t k = 0; k < columns; k += 32, unit += unit_stride) {
    const int64_t left = call.in_features - k;
    if (call.x_element == Element::BF16) {
      const __mmask32 mask = left >= 32 ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
      _mm512_store_si512(unit, _mm512_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(row) + k));
    } else {
      const __m512 low = load_floats(row, call.x_element, k, first_lanes(left));
      const __m512 high = load_floats(row, call.x_element, k + 16, first_lanes(left - 16));
      _mm512_store_si512(unit, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
    }
  }
}

constexpr Kernels KERNELS{Element::BF16, pack_bf16_row, multiply<Bf16Dot>};

}  // namespace

const Kernels& avx512_bf16_kernels() { return KERNELS; }

}  // namespace sparse24::cpu
