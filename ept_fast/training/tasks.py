"""What differs between the three tasks of the training job, apart from their evaluation."""

from __future__ import annotations

from typing import Any

from ept_fast.training.config import TASKS, TrainConfig
from ept_fast.training.data import DataError, Rows
from ept_fast.training.tokens import TextForm

__all__ = [
    "ANSWERS",
    "WRAPPER_TASKS",
    "check_targets",
    "new_tokens",
    "text_form",
    "token_limit",
]

WRAPPER_TASKS = dict(zip(TASKS, ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM"), strict=True))
# What the rows of each task have beside their text, as `ept_fast.training.data.ANSWERS` has it.
ANSWERS = dict(zip(TASKS, ("label", "target", "optional target"), strict=True))


def token_limit(model: Any, tokenizer: Any) -> int:
    """The longest text, in tokens, that prompt, tokenizer and backbone all allow."""
    limits = [model.prompt.config.max_length, tokenizer.model_max_length, model.text_limit]
    return min(int(limit) for limit in limits if limit is not None)


def text_form(model: Any, tokenizer: Any, config: TrainConfig, targets: bool) -> TextForm:
    """How a text task's rows become token ids, within what the model and tokenizer allow.

    Raises:
        ValueError: no room for a text before the longest target.
    """
    limit = token_limit(model, tokenizer)
    target = config.max_target_length
    if config.task == "causal":
        room = limit - target if targets else limit
        if room < 1:
            raise ValueError(
                f"max_target_length: expected less than the {limit} positions that text and target "
                f"share, got {target}"
            )
        limit = min(room, config.max_length)
    else:
        decoder = model.profile.text_limit(0)
        target = target if decoder is None else min(target, decoder)
    return TextForm(config.task, limit, target, config.separator, targets)


def new_tokens(model: Any, form: TextForm, asked: int | None, longest: int) -> int:
    """The most tokens to generate: as many as asked for, or as a target may have.

    Args:
        model: the wrapped model.
        form: how its rows become token ids.
        asked: the number that was asked for, or None.
        longest: tokens of the longest text that is given.

    Raises:
        ValueError: the model has no positions for that many; where nobody asked, there are fewer.
    """
    causal = form.task == "causal"
    most = model.profile.table_limit(model.prompt.config.num_virtual_tokens if causal else 0)
    if causal and most is not None:
        most += 1 - longest  # the last new token is not fed; a decoder's start takes its place
    if asked is None:
        return form.max_target_length if most is None else min(form.max_target_length, most)
    if most is not None and asked > most:
        raise ValueError(
            f"max_new_tokens: expected at most {most}, for which the model has positions, "
            f"got {asked}"
        )
    return asked


def check_targets(rows: Rows, targets: bool, name: str, like: str) -> None:
    """Raise DataError unless the rows have targets, or have none, as others do."""
    if (rows.targets is not None) != targets:
        expected, got = ("targets", "none") if targets else ("no targets", "some")
        raise DataError(f"{rows.source}: {name}: expected {expected} as in {like}, got {got}")
