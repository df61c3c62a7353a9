"""LoRA and other layers of PEFT under a prompt: trained, generated with, saved and refused."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from ept_fast import CheckpointError, EPTBank, EPTConfig, EPTModel, get_ept_model
from ept_fast.storage.files import json_bytes
from ept_fast.transformers.adapter import (
    DESCRIPTION,
    PEFT_CONFIG_FILE,
    PEFT_TENSOR_FILE,
    STATE_FILE,
    state_checksum,
)
from tests.architectures import BY_NAME, in_float64
from tests.decoding import EXACT, LOGITS, NEW, assert_greedy, defined, make_trial, pad

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # PEFT asks models of transformers by a name that these are to lose.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]

M = 4
FORMS = ("PeftModel", "add_adapter")
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("CAUSAL_LM", {"target_modules": ["q_proj", "v_proj"]}),
    "GPT-2": ("CAUSAL_LM", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "T5": ("SEQ_2_SEQ_LM", {"target_modules": ["q", "v"]}),
    "BERT": ("SEQ_CLS", {"target_modules": ["query", "value"]}),
}
NAMES = [
    pytest.param(name, marks=pytest.mark.support(row="LoRA", column=task))
    for name, (task, _) in MODELS.items()
]
# Other methods than LoRA, and choices of it.
METHODS: dict[str, Callable[[], Any]] = {
    "DoRA": lambda: peft.LoraConfig(target_modules=["q_proj"], use_dora=True),
    "rank pattern": lambda: peft.LoraConfig(
        target_modules=["q_proj"], rank_pattern={"layers.0.self_attn.q_proj": 3}
    ),
    "trained lm_head": lambda: peft.LoraConfig(
        target_modules=["q_proj"], modules_to_save=["lm_head"]
    ),
    "IA3": lambda: peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[]),
    "LoKr": lambda: peft.LoKrConfig(target_modules=["q_proj"]),
    "OFT": lambda: peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8),
    "LN tuning": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
}


def build(name: str = "Llama", dtype: torch.dtype = torch.float64, **choices: Any) -> Any:
    return BY_NAME[name].build(MODELS[name][0], dtype=dtype, bare=name == "BERT", **choices)


def with_adapter(model: Any, config: Any, form: str = "PeftModel") -> Any:
    """The model with an adapter that is not zero."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(11)
        if form == "PeftModel":
            model = peft.get_peft_model(model, config)
        else:
            model.add_adapter(config)
    draw = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
                parameter += 0.2 * noise
    return model


def lora(name: str = "Llama", form: str = "PeftModel", **choices: Any) -> Any:
    dtype = choices.pop("dtype", torch.float64)
    return with_adapter(
        build(name, dtype), peft.LoraConfig(**MODELS[name][1], **{"r": 2, **choices}), form
    )


def wrap(model: Any, name: str = "Llama", **choices: Any) -> EPTModel:
    """Behind a prompt whose tensors are all filled."""
    config = EPTConfig(32, num_virtual_tokens=M, max_length=16, rank=2, num_spaces=2, space_dim=2)
    if name == "BERT":
        choices = {"labels": ["a", "b", "c"], **choices}
    seed = torch.Generator().manual_seed(1)
    choices = {"dtype": torch.float64, "generator": seed, **choices}
    wrapped = get_ept_model(model, config, MODELS[name][0], **choices)
    with torch.no_grad():
        for parameter in wrapped.prompt.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=seed, dtype=torch.float64)
    if wrapped.head is not None:
        wrapped.head.to(next(wrapped.backbone.parameters()).dtype)
    return wrapped


def batch(place: str = "left") -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    return pad([torch.randint(5, 60, (n,), generator=draw) for n in (6, 4)], place)


def labelled(name: str) -> dict[str, Tensor]:
    given = batch()
    ids = given["input_ids"]
    labels = torch.tensor([0, 2]) if name == "BERT" else ids.masked_fill(ids % 7 == 0, -100)
    return {**given, "labels": labels}


def logits_of(model: EPTModel, name: str = "Llama") -> Tensor:
    given = labelled(name)
    with torch.no_grad(), in_float64():
        found: Tensor = model(**given).logits
    return found


def backbone_state(model: EPTModel) -> dict[str, Tensor]:
    own = set(model.peft.names.values()) if model.peft else set()
    return {k: v.clone() for k, v in model.backbone.state_dict().items() if k not in own}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return list(first) == list(second) and all(first[n].equal(second[n]) for n in first)


