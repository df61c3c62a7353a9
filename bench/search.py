"""RLPrompt and BATprompt on the 16-shot splits of real tasks, with the embedded MiniLM frozen.

    python -m bench.search --data FOLDER            # FOLDER has few_shot/sst2 and few_shot/trec

A text is classified by the cosine of its mean state to the embeddings of the classes' words, with
nothing trained. ``rlprompt``: the policy of ``rl_search`` inside the same encoder, beside
``random_search`` with as many evaluations. ``batprompt``: ``robust_search`` beside no prompt and
the start prompt that is best on clean texts; and a soft prompt with a head, trained by
``adversarial_loss`` beside the same without perturbations. Rewards are of ``--rows`` training rows,
accuracies of ``--test-rows`` test rows drawn once; ``worst`` counts texts that are right in all
eight variants.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click
import torch
from torch import Tensor

from bench.accuracy.study import SEEDS, embedded_model
from bench.environment import origin_of, slug
from bench.rows import RESULTS, rounded, write_csv
from ept_fast import EPTConfig, get_ept_model
from ept_fast.search import (
    PERTURBERS,
    CandidateScorer,
    LabelEmbeddings,
    PromptPolicy,
    adversarial_loss,
    gap_reward,
    perturb,
    random_search,
    rl_search,
    robust_search,
    substitute,
    worst_case,
)
from ept_fast.training.data import Rows, read_rows
from ept_fast.transformers.backbone import load_backbone, load_tokenizer

FOLDER = RESULTS / "search"
WORDS = {
    "sst2": ("terrible", "great"),
    "trec": ("description", "entity", "abbreviation", "human", "location", "number"),
}
PARTS = ("rlprompt", "batprompt")
VOCABULARY = 1000
LENGTH = 2  # tokens of a discrete prompt
LONGEST = 32  # tokens of a text
SAMPLES, LEARNING_RATE, POLYAK, STATE_SCALE = 8, 2e-4, 0.05, 30.0  # the paper's: 16, 5e-5, 1e-3, 1
ROUNDS, PROPOSALS = 2, 4
STEPS, BATCH, SOFT_LENGTH, KINDS = 30, 8, 8, 2

Row = dict[str, Any]


class Frozen:
    """The encoder, its tokenizer, and the discrete prompts' vocabulary."""

    def __init__(self, folder: str) -> None:
        self.tokenizer = load_tokenizer(folder)
        self.encoder: Any = load_backbone(folder, dtype=torch.bfloat16).eval()
        words = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        # The vocabulary goes by frequency.
        ids = [i for word, i in words if word.isascii() and word.isalpha() and len(word) > 1]
        self.vocabulary = torch.tensor(ids[:VOCABULARY])

    def tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Ids and mask of texts."""
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
        )
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}

    def classifier(self, words: Sequence[str]) -> Callable[[Tensor, Sequence[str]], Tensor]:
        """Logits of prompts and texts by cosine to the words."""
        with torch.no_grad():
            tokens = self.tokens(words)
            states = self.encoder(**tokens).last_hidden_state.float()
        real = tokens["attention_mask"].unsqueeze(2)
        embeddings = (states * real).sum(1) / real.sum(1)
        scorer = CandidateScorer(self.encoder, LabelEmbeddings(embeddings))
        return lambda prompts, texts: scorer(prompts, **self.tokens(texts))

    def prompts(self, count: int, generator: torch.Generator) -> Tensor:
        """Random prompts."""
        drawn = torch.randint(len(self.vocabulary), (count, LENGTH), generator=generator)
        return self.vocabulary[drawn]


NONE = torch.empty(1, 0, dtype=torch.int64)  # no prompt


def balanced(rows: Rows, count: int) -> tuple[list[str], Tensor]:
    """The first rows of each class, about ``count`` in all."""
    labels = [int(label) for label in rows.labels or ()]
    classes = sorted(set(labels))
    kept = [
        i
        for c in classes
        for i in [i for i, label in enumerate(labels) if label == c][: count // len(classes)]
    ]
    return [rows.texts[i] for i in kept], torch.tensor([labels[i] for i in kept])


def some(rows: Rows, count: int) -> tuple[list[str], Tensor]:
    """Rows drawn once for all seeds."""
    kept = random.Random(0).sample(range(len(rows)), min(count, len(rows)))
    labels = rows.labels or ()
    return [rows.texts[i] for i in kept], torch.tensor([int(labels[i]) for i in kept])


def rlprompt(
    frozen: Frozen, task: str, train: Rows, test: Rows, seed: int, rows: int, test_rows: int,
    evaluations: int,
) -> Iterator[Row]:  # fmt: skip
    """No prompt, random search, and the policy's greedy and best prompts."""
    classify = frozen.classifier(WORDS[task])
    texts, labels = balanced(train, rows)
    tested, wanted = some(test, test_rows)
    cls = frozen.tokenizer.cls_token_id

    def reward(prompts: Tensor) -> Tensor:
        return gap_reward(classify(prompts, texts), labels)

    def row(method: str, prompt: Tensor, seconds: float) -> Row:
        right = classify(prompt, tested).argmax(-1) == wanted
        words = frozen.tokenizer.convert_ids_to_tokens(prompt[0].tolist())
        return {
            "method": method, "reward": float(reward(prompt)), "clean": float(right.float().mean()),
            "evaluations": evaluations if seconds else 0, "seconds": seconds,
            "prompt": " ".join(words),
        }  # fmt: skip

    yield row("no prompt", NONE, 0.0)
    budget: dict[str, Any] = {"length": LENGTH, "evaluations": evaluations}
    begin = time.perf_counter()
    g = torch.Generator().manual_seed(seed)
    found = random_search(reward, frozen.vocabulary, **budget, batch=SAMPLES, generator=g)
    yield row("random search", found.prompt[None], time.perf_counter() - begin)
    begin = time.perf_counter()
    g = torch.Generator().manual_seed(seed)
    policy = PromptPolicy.of_model(
        frozen.encoder, frozen.vocabulary, [cls], scale=STATE_SCALE, generator=g
    )
    found = rl_search(
        reward, policy, **budget, samples=SAMPLES, learning_rate=LEARNING_RATE, polyak=POLYAK,
        generator=g,
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    assert found.greedy is not None
    yield row("RLPrompt, greedy", found.greedy[None], seconds)
    yield row("RLPrompt, best seen", found.prompt[None], seconds)


def batprompt(
    frozen: Frozen, task: str, train: Rows, test: Rows, seed: int, rows: int, test_rows: int,
    evaluations: int,
) -> Iterator[Row]:  # fmt: skip
    """Discrete prompts without and with the attack in mind, and soft prompts likewise."""
    classify = frozen.classifier(WORDS[task])
    texts, labels = balanced(train, rows)
    tested, wanted = some(test, test_rows)
    variants = [tested, *perturb(tested, seed=-1)]

    def row(method: str, prompt: Tensor, classify: Any, seconds: float) -> Row:
        case = worst_case(classify, prompt, variants, wanted)
        return {
            "method": method, "clean": float(case.clean), "worst": float(case.worst),
            "seconds": seconds,
        }  # fmt: skip

    yield row("no prompt", NONE, classify, 0.0)
    begin = time.perf_counter()
    g = torch.Generator().manual_seed(seed)
    start = frozen.prompts(10, g)
    order = worst_case(classify, start, [texts], labels).loss.argsort()
    yield row("clean choice", start[order[:1]], classify, time.perf_counter() - begin)
    begin = time.perf_counter()
    found = robust_search(
        classify, texts, labels, start[order],
        lambda pool: substitute(pool, PROPOSALS, frozen.vocabulary, g),
        rounds=ROUNDS, per_kind=1, seed=seed,
    )  # fmt: skip
    yield row("robust search", found.prompt[None], classify, time.perf_counter() - begin)
    for method, kinds in (("soft prompt", 0), ("soft prompt, adversarial", KINDS)):
        begin = time.perf_counter()
        model = trained(frozen, train, seed, kinds)

        @torch.no_grad()
        def logits(prompts: Tensor, texts: Sequence[str], model: Any = model) -> Tensor:
            parts = [texts[i : i + 32] for i in range(0, len(texts), 32)]
            return torch.cat([model(**frozen.tokens(part)).logits for part in parts])[None]

        yield row(method, NONE, logits, time.perf_counter() - begin)


def trained(frozen: Frozen, train: Rows, seed: int, kinds: int) -> Any:
    """A soft prompt with a linear head, trained against so many kinds of perturbation a step."""
    labels = torch.tensor([int(label) for label in train.labels or ()])
    config = EPTConfig(
        frozen.encoder.config.hidden_size, num_virtual_tokens=SOFT_LENGTH, max_length=LONGEST,
        rank=0, num_spaces=0,
    )  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    names = [str(i) for i in range(int(labels.max()) + 1)]
    model: Any = get_ept_model(frozen.encoder, config, "SEQ_CLS", labels=names, generator=g)
    optimizer = torch.optim.AdamW(model.parameter_groups(5e-3, 5e-3, 5e-3, 2e-2))
    draw = random.Random(seed)
    for step in range(STEPS):
        picked = draw.sample(range(len(labels)), BATCH)
        texts = [train.texts[i] for i in picked]
        clean = {**frozen.tokens(texts), "labels": labels[picked]}
        perturbers = {name: PERTURBERS[name] for name in draw.sample(list(PERTURBERS), kinds)}
        others = perturb(texts, perturbers=perturbers, seed=step) if kinds else []
        loss = adversarial_loss(model, clean, [frozen.tokens(rows) for rows in others])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def table(rows: Iterable[Row]) -> str:
    """Means and standard deviations over the seeds, as docs/search.md shows them."""
    columns = {"reward": 1.0, "clean": 100.0, "worst": 100.0}
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["part"], row["task"], row["method"]), []).append(row)
    lines = [f"| part | task | method | {' | '.join(columns)} |", "|---|---|---|---:|---:|---:|"]
    for key, group in groups.items():
        cells = []
        for name, factor in columns.items():
            values = [factor * row[name] for row in group if row.get(name, "") != ""]
            spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.1f}{spread}" if values else "")
        lines.append(f"| {' | '.join((*key, *cells))} |")
    return "\n".join(lines) + "\n"


