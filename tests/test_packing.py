"""Packed rows of causal models: what each text gets, and that none of them sees another."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ept_fast import EPTConfig, EPTModel, get_ept_model
from ept_fast.training.batches import Collator, PackedBatches, PackingCollator, first_fit
from ept_fast.training.tokens import Tokenised
from tests.architectures import BY_NAME, VOCABULARY, build, in_float64

pytest.importorskip("transformers")

from ept_fast.transformers import packing
from ept_fast.transformers.backbone import Profile

pytestmark = pytest.mark.usefixtures("one_thread")

M = 4  # virtual tokens
LENGTHS = (3, 6, 1, 5, 4, 2)
PACKS = ((1, 2, 5), (3, 4), (0,))  # rows of 9, 9 and 3 tokens


def wrap(backbone: Any, **sizes: Any) -> EPTModel:
    """A prompt whose every tensor is random, before a model in float64."""
    width = backbone.get_input_embeddings().weight.shape[-1]
    choices = {"num_virtual_tokens": M, "max_length": 16, "rank": 2, "num_spaces": 2, **sizes}
    config = EPTConfig(width, space_dim=2, **choices)
    model = get_ept_model(backbone, config, "CAUSAL_LM", dtype=torch.float64)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.prompt.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
    return model


def model_of(name: str, attention: str = "sdpa") -> EPTModel:
    backbone = build(name, "CAUSAL_LM", dtype=torch.float64)
    backbone.set_attn_implementation(attention)
    return wrap(backbone)


def segments(lengths: tuple[int, ...] = LENGTHS) -> list[dict[str, list[int]]]:
    """Texts of these lengths; the labels of most of their first halves are left out."""
    draw = torch.Generator().manual_seed(5)
    rows = []
    for index, length in enumerate(lengths):
        ids = torch.randint(3, VOCABULARY, (length,), generator=draw).tolist()
        skipped = length // 2 if index % 3 else 0
        rows.append({"input_ids": ids, "labels": [-100] * skipped + ids[skipped:]})
    return rows


def packed(packs: tuple[tuple[int, ...], ...] = PACKS) -> dict[str, Tensor]:
    rows = segments()
    return PackingCollator(Collator())([[rows[i] for i in pack] for pack in packs])


def alone(model: EPTModel, row: dict[str, list[int]]) -> tuple[Tensor, Tensor]:
    """By the definition, for one text in a row of its own: its logits and the sum of its losses."""
    spliced = model.splice(torch.tensor([row["input_ids"]]))
    logits = model.backbone(inputs_embeds=spliced.inputs_embeds).logits[0, M - 1 :]
    loss = F.cross_entropy(logits[:-1], torch.tensor(row["labels"]), reduction="sum")
    return logits[1:], loss


def gradients(model: EPTModel, loss: Tensor) -> dict[str, Tensor]:
    names, tensors = zip(*model.prompt.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, tensors), strict=True))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["Llama", "GPT-2", "OPT", "Gemma 3"])
def test_packed_rows_give_what_the_texts_give_alone(name: str, attention: str) -> None:
    if name == "Gemma 3":  # its windows are wider than the longest text, and narrower than a row
        backbone = BY_NAME[name].build("CAUSAL_LM", dtype=torch.float64, sliding_window=M + 6)
        backbone.set_attn_implementation(attention)
        model = wrap(backbone)
    else:
        model = model_of(name, attention)
    rows, batch = segments(), packed()
    with in_float64():
        output = model(**batch)
        single = [alone(model, row) for row in rows]
        count = sum(label != -100 for row in rows for label in row["labels"])
        expected = torch.stack([loss for _, loss in single]).sum() / count
        torch.testing.assert_close(output.loss, expected, rtol=1e-10, atol=0)
        found, wanted = gradients(model, output.loss), gradients(model, expected)
    assert len(wanted) == 7
    for key, gradient in wanted.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found[key], gradient, rtol=1e-8, atol=1e-10)
    for row, pack in enumerate(PACKS):
        logits = torch.cat([single[i][0] for i in pack])
        torch.testing.assert_close(output.logits[row, : len(logits)], logits, rtol=1e-8, atol=1e-9)


def test_packed_loss_is_that_of_the_padded_batch() -> None:
    model = model_of("Llama")
    batch = packed()
    whole = model(**batch)
    index = batch.pop("pack_index")
    with in_float64():
        padded = model(**batch)
        again = model(**batch, pack_index=index)
        parts = [
            model(**batch, pack_index=rows, num_items_in_batch=5.0).loss for rows in index.split(1)
        ]
    torch.testing.assert_close(again.loss, padded.loss, rtol=1e-10, atol=0)
    torch.testing.assert_close(whole.loss, padded.loss, rtol=1e-6, atol=0)
    count = (batch["labels"] != -100).sum()
    torch.testing.assert_close(sum(parts) * 5 / count, padded.loss, rtol=1e-10, atol=0)
    labels = batch.pop("labels")
    assert model(**batch, pack_index=index).loss is None
    assert bool(labels.ne(-100).any())


@pytest.mark.default_algorithms
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["Llama", "GPT-2", "OPT"])
def test_texts_of_a_row_do_not_see_each_other(name: str, attention: str) -> None:
    model = model_of(name, attention)
    batch = packed()
    index = batch["pack_index"]
    length = batch["input_ids"].shape[1]
    with torch.no_grad():
        before = model(**batch).logits
        for segment in range(len(LENGTHS)):
            ids = batch["input_ids"].clone()
            ids[segment, 0] = ids[segment, 0] % (VOCABULARY - 4) + 4
            after = model(**{**batch, "input_ids": ids}).logits
            own = (index >= 0) & (index // length == segment)
            assert not torch.equal(after[own], before[own])
            others = (index >= 0) & ~own
            assert torch.equal(after[others], before[others])


def test_no_gradient_from_one_text_to_another() -> None:
    model = model_of("Llama")
    batch = packed()
    seen: list[Tensor] = []

    def keep(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        kwargs["inputs_embeds"].retain_grad()
        seen.append(kwargs["inputs_embeds"])

    handle = model.backbone.register_forward_pre_hook(keep, with_kwargs=True)
    logits = model(**batch).logits
    handle.remove()
    length = batch["input_ids"].shape[1]
    own = (batch["pack_index"] >= 0) & (batch["pack_index"] // length == 1)
    logits[own].square().sum().backward()
    gradient = seen[0].grad
    assert gradient is not None
    assert not gradient[:, M:][~own].any()
    assert bool(gradient[:, M:][own].all(-1).all())
    assert not gradient[1:].any()  # rows without the text
    assert bool(gradient[0, :M].any(-1).all())  # the prompt before it


@pytest.mark.parametrize("name", ["Llama", "OPT"])
def test_packing_saves_positions_and_memory(name: str) -> None:
    """Bytes kept for the backward pass: those of R(m + W) positions in place of N(m + S)."""
    rows = segments((9, 2, 3, 4, 2, 3, 2, 2))
    packs = [[rows[0]], rows[1:4], rows[4:]]
    model = model_of(name)

    def kept(batch: dict[str, Tensor]) -> int:
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(**batch).loss
        del loss
        return sum(storages.values()) - parameters

    parameters = sum(p.untyped_storage().nbytes() for p in model.parameters())
    positions = (3 * (M + 9), 8 * (M + 9))
    ratio = kept(PackingCollator(Collator())(packs)) / kept(Collator()(rows))
    assert 0 < ratio < 1.1 * positions[0] / positions[1]


def test_gradient_checkpointing_and_autocast_in_packed_rows() -> None:
    model = model_of("Llama")
    batch = packed()
    plain = gradients(model, model(**batch).loss)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for key, gradient in gradients(model, model(**batch).loss).items():
        torch.testing.assert_close(gradient, plain[key])
    for attention in ("sdpa", "eager"):
        backbone = build("Llama", "CAUSAL_LM")
        backbone.set_attn_implementation(attention)
        single = wrap(backbone)
        exact = single(**batch).loss
        with torch.autocast("cpu", torch.bfloat16):
            rounded = single(**batch).loss
        assert rounded.dtype == torch.float32
        torch.testing.assert_close(rounded, exact, rtol=0.03, atol=0)


# Dynamo makes an object of the Function in order to look at it.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_packed_rows_in_one_graph() -> None:
    model = model_of("Llama")
    batch = packed()
    plain = gradients(model, model(**batch).loss)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for key, gradient in gradients(model, compiled(**batch).loss).items():
        torch.testing.assert_close(gradient, plain[key])
    window = torch.compile(model_of("Mistral"), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="pack_index: expected a window of at least 10 positions"):
        window(**batch)


def test_folded_prompt_and_rows_without_padding() -> None:
    model = model_of("GPT-2")
    batch = packed(((1,), (1,), (1,)))
    assert bool((batch["pack_index"] >= 0).all())
    loss = model(**batch).loss
    model.fold()
    assert torch.equal(model(**batch).loss, loss)


REFUSED = {
    "no position ids": ("BLOOM", {}, "expected a model that takes position_ids"),
    "window of 5": ("Mistral", {}, r"expected a window of at least 10 positions, got 5 "),
    "windows in some layers": ("Gemma 3", {}, "expected a window of at least 10 positions, got 5"),
    "flash attention": (
        "Llama",
        {"_attn_implementation": "flash_attention_2"},
        "expected attention by one of eager, sdpa, got 'flash_attention_2'",
    ),
    "distances": ("Llama", {"alibi": True}, "expected positions by position_ids alone"),
    "recurrent layers": (
        "Llama",
        {"layer_types": ["full_attention", "linear_attention"]},
        "expected attention in every layer, got linear_attention",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_cannot_be_packed_are_refused(case: str) -> None:
    name, changes, message = REFUSED[case]
    backbone = build(name, "CAUSAL_LM", dtype=torch.float64)
    for field, value in changes.items():
        setattr(backbone.config, field, value)
    model = wrap(backbone)
    with pytest.raises(ValueError, match=rf"^pack_index: {message}"):
        model(**packed())


def test_a_model_with_masks_of_its_own_is_refused() -> None:
    import transformers

    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 32}
    gpt = transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**sizes))
    with pytest.raises(ValueError, match="expected a model whose attention takes any mask"):
        packing.check_packing(gpt, Profile.of(gpt), 10)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"pack_index": torch.zeros(2, 3)}, TypeError, "pack_index: expected dtype int64"),
        ({"pack_index": torch.zeros(3, dtype=torch.int64)}, ValueError, r"expected shape \[R, W\]"),
        ({"labels": torch.zeros(6, 2)}, ValueError, r"labels: expected shape \[6, 6\]"),
        ({"task_ids": torch.zeros(6)}, ValueError, "task_ids: expected None beside pack_index"),
        ({"position_ids": torch.zeros(6, 6)}, ValueError, "position_ids: expected None"),
        (
            {"input_ids": None, "inputs_embeds": torch.zeros(6, 6, 32)},
            ValueError,
            "input_ids: expected ids for packed rows, got inputs_embeds",
        ),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        model_of("Llama")(**{**packed(), **changes})


# The packer -----------------------------------------------------------------------------------


def test_first_fit() -> None:
    assert first_fit([5, 4, 3, 3, 2, 1], 8) == [[0, 2], [1, 3, 5], [4]]
    assert first_fit([], 8) == []
    assert first_fit([8, 8], 8) == [[0], [1]]


def test_pack_index_lays_the_texts_side_by_side() -> None:
    batch = packed(((1, 2), (0,)))
    assert batch["pack_index"].tolist() == [[0, 1, 2, 3, 4, 5, 6], [12, 13, 14, -1, -1, -1, -1]]
    ids = batch["input_ids"].flatten()[batch["pack_index"][0]].tolist()
    rows = segments()
    assert ids == rows[1]["input_ids"] + rows[2]["input_ids"]
    assert batch["attention_mask"].sum(1).tolist() == [6, 1, 3]


@pytest.mark.parametrize("count", [1, 5, 103])
def test_every_epoch_packs_every_text_once(count: int) -> None:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 40, (count,), generator=draw).tolist()
    batches = PackedBatches(lengths, 2, 10_000, seed=5, budget=64)
    epoch = batches.steps_of(1.0)
    found = [batch for _, batch in zip(range(2 * epoch), batches, strict=False)]
    first = sorted(i for batch in found[:epoch] for pack in batch for i in pack)
    assert first == list(range(count))
    assert all(sum(lengths[i] for i in pack) <= 64 for batch in found for pack in batch)
    assert all(1 <= len(batch) <= 2 for batch in found)
    again = PackedBatches(lengths, 2, 10_000, seed=5, budget=64)
    assert found == [batch for _, batch in zip(range(2 * epoch), again, strict=False)]
    if count > 8:
        other = PackedBatches(lengths, 2, 2 * epoch, seed=6, budget=64)
        assert found != list(other)
        assert found[:epoch] != found[epoch:]
        least = math.ceil(sum(lengths) / 64)
        assert sum(len(batch) for batch in found[:epoch]) <= 1.25 * least


def test_collator_takes_the_packed_rows_of_a_split() -> None:
    rows = Tokenised(tuple(segments()), None, 0)
    lengths = rows.lengths
    pack = next(iter(PackedBatches(lengths, 8, 1, seed=0, budget=12)))
    batch = PackingCollator(Collator())([rows[i] for i in pack])
    assert int((batch["pack_index"] >= 0).sum()) == sum(lengths)
    assert batch["pack_index"].shape == (len(pack), max(sum(lengths[i] for i in p) for p in pack))


def test_packing_errors() -> None:
    with pytest.raises(ValueError, match="pack_length: expected at least the longest row's 9 tok"):
        PackedBatches([3, 9], 1, 1, seed=0, budget=8)
    with pytest.raises(ValueError, match="gradient_accumulation_steps: expected at least a packed"):
        PackedBatches([3, 4], 1, 1, seed=0, budget=8, parts=2)
    with pytest.raises(ValueError, match=r"epochs: expected at most 1000 with packing.*got 1e\+18"):
        PackedBatches([3, 4], 1, 1, seed=0, budget=8).steps_of(1e18)
