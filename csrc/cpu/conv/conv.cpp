// conv2d() and the packed form of its weight (conv.h).
#include "csrc/cpu/conv/conv.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

#include "csrc/cpu/isa.h"
#include "csrc/cpu/parallel.h"
#include "csrc/cpu/quantize.h"
#include "csrc/cpu/transpose.h"

namespace sparse24::cpu {

namespace {

// ---- The packed form: that of linear, whose rows of meta have no unused nibble after each segment ----

int nibble_at(const uint8_t* meta, int64_t group) { return meta[group / 2] >> group % 2 * 4 & 15; }
void set_nibble(uint8_t* meta, int64_t group, int code) {
  meta[group / 2] = static_cast<uint8_t>((group % 2 == 0 ? 0 : meta[group / 2]) | code << group % 2 * 4);
}

// Calls move(byte row of canonical meta, its group, row of linear meta, its group) for each group of each segment, in
// order.
template <class Move>
void for_each_code(const ConvWeight& weight, const Move& move) {
  const int64_t segments = weight.kernel_height * weight.kernel_width;
  const int64_t groups = group_count(pattern_of(weight.element), weight.group_channels);
  parallel_for(0, weight.out_channels, 16, [&](int64_t first, int64_t last) {
    for (int64_t o = first; o < last; ++o) {
      for (int64_t segment = 0; segment < segments; ++segment) {
        for (int64_t group = 0; group < groups; ++group) {
          move(o * segments + segment, group, o, segment * groups + group);
        }
      }
    }
  });
}

// The weight of one group of the convolution, as linear has it.
struct GroupWeight {
  int64_t rows, in_features, values_bytes, meta_bytes, packed_bytes;

  explicit GroupWeight(const ConvWeight& weight) : rows(weight.out_channels / weight.groups) {
    const Pattern pattern = pattern_of(weight.element);
    in_features = weight.in_features();
    values_bytes = rows * values_row_bytes(pattern, weight.element, in_features);
    meta_bytes = rows * meta_row_bytes(pattern, in_features);
    packed_bytes = cpu::packed_bytes(weight.element, rows, in_features);
  }
};

}  // namespace

void pack(const ConvWeight& weight, const void* values, const uint8_t* meta, uint8_t* packed) {
  const GroupWeight one(weight);
  const int64_t segment_bytes = meta_row_bytes(pattern_of(weight.element), weight.group_channels);
  const int64_t row_bytes = one.rows ? one.meta_bytes / one.rows : 0;
  std::vector<uint8_t> linear_meta(one.meta_bytes * weight.groups);
  for_each_code(weight, [&](int64_t segment, int64_t group, int64_t row, int64_t linear_group) {
    set_nibble(linear_meta.data() + row * row_bytes, linear_group, nibble_at(meta + segment * segment_bytes, group));
  });
  for (int64_t group = 0; group < weight.groups; ++group) {
    pack(static_cast<const uint8_t*>(values) + group * one.values_bytes, linear_meta.data() + group * one.meta_bytes,
         weight.element, one.rows, one.in_features, packed + group * one.packed_bytes);
  }
}

void unpack(const ConvWeight& weight, const uint8_t* packed, void* values, uint8_t* meta) {
  const GroupWeight one(weight);
  const int64_t segment_bytes = meta_row_bytes(pattern_of(weight.element), weight.group_channels);
  const int64_t row_bytes = one.rows ? one.meta_bytes / one.rows : 0;
  std::vector<uint8_t> linear_meta(one.meta_bytes * weight.groups);
  for (int64_t group = 0; group < weight.groups; ++group) {
    unpack(packed + group * one.packed_bytes, weight.element, one.rows, one.in_features,
           static_cast<uint8_t*>(values) + group * one.values_bytes, linear_meta.data() + group * one.meta_bytes);
  }
  for_each_code(weight, [&](int64_t segment, int64_t group, int64_t row, int64_t linear_group) {
    set_nibble(meta + segment * segment_bytes, group, nibble_at(linear_meta.data() + row * row_bytes, linear_group));
  });
}

namespace {

// ---- Rows of x: one output pixel's, of one group ----

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The positions of a kernel of `size` that fall within an image, for the output at `out`: [first, last).
struct Inside {
  int64_t origin, first, last;

