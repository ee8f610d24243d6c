// csrc/cpu/conv/conv.h on every instruction set of this machine, against plain loops. Whole numbers, so that every sum
// is exact. x ends at an inaccessible page, and what is not of the image is NaN; y is watched on both sides.
#include <cmath>
#include <vector>

#include "csrc/cpu/conv/conv.h"
#include "csrc/cpu/quantize.h"
#include "csrc/cpu/transpose.h"
#include "tests/native/linear_problem.h"

using namespace sparse24;
using namespace sparse24::test;
using cpu::Conv2d;
using cpu::ConvWeight;

namespace {

// One convolution of random geometry; W dense [O][R][S][C of a group], zero where it is dropped. One in three has a
// kernel of one position, mostly with stride 1 and no padding: there rows of x are read as they lie.
struct Case {
  Weight weight;
  bool point;
  Element x_element;
  ConvWeight geometry;
  Conv2d call{};
  std::vector<double> dense;
  Guarded<uint8_t> packed;
  bool planar_x = false;

  static ConvWeight draw_weight(Element element, bool point, Random& random) {
    const int64_t groups = random.between(1, 3);
    return {element,
            groups * random.between(1, 20),
            random.below(3) == 0 ? 16 * random.between(1, 4) : random.between(1, 40),
            point ? 1 : random.between(1, 3),
            point ? 1 : random.between(1, 3),
            groups};
  }

  Case(Weight weight, Random& random)
      : weight(weight),
        point(random.below(3) == 0),
        x_element(weight.rounds_x() ? Element::I8 : FLOATS[random.below(3)]),
        geometry(draw_weight(weight.element, point, random)),
        packed(geometry.packed_bytes(), 64) {
    call.weight = geometry;
    const ConvWeight& w = call.weight;
    const Pattern pattern = cpu::pattern_of(w.element);
    const int unit = group_columns(pattern) / 4, bits = element_bits(w.element);
    const int64_t rows = w.out_channels * w.kernel_height * w.kernel_width,
                  groups = w.segment() / group_columns(pattern);
    const int64_t row_bytes = values_row_bytes(pattern, w.element, w.group_channels);
    const int64_t meta_bytes = meta_row_bytes(pattern, w.group_channels);
    std::vector<uint8_t> values(rows * row_bytes), meta(rows * meta_bytes);
    dense.assign(rows * w.group_channels, 0);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t slot = 0; slot < groups * 2 * unit; ++slot) {
        const int64_t group = slot / (2 * unit);
        if (slot % (2 * unit) == 0) {
          meta[row * meta_bytes + group / 2] |= static_cast<uint8_t>(CODES[random.below(6)] << group % 2 * 4);
        }
        const int code = meta[row * meta_bytes + group / 2] >> group % 2 * 4 & 15;
        const int place = slot / unit % 2 == 0 ? first_of(code) : second_of(code);
        const int64_t column = (group * 4 + place) * unit + slot % unit;
        if (column >= w.group_channels) continue;
        const auto value = static_cast<double>(random.between(-4, 4));
        dense[row * w.group_channels + column] = value;
        const uint32_t encoded = encode(w.element, value);
        uint8_t* const at = values.data() + row * row_bytes + slot * bits / 8;
        if (bits == 4) {
          *at |= static_cast<uint8_t>((encoded & 15) << slot % 2 * 4);
        } else {
          std::memcpy(at, &encoded, bits / 8);
        }
      }
    }
    cpu::pack(w, values.data(), meta.data(), packed.data());
    packed.make_read_only();
    std::vector<uint8_t> values_back(values.size()), meta_back(meta.size());
    cpu::unpack(w, packed.data(), values_back.data(), meta_back.data());
    CHECK(values == values_back && meta == meta_back, "unpack");

