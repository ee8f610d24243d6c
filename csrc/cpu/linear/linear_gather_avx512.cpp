// linear() in AVX-512 for many rows of x, W of F32 or F16: float products without shuffles.
//
// A lane of a vector is one row of x. The panel is x transposed, [column][row], and each nonzero of W is one
// multiply-add a strip, with the row of the panel whose address its code gives:
//
//   sums of output row n  +=  value * panel[4 * group + code]       a value of n, broadcast
//
// What bounds it is the load of 64 bytes a multiply-add, one a cycle. Hence the panel is taken in slices of columns
// that stay in the L1; from slice to slice, the sums of a run of blocks stay in the L2. And hence four values of a row
// are loaded at once: those of a block lie 64 bytes apart, and are brought together first.
#include <algorithm>
#include <utility>

#include "csrc/cpu/linear/linear_avx512.h"

namespace sparse24::cpu {
namespace {

constexpr int STRIP_ROWS = 16;         // rows of x in a vector
constexpr int MAX_STRIPS = 7;          // of a panel: with more, a slice of 32 columns would fill half of the L1
constexpr int SLICE_BYTES = 24 << 10;  // of the panel; the rest of the L1 is for values and sums on their way
constexpr int RUN_BLOCKS = 16;         // whose sums wait in the L2, at most 112 KB

void pack_strip(const Strip& strip) {
  float* column = reinterpret_cast<float*>(strip.panel) + strip.row;
  for_each_16(strip.in_features, strip.columns, [&](int64_t k, __mmask16 mask) SPARSE24_LAMBDA {
    __m512i rows[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      rows[i] = i < strip.count ? _mm512_castps_si512(load_floats(strip.rows[i], strip.x_element, k, mask))
                                : _mm512_setzero_si512();
    }
    transpose_16(rows);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i, column += strip.panel_rows) _mm512_store_si512(column, rows[i]);
  });
}

// The values of one chunk of a block, four slots of a row side by side.
struct Values {
  static constexpr int QUADS = chunk_columns(Element::F32) / 2 / 4;
  float rows[QUADS][4][4][4];  // [four slots][row % 4][row / 4][slot]

