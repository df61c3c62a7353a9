"""Where prompts start: rows of the vocabulary, of a text or of texts, random or given ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ept_fast.config import PromptConfig, check_choice, check_count
from ept_fast.prompts.embedding import embedding_device, embedding_weight
from ept_fast.prompts.prototypes import HOWS, collect_prototypes, k_means, nearest_to
from ept_fast.storage.untrusted import shorten

__all__ = [
    "LongPrompt",
    "check_prototypes",
    "padded",
    "remaining_directions",
    "repeated",
    "token_rows",
]

_INITS = ("vocab", "text", "data", "random")
_NOTHING = 1e-12  # a singular value of rounding errors alone


class LongPrompt:
    """The rows that a prompt starts from: m for the short prompt, then those of the offset."""

    def __init__(
        self,
        config: PromptConfig,
        embedding: nn.Module | None,
        init: str | Tensor,
        text: str | Sequence[str] | None,
        tokenizer: Any,
        prototypes: str,
        num_tasks: int | None,
        generator: torch.Generator | None,
    ) -> None:
        self.config, self.layer, self.generator = config, embedding, generator
        self.init = init
        self.given: Tensor | None = None
        check_prototypes(init, prototypes)
        if isinstance(init, Tensor):
            self.given = self._check_rows(init, num_tasks)
            return
        check_choice("init", init, _INITS)
        if embedding is None:
            raise ValueError(f"init: expected a tensor if embedding is None, got {init!r}")
        if init == "text":
            self.given = self._embed(_text_ids(text, tokenizer))
        elif init == "data":
            self.given = self._of_data(text, tokenizer, prototypes)
        elif text is not None:
            raise ValueError(
                f'text: expected None unless init="text" or init="data", got {_shown(text)}'
            )

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

    def _of_data(self, texts: Any, tokenizer: Any, how: str) -> Tensor:
        """Prototypes of the texts' tokens and, if there are m, the directions that they leave."""
        c = self.config
        tokens = token_rows(texts, tokenizer, add_special_tokens=False)
        every = torch.tensor([i for row in tokens for i in row], dtype=torch.int64)
        ids, counts = torch.unique(every, return_counts=True)
        rows, weights = self._embed(ids), counts.float()
        count = c.num_virtual_tokens if c.rank else c.initial_rows
        if how == "kmeans":
            short, nearest = k_means(rows, weights, count)
        else:
            short = self._drawn(tokens, count, how)
            nearest = nearest_to(rows, short)
        if len(short) < count or not c.rank:
            return short
        left = rows - short[nearest]
        # As many rows as the long prompt leaves out on average, so that the scale is the same.
        weights *= (c.initial_rows - c.num_virtual_tokens) / weights.sum()
        return torch.cat([short, remaining_directions(left, weights, c.rank)])

    def _drawn(self, tokens: Sequence[Sequence[int]], count: int, how: str) -> Tensor:
        """Rows of single tokens or of windows of the texts, ``[count, d]``."""

        def states_of(texts: Tensor) -> tuple[Tensor, Tensor]:
            ids, mask = padded([tokens[i] for i in texts.tolist()])
            return self._embed(ids), mask

        lengths = torch.tensor([len(row) for row in tokens])
        return collect_prototypes(lengths, states_of, count, how, self.generator)

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


def check_prototypes(init: Any, how: object, layer: int | None = None) -> None:
    """Raise unless ``how`` and ``layer`` are what prototypes can be made by, for this ``init``."""
    check_choice("prototypes", how, HOWS)
    if layer is not None:
        check_count("prototype_layer", layer, 0)
    if isinstance(init, str) and init == "data":
        return
    if how != "kmeans":
        raise ValueError(f'prototypes: expected "kmeans" unless init="data", got {how!r}')
    if layer is not None:
        raise ValueError(f'prototype_layer: expected None unless init="data", got {layer}')


def remaining_directions(left: Tensor, weights: Tensor, count: int) -> Tensor:
    """The leading right-singular directions of weighted rows, times their singular values.

    Args:
        left: ``[N, d]`` float32.
        weights: ``[N]``, how often each row counts.
        count: how many are wanted.

    Returns:
        ``[at most count, d]``; directions in which nothing is left are left out.
    """
    scaled = left.double() * weights.double().sqrt().unsqueeze(1)
    values, directions = torch.linalg.eigh(scaled.T @ scaled)
    singular = values.clamp_min(0).sqrt().flip(0)[:count]
    kept = singular > max(1e-6 * float(singular[0]), _NOTHING)
    found: Tensor = (singular.unsqueeze(1) * directions.T.flip(0)[:count])[kept].float()
    return found


def repeated(rows: Tensor, count: int) -> Tensor:
    """The first ``count`` rows; if there are fewer, all of them over and over."""
    return rows.repeat(-(-count // len(rows)), 1)[:count]


def _text_ids(text: Any, tokenizer: Any) -> Tensor:
    if not isinstance(text, str) or tokenizer is None:
        raise ValueError(
            f'text, tokenizer: expected a string and a tokenizer for init="text", got text '
            f"{_shown(text)} and tokenizer {type(tokenizer).__name__}"
        )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) == 0:
        raise ValueError(f"text: expected at least one token, got {text!r}")
    return torch.tensor(ids, dtype=torch.int64)


def token_rows(texts: Any, tokenizer: Any, **options: Any) -> list[list[int]]:
    """The token ids of each text.

    Args:
        texts: a sequence of strings, as for ``init="data"``.
        tokenizer: for these.
        **options: of its call.

    Raises:
        ValueError: something else, or no token in any of them.
    """
    strings = isinstance(texts, Sequence) and all(isinstance(text, str) for text in texts)
    if isinstance(texts, str) or not strings or tokenizer is None:
        raise ValueError(
            f'text, tokenizer: expected a sequence of strings and a tokenizer for init="data", '
            f"got text {_shown(texts)} and tokenizer {type(tokenizer).__name__}"
        )
    rows: list[list[int]] = tokenizer(list(texts), **options)["input_ids"] if texts else []
    if not any(rows):
        raise ValueError(f"text: expected at least one token, got {_shown(texts)}")
    return rows


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids ``[n, S]`` with zeros behind the shorter rows, and their mask."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], dtype=torch.int64)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(longest) < lengths.unsqueeze(1)).long()


def _shown(text: Any) -> str:
    """What was given, short enough for a message."""
    if text is None or isinstance(text, str):
        return shorten(text)
    return f"{type(text).__name__} {shorten(text)}"
