// See permutation.cpp.
#pragma once
#include <cstdint>
#include <string_view>

namespace megalm::helpers {

// The image of `index` < n. `half`: bits of half a value, n being at most 2^(2 half); `keys`: eight bytes for each round,
// little end first.
uint64_t permuted(uint64_t index, uint64_t n, int half, std::string_view keys);

}  // namespace megalm::helpers
