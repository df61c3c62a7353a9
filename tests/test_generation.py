"""``generate`` behind a prompt, token by token, against the definition without a cache."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, StaticCache

from ept_fast.transformers import generation
from ept_fast.transformers.backbone import Profile, cache_of
from tests.architectures import BOTH, BY_NAME, VOCABULARY, in_float64, names
from tests.decoding import (
    ENDLESS,
    EXACT,
    GREEDY,
    LOGITS,
    NEW,
    PLACES,
    M,
    N,
    Trial,
    assert_greedy,
    defined,
    embeddings,
    greedy,
    last_logits,
    make_trial,
    pad,
    trial,
)
from tests.support import marks

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # The model-agnostic default length, which some tests are about.
    pytest.mark.filterwarnings("ignore:Using the model-agnostic default `max_length`:UserWarning"),
]

DECODERS = [pytest.param(n, marks=marks(n, "generation")) for n in names("CAUSAL_LM")]
ENCODER_DECODERS = [
    pytest.param(n, marks=marks(n, "generation")) for n in names("SEQ_2_SEQ_LM", BOTH)
]


@pytest.mark.parametrize("name", DECODERS)
def test_offsets_of_generated_tokens_decide_what_follows(name: str) -> None:
    """So what the other tests expect is not what they would get with fewer offsets."""
    made, (tokens, logits) = trial(name), greedy(name)
    row = made.rows[0]
    with in_float64():
        without, _ = defined(made, row, covered=len(row))
        _, fewer = defined(made, row, covered=N - 1)
    assert tokens[0].tolist() != without.tolist()
    fed = N - len(row)  # the token at position n - 1 is fed for this one
    torch.testing.assert_close(logits[0, :fed], fewer[:fed], **EXACT)
    assert (logits[0, fed] - fewer[fed]).abs().max() > 1e-2


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", DECODERS)
def test_greedy(name: str, place: str) -> None:
    made, batch = trial(name), pad(trial(name).rows, place)
    with in_float64():
        output = made.model.generate(**batch, **LOGITS)
    assert_greedy(output, batch["input_ids"], greedy(name))


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_in_float32(name: str) -> None:
    made = trial(name, torch.float32)
    batch = pad(made.rows)
    tokens = made.model.generate(**batch, **GREEDY)[:, batch["input_ids"].shape[1] :]
    assert tokens.tolist() == greedy(name, torch.float32)[0].tolist()


@pytest.mark.parametrize("name", DECODERS)
def test_rows_alone_folded_and_in_training(name: str) -> None:
    made = trial(name)
    model, expected = made.model, greedy(name)
    with in_float64():
        for b, row in enumerate(made.rows):
            output = model.generate(row.unsqueeze(0), **LOGITS)
            assert_greedy(output, row.unsqueeze(0), tuple(x[b : b + 1] for x in expected))
        batch = pad(made.rows)
        try:
            for offset in ("low_rank", "table"):  # past what either covers
                model.fold(offset=offset)
                assert_greedy(model.generate(**batch, **LOGITS), batch["input_ids"], expected)
            model.train()
            assert_greedy(model.generate(**batch, **LOGITS), batch["input_ids"], expected)
        finally:
            model.eval()


CACHES: dict[str, dict[str, Any]] = {
    "none": {"use_cache": False},
    "static": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("name", DECODERS)
def test_caches(name: str, kind: str) -> None:
    made = trial(name)
    with in_float64():
        batch = pad(made.rows)
        output = made.model.generate(**batch, **LOGITS, **CACHES[kind])
        assert_greedy(output, batch["input_ids"], greedy(name))
        given = cache_of(output)
        assert given is None if kind == "none" else isinstance(given, StaticCache)


def test_compiled_steps_are_the_backbones() -> None:
    """A cache of fixed length is compiled on a GPU: by the backbone, once for all calls."""
    made = trial("Llama")
    asked: list[Any] = []

    def compiled(config: Any) -> Callable[..., Any]:
        asked.append(config)
        return made.model.backbone

    config = transformers.CompileConfig()
    config._compile_all_devices = True
    made.model.backbone.get_compiled_call = compiled
    try:
        with in_float64():
            batch = pad(made.rows)
            output = made.model.generate(
                **batch, **LOGITS, cache_implementation="static", compile_config=config
            )
    finally:
        del made.model.backbone.get_compiled_call
    assert asked == [config]
    assert_greedy(output, batch["input_ids"], greedy("Llama"))


CONTINUED = ("generate, prefix", "forward", "forward, prefix")


@pytest.mark.parametrize("how", CONTINUED)
@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_goes_on_from_a_cache_with_the_prompt_first(name: str, how: str) -> None:
    """Padding between prompt and text, as a model's own call and a prefix leave it."""
    made, (tokens, logits) = trial(name), greedy(name)
    batch = pad(made.rows)
    with in_float64():
        prefix = {"prefix": made.model.prefix_cache()} if "prefix" in how else {}
        if how.startswith("generate"):
            choices = {**GREEDY, "max_new_tokens": 1, "return_dict_in_generate": True}
            output = made.model.generate(**batch, **choices, **prefix)
            begun = output.sequences
        else:
            output = made.model(**batch, use_cache=True, **prefix)
            begun = torch.cat([batch["input_ids"], output.logits[:, -1:].argmax(-1)], 1)
        mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
        choices = {**LOGITS, "max_new_tokens": 4, "cache": cache_of(output)}
        later = made.model.generate(begun, mask, **choices)
    assert_greedy(later, begun, (tokens[:, 1:5], logits[:, 1:5]))


