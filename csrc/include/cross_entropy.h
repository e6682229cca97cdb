// Cross-entropy over a part of a vocabulary: what is known of each token's logits, and their gradient in their place.
#pragma once
#include "include/abi.h"

struct MegalmCrossEntropyStatistics {
  const void* logits;     // (tokens, rows); token t's at t * stride
  const int64_t* labels;  // (tokens), of the whole vocabulary
  float* maximum;         // (tokens); -inf where nothing is larger
  float* sum;             // (tokens): of exp(logit - maximum)
  float* target;          // (tokens): the label's logit, or 0 if it is not among these rows
  float* total;           // (tokens): the sum of logits; or null
  int64_t tokens, rows, stride;
  int64_t first_row;      // of the whole vocabulary
  int32_t dtype;
};

struct MegalmCrossEntropyGradient {
  void* logits;           // as above; becomes factor exp(logit - maximum) - scale (smooth + confidence [is the label])
  const int64_t* labels;
  const float* maximum;   // (tokens)
  const float* factor;    // (tokens)
  const float* scale;     // (tokens); where 0, the gradient is 0 whatever the logits are
  int64_t tokens, rows, stride;
  int64_t first_row;
  float smooth, confidence;
  int32_t dtype;
};

MEGALM_LAUNCHER(cross_entropy_statistics, MegalmCrossEntropyStatistics);
MEGALM_LAUNCHER(cross_entropy_gradient, MegalmCrossEntropyGradient);
