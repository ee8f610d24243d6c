// The dense hand-over: for each batch of tokens, for each panel of rows of W
//
//   decompress the panel                                        in parallel over blocks of 16 rows
//   sums = x panel^T                                            aten's mm
//   y = epilogue(sums)                                          in parallel over tokens
//
// With scale groups the sums are made group by group, and their totals finished. Where y is x panel^T with at most a
// bias, aten writes it in place, all tokens at once.
#include "csrc/ops_dense.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <memory>
#include <new>
#include <string_view>

#include "csrc/arguments.h"
#include "csrc/cpu/linear/linear_dense.h"
#include "csrc/cpu/parallel.h"

namespace sparse24 {
namespace {

using cpu::BLOCK_ROWS;

// Decompressed W at one time: wide enough for mm, and bounded. x and sums of a batch of tokens are as large, but for a
// very long row; decompression is done anew for each batch, so one is not short.
constexpr int64_t PANEL_BYTES = 4 << 20;
constexpr int64_t BATCH_BYTES = 16 << 20;
constexpr int64_t MIN_BATCH_TOKENS = 256;

// Filled up so that rows of a panel do not all start in the same set of the cache.
constexpr int64_t ROW_GAP_BYTES = 64;

struct Free {
  void operator()(uint8_t* memory) const { ::operator delete[](memory, std::align_val_t{64}); }
};
using Memory = std::unique_ptr<uint8_t[], Free>;
Memory allocate(int64_t bytes) {
  return Memory(static_cast<uint8_t*>(::operator new[](bytes + 64, std::align_val_t{64})));
}

Tensor matrix(const void* data, int64_t rows, int64_t columns, int64_t stride, ScalarType type) {
  return torch::stable::from_blob(const_cast<void*>(data), {rows, columns}, {stride, 1},
                                  {torch::headeronly::DeviceType::CPU, 0}, type);
}

// The same, transposed.
Tensor transposed(const void* data, int64_t rows, int64_t columns, int64_t stride, ScalarType type) {
  return torch::stable::from_blob(const_cast<void*>(data), {columns, rows}, {1, stride},
                                  {torch::headeronly::DeviceType::CPU, 0}, type);
}

// What a dense product of a call multiplies and sums in.
struct Types {
  Element element;  // of x and of decompressed W
  Number sum;

  explicit Types(const cpu::Linear& call) : element(Element::F32), sum(Number::F32) {
    const bool quantized = cpu::is_integer(call.weight) && !call.weight_only;
    if (quantized) {
      sum = Number::I32;
      if (cpu::has_exact_int8_product()) element = Element::I8;
    } else if (call.weight == Element::BF16 && call.x_element == Element::BF16 &&
               call.epilogue.y_type == Number::BF16 && cpu::has_bf16_product()) {
      element = Element::BF16, sum = Number::BF16;
    }
  }
};

class DenseProduct {
 public:
  explicit DenseProduct(const cpu::Linear& call)
      : call_(call),
        types_(call),
        columns_(cpu::dense_columns(call)),
        blocks_(cpu::block_count(call.epilogue.out_features)) {
    const int64_t element_bytes = element_bits(types_.element) / 8;
    w_stride_ = columns_ + ROW_GAP_BYTES / element_bytes;
    panel_blocks_ = std::clamp<int64_t>(PANEL_BYTES / (BLOCK_ROWS * w_stride_ * element_bytes), 1, blocks_);
    direct_ = writes_y();
    batch_tokens_ =
        direct_ ? call.epilogue.tokens : BATCH_BYTES / (columns_ * element_bytes + panel_blocks_ * BLOCK_ROWS * 4);
    batch_tokens_ = std::min<int64_t>(std::max(batch_tokens_, MIN_BATCH_TOKENS), call.epilogue.tokens);
    w_ = allocate(panel_blocks_ * BLOCK_ROWS * w_stride_ * element_bytes);
    if (!direct_) sums_ = allocate(batch_tokens_ * panel_blocks_ * BLOCK_ROWS * 4);
    if (call.group_size) totals_ = allocate(batch_tokens_ * panel_blocks_ * BLOCK_ROWS * 4);
    if (in_slices()) slice_ = allocate(batch_tokens_ * panel_blocks_ * BLOCK_ROWS * 4);
    if (!x_in_place()) {
      x_ = allocate(batch_tokens_ * columns_ * element_bytes);
      x_scales_ = std::make_unique<float[]>(batch_tokens_);
    }
    // A bias that mm adds before it rounds is not added again.
    if (direct_ || (types_.sum == Number::BF16 && call_.epilogue.bias_type == Number::BF16)) {
      bias_ = static_cast<const uint8_t*>(call_.epilogue.bias);
      call_.epilogue.bias = nullptr;
    }
  }