def test_a_cache_with_the_text_first() -> None:
    """In windows a model's own call puts the padding behind the text, where none can follow."""
    made = trial("Mistral")
    batch = pad(made.rows)
    cache = cache_of(made.model(**batch, use_cache=True))
    ids = torch.nn.functional.pad(batch["input_ids"], (0, 1), value=5)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
    with pytest.raises(ValueError, match="cache: expected rows of one length in a cache"):
        made.model.generate(ids, mask, **GREEDY, cache=cache)


@pytest.mark.parametrize("argument", ["cache", "past_key_values"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "GPT-2"])
def test_goes_on_from_a_given_cache(name: str, static: bool, argument: str) -> None:
    """By either name, whichever this version of transformers has."""
    made, (tokens, logits) = trial(name), greedy(name)
    rows, batch = made.rows, pad(made.rows)
    config = made.plain.config
    room = batch["input_ids"].shape[1] + 3 + M
    cache = StaticCache(config, max_cache_len=room) if static else DynamicCache(config=config)
    with in_float64():
        given = {argument: cache}
        begun = made.model.generate(**batch, **{**GREEDY, "max_new_tokens": 1}, **given)
        mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
        choices = {**LOGITS, "max_new_tokens": 2}
        output = made.model.generate(begun, mask, **choices, **given)
    assert cache.get_seq_length() == room - 1
    assert begun[:, -1].tolist() == tokens[:, 0].tolist()
    assert_greedy(output, begun, (tokens[:, 1:3], logits[:, 1:3]))
    assert len(rows[0]) + 1 <= N


class Fed(NamedTuple):
    """What the backbone was called with."""

    rows: Tensor
    mask: Tensor | None
    positions: Tensor | None


