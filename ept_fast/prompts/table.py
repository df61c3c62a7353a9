"""The offset of a folded prompt as a table, and when one is worth its memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ept_fast.checks import check_splice, constant, values_are_checked
from ept_fast.ops import dispatch
from ept_fast.ops.splice import splice
from ept_fast.ops.types import SpliceInputs
from ept_fast.precision import accumulation_dtype

__all__ = ["offset_table", "splice_table", "table_pays"]

_MOST_BYTES = 64 << 20  # of a table that nobody asked for


@torch.no_grad()
def offset_table(
    offset_a: Tensor, offset_b: Tensor, scaling: float, dtype: torch.dtype | None = None
) -> Tensor:
    """c·A·B, ``[(T,) n, d]``, rounded once, to ``dtype`` (default: the type of B)."""
    wide = accumulation_dtype(offset_a, offset_b)
    with torch.autocast(offset_a.device.type, enabled=False):
        table = (offset_a.to(wide) * scaling) @ offset_b.to(wide)
    return table.to(offset_b.dtype if dtype is None else dtype)


def table_pays(prompt: Tensor, offset_a: Tensor, itemsize: int, backend: str | None) -> bool:
    """Whether ``offset="auto"`` takes the table.

    On a CPU with the ``eager`` backend, up to 64 MiB: there a row of the table is read faster than
    it is computed from A and B. The GPU backends compute a tile of the offset once for all rows of
    a batch, within the one launch that writes the output, and read less for it.

    Args:
        prompt: P′, ``[(T,) m, d]``.
        offset_a: A, ``[(T,) n, r]``.
        itemsize: bytes of an element of the table.
        backend: the prompt's choice.
    """
    size = offset_a.shape[:-1].numel() * prompt.shape[-1] * itemsize
    on_host = prompt.device.type == "cpu" and size <= _MOST_BYTES
    return on_host and dispatch.select(backend, SpliceInputs(prompt)) == "eager"


def splice_table(
    prompt: Tensor,
    *,
    table: Tensor,
    input_ids: Tensor | None,
    weight: Tensor | None,
    inputs_embeds: Tensor | None,
    offset_a: Tensor | None,
    offset_b: Tensor | None,
    scaling: float,
    attention_mask: Tensor | None,
    task_ids: Tensor | None,
) -> Tensor:
    """As :func:`ept_fast.splice_prompt`, the offsets read from a table of them in plain PyTorch.

    Args:
        prompt: P′, ``[(T,) m, d]``.
        table: c·A·B, ``[(T,) n, d]``.
        input_ids, weight, inputs_embeds, attention_mask, task_ids: as there.
        offset_a, offset_b, scaling: what the table was made from; arguments are checked by them.
    """
    inputs = SpliceInputs(
        prompt, input_ids, weight, inputs_embeds, offset_a, offset_b, attention_mask, task_ids
    )
    check_splice(inputs, constant(scaling))
    if values_are_checked(prompt.device):  # by the operator, in compiled code too
        bank = prompt.dim() == 3
        return splice(
            inputs._replace(
                prompt=prompt if bank else prompt.unsqueeze(0),
                weight=None if weight is None else weight.detach(),
                offset_a=table if bank else table.unsqueeze(0),
                offset_b=None,
            ),
            1.0,
            "eager",
        )
    if inputs_embeds is not None:
        text = inputs_embeds
    else:
        assert input_ids is not None
        assert weight is not None
        text = F.embedding(input_ids, weight.detach())
    batch, length, _ = text.shape
    head = prompt.expand(batch, *prompt.shape) if task_ids is None else prompt[task_ids]
    out = torch.cat([head.to(text.dtype), text], dim=1)
    body = out[:, head.shape[1] :]
    if attention_mask is None:
        body += table[:length] if task_ids is None else table[task_ids, :length]
        return out
    real = attention_mask != 0
    rank = (real.cumsum(1) - 1).clamp_min(0)
    offset = table[rank] if task_ids is None else table[task_ids.unsqueeze(1), rank]
    body += offset.masked_fill(~real.unsqueeze(-1), 0)
    return out
