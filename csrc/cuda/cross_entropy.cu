// Cross-entropy: a block reads a token's logits once, each thread keeping a maximum and a sum relative to it; the gradient
// overwrites stretches of rows, many blocks to a row. Rows may start anywhere: what is off 16 bytes is taken one by one.
#include "include/cross_entropy.h"

#include "cuda/portable.cuh"

namespace megalm::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kFewest = 128;  // threads of a block for a short row
constexpr int kFlying = 4;    // vectors that a thread asks for before it uses the first

// A row as elements before the first 16-byte boundary, whole vectors, and elements after them.
template <class T>
struct Row {
  static constexpr int W = kWide<T>;
  int64_t head, vectors, tail;  // the tail's first element

  __device__ __forceinline__ Row(const T* row, int64_t n) {
    const int off = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
    head = off == 0 ? 0 : (n < W - off ? n : W - off);
    vectors = (n - head) / W;
    tail = head + vectors * W;
  }
};

__device__ __forceinline__ float base_of(float top) { return top == -INFINITY ? 0.f : top; }

template <class T, bool TOTAL>
__global__ void __launch_bounds__(kThreads) statistics(const MegalmCrossEntropyStatistics a) {
  constexpr int W = kWide<T>;
  using V = Vec<T, W>;
  MEGALM_SHARED(float, shared, kMaxWarps);
  const int64_t token = blockIdx.x;
  const T* z = static_cast<const T*>(a.logits) + token * a.stride;
  const Row<T> row(z, a.rows);
  const bool before = threadIdx.x < row.head, after = row.tail + threadIdx.x < a.rows;
  const float first = before ? to_float(z[threadIdx.x]) : -INFINITY;
  const float last = after ? to_float(z[row.tail + threadIdx.x]) : -INFINITY;
  float top = fmaxf(first, last);
  // exp(-inf - base) is 0, that of a NaN is one.
  float sum = __expf(first - base_of(top)) + __expf(last - base_of(top));
  float total = (before ? first : 0.f) + (after ? last : 0.f);
  const V* vectors = reinterpret_cast<const V*>(z + row.head);
  for (int64_t i = threadIdx.x; i < row.vectors; i += static_cast<int64_t>(kFlying) * blockDim.x) {
    V held[kFlying];
#pragma unroll
    for (int u = 0; u < kFlying; ++u)
      if (i + u * blockDim.x < row.vectors) held[u] = vectors[i + u * blockDim.x];
    float higher = top;
#pragma unroll
    for (int u = 0; u < kFlying; ++u)
      if (i + u * blockDim.x < row.vectors) {
#pragma unroll
        for (int k = 0; k < W; ++k) higher = fmaxf(higher, to_float(held[u].v[k]));
      }
    const float base = base_of(higher);
    sum *= __expf(top - base);
    top = higher;
#pragma unroll
    for (int u = 0; u < kFlying; ++u)
      if (i + u * blockDim.x < row.vectors) {
#pragma unroll
        for (int k = 0; k < W; ++k) {
          const float v = to_float(held[u].v[k]);
          sum += __expf(v - base);
          if (TOTAL) total += v;
        }
      }
  }
  const float highest = row_reduce(top, Max{}, shared);
  sum = row_reduce(sum * __expf(top - base_of(highest)), Add{}, shared);
  if (TOTAL) total = row_reduce(total, Add{}, shared);
  if (threadIdx.x != 0) return;
  const int64_t local = a.labels[token] - a.first_row;
  a.maximum[token] = highest;
  a.sum[token] = sum;
  a.target[token] = local >= 0 && local < a.rows ? to_float(z[local]) : 0.f;
  if (TOTAL) a.total[token] = total;
}

template <class T>
__global__ void __launch_bounds__(kThreads) gradient(const MegalmCrossEntropyGradient a, int64_t stretches) {
  constexpr int W = kWide<T>;
  using V = Vec<T, W>;
  for (int64_t piece = blockIdx.x; piece < a.tokens * stretches; piece += gridDim.x) {
    const int64_t token = piece / stretches, stretch = piece % stretches;
    T* z = static_cast<T*>(a.logits) + token * a.stride;
    const Row<T> row(z, a.rows);
    const float top = a.maximum[token], factor = a.factor[token], scale = a.scale[token], same = scale * a.smooth;
    const float label = scale * a.confidence;
    const int64_t local = a.labels[token] - a.first_row;
    const bool live = scale != 0.f;
    const auto value = [&](float v, bool is_label) { return factor * __expf(v - top) - same - (is_label ? label : 0.f); };
    if (stretch == 0) {
      const int64_t ends[2] = {static_cast<int64_t>(threadIdx.x), row.tail + threadIdx.x};
      const int64_t stops[2] = {row.head, a.rows};
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (ends[e] < stops[e])
          z[ends[e]] = from_float<T>(live ? value(to_float(z[ends[e]]), ends[e] == local) : 0.f);
    }
    V* vectors = reinterpret_cast<V*>(z + row.head);
    const int64_t begin = stretch * kFlying * blockDim.x + threadIdx.x;
    V held[kFlying];
#pragma unroll
    for (int u = 0; u < kFlying; ++u)
      if (live && begin + u * blockDim.x < row.vectors) held[u] = vectors[begin + u * blockDim.x];
#pragma unroll
    for (int u = 0; u < kFlying; ++u) {
      const int64_t i = begin + u * blockDim.x;
      if (i < row.vectors) {
        const int64_t at = local - row.head - i * W;
        V out;
#pragma unroll
        for (int k = 0; k < W; ++k) out.v[k] = from_float<T>(live ? value(to_float(held[u].v[k]), k == at) : 0.f);
        vectors[i] = out;
      }
    }
  }
}

// Threads that have `each` vectors to take, in whole warps; a power of two.
int threads_for(int64_t vectors, int each) {
  int threads = kFewest;
  while (threads < kThreads && static_cast<int64_t>(threads) * each < vectors) threads *= 2;
  return threads;
}

}  // namespace
}  // namespace megalm::cuda

extern "C" int megalm_cuda_cross_entropy_statistics(const MegalmCrossEntropyStatistics* a, void* stream) {
  using namespace megalm::cuda;
  return with_dtype(a->dtype, [&](auto element) {
    using T = decltype(element);
    const dim3 grid(a->tokens), block(threads_for(a->rows / kWide<T>, kFlying));
    if (a->total != nullptr) MEGALM_LAUNCH((statistics<T, true>), grid, block, 0, stream, *a);
    else MEGALM_LAUNCH((statistics<T, false>), grid, block, 0, stream, *a);
  });
}

extern "C" int megalm_cuda_cross_entropy_gradient(const MegalmCrossEntropyGradient* a, void* stream) {
  using namespace megalm::cuda;
  return with_dtype(a->dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t vectors = a->rows / kWide<T>;
    const int threads = std::min(256, threads_for(vectors, kFlying));
    const int64_t stretches = std::max<int64_t>(1, ceil_div(vectors, static_cast<int64_t>(threads) * kFlying));
    const int64_t blocks = std::min<int64_t>(a->tokens * stretches, INT32_MAX);
    MEGALM_LAUNCH(gradient<T>, dim3(blocks), dim3(threads), 0, stream, *a, stretches);
  });
}
