"""Prototypes of hidden states, and prompts that start from them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ept_fast import EPTConfig, FusedEPTPrompt, from_prototypes, get_ept_model
from ept_fast.prompts import prototypes as module
from ept_fast.prompts.prototypes import HOWS
from ept_fast.training.config import TrainConfig
from tests.architectures import BY_NAME, VOCABULARY
from tests.tiny import save_model, save_task, small_run, tensors_of

pytestmark = pytest.mark.usefixtures("one_thread")

D = 8
LENGTHS = (7, 0, 3, 12)
PADDINGS = ("right", "left", "holes")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(padding: str = "right", width: int = D) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Padded states (NaN in the padding), their mask, and the real rows of each text."""
    texts = [torch.randn(n, width, generator=seeded(n)) for n in LENGTHS]
    states = torch.full((len(texts), 14, width), torch.nan)
    mask = torch.zeros(len(texts), 14, dtype=torch.int64)
    for row, text in enumerate(texts):
        columns = torch.randperm(14, generator=seeded(row))[: len(text)].sort().values
        at = {"right": slice(len(text)), "left": slice(14 - len(text), 14), "holes": columns}
        states[row, at[padding]] = text
        mask[row, at[padding]] = 1
    return states, mask, texts


def windows_of(texts: list[Tensor], count: int, how: str) -> list[tuple[float, ...]]:
    """Every window's row, by a loop over texts and tokens."""
    rows = []
    for text in texts:
        size = max(1, len(text) // max(count - 1, 1))
        for start in range(0, len(text), size):
            window = text[start : start + size]
            row = window.mean(0) if how == "mean" else window.max(0).values
            rows.append(tuple(row.tolist()))
    return rows


def tuples(rows: Tensor) -> list[tuple[float, ...]]:
    return [tuple(row) for row in rows.tolist()]


@pytest.mark.parametrize("count", [1, 4, 22])
@pytest.mark.parametrize("how", HOWS)
def test_padding_does_not_count(how: str, count: int) -> None:
    """Rows are the same to the bit wherever the padding is, and finite; the generator decides."""
    first, *others = (
        from_prototypes(*make(padding)[:2], count, how, seeded(3)) for padding in PADDINGS
    )
    assert first.shape == (count, D)
    assert first.dtype == torch.float32
    assert bool(first.isfinite().all())
    assert all(torch.equal(first, other) for other in others)
    other = from_prototypes(*make()[:2], count, how, seeded(4))
    if count > 1:
        assert torch.equal(first, other) == (how == "kmeans")


@pytest.mark.parametrize("count", [5, 22, 50])
def test_random_rows_are_tokens_each_once_while_there_are_enough(count: int) -> None:
    states, mask, texts = make()
    rows = tuples(from_prototypes(states, mask, count, "random", seeded()))
    every = tuples(torch.cat(texts))
    assert len(every) == 22
    uses = [rows.count(row) for row in every]
    assert sum(uses) == count
    assert set(uses) <= {count // 22, -(-count // 22)}


def test_random_rows_come_from_all_tokens_alike() -> None:
    states, mask, texts = make()
    every = tuples(torch.cat(texts))
    draw = seeded()
    drawn = [tuples(from_prototypes(states, mask, 1, "random", draw))[0] for _ in range(660)]
    assert all(12 < drawn.count(row) < 55 for row in every)  # 30 each are expected


@pytest.mark.support(row="SPT", column="definition")
@pytest.mark.parametrize("how", ["mean", "max"])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 9, 40])
def test_windows(count: int, how: str) -> None:
    """Drawn from the windows of a plain loop, none twice while there are enough."""
    states, mask, texts = make("left")
    every = torch.tensor(windows_of(texts, count, how))
    rows = from_prototypes(states, mask, count, how, seeded())
    gap, found = torch.cdist(rows.double(), every.double()).min(1)
    assert float(gap.max()) < 1e-6
    uses = found.bincount(minlength=len(every))
    assert int(uses.max() - uses.min()) <= 1


