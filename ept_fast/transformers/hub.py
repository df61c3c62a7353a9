"""The Hugging Face hub: adapters that come from it and go to it, and the model card beside them."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypedDict

from huggingface_hub import (
    CommitInfo,
    HfApi,
    ModelCardData,
    hf_hub_download,
    is_offline_mode,
    snapshot_download,
)
from huggingface_hub.errors import (
    DryRunError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    tqdm,
    validate_repo_id,
)

import ept_fast
from ept_fast.config import PromptConfig, check_number
from ept_fast.prompts.base import CONFIG_FILE, TENSOR_FILE
from ept_fast.storage.files import write_files
from ept_fast.storage.untrusted import FILE_LIMIT, CheckpointError, check_size, shorten
from ept_fast.transformers.adapter import (
    ADAPTER_FILE,
    HEAD_FILE,
    PEFT_CONFIG_FILE,
    PEFT_TENSOR_FILE,
    STATE_FILE,
    SavedAdapter,
    read_adapter,
)

__all__ = [
    "CARD_FILE",
    "AdapterCard",
    "HubOptions",
    "check_metrics",
    "check_repo_id",
    "find_adapter",
    "is_hub_id",
    "kept_card",
    "upload_adapter",
]

CARD_FILE = "README.md"

# The files of an adapter's two forms; the first of each tells that it is there.
_FORMS: tuple[tuple[str, ...], ...] = (
    (ADAPTER_FILE, CONFIG_FILE, TENSOR_FILE, HEAD_FILE, PEFT_CONFIG_FILE, PEFT_TENSOR_FILE),
    (STATE_FILE,),
)
_LIBRARY: dict[str, Any] = {"library_name": "ept-fast", "library_version": ept_fast.__version__}

# What the hub calls the tasks; text2text-generation is no longer among its names.
_PIPELINES = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text-generation",
    "FEATURE_EXTRACTION": "feature-extraction",
}
_GENERATE = """\
ids = model.generate(**batch, max_new_tokens=32)
print(tokenizer.decode(ids[0], skip_special_tokens=True))"""
_USES = {
    "SEQ_CLS": "print(model.labels[model(**batch).logits[0].argmax()])",
    "TOKEN_CLS": "print([model.labels[i] for i in model(**batch).logits[0].argmax(-1)])",
    "CAUSAL_LM": _GENERATE,
    "SEQ_2_SEQ_LM": _GENERATE,
    "FEATURE_EXTRACTION": "print(model(**batch).last_hidden_state.shape)",
}
_MOST_LABELS = 100
_MARK = "<!-- Written by ept-fast, which replaces this file only while it is unchanged: "


class HubOptions(TypedDict, total=False):
    """Which files of the hub, and how they are come by.

    Attributes:
        revision: branch, tag or commit; by default the main branch.
        token: of the user on the hub; True or None for the one that is logged in, False for none.
        cache_dir: folder of the cache; by default the hub's own on this machine.
        local_files_only: whether to ask no hub: only for what the cache has.
        subfolder: folder of the adapter in the repository, or in a folder of this machine.
    """

    revision: str | None
    token: str | bool | None
    cache_dir: str | Path | None
    local_files_only: bool
    subfolder: str | None


def is_hub_id(name: object) -> bool:
    """Whether this may be a repository ``user/name`` of the hub, by its letters alone."""
    return isinstance(name, str) and name.count("/") == 1 and _refusal(name) is None


def check_repo_id(repo_id: object) -> None:
    """Raise ValueError unless this may be a repository to upload to: ``user/name`` or ``name``."""
    reason = _refusal(repo_id) if isinstance(repo_id, str) else f"a {type(repo_id).__name__}"
    if reason is not None:
        raise ValueError(
            f"repo_id: expected the id of a repository, as user/name, "
            f"got {shorten(repo_id)} ({reason})"
        )


def _refusal(name: str) -> str | None:
    try:
        validate_repo_id(name)
    except ValueError as error:
        return _first_line(error)
    return None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


# Download


def find_adapter(
    source: str | Path | SavedAdapter,
    saved_name: str | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    subfolder: str | None = None,
) -> SavedAdapter:
    """A saved adapter, from a folder or from the hub.

    Args:
        source: a folder, which is what a ``Path`` always is. A string that names no folder and has
            the form ``user/name`` is a repository of the hub. An adapter that has been read is
            given back.
        saved_name: as in :func:`~ept_fast.transformers.adapter.read_adapter`.
        revision, token, cache_dir, local_files_only, subfolder: as in :class:`HubOptions`.

    Raises:
        CheckpointError: no such repository or revision, no access to it, no answer of the hub and
            nothing in the cache, files of more than 1 GiB, or as ``read_adapter``.
        ValueError: a revision of a folder, or a subfolder that leads out of its folder.
    """
    remote = is_hub_id(source) and not os.path.isdir(str(source))
    if revision is not None and not remote:
        raise ValueError(f"revision: expected None for a folder, got {shorten(revision)}")
    if isinstance(source, SavedAdapter):
        if subfolder is not None:
            raise ValueError(
                f"subfolder: expected None for an adapter that is read, got {shorten(subfolder)}"
            )
        return source
    within = PurePosixPath(subfolder or "")
    if within.is_absolute() or ".." in within.parts:
        raise ValueError(
            f"subfolder: expected a folder below the adapter's, got {shorten(subfolder)}"
        )
    if not remote:
        return read_adapter(Path(source) / within, saved_name)
    options = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    with _asking(str(source), revision, local_files_only):
        folder = _download(str(source), within, options)
    if folder is None:
        raise CheckpointError(
            f"{source}: expected {ADAPTER_FILE} or {STATE_FILE} in "
            f"{subfolder or 'the repository'}, got neither"
        )
    return read_adapter(folder, saved_name)


def _download(repo_id: str, within: PurePosixPath, options: Mapping[str, Any]) -> Path | None:
    """The folder in the cache with the adapter's files, and no others of the repository.

    None if the repository has no adapter.
    """

    def files(names: tuple[str, ...], quiet: bool, **how: Any) -> Any:
        how |= {"allow_patterns": [glob.escape(str(within / name)) for name in names]}
        how |= {"tqdm_class": _NoBar} if quiet else {}
        return snapshot_download(repo_id, **_LIBRARY, **options, **how)

    forms = _FORMS
    try:
        listed = files(sum(_FORMS, ()), quiet=True, dry_run=True)
    except DryRunError:
        pass  # the hub is not asked or does not answer: the cache may have either form
    else:
        for file in listed:
            check_size(Path(repo_id, file.filename), file.file_size or 0, FILE_LIMIT)
        found = {file.filename for file in listed}
        forms = tuple(form for form in _FORMS if str(within / form[0]) in found)
    for form in forms:
        folder = Path(files(form, quiet=not sys.stderr.isatty()), within)
        if os.path.lexists(folder / form[0]):
            return folder
    return None


class _NoBar(tqdm):
    """Progress that is not shown: no log needs it."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{**options, "disable": True})  # type: ignore[no-untyped-call]


