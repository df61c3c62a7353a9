"""The one place where a backend is chosen: the first that serves the call, in one order for all
sizes, since a prompt's last bits should not depend on the size of the batch it is put before.

Triton goes before CUDA. On the one GPU that ran both it needed less time for a single prompt, and
it has nothing to build; the CUDA library's functions take less of the host (docs/cuda.md).

``reference`` is not among the backends: it is the definition under autograd and runs on request
only.

``EPT_FAST_BACKEND=name`` forces one for every call that names none. ``EPT_FAST_DISABLE=name,...``
switches backends off: a call then goes to the next in order, and one that names them is an error.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from types import ModuleType

import torch

from ept_fast.backends import cuda, eager, triton
from ept_fast.ops.types import Parameters, SpliceInputs

__all__ = ["REFERENCE", "describe", "first", "load", "select", "supporters"]

REFERENCE = "reference"
# Modules that import no compiler and no driver; what they need beyond that they load on first use.
_IN_ORDER: dict[str, ModuleType] = {"triton": triton, "cuda": cuda, "eager": eager}
_NAMES = (*_IN_ORDER, REFERENCE)
_OFF = "switched off by EPT_FAST_DISABLE"
_WHY_FIRST = {
    "triton": "less time on the GPU that ran both, nothing to build; "
    "cuda's functions take less of the host",
    "cuda": "triton does not work here",
    "eager": "neither triton nor cuda works here",
}

_logger = logging.getLogger("ept_fast")
_logged: set[str] = set()


def load(name: str) -> ModuleType:
    """The backend's module."""
    return _IN_ORDER[name]


def supporters() -> tuple[Callable[..., tuple[bool, str]], ...]:
    """What says whether a backend serves a call, in order."""
    return triton.supports, cuda.supports, eager.supports


def select(name: str | None, tensors: Parameters | SpliceInputs) -> str:
    """The name of the backend for these tensors.

    Args:
        name: forces one; else ``EPT_FAST_BACKEND`` does if it is set; else the first in order
            that supports the tensors.
        tensors: the call's.

    Raises:
        ValueError: an unknown name, there or in ``EPT_FAST_DISABLE``.
        RuntimeError: the forced backend does not support the tensors, or none does.
    """
    source = "backend"
    if name is None:
        name = os.environ.get("EPT_FAST_BACKEND") or None
        source = "EPT_FAST_BACKEND"
    if name is not None:
        if name not in _NAMES:
            raise ValueError(f"{source}: expected one of {', '.join(_NAMES)}, got {name!r}")
        if name != REFERENCE:
            off = name in _switched_off()
            ok, reason = (False, _OFF) if off else load(name).supports(tensors, by_name=True)
            if not ok:
                raise RuntimeError(f"{source}: {name!r} does not support this call: {reason}")
        return name
    reasons: list[str] = []
    switched_off = _switched_off()
    for candidate, module in _IN_ORDER.items():
        ok, reason = (False, _OFF) if candidate in switched_off else module.supports(tensors)
        if ok:
            if not torch.compiler.is_compiling():
                _log_once(candidate, reasons)
            return candidate
        reasons.append(f"{candidate}: {reason}")
    raise RuntimeError(f"backend: none supports this call ({'; '.join(reasons)})")


def describe() -> list[tuple[str, bool, str]]:
    """Every backend in order of choice: name, whether it works on this machine, why (not)."""
    switched_off = _switched_off()
    rows = [
        (name, *((False, _OFF) if name in switched_off else module.available()))
        for name, module in _IN_ORDER.items()
    ]
    return [*rows, (REFERENCE, True, "the definition under autograd, on request only")]


def first() -> tuple[str, str] | None:
    """The backend that a call gets which names none and which every backend serves, and why."""
    forced = os.environ.get("EPT_FAST_BACKEND")
    if forced:
        return forced, "EPT_FAST_BACKEND"
    # The interpreter serves no call that does not name Triton.
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    for name, works, _ in describe():
        if works and name in _WHY_FIRST and not (name == "triton" and interpreted):
            return name, _WHY_FIRST[name]
    return None


def _switched_off() -> list[str]:
    """The backends that ``EPT_FAST_DISABLE`` names."""
    named = os.environ.get("EPT_FAST_DISABLE")
    if not named:
        return []
    names = [name.strip() for name in named.split(",") if name.strip()]
    for name in names:
        if name not in _IN_ORDER:
            expected = ", ".join(_IN_ORDER)
            raise ValueError(f"EPT_FAST_DISABLE: expected names of {expected}, got {name!r}")
    return names


def _log_once(chosen: str, reasons: list[str]) -> None:
    message = f"backend {chosen}" + (f" ({'; '.join(reasons)})" if reasons else "")
    if message not in _logged:
        _logged.add(message)
        _logger.info(message)
