"""Rows with target texts: tokenising, batches, and the metrics of what is written."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ept_fast.training.batches import Collator, GroupedBatches
from ept_fast.training.data import DataError, Rows
from ept_fast.training.metrics import exact_match, goodness, perplexity, token_f1
from ept_fast.training.report import write_samples
from ept_fast.training.tokens import TextForm, end_token, tokenise_inputs, tokenise_text
from tests.tiny import save_word_tokenizer

# ids of the words in the tests below; <s> is 1 and </s> is 2
ID = {"the": 14, "a": 15, "play": 16, "song": 17, "walk": 18, "soup": 19, "yes": 25, "good": 26}


@pytest.fixture(scope="module")
def ending(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer that ends every text, as T5's."""
    return _tokenizer(tmp_path_factory.mktemp("ending"), start=False, end=True, padding=True)


@pytest.fixture(scope="module")
def starting(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer that starts every text and cannot pad, as Llama's."""
    return _tokenizer(tmp_path_factory.mktemp("starting"), start=True, end=False, padding=False)


def _tokenizer(folder: Path, **choices: bool) -> Any:
    import transformers

    save_word_tokenizer(folder, **choices)
    return transformers.AutoTokenizer.from_pretrained(folder)


def rows_of(*pairs: tuple[str, str | None]) -> Rows:
    texts, targets = zip(*pairs, strict=True)
    lines = tuple(range(1, len(pairs) + 1))
    return Rows(texts, None, None, "d", lines, None if targets[0] is None else targets)


def test_seq2seq_rows(ending: Any) -> None:
    rows = rows_of(("the play", "yes"), ("the song a walk", "good good good"))
    tokens = tokenise_text(rows, ending, TextForm("seq2seq", 4, 3))
    assert tokens[0] == {"input_ids": [14, 16, 2], "labels": [25, 2]}
    assert tokens[1] == {"input_ids": [14, 17, 15, 2], "labels": [26, 26, 26]}  # no end: it was cut
    assert (tokens.num_cut, tokens.num_targets_cut, tokens.num_label_tokens) == (1, 1, 5)
    assert tokens.lengths == [3, 4]


def test_a_target_gets_an_end_if_the_tokenizer_gives_none(starting: Any) -> None:
    tokens = tokenise_text(rows_of(("the play", "yes")), starting, TextForm("seq2seq", 8, 8))
    assert tokens[0] == {"input_ids": [1, 14, 16], "labels": [1, 25, 2]}


def test_causal_rows(starting: Any) -> None:
    rows = rows_of(("the play", "yes"), ("the song a walk", "good good good"))
    tokens = tokenise_text(rows, starting, TextForm("causal", 4, 3, separator=" soup"))
    assert tokens[0] == {
        "input_ids": [1, 14, 16, 19, 25, 2],
        "labels": [-100, -100, -100, -100, 25, 2],
    }
    # The text lost its beginning, but not the token that starts every text.
    assert tokens[1] == {
        "input_ids": [1, 15, 18, 19, 26, 26, 26],
        "labels": [-100] * 4 + [26, 26, 26],
    }
    assert (tokens.num_cut, tokens.num_targets_cut) == (1, 1)


def test_a_causal_text_has_no_end_and_its_cut_is_the_same_in_prediction(
    ending: Any, starting: Any
) -> None:
    form = TextForm("causal", 4, 2, separator=" soup")
    for tokenizer, start in ((ending, []), (starting, [1])):
        rows = rows_of(("the play", "yes"), ("the song a walk a walk", "good"))
        inputs = tokenise_inputs(rows, tokenizer, form)
        assert inputs[0] == {"input_ids": [*start, 14, 16, 19]}
        assert inputs[1] == {
            "input_ids": ([*start, 18, 15, 18, 19] if not start else [1, 15, 18, 19])
        }
        trained = tokenise_text(rows, tokenizer, form)
        for index in range(2):
            text = inputs[index]["input_ids"]
            assert trained[index]["input_ids"][: len(text)] == text
            assert trained[index]["labels"][: len(text)] == [-100] * len(text)


def test_texts_that_are_learnt_themselves(starting: Any, ending: Any) -> None:
    form = TextForm("causal", 4, 9, separator=" soup", targets=False)
    rows = rows_of(("the play", None), ("the song a walk", None))
    tokens = tokenise_text(rows, starting, form)
    assert tokens[0] == {"input_ids": [1, 14, 16, 2], "labels": [-100, 14, 16, 2]}
    assert tokens[1] == {"input_ids": [1, 14, 17, 15], "labels": [-100, 14, 17, 15]}
    assert (tokens.num_cut, tokens.num_targets_cut) == (1, 0)
    assert tokenise_text(rows, ending, form)[0] == {
        "input_ids": [14, 16, 2],
        "labels": [14, 16, 2],
    }
    assert tokenise_inputs(rows, starting, form)[0] == {"input_ids": [1, 14, 16]}


# which tokenizer, form, the least limit that leaves room for a token of a text or a target
NO_ROOM: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "an end token": ("ending", {"task": "seq2seq"}, "max_length", 2),
    "a start token": ("starting", {"task": "causal"}, "max_length", 2),
    "a separator": ("ending", {"task": "causal", "separator": " soup"}, "max_length", 2),
    "both": ("starting", {"task": "causal", "separator": " soup soup"}, "max_length", 4),
    "a target's start": ("starting", {"task": "seq2seq"}, "max_target_length", 2),
}


