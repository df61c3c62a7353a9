"""BATprompt (arXiv 2412.18196): prompts chosen against perturbed texts.

A round attacks and then optimises. The attack perturbs every text in several ways and keeps those
that the frozen model, behind the prompt as it is, has the highest loss on. The paper's two phases
are written by a large language model; here perturbers are plain functions of a text, and so are
proposals of prompts, and any callable may stand for either. The released code ranks perturbed texts
of classification tasks by similarity alone; here the model's own loss ranks them.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ept_fast.config import check_count, check_number

__all__ = [
    "PERTURBERS",
    "RobustResult",
    "adversarial_loss",
    "perturb",
    "robust_search",
    "similarity",
    "substitute",
    "worst_case",
]

Perturber = Callable[[str, random.Random], str]
Classify = Callable[[Tensor, Sequence[str]], Tensor]  # prompts [N, m], B texts -> [N, B, C]

_STOP_WORDS = {
    "a", "an", "and", "are", "as", "at", "be", "been", "but", "by", "did", "do", "does",
    "for", "from", "had", "has", "have", "if", "in", "into", "is", "it", "its", "of", "on",
    "or", "so", "than", "that", "the", "their", "then", "there", "these", "this", "to", "was",
    "were", "will", "with", "would",
}  # fmt: skip
_SYNONYMS = {
    "bad": "poor", "begin": "start", "best": "finest", "big": "large", "boring": "dull",
    "called": "named", "city": "town", "clever": "smart", "country": "nation", "do": "perform",
    "famous": "renowned", "fast": "quick", "film": "movie", "first": "earliest", "fun": "enjoyable",
    "funny": "amusing", "good": "fine", "great": "superb", "happy": "glad", "hard": "difficult",
    "invented": "devised", "kind": "sort", "large": "big", "long": "lengthy", "made": "produced",
    "many": "numerous", "movie": "film", "name": "title", "new": "recent", "old": "aged",
    "people": "persons", "picture": "film", "real": "true", "sad": "gloomy", "show": "display",
    "small": "little", "smart": "clever", "start": "begin", "story": "tale", "strange": "odd",
    "stupid": "silly", "used": "employed", "work": "effort", "world": "globe",
    "wrote": "authored", "year": "twelvemonth",
}  # fmt: skip


def _places(text: str, rng: random.Random) -> list[int]:
    """One letter in eight, at least one, none at the beginning of a word."""
    inner = [i for i in range(1, len(text)) if text[i].isalpha() and text[i - 1].isalpha()]
    return sorted(rng.sample(inner, min(len(inner), max(1, len(inner) // 8))), reverse=True)


def _swap_letters(text: str, rng: random.Random) -> str:
    letters = list(text)
    for i in _places(text, rng):
        letters[i - 1], letters[i] = letters[i], letters[i - 1]
    return "".join(letters)


def _delete_letters(text: str, rng: random.Random) -> str:
    for i in _places(text, rng):
        text = text[:i] + text[i + 1 :]
    return text


def _double_letters(text: str, rng: random.Random) -> str:
    for i in _places(text, rng):
        text = text[:i] + text[i] + text[i:]
    return text


def _trailing_noise(text: str, rng: random.Random) -> str:
    return f"{text} {''.join(rng.choices(string.ascii_letters + string.digits, k=8))}"


def _random_handle(text: str, rng: random.Random) -> str:
    return f"@{''.join(rng.choices(string.ascii_lowercase + string.digits, k=6))} {text}"


def _drop_stop_words(text: str, rng: random.Random) -> str:
    kept = [w for w in text.split() if w.lower() not in _STOP_WORDS or rng.random() < 0.3]
    return " ".join(kept)


def _synonyms(text: str, rng: random.Random) -> str:
    return " ".join(_SYNONYMS.get(w.lower(), w) for w in text.split())


PERTURBERS: Mapping[str, Perturber] = {
    "swap letters": _swap_letters,
    "delete letters": _delete_letters,
    "double letters": _double_letters,
    "trailing noise": _trailing_noise,
    "random handle": _random_handle,
    "drop stop words": _drop_stop_words,
    "synonyms": _synonyms,
}


def similarity(first: str, second: str) -> float:
    """One minus the Levenshtein distance by the longer text's length; 1 for equal texts."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        above, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (a != b))
    return 1 - row[-1] / max(len(first), len(second), 1)


