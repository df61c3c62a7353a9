"""What every prompt method shares, and the registry that finds a method by its name.

A method is one file of this folder: a config, which is a frozen dataclass below ``PromptConfig``,
and a class below :class:`Prompt` with ``shapes``, ``groups``, ``initial`` and ``formula``, under
:func:`register`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import json
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn

from ept_fast.checks import check_input_ids, check_token_ids
from ept_fast.config import EPT, PromptConfig, check_choice, check_count
from ept_fast.losses.terms import LossTerm
from ept_fast.ops.functional import splice_prompt
from ept_fast.ops.types import Text
from ept_fast.precision import accumulation_dtype, without_autocast
from ept_fast.prompts.embedding import (
    NOISE,
    check_width,
    embedding_device,
    in_training_mode,
    is_plain_table,
)
from ept_fast.prompts.initial import LongPrompt
from ept_fast.prompts.table import offset_table, splice_table, table_pays
from ept_fast.storage.files import TensorFile, json_bytes, tensor_bytes, write_files
from ept_fast.storage.sharded import check_whole, fill, gather, writing_process
from ept_fast.storage.untrusted import (
    JSON_LIMIT,
    CheckpointError,
    parse_json,
    read_file,
    shorten,
)

__all__ = [
    "CONFIG_FILE",
    "TENSOR_FILE",
    "EPTOutput",
    "FoldedPrompt",
    "Prompt",
    "SavedPrompt",
    "Seen",
    "SplicedPrompt",
    "check_constant",
    "config_class",
    "expected_shapes",
    "prompt_class",
    "prompt_methods",
    "read_config",
    "read_prompt",
    "register",
]

CONFIG_FILE = "ept_config.json"
TENSOR_FILE = "ept_model.safetensors"

_RATES = ("prompt", "offset", "spaces")  # what has a learning rate of its own
_OFFSET = ("offset_a", "offset_b")
_OFFSETS = ("low_rank", "table", "auto", "none")


class EPTOutput(NamedTuple):
    """What the backbone is called with.

    Attributes:
        inputs_embeds: ``[B, m + S, d]`` in the embeddings' type.
        attention_mask: ``[B, m + S]``, m ones and then the text's mask, in its type.
        position_ids: ``[B, m + S]`` int64, each position's rank among the row's real positions;
            padding repeats the last rank before it.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor


class Seen(NamedTuple):
    """What a prompt may read of its text besides the embeddings.

    Attributes:
        token_ids: ``[B, S]``, or None if embeddings were given.
        states: ``[B, S, d]``, the text's last hidden states in the plain frozen model, or None.
    """

    token_ids: Tensor | None = None
    states: Tensor | None = None


