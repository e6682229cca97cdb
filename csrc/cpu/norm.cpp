// Normalisation on the processor, row by row, each small enough for the nearest cache.
#include "include/norm.h"

#include <cmath>
#include <vector>

#include "cpu/convert.h"
#include "cpu/parallel.h"
#include "cpu/reduce.h"
#include "cpu/types.h"

namespace megalm::cpu {
namespace {

constexpr int64_t kRows = 64;  // whose weight gradients are summed in float

// The sum, and in `wide` the same, rounded, as float where T is not.
template <class T>
const float* add(const T* x, const T* residual, T* sum, float* wide, int64_t n) {
  if constexpr (kIsWide<T>) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) sum[j] = x[j] + residual[j];
    return sum;
  } else {
    int64_t j = 0;
#if defined(MEGALM_AVX2)
    for (; j + 8 <= n; j += 8) {
      store8(sum + j, _mm256_add_ps(load8(x + j), load8(residual + j)));
      store8(wide + j, load8(sum + j));
    }
#endif
    for (; j < n; ++j) {
      store(sum + j, load(x[j]) + load(residual[j]));
      wide[j] = load(sum[j]);
    }
    return wide;
  }
}

// Rows [begin, end).
template <class T, bool kBias>
void forward_rows(const MegalmNormForward& a, int64_t begin, int64_t end) {
  const int64_t n = a.cols;
  std::vector<float> scale(static_cast<size_t>(n)), shift(static_cast<size_t>(kBias ? n : 0));
  std::vector<float> wide(static_cast<size_t>(kIsWide<T> ? 0 : n));
  widen(static_cast<const T*>(a.weight), n, scale.data());
  for (float& each : scale) each += a.offset;
  if (kBias) widen(static_cast<const T*>(a.bias), n, shift.data());
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * n;
    const T* next = row + 1 < end ? x + n : x;
    const float* v = nullptr;
    if (a.residual == nullptr) v = wide_row(x, n, wide.data());
    else v = add(x, static_cast<const T*>(a.residual) + row * n, static_cast<T*>(a.sum) + row * n, wide.data(), n);
    float mean = 0.f;
    if (a.mean != nullptr) {
      mean = sum_over(n, [v](int64_t j) { return v[j]; }) / static_cast<float>(n);
      a.mean[row] = mean;
    }
    const float square = sum_over(n, [v, mean](int64_t j) {
      const float d = v[j] - mean;
      return d * d;
    });
    const float rstd = 1.f / std::sqrt(square / static_cast<float>(n) + a.eps);
    a.rstd[row] = rstd;
    Sink<T> sink(static_cast<T*>(a.y) + row * n);
    stages(0, n, [&](int64_t from, int64_t size) {
      prefetch(next + from, size);
      const float *in = v + from, *w = scale.data() + from, *b = kBias ? shift.data() + from : nullptr;
      float* y = sink.at(from);
#pragma omp simd
      for (int64_t j = 0; j < size; ++j) {
        const float normed = (in[j] - mean) * rstd * w[j];
        y[j] = kBias ? normed + b[j] : normed;
      }
      sink.put(from, size);
    });
  }
}

