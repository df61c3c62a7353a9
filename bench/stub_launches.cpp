// The launches of csrc/kernels.h without kernels: each call is planned as on a GPU, and each launch
// hands its arguments over and is counted. bench/host_cost.py compiles it beside csrc/binding.cpp.
#include <cstring>

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

#define EPT_CALL(Name, name)                                                            \
  int64_t name##_workspace(const Name& call) { return name##_bytes(call); }             \
  Status name(const Name& call, CUstream_st*) { return run_##name(StubLauncher{}, call); }
EPT_CALL(ReconstructForward, reconstruct_forward)
EPT_CALL(ReconstructBackward, reconstruct_backward)
EPT_CALL(SpliceForward, splice_forward)
EPT_CALL(SpliceBackward, splice_backward)
#undef EPT_CALL

const char* error_string(int) { return "no error of the stub"; }

}  // namespace ept
