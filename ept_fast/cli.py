"""The command line: ``ept-fast train | evaluate | predict | info | demo``."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

import ept_fast
from ept_fast.training.config import TrainConfig, choices_of, kinds
from ept_fast.training.data import COLUMN_OPTIONS, SUFFIXES, Fields

__all__ = ["main"]

_GIVEN = (click.core.ParameterSource.COMMANDLINE, click.core.ParameterSource.ENVIRONMENT)
F = TypeVar("F", bound=Callable[..., Any])

_FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}
_NAMED = {  # options of values by name
    "settings": "set",
    "losses": "loss",
    "class_weights": "class-weight",
}


class _Failure(click.ClickException):
    """One line on standard error: exit code 2 for a user's mistake, 1 for a run that failed."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(" ".join(message.split()))
        self.exit_code = code  # type: ignore[misc]  # click reads it from the instance


def _exit_code(error: Exception) -> int | None:
    """Of an error that the package raises on purpose; any other is a defect: None."""
    if type(error).__name__ in ("NonFiniteLossError", "WriteError"):
        return 1
    if isinstance(error, ValueError | OSError | ImportError):
        return 2
    if isinstance(error, RuntimeError):
        by_name = type(error).__name__ == "ExtensionError"
        if by_name or str(error).startswith(("backend:", "EPT_FAST_BACKEND:")):
            return 2
    return None


def _say(text: str | bytes, nl: bool = True) -> None:
    """Write to standard output."""
    from ept_fast.storage.files import writing

    with writing("standard output"):
        click.echo(text, nl=nl)


def _clean(command: F) -> F:
    """Turn the errors that the package raises on purpose into one line each."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read at their imports
        if not sys.stderr.isatty():
            os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        try:
            command(*args, **kwargs)
        except BrokenPipeError:
            raise
        except Exception as error:
            code = _exit_code(error)
            if code is None:
                raise
            if hasattr(error, "told_by"):  # by another one of torchrun's processes
                time.sleep(2)  # as torchrun ends them all when the first one exits
                raise SystemExit(code) from error
            raise _Failure(str(error) or type(error).__name__, code) from error

    return run  # type: ignore[return-value]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(ept_fast.__version__, prog_name="ept-fast")
def main() -> None:
    """Train and use EPT soft prompts on frozen pretrained models."""


def _setting(name: str) -> Callable[[F], F]:
    """The option of this field of TrainConfig."""
    field, kind, choices = _FIELDS[name], kinds()[name], choices_of(_FIELDS[name])
    if kind is dict:
        return click.option(
            f"--{_NAMED[name]}",
            name,
            multiple=True,
            metavar="NAME=VALUE",
            help=field.metadata["help"],
        )
    flag = name.replace("_", "-")
    how: dict[str, Any] = {"required": True, "multiple": name == "data"}
    if field.default is not dataclasses.MISSING:
        how = {"default": field.default, "show_default": str(field.default).isprintable()}
    return click.option(
        f"--{flag}/--no-{flag}" if kind is bool else f"--{flag}",
        type=click.Choice(choices) if choices else kind,
        help=field.metadata["help"],
        **how,
    )


def _named_values(option: str, words: Sequence[str]) -> dict[str, Any]:
    """What ``NAME=VALUE`` words say: values are JSON where they can be, else strings."""
    named: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not name or not equals:
            raise ValueError(f"{option}: expected NAME=VALUE, got {word!r}")
        if name in named:
            raise ValueError(f"{option}: expected each name once, got {name!r} twice")
        try:
            named[name] = json.loads(text)
        except (ValueError, RecursionError):
            named[name] = text
    return named


def _together(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator."""
    return lambda command: functools.reduce(lambda c, option: option(c), options[::-1], command)


_count = click.IntRange(min=1)
_batch_size = click.option("--batch-size", type=_count, default=64, show_default=True)
_loading = _together(
    click.option("--adapter", required=True, help="Folder of an adapter or a run, or hub id."),
    click.option("--model", help="The model, in place of the one saved with the adapter."),
    click.option("--trust-remote-code", is_flag=True, help="Run code that --model brings."),
    click.option("--allow-download", is_flag=True, help="Ask the hub for the adapter's model."),
    _setting("device"),
)
_writing = _together(
    click.option(
        "--max-new-tokens", type=_count, help="Of a written text; by default as long as targets."
    ),
    click.option(
        "--num-beams", type=_count, help="To write with (seq2seq, causal); by default as trained."
    ),
)


