"""Requests of any adapters, batched by one thread that owns the model."""

from __future__ import annotations

import copy
import logging
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from examples.server.engine import Engine
from examples.server.text_stream import TextStream

__all__ = ["End", "Refused", "Ticket", "Worker"]

_log = logging.getLogger("examples.server")


class Refused(Exception):
    """A request that is not taken now; it may be sent again later."""


@dataclass(frozen=True)
class End:
    """The last event of a ticket.

    Attributes:
        reason: ``"stop"`` at a token that ends answers, ``"length"`` at the most new tokens,
            ``"cancelled"`` or ``"error"``.
        new_tokens: of the answer, without the token that ended it.
        error: the name of what was raised.
    """

    reason: str
    new_tokens: int = 0
    error: str = ""


@dataclass(eq=False)
class Ticket:
    """A request that was taken. Each gets pieces of text, and then exactly one end.

    Attributes:
        adapter: name of the task.
        ids: token ids of the text.
        max_new_tokens: of the answer.
        emit: called with each piece and with the :class:`End`, mostly by the worker's thread; must
            not block or raise.
        cancelled: nobody waits for the answer any more.
    """

    adapter: str
    ids: list[int]
    max_new_tokens: int
    emit: Callable[[str | End], None]
    cancelled: bool = False
    arrived: float = field(default_factory=time.monotonic)


