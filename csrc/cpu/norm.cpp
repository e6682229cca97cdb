// Normalisation on the processor, row by row, each small enough for the nearest cache.
#include "include/norm.h"

#include <cmath>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/reduce.h"
#include "cpu/types.h"

namespace megalm::cpu {
namespace {

constexpr int64_t kRows = 64;  // whose weight gradients are summed in float

template <class T>
void forward_row(const MegalmNormForward& a, int64_t row) {
  const int64_t n = a.cols;
  const T* x = static_cast<const T*>(a.x) + row * n;
  const T* weight = static_cast<const T*>(a.weight);
  const T* bias = static_cast<const T*>(a.bias);
  T* y = static_cast<T*>(a.y) + row * n;
  if (a.residual != nullptr) {
    const T* residual = static_cast<const T*>(a.residual) + row * n;
    T* sum = static_cast<T*>(a.sum) + row * n;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) store(sum + j, load(x[j]) + load(residual[j]));
    x = sum;
  }
  float mean = 0.f;
  if (a.mean != nullptr) {
    mean = sum_over(n, [x](int64_t j) { return load(x[j]); }) / static_cast<float>(n);
    a.mean[row] = mean;
  }
  const float square = sum_over(n, [x, mean](int64_t j) {
    const float d = load(x[j]) - mean;
    return d * d;
  });
  const float rstd = 1.f / std::sqrt(square / static_cast<float>(n) + a.eps);
  a.rstd[row] = rstd;
  const float offset = a.offset;
  if (bias != nullptr) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) store(y + j, (load(x[j]) - mean) * rstd * (load(weight[j]) + offset) + load(bias[j]));
  } else {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) store(y + j, (load(x[j]) - mean) * rstd * (load(weight[j]) + offset));
  }
}

// Gradients of rows [begin, end); those of weight and bias go to `partial`, through float sums of few rows.
template <class T, bool kLayer, bool kBias>
void backward_rows(const MegalmNormBackward& a, int64_t begin, int64_t end, float* partial) {
  const int64_t n = a.cols;
  const T* weight = static_cast<const T*>(a.weight);
  const float offset = a.offset;
  std::vector<float> few(static_cast<size_t>((kBias ? 2 : 1) * n));
  float* dweight = few.data();
  float* dbias = few.data() + (kBias ? n : 0);
  std::fill(partial, partial + few.size(), 0.f);
  for (int64_t first = begin; first < end; first += kRows) {
    std::fill(few.begin(), few.end(), 0.f);
    for (int64_t row = first; row < std::min(end, first + kRows); ++row) {
      const T* x = static_cast<const T*>(a.x) + row * n;
      const T* dy = static_cast<const T*>(a.dy) + row * n;
      const T* dsum = a.dsum == nullptr ? nullptr : static_cast<const T*>(a.dsum) + row * n;
      T* dx = static_cast<T*>(a.dx) + row * n;
      const float rstd = a.rstd[row], mean = kLayer ? a.mean[row] : 0.f;
      double along = 0.0, total = 0.0;
      for (int64_t from = 0; from < n; from += kBlock) {
        const int64_t to = std::min(n, from + kBlock);
        float s = 0.f, t = 0.f;
#pragma omp simd reduction(+ : s, t)
        for (int64_t j = from; j < to; ++j) {
          const float normed = (load(x[j]) - mean) * rstd, g = load(dy[j]);
          const float scaled = g * (load(weight[j]) + offset);
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
      if (dsum != nullptr) {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
          const float normed = (load(x[j]) - mean) * rstd;
          store(dx + j, rstd * (load(dy[j]) * (load(weight[j]) + offset) - b - normed * c) + load(dsum[j]));
        }
      } else {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
          const float normed = (load(x[j]) - mean) * rstd;
          store(dx + j, rstd * (load(dy[j]) * (load(weight[j]) + offset) - b - normed * c));
        }
      }
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
      for (int64_t row = begin; row < end; ++row) forward_row<T>(*a, row);
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
