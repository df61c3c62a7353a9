"""The fused kernels in Triton, for GPUs; on a CPU only under Triton's interpreter, for tests.

Triton is imported by the first call that runs a kernel. The interpreter (``TRITON_INTERPRET=1``
before anything imports triton) is thousands of times slower than the ``eager`` backend, so it
serves calls that name this backend and no others.
"""

from __future__ import annotations

import importlib.metadata
import os
import re

import torch
from torch import Tensor

from ept_fast.backends import eager
from ept_fast.backends.eager import is_degenerate
from ept_fast.kernels.launch import target

__all__ = [
    "available",
    "reconstruct_backward",
    "reconstruct_forward",
    "splice_backward",
    "splice_forward",
    "supports",
]

_Seven = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
_OLDEST = (3, 5, 0)
# Architecture, the first version that is good again, what is wrong before it. From the compilers'
# own trackers: triton-lang/triton pull request 8485 and issue 10331.
_KNOWN_BAD = (
    ("sm_103", (3, 5, 1), "its matrix products crash"),
    ("sm_121", (3, 6, 0), "its assembler does not know the architecture"),
)
_MAX_RANK = 256
_MAX_SPACES = 512
_MAX_TOKENS = 512


def _version() -> tuple[int, ...] | None:
    """Triton's version, without importing it."""
    for name in ("triton", "pytorch-triton", "triton-rocm", "pytorch-triton-rocm"):
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return tuple(int(part) for part in re.findall(r"\d+", found)[:3])
    return None


_VERSION = _version()


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(part) for part in version)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _refusal(version: tuple[int, ...] | None, architecture: str) -> str:
    """Why this version of Triton does not serve this architecture; empty where it does."""
    if version is None:
        return "triton is not installed"
    name = _dotted(version)
    if version < _OLDEST:
        return f"triton {name} is older than {_dotted(_OLDEST)}"
    if architecture.startswith("sm_") and int(architecture[3:]) < 80:
        return f"{architecture} is older than sm_80"
    for bad, good_again, what in _KNOWN_BAD:
        if architecture == bad and version < good_again:
            return f"triton {name} on {bad}: {what} before {_dotted(good_again)}"
    return ""


def available() -> tuple[bool, str]:
    """Whether the backend works on this machine, and why (not)."""
    if _interpreted():
        refusal = _refusal(_VERSION, "cpu")
        return not refusal, refusal or "the interpreter on a CPU, only where it is asked for"
    if not torch.cuda.is_available():
        return False, _refusal(_VERSION, "cpu") or "no GPU"
    architecture = target(torch.device("cuda", torch.cuda.current_device()))
    refusal = _refusal(_VERSION, architecture)
    return not refusal, refusal or f"fused kernels for {architecture}"


def supports(tensors: dict[str, Tensor | None], by_name: bool = False) -> tuple[bool, str]:
    """Whether it serves these tensors, and why (not)."""
    device = None
    for name, tensor in tensors.items():
        if tensor is not None:
            device = tensor.device
            if tensor.dtype == torch.float64:
                return False, f"{name} is float64, the kernels compute in float32"
    if device is None or device.type not in ("cpu", "cuda"):
        return False, "neither a GPU that Triton serves nor a CPU"
    if device.type == "cpu":
        if not _interpreted():
            return False, "CPU tensors, and TRITON_INTERPRET=1 is not set"
        if not by_name:
            return False, "the interpreter serves a CPU only where it is asked for"
    elif _interpreted():
        return False, "GPU tensors, and TRITON_INTERPRET=1 is set"
    refusal = _refusal(_VERSION, target(device))
    if refusal:
        return False, refusal
    return _sizes_fit(tensors)


def _sizes_fit(tensors: dict[str, Tensor | None]) -> tuple[bool, str]:
    prompt, offset_a, down = (
        tensors.get(name) for name in ("short_prompt", "offset_a", "space_down")
    )
    if offset_a is not None and offset_a.shape[-1] > _MAX_RANK:
        return False, f"rank {offset_a.shape[-1]} is more than {_MAX_RANK}"
    if prompt is not None and prompt.shape[-2] > _MAX_TOKENS:
        return False, f"{prompt.shape[-2]} virtual tokens are more than {_MAX_TOKENS}"
    if down is not None and down.shape[-3] * max(1, down.shape[-1]) > _MAX_SPACES:
        return False, (
            f"{down.shape[-3]} subspaces of width {down.shape[-1]} are more than "
            f"{_MAX_SPACES} together"
        )
    return True, "fused kernels"


def reconstruct_forward(
    short_prompt: Tensor,
    offset_a: Tensor | None,
    offset_b: Tensor | None,
    space_down: Tensor | None,
    space_up: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    scaling: float,
    activation: str,
    gate: str,
    temperature: float,
) -> _Seven:
    """P′ [T, m, d] and what the backward needs, as in :mod:`ept_fast.backends.eager`."""
    from ept_fast.kernels import reconstruct

    seven = (short_prompt, offset_a, offset_b, space_down, space_up, gate_weight, gate_bias)
    owner = eager if is_degenerate(*seven) else reconstruct
    result: _Seven = owner.reconstruct_forward(*seven, scaling, activation, gate, temperature)
    return result


def reconstruct_backward(
    grad: Tensor,
    short_prompt: Tensor,
    offset_a: Tensor | None,
    offset_b: Tensor | None,
    space_down: Tensor | None,
    space_up: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    query: Tensor,
    stats: Tensor,
    mix: Tensor,
    hidden: Tensor,
    gates: Tensor,
    cross: Tensor,
    scaling: float,
    activation: str,
    gate: str,
    temperature: float,
) -> _Seven:
    """Gradients of the seven tensors, as in :mod:`ept_fast.backends.eager`."""
    from ept_fast.kernels import reconstruct

    seven = (short_prompt, offset_a, offset_b, space_down, space_up, gate_weight, gate_bias)
    saved = (query, stats, mix, hidden, gates, cross)
    owner = eager if is_degenerate(*seven) else reconstruct
    result: _Seven = owner.reconstruct_backward(
        grad, *seven, *saved, scaling, activation, gate, temperature
    )
    return result


def splice_forward(
    prompt: Tensor,
    input_ids: Tensor | None,
    weight: Tensor | None,
    inputs_embeds: Tensor | None,
    offset_a: Tensor | None,
    offset_b: Tensor | None,
    attention_mask: Tensor | None,
    task_ids: Tensor | None,
    scaling: float,
) -> Tensor:
    """The prompt before the text and the offset onto its real tokens, [B, m + S, d]."""
    from ept_fast.kernels import splice

    return splice.splice_forward(
        prompt,
        input_ids,
        weight,
        inputs_embeds,
        offset_a,
        offset_b,
        attention_mask,
        task_ids,
        scaling,
    )


def splice_backward(
    grad: Tensor,
    prompt: Tensor,
    offset_a: Tensor | None,
    offset_b: Tensor | None,
    attention_mask: Tensor | None,
    task_ids: Tensor | None,
    scaling: float,
    need_prompt: bool,
    need_offset: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of prompt, offset_a and offset_b in their types from that of the output."""
    from ept_fast.kernels import splice

    return splice.splice_backward(
        grad,
        prompt,
        offset_a,
        offset_b,
        attention_mask,
        task_ids,
        scaling,
        need_prompt,
        need_offset,
    )
