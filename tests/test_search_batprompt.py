"""BATprompt: perturbed texts, the attack by the model's own loss, prompts that stand it."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ept_fast.search import (
    PERTURBERS,
    adversarial_loss,
    perturb,
    robust_search,
    similarity,
    substitute,
    worst_case,
)

TEXT = "the movie was good and the story had a very strange and funny beginning"
TEXTS = [TEXT, "what is the name of the famous city in the new world ?"]


@pytest.mark.parametrize("kind", PERTURBERS)
def test_perturbers_change_a_text_and_keep_it_close(kind: str) -> None:
    perturber = PERTURBERS[kind]
    made = [perturber(TEXT, random.Random(seed)) for seed in range(20)]
    assert all(text != TEXT for text in made)
    assert all(similarity(TEXT, text) > 0.6 for text in made)
    assert perturber(TEXT, random.Random(3)) == made[3]
    assert len(set(made)) > 1 or kind == "synonyms"


def test_what_the_perturbers_do() -> None:
    rng = random.Random(0)
    assert PERTURBERS["synonyms"]("a Good film", rng) == "a fine movie"
    assert PERTURBERS["random handle"]("x", rng)[0] == "@"
    assert PERTURBERS["trailing noise"]("x y", rng).startswith("x y ")
    for kind, size in (("swap letters", 0), ("delete letters", -1), ("double letters", 1)):
        (word,) = {PERTURBERS[kind]("ab", rng)}
        assert len(word) == 2 + size
    assert PERTURBERS["swap letters"]("ab", rng) == "ba"
    assert PERTURBERS["delete letters"]("ab", rng) == "a"
    assert PERTURBERS["double letters"]("ab", rng) == "abb"
    assert PERTURBERS["swap letters"]("? !", rng) == "? !"  # nothing to change
    words = PERTURBERS["drop stop words"](TEXT, rng).split()
    assert {"movie", "good", "story"} < set(words)
    assert len(words) < len(TEXT.split())


def test_similarity_is_levenshteins() -> None:
    assert similarity("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert similarity("", "") == 1.0
    assert similarity("abc", "") == 0.0
    rng = random.Random(1)
    for _ in range(50):
        first, second = ("".join(rng.choices("ab", k=rng.randint(0, 6))) for _ in range(2))
        # Difflib keeps a common subsequence: at most one step for each letter that is not in it.
        kept = sum(b.size for b in SequenceMatcher(None, first, second).get_matching_blocks())
        steps = (1 - similarity(first, second)) * max(len(first), len(second), 1)
        assert abs(len(first) - len(second)) <= round(steps) <= max(len(first), len(second))
        assert round(steps) <= len(first) + len(second) - 2 * kept
        assert similarity(first, second) == similarity(second, first)


def test_variants_depend_on_text_kind_and_seed_only() -> None:
    variants = perturb(TEXTS, per_kind=3)
    assert len(variants) == 3 * len(PERTURBERS)
    assert variants == perturb(TEXTS, per_kind=3)
    assert [row[1:] for row in variants] == perturb(TEXTS[1:], per_kind=3)
    assert variants != perturb(TEXTS, per_kind=3, seed=1)
    assert perturb(TEXTS, per_kind=1) == variants[::3]


def test_what_is_too_far_from_the_text_is_the_text() -> None:
    calls: dict[str, Callable[[str, random.Random], str]] = {
        "other": lambda text, rng: "zzz",
        "near": lambda text, rng: text + "!",
    }
    assert perturb(["abc def"], perturbers=calls) == [["abc def"], ["abc def!"]]
    assert perturb(["abc def"], perturbers=calls, least_similarity=-1) == [["zzz"], ["abc def!"]]


# A classifier of letters: a prompt's tokens say how much each class likes letters.

LETTERS = "abcdefghij"
VOCABULARY = torch.arange(len(LETTERS))


def classify(prompts: Tensor, texts: Sequence[str]) -> Tensor:
    """Class 1 gains a logit for every letter of the prompt in the text; a "z" takes away two."""
    counts = torch.tensor(
        [[float(text.count(letter)) for letter in LETTERS] for text in texts], dtype=torch.float64
    )
    noise = torch.tensor([float(text.count("z")) for text in texts], dtype=torch.float64)
    one = counts[:, prompts].sum(2).T - 2 * noise
    return torch.stack([torch.full_like(one, 0.5), one], 2)


@pytest.mark.support(row="BATprompt", column="definition")
def test_the_worst_case_is_that_of_a_loop() -> None:
    prompts = torch.tensor([[0, 1], [2, 2], [9, 8]])
    variants = [["aab", "ccj"], ["azb", "cj"], ["b", "jjj"]]
    labels = torch.tensor([1, 0])
    got = worst_case(classify, prompts, variants, labels)
    for n, prompt in enumerate(prompts):
        worst, right, clean = [], [], []
        for b, label in enumerate(labels.tolist()):
            rows = [classify(prompt[None], [texts[b]])[0, 0] for texts in variants]
            losses = [-float(row.log_softmax(0)[label]) for row in rows]
            assert got.losses[n, :, b].tolist() == pytest.approx(losses)
            worst.append(max(losses))
            right.append(all(int(row.argmax()) == label for row in rows))
            clean.append(int(rows[0].argmax()) == label)
        assert float(got.loss[n]) == pytest.approx(sum(worst) / 2)
        assert float(got.worst[n]) == sum(right) / 2
        assert float(got.clean[n]) == sum(clean) / 2


TRAP = ["aaab", "aaac", "ccde", "dcce"]  # class 1 has a; b and c are of no help
TRAP_LABELS = torch.tensor([1, 1, 0, 0])


def _noise(text: str, rng: random.Random) -> str:
    return text + "z" * rng.randint(0, 1)


@pytest.mark.support(row="BATprompt", column="learning")
def test_the_attack_takes_the_highest_loss_and_the_search_withstands_it() -> None:
    """One "a" in the prompt is right on clean texts; with a "z" after them two of them are."""
    seen: list[list[str]] = []

    def watched(prompts: Tensor, texts: Sequence[str]) -> Tensor:
        seen.append(list(texts))
        return classify(prompts, texts)

    start = torch.tensor([[0, 9], [1, 2], [5, 6]])
    g = torch.Generator().manual_seed(0)
    result = robust_search(
        watched, TRAP, TRAP_LABELS, start,
        lambda pool: substitute(pool, 30, VOCABULARY, g),
        rounds=3, keep=2, per_kind=6, perturbers={"noise": _noise},
    )  # fmt: skip
    tried, scored = seen[:2]
    assert len(tried) == 6 * 4
    # A "z" raises the loss of class 1 and lowers that of class 0.
    assert scored == [*TRAP, "aaabz", "aaacz", "ccde", "dcce"]
    assert sorted(result.prompt.tolist()) == [0, 0]
    assert result.pool.shape == (2, 2)
    assert result.pool[0].equal(result.prompt)
    assert len(result.history) == 3
    assert result.history[0] >= result.history[-1]
    assert result.evaluations == sum(
        len(texts) * n for texts, n in zip(seen, counted(seen, start), strict=True)
    )
    noisy = [TRAP, [text + "z" for text in TRAP]]
    before = worst_case(classify, start[:1], noisy, TRAP_LABELS)
    after = worst_case(classify, result.prompt[None], noisy, TRAP_LABELS)
    assert float(after.loss) < float(before.loss)


def counted(seen: list[list[str]], start: Tensor) -> list[int]:
    """Prompts of each call: one for an attack, and the distinct candidates after it."""
    g = torch.Generator().manual_seed(0)
    numbers: list[int] = []
    pool = start
    for texts in seen[1::2]:
        candidates = torch.cat([pool, substitute(pool, 30, VOCABULARY, g)]).unique(dim=0)
        numbers += [1, len(candidates)]
        variants = [texts[:4], texts[4:]]
        loss = worst_case(classify, candidates, variants, TRAP_LABELS).loss
        pool = candidates[loss.argsort(stable=True)[:2]]
    return numbers


def test_substitutes_differ_in_one_token() -> None:
    prompts = torch.tensor([[0, 1, 2], [3, 4, 5]])
    g = torch.Generator().manual_seed(0)
    made = substitute(prompts, 40, VOCABULARY + 100, g)
    changed = (made.unsqueeze(1) != prompts).sum(2).amin(1)
    assert changed.tolist() == [1] * 40
    assert set(made[made >= 100].tolist()) <= set(range(100, 110))
    assert {int(i) for i in (made >= 100).int().argmax(1)} == {0, 1, 2}


# The gradient form


class Letters(torch.nn.Module):
    """A classifier of token ids by their mean embedding."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(2)
        table = torch.randn(20, 3, generator=g, dtype=torch.float64)
        self.table = torch.nn.Parameter(table)
        self.graded: list[bool] = []

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> Any:
        self.graded.append(torch.is_grad_enabled())
        weights = attention_mask.unsqueeze(2).to(self.table)
        logits = (self.table[input_ids] * weights).sum(1) / weights.sum(1)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SimpleNamespace(logits=logits, loss=loss)