  Inside(int64_t out, int64_t stride, int64_t padding, int64_t dilation, int64_t size, int64_t extent)
      : origin(out * stride - padding) {
    first = std::clamp<int64_t>(divide_up(std::max<int64_t>(-origin, 0), dilation), 0, size);
    last = std::clamp<int64_t>(divide_up(std::max<int64_t>(extent - origin, 0), dilation), first, size);
  }
};

// The rows of x of one group, as the segments of RowSource: the channels of one kernel position, or, where those do not
// fill 64-byte units of a panel, all of a row, put together in scratch.
struct Patches {
  const Conv2d& call;
  const uint8_t* x;  // from the first channel of the group on
  int64_t bytes;     // of an element
  const uint8_t* zeros;

  struct Pixel {
    int64_t image, row, column;  // of y
  };
  Pixel pixel(int64_t token) const {
    const int64_t row = token / call.out_width;
    return {row / call.out_height, row % call.out_height, token % call.out_width};
  }
  void advance(Pixel& at) const {
    if (++at.column < call.out_width) return;
    at.column = 0;
    if (++at.row < call.out_height) return;
    at.row = 0, ++at.image;
  }
  const uint8_t* at(int64_t image, int64_t row, int64_t column) const {
    return x + (image * call.image_stride + row * call.row_stride + column * call.column_stride) * bytes;
  }

  // The channels at kernel position (r, s); zeros outside the image.
  void find_position(int64_t token, int count, int64_t position, const void** rows) const {
    const int64_t kernel_width = call.weight.kernel_width;
    const int64_t down = position / kernel_width * call.dilation_height - call.padding_height;
    const int64_t right = position % kernel_width * call.dilation_width - call.padding_width;
    Pixel out = pixel(token);
    for (int i = 0; i < count; ++i, advance(out)) {
      const int64_t row = out.row * call.stride_height + down, column = out.column * call.stride_width + right;
      const bool inside = row >= 0 && row < call.height && column >= 0 && column < call.width;
      rows[i] = inside ? at(out.image, row, column) : zeros;
    }
  }

  void write_row(const Pixel& out, uint8_t* scratch) const {
    const ConvWeight& weight = call.weight;
    const Inside rows(out.row, call.stride_height, call.padding_height, call.dilation_height, weight.kernel_height,
                      call.height);
    const Inside columns(out.column, call.stride_width, call.padding_width, call.dilation_width, weight.kernel_width,
                         call.width);
    const int64_t channels = weight.group_channels * bytes, segment = weight.segment() * bytes;
    for (int64_t r = 0; r < weight.kernel_height; ++r) {
      uint8_t* to = scratch + r * weight.kernel_width * segment;
      const bool inside = r >= rows.first && r < rows.last;
      for (int64_t s = 0; s < weight.kernel_width; ++s, to += segment) {
        if (!inside || s < columns.first || s >= columns.last) {
          std::memset(to, 0, segment);
          continue;
        }
        std::memcpy(to, at(out.image, rows.origin + r * call.dilation_height, columns.origin + s * call.dilation_width),
                    channels);
        std::memset(to + channels, 0, segment - channels);
      }
    }
  }

