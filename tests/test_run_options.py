"""What a run can be asked for: kinds of labels, chats, weights, early ends, reports, files."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from click.testing import CliRunner

from ept_fast import CheckpointError, EPTConfig, get_ept_model
from ept_fast.cli import main
from ept_fast.libraries import MissingLibraryError
from ept_fast.training.config import TrainConfig, find_device
from ept_fast.training.data import DataError, Rows, read_rows
from ept_fast.training.job import evaluate, load_adapter, predict
from ept_fast.training.tokens import TextForm, tokenise_inputs, tokenise_text
from ept_fast.training.trainer import PromptTrainer
from ept_fast.transformers.backbone import load_backbone, load_tokenizer
from tests.tiny import (
    answer_rows,
    options,
    save_llama,
    save_model,
    save_task,
    small_run,
    task_rows,
    tensors_of,
    train,
    weights_of,
    write_rows,
)

pytestmark = pytest.mark.usefixtures("one_thread", "empty_pictures")

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {{ eos_token }} {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def call(*words: Any) -> Any:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_task(tmp_path_factory.mktemp("data"))


def _several(count: int, seed: int) -> list[dict[str, Any]]:
    """The words of these rows, of which a text can have both."""
    rows = task_rows(count, seed)
    for i, row in enumerate(rows):
        row["label"] = [["bad"], ["good"]][row["label"]]
        if i % 3 == 0:
            row["text"], row["label"] = f"{row['text']} dull great", ["bad", "good"]
    return rows


def _numbers(count: int, seed: int) -> list[dict[str, Any]]:
    return [{**row, "label": 2.5 * row["label"] - 1.0} for row in task_rows(count, seed)]


KINDS: dict[str, tuple[Callable[[int, int], Any], str, str]] = {
    "multi_label_classification": (_several, "micro_f1", "labels"),
    "regression": (_numbers, "pearson", "value"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_labels_are_learnt(kind: str, bert: Path, tmp_path: Path) -> None:
    rows, metric, answer = KINDS[kind]
    data, output = save_task(tmp_path / "data", rows), tmp_path / "run"
    rates = {"head_lr": 1e-1, "prompt_lr": 5e-2} if kind == "regression" else {}
    settings = small_run(bert, data, output, max_steps=160, eval_steps=40, keep="best", **rates)
    metrics = train(settings)
    assert metrics["metric"] == metric
    assert metrics["config"]["problem_type"] == kind
    assert metrics["before"][metric] + 0.2 < metrics["after"][metric]
    assert metrics["after"] == metrics["best"]
    found = evaluate(output, data)
    assert metrics["before"][metric] + 0.1 < found[metric]
    test = read_rows(data / "test.jsonl")
    answers = predict(output, test)
    assert all(answer in each for each in answers)
    if kind == "regression":
        errors = [
            abs(a["value"] - label) for a, label in zip(answers, test.labels or (), strict=True)
        ]
        assert sum(errors) / len(errors) == pytest.approx(found["mae"], rel=1e-5)
        assert load_adapter(output).model.labels == ("value",)
        card = (output / "adapter" / "README.md").read_text()
        assert "print(model(**batch).logits[0].item())" in card
    else:
        right = [a["labels"] == label for a, label in zip(answers, test.labels or (), strict=True)]
        assert sum(right) / len(right) == pytest.approx(found["subset_accuracy"])
        assert answers[0]["probabilities"].keys() == {"bad", "good"}


def test_integers_are_a_regression_if_asked_for(bert: Path, data: Path, tmp_path: Path) -> None:
    settings = small_run(bert, data, tmp_path / "run", max_steps=2, problem_type="regression")
    assert train(settings)["after"].keys() == {"step", "loss", "pearson", "spearman", "mae"}
    with pytest.raises(ValueError, match=r"metric: expected one of pearson, .*, got 'accuracy'"):
        TrainConfig(**{**settings, "metric": "accuracy"})
    with pytest.raises(ValueError, match="class_weights, balance_classes: expected none"):
        TrainConfig(**{**settings, "balance_classes": True})
    with pytest.raises(
        ValueError, match="losses: expected supervised_contrastive for texts of one"
    ):
        TrainConfig(**{**settings, "losses": {"supervised_contrastive": 0.5}})
    with pytest.raises(ValueError, match="problem_type: expected none for the task causal"):
        TrainConfig(**{**settings, "task": "causal"})


def test_data_sets_of_other_kinds_are_refused(bert: Path, data: Path, tmp_path: Path) -> None:
    other = save_task(tmp_path / "numbers", _numbers)
    settings = small_run(bert, data, tmp_path / "run", max_steps=2)
    with pytest.raises(
        DataError, match="data: expected labels of one kind, got regression, single"
    ):
        train({**settings, "data": [str(data), str(other)]})


def test_class_weights_multiply_the_loss_of_their_rows(bert: Path) -> None:
    config = EPTConfig(32, num_virtual_tokens=2, max_length=8, rank=2)
    model: Any = get_ept_model(load_backbone(bert), config, "SEQ_CLS", labels=["a", "b", "c"])
    ids, labels = torch.randint(5, 20, (6, 4)), torch.tensor([0, 1, 2, 2, 1, -100])
    model.train().set_class_weight([1.0, 2.0, 0.5])
    output = model(ids, labels=labels)
    each = F.cross_entropy(output.logits, labels, reduction="none")
    weighed = each * torch.tensor([1.0, 2.0, 0.5, 0.5, 2.0, 0.0])
    torch.testing.assert_close(output.loss, weighed.sum() / 5)
    share = model(ids, labels=labels, num_items_in_batch=10).loss  # as of a part of a step
    torch.testing.assert_close(share, weighed.sum() / 10)
    hot = F.one_hot(labels.clamp_min(0), 3).float()
    several = F.binary_cross_entropy_with_logits(
        output.logits, hot, pos_weight=torch.tensor([1.0, 2.0, 0.5])
    )
    torch.testing.assert_close(model(ids, labels=hot).loss, several)
    plain = model.eval()(ids, labels=labels).loss
    torch.testing.assert_close(plain, F.cross_entropy(output.logits, labels))
    with pytest.raises(ValueError, match=r"weights: expected 3 numbers >= 0, .*, got \[1.0\]"):
        model.set_class_weight([1.0])
    model.train().set_class_weight(None)
    torch.testing.assert_close(model(ids, labels=labels).loss, plain)


@pytest.mark.parametrize("how", ["balance_classes", "class_weights"])
def test_a_rare_class_counts_as_much(how: str, bert: Path, tmp_path: Path) -> None:
    rows = [row for i, row in enumerate(task_rows(96, 0)) if row["label"] or i % 8 == 0]
    write_rows(tmp_path / "data" / "train.jsonl", rows)
    write_rows(tmp_path / "data" / "validation.jsonl", task_rows(40, 1))
    settings = small_run(bert, tmp_path / "data", tmp_path / "plain")
    plain = train(settings)
    chosen: Any = True if how == "balance_classes" else {"0": 4.0}
    weighed = train({**settings, "output": str(tmp_path / "weighed"), how: chosen})
    test = read_rows(tmp_path / "data" / "validation.jsonl")
    rare = {}
    for output in ("plain", "weighed"):
        answers = predict(tmp_path / output, test)
        rare[output] = sum(answer["probabilities"]["0"] for answer in answers) / len(test)
    assert rare["plain"] + 0.1 < rare["weighed"]
    assert weighed["before"] == plain["before"]  # evaluation has no weights


# Chats


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A decoder whose tokenizer has a chat template, and conversations."""
    folder = tmp_path_factory.mktemp("chats")
    model = save_llama(folder / "llama", words=("user", "assistant", "system"))
    tokenizer = load_tokenizer(str(model))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)

    def talks(count: int, seed: int) -> list[dict[str, Any]]:
        return [
            {
                "messages": [
                    {"role": "user", "content": f"it : {row['text']}"},
                    {"role": "assistant", "content": row["target"]},
                ]
            }
            for row in answer_rows(count, seed)
        ]

    return model, save_task(folder / "data", talks)


