// Encodes a fastattn.runtime.cuda.TensorMap for the hardware. Encodings are kept by everything but the address, which is
// put in afterwards: a call that comes again, whatever memory its tensors got, costs a look into a table.
#pragma once
#include <pybind11/pybind11.h>

#include "driver.h"

namespace fastattn::cuda {

// `address` is where the map's tensor lies. Throws ValueError's words when a rule of the driver is broken. The driver asks that
// `out` lies at a multiple of 64 bytes: a place in memory that somebody aligned, since compilers do not align temporaries so.
void encode(const Driver& d, pybind11::handle map, void* address, TensorMap* out);

}  // namespace fastattn::cuda
