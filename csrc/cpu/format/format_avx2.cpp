// The format's kernels in AVX2 (format_kernels.h): a byte of `keep`, two groups, looks up the shuffle that moves units.
#include <immintrin.h>

#include "csrc/cpu/format/format_kernels.h"

namespace sparse24::cpu {
namespace {

// For units of one and two bytes: the byte shuffles that close the kept ones of eight units up, and that spread them
// out again with zeros between. Indexed by eight bits of keep, of which four are set; entries of others are not used.
struct Shuffles {
  uint8_t close_1[256][4], close_2[256][8];
  uint8_t spread_1[256][8], spread_2[256][16];

  constexpr Shuffles() : close_1(), close_2(), spread_1(), spread_2() {
    for (int keep = 0; keep < 256; ++keep) {
      int kept = 0;
      for (int unit = 0; unit < 8; ++unit) {
        const bool stays = ((keep >> unit) & 1) != 0 && kept < 4;
        spread_1[keep][unit] = stays ? kept : 0x80;  // 0x80 gives a zero byte
        for (int byte = 0; byte < 2; ++byte) spread_2[keep][2 * unit + byte] = stays ? 2 * kept + byte : 0x80;
        if (!stays) continue;
        close_1[keep][kept] = unit;
        for (int byte = 0; byte < 2; ++byte) close_2[keep][2 * kept + byte] = 2 * unit + byte;
        ++kept;
      }
    }
  }
};
constexpr Shuffles SHUFFLES;

__m128i load_32(const uint8_t* data) {
  int bits;
  memcpy(&bits, data, sizeof bits);
  return _mm_cvtsi32_si128(bits);
}
__m128i load_64(const uint8_t* data) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(data)); }
__m128i load_128(const uint8_t* data) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(data)); }
__m256i load_256(const uint8_t* data) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data)); }
void store_128(uint8_t* data, __m128i bits) { _mm_storeu_si128(reinterpret_cast<__m128i*>(data), bits); }
void store_256(uint8_t* data, __m256i bits) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(data), bits); }

// Byte i of a word, as an index of SHUFFLES.
int byte_of(uint64_t word, int i) { return (word >> (8 * i)) & 255; }

// Four bits, each twice.
int doubled(int bits) { return (bits & 1) * 3 | (bits & 2) * 6 | (bits & 4) * 12 | (bits & 8) * 24; }

// 32 nibbles to 32 bytes, and 32 bytes of 0 to 15 to 32 nibbles.
__m256i nibbles(__m128i packed) {
  const __m256i pairs = _mm256_cvtepu8_epi16(packed);
  return _mm256_and_si256(_mm256_or_si256(pairs, _mm256_slli_epi16(pairs, 4)), _mm256_set1_epi8(15));
}
__m128i packed_nibbles(__m256i bytes) {
  const __m256i pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x1001));
  return _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
}

// The kept halves of 16 units of one byte.
__m128i close_bytes(__m128i units, int keep) {
  const __m128i low = _mm_shuffle_epi8(units, load_32(SHUFFLES.close_1[keep & 255]));
  const __m128i high = _mm_shuffle_epi8(_mm_srli_si128(units, 8), load_32(SHUFFLES.close_1[keep >> 8]));
  return _mm_unpacklo_epi32(low, high);  // in the low half
}
// 8 bytes to 16 units of one byte.
__m128i spread_bytes(__m128i values, int keep) {
  const __m128i low = _mm_shuffle_epi8(values, load_64(SHUFFLES.spread_1[keep & 255]));
  const __m128i high = _mm_shuffle_epi8(_mm_srli_si128(values, 4), load_64(SHUFFLES.spread_1[keep >> 8]));
  return _mm_unpacklo_epi64(low, high);
}

struct Avx2 {
  template <Element ELEMENT, bool PAIR>
  static Beats<uint64_t> beats(const uint8_t* block) {
    if constexpr (ELEMENT == Element::F32 || (PAIR && element_bits(ELEMENT) == 16)) {
      return beats_of<4>([block](int i) { return magnitudes_32<ELEMENT, PAIR>(block, i); });
    } else if constexpr (element_bits(ELEMENT) == 16 || (PAIR && ELEMENT == Element::I8)) {
      return beats_of<2>([block](int i) { return magnitudes_16<ELEMENT, PAIR>(block, i); });
    } else {
      return beats_of<1>([block](int i) { return magnitudes_8<ELEMENT, PAIR>(block, i); });
    }
  }

