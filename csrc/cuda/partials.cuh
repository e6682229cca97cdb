// Sums over the rows of a small matrix of partial sums, in a fixed order.
#pragma once
#include "cuda/portable.cuh"

namespace megalm::cuda {

constexpr int kSumColumns = 32, kSumLines = 16;

// y[j] = sum over p of partial[p][j]: blocks of kSumColumns x kSumLines threads, a column for each x.
template <class T>
__global__ void __launch_bounds__(kSumColumns * kSumLines)
    sum_rows(const float* partial, int64_t partials, int64_t cols, T* y) {
  MEGALM_SHARED(float, lines, kSumLines * kSumColumns);
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kSumColumns + threadIdx.x;
  float sum = 0.f;
  if (j < cols)
    for (int64_t p = threadIdx.y; p < partials; p += kSumLines) sum += partial[p * cols + j];
  lines[threadIdx.y * kSumColumns + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && j < cols) {
#pragma unroll
    for (int line = 1; line < kSumLines; ++line) sum += lines[line * kSumColumns + threadIdx.x];
    y[j] = from_float<T>(sum);
  }
}

template <class T>
void launch_sum_rows(const float* partial, int64_t partials, int64_t cols, void* y, void* stream) {
  MEGALM_LAUNCH(sum_rows<T>, dim3(ceil_div(cols, kSumColumns)), dim3(kSumColumns, kSumLines), 0, stream, partial, partials, cols,
                static_cast<T*>(y));
}

}  // namespace megalm::cuda
