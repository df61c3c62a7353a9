"""The benchmarks of the search on a tiny model, and the example of docs/search.md."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bench import candidates, search
from tests.tiny import save_model, task_rows, write_rows


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_candidates_are_timed_in_three_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = save_model(tmp_path / "model"), tmp_path / "out.csv"
    monkeypatch.setattr(candidates, "LENGTHS", {"short": (2, 9)})
    words = [f"--model={model}", "--candidates=3", "--batch=2", "--rounds=1", f"--out={out}"]
    done = CliRunner().invoke(candidates.main, words, catch_exceptions=False)
    rows = rows_of(out)
    assert [row["model"] for row in rows] == ["model", "random Llama"]
    assert all(float(row["error"]) < 1e-4 for row in rows)
    assert all(float(row["one_by_one_ratio"]) > 0 for row in rows)
    assert len(done.output.splitlines()) == 2 + len(rows) + 1


def test_the_search_writes_a_row_for_each_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = save_model(tmp_path / "model", words=["great", "terrible"]), tmp_path / "out.csv"
    task = tmp_path / "few_shot/sst2"
    write_rows(task / "13/train.jsonl", task_rows(16, 0))
    write_rows(task / "test.jsonl", task_rows(10, 1))
    monkeypatch.setattr(search, "STEPS", 2)
    words = [
        f"--data={tmp_path}", f"--model={model}", "--tasks=sst2", "--seeds=13", "--evaluations=9",
        "--rows=4", "--test-rows=6", f"--out={out}",
    ]  # fmt: skip
    tables = []
    for _ in range(2):
        done = CliRunner().invoke(search.main, words, catch_exceptions=False)
        tables.append(done.output)
    assert tables[0] == tables[1]
    rows = rows_of(out)
    by_part: dict[str, list[str]] = {}
    for row in rows:
        by_part.setdefault(row["part"], []).append(row["method"])
    assert by_part == {
        "rlprompt": ["no prompt", "random search", "RLPrompt, greedy", "RLPrompt, best seen"],
        "batprompt": [
            "no prompt", "clean choice", "robust search", "soft prompt", "soft prompt, adversarial",
        ],
    }  # fmt: skip
    assert all(
        0 <= float(row["worst"]) <= float(row["clean"]) <= 1
        for row in rows
        if row["part"] == "batprompt"
    )


def test_the_documents_example_runs(
    root: Path, minilm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (root / "docs" / "search.md").read_text(encoding="utf-8")
    example = page.partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(compile(example, "docs/search.md", "exec"), names)
    assert capsys.readouterr().out == "torch.Size([2, 2, 2])\n"
    assert names["logits"].argmax(-1).tolist() == [[0, 1], [0, 1]]
