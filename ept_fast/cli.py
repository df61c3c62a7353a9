"""The command line: ``ept-fast train | evaluate | predict | info | demo``."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

import ept_fast
from ept_fast.config import GATES
from ept_fast.ops.activations import ACTIVATIONS
from ept_fast.prompts.base import prompt_methods
from ept_fast.training.config import DEVICES, INITS, KEEPS, TASKS, TrainConfig
from ept_fast.training.metrics import GENERATED_METRICS, METRICS, TEXT_METRICS
from ept_fast.transformers import POOLINGS

__all__ = ["main"]

F = TypeVar("F", bound=Callable[..., Any])

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainConfig)}


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


def _option(*names: str, **settings: Any) -> Callable[[F], F]:
    """An option whose default is TrainConfig's field of the same name."""
    field = names[0].strip("-").replace("-", "_").partition("/")[0]
    return click.option(*names, default=_DEFAULTS[field], show_default=True, **settings)


_separator = click.option(
    "--separator",
    default=_DEFAULTS["separator"],
    show_default="a line end",
    help="Put between text and target (causal).",
)


def _loading(command: F) -> F:
    """Options that say which adapter and model to load; the command gets ``load`` for them."""

    @functools.wraps(command)
    def run(
        adapter: str,
        model: str | None,
        device: str,
        trust_remote_code: bool,
        allow_download: bool,
        **how: Any,
    ) -> Any:
        def load() -> Any:
            from ept_fast.training.job import load_adapter

            return load_adapter(
                adapter,
                model=model,
                device=device,
                trust_remote_code=trust_remote_code,
                allow_download=allow_download,
            )

        return command(load=load, **how)

    options = (
        click.option(
            "--adapter", required=True, type=click.Path(), help="Folder of an adapter or a run."
        ),
        click.option("--model", help="The model, in place of the one saved with the adapter."),
        click.option("--trust-remote-code", is_flag=True, help="Run code that --model brings."),
        click.option("--allow-download", is_flag=True, help="Ask the hub for the adapter's model."),
        _option("--device", type=click.Choice(DEVICES)),
    )
    return functools.reduce(lambda last, option: option(last), reversed(options), run)  # type: ignore[return-value]


def _writing(command: F) -> F:
    """Options of commands that write texts with a trained adapter."""
    count = click.IntRange(min=1)
    for name, text in (
        ("--num-beams", "To write with (seq2seq, causal); as in training where not given."),
        ("--max-new-tokens", "Of a written text; as long as targets were where not given."),
    ):
        command = click.option(name, type=count, help=text)(command)
    return command


