"""Rows as token ids: texts to classify, texts with targets, and texts to continue."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from ept_fast.config import check_choice, check_count, check_flag
from ept_fast.storage.untrusted import shorten
from ept_fast.training.data import DataError, Rows
from ept_fast.training.labels import LabelSet

__all__ = [
    "IGNORED",
    "TextForm",
    "Tokenised",
    "end_token",
    "tokenise",
    "tokenise_inputs",
    "tokenise_text",
]

IGNORED = -100


@dataclass(frozen=True)
class TextForm:
    """How rows of a text task become token ids; kept with the adapter, for prediction.

    Attributes:
        task: ``"seq2seq"`` or ``"causal"``.
        max_length: tokens of a text that are read.
        max_target_length: tokens of a target that are learnt, its end token among them.
        separator: put behind the text if a target follows it; for ``"causal"``.
        targets: whether rows have targets; else the texts themselves are learnt.
        chat: whether rows are conversations, which the tokenizer's chat template writes out.
    """

    task: str
    max_length: int
    max_target_length: int
    separator: str = "\n"
    targets: bool = True
    chat: bool = False

    def __post_init__(self) -> None:
        check_choice("task", self.task, ("seq2seq", "causal"))
        check_count("max_length", self.max_length, 1)
        check_count("max_target_length", self.max_target_length, 1)
        check_flag("targets", self.targets)
        check_flag("chat", self.chat)
        if not isinstance(self.separator, str):
            raise TypeError(f"separator: expected a string, got {type(self.separator).__name__}")


@dataclass(frozen=True)
class Tokenised:
    """Token ids of a split; indexing gives the features of a row, or of each of a list of rows.

    Attributes:
        features: per row ``input_ids`` and, if the tokenizer gives them, ``token_type_ids``;
            for text tasks also ``labels``, -100 for what is not to be predicted.
        labels: what :meth:`LabelSet.ids` gives, or None.
        num_cut: rows whose text was longer than the limit and lost a part.
        num_targets_cut: rows whose target was, and lost its end.
    """

    features: tuple[dict[str, list[int]], ...]
    labels: tuple[Any, ...] | None
    num_cut: int
    num_targets_cut: int = 0

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int | Sequence[int]) -> Any:
        if not isinstance(index, int):
            return [self[i] for i in index]
        row: dict[str, Any] = dict(self.features[index])
        if self.labels is not None:
            row["labels"] = self.labels[index]
        return row

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row that the model reads at once: those of the text."""
        return [len(row["input_ids"]) for row in self.features]

    @property
    def num_label_tokens(self) -> int:
        """Tokens that are to be predicted."""
        return sum(label != IGNORED for row in self.features for label in row.get("labels", ()))


def tokenise(
    rows: Rows, tokenizer: Any, max_length: int, labels: LabelSet | None = None
) -> Tokenised:
    """Tokenise every row once, cutting those longer than ``max_length`` tokens.

    Raises:
        ValueError: no room for a token of the text, or of each of two, beside the special tokens.
        DataError: a text without any token.
    """
    ids = None if labels is None else labels.ids(rows)
    paired = rows.pairs is not None
    special = tokenizer.num_special_tokens_to_add(pair=paired)
    what = "each text" if paired else "the text"
    _check_room("max_length", max_length, special, what, 1 + paired)

    features = _encode(tokenizer, rows.texts, rows.pairs)
    long = [i for i, row in enumerate(features) if len(row["input_ids"]) > max_length]
    if long:
        part = rows.take(long)
        cut = _encode(tokenizer, part.texts, part.pairs, truncation=True, max_length=max_length)
        for i, row in zip(long, cut, strict=True):
            features[i] = row
    _check_read(rows, features)
    return Tokenised(tuple(features), ids, len(long))


def _check_room(name: str, limit: int, others: int, what: str, wanted: int = 1) -> None:
    """Raise if ``others``, tokens that stand in every row, leave no room for those wanted."""
    if limit < others + wanted:
        raise ValueError(
            f"{name}: expected at least {others + wanted}, for a token of {what} beside {others} "
            f"special ones, got {limit}"
        )


def _check_read(rows: Rows, features: Sequence[Mapping[str, Any]]) -> None:
    """Raise DataError if a text has no token, special ones included, for the model to read."""
    for number, text, row in zip(rows.numbers, rows.texts, features, strict=True):
        if not row["input_ids"]:
            raise DataError(
                f"{rows.source}, row {number}: text: expected at least one token, got none of "
                f"{shorten(text, 60)}"
            )


