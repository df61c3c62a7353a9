"""The prompts as a method of PEFT: what a user of PEFT does, against EPTModel."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import tests.toy_method  # registers a method  # noqa: F401
from ept_fast import CheckpointError, EPTConfig, EPTModel, get_ept_model
from ept_fast.config import PromptConfig
from ept_fast.peft import EPTPeftConfig
from ept_fast.prompts.base import prompt_methods
from tests.architectures import BY_NAME, build
from tests.tiny import BAD, GOOD, save_llama, save_model, save_t5

# PEFT asks a model of transformers by a name that transformers is about to drop.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

PAIRS = [
    (name, task)
    for name in ("Llama", "GPT-2", "T5", "BERT")
    for task in BY_NAME[name].tasks
    if name != "T5" or task == "SEQ_2_SEQ_LM"  # PEFT wraps whole models, not a half of one
]


def cells_of(*without: str) -> list[Any]:
    """The pairs as parameters, with their cells of the support matrix."""
    return [
        pytest.param(name, task, marks=pytest.mark.support(row="PEFT", column=task))
        for name, task in PAIRS
        if task not in without
    ]


SIZES = {"num_virtual_tokens": 3, "max_length": 20, "rank": 2, "num_spaces": 2, "space_dim": 2}

MASKS = {
    "left": [[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]],
    "right": [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]],
    "both": [[0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]],
}
LEFT = torch.tensor(MASKS["left"])


def config_of(task: str, **choices: Any) -> EPTPeftConfig:
    return EPTPeftConfig(task_type=task, **{**SIZES, **choices})


def stir(parameters: Any, seed: int = 5) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.2 * torch.randn(parameter.shape, generator=draw)


def make(name: str, task: str, **choices: Any) -> Any:
    """A PeftModel whose trained tensors are all filled, the same on every call."""
    torch.manual_seed(3)
    model = get_peft_model(build(name, task), config_of(task, **choices))
    stir(p for p in model.parameters() if p.requires_grad)
    return model


def same(name: str, task: str, model: Any) -> EPTModel:
    """An EPTModel with the values of a PeftModel's active adapter."""
    config = model.active_peft_config.prompt_config(BY_NAME[name].width)
    found = get_ept_model(build(name, task), config, task)
    adapter = model.active_adapter
    layer = model.get_base_model().soft_prompt
    found.prompt.load_state_dict(layer.ept_prompts[adapter].state_dict())
    for part, module in (found.head or torch.nn.ModuleDict()).items():
        wrapper = getattr(model.get_base_model(), part)
        module.load_state_dict(wrapper.modules_to_save[adapter].state_dict())
    return found


def batch_of(task: str, mask: Tensor = LEFT, *, labels: bool = False) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 60, mask.shape, generator=draw)
    batch = {"input_ids": ids, "attention_mask": mask}
    answer = torch.randint(3, 60, (2, 4), generator=draw)
    if task == "SEQ_2_SEQ_LM" and not labels:
        batch["decoder_input_ids"] = answer
    if labels:
        batch["labels"] = {
            "SEQ_CLS": torch.tensor([2, 0]),
            "TOKEN_CLS": ids % 3,
            "CAUSAL_LM": ids,
            "SEQ_2_SEQ_LM": answer,
        }[task]
    return batch


def values(output: Any) -> Tensor:
    found: Tensor = output["logits"] if "logits" in output else output["last_hidden_state"]
    return found


# The same numbers


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize(("name", "task"), cells_of())
def test_logits_are_those_of_an_eptmodel(name: str, task: str, padding: str) -> None:
    model = make(name, task).eval()
    expected = same(name, task, model).eval()
    batch = batch_of(task, torch.tensor(MASKS[padding]))
    assert torch.equal(values(model(**batch)), values(expected(**batch)))
    plain = {n: v for n, v in batch.items() if n != "attention_mask"}
    assert torch.equal(values(model(**plain)), values(expected(**plain)))
    assert values(model(**batch, return_dict=True)).shape[:1] == (2,)


