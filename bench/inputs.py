"""The tensors of a shape: parameters that train, a frozen table, a batch, gradients of outputs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bench.shapes import Shape
from ept_fast import EPTConfig, FusedEPTPrompt

SCALING = 0.5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Inputs:
    """One set of tensors. ``prompt`` stands for P′ if only the splice is measured."""

    parameters: dict[str, Tensor]
    prompt: Tensor
    weight: Tensor
    input_ids: Tensor
    attention_mask: Tensor | None
    task_ids: Tensor | None

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values, everything that is floating in this type."""
        return replace(
            self,
            parameters={
                n: t.detach().to(dtype).requires_grad_() for n, t in self.parameters.items()
            },
            prompt=self.prompt.detach().to(dtype).requires_grad_(),
            weight=self.weight.to(dtype),
        )


def make_inputs(shape: Shape, table: torch.dtype, device: torch.device, count: int) -> list[Inputs]:
    """Sets of random tensors, the same on every call; the sets share the frozen table.

    The table has at most 32,768 rows on a CPU, whatever the vocabulary: it is looked up, never
    read whole, and one of Llama's size takes gigabytes.
    """
    g = torch.Generator(device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(size, generator=g, device=device) * scale).to(dtype)

    def integers(low: int, high: int, *size: int) -> Tensor:
        return torch.randint(low, high, size, generator=g, device=device)

    s, d, k, h = shape, shape.hidden_size, shape.num_spaces, shape.space_dim
    lead = (s.tasks,) if s.tasks else ()
    sizes = {
        "short_prompt": ((s.num_virtual_tokens, d), 1.0),
        "offset_a": ((s.max_length, s.rank), 1.0),
        "offset_b": ((s.rank, d), 1.0),
        "space_down": ((k, d, h), d**-0.5),
        "space_up": ((k, h, d), h**-0.5),
        "gate_weight": ((d, k), d**-0.5),
        "gate_bias": ((k,), 1.0),
    }
    rows = s.vocabulary if device.type == "cuda" else min(s.vocabulary, 1 << 15)
    weight = normal(rows, d, dtype=table)

    def mask() -> Tensor | None:
        if not s.shortest:
            return None
        lengths = integers(s.shortest, s.length + 1, s.batch, 1)
        if s.batch > 1:
            lengths[0] = s.length  # a batch is as long as its longest row
        return (torch.arange(s.length, device=device) < lengths).long()

    return [
        Inputs(
            {
                name: normal(*lead, *size, scale=scale).requires_grad_()
                for name, (size, scale) in sizes.items()
            },
            normal(*lead, s.num_virtual_tokens, d).requires_grad_(),
            weight,
            integers(0, rows, s.batch, s.length),
            mask(),
            integers(0, s.tasks, s.batch) if s.tasks else None,
        )
        for _ in range(count)
    ]


def make_prompt(
    shape: Shape, tensors: dict[str, Tensor], weight: Tensor, backend: str | None = None
) -> FusedEPTPrompt:
    """The module, or a bank of ``shape.tasks``, with copies of these tensors before this table."""
    config = EPTConfig(
        shape.hidden_size,
        num_virtual_tokens=shape.num_virtual_tokens,
        max_length=shape.max_length,
        rank=shape.rank,
        num_spaces=shape.num_spaces,
        space_dim=shape.space_dim,
        alpha=SCALING * shape.rank**0.5,
    )
    return FusedEPTPrompt.from_tensors(
        config,
        {name: tensor.detach().clone() for name, tensor in tensors.items()},
        nn.Embedding.from_pretrained(weight, freeze=True),
        num_tasks=shape.tasks or None,
        backend=backend,
    )


def with_mask(inputs: Inputs) -> Inputs:
    """The same with a mask, as a tokenizer gives it: of ones if there is none."""
    if inputs.attention_mask is not None:
        return inputs
    return replace(inputs, attention_mask=torch.ones_like(inputs.input_ids))


def cotangent(size: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A gradient for an output, the same for every output of its size and type."""
    g = torch.Generator(device).manual_seed(1)
    return torch.randn(size, generator=g, device=device).to(dtype)
