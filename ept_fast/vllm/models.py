"""vLLM's own model classes with a layer for prompts before them, made by name when asked for."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_pp_group
from vllm.model_executor.models.interfaces import SupportsLoRA

from ept_fast.interchange.vllm import LAYER
from ept_fast.vllm import ARCHITECTURES, PREFIX, SIZES, Sizes, check_version
from ept_fast.vllm.layer import PromptedEmbedding

check_version()


class _Prompted:
    """What stands before a model class in its subclass."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        _check(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        model, lora = vllm_config.model_config, vllm_config.lora_config
        self.ept = PromptedEmbedding(
            Sizes(**vllm_config.additional_config[SIZES]),
            lora.max_loras,
            model.get_hidden_size(),
            vllm_config.scheduler_config.max_num_batched_tokens,
            model.dtype,
            torch.get_default_device(),  # as for the model's own parameters
        )

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Any:
        if get_pp_group().is_first_rank:
            own: Any = self
            inputs_embeds = self.ept(input_ids, positions, own.embed_input_ids)
            input_ids = None
        above: Any = super()
        return above.forward(input_ids, positions, intermediate_tensors, inputs_embeds)


def _check(config: Any) -> None:
    """Raise ValueError for an engine whose tokens would not all get their prompts and offsets."""
    if config.lora_config is None or SIZES not in config.additional_config:
        raise ValueError(
            "enable_lora, additional_config: expected those of ept_fast.vllm.engine_arguments, "
            "got others"
        )
    if config.model_config.enable_prompt_embeds:
        raise ValueError("enable_prompt_embeds: expected False beside adapters, got True")


@functools.cache
def _model_class(architecture: str) -> Any:
    module = importlib.import_module(f"vllm.model_executor.models.{ARCHITECTURES[architecture]}")
    base = getattr(module, architecture)
    name = f"{PREFIX}{architecture}"
    protocol = () if SupportsLoRA in base.__mro__ else (SupportsLoRA,)
    return type(
        name,
        (_Prompted, base, *protocol),
        {
            "__module__": __name__,
            "__qualname__": name,
            "__doc__": f"{architecture} behind prompts.",
            "embedding_modules": {**getattr(base, "embedding_modules", {}), LAYER: LAYER},
            "packed_modules_mapping": getattr(base, "packed_modules_mapping", {}),
        },
    )


def __getattr__(name: str) -> Any:
    architecture = name.removeprefix(PREFIX)
    if name == architecture or architecture not in ARCHITECTURES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _model_class(architecture)