  void run() {
    for (int64_t first = 0; first < call_.epilogue.tokens; first += batch_tokens_) {
      const int64_t last = std::min<int64_t>(first + batch_tokens_, call_.epilogue.tokens);
      if (!x_in_place()) cpu::prepare_x(call_, first, last, types_.element, x_.get(), x_scales_.get());
      for (int64_t block = 0; block < blocks_; block += panel_blocks_) {
        const int64_t end = std::min(block + panel_blocks_, blocks_);
        decode(block, end);
        if (call_.group_size) {
          multiply_groups(first, last, block, end);
        } else {
          multiply(first, last, block, end, 0, call_.in_features);
        }
        if (direct_) continue;
        cpu::finish_dense(call_, first, last, block, end, call_.group_size ? Number::F32 : types_.sum,
                          call_.group_size ? totals_.get() : sums_.get(), (end - block) * BLOCK_ROWS, x_scales_.get());
      }
    }
  }

 private:
  bool x_in_place() const {
    return types_.element == call_.x_element && !(cpu::is_integer(call_.weight) && !call_.weight_only) &&
           call_.weight == call_.x_element;
  }
  bool writes_y() const {
    const Epilogue& epilogue = call_.epilogue;
    return x_in_place() && epilogue.y_type == types_.sum && call_.plane == 0 && !epilogue.residual &&
           !epilogue.scales && epilogue.activation == Activation::NONE &&
           (!epilogue.bias || epilogue.bias_type == types_.sum);
  }
  bool in_slices() const { return types_.sum == Number::I32 && types_.element == Element::F32; }

  void decode(int64_t first_block, int64_t last_block) {
    const cpu::DenseDecode& decode = cpu::dense_decode();
    constexpr int64_t GRAIN_ELEMENTS = 32768;
    cpu::parallel_for(first_block, last_block, GRAIN_ELEMENTS / (BLOCK_ROWS * columns_) + 1,
                      [&](int64_t begin, int64_t end) {
                        for (int64_t block = begin; block < end; ++block) {
                          const int64_t at = (block - first_block) * BLOCK_ROWS * w_stride_;
                          if (types_.element == Element::F32) {
                            decode.floats(call_, block, reinterpret_cast<float*>(w_.get()) + at, w_stride_);
                          } else if (types_.element == Element::BF16) {
                            decode.bf16(call_, block, reinterpret_cast<uint16_t*>(w_.get()) + at, w_stride_);
                          } else {
                            decode.int8(call_, block, reinterpret_cast<int8_t*>(w_.get()) + at, w_stride_);
                          }
                        }
                      });
  }

  // totals [tokens, rows of the panel] of one batch and one panel.
  void multiply_groups(int64_t first, int64_t last, int64_t first_block, int64_t last_block) {
    const Epilogue& epilogue = call_.epilogue;
    const int64_t rows = (last_block - first_block) * BLOCK_ROWS, column = first_block * BLOCK_ROWS;
    const int64_t present = std::min<int64_t>(rows, epilogue.out_features - column);
    const auto totals = reinterpret_cast<float*>(totals_.get());
    std::fill_n(totals, (last - first) * rows, 0.0f);
    for (int64_t group = 0; group < cpu::scale_groups(call_.in_features, call_.group_size); ++group) {
      const int64_t begin = group * call_.group_size;
      multiply(first, last, first_block, last_block, begin, std::min(begin + call_.group_size, call_.in_features));
      const float* const scales = epilogue.scales + group * epilogue.out_features + column;
      const auto add = [&](const auto* sums) {
        cpu::parallel_for(0, last - first, 65536 / rows + 1, [&](int64_t from, int64_t to) {
          for (int64_t token = from; token < to; ++token) {
            for (int64_t n = 0; n < present; ++n) {
              totals[token * rows + n] += static_cast<float>(sums[token * rows + n]) * scales[n];
            }
          }
        });
      };
      if (types_.sum == Number::I32) {
        add(reinterpret_cast<const int32_t*>(sums_.get()));
      } else {
        add(reinterpret_cast<const float*>(sums_.get()));
      }
    }
  }

