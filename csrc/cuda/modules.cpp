// The embedded device code: one Module a file of kernels/ (CMakeLists.txt writes the symbols).
#include "csrc/cuda/launch.h"

#define SPARSE24_MODULE(MODULE, STEM)                      \
  extern "C" const unsigned char sparse24_fatbin_##STEM[]; \
  extern "C" const char sparse24_ptx_##STEM[];             \
  const sparse24::cuda::Module sparse24::cuda::MODULE{sparse24_fatbin_##STEM, sparse24_ptx_##STEM};

SPARSE24_MODULE(DECOMPRESS_MODULE, decompress)
