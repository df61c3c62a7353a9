"""The wrapper of a frozen model: adapters, heads, files, and the model given back as it was."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import ept_fast
from ept_fast import CheckpointError, EPTBank, EPTConfig, FusedEPTPrompt, get_ept_model
from tests.architectures import BY_NAME
from tests.distributed import tasks
from tests.tiny import random_states

pytest.importorskip("transformers")

from ept_fast.transformers.adapter import ADAPTER_FILE, DESCRIPTION, HEAD_FILE, STATE_FILE
from ept_fast.transformers.tasks import (
    EPTModel,
    EPTModelForCausalLM,
    EPTModelForFeatureExtraction,
    EPTModelForSeq2SeqLM,
    EPTModelForSequenceClassification,
    EPTModelForTokenClassification,
)

pytestmark = pytest.mark.usefixtures("one_thread")

LABELS = ("bad", "fair", "good")
CLASSES = {
    "CAUSAL_LM": ("Llama", EPTModelForCausalLM),
    "SEQ_2_SEQ_LM": ("T5", EPTModelForSeq2SeqLM),
    "SEQ_CLS": ("BERT", EPTModelForSequenceClassification),
    "TOKEN_CLS": ("BERT", EPTModelForTokenClassification),
    "FEATURE_EXTRACTION": ("BERT", EPTModelForFeatureExtraction),
}


def config_of(width: int = 32, **changes: Any) -> EPTConfig:
    sizes = {"num_virtual_tokens": 4, "max_length": 16, "rank": 2, "num_spaces": 2, "space_dim": 2}
    return EPTConfig(width, **{**sizes, **changes})


def wrapped(task: str, name: str = "", **choices: Any) -> EPTModel:
    """An adapter with all of its tensors filled, so that each of them shows in the outputs."""
    built = BY_NAME[name or CLASSES[task][0]].build(task, bare=choices.pop("bare", False))
    model = get_ept_model(built, choices.pop("config", config_of()), task, **choices)
    fill(model)
    return model


def fill(model: EPTModel, seed: int = 1) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.prompt.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=draw)


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(5, 60, (2, 6), generator=torch.Generator().manual_seed(3))
    return ids, torch.tensor([[1] * 6, [1] * 4 + [0] * 2])


def values_of(output: Any) -> Tensor:
    found: Tensor = output["logits"] if "logits" in output else output["last_hidden_state"]
    return found


def labels_of(task: str) -> Tensor | None:
    ids, mask = batch()
    if task == "FEATURE_EXTRACTION":
        return None
    return torch.tensor([0, 2]) if task == "SEQ_CLS" else ids.masked_fill(mask == 0, -100) % 3


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return list(first) == list(second) and all(first[n].equal(second[n]) for n in first)


@pytest.mark.parametrize("task", CLASSES)
def test_only_prompt_and_head_are_trained(task: str) -> None:
    model = wrapped(task)
    assert type(model) is CLASSES[task][1]
    ids, mask = batch()
    labels = labels_of(task)
    output = model(ids, mask, labels=labels)
    (values_of(output).square().mean() if labels is None else output.loss).backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
    assert all(name.startswith(("prompts.default.", "heads.default.")) for name in trained)
    assert any(name.startswith("heads.") for name in trained) == (task in ("SEQ_CLS", "TOKEN_CLS"))


@pytest.mark.parametrize("task", CLASSES)
def test_backbone_stays_in_evaluation_mode(task: str) -> None:
    model = wrapped(task)
    assert model.training
    ids, mask = batch()
    first = values_of(model(ids, mask, labels=None if task != "SEQ_2_SEQ_LM" else ids))
    second = values_of(model(ids, mask, labels=None if task != "SEQ_2_SEQ_LM" else ids))
    assert first.equal(second)  # the architectures' dropout is 0.1


@pytest.mark.parametrize("task", CLASSES)
def test_unload_gives_the_model_back_as_it_was(task: str) -> None:
    built = BY_NAME[CLASSES[task][0]].build(task)
    for number, parameter in enumerate(built.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    before = state_of(built)
    flags = [p.requires_grad for p in built.parameters()]
    children = dict(built.named_modules())
    settings = built.config.to_dict()
    model = get_ept_model(built, config_of(), task)
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids, mask = batch()
    output = model(ids, mask, labels=labels_of(task))
    values_of(output).square().mean().backward()
    optimizer.step()
    assert model.unload() is built
    assert same(state_of(built), before)
    assert [p.requires_grad for p in built.parameters()] == flags
    assert dict(built.named_modules()) == children
    assert all(module.training for module in built.modules())
    assert built.config.to_dict() == settings
    assert all(p.grad is None for p in built.parameters())


@pytest.mark.parametrize("task", CLASSES)
def test_saved_and_loaded(task: str, tmp_path: Path) -> None:
    model = wrapped(task).eval()
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter += 0.1
    ids, mask = batch()
    extra = {"labels": ids} if task == "SEQ_2_SEQ_LM" else {}
    expected = values_of(model(ids, mask, **extra))
    model.save_pretrained(tmp_path, extra={"note": 1})
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".safetensors"}
    state = torch.get_rng_state()
    again = EPTModel.from_pretrained(tmp_path, BY_NAME[CLASSES[task][0]].build(task))
    assert torch.get_rng_state().equal(state)
    assert type(again) is type(model)
    assert not again.training
    assert again.adapter_names == ("default",)
    assert values_of(again(ids, mask, **extra)).equal(expected)
    assert json.loads((tmp_path / ADAPTER_FILE).read_text())["extra"] == {"note": 1}


# A head that is a copy of the model's own, a linear one, and none.
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "model": ("SEQ_CLS", {}),
    "linear": ("SEQ_CLS", {"bare": True, "labels": LABELS}),
    "none": ("CAUSAL_LM", {}),
}


@pytest.mark.parametrize("head", HEADS)
def test_loading_draws_no_random_numbers(head: str, tmp_path: Path) -> None:
    task, choices = HEADS[head]
    model = wrapped(task, **choices)
    saved, state = tmp_path / "saved", tmp_path / "state"
    model.save_pretrained(saved)
    save_state(model, state)
    frozen, other = (
        BY_NAME[CLASSES[task][0]].build(task, bare=choices.get("bare", False)) for _ in range(2)
    )
    sizes = {"num_virtual_tokens": 4, "max_length": 16, "rank": 2, "num_labels": 3}
    bank = EPTBank(frozen, task, capacity=1, **sizes)
    states = random_states()
    for folder in (saved, state):
        model.load_pretrained(folder)
        model.load_adapter(folder, f"of-{folder.name}")
        EPTModel.from_pretrained(folder, other).unload()
    FusedEPTPrompt.from_pretrained(saved)
    bank.add("mine", saved)
    bank.replace("mine", saved)
    assert random_states() == states


@pytest.mark.parametrize("task", CLASSES)
def test_state_dict_holds_the_adapters_alone(task: str) -> None:
    model = wrapped(task)
    state = state_of(model)
    assert state
    described = {name for name in state if not name.startswith(("prompts.", "heads."))}
    assert described == {DESCRIPTION}
    other = wrapped(task)
    fill(other, seed=9)
    assert not same(state_of(other), state)
    keys = other.load_state_dict(state)
    assert keys.missing_keys == keys.unexpected_keys == []
    assert same(state_of(other), state)
    # Also under a wrapper, as data-parallel training has it.
    assert list(nn.ModuleDict({"module": model}).state_dict()) == [f"module.{n}" for n in state]
    short = dict(state)
    del short[DESCRIPTION]  # as earlier versions had none
    other.load_state_dict(short)
    name, _ = short.popitem()
    with pytest.raises(RuntimeError, match=name):
        other.load_state_dict(short)


def save_state(model: nn.Module, folder: Path) -> None:
    """As transformers' Trainer and accelerate do."""
    folder.mkdir(exist_ok=True)
    save_file(model.state_dict(), folder / STATE_FILE, {"format": "pt"})


