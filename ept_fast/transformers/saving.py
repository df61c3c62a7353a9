"""Adapters of a model in files: saved alone, loaded back, and what a state dict holds of them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import nn

from ept_fast.prompts.base import expected_shapes, prompt_class
from ept_fast.prompts.embedding import embedding_device
from ept_fast.storage.files import CheckpointError
from ept_fast.storage.sharded import fill, gather, reshard, writing_process
from ept_fast.storage.untrusted import shorten
from ept_fast.transformers.adapter import (
    ADAPTER_FILE,
    DESCRIPTION,
    SavedAdapter,
    SavedPeft,
    adapter_files,
    describe_state,
    write_adapter,
)
from ept_fast.transformers.adapter_set import AdapterSet, Description, check_adapter_name
from ept_fast.transformers.backbone import embedding_width, load_backbone, names_it
from ept_fast.transformers.hub import (
    CARD_FILE,
    AdapterCard,
    HubOptions,
    check_metrics,
    check_repo_id,
    find_adapter,
    is_hub_id,
    kept_card,
    upload_adapter,
)
from ept_fast.transformers.peft_layers import PeftAdapter, put_in

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

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
        save_directory: str | Path,
        *,
        adapter_name: str | None = None,
        extra: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        is_main_process: bool = True,
        safe_serialization: bool = True,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> None:
        """Write an adapter into ``save_directory``: safetensors and JSON, never the backbone.

        An adapter of PEFT in the backbone goes into the folder ``peft``, as PEFT writes it.

        All files are on the disk under temporary names before any takes the place of an older one,
        the description last. If FSDP2 shards the model, every process has to call this, and one
        of them writes.

        A model card, ``README.md``, is among the files. One that somebody else wrote, or that was
        edited since it was written here, is left as it is.

        Args:
            save_directory: made if it is missing.
            adapter_name: which adapter; by default the active one.
            extra: further JSON values to keep in the description.
            metrics: of an evaluation, for the model card.
            is_main_process: whether this process writes; of several with one model, one should.
            safe_serialization: True, as there is no other format than safetensors.
            push_to_hub: whether to upload the adapter too.
            repo_id, private, token, revision, commit_message, create_pr: where to and how, as in
                :meth:`push_to_hub`.

        Raises:
            TypeError, ValueError: no such adapter, a tensor or a metric that is NaN or infinity,
                ``push_to_hub`` without ``repo_id``, or how to upload without ``push_to_hub``;
                nothing is written then.
            WriteError: a file cannot be written.
        """
        if not safe_serialization:
            raise ValueError(
                f"safe_serialization: expected True, as adapters are written as safetensors only, "
                f"got {safe_serialization!r}"
            )
        upload: dict[str, Any] = {
            "private": private,
            "token": token,
            "revision": revision,
            "commit_message": commit_message,
            "create_pr": create_pr,
        }
        if push_to_hub:
            check_repo_id(repo_id)
        else:
            given = [n for n, v in {"repo_id": repo_id, **upload}.items() if v not in (None, False)]
            if given:
                raise ValueError(
                    f"push_to_hub: expected True beside {', '.join(given)}, got {push_to_hub!r}"
                )
        name = self.known(adapter_name or self.active_adapter)
        files, card = self._written(name, extra, metrics)
        public, _ = self._written(name, extra, metrics, public=True) if push_to_hub else ({}, None)
        folder = Path(save_directory)
        with writing_process(self.prompts[name].parameters()) as writes:
            if writes and is_main_process:
                own = kept_card(folder)
                if own is None:
                    files = {CARD_FILE: card.to_bytes(repo_id), **files}
                write_adapter(folder, files)
                if repo_id is not None:
                    upload_adapter(public, own or card, repo_id, **upload)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        adapter_name: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        extra: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> CommitInfo | None:
        """Upload what :meth:`save_pretrained` writes to a repository of the Hugging Face hub.

        A base model that is a folder of this machine is not named in it. A ``README.md`` of the
        repository that was not written here, or edited since, stays. If FSDP2 shards the model,
        every process has to call this.

        Args:
            repo_id: ``user/name``, or ``name`` for one's own; made if it is missing.
            adapter_name, extra, metrics: as in :meth:`save_pretrained`.
            private: whether a new repository is private; by default as the account says. With True,
                an existing public one is refused.
            token: as huggingface_hub has it; by default that of the user who is logged in.
            revision: branch, made if it is missing; by default the main one.
            commit_message: by default "Upload adapter with ept-fast".
            create_pr: whether to open a pull request in place of a commit.

        Returns:
            What ``HfApi.upload_folder`` returns; None on a process that does not write.

        Raises:
            TypeError, ValueError: as :meth:`save_pretrained`, no id of a repository, or a public
                one; nothing is uploaded then.
            huggingface_hub.errors.HfHubHTTPError: the hub refuses.
        """
        check_repo_id(repo_id)
        name = self.known(adapter_name or self.active_adapter)
        files, card = self._written(name, extra, metrics, public=True)
        with writing_process(self.prompts[name].parameters()) as writes:
            if not writes:
                return None
            return upload_adapter(
                files,
                card,
                repo_id,
                private=private,
                token=token,
                revision=revision,
                commit_message=commit_message,
                create_pr=create_pr,
            )

    def _written(
        self,
        name: str,
        extra: Mapping[str, Any] | None,
        metrics: Mapping[str, float] | None,
        *,
        public: bool = False,
    ) -> tuple[dict[str, bytes], AdapterCard]:
        """The files of an adapter, and its card; if public, without the path of a base model."""
        prompt: Any = self.prompts[name]
        module = self.head_of(name)
        reshard(self)
        head = None if module is None else gather(module.state_dict())
        values = {**self.saved_values(name), "extra": dict(extra or {})}
        base = values["base_model"]
        base = base if is_hub_id(base) and not os.path.isdir(base) else None
        if public:
            values["base_model"] = base
        peft = None if self.peft is None else self.peft.to_save(Path(ADAPTER_FILE))
        sizes = [math.prod(shape) for shape in expected_shapes(prompt.config, None).values()]
        sizes += [t.numel() for t in (head or {}).values()]
        sizes += [] if self.peft is None else [p.numel() for p in self.peft.trained()]
        card = AdapterCard(
            self.task, base, values["labels"], prompt.config, sum(sizes), check_metrics(metrics)
        )
        return adapter_files(prompt.files(), head, values, prompt.config, peft), card

    def saved_values(self, name: str) -> dict[str, Any]:
        """What an adapter's description says besides its tensors and their sizes."""
        return {
            "task": self.task,
            "base_model": self.base_model_name,
            "base_model_type": getattr(self.backbone.config, "model_type", None),
            **vars(self.descriptions[name]),
            "extra": {},
        }

    def load_pretrained(
        self,
        pretrained_model_name_or_path: str | Path | SavedAdapter,
        *,
        saved_name: str | None = None,
        **hub: Unpack[HubOptions],
    ) -> None:
        """Read an adapter of the same task, sizes and labels into the active one.

        If an adapter of PEFT was saved with it, it is read into the one of the same sizes here.

        Args:
            pretrained_model_name_or_path, saved_name, **hub: as in :meth:`from_pretrained`.

        Raises:
            CheckpointError: a missing, damaged or mismatched file; the model is unchanged then.
        """
        saved = find_adapter(pretrained_model_name_or_path, saved_name, **hub)
        described = self._check_saved(saved)
        for field in ("labels", "pooling", "head"):
            expected, got = (getattr(d, field) for d in (self.description, described))
            if got != expected:
                raise CheckpointError(
                    f"{saved.path}: {field}: expected {shorten(expected)}, got {shorten(got)}"
                )
        peft = self._peft_beside(saved)
        if peft is not None:
            peft[0].check_fits(peft[1])
        tensors = {} if self.head is None else saved.head(self.head)
        reshard(self)
        self.prompt.load_saved(saved.prompt)
        if peft is not None:
            peft[0].load(peft[1])
        if self.head is not None:
            fill(self.head.state_dict(), tensors)
        self.unfold()

    def load_adapter(
        self,
        model_id: str | Path | SavedAdapter,
        adapter_name: str,
        *,
        saved_name: str | None = None,
        **hub: Unpack[HubOptions],
    ) -> None:
        """Add a saved adapter under this name.

        Args:
            model_id: as ``pretrained_model_name_or_path`` in :meth:`from_pretrained`.
            adapter_name: letters, digits, ``_`` and ``-``.
            saved_name, **hub: as in :meth:`from_pretrained`.

        Raises:
            CheckpointError: a missing, damaged or foreign file, another task or backbone; the model
                is as before then.
        """
        check_adapter_name(adapter_name, self.descriptions)
        self.add_saved(find_adapter(model_id, saved_name, **hub), adapter_name)

    def add_saved(self, saved: SavedAdapter, name: str) -> None:
        """Add an adapter that has been read; errors as :meth:`load_adapter`."""
        check_adapter_name(name, self.descriptions)
        described = self._check_saved(saved)
        peft = self._peft_beside(saved)
        if peft is not None:
            peft[0].check_same(peft[1])
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

    def _peft_beside(self, saved: SavedAdapter) -> tuple[PeftAdapter, SavedPeft] | None:
        """The adapters of PEFT here and in the files; CheckpointError if there is one only."""
        if self.peft is not None and saved.peft is not None:
            return self.peft, saved.peft
        if self.peft is not None:
            raise CheckpointError(
                f"{saved.path}: peft: expected the adapter {self.peft.name} of PEFT that is in the "
                f"model, got none (merge_and_unload() of PEFT gives a plain model)"
            )
        if saved.peft is not None:
            raise CheckpointError(
                f"{saved.path}: peft: expected none as in this model, got the adapter "
                f"{saved.peft.adapter_name!r} of PEFT (EPTModel.from_pretrained loads both)"
            )
        return None

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
        pretrained_model_name_or_path: str | Path | SavedAdapter,
        model: nn.Module | None = None,
        *,
        base_model: str | None = None,
        adapter_name: str = "default",
        saved_name: str | None = None,
        is_trainable: bool = True,
        backend: str | None = None,
        trust_remote_code: bool = False,
        allow_download: bool = False,
        **hub: Unpack[HubOptions],
    ) -> EPTModel:
        """The model of a saved adapter, of the class of its task, in evaluation mode.

        Args:
            pretrained_model_name_or_path: folder, or ``user/name`` of a repository of the Hugging
                Face hub if there is no folder of this name; in it what :meth:`save_pretrained`
                wrote, or else what transformers' Trainer or accelerate did, the state dict of a
                model as ``model.safetensors``. An adapter that
                :func:`~ept_fast.transformers.adapter.read_adapter` has read will do too.
            model: the frozen model, if it is loaded already. An adapter of PEFT that was saved
                with the prompt is put into it, and ``unload()`` then gives a PeftModel; a model
                that has one needs to have this very one.
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
            **hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` and ``subfolder``
                of the adapter, not of the frozen model.

        Raises:
            CheckpointError: a missing, damaged or foreign file, another model than it was trained
                on, or a repository that cannot be read.
            ValueError: the model cannot be found, or not without what the last two allow;
                ``trust_remote_code`` without ``base_model``.
        """
        check_adapter_name(adapter_name, ())
        saved = find_adapter(pretrained_model_name_or_path, saved_name, **hub)
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
        with put_in(model, saved.peft) as ready:
            chosen: EPTModel = cls.of_task(values["task"])(ready, base_model=name, backend=backend)
            try:
                chosen.add_saved(saved, adapter_name)
            except BaseException:
                chosen.unload()
                raise
        if not is_trainable:
            chosen.requires_grad_(False)
        return chosen.eval()


