"""What an adapter's folder and a model's may do: no code of them is run and no hub is asked, unless
the user says so.
"""

from __future__ import annotations

import ast
import builtins
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from ept_fast import EPTConfig, EPTModel, get_ept_model
from ept_fast.cli import main
from ept_fast.training.job import load_adapter
from ept_fast.transformers.backbone import load_backbone, load_tokenizer
from tests.tiny import save_model, save_task, small_run

pytestmark = pytest.mark.usefixtures("one_thread")

# A model of an architecture of its own, which works, and leaves a file when it is imported.
CODE = """
from pathlib import Path
import transformers
Path({marker!r}).touch()

class OwnConfig(transformers.BertConfig):
    model_type = "own"

class OwnModel(transformers.BertModel):
    config_class = OwnConfig

class OwnClassifier(transformers.BertForSequenceClassification):
    config_class = OwnConfig

class OwnTokenizer(transformers.PreTrainedTokenizerFast):
    pass
"""
MODEL_CODE = {
    "AutoConfig": "own.OwnConfig",
    "AutoModel": "own.OwnModel",
    "AutoModelForSequenceClassification": "own.OwnClassifier",
}
BROUGHT = (
    "(it brings code of its own, which is run with trust_remote_code only, on the command line "
    "--trust-remote-code)"
)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class Place:
    """A model that brings code, a plain one, and an adapter whose file names the former."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.marker = folder, folder / "code was run"
        self.plain = save_model(folder / "plain")
        model = load_backbone(str(self.plain))
        config = EPTConfig(32, num_virtual_tokens=2, max_length=16, rank=2)
        labels = {"labels": ["bad", "good"]}
        self.adapter = folder / "adapter"
        get_ept_model(model, config, "SEQ_CLS", **labels).save_pretrained(self.adapter)  # type: ignore[arg-type]
        self.texts = folder / "texts.txt"
        self.texts.write_text("the play was fine\n")
        self.model = self.with_code("model", MODEL_CODE, tokenizer=True)
        self.named(self.model)

    def with_code(self, name: str, models: dict[str, str], tokenizer: bool) -> Path:
        made = self.folder / name
        shutil.copytree(self.plain, made)
        (made / "own.py").write_text(CODE.format(marker=str(self.marker)))
        if models:
            edit(made / "config.json", model_type="own", auto_map=models)
        if tokenizer:
            maps = {"AutoTokenizer": [None, "own.OwnTokenizer"]}
            edit(made / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=maps)
        return made

    def named(self, model: Path | str) -> None:
        edit(self.adapter / "adapter.json", base_model=str(model), base_model_type="bert")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The questions at the prompt, to which the answer is yes."""
    questions: list[str] = []

    def answer(question: str = "") -> str:
        questions.append(question)
        return "y"

    monkeypatch.setattr(builtins, "input", answer)
    return questions


def call(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], input="y\n" * 50)


# Which files bring code, the model type of the config beside it, and what loads them. That of the
# others is one that transformers has a config for, but no such model.
BRINGERS: dict[str, tuple[dict[str, str], str, Callable[[str], object]]] = {
    "config": (MODEL_CODE, "own", load_backbone),
    "model": ({"AutoModel": "own.OwnModel"}, "blip_text_model", load_backbone),
    "classifier": (
        {"AutoModelForSequenceClassification": "own.OwnClassifier"},
        "clip_text_model",
        lambda name: load_backbone(name, labels=("bad", "good")),
    ),
    "tokenizer": ({}, "vit", load_tokenizer),
}


@pytest.mark.parametrize("what", BRINGERS)
def test_code_of_a_model_is_neither_run_nor_asked_about(
    what: str, place: Place, asked: list[str]
) -> None:
    models, kind, load = BRINGERS[what]
    folder = place.with_code("other", models, tokenizer=what == "tokenizer")
    edit(folder / "config.json", model_type=kind)
    with pytest.raises(ValueError, match=f"{folder}' {re.escape(BROUGHT)}$"):
        load(str(folder))
    assert (asked, place.marker.exists()) == ([], False)


