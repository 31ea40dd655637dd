// Chooses, at import, the best instruction set that this build holds and this CPU runs.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace fastattn {

#define FASTATTN_DECLARE(isa) \
  namespace isa {             \
  extern const Kernels table; \
  }
FASTATTN_DECLARE(baseline)
#ifdef FASTATTN_HAS_AVX2
FASTATTN_DECLARE(avx2)
#endif
#ifdef FASTATTN_HAS_AVX512
FASTATTN_DECLARE(avx512)
#endif
#ifdef FASTATTN_HAS_AVX512_BF16
FASTATTN_DECLARE(avx512_bf16)
#endif

namespace {
const std::vector<const Kernels*>& tables() {
  static const std::vector<const Kernels*> found = [] {
    std::vector<const Kernels*> t{&baseline::table};
#if defined(__x86_64__)
    __builtin_cpu_init();
    [[maybe_unused]] bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    [[maybe_unused]] bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#ifdef FASTATTN_HAS_AVX2
    if (v3) t.push_back(&avx2::table);
#endif
#ifdef FASTATTN_HAS_AVX512
    if (v4) t.push_back(&avx512::table);
#endif
#ifdef FASTATTN_HAS_AVX512_BF16
    if (v4 && __builtin_cpu_supports("avx512bf16")) t.push_back(&avx512_bf16::table);
#endif
#endif
    return t;
  }();
  return found;
}
const Kernels* chosen = nullptr;
}  // namespace

const Kernels& kernels() {
  if (chosen == nullptr) chosen = tables().back();
  return *chosen;
}

void bind_dispatch(pybind11::module_& m) {
  m.def(
      "isas",
      [] {
        std::vector<std::string> names;
        for (auto* t : tables()) names.emplace_back(t->isa);
        pybind11::tuple out(names.size());
        for (size_t i = 0; i < names.size(); ++i) out[i] = names[i];
        return out;
      },
      "The instruction sets this build and CPU offer, worst first.");
  m.def("isa", [] { return std::string(kernels().isa); }, "The instruction set in use.");
  m.def("set_isa", [](const std::string& name) {
    for (auto* t : tables())
      if (name == t->isa) {
        chosen = t;
        return;
      }
    throw std::invalid_argument("set_isa: name must be one of isas(), got '" + name + "'");
  });
}

}  // namespace fastattn
