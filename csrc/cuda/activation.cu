// Gated and biased activations: elementwise in 16-byte vectors, several of them in flight for each thread. The gradient of
// a bias is summed by threads that walk down columns, then over blocks.
#include "include/activation.h"

#include "cuda/partials.cuh"
#include "cuda/portable.cuh"
#include "cuda/tile.cuh"

namespace megalm::cuda {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }

// Each has its value at x, and its derivative there times g.
struct Gelu {
  static __device__ __forceinline__ float cdf(float x) { return 0.5f + 0.5f * erff(x * 0.707106781f); }
  static __device__ __forceinline__ float value(float x) { return x * cdf(x); }
  static __device__ __forceinline__ float gradient(float x, float g) {
    return g * (cdf(x) + x * (0.398942280f * __expf(-0.5f * x * x)));
  }
};

// (1 + tanh(u)) / 2 is sigmoid(2 u).
struct GeluTanh {
  static constexpr float kScale = 1.59576912f;  // 2 sqrt(2 / pi)
  static constexpr float kCube = 0.044715f;
  static __device__ __forceinline__ float part(float x) { return sigmoid(x * (kScale + kScale * kCube * (x * x))); }
  static __device__ __forceinline__ float value(float x) { return x * part(x); }
  static __device__ __forceinline__ float gradient(float x, float g) {
    const float s = part(x);
    return g * (s + x * (s * (1.f - s)) * (kScale + 3.f * kScale * kCube * (x * x)));
  }
};

struct Silu {
  static __device__ __forceinline__ float value(float x) { return x * sigmoid(x); }
  static __device__ __forceinline__ float gradient(float x, float g) {
    const float s = sigmoid(x);
    return g * (s * (1.f + x * (1.f - s)));
  }
};

// A NaN passes, and so does its gradient.
struct Relu {
  static __device__ __forceinline__ float value(float x) { return x < 0.f ? 0.f : x; }
  static __device__ __forceinline__ float gradient(float x, float g) { return x <= 0.f ? 0.f : g; }
};

template <class F>
void with_kind(int32_t kind, const F& f) {
  switch (kind) {
    case MEGALM_GELU: f(Gelu{}); break;
    case MEGALM_GELU_TANH: f(GeluTanh{}); break;
    case MEGALM_SILU: f(Silu{}); break;
    default: f(Relu{}); break;
  }
}

// W: elements of a unit; as many as 16 bytes hold, or 1 where rows are not made of those.
template <class T, int W, class Act>
__global__ void __launch_bounds__(kThreads) gated_forward(const MegalmGatedForward a) {
  constexpr int U = 2;
  using V = Vec<T, W>;
  const int64_t units = a.cols / W;
  const Stretch<U> stretch(a.rows, units);
  V gate[U], up[U];
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const auto place = stretch[u];
    if (!place.live) continue;
    const V* x = static_cast<const V*>(a.x) + 2 * place.row * units + place.unit;
    gate[u] = x[0], up[u] = x[units];
  }
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const auto place = stretch[u];
    if (!place.live) continue;
    V y;
#pragma unroll
    for (int k = 0; k < W; ++k) y.v[k] = from_float<T>(Act::value(to_float(gate[u].v[k])) * to_float(up[u].v[k]));
    static_cast<V*>(a.y)[place.row * units + place.unit] = y;
  }
}

template <class T, int W, class Act>
__global__ void __launch_bounds__(kThreads) gated_backward(const MegalmGatedBackward a) {
  constexpr int U = 2;
  using V = Vec<T, W>;
  const int64_t units = a.cols / W;
  const Stretch<U> stretch(a.rows, units);
  V gate[U], up[U], dy[U];
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const auto place = stretch[u];
    if (!place.live) continue;
    const V* x = static_cast<const V*>(a.x) + 2 * place.row * units + place.unit;
    gate[u] = x[0], up[u] = x[units];
    dy[u] = static_cast<const V*>(a.dy)[place.row * units + place.unit];
  }
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const auto place = stretch[u];
    if (!place.live) continue;
    V dgate, dup;
#pragma unroll
    for (int k = 0; k < W; ++k) {
      const float x = to_float(gate[u].v[k]), g = to_float(dy[u].v[k]);
      dup.v[k] = from_float<T>(g * Act::value(x));
      dgate.v[k] = from_float<T>(Act::gradient(x, g * to_float(up[u].v[k])));
    }
    V* dx = static_cast<V*>(a.dx) + 2 * place.row * units + place.unit;
    dx[0] = dgate, dx[units] = dup;
  }
}

