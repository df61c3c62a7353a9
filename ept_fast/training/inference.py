"""A trained adapter at work: its metrics on other rows, and its answers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ept_fast.config import check_count
from ept_fast.libraries import require
from ept_fast.storage.files import CheckpointError
from ept_fast.training.batches import Collator
from ept_fast.training.config import TASKS, check_most, find_device
from ept_fast.training.data import DataError, Fields, Rows, read_split
from ept_fast.training.evaluation import (
    Evaluation,
    LabelEvaluation,
    TextEvaluation,
    Writer,
    predict_logits,
    spread,
)
from ept_fast.training.labels import LabelSet
from ept_fast.training.tokens import (
    TextForm,
    Tokenised,
    tokenise,
    tokenise_inputs,
    tokenise_text,
)

if TYPE_CHECKING:
    from ept_fast.transformers.adapter import SavedAdapter
    from ept_fast.transformers.tasks import EPTModel

__all__ = [
    "ANSWERS",
    "WRAPPER_TASKS",
    "Adapter",
    "check_alike",
    "evaluate",
    "find_saved",
    "fitted",
    "load_adapter",
    "predict",
]

_MAX_NEW_TOKENS = 64  # for an adapter that does not say how long its targets were

WRAPPER_TASKS = dict(zip(TASKS, ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM"), strict=True))
# What a row has beside its text, as `ept_fast.training.data.ANSWERS` has it.
ANSWERS = dict(zip(TASKS, ("label", "target", "optional target"), strict=True))


def fitted(form: TextForm, model: EPTModel, tokenizer: Any) -> TextForm:
    """The form within what the model and the tokenizer allow.

    Raises:
        ValueError: no room for a text before the longest target.
    """
    limit, target = _token_limit(model, tokenizer), form.max_target_length
    if form.task == "causal":
        room = limit - target if form.targets else limit
        if room < 1:
            raise ValueError(
                f"max_target_length: expected less than the {limit} positions that text and target "
                f"share, got {target}"
            )
        limit = min(room, form.max_length)
    else:
        decoder = model.profile.text_limit(0)
        target = target if decoder is None else min(target, decoder)
    return dataclasses.replace(form, max_length=limit, max_target_length=target)


def _token_limit(model: EPTModel, tokenizer: Any) -> int:
    """The longest text, in tokens, that prompt, tokenizer and backbone all allow."""
    limits = [model.prompt.config.max_length, tokenizer.model_max_length, model.text_limit]
    return min(int(limit) for limit in limits if limit is not None)


def check_alike(rows: Rows, column: str, wanted: bool, name: str, like: str) -> None:
    """Raise DataError unless the rows have this column, as others do."""
    what = {"pairs": "second texts", "targets": "targets", "chats": "messages"}[column]
    if (getattr(rows, column) is not None) != wanted:
        expected, got = (what, "none") if wanted else (f"no {what}", "some")
        raise DataError(f"{rows.source}: {name}: expected {expected} as in {like}, got {got}")


@dataclass(frozen=True)
class Adapter:
    """A trained adapter, ready for prediction.

    Attributes:
        model: prompt, frozen model and, for classification, the head.
        tokenizer: of the model.
        labels: the classes, for classification.
        paired: whether its texts came in pairs, for classification.
        form: how texts become token ids, for text tasks.
        num_beams: beams that it was evaluated with, for text tasks.
    """

    model: EPTModel
    tokenizer: Any
    labels: LabelSet | None = None
    paired: bool = False
    form: TextForm | None = None
    num_beams: int = 1

    @property
    def extra(self) -> dict[str, Any]:
        """What is kept with the adapter's files, for :func:`load_adapter`."""
        if self.form is not None:
            return {"form": dataclasses.asdict(self.form), "num_beams": self.num_beams}
        assert self.labels is not None  # of every adapter without a form
        kind = {"problem_type": self.labels.problem_type}
        return {"integer_labels": self.labels.integers, "text_pair": self.paired, **kind}

    @property
    def max_length(self) -> int:
        """Tokens of a text that are read."""
        return self.form.max_length if self.form else _token_limit(self.model, self.tokenizer)

    @property
    def collator(self) -> Collator:
        """Makes batches of rows with labels."""
        causal = self.form is not None and self.form.task == "causal"
        return Collator.of(self.tokenizer, "right" if causal else None)

    def tokenised(self, rows: Rows, *, answered: bool = True) -> Tokenised:
        """Token ids of rows: with labels if they are answered, else what the model is to answer."""
        if self.form is not None:
            as_ids = tokenise_text if answered else tokenise_inputs
            return as_ids(rows, self.tokenizer, self.form)
        return tokenise(rows, self.tokenizer, self.max_length, self.labels if answered else None)

    def evaluation(
        self,
        rows: Rows,
        batch_size: int,
        *,
        eval_generate: int,
        max_new_tokens: int | None = None,
        num_beams: int | None = None,
        bf16: bool = False,
    ) -> Evaluation:
        """What judges the model on these rows; arguments as for :func:`evaluate`."""
        tokens = self.tokenised(rows)
        if self.form is None:
            assert self.labels is not None
            kind = self.labels.problem_type
            return LabelEvaluation(tokens, self.collator, batch_size, kind, bf16)
        half = (self.form.max_length + 1) // 2  # is continued if there are no targets
        longest = self.form.max_length if self.form.targets else half
        writer = self.writer(batch_size, longest, max_new_tokens, num_beams, bf16)
        asked = spread(rows, eval_generate) if eval_generate else None
        return TextEvaluation(tokens, self.collator, asked, self.form, writer)

    def writer(
        self,
        batch_size: int,
        longest: int,
        max_new_tokens: int | None,
        num_beams: int | None,
        bf16: bool = False,
    ) -> Writer:
        """What writes texts.

        Args:
            batch_size: texts of a batch.
            longest: tokens of the longest text that is given.
            max_new_tokens, num_beams: as for :func:`predict`.
            bf16: whether to run under bfloat16 autocast.

        Raises:
            ValueError: the model has no positions for as many tokens as were asked for.
        """
        for name, value in (("max_new_tokens", max_new_tokens), ("num_beams", num_beams)):
            if value is not None:
                check_count(name, value, 1)
                check_most(name, value)
        assert self.form is not None  # of every adapter of a text task
        causal, tokens = self.form.task == "causal", self.form.max_target_length
        virtual = self.model.prompt.config.num_virtual_tokens
        most = self.model.profile.table_limit(virtual if causal else 0)
        if most is not None:
            # The last new token is not fed; a decoder's start takes its place.
            most += 1 - longest if causal else 0
            if max_new_tokens is not None and max_new_tokens > most:
                raise ValueError(
                    f"max_new_tokens: expected at most {most}, for which the model has positions, "
                    f"got {max_new_tokens}"
                )
            tokens = min(tokens, most)
        beams = num_beams or self.num_beams
        return Writer(self.tokenizer, batch_size, max_new_tokens or tokens, beams, bf16)


