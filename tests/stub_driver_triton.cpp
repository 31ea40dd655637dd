// Stands in for libcuda under Triton's own launcher: one GPU of compute capability 9.0, whose kernels do nothing. It reads
// each kernel's parameters from its cubin, refuses what a GPU would refuse, and keeps what the last launches were told.
// Built by tests/triton_rehearsal.py against NVIDIA's own cuda.h (Triton's wheel has it).
#include <cuda.h>
#include <elf.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

namespace {

constexpr int kKept = 64, kMostBytes = 1024;
constexpr unsigned kSharedLimit = 227 << 10;  // bytes that one block may use

struct Kernel {
  std::string name;
  std::vector<unsigned> sizes;  // of its parameters, in order
  unsigned shared = 48 << 10;   // bytes that a launch may ask for
};

struct Module {
  const char* image;
  std::vector<std::unique_ptr<Kernel>> kernels;
};

// What a launch was told; tests/triton_rehearsal.py declares the same.
struct Launch {
  char name[64];
  unsigned grid[3], block, shared, attributes;
  uint64_t stream;
  unsigned count, bytes;
  unsigned char params[kMostBytes];
};

Launch launches[kKept];
long launched = 0;
CUcontext current = nullptr;

const Elf64_Shdr* sections(const char* image) {
  return reinterpret_cast<const Elf64_Shdr*>(image + reinterpret_cast<const Elf64_Ehdr*>(image)->e_shoff);
}

// Where the section of that name starts, and its length; nullptr where there is none.
const char* section(const char* image, const std::string& name, size_t* bytes) {
  const auto* header = reinterpret_cast<const Elf64_Ehdr*>(image);
  const Elf64_Shdr* all = sections(image);
  const char* names = image + all[header->e_shstrndx].sh_offset;
  for (int i = 0; i < header->e_shnum; ++i) {
    if (name != names + all[i].sh_name) continue;
    *bytes = all[i].sh_size;
    return image + all[i].sh_offset;
  }
  return nullptr;
}

// Attributes of a kernel: a byte of format, a byte of kind, then a value of two bytes or (format 4) its length and itself.
// A parameter's value is an index, its ordinal and offset in 16 bits each, and its bytes from bit 18 on.
bool read_parameters(const char* image, Kernel* kernel) {
  constexpr unsigned char kSized = 4, kParameter = 0x17;
  size_t bytes = 0;
  const char* at = section(image, ".nv.info." + kernel->name, &bytes);
  if (!at) return false;
  for (const char* end = at + bytes; at + 4 <= end;) {
    uint16_t length = 0;
    if (at[0] == kSized) std::memcpy(&length, at + 2, 2);
    if (at[0] == kSized && at[1] == kParameter) {
      uint16_t ordinal;
      uint32_t packed;
      std::memcpy(&ordinal, at + 8, 2);
      std::memcpy(&packed, at + 12, 4);
      if (kernel->sizes.size() <= ordinal) kernel->sizes.resize(ordinal + 1);
      kernel->sizes[ordinal] = packed >> 18;
    }
    at += 4 + length;
  }
  return true;
}

}  // namespace

extern "C" {

// For the tests: how many launches there were; the one of that number, one of the last kKept.
long stub_launched() { return launched; }
const Launch* stub_launch(long number) { return &launches[number % kKept]; }

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) {
  *version = 13000;
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult status, const char** text) {
  *text = status == CUDA_ERROR_INVALID_VALUE ? "invalid argument" : "the stub says so";
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int* count) {
  *count = 1;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return ordinal == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT                   ? 132
           : attribute == CU_DEVICE_ATTRIBUTE_WARP_SIZE                            ? 32
           : attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN    ? kSharedLimit
           : attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR ? kSharedLimit + 1024
           : attribute == CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK              ? 65536
           : attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR             ? 9
                                                                                   : 0;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
  *context = reinterpret_cast<CUcontext>(1);
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = current;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) {
  current = context;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetDevice(CUdevice* device) {
  *device = 0;
  return current ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}
CUresult cuStreamIsCapturing(CUstream, CUstreamCaptureStatus* status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetLimit(size_t* value, CUlimit) {
  *value = 0;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute, CUdeviceptr pointer) {
  std::memcpy(value, &pointer, sizeof(pointer));
  return CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  if (!current) return CUDA_ERROR_INVALID_CONTEXT;
  if (std::memcmp(image, ELFMAG, SELFMAG) != 0) return CUDA_ERROR_INVALID_IMAGE;
  *module = reinterpret_cast<CUmodule>(new Module{static_cast<const char*>(image), {}});
  return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) {
  delete reinterpret_cast<Module*>(module);
  return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  auto* owner = reinterpret_cast<Module*>(module);
  auto kernel = std::make_unique<Kernel>();
  kernel->name = name;
  if (!read_parameters(owner->image, kernel.get())) return CUDA_ERROR_NOT_FOUND;
  *function = reinterpret_cast<CUfunction>(kernel.get());
  owner->kernels.push_back(std::move(kernel));
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES || value > static_cast<int>(kSharedLimit))
    return CUDA_ERROR_INVALID_VALUE;  // attributes of later drivers are tried first by Triton 3.8
  reinterpret_cast<Kernel*>(function)->shared = value;
  return CUDA_SUCCESS;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction function, void** params, void**) {
  if (!current) return CUDA_ERROR_INVALID_CONTEXT;
  const auto* kernel = reinterpret_cast<const Kernel*>(function);
  if (c->gridDimY > 65535 || c->gridDimZ > 65535 || c->blockDimX > 1024 || c->sharedMemBytes > kernel->shared)
    return CUDA_ERROR_INVALID_VALUE;
  Launch& to = launches[launched++ % kKept];
  std::strncpy(to.name, kernel->name.c_str(), sizeof(to.name) - 1);
  to.grid[0] = c->gridDimX, to.grid[1] = c->gridDimY, to.grid[2] = c->gridDimZ;
  to.block = c->blockDimX * c->blockDimY * c->blockDimZ;
  to.shared = c->sharedMemBytes;
  to.attributes = c->numAttrs;
  to.stream = reinterpret_cast<uint64_t>(c->hStream);
  to.count = kernel->sizes.size();
  to.bytes = 0;
  for (unsigned i = 0; i < to.count; to.bytes += kernel->sizes[i++]) {
    if (to.bytes + kernel->sizes[i] > kMostBytes) return CUDA_ERROR_INVALID_VALUE;
    std::memcpy(to.params + to.bytes, params[i], kernel->sizes[i]);
  }
  return CUDA_SUCCESS;
}
}
