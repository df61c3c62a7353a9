"""LAMP: a long prompt's truncated SVD, its tokens' interaction, and average pooling.

After Lan et al., *LAMP* (NAACL 2025, arXiv 2502.12200); docs/methods.md says what is theirs and
what ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ept_fast.config import PromptConfig, check_choice, check_count
from ept_fast.prompts.base import Prompt, register
from ept_fast.prompts.initial import repeated

__all__ = ["LAMPConfig", "LAMPPrompt"]

_PRODUCTS = ("gram", "sketch")


@dataclass(frozen=True)
class LAMPConfig(PromptConfig):
    """Sizes and choices of a LAMP prompt.

    Attributes:
        hidden_size: d.
        num_virtual_tokens: m, what the backbone sees: l = m·window tokens, pooled.
        prompt_rank: r, singular directions that are kept; at most min(l, d).
        window: p, tokens that are averaged to one.
        product: how the l tokens interact: ``"gram"`` or ``"sketch"`` (docs/methods.md).
        sketch_size: R₂, width of a sketched outer product.
        seed: of the sketch's hashes.

    Raises:
        TypeError, ValueError: a field of the wrong type or out of its range, by name.
    """

    prompt_type: ClassVar[str] = "lamp"
    solved: ClassVar[str | None] = "prompt_rank"

    prompt_rank: int = 8
    window: int = 5
    product: str = "gram"
    sketch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prompt_rank", "window", "sketch_size"):
            check_count(name, getattr(self, name), 1)
        check_count("seed", self.seed, 0)
        check_choice("product", self.product, _PRODUCTS)
        most = min(self.initial_rows, self.hidden_size)
        if self.prompt_rank > most:
            raise ValueError(
                f"prompt_rank: expected at most min(num_virtual_tokens · window "
                f"{self.initial_rows}, hidden_size {self.hidden_size}) = {most}, "
                f"got {self.prompt_rank}"
            )

    @property
    def initial_rows(self) -> int:
        """l, the tokens of the long prompt."""
        return self.num_virtual_tokens * self.window

    @property
    def num_parameters(self) -> int:
        """r·(l + 1 + d), and 1 for the gram form or R₂·d for the sketch."""
        more = 1 if self.product == "gram" else self.sketch_size * self.hidden_size
        return self.prompt_rank * (self.initial_rows + 1 + self.hidden_size) + more


@register
class LAMPPrompt(Prompt):
    """Trained singular vectors and values of a long prompt, l = m·p tokens, pooled to m.

    With T = left·diag(singular_values), ``[l, r]``, and C = pool(T), ``[m, r]``::

        gram:    P' = C·(I + (c/l)·TᵀT)·right
        sketch:  P' = C·right + pool(sketch(T))·sketch_right

    Nothing of size l·l or l·d is formed. The arguments are those of
    :class:`ept_fast.FusedEPTPrompt`.
    """

    config_class: ClassVar[type[PromptConfig]] = LAMPConfig
    groups: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "prompt": ("left", "singular_values", "right"),
        "spaces": ("product_scale", "sketch_right"),
    }

    config: LAMPConfig
    left: nn.Parameter
    singular_values: nn.Parameter
    right: nn.Parameter
    product_scale: nn.Parameter | None
    sketch_right: nn.Parameter | None

    @classmethod
    def shapes(cls, config: LAMPConfig) -> dict[str, tuple[int, ...]]:
        """The tensors of a single prompt of these sizes, by name."""
        length, r, d = config.initial_rows, config.prompt_rank, config.hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            "left": (length, r),
            "singular_values": (r,),
            "right": (r, d),
        }
        if config.product == "gram":
            return {**shapes, "product_scale": (1,)}
        return {**shapes, "sketch_right": (config.sketch_size, d)}

    @classmethod
    def constants(cls, config: LAMPConfig) -> dict[str, Tensor]:
        """Two count-sketch matrices ``[2, r, R₂]`` of the sketch: one of ±1 in every row."""
        if config.product == "gram":
            return {}
        draw = torch.Generator().manual_seed(config.seed)
        size = (2, config.prompt_rank, 1)
        place = torch.randint(config.sketch_size, size, generator=draw)
        sign = torch.randint(2, size, generator=draw) * 2.0 - 1
        return {"hashes": torch.zeros(*size[:2], config.sketch_size).scatter_(2, place, sign)}

    def initial(self, rows: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """The truncated SVD of the long prompt; the interaction starts at zero."""
        c = self.config
        given = repeated(rows, c.initial_rows).double()
        left, singular, right = torch.linalg.svd(given, full_matrices=False)
        r = c.prompt_rank
        tensors = {"left": left[:, :r], "singular_values": singular[:r], "right": right[:r]}
        tensors = {name: value.float() for name, value in tensors.items()}
        name = "product_scale" if c.product == "gram" else "sketch_right"
        return {**tensors, name: torch.zeros(self.shapes(c)[name])}

    def formula(self, t: Mapping[str, Tensor]) -> Tensor:
        """P′ in the factored algebra."""
        m = self.config.num_virtual_tokens
        rows = t["left"] * t["singular_values"].unsqueeze(-2)  # T [(T,) l, r]
        pooled = _pool(rows, m)
        if self.config.product == "gram":
            gram = rows.mT @ rows / rows.shape[-2]
            pooled = pooled + t["product_scale"].unsqueeze(-1) * (pooled @ gram)
            mixed: Tensor = pooled @ t["right"]
            return mixed
        first, second = torch.fft.rfft(rows.unsqueeze(-3) @ t["hashes"]).unbind(-3)
        sketch = torch.fft.irfft(first * second, n=self.config.sketch_size)  # [(T,) l, R₂]
        return pooled @ t["right"] + _pool(sketch, m) @ t["sketch_right"]


def _pool(rows: Tensor, count: int) -> Tensor:
    """Means over windows of rows, ``[.., count, r]`` from ``[.., l, r]``."""
    return rows.view(*rows.shape[:-2], count, -1, rows.shape[-1]).mean(-2)