def _fields_of(how: dict[str, Any]) -> Fields:
    """The names of the columns, which are taken out of ``how``."""
    return Fields.of({name: how.pop(name) for name in COLUMN_OPTIONS if name in how})


def _load(how: dict[str, Any]) -> Any:
    """The adapter that the options of ``_loading`` name, which are taken out of ``how``."""
    from ept_fast.training.job import load_adapter

    names = ("model", "device", "trust_remote_code", "allow_download")
    return load_adapter(how.pop("adapter"), **{name: how.pop(name) for name in names})


def _read_config(context: click.Context, parameter: Any, path: str | None) -> dict[str, Any]:
    """The settings of a file, which stand for the required options that are not given."""
    from ept_fast.libraries import MissingLibraryError, require
    from ept_fast.storage.untrusted import shorten

    if path is None:
        return {}
    try:
        require("yaml")
    except MissingLibraryError as error:
        raise _Failure(str(error), 2) from None
    import yaml  # type: ignore[import-untyped]

    try:
        found = yaml.safe_load(Path(path).read_bytes())
    except (OSError, yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = f"config: expected a file of YAML or JSON, got {path} ({error})"
        raise _Failure(reason, 2) from None
    if isinstance(found, dict) and isinstance(found.get("config"), dict):
        found = found["config"]  # of a run.json
    if not isinstance(found, dict):
        raise _Failure(f"config: expected settings by name in {path}, got {shorten(found)}", 2)
    for name in found:
        if name not in _FIELDS:
            raise _Failure(f"config: expected names of options in {path}, got {shorten(name)}", 2)
    stand_ins = {"model": "", "data": [""], "output": ""}  # of options that are required
    context.default_map = {name: value for name, value in stand_ins.items() if name in found}
    return found


@main.command()
@click.option(
    "--config",
    "settings_of_file",
    is_eager=True,
    callback=_read_config,
    help="YAML or JSON file of options by name (max_steps: 100), such as an earlier run's run.json;"
    " those given here go first.",
)
@_together(*(_setting(name) for name in _FIELDS))
@click.option(
    "--resume",
    is_flag=True,
    help="Go on from the newest complete checkpoint; a finished run, if it is to be longer.",
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier run's results in --output.")
@click.option("--quiet", is_flag=True, help="No progress.")
@_clean
def train(
    settings_of_file: Mapping[str, Any], resume: bool, overwrite: bool, quiet: bool, **options: Any
) -> None:
    """Train an adapter to label texts, or to write a text for a text.

    With several --data, one of each, whose prompts share tensors, in adapter/<name>/.

    Leaves adapter/, metrics.json, learning_curves.png, gate_weights.png and, for texts, samples.md
    in --output.
    """
    from ept_fast.training.job import train as run

    for name, option in _NAMED.items():
        options[name] = _named_values(option, options[name])
    source = click.get_current_context().get_parameter_source
    given = {name: value for name, value in options.items() if source(name) in _GIVEN}
    try:
        config = TrainConfig(**{**settings_of_file, **given})
    except TypeError as error:  # of a value in the file: click has checked all others
        raise ValueError(error) from None
    metrics = run(config, resume=resume, overwrite=overwrite, progress=not quiet)
    if os.environ.get("RANK", "0") != "0":  # one of torchrun's processes speaks for all
        return
    from ept_fast.training.report import describe_run

    for line in describe_run(metrics, Path(config.output)):
        _say(line)


@main.command()
@_loading
@click.option("--data", required=True, help="As in train.")
@click.option("--split", default="test", show_default=True, help="Which split of --data.")
@_together(*map(_setting, COLUMN_OPTIONS))
@_batch_size
@click.option(
    "--eval-generate",
    type=click.IntRange(min=0),
    help="Rows to write texts for (seq2seq, causal); by default all.",
)
@_writing
@_clean
def evaluate(data: str, **how: Any) -> None:
    """Print an adapter's metrics on rows with labels or targets, as JSON."""
    from ept_fast.training.job import evaluate as run

    fields = _fields_of(how)
    adapter = _load(how)
    _say(json.dumps(run(adapter, data, fields=fields, **how), indent=2))


@main.command()
@_loading
@click.option("--input", "source", default="-", show_default=True, help="- is standard input.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["auto", *(suffix[1:] for suffix in SUFFIXES)]),
    default="auto",
    show_default=True,
    help="txt has one text per line. auto: by the suffix; standard input is txt.",
)
@click.option("--output", type=click.Path(), help="File; by default standard output.")
@_together(*map(_setting, list(COLUMN_OPTIONS)[:3]))
@_batch_size
@_writing
@_clean
def predict(source: str, form: str, output: str | None, **how: Any) -> None:
    """Write the answer to each text, one JSON object per line.

    That is its label or labels and their probabilities, its value, or the text that the model
    writes for it (output). Every line of a text file gets one, a blank line too, which is an empty
    text; so does every row of the other formats. Nothing is written if one text cannot be answered.
    """
    from ept_fast.storage.files import write_bytes
    from ept_fast.training.data import read_rows
    from ept_fast.training.job import predict as run

    reading: dict[str, Any] = {"fields": _fields_of(how), "answer": "none"}
    if source == "-":
        suffix = ".txt" if form == "auto" else f".{form}"
        with tempfile.NamedTemporaryFile(suffix=suffix) as file:
            file.write(sys.stdin.buffer.read())
            file.flush()
            rows = read_rows(file.name, source="standard input", **reading)
    else:
        rows = read_rows(source, suffix=None if form == "auto" else f".{form}", **reading)
    results = run(_load(how), rows, **how)
    lines = []
    for number, result in enumerate(results):
        texts: dict[str, Any] = {"text": rows.texts[number]}
        if rows.pairs is not None:
            texts["text_pair"] = rows.pairs[number]
        lines.append(json.dumps({**texts, **result}, ensure_ascii=False) + "\n")
    content = "".join(lines).encode()
    if output is None:
        _say(content, nl=False)
    else:
        write_bytes(Path(output), content)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@_clean
def info(as_json: bool) -> None:
    """Print versions, devices, which backends work here or why not, and which one goes first."""
    import torch

    from ept_fast.backends.cuda import library
    from ept_fast.ops.dispatch import describe, first

    found = library.state()
    backends = [{"name": n, "works": ok, "reason": reason} for n, ok, reason in describe()]
    chosen, why = first() or ("none", "all are switched off")
    facts: dict[str, Any] = {
        "ept_fast": ept_fast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "transformers": _installed("transformers"),
        "devices": _devices(torch),
        "backends": backends,
        "first_backend": {"name": chosen, "reason": why},
        "cuda_library": {
            "built": found.path is not None,
            "architectures": list(found.architectures),
            "path": None if found.path is None else str(found.path),
            "state": found.text,
        },
    }
    if as_json:
        _say(json.dumps(facts, indent=2))
        return
    for name in ("ept_fast", "python", "torch", "triton", "transformers"):
        _say(f"{name:<13}{facts[name] or 'not installed'}")
    _say(f"{'devices':<13}{', '.join(_devices(torch))}")
    for backend in backends:
        state = "works" if backend["works"] else "does not work here"
        reason = f" ({backend['reason']})" if backend["reason"] else ""
        _say(f"backend {backend['name']:<10}{state}{reason}")
    _say(f"first        {chosen} ({why})")


def _installed(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    if importlib.util.find_spec(name) is None:
        return None
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown version"


def _devices(torch: Any) -> list[str]:
    names = [f"CPU ({torch.get_num_threads()} threads)"]
    if torch.cuda.is_available():
        names += [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("Apple GPU (mps)")
    return names


@main.command()
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("demo-output"),
    show_default=True,
    help="Folder for the results.",
)
@click.option("--steps", type=click.IntRange(min=1), help="Optimizer steps, for a shorter run.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@_clean
def demo(output: Path, steps: int | None, seed: int) -> None:
    """Train on a small built-in task with the encoder of the demo extra."""
    from ept_fast.training.demo import run_demo

    run_demo(output=output, steps=steps, seed=seed)


if __name__ == "__main__":
    main()