def record(backbone: nn.Module, run: Callable[[], Any]) -> list[Fed]:
    """All calls of the backbone during a run."""
    calls: list[Fed] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert not args
        assert kwargs["input_ids"] is None
        found = (kwargs.get(n) for n in ("inputs_embeds", "attention_mask", "position_ids"))
        calls.append(Fed(*found))

    handle = backbone.register_forward_pre_hook(note, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_what_the_backbone_is_fed(dtype: torch.dtype) -> None:
    """Once a token, each in its place, rounded once: equal to the reference to the bit."""
    made = make_trial("Llama", dtype)
    draw = torch.Generator().manual_seed(2)
    for name in ("offset_a", "offset_b"):  # sums that are exact in float32 in any order
        tensor = getattr(made.model.prompt, name)
        tensor.copy_(torch.randint(-8, 9, tensor.shape, generator=draw) / 8)
    batch = pad(made.rows)
    width = batch["input_ids"].shape[1]
    sequences: list[Tensor] = []
    calls = record(
        made.model.backbone,
        lambda: sequences.append(made.model.generate(**batch, **GREEDY)),
    )
    assert [call.rows.shape[1] for call in calls] == [M + width] + [1] * (NEW - 1)
    rows = torch.cat([call.rows for call in calls], 1)
    positions = torch.cat([call.positions for call in calls], 1)
    assert rows.dtype == dtype
    for b, row in enumerate(made.rows):
        empty = width - len(row)
        expected = embeddings(made, sequences[0][b, empty:-1])[0]
        torch.testing.assert_close(rows[b, empty : empty + M], expected[:M])
        assert rows[b, empty + M :].equal(expected[M:])
        assert positions[b, empty:].tolist() == list(range(M + len(row) + NEW - 1))
        assert calls[0].mask[b].tolist() == [0] * empty + [1] * (M + len(row))
        assert calls[-1].mask[b].tolist() == [0] * empty + [1] * (M + len(row) + NEW - 1)


SAMPLED = {"do_sample": True, "temperature": 1.5, "top_k": 0, "eos_token_id": None}


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Mistral", "BLOOM"])
@torch.no_grad()
def test_sampling(name: str, copies: int) -> None:
    """The same draws from the same distributions, of every answer to a row."""
    made = trial(name)
    batch = pad(made.rows)
    texts = [row for row in made.rows for _ in range(copies)]
    with in_float64():
        torch.manual_seed(11)
        for _ in range(NEW):
            logits = torch.stack([last_logits(made, ids) for ids in texts])
            drawn = torch.multinomial((logits / 1.5).softmax(-1), 1)
            texts = [torch.cat([ids, token]) for ids, token in zip(texts, drawn, strict=True)]
        torch.manual_seed(11)
        got = made.model.generate(
            **batch, **SAMPLED, max_new_tokens=NEW, num_return_sequences=copies
        )
    assert got[:, -NEW:].tolist() == [ids[-NEW:].tolist() for ids in texts]
    assert got[:, :-NEW].tolist() == batch["input_ids"].repeat_interleave(copies, 0).tolist()


@torch.no_grad()
def best(logits: Callable[[Tensor], Tensor], ids: Tensor, beams: int, new: int) -> list[Tensor]:
    """Beam search without an end token: the likeliest sequences, best first."""
    found = [(0.0, ids)]
    for _ in range(new):
        grown = []
        for score, sequence in found:
            scores = score + logits(sequence).log_softmax(-1)
            grown += [(s, torch.cat([sequence, torch.tensor([t])])) for t, s in enumerate(scores)]
        found = sorted(grown, key=lambda pair: -float(pair[0]))[:beams]
    return [sequence for _, sequence in found]


@pytest.mark.parametrize("answers", [1, 3])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "GPT-2", "BLOOM"])
def test_beams(name: str, answers: int) -> None:
    made, new = trial(name), 6
    batch = pad(made.rows, "both")
    choices = {"num_beams": 3, "num_return_sequences": answers, "max_new_tokens": new}
    with in_float64():
        expected = [
            ids[-new:].tolist()
            for row in made.rows
            for ids in best(lambda ids: last_logits(made, ids), row, 3, new)[:answers]
        ]
        for cache_kind in ({}, *CACHES.values()):
            got = made.model.generate(**batch, **{**GREEDY, **choices}, **cache_kind)
            assert got[:, -new:].tolist() == expected
            given = batch["input_ids"].repeat_interleave(answers, 0)
            assert got[:, :-new].tolist() == given.tolist()