@pytest.mark.parametrize(("name", "task"), cells_of("FEATURE_EXTRACTION"))
def test_loss_and_gradients_are_those_of_an_eptmodel(name: str, task: str) -> None:
    model = make(name, task).train()
    expected = same(name, task, model).train()
    batch = batch_of(task, labels=True)
    for each in (model, expected):
        loss = each(**batch).loss
        loss.backward()
    assert torch.equal(model(**batch).loss, expected(**batch).loss)  # no dropout in the backbone
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    wanted = dict(expected.prompt.named_parameters())
    for part, module in (expected.head or torch.nn.ModuleDict()).items():
        wanted |= {f"{part}.modules_to_save.default.{n}": p for n, p in module.named_parameters()}
    assert len(trained) == len(wanted)
    for key, parameter in wanted.items():
        (found,) = [p for n, p in trained.items() if n.endswith(f".{key}")]
        assert parameter.grad is not None
        assert torch.equal(found.grad, parameter.grad), key
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert all(p.grad is None for p in frozen)


@pytest.mark.parametrize("choices", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize(("name", "task"), cells_of("FEATURE_EXTRACTION", "SEQ_CLS", "TOKEN_CLS"))
def test_generates_the_tokens_of_an_eptmodel(name: str, task: str, choices: dict[str, Any]) -> None:
    model = make(name, task).eval()
    expected = same(name, task, model).eval()
    batch = batch_of(task)
    batch.pop("decoder_input_ids", None)
    options = {**choices, "max_new_tokens": 6, "pad_token_id": 0}
    found = model.generate(**batch, **options)
    assert torch.equal(found, expected.generate(**batch, **options))
    with model.disable_adapter():
        plain = model.generate(**batch, **options)
    backbone = build(name, task).eval()
    assert torch.equal(plain, backbone.generate(**batch, **options))
    if task == "CAUSAL_LM":
        assert not torch.equal(plain, found)  # the prompt shows


def test_offsets_of_given_tokens_only() -> None:
    model = make("Llama", "CAUSAL_LM", offset_tokens="given")
    assert model.active_peft_config.to_dict()["offset_tokens"] == "given"
    expected, every = same("Llama", "CAUSAL_LM", model), make("Llama", "CAUSAL_LM")
    assert expected.prompt.config.offset_tokens == "given"
    batch = batch_of("CAUSAL_LM", labels=True)
    batch["labels"] = batch["labels"].clone()
    batch["labels"][:, :4] = -100
    loss = model(**batch).loss
    assert torch.equal(loss, expected(**batch).loss)
    assert not torch.allclose(loss, every(**batch).loss)
    del batch["labels"]
    options = {"max_new_tokens": 6, "pad_token_id": 0}
    found = model.eval().generate(**batch, **options)
    assert torch.equal(found, expected.eval().generate(**batch, **options))
    assert not torch.equal(found, every.eval().generate(**batch, **options))


@pytest.mark.parametrize("name", ["Llama", "BERT"])
def test_num_items_divides_the_loss_of_a_classifier(name: str) -> None:
    model = make(name, "SEQ_CLS").train()
    batch = batch_of("SEQ_CLS", labels=True)
    whole = model(**batch).loss
    torch.testing.assert_close(model(**batch, num_items_in_batch=8).loss, whole * 2 / 8)


# Files


def load_again(name: str, task: str, folder: Path, **choices: Any) -> Any:
    return PeftModel.from_pretrained(build(name, task), folder, **choices)


@pytest.mark.parametrize(("name", "task"), cells_of())
def test_saves_and_loads(name: str, task: str, tmp_path: Path) -> None:
    model = make(name, task).eval()
    model.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["peft_type"], written["task_type"]) == ("EPT", task)
    assert "library_name: peft" in (tmp_path / "README.md").read_text()
    keys = {key.rpartition(".")[2] for key in load_file(tmp_path / "adapter_model.safetensors")}
    assert {"short_prompt", "offset_a", "gate_bias"} <= keys
    batch = batch_of(task)
    loaded = load_again(name, task, tmp_path)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(values(loaded(**batch)), values(model(**batch)))
    resumed = load_again(name, task, tmp_path, is_trainable=True)
    counts = [m.get_nb_trainable_parameters() for m in (model, resumed)]
    assert counts[0] == counts[1]
    frugal = load_again(name, task, tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(values(frugal(**batch)), values(model(**batch)))


def test_auto_classes_load_model_and_adapter(tmp_path: Path) -> None:
    folders = {
        "CAUSAL_LM": save_llama(tmp_path / "llama", steps=2),
        "SEQ_2_SEQ_LM": save_t5(tmp_path / "t5", steps=2),
        "FEATURE_EXTRACTION": save_model(tmp_path / "bert"),
    }
    for task, folder in folders.items():
        kind = {
            "CAUSAL_LM": (transformers.AutoModelForCausalLM, peft.AutoPeftModelForCausalLM),
            "SEQ_2_SEQ_LM": (transformers.AutoModelForSeq2SeqLM, peft.AutoPeftModelForSeq2SeqLM),
            "FEATURE_EXTRACTION": (
                transformers.AutoModel,
                peft.AutoPeftModelForFeatureExtraction,
            ),
        }[task]
        model = get_peft_model(kind[0].from_pretrained(folder), config_of(task))
        stir(p for p in model.parameters() if p.requires_grad)
        out = tmp_path / f"adapter-{task}"
        model.eval().save_pretrained(out)
        written = json.loads((out / "adapter_config.json").read_text())
        assert written["base_model_name_or_path"] == str(folder)
        loaded = kind[1].from_pretrained(out)
        batch = {n: v % 20 for n, v in batch_of(task).items() if n != "attention_mask"}
        assert torch.equal(values(loaded(**batch)), values(model(**batch)))


def test_a_classifier_comes_back_with_its_labels(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "bert")
    names = ["no", "maybe", "yes"]
    backbone = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    before = dict(backbone.config.id2label)
    model = get_peft_model(backbone, config_of("SEQ_CLS", labels=names))
    assert model.config.id2label == dict(enumerate(names))
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path / "adapter", num_labels=3
    )
    assert loaded.config.id2label == dict(enumerate(names))
    assert loaded.config.label2id == {"no": 0, "maybe": 1, "yes": 2}
    assert model.unload().config.id2label == before


