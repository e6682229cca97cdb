// Cross-entropy on the processor: a row of logits is read once from memory, block by block from the nearest cache.
#include "include/cross_entropy.h"

#include <limits>

#include "cpu/convert.h"
#include "cpu/parallel.h"
#include "cpu/reduce.h"
#include "cpu/types.h"
#include "cpu/vmath.h"

namespace megalm::cpu {
namespace {

constexpr float kLeast = -std::numeric_limits<float>::infinity();

template <class T, bool kTotal>
void statistics_of_row(const MegalmCrossEntropyStatistics& a, int64_t token) {
  const T* z = static_cast<const T*>(a.logits) + token * a.stride;
  float top = kLeast, block[kIsWide<T> ? 1 : kBlock];
  double sum = 0.0, total = 0.0;
  for (int64_t begin = 0; begin < a.rows; begin += kBlock) {
    const int64_t size = std::min(kBlock, a.rows - begin);
    const float* x = wide_row(z + begin, size, block);
    float tops[kLanes], sums[kLanes] = {}, totals[kLanes] = {};
    std::fill(tops, tops + kLanes, kLeast);
    in_lanes(0, size, [&](int64_t j, int lane) {
      const float v = x[j];
      tops[lane] = v > tops[lane] ? v : tops[lane];
    });
    const float before = top;
    for (const float each : tops) top = each > top ? each : top;
    const float base = top == kLeast ? 0.f : top;  // exp(-inf - base) is then 0; that of a NaN is one
    in_lanes(0, size, [&](int64_t j, int lane) {
      const float v = x[j];
      sums[lane] += exp(v - base);
      if (kTotal) totals[lane] += v;
    });
    sum *= exp(before - base);
    for (const float each : sums) sum += each;
    for (const float each : totals) total += each;
  }
  a.maximum[token] = top;
  a.sum[token] = static_cast<float>(sum);
  if (kTotal) a.total[token] = static_cast<float>(total);
  const int64_t local = a.labels[token] - a.first_row;
  a.target[token] = local >= 0 && local < a.rows ? load(z[local]) : 0.f;
}

template <class T>
void gradient_of_row(const MegalmCrossEntropyGradient& a, int64_t token) {
  T* z = static_cast<T*>(a.logits) + token * a.stride;
  const float top = a.maximum[token], factor = a.factor[token], scale = a.scale[token], same = scale * a.smooth;
  if (scale == 0.f) {
    std::fill(z, z + a.rows, T{});
    return;
  }
  const int64_t local = a.labels[token] - a.first_row;
  const bool mine = local >= 0 && local < a.rows;
  const float label = mine ? load(z[local]) : 0.f;
  Source<T> source(z);
  Sink<T> sink(z);
  stages(0, a.rows, [&](int64_t from, int64_t size) {
    const float* in = source.at(from, size);
    float* out = sink.at(from);
#pragma omp simd
    for (int64_t j = 0; j < size; ++j) out[j] = factor * exp(in[j] - top) - same;
    sink.put(from, size);
  });
  if (mine) store(z + local, factor * exp(label - top) - same - scale * a.confidence);
}

}  // namespace
}  // namespace megalm::cpu

extern "C" int megalm_cpu_cross_entropy_statistics(const MegalmCrossEntropyStatistics* a, void*) {
  using namespace megalm::cpu;
  return with_dtype(a->dtype, [a](auto element) {
    using T = decltype(element);
    parallel(a->tokens, a->rows, [a](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        if (a->total != nullptr) statistics_of_row<T, true>(*a, token);
        else statistics_of_row<T, false>(*a, token);
      }
    });
  });
}

extern "C" int megalm_cpu_cross_entropy_gradient(const MegalmCrossEntropyGradient* a, void*) {
  using namespace megalm::cpu;
  return with_dtype(a->dtype, [a](auto element) {
    using T = decltype(element);
    parallel(a->tokens, a->rows, [a](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) gradient_of_row<T>(*a, token);
    });
  });
}
