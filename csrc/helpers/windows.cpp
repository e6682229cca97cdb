// Ids out of a store, as TokenStore.windows in megalm/data/store.py defines it: widened and compared with the vocabulary
// in one pass over memory. The extremes are found in the ids' own type, of which more fit into a vector.
#include "helpers/windows.h"

#include <algorithm>

namespace megalm::helpers {

template <class T>
int64_t widen_windows(const T* ids, const int64_t* starts, int64_t count, int64_t length, uint64_t limit, int64_t* out) {
  int64_t wrong = -1;
  for (int64_t row = 0; row < count; ++row, out += length) {
    const T* from = ids + starts[row];
    T low = 0, high = 0;
    for (int64_t i = 0; i < length; ++i) low = std::min(low, from[i]), high = std::max(high, from[i]);
    for (int64_t i = 0; i < length; ++i) out[i] = static_cast<int64_t>(from[i]);
    if (wrong < 0 && length > 0 && (low < 0 || static_cast<uint64_t>(high) >= limit)) wrong = row;
  }
  return wrong;
}

#define MEGALM_WIDEN(T) \
  template int64_t widen_windows<T>(const T*, const int64_t*, int64_t, int64_t, uint64_t, int64_t*);
MEGALM_WIDEN(uint8_t)
MEGALM_WIDEN(int8_t)
MEGALM_WIDEN(uint16_t)
MEGALM_WIDEN(int16_t)
MEGALM_WIDEN(uint32_t)
MEGALM_WIDEN(int32_t)
MEGALM_WIDEN(int64_t)

}  // namespace megalm::helpers