def test_what_the_prompt_started_from_is_not_saved(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "llama", steps=2)
    load = transformers.AutoModelForCausalLM.from_pretrained
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    starts: tuple[dict[str, Any], ...] = (
        {"init": "text", "init_text": "the play was", "tokenizer_name_or_path": str(folder)},
        {"init": "data", "init_text": [*GOOD, *BAD], "tokenizer_name_or_path": tokenizer},
        {"init": torch.ones(5, 32)},
        {
            "init": "data", "init_text": [*GOOD], "tokenizer_name_or_path": tokenizer,
            "prototypes": "random", "prototype_layer": 1,
        },
        {"init": "random"},
    )  # fmt: skip
    for index, start in enumerate(starts):
        model = get_peft_model(load(folder), config_of("CAUSAL_LM", **start))
        prompt = model.get_base_model().soft_prompt.ept_prompts["default"]
        if index == 0:
            ids = torch.tensor(tokenizer("the play was", add_special_tokens=False)["input_ids"])
            assert torch.equal(prompt.reconstruct(), model.get_input_embeddings()(ids))
        if index == 2:
            assert torch.equal(prompt.reconstruct(), torch.ones(3, 32))
        model.save_pretrained(tmp_path / str(index))
        written = json.loads((tmp_path / str(index) / "adapter_config.json").read_text())
        assert (written["init"], written["init_text"]) == ("vocab", None)
        assert written["tokenizer_name_or_path"] is None
        assert (written["prototypes"], written["prototype_layer"]) == ("kmeans", None)
        loaded = PeftModel.from_pretrained(load(folder), tmp_path / str(index))
        ids = torch.tensor([[3, 4, 5]])
        assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


DAMAGE: dict[str, tuple[Any, str]] = {
    "a tensor is missing": (lambda t: t.pop(next(k for k in t if "offset_a" in k)), "offset_a"),
    "another shape": (
        lambda t: t.update({k: v[:1] for k, v in t.items() if "short" in k}),
        "short",
    ),
    "not finite": (
        lambda t: t.update({k: v * float("nan") for k, v in t.items() if "gate_bias" in k}),
        "gate_bias: expected finite values",
    ),
    "another name": (lambda t: t.update(new_prompt(t)), "extra"),
}