# What is computed


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_the_prompt_before_the_model_of_peft(name: str, form: str) -> None:
    given = lora(name, form)
    theirs = copy.deepcopy(given).eval()
    model = wrap(given, name).eval()
    inputs = batch("left")
    for row, (ids, mask) in enumerate(zip(*inputs.values(), strict=True)):
        text = ids[mask == 1].unsqueeze(0)
        more = {"decoder_input_ids": torch.tensor([[0, 7, 9]])} if name == "T5" else {}
        with torch.no_grad(), in_float64():
            spliced = model.prompt(text).inputs_embeds
            ones = torch.ones(spliced.shape[:2], dtype=torch.int64)
            expected = theirs(inputs_embeds=spliced, attention_mask=ones, **more)
            batched = {k: v.expand(2, -1) for k, v in more.items()}
            got = model(**inputs, **batched).logits[row]
        if name == "BERT":
            head: Any = model.head
            expected = head(expected.last_hidden_state[0, M:].mean(0))
        elif name == "T5":
            expected = expected.logits[0]
        else:
            expected, got = expected.logits[0, M:], got[mask == 1]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
@pytest.mark.parametrize("place", ["left", "both"])
def test_generation_is_that_without_a_cache(name: str, place: str) -> None:
    made = make_trial(name, model=lora(name))
    inputs = pad(made.rows, place)
    with in_float64():
        expected = [defined(made, row) for row in made.rows]
        output = made.model.generate(**inputs, **LOGITS)  # type: ignore[operator]
    tokens, logits = zip(*expected, strict=True)
    assert_greedy(output, inputs["input_ids"], (torch.stack(tokens), torch.stack(logits)))
    plain = make_trial(name)
    with in_float64():
        without = defined(plain, plain.rows[0], NEW)[1]
    assert not torch.allclose(without, logits[0])


def test_generation_of_an_encoder_decoder() -> None:
    model = wrap(lora("T5"), "T5").eval()
    inputs = batch()
    with torch.no_grad(), in_float64():
        output: Any = model.generate(**inputs, **LOGITS)  # type: ignore[operator]
        again = model(**inputs, decoder_input_ids=output.sequences[:, :-1])
    torch.testing.assert_close(torch.stack(output.logits, 1), again.logits, **EXACT)


def test_merged_weights_give_the_same() -> None:
    given = lora()
    model = wrap(given).eval()
    expected = logits_of(model)
    given.merge_adapter()
    torch.testing.assert_close(logits_of(model), expected, **EXACT)
    given.unmerge_adapter()
    prompt = model.prompt.state_dict()
    plain = wrap(model.unload().merge_and_unload()).eval()
    assert plain.peft is None
    plain.prompt.load_state_dict(prompt)
    torch.testing.assert_close(logits_of(plain), expected, **EXACT)


def test_without_adapters_there_is_the_plain_model() -> None:
    model = wrap(lora(modules_to_save=["lm_head"])).eval()
    expected, flags = logits_of(model), [p.requires_grad for p in model.parameters()]
    inputs = batch("right")
    with torch.no_grad(), in_float64():
        plain = build().eval()(**inputs).logits
        with model.disable_adapter():
            with model.disable_adapter():
                assert model(**inputs).logits.equal(plain)
            assert model(**inputs).logits.equal(plain)
    assert logits_of(model).equal(expected)
    assert [p.requires_grad for p in model.parameters()] == flags


# Training


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_training_changes_prompt_and_layers_and_nothing_else(name: str, form: str) -> None:
    model = wrap(lora(name, form), name)
    assert model.training
    frozen = backbone_state(model)
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    starts = {n.split(".")[0] for n in trained}
    assert starts == {"prompts", "backbone"} | ({"heads"} if name == "BERT" else set())
    assert all("lora_" in n for n in trained if n.startswith("backbone."))
    groups = model.parameter_groups(1e-2, 1e-2, 1e-2, 1e-2, peft_lr=1e-2)
    optimizer, losses = torch.optim.AdamW(groups, weight_decay=0.0), []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(**labelled(name)).loss
        loss.backward()
        with_gradients = {n for n, p in model.named_parameters() if p.grad is not None}
        assert with_gradients == set(trained)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    now = dict(model.named_parameters())
    assert not [n for n, before in trained.items() if now[n].equal(before)]
    assert same(backbone_state(model), frozen)


