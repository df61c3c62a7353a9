"""Whether the libraries of the ``train`` extra are there."""

from __future__ import annotations

import importlib.util

__all__ = ["MissingLibraryError", "require"]


class MissingLibraryError(ImportError):
    """A library of the ``train`` extra is not installed."""


def require(*names: str) -> None:
    """Raise MissingLibraryError, with what to install, unless these modules can be imported."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingLibraryError(
            f'{", ".join(missing)} not installed: pip install "ept-fast[train]"'
        )
