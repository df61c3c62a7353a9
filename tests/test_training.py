"""The classifier on a frozen encoder, its metrics, and the training job."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ept_fast import CheckpointError, EPTConfig, EPTModel, get_ept_model
from ept_fast.prompts.base import TENSOR_FILE
from ept_fast.training.checkpoints import mark_complete, newest_checkpoint
from ept_fast.training.config import TrainConfig
from ept_fast.training.data import DataError, read_rows
from ept_fast.training.job import evaluate, load_adapter, load_task, predict, train
from ept_fast.training.metrics import classification_metrics
from ept_fast.training.trainer import NonFiniteLossError
from ept_fast.transformers.adapter import ADAPTER_FILE, HEAD_FILE
from ept_fast.transformers.backbone import Profile, load_backbone
from tests.tiny import (
    random_states,
    save_model,
    save_task,
    small_run,
    task_rows,
    tensors_of,
    weights_of,
    write_rows,
)

pytestmark = pytest.mark.usefixtures("one_thread", "empty_pictures")

PROMPT = EPTConfig(32, num_virtual_tokens=4, max_length=16, rank=3, num_spaces=2, space_dim=2)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_task(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(
    model_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A finished run: its folder and its metrics."""
    output = tmp_path_factory.mktemp("run") / "out"
    config = TrainConfig(**small_run(model_folder, data_folder, output))
    return output, train(config, progress=False)