def test_layers_of_peft_follow_the_mode_and_the_rest_does_not() -> None:
    model = wrap(lora(lora_dropout=0.5))
    ids = batch()
    dropout = {m for n, m in model.backbone.named_modules() if n.endswith("lora_dropout.default")}
    layers = {m for m in model.backbone.modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    training = {m for m in model.backbone.modules() if m.training}
    assert len(dropout) == 4
    assert dropout | layers <= training
    assert all("lora_" in n or m in layers for n, m in model.backbone.named_modules() if m.training)
    assert not model(**ids).logits.equal(model(**ids).logits)
    model.eval()
    assert model(**ids).logits.equal(model(**ids).logits)
    assert not any(m.training for m in model.backbone.modules())
    model.train()
    assert {m for m in model.backbone.modules() if m.training} == training


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_are_the_same_with_recomputed_layers(dropout: float) -> None:
    gradients = []
    for recompute in (False, True):
        model = wrap(lora(lora_dropout=dropout))
        if recompute:
            model.gradient_checkpointing_enable()
        torch.manual_seed(4)
        model(**labelled("Llama")).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-7, atol=1e-9)


def test_counts_and_groups() -> None:
    plain = wrap(build())
    model = wrap(lora())
    trained = [p for n, p in model.named_parameters() if n.startswith("backbone") and "lora" in n]
    number = sum(p.numel() for p in trained)
    assert model.parameter_counts() == {**plain.parameter_counts(), "peft": number}
    assert model.get_nb_trainable_parameters()[0] == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    with pytest.raises(ValueError, match=r"^peft_lr: expected a learning rate for the weights of"):
        model.parameter_groups(1, 1, 1, 1)
    last = model.parameter_groups(1, 1, 1, 1, 0.5)[-1]
    assert (last["name"], last["lr"]) == ("peft", 0.5)
    assert {id(p) for p in last["params"]} == {id(p) for p in trained}


def test_a_frozen_adapter_stays_frozen() -> None:
    given = lora()
    for parameter in given.parameters():
        parameter.requires_grad_(False)
    model = wrap(given)
    with model.disable_adapter():
        pass
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert model.parameter_counts()["peft"] == 0
    assert "peft" not in [group["name"] for group in model.parameter_groups(1, 1, 1, 1)]


@pytest.mark.parametrize("form", FORMS)
def test_unload_gives_the_model_back_as_it_was(form: str) -> None:
    given = lora(form=form)
    flags = [p.requires_grad for p in given.parameters()]
    modes = [m.training for m in given.modules()]
    model = wrap(given).eval()
    assert (model.backbone is given) == (form == "add_adapter")
    assert model.unload() is given
    assert [p.requires_grad for p in given.parameters()] == flags
    assert [m.training for m in given.modules()] == modes


def test_a_prefix_from_before_the_layers_changed_is_refused() -> None:
    model: Any = wrap(lora()).eval()
    prefix = model.prefix_cache()
    with in_float64():
        got = model(**batch("right"), prefix=prefix).logits
        torch.testing.assert_close(got, model(**batch("right")).logits, rtol=0, atol=1e-5)
    with torch.no_grad():
        model.peft.trained()[0].add_(0.1)
    with pytest.raises(ValueError, match=r"^prefix: expected the cache of the prompt as it is"):
        model(**batch(), prefix=prefix)


# Files


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_a_folder_holds_prompt_and_adapter(name: str, form: str, tmp_path: Path) -> None:
    model = wrap(lora(name, form), name).eval()
    model.save_pretrained(tmp_path)
    again = EPTModel.from_pretrained(tmp_path, build(name))
    assert not any(m.training for m in again.modules())
    assert logits_of(again, name).equal(logits_of(model, name))
    assert again.parameter_counts() == model.parameter_counts()
    if name != "BERT":
        generated = [m.generate(**batch(), max_new_tokens=4) for m in (model, again)]  # type: ignore[operator]
        assert generated[0].equal(generated[1])
    theirs = peft.PeftModel.from_pretrained(build(name), tmp_path / "peft").eval()
    own = theirs.get_base_model().state_dict()
    assert same(own, again.backbone.state_dict())
    assert isinstance(again.unload(), peft.PeftModel)


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
@pytest.mark.parametrize("method", METHODS)
def test_other_methods_come_back(method: str, tmp_path: Path) -> None:
    model = wrap(with_adapter(build(), METHODS[method]())).eval()
    model(**labelled("Llama")).loss.backward()
    assert model.peft is not None
    assert all(p.grad is not None for p in model.peft.trained())
    model.save_pretrained(tmp_path)
    again = EPTModel.from_pretrained(tmp_path, build())
    assert logits_of(again).equal(logits_of(model))
    with model.disable_adapter():
        assert model(**batch("right")).logits.equal(build().eval()(**batch("right")).logits)


