"""What the tasks with a head share: a linear head of ours, or copies of the model's own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ept_fast.config import check_number
from ept_fast.transformers.adapter_set import Description
from ept_fast.transformers.backbone import output_width, own_head
from ept_fast.transformers.model import EPTModel

__all__ = ["HeadedModel"]

_LABELS = ("id2label", "label2id")  # fields of a config of transformers


class HeadedModel(EPTModel):
    """What the two tasks with a head share: a linear head of ours, or copies of the model's own.

    The active adapter's copy stands in the model in place of the original, which waits in
    ``base_head``.
    """

    has_head = True

    def __init__(self, model: nn.Module, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.base_head = nn.ModuleDict(own_head(self.backbone, self.task))
        self._encoder_name = self.backbone.base_model_prefix if self.base_head else ""
        self._own_labels = {name: getattr(self.config, name, None) for name in _LABELS}

    @property
    def encoder(self) -> Any:
        """The backbone without its own head."""
        return getattr(self.backbone, self._encoder_name) if self.base_head else self.backbone

    def describe(
        self, labels: Sequence[str] | None, pooling: str | None, head_dropout: float
    ) -> Description:
        check_number("head_dropout", head_dropout)
        if not 0 <= head_dropout < 1:
            raise ValueError(f"head_dropout: expected 0 <= head_dropout < 1, got {head_dropout}")
        own = bool(self.base_head) and pooling in (None, "model")
        if own:
            self._check_own_head(head_dropout)
            own_labels = self._own_labels["id2label"] or {}
            known = tuple(str(name) for _, name in sorted(own_labels.items()))
            if labels is not None and len(labels) != len(known):
                raise ValueError(
                    f"labels: expected {len(known)} names as in the model's head, "
                    f"got {list(labels)}"
                )
            names = known if labels is None else tuple(labels)
            return Description(names, self.checked_pooling(pooling), "model")
        names = tuple(labels or ())
        least = 1 if self.task == "SEQ_CLS" else 2  # a single one is a regression's
        if len(names) < least or len(set(names)) < len(names):
            raise ValueError(
                f"labels: expected different names, at least {least}, got {list(names)}"
            )
        return Description(names, self.checked_pooling(pooling), "linear", float(head_dropout))

    def checked_pooling(self, pooling: str | None) -> str | None:
        """The adapter's pooling; tasks that pool have more to say."""
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

    def new_head(self, description: Description, generator: torch.Generator | None) -> nn.Module:
        if description.head == "model":
            return _trainable_copy(self.base_head)
        width, count = output_width(self.encoder), len(description.labels or ())
        head = nn.Linear(width, count)
        head.weight = nn.Parameter(torch.randn(count, width, generator=generator) * 0.02)
        nn.init.zeros_(head.bias)
        return head

    def place_active(self) -> None:
        """Put the active adapter's copy of the model's own head, or that head, into the model.

        The names of its classes go into the model's config.
        """
        active = bool(self.active_adapter) and not self.disabled
        self.place_head(active and self.description.head == "model")
        if isinstance(self.config, PreTrainedConfig):
            ids = dict(enumerate(self.labels)) if active else {}
            names = {label: index for index, label in ids.items()}
            for field, value in zip(_LABELS, (ids, names), strict=True):
                setattr(self.config, field, value or self._own_labels[field])

    def place_head(self, own: bool) -> None:
        """Put the active adapter's own copy of the head into the model, or the model's head."""
        modules: Any = self.head if own else self.base_head
        for name, module in modules.items():
            setattr(self.backbone, name, module)

    @property
    def class_weights(self) -> Tensor | None:
        """The weights that make the logits, ``[C, h]``, of the head's last linear layer."""
        if self.description.head == "linear":
            return self.head.weight  # type: ignore[union-attr, return-value]
        modules = [getattr(self.backbone, name) for name in self.base_head]
        layers = [m for each in modules for m in each.modules() if isinstance(m, nn.Linear)]
        trained = [layer for layer in layers if layer.weight.requires_grad]  # PEFT's copies, too
        return (trained or layers)[-1].weight if layers else None

    def linear(self, values: Tensor) -> Tensor:
        """Logits of a linear head in float32, from the encoder's values ``[..., h]``."""
        head: Any = self.head
        p = self.description.head_dropout
        values = F.dropout(values.to(head.weight.dtype), p, self.training)
        return head(values).float()  # type: ignore[no-any-return]


def _trainable_copy(head: nn.ModuleDict) -> nn.ModuleDict:
    """Of a head in half precision one in float32, in which small steps are not rounded away."""
    copied = copy.deepcopy(head)
    for module in copied.values():
        dtypes = {p.dtype for p in module.parameters()}
        if dtypes - {torch.float32, torch.float64}:
            module.float().register_forward_pre_hook(_in_float32)
    return copied


def _in_float32(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.float() if isinstance(a, Tensor) else a for a in args)
