"""What a training run is made of, as one frozen and validated value."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass
from typing import Any, get_args, get_type_hints

import torch

from ept_fast.config import (
    GATES,
    OFFSET_TOKENS,
    EPTConfig,
    PromptConfig,
    check_choice,
    check_count,
    check_flag,
    check_number,
)
from ept_fast.losses.named import NAMED_LOSSES
from ept_fast.losses.terms import SCHEDULES
from ept_fast.ops.activations import ACTIVATIONS
from ept_fast.prompts.base import prompt_methods
from ept_fast.prompts.initial import check_prototypes
from ept_fast.prompts.prototypes import HOWS
from ept_fast.storage.untrusted import shorten
from ept_fast.training.metrics import GENERATED_METRICS, LABEL_METRICS, METRICS, TEXT_METRICS
from ept_fast.transformers import POOLINGS

__all__ = ["MOST", "TASKS", "TrainConfig", "check_most", "choices_of", "find_device", "kinds"]

TASKS = ("classification", "seq2seq", "causal")
_EPT_FIELDS = tuple(field.name for field in dataclasses.fields(EPTConfig))
_NAMED_VALUES = ("settings", "losses", "class_weights")  # dicts of values by name
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
    """Raise ValueError if ``value`` is beyond what can be meant."""
    if value is not None and value > MOST.get(name, value):
        raise ValueError(f"{name}: expected an integer <= {MOST[name]}, got {value}")


def find_device(name: str) -> torch.device:
    """The device of this name; ``"auto"`` is a GPU if there is one.

    Raises:
        ValueError: no such device, or none that this machine has.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        return device
    except (RuntimeError, AssertionError) as error:  # the latter of a build without CUDA
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device: expected one that PyTorch has here, got {name!r} ({reason})"
        ) from None


def _setting(
    default: Any,
    text: str,
    *,
    choices: Iterable[str] | Callable[[], Iterable[str]] = (),
    **range_: Any,
) -> Any:
    """A field of :class:`TrainConfig`.

    Args:
        default: its default; MISSING if it has none.
        text: what it is.
        choices: the values that it may have, if they are names.
        **range_: the range of a number: ``least`` (included; of a string the fewest characters),
            ``below`` (excluded), ``positive``.
    """
    return dataclasses.field(default=default, metadata=_metadata(text, choices, range_))


