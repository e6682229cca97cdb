// Softmax on the processor, row by row; of causal rows only the part that is not masked is computed.
#include "include/softmax.h"

#include <limits>
#include <vector>

#include "cpu/convert.h"
#include "cpu/parallel.h"
#include "cpu/reduce.h"
#include "cpu/types.h"
#include "cpu/vmath.h"

namespace megalm::cpu {
namespace {

constexpr float kLeast = -std::numeric_limits<float>::infinity();

// `row` is scratch for as many floats as there are keys.
template <class T, bool kMask>
void forward_row(const MegalmSoftmaxForward& a, int64_t index, float* row) {
  const T* scores = static_cast<const T*>(a.x) + index * a.keys;
  T* y = static_cast<T*>(a.y) + index * a.keys;
  const uint8_t* mask = kMask ? a.mask + index / a.per_batch * a.keys : nullptr;
  int64_t n = a.keys;
  if (a.causal) n = std::min(n, std::max<int64_t>(0, a.first_query + index % a.queries + 1));
  float tops[kLanes];
  std::fill(tops, tops + kLanes, kLeast);
  const float scale = a.scale;
  const float* x = wide_row(scores, n, row);
  in_lanes(0, n, [&](int64_t j, int lane) {
    const float v = kMask && mask[j] == 0 ? kLeast : x[j] * scale;
    row[j] = v;
    tops[lane] = v > tops[lane] ? v : tops[lane];
  });
  float top = kLeast;
  for (const float each : tops) top = each > top ? each : top;
  // Where all are -inf: those of masked keys give 0, those of others the NaN that a softmax of them is.
  bool nothing = n == 0;
  if (top == kLeast && kMask) nothing = std::all_of(mask, mask + n, [](uint8_t m) { return m == 0; });
  if (nothing) {
    std::fill(y, y + a.keys, T{});
    return;
  }
  const float sum = sum_over(n, [row, top](int64_t j) {
    const float e = exp(row[j] - top);
    row[j] = e;
    return e;
  });
  const float share = 1.f / sum;
  Sink<T> sink(y);
  stages(0, n, [&](int64_t from, int64_t size) {
    float* out = sink.at(from);
    const float* in = row + from;
    const uint8_t* seen = kMask ? mask + from : nullptr;
#pragma omp simd
    for (int64_t j = 0; j < size; ++j) out[j] = kMask && seen[j] == 0 ? 0.f : in[j] * share;
    sink.put(from, size);
  });
  std::fill(y + n, y + a.keys, T{});
}

// `rows` is scratch for twice as many floats as there are keys.
template <class T>
void backward_row(const MegalmSoftmaxBackward& a, int64_t index, float* rows) {
  const float* dy = wide_row(static_cast<const T*>(a.dy) + index * a.keys, a.keys, rows);
  const float* y = wide_row(static_cast<const T*>(a.y) + index * a.keys, a.keys, rows + a.keys);
  const float along = sum_over(a.keys, [dy, y](int64_t j) { return y[j] * dy[j]; });
  const float scale = a.scale;
  Sink<T> sink(static_cast<T*>(a.dx) + index * a.keys);
  stages(0, a.keys, [&](int64_t from, int64_t size) {
    const float *share = y + from, *g = dy + from;
    float* dx = sink.at(from);
    if (index + 1 < a.rows) {
      prefetch(static_cast<const T*>(a.y) + (index + 1) * a.keys + from, size);
      prefetch(static_cast<const T*>(a.dy) + (index + 1) * a.keys + from, size);
    }
#pragma omp simd
    for (int64_t j = 0; j < size; ++j) dx[j] = scale * share[j] * (g[j] - along);
    sink.put(from, size);
  });
}

}  // namespace
}  // namespace megalm::cpu

extern "C" int megalm_cpu_softmax_forward(const MegalmSoftmaxForward* a, void*) {
  using namespace megalm::cpu;
  return with_dtype(a->dtype, [a](auto element) {
    using T = decltype(element);
    parallel(a->rows, a->keys, [a](int64_t begin, int64_t end) {
      std::vector<float> row(static_cast<size_t>(a->keys));
      for (int64_t i = begin; i < end; ++i) {
        if (a->mask != nullptr) forward_row<T, true>(*a, i, row.data());
        else forward_row<T, false>(*a, i, row.data());
      }
    });
  });
}

extern "C" int megalm_cpu_softmax_backward(const MegalmSoftmaxBackward* a, void*) {
  using namespace megalm::cpu;
  return with_dtype(a->dtype, [a](auto element) {
    using T = decltype(element);
    parallel(a->rows, a->keys, [a](int64_t begin, int64_t end) {
      std::vector<float> rows(static_cast<size_t>(2 * a->keys));
      for (int64_t i = begin; i < end; ++i) backward_row<T>(*a, i, rows.data());
    });
  });
}
