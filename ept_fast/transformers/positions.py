"""The offset of a prompt inside a copy of the backbone's table of positions.

A model with learned absolute positions adds a row of its table to the embedding of every token. A
text's token of rank p stands at position m + p, whatever the padding, and has the offset c·A[p]·B.
So the sum of both can stand in the table, and the offset costs nothing more at run time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ept_fast.precision import accumulation_dtype
from ept_fast.prompts.table import offset_table
from ept_fast.transformers.backbone import Profile

__all__ = ["check_sums", "fold_into_positions", "looked_up", "with_offset"]


class _Lookups(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the rows that are read from one table."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weight = weight
        self.rows: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if (
            func is torch.ops.aten.embedding.default
            and args[0].data_ptr() == self.weight.data_ptr()
        ):
            self.rows.append(args[1])
        return func(*args, **(kwargs or {}))


def looked_up(table: nn.Embedding, call: Callable[[], object], columns: int) -> int:
    """The row of a table that the first of a text's columns reads in a call of the model.

    Args:
        table: the table of positions.
        call: runs the model on one row of ``columns`` columns without padding.
        columns: m + S.

    Raises:
        ValueError: the model does not read one row after another, a column each.
    """
    with _Lookups(table.weight) as lookups:
        call()
    for rows in lookups.rows:
        if rows.numel() == columns and bool((rows.flatten().diff() == 1).all()):
            return int(rows.flatten()[0])
    found = [rows.flatten().tolist() for rows in lookups.rows]
    raise ValueError(
        f"offset: expected a model that reads a row of its table of positions for each of "
        f'{columns} columns for "positions", got reads of {found}'
    )


@torch.no_grad()
def with_offset(table: nn.Embedding, start: int, offset: Tensor) -> nn.Embedding:
    """A copy of the table with the offset ``[n, d]`` on its rows from ``start`` on.

    Sums are taken in float32 (float64 for float64) and rounded once. Offsets past the table's end
    are left out: no text is that long.

    Raises:
        ValueError: a table of another width, or one with row norms.
    """
    weight = table.weight
    if weight.shape[1] != offset.shape[1] or table.max_norm is not None:
        kind = "one with max_norm" if table.max_norm is not None else str(weight.shape[1])
        raise ValueError(
            f"offset: expected a plain table of positions as wide as the embeddings, "
            f'{offset.shape[1]}, for "positions", got {kind}'
        )
    wide = accumulation_dtype(weight, offset)
    copied = copy.deepcopy(table).requires_grad_(False)
    count = min(len(offset), len(weight) - start)
    rows = weight[start : start + count].to(wide) + offset[:count].to(weight.device, wide)
    copied.weight[start : start + count] = rows.to(weight.dtype)
    return copied


def check_sums(got: Tensor, expected: Tensor, without: Tensor) -> None:
    """Raise ValueError unless the model gives with the copy what it gives with the offset.

    Args:
        got: the model's output with the copied table.
        expected: with the offset on the text's embeddings.
        without: without any offset.
    """
    error, effect = ((x - expected).abs().max().item() for x in (got, without))
    eps = max(64 * torch.finfo(torch.float32).eps, 4 * torch.finfo(expected.dtype).eps)
    noise = eps * expected.abs().max().item()
    if not error <= 0.1 * effect + noise:
        raise ValueError(
            f"offset: expected a model that adds positions to the text's embeddings for "
            f'"positions", got outputs {error:.3g} off, where the offset changes them by '
            f"{effect:.3g}"
        )


@torch.no_grad()
def fold_into_positions(model: Any, name: str, dtype: torch.dtype | None) -> None:
    """Move a folded adapter's offset into a copy of the table of positions, and check it."""
    active, model.active_adapter = model.active_adapter, name
    try:
        prompt: Any = model.prompt
        m, n = prompt.config.num_virtual_tokens, prompt.config.max_length
        length = min(n, 32, n if model.text_limit is None else model.text_limit)
        ids = torch.arange(length, device=model.device).unsqueeze(0)
        ids = ids % model.get_input_embeddings().weight.shape[0]
        expected = _outputs(model, ids)
        model.folded[name] = prompt.fold(dtype, "none")
        without: list[Tensor] = []
        table: Any = model.backbone.get_submodule(model.profile.position_table)
        start = looked_up(table, lambda: without.append(_outputs(model, ids)), m + length) + m
        wide = accumulation_dtype(table.weight, prompt.offset_b)
        offset = offset_table(prompt.offset_a, prompt.offset_b, prompt.config.scaling, wide)
        model.position_tables[name] = with_offset(table, start, offset)
        model.place_active()
        check_sums(_outputs(model, ids), expected, without[0])
    finally:
        model.active_adapter = active
        model.place_active()


def _outputs(model: Any, input_ids: Tensor) -> Tensor:
    """What the part of the backbone that reads the text makes of ids without padding."""
    embeds, mask, ranks = model.splice(input_ids)
    backbone = model.backbone
    reader = getattr(model, "encoder", backbone)
    if model.task == "SEQ_2_SEQ_LM":
        reader = backbone.get_encoder()
    inputs = Profile.of(reader).inputs(embeds, mask, ranks)
    inputs |= (
        {"position_ids": ranks + model.profile.first_position} if "position_ids" in inputs else {}
    )
    return reader(**inputs)[0]  # type: ignore[no-any-return]
