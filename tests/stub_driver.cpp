// Stands in for libcuda: two devices, whose kernels do nothing. Every call is noted as a line of text, with what the driver
// would have been told. Built by tests/test_launcher.py against NVIDIA's own cuda.h (Triton's wheel has it).
#include <cuda.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

namespace {

std::mutex guard;
std::string notes;
bool silent = false;
size_t param_bytes = 0;
thread_local std::vector<CUcontext> contexts;
thread_local CUstreamCaptureMode capture_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;

// One whole line under one lock: threads launch at the same time.
void note_line(const std::string& line) {
  std::lock_guard<std::mutex> lock(guard);
  notes += line + "\n";
}

std::string text_of(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  return text;
}

template <class... T>
void note(const char* format, T... values) {
  if (!silent) note_line(text_of(format, values...));
}

std::string hex(const void* data, size_t bytes) {
  static const char* kDigits = "0123456789abcdef";
  std::string text;
  for (size_t i = 0; i < bytes; ++i) {
    auto byte = static_cast<const unsigned char*>(data)[i];
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

long current() { return contexts.empty() ? 0 : reinterpret_cast<long>(contexts.back()); }
CUresult needs_context() { return contexts.empty() ? CUDA_ERROR_INVALID_CONTEXT : CUDA_SUCCESS; }

}  // namespace

extern "C" {

// For the tests: what was called so far, one call to a line; forget it; how many bytes of parameters to note; note nothing.
const char* stub_notes() { return notes.c_str(); }
void stub_forget() { notes.clear(); }
void stub_param_bytes(size_t bytes) { param_bytes = bytes; }
void stub_silence(int on) { silent = on; }
void stub_make_current(long context) {
  contexts.clear();
  if (context) contexts.push_back(reinterpret_cast<CUcontext>(context));
}
long stub_current() { return current(); }

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) {
  *version = 12080;
  return CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult status, const char** text) {
  *text = status == CUDA_ERROR_INVALID_IMAGE     ? "CUDA_ERROR_INVALID_IMAGE"
          : status == CUDA_ERROR_NOT_FOUND       ? "CUDA_ERROR_NOT_FOUND"
          : status == CUDA_ERROR_INVALID_VALUE   ? "CUDA_ERROR_INVALID_VALUE"
          : status == CUDA_ERROR_INVALID_CONTEXT ? "CUDA_ERROR_INVALID_CONTEXT"
                                                 : nullptr;
  return *text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuGetErrorString(CUresult status, const char** text) {
  *text = status == CUDA_ERROR_INVALID_VALUE ? "invalid argument" : "the stub says so";
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = 40 + ordinal;
  return ordinal < 2 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = reinterpret_cast<CUcontext>(static_cast<long>(100 + device));
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = reinterpret_cast<CUcontext>(current());
  return CUDA_SUCCESS;
}
CUresult cuCtxPushCurrent(CUcontext context) {
  contexts.push_back(context);
  return CUDA_SUCCESS;
}
CUresult cuCtxPopCurrent(CUcontext* context) {
  if (CUresult failed = needs_context()) return failed;
  *context = contexts.back();
  contexts.pop_back();
  return CUDA_SUCCESS;
}
CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
  std::swap(*mode, capture_mode);
  return CUDA_SUCCESS;
}
CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned count, CUjit_option* options, void** values) {
  if (CUresult failed = needs_context()) return failed;
  bool elf = std::memcmp(image,
                         "\x7f"
                         "ELF",
                         4) == 0,
       ptx = std::strstr(static_cast<const char*>(image), ".target") != nullptr;
  note("load context=%ld relaxed=%d %s", current(), capture_mode == CU_STREAM_CAPTURE_MODE_RELAXED, elf ? "cubin" : "ptx");
  *module = reinterpret_cast<CUmodule>(1);
  if (elf || ptx) return CUDA_SUCCESS;
  for (unsigned i = 0; i < count; ++i)
    if (options[i] == CU_JIT_ERROR_LOG_BUFFER) std::strcpy(static_cast<char*>(values[i]), "the log of ptxas");
  return CUDA_ERROR_INVALID_IMAGE;
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
  if (CUresult failed = needs_context()) return failed;
  note("function %s", name);
  *function = reinterpret_cast<CUfunction>(77);
  return std::strstr(name, "absent") ? CUDA_ERROR_NOT_FOUND : CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute attribute, int value) {
  if (CUresult failed = needs_context()) return failed;
  const char* name = attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES       ? "shared"
                     : attribute == CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED ? "wide_clusters"
                                                                                        : "unexpected";
  note("attribute %s=%d", name, value);
  return value <= 227 << 10 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction function, void** params, void** extra) {
  if (CUresult failed = needs_context()) return failed;
  if (silent) return CUDA_SUCCESS;
  unsigned cluster =
      c->numAttrs == 1 && c->attrs[0].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION ? c->attrs[0].value.clusterDim.x : 1;
  note_line(
      text_of("launch context=%ld stream=%ld function=%ld extra=%d grid=%u,%u,%u block=%u,%u,%u shared=%u cluster=%u aligned=%d",
              current(), reinterpret_cast<long>(c->hStream), reinterpret_cast<long>(function), extra != nullptr, c->gridDimX,
              c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ, c->sharedMemBytes, cluster,
              reinterpret_cast<uintptr_t>(params[0]) % 64 == 0) +
      " params=" + hex(params[0], param_bytes));
  return c->gridDimY == 13 ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* sizes,
                                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
  if (CUresult failed = needs_context()) return failed;
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0) return CUDA_ERROR_INVALID_VALUE;
  std::string text = "encode type=" + std::to_string(type) + " sizes=";
  for (unsigned i = 0; i < rank; ++i) text += std::to_string(sizes[i]) + ",";
  text += " strides=";
  for (unsigned i = 0; i + 1 < rank; ++i) text += std::to_string(strides[i]) + ",";
  text += " box=";
  for (unsigned i = 0; i < rank; ++i) text += std::to_string(box[i]) + ":" + std::to_string(steps[i]) + ",";
  note("%s interleave=%d swizzle=%d promotion=%d fill=%d", text.c_str(), interleave, swizzle, promotion, fill);
  std::memset(map, 0x5a, sizeof(CUtensorMap));
  map->opaque[0] = reinterpret_cast<uintptr_t>(address);
  return CUDA_SUCCESS;
}
CUresult cuTensorMapReplaceAddress(CUtensorMap* map, void* address) {
  if (CUresult failed = needs_context()) return failed;
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0) return CUDA_ERROR_INVALID_VALUE;
  map->opaque[0] = reinterpret_cast<uintptr_t>(address);
  return CUDA_SUCCESS;
}
}
