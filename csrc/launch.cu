// The contract's functions on a GPU: see kernels.h and launch.h.
#include <cuda_runtime.h>

#include <limits>

#include "add.h"
#include "launch.h"

namespace ept {
namespace {

// Four blocks of 128 threads on a multiprocessor. Without a limit of its own, ptxas spills a few
// registers to fit one more block.
constexpr int most_registers = 128;

template <class Kernel>
__global__ void __maxnreg__(most_registers)
    fixed_kernel(const __grid_constant__ typename Kernel::Call call) {
  __shared__ typename Kernel::Shared shared;
  Kernel::run(Block<Kernel::threads>(), shared, call);
}

// Its shared memory follows from the sizes of the call.
template <class Kernel>
__global__ void __maxnreg__(most_registers)
    sized_kernel(const __grid_constant__ typename Kernel::Call call) {
  extern __shared__ __align__(16) float memory[];
  Kernel::run(Block<Kernel::threads>(), memory, call);
}

struct DeviceLauncher {
  cudaStream_t stream;

  template <class Kernel>
  Status run(int64_t blocks, const typename Kernel::Call& call) const {
    if (blocks == 0) return {};
    if (blocks > std::numeric_limits<int32_t>::max()) {
      return {cudaErrorInvalidConfiguration, Kernel::name};
    }
    const dim3 grid(static_cast<unsigned>(blocks));
    if constexpr (requires { typename Kernel::Shared; }) {
      fixed_kernel<Kernel><<<grid, Kernel::threads, 0, stream>>>(call);
    } else {
      const size_t bytes = sizeof(float) * static_cast<size_t>(Kernel::shared_floats(call));
      sized_kernel<Kernel><<<grid, Kernel::threads, bytes, stream>>>(call);
    }
    return {cudaGetLastError(), Kernel::name};
  }
};

}  // namespace

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

#define EPT_ON_DEVICE(Call, name)                                              \
  int64_t name##_workspace(const Call& call) { return name##_bytes(call); }    \
  Status name(const Call& call, CUstream_st* stream) {                         \
    return run_##name(DeviceLauncher{stream}, call);                           \
  }
EPT_CALLS(EPT_ON_DEVICE)

Status add(const Addition& call, CUstream_st* stream) {
  return run_add(DeviceLauncher{stream}, call);
}

}  // namespace ept
