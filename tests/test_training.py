"""The training job on its three tasks: it learns, writes, and weighs every token the same."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor

from ept_fast import CheckpointError, EPTConfig, FusedEPTPrompt, get_ept_model
from ept_fast.training import trainer
from ept_fast.training.checkpoints import mark_complete, newest_checkpoint
from ept_fast.training.config import TrainConfig
from ept_fast.training.data import DataError, Rows, read_rows
from ept_fast.training.evaluation import TextEvaluation, Writer, spread
from ept_fast.training.job import evaluate, load_adapter, load_task, predict
from ept_fast.training.metrics import label_metrics, matthews
from ept_fast.training.report import describe_run
from ept_fast.training.tokens import TextForm, tokenise_inputs
from ept_fast.training.trainer import NonFiniteLossError, PromptTrainer
from ept_fast.transformers.backbone import load_backbone, load_tokenizer
from tests.tiny import (
    ANSWERS,
    answer_rows,
    random_states,
    save_llama,
    save_model,
    save_t5,
    save_task,
    small_run,
    task_rows,
    tensors_of,
    train,
    weights_of,
    write_rows,
)

pytestmark = pytest.mark.usefixtures("one_thread", "empty_pictures")

TEXTS: dict[str, dict[str, Any]] = {
    "seq2seq": {"task": "seq2seq"},
    "causal": {"task": "causal"},
    "packed": {"task": "causal", "packing": True, "pack_length": 60, "batch_size": 4},
}
CASES = ["classification", *TEXTS]
Settings = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """The model and the data of each task."""
    folder = tmp_path_factory.mktemp("places")
    labels, answers = save_task(folder / "labels"), save_task(folder / "answers", answer_rows)
    return {
        "classification": (save_model(folder / "bert"), labels),
        "seq2seq": (save_t5(folder / "t5"), answers),
        "causal": (save_llama(folder / "llama"), answers),
    }


@pytest.fixture(scope="module")
def settings_of(places: dict[str, tuple[Path, Path]]) -> Settings:
    """The settings of a small run of a case, into a folder."""

    def settings(case: str, output: Path, **changes: Any) -> dict[str, Any]:
        choices: dict[str, Any] = {"task": case}
        if case in TEXTS:
            sizes = {"prompt_length": 48, "max_target_length": 6, "batch_size": 16}
            choices = {**sizes, "prompt_lr": 5e-2, "offset_lr": 2e-2, **TEXTS[case]}
        return {**small_run(*places[choices["task"]], output), **choices, **changes}

    return settings


@pytest.fixture(scope="module")
def finished(
    settings_of: Settings, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, dict[str, Any]]]:
    """A finished run of each case: its folder and its metrics."""
    runs = {}
    for case in CASES:
        output = tmp_path_factory.mktemp(case) / "out"
        runs[case] = (output, train(settings_of(case, output)))
    return runs


Finished = dict[str, tuple[Path, dict[str, Any]]]


@pytest.mark.parametrize("case", CASES)
def test_training_learns_and_leaves_its_files(case: str, finished: Finished) -> None:
    output, metrics = finished[case]
    before, after = metrics["before"], metrics["after"]
    metric = "accuracy" if case == "classification" else "token_accuracy"
    assert metrics["metric"] == metric
    assert (before["step"], after["step"]) == (0, 30)
    assert after["loss"] < before["loss"]
    assert after[metric] > before[metric]
    assert [e["step"] for e in metrics["curves"]["evaluation"]] == [0, 10, 20, 30]
    assert len(metrics["curves"]["loss"]) == 30
    assert metrics == json.loads((output / "metrics.json").read_text())
    pictures = {"learning_curves.png", "gate_weights.png"}
    samples = {"samples.md"} if case in TEXTS else set()
    folders = {"adapter", "checkpoints"}
    found = {path.name for path in output.iterdir()}
    assert found == {*folders, *pictures, *samples, "metrics.json", "run.json"}
    card = (output / "adapter" / "README.md").read_text()
    assert f"| `{metric}` | `{after[metric]:.4g}` |" in card
    assert str(output.parent) not in card
    gate = torch.tensor(metrics["gate_weights"])
    assert gate.shape == (4, 2)
    torch.testing.assert_close(gate.sum(-1), torch.ones(4))
    assert metrics["tokens"] > 30 * 8 * 5
    assert 0 < metrics["seconds_per_step"] < 60
    assert metrics["peak_memory_bytes"] > 50e6


@pytest.mark.parametrize("case", TEXTS)
def test_what_is_written_is_judged_and_shown(case: str, finished: Finished) -> None:
    output, metrics = finished[case]
    before, after, samples = metrics["before"], metrics["after"], metrics["samples"]
    assert after["loss"] < 0.5 * before["loss"]
    assert after["perplexity"] == pytest.approx(math.exp(after["loss"]))
    assert before["exact_match"] < 0.2
    assert after["exact_match"] > 0.6
    assert after["f1"] >= after["exact_match"]
    assert len(samples) == 40  # every evaluation row: there are fewer than eval_generate
    assert sum(s["exact_match"] for s in samples) / 40 == after["exact_match"]
    assert {s["target"] for s in samples} == set(ANSWERS)
    report = (output / "samples.md").read_text()
    assert report.count(": match\n") == sum(s["exact_match"] for s in samples)
    for sample in samples:
        assert f"    {sample['text']}\n" in report
        assert sample["exact_match"] == (sample["output"] == sample["target"])


def test_checkpoints_hold_no_backbone(finished: Finished) -> None:
    output, metrics = finished["classification"]
    folders = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert folders == ["checkpoint-20", "checkpoint-30"]
    tensors = 0
    for path in (output / "checkpoints").rglob("*"):
        assert path.suffix != ".bin", path
        if path.suffix == ".safetensors":
            tensors += sum(t.numel() for t in load_file(path).values())
    counts = metrics["parameters"]
    assert tensors == 2 * (counts["prompt"] + counts["head"])


def test_packing_reads_fewer_positions(finished: Finished) -> None:
    """The same number of steps and about the same number of texts in each."""
    read = {case: finished[case][1]["positions"] / finished[case][1]["tokens"] for case in TEXTS}
    assert 1 < read["packed"] < 0.8 * read["causal"]


def test_loading_a_run_draws_no_random_numbers(finished: Finished) -> None:
    states = random_states()
    load_adapter(finished["classification"][0])
    assert random_states() == states


def test_classes_are_evaluated_and_predicted(
    finished: Finished, places: dict[str, tuple[Path, Path]]
) -> None:
    output, metrics = finished["classification"]
    data = places["classification"][1]
    found = evaluate(output, data, split="validation", batch_size=7)
    assert found.keys() == {"loss", "accuracy", "macro_f1", "matthews", "rows", "rows_cut"}
    assert found["rows"] == 40
    for name in ("accuracy", "macro_f1", "matthews"):
        assert found[name] == metrics["after"][name]
    rows = read_rows(data / "validation.jsonl")
    results = predict(output / "adapter", rows, batch_size=3)
    right = sum(r["label"] == label for r, label in zip(results, rows.labels or (), strict=True))
    assert right / 40 == metrics["after"]["accuracy"]
    for result in results:
        assert list(result["probabilities"]) == ["0", "1"]
        assert sum(result["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert result["probabilities"][str(result["label"])] >= 0.5


@pytest.mark.parametrize("case", TEXTS)
def test_texts_are_evaluated_and_written(
    case: str, finished: Finished, places: dict[str, tuple[Path, Path]]
) -> None:
    (output, metrics), data = finished[case], places["causal"][1]
    adapter = load_adapter(output)
    found = evaluate(adapter, data, split="validation", batch_size=7)
    for name in ("loss", "perplexity", "token_accuracy", "exact_match", "f1"):
        assert found[name] == pytest.approx(metrics["after"][name], rel=1e-5), name
    assert (found["rows"], found["rows_generated"]) == (40, 40)
    rows = read_rows(data / "validation.jsonl", answer="none")
    results = predict(output / "adapter", rows, batch_size=3)
    assert [r["output"] for r in results] == [s["output"] for s in metrics["samples"]]
    some = evaluate(adapter, data, split="validation", eval_generate=0)
    assert "exact_match" not in some
    assert some["rows_generated"] == 0
    short = predict(adapter, rows.take(range(5)), max_new_tokens=1, num_beams=2)
    assert all(len(r["output"].split()) <= 1 for r in short)
    for name, value in (("num_beams", 1001), ("max_new_tokens", 10**9), ("num_beams", 0)):
        with pytest.raises(ValueError, match=f"^{name}: expected an integer .*, got {value}"):
            predict(adapter, rows, **{name: value})


@pytest.mark.parametrize("case", ["seq2seq", "causal"])
def test_token_metrics_are_those_of_the_definition(case: str, finished: Finished) -> None:
    output, metrics = finished[case]
    adapter = load_adapter(output)
    tokenizer, model = adapter.tokenizer, adapter.model
    losses, right = [], []
    for row in answer_rows(40, 1):
        target = torch.tensor(tokenizer(row["target"], add_special_tokens=False)["input_ids"] + [2])
        text = tokenizer(row["text"], return_tensors="pt")["input_ids"]
        if case == "seq2seq":
            shifted = torch.cat([torch.zeros(1, dtype=torch.int64), target[:-1]])
            logits = model(input_ids=text, decoder_input_ids=shifted[None]).logits[0]
        else:
            whole = torch.cat([text[0], target])[None]
            logits = model(input_ids=whole).logits[0, text.shape[1] - 1 : -1]
        losses += F.cross_entropy(logits, target, reduction="none").tolist()
        right += (logits.argmax(-1) == target).tolist()
    after = metrics["after"]
    assert after["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert after["token_accuracy"] == sum(right) / len(right)


@pytest.mark.default_algorithms
@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("classification", {"head_dropout": 0.2}),
        ("seq2seq", {"gradient_accumulation_steps": 2}),
        ("packed", {"keep": "best"}),
    ],
)
def test_same_seed_same_bits_in_one_go_or_two(
    case: str, changes: dict[str, Any], settings_of: Settings, tmp_path: Path
) -> None:
    """A run that was cut off goes on to the same weights."""
    changes = {"max_steps": 6, "eval_steps": 2, "eval_generate": 3, "batch_size": 4, **changes}
    runs = {}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        torch.randn(5)  # a random state left by the caller must not matter
        settings = settings_of(case, tmp_path / name, **changes, seed=seed)
        metrics = train(settings)
        runs[name] = (weights_of(tmp_path / name), metrics["curves"], metrics["samples"])
    assert runs["a"] == runs["b"]
    assert runs["a"][0] != runs["c"][0]

    output = tmp_path / "c"
    for folder in ("adapter", "checkpoints/checkpoint-6"):
        shutil.rmtree(output / folder)
    (output / "metrics.json").unlink()
    again = train(settings, resume=True)
    assert weights_of(output) == runs["c"][0]
    for name in ("before", "after", "best", "curves", "tokens", "positions", "samples"):
        assert again[name] == metrics[name], name
    with pytest.raises(ValueError, match=r"^gradient_accumulation_steps: expected . as in the run"):
        train({**settings, "gradient_accumulation_steps": 3}, resume=True)


@pytest.mark.default_algorithms
def test_weight_decay_shrinks_every_trained_tensor(settings_of: Settings, tmp_path: Path) -> None:
    """A first step of AdamW takes lr · decay of the value that it began with."""
    runs = {}
    for name, lr, decay in (("before", 1e-30, 0.0), ("plain", 0.1, 0.0), ("decayed", 0.1, 0.5)):
        rates = dict.fromkeys(("prompt_lr", "offset_lr", "space_lr", "head_lr"), lr)
        changes = {"max_steps": 1, "warmup_ratio": 0.0, "weight_decay": decay}
        train(settings_of("classification", tmp_path / name, **rates, **changes))
        runs[name] = tensors_of(tmp_path / name)
    moved = {name for name, value in runs["before"].items() if value.abs().max() > 1e-3}
    assert moved == {"short_prompt", "offset_b", "space_down", "gate_weight", "weight"}
    for name, value in runs["before"].items():
        shrunk = runs["plain"][name] - runs["decayed"][name]
        torch.testing.assert_close(shrunk, 0.1 * 0.5 * value, rtol=1e-4, atol=1e-7)


class _FirstStep(PromptTrainer):
    """Keeps the gradients of the first step, before they are clipped."""

    gradients: dict[str, Tensor]

    def _clip_grad_norm(self, model: Any) -> Any:
        if not self.losses[1:]:
            type(self).gradients = {
                name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
            }
        return super()._clip_grad_norm(model)


@pytest.mark.parametrize("case", CASES)
def test_two_batches_of_four_are_one_of_eight(
    case: str, settings_of: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """15 targets of 1 to 5 words: parts of steps differ in label tokens, and a last one in rows."""
    rows = [
        {**row, "target": " ".join(["good"] * (1 + i % 5)), "label": i % 2}
        for i, row in enumerate(task_rows(15, 0))
    ]
    uneven = str(write_rows(tmp_path / "rows.jsonl", rows))
    monkeypatch.setattr(trainer, "PromptTrainer", _FirstStep)
    gradients, curves, tokens = [], [], []
    for size, parts in ((8, 1), (4, 2)):
        settings = settings_of(
            case, tmp_path / str(parts),
            data=uneven, eval_data=uneven, batch_size=size, gradient_accumulation_steps=parts,
            max_steps=3, eval_generate=0, eval_before=False, prompt_lr=1e-3,
            **({"pack_length": 22} if case == "packed" else {}),
        )  # fmt: skip
        metrics = train(settings)
        gradients.append(_FirstStep.gradients)
        curves.append(metrics["curves"]["loss"])
        tokens.append(metrics["tokens"])
    assert any(bool(gradient.any()) for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)
    assert len(curves[0]) == 3
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert tokens[0] == tokens[1]


# Choices --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "rank", "spaces"),
    [
        ({"method": "pt"}, 0, 0),
        ({"method": "dept"}, 13, 0),
        ({"num_spaces": 0}, 13, 0),
        ({"method": "ept", "fusion": False, "gate": "prompt"}, 6, 2),
    ],
)
def test_methods_share_one_budget(changes: dict[str, Any], rank: int, spaces: int) -> None:
    run = TrainConfig(**small_run(Path("m"), Path("d"), Path("o"), **changes))
    config = run.prompt_config(32)
    assert isinstance(config, EPTConfig)
    assert config.num_virtual_tokens == run.prompt_tokens
    assert (config.rank, config.num_spaces) == (rank, spaces)
    assert config.fusion is (changes.get("method") in (None, "pt"))
    assert 24 * 32 - (16 + 32) < config.num_parameters <= 24 * 32


@pytest.mark.parametrize("metric", ["loss", "exact_match"])
def test_best_keeps_the_best_evaluation(metric: str, settings_of: Settings, tmp_path: Path) -> None:
    # What the model gives without a prompt, and less and less the more it learns something else.
    rows = [{**row, "target": "very"} for row in answer_rows(16, 1)]
    others = write_rows(tmp_path / "others.jsonl", rows)
    settings = settings_of(
        "causal", tmp_path / "out",
        keep="best", metric=metric, max_steps=6, eval_steps=2, eval_generate=8,
        eval_data=str(others), init="random",
    )  # fmt: skip
    metrics = train(settings)
    curve = metrics["curves"]["evaluation"]
    best = (min if metric == "loss" else max)(e[metric] for e in curve)
    assert curve[-1][metric] != best, "the case has to tell best from last"
    assert metrics["after"] == next(e for e in curve if e[metric] == best)
    again = evaluate(tmp_path / "out", others, eval_generate=8)
    assert again[metric] == pytest.approx(best, rel=1e-5)
    assert len(metrics["samples"]) == 8
    mean = sum(s["exact_match"] for s in metrics["samples"]) / 8
    assert mean == metrics["after"]["exact_match"]


# The splits beside train; the source of the evaluation rows, with the number of rows of each kind.
SELECTED_ON = {
    ("last", "validation test"): ("validation.jsonl", 96, 40),
    ("last", "test"): ("test.jsonl", 96, 40),
    ("last", ""): ("train.jsonl (held out)", 86, 10),
    ("best", "validation test"): ("validation.jsonl", 96, 40),
    ("best", "test"): ("train.jsonl (held out)", 86, 10),
    ("best", ""): ("train.jsonl (held out)", 86, 10),
}


@pytest.mark.parametrize(("keep", "splits"), SELECTED_ON)
def test_weights_are_never_selected_on_the_test_split(
    keep: str, splits: str, places: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    model, source_data = places["classification"]
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", *splits.split()):
        shutil.copy(source_data / f"{split}.jsonl", data)
    config = TrainConfig(**small_run(model, data, tmp_path / "out", keep=keep))
    task = load_task(config)
    source, *counts = SELECTED_ON[keep, splits]
    assert task.evaluation.source == f"{data}/{source}"
    assert [len(task.train), len(task.evaluation)] == counts
    assert not set(task.evaluation.numbers) & set(task.train.numbers) or "held out" not in source
    named = dataclasses.replace(config, eval_data=str(source_data / "test.jsonl"))
    assert load_task(named).evaluation.source == named.eval_data


def test_named_labels_pairs_and_held_out_rows(settings_of: Settings, tmp_path: Path) -> None:
    rows = [
        {"text": row["text"], "text_pair": "a song", "label": ("sad", "happy")[row["label"]]}
        for row in task_rows(40, 0)
    ]
    data, output = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    changes = {"data": str(data), "max_steps": 3, "eval_fraction": 0.25}
    metrics = train(settings_of("classification", output, **changes))
    assert metrics["labels"] == ["happy", "sad"]
    assert metrics["rows"]["evaluation_source"] == f"{data} (held out)"
    assert (metrics["rows"]["train"], metrics["rows"]["evaluation"]) == (30, 10)
    assert metrics["rows"]["train_cut"] > 0
    result = predict(output, read_rows(data, answer="none"))[0]
    assert result["label"] in ("happy", "sad")
    single = write_rows(tmp_path / "single.jsonl", task_rows(4, 0))
    for call in (lambda: predict(output, read_rows(single)), lambda: evaluate(output, single)):
        with pytest.raises(DataError, match=r"single\.jsonl: text_pair: expected second texts as"):
            call()


@pytest.mark.parametrize("case", CASES)
def test_a_prompt_starts_from_every_text_of_the_training_rows(
    case: str, settings_of: Settings, tmp_path: Path
) -> None:
    rows = task_rows(20, 0) if case == "classification" else answer_rows(20, 0)
    if case == "classification":
        rows = [{**row, "text_pair": f"very {i}"} for i, row in enumerate(rows)]
    data, output = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    settings = settings_of(
        case, output, data=str(data), init="data", max_steps=1, prompt_lr=1e-9, eval_fraction=0.5
    )
    train(settings)
    # The rows are divided as the run divides them.
    config = TrainConfig(**settings)
    texts = load_task(config).train
    every = [*texts.texts, *(texts.pairs or ()), *(texts.targets or ())]
    backbone = load_backbone(config.model, "SEQ_CLS")
    saved = load_adapter(output).model.prompt
    expected = FusedEPTPrompt(
        saved.config, backbone.get_input_embeddings(), init="data", text=every,
        tokenizer=load_tokenizer(config.model),
    )  # fmt: skip
    torch.testing.assert_close(saved.short_prompt, expected.short_prompt, rtol=0, atol=1e-6)


@pytest.mark.parametrize("packing", [True, False])
def test_texts_without_targets_are_learnt_themselves(
    packing: bool, settings_of: Settings, tmp_path: Path
) -> None:
    texts = ["the play was good and the song is fine", "a walk was good and the soup is fine"]
    data, output = tmp_path / "texts.txt", tmp_path / "out"
    data.write_text("\n".join(texts * 8))
    settings = settings_of(
        "causal", output,
        data=str(data), packing=packing, batch_size=4, eval_generate=2, eval_fraction=0.25,
    )  # fmt: skip
    metrics = train(settings)
    before, after = metrics["before"], metrics["after"]
    assert after["loss"] < 0.6 * before["loss"]
    assert after["token_accuracy"] > before["token_accuracy"]
    assert set(after) == {"step", "loss", "perplexity", "token_accuracy"}
    assert len(metrics["samples"]) == 2
    for sample in metrics["samples"]:  # a text's first half goes on as the text does
        assert f"{sample['text']} {sample['rest']}" in texts
        assert sample["rest"].startswith(sample["output"][:3])
        assert sample["output"]
    assert "rest:" in (output / "samples.md").read_text()
    assert "learnt: the texts themselves, as no row has a target" in describe_run(metrics, output)
    found = evaluate(output, data)
    assert found["loss"] < before["loss"]
    assert found["rows_generated"] == 0
    rows = Rows(("the play",), None, None, "r", (1,))
    assert isinstance(predict(output, rows)[0]["output"], str)
    answers = write_rows(tmp_path / "answers.jsonl", answer_rows(4, 0))
    with pytest.raises(DataError, match=r"answers\.jsonl: target: expected no targets as in train"):
        evaluate(output, answers)


@pytest.mark.parametrize("case", ["classification", "packed"])
def test_non_finite_loss_at_the_first_steps(
    case: str, settings_of: Settings, tmp_path: Path
) -> None:
    rates = dict.fromkeys(("prompt_lr", "offset_lr", "space_lr"), 2e37)
    changes = {**rates, "warmup_ratio": 0.0, "eval_generate": 0}
    with pytest.raises(NonFiniteLossError, match="at step 2; training stopped, no checkpoint yet"):
        train(settings_of(case, tmp_path / "out", **changes))
    assert newest_checkpoint(tmp_path / "out" / "checkpoints") is None
    assert not (tmp_path / "out" / "adapter").exists()


def test_non_finite_loss_stops_and_keeps_the_checkpoint(
    settings_of: Settings, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    settings = settings_of("classification", output, max_steps=12, eval_steps=4)
    train(settings)
    good = weights_of(output)
    (output / "checkpoints" / "checkpoint-12" / "optimizer.pt").unlink()  # no good one
    (output / "metrics.json").unlink()
    kept = newest_checkpoint(output / "checkpoints", 11)
    assert kept is not None
    assert kept.name == "checkpoint-8"
    state = torch.load(kept / "optimizer.pt", weights_only=True)
    for values in state["state"].values():
        values["exp_avg"].fill_(3e38)  # the next step throws every weight out of range
        values["exp_avg_sq"].fill_(1e-40)
    torch.save(state, kept / "optimizer.pt")
    mark_complete(kept)
    with pytest.raises(NonFiniteLossError, match=r"not finite at step 1\d.*checkpoint-8") as caught:
        train(settings, resume=True)
    assert caught.value.step == 10
    assert newest_checkpoint(output / "checkpoints", 11) == kept
    assert weights_of(output) == good
    assert not (output / "metrics.json").exists()


def test_an_earlier_run_stays_until_everything_is_found_good(
    settings_of: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    settings = settings_of("classification", output, max_steps=2)
    with pytest.raises(FileExistsError, match="output: expected an empty folder"):
        train(settings)
    with pytest.raises(FileExistsError, match="output: expected a run to resume"):
        train(settings, resume=True)
    train(settings, overwrite=True)
    assert (output / "notes.txt").read_text() == "mine"
    before = weights_of(output)
    with pytest.raises(DataError, match=r"gone\.jsonl"):
        train({**settings, "data": str(tmp_path / "gone.jsonl")}, overwrite=True)

    def refuse(*args: Any, **options: Any) -> None:
        raise ValueError("no trainer today")

    monkeypatch.setattr(PromptTrainer, "__init__", refuse)
    with pytest.raises(ValueError, match="no trainer today"):
        train(settings, overwrite=True)
    assert weights_of(output) == before
    assert (output / "metrics.json").exists()


def test_prompt_shrinks_to_the_backbones_positions(settings_of: Settings, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", max_position_embeddings=14)
    changes = {"model": str(model), "max_steps": 2}
    metrics = train(settings_of("classification", tmp_path / "out", **changes))
    assert metrics["prompt"]["max_length"] == 10
    assert metrics["rows"]["train_cut"] > 0


def test_bf16_on_a_cpu_runs_if_asked_for(settings_of: Settings, tmp_path: Path) -> None:
    metrics = train(settings_of("classification", tmp_path / "out", max_steps=3, bf16=True))
    assert metrics["bf16"] is True
    assert {t.dtype for t in tensors_of(tmp_path / "out").values()} == {torch.float32}


@pytest.mark.parametrize(
    ("case", "changes", "error", "message"),
    [
        ("classification", {"model": "{nothing}"}, ValueError, "model: expected a folder or hub"),
        ("classification", {"eval_data": "{pairs}"}, DataError, r".*text_pair: expected no second"),
        ("causal", {"max_target_length": 60}, ValueError, "max_target_length: expected less than"),
        ("packed", {"pack_length": 8}, ValueError, "pack_length: expected at least the longest"),
        ("packed", {"gradient_accumulation_steps": 99}, ValueError, "gradient_accumulation_ste"),
        ("causal", {"gradient_accumulation_steps": 99}, ValueError, "gradient_accumulation_ste"),
        ("causal", {"model": "{t5}"}, ValueError, "model: expected a folder or hub id"),
        ("causal", {"model": "{gpt2}", "max_new_tokens": 500}, ValueError,
         "max_new_tokens: expected at most 45, for which the model has positions, got 500"),
        ("packed", {"model": "{mistral}"}, ValueError,
         "pack_index: expected a window of at least 26 positions"),
        ("causal", {"data": "{texts}", "max_length": 1}, ValueError, "max_length: expected room f"),
        ("causal", {"data": "{texts}", "metric": "f1"}, ValueError,
         "metric: expected one of token_accuracy, loss for rows without targets, got 'f1'"),
        ("causal", {"eval_data": "{texts}"}, DataError, r".*texts\.txt: target: expected targets "),
        ("causal", {"target_field": "answr"}, DataError, r".*train\.jsonl: answr: expected target"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_training(
    case: str,
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
    settings_of: Settings,
    places: dict[str, tuple[Path, Path]],
    tmp_path: Path,
) -> None:
    made = tmp_path / "made"
    makers: dict[str, Callable[[], Any]] = {
        "{nothing}": lambda: None,
        "{t5}": lambda: made.symlink_to(places["seq2seq"][0]),
        "{gpt2}": lambda: save_gpt2(made),
        "{mistral}": lambda: save_mistral(made),
        "{texts}": lambda: made.with_name("texts.txt").write_text("a walk\nthe play\n" * 4),
        "{pairs}": lambda: write_rows(
            made.with_name("pairs.jsonl"), [{**row, "text_pair": "a"} for row in task_rows(4, 0)]
        ),
    }
    names = {"{texts}": "texts.txt", "{pairs}": "pairs.jsonl"}
    for name, value in changes.items():
        if value in makers:
            makers[value]()
            changes = {**changes, name: str(made.with_name(names.get(value, "made")))}
    with pytest.raises(error, match="^" + message):
        train(settings_of(case, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def save_gpt2(folder: Path) -> None:
    """Positions have a table of 64."""
    size = transformers.AutoConfig.from_pretrained(save_llama(folder, steps=0)).vocab_size
    sizes = {"vocab_size": size, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)


def save_mistral(folder: Path) -> None:
    """A window of 12 positions."""
    path = save_llama(folder, steps=0) / "config.json"
    kind = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 12}
    path.write_text(json.dumps({**json.loads(path.read_text()), **kind}))


class ByteTokenizer:
    """Pieces that keep the space before a word, as byte-level ones do."""

    bos_token_id = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[str]]:
        return {"input_ids": re.findall(" ?[^ ]+", text)}


def test_f1_goes_by_the_texts_that_exact_match_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    """White space at the ends of a target changes neither."""
    rows = Rows(("a", "b"), None, None, "r", (1, 2), (" yes good", "no"))

    def writer(model: Any, inputs: Any) -> list[str]:
        return ["yes good", "no idea"]

    writer.tokenizer = ByteTokenizer()  # type: ignore[attr-defined]
    monkeypatch.setattr("ept_fast.training.evaluation.tokenise_inputs", lambda *args: None)
    form = TextForm("causal", 8, 8)
    evaluation = TextEvaluation(None, None, rows, form, writer)  # type: ignore[arg-type]
    samples = evaluation.samples(None)
    assert [s["exact_match"] for s in samples] == [True, False]
    assert [s["f1"] for s in samples] == [1, pytest.approx(2 / 3)]


def test_a_least_length_of_the_model_is_left_out(places: dict[str, tuple[Path, Path]]) -> None:
    folder, data = places["seq2seq"]
    model = get_ept_model(
        load_backbone(str(folder), "SEQ_2_SEQ_LM"),
        EPTConfig(32, num_virtual_tokens=2, max_length=16, rank=1),
        "SEQ_2_SEQ_LM",
    )
    tokenizer = load_tokenizer(str(folder))
    rows = read_rows(data / "test.jsonl", answer="target").take(range(4))
    inputs = tokenise_inputs(rows, tokenizer, TextForm("seq2seq", 16, 6))
    writer = Writer(tokenizer, 4, 6)
    expected = writer(model, inputs)
    model.backbone.generation_config.update(min_length=6, num_return_sequences=2, num_beams=2)
    assert writer(model, inputs) == expected


def test_an_adapter_that_a_user_saved_predicts(
    places: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    folder = str(places["causal"][0])
    config = EPTConfig(32, num_virtual_tokens=4, max_length=24, rank=2, num_spaces=0)
    model = get_ept_model(
        load_backbone(folder, "CAUSAL_LM"), config, "CAUSAL_LM", base_model=folder
    )
    model.save_pretrained(tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter")
    assert adapter.form is not None
    assert (adapter.form.max_length, adapter.form.separator) == (24, "")
    rows = Rows(("it : the play was fine",), None, None, "r", (1,))
    assert len(predict(adapter, rows, max_new_tokens=3)) == 1
    model.save_pretrained(tmp_path / "bad", extra={"form": {"task": "causal", "max_length": "9"}})
    with pytest.raises(CheckpointError, match=r"adapter\.json: extra: "):
        load_adapter(tmp_path / "bad")
    other = get_ept_model(load_backbone(folder), config, "FEATURE_EXTRACTION")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"task: expected one of SEQ_CLS, SEQ_2_SEQ_LM, CAU"):
        load_adapter(tmp_path / "other")


def test_rows_to_write_for_are_spread() -> None:
    rows = Rows(tuple("abcdefgh"), None, None, "r", tuple(range(1, 9)))
    assert spread(rows, 3).texts == ("a", "c", "f")
    assert spread(rows, 99).texts == rows.texts


def test_a_pooler_that_is_not_there_is_an_error() -> None:
    config = transformers.DistilBertConfig(
        vocab_size=30, dim=32, hidden_dim=32, n_layers=1, n_heads=2
    )
    prompt = EPTConfig(32, num_virtual_tokens=4, max_length=16, rank=3)
    backbone = transformers.DistilBertModel(config)
    model = get_ept_model(backbone, prompt, "SEQ_CLS", labels=("a", "b"), pooling="model")
    with pytest.raises(ValueError, match="pooling: expected a backbone with a pooler"):
        model(torch.ones(2, 5, dtype=torch.int64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # Methods that other tests register may follow.
        ({"method": "lora"}, r"method: expected one of ept, dept, pt(, \w+)*, got 'lora'"),
        ({"pooling": "max"}, "pooling: expected one of mean, first, last, model"),
        ({"max_steps": 0}, "max_steps: expected an integer >= 1, got 0"),
        ({"num_labels": 1}, "num_labels: expected an integer >= 2, got 1"),
        ({"prompt_lr": 0.0}, "prompt_lr: expected a finite number > 0, got 0.0"),
        ({"epochs": math.inf}, "epochs: expected a finite number > 0, got inf"),
        ({"weight_decay": -0.1}, "weight_decay: expected a number >= 0, got -0.1"),
        ({"warmup_ratio": 1.0}, "warmup_ratio: expected 0 <= warmup_ratio < 1, got 1.0"),
        ({"eval_fraction": 0.0}, "eval_fraction: expected a finite number > 0, got 0.0"),
        ({"eval_fraction": 1.0}, "eval_fraction: expected 0 < eval_fraction < 1, got 1.0"),
        ({"model": ""}, "model: expected a non-empty string, got ''"),
        (
            {"task": "seq2seq", "packing": True},
            r"packing: expected the task causal \(an encoder-decoder counts positions by column\)",
        ),
        ({"packing": True}, "packing: expected the task causal, got classification"),
        ({"task": "causal", "pack_length": 9}, "pack_length: expected None without packing, got 9"),
        ({"task": "causal", "metric": "accuracy"}, "metric: expected one of token_accuracy, exact"),
        ({"metric": "f1"}, "metric: expected one of accuracy, macro_f1, matthews"),
        (
            {"task": "causal", "metric": "f1", "eval_generate": 0},
            "eval_generate: expected an integer >= 1 for the metric f1, got 0",
        ),
        ({"num_beams": 1001}, "num_beams: expected an integer <= 1000, got 1001"),
        ({"seed": -1}, "seed: expected an integer >= 0, got -1"),
        ({"seed": 2**32}, "seed: expected an integer <= 4294967295, got 4294967296"),
    ],
)
def test_config_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message):
        TrainConfig(**{"model": "m", "data": "d", "output": "o", **changes})


def test_budget_that_leaves_no_rank_is_an_error() -> None:
    config = TrainConfig(model="m", data="d", output="o", prompt_length=21, num_spaces=0)
    with pytest.raises(ValueError, match="prompt_length: expected a budget that leaves a rank"):
        config.prompt_config(32)


# Metrics --------------------------------------------------------------------------------------

# predictions, labels, accuracy, macro F1, Matthews correlation; worked out by hand
BY_HAND = {
    "perfect": ([0, 1, 2], [0, 1, 2], 1.0, 1.0, 1.0),
    "all wrong": ([1, 0], [0, 1], 0.0, 0.0, -1.0),
    "one class predicted": ([0, 0, 0, 0], [0, 0, 0, 1], 3 / 4, (6 / 7 + 0) / 2, 0.0),
    # tp 2, tn 1, fp 1, fn 1
    "binary": ([1, 1, 1, 0, 0], [1, 1, 0, 1, 0], 3 / 5, (2 / 3 + 1 / 2) / 2, 1 / 6),
    # rows of the confusion matrix: (2 0 0), (1 1 0), (0 0 1)
    "three classes": (
        [0, 0, 0, 1, 2], [0, 0, 1, 1, 2], 4 / 5, (4 / 5 + 2 / 3 + 1) / 3,
        (4 * 5 - 9) / math.sqrt((25 - 11) * (25 - 9)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BY_HAND)
def test_metrics_by_hand(case: str) -> None:
    predictions, labels, *expected = BY_HAND[case]
    logits = torch.nn.functional.one_hot(torch.tensor(predictions), 3)
    metrics = label_metrics(logits, torch.tensor(labels), "single_label_classification")
    assert list(metrics) == ["accuracy", "macro_f1", "matthews"]
    assert list(metrics.values()) == pytest.approx(expected, abs=1e-12)


def test_metrics_of_many_classes_need_no_square_of_them() -> None:
    classes = np.arange(100_000)
    assert matthews(classes, classes) == pytest.approx(1.0)
    some = np.array([0, 1, 2, 2, 1, 0, 0])
    other = np.array([0, 2, 2, 2, 1, 0, 1])
    expected = sklearn.metrics.matthews_corrcoef(other, some)
    assert matthews(some, other) == pytest.approx(expected, abs=1e-12)
    assert matthews(np.zeros(3, int), np.zeros(3, int)) == 0.0


def test_metrics_of_several_classes_by_hand() -> None:
    logits = torch.tensor([[1.0, -1.0], [1.0, 2.0], [-3.0, -1.0]])
    labels = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    metrics = label_metrics(logits, labels, "multi_label_classification")
    assert metrics == pytest.approx({"micro_f1": 4 / 6, "macro_f1": 0.5, "subset_accuracy": 1 / 3})


def test_metrics_of_numbers_by_hand() -> None:
    logits, labels = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([0.0, 1.0, 8.0])
    metrics = label_metrics(logits, labels, "regression")
    # Both less their means: (-4, -1, 5) / 3 and (-3, -2, 5).
    pearson = (12 + 2 + 25) / math.sqrt((16 + 1 + 25) * (9 + 4 + 25))
    assert metrics == pytest.approx({"pearson": pearson, "spearman": 1.0, "mae": 2.0})
    constant = label_metrics(torch.ones(3, 1), labels, "regression")
    assert (constant["pearson"], constant["spearman"]) == (0.0, 0.0)


def test_metrics_without_rows_are_an_error() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        label_metrics(torch.empty(0, 2), torch.empty(0), "single_label_classification")
