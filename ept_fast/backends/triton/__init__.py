"""The fused kernels in Triton, for GPUs; on a CPU only under Triton's interpreter, for tests.

The calls are those of :mod:`.calls`, with which Triton is imported when one is first asked for. The
interpreter (``TRITON_INTERPRET=1`` before anything imports triton) is thousands of times slower
than the ``eager`` backend, so it serves calls that name this backend and no others.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from ept_fast.backends.fused import CALLS, needs_float64, target, too_large
from ept_fast.backends.triton.launch import dotted, launcher, triton_version
from ept_fast.ops.types import Parameters, SpliceInputs

__all__ = ["available", "supports", *CALLS]

_OLDEST = (3, 5, 0)
# Architecture, the first version that is good again, what is wrong before it. From the compilers'
# own trackers: triton-lang/triton pull request 8485 and issue 10331.
_KNOWN_BAD = (
    ("sm_103", (3, 5, 1), "its matrix products crash"),
    ("sm_121", (3, 6, 0), "its assembler does not know the architecture"),
)
_VERSION = triton_version()


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _refusal(version: tuple[int, ...] | None, architecture: str) -> str:
    """Why this version of Triton does not serve this architecture; empty if it does."""
    if version is None:
        return "triton is not installed"
    name = dotted(version)
    if version < _OLDEST:
        return f"triton {name} is older than {dotted(_OLDEST)}"
    if architecture.startswith("sm_") and int(architecture[3:]) < 80:
        return f"{architecture} is older than sm_80"
    for bad, good_again, what in _KNOWN_BAD:
        if architecture == bad and version < good_again:
            return f"triton {name} on {bad}: {what} before {dotted(good_again)}"
    return ""


def available() -> tuple[bool, str]:
    """Whether the backend works on this machine, and why (not)."""
    if _interpreted():
        refusal = _refusal(_VERSION, "cpu")
        return not refusal, refusal or "the interpreter on a CPU, only if it is asked for"
    if not torch.cuda.is_available():
        return False, _refusal(_VERSION, "cpu") or "no GPU"
    architecture = target(torch.device("cuda", torch.cuda.current_device()))
    refusal = _refusal(_VERSION, architecture)
    how = f", {launcher()[1]}" if architecture.startswith("sm_") else ""
    return not refusal, refusal or f"fused kernels for {architecture}{how}"


def supports(tensors: Parameters | SpliceInputs, by_name: bool = False) -> tuple[bool, str]:
    """Whether it serves these tensors, and why (not)."""
    wide = needs_float64(tensors)
    if wide:
        return False, wide
    device = tensors[0].device
    if device.type not in ("cpu", "cuda"):
        return False, "neither a GPU that Triton serves nor a CPU"
    if device.type == "cpu":
        if not _interpreted():
            return False, "CPU tensors, and TRITON_INTERPRET=1 is not set"
        if not by_name:
            return False, "the interpreter serves a CPU only if it is asked for by name"
    elif _interpreted():
        return False, "GPU tensors, and TRITON_INTERPRET=1 is set"
    refusal = _refusal(_VERSION, target(device)) or too_large(tensors)
    return not refusal, refusal or "fused kernels"


def __getattr__(name: str) -> Any:
    """The calls that are served, which need Triton."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ept_fast.backends.triton import calls

    globals().update({each: getattr(calls, each) for each in CALLS})
    return globals()[name]
