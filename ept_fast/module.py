"""The prompt as an ``nn.Module`` before a frozen model, and its folded form for inference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ept_fast.checkpoint import (
    CheckpointError,
    check_tensors,
    json_bytes,
    read_json,
    read_tensors,
    tensor_bytes,
    write_files,
)
from ept_fast.config import EPTConfig, check_choice, check_count
from ept_fast.functional import reconstruct_prompt, splice_prompt
from ept_fast.validation import check_input_ids, check_splice_values

__all__ = ["CONFIG_FILE", "TENSOR_FILE", "EPTOutput", "FoldedEPTPrompt", "FusedEPTPrompt"]

CONFIG_FILE = "ept_config.json"
TENSOR_FILE = "ept_model.safetensors"

_INITS = ("vocab", "text", "random")
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


class _SplicedPrompt(nn.Module):
    """What the trainable and the folded prompt share: the embedding layer and the splice."""

    offset_a: Tensor | None
    offset_b: Tensor | None

    def __init__(self, config: EPTConfig, embedding: nn.Module, backend: str | None) -> None:
        super().__init__()
        self.config = config
        self.backend = backend
        # In a tuple, so that it is not registered: the table belongs to the backbone and is neither
        # trained, moved nor saved with the prompt.
        self._embedding = (embedding,)

    @property
    def embedding(self) -> nn.Module:
        """The backbone's embedding layer."""
        return self._embedding[0]

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
            TypeError, ValueError: as :func:`ept_fast.splice_prompt`; S > max_length where rank > 0.
            IndexError: an id outside the vocabulary or the bank.
        """
        weight = None
        if input_ids is not None and inputs_embeds is None:
            if _is_plain_table(self.embedding):
                weight = _embedding_weight(self.embedding)
            else:
                inputs_embeds = self._look_up(input_ids)
                input_ids = None
        embeds = splice_prompt(
            self.reconstruct(),
            input_ids=input_ids,
            weight=weight,
            inputs_embeds=inputs_embeds,
            offset_a=self.offset_a,
            offset_b=self.offset_b,
            scaling=self.config.scaling,
            attention_mask=attention_mask,
            task_ids=task_ids,
            backend=self.backend,
        )
        batch, total, _ = embeds.shape
        length = total - self.config.num_virtual_tokens
        if attention_mask is None:
            attention_mask = torch.ones(batch, length, dtype=torch.int64, device=embeds.device)
        head = attention_mask.new_ones(batch, self.config.num_virtual_tokens)
        mask = torch.cat([head, attention_mask], dim=1)
        return EPTOutput(embeds, mask, mask.cumsum(1, dtype=torch.int64) - 1)

    @torch.no_grad()
    def _look_up(self, input_ids: Tensor) -> Tensor:
        """Call the layer: scaled, quantised or hooked layers do their own lookup."""
        check_input_ids(input_ids, None)
        if torch.compiler.is_compiling():
            return self.embedding(input_ids)  # type: ignore[no-any-return]
        try:
            return self.embedding(input_ids)  # type: ignore[no-any-return]
        except IndexError:
            rows = getattr(self.embedding, "num_embeddings", None)
            if isinstance(rows, int):
                check_splice_values(input_ids, rows, None, None, 0)  # names row and column
            raise

    def extra_repr(self) -> str:
        """The config's fields, for ``repr``."""
        return ", ".join(f"{name}={value!r}" for name, value in self.config.to_dict().items())


