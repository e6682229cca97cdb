// Sums over the rows of a small matrix of partial sums, in a fixed order.
#pragma once
#include "cuda/portable.cuh"

namespace megalm::cuda {

constexpr int kSumColumns = 32, kSumLines = 16;

// Sums of the columns of `partial`: the first `cols` of them to y, the others to z. Blocks of kSumColumns x kSumLines
// threads, a column for each x.
template <class T>
__global__ void __launch_bounds__(kSumColumns * kSumLines)
    sum_rows(const float* partial, int64_t partials, int64_t width, int64_t cols, T* y, T* z) {
  MEGALM_SHARED(float, lines, kSumLines * kSumColumns);
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kSumColumns + threadIdx.x;
  float sum = 0.f;
  if (j < width)
    for (int64_t p = threadIdx.y; p < partials; p += kSumLines) sum += partial[p * width + j];
  lines[threadIdx.y * kSumColumns + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && j < width) {
#pragma unroll
    for (int line = 1; line < kSumLines; ++line) sum += lines[line * kSumColumns + threadIdx.x];
    (j < cols ? y[j] : z[j - cols]) = from_float<T>(sum);
  }
}

// y[j] = sum over p of partial[p][j]; with z, rows are twice as wide, and their second halves are summed there.
template <class T>
void launch_sum_rows(const float* partial, int64_t partials, int64_t cols, void* y, void* stream, void* z = nullptr) {
  const int64_t width = z == nullptr ? cols : 2 * cols;
  MEGALM_LAUNCH(sum_rows<T>, dim3(ceil_div(width, kSumColumns)), dim3(kSumColumns, kSumLines), 0, stream, partial, partials,
                width, cols, static_cast<T*>(y), static_cast<T*>(z));
}

}  // namespace megalm::cuda
