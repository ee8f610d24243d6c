// linear_sm80.cuh for bfloat16.
#define SPARSE24_WEIGHT BF16Weight
#define SPARSE24_NAME(TILE) linear_bf16_##TILE
#include "linear_kernels.cuh"
