"""The tables and the pictures of the study, from its records alone."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.accuracy import study as plan
from bench.accuracy.records import RUNS_FILE, device_of, read_records
from bench.accuracy.study import LABELS, PARTS, POINTS, Record
from bench.rows import write_csv

DRAWS = 10_000  # of the bootstrap

RESULT_COLUMNS = (
    "part", "task", "method", "point", "runs", "mean", "std", "values", "steps", "rates",
    "parameters", "step_seconds", "ratio_to_pt", "test_rows", "device", "torch", "transformers",
    "commit",
)  # fmt: skip
DIFFERENCE_COLUMNS = ("part", "point", "method", "against", "tasks", "runs", "mean", "low", "high")
CHOICE_COLUMNS = (
    "choice", "runs", "loss", "loss_low", "loss_high", "accuracy", "accuracy_low", "accuracy_high",
    "tested",
)  # fmt: skip

Scores = dict[tuple[str, int], float]  # by task and seed


def on_one_device(records: Sequence[Record], wanted: str | None = None) -> list[Record]:
    """The records of one device: the one that ``wanted`` is the name of, or a part of it.

    Raises:
        SystemExit: records of several devices are meant, or none.
    """
    names = list(dict.fromkeys(device_of(record) for record in records))
    meant = [name for name in names if (wanted or "").lower() in name.lower()]
    if wanted in names:
        meant = [wanted]
    if len(meant) > 1 or (names and not meant):
        got = "none" if wanted is None else repr(wanted)
        raise SystemExit(
            f"--device: expected the name of one device, or a part of it, among "
            f"{'; '.join(names)}; got {got}"
        )
    return [record for record in records if device_of(record) in meant]


def of_kind(records: Sequence[Record], kind: str, part: str) -> list[Record]:
    """The records of one kind and part that belong to the newest plan of their run.

    Those that the part takes from another are among them.
    """
    names = ("task", "method", "setting", "seed")
    newest = {
        tuple(record[name] for name in names): record
        for record in records
        if (record["kind"], record["part"]) == (kind, plan.home(part, record["method"]))
    }
    return list(newest.values())


def timing_of(records: Sequence[Record], part: str, method: str, task: str) -> Record:
    """The record by which a part's method had as much time as the base on a task."""
    timings = of_kind(records, "timing", plan.home(part, method))
    return next(record for record in timings if record["task"] == task)


def test_scores(records: Sequence[Record], part: str, point: str) -> dict[str, Scores]:
    """Accuracy on the test rows by method, of the tasks on which every method has every seed."""
    found: dict[str, Scores] = {}
    for record in of_kind(records, "test", part):
        score = float(record[point]["test"]["accuracy"])
        found.setdefault(record["method"], {})[record["task"], record["seed"]] = score
    p = PARTS[part]
    whole = {
        task
        for task in p.tasks
        if all((task, seed) in found.get(name, {}) for name in p.methods for seed in p.seeds)
    }
    return {
        method: {key: score for key, score in found[method].items() if key[0] in whole}
        for method in p.methods
        if whole
    }


def interval(ours: Scores, theirs: Scores) -> tuple[float, float, float]:
    """The mean paired difference, and its 95% interval by bootstrap over tasks and seeds.

    A draw takes as many tasks as there are, with replacement, and for each as many of its seeds,
    with replacement. The mean is the mean over tasks of the mean over seeds.
    """
    differences: dict[str, list[float]] = {}
    for key in sorted(ours.keys() & theirs.keys()):
        differences.setdefault(key[0], []).append(ours[key] - theirs[key])
    groups = list(differences.values())
    generator = random.Random(0)

    def drawn() -> float:
        tasks = generator.choices(groups, k=len(groups))
        return statistics.fmean(
            statistics.fmean(generator.choices(seeds, k=len(seeds))) for seeds in tasks
        )

    draws = sorted(drawn() for _ in range(DRAWS))
    mean = statistics.fmean(statistics.fmean(seeds) for seeds in groups)
    return mean, draws[round(0.025 * (DRAWS - 1))], draws[round(0.975 * (DRAWS - 1))]


