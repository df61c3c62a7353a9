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

// The sum of `term(i)` for i < count, in eight interleaved sums: their additions overlap, and fewer
// roundings follow one another.
template <class Term>
EPT_BOTH float sum_of_terms(int count, Term term) {
  float sums[8] = {};
  for (int i = 0; i < count; i += 8) {
    EPT_UNROLL
    for (int j = 0; j < 8; ++j) {
      if (i + j < count) sums[j] += term(i + j);
    }
  }
  EPT_UNROLL
  for (int width = 4; width > 0; width /= 2) {
    EPT_UNROLL
    for (int j = 0; j < width; ++j) sums[j] += sums[j + width];
  }
  return sums[0];
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
