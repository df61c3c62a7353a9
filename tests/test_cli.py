"""The command line: the whole way through it, and one line for every mistake."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import resource
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result

import ept_fast
from ept_fast.cli import main
from ept_fast.ops import dispatch
from ept_fast.storage import files
from ept_fast.training.config import TrainConfig
from ept_fast.training.data import SUFFIXES
from ept_fast.training.job import train as run
from ept_fast.training.metrics import LABEL_METRICS
from tests.tiny import (
    answer_rows,
    options,
    save_llama,
    save_model,
    save_task,
    small_run,
    task_rows,
    write_rows,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def call(*words: str | Path, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], input=stdin)


@dataclasses.dataclass(frozen=True)
class Workplace:
    model: Path
    data: Path
    output: Path
    said: str


def made(model: Path, data: Path, output: Path, *words: str, **settings: Any) -> Workplace:
    """A run made by the command line, and what it said."""
    run = small_run(model, data, output, max_steps=6, eval_steps=3, **settings)
    result = call("train", *options(run), *words, "--quiet")
    assert result.exit_code == 0, result.output
    return Workplace(model, data, output, result.stdout)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    folder = tmp_path_factory.mktemp("cli")
    model, data = save_model(folder / "model"), save_task(folder / "data")
    return made(model, data, folder / "out", max_length=10)


@pytest.fixture(scope="module")
def writing(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A run of a text task."""
    folder = tmp_path_factory.mktemp("writing")
    model = save_llama(folder / "model", steps=20)
    data = save_task(folder / "data", answer_rows)
    return made(
        model, data, folder / "out", "--packing",
        task="causal", max_target_length=3, prompt_length=48,
        eval_generate=5, gradient_accumulation_steps=2, separator=" :",
    )  # fmt: skip