@contextmanager
def _asking(repo_id: str, revision: str | None, local_files_only: bool) -> Iterator[None]:
    """Raise what goes wrong with the hub as one CheckpointError that names the repository."""
    try:
        yield
    except CheckpointError:
        raise
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"{repo_id}: revision: expected a branch, tag or commit of the repository, "
            f"got {shorten(revision)}"
        ) from error
    except GatedRepoError as error:
        reason = "a gated one: ask for access to it on the hub, and log in or give token"
        raise _no_adapter(repo_id, reason) from error
    except RepositoryNotFoundError as error:
        reason = "neither a folder nor a repository (of a private one: log in or give token)"
        raise _no_adapter(repo_id, reason) from error
    except LocalEntryNotFoundError as error:
        asked = "the hub did not answer"
        if local_files_only or is_offline_mode():
            asked = "the hub was not asked, by local_files_only or HF_HUB_OFFLINE"
        at = "" if revision is None else f" at revision {shorten(revision)}"
        reason = f"no folder, and no whole one in the cache{at} ({asked})"
        raise _no_adapter(repo_id, reason) from error
    except Exception as error:  # also of the HTTP library, which huggingface_hub has changed
        raise _no_adapter(repo_id, f"{type(error).__name__}: {_first_line(error)}") from error


def _no_adapter(repo_id: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{repo_id}: expected a folder, or a repository of the Hugging Face hub, got {reason}"
    )


# Upload


