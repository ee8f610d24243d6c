// The table of linear kernels, which of them runs a shape, and the launches.
#include "csrc/cuda/linear.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <string_view>
#include <tuple>

#include "kernels/linear_few.cuh"
#include "kernels/linear_reduce.cuh"
#include "kernels/linear_tiles.cuh"
#include "kernels/packed.cuh"

namespace sparse24::cuda {

namespace {

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- The kernels ----

struct Kernel {
  const char* name;
  tiles::Tile tile;  // without stages: linear_few, which has no shared memory of the launch's
  int alignment;     // bytes by which x is copied

  constexpr bool few() const { return tile.stages == 0; }
  unsigned threads() const { return few() ? few::THREADS : tile.threads(); }
};

constexpr tiles::Tile few_tile(int rows, int tokens) {
  tiles::Tile tile{};
  tile.rows = tile.warp_rows = rows;
  tile.tokens = tile.warp_tokens = tokens;
  return tile;
}

#define SPARSE24_TILE(T, NAME, TILE, ALIGNMENT) \
  Kernel { "linear_" T "_" #NAME, tiles::TILE_##TILE, ALIGNMENT }
#define SPARSE24_FEW(T, ROWS, TOKENS) Kernel{"linear_few_" T "_" #ROWS "x" #TOKENS, few_tile(ROWS, TOKENS), 1}
#define SPARSE24_KERNELS(T)                                                                                           \
  std::array {                                                                                                        \
    SPARSE24_TILE(T, 64x64, 64x64, 16), SPARSE24_TILE(T, 64x128, 64x128, 16), SPARSE24_TILE(T, 128x128, 128x128, 16), \
        SPARSE24_TILE(T, 192x128, 192x128, 16), SPARSE24_TILE(T, 256x128, 256x128, 16),                               \
        SPARSE24_TILE(T, 192x256, 192x256, 16), SPARSE24_TILE(T, 64x64_by4, 64x64, 4),                                \
        SPARSE24_TILE(T, 64x64_by1, 64x64, 1), SPARSE24_FEW(T, 16, 8), SPARSE24_FEW(T, 32, 8),                        \
        SPARSE24_FEW(T, 32, 16), SPARSE24_FEW(T, 64, 16)                                                              \
  }
constexpr std::array F16_KERNELS = SPARSE24_KERNELS("f16");
constexpr std::array BF16_KERNELS = SPARSE24_KERNELS("bf16");
constexpr std::array S8_KERNELS = SPARSE24_KERNELS("s8");
#undef SPARSE24_KERNELS
#undef SPARSE24_FEW
#undef SPARSE24_TILE

std::span<const Kernel> kernels_of(Element element) {
  return element == Element::F16 ? F16_KERNELS : element == Element::BF16 ? BF16_KERNELS : S8_KERNELS;
}

const Kernel* find_kernel(Element element, std::string_view name) {
  for (const Kernel& kernel : kernels_of(element)) {
    if (kernel.name == name) return &kernel;
  }
  return nullptr;
}

// ---- A call in numbers ----

struct Shape {
  int bits;
  int64_t tokens, out_features, in_features, row_blocks, column_blocks;
  int alignment;  // of x

  explicit Shape(const Linear& call)
      : bits(element_bits(call.element)),
        tokens(call.epilogue.tokens),
        out_features(call.epilogue.out_features),
        in_features(call.in_features),
        row_blocks(packed::row_blocks(out_features)),
        column_blocks(packed::column_blocks(bits, in_features)) {
    // A lone row may have any stride. Copies are cut short at the end of a row.
    const uint64_t rows = reinterpret_cast<uintptr_t>(call.x) | (tokens > 1 ? call.x_stride * bits / 8 : 0);
    alignment = rows % 16 == 0 ? 16 : rows % 4 == 0 ? 4 : 1;
  }

  int64_t blocks(const Kernel& kernel) const {
    return divide_up(out_features, kernel.tile.rows) * divide_up(tokens, kernel.tile.tokens);
  }
};

bool runs(const Kernel& kernel, const Shape& shape, const Device& device) {
  if (kernel.few()) return shape.tokens <= kernel.tile.tokens;
  // A tile that would reach beyond W slides back, so W must be as tall as one.
  return shape.alignment >= kernel.alignment && shape.row_blocks * packed::BLOCK_ROWS >= kernel.tile.rows &&
         unsigned(kernel.tile.shared_bytes(shape.bits)) <= device.shared_bytes_per_block;
}

// Splits without an empty one among them; more than a device has multiprocessors would be of no use.
int64_t whole_splits(const Shape& shape, int64_t splits) {
  constexpr int64_t MAX_SPLITS = 1024;
  const int64_t blocks = divide_up(shape.column_blocks, std::clamp<int64_t>(splits, 1, MAX_SPLITS));
  return divide_up(shape.column_blocks, blocks);
}

Plan plan_of(const Kernel& kernel, const Shape& shape, int64_t splits) {
  return {kernel.name, static_cast<int>(splits), splits > 1 ? splits * shape.tokens * shape.out_features * 4 : 0};
}

// ---- The choice ----
//
// Costs in cycles of a multiprocessor: what the tensor cores, shared memory and L2 each need for a column block of a
// tile, the largest of the three; and of all that, no less than memory needs. Rates are an A100's, but for the tensor
// cores'. It ranks tiles and has not been measured.

constexpr int64_t SHARED_BYTES_PER_CYCLE = 128;
constexpr int64_t L2_BYTES_PER_CYCLE = 48;      // a multiprocessor's share
constexpr int64_t MEMORY_BYTES_PER_CYCLE = 10;  // the same
constexpr int64_t BLOCK_CYCLES = 2000;          // filling the pipeline, and the way of a tile of y to memory
constexpr int64_t REDUCE_CYCLES = 5000;         // a second launch
constexpr int64_t MIN_SPLIT_BLOCKS = 8;         // column blocks, so that a split is longer than what starts it

int64_t column_block_cycles(const tiles::Tile& tile, int bits, int sm) {
  // Four tensor cores, each an mma.sp of 16 rows, 8 tokens and one step of K in 8 cycles; in 16 on sm_86 and sm_89, by
  // the published peaks of their professional parts.
  const int64_t mma = sm == 86 || sm == 89 ? 16 : 8;
  const int64_t tensor = packed::STEPS * (tile.rows / 16) * (tile.tokens / 8) * mma / 4;
  const int64_t weight = tile.rows / packed::BLOCK_ROWS * packed::block_bytes(bits), x = tile.tokens * tiles::LINE;
  // Written once, and read by every warp: its rows and its tokens.
  const int64_t shared = weight * (1 + tile.tokens / tile.warp_tokens) + x * (1 + tile.rows / tile.warp_rows);
  return std::max({tensor, shared / SHARED_BYTES_PER_CYCLE, (weight + x) / L2_BYTES_PER_CYCLE});
}

// The busiest multiprocessor decides. Blocks that share one share its pipes: together they take as long as in a row.
int64_t cycles(const Kernel& kernel, const Shape& shape, const Device& device, int64_t splits) {
  const int64_t each =
      divide_up(shape.column_blocks, splits) * column_block_cycles(kernel.tile, shape.bits, device.sm) + BLOCK_CYCLES;
  const int64_t busiest = divide_up(shape.blocks(kernel) * splits, device.multiprocessors) * each;
  const int64_t operands = packed::bytes(shape.bits, shape.out_features, shape.in_features) +
                           shape.tokens * shape.in_features * shape.bits / 8;
  const int64_t product = std::max(busiest, operands / (device.multiprocessors * MEMORY_BYTES_PER_CYCLE));
  if (splits == 1) return product;
  const int64_t written_and_read = 2 * splits * shape.tokens * shape.out_features * 4;
  return product + REDUCE_CYCLES + written_and_read / (device.multiprocessors * L2_BYTES_PER_CYCLE);
}

Plan plan_few(const Shape& shape, Element element, const Device& device) {
  const int tokens = few::tile_tokens(static_cast<int>(shape.tokens));
  const int rows = few::tile_rows(static_cast<int>(shape.tokens), shape.out_features, device.multiprocessors);
  const int splits = few::splits(shape.bits, rows, shape.out_features, shape.in_features, device.multiprocessors);
  const std::span kernels = kernels_of(element);
  const Kernel& kernel = *std::ranges::find_if(
      kernels, [=](const Kernel& k) { return k.few() && k.tile.rows == rows && k.tile.tokens == tokens; });
  return plan_of(kernel, shape, whole_splits(shape, splits));
}

}  // namespace

Plan plan_linear(const Linear& call, const Device& device) {
  const Shape shape(call);
  if (shape.in_features == 0) return {"linear_reduce", 0, 0};
  if (shape.tokens <= few::MAX_TOKENS) return plan_few(shape, call.element, device);

  const Kernel* best = nullptr;
  int64_t best_splits = 1, best_cycles = 0;
  for (const Kernel& kernel : kernels_of(call.element)) {  // of equals the first
    if (kernel.few() || !runs(kernel, shape, device)) continue;
    // One wave at most: blocks as long as they can be, and a workspace of a tile for each multiprocessor, up to 29 MB.
    const int64_t most =
        std::min(device.multiprocessors / shape.blocks(kernel), shape.column_blocks / MIN_SPLIT_BLOCKS);
    for (const int64_t splits : {int64_t{1}, most > 1 ? whole_splits(shape, most) : 1}) {
      const int64_t needed = cycles(kernel, shape, device, splits);
      if (!best || needed < best_cycles) best = &kernel, best_splits = splits, best_cycles = needed;
    }
  }
  return plan_of(*best, shape, best_splits);
}

std::span<const char* const> linear_kernels(Element element) {
  const auto names = [](const auto& kernels) {
    std::array<const char*, std::tuple_size_v<std::decay_t<decltype(kernels)>>> out;
    std::ranges::transform(kernels, out.begin(), &Kernel::name);
    return out;
  };
  static const std::array f16 = names(F16_KERNELS), bf16 = names(BF16_KERNELS), s8 = names(S8_KERNELS);
  return element == Element::F16 ? f16 : element == Element::BF16 ? bf16 : s8;
}

std::optional<Plan> plan_linear_as(const Linear& call, const Device& device, const std::string& name, int splits) {
  const Shape shape(call);
  const Kernel* kernel = find_kernel(call.element, name);
  if (!kernel || shape.in_features == 0 || !runs(*kernel, shape, device)) return std::nullopt;
  return plan_of(*kernel, shape, whole_splits(shape, splits));
}

// ---- The launches ----

namespace {

int64_t number_bytes(Number number) {
  return number == Number::I8 ? 1 : number == Number::F16 || number == Number::BF16 ? 2 : 4;
}

// Bytes from the first entry of a matrix to the last.
int64_t span_bytes(int64_t rows, int64_t stride, int64_t columns, int64_t bytes) {
  return ((rows - 1) * stride + columns) * bytes;
}

// What the epilogue at `offset` of a launch's arguments reads and writes.
void add_ranges(Launch& launch, size_t offset, const Epilogue& epilogue) {
  const int64_t tokens = epilogue.tokens, features = epilogue.out_features;
  launch.writes(offset + offsetof(Epilogue, y), epilogue.y,
                span_bytes(tokens, epilogue.y_stride, features, number_bytes(epilogue.y_type)));
  launch.reads(offset + offsetof(Epilogue, bias), epilogue.bias, features * number_bytes(epilogue.bias_type));
  launch.reads(offset + offsetof(Epilogue, residual), epilogue.residual,
               span_bytes(tokens, epilogue.residual_stride, features, number_bytes(epilogue.residual_type)));
  launch.reads(offset + offsetof(Epilogue, scales), epilogue.scales, features * 4);
  launch.reads(offset + offsetof(Epilogue, x_scales), epilogue.x_scales, epilogue.x_scale_step ? tokens * 4 : 4);
  launch.reads(offset + offsetof(Epilogue, y_scale), epilogue.y_scale, 4);
}

Launch describe_product(const Linear& call, const Kernel& kernel, const Shape& shape, int splits, void* partial) {
  LinearArguments arguments{};
  arguments.packed = call.packed;
  arguments.x = call.x;
  arguments.x_stride = call.x_stride * shape.bits / 8;
  arguments.partial = partial;
  arguments.in_features = static_cast<int32_t>(shape.in_features);
  arguments.row_blocks = static_cast<int32_t>(shape.row_blocks);
  arguments.column_blocks = static_cast<int32_t>(shape.column_blocks);
  arguments.split_blocks = static_cast<int32_t>(divide_up(shape.column_blocks, splits));
  arguments.epilogue = call.epilogue;

  Launch launch;
  launch.module = kernel.few()                    ? &LINEAR_FEW_MODULE
                  : call.element == Element::F16  ? &LINEAR_F16_MODULE
                  : call.element == Element::BF16 ? &LINEAR_BF16_MODULE
                                                  : &LINEAR_S8_MODULE;
  launch.kernel = kernel.name;
  launch.grid = {static_cast<unsigned>(shape.blocks(kernel)), 1, static_cast<unsigned>(splits)};
  launch.block = {kernel.threads()};
  launch.shared_bytes = kernel.tile.shared_bytes(shape.bits);
  launch.pass(arguments);
  launch.reads(offsetof(LinearArguments, packed), call.packed,
               packed::bytes(shape.bits, shape.out_features, shape.in_features), 16);
  launch.reads(offsetof(LinearArguments, x), call.x,
               span_bytes(shape.tokens, call.x_stride, shape.in_features, shape.bits / 8), kernel.alignment);
  if (partial) {
    launch.writes(offsetof(LinearArguments, partial), partial, splits * shape.tokens * shape.out_features * 4, 16);
  } else {
    add_ranges(launch, offsetof(LinearArguments, epilogue), call.epilogue);
  }
  return launch;
}

Launch describe_reduce(const Linear& call, const Shape& shape, int splits, const void* partial) {
  ReduceArguments arguments{};
  arguments.partial = partial;
  arguments.splits = splits;
  arguments.epilogue = call.epilogue;

  Launch launch;
  launch.module = &LINEAR_REDUCE_MODULE;
  launch.kernel = call.element == Element::I8 ? "linear_reduce_i32" : "linear_reduce_f32";
  launch.block = {reduce::THREADS};
  launch.grid = {static_cast<unsigned>(divide_up(reduce::threads(shape.tokens, shape.out_features), reduce::THREADS))};
  launch.pass(arguments);
  launch.reads(offsetof(ReduceArguments, partial), partial, splits * shape.tokens * shape.out_features * 4, 16);
  add_ranges(launch, offsetof(ReduceArguments, epilogue), call.epilogue);
  return launch;
}

}  // namespace

void run_linear(const Machine& machine, const Linear& call, const Plan& plan, void* workspace) {
  const Shape shape(call);
  if (plan.splits > 0) {
    void* const partial = plan.splits > 1 ? workspace : nullptr;
    machine.run(describe_product(call, *find_kernel(call.element, plan.kernel), shape, plan.splits, partial));
  }
  if (plan.splits != 1) machine.run(describe_reduce(call, shape, plan.splits, workspace));
}

}  // namespace sparse24::cuda
