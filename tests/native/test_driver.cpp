// The driver's machine: contexts, streams, graphs, images, versions and errors; the driver is
// tests/native/fake_libcuda.cpp. What is found out once in a process (the driver, the kernels of a device) is the first
// thing that each test finds out, so each runs in a process of its own.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "csrc/cuda/driver.h"
#include "csrc/cuda/image.h"
#include "csrc/cuda/linear.h"
#include "tests/native/device_memory.h"

using namespace sparse24;
using cuda::DriverMachine;
using test::DeviceCopy;
using test::fake;

namespace {

// ---- A small launch: one group, whose two values lie in columns 2 and 3 ----

struct Decompress {
  uint8_t in[3] = {7, 9, 0xE}, out[4] = {1, 1, 1, 1};
  DeviceCopy values{in, 2}, meta{in + 2, 1}, dense{out, 4};
  cuda::Launch launch = cuda::describe_decompress(values.get<void>(), meta.get<uint8_t>(), dense.get<void>(), 1, 4,
                                                  Element::I8, Pattern::TWO_FOUR);

  void run(int device = 0, CUstream stream = nullptr) const { DriverMachine(device, stream).run(launch); }
  bool is_done() {
    dense.read(out);
    return std::memcmp(out, "\0\0\7\11", 4) == 0;
  }
};

// The message of what `body` throws.
template <class Body>
std::string error_of(const Body& body) {
  try {
    body();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "no error";
}

void check_text(const std::string& text, std::initializer_list<const char*> parts) {
  for (const char* part : parts) CHECK(text.find(part) != std::string::npos, "no '", part, "' in: ", text);
}

// ---- Where it runs ----

CUcontext current_context() {
  CUcontext context = nullptr;
  cuda::check(cuda::driver().cuCtxGetCurrent(&context), "cuCtxGetCurrent");
  return context;
}

void device_is_described() {
  const cuda::Device device = DriverMachine(1, nullptr).device();
  CHECK(device.sm == 90 && device.multiprocessors == 132 && device.shared_bytes_per_block == 227 << 10);
  fake().calls.clear();
  DriverMachine(1, nullptr).device();
  CHECK(fake().calls["cuDeviceGetAttribute"] == 0, "attributes are asked for once");
  check_text(error_of([] { DriverMachine(3, nullptr); }), {"cuDeviceGet of '3' failed", "(101)"});
}

void cold_thread() {
  std::thread([] {
    CHECK(current_context() == nullptr);
    Decompress small;
    small.run();
    CHECK(small.is_done());
  }).join();
}

void second_device() {
  Decompress small;
  small.run(0);
  const CUcontext first = current_context();
  small.run(1);
  CHECK(fake().launches.back().device == 1);
  CHECK(current_context() == first, "the thread keeps its context");
  small.run(0);
  CHECK(fake().launches.back().device == 0);
  CHECK(small.is_done());
  for (int i = 0; i < 3; ++i) std::thread([&] { small.run(1); }).join();
  CHECK(fake().calls["cuDevicePrimaryCtxRetain"] == 2, "a device's context is retained once");
}

void launches_keep_their_stream() {
  Decompress small;
  int streams[2];
  for (int& stream : streams) {
    small.run(0, reinterpret_cast<CUstream>(&stream));
    CHECK(fake().launches.back().stream == reinterpret_cast<CUstream>(&stream));
  }
  CHECK(fake().calls["cuStreamSynchronize"] == 0);
}

// Also the first launch of a process, which loads the kernel.
void launches_can_be_captured() {
  Decompress small;
  int place;
  const auto stream = reinterpret_cast<CUstream>(&place);
  fake().capturing = {stream};
  const int allocations = fake().allocations;
  small.run(0, stream);
  CHECK(!fake().capture_broken);
  CHECK(fake().allocations == allocations);
  CHECK(!small.is_done() && fake().graph.size() == 1);
  fake().capturing.clear();
  fake().graph[0]();
  CHECK(small.is_done());
}

void threads_launch_at_once() {
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([i] {
      Decompress small;
      for (int j = 0; j < 20; ++j) small.run((i + j) % 2);
      CHECK(small.is_done());
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(fake().calls["cuLibraryLoadData"] == 2, "a module is loaded once for each device");
}

// ---- Which image ----

void images_are_chosen_by_compute_capability() {
  const unsigned char cubin = 0;
  const cuda::Image images[] = {{80, 0, &cubin, 1},   {86, 0, &cubin, 1},    {87, 0, &cubin, 1},   {89, 0, &cubin, 1},
                                {90, 'a', &cubin, 1}, {100, 'f', &cubin, 1}, {120, 'f', &cubin, 1}};
  const cuda::Module module{"module", "", images, std::size(images)};
  const auto chosen = [&](int sm) {
    const cuda::Image* const image = choose_image(module, sm);
    return image ? image->sm : 0;
  };
  for (const cuda::Image& image : images) CHECK(chosen(image.sm) == image.sm);
  CHECK(chosen(88) == 87);                          // a later minor
  CHECK(chosen(103) == 100 && chosen(121) == 120);  // of the family
  CHECK(chosen(91) == 0);                           // 90a is for 90 alone
  CHECK(chosen(75) == 0 && chosen(110) == 0 && chosen(130) == 0);
}

void a_cubin_runs_where_there_is_one() {
  Decompress small;
  small.run();
  CHECK(!fake().launches.back().from_ptx && fake().calls["cuLibraryLoadData"] == 1);
}

void refused_cubins_fall_back_to_ptx() {
  fake().version = 12060;
  Decompress small;
  small.run();
  CHECK(fake().launches.back().from_ptx && small.is_done());
  CHECK(fake().calls["cuLibraryUnload"] == 1, "of the cubin");
}

void a_device_without_cubin_runs_ptx() {
  fake().devices = {{110, 20, 227 << 10}};
  Decompress small;
  small.run();
  CHECK(fake().launches.back().from_ptx && small.is_done());
}

// Printed for tests/test_native.py, which asks ptxas.
void resources_are_read_from_every_cubin() {
  for (const cuda::Module* module : cuda::modules()) {
    const std::string_view ptx = module->ptx, entry = ".visible .entry ";
    for (size_t at = ptx.find(entry); at != ptx.npos; at = ptx.find(entry, at)) {
      at += entry.size();
      const std::string kernel(ptx.substr(at, ptx.find('(', at) - at));
      for (const cuda::Image& image : std::span(module->images, module->image_count)) {
        const cuda::Resources of = resources_of(image, kernel);
        CHECK(of.registers > 0 && of.registers < 256, kernel, " ", of.registers);
        std::cout << module->name << ' ' << image.sm << ' ' << kernel << ' ' << of.registers << ' ' << of.shared_bytes
                  << ' ' << of.max_threads << '\n';
      }
      check_text(error_of([&] { resources_of(module->images[0], kernel + "_"); }), {"the cubin for sm_", "no kernel"});
    }
  }
}

// ---- What cannot be done ----

void a_driver_too_old_for_ptx() {
  fake().version = 12020;
  const Decompress small;
  check_text(error_of([&] { small.run(); }),
             {"no cubin for sm_80", "the CUDA driver is of version 12.2, and 12.5 or newer is needed"});
}

void an_older_driver() {
  check_text(error_of([] { DriverMachine(0, nullptr); }), {"libcuda.so.1 has no cu", "of version 11.4, and 12.5"});
}

void no_driver() {
  check_text(error_of([] { DriverMachine(0, nullptr); }), {"there is no CUDA driver", "libcuda.so.1"});
}

void limits_are_named() {
  const auto refused = [](auto change, std::initializer_list<const char*> parts) {
    Decompress small;
    change(small.launch);
    const size_t before = fake().launches.size();
    check_text(error_of([&] { small.run(); }), {"kernel 'decompress_b8' cannot be launched on sm_80: "});
    check_text(error_of([&] { small.run(); }), parts);
    CHECK(fake().launches.size() == before);
  };
  using cuda::Launch;
  refused([](Launch& launch) { launch.grid.x = 0; }, {"grid.x must be 1 to 2147483647; got 0"});
  refused([](Launch& launch) { launch.grid.y = 70000; }, {"grid.y must be 1 to 65535; got 70000"});
  refused([](Launch& launch) { launch.grid.z = 65536; }, {"grid.z must be 1 to 65535; got 65536"});
  refused([](Launch& launch) { launch.block = {1025}; }, {"block.x must be 1 to 1024; got 1025"});
  refused([](Launch& launch) { launch.block = {1, 1, 65}; }, {"block.z must be 1 to 64; got 65"});
  refused([](Launch& launch) { launch.block = {64, 17}; }, {"threads of a block must be 1 to 1024; got 1088"});
  refused([](Launch& launch) { launch.shared_bytes = (163 << 10) + 1; },
          {"bytes of shared memory, 0 of them static, must be at most 166912; got 166913"});
  refused([](Launch& launch) { launch.ranges[0].alignment = 2, launch.ranges[0].data = reinterpret_cast<void*>(7); },
          {"the pointer at byte 0 of its arguments must be a multiple of 2; got 7"});

  // Registers are a cubin's: 128 a thread are 65536 in 512 threads; those beyond come four warps at a time.
  Decompress small;
  small.launch.block = {512};
  const cuda::Device device{80, 1, 163 << 10};
  check_launch(small.launch, device, {128, 0, 0});
  check_text(error_of([&] { check_launch(small.launch, device, {129, 0, 0}); }),
             {"registers of a block, 129 a thread, must be at most 65536; got 69632"});
  small.launch.block = {480};
  check_text(error_of([&] { check_launch(small.launch, device, {136, 0, 0}); }), {"got 69632"});
  check_text(error_of([&] { check_launch(small.launch, device, {32, 0, 256}); }), {"must be 1 to 256; got 480"});
  small.launch.shared_bytes = 100 << 10;
  check_text(error_of([&] { check_launch(small.launch, device, {32, 64 << 10, 0}); }), {"65536 of them static"});
}

void dynamic_shared_memory_is_asked_for() {
  Decompress small;
  small.launch.shared_bytes = 163 << 10;
  small.run();
  CHECK(fake().launches.back().shared_bytes == 163 << 10 && small.is_done());
}

// Each call that a launch makes, refused.
void every_refusal_names_the_call() {
  for (const char* call : {"cuInit", "cuDeviceGet", "cuDeviceGetAttribute", "cuCtxGetCurrent", "cuCtxSetCurrent",
                           "cuDevicePrimaryCtxRetain", "cuThreadExchangeStreamCaptureMode", "cuLibraryLoadData",
                           "cuLibraryGetKernel", "cuKernelGetFunction", "cuKernelSetAttribute", "cuLaunchKernelEx"}) {
    const pid_t child = fork();  // before the first call
    if (child != 0) {
      int status = 0;
      CHECK(waitpid(child, &status, 0) == child && status == 0, call);
      continue;
    }
    fake().failing[call] = CUDA_ERROR_NOT_PERMITTED;
    uint8_t nothing[4] = {};
    const cuda::Launch launch =
        cuda::describe_decompress(nothing, nothing, nothing, 1, 4, Element::I8, Pattern::TWO_FOUR);
    const bool loads = std::strstr(call, "Library") || std::strstr(call, "GetFunction");  // one of three, the same text
    check_text(error_of([&] { DriverMachine(0, nullptr).run(launch); }),
               {loads ? "cuLibraryLoadData, from PTX" : call, " failed: an error of the stand-in (800)"});
    _exit(0);
  }
}

// A context of another device is current.
void cuCtxGetDevice_refused() {
  Decompress small;
  small.run();
  fake().failing["cuCtxGetDevice"] = CUDA_ERROR_NOT_PERMITTED;
  check_text(error_of([&] { small.run(1); }), {"cuCtxGetDevice failed"});
  fake().failing.clear();
}

// What a kernel does to memory that is not its own is an error of the launch, in the stand-in.
void a_bad_pointer_is_found() {
  Decompress small;
  small.launch = cuda::describe_decompress(small.values.get<void>(), small.meta.get<uint8_t>(), small.dense.get<void>(),
                                           2, 4, Element::I8, Pattern::TWO_FOUR);
  check_text(error_of([&] { small.run(); }), {"cuLaunchKernelEx of 'decompress_b8' failed"});
  check_text(fake().findings, {"out_of_bounds"});
}

// ---- A process each ----

struct Test {
  const char* name;
  void (*run)();
  const char* driver;  // the folder of its libcuda.so.1, beside the stand-in's
};
#define TEST(NAME) {#NAME, NAME, "fake"}
const Test TESTS[] = {
    TEST(device_is_described),
    TEST(cold_thread),
    TEST(second_device),
    TEST(launches_keep_their_stream),
    TEST(launches_can_be_captured),
    TEST(threads_launch_at_once),
    TEST(images_are_chosen_by_compute_capability),
    TEST(resources_are_read_from_every_cubin),
    TEST(a_cubin_runs_where_there_is_one),
    TEST(refused_cubins_fall_back_to_ptx),
    TEST(a_device_without_cubin_runs_ptx),
    TEST(a_driver_too_old_for_ptx),
    {"an_older_driver", an_older_driver, "old"},
    {"no_driver", no_driver, "empty"},
    TEST(limits_are_named),
    TEST(dynamic_shared_memory_is_asked_for),
    TEST(every_refusal_names_the_call),
    TEST(cuCtxGetDevice_refused),
    TEST(a_bad_pointer_is_found),
};

}  // namespace

int main(int argc, char** argv) {
  for (const Test& test : TESTS) {
    if (argc != 2 || std::string(argv[1]) != test.name) continue;
    if (std::string(test.driver) == "fake") fake();
    test.run();
    return 0;
  }
  CHECK(argc == 1, "no test ", argv[1]);
  const char* stand_in = getenv("LD_LIBRARY_PATH");
  CHECK(stand_in, "LD_LIBRARY_PATH must be the stand-in's folder");
  const std::filesystem::path folders = std::filesystem::path(stand_in).parent_path();
  for (const Test& test : TESTS) {
    const pid_t child = fork();
    if (child == 0) {
      setenv("LD_LIBRARY_PATH", (folders / test.driver).c_str(), 1);
      execl("/proc/self/exe", argv[0], test.name, nullptr);
      _exit(127);
    }
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child && status == 0, test.name);
  }
  return 0;
}
