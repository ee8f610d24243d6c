// y = epilogue(conv2d(x, W)) on the CPU: an implicit GEMM over the linear kernels. No torch.
//
// A conv weight [O, C / groups, R, S] is a linear weight of O rows and R * S segments of columns, a segment being the
// C / groups channels of one kernel position filled up to whole groups of the pattern (four channels; pair 4:8: eight).
// Each output pixel is a token; its row of x is gathered from the image when a panel is packed, so that nothing like an
// unfolded x ever lies in memory. Groups of the convolution are products of their own.
#pragma once
#include <optional>

#include "csrc/cpu/linear/linear.h"

namespace sparse24::cpu {

struct ConvWeight {
  Element element;
  int64_t out_channels;    // O
  int64_t group_channels;  // C / groups
  int64_t kernel_height, kernel_width;
  int64_t groups;

  int64_t segment() const {  // columns
    const Pattern pattern = pattern_of(element);
    return group_count(pattern, group_channels) * group_columns(pattern);
  }
  int64_t in_features() const { return kernel_height * kernel_width * segment(); }
  int64_t packed_bytes() const { return groups * cpu::packed_bytes(element, out_channels / groups, in_features()); }
};

// Canonical (values [O, R, S, slots], meta [O, R, S, ceil(groups of a segment / 2)]) <-> packed, exact both ways.
void pack(const ConvWeight& weight, const void* values, const uint8_t* meta, uint8_t* packed);
void unpack(const ConvWeight& weight, const uint8_t* packed, void* values, uint8_t* meta);

struct Conv2d {
  ConvWeight weight;
  const uint8_t* packed;
  bool weight_only;
  const void* x;  // [images, height, width, channels]
  Element x_element;
  // Elements. Channels lie side by side, or, where channel_stride is not 1, rows do, each side by side: then x is
  // copied to channels last first.
  int64_t image_stride, row_stride, column_stride, channel_stride;
  int64_t images, height, width;
  int64_t stride_height, stride_width, padding_height, padding_width, dilation_height, dilation_width;
  int64_t out_height, out_width;
  bool y_planes;      // y [images][O][out_height][out_width], else [images][out_height][out_width][O]; O = y_stride
  Epilogue epilogue;  // tokens = images * out_height * out_width, out_features = O; x_scales are [images]
};

// I8 and I4 weights, unless weight_only: a float x is quantised image by image: s = amax / 127 over the image (1 where
// that is 0), q as for linear(). An image that is not finite gives NaN. Padding is 0. The rest is as linear() says.
void conv2d(const Conv2d& call);

// The one product that the convolution is where pixels of x are its rows as they lie: kernels of one position, stride 1
// and no padding, one group, and no x to be quantised image by image.
std::optional<Linear> as_linear(const Conv2d& call);

}  // namespace sparse24::cpu
