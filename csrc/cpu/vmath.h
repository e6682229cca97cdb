// Elementary functions of float, of which the compiler makes vectors: no branch, no call, no table.
//
// The mathematical library's functions keep a loop scalar. These are polynomials and selections. Errors are at most
// 1.5 units in the last place, of sigmoid 2.25, over all floats, denormal results too; infinities and NaNs go in and come
// out as IEEE has them. Polynomials are minimax fits of the quotient that the comment beside each names.
#pragma once
#include <cstdint>
#include <cstring>
#include <limits>

namespace megalm::cpu {

inline int32_t bits_of(float v) {
  int32_t u;
  std::memcpy(&u, &v, 4);
  return u;
}

inline float float_of(int32_t u) {
  float v;
  std::memcpy(&v, &u, 4);
  return v;
}

namespace detail {

constexpr float kInf = std::numeric_limits<float>::infinity(), kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInvLn2 = 1.44269504f;
constexpr float kLn2High = 0.693145751953125f;  // 15 bits: exact times any exponent, with or without fused multiplication
constexpr float kLn2Low = 1.42860677e-06f;
constexpr float kRound = 12582912.f;  // 1.5 * 2^23: what is added to it loses its fraction

// exp(x) as f * 2^n with f in [0.7, 1.42].
struct Power {
  float f;
  int32_t n;
};

inline Power power(float x) {
  const float t = x * kInvLn2 + kRound;
  const float n = t - kRound;
  const float r = (x - n * kLn2High) - n * kLn2Low;
  // (exp(r) - 1 - r) / r^2
  float p = 0.00139505148f;
  p = p * r + 0.00836890284f;
  p = p * r + 0.041666206f;
  p = p * r + 0.166665182f;
  p = p * r + 0.5f;
  return {1.f + (r + r * r * p), bits_of(t) - bits_of(kRound)};
}

inline float power_of_two(int32_t n) { return float_of((n + 127) << 23); }

// exp(x) where it is a normal number: x in [-87, 88].
inline float exp_normal(float x) {
  const Power p = power(x);
  return p.f * power_of_two(p.n);
}

// exp(x) where x is not above 0, or a NaN.
inline float exp_falling(float x) {
  const Power p = power(x < -104.f ? -104.f : x);
  return p.f * power_of_two(p.n + 64) * 5.42101086e-20f;  // 2^-64: the result may be smaller than powers that are floats
}

inline float with_sign_of(float x, float size) { return float_of(bits_of(size) | (bits_of(x) & INT32_MIN)); }

}  // namespace detail

inline float abs(float x) { return float_of(bits_of(x) & 0x7fffffff); }

inline float exp(float x) {
  // Beyond these it is infinite, or 0. A NaN passes.
  x = x > 89.f ? 89.f : x;
  x = x < -104.f ? -104.f : x;
  const detail::Power p = detail::power(x);
  const int32_t half = p.n >> 1;  // 2^n itself may be no float where the result is
  return p.f * detail::power_of_two(half) * detail::power_of_two(p.n - half);
}

inline float log(float x) {
  const bool tiny = x < 1.17549435e-38f;
  const float scaled = tiny ? x * 8388608.f : x;
  // scaled = m * 2^e with m in [sqrt(1/2), sqrt(2))
  const int32_t from_root = bits_of(scaled) - 0x3f3504f3;
  const float e = static_cast<float>((from_root >> 23) - (tiny ? 23 : 0));
  const float f = float_of((from_root & 0x007fffff) + 0x3f3504f3) - 1.f;
  // log(1 + f) = 2 atanh(s) = f - f^2 / 2 + s * (f^2 / 2 + z q)
  const float s = f / (2.f + f), z = s * s, half = 0.5f * f * f;
  float q = 0.235822842f;  // (2 atanh(s) / s - 2) / s^2
  q = q * z + 0.285373032f;
  q = q * z + 0.400003344f;
  q = q * z + 0.666666627f;
  float y = e * detail::kLn2High - ((half - (s * (half + z * q) + e * detail::kLn2Low)) - f);
  y = x == detail::kInf ? x : y;
  y = x == 0.f ? -detail::kInf : y;
  return x >= 0.f ? y : detail::kNaN;
}

// 1 / (1 + exp(-x)), whose exponential is at most 1.
inline float sigmoid(float x) {
  const float e = detail::exp_falling(-abs(x));
  return (x < 0.f ? e : 1.f) / (1.f + e);
}

inline float tanh(float x) {
  const float z = x * x;
  // (tanh(x) / x - 1) / x^2 for |x| <= 0.625
  float p = -0.00571704516f;
  p = p * z + 0.020650588f;
  p = p * z - 0.0537434965f;
  p = p * z + 0.133314908f;
  p = p * z - 0.333332837f;
  const float size = abs(x), near = size + size * (z * p);
  const float far = 1.f - 2.f / (detail::exp_normal(2.f * (size > 10.f ? 10.f : size)) + 1.f);
  return detail::with_sign_of(x, size < 0.625f ? near : far);
}

inline float erf(float x) {
  const float z = x * x;
  // erf(x) / x - 1 for |x| <= 0.92
  float p = 8.40992216e-05f;
  p = p * z - 0.000815262843f;
  p = p * z + 0.00520196045f;
  p = p * z - 0.0268597994f;
  p = p * z + 0.112837031f;
  p = p * z - 0.376126349f;
  p = p * z + 0.128379166f;
  const float size = abs(x), near = size + size * p, t = size > 4.f ? 4.f : size;
  // log(1 - erf(t)) for 0.92 <= t <= 4
  float q = 0.000194945766f;
  q = q * t - 0.0030336834f;
  q = q * t + 0.022189742f;
  q = q * t - 0.10385631f;
  q = q * t - 0.637265801f;
  q = q * t - 1.12762737f;
  q = q * t - 0.000207017554f;
  const float far = 1.f - detail::exp_normal(q);
  return detail::with_sign_of(x, size < 0.92f ? near : far);
}

}  // namespace megalm::cpu
