// The order of an epoch's samples, as megalm/data/permutation.py defines it: a Feistel network, walked until it is inside.
#include "helpers/permutation.h"

#include <cstring>
#include <stdexcept>

namespace megalm::helpers {
namespace {

uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

}  // namespace

uint64_t permuted(uint64_t index, uint64_t n, int half, std::string_view keys) {
  if (index >= n || half < 1 || half > 32 || (half < 32 && (n - 1) >> (2 * half) != 0) || keys.size() % 8 != 0)
    throw std::invalid_argument("an index or a width that does not fit");
  const uint64_t low = (uint64_t{1} << half) - 1;
  uint64_t value = index;
  do {
    uint64_t left = value >> half, right = value & low;
    for (size_t i = 0; i < keys.size(); i += 8) {
      uint64_t key;
      std::memcpy(&key, keys.data() + i, 8);
      const uint64_t next = left ^ (mix(right ^ key) >> (64 - half));
      left = right, right = next;
    }
    value = left << half | right;
  } while (value >= n);
  return value;
}

}  // namespace megalm::helpers
