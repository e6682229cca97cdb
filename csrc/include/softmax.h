// Softmax of attention scores over keys, scaled, of those keys that a query may attend to.
#pragma once
#include "include/abi.h"

struct MegalmSoftmaxForward {
  const void* x;         // (batches * per_batch, keys): scores, `queries` rows after each other for each head
  const uint8_t* mask;   // (batches, keys): 0 at keys that nothing attends to; or null
  void* y;               // like x: probabilities, 0 at keys that are masked; all 0 where every key is
  int64_t rows, per_batch, queries, keys;
  int64_t first_query;   // query q attends to keys up to first_query + q, if causal
  int32_t causal;
  float scale;           // of the scores, before the softmax
  int32_t dtype;
};

struct MegalmSoftmaxBackward {
  const void* dy;  // (rows, keys)
  const void* y;   // (rows, keys): probabilities
  void* dx;        // (rows, keys); may be dy
  int64_t rows, keys;
  float scale;
  int32_t dtype;
};

MEGALM_LAUNCHER(softmax_forward, MegalmSoftmaxForward);
MEGALM_LAUNCHER(softmax_backward, MegalmSoftmaxBackward);
