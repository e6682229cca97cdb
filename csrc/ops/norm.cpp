// Bindings of rms_norm and layer_norm; see include/norm.h for shapes and megalm/ops/norm.py for what they mean.
#include "include/norm.h"

#include "ops/bind.h"

namespace megalm {
namespace {

void check(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& residual) {
  STD_TORCH_CHECK(x.dim() >= 1, op, ": x needs at least one dimension");
  STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == x.size(-1), op, ": the weight must have the size of x's last dimension");
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), op, ": x and weight must have one dtype");
  if (residual.has_value())
    STD_TORCH_CHECK(same_shape(*residual, x) && residual->scalar_type() == x.scalar_type(), op,
                    ": the residual must have the shape and dtype of x");
}

void check_statistics(const char* op, const Tensor& t, int64_t rows) {
  STD_TORCH_CHECK(t.numel() == rows && t.scalar_type() == ScalarType::Float, op,
                  ": mean and rstd must be float32, one for each row");
}

struct Normed {
  Tensor y, sum, mean, rstd;
};

// Without a residual `sum` is empty; without `layer` the mean is.
Normed normalise(const char* op, const Tensor& x0, const Tensor& weight0, const std::optional<Tensor>& bias0,
                 const std::optional<Tensor>& residual0, double eps, double offset, bool layer) {
  check(op, x0, weight0, residual0);
  if (bias0.has_value())
    STD_TORCH_CHECK(same_shape(*bias0, weight0) && bias0->scalar_type() == x0.scalar_type(), op,
                    ": the bias must have the shape and dtype of the weight");
  check_together(op, x0, weight0, bias0, residual0);
  OnDevice device(x0);
  const Tensor x = packed(x0), weight = packed(weight0);
  const std::optional<Tensor> bias = packed(bias0), residual = packed(residual0);
  const int64_t rows = rows_of(x);
  Normed r{torch::stable::empty_like(x),
           residual.has_value() ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0}),
           torch::stable::new_empty(x, {layer ? rows : 0}, ScalarType::Float),
           torch::stable::new_empty(x, {rows}, ScalarType::Float)};
  MegalmNormForward a{};
  a.x = in(x), a.residual = in(residual), a.weight = in(weight), a.bias = in(bias);
  a.y = out(r.y), a.sum = residual.has_value() ? out(r.sum) : nullptr;
  a.mean = layer ? out_as<float>(r.mean) : nullptr, a.rstd = out_as<float>(r.rstd);
  a.rows = rows, a.cols = x.size(-1), a.eps = static_cast<float>(eps), a.offset = static_cast<float>(offset);
  a.dtype = dtype_of(x, op);
  if (rows > 0) succeeded(MEGALM_CALL(norm_forward)(&a, device.stream()), op);
  return r;
}

struct Gradients {
  Tensor dx, dweight, dbias;
};

Gradients differentiate(const char* op, const Tensor& dy0, const std::optional<Tensor>& dsum0, const Tensor& x0,
                        const Tensor& weight0, const std::optional<Tensor>& mean0, const Tensor& rstd0, double offset,
                        bool with_bias) {
  check(op, x0, weight0, dsum0);
  STD_TORCH_CHECK(same_shape(dy0, x0) && dy0.scalar_type() == x0.scalar_type(), op, ": dy must have the shape and dtype of x");
  const int64_t rows = rows_of(x0), cols = x0.size(-1);
  check_statistics(op, rstd0, rows);
  if (mean0.has_value()) check_statistics(op, *mean0, rows);
  check_together(op, x0, dy0, dsum0, weight0, mean0, rstd0);
  OnDevice device(x0);
  const Tensor dy = packed(dy0), x = packed(x0), weight = packed(weight0), rstd = packed(rstd0);
  const std::optional<Tensor> dsum = packed(dsum0), mean = packed(mean0);
  if (rows == 0) {
    Tensor zeros = torch::stable::new_zeros(weight, {cols});
    return {torch::stable::empty_like(x), zeros, torch::stable::new_zeros(weight, {with_bias ? cols : 0})};
  }
  const int64_t partials = MEGALM_CALL(norm_partials)(rows, cols);
  Tensor partial = torch::stable::new_empty(x, {partials, with_bias ? 2 : 1, cols}, ScalarType::Float);
  Gradients r{torch::stable::empty_like(x), torch::stable::empty_like(weight),
              torch::stable::new_empty(weight, {with_bias ? cols : 0})};
  MegalmNormBackward a{};
  a.dy = in(dy), a.dsum = in(dsum), a.x = in(x), a.weight = in(weight);
  a.mean = mean.has_value() ? in_as<float>(*mean) : nullptr, a.rstd = in_as<float>(rstd);
  a.dx = out(r.dx), a.dweight = out(r.dweight), a.dbias = with_bias ? out(r.dbias) : nullptr;
  a.partial = out_as<float>(partial), a.partials = partials;
  a.rows = rows, a.cols = cols, a.offset = static_cast<float>(offset), a.dtype = dtype_of(x, op);
  succeeded(MEGALM_CALL(norm_backward)(&a, device.stream()), op);
  return r;
}

std::tuple<Tensor, Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, std::optional<Tensor> residual,
                                            double eps, double offset) {
  Normed r = normalise("rms_norm", x, weight, std::nullopt, residual, eps, offset, false);
  return {r.y, r.sum, r.rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy, std::optional<Tensor> dsum, const Tensor& x,
                                             const Tensor& weight, const Tensor& rstd, double offset) {
  Gradients r = differentiate("rms_norm_backward", dy, dsum, x, weight, std::nullopt, rstd, offset, false);
  return {r.dx, r.dweight};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                                                      std::optional<Tensor> residual, double eps, double offset) {
  Normed r = normalise("layer_norm", x, weight, bias, residual, eps, offset, true);
  return {r.y, r.sum, r.mean, r.rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& dy, std::optional<Tensor> dsum, const Tensor& x,
                                                       const Tensor& weight, const Tensor& mean, const Tensor& rstd,
                                                       double offset, bool with_bias) {
  Gradients r = differentiate("layer_norm_backward", dy, dsum, x, weight, mean, rstd, offset, with_bias);
  return {r.dx, r.dweight, r.dbias};
}

}  // namespace
}  // namespace megalm

#ifdef MEGALM_SCHEMAS
MEGALM_SCHEMAS(m) {
  m.def("rms_norm(Tensor x, Tensor weight, Tensor? residual, float eps, float offset) -> (Tensor y, Tensor sum, Tensor rstd)");
  m.def("rms_norm_backward(Tensor dy, Tensor? dsum, Tensor x, Tensor weight, Tensor rstd, float offset) -> (Tensor, Tensor)");
  m.def("layer_norm(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, float eps, float offset) -> (Tensor y, Tensor sum, Tensor mean, Tensor rstd)");
  m.def("layer_norm_backward(Tensor dy, Tensor? dsum, Tensor x, Tensor weight, Tensor mean, Tensor rstd, float offset, bool with_bias) -> (Tensor, Tensor, Tensor)");
}
#endif

MEGALM_IMPLEMENTATIONS(m) {
  m.impl("rms_norm", TORCH_BOX(&megalm::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&megalm::rms_norm_backward));
  m.impl("layer_norm", TORCH_BOX(&megalm::layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&megalm::layer_norm_backward));
}