// Gradients of rows [begin, end); those of weight and bias go to `partial`, through float sums of few rows.
template <class T, bool kLayer, bool kBias>
void backward_rows(const MegalmNormBackward& a, int64_t begin, int64_t end, float* partial) {
  const int64_t n = a.cols;
  std::vector<float> few(static_cast<size_t>((kBias ? 2 : 1) * n)), scale(static_cast<size_t>(n));
  std::vector<float> wide(static_cast<size_t>(kIsWide<T> ? 0 : 2 * n));
  float* dweight = few.data();
  float* dbias = few.data() + (kBias ? n : 0);
  float* w = scale.data();
  widen(static_cast<const T*>(a.weight), n, w);
  for (float& each : scale) each += a.offset;
  std::fill(partial, partial + few.size(), 0.f);
  for (int64_t first = begin; first < end; first += kRows) {
    std::fill(few.begin(), few.end(), 0.f);
    for (int64_t row = first; row < std::min(end, first + kRows); ++row) {
      const float* x = wide_row(static_cast<const T*>(a.x) + row * n, n, wide.data());
      const float* dy = wide_row(static_cast<const T*>(a.dy) + row * n, n, wide.data() + (kIsWide<T> ? 0 : n));
      const float rstd = a.rstd[row], mean = kLayer ? a.mean[row] : 0.f;
      double along = 0.0, total = 0.0;
      for (int64_t from = 0; from < n; from += kBlock) {
        const int64_t to = std::min(n, from + kBlock);
        float s = 0.f, t = 0.f;
#pragma omp simd reduction(+ : s, t)
        for (int64_t j = from; j < to; ++j) {
          const float normed = (x[j] - mean) * rstd, g = dy[j];
          const float scaled = g * w[j];
          s += scaled * normed;
          if (kLayer) t += scaled;
          dweight[j] += g * normed;
          if (kBias) dbias[j] += g;
        }
        along += s;
        total += t;
      }
      const float c = static_cast<float>(along) / static_cast<float>(n);
      const float b = static_cast<float>(total) / static_cast<float>(n);
      Sink<T> sink(static_cast<T*>(a.dx) + row * n);
      Source<T> of_sum(a.dsum == nullptr ? nullptr : static_cast<const T*>(a.dsum) + row * n);
      const int64_t next = row + 1 < end ? row + 1 : row;
      stages(0, n, [&](int64_t from, int64_t size) {
        prefetch(static_cast<const T*>(a.x) + next * n + from, size);
        prefetch(static_cast<const T*>(a.dy) + next * n + from, size);
        const float *in = x + from, *g = dy + from, *by = w + from;
        float* dx = sink.at(from);
        if (a.dsum != nullptr) {
          const float* dsum = of_sum.at(from, size);
#pragma omp simd
          for (int64_t j = 0; j < size; ++j) dx[j] = rstd * (g[j] * by[j] - b - (in[j] - mean) * rstd * c) + dsum[j];
        } else {
#pragma omp simd
          for (int64_t j = 0; j < size; ++j) dx[j] = rstd * (g[j] * by[j] - b - (in[j] - mean) * rstd * c);
        }
        sink.put(from, size);
      });
    }
#pragma omp simd
    for (size_t j = 0; j < few.size(); ++j) partial[j] += few[j];
  }
}

template <class T>
void backward(const MegalmNormBackward& a) {
  const int64_t n = a.cols, width = (a.dbias != nullptr ? 2 : 1) * n;
  // Which rows make which partial sum is fixed, so that the result does not depend on who computes it.
  torch::stable::parallel_for(0, a.partials, 1, [&](int64_t from, int64_t to) {
    for (int64_t p = from; p < to; ++p) {
      const int64_t begin = a.rows * p / a.partials, end = a.rows * (p + 1) / a.partials;
      float* partial = a.partial + p * width;
      if (a.mean == nullptr) backward_rows<T, false, false>(a, begin, end, partial);
      else if (a.dbias == nullptr) backward_rows<T, true, false>(a, begin, end, partial);
      else backward_rows<T, true, true>(a, begin, end, partial);
    }
  });
  for (int64_t p = 1; p < a.partials; ++p)
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) a.partial[j] += a.partial[p * width + j];
  for (int64_t j = 0; j < n; ++j) store(static_cast<T*>(a.dweight) + j, a.partial[j]);
  if (a.dbias != nullptr)
    for (int64_t j = 0; j < n; ++j) store(static_cast<T*>(a.dbias) + j, a.partial[n + j]);
}

}  // namespace
}  // namespace megalm::cpu

extern "C" int megalm_cpu_norm_forward(const MegalmNormForward* a, void*) {
  using namespace megalm::cpu;
  return with_dtype(a->dtype, [a](auto element) {
    using T = decltype(element);
    parallel(a->rows, a->cols, [a](int64_t begin, int64_t end) {
      if (a->bias != nullptr) forward_rows<T, true>(*a, begin, end);
      else forward_rows<T, false>(*a, begin, end);
    });
  });
}

extern "C" int megalm_cpu_norm_backward(const MegalmNormBackward* a, void*) {
  using namespace megalm::cpu;
  return with_dtype(a->dtype, [a](auto element) { backward<decltype(element)>(*a); });
}

// By the shape alone, whatever the number of threads: so is the result.
extern "C" int64_t megalm_cpu_norm_partials(int64_t rows, int64_t) {
  return std::max<int64_t>(1, std::min<int64_t>(64, rows / megalm::cpu::kRows));
}
