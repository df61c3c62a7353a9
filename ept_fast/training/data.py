"""Rows of a task: read by the ``datasets`` library, and checked one by one."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ept_fast.config import check_choice
from ept_fast.libraries import require
from ept_fast.storage.untrusted import load_json
from ept_fast.training.labels import DataError, check_label

__all__ = [
    "ANSWERS",
    "COLUMN_OPTIONS",
    "SUFFIXES",
    "DataError",
    "Fields",
    "Rows",
    "find_split",
    "hold_out",
    "read_rows",
    "read_split",
]

# By suffix: None for a file of lines, else the reader of the datasets library.
_READERS = {
    ".jsonl": None,  # that library's reader takes strings for dates and drops blank lines
    ".txt": None,
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
SUFFIXES = tuple(_READERS)
# Files that a split does not consist of: descriptions and shards, which that library knows.
_OF_THE_LIBRARY = re.compile(r"state|dataset_\w+|.*-\d+-of-\d+")
# What a row has beside its text, by the answer: what it must have, and what all rows have or none.
# A target belongs to one text, so that no second one is read beside it.
_COLUMNS = {
    "label": (("label",), ("text_pair",)),
    "target": (("target",), ()),
    "optional target": ((), ("target",)),
    "none": ((), ("text_pair",)),
}
ANSWERS = tuple(_COLUMNS)
# The options that name columns, first those of what is asked, and the fields of `Fields`.
COLUMN_OPTIONS = {
    "text_field": "text",
    "pair_field": "text_pair",
    "messages_field": "messages",
    "label_field": "label",
    "target_field": "target",
}


@dataclass(frozen=True)
class Fields:
    """The names of the columns."""

    text: str = "text"
    text_pair: str = "text_pair"
    label: str = "label"
    target: str = "target"
    messages: str = "messages"

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Fields:
        """The names that options of :data:`COLUMN_OPTIONS` give, and the defaults of the others."""
        return cls(**{field: options[o] for o, field in COLUMN_OPTIONS.items() if o in options})


@dataclass(frozen=True)
class Rows:
    """The rows of one split, columns of equal length.

    Attributes:
        texts: the first text of each row; of a conversation its last message before the target.
        pairs: the second, or None if the task has one text only.
        labels: integers from 0, names, numbers, or lists of classes; None if the rows have none.
        source: where they come from, for messages.
        numbers: which row of the source each is, from 1; of a file of lines, which line.
        targets: the text that is to follow each text, or None if the rows have none.
        chats: the messages before each target, dicts of ``role`` and ``content``; None if the rows
            are no conversations.
    """

    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None
    labels: tuple[Any, ...] | None
    source: str
    numbers: tuple[int, ...]
    targets: tuple[str, ...] | None = None
    chats: tuple[tuple[dict[str, Any], ...], ...] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def all_texts(self) -> tuple[str, ...]:
        """Every text of every column, one column after another."""
        return (*self.texts, *(self.pairs or ()), *(self.targets or ()))

    def take(self, indices: Sequence[int]) -> Rows:
        """The rows with these indices, in this order."""
        picked: dict[str, Any] = {}
        for name in ("texts", "pairs", "labels", "numbers", "targets", "chats"):
            column = getattr(self, name)
            picked[name] = None if column is None else tuple(column[i] for i in indices)
        return dataclasses.replace(self, **picked)

    def fingerprint(self) -> str:
        """A hash of texts and answers, the same for the same rows in the same order."""
        further = [column for column in (self.targets, self.chats) if column is not None]
        content = json.dumps([self.texts, self.pairs, self.labels, *further])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


class _Table:
    """Collects the checked rows of one source."""

    def __init__(self, source: str, fields: Fields, answer: str) -> None:
        check_choice("answer", answer, ANSWERS)
        must, self.may_have = _COLUMNS[answer]
        self.source, self.fields, self.answer = source, fields, answer
        self.must_have = ("text", *must)
        self.columns: dict[str, list[Any]] = {n: [] for n in (*self.must_have, *self.may_have)}
        self.chats: list[tuple[dict[str, Any], ...]] = []
        self.numbers: list[int] = []

    def fail(self, number: int, name: str, expected: str, got: str) -> DataError:
        return DataError(f"{self.source}, row {number}: {name}: expected {expected}, got {got}")

    def text(self, number: int, name: str, value: object) -> str:
        if not isinstance(value, str):
            raise self.fail(number, name, "a string", _show(value))
        if not (value.strip() or self.answer == "none"):  # an empty one can be answered, too
            got = "an empty string" if not value else "only spaces"
            raise self.fail(number, name, "text", got)
        try:
            value.encode()
        except UnicodeEncodeError as error:
            got = f"a lone surrogate ({error.reason})"
            raise self.fail(number, name, "Unicode text", got) from None
        return value

    def label(self, number: int, name: str, value: object) -> Any:
        first = next(iter(self.columns["label"]), None)
        expected = check_label(value, first)
        if expected is not None:
            raise self.fail(number, name, expected, _show(value))
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, str):
                self.text(number, name, each)
        return value

    def add(self, number: int, row: Mapping[str, object]) -> None:
        messages, text = self.fields.messages, self.fields.text
        if self.answer != "label" and text not in row and messages in row:
            return self._add_chat(number, row[messages])
        for column, values in self.columns.items():
            name = str(getattr(self.fields, column))
            if column in self.must_have and name not in row:
                got = f"only {', '.join(map(str, row)) or 'none'}"
                raise self.fail(number, name, "the field", got)
            value = row.get(name)
            if column in self.may_have:
                if self.numbers and bool(values) != (value is not None):
                    what = "a target" if column == "target" else "a second text"
                    had, got = (what, "none") if values else ("none", "one")
                    raise self.fail(number, name, f"{had} as in the rows before", got)
                if value is None:
                    continue
            check = self.label if column == "label" else self.text
            values.append(check(number, name, value))
        self.numbers.append(number)
        return None

    def _add_chat(self, number: int, messages: object) -> None:
        """A row for each reply of the assistant, or one if the last message is to be answered."""
        name = self.fields.messages
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise self.fail(number, name, "a list of dicts of role and content", _show(messages))
        said = [{key: m[key] for key in m if m[key] is not None} for m in messages]  # Arrow's None
        for message in said:
            for key in ("role", "content"):
                self.text(number, f"{name}: {key}", message.get(key))
        ends = [i for i, message in enumerate(said) if i and message["role"] == "assistant"]
        if self.answer == "none":
            ends = [len(said)] if said and said[-1]["role"] != "assistant" else []
        if not ends:
            wanted = "a last message to answer" if self.answer == "none" else "a reply to learn"
            raise self.fail(number, name, wanted, "none (role: assistant)")
        if bool(self.chats) != bool(self.numbers):
            raise self.fail(number, name, "a text as in the rows before", "messages")
        for end in ends:
            self.chats.append(tuple(said[:end]))
            self.columns["text"].append(said[end - 1]["content"])
            if self.answer != "none":
                self.columns["target"].append(said[end]["content"])
            self.numbers.append(number)

    def rows(self) -> Rows:
        if not self.numbers:
            raise DataError(f"{self.source}: expected at least one row, got none")
        found = {column: tuple(values) or None for column, values in self.columns.items()}
        return Rows(
            texts=found["text"] or (),
            pairs=found.get("text_pair"),
            labels=found.get("label"),
            source=self.source,
            numbers=tuple(self.numbers),
            targets=found.get("target"),
            chats=tuple(self.chats) or None,
        )


def _show(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def read_rows(
    path: str | Path,
    *,
    suffix: str | None = None,
    source: str | None = None,
    fields: Fields | None = None,
    answer: str = "label",
) -> Rows:
    """Read a file; the suffix says how.

    JSONL: one object per line. CSV: a header, quoting as usual. TSV: a header, no quoting, as in
    GLUE. ``.txt``: one text per line. JSON (a list of objects), Parquet and Arrow too. Fields that
    are not asked for are ignored.

    Blank lines are skipped and empty texts refused, unless the answer is ``"none"``: such rows are
    to be answered, one for one. Every line of a ``.txt`` and of a CSV is then a text, which may be
    empty, and a blank line of JSONL is an error.

    Args:
        path: the file.
        suffix: the one to read it by, in place of its own.
        source: what it is called in messages, in place of ``path``.
        fields: the names of the columns.
        answer: what each row has beside its text: a ``"label"``, a ``"target"``, an ``"optional
            target"`` (in all rows or in none), or ``"none"``. Second texts are read beside labels
            and if there is no answer. Rows with ``messages`` and no text are conversations; unless
            they have labels, each of the assistant's messages is the target of those before it.

    Raises:
        DataError: a missing file, an unknown suffix or a malformed row, which the message names.
    """
    path = Path(path)
    suffix, source = (suffix or path.suffix).lower(), source or str(path)
    table = _Table(source, fields or Fields(), answer)
    if suffix not in _READERS:
        known = ", ".join(SUFFIXES)
        raise DataError(f"{source}: expected a file ending in {known}, got {suffix!r}")
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{source}: expected a readable file, got {reason}") from None
    if not empty:
        read = _lines if _READERS[suffix] is None else _cells
        for number, row in read(path, suffix, table):
            table.add(number, row)
    return table.rows()


_Numbered = Iterable[tuple[int, Mapping[str, object]]]


def _lines(path: Path, suffix: str, table: _Table) -> _Numbered:
    try:
        # Nothing but "\n" ends a line: others may stand inside a text.
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            lines = [line.removesuffix("\n").rstrip("\r") for line in file]
    except UnicodeDecodeError as error:
        raise DataError(f"{table.source}: expected UTF-8, got others ({error})") from None
    for number, line in enumerate(lines, 1):
        if line.strip() or table.answer == "none":  # then every line counts
            json_ = suffix == ".jsonl"
            yield number, _parsed(line, number, table) if json_ else {table.fields.text: line}


def _parsed(line: str, number: int, table: _Table) -> dict[str, object]:
    try:
        row = load_json(line)
        got = _show(row)
    except (ValueError, RecursionError) as error:
        row, got = None, f"bad JSON ({error})" if line.strip() else "a blank line"
    if not isinstance(row, dict):
        raise DataError(f"{table.source}, row {number}: expected a JSON object, got {got}")
    return row


def _cells(path: Path, suffix: str, table: _Table) -> _Numbered:
    how: dict[str, Any] = {}
    if _READERS[suffix] == "csv":
        names = [getattr(table.fields, column) for column in table.columns if column != "label"]
        how = {
            "converters": dict.fromkeys(names, str),  # "007" is a text, and no number
            "keep_default_na": False,  # as is "NA"
            "na_filter": False,
            "skip_blank_lines": table.answer != "none",
        }
    if suffix == ".tsv":
        how |= {"sep": "\t", "quoting": csv.QUOTE_NONE}
    # The library takes the path for a pattern, and would keep a copy in its cache.
    pattern = "".join(f"[{c}]" if c in "*?[" else c for c in str(path.resolve()))
    with _quietly(table.source) as datasets, tempfile.TemporaryDirectory() as cache:
        how |= {"data_files": pattern, "cache_dir": cache, "keep_in_memory": True}
        found = datasets.load_dataset(_READERS[suffix], split="train", **how)
        rows = _listed(found, table)
    if rows and "__index_level_0__" in rows[0]:  # as pandas calls a first cell without a name
        raise DataError(f"{table.source}: expected as many cells as in the header, got more")
    return enumerate(rows, 1)


@contextlib.contextmanager
def _quietly(source: str) -> Iterator[Any]:
    """The datasets library, without its messages; DataError for whatever it raises."""
    require("datasets")
    import datasets  # type: ignore[import-untyped]

    level, bars = datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bar()
    try:
        yield datasets
    except Exception as error:  # it raises its own and its readers' many kinds
        reason = str(error.__cause__ or error) or type(error).__name__
        raise DataError(
            f"{source}: expected data that loads, got an error ({reason.splitlines()[0]})"
        ) from error
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bar()


def _listed(rows: Any, table: _Table) -> list[dict[str, Any]]:
    """The rows; labels that are numbers of classes with names as those names."""
    import datasets

    label, found = table.fields.label, rows.to_list()
    feature = rows.features.get(label)
    kind = getattr(feature, "feature", feature)  # of a list that of its elements
    if table.answer == "label" and isinstance(kind, datasets.ClassLabel):

        def named(value: Any) -> Any:
            if isinstance(value, list):
                return [named(each) for each in value]
            return kind.names[value] if value in range(len(kind.names)) else None

        found = [{**row, label: named(row[label])} for row in found]
    return found  # type: ignore[no-any-return]


def find_split(
    source: str | Path, split: str, *, fields: Fields | None = None, answer: str = "label"
) -> Rows | None:
    """One split of a data set; None if there is none.

    Args:
        source: a folder of files ``<split>.jsonl`` (or another of :data:`SUFFIXES`); a file, which
            is a split ``"train"``; a folder that ``save_to_disk`` of the ``datasets`` library has
            written; or whatever its ``load_dataset`` loads, as ``name`` or ``name:config``.
        split: its name.
        fields: the names of the columns.
        answer: as in :func:`read_rows`.

    Raises:
        DataError: no such source, two files of one split, or a malformed row.
    """
    splits = _splits(source, fields or Fields(), answer)
    return splits[split]() if split in splits else None


def read_split(
    source: str | Path, split: str, *, fields: Fields | None = None, answer: str = "label"
) -> Rows:
    """As :func:`find_split`; a file is whatever split is asked for, and so is a data set of one.

    Raises:
        DataError: as there, or no such split.
    """
    splits = _splits(source, fields or Fields(), answer)
    if _is_file(Path(source)) or (Path(source) / "state.json").is_file():
        split = "train"
    if split not in splits:
        names = ", ".join(splits) or "none"
        raise DataError(f"{source}: expected a split {split}, got {names}")
    return splits[split]()


def _splits(source: str | Path, fields: Fields, answer: str) -> dict[str, Callable[[], Rows]]:
    """What reads each split of a source."""
    path = Path(source)
    if _is_file(path):
        return {"train": partial(read_rows, path, fields=fields, answer=answer)}
    found: dict[str, Path] = {}
    for file in sorted(path.iterdir()) if path.is_dir() else ():
        if file.suffix in _READERS and not _OF_THE_LIBRARY.fullmatch(file.stem) and file.is_file():
            other = found.setdefault(file.stem, file)
            if other != file:
                raise DataError(
                    f"{path}: expected one file for each split, got {other.name} and {file.name}"
                )
    if not found:
        return _loaded_splits(str(source), fields, answer)
    return {
        name: partial(read_rows, file, fields=fields, answer=answer) for name, file in found.items()
    }


def _is_file(path: Path) -> bool:
    named = path.suffix.lower() in SUFFIXES
    return path.is_file() or (named and not path.is_dir())


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _loaded_splits(name: str, fields: Fields, answer: str) -> dict[str, Callable[[], Rows]]:
    with _quietly(f"data: {name!r}") as datasets:
        if _is_saved(Path(name)):
            found = datasets.load_from_disk(name)
            if isinstance(found, datasets.Dataset):
                found = {"train": found}
        else:
            path, _, configuration = name.partition(":")
            found = datasets.load_dataset(path, configuration or None)

    def read(split: str) -> Rows:
        table = _Table(f"{name}[{split}]", fields, answer)
        for number, row in enumerate(_listed(found[split], table), 1):
            table.add(number, row)
        return table.rows()

    return {split: partial(read, split) for split in found}


def hold_out(rows: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Split rows at random into training rows and held-out ones, at least one row each.

    Replies of one conversation stay together.
    """
    groups = sorted(set(rows.numbers))
    if len(groups) < 2:
        raise DataError(
            f"{rows.source}: expected 2 rows or more to hold some out, got {len(groups)}"
        )
    count = min(max(round(len(groups) * fraction), 1), len(groups) - 1)
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    held = {groups[i] for i in order[:count]}
    parts: tuple[list[int], list[int]] = ([], [])
    for i, number in enumerate(rows.numbers):
        parts[number in held].append(i)
    return rows.take(parts[0]), rows.take(parts[1])
