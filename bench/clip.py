"""CoOp, PRE and LASP on "text as image": questions as images, from base classes to new ones.

    python -m bench.clip                     # the embedded MiniLM encoder, on a CPU

f(x) is the frozen encoder's feature of a question, t_c that of [context; words of class c]: what a
CLIP does with an image. A context is trained on 16 rows of each base class. It is tested among the
base classes, and among new ones whose names alone it is given. ``H`` is the harmonic mean of both
accuracies of a seed.

Every method has the same steps and the same rates to choose from. A seed's validation rows, of base
classes alone, choose the rate by their cross-entropy.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.accuracy.study import embedded_model, encoder_name
from bench.environment import origin_of, slug
from bench.rows import RESULTS, rounded, write_csv
from ept_fast import CLIPPrompt, EPTConfig
from ept_fast.config import PromptConfig
from ept_fast.prompts.residual import ResidualConfig
from ept_fast.transformers.backbone import load_backbone, load_tokenizer
from ept_fast.transformers.clip import SentenceEncoder

FOLDER = RESULTS / "clip"
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TASK = "few_shot/trec"
WORDS = ("description", "entity", "abbreviation", "person", "location", "number")
START = "a question about a"  # four tokens, as CLIP's "a photo of a"
TEMPLATES = (
    "a question about a {}.",
    "this question asks for a {}.",
    "the answer is a {}.",
    "a question whose answer is a {}.",
    "what is the {}?",
    "tell me the {}.",
    "the topic is {}.",
    "{}",
)
# Base classes, then new ones; both halves in turn, and all classes.
SPLITS = {
    "first half": ((0, 1, 2), (3, 4, 5)),
    "second half": ((3, 4, 5), (0, 1, 2)),
    "all": (tuple(range(6)), ()),
}
SEEDS = (13, 21, 42, 87, 100)
RATES = (1e-3, 5e-3, 2e-2)  # of the context; the rest of what is trained has a tenth
BATCH = 16
LASP = {"templates": TEMPLATES, "weight": 5.0, "correction": True}

Row = dict[str, Any]
Data = tuple[Tensor, Tensor]  # features [N, e] and classes [N]


@dataclass(frozen=True)
class Method:
    """What is trained: the context's config for a width, and the model's choices."""

    config: Callable[[int], PromptConfig] = lambda d: EPTConfig(
        d, num_virtual_tokens=4, rank=0, num_spaces=0
    )
    choices: Mapping[str, Any] = field(default_factory=dict)
    virtual: bool = False  # whether the new classes' names are there in training


METHODS = {
    "CoOp": Method(),
    "PRE, MLP": Method(lambda d: ResidualConfig(d, 4, bottleneck=64, layer_norm=False)),
    "PRE, LSTM": Method(lambda d: ResidualConfig(d, 4, encoder="lstm")),
    "LASP": Method(choices=LASP),
    "LASP, 2 groups": Method(choices={**LASP, "groups": 2}),
    "LASP, virtual classes": Method(choices=LASP, virtual=True),
}
UNTRAINED = {"words": TEMPLATES[:1], "mean of templates": TEMPLATES}


@dataclass(frozen=True)
class Encoder:
    """The frozen encoder and its tokenizer."""

    model: SentenceEncoder
    tokenizer: Any

    def features(self, texts: Sequence[str]) -> Tensor:
        """Unit features ``[N, e]``."""
        found = []
        for begin in range(0, len(texts), 64):
            tokens = self.tokenizer(
                list(texts[begin : begin + 64]), padding=True, truncation=True, max_length=64,
                return_tensors="pt",
            )  # fmt: skip
            found.append(self.model.encode(tokens["input_ids"], tokens["attention_mask"]))
        return F.normalize(torch.cat(found), dim=-1)

    def read(self, path: Path) -> Data:
        """Features and classes of a file's rows."""
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        labels = torch.tensor([row["label"] for row in rows])
        return self.features([row["text"] for row in rows]), labels


def of_classes(data: Data, classes: Sequence[int]) -> Data:
    """The rows of these classes, which are numbered anew."""
    numbers = torch.full((len(WORDS),), -1)
    numbers[list(classes)] = torch.arange(len(classes))
    own = numbers[data[1]]
    return data[0][own >= 0], own[own >= 0]


def names_of(classes: Sequence[int]) -> list[str]:
    return [WORDS[number] for number in classes]


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """In percent."""
    return 100 * float((logits.argmax(1) == labels).float().mean())


def harmonic(base: float, new: float) -> float:
    return 2 * base * new / (base + new) if base + new else 0.0


