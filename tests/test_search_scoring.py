"""Candidates times texts in one batch: the same as one forward for each pair."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ept_fast import splice_prompt
from ept_fast.search import CandidateScorer, Head, LabelEmbeddings, LabelWords, scoring
from tests.architectures import ARCHITECTURES, VOCABULARY, WIDTH, Architecture, in_float64

N, M, C = 5, 3, 4
# Of the texts, in tokens; the order that sorts them is not its own inverse.
LENGTHS = (4, 7, 1, 2, 7, 5)
MASK = 60
MODELS: dict[str, Architecture] = {a.name: a for a in ARCHITECTURES}
ENCODERS = ("BERT", "RoBERTa", "ELECTRA", "DeBERTa v3", "ModernBERT")
DECODERS = ("Llama", "GPT-2", "Mistral", "Gemma 2", "OPT", "GPT-NeoX", "BLOOM")
WORDS = torch.tensor([11, 5, 40, 23])


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def texts() -> list[Tensor]:
    g = draw(1)
    return [torch.randint(3, MASK, (length,), generator=g) for length in LENGTHS]


def padded(rows: list[Tensor], side: str, extra: int = 0) -> tuple[Tensor, Tensor]:
    """Ids, with any token as padding, and the mask."""
    longest = max(map(len, rows)) + extra
    ids = torch.randint(3, MASK, (len(rows), longest), generator=draw(2))
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        columns = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[i, columns], mask[i, columns] = row, 1
    return ids, mask


def candidates() -> Tensor:
    return torch.randint(3, MASK, (N, M), generator=draw(3))


def build(name: str, task: str, dtype: torch.dtype = torch.float64) -> Any:
    architecture = MODELS[name]
    if task == "MASKED_LM":
        import transformers

        torch.manual_seed(7)
        model = transformers.AutoModelForMaskedLM.from_config(architecture.config())
    else:
        model = architecture.build(task, dtype=dtype)
    return model.to(dtype).eval()


def head(width: int = WIDTH) -> nn.Linear:
    torch.manual_seed(5)
    return nn.Linear(width, C, dtype=torch.float64)


@torch.no_grad()
def one_by_one(
    model: Any, prompts: Tensor, rows: list[Tensor], order: str, read: Callable[[Any, Tensor], Any]
) -> Tensor:
    """A forward for each pair, of its token ids alone; ``read`` sees the output and the ids."""
    pairs = []
    for prompt in prompts:
        for row in rows:
            ids = torch.cat([prompt, row] if order == "prompt text" else [row, prompt])
            pairs.append(read(model(input_ids=ids.unsqueeze(0)), ids))
    return torch.stack(pairs).view(len(prompts), len(rows), -1)


def pooled(module: Callable[[Tensor], Tensor], pooling: str, order: str) -> Any:
    def read(output: Any, ids: Tensor) -> Tensor:
        states = output.last_hidden_state[0]
        own = states[M:] if order == "prompt text" else states[-1:]
        state = {"mean": own.mean(0), "first": own[0], "last": own[-1]}[pooling]
        return module(state.unsqueeze(0))[0]

    return read


@in_float64()
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("max_rows", [256, 11, 2])
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_score_as_one_by_one(name: str, max_rows: int, side: str) -> None:
    model, module = build(name, "FEATURE_EXTRACTION"), head()
    scorer = CandidateScorer(model, Head(module), max_rows=max_rows)
    got = scorer(candidates(), *padded(texts(), side, extra=3))
    expected = one_by_one(
        model, candidates(), texts(), "prompt text", pooled(module, "mean", "prompt text")
    )
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


@in_float64()
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("order", ["prompt text", "text prompt"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoders_score_as_one_by_one(name: str, order: str, side: str) -> None:
    """At the language-model head and by a head of ours, the text's keys and values shared."""
    model = build(name, "CAUSAL_LM")
    scorer = CandidateScorer(model, LabelWords(WORDS), order=order, max_rows=7)
    got = scorer(candidates(), *padded(texts(), side, extra=3))
    expected = one_by_one(
        model, candidates(), texts(), order, lambda output, ids: output.logits[0, -1, WORDS]
    )
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    bare, module = model.base_model, head(MODELS[name].width)
    scorer = CandidateScorer(bare, Head(module, "last"), order=order, max_rows=64)
    got = scorer(candidates(), *padded(texts(), side))
    expected = one_by_one(bare, candidates(), texts(), order, pooled(module, "last", order))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


