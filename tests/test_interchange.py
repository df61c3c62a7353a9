"""Prompts of DePT and PEFT in, prompts of ours out to PEFT and to plain tensors."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import subprocess
import sys
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import ept_fast
from ept_fast import CheckpointError, EPTConfig, FusedEPTPrompt
from ept_fast.interchange import (
    export_peft,
    export_plain,
    import_dept,
    import_peft,
    import_plain,
)
from tests import interchange as tiny
from tests.interchange import DEPT_CONFIG, PEFT_CONFIG, D, M, N, R

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # transformers about a flag that PEFT reads
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

# Computed in float64 from float32 tensors on both sides.
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def text(batch: int, length: int, *, left: bool = False, seed: int = 11) -> tuple[Tensor, Tensor]:
    """Ids and a mask in which each row is one token shorter than the one before."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, tiny.VOCABULARY, (batch, length), generator=generator)
    mask = (torch.arange(length) < length - torch.arange(batch).unsqueeze(1)).long()
    return ids, mask.flip(1) if left else mask


# DePT


def dept_embeds(
    model: Any, config: dict[str, Any], state: dict[str, Tensor], ids: Tensor, mask: Tensor
) -> dict[str, Tensor]:
    """DePT as it is defined: the product is added by column, on rows of the full length."""
    assert ids.shape[1] == config["max_length"]
    scaling = config["lora_alpha"] / math.sqrt(config["r"])
    low_rank = state["prompt_encoder.lora_embedding_A"].double() @ (
        state["prompt_encoder.lora_embedding_B"].double()
    )
    shifted = model.get_input_embeddings()(ids).double() + scaling * low_rank
    prompt = state["prompt_embeddings"][: config["num_virtual_tokens"]].double()
    return {
        "inputs_embeds": torch.cat([prompt.expand(len(ids), -1, -1), shifted], dim=1),
        "attention_mask": torch.cat([mask.new_ones(len(mask), len(prompt)), mask], dim=1),
    }


def ept_logits(model: Any, prompt: Any, ids: Tensor, mask: Tensor, **inputs: Any) -> Tensor:
    out = prompt(input_ids=ids, attention_mask=mask)
    embeds, wide_mask = out.inputs_embeds, out.attention_mask
    logits: Tensor = model(inputs_embeds=embeds, attention_mask=wide_mask, **inputs).logits
    return logits


@pytest.mark.parametrize("submodules", [1, 2])
def test_dept_has_the_logits_of_its_formula(submodules: int, tmp_path: Path) -> None:
    config = {**DEPT_CONFIG, "num_transformer_submodules": submodules}
    state = tiny.dept_state(config)
    model = tiny.tiny_t5().double()
    folder = tiny.save_adapter(tmp_path, config, state, pickled=True)
    prompt = import_dept(folder, model.get_input_embeddings())
    ids, mask = text(4, N)
    decoder = {"decoder_input_ids": torch.tensor([[0, 7, 8]] * 4)}
    expected = model(**dept_embeds(model, config, state, ids, mask), **decoder).logits
    torch.testing.assert_close(ept_logits(model, prompt, ids, mask, **decoder), expected, **EXACT)
    # the offset matters, and DePT's own padding is no longer needed
    plain = {**state, "prompt_encoder.lora_embedding_A": torch.zeros(N, R)}
    other = model(**dept_embeds(model, config, plain, ids, mask), **decoder).logits
    assert (expected - other).abs().max() > 1e-2
    short = mask[1:].clone()
    short_ids, short = ids[1:, : N - 1], short[:, : N - 1]
    decoder = {"decoder_input_ids": torch.tensor([[0, 7, 8]] * 3)}
    logits = ept_logits(model, prompt, short_ids, short, **decoder)
    torch.testing.assert_close(logits, expected[1:], **EXACT)


