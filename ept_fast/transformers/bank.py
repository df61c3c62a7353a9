"""One frozen model for many tasks at once: each row of a batch goes behind its own adapter."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ept_fast.config import EPTConfig, PromptConfig, check_choice, check_count
from ept_fast.prompts.base import (
    EPTOutput,
    FoldedPrompt,
    Prompt,
    SplicedPrompt,
    check_constant,
)
from ept_fast.prompts.embedding import embedding_device
from ept_fast.prompts.table import offset_table, table_pays
from ept_fast.transformers import TASKS
from ept_fast.transformers.adapter import SavedAdapter, read_adapter
from ept_fast.transformers.adapter_set import Description, check_adapter_name
from ept_fast.transformers.backbone import embedding_width
from ept_fast.transformers.bank_heads import ROWS, LinearHeads, ModuleHeads
from ept_fast.transformers.hub import find_adapter
from ept_fast.transformers.locks import ReadWriteLock
from ept_fast.transformers.model import EPTModel
from ept_fast.transformers.padding import prompt_mask, ranks_of, real_tokens
from ept_fast.transformers.peft_layers import same
from ept_fast.transformers.prefix_cache import PrefixCache
from ept_fast.transformers.tasks import EPTModelForCausalLM, EPTModelForSeq2SeqLM

__all__ = ["BankPrompt", "EPTBank"]

_BANK = "bank"  # the wrapper's one adapter; the tasks' names are the bank's own
_NEW = "new"
_OFFSETS = ("low_rank", "table", "auto")
_UNLIMITED = torch.iinfo(torch.int64).max


class BankPrompt(SplicedPrompt):
    """Folded prompts of different sizes in tensors of one size, one slot per task.

    A shorter prompt stands at the right end of its slot and is masked on the left; ranks and
    positions that an adapter does not have are zeros, which add nothing. So each row is, but for
    masked positions, what its own adapter would make of it.

    Args:
        config: m, n and r are the largest that a slot takes.
        embedding: the backbone's embedding layer.
        capacity: T, number of slots.
        dtype: type of the offsets.
        backend: as in :func:`ept_fast.splice_prompt`.
        offset: as for :class:`EPTBank`.
    """

    prompt: Tensor  # [T, m, d]
    offset_table: Tensor | None  # [T, n, d]
    lengths: Tensor  # [T], m of each slot
    limits: Tensor  # [T], the longest text of each slot
    only_given: Tensor  # [T] bool, whether a slot's generated tokens get no offset

    def __init__(
        self,
        config: EPTConfig,
        embedding: nn.Module,
        capacity: int,
        dtype: torch.dtype,
        backend: str | None,
        offset: str = "low_rank",
    ) -> None:
        # Each adapter's own scaling is in its slot of offset_a already.
        super().__init__(replace(config, alpha=math.sqrt(config.rank)), embedding, backend)
        weight: Any = embedding.weight
        m, n, r, d = config.num_virtual_tokens, config.max_length, config.rank, config.hidden_size
        kind: dict[str, Any] = {"device": embedding_device(embedding)}
        floats = {**kind, "dtype": dtype}
        embeds = weight.dtype if weight.dtype.is_floating_point else torch.float32
        self.writes = [0] * capacity  # how often each slot was written
        self.register_buffer("prompt", torch.zeros(capacity, m, d, **kind, dtype=embeds))
        self.register_buffer("offset_a", torch.zeros(capacity, n, r, **floats) if r else None)
        self.register_buffer("offset_b", torch.zeros(capacity, r, d, **floats) if r else None)
        table = None
        if self.offset_a is not None:
            pays = offset == "auto" and table_pays(
                self.prompt, self.offset_a, dtype.itemsize, backend
            )
            table = torch.zeros(capacity, n, d, **floats) if pays or offset == "table" else None
        self.register_buffer("offset_table", table)
        self.register_buffer("lengths", torch.full((capacity,), m, **kind))
        self.register_buffer("limits", torch.full((capacity,), _UNLIMITED, **kind))
        self.register_buffer("only_given", torch.zeros(capacity, **kind, dtype=torch.bool))
        self.some_only_given = False
        self._shortest_limit = _UNLIMITED
        self.equal_lengths = True
        self.lock = ReadWriteLock()  # of the slots and of all that is kept for their tasks

    def check(self, config: PromptConfig) -> None:
        """Raise ValueError unless an adapter of these sizes fits into a slot."""
        names = ("num_virtual_tokens", "rank") + (("max_length",) if config.rank else ())
        for name in names:
            most, got = getattr(self.config, name), getattr(config, name)
            if got > most:
                raise ValueError(f"{name}: expected at most {most} as the bank has, got {got}")

    @torch.no_grad()
    def write(self, slot: int, source: FoldedPrompt | None) -> None:
        """Fill a slot, or clear it if there is no source.

        Raises:
            ValueError: values beyond the range of the bank's types; nothing is written then.
        """
        for name in ("prompt", "offset_a", "offset_b"):
            value, kept = getattr(source, name, None), getattr(self, name)
            if value is not None and not bool(torch.isfinite(value.to(kept.dtype)).all()):
                raise ValueError(f"{name}: expected values within {kept.dtype}, got larger ones")
        m = self.prompt.shape[1]
        for buffer in (self.prompt, self.offset_a, self.offset_b, self.offset_table):
            if buffer is not None:
                buffer[slot].zero_()
        self.lengths[slot], self.limits[slot], self.only_given[slot] = m, _UNLIMITED, False
        self.writes[slot] += 1
        if source is not None:
            config = source.config
            self.lengths[slot] = config.num_virtual_tokens
            self.only_given[slot] = config.offset_tokens == "given"
            self.prompt[slot, m - config.num_virtual_tokens :] = source.prompt
            a, b, kept_b = source.offset_a, source.offset_b, self.offset_b
            if a is not None and b is not None and self.offset_a is not None and kept_b is not None:
                own = a.to(torch.promote_types(a.dtype, torch.float32))
                self.offset_a[slot, : config.max_length, : config.rank] = own * config.scaling
                kept_b[slot, : config.rank] = b
                if self.offset_table is not None:
                    table = offset_table(own, b, config.scaling, own.dtype)
                    self.offset_table[slot, : config.max_length] = table
                self.limits[slot] = config.max_length
        self.some_only_given = bool(self.only_given.any())
        self._shortest_limit = int(self.limits.min())
        self.equal_lengths = bool((self.lengths == m).all())

    def reconstruct(self) -> Tensor:
        """The slots' prompts, ``[T, m, d]``."""
        return self.prompt

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        task_ids: Tensor | None = None,
        states: Tensor | None = None,
    ) -> EPTOutput:
        """Each row behind the prompt of its slot; the mask has zeros if that is shorter.

        Raises:
            ValueError: a text longer than its adapter's offset covers, or than the bank takes.
        """
        text = input_ids if input_ids is not None else inputs_embeds
        assert text is not None
        assert task_ids is not None
        length = text.shape[1]
        if self.offset_a is not None and length > self.config.max_length:
            raise ValueError(
                f"input_ids: expected at most {self.config.max_length} columns, the bank's "
                f"max_length, got {length}"
            )
        if length > self._shortest_limit:
            self._check_lengths(length, attention_mask, task_ids)
        spliced = super().forward(input_ids, inputs_embeds, attention_mask, task_ids)
        if self.equal_lengths:
            return spliced
        m, mask = self.config.num_virtual_tokens, spliced.attention_mask
        mask = prompt_mask(mask, self.lengths[task_ids], m)
        return EPTOutput(spliced.inputs_embeds, mask, ranks_of(mask))

    def _check_lengths(self, length: int, mask: Tensor | None, task_ids: Tensor) -> None:
        limits = self.limits[task_ids]
        counts = torch.full_like(limits, length) if mask is None else real_tokens(mask)
        long = (counts > limits).nonzero()
        if len(long):
            row = int(long[0])
            raise ValueError(
                f"input_ids: row {row}: expected at most {int(limits[row])} tokens, the "
                f"max_length of its adapter, got {int(counts[row])}"
            )