def test_a_folder_finds_its_model(tmp_path: Path) -> None:
    build(dtype=torch.float32).save_pretrained(tmp_path / "model")
    backbone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = wrap(with_adapter(backbone, config), dtype=torch.float32).eval()
    model.save_pretrained(tmp_path / "saved")
    again = EPTModel.from_pretrained(tmp_path / "saved")
    assert logits_of(again).equal(logits_of(model))
    assert again.base_model_name == str(tmp_path / "model")


@pytest.mark.parametrize("trained", [True, False])
def test_types_and_flags_come_back(trained: bool, tmp_path: Path) -> None:
    """An adapter in float32 in a model in bfloat16, or in bfloat16 as well."""
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, inference_mode=not trained)
    given = peft.get_peft_model(build(dtype=torch.bfloat16), config, autocast_adapter_dtype=trained)
    model = wrap(given, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    again = EPTModel.from_pretrained(tmp_path, build(dtype=torch.bfloat16))
    facts = [
        [(p.dtype, p.requires_grad) for p in m.peft.parameters()] for m in (model, again) if m.peft
    ]
    expected = (torch.float32 if trained else torch.bfloat16, trained)
    assert facts == [[expected] * 4] * 2


@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_holds_the_adapter(name: str) -> None:
    model, other = wrap(lora(name), name), wrap(lora(name), name)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter += 1
    state = model.state_dict()
    held = [key for key in state if key.startswith("backbone.")]
    assert held
    assert all("lora_" in key for key in held)
    keys = other.load_state_dict(state)
    assert (keys.missing_keys, keys.unexpected_keys) == ([], [])
    assert logits_of(other.eval(), name).equal(logits_of(model.eval(), name))
    with pytest.raises(RuntimeError, match=r"Missing key.*lora_"):
        other.load_state_dict({k: v for k, v in state.items() if k not in held})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*lora_"):
        wrap(build(name), name).load_state_dict(state)


@pytest.mark.parametrize("form", FORMS)
def test_the_trainer_of_transformers_trains_and_saves_both(form: str, tmp_path: Path) -> None:
    model = wrap(lora(form=form, dtype=torch.float32), dtype=torch.float32)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    ids = torch.randint(5, 60, (8, 6), generator=torch.Generator().manual_seed(3))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    for steps in (2, 4):
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=rows)  # type: ignore[arg-type]
        trainer.train(resume_from_checkpoint=steps > 2)
    now = dict(model.named_parameters())
    assert not [name for name, before in start.items() if now[name].equal(before)]
    again = EPTModel.from_pretrained(tmp_path / "checkpoint-4", build(dtype=torch.float32))
    assert logits_of(again).equal(logits_of(model.eval()))
    assert isinstance(again.unload(), peft.PeftModel)


def test_loading_into_a_model_with_an_adapter(tmp_path: Path) -> None:
    model = wrap(lora()).eval()
    model.save_pretrained(tmp_path / "both")
    expected = logits_of(model)
    again = EPTModel.from_pretrained(tmp_path / "both", lora())  # the very same adapter
    again.load_adapter(tmp_path / "both", "second")
    assert logits_of(again).equal(expected)
    changed = lora()
    with torch.no_grad():
        next(p for p in changed.parameters() if p.requires_grad).add_(1)
    with pytest.raises(CheckpointError, match=r"peft: .*: expected the values of this model"):
        EPTModel.from_pretrained(tmp_path / "both", changed)
    other = wrap(changed).eval()
    assert not logits_of(other).equal(expected)
    other.load_pretrained(tmp_path / "both")
    assert logits_of(other).equal(expected)
    with pytest.raises(CheckpointError, match=r"peft: lora_alpha: expected 16 as .*, got 8"):
        EPTModel.from_pretrained(tmp_path / "both", lora(lora_alpha=16))
    with pytest.raises(CheckpointError, match=r"peft: r: expected 3 as in this model, got 2"):
        wrap(lora(r=3)).load_pretrained(tmp_path / "both")


