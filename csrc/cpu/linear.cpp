// linear(): cuts x into panels and W into chunks, and hands tiles of both to the kernels of the machine.
//
//   for each batch of panels (bounded memory)
//     pack its rows of x                                       in parallel over rows
//     for each chunk of blocks of W
//       for each panel of the batch
//         for each block of the chunk: panel x block -> y      in parallel over this whole nest, flattened
#include "csrc/cpu/linear.h"

#include <algorithm>
#include <memory>
#include <new>

#include "csrc/cpu/isa.h"
#include "csrc/cpu/linear_kernels.h"
#include "csrc/cpu/parallel.h"

namespace sparse24::cpu {

namespace {

// Weights that all panels of a batch run over before the next weights come: long enough that a panel, which lives in
// the L2, is fetched rarely; short enough to stay in the L3. Measured on Zen 4.
constexpr int64_t WEIGHT_CHUNK_BYTES = 1600 << 10;

// Packed x at one time: bounded memory, which stays in the L3. W is streamed once a batch.
constexpr int64_t BATCH_BYTES = 4 << 20;

// The least work worth another thread, about 5 us: in vectors of W times rows, and in elements of x to pack.
constexpr int64_t GRAIN_VECTORS = 16384;
constexpr int64_t GRAIN_ELEMENTS = 65536;

const Kernels& kernels_for(Element weight_element) {
#if defined(__x86_64__)
  const Isa isa = active_isa();
  if (isa >= Isa::AVX512_BF16 && weight_element == Element::BF16) return avx512_bf16_kernels();
  if (isa >= Isa::AVX512) return avx512_kernels(weight_element);
#endif
  return portable_kernels(weight_element);
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct FreeUnits {
  void operator()(uint8_t* units) const { ::operator delete[](units, std::align_val_t{UNIT_BYTES}); }
};

// Fresh at each call: keeping it between calls, a thread each, was not 1 % faster.
std::unique_ptr<uint8_t[], FreeUnits> allocate_units(int64_t bytes) {
  return std::unique_ptr<uint8_t[], FreeUnits>(
      static_cast<uint8_t*>(::operator new[](bytes, std::align_val_t{UNIT_BYTES})));
}

}  // namespace

void linear(const Linear& call) {
  if (call.tokens <= 0 || call.out_features <= 0) return;
  const Kernels& kernels = kernels_for(call.weight_element);

  // Panels differ by at most one row: a short last one would waste the decoding of W.
  const int64_t panels = divide_up(call.tokens, PANEL_ROWS);
  const auto first_token = [&](int64_t panel) { return call.tokens * panel / panels; };
  const int64_t row_bytes = chunk_count(call.weight_element, call.in_features) * chunk_columns(call.weight_element) *
                            element_bits(kernels.panel_element) / 8;
  const int64_t row_bytes_and_scale = row_bytes + static_cast<int64_t>(sizeof(float));
  const int64_t batches = divide_up(panels, std::max<int64_t>(BATCH_BYTES / (PANEL_ROWS * row_bytes_and_scale), 1));
  const int64_t batch_panels = divide_up(panels, batches);
  const int64_t batch_rows = std::min(batch_panels * PANEL_ROWS, call.tokens);
  const auto memory = allocate_units(batch_rows * row_bytes_and_scale);
  uint8_t* const units = memory.get();
  float* const scales = reinterpret_cast<float*>(units + batch_rows * row_bytes);

  const int64_t blocks = block_count(call.out_features);
  const int64_t bytes = block_bytes(call.weight_element, call.in_features);
  const int64_t chunk_blocks = std::clamp<int64_t>(WEIGHT_CHUNK_BYTES / std::max<int64_t>(bytes, 1), 1, blocks);

  for (int64_t first_panel = 0; first_panel < panels; first_panel += batch_panels) {
    const int64_t last_panel = std::min(first_panel + batch_panels, panels), count = last_panel - first_panel;
    const int64_t begin = first_token(first_panel), end = first_token(last_panel);

    const auto pack_rows = [&](int64_t first, int64_t last) {
      int64_t panel = first_panel;
      for (int64_t token = first; token < last; ++token) {
        while (token >= first_token(panel + 1)) ++panel;
        const int64_t from = first_token(panel), rows = first_token(panel + 1) - from;
        uint8_t* const unit = units + (from - begin) * row_bytes + (token - from) * UNIT_BYTES;
        kernels.pack_row(call, token, unit, rows * UNIT_BYTES, scales + (token - begin));
      }
    };
    parallel_for(begin, end, GRAIN_ELEMENTS / (call.in_features + 1) + 1, pack_rows);

    const auto multiply_tiles = [&](int64_t first, int64_t last) {  // in the order: chunk, panel, block
      while (first < last) {
        const int64_t chunk = first / (chunk_blocks * count) * chunk_blocks;
        const int64_t width = std::min(chunk_blocks, blocks - chunk);
        const int64_t panel = first_panel + (first - chunk * count) / width;
        const int64_t block = chunk + (first - chunk * count) % width;
        const int64_t run = std::min(last - first, chunk + width - block);
        const int64_t token = first_token(panel);
        kernels.multiply(call, {units + (token - begin) * row_bytes, scales + (token - begin), token,
                                static_cast<int>(first_token(panel + 1) - token), block, block + run});
        first += run;
      }
    };
    const int64_t tile_vectors = (bytes / 64 + 1) * divide_up(end - begin, count);
    parallel_for(0, blocks * count, GRAIN_VECTORS / tile_vectors + 1, multiply_tiles);
  }
}

}  // namespace sparse24::cpu
