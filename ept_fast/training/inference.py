"""A trained adapter at work: its metrics on other rows, and its answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ept_fast.config import check_count
from ept_fast.libraries import require
from ept_fast.storage.files import CheckpointError
from ept_fast.training.config import check_most
from ept_fast.training.data import DataError, Fields, LabelSet, Rows, read_split
from ept_fast.training.metrics import classification_metrics

if TYPE_CHECKING:
    from ept_fast.training.tokens import TextForm
    from ept_fast.transformers.tasks import EPTModel

__all__ = ["Adapter", "evaluate", "load_adapter", "predict"]

_MAX_NEW_TOKENS = 64  # for an adapter that does not say how long its targets were


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
        folder: the adapter.
        model: folder or hub id of that model, in place of the one saved with the adapter.
        device: ``"auto"`` or ``"cpu"``.
        trust_remote_code, allow_download: as in :meth:`ept_fast.EPTModel.from_pretrained`, with
            ``model`` as its ``base_model``.

    Raises:
        CheckpointError: a missing, damaged or foreign adapter, or one of another task.
        ValueError: as there.
        MissingLibraryError: the ``train`` extra is not installed.
    """
    require("transformers")
    from ept_fast.training.tasks import WRAPPER_TASKS
    from ept_fast.transformers.adapter import read_adapter
    from ept_fast.transformers.backbone import load_tokenizer, names_it
    from ept_fast.transformers.tasks import EPTModel

    path = Path(folder)
    if (path / "adapter").is_dir():
        path = path / "adapter"
    elif not path.is_dir():
        raise CheckpointError(f"adapter: expected a folder, got {folder}")
    saved = read_adapter(path)
    values = saved.values
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
    if device == "auto" and torch.cuda.is_available():
        trained.to("cuda")
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
        labels = LabelSet(tuple(values["labels"]), bool(extra.get("integer_labels", False)))
        return Adapter(trained, tokenizer, labels, bool(extra.get("text_pair", False)))
    try:
        form = _form(trained, tokenizer, extra.get("form"))
        beams = extra.get("num_beams", 1)
        check_count("num_beams", beams, 1)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{saved.path}: extra: {error}") from None
    return Adapter(trained, tokenizer, form=form, num_beams=beams)


