"""StablePT: a soft prompt that meets the text by cross-attention, under a contrastive loss.

After Liu et al., *StablePT* (arXiv 2404.19335); docs/methods.md says what is theirs and what ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ept_fast.config import PromptConfig, check_choice, check_count, check_flag, check_number
from ept_fast.losses.contrastive import supervised_contrastive
from ept_fast.losses.terms import SCHEDULES, LossInputs, LossTerm
from ept_fast.prompts.base import register
from ept_fast.prompts.initial import repeated
from ept_fast.prompts.reading import ReadingPrompt

__all__ = ["StableConfig", "StablePrompt"]

_NORMS = 4  # of the prompt, of the text, of the attention's output, of the result


@dataclass(frozen=True)
class StableConfig(PromptConfig):
    """Sizes and choices of a StablePT prompt.

    Attributes:
        hidden_size: d, of the embeddings and of the hidden states.
        num_virtual_tokens: m.
        num_heads: attention heads.
        head_dim: width of a head.
        mlp_dim: width between the two layers behind the attention.
        first_pass: whether the prompt attends to the text's states in the plain model; else to its
            token embeddings.
        contrastive_weight: of the supervised contrastive loss on the prompts; 0 leaves it out.
        contrastive_temperature: its τ > 0.
        schedule: of that weight: ``"constant"``, or ``"linear"``, falling to 0.

    Raises:
        TypeError, ValueError: a field of the wrong type or out of its range, by name.
    """

    prompt_type: ClassVar[str] = "stable"
    solved: ClassVar[str | None] = "head_dim"

    num_heads: int = 1
    head_dim: int = 16
    mlp_dim: int = 8
    first_pass: bool = True
    contrastive_weight: float = 1.0
    contrastive_temperature: float = 0.3
    schedule: str = "constant"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_heads", "head_dim", "mlp_dim"):
            check_count(name, getattr(self, name), 1)
        check_flag("first_pass", self.first_pass)
        check_number("contrastive_weight", self.contrastive_weight)
        check_number("contrastive_temperature", self.contrastive_temperature, positive=True)
        check_choice("schedule", self.schedule, SCHEDULES)

    @property
    def num_parameters(self) -> int:
        """m·d, 4·d·a for a = num_heads·head_dim, 2·d·h + h + d for h = mlp_dim, and 8·d."""
        d, h = self.hidden_size, self.mlp_dim
        attention = 4 * d * self.num_heads * self.head_dim
        return self.num_virtual_tokens * d + attention + 2 * d * h + h + d + 2 * _NORMS * d


@register
class StablePrompt(ReadingPrompt):
    """Soft prompt tokens that attend to the text's states, and only then stand before the text.

    With H the states of the text, LN₁ to LN₄ and φ GELU::

        X  = LN₁(P)
        Y  = X + Attention(X, LN₂(H))
        Z  = LN₃(Y)
        P' = LN₄(Z + φ(Z·D + b)·U + c)

    In training the loss has the supervised contrastive loss of the prompts' means
    (:func:`ept_fast.losses.contrastive.supervised_contrastive`). The arguments are those of
    :class:`ept_fast.FusedEPTPrompt`.
    """

    config_class: ClassVar[type[PromptConfig]] = StableConfig
    groups: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "prompt": ("short_prompt",),
        "spaces": (
            *("query_weight", "key_weight", "value_weight", "output_weight"),
            *("down_weight", "down_bias", "up_weight", "up_bias", "norm_weights", "norm_biases"),
        ),
    }

    config: StableConfig

    @classmethod
    def shapes(cls, config: StableConfig) -> dict[str, tuple[int, ...]]:
        """The tensors of a single prompt of these sizes, by name."""
        m, d, h = config.num_virtual_tokens, config.hidden_size, config.mlp_dim
        a = config.num_heads * config.head_dim
        return {
            "short_prompt": (m, d),
            **dict.fromkeys(("query_weight", "key_weight", "value_weight"), (d, a)),
            "output_weight": (a, d),
            "down_weight": (d, h),
            "down_bias": (h,),
            "up_weight": (h, d),
            "up_bias": (d,),
            "norm_weights": (_NORMS, d),
            "norm_biases": (_NORMS, d),
        }

    def initial(self, rows: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """The rows, which attention and MLP do not change yet, at their own scale."""
        short = repeated(rows, self.config.num_virtual_tokens)
        tensors = {"short_prompt": short}
        for name, shape in self.shapes(self.config).items():
            if name in ("query_weight", "key_weight", "value_weight", "down_weight"):
                bound = (6 / sum(shape)) ** 0.5  # Xavier's
                tensors[name] = (torch.rand(shape, generator=generator) * 2 - 1) * bound
            elif name not in tensors:
                tensors[name] = torch.zeros(shape)
        tensors["norm_weights"] += 1
        tensors["norm_weights"][-1] = short.float().std(1, unbiased=False).mean()
        return tensors

    def of_rows(self, t: Mapping[str, Tensor], states: Tensor, mask: Tensor) -> Tensor:
        """The prompts ``[B, m, d]``."""

        def norm(x: Tensor, i: int) -> Tensor:
            weight, bias = (t[f"norm_{n}"][..., i : i + 1, :] for n in ("weights", "biases"))
            return F.layer_norm(x, x.shape[-1:]) * weight + bias

        def heads(x: Tensor) -> Tensor:  # [B, heads, ..., head_dim]
            return x.reshape(*x.shape[:-1], self.config.num_heads, self.config.head_dim).transpose(
                -3, -2
            )

        prompt = norm(t["short_prompt"].expand(len(states), -1, -1), 0)
        text = norm(states, 1)
        query = heads(prompt @ t["query_weight"]) * self.config.head_dim**-0.5
        scores = query @ heads(text @ t["key_weight"]).transpose(-2, -1)  # [B, heads, m, S]
        real = mask[:, None, None, :]
        lowest = torch.finfo(scores.dtype).min  # which a row without tokens has everywhere
        weights = scores.masked_fill(~real, lowest).softmax(-1) * real
        found = (weights @ heads(text @ t["value_weight"])).transpose(-3, -2).flatten(-2)
        prompt = norm(prompt + found @ t["output_weight"], 2)
        hidden = F.gelu(prompt @ t["down_weight"] + t["down_bias"].unsqueeze(-2))
        return norm(prompt + hidden @ t["up_weight"] + t["up_bias"].unsqueeze(-2), 3)

    def loss_terms(self) -> tuple[LossTerm, ...]:
        """The supervised contrastive loss."""
        c = self.config
        return (LossTerm("contrastive", self._contrastive, c.contrastive_weight, c.schedule),)

    def _contrastive(self, inputs: LossInputs) -> Tensor:
        if inputs.labels.shape != inputs.prompt.shape[:1]:
            raise ValueError(
                f"contrastive: expected a task with one label for each text, got labels of shape "
                f"{list(inputs.labels.shape)}; a weight of 0 leaves the term out"
            )
        features = inputs.prompt.mean(1)
        return supervised_contrastive(features, inputs.labels, self.config.contrastive_temperature)
