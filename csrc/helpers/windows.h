// See windows.cpp.
#pragma once
#include <cstdint>

namespace megalm::helpers {

// Windows of `length` ids from each of `count` starts, widened to 64 bits into `out` (count, length). The number of the
// first window that holds an id outside [0, limit), or -1. The caller has seen to it that the windows lie inside.
template <class T>
int64_t widen_windows(const T* ids, const int64_t* starts, int64_t count, int64_t length, uint64_t limit, int64_t* out);

}  // namespace megalm::helpers
