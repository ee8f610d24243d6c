// The libcuda.so.1 of a driver for CUDA 11.4, as far as it is looked at: it lacks entry points that are needed.
#include <cuda.h>

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) {
  *version = 11040;
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult, const char**) { return CUDA_ERROR_INVALID_VALUE; }