def upload_adapter(
    files: Mapping[str, bytes],
    card: AdapterCard | bytes,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Upload an adapter's files, and a card unless the repository has another one than ours.

    Args:
        files: by their names.
        card: of the adapter; or else the bytes of one that the user wrote, which is uploaded
            in any case.
        repo_id, private, token, revision, commit_message, create_pr: as in
            :meth:`ept_fast.EPTModel.push_to_hub`, which also has the errors.
    """
    api = HfApi(token=token, **_LIBRARY)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.repo_info(repo_id).private:
        raise ValueError(f"private: expected False or None, as {repo_id} is public, got True")
    if revision is not None and not create_pr and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    if isinstance(card, bytes):
        files = {**files, CARD_FILE: card}
    elif not _has_other_card(repo_id, token, revision):
        files = {**files, CARD_FILE: card.to_bytes(repo_id)}
    with tempfile.TemporaryDirectory() as folder:
        write_files({Path(folder, name): data for name, data in files.items()})
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or "Upload adapter with ept-fast",
            revision=revision,
            create_pr=create_pr,
            delete_patterns=[HEAD_FILE],  # of an adapter before this one, if this has none
        )


def _has_other_card(repo_id: str, token: str | bool | None, revision: str | None) -> bool:
    try:
        path = hf_hub_download(repo_id, CARD_FILE, revision=revision, token=token, **_LIBRARY)
    except (RemoteEntryNotFoundError, RevisionNotFoundError):
        return False
    return not _is_ours(Path(path).read_bytes())


# The model card


@dataclass(frozen=True)
class AdapterCard:
    """What a model card says of an adapter.

    Attributes:
        task: as in :func:`ept_fast.get_ept_model`.
        base_model: hub id of the frozen model; None for a folder, which is no one else's business.
        labels: names of the classes, or None.
        config: sizes and choices of the prompt.
        trained: number of trained parameters.
        metrics: of an evaluation, by name.
    """

    task: str
    base_model: str | None
    labels: tuple[str, ...] | None
    config: PromptConfig
    trained: int
    metrics: Mapping[str, float]

    def to_bytes(self, repo_id: str | None = None) -> bytes:
        """The file: the hub's metadata, the text, and a last line that tells it from an edited one.

        Args:
            repo_id: where it is, for the example of how to load it.
        """
        known = self.base_model is not None
        relation: dict[str, Any] = {"base_model_relation": "adapter"} if known else {}
        data = ModelCardData(
            base_model=self.base_model,
            library_name="ept-fast",
            pipeline_tag=_PIPELINES[self.task],
            tags=sorted({"ept-fast", "prompt-tuning", self.config.prompt_type}),
            metrics=list(self.metrics) or None,
            **relation,
        )
        parts = [
            f"---\n{data.to_yaml()}\n---",
            f"# {repo_id.rpartition('/')[2] if repo_id else 'Soft prompt'}",
            "A soft prompt for a frozen language model, written by ept-fast. It holds the prompt "
            "and the head, if the task has one, and no weight of the base model.",
            _table(("", ""), self._facts()),
            *self._labels(),
            *self._results(),
            "## Use",
            self._use(repo_id),
        ]
        return _marked("\n\n".join(parts) + "\n\n")

    def _facts(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "base model": self.base_model or "a folder, which has no name on the hub",
            "trained parameters": self.trained,
            "prompt": self.config.prompt_type,
            **{name: v for name, v in self.config.to_dict().items() if name != "prompt_type"},
        }

    def _labels(self) -> list[str]:
        if self.labels is None:
            return []
        shown = json.dumps(self.labels[:_MOST_LABELS], ensure_ascii=False)
        text = f"{len(self.labels)} labels, in the order of the logits"
        if len(self.labels) > _MOST_LABELS:
            text += f"; the first {_MOST_LABELS} of them"
        return [f"{text}:", f"```json\n{shown}\n```"]

    def _results(self) -> list[str]:
        if not self.metrics:
            return []
        rows = {name: f"{value:.4g}" for name, value in self.metrics.items()}
        return ["## Evaluation", _table(("metric", "value"), rows)]

    def _use(self, repo_id: str | None) -> str:
        name, base = repo_id or "path/of/this/folder", self.base_model or "path/of/the/base/model"
        use = _USES[self.task]
        if self.task == "SEQ_CLS" and len(self.labels or ()) == 1:  # a number
            use = "print(model(**batch).logits[0].item())"
        return f"""\
```python
from ept_fast import EPTModel
from transformers import AutoTokenizer

model = EPTModel.from_pretrained("{name}", base_model="{base}")
tokenizer = AutoTokenizer.from_pretrained("{base}")
batch = tokenizer("What a fine day!", return_tensors="pt")
{use}
```"""


def _table(head: tuple[str, str], rows: Mapping[str, Any]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {_cell(n)} | {_cell(v)} |" for n, v in rows.items())])


def _cell(value: Any) -> str:
    """A cell of a table in Markdown: one line, as code."""
    text = " ".join(str(value).split()).replace("`", "'").replace("|", "\\|")
    return f"`{text}`"


def _marked(text: str) -> bytes:
    data = text.encode()
    return data + f"{_MARK}{hashlib.sha256(data).hexdigest()} -->\n".encode()


def _is_ours(data: bytes) -> bool:
    """Whether these bytes are a card as it was written here, and nobody has edited it."""
    text, mark, _ = data.rpartition(_MARK.encode())
    return bool(mark) and data == _marked(text.decode(errors="replace"))


def kept_card(folder: Path) -> bytes | None:
    """The README.md of a folder if somebody else wrote or edited it; None if it may be replaced.

    Of what is no file under this name, an empty text.
    """
    path = folder / CARD_FILE
    if not path.is_file():
        return b"" if os.path.lexists(path) else None
    data = path.read_bytes()
    return None if _is_ours(data) else data


def check_metrics(metrics: Mapping[str, float] | None) -> dict[str, float]:
    """The metrics of a card; TypeError or ValueError unless they are finite numbers by names."""
    given = dict(metrics or {})
    for name, value in given.items():
        if not isinstance(name, str):
            raise TypeError(f"metrics: expected names as keys, got {type(name).__name__}")
        check_number(f"metrics: {name}", value)
    return given