def new_prompt(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    key = next(iter(tensors))
    return {key.rpartition(".")[0] + ".extra": torch.ones(1)}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_tensors_are_refused_and_change_nothing(what: str, tmp_path: Path) -> None:
    change, message = DAMAGE[what]
    model = make("Llama", "CAUSAL_LM").eval()
    model.save_pretrained(tmp_path)
    before = values(model(**batch_of("CAUSAL_LM")))
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=message):
        load_again("Llama", "CAUSAL_LM", tmp_path)
    with pytest.raises(CheckpointError, match=message):
        model.load_adapter(tmp_path, "other")
    assert torch.equal(values(model(**batch_of("CAUSAL_LM"))), before)


def test_a_foreign_file_does_not_say_where_to_start(tmp_path: Path) -> None:
    make("Llama", "CAUSAL_LM").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    start = {"init": "text", "init_text": "a", "tokenizer_name_or_path": "some/where"}
    path.write_text(json.dumps(json.loads(path.read_text()) | start))
    loaded = load_again("Llama", "CAUSAL_LM", tmp_path)
    config = loaded.active_peft_config
    assert (config.init, config.init_text, config.tokenizer_name_or_path) == ("vocab", None, None)


# Several adapters


def test_several_adapters(tmp_path: Path) -> None:
    model = make("Llama", "CAUSAL_LM")
    model.add_adapter("other", config_of("CAUSAL_LM", num_virtual_tokens=5, rank=0))
    layer = model.get_base_model().soft_prompt.ept_prompts
    stir(layer["other"].parameters())
    requires = {n: any(p.requires_grad for p in m.parameters()) for n, m in layer.items()}
    assert requires == {"default": True, "other": False}  # it was added, not chosen
    batch = batch_of("CAUSAL_LM")
    model.eval()
    first = values(model(**batch))
    model.set_adapter("other")
    assert model.active_adapter == "other"
    requires = {n: any(p.requires_grad for p in m.parameters()) for n, m in layer.items()}
    assert requires == {"default": False, "other": True}
    second = values(model(**batch))
    assert torch.equal(second, values(same("Llama", "CAUSAL_LM", model).eval()(**batch)))
    assert not torch.equal(first, second)

    model.save_pretrained(tmp_path)
    assert (tmp_path / "other" / "adapter_config.json").is_file()
    loaded = load_again("Llama", "CAUSAL_LM", tmp_path)
    loaded.load_adapter(tmp_path / "other", "second")
    assert torch.equal(values(loaded(**batch)), first)
    loaded.set_adapter("second")
    assert torch.equal(values(loaded(**batch)), second)

    status = model.get_model_status()
    assert status.available_adapters == ["default", "other"]
    assert (status.active_adapters, status.enabled) == (["other"], True)
    assert status.adapter_model_type == "EPTTuner"
    assert status.peft_types == {"default": "EPT", "other": "EPT"}
    with pytest.warns(UserWarning, match="was active which is now deleted"):
        model.delete_adapter("other")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(values(model(**batch)), first)
    with pytest.raises(ValueError, match="other"):
        model.set_adapter("other")


def test_heads_change_with_the_adapter() -> None:
    model = make("BERT", "SEQ_CLS").eval()
    model.add_adapter("other", config_of("SEQ_CLS", labels=["a", "b", "c"]))
    batch = batch_of("SEQ_CLS")
    first = values(model(**batch))
    model.set_adapter("other")
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    stir((p for p in model.parameters() if p.requires_grad), seed=9)
    assert torch.equal(
        values(model(**batch)), values(same("BERT", "SEQ_CLS", model).eval()(**batch))
    )
    model.set_adapter("default")
    assert torch.equal(values(model(**batch)), first)
    assert model.config.id2label[0] == "LABEL_0"


@pytest.mark.parametrize(("name", "task"), PAIRS)
def test_disabled_it_is_the_plain_model(name: str, task: str) -> None:
    model = make(name, task).eval()
    batch = batch_of(task)
    behind = values(model(**batch))
    with model.disable_adapter():
        plain = values(model(**batch))
        assert model.get_model_status().enabled is False
    torch.testing.assert_close(plain, values(build(name, task).eval()(**batch)))
    assert torch.equal(values(model(**batch)), behind)
    assert not torch.equal(plain, behind)


