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

#if defined(__FLT16_MAX__)
inline float load(f16 v) {
  _Float16 h;
  std::memcpy(&h, &v, 2);
  return static_cast<float>(h);
}
inline void store(f16* p, float v) {
  const _Float16 h = static_cast<_Float16>(v);
  std::memcpy(p, &h, 2);
}
#else
#error "float16 needs a compiler with _Float16: g++ 12 or newer on x86, any on arm64"
#endif

// Calls f with a value of the element type that a dtype names.
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