@pytest.mark.parametrize("wrapper", [None, "module", "_orig_mod.module"])
@pytest.mark.parametrize("task", CLASSES)
def test_loaded_from_a_state_dict(task: str, wrapper: str | None, tmp_path: Path) -> None:
    """Each of its adapters, also where the model was wrapped."""
    model = wrapped(task).eval()
    more = {"labels": LABELS} if task == "TOKEN_CLS" else {}
    model.add_adapter("other-2", config_of(num_virtual_tokens=3, rank=0), **more)
    ids, mask = batch()
    extra = {"labels": ids} if task == "SEQ_2_SEQ_LM" else {}
    expected = {}
    for name in model.adapter_names:  # the last one stays active
        model.set_adapter(name)
        fill(model, seed=len(name))
        expected[name] = values_of(model(ids, mask, **extra))
    outer: nn.Module = model
    for name in reversed(wrapper.split(".") if wrapper else ()):
        inner, outer = outer, nn.Module()
        outer.add_module(name, inner)
    save_state(outer, tmp_path)
    generator = torch.get_rng_state()
    for saved_name, name in ((None, "other-2"), ("default", "default"), ("other-2", "other-2")):
        again = EPTModel.from_pretrained(
            tmp_path, BY_NAME[CLASSES[task][0]].build(task), saved_name=saved_name
        )
        assert again.adapter_names == ("default",)
        assert again.description == model.descriptions[name]
        assert values_of(again(ids, mask, **extra)).equal(expected[name])
    assert torch.get_rng_state().equal(generator)
    again.load_adapter(tmp_path, "third", saved_name="default")
    again.set_adapter("third")
    assert values_of(again(ids, mask, **extra)).equal(expected["default"])
    again.set_adapter("default")
    again.load_pretrained(tmp_path)
    assert values_of(again(ids, mask, **extra)).equal(expected["other-2"])
    with pytest.raises(CheckpointError, match=r"saved_name: expected one of .*, got 'mine'"):
        again.load_pretrained(tmp_path, saved_name="mine")


