"""The training job on text tasks: it learns, writes, and weighs every token the same."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ept_fast import CheckpointError, EPTConfig, get_ept_model
from ept_fast.cli import describe_run
from ept_fast.training import trainer
from ept_fast.training.checkpoints import newest_checkpoint
from ept_fast.training.config import TrainConfig
from ept_fast.training.data import DataError, Rows, read_rows
from ept_fast.training.evaluation import TextEvaluation, Writer, spread
from ept_fast.training.job import evaluate, load_adapter, predict, train
from ept_fast.training.tokens import TextForm, tokenise_inputs
from ept_fast.training.trainer import NonFiniteLossError, PromptTrainer
from ept_fast.transformers.backbone import load_backbone, load_tokenizer
from tests.tiny import (
    ANSWERS,
    answer_rows,
    save_llama,
    save_model,
    save_t5,
    save_task,
    small_run,
    task_rows,
    weights_of,
    write_rows,
)

pytestmark = pytest.mark.usefixtures("one_thread", "empty_pictures")

CASES: dict[str, dict[str, Any]] = {
    "seq2seq": {"task": "seq2seq"},
    "causal": {"task": "causal"},
    "packed": {"task": "causal", "packing": True, "pack_length": 60, "batch_size": 4},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"seq2seq": save_t5(folder / "t5"), "causal": save_llama(folder / "llama")}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_task(tmp_path_factory.mktemp("data"), answer_rows)


def settings_of(
    models: dict[str, Path], data: Path, output: Path, case: str, **changes: Any
) -> dict[str, Any]:
    choices: dict[str, Any] = {
        "prompt_length": 48,
        "max_target_length": 6,
        "prompt_lr": 5e-2,
        "offset_lr": 2e-2,
        "batch_size": 16,
        **CASES[case],
        **changes,
    }
    return small_run(models[CASES[case]["task"]], data, output, **choices)


@pytest.fixture(scope="module")
def finished(
    models: dict[str, Path], data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, dict[str, Any]]]:
    """A finished run of each case: its folder and its metrics."""
    runs = {}
    for case in CASES:
        output = tmp_path_factory.mktemp(case) / "out"
        config = TrainConfig(**settings_of(models, data, output, case, eval_steps=15))
        runs[case] = (output, train(config, progress=False))
    return runs


@pytest.mark.parametrize("case", CASES)
def test_training_learns_and_leaves_its_files(
    case: str, finished: dict[str, tuple[Path, dict[str, Any]]]
) -> None:
    output, metrics = finished[case]
    before, after = metrics["before"], metrics["after"]
    assert after["loss"] < 0.5 * before["loss"]
    assert after["perplexity"] == pytest.approx(math.exp(after["loss"]))
    assert before["exact_match"] < 0.2
    assert after["exact_match"] > 0.6
    assert after["f1"] >= after["exact_match"]
    assert after["token_accuracy"] > max(before["token_accuracy"], 0.8)
    assert len(metrics["curves"]["loss"]) == 30
    assert metrics["parameters"]["head"] == 0
    assert metrics["metric"] == "token_accuracy"
    assert metrics == json.loads((output / "metrics.json").read_text())
    found = {path.name for path in output.iterdir()}
    assert found == {
        "adapter", "checkpoints", "metrics.json", "run.json", "learning_curves.png",
        "gate_weights.png", "samples.md",
    }  # fmt: skip
    samples = metrics["samples"]
    assert len(samples) == 40  # every evaluation row: there are fewer than eval_generate
    assert sum(s["exact_match"] for s in samples) / 40 == after["exact_match"]
    assert {s["target"] for s in samples} == set(ANSWERS)
    report = (output / "samples.md").read_text()
    assert report.count(": match\n") == sum(s["exact_match"] for s in samples)
    for sample in samples:
        assert f"    {sample['text']}\n" in report
        assert sample["exact_match"] == (sample["output"] == sample["target"])


def test_packing_reads_fewer_positions(
    finished: dict[str, tuple[Path, dict[str, Any]]],
) -> None:
    """The same number of steps and about the same number of texts a step."""
    read = {
        case: metrics["positions"] / metrics["tokens"] for case, (_, metrics) in finished.items()
    }
    assert read["packed"] < 0.8 * read["causal"]
    assert finished["packed"][1]["positions"] > finished["packed"][1]["tokens"]


@pytest.mark.parametrize("case", CASES)
def test_evaluate_and_predict_need_the_adapter_alone(
    case: str, finished: dict[str, tuple[Path, dict[str, Any]]], data: Path
) -> None:
    output, metrics = finished[case]
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
def test_token_metrics_are_those_of_the_definition(
    case: str, finished: dict[str, tuple[Path, dict[str, Any]]], data: Path
) -> None:
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
    [("seq2seq", {"gradient_accumulation_steps": 2}), ("packed", {"keep": "best"})],
)
def test_same_seed_same_bits_in_one_go_or_two(
    case: str, changes: dict[str, Any], models: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    """A run that was cut off goes on to the same weights."""
    changes = {"max_steps": 6, "eval_steps": 2, "eval_generate": 3, "batch_size": 4, **changes}
    runs = {}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        torch.randn(5)  # a random state left by the caller must not matter
        settings = settings_of(models, data, tmp_path / name, case, **changes, seed=seed)
        metrics = train(TrainConfig(**settings), progress=False)
        runs[name] = (weights_of(tmp_path / name), metrics["curves"], metrics["samples"])
    assert runs["a"] == runs["b"]
    assert runs["a"][0] != runs["c"][0]

    output, config = tmp_path / "c", TrainConfig(**settings)
    for folder in ("adapter", "checkpoints/checkpoint-6"):
        shutil.rmtree(output / folder)
    (output / "metrics.json").unlink()
    again = train(config, resume=True, progress=False)
    assert weights_of(output) == runs["c"][0]
    for name in ("before", "after", "best", "curves", "tokens", "positions", "samples"):
        assert again[name] == metrics[name], name
    other = dataclasses.replace(config, gradient_accumulation_steps=3)
    with pytest.raises(ValueError, match=r"^gradient_accumulation_steps: expected . as in the run"):
        train(other, resume=True, progress=False)


# Gradient accumulation ------------------------------------------------------------------------


class _FirstStep(PromptTrainer):
    """Keeps the gradients of the first step, before they are clipped."""

    gradients: dict[str, Tensor]

    def _clip_grad_norm(self, model: Any) -> Any:
        if not self.losses[1:]:
            type(self).gradients = {
                name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
            }
        return super()._clip_grad_norm(model)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """15 targets of 1 to 5 words: parts of steps differ in label tokens, and a last one in rows."""
    rows = [
        {**row, "target": " ".join(["good"] * (1 + i % 5)), "label": i % 2}
        for i, row in enumerate(task_rows(15, 0))
    ]
    return write_rows(tmp_path_factory.mktemp("uneven") / "rows.jsonl", rows)


def first_step(config: TrainConfig, patch: pytest.MonkeyPatch) -> tuple[dict[str, Tensor], Any]:
    patch.setattr(trainer, "PromptTrainer", _FirstStep)
    metrics = train(config, progress=False)
    return _FirstStep.gradients, metrics


@pytest.mark.parametrize("case", [*CASES, "classification"])
def test_two_batches_of_four_are_one_of_eight(
    case: str,
    models: dict[str, Path],
    uneven: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = {}
    for size, parts in ((8, 1), (4, 2)):
        choices = {
            "batch_size": size,
            "gradient_accumulation_steps": parts,
            "eval_data": str(uneven),
            "max_steps": 3,
            "eval_generate": 0,
            "eval_before": False,
            "prompt_lr": 1e-3,
        }
        output = tmp_path / str(parts)
        if case == "classification":
            model = tmp_path / "model"
            settings = small_run(save_model(model), uneven, output, **choices)
        else:
            settings = settings_of(models, uneven, output, case, **choices)
            if case == "packed":
                settings["pack_length"] = 22
        found[parts] = first_step(TrainConfig(**settings), monkeypatch)
    for name, gradient in found[1][0].items():
        torch.testing.assert_close(found[2][0][name], gradient, rtol=1e-5, atol=1e-6)
    assert any(bool(gradient.any()) for gradient in found[1][0].values())
    for metrics in found[1][1], found[2][1]:
        assert len(metrics["curves"]["loss"]) == 3
    losses = [metrics["curves"]["loss"] for _, metrics in found.values()]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert found[1][1]["tokens"] == found[2][1]["tokens"]


# Choices --------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["loss", "exact_match"])
def test_best_keeps_the_best_evaluation(
    metric: str, models: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    # What the model gives without a prompt, and less and less the more it learns something else.
    rows = [{**row, "target": "very"} for row in answer_rows(16, 1)]
    others = write_rows(tmp_path / "others.jsonl", rows)
    changes = {
        "keep": "best", "metric": metric, "max_steps": 6, "eval_steps": 2, "eval_generate": 8,
        "eval_data": str(others), "init": "random",
    }  # fmt: skip
    settings = settings_of(models, data, tmp_path / "out", "causal", **changes)
    metrics = train(TrainConfig(**settings), progress=False)
    values = [e[metric] for e in metrics["curves"]["evaluation"]]
    best = min(values) if metric == "loss" else max(values)
    assert values[-1] != best, f"the case has to tell best from last {values}"
    assert metrics["after"][metric] == best
    again = evaluate(tmp_path / "out", others, eval_generate=8)
    assert again[metric] == pytest.approx(best, rel=1e-5)
    assert len(metrics["samples"]) == 8
    mean = sum(s["exact_match"] for s in metrics["samples"]) / 8
    assert mean == metrics["after"]["exact_match"]


@pytest.mark.parametrize("packing", [True, False])
def test_texts_without_targets_are_learnt_themselves(
    packing: bool, models: dict[str, Path], tmp_path: Path
) -> None:
    texts = ["the play was good and the song is fine", "a walk was good and the soup is fine"]
    (tmp_path / "texts.txt").write_text("\n".join(texts * 8))
    output = tmp_path / "out"
    settings = settings_of(
        models, tmp_path / "texts.txt", output, "causal",
        packing=packing, batch_size=4, eval_generate=2, eval_fraction=0.25,
    )  # fmt: skip
    metrics = train(TrainConfig(**settings), progress=False)
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
    assert evaluate(output, tmp_path / "texts.txt")["loss"] < before["loss"]
    rows = Rows(("the play",), None, None, "r", (1,))
    assert isinstance(predict(output, rows)[0]["output"], str)
    answers = write_rows(tmp_path / "answers.jsonl", answer_rows(4, 0))
    with pytest.raises(DataError, match=r"answers\.jsonl: target: expected no targets as in train"):
        evaluate(output, answers)
    with pytest.raises(ValueError, match="metric: expected one of token_accuracy, loss for rows"):
        train(TrainConfig(**{**settings, "metric": "f1", "output": str(tmp_path / "no")}))


def test_non_finite_loss_stops(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    rates = dict.fromkeys(("prompt_lr", "offset_lr", "space_lr"), 1e25)
    changes = {**rates, "warmup_ratio": 0.0, "eval_generate": 0}
    settings = settings_of(models, data, tmp_path / "out", "packed", **changes)
    with pytest.raises(NonFiniteLossError, match="at step 2; training stopped"):
        train(TrainConfig(**settings), progress=False)
    assert newest_checkpoint(tmp_path / "out" / "checkpoints") is None
    assert not (tmp_path / "out" / "adapter").exists()


@pytest.mark.parametrize(
    ("case", "changes", "error", "message"),
    [
        ("causal", {"max_target_length": 60}, ValueError, "max_target_length: expected less than"),
        ("packed", {"pack_length": 8}, ValueError, "pack_length: expected at least the longest"),
        ("packed", {"gradient_accumulation_steps": 99}, ValueError, "gradient_accumulation_ste"),
        ("causal", {"gradient_accumulation_steps": 99}, ValueError, "gradient_accumulation_ste"),
        ("seq2seq", {"task": "causal"}, ValueError, "model: expected a folder or hub id"),
        ("causal", {"data": "{texts}", "max_length": 1}, ValueError, "max_length: expected room f"),
        ("causal", {"eval_data": "{texts}"}, DataError, r".*texts\.txt: target: expected targets "),
        ("causal", {"target_field": "answr"}, DataError, r".*train\.jsonl: answr: expected target"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(
    case: str,
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
    models: dict[str, Path],
    data: Path,
    tmp_path: Path,
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("a walk\nthe play\n" * 4)
    changes = {n: str(texts) if v == "{texts}" else v for n, v in changes.items()}
    settings = {**settings_of(models, data, tmp_path / "out", case), **changes}
    with pytest.raises(error, match="^" + message):
        train(TrainConfig(**settings), progress=False)
    assert not (tmp_path / "out").exists()


def test_overwriting_starts_where_everything_is_found_good(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then the earlier run stays."""
    import transformers

    model = save_llama(tmp_path / "model", steps=0)
    size = transformers.AutoConfig.from_pretrained(model).vocab_size
    config = transformers.GPT2Config(
        vocab_size=size,
        n_embd=32,
        n_layer=1,
        n_head=2,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(model)
    output = tmp_path / "out"
    settings = settings_of({"causal": model}, data, output, "causal", max_steps=1, eval_steps=1)
    train(TrainConfig(**settings), progress=False)
    before = weights_of(output)
    for changes, message in (
        ({"max_new_tokens": 500}, "max_new_tokens: expected at most 45, for which the model has"),
        ({"prompt_lr": 1e-2}, "no trainer today"),
    ):
        if "prompt_lr" in changes:

            def refuse(*args: Any, **options: Any) -> None:
                raise ValueError("no trainer today")

            monkeypatch.setattr(PromptTrainer, "__init__", refuse)
        with pytest.raises(ValueError, match=message):
            train(TrainConfig(**{**settings, **changes}), overwrite=True, progress=False)
        assert weights_of(output) == before
        assert (output / "metrics.json").exists()


class ByteTokenizer:
    """Pieces that keep the space before a word, as byte-level ones do."""

    bos_token_id = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[str]]:
        return {"input_ids": re.findall(" ?[^ ]+", text)}


