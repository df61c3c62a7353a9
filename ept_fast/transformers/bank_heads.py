"""The heads of a bank's tasks, each called with the rows of its task."""

from __future__ import annotations

import math
from contextvars import ContextVar

import torch
from torch import Tensor, nn

__all__ = ["ROWS", "LinearHeads", "ModuleHeads"]

# The tasks of the rows that a model's own head is called with; it hands no argument through.
ROWS: ContextVar[Tensor] = ContextVar("rows")


class LinearHeads(nn.Module):
    """Linear heads of different numbers of classes; a class that a task lacks has logit -inf."""

    weight: Tensor  # [T, C, h]
    bias: Tensor  # [T, C]

    def __init__(self, width: int, capacity: int, num_labels: int, dtype: torch.dtype) -> None:
        super().__init__()
        bias = torch.full((capacity, num_labels), -math.inf, dtype=dtype)
        self.register_buffer("weight", torch.zeros(capacity, num_labels, width, dtype=dtype))
        self.register_buffer("bias", bias)

    @torch.no_grad()
    def write(self, slot: int, head: nn.Linear | None) -> None:
        """Fill a slot, or clear it."""
        self.weight[slot].zero_()
        self.bias[slot].fill_(-math.inf)
        if head is not None:
            count = head.out_features
            self.weight[slot, :count] = head.weight
            self.bias[slot, :count] = 0 if head.bias is None else head.bias

    def forward(self, values: Tensor) -> Tensor:
        task_ids = ROWS.get()
        weight, bias = self.weight[task_ids], self.bias[task_ids]  # [B, C, h], [B, C]
        rows = values if values.dim() == 3 else values.unsqueeze(1)
        logits = torch.baddbmm(bias.unsqueeze(1), rows, weight.mT)  # [B, S or 1, C]
        return logits if values.dim() == 3 else logits.squeeze(1)


class ModuleHeads(nn.Module):
    """A module of a model's own head, one for each task, each called with the rows of its task."""

    def __init__(self, num_labels: int) -> None:
        super().__init__()
        self.of_slot = nn.ModuleDict()
        self.num_labels = num_labels

    def write(self, slot: int, head: nn.Module | None) -> None:
        """Fill a slot, or clear it."""
        if head is not None:
            self.of_slot[str(slot)] = head.requires_grad_(False).eval()
        elif str(slot) in self.of_slot:
            del self.of_slot[str(slot)]

    def forward(self, values: Tensor) -> Tensor:
        task_ids = ROWS.get()
        found: Tensor | None = None
        for slot in sorted(set(task_ids.tolist())):
            rows = (task_ids == slot).nonzero().squeeze(1)
            part: Tensor = self.of_slot[str(slot)](values[rows])
            if found is None:
                width = max(part.shape[-1], self.num_labels)
                shape = (values.shape[0], *part.shape[1:-1], width)
                found = part.new_full(shape, -math.inf)
            found[rows, ..., : part.shape[-1]] = part
        assert found is not None
        return found