  void write_rows(int64_t token, int count, uint8_t* scratch, const void** rows) const {
    Pixel out = pixel(token);
    const int64_t row_bytes = call.weight.in_features() * bytes;
    for (int i = 0; i < count; ++i, advance(out))
      write_row(out, scratch + i * row_bytes), rows[i] = scratch + i * row_bytes;
  }
};

int number_bytes(Number number) { return number == Number::I32 ? 4 : element_bits(static_cast<Element>(number)) / 8; }

// The part of an epilogue from output channel `first` on, channels of y being `plane` elements apart.
Epilogue from_channel(Epilogue epilogue, int64_t first, int64_t count, int64_t plane) {
  const auto advance = [&](const void* array, Number type) -> const void* {
    return array ? static_cast<const uint8_t*>(array) + first * number_bytes(type) : nullptr;
  };
  epilogue.y = static_cast<uint8_t*>(epilogue.y) + first * plane * number_bytes(epilogue.y_type);
  epilogue.bias = advance(epilogue.bias, epilogue.bias_type);
  epilogue.residual = advance(epilogue.residual, epilogue.residual_type);
  if (epilogue.scales) epilogue.scales += first;
  epilogue.out_features = static_cast<int32_t>(count);
  return epilogue;
}

// Columns that fill 64 bytes of a panel of x, whichever kernels make it.
int64_t unit_columns(const Conv2d& call) {
  if (call.x_element == Element::I8) return 64;
  return call.weight.element == Element::BF16 || (call.weight_only && call.x_element == Element::BF16) ? 32 : 16;
}

// Whether pixels of y are pixels of x, in order and evenly apart: column_stride.
bool is_pointwise(const Conv2d& call) {
  const ConvWeight& weight = call.weight;
  const bool alone = weight.kernel_height == 1 && weight.kernel_width == 1 && call.stride_height == 1 &&
                     call.stride_width == 1 && call.padding_height == 0 && call.padding_width == 0;
  const int64_t row = call.width * call.column_stride;
  return alone && call.channel_stride == 1 && (call.height == 1 || call.row_stride == row) &&
         (call.images <= 1 || call.image_stride == call.height * row);
}

bool quantizes_x(const Conv2d& call) { return is_integer(call.weight.element) && !call.weight_only; }

// The product of one group.
Linear product_of(const Conv2d& call, int64_t group) {
  const ConvWeight& weight = call.weight;
  const GroupWeight one(weight);
  const bool positions = weight.kernel_height * weight.kernel_width > 1;
  const int64_t plane = call.y_planes ? call.out_height * call.out_width : 0;
  const auto x = static_cast<const uint8_t*>(call.x);
  return {.x = x + group * weight.group_channels * element_bits(call.x_element) / 8,
          .x_stride = call.column_stride,
          .x_element = call.x_element,
          .packed = call.packed + group * one.packed_bytes,
          .weight = weight.element,
          .weight_only = call.weight_only,
          // A kernel of one position reads the channels themselves, which no segment fills up.
          .in_features = positions ? one.in_features : weight.group_channels,
          .epilogue = from_channel(call.epilogue, group * one.rows, one.rows, plane ? plane : 1),
          .plane = plane};
}

void multiply(const Conv2d& call) {
  const ConvWeight& weight = call.weight;
  const int64_t bytes = element_bits(call.x_element) / 8, positions = weight.kernel_height * weight.kernel_width;
  const bool by_position = positions == 1 || weight.group_channels % unit_columns(call) == 0;
  const std::vector<uint8_t> zeros(weight.group_channels * bytes);
  for (int64_t group = 0; group < weight.groups; ++group) {
    const Linear product = product_of(call, group);
    if (is_pointwise(call)) {
      linear(product);
      continue;
    }
    const Patches patches{call, static_cast<const uint8_t*>(product.x), bytes, zeros.data()};
    RowSource source{nullptr, &patches, 1, product.in_features, 0};
    if (by_position) {
      source.segments = positions, source.segment_features = weight.group_channels;
      source.find = [](const void* context, int64_t token, int count, int64_t segment, uint8_t*, const void** rows) {
        static_cast<const Patches*>(context)->find_position(token, count, segment, rows);
      };
    } else {
      source.scratch_bytes = product.in_features * bytes;
      source.find = [](const void* context, int64_t token, int count, int64_t, uint8_t* scratch, const void** rows) {
        static_cast<const Patches*>(context)->write_rows(token, count, scratch, rows);
      };
    }
    linear(product, source);
  }
}

// A float x as int8 [images, height, width, channels], and the scale of each image.
void quantize_images(const Conv2d& call, int8_t* q, float* scales) {
  const Quantizer& run = quantizer();
  const int64_t channels = call.weight.group_channels * call.weight.groups, bytes = element_bits(call.x_element) / 8;
  const bool adjacent = call.column_stride == channels;
  const int64_t runs = adjacent ? 1 : call.width, run_length = adjacent ? call.width * channels : channels;
  const auto run_at = [&](int64_t row, int64_t i) {
    return static_cast<const uint8_t*>(call.x) +
           (row / call.height * call.image_stride + row % call.height * call.row_stride + i * call.column_stride) *
               bytes;
  };
  const int64_t rows = call.images * call.height, grain = 16384 / (call.width * channels + 1) + 1;

  std::vector<std::atomic<uint32_t>> largest(call.images);
  parallel_for(0, rows, grain, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      uint32_t bits = 0;
      for (int64_t i = 0; i < runs; ++i) bits = std::max(bits, run.largest(run_at(row, i), call.x_element, run_length));
      std::atomic<uint32_t>& all = largest[row / call.height];
      uint32_t before = all.load(std::memory_order_relaxed);
      while (before < bits && !all.compare_exchange_weak(before, bits, std::memory_order_relaxed)) {
      }
    }
  });
  for (int64_t image = 0; image < call.images; ++image) scales[image] = scale_of(largest[image]);
  parallel_for(0, rows, grain, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      for (int64_t i = 0; i < runs; ++i) {
        run.quantize(run_at(row, i), call.x_element, run_length, scales[row / call.height],
                     q + (row * call.width + i) * channels);
      }
    }
  });
}