def result_rows(records: Sequence[Record]) -> list[Record]:
    """One row for each part, task, method and point of comparison."""
    rows = []
    for part, point in itertools.product(PARTS, POINTS):
        scores = test_scores(records, part, point)
        trains = of_kind(records, "train", part)
        tests = of_kind(records, "test", part)
        for method, found in scores.items():
            for task in dict.fromkeys(task for task, _ in found):
                mine = [r for r in tests if (r["task"], r["method"]) == (task, method)]
                mine.sort(key=lambda r: r["seed"])
                values = [100 * float(r[point]["test"]["accuracy"]) for r in mine]
                trained = next(r for r in trains if (r["task"], r["method"]) == (task, method))
                timing = timing_of(records, part, method, task)
                timed = plan.TIMED_AS.get(method, method)
                rows.append(
                    {
                        "part": part,
                        "task": task,
                        "method": method,
                        "point": point,
                        "runs": len(values),
                        "mean": statistics.fmean(values),
                        "std": statistics.stdev(values),
                        "values": " ".join(f"{v:.1f}" for v in values),
                        "steps": " ".join(str(r[point]["step"]) for r in mine),
                        "rates": " ".join(r[point]["setting"] for r in mine),
                        "parameters": trained.get("parameters", {}).get("prompt", 0),
                        "step_seconds": timing["step_seconds"].get(timed, math.nan),
                        "ratio_to_pt": timing["ratios"].get(timed, math.nan),
                        "test_rows": mine[0]["rows"]["test"],
                        "device": device_of(mine[0]),
                        "torch": _all(r["versions"]["torch"] for r in mine),
                        "transformers": _all(r["versions"]["transformers"] for r in mine),
                        "commit": _all(r["commit"] for r in mine),
                    }
                )
    return rows


def difference_rows(records: Sequence[Record]) -> list[Record]:
    """The paired differences of both forms of EPT to every other method, in points of accuracy."""
    rows = []
    for ours, part, point in itertools.product(("ept", "ept_tuned"), PARTS, POINTS):
        scores = test_scores(records, part, point)
        for method in scores:
            if ours not in scores or method == ours:
                continue
            mean, low, high = (100 * v for v in interval(scores[ours], scores[method]))
            rows.append(
                {
                    "part": part, "point": point, "method": ours, "against": method,
                    "tasks": len({task for task, _ in scores[ours]}), "runs": len(scores[ours]),
                    "mean": mean, "low": low, "high": high,
                }
            )  # fmt: skip
    return rows


def choice_rows(records: Sequence[Record]) -> list[Record]:
    """One row for each choice: validation loss and accuracy against EPT as it was."""
    found: dict[str, dict[str, Scores]] = {}
    for record in of_kind(records, "train", "choices"):
        best = plan.best_evaluation(record, "time")
        key = (record["task"], record["seed"])
        for name in ("loss", "accuracy"):
            found.setdefault(record["method"], {}).setdefault(name, {})[key] = float(best[name])
    rows = []
    for choice in (name for name in plan.CHOICES if name in found):
        loss = interval(found[choice]["loss"], found["ept"]["loss"])
        accuracy = interval(found[choice]["accuracy"], found["ept"]["accuracy"])
        names = ("loss", "loss_low", "loss_high")
        rows.append(
            {
                "choice": choice,
                "runs": len(found[choice]["loss"]),
                **dict(zip(names, loss, strict=True)),
                **{
                    n.replace("loss", "accuracy"): 100 * v
                    for n, v in zip(names, accuracy, strict=True)
                },
                "tested": "yes" if plan.tested(choice) else "no",
            }
        )
    return rows


def _all(values: Any) -> str:
    """The different values, as in "a and b"."""
    return " and ".join(dict.fromkeys(str(value) for value in values))


# The tables of docs/results.md