def test_a_real_dept_checkpoint(shared_dept_checkpoint: Path) -> None:
    """Trained on t5-base: its tensors have the same logits as its formula."""
    config = json.loads((shared_dept_checkpoint / "adapter_config.json").read_text())
    file = shared_dept_checkpoint / "adapter_model.bin"
    state = torch.load(file, map_location="cpu", weights_only=True)
    model = tiny.tiny_t5(d_model=768, d_kv=16).double()
    prompt = import_dept(shared_dept_checkpoint, model.get_input_embeddings())
    assert prompt.config == EPTConfig(
        768, num_virtual_tokens=80, max_length=256, rank=15, num_spaces=0, alpha=8.0, fusion=False
    )
    assert prompt.config.scaling == 8 / math.sqrt(15)
    for name, saved in zip(("short_prompt", "offset_a", "offset_b"), state.values(), strict=True):
        assert torch.equal(getattr(prompt, name), saved)
    assert prompt.offset_a.abs().max() > 0.1
    ids, mask = text(2, 256)
    mask[1, 40:] = 0
    decoder = {"decoder_input_ids": torch.tensor([[0, 9]] * 2)}
    expected = model(**dept_embeds(model, config, state, ids, mask), **decoder).logits
    torch.testing.assert_close(ept_logits(model, prompt, ids, mask, **decoder), expected, **EXACT)


def parameters(state: dict[str, Tensor]) -> dict[str, Any]:
    return {name: nn.Parameter(value) for name, value in state.items()}


