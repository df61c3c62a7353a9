"""What a training run is made of, as one frozen and validated value."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ept_fast.config import (
    EPTConfig,
    PromptConfig,
    check_choice,
    check_count,
    check_flag,
    check_number,
)
from ept_fast.prompts.base import prompt_methods
from ept_fast.training.metrics import GENERATED_METRICS, METRICS, TEXT_METRICS
from ept_fast.transformers import POOLINGS

__all__ = ["DEVICES", "INITS", "KEEPS", "MOST", "TASKS", "TrainConfig", "check_most"]

TASKS = ("classification", "seq2seq", "causal")
INITS = ("vocab", "random")
KEEPS = ("last", "best")
DEVICES = ("auto", "cpu")
# Counts beyond these cannot be meant: time or memory would run out before any other error.
MOST = {
    "num_labels": 100_000,  # whose names still fit the description kept with an adapter
    "prompt_length": 100_000,
    "max_target_length": 100_000,
    "max_new_tokens": 100_000,
    "num_beams": 1_000,
    "max_steps": 2**31 - 1,
    "seed": 2**32 - 1,  # NumPy takes no more
}


def check_most(name: str, value: int | None) -> None:
    """Raise where ``value`` is beyond what can be meant."""
    if value is not None and value > MOST[name]:
        raise ValueError(f"{name}: expected an integer <= {MOST[name]}, got {value}")


@dataclass(frozen=True)
class TrainConfig:
    """One training run: data, method, sizes, learning rates, schedule.

    All three methods spend the same budget of ``prompt_length`` times the embedding width: ``"pt"``
    (prompt tuning) on a plain prompt of that length, ``"dept"`` on a short prompt and an offset,
    ``"ept"`` on both and on subspaces, with fusion. The default sizes and rates are this project's.

    Attributes:
        model: folder or hub id of the frozen model.
        data: a folder of ``<split>.jsonl`` (``.csv``, ``.tsv``), a file of training rows, or the
            name of a data set of the ``datasets`` library.
        output: folder for the adapter, the metrics and the pictures.
        task: ``"classification"`` (an encoder with a linear head), ``"seq2seq"`` (an
            encoder-decoder that writes a target for a text) or ``"causal"`` (a decoder that
            continues a text with a target; without targets it learns the texts themselves).
        method: ``"ept"``, ``"dept"`` or ``"pt"``, or another registered method.
        eval_data: a file of evaluation rows; else the split ``validation`` of ``data`` (or
            ``test``, to keep the last step), else ``eval_fraction`` of the training rows, held out.
        eval_fraction: that fraction.
        text_field, pair_field, label_field, target_field: the columns' names.
        num_labels: number of classes, where integer labels may miss some; else found in the data.
        prompt_length: l; the budget is l·d trainable prompt parameters.
        num_virtual_tokens: m, for ``"ept"`` and ``"dept"``.
        max_length: text tokens that are read; longer text is cut. It is n, but for ``"causal"``,
            where the offset covers the target as well.
        max_target_length: tokens of a target that are learnt, for text tasks.
        separator: put behind the text where a target follows it, for ``"causal"``.
        num_spaces: K, for ``"ept"``.
        space_dim: h, for ``"ept"``.
        alpha, activation, gate, temperature: as in :class:`ept_fast.EPTConfig`.
        fusion: prompt fusion, for ``"ept"``.
        init: ``"vocab"`` or ``"random"``.
        pooling: what the head of ``"classification"`` sees: the ``"mean"`` over the text's real
            tokens, the ``"first"`` or the ``"last"`` of them, or the ``"model"``'s own.
        head_dropout: dropout probability before the head.
        prompt_lr, offset_lr, space_lr, head_lr: peak learning rates.
        weight_decay: AdamW's, on every trained tensor.
        warmup_ratio: fraction of the steps with a rising rate; then it falls linearly to 0.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them alone.
        batch_size, eval_batch_size: rows of a batch; with ``packing`` packed rows.
        gradient_accumulation_steps: batches of an optimizer step, which then counts as one batch of
            all their rows: every row (for text tasks every label token) weighs the same.
        max_steps: optimizer steps; or else ``epochs``.
        epochs: passes over the training rows.
        eval_steps: steps between evaluations and checkpoints; a tenth of the run where not given.
        eval_before: whether to evaluate before the first step too.
        keep: whether the adapter is that of the ``"last"`` step or of the ``"best"`` evaluation.
        metric: what ``"best"`` goes by. For ``"classification"`` one of ``"accuracy"`` (the
            default), ``"macro_f1"`` and ``"matthews"``; for text tasks one of
            ``"token_accuracy"`` (the default), ``"exact_match"``, ``"f1"`` and ``"loss"``.
        eval_generate: evaluation rows, evenly spread, for which text tasks generate a text at each
            evaluation, for exact match and F1; 0 for none.
        max_new_tokens: tokens to generate at most; ``max_target_length`` where not given.
        num_beams: beams to generate with; 1 is greedy.
        group_by_length: batches of rows of similar length.
        packing: several texts in one row behind one prompt, for ``"causal"``.
        pack_length: text tokens of a packed row at most; where not given, as many as the longest
            single row may have.
        seed: of everything random. On a CPU the same seed gives the same weights to the bit.
        bf16: bfloat16 autocast; where not given, on a GPU that supports it.
        device: ``"auto"`` (a GPU where there is one) or ``"cpu"``.
        trust_remote_code: whether to run the code that a model of an architecture of its own
            brings.

    Raises:
        TypeError, ValueError: a field of the wrong type or out of its range, by name.
    """

    model: str
    data: str
    output: str
    task: str = "classification"
    method: str = "ept"
    eval_data: str | None = None
    eval_fraction: float = 0.1
    text_field: str = "text"
    pair_field: str = "text_pair"
    label_field: str = "label"
    target_field: str = "target"
    num_labels: int | None = None
    prompt_length: int = 100
    num_virtual_tokens: int = EPTConfig.num_virtual_tokens
    max_length: int = 128
    max_target_length: int = 64
    separator: str = "\n"
    num_spaces: int = EPTConfig.num_spaces
    space_dim: int = EPTConfig.space_dim
    alpha: float = EPTConfig.alpha
    activation: str = EPTConfig.activation
    gate: str = EPTConfig.gate
    temperature: float = EPTConfig.temperature
    fusion: bool = EPTConfig.fusion
    init: str = "vocab"
    pooling: str = "mean"
    head_dropout: float = 0.0
    prompt_lr: float = 1e-2
    offset_lr: float = 1e-3
    space_lr: float = 1e-3
    head_lr: float = 5e-3
    weight_decay: float = 0.0
    warmup_ratio: float = 0.06
    max_grad_norm: float = 1.0
    batch_size: int = 16
    eval_batch_size: int = 64
    gradient_accumulation_steps: int = 1
    max_steps: int | None = None
    epochs: float = 3.0
    eval_steps: int | None = None
    eval_before: bool = True
    keep: str = "last"
    metric: str | None = None
    eval_generate: int = 64
    max_new_tokens: int | None = None
    num_beams: int = 1
    group_by_length: bool = True
    packing: bool = False
    pack_length: int | None = None
    seed: int = 0
    bf16: bool | None = None
    device: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        fields = ("text_field", "pair_field", "label_field", "target_field")
        for name in ("model", "data", "output", *fields):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise ValueError(f"{name}: expected a non-empty string, got {value!r}")
        if not isinstance(self.separator, str):
            raise TypeError(f"separator: expected a string, got {type(self.separator).__name__}")
        check_choice("task", self.task, TASKS)
        check_choice("method", self.method, tuple(prompt_methods()))
        check_choice("init", self.init, INITS)
        check_choice("pooling", self.pooling, POOLINGS)
        check_choice("keep", self.keep, KEEPS)
        check_choice("device", self.device, DEVICES)
        for name in ("fusion", "eval_before", "group_by_length", "packing", "trust_remote_code"):
            check_flag(name, getattr(self, name))
        if self.bf16 is not None:
            check_flag("bf16", self.bf16)
        for name in ("batch_size", "eval_batch_size", "prompt_length", "max_length"):
            check_count(name, getattr(self, name), 1)
        for name in ("num_virtual_tokens", "space_dim", "max_target_length", "num_beams"):
            check_count(name, getattr(self, name), 1)
        check_count("gradient_accumulation_steps", self.gradient_accumulation_steps, 1)
        for name in ("num_spaces", "seed", "eval_generate"):
            check_count(name, getattr(self, name), 0)
        optional = {"max_steps": 1, "eval_steps": 1, "num_labels": 2, "max_new_tokens": 1}
        for name, least in {**optional, "pack_length": 1}.items():
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), least)
        for name in MOST:
            check_most(name, getattr(self, name))
        self._check_task()
        for name in ("prompt_lr", "offset_lr", "space_lr", "head_lr", "epochs", "temperature"):
            check_number(name, getattr(self, name), positive=True)
        for name in ("alpha", "weight_decay", "warmup_ratio", "max_grad_norm", "head_dropout"):
            check_number(name, getattr(self, name))
        for name in ("weight_decay", "max_grad_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected a number >= 0, got {getattr(self, name)}")
        for name in ("warmup_ratio", "head_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 0 <= {name} < 1, got {getattr(self, name)}")
        check_number("eval_fraction", self.eval_fraction)
        if not 0 < self.eval_fraction < 1:
            raise ValueError(
                f"eval_fraction: expected a fraction between 0 and 1, got {self.eval_fraction}"
            )

    def _check_task(self) -> None:
        if self.metric is not None:
            known = METRICS if self.task == "classification" else TEXT_METRICS
            check_choice("metric", self.metric, known)
        if self.metric in GENERATED_METRICS and not self.eval_generate:
            raise ValueError(
                f"eval_generate: expected an integer >= 1 for the metric {self.metric}, got 0"
            )
        if self.packing and self.task != "causal":
            reason = " (an encoder-decoder counts positions by column)"
            raise ValueError(
                f"packing: expected the task causal{reason * (self.task == 'seq2seq')}, "
                f"got {self.task}"
            )
        if self.pack_length is not None and not self.packing:
            raise ValueError(f"pack_length: expected None without packing, got {self.pack_length}")

    @property
    def judged_by(self) -> str:
        """The metric that runs are judged by: ``metric``, or the task's default."""
        default = METRICS[0] if self.task == "classification" else TEXT_METRICS[0]
        return self.metric or default

    def prompt_config(self, hidden_size: int, max_length: int | None = None) -> PromptConfig:
        """The prompt's sizes for embeddings of width ``hidden_size``, solved from the budget.

        Args:
            hidden_size: d.
            max_length: n, where the backbone allows less than the field of that name.

        Raises:
            ValueError: the sizes cost more than the budget, or leave a rank of 0 where the method
                has an offset.
        """
        names = {field.name for field in dataclasses.fields(EPTConfig)} & set(vars(self))
        settings = {name: getattr(self, name) for name in names}
        settings["max_length"] = max_length or self.max_length
        config = prompt_methods()[self.method].config_class
        return config.for_method(self.method, hidden_size, self.prompt_length, **settings)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values."""
        return dataclasses.asdict(self)