@torch.no_grad()
def test_repetition_penalty_sees_the_text() -> None:
    made, penalty = trial("Llama"), 3.0
    start = ids = made.rows[0]
    with in_float64():
        for _ in range(NEW):
            scores = last_logits(made, ids)
            seen = torch.zeros(VOCABULARY, dtype=torch.bool).index_fill(0, ids, True)
            lower = torch.where(scores < 0, scores * penalty, scores / penalty)
            ids = torch.cat([ids, torch.where(seen, lower, scores).argmax().view(1)])
        got = made.model.generate(start.unsqueeze(0), **GREEDY, repetition_penalty=penalty)
    assert got[0].tolist() == ids.tolist()
    assert got[0, -NEW:].tolist() != greedy("Llama")[0][0].tolist()


class Watch(LogitsProcessor):
    """Keeps the token ids that processors are given."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(input_ids)
        return scores


def test_processors_see_text_and_new_tokens() -> None:
    made, watch = trial("Llama"), Watch()
    batch = pad(made.rows)
    with in_float64():
        output = made.model.generate(**batch, **GREEDY, logits_processor=[watch])
    width = batch["input_ids"].shape[1]
    assert [ids.shape[1] for ids in watch.seen] == list(range(width, width + NEW))
    for ids in watch.seen:
        assert ids.equal(output[:, : ids.shape[1]])


class Stream:
    """What a streamer is told."""

    def __init__(self) -> None:
        self.told: list[list[int]] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.told.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_streamer() -> None:
    made, stream = trial("Llama"), Stream()
    row, tokens = made.rows[0], greedy("Llama")[0][0]
    with in_float64():
        made.model.generate(row.unsqueeze(0), **GREEDY, streamer=stream)
    assert stream.told == [row.tolist()] + [[token] for token in tokens.tolist()]
    assert stream.ended


LENGTH_CHOICES: list[dict[str, Any]] = [
    {"max_new_tokens": 4},
    {"max_length": 11},
    {"max_length": 30},
    {},
    {"max_length": 14, "min_length": 13, "end": True},
    {"max_new_tokens": 6, "min_new_tokens": 5, "end": True},
    {"generation_config": GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=None)},
    {"generation_config": GenerationConfig(max_length=12, pad_token_id=0)},
]


@pytest.mark.parametrize("choices", LENGTH_CHOICES, ids=str)
def test_lengths_are_those_without_a_prompt(choices: dict[str, Any]) -> None:
    """The prompt does not count. ``end``: with an end token that would otherwise come at once."""
    made = trial("Llama")
    row = made.rows[0].unsqueeze(0)
    choices = dict(choices)
    end = choices.pop("end", False)
    if "generation_config" not in choices:
        choices["do_sample"] = False
    with in_float64():
        lengths = []
        for model in (made.model, made.plain):
            if end:
                choices["eos_token_id"] = int(model.generate(row, max_new_tokens=1)[0, -1])
            lengths.append(model.generate(row, **choices).shape[1])
            if end:
                again = {"max_length": 14, "do_sample": False}
                again["eos_token_id"] = choices["eos_token_id"]
                assert model.generate(row, **again).shape[1] == 8
    assert lengths[0] == lengths[1] or end
    if end:
        assert lengths[0] >= 12


def test_end_token_ends_a_row() -> None:
    made, (tokens, _) = trial("Llama"), greedy("Llama")
    end = int(tokens[0, 3])
    with in_float64():
        batch = pad(made.rows)
        got = made.model.generate(**batch, **{**GREEDY, "eos_token_id": end, "pad_token_id": 0})
    width = batch["input_ids"].shape[1]
    for row, whole in zip(got[:, width:].tolist(), tokens.tolist(), strict=True):
        kept = whole.index(end) + 1 if end in whole else len(whole)
        assert row == (whole[:kept] + [0] * NEW)[: len(row)]


def test_outputs_beside_the_tokens() -> None:
    made = trial("Llama")
    batch, (_, logits) = pad(made.rows, "holes"), greedy("Llama")
    asked = ("output_scores", "output_hidden_states", "output_attentions")
    with in_float64():
        made.model.backbone.set_attn_implementation("eager")
        output = made.model.generate(**batch, **LOGITS, **dict.fromkeys(asked, True))
        made.model.backbone.set_attn_implementation("sdpa")
    torch.testing.assert_close(torch.stack(output.scores, 1), logits, **EXACT)
    width = M + batch["input_ids"].shape[1]
    assert len(output.hidden_states) == len(output.attentions) == NEW
    assert output.hidden_states[0][-1].shape[:2] == (3, width)
    assert output.attentions[-1][0].shape[-2:] == (1, width + NEW - 1)
    assert cache_of(output).get_seq_length() == width + NEW - 1


def test_mask_that_is_not_given() -> None:
    """Padding tokens are padding, as ``generate`` has it, unless they end texts too."""
    made = trial("Llama")
    batch = pad(made.rows)
    ids = batch["input_ids"] * batch["attention_mask"]
    with in_float64():
        choices = {**LOGITS, "pad_token_id": 0}
        output = made.model.generate(ids, **choices)
        assert_greedy(output, ids, greedy("Llama"))
        whole = made.model.generate(ids, **{**GREEDY, "eos_token_id": [0, 2], "pad_token_id": 0})
        ones = torch.ones_like(ids)
        again = made.model.generate(ids, ones, **{**GREEDY, "eos_token_id": [0, 2]}, pad_token_id=0)
    assert whole.equal(again)


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Gemma 2"])
def test_text_without_a_token(name: str) -> None:
    """The prompt alone is begun with."""
    made, after_text = trial(name), greedy(name)
    empty = torch.zeros(1, 0, dtype=torch.int64)
    with in_float64():
        expected = tuple(x.unsqueeze(0) for x in defined(made, empty[0]))
        assert_greedy(made.model.generate(empty, **LOGITS), empty, expected)
        batch = pad([empty[0], made.rows[0]])
        output = made.model.generate(**batch, **LOGITS)
        rows = [torch.cat([x, y[:1]]) for x, y in zip(expected, after_text, strict=True)]
        assert_greedy(output, batch["input_ids"], (rows[0], rows[1]))


@pytest.mark.parametrize("how", ["lookup", "assistant"])
def test_assisted(how: str) -> None:
    made, tokens = trial("Llama"), greedy("Llama")[0]
    row = made.rows[0].unsqueeze(0)
    choices: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if how == "assistant":  # its drafts are good where the prompt does not matter
        choices = {"assistant_model": copy.deepcopy(made.plain)}
    found: list[Tensor] = []
    with in_float64():
        calls = record(
            made.model.backbone,
            lambda: found.append(made.model.generate(row, **GREEDY, **choices)),
        )
    assert found[0][0, -NEW:].tolist() == tokens[0].tolist()
    assert any(call.rows.shape[1] > 1 for call in calls[1:])  # drafts were looked at


# PEFT asks transformers by a name that goes away, and drops the position ids that it is handed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_without_offset_and_subspaces_it_is_prompt_tuning(name: str) -> None:
    """PEFT's own prompt tuning generates the same from the same rows."""
    made = make_trial(name, rank=0, num_spaces=0)
    texts = torch.stack([made.rows[0], made.rows[0].flip(0)])
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=M)
    theirs = peft.get_peft_model(made.plain, settings).eval()
    prompt = theirs.prompt_encoder["default"].embedding.weight
    prompt.data = made.model.prompt.short_prompt.detach().clone()
    expected = texts
    with in_float64():
        # Not by PEFT 0.21's own generate, which does not go on from the cache of transformers 5.24.
        for _ in range(NEW):
            ones = torch.ones_like(expected)
            logits = theirs(input_ids=expected, attention_mask=ones, use_cache=False).logits
            expected = torch.cat([expected, logits[:, -1:].argmax(-1)], 1)
        output = made.model.generate(texts, torch.ones_like(texts), **GREEDY)
    assert output.tolist() == expected.tolist()


