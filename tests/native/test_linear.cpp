// csrc/cpu/linear/linear.h on every instruction set of this machine, against plain loops in double (linear_problem.h).
#include <thread>

#include "tests/native/linear_problem.h"
#include "tests/native/parallel.h"

using namespace sparse24;
using namespace sparse24::test;
using sparse24::cpu::active_isa;
using sparse24::cpu::best_isa;

namespace {

constexpr Number Y_TYPES[] = {Number::F32, Number::F16, Number::BF16, Number::I8};

// Every combination of the edges of M, N and K; what else may vary is drawn.
void test_shapes() {
  std::vector<Shape> shapes;
  for (int64_t tokens : {0, 1, 2, 5, 27, 28, 29, 57}) {
    for (int64_t out_features : {1, 15, 16, 17, 33}) {
      for (int64_t in_features : {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 31, 32, 33, 63, 64, 65, 100}) {
        shapes.push_back({tokens, out_features, in_features});
      }
    }
  }
  shapes.push_back({3, 0, 7});
  for (int64_t tokens = 1; tokens <= 28; ++tokens) shapes.push_back({tokens, 17, 200});
  for (int64_t in_features : {127, 128, 129, 192, 193, 256, 300}) shapes.push_back({9, 18, in_features});
  for_each_isa([&] {
    Random random(1);
    for (const Shape& shape : shapes) {
      for (Weight weight : WEIGHTS) {
        const bool integers = random.below(2) == 0;
        const bool int8_x = weight.rounds_x() && random.below(3) == 0;
        const int64_t group_size = weight.is_integer() ? 64 * std::max<int64_t>(0, random.between(-2, 3)) : 0;
        Problem problem(weight, int8_x ? Element::I8 : FLOATS[random.below(3)], shape, random, integers, group_size);
        problem.bias_type = static_cast<Number>(FLOATS[random.below(3)]);
        problem.residual_type = static_cast<Number>(FLOATS[random.below(3)]);
        problem.has_bias = random.below(3) > 0;
        problem.has_residual = random.below(3) == 0;
        problem.one_x_scale = random.below(2) == 0;
        if (random.below(3) == 0) problem.y_type = Y_TYPES[random.below(4)];
        if (problem.y_type == Number::I8)
          problem.y_scale = integers ? 2 : round_to(Element::F32, 0.01 + random.uniform());
        problem.activation = ACTIVATIONS[random.below(5)];
        problem.x_gap = random.below(2) * random.below(40);
        problem.y_gap = random.below(2) * random.below(40);
        problem.x_backwards = random.below(8) == 0;
        problem.check(problem.run(), integers);
      }
    }
  });
}

// Several batches of panels and several chunks of W, on one thread and on three.
void test_many_panels_and_chunks() {
  for (int threads : {1, 3}) {
    test::set_thread_count(threads);
    for_each_isa([] {
      for (Weight weight : WEIGHTS) {
        Random random(2);
        // The last four suit the gather kernels, with a strip that is not full.
        for (const Shape& shape : {Shape{290, 20, 4100}, Shape{30, 900, 1100}, Shape{79, 400, 300}, Shape{95, 385, 130},
                                   Shape{191, 384, 150}, Shape{111, 385, 200}}) {
          const Problem problem(weight, Element::F32, shape, random, true);
          problem.check(problem.run(), true);
          if (!weight.is_integer()) continue;
          for (int64_t group_size : {64, 192, 1600}) {
            const Problem grouped(weight, Element::BF16, shape, random, true, group_size);
            grouped.check(grouped.run(), true);
          }
        }
      }
    });
  }
  test::set_thread_count(2);
}

// Each code in every row and group, on columns that can be told apart; the dropped columns are not finite.
void test_codes_and_dropped_columns() {
  for_each_isa([] {
    for (Weight weight : WEIGHTS) {
      for (int code : CODES) {
        Random random(3);
        Problem problem(weight, Element::F32, {2, 17, 128}, random, true);
        std::fill(problem.codes.begin(), problem.codes.end(), code);
        const double second = is_int4(weight.element) ? 7 : 64;
        for (int64_t i = 0; i < 17 * 64; ++i) problem.values[i] = i % 2 == 0 ? 1 : second;
        for (int64_t k = 0; k < 128; ++k) {
          const int64_t unit = k / problem.unit % 4;
          const bool kept = unit == first_of(code) || unit == second_of(code);
          // An I8 row with an Inf is all NaN by its rule, and 127 as its largest makes its scale 1.
          const double dropped = weight.rounds_x() ? 127 : k % 3 == 0 ? NOT_A_NUMBER : INFINITE;
          problem.x[k] = kept ? static_cast<double>(k) : dropped;
          problem.x[128 + k] = kept ? static_cast<double>(k % 7) - 3 : -dropped;
        }
        problem.check(problem.run(), true);
      }
    }
  });
}

// NaN and Inf at a kept column, with every activation: the row they are in, and no other.
void test_not_finite() {
  for_each_isa([] {
    for (Weight weight : WEIGHTS) {
      for (Element x_element : FLOATS) {
        for (Activation activation : ACTIVATIONS) {
          for (double special : {NOT_A_NUMBER, INFINITE, -INFINITE}) {
            Random random(4);
            Problem problem(weight, x_element, {3, 18, 40}, random, true);
            problem.activation = activation;
            std::fill(problem.codes.begin(), problem.codes.end(), code_of(1, 2));
            std::fill(problem.values.begin(), problem.values.end(), 1);
            problem.x[40 + (4 * 4 + 1) * problem.unit] = special;
            const std::vector<double> y = problem.run();
            problem.check(y, true);
            for (int64_t n = 0; n < 18; ++n) CHECK(!std::isfinite(y[18 + n]) || special < 0, problem.describe());
          }
        }
      }
    }
  });
}

// Values and codes come back from the packed form to the bit, whatever they are; the kernels survive any codes.
void test_pack_any_bytes() {
  Random random(5);
  for (Weight weight : WEIGHTS) {
    const Pattern pattern = cpu::pattern_of(weight.element);
    for (int64_t out_features : {0, 1, 16, 17, 40}) {
      for (int64_t in_features = 0; in_features <= 133; ++in_features) {
        const int64_t values_bytes = out_features * values_row_bytes(pattern, weight.element, in_features);
        const int64_t meta_bytes = out_features * meta_row_bytes(pattern, in_features);
        Guarded<uint8_t> values(values_bytes), meta(meta_bytes), values_back(values_bytes), meta_back(meta_bytes);
        for (uint8_t& byte : values) byte = static_cast<uint8_t>(random.bits());
        for (uint8_t& byte : meta) byte = static_cast<uint8_t>(random.bits());
        values.make_read_only(), meta.make_read_only();
        const int64_t group_size = weight.is_integer() ? 64 * random.below(3) : 0;
        Guarded<uint8_t> packed(cpu::packed_bytes(weight.element, out_features, in_features, group_size), 64);
        cpu::pack(values.data(), meta.data(), weight.element, out_features, in_features, packed.data(), group_size);
        packed.make_read_only();
        cpu::unpack(packed.data(), weight.element, out_features, in_features, values_back.data(), meta_back.data(),
                    group_size);
        CHECK(std::equal(values.begin(), values.end(), values_back.begin()), name(weight), " K ", in_features);
        CHECK(std::equal(meta.begin(), meta.end(), meta_back.begin()), name(weight), " K ", in_features);

        Guarded<float> x(3 * in_features), y(3 * out_features),
            scales(cpu::scale_groups(in_features, group_size) * out_features);
        for (float& v : x) v = static_cast<float>(random.uniform());
        for (float& v : scales) v = 1;
        for_each_isa([&] {
          Epilogue epilogue{};
          epilogue.y = y.data(), epilogue.y_stride = out_features;
          epilogue.out_features = static_cast<int32_t>(out_features), epilogue.tokens = 3;
          if (weight.is_integer()) epilogue.scales = scales.data();
          cpu::linear({x.data(), in_features, Element::F32, packed.data(), weight.element, weight.weight_only,
                       in_features, epilogue, 0, group_size});
        });
      }
    }
  }
}

// Each of the 65536 numbers of a 16-bit type, as W and as x, arrives as itself. vdpbf16ps takes subnormals for zero.
void test_widening() {
  constexpr int64_t ROWS = 4096, GROUPS = 65536 / ROWS / 2;
  for_each_isa([] {
    for (Element half : {Element::F16, Element::BF16}) {
      const std::string isa = name(active_isa());
      const bool flushes = half == Element::BF16 && (isa == "avx512_bf16" || isa == "amx");
      const auto expect = [&](double got, uint32_t bits, const char* what) {
        const double expected = decode(half, bits);
        const bool subnormal = std::fabs(expected) < 0x1p-126;
        CHECK(got == expected || (std::isnan(got) && std::isnan(expected)) || (flushes && subnormal && got == 0),
              name(active_isa()), " ", name(half), " ", what, " bits ", bits, " gives ", got);
      };
      Random random(6);
      for (int64_t slot = 0; slot < 2 * GROUPS; ++slot) {  // one slot at a time meets x = 1, the others x = 0
        Problem problem({half}, Element::F32, {1, ROWS, 4}, random, true);
        problem.has_bias = false;
        std::fill(problem.x.begin(), problem.x.end(), 0);
        problem.x[1 + slot % 2] = 1;
        for (int64_t n = 0; n < ROWS; ++n) {
          problem.codes[n] = code_of(1, 2);
          problem.values[2 * n + slot % 2] = decode(half, static_cast<uint32_t>(slot * ROWS + n));
          problem.values[2 * n + 1 - slot % 2] = 0;
        }
        const std::vector<double> y = problem.run();
        for (int64_t n = 0; n < ROWS; ++n) expect(y[n], static_cast<uint32_t>(slot * ROWS + n), "as W");
      }
      Problem problem({half}, half, {65536, 1, 1}, random, true);
      problem.has_bias = false;
      problem.codes[0] = code_of(0, 1), problem.values = {1, 0};
      for (int64_t m = 0; m < 65536; ++m) problem.x[m] = decode(half, static_cast<uint32_t>(m));
      const std::vector<double> y = problem.run();
      for (int64_t m = 0; m < 65536; ++m) expect(y[m], static_cast<uint32_t>(m), "as x");
    }
  });
}

// With K = 0, y = activation(bias): the rounding of y and the accuracy of the activations over all magnitudes.
void test_rounding_and_activations() {
  for_each_isa([] {
    const auto check = [](Element w_element, Element y_element) {
      Random random(7);
      Problem problem({w_element}, y_element, {1, 40000, 0}, random, true);
      for (double& b : problem.bias) b = decode(Element::F32, static_cast<uint32_t>(random.bits()));
      for (int64_t n = 0; n < 4000; ++n) {  // ties and their neighbours, among subnormals too
        const double tie = decode(y_element, static_cast<uint32_t>(random.below(0x7000)));
        const double next = decode(y_element, static_cast<uint32_t>(random.below(0x7000)) | 1);
        problem.bias[n] = static_cast<float>(n % 2 == 0 ? tie * (1 + 0x1p-11) : next * (1 + 0x1p-8));
      }
      for (Activation activation : {Activation::NONE, Activation::RELU}) {
        problem.activation = activation;
        problem.check(problem.run(), true);
      }
    };
    for (Element y_element : FLOATS) check(Element::F32, y_element);
    check(Element::BF16, Element::BF16);  // by other instructions where there are some
    for (Activation activation : {Activation::GELU, Activation::GELU_TANH, Activation::SILU}) {
      Random random(8);
      constexpr int64_t COUNT = 400000;
      Problem problem({Element::F32}, Element::F32, {1, COUNT, 0}, random, true);
      problem.activation = activation;
      for (int64_t n = 0; n < COUNT; ++n) {
        // Half evenly over [-20, 20], half over all exponents.
        problem.bias[n] = n % 2 == 0 ? round_to(Element::F32, 40 * random.uniform() - 20)
                                     : decode(Element::F32, static_cast<uint32_t>(random.bits()));
      }
      const std::vector<double> y = problem.run();
      double worst = 0;
      for (int64_t n = 0; n < COUNT; ++n) {
        const double x = problem.bias[n], expected = activate(activation, x);
        CHECK(std::isnan(y[n]) == std::isnan(expected), problem.describe(), " x ", x, " y ", y[n]);
        if (!std::isfinite(expected)) continue;
        // Units in the last place, for results above 1e-36: below, the factors of the result are subnormal. The tanh
        // form has an exponent of 2 u, whose own rounding costs |u| ulp more.
        double ulp = std::ldexp(1, std::max(std::ilogb(expected == 0 ? 0x1p-120 : expected), -120) - 23);
        if (activation == Activation::GELU_TANH) ulp *= 1 + std::fabs(x + 0.044715 * x * x * x);
        const double error = std::fabs(y[n] - expected) / ulp;
        const double limit = activation == Activation::SILU ? 3 : activation == Activation::GELU && x < -2 ? 6 : 4;
        CHECK(error <= limit, problem.describe(), " is off by ", error, " ulp at ", x);
        worst = std::max(worst, error);
      }
      std::printf("%-12s activation %d: %.2f ulp\n", name(active_isa()), static_cast<int>(activation), worst);
    }
  });
}

// The corners of the int8 rule: rows of zeros, rows so small that their scale is 0 or far off, sums at the ends of
// int32.
void test_int8_extremes() {
  for_each_isa([] {
    Random random(9);
    Problem small({Element::I8}, Element::F32, {6, 20, 70}, random, false);
    small.has_bias = false;  // it would drown the rows below
    for (double& scale : small.scales) scale *= 0x1p100;
    for (int64_t k = 0; k < 70; ++k) {
      small.x[k] = 0;
      small.x[70 + k] = k % 2 == 0 ? -0.0 : 0.0;
      small.x[140 + k] = k == 3 ? 0x1p-149 : 0;
      small.x[210 + k] = k == 3 ? 0x1p-149 * 190 : k == 5 ? 0x1p-149 * -190 : 0x1p-149 * static_cast<double>(k);
      small.x[280 + k] = k % 2 == 0 ? -std::numeric_limits<float>::max() : 1;
    }
    small.check(small.run(), false);

    constexpr int64_t LONG = 262144;  // 2^31 / (127 * 128 / 2), rounded down to a power of two
    for (double x_sign : {1, -1}) {
      Problem problem({Element::I8}, Element::F32, {2, 16, LONG}, random, true);
      for (int64_t i = 0; i < 16 * problem.slots; ++i) problem.values[i] = i / problem.slots % 2 == 0 ? -128 : 127;
      std::fill(problem.x.begin(), problem.x.end(), 127 * x_sign);
      problem.check(problem.run(), true);
    }
  });
}

// Ties and near-ties of x / s, where anything but an IEEE division and ties to even is off by one.
void test_int8_rounding() {
  for_each_isa([] {
    for (Element x_element : FLOATS) {
      Random random(10);
      Problem problem({Element::I8}, x_element, {64, 1, 512}, random, false);
      std::fill(problem.codes.begin(), problem.codes.end(), code_of(0, 1));
      for (int64_t m = 0; m < 64; ++m) {
        const double amax =
            round_to(x_element, std::ldexp(1 + random.uniform(), static_cast<int>(random.between(-9, 9))));
        for (int64_t k = 0; k < 512; ++k) {
          const double tie = (static_cast<double>(random.between(-127, 126)) + 0.5) * (amax / 127);
          problem.x[m * 512 + k] = round_to(x_element, tie);
        }
        problem.x[m * 512] = amax;
      }
      problem.check(problem.run(), false);
    }
  });
}

void test_eight_threads_at_once() {
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 8; ++thread) {
    threads.emplace_back([thread] {
      Random random(100 + thread);
      for (int repeat = 0; repeat < 12; ++repeat) {
        const Shape shape{random.between(1, 200), random.between(1, 200), random.between(1, 400)};
        const Problem problem(WEIGHTS[repeat % std::size(WEIGHTS)], FLOATS[thread % 3], shape, random, true);
        problem.check(problem.run(), true);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

// With any argument: what is new on another instruction set, for emulators of a CPU, which take minutes for the rest.
int main(int count, char**) {
  const bool all = count == 1;
  test_shapes();
  test_codes_and_dropped_columns();
  test_not_finite();
  test_pack_any_bytes();
  test_int8_extremes();
  if (all) {
    test_many_panels_and_chunks();
    test_widening();
    test_rounding_and_activations();
    test_int8_rounding();
    test_eight_threads_at_once();
  }
  std::printf("test_linear: passed on every instruction set up to %s\n", name(best_isa()));
}
