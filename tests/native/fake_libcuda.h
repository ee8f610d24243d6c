// What a test may ask of, and tell, the stand-in for libcuda.so.1.
#pragma once

struct FakeCuda {
  bool refuse_cubins = false;  // as a driver older than the cubins does
  int launches = 0;
  int ptx_loads = 0;
  int last_device = -1;
  void* last_stream = nullptr;
};

extern "C" FakeCuda* fake_cuda();  // found with dlsym in the library itself
