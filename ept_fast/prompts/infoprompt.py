"""InfoPrompt: a prompt generated from each text, trained with two information losses.

After Wu et al., *InfoPrompt* (NeurIPS 2023, arXiv 2306.04933); docs/methods.md says what is theirs
and what ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ept_fast.config import PromptConfig, check_choice, check_count, check_flag, check_number
from ept_fast.losses.information import gaussian_divergence, representation_information
from ept_fast.losses.named import of_head
from ept_fast.losses.terms import SCHEDULES, LossInputs, LossTerm, needed
from ept_fast.prompts.base import register
from ept_fast.prompts.initial import repeated
from ept_fast.prompts.reading import ReadingPrompt, masked_mean

__all__ = ["InfoPrompt", "InfoPromptConfig"]

_POOLINGS = ("mean", "first")
_DRAWS = 4  # of the unprompted posterior, times the batch
_LOG_STD = (-2.0, 10.0)  # what it is held between
_REPRESENTATION, _DIVERGENCE = "representation_information", "divergence"  # of the loss's terms


@dataclass(frozen=True)
class InfoPromptConfig(PromptConfig):
    """Sizes and choices of an InfoPrompt.

    Attributes:
        hidden_size: d, of the embeddings and of the hidden states.
        num_virtual_tokens: m.
        bottleneck: h, width between the two layers that make a prompt of a text.
        pooling: what they read: the ``"mean"`` of the text's states, or the ``"first"``.
        first_pass: whether the states are those of the plain model; else the token embeddings.
        latent_size: z, width of the representation that the second loss compares.
        head_weight: of the loss between prompt and head; 0 leaves it out.
        representation_weight: of the loss between prompt and representation; 0 leaves it out, and
            its tensors.
        divergence_weight: of the divergence of the representation's distribution from a normal one.
        schedule: of the three weights: ``"linear"``, falling to 0, or ``"constant"``.

    Raises:
        TypeError, ValueError: a field of the wrong type or out of its range, by name.
    """

    prompt_type: ClassVar[str] = "infoprompt"
    solved: ClassVar[str | None] = "bottleneck"

    bottleneck: int = 32
    pooling: str = "mean"
    first_pass: bool = True
    latent_size: int = 8
    head_weight: float = 0.1
    representation_weight: float = 0.2
    divergence_weight: float = 0.1
    schedule: str = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("bottleneck", self.bottleneck, 1)
        check_choice("pooling", self.pooling, _POOLINGS)
        check_flag("first_pass", self.first_pass)
        check_count("latent_size", self.latent_size, 1)
        for name in ("head_weight", "representation_weight", "divergence_weight"):
            check_number(name, getattr(self, name))
        check_choice("schedule", self.schedule, SCHEDULES)
        if self.representation_weight and not self.first_pass:
            raise ValueError(
                f"representation_weight: expected 0 without a first pass, which gives the "
                f"unprompted representation, got {self.representation_weight}"
            )

    @property
    def num_parameters(self) -> int:
        """Those of the generator, and of the representation if its loss counts."""
        m, d, h, z = self.num_virtual_tokens, self.hidden_size, self.bottleneck, self.latent_size
        latent = 3 * d * z + 2 * z if self.representation_weight else 0
        return h * (d + 1) + m * d * (h + 1) + latent


@register
class InfoPrompt(ReadingPrompt):
    """P' = W_up·GELU(W_down·c + b_down) + b_up, with c pooled from the text's plain states.

    In training the loss has three terms more: head_information between the prompt and the head's
    weights, representation_information between the prompt and a latent normal representation of
    the text behind it, and that distribution's divergence from N(0, 1)
    (:mod:`ept_fast.losses.information`). They need a task with one label for a text; weights of 0
    leave them out. The arguments are those of :class:`ept_fast.FusedEPTPrompt`.
    """

    config_class: ClassVar[type[PromptConfig]] = InfoPromptConfig
    groups: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "prompt": ("up_bias",),
        "spaces": (
            *("down_weight", "down_bias", "up_weight"),
            *("mean_weight", "mean_bias", "std_weight", "std_bias", "critic"),
        ),
    }

    config: InfoPromptConfig
    mean_weight: nn.Parameter
    mean_bias: nn.Parameter
    std_weight: nn.Parameter
    std_bias: nn.Parameter
    critic: nn.Parameter

    @classmethod
    def shapes(cls, config: InfoPromptConfig) -> dict[str, tuple[int, ...]]:
        """The tensors of a single prompt of these sizes, by name."""
        m, d, h = config.num_virtual_tokens, config.hidden_size, config.bottleneck
        z = config.latent_size
        shapes: dict[str, tuple[int, ...]] = {
            "up_bias": (m, d),
            "down_weight": (d, h),
            "down_bias": (h,),
            "up_weight": (h, m, d),
        }
        if config.representation_weight:
            shapes |= {"mean_weight": (d, z), "mean_bias": (z,)}
            shapes |= {"std_weight": (d, z), "std_bias": (z,), "critic": (d, z)}
        return shapes

    def initial(self, rows: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """The rows before every text, and a generator that changes nothing yet."""
        tensors = {"up_bias": repeated(rows, self.config.num_virtual_tokens)}
        for name, shape in self.shapes(self.config).items():
            if name.endswith("weight") or name == "critic":
                bound = self.config.hidden_size**-0.5
                drawn = (torch.rand(shape, generator=generator) * 2 - 1) * bound
                tensors[name] = torch.zeros(shape) if name == "up_weight" else drawn
            elif name != "up_bias":
                tensors[name] = torch.zeros(shape)
        return tensors

    def of_rows(self, t: Mapping[str, Tensor], states: Tensor, mask: Tensor) -> Tensor:
        """The prompts ``[B, m, d]``."""
        c = self._pool(states, mask).unsqueeze(1)  # [B, 1, d]
        hidden = F.gelu(c @ t["down_weight"] + t["down_bias"].unsqueeze(-2))
        change = hidden @ t["up_weight"].flatten(-2)
        return change.reshape(-1, *t["up_bias"].shape[-2:]) + t["up_bias"]

    def loss_terms(self) -> tuple[LossTerm, ...]:
        """The two information losses, and the divergence."""
        c = self.config
        terms = [LossTerm("head_information", of_head, c.head_weight, c.schedule)]
        if c.representation_weight:
            weight = c.representation_weight
            terms += [
                LossTerm(_REPRESENTATION, self._of_representation, weight, c.schedule),
                LossTerm(_DIVERGENCE, self._divergence, c.divergence_weight, c.schedule),
            ]
        return tuple(terms)

    def _pool(self, states: Tensor, mask: Tensor) -> Tensor:
        if self.config.pooling == "mean":
            return masked_mean(states, mask)
        first = mask & (mask.cumsum(1) == 1)  # nothing of a row without tokens
        return (first.to(states.dtype).unsqueeze(1) @ states).squeeze(1)

    def _posterior(self, representation: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the deviation, ``[..., z]``."""
        x = representation.to(self.mean_weight.dtype)
        if x.shape[-1] != self.config.hidden_size:
            raise ValueError(
                f"pooled: expected width hidden_size {self.config.hidden_size}, got {x.shape[-1]}"
            )
        log_std = (x @ self.std_weight + self.std_bias).clamp(*_LOG_STD)
        return x @ self.mean_weight + self.mean_bias, log_std

    def _both(self, inputs: LossInputs, term: str) -> tuple[tuple[Tensor, Tensor], ...]:
        """The posteriors of the text behind the prompt and without it."""
        pooled, plain = needed(inputs, term, "pooled", "plain_states")
        unprompted = self._pool(plain, inputs.attention_mask != 0)
        return self._posterior(pooled), self._posterior(unprompted)

    def _of_representation(self, inputs: LossInputs) -> Tensor:
        (mean, log_std), (others, others_log_std) = self._both(inputs, _REPRESENTATION)
        positive = mean + log_std.exp() * torch.randn_like(mean)
        batch, z = others.shape
        noise = torch.randn(batch, _DRAWS * batch, z, dtype=mean.dtype, device=mean.device)
        negatives = others.unsqueeze(1) + others_log_std.exp().unsqueeze(1) * noise
        context = inputs.prompt.detach().to(mean.dtype).mean(1) @ self.critic
        return representation_information(context, positive, negatives)

    def _divergence(self, inputs: LossInputs) -> Tensor:
        prompted, unprompted = self._both(inputs, _DIVERGENCE)
        return gaussian_divergence(*prompted) + gaussian_divergence(*unprompted)