def perturb(
    texts: Sequence[str],
    *,
    perturbers: Mapping[str, Perturber] = PERTURBERS,
    per_kind: int = 1,
    least_similarity: float = 0.6,
    seed: int = 0,
) -> list[list[str]]:
    """Variants of every text, each close to it and the same for the same seed.

    Args:
        texts: B texts.
        perturbers: functions of a text and of a ``random.Random`` of that text, by name.
        per_kind: variants that each of them makes.
        least_similarity: a variant that is not more like its text, by :func:`similarity`, is
            replaced by the text.
        seed: with the text and the name of the kind, what the variants depend on.

    Returns:
        One list of B texts for each variant, ``per_kind`` of each kind beside each other.

    Raises:
        TypeError, ValueError: no perturber, or numbers that do not fit.
    """
    check_count("per_kind", per_kind, 1)
    check_number("least_similarity", least_similarity)
    if not perturbers:
        raise ValueError("perturbers: expected at least one, got none")
    variants = []
    for name, perturber in perturbers.items():
        for number in range(per_kind):
            made = (perturber(t, random.Random(f"{seed} {name} {number} {t}")) for t in texts)
            pairs = zip(texts, made, strict=True)
            variants.append([v if similarity(t, v) > least_similarity else t for t, v in pairs])
    return variants


@dataclass(frozen=True)
class WorstCase:
    """What N prompts do with B texts and their variants.

    Attributes:
        loss: ``[N]``, the mean over the texts of the highest loss of their variants.
        clean: ``[N]``, the accuracy on the first variant, which is the text itself.
        worst: ``[N]``, how many of the texts are right in every variant.
        losses: ``[N, K, B]``, the cross-entropy of each.
    """

    loss: Tensor
    clean: Tensor
    worst: Tensor
    losses: Tensor


def worst_case(
    classify: Classify, prompts: Tensor, variants: Sequence[Sequence[str]], labels: Tensor
) -> WorstCase:
    """Losses and accuracies of prompts on texts and their variants.

    Args:
        classify: logits ``[N, B, C]`` of prompts and texts, such as a
            :class:`ept_fast.search.CandidateScorer` behind a tokenizer.
        prompts: ``[N, m]`` token ids, or soft prompts ``[N, m, d]``.
        variants: K lists of B texts each; the first has the texts themselves.
        labels: ``[B]`` integers.

    Raises:
        ValueError: lists of unlike lengths.
    """
    sizes = [len(texts) for texts in variants]
    if not sizes or set(sizes) != {len(labels)}:
        raise ValueError(f"variants: expected lists of {len(labels)} texts, got lengths {sizes}")
    logits = classify(prompts, [text for texts in variants for text in texts])
    K, B, C = len(sizes), len(labels), logits.shape[-1]
    logits = logits.view(-1, K, B, C)
    wanted = labels.to(logits.device).expand(logits.shape[:-1])
    losses = F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), reduction="none")
    losses = losses.view(wanted.shape)
    right = logits.argmax(-1) == wanted
    clean, worst = right[:, 0].double().mean(1), right.all(1).double().mean(1)
    return WorstCase(losses.amax(1).mean(1), clean, worst, losses)


