"""Prototypes: a few rows that stand for the hidden states of many texts or images.

SPT's ways to start a prompt (arXiv 2402.02382), each in two steps. Which rows are wanted is drawn
from the lengths alone; only then are the hidden states asked for, and only of the texts drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ept_fast.config import check_choice, check_count

__all__ = ["HOWS", "KMEANS_ROWS", "collect_prototypes", "from_prototypes", "k_means", "nearest_to"]

HOWS = ("kmeans", "random", "mean", "max")
KMEANS_ROWS = 16_384  # that k-means sees of hidden states; of width 768, 48 MiB
_MOST_ROUNDS = 50  # of k-means
_BATCH = 32  # texts whose states are looked at at once


def from_prototypes(
    hidden_states: Tensor,
    attention_mask: Tensor,
    count: int,
    how: str = "kmeans",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Rows to start a prompt from, made of the hidden states of N texts (or images).

    Only real tokens count, wherever the padding is. Of a text with L of them, in their order:

    - ``"random"``: rows drawn from all tokens of all texts, none twice while there are enough;
    - ``"mean"``, ``"max"``: each text is cut into windows of max(1, L // (count - 1)) tokens (all L
      for a count of 1), the last one maybe shorter; windows are drawn from those of all texts, none
      twice while there are enough, and each gives the mean or the largest values of its tokens;
    - ``"kmeans"``: the means of ``count`` clusters (:func:`k_means`) of all tokens, or of
      ``KMEANS_ROWS`` = 16,384 drawn ones if there are more. It draws nothing otherwise.

    With fewer tokens or windows than ``count`` all of them are used before any is used again. With
    no more different rows than ``count``, k-means gives these rows, to the bit, and repeats them in
    their order.

    Args:
        hidden_states: ``[N, S, d]``, floating.
        attention_mask: ``[N, S]`` of 0 and 1.
        count: m, how many rows are wanted.
        how: ``"kmeans"``, ``"random"``, ``"mean"`` or ``"max"``.
        generator: a CPU generator for everything random; the global one by default.

    Returns:
        ``[count, d]``, float32 on the CPU, without a gradient.

    Raises:
        TypeError, ValueError: arguments that do not fit, by name; no real token at all.

    Example:
        >>> states, mask = torch.randn(8, 5, 16), torch.ones(8, 5)
        >>> from_prototypes(states, mask, 3, "random").shape
        torch.Size([3, 16])
    """
    for name, tensor in (("hidden_states", hidden_states), ("attention_mask", attention_mask)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if not hidden_states.is_floating_point():
        raise TypeError(f"hidden_states: expected a floating dtype, got {hidden_states.dtype}")
    if hidden_states.dim() != 3:
        raise ValueError(
            f"hidden_states: expected shape [N, S, d], got {list(hidden_states.shape)}"
        )
    if attention_mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"attention_mask: expected shape {list(hidden_states.shape[:2])} to match "
            f"hidden_states {list(hidden_states.shape)}, got {list(attention_mask.shape)}"
        )
    mask = attention_mask != 0
    return collect_prototypes(
        mask.sum(1).cpu(), lambda at: (hidden_states[at], mask[at]), count, how, generator
    )


def collect_prototypes(
    lengths: Tensor,
    states_of: Callable[[Tensor], tuple[Tensor, Tensor]],
    count: int,
    how: str,
    generator: torch.Generator | None,
) -> Tensor:
    """As :func:`from_prototypes`, of states that are computed when they are asked for.

    Args:
        lengths: ``[N]`` int64 on the CPU, the real tokens of each text.
        states_of: gives hidden states ``[n, S, d]`` and mask ``[n, S]`` of the texts with these
            numbers, ``[n]`` with n <= 32. It is not asked for texts that nothing was drawn of.
        count, how, generator: as there.
    """
    check_count("count", count, 1)
    check_choice("how", how, HOWS)
    drawn = _draw(lengths, count, how, generator)
    order = drawn.text.argsort(stable=True)
    parts = []
    for batch in torch.unique(drawn.text).split(_BATCH):
        wanted = order[(drawn.text[order] >= batch[0]) & (drawn.text[order] <= batch[-1])]
        spans = Spans(
            torch.searchsorted(batch, drawn.text[wanted]), drawn.start[wanted], drawn.stop[wanted]
        )
        parts.append(_pooled(*states_of(batch), spans, how))
    rows = torch.cat(parts)[order.argsort()]
    if how == "kmeans":
        rows, _ = k_means(rows, torch.ones(len(rows)), count)
    return rows[torch.arange(count) % len(rows)]


class Spans(NamedTuple):
    """Runs of real tokens, ``[K]`` each: number of the text, first rank, rank behind the last."""

    text: Tensor
    start: Tensor
    stop: Tensor


def _draw(lengths: Tensor, count: int, how: str, generator: torch.Generator | None) -> Spans:
    """The runs to make rows of: single tokens, or windows."""
    windowed = how in ("mean", "max")
    sizes = (lengths // max(count - 1, 1)).clamp_min(1) if windowed else torch.ones_like(lengths)
    ends = (-(-lengths // sizes)).cumsum(0)  # of the runs of each text, in a row of all runs
    total = int(ends[-1]) if len(ends) else 0
    if total == 0:
        raise ValueError("attention_mask: expected at least one real token, got none")
    if how == "kmeans" and total <= KMEANS_ROWS:
        drawn = torch.arange(total)
    else:
        wanted = KMEANS_ROWS if how == "kmeans" else count
        rounds = -(-wanted // total)
        orders = [torch.randperm(total, generator=generator) for _ in range(rounds)]
        drawn = torch.cat(orders)[:wanted]
    text = torch.searchsorted(ends, drawn, right=True)
    number = drawn - torch.where(text > 0, ends[text - 1], 0)
    start = number * sizes[text]
    return Spans(text, start, torch.minimum(start + sizes[text], lengths[text]))


@torch.no_grad()
def _pooled(states: Tensor, mask: Tensor, spans: Spans, how: str) -> Tensor:
    """A float32 row on the CPU for each run: its mean, or its largest values, ``[K, d]``."""
    # The columns of each text's real tokens, by rank; padding comes last.
    columns = (mask == 0).to(torch.int8).argsort(dim=1, stable=True)
    text, start, stop = (part.to(states.device) for part in spans)
    longest = int((spans.stop - spans.start).max())
    ranks = start.unsqueeze(1) + torch.arange(longest, device=states.device)  # [K, W]
    inside = (ranks < stop.unsqueeze(1)).unsqueeze(2)
    at = columns[text.unsqueeze(1), ranks.clamp_max(mask.shape[1] - 1)]
    rows = states[text.unsqueeze(1), at].float()  # [K, W, d]
    if how == "max":
        return rows.masked_fill(~inside, -torch.inf).amax(1).cpu()
    if longest == 1:
        return rows[:, 0].cpu()
    return (rows.masked_fill(~inside, 0).sum(1) / (stop - start).unsqueeze(1)).cpu()


def k_means(rows: Tensor, weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
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
        before, nearest = nearest, nearest_to(rows, means)
        if torch.equal(before, nearest):
            break
    return means, nearest


def nearest_to(rows: Tensor, points: Tensor) -> Tensor:
    """For each row the number of the nearest point, ``[N]``."""
    nearest: Tensor = (points.square().sum(1) - 2 * (rows @ points.T)).argmin(1)
    return nearest


def _squares(rows: Tensor, point: Tensor) -> Tensor:
    """Squared distances ``[N]`` of rows to a point; zero from a row that equals it."""
    squares: Tensor = (rows - point).square().sum(1)
    return squares
