#include "tensor.h"
namespace fastattn { void bind_hugepages(pybind11::module_& m) { m.def("set_hugepages", [](bool) {}); } }
