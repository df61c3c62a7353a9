"""A prompt's keys and values computed once: the same logits and tokens as computing them anew."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import StaticCache

from ept_fast import EPTBank, EPTConfig
from ept_fast.transformers.backbone import cache_of
from ept_fast.transformers.packing import check_packing
from ept_fast.transformers.prefix_cache import PrefixCache
from ept_fast.transformers.tasks import get_ept_model
from tests.architectures import BY_NAME, VOCABULARY, in_float64, names
from tests.decoding import (
    EXACT,
    GREEDY,
    LENGTHS,
    LOGITS,
    NEW,
    M,
    Trial,
    assert_greedy,
    greedy,
    make_trial,
    pad,
    trial,
)
from tests.support import marks

pytestmark = pytest.mark.usefixtures("one_thread")

FURTHER = ("Gemma", "Phi-3", "GPT-J", "Falcon, ALiBi")
DECODERS = [
    pytest.param(n, marks=marks(n, "prefix_cache")) for n in (*names("CAUSAL_LM"), *FURTHER)
]


@pytest.fixture(autouse=True)
def _doubles() -> Iterator[None]:
    with in_float64():
        yield


@contextmanager
def fed(model: Any) -> Iterator[list[tuple[int, ...]]]:
    """Rows and columns of each of the backbone's calls."""
    shapes: list[tuple[int, ...]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        shapes.append(tuple(kwargs["inputs_embeds"].shape[:2]))

    handle = model.backbone.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield shapes
    finally:
        handle.remove()


def batches(made: Trial, places: tuple[str, ...]) -> Iterator[tuple[dict[str, Tensor], list[int]]]:
    """The rows padded in these ways, where the model takes that, and each by itself."""
    width = M + max(LENGTHS) + 1 + NEW
    if width <= made.model.profile.column_free_length:
        for place in places:
            yield pad(made.rows, place), list(range(len(made.rows)))
    for number, row in enumerate(made.rows):
        yield pad([row], extra=0), [number]


@pytest.mark.parametrize("name", DECODERS)
def test_generation(name: str) -> None:
    """One prefix for all calls; a first step reads the text alone."""
    made, (tokens, logits) = trial(name), greedy(name)
    prefix = made.model.prefix_cache()
    tensors = [t for layer in prefix.layers for t in layer]
    before = [t.clone() for t in tensors]
    for batch, numbers in batches(made, ("left", "right", "holes")):
        with fed(made.model) as shapes:
            output = made.model.generate(**batch, **LOGITS, prefix=prefix)
        assert_greedy(output, batch["input_ids"], (tokens[numbers], logits[numbers]))
        assert shapes == [tuple(batch["input_ids"].shape)] + [(len(numbers), 1)] * (NEW - 1)
    assert all(t.equal(b) for t, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("name", DECODERS)
def test_forward(name: str) -> None:
    """Padded in any way, for any model: nothing stands between a row's prompt and its text."""
    made = trial(name)
    prefix = made.model.prefix_cache()
    for place in ("left", "right", "both", "holes"):
        batch = pad(made.rows, place)
        real = batch["attention_mask"].bool()
        expected = made.model(**batch)
        with fed(made.model) as shapes:
            output = made.model(**batch, prefix=prefix)
        assert shapes == [tuple(real.shape)]
        assert output.logits.shape == expected.logits.shape
        torch.testing.assert_close(output.logits[real], expected.logits[real], **EXACT)
        assert not output.logits.requires_grad
        for kept, columns in ((2, [-2, -1]), (torch.tensor([1, 0]), [1, 0])):
            few = made.model(**batch, prefix=prefix, logits_to_keep=kept).logits
            torch.testing.assert_close(few, output.logits[:, columns], **EXACT)


def test_goes_on_after_a_forward() -> None:
    """The cache that comes out holds prompt and text."""
    made, (tokens, logits) = trial("Llama"), greedy("Llama")
    prefix = made.model.prefix_cache()
    row = made.rows[0].unsqueeze(0)
    output = made.model(row, prefix=prefix)
    first = output.logits[:, -1:].argmax(-1)
    choices = {**LOGITS, "max_new_tokens": NEW - 1}
    ids = torch.cat([row, first], 1)
    later = made.model.generate(ids, **choices, cache=cache_of(output))
    assert_greedy(later, ids, (tokens[:1, 1:], logits[:1, 1:]))


CHOICES: dict[str, dict[str, Any]] = {
    "static": {**LOGITS, "cache_implementation": "static"},
    "beams": {**GREEDY, "num_beams": 3, "num_return_sequences": 2},
    "samples": {**GREEDY, "do_sample": True, "num_return_sequences": 3},
}


@pytest.mark.parametrize("kind", CHOICES)
@pytest.mark.parametrize("name", ["Llama", "GPT-2", "OPT"])
def test_other_ways_to_generate(name: str, kind: str) -> None:
    made, batch = trial(name), pad(trial(name).rows)
    prefix, outputs = made.model.prefix_cache(), []
    for choices in ({}, {"prefix": prefix}):
        torch.manual_seed(3)
        choices |= {"return_dict_in_generate": True, "output_logits": True}
        outputs.append(made.model.generate(**batch, **{**CHOICES[kind], **choices}))
    expected, output = outputs
    assert output.sequences.equal(expected.sequences)
    for mine, theirs in zip(output.logits, expected.logits, strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)
    if kind == "static":
        assert isinstance(cache_of(output), StaticCache)


def test_folded_and_half_precision() -> None:
    made = make_trial("Llama", torch.bfloat16)
    batch = pad(made.rows)
    prefix = made.model.prefix_cache()
    assert {t.dtype for layer in prefix.layers for t in layer} == {torch.bfloat16}
    # 2 layers, keys and values, 2 heads of width 8, 2 bytes.
    assert prefix.nbytes == 2 * 2 * 2 * M * 8 * 2
    expected = made.model(**batch, prefix=prefix).logits
    made.model.fold()
    assert made.model(**batch, prefix=prefix).logits.equal(expected)
    assert made.model(**batch, prefix=made.model.prefix_cache()).logits.equal(expected)


def test_prompt_that_changed() -> None:
    """A stale prefix is refused, never used, and brought up to date on request."""
    made = make_trial("GPT-2")
    model, batch = made.model, pad(made.rows)
    prefix = model.prefix_cache()
    with torch.no_grad():
        model.prompt.short_prompt += 1
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"prefix: expected the cache of the prompt as it is"):
            call(**batch, prefix=prefix)
    real = batch["attention_mask"].bool()
    prefix.update()
    expected = model(**batch).logits[real]
    torch.testing.assert_close(model(**batch, prefix=prefix).logits[real], expected, **EXACT)
    with fed(model) as shapes:
        prefix.update()
    assert not shapes

    model.add_adapter("other", model.prompt.config)
    model.set_adapter("other")
    for call in (prefix.update, lambda: model(**batch, prefix=prefix)):
        with pytest.raises(ValueError, match="prefix: expected the cache of the active adapter"):
            call()
    with pytest.raises(ValueError, match="prefix: expected the cache of the active adapter"):
        make_trial("GPT-2").model(**batch, prefix=prefix)


def test_what_is_refused() -> None:
    made = trial("Llama")
    model, batch = made.model, pad(made.rows)
    prefix = model.prefix_cache()
    bad: list[tuple[dict[str, Any], str]] = [
        ({"labels": batch["input_ids"]}, "labels: expected None beside prefix"),
        ({"pack_index": torch.zeros(1, 2, dtype=torch.int64)}, "pack_index: expected None beside"),
    ]
    for choices, message in bad:
        with pytest.raises(ValueError, match=message):
            model(**batch, **choices, prefix=prefix)
    cache = cache_of(model(**batch, prefix=prefix))
    empty = {**batch, "attention_mask": batch["attention_mask"].clone()}
    empty["attention_mask"][1] = 0
    bad = [
        ({"past_key_values": cache}, "past_key_values: expected None beside prefix"),
        ({"use_cache": False}, "use_cache: expected True beside prefix, got False"),
        (empty, "input_ids: expected a token in every row beside prefix"),
    ]
    for choices, message in bad:
        with pytest.raises(ValueError, match=message):
            model.generate(**{**batch, **GREEDY, **choices}, prefix=prefix)


def test_layers_that_are_recomputed() -> None:
    """They keep nothing in training mode."""
    model, batch = make_trial("Llama").model, pad(trial("Llama").rows)
    prefix = model.prefix_cache()
    model.gradient_checkpointing_enable()
    model.train()
    for call in (model.prefix_cache, lambda: model(**batch, prefix=prefix)):
        with pytest.raises(ValueError, match=r"model: expected evaluation mode"):
            call()


def test_in_inference_mode() -> None:
    model, batch = make_trial("Llama").model, pad(trial("Llama").rows)
    expected = model(**batch).logits[:, -1]
    with torch.inference_mode():
        prefix = model.prefix_cache()
    torch.testing.assert_close(model(**batch, prefix=prefix).logits[:, -1], expected, **EXACT)
    with torch.no_grad():
        model.prompt.short_prompt += 1
    prefix.update()


def make_composite() -> Any:
    """A model that also sees, whose text's windows stand in a part of its config."""
    text = BY_NAME["Gemma 3"].config().to_dict() | {"use_bidirectional_attention": False}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=60
    )
    torch.manual_seed(3)
    return transformers.Gemma3ForConditionalGeneration(config).double()