@in_float64()
@pytest.mark.parametrize("name", ["BERT", "ModernBERT"])
def test_masked_models_answer_at_the_mask(name: str) -> None:
    model = build(name, "MASKED_LM")
    rows = [row.clone() for row in texts()]
    for i, row in enumerate(rows):
        row[i % len(row)] = MASK
    scorer = CandidateScorer(model, LabelWords(WORDS, MASK), max_rows=16)

    def read(output: Any, ids: Tensor) -> Tensor:
        logits: Tensor = output.logits[0, ids == MASK][0, WORDS]
        return logits

    expected = one_by_one(model, candidates(), rows, "prompt text", read)
    got = scorer(candidates(), *padded(rows, "left"))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_cosines_to_labels(pooling: str) -> None:
    model = build("BERT", "FEATURE_EXTRACTION")
    labels = torch.randn(C, WIDTH, generator=draw(4), dtype=torch.float64)
    scorer = CandidateScorer(model, LabelEmbeddings(labels, scale=3.0, pooling=pooling))

    def cosines(states: Tensor) -> Tensor:
        return 3.0 * torch.cosine_similarity(states, labels).unsqueeze(0)

    read = pooled(cosines, pooling, "prompt text")
    expected = one_by_one(model, candidates(), texts(), "prompt text", read)
    torch.testing.assert_close(scorer(candidates(), *padded(texts(), "right")), expected)


@pytest.mark.parametrize("order", ["prompt text", "text prompt"])
def test_soft_prompts_are_scored_as_the_tokens_they_are_made_of(order: str) -> None:
    model = build("Llama", "CAUSAL_LM")
    scorer = CandidateScorer(model, LabelWords(WORDS), order=order)
    soft = model.get_input_embeddings()(candidates()).detach().requires_grad_()
    hard = scorer(candidates(), *padded(texts(), "left"))
    got = scorer(soft, *padded(texts(), "left"))
    assert torch.equal(got, hard)
    assert not got.requires_grad


def test_no_prompt_gives_the_texts_alone() -> None:
    model, module = build("BERT", "FEATURE_EXTRACTION"), head()
    ids, mask = padded(texts(), "right")
    got = CandidateScorer(model, Head(module))(torch.empty(1, 0, dtype=torch.int64), ids, mask)
    with torch.no_grad():
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state
        expected = module((states * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True))
    torch.testing.assert_close(got[0], expected)


def test_token_types_go_with_their_tokens() -> None:
    model, module = build("BERT", "FEATURE_EXTRACTION"), head()
    ids, mask = padded(texts(), "left")
    kinds = torch.randint(2, ids.shape, generator=draw(6))
    got = CandidateScorer(model, Head(module))(candidates(), ids, mask, kinds)
    for i, prompt in enumerate(candidates()):
        for j, row in enumerate(texts()):
            own = kinds[j, -len(row) :]
            given = torch.cat([torch.zeros(M, dtype=torch.int64), own]).unsqueeze(0)
            with torch.no_grad():
                output = model(torch.cat([prompt, row]).unsqueeze(0), token_type_ids=given)
                expected = module(output.last_hidden_state[0, M:].mean(0))
            torch.testing.assert_close(got[i, j], expected)


