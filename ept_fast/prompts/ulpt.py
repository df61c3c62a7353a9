"""ULPT: a prompt of very few dimensions, brought to full width by a frozen random matrix.

After Wu et al., *ULPT* (arXiv 2502.04501); docs/methods.md says what is theirs and what ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ept_fast.config import PromptConfig, check_count
from ept_fast.prompts.base import Prompt, register

__all__ = ["ULPTConfig", "ULPTPrompt"]


@dataclass(frozen=True)
class ULPTConfig(PromptConfig):
    """Sizes of a ULPT prompt.

    Attributes:
        hidden_size: d.
        num_virtual_tokens: m.
        prompt_rank: r, dimensions of the trained prompt; at most d.
        seed: of the frozen matrix, which is made from it and not saved.

    Raises:
        TypeError, ValueError: a field of the wrong type or out of its range, by name.
    """

    prompt_type: ClassVar[str] = "ulpt"

    prompt_rank: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("prompt_rank", self.prompt_rank, 1)
        check_count("seed", self.seed, 0)
        if self.prompt_rank > self.hidden_size:
            raise ValueError(
                f"prompt_rank: expected at most hidden_size {self.hidden_size}, "
                f"got {self.prompt_rank}"
            )

    @property
    def num_parameters(self) -> int:
        """m·r + 2·d."""
        return self.num_virtual_tokens * self.prompt_rank + 2 * self.hidden_size


@register
class ULPTPrompt(Prompt):
    """P' = scale ⊙ (codes·basis) + shift, with a frozen random basis ``[r, d]``.

    The arguments are those of :class:`ept_fast.FusedEPTPrompt`.
    """

    config_class: ClassVar[type[PromptConfig]] = ULPTConfig
    groups: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "prompt": ("codes",),
        "spaces": ("scale", "shift"),
    }

    config: ULPTConfig
    codes: nn.Parameter
    scale: nn.Parameter
    shift: nn.Parameter
    basis: Tensor

    @classmethod
    def shapes(cls, config: ULPTConfig) -> dict[str, tuple[int, ...]]:
        """The tensors of a single prompt of these sizes, by name."""
        m, r, d = config.num_virtual_tokens, config.prompt_rank, config.hidden_size
        return {"codes": (m, r), "scale": (d,), "shift": (d,)}

    @classmethod
    def constants(cls, config: ULPTConfig) -> dict[str, Tensor]:
        """The basis, uniform within ±√(6 / (r + d)), the same for all tasks of a bank."""
        r, d = config.prompt_rank, config.hidden_size
        draw = torch.Generator().manual_seed(config.seed)
        most = (6 / (r + d)) ** 0.5
        return {"basis": (torch.rand(r, d, generator=draw) * 2 - 1) * most}

    def initial(self, rows: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Normal codes; the prompt's mean and deviation are those of the first m rows."""
        m, r = self.config.num_virtual_tokens, self.config.prompt_rank
        shift = rows[:m].mean(0)
        codes = torch.randn(m, r, generator=generator)
        spread = (codes @ self.constants(self.config)["basis"]).std(correction=0)
        codes = codes * (rows[:m] - shift).std(correction=0) / spread
        return {"codes": codes, "scale": torch.ones_like(shift), "shift": shift}

    def formula(self, t: Mapping[str, Tensor]) -> Tensor:
        """P′."""
        return (t["codes"] @ t["basis"]) * t["scale"].unsqueeze(-2) + t["shift"].unsqueeze(-2)
