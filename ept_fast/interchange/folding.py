"""What a prompt comes to once it is trained: a constant prompt and the text's offset."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ept_fast.config import check_count
from ept_fast.precision import accumulation_dtype
from ept_fast.prompts.base import FoldedPrompt, Prompt, check_constant
from ept_fast.prompts.table import offset_table

__all__ = ["FoldedValues", "fold_values", "product"]


@dataclass(frozen=True)
class FoldedValues:
    """One prompt's constants, detached.

    Attributes:
        prompt: P′ [m, d], in the parameters' type.
        offset: c·A [n, r], in float32 at least, and B [r, d]; None if the rank is 0.
    """

    prompt: Tensor
    offset: tuple[Tensor, Tensor] | None


@torch.no_grad()
def fold_values(prompt: Prompt | FoldedPrompt, task: int | None) -> FoldedValues:
    """The constants of a prompt, or of prompt ``task`` of a bank.

    Raises:
        TypeError: no EPT prompt.
        ValueError: a bank without ``task``, or a task that the bank does not have; a prompt that
            was folded without its offset.
    """
    if not isinstance(prompt, (Prompt, FoldedPrompt)):
        raise TypeError(
            f"prompt: expected a FusedEPTPrompt or a FoldedEPTPrompt, got {type(prompt).__name__}"
        )
    if prompt.config.rank and prompt.offset_a is None:
        raise ValueError(
            'prompt: expected one that has its offset, got one folded with offset="none"'
        )
    check_constant("prompt", prompt)
    values = [prompt.reconstruct(), prompt.offset_a, prompt.offset_b]
    if prompt.num_tasks is None:
        if task is not None:
            raise ValueError(f"task: expected None for a single prompt, got {task!r}")
    else:
        if task is None:
            raise ValueError(
                f"task: expected one from 0 to {prompt.num_tasks - 1} of the bank, got None"
            )
        check_count("task", task, 0)
        if task >= prompt.num_tasks:
            raise ValueError(f"task: expected at most {prompt.num_tasks - 1}, got {task}")
        values = [None if value is None else value[task] for value in values]
    folded, a, b = (None if value is None else value.detach() for value in values)
    assert folded is not None
    if a is None or b is None:
        return FoldedValues(folded, None)
    scaled = prompt.config.scaling * a.to(torch.promote_types(a.dtype, torch.float32))
    return FoldedValues(folded, (scaled, b))


def product(offset: tuple[Tensor, Tensor]) -> Tensor:
    """c·A·B, [n, d], in float32 at least."""
    return offset_table(*offset, 1.0, accumulation_dtype(*offset))
