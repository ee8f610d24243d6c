// linear_sm80.cuh for float16.
#define SPARSE24_WEIGHT F16Weight
#define SPARSE24_NAME(TILE) linear_f16_##TILE
#include "linear_kernels.cuh"