def test_adapters_that_are_all_deleted_leave_the_plain_model() -> None:
    model = make("Llama", "CAUSAL_LM").eval()
    model.base_model.delete_adapter("default")
    batch = batch_of("CAUSAL_LM")
    plain = values(build("Llama", "CAUSAL_LM").eval()(**batch))
    torch.testing.assert_close(values(model.base_model(**batch)), plain)


# What is trained


@pytest.mark.parametrize(("name", "task"), PAIRS)
def test_counts_are_those_of_an_eptmodel(
    name: str, task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make(name, task)
    model.print_trainable_parameters()
    printed = capsys.readouterr().out
    trained = same(name, task, model).get_nb_trainable_parameters()[0]
    assert printed.startswith(f"trainable params: {trained:,} ")


def test_modules_to_save(tmp_path: Path) -> None:
    model = get_peft_model(
        build("GPT-2", "CAUSAL_LM", tie_word_embeddings=False),
        config_of("CAUSAL_LM", modules_to_save=["lm_head"]),
    )
    stir(p for p in model.parameters() if p.requires_grad)
    model.train()(**batch_of("CAUSAL_LM", labels=True)).loss.backward()
    head = model.get_base_model().lm_head
    assert head.modules_to_save["default"].weight.grad.any()
    assert head.original_module.weight.grad is None
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        build("GPT-2", "CAUSAL_LM", tie_word_embeddings=False), tmp_path
    )
    batch = batch_of("CAUSAL_LM")
    assert torch.equal(values(loaded(**batch)), values(model(**batch)))


def test_the_backbone_stays_in_evaluation_mode() -> None:
    model = make("BERT", "SEQ_CLS").train()
    training = {name for name, m in model.get_base_model().named_modules() if m.training}
    assert training
    assert all(name.startswith(("soft_prompt", "classifier")) for name in training)
    model.eval()
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["Llama", "BERT"])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    task = "CAUSAL_LM" if name == "Llama" else "SEQ_CLS"
    batch = batch_of(task, labels=True)
    gradients = []
    for checkpointing in (False, True):
        model = make(name, task).train()
        if checkpointing:
            options = {"use_reentrant": reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            model.enable_input_require_grads()
            assert model.is_gradient_checkpointing
        model(**batch).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, msg=key)


def test_a_model_that_checkpoints_already_goes_on_doing_so() -> None:
    backbone = build("Llama", "CAUSAL_LM")
    newest = getattr(backbone, "activation_checkpointing_enable", None)  # since 5.23
    (newest or backbone.gradient_checkpointing_enable)()
    model = get_peft_model(backbone, config_of("CAUSAL_LM")).train()
    assert model.is_gradient_checkpointing
    model(**batch_of("CAUSAL_LM", labels=True)).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_learning_rates_folding_and_a_deep_copy() -> None:
    model = make("Llama", "CAUSAL_LM")
    groups = model.parameter_groups(1.0, 2.0, 3.0, 4.0)
    assert [group["name"] for group in groups] == ["prompt", "offset", "spaces"]
    batch = batch_of("CAUSAL_LM")
    copied = copy.deepcopy(model).eval()
    logits = values(model.eval()(**batch))
    model.fold()
    assert torch.equal(values(model(**batch)), logits)
    assert values(model(**batch)).grad_fn is None
    model.train()
    assert values(model(**batch)).grad_fn is not None
    stir(p for p in model.parameters() if p.requires_grad)
    assert torch.equal(values(copied(**batch)), logits)  # has its own prompt


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_in_one_graph() -> None:
    model = make("Llama", "CAUSAL_LM").eval()
    batch = batch_of("CAUSAL_LM")
    compiled = torch.compile(model.base_model, fullgraph=True, backend="eager")
    torch.testing.assert_close(values(compiled(**batch)), values(model(**batch)))


# Every prompt method

METHODS = {method.config_class.prompt_type: method for method in prompt_methods().values()}


