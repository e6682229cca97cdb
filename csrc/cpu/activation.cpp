// Gated and biased activations on the processor: one pass over stretches of rows, in vectors.
#include "include/activation.h"

#include <type_traits>
#include <vector>

#include "cpu/convert.h"
#include "cpu/parallel.h"
#include "cpu/types.h"
#include "cpu/vmath.h"

namespace megalm::cpu {
namespace {

// Each has its value at x, and its derivative there times g.
struct Gelu {
  struct Normal {
    float density, cdf;  // the former without 1 / sqrt(2 pi)
  };
  // The cumulative distribution's tail has the density as a factor; what is left is a polynomial in s, with a relative
  // error of 1e-8, that keeps the smallest values exact too.
  static Normal normal(float x) {
    const float density = detail::exp_falling(-0.5f * x * x);
    const float s = 1.f / (1.f + 0.212132034f * abs(x));
    float p = -0.125142053f;
    p = p * s + 0.462827444f;
    p = p * s - 0.46171239f;
    p = p * s + 0.484854698f;
    p = p * s - 0.0469269231f;
    p = p * s + 0.192300215f;
    p = p * s + 0.154874429f;
    p = p * s + 0.169664636f;
    p = p * s + 0.169259936f;
    const float tail = 0.5f * density * (s * p);
    return {density, x < 0.f ? tail : 1.f - tail};
  }
  static float value(float x) { return x * normal(x).cdf; }
  static float gradient(float x, float g) {
    const Normal n = normal(x);
    return g * (n.cdf + x * (0.398942280f * n.density));
  }
};

// (1 + tanh(u)) / 2 is sigmoid(2 u).
struct GeluTanh {
  static constexpr float kScale = 1.59576912f;  // 2 sqrt(2 / pi)
  static constexpr float kCube = 0.044715f;
  static float part(float x) { return sigmoid(kScale * (x + kCube * x * x * x)); }
  static float value(float x) { return x * part(x); }
  static float gradient(float x, float g) {
    const float s = part(x);
    return g * (s + x * (s * (1.f - s)) * (kScale * (1.f + 3.f * kCube * x * x)));
  }
};

struct Silu {
  static float value(float x) { return x * sigmoid(x); }
  static float gradient(float x, float g) {
    const float s = sigmoid(x);
    return g * (s * (1.f + x * (1.f - s)));
  }
};

// A NaN passes, and so does its gradient.
struct Relu {
  static float value(float x) { return x < 0.f ? 0.f : x; }
  // A mask: of a selection of what is loaded the compiler makes a branch.
  static float gradient(float x, float g) { return float_of(bits_of(g) & (x <= 0.f ? 0 : -1)); }
};

template <class F>
int with_kind(int32_t kind, const F& f) {
  switch (kind) {
    case MEGALM_GELU: f(Gelu{}); return 0;
    case MEGALM_GELU_TANH: f(GeluTanh{}); return 0;
    case MEGALM_SILU: f(Silu{}); return 0;
    case MEGALM_RELU: f(Relu{}); return 0;
    default: return 1;
  }
}

template <class F>
int with_dtype_and_kind(int32_t dtype, int32_t kind, const F& f) {
  int status = 0;
  const int known = with_dtype(dtype, [&](auto element) { status = with_kind(kind, [&](auto act) { f(element, act); }); });
  return known != 0 ? known : status;
}

constexpr int64_t kPiece = 8192;  // columns that are a thread's work

// Calls f(row, begin, end) for stretches of columns.
template <class F>
void over_pieces(int64_t rows, int64_t cols, const F& f) {
  const int64_t pieces = (cols + kPiece - 1) / kPiece;
  parallel(rows * pieces, std::min(cols, kPiece), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = i / pieces, begin = (i - row * pieces) * kPiece;
      f(row, begin, std::min(cols, begin + kPiece));
    }
  });
}

