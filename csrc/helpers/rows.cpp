// Rows from a file that is mapped, into a tensor: columns of a matrix, or one run of elements as one row. A store brings
// its cache line into the cache first, which is a third of a copy's traffic and of no use to a line that is overwritten
// whole: so those are streamed past the cache. Without SSE2 (which every x86-64 has) rows are copied as memcpy does it.
#include "helpers/rows.h"

#include <cstring>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace megalm::helpers {

namespace {

#ifdef __SSE2__
constexpr int64_t LINE = 64;

void copy_row(const char* from, char* to, int64_t bytes) {
  const int64_t head = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) % LINE);
  if (bytes < head + LINE) {
    std::memcpy(to, from, static_cast<size_t>(bytes));
    return;
  }
  std::memcpy(to, from, static_cast<size_t>(head));
  int64_t at = head;
  for (; at + LINE <= bytes; at += LINE)
    for (int64_t i = at; i < at + LINE; i += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
  std::memcpy(to + at, from + at, static_cast<size_t>(bytes - at));
}

void finish() { _mm_sfence(); }  // streamed stores are ordered before whatever other threads are told next
#else
void copy_row(const char* from, char* to, int64_t bytes) { std::memcpy(to, from, static_cast<size_t>(bytes)); }

void finish() {}
#endif

void copy_dimension(const Rows& rows, size_t dimension, const char* from, char* to) {
  if (dimension == rows.shape.size()) {
    copy_row(from, to, rows.bytes);
    return;
  }
  for (int64_t i = 0; i < rows.shape[dimension]; ++i)
    copy_dimension(rows, dimension + 1, from + i * rows.from[dimension], to + i * rows.to[dimension]);
}

}  // namespace

void copy_rows(const Rows& rows, const char* from, char* to) {
  copy_dimension(rows, 0, from, to);
  finish();
}

}  // namespace megalm::helpers
