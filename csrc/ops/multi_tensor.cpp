// Bindings of the operations on lists of tensors; see include/multi_tensor.h and megalm/ops/multi_tensor.py.
#include "include/multi_tensor.h"

#include <vector>

#include "ops/bind.h"

namespace megalm {
namespace {

using Tensors = std::vector<Tensor>;

// What is written must be where it is, and so cannot be packed.
void check_written(const char* op, const Tensors& list, const char* what) {
  for (const Tensor& t : list) STD_TORCH_CHECK(t.is_contiguous(), op, ": ", what, " must be contiguous");
}

void check_scalar(const char* op, const Tensor& t, ScalarType type, const Tensor& beside, const char* what) {
  STD_TORCH_CHECK(t.numel() == 1 && t.scalar_type() == type, op, ": expected one ",
                  type == ScalarType::Long ? "int64" : "float32", " for ", what);
  check_together(op, beside, t);
}

// Lists that follow one of them, tensor by tensor.
class Items {
 public:
  Items(const char* op, const Tensors& guide) : op_(op), guide_(guide), items_(guide.size()) {
    for (size_t i = 0; i < guide.size(); ++i) {
      check_together(op, guide[0], guide[i]);
      items_[i].size = guide[i].numel();
      items_[i].copy_dtype = MEGALM_NO_COPY;
    }
  }

  void gradients(const Tensors& list) {
    follow(list, "gradients");
    kept_.reserve(kept_.size() + list.size());
    for (size_t i = 0; i < list.size(); ++i) {
      kept_.push_back(packed(list[i]));
      items_[i].gradient = const_cast<void*>(in(kept_.back()));
      items_[i].gradient_dtype = dtype_of(list[i], op_);
    }
  }

  void written_gradients(Tensors& list) {
    check_written(op_, list, "what is scaled in place");
    for (size_t i = 0; i < list.size(); ++i) {
      items_[i].gradient = out(list[i]);
      items_[i].gradient_dtype = dtype_of(list[i], op_);
    }
  }

  void floats(Tensors& list, float* MegalmMultiItem::*place, const char* what) {
    follow(list, what);
    check_written(op_, list, what);
    for (size_t i = 0; i < list.size(); ++i) {
      STD_TORCH_CHECK(list[i].scalar_type() == ScalarType::Float, op_, ": ", what, " must be float32");
      items_[i].*place = out_as<float>(list[i]);
    }
  }

  void copies(Tensors& list) {
    if (list.empty()) return;
    follow(list, "copies");
    check_written(op_, list, "copies");
    for (size_t i = 0; i < list.size(); ++i) {
      items_[i].copy = out(list[i]);
      items_[i].copy_dtype = dtype_of(list[i], op_);
    }
  }

  MegalmMulti arguments() const {
    MegalmMulti a{};
    a.items = items_.data(), a.count = static_cast<int64_t>(items_.size());
    return a;
  }

  int64_t chunks() const {
    int64_t total = 0;
    for (const MegalmMultiItem& item : items_) total += megalm_chunks(item.size);
    return total;
  }

 private:
  void follow(const Tensors& list, const char* what) {
    STD_TORCH_CHECK(list.size() == guide_.size(), op_, ": expected ", guide_.size(), " ", what, ", found ", list.size());
    for (size_t i = 0; i < list.size(); ++i) {
      STD_TORCH_CHECK(list[i].numel() == guide_[i].numel(), op_, ": tensor ", i, " of ", what, " has another size");
      check_together(op_, guide_[0], list[i]);
    }
  }

