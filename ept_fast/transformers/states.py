"""A text's hidden states in the plain frozen model: the first pass of prompts that read them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ept_fast.transformers.backbone import Profile
from ept_fast.transformers.padding import Text, ranks_of, real_tokens

__all__ = ["PlainReader", "reader_of"]

_LIMIT = 1 << 30  # bytes of states that are kept


def reader_of(backbone: Any) -> Any:
    """What reads a text in a model: of an encoder-decoder the encoder, else what has no head."""
    if getattr(backbone.config, "is_encoder_decoder", False):
        return backbone.get_encoder()
    return getattr(backbone, "base_model", backbone)


class PlainReader:
    """The last hidden states of texts without a prompt.

    They never change while the model is frozen, so those of rows that come again in training are
    kept, by their token ids. Such a row is read alone and without padding: its states then do not
    depend, in their last bits, on the rows that it came with, and a training that goes on from a
    checkpoint, with nothing kept, computes the same.

    Args:
        backbone: a model of ``transformers``, in evaluation mode.
        limit: bytes of states; beyond it the oldest rows are forgotten.
    """

    def __init__(self, backbone: Any, limit: int = _LIMIT) -> None:
        self._backbone = backbone
        self._profile = Profile.of(reader_of(backbone))
        self.limit = limit
        self.forget()

    def forget(self) -> None:
        """Forget every row."""
        self._rows: dict[bytes, Tensor] = {}
        self._size = 0

    @torch.no_grad()
    def states(self, text: Text, keep: bool = False) -> Tensor:
        """``[B, S, h]`` in the columns of the text, which may be padded in any way.

        Args:
            text: the rows.
            keep: whether to keep them, and to use what was kept; padding then has zeros. Rows that
                were given as embeddings are not kept.
        """
        compact = text.compacted()
        if keep and compact.input_ids is not None and not torch.compiler.is_compiling():
            return compact.restore(self._kept(compact))
        return compact.restore(self._read(compact))

    def _read(self, text: Text) -> Tensor:
        embeds = text.inputs_embeds
        if embeds is None:
            embeds = self._backbone.get_input_embeddings()(text.input_ids)
        mask = text.attention_mask
        more = {"token_type_ids": text.token_type_ids, "use_cache": False}
        inputs = self._profile.inputs(embeds, mask, ranks_of(mask), **more)
        return reader_of(self._backbone)(**inputs).last_hidden_state  # type: ignore[no-any-return]

    def _kept(self, text: Text) -> Tensor:
        fields = [t for t in (text.input_ids, text.token_type_ids) if t is not None]
        host = torch.stack(fields, 1).cpu().numpy()  # [B, 1 or 2, S]
        rows = []
        for i, length in enumerate(real_tokens(text.attention_mask).tolist()):
            key = host[i, :, :length].tobytes()
            if key not in self._rows:
                self._keep(key, self._read_alone(text, i, length))
            rows.append(self._rows[key])
        states = rows[0].new_zeros(len(rows), text.length, rows[0].shape[-1])
        for into, row in zip(states, rows, strict=True):
            into[: len(row)] = row
        return states

    def _read_alone(self, text: Text, row: int, length: int) -> Tensor:
        """``[length, h]``; nothing of a row without tokens, whose first column is read for h."""
        part = slice(row, row + 1), slice(max(length, 1))
        fields = (text.input_ids, None, text.attention_mask, text.token_type_ids)
        alone = Text(*(None if t is None else t[part] for t in fields))  # type: ignore[arg-type]
        return self._read(alone)[0, :length]

    def _keep(self, key: bytes, states: Tensor) -> None:
        self._rows[key] = states
        self._size += states.numel() * states.element_size()
        while self._size > self.limit and len(self._rows) > 1:
            oldest = self._rows.pop(next(iter(self._rows)))
            self._size -= oldest.numel() * oldest.element_size()
