// What a test may ask of, and tell, the stand-in for libcuda.so.1.
#pragma once
#include <cuda.h>

#include <functional>
#include <map>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "csrc/cuda/launch.h"

struct FakeDevice {
  int sm, multiprocessors, shared_bytes_per_block;
};

struct FakeLaunch {
  std::string kernel;
  int device;
  CUstream stream;
  unsigned shared_bytes;
  bool from_ptx;  // compiled by the driver
};

struct FakeCuda {
  // What it is. Cubins need 13.0, PTX 8.5 needs 12.5.
  int version = 13000;
  std::vector<FakeDevice> devices = {{80, 108, 163 << 10}, {90, 132, 227 << 10}, {121, 48, 99 << 10}};
  std::span<const sparse24::cuda::Module* const> modules;  // whose cubins it recognises; each runs its module's PTX
  std::map<std::string, std::string> edited_ptx;           // of a module, run in its place
  std::map<std::string, CUresult> failing;                 // entry points, by name
  std::set<CUstream> capturing;                            // streams that capture a graph

  // What it has seen.
  std::vector<FakeLaunch> launches;
  std::vector<std::function<void()>> graph;  // the launches of capturing streams, which are not run
  std::map<std::string, int> calls;          // of each entry point
  std::string findings;                      // of the emulator, in its words
  int allocations = 0;                       // that have not been freed
  bool capture_broken = false;               // by a call that is not allowed then
};

extern "C" FakeCuda* fake_cuda();  // found with dlsym in the library itself