def test_a_folder_of_both_is_read_as_it_was_saved_by_save_pretrained(tmp_path: Path) -> None:
    model = wrapped("SEQ_CLS").eval()
    save_state(model, tmp_path)
    fill(model, seed=4)
    model.save_pretrained(tmp_path)
    again = EPTModel.from_pretrained(tmp_path, BY_NAME["BERT"].build("SEQ_CLS"))
    assert values_of(again(*batch())).equal(values_of(model(*batch())))
    with pytest.raises(CheckpointError, match="saved_name: expected None, as this folder is of"):
        again.load_adapter(tmp_path, "second", saved_name="default")
    (tmp_path / ADAPTER_FILE).write_text("{")
    with pytest.raises(CheckpointError, match=ADAPTER_FILE):
        again.load_pretrained(tmp_path)


def test_a_model_without_values_has_a_state_dict() -> None:
    model = wrapped("CAUSAL_LM").to("meta")
    assert list(model.state_dict()) == [n for n, p in model.named_parameters() if p.requires_grad]


def test_model_is_loaded_by_the_saved_name(tmp_path: Path) -> None:
    built = BY_NAME["Llama"].build("CAUSAL_LM")
    built.save_pretrained(tmp_path / "model")
    model = get_ept_model(built, config_of(), "CAUSAL_LM", base_model=str(tmp_path / "model"))
    model.save_pretrained(tmp_path / "adapter")
    again = EPTModelForCausalLM.from_pretrained(tmp_path / "adapter")
    ids, mask = batch()
    assert again(ids, mask).logits.equal(model.eval()(ids, mask).logits)
    with pytest.raises(CheckpointError, match="task: expected 'SEQ_2_SEQ_LM', got 'CAUSAL_LM'"):
        EPTModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter")


def test_classifier_is_loaded_by_the_saved_name(tmp_path: Path) -> None:
    built = BY_NAME["BERT"].build("SEQ_CLS")
    built.save_pretrained(tmp_path / "model")
    model = get_ept_model(built, config_of(), "SEQ_CLS", labels=LABELS)
    model.base_model_name = str(tmp_path / "model")
    model.save_pretrained(tmp_path / "adapter")
    again = EPTModel.from_pretrained(tmp_path / "adapter")
    assert again.labels == LABELS
    ids, mask = batch()
    assert again(ids, mask).logits.equal(model.eval()(ids, mask).logits)


