"""Operation 2 in Triton: the prompt before the text, the low-rank offset onto its real tokens.

    out[b, j]     = P'[t, j]                            j < m, t the task of row b
    out[b, m + s] = e[b, s] + c·A[t, pos(b, s)]·B[t]    where the token is real, else e[b, s]

pos(b, s) is the number of real tokens before column s of row b, counted from the mask.

With a mask or task ids, one small launch writes the plan (:mod:`.plan`) that forward and backward
go by; the forward is one launch more (:mod:`.forward`), the backward two (:mod:`.backward`,
:mod:`.finish`). A row whose task id is not in the bank is NaN, as is a token whose id is not in the
table: neither is read.

This file is the host code: it describes the launches to a :class:`ept_fast.kernels.runtime.Plan`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ept_fast.kernels.runtime import Add, Operand, Plan
from ept_fast.kernels.sizes import ceil_div
from ept_fast.kernels.splice.backward import splice_backward_kernel
from ept_fast.kernels.splice.config import plan_options, terms_of_sum
from ept_fast.kernels.splice.finish import splice_finish_kernel
from ept_fast.kernels.splice.forward import splice_forward_kernel
from ept_fast.kernels.splice.plan import splice_plan_kernel
from ept_fast.kernels.tiles import terms_of
from ept_fast.ops.types import SpliceInputs

__all__ = ["Gradients", "backward", "forward", "kept"]

_FINISH_BLOCK = 512


def _has_offset(inputs: SpliceInputs, length: int) -> bool:
    a = inputs.offset_a
    return a is not None and a.shape[-1] > 0 and length > 0


def kept(add: Add, inputs: SpliceInputs, batch: int, length: int) -> tuple[Any, ...]:
    """The plan's tables (:mod:`.plan`), made by ``add(shape, dtype)``; None for absent ones."""
    slots = groups = spans = columns = None
    if inputs.task_ids is not None:
        slots = add((batch, 3), torch.int32)
        groups = add((min(batch, inputs.prompt.shape[0]), 3), torch.int32)
    if inputs.attention_mask is not None and _has_offset(inputs, length):
        spans = add((batch, 3), torch.int32)
        columns = add((batch, length), torch.int32)
    return slots, groups, spans, columns


def _with_strides(tensor: Any) -> Any:
    """A tensor as a kernel takes it: address and strides; None if it is absent."""
    return None if tensor is None else (tensor, *tensor.stride())


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
    source, ids = inputs.source, inputs.input_ids
    batch, length = inputs.text.shape[:2]
    tasks, m, width = inputs.prompt.shape
    out = plan.returned((batch, m + length, width), source.dtype)
    tables = kept(add, inputs, batch, length)
    if out.numel() == 0:
        return
    if any(table is not None for table in tables):
        mask, task_ids = _with_strides(inputs.attention_mask), _with_strides(inputs.task_ids)
        options = plan_options(batch, length)
        plan.launch(
            splice_plan_kernel, batch, tables, mask, task_ids, batch, length, tasks, **options
        )
    a, b = inputs.offset_a, inputs.offset_b
    if not _has_offset(inputs, length):
        a = b = None
    rank = 0 if a is None else a.shape[2]
    has_tasks = inputs.task_ids is not None
    config = sizes(batch, length, m, width, rank, has_tasks, source.dtype)
    blocks = ceil_div(m, config.block_s) + ceil_div(length, config.block_s)
    plan.launch(
        splice_forward_kernel,
        ceil_div(batch, config.rows) * blocks * ceil_div(width, config.block_d),
        _with_strides(out),
        _with_strides(inputs.prompt),
        _with_strides(ids),
        _with_strides(source) if ids is None else (source, 0, *source.stride()),
        _with_strides(a),
        _with_strides(b),
        tables,
        scaling,
        batch,
        length,
        tasks,
        (m, width, rank, source.shape[0]),
        TERMS=_terms(a, b),
        **config.options(),
    )