def find_saved(folder: str | Path, name: str = "adapter") -> SavedAdapter:
    """The saved adapter of a folder, of a run's output folder, or of a hub id.

    Args:
        folder: where it is.
        name: of the argument, for messages.

    Raises:
        CheckpointError: no folder, a run of several data sets, or a missing or damaged adapter.
    """
    from ept_fast.transformers.adapter import ADAPTER_FILE, STATE_FILE
    from ept_fast.transformers.hub import find_adapter, is_hub_id

    path = Path(folder)
    if (path / "adapter").is_dir():
        path = path / "adapter"
    elif not path.is_dir() and not is_hub_id(folder):
        raise CheckpointError(f"{name}: expected a folder, got {folder}")
    within = sorted(file.parent.name for file in path.glob(f"*/{ADAPTER_FILE}"))
    if within and not any((path / file).exists() for file in (ADAPTER_FILE, STATE_FILE)):
        raise CheckpointError(
            f"{name}: expected the folder of one adapter, got {path}, in which there are "
            f"{', '.join(within)}"
        )
    return find_adapter(path if path.is_dir() else folder)


def _check_chats(rows: Rows, form: TextForm) -> None:
    if not form.chat:  # with one, a text alone is a message, too
        check_alike(rows, "chats", False, "messages", "training")


