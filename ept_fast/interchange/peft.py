"""Prompt-tuning adapters of PEFT, in and out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize_tensors
from torch import Tensor, nn

from ept_fast.config import EPTConfig, check_choice
from ept_fast.interchange.folder import (
    CONFIG_FILE,
    PROMPT,
    TASK_TYPES,
    TENSOR_FILE,
    AdapterConfig,
    first_prompt,
    naming,
    open_state,
)
from ept_fast.interchange.folding import FoldedValues, fold_values, product
from ept_fast.prompts.base import FoldedPrompt, Prompt
from ept_fast.prompts.ept import FusedEPTPrompt
from ept_fast.storage.files import json_bytes, write_files

__all__ = ["export_peft", "import_peft"]

# Tasks for which PEFT trains a head and refuses to load an adapter without one.
_WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def import_peft(
    folder: str | Path,
    embedding: nn.Module | None = None,
    *,
    prompt_only: bool = False,
    backend: str | None = None,
) -> FusedEPTPrompt:
    """A prompt-tuning adapter of PEFT as an EPT prompt with rank 0 and no subspaces.

    Args:
        folder: with ``adapter_config.json`` (``peft_type`` PROMPT_TUNING) and
            ``adapter_model.safetensors`` or ``adapter_model.bin``.
        embedding: the backbone's embedding layer; without it the prompt takes ``inputs_embeds``
            until :meth:`~ept_fast.FusedEPTPrompt.set_input_embeddings` gives it one.
        prompt_only: leave out the tensors of a classification head, which are an error otherwise.
        backend: as in :func:`ept_fast.reconstruct_prompt`.

    Returns:
        The prompt in the type it was saved in; its sizes in ``.config``. Of an encoder-decoder's
        adapter with two prompts, the encoder's: PEFT uses no other.

    Raises:
        CheckpointError: missing or damaged files, another kind of adapter (LoRA, prefix tuning,
            P-tuning), or sizes at odds with the config.
        ValueError: the embedding layer has another width.
    """
    folder = Path(folder)
    given = AdapterConfig.read(folder, "PROMPT_TUNING", {"PROMPT_TUNING_LORA": "import_dept"})
    width = given.count("token_dim", 1)
    short = given.count("num_virtual_tokens", 1)
    with naming(given.path):
        config = EPTConfig(width, num_virtual_tokens=short, rank=0, num_spaces=0)
    expected = {PROMPT: (given.copies * short, width)}
    tensors = open_state(folder).load(expected, others=prompt_only)
    values = {"short_prompt": first_prompt(tensors[PROMPT], short)}
    return FusedEPTPrompt.from_tensors(config, values, embedding, backend=backend)


def export_peft(
    prompt: Prompt | FoldedPrompt,
    folder: str | Path,
    *,
    base_model: str | None,
    task_type: str,
    task: int | None = None,
    modules: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the reconstructed prompt as a prompt-tuning adapter that PEFT loads.

    PEFT puts a constant prompt before the text and does nothing to the text, so this is for
    prompts whose offset is zero: rank 0, or one that was never trained.

    Args:
        prompt: trainable or folded.
        folder: made if it is missing; each file is written whole or not at all.
        base_model: the backbone's folder or hub id, for PEFT's ``AutoPeftModel``; or None.
        task_type: PEFT's name of the task, one of SEQ_CLS, SEQ_2_SEQ_LM, CAUSAL_LM, TOKEN_CLS,
            QUESTION_ANS, FEATURE_EXTRACTION.
        task: which prompt of a bank.
        modules: weights of modules at the top of the backbone that were trained too, by their
            names in it (``classifier.weight``); needed for the tasks with a head.

    Raises:
        ValueError: the offset is not zero, so that the text's part of the prompt would be lost;
            a bank without ``task``; a head that is missing; values that are not finite.

    Example:
        >>> export_peft(prompt, "adapter", base_model="t5-base",
        ...             task_type="SEQ_2_SEQ_LM")  # doctest: +SKIP
    """
    check_choice("task_type", task_type, TASK_TYPES)
    modules = dict(modules or {})
    if task_type in _WITH_HEAD and not modules:
        raise ValueError(
            f"modules: expected the weights of the head for task_type {task_type}, without which "
            f"PEFT loads no such adapter, got none"
        )
    values = fold_values(prompt, task)
    _check_offset(values)
    config: dict[str, Any] = {
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": values.prompt.shape[0],
        "peft_type": "PROMPT_TUNING",
        "prompt_tuning_init": "RANDOM",  # how it would start anew; the tensor replaces it
        "task_type": task_type,
        "token_dim": values.prompt.shape[1],
    }
    if modules:
        config["modules_to_save"] = sorted({name.partition(".")[0] for name in modules})
    tensors = {PROMPT: values.prompt}
    tensors |= {f"base_model.{name}": t for name, t in modules.items()}
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name}: expected finite values to save, got NaN or infinity")
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_files(
        {
            Path(folder) / TENSOR_FILE: serialize_tensors(plain, metadata={"format": "pt"}),
            Path(folder) / CONFIG_FILE: json_bytes(config),
        }
    )


def _check_offset(values: FoldedValues) -> None:
    if values.offset is None:
        return
    offset = product(values.offset)
    rows = int(offset.any(-1).sum())
    if not rows:
        return
    raise ValueError(
        f"prompt: expected rank 0 or an offset of zeros, as PEFT's prompt tuning has no place for "
        f"one, got an offset on {rows} of {len(offset)} text positions with values up to "
        f"{offset.abs().max():.3g} that would be lost (export_plain keeps it)"
    )