// x as [images, height, width, channels].
std::unique_ptr<uint8_t[]> channels_last(const Conv2d& call) {
  const Transpose transpose = transposition();
  const int64_t channels = call.weight.group_channels * call.weight.groups, bytes = element_bits(call.x_element) / 8;
  std::unique_ptr<uint8_t[]> copy(new uint8_t[call.images * call.height * call.width * channels * bytes]);
  // A run of pixels at a time; all of an image's rows are one where they lie side by side.
  const bool adjacent = call.row_stride == call.width;
  constexpr int64_t RUN = 64;
  const int64_t rows = adjacent ? 1 : call.height, row_length = adjacent ? call.height * call.width : call.width;
  const int64_t runs = divide_up(row_length, RUN);
  const auto x = static_cast<const uint8_t*>(call.x);
  parallel_for(0, call.images * rows * runs, 16384 / (RUN * channels) + 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t image = i / (rows * runs), row = i / runs % rows, begin = i % runs * RUN;
      transpose(x + (image * call.image_stride + row * call.row_stride + begin) * bytes, call.channel_stride,
                copy.get() + ((image * rows + row) * row_length + begin) * channels * bytes, channels, channels,
                std::min(RUN, row_length - begin), static_cast<int>(bytes));
    }
  });
  return copy;
}

}  // namespace

std::optional<Linear> as_linear(const Conv2d& call) {
  if (call.weight.groups != 1 || quantizes_x(call) || !is_pointwise(call)) return std::nullopt;
  return product_of(call, 0);
}

void conv2d(const Conv2d& given) {
  Conv2d call = given;
  std::unique_ptr<uint8_t[]> copy;
  if (call.channel_stride != 1) {
    copy = channels_last(call);
    call.x = copy.get(), call.channel_stride = 1;
    call.column_stride = call.weight.group_channels * call.weight.groups;
    call.row_stride = call.width * call.column_stride, call.image_stride = call.height * call.row_stride;
  }
  if (!quantizes_x(call)) return multiply(call);

  // The product wants a scale for each token.
  Conv2d whole = call;
  const int64_t pixels = call.out_height * call.out_width, channels = call.weight.group_channels * call.weight.groups;
  std::vector<float> image_scales(call.images),
      x_scales(call.epilogue.x_scales || call.x_element != Element::I8 ? call.images * pixels : 0);
  std::unique_ptr<int8_t[]> q;
  if (call.x_element != Element::I8) {
    q.reset(new int8_t[call.images * call.height * call.width * channels]);
    quantize_images(call, q.get(), image_scales.data());
    whole.x = q.get(), whole.x_element = Element::I8;
    whole.column_stride = channels, whole.row_stride = call.width * channels;
    whole.image_stride = call.height * whole.row_stride;
  } else if (call.epilogue.x_scales) {
    for (int64_t image = 0; image < call.images; ++image) {
      image_scales[image] = call.epilogue.x_scales[image * call.epilogue.x_scale_step];
    }
  }
  for (size_t token = 0; token < x_scales.size(); ++token) x_scales[token] = image_scales[token / pixels];
  whole.epilogue.x_scales = x_scales.empty() ? nullptr : x_scales.data();
  whole.epilogue.x_scale_step = 1;
  multiply(whole);
}

}  // namespace sparse24::cpu
