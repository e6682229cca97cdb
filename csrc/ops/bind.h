// What every binding needs: torch's stable ABI, and which backend this compilation is for.
//
// A file of ops/ is compiled once for each backend. MEGALM_CPU defines the operations' schemas and their implementations
// on CPU tensors, MEGALM_CUDA those on CUDA tensors; MEGALM_EMU puts CUDA's launchers, compiled for the host, behind
// operations of their own namespace on CPU tensors, so that tests reach them as they reach the others.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>

#include "include/abi.h"

#if defined(MEGALM_CPU)
#define MEGALM_CALL(name) megalm_cpu_##name
#define MEGALM_SCHEMAS(m) STABLE_TORCH_LIBRARY_FRAGMENT(megalm, m)
#define MEGALM_IMPLEMENTATIONS(m) STABLE_TORCH_LIBRARY_IMPL(megalm, CPU, m)
#elif defined(MEGALM_CUDA)
#include <torch/csrc/stable/accelerator.h>
#define MEGALM_CALL(name) megalm_cuda_##name
#define MEGALM_IMPLEMENTATIONS(m) STABLE_TORCH_LIBRARY_IMPL(megalm, CUDA, m)
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#elif defined(MEGALM_EMU)
#define MEGALM_CALL(name) megalm_cuda_##name
#define MEGALM_SCHEMAS(m) STABLE_TORCH_LIBRARY_FRAGMENT(megalm_emu, m)
#define MEGALM_IMPLEMENTATIONS(m) STABLE_TORCH_LIBRARY_IMPL(megalm_emu, CPU, m)
#else
#error "compile with -DMEGALM_CPU, -DMEGALM_CUDA or -DMEGALM_EMU"
#endif

namespace megalm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Makes a tensor's device current while it lives, and knows the stream to launch on.
class OnDevice {
 public:
#if defined(MEGALM_CUDA)
  explicit OnDevice(const Tensor& t) : guard_(t.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
  }
#else
  explicit OnDevice(const Tensor&) {}
#endif
  void* stream() const { return stream_; }

 private:
#if defined(MEGALM_CUDA)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_ = nullptr;
};

inline int32_t dtype_of(const Tensor& t, const char* op) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return MEGALM_F32;
    case ScalarType::BFloat16: return MEGALM_BF16;
    case ScalarType::Half: return MEGALM_F16;
    default: STD_TORCH_CHECK(false, op, ": expected float32, bfloat16 or float16"); return -1;
  }
}

inline void succeeded(int status, const char* op) {
  STD_TORCH_CHECK(status == 0, op, ": the kernel could not be launched: ", MEGALM_CALL(error_name)(status), " (",
                  status, "): ", MEGALM_CALL(error_text)(status));
}

// A kernel that follows a pointer of another device takes the whole program with it.
inline void check_beside(const char* op, const Tensor& one, const Tensor& other) {
  STD_TORCH_CHECK(one.is_cuda() == other.is_cuda() && one.is_cpu() == other.is_cpu() &&
                      one.get_device_index() == other.get_device_index(),
                  op, ": all tensors must be on one device");
}

inline void check_beside(const char* op, const Tensor& one, const std::optional<Tensor>& other) {
  if (other.has_value()) check_beside(op, one, *other);
}

template <class... Others>
void check_together(const char* op, const Tensor& one, const Others&... others) {
  (check_beside(op, one, others), ...);
}

inline Tensor packed(const Tensor& t) { return torch::stable::contiguous(t); }

inline std::optional<Tensor> packed(const std::optional<Tensor>& t) {
  return t.has_value() ? std::optional<Tensor>(packed(*t)) : std::nullopt;
}

inline const void* in(const Tensor& t) { return t.const_data_ptr(); }
inline const void* in(const std::optional<Tensor>& t) { return t.has_value() ? t->const_data_ptr() : nullptr; }
template <class T>
const T* in_as(const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); }
inline void* out(Tensor& t) { return t.mutable_data_ptr(); }
template <class T>
T* out_as(Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); }

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.size(i) != b.size(i)) return false;
  return true;
}

// Rows of a tensor seen as (rows, its last dimension).
inline int64_t rows_of(const Tensor& t) { return t.size(-1) == 0 ? 0 : t.numel() / t.size(-1); }

}  // namespace megalm
