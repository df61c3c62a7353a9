"""What the methods whose prompts read the text claim, on few-shot data with MiniLM on a CPU.

    python -m bench.reading accuracy --data ../shared/data --task few_shot/trec
    python -m bench.reading stability --data ../shared/data
    python -m bench.reading information --data ../shared/data

``accuracy``: test accuracy of each method with 20 tokens and at most the parameters of 100 plain
ones, beside prompt tuning of 20; over five draws of 16 rows a class, the better of two rates by the
draw's validation rows.

``stability``: StablePT's claim. Test accuracy over five hard templates and five draws of 16 rows a
class, and how far it spreads, with and without its contrastive loss, beside prompt tuning of as
many tokens. One rate for each method, the better of two on the validation rows of the first
template and draw.

``information``: InfoPrompt's claim, faster convergence. Steps until the task's loss on all training
rows has fallen to ``--target`` of its first value, with the two information losses, with weights of
0, and by prompt tuning; and what a training step costs with and without kept states.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median, pstdev
from typing import Any

import click
import torch

from bench.accuracy.study import SEEDS, embedded_model, encoder_name
from bench.accuracy.training import Rates, train_step
from bench.environment import origin_of, slug
from bench.methods import config_of
from bench.rows import RESULTS, write_csv
from ept_fast import EPTConfig, get_ept_model
from ept_fast.config import PromptConfig
from ept_fast.prompts.infoprompt import InfoPromptConfig
from ept_fast.prompts.stable import StableConfig
from ept_fast.transformers.backbone import load_backbone, load_tokenizer

FOLDER = RESULTS / "reading"
TASKS = ("few_shot/sst2", "few_shot/trec")
TEMPLATES: dict[str, tuple[str, ...]] = {
    "few_shot/sst2": (
        "{}", "{} It was [MASK].", "Review: {} Sentiment:", "A [MASK] film. {}",
        "What a viewer wrote: {} All in all it is",
    ),
    "few_shot/trec": (
        "{}", "{} This asks for a [MASK].", "Question: {} Type:", "[MASK] question. {}",
        "Somebody wants to know: {} The answer is a",
    ),
}  # fmt: skip
METHODS = ("pt", "instance", "infoprompt", "stable")
M = 20  # tokens of accuracy's prompts, all within the budget of 100 plain ones
TOKENS, BATCH, LENGTH = 10, 8, 96
CHOICES = (1e-2, 3e-2)  # rates of the prompt
RATES = Rates({"prompt": 1.0, "offset": 0.1, "spaces": 0.1}, head=5e-3, weight_decay=0.0)
FASTEST = 3e-2
EVERY = 5  # steps between two looks at the training loss

Row = dict[str, Any]


def prompt_tuning(width: int) -> PromptConfig:
    """A plain prompt."""
    return EPTConfig(width, TOKENS, rank=0, num_spaces=0)


STABILITY: dict[str, Callable[[int], PromptConfig]] = {
    "prompt tuning": prompt_tuning,
    "StablePT, no contrastive": lambda d: StableConfig(d, TOKENS, contrastive_weight=0.0),
    "StablePT": lambda d: StableConfig(d, TOKENS),
}
INFORMATION: dict[str, Callable[[int], PromptConfig]] = {
    "prompt tuning": prompt_tuning,
    "InfoPrompt, no losses": lambda d: InfoPromptConfig(
        d, TOKENS, head_weight=0.0, representation_weight=0.0, divergence_weight=0.0
    ),
    "InfoPrompt": lambda d: InfoPromptConfig(d, TOKENS),
}


class Rows:
    """The rows of a file, or the first of them, tokenised."""

    def __init__(
        self, path: Path, tokenizer: Any, template: str = "{}", most: int | None = None
    ) -> None:
        lines = path.read_text(encoding="utf-8").splitlines()[:most]
        found = [json.loads(line) for line in lines]
        texts = [template.format(row["text"]) for row in found]
        self.tokenizer = tokenizer
        self.ids = tokenizer(texts, truncation=True, max_length=LENGTH)["input_ids"]
        self.labels = torch.tensor([row["label"] for row in found])

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """These rows, padded."""
        padded = self.tokenizer.pad(
            {"input_ids": [self.ids[i] for i in indices]}, return_tensors="pt"
        )
        return {**padded, "labels": self.labels[list(indices)]}

    def batches(self, size: int) -> Iterable[dict[str, torch.Tensor]]:
        """All rows, those of similar length together."""
        order = sorted(range(len(self.ids)), key=lambda i: len(self.ids[i]))
        return (self.batch(order[i : i + size]) for i in range(0, len(order), size))


@torch.no_grad()
def judged(model: Any, rows: Rows) -> tuple[float, float]:
    """Accuracy and mean loss, without further terms."""
    model.eval()
    hits, loss = 0, 0.0
    for batch in rows.batches(64):
        output = model(**batch)
        hits += int((output.logits.argmax(1) == batch["labels"]).sum())
        loss += float(output.loss) * len(batch["labels"])
    model.train()
    return hits / len(rows.labels), loss / len(rows.labels)


def new_model(backbone: Any, config: PromptConfig, classes: int, seed: int) -> Any:
    """An untrained model, in training mode."""
    generator = torch.Generator().manual_seed(seed)
    labels = [str(i) for i in range(classes)]
    model: Any = get_ept_model(backbone, config, "SEQ_CLS", labels=labels, generator=generator)
    return model.train()


def train(
    model: Any, rows: Rows, steps: int, rate: float, seed: int,
    look: Callable[[int], bool] = lambda step: False,
) -> None:  # fmt: skip
    """Train for so many steps, or until ``look``, which is called before every step, is true."""
    torch.manual_seed(seed)  # the draws of InfoPrompt's losses
    optimizer = RATES.optimizer(model, rate)
    draw = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for step in range(steps):
        if look(step):
            return
        if len(order) < BATCH:
            order += torch.randperm(len(rows.labels), generator=draw).tolist()
        model.set_loss_progress(step / steps)
        train_step(model, optimizer, rows.batch(order[:BATCH]))
        del order[:BATCH]


class Runs:
    """Training runs on one task.

    Args:
        backbone, tokenizer: the frozen model.
        folder: of the task.
        seeds: its draws of training rows.
        steps: of every run.
        most: test rows.
    """

    def __init__(
        self,
        backbone: Any,
        tokenizer: Any,
        folder: Path,
        seeds: Sequence[int],
        steps: int,
        most: int,
    ) -> None:
        self.backbone, self.tokenizer, self.folder = backbone, tokenizer, folder
        self.seeds, self.steps, self.most = seeds, steps, most
        self.width = backbone.get_input_embeddings().embedding_dim

    def rows(self, name: str, template: str = "{}") -> Rows:
        """The rows of a file of the task."""
        return Rows(self.folder / f"{name}.jsonl", self.tokenizer, template, self.most)

    def accuracies(
        self, config: PromptConfig, template: str, seed: int, rate: float, *splits: str
    ) -> list[float]:
        """Train on one draw; the accuracy on each of these splits."""
        rows = self.rows(f"{seed}/train", template)
        model = new_model(self.backbone, config, int(rows.labels.max()) + 1, seed)
        train(model, rows, self.steps, rate, seed)
        found = [judged(model, self.rows(split, template))[0] for split in splits]
        model.unload()
        return found


def accuracy(runs: Runs) -> Iterable[Row]:
    """One row for each method and draw, at the rate that is best on the draw's validation rows."""
    for name in METHODS:
        config = config_of(name, runs.width, M, LENGTH)
        for seed in runs.seeds:
            splits = (f"{seed}/validation", "test")
            tried = [(*runs.accuracies(config, "{}", seed, r, *splits), r) for r in CHOICES]
            _, tested, rate = max(tried, key=lambda each: each[0])
            yield {
                "method": name, "parameters": config.num_parameters, "rate": rate,
                "steps": runs.steps, "seed": seed, "accuracy": tested,
            }  # fmt: skip


