"""Step time and memory of every registered method, beside plain prompt tuning of as many tokens.

    python -m bench.methods                     # the embedded MiniLM encoder, on a CPU
    python -m bench.methods --device cuda --model FOLDER

A method has the sizes that the budget of 100 tokens gives it at m tokens. A round takes one
training step (forward, backward, AdamW) of each method in turn, on the same batch, and begins with
another method than the round before. ``ratio_to_pt`` is the median over the rounds of a method's
time by plain prompt tuning's in the same round, with the ends of its 95% interval; ``step_ms`` is
the elapsed time until the device is done, ``host_ms``, on a GPU, until the call returns.

``peak_mb`` is the most that a step holds at once beyond the frozen model: the trained tensors, the
optimizer's, and what the step itself allocates, by the allocator. It has activations of the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch

from bench.accuracy.study import embedded_model, encoder_name
from bench.environment import origin_of, slug
from bench.inputs import DTYPES
from bench.rows import RESULTS, rounded, write_csv
from bench.timing import Clock, Work, median_interval, no_collection
from ept_fast import get_ept_model
from ept_fast.config import PromptConfig
from ept_fast.prompts.base import prompt_methods
from ept_fast.transformers.backbone import load_backbone

FOLDER = RESULTS / "methods"
BASE = "pt"
BUDGET = 100  # tokens of the plain prompt whose parameters a method may spend
WARM_UP = 3  # rounds that do not count
LABELS = ("no", "yes")

Row = dict[str, Any]


def config_of(method: str, hidden_size: int, tokens: int, max_length: int) -> PromptConfig:
    """The method's sizes at ``tokens`` tokens, at the largest within the budget.

    A method that makes its budget's length its own, as plain prompt tuning does, gets that length.
    """
    config = prompt_methods()[method].config_class
    length = BUDGET if config.tokens_of(method, BUDGET, tokens) == tokens else tokens
    settings = {"num_virtual_tokens": tokens, "max_length": max_length}
    return config.for_method(method, hidden_size, length, **settings)


def batch_of(backbone: Any, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Random token ids of half the length to all of it, padded on the right, and labels."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(length // 2, length + 1, (batch, 1), generator=g)
    lengths[0] = length
    rows = backbone.get_input_embeddings().num_embeddings
    tensors = {
        "input_ids": torch.randint(rows, (batch, length), generator=g),
        "attention_mask": (torch.arange(length) < lengths).long(),
        "labels": torch.arange(batch) % len(LABELS),
    }
    return {name: tensor.to(backbone.device) for name, tensor in tensors.items()}


def step_of(
    backbone: Any, config: PromptConfig, batch: Mapping[str, torch.Tensor]
) -> tuple[Callable[[], None], Callable[[], int], int]:
    """A training step, the bytes that are there between two steps, and the prompt's parameters."""
    generator = torch.Generator().manual_seed(0)
    model: Any = get_ept_model(backbone, config, "SEQ_CLS", labels=LABELS, generator=generator)
    model.train()
    groups = model.parameter_groups(1e-3, 1e-3, 1e-3, 1e-3)
    trained = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(groups)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def held() -> int:
        moments = (t for state in optimizer.state.values() for t in state.values())
        return sum(t.nbytes for t in (*trained, *moments))

    return step, held, model.parameter_counts()["prompt"]


def measure(
    backbone: Any, tokens: int, batch: Mapping[str, torch.Tensor], rounds: int
) -> Iterable[Row]:
    """One row for each registered method, the base first."""
    device, length = backbone.device, batch["input_ids"].shape[1]
    width = backbone.get_input_embeddings().embedding_dim
    clock = Clock(device, 0, 0, 0)
    methods = [BASE, *(name for name in prompt_methods() if name != BASE)]
    configs = {name: config_of(name, width, tokens, length) for name in methods}
    steps = {name: step_of(backbone, config, batch) for name, config in configs.items()}
    elapsed: dict[str, list[float]] = {name: [] for name in methods}
    host: dict[str, list[float]] = {name: [] for name in methods}
    with no_collection():
        for number in range(WARM_UP + rounds):
            shift = number % len(methods)  # no method always runs first
            for name in (*methods[shift:], *methods[:shift]):
                clock.synchronize()
                begin = time.perf_counter()
                steps[name][0]()
                returned = time.perf_counter()
                clock.synchronize()
                if number >= WARM_UP:
                    host[name].append(1e3 * (returned - begin))
                    elapsed[name].append(1e3 * (time.perf_counter() - begin))
    for name, (step, held, parameters) in steps.items():
        pairs = zip(elapsed[name], elapsed[BASE], strict=True)
        ratio, low, high = median_interval([own / base for own, base in pairs])
        peak = clock.peak_mb(Work(lambda i: None, lambda _, step=step: step()))
        yield {
            "method": name, "parameters": parameters, "num_virtual_tokens": tokens,
            "ratio_to_pt": ratio, "ratio_low": low, "ratio_high": high,
            "step_ms": median(elapsed[name]),
            "host_ms": median(host[name]) if clock.on_gpu else "",
            "peak_mb": peak + held() / 1e6, "rounds": rounds,
        }  # fmt: skip


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows as docs/results.md shows them."""
    header = ("method", "parameters", "step by prompt tuning's", "step (ms)", "peak (MB)")
    lines = [f"| {' | '.join(header)} |", f"|---|{'---:|' * (len(header) - 1)}"]
    for row in rows:
        low, ratio, high = (float(row[f"ratio_{name}"]) for name in ("low", "to_pt", "high"))
        step, peak = float(row["step_ms"]), float(row["peak_mb"])
        cells = (f"{int(row['parameters']):,}", f"{ratio:.2f} ({low:.2f} to {high:.2f})")
        lines.append(f"| {' | '.join((row['method'], *cells, f'{step:.1f}', f'{peak:.1f}'))} |")
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--model", help="Folder or hub id of an encoder; the embedded MiniLM if not given.")
@click.option("--device", type=click.Choice(("cpu", "cuda")), default="cpu")
@click.option("--dtype", type=click.Choice(tuple(DTYPES)), default="float32", help="Of the model.")
@click.option("--tokens", default=20, help="m, of every method.")
@click.option("--batch", default=8)
@click.option("--length", default=64, help="Columns of the batch.")
@click.option("--rounds", default=60)
@click.option("--out", type=click.Path(path_type=Path), help="The CSV file.")
def main(
    model: str | None, device: str, dtype: str, tokens: int, batch: int, length: int, rounds: int,
    out: Path | None,
) -> None:  # fmt: skip
    """Time training steps of all methods in turn, and measure their memory."""
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device: expected cpu, got cuda and no CUDA device was found")
    backbone: Any = load_backbone(model or embedded_model(), dtype=DTYPES[dtype]).to(device)
    origin = origin_of(backbone.device)
    how: Row = {
        "model": encoder_name(model),
        "dtype": dtype, "batch": batch, "length": length, **origin,
    }  # fmt: skip
    rows = [
        rounded({**row, **how})
        for row in measure(backbone, tokens, batch_of(backbone, batch, length), rounds)
    ]
    write_csv(out or FOLDER / f"{slug(origin['device'])}.csv", rows[0], rows)
    click.echo(table(rows))


if __name__ == "__main__":
    main()
