"""The activations φ of :mod:`ept_fast.ops.activations` in Triton."""

import triton
import triton.language as tl


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """φ(x)."""
    result = x
    if ACTIVATION == "gelu":
        result = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "relu":
        result = tl.where(x < 0, 0.0, x)  # a NaN stays
    elif ACTIVATION == "silu":
        result = x / (1.0 + tl.exp(-x))
    return result


@triton.jit
def activation_derivative(x, ACTIVATION: tl.constexpr):
    """dφ/dx; relu's is 0 at 0."""
    derivative = tl.full(x.shape, 1.0, tl.float32)
    if ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        derivative = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    elif ACTIVATION == "relu":
        derivative = tl.where(x > 0, 1.0, 0.0)
    elif ACTIVATION == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-x))
        derivative = sigmoid * (1.0 + x * (1.0 - sigmoid))
    return derivative
