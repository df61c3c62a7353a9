"""Accuracy, macro F1 and Matthews correlation from a confusion matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["METRICS", "classification_metrics", "confusion_matrix"]

METRICS = ("accuracy", "macro_f1", "matthews")


def confusion_matrix(
    predictions: Sequence[int] | Tensor, labels: Sequence[int] | Tensor, num_labels: int
) -> Tensor:
    """Counts ``[C, C]`` int64: rows are the labels, columns the predictions."""
    predicted = torch.as_tensor(predictions, dtype=torch.int64)
    expected = torch.as_tensor(labels, dtype=torch.int64)
    if predicted.shape != expected.shape or predicted.dim() != 1 or not len(predicted):
        raise ValueError(
            f"predictions: expected one for each of {len(expected)} labels, at least 1, "
            f"got {tuple(predicted.shape)}"
        )
    cells = expected * num_labels + predicted
    return torch.bincount(cells, minlength=num_labels**2).view(num_labels, num_labels)


def classification_metrics(
    predictions: Sequence[int] | Tensor, labels: Sequence[int] | Tensor, num_labels: int
) -> dict[str, float]:
    """Accuracy, macro F1 and Matthews correlation.

    Macro F1 is the plain mean over the classes that occur among labels or predictions. Matthews
    correlation is the multi-class R_K of Gorodkin (2004), 0 where it is undefined.
    """
    counts = confusion_matrix(predictions, labels, num_labels).double()
    total, right = float(counts.sum()), float(counts.diagonal().sum())
    expected, predicted = counts.sum(1), counts.sum(0)
    occurs = expected + predicted > 0
    f1 = (2 * counts.diagonal() / (expected + predicted).clamp_min(1))[occurs].mean()
    covariance = right * total - float(expected @ predicted)
    spread = (total**2 - float(predicted @ predicted)) * (total**2 - float(expected @ expected))
    return {
        "accuracy": right / total,
        "macro_f1": float(f1),
        "matthews": covariance / math.sqrt(spread) if spread > 0 else 0.0,
    }