def _metadata(
    text: str,
    choices: Iterable[str] | Callable[[], Iterable[str]] = (),
    range_: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    return {"help": text, "choices": choices, "range": range_ or {}}


def choices_of(field: dataclasses.Field[Any]) -> tuple[str, ...]:
    """The values that a field of :class:`TrainConfig` may have, if they are names; else none."""
    choices = field.metadata["choices"]
    return tuple(choices() if callable(choices) else choices)


def _check(field: dataclasses.Field[Any], value: Any) -> None:
    name, limits, kind = field.name, field.metadata["range"], kinds()[field.name]
    if name == "data" and isinstance(value, tuple):
        if not value:
            raise ValueError(f"{name}: expected at least one data set, got none")
        for each in value:
            _check(field, each)
    elif kind is dict:
        if not isinstance(value, Mapping):
            raise TypeError(f"{name}: expected a dict, got {type(value).__name__}")
    elif choices := choices_of(field):
        check_choice(name, value, choices)
    elif kind is bool:
        check_flag(name, value)
    elif kind is int:
        check_count(name, value, limits["least"])
        check_most(name, value)
    elif kind is float:
        check_number(name, value, positive=limits.get("positive", False))
        least, below = limits.get("least", value), limits.get("below", math.inf)
        if not least <= value < below:
            low = "0 <" if "positive" in limits else "0 <="
            expected = f"{low} {name} < {below}" if "below" in limits else f"a number >= {least}"
            raise ValueError(f"{name}: expected {expected}, got {value}")
    elif not isinstance(value, str):
        raise TypeError(f"{name}: expected a string, got {type(value).__name__}")
    elif len(value) < limits.get("least", 1):
        raise ValueError(f"{name}: expected a non-empty string, got {value!r}")


@dataclass(frozen=True)
class TrainConfig:
    """One training run: data, method, sizes, learning rates, schedule.

    All three methods spend the same budget of ``prompt_length`` times the embedding width: ``"pt"``
    (prompt tuning) on a plain prompt of that length, ``"dept"`` on a short prompt and an offset,
    ``"ept"`` on both and on subspaces, with fusion. The default sizes and rates are this project's.

    Every field is also an option of ``ept-fast train``. The ``help`` in a field's metadata says
    what it is; ``ept-fast train --help`` lists them all.

    Raises:
        TypeError, ValueError: a field of the wrong type or out of its range, by name.
    """

    model: str = _setting(MISSING, "Folder or hub id of the frozen model.")
    data: str | tuple[str, ...] = _setting(
        MISSING,
        "Folder of <split>.jsonl files (.csv, .tsv, .json, .parquet, .arrow, .txt), a file of "
        "training rows, or what the datasets library loads: a saved data set or a name. May be "
        "given several times: an adapter of each, whose prompts share tensors.",
    )
    output: str = _setting(MISSING, "Folder for the adapter, the metrics and the pictures.")
    task: str = _setting(
        "classification",
        "Labels (an encoder with a linear head), or target texts to write (seq2seq: an "
        "encoder-decoder; causal: a decoder, which learns the texts themselves if there are no "
        "targets).",
        choices=TASKS,
    )
    problem_type: str | None = _setting(
        None,
        "What labels are (classification); by default regression if they are numbers with a "
        "fraction, several classes if they are lists, else one class.",
        choices=LABEL_METRICS,
    )
    method: str = _setting(
        "ept", "How the prompt is made; a registered method.", choices=prompt_methods
    )
    settings: dict[str, Any] = dataclasses.field(
        default_factory=dict,
        metadata=_metadata(
            "A field of the method's own config that has no option here; VALUE is JSON, or else a "
            "string. May be given several times.",
        ),
    )
    losses: dict[str, float] = dataclasses.field(
        default_factory=dict,
        metadata=_metadata(
            f"A further term of the loss in training (classification) and its weight: "
            f"{' or '.join(NAMED_LOSSES)}. May be given several times.",
        ),
    )
    loss_schedule: str = _setting(
        "constant",
        "Of the weights of --loss: as they are, or falling linearly to 0.",
        choices=SCHEDULES,
    )
    class_weights: dict[str, float] = dataclasses.field(
        default_factory=dict,
        metadata=_metadata(
            "A class and its weight in the loss of training (classification), by default 1. May be "
            "given several times.",
        ),
    )
    balance_classes: bool = _setting(
        False, "Weigh classes so that rare ones count as much as others (classification)."
    )
    start_from: str | None = _setting(
        None,
        "Folder or hub id of an adapter with whose prompt this run starts, and with whose head if "
        "the labels are the same; method and sizes are the adapter's.",
    )
    eval_data: str | None = _setting(
        None, "File of evaluation rows; else the split validation (or test, to --keep last)."
    )
    eval_fraction: float = _setting(
        0.1, "Training rows held out if there are no evaluation rows.", positive=True, below=1
    )
    text_field: str = _setting("text", "Column of the text.")
    pair_field: str = _setting("text_pair", "Column of the second text.")
    label_field: str = _setting("label", "Column of the label.")
    target_field: str = _setting("target", "Column of the target text (seq2seq, causal).")
    messages_field: str = _setting("messages", "Column of the messages of a chat (causal).")
    num_labels: int | None = _setting(
        None, "Number of classes, if integer labels of the training rows miss some.", least=2
    )
    prompt_length: int = _setting(100, "The budget, in tokens of a plain prompt.", least=1)
    num_virtual_tokens: int = _setting(
        EPTConfig.num_virtual_tokens, "m, length of the short prompt (ept, dept).", least=1
    )
    max_length: int = _setting(
        128,
        "Tokens of a text that are read; longer text is cut. For causal, the offset covers the "
        "target as well.",
        least=1,
    )
    max_target_length: int = _setting(
        64, "Tokens of a target that are learnt (seq2seq, causal).", least=1
    )
    separator: str = _setting(
        "\n", "Put between text and target (causal); by default a line end.", least=0
    )
    num_spaces: int = _setting(
        EPTConfig.num_spaces, "K, number of subspaces (ept); 0 for none.", least=0
    )
    space_dim: int = _setting(EPTConfig.space_dim, "h, width of a subspace (ept).", least=1)
    alpha: float = _setting(EPTConfig.alpha, "The offset is scaled by alpha / sqrt(rank).")
    activation: str = _setting(
        EPTConfig.activation, "Within the subspaces (ept).", choices=ACTIVATIONS
    )
    gate: str = _setting(
        EPTConfig.gate, "A gate for each token, or one for the whole prompt (ept).", choices=GATES
    )
    temperature: float = _setting(
        EPTConfig.temperature, "Divides the gate's logits (ept).", positive=True
    )
    fusion: bool = _setting(EPTConfig.fusion, "Prompt fusion (ept).")
    offset_tokens: str = _setting(
        EPTConfig.offset_tokens,
        "Tokens that get the offset (causal; ept, dept): all, or those of the text but not of the "
        "target, so that generated ones have none.",
        choices=OFFSET_TOKENS,
    )
    init: str = _setting(
        "vocab",
        "Rows that the prompt starts from: sampled from the model's vocabulary, prototypes of the "
        "training texts' tokens, or random.",
        choices=("vocab", "data", "random"),
    )
    prototypes: str = _setting(
        "kmeans",
        "How --init data makes rows of the texts' tokens: means of k-means clusters, rows drawn "
        "at random, or the mean or largest values of windows of a text.",
        choices=HOWS,
    )
    prototype_layer: int | None = _setting(
        None,
        "Layer of the model, from 0, whose input --init data makes rows of; by default the "
        "tokens' embeddings.",
        least=0,
    )
    pooling: str = _setting(
        "mean",
        "What the head sees (classification): the mean, the first or the last of the text's real "
        "tokens, or what the model itself pools.",
        choices=POOLINGS,
    )
    head_dropout: float = _setting(
        0.0, "Dropout probability before the head (classification).", least=0, below=1
    )
    prompt_lr: float = _setting(1e-2, "Peak learning rate of the short prompt.", positive=True)
    offset_lr: float = _setting(1e-3, "Peak learning rate of the offset.", positive=True)
    space_lr: float = _setting(1e-3, "Peak learning rate of subspaces and gate.", positive=True)
    head_lr: float = _setting(5e-3, "Peak learning rate of the head.", positive=True)
    weight_decay: float = _setting(0.0, "AdamW's, on every trained tensor.", least=0)
    warmup_ratio: float = _setting(
        0.06,
        "Fraction of the steps with a rising rate; then it falls linearly to 0.",
        least=0,
        below=1,
    )
    max_grad_norm: float = _setting(
        1.0, "Gradients are scaled down to this norm; 0 leaves them alone.", least=0
    )
    batch_size: int = _setting(16, "Rows of a batch; with --packing, packed rows.", least=1)
    eval_batch_size: int = _setting(64, "Rows of an evaluation's batch.", least=1)
    gradient_accumulation_steps: int = _setting(
        1,
        "Batches of an optimizer step, which counts as one batch of all their rows: every row "
        "(seq2seq, causal: every label token) weighs the same.",
        least=1,
    )
    max_steps: int | None = _setting(None, "Optimizer steps, in place of --epochs.", least=1)
    epochs: float = _setting(3.0, "Passes over the training rows.", positive=True)
    gate_steps: int = _setting(
        0,
        "First optimizer steps in which only what --space-lr is for (the gates of a mixture, the "
        "subspaces of ept) and the head are trained.",
        least=0,
    )
    eval_steps: int | None = _setting(
        None, "Steps between evaluations and checkpoints; by default a tenth of the run.", least=1
    )
    eval_before: bool = _setting(True, "Evaluate before the first step, too.")
    keep: str = _setting("last", "Which evaluation's weights to keep.", choices=("last", "best"))
    metric: str | None = _setting(
        None,
        "What --keep best and early stopping go by. For one class accuracy (the default), "
        "macro_f1 or matthews; for several micro_f1 (the default), macro_f1 or subset_accuracy; "
        "for numbers pearson (the default), spearman, mae or loss; for texts token_accuracy (the "
        "default), exact_match, f1 or loss.",
        choices=METRICS,
    )
    early_stopping_patience: int | None = _setting(
        None, "Stop after so many evaluations in a row without a better --metric.", least=1
    )
    early_stopping_threshold: float = _setting(
        0.0, "By how much a --metric has to be better for that.", least=0
    )
    report_to: str = _setting(
        "none",
        "Where loss, rates and evaluations are logged, too: tensorboard (in logs/ of --output) or "
        "wandb.",
        choices=("none", "tensorboard", "wandb"),
    )
    eval_generate: int = _setting(
        64,
        "Evaluation rows, evenly spread, to write texts for at each evaluation (seq2seq, causal); "
        "0 for none.",
        least=0,
    )
    max_new_tokens: int | None = _setting(
        None, "Tokens of a written text at most; by default --max-target-length.", least=1
    )
    num_beams: int = _setting(1, "Beams to write with (seq2seq, causal); 1 is greedy.", least=1)
    group_by_length: bool = _setting(True, "Batches of rows of similar length.")
    packing: bool = _setting(False, "Several texts in a row behind one prompt (causal).")
    pack_length: int | None = _setting(
        None,
        "Text tokens of a packed row at most; by default as many as the longest row may have.",
        least=1,
    )
    seed: int = _setting(
        0,
        "Of everything random. On a CPU the same seed gives the same weights to the bit.",
        least=0,
    )
    bf16: bool | None = _setting(None, "bfloat16 autocast; by default on a GPU that supports it.")
    device: str = _setting("auto", "cpu, cuda, cuda:1, mps; auto: a GPU if there is one.")
    trust_remote_code: bool = _setting(
        False, "Run the code that a --model of an architecture of its own brings."
    )

    def __post_init__(self) -> None:
        if isinstance(self.data, list | tuple):
            several = tuple(self.data)
            object.__setattr__(self, "data", several[0] if len(several) == 1 else several)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None or field.default is not None:
                _check(field, value)
        check_prototypes(self.init, self.prototypes, self.prototype_layer)
        self._check_settings()
        self._check_of_labels()
        for name in _NAMED_VALUES:
            object.__setattr__(self, name, dict(getattr(self, name)))  # its own
        if self.metric is not None:
            check_choice("metric", self.metric, self._metrics)
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
        self._check_offset_tokens()
        for name in ("eval_data", "num_labels") if len(self.sources) > 1 else ():
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name}: expected None beside several data sets, got {getattr(self, name)!r}"
                )
        if self.pack_length is not None and not self.packing:
            raise ValueError(f"pack_length: expected None without packing, got {self.pack_length}")

    def _check_settings(self) -> None:
        config = prompt_methods()[self.method].config_class
        elsewhere = {"hidden_size", "num_virtual_tokens", "max_length"}  # which a run needs itself
        known = sorted({field.name for field in dataclasses.fields(config)} - elsewhere)
        for name in self.settings:
            if name not in known:
                raise ValueError(
                    f"settings: expected fields of the method {self.method} "
                    f"({', '.join(known) or 'it has none'}), got {shorten(name)}"
                )

    def _check_offset_tokens(self) -> None:
        if self.offset_tokens == "all":
            return
        if self.task != "causal":
            raise ValueError(
                f"offset_tokens: expected all for the task {self.task}, whose text is all given, "
                f"got {self.offset_tokens!r}"
            )
        config = prompt_methods()[self.method].config_class
        if "offset_tokens" not in {field.name for field in dataclasses.fields(config)}:
            raise ValueError(
                f"offset_tokens: expected all, as the method {self.method} has no such field, "
                f"got {self.offset_tokens!r}"
            )

    def _check_of_labels(self) -> None:
        for name, weight in self.losses.items():
            check_choice("losses", name, tuple(NAMED_LOSSES))
            check_number(f"losses: {name}", weight)
        for name in ("losses", "class_weights", "balance_classes", "problem_type"):
            if getattr(self, name) and self.task != "classification":
                raise ValueError(
                    f"{name}: expected none for the task {self.task}, got {getattr(self, name)}"
                )
        single = self.problem_type in (None, "single_label_classification")
        if "supervised_contrastive" in self.losses and not single:
            raise ValueError(
                f"losses: expected supervised_contrastive for texts of one class only, "
                f"got {self.problem_type}"
            )
        for name, weight in self.class_weights.items():
            check_number(f"class_weights: {name}", weight)
        weighed = self.class_weights or self.balance_classes
        if weighed and self.problem_type == "regression":
            raise ValueError("class_weights, balance_classes: expected none for a regression")
        if self.class_weights and self.balance_classes:
            raise ValueError("class_weights, balance_classes: expected one of them, got both")

    @property
    def sources(self) -> tuple[str, ...]:
        """The data sets: one, or several."""
        return (self.data,) if isinstance(self.data, str) else self.data

    @property
    def judged_by(self) -> str:
        """The metric that runs are judged by: ``metric``, or the task's default."""
        return self.metric or self._metrics[0]

    @property
    def _metrics(self) -> tuple[str, ...]:
        """Those that the task has."""
        if self.task != "classification":
            return TEXT_METRICS
        kinds = [self.problem_type] if self.problem_type else LABEL_METRICS
        return tuple(dict.fromkeys(name for kind in kinds for name in LABEL_METRICS[kind]))

    @property
    def given_sizes(self) -> bool:
        """Whether anything is said of the prompt's method and sizes."""
        return bool(self.settings) or any(
            getattr(self, field.name) != field.default
            for field in dataclasses.fields(self)
            if field.name in ("method", "prompt_length", "max_length", *_EPT_FIELDS)
        )

    @property
    def prompt_tokens(self) -> int:
        """m, the tokens of the method's prompt."""
        config = prompt_methods()[self.method].config_class
        return config.tokens_of(self.method, self.prompt_length, self.num_virtual_tokens)

    def prompt_config(self, hidden_size: int, max_length: int | None = None) -> PromptConfig:
        """The prompt's sizes for embeddings of width ``hidden_size``, solved from the budget.

        Args:
            hidden_size: d.
            max_length: n, if the backbone allows less than the field of that name.

        Raises:
            ValueError: the sizes cost more than the budget, leave a rank of 0 for an offset, or a
                setting is none that the method can have.
        """
        settings = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name in _EPT_FIELDS and getattr(self, field.name) != field.default
        }
        settings["max_length"] = max_length or self.max_length
        settings |= self.settings
        method = prompt_methods()[self.method].config_class
        try:
            config = method.for_method(self.method, hidden_size, self.prompt_length, **settings)
        except TypeError as error:
            if str(error).partition(":")[0] not in self.settings:
                raise
            raise ValueError(str(error)) from None  # a user's mistake, as all others here
        for name, value in self.settings.items():
            if getattr(config, name) != value:
                raise ValueError(
                    f"{name}: expected {getattr(config, name)!r}, which the method {self.method} "
                    f"stands for, got {value!r}"
                )
        return config

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values, those of JSON."""
        data = self.data if isinstance(self.data, str) else list(self.data)
        return {**dataclasses.asdict(self), "data": data}


@functools.cache
def kinds() -> dict[str, type]:
    """The type of each field of :class:`TrainConfig`; of one of several types, the first."""
    hints = get_type_hints(TrainConfig)
    plain = {name: next(iter(get_args(hint)), hint) for name, hint in hints.items()}
    return {**plain, **dict.fromkeys(_NAMED_VALUES, dict)}
