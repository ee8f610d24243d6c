// linear() on AMX, for more than a few tokens: of BF16 weights, of I8 and I4 weights with x rounded to int8, and of
// those of integers with BF16 x as it is.
//
// The tile unit has no sparse product, so a piece of W becomes dense on its way: two blocks of 16 rows and PIECE_UNITS
// of their columns, in the L1 and in the layout of B tiles, which every strip of 16 tokens of the panel then meets.
//
//   for each run of blocks of W
//     for each piece of the columns
//       for each two blocks
//         expand: codes, values -> B tiles                  a shuffle for each 64 bytes
//         for each two strips: 2 x 2 tiles of sums += two tiles of x . two B tiles
//         with scale groups, at the end of one: totals += sums * scales
//     epilogue of the sums
//
// From memory W comes compressed, and nothing dense is kept. A panel of x, [unit][row][64 bytes], has A tiles as it
// is. Multiplying a tile takes 16 cycles for 16 tokens, expanding one about 32: panels are tall for that.
#include <algorithm>
#include <cstring>
#include <memory>

#include "csrc/cpu/linear/linear_avx512.h"

namespace sparse24::cpu {
namespace {

constexpr int TILE_ROWS = 16, TILE_BYTES = 1024;
constexpr int AMX_PANEL_ROWS = 256;

// Columns of a piece, in units of 64 bytes of x: two blocks of tiles take 32 KB, and leave x room in an L1 of 48.
constexpr int PIECE_UNITS = 16;

// Of a run of blocks the sums, half a megabyte, stay in the L2 beside a piece of the panel: from the L3 tiles of x come
// six times as slow (measured).
constexpr int RUN_BLOCKS = 32;

constexpr int PREFETCH_AHEAD_BYTES = 4096;  // within a block

// Which tiles there are; as ldtilecfg reads it (Intel SDM volume 1, 18.3).
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  // x and sums in tiles of `tokens` rows.
  explicit TileConfig(int tokens) {
    for (int i = 0; i < 8; ++i) {
      row_bytes[i] = 64;
      rows[i] = static_cast<uint8_t>(i < 6 ? tokens : TILE_ROWS);
    }
  }
};

// Units of a panel of x that a chunk of W meets.
template <Element WEIGHT, Element PANEL>
constexpr int CHUNK_UNITS = chunk_columns(WEIGHT) * (element_bits(PANEL) / 8) / UNIT_BYTES;

// ---- W, expanded ----
//
// Row r of a B tile has, for each of the 16 rows of a block, the 4 bytes of W that meet bytes 4 r to 4 r + 3 of a unit
// of x. A lane of 32 bits has a row's values of a group already; in each, one shuffle moves them to their places, and
// zeros to the others. Which go where is looked up by the code of the group.

constexpr int ZERO = 0x80;  // what a shuffle makes a zero of

// Of a group of `SLOTS` places of `SIZE` bytes: the byte of the lane that comes to each byte of the places from `first`
// on; `at` is where the two values, of the same size, begin in the lane.
constexpr uint32_t places(int code, int first, int size, int at) {
  uint32_t control = 0;
  for (int byte = 0; byte < 4; ++byte) {
    const int place = first + byte / size;
    const int from = place == first_of(code)    ? at + byte % size
                     : place == second_of(code) ? at + size + byte % size
                                                : ZERO;
    control |= static_cast<uint32_t>(from) << 8 * byte;
  }
  return control;
}

struct ExpandTables {
  uint32_t halves[2][16];  // places 0 and 1, 2 and 3 of a group, of 16 bits each
  uint32_t bytes[2][16];   // all four places of a group whose values are bytes 0 and 1, 2 and 3 of a lane
  uint32_t lane[16];       // shuffles count from the start of 128 bits
  constexpr ExpandTables() : halves(), bytes(), lane() {
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 2; ++j) {
        halves[j][i] = places(i, 2 * j, 2, 0);
        bytes[j][i] = places(i, 0, 1, 2 * j);
      }
      lane[i] = 0x04040404u * (i % 4);
    }
  }
};
alignas(64) constexpr ExpandTables EXPAND;

