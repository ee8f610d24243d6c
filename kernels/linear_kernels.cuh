// The kernels of one element type: SPARSE24_WEIGHT (weight_type.cuh), named SPARSE24_NAME(tile).
#include "linear_sm80.cuh"

#define SPARSE24_LINEAR(NAME, TILE, LOADER)                                                                          \
  extern "C" __global__ void __launch_bounds__(sparse24::tiles::TILE_##TILE.threads(),                               \
                                               sparse24::tiles::TILE_##TILE.blocks(sparse24::SPARSE24_WEIGHT::BITS)) \
      SPARSE24_NAME(NAME)(const __grid_constant__ sparse24::LinearArguments arguments) {                             \
    using namespace sparse24::tiles;                                                                                 \
    linear_tile<sparse24::SPARSE24_WEIGHT, TILE_##TILE, Loader::LOADER>(arguments);                                  \
  }
SPARSE24_LINEAR(256x128, 256x128, BY_16)
SPARSE24_LINEAR(192x256, 192x256, BY_16)
SPARSE24_LINEAR(192x128, 192x128, BY_16)
SPARSE24_LINEAR(128x128, 128x128, BY_16)
SPARSE24_LINEAR(64x128, 64x128, BY_16)
SPARSE24_LINEAR(64x64, 64x64, BY_16)
SPARSE24_LINEAR(64x64_by4, 64x64, BY_4)
SPARSE24_LINEAR(64x64_by1, 64x64, BY_1)
#undef SPARSE24_LINEAR
