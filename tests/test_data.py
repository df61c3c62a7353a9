"""Reading rows, tokenising them and making batches of them."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from ept_fast.training.batches import Collator, GroupedBatches, length_batches
from ept_fast.training.data import (
    DataError,
    Fields,
    Rows,
    find_split,
    hold_out,
    read_rows,
    read_split,
)
from ept_fast.training.labels import LabelSet
from ept_fast.training.tokens import tokenise
from tests.tiny import save_model, save_task, write_rows

USER, REPLY = '{"role": "user", "content": "a"}', '{"role": "assistant", "content": "b"}'
LINE, TARGET = '{"text": "a", "label": 0}\n', '{"text": "a", "target": "b"}\n'

# name: (file, content, what the message must hold beside the file's name)
Case = tuple[str, str | bytes, list[str]]
MALFORMED: dict[str, Case] = {
    "bad JSON": ("d.jsonl", LINE + "{oops\n", ["row 2", "JSON object"]),
    "a number beyond reading": (
        "d.jsonl", f'{LINE}{{"label": {"9" * 5000}}}',
        ["row 2", "JSON object", "an integer of 5000 digits"],
    ),
    "a key twice": (
        "d.jsonl", LINE + '{"text": "a", "text": "b", "label": 0}',
        ["row 2", "JSON object", "the key 'text' twice"],
    ),
    "not an object": ("d.jsonl", '["a", 0]', ["row 1", "JSON object", "list"]),
    "deep JSON": ("d.jsonl", "[" * 200_000, ["row 1", "JSON"]),
    "no text": ("d.jsonl", '{"label": 0}', ["row 1", "text", "only label"]),
    "number as text": ("d.jsonl", '{"text": 3, "label": 0}', ["row 1", "text", "int 3"]),
    "null text": ("d.jsonl", '{"text": null, "label": 0}', ["row 1", "text", "NoneType"]),
    "empty text": ("d.jsonl", '{"text": "", "label": 0}', ["row 1", "text", "empty"]),
    "only spaces": ("d.jsonl", '{"text": " \\t", "label": 0}', ["row 1", "only spaces"]),
    "lone surrogate": (
        "d.jsonl", '{"text": "\\ud800", "label": 0}', ["row 1", "text", "surrogate"],
    ),
    "no label": ("d.jsonl", LINE + '{"text": "a"}', ["row 2", "label", "only text"]),
    "endless number": ("d.csv", "text,label\na,1.5\nb,inf\n", ["row 2", "label", "float inf"]),
    "null label": ("d.jsonl", '{"text": "a", "label": null}', ["row 1", "label", "NoneType None"]),
    "bool label": ("d.jsonl", '{"text": "a", "label": true}', ["row 1", "label", "bool True"]),
    "a class twice": ("d.jsonl", '{"text": "a", "label": ["x", "x"]}', ["row 1", "different"]),
    "classes of two kinds": (
        "d.jsonl", '{"text": "a", "label": ["x"]}\n' + LINE, ["row 2", "a list as in the rows"],
    ),
    "mixed labels": (
        "d.jsonl", LINE + '{"text": "a", "label": "x"}',
        ["row 2", "label", "an integer as in the rows before"],
    ),
    "pair comes late": (
        "d.jsonl", LINE + '{"text": "a", "text_pair": "b", "label": 0}',
        ["row 2", "text_pair", "none as in the rows before", "got one"],
    ),
    "pair is lost": (
        "d.jsonl", '{"text": "a", "text_pair": "b", "label": 0}\n' + LINE,
        ["row 2", "text_pair", "a second text as in the rows before", "got none"],
    ),
    "number as pair": (
        "d.jsonl", '{"text": "a", "text_pair": 1, "label": 0}', ["row 1", "text_pair", "int 1"],
    ),
    "not UTF-8": ("d.csv", b"text,label\na,0\n\xe9,1\n", ["utf-8", "0xe9"]),
    "no rows": ("d.jsonl", "\n \n", ["at least one row"]),
    "empty CSV": ("d.csv", "", ["at least one row"]),
    "empty JSON": ("d.json", "[]", ["no data"]),
    "no Parquet": ("d.parquet", "PAR1", ["data that loads", "Parquet"]),
    "no text column": ("d.csv", "sentence,label\na,0\n", ["row 1", "text", "sentence, label"]),
    "no label column": ("d.tsv", "text\na\n", ["row 1", "label"]),
    "too many columns": ("d.csv", "text,label\na,0\nb,c,1\n", ["2 fields in line 3, saw 3"]),
    "too few names": ("d.csv", "text,label\na,b,0\nb,c,1\n", ["cells as in the header, got more"]),
    "too few columns": ("d.tsv", "text\tlabel\na\tx\nb\n", ["row 2", "label", "empty"]),
    "open quote": ("d.csv", 'text,label\na,0\n"b,1\n', ["inside string"]),
    "empty label": ("d.csv", "text,label\na,x\nb,\n", ["row 2", "label", "empty"]),
    "unknown suffix": ("d.docx", "PK", [".jsonl, .txt, .json, .csv, .tsv, .parquet", ".docx"]),
    "text without labels": ("d.txt", "a\n", ["row 1", "label", "only text"]),
}  # fmt: skip
# The same of rows with targets; those with a "?" may all have none.
MALFORMED_TARGETS: dict[str, Case] = {
    "no target": ("d.jsonl", LINE, ["row 1", "only text, label"]),
    "null target": ("d.jsonl", '{"text": "a", "target": null}', ["target", "NoneType"]),
    "empty target": ("d.tsv", "text\ttarget\na\tb\nc\t\n", ["row 2", "target", "empty"]),
    "no column": ("d.csv", "text,label\na,b\n", ["row 1", "target", "text, label"]),
    "texts alone": ("d.txt", "a\n", ["row 1", "target", "only text"]),
    "messages of another form": ("d.jsonl", '{"messages": ["hello"]}', ["row 1", "list of dicts"]),
    "a message without a role": (
        "d.jsonl", '{"messages": [{"content": "a"}]}', ["row 1", "messages: role", "NoneType"],
    ),
    "nothing to learn": ("d.jsonl", f'{{"messages": [{USER}]}}', ["row 1", "a reply to learn"]),
    "messages among texts": (
        "d.jsonl", f'{TARGET}{{"messages": [{USER}, {REPLY}]}}', ["row 2", "a text as in the rows"],
    ),
    "? comes late": (
        "d.jsonl", '{"text": "a"}\n' + TARGET,
        ["row 2", "target", "none as in the rows before", "got one"],
    ),
    "? is lost": (
        "d.jsonl", TARGET + '{"text": "a"}',
        ["row 2", "target", "a target as in the rows before", "got none"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", [*MALFORMED, *MALFORMED_TARGETS])
def test_malformed_data_names_file_line_and_field(case: str, tmp_path: Path) -> None:
    answer = "optional target" if "?" in case else "target"
    if case in MALFORMED:
        answer = "label"
    name, content, parts = {**MALFORMED, **MALFORMED_TARGETS}[case]
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError) as caught:
        read_rows(path, answer=answer)
    message = str(caught.value)
    assert message.startswith(str(path)), message
    assert "\n" not in message
    missing = [part for part in parts if part not in message]
    assert not missing, message


def test_missing_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.csv: expected a readable file"):
        read_rows(tmp_path / "none.csv")


SAME_ROWS = {
    "d.jsonl": '{"text": "a, b", "text_pair": "c", "label": 1, "id": 7}\n\n'
    '{"label": 0, "text": "d\\u2028e", "text_pair": "f"}',
    "d.csv": '\ufefflabel,text,text_pair,id\r\n1,"a, b",c,7\r\n0,d\u2028e,f,8\r\n',
    "d.tsv": "text\ttext_pair\tlabel\na, b\tc\t1\nd\u2028e\tf\t0\n",
}


@pytest.mark.parametrize("name", SAME_ROWS)
def test_formats_give_the_same_rows(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(SAME_ROWS[name], encoding="utf-8", newline="")
    rows = read_rows(tmp_path / name)
    assert rows.texts == ("a, b", "d\u2028e")
    assert rows.pairs == ("c", "f")
    assert rows.labels == (1, 0)


FILES = {
    "d.jsonl": '{"text": "a, b", "target": "c", "text_pair": 5}\n{"target": "d", "text": "e"}\n',
    "d.csv": 'target,text\nc,"a, b"\nd,e\n',
    "d.tsv": "text\tother\ttarget\na, b\t1\tc\ne\t2\td\n",
}


@pytest.mark.parametrize("answer", ["target", "optional target"])
@pytest.mark.parametrize("name", FILES)
def test_formats_give_the_same_targets(name: str, answer: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(FILES[name])
    rows = read_rows(tmp_path / name, answer=answer)
    assert (rows.texts, rows.targets) == (("a, b", "e"), ("c", "d"))
    assert rows.pairs is None
    assert rows.labels is None
    assert rows.take([1]).targets == ("d",)
    assert hold_out(rows, 0.5, seed=0)[0].targets in (("c",), ("d",))


@pytest.mark.parametrize(
    ("name", "content"),
    [("d.txt", "a\n\nb\n"), ("d.jsonl", '{"text": "a"}\n{"text": "b", "target": null}\n')],
)
def test_texts_alone(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    rows = read_rows(tmp_path / name, answer="optional target")
    assert (rows.texts, rows.targets) == (("a", "b"), None)


def test_other_columns_and_folders(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [{"q": "a", "a": "b"}])
    rows = read_split(tmp_path, "train", fields=Fields(text="q", target="a"), answer="target")
    assert (rows.texts, rows.targets) == (("a",), ("b",))
    with pytest.raises(ValueError, match="answer: expected one of label, target, optional target"):
        read_rows(tmp_path / "train.jsonl", answer="text")


# every line or row of what is to be predicted: file, content, texts, the line of each
ASKED: dict[str, tuple[str, str, tuple[str, ...], tuple[int, ...]]] = {
    "blank lines": ("d.txt", "a\n\n \nb\n", ("a", "", " ", "b"), (1, 2, 3, 4)),
    "no line end": ("d.txt", "a\nb", ("a", "b"), (1, 2)),
    "a blank last line": ("d.txt", "a\r\n\r\n", ("a", ""), (1, 2)),
    "a line end alone": ("d.txt", "\n", ("",), (1,)),
    "empty in JSON": ("d.jsonl", '{"text": ""}\n{"text": " "}\n', ("", " "), (1, 2)),
    "empty in CSV": ("d.csv", "id,text\n1,\n,\n2,b\n", ("", "", "b"), (1, 2, 3)),
    "quoted in CSV": ("d.csv", 'text\n""\n" "\n', ("", " "), (1, 2)),
    "empty in TSV": ("d.tsv", "id\ttext\n\t\n2\tb\n", ("", "b"), (1, 2)),
    "a column of TSV": ("d.tsv", "text\n\nb\n", ("", "b"), (1, 2)),
    "a blank line of CSV": ("d.csv", "text\na\n\nb\n", ("a", "", "b"), (1, 2, 3)),
    "no numbers": ("d.csv", "text,n\n007,1\n1e3,3\n", ("007", "1e3"), (1, 2)),
    "no gaps": ("d.csv", "text,n\nNA,1\nnull,3\n", ("NA", "null"), (1, 2)),
    "no dates": ("d.jsonl", '{"text": "2026-11-30"}', ("2026-11-30",), (1,)),
}


@pytest.mark.parametrize("case", ASKED)
def test_no_line_is_left_out_of_what_is_asked(case: str, tmp_path: Path) -> None:
    name, content, texts, lines = ASKED[case]
    (tmp_path / name).write_text(content, newline="")
    rows = read_rows(tmp_path / name, answer="none")
    assert (rows.texts, rows.numbers) == (texts, lines)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", '{"text": "a"}\n\n{"text": "b"}\n', "row 2: expected .*, got a blank line"),
        ("d.jsonl", '{"text": "a"}\n \n', "row 2: expected a JSON object, got a blank line"),
        ("d.jsonl", '{"text": "a"}\n{"text": null}\n', "row 2: text: expected a string"),
        ("d.txt", "", "expected at least one row, got none"),
    ],
)
def test_a_line_without_a_row_is_an_error_if_answers_are_asked(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / name, answer="none")


def test_a_text_without_a_token_names_its_line() -> None:
    def tokenizer(text: list[str], **how: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[1] * len(each) for each in text]}

    tokenizer.num_special_tokens_to_add = lambda pair: 0  # type: ignore[attr-defined]
    rows = Rows(("ab", "", "c"), None, None, "d.txt", (1, 2, 3))
    message = r"^d\.txt, row 2: text: expected at least one token, got none of ''$"
    with pytest.raises(DataError, match=message):
        tokenise(rows, tokenizer, 4)


def test_tsv_does_not_read_quotes_and_csv_joins_lines(tmp_path: Path) -> None:
    (tmp_path / "d.tsv").write_text('text\tlabel\n"a\tx\n')
    (tmp_path / "d.csv").write_text('text,label\n"a\nb",x\nc,x\n')
    assert read_rows(tmp_path / "d.tsv").texts == ('"a',)
    assert read_rows(tmp_path / "d.csv").texts == ("a\nb", "c")


def test_other_column_names_and_unlabelled_rows(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"q": "a", "y": "yes", "text": 1}\n')
    rows = read_rows(path, fields=Fields(text="q", label="y"))
    assert (rows.texts, rows.labels) == (("a",), ("yes",))
    assert read_rows(path, fields=Fields(text="q"), answer="none").labels is None


def test_splits_of_a_folder(tmp_path: Path) -> None:
    save_task(tmp_path)
    rows = read_split(tmp_path, "validation")
    assert len(rows) == 40
    assert find_split(tmp_path, "dev") is None
    with pytest.raises(DataError, match=r"split dev, got test, train, validation"):
        read_split(tmp_path, "dev")
    (tmp_path / "train.csv").write_text("text,label\n")
    with pytest.raises(
        DataError, match=r"one file for each split, got train\.csv and train\.jsonl"
    ):
        read_split(tmp_path, "train")


def test_without_the_library_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d.csv").write_text("text\na\n")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "datasets" else find(n))
    with pytest.raises(
        ImportError, match=r'datasets not installed: pip install "ept-fast\[train\]"'
    ):
        read_rows(tmp_path / "d.csv", answer="none")


def test_names_are_loaded_by_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, configuration: str | None) -> Any:
        asked.append((name, configuration))
        if name == "gone":
            raise ConnectionError("no such set\nand more")
        rows = [{"sentence": "a", "label": 0}, {"sentence": "", "label": 1}]
        return datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"glue:sst2\[train\], row 2: sentence: .* empty"):
        read_split("glue:sst2", "train", fields=Fields(text="sentence"))
    assert asked == [("glue", "sst2")]
    assert find_split("glue:sst2", "dev") is None
    with pytest.raises(DataError, match="expected a split dev, got train"):
        read_split("glue:sst2", "dev")
    with pytest.raises(DataError, match=r"'gone': .* \(no such set\)$"):
        read_split("gone", "train")


ROWS = [{"text": "a", "label": 1, "id": 7}, {"text": "b", "label": 0, "id": 8}]


def _named(names: list[str]) -> Any:
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=names),
            "id": datasets.Value("int64"),
        }
    )
    return datasets.Dataset.from_list(ROWS, features=features)


@pytest.mark.parametrize("form", ["parquet", "arrow", "json", "set", "sets", "folder", "shards"])
def test_forms_of_the_datasets_library(form: str, tmp_path: Path) -> None:
    found = datasets.Dataset.from_list(ROWS)
    data = tmp_path / "data"
    if form == "parquet":
        found.to_parquet(data := tmp_path / "d.parquet")
    elif form == "json":
        (data := tmp_path / "d.json").write_text(json.dumps(ROWS))
    elif form == "arrow":
        found.save_to_disk(tmp_path / "set")
        data = next((tmp_path / "set").glob("*.arrow")).rename(tmp_path / "d.arrow")
    elif form == "set":
        found.save_to_disk(data)
    elif form == "sets":
        datasets.DatasetDict({"train": found, "test": found.select([1])}).save_to_disk(data)
    else:  # as repositories of the hub are laid out
        for split in ("train", "test"):
            place = data / "data" if form == "folder" else data
            found.to_parquet(place / f"{split}-00000-of-00001.parquet")
        (data / "dataset_infos.json").write_text("{}")
    rows = read_split(data, "train")
    assert (rows.texts, rows.labels, rows.numbers) == (("a", "b"), (1, 0), (1, 2))
    test = find_split(data, "test")
    assert (None if test is None else len(test)) == {"sets": 1, "folder": 2, "shards": 2}.get(form)
    assert find_split(data, "validation") is None


def test_named_classes_are_their_names(tmp_path: Path) -> None:
    _named(["no", "yes"]).to_parquet(tmp_path / "train.parquet")
    assert read_split(tmp_path, "train").labels == ("yes", "no")
    found = _named(["no", "yes"]).map(lambda row: {**row, "label": -1})  # as GLUE's tests have it
    found.to_parquet(tmp_path / "test.parquet")
    with pytest.raises(DataError, match=r"test\.parquet, row 1: label: expected .*, got NoneType"):
        read_split(tmp_path, "test")
    several = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.List(datasets.ClassLabel(names=["x", "y"])),
        }
    )
    rows = [{"text": "a", "label": [1, 0]}, {"text": "b", "label": []}]
    datasets.Dataset.from_list(rows, features=several).to_parquet(tmp_path / "many.parquet")
    assert read_rows(tmp_path / "many.parquet").labels == (["y", "x"], [])


def test_a_file_is_not_a_pattern_and_leaves_nothing_in_the_cache(tmp_path: Path) -> None:
    (tmp_path / "d[1]*.csv").write_text("text\na\n")
    (tmp_path / "d1.csv").write_text("text\nb\n")
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    before = sorted(cache.rglob("*"))
    assert read_rows(tmp_path / "d[1]*.csv", answer="none").texts == ("a",)
    assert sorted(cache.rglob("*")) == before


CHAT = [
    {"role": "system", "content": "be short"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_each_reply_of_a_conversation_is_a_target(form: str, tmp_path: Path) -> None:
    path = tmp_path / f"d.{form}"
    talks = [{"messages": CHAT}, {"messages": CHAT[1:3]}]
    if form == "jsonl":
        write_rows(path, talks)
    else:
        datasets.Dataset.from_list(talks).to_parquet(path)
    rows = read_rows(path, answer="optional target")
    assert rows.texts == ("a", "c", "a")
    assert rows.targets == ("b", "d", "b")
    assert rows.chats == (tuple(CHAT[:2]), tuple(CHAT[:4]), (CHAT[1],))
    assert rows.numbers == (1, 1, 2)
    kept, held = hold_out(rows, 0.5, seed=0)
    assert {kept.numbers, held.numbers} == {(1, 1), (2,)}  # a conversation stays whole
    assert rows.fingerprint() != dataclasses.replace(rows, chats=None).fingerprint()


def test_the_last_message_is_to_be_answered(tmp_path: Path) -> None:
    write_rows(tmp_path / "d.jsonl", [{"messages": CHAT[:4]}])
    rows = read_rows(tmp_path / "d.jsonl", answer="none")
    assert (rows.texts, rows.chats, rows.targets) == (("c",), (tuple(CHAT[:4]),), None)
    write_rows(tmp_path / "d.jsonl", [{"messages": CHAT}])
    with pytest.raises(DataError, match="row 1: messages: expected a last message to answer"):
        read_rows(tmp_path / "d.jsonl", answer="none")


def _rows(labels: tuple[Any, ...]) -> Rows:
    count = len(labels)
    return Rows(("t",) * count, None, labels, "d.jsonl", tuple(range(1, count + 1)))


def test_label_sets() -> None:
    names = LabelSet.of(_rows(("no", "yes", "maybe", "no")))
    assert names == LabelSet(("maybe", "no", "yes"), integers=False)
    assert names.ids(_rows(("yes", "maybe"))) == (2, 0)
    integers = LabelSet.of(_rows((2, 0, 1)))
    assert integers == LabelSet(("0", "1", "2"), integers=True)
    assert integers.ids(_rows((2, 2))) == (2, 2)
    assert LabelSet.of(_rows((3, 0)), num_labels=5).names == ("0", "1", "2", "3", "4")
    several = LabelSet.of(_rows((["no", "yes"], [], ["maybe"])))
    kind = "multi_label_classification"
    assert several == LabelSet(("maybe", "no", "yes"), integers=False, problem_type=kind)
    assert several.ids(_rows((["yes"], []))) == ((0.0, 0.0, 1.0), (0.0, 0.0, 0.0))
    numbers = LabelSet.of(_rows((1, 2.5, -3)))
    assert numbers == LabelSet(("value",), integers=False, problem_type="regression")
    assert numbers.ids(_rows((4, 0.5))) == (4.0, 0.5)
    assert LabelSet.of(_rows((1, 2)), problem_type="regression") == numbers


def test_class_weights() -> None:
    rows = _rows(("a", "a", "a", "b", "c", "c"))
    labels = LabelSet.of(rows)
    assert labels.weights({"c": 3}) == [1.0, 1.0, 3.0]
    # In all, a class weighs 2: 6 rows of 3 classes.
    assert labels.balanced_weights(rows) == pytest.approx([2 / 3, 2, 1])
    assert LabelSet.of(_rows((0, 2)), 3).balanced_weights(_rows((0, 2))) == [1.0, 1.0, 1.0]
    several = _rows((["a", "b"], ["a"], ["a"], []))
    assert LabelSet.of(several).balanced_weights(several) == pytest.approx([1 / 3, 3])
    with pytest.raises(ValueError, match="class_weights: expected one of a, b, c, got 'd'"):
        labels.weights({"d": 1})


@pytest.mark.parametrize(
    ("labels", "num_labels", "message"),
    [
        ((0, 0), None, "at least 2 classes, got 1"),
        (("x",), None, "at least 2 classes, got 1"),
        ((0, 3), None, "every class from 0 to 3, got no row of class 1"),
        ((*range(50_000), 99_999), None, "to 99999, got no row of class 50000"),
        ((0, 10**9), None, "row 2: label: expected .* below 100000, got 1000000000"),
        (([0], ["x"]), None, "row 2: label: expected an integer >= 0 and below 100000, got 'x'"),
        ((["x"], [0]), None, "row 2: label: expected a name, got 0"),
        ((0, -1), None, "row 2: label: expected an integer >= 0 .*, got -1"),
        (tuple(map(str, range(100_001))), None, "at most 100000 classes, got 100001"),
        ((0, 1, 2), 2, "row 3: label: expected an integer >= 0 and below 2, got 2"),
        (("a", "b"), 3, "num_labels 3 names, got 2"),
        (None, None, "a label in every row"),
        (([], []), None, "at least 2 classes, got 0"),
        ((["a"], []), None, "at least 2 classes, got 1"),
        (([0], [2]), None, "every class from 0 to 2, got no row of class 1"),
        (([0], [1, 2]), 2, "row 2: label: expected an integer >= 0 and below 2, got 2"),
    ],
)
def test_label_set_errors(labels: Any, num_labels: int | None, message: str) -> None:
    rows = _rows(labels) if labels else Rows(("t",), None, None, "d.jsonl", (1,))
    with pytest.raises(DataError, match=message):
        LabelSet.of(rows, num_labels)


def test_label_sets_of_many_classes_are_found_at_once() -> None:
    rows = _rows(tuple(range(100_000)))
    assert LabelSet.of(rows) == LabelSet.of(rows, num_labels=100_000)
    with pytest.raises(ValueError, match="num_labels: expected None for a regression, got 2"):
        LabelSet.of(_rows((0.5, 1)), num_labels=2)
    for kind, wanted in (("regression", "a number"), ("multi_label_classification", "a list")):
        with pytest.raises(DataError, match=f"row 1: label: expected {wanted}.*, got 'a'"):
            LabelSet.of(_rows(("a", "b")), problem_type=kind)
    with pytest.raises(ValueError, match="num_labels: expected an integer <= 100000, got 1000000"):
        LabelSet.of(rows, num_labels=1_000_000)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ((0, 2), "row 2: label: expected an integer from 0 to 1, got 2"),
        (("0",), "row 1: label: expected an integer from 0 to 1, got '0'"),
        (([0],), r"row 1: label: expected an integer from 0 to 1, got \[0\]"),
    ],
)
def test_labels_unknown_in_training_are_errors(labels: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        LabelSet(("0", "1"), integers=True).ids(_rows(labels))


def test_hold_out_divides_the_rows() -> None:
    rows = _rows(tuple(range(50)))
    kept, held = hold_out(rows, 0.2, seed=3)
    assert (len(kept), len(held)) == (40, 10)
    assert sorted((*kept.labels, *held.labels)) == list(range(50))  # type: ignore[misc]
    assert hold_out(rows, 0.2, seed=3) == (kept, held)
    assert hold_out(rows, 0.2, seed=4) != (kept, held)
    with pytest.raises(DataError, match="2 rows"):
        hold_out(_rows((1,)), 0.5, seed=0)


def test_tokenise_cuts_and_counts(tmp_path: Path) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(save_model(tmp_path))
    texts = ["the play was fine", "the " * 30, "a"]
    lines = [{"text": t, "text_pair": "a song", "label": i % 2} for i, t in enumerate(texts)]
    rows = read_rows(write_rows(tmp_path / "d.jsonl", lines))
    tokens = tokenise(rows, tokenizer, 12, LabelSet.of(rows))
    assert tokens.num_cut == 1
    assert tokens.lengths == [9, 12, 6]
    first = tokens[0]
    assert tokenizer.decode(first["input_ids"]) == "[CLS] the play was fine [SEP] a song [SEP]"
    assert first["token_type_ids"] == [0] * 6 + [1] * 3
    assert first["labels"] == 0
    assert "labels" not in tokenise(rows, tokenizer, 12)[0]


@pytest.mark.parametrize(("paired", "least"), [(False, 3), (True, 5)])
def test_a_limit_without_room_for_the_text_is_an_error(
    paired: bool, least: int, tmp_path: Path
) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(save_model(tmp_path))
    pairs = ("a song was fine",) if paired else None
    rows = Rows(("the play was fine",), pairs, None, "d", (1,))
    assert tokenise(rows, tokenizer, least).lengths == [least]
    message = rf"max_length: expected at least {least}, .* {least - 1 - paired} special .*, got "
    for limit in range(1, least):
        with pytest.raises(ValueError, match=message + str(limit)):
            tokenise(rows, tokenizer, limit)


@pytest.mark.parametrize("side", ["right", "left"])
def test_collator_pads_to_the_longest_of_the_batch(side: str) -> None:
    rows = [
        {"input_ids": [5, 6, 7], "token_type_ids": [0, 0, 1], "labels": 1},
        {"input_ids": [8], "token_type_ids": [1], "labels": 0},
    ]
    batch = Collator(pad_token_id=9, padding_side=side)(rows)
    short = {"right": ([8, 9, 9], [1, 0, 0]), "left": ([9, 9, 8], [0, 0, 1])}[side]
    assert batch["input_ids"].tolist() == [[5, 6, 7], short[0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], short[1]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 1], short[1]]
    assert batch["labels"].tolist() == [1, 0]


@pytest.mark.parametrize("group", [True, False])
@pytest.mark.parametrize("count", [1, 7, 16, 103])
def test_every_epoch_holds_every_row_once(count: int, group: bool) -> None:
    lengths = torch.randint(3, 40, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    epoch = -(-count // 8)
    batches = list(GroupedBatches(lengths, 8, 3 * epoch, seed=5, group=group))
    assert len(batches) == 3 * epoch
    for start in range(0, 3 * epoch, epoch):
        rows = [row for batch in batches[start : start + epoch] for row in batch]
        assert sorted(rows) == list(range(count))
    assert batches == list(GroupedBatches(lengths, 8, 3 * epoch, seed=5, group=group))
    if count > 8:
        assert batches != list(GroupedBatches(lengths, 8, 3 * epoch, seed=6, group=group))
        assert batches[:epoch] != batches[epoch : 2 * epoch]


@pytest.mark.parametrize("group", [True, False])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("count", [3, 7, 16, 25, 103])
def test_steps_of_epochs_are_those_of_the_batches(count: int, parts: int, group: bool) -> None:
    lengths = torch.randint(3, 40, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = GroupedBatches(lengths, 2, 1000, seed=5, group=group, parts=parts)
    seen, ends = 0, [0]  # the steps after which every epoch ends
    rows = iter(batches)
    for step in range(1, 1001):
        seen += sum(len(next(rows)) for _ in range(parts))
        if seen % count == 0:
            ends.append(step)
    for epochs in (1e-9, 0.5, 1, 1.25, 3.3, 7):
        whole, part = int(epochs), epochs - int(epochs)
        expected = ends[whole] + math.ceil(part * (ends[whole + 1] - ends[whole]))
        assert batches.steps_of(epochs) == expected


def test_steps_of_endless_epochs_are_refused_at_once() -> None:
    few = GroupedBatches([4] * 20, 2, 0, seed=0)
    assert few.steps_of(214_748_364) == 2_147_483_640
    for epochs in (214_748_365, 1e18, 1e308):
        with pytest.raises(
            ValueError, match=rf"epochs: expected at most 2147483647 .*{re.escape(str(epochs))}"
        ):
            few.steps_of(epochs)


def test_grouping_saves_padding_without_ordering_the_batches() -> None:
    lengths = torch.randint(3, 80, (4000,), generator=torch.Generator().manual_seed(0)).tolist()

    def padding(group: bool) -> int:
        batches = GroupedBatches(lengths, 16, 250, seed=0, group=group)
        return sum(max(lengths[i] for i in b) * len(b) for b in batches) - sum(lengths)

    assert padding(group=True) < 0.1 * padding(group=False)
    longest = [max(lengths[i] for i in b) for b in GroupedBatches(lengths, 16, 50, seed=0)]
    assert longest != sorted(longest)
    assert longest != sorted(longest, reverse=True)


def test_evaluation_batches_are_sorted_and_whole() -> None:
    lengths = [3, 9, 4, 9, 1]
    assert length_batches(lengths, 2) == [[1, 3], [2, 0], [4]]


def test_fingerprint_sees_every_column() -> None:
    rows = Rows(("a", "b"), ("c", "d"), (0, 1), "x", (1, 2), ("e", "f"))
    changes: list[dict[str, Any]] = [
        {"texts": ("a", "B")},
        {"pairs": ("c", "D")},
        {"pairs": None},
        {"labels": (1, 0)},
        {"targets": ("e", "F")},
        {"targets": None},
    ]
    prints = {dataclasses.replace(rows, **change).fingerprint() for change in ({}, *changes)}
    assert len(prints) == 1 + len(changes)
    moved = dataclasses.replace(rows, source="y", numbers=(3, 4))
    assert moved.fingerprint() == rows.fingerprint()