SPARSE24_INLINE __m512i expanded(__m512i values, __m512i codes, const uint32_t* table) {
  const __m512i control = _mm512_permutexvar_epi32(codes, _mm512_load_si512(table));  // by the low four bits of a lane
  return _mm512_shuffle_epi8(values, _mm512_or_si512(control, _mm512_load_si512(EXPAND.lane)));
}

// A chunk, as B tiles for x in PANEL: one for each unit of 64 bytes of x.
template <Element WEIGHT, Element PANEL>
struct Expand;

// Values are 16 bits, a pair of I4 being one: of each of eight groups two rows of the tile.
SPARSE24_INLINE void expand_halves(__m512i values, __m512i codes, int group, uint8_t* tile) {
  _mm512_store_si512(tile + 128 * group, expanded(values, codes, EXPAND.halves[0]));
  _mm512_store_si512(tile + 128 * group + 64, expanded(values, codes, EXPAND.halves[1]));
}

template <>
struct Expand<Element::BF16, Element::BF16> {
  static SPARSE24_INLINE void chunk(const uint8_t* chunk, uint8_t* tile, int) {
#pragma GCC unroll 8
    for (int group = 0; group < 8; ++group) {
      const __m512i codes = _mm512_srli_epi32(_mm512_loadu_si512(chunk), 4 * group);
      expand_halves(_mm512_loadu_si512(chunk + CODES_BYTES + 64 * group), codes, group, tile);
    }
  }
};

// I4 values come as 16 w, as compensation and shift of the sums expect.
template <>
struct Expand<Element::I4, Element::I8> {
  static SPARSE24_INLINE void chunk(const uint8_t* chunk, uint8_t* tile, int) {
#pragma GCC unroll 8
    for (int group = 0; group < 8; ++group) {
      const __m512i codes = _mm512_srli_epi32(_mm512_loadu_si512(chunk), 4 * group);
      const __m512i both = _mm512_loadu_si512(chunk + CODES_BYTES + group / 2 * 64);  // groups, low nibbles first
      const __m512i high = group % 2 == 0 ? _mm512_slli_epi32(both, 4) : both;
      expand_halves(_mm512_and_si512(high, _mm512_set1_epi8(static_cast<char>(0xf0))), codes, group, tile);
    }
  }
};

// Sixteen groups, a row of the tile each; a lane has the values of two.
template <>
struct Expand<Element::I8, Element::I8> {
  static SPARSE24_INLINE void chunk(const uint8_t* chunk, uint8_t* tile, int) {
#pragma GCC unroll 16
    for (int group = 0; group < 16; ++group) {
      const __m512i codes = _mm512_srli_epi32(_mm512_loadu_si512(chunk + group / 8 * CODES_BYTES), 4 * (group % 8));
      const __m512i values = _mm512_loadu_si512(chunk + 2 * CODES_BYTES + group / 2 * 64);
      _mm512_store_si512(tile + 64 * group, expanded(values, codes, EXPAND.bytes[group % 2]));
    }
  }
};

// As bfloat16, of eight groups for each of two tiles.
template <>
struct Expand<Element::I8, Element::BF16> {
  static SPARSE24_INLINE void chunk(const uint8_t* chunk, uint8_t* tiles, int tile_step) {
#pragma GCC unroll 16
    for (int group = 0; group < 16; ++group) {
      const __m512i codes = _mm512_srli_epi32(_mm512_loadu_si512(chunk + group / 8 * CODES_BYTES), 4 * (group % 8));
      const __m512i four = _mm512_loadu_si512(chunk + 2 * CODES_BYTES + group / 2 * 64);
      expand_halves(bf16_of_bytes<true>(four, group % 2 * 2), codes, group % 8, tiles + group / 8 * tile_step);
    }
  }
};

// Bytes of a vector of int4 values in its low, or high, nibbles.
SPARSE24_INLINE __m512i bytes_of_nibbles(__m512i nibbles, bool high) {
  const __m512i sign = _mm512_set1_epi8(8), low = _mm512_srli_epi32(nibbles, high ? 4 : 0);
  return _mm512_sub_epi8(_mm512_xor_si512(_mm512_and_si512(low, _mm512_set1_epi8(15)), sign), sign);
}