template <class T, class Act>
void gated_forward(const MegalmGatedForward& a) {
  over_pieces(a.rows, a.cols, [&a](int64_t row, int64_t begin, int64_t end) {
    const T* x = static_cast<const T*>(a.x) + 2 * row * a.cols;
    Source<T> gates(x), ups(x + a.cols);
    Sink<T> sink(static_cast<T*>(a.y) + row * a.cols);
    stages(begin, end, [&](int64_t from, int64_t size) {
      const float *gate = gates.at(from, size), *up = ups.at(from, size);
      float* y = sink.at(from);
#pragma omp simd
      for (int64_t j = 0; j < size; ++j) y[j] = Act::value(gate[j]) * up[j];
      sink.put(from, size);
    });
  });
}

template <class T, class Act>
void gated_backward(const MegalmGatedBackward& a) {
  over_pieces(a.rows, a.cols, [&a](int64_t row, int64_t begin, int64_t end) {
    const T* x = static_cast<const T*>(a.x) + 2 * row * a.cols;
    T* dx = static_cast<T*>(a.dx) + 2 * row * a.cols;
    Source<T> gates(x), ups(x + a.cols), seeds(static_cast<const T*>(a.dy) + row * a.cols);
    Sink<T> to_gates(dx), to_ups(dx + a.cols);
    stages(begin, end, [&](int64_t from, int64_t size) {
      const float *gate = gates.at(from, size), *up = ups.at(from, size), *dy = seeds.at(from, size);
      float *dgate = to_gates.at(from), *dup = to_ups.at(from);
#pragma omp simd
      for (int64_t j = 0; j < size; ++j) {
        const float v = gate[j], g = dy[j], u = up[j];
        dup[j] = g * Act::value(v);
        dgate[j] = Act::gradient(v, g * u);
      }
      to_gates.put(from, size);
      to_ups.put(from, size);
    });
  });
}

// Empty where there is none.
template <class T>
std::vector<float> wide_bias(const T* bias, int64_t n) {
  std::vector<float> wide(static_cast<size_t>(bias == nullptr ? 0 : n));
  widen(bias, static_cast<int64_t>(wide.size()), wide.data());
  return wide;
}

template <class T, class Act>
void biased_forward(const MegalmBiasActivationForward& a) {
  const std::vector<float> biases = wide_bias(static_cast<const T*>(a.bias), a.cols);
  over_pieces(a.rows, a.cols, [&](int64_t row, int64_t begin, int64_t end) {
    Source<T> in(static_cast<const T*>(a.x) + row * a.cols);
    Sink<T> sink(static_cast<T*>(a.y) + row * a.cols);
    stages(begin, end, [&](int64_t from, int64_t size) {
      const float* x = in.at(from, size);
      float* y = sink.at(from);
      if (a.bias != nullptr) {
        const float* bias = biases.data() + from;
#pragma omp simd
        for (int64_t j = 0; j < size; ++j) y[j] = Act::value(x[j] + bias[j]);
      } else {
#pragma omp simd
        for (int64_t j = 0; j < size; ++j) y[j] = Act::value(x[j]);
      }
      sink.put(from, size);
    });
  });
}

template <class T, class Act>
void plain_backward(const MegalmBiasActivationBackward& a) {
  over_pieces(a.rows, a.cols, [&a](int64_t row, int64_t begin, int64_t end) {
    Source<T> in(static_cast<const T*>(a.x) + row * a.cols), seeds(static_cast<const T*>(a.dy) + row * a.cols);
    Sink<T> sink(static_cast<T*>(a.dx) + row * a.cols);
    stages(begin, end, [&](int64_t from, int64_t size) {
      const float *x = in.at(from, size), *dy = seeds.at(from, size);
      float* dx = sink.at(from);
#pragma omp simd
      for (int64_t j = 0; j < size; ++j) dx[j] = Act::gradient(x[j], dy[j]);
      sink.put(from, size);
    });
  });
}

#if defined(MEGALM_AVX2)
// Of elements of 16 bits, whose gradients need no rounding: returns how many it did.
template <class T>
int64_t relu_backward_row(const T* x, const T* dy, const float* bias, T* dx, float* partial, int64_t n) {
  int64_t j = 0;
  for (; j + 8 <= n; j += 8) {
    const __m256 v = _mm256_add_ps(load8(x + j), _mm256_loadu_ps(bias + j));
    const __m256 kept = _mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NLE_UQ);  // and a NaN
    const __m256i wide = _mm256_castps_si256(kept);
    const __m128i mask = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    _mm256_storeu_ps(partial + j, _mm256_add_ps(_mm256_loadu_ps(partial + j), _mm256_and_ps(load8(dy + j), kept)));
    const __m128i seeds = _mm_loadu_si128(reinterpret_cast<const __m128i*>(dy + j));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dx + j), _mm_and_si128(seeds, mask));
  }
  return j;
}
#endif

