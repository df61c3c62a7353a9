// The functions of one number that the kernels of operation 1 apply, and their derivatives.
#pragma once

#include <cmath>

#include "types.h"

namespace ept {

template <class T>
EPT_BOTH T least(T a, T b) {
  return a < b ? a : b;
}

template <class T>
EPT_BOTH T greatest(T a, T b) {
  return a < b ? b : a;
}

// The sum of `term(i)` for i < count, in four interleaved sums: their additions overlap, and fewer
// roundings follow one another.
template <class Term>
EPT_BOTH float sum_of_terms(int count, Term term) {
  float sums[4] = {};
  int i = 0;
  for (; i + 4 <= count; i += 4) {
    EPT_UNROLL
    for (int j = 0; j < 4; ++j) sums[j] += term(i + j);
  }
  for (; i < count; ++i) sums[0] += term(i);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

EPT_BOTH float logistic(float x) { return 1.0f / (1.0f + expf(-x)); }

// The normal distribution's cumulative probability. erfc keeps its relative precision in the tail.
EPT_BOTH float normal_probability(float x) { return 0.5f * erfcf(-x * 0.70710678118654752f); }

EPT_BOTH float normal_density(float x) { return 0.39894228040143268f * expf(-0.5f * x * x); }

// φ
EPT_BOTH float activate(float x, Activation activation) {
#define EPT_PHI(name, phi, derivative) \
  if (activation == Activation::name) return phi;
  EPT_ACTIVATIONS(EPT_PHI)
#undef EPT_PHI
  return x;
}

// dφ/dx
EPT_BOTH float derivative_of(float x, Activation activation) {
#define EPT_DERIVATIVE(name, phi, derivative) \
  if (activation == Activation::name) return derivative;
  EPT_ACTIVATIONS(EPT_DERIVATIVE)
#undef EPT_DERIVATIVE
  return 1.0f;
}

}  // namespace ept