// As those of I8: a quad of int4 values is two groups.
template <>
struct Expand<Element::I4_TWO_FOUR, Element::BF16> {
  static SPARSE24_INLINE void chunk(const uint8_t* chunk, uint8_t* tiles, int tile_step) {
#pragma GCC unroll 16
    for (int group = 0; group < 16; ++group) {
      const __m512i codes = _mm512_srli_epi32(_mm512_loadu_si512(chunk + group / 8 * CODES_BYTES), 4 * (group % 8));
      const __m512i eight = _mm512_loadu_si512(chunk + 2 * CODES_BYTES + group / 4 * 64);
      const __m512i quad = bytes_of_nibbles(eight, group / 2 % 2 == 1);
      expand_halves(bf16_of_bytes<true>(quad, group % 2 * 2), codes, group % 8, tiles + group / 8 * tile_step);
    }
  }
};

// As bfloat16, of four groups for each of two tiles; a pair is a lane, and a row of the tile one of four places.
template <>
struct Expand<Element::I4, Element::BF16> {
  static SPARSE24_INLINE void chunk(const uint8_t* chunk, uint8_t* tiles, int tile_step) {
    const __m512i all_codes = _mm512_loadu_si512(chunk);
#pragma GCC unroll 8
    for (int group = 0; group < 8; ++group) {
      const __m512i codes = _mm512_srli_epi32(all_codes, 4 * group);
      const __m512i both = _mm512_loadu_si512(chunk + CODES_BYTES + group / 2 * 64);
      const __m512i bytes = bytes_of_nibbles(both, group % 2 == 1);
      const __m512i pairs[2] = {bf16_of_bytes<true>(bytes, 0), bf16_of_bytes<true>(bytes, 2)};
      for (int place = 0; place < 4; ++place) {
        const __m512i low = _mm512_set1_epi32(3), high = _mm512_set1_epi32(12);
        const __mmask16 first = _mm512_cmpeq_epi32_mask(_mm512_and_si512(codes, low), _mm512_set1_epi32(place));
        const __mmask16 second = _mm512_cmpeq_epi32_mask(_mm512_and_si512(codes, high), _mm512_set1_epi32(4 * place));
        const __m512i row = _mm512_mask_mov_epi32(_mm512_maskz_mov_epi32(second, pairs[1]), first, pairs[0]);
        _mm512_store_si512(tiles + group / 4 * tile_step + (group % 4 * 4 + place) * 64, row);
      }
    }
  }
};

// `chunks` of a block, to every second of `tiles`.
template <Element WEIGHT, Element PANEL>
void expand(const uint8_t* chunk, int chunks, uint8_t* tiles) {
  constexpr int BYTES = chunk_bytes(WEIGHT);
  for (int i = 0; i < chunks; ++i, chunk += BYTES, tiles += CHUNK_UNITS<WEIGHT, PANEL> * 2 * TILE_BYTES) {
    for (int line = 0; line < BYTES; line += 64) __builtin_prefetch(chunk + PREFETCH_AHEAD_BYTES + line);
    Expand<WEIGHT, PANEL>::chunk(chunk, tiles, 2 * TILE_BYTES);
  }
}

// ---- Products of tiles ----

// Tile registers, which the intrinsics of g++ 12 take as literals alone: sums 0 to 3 (2 strip + block), x 4 and 5, W 6
// and 7.
#define MULTIPLY_TILE(sums, x, w)           \
  do {                                      \
    if constexpr (PANEL == Element::BF16) { \
      _tile_dpbf16ps(sums, x, w);           \
    } else {                                \
      _tile_dpbusd(sums, x, w);             \
    }                                       \
  } while (false)

