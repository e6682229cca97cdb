// Loops over torch's own threads: a second pool would fight with it for the cores.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace megalm::cpu {

// Calls f(begin, end) on pieces of [0, n), of at least `work` elements where an item has `size` of them.
template <class F>
void parallel(int64_t n, int64_t size, const F& f, int64_t work = 16384) {
  const int64_t grain = std::max<int64_t>(1, work / std::max<int64_t>(size, 1));
  torch::stable::parallel_for(0, n, grain, f);
}

}  // namespace megalm::cpu
