"""The report of a run: its figures, learning curves, gate weights, and what it writes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ept_fast.storage.files import write_bytes
from ept_fast.training.metrics import GENERATED_METRICS, TEXT_METRICS

__all__ = [
    "describe_run",
    "draw_gate_weights",
    "draw_learning_curves",
    "save_figure",
    "smoothed",
    "write_samples",
]

_BLUE, _ORANGE, _GREY = "#2b6cb0", "#c05621", "#a0aec0"


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, atomically and without any global state."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_bytes(Path(path), buffer.getvalue())


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and those before it, ``window`` at most."""
    means = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - window) : end]
        means.append(sum(part) / len(part))
    return means


def draw_learning_curves(
    losses: Sequence[float],
    evaluations: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    metric: str = "accuracy",
    loss: str = "cross-entropy (nats)",
    kept: int | None = None,
) -> None:
    """Draw the loss of every step, and loss and metric of every evaluation, as PNG.

    Args:
        losses: the training loss of steps 1, 2, ...
        evaluations: dicts of ``step``, ``loss`` and the metrics.
        path: the file.
        metric: the metric to draw.
        loss: what the loss is.
        kept: the step whose weights were kept; by default the last evaluation's.
    """
    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = range(1, len(losses) + 1)
    window = max(1, len(losses) // 20)
    left.plot(steps, losses, color=_GREY, linewidth=0.8, label="training, each step")
    if window > 1:
        label = f"training, mean of {window} steps"
        left.plot(steps, smoothed(losses, window), color=_BLUE, linewidth=1.8, label=label)
    at = [e["step"] for e in evaluations]
    left.plot(at, [e["loss"] for e in evaluations], "o-", color=_ORANGE, label="evaluation")
    left.set(xlabel="step", ylabel=loss, title="Loss")
    name = metric.replace("_", " ")
    values = [e[metric] for e in evaluations]
    right.plot(at, values, "o-", color=_ORANGE)
    if values:
        kept = at[-1] if kept is None else kept
        value = values[at.index(kept)]
        for axes in (left, right):
            label = f"kept weights, step {kept}"
            axes.axvline(kept, color="black", linestyle=":", linewidth=1.2, label=label)
        right.plot([kept], [value], "o", color="black")
        right.annotate(
            f"{value:.3f}", (kept, value), xytext=(-4, 8), textcoords="offset points", ha="right"
        )
    left.legend(edgecolor="none")
    right.set(xlabel="step", ylabel=name, title=f"Evaluation: {name}")
    right.margins(y=0.15)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    save_figure(figure, path)


def draw_gate_weights(
    weights: Sequence[Sequence[float]], path: str | Path, *, rows: Sequence[str] = ()
) -> None:
    """Draw each prompt token's gate weights over the subspaces as a heat map, as PNG.

    Args:
        weights: ``[m, K]``, rows summing to 1.
        path: the file.
        rows: what the rows are, if not the tokens of a prompt.

    Raises:
        ValueError: no subspaces.
    """
    if not weights or not weights[0]:
        raise ValueError(f"weights: expected at least one token and one space, got {weights!r}")
    tokens, spaces = len(weights), len(weights[0])
    figure = Figure(
        figsize=(max(6.0, 0.32 * tokens + 2), 1.8 + 0.45 * spaces), dpi=120, layout="constrained"
    )
    axes = figure.subplots()
    columns = [list(column) for column in zip(*weights, strict=True)]  # [K, m]
    image = axes.imshow(columns, aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set(
        xlabel="data set" if rows else "prompt token",
        ylabel="subspace",
        title=f"Gate weights (an even gate gives {1 / spaces:.2f} everywhere)",
    )
    axes.set_yticks(range(spaces))
    every = max(1, -(-tokens // 40))
    axes.set_xticks(range(0, tokens, every), rows[::every] if rows else None)
    axes.tick_params(axis="x", labelsize=8)
    bar = figure.colorbar(image, ax=axes)
    bar.set_label("weight")
    if tokens <= 40:
        low, high = image.get_clim()
        for token, row in enumerate(weights):
            for space, weight in enumerate(row):
                dark = weight < (low + high) / 2
                axes.text(
                    token,
                    space,
                    f"{weight:.2f}"[1:] if weight < 0.995 else "1",
                    ha="center",
                    va="center",
                    fontsize=6,
                    color="white" if dark else "black",
                )
    save_figure(figure, path)


def write_samples(samples: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Write generated texts as Markdown: of each row the text, the target and the output.

    Args:
        samples: dicts of ``text`` and ``output`` and, if rows have targets, ``target``,
            ``exact_match`` and ``f1``, else ``rest``; of several data sets also ``task``.
        path: the file.
    """
    lines = ["# What the adapter writes", ""]
    judged = [sample for sample in samples if "f1" in sample]
    if judged:
        right = sum(bool(sample["exact_match"]) for sample in judged)
        mean = sum(float(sample["f1"]) for sample in judged) / len(judged)
        lines += [f"{right} of {len(judged)} outputs match their target; mean F1 {mean:.3f}.", ""]
    for number, sample in enumerate(samples, 1):
        verdict = ""
        if "f1" in sample:
            verdict = ": match" if sample["exact_match"] else f": F1 {sample['f1']:.3f}"
        lines += [f"## {number}{verdict}", ""]
        for name in ("task", "text", "target", "rest", "output"):
            if name in sample:
                # An indented block shows any text as it is, whatever Markdown is in it.
                block = str(sample[name]).splitlines() or [""]
                lines += [f"{name}:", "", *(f"    {line}" for line in block), ""]
    write_bytes(Path(path), "\n".join(lines).encode())


def describe_run(metrics: dict[str, Any], output: Path) -> list[str]:
    """What a finished run has to say, one line for each fact."""
    after, rows = metrics["after"], metrics["rows"]
    counts = metrics["parameters"]
    trained, whole = counts["prompt"] + counts["head"], sum(counts.values())
    lines = _scores(metrics)
    for name in after.get("tasks", [""]):
        which = f" ({name})" if name else ""
        facts = rows[name] if name else rows
        if "train_targets_cut" in facts:
            learnt = (
                "targets" if facts["targets"] else "the texts themselves, as no row has a target"
            )
            lines.append(f"learnt{which}: {learnt}")
        lines.append(f"evaluated on{which}: {facts['evaluation_source']}")
    lines += [
        f"time per step: {1000 * metrics['seconds_per_step']:.0f} ms (median)",
        f"parameters trained: {trained:,} (prompt {counts['prompt']:,}, head {counts['head']:,}), "
        f"{100 * trained / whole:.2f}% of {whole:,}",
    ]
    if held := min(metrics["config"]["gate_steps"], metrics["steps"]):
        lines.append(f"gates and head alone: in the first {held} of {metrics['steps']} steps")
    for name in after.get("tasks", [""]):
        lines += _cuts(rows[name] if name else rows, f" ({name})" if name else "")
    pictures = str(output / "learning_curves.png")
    if metrics["gate_weights"] is None:
        pictures += " (no subspaces, so no gate weights to draw)"
    else:
        pictures += f", {output / 'gate_weights.png'}"
    lines += [
        *(
            f"adapter{f' ({name})' if name else ''}: {output / 'adapter' / name}"
            for name in after.get("tasks", [""])
        ),
        f"metrics: {output / 'metrics.json'}",
        f"pictures: {pictures}",
    ]
    if metrics["samples"]:
        lines.append(f"samples: {output / 'samples.md'}")
    return lines


def _scores(metrics: dict[str, Any]) -> list[str]:
    """The metrics before and after, of several data sets their mean and those of each."""
    judged_by, before, after = metrics["metric"], metrics["before"], metrics["after"]
    tasks = after.get("tasks", {})
    names = [judged_by]
    if metrics["config"]["task"] != "classification":
        names += [name for name in TEXT_METRICS if name in after and name != judged_by]
    lines = []
    for name in names:
        title = name.replace("_", " ")
        start = "not measured" if before is None else f"{before[name]:.4f}"
        count = f"mean of {len(tasks)} data sets" if tasks else _rows(metrics, name)
        lines.append(
            f"{title}: {start} before, {after[name]:.4f} after {after['step']} steps ({count})"
        )
        for task, found in tasks.items():
            start = "not measured" if before is None else f"{before['tasks'][task][name]:.4f}"
            count = _rows(metrics, name, task)
            lines.append(f"{title} ({task}): {start} before, {found[name]:.4f} after ({count})")
    return lines


def _rows(metrics: dict[str, Any], metric: str, task: str | None = None) -> str:
    """How many rows a metric is of."""
    if metric in GENERATED_METRICS:
        return f"{sum(sample.get('task') == task for sample in metrics['samples'])} rows"
    rows = metrics["rows"] if task is None else metrics["rows"][task]
    return f"{rows['evaluation']} rows"


def _cuts(rows: Mapping[str, Any], which: str) -> list[str]:
    """How many rows of a data set lost a part, if any did."""
    lines = []
    for name, what in (
        ("cut", f"rows cut to {rows['max_length']} tokens{which}"),
        ("targets_cut", f"targets cut{which}"),
    ):
        cut = rows.get(f"train_{name}", 0) + rows.get(f"evaluation_{name}", 0)
        if cut:
            lines.append(f"{what}: {cut} of {rows['train'] + rows['evaluation']}")
    return lines