// The sums of one or two strips and one or two blocks. x: the first strip's unit; the second's is `strip_bytes` on, and
// the next unit `unit_bytes`. sums: [strip][block] of tiles.
template <Element PANEL, int STRIPS, int BLOCKS>
void multiply_piece(const uint8_t* x, int64_t strip_bytes, int64_t unit_bytes, int units, const uint8_t* w,
                    uint8_t* sums, bool first) {
  asm volatile("" ::: "memory");  // loads of tiles do not tell the compiler that they read
  if (first) {
    _tile_zero(0);
    if constexpr (BLOCKS == 2) _tile_zero(1);
    if constexpr (STRIPS == 2) _tile_zero(2);
    if constexpr (STRIPS == 2 && BLOCKS == 2) _tile_zero(3);
  } else {
    _tile_loadd(0, sums, 64);
    if constexpr (BLOCKS == 2) _tile_loadd(1, sums + TILE_BYTES, 64);
    if constexpr (STRIPS == 2) _tile_loadd(2, sums + 2 * TILE_BYTES, 64);
    if constexpr (STRIPS == 2 && BLOCKS == 2) _tile_loadd(3, sums + 3 * TILE_BYTES, 64);
  }
  for (int unit = 0; unit < units; ++unit, x += unit_bytes, w += 2 * TILE_BYTES) {
    _tile_loadd(6, w, 64);
    _tile_loadd(4, x, 64);
    MULTIPLY_TILE(0, 4, 6);
    if constexpr (BLOCKS == 2) {
      _tile_loadd(7, w + TILE_BYTES, 64);
      MULTIPLY_TILE(1, 4, 7);
    }
    if constexpr (STRIPS == 2) {
      _tile_loadd(5, x + strip_bytes, 64);
      MULTIPLY_TILE(2, 5, 6);
    }
    if constexpr (STRIPS == 2 && BLOCKS == 2) MULTIPLY_TILE(3, 5, 7);
  }
  _tile_stored(0, sums, 64);
  if constexpr (BLOCKS == 2) _tile_stored(1, sums + TILE_BYTES, 64);
  if constexpr (STRIPS == 2) _tile_stored(2, sums + 2 * TILE_BYTES, 64);
  if constexpr (STRIPS == 2 && BLOCKS == 2) _tile_stored(3, sums + 3 * TILE_BYTES, 64);
}

// ---- A tile of y ----

uint8_t* aligned(uint8_t* memory) { return memory + -reinterpret_cast<uintptr_t>(memory) % UNIT_BYTES; }

// Kept between calls: the pages of half a megabyte would take a tenth of a millisecond to come anew.
uint8_t* sums_of_thread(int64_t bytes) {
  thread_local std::unique_ptr<uint8_t[]> memory;
  thread_local int64_t size = 0;
  if (size < bytes) memory.reset(new uint8_t[bytes + UNIT_BYTES]), size = bytes;
  return aligned(memory.get());
}

// The rows of a panel in strips of one height, so that one configuration does for all: the last begins within the one
// before where they do not divide the rows.
struct Strips {
  int rows, count, height;

  explicit Strips(int rows)
      : rows(rows), count((rows + TILE_ROWS - 1) / TILE_ROWS), height((rows + count - 1) / count) {}

  int begin(int strip) const { return std::min(strip * height, rows - height); }
  int overlap(int strip) const { return strip * height - begin(strip); }
};

// W and x of these elements.
template <Element WEIGHT, Element PANEL>
struct Amx {
  static constexpr int UNITS = CHUNK_UNITS<WEIGHT, PANEL>, PIECE_CHUNKS = PIECE_UNITS / UNITS;
  static constexpr bool INTEGER = PANEL == Element::I8;

  static const Kernels& general() {
    return INTEGER ? *avx512_kernels(WEIGHT, false, Element::F32)
                   : *avx512_bf16_kernels(WEIGHT, is_integer(WEIGHT), Element::BF16);
  }