def of_one_storage(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that begin at the same value."""
    values = tiny.random(max(map(torch.numel, state.values())), seed=7)
    return {name: values[: value.numel()].view_as(value) for name, value in state.items()}


SAVED: dict[str, Any] = {
    "tensors": dict,
    "an ordered dict": OrderedDict,
    "parameters": parameters,
    "halves of one storage": lambda state: {
        name: torch.stack([value, value])[1] for name, value in state.items()
    },
    "transposed": lambda state: {name: v.mT.contiguous().mT for name, v in state.items()},
    "expanded": lambda state: {name: v[:1].expand_as(v) for name, v in state.items()},
    "of one storage": of_one_storage,
}


@pytest.mark.parametrize("how", SAVED)
def test_files_of_torch_save(how: str, tmp_path: Path) -> None:
    saved = SAVED[how](tiny.dept_state(DEPT_CONFIG))
    tiny.save_adapter(tmp_path, DEPT_CONFIG, saved, pickled=True)
    values = list(import_dept(tmp_path).state_dict().values())
    assert all(torch.equal(*pair) for pair in zip(values, saved.values(), strict=True))
    # and no value of them is in the place of another
    others = [torch.arange(value.numel()).view_as(value).float() for value in values]
    for value, other in zip(values, others, strict=True):
        value.copy_(other)
    assert all(torch.equal(*pair) for pair in zip(values, others, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pickled", [False, True])
def test_each_tensor_keeps_its_type(dtype: torch.dtype, pickled: bool, tmp_path: Path) -> None:
    state = tiny.dept_state(DEPT_CONFIG)
    state["prompt_encoder.lora_embedding_B"] = state["prompt_encoder.lora_embedding_B"].to(dtype)
    prompt = import_dept(tiny.save_adapter(tmp_path, DEPT_CONFIG, state, pickled=pickled))
    assert (prompt.offset_a.dtype, prompt.offset_b.dtype) == (torch.float32, dtype)
    assert torch.equal(prompt.offset_b, state["prompt_encoder.lora_embedding_B"])


def test_safetensors_come_before_pickles(tmp_path: Path) -> None:
    state = tiny.dept_state(DEPT_CONFIG)
    tiny.save_adapter(tmp_path, DEPT_CONFIG, state)
    tiny.save_adapter(tmp_path, DEPT_CONFIG, {"x": torch.zeros(1)}, pickled=True)
    assert torch.equal(import_dept(tmp_path).short_prompt, state["prompt_embeddings"])


def test_dept_without_a_rank(tmp_path: Path) -> None:
    config = {**DEPT_CONFIG, "r": 0}
    tiny.save_adapter(tmp_path, config, tiny.dept_state(config), pickled=True)
    prompt = import_dept(tmp_path)
    assert (prompt.config.rank, prompt.offset_a) == (0, None)


def test_left_padded_training_is_told(tmp_path: Path) -> None:
    """DePT pads causal text on the left, so the column of its tokens was not their rank."""
    config = {**DEPT_CONFIG, "task_type": "CAUSAL_LM"}
    tiny.save_adapter(tmp_path, config, tiny.dept_state(config), pickled=True)
    with pytest.warns(UserWarning, match="task_type CAUSAL_LM: DePT pads such text on the left"):
        import_dept(tmp_path)


LOW_RANK = ("prompt_encoder.lora_embedding_A", "prompt_encoder.lora_embedding_B")


@pytest.mark.parametrize("names", [LOW_RANK, LOW_RANK[:1], LOW_RANK[1:]], ids=len)
@pytest.mark.parametrize("pickled", [False, True])
def test_dept_without_its_matrices(names: tuple[str, ...], pickled: bool, tmp_path: Path) -> None:
    state = tiny.dept_state(DEPT_CONFIG)
    for name in names:
        del state[name]
    tiny.save_adapter(tmp_path, DEPT_CONFIG, state, pickled=pickled)
    message = f"expected DePT's low-rank matrices .* got none for {', '.join(names)}"
    with pytest.raises(CheckpointError, match=message) as caught:
        import_dept(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "adapter_model"))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("token_dim", D + 1, r"prompt_embeddings: expected shape \(3, 17\), got \(3, 16\)"),
        ("num_virtual_tokens", 4, r"prompt_embeddings: expected shape \(4, 16\), got \(3, 16\)"),
        ("num_transformer_submodules", 2, r"prompt_embeddings: expected shape \(6, 16\)"),
        ("max_length", N + 1, r"lora_embedding_A: expected shape \(13, 2\), got \(12, 2\)"),
        ("r", R + 1, r"lora_embedding_A: expected shape \(12, 3\), got \(12, 2\)"),
        ("r", 100, r"rank: expected at most min\(max_length 12, hidden_size 16\)"),
        ("lora_alpha", None, "lora_alpha: expected a real number, got NoneType None"),
        ("load_lora_embeddings", False, "load_lora_embeddings: expected true"),
        ("load_lora_embedding_B", False, "load_lora_embedding_B: expected true"),
        ("peft_type", "LORA", "peft_type: expected PROMPT_TUNING_LORA, got 'LORA'$"),
        ("peft_type", "PROMPT_TUNING", r"got 'PROMPT_TUNING' \(import_peft reads those\)"),
    ],
)
def test_dept_at_odds_with_its_config(field: str, value: Any, message: str, tmp_path: Path) -> None:
    config = {**DEPT_CONFIG, field: value}
    tiny.save_adapter(tmp_path, config, tiny.dept_state(DEPT_CONFIG), pickled=True)
    with pytest.raises(CheckpointError, match=message) as caught:
        import_dept(tmp_path)
    assert str(tmp_path) in str(caught.value)


# PEFT in

MODELS = {"SEQ_2_SEQ_LM": tiny.tiny_t5, "CAUSAL_LM": tiny.tiny_llama, "SEQ_CLS": tiny.tiny_bert}
DECODER = {"decoder_input_ids": torch.tensor([[0, 7, 8]] * 3)}


def inputs_of(task: str) -> dict[str, Tensor]:
    return DECODER if task == "SEQ_2_SEQ_LM" else {}


def peft_logits(model: Any, task: str, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, **inputs_of(task))
    # of a causal model with the prompt's positions
    logits: Tensor = out.logits
    return logits


def peft_model(task: str, **choices: Any) -> Any:
    """The real library's prompt tuning on a tiny model, its prompt at random."""
    config = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=M, **choices)
    model = peft.get_peft_model(MODELS[task](), config).eval()
    weight = model.prompt_encoder["default"].embedding.weight
    weight.data.copy_(tiny.random(*weight.shape, seed=6))
    return model


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize(
    ("task", "choices"),
    [
        ("SEQ_2_SEQ_LM", {}),  # two prompts one behind the other
        ("SEQ_2_SEQ_LM", {"num_transformer_submodules": 1}),
        ("CAUSAL_LM", {}),
        ("SEQ_CLS", {}),
    ],
)
def test_peft_adapters_have_the_same_logits(
    task: str, choices: dict[str, Any], safe: bool, tmp_path: Path
) -> None:
    theirs = peft_model(task, **choices)
    rows = len(theirs.prompt_encoder["default"].embedding.weight)
    assert rows == (2 * M if task == "SEQ_2_SEQ_LM" and not choices else M)
    theirs.save_pretrained(tmp_path, safe_serialization=safe)
    ids, mask = text(3, 6)
    expected = peft_logits(theirs, task, ids, mask)
    model = MODELS[task]()
    prompt = import_peft(tmp_path, model.get_input_embeddings(), prompt_only=task == "SEQ_CLS")
    assert prompt.config == EPTConfig(D, num_virtual_tokens=M, rank=0, num_spaces=0)
    logits = ept_logits(model, prompt, ids, mask, **inputs_of(task))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    # which the prompt decides
    prompt.short_prompt.data.zero_()
    other = ept_logits(model, prompt, ids, mask, **inputs_of(task))
    assert (other - expected).abs().max() > 1e-2


