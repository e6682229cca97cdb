// Dropout: a thread draws one Philox block, the bits of 16 features, and a warp hands these bits around so that its
// accesses are 16 bytes a thread, side by side. Rows whose width is no multiple of 16 are read feature by feature.
#include "include/dropout.h"

#include "cuda/partials.cuh"
#include "cuda/portable.cuh"
#include "include/philox.h"

namespace megalm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int kStretch = kWarp * kDraws;  // features that a warp takes at once

// Bit k: whether feature k of the block is kept.
__device__ __forceinline__ uint32_t kept(const MegalmDropoutMask& m, int64_t row, int64_t block, int64_t per_row) {
  int64_t low = 0, high = m.count;  // the row's span is in [low, high)
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (m.spans[middle * 5] <= row) low = middle;
    else high = middle;
  }
  const int64_t* s = m.spans + low * 5;
  const uint64_t counter = static_cast<uint64_t>((s[3] + row - s[0]) * per_row + block) + 1;
  const Philox p = philox(counter, static_cast<uint64_t>(s[1]), static_cast<uint64_t>(s[2]), static_cast<uint64_t>(s[4]),
                          m.key_low, m.key_high);
  uint32_t bits = 0;
#pragma unroll
  for (int k = 0; k < kDraws; ++k) {
    const int32_t draw = static_cast<int32_t>(p.word[k / 4] >> (k % 4 * 16)) & 0xffff;
    bits |= static_cast<uint32_t>(draw >= m.threshold) << k;
  }
  return bits;
}

// What a value is multiplied by: not selected, since a NaN that is dropped stays one.
__device__ __forceinline__ float factor(const MegalmDropoutMask& m, uint32_t bits, int k) {
  return bits >> k & 1u ? m.scale : 0.f;
}

// Rows of whole blocks: a warp takes 32 consecutive ones, whatever their rows.
template <class T, bool RESIDUAL, bool BIAS>
__global__ void __launch_bounds__(kThreads) forward_wide(const MegalmDropoutForward a) {
  constexpr int W = kWide<T>, PARTS = kDraws / W;
  using V = Vec<T, W>;
  const int lane = threadIdx.x % kWarp;
  const int64_t per_row = a.cols / kDraws, blocks = a.rows * per_row;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp) * kWarp;
  const int64_t base = first * PARTS;  // of the warp's vectors
  V x[PARTS], residual[PARTS];
#pragma unroll
  for (int u = 0; u < PARTS; ++u) {
    const int64_t v = base + u * kWarp + lane;
    if (v < blocks * PARTS) {
      x[u] = static_cast<const V*>(a.x)[v];
      if (RESIDUAL) residual[u] = static_cast<const V*>(a.residual)[v];
    }
  }
  const int64_t mine = first + lane;
  uint32_t bits = 0, column = 0;
  if (mine < blocks) {
    // Few tensors have 2^32 blocks, and a division of 64 bits is slow.
    const int64_t row = blocks >> 32 == 0 ? static_cast<uint32_t>(mine) / static_cast<uint32_t>(per_row) : mine / per_row;
    column = static_cast<uint32_t>(mine - row * per_row);
    bits = kept(a.mask, row, column, per_row);
  }
#pragma unroll
  for (int u = 0; u < PARTS; ++u) {
    const int from = (u * kWarp + lane) / PARTS, part = lane % PARTS;
    const uint32_t its = __shfl_sync(0xffffffffu, bits, from) >> (part * W);
    const uint32_t at = BIAS ? __shfl_sync(0xffffffffu, column, from) : 0;
    const int64_t v = base + u * kWarp + lane;
    if (v >= blocks * PARTS) continue;
    V bias, y;
    if (BIAS) bias = static_cast<const V*>(a.bias)[static_cast<int64_t>(at) * PARTS + part];
#pragma unroll
    for (int k = 0; k < W; ++k) {
      const float value = BIAS ? to_float(x[u].v[k]) + to_float(bias.v[k]) : to_float(x[u].v[k]);
      const float dropped = value * factor(a.mask, its, k);
      y.v[k] = from_float<T>(RESIDUAL ? to_float(residual[u].v[k]) + dropped : dropped);
    }
    static_cast<V*>(a.y)[v] = y;
  }
}

// Rows of any width: a thread for each block.
template <class T>
__global__ void __launch_bounds__(kThreads) forward_narrow(const MegalmDropoutForward a) {
  const int64_t per_row = (a.cols + kDraws - 1) / kDraws;
  const int64_t mine = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (mine >= a.rows * per_row) return;
  const int64_t row = mine / per_row, column = mine % per_row;
  const uint32_t bits = kept(a.mask, row, column, per_row);
#pragma unroll 4
  for (int k = 0; k < kDraws; ++k) {
    const int64_t j = column * kDraws + k;
    if (j >= a.cols) break;
    const int64_t i = row * a.cols + j;
    float v = to_float(static_cast<const T*>(a.x)[i]);
    if (a.bias != nullptr) v += to_float(static_cast<const T*>(a.bias)[j]);
    v *= factor(a.mask, bits, k);
    if (a.residual != nullptr) v += to_float(static_cast<const T*>(a.residual)[i]);
    static_cast<T*>(a.y)[i] = from_float<T>(v);
  }
}

