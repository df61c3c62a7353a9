"""``offset_tokens="given"``: what is learnt or generated has no offset, as on a server of prompts.

Compared with METHOD's equations over the given tokens alone, one row at a time and without padding,
and with ``generate`` of an untouched model of transformers that is handed P′ and the text with its
offsets as embeddings.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import Tensor

from ept_fast import EPTBank, EPTConfig, EPTModel, get_ept_model, reference
from ept_fast.cli import main
from ept_fast.training.batches import Collator, PackingCollator
from ept_fast.training.config import TrainConfig
from ept_fast.transformers.padding import before_labels
from tests.architectures import BY_NAME, VOCABULARY, build, in_float64
from tests.decoding import (
    EXACT,
    GREEDY,
    LOGITS,
    NEW,
    PLACES,
    N,
    Trial,
    defined,
    embeddings,
    make_trial,
    pad,
)
from tests.tiny import answer_rows, options, save_llama, save_task, small_run

pytestmark = pytest.mark.usefixtures("one_thread")

GIVEN = {"offset_tokens": "given"}
# Tokens of each row, and how many of them stand before its first label.
ROWS = ((6, 3), (4, 0), (7, 7), (5, 4))
# A plain table; one that scales; windows, before which padding goes to the right; a column table.
MODELS = ("Llama", "Gemma 3", "Mistral", "GPT-2")


def model_of(name: str, **choices: Any) -> EPTModel:
    """A prompt whose every tensor is random, before a model in float64."""
    backbone = build(name, "CAUSAL_LM", dtype=torch.float64)
    sizes = {"num_virtual_tokens": 3, "max_length": 12, "rank": 2, "num_spaces": 2}
    config = EPTConfig(BY_NAME[name].width, space_dim=2, **{**sizes, **GIVEN, **choices})
    draw = torch.Generator().manual_seed(3)
    model = get_ept_model(backbone, config, "CAUSAL_LM", generator=draw, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.prompt.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
    return model


def texts() -> list[tuple[Tensor, Tensor]]:
    """Ids and labels of each row; behind the first label one is left out, as of a second turn."""
    draw, rows = torch.Generator().manual_seed(5), []
    for length, given in ROWS:
        ids = torch.randint(3, VOCABULARY, (length,), generator=draw)
        labels = ids.clone()
        labels[:given] = -100
        labels[given + 1 : given + 2] = -100
        rows.append((ids, labels))
    return rows


def batch_of(place: str) -> dict[str, Tensor]:
    """The rows padded in this way; the padding has labels too, which count for nothing."""
    rows = texts()
    batch = pad([ids for ids, _ in rows], place)
    batch["labels"] = torch.full_like(batch["input_ids"], 7)
    for row, (_, labels) in enumerate(rows):
        batch["labels"][row, batch["attention_mask"][row] == 1] = labels
    return batch


def by_definition(model: EPTModel, ids: Tensor, given: int) -> Tensor:
    """The logits ``[1 + L, V]`` behind P′, offsets for the first ``given`` tokens only."""
    c: Any = model.prompt.config
    tensors = dict(model.prompt.named_parameters())
    head = reference.reconstruct_prompt(**tensors, scaling=c.scaling, fusion=c.fusion)
    table = c.scaling * tensors["offset_a"] @ tensors["offset_b"]
    text = model.backbone.get_input_embeddings()(ids)
    text = torch.cat([text[:given] + table[:given], text[given:]])
    logits: Tensor = model.backbone(inputs_embeds=torch.cat([head, text]).unsqueeze(0)).logits
    return logits[0, c.num_virtual_tokens - 1 :]


def loss_by_definition(model: EPTModel) -> tuple[Tensor, list[Tensor]]:
    """The mean over the labels of all rows, and each row's logits ``[L, V]``."""
    losses, logits, count = [], [], 0
    for (ids, labels), (_, given) in zip(texts(), ROWS, strict=True):
        found = by_definition(model, ids, given)
        losses.append(F.cross_entropy(found[:-1], labels, reduction="sum"))
        logits.append(found[1:])
        count += int((labels != -100).sum())
    return torch.stack(losses).sum() / count, logits


def gradients(model: EPTModel, loss: Tensor) -> dict[str, Tensor]:
    names, tensors = zip(*model.prompt.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, tensors), strict=True))


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-10)


