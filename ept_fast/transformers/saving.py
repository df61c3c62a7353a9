"""Adapters of a model in files: saved alone, loaded back, and what a state dict holds of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ept_fast.prompts.base import prompt_class
from ept_fast.prompts.embedding import embedding_device
from ept_fast.storage.files import CheckpointError
from ept_fast.storage.sharded import fill, gather, reshard, writing_process
from ept_fast.storage.untrusted import shorten
from ept_fast.transformers.adapter import (
    DESCRIPTION,
    SavedAdapter,
    adapter_files,
    describe_state,
    read_adapter,
    write_adapter,
)
from ept_fast.transformers.adapter_set import AdapterSet, Description, check_adapter_name
from ept_fast.transformers.backbone import embedding_width, load_backbone, names_it

if TYPE_CHECKING:
    from ept_fast.transformers.model import EPTModel

__all__ = [
    "AdapterFiles",
]


class AdapterFiles(AdapterSet):
    """Adapters that can be written and read, alone and in a state dict."""

    backend: str | None
    base_model_name: str | None

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(_keep_adapters)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_expect_adapters)  # type: ignore[no-untyped-call]

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        adapter_name: str | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Write an adapter into ``folder``: safetensors and JSON, never the backbone.

        All files are on the disk under temporary names before any takes the place of an older one,
        the description last. If FSDP2 shards the model, every process has to call this, and one
        of them writes.

        Args:
            folder: made if it is missing.
            adapter_name: which adapter; by default the active one.
            extra: further JSON values to keep in the description.

        Raises:
            ValueError: no such adapter, or a tensor holds NaN or infinity; nothing is written then.
            WriteError: a file cannot be written.
        """
        name = self.known(adapter_name or self.active_adapter)
        prompt: Any = self.prompts[name]
        module = self.head_of(name)
        reshard(self)
        head = None if module is None else gather(module.state_dict())
        values = {**self.saved_values(name), "extra": dict(extra or {})}
        files = adapter_files(prompt.files(), head, values, prompt.config)
        with writing_process(prompt.parameters()) as writes:
            if writes:
                write_adapter(Path(folder), files)

    def saved_values(self, name: str) -> dict[str, Any]:
        """What an adapter's description says besides its tensors and their sizes."""
        return {
            "task": self.task,
            "base_model": self.base_model_name,
            "base_model_type": getattr(self.backbone.config, "model_type", None),
            **vars(self.descriptions[name]),
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
            chosen = self.describe(described.labels, described.pooling, described.head_dropout)
        except ValueError as error:
            raise CheckpointError(f"{saved.path}: {str(error)[:1000]}") from None
        if chosen != described:
            raise CheckpointError(
                f"{saved.path}: head: expected {chosen.head!r} as this model needs, "
                f"got {described.head!r}"
            )
        layer = self.backbone.get_input_embeddings()
        values = {name: tensor.clone() for name, tensor in saved.prompt.tensors.items()}
        prompt = prompt_class(config).from_tensors(config, values, layer, backend=self.backend)
        with torch.random.fork_rng(devices=()):  # of which a new linear layer draws
            head = self.new_head(described, torch.Generator())
        if head is not None:
            tensors = saved.head(head)
            if described.head == "linear":
                head.to(next(iter(tensors.values())).dtype)
            head.load_state_dict(tensors)
            head.to(embedding_device(layer))
        self.place(name, prompt, head, described)

    def _check_saved(self, saved: SavedAdapter) -> Description:
        values = saved.values
        kind = getattr(self.backbone.config, "model_type", None)
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
        is_trainable: bool = True,
        backend: str | None = None,
        trust_remote_code: bool = False,
        allow_download: bool = False,
    ) -> EPTModel:
        """The model of a saved adapter, of the class of its task, in evaluation mode.

        Args:
            folder: what :meth:`save_pretrained` wrote; or else what transformers' Trainer or
                accelerate did, the state dict of a model as ``model.safetensors``. An adapter that
                :func:`~ept_fast.transformers.adapter.read_adapter` has read will do too.
            model: the frozen model, if it is loaded already.
            base_model: folder or hub id to load it from, in place of the name saved with the
                adapter.
            adapter_name: the adapter's name in the new model.
            saved_name: which adapter of several in a state dict; by default the active one.
            is_trainable: whether the adapter requires gradients, so that ``train()`` is all that
                training needs. Without, nothing does until :meth:`set_adapter` is called.
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
        expected = getattr(cls, "task", values["task"])  # EPTModel itself is of no task
        if expected != values["task"]:
            raise CheckpointError(
                f"{saved.path}: task: expected {expected!r}, got {values['task']!r}"
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
        chosen: EPTModel = cls.of_task(values["task"])(model, base_model=name, backend=backend)
        try:
            chosen.add_saved(saved, adapter_name)
        except BaseException:
            chosen.unload()
            raise
        if not is_trainable:
            chosen.requires_grad_(False)
        return chosen.eval()


def _keep_adapters(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    """A state dict holds prompts and heads, never backbone weights, and says what they are."""
    kept = (f"{prefix}prompts.", f"{prefix}heads.")
    for key in [k for k in state if k.startswith(prefix) and not k.startswith(kept)]:
        del state[key]
    description = describe_state(
        module.active_adapter,
        {name: (module.saved_values(name), p.config) for name, p in module.prompts.items()},
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
