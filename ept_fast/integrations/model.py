"""A frozen ``transformers`` model with prompts before it: what all tasks share."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput  # type: ignore[attr-defined]

from ept_fast.checkpoint import CheckpointError
from ept_fast.config import EPTConfig
from ept_fast.integrations import checkpointing
from ept_fast.integrations.adapters import (
    ADAPTER_FILE,
    read_adapter,
    read_config,
    read_head,
    write_adapter,
)
from ept_fast.integrations.backbones import (
    accepted_arguments,
    check_backbone,
    embedding_width,
    first_position,
    load_backbone,
    position_table,
    text_limit,
)
from ept_fast.module import EPTOutput, FoldedEPTPrompt, FusedEPTPrompt

__all__ = ["EPTModel", "Text", "replace_fields", "token_loss"]

IGNORED = -100


@dataclass(frozen=True)
class Description:
    """What an adapter is besides its tensors.

    Attributes:
        labels: names of the classes, in the order of the logits; None without a head.
        pooling: how a sequence's logits are taken; None where there is nothing to pool.
        head: ``"linear"`` (our own), ``"model"`` (a copy of the model's) or None.
        head_dropout: dropout probability before a linear head.
    """

    labels: tuple[str, ...] | None = None
    pooling: str | None = None
    head: str | None = None
    head_dropout: float = 0.0


class Text(NamedTuple):
    """The rows of a batch, maybe with their real tokens moved to the left, in their order.

    Attributes:
        input_ids: ``[B, S]``, or None where embeddings are given.
        inputs_embeds: ``[B, S, d]``, or None.
        attention_mask: ``[B, S]``.
        token_type_ids: ``[B, S]``, or None.
        order: ``[B, S]``, the column that each of the moved tokens comes from; None if not moved.
    """

    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    attention_mask: Tensor
    token_type_ids: Tensor | None
    order: Tensor | None = None

    @property
    def length(self) -> int:
        """S."""
        return int(self.attention_mask.shape[1])

    def compacted(self) -> Text:
        """The same rows, padded on the right only."""
        order = (self.attention_mask == 0).int().argsort(dim=1, stable=True)
        return Text(
            _gather(self.input_ids, order),
            _gather(self.inputs_embeds, order),
            _taken(self.attention_mask, order),
            _gather(self.token_type_ids, order),
            order,
        )

    def compact(self, values: Tensor) -> Tensor:
        """Values ``[B, S, ...]`` of the given columns, in the order of these rows."""
        return values if self.order is None else _taken(values, self.order)

    def restore(self, values: Tensor) -> Tensor:
        """Values ``[B, S, ...]`` of these rows, in the columns that were given."""
        return values if self.order is None else _taken(values, self.order.argsort(dim=1))


def _gather(values: Tensor | None, order: Tensor) -> Tensor | None:
    return None if values is None else _taken(values, order)


def _taken(values: Tensor, order: Tensor) -> Tensor:
    index = order.view(*order.shape, *[1] * (values.dim() - 2))
    return values.gather(1, index.expand(*order.shape, *values.shape[2:]))


class EPTModel(nn.Module):
    """A frozen model, named adapters of prompt and head, and one of them active.

    Made by :func:`ept_fast.get_ept_model` or :meth:`from_pretrained`; the class is the task's. The
    backbone is the user's own model: frozen, in evaluation mode also under ``.train()`` (no
    dropout), never copied, never saved. Of the adapters only the active one requires gradients.

    Attributes:
        backbone: the frozen model.
        prompts: the adapters' :class:`ept_fast.FusedEPTPrompt`, by name.
        heads: the adapters' heads, by name, where the task has one.
        base_model_name: folder or hub id of the backbone, saved with adapters; or None.
        active_adapter: name of the adapter that forward uses.
    """

    task: ClassVar[str]
    accepts_loss_kwargs = True  # transformers' Trainer then gives num_items_in_batch
    _classes: ClassVar[dict[str, type[EPTModel]]] = {}

    backbone: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "task" in vars(cls):
            EPTModel._classes[cls.task] = cls

    def __init__(
        self, model: nn.Module, *, base_model: str | None = None, backend: str | None = None
    ) -> None:
        super().__init__()
        check_backbone(model, self.task)
        self._flags = [(p, p.requires_grad) for p in model.parameters()]
        self._modes = [(m, m.training) for m in model.modules()]
        self.prompts = nn.ModuleDict()
        self.heads = nn.ModuleDict()
        self.folded = nn.ModuleDict()
        self.backbone = model.requires_grad_(False).eval()
        name = getattr(self.backbone.config, "_name_or_path", None) or None
        if base_model is None and name is not None and Path(name).is_dir():
            name = str(Path(name).resolve())
        self.base_model_name = base_model or name
        self.backend = backend
        self.active_adapter = ""
        self._descriptions: dict[str, Description] = {}
        self._accepted = accepted_arguments(model)
        self._first_position = first_position(model)
        self._has_position_table = position_table(model) is not None
        self._disabled = False
        self._checkpoints = False
        self.register_state_dict_post_hook(_keep_adapters)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_expect_adapters)  # type: ignore[no-untyped-call]

    # What a model of transformers offers

    @property
    def config(self) -> Any:
        """The backbone's config."""
        return self.backbone.config

    @property
    def generation_config(self) -> Any:
        """The backbone's generation config, or None."""
        return getattr(self.backbone, "generation_config", None)

    @property
    def device(self) -> torch.device:
        """Where the prompt is."""
        return next(self.prompt.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the token embeddings."""
        return self.get_input_embeddings().weight.dtype  # type: ignore[no-any-return]

    def get_input_embeddings(self) -> Any:
        """The backbone's embedding layer."""
        return self.backbone.get_input_embeddings()

    def get_base_model(self) -> Any:
        """The backbone itself."""
        return self.backbone

    def train(self, mode: bool = True) -> EPTModel:
        """Set the mode of prompts and heads; the backbone stays in evaluation mode."""
        super().train(mode)
        for name, child in self.named_children():
            if name not in ("prompts", "heads"):
                child.eval()
        checkpointing.set_mode(self.backbone, mode)
        for name, head in self.heads.items():
            head.train(mode and name == self.active_adapter)
        if mode:
            self.unfold()
        return self

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None
    ) -> None:
        """Recompute the backbone's layers in the backward pass, to save their activations.

        Args:
            gradient_checkpointing_kwargs: of ``torch.utils.checkpoint.checkpoint``, such as
                ``{"use_reentrant": False}``.

        Raises:
            ValueError: the backbone cannot.
        """
        checkpointing.enable(self.backbone, gradient_checkpointing_kwargs)
        self._checkpoints = True
        checkpointing.set_mode(self.backbone, self.training)

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations again."""
        if self._checkpoints:
            checkpointing.disable(self.backbone)
        self._checkpoints = False

    activation_checkpointing_disable = gradient_checkpointing_disable

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None
    ) -> None:
        """:meth:`gradient_checkpointing_enable` by its newer name."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether layers are recomputed."""
        return self._checkpoints

    # Adapters

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Names of the adapters, in the order they came."""
        return tuple(self._descriptions)

    @property
    def prompt(self) -> FusedEPTPrompt:
        """The active adapter's trainable prompt."""
        return self.prompts[self.active_adapter]  # type: ignore[return-value]

    @property
    def active_prompt(self) -> FusedEPTPrompt | FoldedEPTPrompt:
        """The active adapter's prompt, folded where :meth:`fold` was called."""
        name = self.active_adapter
        return (self.folded if name in self.folded else self.prompts)[name]  # type: ignore[return-value]

    @property
    def head(self) -> nn.Module | None:
        """The active adapter's head, or None."""
        return self._head_of(self.active_adapter)

    def _head_of(self, name: str) -> nn.Module | None:
        if name not in self.heads:  # a ModuleDict has no get()
            return None
        return self.heads[name]

    @property
    def description(self) -> Description:
        """What the active adapter is besides its tensors."""
        return self._descriptions[self.active_adapter]

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the active adapter's classes, in the order of the logits."""
        return self.description.labels or ()

    @property
    def pooling(self) -> str | None:
        """The active adapter's pooling."""
        return self.description.pooling

    @property
    def text_limit(self) -> int | None:
        """The longest text, in tokens, that the backbone has positions for; None without a limit.

        Only where positions have a table of their own is longer text an error.
        """
        return text_limit(self.backbone, self.prompt.config.num_virtual_tokens)

    def add_adapter(
        self,
        name: str,
        config: EPTConfig,
        *,
        labels: Sequence[str] | None = None,
        pooling: str | None = None,
        head_dropout: float = 0.0,
        init: str | Tensor = "vocab",
        text: str | None = None,
        tokenizer: Any = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Add an adapter; the first one becomes active.

        Args:
            name: letters, digits, ``_`` and ``-``.
            config: sizes and choices of the prompt.
            labels, pooling, head_dropout: as in :func:`ept_fast.get_ept_model`.
            init, text, tokenizer, generator, dtype: as in :class:`ept_fast.FusedEPTPrompt`.

        Raises:
            TypeError, ValueError: arguments that do not fit; the model is as before then.
        """
        self._check_name(name)
        described = self._describe(labels, pooling, head_dropout)
        limit = text_limit(self.backbone, 0) if self._has_position_table else None
        if (
            limit is not None
            and isinstance(config, EPTConfig)
            and config.num_virtual_tokens >= limit
        ):
            raise ValueError(
                f"num_virtual_tokens: expected room for text in the model's "
                f"{self.config.max_position_embeddings} positions, got {config.num_virtual_tokens}"
            )
        prompt = FusedEPTPrompt(
            config,
            self.get_input_embeddings(),
            init=init,
            text=text,
            tokenizer=tokenizer,
            generator=generator,
            dtype=dtype,
            backend=self.backend,
        )
        head = self._new_head(described, generator)
        self.prompts[name] = prompt
        if head is not None:
            self.heads[name] = head.to(next(prompt.parameters()).device)
        self._descriptions[name] = described
        self.set_adapter(self.active_adapter or name)

    def _check_name(self, name: str) -> None:
        plain = isinstance(name, str) and name.replace("_", "").replace("-", "").isalnum()
        if not plain or not name.isascii() or hasattr(nn.ModuleDict, name):
            raise ValueError(
                f"adapter_name: expected letters, digits, _ and -, and no name of a method of "
                f"ModuleDict, got {name!r}"
            )
        if name in self._descriptions:
            raise ValueError(f"adapter_name: expected a new name, got {name!r}, which is there")

    def _check_room(self, config: EPTConfig) -> None:
        if not isinstance(config, EPTConfig):
            raise TypeError(f"config: expected an EPTConfig, got {type(config).__name__}")
        most = text_limit(self.backbone, config.num_virtual_tokens)
        if self._has_position_table and most is not None and most < 1:
            raise ValueError(
                f"num_virtual_tokens: expected room for text in the model's "
                f"{self.config.max_position_embeddings} positions, got {config.num_virtual_tokens}"
            )

    def _known(self, name: str) -> str:
        if name not in self._descriptions:
            known = ", ".join(self._descriptions)
            raise ValueError(f"adapter_name: expected one of {known}, got {name!r}")
        return name

    def _describe(
        self, labels: Sequence[str] | None, pooling: str | None, head_dropout: float
    ) -> Description:
        """The checked choices of an adapter; tasks with a head have more to say."""
        for name, value in (("labels", labels), ("pooling", pooling)):
            if value is not None:
                raise ValueError(f"{name}: expected None for task {self.task}, got {value!r}")
        if head_dropout:
            raise ValueError(f"head_dropout: expected 0 for task {self.task}, got {head_dropout!r}")
        return Description()

    def _new_head(
        self, description: Description, generator: torch.Generator | None
    ) -> nn.Module | None:
        return None

    def set_adapter(self, name: str) -> None:
        """Make an adapter the active one: forward uses it, and only it requires gradients."""
        self.active_adapter = self._known(name)
        for group in (self.prompts, self.heads):
            for other, module in group.items():
                module.requires_grad_(other == name)
        self.train(self.training)

    def delete_adapter(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            ValueError: no such adapter, or the active one.
        """
        if self._known(name) == self.active_adapter:
            raise ValueError(f"adapter_name: expected one that is not active, got {name!r}")
        for group in (self.prompts, self.heads, self.folded):
            if name in group:
                del group[name]
        del self._descriptions[name]

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[EPTModel]:
        """The plain backbone, for the length of a ``with`` block."""
        before, self._disabled = self._disabled, True
        try:
            yield self
        finally:
            self._disabled = before

    def unload(self) -> Any:
        """Take the backbone out: the model that was given, as it was; this object is done with.

        Its head, the ``requires_grad`` of its parameters and its modules' modes are restored.
        """
        self.gradient_checkpointing_disable()
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        for module, mode in self._modes:
            module.training = mode
        backbone, self.backbone = self.backbone, None
        return backbone

    def fold(self) -> None:
        """Compute every adapter's prompt once, for inference; switches to evaluation mode.

        :meth:`unfold`, :meth:`train` and loading undo it.
        """
        self.eval()
        for name, prompt in self.prompts.items():
            self.folded[name] = prompt.fold()  # type: ignore[operator]

    def unfold(self) -> None:
        """Use the trainable prompts again."""
        self.folded.clear()

    # Numbers

    def parameter_counts(self) -> dict[str, int]:
        """Numbers of parameters: ``prompt`` and ``head`` (trained), ``frozen`` (the backbone)."""
        head = [] if self.head is None else list(self.head.parameters())
        trained = {id(p) for p in head}  # a head that stands in the backbone counts once
        return {
            "prompt": _count(self.prompt.parameters()),
            "head": _count(head),
            "frozen": _count(p for p in self.backbone.parameters() if id(p) not in trained),
        }

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """The trained parameters of the active adapter, and all with the backbone's."""
        counts = self.parameter_counts()
        trained = counts["prompt"] + counts["head"]
        return trained, trained + counts["frozen"]

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained, of how many."""
        trained, every = self.get_nb_trainable_parameters()
        share = 100 * trained / every
        print(f"trainable params: {trained:,} || all params: {every:,} || trainable%: {share:.4f}")

    def parameter_groups(
        self, prompt_lr: float, offset_lr: float, space_lr: float, head_lr: float
    ) -> list[dict[str, Any]]:
        """Optimizer groups of the active adapter: those of the prompt, then the head."""
        groups = self.prompt.parameter_groups(prompt_lr, offset_lr, space_lr)
        if self.head is not None:
            params = list(self.head.parameters())
            groups.append({"name": "head", "params": params, "lr": head_lr})
        return groups

    # Files

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        adapter_name: str | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Write an adapter into ``folder``: safetensors and JSON, never the backbone.

        Each file is written whole or not at all, the description last.

        Args:
            folder: made where it is missing.
            adapter_name: which adapter; the active one where not given.
            extra: further JSON values to keep in the description.

        Raises:
            ValueError: no such adapter, or a tensor holds NaN or infinity; nothing is written then.
        """
        name = self._known(adapter_name or self.active_adapter)
        folder = Path(folder)
        prompt: Any = self.prompts[name]
        module = self._head_of(name)
        head = None if module is None else module.state_dict()
        for key, tensor in (*prompt.state_dict().items(), *(head or {}).items()):
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{key}: expected finite values to save, got NaN or infinity")
        prompt.save_pretrained(folder)
        described = self._descriptions[name]
        values = {
            "task": self.task,
            "base_model": self.base_model_name,
            "base_model_type": getattr(self.config, "model_type", None),
            "labels": None if described.labels is None else list(described.labels),
            "pooling": described.pooling,
            "head": described.head,
            "head_dropout": described.head_dropout,
            "extra": dict(extra or {}),
        }
        write_adapter(folder, head, values, prompt.config)

    def load_pretrained(self, folder: str | Path) -> None:
        """Read an adapter of the same task, sizes and labels into the active one.

        Raises:
            CheckpointError: a missing, damaged or mismatched file; the model is unchanged then.
        """
        folder = Path(folder)
        described = self._read_description(folder)
        if described.labels != self.description.labels:
            raise CheckpointError(
                f"{folder / ADAPTER_FILE}: labels: expected {self.description.labels}, "
                f"got {described.labels}"
            )
        self._load(folder, self.active_adapter)

    def load_adapter(self, folder: str | Path, name: str) -> None:
        """Add an adapter that :meth:`save_pretrained` wrote, under this name.

        Raises:
            CheckpointError: a missing, damaged or foreign file, another task or backbone; the model
                is as before then.
        """
        folder = Path(folder)
        self._check_name(name)
        described = self._read_description(folder)
        config = read_config(folder, embedding_width(self.backbone))
        before = self.active_adapter
        self.add_adapter(
            name,
            config,
            labels=described.labels,
            pooling=described.pooling,
            head_dropout=described.head_dropout,
            init=torch.zeros(config.num_virtual_tokens + config.rank, config.hidden_size),
            generator=torch.Generator(),  # every value is replaced; the global one stays as it is
        )
        try:
            self._load(folder, name)
        except BaseException:
            self.active_adapter = before
            self.delete_adapter(name)
            raise

    def _read_description(self, folder: Path) -> Description:
        values = read_adapter(folder)
        kind = getattr(self.config, "model_type", None)
        for key, expected in (("task", self.task), ("base_model_type", kind)):
            if values[key] != expected:
                raise CheckpointError(
                    f"{folder / ADAPTER_FILE}: {key}: expected {expected!r} as in this model, "
                    f"got {values[key]!r}"
                )
        labels = None if values["labels"] is None else tuple(values["labels"])
        return Description(labels, values["pooling"], values["head"], values["head_dropout"])

    def _load(self, folder: Path, name: str) -> None:
        prompt: Any = self.prompts[name]
        head = self._head_of(name)
        tensors = {} if head is None else read_head(folder, head)
        prompt.load_pretrained(folder)
        if head is not None:
            head.load_state_dict(tensors)
        self.unfold()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        model: nn.Module | None = None,
        *,
        base_model: str | None = None,
        adapter_name: str = "default",
        backend: str | None = None,
    ) -> EPTModel:
        """The model of a saved adapter, of the class of its task, in evaluation mode.

        Args:
            folder: the adapter.
            model: the frozen model, where it is already loaded.
            base_model: where to load it from, in place of the name saved with the adapter.
            adapter_name: the adapter's name.
            backend: as in :func:`ept_fast.reconstruct_prompt`.

        Raises:
            CheckpointError: a missing, damaged or foreign file, or another model than it was
                trained on.
            ValueError: the model cannot be found.
        """
        values = read_adapter(folder)
        if cls is not EPTModel and cls.task != values["task"]:
            raise CheckpointError(
                f"{Path(folder) / ADAPTER_FILE}: task: expected {cls.task!r}, "
                f"got {values['task']!r}"
            )
        name = base_model or values["base_model"]
        if model is None:
            if name is None:
                raise ValueError(f"base_model: expected a folder or hub id, {folder} names none")
            labels = tuple(values["labels"] or ()) if values["head"] == "model" else None
            model = load_backbone(name, values["task"], labels=labels)
        chosen = EPTModel._classes[values["task"]](model, base_model=name, backend=backend)
        chosen.load_adapter(folder, adapter_name)
        return chosen.eval()

    # Forward

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The backbone's output behind the active prompt; what belongs to a token is the text's.

        Args:
            input_ids: ``[B, S]`` integers, padded on either side; or else ``inputs_embeds``.
            attention_mask: ``[B, S]`` of 0 and 1; ones where it is not given.
            inputs_embeds: ``[B, S, d]``, as the backbone's embedding layer gives them.
            token_type_ids: ``[B, S]`` integers, for backbones that have them.
            labels: what the task is trained on; gives the output a ``loss``.
            **kwargs: handed on to the backbone.

        Returns:
            The backbone's output class, with ``logits`` or ``last_hidden_state`` of the text alone:
            ``[B, S, ...]``. Hidden states and attentions, where asked for, are those of the row
            that the backbone saw: prompt and text, padded on the right.

        Raises:
            TypeError, ValueError: inputs that do not fit, by name; more positions than the backbone
                has, or than the offset covers.
            IndexError: an id outside the vocabulary.
        """
        if self._disabled:
            given = {"token_type_ids": token_type_ids, "labels": labels}
            kwargs |= {name: value for name, value in given.items() if value is not None}
            return self.backbone(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                **kwargs,
            )
        for name in ("position_ids", "past_key_values"):
            if kwargs.pop(name, None) is not None:
                hint = "they follow from the mask" if name == "position_ids" else "see generate()"
                raise ValueError(f"{name}: expected None ({hint}), got one")
        kwargs.pop("return_dict", None)
        found = input_ids if input_ids is not None else inputs_embeds
        if found is None:
            raise ValueError("input_ids, inputs_embeds: expected one of them, got none")
        if attention_mask is None:
            attention_mask = torch.ones(found.shape[:2], dtype=torch.int64, device=found.device)
        text = Text(input_ids, inputs_embeds, attention_mask, token_type_ids)
        self._check_length(found.shape[1])
        return self._run(text, labels, kwargs)

    def _check_length(self, length: int) -> None:
        limit = self.text_limit if self._has_position_table else None
        if limit is not None and length > limit:
            raise ValueError(
                f"input_ids: expected at most {limit} positions (the model's "
                f"{self.config.max_position_embeddings} without the prompt's "
                f"{self.prompt.config.num_virtual_tokens}), got {length}"
            )

    def _run(self, text: Text, labels: Tensor | None, kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError

    def splice(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        task_ids: Tensor | None = None,
    ) -> EPTOutput:
        """The active prompt before the text, as :meth:`ept_fast.FusedEPTPrompt.forward`."""
        prompt: Callable[..., EPTOutput] = self.active_prompt
        return prompt(input_ids, inputs_embeds, attention_mask, task_ids)

    def _inputs(self, text: Text, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments that the backbone is called with."""
        task_ids = kwargs.pop("task_ids", None)
        spliced = self.splice(text.input_ids, text.inputs_embeds, text.attention_mask, task_ids)
        inputs: dict[str, Any] = {
            "inputs_embeds": spliced.inputs_embeds,
            "attention_mask": spliced.attention_mask,
            "return_dict": True,
        }
        if "position_ids" in self._accepted:
            inputs["position_ids"] = spliced.position_ids + self._first_position
        if text.token_type_ids is not None and "token_type_ids" in self._accepted:
            m = self.prompt.config.num_virtual_tokens
            inputs["token_type_ids"] = F.pad(text.token_type_ids, (m, 0))
        if "use_cache" in self._accepted:
            inputs["use_cache"] = False
        return inputs | kwargs