def markdown(
    results: Sequence[Record], differences: Sequence[Record], choices: Sequence[Record]
) -> str:
    """All tables, as they stand in the documentation."""
    parts = []
    for part, point in dict.fromkeys((r["part"], r["point"]) for r in results):
        mine = [r for r in results if (r["part"], r["point"]) == (part, point)]
        tasks = list(dict.fromkeys(r["task"] for r in mine))
        names = [task.split("/")[-1] for task in tasks]
        header = [f"{_title(part)}, equal {point}", "parameters", "step", *names, "mean"]
        body = []
        for method in dict.fromkeys(r["method"] for r in mine):
            by_task = {r["task"]: r for r in mine if r["method"] == method}
            rows = [by_task[task] for task in tasks]
            ratio = statistics.fmean(r["ratio_to_pt"] for r in rows)
            cells = [f"{r['mean']:.1f} ± {r['std']:.1f}" for r in rows]
            mean = statistics.fmean(r["mean"] for r in rows)
            step = "–" if math.isnan(ratio) else f"{ratio:.2f}"
            count = max(r["parameters"] for r in rows)
            body.append([LABELS[method], f"{count:,}", step, *cells, f"{mean:.1f}"])
        parts.append(_table(header, body))
    # Parts that take over runs compare them with others: in tables of their own.
    for ours, again in dict.fromkeys((r["method"], _takes(r["part"])) for r in differences):
        found = {
            (r["part"], r["point"], r["against"]): r
            for r in differences
            if (r["method"], _takes(r["part"])) == (ours, again)
        }
        places = dict.fromkeys((part, point) for part, point, _ in found)
        header = [f"{LABELS[ours]}: its accuracy minus that of"]
        header += [f"{_title(part)}, equal {point}" for part, point in places]
        body = [
            [LABELS[method], *(_interval(found.get((*place, method))) for place in places)]
            for method in dict.fromkeys(method for *_, method in found)
        ]
        parts.append(_table(header, body))
    if choices:
        header = ["tried in place of EPT's setting", "validation loss", "validation accuracy"]
        body = [
            [
                r["choice"],
                f"{r['loss']:+.3f} ({r['loss_low']:+.3f} to {r['loss_high']:+.3f})",
                f"{r['accuracy']:+.1f} ({r['accuracy_low']:+.1f} to {r['accuracy_high']:+.1f})",
                r["tested"],
            ]
            for r in choices
        ]
        parts.append(_table([*header, "tested"], body))
    return "\n".join(parts)


def _title(part: str) -> str:
    return {"few_shot": "few-shot", "full": "full data", "methods": "all methods"}[part]


def _takes(part: str) -> bool:
    return bool(PARTS[part].taken)


def _interval(row: Record | None) -> str:
    return "–" if row is None else f"{row['mean']:+.1f} ({row['low']:+.1f} to {row['high']:+.1f})"


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rule = f"|---|{'---:|' * (len(header) - 1)}"
    rows = [f"| {' | '.join(line)} |" for line in (header, *body)]
    return "\n".join([rows[0], rule, *rows[1:]]) + "\n"


# Pictures

_COLOURS = {
    "pt": "#a0aec0", "pt_20": "#ed8936", "dept": "#63b3ed", "ept": "#2b6cb0",
    "lamp": "#d53f8c", "residual": "#38a169", "mp2": "#805ad5", "attempt": "#d69e2e",
    "accept": "#e53e3e", "ulpt": "#319795", "ulpt_2": "#81e6d9", "pre": "#744210",
}  # fmt: skip


