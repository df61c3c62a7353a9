"""The wrapped model where a model of transformers is expected: attributes, pipelines, resizing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

from ept_fast import EPTConfig, EPTModel, get_ept_model
from tests.distributed import trainers
from tests.distributed.checks import assert_close, assert_equal, cells
from tests.distributed.tasks import (
    TASKS,
    batch_of,
    gradients,
    loss_of,
    make_backbone,
    make_model,
    trained,
    values_of,
)
from tests.distributed.trainers import make_trainer
from tests.tiny import save_llama, save_model

pytestmark = pytest.mark.usefixtures("one_thread")

GENERATING = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
SIZES = {"num_virtual_tokens": 4, "max_length": 16, "rank": 2, "num_spaces": 2, "space_dim": 2}


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    with trainers.fresh_accelerate():
        yield


def config() -> EPTConfig:
    return EPTConfig(32, **SIZES)  # type: ignore[arg-type]


def labels_in(config: Any) -> tuple[Any, ...]:
    return config.id2label, config.label2id, config.num_labels


def inputs_of(task: str) -> dict[str, Tensor]:
    batch = batch_of(task)
    names = ("input_ids", "attention_mask", *(("labels",) if task == "SEQ_2_SEQ_LM" else ()))
    return {name: batch[name] for name in names}


def first_of(output: Any) -> Tensor:
    found: Tensor = output["logits"] if "logits" in output else output["last_hidden_state"]
    return found


# The config


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_the_config_shows_the_active_adapter_s_labels(task: str) -> None:
    backbone = make_backbone("FEATURE_EXTRACTION")
    before, own = backbone.config.to_dict(), labels_in(backbone.config)
    model = get_ept_model(backbone, config(), task, labels=("bad", "good", "none"))
    expected = {0: "bad", 1: "good", 2: "none"}, {"bad": 0, "good": 1, "none": 2}, 3
    assert labels_in(model.config) == expected
    model.add_adapter("other", config(), labels=("yes", "no"))
    assert labels_in(model.config) == expected
    model.set_adapter("other")
    assert labels_in(model.config) == ({0: "yes", 1: "no"}, {"yes": 0, "no": 1}, 2)
    with model.disable_adapter():
        assert labels_in(model.config) == own
        model.set_adapter("default")
        assert labels_in(model.config) == own
    assert labels_in(model.config) == expected
    assert model.unload().config.to_dict() == before


def test_labels_of_a_model_with_a_head_of_its_own() -> None:
    backbone = make_backbone("SEQ_CLS")
    own = labels_in(backbone.config)
    model = get_ept_model(backbone, config(), "SEQ_CLS", labels=("a", "b", "c"))
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    model.add_adapter("plain", config())  # without names of its own: the model's
    assert model.descriptions["plain"].labels == tuple(own[0].values())
    model.set_adapter("plain")
    assert labels_in(model.config) == own
    model.set_adapter("default")
    model.unload()
    assert labels_in(backbone.config) == own


def test_the_config_is_the_backbone_s() -> None:
    """What is written to it counts."""
    model = make_model("SEQ_CLS").eval()
    assert model.config is model.backbone.config
    batch = inputs_of("SEQ_CLS")
    assert model(**batch).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(**batch).hidden_states) == model.config.num_hidden_layers + 1


def test_labels_that_do_not_fit_leave_the_config_alone() -> None:
    backbone = make_backbone("SEQ_CLS")
    before = backbone.config.to_dict()
    with pytest.raises(ValueError, match="labels: expected 3 names"):
        get_ept_model(backbone, config(), "SEQ_CLS", labels=("a", "b"))
    assert backbone.config.to_dict() == before


# Attributes and methods


@pytest.mark.parametrize("task", TASKS)
def test_what_callers_read(task: str) -> None:
    backbone = make_backbone(task)
    model = make_model(task, backbone)
    assert model.base_model is model.get_base_model() is backbone
    assert model.main_input_name == "input_ids"
    assert model.can_generate() == (task in GENERATING)
    assert model.name_or_path == ""
    assert model.get_output_embeddings() is backbone.get_output_embeddings()
    assert (model.get_output_embeddings() is not None) == (task in GENERATING)
    assert not hasattr(model, "hf_device_map")
    accelerate.dispatch_model(backbone, {"": "cpu"}, force_hooks=True)
    assert model.hf_device_map == backbone.hf_device_map
    assert model.model_tags is None
    model.add_model_tags("one")
    model.add_model_tags(["two", "one"])
    assert model.model_tags == ["one", "two"]


def test_the_name_is_the_one_that_is_saved(tmp_path: Path) -> None:
    save_model(tmp_path)
    backbone = transformers.AutoModel.from_pretrained(tmp_path)
    model = get_ept_model(backbone, config(), "FEATURE_EXTRACTION")
    assert model.name_or_path == str(tmp_path)


@pytest.mark.parametrize("task", TASKS)
def test_num_parameters(task: str) -> None:
    backbone = make_backbone(task)
    frozen, body = (backbone.num_parameters(exclude_embeddings=e) for e in (False, True))
    model = make_model(task, backbone)
    counts = model.parameter_counts()
    added = counts["prompt"] + (0 if task == "SEQ_CLS" else counts["head"])  # a copy counts once
    assert model.num_parameters() == frozen + added
    assert model.num_parameters(exclude_embeddings=True) == body + added
    assert model.num_parameters(only_trainable=True) == sum(
        p.numel() for p in trained(model).values()
    )


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_gradients_with_reentrant_checkpointing(task: str) -> None:
    """transformers has the inputs require gradients first; here they do anyway."""
    plain, model = make_model(task), make_model(task)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    batch = batch_of(task)
    for each in (plain, model):
        loss_of(task, each, batch).backward()
    assert_close(gradients(model), gradients(plain))
    model.disable_input_require_grads()
    model.zero_grad()
    loss_of(task, model, batch).backward()
    assert_close(gradients(model), gradients(plain))


# Forward's arguments


@pytest.mark.parametrize("task", TASKS)
def test_arguments_that_are_none_change_nothing(task: str) -> None:
    model = make_model(task).eval()
    batch = inputs_of(task)
    expected = model(**batch)
    names = (
        "past_key_values",
        "cache_position",
        "position_ids",
        "return_dict",
        "use_cache",
        "output_hidden_states",
        "logits_to_keep",
        "num_items_in_batch",
        "an_argument_of_another_model",
    )
    output = model(**batch, **dict.fromkeys(names))
    assert type(output) is type(expected)
    assert output.keys() == expected.keys()
    assert_equal({"": first_of(output)}, {"": first_of(expected)})


@pytest.mark.parametrize("task", TASKS)
def test_a_tuple_without_return_dict(task: str) -> None:
    model = make_model(task).eval()
    batch = inputs_of(task)
    found, output = model(**batch, return_dict=False), model(**batch, return_dict=True)
    assert isinstance(found, tuple)
    assert len(found) == len(output.to_tuple())
    index = list(output).index("logits" if "logits" in output else "last_hidden_state")
    assert found[index].equal(first_of(output))


def test_position_ids_are_refused() -> None:
    batch = inputs_of("CAUSAL_LM")
    with pytest.raises(ValueError, match=r"position_ids: expected None \(they follow"):
        make_model("CAUSAL_LM")(**batch, position_ids=batch["input_ids"])


@pytest.mark.parametrize("task", GENERATING)
def test_generate_takes_inputs(task: str) -> None:
    model = make_model(task).eval()
    batch = batch_of(task)
    ids, rest = batch["input_ids"], {"attention_mask": batch["attention_mask"], "max_new_tokens": 3}
    assert model.generate(inputs=ids, **rest).equal(model.generate(ids, **rest))
    with model.disable_adapter():
        assert model.generate(inputs=ids, **rest).equal(model.backbone.generate(ids, **rest))
    for given, got in (({"input_ids": ids, "inputs": ids}, "both"), ({}, "neither")):
        message = f"input_ids, inputs: expected exactly one of them, got {got}"
        with pytest.raises(ValueError, match=message):
            model.generate(**given, **rest)


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_loaded_to_be_trained_or_not(task: str, tmp_path: Path) -> None:
    model = make_model(task)
    model.save_pretrained(tmp_path)
    again = EPTModel.from_pretrained(tmp_path, make_backbone(task))
    assert trained(again).keys() == trained(model).keys()
    frozen = EPTModel.from_pretrained(tmp_path, make_backbone(task), is_trainable=False)
    batch = inputs_of(task)
    assert not trained(frozen)
    assert not first_of(frozen.train()(**batch)).requires_grad
    assert first_of(frozen.eval()(**batch)).equal(first_of(again(**batch)))
    frozen.set_adapter("default")
    assert trained(frozen).keys() == trained(model).keys()


# Pipelines


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "bert")
    save_llama(folder / "llama", steps=5)
    return folder


TEXTS = ["the play was very fine", "a song", "it was awful and cold"]
# The pipeline of each task, what wraps the model, and how often transformers says that it does not
# know the class.
PIPELINES: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "CAUSAL_LM": ("text-generation", "llama", {}, 1),
    "SEQ_CLS": ("text-classification", "bert", {"labels": ("bad", "fair", "good")}, 1),
    "TOKEN_CLS": ("token-classification", "bert", {"labels": ("bad", "fair", "good")}, 1),
    "FEATURE_EXTRACTION": ("feature-extraction", "bert", {}, 0),
}


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("task", cells("pipelines", tuple(PIPELINES)))
def test_pipelines(task: str, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They print the adapter's labels and what direct calls give."""
    name, folder, choices, complaints = PIPELINES[task]
    kind = transformers.AutoModelForCausalLM if task == "CAUSAL_LM" else transformers.AutoModel
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved / folder)
    model = get_ept_model(kind.from_pretrained(saved / folder), config(), task, **choices).eval()
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter += 0.2 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(1)
            )
    said: list[str] = []
    monkeypatch.setattr(transformers.pipelines.base.logger, "error", said.append)
    pipe = transformers.pipeline(name, model=model, tokenizer=tokenizer, device="cpu")
    assert [type(model).__name__ in message for message in said] == [True] * complaints
    assert type(model).__name__ in repr(pipe)

    rows = [tokenizer(text, return_tensors="pt") for text in TEXTS]
    if task == "CAUSAL_LM":
        found = pipe(TEXTS, max_new_tokens=4, do_sample=False, return_full_text=False)
        for (answer,), row in zip(found, rows, strict=True):
            ids = model.generate(**row, max_new_tokens=4, do_sample=False)
            new = ids[0, row["input_ids"].shape[1] :]
            assert answer["generated_text"] == tokenizer.decode(new, skip_special_tokens=True)
        assert any(answer["generated_text"] for (answer,) in found)
        return
    with torch.no_grad():
        outputs = [first_of(model(**row))[0] for row in rows]
    found = pipe(TEXTS, **({"top_k": None} if task == "SEQ_CLS" else {}))
    if task == "FEATURE_EXTRACTION":
        for values, output in zip(found, outputs, strict=True):
            torch.testing.assert_close(torch.tensor(values[0]), output)
        return
    for answers, output in zip(found, outputs, strict=True):
        chances = output.softmax(-1)
        if task == "SEQ_CLS":
            assert len(answers) == 3
            got = torch.tensor([{a["label"]: a["score"] for a in answers}[n] for n in model.labels])
            torch.testing.assert_close(got, chances)
            continue
        assert len(answers) == len(output) - 2  # not [CLS] and [SEP]
        for answer in answers:
            best = chances[answer["index"]].max(0)
            assert answer["entity"] == model.labels[int(best.indices)]
            assert abs(float(answer["score"]) - float(best.values)) < 1e-6