@pytest.mark.support(row="SPT", column="definition")
def test_k_means_gives_the_different_rows_if_there_are_as_many() -> None:
    """To the bit, however often each occurs; fewer are repeated in their order."""
    table = torch.randn(5, D, generator=seeded())
    states = table[torch.tensor([[0, 1, 1, 4, 4, 4], [2, 2, 3, 0, 0, 0]])]
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    rows = from_prototypes(states, mask, 5)
    assert sorted(tuples(rows)) == sorted(tuples(table))
    assert torch.equal(from_prototypes(states, mask, 12), rows.repeat(3, 1)[:12])


def test_k_means_are_means_of_their_clusters() -> None:
    states, mask, texts = make()
    rows, every = from_prototypes(states, mask, 4).double(), torch.cat(texts).double()
    nearest = torch.cdist(every, rows).argmin(1)
    for number in range(4):
        torch.testing.assert_close(
            rows[number], every[nearest == number].mean(0), rtol=1e-6, atol=1e-6
        )


def test_k_means_sees_a_drawn_part_of_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many different rows as k-means may see come back as they are: those that were drawn."""
    monkeypatch.setattr(module, "KMEANS_ROWS", 6)
    states, mask, texts = make()
    rows = from_prototypes(states, mask, 6, generator=seeded())
    assert len(set(tuples(rows))) == 6
    assert set(tuples(rows)) <= set(tuples(torch.cat(texts)))
    assert not torch.equal(rows, from_prototypes(states, mask, 6, generator=seeded(1)))


@pytest.mark.parametrize("how", HOWS)
def test_many_texts_go_by_in_batches(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    states = torch.randn(70, 5, D, generator=seeded())
    mask = torch.ones(70, 5)
    whole = from_prototypes(states, mask, 60, how, seeded(1))
    monkeypatch.setattr(module, "_BATCH", 3)
    assert torch.equal(from_prototypes(states, mask, 60, how, seeded(1)), whole)


def test_states_are_left_alone() -> None:
    states = torch.randn(3, 4, D, dtype=torch.bfloat16).requires_grad_()
    before = states.detach().clone()
    rows = from_prototypes(states, torch.ones(3, 4, dtype=torch.bool), 2, "mean")
    assert not rows.requires_grad
    assert rows.dtype == torch.float32
    assert torch.equal(states, before)


STATES, MASK = torch.zeros(2, 3, D), torch.ones(2, 3)
BAD: list[tuple[tuple[Any, ...], type[Exception], str]] = [
    (([1], MASK, 2), TypeError, "hidden_states: expected a tensor, got list"),
    ((STATES, None, 2), TypeError, "attention_mask: expected a tensor, got NoneType"),
    (
        (STATES.long(), MASK, 2),
        TypeError,
        "hidden_states: expected a floating dtype, got torch.int64",
    ),
    ((STATES[0], MASK, 2), ValueError, "hidden_states: expected shape [N, S, d], got [3, 8]"),
    (
        (STATES, MASK[:, :2], 2),
        ValueError,
        "attention_mask: expected shape [2, 3] to match hidden_states [2, 3, 8], got [2, 2]",
    ),
    (
        (STATES, torch.zeros(2, 3), 2),
        ValueError,
        "attention_mask: expected at least one real token, got none",
    ),
    (
        (STATES[:0], MASK[:0], 2),
        ValueError,
        "attention_mask: expected at least one real token, got none",
    ),
    ((STATES, MASK, 0), ValueError, "count: expected an integer >= 1, got 0"),
    ((STATES, MASK, 2, "median"), ValueError, f"how: expected one of {', '.join(HOWS)}, got "),
]


@pytest.mark.parametrize(("given", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_arguments(given: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        from_prototypes(*given)
    assert str(caught.value).startswith(message)


# Prompts


class Letters:
    """Letters to ids from 3 on; id 2 before and behind a text, unless asked not to."""

    def __call__(
        self,
        texts: list[str],
        add_special_tokens: bool = True,
        truncation: bool = False,
        max_length: int = 10**6,
    ) -> dict[str, list[list[int]]]:
        rows = [[(ord(c) - ord("a")) % (VOCABULARY - 3) + 3 for c in text] for text in texts]
        if add_special_tokens:
            limit = max_length - 2 if truncation else None
            rows = [[2, *row[:limit], 2] for row in rows]
        return {"input_ids": rows}


TEXTS = ("the play was fine", "", "a walk", "abcdefghij" * 4, "q")
DATA: dict[str, Any] = {"init": "data", "text": TEXTS, "tokenizer": Letters()}


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    columns = itertools.zip_longest(*rows)
    ids = torch.tensor([[-1 if i is None else i for i in column] for column in columns]).T
    return ids.clamp_min(0), (ids >= 0).long()


@pytest.mark.parametrize("how", HOWS)
def test_a_prompt_from_prototypes_of_embeddings(how: str) -> None:
    """Those of the texts' embeddings without special tokens; the offset from what they leave."""
    table = nn.Embedding(VOCABULARY, D)
    config = EPTConfig(D, num_virtual_tokens=4, max_length=16, rank=2)
    prompt, again = (
        FusedEPTPrompt(config, table, prototypes=how, generator=seeded(5), **DATA) for _ in range(2)
    )
    ids, mask = padded(Letters()(list(TEXTS), add_special_tokens=False)["input_ids"])
    if how == "kmeans":  # which starts from different tokens, by how often they occur
        rows = FusedEPTPrompt(config, table, **DATA).short_prompt
    else:
        rows = from_prototypes(table(ids), mask, 4, how, seeded(5))
    assert torch.equal(prompt.short_prompt, rows)
    assert torch.equal(prompt.offset_b, again.offset_b)
    real = table(ids)[mask != 0].double()
    nearest = torch.cdist(real, prompt.short_prompt.double()).argmin(1)
    left = real - prompt.short_prompt.double()[nearest]
    _, _, directions = torch.linalg.svd(left, full_matrices=False)
    unit = nn.functional.normalize(prompt.offset_b.double(), dim=1)
    inside = (unit @ directions[:2].T).norm(dim=1)
    torch.testing.assert_close(inside, torch.ones_like(inside), rtol=1e-5, atol=1e-5)