def test_f1_goes_by_the_texts_that_exact_match_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    """White space at the ends of a target changes neither."""
    rows = Rows(("a", "b"), None, None, "r", (1, 2), (" yes good", "no"))
    outputs = ["yes good", "no idea"]

    def writer(model: Any, inputs: Any) -> list[str]:
        return outputs

    writer.tokenizer = ByteTokenizer()  # type: ignore[attr-defined]
    monkeypatch.setattr("ept_fast.training.evaluation.tokenise_inputs", lambda *args: None)
    form = TextForm("causal", 8, 8)
    evaluation = TextEvaluation(None, None, rows, form, writer)  # type: ignore[arg-type]
    samples = evaluation.samples(None)
    assert [s["exact_match"] for s in samples] == [True, False]
    assert [s["f1"] for s in samples] == [1, pytest.approx(2 / 3)]


def test_a_least_length_of_the_model_is_left_out(models: dict[str, Path], data: Path) -> None:
    model = get_ept_model(
        load_backbone(str(models["seq2seq"]), "SEQ_2_SEQ_LM"),
        EPTConfig(32, num_virtual_tokens=2, max_length=16, rank=1),
        "SEQ_2_SEQ_LM",
    )
    tokenizer = load_tokenizer(str(models["seq2seq"]))
    rows = read_rows(data / "test.jsonl", answer="target").take(range(4))
    inputs = tokenise_inputs(rows, tokenizer, TextForm("seq2seq", 16, 6))
    writer = Writer(tokenizer, 4, 6)
    expected = writer(model, inputs)
    model.backbone.generation_config.update(min_length=6, num_return_sequences=2, num_beams=2)
    assert writer(model, inputs) == expected