def load_adapter(
    folder: str | Path,
    *,
    model: str | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    allow_download: bool = False,
) -> Adapter:
    """Load an adapter (or a run's output folder) and the frozen model it was trained on.

    Args:
        folder: of the adapter, or its hub id as in :meth:`ept_fast.EPTModel.from_pretrained`.
        model: folder or hub id of that model, in place of the one saved with the adapter.
        device: as :class:`TrainConfig`'s.
        trust_remote_code, allow_download: as in :meth:`ept_fast.EPTModel.from_pretrained`, with
            ``model`` as its ``base_model``.

    Raises:
        CheckpointError: a missing, damaged or foreign adapter, or one of another task.
        ValueError: as there.
        MissingLibraryError: the ``train`` extra is not installed.
    """
    require("transformers")
    chosen = find_device(device)
    from ept_fast.transformers.backbone import load_tokenizer, names_it
    from ept_fast.transformers.tasks import EPTModel

    saved = find_saved(folder)
    path, values = saved.path.parent, saved.values
    if values["task"] not in WRAPPER_TASKS.values():
        raise CheckpointError(
            f"{saved.path}: task: expected one of {', '.join(WRAPPER_TASKS.values())}, "
            f"got {values['task']!r}"
        )
    trained = EPTModel.from_pretrained(
        saved,
        base_model=model,
        trust_remote_code=trust_remote_code,
        allow_download=allow_download,
    )
    if chosen.type != "cpu":
        trained.to(chosen)
    name = values["base_model"] if model is None else model
    try:
        tokenizer = load_tokenizer(
            name,
            trust_remote_code=trust_remote_code,
            local_files_only=model is None and not allow_download,
        )
    except ValueError as error:
        if model is not None:
            raise
        raise ValueError(f"{error}{names_it(path, name, allow_download)}") from None
    extra = values["extra"]
    if values["task"] == "SEQ_CLS":
        kind = extra.get("problem_type", "single_label_classification")
        integers = bool(extra.get("integer_labels", False))
        labels = LabelSet(tuple(values["labels"]), integers, kind)
        return Adapter(trained, tokenizer, labels, bool(extra.get("text_pair", False)))
    try:
        form = extra.get("form")
        if form is None:  # of an adapter that a user saved: texts as they are
            task = {wrapped: name for name, wrapped in WRAPPER_TASKS.items()}[values["task"]]
            sizes = {"max_target_length": _MAX_NEW_TOKENS, "separator": ""}
            form = {"task": task, "max_length": _token_limit(trained, tokenizer), **sizes}
        text_form, beams = TextForm(**form), extra.get("num_beams", 1)
        check_count("num_beams", beams, 1)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{saved.path}: extra: {error}") from None
    return Adapter(trained, tokenizer, form=text_form, num_beams=beams)


def _loaded(adapter: str | Path | Adapter, model: str | None, device: str) -> Adapter:
    if isinstance(adapter, Adapter):
        return adapter
    return load_adapter(adapter, model=model, device=device)


