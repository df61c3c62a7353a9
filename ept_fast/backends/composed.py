"""The whole prompt path, reconstruct and then splice, from a backend's functions of the two."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from ept_fast.ops.types import Flags, Parameters, Saved, Text

__all__ = ["path_backward", "path_forward", "path_kept"]


def _fused(parameters: Parameters, fusion: bool) -> Parameters:
    """What the first operation sees: the offset only if it is fused."""
    return parameters if fusion else parameters._replace(offset_a=None, offset_b=None)


def path_forward(
    backend: ModuleType, parameters: Parameters, text: Text, flags: Flags, fusion: bool
) -> tuple[Tensor, list[Tensor]]:
    """The output [B, m + S, d], and what the backward needs: P′ itself is not among it.

    Args:
        backend: a module with the functions of both operations.
        parameters: with the offset, if there is one, whether or not it is fused.
        text: what the prompt is put before.
        flags: of the first operation; both have the same scaling.
        fusion: whether the prompt attends to the offset.
    """
    prompt, saved = backend.reconstruct_forward(_fused(parameters, fusion), flags)
    inputs = text.spliced(prompt, parameters.offset_a, parameters.offset_b)
    return backend.splice_forward(inputs, flags.scaling), list(saved)


def path_kept(parameters: Parameters, text: Text, fusion: bool) -> list[Tensor]:
    """Tensors like those that :func:`path_forward` keeps, without their values."""
    return list(Saved.empty(_fused(parameters, fusion)))


def path_backward(
    backend: ModuleType,
    grad: Tensor,
    parameters: Parameters,
    text: Text,
    kept: list[Tensor],
    flags: Flags,
    fusion: bool,
    needs: Parameters,
    wide_offset: bool = False,
) -> Parameters:
    """Gradients of the parameters in their types from that of the output; None if not needed.

    Args:
        backend, parameters, text, flags, fusion: as of :func:`path_forward`; of the text only the
            mask and the task ids are looked at.
        grad: [B, m + S, d].
        kept: what the forward kept.
        needs: for each parameter whether its gradient is needed.
        wide_offset: the backend's functions can leave the gradients of A and B in the accumulation
            type, so that the sum of both operations' is rounded once.
    """
    options = {"wide_offset": True} if wide_offset else {}
    seen = _fused(parameters, fusion)
    need_offset = bool(needs.offset_a or needs.offset_b)
    need_prompt = any(need and tensor is not None for need, tensor in zip(needs, seen, strict=True))
    short_prompt, offset_a, offset_b = parameters[:3]
    inputs = text.spliced(short_prompt, offset_a, offset_b)  # P′ has its shape and type
    d_prompt, *of_text = backend.splice_backward(
        grad, inputs, flags.scaling, need_prompt, need_offset, **options
    )
    grads: list[Any] = [None] * len(parameters)
    if need_prompt:
        grads = list(backend.reconstruct_backward(d_prompt, seen, Saved(*kept), flags, **options))
    if need_offset:
        for i, half, tensor in zip((1, 2), of_text, (offset_a, offset_b), strict=True):
            assert tensor is not None
            grads[i] = (half.add_(grads[i]) if fusion else half).to(tensor.dtype)
    needed: list[Any] = [g if need else None for g, need in zip(grads, needs, strict=True)]
    return Parameters(*needed)
