"""The choice of a backend in a kernel repository, which has two of them and the definition."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from ept_fast.backends import eager, triton
from ept_fast.ops.types import Parameters, SpliceInputs

__all__ = ["REFERENCE", "load", "select", "supporters"]

REFERENCE = "reference"
_IN_ORDER: dict[str, ModuleType] = {"triton": triton, "eager": eager}
_NAMES = (*_IN_ORDER, REFERENCE)


def load(name: str) -> ModuleType:
    """The backend's module."""
    return _IN_ORDER[name]


def supporters() -> tuple[Callable[..., tuple[bool, str]], ...]:
    """What says whether a backend serves a call, in order."""
    return triton.supports, eager.supports


def select(name: str | None, tensors: Parameters | SpliceInputs) -> str:
    """The name of the backend for these tensors: ``name``, or the first that supports them.

    Raises:
        ValueError: an unknown name.
        RuntimeError: the named backend does not support the tensors, or none does.
    """
    if name is not None:
        if name not in _NAMES:
            raise ValueError(f"backend: expected one of {', '.join(_NAMES)}, got {name!r}")
        if name != REFERENCE:
            ok, reason = load(name).supports(tensors, by_name=True)
            if not ok:
                raise RuntimeError(f"backend: {name!r} does not support this call: {reason}")
        return name
    reasons = []
    for candidate, module in _IN_ORDER.items():
        ok, reason = module.supports(tensors)
        if ok:
            return candidate
        reasons.append(f"{candidate}: {reason}")
    raise RuntimeError(f"backend: none supports this call ({'; '.join(reasons)})")