def batches() -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    g = torch.Generator().manual_seed(3)
    made: list[dict[str, Tensor]] = []
    for length in (4, 7, 3):
        ids = torch.randint(20, (5, length), generator=g)
        lengths = torch.randint(1, length + 1, (5, 1), generator=g)
        made.append({"input_ids": ids, "attention_mask": (torch.arange(length) < lengths).long()})
    return {**made[0], "labels": torch.tensor([0, 1, 2, 1, 0])}, made[1:]


@pytest.mark.support(row="BATprompt", column="definition")
def test_adversarial_loss_is_that_of_a_loop() -> None:
    model = Letters()
    clean, others = batches()
    loss = adversarial_loss(model, clean, others)
    assert model.graded == [False, False, False, True]
    loss.backward()
    assert model.table.grad is not None
    found, model.table.grad = model.table.grad, None
    total = torch.zeros((), dtype=torch.float64)
    chosen = set()
    for i, label in enumerate(clean["labels"]):
        each = []
        for batch in (clean, *others):
            kept = batch["attention_mask"][i] != 0
            row = model.table[batch["input_ids"][i][kept]].mean(0)
            each.append(F.cross_entropy(row, label))
        worst = max(range(3), key=lambda k: float(each[k].detach()))
        chosen.add(worst)
        total = total + each[worst] / 5
    assert len(chosen) > 1
    torch.testing.assert_close(loss, total)
    total.backward()
    torch.testing.assert_close(found, model.table.grad)


