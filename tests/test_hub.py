"""Adapters on the Hugging Face hub, for which a server of this machine stands, and model cards."""

from __future__ import annotations

import fnmatch
import hashlib
import http.server
import inspect
import json
import re
import shutil
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import ept_fast
from ept_fast import CheckpointError, EPTBank, EPTConfig, EPTModel, get_ept_model
from tests.architectures import BY_NAME
from tests.processes import python
from tests.tiny import save_llama, save_model

pytest.importorskip("transformers")

import huggingface_hub
from huggingface_hub import ModelCard, constants

from ept_fast.training.job import load_adapter
from ept_fast.transformers import hub as module
from ept_fast.transformers.adapter import ADAPTER_FILE, HEAD_FILE, STATE_FILE
from ept_fast.transformers.backbone import load_backbone
from ept_fast.transformers.hub import CARD_FILE

pytestmark = pytest.mark.usefixtures("one_thread")

NAME, LABELS = "user/name", ("bad", "fair", "good")
BACKBONES = {
    "SEQ_CLS": "BERT",
    "TOKEN_CLS": "BERT",
    "FEATURE_EXTRACTION": "BERT",
    "CAUSAL_LM": "Llama",
    "SEQ_2_SEQ_LM": "T5",
}
PIPELINES = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "FEATURE_EXTRACTION": "feature-extraction",
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text-generation",
}
FILES = {"ept_config.json", "ept_model.safetensors", ADAPTER_FILE, CARD_FILE}


def backbone(task: str = "SEQ_CLS") -> Any:
    return BY_NAME[BACKBONES[task]].build(task, bare=task == "TOKEN_CLS")


def model_of(task: str = "SEQ_CLS", seed: int = 1, base_model: str | None = None) -> EPTModel:
    config = EPTConfig(32, num_virtual_tokens=4, max_length=16, rank=2, num_spaces=2, space_dim=2)
    labels = {"labels": LABELS} if task == "TOKEN_CLS" else {}
    model = get_ept_model(backbone(task), config, task, base_model=base_model, **labels)
    return fill(model, seed)


def fill(model: EPTModel, seed: int) -> EPTModel:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=draw)
    return model.eval()


def outputs(model: EPTModel) -> Tensor:
    ids = torch.randint(5, 26, (2, 6), generator=torch.Generator().manual_seed(3))
    given = {"labels": ids} if model.task == "SEQ_2_SEQ_LM" else {}
    with torch.no_grad():
        output = model(ids, **given)
    found: Tensor = output["logits"] if "logits" in output else output["last_hidden_state"]
    return found


# A hub