def test_name_of_a_local_model_is_kept_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    BY_NAME["Llama"].build("CAUSAL_LM").save_pretrained(tmp_path / "here")
    monkeypatch.chdir(tmp_path)
    built = transformers.AutoModelForCausalLM.from_pretrained("here")
    assert get_ept_model(built, config_of(), "CAUSAL_LM").base_model_name == str(tmp_path / "here")


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_adapters_by_name(task: str, tmp_path: Path) -> None:
    model = wrapped(task).eval()
    ids, mask = batch()
    first = values_of(model(ids, mask))
    model.add_adapter("other-2", config_of(num_virtual_tokens=3, rank=0))
    assert model.adapter_names == ("default", "other-2")
    assert model.active_adapter == "default"
    assert values_of(model(ids, mask)).equal(first)
    model.set_adapter("other-2")
    fill(model, seed=2)
    if model.head is not None:
        nn.init.normal_(next(iter(model.head.parameters())))
    second = values_of(model(ids, mask))
    assert not second.equal(first)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".other-2." in name for name in trained)
    model.save_pretrained(tmp_path, adapter_name="other-2")
    model.set_adapter("default")
    assert values_of(model(ids, mask)).equal(first)
    model.delete_adapter("other-2")
    assert model.adapter_names == ("default",)
    assert not any("other" in name for name in model.state_dict())
    model.load_adapter(tmp_path, "again")
    assert values_of(model(ids, mask)).equal(first)
    model.set_adapter("again")
    assert values_of(model(ids, mask)).equal(second)


def test_adapters_with_heads_of_both_kinds() -> None:
    model = wrapped("SEQ_CLS").eval()
    ids, mask = batch()
    first = model(ids, mask).logits
    model.add_adapter("pooled", config_of(), labels=("a", "b"), pooling="mean")
    model.set_adapter("pooled")
    assert model.labels == ("a", "b")
    assert isinstance(model.head, nn.Linear)
    assert model(ids, mask).logits.shape == (2, 2)
    model.set_adapter("default")
    assert model(ids, mask).logits.equal(first)


@pytest.mark.parametrize("task", CLASSES)
def test_disabled_adapter_is_the_plain_model(task: str) -> None:
    built = BY_NAME[CLASSES[task][0]].build(task).eval()
    ids, mask = batch()
    extra = {"labels": ids} if task == "SEQ_2_SEQ_LM" else {}
    plain = values_of(built(input_ids=ids, attention_mask=mask, **extra))
    model = get_ept_model(built, config_of(), task)
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter += 1
    ours = values_of(model(ids, mask, **extra))
    with model.disable_adapter():
        torch.testing.assert_close(values_of(model(ids, mask, **extra)), plain)
    assert values_of(model(ids, mask, **extra)).equal(ours)


@pytest.mark.parametrize("task", CLASSES)
def test_fold(task: str) -> None:
    model = wrapped(task)
    ids, mask = batch()
    extra = {"labels": ids} if task == "SEQ_2_SEQ_LM" else {}
    expected = values_of(model.eval()(ids, mask, **extra))
    state = list(model.state_dict())
    model.fold()
    assert values_of(model(ids, mask, **extra)).equal(expected)
    assert list(model.state_dict()) == state
    with torch.no_grad():
        model.prompt.short_prompt += 1
    assert values_of(model(ids, mask, **extra)).equal(expected)
    model.train()
    assert not values_of(model(ids, mask, **extra)).equal(expected)


def test_counts(capsys: pytest.CaptureFixture[str]) -> None:
    model = wrapped("SEQ_CLS", bare=True, labels=LABELS)
    head = 32 * 3 + 3
    frozen = sum(p.numel() for p in model.backbone.parameters())
    prompt = config_of().num_parameters
    assert model.parameter_counts() == {"prompt": prompt, "head": head, "frozen": frozen}
    assert model.get_nb_trainable_parameters() == (prompt + head, prompt + head + frozen)
    model.print_trainable_parameters()
    trained, every = prompt + head, prompt + head + frozen
    assert capsys.readouterr().out == (
        f"trainable params: {trained:,} || all params: {every:,} || "
        f"trainable%: {100 * trained / every:.4f}\n"
    )


