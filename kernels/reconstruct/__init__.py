"""Operation 1 in Triton: what a call launches (see :mod:`.forward`, :mod:`.backward`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ept_fast.kernels.reconstruct.backward import reconstruct_backward_kernel
from ept_fast.kernels.reconstruct.config import ROWS
from ept_fast.kernels.reconstruct.core import reconstruct_reduce_kernel
from ept_fast.kernels.reconstruct.expand import NUMBER_OF_KINDS
from ept_fast.kernels.reconstruct.forward import (
    reconstruct_attend_kernel,
    reconstruct_forward_kernel,
)
from ept_fast.kernels.sizes import ceil_div
from ept_fast.ops.types import Flags, Parameters, Saved

if TYPE_CHECKING:
    from ept_fast.backends.triton.runtime import Add, Operand, Plan

__all__ = ["backward", "forward", "saved"]


def saved(add: Add, parameters: Parameters) -> Saved:
    """What the backward needs, made by ``add(shape, dtype)``."""
    return Saved(*(add(shape, torch.float32) for shape in Saved.shapes(parameters)))


def _with_strides(tensor: Any, order: tuple[int, ...] = ()) -> Any:
    """A tensor as a kernel takes it: address and strides; None if it is absent."""
    if tensor is None:
        return None
    strides = tensor.stride()
    return (tensor, *(strides[i] for i in order or range(len(strides))))


def _options(width: int, core: bool = False, expand: bool = True) -> dict[str, int]:
    """The compiler's.

    Accesses that are not aligned take more registers, and so does the whole backward in one
    program; its core takes 8 warps.
    """
    most = 255 if width % 16 or (core and expand) else 168
    return {"num_warps": 8 if core else 4, "maxnreg": most}


def _reduce(
    plan: Plan, sums: Operand, steps: int, sizes: tuple[int, ...], *tensors: Any, forward: bool
) -> None:
    """The products over d: [P ; B]·[Bᵀ | D | G], or Y·[Bᵀ | Uᵀ]."""
    tasks, splits, rows, columns = sums.shape
    m = sizes[0]
    blocks = ceil_div(m, ROWS) + ceil_div(rows - m, ROWS)
    plan.launch(
        reconstruct_reduce_kernel,
        tasks * blocks * splits,
        sums,
        *tensors,
        sizes,
        rows,
        columns,
        splits,
        steps,
        FORWARD=forward,
        **_options(sizes[-1]),
    )


def _padded(columns: int) -> int:
    """Columns of the products over d in memory: rows begin at multiples of 16 bytes."""
    return ceil_div(columns, 16) * 16


def forward(plan: Plan, parameters: Any, flags: Flags, out: Operand, add: Add, sizes: Any) -> None:
    """Describe the forward, with an offset or subspaces.

    Args:
        plan: to be filled.
        parameters: :class:`Parameters` of operands.
        flags: the operation's choices.
        out: where P′ ``[T, m, d]`` goes.
        add: makes what the backward needs, as :func:`saved` lists it.
        sizes: chooses the launch sizes.
    """
    tasks, m, n, r, spaces, dim, d = measures = parameters.sizes()
    has_offset, has_spaces = parameters.has_offset, parameters.has_spaces
    config = sizes(*measures, has_spaces and flags.gate == "prompt")
    metric = (m, n, r, spaces, dim, spaces * dim, spaces * dim + spaces, d)
    numbers = (flags.scaling, d**-0.5, flags.temperature)
    options = _options(d)
    kept = saved(add, parameters)
    p, a, b = map(_with_strides, parameters[:3])
    up, gate, bias = map(_with_strides, parameters[4:])
    down = _with_strides(parameters.space_down, (0, 1, 3, 2))

    rows = m + r if has_offset and has_spaces else m
    columns = _padded(r + spaces * dim + spaces)
    splits = max(1, config.splits)
    sums = plan.scratch((tasks, splits, rows, columns))
    if config.splits:
        _reduce(plan, sums, config.steps, metric, p, b, down, gate, forward=True)
    parts = None
    blocks = tasks * ceil_div(m, ROWS)
    if config.n_splits:
        shape = (tasks, config.n_splits, m)
        parts = (plan.scratch(shape), plan.scratch(shape), plan.scratch((*shape, r)))
        plan.launch(
            reconstruct_attend_kernel,
            blocks * config.n_splits,
            sums,
            kept.query,
            parts,
            p,
            a,
            metric,
            numbers,
            rows,
            columns,
            splits,
            config.n_splits,
            config.n_tiles,
            **options,
        )
    plan.launch(
        reconstruct_forward_kernel,
        blocks * config.chunks,
        out,
        tuple(kept),
        plan.scratch((tasks, m, spaces)),
        sums,
        parts,
        p,
        a,
        b,
        down,
        up,
        gate,
        bias,
        metric,
        numbers,
        rows,
        columns,
        splits,
        config.n_splits,
        config.d_tiles,
        REDUCED=config.splits > 0,
        ACTIVATION=flags.activation,
        PROMPT=flags.gate == "prompt",
        **options,
    )


def backward(
    plan: Plan,
    grad: Operand,
    parameters: Any,
    flags: Flags,
    kept: Any,
    into: Any,
    halves: tuple[Operand, Operand] | None,
    sizes: Any,
) -> None:
    """Describe the backward, with an offset or subspaces.

    Args:
        plan: to be filled.
        grad: Y = dL/dP′ ``[T, m, d]``.
        parameters: :class:`Parameters` of operands.
        flags: the operation's choices.
        kept: :class:`Saved` of operands, contiguous.
        into: :class:`Parameters` of operands, where the gradients go.
        halves: float32, what is added to the gradients of A and B before they are rounded.
        sizes: chooses the launch sizes.
    """
    tasks, m, n, r, spaces, dim, d = measures = parameters.sizes()
    config = sizes(*measures)
    metric = (m, n, r, spaces, dim, spaces * dim, spaces * dim + spaces, d)
    numbers = (flags.scaling, d**-0.5, flags.temperature)
    y, p, a, b = map(_with_strides, (grad, *parameters[:3]))
    up, gate = map(_with_strides, parameters[4:6])
    down = _with_strides(parameters.space_down, (0, 1, 3, 2))

    columns = _padded(r + spaces * dim)
    splits = max(1, config.splits)
    parts = config.pieces if config.core else 1
    sums = plan.scratch((tasks, splits, m, columns))
    work = (
        plan.scratch((tasks, m, spaces * dim + spaces)),
        plan.scratch((tasks, m, spaces)),
        plan.scratch((tasks, m, r)),
        plan.scratch((tasks, m)),
        plan.scratch((tasks, parts, m, r)),
    )
    if config.splits:
        _reduce(plan, sums, config.steps, metric, y, b, up, None, forward=False)
    for core, expand in [(True, False), (False, True)] if config.core else [(True, True)]:
        pieces = config.pieces if core else NUMBER_OF_KINDS * config.chunks
        plan.launch(
            reconstruct_backward_kernel,
            tasks * pieces,
            tuple(into),
            halves,
            work,
            sums,
            tuple(kept),
            y,
            p,
            a,
            b,
            down,
            up,
            gate,
            metric,
            numbers,
            columns,
            splits,
            parts,
            pieces,
            config.n_tiles,
            config.d_tiles,
            REDUCED=config.splits > 0,
            CORE=core,
            EXPAND=expand,
            ACTIVATION=flags.activation,
            PROMPT=flags.gate == "prompt",
            **_options(d, core, expand),
        )