class Hub:
    """Repositories, a server that the library downloads from, and the calls that upload to them.

    Attributes:
        branches: the files of each branch of each repository, by their paths.
        tokens: of private repositories the one token that is let in.
        gated: repositories that let nobody in.
        sizes: of files that are said to be larger than they are.
        asked: method, path and token of every request.
        calls: name and arguments of every call of the library that changes something.
    """

    def __init__(self) -> None:
        self.branches: dict[str, dict[str, dict[str, bytes]]] = {}
        self.tokens: dict[str, str] = {}
        self.gated: set[str] = set()
        self.sizes: dict[str, int] = {}
        self.broken = False
        self.asked: list[tuple[str, str, str | None]] = []
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def put(self, files: Path | dict[str, bytes], repo: str = NAME, branch: str = "main") -> None:
        if isinstance(files, Path):
            paths = [path for path in files.rglob("*") if path.is_file()]
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in paths}
        self.branches.setdefault(repo, {}).setdefault(branch, {}).update(files)

    def answer(self, path: str, token: str | None) -> tuple[int, dict[str, str], bytes]:
        path = urllib.parse.unquote(path.partition("?")[0])
        repo = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        if self.broken:
            return 500, {}, b""
        if repo in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        if repo not in self.branches or self.tokens.get(repo, token) != token:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        (kind, revision, *rest) = path.partition(f"{repo}/")[2].split("/")
        commits = {commit(files): files for files in self.branches[repo].values()}
        files = self.branches[repo].get(revision, commits.get(revision))
        if files is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if kind == "revision":
            return 200, {}, json.dumps({"_id": "1", "id": repo, "sha": commit(files)}).encode()
        if kind == "tree":
            entries = [
                {
                    "type": "file",
                    "path": name,
                    "size": self.sizes.get(name, len(data)),
                    "oid": hashlib.sha1(data).hexdigest(),
                }
                for name, data in files.items()
            ]
            return 200, {}, json.dumps(entries).encode()
        data = files.get("/".join(rest))
        if data is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        size = self.sizes.get(rest[-1], len(data))
        tag = f'"{hashlib.sha1(data).hexdigest()}"'
        return 200, {"ETag": tag, "X-Repo-Commit": commit(files), "X-Linked-Size": str(size)}, data

    # What the module calls of `HfApi`

    def note(self, name: str, **how: Any) -> None:
        """A call, with arguments that the library's own method takes."""
        method = getattr(huggingface_hub.HfApi, "__init__" if name == "HfApi" else name)
        inspect.signature(method).bind(None, **how)
        self.calls.append((name, how))

    def api(self, **how: Any) -> Any:
        self.note("HfApi", **how)
        return self

    def create_repo(self, repo_id: str, **how: Any) -> Any:
        self.note("create_repo", repo_id=repo_id, **how)
        repo = repo_id if "/" in repo_id else f"user/{repo_id}"
        if repo not in self.branches:
            self.put({".gitattributes": b""}, repo)
            if how["private"]:
                self.tokens[repo] = self.calls[-2][1]["token"] or huggingface_hub.get_token()
        return SimpleNamespace(repo_id=repo)

    def repo_info(self, repo_id: str) -> Any:
        return SimpleNamespace(private=repo_id in self.tokens)

    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None:
        self.note("create_branch", repo_id=repo_id, branch=branch, exist_ok=exist_ok)
        self.put(self.branches[repo_id]["main"], repo_id, branch)

    def upload_folder(self, *, repo_id: str, folder_path: str, **how: Any) -> Any:
        self.note("upload_folder", repo_id=repo_id, folder_path=folder_path, **how)
        files = self.branches[repo_id][how["revision"] or "main"]
        for pattern in how["delete_patterns"]:
            for name in fnmatch.filter(list(files), pattern):
                del files[name]
        self.put(Path(folder_path), repo_id, how["revision"] or "main")
        return f"commit of {repo_id}"