@main.command()
@click.option("--model", required=True, help="Folder or hub id of the frozen model.")
@click.option(
    "--data",
    required=True,
    help="Folder of <split>.jsonl (.csv, .tsv) files, a file of training rows, or the name of a "
    "data set of the datasets library.",
)
@click.option("--output", required=True, type=click.Path(), help="Folder for the results.")
@_option("--task", type=click.Choice(TASKS), help="Labels, or target texts to write.")
@_option("--method", type=click.Choice(tuple(prompt_methods())))
@_option(
    "--eval-data",
    help="File of evaluation rows; else the split validation (or test, to --keep last).",
)
@_option("--eval-fraction", type=float, help="Training rows held out where there is neither.")
@_option("--text-field", help="Column of the text.")
@_option("--pair-field", help="Column of the second text.")
@_option("--label-field", help="Column of the label.")
@_option("--target-field", help="Column of the target text (seq2seq, causal).")
@_option("--num-labels", type=int, help="Classes, where the training rows miss some.")
@_option("--prompt-length", type=int, help="The budget, in tokens of a plain prompt.")
@_option("--num-virtual-tokens", type=int, help="Length of the short prompt (ept, dept).")
@_option("--max-length", type=int, help="Tokens of a text that are read.")
@_option("--max-target-length", type=int, help="Tokens of a target (seq2seq, causal).")
@_separator
@_option("--num-spaces", type=int, help="Subspaces (ept); 0 for none.")
@_option("--space-dim", type=int, help="Width of a subspace (ept).")
@_option("--alpha", type=float, help="The offset is scaled by alpha / sqrt(rank).")
@_option("--activation", type=click.Choice(tuple(ACTIVATIONS)))
@_option("--gate", type=click.Choice(GATES))
@_option("--temperature", type=float, help="Of the gate.")
@_option("--fusion/--no-fusion", help="Prompt fusion (ept).")
@_option("--init", type=click.Choice(INITS), help="Where the prompt starts.")
@_option("--pooling", type=click.Choice(POOLINGS), help="What the head sees (classification).")
@_option("--head-dropout", type=float)
@_option("--prompt-lr", type=float, help="Learning rate of the short prompt.")
@_option("--offset-lr", type=float, help="Learning rate of the offset.")
@_option("--space-lr", type=float, help="Learning rate of subspaces and gate.")
@_option("--head-lr", type=float, help="Learning rate of the classifier.")
@_option("--weight-decay", type=float)
@_option("--warmup-ratio", type=float, help="Fraction of the steps with a rising rate.")
@_option("--max-grad-norm", type=float, help="0 leaves gradients alone.")
@_option("--batch-size", type=int)
@_option("--eval-batch-size", type=int)
@_option("--gradient-accumulation-steps", type=int, help="Batches of an optimizer step.")
@_option("--max-steps", type=int, help="Optimizer steps, in place of --epochs.")
@_option("--epochs", type=float)
@_option("--eval-steps", type=int, help="Steps between evaluations and checkpoints.")
@_option("--eval-before/--no-eval-before", help="Evaluate before the first step.")
@_option("--keep", type=click.Choice(KEEPS), help="Which evaluation's weights to keep.")
@_option("--metric", type=click.Choice(METRICS + TEXT_METRICS), help="What --keep best goes by.")
@_option("--eval-generate", type=int, help="Evaluation rows to write texts for; 0 for none.")
@_option("--max-new-tokens", type=int, help="Of a written text; as --max-target-length.")
@_option("--num-beams", type=int, help="To write with; 1 is greedy.")
@_option("--group-by-length/--no-group-by-length", help="Batches of similar lengths.")
@_option("--packing/--no-packing", help="Several texts in a row (causal).")
@_option("--pack-length", type=int, help="Text tokens of a packed row.")
@_option("--seed", type=int)
@_option("--bf16/--no-bf16", help="Default: on a GPU that supports it.")
@_option("--device", type=click.Choice(DEVICES))
@_option("--trust-remote-code", is_flag=True, help="Run code that --model brings.")
@click.option("--resume", is_flag=True, help="Go on from the newest complete checkpoint.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier run's results in --output.")
@click.option("--quiet", is_flag=True, help="No progress.")
@_clean
def train(resume: bool, overwrite: bool, quiet: bool, **settings: Any) -> None:
    """Train an adapter to classify texts, or to write a text for a text.

    Leaves adapter/, metrics.json, learning_curves.png, gate_weights.png and, for texts, samples.md
    in --output.
    """
    from ept_fast.training.job import train as run

    config = TrainConfig(**settings)
    metrics = run(config, resume=resume, overwrite=overwrite, progress=not quiet)
    if os.environ.get("RANK", "0") != "0":  # one of torchrun's processes speaks for all
        return
    for line in describe_run(metrics, Path(config.output)):
        _say(line)


def describe_run(metrics: dict[str, Any], output: Path) -> list[str]:
    """What a finished run has to say, a line each."""
    judged_by, before, after = metrics["metric"], metrics["before"], metrics["after"]
    counts = metrics["parameters"]
    trained, whole = counts["prompt"] + counts["head"], sum(counts.values())
    rows = metrics["rows"]
    names = [judged_by]
    if metrics["config"]["task"] != "classification":
        names += [name for name in TEXT_METRICS if name in after and name != judged_by]
    lines = []
    for name in names:
        start = "not measured" if before is None else f"{before[name]:.4f}"
        count = len(metrics["samples"]) if name in GENERATED_METRICS else rows["evaluation"]
        lines.append(
            f"{name.replace('_', ' ')}: {start} before, {after[name]:.4f} after "
            f"{after['step']} steps ({count} rows)"
        )
    if "train_targets_cut" in rows:
        learnt = "targets" if rows["targets"] else "the texts themselves, as no row has a target"
        lines.append(f"learnt: {learnt}")
    lines += [
        f"evaluated on: {rows['evaluation_source']}",
        f"time per step: {1000 * metrics['seconds_per_step']:.0f} ms (median)",
        f"parameters trained: {trained:,} (prompt {counts['prompt']:,}, head {counts['head']:,}), "
        f"{100 * trained / whole:.2f}% of {whole:,}",
    ]
    every = rows["train"] + rows["evaluation"]
    cut = rows["train_cut"] + rows["evaluation_cut"]
    if cut:
        lines.append(f"rows cut to {rows['max_length']} tokens: {cut} of {every}")
    cut = rows.get("train_targets_cut", 0) + rows.get("evaluation_targets_cut", 0)
    if cut:
        lines.append(f"targets cut: {cut} of {every}")
    lines.append(f"adapter: {output / 'adapter'}")
    lines.append(f"metrics: {output / 'metrics.json'}")
    pictures = [str(output / "learning_curves.png")]
    if metrics["gate_weights"] is None:
        lines.append(f"pictures: {pictures[0]} (no subspaces, so no gate weights to draw)")
    else:
        lines.append(f"pictures: {pictures[0]}, {output / 'gate_weights.png'}")
    if metrics["samples"]:
        lines.append(f"samples: {output / 'samples.md'}")
    return lines


