"""Prompts before frozen models, a class a task, and the function that picks it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput

from ept_fast.config import PromptConfig, check_choice, check_number
from ept_fast.transformers import POOLINGS, TASKS
from ept_fast.transformers.backbone import (
    cache_of,
    column_free_length,
    output_width,
    own_head,
    reads_last_column,
)
from ept_fast.transformers.model import (
    IGNORED,
    Description,
    EPTModel,
    Text,
    keep_logits,
    mark_layout,
    next_labels,
    replace_fields,
    token_loss,
)
from ept_fast.transformers.prefix_cache import PrefixCache, prefix_forward

__all__ = [
    "EPTModel",
    "EPTModelForCausalLM",
    "EPTModelForFeatureExtraction",
    "EPTModelForSeq2SeqLM",
    "EPTModelForSequenceClassification",
    "EPTModelForTokenClassification",
    "get_ept_model",
]


def get_ept_model(
    model: nn.Module,
    config: PromptConfig,
    task: str,
    *,
    adapter_name: str = "default",
    labels: Sequence[str] | None = None,
    pooling: str | None = None,
    head_dropout: float = 0.0,
    init: str | Tensor = "vocab",
    text: str | None = None,
    tokenizer: Any = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    base_model: str | None = None,
    backend: str | None = None,
) -> EPTModel:
    """Freeze a model and put a trainable prompt before it, with a trainable head where one is due.

    Any architecture will do whose forward takes ``inputs_embeds`` and ``attention_mask``. The model
    is not copied: ``unload()`` gives it back as it was.

    Args:
        model: a ``transformers`` model of the kind that the task needs: for ``"SEQ_2_SEQ_LM"`` an
            encoder-decoder (the prompt goes before the encoder's text), for ``"CAUSAL_LM"`` a
            decoder with its language-model head, for ``"SEQ_CLS"`` and ``"TOKEN_CLS"`` a bare
            model or one with a head for the task, for ``"FEATURE_EXTRACTION"`` a bare model.
        config: sizes and choices of the prompt; ``hidden_size`` is the width of the embeddings.
        task: ``"SEQ_CLS"``, ``"TOKEN_CLS"``, ``"CAUSAL_LM"``, ``"SEQ_2_SEQ_LM"`` or
            ``"FEATURE_EXTRACTION"``.
        adapter_name: name of this adapter.
        labels: names of the classes, in the order of the logits. A bare model gets a linear head
            for them. A model with a head for the task keeps it (a copy of it is trained); they are
            ``config.id2label`` then.
        pooling: for ``"SEQ_CLS"``, what a linear head sees: ``"mean"`` over the text's real tokens,
            the ``"first"`` or the ``"last"`` of them, or ``"model"``, the bare model's own
            ``pooler_output``. For a model with a head, ``"model"`` is that head: an encoder's reads
            what it always reads (BERT's the first position, a prompt token now), a decoder's the
            last real token. Default: ``"model"`` with a head, ``"mean"`` without.
        head_dropout: dropout probability before a linear head.
        init, text, tokenizer, generator, dtype: as in :class:`ept_fast.FusedEPTPrompt`.
        base_model: folder or hub id of the model, saved with adapters; found from the model where
            not given.
        backend: as in :func:`ept_fast.reconstruct_prompt`.

    Raises:
        TypeError: a model that cannot be called with embeddings or lacks what the task needs.
        ValueError: an unknown task, labels or sizes that do not fit.

    Example:
        >>> import transformers
        >>> sizes = dict(vocab_size=99, n_positions=64, n_embd=32, n_layer=2, n_head=2)
        >>> gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
        >>> config = EPTConfig(32, num_virtual_tokens=4, max_length=32, rank=2)
        >>> model = get_ept_model(gpt2, config, "CAUSAL_LM")
        >>> ids = torch.tensor([[5, 6, 7]])
        >>> model(input_ids=ids, labels=ids).logits.shape
        torch.Size([1, 3, 99])
    """
    check_choice("task", task, TASKS)
    wrapped = EPTModel.of_task(task)(model, base_model=base_model, backend=backend)
    try:
        wrapped.add_adapter(
            adapter_name,
            config,
            labels=labels,
            pooling=pooling,
            head_dropout=head_dropout,
            init=init,
            text=text,
            tokenizer=tokenizer,
            generator=generator,
            dtype=dtype,
        )
    except BaseException:
        wrapped.unload()
        raise
    return wrapped.train()


class EPTModelForCausalLM(EPTModel):
    """A prompt before a decoder. ``labels`` [B, S] are the text's own; -100 and padding's are left
    out.

    The first token of a text is predicted by the prompt's last position, so its label counts too.
    ``pack_index`` [R, W] packs several texts into a row (:mod:`ept_fast.transformers.packing`).
    ``prefix`` takes the prompt's keys and values from :meth:`prefix_cache`.
    """

    task = "CAUSAL_LM"

    def __init__(self, model: nn.Module, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self._column_free = column_free_length(model)

    def _run(self, text: Text, labels: Tensor | None, kwargs: dict[str, Any]) -> Any:
        prefix = kwargs.pop("prefix", None)
        if prefix is not None:
            return prefix_forward(self, prefix, text, labels, kwargs)
        pack_index = kwargs.pop("pack_index", None)
        if pack_index is not None:
            from ept_fast.transformers.packing import packed_forward

            if text.input_ids is None:
                raise ValueError("input_ids: expected ids for packed rows, got inputs_embeds")
            ids, mask = text.input_ids, text.attention_mask
            return packed_forward(self, ids, mask, labels, pack_index, **kwargs)
        num_items = kwargs.pop("num_items_in_batch", None)
        kept = kwargs.pop("logits_to_keep", 0)
        length, m = text.length, self.prompt.config.num_virtual_tokens
        if m + length > self._column_free:
            text = text.compacted()
        if "logits_to_keep" in self._accepted:
            # The text's, and what predicts its first token; or no more than is asked for.
            few = labels is None and text.order is None and isinstance(kept, int) and kept
            number = min(kept, length) if few else length + 1
            if isinstance(number, int):  # models read a symbol of torch.export as a column
                kwargs["logits_to_keep"] = number
        output = self.backbone(**self._inputs(text, kwargs))
        logits, loss = output.logits, None
        if labels is not None:
            targets = next_labels(text.compact(labels), text.attention_mask)
            before = logits.shape[1] - targets.shape[1]
            loss = token_loss(logits, F.pad(targets, (before, 0), value=IGNORED), num_items)
        cache = cache_of(output)
        if cache is not None:  # use_cache=True was given
            mark_layout(cache, "prompt first" if text.order is None else "text first")
        logits = text.restore(logits[:, max(logits.shape[1] - length, 0) :])
        return replace_fields(output, loss=loss, logits=keep_logits(logits, kept))

    def prefix_cache(self) -> PrefixCache:
        """The keys and values of the active prompt, to be given to calls as ``prefix``.

        Raises:
            ValueError: a backbone with layers that keep something else.
        """
        return PrefixCache(self)

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """What the backbone's ``generate`` gives for these arguments, behind the active prompt.

        ``prefix`` and all else: :func:`ept_fast.transformers.generation.generate_causal`.
        """
        if self._disabled:
            return self.backbone.generate(input_ids, attention_mask=attention_mask, **kwargs)
        from ept_fast.transformers.generation import generate_causal

        return generate_causal(self, input_ids, attention_mask, **kwargs)


class EPTModelForSeq2SeqLM(EPTModel):
    """A prompt before an encoder-decoder's encoder. ``labels`` [B, T] are the decoder's.

    ``decoder_input_ids`` follow from the labels where they are not given.
    """

    task = "SEQ_2_SEQ_LM"

    def _run(self, text: Text, labels: Tensor | None, kwargs: dict[str, Any]) -> Any:
        num_items = kwargs.pop("num_items_in_batch", None)
        given = ("decoder_input_ids", "decoder_inputs_embeds")
        if labels is not None and all(kwargs.get(name) is None for name in given):
            prepare = getattr(self.backbone, "prepare_decoder_input_ids_from_labels", None)
            if prepare is None:  # the model shifts the labels in its forward
                kwargs["labels"] = labels
            else:
                kwargs["decoder_input_ids"] = prepare(labels=labels)
        # Encoders of this kind count positions by column.
        inputs, _ = self._inputs_in_order(text.compacted(), kwargs, compact=True)
        output = self.backbone(**inputs)
        loss = None if labels is None else token_loss(output.logits, labels, num_items)
        return replace_fields(output, loss=loss)

    def _reader(self) -> Any:
        return self.backbone.get_encoder()

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """What the backbone's ``generate`` gives for these arguments, behind the active prompt.

        See :func:`ept_fast.transformers.generation.generate_seq2seq`.
        """
        if self._disabled:
            return self.backbone.generate(input_ids, attention_mask=attention_mask, **kwargs)
        from ept_fast.transformers.generation import generate_seq2seq

        return generate_seq2seq(self, input_ids, attention_mask, **kwargs)


class EPTModelForFeatureExtraction(EPTModel):
    """A prompt before a bare model: ``last_hidden_state`` [B, S, h] of the text."""

    task = "FEATURE_EXTRACTION"
    accepts_loss_kwargs = False

    def _run(self, text: Text, labels: Tensor | None, kwargs: dict[str, Any]) -> Any:
        if labels is not None:
            raise ValueError(f"labels: expected None for task {self.task}, got some")
        text = text.compacted()
        inputs, order = self._inputs_in_order(text, kwargs, compact=True)
        output = self.backbone(**inputs)
        hidden = self._of_text(output.last_hidden_state, order)
        return replace_fields(output, last_hidden_state=text.restore(hidden))


class _Headed(EPTModel):
    """What the two tasks with a head share: a linear head of ours, or copies of the model's own.

    The active adapter's copy stands in the model in place of the original, which waits in
    ``base_head``.
    """

    has_head = True

    def __init__(self, model: nn.Module, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.base_head = nn.ModuleDict(own_head(model, self.task))
        self._encoder_name = self.backbone.base_model_prefix if self.base_head else ""

    @property
    def encoder(self) -> Any:
        """The backbone without its own head."""
        return getattr(self.backbone, self._encoder_name) if self.base_head else self.backbone

    def _reader(self) -> Any:
        return self.encoder

    def _describe(
        self, labels: Sequence[str] | None, pooling: str | None, head_dropout: float
    ) -> Description:
        check_number("head_dropout", head_dropout)
        if not 0 <= head_dropout < 1:
            raise ValueError(f"head_dropout: expected 0 <= head_dropout < 1, got {head_dropout}")
        own = bool(self.base_head) and pooling in (None, "model")
        if own:
            self._check_own_head(head_dropout)
            known = tuple(str(name) for _, name in sorted(self.config.id2label.items()))
            if labels is not None and len(labels) != len(known):
                raise ValueError(
                    f"labels: expected {len(known)} names as in the model's head, "
                    f"got {list(labels)}"
                )
            names = known if labels is None else tuple(labels)
            return Description(names, self._pooling(pooling), "model")
        names = tuple(labels or ())
        if len(names) < 2 or len(set(names)) < len(names):
            raise ValueError(f"labels: expected at least 2 different names, got {list(names)}")
        return Description(names, self._pooling(pooling), "linear", float(head_dropout))

    def _pooling(self, pooling: str | None) -> str | None:
        if pooling is not None:
            raise ValueError(f"pooling: expected None for task {self.task}, got {pooling!r}")
        return None

    def _check_own_head(self, head_dropout: float) -> None:
        if head_dropout:
            raise ValueError(
                f"head_dropout: expected 0 with the model's own head, got {head_dropout}"
            )
        for name, parameter in self.base_head.named_parameters():
            if parameter.is_meta:
                raise ValueError(
                    f"model: expected a head on a device, got {name} offloaded, with no values to "
                    f"train (name a device for it in the device_map)"
                )
            if not parameter.is_floating_point():
                raise ValueError(
                    f"model: expected a head that can be trained, got {name} quantised to "
                    f"{parameter.dtype} (leave it out of the quantisation)"
                )

    def _new_head(self, description: Description, generator: torch.Generator | None) -> nn.Module:
        if description.head == "model":
            return _trainable_copy(self.base_head)
        width, count = output_width(self.encoder), len(description.labels or ())
        head = nn.Linear(width, count)
        head.weight = nn.Parameter(torch.randn(count, width, generator=generator) * 0.02)
        nn.init.zeros_(head.bias)
        return head

    def _place(self, head: nn.ModuleDict) -> None:
        for name, module in head.items():
            setattr(self.backbone, name, module)

    def _place_active(self) -> None:
        super()._place_active()
        active = bool(self.active_adapter) and not self._disabled
        own = active and self.description.head == "model"
        self._place(self.head if own else self.base_head)  # type: ignore[arg-type]

    def _linear(self, values: Tensor) -> Tensor:
        """Logits of a linear head in float32, from the encoder's values ``[..., h]``."""
        head: Any = self.head
        p = self.description.head_dropout
        values = F.dropout(values.to(head.weight.dtype), p, self.training)
        return head(values).float()  # type: ignore[no-any-return]


def _trainable_copy(head: nn.ModuleDict) -> nn.ModuleDict:
    """Of a head in half precision one in float32, where small steps are not rounded away."""
    copied = copy.deepcopy(head)
    for module in copied.values():
        dtypes = {p.dtype for p in module.parameters()}
        if dtypes - {torch.float32, torch.float64}:
            module.float().register_forward_pre_hook(_in_float32)
    return copied


def _in_float32(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.float() if isinstance(a, Tensor) else a for a in args)


class EPTModelForSequenceClassification(_Headed):
    """A prompt before a model that classifies whole texts. ``labels`` are ``[B]`` integers.

    With the model's own head also those of its regression ([B] floats) or of several classes at
    once ([B, C] floats). ``logits`` are ``[B, C]``.
    """

    task = "SEQ_CLS"
    accepts_loss_kwargs = False

    def _pooling(self, pooling: str | None) -> str | None:
        chosen = pooling or ("model" if self.base_head else "mean")
        check_choice("pooling", chosen, POOLINGS)
        if chosen == "model" and self.base_head and reads_last_column(self.backbone):
            raise ValueError(
                f'pooling: expected "mean", "first" or "last" for {type(self.backbone).__name__}, '
                f"whose own head reads the last column, padding or not, got {pooling!r}"
            )
        return chosen

    def _run(self, text: Text, labels: Tensor | None, kwargs: dict[str, Any]) -> Any:
        text = text.compacted()
        inputs, order = self._inputs_in_order(text, kwargs, compact=True)
        if self.description.head == "linear":
            output = self.encoder(**inputs)
            logits = self._linear(self._pool(output, order, text.attention_mask))
        elif "score" in self.base_head:
            # A decoder's own forward would take the last column, padded or not.
            output = self.encoder(**inputs)
            hidden = self._of_text(output.last_hidden_state, order)
            score: Any = self.backbone.score
            logits = score(_text_value(hidden, text.attention_mask, "last")).float()
        else:
            output = self.backbone(**inputs)
            logits = output.logits
        loss = None if labels is None else self._loss(logits, labels)
        return SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=getattr(output, "hidden_states", None),
            attentions=getattr(output, "attentions", None),
        )

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """By the kind of labels, as the model's config says or its head's width."""
        kind = getattr(self.config, "problem_type", None) if self.base_head else None
        if kind == "regression" or (kind is None and logits.shape[-1] == 1):
            return F.mse_loss(logits.squeeze(-1).float(), labels.squeeze(-1).float())
        if kind == "multi_label_classification" or labels.is_floating_point():
            return F.binary_cross_entropy_with_logits(logits.float(), labels.float())
        return F.cross_entropy(logits.float(), labels.view(-1))

    def _pool(self, output: Any, order: Tensor | None, mask: Tensor) -> Tensor:
        pooling = self.pooling
        if pooling == "model":
            pooled: Tensor | None = getattr(output, "pooler_output", None)
            if pooled is None:
                raise ValueError(
                    f'pooling: expected a backbone with a pooler for "model", '
                    f"got {type(self.backbone).__name__}"
                )
            return pooled
        assert pooling is not None
        return _text_value(self._of_text(output.last_hidden_state, order), mask, pooling)


def _text_value(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """``[B, h]`` of hidden states ``[B, S, h]`` of rows padded on the right."""
    if pooling == "first":
        return hidden[:, 0]
    counts = (mask != 0).sum(-1, keepdim=True)
    if pooling == "last":
        last = (counts - 1).clamp_min(0).unsqueeze(-1)
        return hidden.gather(1, last.expand(-1, -1, hidden.shape[-1])).squeeze(1)
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    weights = mask.to(hidden.dtype)
    # A row of padding only pools to zero.
    return (weights.unsqueeze(1) @ hidden).squeeze(1) / counts.clamp_min(1)


class EPTModelForTokenClassification(_Headed):
    """A prompt before a model that classifies tokens. ``labels`` are ``[B, S]``, -100 left out."""

    task = "TOKEN_CLS"

    def _run(self, text: Text, labels: Tensor | None, kwargs: dict[str, Any]) -> Any:
        num_items = kwargs.pop("num_items_in_batch", None)
        text = text.compacted()
        inputs, order = self._inputs_in_order(text, kwargs, compact=True)
        if self.description.head == "linear":
            output = self.encoder(**inputs)
            logits = self._linear(self._of_text(output.last_hidden_state, order))
        else:
            output = self.backbone(**inputs)
            logits = self._of_text(output.logits, order)
        logits = text.restore(logits)
        return TokenClassifierOutput(
            loss=None if labels is None else token_loss(logits, labels, num_items),
            logits=logits,
            hidden_states=getattr(output, "hidden_states", None),
            attentions=getattr(output, "attentions", None),
        )
