"""What methods share whose prompt is made from the states of each row's text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ept_fast.checks import check_task_ids, values_are_checked
from ept_fast.ops.types import Text
from ept_fast.prompts.base import Prompt, Seen

__all__ = ["ReadingPrompt", "by_row", "check_tasks", "embeddings_of", "masked_mean"]


class ReadingPrompt(Prompt):
    """A prompt of each row, from the states of its text.

    The states are those that the plain frozen model gives the text, in a first pass, or without
    one (``first_pass=False``, or a prompt by itself) the token embeddings.
    """

    config: Any

    @property
    def depends_on_text(self) -> bool:
        """True."""
        return True

    @property
    def reads_states(self) -> bool:
        """Whether the config asks for a first pass."""
        return bool(self.config.first_pass)

    def of_rows(self, t: Mapping[str, Tensor], states: Tensor, mask: Tensor) -> Tensor:
        """The prompts ``[B, m, d]`` in plain PyTorch.

        Args:
            t: the tensors, ``[...]``, or ``[B, ...]`` those of each row's task.
            states: ``[B, S, d]``, in the type of the tensors.
            mask: ``[B, S]``, bool.
        """
        raise NotImplementedError

    def prompt_for(self, text: Text, seen: Seen) -> tuple[Tensor, Text]:
        """A prompt of each row."""
        given = embeddings_of(text) if seen.states is None else seen.states
        if given.shape[-1] != self.config.hidden_size:
            raise ValueError(
                f"states: expected width hidden_size {self.config.hidden_size}, "
                f"got {given.shape[-1]}"
            )
        mask = text.attention_mask
        if mask is None:
            mask = torch.ones(given.shape[:2], device=given.device)
        if (text.task_ids is None) != (self.num_tasks is None):
            wanted = "None" if self.num_tasks is None else "the task of each row"
            raise ValueError(f"task_ids: expected {wanted}, got {_shown(text.task_ids)}")
        check_tasks(text, self.num_tasks)

        def formula(t: Mapping[str, Tensor]) -> Tensor:
            if text.task_ids is not None:
                t = {name: value[text.task_ids] for name, value in t.items()}
            states = given.to(next(iter(t.values())).dtype)
            return self.of_rows(t, states, mask != 0)

        return by_row(self.computed(formula), text)


def by_row(prompts: Tensor, text: Text) -> tuple[Tensor, Text]:
    """Prompts ``[B, m, d]`` of the rows, and the text with the ``task_ids`` that pick them."""
    return prompts, text._replace(task_ids=torch.arange(len(prompts), device=prompts.device))


def check_tasks(text: Text, num_tasks: int | None) -> None:
    """Raise IndexError for a row's task that the bank does not have, if values are looked at."""
    ids = text.task_ids
    if ids is None or num_tasks is None or torch.compiler.is_compiling():
        return
    if values_are_checked(ids.device):
        check_task_ids(ids, num_tasks)


def embeddings_of(text: Text) -> Tensor:
    """The frozen embeddings of a text, ``[B, S, d]``."""
    if text.inputs_embeds is not None:
        return text.inputs_embeds
    assert text.input_ids is not None
    assert text.weight is not None
    return F.embedding(text.input_ids, text.weight.detach())


def masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """The mean over each row's real tokens, ``[B, d]``; zeros for a row without any."""
    weights = mask.to(states.dtype)
    total = (weights.unsqueeze(1) @ states).squeeze(1)
    return total / weights.sum(1, keepdim=True).clamp_min(1)


def _shown(value: Tensor | None) -> str:
    return "None" if value is None else f"a tensor of shape {list(value.shape)}"