@pytest.mark.parametrize("command", ["predict", "evaluate", "train"])
def test_the_command_line_runs_no_code(
    command: str, place: Place, asked: list[str], tmp_path: Path
) -> None:
    words = {
        "predict": ["--adapter", place.adapter, "--input", place.texts],
        "evaluate": ["--adapter", place.adapter, "--data", save_task(tmp_path / "data")],
        "train": ["--model", place.model, "--data", save_task(tmp_path / "data"), "--output"],
    }[command]
    if command == "train":
        words.append(tmp_path / "out")
    result = call(command, *words)
    assert (result.exit_code, asked, place.marker.exists()) == (2, [], False), result.output
    (line,) = result.stderr.splitlines()
    assert f"got '{place.model}' {BROUGHT}" in line
    if command != "train":
        assert line.endswith(
            f"{place.adapter} names it; base_model (on the command line --model) "
            "names another place"
        )


def environment(place: Place, **changes: str) -> dict[str, str]:
    """Of a process of its own: where transformers keeps code, no process forgets it."""
    return os.environ | {"HF_MODULES_CACHE": str(place.folder / "modules"), **changes}


@pytest.mark.slow
def test_yes_at_the_prompt_runs_no_code(place: Place, root: Path) -> None:
    words = ("predict", "--adapter", place.adapter, "--input", place.texts)
    done = subprocess.run(
        [sys.executable, "-m", "ept_fast", *words],
        input="y\n" * 1000,
        cwd=root,
        env=environment(place),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, place.marker.exists()) == (2, False), done.stderr
    assert (done.stdout, len(done.stderr.splitlines())) == ("", 1)
    assert BROUGHT in done.stderr


SHELL = """
import json, sys
from click.testing import CliRunner
from ept_fast.cli import main
for line in sys.stdin:
    result = CliRunner().invoke(main, json.loads(line))
    print(json.dumps([result.exit_code, result.stdout, result.stderr]), flush=True)
"""


class Shell:
    """One process that runs commands, each as if alone in it."""

    def __init__(self, root: Path, environ: dict[str, str]) -> None:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SHELL], cwd=root, env=environ, **pipes
        )

    def __call__(self, *words: str | Path) -> tuple[int, str, str]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([str(word) for word in words]) + "\n")
        self.process.stdin.flush()
        code, output, errors = json.loads(self.process.stdout.readline())
        return code, output, errors

    def __enter__(self) -> Shell:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()


@pytest.mark.slow
def test_code_is_run_where_the_user_trusts_it(place: Place, root: Path, tmp_path: Path) -> None:
    settings = small_run(place.model, save_task(tmp_path / "data"), tmp_path / "out", max_steps=2)
    words = [w for n, v in settings.items() for w in (f"--{n.replace('_', '-')}", str(v))]
    trusted = ("--model", place.model, "--trust-remote-code")
    with Shell(root, environment(place)) as shell:
        code, _, errors = shell("train", *words, "--trust-remote-code")
        assert (code, place.marker.exists()) == (0, True), errors
        answer = ("predict", "--adapter", tmp_path / "out", "--input", place.texts)
        code, output, errors = shell(*answer, *trusted)
        assert code == 0, errors
        assert set(json.loads(output)) == {"text", "label", "probabilities"}


def test_code_is_not_trusted_on_an_adapters_word(place: Place, asked: list[str]) -> None:
    for load in (load_adapter, EPTModel.from_pretrained):
        with pytest.raises(ValueError, match=r"^trust_remote_code: expected base_model \(on the"):
            load(place.adapter, trust_remote_code=True)
    words = ("predict", "--adapter", place.adapter, "--input", place.texts)
    alone = call(*words, "--trust-remote-code")
    assert (alone.exit_code, alone.stderr) == (
        2,
        f"Error: trust_remote_code: expected base_model (on the command line --model) beside it, "
        f"as {place.adapter} may name any code, got none\n",
    )
    nameless = call(*words, "--model", "", "--trust-remote-code")
    assert nameless.exit_code == 2
    assert (asked, place.marker.exists()) == ([], False)


