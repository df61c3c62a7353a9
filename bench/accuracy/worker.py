"""The runs of one process, which keeps the encoder and the tokenised rows between them."""

from __future__ import annotations

import dataclasses
import hashlib
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.accuracy import study as plan
from bench.accuracy.records import done_runs, read_records
from bench.accuracy.study import PARTS, POINTS, PROBE, Record, Run, Study
from bench.accuracy.training import (
    Rates,
    features,
    fit_head,
    frozen_features,
    load_tensors,
    step_seconds,
    train,
)
from bench.environment import commit, machine, origin_of

HOLD_OUT_SEED = 2024  # of the rows held out: the same for every method and setting
TIMED_STEPS = 24  # of each method, after two that warm up
EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Tokens:
    """A task's rows as token ids; ``texts`` are those of the training rows."""

    train: Any
    validation: Any
    test: Any
    texts: tuple[str, ...]
    labels: tuple[str, ...]


def serve(pipe: Connection, study: Study) -> None:
    """Answer every run that comes with its record, until None comes or the pipe closes."""
    runner = Runner(study)
    while True:
        try:
            run = pipe.recv()
        except EOFError:  # the study's process is gone
            return
        if run is None:
            return
        pipe.send(runner(run))


class Runner:
    """Does one run after another.

    The encoder is loaded once and frozen; that no run changed it is checked after each.
    """

    def __init__(self, study: Study) -> None:
        from ept_fast.training.batches import Collator
        from ept_fast.transformers.backbone import load_backbone, load_tokenizer

        torch.set_num_threads(study.threads)
        self.study = study
        self.tokenizer = load_tokenizer(study.model)
        self.collator = Collator.of(self.tokenizer)
        self.backbone: Any = load_backbone(study.model, dtype=getattr(torch, study.dtype))
        if study.device == "cpu" and study.dtype == "bfloat16":
            # In bfloat16 the CPU's fused attention has a backward of three times the time.
            self.backbone.set_attn_implementation("eager")
        self.backbone.to(study.device)
        self.weights = {name: t.clone() for name, t in self.backbone.state_dict().items()}
        self._tokens: dict[tuple[str, int], Tokens] = {}
        self._frozen: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, run: Run) -> Record:
        """Do one run and give its record."""
        start = time.perf_counter()
        work = {"timing": self.time, "train": self.train, "test": self.test}[run.kind]
        record = work(run)
        for name, tensor in self.backbone.state_dict().items():
            if not torch.equal(tensor, self.weights[name]):
                raise RuntimeError(f"{name}: expected the encoder's frozen weights, got others")
        return {
            **dataclasses.asdict(run),
            **record,
            "seconds": time.perf_counter() - start,
            "threads": self.study.threads,
            "workers": self.study.workers,
            **origin(self.study.device),
        }

    # Kinds of runs

    def time(self, run: Run) -> Record:
        """Seconds of each method's training step by the base's, on the same batches in turn."""
        from ept_fast.training.batches import GroupedBatches

        part = PARTS[run.part]
        tokens = self.tokens(run.part, run.task, part.seeds[0])
        methods = [plan.BASE, *(m for m in plan.timed_methods(run.part) if m != plan.BASE)]
        models = {}
        for method in methods:
            model, rates = self.model(run, method, tokens, part.seeds[0])
            models[method] = (model, rates.optimizer(model, 1e-2))
        order = GroupedBatches(tokens.train.lengths, part.batch_size, TIMED_STEPS + 2, seed=0)
        seconds: dict[str, list[float]] = {method: [] for method in methods}
        for number, indices in enumerate(order):
            batch = self.collator([tokens.train[i] for i in indices])
            shift = number % len(methods)  # no method always runs first
            for method in (*methods[shift:], *methods[:shift]):
                taken = step_seconds(*models[method], batch)
                if number >= 2:
                    seconds[method].append(taken)
        base = seconds[plan.BASE]
        ratios = {
            method: statistics.median(a / b for a, b in zip(taken, base, strict=True))
            for method, taken in seconds.items()
        }
        return {
            "ratios": ratios,
            "step_seconds": {m: statistics.median(taken) for m, taken in seconds.items()},
        }

    def train(self, run: Run) -> Record:
        """Train with one setting, judged on the validation rows; the probe is fitted instead."""
        from ept_fast.ops import dispatch
        from ept_fast.ops.types import SpliceInputs

        tokens = self.tokens(run.part, run.task, run.seed)
        limits = {f"{point}_limit": 0 for point in POINTS}
        if run.method == PROBE:
            X, y = self.frozen(tokens.train)
            weight, bias = fit_head(X, y, len(tokens.labels), plan.PENALTIES[run.setting])
            state = {"weight": weight, "bias": bias}
            torch.save(dict.fromkeys(POINTS, state), self.weights_path(run, make=True))
            X, y = self.frozen(tokens.validation)
            found = {"step": 0, **_metrics(X @ weight.T + bias, y)}
            return {"evaluations": [found], **limits, **_rows(tokens)}
        model, rates = self.model(run, run.method, tokens, run.seed)
        timing = self.timing(run)
        equal = plan.steps_of(self.study, run.part)
        in_time = plan.steps_in_time(self.study, run.part, run.method, timing)
        limits = {"steps_limit": equal, "time_limit": in_time}
        penalty = plan.settings_of(run.part, run.method).get("_head")
        if penalty is not None:
            X, y = features(model, tokens.train, self.collator)
            weight, bias = fit_head(X, y, len(tokens.labels), penalty)
            with torch.no_grad():
                model.head.weight.copy_(weight)
                model.head.bias.copy_(bias)
        torch.manual_seed(run.seed)  # of what a method draws in training
        result = train(
            model,
            rates.optimizer(model, plan.RATES[run.setting]),
            tokens.train,
            self.collator,
            batch_size=PARTS[run.part].batch_size,
            seed=run.seed,
            limits=limits,
            evaluate=lambda: self.judge(model, tokens.validation),
        )
        weights = result.pop("weights")
        if PARTS[run.part].tested:
            torch.save(weights, self.weights_path(run, make=True))
        config = model.prompt.config
        prompt = torch.empty(config.num_virtual_tokens, config.hidden_size, device=model.device)
        return {
            **result,
            **limits,
            "parameters": model.parameter_counts(),
            "prompt": config.to_dict(),
            "backend": dispatch.select(None, SpliceInputs(prompt)),
            **_rows(tokens),
        }

    def test(self, run: Run) -> Record:
        """Evaluate what the validation rows chose on the test rows, at each point of comparison."""
        tokens = self.tokens(run.part, run.task, run.seed)
        found: Record = {}
        tried = plan.tried_settings(
            self.study, self.done(), run.part, run.task, run.method, run.seed
        )
        for point in POINTS:
            setting = plan.chosen(tried, point)
            source = plan.train_run(self.study, run.part, run.task, run.method, setting, run.seed)
            best = plan.best_evaluation(tried[setting], point)
            same = [
                f for f in found.values() if (f["setting"], f["step"]) == (setting, best["step"])
            ]
            scores = same[0]["test"] if same else self.scores(run, tokens, source, point)
            found[point] = {
                "setting": setting,
                "step": best["step"],
                "validation": {name: best[name] for name in scores},
                "test": scores,
            }
        for setting in tried:
            source = plan.train_run(self.study, run.part, run.task, run.method, setting, run.seed)
            self.weights_path(source).unlink(missing_ok=True)
        return {**found, **_rows(tokens)}

    # What they share

    def model(self, run: Run, method: str, tokens: Tokens, seed: int) -> tuple[Any, Rates]:
        """An untrained model of a method, and how it is optimised."""
        from ept_fast import get_ept_model

        settings = plan.settings_of(run.part, method)
        width = self.backbone.get_input_embeddings().embedding_dim
        prompt = prompt_config(settings, width, PARTS[run.part].tasks[run.task].max_length)
        generator = torch.Generator().manual_seed(seed)
        init: Any = settings["init"]
        if "_start" in settings:
            init = self.start(settings["_start"], prompt, tokens, generator)
        given = {"text": tokens.texts, "tokenizer": self.tokenizer} if init == "data" else {}
        model = get_ept_model(
            self.backbone, prompt, "SEQ_CLS", labels=tokens.labels, init=init, generator=generator,
            head_dropout=settings["head_dropout"], **given,
        )  # fmt: skip
        if settings.get("_unit"):
            start_at_unit_variance(model.prompt)
        factors = settings.get("_rate", {})
        relative = {name: rate * factors.get(name, 1.0) for name, rate in plan.RELATIVE.items()}
        return model, Rates(relative, plan.HEAD_RATE, settings["weight_decay"])

    @torch.no_grad()
    def start(self, kind: str, prompt: Any, tokens: Tokens, generator: torch.Generator) -> Tensor:
        """Rows to start from: random tokens of the training texts, or means over texts."""
        rows = self.tokenizer(list(tokens.texts), add_special_tokens=False)["input_ids"]
        count = prompt.initial_rows
        embedding = self.backbone.get_input_embeddings()
        if kind == "tokens":
            ids = torch.tensor(sorted({i for row in rows for i in row}))
            found = embedding(ids.to(embedding.weight.device))
        else:
            means = [
                embedding(torch.tensor(r, device=embedding.weight.device)).mean(0) for r in rows
            ]
            found = torch.stack(means)
        order = torch.randperm(len(found), generator=generator)
        return found[order.repeat(-(-count // len(order)))[:count]].float().cpu()

    def timing(self, run: Run) -> Record:
        """The record of the task's timing."""
        return self.done()[plan.timing_run(self.study, run.part, run.task).key]

    def done(self) -> plan.Records:
        """The records so far, those of other processes among them."""
        return done_runs(read_records(self.study.out), device_name(self.study.device))

    def judge(self, model: Any, rows: Any) -> dict[str, float]:
        """Loss and accuracy of rows."""
        from ept_fast.training.evaluation import predict_logits

        logits = predict_logits(model, rows, self.collator, EVALUATION_BATCH)
        return _metrics(logits, torch.tensor(rows.labels))

    def scores(self, run: Run, tokens: Tokens, source: Run, point: str) -> dict[str, float]:
        """The metrics of a finished training run on the test rows."""
        if not self.weights_path(source).exists():  # of a study that went on elsewhere
            self.train(source)
        states = torch.load(self.weights_path(source), weights_only=True)
        if run.method == PROBE:
            X, y = self.frozen(tokens.test)
            return _metrics(X @ states[point]["weight"].T + states[point]["bias"], y)
        model, _ = self.model(run, run.method, tokens, run.seed)
        load_tensors(model, states[point])
        return self.judge(model, tokens.test)

    def frozen(self, rows: Any) -> tuple[Tensor, Tensor]:
        """The plain encoder's features of rows and their labels, computed once."""
        if id(rows) not in self._frozen:  # the rows stay, too
            self._frozen[id(rows)] = frozen_features(self.backbone, rows, self.collator)
        return self._frozen[id(rows)]

    def weights_path(self, run: Run, *, make: bool = False) -> Path:
        """The file of a run's trained tensors."""
        if make:
            self.study.weights.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(run.key.encode()).hexdigest()[:24]
        return self.study.weights / f"{name}.pt"

    def tokens(self, part: str, task: str, seed: int) -> Tokens:
        """A task's rows, tokenised once."""
        how = PARTS[part].tasks[task]
        seed = seed if how.rows_by_seed else 0
        if (task, seed) not in self._tokens:
            self._tokens[task, seed] = self._read(how, task, seed)
        return self._tokens[task, seed]

    def _read(self, task: plan.Task, name: str, seed: int) -> Tokens:
        from ept_fast.training.data import hold_out, read_split
        from ept_fast.training.labels import LabelSet
        from ept_fast.training.tokens import tokenise

        folder = self.study.data / name
        train = read_split(folder / str(seed) if task.rows_by_seed else folder, "train")
        test = read_split(folder, task.test)
        if task.rows_by_seed:
            validation = read_split(folder / str(seed), "validation")
        else:
            train, validation = hold_out(train, task.held_out / len(train), HOLD_OUT_SEED)
        labels = LabelSet.of(train)
        tokens = [
            tokenise(r, self.tokenizer, task.max_length, labels) for r in (train, validation, test)
        ]
        return Tokens(*tokens, train.all_texts, labels.names)


def prompt_config(settings: Mapping[str, Any], hidden_size: int, max_length: int) -> Any:
    """The prompt's config of a method's settings; those of the training itself are left out."""
    from ept_fast.prompts.base import prompt_methods

    fields = {name: value for name, value in settings.items() if name[0] != "_"}
    for name in ("init", "head_dropout", "weight_decay"):
        del fields[name]
    method, length = fields.pop("method", "ept"), fields.pop("prompt_length")
    config = prompt_methods()[method].config_class
    return config.for_method(method, hidden_size, length, max_length=max_length, **fields)


@torch.no_grad()
def start_at_unit_variance(prompt: Any) -> None:
    """Scale an EPT prompt's downward projections to a variance of 1 in the subspaces."""
    prompt.space_down /= (prompt.short_prompt @ prompt.space_down).std()


def _metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    return {
        "loss": float(F.cross_entropy(logits, labels)),
        "accuracy": float((logits.argmax(-1) == labels).double().mean()),
    }


def _rows(tokens: Tokens) -> Record:
    splits = {"train": tokens.train, "validation": tokens.validation, "test": tokens.test}
    counts = {name: len(rows) for name, rows in splits.items()}
    return {"rows": counts, "rows_cut": {name: rows.num_cut for name, rows in splits.items()}}


def origin(device: str) -> Record:
    """Where a record was made, and with what."""
    import ept_fast

    found = origin_of(torch.device(device))
    names = ("torch", "triton", "transformers", "python", "driver", "cuda")
    versions = {name: found[name] for name in names if found[name]}
    return {
        "device": found["device"],
        "machine": machine(),
        "versions": {"ept_fast": ept_fast.__version__, **versions},
        "commit": commit(),
    }


def device_name(device: str) -> str:
    """The name of the device in every record made on it.

    Raises:
        SystemExit: no such device here.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device: expected cpu, got cuda and no CUDA device was found")
    return str(origin(device)["device"])
