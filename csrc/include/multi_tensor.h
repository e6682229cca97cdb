// Norms, scaling and optimizer steps of many tensors at once, in chunks, so that launches are few.
#pragma once
#include "include/abi.h"

constexpr int64_t MEGALM_CHUNK = 1 << 15;  // elements that have one partial sum: its order is fixed on every backend
constexpr int32_t MEGALM_NO_COPY = -1;     // for a copy's dtype

// One tensor, or one parameter with what its optimizer keeps; an operation reads what it names.
struct MegalmMultiItem {
  void* gradient;        // of gradient_dtype
  float* weight;
  float* first;          // moments
  float* second;
  float* update;
  void* copy;            // of copy_dtype: the new weight, rounded
  int64_t size;
  int32_t gradient_dtype, copy_dtype;
};

struct MegalmMulti {
  const MegalmMultiItem* items;  // in the host's memory
  int64_t count;
  // All below in the device's memory.
  const float* factor;   // of the gradients; or null, which is 1
  float* found_inf;      // scale: becomes 1 where a gradient is not finite; steps: nothing happens unless 0, or null
  const int64_t* step;   // 1 for the first
  double* partial;       // (chunks of all items), twice that for lamb_update
  double* sums;          // (count); LAMB: (2, count), squares of weights, then of updates
  double lr, beta1, beta2, eps, weight_decay;
};

inline int64_t megalm_chunks(int64_t size) { return (size + MEGALM_CHUNK - 1) / MEGALM_CHUNK; }

MEGALM_LAUNCHER(multi_squares, MegalmMulti);      // gradients -> sums
MEGALM_LAUNCHER(multi_scale, MegalmMulti);        // gradients, factor -> gradients, found_inf
MEGALM_LAUNCHER(multi_adamw, MegalmMulti);        // all but update and sums -> weight, first, second, copy
MEGALM_LAUNCHER(multi_lamb_update, MegalmMulti);  // weight, gradient, moments -> moments, update, sums
MEGALM_LAUNCHER(multi_lamb_apply, MegalmMulti);   // weight, update, sums -> weight, copy