def test_backbone_is_left_as_it_was() -> None:
    made = trial("Llama")
    backbone = made.model.backbone
    before, kind = dict(vars(backbone)), type(backbone)
    with in_float64():
        made.model.generate(**pad(made.rows), **GREEDY, cache_implementation="static")
        with pytest.raises(ValueError, match="max_length"):
            made.model.generate(torch.ones(1, N + 1, dtype=torch.int64))
        expected = made.plain.generate(made.rows[0].unsqueeze(0), **GREEDY)
        with made.model.disable_adapter():
            got = made.model.generate(made.rows[0].unsqueeze(0), **GREEDY)
    assert got.equal(expected)
    assert vars(backbone) == before
    assert type(backbone) is kind


class Together(LogitsProcessor):
    """Lets no thread take a step before the other is there too."""

    def __init__(self, barrier: threading.Barrier) -> None:
        self.barrier = barrier

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.barrier.wait(timeout=60)
        return scores


def test_threads_with_a_prompt_each_on_one_backbone() -> None:
    backbone = BY_NAME["Llama"].build("CAUSAL_LM")
    made = [make_trial("Llama", torch.float32, backbone, rank=rank) for rank in (2, 3)]
    batch = pad(made[0].rows)
    alone = [each.model.generate(**batch, **GREEDY) for each in made]
    assert not alone[0].equal(alone[1])
    barrier = threading.Barrier(2)
    got: list[Any] = [None, None]

    def run(index: int) -> None:
        steps = [Together(barrier)]
        got[index] = made[index].model.generate(**batch, **GREEDY, logits_processor=steps)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert all(mine.equal(theirs) for mine, theirs in zip(got, alone, strict=True))