class Gradients(NamedTuple):
    """Of prompt, offset_a and offset_b; None where not needed."""

    prompt: Any
    offset_a: Any
    offset_b: Any


class _Sums(NamedTuple):
    """A gradient, and where the first launch puts its sums: in parts, or where they belong.

    Of a task's ``size`` elements the first ``made`` are summed, in so many parts; 0: in none.
    """

    out: Any
    put: Any
    size: int
    made: int
    parts: int

    @classmethod
    def of(cls, plan: Plan, out: Any, size: int, made: int, groups: int, parts: int) -> _Sums:
        """With memory for the parts of all groups."""
        put = plan.scratch((groups * parts, made)) if made and parts else out
        return cls(out, put, size, made, parts)

    def for_sums(self) -> Any:
        """As the first launch takes it: address, strides of the task and of the part."""
        if self.made == 0:
            return None
        return (self.put, 0, self.made) if self.parts else (self.put, self.size, 0)


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
    tables = kept(add, inputs, batch, length)
    by_slot = inputs.task_ids is not None and tasks > batch
    groups = 1 if inputs.task_ids is None else min(batch, tasks)
    d_p, d_a, d_b = into
    need_p = d_p is not None and d_p.numel() > 0
    need_o = d_a is not None and d_a.numel() + d_b.numel() > 0
    sum_p, sum_o = need_p and batch > 0, need_o and batch > 0 and length > 0
    a, b = (inputs.offset_a, inputs.offset_b) if sum_o else (None, None)
    n, rank = inputs.offset_a.shape[1:] if need_o else (0, 0)
    kind = torch.promote_types(a.dtype, b.dtype) if sum_o else torch.float32
    config = sizes(batch, length, m, width, rank, tasks, kind, sum_p, sum_o)
    chunks_b = ceil_div(batch, config.rows)
    chunks_s = ceil_div(length, config.block_s * config.tiles)
    chunks_d = ceil_div(width, config.block_d * config.tiles_d)
    # Sums in one part are written where they belong; over tiles of d they add up in float32.
    parts_p, parts_a, parts_b = (
        0 if parts == 1 else parts for parts in (chunks_b, chunks_b * chunks_d, chunks_b * chunks_s)
    )
    if config.tiles_d > 1:
        parts_a = chunks_b * chunks_d
    sums = (
        _Sums.of(plan, d_p, m * width, sum_p * m * width, groups, parts_p),
        _Sums.of(plan, d_a, n * rank, sum_o * length * rank, groups, parts_a),
        _Sums.of(plan, d_b, rank * width, sum_o * rank * width, groups, parts_b),
    )
    if sum_p or sum_o:
        blocks = sum_p * ceil_div(m, config.block_s) + sum_o * chunks_s
        plan.launch(
            splice_backward_kernel,
            groups * chunks_b * blocks * chunks_d,
            _with_strides(grad),
            *(each.for_sums() for each in sums),
            _with_strides(a),
            _with_strides(b),
            tables if sum_o else (*tables[:2], None, None),
            scaling,
            batch,
            length,
            tasks,
            (m, width, rank),
            TERMS_G=terms_of_sum(grad.dtype, config.rows),
            TERMS=_terms(a, b),
            **config.options(),
        )
    # What the first launch has written whole needs the second one only for its zeros.
    rest_p, *rest_o = (each.parts or by_slot or each.made < each.size for each in sums)
    finish_p, finish_o = need_p and rest_p, need_o and any(rest_o)
    ends = [
        (each.out, each.put, each.size) if finish else None
        for each, finish in zip(sums, (finish_p, finish_o, finish_o), strict=True)
    ]
    plan.launch(
        splice_finish_kernel,
        tasks * sum(ceil_div(end[2], _FINISH_BLOCK) for end in ends if end),
        *ends,
        tables[0] if by_slot else None,
        batch,
        *(each.made for each in sums),
        *(each.parts for each in sums),
        BLOCK=_FINISH_BLOCK,
        BLOCK_B=128,
        num_warps=4,
    )
