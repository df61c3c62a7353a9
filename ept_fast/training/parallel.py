"""The processes of a run started by ``torchrun``; if there is only one, nothing happens here."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

__all__ = [
    "agreed",
    "gather",
    "is_main",
    "on_main",
    "rank",
    "session",
    "share",
    "total",
    "world_size",
]

V = TypeVar("V")


def world_size() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that writes files and speaks."""
    return rank() == 0


def share(items: Sequence[V]) -> Sequence[V]:
    """The part of the items that is this process's to do."""
    return items[rank() :: world_size()]


def gather(found: dict[int, V]) -> dict[int, V]:
    """What all processes found, by number, in order of the numbers."""
    parts: list[dict[int, V]] = [found]
    if world_size() > 1:
        parts = [{} for _ in range(world_size())]
        dist.all_gather_object(parts, found)
    whole = {number: value for part in parts for number, value in part.items()}
    return dict(sorted(whole.items()))


def total(number: int) -> int:
    """The sum over all processes."""
    return sum(gather({rank(): number}).values())


def agreed(call: Callable[[], V]) -> V:
    """What a call gives on this process, once it has succeeded on every one.

    If it fails, every process raises the error of the first that failed, and none waits for
    another in vain. The copies have an attribute ``told_by``, the number of that process, so that
    it alone need say it.
    """
    if world_size() == 1:
        return call()
    found: list[V] = []
    failed: dict[int, Any] = {}
    try:
        found.append(call())
    except Exception as error:
        failed[rank()] = error
    everywhere = gather(failed)
    if not everywhere:
        return found[0]
    first = min(everywhere)
    if first in failed:
        raise failed[first]
    everywhere[first].told_by = first
    raise everywhere[first]


def on_main(call: Callable[[], V]) -> V:
    """What a call gives on the main process, or the error that it raises there, on every process.

    Files that one process writes are looked at like this: another one may come too late to see
    them as they were, or too early.
    """
    found = agreed(lambda: {0: call()} if is_main() else {})
    return gather(found)[0]


@contextlib.contextmanager
def session(cpu: bool) -> Iterator[None]:
    """Join the other processes that ``torchrun`` started, and part from them at the end."""
    alone = int(os.environ.get("WORLD_SIZE", "1")) <= 1
    if alone or dist.is_initialized():
        yield
        return
    from accelerate import PartialState  # type: ignore[import-untyped]

    PartialState(cpu=cpu)
    try:
        yield
    finally:
        dist.destroy_process_group()
        PartialState._reset_state()
