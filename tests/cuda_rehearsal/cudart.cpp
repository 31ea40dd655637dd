// Stands in for libcudart under torch's CUDA build: two GPUs of compute capability 9.0 whose memory is the host's. Copies and
// fills are done at once, on whatever stream; kernels of torch's own are refused by name, since nothing here could run them.
// While a stream is captured, what would go onto it is handed to the rehearsal instead, which runs it when the graph is launched.
// Built against NVIDIA's cuda_runtime_api.h, so that every signature is the real one.
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <utility>

namespace {

constexpr int kDevices = 2, kCudaVersion = 13000;
constexpr size_t kMemory = size_t(8) << 30, kAlignment = 512;

struct Block {
  size_t bytes;
  int device;  // -1: pinned memory of the host
};

struct Call {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};

std::mutex guard;
std::map<uintptr_t, Block> blocks;
std::map<const void*, std::string> kernels;  // by the address of their stub on the host
std::atomic<uintptr_t> handles{0x1000};
std::atomic<size_t> used[kDevices];
std::atomic<cudaStream_t> captured{nullptr};
std::atomic<uintptr_t> capture{0};
thread_local int current = 0;
thread_local cudaError_t last = cudaSuccess;
thread_local Call call;

// What a captured stream is given: dst and src of a copy, or dst and no src of a fill with `value`; or, when a graph is
// launched, its handle in `dst`.
using Captured = void (*)(int what, uintptr_t dst, uintptr_t src, size_t bytes, int value);
enum { kCopy, kFill, kEnd, kLaunch };
Captured on_capture = nullptr;

cudaError_t failed(cudaError_t status) { return last = status; }

template <class T>
cudaError_t handle(T* out) {
  *out = reinterpret_cast<T>(handles += 16);
  return cudaSuccess;
}

cudaError_t allocate(void** out, size_t bytes, int device) {
  size_t whole = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  if (device >= 0 && used[device] + whole > kMemory) return failed(cudaErrorMemoryAllocation);
  *out = std::aligned_alloc(kAlignment, whole ? whole : kAlignment);
  if (*out == nullptr) return failed(cudaErrorMemoryAllocation);
  std::memset(*out, 0xff, whole);  // NaN of every floating type
  if (device >= 0) used[device] += whole;
  std::lock_guard<std::mutex> lock(guard);
  blocks[reinterpret_cast<uintptr_t>(*out)] = {whole, device};
  return cudaSuccess;
}

cudaError_t release(void* pointer) {
  if (pointer == nullptr) return cudaSuccess;
  std::lock_guard<std::mutex> lock(guard);
  auto found = blocks.find(reinterpret_cast<uintptr_t>(pointer));
  if (found == blocks.end()) return failed(cudaErrorInvalidValue);
  if (found->second.device >= 0) used[found->second.device] -= found->second.bytes;
  blocks.erase(found);
  std::free(pointer);
  return cudaSuccess;
}

const Block* block_of(const void* pointer) {
  auto at = reinterpret_cast<uintptr_t>(pointer);
  auto found = blocks.upper_bound(at);
  if (found == blocks.begin()) return nullptr;
  --found;
  return at < found->first + found->second.bytes ? &found->second : nullptr;
}

bool capturing(cudaStream_t stream) { return capture && stream == captured; }

cudaError_t refuse(const void* function) {
  std::lock_guard<std::mutex> lock(guard);
  auto found = kernels.find(function);
  std::fprintf(stderr, "cuda_rehearsal: torch launches a kernel of its own: %s\n",
               found == kernels.end() ? "unknown" : found->second.c_str());
  return failed(cudaErrorNotSupported);
}

}  // namespace

