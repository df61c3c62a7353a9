"""Operation 2 in Triton: the prompt before the text, the low-rank offset onto its real tokens.

    out[b, j]     = P'[t, j]                            j < m, t the task of row b
    out[b, m + s] = e[b, s] + c·A[t, pos(b, s)]·B[t]    where the token is real, else e[b, s]

pos(b, s) is the number of real tokens before column s of row b, counted from the mask. With
``prompt_rows`` out[b, j] is the row of the prompt that they name for it, or 0 for -1.

With a mask or task ids, one small launch writes the plan (:mod:`.plan`) that forward and backward
go by; the forward is one launch more (:mod:`.forward`), the backward two (:mod:`.backward`), and
one for the gradient of gathered rows (:mod:`.gather`). A row whose task id is not in the bank is
NaN, as is a token whose id or row is not in its table: none of them is read. Here the launches are
described to a plan (:mod:`ept_fast.backends.triton.runtime`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton

from ept_fast.kernels.splice.backward import splice_backward_kernel, splice_finish_kernel
from ept_fast.kernels.splice.config import gather_options, plan_options
from ept_fast.kernels.splice.forward import splice_forward_kernel
from ept_fast.kernels.splice.gather import splice_gather_backward_kernel
from ept_fast.kernels.splice.plan import splice_plan_kernel
from ept_fast.kernels.tiles import terms_of, with_strides
from ept_fast.ops.types import SpliceGrads, SpliceInputs

if TYPE_CHECKING:
    from ept_fast.backends.triton.runtime import Add, Operand, Plan

__all__ = ["backward", "forward", "gather_backward", "kept"]

_BLOCK = 512  # elements that a program of the finish adds up


class _Sum(NamedTuple):
    """A gradient: of a task's ``size`` elements the first ``made`` are sums over its rows.

    They are ``put`` in so many parts; 0: where they belong.
    """

    out: Any
    put: Any
    size: int
    made: int
    parts: int


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


def _offset(inputs: Any, there: bool) -> tuple[Any, int]:
    """A and B as a kernel takes them, and how many bfloat16 numbers add up to one of theirs."""
    a, b = inputs.offset_a, inputs.offset_b
    if not there:
        return None, 1
    return (with_strides(a), with_strides(b)), max(terms_of(a.dtype), terms_of(b.dtype))


def forward(
    plan: Plan, inputs: Any, scaling: float, add: Add, sizes: Any, with_places: bool
) -> None:
    """Describe the forward: it returns ``[B, m + S, d]`` in the text's type.

    ``inputs`` are :class:`SpliceInputs` of operands; ``scaling`` is c; ``add`` makes the tensors
    that the backward goes by; ``sizes`` chooses the launch sizes. ``with_places``: also returned
    are the mask, in its type or int64, and the positions of prompt and text in int64, ``[B, m+S]``.
    """
    source, ids, task_ids = inputs.source, inputs.input_ids, inputs.task_ids
    batch, length = inputs.text.shape[:2]
    m, (tasks, count, width) = inputs.num_tokens, inputs.prompt.shape
    out = plan.returned((batch, m + length, width), source.dtype)
    tables, mask = kept(add, inputs, batch, length), inputs.attention_mask
    places = None
    if with_places:
        kinds = (torch.int64 if mask is None else mask.dtype, torch.int64)
        places = tuple(plan.returned((batch, m + length), kind) for kind in kinds)
    counted, filled = (None, places) if mask is None else (places, None)
    if out.numel() == 0:
        return
    if counted or any(table is not None for table in tables):
        given = (counted, with_strides(mask), with_strides(task_ids), batch, m, length, tasks)
        options = plan_options(batch, length)
        plan.launch(splice_plan_kernel, batch, tables, *given, **options)
    has_offset = _has_offset(inputs, length)
    offset, terms = _offset(inputs, has_offset)
    rank = inputs.offset_a.shape[2] if has_offset else 0
    config = sizes(batch, length, m, width, rank, task_ids is not None, source.dtype)
    blocks = triton.cdiv(m, config.block_s) + triton.cdiv(length, config.block_s)
    blocks *= triton.cdiv(width, config.block_d) * triton.cdiv(batch, config.rows)
    # A table lies in the same place for all rows.
    embeds = with_strides(source) if ids is None else (source, 0, *source.stride())
    rows = with_strides(inputs.prompt_rows)
    rows = rows and (*rows, count)
    tensors = (with_strides(out), with_strides(inputs.prompt), rows, (with_strides(ids), embeds))
    numbers = (scaling, batch, length, tasks, (m, width, rank, source.shape[0]))
    rest = (offset, tables, filled, *numbers)
    options = {"TILES_R": triton.cdiv(rank, config.block_r), "TERMS": terms, **config.options()}
    plan.launch(splice_forward_kernel, blocks, *tensors, *rest, **options)


def backward(
    plan: Plan, grad: Operand, inputs: Any, scaling: float, add: Add, into: SpliceGrads, sizes: Any
) -> None:
    """Describe the backward: sums over the rows' gradients, each element read once.

    ``grad`` is the output's, ``[B, m + S, d]``; ``inputs`` are :class:`SpliceInputs` of operands,
    of which the text is not needed; ``scaling`` is c; ``add`` finds the tensors that the forward
    has made; the gradients go ``into`` these, if not None; ``sizes`` chooses the launch sizes.
    """
    batch, total, width = grad.shape
    tasks, m = inputs.prompt.shape[0], inputs.num_tokens
    length = total - m
    tables = kept(add, inputs, batch, length)
    by_slot = inputs.task_ids is not None and tasks > batch
    groups = 1 if inputs.task_ids is None else min(batch, tasks)
    d_p, d_a, d_b = into
    need_p = d_p is not None and d_p.numel() > 0
    need_o = d_a is not None and d_a.numel() + d_b.numel() > 0
    sum_p, sum_o = need_p and batch > 0, need_o and batch > 0 and length > 0
    n, rank = inputs.offset_a.shape[1:] if need_o else (0, 0)
    kind = torch.float32
    if sum_o:
        kind = torch.promote_types(inputs.offset_a.dtype, inputs.offset_b.dtype)
    config = sizes(batch, length, m if sum_p else 0, width, rank, tasks, kind)
    chunks_b = triton.cdiv(batch, config.rows)
    chunks_s = triton.cdiv(length, config.block_s * config.tiles)
    chunks_d = triton.cdiv(width, config.block_d * config.tiles_d)
    sums = []
    for out, size, made, parts, adds in (
        (d_p, m * width, sum_p * m * width, chunks_b, False),
        (d_a, n * rank, sum_o * length * rank, chunks_b * chunks_d, config.tiles_d > 1),
        (d_b, rank * width, sum_o * rank * width, chunks_b * chunks_s, False),
    ):
        # What is in one part is written where it belongs, unless a program adds to it.
        whole = parts == 1 and not adds
        put = plan.scratch((groups * parts, made)) if made and not whole else out
        sums.append(_Sum(out, put, size, made, 0 if whole else parts))
    if sum_p or sum_o:
        blocks = sum_p * triton.cdiv(m, config.block_s) + sum_o * chunks_s
        blocks *= groups * chunks_b * chunks_d
        offset, terms = _offset(inputs, sum_o)
        where = tuple((s.put, s.size) if s.made else None for s in sums)
        strides = tuple(s.made if s.parts else None for s in sums)
        tensors = (with_strides(grad), where, strides, offset)
        read = tables if sum_o else (*tables[:2], None, None)
        numbers = (scaling, batch, length, tasks, (m, width, rank))
        terms_g = terms_of(grad.dtype) if config.rows == 1 else 3  # of a sum of gradients
        options = {"TERMS_G": terms_g, "TERMS": terms, **config.options()}
        plan.launch(splice_backward_kernel, blocks, *tensors, read, *numbers, **options)
    # What the first launch has written whole needs the second one only for its zeros.
    rest_p, *rest_o = (s.parts > 0 or by_slot or s.made < s.size for s in sums)
    finish = (need_p and rest_p, need_o and any(rest_o), need_o and any(rest_o))
    ends = tuple(s[:2] if each else None for s, each in zip(sums, finish, strict=True))
    blocks = sum(each * triton.cdiv(s.size, _BLOCK) for s, each in zip(sums, finish, strict=True))
    ends_of = (batch, *(s.size for s in sums), *(s.made for s in sums), *(s.parts for s in sums))
    options = {"BLOCK": _BLOCK, "BLOCK_B": 128, "num_warps": 4}
    slots = tables[0] if by_slot else None
    plan.launch(splice_finish_kernel, tasks * blocks, ends, slots, *ends_of, **options)


def gather_backward(
    plan: Plan, grad: Operand, out: Operand, places: Operand, starts: Operand, m: int
) -> None:
    """Describe the sums over the places of gathered rows (:mod:`.gather`), into ``out``."""
    _, count, width = out.shape
    options = gather_options(width)
    blocks = count * triton.cdiv(width, options["BLOCK_D"])
    given = (with_strides(grad), out, places, starts, m, width)
    plan.launch(splice_gather_backward_kernel, blocks, *given, **options)