@pytest.mark.parametrize(
    "kind", sorted({m.config_class.prompt_type for m in prompt_methods().values()})
)
def test_every_registered_method(kind: str, tmp_path: Path) -> None:
    methods = {m.config_class.prompt_type: m for m in prompt_methods().values()}
    width = BY_NAME["Llama"].width
    config: PromptConfig = methods[kind].config_class(width, num_virtual_tokens=4)
    given = EPTPeftConfig.of(config, task_type="CAUSAL_LM")
    assert given.prompt_config(width) == config
    model = get_peft_model(build("Llama", "CAUSAL_LM"), given)
    stir(p for p in model.parameters() if p.requires_grad)
    model.eval().save_pretrained(tmp_path)
    batch = batch_of("CAUSAL_LM")
    assert torch.equal(
        values(model(**batch)), values(same("Llama", "CAUSAL_LM", model).eval()(**batch))
    )
    loaded = load_again("Llama", "CAUSAL_LM", tmp_path)
    assert torch.equal(values(loaded(**batch)), values(model(**batch)))


def test_fields_of_a_method() -> None:
    assert EPTPeftConfig().prompt_config(64) == EPTConfig(64)
    fields = {field.name for field in dataclasses.fields(EPTConfig)} - {"hidden_size"}
    assert fields <= {field.name for field in dataclasses.fields(EPTPeftConfig)}
    given = EPTPeftConfig(
        task_type="CAUSAL_LM", prompt_type="toy", num_virtual_tokens=2, settings={"slope": 2.0}
    )
    assert given.prompt_config(8).to_dict() == {
        "prompt_type": "toy",
        "hidden_size": 8,
        "num_virtual_tokens": 2,
        "slope": 2.0,
    }
    budget = EPTConfig.from_budget(64, 50, num_virtual_tokens=4, max_length=32)
    assert EPTPeftConfig.of(budget).prompt_config(64) == budget


# What is refused


def test_the_end(tmp_path: Path) -> None:
    backbone = build("BERT", "SEQ_CLS")
    flags = [p.requires_grad for p in backbone.parameters()]
    model = get_peft_model(backbone, config_of("SEQ_CLS"))
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="merge: expected a method that changes weights"):
            merge()
    assert not model.supports_lora_conversion()
    plain = model.unload()
    assert plain is backbone
    assert plain.training
    assert [p.requires_grad for p in plain.parameters()] == flags
    assert not hasattr(plain, "peft_config")
    assert [name for name, _ in plain.named_children()] == ["bert", "dropout", "classifier"]
    again = get_peft_model(plain, config_of("SEQ_CLS"))
    assert values(again(**batch_of("SEQ_CLS"))).shape == (2, 3)


