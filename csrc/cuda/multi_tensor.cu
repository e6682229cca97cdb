// Lists of tensors: a launch takes as many as its arguments hold, by value, so that nothing is copied to the device and the
// host waits for nothing. A block takes one chunk of one tensor.
#include "include/multi_tensor.h"

#include "cuda/portable.cuh"
#include "include/adam.h"

namespace megalm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kItems = 48;  // a kernel's arguments have 4 KiB

struct Table {
  MegalmMultiItem item[kItems];
  int32_t first[kItems + 1];  // number of each item's first block in this launch
  int32_t items;
  int64_t first_item, first_chunk;  // in the whole list
};

// What this block works on.
struct Place {
  int item;
  int64_t begin, end, chunk;
};

__device__ __forceinline__ Place place(const Table& t) {
  const int block = static_cast<int>(blockIdx.x);
  int low = 0, high = t.items;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (t.first[middle] <= block) low = middle;
    else high = middle;
  }
  const int64_t begin = (block - t.first[low]) * MEGALM_CHUNK, end = begin + MEGALM_CHUNK, size = t.item[low].size;
  return {low, begin, end < size ? end : size, t.first_chunk + block};
}

template <int N>
using Width = std::integral_constant<int, N>;

// Calls f(Width<N>, i) for elements i .. i + N - 1 of [begin, end): four at once where all pointers allow that.
template <class F>
__device__ __forceinline__ void walk(int64_t begin, int64_t end, bool aligned, const F& f) {
  const int64_t whole = aligned ? begin + (end - begin) / 4 * 4 : begin;
  for (int64_t i = begin + threadIdx.x * 4; i < whole; i += kThreads * 4) f(Width<4>{}, i);
  for (int64_t i = whole + threadIdx.x; i < end; i += kThreads) f(Width<1>{}, i);
}

__device__ __forceinline__ bool aligned(const void* a) { return reinterpret_cast<uintptr_t>(a) % 16 == 0; }

template <int N>
__device__ __forceinline__ Vec<float, N> read(const float* p, int64_t i) {
  return *reinterpret_cast<const Vec<float, N>*>(p + i);
}

template <int N>
__device__ __forceinline__ void write(float* p, int64_t i, const Vec<float, N>& v) {
  *reinterpret_cast<Vec<float, N>*>(p + i) = v;
}

template <class T, int N>
__device__ __forceinline__ Vec<float, N> read_as(const void* p, int64_t i) {
  const Vec<T, N> x = *reinterpret_cast<const Vec<T, N>*>(static_cast<const T*>(p) + i);
  Vec<float, N> v;
#pragma unroll
  for (int k = 0; k < N; ++k) v.v[k] = to_float(x.v[k]);
  return v;
}

template <class T, int N>
__device__ __forceinline__ void write_as(void* p, int64_t i, const Vec<float, N>& v) {
  Vec<T, N> x;
#pragma unroll
  for (int k = 0; k < N; ++k) x.v[k] = from_float<T>(v.v[k]);
  *reinterpret_cast<Vec<T, N>*>(static_cast<T*>(p) + i) = x;
}

// Of a dtype that the whole block shares.
template <int N>
__device__ __forceinline__ Vec<float, N> read_any(int32_t dtype, const void* p, int64_t i) {
  if (dtype == MEGALM_BF16) return read_as<bf16, N>(p, i);
  if (dtype == MEGALM_F16) return read_as<f16, N>(p, i);
  return read_as<float, N>(p, i);
}

template <int N>
__device__ __forceinline__ void write_any(int32_t dtype, void* p, int64_t i, const Vec<float, N>& v) {
  if (dtype == MEGALM_BF16) write_as<bf16, N>(p, i, v);
  else if (dtype == MEGALM_F16) write_as<f16, N>(p, i, v);
  else if (dtype == MEGALM_F32) write_as<float, N>(p, i, v);
}

// The block's sum, in its first thread. Every thread must come here.
__device__ __forceinline__ double block_sum(double v, double* shared) {
#pragma unroll
  for (int distance = 16; distance > 0; distance >>= 1) v += __shfl_xor_sync(0xffffffffu, v, distance);
  __syncthreads();  // an earlier call's values may still be read
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int warp = 1; warp < kWarps; ++warp) v += shared[warp];
  return v;
}

