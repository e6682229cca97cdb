// Sums over long rows: in lanes, which the processor adds independently, and over short blocks, which are added in double.
#pragma once
#include <algorithm>
#include <cstdint>

namespace megalm::cpu {

constexpr int kLanes = 32;        // four vectors of AVX2: as many additions as are in flight
constexpr int64_t kBlock = 4096;  // elements that are summed in float

// Calls f(j, lane) for each j of [begin, end), in steps of kLanes at once.
template <class F>
inline void in_lanes(int64_t begin, int64_t end, const F& f) {
  int64_t j = begin;
  for (; j + kLanes <= end; j += kLanes)
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) f(j + lane, lane);
  for (; j < end; ++j) f(j, 0);
}

// The sum of f(j) over [0, n).
template <class F>
inline float sum_over(int64_t n, const F& f) {
  double total = 0.0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    float lanes[kLanes] = {};
    in_lanes(begin, std::min(n, begin + kBlock), [&](int64_t j, int lane) { lanes[lane] += f(j); });
    for (const float lane : lanes) total += lane;
  }
  return static_cast<float>(total);
}

}  // namespace megalm::cpu
