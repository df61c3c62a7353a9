"""Where real tokens lie: everything that knows of padding, columns, ranks and masks.

A text ``[B, S]`` may be padded in any way. Its real tokens have ranks 0, 1, 2, ... in their order,
and the prompt's come first; positions and offsets go by rank. The backbone sees one of these rows:

- ``[prompt | text]``, the text in the columns that it was given in;
- compacted, ``[prompt | real tokens | padding]``, for models that go by columns;
- padded on the left, ``[padding | prompt | text]``, for ``generate``, which adds columns;
- packed, ``[prompt | text | text | ... | padding]``.

The prompts of a bank may differ in length: a shorter one has padding before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "IGNORED",
    "LeftPadded",
    "Rows",
    "Text",
    "before_labels",
    "layout_of",
    "left_padded",
    "mark_layout",
    "mask_of_ids",
    "next_labels",
    "pack",
    "packed_mask",
    "predictors",
    "prompt_mask",
    "ranks_of",
    "real_tokens",
    "right_padded",
]

IGNORED = -100


def ranks_of(mask: Tensor) -> Tensor:
    """The rank of each real token in its row; padding repeats the last one before it, or has 0."""
    return (mask.cumsum(1, dtype=torch.int64) - 1).clamp_min(0)


def real_tokens(mask: Tensor) -> Tensor:
    """How many each row has, ``[B]``."""
    return (mask != 0).sum(1)


def _take(values: Tensor, order: Tensor) -> Tensor:
    """Values ``[B, S, ...]`` of these columns, ``[B, S]``."""
    index = order.view(*order.shape, *[1] * (values.dim() - 2))
    return values.gather(1, index.expand(*order.shape, *values.shape[2:]))


def _padding_last(mask: Tensor) -> Tensor:
    """The order of columns that moves real tokens to the left, ``[B, S]``."""
    # No two keys are equal, so any sort keeps the tokens' order; ONNX has no stable one.
    columns = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask == 0, columns + mask.shape[1], columns).argsort(dim=1)


# A forward pass


class Text(NamedTuple):
    """The rows of a batch, maybe with their real tokens moved to the left, in their order.

    Attributes:
        input_ids: ``[B, S]``, or None if embeddings are given.
        inputs_embeds: ``[B, S, d]``, or None.
        attention_mask: ``[B, S]``.
        token_type_ids: ``[B, S]``, or None.
        order: ``[B, S]``, the column that each of the moved tokens comes from; None if not moved.
    """

    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    attention_mask: Tensor
    token_type_ids: Tensor | None = None
    order: Tensor | None = None

    @classmethod
    def of(
        cls,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
    ) -> Text:
        """A text as it was given, all of it real if there is no mask."""
        found = input_ids if input_ids is not None else inputs_embeds
        if found is None:
            raise ValueError("input_ids, inputs_embeds: expected one of them, got none")
        if attention_mask is None:
            attention_mask = torch.ones(found.shape[:2], dtype=torch.int64, device=found.device)
        return cls(input_ids, inputs_embeds, attention_mask, token_type_ids)

    @property
    def length(self) -> int:
        """S."""
        return self.attention_mask.shape[1]

    def compacted(self) -> Text:
        """The same rows, padded on the right only."""
        order = _padding_last(self.attention_mask)
        fields = (self.input_ids, self.inputs_embeds, self.attention_mask, self.token_type_ids)
        ids, embeds, mask, kinds = (None if v is None else _take(v, order) for v in fields)
        return Text(ids, embeds, mask, kinds, order)  # type: ignore[arg-type]

    def for_columns(self, num_virtual_tokens: int, column_free_length: float) -> Text:
        """Compacted if the model tells columns apart in rows as long as prompt and text."""
        free = num_virtual_tokens + self.length <= column_free_length
        return self if free else self.compacted()

    def compact(self, values: Tensor) -> Tensor:
        """Values ``[B, S, ...]`` of the given columns, in the order of these rows."""
        return values if self.order is None else _take(values, self.order)

    def restore(self, values: Tensor) -> Tensor:
        """Values ``[B, S, ...]`` of these rows, in the columns that were given."""
        return values if self.order is None else _take(values, self.order.argsort(dim=1))

    @property
    def layout(self) -> str:
        """Of a cache of these rows behind a prompt."""
        return "prompt first" if self.order is None else "text first"


class Rows(NamedTuple):
    """Prompt and text as the backbone sees them.

    Attributes:
        inputs_embeds: ``[B, m + S, d]``.
        attention_mask: ``[B, m + S]``.
        ranks: ``[B, m + S]``.
        token_type_ids: ``[B, m + S]``, or None.
        text: what stands behind the prompt.
        num_virtual_tokens: m.
        order: ``[B, m + S]``, the column that each token comes from; None if not moved.
        plain_states: ``[B, S, h]``, of the text without the prompt, if the prompt has read them.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    ranks: Tensor
    token_type_ids: Tensor | None
    text: Text
    num_virtual_tokens: int
    order: Tensor | None = None
    plain_states: Tensor | None = None

    @classmethod
    def of(cls, spliced: Any, text: Text, num_virtual_tokens: int) -> Rows:
        """Of what a prompt makes of the text (:class:`ept_fast.prompts.ept.EPTOutput`)."""
        kinds = text.token_type_ids
        kinds = None if kinds is None else F.pad(kinds, (num_virtual_tokens, 0))
        embeds, mask, ranks = spliced
        return cls(embeds, mask, ranks, kinds, text, num_virtual_tokens)

    def compacted(self) -> Rows:
        """With the padding before shorter prompts of a bank moved behind the text."""
        embeds, mask, kinds = self.inputs_embeds, self.attention_mask, self.token_type_ids
        moved = Text(None, embeds, mask, kinds).compacted()
        _, embeds, mask, kinds, order = moved  # type: ignore[assignment]
        m = self.num_virtual_tokens
        return Rows(embeds, mask, ranks_of(mask), kinds, self.text, m, order)

    def of_text(self, values: Tensor) -> Tensor:
        """Of the backbone's values ``[B, m + S, ...]`` the text's ``[B, S, ...]``, in its order."""
        if self.order is not None:
            values = _take(values, self.order.argsort(dim=1))
        return values[:, self.num_virtual_tokens :]

    def pooled(self, values: Tensor, pooling: str) -> Tensor:
        """``[B, h]``, the first, the last or the mean of a compacted text's ``[B, S, h]``."""
        hidden, mask = self.of_text(values), self.text.attention_mask
        if pooling == "first":
            return hidden[:, 0]
        counts = real_tokens(mask).unsqueeze(1)
        if pooling == "last":
            return _take(hidden, (counts - 1).clamp_min(0)).squeeze(1)
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        weights = mask.to(hidden.dtype)
        # A row of padding only pools to zero.
        return (weights.unsqueeze(1) @ hidden).squeeze(1) / counts.clamp_min(1)


