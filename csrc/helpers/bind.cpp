// Functions of helpers/ in Python: a module for one version of Python, without torch.
#include <pybind11/pybind11.h>

#include "helpers/permutation.h"

// The one name that the module has in every file: megalm/native/helpers.py loads it from where it was built.
PYBIND11_MODULE(_megalm_helpers, m) {
  m.def("permuted", &megalm::helpers::permuted, pybind11::arg("index"), pybind11::arg("n"), pybind11::arg("half"),
        pybind11::arg("keys"), "The image of index; ValueError where the arguments do not fit together.");
}
