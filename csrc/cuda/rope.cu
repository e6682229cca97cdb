// Rotary position embedding: a thread has some features of a few heads of one position, whose angles it reads once.
#include "include/rope.h"

#include "cuda/portable.cuh"
#include "cuda/tile.cuh"

namespace megalm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kHeads = 4;  // of a thread

// N values as floats, read 16 bytes at a time.
template <int N, class C>
__device__ __forceinline__ void load_floats(const C* from, float (&to)[N]) {
  constexpr int P = N < kWide<C> ? N : kWide<C>;
#pragma unroll
  for (int i = 0; i < N; i += P) {
    const Vec<C, P> piece = *reinterpret_cast<const Vec<C, P>*>(from + i);
#pragma unroll
    for (int k = 0; k < P; ++k) to[i + k] = to_float(piece.v[k]);
  }
}

// A unit of a head is W features and their W partners, or with PAIRED the W / 2 pairs of one vector; units after those are
// vectors that are copied.
template <class T, class C, int W, bool PAIRED>
__global__ void __launch_bounds__(kThreads) turn(const MegalmRope a, int64_t groups, int64_t turned, int64_t units) {
  constexpr int N = PAIRED ? W / 2 : W;  // angles of a unit
  using V = Vec<T, W>;
  const Stretch<1> stretch(a.batch * a.seq, groups * units);
  const auto place = stretch[0];
  if (!place.live) return;
  const int64_t batch = place.row / a.seq, at = place.row - batch * a.seq;
  const int group = static_cast<int>(place.unit / units);
  const int64_t unit = place.unit - group * units, half = a.rotary_dim / 2;
  const bool copied = unit >= turned;
  // The unit's first feature, and how far its partners are.
  int64_t feature = unit * W, partner = half;
  if (PAIRED) partner = 0;
  else if (a.interleaved) feature = 2 * unit, partner = 1;
  if (copied) feature = a.rotary_dim + (unit - turned) * W, partner = 0;
  const int first = group * kHeads, heads = static_cast<int>(a.heads);
  const T* x = static_cast<const T*>(a.x) + batch * a.stride_batch + at * a.stride_seq + feature;
  T* y = static_cast<T*>(a.y) + place.row * a.heads * a.head_dim + feature;
  V one[kHeads], other[PAIRED ? 1 : kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; ++h)
    if (first + h < heads) {
      const T* head = x + (first + h) * a.stride_head;
      one[h] = *reinterpret_cast<const V*>(head);
      if (!PAIRED) other[h] = *reinterpret_cast<const V*>(head + partner);
    }
  float cos[N], sin[N];
  const int64_t angle = a.positions == nullptr ? at : a.positions[batch * a.stride_positions + at];
  const bool known = angle >= 0 && angle < a.angles;
  if (known && !copied) {
    load_floats<N>(static_cast<const C*>(a.cos) + angle * half + unit * N, cos);
    load_floats<N>(static_cast<const C*>(a.sin) + angle * half + unit * N, sin);
#pragma unroll
    for (int k = 0; k < N; ++k) sin[k] = a.inverse ? -sin[k] : sin[k];
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) cos[k] = known ? 1.f : NAN, sin[k] = 0.f;
  }
#pragma unroll
  for (int h = 0; h < kHeads; ++h)
    if (first + h < heads) {
      T* head = y + (first + h) * a.head_dim;
      V out;
      if (PAIRED) {
#pragma unroll
        for (int k = 0; k < N; ++k) {
          const float p = to_float(one[h].v[2 * k]), q = to_float(one[h].v[2 * k + 1]);
          out.v[2 * k] = from_float<T>(p * cos[k] - q * sin[k]);
          out.v[2 * k + 1] = from_float<T>(q * cos[k] + p * sin[k]);
        }
      } else {
        V out_other;
#pragma unroll
        for (int k = 0; k < N; ++k) {
          const float p = to_float(one[h].v[k]), q = to_float(other[h].v[k]);
          out.v[k] = from_float<T>(p * cos[k] - q * sin[k]);
          out_other.v[k] = from_float<T>(q * cos[k] + p * sin[k]);
        }
        if (!copied) *reinterpret_cast<V*>(head + partner) = out_other;
      }
      *reinterpret_cast<V*>(head) = copied && known ? one[h] : out;
    }
}

// Whether heads start, and are made of, whole 16-byte vectors, and so are the angles of each unit.
template <class T, class C>
bool whole(const MegalmRope& a) {
  const int64_t w = kWide<T>, units = a.interleaved ? w : 2 * w;
  return wide<T>(a.head_dim, a.x, a.y, a.cos, a.sin) && a.rotary_dim % units == 0 && a.stride_batch % w == 0 &&
         a.stride_seq % w == 0 && a.stride_head % w == 0;
}

template <class T, class C, int W, bool PAIRED>
void launch(const MegalmRope& a, void* stream) {
  const int64_t turned = a.rotary_dim / (PAIRED ? W : 2 * W), units = turned + (a.head_dim - a.rotary_dim) / W;
  const int64_t groups = ceil_div(a.heads, kHeads);
  const dim3 grid(stretches(a.batch * a.seq, groups * units, kThreads, 1));
  MEGALM_LAUNCH((turn<T, C, W, PAIRED>), grid, dim3(kThreads), 0, stream, a, groups, turned, units);
}

template <class T, class C>
void choose(const MegalmRope& a, void* stream) {
  if (!whole<T, C>(a)) launch<T, C, 1, false>(a, stream);
  else if (a.interleaved) launch<T, C, kWide<T>, true>(a, stream);
  else launch<T, C, kWide<T>, false>(a, stream);
}

}  // namespace
}  // namespace megalm::cuda

extern "C" int megalm_cuda_rope(const MegalmRope* a, void* stream) {
  using namespace megalm::cuda;
  const bool wide_angles = a->angle_dtype == MEGALM_F32;
  if (!wide_angles && a->angle_dtype != a->dtype) return static_cast<int>(cudaErrorInvalidValue);
  return with_dtype(a->dtype, [&](auto element) {
    using T = decltype(element);
    if (wide_angles) choose<T, float>(*a, stream);
    else choose<T, T>(*a, stream);
  });
}