def last_logits_of_decoder(made: Trial, text: Tensor, answer: Tensor, covered: int) -> Tensor:
    """``[V]`` for the decoder's token after these."""
    rows = embeddings(made, text, covered)
    mask = torch.ones(rows.shape[:2], dtype=torch.int64)
    output = made.plain(
        inputs_embeds=rows,
        attention_mask=mask,
        decoder_input_ids=answer.unsqueeze(0),
        use_cache=False,
    )
    return output.logits[0, -1]


@torch.no_grad()
def answered(made: Trial, text: Tensor, covered: int = N) -> tuple[Tensor, Tensor]:
    """The greedy answer to a text behind its start token, and the logits it comes from."""
    answer, logits = torch.tensor([made.plain.config.decoder_start_token_id]), []
    for _ in range(NEW):
        logits.append(last_logits_of_decoder(made, text, answer, covered))
        answer = torch.cat([answer, logits[-1].argmax().view(1)])
    return answer, torch.stack(logits)


@cache
def answers(name: str) -> tuple[Tensor, Tensor]:
    """What every row of a trial has to get, ``[B, 1 + new]`` and ``[B, new, V]``."""
    made = trial(name)
    with in_float64():
        assert not answered(made, made.rows[0], covered=0)[0].equal(answered(made, made.rows[0])[0])
        tokens, logits = zip(*(answered(made, row) for row in made.rows), strict=True)
    return torch.stack(tokens), torch.stack(logits)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_encoder_decoder(name: str, place: str) -> None:
    made, (tokens, logits) = trial(name), answers(name)
    batch = pad(made.rows, place)
    for choices in ({}, *CACHES.values()):
        with in_float64():
            output = made.model.generate(**batch, **LOGITS, **choices)
        assert output.sequences.tolist() == tokens.tolist()
        torch.testing.assert_close(torch.stack(output.logits, 1), logits, **EXACT)


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_encoder_decoder_folded_beams_and_samples(name: str) -> None:
    made, new = trial(name), 4
    batch = pad(made.rows)
    start = torch.tensor([made.plain.config.decoder_start_token_id])
    sampled = {**SAMPLED, "max_new_tokens": new}
    with in_float64():
        expected = [
            best(lambda ids, row=row: last_logits_of_decoder(made, row, ids, N), start, 3, new)[0]
            for row in made.rows
        ]
        got = made.model.generate(**batch, **{**GREEDY, "num_beams": 3, "max_new_tokens": new})
        torch.manual_seed(11)
        drawn = made.model.generate(**batch, **sampled)
        made.model.fold()
        try:
            torch.manual_seed(11)
            again = made.model.generate(**batch, **sampled)
        finally:
            made.model.unfold()
        torch.manual_seed(11)
        texts = [start] * len(made.rows)
        for _ in range(new):
            logits = [
                last_logits_of_decoder(made, row, ids, N)
                for row, ids in zip(made.rows, texts, strict=True)
            ]
            tokens = torch.multinomial((torch.stack(logits) / 1.5).softmax(-1), 1)
            texts = [torch.cat([ids, token]) for ids, token in zip(texts, tokens, strict=True)]
    assert got.tolist() == torch.stack(expected).tolist()
    assert drawn.tolist() == again.tolist() == torch.stack(texts).tolist()


