// Sorts each row of x[rows, 16] in place: a thread has a row in local memory, and a function that is not inlined.
constexpr int COLUMNS = 16;

__device__ __noinline__ void insert(float* sorted, int count, float value) {
  int place = count;
  while (place > 0 && sorted[place - 1] > value) {
    sorted[place] = sorted[place - 1];
    --place;
  }
  sorted[place] = value;
}

extern "C" __global__ void sort(float* x, int rows) {
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  float sorted[COLUMNS];
  for (int i = 0; i < COLUMNS; ++i) insert(sorted, i, x[row * COLUMNS + i]);
  for (int i = 0; i < COLUMNS; ++i) x[row * COLUMNS + i] = sorted[i];
}