def test_own_head_counts_once() -> None:
    built = BY_NAME["BERT"].build("SEQ_CLS")
    every = sum(p.numel() for p in built.parameters())
    model = get_ept_model(built, config_of(), "SEQ_CLS")
    assert model.get_nb_trainable_parameters()[1] == every + config_of().num_parameters


def test_parameter_groups() -> None:
    model = wrapped("SEQ_CLS")
    groups = model.parameter_groups(0.1, 0.2, 0.3, 0.4)
    assert [(g["name"], g["lr"]) for g in groups] == [
        ("prompt", 0.1),
        ("offset", 0.2),
        ("spaces", 0.3),
        ("head", 0.4),
    ]
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for g in groups for p in g["params"]} == trained


@pytest.mark.parametrize("pooling", ["mean", "first", "last", "model"])
def test_pooling_of_a_bare_model(pooling: str) -> None:
    model = wrapped("SEQ_CLS", bare=True, labels=LABELS, pooling=pooling).eval()
    ids, mask = batch()
    spliced = model.prompt(ids, attention_mask=mask)
    output = model.backbone(**spliced._asdict())
    hidden = output.last_hidden_state[:, 4:]
    pooled = {
        "mean": torch.stack([hidden[0].mean(0), hidden[1, :4].mean(0)]),
        "first": hidden[:, 0],
        "last": torch.stack([hidden[0, 5], hidden[1, 3]]),
        "model": output.pooler_output,
    }
    head: Any = model.head
    torch.testing.assert_close(model(ids, mask).logits, head(pooled[pooling]))


@pytest.mark.parametrize("kind", ["classes", "regression", "several"])
def test_losses_of_a_classifier_are_the_library_s(kind: str) -> None:
    changes: dict[str, Any] = {
        "classes": {},
        "regression": {"num_labels": 1},
        "several": {"problem_type": "multi_label_classification"},
    }[kind]
    labels = {
        "classes": torch.tensor([0, 2]),
        "regression": torch.tensor([0.3, -1.0]),
        "several": torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]),
    }[kind]
    built = BY_NAME["BERT"].build("SEQ_CLS", **changes)
    model = get_ept_model(built, config_of(), "SEQ_CLS").eval()
    ids, mask = batch()
    output = model(ids, mask, labels=labels)
    spliced = model.prompt(ids, attention_mask=mask)
    torch.testing.assert_close(output.loss, built(**spliced._asdict(), labels=labels).loss)


def test_causal_loss_counts_every_label() -> None:
    model = wrapped("CAUSAL_LM").eval()
    ids, mask = batch()
    labels = ids.masked_fill(mask == 0, -100)
    output = model(ids, mask, labels=labels)
    logits = model.backbone(**model.prompt(ids, attention_mask=mask)._asdict()).logits.double()
    terms = [
        -logits[row, 4 + column - 1].log_softmax(-1)[ids[row, column]]
        for row, length in ((0, 6), (1, 4))
        for column in range(length)
    ]
    expected = torch.stack(terms).mean()
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.logits, logits[:, 4:].float())
    part = model(ids, mask, labels=labels, num_items_in_batch=torch.tensor(40))
    torch.testing.assert_close(part.loss, output.loss * 10 / 40)


def test_logits_to_keep() -> None:
    model = wrapped("CAUSAL_LM").eval()
    ids, _ = batch()
    kept = model(ids, logits_to_keep=2).logits
    assert kept.equal(model.backbone(**model.prompt(ids)._asdict(), logits_to_keep=2).logits)
    # Not to the bit: of fewer rows a product may add up in another order.
    torch.testing.assert_close(kept, model(ids).logits[:, -2:])


def test_embeddings_in_place_of_ids() -> None:
    model = wrapped("CAUSAL_LM").eval()
    ids, mask = batch()
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    output = model(inputs_embeds=embeds, attention_mask=mask)
    assert output.logits.equal(model(ids, mask).logits)
    output.logits.sum().backward()
    assert embeds.grad is not None