COLUMNS = (
    "part", "task", "seed", "method", "reward", "clean", "worst", "evaluations", "prompt",
    "seconds", "rows", "test_rows",
)  # fmt: skip


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--model", help="Folder of an encoder; the embedded MiniLM if not given.")
@click.option("--parts", default=",".join(PARTS), help="Separated by commas, as the next two.")
@click.option("--tasks", default=",".join(WORDS))
@click.option("--seeds", default=",".join(map(str, SEEDS)))
@click.option("--evaluations", default=64, help="Prompts that a search may evaluate.")
@click.option("--rows", default=24, help="Training rows of a reward.")
@click.option("--test-rows", default=100)
@click.option("--out", type=click.Path(path_type=Path), help="The CSV file.")
def main(
    data: Path, model: str | None, parts: str, tasks: str, seeds: str, evaluations: int, rows: int,
    test_rows: int, out: Path | None,
) -> None:  # fmt: skip
    """Run the parts on every task and seed; the file is written after each."""
    frozen = Frozen(model or embedded_model())
    origin = origin_of(torch.device("cpu"))
    out = out or FOLDER / f"{parts.replace(',', '-')}-{slug(origin['device'])}.csv"
    runs = {"rlprompt": rlprompt, "batprompt": batprompt}
    found: list[Row] = []
    for part in parts.split(","):
        for seed in map(int, seeds.split(",")):
            for task in tasks.split(","):
                folder = data / "few_shot" / task
                splits = [
                    read_rows(folder / f"{seed}/train.jsonl"),
                    read_rows(folder / "test.jsonl"),
                ]
                made = runs[part](frozen, task, *splits, seed, rows, test_rows, evaluations)
                how = {
                    "part": part,
                    "task": task,
                    "seed": seed,
                    "rows": rows,
                    "test_rows": test_rows,
                }
                found += [{**how, **row, **origin} for row in made]
                write_csv(out, (*COLUMNS, *origin), map(rounded, found))
    click.echo(table(found))


if __name__ == "__main__":
    main()
