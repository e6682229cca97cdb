// Dropout on the processor: the mask of a stretch of a row, a bit for each feature, is drawn or was kept by the forward, and
// a vector loop takes it. Drawing is most of the time of either, and bits are little to keep.
#include "include/dropout.h"

#include <vector>

#include "cpu/convert.h"
#include "cpu/parallel.h"
#include "cpu/types.h"
#include "include/philox.h"

namespace megalm::cpu {
namespace {

constexpr int64_t kStretch = 1024;  // features whose bits are drawn before they are used
constexpr int64_t kBlockBytes = kDraws / 8;
static_assert(kStretch % kDraws == 0);
constexpr int64_t kRows = 64;  // whose bias gradients are summed in float before they go to a partial sum

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

// Bit k: whether draw k of a block is not below the threshold.
inline uint16_t bits_of_block(const Philox& p, int32_t threshold) {
#if defined(MEGALM_AVX2)
  const __m256i draws = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p.word));
  const __m256i least = _mm256_set1_epi16(static_cast<int16_t>(threshold));
  const __m256i kept = _mm256_cmpeq_epi16(_mm256_max_epu16(draws, least), draws);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1));
  return static_cast<uint16_t>(_mm_movemask_epi8(bytes));
#else
  uint32_t bits = 0;
  for (int k = 0; k < kDraws; ++k)
    bits |= static_cast<uint32_t>(static_cast<int32_t>(p.word[k / 4] >> (k % 4 * 16) & 0xffff) >= threshold) << k;
  return static_cast<uint16_t>(bits);
#endif
}

// The mask of features [begin, begin + n), where begin is a multiple of kDraws; whole blocks.
inline void draw(uint8_t* out, const MegalmDropoutMask& m, const Place& at, int64_t begin, int64_t n) {
  for (int64_t j = 0; j < n; j += kDraws) {
    const uint64_t block = at.first + static_cast<uint64_t>((begin + j) / kDraws);
    const Philox p = philox(block, at.slot, at.view, at.step, m.key_low, m.key_high);
    const uint16_t bits = bits_of_block(p, m.threshold);
    std::memcpy(out + j / 8, &bits, sizeof(bits));
  }
}

// Calls f(row, begin, n, bits) for stretches of each row of [first, last). What is drawn goes to `to`, if it is there.
template <class F>
inline void stretches(const MegalmDropoutMask& m, const uint8_t* kept, uint8_t* to, int64_t first, int64_t last,
                      int64_t cols, const F& f) {
  uint8_t drawn[kStretch / 8];
  const int64_t row_bytes = (cols + kDraws - 1) / kDraws * kBlockBytes;
  int64_t span = 0;
  for (int64_t row = first; row < last; ++row) {
    if (kept != nullptr) {
      f(row, 0, cols, kept + row * row_bytes);
      continue;
    }
    const Place at(m, row, cols, span);
    for (int64_t begin = 0; begin < cols; begin += kStretch) {
      const int64_t n = std::min(cols - begin, kStretch);
      uint8_t* bits = to == nullptr ? drawn : to + row * row_bytes + begin / 8;
      draw(bits, m, at, begin, n);
      f(row, begin, n, bits);
    }
  }
}

// What a value is multiplied by: not selected, since a NaN that is dropped stays one.
inline float factor(const uint8_t* bits, int64_t j, float scale) { return bits[j / 8] >> (j % 8) & 1 ? scale : 0.f; }

#if defined(MEGALM_AVX2)
// Those of eight features.
inline __m256 factors(uint8_t bits, __m256 scale) {
  const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i kept = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits), each), each);
  return _mm256_and_ps(_mm256_castsi256_ps(kept), scale);
}
#endif

template <class T, bool kResidual, bool kBias>
void forward_rows(const MegalmDropoutForward& a, int64_t first, int64_t last) {
  const float scale = a.mask.scale;
  stretches(a.mask, nullptr, a.kept, first, last, a.cols,
            [&a, scale](int64_t row, int64_t begin, int64_t n, const uint8_t* bits) {
    const int64_t at = row * a.cols + begin;
    const T* x = static_cast<const T*>(a.x) + at;
    const T* bias = kBias ? static_cast<const T*>(a.bias) + begin : nullptr;
    const T* residual = kResidual ? static_cast<const T*>(a.residual) + at : nullptr;
    T* y = static_cast<T*>(a.y) + at;
    int64_t j = 0;
#if defined(MEGALM_AVX2)
    for (const __m256 scales = _mm256_set1_ps(scale); j + 8 <= n; j += 8) {
      __m256 v = load8(x + j);
      if (kBias) v = _mm256_add_ps(v, load8(bias + j));
      v = _mm256_mul_ps(v, factors(bits[j / 8], scales));
      if (kResidual) v = _mm256_add_ps(load8(residual + j), v);
      store8(y + j, v);
    }
#endif
    for (; j < n; ++j) {
      const float v = (kBias ? load(x[j]) + load(bias[j]) : load(x[j])) * factor(bits, j, scale);
      store(y + j, kResidual ? load(residual[j]) + v : v);
    }
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
  const float scale = a.mask.scale;
  stretches(a.mask, a.kept, nullptr, first, last, a.cols,
            [&a, few, scale](int64_t row, int64_t begin, int64_t n, const uint8_t* bits) {
    const T* dy = static_cast<const T*>(a.dy) + row * a.cols + begin;
    T* dx = static_cast<T*>(a.dx) + row * a.cols + begin;
    float* sums = kBias ? few + begin : nullptr;
    int64_t j = 0;
#if defined(MEGALM_AVX2)
    for (const __m256 scales = _mm256_set1_ps(scale); j + 8 <= n; j += 8) {
      const __m256 g = _mm256_mul_ps(load8(dy + j), factors(bits[j / 8], scales));
      if (kBias) _mm256_storeu_ps(sums + j, _mm256_add_ps(_mm256_loadu_ps(sums + j), g));
      store8(dx + j, g);
    }
#endif
    for (; j < n; ++j) {
      const float g = load(dy[j]) * factor(bits, j, scale);
      store(dx + j, g);
      if (kBias) sums[j] += g;
    }
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
