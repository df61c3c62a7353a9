"""ACCEPT: codebooks for blocks of the width, shared by all prompt tokens, and by all positions.

After Lin et al., *ACCEPT* (EMNLP Findings 2024, arXiv 2410.12847); docs/methods.md says what is
theirs and what ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ept_fast.config import PromptConfig, check_count
from ept_fast.prompts.base import Prompt, register

__all__ = ["ACCEPTConfig", "ACCEPTPrompt"]


@dataclass(frozen=True)
class ACCEPTConfig(PromptConfig):
    """Sizes of an ACCEPT prompt.

    Attributes:
        hidden_size: d, a multiple of ``num_blocks``.
        num_virtual_tokens: m.
        max_length: n, text positions that the offset covers.
        num_blocks: K, parts of the width.
        codebook_size: R, codes of width d/K in each block's codebook for the prompt.
        offset_size: R₂, codes of each block for the offset to the text; 0 for no offset, and at
            most min(n, d) / K.

    Raises:
        TypeError, ValueError: a field of the wrong type or out of its range, by name.
    """

    prompt_type: ClassVar[str] = "accept"
    solved: ClassVar[str | None] = "offset_size"

    max_length: int = 256
    num_blocks: int = 8
    codebook_size: int = 8
    offset_size: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("max_length", self.max_length, 1)
        check_count("num_blocks", self.num_blocks, 1)
        check_count("codebook_size", self.codebook_size, 1)
        check_count("offset_size", self.offset_size, 0)
        if self.hidden_size % self.num_blocks:
            raise ValueError(
                f"num_blocks: expected a divisor of hidden_size {self.hidden_size}, "
                f"got {self.num_blocks}"
            )
        most = min(self.max_length, self.hidden_size) // self.num_blocks
        if self.offset_size > most:
            raise ValueError(
                f"offset_size: expected at most min(max_length {self.max_length}, hidden_size "
                f"{self.hidden_size}) / num_blocks {self.num_blocks} = {most}, "
                f"got {self.offset_size}"
            )

    @property
    def rank(self) -> int:  # type: ignore[override]
        """K·R₂, the rank of the offset."""
        return self.num_blocks * self.offset_size

    @property
    def scaling(self) -> float:
        """1; 0 without an offset."""
        return float(self.rank > 0)

    @property
    def initial_rows(self) -> int:
        """m rows for the prompt, and as many as the rank for the offset."""
        return self.num_virtual_tokens + self.rank

    @property
    def num_parameters(self) -> int:
        """(m·K + d)·R + (n·K + d)·R₂."""
        k, d = self.num_blocks, self.hidden_size
        prompt = (self.num_virtual_tokens * k + d) * self.codebook_size
        return prompt + (self.max_length * k + d) * self.offset_size


@register
class ACCEPTPrompt(Prompt):
    """In every block of the width, prompt tokens are sums of a codebook's rows.

    The offset to the text is made the same way from codebooks of its own. It is the low-rank offset
    A·B of EPT with a block-diagonal B, and so goes through the same kernels. The arguments are
    those of :class:`ept_fast.FusedEPTPrompt`.
    """

    config_class: ClassVar[type[PromptConfig]] = ACCEPTConfig
    groups: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "prompt": ("prompt_weights", "prompt_codes"),
        "offset": ("offset_a", "offset_codes"),
    }

    config: ACCEPTConfig
    prompt_weights: nn.Parameter
    prompt_codes: nn.Parameter
    offset_a: nn.Parameter | None
    offset_codes: nn.Parameter | None

    @property
    def offset_b(self) -> Tensor | None:  # type: ignore[override]
        """B, ``[(T,) K·R₂, d]``: the codebooks on the diagonal, zeros elsewhere."""
        codes = self.offset_codes
        if codes is None:
            return None
        k = codes.shape[-3]
        own = torch.eye(k, dtype=codes.dtype, device=codes.device).view(k, 1, k, 1)
        return (codes.unsqueeze(-2) * own).flatten(-2).flatten(-3, -2)

    @classmethod
    def shapes(cls, config: ACCEPTConfig) -> dict[str, tuple[int, ...]]:
        """The tensors of a single prompt of these sizes, by name."""
        k, width = config.num_blocks, config.hidden_size // config.num_blocks
        shapes: dict[str, tuple[int, ...]] = {
            "prompt_weights": (k, config.num_virtual_tokens, config.codebook_size),
            "prompt_codes": (k, config.codebook_size, width),
        }
        if config.offset_size:
            shapes |= {"offset_a": (config.max_length, config.rank)}
            shapes |= {"offset_codes": (k, config.offset_size, width)}
        return shapes

    def initial(self, rows: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """The nearest that the codebooks come to the first m rows; the offset starts at zero.

        Each block's codes are the leading right-singular vectors of the rows' block, and so are the
        offset's, of the rows after the first m.
        """
        c = self.config
        m = c.num_virtual_tokens
        weights, codes = _codebooks(rows[:m], c.num_blocks, c.codebook_size, generator)
        tensors = {"prompt_weights": weights, "prompt_codes": codes}
        if c.offset_size:
            tensors["offset_a"] = torch.zeros(c.max_length, c.rank)
            _, codes = _codebooks(rows[m:], c.num_blocks, c.offset_size, generator)
            tensors["offset_codes"] = codes
        return tensors

    def formula(self, t: Mapping[str, Tensor]) -> Tensor:
        """P′: the blocks' products, side by side."""
        return (t["prompt_weights"] @ t["prompt_codes"]).transpose(-3, -2).flatten(-2)


def _codebooks(
    rows: Tensor, num_blocks: int, size: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Weights ``[K, N, size]`` and codes ``[K, size, d/K]``: the rows' best approximation.

    Codes beyond the rank of a block are random, of the rows' deviation, and have weights of zero.
    """
    blocks = rows.double().reshape(len(rows), num_blocks, -1).transpose(0, 1)  # [K, N, d/K]
    left, singular, right = torch.linalg.svd(blocks, full_matrices=False)
    root = singular[:, :size].sqrt()
    weights = (left[..., :size] * root.unsqueeze(-2)).float()
    codes = (root.unsqueeze(-1) * right[:, :size]).float()
    missing = size - codes.shape[1]
    if missing > 0:
        more = torch.randn(num_blocks, missing, blocks.shape[-1], generator=generator)
        codes = torch.cat([codes, more * rows.std(correction=0)], 1)
        weights = torch.nn.functional.pad(weights, (0, missing))
    return weights, codes