def commit(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    hub = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
            hub.asked.append((self.command, self.path, token))
            code, headers, data = hub.answer(self.path, token)
            self.send_response(code)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        do_HEAD = do_GET

        def log_message(self, *args: Any) -> None:
            """Nothing: requests are noted above."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for name, value in {
            "ENDPOINT": address,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(module, "HfApi", hub.api)
        yield hub
        huggingface_hub.close_session()
        server.shutdown()
        thread.join()


# There and back


@pytest.mark.parametrize("task", BACKBONES)
def test_pushed_and_loaded(task: str, hub: Hub) -> None:
    model = model_of(task)
    assert model.push_to_hub(NAME) == f"commit of {NAME}"
    head = {HEAD_FILE} if model.has_head else set()
    assert set(hub.branches[NAME]["main"]) == {".gitattributes", *FILES, *head}
    loaded = EPTModel.from_pretrained(NAME, backbone(task))
    assert outputs(loaded).equal(outputs(model))
    other = fill(EPTModel.from_pretrained(NAME, backbone(task)), seed=9)
    assert not outputs(other).equal(outputs(model))
    other.load_pretrained(NAME)
    assert outputs(other).equal(outputs(model))
    other.load_adapter(NAME, "second")
    fill(other, seed=9).set_adapter("second")
    assert outputs(other).equal(outputs(model))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_prompt_with_lora_under_it(hub: Hub) -> None:
    import peft

    lora = peft.get_peft_model(backbone("CAUSAL_LM"), peft.LoraConfig(target_modules=["q_proj"]))
    config = EPTConfig(32, num_virtual_tokens=4, max_length=16, rank=2, num_spaces=2, space_dim=2)
    model = fill(get_ept_model(lora, config, "CAUSAL_LM"), seed=1)
    model.push_to_hub(NAME)
    files = {"peft/adapter_config.json", "peft/adapter_model.safetensors"}
    assert set(hub.branches[NAME]["main"]) == {".gitattributes", *FILES, *files}
    card = hub.branches[NAME]["main"][CARD_FILE].decode()
    assert f"| `trained parameters` | `{model.get_nb_trainable_parameters()[0]}` |" in card
    loaded = EPTModel.from_pretrained(NAME, backbone("CAUSAL_LM"))
    assert outputs(loaded).equal(outputs(model))


def test_what_is_asked_of_the_hub(hub: Hub) -> None:
    model = model_of()
    result = model.push_to_hub(
        "name",
        private=True,
        token="secret",
        revision="v2",
        commit_message="Better",
        extra={"note": 1},
    )
    assert result == "commit of user/name"
    del hub.calls[-1][1]["folder_path"]
    library = {"library_name": "ept-fast", "library_version": ept_fast.__version__}
    assert hub.calls == [
        ("HfApi", {"token": "secret", **library}),
        ("create_repo", {"repo_id": "name", "private": True, "exist_ok": True}),
        ("create_branch", {"repo_id": "user/name", "branch": "v2", "exist_ok": True}),
        (
            "upload_folder",
            {
                "repo_id": "user/name",
                "commit_message": "Better",
                "revision": "v2",
                "create_pr": False,
                "delete_patterns": [HEAD_FILE],
            },
        ),
    ]
    assert json.loads(hub.branches[NAME]["v2"][ADAPTER_FILE])["extra"] == {"note": 1}
    assert set(hub.branches[NAME]["main"]) == {".gitattributes"}
    hub.asked.clear()
    loaded = EPTModel.from_pretrained(NAME, backbone(), revision="v2", token="secret")
    assert outputs(loaded).equal(outputs(model))
    assert {token for _, _, token in hub.asked} == {"secret"}


def test_a_pull_request_makes_no_branch(hub: Hub) -> None:
    hub.put({}, branch="v2")
    model_of().push_to_hub(NAME, create_pr=True, revision="v2")
    (name, how) = hub.calls[-1]
    assert (name, how["create_pr"], how["revision"]) == ("upload_folder", True, "v2")
    assert "create_branch" not in dict(hub.calls)


def test_revisions(hub: Hub) -> None:
    first, second = model_of(seed=1), model_of(seed=2)
    first.push_to_hub(NAME)
    second.push_to_hub(NAME, revision="v2")
    pinned = commit(hub.branches[NAME]["main"])
    for revision, expected in ((None, first), ("main", first), ("v2", second), (pinned, first)):
        loaded = EPTModel.from_pretrained(NAME, backbone(), revision=revision)
        assert outputs(loaded).equal(outputs(expected))


def test_an_adapter_replaces_one_with_a_head(hub: Hub) -> None:
    model_of("SEQ_CLS").push_to_hub(NAME)
    model = model_of("CAUSAL_LM")
    model.push_to_hub(NAME)
    assert HEAD_FILE not in hub.branches[NAME]["main"]
    assert outputs(EPTModel.from_pretrained(NAME, backbone("CAUSAL_LM"))).equal(outputs(model))


def test_a_public_repository_is_not_taken_for_a_private_one(hub: Hub) -> None:
    hub.put({})
    with pytest.raises(ValueError, match=r"^private: expected False or None, as user/name is pub"):
        model_of().push_to_hub(NAME, private=True)
    assert hub.branches == {NAME: {"main": {}}}


def test_saved_and_pushed(hub: Hub, tmp_path: Path) -> None:
    """Of the folder only what is of the adapter; the base model's path stays here."""
    base = save_model(tmp_path / "base")
    model = fill(
        get_ept_model(
            load_backbone(str(base)), EPTConfig(32, num_virtual_tokens=4), "FEATURE_EXTRACTION"
        ),
        seed=1,
    )
    assert model.base_model_name == str(base)
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    model.save_pretrained(folder, push_to_hub=True, repo_id=NAME, token="secret")
    assert {path.name for path in folder.iterdir()} == {*FILES, "notes.txt"}
    assert set(hub.branches[NAME]["main"]) == {".gitattributes", *FILES}
    assert hub.calls[0][1]["token"] == "secret"
    for name, data in hub.branches[NAME]["main"].items():
        assert str(tmp_path).encode() not in data, name
    assert str(tmp_path) not in (folder / CARD_FILE).read_text()
    assert outputs(EPTModel.from_pretrained(folder)).equal(outputs(model))
    with pytest.raises(ValueError, match="base_model: expected a folder or hub id"):
        EPTModel.from_pretrained(NAME)
    loaded = EPTModel.from_pretrained(NAME, base_model=str(base))
    assert outputs(loaded).equal(outputs(model))
    assert hub.branches.keys() == {NAME}


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"safe_serialization": False}, "safe_serialization: expected True"),
        ({"push_to_hub": True}, "repo_id: expected the id of a repository, as user/name, got None"),
        ({"push_to_hub": True, "repo_id": "a/b/c"}, "repo_id: expected .*, got 'a/b/c'"),
        ({"push_to_hub": True, "repo_id": "../a"}, r"repo_id: expected .*, got '\.\./a'"),
        ({"repo_id": NAME}, "push_to_hub: expected True beside repo_id, got False"),
        (
            {"token": "x", "private": True},
            "push_to_hub: expected True beside private, token, got False",
        ),
        ({"metrics": {"f1": float("nan")}}, "metrics: f1: expected a finite number, got nan"),
        ({"metrics": {"f1": "high"}}, "metrics: f1: expected a real number, got str"),
        ({"metrics": {1: 0.5}}, "metrics: expected names as keys, got int"),
        ({"adapter_name": "mine"}, "adapter_name: expected one of default, got 'mine'"),
        ({"state_dict": {}, "push_to_hub": True, "repo_id": NAME}, "state_dict"),
    ],
)
def test_what_saving_refuses(
    choices: dict[str, Any], message: str, hub: Hub, tmp_path: Path
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        model_of().save_pretrained(tmp_path / "adapter", **choices)
    assert not (tmp_path / "adapter").exists()
    assert hub.branches == {}


def test_a_process_that_is_not_the_main_one_writes_nothing(hub: Hub, tmp_path: Path) -> None:
    how: dict[str, Any] = {"push_to_hub": True, "repo_id": NAME}
    model_of().save_pretrained(tmp_path / "adapter", is_main_process=False, **how)
    assert not (tmp_path / "adapter").exists()
    assert hub.calls == []


# What is downloaded


def cached(tmp_path: Path) -> set[str]:
    """Names of the files that snapshots in the cache have."""
    return {path.name for path in (tmp_path / "cache").glob("*/snapshots/*/**/*")}


def test_only_the_files_of_the_adapter_are_downloaded(hub: Hub, tmp_path: Path) -> None:
    model_of("CAUSAL_LM").push_to_hub(NAME)
    others = ("model.safetensors", "pytorch_model.bin", "own.py", "sub/adapter.json")
    hub.put(dict.fromkeys(others, b"other"))
    EPTModel.from_pretrained(NAME, backbone("CAUSAL_LM"))
    assert cached(tmp_path) == FILES - {CARD_FILE}
    read = {path.rpartition("/")[2] for method, path, _ in hub.asked if method == "GET"}
    assert not read & {"model.safetensors", "pytorch_model.bin", "own.py"}
    assert read >= FILES - {CARD_FILE}


@pytest.mark.parametrize("subfolder", [None, "run/adapter", "odd[1]*"])
def test_subfolders_and_state_dicts(subfolder: str | None, hub: Hub, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = model_of()
    save_file(model.state_dict(), tmp_path / STATE_FILE)
    where = f"{subfolder}/{STATE_FILE}" if subfolder else STATE_FILE
    hub.put({where: (tmp_path / STATE_FILE).read_bytes(), "README.md": b"mine"})
    loaded = EPTModel.from_pretrained(NAME, backbone(), subfolder=subfolder)
    assert outputs(loaded).equal(outputs(model))
    hub.asked.clear()
    again = EPTModel.from_pretrained(
        NAME, backbone(), subfolder=subfolder, local_files_only=True, saved_name="default"
    )
    assert outputs(again).equal(outputs(model))
    assert hub.asked == []
    local = tmp_path / "local"
    (local / (subfolder or "")).mkdir(parents=True)
    shutil.copy(tmp_path / STATE_FILE, local / (subfolder or ""))
    assert outputs(EPTModel.from_pretrained(local, backbone(), subfolder=subfolder)).equal(
        outputs(model)
    )


def test_a_file_that_is_too_large_is_not_downloaded(hub: Hub) -> None:
    model_of().push_to_hub(NAME)
    hub.sizes["ept_model.safetensors"] = (1 << 30) + 1
    hub.asked.clear()
    with pytest.raises(
        CheckpointError,
        match=r"^user/name/ept_model\.safetensors: expected at most 1073741824 bytes, got 107",
    ):
        EPTModel.from_pretrained(NAME, backbone())
    assert not [
        path for method, path, _ in hub.asked if (method, "/resolve/" in path) == ("GET", 1)
    ]


def test_a_damaged_file_is_refused(hub: Hub) -> None:
    model_of().push_to_hub(NAME)
    hub.put({HEAD_FILE: b"other"})
    with pytest.raises(CheckpointError, match="sha256: expected the files it was saved with"):
        EPTModel.from_pretrained(NAME, backbone())


def silent(hub: Hub) -> None:
    constants.ENDPOINT = "http://127.0.0.1:9"  # the fixture restores it


def offline(hub: Hub) -> None:
    constants.HF_HUB_OFFLINE = True


def gated(hub: Hub) -> None:
    hub.gated.add(NAME)


def private(hub: Hub) -> None:
    hub.tokens[NAME] = "secret"


def broken(hub: Hub) -> None:
    hub.broken = True


def empty(hub: Hub) -> None:
    hub.branches[NAME]["main"] = {".gitattributes": b""}


def missing(hub: Hub) -> None:
    hub.branches.clear()


def nothing(hub: Hub) -> None:
    """As it is."""


GOT = "user/name: expected a folder, or a repository of the Hugging Face hub, got "
REFUSED: dict[str, tuple[Callable[[Hub], None], dict[str, Any], str]] = {
    "missing": (missing, {}, GOT + "neither a folder nor a repository (of a private one: log in"),
    "private": (private, {}, GOT + "neither a folder nor a repository (of a private one: log in"),
    "gated": (gated, {}, GOT + "a gated one: ask for access to it on the hub, and log in or give"),
    "revision": (
        nothing,
        {"revision": "v9"},
        "user/name: revision: expected a branch, tag or commit of the repository, got 'v9'",
    ),
    "empty": (
        empty,
        {},
        "user/name: expected adapter.json or model.safetensors in the repository, got neither",
    ),
    "subfolder": (
        nothing,
        {"subfolder": "sub"},
        "user/name: expected adapter.json or model.safetensors in sub, got neither",
    ),
    "silent": (
        silent,
        {},
        GOT + "no folder, and no whole one in the cache (the hub did not answer)",
    ),
    "broken": (broken, {}, GOT + "no folder, and no whole one in the cache (the hub did not"),
    "offline": (
        offline,
        {"revision": "v1"},
        GOT + "no folder, and no whole one in the cache at revision 'v1' (the hub was not asked,",
    ),
    "local": (
        nothing,
        {"local_files_only": True},
        GOT + "no folder, and no whole one in the cache (the hub was not asked, by local_files",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_cannot_be_read(case: str, hub: Hub, tmp_path: Path) -> None:
    change, options, message = REFUSED[case]
    model = model_of()
    model.push_to_hub(NAME)
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    endpoint = constants.ENDPOINT
    change(hub)
    try:
        with pytest.raises(CheckpointError, match="^" + re.escape(message)) as caught:
            model.load_adapter(NAME, "other", **options)
    finally:
        constants.ENDPOINT = endpoint
    assert len(str(caught.value).splitlines()) == 1
    assert model.adapter_names == ("default",)


def test_the_page_of_errors_has_them(root: Path) -> None:
    page = (root / "docs" / "errors.md").read_text(encoding="utf-8")
    for case in REFUSED.keys() - {"local", "subfolder"}:
        assert f"`{REFUSED[case][2]}" in page, case


def test_the_examples_of_the_page_run(root: Path, hub: Hub, tmp_path: Path) -> None:
    page = (root / "docs" / "hub.md").read_text(encoding="utf-8")
    model = model_of()
    names: dict[str, Any] = {"model": model, "backbone": backbone()}
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    assert len(blocks) == 2
    (tmp_path / "token").write_text("secret")  # as logging in does
    for code in blocks:
        exec(compile(code, "docs/hub.md", "exec"), names)
        assert outputs(names["model"]).equal(outputs(model))
        names["backbone"] = backbone()
    assert names["model"].adapter_names == ("default", "second")


@pytest.mark.parametrize("change", [offline, silent, broken, gated, missing])
def test_what_is_in_the_cache_is_enough(
    change: Callable[[Hub], None], hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As huggingface_hub has it, also for a repository that is gone."""
    model = model_of()
    model.push_to_hub(NAME)
    EPTModel.from_pretrained(NAME, backbone())
    monkeypatch.setattr(constants, "ENDPOINT", constants.ENDPOINT)
    change(hub)
    assert outputs(EPTModel.from_pretrained(NAME, backbone())).equal(outputs(model))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("by", ["cache_dir", "HF_HUB_CACHE"])
def test_a_cache_made_by_hand(
    shared: bool, by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layout of the hub's cache: links to blobs, which may be links to shared ones."""
    model, saved = model_of(), tmp_path / "saved"
    model.save_pretrained(saved)
    place = tmp_path / "place"
    repository = place / "models--user--name"
    snapshot = repository / "snapshots" / ("a" * 40)
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    for file in saved.iterdir():
        data = file.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        blob = repository / "blobs" / hashlib.sha1(data).hexdigest()
        if shared:
            store = place / "blobs" / digest[:2] / digest
            store.parent.mkdir(parents=True, exist_ok=True)
            store.write_bytes(data)
            blob.symlink_to(f"../../blobs/{digest[:2]}/{digest}")
        else:
            blob.write_bytes(data)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    options: dict[str, Any] = {"cache_dir": place}
    if by != "cache_dir":
        options = {}
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place))
    loaded = EPTModel.from_pretrained(NAME, backbone(), local_files_only=True, **options)
    assert outputs(loaded).equal(outputs(model))
    (snapshot / HEAD_FILE).unlink()
    (snapshot / HEAD_FILE).symlink_to(saved / HEAD_FILE)
    with pytest.raises(CheckpointError, match="got a link that leaves it"):
        EPTModel.from_pretrained(NAME, backbone(), local_files_only=True, **options)


# Names of folders and of repositories


def test_a_folder_of_this_name_wins(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = model_of(seed=1), model_of(seed=2)
    there.push_to_hub(NAME)
    monkeypatch.chdir(tmp_path)
    here.save_pretrained(NAME)
    hub.asked.clear()
    assert outputs(EPTModel.from_pretrained(NAME, backbone())).equal(outputs(here))
    assert hub.asked == []
    with pytest.raises(ValueError, match=r"^revision: expected None for a folder, got 'main'"):
        EPTModel.from_pretrained(NAME, backbone(), revision="main")
    shutil.rmtree("user")
    assert outputs(EPTModel.from_pretrained(NAME, backbone())).equal(outputs(there))


@pytest.mark.parametrize(
    "name", [Path(NAME), "name", "/user/name", "./name", "../name", "a/b/c", "~/name", "", "a\0/b"]
)
def test_what_is_no_name_of_a_repository(
    name: str | Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"adapter\.json: expected a readable file"):
        EPTModel.from_pretrained(name, backbone())
    assert hub.asked == []


@pytest.mark.parametrize("subfolder", ["../other", "/etc", "a/../../b"])
def test_a_subfolder_that_leads_out(subfolder: str, hub: Hub, tmp_path: Path) -> None:
    for source in (NAME, tmp_path):
        with pytest.raises(ValueError, match=r"^subfolder: expected a folder below the adapter's"):
            EPTModel.from_pretrained(source, backbone(), subfolder=subfolder)
    assert hub.asked == []


def test_an_adapter_that_is_read_has_no_place(tmp_path: Path) -> None:
    model_of().save_pretrained(tmp_path)
    saved = module.find_adapter(tmp_path)
    for name in ("revision", "subfolder"):
        with pytest.raises(ValueError, match=f"^{name}: expected None for"):
            EPTModel.from_pretrained(saved, backbone(), **{name: "x"})


def test_the_base_model_is_downloaded_by_consent_only(hub: Hub) -> None:
    model_of(base_model="user/base").push_to_hub(NAME)
    hub.asked.clear()
    with pytest.raises(ValueError, match=r"got 'user/base' .*\(--allow-download\) loads it from"):
        EPTModel.from_pretrained(NAME)
    assert hub.asked
    assert not any("base" in path for _, path, _ in hub.asked)


def test_banks_and_the_command_line(hub: Hub, tmp_path: Path) -> None:
    llama = save_llama(tmp_path / "llama", steps=1)
    config = EPTConfig(32, num_virtual_tokens=2, max_length=16, rank=2)
    built = load_backbone(str(llama), "CAUSAL_LM")
    model = fill(get_ept_model(built, config, "CAUSAL_LM"), seed=1)
    model.push_to_hub(NAME)
    expected = outputs(model)
    adapter = load_adapter(NAME, model=str(llama))
    assert outputs(adapter.model).equal(expected)
    bank = EPTBank.from_adapters(load_backbone(str(llama), "CAUSAL_LM"), {"a": NAME})
    assert bank.names == ("a",)


# The model card


def front(data: bytes | Path, tmp_path: Path) -> tuple[dict[str, Any], str]:
    """What a card says to the hub, and its text, read by the hub's library."""
    path = tmp_path / "read.md"
    path.write_bytes(data if isinstance(data, bytes) else data.read_bytes())
    card = ModelCard.load(path)
    return card.data.to_dict(), card.text


@pytest.mark.parametrize("task", BACKBONES)
def test_the_card(task: str, hub: Hub, tmp_path: Path) -> None:
    model = model_of(task, base_model="user/base")
    model.push_to_hub(NAME, metrics={"accuracy": 0.8125, "loss": 0.5})
    data, text = front(hub.branches[NAME]["main"][CARD_FILE], tmp_path)
    assert data == {
        "base_model": "user/base",
        "base_model_relation": "adapter",
        "library_name": "ept-fast",
        "metrics": ["accuracy", "loss"],
        "pipeline_tag": PIPELINES[task],
        "tags": ["ept", "ept-fast", "prompt-tuning"],
    }
    trained = model.get_nb_trainable_parameters()[0]
    for row in (
        "# name\n",
        f"| `task` | `{task}` |",
        "| `base model` | `user/base` |",
        f"| `trained parameters` | `{trained}` |",
        "| `num_virtual_tokens` | `4` |",
        "| `max_length` | `16` |",
        "| `rank` | `2` |",
        "| `num_spaces` | `2` |",
        "| `accuracy` | `0.8125` |",
        'EPTModel.from_pretrained("user/name", base_model="user/base")',
    ):
        assert row in text, row
    assert ("labels, in the order" in text) == model.has_head
    if model.has_head:
        assert json.dumps(model.labels) in text


def test_a_card_of_odd_names(tmp_path: Path) -> None:
    """Labels and metrics are anybody's text, and stay in their place."""
    labels = ["a|b", "```\n# Title", "<b>é</b>", *map(str, range(200))]
    config = EPTConfig(32, num_virtual_tokens=4)
    model = get_ept_model(backbone("TOKEN_CLS"), config, "TOKEN_CLS", labels=labels)
    model.base_model_name = "/home/somebody/model"
    model.save_pretrained(tmp_path, metrics={"a|b\n# `c`": 1})
    data, text = front(tmp_path / CARD_FILE, tmp_path)
    assert "base_model" not in data
    assert "somebody" not in text
    assert "203 labels, in the order of the logits; the first 100 of them:" in text
    assert '["a|b", "```\\n# Title", "<b>é</b>", "0"' in text
    assert "| `a\\|b # 'c'` | `1` |" in text
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# Soft prompt",
        "## Evaluation",
        "## Use",
    ]


def test_a_card_of_somebody_else_stays(hub: Hub, tmp_path: Path) -> None:
    model, folder = model_of(), tmp_path / "adapter"
    card = folder / CARD_FILE
    model.save_pretrained(folder)
    written = card.read_bytes()
    model.save_pretrained(folder, metrics={"accuracy": 0.5})
    assert card.read_bytes() != written  # one that nobody edited is renewed
    edited = card.read_bytes().replace(b"A soft prompt", b"My soft prompt")
    for mine in (edited, b"mine\n", b"", b"\xff", written + b"more\n", written[:-1]):
        card.write_bytes(mine)
        model.save_pretrained(folder)
        assert card.read_bytes() == mine
    card.unlink()
    card.mkdir()
    model.save_pretrained(folder)
    assert list(card.iterdir()) == []


def test_a_card_of_somebody_else_stays_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    model, folder = model_of(), tmp_path / "adapter"
    model.push_to_hub(NAME)
    model.push_to_hub(NAME, metrics={"accuracy": 0.5})
    files = hub.branches[NAME]["main"]
    assert b"accuracy" in files[CARD_FILE]
    files[CARD_FILE] = b"theirs"
    model.push_to_hub(NAME)
    model.save_pretrained(folder, push_to_hub=True, repo_id=NAME)
    assert files[CARD_FILE] == b"theirs"
    (folder / CARD_FILE).write_bytes(b"mine")  # which the user wrote for this very repository
    model.save_pretrained(folder, push_to_hub=True, repo_id=NAME)
    assert files[CARD_FILE] == b"mine"


def test_a_card_is_no_part_of_the_adapter(tmp_path: Path) -> None:
    model = model_of()
    model.save_pretrained(tmp_path)
    assert CARD_FILE not in json.loads((tmp_path / ADAPTER_FILE).read_text())["sha256"]
    (tmp_path / CARD_FILE).write_text("mine")
    assert outputs(EPTModel.from_pretrained(tmp_path, backbone())).equal(outputs(model))
    (tmp_path / CARD_FILE).unlink()
    EPTModel.from_pretrained(tmp_path, backbone())


@pytest.mark.slow
@pytest.mark.minutes
@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION", "CAUSAL_LM"])
def test_the_example_of_a_card_runs(task: str, tmp_path: Path) -> None:
    """Offline, with base model and adapter in the hub's cache."""
    cache, commit = tmp_path / "cache", "a" * 40
    base = cache / "models--user--base"
    folder = base / "snapshots" / commit
    (save_llama(folder, steps=1) if task == "CAUSAL_LM" else save_model(folder)).exists()
    config = EPTConfig(32, num_virtual_tokens=2, max_length=60)
    labels = {"labels": LABELS} if task in ("SEQ_CLS", "TOKEN_CLS") else {}
    built = load_backbone(str(folder), task)
    model = get_ept_model(built, config, task, base_model="user/base", **labels)
    saved = cache / "models--user--name/snapshots" / commit
    model.save_pretrained(saved)
    card = module.AdapterCard(task, "user/base", None, config, 0, {}).to_bytes(NAME).decode()
    for name in ("base", "name"):
        refs = cache / f"models--user--{name}" / "refs"
        refs.mkdir()
        (refs / "main").write_text(commit)
    code = card.partition("```python\n")[2].partition("```")[0]
    done = python("-c", code, HF_HUB_CACHE=str(cache), HF_HUB_OFFLINE="1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