class FusedEPTPrompt(_SplicedPrompt):
    """An EPT prompt for a frozen backbone: the trainable tensors and nothing else.

    With ``num_tasks=T`` it is a bank: every tensor has a leading axis T and ``forward`` takes
    ``task_ids``. The backbone's embedding layer is referenced, not registered, so ``parameters()``,
    ``state_dict()`` and ``to()`` see only the prompt. A layer that does more than a lookup
    (scaling, quantisation, hooks) is called; a plain ``nn.Embedding`` is looked up inside the
    operation.

    Args:
        config: sizes and choices; ``hidden_size`` must be the layer's width.
        embedding: the backbone's embedding layer, as ``model.get_input_embeddings()`` gives it.
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
        embedding: nn.Module,
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
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype: expected a floating dtype, got {dtype!r}")
        self.num_tasks = num_tasks
        width = _embedding_width(embedding)
        if width != config.hidden_size:
            raise ValueError(
                f"embedding: expected width hidden_size {config.hidden_size}, got {width}"
            )
        rows = _LongPrompt(config, embedding, init, text, tokenizer, num_tasks, generator)
        tasks = [self._initial_tensors(rows.of_task(t), generator) for t in range(num_tasks or 1)]
        device = _embedding_weight(embedding).device
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
        return reconstruct_prompt(
            **{name: getattr(self, name) for name in _NAMES},
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
        c = self.config
        if self.gate_weight is None or self.gate_bias is None:
            raise ValueError("num_spaces: expected at least 1 for gate weights, got 0")
        dtype = torch.promote_types(self.short_prompt.dtype, torch.float32)
        weight, bias = self.gate_weight.to(dtype), self.gate_bias.to(dtype).unsqueeze(-2)
        with torch.autocast(weight.device.type, enabled=False):
            fused = reconstruct_prompt(
                self.short_prompt.to(dtype),
                self.offset_a,
                self.offset_b,
                scaling=c.scaling,
                fusion=c.fusion,
                backend=self.backend,
            )
            logits = (fused @ weight + bias) / c.temperature
            if c.gate == "prompt":
                logits = logits.mean(-2, keepdim=True).expand_as(logits)
            return logits.softmax(-1)

    def fold(self) -> FoldedEPTPrompt:
        """The same prompt for inference: P′ computed once, nothing trainable, the same outputs."""
        return FoldedEPTPrompt(self)

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

        Raises:
            ValueError: a tensor holds NaN or infinity.
        """
        folder = Path(folder)
        values = {**self.config.to_dict(), "num_tasks": self.num_tasks}
        tensors = {name: p.detach() for name, p in self.named_parameters(recurse=False)}
        files = {
            folder / TENSOR_FILE: tensor_bytes(tensors, json.dumps(values)),
            folder / CONFIG_FILE: json_bytes(values),
        }
        write_files(files)

    def load_pretrained(self, folder: str | Path) -> None:
        """Read tensors that :meth:`save_pretrained` wrote for this very config into this module.

        Raises:
            CheckpointError: a missing, truncated, foreign or mismatched file; the module then keeps
                the values that it had.
        """
        config, num_tasks, tensors = _read_folder(Path(folder))
        if config != self.config or num_tasks != self.num_tasks:
            raise CheckpointError(
                f"{folder}: expected {self.config} with num_tasks {self.num_tasks}, "
                f"got {config} with num_tasks {num_tasks}"
            )
        parameters = dict(self.named_parameters(recurse=False))
        values = {name: tensors[name].to(p.dtype) for name, p in parameters.items()}
        for name, value in values.items():
            if not bool(torch.isfinite(value).all()):
                raise CheckpointError(
                    f"{Path(folder) / TENSOR_FILE}: {name}: expected values in the range of "
                    f"{value.dtype}, got larger ones in {tensors[name].dtype}"
                )
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(values[name])

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, embedding: nn.Module, *, backend: str | None = None
    ) -> FusedEPTPrompt:
        """Build the prompt that :meth:`save_pretrained` wrote, on this backbone's embedding layer.

        Raises:
            CheckpointError: a missing, truncated, foreign or mismatched file.
            ValueError: the embedding layer has another width.
        """
        config, num_tasks, tensors = _read_folder(Path(folder))
        rows = torch.zeros(config.num_virtual_tokens + config.rank, config.hidden_size)
        prompt = cls(
            config,
            embedding,
            init=rows,
            num_tasks=num_tasks,
            generator=torch.Generator(),  # every value is replaced; the global one stays as it is
            backend=backend,
        )
        for name, parameter in list(prompt.named_parameters(recurse=False)):
            setattr(prompt, name, nn.Parameter(tensors[name].to(parameter.device)))
        return prompt


