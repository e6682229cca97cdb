// Elements of tensors on the processor: what is stored, and float as what is computed with.
#pragma once
#include <cstdint>
#include <cstring>

#include "include/abi.h"

namespace megalm::cpu {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline float load(float v) { return v; }

inline float load(bf16 v) {
  const uint32_t u = static_cast<uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

inline void store(float* p, float v) { *p = v; }

// Rounds to nearest, ties to even; every NaN becomes the quiet one, as torch has it.
inline void store(bf16* p, float v) {
  uint32_t u;
  std::memcpy(&u, &v, 4);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  p->bits = static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// In integers, since compilers make no vectors of conversions from and to _Float16. A scale of 2^112 moves the exponent,
// and makes normal numbers of denormal ones.
inline float load(f16 v) {
  const uint32_t u = static_cast<uint32_t>(v.bits & 0x7fffu) << 13;
  float f;
  std::memcpy(&f, &u, 4);
  f *= 5.192296858534828e33f;
  uint32_t w;
  std::memcpy(&w, &f, 4);
  w = (u >= 0x0f800000u ? u | 0x7f800000u : w) | static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  std::memcpy(&f, &w, 4);
  return f;
}

// Rounds to nearest, ties to even.
inline void store(f16* p, float v) {
  uint32_t u;
  std::memcpy(&u, &v, 4);
  const uint32_t sign = (u >> 16) & 0x8000u;
  u &= 0x7fffffffu;
  // One half has the units of denormal results.
  float shifted;
  std::memcpy(&shifted, &u, 4);
  shifted += 0.5f;
  uint32_t small;
  std::memcpy(&small, &shifted, 4);
  uint32_t h = (u - 0x38000000u + 0xfffu + ((u >> 13) & 1u)) >> 13;
  h = u < 0x38800000u ? small - 0x3f000000u : h;
  h = u >= 0x477ff000u ? 0x7c00u : h;
  h = u > 0x7f800000u ? 0x7e00u : h;
  p->bits = static_cast<uint16_t>(h | sign);
}

// Calls f with a value of the element type that a dtype names; 1 where it names none.
template <class F>
int with_dtype(int32_t dtype, const F& f) {
  switch (dtype) {
    case MEGALM_F32: f(float{}); return 0;
    case MEGALM_BF16: f(bf16{}); return 0;
    case MEGALM_F16: f(f16{}); return 0;
    default: return 1;
  }
}

}  // namespace megalm::cpu

// Each file has them, and a library keeps one.
extern "C" inline __attribute__((used)) const char* megalm_cpu_error_name(int status) {
  return status == 0 ? "success" : "invalid argument";
}

extern "C" inline __attribute__((used)) const char* megalm_cpu_error_text(int status) {
  return status == 0 ? "no error" : "there is no kernel for this dtype or kind";
}