def _form(model: EPTModel, tokenizer: Any, saved: dict[str, Any] | None) -> TextForm:
    """The form kept with the adapter; of one that a user saved, texts as they are."""
    from ept_fast.training.tasks import WRAPPER_TASKS, token_limit
    from ept_fast.training.tokens import TextForm

    if saved is not None:
        return TextForm(**saved)
    names = {wrapped: name for name, wrapped in WRAPPER_TASKS.items()}
    limit = token_limit(model, tokenizer)
    return TextForm(names[model.task], limit, _MAX_NEW_TOKENS, separator="")


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
        device: ``"auto"`` or ``"cpu"``.
        fields: the columns' names.
        eval_generate: for text tasks, the number of rows that texts are generated for, evenly
            spread; all rows where not given, 0 for none.
        max_new_tokens, num_beams: for text tasks, how they are generated; as in training where not
            given.

    Returns:
        For classification ``accuracy``, ``macro_f1`` and ``matthews``; for text tasks ``loss``,
        ``perplexity``, ``token_accuracy`` and, of what was generated, ``exact_match``, ``f1`` and
        ``rows_generated``. For all ``rows`` and ``rows_cut``; for text tasks ``targets_cut``.
    """
    from ept_fast.training.tasks import ANSWERS, check_targets

    loaded = _loaded(adapter, model, device)
    task = "classification" if loaded.form is None else loaded.form.task
    fields = fields or Fields()
    rows = data
    if not isinstance(rows, Rows):
        found = read_split(rows, split, fields=fields, answer=ANSWERS[task])
        assert found is not None  # only None where optional
        rows = found
    if loaded.form is None:
        assert loaded.labels is not None  # of every adapter without a form
        logits, cut = _logits(loaded, rows, batch_size)
        labels = loaded.labels.ids(rows)
        metrics = classification_metrics(logits.argmax(-1), labels, len(loaded.labels.names))
        return {**metrics, "rows": len(rows), "rows_cut": cut}
    check_targets(rows, loaded.form.targets, fields.target, "training")
    return _text_evaluation(loaded, rows, batch_size, eval_generate, max_new_tokens, num_beams)


def _text_evaluation(
    adapter: Adapter,
    rows: Rows,
    batch_size: int,
    eval_generate: int | None,
    max_new_tokens: int | None,
    num_beams: int | None,
) -> dict[str, Any]:
    from ept_fast.training.batches import Collator
    from ept_fast.training.evaluation import TextEvaluation, spread
    from ept_fast.training.tokens import tokenise_text

    assert adapter.form is not None  # of every adapter of a text task
    tokens = tokenise_text(rows, adapter.tokenizer, adapter.form)
    count = len(rows) if eval_generate is None else min(eval_generate, len(rows))
    asked = spread(rows, count) if count and adapter.form.targets else None
    writer = _writer(adapter, batch_size, max_new_tokens, num_beams)
    side = "right" if adapter.form.task == "causal" else None
    collator = Collator.of(adapter.tokenizer, side)
    evaluation = TextEvaluation(tokens, collator, batch_size, asked, adapter.form, writer)
    return {
        **evaluation(adapter.model),
        "rows": len(rows),
        "rows_cut": tokens.num_cut,
        "targets_cut": tokens.num_targets_cut,
        "rows_generated": 0 if asked is None else len(asked),
    }


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
        device: ``"auto"`` or ``"cpu"``.
        max_new_tokens, num_beams: for text tasks, how texts are generated; as in training where
            not given.

    Returns:
        For classification dicts of ``label`` (of the type it had in training) and ``probabilities``
        (by name); for text tasks dicts of ``output``.
    """
    loaded = _loaded(adapter, model, device)
    if loaded.form is not None:
        from ept_fast.training.tokens import tokenise_inputs

        writer = _writer(loaded, batch_size, max_new_tokens, num_beams)
        inputs = tokenise_inputs(rows, loaded.tokenizer, loaded.form)
        return [{"output": output} for output in writer(loaded.model, inputs)]
    assert loaded.labels is not None  # of every adapter without a form
    logits, _ = _logits(loaded, rows, batch_size)
    names = loaded.labels.names
    results = []
    for row in logits.softmax(-1):
        best = int(row.argmax())
        label = best if loaded.labels.integers else names[best]
        probabilities = dict(zip(names, row.tolist(), strict=True))
        results.append({"label": label, "probabilities": probabilities})
    return results


def _loaded(adapter: str | Path | Adapter, model: str | None, device: str) -> Adapter:
    if isinstance(adapter, Adapter):
        return adapter
    return load_adapter(adapter, model=model, device=device)


def _writer(
    adapter: Adapter, batch_size: int, max_new_tokens: int | None, num_beams: int | None
) -> Any:
    from ept_fast.training.generation import Writer
    from ept_fast.training.tasks import new_tokens

    for name, value in (("max_new_tokens", max_new_tokens), ("num_beams", num_beams)):
        if value is not None:
            check_count(name, value, 1)
            check_most(name, value)
    form = adapter.form
    assert form is not None  # of every adapter of a text task
    # A text that is continued may be of any length; generate sees to it.
    longest = form.max_length if form.targets else 1
    tokens = new_tokens(adapter.model, form, max_new_tokens, longest)
    return Writer(adapter.tokenizer, batch_size, tokens, num_beams or adapter.num_beams)


def _logits(adapter: Adapter, rows: Rows, batch_size: int) -> tuple[torch.Tensor, int]:
    from ept_fast.training.batches import Collator
    from ept_fast.training.evaluation import predict_logits
    from ept_fast.training.tasks import token_limit
    from ept_fast.training.tokens import tokenise

    if (rows.pairs is not None) != adapter.paired:
        expected, got = ("a second text", "none") if adapter.paired else ("no second text", "one")
        raise DataError(f"{rows.source}: text_pair: expected {expected} as in training, got {got}")
    tokens = tokenise(rows, adapter.tokenizer, token_limit(adapter.model, adapter.tokenizer))
    collator = Collator.of(adapter.tokenizer)
    return predict_logits(adapter.model, tokens, collator, batch_size), tokens.num_cut
