// See rows.cpp.
#pragma once
#include <cstdint>
#include <vector>

namespace megalm::helpers {

// A block of memory in rows of contiguous bytes: strides in bytes of every dimension outside of a row.
struct Rows {
  std::vector<int64_t> shape, from, to;
  int64_t bytes;
};

// Copies every row. The two must not overlap.
void copy_rows(const Rows& rows, const char* from, char* to);

}  // namespace megalm::helpers