def test_token_types_reach_the_model() -> None:
    model = wrapped("SEQ_CLS").eval()
    ids, mask = batch()
    types = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0]])
    assert not model(ids, mask, token_type_ids=types).logits.equal(model(ids, mask).logits)
    turned = [torch.stack([v[0], v[1].roll(2)]) for v in (ids, mask, types)]
    left = model(turned[0], turned[1], token_type_ids=turned[2])
    torch.testing.assert_close(left.logits, model(ids, mask, token_type_ids=types).logits)


class Unwilling(nn.Module):
    """A model that takes ids alone."""

    config = None

    def get_input_embeddings(self) -> nn.Embedding:
        return nn.Embedding(9, 32)

    def forward(self, input_ids: Tensor) -> Tensor:
        return input_ids


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("T5", "CAUSAL_LM", "model: expected a model without a decoder_input_ids"),
        ("Llama", "SEQ_2_SEQ_LM", "model: expected an encoder-decoder for task SEQ_2_SEQ_LM"),
        ("Llama", "FEATURE_EXTRACTION", "model: expected a model without a head"),
        ("BERT", "CAUSAL_LM", "model: expected a model with a language-model head"),
    ],
)
def test_models_of_another_kind(name: str, task: str, message: str) -> None:
    kinds = {"T5": "SEQ_2_SEQ_LM", "Llama": "CAUSAL_LM", "BERT": "FEATURE_EXTRACTION"}
    built = BY_NAME[name].build(kinds[name])
    with pytest.raises(TypeError, match=message):
        get_ept_model(built, config_of(), task)
    assert all(p.requires_grad for p in built.parameters())


def test_model_without_inputs_embeds() -> None:
    with pytest.raises(TypeError, match=r"takes inputs_embeds and attention_mask, got Unwilling"):
        get_ept_model(Unwilling(), config_of(), "CAUSAL_LM")


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"task": "LM"}, "task: expected one of SEQ_CLS, TOKEN_CLS"),
        ({"labels": None}, "labels: expected different names, at least 1"),
        ({"labels": ("a", "a")}, "labels: expected different names, at least 1"),
        ({"pooling": "max"}, "pooling: expected one of mean, first, last, model"),
        ({"head_dropout": 1.0}, "head_dropout: expected 0 <= head_dropout < 1"),
        ({"adapter_name": "a.b"}, "adapter_name: expected letters, digits"),
        ({"adapter_name": "keys"}, "no name of a method"),
        ({"adapter_name": ""}, "adapter_name: expected letters, digits"),
        ({"config": config_of(16)}, "embedding: expected width hidden_size 16, got 32"),
        ({"config": config_of(num_virtual_tokens=64)}, "num_virtual_tokens: expected room"),
    ],
)
def test_bad_arguments_leave_the_model_alone(choices: dict[str, Any], message: str) -> None:
    built = BY_NAME["BERT"].build("SEQ_CLS", bare=True)
    given = {"config": config_of(), "task": "SEQ_CLS", "labels": LABELS, **choices}
    with pytest.raises(ValueError, match=message):
        get_ept_model(built, **given)
    assert all(p.requires_grad for p in built.parameters())
    assert all(m.training for m in built.modules())


@pytest.mark.parametrize("choice", [{"labels": LABELS}, {"pooling": "mean"}, {"head_dropout": 0.1}])
def test_tasks_without_a_head_refuse_its_choices(choice: dict[str, Any]) -> None:
    built = BY_NAME["Llama"].build("CAUSAL_LM")
    with pytest.raises(ValueError, match=f"{next(iter(choice))}: expected"):
        get_ept_model(built, config_of(), "CAUSAL_LM", **choice)


