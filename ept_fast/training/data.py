"""Rows from files, checked line by line: texts with labels, or with target texts."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import importlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ept_fast.config import check_choice
from ept_fast.storage.untrusted import load_json
from ept_fast.training.config import MOST, check_most

__all__ = [
    "ANSWERS",
    "SUFFIXES",
    "DataError",
    "Fields",
    "LabelSet",
    "Rows",
    "find_split",
    "hold_out",
    "parse_rows",
    "read_rows",
    "read_split",
]

SUFFIXES = (".jsonl", ".csv", ".tsv")
# What a row has beside its text, by the answer: what it must have, and what all rows of a file have
# or none. A target belongs to one text, so that no second one is read beside it.
_COLUMNS = {
    "label": (("label",), ("text_pair",)),
    "target": (("target",), ()),
    "optional target": ((), ("target",)),
    "none": ((), ("text_pair",)),
}
ANSWERS = tuple(_COLUMNS)


class DataError(ValueError):
    """Data that cannot be used; the message names the file, the line and the field."""


@dataclass(frozen=True)
class Fields:
    """The names of the columns."""

    text: str = "text"
    text_pair: str = "text_pair"
    label: str = "label"
    target: str = "target"


@dataclass(frozen=True)
class Rows:
    """The rows of one split, columns of equal length.

    Attributes:
        texts: the first text of each row.
        pairs: the second, or None if the task has one text only.
        labels: integers from 0, or names; None if the rows have none.
        source: where they come from, for messages.
        lines: the line of each row in its file, from 1.
        targets: the text that is to follow each text, or None if the rows have none.
    """

    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None
    labels: tuple[int, ...] | tuple[str, ...] | None
    source: str
    lines: tuple[int, ...]
    targets: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def all_texts(self) -> tuple[str, ...]:
        """Every text of every column, one column after another."""
        return (*self.texts, *(self.pairs or ()), *(self.targets or ()))

    def take(self, indices: Sequence[int]) -> Rows:
        """The rows with these indices, in this order."""
        picked: dict[str, Any] = {}
        for name in ("texts", "pairs", "labels", "lines", "targets"):
            column = getattr(self, name)
            picked[name] = None if column is None else tuple(column[i] for i in indices)
        return dataclasses.replace(self, **picked)

    def fingerprint(self) -> str:
        """A hash of texts and answers, the same for the same rows in the same order."""
        columns: list[Any] = [self.texts, self.pairs, self.labels]
        content = json.dumps(columns if self.targets is None else [*columns, self.targets])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class LabelSet:
    """The classes of a task, in the order of the logits.

    Attributes:
        names: the classes' names; ``"0"``, ``"1"``, ... if the data gives integers.
        integers: whether the data gives integers.
    """

    names: tuple[str, ...]
    integers: bool

    @classmethod
    def of(cls, rows: Rows, num_labels: int | None = None) -> LabelSet:
        """The label set of training rows: sorted names, or the integers 0 to C-1.

        Args:
            rows: labelled rows.
            num_labels: C for integer labels, if a class may have no training row.

        Raises:
            DataError: one class only, a class without rows, a label beyond ``num_labels``, or more
                classes than a head can be meant to have.
            ValueError: ``num_labels`` of more classes than that.
        """
        check_most("num_labels", num_labels)
        given = _labels(rows)
        found, expected = sorted(set(given)), f"{rows.source}: label: expected"
        integers = not isinstance(found[0], str)
        names = tuple(map(str, found))
        if integers:
            last, limit = found[-1], num_labels or MOST["num_labels"]
            if last >= limit:
                line = rows.lines[given.index(last)]
                below = limit if num_labels is None else f"num_labels {limit}"
                raise DataError(
                    f"{rows.source}, line {line}: label: expected an integer below {below}, "
                    f"got {last}"
                )
            if num_labels is None and len(found) <= last:
                missing = next(i for i, label in enumerate(found) if label != i)
                raise DataError(
                    f"{expected} every class from 0 to {last}, got no row of class {missing} "
                    f"(num_labels allows that)"
                )
            names = tuple(map(str, range(num_labels or last + 1)))
        elif num_labels not in (None, len(names)):
            raise DataError(f"{expected} num_labels {num_labels} names, got {len(names)}")
        if len(names) < 2:
            raise DataError(f"{expected} at least 2 classes, got {len(names)}")
        if len(names) > MOST["num_labels"]:
            raise DataError(f"{expected} at most {MOST['num_labels']} classes, got {len(names)}")
        return cls(names, integers)

    def ids(self, rows: Rows) -> tuple[int, ...]:
        """The class index of each row.

        Raises:
            DataError: a label that is not in the set, with its line.
        """
        known: dict[Any, int] = {
            (i if self.integers else name): i for i, name in enumerate(self.names)
        }
        labels, last = _labels(rows), len(self.names) - 1
        for line, label in zip(rows.lines, labels, strict=True):
            if label not in known:
                names = f"one of {', '.join(self.names)}"
                expected = f"an integer from 0 to {last}" if self.integers else names
                raise DataError(
                    f"{rows.source}, line {line}: label: expected {expected}, got {label!r}"
                )
        return tuple(known[label] for label in labels)


def _labels(rows: Rows) -> tuple[Any, ...]:
    if rows.labels is None:
        raise DataError(f"{rows.source}: label: expected a label in every row, got none")
    return rows.labels


class _Builder:
    """Collects checked rows of one file."""

    def __init__(self, source: str, fields: Fields, answer: str) -> None:
        must, self.may_have = _COLUMNS[answer]
        self.source, self.fields = source, fields
        self.must_have = ("text", *must)
        # Whether the rows are to be answered: then every line counts, and an empty text too.
        self.asked = answer == "none"
        self.columns: dict[str, list[Any]] = {n: [] for n in (*self.must_have, *self.may_have)}
        self.lines: list[int] = []

    def name(self, column: str) -> str:
        """What a column is called in the file."""
        return str(getattr(self.fields, column))

    def fail(self, line: int, name: str, expected: str, got: str) -> DataError:
        return DataError(f"{self.source}, line {line}: {name}: expected {expected}, got {got}")

    def text(self, line: int, name: str, value: object) -> str:
        if not isinstance(value, str):
            raise self.fail(line, name, "a string", _show(value))
        if not (value.strip() or self.asked):
            raise self.fail(line, name, "text", "an empty string" if not value else "only spaces")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            got = f"a lone surrogate ({error.reason})"
            raise self.fail(line, name, "Unicode text", got) from None
        return value

    def label(self, line: int, name: str, value: object) -> int | str:
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise self.fail(line, name, "an integer >= 0 or a name", _show(value))
        if isinstance(value, int) and not 0 <= value < MOST["num_labels"]:
            expected = f"an integer >= 0 and below {MOST['num_labels']}"
            raise self.fail(line, name, expected, _show(value))
        if isinstance(value, str):
            self.text(line, name, value)
        first = next(iter(self.columns["label"]), value)
        if type(value) is not type(first):
            kind = "an integer" if isinstance(first, int) else "a name"
            raise self.fail(line, name, f"{kind} as in the rows before", _show(value))
        return value

    def add(self, line: int, row: Mapping[str, object]) -> None:
        for column, values in self.columns.items():
            name = self.name(column)
            if column in self.must_have and name not in row:
                got = f"only {', '.join(map(str, row)) or 'none'}"
                raise self.fail(line, name, "the field", got)
            value = row.get(name)
            if column in self.may_have:
                if self.lines and bool(values) != (value is not None):
                    what = "a target" if column == "target" else "a second text"
                    had, got = (what, "none") if values else ("none", "one")
                    raise self.fail(line, name, f"{had} as in the rows before", got)
                if value is None:
                    continue
            check = self.label if column == "label" else self.text
            values.append(check(line, name, value))
        self.lines.append(line)

    def rows(self) -> Rows:
        if not self.lines:
            raise DataError(f"{self.source}: expected at least one row, got none")
        found = {column: tuple(values) or None for column, values in self.columns.items()}
        return Rows(
            texts=found["text"] or (),
            pairs=found.get("text_pair"),
            labels=found.get("label"),
            source=self.source,
            lines=tuple(self.lines),
            targets=found.get("target"),
        )


def _show(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def read_rows(
    path: str | Path,
    *,
    suffix: str | None = None,
    fields: Fields | None = None,
    answer: str = "label",
) -> Rows:
    """Read a JSONL, CSV, TSV or plain text file; the suffix says which.

    JSONL: one object per line, other fields are ignored. CSV: a header, quoting as usual. TSV: a
    header, no quoting, as in GLUE. ``.txt``: one text per line, never with an answer.

    Blank lines are skipped and empty texts refused, unless the answer is ``"none"``: such rows are
    to be answered, one for one. Every line of a ``.txt`` is then a text, an empty text counts, and
    a line without a row is an error.

    Args:
        path: the file.
        suffix: the one to read it by, in place of its own.
        fields: the names of the columns.
        answer: what each row has beside its text: a ``"label"``, a ``"target"``, an ``"optional
            target"`` (in all rows or in none), or ``"none"``. Second texts are read beside labels
            and if there is no answer.

    Raises:
        DataError: a missing file, an unknown suffix or a malformed line, which the message names.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{path}: expected a readable file, got {reason}") from None
    return parse_rows(data, suffix or path.suffix, str(path), fields=fields, answer=answer)