    call.packed = packed.data();
    call.weight_only = weight.weight_only;
    call.x_element = x_element;
    do {
      call.images = random.between(1, 3), call.height = random.between(1, 7), call.width = random.between(1, 7);
      const auto usual = [&] { return point && random.below(6) != 0; };
      call.stride_height = usual() ? 1 : random.between(1, 3), call.stride_width = usual() ? 1 : random.between(1, 2);
      call.padding_height = usual() ? 0 : random.between(0, 2), call.padding_width = usual() ? 0 : random.between(0, 2);
      call.dilation_height = random.between(1, 2), call.dilation_width = random.between(1, 2);
      call.out_height =
          extent(call.height, call.padding_height, call.dilation_height, w.kernel_height, call.stride_height);
      call.out_width = extent(call.width, call.padding_width, call.dilation_width, w.kernel_width, call.stride_width);
    } while (call.out_height <= 0 || call.out_width <= 0);
    call.y_planes = random.below(2) == 0;
    planar_x = random.below(2) == 0;
  }

  static int64_t extent(int64_t size, int64_t padding, int64_t dilation, int64_t kernel, int64_t stride) {
    const int64_t room = size + 2 * padding - dilation * (kernel - 1) - 1;
    return room < 0 ? 0 : room / stride + 1;
  }

  void run(Random& random) {
    const ConvWeight& w = call.weight;
    const int64_t channels = w.group_channels * w.groups, gap = random.below(3);
    // Strides with gaps, all NaN (int8: -1).
    call.channel_stride = planar_x ? call.height * (call.width + gap) + gap : 1;
    call.column_stride = planar_x ? 1 : channels + gap;
    call.row_stride = planar_x ? call.width + gap : call.width * call.column_stride + gap;
    call.image_stride = planar_x ? channels * call.channel_stride : call.height * call.row_stride + gap;
    const auto at = [&](int64_t image, int64_t c, int64_t h, int64_t v) {
      return image * call.image_stride + c * call.channel_stride + h * call.row_stride + v * call.column_stride;
    };
    const int64_t last = at(call.images - 1, channels - 1, call.height - 1, call.width - 1);
    Array x(x_element, last + 1);
    std::vector<double> numbers(last + 1);
    for (int64_t image = 0; image < call.images; ++image) {
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t i = 0; i < call.height * call.width; ++i) {
          const int64_t place = at(image, c, i / call.width, i % call.width);
          x.set(place, numbers[place] = static_cast<double>(random.between(-4, 4)));
        }
      }
    }
    x.memory().make_read_only();
    call.x = x.data();

    const int64_t outputs = w.out_channels, pixels = call.out_height * call.out_width, tokens = call.images * pixels;
    std::vector<double> bias, residual, scales, x_scales;
    for (int64_t i = 0; i < outputs; ++i) bias.push_back(static_cast<double>(random.between(-9, 9)));
    for (int64_t i = 0; i < outputs; ++i) scales.push_back(static_cast<double>(1 << random.between(0, 3)));
    for (int64_t i = 0; i < tokens * outputs; ++i) residual.push_back(static_cast<double>(random.between(-9, 9)));
    for (int64_t i = 0; i < call.images; ++i) x_scales.push_back(static_cast<double>(i + 1));
    Array bias_array(Element::F16, bias), residual_array(Element::F32, residual), scale_array(Element::F32, scales);
    Array x_scale_array(Element::F32, x_scales), y(Element::F32, tokens * outputs);
    Epilogue epilogue{};
    epilogue.y = y.data(), epilogue.y_stride = outputs, epilogue.y_type = Number::F32;
    epilogue.bias = bias_array.data(), epilogue.bias_type = Number::F16;
    epilogue.residual = residual_array.data(), epilogue.residual_type = Number::F32, epilogue.residual_stride = outputs;
    if (weight.is_integer()) epilogue.scales = reinterpret_cast<const float*>(scale_array.data());
    if (x_element == Element::I8) {
      epilogue.x_scales = reinterpret_cast<const float*>(x_scale_array.data()), epilogue.x_scale_step = 1;
    }
    epilogue.out_features = static_cast<int32_t>(outputs), epilogue.tokens = static_cast<int32_t>(tokens);
    call.epilogue = epilogue;
    const Preferred preferred(weight, x_element);
    cpu::conv2d(call);

    for (int64_t token = 0; token < tokens; ++token) {
      const int64_t image = token / pixels, row = token % pixels / call.out_width, column = token % call.out_width;
      for (int64_t o = 0; o < outputs; ++o) {
        double sum = 0;
        const int64_t first_channel = o / (outputs / w.groups) * w.group_channels;
        for (int64_t r = 0; r < w.kernel_height; ++r) {
          for (int64_t s = 0; s < w.kernel_width; ++s) {
            const int64_t h = row * call.stride_height - call.padding_height + r * call.dilation_height;
            const int64_t v = column * call.stride_width - call.padding_width + s * call.dilation_width;
            if (h < 0 || h >= call.height || v < 0 || v >= call.width) continue;
            for (int64_t c = 0; c < w.group_channels; ++c) {
              sum += dense[((o * w.kernel_height + r) * w.kernel_width + s) * w.group_channels + c] *
                     numbers[at(image, first_channel + c, h, v)];
            }
          }
        }
        if (weight.is_integer()) sum *= scales[o];
        if (x_element == Element::I8) sum *= x_scales[image];
        const double expected = sum + bias[o] + residual[token * outputs + o];
        const int64_t place = call.y_planes ? (image * outputs + o) * pixels + token % pixels : token * outputs + o;
        CHECK(y[place] == expected, name(cpu::active_isa()), " ", name(weight), " x ", name(x_element), " kernel ",
              w.kernel_height, "x", w.kernel_width, " channels ", w.group_channels, " groups ", w.groups, " token ",
              token, " output ", o, ": ", y[place], ", expected ", expected);
      }
    }
  }
};

