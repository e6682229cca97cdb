// Stretches of 16-bit elements as float: by the processor's own conversions, of which compilers make no vectors.
#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>

#if defined(__AVX2__) && defined(__F16C__)
#define MEGALM_AVX2
#include <immintrin.h>
#endif

#include "cpu/types.h"

namespace megalm::cpu {

#if defined(MEGALM_AVX2)
inline __m256 load8(const float* p) { return _mm256_loadu_ps(p); }

inline __m256 load8(const bf16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

inline __m256 load8(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

inline void store8(float* p, __m256 v) { _mm256_storeu_ps(p, v); }

// As store() rounds.
inline void store8(bf16* p, __m256 v) {
  const __m256i u = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i r = _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_set1_epi32(0x7fc0), nan);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1)));
}

inline void store8(f16* p, __m256 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#endif

template <class T>
void widen(const T* from, int64_t n, float* to) {
  int64_t j = 0;
#if defined(MEGALM_AVX2)
  for (; j + 8 <= n; j += 8) store8(to + j, load8(from + j));
#endif
#pragma omp simd
  for (int64_t k = j; k < n; ++k) to[k] = load(from[k]);
}

template <class T>
void narrow(const float* from, int64_t n, T* to) {
  int64_t j = 0;
#if defined(MEGALM_AVX2)
  for (; j + 8 <= n; j += 8) store8(to + j, load8(from + j));
#endif
#pragma omp simd
  for (int64_t k = j; k < n; ++k) store(to + k, from[k]);
}

constexpr int64_t kStage = 512;  // elements: several stages lie in the nearest cache together

template <class T>
constexpr bool kIsWide = std::is_same_v<T, float>;

// Elements to read, as float: where they are, or in a stage.
template <class T>
class Source {
 public:
  explicit Source(const T* data) : data_(data) {}

  // Elements [begin, begin + n), of a stage at most; until the next call.
  const float* at(int64_t begin, int64_t n) {
    if constexpr (kIsWide<T>) {
      return data_ + begin;
    } else {
      widen(data_ + begin, n, stage_);
      return stage_;
    }
  }

 private:
  const T* data_;
  float stage_[kIsWide<T> ? 1 : kStage];
};

// Elements to write, as float.
template <class T>
class Sink {
 public:
  explicit Sink(T* data) : data_(data) {}

  float* at(int64_t begin) {
    if constexpr (kIsWide<T>) return data_ + begin;
    else return stage_;
  }

  // What was written at the last place goes to memory.
  void put(int64_t begin, int64_t n) {
    if constexpr (!kIsWide<T>) narrow(stage_, n, data_ + begin);
  }

 private:
  T* data_;
  float stage_[kIsWide<T> ? 1 : kStage];
};

// Calls f(begin, n) for stages of [begin, end).
template <class F>
inline void stages(int64_t begin, int64_t end, const F& f) {
  for (; begin < end; begin += kStage) f(begin, std::min(kStage, end - begin));
}

// Asks for what is read next, while something else is computed: rows that are read more than once are read at the start.
template <class T>
inline void prefetch(const T* p, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t j = 0; j < n; j += kLine) __builtin_prefetch(p + j);
}

// A row as float: itself, or in `buffer`, of n.
template <class T>
const float* wide_row(const T* row, int64_t n, float* buffer) {
  if constexpr (kIsWide<T>) {
    return row;
  } else {
    widen(row, n, buffer);
    return buffer;
  }
}

}  // namespace megalm::cpu