def test_positions_that_run_out() -> None:
    """A table of positions holds the prompt, the text's real tokens and all new ones but one."""
    made = make_trial("GPT-2", max_length=60)
    text = torch.arange(3, 59).unsqueeze(0)  # 56 of 64 positions, 3 are the prompt's
    fits = 64 - M + 1
    with in_float64():
        tokens, _ = defined(made, text[0], new=fits - 56, covered=60)
        expected = torch.cat([text, tokens.unsqueeze(0)], 1)
        for choices in ({"max_length": fits}, {"max_new_tokens": fits - 56}, {}):
            got = made.model.generate(text, **ENDLESS, **choices)
            assert got.equal(expected)  # also of 20 new tokens, the default
        wider = pad([text[0]], extra=2)
        got = made.model.generate(**wider, **ENDLESS, max_length=fits + 2)
        assert got[:, 2:].equal(expected)
    message = (
        "max_length: expected at most 62 for text and new tokens, as the prompt takes 3 of the "
        r"model's positions, got 63 \(56 and 7\)"
    )
    with pytest.raises(ValueError, match=message):
        made.model.generate(text, max_new_tokens=fits - 56 + 1)

    def refused() -> None:
        with pytest.raises(ValueError, match=message):
            made.model.generate(text, max_length=fits + 1)

    assert record(made.model.backbone, refused) == []  # before anything is computed


def test_encoder_positions_that_run_out() -> None:
    made = make_trial("BART", max_length=63)
    text = torch.full((1, 62), 5)
    assert made.model.generate(text[:, 1:], max_new_tokens=2).shape == (1, 3)
    message = "input_ids: expected at most 61 positions, which the model has without the prompt's 3"
    with pytest.raises(ValueError, match=message):
        made.model.generate(text, max_new_tokens=2)


def test_decoder_positions_that_run_out() -> None:
    """The decoder's start and all new tokens but one have a position."""
    made = make_trial("BART")
    text = torch.full((1, 3), 5)
    assert made.model.generate(text, min_new_tokens=64, max_new_tokens=64).shape == (1, 65)
    message = "max_length: expected at most 65 for the decoder's start and new tokens"
    for choices in ({"max_new_tokens": 65}, {"max_length": 66}):
        with pytest.raises(ValueError, match=message):
            made.model.generate(text, **choices)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"inputs_embeds": torch.zeros(1, 2, 32)}, "inputs_embeds: expected None"),
    ({"position_ids": torch.zeros(1, 2)}, "position_ids: expected None"),
    ({"token_type_ids": torch.zeros(1, 2)}, "token_type_ids: expected None"),
    ({"guidance_scale": 1.5}, "guidance_scale: expected None behind a prompt, got 1.5"),
    ({"prefill_chunk_size": 2}, "prefill_chunk_size: expected None behind a prompt, got 2"),
    ({"token_healing": True}, "token_healing: expected None behind a prompt, got True"),
    (
        {"generation_config": GenerationConfig(assistant_early_exit=1)},
        "assistant_early_exit: expected None behind a prompt, got 1",
    ),
    ({"cache_implementation": "paged"}, "cache_implementation: expected another one"),
    ({"input_ids": torch.full((1, N + 1), 5)}, f"at most max_length {N} text positions"),
    ({"attention_mask": torch.tensor([[1, 2]])}, "attention_mask: expected only 0 and 1"),
    ({"attention_mask": torch.tensor([[1, 1, 1]])}, r"attention_mask: expected shape \[1, 2\]"),
]


