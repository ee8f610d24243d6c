// The format's kernels in AVX-512 with VBMI2 (format_kernels.h): masks hold `keep`, vpcompress and vpexpand move units.
// g++ 12 takes the undefined operand inside its own unmasked intrinsics for a bug (gcc.gnu.org/PR105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "csrc/cpu/format/format_kernels.h"

namespace sparse24::cpu {
namespace {

struct Avx512 {
  template <Element ELEMENT, bool PAIR>
  static Beats<uint64_t> beats(const uint8_t* block) {
    if constexpr (ELEMENT == Element::F32 || (PAIR && element_bits(ELEMENT) == 16)) {
      return beats_of<4>([block](int i) { return magnitudes_32<ELEMENT, PAIR>(block, i); });
    } else if constexpr (element_bits(ELEMENT) == 16 || (PAIR && ELEMENT == Element::I8)) {
      return beats_of<2>([block](int i) { return magnitudes_16<ELEMENT, PAIR>(block, i); });
    } else {
      return beats_of<1>([block](int) { return magnitudes_8<ELEMENT, PAIR>(block); });
    }
  }

  template <Element ELEMENT, bool PAIR>
  static uint64_t nonzero(const uint8_t* block) {
    constexpr int BITS = element_bits(ELEMENT) * (PAIR ? 2 : 1);
    constexpr uint64_t BITS_READ = unit_magnitude_bits(ELEMENT, PAIR);
    if constexpr (BITS == 4) {
      const __m512i units = nibbles(load_256(block));
      return _mm512_test_epi8_mask(units, units);
    }
    uint64_t result = 0;
    for (int i = 0; i < BITS / 8; ++i) {
      const __m512i units = load(block, i);
      const uint64_t mask = BITS == 64   ? _mm512_test_epi64_mask(units, _mm512_set1_epi64(BITS_READ))
                            : BITS == 32 ? _mm512_test_epi32_mask(units, _mm512_set1_epi32(BITS_READ & 0xffffffff))
                            : BITS == 16 ? _mm512_test_epi16_mask(units, _mm512_set1_epi16(BITS_READ & 0xffff))
                                         : _mm512_test_epi8_mask(units, units);
      result |= mask << (512 / BITS * i % 64);
    }
    return result;
  }

  template <int UNIT_BITS>
  static void compact(const uint8_t* block, uint64_t keep, uint8_t* values, bool stream) {
    if constexpr (UNIT_BITS == 4) {
      const __m512i kept = _mm512_maskz_compress_epi8(keep, nibbles(load_256(block)));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(values), packed_nibbles(_mm512_castsi512_si256(kept)));
    } else {
      for (int i = 0; i < UNIT_BITS / 8; ++i) {
        const __m512i units = load(block, i);
        const uint64_t mask = keep >> (512 / UNIT_BITS * i % 64);
        const __m512i kept = UNIT_BITS == 64   ? _mm512_maskz_compress_epi64(mask, units)
                             : UNIT_BITS == 32 ? _mm512_maskz_compress_epi32(mask, units)
                             : UNIT_BITS == 16 ? _mm512_maskz_compress_epi16(mask, units)
                                               : _mm512_maskz_compress_epi8(mask, units);
        auto* to = reinterpret_cast<__m256i*>(values) + i;
        if (stream) {
          _mm256_stream_si256(to, _mm512_castsi512_si256(kept));
        } else {
          _mm256_storeu_si256(to, _mm512_castsi512_si256(kept));
        }
      }
    }
  }

  template <int UNIT_BITS>
  static void expand(const uint8_t* values, uint64_t keep, uint8_t* block) {
    if constexpr (UNIT_BITS == 4) {
      const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
      const __m512i kept = nibbles(_mm256_zextsi128_si256(packed));
      const __m512i units = _mm512_maskz_expand_epi8(keep, kept);
      const auto low = packed_nibbles(_mm512_castsi512_si256(units));
      const auto high = packed_nibbles(_mm512_extracti64x4_epi64(units, 1));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(block), _mm256_set_m128i(high, low));
    } else {
      for (int i = 0; i < UNIT_BITS / 8; ++i) {
        const __m512i kept = _mm512_castsi256_si512(load_256(values + 32 * i));
        const uint64_t mask = keep >> (512 / UNIT_BITS * i % 64);
        const __m512i units = UNIT_BITS == 64   ? _mm512_maskz_expand_epi64(mask, kept)
                              : UNIT_BITS == 32 ? _mm512_maskz_expand_epi32(mask, kept)
                              : UNIT_BITS == 16 ? _mm512_maskz_expand_epi16(mask, kept)
                                                : _mm512_maskz_expand_epi8(mask, kept);
        _mm512_storeu_si512(block + 64 * i, units);
      }
    }
  }

  static void spread(uint64_t bits, uint8_t* bytes) { _mm512_storeu_si512(bytes, _mm512_maskz_set1_epi8(bits, 1)); }