# Training


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_definition(name: str, place: str) -> None:
    model, batch = model_of(name), batch_of(place)
    with in_float64():
        output = model(**batch)
        expected, logits = loss_by_definition(model)
        torch.testing.assert_close(output.loss, expected, rtol=1e-10, atol=0)
        assert_same(gradients(model, output.loss), gradients(model, expected))
    for row, wanted in enumerate(logits):
        real = batch["attention_mask"][row] == 1
        torch.testing.assert_close(output.logits[row, real], wanted, **EXACT)


def test_offsets_are_learnt_from_given_tokens_alone() -> None:
    """Without fusion nothing else reads them: rows of A behind the longest given text get none."""
    model = model_of("Llama", fusion=False)
    batch = batch_of("left")
    found = gradients(model, model(**batch).loss)["offset_a"]
    assert found[:4].abs().amin() > 0
    assert not found[4:].any()  # the seven given tokens of the row without labels are in no loss
    everything = model_of("Llama", fusion=False, offset_tokens="all")
    assert gradients(everything, everything(**batch).loss)["offset_a"][4].abs().amin() > 0


def test_only_labels_end_the_given_text() -> None:
    """Without them all of it is given; with ``"all"`` or without an offset they change nothing."""
    model, everything = model_of("Llama"), model_of("Llama", offset_tokens="all")
    batch = batch_of("right")
    labels = batch.pop("labels")
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, everything(**batch).logits)
        got = everything(**batch, labels=labels).logits
        assert torch.equal(got, everything(**batch).logits)
        assert not torch.allclose(model(**batch, labels=labels).logits, got)
        none = torch.full_like(labels, -100)
        given = model(**batch, labels=none).logits
        torch.testing.assert_close(given, got, **EXACT)
        tuned = model_of("Llama", rank=0)
        assert torch.equal(tuned(**batch, labels=labels).logits, tuned(**batch).logits)


@pytest.mark.parametrize("name", ["Llama", "Gemma 3"])
def test_embeddings_in_place_of_ids(name: str) -> None:
    model, batch = model_of(name), batch_of("both")
    expected = model(**batch).loss
    embeds = model.backbone.get_input_embeddings()(batch.pop("input_ids"))
    torch.testing.assert_close(model(inputs_embeds=embeds, **batch).loss, expected)


def test_masks_of_every_type() -> None:
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 1], [1, 1, 1, 0]])
    labels = torch.tensor([[5, -100, 6, -100], [-100, -100, 5, 6], [-100, -100, -100, 5]])
    expected = torch.tensor([[0, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]])
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.bool):
        assert torch.equal(before_labels(mask.to(dtype), labels), expected.to(dtype))


@pytest.mark.parametrize("offset", ["low_rank", "table"])
def test_folded(offset: str) -> None:
    model, batch = model_of("Llama").eval(), batch_of("left")
    expected = model(**batch)
    model.fold(offset=offset)
    torch.testing.assert_close(model(**batch).loss, expected.loss)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows(attention: str) -> None:
    """Two rows of two segments each, whose offsets end at labels of their own."""
    model = model_of("Llama")
    model.backbone.set_attn_implementation(attention)
    rows = [{"input_ids": i.tolist(), "labels": y.tolist()} for i, y in texts()]
    batch = PackingCollator(Collator())([rows[:2], rows[2:]])
    with in_float64():
        found = model(**batch)
        expected, logits = loss_by_definition(model)
        torch.testing.assert_close(found.loss, expected, rtol=1e-10, atol=0)
        assert_same(gradients(model, found.loss), gradients(model, expected))
    torch.testing.assert_close(found.logits[0, : 6 + 4], torch.cat(logits[:2]), **EXACT)


def test_log_probabilities_of_a_fused_head() -> None:
    """The backbone is a stand-in for what TRL patches: it gives the logits' log-probabilities."""
    model, batch = model_of("Llama"), batch_of("left")
    plain = model(**batch)
    forward = model.backbone.forward

    def fused(shift_labels: Tensor, fused_lm_head: bool, **inputs: Any) -> Any:
        at = shift_labels.clamp_min(0).unsqueeze(-1)
        log_probs = forward(**inputs).logits.log_softmax(-1).gather(2, at).squeeze(2)
        return {"log_probs": log_probs}

    model.backbone.forward = fused
    got = model(**batch, fused_lm_head=True)["log_probs"]
    labelled = (batch["labels"] != -100) & (batch["attention_mask"] == 1)
    torch.testing.assert_close(-got[labelled].mean(), plain.loss, rtol=1e-6, atol=0)


