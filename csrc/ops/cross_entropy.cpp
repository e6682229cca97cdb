// Bindings of cross_entropy_statistics and cross_entropy_gradient_; megalm/ops/cross_entropy.py says what they mean.
#include "include/cross_entropy.h"

#include "ops/bind.h"

namespace megalm {
namespace {

void check_logits(const char* op, const Tensor& logits, const Tensor& labels) {
  STD_TORCH_CHECK(logits.dim() == 2, op, ": logits must be (tokens, rows of the vocabulary)");
  STD_TORCH_CHECK(labels.dim() == 1 && labels.size(0) == logits.size(0), op, ": expected one label for each token");
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long, op, ": labels must be int64");
  check_together(op, logits, labels);
}

void check_numbers(const char* op, const Tensor& numbers, const Tensor& logits) {
  STD_TORCH_CHECK(numbers.dim() == 1 && numbers.size(0) == logits.size(0) && numbers.scalar_type() == ScalarType::Float, op,
                  ": maximum, factor and scale must be float32, one for each token");
  check_together(op, logits, numbers);
}

bool rows_are_packed(const Tensor& t) { return t.size(1) <= 1 || t.stride(1) == 1; }

Tensor cross_entropy_statistics(const Tensor& logits0, const Tensor& labels0, int64_t first_row, bool total) {
  const char* op = "cross_entropy_statistics";
  check_logits(op, logits0, labels0);
  OnDevice device(logits0);
  const Tensor logits = rows_are_packed(logits0) ? logits0 : packed(logits0);
  const Tensor labels = packed(labels0);
  const int64_t tokens = logits.size(0);
  Tensor stats = torch::stable::new_zeros(logits, {4, tokens}, ScalarType::Float);
  MegalmCrossEntropyStatistics a{};
  a.logits = in(logits), a.labels = in_as<int64_t>(labels);
  a.maximum = out_as<float>(stats), a.sum = a.maximum + tokens, a.target = a.sum + tokens;
  a.total = total ? a.target + tokens : nullptr;
  a.tokens = tokens, a.rows = logits.size(1), a.stride = logits.stride(0), a.first_row = first_row;
  a.dtype = dtype_of(logits, op);
  if (tokens > 0) succeeded(MEGALM_CALL(cross_entropy_statistics)(&a, device.stream()), op);
  return stats;
}

void cross_entropy_gradient_(Tensor logits, const Tensor& labels0, int64_t first_row, const Tensor& maximum0,
                             const Tensor& factor0, const Tensor& scale0, double smooth, double confidence) {
  const char* op = "cross_entropy_gradient_";
  check_logits(op, logits, labels0);
  for (const Tensor* numbers : {&maximum0, &factor0, &scale0}) check_numbers(op, *numbers, logits);
  STD_TORCH_CHECK(rows_are_packed(logits), op, ": the logits of a token must lie side by side, since they are overwritten");
  OnDevice device(logits);
  const Tensor labels = packed(labels0), maximum = packed(maximum0), factor = packed(factor0), scale = packed(scale0);
  MegalmCrossEntropyGradient a{};
  a.logits = out(logits), a.labels = in_as<int64_t>(labels);
  a.maximum = in_as<float>(maximum), a.factor = in_as<float>(factor), a.scale = in_as<float>(scale);
  a.tokens = logits.size(0), a.rows = logits.size(1), a.stride = logits.stride(0), a.first_row = first_row;
  a.smooth = static_cast<float>(smooth), a.confidence = static_cast<float>(confidence);
  a.dtype = dtype_of(logits, op);
  if (a.tokens > 0 && a.rows > 0) succeeded(MEGALM_CALL(cross_entropy_gradient)(&a, device.stream()), op);
}

}  // namespace
}  // namespace megalm

#ifdef MEGALM_SCHEMAS
MEGALM_SCHEMAS(m) {
  m.def("cross_entropy_statistics(Tensor logits, Tensor labels, int first_row, bool total) -> Tensor");
  m.def("cross_entropy_gradient_(Tensor(a!) logits, Tensor labels, int first_row, Tensor maximum, Tensor factor, Tensor scale, float smooth, float confidence) -> ()");
}
#endif

MEGALM_IMPLEMENTATIONS(m) {
  m.impl("cross_entropy_statistics", TORCH_BOX(&megalm::cross_entropy_statistics));
  m.impl("cross_entropy_gradient_", TORCH_BOX(&megalm::cross_entropy_gradient_));
}
