// Rotary position embedding.
#pragma once
#include "include/abi.h"

struct MegalmRope {
  const void* x;             // (batch, seq, heads, head_dim), in strides of all but the last dimension
  const void* cos;           // (angles, rotary_dim / 2)
  const void* sin;           // likewise
  const int64_t* positions;  // (batch, seq), in a stride of the batch: the row of cos and sin; or null: the place in seq
  void* y;                   // (batch, seq, heads, head_dim), contiguous
  int64_t batch, seq, heads, head_dim, rotary_dim, angles;
  int64_t stride_batch, stride_seq, stride_head, stride_positions;
  bool interleaved;          // features 2i and 2i + 1 turn together; else i and i + rotary_dim / 2
  bool inverse;              // turn back
  int32_t dtype;             // of x and y
  int32_t angle_dtype;       // of cos and sin: float32, or dtype
};

MEGALM_LAUNCHER(rope, MegalmRope);
