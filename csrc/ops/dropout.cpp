// Bindings of dropout_add; see include/dropout.h for shapes and megalm/ops/dropout.py for what it means.
#include "include/dropout.h"

#include "ops/bind.h"

namespace megalm {
namespace {

constexpr int64_t kSpanWords = 5;

MegalmDropoutMask mask_of(const char* op, const Tensor& x, const Tensor& spans, int64_t key_low, int64_t key_high,
                          int64_t threshold) {
  STD_TORCH_CHECK(x.dim() == 2, op, ": expected (tokens, features)");
  STD_TORCH_CHECK(spans.dim() == 2 && spans.size(1) == kSpanWords && spans.scalar_type() == ScalarType::Long, op,
                  ": spans must be int64 (spans, 5)");
  STD_TORCH_CHECK(spans.size(0) > 0 || x.size(0) == 0, op, ": there are tokens and no spans");
  check_together(op, x, spans);
  STD_TORCH_CHECK(threshold >= 0 && threshold < 65536, op, ": the threshold must be in [0, 65535]");
  MegalmDropoutMask m{};
  m.spans = in_as<int64_t>(spans), m.count = spans.size(0);
  m.key_low = static_cast<uint64_t>(key_low), m.key_high = static_cast<uint64_t>(key_high);
  m.threshold = static_cast<int32_t>(threshold);
  m.scale = static_cast<float>(65536.0 / static_cast<double>(65536 - threshold));
  return m;
}

#if defined(MEGALM_CPU)
constexpr bool kKeeps = true;
#else
constexpr bool kKeeps = false;  // to draw again costs CUDA less than to read
#endif

int64_t kept_bytes(int64_t cols) { return (cols + 15) / 16 * 2; }

std::tuple<Tensor, Tensor> dropout_add(const Tensor& x0, std::optional<Tensor> residual0,
                                       std::optional<Tensor> bias0, const Tensor& spans0,
                                       int64_t key_low, int64_t key_high, int64_t threshold, bool keep) {
  const char* op = "dropout_add";
  OnDevice device(x0);
  const Tensor x = packed(x0), spans = packed(spans0);
  const std::optional<Tensor> residual = packed(residual0), bias = packed(bias0);
  MegalmDropoutForward a{};
  a.mask = mask_of(op, x, spans, key_low, key_high, threshold);
  if (residual.has_value())
    STD_TORCH_CHECK(same_shape(*residual, x) && residual->scalar_type() == x.scalar_type(), op,
                    ": the residual must have the shape and dtype of x");
  if (bias.has_value())
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == x.size(1) && bias->scalar_type() == x.scalar_type(), op,
                    ": the bias must have the size of x's last dimension, and its dtype");
  check_together(op, x, residual, bias);
  STD_TORCH_CHECK(kKeeps || !keep, op, ": the mask is kept on the processor alone");
  Tensor y = torch::stable::empty_like(x);
  Tensor kept = torch::stable::new_empty(x, {keep ? x.size(0) : 0, kept_bytes(x.size(1))}, ScalarType::Byte);
  a.x = in(x), a.residual = in(residual), a.bias = in(bias), a.y = out(y);
  a.kept = keep ? out_as<uint8_t>(kept) : nullptr;
  a.rows = x.size(0), a.cols = x.size(1), a.dtype = dtype_of(x, op);
  if (x.numel() > 0) succeeded(MEGALM_CALL(dropout_forward)(&a, device.stream()), op);
  return {y, kept};
}

std::tuple<Tensor, Tensor> dropout_add_backward(const Tensor& dy0, std::optional<Tensor> kept0, const Tensor& spans0,
                                                int64_t key_low, int64_t key_high, int64_t threshold, bool with_bias) {
  const char* op = "dropout_add_backward";
  OnDevice device(dy0);
  const Tensor dy = packed(dy0), spans = packed(spans0);
  const std::optional<Tensor> kept = packed(kept0);
  MegalmDropoutBackward a{};
  a.mask = mask_of(op, dy, spans, key_low, key_high, threshold);
  a.rows = dy.size(0), a.cols = dy.size(1), a.dtype = dtype_of(dy, op);
  if (kept.has_value()) {
    STD_TORCH_CHECK(kKeeps, op, ": the mask is kept on the processor alone");
    STD_TORCH_CHECK(kept->dim() == 2 && kept->size(0) == a.rows && kept->size(1) == kept_bytes(a.cols) &&
                        kept->scalar_type() == ScalarType::Byte,
                    op, ": the kept mask must be uint8 (tokens, 2 for every 16 features)");
    check_together(op, dy, kept);
    a.kept = in_as<uint8_t>(*kept);
  }
  Tensor dx = torch::stable::empty_like(dy);
  if (dy.numel() == 0) return {dx, torch::stable::new_zeros(dy, {with_bias ? a.cols : 0})};
  Tensor dbias = torch::stable::new_empty(dy, {with_bias ? a.cols : 0});
  a.partials = with_bias ? MEGALM_CALL(dropout_partials)(a.rows, a.cols) : 0;
  Tensor partial = torch::stable::new_empty(dy, {a.partials, a.cols}, ScalarType::Float);
  a.dy = in(dy), a.dx = out(dx), a.dbias = with_bias ? out(dbias) : nullptr, a.partial = out_as<float>(partial);
  succeeded(MEGALM_CALL(dropout_backward)(&a, device.stream()), op);
  return {dx, dbias};
}

}  // namespace
}  // namespace megalm

#ifdef MEGALM_SCHEMAS
MEGALM_SCHEMAS(m) {
  m.def("dropout_add(Tensor x, Tensor? residual, Tensor? bias, Tensor spans, int key_low, int key_high, int threshold, bool keep) -> (Tensor, Tensor)");
  m.def("dropout_add_backward(Tensor dy, Tensor? kept, Tensor spans, int key_low, int key_high, int threshold, bool with_bias) -> (Tensor, Tensor)");
}
#endif

MEGALM_IMPLEMENTATIONS(m) {
  m.impl("dropout_add", TORCH_BOX(&megalm::dropout_add));
  m.impl("dropout_add_backward", TORCH_BOX(&megalm::dropout_add_backward));
}