void test_conv() {
  for_each_isa([] {
    for (Weight weight : WEIGHTS) {
      Random random(1);
      for (int i = 0; i < 150; ++i) {
        Case one(weight, random);
        one.run(random);
      }
    }
  });
}

// Every quantiser: each float16 and bfloat16, ties, and what is not finite.
void test_quantizers() {
#if defined(__x86_64__)
  if (cpu::best_isa() < Isa::AVX512) return;
  const cpu::Quantizer &plain = cpu::portable_quantizer(), &vector = cpu::avx512_quantizer();
  Random random(2);
  for (Element element : FLOATS) {
    for (int64_t count : {1, 15, 16, 17, 100, 65536}) {
      Guarded<uint8_t> x(count * element_bits(element) / 8, 4);
      for (int64_t i = 0; i < count; ++i) {
        const auto bits = static_cast<uint32_t>(count == 65536 && element != Element::F32 ? i : random.bits());
        std::memcpy(x.data() + i * element_bits(element) / 8, &bits, element_bits(element) / 8);
      }
      x.make_read_only();
      // NaNs are above all else; which one it was does not matter.
      const uint32_t largest = plain.largest(x.data(), element, count), same = vector.largest(x.data(), element, count);
      CHECK(largest == same || std::min(largest, same) > 0x7f800000, name(element));
      for (float scale : {1.0f, 0.5f, 1e-3f, 3e38f}) {
        Guarded<int8_t> one(count), two(count);
        plain.quantize(x.data(), element, count, scale, one.data());
        vector.quantize(x.data(), element, count, scale, two.data());
        for (int64_t i = 0; i < count; ++i) {
          uint32_t bits = 0;
          std::memcpy(&bits, x.data() + i * element_bits(element) / 8, element_bits(element) / 8);
          const float quotient = static_cast<float>(decode(element, bits)) / scale;
          const float q = std::min(std::max(std::nearbyint(quotient), -127.0f), 127.0f);
          CHECK(one[i] == (std::isnan(quotient) ? 0 : q) && two[i] == one[i], name(element), " ", i);
        }
      }
    }
  }
#endif
}

void test_transpose() {
#if defined(__x86_64__)
  if (cpu::best_isa() < Isa::AVX512) return;
  Random random(3);
  for (int bytes : {1, 2, 4}) {
    for (int64_t rows : {1, 15, 16, 33}) {
      for (int64_t columns : {1, 16, 17, 40}) {
        const int64_t gap = random.below(3);
        Guarded<uint8_t> from(((rows - 1) * (columns + gap) + columns) * bytes, 4);
        for (uint8_t& byte : from) byte = static_cast<uint8_t>(random.bits());
        from.make_read_only();
        Guarded<uint8_t> one(((columns - 1) * (rows + gap) + rows) * bytes, 4), two(one.size(), 4);
        std::fill(one.begin(), one.end(), 7), std::fill(two.begin(), two.end(), 7);
        cpu::portable_transpose(from.data(), columns + gap, one.data(), rows + gap, rows, columns, bytes);
        cpu::avx512_transpose(from.data(), columns + gap, two.data(), rows + gap, rows, columns, bytes);
        CHECK(std::equal(one.begin(), one.end(), two.begin()), bytes, " ", rows, " ", columns);
      }
    }
  }
#endif
}

}  // namespace

int main() {
  test_conv();
  test_quantizers();
  test_transpose();
  std::printf("test_conv: passed on every instruction set up to %s\n", name(cpu::best_isa()));
}
