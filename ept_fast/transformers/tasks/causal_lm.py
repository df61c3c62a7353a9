"""A prompt before a decoder with its language-model head."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ept_fast.transformers.backbone import cache_of
from ept_fast.transformers.generation import generate_causal
from ept_fast.transformers.model import EPTModel
from ept_fast.transformers.outputs import keep_logits, replace_fields, share_of, token_loss
from ept_fast.transformers.packing import packed_forward
from ept_fast.transformers.padding import IGNORED, Text, mark_layout, next_labels, predictors
from ept_fast.transformers.prefix_cache import PrefixCache, prefix_forward

__all__ = ["EPTModelForCausalLM"]


class EPTModelForCausalLM(EPTModel):
    """A prompt before a decoder. ``labels`` [B, S] are the text's own; -100 and padding's are left
    out.

    The first token of a text is predicted by the prompt's last position, so its label counts too.
    With ``offset_tokens="given"`` in the prompt's config, tokens from a row's first label on have
    no offset, as those that are generated.
    ``pack_index`` [R, W] packs several texts into a row (:mod:`ept_fast.transformers.packing`).
    ``prefix`` takes the prompt's keys and values from :meth:`prefix_cache`.
    """

    task = "CAUSAL_LM"
    generate = generate_causal

    def run(self, text: Text, labels: Tensor | None, kwargs: dict[str, Any]) -> Any:
        prefix = kwargs.pop("prefix", None)
        if prefix is not None:
            return prefix_forward(self, prefix, text, labels, kwargs)
        pack_index = kwargs.pop("pack_index", None)
        if pack_index is not None:
            return packed_forward(self, text, labels, pack_index, **kwargs)
        if kwargs.get("fused_lm_head"):
            return self._log_probs(text, labels, kwargs)
        num_items = kwargs.pop("num_items_in_batch", None)
        kept = kwargs.pop("logits_to_keep", 0)
        length, m = text.length, self.prompt.config.num_virtual_tokens
        text = text.for_columns(m, self.profile.column_free_length)
        if "logits_to_keep" in self.profile.arguments:
            # The text's, and what predicts its first token; or no more than is asked for.
            few = labels is None and text.order is None and isinstance(kept, int) and kept
            number = min(kept, length) if few else length + 1
            if isinstance(number, int):  # models read a symbol of torch.export as a column
                kwargs["logits_to_keep"] = number
        moved = None if labels is None else text.compact(labels)
        rows, inputs = self.rows(text, kwargs, compact=False, labels=moved)
        output = self.backbone(**inputs)
        logits, loss = output.logits, None
        if moved is not None:
            targets = next_labels(moved, text.attention_mask)
            before = logits.shape[1] - targets.shape[1]
            loss = token_loss(logits, F.pad(targets, (before, 0), value=IGNORED), num_items)
            share = share_of(targets, num_items)
            loss = self.with_terms(loss, rows, share, logits=logits, labels=labels)
        cache = cache_of(output)
        if cache is not None:  # use_cache=True was given
            mark_layout(cache, text.layout)
        logits = text.restore(logits[:, max(logits.shape[1] - length, 0) :])
        return replace_fields(output, loss=loss, logits=keep_logits(logits, kept))

    def _log_probs(self, text: Text, labels: Tensor | None, kwargs: dict[str, Any]) -> Any:
        """What a backbone gives that was patched to compute log-probabilities without logits.

        TRL's trainers patch it so, and ask for it by ``fused_lm_head=True``. The fields of each
        label are ``[B, S]``, in the labels' columns, and 0 for those that are left out.
        """
        if labels is None:
            raise ValueError("labels: expected some beside fused_lm_head, got None")
        m = self.prompt.config.num_virtual_tokens
        text = text.for_columns(m, self.profile.column_free_length)
        labels = text.compact(labels)
        targets = next_labels(labels, text.attention_mask)  # [B, 1 + S]
        _, inputs = self.rows(text, kwargs, compact=False, labels=labels)
        output = self.backbone(**inputs, shift_labels=F.pad(targets, (m - 1, 0), value=IGNORED))
        at = predictors(text.attention_mask)
        real = text.attention_mask != 0

        def of_labels(values: Tensor) -> Tensor:
            return text.restore(values[:, m - 1 :].gather(1, at) * real)

        shape = (len(targets), m - 1 + targets.shape[1])
        fields = {n: of_labels(v) for n, v in output.items() if v is not None and v.shape == shape}
        return replace_fields(output, **fields)

    def prefix_cache(self) -> PrefixCache:
        """The keys and values of the active prompt, to be given to calls as ``prefix``.

        Raises:
            ValueError: a backbone with layers that keep something else.
        """
        return PrefixCache(self)