def test_a_head_is_not_lost_silently(tmp_path: Path) -> None:
    peft_model("SEQ_CLS").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"foreign \['base_model.classifier.bias', "):
        import_peft(tmp_path)
    assert import_peft(tmp_path, prompt_only=True).short_prompt.shape == (M, D)


OTHERS: dict[str, Any] = {
    "LORA": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "P_TUNING": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=4
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_adapters_of_peft(kind: str, tmp_path: Path) -> None:
    """The real library's files of other methods are told apart by their type."""
    peft.get_peft_model(tiny.tiny_llama(), OTHERS[kind]()).save_pretrained(tmp_path)
    message = f"adapter_config.json: peft_type: expected PROMPT_TUNING, got '{kind}'$"
    with pytest.raises(CheckpointError, match=message):
        import_peft(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "PROMPT_TUNING_LORA"}, r"got 'PROMPT_TUNING_LORA' \(import_dept reads"),
        ({"peft_type": None}, "peft_type: expected PROMPT_TUNING, got None"),
        ({"token_dim": D - 1}, r"prompt_embeddings: expected shape \(3, 15\), got \(3, 16\)"),
        ({"num_virtual_tokens": 6}, r"expected shape \(6, 16\), got \(3, 16\)"),
        ({"task_type": "SEQ_2_SEQ"}, "task_type: expected one of SEQ_CLS, .* got 'SEQ_2_SEQ'"),
        (
            {"num_transformer_submodules": 2},
            "num_transformer_submodules: expected at most 1 for task_type CAUSAL_LM, got 2",
        ),
        (
            {"num_transformer_submodules": 3, "task_type": "SEQ_2_SEQ_LM"},
            "num_transformer_submodules: expected at most 2 for task_type SEQ_2_SEQ_LM, got 3",
        ),
        # what it is in PEFT where it is not given
        (
            {"num_transformer_submodules": None, "task_type": "SEQ_2_SEQ_LM"},
            r"expected shape \(6, 16\), got \(3, 16\)",
        ),
    ],
)
def test_peft_at_odds_with_its_config(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tiny.save_adapter(tmp_path, {**PEFT_CONFIG, **changes}, tiny.peft_state(PEFT_CONFIG))
    with pytest.raises(CheckpointError, match=message) as caught:
        import_peft(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_no_tensors_at_all(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(PEFT_CONFIG))
    message = r"expected adapter_model.safetensors or adapter_model.bin, got neither$"
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path}: ") + message):
        import_peft(tmp_path)


# PEFT out


def zero_offset(prompt: FusedEPTPrompt) -> FusedEPTPrompt:
    with torch.no_grad():
        prompt.offset_a.zero_()
    return prompt


EXPORTED = {
    "rank 0": lambda table: tiny.make_prompt(table, rank=0),
    "prompt tuning": lambda table: tiny.make_prompt(table, rank=0, num_spaces=0),
    "an offset of zeros": lambda table: zero_offset(tiny.make_prompt(table)),
    "alpha 0": lambda table: tiny.make_prompt(table, alpha=0.0),
    "folded": lambda table: tiny.make_prompt(table, rank=0).fold(),
}


@pytest.mark.parametrize("task", MODELS)
@pytest.mark.parametrize("case", EXPORTED)
def test_peft_loads_what_is_exported(case: str, task: str, tmp_path: Path) -> None:
    model = MODELS[task]()
    prompt = EXPORTED[case](model.get_input_embeddings())
    modules = None
    if task == "SEQ_CLS":
        modules = {f"classifier.{n}": t for n, t in model.classifier.state_dict().items()}
    export_peft(prompt, tmp_path, base_model="base", task_type=task, modules=modules)
    ids, mask = text(3, 6)
    expected = ept_logits(model, prompt, ids, mask, **inputs_of(task))
    base = MODELS[task]()
    if task == "SEQ_CLS":
        nn.init.zeros_(base.classifier.weight)  # the adapter brings the trained one
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(peft_logits(theirs, task, ids, mask), expected, rtol=1e-5, atol=1e-5)
    assert theirs.peft_config["default"].base_model_name_or_path == "base"
    # and it comes back
    again = import_peft(tmp_path, model.get_input_embeddings(), prompt_only=task == "SEQ_CLS")
    logits = ept_logits(model, again, ids, mask, **inputs_of(task))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_one_prompt_of_a_bank(tmp_path: Path) -> None:
    bank = tiny.make_prompt(rank=0, num_tasks=3)
    choices = {"base_model": None, "task_type": "CAUSAL_LM"}
    export_peft(bank, tmp_path, task=2, **choices)
    assert torch.equal(import_peft(tmp_path).short_prompt, bank.reconstruct()[2])
    for task, message in ((None, "expected one from 0 to 2"), (3, "expected at most 2, got 3")):
        with pytest.raises(ValueError, match=f"^task: {message}"):
            export_peft(bank, tmp_path / "none", task=task, **choices)
    with pytest.raises(ValueError, match=r"^task: expected None for a single prompt, got 0"):
        export_peft(tiny.make_prompt(rank=0), tmp_path / "none", task=0, **choices)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("folded", [False, True])
def test_an_offset_is_not_lost_silently(folded: bool, tmp_path: Path) -> None:
    prompt = zero_offset(tiny.make_prompt())
    with torch.no_grad():
        prompt.offset_a[4, 1] = 1e-3
    message = (
        r"^prompt: expected rank 0 or an offset of zeros, .* got an offset on 1 of 12 text "
        r"positions with values up to 0\.\d+ that would be lost \(export_plain keeps it\)$"
    )
    with pytest.raises(ValueError, match=message):
        export_peft(
            prompt.fold() if folded else prompt, tmp_path, base_model=None, task_type="CAUSAL_LM"
        )
    assert not any(tmp_path.iterdir())


def test_mistakes_of_an_export(tmp_path: Path) -> None:
    prompt = tiny.make_prompt(rank=0, num_spaces=0)
    good = {"base_model": None, "task_type": "CAUSAL_LM"}
    for changes, error, message in (
        ({"task_type": "TRANSLATION"}, ValueError, "task_type: expected one of SEQ_CLS, "),
        ({"task_type": "SEQ_CLS"}, ValueError, "modules: expected the weights of the head"),
        (
            {"modules": {"classifier.weight": torch.tensor([math.inf])}},
            ValueError,
            "base_model.classifier.weight: expected finite values to save",
        ),
    ):
        with pytest.raises(error, match=f"^{message}"):
            export_peft(prompt, tmp_path, **{**good, **changes})
    with pytest.raises(TypeError, match=r"^prompt: expected a FusedEPTPrompt .* got Linear"):
        export_peft(nn.Linear(2, 2), tmp_path, **good)  # type: ignore[arg-type]
    prompt.short_prompt.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"^prompt_embeddings: expected finite values to save"):
        export_peft(prompt, tmp_path, **good)
    assert not any(tmp_path.iterdir())