# Embeddings


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize(
    ("task", "tied"), [*((task, False) for task in TASKS), *((task, True) for task in GENERATING)]
)
def test_resized_embeddings(task: str, tied: bool, folded: bool) -> None:
    backbone = make_backbone(task, tie_word_embeddings=tied) if tied else make_backbone(task)
    flags = {name: p.requires_grad for name, p in backbone.named_parameters()}
    size = backbone.get_input_embeddings().weight.shape[0]
    model = make_model(task, backbone).eval()
    names = set(trained(model))
    batch = inputs_of(task)
    expected = first_of(model(**batch))
    if folded:
        model.fold()
    layer = model.resize_token_embeddings(size + 5, mean_resizing=False)
    assert layer is model.get_input_embeddings()
    assert layer.weight.shape[0] == model.config.vocab_size == size + 5
    assert set(trained(model)) == names
    assert not any(module.training for module in backbone.modules())
    got = first_of(model(**batch))
    torch.testing.assert_close(got[..., : expected.shape[-1]], expected)
    new = {**batch, "input_ids": torch.full_like(batch["input_ids"], size + 4)}
    before = first_of(model(**new))
    with torch.no_grad():
        layer.weight[size + 4] += 1
    assert not first_of(model(**new)).equal(before)
    if task in GENERATING:
        model.generate(new["input_ids"], max_new_tokens=2)
    model.train()
    assert set(trained(model)) == names
    model.unload()
    assert {name: p.requires_grad for name, p in backbone.named_parameters()} == flags
    assert all(module.training for module in backbone.modules())