def test_composite_config() -> None:
    """Windows are found where they are, so left padding is moved and none is put in between."""
    made = make_trial("Gemma 3", model=make_composite())
    model = made.model
    assert model.profile.column_free_length == 5
    left, right = pad(made.rows, "left", 0), pad(made.rows, "right", 0)
    expected = model(**right).logits[right["attention_mask"] == 1]
    prefix = model.prefix_cache()
    for more in ({}, {"prefix": prefix}):
        got = model(**left, **more).logits[left["attention_mask"] == 1]
        torch.testing.assert_close(got, expected, **EXACT)
    with pytest.raises(ValueError, match="attention_mask: expected rows of one length behind"):
        model.generate(**left, **GREEDY, prefix=prefix)
    with pytest.raises(ValueError, match="pack_index: expected a window of at least"):
        check_packing(model.backbone, model.profile, 8)
    bare = transformers.Gemma3Model(model.config)
    sizes = {"num_virtual_tokens": 2, "max_length": 8, "rank": 1}
    get_ept_model(bare, EPTConfig(32, **sizes), "SEQ_CLS", labels=["a", "b"])


@pytest.mark.parametrize("name", ["Mistral", "BLOOM"])
def test_padding_between_prompt_and_text(name: str) -> None:
    """Refused where the model would see it: in windows, and without position ids."""
    made = trial(name)
    prefix = made.model.prefix_cache()
    with pytest.raises(
        ValueError, match="attention_mask: expected rows of one length behind a prompt"
    ):
        made.model.generate(**pad(made.rows), **GREEDY, prefix=prefix)


