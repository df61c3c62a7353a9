"""Metrics of classes, and metrics of generated and predicted tokens."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

__all__ = [
    "GENERATED_METRICS",
    "METRICS",
    "TEXT_METRICS",
    "classification_metrics",
    "exact_match",
    "goodness",
    "normalised",
    "perplexity",
    "token_f1",
]

METRICS = ("accuracy", "macro_f1", "matthews")
GENERATED_METRICS = ("exact_match", "f1")
TEXT_METRICS = ("token_accuracy", *GENERATED_METRICS, "loss")


def classification_metrics(
    predictions: Sequence[int] | Tensor, labels: Sequence[int] | Tensor, num_labels: int
) -> dict[str, float]:
    """Accuracy, macro F1 and Matthews correlation.

    Macro F1 is the plain mean over the classes that occur among labels or predictions. Matthews
    correlation is the multi-class R_K of Gorodkin (2004), 0 if it is undefined.
    """
    given = torch.as_tensor(predictions, dtype=torch.int64)
    asked = torch.as_tensor(labels, dtype=torch.int64)
    if given.shape != asked.shape or given.dim() != 1 or not len(given):
        raise ValueError(
            f"predictions: expected one for each of {len(asked)} labels, at least 1, "
            f"got {tuple(given.shape)}"
        )
    # Rows, columns and diagonal of the confusion matrix, without the matrix: [C] each.
    expected, predicted, agreed = (
        torch.bincount(classes, minlength=num_labels).double()
        for classes in (asked, given, asked[asked == given])
    )
    total, right = float(len(asked)), float(agreed.sum())
    occurs = expected + predicted > 0
    f1 = (2 * agreed / (expected + predicted).clamp_min(1))[occurs].mean()
    covariance = right * total - float(expected @ predicted)
    spread = (total**2 - float(predicted @ predicted)) * (total**2 - float(expected @ expected))
    return {
        "accuracy": right / total,
        "macro_f1": float(f1),
        "matthews": covariance / math.sqrt(spread) if spread > 0 else 0.0,
    }


def goodness(metric: str, value: float) -> float:
    """The value of a metric, negated if less is better."""
    return -value if metric == "loss" else value


def perplexity(loss: float) -> float:
    """exp of the mean loss of a token in nats; at most 1e308, to stay a finite number."""
    return math.exp(min(loss, 709.0))


def normalised(text: str) -> str:
    """The text without spaces at its ends, runs of white space made one space; case counts."""
    return " ".join(text.split())


def exact_match(output: str, target: str) -> bool:
    """Whether two texts are the same once both are :func:`normalised`.

    Tokenizers keep runs of spaces or drop them, so only the words and their order can count.
    """
    return normalised(output) == normalised(target)


def token_f1(output: Sequence[Hashable], target: Sequence[Hashable]) -> float:
    """Harmonic mean of precision and recall of the output's tokens, as bags without order.

    Both without tokens: 1; one of them: 0.
    """
    if not output or not target:
        return float(len(output) == len(target))
    common = sum((Counter(output) & Counter(target)).values())
    return 2 * common / (len(output) + len(target))
