"""The keys and values of a decoder's prompt, computed once and used for every request."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from ept_fast.prompts.base import check_constant
from ept_fast.transformers.outputs import keep_logits, replace_fields
from ept_fast.transformers.padding import Text, mark_layout

__all__ = ["PrefixCache", "prefix_forward"]


class PrefixCache:
    """What a decoder's layers keep of its prompt: no request has to compute it again.

    Made by ``prefix_cache()`` of a causal model or a bank, and given to their ``forward`` and
    ``generate`` as ``prefix``. Prompt positions see no text, so their keys and values are the same
    before every text: the results are those without it, to rounding. They are kept as the layers
    made them, positions included, in the backbone's type. A prefix that is older than its prompt
    is refused; a change that PyTorch does not count, through ``.data``, needs another prefix.

    Args:
        model: an :class:`ept_fast.transformers.tasks.EPTModelForCausalLM`; its active adapter.

    Attributes:
        layers: keys and values of each layer, ``[T, heads, m, head width]``; T is 1 for a single
            prompt.

    Raises:
        ValueError: a backbone with layers that keep something else than keys and values.
    """

    def __init__(self, model: Any) -> None:
        profile = model.profile
        if profile.other_layers or profile.cache_argument is None:
            got = ", ".join(profile.other_layers) or "a forward that takes none"
            raise ValueError(
                f"model: expected attention in every layer and a forward that takes keys and "
                f"values (cache or past_key_values), got {got} ({profile.name})"
            )
        self._model = model
        self._prompt = model.prompt
        check_constant("prefix", self._prompt)
        self._made: list[Any] = []
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.update()

    @property
    def num_virtual_tokens(self) -> int:
        """m."""
        return int(self._prompt.config.num_virtual_tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer)

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self) -> None:
        """Compute the prompts that changed since the last time again; of a bank, those only.

        Raises:
            ValueError: another adapter is active, or the model trains with recomputed layers, which
                keep nothing.
        """
        with self._prompt.lock.writing() if _is_bank(self._prompt) else nullcontext():
            self._update()

    def _update(self) -> None:
        if self._model.prompt is not self._prompt:
            raise ValueError("prefix: expected the cache of the active adapter, got another's")
        state = _state(self._model)
        slots = [i for i, made in enumerate(state) if i >= len(self._made) or self._made[i] != made]
        if not slots:
            return
        layers = self._compute(slots)
        if len(slots) == len(state):
            self.layers = layers
        else:
            index = torch.tensor(slots, device=layers[0][0].device)
            for old, new in zip(self.layers, layers, strict=True):
                for mine, theirs in zip(old, new, strict=True):
                    mine.index_copy_(0, index, theirs)
        self._made = state

    def _compute(self, slots: list[int]) -> list[tuple[Tensor, Tensor]]:
        model = self._model
        task_ids = torch.tensor(slots, device=model.device) if _is_bank(self._prompt) else None
        nothing = torch.empty(len(slots), 0, dtype=torch.int64, device=model.device)
        spliced = model.splice(input_ids=nothing, task_ids=task_ids)
        cache = DynamicCache()
        caching = {"use_cache": True, model.profile.cache_argument: cache}
        inputs = model.profile.inputs(*spliced, logits_to_keep=1, **caching)
        model.check_keeps_cache()
        model.backbone(**inputs)
        kept: Any = cache.layers
        return [(layer.keys, layer.values) for layer in kept]

    def check(self, model: Any, task_ids: Tensor | None = None) -> None:
        """Raise ValueError unless this is the model's active prompt as it is now."""
        if model is not self._model or model.prompt is not self._prompt:
            raise ValueError("prefix: expected the cache of the active adapter, got another's")
        state = _state(self._model)
        used = range(len(state)) if task_ids is None else sorted(set(task_ids.tolist()))
        changed = [slot for slot in used if state[slot] != self._made[slot]]
        if changed:
            which = "" if task_ids is None else f" in slots {changed}"
            raise ValueError(
                f"prefix: expected the cache of the prompt as it is, got one of before it "
                f"changed{which} (update() computes it again)"
            )

    def write(self, cache: Cache, rows: Tensor) -> None:
        """Put the prompts of these slots, ``[N]``, at the beginning of an empty cache."""
        for index, layer in enumerate(self.layers):
            keys, values = (t.index_select(0, rows.to(t.device)) for t in layer)
            cache.update(keys, values, index)
        mark_layout(cache, "prompt first")


def _is_bank(prompt: Any) -> bool:
    return hasattr(prompt, "writes")


def _state(model: Any) -> list[Any]:
    """Something for each slot that is another once its prompt or PEFT's weights have changed."""
    prompt, peft = model.prompt, [] if model.peft is None else model.peft.parameters()
    layers = tuple((id(p), _version(p)) for p in peft)
    if _is_bank(prompt):
        kind = (prompt.prompt.dtype, prompt.prompt.device)
        return [(count, *kind, *layers) for count in prompt.writes]
    own = tuple((id(p), _version(p), p.dtype, p.device) for p in prompt.parameters())
    return [own + layers]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


@torch.no_grad()
def prefix_forward(
    model: Any, prefix: PrefixCache, text: Text, labels: Tensor | None, kwargs: dict[str, Any]
) -> Any:
    """The output of a causal model that reads the text alone, its prompt's part from the cache.

    Args:
        model: the causal model, its active adapter that of ``prefix``.
        prefix: from ``prefix_cache()``.
        text: :class:`ept_fast.transformers.padding.Text`.
        labels: refused.
        kwargs: ``task_ids``; ``logits_to_keep``; others go to the backbone.

    Returns:
        The backbone's output, ``logits`` ``[B, S, V]`` in the columns of the text, and keys and
        values of the prompt and the text.

    Raises:
        ValueError: labels; a prefix of another prompt, or of before it changed.
    """
    for name, value in (("labels", labels), ("pack_index", kwargs.pop("pack_index", None))):
        if value is not None:
            raise ValueError(f"{name}: expected None beside prefix, which is for inference")
    task_ids = kwargs.pop("task_ids", None)
    prefix.check(model, task_ids)
    model.check_keeps_cache()
    m, profile = prefix.num_virtual_tokens, model.profile
    text = text.for_columns(m, profile.column_free_length)
    embeds, mask, ranks = model.splice(
        text.input_ids, text.inputs_embeds, text.attention_mask, task_ids
    )
    batch = embeds.shape[0]
    rows = torch.zeros(batch, dtype=torch.int64, device=embeds.device)
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    prefix.write(cache, rows if task_ids is None else task_ids)
    caching = {"use_cache": True, profile.cache_argument: cache}
    inputs = profile.inputs(embeds[:, m:], mask, ranks[:, m:], **caching)
    kept = kwargs.pop("logits_to_keep", 0)
    if text.order is None and "logits_to_keep" in profile.arguments:
        inputs["logits_to_keep"], kept = kept, 0
    output = model.backbone(**{**kwargs, **inputs})
    mark_layout(cache, text.layout)
    logits = keep_logits(text.restore(output.logits), kept)
    return replace_fields(output, logits=logits)
