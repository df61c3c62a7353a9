"""A prompt before a model that classifies whole texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutput

from ept_fast.config import check_choice
from ept_fast.transformers import POOLINGS
from ept_fast.transformers.backbone import reads_last_column
from ept_fast.transformers.outputs import label_loss
from ept_fast.transformers.padding import IGNORED, Rows, Text
from ept_fast.transformers.tasks.headed import HeadedModel

__all__ = ["EPTModelForSequenceClassification"]


class EPTModelForSequenceClassification(HeadedModel):
    """A prompt before a model that classifies whole texts. ``labels`` are ``[B]`` integers.

    Or ``[B, C]`` floats, 1 for the classes that a text has, or ``[B]`` floats to be predicted by a
    head with one label. ``logits`` are ``[B, C]``.
    """

    task = "SEQ_CLS"
    _class_weight: Tensor | None = None

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

    def set_class_weight(self, weights: Sequence[float] | None) -> None:
        """Weigh the classes in the loss, in training mode; it is not saved.

        A row's loss is multiplied by the weight of its class; the mean is still over the number of
        rows. Where rows have several classes, that of a class is multiplied by its weight in the
        rows that have it (PyTorch's ``pos_weight``).

        Args:
            weights: one for each class, at least 0; None for no weights.

        Raises:
            ValueError: another number of weights, or one below 0.
        """
        count, given = len(self.labels), list(weights or ())
        if weights is not None and (len(given) != count or min(given) < 0):
            raise ValueError(
                f"weights: expected {count} numbers >= 0, one of each class, got {given}"
            )
        self._class_weight = torch.tensor(given) if given else None

    def _mean_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """By the kind of labels, as the model's config says or its head's width."""
        kind = getattr(self.config, "problem_type", None) if self.base_head else None
        weight = self._class_weight if self.training else None
        return label_loss(logits, labels, kind, None if weight is None else weight.to(logits))

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