@pytest.mark.parametrize(("choices", "message"), REFUSED, ids=[m[:30] for _, m in REFUSED])
def test_what_is_refused(choices: dict[str, Any], message: str) -> None:
    made = trial("Llama")
    given = {"input_ids": torch.tensor([[5, 6]]), "max_new_tokens": 2}
    with pytest.raises(ValueError, match=message):
        made.model.generate(**{**given, **choices})


def test_ids_outside_the_vocabulary() -> None:
    made = trial("Llama")
    ids = torch.tensor([[5, 6, VOCABULARY], [5, 6, 7]])
    with pytest.raises(IndexError, match="got 61 at row 0, column 2"):
        made.model.generate(ids, torch.tensor([[1, 1, 1], [1, 1, 0]]))


def test_models_that_are_refused() -> None:
    made = make_trial("Llama", torch.float32)
    ids = torch.tensor([[5, 6]])
    backbone = made.model.backbone

    class Own(type(backbone)):  # as OpenAI GPT has it
        def prepare_inputs_for_generation(self, input_ids: Tensor, **_: Any) -> dict[str, Tensor]:
            return {"input_ids": input_ids}

    backbone.generate = made.plain.generate
    with pytest.raises(TypeError, match="got another one set on the model itself"):
        made.model.generate(ids)
    del backbone.generate
    made.model.train()
    made.model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"expected evaluation mode \(model.eval\(\)\)"):
        made.model.generate(ids)
    made.model.eval()
    made.model.generate(ids, max_new_tokens=1)
    backbone.__class__ = Own
    with pytest.raises(ValueError, match="calls the model with token ids, past the prompt"):
        made.model.generate(ids, max_new_tokens=1)
    made.model.backbone = nn.Linear(1, 1)
    with pytest.raises(TypeError, match="that can generate, got Linear"):
        made.model.generate(ids)


@pytest.mark.parametrize(
    ("seen", "room", "mask", "message"),
    [
        (0, 8, [1, 1, 1], "past_key_values: expected room for 9 positions"),
        (2, 20, [1, 1, 1], "past_key_values: expected 3 positions of the prompt and fewer than 3"),
        (6, 20, [1, 1, 1], "past_key_values: expected 3 positions of the prompt and fewer than 3"),
        (4, 20, [1, 0, 1], "attention_mask: expected padding on the left only"),
        (4, 20, [0, 0, 1], "attention_mask: expected padding on the left only"),
    ],
)
def test_caches_that_do_not_fit(seen: int, room: int, mask: list[int], message: str) -> None:
    made = trial("Llama")
    given = StaticCache(made.plain.config, max_cache_len=room)
    rows = torch.zeros(1, seen, 32, dtype=torch.float64)
    if seen:
        name = Profile.of(made.plain).cache_argument
        made.plain(inputs_embeds=rows, use_cache=True, **{str(name): given})
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match=message):
        made.model.generate(ids, torch.tensor([mask]), past_key_values=given, max_new_tokens=4)


@pytest.mark.parametrize("name", ["Llama", "T5", "Mamba"])
def test_a_cache_that_would_not_be_seen(name: str) -> None:
    """Under a name that is not the call's, or beside another, it is refused and not left out."""
    made, ids = trial(name), torch.tensor([[5, 6, 7]])
    calls = [made.model, made.model.generate] if name == "Llama" else [made.model.generate]
    given = DynamicCache()
    for call in calls:
        for other in ("cache_params", "kv_cache"):
            with pytest.raises(ValueError, match=f"{other}: expected keys and values as cache or"):
                call(ids, **{other: given})
        with pytest.raises(ValueError, match="cache, past_key_values: expected one cache, got two"):
            call(ids, cache=given, past_key_values=given)


def test_a_generate_with_an_unknown_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version of transformers that renames the argument again is refused by its number."""
    monkeypatch.setattr(generation, "_CACHE", None)
    with pytest.raises(TypeError, match=f"got that of version {transformers.__version__}"):
        trial("Llama").model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=1)
