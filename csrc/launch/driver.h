// The part of the CUDA driver's API that a launcher needs, declared here so that building asks for no CUDA header, and found
// in libcuda at run time so that importing asks for no driver. Names, layouts and numbers are those of cuda.h.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace fastattn::cuda {

using Result = int;  // CUresult
using Device = int;
using Context = struct ContextOpaque*;
using Module = struct ModuleOpaque*;
using Function = struct FunctionOpaque*;
using Stream = struct StreamOpaque*;

struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

struct LaunchAttribute {
  int id;
  char pad[4];
  union {
    char bytes[64];
    struct {
      unsigned x, y, z;
    } cluster;
  };
};

struct LaunchConfig {
  unsigned grid_x, grid_y, grid_z;
  unsigned block_x, block_y, block_z;
  unsigned shared_bytes;
  Stream stream;
  LaunchAttribute* attributes;
  unsigned num_attributes;
};

static_assert(sizeof(LaunchAttribute) == 72 && offsetof(LaunchAttribute, bytes) == 8, "CUlaunchAttribute of cuda.h");
static_assert(sizeof(LaunchConfig) == 56 && offsetof(LaunchConfig, stream) == 32, "CUlaunchConfig of cuda.h");

constexpr int kLaunchAttributeCluster = 4;          // CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
constexpr int kMaxDynamicShared = 8;                // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int kNonPortableCluster = 14;             // CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
constexpr int kRelaxed = 2;                         // CU_STREAM_CAPTURE_MODE_RELAXED
constexpr int kErrorLog = 5, kErrorLogBytes = 6;    // CU_JIT_ERROR_LOG_BUFFER, CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES
constexpr int kInterleaveNone = 0, kFillZeros = 0;  // CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE
constexpr int kPromote128 = 2;                      // CU_TENSOR_MAP_L2_PROMOTION_L2_128B

// name in cuda.h, symbol in libcuda, arguments
#define FASTATTN_DRIVER_FUNCTIONS(X)                                                                                            \
  X(Init, "cuInit", (unsigned))                                                                                                 \
  X(DriverGetVersion, "cuDriverGetVersion", (int*))                                                                             \
  X(GetErrorName, "cuGetErrorName", (Result, const char**))                                                                     \
  X(GetErrorString, "cuGetErrorString", (Result, const char**))                                                                 \
  X(DeviceGet, "cuDeviceGet", (Device*, int))                                                                                   \
  X(DevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain", (Context*, Device))                                                     \
  X(CtxGetCurrent, "cuCtxGetCurrent", (Context*))                                                                               \
  X(CtxPushCurrent, "cuCtxPushCurrent_v2", (Context))                                                                           \
  X(CtxPopCurrent, "cuCtxPopCurrent_v2", (Context*))                                                                            \
  X(ThreadExchangeStreamCaptureMode, "cuThreadExchangeStreamCaptureMode", (int*))                                               \
  X(ModuleLoadDataEx, "cuModuleLoadDataEx", (Module*, const void*, unsigned, int*, void**))                                     \
  X(ModuleGetFunction, "cuModuleGetFunction", (Function*, Module, const char*))                                                 \
  X(FuncSetAttribute, "cuFuncSetAttribute", (Function, int, int))                                                               \
  X(LaunchKernelEx, "cuLaunchKernelEx", (const LaunchConfig*, Function, void**, void**))                                        \
  X(TensorMapEncodeTiled, "cuTensorMapEncodeTiled",                                                                             \
    (TensorMap*, int, uint32_t, void*, const uint64_t*, const uint64_t*, const uint32_t*, const uint32_t*, int, int, int, int)) \
  X(TensorMapReplaceAddress, "cuTensorMapReplaceAddress", (TensorMap*, void*))

struct Driver {
#define FASTATTN_DECLARE(name, symbol, arguments) Result(*name) arguments = nullptr;
  FASTATTN_DRIVER_FUNCTIONS(FASTATTN_DECLARE)
#undef FASTATTN_DECLARE
  bool host_memory = false;  // a driver of tests, whose devices read the memory of the host
};

// The driver, opened when first asked for. Throws std::runtime_error that says what is missing.
const Driver& driver();

// Tests open a driver of their own in the place of the system's; it serves tensors of the CPU. Null: the system's again.
void use_driver(const char* path);

// "CUDA_ERROR_INVALID_VALUE (invalid argument)"
std::string words(const Driver& d, Result status);

// Makes `context` current in this thread while it lives.
class Current {
 public:
  Current(const Driver& d, Context context);
  ~Current();
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  const Driver& driver_;
  bool pushed_ = false;
};

}  // namespace fastattn::cuda