template <int N>
__device__ __forceinline__ double squares(const Vec<float, N>& v) {
  double sum = 0.0;
#pragma unroll
  for (int k = 0; k < N; ++k) sum += static_cast<double>(v.v[k]) * static_cast<double>(v.v[k]);
  return sum;
}

// The squares of this thread's part of a chunk: four loads of 16 bytes at once.
template <class T>
__device__ __forceinline__ double chunk_squares(const void* data, int64_t begin, int64_t end) {
  constexpr int W = kWide<T>, AT_ONCE = 4;
  const int64_t whole = aligned(data) ? begin + (end - begin) / W * W : begin;
  double sum = 0.0;
  for (int64_t first = begin; first < whole; first += static_cast<int64_t>(kThreads) * W * AT_ONCE) {
    Vec<float, W> v[AT_ONCE];
#pragma unroll
    for (int u = 0; u < AT_ONCE; ++u) {
      const int64_t i = first + (u * kThreads + threadIdx.x) * W;
      if (i < whole) v[u] = read_as<T, W>(data, i);
    }
#pragma unroll
    for (int u = 0; u < AT_ONCE; ++u)
      if (first + (u * kThreads + threadIdx.x) * W < whole) sum += squares(v[u]);
  }
  for (int64_t i = whole + threadIdx.x; i < end; i += kThreads) sum += squares(read_as<T, 1>(data, i));
  return sum;
}

__global__ void __launch_bounds__(kThreads) squares_of_chunks(const Table t, double* partial) {
  MEGALM_SHARED(double, shared, kWarps);
  const Place at = place(t);
  const MegalmMultiItem& item = t.item[at.item];
  double sum;
  if (item.gradient_dtype == MEGALM_BF16) sum = chunk_squares<bf16>(item.gradient, at.begin, at.end);
  else if (item.gradient_dtype == MEGALM_F16) sum = chunk_squares<f16>(item.gradient, at.begin, at.end);
  else sum = chunk_squares<float>(item.gradient, at.begin, at.end);
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) partial[at.chunk] = sum;
}

// A block for each item adds up its chunks.
__global__ void __launch_bounds__(kThreads) add_up(const Table t, const double* partial, double* sums) {
  MEGALM_SHARED(double, shared, kWarps);
  const int item = static_cast<int>(blockIdx.x);
  double sum = 0.0;
  for (int c = t.first[item] + static_cast<int>(threadIdx.x); c < t.first[item + 1]; c += kThreads) sum += partial[t.first_chunk + c];
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) sums[t.first_item + item] = sum;
}

// Whether something is not finite.
template <class T>
__device__ __forceinline__ bool scale_chunk(void* data, int64_t begin, int64_t end, float factor) {
  constexpr int W = kWide<T>, AT_ONCE = 4;
  const int64_t whole = aligned(data) ? begin + (end - begin) / W * W : begin;
  bool bad = false;
  const auto scaled = [&](auto& v) {
#pragma unroll
    for (float& value : v.v) {
      bad |= !(fabsf(value) <= 3.4028234e38f);
      value *= factor;
    }
  };
  for (int64_t first = begin; first < whole; first += static_cast<int64_t>(kThreads) * W * AT_ONCE) {
    Vec<float, W> v[AT_ONCE];
#pragma unroll
    for (int u = 0; u < AT_ONCE; ++u) {
      const int64_t i = first + (u * kThreads + threadIdx.x) * W;
      if (i < whole) v[u] = read_as<T, W>(data, i);
    }
#pragma unroll
    for (int u = 0; u < AT_ONCE; ++u) {
      const int64_t i = first + (u * kThreads + threadIdx.x) * W;
      if (i >= whole) continue;
      scaled(v[u]);
      if (factor != 1.f) write_as<T, W>(data, i, v[u]);
    }
  }
  for (int64_t i = whole + threadIdx.x; i < end; i += kThreads) {
    Vec<float, 1> v = read_as<T, 1>(data, i);
    scaled(v);
    if (factor != 1.f) write_as<T, 1>(data, i, v);
  }
  return bad;
}

