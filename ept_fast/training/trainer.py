"""The transformers Trainer, made to train and to checkpoint a prompt and a head only."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ept_fast.libraries import without_peft
from ept_fast.storage.files import CheckpointError, read_json, write_files, write_json, writing
from ept_fast.training import parallel
from ept_fast.training.batches import Collator, GroupedBatches, PackedBatches, PackingCollator
from ept_fast.training.checkpoints import (
    COMPLETE_FILE,
    complete_checkpoints,
    mark_complete,
    newest_checkpoint,
    remove_checkpoint,
)
from ept_fast.training.config import TrainConfig, find_device
from ept_fast.training.evaluation import Evaluation
from ept_fast.training.metrics import goodness
from ept_fast.training.multitask import (
    MultitaskModel,
    TaskBatches,
    TaskCollator,
    TaskEvaluation,
    TaskRows,
)
from ept_fast.training.tokens import Tokenised
from ept_fast.transformers.adapter import read_adapter
from ept_fast.transformers.tasks import EPTModel

with without_peft():
    from transformers.trainer import Trainer
    from transformers.trainer_callback import (
        EarlyStoppingCallback,
        PrinterCallback,
        TrainerCallback,
    )

__all__ = ["NonFiniteLossError", "PromptTrainer", "train_batches"]

PROGRESS_FILE = "progress.json"
BEST_FOLDER = "best"
LOGS_FOLDER = "logs"
_KEPT = 2
_FIRST = ("spaces", "head")  # the groups that are trained in the first gate_steps


class NonFiniteLossError(RuntimeError):
    """A loss or a weight became NaN or infinite; ``step`` is the step, from 1."""

    def __init__(self, what: str, step: int, checkpoint: Path | None) -> None:
        kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint yet"
        super().__init__(
            f"{what} is not finite at step {step}; training stopped, {kept}. "
            f"Lower learning rates usually help."
        )
        self.step = step
        self._given = (what, step, checkpoint)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._given  # as it goes from one process to another


def _write(folder: Path, save: Callable[[], None]) -> None:
    """Save files into a folder; WriteError if that fails."""
    with writing(folder):
        try:
            save()
        except RuntimeError:
            # torch's writer does not say why it failed. If nothing can be written, this does.
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(1 << 16))
                file.flush()
                os.fsync(file.fileno())
            raise


def _copy(source: Path, folder: Path, names: Sequence[str]) -> None:
    """Replace a folder with a copy of another, of these adapters; CheckpointError if it is damaged.

    Args:
        source: what is copied.
        folder: where to.
        names: folders of the adapters in it; ``""`` for the folder itself.
    """
    for name in names:
        read_adapter(source / name)
    shutil.rmtree(folder, ignore_errors=True)
    files = [path for name in names for path in (source / name).iterdir()]
    write_files({folder / path.relative_to(source): path.read_bytes() for path in files})


def train_batches(
    config: TrainConfig, rows: Tokenised | TaskRows, num_steps: int, pack_length: int | None
) -> GroupedBatches | TaskBatches:
    """The batches that this process trains on.

    Args:
        config: the run.
        rows: its training rows, or those of each task.
        num_steps: optimizer steps.
        pack_length: text tokens of a packed row; None if rows are not packed.

    Raises:
        ValueError: too few rows for the parts of a step, or one too long to be packed.
    """
    if isinstance(rows, TaskRows):
        turns = -(-num_steps // len(rows.tasks))
        tasks: dict[str, Any] = {
            name: train_batches(config, each, turns, pack_length)
            for name, each in rows.tasks.items()
        }
        return TaskBatches(tasks, num_steps)
    size, seed = config.batch_size, config.seed
    parts: dict[str, Any] = {
        "parts": config.gradient_accumulation_steps,
        "rank": parallel.rank(),
        "world_size": parallel.world_size(),
    }
    if pack_length is not None:
        return PackedBatches(rows.lengths, size, num_steps, seed, pack_length, **parts)
    group = config.group_by_length
    return GroupedBatches(rows.lengths, size, num_steps, seed, group=group, **parts)


class PromptTrainer(Trainer):
    """Trains prompt and head of an :class:`EPTModel`, or those of a :class:`MultitaskModel`.

    What differs from its base: four learning rates; batches whose order depends on the seed alone;
    checkpoints that hold no backbone and end with a marker file; a stop at the first non-finite
    loss; an evaluation of its own. The loss of a step is the mean over all of its rows, for text
    tasks over all of its label tokens, however they are divided among the batches of gradient
    accumulation and among processes.

    Args:
        model: the model.
        config: the run.
        train_rows: its data.
        collator: makes the batches of single rows.
        evaluation: judges the model.
        max_steps: optimizer steps of the run.
        folder: where checkpoints go.
        bf16: whether to run under bfloat16 autocast.
        progress: whether to say how far it is, on standard error.
        pack_length: text tokens of a packed row; None if rows are not packed.
    """

    def __init__(
        self,
        model: EPTModel | MultitaskModel,
        config: TrainConfig,
        train_rows: Tokenised | TaskRows,
        collator: Collator,
        evaluation: Evaluation | TaskEvaluation,
        *,
        max_steps: int,
        folder: Path,
        bf16: bool,
        progress: bool,
        pack_length: int | None = None,
    ) -> None:
        every = config.eval_steps or max(1, -(-max_steps // 10))
        reported = config.report_to != "none"
        with _on_device(config.device):
            arguments = transformers.TrainingArguments(
                output_dir=str(folder),
                per_device_train_batch_size=config.batch_size,
                per_device_eval_batch_size=config.eval_batch_size,
                gradient_accumulation_steps=config.gradient_accumulation_steps,
                max_steps=max_steps,
                lr_scheduler_type="linear",
                warmup_steps=math.ceil(max_steps * config.warmup_ratio),
                max_grad_norm=config.max_grad_norm,
                seed=config.seed,
                bf16=bf16,
                use_cpu=config.device == "cpu",
                eval_strategy="steps",
                eval_steps=every,
                save_strategy="steps",
                save_steps=every,
                logging_strategy="steps" if reported else "no",
                logging_steps=max(1, every // 10),
                logging_nan_inf_filter=False,
                report_to="wandb" if config.report_to == "wandb" else "none",
                run_name=folder.parent.name,
                metric_for_best_model=config.judged_by if config.early_stopping_patience else None,
                greater_is_better=goodness(config.judged_by, 1.0) > 0,
                disable_tqdm=True,
                log_level="error",
                remove_unused_columns=False,
                # What only another task has is in no step of this one.
                ddp_find_unused_parameters=isinstance(model, MultitaskModel),
            )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # no DataParallel over every visible GPU
        if _is_named(config.device):
            arguments.__dict__["_setup_devices"] = find_device(config.device)  # else the first GPU
        self.trained = model
        self.run_config = config
        self.rows = train_rows
        whole = collator if pack_length is None else PackingCollator(collator)
        self.collator = TaskCollator(whole) if isinstance(train_rows, TaskRows) else whole
        self.evaluation = evaluation
        self.pack_length = pack_length
        self.losses: list[float] = []
        self.evaluations: list[dict[str, Any]] = []
        self.seconds: list[float] = []
        self.tokens = 0
        self.positions = 0
        self.bf16 = bf16
        self._step_loss = 0.0
        callbacks: list[TrainerCallback] = [_Clock(self.seconds)]
        if progress:
            callbacks.append(_Progress(self))
        self.patience: EarlyStoppingCallback | None = None
        if config.early_stopping_patience is not None:
            limits = (config.early_stopping_patience, config.early_stopping_threshold)
            self.patience = EarlyStoppingCallback(*limits)
            callbacks.append(self.patience)
        if config.report_to == "tensorboard":
            callbacks.append(_tensorboard(folder.parent / LOGS_FOLDER))
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=train_rows,
            eval_dataset=train_rows,  # asked for, and never read: `evaluation` has its own rows
            data_collator=self.collator,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return Path(str(self.args.output_dir))

    @property
    def best_folder(self) -> Path:
        """Where the weights of the best evaluation so far go; every checkpoint has a copy."""
        return self.checkpoints.parent / BEST_FOLDER

    @property
    def adapter_folders(self) -> tuple[str, ...]:
        """Where adapters are in the folder of a checkpoint or of the best weights."""
        return self.trained.names if isinstance(self.trained, MultitaskModel) else ("",)

    @property
    def has_best(self) -> bool:
        """Whether there are such weights."""
        return self.run_config.keep == "best" and bool(self.evaluations)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """This process's batches of the whole run; to the base class it is one epoch."""
        batches = train_batches(self.run_config, self.rows, self.args.max_steps, self.pack_length)
        rows: Any = self.rows
        return DataLoader(rows, batch_sampler=batches, collate_fn=self.collator)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with the learning rates of prompt, offset, spaces and head."""
        if self.optimizer is None:
            c = self.run_config
            groups = self.trained.parameter_groups(c.prompt_lr, c.offset_lr, c.space_lr, c.head_lr)
            self.optimizer = torch.optim.AdamW(groups, weight_decay=c.weight_decay)
        return self.optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """One forward and backward; a non-finite loss stops the run before any weight changes."""
        self.tokens += int(inputs["attention_mask"].sum())
        rows, width = inputs.get("pack_index", inputs["input_ids"]).shape
        self.positions += rows * (self.trained.prompt.config.num_virtual_tokens + width)
        self.trained.set_loss_progress(self.state.global_step / self.state.max_steps)
        loss = super().training_step(model, inputs, num_items_in_batch)
        value = float(self.accelerator.reduce(loss, "mean"))
        if not math.isfinite(value):
            self._stop("the loss", self.state.global_step + 1)
        self._step_loss += value
        if self.accelerator.sync_gradients:  # the last batch of the step
            if self.state.global_step < self.run_config.gate_steps:
                self._hold_all_but_gates()
            self.losses.append(self._step_loss)
            self._step_loss = 0.0
        return loss

    def _hold_all_but_gates(self) -> None:
        """Drop the gradients of what stays as it is in this step: AdamW then leaves it alone."""
        optimizer: Any = self.optimizer
        for group in optimizer.param_groups:
            if group["name"] not in _FIRST:
                for parameter in group["params"]:
                    parameter.grad = None

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss and metrics of the evaluation rows."""
        evaluation: Any = self.evaluation  # of the kind of the model
        metrics = evaluation(self.model)
        step = self.state.global_step
        if not math.isfinite(metrics["loss"]):
            self._stop("the evaluation loss", step)
        self.evaluations.append({"step": step, **metrics})
        if self.has_best and self.best() is self.evaluations[-1]:
            folder, extra = self.best_folder, {"step": step}
            parallel.on_main(lambda: self.trained.save_pretrained(folder, extra=extra))
        named = {f"{metric_key_prefix}_{k}": v for k, v in metrics.items()}
        if self.run_config.report_to != "none":
            self.log({name: v for name, v in named.items() if not isinstance(v, dict)})
        # The base class clears its request to evaluate here; else it would evaluate again.
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        return named

    def samples(self) -> list[dict[str, Any]]:
        """What the model writes for evaluation rows."""
        evaluation: Any = self.evaluation
        return evaluation.samples(self.trained)  # type: ignore[no-any-return]

    def rows_of(self, task: str) -> tuple[Tokenised, Tokenised]:
        """Training and evaluation rows of a task; ``""`` is the only one."""
        rows, evaluation = self.rows, self.evaluation
        if isinstance(rows, TaskRows) and isinstance(evaluation, TaskEvaluation):
            return rows.tasks[task], evaluation.tasks[task].rows
        return rows, evaluation.rows  # type: ignore[return-value, union-attr]

    def best(self) -> dict[str, Any]:
        """The best evaluation so far, the first of equals."""
        metric = self.run_config.judged_by
        return max(self.evaluations, key=lambda e: goodness(metric, e[metric]))

    def _stop(self, what: str, step: int) -> NoReturn:
        """Raise NonFiniteLossError; every process has found the same."""

        def fail() -> NoReturn:
            # One of this step or later would be of a run before this one, and damaged.
            raise NonFiniteLossError(what, step, newest_checkpoint(self.checkpoints, step - 1))

        parallel.on_main(fail)
        raise AssertionError("not reached")

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        for name, parameter in self.trained.named_parameters():
            if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
                self._stop(f"the weight {name}", self.state.global_step)
        folder = self.checkpoints / f"checkpoint-{self.state.global_step}"
        save = super()._save_checkpoint
        parallel.on_main(lambda: remove_checkpoint(folder))  # what an earlier run left there
        try:
            parallel.agreed(lambda: _write(folder, lambda: save(model, trial)))
            progress = {
                "losses": self.losses,
                "evaluations": self.evaluations,
                "seconds": self.seconds,
                "tokens": parallel.total(self.tokens),
                "positions": parallel.total(self.positions),
                "stalled": self.patience and self.patience.early_stopping_patience_counter,
            }
            parallel.on_main(lambda: self._complete(folder, progress))
        except Exception:
            if parallel.is_main() and not (folder / COMPLETE_FILE).exists():
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _complete(self, folder: Path, progress: dict[str, Any]) -> None:
        """Mark a checkpoint as whole, and remove those that it makes needless."""
        if self.has_best:
            _copy(self.best_folder, folder / BEST_FOLDER, self.adapter_folders)
        write_json(folder / PROGRESS_FILE, progress)
        mark_complete(folder)
        for old in complete_checkpoints(self.checkpoints, self.state.global_step)[:-_KEPT]:
            remove_checkpoint(old)

    def check_longer_than(self, checkpoint: Path | None) -> None:
        """Raise ValueError if the run is to have fewer steps than this checkpoint of it."""
        if checkpoint is not None and _step_of(checkpoint) > self.args.max_steps:
            raise ValueError(
                f"max_steps: expected at least the {_step_of(checkpoint)} steps of the run to "
                f"resume, got {self.args.max_steps}"
            )

    def go_on(self, checkpoint: Path) -> None:
        """Train from a checkpoint on; only load it if the run was stopped early there."""
        stalled = read_json(checkpoint / PROGRESS_FILE).get("stalled") or 0
        if stalled < (self.run_config.early_stopping_patience or math.inf):
            self.train(resume_from_checkpoint=str(checkpoint))
        else:
            self._load_from_checkpoint(str(checkpoint))
            self.state.global_step = _step_of(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:  # the next step's rates are those of this run's schedule
            schedule: Any = self.lr_scheduler
            factors = [of_step(schedule.last_epoch) for of_step in schedule.lr_lambdas]
            groups = self.optimizer.param_groups  # type: ignore[union-attr]
            for group, rate, factor in zip(groups, schedule.base_lrs, factors, strict=True):
                group["lr"] = rate * factor

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self.trained.save_pretrained(output_dir or self.checkpoints)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        self.trained.load_pretrained(resume_from_checkpoint)
        path = Path(resume_from_checkpoint) / PROGRESS_FILE
        progress = read_json(path)
        try:
            for name in ("losses", "evaluations", "seconds"):
                getattr(self, name)[:] = progress[name]
            # What all processes have seen is kept by one of them.
            self.tokens = progress["tokens"] * parallel.is_main()
            self.positions = progress["positions"] * parallel.is_main()
        except KeyError as error:
            raise CheckpointError(f"{path}: expected the field {error}, got none") from None
        if self.patience is not None:
            self.patience.early_stopping_patience_counter = progress.get("stalled") or 0
        if self.has_best:
            saved = Path(resume_from_checkpoint) / BEST_FOLDER
            parallel.on_main(lambda: _copy(saved, self.best_folder, self.adapter_folders))


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _is_named(device: str) -> bool:
    """Whether it is a device that the Trainer would not take by itself."""
    return device not in ("auto", "cpu") and parallel.world_size() == 1


@contextlib.contextmanager
def _on_device(name: str) -> Iterator[None]:
    """Have accelerate choose this device, which it asks an environment variable for."""
    variable = "ACCELERATE_TORCH_DEVICE"
    before = os.environ.get(variable)
    if _is_named(name):
        os.environ[variable] = name
        if name.startswith("cuda"):
            torch.cuda.set_device(find_device(name))
    try:
        yield
    finally:
        os.environ.pop(variable, None)
        if before is not None:
            os.environ[variable] = before


def _tensorboard(folder: Path) -> TrainerCallback:
    from transformers.integrations.integration_utils import TensorBoardCallback

    callback: Any = TensorBoardCallback()  # type: ignore[no-untyped-call]
    callback.logging_dir = str(folder)  # which is made at the first log
    return callback  # type: ignore[no-any-return]


class _Clock(TrainerCallback):
    """Seconds of each step, from its batch to the changed weights."""

    def __init__(self, seconds: list[float]) -> None:
        self.seconds = seconds
        self.start = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, args.max_steps)  # a checkpoint's are those of its own run

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)


