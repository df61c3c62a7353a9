// The sum of an offset's gradients, which have a half from each operation of a path: see kernels.h.
#pragma once

#include "block.h"

namespace ept {

struct AddKernel {
  static constexpr const char* name = "add";
  static constexpr int threads = 256;
  using Call = Addition;
  struct Shared {};

  template <class B>
  EPT_DEVICE static void run(const B& block, Shared&, const Call& call) {
    block.apart([&](int thread) {
      const int64_t at = block.index * threads + thread;
      for (int i = 0; i < 2; ++i) {
        if (at >= call.size[i]) continue;
        const float half = load(call.half[i], call.type[i], at);
        store(call.sum[i], call.type[i], at, load(call.sum[i], call.type[i], at) + half);
      }
    });
  }
};

template <class Launcher>
Status run_add(const Launcher& launcher, const Addition& call) {
  const int64_t size = call.size[0] > call.size[1] ? call.size[0] : call.size[1];
  const int64_t blocks = (size + AddKernel::threads - 1) / AddKernel::threads;
  return launcher.template run<AddKernel>(blocks, call);
}

}  // namespace ept