__global__ void __launch_bounds__(kThreads) scale(const Table t, const float* factor, float* found_inf) {
  const Place at = place(t);
  const MegalmMultiItem& item = t.item[at.item];
  const float f = *factor;
  bool bad;
  if (item.gradient_dtype == MEGALM_BF16) bad = scale_chunk<bf16>(item.gradient, at.begin, at.end, f);
  else if (item.gradient_dtype == MEGALM_F16) bad = scale_chunk<f16>(item.gradient, at.begin, at.end, f);
  else bad = scale_chunk<float>(item.gradient, at.begin, at.end, f);
  if (bad) *found_inf = 1.f;  // whoever writes, writes the same
}

__device__ __forceinline__ bool skipped(const MegalmMulti& a) { return a.found_inf != nullptr && *a.found_inf != 0.f; }

// A step's constants, computed once for the block. Every thread must come here.
__device__ __forceinline__ AdamStep shared_step(const MegalmMulti& a, AdamStep* shared) {
  if (threadIdx.x == 0) *shared = adam_step(a, *a.step);
  __syncthreads();
  return *shared;
}

__global__ void __launch_bounds__(kThreads) adamw(const Table t, const MegalmMulti a) {
  MEGALM_SHARED(AdamStep, shared, 1);
  if (skipped(a)) return;
  const AdamStep s = shared_step(a, shared);
  const Place at = place(t);
  const MegalmMultiItem& item = t.item[at.item];
  const float factor = a.factor != nullptr ? *a.factor : 1.f;
  const bool wide = aligned(item.weight) && aligned(item.gradient) && aligned(item.first) && aligned(item.second) && aligned(item.copy);
  walk(at.begin, at.end, wide, [&](auto width, int64_t i) {
    constexpr int N = decltype(width)::value;
    const Vec<float, N> g = read_any<N>(item.gradient_dtype, item.gradient, i);
    Vec<float, N> w = read<N>(item.weight, i), first = read<N>(item.first, i), second = read<N>(item.second, i);
#pragma unroll
    for (int k = 0; k < N; ++k)
      w.v[k] = w.v[k] * s.decay - s.rate * adam_moments(s, g.v[k] * factor, first.v[k], second.v[k]);
    write(item.weight, i, w);
    write(item.first, i, first);
    write(item.second, i, second);
    write_any(item.copy_dtype, item.copy, i, w);
  });
}

__global__ void __launch_bounds__(kThreads) lamb_update(const Table t, const MegalmMulti a, double* of_updates) {
  MEGALM_SHARED(AdamStep, shared, 1);
  MEGALM_SHARED(double, warps, kWarps);
  const Place at = place(t);
  if (skipped(a)) {
    if (threadIdx.x == 0) a.partial[at.chunk] = 0.0, of_updates[at.chunk] = 0.0;
    return;
  }
  const AdamStep s = shared_step(a, shared);
  const MegalmMultiItem& item = t.item[at.item];
  const float factor = a.factor != nullptr ? *a.factor : 1.f;
  const bool wide = aligned(item.weight) && aligned(item.gradient) && aligned(item.first) && aligned(item.second) && aligned(item.update);
  double of_weight = 0.0, of_update = 0.0;
  walk(at.begin, at.end, wide, [&](auto width, int64_t i) {
    constexpr int N = decltype(width)::value;
    const Vec<float, N> g = read_any<N>(item.gradient_dtype, item.gradient, i), w = read<N>(item.weight, i);
    Vec<float, N> first = read<N>(item.first, i), second = read<N>(item.second, i), update;
#pragma unroll
    for (int k = 0; k < N; ++k)
      update.v[k] = adam_moments(s, g.v[k] * factor, first.v[k], second.v[k]) * s.inverse + s.weight_decay * w.v[k];
    write(item.first, i, first);
    write(item.second, i, second);
    write(item.update, i, update);
    of_weight += squares(w);
    of_update += squares(update);
  });
  of_weight = block_sum(of_weight, warps);
  of_update = block_sum(of_update, warps);
  if (threadIdx.x == 0) a.partial[at.chunk] = of_weight, of_updates[at.chunk] = of_update;
}