def predictors(mask: Tensor) -> Tensor:
    """Where each real token of a text is predicted: at the real token before it.

    Args:
        mask: ``[B, S]`` of 0 and 1.

    Returns:
        ``[B, S]`` positions among 1 + S: 0 is the prompt's last, the others are the text's.
    """
    real = mask != 0
    own = torch.arange(1, mask.shape[1] + 1, device=mask.device).expand_as(mask)
    return F.pad(own.where(real, 0).cummax(1).values[:, :-1], (1, 0))


def next_labels(labels: Tensor, mask: Tensor) -> Tensor:
    """Each label at the position that predicts its token.

    Args:
        labels: ``[B, S]`` integers; those of padding are left out.
        mask: ``[B, S]`` of 0 and 1.

    Returns:
        ``[B, 1 + S]``: the prompt's last position, which predicts a row's first token, and the
        text's; -100 where nothing is to be predicted.
    """
    real = mask != 0
    own = torch.arange(1, labels.shape[1] + 1, device=labels.device).expand_as(labels)
    # Padding writes to its own position and each token to another real one: none is written twice.
    targets = labels.new_full((labels.shape[0], labels.shape[1] + 1), IGNORED)
    at = predictors(mask).where(real, own)
    return targets.scatter(1, at, labels.where(real, IGNORED))


def before_labels(mask: Tensor, labels: Tensor) -> Tensor:
    """The mask with zeros from each row's first labelled token on.

    Args:
        mask: ``[B, S]`` of 0 and 1.
        labels: ``[B, S]`` integers, -100 where there is none; those of padding are left out.

    Returns:
        ``[B, S]`` in the type of the mask.
    """
    labelled = (labels != IGNORED) & (mask != 0)
    return mask.masked_fill(labelled.cumsum(1) > 0, 0)


