// Inner loops of the format, written once over the primitives of an instruction set (internal to csrc/cpu/format*.cpp).
//
// A block is 64 units of one row: 16 groups, one 64-bit `keep` word, 8 bytes of meta. Kernels see whole blocks only;
// format.cpp cuts rows into blocks and pads the last one with zeros.
//
// An instruction set is a struct of static functions (Portable in format.cpp is the plain one):
//   template <Element, bool PAIR> Beats<uint64_t> beats(const uint8_t* block)      how the units compare in magnitude
//   template <Element, bool PAIR> uint64_t nonzero(const uint8_t* block)           one bit a unit
//   template <int UNIT_BITS> void compact(const uint8_t* block, uint64_t keep, uint8_t* values, bool stream)
//   template <int UNIT_BITS> void expand(const uint8_t* values, uint64_t keep, uint8_t* block)
//   void spread(uint64_t bits, uint8_t* bytes)                                     64 bits to 64 bytes of 0 or 1
// It lives in an anonymous namespace, so that no instance of these templates is shared between instruction sets.
#pragma once
#include <cstdint>
#include <cstring>

#include "csrc/cpu/format/format.h"
#include "kernels/format.cuh"

namespace sparse24::cpu {

constexpr int BLOCK_UNITS = 64;
constexpr int BLOCK_GROUPS = BLOCK_UNITS / 4;
constexpr int BLOCK_META_BYTES = BLOCK_GROUPS / 2;

// A unit is one column, or a pair of columns for pair 4:8.
SPARSE24_INLINE constexpr int unit_columns(Pattern pattern) { return group_columns(pattern) / 4; }
SPARSE24_INLINE constexpr int unit_bits(Pattern pattern, Element element) {
  return unit_columns(pattern) * element_bits(element);
}
SPARSE24_INLINE constexpr int block_bytes(Pattern pattern, Element element) {
  return BLOCK_UNITS / 8 * unit_bits(pattern, element);
}

// The bits of a unit that tell zero from nonzero: all but the signs of floats. Units are 4 to 64 bits wide.
SPARSE24_INLINE constexpr uint64_t unit_magnitude_bits(Element element, bool pair) {
  if (element == Element::I8 || element == Element::I4) return ~uint64_t{0};
  const uint64_t one = element == Element::F32 ? 0x7fffffff : 0x7fff;
  return pair ? one | (one << element_bits(element)) : one;
}

struct FormatKernels {
  // Returns the first group that does not fit, or -1; Selection::MAGNITUDE always fits. `stream`: write values past
  // the caches; they are 32-byte aligned and the caller fences.
  int64_t (*compress)(const uint8_t* dense, int64_t blocks, uint8_t* values, uint8_t* meta, bool stream);
  void (*prune_mask)(const uint8_t* dense, int64_t blocks, uint8_t* mask);
  void (*decompress)(const uint8_t* values, const uint8_t* meta, int64_t blocks, uint8_t* dense);
};

FormatKernels avx2_format_kernels(Element element, Pattern pattern, Selection selection);
FormatKernels avx512_format_kernels(Element element, Pattern pattern, Selection selection);

template <class Simd, Element ELEMENT, Pattern PATTERN>
struct FormatLoops {
  static constexpr bool PAIR = PATTERN == Pattern::PAIR_FOUR_EIGHT;
  static constexpr int UNIT_BITS = unit_bits(PATTERN, ELEMENT);
  static constexpr int BLOCK_BYTES = block_bytes(PATTERN, ELEMENT);

  // Words of eight blocks at a time: compilers turn the loops over them into vector instructions.
  static constexpr int BATCH = 8;
  // Far enough ahead to cover the latency of memory, 100 ns or more at 16 GB/s. Past the end a prefetch does nothing.
  static constexpr int PREFETCH_BYTES = 4096;

  template <Selection SELECTION>
  static int64_t compress(const uint8_t* dense, int64_t blocks, uint8_t* values, uint8_t* meta, bool stream) {
    for (int64_t block = 0; block < blocks; block += BATCH) {
      const int count = blocks - block < BATCH ? static_cast<int>(blocks - block) : BATCH;
      uint64_t keep[BATCH], codes[BATCH];
      const int misfit = select<SELECTION>(dense, count, keep);
      if (misfit >= 0) return BLOCK_GROUPS * block + misfit;
      for (int i = 0; i < BATCH; ++i) codes[i] = codes_of(keep[i]);
      memcpy(meta, codes, BLOCK_META_BYTES * count);
      meta += BLOCK_META_BYTES * count;
      for (int i = 0; i < count; ++i) {
        Simd::template compact<UNIT_BITS>(dense, keep[i], values, stream);
        dense += BLOCK_BYTES;
        values += BLOCK_BYTES / 2;
      }
    }
    return -1;
  }