# Dynamo makes an object of the Function in order to look at it.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_labels_in_one_graph() -> None:
    model = model_of("Llama")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for place in ("left", "right"):
        batch = batch_of(place)
        found = gradients(model, compiled(**batch).loss)
        assert_same(found, gradients(model, model(**batch).loss))
    torch._dynamo.reset()


# Generation


@torch.no_grad()
def served(made: Trial, ids: Tensor, **choices: Any) -> list[list[int]]:
    """The new tokens of transformers' own ``generate``, which is given embeddings."""
    rows = embeddings(made, ids)
    mask = torch.ones(rows.shape[:2], dtype=torch.int64)
    found = made.plain.generate(inputs_embeds=rows, attention_mask=mask, **choices)
    return [answer.tolist() for answer in found]


@pytest.mark.parametrize("choices", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("name", MODELS)
def test_generates_what_a_server_without_offsets_does(name: str, choices: dict[str, Any]) -> None:
    made = make_trial(name, **GIVEN)
    longest = max(map(len, made.rows)) + 1
    with in_float64():
        wanted = [served(made, row, **GREEDY, **choices)[0] for row in made.rows]
        for place in ("left", "right"):
            got = made.model.generate(**pad(made.rows, place), **GREEDY, **choices)
            assert got[:, longest:].tolist() == wanted
        made.model.fold(offset="table")
        got = made.model.generate(**pad(made.rows), **GREEDY, **choices)
        assert got[:, longest:].tolist() == wanted


def test_generated_tokens_of_all_have_offsets() -> None:
    """So the test above fails if the option is not looked at."""
    made, every = make_trial("Llama", **GIVEN), make_trial("Llama")
    with in_float64():
        for row in made.rows[:1]:
            tokens, logits = defined(made, row, covered=len(row))
            output = made.model.generate(row.unsqueeze(0), **LOGITS)
            torch.testing.assert_close(torch.stack(output.logits, 1)[0], logits, **EXACT)
            assert served(made, row, **GREEDY) == [tokens.tolist()]
            other = every.model.generate(row.unsqueeze(0), **LOGITS)
        assert torch.equal(other.logits[0], output.logits[0])
        assert not torch.allclose(other.logits[1], output.logits[1])


def test_training_sees_what_generation_does() -> None:
    made = make_trial("Llama", **GIVEN)
    row = made.rows[0].unsqueeze(0)
    with in_float64(), torch.no_grad():
        output = made.model.generate(row, **{**LOGITS, "max_new_tokens": N - row.shape[1]})
        labels = output.sequences.clone()
        labels[:, : row.shape[1]] = -100
        logits = made.model(output.sequences, labels=labels).logits[:, row.shape[1] - 1 : -1]
    torch.testing.assert_close(logits, torch.stack(output.logits, 1), **EXACT)


def test_behind_cached_keys_and_values() -> None:
    made = make_trial("Llama", **GIVEN)
    row = made.rows[0]
    with in_float64():
        (wanted,) = served(made, row, **GREEDY)
        prefix = made.model.prefix_cache()
        got = made.model.generate(row.unsqueeze(0), prefix=prefix, **GREEDY)
    assert got[0, len(row) :].tolist() == wanted


# A bank


@pytest.mark.parametrize("offset", ["low_rank", "table"])
def test_adapters_of_both_kinds_in_one_bank(offset: str) -> None:
    alone = {kind: make_trial("Llama", offset_tokens=kind) for kind in ("all", "given")}
    rows = [*alone["all"].rows, alone["all"].rows[0]]
    kinds = ["given", "all", "given", "all"]
    sizes = {"num_virtual_tokens": 3, "max_length": N, "rank": 4, "capacity": 3}
    backbone = copy.deepcopy(alone["all"].plain)
    bank = EPTBank(backbone, "CAUSAL_LM", dtype=torch.float64, offset=offset, **sizes)
    for kind, made in alone.items():
        bank.add(kind, made.model)

    def check(kinds: list[str], tasks: list[str], **choices: Any) -> None:
        batch = pad(rows)
        got = bank.generate(**batch, tasks=tasks, **GREEDY, **choices)
        new = got.shape[1] - batch["input_ids"].shape[1]
        assert new == NEW
        for number, (kind, row) in enumerate(zip(kinds, rows, strict=True)):
            wanted = alone[kind].model.generate(row.unsqueeze(0), **GREEDY, **choices)
            assert got[number, -new:].tolist() == wanted[0, len(row) :].tolist(), number

    with in_float64():
        check(kinds, kinds)
        check(kinds, kinds, num_beams=2)
        bank.replace("given", alone["all"].model)
        check(["all"] * 4, kinds)
        bank.remove("all")
        bank.add("third", alone["given"].model)
        check(["all", "given", "all", "given"], ["given", "third", "given", "third"])
        # The two kinds differ here, or all of this says nothing.
        first = [alone[k].model.generate(rows[0].unsqueeze(0), **GREEDY).tolist() for k in alone]
    assert first[0] != first[1]


# Files and settings


def test_saved_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("Llama")
    model.save_pretrained(tmp_path / "given")
    assert json.loads((tmp_path / "given/ept_config.json").read_text())["offset_tokens"] == "given"
    loaded = EPTModel.from_pretrained(tmp_path / "given", build("Llama", "CAUSAL_LM"))
    assert loaded.prompt.config == model.prompt.config
    # A file of before there was the field.
    fields = EPTConfig.to_dict
    with monkeypatch.context() as patch:
        old = {"offset_tokens"}
        patch.setattr(
            EPTConfig, "to_dict", lambda c: {k: v for k, v in fields(c).items() if k not in old}
        )
        model.save_pretrained(tmp_path / "old")
    assert "offset_tokens" not in (tmp_path / "old/ept_config.json").read_text()
    loaded = EPTModel.from_pretrained(tmp_path / "old", build("Llama", "CAUSAL_LM"))
    assert loaded.prompt.config == dataclasses.replace(model.prompt.config, offset_tokens="all")


def test_from_the_command_line(tmp_path: Path) -> None:
    llama = save_llama(tmp_path / "llama", steps=1)
    data = save_task(tmp_path / "data", answer_rows)
    how = {"task": "causal", "max_target_length": 8, "max_steps": 2, "eval_steps": 2}
    settings = small_run(llama, data, tmp_path / "run", **how, eval_generate=2)
    words = [*options(settings), "--offset-tokens", "given", "--quiet"]
    result = CliRunner().invoke(main, ["train", *words])
    assert result.exit_code == 0, result.output
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["prompt"]["offset_tokens"] == metrics["config"]["offset_tokens"] == "given"
    config = json.loads((tmp_path / "run/adapter/ept_config.json").read_text())
    assert config["offset_tokens"] == "given"
    result = CliRunner().invoke(main, ["train", *options(settings), "--offset-tokens", "new"])
    assert result.exit_code == 2
    assert "'new' is not one of 'all', 'given'" in result.stderr
    texts = tmp_path / "texts.txt"  # without targets
    texts.write_text("the play was fine\na dull walk\n" * 8)
    settings |= {"data": str(texts), "output": str(tmp_path / "other"), "eval_generate": 0}
    result = CliRunner().invoke(main, ["train", *options(settings), "--offset-tokens", "given"])
    assert result.exit_code == 2
    assert "offset_tokens: expected all for rows without targets" in result.stderr
    # A plain prompt has no offset that it could matter for.
    words = [*options(settings | {"method": "pt"}), "--offset-tokens", "given", "--quiet"]
    result = CliRunner().invoke(main, ["train", *words])
    assert result.exit_code == 0, result.output


def test_runs_that_it_means_nothing_for() -> None:
    settings: dict[str, Any] = {"model": "m", "data": "d", "output": "o", **GIVEN}
    causal = TrainConfig(**settings, task="causal")
    assert causal.prompt_config(64).offset_tokens == "given"
    plain = TrainConfig(**settings, task="causal", method="pt").prompt_config(64)
    assert (plain.rank, plain.offset_tokens) == (0, "given")
    for task in ("classification", "seq2seq"):
        with pytest.raises(ValueError, match=f"offset_tokens: expected all for the task {task}"):
            TrainConfig(**settings, task=task)
    with pytest.raises(ValueError, match="offset_tokens: expected all, as the method accept has"):
        TrainConfig(**settings, task="causal", method="accept")
    with pytest.raises(ValueError, match="offset_tokens: expected one of all, given, got 'new'"):
        TrainConfig(**{**settings, "task": "causal", "offset_tokens": "new"})
    assert TrainConfig(**{**settings, "offset_tokens": "all"}, method="accept")
