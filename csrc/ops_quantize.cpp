// The operator that rounds activations to int8 by a scale that is known beforehand (sparse24/ops.py).
#include <torch/csrc/stable/library.h>

#include "csrc/cpu/parallel.h"
#include "csrc/cpu/quantize.h"
#include "csrc/operands.h"

namespace sparse24::ops {
namespace {

constexpr int64_t GRAIN = 16384;  // numbers a thread, at least

Tensor quantize(const Tensor& x, const Tensor& scale) {
  REQUIRE(is_float(x.scalar_type()), "x must be float32, float16 or bfloat16");
  REQUIRE(scale.scalar_type() == ScalarType::Float && scale.numel() == 1, "scale must be one float32 number; got ",
          shape_of(scale));
  const float divisor = *static_cast<const float*>(scale.const_data_ptr());
  REQUIRE(divisor > 0 && divisor <= std::numeric_limits<float>::max(), "scale must be a positive finite number; got ",
          divisor);

  const Tensor whole = torch::stable::contiguous(x);
  Tensor q = empty_like_device(x, std::vector<int64_t>(x.sizes().begin(), x.sizes().end()), ScalarType::Char);
  const Element element = element_of("x", x.scalar_type());
  const int64_t bytes = static_cast<int64_t>(x.element_size());
  const auto from = static_cast<const uint8_t*>(whole.const_data_ptr());
  const auto to = static_cast<int8_t*>(q.mutable_data_ptr());
  const cpu::Quantizer& run = cpu::quantizer();
  cpu::parallel_for(0, x.numel(), GRAIN, [&](int64_t first, int64_t last) {
    run.quantize(from + first * bytes, element, last - first, divisor, to + first);
  });
  return q;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparse24, CPU, m) { m.impl("quantize", TORCH_BOX(&quantize)); }

}  // namespace sparse24::ops
