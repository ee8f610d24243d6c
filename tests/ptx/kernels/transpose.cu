// y[columns, rows] = x[rows, columns]^T by tiles in shared memory, with a column of padding against bank conflicts.
constexpr int TILE = 32, ROWS = 8;  // blocks of (32, 8)

extern "C" __global__ void transpose(const float* __restrict__ x, float* __restrict__ y, int rows, int columns) {
  __shared__ float tile[TILE][TILE + 1];
  int row = blockIdx.y * TILE + threadIdx.y, column = blockIdx.x * TILE + threadIdx.x;
  for (int i = 0; i < TILE; i += ROWS)
    if (row + i < rows && column < columns) tile[threadIdx.y + i][threadIdx.x] = x[(row + i) * columns + column];
  __syncthreads();
  row = blockIdx.x * TILE + threadIdx.y, column = blockIdx.y * TILE + threadIdx.x;
  for (int i = 0; i < TILE; i += ROWS)
    if (row + i < columns && column < rows) y[(row + i) * rows + column] = tile[threadIdx.x][threadIdx.y + i];
}