def evaluate(
    adapter: str | Path | Adapter,
    data: str | Path | Rows,
    *,
    split: str = "test",
    batch_size: int = 64,
    model: str | None = None,
    device: str = "auto",
    fields: Fields | None = None,
    eval_generate: int | None = None,
    max_new_tokens: int | None = None,
    num_beams: int | None = None,
) -> dict[str, Any]:
    """Metrics of an adapter on rows with labels or targets, whichever its task has.

    Args:
        adapter: folder of an adapter or of a run, or a loaded one.
        data: as :class:`TrainConfig`'s ``data``, or rows.
        split: which split of it.
        batch_size: rows of a batch.
        model: the frozen model, in place of the one saved with the adapter.
        device: as :class:`TrainConfig`'s.
        fields: the columns' names.
        eval_generate: for text tasks, the number of rows that texts are generated for, evenly
            spread; by default all rows, 0 for none.
        max_new_tokens, num_beams: for text tasks, how they are generated; by default as in
            training.

    Returns:
        For classification ``accuracy``, ``macro_f1`` and ``matthews``, or what
        :data:`ept_fast.training.metrics.LABEL_METRICS` has for several classes and regression; for
        text tasks ``perplexity``, ``token_accuracy`` and, of what was generated, ``exact_match``,
        ``f1`` and ``rows_generated``. For all ``loss``, ``rows`` and ``rows_cut``; for text tasks
        ``targets_cut``.
    """
    loaded = _loaded(adapter, model, device)
    task = "classification" if loaded.form is None else loaded.form.task
    fields = fields or Fields()
    rows = data
    if not isinstance(rows, Rows):
        rows = read_split(rows, split, fields=fields, answer=ANSWERS[task])
    if loaded.form is None:
        check_alike(rows, "pairs", loaded.paired, fields.text_pair, "training")
    else:
        check_alike(rows, "targets", loaded.form.targets, fields.target, "training")
        _check_chats(rows, loaded.form)
    evaluation = loaded.evaluation(
        rows,
        batch_size,
        eval_generate=len(rows) if eval_generate is None else eval_generate,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
    )
    tokens = evaluation.rows
    found = {**evaluation(loaded.model), "rows": len(rows), "rows_cut": tokens.num_cut}
    if isinstance(evaluation, LabelEvaluation):
        return found
    generated = len(evaluation.asked or ()) if evaluation.form.targets else 0
    return {**found, "targets_cut": tokens.num_targets_cut, "rows_generated": generated}


def predict(
    adapter: str | Path | Adapter,
    rows: Rows,
    *,
    batch_size: int = 64,
    model: str | None = None,
    device: str = "auto",
    max_new_tokens: int | None = None,
    num_beams: int | None = None,
) -> list[dict[str, Any]]:
    """The answer to each row's text, in order.

    Args:
        adapter: folder of an adapter or of a run, or a loaded one.
        rows: texts; labels and targets are not looked at.
        batch_size: rows of a batch.
        model: the frozen model, in place of the one saved with the adapter.
        device: as :class:`TrainConfig`'s.
        max_new_tokens, num_beams: for text tasks, how texts are generated; by default as in
            training.

    Returns:
        For classification dicts of ``label`` (of the type it had in training) and ``probabilities``
        (by name), of ``labels`` if a text can have several, of ``value`` for a regression; for text
        tasks dicts of ``output``.
    """
    loaded = _loaded(adapter, model, device)
    if loaded.form is None:
        check_alike(rows, "pairs", loaded.paired, "text_pair", "training")
    tokens = loaded.tokenised(rows, answered=False)
    if loaded.form is not None:
        _check_chats(rows, loaded.form)
        # A text that is continued may be of any length; generate sees to it.
        longest = loaded.form.max_length if loaded.form.targets else 1
        writer = loaded.writer(batch_size, longest, max_new_tokens, num_beams)
        return [{"output": output} for output in writer(loaded.model, tokens)]
    assert loaded.labels is not None  # of every adapter without a form
    labels, kind = loaded.labels, loaded.labels.problem_type
    logits = predict_logits(loaded.model, tokens, loaded.collator, batch_size)
    if kind == "regression":
        return [{"value": value} for value in logits[:, 0].tolist()]
    several = kind == "multi_label_classification"
    classes = [i if labels.integers else name for i, name in enumerate(labels.names)]
    results = []
    for row in logits.sigmoid() if several else logits.softmax(-1):
        answer: dict[str, Any] = {"label": classes[int(row.argmax())]}
        if several:
            answer = {"labels": [classes[i] for i in (row > 0.5).nonzero().flatten().tolist()]}
        results.append(
            {**answer, "probabilities": dict(zip(labels.names, row.tolist(), strict=True))}
        )
    return results
