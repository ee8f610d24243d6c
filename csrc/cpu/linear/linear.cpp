// linear(): cuts x into panels and W into chunks, and hands tiles of both to the kernels of the machine.
//
//   a small W, many panels:
//     for each panel: pack its rows of x; for each block of W: panel x block -> y      in parallel over panels
//
//   otherwise, for each batch of panels (bounded memory)
//     pack its rows of x                                       in parallel over strips of rows
//     for each chunk of blocks of W
//       for each panel of the batch
//         for each block of the chunk: panel x block -> y      in parallel over this whole nest, flattened
#include "csrc/cpu/linear/linear.h"

#include <algorithm>
#include <memory>
#include <new>

#include "csrc/cpu/linear/linear_choice.h"
#include "csrc/cpu/linear/linear_kernels.h"
#include "csrc/cpu/parallel.h"

namespace sparse24::cpu {

namespace {

// Weights that all panels of a batch run over before the next weights come: long enough that a panel, which lives in
// the L2, is fetched rarely; short enough to stay in the L3. Measured on Zen 4.
constexpr int64_t WEIGHT_CHUNK_BYTES = 1600 << 10;

// Packed x at one time: bounded memory, which stays in the L3. W is streamed once a batch.
constexpr int64_t BATCH_BYTES = 4 << 20;

// A W that stays in the L2 beside a panel, and panels enough to keep all threads busy to the end: then each panel is
// packed and multiplied by one thread.
constexpr int64_t SMALL_WEIGHT_BYTES = 512 << 10;
constexpr int64_t PANELS_PER_THREAD = 4;

// The least work worth another thread, about 5 us: in dot-product instructions of 512 bits, and in elements of x to
// pack.
constexpr int64_t GRAIN_PRODUCTS = 8192;
constexpr int64_t GRAIN_ELEMENTS = 65536;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct FreeUnits {
  void operator()(uint8_t* units) const { ::operator delete[](units, std::align_val_t{UNIT_BYTES}); }
};

// Fresh at each call: keeping it between calls, a thread each, was not 1 % faster.
std::unique_ptr<uint8_t[], FreeUnits> allocate_units(int64_t bytes) {
  return std::unique_ptr<uint8_t[], FreeUnits>(
      static_cast<uint8_t*>(::operator new[](bytes, std::align_val_t{UNIT_BYTES})));
}

// How the rows of x fall into strips, and the strips into panels.
struct Panels {
  int64_t tokens, strip_rows, strips, count;

  Panels(const Kernels& kernels, int64_t tokens)
      : tokens(tokens),
        strip_rows(kernels.strip_rows),
        strips(divide_up(tokens, strip_rows)),
        count(divide_up(strips, kernels.panel_rows / kernels.strip_rows)) {}

  // Panels differ by at most one strip: a short last one would waste the decoding of W.
  int64_t first_strip(int64_t panel) const { return strips * panel / count; }
  int64_t first_token(int64_t panel) const { return std::min(first_strip(panel) * strip_rows, tokens); }
  int rows(int64_t panel) const { return static_cast<int>((first_strip(panel + 1) - first_strip(panel)) * strip_rows); }
};

// The rows of a matrix.
void find_rows(const void* context, int64_t token, int count, int64_t, uint8_t*, const void** rows) {
  const Linear& call = *static_cast<const Linear*>(context);
  const int64_t row_bytes = call.x_stride * (element_bits(call.x_element) / 8);
  const uint8_t* const first = static_cast<const uint8_t*>(call.x) + token * row_bytes;
  for (int row = 0; row < count; ++row) rows[row] = first + row * row_bytes;
}

// One product: how x is cut and where its parts go.
struct Product {
  const Linear& call;
  const RowSource& source;
  const Kernels& kernels;
  Panels panels;
  int64_t columns;         // of a panel
  int64_t row_bytes;       // of a panel, per row
  int64_t block_products;  // dot-product instructions of a block and a row: half the columns, 64 bytes at once

  Product(const Linear& call, const RowSource& source, const Kernels& kernels)
      : call(call), source(source), kernels(kernels), panels(kernels, call.epilogue.tokens) {
    columns = chunk_count(call.weight, call.in_features) * chunk_columns(call.weight);
    row_bytes = columns * element_bits(kernels.panel_element) / 8;
    block_products = BLOCK_ROWS * row_bytes / 2 / UNIT_BYTES + 1;
  }

  // Packs strips [first, last) of one panel, whose strips begin at `begin`. `scales` are those of strip `first`.
  void pack(int64_t begin, int64_t first, int64_t last, uint8_t* panel, int panel_rows, float* scales,
            uint8_t* scratch) const {
    const Epilogue& epilogue = call.epilogue;
    const int64_t end = std::min(last * panels.strip_rows, panels.tokens);
    const int64_t column_bytes = element_bits(kernels.panel_element) / 8;
    for (int64_t token = first * panels.strip_rows; token < end; token += PACK_ROWS) {
      const int count = static_cast<int>(std::min<int64_t>(PACK_ROWS, end - token));
      float* const own_scales = scales + (token - first * panels.strip_rows);
      for (int64_t segment = 0; segment < source.segments; ++segment) {
        const void* rows[PACK_ROWS];
        source.find(source.context, token, count, segment, scratch, rows);
        const int64_t column = segment * source.segment_features;
        const bool is_last = segment + 1 == source.segments;
        kernels.pack({rows, count, call.x_element, source.segment_features,
                      is_last ? columns - column : source.segment_features, panel + column * column_bytes * panel_rows,
                      panel_rows, static_cast<int>(token - begin * panels.strip_rows), own_scales});
      }
      if (call.x_element == Element::I8 && epilogue.x_scales) {
        for (int row = 0; row < count; ++row) {
          own_scales[row] = epilogue.x_scales[(token + row) * epilogue.x_scale_step];
        }
      }
    }
  }

