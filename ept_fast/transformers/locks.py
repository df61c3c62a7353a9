"""A lock that many readers share and a writer has alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

__all__ = ["ReadWriteLock"]


class ReadWriteLock:
    """Held by any number of readers, or by one writer; who waits to write goes before new readers.

    A thread that reads may read again, and one that writes may do both. A copy, also by pickle, is
    a new lock that nobody holds.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._readers = self._waiting = 0
        self._writer: int | None = None
        self._mine = threading.local()

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return type(self), ()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Wait for writers, and keep them out meanwhile."""
        outer = getattr(self._mine, "reads", 0)
        with self._changed:
            if not outer and self._writer != get_ident():
                self._changed.wait_for(lambda: self._writer is None and not self._waiting)
            self._readers += 1
        self._mine.reads = outer + 1
        try:
            yield
        finally:
            self._mine.reads = outer
            with self._changed:
                self._readers -= 1
                self._changed.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Wait for everyone else, and keep them out meanwhile.

        Raises:
            RuntimeError: the thread reads, and would wait for itself.
        """
        if self._writer == get_ident():
            yield
            return
        if getattr(self._mine, "reads", 0):
            raise RuntimeError("expected a change outside of forward and generate, got one within")
        with self._changed:
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: self._writer is None and not self._readers)
                self._writer = get_ident()
            finally:
                self._waiting -= 1
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._writer = None
                self._changed.notify_all()
