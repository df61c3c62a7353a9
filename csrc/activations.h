// The activations of operation 1's subspaces: one row each of name, φ(x) and dφ/dx. The names are
// those of ept_fast/ops/activations.py; the functions of x are in arithmetic.h. relu's slope at 0 is
// 0, and a NaN stays one.
#pragma once

#define EPT_ACTIVATIONS(ROW)                                                              \
  ROW(gelu, x * normal_probability(x), normal_probability(x) + x * normal_density(x))     \
  ROW(relu, x > 0.0f || x != x ? x : 0.0f, x > 0.0f ? 1.0f : 0.0f)                        \
  ROW(silu, x * logistic(x), logistic(x) * (1.0f + x * (1.0f - logistic(x))))             \
  ROW(identity, x, 1.0f)