template <class T, class Act>
void backward_row(const T* x0, const T* dy0, const float* bias, T* dx0, float* partial, int64_t n) {
  Source<T> in(x0), seeds(dy0);
  Sink<T> sink(dx0);
  int64_t done = 0;
#if defined(MEGALM_AVX2)
  if constexpr (std::is_same_v<Act, Relu> && !kIsWide<T>) done = relu_backward_row(x0, dy0, bias, dx0, partial, n);
#endif
  stages(done, n, [&](int64_t from, int64_t size) {
    const float *x = in.at(from, size), *dy = seeds.at(from, size), *b = bias + from;
    float *dx = sink.at(from), *sums = partial + from;
#pragma omp simd
    for (int64_t j = 0; j < size; ++j) {
      const float d = Act::gradient(x[j] + b[j], dy[j]);
      dx[j] = d;
      sums[j] += d;
    }
    sink.put(from, size);
  });
}

template <class T, class Act>
void biased_backward(const MegalmBiasActivationBackward& a) {
  const int64_t n = a.cols;
  const std::vector<float> bias = wide_bias(static_cast<const T*>(a.bias), n);
  // Which rows make which partial sum is fixed by the shape, so that the result does not depend on who computes it.
  torch::stable::parallel_for(0, a.partials, 1, [&](int64_t from, int64_t to) {
    for (int64_t p = from; p < to; ++p) {
      float* partial = a.partial + p * n;
      std::fill(partial, partial + n, 0.f);
      for (int64_t row = a.rows * p / a.partials; row < a.rows * (p + 1) / a.partials; ++row) {
        const T* x = static_cast<const T*>(a.x) + row * n;
        const T* dy = static_cast<const T*>(a.dy) + row * n;
        T* dx = static_cast<T*>(a.dx) + row * n;
        backward_row<T, Act>(x, dy, bias.data(), dx, partial, n);
      }
    }
  });
  for (int64_t p = 1; p < a.partials; ++p)
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) a.partial[j] += a.partial[p * n + j];
  for (int64_t j = 0; j < n; ++j) store(static_cast<T*>(a.dbias) + j, a.partial[j]);
}

}  // namespace
}  // namespace megalm::cpu

extern "C" int megalm_cpu_gated_forward(const MegalmGatedForward* a, void*) {
  using namespace megalm::cpu;
  return with_dtype_and_kind(a->dtype, a->kind, [a](auto t, auto act) { gated_forward<decltype(t), decltype(act)>(*a); });
}

extern "C" int megalm_cpu_gated_backward(const MegalmGatedBackward* a, void*) {
  using namespace megalm::cpu;
  return with_dtype_and_kind(a->dtype, a->kind, [a](auto t, auto act) { gated_backward<decltype(t), decltype(act)>(*a); });
}

extern "C" int megalm_cpu_bias_activation_forward(const MegalmBiasActivationForward* a, void*) {
  using namespace megalm::cpu;
  return with_dtype_and_kind(a->dtype, a->kind, [a](auto t, auto act) { biased_forward<decltype(t), decltype(act)>(*a); });
}

extern "C" int megalm_cpu_bias_activation_backward(const MegalmBiasActivationBackward* a, void*) {
  using namespace megalm::cpu;
  return with_dtype_and_kind(a->dtype, a->kind, [a](auto t, auto act) {
    if (a->bias != nullptr) biased_backward<decltype(t), decltype(act)>(*a);
    else plain_backward<decltype(t), decltype(act)>(*a);
  });
}

extern "C" int64_t megalm_cpu_bias_activation_partials(int64_t rows, int64_t) {
  // Of 64 rows at least, that the sums cost little, and no more than are worth their memory.
  return std::max<int64_t>(1, std::min<int64_t>(64, rows / 64));
}