def parse_rows(
    data: bytes, suffix: str, source: str, *, fields: Fields | None = None, answer: str = "label"
) -> Rows:
    """:func:`read_rows` of a file's bytes; ``source`` names them in messages."""
    check_choice("answer", answer, ANSWERS)
    readers: dict[str, Callable[[str, _Builder], None]] = {
        ".jsonl": _read_jsonl,
        ".csv": _read_csv,
        ".tsv": _read_tsv,
    }
    if answer in ("none", "optional target"):
        readers[".txt"] = _read_text
    if suffix.lower() not in readers:
        raise DataError(f"{source}: expected a file ending in {', '.join(readers)}, got {suffix!r}")
    builder = _Builder(source, fields or Fields(), answer)
    readers[suffix.lower()](_decode(data, source), builder)
    return builder.rows()


def _decode(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{source}, line {line}: expected UTF-8, got the byte 0x{data[error.start]:02x}"
        ) from None


def _lines(text: str, every: bool) -> Iterator[tuple[int, str]]:
    # Only "\n" ends a line: splitlines() would also cut at separators that may stand inside a text.
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, 1):
        if every or line.strip():
            yield number, line.rstrip("\r")


def _read_jsonl(text: str, builder: _Builder) -> None:
    for number, line in _lines(text, builder.asked):
        try:
            row = load_json(line)
            got = _show(row)
        except (ValueError, RecursionError) as error:
            row, got = None, f"bad JSON ({error})" if line.strip() else "a blank line"
        if not isinstance(row, dict):
            raise DataError(f"{builder.source}, line {number}: expected a JSON object, got {got}")
        builder.add(number, row)


