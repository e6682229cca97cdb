// Elementwise work over rows: blocks take stretches of one long line of units, so that no shape leaves threads idle.
#pragma once
#include "cuda/portable.cuh"

namespace megalm::cuda {

// A block's stretch of blockDim.x * U units, of rows of `units`. Thread t has the units t, t + blockDim.x, ...
template <int U>
class Stretch {
 public:
  __device__ __forceinline__ Stretch(int64_t rows, int64_t units) : rows_(rows), units_(units) {
    const int64_t first = static_cast<int64_t>(blockIdx.x) * (blockDim.x * U);
    row_ = first / units;
    unit_ = first - row_ * units;
  }

  struct Place {
    int64_t row, unit;
    bool live;
  };

  __device__ __forceinline__ Place operator[](int u) const {
    const int64_t ahead = unit_ + static_cast<int64_t>(u) * blockDim.x + threadIdx.x;
    Place place;
    // One division of 64 bits a block is enough where rows are shorter than 2^32.
    if (((ahead | units_) >> 32) == 0) {
      const uint32_t rows = static_cast<uint32_t>(ahead) / static_cast<uint32_t>(units_);
      place.row = row_ + rows;
      place.unit = static_cast<uint32_t>(ahead) - rows * static_cast<uint32_t>(units_);
    } else {
      place.row = row_ + ahead / units_;
      place.unit = ahead % units_;
    }
    place.live = place.row < rows_;
    return place;
  }

 private:
  int64_t rows_, units_, row_, unit_;
};

inline int64_t stretches(int64_t rows, int64_t units, int threads, int each) {
  return ceil_div(rows * units, static_cast<int64_t>(threads) * each);
}

}  // namespace megalm::cuda