  void multiply(int64_t panel, const uint8_t* units, const float* scales, int64_t first_block,
                int64_t last_block) const {
    const int64_t token = panels.first_token(panel);
    kernels.multiply(
        call, {units, kernels.panel_element == Element::I8 ? scales : nullptr, token,
               static_cast<int>(panels.first_token(panel + 1) - token), panels.rows(panel), first_block, last_block});
  }
};

// Panel by panel: what is packed is still in the L2 when it is multiplied.
void run_by_panels(const Product& product, int64_t blocks, int64_t grain) {
  const Panels& panels = product.panels;
  const int panel_rows = product.kernels.panel_rows;
  parallel_for(0, panels.count, grain, [&](int64_t first, int64_t last) {
    const auto memory = allocate_units(panel_rows * (product.row_bytes + static_cast<int64_t>(sizeof(float))));
    const auto scratch = allocate_units(PACK_ROWS * product.source.scratch_bytes);
    float* const scales = reinterpret_cast<float*>(memory.get() + panel_rows * product.row_bytes);
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t begin = panels.first_strip(panel);
      product.pack(begin, begin, panels.first_strip(panel + 1), memory.get(), panels.rows(panel), scales,
                   scratch.get());
      product.multiply(panel, memory.get(), scales, 0, blocks);
    }
  });
}

void run_by_batches(const Product& product, int64_t blocks, int64_t bytes) {
  const Panels& panels = product.panels;
  const int64_t row_bytes = product.row_bytes;
  const int64_t row_bytes_and_scale = row_bytes + static_cast<int64_t>(sizeof(float));
  const int64_t batches =
      divide_up(panels.count, std::max<int64_t>(BATCH_BYTES / (product.kernels.panel_rows * row_bytes_and_scale), 1));
  const int64_t batch_panels = divide_up(panels.count, batches);
  const int64_t batch_rows =
      std::min<int64_t>(batch_panels * product.kernels.panel_rows, panels.strips * panels.strip_rows);
  const auto memory = allocate_units(batch_rows * row_bytes_and_scale);
  uint8_t* const units = memory.get();
  float* const x_scales = reinterpret_cast<float*>(units + batch_rows * row_bytes);
  const int64_t least_blocks = std::min<int64_t>(product.kernels.run_blocks, blocks);
  const int64_t chunk_blocks =
      std::clamp<int64_t>(WEIGHT_CHUNK_BYTES / std::max<int64_t>(bytes, 1), least_blocks, blocks);

  for (int64_t first_panel = 0; first_panel < panels.count; first_panel += batch_panels) {
    const int64_t last_panel = std::min(first_panel + batch_panels, panels.count), count = last_panel - first_panel;
    const int64_t begin = panels.first_strip(first_panel), end = panels.first_strip(last_panel);
    const auto row_in_batch = [&](int64_t strip) { return (strip - begin) * panels.strip_rows; };

    const auto pack_strips = [&](int64_t first, int64_t last) {
      const auto scratch = allocate_units(PACK_ROWS * product.source.scratch_bytes);
      int64_t panel = first_panel;
      while (first < last) {
        while (first >= panels.first_strip(panel + 1)) ++panel;
        const int64_t from = panels.first_strip(panel), until = std::min(last, panels.first_strip(panel + 1));
        product.pack(from, first, until, units + row_in_batch(from) * row_bytes, panels.rows(panel),
                     x_scales + row_in_batch(first), scratch.get());
        first = until;
      }
    };
    parallel_for(begin, end, GRAIN_ELEMENTS / (panels.strip_rows * (product.call.in_features + 1)) + 1, pack_strips);

    const auto multiply_tiles = [&](int64_t first, int64_t last) {  // in the order: chunk, panel, block
      while (first < last) {
        const int64_t chunk = first / (chunk_blocks * count) * chunk_blocks;
        const int64_t width = std::min(chunk_blocks, blocks - chunk);
        const int64_t panel = first_panel + (first - chunk * count) / width;
        const int64_t block = chunk + (first - chunk * count) % width;
        const int64_t run = std::min(last - first, chunk + width - block);
        const int64_t row = row_in_batch(panels.first_strip(panel));
        product.multiply(panel, units + row * row_bytes, x_scales + row, block, block + run);
        first += run;
      }
    };
    const int64_t tile_products = product.block_products * divide_up((end - begin) * panels.strip_rows, count);
    parallel_for(0, blocks * count, GRAIN_PRODUCTS / tile_products + 1, multiply_tiles);
  }
}

}  // namespace

void linear(const Linear& call) { linear(call, {find_rows, &call, 1, call.in_features, 0}); }

void linear(const Linear& call, const RowSource& source) {
  const Epilogue& epilogue = call.epilogue;
  if (epilogue.tokens <= 0 || epilogue.out_features <= 0) return;
  const Kernels& kernels = kernels_for(call.weight, call.weight_only, call.x_element, epilogue.tokens,
                                       epilogue.out_features, call.in_features);
  const Product product(call, source, kernels);
  const int64_t blocks = block_count(epilogue.out_features), bytes = block_bytes(call);
  const int64_t panels = product.panels.count;
  if (blocks * bytes <= SMALL_WEIGHT_BYTES && panels >= PANELS_PER_THREAD * thread_count()) {
    const int64_t panel_products = blocks * product.block_products * product.panels.rows(0);
    return run_by_panels(product, blocks, GRAIN_PRODUCTS / panel_products + 1);
  }
  run_by_batches(product, blocks, bytes);
}

}  // namespace sparse24::cpu