# Plain tensors


def plain_embeds(folder: Path, model: Any, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """What a server does that knows the two files and nothing of this package."""
    about = json.loads((folder / "prompt_embeddings.json").read_text())
    tensors = safetensors.torch.load_file(folder / "prompt_embeddings.safetensors")
    embeds = model.get_input_embeddings()(ids)
    if about["offset"] != "none":
        table = tensors.get("offset")
        if table is None:
            table = tensors["offset_a"] @ tensors["offset_b"]
        rank = mask.cumsum(1) - 1
        embeds = embeds + table[rank.clamp(min=0)] * mask.unsqueeze(-1)
    prompt = tensors["prompt_embeds"].expand(len(ids), -1, -1).to(embeds.dtype)
    ones = mask.new_ones(len(ids), about["num_virtual_tokens"])
    return {
        "inputs_embeds": torch.cat([prompt, embeds], dim=1),
        "attention_mask": torch.cat([ones, mask], dim=1),
    }


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("task", MODELS)
@pytest.mark.parametrize("offset", ["table", "factors", "none"])
def test_plain_tensors_have_the_same_logits(
    offset: str, task: str, left: bool, tmp_path: Path
) -> None:
    model = MODELS[task]()
    sizes = {"rank": 0} if offset == "none" else {}
    prompt = tiny.make_prompt(model.get_input_embeddings(), **sizes)
    export_plain(prompt, tmp_path, offset="table" if offset == "none" else offset)
    ids, mask = text(3, 6, left=left)
    expected = ept_logits(model, prompt, ids, mask, **inputs_of(task))
    got = model(**plain_embeds(tmp_path, model, ids, mask), **inputs_of(task)).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_the_plain_files(tmp_path: Path) -> None:
    prompt = tiny.make_prompt()
    export_plain(prompt, tmp_path, base_model="gpt2")
    about = json.loads((tmp_path / "prompt_embeddings.json").read_text())
    assert about == {
        "format": "prompt_embeddings",
        "format_version": 2,
        "base_model": "gpt2",
        "hidden_size": D,
        "num_virtual_tokens": M,
        "offset": "table",
        "max_length": N,
        "rank": R,
        "offset_tokens": "all",
    }
    assert {path.name for path in tmp_path.iterdir()} == {
        "prompt_embeddings.json",
        "prompt_embeddings.safetensors",
    }
    plain = import_plain(tmp_path)
    assert torch.equal(plain.prompt_embeds, prompt.reconstruct())
    table = prompt.config.scaling * prompt.offset_a @ prompt.offset_b
    torch.testing.assert_close(plain.offset, table.detach())
    assert plain.base_model == "gpt2"
    assert plain.offset_tokens == "all"


@pytest.mark.parametrize(
    ("choices", "tokens"),
    [
        ({}, "all"),
        ({"offset_tokens": "given"}, "given"),
        ({"offset_tokens": "given", "rank": 0}, "none"),
        ({"rank": 0}, "none"),
    ],
    ids=str,
)
def test_tokens_that_a_plain_prompt_has_offsets_for(
    choices: dict[str, Any], tokens: str, tmp_path: Path
) -> None:
    prompt = tiny.make_prompt(**choices)
    for number, each in enumerate((prompt, prompt.fold(offset="table"))):
        folder = tmp_path / str(number)
        export_plain(each, folder)
        about = json.loads((folder / "prompt_embeddings.json").read_text())
        assert about["offset_tokens"] == import_plain(folder).offset_tokens == tokens


def _described(folder: Path, **changes: Any) -> None:
    """Change the description in both of the plain files; None takes a field out."""
    path = folder / "prompt_embeddings.json"
    about = {**json.loads(path.read_text()), **changes}
    text = json.dumps({n: v for n, v in about.items() if v is not None or n not in changes})
    path.write_text(text)
    file = folder / "prompt_embeddings.safetensors"
    tensors = safetensors.torch.load_file(file)
    with safetensors.safe_open(file, "pt") as opened:
        metadata = json.loads(opened.metadata()["ept_fast"])
    metadata = {"ept_fast": json.dumps({**metadata, "config": text})}
    safetensors.torch.save_file(tensors, file, metadata)


@pytest.mark.parametrize(("rank", "tokens"), [(R, "all"), (0, "none")])
def test_plain_files_of_version_1(rank: int, tokens: str, tmp_path: Path) -> None:
    export_plain(tiny.make_prompt(rank=rank, offset_tokens="given"), tmp_path, base_model="gpt2")
    new = import_plain(tmp_path)
    _described(tmp_path, format_version=1, offset_tokens=None)
    old = import_plain(tmp_path)
    assert old.offset_tokens == tokens
    assert torch.equal(old.prompt_embeds, new.prompt_embeds)
    assert old.base_model == "gpt2"
    assert (old.offset is None) == (rank == 0)


def test_plain_files_that_contradict_themselves(tmp_path: Path) -> None:
    for number, (rank, changes, message) in enumerate(
        (
            (R, {"format_version": 1}, "expected the fields"),
            (R, {"format_version": 3}, "format_version: expected 1 or 2, got 3"),
            (
                R,
                {"format_version": True, "offset_tokens": None},
                "format_version: expected 1 or 2, got True",
            ),
            (R, {"offset_tokens": None}, "expected the fields"),
            (R, {"offset_tokens": "none"}, "offset_tokens: expected one of all, given, got 'none'"),
            (R, {"offset_tokens": "new"}, "offset_tokens: expected one of all, given, got 'new'"),
            (0, {"offset_tokens": "all"}, "offset_tokens: expected one of none, got 'all'"),
        )
    ):
        folder = tmp_path / str(number)
        export_plain(tiny.make_prompt(rank=rank), folder)
        _described(folder, **changes)
        with pytest.raises(CheckpointError, match=message):
            import_plain(folder)


@pytest.mark.parametrize("offset", ["table", "factors"])
def test_a_server_generates_what_is_ours(offset: str, tmp_path: Path) -> None:
    """Its new tokens have no offset: ``"given"`` is exact, and ``"all"`` is not from there on."""
    answers = {}
    for tokens in ("given", "all"):
        model = MODELS["CAUSAL_LM"]().double()
        prompt = tiny.make_prompt(
            model.get_input_embeddings(), max_length=16, offset_tokens=tokens
        ).double()
        folder = tmp_path / tokens
        export_plain(prompt, folder, offset=offset)
        ids = text(1, 6)[0]
        inputs = plain_embeds(folder, model, ids, torch.ones_like(ids))
        how = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        how |= {"output_logits": True, "return_dict_in_generate": True}
        server = model.generate(**inputs, **how)
        ours = ept_fast.get_ept_model(model, prompt.config, "CAUSAL_LM", dtype=torch.float64)
        ours.prompt.load_state_dict(prompt.state_dict())
        answers[tokens] = (server, ours.eval().generate(ids, **how))
    server, own = answers["given"]
    assert server.sequences.tolist() == own.sequences[:, 6:].tolist()
    close = {"rtol": 1e-4, "atol": 1e-4}  # transformers takes norms in float32
    torch.testing.assert_close(torch.stack(server.logits), torch.stack(own.logits), **close)
    server, own = answers["all"]
    torch.testing.assert_close(server.logits[0], own.logits[0], **close)
    assert (server.logits[1] - own.logits[1]).abs().max() > 1e-2


@pytest.mark.parametrize("offset", ["table", "factors"])
@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16], ids=str)
def test_plain_types(dtype: torch.dtype | None, offset: str, tmp_path: Path) -> None:
    bank = tiny.make_prompt(num_tasks=2).to(torch.bfloat16)
    export_plain(bank, tmp_path, dtype=dtype, offset=offset, task=1)
    tensors = safetensors.torch.load_file(tmp_path / "prompt_embeddings.safetensors")
    given = torch.bfloat16 if dtype is None else dtype
    wide = torch.float32 if dtype is None else dtype
    types = {"prompt_embeds": given, "offset": wide, "offset_a": wide, "offset_b": given}
    assert {name: t.dtype for name, t in tensors.items()} == {n: types[n] for n in tensors}
    assert len(tensors) == (2 if offset == "table" else 3)
    plain = import_plain(tmp_path)
    assert torch.equal(plain.prompt_embeds, bank.reconstruct()[1].to(given))
    a, b = bank.offset_a[1].float(), bank.offset_b[1].float()
    tolerance = {"rtol": 0.02, "atol": 0.05} if dtype is torch.bfloat16 else {}
    table = (bank.config.scaling * a @ b).detach().to(plain.offset.dtype)
    torch.testing.assert_close(plain.offset, table, **tolerance)


