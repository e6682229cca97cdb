// Rotary position embedding on the processor, position by position, so that its angles stay in the nearest cache.
#include "include/rope.h"

#include <limits>
#include <type_traits>

#include "cpu/parallel.h"
#include "cpu/types.h"

namespace megalm::cpu {
namespace {

template <bool kInterleaved, class T, class C>
void turn_head(const T* x, T* y, const C* cos, const C* sin, float sign, int64_t half, int64_t head_dim) {
  if (kInterleaved) {
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
      const float a = load(x[2 * i]), b = load(x[2 * i + 1]), c = load(cos[i]), s = sign * load(sin[i]);
      store(y + 2 * i, a * c - b * s);
      store(y + 2 * i + 1, b * c + a * s);
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
      const float a = load(x[i]), b = load(x[half + i]), c = load(cos[i]), s = sign * load(sin[i]);
      store(y + i, a * c - b * s);
      store(y + half + i, b * c + a * s);
    }
  }
  std::copy(x + 2 * half, x + head_dim, y + 2 * half);
}

template <class T, class C, bool kInterleaved>
void turn(const MegalmRope& a) {
  const int64_t half = a.rotary_dim / 2, width = a.heads * a.head_dim;
  const float sign = a.inverse ? -1.f : 1.f;
  parallel(a.batch * a.seq, width, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t row = token / a.seq, place = token - row * a.seq;
      const T* x = static_cast<const T*>(a.x) + row * a.stride_batch + place * a.stride_seq;
      T* y = static_cast<T*>(a.y) + token * width;
      const int64_t angle = a.positions == nullptr ? place : a.positions[row * a.stride_positions + place];
      if (angle < 0 || angle >= a.angles) {
        for (int64_t j = 0; j < width; ++j) store(y + j, std::numeric_limits<float>::quiet_NaN());
        continue;
      }
      const C* cos = static_cast<const C*>(a.cos) + angle * half;
      const C* sin = static_cast<const C*>(a.sin) + angle * half;
      for (int64_t head = 0; head < a.heads; ++head)
        turn_head<kInterleaved>(x + head * a.stride_head, y + head * a.head_dim, cos, sin, sign, half, a.head_dim);
    }
  });
}

}  // namespace
}  // namespace megalm::cpu

extern "C" int megalm_cpu_rope(const MegalmRope* a, void*) {
  using namespace megalm::cpu;
  const bool wide = a->angle_dtype == MEGALM_F32;
  if (!wide && a->angle_dtype != a->dtype) return 1;
  return with_dtype(a->dtype, [a, wide](auto element) {
    using T = decltype(element);
    const auto with = [a](auto angle) {
      using C = decltype(angle);
      if (a->interleaved) turn<T, C, true>(*a);
      else turn<T, C, false>(*a);
    };
    if (wide) with(float{});
    else with(T{});
  });
}