  static void prune_mask(const uint8_t* dense, int64_t blocks, uint8_t* mask) {
    for (int64_t block = 0; block < blocks; block += BATCH) {
      const int count = blocks - block < BATCH ? static_cast<int>(blocks - block) : BATCH;
      uint64_t keep[BATCH];
      select<Selection::MAGNITUDE>(dense, count, keep);
      dense += BLOCK_BYTES * count;
      for (int i = 0; i < count; ++i) {
        for (int column = 0; column < unit_columns(PATTERN); ++column) {
          Simd::spread(PAIR ? doubled(keep[i] >> (32 * column)) : keep[i], mask);
          mask += BLOCK_UNITS;
        }
      }
    }
  }

  static void decompress(const uint8_t* values, const uint8_t* meta, int64_t blocks, uint8_t* dense) {
    for (int64_t block = 0; block < blocks; block += BATCH) {
      const int count = blocks - block < BATCH ? static_cast<int>(blocks - block) : BATCH;
      uint64_t codes[BATCH] = {}, keep[BATCH];
      memcpy(codes, meta, BLOCK_META_BYTES * count);
      meta += BLOCK_META_BYTES * count;
      for (int i = 0; i < BATCH; ++i) keep[i] = keep_of(codes[i]);
      for (int i = 0; i < count; ++i) {
        Simd::template expand<UNIT_BITS>(values, keep[i], dense);
        values += BLOCK_BYTES / 2;
        dense += BLOCK_BYTES;
      }
    }
  }

 private:
  // The keep words of `count` blocks. Returns the first group that does not fit, or -1.
  template <Selection SELECTION>
  static int select(const uint8_t* dense, int count, uint64_t (&keep)[BATCH]) {
    uint64_t next[BATCH] = {}, opposite[BATCH] = {};
    for (int i = 0; i < count; ++i) {
      const uint8_t* block = dense + BLOCK_BYTES * i;
      for (int line = 0; line < BLOCK_BYTES; line += 64) __builtin_prefetch(block + PREFETCH_BYTES + line);
      if constexpr (SELECTION == Selection::STRICT) {
        const uint64_t nonzero = Simd::template nonzero<ELEMENT, PAIR>(block);
        const uint64_t misfits = overfull<PATTERN>(nonzero);
        if (misfits != 0) return BLOCK_GROUPS * i + __builtin_ctzll(misfits) / 4;
        next[i] = nonzero;
      } else {
        const Beats<uint64_t> beats = Simd::template beats<ELEMENT, PAIR>(block);
        next[i] = beats.next;
        opposite[i] = beats.opposite;
      }
    }
    for (int i = 0; i < BATCH; ++i) {
      if constexpr (SELECTION == Selection::STRICT) {
        keep[i] = keep_best<PATTERN>(nonzero_beats(next[i]));
      } else {
        keep[i] = keep_best<PATTERN>(Beats<uint64_t>{next[i], opposite[i]});
      }
    }
    return -1;
  }

  // Each of the low 32 bits twice.
  static uint64_t doubled(uint64_t bits) {
    bits &= 0xffffffff;
    bits = (bits | (bits << 16)) & 0x0000ffff0000ffff;
    bits = (bits | (bits << 8)) & 0x00ff00ff00ff00ff;
    bits = (bits | (bits << 4)) & 0x0f0f0f0f0f0f0f0f;
    bits = (bits | (bits << 2)) & 0x3333333333333333;
    bits = (bits | (bits << 1)) & 0x5555555555555555;
    return bits * 3;
  }
};

template <class Simd, Element ELEMENT, Pattern PATTERN>
FormatKernels format_kernels(Selection selection) {
  using Loops = FormatLoops<Simd, ELEMENT, PATTERN>;
  return {selection == Selection::STRICT ? Loops::template compress<Selection::STRICT>
                                         : Loops::template compress<Selection::MAGNITUDE>,
          Loops::prune_mask, Loops::decompress};
}

template <class Simd, Element ELEMENT>
FormatKernels format_kernels(Pattern pattern, Selection selection) {
  switch (pattern) {
    case Pattern::ONE_TWO:
      return format_kernels<Simd, ELEMENT, Pattern::ONE_TWO>(selection);
    case Pattern::PAIR_FOUR_EIGHT:
      return format_kernels<Simd, ELEMENT, Pattern::PAIR_FOUR_EIGHT>(selection);
    default:
      return format_kernels<Simd, ELEMENT, Pattern::TWO_FOUR>(selection);
  }
}

template <class Simd>
FormatKernels format_kernels(Element element, Pattern pattern, Selection selection) {
  switch (element) {
    case Element::F16:
      return format_kernels<Simd, Element::F16>(pattern, selection);
    case Element::BF16:
      return format_kernels<Simd, Element::BF16>(pattern, selection);
    case Element::I8:
      return format_kernels<Simd, Element::I8>(pattern, selection);
    case Element::I4:
      return format_kernels<Simd, Element::I4>(pattern, selection);
    default:
      return format_kernels<Simd, Element::F32>(pattern, selection);
  }
}

}  // namespace sparse24::cpu