class SplicedPrompt(nn.Module):
    """What the trainable and the folded prompt share: the embedding layer and the splice."""

    offset_a: Tensor | None
    offset_b: Tensor | None
    equal_lengths = True  # no row has padding inside its prompt

    @property
    def depends_on_text(self) -> bool:
        """Whether each row has a prompt of its own, made from its text, and no constant P′."""
        return False

    @property
    def reads_states(self) -> bool:
        """Whether ``forward`` is to be given the text's hidden states in the plain model."""
        return False

    def __init__(
        self, config: PromptConfig, embedding: nn.Module | None, backend: str | None
    ) -> None:
        super().__init__()
        self.config = config
        self.backend = backend
        # In a tuple, so that it is not registered: the table belongs to the backbone and is neither
        # trained, moved nor saved with the prompt.
        self._embedding = (embedding,)

    @property
    def embedding(self) -> nn.Module | None:
        """The backbone's embedding layer; None if the prompt was made without one."""
        return self._embedding[0]

    def set_input_embeddings(self, embedding: nn.Module) -> None:
        """Look up ``input_ids`` in this layer from now on; nothing is moved.

        Raises:
            ValueError: the layer has another width.
        """
        check_width(embedding, self.config.hidden_size)
        self._embedding = (embedding,)

    def reconstruct(self) -> Tensor:
        """P′, ``[(T,) m, d]``, as in evaluation mode."""
        raise NotImplementedError

    def prompt_for(self, text: Text, seen: Seen) -> tuple[Tensor, Text]:
        """The prompts of a call, ``[(T,) m, d]``, and its text with the ``task_ids`` that pick one.

        Here P′; a method that draws in training mode, or reads the text, has more to say.
        """
        return self.reconstruct(), text

    def put_before(self, text: Text, seen: Seen, places: list[Tensor] | None = None) -> Tensor:
        """The embeddings ``[B, m + S, d]`` of prompt and text.

        ``places`` gets their mask and positions, ``[B, m + S]``, if the backend writes them.
        """
        check_whole({"embedding.weight": text.weight})
        prompt, text = self.prompt_for(text, seen)
        return splice_prompt(prompt, **self._spliced(text), backend=self.backend)

    def _spliced(self, text: Text) -> dict[str, Any]:
        """Arguments of the splice: the text, the offset and its scaling."""
        return {
            **dict(zip(Text._fields, text, strict=True)),
            "offset_a": self.offset_a,
            "offset_b": self.offset_b,
            "scaling": self.config.scaling,
        }

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        task_ids: Tensor | None = None,
        states: Tensor | None = None,
    ) -> EPTOutput:
        """Put the reconstructed prompt before the text and the offset onto its real tokens.

        Args:
            input_ids: ``[B, S]`` integers; or else ``inputs_embeds``.
            inputs_embeds: ``[B, S, d]``, already scaled if the backbone scales its embeddings.
            attention_mask: ``[B, S]`` of 0 and 1; ones by default.
            task_ids: ``[B]`` integers, for a bank of prompts.
            states: ``[B, S, d]``, the text's last hidden states in the plain frozen model, for a
                prompt that reads them (``reads_states``); without them it reads the embeddings.

        Returns:
            :class:`EPTOutput`.

        Raises:
            TypeError, ValueError: as :func:`ept_fast.splice_prompt`; S > max_length with rank > 0;
                ``input_ids`` without an embedding layer.
            IndexError: an id outside the vocabulary or the bank.
        """
        weight, seen = None, Seen(input_ids, states)
        if input_ids is not None and inputs_embeds is None:
            embedding = self.embedding
            if embedding is None:
                raise ValueError(
                    "input_ids: expected inputs_embeds, as the prompt has no embedding layer "
                    "(set_input_embeddings gives it one), got input_ids"
                )
            if is_plain_table(embedding):
                weight = embedding.weight
            else:
                inputs_embeds = self._look_up(embedding, input_ids)
                input_ids = None
        text = Text(input_ids, weight, inputs_embeds, attention_mask, task_ids)
        places: list[Tensor] = []
        embeds = self.put_before(text, seen, places)
        if places:
            mask, ranks = places
        elif attention_mask is None:
            kind: dict[str, Any] = {"dtype": torch.int64, "device": embeds.device}
            mask = torch.ones(embeds.shape[:2], **kind)
            ranks = torch.arange(embeds.shape[1], **kind).expand(mask.shape)
        else:
            mask = torch.constant_pad_nd(attention_mask, (self.config.num_virtual_tokens, 0), 1)
            ranks = mask.cumsum(1, dtype=torch.int64).sub_(1)
        return EPTOutput(embeds, mask, ranks)

    @torch.no_grad()
    def _look_up(self, embedding: nn.Module, input_ids: Tensor) -> Tensor:
        """Call the layer: scaled, quantised or hooked layers do their own lookup."""
        check_input_ids(input_ids, None)
        noise = self.training and hasattr(embedding, NOISE)
        with in_training_mode(embedding) if noise else contextlib.nullcontext():
            if torch.compiler.is_compiling():
                return embedding(input_ids)  # type: ignore[no-any-return]
            try:
                return embedding(input_ids)  # type: ignore[no-any-return]
            except IndexError:
                rows = getattr(embedding, "num_embeddings", None)
                if isinstance(rows, int):
                    check_token_ids(input_ids, rows)  # names row and column
                raise

    def extra_repr(self) -> str:
        """The config's fields, for ``repr``."""
        return ", ".join(f"{name}={value!r}" for name, value in self.config.to_dict().items())


