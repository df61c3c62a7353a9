"""Several texts in one row of a causal model, behind one prompt, none of which sees another."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from ept_fast.transformers.backbone import (
    ATTENTION,
    accepted_arguments,
    column_free_length,
    layer_kinds,
    text_config,
)
from ept_fast.transformers.model import IGNORED

__all__ = ["check_packing", "packed_forward"]

_MASKS = ("eager", "sdpa")  # the two kinds of attention that take a mask [R, 1, Q, K] as it is


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def check_packing(backbone: Any, length: int) -> None:
    """Raise unless packed rows give this model's outputs for the segments by themselves.

    The model has to tell positions by ``position_ids`` alone and to take any mask: no windows
    shorter than a segment, no states or convolutions along the row, no distances by column.

    Args:
        backbone: the causal model.
        length: m + L, tokens of the prompt and of the longest segment.

    Raises:
        ValueError: what is in the way.
    """
    config = text_config(backbone)
    name = type(backbone).__name__
    limit = column_free_length(backbone)
    others = layer_kinds(backbone) - ATTENTION
    own_mask = not hasattr(sys.modules[type(backbone).__module__], "create_causal_mask")
    attention = getattr(config, "_attn_implementation", None)
    relative = str(getattr(config, "position_embedding_type", "")).startswith("relative")
    expected = None
    if "position_ids" not in accepted_arguments(backbone):
        expected, got = "a model that takes position_ids", "one that does not"
    elif others:
        expected, got = "attention in every layer", ", ".join(sorted(others))
    elif getattr(config, "alibi", False) or relative:
        expected, got = "positions by position_ids alone", "distances between columns"
    elif not isinstance(backbone, transformers.PreTrainedModel) or own_mask:
        expected, got = "a model whose attention takes any mask", "one that makes its own"
    elif attention not in _MASKS:
        expected, got = f"attention by one of {', '.join(_MASKS)}", repr(attention)
    elif limit < length:
        expected, got = f"a window of at least {length} positions", str(limit)
    if expected is not None:
        raise ValueError(f"pack_index: expected {expected}, got {got} ({name})")


def packed_forward(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    pack_index: Tensor,
    **kwargs: Any,
) -> CausalLMOutputWithPast:
    """Loss and logits of N segments that stand in R rows, each row behind one prompt.

    A row is ``[prompt | segment | segment | ...]``. A segment sees the prompt and itself, its
    positions start at m and its offsets at 0, so that it gets what it would get in a row of its
    own; its first token is predicted by the prompt's last position.

    Args:
        model: an :class:`ept_fast.transformers.tasks.EPTModelForCausalLM`.
        input_ids: ``[N, L]`` integers, the segments, padded on the right.
        attention_mask: ``[N, L]`` of 0 and 1; ones where it is not given.
        labels: ``[N, L]`` integers, -100 where nothing is to be predicted.
        pack_index: ``[R, W]`` int64: which of the N * L flattened tokens stands where, -1 for
            padding. The tokens of a segment stand side by side and in their order.
        **kwargs: ``num_items_in_batch``, the number of labels that the sum of the losses is divided
            by (their own number where it is not given); others go to the backbone.

    Returns:
        ``loss``, in float32 or wider, and ``logits`` ``[R, W, V]``, those of the tokens where they
        stand in the rows.

    Raises:
        TypeError, ValueError: a model or tensors that do not fit, by name.
    """
    _check_index(input_ids, labels, pack_index)
    num_items = kwargs.pop("num_items_in_batch", None)
    for given in ("task_ids", "logits_to_keep"):
        if kwargs.pop(given, None) is not None:
            raise ValueError(f"{given}: expected None beside pack_index, got a value")
    backbone = model.backbone
    length = input_ids.shape[1]  # L
    spliced = model.splice(input_ids=input_ids, attention_mask=attention_mask)
    m = spliced.inputs_embeds.shape[1] - length
    check_packing(backbone, m + length)

    real = pack_index >= 0  # [R, W]
    index = pack_index.clamp_min(0)
    rows, width = index.shape
    # The prompt is the same before every segment; one copy of it collects all of its gradient.
    prompt = spliced.inputs_embeds[:1, :m].expand(rows, -1, -1)
    text = _pick(spliced.inputs_embeds[:, m:], index)  # [R, W, d]
    text = text.masked_fill(~real.unsqueeze(-1), 0)
    positions = _pick(spliced.position_ids[:, m:], index) * real  # m, m + 1, ... in each segment
    positions = torch.cat([spliced.position_ids[:1, :m].expand(rows, -1), positions], dim=1)
    inputs: dict[str, Any] = {
        "inputs_embeds": torch.cat([prompt, text], dim=1),
        "attention_mask": _block_mask(index // length, real, m, text.dtype, backbone.config),
        "position_ids": positions + model._first_position,
        "return_dict": True,
    }
    if "use_cache" in model._accepted:
        inputs["use_cache"] = False
    if "logits_to_keep" in model._accepted and isinstance(width, int):  # no symbol of torch.export
        inputs["logits_to_keep"] = width + 1
    output = backbone(**{**kwargs, **inputs})
    logits = output.logits[:, -(width + 1) :]  # [R, 1 + W, V]: the prompt's last position, the text
    loss = None
    if labels is not None:
        wanted = _pick(labels, index).masked_fill(~real, IGNORED)
        first = spliced.position_ids[:, m:] == m  # [N, L]
        loss = _loss(logits, wanted, _pick(first, index) & real, num_items)
    return CausalLMOutputWithPast(
        loss=loss,
        logits=logits[:, 1:],
        hidden_states=output.get("hidden_states"),
        attentions=output.get("attentions"),
    )


def _check_index(input_ids: Tensor, labels: Tensor | None, pack_index: Tensor) -> None:
    if labels is not None and labels.shape != input_ids.shape:
        expected = list(input_ids.shape)
        raise ValueError(
            f"labels: expected shape {expected} to match input_ids, got {list(labels.shape)}"
        )
    if pack_index.dtype != torch.int64:
        raise TypeError(f"pack_index: expected dtype int64, got {pack_index.dtype}")
    if pack_index.dim() != 2:
        raise ValueError(f"pack_index: expected shape [R, W], got {list(pack_index.shape)}")


def _pick(values: Tensor, index: Tensor) -> Tensor:
    """Values ``[N, L, ...]`` in the packed order ``[R, W, ...]``."""
    picked = values.flatten(0, 1).index_select(0, index.flatten())
    return picked.view(*index.shape, *values.shape[2:])


def _block_mask(
    segment: Tensor, real: Tensor, num_virtual_tokens: int, dtype: torch.dtype, config: Any
) -> Tensor:
    """Who sees whom, ``[R, 1, m + W, m + W]``: the prompt and, of the text, one's own segment.

    Args:
        segment: ``[R, W]``, the segment of each token.
        real: ``[R, W]``, False for padding, which sees the prompt and other padding.
        num_virtual_tokens: m.
        dtype: of an additive mask, which eager attention takes; sdpa takes a bool.
        config: of the backbone.
    """
    owner = F.pad(torch.where(real, segment, -1), (num_virtual_tokens, 0), value=-2)
    size = owner.shape[1]
    allowed = owner.unsqueeze(2) == owner.unsqueeze(1)  # [R, query, key]
    allowed[:, :, :num_virtual_tokens] = True
    allowed &= torch.ones(size, size, dtype=torch.bool, device=real.device).tril()
    allowed = allowed.unsqueeze(1)
    if config._attn_implementation == "sdpa":
        return allowed
    lowest = torch.finfo(dtype).min
    return torch.zeros(allowed.shape, dtype=dtype, device=real.device).masked_fill(~allowed, lowest)


def _loss(logits: Tensor, labels: Tensor, first: Tensor, num_items: Any) -> Tensor:
    """Cross-entropy over the labels that are not -100.

    Args:
        logits: ``[R, 1 + W, V]``, of the prompt's last position and of the tokens.
        labels: ``[R, W]``.
        first: ``[R, W]``, the first token of each segment.
        num_items: what the sum is divided by; the number of labels where it is None.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # The labels are shifted and not the logits, which are large and would be copied.
    inner = F.pad(labels.masked_fill(first, IGNORED), (0, 1), value=IGNORED)
    total = F.cross_entropy(logits.flatten(0, 1), inner.flatten(), reduction="sum")
    # One position predicts the first token of all segments of its row: no copies of its logits.
    start = logits[:, 0].log_softmax(-1).gather(1, labels.clamp_min(0))  # [R, W]
    labelled = labels != IGNORED
    total = total - start.masked_fill(~(first & labelled), 0).sum()
    return total / (labelled.sum() if num_items is None else num_items)
