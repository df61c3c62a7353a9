"""Where prompts start: rows of the vocabulary, of a text or of texts, random or given ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ept_fast.config import PromptConfig, check_choice
from ept_fast.prompts.embedding import embedding_device, embedding_weight
from ept_fast.storage.untrusted import shorten

__all__ = ["LongPrompt", "prototypes", "remaining_directions", "repeated"]

_INITS = ("vocab", "text", "data", "random")
_MOST_ROUNDS = 50  # of k-means
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
        num_tasks: int | None,
        generator: torch.Generator | None,
    ) -> None:
        self.config, self.layer, self.generator = config, embedding, generator
        self.init = init
        self.given: Tensor | None = None
        if isinstance(init, Tensor):
            self.given = self._check_rows(init, num_tasks)
            return
        check_choice("init", init, _INITS)
        if embedding is None:
            raise ValueError(f"init: expected a tensor if embedding is None, got {init!r}")
        if init == "text":
            self.given = self._embed(_text_ids(text, tokenizer))
        elif init == "data":
            self.given = self._of_data(*_token_counts(text, tokenizer))
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

    def _of_data(self, ids: Tensor, counts: Tensor) -> Tensor:
        """Prototypes of the texts' tokens and, if there are m, the directions that they leave."""
        c = self.config
        rows, weights = self._embed(ids), counts.float()
        short, nearest = prototypes(rows, weights, c.num_virtual_tokens)
        if len(short) < c.num_virtual_tokens or not c.rank:
            return short
        left = rows - short[nearest]
        # As many rows as the long prompt leaves out on average, so that the scale is the same.
        weights *= (c.initial_rows - c.num_virtual_tokens) / weights.sum()
        return torch.cat([short, remaining_directions(left, weights, c.rank)])

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


def prototypes(rows: Tensor, weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The means of k-means clusters, without anything random.

    The first mean starts at the row nearest to the weighted mean of all; each further one at the
    row with the largest weighted squared distance to those before it. Ties go to the first row.

    Args:
        rows: ``[N, d]`` float32.
        weights: ``[N]``, how often each row counts; > 0.
        count: how many means are wanted.

    Returns:
        The means ``[min(count, distinct rows), d]``, in the order in which they were started, and
        for each row the number of its mean, ``[N]``.
    """
    weights = weights.unsqueeze(1)
    mean = (weights * rows).sum(0) / weights.sum()
    starts = [int(_squares(rows, mean).argmin())]
    distance = _squares(rows, rows[starts[0]])
    nearest = torch.zeros(len(rows), dtype=torch.int64)
    while len(starts) < count and float(distance.max()) > 0:
        starts.append(int((weights[:, 0] * distance).argmax()))
        new = _squares(rows, rows[starts[-1]])
        nearest[new < distance] = len(starts) - 1
        distance = torch.minimum(distance, new)
    means = rows[starts]
    for _ in range(_MOST_ROUNDS):
        # As a step from the old mean: the mean of equal rows is then that row, to the bit.
        steps = torch.zeros_like(means).index_add_(0, nearest, weights * (rows - means[nearest]))
        total = torch.zeros(len(means), 1).index_add_(0, nearest, weights)
        means = means + steps / total.clamp_min(float(weights.min()))
        before, nearest = nearest, _nearest(rows, means)
        if torch.equal(before, nearest):
            break
    return means, nearest


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


def _squares(rows: Tensor, point: Tensor) -> Tensor:
    """Squared distances ``[N]`` of rows to a point; zero from a row that equals it."""
    squares: Tensor = (rows - point).square().sum(1)
    return squares


def _nearest(rows: Tensor, points: Tensor) -> Tensor:
    """For each row the number of the nearest point, ``[N]``."""
    nearest: Tensor = (points.square().sum(1) - 2 * (rows @ points.T)).argmin(1)
    return nearest


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


def _token_counts(texts: Any, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """The different tokens of the texts, ``[N]`` int64, and how often each occurs, ``[N]``."""
    strings = isinstance(texts, Sequence) and all(isinstance(text, str) for text in texts)
    if isinstance(texts, str) or not strings or tokenizer is None:
        raise ValueError(
            f'text, tokenizer: expected a sequence of strings and a tokenizer for init="data", '
            f"got text {_shown(texts)} and tokenizer {type(tokenizer).__name__}"
        )
    rows = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    ids = torch.tensor([i for row in rows for i in row], dtype=torch.int64)
    if len(ids) == 0:
        raise ValueError(f"text: expected at least one token, got {_shown(texts)}")
    found: tuple[Tensor, Tensor] = torch.unique(ids, return_counts=True)
    return found


def _shown(text: Any) -> str:
    """What was given, short enough for a message."""
    if text is None or isinstance(text, str):
        return shorten(text)
    return f"{type(text).__name__} {shorten(text)}"
