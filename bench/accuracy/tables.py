"""The tables and the picture of the study, from its records alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.accuracy.records import RUNS_FILE, device_of, read_records
from bench.accuracy.study import LABELS, METHODS, TASKS
from bench.rows import aligned, write_csv

_UNKNOWN = "not recorded"

COLUMNS = (
    "task", "metric", "method", "runs", "mean", "std", "values", "setting", "steps", "parameters",
    "seconds_per_step", "timing_seconds_p50", "timing_ratio_to_pt", "peak_bytes",
    "peak_bytes_over_loaded", "threads", "machine", "device", "backend", "torch", "transformers",
    "commit",
)  # fmt: skip


def on_one_device(
    records: Sequence[dict[str, Any]], wanted: str | None = None
) -> list[dict[str, Any]]:
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


def summary(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each task and method, from the newest final runs and timings."""
    timings = {r["method"]: r for r in records if r["kind"] == "timing"}
    finals: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        if record["kind"] == "final":
            finals.setdefault((record["task"], record["method"]), []).append(record)
    rows = []
    for task in TASKS:
        for method in METHODS:
            found = finals.get((task, method), [])
            if not found:
                continue
            newest = found[-1]
            alike = [
                r
                for r in found
                if all(r[n] == newest[n] for n in ("setting", "steps", "batch_size", "sizes"))
            ]
            values = [float(r["value"]) for r in sorted(alike, key=lambda r: r["seed"])]
            timing = timings.get(method, {})
            rows.append(
                {
                    "task": task,
                    "metric": newest["metric"],
                    "method": method,
                    "runs": len(values),
                    "mean": statistics.fmean(values),
                    "std": statistics.stdev(values) if len(values) > 1 else math.nan,
                    "values": " ".join(f"{v:.4f}" for v in values),
                    "setting": newest["setting"],
                    "steps": newest["steps"],
                    "parameters": newest["parameters"]["prompt"],
                    "seconds_per_step": statistics.fmean(r["seconds_per_step"] for r in alike),
                    "timing_seconds_p50": timing.get("seconds_p50", math.nan),
                    "timing_ratio_to_pt": timing.get("ratio_to_pt", math.nan),
                    "peak_bytes": timing.get("peak_bytes", ""),
                    "peak_bytes_over_loaded": timing.get("peak_bytes_over_loaded", ""),
                    "threads": newest["threads"],
                    "machine": newest["machine"],
                    "device": device_of(newest),
                    "backend": _all(r.get("backend") for r in alike),
                    "torch": _all(r.get("versions", {}).get("torch") for r in alike),
                    "transformers": _all(r.get("versions", {}).get("transformers") for r in alike),
                    "commit": _all(r.get("commit") for r in alike),
                }
            )
    return rows


def _all(values: Iterable[Any]) -> str:
    """The different values, as in "a and b"."""
    return " and ".join(dict.fromkeys(str(value or _UNKNOWN) for value in values))


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars of mean and standard deviation, one group for each task, every seed as a dot."""
    from matplotlib.figure import Figure

    from ept_fast.training.report import save_figure

    tasks = [task for task in TASKS if any(r["task"] == task for r in rows)]
    colours = ("#a0aec0", "#63b3ed", "#2b6cb0", "#ed8936", "#68d391")
    figure = Figure(figsize=(3.6 * len(tasks) + 1.6, 4), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        part = [r for r in rows if r["task"] == task]
        seeds = [[100 * float(v) for v in r["values"].split()] for r in part]
        for place, (row, values) in enumerate(zip(part, seeds, strict=True)):
            mean, std = 100 * row["mean"], 100 * row["std"]
            colour = colours[list(METHODS).index(row["method"])]
            error = None if math.isnan(std) else std
            axes.bar(place, mean, yerr=error, color=colour, capsize=4, width=0.7)
            axes.plot([place] * len(values), values, "k.", markersize=4)
            axes.annotate(
                f"{mean:.1f}", (place, max([*values, mean + (error or 0)])), xytext=(0, 4),
                textcoords="offset points", ha="center", fontsize=9,
            )  # fmt: skip
        every = [value for values in seeds for value in values]
        low, high = min(every), max(every)
        room = max(high - low, 2.0)
        axes.set_ylim(max(0, low - room), high + 0.5 * room)
        axes.set_xticks(range(len(part)))
        names = [LABELS[r["method"]].replace(", ", ",\n") for r in part]
        axes.set_xticklabels(names, rotation=40, ha="right", fontsize=9)
        axes.set(title=task, ylabel=f"{TASKS[task][1]} (%, axis cut)")
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def report(out: Path, device: str | None = None) -> None:
    """Write results.csv and results.png from the records of one device, and print a table."""
    rows = summary(on_one_device(read_records(out), device))
    if not rows:
        raise SystemExit(f"{out / RUNS_FILE}: expected finished final runs, got none")
    write_csv(out / "results.csv", COLUMNS, rows)
    draw(rows, out / "results.png")
    shown = [name for name in COLUMNS if name != "values"]
    print("\n".join(aligned(shown, ([row[name] for name in shown] for row in rows))))
