// linear_sm80.cuh for int8.
#define SPARSE24_WEIGHT I8Weight
#define SPARSE24_NAME(TILE) linear_s8_##TILE
#include "linear_kernels.cuh"