def replace_fields(output: ModelOutput, **fields: Any) -> Any:
    """The same output with other values in these fields."""
    return type(output)(**{**output, **fields})


def token_loss(logits: Tensor, labels: Tensor, num_items: Any = None) -> Tensor:
    """Mean cross-entropy in float32 over the labels that are not -100.

    Args:
        logits: ``[B, S, C]``.
        labels: ``[B, S]`` integers.
        num_items: number of labels to divide the sum by, where the batch is part of a larger one.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    reduction = "mean" if num_items is None else "sum"
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction=reduction)
    return loss if num_items is None else loss / num_items


def _count(parameters: Iterable[nn.Parameter]) -> int:
    """Numbers held, also by quantised parameters, which pack several into an element."""
    total = 0
    for parameter in parameters:
        state = getattr(parameter, "quant_state", None)
        total += parameter.numel() if state is None else math.prod(state.shape)
    return total


def _keep_adapters(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """A state dict holds prompts and heads, never backbone weights."""
    kept = (f"{prefix}prompts.", f"{prefix}heads.")
    for key in [k for k in state if k.startswith(prefix) and not k.startswith(kept)]:
        del state[key]


def _expect_adapters(module: nn.Module, keys: Any) -> None:
    """So they are not missed where one is loaded."""
    frozen = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    frozen |= {name for name, _ in module.named_buffers(remove_duplicate=False)}
    frozen = {name for name in frozen if not name.startswith(("prompts.", "heads."))}
    keys.missing_keys[:] = [k for k in keys.missing_keys if not _ends_in(k, frozen)]


def _ends_in(key: str, names: set[str]) -> bool:
    """Whether the key is one of the names, below whatever wraps the module."""
    parts = key.split(".")
    return any(".".join(parts[i:]) in names for i in range(len(parts)))
