// One spelling for nvcc and for the host emulator (-DMEGALM_EMU), and the pieces that kernels share.
//
// Kernels are plain: no torch, no library, shared memory and launches through macros, so that the same file runs as CUDA
// and, a fiber for each thread, on a processor.
#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "include/abi.h"

#ifdef MEGALM_EMU
#include "emu/cuda.hpp"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
// An array of the block's shared memory. The emulator gives each its own allocation, filled with rubbish.
#define MEGALM_SHARED(T, name, count) __shared__ T name[count]
// The launch's dynamic shared memory.
#define MEGALM_DYNAMIC_SHARED(T, name)                               \
  extern __shared__ __align__(16) unsigned char megalm_dynamic[]; \
  T* name = reinterpret_cast<T*>(megalm_dynamic)
#define MEGALM_LAUNCH(kernel, grid, block, shared, stream, ...) \
  kernel<<<(grid), (block), (shared), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif

namespace megalm::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(bf16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(f16 v) { return __half2float(v); }

template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) { return v; }
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float v) { return __float2bfloat16_rn(v); }
template <>
__device__ __forceinline__ f16 from_float<f16>(float v) { return __float2half_rn(v); }

// N elements that are read and written at once.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T v[N];
};

// Elements in 16 bytes, the widest access.
template <class T>
constexpr int kWide = 16 / static_cast<int>(sizeof(T));

struct Add {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
  static __device__ __forceinline__ float identity() { return 0.f; }
};

struct Max {
  // Of a NaN and a number the NaN: a maximum must not hide it.
  __device__ __forceinline__ float operator()(float a, float b) const { return a > b || a != a ? a : b; }
  static __device__ __forceinline__ float identity() { return -INFINITY; }
};

// The reduction over a warp, in every lane.
template <class Op>
__device__ __forceinline__ float warp_reduce(float v, Op op) {
#pragma unroll
  for (int distance = 16; distance > 0; distance >>= 1) v = op(v, __shfl_xor_sync(0xffffffffu, v, distance));
  return v;
}

// The reduction over the `blockDim.x` threads of this thread's row of the block, in every one of them. blockDim.x is a
// multiple of 32; every thread of the block must come here. `shared` has a float for each warp of the block.
template <class Op>
__device__ __forceinline__ float row_reduce(float v, Op op, float* shared) {
  v = warp_reduce(v, op);
  const int warps = blockDim.x / 32;
  if (warps == 1) return v;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* row = shared + threadIdx.y * warps;
  __syncthreads();  // an earlier call's values may still be read
  if (lane == 0) row[warp] = v;
  __syncthreads();
  v = lane < warps ? row[lane] : Op::identity();
  return warp_reduce(v, op);
}

constexpr int kMaxWarps = 32;
constexpr size_t kSharedBytes = 48 << 10;  // that every device gives a block unasked

// Whether rows of `cols` elements that start at these addresses can be read 16 bytes at a time.
template <class T>
bool wide(int64_t cols, const void* a, const void* b = nullptr, const void* c = nullptr, const void* d = nullptr,
          const void* e = nullptr, const void* f = nullptr) {
  uintptr_t all = reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b) | reinterpret_cast<uintptr_t>(c);
  all |= reinterpret_cast<uintptr_t>(d) | reinterpret_cast<uintptr_t>(e) | reinterpret_cast<uintptr_t>(f);
  return all % 16 == 0 && cols % kWide<T> == 0;
}

inline int multiprocessors() {
  int device = 0, count = 1;
  if (cudaGetDevice(&device) == cudaSuccess)
    (void)cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// Calls f with a value of the element type that a dtype names; returns the launch's status.
template <class F>
int with_dtype(int32_t dtype, const F& f) {
  switch (dtype) {
    case MEGALM_F32: f(float{}); break;
    case MEGALM_BF16: f(bf16{}); break;
    case MEGALM_F16: f(f16{}); break;
    default: return static_cast<int>(cudaErrorInvalidValue);
  }
  return static_cast<int>(cudaGetLastError());
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace megalm::cuda

// What with_dtype returns, in CUDA's words. Each file of kernels has them, and a library keeps one.
extern "C" inline __attribute__((used)) const char* megalm_cuda_error_name(int status) {
  return cudaGetErrorName(static_cast<cudaError_t>(status));
}

extern "C" inline __attribute__((used)) const char* megalm_cuda_error_text(int status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}
