"""The gradient of the rows that a prompt was gathered from: of each the sum over its places.

The places b·m + j of the prompt's tokens come sorted by the row that each of them has, in their own
order within a row. A program owns a row and a block of channels. It adds up its places in that
order, a block of them at a time, and writes zeros if there are none. Each element of the gradient
is read once.
"""

import triton
import triton.language as tl

from ept_fast.kernels.tiles import axis, inside


@triton.jit(do_not_specialize=["m"])
def splice_gather_backward_kernel(
    grad,  # [B, m + S, d]
    out_ptr,  # [R, d]
    places_ptr,  # [B·m]
    starts_ptr,  # [R + 1], where the places of each row start
    m,
    hidden_size,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row, for a block of channels."""
    chunks_d = tl.cdiv(hidden_size, BLOCK_D)
    pid = tl.program_id(0)
    row = (pid // chunks_d).to(tl.int64)
    d = axis((pid % chunks_d) * BLOCK_D, hidden_size, BLOCK_D)
    end = tl.load(starts_ptr + (row + 1))
    summed = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(tl.load(starts_ptr + row), end, BLOCK_N):
        n = axis(start, end, BLOCK_N)
        place = tl.load(places_ptr + n.offs, mask=n.mask, other=0)
        offs = (place // m) * grad[1] + (place % m) * grad[2]
        ptrs = grad[0] + (offs[:, None] + d.offs[None, :] * grad[3])
        summed += tl.sum(tl.load(ptrs, mask=inside(n, d), other=0.0).to(tl.float32), 0)
    tile = summed.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (row * hidden_size + d.offs), tile, mask=d.mask)
