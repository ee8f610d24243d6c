// y = the five-point average of x[rows, columns], zero outside, by tiles of 16 x 16 with a border in shared memory.
constexpr int TILE = 16, WIDTH = TILE + 2;  // blocks of (16, 16)

extern "C" __global__ void stencil(const float* __restrict__ x, float* __restrict__ y, int rows, int columns) {
  __shared__ float tile[WIDTH][WIDTH];
  const int row_0 = blockIdx.y * TILE, column_0 = blockIdx.x * TILE;
  for (int i = threadIdx.y * TILE + threadIdx.x; i < WIDTH * WIDTH; i += TILE * TILE) {
    const int row = row_0 + i / WIDTH - 1, column = column_0 + i % WIDTH - 1;
    const bool inside = row >= 0 && row < rows && column >= 0 && column < columns;
    tile[i / WIDTH][i % WIDTH] = inside ? x[row * columns + column] : 0;
  }
  __syncthreads();
  const int row = row_0 + threadIdx.y, column = column_0 + threadIdx.x, r = threadIdx.y + 1, c = threadIdx.x + 1;
  if (row < rows && column < columns)
    y[row * columns + column] =
        0.25f * (tile[r - 1][c] + tile[r + 1][c] + tile[r][c - 1] + tile[r][c + 1]) - tile[r][c];
}