def test_an_adapter_is_not_left_out_or_added_unnoticed(tmp_path: Path) -> None:
    wrap(lora()).save_pretrained(tmp_path / "both")
    wrap(build()).save_pretrained(tmp_path / "alone")
    assert not (tmp_path / "alone" / "peft").exists()
    described = json.loads((tmp_path / "alone" / "adapter.json").read_text())
    assert "peft" not in described
    plain, both = wrap(build()), wrap(lora())
    for load in (plain.load_pretrained, lambda folder: plain.load_adapter(folder, "other")):
        with pytest.raises(CheckpointError, match="peft: expected none as in this model, got the"):
            load(tmp_path / "both")
    for load in (both.load_pretrained, lambda folder: both.load_adapter(folder, "other")):
        with pytest.raises(CheckpointError, match="peft: expected the adapter default of PEFT"):
            load(tmp_path / "alone")
    assert plain.adapter_names == both.adapter_names == ("default",)


def test_a_bank_serves_prompts_with_their_adapter(tmp_path: Path) -> None:
    model = wrap(lora()).eval()
    model.save_pretrained(tmp_path / "both")
    wrap(build()).save_pretrained(tmp_path / "alone")
    sizes: dict[str, Any] = {"capacity": 3, "num_virtual_tokens": M, "max_length": 16, "rank": 2}
    bank = EPTBank(lora(), "CAUSAL_LM", **sizes, dtype=torch.float64)
    bank.add("file", tmp_path / "both")
    bank.add("model", model)
    for other in (tmp_path / "alone", wrap(build()), wrap(lora(r=3))):
        with pytest.raises(ValueError, match=r"expected .* PEFT"):
            bank.add("other", other)
    with torch.no_grad(), in_float64():
        got = bank(**batch(), tasks=["file", "model"]).logits
    torch.testing.assert_close(got, logits_of(model), **EXACT)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda f: (f / PEFT_TENSOR_FILE).unlink(), "expected a readable file"),
    "no config": (lambda f: (f / PEFT_CONFIG_FILE).unlink(), "expected a readable file"),
    "other config": (
        lambda f: edit(f / PEFT_CONFIG_FILE, lambda v: v.update(lora_alpha=99)),
        "sha256: expected the files it was saved with, got others for .'peft/adapter_config.json'",
    ),
    "not named": (
        lambda f: edit(f / "adapter.json", lambda v: v.pop("peft")),
        "sha256: expected the files it was saved with",
    ),
    "a name that is none": (
        lambda f: edit(f / "adapter.json", lambda v: v.update(peft=3)),
        "peft: expected str, got int",
    ),
}
# Configs that have the right checksum.
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "a rank that no memory holds": ({"r": 1 << 45}, "peft: "),
    "another rank": ({"r": 3}, r"expected shape \(3, 32\), got \(2, 32\)"),
    "no layers": ({"target_modules": ["nothing"]}, "peft: expected an adapter that PEFT"),
    "further layers": ({"target_modules": {"q_proj", "k_proj", "v_proj"}}, "missing"),
    "an unknown method": ({"peft_type": "NOTHING"}, "peft: expected an adapter that PEFT"),
    "another method": ({"peft_type": "PROMPT_TUNING"}, "peft: expected an adapter that PEFT"),
    "changed weights": ({"init_lora_weights": "pissa"}, "got ValueError: init_lora_weights: exp"),
    "a module to import": (
        {"megatron_config": {"a": 1}, "megatron_core": "tests.nothing"},
        "got ValueError: megatron_config: expected None",
    ),
    "more layers": ({"layer_replication": [[0, 2], [0, 2]]}, "got ValueError: layer_replication"),
}


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders_are_refused(damage: str, tmp_path: Path) -> None:
    change, message = DAMAGE[damage]
    wrap(lora()).save_pretrained(tmp_path)
    change(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        EPTModel.from_pretrained(tmp_path, build())


# Descriptions in a state dict that have the right checksum.
DESCRIPTIONS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "not described": (lambda v: v.pop("peft"), r"expected the tensors .*\(missing \[\], foreign"),
    "no config": (lambda v: v["peft"].pop("config"), "config: expected dict, got NoneType"),
    "a name of another type": (lambda v: v.update(peft=[]), "peft: expected dict, got list"),
    "names of no tensors": (lambda v: v["peft"]["names"].update(a="b"), "missing .'backbone.b'"),
    "names that are none": (lambda v: v["peft"]["names"].update(a=3), "names: expected strings"),
    "one tensor too few": (lambda v: v["peft"]["names"].popitem(), "foreign .'backbone.model"),
    "a name of no tensor in place of one": (
        lambda v: v["peft"]["names"].update({next(iter(v["peft"]["names"])): "x"}),
        "missing .'backbone.x'",
    ),
}