  // sums [tokens, rows of the panel] of one batch and one panel, of columns [begin, end), or that part of y.
  void multiply(int64_t first, int64_t last, int64_t first_block, int64_t last_block, int64_t begin, int64_t end) {
    const int64_t tokens = last - first, column = first_block * BLOCK_ROWS;
    int64_t rows = (last_block - first_block) * BLOCK_ROWS, stride = rows;
    const int64_t width = end - begin, element_bytes = element_bits(types_.element) / 8;
    const ScalarType type = storage_of(types_.element);
    const int64_t x_stride = x_in_place() ? call_.x_stride : columns_;
    const uint8_t* const x =
        (x_in_place() ? static_cast<const uint8_t*>(call_.x) + first * x_stride * element_bytes : x_.get()) +
        begin * element_bytes;
    const uint8_t* const w = w_.get() + begin * element_bytes;
    if (in_slices()) return multiply_in_slices(tokens, rows, begin, end);
    const int64_t present = std::min<int64_t>(rows, call_.epilogue.out_features - column);
    void* sums = sums_.get();
    if (direct_) {
      rows = present, stride = call_.epilogue.y_stride;
      sums = static_cast<uint8_t*>(call_.epilogue.y) + column * element_bytes;
    }
    const Tensor a = matrix(x, tokens, width, x_stride, type);
    const Tensor b = transposed(w, rows, width, w_stride_, type);
    if (types_.element == Element::I8) {
      const Tensor out = matrix(sums, tokens, rows, stride, ScalarType::Int);
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__int_mm_out(out.get(), a.get(), b.get()));
      return;
    }
    const Tensor out = matrix(sums, tokens, rows, stride, type);
    if (!bias_) {
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
      return;
    }
    const auto bias = std::make_unique<uint8_t[]>(rows * element_bytes);  // zeros where W has no more rows
    std::copy_n(bias_ + column * element_bytes, present * element_bytes, bias.get());
    const Tensor self =
        torch::stable::from_blob(bias.get(), {rows}, {1}, {torch::headeronly::DeviceType::CPU, 0}, type);
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), self.get(), a.get(), b.get(), 1, 1));
  }

  // Products of integers in floats: as many columns at a time as keep every sum exact.
  void multiply_in_slices(int64_t tokens, int64_t rows, int64_t begin, int64_t end) {
    const auto x = reinterpret_cast<const float*>(x_.get());
    const auto w = reinterpret_cast<const float*>(w_.get());
    const auto part = reinterpret_cast<const float*>(slice_.get());
    const auto sums = reinterpret_cast<int32_t*>(sums_.get());
    const Tensor out = matrix(part, tokens, rows, rows, ScalarType::Float);
    for (int64_t k = begin; k < end; k += cpu::EXACT_COLUMNS) {
      const int64_t width = std::min(cpu::EXACT_COLUMNS, end - k);
      const Tensor a = matrix(x + k, tokens, width, columns_, ScalarType::Float);
      const Tensor b = transposed(w + k, rows, width, w_stride_, ScalarType::Float);
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
      cpu::parallel_for(0, tokens * rows, 65536, [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) sums[i] = (k == begin ? 0 : sums[i]) + static_cast<int32_t>(part[i]);
      });
    }
  }

  cpu::Linear call_;
  Types types_;
  int64_t columns_, blocks_;  // of W, filled up
  int64_t w_stride_, panel_blocks_, batch_tokens_;
  Memory w_, x_, sums_, slice_, totals_;
  std::unique_ptr<float[]> x_scales_;
  bool direct_;
  const uint8_t* bias_ = nullptr;  // of the type of the sums, where aten adds it
};

}  // namespace

void linear_by_choice(const cpu::Linear& call) {
  const Epilogue& epilogue = call.epilogue;
  const cpu::Choice choice = cpu::choose(call.weight, call.weight_only, call.x_element, epilogue.tokens,
                                         epilogue.out_features, call.in_features);
  const bool empty = epilogue.tokens <= 0 || epilogue.out_features <= 0 || call.in_features <= 0;
  const bool quantized = cpu::is_integer(call.weight) && !call.weight_only;
  if (choice.kernels != std::string_view("dense") || empty || !(quantized || cpu::all_finite(call))) {
    return cpu::linear(call);
  }
  DenseProduct(call).run();
}

}  // namespace sparse24