@pytest.mark.parametrize("case", NO_ROOM)
def test_a_limit_without_room_for_a_token_is_an_error(
    case: str, request: pytest.FixtureRequest
) -> None:
    name, form, field, least = NO_ROOM[case]
    tokenizer = request.getfixturevalue(name)
    rows = rows_of(("walk " * 9, "good " * 9))
    limits = {"max_length": 9, "max_target_length": 9}
    learnt = tokenise_text(rows, tokenizer, TextForm(**form, **{**limits, field: least}))
    assert {ID["walk"], ID["good"]} <= {*learnt[0]["input_ids"], *learnt[0]["labels"]}
    for limit in range(1, least):
        with pytest.raises(ValueError, match=rf"^{field}: expected at least {least}, .* {limit}$"):
            tokenise_text(rows, tokenizer, TextForm(**form, **{**limits, field: limit}))


def test_an_empty_text_is_read_if_it_has_a_token(starting: Any, ending: Any) -> None:
    rows = rows_of(("the play", None), ("", None))
    causal = TextForm("causal", 4, 2, separator="")
    assert tokenise_inputs(rows, ending, TextForm("seq2seq", 4, 2))[1] == {"input_ids": [2]}
    assert tokenise_inputs(rows, starting, causal)[1] == {"input_ids": [1]}
    with pytest.raises(DataError, match="d, row 2: text: expected at least one token, got"):
        tokenise_inputs(rows, ending, causal)


def test_a_tokenizer_without_an_end_is_an_error(ending: Any) -> None:
    class Endless:
        eos_token_id = None

    with pytest.raises(ValueError, match=r"tokenizer: expected one with an end token .*Endless"):
        end_token(Endless())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"task": "classification"}, ValueError, "task: expected one of seq2seq, causal"),
        ({"max_length": 0}, ValueError, "max_length: expected an integer >= 1"),
        ({"max_target_length": 2.0}, TypeError, "max_target_length: expected an integer"),
        ({"separator": None}, TypeError, "separator: expected a string"),
        ({"targets": 1}, TypeError, "targets: expected a bool"),
    ],
)
def test_forms_are_checked(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TextForm(**{"task": "causal", "max_length": 4, "max_target_length": 4, **changes})


# Batches --------------------------------------------------------------------------------------


def test_labels_are_padded_on_their_own(starting: Any, ending: Any) -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [8]}, {"input_ids": [5], "labels": [8, 9]}]
    batch = Collator.of(starting, "left")(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [2, 2, 5]]  # no padding token: the end
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["labels"].tolist() == [[8, -100], [8, 9]]
    assert Collator.of(ending) == Collator(0, "right")


