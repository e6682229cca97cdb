// Rows that are held in registers: a group of threads for each, and as many vectors a thread as that takes.
#pragma once
#include "cuda/portable.cuh"

namespace megalm::cuda {

constexpr int kThreads = 512;  // of a block at most: blockDim.y rows of blockDim.x threads
constexpr int kHeld = 4;       // vectors of a row that a thread holds at most

// Threads for a row of so many vectors: enough that none holds more than kHeld; 0 where a block is too small for that.
inline int threads_for_row(int64_t vectors) {
  for (int threads = 32; threads <= kThreads; threads *= 2)
    if (vectors <= static_cast<int64_t>(threads) * kHeld) return threads;
  return 0;
}

// Rows of a block, where nothing is shared between them: small blocks leave the scheduler more choice.
inline int rows_of_block(int threads) { return 128 / std::min(threads, 128); }

// Calls f with the number of vectors, as a type, that each of a row's threads holds.
template <class F>
void with_held(int64_t vectors, int threads, const F& f) {
  const int64_t held = ceil_div(vectors, threads);
  if (held <= 1) f(std::integral_constant<int, 1>{});
  else if (held <= 2) f(std::integral_constant<int, 2>{});
  else f(std::integral_constant<int, kHeld>{});
}

}  // namespace megalm::cuda
