// The module fastattn._native: numbers, pointers and tensor views in, status out. One bind_* per room.
#include <pybind11/pybind11.h>

#include "cpu/kernels.h"
#include "tensor.h"

namespace py = pybind11;

namespace fastattn {
void bind_machine(py::module_& m);
void bind_attention(py::module_& m);
void bind_norms(py::module_& m);
void bind_rope(py::module_& m);
void bind_hugepages(py::module_& m);
void bind_launch(py::module_& m);
}  // namespace fastattn

PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
  m.doc() = "fastattn's native CPU kernels and the launcher of its CUDA kernels; see csrc/README.md";
  fastattn::bind_tensor(m);
  fastattn::bind_machine(m);
  fastattn::bind_attention(m);
  fastattn::bind_norms(m);
  fastattn::bind_rope(m);
  fastattn::bind_hugepages(m);
  fastattn::bind_launch(m);
}