def test_unload_gives_resized_tensors_their_flags() -> None:
    backbone = make_backbone("CAUSAL_LM")
    backbone.requires_grad_(False)
    backbone.lm_head.requires_grad_(True)
    model = make_model("CAUSAL_LM", backbone)
    for size in (70, 75):
        model.resize_token_embeddings(size, mean_resizing=False)
        assert not backbone.lm_head.weight.requires_grad
    model.unload()
    assert [n for n, p in backbone.named_parameters() if p.requires_grad] == ["lm_head.weight"]


def test_a_backbone_with_a_method_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """That makes a new layer, to be trained."""
    backbone = make_backbone("FEATURE_EXTRACTION")

    def resize(count: int, *_: object) -> nn.Module:
        backbone.set_input_embeddings(other_layer(num_embeddings=count))
        return backbone.get_input_embeddings()  # type: ignore[no-any-return]

    monkeypatch.setattr(backbone, "resize_token_embeddings", resize)
    model = make_model("FEATURE_EXTRACTION", backbone)
    names = set(trained(model))
    layer = model.resize_token_embeddings(90)
    assert set(trained(model)) == names
    assert not layer.training
    model(torch.tensor([[85, 5]]))
    model.unload()
    assert layer.training
    assert layer.weight.requires_grad


