"""Where prompts start: rows of the vocabulary, of a text, random ones or given ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ept_fast.config import PromptConfig, check_choice
from ept_fast.prompts.embedding import embedding_device, embedding_weight

__all__ = ["LongPrompt"]

_INITS = ("vocab", "text", "random")


class LongPrompt:
    """The rows that a prompt starts from: m for the short prompt, then those of the offset."""

    def __init__(
        self,
        config: PromptConfig,
        embedding: nn.Module | None,
        init: str | Tensor,
        text: str | None,
        tokenizer: Any,
        num_tasks: int | None,
        generator: torch.Generator | None,
    ) -> None:
        self.config, self.layer, self.generator = config, embedding, generator
        self.init = init
        self.given: Tensor | None = None
        if isinstance(init, Tensor):
            self.given = self._check_rows(init, num_tasks)
        else:
            check_choice("init", init, _INITS)
            if embedding is None:
                raise ValueError(f"init: expected a tensor if embedding is None, got {init!r}")
            if init != "text" and text is not None:
                raise ValueError(f'text: expected None unless init="text", got {text!r}')
            if init == "text":
                self.given = self._embed(_text_ids(text, tokenizer))

    @property
    def embedding(self) -> nn.Module:
        if self.layer is None:
            c = self.config
            raise ValueError(
                f"init: expected at least num_virtual_tokens + rank = "
                f"{c.num_virtual_tokens + c.rank} rows if embedding is None, got fewer"
            )
        return self.layer

    @property
    def device(self) -> torch.device:
        """Where the parameters go."""
        if self.layer is not None:
            return embedding_device(self.layer)
        return self.init.device if isinstance(self.init, Tensor) else torch.device("cpu")

    def of_task(self, task: int) -> Tensor:
        """Float32 rows on the CPU, ``[at least m + r, d]`` (m if r is 0)."""
        c = self.config
        short = c.num_virtual_tokens
        if self.given is None:
            return self._sample(c.initial_rows)
        rows = self.given[task] if self.given.dim() == 3 else self.given
        if self.init == "text":
            rows = rows.repeat(-(-short // len(rows)), 1) if len(rows) < short else rows
        missing = short + c.rank - len(rows)
        return torch.cat([rows, self._sample(missing)]) if missing > 0 else rows

    def _sample(self, count: int) -> Tensor:
        size = embedding_weight(self.embedding).shape[0]
        order = torch.randperm(size, generator=self.generator)
        padding = getattr(self.embedding, "padding_idx", None)
        if padding is not None and size > 1:
            order = order[order != padding]
        if self.init == "random":
            deviation = self._embed(order[:4096]).std(correction=0)  # a sample, not the first rows
            return torch.randn(count, self.config.hidden_size, generator=self.generator) * deviation
        return self._embed(order.repeat(-(-count // len(order)))[:count])

    @torch.no_grad()
    def _embed(self, ids: Tensor) -> Tensor:
        # the layer itself: it may scale its rows
        rows: Tensor = self.embedding(ids.to(self.device))
        return rows.detach().float().cpu()

    def _check_rows(self, rows: Tensor, num_tasks: int | None) -> Tensor:
        c = self.config
        if not rows.is_floating_point():
            raise TypeError(f"init: expected a floating tensor, got {rows.dtype}")
        if not bool(torch.isfinite(rows).all()):
            raise ValueError("init: expected finite rows, got NaN or infinity")
        axes = 3 if num_tasks is not None and rows.dim() == 3 else 2
        fits = rows.dim() == axes and rows.shape[-1] == c.hidden_size
        fits = fits and rows.shape[-2] >= c.num_virtual_tokens
        if not fits or (axes == 3 and rows.shape[0] != num_tasks):
            lead = "" if num_tasks is None else f"({num_tasks},) "
            raise ValueError(
                f"init: expected shape [{lead}at least {c.num_virtual_tokens}, {c.hidden_size}], "
                f"got {tuple(rows.shape)}"
            )
        return rows.detach().float().cpu()


def _text_ids(text: str | None, tokenizer: Any) -> Tensor:
    if not isinstance(text, str) or tokenizer is None:
        raise ValueError(
            f'text, tokenizer: expected both for init="text", got text {text!r} and '
            f"tokenizer {type(tokenizer).__name__}"
        )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) == 0:
        raise ValueError(f"text: expected at least one token, got {text!r}")
    return torch.tensor(ids, dtype=torch.int64)