def test_mistakes_of_a_plain_export(tmp_path: Path) -> None:
    prompt = tiny.make_prompt()
    for changes, error, message in (
        ({"offset": "none"}, ValueError, "offset: expected one of table, factors, got 'none'"),
        ({"dtype": torch.int8}, TypeError, "dtype: expected one of float64, .* got torch.int8"),
        ({"base_model": 3}, TypeError, "base_model: expected a text, got int"),
        ({"task": 0}, ValueError, "task: expected None for a single prompt"),
    ):
        with pytest.raises(error, match=f"^{message}"):
            export_plain(prompt, tmp_path, **changes)
    with pytest.raises(ValueError, match=r"^prompt: expected one that has its offset"):
        export_plain(prompt.fold(offset="none"), tmp_path)
    prompt = tiny.make_prompt(fusion=False, num_spaces=0)  # its offset stays out of the prompt
    prompt.offset_b.data[0, 0] = 1e30
    with pytest.raises(ValueError, match=r"^offset: expected finite values to save"):
        export_plain(prompt, tmp_path, dtype=torch.float16)
    assert not any(tmp_path.iterdir())


# Prompts without an embedding layer


def test_a_prompt_without_a_layer(tmp_path: Path) -> None:
    model = tiny.tiny_llama()
    table = model.get_input_embeddings()
    ids, mask = text(3, 6)
    tiny.make_prompt().save_pretrained(tmp_path)
    prompt = FusedEPTPrompt.from_pretrained(tmp_path)
    assert prompt.embedding is None
    expected = FusedEPTPrompt.from_pretrained(tmp_path, table)(ids, attention_mask=mask)
    got = prompt(inputs_embeds=table(ids), attention_mask=mask)
    torch.testing.assert_close(got.inputs_embeds, expected.inputs_embeds)
    folded = prompt.fold()
    for each in (prompt, folded):
        message = r"^input_ids: expected inputs_embeds, .* \(set_input_embeddings gives it one\)"
        with pytest.raises(ValueError, match=message):
            each(ids, attention_mask=mask)
        with pytest.raises(ValueError, match=r"^embedding: expected width hidden_size 16, got 8"):
            each.set_input_embeddings(nn.Embedding(4, 8))
        each.set_input_embeddings(table)
        assert each.embedding is table
        assert torch.equal(each(ids, attention_mask=mask).inputs_embeds, expected.inputs_embeds)
    names = {name.partition(".")[0] for name in prompt.state_dict()}
    assert "embedding" not in names
    assert "_embedding" not in names


