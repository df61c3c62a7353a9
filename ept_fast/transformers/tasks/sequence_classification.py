"""A prompt before a model that classifies whole texts."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutput

from ept_fast.config import check_choice
from ept_fast.transformers import POOLINGS
from ept_fast.transformers.backbone import reads_last_column
from ept_fast.transformers.padding import IGNORED, Rows, Text
from ept_fast.transformers.tasks.headed import HeadedModel

__all__ = ["EPTModelForSequenceClassification"]


class EPTModelForSequenceClassification(HeadedModel):
    """A prompt before a model that classifies whole texts. ``labels`` are ``[B]`` integers.

    With the model's own head also those of its regression ([B] floats) or of several classes at
    once ([B, C] floats). ``logits`` are ``[B, C]``.
    """

    task = "SEQ_CLS"

    def checked_pooling(self, pooling: str | None) -> str | None:
        """A given pooling, or the model's own head if it has one, or the mean."""
        chosen = pooling or ("model" if self.base_head else "mean")
        check_choice("pooling", chosen, POOLINGS)
        if chosen == "model" and self.base_head and reads_last_column(self.backbone):
            raise ValueError(
                f'pooling: expected "mean", "first" or "last" for {type(self.backbone).__name__}, '
                f"whose own head reads the last column, padding or not, got {pooling!r}"
            )
        return chosen

    def run(self, text: Text, labels: Tensor | None, kwargs: dict[str, Any]) -> Any:
        num_items = kwargs.pop("num_items_in_batch", None)
        rows, inputs = self.rows(text.compacted(), kwargs)
        pooled = None
        if self.description.head == "linear":
            output = self.encoder(**inputs)
            pooled = self._pool(output, rows)
            logits = self.linear(pooled)
        elif "score" in self.base_head:
            # A decoder's own forward would take the last column, padded or not.
            output = self.encoder(**inputs)
            score: Any = self.backbone.score
            pooled = rows.pooled(output.last_hidden_state, "last")
            logits = score(pooled).float()
        elif labels is not None and self.loss_terms:
            output = self.backbone(**{**inputs, "output_hidden_states": True})
            pooled = rows.pooled(output.hidden_states[-1], "mean")
            logits = output.logits
        else:
            output = self.backbone(**inputs)
            logits = output.logits
        loss = None
        if labels is not None:
            loss = self.with_terms(
                self._mean_loss(logits, labels),
                rows,
                logits=logits,
                labels=labels,
                pooled=pooled,
                class_weights=self.class_weights if self.loss_terms else None,
            )
            if num_items is not None:  # the batch is part of a larger one
                loss = loss * labels.ne(IGNORED).sum() / num_items
        return SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=getattr(output, "hidden_states", None),
            attentions=getattr(output, "attentions", None),
        )

    def _mean_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """By the kind of labels, as the model's config says or its head's width."""
        kind = getattr(self.config, "problem_type", None) if self.base_head else None
        if kind == "regression" or (kind is None and logits.shape[-1] == 1):
            return F.mse_loss(logits.squeeze(-1).float(), labels.squeeze(-1).float())
        if kind == "multi_label_classification" or labels.is_floating_point():
            return F.binary_cross_entropy_with_logits(logits.float(), labels.float())
        return F.cross_entropy(logits.float(), labels.view(-1))

    def _pool(self, output: Any, rows: Rows) -> Tensor:
        pooling = self.pooling
        if pooling == "model":
            pooled: Tensor | None = getattr(output, "pooler_output", None)
            if pooled is None:
                raise ValueError(
                    f'pooling: expected a backbone with a pooler for "model", '
                    f"got {type(self.backbone).__name__}"
                )
            return pooled
        assert pooling is not None
        return rows.pooled(output.last_hidden_state, pooling)