@pytest.mark.parametrize("task", ["trained", "writing"])
def test_train_says_what_came_out(task: str, request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue(task)
    metrics = json.loads((run.output / "metrics.json").read_text())
    lines = dict(line.split(": ", 1) for line in run.said.splitlines())
    rows = {"accuracy": 40}
    if task == "writing":
        rows = {"token_accuracy": 40, "loss": 40, "exact_match": 5, "f1": 5}
    for name, count in rows.items():
        before, after = metrics["before"][name], metrics["after"][name]
        expected = f"{before:.4f} before, {after:.4f} after 6 steps ({count} rows)"
        assert lines[name.replace("_", " ")] == expected
    assert lines["evaluated on"] == str(run.data / "validation.jsonl")
    assert lines["time per step"].endswith(" ms (median)")
    counts, head = metrics["parameters"], 66 if task == "trained" else 0
    assert lines["parameters trained"].startswith(
        f"{counts['prompt'] + head:,} (prompt {counts['prompt']:,}, head {head}), "
    )
    for name in ("adapter", "metrics"):
        assert Path(lines[name]).exists()
    for picture in lines["pictures"].split(", "):
        assert Path(picture).read_bytes()[:4] == b"\x89PNG"
    if task == "trained":
        cut = metrics["rows"]["train_cut"] + metrics["rows"]["evaluation_cut"]
        assert lines["rows cut to 10 tokens"] == f"{cut} of 136"
        assert cut > 0
        assert metrics["config"]["prompt_lr"] == 0.02
    else:
        assert lines["targets cut"] == "68 of 136"  # a target of three words and an end
        assert Path(lines["samples"]).read_text().count("\n## ") == 5
        assert metrics["config"]["packing"] is True


def test_no_subspaces_are_said_and_not_drawn(trained: Workplace, tmp_path: Path) -> None:
    settings = small_run(trained.model, trained.data, tmp_path / "out", max_steps=1, method="pt")
    result = call("train", *options(settings), "--quiet", "--no-eval-before")
    assert result.exit_code == 0, result.output
    assert "no subspaces, so no gate weights to draw" in result.stdout
    assert "accuracy: not measured before" in result.stdout
    assert not (tmp_path / "out" / "gate_weights.png").exists()


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("trained", ["accuracy", "macro_f1", "matthews"]),
        ("writing", ["loss", "token_accuracy", "exact_match", "f1"]),
    ],
)
def test_evaluate_prints_json(task: str, names: list[str], request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue(task)
    words = ("--adapter", run.output, "--data", run.data, "--split", "validation")
    result = call("evaluate", *words, "--eval-generate", "5")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    after = json.loads((run.output / "metrics.json").read_text())["after"]
    for name in names:
        assert found[name] == pytest.approx(after[name], rel=1e-5)
    assert (found["rows"], found.get("rows_generated", 5)) == (40, 5)


# Options, standard input, and the texts in it; an empty one has its place.
INPUTS: dict[str, tuple[list[str], str, list[str]]] = {
    "lines": ([], "the play was fine\n\n  \na dull song\n", ["", "  "]),
    "JSONL": (
        ["--format", "jsonl"], '{"text": "the play was fine"}\n{"text": "a dull song"}\n', [],
    ),
    "CSV with another column": (
        ["--format", "csv", "--text-field", "q"],
        'q,label\nthe play was fine,\n"",\na dull song,x\n',
        [""],
    ),
}  # fmt: skip


@pytest.mark.parametrize("task", ["trained", "writing"])
@pytest.mark.parametrize("case", INPUTS)
def test_predict_writes_a_line_for_each_text(
    case: str, task: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    words, text, empty = INPUTS[case]
    run = request.getfixturevalue(task)
    piped = call("predict", "--adapter", run.output / "adapter", *words, stdin=text)
    assert piped.exit_code == 0, piped.output
    lines = [json.loads(line) for line in piped.stdout.splitlines()]
    assert [line.pop("text") for line in lines] == ["the play was fine", *empty, "a dull song"]
    for line in lines:
        if task == "writing":
            assert line.keys() == {"output"}
        else:
            assert sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-5)
            assert line["probabilities"][str(line["label"])] >= 0.5
    source, target = tmp_path / "texts.anything", tmp_path / "new" / "labels.jsonl"
    source.write_text(text)
    forced = words or ["--format", "txt"]
    files = ("--input", source, "--output", target)
    result = call("predict", "--adapter", run.output, *files, *forced)
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert target.read_text() == piped.stdout


def test_texts_are_written_as_asked(writing: Workplace) -> None:
    words = ("--adapter", writing.output, "--max-new-tokens", "2", "--num-beams", "2")
    result = call("predict", *words, stdin="the play was fine\na dull song\n")
    assert result.exit_code == 0, result.output
    for line in result.stdout.splitlines():
        assert len(json.loads(line)["output"].split()) <= 2


def test_every_field_has_an_option_with_its_default() -> None:
    command = main.commands["train"]
    context = click.Context(command)
    found = {parameter.name: parameter for parameter in command.params}
    named = {"settings": "--set", "losses": "--loss", "class_weights": "--class-weight"}
    for field in dataclasses.fields(TrainConfig):
        parameter = found.pop(field.name)
        required = field.default is dataclasses.MISSING
        if field.name in named:  # NAME=VALUE, any number of them
            assert parameter.opts == [named[field.name]]
            continue
        assert parameter.required == required, field.name
        if not required:
            assert parameter.get_default(context) == field.default, field.name
    assert set(found) == {"settings_of_file", "resume", "overwrite", "quiet"}


def test_the_guide_says_what_the_command_line_has(root: Path) -> None:
    guide = (root / "docs" / "training.md").read_text()
    known = {
        o for c in main.commands.values() for p in c.params for o in (*p.opts, *p.secondary_opts)
    }
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", guide)) - {"--help", "--nproc-per-node"}
    assert named <= known, named - known
    written = {p.opts[0] for p in main.commands["train"].params}
    # Sizes and rates of training as such, which `--help` is enough for.
    plain = {
        *(
            "--activation",
            "--alpha",
            "--bf16",
            "--eval-batch-size",
            "--eval-before",
            "--eval-steps",
        ),
        *("--fusion", "--gate", "--group-by-length", "--head-dropout", "--head-lr", "--num-spaces"),
        *("--max-grad-norm", "--offset-lr", "--pooling", "--prompt-lr", "--space-dim"),
        *("--temperature", "--warmup-ratio", "--weight-decay"),
    }
    assert written - named == plain
    tables = re.findall(r"^\| `(\w+)` \|.*\| ([^|]*) \|$", guide, re.M)
    metrics = {kind: tuple(re.findall(r"`(\w+)`", last)) for kind, last in tables}
    assert {kind: metrics[kind] for kind in LABEL_METRICS} == LABEL_METRICS
    for suffix in SUFFIXES:
        assert f"`{suffix}`" in guide, suffix


# words, where {model}, {data}, {out}, {run} and {bad} are paths; what the line must hold
TRAIN = "train --model {model} --data {data} --output {out}"
MISTAKES: dict[str, tuple[str, str]] = {
    "no such model": ("train --model {data} --data {data} --output {out}",
     "model: expected a folder or hub id of a pretrained model"),
    "no such data": ("train --model {model} --data {out}.jsonl --output {out}",
     "out.jsonl: expected a readable file, got No such file"),
    "malformed line": ("train --model {model} --data {bad} --output {out}",
     "row 5: label: expected an integer from 0 to 1, got -1"),
    "special tokens alone": (TRAIN + " --num-virtual-tokens 4 --max-length 2",
     "max_length: expected at least 3, for a token of the text beside 2 special ones, got 2"),
    "prompt too long": (TRAIN + " --method pt",
     "num_virtual_tokens: expected room for text in the model's 64 positions"),
    "results in the way": ("train --model {model} --data {data} --output {run}",
     "output: expected an empty folder"),
    "both ways": ("train --model {model} --data {data} --output {run} --resume --overwrite",
     "resume, overwrite: expected one of them, got both"),
    "another seed": ("train --model {model} --data {data} --output {run} --resume --seed 5",
     "as in the run to resume"),
    "output is a file": ("train --model {model} --data {data} --output {bad}",
     "output: expected a folder, got the file"),
    "no adapter": ("evaluate --adapter {out} --data {data}", "adapter: expected a folder, got"),
    "not an adapter": ("evaluate --adapter {data} --data {data}",
     "adapter.json: expected a readable file"),
    "no such split": ("evaluate --adapter {run} --data {data} --split dev",
     "expected a split dev, got test, train, validation"),
    "no such input": ("predict --adapter {run} --input {out}.txt",
     "out.txt: expected a readable file"),
    "bad input": ("predict --adapter {run} --input {run}/learning_curves.png",
     "expected a file ending in .jsonl, .txt, .json, .csv, .tsv, .parquet, .arrow, got '.png'"),
    "empty standard input": ("predict --adapter {run}",
     "standard input: expected at least one row, got none"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line_and_exit_code_2(
    case: str, trained: Workplace, tmp_path: Path
) -> None:
    words, expected = MISTAKES[case]
    bad = write_rows(tmp_path / "bad.jsonl", [*task_rows(4, 0), {"text": "a", "label": -1}])
    places = {
        "model": trained.model,
        "data": trained.data,
        "out": tmp_path / "out",
        "run": trained.output,
        "bad": bad,
    }
    before = (trained.output / "metrics.json").read_bytes()
    result = call(*(word.format(**places) for word in words.split()), stdin="")
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    assert expected in lines[0]
    assert not (tmp_path / "out").exists()
    assert (trained.output / "metrics.json").read_bytes() == before


@pytest.mark.usefixtures("empty_pictures")
def test_progress_in_a_log_is_a_few_plain_lines(trained: Workplace, tmp_path: Path) -> None:
    settings = small_run(trained.model, trained.data, tmp_path / "out", max_steps=60, eval_steps=2)
    result = call("train", *options(settings))
    assert result.exit_code == 0, result.output
    assert "\r" not in result.output
    curve = json.loads((tmp_path / "out" / "metrics.json").read_text())["curves"]["evaluation"]
    accuracy = {row["step"]: row["accuracy"] for row in curve}
    lines = result.stderr.splitlines()
    steps = []
    for line in lines:
        found = re.fullmatch(r"training: (\d+) of 60 steps, loss \d\.\d{3}, accuracy (.+)", line)
        assert found, line
        steps.append(int(found[1]))
        assert found[2] == f"{accuracy[steps[-1]]:.3f}"
    assert steps[-1] == 60
    assert steps == sorted(set(steps))
    assert 10 <= len(steps) < 20  # of 30 evaluations


@pytest.mark.usefixtures("empty_pictures")
def test_a_terminal_gets_a_bar(
    trained: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    settings = small_run(trained.model, trained.data, tmp_path / "out", max_steps=4, eval_steps=2)
    run(TrainConfig(**settings))
    assert "\rtraining: 100%" in terminal.getvalue()


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_a_model_that_moved_is_named_with_an_option(
    command: str, trained: Workplace, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(trained.output / "adapter", adapter)
    description = json.loads((adapter / "adapter.json").read_text())
    gone = str(tmp_path / "gone")
    (adapter / "adapter.json").write_text(json.dumps({**description, "base_model": gone}))
    words: list[str | Path] = [command, "--adapter", adapter]
    if command == "evaluate":
        words += ["--data", trained.data]
    result = call(*words, stdin="the play was fine\n")
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    hint = f"{adapter} names it; base_model (on the command line --model) names another place"
    assert f"got {gone!r}" in result.stderr
    assert hint in result.stderr
    assert call(*words, "--model", trained.model, stdin="the play was fine\n").exit_code == 0
    wrong = call(*words, "--model", gone, stdin="the play was fine\n")
    assert f"got {gone!r}" in wrong.stderr
    assert "names another place" not in wrong.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--method", "lora"],
        ["train", "--batch-size", "many"],
        ["train"],
        ["evaluate"],
        ["predict", "--format", "xml"],
        ["fly"],
    ],
)
def test_wrong_options_are_clicks_own_exit_code_2(words: list[str]) -> None:
    result = call(*words)
    assert result.exit_code == 2
    assert "Error: " in result.stderr


def test_run_that_diverges_is_exit_code_1(trained: Workplace, tmp_path: Path) -> None:
    settings = small_run(trained.model, trained.data, tmp_path / "out", prompt_lr=2e37)
    result = call("train", *options(settings), "--quiet", "--warmup-ratio", "0")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: the loss is not finite at step 2;")
    assert len(result.stderr.splitlines()) == 1


# What is too large for the limit; a pattern of its name, and which file of a run has that size.
TOO_LARGE = {
    "run.json": (r"run\.json", "run.json"),
    "optimizer": (r"checkpoints/checkpoint-3", "checkpoints/checkpoint-3/optimizer.pt"),
    "picture": (r"learning_curves\.png", "learning_curves.png"),
}


@pytest.mark.parametrize("case", TOO_LARGE)
def test_what_cannot_be_written_is_one_line_and_leaves_no_half_files(
    case: str, trained: Workplace, tmp_path: Path
) -> None:
    pattern, sized = TOO_LARGE[case]
    output = tmp_path / "out"
    settings = small_run(trained.model, trained.data, output, max_steps=6, eval_steps=3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((trained.output / sized).stat().st_size // 2, -1))
    try:
        result = call("train", *options(settings), "--quiet")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.exit_code == 1, result.output
    line = rf"Error: {output}/{pattern}: expected a writable file, got File too large\n"
    assert re.fullmatch(line, result.stderr), result.stderr
    assert not list(output.rglob(".*"))
    assert not (output / "metrics.json").exists()
    assert all((f / "complete.json").exists() for f in output.glob("checkpoints/*"))


def test_predictions_that_cannot_be_written_leave_the_old_ones(
    trained: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "labels.jsonl"
    target.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    words = ("predict", "--adapter", trained.output, "--output", target)
    result = call(*words, stdin="the play was fine\n")
    assert result.exit_code == 1
    expected = f"Error: {target}: expected a writable file, got No space left on device\n"
    assert result.stderr == expected
    assert [path.name for path in tmp_path.iterdir()] == ["labels.jsonl"]
    assert target.read_text() == "old"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_standard_output_without_room_is_one_line(root: Path) -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "ept_fast", "info"],
            cwd=root, stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr == (
        "Error: standard output: expected a writable file, got No space left on device\n"
    )


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(dispatch, "describe", broken)
    result = call("info")
    assert isinstance(result.exception, RuntimeError)


@pytest.mark.parametrize("name", ["transformers", "accelerate", "filelock", "matplotlib"])
def test_missing_library_says_what_to_install(
    name: str, trained: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    settings = small_run(trained.model, trained.data, tmp_path / "out")
    result = call("train", *options(settings))
    assert result.exit_code == 2
    assert result.stderr == f'Error: {name} not installed: pip install "ept-fast[train]"\n'
    assert not (tmp_path / "out").exists()


def test_info_lists_every_backend() -> None:
    result = call("info")
    assert result.exit_code == 0, result.output
    facts = json.loads(call("info", "--json").stdout)
    assert facts["ept_fast"] == ept_fast.__version__
    assert facts["torch"] == torch.__version__
    assert facts["devices"][0].startswith("CPU (")
    expected = [tuple(row) for row in dispatch.describe()]
    assert [(b["name"], b["works"], b["reason"]) for b in facts["backends"]] == expected
    for name, works, reason in expected:
        line = next(x for x in result.stdout.splitlines() if x.startswith(f"backend {name} "))
        assert ("does not work here" in line) == (not works)
        assert reason in line
    for name in ("torch", "triton", "transformers"):
        assert f"{name:<13}{facts[name] or 'not installed'}" in result.stdout


def test_module_prints_info_without_loading_the_training_libraries(root: Path) -> None:
    code = (
        "import runpy, sys; sys.argv = ['ept-fast', 'info']\n"
        "import ept_fast.training.job, ept_fast.training.demo  # which say what is missing\n"
        "try: runpy.run_module('ept_fast', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "libraries = {'transformers', 'accelerate', 'matplotlib', 'datasets', 'sklearn', 'yaml'}\n"
        "loaded = libraries & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"ept_fast     {ept_fast.__version__}\n")
    assert "backend eager" in result.stdout


def test_without_click_there_is_a_hint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "click", None)
    monkeypatch.delitem(sys.modules, "ept_fast.cli")
    monkeypatch.delattr(ept_fast, "cli")
    with pytest.raises(SystemExit) as end:
        runpy.run_module("ept_fast", run_name="__main__")
    assert end.value.code == 2
    assert capsys.readouterr().err == "Error: click not installed: pip install ept-fast\n"


@pytest.mark.parametrize("command", [[], ["train"], ["evaluate"], ["predict"], ["info"], ["demo"]])
def test_help(command: list[str]) -> None:
    result = call(*command, "-h")
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage: ")