def test_what_a_prompt_without_a_layer_starts_from() -> None:
    config = EPTConfig(D, num_virtual_tokens=M, max_length=N, rank=R)
    for init in ("vocab", "random", "text"):
        with pytest.raises(ValueError, match=f"^init: expected a tensor .* got '{init}'$"):
            FusedEPTPrompt(config, init=init)
    with pytest.raises(ValueError, match=r"^init: expected at least .* = 5 rows"):
        FusedEPTPrompt(config, init=torch.zeros(M, D))
    prompt = FusedEPTPrompt(config, init=tiny.random(M + R, D))
    assert prompt(inputs_embeds=torch.zeros(1, 4, D)).inputs_embeds.shape == (1, M + 4, D)


def test_tensors_of_another_config() -> None:
    config = EPTConfig(D, num_virtual_tokens=M, rank=0, num_spaces=0)
    for tensors in ({}, {"short_prompt": torch.zeros(D, M)}, {"prompt": torch.zeros(M, D)}):
        with pytest.raises(ValueError, match=r"^tensors: expected the shapes {'short_prompt': "):
            FusedEPTPrompt.from_tensors(config, tensors)


# The public names


def test_public_names() -> None:
    for function in (import_dept, import_peft, import_plain, export_peft, export_plain):
        assert getattr(ept_fast, function.__name__) is function
        assert function.__name__ in ept_fast.__all__


def test_interchange_needs_neither_library(root: Path) -> None:
    probe = (
        "import sys, ept_fast; ept_fast.import_dept; "
        "print([n for n in ('peft', 'transformers', 'numpy.testing') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=root, capture_output=True, text=True, timeout=300
    )
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_the_example(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("plain", root / "examples/plain_embeddings.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        example.main(["--model", str(save_gpt2(tmp_path / "model")), "--out", str(tmp_path / "p")])
    out = capsys.readouterr().out
    difference = re.search(r"largest difference of the logits: (\S+)", out)
    assert difference is not None
    assert float(difference[1]) < 1e-4
    change = re.search(r"the prompt changed them by: (\S+)", out)
    assert change is not None
    assert float(change[1]) > 1e-2


def save_gpt2(folder: Path) -> Path:
    import transformers

    from tests.tiny import PLAIN

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *PLAIN]
    tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    tokenizer.save_pretrained(folder)
    config = transformers.GPT2Config(
        vocab_size=len(words), n_embd=D, n_layer=1, n_head=2, n_positions=64, bos_token_id=2
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder
