// CUDA C++ on a processor: a fiber for each thread of a block, one block after the other.
//
// Blocks run in random order (MEGALM_EMU_SEED), and fibers go on in a new one after each barrier, so that a missing one
// shows as a wrong result. Shared memory is allocated array by array and filled with rubbish: what is read before it is
// written is a NaN, and AddressSanitizer sees each array's ends. A barrier that not all threads reach, or not the same one, a shuffle from a
// lane that takes no part, and more shared memory than a block may have end the program with a message.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "emu/fiber.hpp"

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
constexpr size_t kSharedLimit = 48 << 10;  // of arrays and dynamic memory together
// Few, so that kernels which walk over rows with as many blocks as there are multiprocessors do walk.
constexpr int kMultiprocessors = 3;

struct Barrier {
  unsigned generation = 0, arrived = 0;
  const char* file = nullptr;  // where the first to arrive waits
  int line = 0;
};

struct Fiber {
  Place place;
  dim3 thread;
  int number = 0;
  bool done = false;
  const Barrier* waits = nullptr;  // until its generation is another
  unsigned generation = 0;
  unsigned exchanges = 0;
};

// What a lane gives to the others of its warp. Two, in turn: a lane may be one exchange ahead of another, and no more.
struct Offer {
  uint64_t value = 0;
  unsigned exchange = 0;
};

struct Block {
  std::vector<std::unique_ptr<char[]>> stacks;
  std::vector<Fiber> fibers;
  std::vector<Fiber*> order;  // of those that are not done
  size_t next = 0;
  bool moved = false;
  unsigned round = 0;
  uint64_t held = 0;  // warps that wait though they could go on: a bit for each of at most 32
  Barrier barrier;
  std::vector<Barrier> warps;
  std::vector<unsigned> warp_alive;
  std::vector<Offer> offers[2];
  std::map<std::pair<const char*, int>, std::unique_ptr<unsigned char[]>> arrays;
  std::unique_ptr<unsigned char[]> dynamic;
  size_t dynamic_bytes = 0, array_bytes = 0;
  Place outside;
  Fiber* current = nullptr;
  dim3 index, size, grid;
  std::function<void()> body;
  uint64_t random = seed();
  std::mutex launching;

  static uint64_t seed() {
    const char* given = std::getenv("MEGALM_EMU_SEED");
    return 0x9E3779B97F4A7C15ull * (1 + static_cast<uint64_t>(given != nullptr ? std::atoll(given) : 0));
  }
};

inline Block the_block;

inline Block& block() { return the_block; }

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
  if (!array) {
    array = rubbish(count * sizeof(T));
    block().array_bytes += count * sizeof(T);
    if (block().array_bytes + block().dynamic_bytes > kSharedLimit) stop("more shared memory than a block may have");
  }
  return reinterpret_cast<T*>(array.get());
}

template <class T>
T* dynamic() {
  return reinterpret_cast<T*>(block().dynamic.get());
}

inline uint64_t draw() {
  uint64_t& r = block().random;
  r ^= r << 13, r ^= r >> 7, r ^= r << 17;
  return r;
}

// Which fiber goes on; none when all are done. A round takes each that can in random order, but for some warps that are
// held back for several rounds: what others overwrite meanwhile is seen then.
inline Fiber* choose() {
  constexpr int kRoundsHeld = 16;
  Block& b = block();
  for (;;) {
    while (b.next < b.order.size()) {
      Fiber* fiber = b.order[b.next++];
      if (fiber->done || (fiber->waits != nullptr && fiber->waits->generation == fiber->generation)) continue;
      if ((b.held >> (fiber->number / kWarp) & 1) != 0) continue;
      b.moved = true;
      return fiber;
    }
    b.order.erase(std::remove_if(b.order.begin(), b.order.end(), [](const Fiber* f) { return f->done; }), b.order.end());
    if (b.order.empty()) return nullptr;
    if (!b.moved && b.held == 0) stop("a barrier that not all threads reach");
    if (!b.moved) b.held = 0;
    else if (++b.round % kRoundsHeld == 0) b.held = b.warps.size() > 1 ? draw() & draw() : 0;
    b.moved = false;
    b.next = 0;
    for (size_t i = b.order.size() - 1; i > 0; --i) std::swap(b.order[i], b.order[(draw() >> 32) * (i + 1) >> 32]);
  }
}

inline void wait_for(const Barrier& barrier) {
  Block& b = block();
  Fiber& me = *b.current;
  me.waits = &barrier;
  me.generation = barrier.generation;
  Fiber* other = choose();
  if (other != &me) {
    b.current = other;
    me.place.go(other->place);
  }
  me.waits = nullptr;
}

