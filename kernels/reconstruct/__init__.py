"""Operation 1 in Triton: what a call launches (see :mod:`.forward`, :mod:`.backward`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton

from ept_fast.kernels.reconstruct.backward import reconstruct_backward_kernel
from ept_fast.kernels.reconstruct.config import KINDS, ROWS, Config
from ept_fast.kernels.reconstruct.core import reconstruct_reduce_kernel
from ept_fast.kernels.reconstruct.forward import (
    reconstruct_attend_kernel,
    reconstruct_forward_kernel,
)
from ept_fast.kernels.tiles import with_strides
from ept_fast.ops.types import Flags, Parameters, Saved

if TYPE_CHECKING:
    from ept_fast.backends.triton.runtime import Add, Operand, Plan

__all__ = ["backward", "forward", "saved"]


def saved(add: Add, parameters: Parameters) -> Saved:
    """What the backward needs, made by ``add(shape, dtype)``."""
    return Saved(*(add(shape, torch.float32) for shape in Saved.shapes(parameters)))


def _given(parameters: Any, flags: Flags) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Sizes and numbers, and the parameters, as the kernels take them (see :class:`.core.Task`)."""
    _, m, n, r, spaces, dim, d = parameters.sizes()
    dims = spaces * dim
    width = dims + spaces if parameters.has_gate else dims
    numbers = (m, n, r, spaces, dim, dims, width, d)
    p, a, b, down, *others = map(with_strides, parameters)
    down = down and (*down[:3], down[4], down[3])
    return (*numbers, flags.scaling, d**-0.5, flags.temperature), (p, a, b, down, *others)


def _options(width: int, core: bool = False, expand: bool = True) -> dict[str, int]:
    """The compiler's.

    Accesses that are not aligned take more registers, and so does the whole backward in one
    program; its core takes 8 warps.
    """
    most = 255 if width % 16 or (core and expand) else 168
    return {"num_warps": 8 if core else 4, "maxnreg": most}


def _products(
    plan: Plan,
    config: Config,
    numbers: tuple[Any, ...],
    factors: tuple[Any, ...],
    tasks: int,
    rows: int,
    columns: int,
) -> tuple[tuple[Any, ...], int]:
    """The products over d and the number of their parts; launched, if by a launch of their own.

    ``factors``: P, B, D and G, or what is in their places.
    """
    p, b, down, gate = factors
    of = (*numbers, p, None, b, down, None, gate, None, None, None)
    m, d = numbers[0], numbers[7]
    columns = triton.cdiv(columns, 16) * 16  # rows begin at multiples of 16 bytes
    splits = max(1, config.splits)
    blocks = triton.cdiv(m, ROWS) + triton.cdiv(rows - m, ROWS)
    sums = (plan.scratch((tasks, splits, rows, columns)), rows, columns, blocks)
    if not config.splits:
        return sums, splits
    arguments = (sums, of, splits, config.steps, rows > m)
    plan.launch(reconstruct_reduce_kernel, tasks * blocks * splits, *arguments, **_options(d))
    return (*sums[:3], None), splits


def forward(plan: Plan, parameters: Any, flags: Flags, out: Operand, add: Add, sizes: Any) -> None:
    """Describe the forward, with an offset or subspaces, for :class:`Parameters` of operands.

    P′ ``[T, m, d]`` goes to ``out``; ``add`` makes what the backward needs, as for :func:`saved`;
    ``sizes`` chooses the launch sizes.
    """
    tasks, m, _, r, spaces, dim, d = measures = parameters.sizes()
    prompt = flags.gate == "prompt" and (parameters.has_gate or not parameters.has_spaces)
    config = sizes(*measures, parameters.has_gate and prompt)
    numbers, tensors = _given(parameters, flags)
    p, _, b, down, _, gate, *_ = tensors
    of = (*numbers, *tensors)
    kept = saved(add, parameters)
    rows = m + r if parameters.has_spaces else m
    columns = r + spaces * dim + spaces
    sums, splits = _products(plan, config, numbers, (p, b, down, gate), tasks, rows, columns)
    blocks, options = tasks * triton.cdiv(m, ROWS), _options(d)
    parts = None
    if n_splits := config.n_splits:
        shape = (tasks, n_splits, m)
        parts = (plan.scratch(shape), plan.scratch(shape), plan.scratch((*shape, r)))
        first = (sums, kept.query, parts, of, splits, n_splits, config.n_tiles)
        plan.launch(reconstruct_attend_kernel, blocks * n_splits, *first, **options)
    second = (out, tuple(kept), plan.scratch((tasks, m, spaces)), sums, parts, of)
    given = (*second, splits, n_splits, config.d_tiles)
    flags_of = {"ACTIVATION": flags.activation, "PROMPT": prompt}
    plan.launch(reconstruct_forward_kernel, blocks * config.chunks, *given, **flags_of, **options)


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
    """Describe the backward, with an offset or subspaces, for :class:`Parameters` of operands.

    Y = dL/dP′ ``[T, m, d]`` is ``grad``; ``kept`` is a contiguous :class:`Saved`; the gradients go
    ``into`` :class:`Parameters`, where ``halves`` in float32 are added to those of A and B before
    these are rounded.
    """
    tasks, m, _, r, spaces, dim, d = measures = parameters.sizes()
    config = sizes(*measures)
    numbers, tensors = _given(parameters, flags)
    y = with_strides(grad)
    _, _, b, _, up, gate, _, _, up_bias = tensors
    columns, turned = r + spaces * dim, None
    if gate is not None and up_bias is not None:
        columns, turned = columns + spaces, (*up_bias[:2], up_bias[3], up_bias[2])
    sums, splits = _products(plan, config, numbers, (y, b, up, turned), tasks, m, columns)
    pieces, chunks = config.n_splits, config.chunks
    parts = max(1, pieces)
    shapes = ((m, spaces * dim + spaces), (m, spaces), (m, r), (m,), (parts, m, r))
    work = tuple(plan.scratch((tasks, *shape)) for shape in shapes)
    tensors = (tuple(into), halves, work, sums, tuple(kept), y, (*numbers, *tensors))
    both = [(True, True, chunks)]
    each = [(True, False, pieces), (False, True, KINDS * chunks)]
    flags_of = {"ACTIVATION": flags.activation, "PROMPT": flags.gate == "prompt"}
    for core, expand, programs in each if pieces else both:
        given = (*tensors, splits, parts, programs, config.n_tiles, config.d_tiles)
        options = {"CORE": core, "EXPAND": expand, **flags_of, **_options(d, core, expand)}
        plan.launch(reconstruct_backward_kernel, tasks * programs, *given, **options)