def test_packing_is_refused_before_training_where_it_would_be_wrong(
    data: Path, tmp_path: Path
) -> None:
    model = save_llama(tmp_path / "model", steps=0)
    config = json.loads((model / "config.json").read_text())
    settings = settings_of({"causal": model}, data, tmp_path / "out", "packed")
    saved = {**config, "model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    (model / "config.json").write_text(json.dumps({**saved, "sliding_window": 12}))
    with pytest.raises(ValueError, match="pack_index: expected a window of at least 26 positions"):
        train(TrainConfig(**settings), progress=False)
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_a_user_saved_predicts(models: dict[str, Path], tmp_path: Path) -> None:
    import transformers

    backbone = transformers.AutoModelForCausalLM.from_pretrained(models["causal"])
    config = EPTConfig(32, num_virtual_tokens=4, max_length=24, rank=2, num_spaces=0)
    model = get_ept_model(backbone, config, "CAUSAL_LM", base_model=str(models["causal"]))
    model.save_pretrained(tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter")
    assert adapter.form is not None
    assert (adapter.form.max_length, adapter.form.separator) == (24, "")
    rows = Rows(("it : the play was fine",), None, None, "r", (1,))
    assert len(predict(adapter, rows, max_new_tokens=3)) == 1
    model.save_pretrained(tmp_path / "bad", extra={"form": {"task": "causal", "max_length": "9"}})
    with pytest.raises(CheckpointError, match=r"adapter\.json: extra: "):
        load_adapter(tmp_path / "bad")


def test_an_adapter_of_another_task_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    import transformers

    encoder = transformers.AutoModel.from_pretrained(models["causal"])
    config = EPTConfig(32, num_virtual_tokens=4, max_length=24, rank=2, num_spaces=0)
    get_ept_model(encoder, config, "FEATURE_EXTRACTION").save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"task: expected one of SEQ_CLS, SEQ_2_SEQ_LM, CAU"):
        load_adapter(tmp_path / "adapter")


def test_rows_to_write_for_are_spread() -> None:
    rows = Rows(tuple("abcdefgh"), None, None, "r", tuple(range(1, 9)))
    assert spread(rows, 3).texts == ("a", "c", "f")
    assert spread(rows, 99).texts == rows.texts
