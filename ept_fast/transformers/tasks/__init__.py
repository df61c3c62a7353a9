"""Prompts before frozen models: one class for each task, and the function that picks it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ept_fast.config import PromptConfig, check_choice
from ept_fast.transformers import TASKS
from ept_fast.transformers.model import EPTModel
from ept_fast.transformers.tasks.causal_lm import EPTModelForCausalLM
from ept_fast.transformers.tasks.feature_extraction import EPTModelForFeatureExtraction
from ept_fast.transformers.tasks.seq2seq_lm import EPTModelForSeq2SeqLM
from ept_fast.transformers.tasks.sequence_classification import EPTModelForSequenceClassification
from ept_fast.transformers.tasks.token_classification import EPTModelForTokenClassification

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
    text: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    prototypes: str = "kmeans",
    prototype_layer: int | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    base_model: str | None = None,
    backend: str | None = None,
) -> EPTModel:
    """Freeze a model, put a trainable prompt before it, and a trainable head if the task has one.

    Any architecture will do whose forward takes ``inputs_embeds`` and ``attention_mask``. The model
    is not copied: ``unload()`` gives it back as it was.

    Args:
        model: a ``transformers`` model of the kind that the task needs: for ``"SEQ_2_SEQ_LM"`` an
            encoder-decoder (the prompt goes before the encoder's text), for ``"CAUSAL_LM"`` a
            decoder with its language-model head, for ``"SEQ_CLS"`` and ``"TOKEN_CLS"`` a bare
            model or one with a head for the task, for ``"FEATURE_EXTRACTION"`` a bare model. Or a
            ``PeftModel`` of such a model, with LoRA or another method that works by layers: what
            it trains is trained with the prompt.
        config: sizes and choices of the prompt; ``hidden_size`` is the width of the embeddings.
        task: ``"SEQ_CLS"``, ``"TOKEN_CLS"``, ``"CAUSAL_LM"``, ``"SEQ_2_SEQ_LM"`` or
            ``"FEATURE_EXTRACTION"``.
        adapter_name: name of this adapter.
        labels: names of the classes, in the order of the logits; a single one for a regression. A
            bare model gets a linear head for them. A model with a head for the task keeps it (a
            copy of it is trained); they are ``config.id2label`` then.
        pooling: for ``"SEQ_CLS"``, what a linear head sees: ``"mean"`` over the text's real tokens,
            the ``"first"`` or the ``"last"`` of them, or ``"model"``, the bare model's own
            ``pooler_output``. For a model with a head, ``"model"`` is that head: an encoder's reads
            what it always reads (BERT's the first position, a prompt token now), a decoder's the
            last real token. Default: ``"model"`` with a head, ``"mean"`` without.
        head_dropout: dropout probability before a linear head.
        init, text, tokenizer, prototypes, generator, dtype: as in :class:`ept_fast.FusedEPTPrompt`.
        prototype_layer: for ``init="data"``, which states the prototypes are of: None for the
            embeddings of the texts' tokens, i for the input of the model's layer i, counted from 0
            (of an encoder-decoder, of the encoder), in one pass of the frozen model over the texts
            with the special tokens that the tokenizer adds. ``offset_b`` then starts from rows of
            the vocabulary.
        base_model: folder or hub id of the model, saved with adapters; by default found
            from the model.
        backend: as in :func:`ept_fast.reconstruct_prompt`.

    Raises:
        TypeError: a model that cannot be called with embeddings or lacks what the task needs; a
            method of PEFT that does not work by its layers alone.
        ValueError: an unknown task, labels or sizes that do not fit; an adapter of PEFT that cannot
            be trained or saved under a prompt.

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
    wrapped: EPTModel = EPTModel.of_task(task)(model, base_model=base_model, backend=backend)
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
            prototypes=prototypes,
            prototype_layer=prototype_layer,
            generator=generator,
            dtype=dtype,
        )
    except BaseException:
        wrapped.unload()
        raise
    return wrapped.train()