def trained(
    encoder: Encoder, method: Method, classes: Sequence[int], new: Sequence[int], data: Data,
    rate: float, steps: int, seed: int,
) -> CLIPPrompt:  # fmt: skip
    """A model after its steps, of Adam at a rate that falls by a cosine to zero."""
    torch.manual_seed(seed)
    model = CLIPPrompt(
        encoder.model,
        method.config(encoder.model.features),
        tokenizer=encoder.tokenizer,
        classes=names_of(classes),
        virtual_classes=names_of(new) if method.virtual else (),
        text=START,
        **method.choices,
    ).train()
    groups = model.parameter_groups(rate, 0.0, rate / 10, rate / 10)
    optimizer = torch.optim.Adam(groups)
    falling = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2
    )
    features, labels = data
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(order) < BATCH:
            order = torch.cat([order, torch.randperm(len(labels))])
        rows, order = order[:BATCH], order[BATCH:]
        loss = model(image_features=features[rows], labels=labels[rows]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        falling.step()
    return model.eval()


Parts = list[tuple[list[str], Data]]  # names and test rows of base classes, and of new ones


def tested(logits_of: Callable[[list[str], Tensor], Tensor], parts: Parts) -> Row:
    """Accuracies on the parts, and their harmonic mean."""
    found = [accuracy(logits_of(names, data[0]), data[1]) for names, data in parts]
    base, new = found if len(found) == 2 else (found[0], math.nan)
    return {"base": base, "new": new, "H": harmonic(base, new)}


def untrained(encoder: Encoder, templates: Sequence[str], parts: Parts) -> Row:
    """Without a context: the mean of the features that templates give."""

    def logits_of(names: list[str], features: Tensor) -> Tensor:
        texts = [template.replace("{}", name) for template in templates for name in names]
        means = encoder.features(texts).view(len(templates), len(names), -1).mean(0)
        return features @ F.normalize(means, dim=-1).T

    return {**tested(logits_of, parts), "rate": 0.0, "parameters": 0, "loss": math.nan}


def best_of(models: Iterable[tuple[float, CLIPPrompt]], judge: Data, parts: Parts) -> Row:
    """The model of the rate with the lowest loss on validation rows, tested."""
    rows = []
    for rate, model in models:
        model.fold(model.classes)
        loss = float(model(image_features=judge[0], labels=judge[1]).loss)

        def logits_of(names: list[str], features: Tensor, model: CLIPPrompt = model) -> Tensor:
            model.fold(names)
            return model(image_features=features).logits

        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        found = tested(logits_of, parts)
        rows.append({**found, "rate": rate, "parameters": count, "loss": loss})
        model.unload()
    return min(rows, key=lambda row: row["loss"])


def measure(
    encoder: Encoder, data: Path, splits: Sequence[str], seeds: Sequence[int],
    rates: Sequence[float], steps: int,
) -> Iterable[Row]:  # fmt: skip
    """A row for each seed, split and method."""
    test = encoder.read(data / TASK / "test.jsonl")
    for seed in seeds:
        folder = data / TASK / str(seed)
        train, validation = (encoder.read(folder / f"{n}.jsonl") for n in ("train", "validation"))
        for split in splits:
            classes, new = SPLITS[split]
            parts = [(names_of(part), of_classes(test, part)) for part in (classes, new) if part]
            own, judge = of_classes(train, classes), of_classes(validation, classes)
            for name, templates in UNTRAINED.items():
                row = untrained(encoder, templates, parts)
                yield {"split": split, "method": name, "seed": seed, **row, "seconds": 0.0}
            for name, method in METHODS.items():
                if method.virtual and not new:
                    continue
                begin = time.perf_counter()
                models = [
                    (rate, trained(encoder, method, classes, new, own, rate, steps, seed))
                    for rate in rates
                ]
                row = best_of(models, judge, parts)
                seconds = time.perf_counter() - begin
                yield {"split": split, "method": name, "seed": seed, **row, "seconds": seconds}


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows as docs/clip.md shows them: means over the seeds, and their deviation."""
    header = ("classes trained", "method", "parameters", "base", "new", "H")
    lines = [f"| {' | '.join(header)} |", "|---|---|---:|---:|---:|---:|"]
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        key = (str(row["split"]), str(row["method"]), f"{int(row['parameters']):,}")
        groups.setdefault(key, []).append(row)
    order = list(SPLITS)
    for key, own in sorted(groups.items(), key=lambda item: order.index(item[0][0])):
        cells = [_spread([float(row[name]) for row in own]) for name in ("base", "new", "H")]
        lines.append(f"| {' | '.join((*key, *cells))} |")
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float]) -> str:
    if math.isnan(values[0]):
        return ""
    return f"{mean(values):.1f} ± {stdev(values) if len(values) > 1 else 0:.1f}"


def _listed(_: Any, parameter: click.Parameter, value: str) -> list[str]:
    return value.split(",")


@click.command()
@click.option("--data", type=click.Path(path_type=Path), default=DATA, help="Has few_shot/trec.")
@click.option("--model", help="Folder or hub id of an encoder; the embedded MiniLM if not given.")
@click.option("--splits", callback=_listed, default=",".join(SPLITS))
@click.option("--seeds", callback=_listed, default=",".join(map(str, SEEDS)))
@click.option("--rates", callback=_listed, default=",".join(map(str, RATES)))
@click.option("--steps", default=40)
@click.option("--scale", default=20.0, help="Factor of the cosines.")
@click.option("--out", type=click.Path(path_type=Path), help="The CSV file.")
def main(
    data: Path, model: str | None, splits: list[str], seeds: list[str], rates: list[str],
    steps: int, scale: float, out: Path | None,
) -> None:  # fmt: skip
    """Train and test every method on every split, with all seeds."""
    source = model or embedded_model()
    backbone: Any = load_backbone(source).eval().requires_grad_(False)
    encoder = Encoder(SentenceEncoder(backbone, scale), load_tokenizer(source))
    origin = origin_of(torch.device("cpu"))
    how = {
        "steps": steps, "scale": scale, "model": encoder_name(model),
        **origin,
    }  # fmt: skip
    numbers = [int(seed) for seed in seeds], [float(rate) for rate in rates]
    rows = []
    for row in measure(encoder, data, splits, *numbers, steps):
        rows.append(rounded({**row, **how}, 6))
        click.echo(" ".join(str(value) for value in list(rows[-1].values())[:9]), err=True)
    write_csv(out or FOLDER / f"{slug(origin['device'])}.csv", rows[0], rows)
    click.echo(table(rows))


if __name__ == "__main__":
    main()