@pytest.mark.parametrize("kind", DESCRIPTIONS)
def test_damaged_state_dicts_are_refused(kind: str, tmp_path: Path) -> None:
    change, message = DESCRIPTIONS[kind]
    state = wrap(lora()).state_dict()
    save_file(state, tmp_path / STATE_FILE)
    assert EPTModel.from_pretrained(tmp_path, build()).peft is not None
    described = json.loads(state.pop(DESCRIPTION).numpy().tobytes())
    del described["sha256"]
    change(described)
    text = json_bytes({**described, "sha256": state_checksum(described, state)})
    state[DESCRIPTION] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    save_file(state, tmp_path / STATE_FILE)
    plain = build()
    with pytest.raises(CheckpointError, match=message):
        EPTModel.from_pretrained(tmp_path, plain)
    assert not hasattr(plain, "peft_config")


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments:UserWarning")
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_that_does_not_fit_leaves_the_model_alone(kind: str, tmp_path: Path) -> None:
    changes, message = CONFIGS[kind]
    model = wrap(lora())
    assert model.peft is not None
    for name, value in changes.items():  # past the checks of a config when it is made
        setattr(model.peft.config, name, value)
    model.save_pretrained(tmp_path)
    plain = build().requires_grad_(True)
    state = {k: v.clone() for k, v in plain.state_dict().items()}
    modes = [m.training for m in plain.modules()]
    with pytest.raises(CheckpointError, match=message):
        EPTModel.from_pretrained(tmp_path, plain)
    assert same(plain.state_dict(), state)
    assert all(p.requires_grad for p in plain.parameters())
    assert [m.training for m in plain.modules()] == modes
    assert not hasattr(plain, "peft_config")


def test_a_prompt_that_does_not_fit_leaves_the_model_alone(tmp_path: Path) -> None:
    """Its adapter of PEFT does fit, and is taken out again."""
    wrap(lora()).save_pretrained(tmp_path)
    other = BY_NAME["Mistral"].build("CAUSAL_LM", dtype=torch.float64)
    state = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(CheckpointError, match="base_model_type: expected 'mistral'"):
        EPTModel.from_pretrained(tmp_path, other)
    assert same(other.state_dict(), state)
    assert all(p.requires_grad for p in other.parameters())
    assert all(m.training for m in other.modules())
    assert not hasattr(other, "peft_config")


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrap(lora()).save_pretrained(tmp_path)
    plain = build()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"^peft not installed: pip install peft [(].* needs it"):
        EPTModel.from_pretrained(tmp_path, plain)


# What is refused


def prompt_tuning(model: Any) -> Any:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(model, config)


def two_adapters(model: Any) -> Any:
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]), "first")
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]), "second")
    return model


def merged(model: Any) -> Any:
    given = with_adapter(model, peft.LoraConfig(target_modules=["q_proj"]))
    given.merge_adapter()
    return given


def switched_off(model: Any) -> Any:
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    model.disable_adapters()
    return model


def taken_out(model: Any) -> Any:
    given = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    given.unload()
    return given


def chosen(kind: type[Any] = peft.LoraConfig, **choices: Any) -> Callable[[Any], Any]:
    return lambda model: peft.get_peft_model(
        model, kind(**{"target_modules": ["q_proj"], **choices})
    )