def end_token(tokenizer: Any) -> int:
    """The id of the tokenizer's end token.

    Raises:
        ValueError: it has none, so that a model could not be taught to stop.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer: expected one with an end token (eos_token), "
            f"got {type(tokenizer).__name__} without"
        )
    return int(tokenizer.eos_token_id)


def tokenise_inputs(rows: Rows, tokenizer: Any, form: TextForm) -> Tokenised:
    """What the model reads of each row before it generates.

    For ``"seq2seq"`` the text as the tokenizer gives it, with its end cut off if it is too long.
    For ``"causal"`` the text and the separator, without an end token; if it is too long, its
    beginning is cut off, since what stands next to the target matters most. Of a conversation the
    text is what the chat template makes of the messages and the beginning of a reply; a text alone
    is a message of the user.

    Raises:
        ValueError: no room for a token of the text beside special tokens and separator.
        DataError: a text without any token.
    """
    if form.task == "seq2seq":
        return tokenise(dataclasses.replace(rows, pairs=None), tokenizer, form.max_length)
    end, start = end_token(tokenizer), tokenizer.bos_token_id
    separator = form.separator if form.targets and not form.chat else ""
    texts = [text for text, _ in _written(rows, tokenizer)] if form.chat else rows.texts
    features = []
    cut = 0
    how = {"add_special_tokens": not form.chat}  # a chat template writes them itself
    empty, *inputs = _ids(tokenizer, [text + separator for text in ("", *texts)], **how)
    _check_room("max_length", form.max_length, len(empty) - (empty[-1:] == [end]), "the text")
    for ids in inputs:
        if ids[-1:] == [end] and not form.chat:
            ids.pop()
        if len(ids) > form.max_length:
            cut += 1
            kept = ids[:1] if ids[0] == start else []
            ids = kept + ids[len(ids) - form.max_length + len(kept) :]
        features.append({"input_ids": ids})
    _check_read(rows, features)
    return Tokenised(tuple(features), None, cut)


def tokenise_text(rows: Rows, tokenizer: Any, form: TextForm) -> Tokenised:
    """Rows of a text task with their labels.

    For ``"seq2seq"`` the labels are the target as the tokenizer gives it, with an end token. For
    ``"causal"`` the target and an end token follow the text, which itself is not learnt; without
    targets the text itself is, and an end token (the token that starts every text is not). A target
    that is too long, or a text that is learnt itself, loses its end, and the end token with it, so
    that nobody is taught to stop there.

    Raises:
        ValueError: no room for a token of the text or of the target beside the others.
    """
    end = end_token(tokenizer)
    if form.task == "causal" and not form.targets:
        return _tokenise_plain(rows, tokenizer, form.max_length, end)
    inputs = tokenise_inputs(rows, tokenizer, form)
    whole = form.task == "seq2seq"  # a decoder's text may start and end with tokens of its own
    features = []
    cut = 0
    how = {"name": "text_target", "add_special_tokens": whole}
    wanted: Sequence[str] = rows.targets or ()
    if form.chat:
        wanted = [reply for _, reply in _written(rows, tokenizer)]
    empty, *targets = _ids(tokenizer, ("", *wanted), **how)
    first = len(empty) - (empty[-1:] == [end])
    _check_room("max_target_length", form.max_target_length, first, "the target")
    for row, ids in zip(inputs.features, targets, strict=True):
        target = ids if ids[-1:] == [end] else [*ids, end]
        cut += len(target) > form.max_target_length
        target = target[: form.max_target_length]
        text = row["input_ids"]
        if whole:
            features.append({**row, "labels": target})
        else:
            labels = [IGNORED] * len(text) + target
            features.append({"input_ids": text + target, "labels": labels})
    return Tokenised(tuple(features), None, inputs.num_cut, cut)


def _written(rows: Rows, tokenizer: Any) -> list[tuple[str, str]]:
    """What the chat template makes of the messages before each reply, and of the reply.

    Raises:
        ValueError: no template, or one that writes the messages otherwise once there is a reply.
        DataError: messages that the template refuses.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"tokenizer: expected one with a chat template, got {type(tokenizer).__name__} without"
        )
    chats = rows.chats or [({"role": "user", "content": text},) for text in rows.texts]
    found = []
    for number, chat, target in itertools.zip_longest(rows.numbers, chats, rows.targets or ()):
        write = functools.partial(tokenizer.apply_chat_template, tokenize=False)
        reply = [] if target is None else [{"role": "assistant", "content": target}]
        try:
            before = write(list(chat), add_generation_prompt=True)
            whole = write([*chat, *reply]) if reply else before
        except TemplateError as error:
            raise DataError(
                f"{rows.source}, row {number}: messages: expected those of the tokenizer's chat "
                f"template, got others ({error})"
            ) from None
        if not whole.startswith(before):
            raise ValueError(
                f"tokenizer: expected a chat template that writes the beginning of a conversation "
                f"as it is, got one that changes {shorten(before, 60)} to {shorten(whole, 60)}"
            )
        found.append((before, whole[len(before) :].rstrip()))
    return found


def _tokenise_plain(rows: Rows, tokenizer: Any, max_length: int, end: int) -> Tokenised:
    features = []
    cut = 0
    for ids in _ids(tokenizer, rows.texts):
        if ids[-1:] != [end]:
            ids = [*ids, end]
        cut += len(ids) > max_length
        ids = ids[:max_length]
        first = IGNORED if ids[0] == tokenizer.bos_token_id else ids[0]
        features.append({"input_ids": ids, "labels": [first, *ids[1:]]})
    return Tokenised(tuple(features), None, cut)


def _ids(tokenizer: Any, texts: Sequence[str], **how: Any) -> list[list[int]]:
    """The token ids of :func:`_encode` alone."""
    return [list(row["input_ids"]) for row in _encode(tokenizer, texts, **how)]


def _encode(
    tokenizer: Any,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    *,
    name: str = "text",
    **how: Any,
) -> list[dict[str, Any]]:
    """``input_ids`` of each text and, if the tokenizer gives them, ``token_type_ids``; uncut."""
    given = {name: list(texts), "text_pair": None if pairs is None else list(pairs)}
    plain = {"padding": False, "truncation": False, "return_attention_mask": False}
    encoded = tokenizer(**given, verbose=False, **{**plain, **how})
    names = [name for name in ("input_ids", "token_type_ids") if name in encoded]
    return [{name: encoded[name][i] for name in names} for i in range(len(texts))]