def test_the_default_draws_nothing() -> None:
    table, draw = nn.Embedding(VOCABULARY, D), seeded(5)
    config = EPTConfig(D, num_virtual_tokens=4, max_length=16, rank=2, num_spaces=0)
    FusedEPTPrompt(config, table, generator=draw, **DATA)
    assert torch.equal(draw.get_state(), seeded(5).get_state())


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("BERT", "SEQ_CLS"),
        ("RoBERTa", "FEATURE_EXTRACTION"),
        ("GPT-2", "CAUSAL_LM"),
        ("Llama", "CAUSAL_LM"),
        ("T5", "SEQ_2_SEQ_LM"),
        ("BART", "SEQ_2_SEQ_LM"),
    ],
)
def test_a_prompt_from_prototypes_of_a_layer(name: str, task: str, layer: int, how: str) -> None:
    """Those of the states that the library's own model gives, padded on the right."""
    built = BY_NAME[name].build(task)
    config = EPTConfig(32, num_virtual_tokens=6, max_length=30, rank=2)
    model = get_ept_model(
        built, config, task, prototypes=how, prototype_layer=layer, generator=seeded(2), **DATA
    )
    assert all(p.grad is None for p in built.parameters())
    rows = Letters()(list(TEXTS), truncation=True, max_length=30)["input_ids"]
    assert max(map(len, rows)) == 30  # the fourth text is cut
    ids, mask = padded(rows)
    plain = built.get_encoder() if task == "SEQ_2_SEQ_LM" else built.base_model
    with torch.no_grad():
        states = plain.eval()(
            input_ids=ids.masked_fill(mask == 0, built.config.pad_token_id), attention_mask=mask,
            output_hidden_states=True,
        ).hidden_states  # fmt: skip
    assert len(states) == 3
    expected = from_prototypes(states[layer], mask, 6, how, seeded(2))
    torch.testing.assert_close(model.prompt.short_prompt.detach(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("choices", "error", "message"),
    [
        (
            {**DATA, "prototype_layer": 2},
            ValueError,
            "prototype_layer: expected a layer from 0 to 1, got 2",
        ),
        (
            {**DATA, "prototype_layer": -1},
            ValueError,
            "prototype_layer: expected an integer >= 0, got -1",
        ),
        (
            {**DATA, "prototype_layer": "1"},
            TypeError,
            "prototype_layer: expected an integer, got str '1'",
        ),
        (
            {"prototype_layer": 1},
            ValueError,
            'prototype_layer: expected None unless init="data", got 1',
        ),
        (
            {"prototypes": "mean"},
            ValueError,
            'prototypes: expected "kmeans" unless init="data", got \'mean\'',
        ),
        (
            {**DATA, "prototypes": "median"},
            ValueError,
            "prototypes: expected one of kmeans, random, mean, max, got 'median'",
        ),
        (
            {**DATA, "prototype_layer": 1, "text": "abc"},
            ValueError,
            "text, tokenizer: expected a sequence of strings and a tokenizer for "
            "init=\"data\", got text 'abc' and tokenizer Letters",
        ),
    ],
)
def test_errors_leave_the_model_as_it_was(
    choices: dict[str, Any], error: type[Exception], message: str
) -> None:
    built = BY_NAME["BERT"].build("SEQ_CLS")
    with pytest.raises(error) as caught:
        get_ept_model(built, EPTConfig(32, max_length=16, rank=2), "SEQ_CLS", **choices)
    assert str(caught.value) == message
    assert built.training
    assert all(p.requires_grad for p in built.parameters())


def test_states_of_another_width_are_refused() -> None:
    built = BY_NAME["ALBERT"].build("FEATURE_EXTRACTION")
    width = BY_NAME["ALBERT"].width
    states = built.config.hidden_size
    assert width != states
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        get_ept_model(
            built, EPTConfig(width, rank=2), "FEATURE_EXTRACTION", prototype_layer=1, **DATA
        )
    assert str(caught.value) == (
        f"prototype_layer: expected states of width hidden_size {width}, got {states} at layer 1"
    )


def test_a_prompt_by_itself_knows_no_layers() -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        FusedEPTPrompt(EPTConfig(D, rank=0), nn.Embedding(VOCABULARY, D), prototype_layer=1, **DATA)
    assert str(caught.value) == (
        "prototype_layer: expected None, as a prompt by itself knows no layers (get_ept_model and "
        "add_adapter do), got 1"
    )


def test_the_model_is_in_training_mode_again() -> None:
    model = get_ept_model(BY_NAME["BERT"].build("SEQ_CLS"), EPTConfig(32, rank=2), "SEQ_CLS")
    model.add_adapter("other", EPTConfig(32, rank=2), prototype_layer=1, **DATA)
    assert model.training
    assert not model.backbone.training


@pytest.mark.parametrize("layer", [None, 1])
def test_a_run_starts_from_prototypes(
    layer: int | None, tmp_path: Path, empty_pictures: None
) -> None:
    from ept_fast.training.job import train

    model, data = save_model(tmp_path / "model"), save_task(tmp_path / "data")
    run = small_run(
        model, data, tmp_path / "out", init="data", prototypes="random", max_steps=1,
        prompt_lr=1e-9, eval_steps=1,
    )  # fmt: skip
    train(TrainConfig(**run, prototype_layer=layer))
    short = tensors_of(tmp_path / "out")["short_prompt"]
    import transformers

    backbone = transformers.AutoModel.from_pretrained(model)
    table = backbone.get_input_embeddings().weight
    distance = torch.cdist(short, table).min(1).values
    assert bool((distance < 1e-2).all()) == (layer is None)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (
            {"prototypes": "mean"},
            'prototypes: expected "kmeans" unless init="data", got \'mean\'',
        ),
        ({"prototype_layer": 0}, 'prototype_layer: expected None unless init="data", got 0'),
        (
            {"init": "data", "prototype_layer": -1},
            "prototype_layer: expected an integer >= 0, got -1",
        ),
    ],
)
def test_a_run_that_cannot_start_so(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        TrainConfig(model="m", data="d", output="o", **choices)
    assert str(caught.value) == message