REFUSED: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "prompt tuning": (
        prompt_tuning,
        TypeError,
        "model: expected a PEFT method that works by its layers alone, such as LORA or IA3, got "
        "PROMPT_TUNING, which has a forward of its own",
    ),
    "AdaLoRA": (
        chosen(peft.AdaLoraConfig, total_step=10),
        TypeError,
        "model: expected a PEFT method that works by its layers alone, such as LORA or IA3, got "
        "ADALORA, which has a forward of its own",
    ),
    "VeRA": (
        chosen(peft.VeraConfig),
        TypeError,
        "model: expected a PEFT method whose weights are all floats in its layers, got VERA, which "
        "has others",
    ),
    "several adapters": (
        two_adapters,
        ValueError,
        "model: expected one PEFT adapter, got first, second (delete_adapter() removes one, "
        "merge_and_unload() puts it into the weights)",
    ),
    "merged": (
        merged,
        ValueError,
        "model: expected PEFT layers that are not merged, got merged ones (unmerge_adapter() "
        "separates them, merge_and_unload() gives a plain model)",
    ),
    "switched off": (
        switched_off,
        ValueError,
        "model: expected the PEFT adapter default active and enabled, got it switched off "
        "(merge_and_unload() or unload() gives a plain model)",
    ),
    "taken out": (
        taken_out,
        TypeError,
        "model: expected PEFT layers in the PeftModel, got none (LORA)",
    ),
    "token embeddings": (
        chosen(target_modules=["embed_tokens"]),
        ValueError,
        "model: expected a PEFT adapter that leaves the token embeddings alone, got it on "
        "model.embed_tokens (the prompt reads the table itself)",
    ),
    "some tokens": (
        chosen(trainable_token_indices=[3]),
        ValueError,
        "model: expected a PEFT adapter that leaves the token embeddings alone, got it on "
        "model.embed_tokens (the prompt reads the table itself)",
    ),
    "biases": (
        chosen(bias="all"),
        ValueError,
        'bias: expected "none" under a prompt, as others are weights of the frozen model, '
        "got 'all'",
    ),
    "an initialisation that changes the model": (
        chosen(init_lora_weights="pissa"),
        ValueError,
        "init_lora_weights: expected one that leaves the model's own weights as they are (True, "
        "False, gaussian, orthogonal, eva), got 'pissa'",
    ),
    "activated LoRA": (
        chosen(alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM"),
        ValueError,
        "alora_invocation_tokens: expected None under a prompt, got [5, 6]",
    ),
}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(kind: str, root: Path) -> None:
    make, error, message = REFUSED[kind]
    given = make(build(dtype=torch.float32))
    flags = [p.requires_grad for p in given.parameters()]
    modes = [m.training for m in given.modules()]
    with pytest.raises(error) as raised:
        wrap(given)
    assert str(raised.value) == message
    page = (root / "docs" / "errors.md").read_text(encoding="utf-8")
    assert f"`{message}`" in page or kind == "AdaLoRA"
    assert [p.requires_grad for p in given.parameters()] == flags
    assert [m.training for m in given.modules()] == modes


def test_a_head_is_trained_once(tmp_path: Path) -> None:
    """By us; the config of PEFT for this task would have it trained there."""
    choices: dict[str, Any] = {"target_modules": ["query"], "r": 2}
    sizes = EPTConfig(32, num_virtual_tokens=M, max_length=16, rank=0, num_spaces=0)
    twice = peft.get_peft_model(
        BY_NAME["BERT"].build("SEQ_CLS"), peft.LoraConfig(task_type="SEQ_CLS", **choices)
    )
    with pytest.raises(ValueError, match=r"^model: expected a PEFT adapter that leaves the head"):
        get_ept_model(twice, sizes, "SEQ_CLS")
    given = with_adapter(
        BY_NAME["BERT"].build("SEQ_CLS"), peft.LoraConfig(task_type="FEATURE_EXTRACTION", **choices)
    )
    model = get_ept_model(given, sizes, "SEQ_CLS")
    model(**batch(), labels=torch.tensor([0, 2])).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval().save_pretrained(tmp_path)
    again = EPTModel.from_pretrained(tmp_path, BY_NAME["BERT"].build("SEQ_CLS"))
    assert again(**batch()).logits.equal(model(**batch()).logits)


def test_positions_are_known_inside_layers_of_peft() -> None:
    task, sizes = "CAUSAL_LM", EPTConfig(32, num_virtual_tokens=M, max_length=16, rank=0)
    plain = get_ept_model(build("GPT-2"), sizes, task)
    given = peft.get_peft_model(build("GPT-2"), peft.LoraConfig(target_modules=["wpe"]))
    model = get_ept_model(given, sizes, task)
    assert plain.profile.position_table == "transformer.wpe"
    assert model.profile.position_table == "transformer.wpe.base_layer"
    assert isinstance(model.backbone.get_submodule("transformer.wpe.base_layer"), nn.Embedding)
    assert model.text_limit == plain.text_limit
