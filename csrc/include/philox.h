// Philox4x64-10 with numpy's conventions, for every backend: the mask of dropout is the same bits wherever it is drawn.
// (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.)
#pragma once
#include <cstdint>

#if defined(__CUDACC__) || defined(MEGALM_EMU)
#define MEGALM_ANYWHERE __host__ __device__ __forceinline__
#else
#define MEGALM_ANYWHERE inline
#endif

namespace megalm {

constexpr int kDraws = 16;  // 16-bit draws of a block: the low ones of its first word first

struct Philox {
  uint64_t word[4];
};

MEGALM_ANYWHERE void multiply(uint64_t a, uint64_t b, uint64_t& high, uint64_t& low) {
#if defined(__CUDA_ARCH__)
  high = __umul64hi(a, b);
  low = a * b;
#else
  __extension__ typedef unsigned __int128 wide;
  const wide product = static_cast<wide>(a) * b;
  high = static_cast<uint64_t>(product >> 64);
  low = static_cast<uint64_t>(product);
#endif
}

// The block of a counter, its lowest word first. Numpy's block b has the lowest word b + 1.
MEGALM_ANYWHERE Philox philox(uint64_t c0, uint64_t c1, uint64_t c2, uint64_t c3, uint64_t k0, uint64_t k1) {
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    uint64_t high0, low0, high1, low1;
    multiply(c0, 0xD2E7470EE14C6C93ull, high0, low0);
    multiply(c2, 0xCA5A826395121157ull, high1, low1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B97F4A7C15ull;
    k1 += 0xBB67AE8584CAA73Bull;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace megalm