def test_adversarial_loss_trains_a_prompt_of_an_ept_model() -> None:
    from ept_fast import EPTConfig, get_ept_model
    from tests.architectures import BY_NAME, WIDTH

    backbone = BY_NAME["BERT"].build("FEATURE_EXTRACTION")
    config = EPTConfig(WIDTH, num_virtual_tokens=3, max_length=16, rank=0, num_spaces=0)
    g = torch.Generator().manual_seed(4)
    model: Any = get_ept_model(backbone, config, "SEQ_CLS", labels=["a", "b", "c"], generator=g)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    clean, _ = batches()
    noisy = {**clean, "input_ids": clean["input_ids"].clone()}
    noisy["input_ids"][:, 0] = 7
    losses = []
    for _ in range(20):
        loss = adversarial_loss(model, clean, [noisy])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is None for p in model.backbone.parameters())


def _without(batch: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in batch.items() if key != name}


CLEAN, OTHERS = batches()
BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: perturb(TEXTS, perturbers={}), "perturbers: expected at least one, got none"),
    (lambda: perturb(TEXTS, per_kind=0), "per_kind: expected an integer >= 1, got 0"),
    (lambda: worst_case(classify, VOCABULARY[None], [TEXTS, TEXTS[:1]], torch.zeros(2).long()),
     "variants: expected lists of 2 texts, got lengths [2, 1]"),
    (lambda: robust_search(classify, TEXTS, torch.zeros(2).long(), VOCABULARY, lambda p: p),
     "start: expected shape [N, m], N >= 1, got [10]"),
    (lambda: adversarial_loss(Letters(), _without(CLEAN, "labels"), OTHERS),
     "clean_batch: expected labels, got none"),
    (lambda: adversarial_loss(Letters(), CLEAN, [_without(OTHERS[0], "attention_mask")]),
     "perturbed_batches[0]: expected 5 rows of input_ids, attention_mask with an attention_mask, "
     "got {'input_ids': 5, 'attention_mask': None}"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), BAD)
def test_mistakes(call: Callable[[], object], message: str, root: Path) -> None:
    with pytest.raises(ValueError, match="expected") as raised:
        call()
    assert str(raised.value) == message
    page = (root / "docs" / "errors.md").read_text(encoding="utf-8")
    assert f"| ValueError | `{message}` |" in page
