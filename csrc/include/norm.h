// Root-mean-square and layer normalisation of rows, optionally of a sum that is stored as well.
#pragma once
#include "include/abi.h"

struct MegalmNormForward {
  const void* x;         // (rows, cols)
  const void* residual;  // (rows, cols), added to x first; or null
  const void* weight;    // (cols)
  const void* bias;      // (cols), or null
  void* y;               // (rows, cols)
  void* sum;             // (rows, cols): x + residual; null where residual is
  float* mean;           // (rows); null: root-mean-square, else layer normalisation
  float* rstd;           // (rows)
  int64_t rows, cols;
  float eps;
  float offset;          // added to the weight: 1 where weights are centred at zero
  int32_t dtype;
};

struct MegalmNormBackward {
  const void* dy;      // (rows, cols)
  const void* dsum;    // (rows, cols): gradient that the sum has from elsewhere; or null
  const void* x;       // (rows, cols): what was normalised
  const void* weight;  // (cols)
  const float* mean;   // (rows), or null as in forward
  const float* rstd;   // (rows)
  void* dx;            // (rows, cols)
  void* dweight;       // (cols)
  void* dbias;         // (cols), or null
  float* partial;      // (partials, 1 or 2 with dbias, cols)
  int64_t rows, cols, partials;
  float offset;
  int32_t dtype;
};

MEGALM_LAUNCHER(norm_forward, MegalmNormForward);
MEGALM_LAUNCHER(norm_backward, MegalmNormBackward);
MEGALM_PARTIALS(norm_partials);
