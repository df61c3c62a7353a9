"""Terms of the loss that any prompt may be trained with, by their names."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ept_fast.losses.contrastive import supervised_contrastive
from ept_fast.losses.information import head_information
from ept_fast.losses.terms import LossInputs, needed

__all__ = ["NAMED_LOSSES", "of_head", "of_pooled"]


def of_head(inputs: LossInputs) -> Tensor:
    """:func:`ept_fast.losses.information.head_information` of prompt and head."""
    (class_weights,) = needed(inputs, "head_information", "class_weights")
    prompt, embeds, mask = inputs.prompt, inputs.embeds, inputs.attention_mask
    return head_information(prompt, class_weights, embeds, mask)


def of_pooled(inputs: LossInputs) -> Tensor:
    """:func:`ept_fast.losses.contrastive.supervised_contrastive` of what the head classifies."""
    (pooled,) = needed(inputs, "supervised_contrastive", "pooled")
    return supervised_contrastive(pooled, inputs.labels)


NAMED_LOSSES: dict[str, Callable[[LossInputs], Tensor]] = {
    "head_information": of_head,
    "supervised_contrastive": of_pooled,
}
