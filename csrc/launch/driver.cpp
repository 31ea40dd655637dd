#include "driver.h"

#include <dlfcn.h>

#include <mutex>
#include <stdexcept>

namespace fastattn::cuda {
namespace {

std::mutex opening;
const Driver* opened = nullptr;  // never freed: loaded kernels keep the driver that loaded them

Driver open(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(std::string("the CUDA driver: ") + dlerror());
  Driver d;
#define FASTATTN_FIND(name, symbol, arguments)                            \
  d.name = reinterpret_cast<Result(*) arguments>(dlsym(library, symbol)); \
  if (d.name == nullptr) throw std::runtime_error("a CUDA driver of version 12.0 or newer: this one has no " symbol);
  FASTATTN_DRIVER_FUNCTIONS(FASTATTN_FIND)
#undef FASTATTN_FIND
  if (Result status = d.Init(0)) throw std::runtime_error("the CUDA driver: cuInit failed with " + words(d, status));
  return d;
}

}  // namespace

const Driver& driver() {
  std::lock_guard<std::mutex> lock(opening);
  if (opened == nullptr) opened = new Driver(open("libcuda.so.1"));
  return *opened;
}

void use_driver(const char* path) {
  Driver* other = nullptr;
  if (path != nullptr) {
    other = new Driver(open(path));
    other->host_memory = true;
  }
  std::lock_guard<std::mutex> lock(opening);
  opened = other;
}

std::string words(const Driver& d, Result status) {
  const char *name = nullptr, *text = nullptr;
  d.GetErrorName(status, &name);
  d.GetErrorString(status, &text);
  return std::string(name ? name : "an unknown error") + " (" + (text ? text : std::to_string(status)) + ")";
}

Current::Current(const Driver& d, Context context) : driver_(d) {
  Context current = nullptr;
  driver_.CtxGetCurrent(&current);
  if (current == context) return;
  if (Result status = driver_.CtxPushCurrent(context))
    throw std::runtime_error("fastattn: cuCtxPushCurrent failed with " + words(driver_, status));
  pushed_ = true;
}

Current::~Current() {
  Context popped = nullptr;
  if (pushed_) driver_.CtxPopCurrent(&popped);
}

}  // namespace fastattn::cuda