def prompt_mask(mask: Tensor, lengths: Tensor, num_virtual_tokens: int) -> Tensor:
    """The mask ``[B, m + S]`` with zeros before prompts shorter than m, ``lengths`` ``[B]``."""
    columns = torch.arange(num_virtual_tokens, device=lengths.device)
    head = columns >= (num_virtual_tokens - lengths).unsqueeze(1)
    return torch.cat([head.to(mask.dtype), mask[:, num_virtual_tokens:]], 1)


# Caches


def mark_layout(cache: Any, layout: str) -> None:
    """Note where a cache's rows have their padding, for ``generate`` to go on from it.

    ``"padding first"``, which is that of ``generate`` and needs no note: ``[padding | prompt |
    text]``; ``"prompt first"``: ``[prompt | padding | text]``; ``"text first"``: ``[prompt | text |
    padding]``.
    """
    cache.ept_layout = layout


def layout_of(cache: Any) -> str:
    """As :func:`mark_layout` has noted it; of an empty cache, that of ``generate``."""
    if cache is None or not int(cache.get_seq_length()):
        return "padding first"
    return getattr(cache, "ept_layout", "padding first")


# Generation


def mask_of_ids(input_ids: Tensor, pad: int | None, end: int | list[int] | None) -> Tensor | None:
    """Zeros at the padding token, unless it ends texts too; None if it does or there is none."""
    if pad is None or pad in (end if isinstance(end, list) else [end]):
        return None
    return (input_ids != pad).long()


