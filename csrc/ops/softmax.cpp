// Bindings of masked_softmax; megalm/ops/softmax.py says what it means.
#include "include/softmax.h"

#include "ops/bind.h"

namespace megalm {
namespace {

Tensor masked_softmax(const Tensor& x0, std::optional<Tensor> mask0, double scale, bool causal, int64_t first_query) {
  const char* op = "masked_softmax";
  STD_TORCH_CHECK(x0.dim() == 4, op, ": scores must be (batch, heads, queries, keys)");
  if (mask0.has_value())
    STD_TORCH_CHECK(mask0->dim() == 2 && mask0->size(0) == x0.size(0) && mask0->size(1) == x0.size(3) &&
                        mask0->scalar_type() == ScalarType::Bool,
                    op, ": the mask must be bool, (batch, keys)");
  check_together(op, x0, mask0);
  OnDevice device(x0);
  const Tensor x = packed(x0);
  const std::optional<Tensor> mask = packed(mask0);
  Tensor y = torch::stable::empty_like(x);
  MegalmSoftmaxForward a{};
  a.x = in(x), a.mask = static_cast<const uint8_t*>(in(mask)), a.y = out(y);
  a.rows = rows_of(x), a.per_batch = x.size(1) * x.size(2), a.queries = x.size(2), a.keys = x.size(3);
  a.first_query = first_query, a.causal = causal, a.scale = static_cast<float>(scale), a.dtype = dtype_of(x, op);
  if (a.rows > 0) succeeded(MEGALM_CALL(softmax_forward)(&a, device.stream()), op);
  return y;
}

Tensor masked_softmax_backward(const Tensor& dy0, const Tensor& y0, double scale) {
  const char* op = "masked_softmax_backward";
  STD_TORCH_CHECK(same_shape(dy0, y0) && dy0.scalar_type() == y0.scalar_type() && y0.dim() >= 1, op,
                  ": the probabilities must have the shape and dtype of their gradient");
  check_together(op, y0, dy0);
  OnDevice device(y0);
  const Tensor dy = packed(dy0), y = packed(y0);
  Tensor dx = torch::stable::empty_like(y);
  MegalmSoftmaxBackward a{};
  a.dy = in(dy), a.y = in(y), a.dx = out(dx);
  a.rows = rows_of(y), a.keys = y.size(-1), a.scale = static_cast<float>(scale), a.dtype = dtype_of(y, op);
  if (a.rows > 0) succeeded(MEGALM_CALL(softmax_backward)(&a, device.stream()), op);
  return dx;
}

}  // namespace
}  // namespace megalm

#ifdef MEGALM_SCHEMAS
MEGALM_SCHEMAS(m) {
  m.def("masked_softmax(Tensor x, Tensor? mask, float scale, bool causal, int first_query) -> Tensor");
  m.def("masked_softmax_backward(Tensor dy, Tensor y, float scale) -> Tensor");
}
#endif

MEGALM_IMPLEMENTATIONS(m) {
  m.impl("masked_softmax", TORCH_BOX(&megalm::masked_softmax));
  m.impl("masked_softmax_backward", TORCH_BOX(&megalm::masked_softmax_backward));
}