@pytest.mark.parametrize("folded", [False, True])
def test_embeddings_resized_in_the_backbone(folded: bool) -> None:
    """By its own method, past the wrapper: the prompt reads the new table."""
    model = make_model("CAUSAL_LM").eval()
    if folded:
        model.fold()
    size = model.get_input_embeddings().weight.shape[0]
    ids = torch.tensor([[size + 1, 5, 6]])
    with pytest.raises(IndexError):
        model(ids)
    model.backbone.resize_token_embeddings(size + 2, mean_resizing=False)
    embeds = model.get_input_embeddings()(ids).detach()
    assert model(ids).logits.equal(model(inputs_embeds=embeds).logits)


def other_layer(**sizes: int) -> nn.Embedding:
    torch.manual_seed(3)
    return nn.Embedding(**{"num_embeddings": 80, "embedding_dim": 32, **sizes})


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("through", ["model", "backbone"])
def test_another_embedding_layer(through: str, folded: bool) -> None:
    model = make_model("CAUSAL_LM").eval()
    names = set(trained(model))
    if folded:
        model.fold()
    ids = torch.tensor([[70, 5, 6]])
    layer = other_layer()
    (model if through == "model" else model.backbone).set_input_embeddings(layer)
    assert model.get_input_embeddings() is layer
    assert model(ids).logits.equal(model(inputs_embeds=layer(ids).detach()).logits)
    assert model.generate(ids, max_new_tokens=2).shape == (1, 5)
    if through == "model":
        assert set(trained(model)) == names
        assert not layer.training
        model.unload()
        assert layer.training
        assert layer.weight.requires_grad


def test_a_layer_of_another_width_is_refused() -> None:
    model = make_model("CAUSAL_LM").eval()
    layer, wrong = model.get_input_embeddings(), other_layer(embedding_dim=16)
    message = "embedding: expected width hidden_size 32, got 16"
    with pytest.raises(ValueError, match=message):
        model.set_input_embeddings(wrong)
    assert model.get_input_embeddings() is layer
    model.backbone.set_input_embeddings(wrong)
    with pytest.raises(ValueError, match=message):
        model(torch.tensor([[5, 6]]))


