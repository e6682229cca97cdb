// Lists of tensors on the processor: chunks are shared out among threads, and walked over in pieces that stay in cache
// while they are converted.
#include "include/multi_tensor.h"

#include <atomic>
#include <vector>

#include "cpu/convert.h"
#include "cpu/parallel.h"
#include "cpu/types.h"
#include "cpu/vmath.h"
#include "include/adam.h"

namespace megalm::cpu {
namespace {

constexpr int64_t kPiece = 1024;
constexpr int kDoubles = 16;  // four vectors of AVX2

struct Chunk {
  int64_t item, begin, end;
};

std::vector<Chunk> chunks_of(const MegalmMulti& a) {
  std::vector<Chunk> chunks;
  for (int64_t i = 0; i < a.count; ++i)
    for (int64_t begin = 0; begin < a.items[i].size; begin += MEGALM_CHUNK)
      chunks.push_back({i, begin, std::min(a.items[i].size, begin + MEGALM_CHUNK)});
  return chunks;
}

// Calls f(chunk, its number) for all.
template <class F>
void for_chunks(const std::vector<Chunk>& chunks, const F& f) {
  torch::stable::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t from, int64_t to) {
    for (int64_t c = from; c < to; ++c) f(chunks[static_cast<size_t>(c)], c);
  });
}

// Calls f(begin, n) for the pieces of a chunk.
template <class F>
inline void for_pieces(const Chunk& chunk, const F& f) {
  for (int64_t begin = chunk.begin; begin < chunk.end; begin += kPiece) f(begin, std::min(kPiece, chunk.end - begin));
}

// In lanes, since one sum would wait for itself at each addition.
template <class T>
double squares(const T* x, int64_t n) {
  double lanes[kDoubles] = {}, total = 0.0;
  int64_t j = 0;
#if defined(MEGALM_AVX2)
  __m256d low = _mm256_setzero_pd(), high = low, low2 = low, high2 = low;
  for (; j + 16 <= n; j += 16) {
    const __m256 v = load8(x + j), w = load8(x + j + 8);
    const __m256d a = _mm256_cvtps_pd(_mm256_castps256_ps128(v)), b = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
    const __m256d c = _mm256_cvtps_pd(_mm256_castps256_ps128(w)), d = _mm256_cvtps_pd(_mm256_extractf128_ps(w, 1));
    low = _mm256_fmadd_pd(a, a, low), high = _mm256_fmadd_pd(b, b, high);
    low2 = _mm256_fmadd_pd(c, c, low2), high2 = _mm256_fmadd_pd(d, d, high2);
  }
  _mm256_storeu_pd(lanes, low), _mm256_storeu_pd(lanes + 4, high);
  _mm256_storeu_pd(lanes + 8, low2), _mm256_storeu_pd(lanes + 12, high2);
#else
  for (; j + kDoubles <= n; j += kDoubles)
#pragma omp simd
    for (int lane = 0; lane < kDoubles; ++lane) {
      const double v = load(x[j + lane]);
      lanes[lane] += v * v;
    }
#endif
  for (; j < n; ++j) {
    const double v = load(x[j]);
    total += v * v;
  }
  for (const double lane : lanes) total += lane;
  return total;
}

void add_up(const MegalmMulti& a, const std::vector<Chunk>& chunks, const double* partial, double* sums) {
  std::fill(sums, sums + a.count, 0.0);
  for (size_t c = 0; c < chunks.size(); ++c) sums[chunks[c].item] += partial[c];
}

constexpr int32_t kMagnitude = 0x7fffffff, kInfinite = 0x7f800000;  // what is no number has more bits than that

// Whether something is not finite; multiplies unless the factor is 1.
template <class T>
bool scale(T* x, int64_t n, float factor) {
  int64_t j = 0;
  int32_t worst = 0;
#if defined(MEGALM_AVX2)
  const __m256 by = _mm256_set1_ps(factor);
  const __m256i magnitude = _mm256_set1_epi32(kMagnitude);
  __m256i worst8 = _mm256_setzero_si256();
  for (; j + 8 <= n; j += 8) {
    const __m256 v = load8(x + j);
    worst8 = _mm256_max_epi32(worst8, _mm256_and_si256(_mm256_castps_si256(v), magnitude));
    if (factor != 1.f) store8(x + j, _mm256_mul_ps(v, by));
  }
  int32_t lanes[8];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), worst8);
  for (const int32_t lane : lanes) worst = std::max(worst, lane);
#endif
  for (; j < n; ++j) {
    const float v = load(x[j]);
    worst = std::max(worst, bits_of(v) & kMagnitude);
    if (factor != 1.f) store(x + j, v * factor);
  }
  return worst >= kInfinite;
}

// The gradients of a piece as float: in `buffer`, unless they are that already and there is nothing to multiply by.
const float* gradients(const MegalmMultiItem& item, int64_t begin, int64_t n, float factor, float* buffer) {
  if (item.gradient_dtype == MEGALM_F32 && factor == 1.f) return static_cast<const float*>(item.gradient) + begin;
  with_dtype(item.gradient_dtype, [&](auto element) {
    widen(static_cast<const decltype(element)*>(item.gradient) + begin, n, buffer);
  });
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) buffer[j] *= factor;
  return buffer;
}

