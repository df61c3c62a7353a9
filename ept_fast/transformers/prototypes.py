"""Prototypes of the states inside a frozen language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ept_fast.config import PromptConfig
from ept_fast.prompts.initial import padded, token_rows
from ept_fast.prompts.prototypes import collect_prototypes
from ept_fast.transformers.backbone import Profile
from ept_fast.transformers.padding import ranks_of
from ept_fast.transformers.states import reader_of

__all__ = ["layer_prototypes"]


@torch.no_grad()
def layer_prototypes(
    backbone: Any,
    layer: int,
    config: PromptConfig,
    how: str,
    texts: Any,
    tokenizer: Any,
    generator: torch.Generator | None,
) -> Tensor:
    """Rows of :func:`ept_fast.from_prototypes`, of the input of one of the backbone's layers.

    The texts get the special tokens that the tokenizer adds, and are cut to the positions that the
    backbone has and to the prompt's ``max_length``. Only texts that something was drawn of are
    read, each once.

    Args:
        backbone: a model of ``transformers`` in evaluation mode; of an encoder-decoder the encoder
            is taken, and of a model with a head what is below it.
        layer: from 0 on.
        config: of the prompt, with m and the width that is expected.
        how, generator: as there.
        texts: a sequence of strings.
        tokenizer: for these.

    Returns:
        ``[m, d]``, float32 on the CPU; as many rows as the method starts from if it has no offset.

    Raises:
        ValueError: texts that do not fit, no such layer, or states of another width.
    """
    reader = reader_of(backbone)
    profile = Profile.of(reader)
    most = min(config.max_length, profile.table_limit(0) or config.max_length)
    cut = {"truncation": True, "max_length": most} if most < PromptConfig.max_length else {}
    rows = token_rows(texts, tokenizer, **cut)
    embedding = backbone.get_input_embeddings()

    def states_of(numbers: Tensor) -> tuple[Tensor, Tensor]:
        ids, mask = (part.to(reader.device) for part in padded([rows[i] for i in numbers.tolist()]))
        inputs = profile.inputs(embedding(ids), mask, ranks_of(mask), use_cache=False)
        states = reader(**inputs, output_hidden_states=True).hidden_states
        if layer >= len(states) - 1:  # the last are the output of the last layer
            raise ValueError(
                f"prototype_layer: expected a layer from 0 to {len(states) - 2}, got {layer}"
            )
        if states[layer].shape[-1] != config.hidden_size:
            raise ValueError(
                f"prototype_layer: expected states of width hidden_size {config.hidden_size}, "
                f"got {states[layer].shape[-1]} at layer {layer}"
            )
        return states[layer], mask

    lengths = torch.tensor([len(row) for row in rows])
    # An offset is added to embeddings, so that its rows are none of these.
    count = config.num_virtual_tokens if config.rank else config.initial_rows
    return collect_prototypes(lengths, states_of, count, how, generator)