  // Adds the products of some chunks of columns to the sums of two blocks, or of one; `first` makes the sums anew.
  template <int BLOCKS>
  static void multiply_blocks(const Linear& call, const Tile& tile, int64_t block, int64_t chunk, int chunks,
                              bool first, const Strips& strips, uint8_t* tiles, uint8_t* sums) {
    const int64_t bytes = block_bytes(call), unit_bytes = tile.panel_rows * UNIT_BYTES;
    for (int i = 0; i < BLOCKS; ++i) {
      const uint8_t* const w = call.packed + (block + i) * bytes + chunk * chunk_bytes(WEIGHT);
      expand<WEIGHT, PANEL>(w, chunks, tiles + i * TILE_BYTES);
    }
    const uint8_t* const x = tile.panel + chunk * UNITS * unit_bytes;
    int strip = 0;
    for (; strip + 1 < strips.count; strip += 2) {
      const int begin = strips.begin(strip), step = strips.begin(strip + 1) - begin;
      multiply_piece<PANEL, 2, BLOCKS>(x + begin * UNIT_BYTES, step * UNIT_BYTES, unit_bytes, chunks * UNITS, tiles,
                                       sums + 2 * strip * TILE_BYTES, first);
    }
    if (strip < strips.count) {
      multiply_piece<PANEL, 1, BLOCKS>(x + strips.begin(strip) * UNIT_BYTES, 0, unit_bytes, chunks * UNITS, tiles,
                                       sums + 2 * strip * TILE_BYTES, first);
    }
  }

  // Adds the scaled sums of a scale group and of two blocks, or of one, to the totals, `totals` bytes behind them.
  static void add_groups(const Linear& call, int64_t block, int64_t last, int64_t group, const Strips& strips,
                         uint8_t* sums, int64_t totals) {
    const int64_t bytes = block_bytes(call);
    for (int i = 0; i < 2 * strips.count; ++i, sums += TILE_BYTES) {
      const int64_t own = block + i % 2;
      if (own >= last) continue;
      add_group<WEIGHT, PANEL>(call, strips.height, own, call.packed + own * bytes, group,
                               reinterpret_cast<const __m512i*>(sums), reinterpret_cast<__m512i*>(sums + totals));
    }
  }

  // In a tile the zeros of W are multiplied too: x that is not finite makes a NaN of them, where a sparse product has
  // none. Rows with such sums are made again by the general kernels.
  static void multiply_row(const Linear& call, const Tile& tile, int64_t block, int row) {
    const int64_t units = chunk_count(WEIGHT, call.in_features) * UNITS;
    const std::unique_ptr<uint8_t[]> memory(new uint8_t[(units + 1) * UNIT_BYTES]);
    uint8_t* const panel = aligned(memory.get());
    for (int64_t unit = 0; unit < units; ++unit) {
      std::memcpy(panel + unit * UNIT_BYTES, tile.panel + (unit * tile.panel_rows + row) * UNIT_BYTES, UNIT_BYTES);
    }
    general().multiply(call, {panel, nullptr, tile.first_token + row, 1, 1, block, block + 1});
  }