template <class T, int W, class Act, bool BIAS>
__global__ void __launch_bounds__(kThreads) biased_forward(const MegalmBiasActivationForward a) {
  constexpr int U = 4;
  using V = Vec<T, W>;
  const int64_t units = a.cols / W;
  const Stretch<U> stretch(a.rows, units);
  V x[U];
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const auto place = stretch[u];
    if (place.live) x[u] = static_cast<const V*>(a.x)[place.row * units + place.unit];
  }
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const auto place = stretch[u];
    if (!place.live) continue;
    V bias{};
    if (BIAS) bias = static_cast<const V*>(a.bias)[place.unit];
    V y;
#pragma unroll
    for (int k = 0; k < W; ++k) {
      const float v = to_float(x[u].v[k]);
      y.v[k] = from_float<T>(Act::value(BIAS ? v + to_float(bias.v[k]) : v));
    }
    static_cast<V*>(a.y)[place.row * units + place.unit] = y;
  }
}

template <class T, int W, class Act>
__global__ void __launch_bounds__(kThreads) plain_backward(const MegalmBiasActivationBackward a) {
  constexpr int U = 2;
  using V = Vec<T, W>;
  const int64_t units = a.cols / W;
  const Stretch<U> stretch(a.rows, units);
  V x[U], dy[U];
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const auto place = stretch[u];
    if (!place.live) continue;
    const int64_t at = place.row * units + place.unit;
    x[u] = static_cast<const V*>(a.x)[at], dy[u] = static_cast<const V*>(a.dy)[at];
  }
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const auto place = stretch[u];
    if (!place.live) continue;
    V dx;
#pragma unroll
    for (int k = 0; k < W; ++k) dx.v[k] = from_float<T>(Act::gradient(to_float(x[u].v[k]), to_float(dy[u].v[k])));
    static_cast<V*>(a.dx)[place.row * units + place.unit] = dx;
  }
}

constexpr int kColumns = 32, kLines = 8;  // of units: a block of the biased backward

// A thread has one unit of columns and walks down rows, two at a time; a block leaves one row of `partial`.
template <class T, int W, class Act>
__global__ void __launch_bounds__(kColumns * kLines) biased_backward(const MegalmBiasActivationBackward a) {
  constexpr int U = 2;
  using V = Vec<T, W>;
  MEGALM_SHARED(float, sums, kLines * kColumns * W);
  const int64_t units = a.cols / W, unit = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x;
  const int64_t end = a.rows * (blockIdx.y + 1) / a.partials;
  const bool live = unit < units;
  float bias[W], dbias[W];
  if (live) {
    const V stored = static_cast<const V*>(a.bias)[unit];
#pragma unroll
    for (int k = 0; k < W; ++k) bias[k] = to_float(stored.v[k]);
  }
#pragma unroll
  for (int k = 0; k < W; ++k) dbias[k] = 0.f;
  if (live)
    for (int64_t first = a.rows * blockIdx.y / a.partials + threadIdx.y; first < end; first += U * kLines) {
      V x[U], dy[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int64_t row = first + u * kLines;
        if (row >= end) continue;
        x[u] = static_cast<const V*>(a.x)[row * units + unit];
        dy[u] = static_cast<const V*>(a.dy)[row * units + unit];
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int64_t row = first + u * kLines;
        if (row >= end) continue;
        V dx;
#pragma unroll
        for (int k = 0; k < W; ++k) {
          const float d = Act::gradient(to_float(x[u].v[k]) + bias[k], to_float(dy[u].v[k]));
          dbias[k] += d;
          dx.v[k] = from_float<T>(d);
        }
        static_cast<V*>(a.dx)[row * units + unit] = dx;
      }
    }
  // A line's sums lie unit after unit of each k, so that threads side by side use banks side by side.
#pragma unroll
  for (int k = 0; k < W; ++k) sums[(threadIdx.y * W + k) * kColumns + threadIdx.x] = dbias[k];
  __syncthreads();
  // The column of (k, x) is summed by one thread, line after line.
  for (int i = threadIdx.y; i < W; i += kLines) {
    float sum = 0.f;
#pragma unroll
    for (int line = 0; line < kLines; ++line) sum += sums[(line * W + i) * kColumns + threadIdx.x];
    if (live) a.partial[blockIdx.y * a.cols + unit * W + i] = sum;
  }
}

