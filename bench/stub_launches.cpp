// The launches of csrc/kernels.h without kernels: each call is planned as on a GPU, and each launch
// hands its arguments over and is counted. bench/host_cost.py compiles it beside csrc/binding.cpp.
#include <cstring>

#include "add.h"
#include "launch.h"

extern "C" {
__attribute__((visibility("default"))) long stub_cuda_launches = 0;
}

namespace {

// The CUDA runtime copies a kernel's arguments before it calls the driver.
struct StubLauncher {
  template <class Kernel>
  ept::Status run(int64_t blocks, const typename Kernel::Call& call) const {
    if (blocks == 0) return {};
    char copied[sizeof call];
    std::memcpy(copied, &call, sizeof call);
    asm volatile("" : : "r"(copied) : "memory");
    ++stub_cuda_launches;
    return {0, Kernel::name};
  }
};

}  // namespace

namespace ept {

#define EPT_STUB(Call, name)                                                             \
  int64_t name##_workspace(const Call& call) { return name##_bytes(call); }              \
  Status name(const Call& call, CUstream_st*) { return run_##name(StubLauncher{}, call); }
EPT_CALLS(EPT_STUB)

Status add(const Addition& call, CUstream_st*) { return run_add(StubLauncher{}, call); }

const char* error_string(int) { return "no error of the stub"; }

}  // namespace ept
