// CUDA C++ on a processor: a fiber (ucontext) for each thread of a block, one block after the other.
//
// Fibers go on in a new random order after each barrier (MEGALM_EMU_SEED), so that a missing one shows as a wrong result.
// Shared memory is allocated array by array and filled with rubbish: what is read before it is written is a NaN, and
// AddressSanitizer sees each array's ends. A barrier that not all threads reach ends the program with a message.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define MEGALM_SHARED(T, name, count) T* name = ::emu::shared<T>(count, __FILE__, __LINE__)
#define MEGALM_DYNAMIC_SHARED(T, name) T* name = ::emu::dynamic<T>()
#define MEGALM_LAUNCH(kernel, grid, block, shared, stream, ...) \
  (void)(stream), ::emu::launch(kernel, grid, block, shared, __VA_ARGS__)

struct dim3 {
  unsigned x, y, z;
  dim3(int64_t a = 1, int64_t b = 1, int64_t c = 1)
      : x(static_cast<unsigned>(a)), y(static_cast<unsigned>(b)), z(static_cast<unsigned>(c)) {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };

namespace emu {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 << 10;
// Few, so that kernels which walk over rows with as many blocks as there are multiprocessors do walk.
constexpr int kMultiprocessors = 3;

enum class Wait { none, block, warp };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  Wait wait = Wait::none;
  unsigned generation = 0;
  dim3 thread;
  int number = 0;
  void* fake_stack = nullptr;
};

struct Barrier {
  unsigned generation = 0, arrived = 0;
};

struct Block {
  std::vector<Fiber> fibers;
  Barrier barrier;
  std::vector<Barrier> warps;
  std::vector<unsigned> warp_alive;
  std::vector<uint64_t> exchanged;
  std::map<std::pair<const char*, int>, std::unique_ptr<unsigned char[]>> arrays;
  std::unique_ptr<unsigned char[]> dynamic;
  size_t dynamic_bytes = 0;
  ucontext_t scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  Fiber* current = nullptr;
  dim3 index, size, grid;
  std::function<void()> body;
  unsigned alive = 0;
};

inline Block& block() {
  static Block b;
  return b;
}

inline cudaError_t& last_error() {
  static cudaError_t error = cudaSuccess;
  return error;
}

[[noreturn]] inline void stop(const char* text) {
  const Block& b = block();
  std::fprintf(stderr, "cuda emulator: %s in block (%u, %u, %u)\n", text, b.index.x, b.index.y, b.index.z);
  std::abort();
}

// 0xFF makes NaNs of floats and wild indices of integers.
inline std::unique_ptr<unsigned char[]> rubbish(size_t bytes) {
  std::unique_ptr<unsigned char[]> memory(new unsigned char[bytes]);
  std::memset(memory.get(), 0xFF, bytes);
  return memory;
}

template <class T>
T* shared(size_t count, const char* file, int line) {
  auto& array = block().arrays[{file, line}];
  if (!array) array = rubbish(count * sizeof(T));
  return reinterpret_cast<T*>(array.get());
}

template <class T>
T* dynamic() {
  return reinterpret_cast<T*>(block().dynamic.get());
}

inline void to_scheduler(Fiber& fiber, bool last) {
  Block& b = block();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &fiber.fake_stack, b.scheduler_stack, b.scheduler_stack_bytes);
#else
  (void)last;
#endif
  swapcontext(&fiber.context, &b.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
}

inline void to_fiber(Fiber& fiber) {
  Block& b = block();
  b.current = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack.get(), kStack);
#endif
  swapcontext(&b.scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

inline void arrive(Barrier& barrier, unsigned expected, Wait kind) {
  Fiber& me = *block().current;
  if (++barrier.arrived >= expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  me.wait = kind;
  me.generation = barrier.generation;
  to_scheduler(me, false);
  me.wait = Wait::none;
}

inline int lane() { return block().current->number % kWarp; }
inline int warp() { return block().current->number / kWarp; }
inline void sync_block() { arrive(block().barrier, static_cast<unsigned>(block().fibers.size()), Wait::block); }
inline void sync_warp() { arrive(block().warps[warp()], block().warp_alive[warp()], Wait::warp); }

inline void fiber_main() {
  Block& b = block();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &b.scheduler_stack, &b.scheduler_stack_bytes);
#endif
  b.body();
  Fiber& me = *b.current;
  me.done = true;
  --b.alive;
  --b.warp_alive[me.number / kWarp];
  to_scheduler(me, true);
}

inline bool runnable(const Fiber& fiber) {
  const Block& b = block();
  if (fiber.done) return false;
  if (fiber.wait == Wait::block) return b.barrier.generation != fiber.generation;
  if (fiber.wait == Wait::warp) return b.warps[fiber.number / kWarp].generation != fiber.generation;
  return true;
}

inline void run_block() {
  Block& b = block();
  static std::mt19937 random(std::getenv("MEGALM_EMU_SEED") ? std::atoi(std::getenv("MEGALM_EMU_SEED")) : 1);
  const size_t threads = static_cast<size_t>(b.size.x) * b.size.y * b.size.z;
  const size_t warps = (threads + kWarp - 1) / kWarp;
  b.fibers.resize(threads);
  b.barrier = {};
  b.warps.assign(warps, {});
  b.warp_alive.assign(warps, 0);
  b.exchanged.assign(warps * kWarp, 0);
  b.arrays.clear();
  b.dynamic = rubbish(b.dynamic_bytes);
  b.alive = static_cast<unsigned>(threads);
  std::vector<size_t> order(threads);
  for (size_t i = 0; i < threads; ++i) {
    Fiber& fiber = b.fibers[i];
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
    fiber.done = false;
    fiber.wait = Wait::none;
    fiber.number = static_cast<int>(i);
    fiber.thread = dim3(i % b.size.x, i / b.size.x % b.size.y, i / b.size.x / b.size.y);
    ++b.warp_alive[i / kWarp];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
    order[i] = i;
  }
  while (b.alive > 0) {
    std::shuffle(order.begin(), order.end(), random);
    bool moved = false;
    for (const size_t i : order) {
      if (!runnable(b.fibers[i])) continue;
      to_fiber(b.fibers[i]);
      moved = true;
    }
    if (!moved) stop("a barrier that not all threads reach");
  }
}

template <class K, class... A>
void launch(K kernel, dim3 grid, dim3 size, size_t shared_bytes, A... args) {
  Block& b = block();
  if (size_t(size.x) * size.y * size.z > 1024 || size.x == 0 || grid.x == 0 || grid.y == 0 || grid.y > 65535 ||
      shared_bytes > (48u << 10)) {
    last_error() = cudaErrorInvalidConfiguration;
    return;
  }
  b.size = size;
  b.grid = grid;
  b.dynamic_bytes = shared_bytes;
  b.body = [=] { kernel(args...); };
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        b.index = dim3(x, y, z);
        run_block();
      }
}

// Every lane of the warp gives a value and takes the one of a lane of its own choice.
template <class T>
T exchange(T value, int from) {
  static_assert(sizeof(T) <= 8, "at most eight bytes");
  Block& b = block();
  std::memcpy(&b.exchanged[b.current->number], &value, sizeof(T));
  sync_warp();
  T result;
  std::memcpy(&result, &b.exchanged[warp() * kWarp + from], sizeof(T));
  sync_warp();
  return result;
}

}  // namespace emu