 private:
  static __m512i load(const uint8_t* data, int vector) { return _mm512_loadu_si512(data + 64 * vector); }
  static __m256i load_256(const uint8_t* data) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data)); }

  // 64 nibbles to 64 bytes, and 32 bytes of 0 to 15 to 32 nibbles.
  static __m512i nibbles(__m256i packed) {
    const __m512i pairs = _mm512_cvtepu8_epi16(packed);
    return _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi16(pairs, 4)), _mm512_set1_epi8(15));
  }
  static __m128i packed_nibbles(__m256i bytes) {
    return _mm256_cvtepi16_epi8(_mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x1001)));
  }

  // Compares VECTORS vectors of 64 / VECTORS magnitudes each.
  template <int VECTORS, class Magnitudes>
  static Beats<uint64_t> beats_of(const Magnitudes& magnitudes) {
    constexpr int BYTES = VECTORS;  // of one magnitude
    constexpr int LANES = 64 / VECTORS;
    const __m512i later = in_groups<BYTES>(1, 2, 3, 3), earlier = in_groups<BYTES>(0, 1, 2, 0);
    const __m512i across = in_groups<BYTES>(2, 3, 2, 3);
    Beats<uint64_t> beats{0, 0};
    for (int i = 0; i < VECTORS; ++i) {
      const __m512i m = magnitudes(i);
      const uint64_t next = greater<BYTES>(_mm512_shuffle_epi8(m, later), _mm512_shuffle_epi8(m, earlier));
      const uint64_t opposite = greater<BYTES>(_mm512_shuffle_epi8(m, across), m);
      beats.next |= next << (LANES * i);
      beats.opposite |= opposite << (LANES * i);
    }
    return beats;
  }

  template <int BYTES>
  static uint64_t greater(__m512i a, __m512i b) {
    return BYTES == 4   ? _mm512_cmpgt_epu32_mask(a, b)
           : BYTES == 2 ? _mm512_cmpgt_epu16_mask(a, b)
                        : _mm512_cmpgt_epu8_mask(a, b);
  }

  // Control of a byte shuffle that takes these units in every group of four units of BYTES bytes.
  template <int BYTES>
  static __m512i in_groups(int unit_0, int unit_1, int unit_2, int unit_3) {
    const int units[4] = {unit_0, unit_1, unit_2, unit_3};
    alignas(16) uint8_t control[16];
    for (int i = 0; i < 16; ++i) control[i] = (i / (4 * BYTES) * 4 + units[i / BYTES % 4]) * BYTES + i % BYTES;
    return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(control)));
  }

  // |x| of the bits of floats, all NaNs as INFINITE + 1.
  static __m512i magnitudes_f32(__m512i x) {
    return _mm512_min_epu32(_mm512_and_si512(x, _mm512_set1_epi32(0x7fffffff)), _mm512_set1_epi32(0x7f800001));
  }

  template <Element ELEMENT, bool PAIR>
  static __m512i magnitudes_32(const uint8_t* block, int vector) {
    if constexpr (!PAIR) return magnitudes_f32(load(block, vector));
    __m512 first, second;
    if constexpr (ELEMENT == Element::F32) {
      const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
      const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
      const __m512i low = load(block, 2 * vector), high = load(block, 2 * vector + 1);
      first = _mm512_castsi512_ps(_mm512_permutex2var_epi32(low, even, high));
      second = _mm512_castsi512_ps(_mm512_permutex2var_epi32(low, odd, high));
    } else {
      const __m512i units = load(block, vector);
      if constexpr (ELEMENT == Element::F16) {
        first = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(units));
        second = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(units, 16)));
      } else {
        first = _mm512_castsi512_ps(_mm512_slli_epi32(units, 16));
        second = _mm512_castsi512_ps(_mm512_and_si512(units, _mm512_set1_epi32(0xffff0000)));
      }
    }
    return magnitudes_f32(_mm512_castps_si512(_mm512_add_ps(_mm512_abs_ps(first), _mm512_abs_ps(second))));
  }

  template <Element ELEMENT, bool PAIR>
  static __m512i magnitudes_16(const uint8_t* block, int vector) {
    const __m512i units = load(block, vector);
    if constexpr (PAIR) return _mm512_maddubs_epi16(_mm512_abs_epi8(units), _mm512_set1_epi8(1));
    const __m512i bits = _mm512_and_si512(units, _mm512_set1_epi16(0x7fff));
    return _mm512_min_epu16(bits, _mm512_set1_epi16(ELEMENT == Element::F16 ? 0x7c01 : 0x7f81));
  }

  template <Element ELEMENT, bool PAIR>
  static __m512i magnitudes_8(const uint8_t* block) {
    if constexpr (ELEMENT == Element::I8) return _mm512_abs_epi8(load(block, 0));
    const __m512i sizes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 7, 6, 5, 4, 3, 2, 1));
    if constexpr (!PAIR) return _mm512_shuffle_epi8(sizes, nibbles(load_256(block)));
    const __m512i units = load(block, 0), low = _mm512_set1_epi8(15);
    const __m512i first = _mm512_and_si512(units, low), second = _mm512_and_si512(_mm512_srli_epi16(units, 4), low);
    return _mm512_add_epi8(_mm512_shuffle_epi8(sizes, first), _mm512_shuffle_epi8(sizes, second));
  }
};

}  // namespace

FormatKernels avx512_format_kernels(Element element, Pattern pattern, Selection selection) {
  return format_kernels<Avx512>(element, pattern, selection);
}

}  // namespace sparse24::cpu