  template <Element ELEMENT, bool PAIR>
  static uint64_t nonzero(const uint8_t* block) {
    constexpr int BITS = element_bits(ELEMENT) * (PAIR ? 2 : 1);
    constexpr uint64_t BITS_READ = unit_magnitude_bits(ELEMENT, PAIR);
    const __m256i none = _mm256_setzero_si256();
    uint64_t zero = 0;
    if constexpr (BITS == 4) {
      for (int i = 0; i < 2; ++i) {
        const __m256i units = nibbles(load_128(block + 16 * i));
        zero |= bits_of<1>(_mm256_cmpeq_epi8(units, none), none) << (32 * i);
      }
    } else if constexpr (BITS == 64) {
      for (int i = 0; i < 16; ++i) {
        const __m256i units = _mm256_and_si256(load_256(block + 32 * i), _mm256_set1_epi64x(BITS_READ));
        const int bits = _mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpeq_epi64(units, none)));
        zero |= static_cast<uint64_t>(bits) << (4 * i);
      }
    } else if constexpr (BITS == 32) {
      for (int i = 0; i < 8; ++i) {
        const __m256i units = _mm256_and_si256(load_256(block + 32 * i), _mm256_set1_epi32(BITS_READ & 0xffffffff));
        zero |= bits_of<4>(_mm256_cmpeq_epi32(units, none), none) << (8 * i);
      }
    } else if constexpr (BITS == 16) {
      const __m256i read = _mm256_set1_epi16(BITS_READ & 0xffff);
      for (int i = 0; i < 2; ++i) {
        const __m256i low = _mm256_and_si256(load_256(block + 64 * i), read);
        const __m256i high = _mm256_and_si256(load_256(block + 64 * i + 32), read);
        zero |= bits_of<2>(_mm256_cmpeq_epi16(low, none), _mm256_cmpeq_epi16(high, none)) << (32 * i);
      }
    } else {
      for (int i = 0; i < 2; ++i) {
        zero |= bits_of<1>(_mm256_cmpeq_epi8(load_256(block + 32 * i), none), none) << (32 * i);
      }
    }
    return ~zero;
  }

  template <int UNIT_BITS>
  static void compact(const uint8_t* block, uint64_t keep, uint8_t* values, bool stream) {
    if constexpr (UNIT_BITS == 4) {
      __m128i kept[2];
      for (int i = 0; i < 2; ++i) {
        const __m256i units = nibbles(load_128(block + 16 * i));
        const __m128i low = close_bytes(_mm256_castsi256_si128(units), keep >> (32 * i) & 0xffff);
        const __m128i high = close_bytes(_mm256_extracti128_si256(units, 1), keep >> (32 * i + 16) & 0xffff);
        kept[i] = _mm_unpacklo_epi64(low, high);
      }
      store_128(values, packed_nibbles(_mm256_set_m128i(kept[1], kept[0])));
    } else {
      // Every step closes 64 bytes up to 32.
      for (int i = 0; i < UNIT_BITS / 8; ++i) {
        const uint8_t* units = block + 64 * i;
        __m128i kept[2];
        for (int half = 0; half < 2; ++half) kept[half] = close<UNIT_BITS>(units + 32 * half, keep, 2 * i + half);
        const __m256i both = _mm256_set_m128i(kept[1], kept[0]);
        auto* to = reinterpret_cast<__m256i*>(values) + i;
        if (stream) {
          _mm256_stream_si256(to, both);
        } else {
          _mm256_storeu_si256(to, both);
        }
      }
    }
  }

  template <int UNIT_BITS>
  static void expand(const uint8_t* values, uint64_t keep, uint8_t* block) {
    if constexpr (UNIT_BITS == 4) {
      const __m256i kept = nibbles(load_128(values));
      for (int i = 0; i < 2; ++i) {
        const __m128i half = i == 0 ? _mm256_castsi256_si128(kept) : _mm256_extracti128_si256(kept, 1);
        const __m128i low = spread_bytes(half, keep >> (32 * i) & 0xffff);
        const __m128i high = spread_bytes(_mm_srli_si128(half, 8), keep >> (32 * i + 16) & 0xffff);
        store_128(block + 16 * i, packed_nibbles(_mm256_set_m128i(high, low)));
      }
    } else {
      for (int i = 0; i < UNIT_BITS / 4; ++i) store_256(block + 32 * i, open<UNIT_BITS>(values + 16 * i, keep, i));
    }
  }

  static void spread(uint64_t bits, uint8_t* bytes) {
    const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
    const __m256i byte = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1,  //
                                          2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    for (int i = 0; i < 2; ++i) {
      const __m256i word = _mm256_set1_epi32(static_cast<int>(bits >> (32 * i)));
      const __m256i own = _mm256_and_si256(_mm256_shuffle_epi8(word, byte), bit);
      store_256(bytes + 32 * i, _mm256_and_si256(_mm256_cmpeq_epi8(own, bit), _mm256_set1_epi8(1)));
    }
  }

 private:
  // The kept half of the 32 bytes at `units`, the `index`-th 32 of their block.
  template <int UNIT_BITS>
  static __m128i close(const uint8_t* units, uint64_t keep, int index) {
    if constexpr (UNIT_BITS >= 32) {
      // Eight units of 32 bits; a unit of 64 is two of them.
      const int bits = UNIT_BITS == 32 ? byte_of(keep, index) : doubled(keep >> (4 * index) & 15);
      const __m256i from = _mm256_cvtepu8_epi32(load_32(SHUFFLES.close_1[bits]));
      return _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(load_256(units), from));
    } else if constexpr (UNIT_BITS == 16) {
      const __m128i low = _mm_shuffle_epi8(load_128(units), load_64(SHUFFLES.close_2[byte_of(keep, 2 * index)]));
      const __m128i high =
          _mm_shuffle_epi8(load_128(units + 16), load_64(SHUFFLES.close_2[byte_of(keep, 2 * index + 1)]));
      return _mm_unpacklo_epi64(low, high);
    } else {
      const __m128i low = close_bytes(load_128(units), keep >> (32 * index) & 0xffff);
      const __m128i high = close_bytes(load_128(units + 16), keep >> (32 * index + 16) & 0xffff);
      return _mm_unpacklo_epi64(low, high);
    }
  }

  // The inverse: 16 bytes of values to the `index`-th 32 bytes of a block.
  template <int UNIT_BITS>
  static __m256i open(const uint8_t* values, uint64_t keep, int index) {
    const __m128i kept = load_128(values);
    if constexpr (UNIT_BITS >= 32) {
      const int bits = UNIT_BITS == 32 ? byte_of(keep, index) : doubled(keep >> (4 * index) & 15);
      const __m256i from = _mm256_cvtepi8_epi32(load_64(SHUFFLES.spread_1[bits]));  // negative where zero
      const __m256i units = _mm256_permutevar8x32_epi32(_mm256_castsi128_si256(kept), from);
      return _mm256_andnot_si256(_mm256_srai_epi32(from, 31), units);
    } else if constexpr (UNIT_BITS == 16) {
      const __m128i low = _mm_shuffle_epi8(kept, load_128(SHUFFLES.spread_2[byte_of(keep, 2 * index)]));
      const __m128i high =
          _mm_shuffle_epi8(_mm_srli_si128(kept, 8), load_128(SHUFFLES.spread_2[byte_of(keep, 2 * index + 1)]));
      return _mm256_set_m128i(high, low);
    } else {
      const __m128i low = spread_bytes(kept, keep >> (32 * index) & 0xffff);
      const __m128i high = spread_bytes(_mm_srli_si128(kept, 8), keep >> (32 * index + 16) & 0xffff);
      return _mm256_set_m128i(high, low);
    }
  }

  // One bit for every lane of a comparison: 8 lanes of 4 bytes, 32 of one, or the 16 of 2 bytes of both vectors.
  template <int BYTES>
  static uint64_t bits_of(__m256i lanes, __m256i more) {
    if constexpr (BYTES == 4) {
      return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(lanes)));
    } else if constexpr (BYTES == 2) {
      const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi16(lanes, more), 0b11'01'10'00);
      return static_cast<uint32_t>(_mm256_movemask_epi8(packed));
    } else {
      return static_cast<uint32_t>(_mm256_movemask_epi8(lanes));
    }
  }

  // Compares 64 magnitudes of BYTES bytes, as signed integers; magnitudes(i) is the i-th vector of them.
  template <int BYTES, class Magnitudes>
  static Beats<uint64_t> beats_of(const Magnitudes& magnitudes) {
    constexpr int VECTORS_A_STEP = BYTES == 2 ? 2 : 1;
    constexpr int LANES_A_STEP = 32 / BYTES * VECTORS_A_STEP;
    const __m256i later = in_groups<BYTES>(1, 2, 3, 3), earlier = in_groups<BYTES>(0, 1, 2, 0);
    const __m256i across = in_groups<BYTES>(2, 3, 2, 3);
    Beats<uint64_t> beats{0, 0};
    for (int step = 0; step < 64 / LANES_A_STEP; ++step) {
      __m256i next[2] = {}, opposite[2] = {};
      for (int i = 0; i < VECTORS_A_STEP; ++i) {
        const __m256i m = magnitudes(VECTORS_A_STEP * step + i);
        next[i] = greater<BYTES>(_mm256_shuffle_epi8(m, later), _mm256_shuffle_epi8(m, earlier));
        opposite[i] = greater<BYTES>(_mm256_shuffle_epi8(m, across), m);
      }
      beats.next |= bits_of<BYTES>(next[0], next[1]) << (LANES_A_STEP * step);
      beats.opposite |= bits_of<BYTES>(opposite[0], opposite[1]) << (LANES_A_STEP * step);
    }
    return beats;
  }

  template <int BYTES>
  static __m256i greater(__m256i a, __m256i b) {
    return BYTES == 4 ? _mm256_cmpgt_epi32(a, b) : BYTES == 2 ? _mm256_cmpgt_epi16(a, b) : _mm256_cmpgt_epi8(a, b);
  }

  // Control of a byte shuffle that takes these units in every group of four units of BYTES bytes.
  template <int BYTES>
  static __m256i in_groups(int unit_0, int unit_1, int unit_2, int unit_3) {
    const int units[4] = {unit_0, unit_1, unit_2, unit_3};
    alignas(16) uint8_t control[16];
    for (int i = 0; i < 16; ++i) control[i] = (i / (4 * BYTES) * 4 + units[i / BYTES % 4]) * BYTES + i % BYTES;
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(control)));
  }

  // |x| of the bits of floats, all NaNs as infinity + 1.
  static __m256i magnitudes_f32(__m256i x) {
    return _mm256_min_epi32(_mm256_and_si256(x, _mm256_set1_epi32(0x7fffffff)), _mm256_set1_epi32(0x7f800001));
  }

  template <Element ELEMENT, bool PAIR>
  static __m256i magnitudes_32(const uint8_t* block, int vector) {
    if constexpr (!PAIR) return magnitudes_f32(load_256(block + 32 * vector));
    __m256 first, second;
    if constexpr (ELEMENT == Element::F32) {
      const __m256 low = _mm256_castsi256_ps(load_256(block + 64 * vector));
      const __m256 high = _mm256_castsi256_ps(load_256(block + 64 * vector + 32));
      first = in_order(_mm256_shuffle_ps(low, high, 0b10'00'10'00));
      second = in_order(_mm256_shuffle_ps(low, high, 0b11'01'11'01));
    } else {
      const __m256i units = load_256(block + 32 * vector);
      if constexpr (ELEMENT == Element::F16) {
        first = widened(_mm256_and_si256(units, _mm256_set1_epi32(0xffff)));
        second = widened(_mm256_srli_epi32(units, 16));
      } else {
        first = _mm256_castsi256_ps(_mm256_slli_epi32(units, 16));
        second = _mm256_castsi256_ps(_mm256_and_si256(units, _mm256_set1_epi32(0xffff0000)));
      }
    }
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return magnitudes_f32(
        _mm256_castps_si256(_mm256_add_ps(_mm256_andnot_ps(sign, first), _mm256_andnot_ps(sign, second))));
  }
  // Quarters 0, 2, 1, 3 of a vector, which is the order that a shuffle of two vectors leaves them in.
  static __m256 in_order(__m256 x) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(x), 0b11'01'10'00));
  }
  // The float16 in the low half of each 32-bit lane, whose high half is zero.
  static __m256 widened(__m256i halves) {
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(halves, halves), 0b11'01'10'00);
    return _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
  }

  template <Element ELEMENT, bool PAIR>
  static __m256i magnitudes_16(const uint8_t* block, int vector) {
    const __m256i units = load_256(block + 32 * vector);
    if constexpr (PAIR) return _mm256_maddubs_epi16(_mm256_abs_epi8(units), _mm256_set1_epi8(1));
    const __m256i bits = _mm256_and_si256(units, _mm256_set1_epi16(0x7fff));
    return _mm256_min_epi16(bits, _mm256_set1_epi16(ELEMENT == Element::F16 ? 0x7c01 : 0x7f81));
  }

  template <Element ELEMENT, bool PAIR>
  static __m256i magnitudes_8(const uint8_t* block, int vector) {
    if constexpr (ELEMENT == Element::I8) {
      // 0 to 128, moved to where signed bytes compare in their order.
      return _mm256_xor_si256(_mm256_abs_epi8(load_256(block + 32 * vector)), _mm256_set1_epi8(-128));
    }
    const __m256i sizes = _mm256_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 7, 6, 5, 4, 3, 2, 1,  //
                                           0, 1, 2, 3, 4, 5, 6, 7, 8, 7, 6, 5, 4, 3, 2, 1);
    if constexpr (!PAIR) return _mm256_shuffle_epi8(sizes, nibbles(load_128(block + 16 * vector)));
    const __m256i units = load_256(block + 32 * vector), low = _mm256_set1_epi8(15);
    const __m256i first = _mm256_and_si256(units, low);
    const __m256i second = _mm256_and_si256(_mm256_srli_epi16(units, 4), low);
    return _mm256_add_epi8(_mm256_shuffle_epi8(sizes, first), _mm256_shuffle_epi8(sizes, second));
  }
};

}  // namespace

FormatKernels avx2_format_kernels(Element element, Pattern pattern, Selection selection) {
  return format_kernels<Avx2>(element, pattern, selection);
}

}  // namespace sparse24::cpu