#define threadIdx (::emu::block().current->thread)
#define blockIdx (::emu::block().index)
#define blockDim (::emu::block().size)
#define gridDim (::emu::block().grid)
#define __syncthreads() ::emu::sync_block()
#define __syncwarp(...) ::emu::sync_warp()

template <class T>
T __shfl_xor_sync(unsigned, T v, int mask) { return emu::exchange(v, emu::lane() ^ mask); }
template <class T>
T __shfl_down_sync(unsigned, T v, int distance) {
  return emu::exchange(v, emu::lane() + distance < emu::kWarp ? emu::lane() + distance : emu::lane());
}
template <class T>
T __shfl_sync(unsigned, T v, int from) { return emu::exchange(v, from); }
template <class T>
T atomicAdd(T* p, T v) { const T old = *p; *p += v; return old; }

inline cudaError_t cudaGetLastError() { return std::exchange(emu::last_error(), cudaSuccess); }
inline cudaError_t cudaGetDevice(int* device) { *device = 0; return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { *value = emu::kMultiprocessors; return cudaSuccess; }

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 h) {
  const uint32_t u = static_cast<uint32_t>(h.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {uint16_t(0x7fff)};
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}
struct __half {
  uint16_t bits;
};
inline float __half2float(__half h) {
  _Float16 v;
  std::memcpy(&v, &h, 2);
  return static_cast<float>(v);
}
inline __half __float2half_rn(float f) {
  const _Float16 v = static_cast<_Float16>(f);
  __half h;
  std::memcpy(&h, &v, 2);
  return h;
}
inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
inline float __expf(float v) { return std::exp(v); }
inline float __logf(float v) { return std::log(v); }
inline float __fdividef(float a, float b) { return a / b; }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
}
template <class T>
T __ldg(const T* p) { return *p; }
using std::max;
using std::min;
