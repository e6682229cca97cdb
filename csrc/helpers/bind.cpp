// Functions of helpers/ in Python: a module for one version of Python, without torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "helpers/masking.h"
#include "helpers/packing.h"
#include "helpers/permutation.h"
#include "helpers/rows.h"
#include "helpers/windows.h"

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

template <class T>
int64_t widened(const py::array& ids, const Ids& starts, uint64_t limit, py::array_t<int64_t>& out) {
  const py::gil_scoped_release others;
  return megalm::helpers::widen_windows(static_cast<const T*>(ids.data()), starts.data(), out.shape(0), out.shape(1),
                                        limit, out.mutable_data());
}

std::tuple<py::array_t<int64_t>, int64_t> windows(const py::array& ids, const Ids& starts, int64_t length,
                                                  uint64_t limit) {
  if (ids.ndim() != 1 || starts.ndim() != 1 || length < 0 || length > ids.size() ||
      (ids.flags() & py::array::c_style) == 0)
    throw std::invalid_argument("ids and starts must be rows of numbers, and the length at most that of the ids");
  for (py::ssize_t i = 0; i < starts.size(); ++i)
    if (starts.data()[i] < 0 || starts.data()[i] > ids.size() - length) throw std::out_of_range("a window outside");
  py::array_t<int64_t> out({starts.size(), static_cast<py::ssize_t>(length)});
  const char kind = ids.dtype().kind();
  const auto size = ids.itemsize();
  if (kind == 'u' && size == 1) return {out, widened<uint8_t>(ids, starts, limit, out)};
  if (kind == 'i' && size == 1) return {out, widened<int8_t>(ids, starts, limit, out)};
  if (kind == 'u' && size == 2) return {out, widened<uint16_t>(ids, starts, limit, out)};
  if (kind == 'i' && size == 2) return {out, widened<int16_t>(ids, starts, limit, out)};
  if (kind == 'u' && size == 4) return {out, widened<uint32_t>(ids, starts, limit, out)};
  if (kind == 'i' && size == 4) return {out, widened<int32_t>(ids, starts, limit, out)};
  if (kind == 'i' && size == 8) return {out, widened<int64_t>(ids, starts, limit, out)};
  throw std::invalid_argument("ids of a type that is not known");
}

std::vector<std::tuple<int64_t, int64_t, bool>> packed_row(const Ids& edges, int64_t stop, int64_t row, int64_t rows,
                                                           int64_t length) {
  std::vector<std::tuple<int64_t, int64_t, bool>> found;
  for (const auto& piece : megalm::helpers::packed_row(edges.data(), edges.size(), stop, row, rows, length))
    found.emplace_back(piece.start, piece.stop, piece.ends);
  return found;
}

void copy_rows(py::array& to, const py::array& from) {
  const py::ssize_t dimensions = to.ndim(), size = to.itemsize();
  if (dimensions == 0 || from.ndim() != dimensions || from.itemsize() != size || !to.writeable())
    throw std::invalid_argument("two arrays of one shape and width, of which the first can be written");
  megalm::helpers::Rows rows{{}, {}, {}, to.shape(dimensions - 1) * size};
  for (py::ssize_t i = 0; i < dimensions; ++i) {
    if (from.shape(i) != to.shape(i)) throw std::invalid_argument("two arrays of one shape");
    if (i + 1 == dimensions) break;
    rows.shape.push_back(to.shape(i));
    rows.from.push_back(from.strides(i));
    rows.to.push_back(to.strides(i));
  }
  if (to.size() == 0) return;
  if (to.shape(dimensions - 1) > 1 && (to.strides(dimensions - 1) != size || from.strides(dimensions - 1) != size))
    throw std::invalid_argument("the last dimension must be contiguous in both");
  const auto* source = static_cast<const char*>(from.data());
  auto* place = static_cast<char*>(to.mutable_data());
  const py::gil_scoped_release others;
  megalm::helpers::copy_rows(rows, source, place);
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
  m.def("windows", &windows, py::arg("ids"), py::arg("starts"), py::arg("length"), py::arg("limit"),
        "Windows as int64, and the number of the first with an id outside [0, limit), or -1. IndexError outside of the "
        "ids, ValueError for ids of a type that is not known.");
  m.def("packed_row", &packed_row, py::arg("edges"), py::arg("stop"), py::arg("row"), py::arg("rows"),
        py::arg("length"),
        "(start, stop, whether the document ends) of each piece of a row. ValueError where edges do not fit.");
  m.def("copy_rows", &copy_rows, py::arg("to"), py::arg("values"),
        "Copy bits between arrays of one shape and width, past the cache. ValueError where they do not fit.");
}
