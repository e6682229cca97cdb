// The plain C interface between bindings (ops/) and kernels (cpu/, cuda/): neither side sees the other's headers.
//
// A launcher takes its arguments as one struct and returns 0, or an error of its backend, which has a name and a text.
// Tensors are contiguous, of one dtype unless the struct says otherwise, and may be empty.
#pragma once
#include <cstdint>

enum MegalmDtype : int32_t { MEGALM_F32 = 0, MEGALM_BF16 = 1, MEGALM_F16 = 2 };

// Declares a launcher of every backend. `stream` is CUDA's, and null elsewhere.
#define MEGALM_LAUNCHER(name, Args)                              \
  extern "C" int megalm_cpu_##name(const Args* args, void* stream); \
  extern "C" int megalm_cuda_##name(const Args* args, void* stream)

extern "C" const char* megalm_cpu_error_name(int status);
extern "C" const char* megalm_cpu_error_text(int status);
extern "C" const char* megalm_cuda_error_name(int status);
extern "C" const char* megalm_cuda_error_text(int status);

// Declares how many rows of partial sums a launcher fills before it adds them up.
#define MEGALM_PARTIALS(name)                                   \
  extern "C" int64_t megalm_cpu_##name(int64_t rows, int64_t cols); \
  extern "C" int64_t megalm_cuda_##name(int64_t rows, int64_t cols)
