// Functions of helpers/ in Python: a module for one version of Python, without torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <tuple>

#include "helpers/masking.h"
#include "helpers/permutation.h"

namespace py = pybind11;

namespace {

using Ids = py::array_t<int64_t, py::array::c_style>;
using Flags = py::array_t<bool, py::array::c_style>;

template <class T>
const T* data(const std::optional<py::array_t<T, py::array::c_style>>& array) {
  return array.has_value() ? array->data() : nullptr;
}

std::tuple<Ids, Ids> masked_tokens(const py::capsule& generator, const Ids& tokens, const Flags& special,
                                   const std::optional<Ids>& documents, const std::optional<Flags>& starts,
                                   const Ids& ordinary, int64_t mask, int64_t ignore,
                                   const std::tuple<double, double, double>& below) {
  auto* draw = static_cast<megalm::helpers::BitGenerator*>(PyCapsule_GetPointer(generator.ptr(), "BitGenerator"));
  if (draw == nullptr) throw py::error_already_set();
  const int64_t length = tokens.size();
  if (tokens.ndim() != 1 || special.ndim() != 1 || special.size() != length || (documents && documents->size() != length) ||
      ordinary.size() == 0)
    throw std::invalid_argument("a row's arrays must be of one length, and there must be ordinary ids");
  static_assert(sizeof(bool) == sizeof(uint8_t));
  Ids corrupted(length), labels(length);
  const auto flags = [](const bool* p) { return reinterpret_cast<const uint8_t*>(p); };
  const megalm::helpers::Row row{length, tokens.data(), flags(special.data()), data(documents)};
  const auto [chosen, masked, replaced] = below;
  const megalm::helpers::Masking how{flags(data(starts)), starts ? starts->size() : 0, ordinary.data(), ordinary.size(),
                                     mask, ignore, chosen, masked, replaced};
  megalm::helpers::mask_tokens(row, how, *draw, corrupted.mutable_data(), labels.mutable_data());
  return {std::move(corrupted), std::move(labels)};
}

}  // namespace

// The one name that the module has in every file: megalm/native/helpers.py loads it from where it was built.
PYBIND11_MODULE(_megalm_helpers, m) {
  m.def("permuted", &megalm::helpers::permuted, py::arg("index"), py::arg("n"), py::arg("half"), py::arg("keys"),
        "The image of index; ValueError where the arguments do not fit together.");
  m.def("masked_tokens", &masked_tokens, py::arg("generator"), py::arg("tokens"), py::arg("special"),
        py::arg("documents").none(true), py::arg("starts").none(true), py::arg("ordinary"), py::arg("mask"),
        py::arg("ignore"), py::arg("below"),
        "Corrupted tokens and labels. ValueError or IndexError where the arguments do not fit together.");
}