def right_padded(embeds: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``[B, S, d]`` and their mask with the padding on the right, for an encoder."""
    order = _padding_last(mask)
    return _take(embeds, order), _take(mask, order)


def left_padded(
    embeds: Tensor, mask: Tensor, input_ids: Tensor, prompt_first: bool
) -> tuple[LeftPadded, Tensor]:
    """Rows for ``generate``, and the mask ``[B, S]`` of their text.

    Args:
        embeds, mask: ``[B, m + S, d]`` and ``[B, m + S]``, as a prompt gives them.
        input_ids: ``[B, S]``.
        prompt_first: whether the cache begins with the prompt: ``[prompt | padding | text]``.
    """
    m = mask.shape[1] - input_ids.shape[1]
    missing = (mask[:, :m] == 0).sum(1, keepdim=True)
    mask = mask[:, m:]
    order = mask.argsort(dim=1, stable=True)  # padding first
    mask = _take(mask, order)
    rows = LeftPadded(
        head=embeds[:, :m],
        text=_take(embeds[:, m:], order),
        input_ids=_take(input_ids, order),
        padding=(mask == 0).sum(1, keepdim=True),
        missing=missing,
        prompt_first=prompt_first,
        uneven=bool(missing.any()),
        moved=bool((order.diff(dim=1) < 0).any()),
    )
    return rows, mask


@dataclass(frozen=True)
class LeftPadded:
    """Prompt and text of a call of ``generate``, the text's padding on the left.

    Attributes:
        head: P′ of each row, ``[B, m, d]``.
        text: the text's embeddings with their offsets, ``[B, S, d]``.
        input_ids: ``[B, S]``.
        padding: columns of padding, ``[B, 1]``.
        missing: columns by which a row's prompt is shorter than m, its padding, ``[B, 1]``.
        prompt_first: whether the cache begins with the prompt: ``[prompt | padding | text]``.
        uneven: whether some row's prompt is shorter than m.
        moved: whether tokens had to be moved to put the padding on the left.
    """

    head: Tensor
    text: Tensor
    input_ids: Tensor
    padding: Tensor
    missing: Tensor
    prompt_first: bool
    uneven: bool
    moved: bool

    @property
    def num_virtual_tokens(self) -> int:
        """m."""
        return self.head.shape[1]

    @property
    def length(self) -> int:
        """S."""
        return self.text.shape[1]

    @property
    def most_padding(self) -> int:
        """Columns of padding of the shortest text."""
        return int(self.padding.max())

    @property
    def least_empty(self) -> int:
        """Columns that take no position in any row, of padding before or inside the prompt."""
        return int((self.padding + self.missing).min())

    def inputs(
        self, input_ids: Tensor, start: int, new: Callable[[Tensor, Tensor, int], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Embeddings and ranks of the columns from ``start`` on.

        Args:
            input_ids: ``[N, L]``, the text and what came after it; N is B times a number of copies
                (beams, several answers), those of a row beside each other.
            start: columns of ``[padding | prompt | text]`` that the backbone has seen.
            new: gives generated tokens' embeddings ``[N, k, d]`` of their ids ``[N, k]``, ranks
                in the text ``[N, k]`` and the number of copies.

        Returns:
            ``[N, m + L - start, d]`` and ``[N, m + L - start]``.

        Raises:
            ValueError: other tokens in the text's columns.
        """
        m, length = self.num_virtual_tokens, self.length
        copies = input_ids.shape[0] // self.text.shape[0]
        padding, missing = (t.repeat_interleave(copies, 0) for t in (self.padding, self.missing))
        columns = torch.arange(start, m + input_ids.shape[1], device=input_ids.device)
        rank = columns - padding  # [N, m + L - start], m for the text's first token
        seen = max(start - m, 0)  # columns of text
        later = max(length, seen)
        rows = new(input_ids[:, later:], rank[:, later + m - start :] - m, copies)
        if seen < length:
            if not input_ids[:, :length].equal(self.input_ids.repeat_interleave(copies, 0)):
                raise ValueError(
                    "input_ids: expected the text that generate was called with and what came "
                    "after it, got other tokens"
                )
            text = self.text[:, seen:].repeat_interleave(copies, 0)
            rows = torch.cat([text, rows], 1)
        if start == 0:  # [prompt | padding | text] becomes [padding | prompt | text]
            rows = torch.cat([self.head.repeat_interleave(copies, 0), rows], 1)
            source = torch.where(columns < padding + m, rank, columns)
            source = torch.where(columns < padding, columns + m, source)
            rows = _take(rows, source)
        return rows, (rank - missing).clamp_min(0)

    def mask(self, attention_mask: Tensor | None, input_ids: Tensor) -> Tensor | None:
        """The mask of prompt and text, ``[N, m + L]``, of that of the text, padded on the left.

        None, which stands for ones, remains None unless padding before shorter prompts has to be
        masked.
        """
        if attention_mask is None:
            if not self.uneven:
                return None
            attention_mask = torch.ones_like(input_ids)
        m = self.num_virtual_tokens
        copies = attention_mask.shape[0] // self.text.shape[0]
        # Zeros are on the left, so the prompt's ones can as well be put last.
        mask = F.pad(attention_mask, (m, 0) if self.prompt_first else (0, m), value=1)
        before = self.missing if self.prompt_first else self.padding + self.missing
        columns = torch.arange(mask.shape[1], device=mask.device)
        return mask * (columns >= before.repeat_interleave(copies, 0))


# Packed rows


def pack(values: Tensor, pack_index: Tensor, fill: Any = 0) -> Tensor:
    """Values ``[N, L, ...]`` where ``pack_index`` ``[R, W]`` puts them; ``fill`` for padding.

    ``pack_index`` says which of the N * L flattened tokens stands where, -1 for padding.
    """
    picked = values.flatten(0, 1).index_select(0, pack_index.clamp_min(0).flatten())
    picked = picked.view(*pack_index.shape, *values.shape[2:])
    padding = (pack_index < 0).view(*pack_index.shape, *[1] * (values.dim() - 2))
    return picked.masked_fill(padding, fill)


def packed_mask(pack_index: Tensor, length: int, num_virtual_tokens: int) -> Tensor:
    """Who sees whom, bool ``[R, 1, m + W, m + W]``: the prompt and, of the text, one's own segment.

    Padding sees the prompt and other padding.

    Args:
        pack_index: ``[R, W]``, as in :func:`pack`.
        length: L.
        num_virtual_tokens: m.
    """
    segment = torch.where(pack_index < 0, -1, pack_index.clamp_min(0) // length)
    owner = F.pad(segment, (num_virtual_tokens, 0), value=-2)
    size = owner.shape[1]
    allowed = owner.unsqueeze(2) == owner.unsqueeze(1)  # [R, query, key]
    allowed[:, :, :num_virtual_tokens] = True
    allowed &= torch.ones(size, size, dtype=torch.bool, device=allowed.device).tril()
    return allowed.unsqueeze(1)