extern "C" {

void rehearsal_on_capture(Captured function) { on_capture = function; }
int rehearsal_capturing() { return capture != 0; }

// ---- devices

cudaError_t cudaGetDeviceCount(int* count) {
  *count = kDevices;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return failed(cudaErrorInvalidDevice);
  current = device;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  if (device < 0 || device >= kDevices) return failed(cudaErrorInvalidDevice);
  *p = cudaDeviceProp{};
  std::snprintf(p->name, sizeof(p->name), "memory of the host %d", device);
  p->major = 9;
  p->minor = 0;
  p->totalGlobalMem = kMemory;
  p->multiProcessorCount = 132;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 0x7fffffff;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->sharedMemPerBlock = 48 << 10;
  p->sharedMemPerBlockOptin = 227 << 10;
  p->sharedMemPerMultiprocessor = 228 << 10;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->l2CacheSize = 50 << 20;
  p->textureAlignment = 512;
  p->pciBusID = device;
  p->unifiedAddressing = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor         ? 9
           : attribute == cudaDevAttrMultiProcessorCount          ? 132
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 227 << 10
           : attribute == cudaDevAttrMaxThreadsPerBlock           ? 1024
                                                                  : 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* text, int length, int device) {
  std::snprintf(text, length, "0000:%02x:00.0", device);
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = kCudaVersion;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = kCudaVersion;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  *function = dlsym(RTLD_DEFAULT, symbol);
  if (found) *found = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return capture ? failed(cudaErrorStreamCaptureUnsupported) : cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  *total = kMemory;
  *free_bytes = kMemory - used[current];
  return cudaSuccess;
}

// ---- errors

cudaError_t cudaGetLastError() { return std::exchange(last, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last; }
const char* cudaGetErrorName(cudaError_t error) { return error == cudaSuccess ? "cudaSuccess" : "an error of the rehearsal"; }
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorNotSupported:
      return "the rehearsal does not do this";
    default:
      return "an error of the rehearsal";
  }
}

// ---- memory

cudaError_t cudaMalloc(void** out, size_t bytes) { return allocate(out, bytes, current); }
cudaError_t cudaMallocAsync(void** out, size_t bytes, cudaStream_t) { return allocate(out, bytes, current); }
cudaError_t cudaFree(void* pointer) { return release(pointer); }
cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) { return release(pointer); }
cudaError_t cudaHostAlloc(void** out, size_t bytes, unsigned) { return allocate(out, bytes, -1); }
cudaError_t cudaFreeHost(void* pointer) { return release(pointer); }
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* out, const void* pointer) {
  std::lock_guard<std::mutex> lock(guard);
  const Block* block = block_of(pointer);
  *out = cudaPointerAttributes{};
  out->type = block == nullptr ? cudaMemoryTypeUnregistered : block->device < 0 ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
  out->device = block != nullptr && block->device >= 0 ? block->device : 0;
  out->devicePointer = out->hostPointer = const_cast<void*>(pointer);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* dst, const void* src, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  if (capturing(stream))
    on_capture(kCopy, reinterpret_cast<uintptr_t>(dst), reinterpret_cast<uintptr_t>(src), bytes, 0);
  else
    std::memmove(dst, src, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* dst, const void* src, size_t bytes, cudaMemcpyKind kind) {
  return cudaMemcpyAsync(dst, src, bytes, kind, nullptr);
}
cudaError_t cudaMemcpyPeerAsync(void* dst, int, const void* src, int, size_t bytes, cudaStream_t stream) {
  return cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToDevice, stream);
}
cudaError_t cudaMemcpy2DAsync(void* dst, size_t dst_pitch, const void* src, size_t src_pitch, size_t width, size_t height,
                              cudaMemcpyKind kind, cudaStream_t stream) {
  for (size_t i = 0; i < height; ++i)
    cudaMemcpyAsync(static_cast<char*>(dst) + i * dst_pitch, static_cast<const char*>(src) + i * src_pitch, width, kind, stream);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* dst, int value, size_t bytes, cudaStream_t stream) {
  if (capturing(stream))
    on_capture(kFill, reinterpret_cast<uintptr_t>(dst), 0, bytes, value);
  else
    std::memset(dst, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* dst, int value, size_t bytes) { return cudaMemsetAsync(dst, value, bytes, nullptr); }

// ---- streams and events: everything has happened when a call returns

cudaError_t cudaStreamCreate(cudaStream_t* out) { return handle(out); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* out, unsigned, int) { return handle(out); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* out, unsigned) { return handle(out); }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return capturing(stream) ? failed(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  *priority = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* out) { return handle(out); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* out, unsigned) { return handle(out); }
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t, cudaStream_t, unsigned) { return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) {
  *ms = 1;
  return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* data) {
  function(data);
  return cudaSuccess;
}

