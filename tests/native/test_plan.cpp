// The choice of a linear kernel and its launches (csrc/cuda/linear.cpp), in sizes that no test can run: over a machine
// that records.
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "csrc/cuda/linear.h"
#include "kernels/packed.cuh"
#include "tests/native/check.h"

using namespace sparse24;
using cuda::Device;
using cuda::Launch;
using cuda::Plan;

namespace {

constexpr Device A100{80, 108, 166912}, A40{86, 84, 101376}, H100{90, 132, 232448}, SMALL{87, 1, 166912};

class Recorder : public cuda::Machine {
 public:
  explicit Recorder(Device device) : device_(device) {}
  Device device() const override { return device_; }
  void run(const Launch& launch) const override { launches.push_back(launch); }

  mutable std::vector<Launch> launches;

 private:
  Device device_;
};

// A call of this shape; nobody follows its pointers.
cuda::Linear call_of(Element element, int64_t tokens, int64_t out_features, int64_t in_features, uintptr_t x = 1 << 20,
                     int64_t x_stride = -1) {
  cuda::Linear call{};
  call.element = element;
  call.x = reinterpret_cast<void*>(x);
  call.x_stride = x_stride < 0 ? in_features : x_stride;
  call.packed = reinterpret_cast<const uint8_t*>(uintptr_t{1} << 40);
  call.in_features = in_features;
  call.epilogue.y = reinterpret_cast<void*>(uintptr_t{1} << 41);
  call.epilogue.y_stride = out_features;
  call.epilogue.y_type = Number::F16;
  call.epilogue.out_features = static_cast<int32_t>(out_features);
  call.epilogue.tokens = static_cast<int32_t>(tokens);
  return call;
}

bool is(const char* kernel, std::string_view part) { return std::string_view(kernel).find(part) != std::string::npos; }

LinearArguments arguments_of(const Launch& launch) {
  LinearArguments arguments;
  CHECK(launch.argument_bytes == sizeof arguments);
  std::memcpy(&arguments, launch.arguments.data(), sizeof arguments);
  return arguments;
}

// Every shape, device and element: the plan can be launched, and covers W and x.
void every_plan_can_be_launched() {
  constexpr int64_t SIZES[] = {1, 15, 16, 17, 64, 197, 1000, 4096, 65537, 3000000};
  for (const Device& device : {A100, A40, H100, SMALL}) {
    for (const Element element : {Element::F16, Element::BF16, Element::I8}) {
      const int bits = element_bits(element);
      for (const int64_t tokens : SIZES) {
        for (const int64_t n : SIZES) {
          for (const int64_t k : SIZES) {
            for (const uintptr_t x : {uintptr_t{1 << 20}, uintptr_t{(1 << 20) + 4}, uintptr_t{(1 << 20) + 2}}) {
              const cuda::Linear call = call_of(element, tokens, n, k, x);
              const Plan plan = plan_linear(call, device);
              CHECK(plan.splits >= 1 && plan.workspace_bytes <= int64_t{32} << 20, plan.kernel);
              CHECK(plan.workspace_bytes == (plan.splits > 1 ? plan.splits * tokens * n * 4 : 0));
              const Plan again = plan_linear(call, device);
              CHECK(again.kernel == plan.kernel && again.splits == plan.splits);
              CHECK(is(plan.kernel, "few") == (tokens <= 16), plan.kernel);

              const auto asked = plan_linear_as(call, device, plan.kernel, plan.splits);
              CHECK(asked && asked->splits == plan.splits && asked->workspace_bytes == plan.workspace_bytes);

              const Recorder machine(device);
              run_linear(machine, call, plan, reinterpret_cast<void*>(uintptr_t{1} << 42));
              CHECK(machine.launches.size() == (plan.splits > 1 ? 2u : 1u));
              const Launch& launch = machine.launches[0];
              const LinearArguments arguments = arguments_of(launch);
              CHECK(launch.shared_bytes <= device.shared_bytes_per_block && launch.grid.y == 1);
              CHECK(static_cast<int>(launch.grid.z) == plan.splits);
              CHECK(plan.splits == 1 || launch.grid.x * launch.grid.z <= static_cast<unsigned>(device.multiprocessors));
              CHECK(arguments.x_stride == k * bits / 8 && arguments.in_features == k);
              CHECK(int64_t{arguments.row_blocks} * 16 >= n);
              CHECK(int64_t{arguments.split_blocks} * plan.splits >= arguments.column_blocks);
              CHECK(int64_t{arguments.split_blocks} * (plan.splits - 1) < arguments.column_blocks, "an empty split");
              CHECK((arguments.partial != nullptr) == (plan.splits > 1));
              CHECK(launch.ranges[0].bytes == static_cast<uint64_t>(packed::bytes(bits, n, k)));
              CHECK(launch.ranges[1].bytes == static_cast<uint64_t>(tokens * k * bits / 8));
              if (plan.splits > 1) CHECK(launch.ranges[2].bytes == static_cast<uint64_t>(plan.workspace_bytes));
            }
          }
        }
      }
    }
  }
}

void as_many_tokens_as_an_int_counts() {
  for (const int64_t tokens : {int64_t{1} << 24, (int64_t{1} << 31) - 1}) {
    const cuda::Linear call = call_of(Element::F16, tokens, 8, 64);
    const Recorder machine(A100);
    run_linear(machine, call, plan_linear(call, A100), nullptr);
    CHECK(machine.launches.size() == 1);
    const unsigned tile = is(machine.launches[0].kernel, "x256")   ? 256
                          : is(machine.launches[0].kernel, "x128") ? 128
                                                                   : 64;
    CHECK(machine.launches[0].grid.x == (tokens + tile - 1) / tile);
    CHECK(machine.launches[0].ranges[1].bytes == static_cast<uint64_t>(tokens) * 128);
    CHECK(machine.launches[0].ranges.back().bytes == static_cast<uint64_t>(tokens) * 16);
  }
  const cuda::Linear wide = call_of(Element::F16, 17, (int64_t{1} << 30) - 1, 8);
  const Plan plan = plan_linear(wide, A100);
  CHECK(plan.splits == 1 && arguments_of([&] {
                              const Recorder machine(A100);
                              run_linear(machine, wide, plan, nullptr);
                              return machine.launches[0];
                            }())
                                    .row_blocks == 1 << 26);
}

void ranges_end_with_the_last_row() {
  cuda::Linear call = call_of(Element::F16, 17, 30, 10, 1 << 20, 100);
  call.epilogue.residual = reinterpret_cast<void*>(uintptr_t{1} << 43);
  call.epilogue.residual_stride = 0;
  call.epilogue.y_stride = 40;
  const Recorder machine(A100);
  run_linear(machine, call, plan_linear(call, A100), nullptr);
  const auto& ranges = machine.launches[0].ranges;
  CHECK(ranges.size() == 4 && ranges[1].bytes == (16 * 100 + 10) * 2);
  CHECK(ranges[2].bytes == (16 * 40 + 30) * 2 && !ranges[2].initialized);
  CHECK(ranges[3].bytes == 30 * 4 && ranges[3].initialized);
}

void what_a_kernel_needs() {
  const cuda::Linear call = call_of(Element::F16, 300, 300, 512);
  for (const char* name : cuda::linear_kernels(Element::F16)) {
    const auto plan = plan_linear_as(call, A100, name, 2);
    CHECK(plan.has_value() == !is(name, "few"), name);
    if (plan) CHECK(plan->kernel == std::string_view(name) && plan->splits == 2);
    CHECK(plan_linear_as(call_of(Element::F16, 16, 300, 512), A100, name, 1).has_value() == !is(name, "x8"), name);
    // A tile that is higher than W, a device with less shared memory, and x that is not aligned.
    const bool high = is(name, "_128x") || is(name, "_192x") || is(name, "_256x");
    CHECK(plan_linear_as(call_of(Element::F16, 16, 64, 512), A100, name, 1).has_value() == (!high && !is(name, "x8")));
    CHECK(plan_linear_as(call, A40, name, 1).has_value() ==
              (!is(name, "few") && !is(name, "192x256") && !is(name, "256x128")),
          name);
    CHECK(!plan_linear_as(call_of(Element::F16, 300, 300, 512, 1 << 20, 516), A100, name, 1) ==
          !(is(name, "by4") || is(name, "by1")));
    CHECK(!plan_linear_as(call_of(Element::F16, 300, 300, 511), A100, name, 1) == !is(name, "by1"));
  }
  CHECK(!plan_linear_as(call, A100, "linear_s8_64x64", 1) && !plan_linear_as(call, A100, "", 1));
  CHECK(plan_linear_as(call, A100, "linear_f16_64x64", 1000)->splits == 8);  // one column block each
  CHECK(plan_linear_as(call, A100, "linear_f16_64x64", 5)->splits == 4);     // two each: a fifth would be empty
  // Where rows begin counts, not where they end: copies are cut short there.
  CHECK(!is(plan_linear(call_of(Element::F16, 300, 300, 511, 1 << 20, 512), A100).kernel, "_by"));
  CHECK(is(plan_linear(call_of(Element::F16, 300, 300, 511, 1 << 20, 514), A100).kernel, "_by4"));
  CHECK(is(plan_linear(call_of(Element::F16, 300, 300, 510, 1 << 20, 515), A100).kernel, "_by1"));
  CHECK(is(plan_linear(call_of(Element::I8, 300, 300, 510, 1 << 20, 516), A100).kernel, "_by4"));
  CHECK(is(plan_linear(call_of(Element::I8, 300, 300, 512, 1 << 20, 514), A100).kernel, "_by1"));
}

void splits_fill_a_device_and_no_more() {
  const Plan small = plan_linear(call_of(Element::F16, 64, 64, 16384), A100);
  CHECK(small.splits > 8 && small.splits <= 108, small.splits);
  CHECK(plan_linear(call_of(Element::F16, 64, 64, 16384), SMALL).splits == 1);
  CHECK(plan_linear(call_of(Element::F16, 64, 64, 256), A100).splits == 1);
  CHECK(plan_linear(call_of(Element::F16, 4096, 4096, 16384), A100).splits == 1);
  CHECK(plan_linear(call_of(Element::F16, 64, 64, 0), A100).splits == 0);
}

void nothing_in_x_is_the_epilogue_of_zeros() {
  const cuda::Linear call = call_of(Element::I8, 5, 7, 0);
  const Recorder machine(A100);
  run_linear(machine, call, plan_linear(call, A100), nullptr);
  CHECK(machine.launches.size() == 1 && is(machine.launches[0].kernel, "linear_reduce_i32"));
}

}  // namespace

int main() {
  every_plan_can_be_launched();
  as_many_tokens_as_an_int_counts();
  ranges_end_with_the_last_row();
  what_a_kernel_needs();
  splits_fill_a_device_and_no_more();
  nothing_in_x_is_the_epilogue_of_zeros();
  return 0;
}