  const float* of(int row) const { return rows[0][row % 4][row / 4]; }
};
constexpr int QUAD_FLOATS = BLOCK_ROWS * 4;

template <Element WEIGHT>
SPARSE24_INLINE void bring_together(const uint8_t* chunk, Values& values) {
  const auto slot = [&](int i)
                        SPARSE24_LAMBDA { return load_floats(chunk + CODES_BYTES, WEIGHT, i * BLOCK_ROWS, 0xffff); };
#pragma GCC unroll 4
  for (int quad = 0; quad < Values::QUADS; ++quad) {  // a 4 x 4 transposition in each 128 bits
    const __m512 a = slot(4 * quad), b = slot(4 * quad + 1), c = slot(4 * quad + 2), d = slot(4 * quad + 3);
    const __m512d ab_low = _mm512_castps_pd(_mm512_unpacklo_ps(a, b)),
                  ab_high = _mm512_castps_pd(_mm512_unpackhi_ps(a, b));
    const __m512d cd_low = _mm512_castps_pd(_mm512_unpacklo_ps(c, d)),
                  cd_high = _mm512_castps_pd(_mm512_unpackhi_ps(c, d));
    _mm512_store_pd(values.rows[quad][0], _mm512_unpacklo_pd(ab_low, cd_low));
    _mm512_store_pd(values.rows[quad][1], _mm512_unpackhi_pd(ab_low, cd_low));
    _mm512_store_pd(values.rows[quad][2], _mm512_unpacklo_pd(ab_high, cd_high));
    _mm512_store_pd(values.rows[quad][3], _mm512_unpackhi_pd(ab_high, cd_high));
  }
}

// The sums of one output row gain the products of one chunk.
template <int STRIPS>
SPARSE24_INLINE void add_products(uint32_t codes,       // of that row
                                  const float* values,  // of that row, four slots together, QUAD_FLOATS apart
                                  const float* x,       // the panel from the first column of the chunk
                                  __m512 (&sums)[STRIPS]) {
#pragma GCC unroll 4
  for (int quad = 0; quad < Values::QUADS; ++quad) {
    const __m512 four = _mm512_broadcast_f32x4(_mm_load_ps(values + quad * QUAD_FLOATS));
    const auto add = [&](int slot, __m512 value) SPARSE24_LAMBDA {
      const float* const partners = x + (slot / 2 * 4 + (codes >> (2 * slot) & 3)) * STRIPS * STRIP_ROWS;
#pragma GCC unroll 8
      for (int strip = 0; strip < STRIPS; ++strip) {
        sums[strip] = _mm512_fmadd_ps(value, _mm512_load_ps(partners + strip * STRIP_ROWS), sums[strip]);
      }
    };
    add(4 * quad, _mm512_permute_ps(four, 0x00));
    add(4 * quad + 1, _mm512_permute_ps(four, 0x55));
    add(4 * quad + 2, _mm512_permute_ps(four, 0xaa));
    add(4 * quad + 3, _mm512_permute_ps(four, 0xff));
  }
}

template <Element WEIGHT, int STRIPS>
void multiply_strips(const Linear& call, const Tile& tile) {
  constexpr int ROWS = STRIPS * STRIP_ROWS, COLUMNS = chunk_columns(WEIGHT), CHUNK_BYTES = chunk_bytes(WEIGHT);
  constexpr int SLICE_CHUNKS = SLICE_BYTES / (COLUMNS * ROWS * static_cast<int>(sizeof(float)));
  const int64_t chunks = chunk_count(WEIGHT, call.in_features);
  const int64_t bytes = block_bytes(call);
  const Finish finish = finish_for<false>(call);
  alignas(64) float sums_of_run[RUN_BLOCKS][BLOCK_ROWS][ROWS];
  alignas(64) Values values[SLICE_CHUNKS];

  const auto multiply_block = [&](const uint8_t* w, const uint8_t* next, int64_t count, const float* slice, bool first,
                                  float (&block_sums)[BLOCK_ROWS][ROWS]) {
    for (int64_t chunk = 0; chunk < count; ++chunk) bring_together<WEIGHT>(w + chunk * CHUNK_BYTES, values[chunk]);
    for (int row = 0; row < BLOCK_ROWS; ++row) {
      // A few lines a row: all at once they would hold up the loads of the sums.
#pragma GCC unroll 16
      for (int line = 0; line < SLICE_CHUNKS * CHUNK_BYTES; line += BLOCK_ROWS * 64) {
        __builtin_prefetch(next + line + row * 64);
      }
      __m512 sums[STRIPS];
#pragma GCC unroll 8
      for (int strip = 0; strip < STRIPS; ++strip) {
        sums[strip] = first ? _mm512_setzero_ps() : _mm512_load_ps(block_sums[row] + strip * STRIP_ROWS);
      }
      for (int64_t chunk = 0; chunk < count; ++chunk) {
        uint32_t codes;
        __builtin_memcpy(&codes, w + chunk * CHUNK_BYTES + row * sizeof codes, sizeof codes);
        add_products(codes, values[chunk].of(row), slice + chunk * COLUMNS * ROWS, sums);
      }
#pragma GCC unroll 8
      for (int strip = 0; strip < STRIPS; ++strip) _mm512_store_ps(block_sums[row] + strip * STRIP_ROWS, sums[strip]);
    }
  };

  const auto finish_block = [&](int64_t block, const float (&block_sums)[BLOCK_ROWS][ROWS]) {
    __m512i sums[STRIPS][STRIP_ROWS];  // [row of x], a lane an output row
    for (int strip = 0; strip < STRIPS; ++strip) {
      for (int row = 0; row < BLOCK_ROWS; ++row) {
        sums[strip][row] = _mm512_load_si512(block_sums[row] + strip * STRIP_ROWS);
      }
      transpose_16(sums[strip]);
    }
    finish(call, tile, block, sums[0]);
  };

  for (int64_t run = tile.first_block; run < tile.last_block; run += RUN_BLOCKS) {
    const int64_t run_end = std::min(run + RUN_BLOCKS, tile.last_block);
    int64_t chunk = 0, count = 0;
    do {
      count = std::min<int64_t>(SLICE_CHUNKS, chunks - chunk);
      const float* const slice = reinterpret_cast<const float*>(tile.panel) + chunk * COLUMNS * ROWS;
      const bool last = chunk + count == chunks;
      for (int64_t block = run; block < run_end; ++block) {
        const uint8_t* const w = call.packed + block * bytes + chunk * CHUNK_BYTES;
        const uint8_t* const next =
            block + 1 < run_end ? w + bytes : call.packed + run * bytes + (chunk + count) * CHUNK_BYTES;
        if (last) prefetch_y(call, tile, block, tile.rows);
        multiply_block(w, next, count, slice, chunk == 0, sums_of_run[block - run]);
        if (last) finish_block(block, sums_of_run[block - run]);
      }
      chunk += count;
    } while (chunk < chunks);
  }
}

template <Element WEIGHT, int... I>
void multiply(const Linear& call, const Tile& tile, std::integer_sequence<int, I...>) {
  static constexpr Multiply BY_STRIPS[] = {multiply_strips<WEIGHT, I + 1>...};
  BY_STRIPS[tile.panel_rows / STRIP_ROWS - 1](call, tile);
}
template <Element WEIGHT>
void multiply_gather(const Linear& call, const Tile& tile) {
  multiply<WEIGHT>(call, tile, std::make_integer_sequence<int, MAX_STRIPS>());
}

template <Element WEIGHT>
constexpr Kernels KERNELS = {"gather",   Element::F32, MAX_STRIPS * STRIP_ROWS,
                             STRIP_ROWS, pack_strip,   multiply_gather<WEIGHT>};

}  // namespace

const Kernels* avx512_gather_kernels(Element weight, bool, Element) {
  return weight == Element::F32 ? &KERNELS<Element::F32> : weight == Element::F16 ? &KERNELS<Element::F16> : nullptr;
}

}  // namespace sparse24::cpu