# NEFTune


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_noise_on_the_embeddings(task: str) -> None:
    """On the text, in training mode, no larger than NEFTune has it."""
    model = make_model(task)
    batch = batch_of(task)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    layer, alpha = model.get_input_embeddings(), 5.0
    plain, m = model.splice(ids, attention_mask=mask).inputs_embeds, SIZES["num_virtual_tokens"]
    hook = activate_neftune(model, alpha)
    first, second = (model.splice(ids, attention_mask=mask).inputs_embeds for _ in range(2))
    assert first[:, :m].equal(plain[:, :m])
    most = alpha / (ids.shape[1] * 32) ** 0.5
    noise = (first - plain).detach()[:, m:].abs()
    assert 0.9 * most < float(noise.max()) <= most * 1.001
    assert not first.equal(second)
    assert not layer.training
    model.eval()
    torch.testing.assert_close(model.splice(ids, attention_mask=mask).inputs_embeds, plain)
    model.train()
    deactivate_neftune(model, hook)
    assert model.splice(ids, attention_mask=mask).inputs_embeds.equal(plain)


@pytest.mark.usefixtures("fresh_accelerate")
def test_noise_in_the_trainer(tmp_path: Path) -> None:
    ends = []
    for alpha in (None, None, 5.0):
        model = make_model("CAUSAL_LM")
        make_trainer(
            "CAUSAL_LM", model, tmp_path, neftune_noise_alpha=alpha, save_strategy="no"
        ).train()
        assert not model.get_input_embeddings()._forward_hooks
        ends.append(values_of(model))
    assert_equal(ends[0], ends[1])
    assert not any(ends[2][name].equal(value) for name, value in ends[0].items())


# Offloaded values

OFFLOADS: dict[str, Callable[[Any, Path], Any]] = {
    "cpu": lambda backbone, _: accelerate.cpu_offload(backbone, torch.device("cpu")),
    "disk": lambda backbone, folder: accelerate.disk_offload(
        backbone, str(folder), torch.device("cpu")
    ),
}


@pytest.mark.parametrize("place", OFFLOADS)
@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION", "TOKEN_CLS"])
def test_an_offloaded_backbone(task: str, place: str, tmp_path: Path) -> None:
    plain = make_model(task)
    backbone = OFFLOADS[place](make_backbone(task), tmp_path)
    assert backbone.get_input_embeddings().weight.is_meta
    model, batch = make_model(task, backbone), batch_of(task)
    for each in (plain, model):
        loss_of(task, each, batch).backward()
    assert_equal(gradients(model), gradients(plain))
    if task in GENERATING:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        first, second = (m.eval().generate(ids, mask, max_new_tokens=3) for m in (plain, model))
        assert first.equal(second)


def test_an_embedding_layer_that_nothing_fills_is_refused() -> None:
    """As if a module around it brought its values, which the prompt does not call."""
    backbone = make_backbone("CAUSAL_LM")
    body = backbone.model
    hook = accelerate.hooks.AlignDevicesHook(
        torch.device("cpu"), offload=True, weights_map=body.state_dict(), place_submodules=True
    )
    accelerate.hooks.add_hook_to_module(body, hook)
    message = r"embedding\.weight: expected values on a device, got none \(device meta\)"
    with pytest.raises(ValueError, match=message):
        make_model("CAUSAL_LM", backbone)


@pytest.mark.usefixtures("fresh_accelerate")
def test_the_trainer_leaves_a_dispatched_backbone_where_it_is(tmp_path: Path) -> None:
    plain, backbone = make_model("CAUSAL_LM"), make_backbone("CAUSAL_LM")
    accelerate.dispatch_model(backbone, {"": "cpu"}, force_hooks=True)
    ends = []
    for model in (plain, make_model("CAUSAL_LM", backbone)):
        make_trainer("CAUSAL_LM", model, tmp_path, save_strategy="no").train()
        ends.append(values_of(model))
    assert_equal(ends[0], ends[1])