// ---- capture

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  thread_local cudaStreamCaptureMode own = cudaStreamCaptureModeGlobal;
  std::swap(*mode, own);
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (capture) return failed(cudaErrorStreamCaptureUnsupported);
  captured = stream;
  capture = handles += 16;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  if (!capturing(stream)) return failed(cudaErrorStreamCaptureUnmatched);
  on_capture(kEnd, capture, 0, 0, 0);
  *graph = reinterpret_cast<cudaGraph_t>(capture.exchange(0));
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = capturing(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
                                     size_t* count) {
  cudaStreamIsCapturing(stream, status);
  if (id) *id = capture;
  if (graph) *graph = reinterpret_cast<cudaGraph_t>(capture.load());
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* out, cudaGraph_t graph, unsigned long long) {
  *out = reinterpret_cast<cudaGraphExec_t>(graph);
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t) {
  on_capture(kLaunch, reinterpret_cast<uintptr_t>(graph), 0, 0, 0);
  return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t*, size_t* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }

// ---- kernels of torch's

void** __cudaRegisterFatBinary(void*) {
  static void* nothing = nullptr;
  return &nothing;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  std::lock_guard<std::mutex> lock(guard);
  kernels[function] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  call = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = call.grid, *block = call.block, *shared = call.shared, *static_cast<cudaStream_t*>(stream) = call.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* out, const void* function) {
  *out = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, size_t, cudaStream_t) { return refuse(kernel); }
cudaError_t cudaLaunchKernel(const void* function, dim3, dim3, void**, size_t, cudaStream_t) { return refuse(function); }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void* function, void**) { return refuse(function); }
cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3, dim3, void**, size_t, cudaStream_t) { return refuse(function); }

// ---- what torch refers to and nothing here needs: declared by another name, since the header has their signatures

#define UNSUPPORTED(name)                                               \
  int unsupported_##name() asm(#name);                                  \
  int unsupported_##name() {                                            \
    std::fputs("cuda_rehearsal: " #name " is not supported\n", stderr); \
    return failed(cudaErrorNotSupported);                               \
  }
UNSUPPORTED(cudaIpcOpenMemHandle)
UNSUPPORTED(cudaIpcOpenEventHandle)
UNSUPPORTED(cudaIpcGetMemHandle)
UNSUPPORTED(cudaIpcGetEventHandle)
UNSUPPORTED(cudaIpcCloseMemHandle)
UNSUPPORTED(cudaHostRegister)
UNSUPPORTED(cudaHostUnregister)
UNSUPPORTED(cudaGetSymbolAddress)
UNSUPPORTED(cudaDeviceEnablePeerAccess)
UNSUPPORTED(cudaStreamAddCallback)
UNSUPPORTED(cudaProfilerStart)
UNSUPPORTED(cudaProfilerStop)
UNSUPPORTED(cudaOccupancyMaxActiveBlocksPerMultiprocessor)
UNSUPPORTED(cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags)
UNSUPPORTED(cudaMemcpyToSymbol)
UNSUPPORTED(cudaMemPoolTrimTo)
UNSUPPORTED(cudaMemPoolSetAttribute)
UNSUPPORTED(cudaMemPoolGetAttribute)
UNSUPPORTED(cudaMemPoolSetAccess)
UNSUPPORTED(cudaDeviceGetDefaultMemPool)
UNSUPPORTED(cudaGraphNodeGetDependencies)
UNSUPPORTED(cudaGraphDebugDotPrint)
UNSUPPORTED(cudaDeviceGetGraphMemAttribute)
UNSUPPORTED(cudaDeviceSetGraphMemAttribute)
UNSUPPORTED(cudaGraphAddNode)
UNSUPPORTED(cudaGraphConditionalHandleCreate)
UNSUPPORTED(cudaGraphRetainUserObject)
UNSUPPORTED(cudaKernelSetAttributeForDevice)
UNSUPPORTED(cudaLibraryGetKernel)
UNSUPPORTED(cudaLibraryLoadData)
UNSUPPORTED(cudaLibraryUnload)
UNSUPPORTED(cudaStreamBeginCaptureToGraph)
UNSUPPORTED(cudaStreamUpdateCaptureDependencies)
UNSUPPORTED(cudaUserObjectCreate)
UNSUPPORTED(cudaUserObjectRelease)
UNSUPPORTED(cudaFuncSetAttribute)
UNSUPPORTED(cudaFuncGetAttributes)
}
