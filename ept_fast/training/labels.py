"""The labels of a task: one class, several classes or a number for each text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ept_fast.training.config import MOST, check_most

if TYPE_CHECKING:
    from ept_fast.training.data import Rows

__all__ = ["DataError", "LabelSet", "check_label"]


class DataError(ValueError):
    """Data that cannot be used; the message names the source, the row and the field."""


def check_label(value: object, first: object = None) -> str | None:
    """What was expected in place of this label; None if it will do beside the first label."""
    if isinstance(value, bool) or not isinstance(value, int | float | str | list):
        return "an integer >= 0, a name, a number or a list"
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    if isinstance(value, list) and not all(type(each) in (int, str) for each in value):
        return "a list of integers >= 0 or of names"
    if isinstance(value, list) and len(set(value)) < len(value):
        return "a list of different classes"
    numbers = isinstance(value, int | float) and isinstance(first, int | float)
    if first is not None and type(value) is not type(first) and not numbers:
        return f"{_KINDS[type(first)]} as in the rows before"
    return None


_KINDS = {int: "an integer", float: "a number", str: "a name", list: "a list"}


@dataclass(frozen=True)
class LabelSet:
    """What a task's head gives, in the order of the logits.

    Attributes:
        names: the classes' names; ``"0"``, ``"1"``, ... if the data gives integers; ``"value"`` of
            a regression.
        integers: whether the data gives integers.
        problem_type: as transformers has it: ``"single_label_classification"``,
            ``"multi_label_classification"`` or ``"regression"``.
    """

    names: tuple[str, ...]
    integers: bool
    problem_type: str = "single_label_classification"

    @classmethod
    def of(
        cls, rows: Rows, num_labels: int | None = None, problem_type: str | None = None
    ) -> LabelSet:
        """The label set of training rows: sorted names, or the integers 0 to C-1.

        Args:
            rows: labelled rows.
            num_labels: C for integer labels, if a class may have no training row.
            problem_type: by default regression if a label is a float, several classes if it is a
                list, else one class.

        Raises:
            DataError: labels of another kind, one class only, a class without rows, a label
                beyond ``num_labels``, or more classes than a head can be meant to have.
            ValueError: ``num_labels`` of more classes than that, or of a regression.
        """
        check_most("num_labels", num_labels)
        kind = problem_type or _kind(_labels(rows))
        if kind == "regression":
            if num_labels is not None:
                raise ValueError(f"num_labels: expected None for a regression, got {num_labels}")
            found = cls(("value",), False, kind)
            found.ids(rows)
            return found
        several = kind == "multi_label_classification"
        given = []
        for number, label in zip(rows.numbers, _labels(rows), strict=True):
            if isinstance(label, list) != several:
                wanted = "a list of classes" if several else "an integer >= 0 or a name"
                raise _wrong(rows, number, wanted, label)
            given += [(number, each) for each in (label if several else [label])]
        first = given[0][1] if given else ""
        integers, limit = isinstance(first, int), num_labels or MOST["num_labels"]
        for number, label in given:
            if integers and not (type(label) is int and 0 <= label < limit):
                raise _wrong(rows, number, f"an integer >= 0 and below {limit}", label)
            if not (integers or isinstance(label, str)):
                raise _wrong(rows, number, "a name", label)
        present = sorted({label for _, label in given})
        expected = f"{rows.source}: label: expected"
        if integers and num_labels is None and len(present) <= present[-1]:
            missing = next(i for i, label in enumerate(present) if label != i)
            raise DataError(
                f"{expected} every class from 0 to {present[-1]}, got no row of class {missing} "
                f"(num_labels allows that)"
            )
        if not integers and num_labels not in (None, len(present)):
            raise DataError(f"{expected} num_labels {num_labels} names, got {len(present)}")
        names = tuple(map(str, range(num_labels or len(present)) if integers else present))
        if not 2 <= len(names) <= MOST["num_labels"]:
            wanted = "at least 2" if len(names) < 2 else f"at most {MOST['num_labels']}"
            raise DataError(f"{expected} {wanted} classes, got {len(names)}")
        return cls(names, integers, kind)

    def ids(self, rows: Rows) -> tuple[Any, ...]:
        """What the model is trained on: a row's class, 1.0 or 0.0 for each class, or its number.

        Raises:
            DataError: a label that is not in the set, with its row.
        """
        if self.problem_type == "regression":
            for number, label in zip(rows.numbers, _labels(rows), strict=True):
                if not isinstance(label, int | float):
                    raise _wrong(rows, number, "a number", label)
            return tuple(map(float, _labels(rows)))
        known: dict[Any, int] = {
            (i if self.integers else name): i for i, name in enumerate(self.names)
        }
        several = self.problem_type == "multi_label_classification"
        found: list[Any] = []
        for number, label in zip(rows.numbers, _labels(rows), strict=True):
            classes = label if several and isinstance(label, list) else [label]
            for each in classes:
                if isinstance(each, list) or each not in known:
                    last, names = len(self.names) - 1, f"one of {', '.join(self.names)}"
                    expected = f"an integer from 0 to {last}" if self.integers else names
                    raise _wrong(rows, number, expected, each)
            indices = [known[each] for each in classes]
            hot = tuple(float(i in indices) for i in range(len(self.names))) if several else None
            found.append(hot or indices[0])
        return tuple(found)

    def weights(self, chosen: Mapping[str, float]) -> list[float]:
        """The weight of each class: those chosen by name, 1 for the others.

        Raises:
            ValueError: a name of no class.
        """
        for name in chosen:
            if name not in self.names:
                raise ValueError(
                    f"class_weights: expected one of {', '.join(self.names)}, got {name!r}"
                )
        return [float(chosen.get(name, 1.0)) for name in self.names]

    def balanced_weights(self, rows: Rows) -> list[float]:
        """A weight of each class by which all count the same, 1 for a class without rows.

        With N rows of C classes and n of this one it is N / (C n), as in scikit-learn. Where rows
        have several classes it is (N - n) / n, so that the rows that have a class count as much as
        those that do not.
        """
        ids, count = self.ids(rows), len(self.names)
        if self.problem_type == "multi_label_classification":
            with_it = [sum(column) for column in zip(*ids, strict=True)]
            return [(len(ids) - n) / n if n else 1.0 for n in with_it]
        import numpy as np
        from sklearn.utils.class_weight import compute_class_weight  # type: ignore[import-untyped]

        present = np.unique(ids)
        found = compute_class_weight("balanced", classes=present, y=np.array(ids))
        weights = dict(zip(present.tolist(), found.tolist(), strict=True))
        return [weights.get(i, 1.0) for i in range(count)]


def _labels(rows: Rows) -> tuple[Any, ...]:
    if rows.labels is None:
        raise DataError(f"{rows.source}: label: expected a label in every row, got none")
    return rows.labels


def _kind(labels: Sequence[Any]) -> str:
    if any(isinstance(label, float) for label in labels):
        return "regression"
    several = isinstance(labels[0], list)
    return "multi_label_classification" if several else "single_label_classification"


def _wrong(rows: Rows, number: int, expected: str, got: object) -> DataError:
    text = repr(got)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return DataError(f"{rows.source}, row {number}: label: expected {expected}, got {text}")