def substitute(
    prompts: Tensor, count: int, vocabulary: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """New prompts: drawn from the given ones, with one token replaced by any of the vocabulary.

    Args:
        prompts: ``[N, m]`` token ids.
        count: how many.
        vocabulary: ``[V]`` token ids.
        generator: on the prompts' device.

    Returns:
        ``[count, m]``.
    """
    kind: dict[str, Any] = {"generator": generator, "device": prompts.device}
    made = prompts[torch.randint(len(prompts), (count,), **kind)]
    at = torch.randint(prompts.shape[1], (count, 1), **kind)
    return made.scatter(1, at, vocabulary[torch.randint(len(vocabulary), (count, 1), **kind)])


@dataclass(frozen=True)
class RobustResult:
    """What the search found.

    Attributes:
        prompt: token ids ``[m]`` of the least worst-case loss in the last round.
        pool: the kept prompts of that round, the best first, ``[at most keep, m]``.
        history: the best one's worst-case loss in each round, against that round's attack.
        evaluations: how many pairs of a prompt and a text were scored.
    """

    prompt: Tensor
    pool: Tensor
    history: tuple[float, ...]
    evaluations: int


def robust_search(
    classify: Classify,
    texts: Sequence[str],
    labels: Tensor,
    start: Tensor,
    propose: Callable[[Tensor], Tensor],
    *,
    rounds: int = 5,
    keep: int = 5,
    per_kind: int = 5,
    perturbers: Mapping[str, Perturber] = PERTURBERS,
    least_similarity: float = 0.6,
    seed: int = 0,
) -> RobustResult:
    """Rounds of attack and optimisation over discrete prompts; arXiv 2412.18196.

    Attack: of each kind and text, the variant on which the best prompt has the highest loss.
    Optimisation: the kept prompts and the proposed ones are scored on the texts and these variants;
    those of the least worst-case loss are kept, and the best goes to the next round.

    Args:
        classify: as of :func:`worst_case`.
        texts, labels: development rows, B of each.
        start: the first prompts, ``[N, m]`` token ids; the first of them is attacked first.
        propose: new prompts ``[n, m]`` of the kept ones, such as :func:`substitute`.
        rounds, keep: as in the paper's scripts, 5 and 5.
        per_kind, perturbers, least_similarity: as of :func:`perturb`.
        seed: of the perturbers; each round draws anew.

    Raises:
        TypeError, ValueError: numbers that do not fit, no prompt to start from, other lengths.
    """
    check_count("rounds", rounds, 1)
    check_count("keep", keep, 1)
    if start.dim() != 2 or len(start) == 0:
        raise ValueError(f"start: expected shape [N, m], N >= 1, got {list(start.shape)}")
    given: dict[str, Any] = {"perturbers": perturbers, "least_similarity": least_similarity}
    pool, history, evaluations, B = start, [], 0, len(texts)
    for number in range(rounds):
        tried = perturb(texts, per_kind=per_kind, seed=seed * rounds + number, **given)
        losses = worst_case(classify, pool[:1], tried, labels).losses[0]
        highest = losses.view(-1, per_kind, B).argmax(1).tolist()  # of each kind and text
        variants = [
            [tried[kind * per_kind + at][i] for i, at in enumerate(row)]
            for kind, row in enumerate(highest)
        ]
        candidates = torch.unique(torch.cat([pool, propose(pool)]), dim=0)
        scores = worst_case(classify, candidates, [texts, *variants], labels).loss
        best = scores.argsort(stable=True)[:keep]
        pool = candidates[best]
        history.append(float(scores[best[0]]))
        evaluations += B * (len(tried) + len(candidates) * (1 + len(variants)))
    return RobustResult(pool[0], pool, tuple(history), evaluations)


def adversarial_loss(
    model: Any, clean_batch: Mapping[str, Tensor], perturbed_batches: Sequence[Mapping[str, Tensor]]
) -> Tensor:
    """The loss of each row's worst variant: for a soft prompt, training against the attack.

    The worst of the clean text and its variants is chosen by the model's own loss without
    gradients; then its loss is computed with them. The gradient form of arXiv 2412.18196's
    min-max problem is ours.

    Args:
        model: a classifier with ``logits`` and, given ``labels``, ``loss``, such as an EPTModel.
        clean_batch: ``input_ids`` and ``attention_mask`` ``[B, S]``, ``labels`` ``[B]``, and what
            else the model takes ``[B, S]``.
        perturbed_batches: the same rows perturbed, padded on the right to any length; no labels
            needed.

    Returns:
        A scalar.

    Raises:
        ValueError: batches without a mask or labels, or of other rows.
    """
    batches = [dict(clean_batch), *({**b} for b in perturbed_batches)]
    labels = batches[0].get("labels")
    if labels is None:
        raise ValueError("clean_batch: expected labels, got none")
    names = tuple(name for name in batches[0] if name != "labels")
    for number, batch in enumerate(batches):
        rows = {name: len(batch[name]) if name in batch else None for name in names}
        if "attention_mask" not in names or set(rows.values()) != {len(labels)}:
            which = f"perturbed_batches[{number - 1}]" if number else "clean_batch"
            raise ValueError(
                f"{which}: expected {len(labels)} rows of {', '.join(names)} with an "
                f"attention_mask, got {rows}"
            )
    longest = max(batch["attention_mask"].shape[1] for batch in batches)
    stacked = {
        name: torch.stack([F.pad(b[name], (0, longest - b[name].shape[1])) for b in batches])
        for name in names
    }
    with torch.no_grad():
        losses = []
        for batch in batches:
            logits = model(**{name: batch[name] for name in names}).logits
            losses.append(F.cross_entropy(logits.float(), labels, reduction="none"))
        worst = torch.stack(losses).argmax(0)
    each = torch.arange(len(labels), device=labels.device)
    chosen = {name: tensor[worst, each] for name, tensor in stacked.items()}
    loss: Tensor = model(**chosen, labels=labels).loss
    return loss
