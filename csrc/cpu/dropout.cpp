// Dropout on the processor: the draws of a stretch of a row go to a small buffer, from which a vector loop takes them.
#include "include/dropout.h"

#include <vector>

#include "cpu/convert.h"
#include "cpu/parallel.h"
#include "cpu/types.h"
#include "include/philox.h"

namespace megalm::cpu {
namespace {

constexpr int64_t kStretch = kStage;  // features whose draws are in the buffer at once
static_assert(kStretch % kDraws == 0);
constexpr int64_t kRows = 64;              // whose bias gradients are summed in float before they go to a partial sum

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the low draw of a word must come first in memory"
#endif

// Where the row's draws begin. `span` is that of an earlier row, or 0.
struct Place {
  uint64_t first, slot, view, step;

  Place(const MegalmDropoutMask& m, int64_t row, int64_t cols, int64_t& span) {
    while (span + 1 < m.count && m.spans[(span + 1) * 5] <= row) ++span;
    const int64_t* s = m.spans + span * 5;
    const int64_t position = s[3] + row - s[0];
    first = static_cast<uint64_t>(position * ((cols + kDraws - 1) / kDraws)) + 1;
    slot = static_cast<uint64_t>(s[1]), view = static_cast<uint64_t>(s[2]), step = static_cast<uint64_t>(s[4]);
  }
};

// The draws of features [begin, begin + n), where begin is a multiple of kDraws; fills whole blocks.
inline void draw(uint16_t* out, const MegalmDropoutMask& m, const Place& at, int64_t begin, int64_t n) {
  for (int64_t j = 0; j < n; j += kDraws) {
    const uint64_t block = at.first + static_cast<uint64_t>((begin + j) / kDraws);
    const Philox p = philox(block, at.slot, at.view, at.step, m.key_low, m.key_high);
    std::memcpy(out + j, p.word, sizeof(p.word));
  }
}

// Calls f(begin, n, factors) for stretches of each row of [first, last).
template <class F>
inline void stretches(const MegalmDropoutMask& m, int64_t first, int64_t last, int64_t cols, const F& f) {
  uint16_t draws[kStretch];
  float factors[kStretch];
  int64_t span = 0;
  const int32_t threshold = m.threshold;
  const float scale = m.scale;
  for (int64_t row = first; row < last; ++row) {
    const Place at(m, row, cols, span);
    for (int64_t begin = 0; begin < cols; begin += kStretch) {
      const int64_t n = std::min(cols - begin, kStretch);
      draw(draws, m, at, begin, n);
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) factors[j] = static_cast<int32_t>(draws[j]) >= threshold ? scale : 0.f;
      f(row, begin, n, factors);
    }
  }
}

template <class T, bool kResidual, bool kBias>
void forward_rows(const MegalmDropoutForward& a, int64_t first, int64_t last) {
  stretches(a.mask, first, last, a.cols, [&a](int64_t row, int64_t begin, int64_t n, const float* factors) {
    const int64_t at = row * a.cols + begin;
    Source<T> in(static_cast<const T*>(a.x) + at), biases(kBias ? static_cast<const T*>(a.bias) + begin : nullptr);
    Source<T> residuals(kResidual ? static_cast<const T*>(a.residual) + at : nullptr);
    Sink<T> sink(static_cast<T*>(a.y) + at);
    const float* x = in.at(0, n);
    const float* bias = kBias ? biases.at(0, n) : nullptr;
    const float* residual = kResidual ? residuals.at(0, n) : nullptr;
    float* y = sink.at(0);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const float v = (kBias ? x[j] + bias[j] : x[j]) * factors[j];
      y[j] = kResidual ? residual[j] + v : v;
    }
    sink.put(0, n);
  });
}

template <class T>
void forward(const MegalmDropoutForward& a, int64_t first, int64_t last) {
  if (a.residual != nullptr && a.bias != nullptr) forward_rows<T, true, true>(a, first, last);
  else if (a.residual != nullptr) forward_rows<T, true, false>(a, first, last);
  else if (a.bias != nullptr) forward_rows<T, false, true>(a, first, last);
  else forward_rows<T, false, false>(a, first, last);
}

// Gradients of rows [first, last); the bias's is added to `few` where there is one.
template <class T, bool kBias>
void backward_rows(const MegalmDropoutBackward& a, int64_t first, int64_t last, float* few) {
  stretches(a.mask, first, last, a.cols, [&a, few](int64_t row, int64_t begin, int64_t n, const float* factors) {
    Source<T> seeds(static_cast<const T*>(a.dy) + row * a.cols + begin);
    Sink<T> sink(static_cast<T*>(a.dx) + row * a.cols + begin);
    const float* dy = seeds.at(0, n);
    float* dx = sink.at(0);
    float* sums = kBias ? few + begin : nullptr;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const float g = dy[j] * factors[j];
      dx[j] = g;
      if (kBias) sums[j] += g;
    }
    sink.put(0, n);
  });
}

template <class T>
void backward_with_bias(const MegalmDropoutBackward& a) {
  // Which rows make which partial sum is fixed, so that the result does not depend on who computes it.
  torch::stable::parallel_for(0, a.partials, 1, [&a](int64_t from, int64_t to) {
    std::vector<float> few(static_cast<size_t>(a.cols));
    for (int64_t p = from; p < to; ++p) {
      const int64_t begin = a.rows * p / a.partials, end = a.rows * (p + 1) / a.partials;
      float* partial = a.partial + p * a.cols;
      std::fill(partial, partial + a.cols, 0.f);
      for (int64_t first = begin; first < end; first += kRows) {
        std::fill(few.begin(), few.end(), 0.f);
        backward_rows<T, true>(a, first, std::min(end, first + kRows), few.data());
#pragma omp simd
        for (size_t j = 0; j < few.size(); ++j) partial[j] += few[j];
      }
    }
  });
  for (int64_t p = 1; p < a.partials; ++p)
#pragma omp simd
    for (int64_t j = 0; j < a.cols; ++j) a.partial[j] += a.partial[p * a.cols + j];
  for (int64_t j = 0; j < a.cols; ++j) store(static_cast<T*>(a.dbias) + j, a.partial[j]);
}

}  // namespace
}  // namespace megalm::cpu

extern "C" int megalm_cpu_dropout_forward(const MegalmDropoutForward* a, void*) {
  using namespace megalm::cpu;
  return with_dtype(a->dtype, [a](auto element) {
    using T = decltype(element);
    parallel(a->rows, a->cols, [a](int64_t begin, int64_t end) { forward<T>(*a, begin, end); });
  });
}

extern "C" int megalm_cpu_dropout_backward(const MegalmDropoutBackward* a, void*) {
  using namespace megalm::cpu;
  return with_dtype(a->dtype, [a](auto element) {
    using T = decltype(element);
    if (a->dbias != nullptr) return backward_with_bias<T>(*a);
    parallel(a->rows, a->cols, [a](int64_t begin, int64_t end) { backward_rows<T, false>(*a, begin, end, nullptr); });
  });
}

// Of a number of rows each, whatever the number of threads: so is the result.
extern "C" int64_t megalm_cpu_dropout_partials(int64_t rows, int64_t) {
  return std::max<int64_t>(1, std::min<int64_t>(64, (rows + 255) / 256));
}
