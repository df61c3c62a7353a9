"""Several texts in one row of a causal model, behind one prompt, none of which sees another."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from ept_fast.prompts.base import check_constant
from ept_fast.transformers.backbone import Profile, text_config
from ept_fast.transformers.padding import IGNORED, Text, pack, packed_mask

__all__ = ["check_packing", "packed_forward"]

_MASKS = ("eager", "sdpa")  # the two kinds of attention that take a mask [R, 1, Q, K] as it is


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def check_packing(backbone: Any, profile: Profile, length: int) -> None:
    """Raise unless packed rows give this model's outputs for the segments by themselves.

    The model has to tell positions by ``position_ids`` alone and to take any mask: no windows
    shorter than a segment, no states or convolutions along the row, no distances by column.

    Args:
        backbone: the causal model.
        profile: what is known of it.
        length: m + L, tokens of the prompt and of the longest segment.

    Raises:
        ValueError: what is in the way.
    """
    config = text_config(backbone)
    own_mask = not hasattr(sys.modules[type(backbone).__module__], "create_causal_mask")
    attention = getattr(config, "_attn_implementation", None)
    relative = str(getattr(config, "position_embedding_type", "")).startswith("relative")
    expected = None
    if "position_ids" not in profile.arguments:
        expected, got = "a model that takes position_ids", "one that does not"
    elif profile.other_layers:
        expected, got = "attention in every layer", ", ".join(profile.other_layers)
    elif getattr(config, "alibi", False) or relative:
        expected, got = "positions by position_ids alone", "distances between columns"
    elif not isinstance(backbone, transformers.PreTrainedModel) or own_mask:
        expected, got = "a model whose attention takes any mask", "one that makes its own"
    elif attention not in _MASKS:
        expected, got = f"attention by one of {', '.join(_MASKS)}", repr(attention)
    elif profile.column_free_length < length:
        got = str(profile.column_free_length)
        expected = f"a window of at least {length} positions"
    if expected is not None:
        raise ValueError(f"pack_index: expected {expected}, got {got} ({profile.name})")


def packed_forward(
    model: Any, text: Text, labels: Tensor | None, pack_index: Tensor, **kwargs: Any
) -> CausalLMOutputWithPast:
    """Loss and logits of N segments that stand in R rows, each row behind one prompt.

    A row is ``[prompt | segment | segment | ...]``. A segment sees the prompt and itself, its
    positions start at m and its offsets at 0, so that it gets what it would get in a row of its
    own; its first token is predicted by the prompt's last position. With
    ``offset_tokens="given"`` each segment's offsets end at its own first label.

    Args:
        model: an :class:`ept_fast.transformers.tasks.EPTModelForCausalLM`.
        text: the segments, ``[N, L]`` ids, padded on the right.
        labels: ``[N, L]`` integers, -100 where nothing is to be predicted.
        pack_index: ``[R, W]`` int64: which of the N * L flattened tokens stands where, -1 for
            padding. The tokens of a segment stand side by side and in their order.
        **kwargs: ``num_items_in_batch``, the number of labels that the sum of the losses is divided
            by (their own number if it is not given); others go to the backbone.

    Returns:
        ``loss``, in float32 or wider, and ``logits`` ``[R, W, V]``, those of the tokens where they
        stand in the rows.

    Raises:
        TypeError, ValueError: a model or tensors that do not fit, by name.
    """
    if text.input_ids is None:
        raise ValueError("input_ids: expected ids for packed rows, got inputs_embeds")
    _check_index(text.input_ids, labels, pack_index)
    num_items = kwargs.pop("num_items_in_batch", None)
    for given in ("task_ids", "logits_to_keep"):
        if kwargs.pop(given, None) is not None:
            raise ValueError(f"{given}: expected None beside pack_index, got a value")
    backbone, profile = model.backbone, model.profile
    check_constant("pack_index", model.prompt)
    if labels is not None and model.loss_terms:
        names = ", ".join(term.name for term in model.loss_terms)
        raise ValueError(f"pack_index: expected no further terms of the loss, got {names}")
    embeds, _, ranks = model.splice(
        text.input_ids, attention_mask=text.attention_mask, labels=labels
    )
    m = model.prompt.config.num_virtual_tokens
    check_packing(backbone, profile, m + text.length)

    rows, width = pack_index.shape
    # The prompt is the same before every segment; one copy of it collects all of its gradient.
    embeds, positions = (
        torch.cat([v[:1, :m].expand(rows, *v[0, :m].shape), pack(v[:, m:], pack_index)], dim=1)
        for v in (embeds, ranks)  # a segment's ranks are m, m + 1, ...
    )
    mask = packed_mask(pack_index, text.length, m)
    if backbone.config._attn_implementation != "sdpa":  # an additive mask
        lowest = torch.finfo(embeds.dtype).min
        mask = embeds.new_zeros(mask.shape).masked_fill(~mask, lowest)
    # A symbol of torch.export is no number of logits.
    kept = width + 1 if isinstance(width, int) else None
    inputs = profile.inputs(embeds, mask, positions, use_cache=False, logits_to_keep=kept)
    output = backbone(**{**kwargs, **inputs})
    logits = output.logits[:, -(width + 1) :]  # [R, 1 + W, V]: the prompt's last position, the text
    loss = None
    if labels is not None:
        first = pack(ranks[:, m:] == m, pack_index, False)
        loss = _loss(logits, pack(labels, pack_index, IGNORED), first, num_items)
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


def _loss(logits: Tensor, labels: Tensor, first: Tensor, num_items: Any) -> Tensor:
    """Cross-entropy over the labels that are not -100.

    Args:
        logits: ``[R, 1 + W, V]``, of the prompt's last position and of the tokens.
        labels: ``[R, W]``.
        first: ``[R, W]``, the first token of each segment.
        num_items: what the sum is divided by; the number of labels if it is None.
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