def test_only_replies_are_learnt(chatting: tuple[Path, Path]) -> None:
    tokenizer = load_tokenizer(str(chatting[0]))
    chat = (
        {"role": "system", "content": "the play"},
        {"role": "user", "content": "it"},
    )
    rows = Rows(("it",), None, None, "d", (1,), ("yes good",), (chat,))
    form = TextForm("causal", 64, 8, chat=True)
    tokens = tokenise_text(rows, tokenizer, form)[0]
    text = tokenizer("system : the play </s> user : it </s> assistant :", add_special_tokens=False)
    reply = tokenizer("yes good </s>", add_special_tokens=False)["input_ids"]
    assert tokens["input_ids"] == text["input_ids"] + reply  # one end: the template has it
    assert tokens["labels"] == [-100] * len(text["input_ids"]) + reply
    asked = tokenise_inputs(rows, tokenizer, form)
    assert asked[0]["input_ids"] == text["input_ids"]
    alone = Rows(("it",), None, None, "d", (1,))
    short = tokenizer("user : it </s> assistant :", add_special_tokens=False)["input_ids"]
    assert tokenise_inputs(alone, tokenizer, form)[0]["input_ids"] == short


CHAT_MISTAKES = {
    "no template": (None, ValueError, "tokenizer: expected one with a chat template, got"),
    "a refusal": (
        "{{ raise_exception('roles must alternate') }}", DataError,
        r"d, row 1: messages: expected .* chat template, got others \(roles must alternate\)",
    ),
    "another beginning": (
        "{{ messages | length }}", ValueError, "tokenizer: expected a chat template that writes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CHAT_MISTAKES)
def test_templates_that_do_not_fit(case: str, chatting: tuple[Path, Path]) -> None:
    template, error, message = CHAT_MISTAKES[case]
    tokenizer = load_tokenizer(str(chatting[0]))
    tokenizer.chat_template = template
    rows = Rows(("a",), None, None, "d", (1,), ("b",), (({"role": "user", "content": "a"},),))
    with pytest.raises(error, match=message):
        tokenise_text(rows, tokenizer, TextForm("causal", 64, 8, chat=True))


def test_conversations_are_trained_on_and_answered(
    chatting: tuple[Path, Path], bert: Path, tmp_path: Path
) -> None:
    model, data = chatting
    output = tmp_path / "run"
    settings = small_run(
        model, data, output, task="causal", max_length=32, max_target_length=8, max_steps=60
    )
    metrics = train(settings)
    assert metrics["after"]["loss"] < metrics["before"]["loss"]
    assert metrics["after"]["exact_match"] > 0.8
    sample = metrics["samples"][0]
    assert sample["target"] in ("yes good", "bad it is")  # without the template's tokens
    assert evaluate(output, data)["exact_match"] > 0.8
    asked = tmp_path / "asked.jsonl"
    write_rows(asked, [{"messages": [{"role": "user", "content": "it : the play was lovely"}]}])
    for words in (("--input", asked), ()):
        result = CliRunner().invoke(
            main,
            ["predict", "--adapter", str(output), *map(str, words)],
            "it : the play was lovely",
        )
        assert json.loads(result.stdout) == {
            "text": "it : the play was lovely",
            "output": "yes good",
        }
    with pytest.raises(
        DataError, match="messages: expected texts for the task seq2seq, got messages"
    ):
        train({**settings, "task": "seq2seq", "output": str(tmp_path / "other")})


def test_an_adapter_of_texts_refuses_conversations(
    chatting: tuple[Path, Path], tmp_path: Path
) -> None:
    model, data = chatting
    texts = save_task(tmp_path / "data", answer_rows)
    sizes = {"max_target_length": 8, "max_steps": 1}
    settings = small_run(model, texts, tmp_path / "run", task="causal", **sizes)
    train(settings)
    with pytest.raises(DataError, match="messages: expected no messages as in training, got some"):
        evaluate(tmp_path / "run", data)


# The end of a run


def test_a_run_stops_early(bert: Path, data: Path, tmp_path: Path) -> None:
    how = {"early_stopping_patience": 2, "early_stopping_threshold": 10.0}  # never better
    settings = small_run(bert, data, tmp_path / "run", max_steps=100, eval_steps=3, **how)
    metrics = train({**settings, "metric": "macro_f1", "keep": "best"})
    # The first evaluation in training is what the two after it are no better than.
    assert metrics["steps"] == 9
    assert [e["step"] for e in metrics["curves"]["evaluation"]] == [0, 3, 6, 9]
    patient = {**settings, "output": str(tmp_path / "all"), "early_stopping_threshold": 0.0}
    patient |= {"early_stopping_patience": 50, "max_steps": 12}
    assert train(patient)["steps"] == 12


def test_less_is_better_for_some_metrics(bert: Path, data: Path, tmp_path: Path) -> None:
    how = {"early_stopping_patience": 1, "problem_type": "regression", "metric": "loss"}
    settings = small_run(bert, data, tmp_path / "run", max_steps=9, eval_steps=3, **how)
    metrics = train({**settings, "prompt_lr": 1e-3, "head_lr": 1e-3})
    losses = [e["loss"] for e in metrics["curves"]["evaluation"]]
    assert losses == sorted(losses, reverse=True)
    assert metrics["steps"] == 9


class _KilledError(BaseException):
    pass


def _kill_at(
    step: int, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, **how: Any
) -> None:
    """A run that ends as soon as it has its checkpoint of this step."""
    complete = PromptTrainer._complete

    def kill(self: Any, folder: Path, progress: Any) -> None:
        complete(self, folder, progress)
        if self.state.global_step == step:
            raise _KilledError

    with monkeypatch.context() as patch:
        patch.setattr(PromptTrainer, "_complete", kill)
        with pytest.raises(_KilledError):
            train(settings, **how)


@pytest.mark.parametrize("killed", [6, 9])
def test_a_killed_run_stops_where_it_would_have(
    killed: int, bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {"early_stopping_patience": 2, "early_stopping_threshold": 10.0}
    settings = small_run(bert, data, tmp_path / "run", max_steps=100, eval_steps=3, **how)
    whole = train({**settings, "output": str(tmp_path / "whole")})
    _kill_at(killed, settings, monkeypatch)
    again = train(settings, resume=True)
    assert (again["steps"], again["after"]) == (whole["steps"], whole["after"])
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")


def test_a_longer_run_that_was_killed_is_not_the_finished_one(
    bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small_run(bert, data, tmp_path / "run", max_steps=3, eval_steps=3)
    train(settings)
    longer = {**settings, "max_steps": 9}
    _kill_at(6, longer, monkeypatch, resume=True)
    assert train(longer, resume=True)["steps"] == 9


def test_a_finished_run_goes_on(bert: Path, data: Path, tmp_path: Path) -> None:
    settings = small_run(bert, data, tmp_path / "run", max_steps=6, eval_steps=3)
    first = train(settings)
    before = weights_of(tmp_path / "run")
    assert train({**settings, "report_to": "none"}, resume=True) == first
    longer = {**settings, "max_steps": 12}
    second = train(longer, resume=True)
    assert second["steps"] == 12
    assert second["curves"]["loss"][:6] == first["curves"]["loss"]
    assert second["before"] == first["before"]
    assert weights_of(tmp_path / "run") != before
    assert train(longer, resume=True) == second  # finished, as it is now
    # At once: the same batches, under another schedule in the first half.
    whole = train({**longer, "output": str(tmp_path / "whole")})
    assert whole["curves"]["loss"][0] == second["curves"]["loss"][0]
    with pytest.raises(ValueError, match="max_steps: expected at least the 12 steps of the run"):
        train({**settings, "max_steps": 8}, resume=True)
    with pytest.raises(ValueError, match="batch_size: expected 8 as in the run to resume, got 4"):
        train({**longer, "max_steps": 14, "batch_size": 4}, resume=True)
    assert weights_of(tmp_path / "run") != before


def test_a_longer_run_has_the_rates_of_its_own_schedule(
    bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    step = PromptTrainer.training_step

    def watched(self: Any, *args: Any, **how: Any) -> Any:
        rates.append(self.optimizer.param_groups[0]["lr"])
        return step(self, *args, **how)

    monkeypatch.setattr(PromptTrainer, "training_step", watched)
    settings = small_run(bert, data, tmp_path / "run", max_steps=4, eval_steps=2, warmup_ratio=0)
    train(settings)
    train({**settings, "max_steps": 8}, resume=True)
    assert rates == pytest.approx(
        [2e-2 * (1 - s / 4) for s in range(4)] + [2e-2 * (1 - s / 8) for s in range(4, 8)]
    )


def test_a_longer_run_is_evaluated_at_tenths_of_its_own(
    bert: Path, data: Path, tmp_path: Path
) -> None:
    settings = small_run(bert, data, tmp_path / "run", max_steps=10, eval_steps=None)
    assert [e["step"] for e in train(settings)["curves"]["evaluation"]] == list(range(11))
    found = train({**settings, "max_steps": 40}, resume=True)["curves"]["evaluation"]
    assert [e["step"] for e in found] == [*range(11), *range(12, 41, 4)]


def test_a_finished_run_without_checkpoints_cannot_go_on(
    bert: Path, data: Path, tmp_path: Path
) -> None:
    settings = small_run(bert, data, tmp_path / "run", max_steps=2)
    train(settings)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = weights_of(tmp_path / "run")
    with pytest.raises(CheckpointError, match="checkpoints: expected one to go on from, got none"):
        train({**settings, "max_steps": 4}, resume=True)
    assert weights_of(tmp_path / "run") == before


# Where a run starts


def test_a_run_starts_from_prompt_and_head(bert: Path, data: Path, tmp_path: Path) -> None:
    first = train(small_run(bert, data, tmp_path / "first", method="dept", num_spaces=0))
    # Neither method nor sizes are said again.
    plain = {"model": str(bert), "data": str(data), "max_steps": 1, "device": "cpu"}
    start = {**plain, "start_from": str(tmp_path / "first"), "output": str(tmp_path / "next")}
    metrics = train(start)
    assert metrics["prompt"] == first["prompt"]
    assert metrics["before"] == {**first["after"], "step": 0}  # the head too
    renamed = [{**row, "label": "yn"[row["label"]]} for row in task_rows(20, 0)]
    other = write_rows(tmp_path / "other.jsonl", renamed)
    metrics = train({**start, "data": str(other), "output": str(tmp_path / "other")})
    assert metrics["prompt"] == first["prompt"]  # whose head starts anew, with other labels
    sizes = {"prompt_length": 24, "max_length": 16, "method": "dept", "num_virtual_tokens": 5}
    with pytest.raises(ValueError, match=r"start_from: expected .*\(num_virtual_tokens 5, rank"):
        train({**start, "output": str(tmp_path / "no"), **sizes})


# Reports and devices


def test_tensorboard_has_losses_and_evaluations(bert: Path, data: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = tmp_path / "run"
    settings = small_run(bert, data, output, max_steps=6, eval_steps=3, report_to="tensorboard")
    metrics = train(settings)
    events = EventAccumulator(str(output / "logs")).Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    assert losses == pytest.approx(metrics["curves"]["loss"], rel=1e-5)
    accuracy = {event.step: event.value for event in events.Scalars("eval/accuracy")}
    wanted = {e["step"]: e["accuracy"] for e in metrics["curves"]["evaluation"]}
    assert accuracy == pytest.approx(wanted)
    first = sorted((output / "logs").iterdir())
    train(settings, overwrite=True)
    assert len(first) == 1
    assert len(list((output / "logs").iterdir())) == 1  # its own alone
    train({**settings, "report_to": "none"}, overwrite=True)
    assert not (output / "logs").exists()


def test_a_report_needs_its_library(
    bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "wandb" else find(n))
    settings = small_run(bert, data, tmp_path / "run", report_to="wandb")
    with pytest.raises(MissingLibraryError, match="wandb not installed: pip install wandb"):
        train(settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "cuda:", "cuda:-1", ""])
def test_devices_that_are_not_here(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"device: expected one that PyTorch has here, got '{name}'"
    ):
        find_device(name)


def test_the_named_device_is_used(bert: Path, data: Path, tmp_path: Path) -> None:
    assert find_device("cpu:0") == torch.device("cpu:0")
    seen = []

    class Watched(PromptTrainer):
        def get_train_dataloader(self) -> Any:
            seen.extend([self.args.device, self.accelerator.device])
            return super().get_train_dataloader()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ept_fast.training.trainer.PromptTrainer", Watched)
        # Which transformers would take, whatever accelerate is told.
        patch.setattr("transformers.training_args.is_torch_mps_available", lambda: True)
        train(small_run(bert, data, tmp_path / "run", max_steps=1, device="cpu:0"))
    assert seen == [torch.device("cpu:0")] * 2
    words = ("--adapter", tmp_path / "run", "--data", data, "--device", "cuda:99")
    result = call("evaluate", *words)
    assert result.exit_code == 2
    assert "device: expected one that PyTorch has here, got 'cuda:99' (" in result.stderr


# Settings from a file


@pytest.mark.parametrize("form", ["yaml", "json", "run.json"])
def test_settings_come_from_a_file_and_options_go_first(
    form: str, bert: Path, data: Path, tmp_path: Path
) -> None:
    settings = small_run(bert, data, tmp_path / "run", max_steps=2, settings={"num_spaces": 1})
    file = tmp_path / f"settings.{form}"
    if form == "yaml":
        file.write_text(yaml.safe_dump(settings))
    else:
        file.write_text(json.dumps({"config": settings} if form == "run.json" else settings))
    output = tmp_path / "other"
    words = ("--output", output, "--max-steps", 3, "--quiet")
    result = call("train", "--config", file, *words)
    assert result.exit_code == 0, result.output
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["config"] == {
        **TrainConfig(**settings).to_dict(),
        "output": str(output),
        "max_steps": 3,
        "problem_type": "single_label_classification",
    }
    assert metrics["prompt"]["num_spaces"] == 1


CONFIG_MISTAKES = {
    "max_stepz: 3": "config: expected names of options in .*, got 'max_stepz'",
    "[3]": r"config: expected settings by name in .*, got \[3\]",
    "{": "config: expected a file of YAML or JSON, got",
    "max_steps: 1.5": "max_steps: expected an integer, got float 1.5",
    "seed: true": "seed: expected an integer, got bool",
    "data: 3": "data: expected a string, got int",
}


@pytest.mark.parametrize("content", CONFIG_MISTAKES)
def test_mistakes_in_a_file_of_settings(
    content: str, bert: Path, data: Path, tmp_path: Path
) -> None:
    file, output = tmp_path / "settings.yaml", tmp_path / "run"
    file.write_text(content)
    words = ["--config", file, "--model", bert, "--output", output]
    if not content.startswith("data"):
        words += ["--data", data]
    result = call("train", *words)
    assert result.exit_code == 2, result.output
    assert re.search(CONFIG_MISTAKES[content], result.stderr), result.stderr
    assert not output.exists()
    missing = call("train", "--config", tmp_path / "none.yaml")
    assert missing.exit_code == 2
    assert "No such file" in missing.stderr
    alone = call("train", "--model", bert, "--data", data)
    assert "Missing option '--output'" in alone.stderr


def test_balanced_classes_from_the_command_line(bert: Path, data: Path, tmp_path: Path) -> None:
    settings = small_run(bert, data, tmp_path / "run", max_steps=2)
    result = call("train", *options(settings), "--class-weight", "0=2", "--quiet")
    assert result.exit_code == 0, result.output
    result = call("train", *options(settings), "--class-weight", "x=2", "--overwrite")
    assert "class_weights: expected one of 0, 1, got 'x'" in result.stderr
    assert tensors_of(tmp_path / "run")  # nothing is lost
