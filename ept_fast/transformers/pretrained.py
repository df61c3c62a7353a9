"""What callers ask of a model of ``transformers``: Trainer, pipelines, accelerate and users."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import GenerationMixin

from ept_fast.prompts.embedding import embedding_device

__all__ = ["PretrainedInterface"]


class PretrainedInterface:
    """Attributes and methods of ``transformers.PreTrainedModel``, for a module with a ``backbone``.

    Attributes:
        main_input_name: the argument that holds the tokens.
        input_modalities, output_modalities: what the model reads and generates.
        model_tags: tags for a model card, or None.
    """

    main_input_name: ClassVar[str] = "input_ids"
    input_modalities: ClassVar[str] = "text"
    output_modalities: ClassVar[str] = "text"

    backbone: Any
    base_model_name: str | None
    model_tags: list[str] | None = None

    @property
    def config(self) -> Any:
        """The backbone's config itself, so what is written to it counts.

        ``id2label``, ``label2id`` and ``num_labels`` are the active adapter's, if it has labels.
        They are the backbone's own again within :meth:`disable_adapter` and after :meth:`unload`.
        """
        return self.backbone.config

    @property
    def generation_config(self) -> Any:
        """The backbone's generation config, or None."""
        return getattr(self.backbone, "generation_config", None)

    @property
    def device(self) -> torch.device:
        """The device of the token embeddings; of offloaded ones, that to which they are brought."""
        return embedding_device(self.get_input_embeddings())

    @property
    def dtype(self) -> torch.dtype:
        """Type of the token embeddings."""
        return self.get_input_embeddings().weight.dtype  # type: ignore[no-any-return]

    @property
    def name_or_path(self) -> str:
        """Folder or hub id of the backbone; empty if it has none."""
        return self.base_model_name or ""

    @property
    def hf_device_map(self) -> dict[str, Any]:
        """Where accelerate has put the backbone's parts; no such attribute if it has not."""
        return self.backbone.hf_device_map  # type: ignore[no-any-return]

    @property
    def base_model(self) -> Any:
        """The backbone itself."""
        return self.backbone

    def get_base_model(self) -> Any:
        """The backbone itself."""
        return self.backbone

    def can_generate(self) -> bool:
        """Whether the backbone can."""
        return isinstance(self.backbone, GenerationMixin)

    def get_input_embeddings(self) -> Any:
        """The backbone's embedding layer."""
        return self.backbone.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        """The backbone's language-model head, or None."""
        find = getattr(self.backbone, "get_output_embeddings", None)
        return None if find is None else find()

    def enable_input_require_grads(self) -> None:
        """Do nothing: what the backbone reads depends on the prompt, and requires gradients."""

    def disable_input_require_grads(self) -> None:
        """Do nothing, as :meth:`enable_input_require_grads`."""

    def add_model_tags(self, tags: str | list[str]) -> None:
        """Add tags for a model card, each once."""
        given = [tags] if isinstance(tags, str) else list(tags)
        self.model_tags = list(dict.fromkeys([*(self.model_tags or []), *given]))