def test_bad_calls() -> None:
    model = wrapped("SEQ_CLS", bare=True, labels=LABELS)
    ids, mask = batch()
    with pytest.raises(ValueError, match="input_ids, inputs_embeds: expected one of them"):
        model()
    with pytest.raises(ValueError, match=r"position_ids: expected None \(they follow"):
        model(ids, mask, position_ids=ids)
    for name in ("cache", "past_key_values"):
        with pytest.raises(ValueError, match=rf"{name}: expected None \(see generate"):
            model(ids, mask, **{name: object()})
    with pytest.raises(ValueError, match="input_ids: expected at most 60 positions"):
        model(torch.ones(1, 61, dtype=torch.int64))
    for call in (model.set_adapter, model.delete_adapter):
        with pytest.raises(ValueError, match="adapter_name: expected one of default, got 'nope'"):
            call("nope")
    with pytest.raises(ValueError, match="expected one that is not active, got 'default'"):
        model.delete_adapter("default")
    with pytest.raises(ValueError, match="expected a new name, got 'default'"):
        model.add_adapter("default", config_of(), labels=LABELS)


def test_a_long_text_fits_where_positions_have_no_table() -> None:
    model = wrapped("CAUSAL_LM", config=config_of(max_length=80)).eval()
    assert model(torch.full((1, 70), 7)).logits.shape == (1, 70, 61)


def test_adapters_of_other_models_are_refused(tmp_path: Path) -> None:
    wrapped("SEQ_CLS").save_pretrained(tmp_path)
    built = BY_NAME["RoBERTa"].build("SEQ_CLS")
    with pytest.raises(CheckpointError, match=r"base_model_type: expected 'roberta'.*got 'bert'"):
        EPTModel.from_pretrained(tmp_path, built)
    other = wrapped("TOKEN_CLS")
    with pytest.raises(CheckpointError, match=r"task: expected 'TOKEN_CLS'.*got 'SEQ_CLS'"):
        other.load_adapter(tmp_path, "new")
    other = wrapped("SEQ_CLS", labels=LABELS)
    with pytest.raises(CheckpointError, match=r"labels: expected \('bad', 'fair', 'good'\)"):
        other.load_pretrained(tmp_path)


def test_saving_refuses_nan_and_writes_nothing(tmp_path: Path) -> None:
    model = wrapped("SEQ_CLS")
    with torch.no_grad():
        next(model.heads.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="expected finite values to save"):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def offload(backbone: Any, folder: Path, *, whole: bool) -> Any:
    """Move the values of all layers, or of all but the first and the last, to a disk."""
    places = {}
    for name, module in backbone.named_modules():
        if list(module.parameters(recurse=False)):
            outside = not whole and not re.search(r"\.\d+\.", name)
            places[name] = "cpu" if outside else "disk"
    accelerate.dispatch_model(backbone, places, "cpu", offload_dir=folder, force_hooks=True)
    assert backbone.get_input_embeddings().weight.is_meta == whole
    assert any(parameter.is_meta for parameter in backbone.parameters())
    return backbone


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("task", tasks.TASKS)
def test_offloaded_values_change_nothing(task: str, whole: bool, tmp_path: Path) -> None:
    backbone = tasks.make_backbone(task)
    if whole and task == "SEQ_CLS":  # with a head of its own, of which an adapter has a copy
        offload(backbone, tmp_path, whole=True)
        with pytest.raises(ValueError, match="model: expected a head on a device, got classifier"):
            tasks.make_model(task, backbone)
        return
    batch, results = tasks.batch_of(task), []
    for built in (tasks.make_backbone(task), offload(backbone, tmp_path / "disk", whole=whole)):
        model = tasks.make_model(task, built)
        assert model.device == torch.device("cpu")
        loss = tasks.loss_of(task, model, batch)
        loss.backward()
        results.append({"loss": loss.detach(), **tasks.gradients(model)})
        model.save_pretrained(tmp_path / "adapter")
        model.load_pretrained(tmp_path / "adapter")
    assert results[0].keys() == results[1].keys()
    for name, expected in results[0].items():
        assert torch.equal(results[1][name], expected), name
    model.fold()
    with torch.no_grad():
        torch.testing.assert_close(tasks.loss_of(task, model, batch), results[0]["loss"])


def test_an_empty_table_is_refused() -> None:
    with torch.device("meta"):
        built = BY_NAME["Llama"].build("CAUSAL_LM")
    with pytest.raises(
        ValueError, match=r"embedding\.weight: expected values on a device, got none"
    ):
        get_ept_model(built, config_of(), "CAUSAL_LM")