def _read_text(text: str, builder: _Builder) -> None:
    for number, line in _lines(text, builder.asked):
        builder.add(number, {builder.name("text"): line})


def _read_csv(text: str, builder: _Builder) -> None:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)

    def records() -> Iterator[tuple[int, list[str]]]:
        while True:
            first = reader.line_num + 1  # a quoted field may span lines: name the first
            try:
                record = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise DataError(
                    f"{builder.source}, line {first}: expected CSV, got bad quoting or an "
                    f"oversized field ({error})"
                ) from None
            if builder.asked or any(cell.strip() for cell in record):
                yield first, record

    _add_records(records(), builder)


def _read_tsv(text: str, builder: _Builder) -> None:
    lines = _lines(text, builder.asked)
    _add_records(((number, line.split("\t")) for number, line in lines), builder)


def _add_records(records: Iterator[tuple[int, list[str]]], builder: _Builder) -> None:
    line, header = next(records, (1, []))
    for name in map(builder.name, builder.must_have):
        if name not in header:
            raise builder.fail(line, name, "a column in the header", ", ".join(header) or "none")
    if len(set(header)) < len(header):
        raise builder.fail(line, "header", "different names", ", ".join(header))
    label = builder.name("label") if "label" in builder.columns else None
    integers: bool | None = None  # whether the labels are, as the first row says
    for line, record in records:
        if len(record) != len(header):
            got = str(len(record) or "a blank line")
            raise builder.fail(line, "row", f"{len(header)} columns", got)
        row: dict[str, object] = dict(zip(header, record, strict=True))
        if label is not None:
            cell = str(row[label])
            integers = _is_integer(cell) if integers is None else integers
            if integers and _is_integer(cell):
                try:
                    row[label] = int(cell)
                except ValueError:  # two signs, or too many digits
                    raise builder.fail(line, label, "an integer >= 0", _show(cell)) from None
        builder.add(line, row)