def stability(runs: Runs, templates: Sequence[str]) -> Iterable[Row]:
    """One row for each method, template and draw."""
    for name, made in STABILITY.items():
        config, first = made(runs.width), runs.seeds[0]
        tuned = {
            rate: runs.accuracies(config, templates[0], first, rate, f"{first}/validation")
            for rate in CHOICES
        }
        rate = max(CHOICES, key=tuned.__getitem__)
        for (i, template), seed in itertools.product(enumerate(templates), runs.seeds):
            (tested,) = runs.accuracies(config, template, seed, rate, "test")
            yield {
                "method": name, "parameters": config.num_parameters, "rate": rate,
                "steps": runs.steps, "template": i, "seed": seed, "accuracy": tested,
            }  # fmt: skip


def information(runs: Runs, target: float) -> Iterable[Row]:
    """One row for each method and draw."""
    for (name, made), seed in itertools.product(INFORMATION.items(), runs.seeds):
        rows = runs.rows(f"{seed}/train")
        model = new_model(runs.backbone, made(runs.width), int(rows.labels.max()) + 1, seed)
        losses: list[float] = []

        def look(
            step: int, model: Any = model, rows: Rows = rows, to: list[float] = losses
        ) -> bool:
            if step % EVERY == 0:
                to.append(judged(model, rows)[1])
            return to[-1] <= target * to[0]

        train(model, rows, runs.steps, FASTEST, seed, look)
        reached = losses[-1] <= target * losses[0]
        yield {
            "method": name, "rate": FASTEST, "seed": seed, "target": target,
            "steps": (len(losses) - 1) * EVERY if reached else "", "most": runs.steps,
            "loss": losses[-1],
        }  # fmt: skip
        model.unload()


