/* A libcuda that does nothing: what Triton's driver calls succeeds, and launches are counted.
   bench/host_cost.py compiles it; headers of CUDA are not needed. */
#include <stddef.h>
#include <stdint.h>

typedef int CUresult;

long stub_launches = 0;

CUresult cuLaunchKernel(void) { return stub_launches++, 0; }
CUresult cuLaunchKernelEx(void) { return stub_launches++, 0; }

CUresult cuInit(unsigned flags) { return 0; }
CUresult cuDriverGetVersion(int *version) { return *version = 13000, 0; }
CUresult cuGetErrorString(CUresult error, const char **text) { return *text = "stub", 0; }
CUresult cuDeviceGet(int *device, int ordinal) { return *device = 0, 0; }
/* Shared memory of a block is the only attribute that is looked at. */
CUresult cuDeviceGetAttribute(int *value, int attribute, int device) { return *value = 232448, 0; }
CUresult cuDevicePrimaryCtxRetain(void **context, int device) { return *context = (void *)1, 0; }
CUresult cuCtxGetCurrent(void **context) { return *context = (void *)1, 0; }
CUresult cuCtxGetDevice(int *device) { return *device = 0, 0; }
CUresult cuCtxSetCurrent(void *context) { return 0; }
CUresult cuCtxGetLimit(size_t *value, int limit) { return *value = 0, 0; }
CUresult cuCtxSetLimit(int limit, size_t value) { return 0; }
CUresult cuModuleLoadData(void **module, const void *image) { return *module = (void *)2, 0; }
CUresult cuModuleUnload(void *module) { return 0; }
CUresult cuStreamIsCapturing(void *stream, int *status) { return *status = 0, 0; }
CUresult cuModuleGetFunction(void **function, void *module, const char *name) {
  return *function = (void *)3, 0;
}
/* Attribute 0 is the most threads of a block; registers and spills are not looked at. */
CUresult cuFuncGetAttribute(int *value, int attribute, void *function) {
  return *value = attribute == 0 ? 1024 : 0, 0;
}
CUresult cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
CUresult cuFuncSetCacheConfig(void *function, int config) { return 0; }
CUresult cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) {
  return *(uint64_t *)data = pointer, 0;
}