// Gradients of x and bias: blockIdx.x is the 512 columns, blockIdx.y the rows that a thread block walks over, a warp at a
// row; its sums go to one row of `partial`.
template <class T, bool WIDE>
__global__ void __launch_bounds__(kThreads) backward_with_bias(const MegalmDropoutBackward a) {
  constexpr int W = WIDE ? kWide<T> : 1, PARTS = kDraws / W;
  using V = Vec<T, W>;
  MEGALM_SHARED(float, shared, kWarps * kStretch);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t per_row = (a.cols + kDraws - 1) / kDraws, column = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  const int64_t base = static_cast<int64_t>(blockIdx.x) * kStretch;
  float sums[kDraws];
#pragma unroll
  for (int k = 0; k < kDraws; ++k) sums[k] = 0.f;
  const int64_t begin = a.rows * blockIdx.y / a.partials, end = a.rows * (blockIdx.y + 1) / a.partials;
  for (int64_t row = begin + warp; row < end; row += kWarps) {
    const T* dy = static_cast<const T*>(a.dy) + row * a.cols + base;
    T* dx = static_cast<T*>(a.dx) + row * a.cols + base;
    V g[PARTS];
#pragma unroll
    for (int u = 0; u < PARTS; ++u) {
      const int j = (u * kWarp + lane) * W;
      if (base + j < a.cols) g[u] = *reinterpret_cast<const V*>(dy + j);
    }
    const uint32_t bits = column < per_row ? kept(a.mask, row, column, per_row) : 0;
#pragma unroll
    for (int u = 0; u < PARTS; ++u) {
      const int j = (u * kWarp + lane) * W;
      const uint32_t its = __shfl_sync(0xffffffffu, bits, j / kDraws) >> (j % kDraws);
      if (base + j >= a.cols) continue;
#pragma unroll
      for (int k = 0; k < W; ++k) {
        const float d = to_float(g[u].v[k]) * factor(a.mask, its, k);
        sums[u * W + k] += d;
        g[u].v[k] = from_float<T>(d);
      }
      *reinterpret_cast<V*>(dx + j) = g[u];
    }
  }
#pragma unroll
  for (int u = 0; u < PARTS; ++u)
#pragma unroll
    for (int k = 0; k < W; ++k) shared[warp * kStretch + (u * kWarp + lane) * W + k] = sums[u * W + k];
  __syncthreads();
  for (int j = threadIdx.x; j < kStretch && base + j < a.cols; j += kThreads) {
    float sum = 0.f;
    for (int w = 0; w < kWarps; ++w) sum += shared[w * kStretch + j];
    a.partial[blockIdx.y * a.cols + base + j] = sum;
  }
}

template <class T>
void forward(const MegalmDropoutForward& a, void* stream) {
  const dim3 grid(ceil_div(a.rows * ceil_div(a.cols, kDraws), kThreads)), threads(kThreads);
  if (a.cols % kDraws != 0 || !wide<T>(a.cols, a.x, a.residual, a.bias, a.y))
    MEGALM_LAUNCH(forward_narrow<T>, grid, threads, 0, stream, a);
  else if (a.residual != nullptr && a.bias != nullptr)
    MEGALM_LAUNCH((forward_wide<T, true, true>), grid, threads, 0, stream, a);
  else if (a.residual != nullptr)
    MEGALM_LAUNCH((forward_wide<T, true, false>), grid, threads, 0, stream, a);
  else if (a.bias != nullptr)
    MEGALM_LAUNCH((forward_wide<T, false, true>), grid, threads, 0, stream, a);
  else
    MEGALM_LAUNCH((forward_wide<T, false, false>), grid, threads, 0, stream, a);
}

template <class T>
void backward(const MegalmDropoutBackward& a, void* stream) {
  if (a.dbias == nullptr) {
    MegalmDropoutForward f{};
    f.x = a.dy, f.y = a.dx, f.mask = a.mask, f.rows = a.rows, f.cols = a.cols, f.dtype = a.dtype;
    return forward<T>(f, stream);
  }
  const dim3 grid(ceil_div(a.cols, kStretch), a.partials), threads(kThreads);
  if (wide<T>(a.cols, a.dy, a.dx)) MEGALM_LAUNCH((backward_with_bias<T, true>), grid, threads, 0, stream, a);
  else MEGALM_LAUNCH((backward_with_bias<T, false>), grid, threads, 0, stream, a);
  launch_sum_rows<T>(a.partial, a.partials, a.cols, a.dbias, stream);
}

}  // namespace
}  // namespace megalm::cuda

extern "C" int megalm_cuda_dropout_forward(const MegalmDropoutForward* a, void* stream) {
  using namespace megalm::cuda;
  return with_dtype(a->dtype, [&](auto element) { forward<decltype(element)>(*a, stream); });
}

extern "C" int megalm_cuda_dropout_backward(const MegalmDropoutBackward* a, void* stream) {
  using namespace megalm::cuda;
  return with_dtype(a->dtype, [&](auto element) { backward<decltype(element)>(*a, stream); });
}

// Enough that the blocks over all columns fill the device twice; each with at least a row for each warp, and enough of
// them that the partial sums are a small part of what is read.
extern "C" int64_t megalm_cuda_dropout_partials(int64_t rows, int64_t cols) {
  using namespace megalm::cuda;
  const int64_t across = ceil_div(cols, kStretch), wanted = ceil_div(8 * static_cast<int64_t>(multiprocessors()), across);
  return std::max<int64_t>(1, std::min({wanted, ceil_div(rows, 8 * kWarps), static_cast<int64_t>(65535)}));
}
