// The execution model: one source for a GPU's block of threads and for a loop on a host.
//
// A kernel is a sequence of phases. `block.each(phase)` runs `phase(thread)` for every thread of the
// block and waits for all of them; `block.apart` does the same without the wait, for a phase after
// which no thread reads what another has written. On a GPU a phase runs for the thread at hand,
// followed by a barrier. On a host it is a loop over the threads, upwards or downwards: a phase in
// which one thread reads what another writes gives different results in the two orders.
//
// `block.multiply` is a phase of the matrix units, in which the lanes of a warp work together.
//
// What a thread keeps between phases lies in a `Local`, registers on a GPU and an array on a host.
// Outside the phases all threads do the same. There, shared memory is read through `agree(read)`
// alone: without its barrier a fast thread could overwrite what a slow one has yet to read.
#pragma once

#include <cstdint>

#include "types.h"

#ifndef __CUDACC__
#include <cmath>
#include <vector>
#endif

namespace ept {

// Matrix units that multiply TF32 numbers: sm_80 and later, and the host in their place, unless it
// is to do as a GPU without them.
#if defined(EPT_NO_MATRIX_UNITS) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800)
inline constexpr bool has_matrix_units = false;
#else
inline constexpr bool has_matrix_units = true;
#endif

// C += A·B of a warp, A [16, 8] and B [8, 8] in TF32: the elements that one lane holds. Which they
// are is the instruction's choice (mma.m16n8k8).
struct MatrixProduct {
  static constexpr int rows = 16, columns = 8, depth = 8;
  const uint32_t* a;  // [4]
  const uint32_t* b;  // [2]
  float* c;           // [4]

  EPT_BOTH static int row_of_a(int lane, int i) { return lane / 4 + i % 2 * 8; }
  EPT_BOTH static int column_of_a(int lane, int i) { return lane % 4 + i / 2 * 4; }
  EPT_BOTH static int row_of_b(int lane, int i) { return lane % 4 + i * 4; }
  EPT_BOTH static int column_of_b(int lane) { return lane / 4; }
  EPT_BOTH static int row_of_c(int lane, int i) { return lane / 4 + i / 2 * 8; }
  EPT_BOTH static int column_of_c(int lane, int i) { return lane % 4 * 2 + i % 2; }
};

// The bits of the nearest TF32 number, ties away from zero.
EPT_BOTH uint32_t to_tf32(float value) {
#ifdef __CUDA_ARCH__
#if __CUDA_ARCH__ >= 800
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
#else
  return bits_of(value);
#endif
#else
  return (bits_of(value) + 0x1000u) & ~0x1fffu;
#endif
}

#ifdef __CUDACC__

template <int Threads>
struct Block {
  static constexpr int threads = Threads;
  int64_t index;

  template <class State>
  struct Local {
    State state;
    EPT_DEVICE State& operator[](int) { return state; }
  };

  EPT_DEVICE Block() : index(blockIdx.x) {}

  template <class Phase>
  EPT_DEVICE void each(Phase phase) const {
    phase(static_cast<int>(threadIdx.x));
    __syncthreads();
  }

  template <class Phase>
  EPT_DEVICE void apart(Phase phase) const {
    phase(static_cast<int>(threadIdx.x));
  }

  // One product of every warp.
  template <class Operands>
  EPT_DEVICE void multiply(Operands operands) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    const MatrixProduct of = operands(static_cast<int>(threadIdx.x));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(of.c[0]), "+f"(of.c[1]), "+f"(of.c[2]), "+f"(of.c[3])
        : "r"(of.a[0]), "r"(of.a[1]), "r"(of.a[2]), "r"(of.a[3]), "r"(of.b[0]), "r"(of.b[1]));
#endif
  }

  template <class Read>
  EPT_DEVICE auto agree(Read read) const {
    const auto value = read();
    __syncthreads();
    return value;
  }
};

#else

template <int Threads>
struct Block {
  static constexpr int threads = Threads;
  int64_t index;
  bool downwards;

  template <class State>
  struct Local {
    std::vector<State> states{Threads};
    State& operator[](int thread) { return states[static_cast<size_t>(thread)]; }
  };

  template <class Phase>
  void each(Phase phase) const {
    for (int i = 0; i < Threads; ++i) phase(downwards ? Threads - 1 - i : i);
  }

  template <class Phase>
  void apart(Phase phase) const {
    each(phase);
  }

  template <class Operands>
  void multiply(Operands operands) const {
    using Product = MatrixProduct;
    for (int warp = 0; warp < Threads; warp += 32) {
      float a[Product::rows][Product::depth], b[Product::depth][Product::columns];
      for (int lane = 0; lane < 32; ++lane) {
        const Product of = operands(warp + lane);
        for (int i = 0; i < 4; ++i) {
          a[Product::row_of_a(lane, i)][Product::column_of_a(lane, i)] = float_of(of.a[i]);
        }
        for (int i = 0; i < 2; ++i) {
          b[Product::row_of_b(lane, i)][Product::column_of_b(lane)] = float_of(of.b[i]);
        }
      }
      for (int lane = 0; lane < 32; ++lane) {
        const Product of = operands(warp + lane);
        for (int i = 0; i < 4; ++i) {
          const int row = Product::row_of_c(lane, i), column = Product::column_of_c(lane, i);
#ifdef EPT_CUT_SUMS  // to the float32 number nearer to zero, as the units do at worst
          double sum = of.c[i];
          for (int k = 0; k < Product::depth; ++k) sum += double{a[row][k]} * double{b[k][column]};
          of.c[i] = static_cast<float>(sum);
          if (std::abs(of.c[i]) > std::abs(sum)) of.c[i] = std::nextafter(of.c[i], 0.0f);
#else
          for (int k = 0; k < Product::depth; ++k) of.c[i] += a[row][k] * b[k][column];
#endif
        }
      }
    }
  }

  template <class Read>
  auto agree(Read read) const {
    return read();
  }
};

#endif

// Where a block's number takes it: `next(extent)` gives the index along an axis, innermost first.
struct Digits {
  int64_t rest;

  EPT_BOTH int next(int extent) {
    const int digit = static_cast<int>(rest % extent);
    rest /= extent;
    return digit;
  }
};

// One value of each thread, folded: `join(all, some)` takes another one in. Every thread has
// written its own into `values`, one place for each, in the phase before; the order is fixed.
template <class B, class T, class Join>
EPT_DEVICE T fold_of(const B& block, T* values, Join join) {
  constexpr int lanes = 16;
  static_assert(B::threads % lanes == 0);
  block.each([&](int thread) {
    if (thread >= lanes) return;
    T all = values[thread];
    for (int i = 1; i < B::threads / lanes; ++i) join(all, values[thread + i * lanes]);
    values[thread] = all;
  });
  return block.agree([&] {
    T all = values[0];
    EPT_UNROLL
    for (int i = 1; i < lanes; ++i) join(all, values[i]);
    return all;
  });
}

}  // namespace ept
