"""Operation 1 in Triton: what a call launches (see :mod:`.forward`, :mod:`.backward`)."""

from __future__ import annotations

from typing import Any

import torch

from ept_fast.kernels.reconstruct.backward import reconstruct_backward_kernel
from ept_fast.kernels.reconstruct.config import KINDS, ROWS, Config
from ept_fast.kernels.reconstruct.core import reconstruct_reduce_kernel
from ept_fast.kernels.reconstruct.forward import (
    reconstruct_attend_kernel,
    reconstruct_forward_kernel,
)
from ept_fast.kernels.runtime import Add, Operand, Plan
from ept_fast.kernels.sizes import ceil_div
from ept_fast.ops.types import Flags, Parameters, Saved

__all__ = ["backward", "forward", "saved"]


def saved(add: Add, parameters: Parameters) -> Saved:
    """What the backward needs, made by ``add(shape, dtype)``."""
    return Saved(*(add(shape, torch.float32) for shape in Saved.shapes(parameters)))


def _of(parameters: Any, flags: Flags) -> tuple[Any, ...]:
    """Sizes, numbers and parameters as the kernels take them (see :class:`.core.Task`)."""
    _, m, n, r, spaces, dim, d = parameters.sizes()
    dims = spaces * dim
    sizes = (m, n, r, spaces, dim, dims, dims + spaces, d)
    tensors = [None if t is None else (t, *t.stride()) for t in parameters]
    if tensors[3] is not None:
        down, task, k, i, j = tensors[3]
        tensors[3] = (down, task, k, j, i)
    return (*sizes, flags.scaling, d**-0.5, flags.temperature, *tensors)


def _options(width: int, core: bool = False, expand: bool = True) -> dict[str, int]:
    """The compiler's.

    Accesses that are not aligned take more registers, and so does the whole backward in one
    program; its core takes 8 warps.
    """
    most = 255 if width % 16 or (core and expand) else 168
    return {"num_warps": 8 if core else 4, "maxnreg": most}


def _products(
    plan: Plan, config: Config, of: tuple[Any, ...], tasks: int, rows: int, columns: int
) -> tuple[Any, ...]:
    """The products over d as the kernels take them; their launch, if they have one.

    ``of``: as :func:`_of`, with what is multiplied in the places of P, B, D and G.
    """
    m, d = of[0], of[7]
    columns = ceil_div(columns, 16) * 16  # rows begin at multiples of 16 bytes
    blocks = ceil_div(m, ROWS) + ceil_div(rows - m, ROWS)
    splits = max(1, config.splits)
    sums = (plan.scratch((tasks, splits, rows, columns)), rows, columns, blocks)
    if config.splits:
        programs = tasks * blocks * splits
        plan.launch(
            reconstruct_reduce_kernel, programs, sums, of, splits, config.steps, **_options(d)
        )
        return (*sums[:3], None)
    return sums


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
    tasks, m, _, r, spaces, dim, d = measures = parameters.sizes()
    has_offset, has_spaces = parameters.has_offset, parameters.has_spaces
    prompt = flags.gate == "prompt"
    config = sizes(*measures, has_spaces and prompt)
    options = _options(d)
    of = _of(parameters, flags)
    kept = saved(add, parameters)
    factors = (*of[:12], None, *of[13:15], None, of[16], None)
    rows = m + r if has_offset and has_spaces else m
    sums = _products(plan, config, factors, tasks, rows, r + spaces * dim + spaces)
    splits, n_splits = max(1, config.splits), config.n_splits
    parts = None
    blocks = tasks * ceil_div(m, ROWS)
    if n_splits:
        shape = (tasks, n_splits, m)
        parts = (plan.scratch(shape), plan.scratch(shape), plan.scratch((*shape, r)))
        plan.launch(
            reconstruct_attend_kernel,
            blocks * n_splits,
            sums,
            kept.query,
            parts,
            of,
            splits,
            n_splits,
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
        of,
        splits,
        n_splits,
        config.d_tiles,
        ACTIVATION=flags.activation,
        PROMPT=prompt,
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
    tasks, m, _, r, spaces, dim, d = measures = parameters.sizes()
    config = sizes(*measures)
    of = _of(parameters, flags)
    y = (grad, *grad.stride())
    factors = (*of[:11], y, None, of[13], of[15], None, None, None)
    sums = _products(plan, config, factors, tasks, m, r + spaces * dim)
    parts = max(1, config.n_splits)
    work = (
        plan.scratch((tasks, m, spaces * dim + spaces)),
        plan.scratch((tasks, m, spaces)),
        plan.scratch((tasks, m, r)),
        plan.scratch((tasks, m)),
        plan.scratch((tasks, parts, m, r)),
    )
    for core, expand in [(True, False), (False, True)] if config.n_splits else [(True, True)]:
        pieces = config.chunks
        if not (core and expand):
            pieces = config.n_splits if core else KINDS * config.chunks
        plan.launch(
            reconstruct_backward_kernel,
            tasks * pieces,
            tuple(into),
            halves,
            work,
            sums,
            tuple(kept),
            y,
            of,
            max(1, config.splits),
            parts,
            pieces,
            config.n_tiles,
            config.d_tiles,
            CORE=core,
            EXPAND=expand,
            ACTIVATION=flags.activation,
            PROMPT=flags.gate == "prompt",
            **_options(d, core, expand),
        )