class Prompt(SplicedPrompt):
    """A trainable prompt for a frozen backbone: the trainable tensors and nothing else.

    With ``num_tasks=T`` it is a bank: every tensor has a leading axis T and ``forward`` takes
    ``task_ids``. The arguments and errors are those of :class:`ept_fast.FusedEPTPrompt`.

    Attributes:
        config_class: the method's config.
        groups: names of all its tensors, by learning rate: ``"prompt"``, ``"offset"``,
            ``"spaces"``. ``offset_a`` and ``offset_b`` make the low-rank offset of the text.
        shared: names of the tensors that all tasks of a bank have in common, without an axis T.
        num_tasks: T, or None for a single prompt.
    """

    config_class: ClassVar[type[PromptConfig]]
    groups: ClassVar[Mapping[str, tuple[str, ...]]]
    shared: ClassVar[tuple[str, ...]] = ()
    num_tasks: int | None

    def __init__(
        self,
        config: PromptConfig,
        embedding: nn.Module | None = None,
        *,
        init: str | Tensor = "vocab",
        text: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        prototypes: str = "kmeans",
        prototype_layer: int | None = None,
        num_tasks: int | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        backend: str | None = None,
    ) -> None:
        if not isinstance(config, self.config_class):
            name = self.config_class.__name__
            raise TypeError(f"config: expected an {name}, got {type(config).__name__}")
        if num_tasks is not None:
            check_count("num_tasks", num_tasks, 1)
        _check_floating(dtype)
        super().__init__(config, embedding, backend)
        self.num_tasks = num_tasks
        if embedding is not None:
            check_width(embedding, config.hidden_size)
        if prototype_layer is not None:
            raise ValueError(
                f"prototype_layer: expected None, as a prompt by itself knows no layers "
                f"(get_ept_model and add_adapter do), got {shorten(prototype_layer)}"
            )
        start = (init, text, tokenizer, prototypes)
        rows = LongPrompt(config, embedding, *start, num_tasks, generator)
        tasks = [self.initial(rows.of_task(t), generator) for t in range(num_tasks or 1)]
        values = {}
        for name, first in tasks[0].items():
            alone = num_tasks is None or name in self.shared
            value = first if alone else torch.stack([t[name] for t in tasks])
            # A copy: the rows may be a view of the caller's tensor, or of the frozen table itself.
            values[name] = torch.empty_like(
                value, dtype=dtype, device=rows.device, memory_format=torch.contiguous_format
            ).copy_(value)
        self._register(values)

    @property
    def has_gate(self) -> bool:
        """Whether the prompt has ``gate_weights()``."""
        return False

    @classmethod
    def shapes(cls, config: Any) -> dict[str, tuple[int, ...]]:
        """The tensors of a single prompt of these sizes, by name."""
        raise NotImplementedError

    def initial(self, rows: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """A single prompt's first values, from rows ``[at least m + r, d]``.

        There are ``config.initial_rows`` of them, or as many as the caller gave.
        """
        raise NotImplementedError

    def formula(self, t: Mapping[str, Tensor]) -> Tensor:
        """P′ in plain PyTorch from the tensors and constants, each ``[(T,) ...]`` unless shared.

        They come in float32 (float64 if one of them is), and autocast is off. A method that has
        kernels overrides :meth:`reconstruct`.
        """
        raise NotImplementedError

    def reconstruct(self) -> Tensor:
        """P′, ``[(T,) m, d]``, in the type of the first tensor; as in evaluation mode.

        Raises:
            ValueError: it depends on the text.
        """
        check_constant("prompt", self)
        return self.computed(self.formula)

    def computed(self, formula: Callable[[Mapping[str, Tensor]], Tensor]) -> Tensor:
        """What a formula gives, under the conditions of :meth:`formula`."""
        tensors = {name: t for name, t in self.tensors().items() if t is not None}
        dtype = next(iter(tensors.values())).dtype
        tensors |= dict(self.named_buffers(recurse=False))
        wide = accumulation_dtype(*tensors.values())
        with without_autocast(next(iter(tensors.values())).device):
            return formula({name: t.to(wide) for name, t in tensors.items()}).to(dtype)

    @classmethod
    def constants(cls, config: Any) -> dict[str, Tensor]:
        """Frozen tensors that follow from the config alone, by name; they are never saved."""
        return {}

    def _register(self, values: Mapping[str, Tensor]) -> None:
        for name in dict.fromkeys((*sum(self.groups.values(), ()), *_OFFSET)):
            if isinstance(getattr(type(self), name, None), property):  # made from others
                continue
            value = values.get(name)
            self.register_parameter(name, None if value is None else nn.Parameter(value))
        self._place_constants(next(iter(values.values())).device)

    def _place_constants(self, device: torch.device) -> None:
        for name, constant in self.constants(self.config).items():
            self.register_buffer(name, constant.to(device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Constants go to the tensors' device and keep their type, as a saved prompt's will."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._place_constants(next(self.parameters()).device)
        return self

    def loss_terms(self) -> tuple[LossTerm, ...]:
        """What the method adds to the loss in training."""
        return ()

    def tensors(self) -> dict[str, Tensor | None]:
        """The trainable tensors by name, with None for those that these sizes leave out.

        Raises:
            ValueError: this process holds a part of a tensor only.
        """
        tensors = {name: getattr(self, name) for names in self.groups.values() for name in names}
        check_whole(tensors)
        return tensors

    def fold(self, dtype: torch.dtype | None = None, offset: str = "low_rank") -> SplicedPrompt:
        """The same prompt for inference: P′ computed once, nothing trainable, the same outputs.

        Of a prompt that depends on the text, whose P′ is not constant, a frozen copy.

        Args:
            dtype: type of P′ and of the offset table, rounded to it once; that of the parameters
                by default. A and B keep theirs.
            offset: what the text's offsets are read from: ``"low_rank"``, A and B, to the bit as in
                training; ``"table"``, a table c·A·B ``[(T,) n, d]``; ``"auto"``, the table if it
                was measured to be faster: on a CPU with the ``eager`` backend, if it takes no more
                than 64 MiB; ``"none"``, nowhere, for a model that adds the offset itself.

        Raises:
            TypeError, ValueError: another dtype or offset.
        """
        if self.depends_on_text:
            _check_fold(dtype, offset)
            embedding = self.embedding  # the backbone's: not copied
            return copy.deepcopy(self, {id(embedding): embedding}).requires_grad_(False).eval()
        return FoldedPrompt(self, dtype, offset)

    def parameter_groups(
        self, prompt_lr: float, offset_lr: float, space_lr: float
    ) -> list[dict[str, Any]]:
        """Optimizer groups with the three learning rates.

        Returns:
            Dicts of ``name`` ("prompt", "offset", "spaces"), ``params`` and ``lr``; groups without
            tensors are left out.
        """
        groups = []
        for group, lr in zip(_RATES, (prompt_lr, offset_lr, space_lr), strict=True):
            tensors = (getattr(self, name) for name in self.groups.get(group, ()))
            params = [tensor for tensor in tensors if tensor is not None]
            if params:
                groups.append({"name": group, "params": params, "lr": lr})
        return groups

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tensors and the config into ``folder``, each file whole or not at all.

        Both are on the disk under temporary names before either takes the place of an older one.
        Parameters that are sharded are gathered: every process has to call this then, and one of
        them writes.

        Raises:
            ValueError: a tensor holds NaN or infinity, or is partitioned by DeepSpeed ZeRO-3.
        """
        files = self.files()
        with writing_process(self.parameters(recurse=False)) as writes:
            if writes:
                write_files({Path(folder) / name: data for name, data in files.items()})

    def files(self) -> dict[str, bytes]:
        """What :meth:`save_pretrained` writes, by the files' names; it raises the same."""
        values = {**self.config.to_dict(), "num_tasks": self.num_tasks}
        tensors = gather(dict(self.named_parameters(recurse=False)))
        return {
            TENSOR_FILE: tensor_bytes(tensors, json.dumps(values)),
            CONFIG_FILE: json_bytes(values),
        }

    def load_pretrained(self, folder: str | Path) -> None:
        """Read tensors that :meth:`save_pretrained` wrote for this very config into this module.

        Raises:
            CheckpointError: a missing, truncated, foreign or mismatched file; the module then keeps
                the values that it had.
        """
        self.load_saved(read_prompt(Path(folder)))

    def load_saved(self, saved: SavedPrompt) -> None:
        """Take tensors that were saved with this very config; errors as there."""
        path, config, num_tasks, tensors = saved
        if config != self.config or num_tasks != self.num_tasks:
            raise CheckpointError(
                f"{path.parent}: expected {self.config} with num_tasks {self.num_tasks}, "
                f"got {config} with num_tasks {num_tasks}"
            )
        parameters = dict(self.named_parameters(recurse=False))
        values = {name: tensors[name].to(p.dtype) for name, p in parameters.items()}
        for name, value in values.items():
            if not bool(torch.isfinite(value).all()):
                raise CheckpointError(
                    f"{path}: {name}: expected values in the range of "
                    f"{value.dtype}, got larger ones in {tensors[name].dtype}"
                )
        fill(parameters, values)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, embedding: nn.Module | None = None, *, backend: str | None = None
    ) -> Self:
        """Build the prompt that :meth:`save_pretrained` wrote, on this backbone's embedding layer.

        Raises:
            CheckpointError: a missing, truncated, foreign or mismatched file, or another method's.
            ValueError: the embedding layer has another width.
        """
        saved = read_prompt(Path(folder))
        found = prompt_class(saved.config)
        if issubclass(cls, found):
            found = cls
        elif not issubclass(found, cls):
            raise CheckpointError(
                f"{folder}: prompt_type: expected that of a {cls.__name__}, "
                f"got {saved.config.prompt_type}"
            )
        return found.from_tensors(
            saved.config, saved.tensors, embedding, num_tasks=saved.num_tasks, backend=backend
        )

    @classmethod
    def from_tensors(
        cls,
        config: PromptConfig,
        tensors: Mapping[str, Tensor],
        embedding: nn.Module | None = None,
        *,
        num_tasks: int | None = None,
        backend: str | None = None,
    ) -> Self:
        """The prompt with these values, each in its own type.

        Args:
            config: sizes and choices.
            tensors: every parameter by its name. They are not copied if they are on the
                embedding layer's device (the CPU without a layer) already.
            embedding: as for the class.
            num_tasks: T, for a bank.
            backend: as for the class.

        Raises:
            ValueError: other names or shapes than the config's; the layer has another width.
        """
        expected = expected_shapes(config, num_tasks)
        got = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if got != expected:
            raise ValueError(f"tensors: expected the shapes {expected}, got {got}")
        prompt = cls.__new__(cls)  # without initial values, which these would replace
        SplicedPrompt.__init__(prompt, config, embedding, backend)
        prompt.num_tasks = num_tasks
        device = torch.device("cpu")
        if embedding is not None:
            check_width(embedding, config.hidden_size)
            device = embedding_device(embedding)
        prompt._register({name: value.detach().to(device) for name, value in tensors.items()})
        return prompt


class FoldedPrompt(SplicedPrompt):
    """A prompt for inference: P′ as a constant ``[(T,) m, d]``, the offset low-rank or a table.

    Made by :meth:`Prompt.fold`. With the default choices its outputs are, to the bit, those
    of its source; else they differ by the rounding of P′ and of the table.
    """

    prompt: Tensor
    offset_table: Tensor | None

    def __init__(
        self,
        source: Prompt,
        dtype: torch.dtype | None = None,
        offset: str = "low_rank",
    ) -> None:
        super().__init__(source.config, source.embedding, source.backend)
        _check_fold(dtype, offset)
        self.num_tasks = source.num_tasks
        with torch.no_grad():
            prompt = source.reconstruct().detach().clone()
        self.register_buffer("prompt", prompt if dtype is None else prompt.to(dtype))
        for name in _OFFSET:
            tensor = None if offset == "none" else getattr(source, name)
            self.register_buffer(name, None if tensor is None else tensor.detach().clone())
        a, b = self.offset_a, self.offset_b
        table = None
        if a is not None and b is not None and offset in ("table", "auto"):
            size = (b.dtype if dtype is None else dtype).itemsize
            if offset == "table" or table_pays(prompt, a, size, self.backend):
                table = offset_table(a, b, self.config.scaling, dtype)
        self.register_buffer("offset_table", table)

    def reconstruct(self) -> Tensor:
        """The constant prompt P′, ``[(T,) m, d]``."""
        return self.prompt

    def put_before(self, text: Text, seen: Seen, places: list[Tensor] | None = None) -> Tensor:
        """The embeddings ``[B, m + S, d]`` of prompt and text; offsets from the table, if any."""
        table = self.offset_table
        if table is not None:
            check_whole({"embedding.weight": text.weight})
            return splice_table(self.prompt, table=table, **self._spliced(text))
        embeds = super().put_before(text, seen)
        if self.config.rank and self.offset_a is None:  # folded without its offset
            length, most = embeds.shape[1] - self.config.num_virtual_tokens, self.config.max_length
            if length > most:
                name = "inputs_embeds" if text.weight is None else "input_ids"
                raise ValueError(
                    f"{name}: expected at most max_length {most} text positions, got {length}"
                )
        return embeds


# The registry

_METHODS: dict[str, type[Prompt]] = {}  # by prompt_type
_Method = TypeVar("_Method", bound=type[Prompt])
_PACKAGE = "ept_fast.prompts"


@functools.cache
def _import_all() -> None:
    """Import every file of this folder, so that the method in it is registered.

    On first need, as ``import ept_fast`` shall be quick.
    """
    for module in pkgutil.iter_modules(importlib.import_module(_PACKAGE).__path__):
        importlib.import_module(f"{_PACKAGE}.{module.name}")


def _methods() -> dict[str, type[Prompt]]:
    """All registered methods, by ``prompt_type``."""
    _import_all()
    return _METHODS


def register(method: _Method) -> _Method:
    """Make a class the prompt method of its config's ``prompt_type``; a decorator.

    Raises:
        ValueError: the name is taken, or ``groups`` has a key without a learning rate.
    """
    if not method.__module__.startswith(f"{_PACKAGE}."):
        _import_all()  # so that its name is none of ours
    name = method.config_class.prompt_type
    if name in _METHODS:
        raise ValueError(f"prompt_type: expected a new name, got {name!r}, which is there")
    for group in method.groups:
        check_choice("groups", group, _RATES)
    _METHODS[name] = method
    return method


def prompt_methods() -> dict[str, type[Prompt]]:
    """The registered methods, by their names on the command line."""
    return {
        name: method
        for kind, method in _methods().items()
        for name in method.config_class.methods or (kind,)
    }


def prompt_class(config: object) -> type[Prompt]:
    """The registered method of a config; TypeError if there is none."""
    found = _methods().get(config.prompt_type) if isinstance(config, PromptConfig) else None
    if found is None:
        raise TypeError(
            f"config: expected an EPTConfig or that of another registered method, "
            f"got {type(config).__name__}"
        )
    return found


def expected_shapes(config: PromptConfig, num_tasks: int | None) -> dict[str, tuple[int, ...]]:
    """The tensors of a prompt of these sizes, by name, with the task axis."""
    lead = () if num_tasks is None else (num_tasks,)
    method = prompt_class(config)
    return {
        name: shape if name in method.shared else (*lead, *shape)
        for name, shape in method.shapes(config).items()
    }


def config_class(prompt_type: str) -> type[PromptConfig]:
    """The config of the method of this name."""
    check_choice("prompt_type", prompt_type, tuple(_methods()))
    return _METHODS[prompt_type].config_class


def read_config(values: Mapping[str, Any]) -> PromptConfig:
    """The config with these fields, of the method that ``prompt_type`` names; EPT's without."""
    return config_class(values.get("prompt_type", EPT)).from_dict(values)


# Files


class SavedPrompt(NamedTuple):
    """A prompt's files, read and checked.

    Attributes:
        path: the file of the tensors.
        config: sizes and choices.
        num_tasks: T, or None for a single prompt.
        tensors: on the CPU, by name.
    """

    path: Path
    config: PromptConfig
    num_tasks: int | None
    tensors: dict[str, Tensor]


def read_prompt(folder: Path, files: Mapping[str, bytes] | None = None) -> SavedPrompt:
    """The prompt in a folder.

    Args:
        folder: what :meth:`Prompt.save_pretrained` wrote.
        files: contents of files by their names, if they have been read already.

    Raises:
        CheckpointError: a missing or damaged file, or tensors of other names and shapes.
    """
    path, config_path = folder / TENSOR_FILE, folder / CONFIG_FILE
    files = files or {CONFIG_FILE: read_file(config_path, limit=JSON_LIMIT)}
    values = parse_json(config_path, files[CONFIG_FILE])
    file = TensorFile(path, files.get(TENSOR_FILE))
    saved = parse_json(path, file.config)
    try:
        if saved != values:
            raise ValueError(
                f"expected the config the tensors were saved with ({shorten(saved)}), "
                f"got {shorten(values)}"
            )
        num_tasks = values.pop("num_tasks", None)
        if num_tasks is not None:
            check_count("num_tasks", num_tasks, 1)
        config = read_config(values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{config_path}: {str(error)[:1000]}") from None
    return SavedPrompt(path, config, num_tasks, file.load(expected_shapes(config, num_tasks)))


def check_constant(name: str, prompt: SplicedPrompt) -> None:
    """Raise ValueError if each row would have a prompt of its own, made from its text."""
    if prompt.depends_on_text:
        raise ValueError(
            f"{name}: expected a prompt that is the same before every text, got a "
            f"{type(prompt).__name__} that depends on it ({prompt.config})"
        )


def _check_fold(dtype: torch.dtype | None, offset: str) -> None:
    if dtype is not None:
        _check_floating(dtype)
    check_choice("offset", offset, _OFFSETS)


def _check_floating(dtype: object) -> None:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating dtype, got {dtype!r}")