  // y of one strip and one block; `sums` is its tile, whose first `overlap` rows belong to the strip before.
  static void finish_strip(const Linear& call, const Tile& tile, int64_t block, int begin, int height, int overlap,
                           const __m512i* sums) {
    Tile strip = tile;
    strip.first_token += begin + overlap, strip.rows = height - overlap;
    if (tile.x_scales) strip.x_scales += begin + overlap;
    finish_for<INTEGER>(call)(call, strip, block, sums + overlap);
    if constexpr (!INTEGER) {
      const auto zeros = [&](int row) SPARSE24_LAMBDA {  // 0, or NaN where a sum is not finite
        return _mm512_mul_ps(_mm512_castsi512_ps(sums[row]), _mm512_setzero_ps());
      };
      const auto any_nan = [](__m512 v) SPARSE24_LAMBDA { return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q) != 0; };
      __m512 all = _mm512_setzero_ps();
      for (int row = overlap; row < height; ++row) all = _mm512_add_ps(all, zeros(row));
      if (!any_nan(all)) [[likely]]
        return;
      for (int row = overlap; row < height; ++row) {
        if (any_nan(zeros(row))) multiply_row(call, tile, block, begin + row);
      }
    }
  }

  static void multiply(const Linear& call, const Tile& tile) {
    alignas(64) uint8_t tiles[PIECE_UNITS * 2 * TILE_BYTES];
    const Strips strips(tile.rows);
    const int64_t chunks = chunk_count(WEIGHT, call.in_features), shared = group_chunks(call);
    const int64_t run = chunks <= PIECE_CHUNKS ? 2 : RUN_BLOCKS, pair_bytes = strips.count * 2 * TILE_BYTES;
    const int64_t run_bytes = run / 2 * pair_bytes;
    uint8_t* const sums = sums_of_thread(call.group_size ? 2 * run_bytes : run_bytes);
    uint8_t* const results = call.group_size ? sums + run_bytes : sums;
    const TileConfig config(strips.height);
    asm volatile("" ::: "memory");  // the intrinsic does not say that it reads all of it
    _tile_loadconfig(&config);
    for (int64_t first = tile.first_block; first < tile.last_block; first += run) {
      const int64_t last = std::min(first + run, tile.last_block);
      if (call.group_size) std::memset(results, 0, run_bytes);
      int64_t begin = 0, group = 0;
      do {
        const int64_t width = std::min(shared, chunks - begin);
        const int64_t pieces = std::max<int64_t>((width + PIECE_CHUNKS - 1) / PIECE_CHUNKS, 1);  // of no columns, one
        for (int64_t piece = 0; piece < pieces; ++piece) {
          const int64_t chunk = begin + width * piece / pieces;
          const int count = static_cast<int>(begin + width * (piece + 1) / pieces - chunk);
          for (int64_t block = first; block < last; block += 2) {
            uint8_t* const pair = sums + (block - first) / 2 * pair_bytes;
            if (block + 1 < last) {
              multiply_blocks<2>(call, tile, block, chunk, count, piece == 0, strips, tiles, pair);
            } else {
              multiply_blocks<1>(call, tile, block, chunk, count, piece == 0, strips, tiles, pair);
            }
            if (call.group_size && piece + 1 == pieces) add_groups(call, block, last, group, strips, pair, run_bytes);
          }
        }
        begin += shared, ++group;
      } while (begin < chunks);
      for (int strip = 0; strip < strips.count; ++strip) {
        for (int64_t block = first; block < last; ++block) {
          const uint8_t* const sum =
              results + (block - first) / 2 * pair_bytes + (2 * strip + (block - first) % 2) * TILE_BYTES;
          finish_strip(call, tile, block, strips.begin(strip), strips.height, strips.overlap(strip),
                       reinterpret_cast<const __m512i*>(sum));
        }
      }
    }
    _tile_release();
  }
};

// Panels are packed as those of the general kernels are.
template <Element WEIGHT, Element PANEL>
Kernels with_pack_of(const Kernels& general) {
  return {"amx", PANEL, AMX_PANEL_ROWS, 1, general.pack, Amx<WEIGHT, PANEL>::multiply, RUN_BLOCKS};
}

template <Element WEIGHT>
const Kernels* weight_only_kernels(Element x_element) {
  constexpr Element BF16 = Element::BF16;
  static const Kernels KERNELS = with_pack_of<WEIGHT, BF16>(*avx512_bf16_kernels(WEIGHT, true, BF16));
  return x_element == BF16 ? &KERNELS : nullptr;
}

template <Element WEIGHT>
const Kernels* integer_kernels(bool weight_only, Element x_element) {
  constexpr Element I8 = Element::I8;
  static const Kernels ROUNDED = with_pack_of<WEIGHT, I8>(*avx512_kernels(WEIGHT, false, Element::F32));
  static const Kernels INT8_X = with_pack_of<WEIGHT, I8>(*avx512_kernels(WEIGHT, false, I8));
  if (weight_only) return weight_only_kernels<WEIGHT>(x_element);
  return x_element == I8 ? &INT8_X : &ROUNDED;
}

}  // namespace

const Kernels* amx_kernels(Element weight, bool weight_only, Element x_element) {
  constexpr Element BF16 = Element::BF16;
  static const Kernels BF16_WEIGHT = with_pack_of<BF16, BF16>(*avx512_bf16_kernels(BF16, false, BF16));
  switch (weight) {
    case Element::BF16:
      return &BF16_WEIGHT;
    case Element::I8:
      return integer_kernels<Element::I8>(weight_only, x_element);
    case Element::I4:
      return integer_kernels<Element::I4>(weight_only, x_element);
    case Element::I4_TWO_FOUR:
      return weight_only_kernels<Element::I4_TWO_FOUR>(x_element);
    default:
      return nullptr;
  }
}

}  // namespace sparse24::cpu