class Pickled:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("where", [".", "../adapter", "absolute"])
def test_a_pickle_beside_an_adapter_is_not_run(
    where: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(place.plain / name, place.adapter)
    torch.save({"weights": Pickled(place.marker)}, place.adapter / "pytorch_model.bin")
    monkeypatch.chdir(place.adapter)
    place.named(place.adapter if where == "absolute" else where)
    result = call("predict", "--adapter", place.adapter, "--input", place.texts)
    assert (result.exit_code, place.marker.exists()) == (2, False), result.output
    assert "(its weights are a pickle of more than tensors)" in result.stderr


def test_damaged_weights_are_one_line(place: Place) -> None:
    (place.plain / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match=r"^model: expected .*plain' \(Error while deserializing"):
        load_backbone(str(place.plain))


# What may be loaded from the hub


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """The address of a hub that has nothing, and what it was asked for."""
    asked: list[str] = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_POST = do_GET

        def log_message(self, *args: Any) -> None:
            """Nothing: requests are noted above."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_only_consent_asks_the_hub(place: Place, root: Path, hub: tuple[str, list[str]]) -> None:
    address, asked = hub
    cache = place.folder / "hub"
    environ = environment(place, HF_HUB_OFFLINE="0", HF_ENDPOINT=address, HF_HUB_CACHE=str(cache))
    words = ("predict", "--adapter", place.adapter, "--input", place.texts)
    place.named("someone/tiny")
    with Shell(root, environ) as shell:
        code, _, errors = shell(*words)
        assert (code, asked) == (2, [])
        assert errors == (
            "Error: model: expected a folder or hub id of a pretrained model, got 'someone/tiny' "
            "(no such folder, and not in the cache of the Hugging Face hub); "
            f"{place.adapter} names it; base_model (on the command line --model) names another "
            "place, allow_download (--allow-download) loads it from the hub\n"
        )
        for consent in (("--allow-download",), ("--model", "someone/tiny")):
            code, _, errors = shell(*words, *consent)
            assert code == 2
            assert any("someone/tiny" in path for path in asked), errors
            asked.clear()
        kept = cache / "models--someone--tiny"
        snapshot = kept / "snapshots" / ("0" * 40)
        shutil.copytree(place.plain, snapshot)
        (kept / "refs").mkdir(exist_ok=True)
        (kept / "refs" / "main").write_text("0" * 40)
        # What transformers asks the hub to convert, even where it is told to stay on this machine.
        weights = load_backbone(str(place.plain)).state_dict()
        torch.save(weights, snapshot / "pytorch_model.bin")
        (snapshot / "model.safetensors").unlink()
        code, output, errors = shell(*words)
        assert (code, asked) == (0, []), errors
        assert set(json.loads(output)) == {"text", "label", "probabilities"}
        for path in snapshot.glob("tokenizer*"):
            path.unlink()
        code, _, errors = shell(*words)
        assert (code, asked) == (2, []), errors
        assert errors.endswith("allow_download (--allow-download) loads it from the hub\n")


@pytest.mark.parametrize("name", ["someone/tiny", "not a name", "../x", "", "a\0b"])
def test_what_is_nowhere_names_both_ways_out(
    name: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.folder)
    place.named(name)
    for load in (load_adapter, EPTModel.from_pretrained):
        with pytest.raises(
            ValueError, match=r"\(--allow-download\) loads it from the hub$"
        ) as caught:
            load(place.adapter)
        assert f"got {name!r} (no such folder, and not in the cache" in str(caught.value)


# Every call


def calls(root: Path) -> list[tuple[str, ast.Call]]:
    found = []
    for folder in ("ept_fast", "examples", "bench"):
        for path in sorted((root / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    whose = ast.unparse(node.func.value).lower()
                    if node.func.attr == "from_pretrained" and "auto" in whose:
                        found.append((f"{path.relative_to(root)}:{node.lineno}", node))
    return found


def test_every_call_says_whether_it_trusts(root: Path) -> None:
    """Those of transformers in this repository."""
    found = calls(root)
    assert len(found) >= 13
    for where, node in found:
        assert "trust_remote_code" in [word.arg for word in node.keywords], where


def test_the_policy_is_linked_and_names_what_is_there(root: Path) -> None:
    assert "(SECURITY.md)" in (root / "README.md").read_text(encoding="utf-8")
    page = (root / "SECURITY.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)]+)\)", page):
        name, _, anchor = link.partition("#")
        heading = f"\n## {anchor.replace('-', ' ')}\n"
        assert heading in (root / name).read_text(encoding="utf-8").lower(), link
    options = [option for command in main.commands.values() for option in command.params]
    server = (root / "examples" / "server" / "__main__.py").read_text(encoding="utf-8")
    for name in re.findall(r"`(--[a-z-]+)`", page):
        assert any(name in option.opts for option in options) or f'"{name}"' in server, name