FILES = ("README.md", "ept_model.safetensors", "ept_config.json", HEAD_FILE, ADAPTER_FILE)


@pytest.mark.parametrize("file", FILES)
def test_a_full_disk_leaves_the_old_adapter(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wrapped("SEQ_CLS")
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == set(FILES)
    fill(model, seed=5)
    make = tempfile.mkstemp

    def full(*, prefix: str, **where: Any) -> Any:
        if prefix == f".{file}.":
            raise OSError(28, "No space left on device")
        return make(prefix=prefix, **where)

    monkeypatch.setattr(tempfile, "mkstemp", full)
    message = f"{tmp_path / file}: expected a writable file, got No space left on device"
    with pytest.raises(OSError, match=re.escape(message)) as caught:
        model.save_pretrained(tmp_path, extra={"new": True})
    assert caught.value.errno == 28
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_old_head_does_not_stay_behind(tmp_path: Path) -> None:
    wrapped("SEQ_CLS").save_pretrained(tmp_path)
    wrapped("CAUSAL_LM").save_pretrained(tmp_path)
    assert not (tmp_path / HEAD_FILE).exists()
    EPTModel.from_pretrained(tmp_path, BY_NAME["Llama"].build("CAUSAL_LM"))


def test_loading_undoes_folding() -> None:
    model, other = wrapped("CAUSAL_LM"), wrapped("CAUSAL_LM")
    fill(other, seed=2)
    model.eval().fold()
    model.load_state_dict(other.state_dict())
    assert values_of(model(*batch())).equal(values_of(other.eval()(*batch())))


def test_inside_of_a_disabled_adapter() -> None:
    """Nested blocks and other adapters leave the plain model plain until the outer block ends."""
    model = wrapped("SEQ_CLS").eval()
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter += 1
    expected = values_of(model(*batch()))
    with model.disable_adapter():
        plain = values_of(model(*batch()))
        with model.disable_adapter():
            pass
        assert values_of(model(*batch())).equal(plain)
        model.add_adapter("other", config_of())
        model.set_adapter("other")
        assert values_of(model(*batch())).equal(plain)
        model.set_adapter("default")
    assert not plain.equal(expected)
    assert values_of(model(*batch())).equal(expected)


def test_a_description_that_cannot_be_written(tmp_path: Path) -> None:
    """The adapter that was there stays whole."""
    model = wrapped("SEQ_CLS").eval()
    model.save_pretrained(tmp_path)
    expected = values_of(model(*batch()))
    fill(model, seed=5)
    with pytest.raises(ValueError, match="JSON"):
        model.save_pretrained(tmp_path, extra={"score": float("nan")})
    again = EPTModel.from_pretrained(tmp_path, model.unload())
    assert values_of(again(*batch())).equal(expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["Llama", "OPT"])
def test_checkpointing_that_was_on_before(name: str, reentrant: bool) -> None:
    """It is taken over, without the layers' dropout, and given back with the model."""
    width = BY_NAME[name].width
    built = BY_NAME[name].build("CAUSAL_LM")
    options = {"use_reentrant": reentrant}
    built.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    model = get_ept_model(built, config_of(width), "CAUSAL_LM")
    plain = get_ept_model(BY_NAME[name].build("CAUSAL_LM"), config_of(width), "CAUSAL_LM")
    plain.prompt.load_state_dict(model.prompt.state_dict())
    assert model.is_gradient_checkpointing
    ids, mask = batch()
    losses = [m(ids, mask, labels=ids).loss for m in (model, model, plain)]
    assert losses[0].equal(losses[1])
    torch.testing.assert_close(losses[0], losses[2])
    losses[0].backward()
    losses[2].backward()
    for mine, theirs in zip(model.prompt.parameters(), plain.prompt.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    with pytest.raises(ValueError, match="model: expected evaluation mode"):
        model.generate(ids, mask)
    assert model.unload() is built
    assert built.is_activation_checkpointing
    built(ids, labels=ids).loss.backward()


def test_exported_lazily() -> None:
    assert ept_fast.EPTModel is EPTModel
    assert {"EPTModel", "get_ept_model"} <= set(ept_fast.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ept_fast.nothing  # noqa: B018
