"""Operation 2 in Triton: the prompt before the text, the low-rank offset onto its real tokens.

    out[b, j]     = P'[t, j]                            j < m, t the task of row b
    out[b, m + s] = e[b, s] + c·A[t, pos(b, s)]·B[t]    where the token is real, else e[b, s]

pos(b, s) is the number of real tokens before column s of row b, counted from the mask.

With a mask or task ids, one small launch writes the plan (:mod:`.plan`) that forward and backward
go by; the forward is one launch more (:mod:`.forward`), the backward two (:mod:`.backward`,
:mod:`.finish`). A row whose task id is not in the bank is NaN, as is a token whose id is not in the
table: neither is read.

This file is the host code: it describes the launches to a plan
(:mod:`ept_fast.backends.triton.runtime`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ept_fast.kernels.sizes import ceil_div
from ept_fast.kernels.splice.backward import splice_backward_kernel
from ept_fast.kernels.splice.config import plan_config, terms_of_sum
from ept_fast.kernels.splice.finish import splice_finish_kernel
from ept_fast.kernels.splice.forward import splice_forward_kernel
from ept_fast.kernels.splice.plan import splice_plan_kernel
from ept_fast.kernels.tiles import terms_of
from ept_fast.ops.types import SpliceInputs

if TYPE_CHECKING:
    from ept_fast.backends.triton.runtime import Add, Operand, Plan

__all__ = ["Gradients", "backward", "forward", "kept"]

_FINISH_BLOCK = 512


class _Rows(NamedTuple):
    """What is known of the batch's rows: the plan's tables, and how their groups go."""

    table: Any
    columns: Any
    has_mask: bool
    has_tasks: bool
    by_row: bool
    tasks: int
    groups: int

    def flags(self) -> dict[str, bool]:
        return {
            "HAS_MASK": self.has_mask,
            "HAS_TASKS": self.has_tasks,
            "BY_ROW": self.by_row,
        }


def _offset(inputs: SpliceInputs, length: int) -> bool:
    a = inputs.offset_a
    return a is not None and a.shape[-1] > 0 and length > 0


def kept(add: Add, inputs: SpliceInputs, batch: int, length: int) -> _Rows:
    """The plan's tables, made by ``add(shape, dtype)`` where a call has any."""
    tasks = inputs.prompt.shape[0]
    has_tasks = inputs.task_ids is not None
    has_mask = inputs.attention_mask is not None and _offset(inputs, length)
    by_row = has_tasks and tasks > batch
    table = columns = None
    if has_mask or has_tasks:
        groups = batch if by_row else tasks + 1
        size = 2 * (batch + groups) if has_tasks else 0
        size += 3 * batch if has_mask else 0
        table = add((size,), torch.int32)
    if has_mask:
        columns = add((batch, length), torch.int32)
    groups = 1 if not has_tasks else batch if by_row else tasks
    return _Rows(table, columns, has_mask, has_tasks, by_row, tasks, groups)


def _strides(tensor: Any, number: int) -> tuple[int, ...]:
    return (0,) * number if tensor is None else tensor.stride()


def _terms(a: Any, b: Any) -> int:
    """How many bfloat16 numbers add up to one of A or B."""
    return 1 if a is None else max(terms_of(a.dtype), terms_of(b.dtype))


def forward(plan: Plan, inputs: Any, scaling: float, add: Add, sizes: Any) -> None:
    """Describe the forward: it returns ``[B, m + S, d]`` in the text's type.

    Args:
        plan: to be filled.
        inputs: :class:`SpliceInputs` of operands.
        scaling: c.
        add: makes the tensors that the backward goes by.
        sizes: chooses the launch sizes.
    """
    source = inputs.source
    batch, length = inputs.text.shape[:2]
    _, m, width = inputs.prompt.shape
    out = plan.returned((batch, m + length, width), source.dtype)
    rows = kept(add, inputs, batch, length)
    if out.numel() == 0:
        return
    has_offset = _offset(inputs, length)
    rank = inputs.offset_a.shape[2] if has_offset else 0
    a: Any = inputs.offset_a if has_offset else None
    b: Any = inputs.offset_b if has_offset else None
    if rows.table is not None:
        mask = inputs.attention_mask if rows.has_mask else None
        plan.launch(
            splice_plan_kernel,
            max(batch, rows.tasks + 1) if rows.has_tasks and not rows.by_row else batch,
            rows.table,
            rows.columns,
            mask,
            inputs.task_ids,
            batch,
            length,
            rows.tasks,
            *_strides(mask, 2),
            *_strides(inputs.task_ids, 1),
            **rows.flags(),
            **plan_config(batch, length).options(),
        )
    config = sizes(batch, length, m, width, rank, rows.has_tasks, source.dtype)
    blocks = ceil_div(m, config.block_s) + ceil_div(length, config.block_s)
    plan.launch(
        splice_forward_kernel,
        ceil_div(batch, config.rows) * blocks * ceil_div(width, config.block_d),
        out,
        inputs.prompt,
        inputs.input_ids,
        source,
        a,
        b,
        rows.table,
        rows.columns,
        scaling,
        batch,
        length,
        rows.tasks,
        m,
        width,
        source.shape[0],
        rank,
        *inputs.prompt.stride(),
        *_strides(inputs.input_ids, 2),
        *(source.stride() if inputs.input_ids is None else (0, *source.stride())),
        *_strides(a, 3),
        *_strides(b, 3),
        HAS_IDS=inputs.input_ids is not None,
        HAS_OFFSET=has_offset,
        TERMS=_terms(a, b),
        **rows.flags(),
        **config.options(),
    )


