"""Batches without needless padding: grouped by length, or packed; a pure function of the seed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ept_fast.training.config import MOST
from ept_fast.training.tokens import IGNORED

__all__ = [
    "Collator",
    "GroupedBatches",
    "PackedBatches",
    "PackingCollator",
    "first_fit",
    "length_batches",
]

_MEGABATCH = 50  # batches that are sorted by length together
_PACKED_TOGETHER = 1024  # segments that are sorted by length and packed together
_MOST_PACKED_EPOCHS = 1000  # each is packed once before training, to count its steps


@dataclass(frozen=True)
class Collator:
    """Pads the rows of a batch to its longest, on the tokenizer's side.

    Labels that are lists are padded with -100, on the right and to their own longest.

    Attributes:
        pad_token_id: filled into ``input_ids``; masked out.
        padding_side: ``"right"`` or ``"left"``.
    """

    pad_token_id: int = 0
    padding_side: str = "right"

    @classmethod
    def of(cls, tokenizer: Any, padding_side: str | None = None) -> Collator:
        """The collator that fits a tokenizer; one without a padding token pads with its end."""
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        pad = next(i for i in ids if i is not None)
        return cls(int(pad), padding_side or tokenizer.padding_side)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]

        def padded(name: str, filler: int, side: str) -> Tensor:
            ids = [torch.tensor(row[name]) for row in rows]
            return pad_sequence(ids, True, padding_value=filler, padding_side=side)

        fillers = {"input_ids": self.pad_token_id, "attention_mask": 0, "token_type_ids": 0}
        batch = {
            name: padded(name, filler, self.padding_side)
            for name, filler in fillers.items()
            if name in rows[0]
        }
        labels = [row["labels"] for row in rows if "labels" in row]
        if labels:
            lists = isinstance(labels[0], list)
            batch["labels"] = padded("labels", IGNORED, "right") if lists else torch.tensor(labels)
        return batch


@dataclass(frozen=True)
class PackingCollator:
    """Makes the tensors of packed rows, each of them a list of segments.

    ``input_ids``, ``attention_mask`` and ``labels`` are those of the segments, ``[N, L]``, padded
    on the right; ``pack_index`` ``[R, W]`` says which of the N * L tokens stands where, -1 for
    padding.
    """

    collator: Collator

    def __call__(self, packs: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Tensor]:
        batch = self.collator([segment for pack in packs for segment in pack])
        length = batch["input_ids"].shape[1]
        start = 0
        rows = []
        for pack in packs:
            row: list[int] = []
            for segment in pack:
                row += range(start, start + len(segment["input_ids"]))
                start += length
            rows.append(torch.tensor(row))
        return {**batch, "pack_index": pad_sequence(rows, True, -1)}


@dataclass(eq=False)
class GroupedBatches:
    """The batches of a whole run, as a batch sampler: a pure function of the seed.

    Every epoch is a fresh permutation of the rows. With grouping it is cut into runs of up to 50
    batches that are sorted by length and whose batches are then shuffled, so a batch pads
    little and the lengths still come in random order. Nothing depends on a random state outside, so
    a resumed run sees the same batches.

    The rows of an optimizer step can be divided into parts of equal size, give or take one row:
    ``parts`` of them follow each other (gradient accumulation), and each of those has a share for
    every process. Which rows a step sees depends on ``batch_size * parts * world_size`` alone.

    Attributes:
        lengths: tokens of each row.
        batch_size: rows of a part; one step of an epoch may have fewer.
        num_batches: optimizer steps of the whole run.
        seed: of the order.
        group: whether to group by length.
        parts: batches of an optimizer step.
        rank, world_size: which process this is, of how many.

    Raises:
        ValueError: fewer rows than parts and processes.
    """

    lengths: Sequence[int]
    batch_size: int
    num_batches: int
    seed: int
    _: KW_ONLY
    group: bool = True
    parts: int = 1
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        self.pieces = self.parts * self.world_size
        self.step_size = self.batch_size * self.pieces  # rows
        self._check()

    def _check(self) -> None:
        if len(self.lengths) < self.pieces:
            raise ValueError(
                f"gradient_accumulation_steps: expected at least a row for each of the "
                f"{self.pieces} batches of a step (of all processes), got {len(self.lengths)} rows"
            )

    def __len__(self) -> int:
        return self.num_batches * self.parts

    def __iter__(self) -> Iterator[list[Any]]:
        generator = torch.Generator().manual_seed(self.seed)
        left = self.num_batches
        while left:
            for batch in self._steps(generator)[:left]:
                left -= 1
                # Parts that follow each other, of equal size give or take one.
                cuts = [len(batch) * i // self.pieces for i in range(self.pieces + 1)]
                shares = [batch[a:b] for a, b in itertools.pairwise(cuts)]
                yield from shares[self.rank :: self.world_size]

    def steps_of(self, epochs: float) -> int:
        """Optimizer steps of that many epochs, at least 1.

        Raises:
            ValueError: more steps than a run can have.
        """
        part, whole = math.modf(epochs)
        each = len(self._steps(torch.Generator().manual_seed(self.seed)))  # of any order
        steps = int(whole) * each + math.ceil(part * each)
        if steps > MOST["max_steps"]:
            raise ValueError(
                f"epochs: expected at most {MOST['max_steps']} steps in all, "
                f"got {epochs} epochs of {each}"
            )
        return max(steps, 1)

    def _steps(self, generator: torch.Generator) -> list[list[Any]]:
        """The batches of an epoch, none of them too small for its parts."""
        batches = self._epoch(generator)
        small = next((b for b in batches if len(b) < self.pieces), None)
        if small is not None:
            place = batches.index(small)
            batches[place - 1] += batches.pop(place)
        return batches

    def _epoch(self, generator: torch.Generator) -> list[list[Any]]:
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        size = self.step_size
        if not self.group:
            return [order[i : i + size] for i in range(0, len(order), size)]
        batches = []
        # At least four runs an epoch, or a small task would give the same batches every time.
        run = size * max(1, min(_MEGABATCH, len(order) // (4 * size)))
        for start in range(0, len(order), run):
            part = sorted(order[start : start + run], key=lambda i: self.lengths[i])
            cut = [part[i : i + size] for i in range(0, len(part), size)]
            shuffle = torch.randperm(len(cut), generator=generator).tolist()
            batches += [cut[i] for i in shuffle]
        return batches


@dataclass(eq=False)
class PackedBatches(GroupedBatches):
    """Batches of packed rows: each row a list of segments of at most ``budget`` tokens together.

    Every epoch is a fresh permutation of the segments, cut into runs of up to 1,024 that are sorted
    by length and packed by :func:`first_fit`; the rows of all runs are then shuffled.

    Attributes:
        budget: tokens of a row, W at most; all others as in :class:`GroupedBatches`, for which a
            row is a segment here.

    Raises:
        ValueError: a segment of more tokens than the budget, or fewer rows than parts.
    """

    budget: int

    def _check(self) -> None:
        longest = max(self.lengths)
        if longest > self.budget:
            raise ValueError(
                f"pack_length: expected at least the longest row's {longest} tokens, "
                f"got {self.budget}"
            )
        # First fit leaves at most one row half empty, so there are never fewer than this.
        least = math.ceil(sum(self.lengths) / self.budget)
        if least < self.pieces:
            raise ValueError(
                f"gradient_accumulation_steps: expected at least a packed row for each of the "
                f"{self.pieces} batches of a step (of all processes), got {least} rows"
            )

    def steps_of(self, epochs: float) -> int:
        """Optimizer steps of that many epochs, at least 1: counted, as epochs differ in length.

        Raises:
            ValueError: too many epochs to count.
        """
        if epochs > _MOST_PACKED_EPOCHS:
            raise ValueError(
                f"epochs: expected at most {_MOST_PACKED_EPOCHS} with packing, whose epochs differ "
                f"in length (max_steps may be more), got {epochs}"
            )
        generator = torch.Generator().manual_seed(self.seed)
        steps, left = 0, epochs
        while left > 0:
            steps += math.ceil(min(left, 1.0) * len(self._steps(generator)))
            left -= 1
        return max(steps, 1)

    def _epoch(self, generator: torch.Generator) -> list[list[Any]]:
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        run = max(1, min(_PACKED_TOGETHER, -(-len(order) // 4)))
        rows: list[list[int]] = []
        for start in range(0, len(order), run):
            part = sorted(order[start : start + run], key=lambda i: -self.lengths[i])
            packs = first_fit([self.lengths[i] for i in part], self.budget)
            rows += [[part[i] for i in pack] for pack in packs]
        shuffle = torch.randperm(len(rows), generator=generator).tolist()
        size = self.step_size
        return [[rows[i] for i in shuffle[j : j + size]] for j in range(0, len(rows), size)]


def first_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Put each item, in the order given, into the first pack that has room; a new one if none has.

    Returns:
        The packs, lists of indices.
    """
    packs: list[list[int]] = []
    room: list[int] = []
    for index, length in enumerate(lengths):
        place = next((i for i, left in enumerate(room) if left >= length), len(packs))
        if place == len(packs):
            packs.append([])
            room.append(budget)
        packs[place].append(index)
        room[place] -= length
    return packs


def length_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Batches of rows of similar length, the longest first; for evaluation."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
