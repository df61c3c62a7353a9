"""Losses and fields of a model's output."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import ModelOutput  # type: ignore[attr-defined]

from ept_fast.transformers.padding import IGNORED

__all__ = ["keep_logits", "label_loss", "replace_fields", "share_of", "token_loss"]


def replace_fields(output: ModelOutput, **fields: Any) -> Any:
    """The same output with other values in these fields."""
    return type(output)(**{**output, **fields})


def keep_logits(logits: Tensor, kept: int | Tensor) -> Tensor:
    """The last ``kept`` columns, all if that is 0, or the columns of these numbers."""
    if isinstance(kept, Tensor):
        return logits[:, kept]
    return logits[:, -kept:] if kept else logits


def token_loss(logits: Tensor, labels: Tensor, num_items: Any = None) -> Tensor:
    """Mean cross-entropy in float32 over the labels that are not -100.

    Args:
        logits: ``[B, S, C]``.
        labels: ``[B, S]`` integers.
        num_items: number of labels to divide the sum by, if the batch is part of a larger one.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    reduction = "mean" if num_items is None else "sum"
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction=reduction)
    return loss if num_items is None else loss / num_items


def label_loss(
    logits: Tensor, labels: Tensor, problem_type: str | None = None, weight: Tensor | None = None
) -> Tensor:
    """The mean loss of a text's labels, in float32.

    Squared error for a regression, binary cross-entropy for several classes at once, cross-entropy
    for one class, over the labels that are not -100.

    Args:
        logits: ``[B, C]``.
        labels: ``[B]`` numbers, ``[B, C]`` of 0 and 1, or ``[B]`` integers.
        problem_type: which of them; by default a regression if C is 1, else by the labels' dtype.
        weight: ``[C]``, by which a class's loss is multiplied; of several classes, that of the rows
            that have it.
    """
    logits = logits.float()
    if problem_type == "regression" or (problem_type is None and logits.shape[-1] == 1):
        return F.mse_loss(logits.squeeze(-1), labels.squeeze(-1).float())
    if problem_type == "multi_label_classification" or labels.is_floating_point():
        return F.binary_cross_entropy_with_logits(logits, labels.float(), pos_weight=weight)
    labels = labels.view(-1)
    if weight is None:
        return F.cross_entropy(logits, labels)
    total = F.cross_entropy(logits, labels, weight=weight.float(), reduction="sum")
    return total / labels.ne(IGNORED).sum()


def share_of(labels: Tensor, num_items: Any) -> Any:
    """The part that a batch's labels are of ``num_items``; None if the batch is a whole step."""
    return None if num_items is None else labels.ne(IGNORED).sum() / num_items
