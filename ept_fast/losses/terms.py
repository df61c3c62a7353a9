"""What is added to a task's loss in training: terms with a weight and a schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ept_fast.config import check_choice, check_number

__all__ = ["SCHEDULES", "LossInputs", "LossTerm", "needed"]

SCHEDULES = ("constant", "linear")


class LossInputs(NamedTuple):
    """What a term may be computed from, of one batch. What a task does not have is None.

    Attributes:
        prompt: P′ of each row as the model reads it, ``[B, m, d]``, with gradients.
        embeds: the text's embeddings as the model reads them, ``[B, S, d]``.
        attention_mask: ``[B, S]`` of 0 and 1.
        logits: the task's.
        labels: the task's.
        pooled: what the head classifies, ``[B, h]`` (SEQ_CLS).
        class_weights: the weights of the head, ``[C, h]`` (SEQ_CLS).
        plain_states: the text's last hidden states in the plain model, ``[B, S, h]``, without
            gradients, if the prompt reads them.
    """

    prompt: Tensor
    embeds: Tensor
    attention_mask: Tensor
    logits: Tensor
    labels: Tensor
    pooled: Tensor | None = None
    class_weights: Tensor | None = None
    plain_states: Tensor | None = None


@dataclass(frozen=True)
class LossTerm:
    """A term of the training loss: ``weight · schedule(progress) · function(inputs)``.

    Attributes:
        name: for messages.
        function: of :class:`LossInputs`; gives a scalar, a mean over the rows.
        weight: its factor.
        schedule: ``"constant"``, or ``"linear"``, which falls to 0 at the end of the training.

    Raises:
        TypeError, ValueError: a field of the wrong type or out of its range, by name.

    Example:
        >>> short = LossTerm("length", lambda inputs: inputs.prompt.square().mean(), 0.01)
        >>> short.schedule
        'constant'
    """

    name: str
    function: Callable[[LossInputs], Tensor]
    weight: float = 1.0
    schedule: str = "constant"

    def __post_init__(self) -> None:
        function: object = self.function
        if not callable(function):
            got = type(function).__name__
            raise TypeError(f"function: expected a function of LossInputs, got {got}")
        check_number("weight", self.weight)
        check_choice("schedule", self.schedule, SCHEDULES)

    def __call__(self, inputs: LossInputs, progress: Tensor) -> Tensor:
        """The weighted term, at ``progress`` from 0 to 1 through the training."""
        value = self.weight * self.function(inputs)
        return value if self.schedule == "constant" else value * (1 - progress)


def needed(inputs: LossInputs, term: str, *names: str) -> tuple[Any, ...]:
    """These fields; ValueError if the task has not all of them."""
    values = tuple(getattr(inputs, name) for name in names)
    for name, value in zip(names, values, strict=True):
        if value is None:
            raise ValueError(
                f"{term}: expected a task that has {name} (SEQ_CLS has), got one without; "
                f"a weight of 0 leaves the term out"
            )
    return values
