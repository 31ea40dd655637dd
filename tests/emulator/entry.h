// Makes one specialisation of a kernel a C function that the runtime calls once per fibre.
#pragma once

namespace emulator {
// What __launch_bounds__ says: the most threads of a block, and how many blocks shall fit into a multiprocessor.
struct Bounds {
  unsigned threads, blocks = 1;
};
template <class Params>
constexpr unsigned long params_size(void (*)(Params)) {
  return sizeof(Params);
}
template <class Params>
inline void call(void (*kernel)(Params), const void* params) {
  kernel(*static_cast<const Params*>(params));
}
}  // namespace emulator

#define EMULATOR_BOUNDS(...)                                                          \
  extern "C" __attribute__((visibility("default"))) emulator::Bounds emulator_bounds; \
  emulator::Bounds emulator_bounds = __VA_ARGS__;

#define EMULATOR_KERNEL(...)                                                            \
  extern "C" __attribute__((visibility("default"))) unsigned long emulator_params_size; \
  unsigned long emulator_params_size = emulator::params_size(&__VA_ARGS__);             \
  extern "C" __attribute__((no_sanitize("thread"))) void emulator_call(const void* params) { emulator::call(&__VA_ARGS__, params); }