@pytest.mark.parametrize("count", [8, 16, 23, 25])
@pytest.mark.parametrize(("size", "parts", "world"), [(8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 8, 1)])
def test_a_step_has_the_same_rows_however_it_is_divided(
    size: int, parts: int, world: int, count: int
) -> None:
    lengths = torch.randint(3, 40, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    steps = GroupedBatches(lengths, 8, 10_000, seed=5).steps_of(3.0)
    whole = list(GroupedBatches(lengths, 8, steps, seed=5))
    divided = [
        list(GroupedBatches(lengths, size, steps, 5, parts=parts, rank=r, world_size=world))
        for r in range(world)
    ]
    assert {len(batches) for batches in divided} == {steps * parts}
    for step in range(steps):
        shares = [b for batches in divided for b in batches[step * parts : (step + 1) * parts]]
        assert all(shares)
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1
        if count % 8 == 0 or count % 8 >= parts * world:  # else the last rows join another step
            assert sorted(itertools.chain(*shares)) == sorted(whole[step])


def test_small_remainders_join_another_step() -> None:
    batches = list(GroupedBatches([4] * 9, 2, 4, seed=0, parts=2))
    assert sorted(itertools.chain(*batches)) == sorted([*range(9), *range(9)])  # of 4 and 5 rows
    assert sorted(map(len, batches)) == [2, 2, 2, 2, 2, 2, 3, 3]
    with pytest.raises(
        ValueError, match="gradient_accumulation_steps: expected at least a row for"
    ):
        GroupedBatches([4, 4], 1, 1, seed=0, parts=3)


# Metrics --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "target", "same"),
    [
        ("yes", "yes", True),
        (" yes\n", "yes", True),
        ("it  is\tso", "it is so", True),
        ("Yes", "yes", False),
        ("yes.", "yes", False),
        ("", "yes", False),
    ],
)
def test_exact_match(output: str, target: str, same: bool) -> None:
    assert exact_match(output, target) is same


# output, target, F1 worked out by hand
F1 = [
    ([1, 2, 3], [1, 2, 3], 1.0),
    ([3, 1, 2], [1, 2, 3], 1.0),
    ([1, 1], [1], 2 / 3),  # precision 1/2, recall 1
    ([1, 2], [2, 3, 4], 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3)),
    ([1], [2], 0.0),
    ([], [1], 0.0),
    ([], [], 1.0),
]


@pytest.mark.parametrize(("output", "target", "expected"), F1)
def test_token_f1(output: list[int], target: list[int], expected: float) -> None:
    assert token_f1(output, target) == pytest.approx(expected, abs=1e-12)


def test_perplexity_and_goodness() -> None:
    assert perplexity(math.log(7)) == pytest.approx(7)
    assert math.isfinite(perplexity(1e6))
    assert goodness("f1", 0.25) == 0.25
    assert goodness("loss", 0.25) == -0.25


def test_samples_are_readable(tmp_path: Path) -> None:
    judged = {"target": "yes", "exact_match": False, "f1": 0.5}
    samples = [{"text": "# one\n\n```two", "output": "", **judged}]
    write_samples(samples, tmp_path / "samples.md")
    assert (tmp_path / "samples.md").read_text() == (
        "# What the adapter writes\n\n"
        "0 of 1 outputs match their target; mean F1 0.500.\n\n"
        "## 1: F1 0.500\n\n"
        "text:\n\n    # one\n    \n    ```two\n\n"
        "target:\n\n    yes\n\n"
        "output:\n\n    \n"
    )
    write_samples([{"text": "a", "output": "b"}], tmp_path / "samples.md")
    assert "match" not in (tmp_path / "samples.md").read_text()
