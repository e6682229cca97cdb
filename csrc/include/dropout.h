// y = residual + dropout(x + bias), its mask drawn where it is needed: backward draws it again, or reads what the forward
// kept of it, a bit for each feature, which is faster on the processor; CUDA keeps nothing.
//
// Rows are tokens. A span says where consecutive ones lie: five int64, the number of its first row, then slot, view,
// position and step of that row. Spans cover all rows, in order. Feature f of the token at a position is kept where draw
// f % 16 of Philox block position * ceil(cols / 16) + f / 16, under the counter words (slot, view, step), is not below
// the threshold.
#pragma once
#include "include/abi.h"

struct MegalmDropoutMask {
  const int64_t* spans;  // (count, 5)
  int64_t count;
  uint64_t key_low, key_high;
  int32_t threshold;     // 0 .. 65535
  float scale;           // of what is kept
};

struct MegalmDropoutForward {
  const void* x;         // (rows, cols)
  const void* residual;  // (rows, cols), or null
  const void* bias;      // (cols), or null
  void* y;               // (rows, cols)
  uint8_t* kept;         // (rows, 2 * ceil(cols / 16)), feature f in bit f % 8 of byte f / 8; or null
  MegalmDropoutMask mask;
  int64_t rows, cols;
  int32_t dtype;
};

struct MegalmDropoutBackward {
  const void* dy;       // (rows, cols)
  const uint8_t* kept;  // what the forward kept, or null
  void* dx;             // (rows, cols)
  void* dbias;          // (cols), or null
  float* partial;       // (partials, cols) with dbias
  MegalmDropoutMask mask;
  int64_t rows, cols, partials;
  int32_t dtype;
};

MEGALM_LAUNCHER(dropout_forward, MegalmDropoutForward);
MEGALM_LAUNCHER(dropout_backward, MegalmDropoutBackward);
MEGALM_PARTIALS(dropout_partials);
