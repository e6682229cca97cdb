// See packing.cpp.
#pragma once
#include <cstdint>
#include <vector>

namespace megalm::helpers {

struct Piece {
  int64_t start, stop;
  bool ends;
};

// What row `wanted` of a window holds. `edges`: `count` rising offsets, from the start of the window to the end of the
// document that holds its last token; `stop`: its end, `length` tokens of `rows` rows after edges[0].
std::vector<Piece> packed_row(const int64_t* edges, int64_t count, int64_t stop, int64_t wanted, int64_t rows,
                              int64_t length);

}  // namespace megalm::helpers
