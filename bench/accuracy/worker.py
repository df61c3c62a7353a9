"""The runs of one process, which keeps the encoder and the tokenised rows between them."""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bench.accuracy.study import GRID, METHODS, TASKS, Run, Study
from bench.environment import commit, machine, origin_of

HELD_OUT = 500  # training rows that judge the grid
HOLD_OUT_SEED = 2024  # of their choice: the same rows for every method and setting


@dataclass(frozen=True)
class Tokens:
    """A task's rows as token ids.

    Attributes:
        train, evaluation: the rows that train and those that judge.
        labels: names of the classes.
    """

    train: Any
    evaluation: Any
    labels: tuple[str, ...]


def serve(pipe: Connection, study: Study, folder: str) -> None:
    """Answer every run that comes with its record, until None comes or the pipe closes."""
    runner = Runner(study, folder)
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

    The steps are those of :func:`ept_fast.training.job.train`, without the files that it leaves.
    The encoder is loaded once, in float32 whatever the type in its file. It is frozen; that no run
    changed it is checked after each.
    """

    def __init__(self, study: Study, folder: str) -> None:
        from ept_fast.transformers.backbone import load_backbone, load_tokenizer

        torch.set_num_threads(study.threads)
        self.study = study
        self.folder = folder  # for the files that the Trainer writes
        self.tokenizer = load_tokenizer(study.model)
        self.backbone = load_backbone(study.model, dtype=torch.float32)
        self.weights = {name: t.clone() for name, t in self.backbone.state_dict().items()}
        self._tokens: dict[tuple[str, bool, int], Tokens] = {}

    def __call__(self, run: Run) -> dict[str, Any]:
        """Do one run and give its record."""
        from ept_fast import get_ept_model
        from ept_fast.ops import dispatch
        from ept_fast.ops.types import Parameters
        from ept_fast.training.batches import Collator
        from ept_fast.training.config import TrainConfig
        from ept_fast.training.evaluation import ClassEvaluation
        from ept_fast.training.trainer import PromptTrainer
        from ept_fast.transformers.backbone import embedding_width

        start = time.perf_counter()
        final = run.kind == "final"
        with tempfile.TemporaryDirectory(dir=self.folder) as output:
            config = TrainConfig(
                model=self.study.model,
                data=str(self.study.data / run.task),
                output=output,
                max_steps=run.steps,
                batch_size=run.batch_size,
                eval_steps=run.steps,
                seed=run.seed,
                bf16=False,
                device="cpu" if self.study.device == "cpu" else "auto",
                **{**json.loads(run.sizes), **METHODS[run.method], **GRID[run.setting]},
            )
            tokens = self.tokens(run.task, final, config.max_length)
            model = get_ept_model(
                self.backbone,
                config.prompt_config(embedding_width(self.backbone)),
                "SEQ_CLS",
                labels=tokens.labels,
                pooling=config.pooling,
                generator=torch.Generator().manual_seed(run.seed),
            )
            try:
                collator = Collator.of(self.tokenizer)
                trainer = PromptTrainer(
                    model,
                    config,
                    tokens.train,
                    collator,
                    ClassEvaluation(tokens.evaluation, collator, config.eval_batch_size),
                    max_steps=run.steps,
                    folder=Path(output) / "checkpoints",
                    bf16=False,
                    progress=False,
                )
                trainer.train()
                evaluation = trainer.evaluations[-1]
                backend = dispatch.select(
                    None, Parameters(**dict(model.prompt.named_parameters(recurse=False)))
                )
                record = {
                    **dataclasses.asdict(run),
                    "metric": TASKS[run.task][1],
                    "value": evaluation[TASKS[run.task][1]],
                    "evaluation": evaluation,
                    "train_loss": statistics.fmean(trainer.losses[-20:]),
                    "seconds_per_step": statistics.median(trainer.seconds),
                    "threads": self.study.threads,
                    "workers": self.study.workers,
                    "parameters": model.parameter_counts(),
                    "prompt": model.prompt.config.to_dict(),
                    "rates": GRID[run.setting],
                    "rows": {
                        "train": len(tokens.train),
                        "train_cut": tokens.train.num_cut,
                        "evaluation": len(tokens.evaluation),
                        "evaluation_cut": tokens.evaluation.num_cut,
                    },
                    "backend": backend,
                    **origin(self.study.device),
                }
            finally:
                model.unload()
        self._check_encoder()
        return {**record, "seconds": time.perf_counter() - start}

    def tokens(self, task: str, final: bool, max_length: int) -> Tokens:
        """A task's rows, tokenised once; those of the grid are all training rows."""
        key = (task, final, max_length)
        if key not in self._tokens:
            self._tokens[key] = self._read(*key)
        return self._tokens[key]

    def _read(self, task: str, final: bool, max_length: int) -> Tokens:
        from ept_fast.training.data import LabelSet, hold_out, read_split
        from ept_fast.training.tokens import tokenise

        train = read_split(self.study.data / task, "train")
        assert train is not None
        if final:
            evaluation = read_split(self.study.data / task, TASKS[task][0])
            assert evaluation is not None
        else:
            train, evaluation = hold_out(train, HELD_OUT / len(train), HOLD_OUT_SEED)
        labels = LabelSet.of(train)
        return Tokens(
            tokenise(train, self.tokenizer, max_length, labels),
            tokenise(evaluation, self.tokenizer, max_length, labels),
            labels.names,
        )

    def _check_encoder(self) -> None:
        """Bring the encoder back to the device it was loaded on; raise if a run changed it."""
        self.backbone.to("cpu")
        for name, tensor in self.backbone.state_dict().items():
            if not torch.equal(tensor, self.weights[name]):
                raise RuntimeError(f"{name}: expected the encoder's frozen weights, got others")


def origin(device: str) -> dict[str, Any]:
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
