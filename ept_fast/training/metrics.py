"""Metrics of labels, and metrics of generated and predicted tokens."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

__all__ = [
    "GENERATED_METRICS",
    "LABEL_METRICS",
    "METRICS",
    "TEXT_METRICS",
    "exact_match",
    "goodness",
    "label_metrics",
    "matthews",
    "normalised",
    "perplexity",
    "token_f1",
]

# By the kind of labels, as transformers' problem_type has it; the first is what runs are judged by.
LABEL_METRICS = {
    "single_label_classification": ("accuracy", "macro_f1", "matthews"),
    "multi_label_classification": ("micro_f1", "macro_f1", "subset_accuracy"),
    "regression": ("pearson", "spearman", "mae", "loss"),
}
GENERATED_METRICS = ("exact_match", "f1")
TEXT_METRICS = ("token_accuracy", *GENERATED_METRICS, "loss")
METRICS = tuple(dict.fromkeys((*itertools.chain(*LABEL_METRICS.values()), *TEXT_METRICS)))
_LESS_IS_BETTER = ("loss", "mae")


def label_metrics(logits: Tensor, labels: Tensor, problem_type: str) -> dict[str, float]:
    """The metrics of :data:`LABEL_METRICS` but the loss, as scikit-learn and SciPy define them.

    Macro F1 is the plain mean over the classes that occur among labels or predictions, 0 for one
    that is undefined. A class of several is predicted if its probability is over one half. A
    correlation is 0 if it is undefined.

    Args:
        logits: ``[N, C]``.
        labels: ``[N]`` classes, ``[N, C]`` of 0 and 1, or ``[N]`` numbers.
        problem_type: which of these.

    Raises:
        ValueError: other shapes, or no rows.
    """
    from scipy.stats import rankdata  # type: ignore[import-untyped]
    from sklearn import metrics  # type: ignore[import-untyped]

    wanted = logits.shape if problem_type == "multi_label_classification" else logits.shape[:1]
    if labels.shape != wanted or not len(labels):
        raise ValueError(
            f"labels: expected {tuple(wanted)}, at least one row, got {tuple(labels.shape)}"
        )
    asked = labels.numpy()
    f1 = functools.partial(metrics.f1_score, zero_division=0)
    found: tuple[Any, ...]
    if problem_type == "regression":
        values = logits[:, 0].double().numpy()
        ranks = (rankdata(values), rankdata(asked))
        found = (_correlation(values, asked), _correlation(*ranks))
        found = (*found, metrics.mean_absolute_error(asked, values))
    elif problem_type == "multi_label_classification":
        given, asked = (logits > 0).numpy(), asked > 0
        scores = [f1(asked, given, average=average) for average in ("micro", "macro")]
        found = (*scores, metrics.accuracy_score(asked, given))
    else:
        given = logits.argmax(-1).numpy()
        accuracy = metrics.accuracy_score(asked, given)
        found = (accuracy, f1(asked, given, average="macro"), matthews(given, asked))
    return dict(zip(LABEL_METRICS[problem_type], map(float, found), strict=False))


def matthews(given: Any, asked: Any) -> float:
    """Matthews correlation of classes, R_K of Gorodkin (2004); 0 if it is undefined.

    scikit-learn has it, from a matrix with a row and a column of every class, which of many classes
    takes many gigabytes. Its margins and its trace are enough.

    Args:
        given, asked: ``[N]`` integers from 0.
    """
    count = int(max(given.max(), asked.max())) + 1
    predicted, expected = (
        np.bincount(each, minlength=count).astype(float) for each in (given, asked)
    )
    total, right = float(len(asked)), float((given == asked).sum())
    spread = (total**2 - predicted @ predicted) * (total**2 - expected @ expected)
    return float((right * total - predicted @ expected) / math.sqrt(spread)) if spread > 0 else 0.0


def _correlation(first: Any, second: Any) -> float:
    if min(np.ptp(first), np.ptp(second)) == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def goodness(metric: str, value: float) -> float:
    """The value of a metric, negated if less is better."""
    return -value if metric in _LESS_IS_BETTER else value


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