def _keep_adapters(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    """A state dict holds prompts, heads and PEFT's weights, none else, and says what they are."""
    kept = (f"{prefix}prompts.", f"{prefix}heads.")
    peft = {f"{prefix}{name}" for name in _names_of_peft(module)}
    for key in [k for k in state if k.startswith(prefix) and not k.startswith(kept)]:
        if key not in peft:
            del state[key]
    description = describe_state(
        module.active_adapter,
        {name: (module.saved_values(name), p.config) for name, p in module.prompts.items()},
        {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(kept) or k in peft},
        None if module.peft is None else module.peft.description(),
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
    frozen -= _names_of_peft(module)
    keys.missing_keys[:] = [k for k in keys.missing_keys if not _ends_in(k, frozen)]
    others = [k for k in keys.unexpected_keys if not _ends_in(k, {DESCRIPTION})]
    keys.unexpected_keys[:] = others
    module.unfold()


def _names_of_peft(module: Any) -> set[str]:
    """Names of the weights of PEFT in a state dict."""
    names = set() if module.peft is None else set(module.peft.names.values())
    return {f"backbone.{name}" for name in names}


def _ends_in(key: str, names: set[str]) -> bool:
    """Whether the key is one of the names, below whatever wraps the module."""
    parts = key.split(".")
    return any(".".join(parts[i:]) in names for i in range(len(parts)))
