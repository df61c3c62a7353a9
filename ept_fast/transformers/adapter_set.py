"""Named adapters of prompt and head, one of them active."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ept_fast.prompts.base import FoldedPrompt, Prompt
from ept_fast.transformers.peft_layers import PeftAdapter

__all__ = ["AdapterSet", "Description", "check_adapter_name"]


@dataclass(frozen=True)
class Description:
    """What an adapter is besides its tensors.

    Attributes:
        labels: names of the classes, in the order of the logits; None without a head.
        pooling: how a sequence's logits are taken; None if there is nothing to pool.
        head: ``"linear"`` (our own), ``"model"`` (a copy of the model's) or None.
        head_dropout: dropout probability before a linear head.
    """

    labels: tuple[str, ...] | None = None
    pooling: str | None = None
    head: str | None = None
    head_dropout: float = 0.0


def check_adapter_name(name: str, taken: Container[str]) -> None:
    """Raise ValueError unless the name is plain and new."""
    plain = isinstance(name, str) and name.replace("_", "").replace("-", "").isalnum()
    if not plain or not name.isascii() or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"adapter_name: expected letters, digits, _ and -, and no name of a method of "
            f"ModuleDict, got {name!r}"
        )
    if name in taken:
        raise ValueError(f"adapter_name: expected a new name, got {name!r}, which is there")


class AdapterSet(nn.Module):
    """What a model knows of its adapters; attributes as in :class:`ept_fast.EPTModel`."""

    task: ClassVar[str]
    _classes: ClassVar[dict[str, type[Any]]] = {}

    backbone: Any
    peft: PeftAdapter | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "task" in vars(cls):
            AdapterSet._classes[cls.task] = cls

    @staticmethod
    def of_task(task: str) -> type[Any]:
        """The class of a task, a subclass of :class:`ept_fast.EPTModel`."""
        return AdapterSet._classes[task]

    def __init__(self) -> None:
        super().__init__()
        self.prompts = nn.ModuleDict()
        self.heads = nn.ModuleDict()
        self.folded = nn.ModuleDict()
        self.active_adapter = ""
        self.descriptions: dict[str, Description] = {}

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Names of the adapters, in the order they came."""
        return tuple(self.descriptions)

    @property
    def prompt(self) -> Prompt:
        """The active adapter's trainable prompt."""
        return self.prompts[self.active_adapter]  # type: ignore[return-value]

    @property
    def active_prompt(self) -> Prompt | FoldedPrompt:
        """The active adapter's prompt, folded if :meth:`fold` was called.

        It looks up tokens in the embedding layer that the backbone has now.
        """
        name = self.active_adapter
        prompt: Any = (self.folded if name in self.folded else self.prompts)[name]
        layer = self.backbone.get_input_embeddings()
        if layer is not prompt.embedding:
            prompt.set_input_embeddings(layer)
        return prompt  # type: ignore[no-any-return]

    @property
    def head(self) -> nn.Module | None:
        """The active adapter's head, or None."""
        return self.head_of(self.active_adapter)

    def head_of(self, name: str) -> nn.Module | None:
        """An adapter's head, or None."""
        if name not in self.heads:  # a ModuleDict has no get()
            return None
        return self.heads[name]

    @property
    def description(self) -> Description:
        """What the active adapter is besides its tensors."""
        return self.descriptions[self.active_adapter]

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the active adapter's classes, in the order of the logits."""
        return self.description.labels or ()

    @property
    def pooling(self) -> str | None:
        """The active adapter's pooling."""
        return self.description.pooling

    def place(
        self, name: str, prompt: nn.Module, head: nn.Module | None, description: Description
    ) -> None:
        """Put a ready adapter under this name; the first one becomes active."""
        self.prompts[name] = prompt
        if head is not None:
            self.heads[name] = head
        self.descriptions[name] = description
        self.set_adapter(self.active_adapter or name)

    def known(self, name: str) -> str:
        """The name, if there is such an adapter; else ValueError."""
        if name not in self.descriptions:
            known = ", ".join(self.descriptions)
            raise ValueError(f"adapter_name: expected one of {known}, got {name!r}")
        return name

    def describe(
        self, labels: Sequence[str] | None, pooling: str | None, head_dropout: float
    ) -> Description:
        """The checked choices of an adapter; tasks with a head have more to say."""
        for name, value in (("labels", labels), ("pooling", pooling)):
            if value is not None:
                raise ValueError(f"{name}: expected None for task {self.task}, got {value!r}")
        if head_dropout:
            raise ValueError(f"head_dropout: expected 0 for task {self.task}, got {head_dropout!r}")
        return Description()

    def new_head(
        self, description: Description, generator: torch.Generator | None
    ) -> nn.Module | None:
        """An untrained head; None for tasks without one."""
        return None

    def set_adapter(self, adapter_name: str) -> None:
        """Make an adapter the active one: forward uses it, and only it requires gradients."""
        self.active_adapter = self.known(adapter_name)
        for group in (self.prompts, self.heads):
            for other, module in group.items():
                module.requires_grad_(other == adapter_name)
        self.place_active()
        self.train(self.training)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter.

        Raises:
            ValueError: no such adapter, or the active one.
        """
        if self.known(adapter_name) == self.active_adapter:
            raise ValueError(f"adapter_name: expected one that is not active, got {adapter_name!r}")
        for group in (self.prompts, self.heads, self.folded):
            if adapter_name in group:
                del group[adapter_name]
        del self.descriptions[adapter_name]

    def place_active(self) -> None:
        """Put into the backbone what it has from the active adapter, or what it has by itself."""

    def unfold(self) -> None:
        """Use the trainable prompts again."""
        self.folded.clear()

    def parameter_counts(self) -> dict[str, int]:
        """Numbers of parameters: ``prompt`` and ``head`` (trained), ``frozen`` (the backbone).

        With an adapter of PEFT also ``peft``, as many of its parameters as are trained.
        """
        head = [] if self.head is None else list(self.head.parameters())
        peft = [] if self.peft is None else self.peft.trained()
        trained = {id(p) for p in (*head, *peft)}  # what stands in the backbone counts once
        counts = {
            "prompt": _count(self.prompt.parameters()),
            "head": _count(head),
            "frozen": _count(p for p in self.backbone.parameters() if id(p) not in trained),
        }
        return counts if self.peft is None else {**counts, "peft": _count(peft)}

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """The trained parameters of the active adapter, and all with the backbone's."""
        counts = self.parameter_counts()
        every = sum(counts.values())
        return every - counts["frozen"], every

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many numbers the parameters of backbone and active adapter hold.

        Args:
            only_trainable: whether to count only those that require gradients.
            exclude_embeddings: whether to leave out the tables of ``nn.Embedding`` layers.
        """
        modules = [self.backbone, self.prompt, *([] if self.head is None else [self.head])]
        counted = {id(p): p for module in modules for p in module.parameters()}
        if exclude_embeddings:
            for layer in self.backbone.modules():
                if isinstance(layer, nn.Embedding):
                    counted.pop(id(layer.weight), None)
        return _count(p for p in counted.values() if p.requires_grad or not only_trainable)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained, of how many."""
        trained, every = self.get_nb_trainable_parameters()
        share = 100 * trained / every
        print(f"trainable params: {trained:,} || all params: {every:,} || trainable%: {share:.4f}")

    def parameter_groups(
        self,
        prompt_lr: float,
        offset_lr: float,
        space_lr: float,
        head_lr: float,
        peft_lr: float | None = None,
    ) -> list[dict[str, Any]]:
        """Optimizer groups of the active adapter: those of the prompt, the head, PEFT's weights.

        Raises:
            ValueError: no ``peft_lr`` for weights of PEFT that are trained.
        """
        groups = self.prompt.parameter_groups(prompt_lr, offset_lr, space_lr)
        if self.head is not None:
            params = list(self.head.parameters())
            groups.append({"name": "head", "params": params, "lr": head_lr})
        peft = [] if self.peft is None else self.peft.trained()
        if peft and peft_lr is None:
            raise ValueError("peft_lr: expected a learning rate for the weights of PEFT, got None")
        if peft:
            groups.append({"name": "peft", "params": peft, "lr": peft_lr})
        return groups


def _count(parameters: Iterable[nn.Parameter]) -> int:
    """Numbers held, also by quantised parameters, which pack several into an element."""
    total = 0
    for parameter in parameters:
        state = getattr(parameter, "quant_state", None)
        total += parameter.numel() if state is None else math.prod(state.shape)
    return total