def test_a_chunk_is_one_splice_and_one_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no chunk is larger than max_rows; texts are looked up by the splice alone."""
    model = build("BERT", "FEATURE_EXTRACTION")
    spliced: list[dict[str, Any]] = []
    looked_up: list[int] = []
    forwards: list[tuple[int, ...]] = []

    def splice(prompt: Tensor, **given: Any) -> Tensor:
        spliced.append(given)
        return splice_prompt(prompt, **given)

    monkeypatch.setattr(scoring, "splice_prompt", splice)
    scorer = CandidateScorer(model, Head(head()), max_rows=10)
    model.encoder.register_forward_pre_hook(
        lambda module, args: forwards.append(tuple(args[0].shape[:2]))
    )
    layer = model.get_input_embeddings()
    call = type(layer).forward

    def counted(self: nn.Module, ids: Tensor) -> Tensor:
        if self is layer:
            looked_up.append(ids.numel())
        return call(self, ids)

    monkeypatch.setattr(type(layer), "forward", counted)
    scorer(candidates(), *padded(texts(), "right", extra=9))
    assert looked_up == [N * M]
    # Sorted by length, two texts with all five candidates: of 2, 5 and 7 tokens at most.
    assert forwards == [(10, M + 2), (10, M + 5), (10, M + 7)]
    assert all(given["weight"] is layer.weight for given in spliced)
    assert len(spliced) == len(forwards)


def test_more_candidates_than_rows_share_the_keys_and_values_of_a_text() -> None:
    model = build("GPT-2", "CAUSAL_LM")
    forwards: list[tuple[int, ...]] = []
    model.transformer.h[0].register_forward_pre_hook(
        lambda module, args: forwards.append(tuple(args[0].shape[:2]))
    )
    scorer = CandidateScorer(model, LabelWords(WORDS), order="text prompt", max_rows=3)
    scorer(candidates(), *padded(texts()[:2], "right"))
    assert forwards == [(1, 4), (3, M), (2, M), (1, 7), (3, M), (2, M)]


def test_the_model_is_left_as_it_was() -> None:
    model = build("Llama", "CAUSAL_LM")
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    scorer = CandidateScorer(model, LabelWords(WORDS))
    scorer(candidates(), *padded(texts(), "left"))
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert model(torch.ones(1, 5, dtype=torch.int64)).logits.shape == (1, 5, VOCABULARY)


def scorer_of(readout: Any = None, name: str = "BERT", **choices: Any) -> CandidateScorer:
    task = "CAUSAL_LM" if name in DECODERS else "FEATURE_EXTRACTION"
    model = build(name, task, torch.float32)
    return CandidateScorer(model, readout or LabelEmbeddings(torch.eye(C, WIDTH)), **choices)


def score(**changes: Any) -> Tensor:
    given: dict[str, Any] = {"prompts": candidates(), "input_ids": padded(texts(), "right")[0]}
    return scorer_of()(**{**given, **changes})


BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: Head(nn.Identity(), "max"), ValueError,
     "pooling: expected one of mean, first, last, got 'max'"),
    (lambda: LabelEmbeddings(torch.ones(3)), ValueError,
     "embeddings: expected shape [C, h], got [3]"),
    (lambda: LabelWords(torch.ones(3)), TypeError,
     "token_ids: expected a tensor of int64 or int32, got torch.float32"),
    (lambda: scorer_of(nn.Identity()), TypeError,
     "readout: expected Head, LabelEmbeddings or LabelWords, got Identity"),
    (lambda: scorer_of(order="both"), ValueError,
     "order: expected one of prompt text, text prompt, got 'both'"),
    (lambda: scorer_of(max_rows=0), ValueError, "max_rows: expected an integer >= 1, got 0"),
    (lambda: scorer_of(LabelWords(WORDS)), TypeError,
     "backbone: expected a model with a language-model head for LabelWords, got BertModel"),
    (lambda: CandidateScorer(build("BERT", "FEATURE_EXTRACTION").train(), Head(head())),
     ValueError, "backbone: expected evaluation mode (backbone.eval()), got training"),
    (lambda: scorer_of(order="text prompt"), ValueError,
     'order: expected "prompt text" for a model that is not a causal one with keys and values in '
     'every layer, got "text prompt" for BertModel'),
    (lambda: scorer_of(LabelWords(WORDS, MASK), "Llama", order="text prompt"), ValueError,
     'mask_token_id: expected None for order "text prompt", which reads the answer at the '
     "prompt's last token, got 60"),
    (lambda: scorer_of(name="Llama", order="text prompt"), ValueError,
     'pooling: expected "last" for order "text prompt", got \'mean\''),
    (lambda: score(prompts=[1, 2]), TypeError, "prompts: expected a tensor, got list"),
    (lambda: score(prompts=torch.ones(2, 3, 5)), ValueError,
     "prompts: expected shape [N, m, 32], got [2, 3, 5]"),
    (lambda: score(prompts=candidates()[0]), ValueError,
     "prompts: expected shape [N, m], got [3]"),
    (lambda: score(prompts=candidates()[:0]), ValueError,
     "prompts: expected N >= 1 and m >= 0, got shape [0, 3]"),
    (lambda: score(prompts=candidates() + 58), IndexError,
     f"prompts: expected ids from 0 to 60, got {int(candidates().max()) + 58}"),
    (lambda: score(attention_mask=torch.ones(6, 3).long()), ValueError,
     "attention_mask: expected shape [6, 7] to match input_ids [6, 7], got [6, 3]"),
    (lambda: score(attention_mask=-padded(texts(), "right")[1]), ValueError,
     "attention_mask: expected only 0 and 1, got -1 at row 0, column 0"),
    (lambda: score(attention_mask=torch.ones(6, 7).long().index_fill(0, torch.tensor([2]), 0)),
     ValueError, "input_ids: expected at least one real token in every text, got none in row 2"),
    (lambda: score(input_ids=torch.full((2, 3), 61)), IndexError,
     "input_ids: expected ids from 0 to 60, got 61 at row 0, column 0"),
    (lambda: score(input_ids=torch.ones(1, 62).long()), ValueError,
     "input_ids: expected at most 61 tokens (the model's 64 positions without the prompt's 3), "
     "got 62"),
    (lambda: CandidateScorer(build("BERT", "MASKED_LM"), LabelWords(WORDS, MASK))(
        candidates(), torch.ones(2, 3).long()), ValueError,
     "input_ids: expected one mask token 60 in every text, got 0 in row 0"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_mistakes(
    call: Callable[[], object], error: type[Exception], message: str, root: Path
) -> None:
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == message
    page = (root / "docs" / "errors.md").read_text(encoding="utf-8")
    assert f"| {error.__name__} | `{message}` |" in page
