// Binding of rope; see include/rope.h for shapes and megalm/ops/rope.py for what it means.
#include "include/rope.h"

#include "ops/bind.h"

namespace megalm {
namespace {

Tensor rope(const Tensor& x0, const Tensor& cos0, const Tensor& sin0, std::optional<Tensor> positions0, bool interleaved,
            bool inverse) {
  const char* op = "rope";
  STD_TORCH_CHECK(x0.dim() == 4, op, ": x must be (batch, seq, heads, head_dim)");
  STD_TORCH_CHECK(cos0.dim() == 2 && same_shape(cos0, sin0) && cos0.scalar_type() == sin0.scalar_type(), op,
                  ": cos and sin must be (seq, rotary_dim / 2), of one dtype");
  STD_TORCH_CHECK(cos0.scalar_type() == x0.scalar_type() || cos0.scalar_type() == ScalarType::Float, op,
                  ": cos and sin must be float32 or have the dtype of x");
  STD_TORCH_CHECK(2 * cos0.size(1) <= x0.size(3), op, ": cos and sin turn more features than a head has");
  if (positions0.has_value()) {
    const int64_t dim = positions0->dim();
    STD_TORCH_CHECK(positions0->scalar_type() == ScalarType::Long && (dim == 1 || dim == 2) &&
                        positions0->size(dim - 1) == x0.size(1) && (dim == 1 || positions0->size(0) == x0.size(0)),
                    op, ": positions must be int64, (seq) or (batch, seq)");
  } else {
    STD_TORCH_CHECK(cos0.size(0) == x0.size(1), op, ": cos and sin need a row for each position of x");
  }
  check_together(op, x0, cos0, sin0, positions0);
  OnDevice device(x0);
  const Tensor x = x0.size(3) > 1 && x0.stride(3) != 1 ? packed(x0) : x0, cos = packed(cos0), sin = packed(sin0);
  const std::optional<Tensor> positions = packed(positions0);
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)});
  MegalmRope a{};
  a.x = in(x), a.cos = in(cos), a.sin = in(sin), a.y = out(y);
  a.positions = positions.has_value() ? in_as<int64_t>(*positions) : nullptr;
  a.batch = x.size(0), a.seq = x.size(1), a.heads = x.size(2), a.head_dim = x.size(3);
  a.rotary_dim = 2 * cos.size(1), a.angles = cos.size(0);
  a.stride_batch = x.stride(0), a.stride_seq = x.stride(1), a.stride_head = x.stride(2);
  a.stride_positions = positions.has_value() && positions->dim() == 2 ? a.seq : 0;
  a.interleaved = interleaved, a.inverse = inverse, a.dtype = dtype_of(x, op), a.angle_dtype = dtype_of(cos, op);
  if (y.numel() > 0) succeeded(MEGALM_CALL(rope)(&a, device.stream()), op);
  return y;
}

}  // namespace
}  // namespace megalm

#ifdef MEGALM_SCHEMAS
MEGALM_SCHEMAS(m) {
  m.def("rope(Tensor x, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool inverse) -> Tensor");
}
#endif

MEGALM_IMPLEMENTATIONS(m) { m.impl("rope", TORCH_BOX(&megalm::rope)); }
