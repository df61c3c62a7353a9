"""The libraries of the ``train`` extra: whether they are there, and PEFT, which stays out."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

__all__ = ["MissingLibraryError", "require", "without_peft"]


class MissingLibraryError(ImportError):
    """A library of the ``train`` extra is not installed."""


def require(*names: str, install: str = '"ept-fast[train]"') -> None:
    """Raise MissingLibraryError, with what to install, unless these modules can be imported."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingLibraryError(f"{', '.join(missing)} not installed: pip install {install}")


@contextlib.contextmanager
def without_peft() -> Iterator[None]:
    """Import transformers' Trainer in a ``with`` block of this, and PEFT is not imported with it.

    If PEFT is installed, the Trainer's modules import two of its classes, to ask whether a model
    is one of them. PEFT imports bitsandbytes, which on some CPUs fetches native code from a hub as
    soon as it is imported. In the block these modules get a class that answers ``isinstance`` as
    PEFT's own does, and that finds PEFT once somebody has imported it. Any other name of PEFT
    is PEFT's own.
    """
    spec = None if "peft" in sys.modules else importlib.util.find_spec("peft")
    if spec is None:
        yield
        return
    stand_in: Any = importlib.util.module_from_spec(spec)
    for name in ("PeftModel", "PeftMixedModel"):
        setattr(stand_in, name, _ClassOfPeft(name, (), {}))

    def others(name: str) -> Any:
        del sys.modules["peft"]
        return getattr(importlib.import_module("peft"), name)

    stand_in.__getattr__ = others
    sys.modules["peft"] = stand_in
    try:
        yield
    finally:
        if sys.modules.get("peft") is stand_in:
            del sys.modules["peft"]


class _ClassOfPeft(type):
    """Of this name in PEFT. No object is one before PEFT is imported."""

    def __instancecheck__(cls, instance: object) -> bool:
        own = getattr(sys.modules.get("peft"), cls.__name__, None)
        return own is not None and isinstance(instance, own)
