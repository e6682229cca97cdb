// Softmax of attention scores: a group of threads holds a row in registers, so that it is read once; wider rows are walked
// over instead. Rows whose addresses or width do not allow 16-byte access are held element by element.
#include "include/softmax.h"

#include "cuda/held.cuh"
#include "cuda/portable.cuh"

namespace megalm::cuda {
namespace {

// What a row may attend to.
struct Seen {
  const uint8_t* mask;
  int64_t keys;  // those from here on are not

  __device__ __forceinline__ Seen(const MegalmSoftmaxForward& a, int64_t row) {
    mask = a.mask == nullptr ? nullptr : a.mask + row / a.per_batch * a.keys;
    keys = a.keys;
    if (a.causal) {
      const int64_t last = a.first_query + row % a.queries + 1;
      keys = last < keys ? (last > 0 ? last : 0) : keys;
    }
  }
  __device__ __forceinline__ bool operator()(int64_t j) const { return j < keys && (mask == nullptr || mask[j] != 0); }
};

// Rows of at most HELD vectors of W elements for each thread.
template <class T, int W, int HELD>
__global__ void __launch_bounds__(kThreads) forward_held(const MegalmSoftmaxForward a) {
  using V = Vec<T, W>;
  MEGALM_SHARED(float, shared, kMaxWarps);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool live = row < a.rows;
  const int64_t at = (live ? row : 0) * (a.keys / W);
  const int vectors = static_cast<int>(a.keys / W);
  const Seen seen(a, live ? row : 0);
  float held[HELD][W];
  unsigned bits = 0;  // of elements that are attended to
  float top = -INFINITY;
#pragma unroll
  for (int u = 0; u < HELD; ++u) {
    const int i = threadIdx.x + u * blockDim.x;
    V x;
    const bool any = live && i < vectors && static_cast<int64_t>(i) * W < seen.keys;
    if (any) x = (static_cast<const V*>(a.x) + at)[i];
#pragma unroll
    for (int k = 0; k < W; ++k) {
      const bool counts = any && seen(static_cast<int64_t>(i) * W + k);
      held[u][k] = counts ? to_float(x.v[k]) * a.scale : -INFINITY;
      if (counts) bits |= 1u << (u * W + k);
      top = fmaxf(top, held[u][k]);
    }
  }
  top = row_reduce(top, Max{}, shared);
  float sum = 0.f;
#pragma unroll
  for (int u = 0; u < HELD; ++u)
#pragma unroll
    for (int k = 0; k < W; ++k) {
      const bool counts = (bits >> (u * W + k) & 1u) != 0;
      held[u][k] = counts ? __expf(held[u][k] - top) : 0.f;
      sum += held[u][k];
    }
  sum = row_reduce(sum, Add{}, shared);
  if (!live) return;
  const float share = 1.f / sum;
#pragma unroll
  for (int u = 0; u < HELD; ++u) {
    const int i = threadIdx.x + u * blockDim.x;
    if (i < vectors) {
      V y;
#pragma unroll
      for (int k = 0; k < W; ++k) y.v[k] = from_float<T>((bits >> (u * W + k) & 1u) != 0 ? held[u][k] * share : 0.f);
      (static_cast<V*>(a.y) + at)[i] = y;
    }
  }
}

// Rows of any width, one for each block.
template <class T>
__global__ void __launch_bounds__(kThreads) forward_walked(const MegalmSoftmaxForward a) {
  MEGALM_SHARED(float, shared, kMaxWarps);
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(a.x) + row * a.keys;
  T* y = static_cast<T*>(a.y) + row * a.keys;
  const Seen seen(a, row);
  float top = -INFINITY;
  for (int64_t j = threadIdx.x; j < seen.keys; j += blockDim.x)
    if (seen(j)) top = fmaxf(top, to_float(x[j]) * a.scale);
  top = row_reduce(top, Max{}, shared);
  float sum = 0.f;
  for (int64_t j = threadIdx.x; j < seen.keys; j += blockDim.x)
    if (seen(j)) sum += __expf(to_float(x[j]) * a.scale - top);
  const float share = 1.f / row_reduce(sum, Add{}, shared);
  for (int64_t j = threadIdx.x; j < a.keys; j += blockDim.x)
    y[j] = from_float<T>(seen(j) ? __expf(to_float(x[j]) * a.scale - top) * share : 0.f);
}

template <class T, int W, int HELD>
__global__ void __launch_bounds__(kThreads) backward_held(const MegalmSoftmaxBackward a) {
  using V = Vec<T, W>;
  MEGALM_SHARED(float, shared, kMaxWarps);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool live = row < a.rows;
  const int64_t at = (live ? row : 0) * (a.keys / W);
  const int vectors = static_cast<int>(a.keys / W);
  V y[HELD], dy[HELD];
  float along = 0.f;
#pragma unroll
  for (int u = 0; u < HELD; ++u) {
    const int i = threadIdx.x + u * blockDim.x;
    if (live && i < vectors) {
      y[u] = (static_cast<const V*>(a.y) + at)[i];
      dy[u] = (static_cast<const V*>(a.dy) + at)[i];
    }
  }
#pragma unroll
  for (int u = 0; u < HELD; ++u)
    if (live && static_cast<int>(threadIdx.x + u * blockDim.x) < vectors) {
#pragma unroll
      for (int k = 0; k < W; ++k) along += to_float(y[u].v[k]) * to_float(dy[u].v[k]);
    }
  along = row_reduce(along, Add{}, shared);
#pragma unroll
  for (int u = 0; u < HELD; ++u) {
    const int i = threadIdx.x + u * blockDim.x;
    if (live && i < vectors) {
      V dx;
#pragma unroll
      for (int k = 0; k < W; ++k)
        dx.v[k] = from_float<T>(a.scale * to_float(y[u].v[k]) * (to_float(dy[u].v[k]) - along));
      (static_cast<V*>(a.dx) + at)[i] = dx;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) backward_walked(const MegalmSoftmaxBackward a) {
  MEGALM_SHARED(float, shared, kMaxWarps);
  const int64_t at = static_cast<int64_t>(blockIdx.x) * a.keys;
  const T* y = static_cast<const T*>(a.y) + at;
  const T* dy = static_cast<const T*>(a.dy) + at;
  T* dx = static_cast<T*>(a.dx) + at;
  float along = 0.f;
  for (int64_t j = threadIdx.x; j < a.keys; j += blockDim.x) along += to_float(y[j]) * to_float(dy[j]);
  along = row_reduce(along, Add{}, shared);
  for (int64_t j = threadIdx.x; j < a.keys; j += blockDim.x)
    dx[j] = from_float<T>(a.scale * to_float(y[j]) * (to_float(dy[j]) - along));
}

// Calls f(W, HELD, grid, block) for rows that can be held; returns whether they can.
template <class T, class F>
bool held(int64_t rows, int64_t keys, bool is_wide, const F& f) {
  const int64_t vectors = is_wide ? keys / kWide<T> : keys;
  const int threads = threads_for_row(vectors);
  if (threads == 0) return false;
  const int lines = rows_of_block(threads);
  const dim3 grid(ceil_div(rows, lines)), block(threads, lines);
  const auto each = [&](auto width) { with_held(vectors, threads, [&](auto held) { f(width, held, grid, block); }); };
  if (is_wide) each(std::integral_constant<int, kWide<T>>{});
  else each(std::integral_constant<int, 1>{});
  return true;
}

}  // namespace
}  // namespace megalm::cuda

extern "C" int megalm_cuda_softmax_forward(const MegalmSoftmaxForward* a, void* stream) {
  using namespace megalm::cuda;
  return with_dtype(a->dtype, [&](auto element) {
    using T = decltype(element);
    const bool done = held<T>(a->rows, a->keys, wide<T>(a->keys, a->x, a->y), [&](auto w, auto h, dim3 grid, dim3 block) {
      MEGALM_LAUNCH((forward_held<T, decltype(w)::value, decltype(h)::value>), grid, block, 0, stream, *a);
    });
    if (!done) MEGALM_LAUNCH(forward_walked<T>, dim3(a->rows), dim3(kThreads), 0, stream, *a);
  });
}

extern "C" int megalm_cuda_softmax_backward(const MegalmSoftmaxBackward* a, void* stream) {
  using namespace megalm::cuda;
  return with_dtype(a->dtype, [&](auto element) {
    using T = decltype(element);
    const bool is_wide = wide<T>(a->keys, a->dy, a->y, a->dx);
    const bool done = held<T>(a->rows, a->keys, is_wide, [&](auto w, auto h, dim3 grid, dim3 block) {
      MEGALM_LAUNCH((backward_held<T, decltype(w)::value, decltype(h)::value>), grid, block, 0, stream, *a);
    });
    if (!done) MEGALM_LAUNCH(backward_walked<T>, dim3(a->rows), dim3(kThreads), 0, stream, *a);
  });
}
