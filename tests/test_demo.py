"""The demo: its task, the check of its encoder, and a run from end to end."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import string
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from ept_fast.cli import main
from ept_fast.training import demo


def words_of(text: str) -> list[str]:
    return text.lower().translate(str.maketrans("", "", string.punctuation)).split()


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[str, str]]]:
    """The messages of each split with their intents, as the demo reads them."""
    folder = demo.write_demo_task(tmp_path_factory.mktemp("task") / "new")
    found = {}
    for split in ("train", "test"):
        text = (folder / f"{split}.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()]
        assert all(set(row) == {"text", "label"} for row in rows)
        found[split] = [(row["text"], row["label"]) for row in rows]
    return found


def test_task_is_balanced_and_without_repeats(task: dict[str, list[tuple[str, str]]]) -> None:
    for split, each in (("train", 100), ("test", 30)):
        texts = [text for text, _ in task[split]]
        assert Counter(label for _, label in task[split]) == dict.fromkeys(demo.INTENTS, each)
        assert len(set(texts)) == len(texts)
        assert not set(texts) & set(demo.NEW_MESSAGES)
        for text in texts:
            assert text[0].isupper()
            assert text[-1] in ".?"
            assert not set(text) & set("{}")


def test_splits_share_no_message(task: dict[str, list[tuple[str, str]]]) -> None:
    """A test message may share short phrases with the training split, never most words."""
    seen = [set(words_of(text)) for text, _ in task["train"]]
    for text, _ in task["test"]:
        words = set(words_of(text))
        assert max(len(words & other) / len(words | other) for other in seen) < 0.7, text


@pytest.fixture
def encoder_copy(minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the encoder's small files, linked weights, found in place of the package's."""
    folder = tmp_path / "package" / "model"
    folder.mkdir(parents=True)
    for name in demo.ENCODER_FILES:
        if name == "model.safetensors":
            (folder / name).symlink_to(minilm / name)
        else:
            (folder / name).write_bytes((minilm / name).read_bytes())
    spec = SimpleNamespace(origin=str(folder.parent / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    return folder


def change(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    path.write_bytes(data)


def test_encoder_is_found_and_verified(
    minilm: Path, encoder_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert demo.find_encoder() == encoder_copy
    for name in demo.ENCODER_FILES:
        kept = (encoder_copy / name).rename(encoder_copy / "kept")
        shutil.copy(kept, encoder_copy / name)
        for damage, message in ((change, "nothing was loaded"), (os.unlink, "no readable file")):
            damage(encoder_copy / name)
            with pytest.raises(demo.DemoError, match=f"{name}: expected the SHA-256 .*{message}"):
                demo.find_encoder()
        kept.rename(encoder_copy / name)
    assert demo.find_encoder() == encoder_copy
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.2.0")
    with pytest.raises(demo.DemoError, match=r"expected version 0\.1\.0 installed, got 0\.2\.0"):
        demo.find_encoder()


def test_missing_encoder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setitem(sys.modules, "transformers", None)  # the demo extra holds it too
    result = CliRunner().invoke(main, ["demo", "--output", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert 'got none: pip install "ept-fast[demo]"' in result.output
    assert not (tmp_path / "out").exists()


def test_what_is_refused(tmp_path: Path) -> None:
    mine = tmp_path / "thesis.txt"
    mine.write_text("mine")
    with pytest.raises(FileExistsError, match=r"thesis\.txt in it"):
        demo.run_demo(tmp_path, steps=1)
    with pytest.raises(FileExistsError, match="output: expected a folder, got the file"):
        demo.run_demo(mine, steps=1)
    for name in ("steps", "seed"):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            demo.run_demo(tmp_path / "out", **{name: -1})
    assert list(tmp_path.iterdir()) == [mine]


@pytest.mark.support(row="EPT", column="learning")
@pytest.mark.slow
@pytest.mark.default_algorithms
def test_demo_learns_and_tells(minilm: Path, tmp_path: Path) -> None:
    output = tmp_path / "demo"
    result = CliRunner().invoke(main, ["demo", "--output", str(output), "--steps", "60"])
    assert result.exit_code == 0, result.output
    metrics = json.loads((output / "run" / "metrics.json").read_text())
    before, after = metrics["before"]["accuracy"], metrics["after"]["accuracy"]
    assert before < 0.4  # chance is one in six
    assert after > 0.8
    counts = metrics["parameters"]
    trained = counts["prompt"] + counts["head"]
    assert trained < 0.001 * counts["frozen"]
    said = f"accuracy: {before:.4f} before, {after:.4f} after 60 steps (180 rows)"
    for line in (
        said,
        f"accuracy once loaded again: {after:.4f}",
        f"parameters trained: {trained:,}",
    ):
        assert line in result.output
    assert "training: 60 of 60 steps, loss " in result.output
    assert "\r" not in result.output
    for message in demo.NEW_MESSAGES:
        assert message in result.output
    for name in ("learning_curves.png", "gate_weights.png"):
        assert str(output / "run" / name) in result.output
        assert (output / "run" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("empty_pictures")
def test_second_run_replaces_the_first(
    minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = demo.write_demo_task

    def write_few(folder: Path) -> Path:
        for path in write(folder).iterdir():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            path.write_text("".join(lines[::15]), encoding="utf-8")
        return folder

    monkeypatch.setattr(demo, "write_demo_task", write_few)
    runs = [
        demo.run_demo(tmp_path / "demo", steps=1, seed=seed, progress=False) for seed in (0, 0, 1)
    ]
    assert (tmp_path / "demo" / "run" / "adapter" / "ept_model.safetensors").is_file()
    for key in ("before", "after", "predictions", "parameters", "reloaded"):
        assert runs[0][key] == runs[1][key], key
    assert runs[0]["after"]["accuracy"] == runs[0]["reloaded"]["accuracy"]
    assert runs[0]["predictions"] != runs[2]["predictions"]