// Calls f with 16-byte units if rows are made of them, else with single elements.
template <class T, class F>
void with_width(bool whole, const F& f) {
  if (whole) f(std::integral_constant<int, kWide<T>>{});
  else f(std::integral_constant<int, 1>{});
}

template <class F>
int with_dtype_and_kind(int32_t dtype, int32_t kind, const F& f) {
  return with_dtype(dtype, [&](auto element) { with_kind(kind, [&](auto act) { f(element, act); }); });
}

dim3 grid_of(int64_t rows, int64_t cols, int width, int each) { return dim3(stretches(rows, cols / width, kThreads, each)); }

}  // namespace
}  // namespace megalm::cuda

extern "C" int megalm_cuda_gated_forward(const MegalmGatedForward* a, void* stream) {
  using namespace megalm::cuda;
  return with_dtype_and_kind(a->dtype, a->kind, [&](auto element, auto act) {
    using T = decltype(element);
    with_width<T>(wide<T>(a->cols, a->x, a->y), [&](auto width) {
      constexpr int W = decltype(width)::value;
      MEGALM_LAUNCH((gated_forward<T, W, decltype(act)>), grid_of(a->rows, a->cols, W, 2), dim3(kThreads), 0, stream, *a);
    });
  });
}

extern "C" int megalm_cuda_gated_backward(const MegalmGatedBackward* a, void* stream) {
  using namespace megalm::cuda;
  return with_dtype_and_kind(a->dtype, a->kind, [&](auto element, auto act) {
    using T = decltype(element);
    with_width<T>(wide<T>(a->cols, a->x, a->dy, a->dx), [&](auto width) {
      constexpr int W = decltype(width)::value;
      MEGALM_LAUNCH((gated_backward<T, W, decltype(act)>), grid_of(a->rows, a->cols, W, 2), dim3(kThreads), 0, stream, *a);
    });
  });
}

extern "C" int megalm_cuda_bias_activation_forward(const MegalmBiasActivationForward* a, void* stream) {
  using namespace megalm::cuda;
  return with_dtype_and_kind(a->dtype, a->kind, [&](auto element, auto act) {
    using T = decltype(element);
    using Act = decltype(act);
    with_width<T>(wide<T>(a->cols, a->x, a->y, a->bias), [&](auto width) {
      constexpr int W = decltype(width)::value;
      const dim3 grid = grid_of(a->rows, a->cols, W, 4);
      if (a->bias != nullptr) MEGALM_LAUNCH((biased_forward<T, W, Act, true>), grid, dim3(kThreads), 0, stream, *a);
      else MEGALM_LAUNCH((biased_forward<T, W, Act, false>), grid, dim3(kThreads), 0, stream, *a);
    });
  });
}

extern "C" int megalm_cuda_bias_activation_backward(const MegalmBiasActivationBackward* a, void* stream) {
  using namespace megalm::cuda;
  return with_dtype_and_kind(a->dtype, a->kind, [&](auto element, auto act) {
    using T = decltype(element);
    using Act = decltype(act);
    with_width<T>(wide<T>(a->cols, a->x, a->dy, a->dx, a->bias), [&](auto width) {
      constexpr int W = decltype(width)::value;
      if (a->bias == nullptr) {
        MEGALM_LAUNCH((plain_backward<T, W, Act>), grid_of(a->rows, a->cols, W, 2), dim3(kThreads), 0, stream, *a);
        return;
      }
      const dim3 grid(ceil_div(a->cols / W, kColumns), a->partials);
      MEGALM_LAUNCH((biased_backward<T, W, Act>), grid, dim3(kColumns, kLines), 0, stream, *a);
      launch_sum_rows<T>(a->partial, a->partials, a->cols, a->dbias, stream);
    });
  });
}

extern "C" int64_t megalm_cuda_bias_activation_partials(int64_t rows, int64_t cols) {
  using namespace megalm::cuda;
  // As many blocks as the device holds at once, if each still has rows to walk down.
  const int64_t across = ceil_div(cols, 8 * kColumns);
  const int64_t wanted = ceil_div(8 * static_cast<int64_t>(multiprocessors()), across);
  return std::max<int64_t>(1, std::min({wanted, ceil_div(rows, 4 * kLines), int64_t{65535}}));
}
