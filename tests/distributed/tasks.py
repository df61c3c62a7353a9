"""A tiny wrapped model and a batch for each task, the same in the tests and in their processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ept_fast import EPTConfig, get_ept_model
from tests import architectures
from tests.architectures import NUM_LABELS, TASKS, VOCABULARY

__all__ = [
    "LENGTH",
    "OVER_TOKENS",
    "TASKS",
    "WITH_LOSS",
    "batch_of",
    "count_of",
    "frozen_of",
    "gradients",
    "gradients_of",
    "loss_of",
    "make_backbone",
    "make_model",
    "part",
    "trained",
    "values_of",
]

LENGTH = 12
LABELS = tuple("abc"[:NUM_LABELS])
IGNORED = -100

# The architecture of each task, and whether it comes without the library's head.
_BACKBONES: dict[str, tuple[str, bool]] = {
    "SEQ_CLS": ("BERT", False),
    "TOKEN_CLS": ("BERT", True),
    "CAUSAL_LM": ("Llama", False),
    "SEQ_2_SEQ_LM": ("T5", False),
    "FEATURE_EXTRACTION": ("BERT", True),
}
# Tasks whose loss is a mean over tokens, of which batches of the same size have different numbers.
OVER_TOKENS = ("TOKEN_CLS", "CAUSAL_LM", "SEQ_2_SEQ_LM")
WITH_LOSS = tuple(task for task in TASKS if task != "FEATURE_EXTRACTION")


def make_backbone(task: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The task's tiny model, with dropout in its config and in training mode."""
    name, bare = _BACKBONES[task]
    return architectures.build(name, task, bare=bare, dtype=dtype, **changes)


def make_model(task: str, backbone: Any = None, *, moved: bool = True, **choices: Any) -> Any:
    """The wrapped model with a prompt that every tensor has a part in, the same on every call.

    Args:
        task: one of ``TASKS``.
        backbone: the task's tiny model in float32 by default.
        moved: whether the adapter is away from where it starts, at which most gradients are zero.
        **choices: of :func:`ept_fast.get_ept_model`.
    """
    backbone = make_backbone(task) if backbone is None else backbone
    draw = torch.Generator().manual_seed(5)
    width = backbone.get_input_embeddings().embedding_dim
    labelled = _BACKBONES[task][1] and task == "TOKEN_CLS"
    model = get_ept_model(
        backbone,
        EPTConfig(
            width, num_virtual_tokens=4, max_length=16, rank=4, num_spaces=2, space_dim=4, alpha=1
        ),
        task,
        **{"labels": LABELS if labelled else None, "generator": draw, **choices},
    )
    with torch.no_grad():
        for parameter in trained(model).values():
            change = 0.2 * torch.randn(parameter.shape, generator=draw)
            parameter += change if moved else 0
    return model


def trained(model: Any) -> dict[str, Tensor]:
    """The parameters that require gradients."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def values_of(model: Any) -> dict[str, Tensor]:
    """A copy of what is trained."""
    return {name: p.detach().clone() for name, p in trained(model).items()}


def frozen_of(model: Any) -> dict[str, Tensor]:
    """A copy of what is not."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}


def batch_of(task: str, rows: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """Rows of 3 to 12 tokens, padded on the left and on the right in turn, with labels."""
    draw = torch.Generator().manual_seed(seed)

    def ids(*shape: int) -> Tensor:
        return torch.randint(3, VOCABULARY, shape, generator=draw)

    columns = torch.arange(LENGTH)
    count = torch.randint(3, LENGTH + 1, (rows, 1), generator=draw)
    mask = (columns < count).long()
    mask[::2] = mask[::2].flip(1)
    input_ids = ids(rows, LENGTH) * mask
    batch = {"input_ids": input_ids, "attention_mask": mask}
    if task == "SEQ_CLS":
        batch["labels"] = torch.randint(NUM_LABELS, (rows,), generator=draw)
    elif task == "TOKEN_CLS":
        labels = torch.randint(NUM_LABELS, (rows, LENGTH), generator=draw)
        batch["labels"] = labels.where(mask != 0, IGNORED)
    elif task == "CAUSAL_LM":
        batch["labels"] = input_ids.where(mask != 0, IGNORED)
    elif task == "SEQ_2_SEQ_LM":
        answer = torch.randint(1, 7, (rows, 1), generator=draw)
        batch["labels"] = ids(rows, 6).where(torch.arange(6) < answer, IGNORED)
    return batch


def part(batch: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    """Some of the rows."""
    return {name: values[rows] for name, values in batch.items()}


def count_of(task: str, batch: dict[str, Tensor]) -> int:
    """What the loss is a mean over: labels, or rows."""
    if task in OVER_TOKENS:
        return int((batch["labels"] != IGNORED).sum())
    return len(batch["input_ids"])


def loss_of(task: str, model: Callable[..., Any], batch: dict[str, Tensor]) -> Tensor:
    """The mean loss; of hidden states, their mean squared length along a fixed direction."""
    output = model(**batch)
    if task != "FEATURE_EXTRACTION":
        return output.loss  # type: ignore[no-any-return]
    hidden = output.last_hidden_state
    direction = torch.linspace(-1, 1, hidden.shape[-1], dtype=hidden.dtype)
    mask = batch["attention_mask"]
    squares = (hidden @ direction).square() * mask
    return (squares.sum(1) / mask.sum(1)).mean()


def gradients(model: Any) -> dict[str, Tensor]:
    """The gradients of what is trained, each of them there."""
    found = {name: p.grad for name, p in trained(model).items()}
    missing = [name for name, grad in found.items() if grad is None]
    assert not missing, missing
    return {name: grad.detach().clone() for name, grad in found.items() if grad is not None}


def gradients_of(task: str, model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of the mean loss of a batch."""
    model.zero_grad()
    loss_of(task, model, batch).backward()
    return gradients(model)