def make_classifier(backbone: nn.Module, seed: int = 0, **choices: Any) -> Any:
    """A classifier whose every trained tensor is random, so that each of them matters."""
    generator = torch.Generator().manual_seed(seed)
    settings: dict[str, Any] = {"labels": ("no", "yes", "maybe"), "generator": generator, **choices}
    model = get_ept_model(backbone, settings.pop("config", PROMPT), "SEQ_CLS", **settings)
    with torch.no_grad():
        for parameter in (*model.prompt.parameters(), *model.head.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def make_batch(lengths: tuple[int, ...] = (9, 5), side: str = "right") -> dict[str, Tensor]:
    """Random ids, padded to the longest."""
    longest = max(lengths)
    draw = torch.Generator().manual_seed(1)
    ids = torch.zeros(len(lengths), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(longest - length, None) if side == "left" else slice(0, length)
        ids[row, place] = torch.randint(5, 20, (length,), generator=draw)
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


# The classifier -------------------------------------------------------------------------------


def test_mean_pooling_is_over_the_text_alone(model_folder: Path) -> None:
    model = make_classifier(load_backbone(str(model_folder)))
    batch = make_batch()
    spliced = model.prompt(**batch)
    hidden = model.backbone(
        inputs_embeds=spliced.inputs_embeds, attention_mask=spliced.attention_mask
    ).last_hidden_state
    for row, length in enumerate((9, 5)):
        pooled = hidden[row, 4 : 4 + length].mean(0)
        expected = pooled @ model.head.weight.T + model.head.bias
        torch.testing.assert_close(model(**batch).logits[row], expected)


def test_model_pooling_is_the_backbones_own(model_folder: Path) -> None:
    model = make_classifier(load_backbone(str(model_folder)), pooling="model")
    batch = make_batch()
    spliced = model.prompt(**batch)
    pooled = model.backbone(
        inputs_embeds=spliced.inputs_embeds, attention_mask=spliced.attention_mask
    ).pooler_output
    expected = pooled @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(**batch).logits, expected)


@pytest.mark.parametrize("pooling", ["mean", "model"])
def test_padding_changes_nothing(model_folder: Path, pooling: str) -> None:
    model = make_classifier(load_backbone(str(model_folder)), pooling=pooling).eval()
    alone = model(**make_batch((9,))).logits
    for side in ("right", "left"):
        ids = make_batch((9,))["input_ids"][0]
        batch = make_batch((12, 9), side)
        batch["input_ids"][1][batch["attention_mask"][1] == 1] = ids
        torch.testing.assert_close(model(**batch).logits[1:], alone, atol=1e-5, rtol=1e-5)


def test_loss_is_the_mean_cross_entropy(model_folder: Path) -> None:
    model = make_classifier(load_backbone(str(model_folder)))
    labels = torch.tensor([2, 0])
    output = model(**make_batch(), labels=labels)
    expected = -output.logits.log_softmax(-1)[[0, 1], labels].mean()
    torch.testing.assert_close(output.loss, expected)
    assert model(**make_batch()).loss is None


def test_token_types_reach_the_text_and_not_the_prompt(model_folder: Path) -> None:
    model = make_classifier(load_backbone(str(model_folder)))
    seen: dict[str, Tensor] = {}
    forward = model.backbone.forward

    def spy(**inputs: Any) -> Any:
        seen.update({name: value for name, value in inputs.items() if isinstance(value, Tensor)})
        return forward(**inputs)

    model.backbone.forward = spy
    batch = make_batch()
    types = (torch.arange(9) > 4).long().expand(2, 9)
    plain, typed = model(**batch).logits, model(**batch, token_type_ids=types).logits
    assert not torch.equal(plain, typed)
    assert seen["token_type_ids"].tolist() == [[0] * 4 + [0] * 5 + [1] * 4] * 2
    assert seen["position_ids"][0].tolist() == list(range(13))


SMALL = {
    "vocab_size": 30,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def test_roberta_positions_start_behind_its_padding_index() -> None:
    torch.manual_seed(0)
    config = transformers.RobertaConfig(**SMALL, max_position_embeddings=20, pad_token_id=1)
    backbone = transformers.RobertaModel(config).eval()
    assert Profile.of(backbone).text_limit(4) == 20 - 2 - 4
    model = make_classifier(backbone).eval()
    batch = make_batch((9,))
    spliced = model.prompt(**batch)
    # Given no position ids, the backbone counts by itself; that is the specification here.
    hidden = backbone(inputs_embeds=spliced.inputs_embeds).last_hidden_state[:, 4:]
    expected = hidden.mean(1) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(**batch).logits, expected)


def other_backbones() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    t5 = transformers.T5Config(
        vocab_size=30, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.5
    )
    distil = transformers.DistilBertConfig(
        vocab_size=30, dim=32, hidden_dim=32, n_layers=1, n_heads=2, dropout=0.5
    )
    electra = transformers.ElectraConfig(**{**SMALL, "hidden_size": 48}, embedding_size=32)
    return {
        "t5 encoder": transformers.T5EncoderModel(t5),
        "distilbert": transformers.DistilBertModel(distil),
        "electra": transformers.ElectraModel(electra),
    }


@pytest.mark.parametrize("name", ["t5 encoder", "distilbert", "electra"])
def test_other_encoders_train_without_dropout(name: str) -> None:
    model = make_classifier(other_backbones()[name]).train()
    batch = {**make_batch(), "labels": torch.tensor([0, 1])}
    model(**batch).loss.backward()
    assert all(p.grad is not None for p in model.prompt.parameters())
    assert model(**batch).loss.item() == model(**batch).loss.item()


def test_backbone_stays_frozen_and_in_evaluation_mode(model_folder: Path) -> None:
    model = make_classifier(load_backbone(str(model_folder)))
    assert model.train() is model
    assert model.training
    assert not any(module.training for module in model.backbone.modules())
    before = {name: p.clone() for name, p in model.backbone.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**make_batch(), labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    for name, parameter in model.backbone.named_parameters():
        assert parameter.grad is None, name
        assert torch.equal(parameter, before[name]), name
    counts = model.parameter_counts()
    assert counts["prompt"] == PROMPT.num_parameters
    assert counts["head"] == 33 * 3
    assert counts["frozen"] == sum(p.numel() for p in before.values())


def test_groups_have_four_learning_rates(model_folder: Path) -> None:
    model = make_classifier(load_backbone(str(model_folder)))
    groups = model.parameter_groups(1.0, 2.0, 3.0, 4.0)
    assert [(g["name"], g["lr"]) for g in groups] == [
        ("prompt", 1.0),
        ("offset", 2.0),
        ("spaces", 3.0),
        ("head", 4.0),
    ]
    grouped = {id(p) for g in groups for p in g["params"]}
    assert grouped == {id(p) for p in model.parameters() if p.requires_grad}


def test_too_long_a_text_is_an_error_before_the_backbone(tmp_path: Path) -> None:
    folder = save_model(tmp_path, max_position_embeddings=12)
    model = make_classifier(load_backbone(str(folder)))
    assert model(**make_batch((8,))).logits.shape == (1, 3)
    message = r"input_ids: expected at most 8 positions \(the model's 12 without .* 4\), got 9"
    with pytest.raises(ValueError, match=message):
        model(**make_batch((9,)))


@pytest.mark.parametrize(
    ("choices", "error", "message"),
    [
        ({"labels": ("a",)}, ValueError, "labels: expected at least 2 different names"),
        ({"labels": ("a", "a")}, ValueError, "labels: expected at least 2 different names"),
        ({"pooling": "max"}, ValueError, "pooling: expected one of mean, first, last, model"),
        ({"head_dropout": 1.0}, ValueError, "head_dropout: expected 0 <= head_dropout < 1"),
        ({"config": EPTConfig(16, rank=2)}, ValueError, "hidden_size 16, got 32"),
        (
            {"config": EPTConfig(32, num_virtual_tokens=64, rank=2)},
            ValueError,
            "num_virtual_tokens: expected room for text in the model's 64 positions, got 64",
        ),
    ],
)
def test_classifier_errors(
    model_folder: Path, choices: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_classifier(load_backbone(str(model_folder)), **choices)


def test_a_module_without_embeddings_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model: expected a model with .* got Linear\(input\)"):
        get_ept_model(nn.Linear(2, 2), PROMPT, "SEQ_CLS", labels=("a", "b"))


def test_pooler_that_is_not_there_is_an_error() -> None:
    backbone = other_backbones()["distilbert"]
    model = make_classifier(backbone, pooling="model")
    with pytest.raises(ValueError, match="pooling: expected a backbone with a pooler"):
        model(**make_batch())


# Its files ------------------------------------------------------------------------------------


def test_saved_adapter_gives_the_same_logits(model_folder: Path, tmp_path: Path) -> None:
    backbone = load_backbone(str(model_folder))
    model = make_classifier(backbone, base_model=str(model_folder), head_dropout=0.25).eval()
    model.save_pretrained(tmp_path / "adapter", extra={"note": 1})
    again = EPTModel.from_pretrained(tmp_path / "adapter")
    assert not again.training
    assert (again.labels, again.pooling) == (model.labels, "mean")
    assert again.description.head_dropout == 0.25
    assert torch.equal(again(**make_batch()).logits, model(**make_batch()).logits)
    names = sorted(path.name for path in (tmp_path / "adapter").iterdir())
    assert names == [ADAPTER_FILE, "ept_config.json", TENSOR_FILE, HEAD_FILE]
    size = sum(path.stat().st_size for path in (tmp_path / "adapter").iterdir())
    trained = model.parameter_counts()["prompt"] + model.parameter_counts()["head"]
    assert size < 4 * trained + 6000  # no backbone among it


def truncate(folder: Path) -> None:
    path = folder / TENSOR_FILE
    path.write_bytes(path.read_bytes()[:-8])


def swap_head(folder: Path) -> None:
    tensors = load_file(folder / HEAD_FILE)
    save_file({name: t + 1 for name, t in tensors.items()}, folder / HEAD_FILE)


def edit(**changes: Any) -> Any:
    def apply(folder: Path) -> None:
        values = json.loads((folder / ADAPTER_FILE).read_text())
        values.update(changes)
        kept = {name: value for name, value in values.items() if value != "gone"}
        (folder / ADAPTER_FILE).write_text(json.dumps(kept))

    return apply


DAMAGE = {
    "truncated tensors": (truncate, "sha256: expected the files it was saved with"),
    "head of another run": (swap_head, "sha256: expected the files it was saved with"),
    "no head": (lambda f: (f / HEAD_FILE).unlink(), "head.safetensors: expected a readable file"),
    "no description": (lambda f: (f / ADAPTER_FILE).unlink(), "adapter.json: expected a readable"),
    "half a description": (
        lambda f: (f / ADAPTER_FILE).write_text('{"format": '),
        "adapter.json: expected a JSON object",
    ),
    "another format": (edit(format="other"), "expected an adapter with .* got .*'other'"),
    "newer format": (edit(format_version=3), "expected an adapter with .* got .*3"),
    "field missing": (edit(labels="gone"), "got no labels"),
    "another model": (
        edit(base_model_type="gpt2"),
        "base_model_type: expected 'bert' as in this model, got 'gpt2'",
    ),
    "other labels": (edit(labels=["a", "b"]), "head.safetensors: .*expected shape"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_adapters_are_refused(case: str, model_folder: Path, tmp_path: Path) -> None:
    damage, message = DAMAGE[case]
    backbone = load_backbone(str(model_folder))
    folder = tmp_path / "adapter"
    make_classifier(backbone, base_model=str(model_folder)).save_pretrained(folder)
    EPTModel.from_pretrained(folder, backbone)
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        EPTModel.from_pretrained(folder, backbone)


def test_a_refused_load_changes_nothing(model_folder: Path, tmp_path: Path) -> None:
    backbone = load_backbone(str(model_folder))
    make_classifier(backbone, seed=1).save_pretrained(tmp_path)
    truncate(tmp_path)
    model = make_classifier(backbone, seed=2)
    before = model(**make_batch()).logits
    with pytest.raises(CheckpointError):
        model.load_pretrained(tmp_path)
    assert torch.equal(model(**make_batch()).logits, before)


def test_non_finite_weights_are_never_saved(model_folder: Path, tmp_path: Path) -> None:
    model = make_classifier(load_backbone(str(model_folder)))
    with torch.no_grad():
        model.head.bias[0] = math.nan
    with pytest.raises(ValueError, match="bias: expected finite values"):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


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
    metrics = classification_metrics(predictions, labels, 3)
    assert list(metrics) == ["accuracy", "macro_f1", "matthews"]
    assert list(metrics.values()) == pytest.approx(expected, abs=1e-12)


def test_binary_matthews_agrees_with_its_own_formula() -> None:
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (500,), generator=draw)
    flips = torch.rand(500, generator=draw) < 0.3
    predictions = torch.where(flips, 1 - labels, labels)
    tn, fp, fn, tp = ((2 * labels + predictions == cell).sum().item() for cell in range(4))
    expected = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    metrics = classification_metrics(predictions, labels, 2)
    assert metrics["matthews"] == pytest.approx(expected, abs=1e-12)
    assert metrics["accuracy"] == pytest.approx(1 - flips.float().mean().item())


def test_metrics_of_many_classes_need_no_square_of_them() -> None:
    metrics = classification_metrics([0, 99_999, 7], [0, 99_999, 8], 100_000)
    assert metrics["accuracy"] == pytest.approx(2 / 3)
    assert metrics["macro_f1"] == pytest.approx(2 / 4)


def test_metrics_without_rows_are_an_error() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        classification_metrics([], [], 2)


# The job --------------------------------------------------------------------------------------


def test_training_learns_and_leaves_its_files(finished: tuple[Path, dict[str, Any]]) -> None:
    output, metrics = finished
    assert metrics["before"]["step"] == 0
    assert metrics["after"]["step"] == 30
    assert metrics["after"]["loss"] < metrics["before"]["loss"]
    assert metrics["after"]["accuracy"] > metrics["before"]["accuracy"]
    assert [e["step"] for e in metrics["curves"]["evaluation"]] == [0, 10, 20, 30]
    assert len(metrics["curves"]["loss"]) == 30
    assert metrics == json.loads((output / "metrics.json").read_text())
    found = {path.name for path in output.iterdir()}
    assert found == {
        "adapter", "checkpoints", "metrics.json", "run.json", "learning_curves.png",
        "gate_weights.png",
    }  # fmt: skip
    assert metrics["parameters"]["prompt"] <= 24 * 32
    gate = torch.tensor(metrics["gate_weights"])
    assert gate.shape == (4, 2)
    torch.testing.assert_close(gate.sum(-1), torch.ones(4))
    assert metrics["tokens"] > 30 * 8 * 5
    assert 0 < metrics["seconds_per_step"] < 60
    assert metrics["peak_memory_bytes"] > 50e6


def test_checkpoints_hold_no_backbone(finished: tuple[Path, dict[str, Any]]) -> None:
    output, metrics = finished
    folders = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert folders == ["checkpoint-20", "checkpoint-30"]
    tensors = 0
    for path in (output / "checkpoints").rglob("*.safetensors"):
        tensors += sum(t.numel() for t in load_file(path).values())
    counts = metrics["parameters"]
    assert tensors == 2 * (counts["prompt"] + counts["head"])
    for path in (output / "checkpoints").rglob("*"):
        assert path.suffix != ".bin", path


def test_loading_a_run_draws_no_random_numbers(finished: tuple[Path, dict[str, Any]]) -> None:
    states = random_states()
    load_adapter(finished[0])
    assert random_states() == states


def test_evaluate_and_predict_agree_with_training(
    finished: tuple[Path, dict[str, Any]], data_folder: Path
) -> None:
    output, metrics = finished
    found = evaluate(output, data_folder, split="validation", batch_size=7)
    assert found["rows"] == 40
    for name in ("accuracy", "macro_f1", "matthews"):
        assert found[name] == metrics["after"][name]
    rows = read_rows(data_folder / "validation.jsonl")
    results = predict(output / "adapter", rows, batch_size=3)
    right = sum(r["label"] == label for r, label in zip(results, rows.labels or (), strict=True))
    assert right / 40 == metrics["after"]["accuracy"]
    for result in results:
        assert list(result["probabilities"]) == ["0", "1"]
        assert sum(result["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert result["probabilities"][str(result["label"])] >= 0.5


@pytest.mark.default_algorithms
def test_same_seed_same_bits(
    finished: tuple[Path, dict[str, Any]], model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    runs = {}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        torch.randn(5)  # a random state left by the caller must not matter
        settings = small_run(
            model_folder, data_folder, tmp_path / name, max_steps=6, seed=seed, head_dropout=0.2
        )
        metrics = train(TrainConfig(**settings), progress=False)
        runs[name] = (weights_of(tmp_path / name), metrics["curves"])
    assert runs["a"] == runs["b"]
    assert runs["a"][0] != runs["c"][0]


@pytest.mark.default_algorithms
def test_weight_decay_shrinks_every_trained_tensor(
    model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    """A first step of AdamW takes lr · decay of the value that it began with."""
    runs = {}
    for name, lr, decay in (("before", 1e-30, 0.0), ("plain", 0.1, 0.0), ("decayed", 0.1, 0.5)):
        rates = dict.fromkeys(("prompt_lr", "offset_lr", "space_lr", "head_lr"), lr)
        settings = small_run(
            model_folder, data_folder, tmp_path / name,
            max_steps=1, warmup_ratio=0.0, weight_decay=decay, **rates,
        )  # fmt: skip
        train(TrainConfig(**settings), progress=False)
        runs[name] = tensors_of(tmp_path / name)
    moved = {name for name, value in runs["before"].items() if value.abs().max() > 1e-3}
    assert moved == {"short_prompt", "offset_b", "space_down", "gate_weight", "weight"}
    for name, value in runs["before"].items():
        shrunk = runs["plain"][name] - runs["decayed"][name]
        torch.testing.assert_close(shrunk, 0.1 * 0.5 * value, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "rank", "spaces"),
    [
        ({"method": "pt"}, 0, 0),
        ({"method": "dept"}, 13, 0),
        ({"num_spaces": 0}, 13, 0),
        ({"method": "ept", "fusion": False, "gate": "prompt"}, 6, 2),
    ],
)
def test_methods_share_one_budget(
    changes: dict[str, Any],
    rank: int,
    spaces: int,
    model_folder: Path,
    data_folder: Path,
    tmp_path: Path,
) -> None:
    settings = small_run(model_folder, data_folder, tmp_path / "out", max_steps=2, **changes)
    metrics = train(TrainConfig(**settings), progress=False)
    prompt = metrics["prompt"]
    assert (prompt["rank"], prompt["num_spaces"]) == (rank, spaces)
    assert prompt["fusion"] is (changes.get("method") in (None, "pt"))
    assert 24 * 32 - (16 + 32) < metrics["parameters"]["prompt"] <= 24 * 32
    assert (metrics["gate_weights"] is None) == (spaces == 0)
    assert (tmp_path / "out" / "gate_weights.png").exists() == (spaces > 0)


def test_best_keeps_the_best_evaluation(
    model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    settings = small_run(
        model_folder, data_folder, tmp_path / "out",
        keep="best", metric="matthews", max_steps=24, eval_steps=4, head_lr=0.1, prompt_lr=0.1,
        seed=2,
    )  # fmt: skip
    metrics = train(TrainConfig(**settings), progress=False)
    curve = metrics["curves"]["evaluation"]
    best = max(e["matthews"] for e in curve)
    assert metrics["after"] == next(e for e in curve if e["matthews"] == best)
    assert curve[-1]["matthews"] < best, "the case has to tell best from last"
    found = evaluate(tmp_path / "out", data_folder, split="validation")
    assert found["matthews"] == best


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
    keep: str, splits: str, model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", *splits.split()):
        shutil.copy(data_folder / f"{split}.jsonl", data)
    config = TrainConfig(**small_run(model_folder, data, tmp_path / "out", keep=keep))
    task = load_task(config)
    source, *counts = SELECTED_ON[keep, splits]
    assert task.evaluation.source == f"{data}/{source}"
    assert [len(task.train), len(task.evaluation)] == counts
    assert not set(task.evaluation.lines) & set(task.train.lines) or "held out" not in source
    named = dataclasses.replace(config, eval_data=str(data_folder / "test.jsonl"))
    assert load_task(named).evaluation.source == str(data_folder / "test.jsonl")


def test_named_labels_pairs_and_held_out_rows(model_folder: Path, tmp_path: Path) -> None:
    rows = [
        {"text": row["text"], "text_pair": "a song", "label": ("sad", "happy")[row["label"]]}
        for row in task_rows(40, 0)
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    settings = small_run(model_folder, data, tmp_path / "out", max_steps=3, eval_fraction=0.25)
    metrics = train(TrainConfig(**settings), progress=False)
    assert metrics["labels"] == ["happy", "sad"]
    assert metrics["rows"]["evaluation_source"] == f"{data} (held out)"
    assert (metrics["rows"]["train"], metrics["rows"]["evaluation"]) == (30, 10)
    assert metrics["rows"]["train_cut"] > 0
    result = predict(tmp_path / "out", read_rows(data, answer="none"))[0]
    assert result["label"] in ("happy", "sad")
    single = write_rows(tmp_path / "single.jsonl", task_rows(4, 0))
    with pytest.raises(DataError, match="text_pair: expected a second text as in training"):
        predict(tmp_path / "out", read_rows(single, answer="none"))
    with pytest.raises(DataError, match=r"single\.jsonl: text_pair: expected a second text"):
        evaluate(tmp_path / "out", single)


def test_evaluation_rows_of_another_shape_are_an_error(
    model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    rows = [{**row, "text_pair": "a"} for row in task_rows(4, 0)]
    other = write_rows(tmp_path / "e.jsonl", rows)
    settings = small_run(model_folder, data_folder, tmp_path / "out", eval_data=str(other))
    with pytest.raises(DataError, match=r"e\.jsonl: text_pair: expected the same texts"):
        load_task(TrainConfig(**settings))


def test_non_finite_loss_stops_and_keeps_the_checkpoint(
    model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    settings = small_run(model_folder, data_folder, output, max_steps=12, eval_steps=4)
    train(TrainConfig(**settings), progress=False)
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
        train(TrainConfig(**settings), resume=True, progress=False)
    assert caught.value.step == 10
    assert newest_checkpoint(output / "checkpoints", 11) == kept
    assert weights_of(output) == good
    assert not (output / "metrics.json").exists()


def test_non_finite_loss_at_the_first_steps(
    model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    settings = small_run(
        model_folder, data_folder, tmp_path / "out", prompt_lr=2e37, warmup_ratio=0.0
    )
    with pytest.raises(NonFiniteLossError, match="at step 2; training stopped, no checkpoint yet"):
        train(TrainConfig(**settings), progress=False)
    assert newest_checkpoint(tmp_path / "out" / "checkpoints") is None
    assert not (tmp_path / "out" / "adapter").exists()


def test_output_folder_is_never_overwritten_by_accident(
    model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    config = TrainConfig(**small_run(model_folder, data_folder, output, max_steps=2))
    with pytest.raises(FileExistsError, match="output: expected an empty folder"):
        train(config, progress=False)
    with pytest.raises(FileExistsError, match="output: expected a run to resume"):
        train(config, resume=True, progress=False)
    with pytest.raises(ValueError, match="resume, overwrite: expected one of them"):
        train(config, resume=True, overwrite=True, progress=False)
    train(config, overwrite=True, progress=False)
    assert (output / "notes.txt").read_text() == "mine"
    before = weights_of(output)
    broken = TrainConfig(**small_run(model_folder, tmp_path / "gone.jsonl", output, max_steps=2))
    with pytest.raises(DataError, match=r"gone\.jsonl"):
        train(broken, overwrite=True, progress=False)
    assert weights_of(output) == before


def test_prompt_shrinks_to_the_backbones_positions(data_folder: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", max_position_embeddings=14)
    settings = small_run(model, data_folder, tmp_path / "out", max_steps=2)
    metrics = train(TrainConfig(**settings), progress=False)
    assert metrics["prompt"]["max_length"] == 10
    assert metrics["rows"]["train_cut"] > 0


def test_bf16_on_a_cpu_runs_where_asked(
    model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    settings = small_run(model_folder, data_folder, tmp_path / "out", max_steps=3, bf16=True)
    metrics = train(TrainConfig(**settings), progress=False)
    assert metrics["bf16"] is True
    assert {t.dtype for t in tensors_of(tmp_path / "out").values()} == {torch.float32}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # Methods that other tests register may follow.
        ({"method": "lora"}, r"method: expected one of ept, dept, pt(, \w+)*, got 'lora'"),
        ({"pooling": "max"}, "pooling: expected one of mean, first, last, model"),
        ({"keep": "first"}, "keep: expected one of last, best"),
        ({"device": "tpu"}, "device: expected one of auto, cpu"),
        ({"batch_size": 0}, "batch_size: expected an integer >= 1, got 0"),
        ({"max_steps": 0}, "max_steps: expected an integer >= 1, got 0"),
        ({"num_labels": 1}, "num_labels: expected an integer >= 2, got 1"),
        ({"prompt_lr": 0.0}, "prompt_lr: expected a finite number > 0, got 0.0"),
        ({"head_lr": math.nan}, "head_lr: expected a finite number > 0, got nan"),
        ({"epochs": math.inf}, "epochs: expected a finite number > 0, got inf"),
        ({"weight_decay": -0.1}, "weight_decay: expected a number >= 0, got -0.1"),
        ({"max_grad_norm": -1.0}, "max_grad_norm: expected a number >= 0, got -1.0"),
        ({"warmup_ratio": 1.0}, "warmup_ratio: expected 0 <= warmup_ratio < 1, got 1.0"),
        ({"eval_fraction": 0.0}, "eval_fraction: expected a finite number > 0, got 0.0"),
        ({"eval_fraction": 1.0}, "eval_fraction: expected 0 < eval_fraction < 1, got 1.0"),
        ({"model": ""}, "model: expected a non-empty string, got ''"),
        ({"task": "tagging"}, "task: expected one of classification, seq2seq, causal"),
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
        ({"max_target_length": 0}, "max_target_length: expected an integer >= 1, got 0"),
        ({"num_beams": 0}, "num_beams: expected an integer >= 1, got 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: expected an integer"),
        ({"eval_generate": -1}, "eval_generate: expected an integer >= 0, got -1"),
        ({"target_field": ""}, "target_field: expected a non-empty string"),
        ({"num_beams": 1001}, "num_beams: expected an integer <= 1000, got 1001"),
        ({"max_new_tokens": 10**12}, "max_new_tokens: expected an integer <= 100000, got 10000000"),
        ({"max_target_length": 10**9}, "max_target_length: expected an integer <= 100000, got 100"),
        ({"seed": -1}, "seed: expected an integer >= 0, got -1"),
        ({"seed": 2**32}, "seed: expected an integer <= 4294967295, got 4294967296"),
        ({"max_steps": 2**31}, "max_steps: expected an integer <= 2147483647, got 2147483648"),
        ({"num_labels": 10**9}, "num_labels: expected an integer <= 100000, got 1000000000"),
        ({"prompt_length": 10**9}, "prompt_length: expected an integer <= 100000, got 1000000000"),
    ],
)
def test_config_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message):
        TrainConfig(**{"model": "m", "data": "d", "output": "o", **changes})


def test_budget_that_leaves_no_rank_is_an_error() -> None:
    config = TrainConfig(model="m", data="d", output="o", prompt_length=21, num_spaces=0)
    with pytest.raises(ValueError, match="prompt_length: expected a budget that leaves a rank"):
        config.prompt_config(32)


def test_model_that_is_not_there_is_a_clear_error(data_folder: Path, tmp_path: Path) -> None:
    settings = small_run(tmp_path / "nothing", data_folder, tmp_path / "out")
    with pytest.raises(ValueError, match="model: expected a folder or hub id"):
        train(TrainConfig(**settings), progress=False)
    assert not (tmp_path / "out").exists()