class EPTBank(nn.Module):
    """One frozen model and the adapters of many tasks; each row of a batch is of its own task.

    All adapters lie in tensors of a fixed size, so that one can be added, replaced or removed while
    serving: nothing else is copied and nothing compiled anew. Shorter prompts, lower ranks and
    shorter offsets than the bank's are padded and masked, which changes no result. For inference
    only.

    Threads may share a bank. A change waits for calls of ``forward`` and ``generate`` under way,
    and new ones wait for it, so that each sees the old adapter or the new one, whole. Compiled code
    takes no part in this: whoever calls a bank from within it keeps changes out himself.

    Args:
        model: the frozen ``transformers`` model, as for :func:`ept_fast.get_ept_model`.
        task: as there; the same for all adapters.
        capacity: the most adapters at a time.
        num_virtual_tokens, max_length, rank: the largest that an adapter may have. ``max_length``
            is also the longest text, in columns, if ``rank`` is not 0.
        num_labels: the most classes of an adapter, for tasks with a head.
        dtype: type that offsets are kept in.
        offset: ``"low_rank"``, ``"table"`` or ``"auto"``, as in
            :meth:`ept_fast.FusedEPTPrompt.fold`; the table is of ``capacity`` × ``max_length``
            rows.
        backend: as in :func:`ept_fast.splice_prompt`.

    Raises:
        TypeError, ValueError: arguments that do not fit, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        task: str,
        *,
        capacity: int,
        num_virtual_tokens: int,
        max_length: int,
        rank: int,
        num_labels: int = 2,
        dtype: torch.dtype = torch.float32,
        offset: str = "auto",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_choice("task", task, TASKS)
        check_choice("offset", offset, _OFFSETS)
        check_count("capacity", capacity, 1)
        check_count("num_labels", num_labels, 1)
        config = EPTConfig(
            embedding_width(model),
            num_virtual_tokens=num_virtual_tokens,
            max_length=max_length,
            rank=rank,
            num_spaces=0,
        )
        self.model = EPTModel.of_task(task)(model, backend=backend)
        self.capacity, self.num_labels = capacity, num_labels
        self._slots: dict[str, int] = {}
        self._labels: dict[str, tuple[str, ...]] = {}
        layer = self.model.get_input_embeddings()
        self.bank = BankPrompt(config, layer, capacity, dtype, backend, offset)
        self.model.place(_BANK, self.bank, None, Description())
        self.eval()

    @classmethod
    def from_adapters(
        cls,
        model: nn.Module,
        adapters: Mapping[str, str | Path | SavedAdapter],
        *,
        capacity: int | None = None,
        **choices: Any,
    ) -> EPTBank:
        """A bank of saved adapters, as large as they need.

        Args:
            model: the frozen model.
            adapters: by name the folder of each, its hub id as in
                :meth:`ept_fast.EPTModel.from_pretrained`, or what ``read_adapter`` has read.
            capacity: the most adapters at a time; by default the number of these.
            **choices: sizes of the bank if they shall be larger than these adapters need, and
                ``dtype``, ``offset`` and ``backend``.

        Raises:
            CheckpointError: a missing, damaged or foreign file, or a repository that cannot be
                read.
            ValueError: no adapters, or adapters of different tasks.
        """
        if not adapters:
            raise ValueError("adapters: expected at least one, got none")
        read = {name: find_adapter(each) for name, each in adapters.items()}
        tasks = sorted({saved.values["task"] for saved in read.values()})
        if len(tasks) > 1:
            raise ValueError(f"adapters: expected adapters of one task, got {', '.join(tasks)}")
        width = embedding_width(model)
        configs = [saved.config(width) for saved in read.values()]
        with_offset = [c for c in configs if c.rank]
        sizes = {
            "num_virtual_tokens": max(c.num_virtual_tokens for c in configs),
            "max_length": max((c.max_length for c in with_offset), default=1),
            "rank": max(c.rank for c in configs),
            "num_labels": max(len(saved.values["labels"] or ("",)) for saved in read.values()),
        }
        given = {"capacity": len(adapters) if capacity is None else capacity, **sizes, **choices}
        bank = cls(model, tasks[0], **given)
        try:
            for name in adapters:
                bank.add(name, read.pop(name))
        except BaseException:
            bank.unload()
            raise
        return bank

    # Adapters

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tasks, in the order they came."""
        return tuple(self._slots)

    def labels(self, name: str) -> tuple[str, ...]:
        """Names of a task's classes, in the order of its logits; empty without a head."""
        self.ids([name])
        return self._labels[name]

    def ids(self, names: Sequence[str]) -> Tensor:
        """The slots of these tasks, ``[len(names)]`` int64 on the bank's device.

        A slot keeps its number until its task is removed.

        Raises:
            ValueError: an unknown name; the message lists the known ones.
        """
        for name in names:
            if name not in self._slots:
                known = ", ".join(self._slots) or "none"
                raise ValueError(f"tasks: expected names among {known}, got {name!r}")
        return torch.tensor([self._slots[name] for name in names], device=self.bank.prompt.device)

    def add(self, name: str, adapter: str | Path | SavedAdapter | EPTModel | Prompt) -> int:
        """Add a task in a free slot.

        Args:
            name: letters, digits, ``_`` and ``-``.
            adapter: the folder of a saved adapter; or a model, whose active adapter is copied; or,
                for tasks without a head, a prompt.

        Returns:
            The slot.

        Raises:
            CheckpointError: a missing, damaged or foreign file.
            ValueError: a name that is taken, a full bank, an adapter that does not fit; the bank is
                as before then.
        """
        with self.bank.lock.writing():
            check_adapter_name(name, self._slots)
            used = set(self._slots.values())
            slot = next((s for s in range(self.capacity) if s not in used), None)
            if slot is None:
                raise ValueError(
                    f"capacity: expected at most {self.capacity} adapters, got one more"
                )
            self._write(name, slot, adapter)
        return slot

    def replace(self, name: str, adapter: str | Path | SavedAdapter | EPTModel | Prompt) -> int:
        """Put another adapter in a task's slot; arguments, result and errors as :meth:`add`."""
        with self.bank.lock.writing():
            slot = int(self.ids([name])[0])
            self._write(name, slot, adapter)
        return slot

    def remove(self, name: str) -> None:
        """Free a task's slot.

        Raises:
            ValueError: an unknown name.
        """
        with self.bank.lock.writing():
            slot = int(self.ids([name])[0])
            del self._slots[name], self._labels[name]
            self.bank.write(slot, None)
            for head in self._heads():
                head.write(slot, None)

    def _write(self, name: str, slot: int, adapter: Any) -> None:
        try:
            if isinstance(adapter, (str, Path)):
                adapter = read_adapter(adapter)
            if isinstance(adapter, SavedAdapter):
                self.model.add_saved(adapter, _NEW)
                try:
                    self._copy(name, slot, self.model, _NEW)
                finally:
                    self.model.delete_adapter(_NEW)
            elif isinstance(adapter, EPTModel):
                self._check_model(adapter)
                self._copy(name, slot, adapter, adapter.active_adapter)
            elif not isinstance(adapter, Prompt):
                raise TypeError(
                    f"adapter: expected a folder, an EPTModel or a FusedEPTPrompt, "
                    f"got {type(adapter).__name__}"
                )
            elif self.model.has_head:
                raise ValueError(
                    f"adapter: expected a folder or a model with a head for task "
                    f"{self.model.task}, got a prompt alone"
                )
            else:
                self._fill(name, slot, adapter, Description(), None)
        finally:
            self.requires_grad_(False)  # an active adapter is one to train, for the wrapper

    def _check_model(self, other: EPTModel) -> None:
        kinds = [getattr(m.config, "model_type", None) for m in (self.model, other)]
        for field, expected, got in (
            ("task", self.model.task, other.task),
            ("model_type", *kinds),
        ):
            if got != expected:
                raise ValueError(f"adapter: expected one for {field} {expected}, got {got}")
        if not same(self.model.peft, other.peft):
            raise ValueError(
                "adapter: expected one with the bank's adapter of PEFT in its model, or neither "
                "with any, got another"
            )

    def _copy(self, name: str, slot: int, source: EPTModel, adapter: str) -> None:
        prompt: Any = source.prompts[adapter]
        self._fill(name, slot, prompt, source.descriptions[adapter], source.head_of(adapter))

    def _check_head(self, slot: int, described: Description, head: nn.Module) -> None:
        """The first adapter decides how logits are taken; the others have to agree."""
        if len(described.labels or ()) > self.num_labels:
            raise ValueError(
                f"num_labels: expected at most {self.num_labels} classes as the bank has, "
                f"got {len(described.labels or ())}"
            )
        known = self.model.descriptions[_BANK]
        kind = replace(described, labels=None, head_dropout=0.0)
        if self._heads() and kind == known:
            return
        if any(taken != slot for taken in self._slots.values()):
            for field in ("head", "pooling"):
                expected, got = getattr(known, field), getattr(described, field)
                if expected != got:
                    raise ValueError(
                        f"{field}: expected {expected!r} as the bank's other adapters have, "
                        f"got {got!r}"
                    )
        heads: nn.Module
        if isinstance(head, nn.Linear):
            dtype = torch.promote_types(head.weight.dtype, torch.float32)
            heads = LinearHeads(head.in_features, self.capacity, self.num_labels, dtype)
        else:
            modules: Any = head
            heads = nn.ModuleDict({n: ModuleHeads(self.num_labels) for n in modules})
        self.model.place(_BANK, self.bank, heads.to(self.bank.prompt.device), kind)

    def _check_prompt(self, prompt: Prompt) -> None:
        if prompt.num_tasks is not None:
            raise ValueError(f"adapter: expected a single prompt, got a bank of {prompt.num_tasks}")
        if prompt.config.hidden_size != self.bank.config.hidden_size:
            raise ValueError(
                f"hidden_size: expected {self.bank.config.hidden_size}, "
                f"got {prompt.config.hidden_size}"
            )
        check_constant("adapter", prompt)
        self.bank.check(prompt.config)

    def _fill(
        self, name: str, slot: int, prompt: Prompt, described: Description, head: Any
    ) -> None:
        self._check_prompt(prompt)
        if head is not None:
            self._check_head(slot, described, head)
        folded = prompt.fold()
        assert isinstance(folded, FoldedPrompt)  # as the prompt is constant
        self.bank.write(slot, folded)
        parts = [head] if isinstance(head, nn.Linear) else list((head or {}).values())
        for heads, part in zip(self._heads(), parts, strict=True):
            heads.write(slot, copy.deepcopy(part).to(self.bank.prompt.device))
        self._slots[name], self._labels[name] = slot, described.labels or ()

    def _heads(self) -> list[Any]:
        head = self.model.head
        if head is None:
            return []
        return [head] if isinstance(head, LinearHeads) else list(head.values())

    def memory(self) -> dict[str, int]:
        """Bytes that each task's slot takes, prompt, offset and head together."""
        bank = self.bank
        kept = (bank.prompt, bank.offset_a, bank.offset_b, bank.offset_table)
        shared = [buffer for buffer in kept if buffer is not None]
        heads = self._heads()
        if heads and isinstance(heads[0], LinearHeads):
            shared += [heads[0].weight, heads[0].bias]
        each = sum(b.numel() * b.element_size() for b in shared) // self.capacity
        sizes = {}
        with self._reading():
            for name, slot in self._slots.items():
                own = [h.of_slot[str(slot)] for h in heads if isinstance(h, ModuleHeads)]
                parameters = [p for module in own for p in module.parameters()]
                sizes[name] = each + sum(p.numel() * p.element_size() for p in parameters)
        return sizes

    def unload(self) -> Any:
        """Take the backbone out: the model that was given, as it was; the bank is done with."""
        with self.bank.lock.writing():
            return self.model.unload()

    # Use

    def train(self, mode: bool = True) -> EPTBank:
        """For inference only: stays in evaluation mode."""
        return super().train(False)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        tasks: Sequence[str] | Tensor,
        **kwargs: Any,
    ) -> Any:
        """What each row's own adapter gives; as :meth:`EPTModel.forward`, for inference.

        Args:
            input_ids, attention_mask: ``[B, S]``, as there.
            tasks: the name of each row's task, or its slots as :meth:`ids` gives them, ``[B]``.
            **kwargs: as there, but for ``labels``.

        Raises:
            ValueError: an unknown name; a text longer than its adapter covers.
        """
        if kwargs.pop("labels", None) is not None:
            raise ValueError("labels: expected None, as a bank is for inference, got some")
        text = input_ids if input_ids is not None else kwargs.get("inputs_embeds")
        with self._reading(), torch.no_grad():
            task_ids = self._task_ids(tasks, None if text is None else text.shape[0])
            kwargs |= {"attention_mask": attention_mask, "task_ids": task_ids}
            if not self.model.has_head:
                return self.model(input_ids=input_ids, **kwargs)
            token = ROWS.set(task_ids)
            try:
                return self.model(input_ids=input_ids, **kwargs)
            finally:
                ROWS.reset(token)

    def prefix_cache(self) -> PrefixCache:
        """The keys and values of all prompts, for ``prefix`` in :meth:`forward` and `generate`.

        A task that was added or replaced since needs its ``update()``, which computes that alone.

        Raises:
            TypeError: a task of another kind than CAUSAL_LM.
            ValueError: a backbone with layers that keep something else than keys and values.
        """
        if not isinstance(self.model, EPTModelForCausalLM):
            raise TypeError(f"prefix_cache: expected task CAUSAL_LM, got {self.model.task}")
        return self.model.prefix_cache()

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        tasks: Sequence[str] | Tensor,
        **kwargs: Any,
    ) -> Any:
        """What ``generate`` gives for each row behind its own adapter.

        Args:
            input_ids, attention_mask, **kwargs: as :meth:`EPTModelForCausalLM.generate`.
            tasks: as in :meth:`forward`.

        Raises:
            TypeError: a task that does not generate.
            ValueError: as there, and an unknown name.
        """
        if not isinstance(self.model, (EPTModelForCausalLM, EPTModelForSeq2SeqLM)):
            raise TypeError(f"generate: expected a task that generates, got {self.model.task}")
        with self._reading():
            task_ids = self._task_ids(tasks, input_ids.shape[0])
            return self.model.generate(input_ids, attention_mask, task_ids=task_ids, **kwargs)

    def _reading(self) -> AbstractContextManager[None]:
        return nullcontext() if torch.compiler.is_compiling() else self.bank.lock.reading()

    def _task_ids(self, tasks: Sequence[str] | Tensor, batch: int | None) -> Tensor:
        if isinstance(tasks, str):
            raise TypeError(f"tasks: expected a name for each row, got the string {tasks!r}")
        ids = tasks if isinstance(tasks, Tensor) else self.ids(tasks)
        if batch is not None and tuple(ids.shape) != (batch,):
            raise ValueError(f"tasks: expected one for each of {batch} rows, got {len(ids)}")
        on_host = ids.device.type == "cpu" and not torch.compiler.is_compiling()
        if isinstance(tasks, Tensor) and on_host:
            free = set(ids.tolist()) - set(self._slots.values())
            if free:
                raise ValueError(
                    f"tasks: expected slots among {sorted(self._slots.values())}, "
                    f"got {sorted(free)}"
                )
        return ids
