"""A prompt method of its own, in one file, as a user would write it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ept_fast.config import PromptConfig, check_number
from ept_fast.prompts.base import Prompt, register


@dataclass(frozen=True)
class ToyConfig(PromptConfig):
    prompt_type: ClassVar[str] = "toy"
    slope: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("slope", self.slope, positive=True)


@register
class ToyPrompt(Prompt):
    """Rows of tokens, each scaled by 1 + tanh(slope · its own number)."""

    config_class = ToyConfig
    groups: ClassVar[dict[str, tuple[str, ...]]] = {"prompt": ("rows",), "spaces": ("size",)}
    config: ToyConfig
    rows: nn.Parameter
    size: nn.Parameter

    @classmethod
    def shapes(cls, config: ToyConfig) -> dict[str, tuple[int, ...]]:
        m = config.num_virtual_tokens
        return {"rows": (m, config.hidden_size), "size": (m, 1)}

    def initial(self, rows: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        m = self.config.num_virtual_tokens
        return {"rows": rows[:m], "size": torch.zeros(m, 1)}

    def formula(self, t: Mapping[str, Tensor]) -> Tensor:
        return t["rows"] * (1 + torch.tanh(self.config.slope * t["size"]))