inline void open(Barrier& barrier) {
  barrier.arrived = 0;
  ++barrier.generation;
}

inline void arrive(Barrier& barrier, unsigned expected) {
  if (++barrier.arrived >= expected) open(barrier);
  else wait_for(barrier);
}

inline int lane() { return block().current->number % kWarp; }
inline int warp() { return block().current->number / kWarp; }
inline void sync_warp() { arrive(block().warps[warp()], block().warp_alive[warp()]); }

inline void sync_block(const char* file, int line) {
  Barrier& barrier = block().barrier;
  if (barrier.arrived == 0) barrier.file = file, barrier.line = line;
  else if (barrier.line != line || std::strcmp(barrier.file, file) != 0) stop("threads wait at different barriers");
  arrive(barrier, static_cast<unsigned>(block().fibers.size()));
}

inline void fiber_main() {
  Block& b = block();
  Fiber& me = *b.current;
  me.place.arrived(&b.outside);
  b.body();
  me.done = true;
  Barrier& warp = b.warps[me.number / kWarp];
  // Lanes that have ended are not waited for.
  if (--b.warp_alive[me.number / kWarp] == warp.arrived && warp.arrived > 0) open(warp);
  Fiber* other = choose();
  b.current = other;
  me.place.go(other != nullptr ? other->place : b.outside, true);
  std::abort();
}

inline void run_block() {
  Block& b = block();
  const size_t threads = static_cast<size_t>(b.size.x) * b.size.y * b.size.z;
  const size_t warps = (threads + kWarp - 1) / kWarp;
  while (b.stacks.size() < threads) b.stacks.emplace_back(new char[kStack]);
  b.fibers.assign(threads, Fiber());
  b.order.clear();
  b.barrier = {};
  b.warps.assign(warps, {});
  b.warp_alive.assign(warps, 0);
  for (auto& offers : b.offers) offers.assign(warps * kWarp, {});
  b.arrays.clear();
  b.array_bytes = 0;
  b.dynamic = rubbish(b.dynamic_bytes);
  for (size_t i = 0; i < threads; ++i) {
    Fiber& fiber = b.fibers[i];
    fiber.number = static_cast<int>(i);
    fiber.thread = dim3(i % b.size.x, i / b.size.x % b.size.y, i / b.size.x / b.size.y);
    ++b.warp_alive[i / kWarp];
    fiber.place.start(b.stacks[i].get(), kStack, fiber_main);
    b.order.push_back(&fiber);
  }
  b.outside = Place();
  b.next = b.order.size();
  b.moved = true;
  b.current = choose();
  b.outside.go(b.current->place);
}

template <class K, class... A>
void launch(K kernel, dim3 grid, dim3 size, size_t shared_bytes, A... args) {
  Block& b = block();
  if (size_t(size.x) * size.y * size.z > 1024 || size.x == 0 || grid.x == 0 || grid.y == 0 || grid.y > 65535 ||
      shared_bytes > kSharedLimit) {
    last_error() = cudaErrorInvalidConfiguration;
    return;
  }
  const std::lock_guard<std::mutex> one_at_a_time(b.launching);
  b.size = size;
  b.grid = grid;
  b.dynamic_bytes = shared_bytes;
  b.body = [=] { kernel(args...); };
  // Blocks in random order too: none may count on what another has written.
  std::vector<uint64_t> order(uint64_t{grid.x} * grid.y * grid.z);
  for (uint64_t i = 0; i < order.size(); ++i) std::swap(order[i] = i, order[draw() % (i + 1)]);
  for (const uint64_t i : order) {
    b.index = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
    run_block();
  }
}

// Every lane of the warp gives a value and takes the one of a lane of its own choice.
template <class T>
T exchange(T value, int from) {
  static_assert(sizeof(T) <= 8, "at most eight bytes");
  Block& b = block();
  Fiber& me = *b.current;
  auto& offers = b.offers[++me.exchanges % 2];
  Offer& mine = offers[me.number];
  std::memcpy(&mine.value, &value, sizeof(T));
  mine.exchange = me.exchanges;
  sync_warp();
  const Offer& other = offers[me.number / kWarp * kWarp + from];
  if (other.exchange != me.exchanges) stop("a shuffle from a lane that takes no part in it");
  T result;
  std::memcpy(&result, &other.value, sizeof(T));
  return result;
}

}  // namespace emu

#define threadIdx (::emu::block().current->thread)
#define blockIdx (::emu::block().index)
#define blockDim (::emu::block().size)
#define gridDim (::emu::block().grid)
#define __syncthreads() ::emu::sync_block(__FILE__, __LINE__)
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
inline const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
  }
  return "unrecognized error code";
}
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
  }
  return "unrecognized error code";
}
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