def _is_integer(cell: str) -> bool:
    return cell.strip().lstrip("-").isdecimal() and cell.strip().isascii()


def find_split(
    source: str | Path, split: str, *, fields: Fields | None = None, answer: str = "label"
) -> Rows | None:
    """One split of a folder or of a data set of the ``datasets`` library; None if there is none.

    Args:
        source: a folder of ``<split>.jsonl`` (or ``.csv``, ``.tsv``) files; a file, which is a
            split ``"train"``; or ``name`` or ``name:config`` of a data set.
        split: its name.
        fields: the names of the columns.
        answer: as in :func:`read_rows`.

    Raises:
        DataError: no such source, two files of one split, or a malformed line.
    """
    splits = _splits(source, fields or Fields(), answer)
    return splits[split]() if split in splits else None


def read_split(
    source: str | Path, split: str, *, fields: Fields | None = None, answer: str = "label"
) -> Rows:
    """As :func:`find_split`; a file is whatever split is asked for.

    Raises:
        DataError: as there, or no such split.
    """
    if _is_file(Path(source)):
        return read_rows(source, fields=fields, answer=answer)
    splits = _splits(source, fields or Fields(), answer)
    if split not in splits:
        names = ", ".join(splits) or "none"
        raise DataError(f"{source}: expected a split {split}, got {names}")
    return splits[split]()


def _splits(source: str | Path, fields: Fields, answer: str) -> dict[str, Callable[[], Rows]]:
    """What reads each split of a source."""
    path = Path(source)
    if _is_file(path):
        return {"train": partial(read_rows, path, fields=fields, answer=answer)}
    if not path.is_dir():
        return _hub_splits(str(source), fields, answer)
    found: dict[str, Path] = {}
    for file in sorted(path.iterdir()):
        if file.suffix in SUFFIXES and file.is_file():
            other = found.setdefault(file.stem, file)
            if other != file:
                raise DataError(
                    f"{path}: expected one file for each split, got {other.name} and {file.name}"
                )
    return {
        name: partial(read_rows, file, fields=fields, answer=answer) for name, file in found.items()
    }


def _is_file(path: Path) -> bool:
    named = path.suffix.lower() in (*SUFFIXES, ".txt")
    return path.is_file() or (named and not path.is_dir())


def _hub_splits(name: str, fields: Fields, answer: str) -> dict[str, Callable[[], Rows]]:
    try:
        datasets = importlib.import_module("datasets")
    except ModuleNotFoundError:
        raise DataError(
            f"data: expected a folder, a file, or a data set's name with the datasets library "
            f"installed (pip install datasets), got {name!r} and no such library"
        ) from None
    path, _, configuration = name.partition(":")
    try:
        found = datasets.load_dataset(path, configuration or None)
    except Exception as error:  # the library raises its own and its transports' many kinds
        reason = str(error).partition("\n")[0]
        raise DataError(f"data: expected a data set that loads, got {name!r} ({reason})") from error

    def read(split: str) -> Rows:
        builder = _Builder(f"{name}[{split}]", fields, answer)
        for number, row in enumerate(found[split], 1):
            builder.add(number, row)
        return builder.rows()

    return {split: partial(read, split) for split in found}


def hold_out(rows: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Split rows at random into training rows and held-out ones, at least one row each."""
    if len(rows) < 2:
        raise DataError(f"{rows.source}: expected 2 rows or more to hold some out, got {len(rows)}")
    count = min(max(round(len(rows) * fraction), 1), len(rows) - 1)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return rows.take(sorted(order[count:])), rows.take(sorted(order[:count]))
