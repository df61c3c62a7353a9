"""A prompt before a model that classifies tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.modeling_outputs import TokenClassifierOutput

from ept_fast.transformers.outputs import share_of, token_loss
from ept_fast.transformers.padding import Text
from ept_fast.transformers.tasks.headed import HeadedModel

__all__ = ["EPTModelForTokenClassification"]


class EPTModelForTokenClassification(HeadedModel):
    """A prompt before a model that classifies tokens. ``labels`` are ``[B, S]``, -100 left out."""

    task = "TOKEN_CLS"

    def run(self, text: Text, labels: Tensor | None, kwargs: dict[str, Any]) -> Any:
        num_items = kwargs.pop("num_items_in_batch", None)
        text = text.compacted()
        rows, inputs = self.rows(text, kwargs)
        if self.description.head == "linear":
            output = self.encoder(**inputs)
            logits = self.linear(rows.of_text(output.last_hidden_state))
        else:
            output = self.backbone(**inputs)
            logits = rows.of_text(output.logits)
        logits = text.restore(logits)
        loss = None
        if labels is not None:
            loss = token_loss(logits, labels, num_items)
            share = share_of(labels, num_items)
            loss = self.with_terms(loss, rows, share, logits=logits, labels=labels)
        return TokenClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=getattr(output, "hidden_states", None),
            attentions=getattr(output, "attentions", None),
        )
