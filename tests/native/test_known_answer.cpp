// The known-answer test of a device: silent on what ships, and each kernel's fault found and named. The device is
// tests/native/fake_libcuda.cpp's, the kernels' PTX that which ships, or an edited copy.
//
// An outcome is kept for as long as the process lives, for a device and an element type; the tests take devices in
// turn.
#include <algorithm>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "csrc/cuda/driver.h"
#include "csrc/cuda/known_answer.h"
#include "csrc/cuda/linear.h"
#include "tests/native/device_memory.h"

using namespace sparse24;
using cuda::device_problem;
using test::fake;

namespace {

int devices = 0;  // taken

// A device that nothing has run on, and the next test shall not see.
int new_device() {
  fake().devices.resize(devices + 1, {80, 108, 163 << 10});
  return devices++;
}

void check_text(const std::string& text, std::initializer_list<const char*> parts) {
  for (const char* part : parts) CHECK(text.find(part) != std::string::npos, "no '", part, "' in: ", text);
}

void shipped_kernels_are_good() {
  const int device = new_device();
  std::vector<std::string> kernels = {"pack_b16",      "pack_b8",           "unpack_b16",       "unpack_b8",
                                      "quantize_rows", "linear_reduce_f32", "linear_reduce_i32"};
  for (const Element element : {Element::F16, Element::BF16, Element::I8}) {
    const std::string& problem = device_problem(device, nullptr, element);
    CHECK(problem.empty(), problem, "\n", fake().findings);
    const size_t launches = fake().launches.size();
    CHECK(&device_problem(device, nullptr, element) == &problem);
    CHECK(fake().launches.size() == launches, "once in a process");
    for (const char* kernel : cuda::linear_kernels(element)) kernels.push_back(kernel);
  }
  for (const std::string& kernel : kernels) {
    CHECK(std::ranges::count(fake().launches, kernel, &FakeLaunch::kernel) > 0, kernel, " was not tried");
  }
  CHECK(fake().allocations == 0);
  for (const FakeLaunch& launch : fake().launches) CHECK(launch.stream != nullptr, "on a stream of its own");
}

void once_though_threads_ask_at_once() {
  const int device = new_device();
  fake().launches.clear();
  CHECK(device_problem(device, nullptr, Element::F16).empty());
  const size_t launches = fake().launches.size();
  const int other = new_device();
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([other] { CHECK(device_problem(other, nullptr, Element::F16).empty()); });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(fake().launches.size() == 2 * launches);
}

// A stream that captures: nothing is tried, and nothing is decided. Another's capture goes on undisturbed.
void not_while_a_graph_is_captured() {
  const int device = new_device();
  int streams[2];
  const auto stream = reinterpret_cast<CUstream>(&streams[0]), other = reinterpret_cast<CUstream>(&streams[1]);
  fake().launches.clear();
  fake().calls.clear();
  fake().capturing = {stream};
  fake().edited_ptx["linear_few"] = ".version 8.5\n.target sm_80\n.address_size 64\n";
  CHECK(device_problem(device, stream, Element::F16).empty());
  CHECK(device_problem(device, nullptr, Element::F16).empty(), "the legacy stream is part of it");
  CHECK(fake().launches.empty() && fake().calls["cuMemAlloc_v2"] == 0 && fake().calls["cuStreamSynchronize"] == 0);
  CHECK(!device_problem(device, other, Element::F16).empty());
  CHECK(!fake().capture_broken && fake().graph.empty());
  fake().capturing.clear();
  fake().edited_ptx.clear();
}

// A module's PTX with `right` replaced by `wrong` in its kernel `kernel`, as a compiler may have got it wrong.
void edit(const char* module, const std::string& kernel, const std::string& right, const std::string& wrong) {
  const auto shipped = std::ranges::find(cuda::modules(), std::string_view(module), &cuda::Module::name);
  std::string text = (*shipped)->ptx;
  size_t at = text.find(".entry " + kernel + "("), end = text.find("\n}", at);
  CHECK(at != std::string::npos, kernel);
  int edits = 0;
  for (at = text.find(right, at); at < end; at = text.find(right, at + wrong.size()), ++edits) {
    text.replace(at, right.size(), wrong);
    end += wrong.size() - right.size();
  }
  CHECK(edits > 0, "no ", right, " in ", kernel);
  fake().edited_ptx[module] = text;
}

void a_wrong_kernel_is_named() {
  struct Case {
    const char *module, *kernel, *right, *wrong;
    Element element;
  };
  const char *f16 = ".f32.f16.f16.f32", *bf16 = ".f32.bf16.bf16.f32", *s8 = ".s32.s8.s8.s32", *u8 = ".s32.u8.s8.s32";
  const std::vector<Case> cases = {
      {"linear_f16", "linear_f16_256x128", f16, bf16, Element::F16},
      {"linear_f16", "linear_f16_64x64_by1", f16, bf16, Element::F16},
      {"linear_bf16", "linear_bf16_128x128", bf16, f16, Element::BF16},
      {"linear_s8", "linear_s8_192x256", s8, u8, Element::I8},
      {"linear_few", "linear_few_f16_16x8", f16, bf16, Element::F16},
      {"linear_few", "linear_few_s8_64x16", s8, u8, Element::I8},
      {"linear_few", "linear_few_f16_32x8", "ld.global.u16", "ld.global.u8", Element::F16},  // of x that is not aligned
      {"linear_reduce", "linear_reduce_f32", "add.f32", "sub.f32", Element::F16},
      {"quantize", "quantize_rows", "cvt.rni.f32.f32", "cvt.rzi.f32.f32", Element::I8},
      {"pack", "pack_b16", "st.global.u32", "st.global.u16", Element::F16},
      {"pack", "unpack_b8", "ld.global.u32", "ld.global.u8", Element::I8},
  };
  for (const Case& wrong : cases) {
    fake().edited_ptx.clear();
    edit(wrong.module, wrong.kernel, wrong.right, wrong.wrong);
    const int device = new_device();
    check_text(device_problem(device, nullptr, wrong.element), {wrong.kernel, "entry ["});
    CHECK(fake().allocations == 0);
  }
  fake().edited_ptx.clear();
}

void the_driver_refuses() {
  check_text(device_problem(1000, nullptr, Element::F16), {"cuDeviceGet of '1000' failed"});
  for (const char* call : {"cuStreamIsCapturing", "cuStreamCreate", "cuStreamSynchronize", "cuMemAlloc_v2",
                           "cuMemsetD8Async", "cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2", "cuLaunchKernelEx"}) {
    fake().failing = {{call, CUDA_ERROR_NOT_PERMITTED}};
    const std::string name = std::string(call).substr(0, std::string(call).find("_v2"));
    check_text(device_problem(new_device(), nullptr, Element::F16), {name.c_str(), "failed: an error of the stand-in"});
    fake().failing.clear();
    CHECK(fake().allocations == 0, call);
  }
  fake().version = 12020;
  check_text(device_problem(new_device(), nullptr, Element::F16), {"12.5 or newer is needed"});
  fake().version = 13000;
}

// Memory that is short now may not be later.
void out_of_memory_is_not_kept() {
  const int device = new_device();
  fake().failing = {{"cuMemAlloc_v2", CUDA_ERROR_OUT_OF_MEMORY}};
  check_text(device_problem(device, nullptr, Element::BF16), {"cuMemAlloc failed"});
  fake().failing.clear();
  CHECK(device_problem(device, nullptr, Element::BF16).empty());
}

}  // namespace

int main() {
  fake();
  shipped_kernels_are_good();
  once_though_threads_ask_at_once();
  not_while_a_graph_is_captured();
  a_wrong_kernel_is_named();
  the_driver_refuses();
  out_of_memory_is_not_kept();
  return 0;
}
