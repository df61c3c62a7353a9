"""Finds the CUDA library, builds it if there is none, and loads it into torch.

It lies in the package if the package was built with it, else in a cache of this user.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import torch

from ept_fast.backends.cuda import build
from ept_fast.backends.cuda.build import ExtensionError

__all__ = ["ExtensionError", "State", "load", "problem", "state"]

_PACKAGED = Path(__file__).resolve().parent / build.LIBRARY

_SUBJECT = "the CUDA library"

_logger = logging.getLogger("ept_fast")
_lock = threading.Lock()
_loaded: State | None = None
_failure = ""


@dataclass(frozen=True)
class State:
    """The library as it is on this machine.

    Attributes:
        path: the file; None if it is not built.
        architectures: those it is built for, or would be.
        text: where it lies, how it would be built, or why it cannot be.
        usable: whether it is built or can be.
    """

    path: Path | None
    architectures: tuple[str, ...]
    text: str
    usable: bool


def state() -> State:
    """What there is, without building or loading anything."""
    if _loaded is not None:
        return _loaded
    if _failure:
        return State(None, (), _failure, usable=False)
    return _find()


def _find() -> State:
    packaged, stale = _packaged()
    if packaged is not None:
        return packaged
    try:
        tools = build.find_tools()
        wanted = _wanted()
        if not wanted:
            text = f"would be built on first use on a GPU, with nvcc {tools.nvcc_version}"
            return State(None, (), f"{_SUBJECT} {text}{stale}", usable=True)
        architectures = build.known_architectures(wanted, tools)
        path = build.cached(architectures, tools)
        built = build.is_built(path)
    except ExtensionError as error:
        return State(None, (), f"{_SUBJECT} cannot be built: {error}{stale}", usable=False)
    names = _listed(architectures)
    if built:
        text = f"{_SUBJECT} is built for {names}, in {path.parent}"
        return State(path, architectures, text, usable=True)
    text = f"would be built for {names} on first use, with nvcc {tools.nvcc_version}"
    return State(None, architectures, f"{_SUBJECT} {text}{stale}", usable=True)


def problem(capability: int, prepare: bool) -> str:
    """Why the library cannot serve a GPU of this capability (90 for sm_90); empty if it can.

    Args:
        capability: of the GPU.
        prepare: build and load it now if it is not, and call a failure of that a problem.
    """
    global _failure
    if _loaded is None and prepare and not _failure:
        try:
            load()
        except ExtensionError as error:
            _logger.warning("without the CUDA backend: %s", error)
            _failure = str(error).partition("\n")[0].rstrip(":")
    now = state()
    if not now.usable:
        return now.text
    if now.architectures and not build.covers(now.architectures, capability):
        return f"{_SUBJECT} is for {_listed(now.architectures)}, the GPU is sm_{capability}"
    return ""


def load() -> None:
    """Make the library's operators known to torch, once per process; build it if needed.

    Raises:
        ExtensionError: it can neither be found nor built, or does not load.
    """
    global _loaded
    with _lock:
        if _loaded is None:
            _loaded = _load()


def _load() -> State:
    packaged, _ = _packaged()
    path = _built() if packaged is None or packaged.path is None else packaged.path
    try:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    except OSError as error:
        raise ExtensionError(f"{_SUBJECT} {path} does not load: {error}") from error
    record = build.read_record(path)
    architectures = () if record is None else record.architectures
    text = f"{_SUBJECT} is built for {_listed(architectures)}, loaded from {path.parent}"
    return State(path, architectures, text, usable=True)


def _built() -> Path:
    wanted = _wanted()
    if not wanted:
        raise ExtensionError(
            f"{_SUBJECT} is not built: there is no GPU, and {build.ENVIRONMENT} names no "
            "architecture"
        )
    return build.build(wanted)


def _packaged() -> tuple[State | None, str]:
    """The library in the package, or else why it is passed over, if there is one."""
    if not _PACKAGED.exists():
        return None, ""
    record = build.read_record(_PACKAGED)
    if record is None:
        return None, "; the one in the package does not say what it was built from"
    sources = build.sources_hash()
    if sources and record.sources != sources:
        return None, "; the one in the package was built from other sources"
    names = _listed(record.architectures)
    missing = [c for c in _capabilities() if not build.covers(record.architectures, c)]
    if missing:
        return None, f"; the one in the package is for {names}, the GPU is sm_{missing[0]}"
    text = f"{_SUBJECT} is built for {names}, in the package"
    return State(_PACKAGED, record.architectures, text, usable=True), ""


def _wanted() -> tuple[str, ...]:
    """``EPT_FAST_CUDA_ARCHS``, or else the architectures of this machine's GPUs."""
    named = os.environ.get(build.ENVIRONMENT)
    if named:
        return build.parse_architectures(named)
    return tuple(str(capability) for capability in _capabilities())


def _capabilities() -> tuple[int, ...]:
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return ()
    found = set()
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        found.add(10 * major + minor)
    return tuple(sorted(found))


def _listed(architectures: tuple[str, ...]) -> str:
    return ", ".join(
        f"sm_{name.removesuffix('+PTX')}" + (" and later" if name.endswith("+PTX") else "")
        for name in architectures
    )
