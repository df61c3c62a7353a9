"""The prompt as an ``nn.Module`` before a frozen model, and its folded form for inference."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module  # the hooks of all modules

from ept_fast.checks import check_input_ids, check_token_ids
from ept_fast.config import EPTConfig, check_choice, check_count
from ept_fast.ops.functional import gate_weights, reconstruct_prompt, splice_prompt
from ept_fast.ops.types import Flags, Parameters
from ept_fast.prompts.table import offset_table, splice_table, table_pays
from ept_fast.storage.files import (
    check_shapes,
    json_bytes,
    read_header,
    read_tensors,
    saved_config,
    tensor_bytes,
    write_files,
)
from ept_fast.storage.sharded import check_whole, fill, gather, writing_process
from ept_fast.storage.untrusted import CheckpointError, parse_json, read_adapter_json, shorten

__all__ = [
    "CONFIG_FILE",
    "TENSOR_FILE",
    "EPTOutput",
    "FoldedEPTPrompt",
    "FusedEPTPrompt",
    "SplicedPrompt",
    "embedding_device",
    "expected_shapes",
    "read_prompt",
    "read_prompt_config",
]

CONFIG_FILE = "ept_config.json"
TENSOR_FILE = "ept_model.safetensors"

_INITS = ("vocab", "text", "random")
_OFFSETS = ("low_rank", "table", "auto", "none")
_GROUPS = {
    "prompt": ("short_prompt",),
    "offset": ("offset_a", "offset_b"),
    "spaces": ("space_down", "space_up", "gate_weight", "gate_bias"),
}
_NAMES = tuple(name for names in _GROUPS.values() for name in names)


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


class SplicedPrompt(nn.Module):
    """What the trainable and the folded prompt share: the embedding layer and the splice."""

    offset_a: Tensor | None
    offset_b: Tensor | None
    equal_lengths = True  # no row has padding inside its prompt

    def __init__(self, config: EPTConfig, embedding: nn.Module | None, backend: str | None) -> None:
        super().__init__()
        self.config = config
        self.backend = backend
        # In a tuple, so that it is not registered: the table belongs to the backbone and is neither
        # trained, moved nor saved with the prompt.
        self._embedding = (embedding,)

    @property
    def embedding(self) -> nn.Module | None:
        """The backbone's embedding layer; None where the prompt was made without one."""
        return self._embedding[0]

    def set_input_embeddings(self, embedding: nn.Module) -> None:
        """Look up ``input_ids`` in this layer from now on; nothing is moved.

        Raises:
            ValueError: the layer has another width.
        """
        _check_width(embedding, self.config)
        self._embedding = (embedding,)

    def reconstruct(self) -> Tensor:
        """P′, ``[(T,) m, d]``."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        task_ids: Tensor | None = None,
    ) -> EPTOutput:
        """Put the reconstructed prompt before the text and the offset onto its real tokens.

        Args:
            input_ids: ``[B, S]`` integers; or else ``inputs_embeds``.
            inputs_embeds: ``[B, S, d]``, already scaled where the backbone scales its embeddings.
            attention_mask: ``[B, S]`` of 0 and 1; ones where it is not given.
            task_ids: ``[B]`` integers, for a bank of prompts.

        Returns:
            :class:`EPTOutput`.

        Raises:
            TypeError, ValueError: as :func:`ept_fast.splice_prompt`; S > max_length where rank > 0;
                ``input_ids`` without an embedding layer.
            IndexError: an id outside the vocabulary or the bank.
        """
        weight = None
        if input_ids is not None and inputs_embeds is None:
            embedding = self.embedding
            if embedding is None:
                raise ValueError(
                    "input_ids: expected inputs_embeds, as the prompt has no embedding layer "
                    "(set_input_embeddings gives it one), got input_ids"
                )
            if _is_plain_table(embedding):
                weight = _embedding_weight(embedding)
            else:
                inputs_embeds = self._look_up(embedding, input_ids)
                input_ids = None
        embeds = self._splice(
            input_ids=input_ids,
            weight=weight,
            inputs_embeds=inputs_embeds,
            offset_a=self.offset_a,
            offset_b=self.offset_b,
            scaling=self.config.scaling,
            attention_mask=attention_mask,
            task_ids=task_ids,
        )
        if attention_mask is None:
            kind: dict[str, Any] = {"dtype": torch.int64, "device": embeds.device}
            mask = torch.ones(embeds.shape[:2], **kind)
            ranks = torch.arange(embeds.shape[1], **kind).expand(mask.shape)
        else:
            head = attention_mask.new_ones(embeds.shape[0], self.config.num_virtual_tokens)
            mask = torch.cat([head, attention_mask], dim=1)
            ranks = mask.cumsum(1, dtype=torch.int64) - 1
        return EPTOutput(embeds, mask, ranks)

    def _splice(self, **arguments: Any) -> Tensor:
        """``[B, m + S, d]``; the arguments of :func:`ept_fast.splice_prompt` but the prompt."""
        table = getattr(self, "offset_table", None)
        if table is None:
            return splice_prompt(self.reconstruct(), **arguments, backend=self.backend)
        return splice_table(self.reconstruct(), table, **arguments)

    @torch.no_grad()
    def _look_up(self, embedding: nn.Module, input_ids: Tensor) -> Tensor:
        """Call the layer: scaled, quantised or hooked layers do their own lookup."""
        check_input_ids(input_ids, None)
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


class FusedEPTPrompt(SplicedPrompt):
    """An EPT prompt for a frozen backbone: the trainable tensors and nothing else.

    With ``num_tasks=T`` it is a bank: every tensor has a leading axis T and ``forward`` takes
    ``task_ids``. The backbone's embedding layer is referenced, not registered, so ``parameters()``,
    ``state_dict()`` and ``to()`` see only the prompt. A layer that does more than a lookup
    (scaling, quantisation, hooks) is called; a plain ``nn.Embedding`` is looked up inside the
    operation.

    Args:
        config: sizes and choices; ``hidden_size`` must be the layer's width.
        embedding: the backbone's embedding layer, as ``model.get_input_embeddings()`` gives it;
            None for a prompt that is called with ``inputs_embeds`` only, and has a tensor as
            ``init``.
        init: the rows that the prompt starts from: ``"vocab"`` (sampled from the table, without its
            padding row), ``"text"`` (of ``text``, repeated as needed), ``"random"`` (normal, with
            the table's standard deviation), or a tensor ``[L, d]`` or ``[T, L, d]`` with L >= m.
            The first m rows are the short prompt. The rows after them, sampled where there are too
            few, give ``offset_b`` through an SVD (METHOD, Initialisation).
        text: for ``init="text"``.
        tokenizer: for ``init="text"``; called as ``tokenizer(text, add_special_tokens=False)``.
        num_tasks: T, or None for a single prompt.
        generator: a CPU generator for everything random; the global one where it is not given.
        dtype: type of the parameters.
        backend: as in :func:`ept_fast.reconstruct_prompt`.

    Raises:
        TypeError, ValueError: arguments that do not fit, by name.

    Example:
        >>> table = nn.Embedding(100, 32)
        >>> config = EPTConfig(32, num_virtual_tokens=4, max_length=16, rank=2)
        >>> prompt = FusedEPTPrompt(config, table)
        >>> prompt(torch.tensor([[5, 6, 7]])).inputs_embeds.shape
        torch.Size([1, 7, 32])
    """

    short_prompt: nn.Parameter
    offset_a: nn.Parameter | None
    offset_b: nn.Parameter | None
    space_down: nn.Parameter | None
    space_up: nn.Parameter | None
    gate_weight: nn.Parameter | None
    gate_bias: nn.Parameter | None

    def __init__(
        self,
        config: EPTConfig,
        embedding: nn.Module | None = None,
        *,
        init: str | Tensor = "vocab",
        text: str | None = None,
        tokenizer: Any = None,
        num_tasks: int | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        backend: str | None = None,
    ) -> None:
        if not isinstance(config, EPTConfig):
            raise TypeError(f"config: expected an EPTConfig, got {type(config).__name__}")
        super().__init__(config, embedding, backend)
        if num_tasks is not None:
            check_count("num_tasks", num_tasks, 1)
        _check_floating(dtype)
        self.num_tasks = num_tasks
        if embedding is not None:
            _check_width(embedding, config)
        rows = _LongPrompt(config, embedding, init, text, tokenizer, num_tasks, generator)
        tasks = [self._initial_tensors(rows.of_task(t), generator) for t in range(num_tasks or 1)]
        device = rows.device
        for name in _NAMES:
            if tasks[0].get(name) is None:
                self.register_parameter(name, None)
                continue
            value = tasks[0][name] if num_tasks is None else torch.stack([t[name] for t in tasks])
            # A copy: the rows may be a view of the caller's tensor, or of the frozen table itself.
            value = torch.empty_like(
                value, dtype=dtype, device=device, memory_format=torch.contiguous_format
            ).copy_(value)
            self.register_parameter(name, nn.Parameter(value))

    def _initial_tensors(
        self, rows: Tensor, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        c = self.config
        d, m, k, h = c.hidden_size, c.num_virtual_tokens, c.num_spaces, c.space_dim
        tensors = {"short_prompt": rows[:m]}
        if c.rank:
            _, singular, directions = torch.linalg.svd(rows[m:].double(), full_matrices=False)
            leading = singular[: c.rank].sqrt().unsqueeze(-1) * directions[: c.rank]
            tensors["offset_a"] = torch.zeros(c.max_length, c.rank)
            tensors["offset_b"] = leading.float()
        if k:
            tensors["space_down"] = torch.randn(k, d, h, generator=generator) / d**0.5
            tensors["space_up"] = torch.zeros(k, h, d)
            tensors["gate_weight"] = torch.randn(d, k, generator=generator) * 0.02
            tensors["gate_bias"] = torch.zeros(k)
        return tensors

    def reconstruct(self) -> Tensor:
        """The reconstructed prompt P′, ``[(T,) m, d]``, in the parameters' type."""
        c = self.config
        tensors = {name: getattr(self, name) for name in _NAMES}
        check_whole(tensors)
        return reconstruct_prompt(
            **tensors,
            scaling=c.scaling,
            activation=c.activation,
            gate=c.gate,
            temperature=c.temperature,
            fusion=c.fusion,
            backend=self.backend,
        )

    @torch.no_grad()
    def gate_weights(self) -> Tensor:
        """The gate's weight of every subspace for every prompt token, ``[(T,) m, K]``.

        In float32 (float64 for float64 parameters), as the operation itself computes them.

        Raises:
            ValueError: the prompt has no subspaces.
        """
        if self.gate_weight is None:
            raise ValueError("num_spaces: expected at least 1 for gate weights, got 0")
        c = self.config
        return gate_weights(
            Parameters(**{name: getattr(self, name) for name in _NAMES}),
            Flags(c.scaling, c.activation, c.gate, c.temperature),
            fusion=c.fusion,
            backend=self.backend,
        )

    def fold(self, dtype: torch.dtype | None = None, offset: str = "low_rank") -> FoldedEPTPrompt:
        """The same prompt for inference: P′ computed once, nothing trainable, the same outputs.

        Args:
            dtype: type of P′ and of the offset table, rounded to it once; that of the parameters
                where it is not given. A and B keep theirs.
            offset: what the text's offsets are read from: ``"low_rank"``, A and B, to the bit as in
                training; ``"table"``, a table c·A·B ``[(T,) n, d]``; ``"auto"``, the table where it
                was measured to be faster: on a CPU with the ``eager`` backend, if it takes no more
                than 64 MiB; ``"none"``, nowhere, for a model that adds the offset itself.

        Raises:
            TypeError, ValueError: another dtype or offset.
        """
        return FoldedEPTPrompt(self, dtype, offset)

    def parameter_groups(
        self, prompt_lr: float, offset_lr: float, space_lr: float
    ) -> list[dict[str, Any]]:
        """Optimizer groups with the method's three learning rates.

        Returns:
            Dicts of ``name`` ("prompt", "offset", "spaces"), ``params`` and ``lr``; groups without
            tensors are left out.
        """
        groups = []
        for (group, names), lr in zip(
            _GROUPS.items(), (prompt_lr, offset_lr, space_lr), strict=True
        ):
            params = [p for p in (getattr(self, name) for name in names) if p is not None]
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
        folder = Path(folder)
        self.load_tensors(folder / TENSOR_FILE, *read_prompt(folder))

    def load_tensors(
        self, path: Path, config: EPTConfig, num_tasks: int | None, tensors: Mapping[str, Tensor]
    ) -> None:
        """Take tensors of ``path`` that were saved with this very config; errors as there."""
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
    ) -> FusedEPTPrompt:
        """Build the prompt that :meth:`save_pretrained` wrote, on this backbone's embedding layer.

        Raises:
            CheckpointError: a missing, truncated, foreign or mismatched file.
            ValueError: the embedding layer has another width.
        """
        config, num_tasks, tensors = read_prompt(Path(folder))
        return cls.from_tensors(config, tensors, embedding, num_tasks=num_tasks, backend=backend)

    @classmethod
    def from_tensors(
        cls,
        config: EPTConfig,
        tensors: Mapping[str, Tensor],
        embedding: nn.Module | None = None,
        *,
        num_tasks: int | None = None,
        backend: str | None = None,
    ) -> FusedEPTPrompt:
        """The prompt with these values, each in its own type.

        Args:
            config: sizes and choices.
            tensors: every parameter by its name. They are not copied where they are on the
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
            _check_width(embedding, config)
            device = embedding_device(embedding)
        for name in _NAMES:
            value = tensors.get(name)
            parameter = None if value is None else nn.Parameter(value.detach().to(device))
            prompt.register_parameter(name, parameter)
        return prompt


class FoldedEPTPrompt(SplicedPrompt):
    """A prompt for inference: P′ as a constant ``[(T,) m, d]``, the offset low-rank or a table.

    Made by :meth:`FusedEPTPrompt.fold`. With the default choices its outputs are, to the bit, those
    of its source; else they differ by the rounding of P′ and of the table.
    """

    prompt: Tensor
    offset_table: Tensor | None

    def __init__(
        self,
        source: FusedEPTPrompt,
        dtype: torch.dtype | None = None,
        offset: str = "low_rank",
    ) -> None:
        super().__init__(source.config, source.embedding, source.backend)
        if dtype is not None:
            _check_floating(dtype)
        check_choice("offset", offset, _OFFSETS)
        self.num_tasks = source.num_tasks
        with torch.no_grad():
            prompt = source.reconstruct().detach().clone()
        self.register_buffer("prompt", prompt if dtype is None else prompt.to(dtype))
        for name in _GROUPS["offset"]:
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

    def _splice(self, **arguments: Any) -> Tensor:
        out = super()._splice(**arguments)
        length, most = out.shape[1] - self.config.num_virtual_tokens, self.config.max_length
        if self.config.rank and self.offset_a is None and length > most:
            name = "input_ids" if arguments["input_ids"] is not None else "inputs_embeds"
            raise ValueError(
                f"{name}: expected at most max_length {most} text positions, got {length}"
            )
        return out


class _LongPrompt:
    """The rows that a prompt starts from: m for the short prompt, then those of the offset."""

    def __init__(
        self,
        config: EPTConfig,
        embedding: nn.Module | None,
        init: str | Tensor,
        text: str | None,
        tokenizer: Any,
        num_tasks: int | None,
        generator: torch.Generator | None,
    ) -> None:
        self.config, self.layer, self.generator = config, embedding, generator
        self.init = init
        self.given: Tensor | None = None
        if isinstance(init, Tensor):
            self.given = self._check_rows(init, num_tasks)
        else:
            check_choice("init", init, _INITS)
            if embedding is None:
                raise ValueError(f"init: expected a tensor where embedding is None, got {init!r}")
            if init != "text" and text is not None:
                raise ValueError(f'text: expected None unless init="text", got {text!r}')
            if init == "text":
                self.given = self._embed(_text_ids(text, tokenizer))

    @property
    def embedding(self) -> nn.Module:
        if self.layer is None:
            c = self.config
            raise ValueError(
                f"init: expected at least num_virtual_tokens + rank = "
                f"{c.num_virtual_tokens + c.rank} rows where embedding is None, got fewer"
            )
        return self.layer

    @property
    def device(self) -> torch.device:
        """Where the parameters go."""
        if self.layer is not None:
            return embedding_device(self.layer)
        return self.init.device if isinstance(self.init, Tensor) else torch.device("cpu")

    def of_task(self, task: int) -> Tensor:
        """Float32 rows on the CPU, ``[at least m + r, d]`` (m where r is 0)."""
        c = self.config
        short = c.num_virtual_tokens
        # The plain prompt of the same budget, so that the offset starts from what EPT replaces.
        wanted = max(-(-c.num_parameters // c.hidden_size), short + c.rank) if c.rank else short
        if self.given is None:
            return self._sample(wanted)
        rows = self.given[task] if self.given.dim() == 3 else self.given
        if self.init == "text":
            rows = rows.repeat(-(-short // len(rows)), 1) if len(rows) < short else rows
        missing = short + c.rank - len(rows)
        return torch.cat([rows, self._sample(missing)]) if missing > 0 else rows

    def _sample(self, count: int) -> Tensor:
        size = _embedding_weight(self.embedding).shape[0]
        order = torch.randperm(size, generator=self.generator)
        padding = getattr(self.embedding, "padding_idx", None)
        if padding is not None and size > 1:
            order = order[order != padding]
        if self.init == "random":
            deviation = self._embed(order[:4096]).std(correction=0)  # a sample, not the first rows
            return torch.randn(count, self.config.hidden_size, generator=self.generator) * deviation
        return self._embed(order.repeat(-(-count // len(order)))[:count])

    @torch.no_grad()
    def _embed(self, ids: Tensor) -> Tensor:
        # the layer itself: it may scale its rows
        rows: Tensor = self.embedding(ids.to(self.device))
        return rows.detach().float().cpu()

    def _check_rows(self, rows: Tensor, num_tasks: int | None) -> Tensor:
        c = self.config
        if not rows.is_floating_point():
            raise TypeError(f"init: expected a floating tensor, got {rows.dtype}")
        if not bool(torch.isfinite(rows).all()):
            raise ValueError("init: expected finite rows, got NaN or infinity")
        axes = 3 if num_tasks is not None and rows.dim() == 3 else 2
        fits = rows.dim() == axes and rows.shape[-1] == c.hidden_size
        fits = fits and rows.shape[-2] >= c.num_virtual_tokens
        if not fits or (axes == 3 and rows.shape[0] != num_tasks):
            lead = "" if num_tasks is None else f"({num_tasks},) "
            raise ValueError(
                f"init: expected shape [{lead}at least {c.num_virtual_tokens}, {c.hidden_size}], "
                f"got {tuple(rows.shape)}"
            )
        return rows.detach().float().cpu()


def _check_floating(dtype: object) -> None:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating dtype, got {dtype!r}")


def _text_ids(text: str | None, tokenizer: Any) -> Tensor:
    if not isinstance(text, str) or tokenizer is None:
        raise ValueError(
            f'text, tokenizer: expected both for init="text", got text {text!r} and '
            f"tokenizer {type(tokenizer).__name__}"
        )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) == 0:
        raise ValueError(f"text: expected at least one token, got {text!r}")
    return torch.tensor(ids, dtype=torch.int64)


def _embedding_weight(embedding: nn.Module) -> Tensor:
    weight = getattr(embedding, "weight", None)
    if isinstance(weight, Tensor):
        check_whole({"embedding.weight": weight})
    if not isinstance(weight, Tensor) or weight.dim() < 2:
        raise TypeError(
            f"embedding: expected a layer with a weight table [V, d], "
            f"got {type(embedding).__name__}"
        )
    return weight


def embedding_device(embedding: nn.Module) -> torch.device:
    """Where an embedding layer computes: where its table is, or is brought for each call.

    Raises:
        ValueError: a table without values, which nothing brings.
    """
    device = _embedding_weight(embedding).device
    if device.type != "meta":
        return device
    # accelerate keeps what it offloads to the CPU or to a disk on the meta device between calls.
    place = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    if place is None:
        raise ValueError("embedding.weight: expected values on a device, got none (device meta)")
    return torch.device(place)


def _embedding_width(embedding: nn.Module) -> int:
    return int(getattr(embedding, "embedding_dim", _embedding_weight(embedding).shape[-1]))


def _check_width(embedding: nn.Module, config: EPTConfig) -> None:
    width = _embedding_width(embedding)
    if width != config.hidden_size:
        raise ValueError(f"embedding: expected width hidden_size {config.hidden_size}, got {width}")


def _is_plain_table(embedding: nn.Module) -> bool:
    """Whether calling the layer is just a lookup in ``weight``."""
    return (
        type(embedding) is nn.Embedding
        and "forward" not in vars(embedding)  # where accelerate and others put their hooks
        and embedding.max_norm is None
        and not embedding._forward_hooks
        and not embedding._forward_pre_hooks
        and not every_module._global_forward_hooks
        and not every_module._global_forward_pre_hooks
    )


def read_prompt_config(folder: Path) -> tuple[EPTConfig, int | None]:
    """Config and number of tasks of a prompt's folder, before any tensor is read.

    Raises:
        CheckpointError: a missing or damaged file, or tensors of other names and shapes.
    """
    path = folder / TENSOR_FILE
    values = read_adapter_json(folder / CONFIG_FILE)
    header = read_header(path)
    saved = parse_json(path, saved_config(path, header))
    try:
        if saved != values:
            raise ValueError(
                f"expected the config the tensors were saved with ({shorten(saved)}), "
                f"got {shorten(values)}"
            )
        num_tasks = values.pop("num_tasks", None)
        if num_tasks is not None:
            check_count("num_tasks", num_tasks, 1)
        config = EPTConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE}: {str(error)[:1000]}") from None
    check_shapes(path, header.shapes, expected_shapes(config, num_tasks))
    return config, num_tasks


def read_prompt(folder: Path) -> tuple[EPTConfig, int | None, dict[str, Tensor]]:
    """Config, number of tasks and tensors of a prompt's folder, all of it checked."""
    config, num_tasks = read_prompt_config(folder)
    tensors, _ = read_tensors(folder / TENSOR_FILE, expected_shapes(config, num_tasks))
    return config, num_tasks, tensors


def expected_shapes(config: EPTConfig, num_tasks: int | None) -> dict[str, tuple[int, ...]]:
    """The tensors of a prompt of these sizes, by name."""
    d, k, h = config.hidden_size, config.num_spaces, config.space_dim
    shapes: dict[str, tuple[int, ...]] = {"short_prompt": (config.num_virtual_tokens, d)}
    if config.rank:
        shapes["offset_a"] = (config.max_length, config.rank)
        shapes["offset_b"] = (config.rank, d)
    if k:
        shapes["space_down"], shapes["space_up"] = (k, d, h), (k, h, d)
        shapes["gate_weight"], shapes["gate_bias"] = (d, k), (k,)
    lead = () if num_tasks is None else (num_tasks,)
    return {name: (*lead, *shape) for name, shape in shapes.items()}