void copy_out(const MegalmMultiItem& item, int64_t begin, int64_t n) {
  if (item.copy_dtype == MEGALM_NO_COPY) return;
  with_dtype(item.copy_dtype, [&](auto element) {
    narrow(item.weight + begin, n, static_cast<decltype(element)*>(item.copy) + begin);
  });
}

bool skipped(const MegalmMulti& a) { return a.found_inf != nullptr && *a.found_inf != 0.f; }

float factor_of(const MegalmMulti& a) { return a.factor == nullptr ? 1.f : *a.factor; }

// Restricted, so that a piece needs no test of which arrays overlap.
void adamw_piece(float* __restrict w, const float* __restrict g, float* __restrict first, float* __restrict second,
                 int64_t n, const AdamStep s) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) w[j] = w[j] * s.decay - s.rate * adam_moments(s, g[j], first[j], second[j]);
}

void lamb_piece(const float* __restrict w, const float* __restrict g, float* __restrict first, float* __restrict second,
                float* __restrict update, int64_t n, const AdamStep s) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j)
    update[j] = adam_moments(s, g[j], first[j], second[j]) * s.inverse + s.weight_decay * w[j];
}

void apply_piece(float* __restrict w, const float* __restrict update, int64_t n, float rate) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) w[j] -= rate * update[j];
}

}  // namespace
}  // namespace megalm::cpu

extern "C" int megalm_cpu_multi_squares(const MegalmMulti* a, void*) {
  using namespace megalm::cpu;
  const std::vector<Chunk> chunks = chunks_of(*a);
  for_chunks(chunks, [a](const Chunk& chunk, int64_t number) {
    const MegalmMultiItem& item = a->items[chunk.item];
    with_dtype(item.gradient_dtype, [&](auto element) {
      a->partial[number] = squares(static_cast<const decltype(element)*>(item.gradient) + chunk.begin, chunk.end - chunk.begin);
    });
  });
  add_up(*a, chunks, a->partial, a->sums);
  return 0;
}

extern "C" int megalm_cpu_multi_scale(const MegalmMulti* a, void*) {
  using namespace megalm::cpu;
  std::atomic<bool> bad{false};
  const float factor = factor_of(*a);
  for_chunks(chunks_of(*a), [&](const Chunk& chunk, int64_t) {
    const MegalmMultiItem& item = a->items[chunk.item];
    with_dtype(item.gradient_dtype, [&](auto element) {
      if (scale(static_cast<decltype(element)*>(item.gradient) + chunk.begin, chunk.end - chunk.begin, factor)) bad = true;
    });
  });
  if (bad) *a->found_inf = 1.f;
  return 0;
}

extern "C" int megalm_cpu_multi_adamw(const MegalmMulti* a, void*) {
  using namespace megalm::cpu;
  if (skipped(*a)) return 0;
  const megalm::AdamStep s = megalm::adam_step(*a, *a->step);
  const float factor = factor_of(*a);
  for_chunks(chunks_of(*a), [&](const Chunk& chunk, int64_t) {
    const MegalmMultiItem& item = a->items[chunk.item];
    for_pieces(chunk, [&](int64_t begin, int64_t n) {
      float buffer[kPiece];
      const float* g = gradients(item, begin, n, factor, buffer);
      adamw_piece(item.weight + begin, g, item.first + begin, item.second + begin, n, s);
      copy_out(item, begin, n);
    });
  });
  return 0;
}

extern "C" int megalm_cpu_multi_lamb_update(const MegalmMulti* a, void*) {
  using namespace megalm::cpu;
  const std::vector<Chunk> chunks = chunks_of(*a);
  double* of_updates = a->partial + chunks.size();
  if (skipped(*a)) {
    std::fill(a->sums, a->sums + 2 * a->count, 0.0);
    return 0;
  }
  const megalm::AdamStep s = megalm::adam_step(*a, *a->step);
  const float factor = factor_of(*a);
  for_chunks(chunks, [&](const Chunk& chunk, int64_t number) {
    const MegalmMultiItem& item = a->items[chunk.item];
    double of_weight = 0.0, of_update = 0.0;
    for_pieces(chunk, [&](int64_t begin, int64_t n) {
      float buffer[kPiece];
      const float* g = gradients(item, begin, n, factor, buffer);
      lamb_piece(item.weight + begin, g, item.first + begin, item.second + begin, item.update + begin, n, s);
      of_weight += squares(item.weight + begin, n);
      of_update += squares(item.update + begin, n);
    });
    a->partial[number] = of_weight;
    of_updates[number] = of_update;
  });
  add_up(*a, chunks, a->partial, a->sums);
  add_up(*a, chunks, of_updates, a->sums + a->count);
  return 0;
}

extern "C" int megalm_cpu_multi_lamb_apply(const MegalmMulti* a, void*) {
  using namespace megalm::cpu;
  if (skipped(*a)) return 0;
  for_chunks(chunks_of(*a), [a](const Chunk& chunk, int64_t) {
    const MegalmMultiItem& item = a->items[chunk.item];
    const float rate = megalm::lamb_rate(a->lr, a->sums[chunk.item], a->sums[a->count + chunk.item]);
    for_pieces(chunk, [&](int64_t begin, int64_t n) {
      apply_piece(item.weight + begin, item.update + begin, n, rate);
      copy_out(item, begin, n);
    });
  });
  return 0;
}
