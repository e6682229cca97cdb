// Activations with what surrounds them: gated ones, and those of a sum with a bias.
#pragma once
#include "include/abi.h"

// Numbered as megalm/ops/native/activation.py numbers them.
enum MegalmActivation : int32_t { MEGALM_GELU = 0, MEGALM_GELU_TANH = 1, MEGALM_SILU = 2, MEGALM_RELU = 3 };

// y = activation(gate) * up
struct MegalmGatedForward {
  const void* x;  // (rows, 2, cols): gate, up
  void* y;        // (rows, cols)
  int64_t rows, cols;
  int32_t kind, dtype;
};

struct MegalmGatedBackward {
  const void* dy;  // (rows, cols)
  const void* x;   // (rows, 2, cols)
  void* dx;        // (rows, 2, cols)
  int64_t rows, cols;
  int32_t kind, dtype;
};

// y = activation(x + bias)
struct MegalmBiasActivationForward {
  const void* x;     // (rows, cols)
  const void* bias;  // (cols), or null
  void* y;           // (rows, cols)
  int64_t rows, cols;
  int32_t kind, dtype;
};

struct MegalmBiasActivationBackward {
  const void* dy;    // (rows, cols)
  const void* x;     // (rows, cols)
  const void* bias;  // (cols), or null
  void* dx;          // (rows, cols)
  void* dbias;       // (cols), or null as the bias
  float* partial;    // (partials, cols)
  int64_t rows, cols, partials;
  int32_t kind, dtype;
};

MEGALM_LAUNCHER(gated_forward, MegalmGatedForward);
MEGALM_LAUNCHER(gated_backward, MegalmGatedBackward);
MEGALM_LAUNCHER(bias_activation_forward, MegalmBiasActivationForward);
MEGALM_LAUNCHER(bias_activation_backward, MegalmBiasActivationBackward);
MEGALM_PARTIALS(bias_activation_partials);
