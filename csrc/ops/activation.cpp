// Bindings of gated and biased activations; see include/activation.h for shapes and megalm/ops/activation.py for what they
// mean.
#include "include/activation.h"

#include <vector>

#include "ops/bind.h"

namespace megalm {
namespace {

int32_t kind_of(int64_t kind, const char* op) {
  STD_TORCH_CHECK(kind >= MEGALM_GELU && kind <= MEGALM_RELU, op, ": there is no activation of number ", kind);
  return static_cast<int32_t>(kind);
}

// Columns of a half.
int64_t check_gated(const char* op, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(-1) % 2 == 0, op, ": the last dimension of x must hold two halves");
  return x.size(-1) / 2;
}

Tensor gated(const Tensor& x0, int64_t kind) {
  const char* op = "gated_activation";
  const int64_t cols = check_gated(op, x0);
  OnDevice device(x0);
  const Tensor x = packed(x0);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = cols;
  Tensor y = torch::stable::new_empty(x, shape);
  MegalmGatedForward a{};
  a.x = in(x), a.y = out(y), a.rows = rows_of(x), a.cols = cols, a.kind = kind_of(kind, op), a.dtype = dtype_of(x, op);
  if (a.rows > 0) succeeded(MEGALM_CALL(gated_forward)(&a, device.stream()), op);
  return y;
}

Tensor gated_backward(const Tensor& dy0, const Tensor& x0, int64_t kind) {
  const char* op = "gated_activation_backward";
  const int64_t cols = check_gated(op, x0);
  STD_TORCH_CHECK(dy0.dim() == x0.dim() && dy0.numel() * 2 == x0.numel() && dy0.size(-1) == cols &&
                      dy0.scalar_type() == x0.scalar_type(),
                  op, ": dy must have the dtype of x and the shape of its half");
  check_together(op, x0, dy0);
  OnDevice device(x0);
  const Tensor x = packed(x0), dy = packed(dy0);
  Tensor dx = torch::stable::empty_like(x);
  MegalmGatedBackward a{};
  a.dy = in(dy), a.x = in(x), a.dx = out(dx);
  a.rows = rows_of(x), a.cols = cols, a.kind = kind_of(kind, op), a.dtype = dtype_of(x, op);
  if (a.rows > 0) succeeded(MEGALM_CALL(gated_backward)(&a, device.stream()), op);
  return dx;
}

void check_biased(const char* op, const Tensor& x, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(x.dim() >= 1, op, ": x needs at least one dimension");
  if (!bias.has_value()) return;
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == x.size(-1), op, ": the bias must have the size of x's last dimension");
  STD_TORCH_CHECK(bias->scalar_type() == x.scalar_type(), op, ": x and bias must have one dtype");
  check_together(op, x, bias);
}

Tensor biased(const Tensor& x0, std::optional<Tensor> bias0, int64_t kind) {
  const char* op = "bias_activation";
  check_biased(op, x0, bias0);
  OnDevice device(x0);
  const Tensor x = packed(x0);
  const std::optional<Tensor> bias = packed(bias0);
  Tensor y = torch::stable::empty_like(x);
  MegalmBiasActivationForward a{};
  a.x = in(x), a.bias = in(bias), a.y = out(y);
  // Without a bias there are no rows, only elements.
  a.rows = bias.has_value() ? rows_of(x) : 1, a.cols = bias.has_value() ? x.size(-1) : x.numel();
  a.kind = kind_of(kind, op), a.dtype = dtype_of(x, op);
  if (x.numel() > 0) succeeded(MEGALM_CALL(bias_activation_forward)(&a, device.stream()), op);
  return y;
}

// Without a bias its gradient is empty.
std::tuple<Tensor, Tensor> biased_backward(const Tensor& dy0, const Tensor& x0, std::optional<Tensor> bias0, int64_t kind) {
  const char* op = "bias_activation_backward";
  check_biased(op, x0, bias0);
  STD_TORCH_CHECK(same_shape(dy0, x0) && dy0.scalar_type() == x0.scalar_type(), op, ": dy must have the shape and dtype of x");
  check_together(op, x0, dy0);
  OnDevice device(x0);
  const Tensor x = packed(x0), dy = packed(dy0);
  const std::optional<Tensor> bias = packed(bias0);
  const bool with = bias.has_value();
  Tensor dx = torch::stable::empty_like(x);
  if (x.numel() == 0) return {dx, torch::stable::new_zeros(x, {with ? x.size(-1) : 0})};
  MegalmBiasActivationBackward a{};
  a.rows = with ? rows_of(x) : 1, a.cols = with ? x.size(-1) : x.numel();
  a.partials = with ? MEGALM_CALL(bias_activation_partials)(a.rows, a.cols) : 0;
  Tensor partial = torch::stable::new_empty(x, {a.partials, with ? a.cols : 0}, ScalarType::Float);
  Tensor dbias = torch::stable::new_empty(x, {with ? a.cols : 0});
  a.dy = in(dy), a.x = in(x), a.bias = in(bias), a.dx = out(dx), a.dbias = with ? out(dbias) : nullptr;
  a.partial = out_as<float>(partial), a.kind = kind_of(kind, op), a.dtype = dtype_of(x, op);
  succeeded(MEGALM_CALL(bias_activation_backward)(&a, device.stream()), op);
  return {dx, dbias};
}

}  // namespace
}  // namespace megalm

#ifdef MEGALM_SCHEMAS
MEGALM_SCHEMAS(m) {
  m.def("gated_activation(Tensor x, int kind) -> Tensor");
  m.def("gated_activation_backward(Tensor dy, Tensor x, int kind) -> Tensor");
  m.def("bias_activation(Tensor x, Tensor? bias, int kind) -> Tensor");
  m.def("bias_activation_backward(Tensor dy, Tensor x, Tensor? bias, int kind) -> (Tensor, Tensor)");
}
#endif

MEGALM_IMPLEMENTATIONS(m) {
  m.impl("gated_activation", TORCH_BOX(&megalm::gated));
  m.impl("gated_activation_backward", TORCH_BOX(&megalm::gated_backward));
  m.impl("bias_activation", TORCH_BOX(&megalm::biased));
  m.impl("bias_activation_backward", TORCH_BOX(&megalm::biased_backward));
}
