// Normalisation: a group of threads holds a row in registers, so that it is read once; rows of odd or huge width are walked
// over instead. The gradient of the weight is summed by few blocks that walk over the rows, then over those blocks.
#include "include/norm.h"

#include "cuda/held.cuh"
#include "cuda/partials.cuh"
#include "cuda/portable.cuh"

namespace megalm::cuda {
namespace {

struct Statistics {
  float mean, rstd;
};

// Of the row whose elements `each` hands to its argument. All threads of the block must come here.
template <class Each>
__device__ __forceinline__ Statistics statistics(const Each& each, bool layer, int cols, float eps, float* shared) {
  Statistics r{0.f, 0.f};
  if (layer) {
    float sum = 0.f;
    each([&](float v) { sum += v; });
    r.mean = row_reduce(sum, Add{}, shared) / static_cast<float>(cols);
  }
  float squares = 0.f;
  each([&](float v) { squares += (v - r.mean) * (v - r.mean); });
  r.rstd = rsqrtf(row_reduce(squares, Add{}, shared) / static_cast<float>(cols) + eps);
  return r;
}

__device__ __forceinline__ void keep(const MegalmNormForward& a, int64_t row, Statistics s) {
  if (threadIdx.x != 0) return;
  if (a.mean != nullptr) a.mean[row] = s.mean;
  a.rstd[row] = s.rstd;
}

// Rows of whole 16-byte vectors, at most HELD for each thread.
template <class T, int HELD>
__global__ void __launch_bounds__(kThreads) forward_held(const MegalmNormForward a) {
  constexpr int W = kWide<T>;
  using V = Vec<T, W>;
  MEGALM_SHARED(float, shared, kMaxWarps);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int vectors = static_cast<int>(a.cols / W);
  const bool live = row < a.rows;
  const int64_t at = (live ? row : 0) * vectors;
  const V* x = static_cast<const V*>(a.x) + at;
  V held[HELD];
#pragma unroll
  for (int u = 0; u < HELD; ++u) {
    const int i = threadIdx.x + u * blockDim.x;
    if (live && i < vectors) {
      held[u] = x[i];
      if (a.residual != nullptr) {
        const V other = (static_cast<const V*>(a.residual) + at)[i];
#pragma unroll
        for (int k = 0; k < W; ++k) held[u].v[k] = from_float<T>(to_float(held[u].v[k]) + to_float(other.v[k]));
        (static_cast<V*>(a.sum) + at)[i] = held[u];
      }
    }
  }
  const auto each = [&](const auto& f) {
#pragma unroll
    for (int u = 0; u < HELD; ++u)
      if (live && static_cast<int>(threadIdx.x + u * blockDim.x) < vectors) {
#pragma unroll
        for (int k = 0; k < W; ++k) f(to_float(held[u].v[k]));
      }
  };
  const Statistics s = statistics(each, a.mean != nullptr, static_cast<int>(a.cols), a.eps, shared);
  if (!live) return;
  keep(a, row, s);
#pragma unroll
  for (int u = 0; u < HELD; ++u) {
    const int i = threadIdx.x + u * blockDim.x;
    if (i < vectors) {
      const V weight = static_cast<const V*>(a.weight)[i];
      V y;
      if (a.bias != nullptr) {
        const V bias = static_cast<const V*>(a.bias)[i];
#pragma unroll
        for (int k = 0; k < W; ++k)
          y.v[k] = from_float<T>((to_float(held[u].v[k]) - s.mean) * s.rstd * (to_float(weight.v[k]) + a.offset) + to_float(bias.v[k]));
      } else {
#pragma unroll
        for (int k = 0; k < W; ++k)
          y.v[k] = from_float<T>((to_float(held[u].v[k]) - s.mean) * s.rstd * (to_float(weight.v[k]) + a.offset));
      }
      (static_cast<V*>(a.y) + at)[i] = y;
    }
  }
}

// Rows of any width, one for each block.
template <class T>
__global__ void __launch_bounds__(kThreads) forward_walked(const MegalmNormForward a) {
  MEGALM_SHARED(float, shared, kMaxWarps);
  const int64_t row = blockIdx.x, at = row * a.cols;
  const T* x = static_cast<const T*>(a.x) + at;
  if (a.residual != nullptr) {
    const T* other = static_cast<const T*>(a.residual) + at;
    T* sum = static_cast<T*>(a.sum) + at;
    // Each thread reads below what it writes here, and nothing else.
    for (int64_t i = threadIdx.x; i < a.cols; i += blockDim.x) sum[i] = from_float<T>(to_float(x[i]) + to_float(other[i]));
    x = sum;
  }
  const auto each = [&](const auto& f) {
    for (int64_t i = threadIdx.x; i < a.cols; i += blockDim.x) f(to_float(x[i]));
  };
  const Statistics s = statistics(each, a.mean != nullptr, static_cast<int>(a.cols), a.eps, shared);
  keep(a, row, s);
  T* y = static_cast<T*>(a.y) + at;
  for (int64_t i = threadIdx.x; i < a.cols; i += blockDim.x) {
    const float normed = (to_float(x[i]) - s.mean) * s.rstd * (to_float(static_cast<const T*>(a.weight)[i]) + a.offset);
    y[i] = from_float<T>(a.bias != nullptr ? normed + to_float(static_cast<const T*>(a.bias)[i]) : normed);
  }
}

// Blocks walk over rows and sum the gradient of the weight in registers; each leaves one row of `partial`.
template <class T, int HELD, bool BIAS>
__global__ void __launch_bounds__(kThreads) backward_held(const MegalmNormBackward a) {
  constexpr int W = kWide<T>;
  using V = Vec<T, W>;
  MEGALM_SHARED(float, shared, kMaxWarps);
  MEGALM_DYNAMIC_SHARED(float, sums);  // (1 or 2, cols) where the block has several rows
  const int vectors = static_cast<int>(a.cols / W);
  // Sums of as many columns leave no registers for a row, which is read again, from the nearest cache.
  constexpr bool kAgain = BIAS && HELD * W > 16;
  float dweight[HELD][W], dbias[BIAS ? HELD : 1][W];
#pragma unroll
  for (int u = 0; u < HELD; ++u)
#pragma unroll
    for (int k = 0; k < W; ++k) {
      dweight[u][k] = 0.f;
      if (BIAS) dbias[u][k] = 0.f;
    }
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; first < a.rows; first += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    const int64_t row = first + threadIdx.y;
    const bool live = row < a.rows;
    const int64_t at = (live ? row : 0) * vectors;
    const float rstd = live ? a.rstd[row] : 0.f, mean = live && a.mean != nullptr ? a.mean[row] : 0.f;
    V x[HELD], dy[HELD];
    float along = 0.f, total = 0.f;
#pragma unroll
    for (int u = 0; u < HELD; ++u) {
      const int i = threadIdx.x + u * blockDim.x;
      if (live && i < vectors) {
        x[u] = (static_cast<const V*>(a.x) + at)[i];
        dy[u] = (static_cast<const V*>(a.dy) + at)[i];
        const V weight = static_cast<const V*>(a.weight)[i];
#pragma unroll
        for (int k = 0; k < W; ++k) {
          const float normed = (to_float(x[u].v[k]) - mean) * rstd, g = to_float(dy[u].v[k]);
          const float scaled = g * (to_float(weight.v[k]) + a.offset);
          along += scaled * normed;
          total += scaled;
          dweight[u][k] += g * normed;
          if (BIAS) dbias[u][k] += g;
        }
      }
    }
    const float c = row_reduce(along, Add{}, shared) / static_cast<float>(a.cols);
    const float b = a.mean == nullptr ? 0.f : row_reduce(total, Add{}, shared) / static_cast<float>(a.cols);
#pragma unroll
    for (int u = 0; u < HELD; ++u) {
      const int i = threadIdx.x + u * blockDim.x;
      if (live && i < vectors) {
        if (kAgain) {
          x[u] = (static_cast<const V*>(a.x) + at)[i];
          dy[u] = (static_cast<const V*>(a.dy) + at)[i];
        }
        const V weight = static_cast<const V*>(a.weight)[i];
        V dx;
#pragma unroll
        for (int k = 0; k < W; ++k) {
          const float normed = (to_float(x[u].v[k]) - mean) * rstd;
          const float d = rstd * (to_float(dy[u].v[k]) * (to_float(weight.v[k]) + a.offset) - b - normed * c);
          dx.v[k] = from_float<T>(d);
          if (a.dsum != nullptr) dx.v[k] = from_float<T>(d + to_float((static_cast<const V*>(a.dsum) + at)[i].v[k]));
        }
        (static_cast<V*>(a.dx) + at)[i] = dx;
      }
    }
  }
  float* partial = a.partial + static_cast<int64_t>(blockIdx.x) * (BIAS ? 2 : 1) * a.cols;
  // Rows of threads add up in turn: the order is fixed, and so is the result.
  for (int turn = 0; turn < static_cast<int>(blockDim.y); ++turn) {
    if (static_cast<int>(threadIdx.y) == turn) {
      const bool last = turn + 1 == static_cast<int>(blockDim.y);
#pragma unroll
      for (int u = 0; u < HELD; ++u) {
        const int i = threadIdx.x + u * blockDim.x;
        if (i < vectors) {
#pragma unroll
          for (int k = 0; k < W; ++k) {
            const int64_t j = static_cast<int64_t>(i) * W + k;
            const float w = dweight[u][k] + (turn == 0 ? 0.f : sums[j]);
            (last ? partial : sums)[j] = w;
            if (BIAS) {
              const float v = dbias[u][k] + (turn == 0 ? 0.f : sums[a.cols + j]);
              (last ? partial : sums)[a.cols + j] = v;
            }
          }
        }
      }
    }
    __syncthreads();
  }
}

// The gradient of x, rows of any width, one for each block.
template <class T>
__global__ void __launch_bounds__(kThreads) backward_walked(const MegalmNormBackward a) {
  MEGALM_SHARED(float, shared, kMaxWarps);
  const int64_t row = blockIdx.x, at = row * a.cols;
  const T* x = static_cast<const T*>(a.x) + at;
  const T* dy = static_cast<const T*>(a.dy) + at;
  const T* weight = static_cast<const T*>(a.weight);
  const float rstd = a.rstd[row], mean = a.mean != nullptr ? a.mean[row] : 0.f;
  float along = 0.f, total = 0.f;
  for (int64_t i = threadIdx.x; i < a.cols; i += blockDim.x) {
    const float scaled = to_float(dy[i]) * (to_float(weight[i]) + a.offset);
    along += scaled * (to_float(x[i]) - mean) * rstd;
    total += scaled;
  }
  const float c = row_reduce(along, Add{}, shared) / static_cast<float>(a.cols);
  const float b = a.mean == nullptr ? 0.f : row_reduce(total, Add{}, shared) / static_cast<float>(a.cols);
  for (int64_t i = threadIdx.x; i < a.cols; i += blockDim.x) {
    const float normed = (to_float(x[i]) - mean) * rstd;
    float d = rstd * (to_float(dy[i]) * (to_float(weight[i]) + a.offset) - b - normed * c);
    if (a.dsum != nullptr) d += to_float((static_cast<const T*>(a.dsum) + at)[i]);
    (static_cast<T*>(a.dx) + at)[i] = from_float<T>(d);
  }
}

// Partial sums of the weight's gradient over stretches of rows, where rows are walked over: a thread for each column.
template <class T, bool BIAS>
__global__ void __launch_bounds__(kThreads) weight_walked(const MegalmNormBackward a) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (j >= a.cols) return;
  const int64_t begin = a.rows * blockIdx.y / a.partials, end = a.rows * (blockIdx.y + 1) / a.partials;
  float dweight = 0.f, dbias = 0.f;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t i = row * a.cols + j;
    const float mean = a.mean != nullptr ? a.mean[row] : 0.f, g = to_float(static_cast<const T*>(a.dy)[i]);
    dweight += g * (to_float(static_cast<const T*>(a.x)[i]) - mean) * a.rstd[row];
    dbias += g;
  }
  float* partial = a.partial + blockIdx.y * (BIAS ? 2 : 1) * a.cols;
  partial[j] = dweight;
  if (BIAS) partial[a.cols + j] = dbias;
}

