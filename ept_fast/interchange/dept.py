"""DePT's checkpoints (Shi and Lipani, ICLR 2024), which its own version of PEFT writes."""

from __future__ import annotations

import warnings
from pathlib import Path

from torch import nn

from ept_fast.config import EPTConfig
from ept_fast.interchange.folder import (
    PROMPT,
    AdapterConfig,
    first_prompt,
    naming,
    open_state,
)
from ept_fast.prompts.ept import FusedEPTPrompt
from ept_fast.storage.untrusted import CheckpointError, shorten

__all__ = ["import_dept"]

_LOW_RANK = ("prompt_encoder.lora_embedding_A", "prompt_encoder.lora_embedding_B")
# What DePT's own loader asks before it takes a matrix from the file.
_LOADED = ("load_lora_embeddings", "load_lora_embedding_B")


def import_dept(
    folder: str | Path,
    embedding: nn.Module | None = None,
    *,
    prompt_only: bool = False,
    backend: str | None = None,
) -> FusedEPTPrompt:
    """A DePT checkpoint as an EPT prompt without fusion and subspaces.

    DePT puts the short prompt before the text and adds lora_alpha / sqrt(r) · A·B to the text's
    embeddings, row s of it to column s, in batches that are padded to ``max_length``. With padding
    on the right a real token's column is its rank, so the outputs are the same here, at any
    amount of padding.

    Args:
        folder: with ``adapter_config.json`` (``peft_type`` PROMPT_TUNING_LORA) and
            ``adapter_model.bin`` or ``adapter_model.safetensors``.
        embedding: the backbone's embedding layer; without it the prompt takes ``inputs_embeds``
            until :meth:`~ept_fast.FusedEPTPrompt.set_input_embeddings` gives it one.
        prompt_only: leave out the tensors of a classification head, which are an error otherwise.
        backend: as in :func:`ept_fast.reconstruct_prompt`.

    Returns:
        The prompt, each tensor in the type it was saved in; its sizes in ``.config``.

    Raises:
        CheckpointError: missing or damaged files, another kind of adapter, no low-rank matrices,
            or sizes at odds with the config.
        ValueError: the embedding layer has another width.

    Example:
        >>> prompt = import_dept("cola", model.get_input_embeddings())  # doctest: +SKIP
    """
    folder = Path(folder)
    given = AdapterConfig.read(folder, "PROMPT_TUNING_LORA", {"PROMPT_TUNING": "import_peft"})
    width = given.count("token_dim", 1)
    short = given.count("num_virtual_tokens", 1)
    length = given.count("max_length", 1)
    rank = given.count("r", 0)
    for name in _LOADED:
        if given.values.get(name, True) is not True:
            raise CheckpointError(
                f"{given.path}: {name}: expected true (DePT itself would leave the matrix in the "
                f"file and start from an untrained one), got {shorten(given.values[name])}"
            )
    with naming(given.path):
        config = EPTConfig(
            width,
            num_virtual_tokens=short,
            max_length=length,
            rank=rank,
            num_spaces=0,
            alpha=given.number("lora_alpha"),
            fusion=False,
        )
    expected = {
        PROMPT: (given.copies * short, width),
        _LOW_RANK[0]: (length, rank),
        _LOW_RANK[1]: (rank, width),
    }
    state = open_state(folder)
    missing = [name for name in _LOW_RANK if name not in state.shapes]
    if missing:
        raise CheckpointError(
            f"{state.path}: expected DePT's low-rank matrices {', '.join(_LOW_RANK)}, got none "
            f"for {', '.join(missing)} (saved with save_lora_embeddings off?)"
        )
    tensors = state.load(expected, others=prompt_only)
    if given.task_type == "CAUSAL_LM":
        warnings.warn(
            f"{given.path}: task_type CAUSAL_LM: DePT pads such text on the left, so that the "
            f"offset of a token depended on the length of its text in training; here it does not",
            stacklevel=2,
        )
    values = {"short_prompt": first_prompt(tensors[PROMPT], short)}
    if rank:
        values["offset_a"], values["offset_b"] = (tensors[name] for name in _LOW_RANK)
    return FusedEPTPrompt.from_tensors(config, values, embedding, backend=backend)