REASON = "a layer keeps a state in place of keys and values"
REFUSED = [
    pytest.param(
        name,
        marks=pytest.mark.support(row=name, column="prefix_cache", state="refused", reason=REASON),
    )
    for name in ("Mamba", "LFM2")
]


@pytest.mark.parametrize("name", REFUSED)
def test_layers_that_keep_something_else(name: str) -> None:
    made = make_trial(name)
    with pytest.raises(ValueError, match=r"model: expected attention in every layer and a forward"):
        made.model.prefix_cache()


# A bank

SIZES = {"short": (2, 20, 3), "long": (4, 24, 2), "plain": (5, 8, 0)}
TASKS = ("short", "long", "plain", "long", "short")


def make_bank(name: str) -> tuple[EPTBank, list[Any]]:
    """A bank of three tasks with room for a fourth, and prompts of them."""
    from ept_fast import FusedEPTPrompt

    backbone = BY_NAME[name].build("CAUSAL_LM", dtype=torch.float64)
    sizes = {"num_virtual_tokens": 5, "max_length": 24, "rank": 3}
    bank = EPTBank(backbone, "CAUSAL_LM", capacity=4, dtype=torch.float64, **sizes)
    prompts = []
    for seed, (task, (m, n, r)) in enumerate(SIZES.items()):
        draw = torch.Generator().manual_seed(seed)
        config = EPTConfig(BY_NAME[name].width, num_virtual_tokens=m, max_length=n, rank=r)
        layer = backbone.get_input_embeddings()
        prompt = FusedEPTPrompt(config, layer, generator=draw, dtype=torch.float64)
        with torch.no_grad():
            for tensor in prompt.parameters():
                tensor += 0.5 * torch.randn(tensor.shape, generator=draw, dtype=torch.float64)
        bank.add(task, prompt)
        prompts.append(prompt)
    return bank, prompts


def texts(left: bool = True) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(5, VOCABULARY, (5, 6), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, :2] = mask[3, :5] = 0
    return {"input_ids": ids, "attention_mask": mask if left else mask.flip(1)}


def same(bank: EPTBank, prefix: PrefixCache, tasks: tuple[str, ...]) -> None:
    """With the prefix and without, ``forward`` and ``generate`` give the same."""
    for left in (True, False):
        batch = texts(left)
        real = batch["attention_mask"].bool()
        expected, got = (bank(**batch, tasks=tasks, **c).logits for c in ({}, {"prefix": prefix}))
        torch.testing.assert_close(got[real], expected[real], **EXACT)
    choices = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    expected, got = (
        bank.generate(**texts(), tasks=tasks, **choices, **c) for c in ({}, {"prefix": prefix})
    )
    assert got.sequences.equal(expected.sequences)
    for mine, theirs in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "OPT", "GPT-NeoX"])
def test_bank(name: str) -> None:
    """Of prompts of different lengths; replaced and added tasks are computed by themselves."""
    bank, prompts = make_bank(name)
    prefix = bank.prefix_cache()
    same(bank, prefix, TASKS)
    bank.replace("long", prompts[2])
    bank.add("more", prompts[1])
    same(bank, prefix, ("short", "plain", "plain", "plain", "short"))
    for task, slot in (("long", 1), ("more", 3)):
        with pytest.raises(ValueError, match=rf"as it is, .* changed in slots \[{slot}\]"):
            bank(**texts(), tasks=("short", "short", task, "short", "plain"), prefix=prefix)
    with fed(bank.model) as shapes:
        prefix.update()
    assert shapes == [(2, 5)]
    same(bank, prefix, ("more", "long", "plain", "short", "more"))


def test_bank_of_another_task() -> None:
    sizes = {"capacity": 1, "num_virtual_tokens": 2, "max_length": 8, "rank": 1}
    bank = EPTBank(BY_NAME["T5"].build("SEQ_2_SEQ_LM"), "SEQ_2_SEQ_LM", **sizes)
    with pytest.raises(TypeError, match="prefix_cache: expected task CAUSAL_LM, got SEQ_2_SEQ_LM"):
        bank.prefix_cache()