LLAMA = ("Llama", "CAUSAL_LM")
REFUSED: dict[str, tuple[tuple[str, str], dict[str, Any], str]] = {
    "no task": (LLAMA, {"task_type": None}, "task_type: expected one of .*got None"),
    "another task": (LLAMA, {"task_type": "QUESTION_ANS"}, "task_type: .*got 'QUESTION_ANS'"),
    "another model": (("BERT", "SEQ_CLS"), {"task_type": "CAUSAL_LM"}, "language-model head"),
    "a whole encoder-decoder": (
        ("T5", "SEQ_2_SEQ_LM"),
        {"task_type": "SEQ_CLS"},
        "decoder_input_ids",
    ),
    "trained embeddings": (
        LLAMA,
        {"modules_to_save": ["embed_tokens"]},
        "modules_to_save: expected no token embeddings",
    ),
    "a rank beyond the width": (LLAMA, {"rank": 33, "max_length": 40}, "rank: expected at"),
    "more tokens than positions": (
        ("GPT-2", "CAUSAL_LM"),
        {"num_virtual_tokens": 64},
        "num_virtual_tokens: expected room",
    ),
    "an unknown method": (LLAMA, {"prompt_type": "none"}, "prompt_type: expected one of"),
    "an unknown setting": (LLAMA, {"settings": {"slope": 1}}, "got also .*slope"),
    "a field of another method": (
        LLAMA,
        {"prompt_type": "toy"},
        "max_length: expected 256, as the method toy has no such field, got 20",
    ),
    "labels for another head": (
        ("BERT", "SEQ_CLS"),
        {"labels": ["a", "b"]},
        "labels: expected 3 names",
    ),
    "labels that are no strings": (
        ("BERT", "SEQ_CLS"),
        {"labels": "abc"},
        "labels: expected strings in a list, got 'abc'",
    ),
    "labels without a head": (LLAMA, {"labels": ["a", "b"]}, "labels: expected None"),
    "an unknown start": (LLAMA, {"init": "zeros"}, "init: expected one of"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_and_the_model_is_as_before(what: str) -> None:
    (name, task), choices, message = REFUSED[what]
    backbone = build(name, task)
    flags = [p.requires_grad for p in backbone.parameters()]
    modes = [m.training for m in backbone.modules()]
    names = [n for n, _ in backbone.named_modules()]
    with pytest.raises((TypeError, ValueError), match=message):
        get_peft_model(
            backbone,
            config_of(**{"task": task, **choices})
            if "task_type" not in choices
            else EPTPeftConfig(**{**SIZES, **choices}),
        )
    assert [p.requires_grad for p in backbone.parameters()] == flags
    assert [m.training for m in backbone.modules()] == modes
    assert [n for n, _ in backbone.named_modules()] == names
    get_peft_model(backbone, config_of(task))


def test_calls_that_are_refused() -> None:
    model = make("Llama", "CAUSAL_LM").eval()
    batch = batch_of("CAUSAL_LM")
    with pytest.raises(ValueError, match="position_ids: expected None"):
        model(**batch, position_ids=torch.arange(6).expand(2, 6))
    with pytest.raises(ValueError, match="input_ids: expected at most max_length 20"):
        model(input_ids=torch.ones(1, 21, dtype=torch.int64))
    with pytest.raises(ValueError, match="adapter_name: expected one adapter"):
        model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="task_type: expected CAUSAL_LM as of the model's first"):
        model.add_adapter("other", config_of("SEQ_CLS"))
    assert list(model.peft_config) == ["default"]
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("weights", peft.LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="is not compatible"):
        get_peft_model(build("Llama", "CAUSAL_LM"), config_of("CAUSAL_LM"), mixed=True)
    with pytest.raises(ValueError, match="shared state"):
        peft.inject_adapter_in_model(config_of("CAUSAL_LM"), build("Llama", "CAUSAL_LM"))


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT:UserWarning")
def test_a_model_with_lora_in_it_is_refused() -> None:
    backbone = build("Llama", "CAUSAL_LM")
    get_peft_model(backbone, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    trained = [p.requires_grad for p in backbone.parameters()]
    with pytest.raises(ValueError, match="model: expected one without layers of PEFT"):
        get_peft_model(backbone, config_of("CAUSAL_LM"))
    assert [p.requires_grad for p in backbone.parameters()] == trained
    assert backbone.peft_config["default"].peft_type == "LORA"
    with pytest.raises(TypeError, match="got EPT, which has a forward of its own"):
        get_ept_model(make("Llama", "CAUSAL_LM"), EPTConfig(32, **SIZES), "CAUSAL_LM")


def test_noise_of_neftune_and_a_resized_vocabulary() -> None:
    model = make("Llama", "CAUSAL_LM")
    layer = model.get_input_embeddings()
    layer.neftune_noise_alpha = 5.0
    noise = torch.ones(32)
    handle = layer.register_forward_hook(lambda m, a, out: out + noise if m.training else out)
    batch = batch_of("CAUSAL_LM")
    plain = values(model.eval()(**batch))
    assert not torch.equal(values(model.train()(**batch)), plain)
    handle.remove()
    del layer.neftune_noise_alpha
    model.resize_token_embeddings(70)
    assert torch.equal(values(model.eval()(**batch))[..., :61], plain)
    assert values(model(input_ids=torch.tensor([[65, 69]]))).shape[-1] == 70
    assert not any(p.requires_grad for n, p in model.named_parameters() if "ept_prompts" not in n)


def test_the_example_of_the_page_runs(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (root / "docs" / "peft.md").read_text(encoding="utf-8")
    code = page.partition("```python\n")[2].partition("```")[0]
    folder = save_llama(tmp_path / "llama", steps=2)
    assert "openai-community/gpt2" in code
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code.replace("openai-community/gpt2", str(folder)), "docs/peft.md", "exec"), names)
    assert isinstance(names["model"], PeftModel)
