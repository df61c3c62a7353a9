// The kernels on a host, for tests: the same launches, block by block and thread by thread.
//
// Shared memory is NaN when a block starts, and exactly as large as the kernel says. Downwards, the
// blocks of a launch and the threads of every phase run in the opposite order.

#include <algorithm>
#include <exception>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "add.h"
#include "launch.h"

namespace {

thread_local bool downwards = false;
thread_local bool only_count = false;
thread_local int launches = 0;
thread_local int64_t largest_grid = 0;
thread_local int64_t most_shared_bytes = 0;
thread_local std::map<std::string, int64_t> blocks_of;  // of the last launch of each kernel
thread_local const char* failure = "";

template <class Kernel>
int64_t shared_bytes(const typename Kernel::Call& call) {
  if constexpr (requires { typename Kernel::Shared; }) {
    return sizeof(typename Kernel::Shared);
  } else {
    return Kernel::shared_floats(call) * static_cast<int64_t>(sizeof(float));
  }
}

struct HostLauncher {
  template <class Kernel>
  ept::Status run(int64_t blocks, const typename Kernel::Call& call) const {
    if (blocks == 0) return {};
    ++launches;
    blocks_of[Kernel::name] = blocks;
    largest_grid = std::max(largest_grid, blocks);
    most_shared_bytes = std::max(most_shared_bytes, shared_bytes<Kernel>(call));
    if (only_count) return {0, Kernel::name};
    for (int64_t i = 0; i < blocks; ++i) {
      const ept::Block<Kernel::threads> block{downwards ? blocks - 1 - i : i, downwards};
      if constexpr (requires { typename Kernel::Shared; }) {
        const auto shared = std::make_unique<typename Kernel::Shared>();
        memset(static_cast<void*>(shared.get()), 0xff, sizeof *shared);
        Kernel::run(block, *shared, call);
      } else {
        const float nan = std::numeric_limits<float>::quiet_NaN();
        std::vector<float> memory(static_cast<size_t>(Kernel::shared_floats(call)), nan);
        Kernel::run(block, memory.data(), call);
      }
    }
    return {0, Kernel::name};
  }
};

template <class Run>
int caught(bool reversed, Run run) {
  downwards = reversed;
  launches = 0;
  blocks_of.clear();
  largest_grid = most_shared_bytes = 0;
  failure = "";
  try {
    return run(HostLauncher{}).error;
  } catch (const std::exception& error) {
    failure = error.what();
    return -1;
  }
}

}  // namespace

extern "C" {

// Of the last call: why it failed, and what it took.
const char* ept_failure() { return failure; }
int ept_launches() { return launches; }
int64_t ept_largest_grid() { return largest_grid; }
int64_t ept_blocks(const char* kernel) { return blocks_of[kernel]; }
int64_t ept_most_shared_bytes() { return most_shared_bytes; }

// From here on calls are planned only, or run again.
void ept_only_count(int on) { only_count = on != 0; }

// The sizes of the contract's structs, for whoever fills them in another language.
int64_t ept_struct_size(int index) {
  const int64_t sizes[] = {sizeof(ept::View), sizeof(ept::ReconstructForward),
                           sizeof(ept::ReconstructBackward), sizeof(ept::SpliceForward),
                           sizeof(ept::SpliceBackward)};
  return sizes[index];
}

// Conversions of one number.
uint16_t ept_bfloat16(float value) { return ept::from_float<ept::BFloat16>(value).bits; }
uint16_t ept_half(float value) { return ept::from_float<ept::Half>(value).bits; }
float ept_from_half(uint16_t bits) { return ept::to_float(ept::Half{bits}); }

// Of a call, the bytes of its workspace; the error of its launches, -1 for a failure of the host's
// own. `reversed`: downwards.
#define EPT_ON_HOST(Call, name)                                                              \
  int64_t ept_##name##_workspace(const ept::Call* call) { return ept::name##_bytes(*call); } \
  int ept_##name(const ept::Call* call, int reversed) {                                      \
    const auto run = [&](const auto& launcher) { return run_##name(launcher, *call); };      \
    return caught(reversed != 0, run);                                                       \
  }
EPT_CALLS(EPT_ON_HOST)

int ept_add(const ept::Addition* call, int reversed) {
  return caught(reversed != 0, [&](const auto& launcher) { return run_add(launcher, *call); });
}

}  // extern "C"