int64_t blocks_that_walk(int64_t rows, int lines) { return std::min<int64_t>(ceil_div(rows, lines), 2 * multiprocessors()); }

template <class T>
void forward(const MegalmNormForward& a, void* stream) {
  const int64_t vectors = a.cols / kWide<T>;
  const int threads = threads_for_row(vectors);
  if (threads == 0 || !wide<T>(a.cols, a.x, a.residual, a.weight, a.bias, a.y, a.sum)) {
    MEGALM_LAUNCH(forward_walked<T>, dim3(a.rows), dim3(kThreads), 0, stream, a);
    return;
  }
  const int lines = rows_of_block(threads);
  with_held(vectors, threads, [&](auto held) {
    MEGALM_LAUNCH((forward_held<T, decltype(held)::value>), dim3(ceil_div(a.rows, lines)), dim3(threads, lines), 0, stream, a);
  });
}

template <class T, bool BIAS>
void backward(const MegalmNormBackward& a, void* stream) {
  const int64_t vectors = a.cols / kWide<T>, width = (BIAS ? 2 : 1) * a.cols;
  const int threads = threads_for_row(vectors);
  MegalmNormBackward b = a;
  if (threads == 0 || !wide<T>(a.cols, a.x, a.dy, a.weight, a.dx, a.dsum)) {
    MEGALM_LAUNCH(backward_walked<T>, dim3(a.rows), dim3(kThreads), 0, stream, a);
    MEGALM_LAUNCH((weight_walked<T, BIAS>), dim3(ceil_div(a.cols, kThreads), a.partials), dim3(kThreads), 0, stream, a);
  } else {
    const bool several = (static_cast<size_t>(width) + kMaxWarps) * sizeof(float) <= kSharedBytes;  // both arrays
    const int lines = several ? kThreads / threads : 1;
    b.partials = std::min(a.partials, blocks_that_walk(a.rows, lines));
    const size_t bytes = lines > 1 ? static_cast<size_t>(width) * sizeof(float) : 0;
    with_held(vectors, threads, [&](auto held) {
      MEGALM_LAUNCH((backward_held<T, decltype(held)::value, BIAS>), dim3(b.partials), dim3(threads, lines), bytes, stream, b);
    });
  }
  launch_sum_rows<T>(a.partial, b.partials, a.cols, a.dweight, stream, a.dbias);
}

}  // namespace
}  // namespace megalm::cuda

extern "C" int megalm_cuda_norm_forward(const MegalmNormForward* a, void* stream) {
  using namespace megalm::cuda;
  return with_dtype(a->dtype, [&](auto element) { forward<decltype(element)>(*a, stream); });
}

extern "C" int megalm_cuda_norm_backward(const MegalmNormBackward* a, void* stream) {
  using namespace megalm::cuda;
  return with_dtype(a->dtype, [&](auto element) {
    using T = decltype(element);
    if (a->dbias != nullptr) backward<T, true>(*a, stream);
    else backward<T, false>(*a, stream);
  });
}

extern "C" int64_t megalm_cuda_norm_partials(int64_t rows, int64_t) {
  return megalm::cuda::blocks_that_walk(rows, 1);
}