class FoldedEPTPrompt(_SplicedPrompt):
    """A prompt for inference: P′ as a constant ``[(T,) m, d]``, the offset still low-rank.

    Made by :meth:`FusedEPTPrompt.fold`; its outputs are, to the bit, those of its source.
    """

    prompt: Tensor

    def __init__(self, source: FusedEPTPrompt) -> None:
        super().__init__(source.config, source.embedding, source.backend)
        self.num_tasks = source.num_tasks
        with torch.no_grad():
            self.register_buffer("prompt", source.reconstruct().detach().clone())
        for name in _GROUPS["offset"]:
            tensor = getattr(source, name)
            self.register_buffer(name, None if tensor is None else tensor.detach().clone())

    def reconstruct(self) -> Tensor:
        """The constant prompt P′, ``[(T,) m, d]``."""
        return self.prompt


class _LongPrompt:
    """The rows that a prompt starts from: m for the short prompt, then those of the offset."""

    def __init__(
        self,
        config: EPTConfig,
        embedding: nn.Module,
        init: str | Tensor,
        text: str | None,
        tokenizer: Any,
        num_tasks: int | None,
        generator: torch.Generator | None,
    ) -> None:
        self.config, self.embedding, self.generator = config, embedding, generator
        self.init = init
        self.given: Tensor | None = None
        if isinstance(init, Tensor):
            self.given = self._check_rows(init, num_tasks)
        else:
            check_choice("init", init, _INITS)
            if init != "text" and text is not None:
                raise ValueError(f'text: expected None unless init="text", got {text!r}')
            if init == "text":
                self.given = self._embed(_text_ids(text, tokenizer))

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
        weight = _embedding_weight(self.embedding)
        size = weight.shape[0]
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
        device = _embedding_weight(self.embedding).device
        rows: Tensor = self.embedding(ids.to(device))  # the layer itself: it may scale its rows
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
    if not isinstance(weight, Tensor) or weight.dim() < 2:
        raise TypeError(
            f"embedding: expected a layer with a weight table [V, d], "
            f"got {type(embedding).__name__}"
        )
    return weight


def _embedding_width(embedding: nn.Module) -> int:
    return int(getattr(embedding, "embedding_dim", _embedding_weight(embedding).shape[-1]))


def _is_plain_table(embedding: nn.Module) -> bool:
    """Whether calling the layer is just a lookup in ``weight``."""
    return (
        type(embedding) is nn.Embedding
        and "forward" not in vars(embedding)  # where accelerate and others put their hooks
        and embedding.max_norm is None
        and not embedding._forward_hooks
        and not embedding._forward_pre_hooks
    )


def _read_folder(folder: Path) -> tuple[EPTConfig, int | None, dict[str, Tensor]]:
    """Config, number of tasks and tensors of an adapter folder, all of it checked."""
    path = folder / TENSOR_FILE
    values = read_json(folder / CONFIG_FILE)
    tensors, inside = read_tensors(path)
    try:
        saved = json.loads(inside)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected a config in the metadata, got {error}") from None
    try:
        if saved != values:
            raise ValueError(
                f"expected the config the tensors were saved with ({saved}), got {values}"
            )
        num_tasks = values.pop("num_tasks", None)
        if num_tasks is not None:
            check_count("num_tasks", num_tasks, 1)
        config = EPTConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE}: {error}") from None
    check_tensors(path, tensors, _expected_shapes(config, num_tasks))
    return config, num_tasks, tensors


def _expected_shapes(config: EPTConfig, num_tasks: int | None) -> dict[str, tuple[int, ...]]:
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