def draw_forest(rows: Sequence[Record], path: Path) -> None:
    """EPT's paired differences with their intervals, one panel for each part and point."""
    from matplotlib.figure import Figure

    from ept_fast.training.report import save_figure

    rows = [row for row in rows if row["method"] == "ept" and not _takes(row["part"])]
    panels = list(dict.fromkeys((row["part"], row["point"]) for row in rows))
    figure = Figure(figsize=(4.4 * len(panels), 3.2), dpi=120, layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (part, point) in zip(grid, panels, strict=True):
        mine = [r for r in rows if (r["part"], r["point"]) == (part, point)][::-1]
        for place, row in enumerate(mine):
            axes.plot([row["low"], row["high"]], [place, place], color="#2b6cb0", linewidth=2)
            axes.plot([row["mean"]], [place], "o", color="#2b6cb0")
        axes.axvline(0, color="#4a5568", linewidth=1, linestyle="--")
        axes.set_yticks(range(len(mine)), [LABELS[r["against"]] for r in mine], fontsize=8)
        title = f"{_title(part)}, equal {point}"
        axes.set(title=title, xlabel="EPT's accuracy minus theirs (points)")
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def curves(
    records: Sequence[Record], part: str, task: str
) -> Mapping[str, tuple[list[float], list[float]]]:
    """By method, seconds of training and mean validation accuracy over the seeds.

    Of each seed, the run whose rate the validation rows chose at equal time. A run that stopped
    early keeps its last value. Seconds are steps times the base's measured time of a step and the
    method's ratio to it, by which equal time goes.
    """
    tests = [r for r in of_kind(records, "test", part) if r["task"] == task]
    trains = {
        (r["method"], r["setting"], r["seed"]): r
        for r in of_kind(records, "train", part)
        if r["task"] == task
    }
    base_seconds = timing_of(records, part, plan.BASE, task)["step_seconds"][plan.BASE]
    found: dict[str, tuple[list[float], list[float]]] = {}
    for method in PARTS[part].methods:
        ratio = timing_of(records, part, method, task)["ratios"].get(method)
        if ratio is None:
            continue
        runs = [
            trains[method, test["time"]["setting"], test["seed"]]["evaluations"]
            for test in tests
            if test["method"] == method
        ]
        if not runs:
            continue
        steps = sorted({e["step"] for run in runs for e in run})
        means = [
            statistics.fmean([e["accuracy"] for e in run if e["step"] <= step][-1] for run in runs)
            for step in steps
        ]
        seconds = [step * float(ratio) * float(base_seconds) for step in steps]
        found[method] = (seconds, [100 * value for value in means])
    return found


def draw_curves(records: Sequence[Record], part: str, path: Path) -> None:
    """Validation accuracy against seconds, one panel for each task of a part."""
    from matplotlib.figure import Figure

    from ept_fast.training.report import save_figure

    tasks = list(dict.fromkeys(task for task, _ in test_scores(records, part, "time")["ept"]))
    width = 4.2 * len(tasks) + 2.6 * _takes(part)
    figure = Figure(figsize=(width, 3.4), dpi=120, layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for method, (seconds, values) in curves(records, part, task).items():
            if method in _COLOURS:
                colour, label = _COLOURS[method], LABELS[method]
                axes.plot(seconds, values, "o-", color=colour, label=label, markersize=3)
        axes.set(title=task, xlabel="seconds of training", ylabel="validation accuracy (%)")
        axes.spines[["top", "right"]].set_visible(False)
    if _takes(part):  # too many for a corner
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, fontsize=8, frameon=False, loc="outside right upper")
    else:
        axes.legend(fontsize=8, frameon=False)
    save_figure(figure, path)


def report(out: Path, device: str | None = None) -> None:
    """Write the tables (CSV and tables.md) and pictures of one device, and print the tables."""
    from ept_fast.storage.files import write_bytes

    records = on_one_device(read_records(out), device)
    results, differences = result_rows(records), difference_rows(records)
    choices = choice_rows(records)
    if not results and not choices:
        raise SystemExit(f"{out / RUNS_FILE}: expected a task with all of its runs, got none")
    for name, columns, rows in (
        ("results", RESULT_COLUMNS, results),
        ("differences", DIFFERENCE_COLUMNS, differences),
        ("choices", CHOICE_COLUMNS, choices),
    ):
        if rows:
            write_csv(out / f"{name}.csv", columns, rows)
    tables = markdown(results, differences, choices)
    write_bytes(out / "tables.md", tables.encode())
    print(tables)
    if any(not _takes(row["part"]) for row in differences):
        draw_forest(differences, out / "differences.png")
    for part in dict.fromkeys(row["part"] for row in results):
        draw_curves(records, part, out / f"curves-{part}.png")
