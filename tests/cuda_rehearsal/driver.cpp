// libcuda under torch's CUDA build: the driver of the launcher's tests, and what the libraries of torch and Triton want to find in
// it.
#include "../stub_driver.cpp"

extern "C" {

CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) {
  stub_make_current(reinterpret_cast<long>(context));
  return CUDA_SUCCESS;
}

// Declared by another name, since the header has their signatures.
#define UNSUPPORTED(name)              \
  int unsupported_##name() asm(#name); \
  int unsupported_##name() { return CUDA_ERROR_NOT_SUPPORTED; }
UNSUPPORTED(cuCtxGetDevice)
UNSUPPORTED(cuCtxGetLimit)
UNSUPPORTED(cuCtxSetLimit)
UNSUPPORTED(cuDeviceGetAttribute)
UNSUPPORTED(cuFuncGetAttribute)
UNSUPPORTED(cuFuncSetCacheConfig)
UNSUPPORTED(cuGetExportTable)  // NVRTC asks for one
UNSUPPORTED(cuLaunchCooperativeKernel)
UNSUPPORTED(cuLaunchKernel)
UNSUPPORTED(cuLinkAddData_v2)
UNSUPPORTED(cuLinkComplete)
UNSUPPORTED(cuLinkCreate_v2)
UNSUPPORTED(cuModuleLoad)
UNSUPPORTED(cuModuleLoadData)
UNSUPPORTED(cuModuleUnload)
UNSUPPORTED(cuOccupancyMaxActiveBlocksPerMultiprocessor)
UNSUPPORTED(cuPointerGetAttribute)
}
