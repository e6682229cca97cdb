// Rows packed with documents, as megalm/data/pack.py defines it: best fit, longest first.
#include "helpers/packing.h"

#include <algorithm>
#include <stdexcept>
#include <tuple>

namespace megalm::helpers {
namespace {

struct Gap {
  int64_t size, row;
  bool operator<(const Gap& other) const { return std::tie(size, row) < std::tie(other.size, other.row); }
};

void put_back(std::vector<Gap>& gaps, Gap gap) { gaps.insert(std::upper_bound(gaps.begin(), gaps.end(), gap), gap); }

}  // namespace

std::vector<Piece> packed_row(const int64_t* edges, int64_t count, int64_t stop, int64_t wanted, int64_t rows,
                              int64_t length) {
  if (count < 2 || length < 1 || rows < 1 || stop <= edges[0] || (stop - edges[0]) % length != 0 ||
      (stop - edges[0]) / length != rows || edges[count - 1] < stop)
    throw std::invalid_argument("a window that its documents do not fill");
  std::vector<Piece> pieces;
  for (int64_t i = 0; i + 1 < count; ++i) {
    const int64_t last = std::min(edges[i + 1], stop);
    for (int64_t begin = edges[i]; begin < last;) {
      const int64_t cut = begin + std::min(length, last - begin);
      pieces.push_back({begin, cut, cut == edges[i + 1]});
      begin = cut;
    }
  }
  // Longest first, then in their order in the stream.
  std::stable_sort(pieces.begin(), pieces.end(),
                   [](const Piece& a, const Piece& b) { return a.stop - a.start > b.stop - b.start; });
  std::vector<Gap> gaps;
  for (int64_t row = 0; row < rows; ++row) gaps.push_back({length, row});
  std::vector<Piece> found, left;
  for (const Piece& piece : pieces) {
    const int64_t size = piece.stop - piece.start;
    const auto at = std::lower_bound(gaps.begin(), gaps.end(), Gap{size, 0});
    if (at == gaps.end()) {
      left.push_back(piece);
      continue;
    }
    const Gap gap = *at;
    gaps.erase(at);
    if (gap.row == wanted) found.push_back(piece);
    if (gap.size > size) put_back(gaps, {gap.size - size, gap.row});
  }
  for (const Piece& piece : left) {
    for (int64_t start = piece.start; start < piece.stop;) {
      // Offsets that do not rise would ask for more than the window's tokens.
      if (gaps.empty()) throw std::invalid_argument("a window that its documents do not fill");
      const Gap gap = gaps.back();
      gaps.pop_back();
      const int64_t cut = start + std::min(gap.size, piece.stop - start);
      if (gap.row == wanted) found.push_back({start, cut, piece.ends && cut == piece.stop});
      if (gap.size > cut - start) put_back(gaps, {gap.size - (cut - start), gap.row});
      start = cut;
    }
  }
  return found;
}

}  // namespace megalm::helpers