@main.command()
@_loading
@click.option("--data", required=True, help="As in train.")
@click.option("--split", default="test", show_default=True, help="Which split of --data.")
@_option("--text-field", help="Column of the text.")
@_option("--pair-field", help="Column of the second text.")
@_option("--label-field", help="Column of the label.")
@_option("--target-field", help="Column of the target text.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True)
@click.option(
    "--eval-generate",
    type=click.IntRange(min=0),
    help="Rows to write texts for (seq2seq, causal); all where not given.",
)
@_writing
@_clean
def evaluate(
    load: Callable[[], Any],
    data: str,
    text_field: str,
    pair_field: str,
    label_field: str,
    target_field: str,
    **how: Any,
) -> None:
    """Print an adapter's metrics on rows with labels or targets, as JSON."""
    from ept_fast.training.data import Fields
    from ept_fast.training.job import evaluate as run

    fields = Fields(text_field, pair_field, label_field, target_field)
    _say(json.dumps(run(load(), data, fields=fields, **how), indent=2))


@main.command()
@_loading
@click.option("--input", "source", default="-", show_default=True, help="- is standard input.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["auto", "txt", "jsonl", "csv", "tsv"]),
    default="auto",
    show_default=True,
    help="txt is a text a line. auto: by the suffix; standard input is txt.",
)
@click.option("--output", type=click.Path(), help="File; standard output where not given.")
@_option("--text-field", help="Column of the text.")
@_option("--pair-field", help="Column of the second text.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True)
@_writing
@_clean
def predict(
    load: Callable[[], Any],
    source: str,
    form: str,
    output: str | None,
    text_field: str,
    pair_field: str,
    **how: Any,
) -> None:
    """Write the answer to each text, a JSON object a line.

    That is its label and probabilities, or the text that the model writes for it (output).
    Every line of a text file gets one, a blank line too, which is an empty text; so does every
    row of the other formats, in which a blank line is an error. Nothing is written where one text
    cannot be answered.
    """
    from ept_fast.storage.files import write_bytes
    from ept_fast.training.data import DataError, Fields, parse_rows
    from ept_fast.training.job import predict as run

    if source == "-":
        data, suffix, name = sys.stdin.buffer.read(), ".txt", "standard input"
    else:
        try:
            data = Path(source).read_bytes()
        except OSError as error:
            reason = error.strerror or error
            raise DataError(f"{source}: expected a readable file, got {reason}") from None
        suffix, name = Path(source).suffix, source
    if form != "auto":
        suffix = f".{form}"
    rows = parse_rows(data, suffix, name, fields=Fields(text_field, pair_field), answer="none")
    results = run(load(), rows, **how)
    pairs = rows.pairs or (None,) * len(rows)
    lines = []
    for text, pair, result in zip(rows.texts, pairs, results, strict=True):
        second = {} if pair is None else {"text_pair": pair}
        lines.append(json.dumps({"text": text, **second, **result}, ensure_ascii=False) + "\n")
    content = "".join(lines).encode()
    if output is None:
        _say(content, nl=False)
    else:
        write_bytes(Path(output), content)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@_clean
def info(as_json: bool) -> None:
    """Print versions, devices, and which backends work here and why the others do not."""
    import torch

    from ept_fast.backends.cuda import library
    from ept_fast.ops.dispatch import describe

    found = library.state()
    backends = [{"name": n, "works": ok, "reason": reason} for n, ok, reason in describe()]
    facts: dict[str, Any] = {
        "ept_fast": ept_fast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "transformers": _installed("transformers"),
        "devices": _devices(torch),
        "backends": backends,
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