class Worker:
    """A queue, and the thread that takes batches from it and generates.

    The oldest request is always in the next batch; others join it in their order, as far as they
    fit. What is wrong with one batch ends its own requests and no others.

    Args:
        engine: what to generate with.
        max_batch: the most rows of a batch.
        max_wait: seconds that a request waits, from its arrival, for others to join it.
        queue: the most requests that wait, those of the running batch not counted.
        mixed: whether rows of a batch may belong to different adapters.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_batch: int = 16,
        max_wait: float = 0.005,
        queue: int = 64,
        mixed: bool = True,
    ) -> None:
        self.engine = engine
        self.max_batch, self.max_wait, self.queue, self.mixed = max_batch, max_wait, queue, mixed
        self.refusing = False
        # For decoding in the thread; the engine's own one encodes elsewhere at the same time.
        self._tokenizer = copy.deepcopy(engine.tokenizer)
        self._waiting: deque[Ticket] = deque()
        self._running = 0
        self._counts: Counter[str] = Counter()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="generate", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, ticket: Ticket) -> None:
        """Put a ticket in the queue.

        Raises:
            Refused: the queue is full, or the server is shutting down.
        """
        with self._changed:
            if self.refusing:
                raise Refused("the server is shutting down")
            if len(self._waiting) >= self.queue:
                raise Refused(f"the queue is full: {self.queue} requests are waiting")
            self._waiting.append(ticket)
            self._counts["accepted"] += 1
            self._changed.notify()

    def cancel(self, ticket: Ticket) -> None:
        """End a ticket: at once where it waits, with the next token where it runs."""
        ticket.cancelled = True
        with self._changed:
            if ticket not in self._waiting:
                return
            self._waiting.remove(ticket)
        self._end(ticket, End("cancelled"))

    def refuse(self) -> None:
        """Take no more tickets. Only sets a flag, so that a signal handler may call it."""
        self.refusing = True

    def close(self, timeout: float | None = None) -> None:
        """Take no more tickets, answer those taken, end the thread.

        Args:
            timeout: seconds after which the thread is left behind; it does not keep the process.
        """
        with self._changed:
            self.refusing = True
            self._changed.notify()
        self._thread.join(timeout)

    @property
    def idle(self) -> bool:
        """Whether no ticket waits or runs."""
        with self._changed:
            return not self._waiting and not self._running

    def counts(self) -> dict[str, int]:
        """Requests ``waiting`` and ``running`` now; since the start those ``accepted`` and how they
        ended; ``batches``, their ``rows``, and ``mixed`` batches of several adapters."""
        names = ("accepted", "answered", "cancelled", "failed", "batches", "rows", "mixed")
        with self._changed:
            state = {"waiting": len(self._waiting), "running": self._running}
            return state | {name: self._counts[name] for name in names}

    def _run(self) -> None:
        while tickets := self._take():
            rows = [_Row(ticket, TextStream(self._tokenizer), self._end) for ticket in tickets]
            try:
                self._generate(rows)
                for row in rows:
                    row.end(End("length"))  # where a setting of the model's own ended it
            except BaseException as error:  # a panic in the tokenizer's Rust is no Exception
                # Without the message, which may hold a part of a text.
                stack = "".join(traceback.format_tb(error.__traceback__))
                name = type(error).__name__
                _log.error("%s in a batch of %d rows\n%s", name, len(rows), stack)
                for row in rows:
                    row.end(End("error", error=name))
            with self._changed:
                self._running = 0

    def _take(self) -> list[Ticket]:
        """The next batch; waits for it. Empty when there will be none."""
        with self._changed:
            while True:
                if not self._waiting:
                    if self.refusing:
                        return []
                    self._changed.wait()
                    continue
                left = self._waiting[0].arrived + self.max_wait - time.monotonic()
                if len(self._waiting) >= self.max_batch or self.refusing or left <= 0:
                    break
                self._changed.wait(left)
            batch = self._fitting()
            for ticket in batch:
                self._waiting.remove(ticket)
            self._running = len(batch)
            adapters = {ticket.adapter for ticket in batch}
            self._counts.update(batches=1, rows=len(batch), mixed=int(len(adapters) > 1))
            return batch

    def _fitting(self) -> list[Ticket]:
        """The oldest ticket and those behind it that fit beside it."""
        batch: list[Ticket] = []
        text = new = 0
        for ticket in self._waiting:
            wide, long = max(text, len(ticket.ids)), max(new, ticket.max_new_tokens)
            fits = self.engine.columns is None or wide + long <= self.engine.columns
            if fits and (self.mixed or ticket.adapter == self._waiting[0].adapter):
                batch.append(ticket)
                text, new = wide, long
            if len(batch) == self.max_batch:
                break
        return batch

    def _generate(self, rows: Sequence[_Row]) -> None:
        engine = self.engine
        tickets = [row.ticket for row in rows]
        width = max(len(ticket.ids) for ticket in tickets)
        gaps = [width - len(ticket.ids) for ticket in tickets]
        ids = [[engine.pad] * gap + t.ids for gap, t in zip(gaps, tickets, strict=True)]
        mask = [[0] * gap + [1] * (width - gap) for gap in gaps]
        device = engine.bank.bank.prompt.device
        batch = _Batch(rows, engine.stops, width)
        engine.bank.generate(
            torch.tensor(ids, device=device),
            torch.tensor(mask, device=device),
            tasks=[ticket.adapter for ticket in tickets],
            do_sample=False,
            num_beams=1,
            max_new_tokens=max(ticket.max_new_tokens for ticket in tickets),
            eos_token_id=sorted(engine.stops) or None,
            pad_token_id=engine.pad,
            streamer=batch,
            stopping_criteria=StoppingCriteriaList([batch]),
        )

    def _end(self, ticket: Ticket, end: End) -> None:
        kind = {"cancelled": "cancelled", "error": "failed"}.get(end.reason, "answered")
        with self._changed:
            self._counts[kind] += 1
        ticket.emit(end)


class _Row:
    """A ticket in a batch."""

    def __init__(
        self, ticket: Ticket, pieces: TextStream, ended: Callable[[Ticket, End], None]
    ) -> None:
        self.ticket, self.done = ticket, False
        self._stream, self._ended = pieces, ended

    def add(self, token: int) -> None:
        if piece := self._stream.add(token):
            self.ticket.emit(piece)
        if len(self._stream.ids) >= self.ticket.max_new_tokens:
            self.end(End("length"))

    def end(self, end: End) -> None:
        """End the ticket, unless it has ended."""
        if self.done:
            return
        self.done = True
        if end.reason in ("stop", "length") and (piece := self._stream.end()):
            self.ticket.emit(piece)
        self._ended(self.ticket, replace(end, new_tokens=len(self._stream.ids)))


class _Batch(BaseStreamer, StoppingCriteria):
    """What ``generate`` hands the tokens of each step to, and asks which rows are to end."""

    def __init__(self, rows: Sequence[_Row], stops: frozenset[int], width: int) -> None:
        self._rows, self._stops, self._width = rows, stops, width
        self._texts_came = False

    def put(self, value: Tensor) -> None:
        """The texts ``[B, S]`` first, then a token for each row, ``[B]``."""
        if not self._texts_came:
            self._texts_came = True
            return
        for row, token in zip(self._rows, value.tolist(), strict=True):
            if row.done:
                continue
            if row.ticket.cancelled:
                row.end(End("cancelled"))
            elif token in self._stops:
                row.end(End("stop"))
            else:
                row.add(token)

    def end(self) -> None:
        """All rows have ended, or the caller ends them."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Whether each row ends with the token that it just got, ``[B]`` bools."""
        new = input_ids.shape[1] - self._width
        ended = [row.done or new >= row.ticket.max_new_tokens for row in self._rows]
        return torch.tensor(ended, device=input_ids.device)