class Gradients(NamedTuple):
    """Of prompt, offset_a and offset_b; None where not needed."""

    prompt: Any
    offset_a: Any
    offset_b: Any


def backward(
    plan: Plan,
    grad: Operand,
    inputs: Any,
    scaling: float,
    add: Add,
    into: Gradients,
    sizes: Any,
) -> None:
    """Describe the backward: sums over the rows' gradients, each element read once.

    Args:
        plan: to be filled.
        grad: of the output, ``[B, m + S, d]``.
        inputs: :class:`SpliceInputs` of operands; the text itself is not needed.
        scaling: c.
        add: finds the tensors that the forward has made, in their order.
        into: where the gradients go; None where not needed.
        sizes: chooses the launch sizes.
    """
    batch, total, width = grad.shape
    tasks, m, _ = inputs.prompt.shape
    length = total - m
    rows = kept(add, inputs, batch, length)
    d_p, d_a, d_b = into
    need_p = d_p is not None and d_p.numel() > 0
    need_o = d_a is not None and d_b is not None and d_a.numel() + d_b.numel() > 0
    sum_p, sum_o = need_p and batch > 0, need_o and batch > 0 and length > 0
    a: Any = inputs.offset_a if sum_o else None
    b: Any = inputs.offset_b if sum_o else None
    rank = inputs.offset_a.shape[2] if need_o else 0
    kind = torch.float32 if a is None else torch.promote_types(a.dtype, b.dtype)
    config = sizes(batch, length, m, width, rank, tasks, kind, sum_p, sum_o)
    chunks_b = ceil_div(batch, config.rows) if batch else 0
    chunks_s = ceil_div(length, config.block_s * config.tiles)
    chunks_d = ceil_div(width, config.block_d * config.tiles_d)
    parts_p, parts_a, parts_b = chunks_b, chunks_b * chunks_d, chunks_b * chunks_s
    whole_a = parts_a == 1 and config.tiles_d == 1
    size_p, size_b = m * width, rank * width
    size_a = inputs.offset_a.shape[1] * rank if need_o else 0
    covered_a, covered_b = (length * rank, size_b) if sum_o else (0, 0)
    part_p, part_a, part_b = into
    if sum_p and parts_p > 1:
        part_p = plan.scratch((rows.groups * parts_p, size_p))
    if sum_o and not whole_a:
        part_a = plan.scratch((rows.groups * parts_a, covered_a))
    if sum_o and parts_b > 1:
        part_b = plan.scratch((rows.groups * parts_b, size_b))
    if sum_p or sum_o:
        blocks = (ceil_div(m, config.block_s) if sum_p else 0) + (chunks_s if sum_o else 0)
        mask = rows.has_mask and sum_o
        plan.launch(
            splice_backward_kernel,
            rows.groups * chunks_b * blocks * chunks_d,
            grad,
            part_p if sum_p else None,
            part_a if sum_o else None,
            part_b if sum_o else None,
            a,
            b,
            rows.table if mask or rows.has_tasks else None,
            rows.columns if mask else None,
            scaling,
            batch,
            length,
            rows.tasks,
            m,
            width,
            rank,
            *grad.stride(),
            size_p,
            size_a if whole_a else covered_a,
            size_b,
            *_strides(a, 3),
            *_strides(b, 3),
            HAS_PROMPT=sum_p,
            HAS_OFFSET=sum_o,
            WHOLE_P=parts_p == 1,
            WHOLE_A=whole_a,
            WHOLE_B=parts_b == 1,
            TERMS_G=terms_of_sum(grad.dtype, config.rows),
            TERMS=_terms(a, b),
            **{**rows.flags(), "HAS_MASK": mask},
            **config.options(),
        )
    # What the first launch has written whole needs the second one only for its zeros.
    finish_p = need_p and (not sum_p or parts_p > 1 or rows.by_row)
    finish_o = need_o and (
        not (whole_a and parts_b == 1) or rows.by_row or covered_a < size_a or not sum_o
    )
    blocks = ceil_div(size_p, _FINISH_BLOCK) if finish_p else 0
    if finish_o:
        blocks += ceil_div(size_a, _FINISH_BLOCK) + ceil_div(size_b, _FINISH_BLOCK)
    plan.launch(
        splice_finish_kernel,
        tasks * blocks,
        d_p if finish_p else None,
        d_a if finish_o else None,
        d_b if finish_o else None,
        part_p if finish_p else None,
        part_a if finish_o else None,
        part_b if finish_o else None,
        rows.table if rows.by_row else None,
        batch,
        size_p,
        size_a,
        covered_a,
        size_b,
        covered_b,
        parts_p if parts_p > 1 else 0,
        0 if whole_a else parts_a,
        parts_b if parts_b > 1 else 0,
        HAS_PROMPT=finish_p,
        HAS_OFFSET=finish_o,
        BY_ROW=rows.by_row,
        BLOCK=_FINISH_BLOCK,
        BLOCK_B=128,
        num_warps=4,
    )