__global__ void __launch_bounds__(kThreads) lamb_apply(const Table t, const MegalmMulti a) {
  if (skipped(a)) return;
  const Place at = place(t);
  const MegalmMultiItem& item = t.item[at.item];
  const int64_t number = t.first_item + at.item;
  const float rate = lamb_rate(a.lr, a.sums[number], a.sums[a.count + number]);
  walk(at.begin, at.end, aligned(item.weight) && aligned(item.update) && aligned(item.copy), [&](auto width, int64_t i) {
    constexpr int N = decltype(width)::value;
    const Vec<float, N> update = read<N>(item.update, i);
    Vec<float, N> w = read<N>(item.weight, i);
#pragma unroll
    for (int k = 0; k < N; ++k) w.v[k] -= rate * update.v[k];
    write(item.weight, i, w);
    write_any(item.copy_dtype, item.copy, i, w);
  });
}

// Calls f(table, blocks) for as many items at once as a table holds.
template <class F>
int for_tables(const MegalmMulti& a, const F& f) {
  Table t{};
  for (int64_t from = 0, chunk = 0; from < a.count; from += t.items, chunk += t.first[t.items]) {
    t.first_item = from, t.first_chunk = chunk;
    t.items = static_cast<int32_t>(std::min<int64_t>(kItems, a.count - from));
    t.first[0] = 0;
    for (int i = 0; i < t.items; ++i) {
      t.item[i] = a.items[from + i];
      t.first[i + 1] = t.first[i] + static_cast<int32_t>(megalm_chunks(t.item[i].size));
    }
    f(t, t.first[t.items]);
  }
  return static_cast<int>(cudaGetLastError());
}

void launch_add_up(const Table& t, const double* partial, double* sums, void* stream) {
  MEGALM_LAUNCH(add_up, dim3(t.items), dim3(kThreads), 0, stream, t, partial, sums);
}

}  // namespace
}  // namespace megalm::cuda

extern "C" int megalm_cuda_multi_squares(const MegalmMulti* a, void* stream) {
  using namespace megalm::cuda;
  return for_tables(*a, [&](const Table& t, int blocks) {
    if (blocks > 0) MEGALM_LAUNCH(squares_of_chunks, dim3(blocks), dim3(kThreads), 0, stream, t, a->partial);
    launch_add_up(t, a->partial, a->sums, stream);
  });
}

extern "C" int megalm_cuda_multi_scale(const MegalmMulti* a, void* stream) {
  using namespace megalm::cuda;
  return for_tables(*a, [&](const Table& t, int blocks) {
    if (blocks > 0) MEGALM_LAUNCH(scale, dim3(blocks), dim3(kThreads), 0, stream, t, a->factor, a->found_inf);
  });
}

extern "C" int megalm_cuda_multi_adamw(const MegalmMulti* a, void* stream) {
  using namespace megalm::cuda;
  return for_tables(*a, [&](const Table& t, int blocks) {
    if (blocks > 0) MEGALM_LAUNCH(adamw, dim3(blocks), dim3(kThreads), 0, stream, t, *a);
  });
}

extern "C" int megalm_cuda_multi_lamb_update(const MegalmMulti* a, void* stream) {
  using namespace megalm::cuda;
  int64_t chunks = 0;
  for (int64_t i = 0; i < a->count; ++i) chunks += megalm_chunks(a->items[i].size);
  double* of_updates = a->partial + chunks;
  return for_tables(*a, [&](const Table& t, int blocks) {
    if (blocks > 0) MEGALM_LAUNCH(lamb_update, dim3(blocks), dim3(kThreads), 0, stream, t, *a, of_updates);
    launch_add_up(t, a->partial, a->sums, stream);
    launch_add_up(t, of_updates, a->sums + a->count, stream);
  });
}

extern "C" int megalm_cuda_multi_lamb_apply(const MegalmMulti* a, void* stream) {
  using namespace megalm::cuda;
  return for_tables(*a, [&](const Table& t, int blocks) {
    if (blocks > 0) MEGALM_LAUNCH(lamb_apply, dim3(blocks), dim3(kThreads), 0, stream, t, *a);
  });
}