def kept_states(runs: Runs, rounds: int = 20) -> float:
    """Time of InfoPrompt's step with kept states by that without; the median over the rounds."""
    rows = runs.rows(f"{runs.seeds[0]}/train")
    model = new_model(runs.backbone, INFORMATION["InfoPrompt"](runs.width), 2, 0)
    optimizer = RATES.optimizer(model, FASTEST)
    batch = rows.batch(range(BATCH))
    read = {name: batch[name] for name in ("input_ids", "attention_mask")}
    train_step(model, optimizer, batch)  # keeps the states
    ratios = []
    for _ in range(rounds):
        begin = time.perf_counter()
        train_step(model, optimizer, batch)
        kept = time.perf_counter() - begin
        with torch.no_grad():  # the first pass, if nothing were kept
            model.backbone(**read)
        ratios.append(kept / (time.perf_counter() - begin))
    model.unload()
    return median(ratios)


def spread_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Mean accuracy, and standard deviations: of all runs, over templates, over draws."""
    several = "template" in rows[0]
    header = ["task", "method", "parameters", "accuracy", "deviation"]
    header += ["over templates", "over draws"] * several
    lines = [f"| {' | '.join(header)} |", f"|---|---|{'---:|' * (len(header) - 2)}"]
    for (task, method), group in groups(rows, "task", "method"):
        values = [100 * float(row["accuracy"]) for row in group]
        numbers = [fmean(values), pstdev(values)]
        for kept in ("seed", "template") if several else ():
            parts = (part for _, part in groups(group, kept))
            numbers.append(fmean(pstdev(100 * float(r["accuracy"]) for r in p) for p in parts))
        cells = (task, method, f"{int(group[0]['parameters']):,}", *(f"{x:.1f}" for x in numbers))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def steps_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Steps to the target; a draw that does not get there counts with all of its."""
    header = ("task", "method", "draws that got there", "steps")
    lines = [f"| {' | '.join(header)} |", f"|---|---|{'---:|' * (len(header) - 2)}"]
    for (task, method), group in groups(rows, "task", "method"):
        there = sum(row["steps"] != "" for row in group)
        steps = fmean(float(row["most"] if row["steps"] == "" else row["steps"]) for row in group)
        lines.append(f"| {task} | {method} | {there} of {len(group)} | {steps:.0f} |")
    return "\n".join(lines) + "\n"


def groups(
    rows: Sequence[Mapping[str, Any]], *names: str
) -> Iterable[tuple[tuple[Any, ...], list[Mapping[str, Any]]]]:
    """Rows with equal values of these fields together, in the order in which they came."""
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found.items()


@click.command()
@click.argument("part", type=click.Choice(("accuracy", "stability", "information")))
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--model", help="Folder or hub id of an encoder; the embedded MiniLM if not given.")
@click.option("--seeds", multiple=True, type=int, default=SEEDS, help="Draws of training rows.")
@click.option("--task", default=TASKS[0], type=click.Choice(TASKS))
@click.option("--steps", default=40, help="Optimizer steps; of information at most.")
@click.option("--rows", default=500, help="Test rows.")
@click.option("--target", default=0.5, help="Part of its first value that the loss has to reach.")
@click.option("--out", type=click.Path(path_type=Path), help="The CSV file.")
def main(
    part: str,
    data: Path,
    model: str | None,
    seeds: tuple[int, ...],
    task: str,
    steps: int,
    rows: int,
    target: float,
    out: Path | None,
) -> None:
    """Run one part on one task, write its rows and print its table."""
    folder = model or embedded_model()
    backbone: Any = load_backbone(folder)
    origin = origin_of(backbone.device)
    runs = Runs(backbone, load_tokenizer(folder), data / task, seeds, steps, rows)
    if part == "accuracy":
        found = accuracy(runs)
    elif part == "stability":
        found = stability(runs, TEMPLATES[task])
    else:
        found = information(runs, target)
    kept = [{"task": task, **row, "model": encoder_name(model), **origin} for row in found]
    file = f"{part}-{task.rpartition('/')[2]}-{slug(origin['device'])}.csv"
    write_csv(out or FOLDER / file, kept[0], kept)
    click.echo(steps_table(kept) if part == "information" else spread_table(kept))
    if part == "information":
        click.echo(f"A step with kept states by one with a first pass: {kept_states(runs):.2f}")


if __name__ == "__main__":
    main()
