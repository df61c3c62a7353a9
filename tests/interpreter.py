"""Triton's interpreter in about a third of its time, for tests."""

from __future__ import annotations

import dataclasses
from typing import Any


def make_faster() -> None:
    """Leave out what it does over and over, once it is imported."""
    _patch_the_language_once()
    check_overflow(False)


def _patch_the_language_once() -> None:
    """Take about half the time.

    In every call of a device function it replaces all of ``triton.language`` again, as it has done
    for the kernel that calls. Only for Triton's own functions, which see another module, it has to
    be done: once, since it is not undone. Versions that call them otherwise stay as they are.
    """
    from triton.runtime import interpreter

    function = interpreter.InterpretedFunction
    if "_patch_lang" not in function.__call__.__code__.co_names:
        return
    patched: set[str] = set()

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        module = self.fn.__module__
        if module.startswith("triton.") and module not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(module)
        try:
            return self.rewrite()(*arguments, **named)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    function.__call__ = call


def check_overflow(on: bool) -> None:
    """Whether it looks for overflow in each sum and product of integers.

    That takes more than a third of its time. Only the largest sizes come anywhere near.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=on)
