"""A frozen ``transformers`` model with prompts before it: what all tasks share."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput  # type: ignore[attr-defined]

from ept_fast.config import PromptConfig, check_choice
from ept_fast.precision import accumulation_dtype
from ept_fast.prompts.base import EPTOutput, FoldedPrompt, Prompt, prompt_class
from ept_fast.prompts.embedding import embedding_device
from ept_fast.prompts.table import offset_table
from ept_fast.storage.files import CheckpointError
from ept_fast.storage.sharded import fill, gather, reshard, writing_process
from ept_fast.storage.untrusted import shorten
from ept_fast.transformers import checkpointing
from ept_fast.transformers.adapter import (
    DESCRIPTION,
    SavedAdapter,
    adapter_files,
    describe_state,
    read_adapter,
    write_adapter,
)
from ept_fast.transformers.backbone import (
    accepted_arguments,
    cache_name,
    check_backbone,
    embedding_width,
    first_position,
    load_backbone,
    names_it,
    position_table_name,
    take_cache,
    text_limit,
)
from ept_fast.transformers.positions import check_sums, looked_up, with_offset
from ept_fast.transformers.quantised import allow_packing, prevent_packing

__all__ = [
    "Description",
    "EPTModel",
    "Text",
    "check_adapter_name",
    "keep_logits",
    "layout_of",
    "mark_layout",
    "next_labels",
    "replace_fields",
    "token_loss",
]

IGNORED = -100
_OFFSETS = ("low_rank", "table", "auto", "positions")


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
        return self.attention_mask.shape[1]

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
        descriptions: what each adapter is besides its tensors, by name.
    """

    task: ClassVar[str]
    has_head: ClassVar[bool] = False
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
        self._packing = prevent_packing(model)
        self._checkpointing = checkpointing.Own(model)
        self._flags = [(p, p.requires_grad) for p in model.parameters()]
        self._modes = [(m, m.training) for m in model.modules()]
        self.prompts = nn.ModuleDict()
        self.heads = nn.ModuleDict()
        self.folded = nn.ModuleDict()
        self.position_tables = nn.ModuleDict()
        self.backbone = model.requires_grad_(False).eval()
        name = getattr(self.backbone.config, "_name_or_path", None) or None
        if base_model is None and name is not None and Path(name).is_dir():
            name = str(Path(name).resolve())
        self.base_model_name = base_model or name
        self.backend = backend
        self.active_adapter = ""
        self.descriptions: dict[str, Description] = {}
        self._accepted = accepted_arguments(model)
        self._cache_name = cache_name(self._accepted)
        self._first_position = first_position(model)
        self._table_name = position_table_name(model)
        self.own_positions = nn.ModuleDict()  # while copies of them stand in the model
        self._disabled = False
        self._checkpoints = False
        if self._checkpointing.options is not None:
            self.gradient_checkpointing_enable(self._checkpointing.options)
        self.register_state_dict_post_hook(_keep_adapters)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_expect_adapters)  # type: ignore[no-untyped-call]

    @staticmethod
    def of_task(task: str) -> type[EPTModel]:
        """The class of a task."""
        return EPTModel._classes[task]

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
        """Where the token embeddings are, or are brought for each call where they are offloaded."""
        return embedding_device(self.get_input_embeddings())

    @property
    def dtype(self) -> torch.dtype:
        """Type of the token embeddings."""
        return self.get_input_embeddings().weight.dtype  # type: ignore[no-any-return]

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Read by DDP, which would send the frozen model's buffers before every forward.

        Its parameters are sent once, when DDP is made: where a part of them was drawn at random,
        as a pooler that no checkpoint has, the processes then agree.
        """
        return [f"backbone.{name}" for name, _ in self.backbone.named_buffers()]

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
        self,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute the backbone's layers in the backward pass, to save their activations.

        Args:
            gradient_checkpointing_kwargs: of ``torch.utils.checkpoint.checkpoint``, such as
                ``{"use_reentrant": False}``.
            every_n_layers: 1 for all layers, 2 for every second one.
            offload: whether what is kept for the recomputation goes to the CPU.

        Raises:
            ValueError: the backbone cannot.
        """
        checkpointing.enable(self.backbone, gradient_checkpointing_kwargs, every_n_layers, offload)
        self._checkpoints = True
        checkpointing.set_mode(self.backbone, self.training)

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations again."""
        if self._checkpoints:
            checkpointing.disable(self.backbone)
        self._checkpoints = False

    activation_checkpointing_disable = gradient_checkpointing_disable

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """:meth:`gradient_checkpointing_enable` by its newer name."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers, offload)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether layers are recomputed."""
        return self._checkpoints

    def check_keeps_cache(self) -> None:
        """Raise ValueError in training mode with checkpointing, where layers keep no cache."""
        if self.training and self.is_gradient_checkpointing:
            raise ValueError(
                "model: expected evaluation mode (model.eval()) where gradient checkpointing is "
                "on, as its layers keep no cache in training mode, got training mode"
            )

    # Adapters

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
        """The active adapter's prompt, folded where :meth:`fold` was called."""
        name = self.active_adapter
        return (self.folded if name in self.folded else self.prompts)[name]  # type: ignore[return-value]

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

    @property
    def text_limit(self) -> int | None:
        """The longest text, in tokens, that the backbone has positions for; None without a limit.

        Only where positions have a table of their own is longer text an error.
        """
        return text_limit(self.backbone, self.prompt.config.num_virtual_tokens)

    def add_adapter(
        self,
        name: str,
        config: PromptConfig,
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
        check_adapter_name(name, self.descriptions)
        described = self._describe(labels, pooling, head_dropout)
        limit = None if self._table_name is None else text_limit(self.backbone, 0)
        method = prompt_class(config)
        if limit is not None and config.num_virtual_tokens >= limit:
            raise ValueError(
                f"num_virtual_tokens: expected room for text in the model's "
                f"{self.config.max_position_embeddings} positions, got {config.num_virtual_tokens}"
            )
        prompt = method(
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
        if head is not None:
            head.to(next(prompt.parameters()).device)
        self.place(name, prompt, head, described)

    def place(
        self, name: str, prompt: nn.Module, head: nn.Module | None, description: Description
    ) -> None:
        """Put a ready adapter under this name; the first one becomes active."""
        self.prompts[name] = prompt
        if head is not None:
            self.heads[name] = head
        self.descriptions[name] = description
        self.set_adapter(self.active_adapter or name)

    def _known(self, name: str) -> str:
        if name not in self.descriptions:
            known = ", ".join(self.descriptions)
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
        self._place_active()
        self.train(self.training)

    def delete_adapter(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            ValueError: no such adapter, or the active one.
        """
        if self._known(name) == self.active_adapter:
            raise ValueError(f"adapter_name: expected one that is not active, got {name!r}")
        for group in (self.prompts, self.heads, self.folded, self.position_tables):
            if name in group:
                del group[name]
        del self.descriptions[name]

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[EPTModel]:
        """The plain backbone, for the length of a ``with`` block."""
        before, self._disabled = self._disabled, True
        self._place_active()
        try:
            yield self
        finally:
            self._disabled = before
            self._place_active()

    def unload(self) -> Any:
        """Take the backbone out: the model that was given, as it was; this object is done with.

        Its head, the ``requires_grad`` of its parameters and its modules' modes are restored.
        """
        self.gradient_checkpointing_disable()
        self._disabled = True
        self._place_active()
        allow_packing(self._packing)
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        for module, mode in self._modes:
            module.training = mode
        self._checkpointing.give_back()
        backbone, self.backbone = self.backbone, None
        return backbone

    def fold(self, dtype: torch.dtype | None = None, offset: str = "low_rank") -> None:
        """Compute every adapter's prompt once, for inference; switches to evaluation mode.

        :meth:`unfold`, :meth:`train` and loading undo it.

        Args:
            dtype: as in :meth:`ept_fast.FusedEPTPrompt.fold`.
            offset: ``"low_rank"``, ``"table"`` or ``"auto"``, as there; or ``"positions"``, for a
                model with a table of learned absolute positions: each adapter's offset goes into a
                copy of that table, and the active adapter's copy stands in the model in place of
                the table, which comes back when another one is active or nothing is folded.

        Raises:
            TypeError, ValueError: another dtype or offset; a model that does not add a table of
                positions to its embeddings. Nothing is folded then.
        """
        check_choice("offset", offset, _OFFSETS)
        self.eval()
        self.unfold()
        inside = offset == "positions"
        if inside and self._table_name is None:
            raise ValueError(
                f"offset: expected a model with a table of learned absolute positions for "
                f'"positions", got {type(self.backbone).__name__}'
            )
        if self._table_name is not None and inside:
            table: Any = self.backbone.get_submodule(self._table_name)
            if table.weight.is_meta:
                raise ValueError(
                    f'offset: expected positions on a device for "positions", got '
                    f"{self._table_name} offloaded (name a device for it in the device_map)"
                )
            self.own_positions["table"] = table
        try:
            for name, prompt in self.prompts.items():
                self.folded[name] = prompt.fold(dtype, "low_rank" if inside else offset)  # type: ignore[operator]
                if inside and prompt.config.rank:  # type: ignore[union-attr]
                    self._fold_into_positions(name, dtype)
        except BaseException:
            self.unfold()
            raise
        self._place_active()

    @torch.no_grad()
    def _fold_into_positions(self, name: str, dtype: torch.dtype | None) -> None:
        """Move a folded adapter's offset into a copy of the table of positions, and check it."""
        active, self.active_adapter = self.active_adapter, name
        try:
            prompt: Any = self.prompt
            m, n = prompt.config.num_virtual_tokens, prompt.config.max_length
            length = min(n, 32, n if self.text_limit is None else self.text_limit)
            ids = torch.arange(length, device=self.device).unsqueeze(0)
            ids = ids % self.get_input_embeddings().weight.shape[0]
            expected = self._outputs(ids)
            self.folded[name] = prompt.fold(dtype, "none")
            without: list[Tensor] = []
            table: Any = self.backbone.get_submodule(self._table_name)
            start = looked_up(table, lambda: without.append(self._outputs(ids)), m + length) + m
            wide = accumulation_dtype(table.weight, prompt.offset_b)
            offset = offset_table(prompt.offset_a, prompt.offset_b, prompt.config.scaling, wide)
            self.position_tables[name] = with_offset(table, start, offset)
            self._place_active()
            check_sums(self._outputs(ids), expected, without[0])
        finally:
            self.active_adapter = active
            self._place_active()

    def _outputs(self, input_ids: Tensor) -> Tensor:
        """What the part of the backbone that reads the text makes of ids without padding."""
        embeds, mask, ranks = self.splice(input_ids)
        reader = self._reader()
        inputs: dict[str, Any] = {"inputs_embeds": embeds, "attention_mask": mask}
        if "position_ids" in accepted_arguments(reader):
            inputs["position_ids"] = ranks + self._first_position
        return reader(**inputs, return_dict=True)[0]  # type: ignore[no-any-return]

    def _reader(self) -> Any:
        return self.backbone

    def _place_active(self) -> None:
        """Put into the backbone what it has from the active adapter, or what it has by itself."""
        if not self.own_positions:
            return
        name = self.active_adapter
        folded = name in self.position_tables and not self._disabled
        table = self.position_tables[name] if folded else self.own_positions["table"]
        assert self._table_name is not None
        self.backbone.set_submodule(self._table_name, table)

    def unfold(self) -> None:
        """Use the trainable prompts, and the model's own positions, again."""
        self.folded.clear()
        self.position_tables.clear()
        self._place_active()
        self.own_positions.clear()

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

        All files are on the disk under temporary names before any takes the place of an older one,
        the description last. Where FSDP2 shards the model every process has to call this, and one
        of them writes.

        Args:
            folder: made where it is missing.
            adapter_name: which adapter; the active one where not given.
            extra: further JSON values to keep in the description.

        Raises:
            ValueError: no such adapter, or a tensor holds NaN or infinity; nothing is written then.
            WriteError: a file cannot be written.
        """
        name = self._known(adapter_name or self.active_adapter)
        prompt: Any = self.prompts[name]
        module = self.head_of(name)
        reshard(self)
        head = None if module is None else gather(module.state_dict())
        values = {**self._values(name), "extra": dict(extra or {})}
        files = adapter_files(prompt.files(), head, values, prompt.config)
        with writing_process(prompt.parameters()) as writes:
            if writes:
                write_adapter(Path(folder), files)

    def _values(self, name: str) -> dict[str, Any]:
        """What an adapter's description says besides its tensors and their sizes."""
        described = self.descriptions[name]
        return {
            "task": self.task,
            "base_model": self.base_model_name,
            "base_model_type": getattr(self.config, "model_type", None),
            "labels": None if described.labels is None else list(described.labels),
            "pooling": described.pooling,
            "head": described.head,
            "head_dropout": described.head_dropout,
            "extra": {},
        }

    def load_pretrained(self, folder: str | Path, *, saved_name: str | None = None) -> None:
        """Read an adapter of the same task, sizes and labels into the active one.

        Args:
            folder, saved_name: as in :meth:`from_pretrained`.

        Raises:
            CheckpointError: a missing, damaged or mismatched file; the model is unchanged then.
        """
        saved = read_adapter(folder, saved_name)
        described = self._check_saved(saved)
        for field in ("labels", "pooling", "head"):
            expected, got = (getattr(d, field) for d in (self.description, described))
            if got != expected:
                raise CheckpointError(
                    f"{saved.path}: {field}: expected {shorten(expected)}, got {shorten(got)}"
                )
        tensors = {} if self.head is None else saved.head(self.head)
        reshard(self)
        self.prompt.load_saved(saved.prompt)
        if self.head is not None:
            fill(self.head.state_dict(), tensors)
        self.unfold()

    def load_adapter(self, folder: str | Path, name: str, *, saved_name: str | None = None) -> None:
        """Add a saved adapter under this name.

        Args:
            folder, saved_name: as in :meth:`from_pretrained`.
            name: letters, digits, ``_`` and ``-``.

        Raises:
            CheckpointError: a missing, damaged or foreign file, another task or backbone; the model
                is as before then.
        """
        check_adapter_name(name, self.descriptions)
        self.add_saved(read_adapter(folder, saved_name), name)

    def add_saved(self, saved: SavedAdapter, name: str) -> None:
        """Add an adapter that has been read; errors as :meth:`load_adapter`."""
        check_adapter_name(name, self.descriptions)
        described = self._check_saved(saved)
        config = saved.config(embedding_width(self.backbone))
        try:
            chosen = self._describe(described.labels, described.pooling, described.head_dropout)
        except ValueError as error:
            raise CheckpointError(f"{saved.path}: {str(error)[:1000]}") from None
        if chosen != described:
            raise CheckpointError(
                f"{saved.path}: head: expected {chosen.head!r} as this model needs, "
                f"got {described.head!r}"
            )
        prompt = prompt_class(config).from_tensors(
            config,
            {name: tensor.clone() for name, tensor in saved.prompt.tensors.items()},
            self.get_input_embeddings(),
            backend=self.backend,
        )
        with torch.random.fork_rng(devices=()):  # of which a new linear layer draws
            head = self._new_head(described, torch.Generator())
        if head is not None:
            tensors = saved.head(head)
            if described.head == "linear":
                head.to(next(iter(tensors.values())).dtype)
            head.load_state_dict(tensors)
            head.to(self.device)
        self.place(name, prompt, head, described)

    def _check_saved(self, saved: SavedAdapter) -> Description:
        values = saved.values
        kind = getattr(self.config, "model_type", None)
        for key, expected in (("task", self.task), ("base_model_type", kind)):
            if values[key] != expected:
                raise CheckpointError(
                    f"{saved.path}: {key}: expected {expected!r} as in this model, "
                    f"got {shorten(values[key])}"
                )
        labels = None if values["labels"] is None else tuple(values["labels"])
        return Description(labels, values["pooling"], values["head"], values["head_dropout"])

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path | SavedAdapter,
        model: nn.Module | None = None,
        *,
        base_model: str | None = None,
        adapter_name: str = "default",
        saved_name: str | None = None,
        backend: str | None = None,
        trust_remote_code: bool = False,
        allow_download: bool = False,
    ) -> EPTModel:
        """The model of a saved adapter, of the class of its task, in evaluation mode.

        Args:
            folder: what :meth:`save_pretrained` wrote; or else what transformers' Trainer or
                accelerate did, the state dict of a model as ``model.safetensors``. An adapter that
                :func:`~ept_fast.transformers.adapter.read_adapter` has read will do too.
            model: the frozen model, where it is already loaded.
            base_model: folder or hub id to load it from, in place of the name saved with the
                adapter.
            adapter_name: the adapter's name in the new model.
            saved_name: which adapter of several in a state dict; the one that was active where not
                given.
            backend: as in :func:`ept_fast.reconstruct_prompt`.
            trust_remote_code: whether to run the code that the model at ``base_model`` brings.
            allow_download: whether a model that only the adapter names may be loaded from the hub;
                else it has to be a folder or in the hub's cache on this machine.

        Raises:
            CheckpointError: a missing, damaged or foreign file, or another model than it was
                trained on.
            ValueError: the model cannot be found, or not without what the last two allow;
                ``trust_remote_code`` without ``base_model``.
        """
        check_adapter_name(adapter_name, ())
        saved = folder if isinstance(folder, SavedAdapter) else read_adapter(folder, saved_name)
        folder, values = saved.path.parent, saved.values
        if cls is not EPTModel and cls.task != values["task"]:
            raise CheckpointError(
                f"{saved.path}: task: expected {cls.task!r}, got {values['task']!r}"
            )
        name = values["base_model"] if base_model is None else base_model
        if model is None:
            if trust_remote_code and base_model is None:
                raise ValueError(
                    f"trust_remote_code: expected base_model (on the command line --model) beside "
                    f"it, as {folder} may name any code, got none"
                )
            if name is None:
                raise ValueError(f"base_model: expected a folder or hub id, {folder} names none")
            labels = tuple(values["labels"] or ()) if values["head"] == "model" else None
            try:
                model = load_backbone(
                    name,
                    values["task"],
                    labels=labels,
                    trust_remote_code=trust_remote_code,
                    local_files_only=base_model is None and not allow_download,
                )
            except ValueError as error:
                if base_model is not None:
                    raise
                raise ValueError(f"{error}{names_it(folder, name, allow_download)}") from None
        chosen = EPTModel.of_task(values["task"])(model, base_model=name, backend=backend)
        try:
            chosen.add_saved(saved, adapter_name)
        except BaseException:
            chosen.unload()
            raise
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
        if kwargs.pop("position_ids", None) is not None:
            raise ValueError("position_ids: expected None (they follow from the mask), got one")
        name, cache = take_cache(kwargs)
        if cache is not None:
            raise ValueError(f"{name}: expected None (see generate()), got one")
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
        limit = None if self._table_name is None else self.text_limit
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
        return self._inputs_in_order(text, kwargs, compact=False)[0]

    def _inputs_in_order(
        self, text: Text, kwargs: dict[str, Any], compact: bool
    ) -> tuple[dict[str, Any], Tensor | None]:
        """The keyword arguments that the backbone is called with, and the order of their columns.

        Where prompts differ in length, the shorter ones of a batch have padding before them;
        ``compact`` moves it behind the text, for models that go by columns.
        """
        task_ids = kwargs.pop("task_ids", None)
        embeds, mask, ranks = self.splice(
            text.input_ids, text.inputs_embeds, text.attention_mask, task_ids
        )
        token_type_ids, order = text.token_type_ids, None
        if token_type_ids is not None:
            token_type_ids = F.pad(token_type_ids, (self.prompt.config.num_virtual_tokens, 0))
        if compact and not self.active_prompt.equal_lengths:
            moved = Text(None, embeds, mask, token_type_ids).compacted()
            _, embeds, mask, token_type_ids, order = moved  # type: ignore[assignment]
            ranks = mask.cumsum(1, dtype=torch.int64) - 1
        inputs: dict[str, Any] = {
            "inputs_embeds": embeds,
            "attention_mask": mask,
            "return_dict": True,
        }
        if "position_ids" in self._accepted:
            inputs["position_ids"] = ranks + self._first_position
        if token_type_ids is not None and "token_type_ids" in self._accepted:
            inputs["token_type_ids"] = token_type_ids
        if "use_cache" in self._accepted:
            inputs["use_cache"] = False
        return inputs | kwargs, order

    def _of_text(self, values: Tensor, order: Tensor | None) -> Tensor:
        """What belongs to the text, ``[B, S, ...]``, of values of the backbone's columns."""
        if order is not None:
            values = _taken(values, order.argsort(dim=1))
        return values[:, self.prompt.config.num_virtual_tokens :]


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


def replace_fields(output: ModelOutput, **fields: Any) -> Any:
    """The same output with other values in these fields."""
    return type(output)(**{**output, **fields})


def mark_layout(cache: Any, layout: str) -> None:
    """Note where a cache's rows have their padding, for ``generate`` to go on from it.

    ``"padding first"``, which is that of ``generate`` and needs no note: ``[padding | prompt |
    text]``; ``"prompt first"``: ``[prompt | padding | text]``; ``"text first"``: ``[prompt | text |
    padding]``.
    """
    cache.ept_layout = layout


def layout_of(cache: Any) -> str:
    """As :func:`mark_layout` has noted it; of an empty cache, that of ``generate``."""
    if cache is None or not int(cache.get_seq_length()):
        return "padding first"
    return getattr(cache, "ept_layout", "padding first")


def keep_logits(logits: Tensor, kept: int | Tensor) -> Tensor:
    """The last ``kept`` columns, all where that is 0, or the columns of these numbers."""
    if isinstance(kept, Tensor):
        return logits[:, kept]
    return logits[:, -kept:] if kept else logits


def next_labels(labels: Tensor, mask: Tensor) -> Tensor:
    """Each label at the position that predicts its token, which is the real token before it.

    Args:
        labels: ``[B, S]`` integers; those of padding are left out.
        mask: ``[B, S]`` of 0 and 1.

    Returns:
        ``[B, 1 + S]``: the prompt's last position, which predicts a row's first token, and the
        text's; -100 where nothing is to be predicted.
    """
    real = mask != 0
    own = torch.arange(1, labels.shape[1] + 1, device=labels.device).expand_as(labels)
    before = F.pad(own.where(real, 0).cummax(1).values[:, :-1], (1, 0))
    # Padding writes to its own position and each token to another real one: none is written twice.
    targets = labels.new_full((labels.shape[0], labels.shape[1] + 1), IGNORED)
    return targets.scatter(1, before.where(real, own), labels.where(real, IGNORED))


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


def _keep_adapters(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    """A state dict holds prompts and heads, never backbone weights, and says what they are."""
    kept = (f"{prefix}prompts.", f"{prefix}heads.")
    for key in [k for k in state if k.startswith(prefix) and not k.startswith(kept)]:
        del state[key]
    description = describe_state(
        module.active_adapter,
        {name: (module._values(name), p.config) for name, p in module.prompts.items()},
        {k.removeprefix(prefix): tensor for k, tensor in state.items() if k.startswith(kept)},
    )
    if description is not None:
        state[f"{prefix}{DESCRIPTION}"] = description


def _expect_adapters(module: Any, keys: Any) -> None:
    """Report neither frozen weights as missing nor the description as unexpected; unfold.

    The description is for those who have no model yet.
    """
    frozen = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    frozen |= {name for name, _ in module.named_buffers(remove_duplicate=False)}
    frozen = {name for name in frozen if not name.startswith(("prompts.", "heads."))}
    keys.missing_keys[:] = [k for k in keys.missing_keys if not _ends_in(k, frozen)]
    others = [k for k in keys.unexpected_keys if not _ends_in(k, {DESCRIPTION})]
    keys.unexpected_keys[:] = others
    module.unfold()


def _ends_in(key: str, names: set[str]) -> bool:
    """Whether the key is one of the names, below whatever wraps the module."""
    parts = key.split(".")
    return any(".".join(parts[i:]) in names for i in range(len(parts)))