class _Progress(TrainerCallback):
    """The loss and the newest evaluation on standard error: a bar on a terminal, lines elsewhere.

    A line comes at an evaluation, if ten seconds or a tenth of the run lie behind the last one.
    """

    def __init__(self, trainer: PromptTrainer) -> None:
        self.trainer = trainer
        self.bar: Any = None
        self.said = (0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.said = (state.global_step, time.monotonic())
        if sys.stderr.isatty():
            from tqdm.auto import tqdm  # type: ignore[import-untyped]

            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="training", unit="step"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.set_postfix(self._values(), refresh=False)
            self.bar.update(1)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, now = state.global_step, time.monotonic()
        new, seconds = step - self.said[0], now - self.said[1]
        end = step == args.max_steps
        if new and self.bar is None and (end or seconds >= 10 or 10 * new >= args.max_steps):
            values = ", ".join(f"{name} {value}" for name, value in self._values().items())
            line = f"training: {step} of {args.max_steps} steps, {values}"
            print(line, file=sys.stderr, flush=True)
            self.said = (step, now)

    def _values(self) -> dict[str, str]:
        recent = self.trainer.losses[-20:]
        values = {"loss": f"{sum(recent) / len(recent):.3f}"}
        if self.trainer.evaluations:
            name = self.trainer.run_config.judged_by
            values[name] = f"{self.trainer.evaluations[-1][name]:.3f}"
        return values

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
