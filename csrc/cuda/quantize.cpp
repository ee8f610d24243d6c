// The launch of kernels/quantize.cu.
#include "kernels/quantize.cuh"

#include "csrc/cuda/linear.h"

namespace sparse24::cuda {

Launch describe_quantize(const void* x, int64_t x_stride, Element x_element, int64_t tokens, int64_t in_features,
                         int8_t* q, int64_t q_stride, float* scales) {
  const int bytes = element_bits(x_element) / 8;
  QuantizeArguments arguments{};
  arguments.x = x;
  arguments.x_stride = x_stride;
  arguments.q = q;
  arguments.q_stride = q_stride;
  arguments.scales = scales;
  arguments.x_type = x_element == Element::F32 ? Number::F32 : x_element == Element::F16 ? Number::F16 : Number::BF16;
  arguments.in_features = static_cast<int32_t>(in_features);
  arguments.tokens = static_cast<int32_t>(tokens);

  Launch launch;
  launch.module = &QUANTIZE_MODULE;
  launch.kernel = "quantize_rows";
  launch.grid = {static_cast<unsigned>(tokens)};
  launch.block = {quantize::THREADS};
  launch.pass(arguments);
  launch.reads(offsetof(QuantizeArguments, x), x, ((tokens - 1) * x_stride + in_features) * bytes, bytes);
  launch.writes(offsetof(QuantizeArguments, q), q, tokens * q_stride, 16);
  launch.writes(offsetof(QuantizeArguments, scales), scales, tokens * 4, 4);
  return launch;
}

}  // namespace sparse24::cuda