  const char* op_;
  const Tensors& guide_;
  std::vector<MegalmMultiItem> items_;
  Tensors kept_;
};

void control(const char* op, MegalmMulti& a, const Tensor& beside, const Tensor* step, const std::optional<Tensor>& factor,
             const std::optional<Tensor>& found_inf) {
  if (step != nullptr) {
    check_scalar(op, *step, ScalarType::Long, beside, "step");
    a.step = in_as<int64_t>(*step);
  }
  if (factor.has_value()) {
    check_scalar(op, *factor, ScalarType::Float, beside, "factor");
    a.factor = in_as<float>(*factor);
  }
  if (found_inf.has_value()) {
    check_scalar(op, *found_inf, ScalarType::Float, beside, "found_inf");
    a.found_inf = const_cast<float*>(in_as<float>(*found_inf));
  }
}

Tensor sums_of_squares(Tensors tensors) {
  const char* op = "multi_sums_of_squares";
  STD_TORCH_CHECK(!tensors.empty(), op, ": the list is empty");
  OnDevice device(tensors[0]);
  Items items(op, tensors);
  items.gradients(tensors);
  Tensor sums = torch::stable::new_empty(tensors[0], {static_cast<int64_t>(tensors.size())}, ScalarType::Double);
  Tensor partial = torch::stable::new_empty(tensors[0], {items.chunks()}, ScalarType::Double);
  MegalmMulti a = items.arguments();
  a.sums = out_as<double>(sums), a.partial = out_as<double>(partial);
  succeeded(MEGALM_CALL(multi_squares)(&a, device.stream()), op);
  return sums;
}

void scale_(Tensors tensors, Tensor factor, Tensor found_inf) {
  const char* op = "multi_scale_";
  STD_TORCH_CHECK(!tensors.empty(), op, ": the list is empty");
  OnDevice device(tensors[0]);
  Items items(op, tensors);
  items.written_gradients(tensors);
  MegalmMulti a = items.arguments();
  control(op, a, tensors[0], nullptr, factor, found_inf);
  succeeded(MEGALM_CALL(multi_scale)(&a, device.stream()), op);
}

void adamw_(Tensors weights, Tensors gradients, Tensors first, Tensors second, Tensors copies, Tensor step,
            std::optional<Tensor> factor, std::optional<Tensor> found_inf, double lr, double beta1, double beta2, double eps,
            double weight_decay) {
  const char* op = "multi_adamw_";
  STD_TORCH_CHECK(!weights.empty(), op, ": the list is empty");
  OnDevice device(weights[0]);
  Items items(op, weights);
  items.floats(weights, &MegalmMultiItem::weight, "weights");
  items.gradients(gradients);
  items.floats(first, &MegalmMultiItem::first, "first moments");
  items.floats(second, &MegalmMultiItem::second, "second moments");
  items.copies(copies);
  MegalmMulti a = items.arguments();
  control(op, a, weights[0], &step, factor, found_inf);
  a.lr = lr, a.beta1 = beta1, a.beta2 = beta2, a.eps = eps, a.weight_decay = weight_decay;
  succeeded(MEGALM_CALL(multi_adamw)(&a, device.stream()), op);
}

Tensor lamb_update_(Tensors weights, Tensors gradients, Tensors first, Tensors second, Tensors updates, Tensor step,
                    std::optional<Tensor> factor, std::optional<Tensor> found_inf, double beta1, double beta2, double eps,
                    double weight_decay) {
  const char* op = "multi_lamb_update_";
  STD_TORCH_CHECK(!weights.empty(), op, ": the list is empty");
  OnDevice device(weights[0]);
  Items items(op, weights);
  items.floats(weights, &MegalmMultiItem::weight, "weights");
  items.gradients(gradients);
  items.floats(first, &MegalmMultiItem::first, "first moments");
  items.floats(second, &MegalmMultiItem::second, "second moments");
  items.floats(updates, &MegalmMultiItem::update, "updates");
  Tensor sums = torch::stable::new_empty(weights[0], {2, static_cast<int64_t>(weights.size())}, ScalarType::Double);
  Tensor partial = torch::stable::new_empty(weights[0], {2, items.chunks()}, ScalarType::Double);
  MegalmMulti a = items.arguments();
  control(op, a, weights[0], &step, factor, found_inf);
  a.beta1 = beta1, a.beta2 = beta2, a.eps = eps, a.weight_decay = weight_decay;
  a.sums = out_as<double>(sums), a.partial = out_as<double>(partial);
  succeeded(MEGALM_CALL(multi_lamb_update)(&a, device.stream()), op);
  return sums;
}

void lamb_apply_(Tensors weights, Tensors updates, Tensors copies, Tensor sums0, std::optional<Tensor> found_inf, double lr) {
  const char* op = "multi_lamb_apply_";
  STD_TORCH_CHECK(!weights.empty(), op, ": the list is empty");
  OnDevice device(weights[0]);
  Items items(op, weights);
  items.floats(weights, &MegalmMultiItem::weight, "weights");
  items.floats(updates, &MegalmMultiItem::update, "updates");
  items.copies(copies);
  const Tensor sums = packed(sums0);
  STD_TORCH_CHECK(sums.dim() == 2 && sums.size(0) == 2 && sums.size(1) == static_cast<int64_t>(weights.size()) &&
                      sums.scalar_type() == ScalarType::Double,
                  op, ": sums must be float64 (2, ", weights.size(), ")");
  check_together(op, weights[0], sums);
  MegalmMulti a = items.arguments();
  control(op, a, weights[0], nullptr, std::nullopt, found_inf);
  a.sums = const_cast<double*>(in_as<double>(sums)), a.lr = lr;
  succeeded(MEGALM_CALL(multi_lamb_apply)(&a, device.stream()), op);
}

}  // namespace
}  // namespace megalm

#ifdef MEGALM_SCHEMAS
MEGALM_SCHEMAS(m) {
  m.def("multi_sums_of_squares(Tensor[] tensors) -> Tensor");
  m.def("multi_scale_(Tensor(a!)[] tensors, Tensor factor, Tensor(b!) found_inf) -> ()");
  m.def("multi_adamw_(Tensor(a!)[] weights, Tensor[] gradients, Tensor(b!)[] first, Tensor(c!)[] second, Tensor(d!)[] copies, Tensor step, Tensor? factor, Tensor? found_inf, float lr, float beta1, float beta2, float eps, float weight_decay) -> ()");
  m.def("multi_lamb_update_(Tensor[] weights, Tensor[] gradients, Tensor(a!)[] first, Tensor(b!)[] second, Tensor(c!)[] updates, Tensor step, Tensor? factor, Tensor? found_inf, float beta1, float beta2, float eps, float weight_decay) -> Tensor");
  m.def("multi_lamb_apply_(Tensor(a!)[] weights, Tensor[] updates, Tensor(b!)[] copies, Tensor sums, Tensor? found_inf, float lr) -> ()");
}
#endif

MEGALM_IMPLEMENTATIONS(m) {
  m.impl("multi_sums_of_squares", TORCH_BOX(&megalm::sums_of_squares));
  m.impl("multi_scale_", TORCH_BOX(&megalm::scale_));
  m.impl("multi_adamw_", TORCH_BOX(&megalm::adamw_));
  m.impl("multi_lamb_update_", TORCH_BOX(&megalm::lamb_update_));
  m.impl("multi_lamb_apply_", TORCH_BOX(&megalm::lamb_apply_));
}
