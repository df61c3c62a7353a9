"""The support matrix: which tests prove which cell, and the page that their outcomes make.

A test names the cells that it is part of by ``@pytest.mark.support(row="Llama", column="padding")``
markers, also through ``pytest.param(..., marks=...)``. One that asserts a refusal says so with
``state="refused", reason="..."``. A run with ``--support-page FILE`` writes the outcomes of its
marked tests as JSON. ``python -m tests.support`` runs them all and makes ``docs/support.md`` from
the outcomes; nothing else writes that page.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.architectures import ARCHITECTURES, FURTHER, TASKS, UNFIT

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "support.md"

PASSED, FAILED, SKIPPED, MISSING = "passed", "failed", "skipped", "missing"
SUPPORTED, REFUSED = "supported", "refused"

_DASH = "–"
_VERSIONS = "On a CPU, with "
_INTRODUCTION = """\
# Support matrix

`make support` runs every test that is marked with a cell of these tables and writes this page from
their outcomes; `tests/test_support.py` compares the page with the markers, so a change by hand
fails the suite. None of it has yet been run on a GPU.

- ✓: every test of the cell passed.
- refused: the combination is refused on purpose, and a test asserts the error.
- no: not supported, for the reason given below.
- –: there is no such model, or no test of it.
"""
_TESTS_OF_NEWEST = (
    "`make test-newest` runs the tests of what these libraries do with the newest versions that "
    "the package admits, those of PEFT, TRL, lm-eval and pipelines among them. It last passed "
    "with "
)
_NEWEST = {
    "transformers": "5.24.0",
    "peft": "0.21.2",
    "trl": "1.16.0",
    "triton": "3.9.0",
    "numpy": "2.4.6",
}
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "trl", "lm_eval")


@dataclass(frozen=True)
class Table:
    """The rows and columns that a marker may name, each with what it stands for."""

    title: str
    head: str
    text: str
    rows: dict[str, str]
    columns: dict[str, str]
    tell_rows: bool = False


_TASK_COLUMNS = {
    "SEQ_CLS": "one label for a row, by a bare backbone or by the library's classifier",
    "TOKEN_CLS": "one label for a token",
    "CAUSAL_LM": "logits of the next token, and the loss",
    "SEQ_2_SEQ_LM": "an encoder-decoder with the prompt on the encoder",
    "FEATURE_EXTRACTION": "the last hidden states",
}
_INVARIANCES = {
    "padding": "the logits of the real tokens are the same for every side and amount of padding",
    "batch": "and whatever other rows are in the batch",
    "folding": "and after `fold()`",
    "backends": "and with each backend that serves the call",
    "PEFT": "a prompt without offset and subspaces gives the logits of PEFT's prompt tuning with "
    "the same rows",
    "loss": "the loss and its gradients, of a padded batch, are those of the definition",
    "generation": "`generate` gives what recomputing the whole sequence without a cache gives",
    "prefix_cache": "the prompt's keys and values, computed once, give the same logits and tokens",
}
_MODES = {
    "float32": "a training step's gradients are those of the definition",
    "bfloat16": "a backbone in bfloat16, the prompt in float32",
    "float16 autocast": "a backbone in float32 under autocast, with a gradient scaler",
    "gradient accumulation": "two half batches give the gradients of the whole one",
    "checkpointing, reentrant": "the gradients are those without it",
    "checkpointing, not reentrant": "the gradients are those without it",
    "torch.compile": "prompt and model in one graph (`fullgraph=True`)",
    "Trainer": "the Trainer of transformers trains, evaluates, saves and resumes",
    "accelerate": "`Accelerator.prepare` and its loop",
    "DDP": "two processes over gloo: the gradients are those of one process",
    "FSDP2": "two processes over gloo, the backbone sharded by `fully_shard`",
    "NF4": "a backbone in 4 bits by bitsandbytes, on its CPU kernels",
    "DeepSpeed ZeRO-3": "",
}
_USES = {
    "LoRA": "PEFT's, under a prompt: both are trained, generate, save and load",
    "pipelines": "of transformers, with the adapter's labels",
    "torch.export": "of a folded model, for any number of rows and any length",
    "ONNX": "of a folded model, run by onnxruntime",
    "PEFT": "`get_peft_model` with an `EPTPeftConfig`: logits, loss, gradients and tokens are "
    "those of an `EPTModel`, and what is saved loads",
    "PEFT, Trainer": "such a model trains, saves and resumes, with the Seq2SeqTrainer too",
    "PEFT, TRL": "in TRL's SFTTrainer, DPOTrainer and GRPOTrainer",
    "PEFT, accelerate launch": "two processes give the values of one",
    "PEFT, lm-eval": "log-likelihoods and texts of a local task are those of direct calls",
    "PEFT, pipelines": "of transformers, with the adapter's labels",
}

# What was reproduced of each system, on what, and what could not be; docs/methods.md,
# docs/vision.md, docs/clip.md and docs/search.md have the details and the results.
_SYSTEMS = {
    "EPT": "the paper has no code, and no equation of it could be read: the four parts in their "
    "order, with sizes of ours. Run on few-shot and full text classification with MiniLM "
    "(`python -m bench.accuracy`); not on GLUE with T5, the paper's setting",
    "LAMP": "from the abstract and the first page: both forms of the outer product are ours. Run "
    "on few-shot text classification with MiniLM (`python -m bench.accuracy`); none of the paper's "
    "results",
    "PRE": "the encoder and the sum, exact by its code, before any model and in its CLIP form. Run "
    "on text in the place of images with MiniLM (`python -m bench.clip`) and as a method of its "
    "own; none of its 11 image data sets, which are not here",
    "IPT": "the table and two of its three generators, exact by its code but for padding, which is "
    "left out. Run on few-shot trec with MiniLM (`python -m bench.reading`); pretrained tables and "
    "RoBERTa-large were not",
    "InfoPrompt": "the generator and the three losses in their intended form, not the release's "
    "with its faults; its latent head is an auxiliary one. Run on few-shot trec and sst2 with "
    "MiniLM (`python -m bench.reading`); no table of the paper could be read",
    "MP2": "router, noise and factored modules, exact by its code; two stages. Run on few-shot "
    "trec with MiniLM (`python -m bench.accuracy`), and from several data sets by tests; not its "
    "38 Chinese tasks, nor the black-box form",
    "StablePT": "the block and the contrastive loss, exact by its code but for sizes; the "
    "prediction is ours, as the release's cannot depend on the prompt. Spread over templates and "
    "draws on few-shot sst2 with MiniLM (`python -m bench.reading stability`); not its data",
    "SPT": "prompts from prototypes of the states, exact by its code; k-means by scikit-learn. Run "
    "on digits with a small transformer, and on texts (docs/vision.md); no image data sets",
    "LASP": "the text-to-text loss, exact by its code; grouped prompts from the abstract. Run on "
    "text in the place of images with MiniLM, base classes to new ones (`python -m bench.clip`); "
    "CLIP only with random weights",
    "RLPrompt": "policy, reward and both losses, exact by its code, with a known optimum on a toy. "
    "Run on few-shot sst2 and trec with MiniLM against random search (`python -m bench.search`); "
    "RoBERTa-large and distilGPT-2 could not be had",
    "BATprompt": "rounds of attack and defence with perturbers of rules in the place of a language "
    "model, which a caller may give; ranked by the model's loss, which the release never looks at. "
    "Run on few-shot sst2 and trec with MiniLM (`python -m bench.search`)",
}
_EVIDENCE = {
    "definition": "values are those of a definition written out slowly, in float64",
    "gradients": "as finite differences have them, in float64",
    "learning": "it learns, or finds, what it is meant for, on a toy",
}

TABLES = {
    "models": Table(
        title="Models",
        head="architecture",
        text="Tiny random models of each architecture, in float64 unless the test says otherwise.",
        rows=dict.fromkeys(
            [a.name for a in ARCHITECTURES]
            + ["MiniLM, pretrained"]
            + [a.name for a in (*FURTHER, *UNFIT)],
            "",
        ),
        columns=_TASK_COLUMNS | _INVARIANCES,
    ),
    "training": Table(
        title="Training",
        head="mode",
        text="Each cell trains a tiny random model of the task on a CPU.",
        rows=_MODES,
        columns=dict.fromkeys(TASKS, ""),
        tell_rows=True,
    ),
    "uses": Table(
        title="With other libraries",
        head="use",
        text="Tiny models of the task on a CPU. What has no mark was not tried.",
        rows=_USES,
        columns=dict.fromkeys(TASKS, ""),
        tell_rows=True,
    ),
    "systems": Table(
        title="Published systems",
        head="system",
        text="What this package has of each, by tests; nothing was run on a GPU or with a large "
        "model.",
        rows=_SYSTEMS,
        columns=_EVIDENCE,
        tell_rows=True,
    ),
}

# Rows of cells that have no test, and why they are not supported.
NOT_SUPPORTED = {
    "DeepSpeed ZeRO-3": "DeepSpeed gathers a parameter that it has spread over processes for the "
    "forward of the module that owns it; the prompt reads the embedding table, starts from it and "
    "is saved outside of that. Such tensors are refused with an error. FSDP2 does the same job. "
    "ZeRO-1 and ZeRO-2 leave parameters whole; nothing was run with DeepSpeed.",
}
# What holds of models that are in no table.
LIMITS = (
    "ConvBERT, MobileBERT, Funnel and Nyströmformer run, but without a prompt too their "
    "convolutions, pooling or landmarks read the padding: give them rows of one length.",
    "XLNet's own head for sequences reads the last column, so a linear head takes its place "
    '(`pooling="last"`).',
    "The decoder of an encoder-decoder has no prompt.",
)


@dataclass(frozen=True)
class Cell:
    """A cell of one of the tables, as a marker names it."""

    row: str
    column: str
    state: str = SUPPORTED
    reason: str = ""

    def __post_init__(self) -> None:
        table = next((t for t in TABLES.values() if self.row in t.rows), None)
        if table is None:
            known = [row for t in TABLES.values() for row in t.rows]
            raise ValueError(f"row: expected one of {', '.join(known)}, got {self.row!r}")
        if self.column not in table.columns:
            raise ValueError(
                f"column: expected one of {', '.join(table.columns)} for the row {self.row!r}, "
                f"got {self.column!r}"
            )
        if self.state not in (SUPPORTED, REFUSED):
            raise ValueError(f"state: expected {SUPPORTED} or {REFUSED}, got {self.state!r}")
        if bool(self.reason) != (self.state == REFUSED):
            raise ValueError(
                f"reason: expected one for a refused cell and none for another, got {self.reason!r}"
            )


@dataclass(frozen=True)
class Evidence:
    """A marked test: its cells and how it ended, ``MISSING`` if it was not run."""

    cells: tuple[Cell, ...]
    outcome: str = MISSING


def marks(row: str, *columns: str) -> list[pytest.MarkDecorator]:
    """The markers of a test that is part of several cells of a row."""
    return [pytest.mark.support(row=row, column=column) for column in columns]


def add_option(parser: pytest.Parser) -> None:
    """``--support-page FILE``."""
    parser.addoption(
        "--support-page",
        metavar="FILE",
        type=Path,
        help="write the outcomes of the tests marked `support` to FILE, as JSON",
    )


def register(config: pytest.Config) -> None:
    """Record this run if it was asked for; of several processes only the one that reports."""
    path = config.getoption("--support-page")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(path), "support-recorder")


def note_cells(items: Iterable[pytest.Item]) -> None:
    """Put each test's cells where its reports carry them, also from one process to another.

    Raises:
        pytest.UsageError: a marker that names no cell.
    """
    for item in items:
        for mark in item.iter_markers("support"):
            try:
                cell = Cell(*mark.args, **mark.kwargs)
            except (TypeError, ValueError) as error:
                raise pytest.UsageError(f"{item.nodeid}: mark support: {error}") from None
            item.user_properties.append(("support", astuple(cell)))


class Recorder:
    """Collects the marked tests and how they end, and writes them when the run is over."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Evidence] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            cells = _cells_of(item.user_properties)
            if cells:
                self.found[item.nodeid] = Evidence(cells)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        cells = _cells_of(report.user_properties)
        if not cells:
            return
        before = self.found.get(report.nodeid, Evidence(cells)).outcome
        # Of setup, call and teardown the worst; setup passes before a call that is skipped.
        order = (MISSING, PASSED, SKIPPED, FAILED)
        outcome = max(before, report.outcome, key=order.index)
        self.found[report.nodeid] = Evidence(cells, outcome)

    def pytest_sessionfinish(self) -> None:
        tests = {name: asdict(test) for name, test in self.found.items()}
        self.path.write_text(json.dumps({"tests": tests, "versions": versions()}, indent=1))


def _cells_of(properties: Iterable[tuple[str, Any]]) -> tuple[Cell, ...]:
    return tuple(Cell(*values) for name, values in properties if name == "support")


def versions() -> dict[str, str]:
    """Of Python and of the libraries that the matrix is about, without local suffixes."""
    found = {"Python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class Incomplete(RuntimeError):
    """A run that does not say enough to write the page."""


def run(
    *arguments: str, folder: Path = ROOT / "tests"
) -> tuple[dict[str, Evidence], dict[str, str]]:
    """Run the marked tests, or only collect them: what was recorded, and the versions.

    Raises:
        Incomplete: pytest did not come to its end.
    """
    # Markers are written by these words only; a file left out would leave a row without a cell.
    words = ("support", "cells(")
    files = [p for p in sorted(folder.glob("test_*.py")) if any(w in p.read_text() for w in words)]
    with tempfile.TemporaryDirectory() as scratch:
        record = Path(scratch) / "support.json"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "support"]
        command += ["--support-page", str(record), *arguments, *map(str, files)]
        captured = subprocess.PIPE if "--collect-only" in arguments else None
        done = subprocess.run(command, cwd=ROOT, stdout=captured, stderr=captured, text=True)
        # 1: some tests failed, which the page then says.
        if done.returncode > 1 or not record.is_file():
            said = ((done.stdout or "") + (done.stderr or ""))[-2000:]
            raise Incomplete(f"pytest: expected exit status 0 or 1, got {done.returncode} {said}")
        values = json.loads(record.read_text())
    tests = {
        name: Evidence(tuple(Cell(**cell) for cell in test["cells"]), test["outcome"])
        for name, test in values["tests"].items()
    }
    return tests, values["versions"]


def collected() -> dict[str, Evidence]:
    """The marked tests of the suite by their names, none of them run."""
    return run("--collect-only", "-p", "no:xdist")[0]


def _state(tests: Sequence[Evidence], cell: tuple[str, str]) -> str:
    """What a cell of the page says, its footnote apart."""
    mine = [test for test in tests if any((c.row, c.column) == cell for c in test.cells)]
    states = {c.state for test in mine for c in test.cells if (c.row, c.column) == cell}
    if len(states) > 1:
        raise ValueError(f"{cell}: expected tests that all support it or all refuse it, got both")
    if not mine:
        return _DASH
    for outcome, text in ((FAILED, "**fails**"), (MISSING, "not run"), (SKIPPED, "not run")):
        if any(test.outcome == outcome for test in mine):
            return text
    return "refused" if states == {REFUSED} else "✓"


def render(found: Mapping[str, Evidence], made_with: Mapping[str, str]) -> str:
    """The page that these outcomes make."""
    tests = list(found.values())
    reasons = {(c.row, c.column): c.reason for t in tests for c in t.cells if c.reason}
    notes: list[str] = []

    def text(row: str, column: str) -> str:
        state, reason = _state(tests, (row, column)), reasons.get((row, column))
        if state == _DASH and row in NOT_SUPPORTED:
            state, reason = "no", NOT_SUPPORTED[row]
        if reason is None:
            return state
        if reason not in notes:
            notes.append(reason)
        return f"{state} ({notes.index(reason) + 1})"

    lines = [_INTRODUCTION]
    for table in TABLES.values():
        lines += [f"## {table.title}", "", table.text, ""]
        lines += [f"| {table.head} | {' | '.join(table.columns)} |"]
        lines += ["|---" + "|:---:" * len(table.columns) + "|"]
        for row in table.rows:
            lines += [f"| {row} | {' | '.join(text(row, column) for column in table.columns)} |"]
        lines += [""]
        told = {**table.rows, **table.columns} if table.tell_rows else table.columns
        lines += [f"- {name}: {meaning}." for name, meaning in told.items() if meaning]
        lines += [""]
    if notes:
        lines += ["## Reasons", ""]
        lines += [f"{number}. {note}" for number, note in enumerate(notes, 1)]
        lines += [""]
    lines += ["## Limits", "", *(f"- {limit}" for limit in LIMITS), ""]
    files = sorted({name.partition("::")[0] for name in found})
    lines += ["## Made with", "", f"{_VERSIONS}{', '.join(map(' '.join, made_with.items()))}.", ""]
    lines += [f"The tests are in {', '.join(f'`{file}`' for file in files)}.", ""]
    lines += [
        "## Newest versions",
        "",
        f"{_TESTS_OF_NEWEST}{', '.join(map(' '.join, _NEWEST.items()))}.",
    ]
    return "\n".join(lines) + "\n"


def versions_of(page: str) -> dict[str, str]:
    """The versions that a page says it was made with."""
    line = next(line for line in page.splitlines() if line.startswith(_VERSIONS))
    pairs = line.removeprefix(_VERSIONS).removesuffix(".").split(", ")
    return {name: version for name, _, version in (pair.rpartition(" ") for pair in pairs)}


def write_page(
    expected: Mapping[str, Evidence],
    found: Mapping[str, Evidence],
    made_with: Mapping[str, str],
    page: Path = PAGE,
) -> list[str]:
    """Write the page and return the names of the tests that did not pass.

    Raises:
        Incomplete: a marked test has no outcome; the page then stays as it was.
    """
    missing = sorted(n for n in expected if n not in found or found[n].outcome == MISSING)
    if missing:
        raise Incomplete(f"the run: expected every marked test, got none of {', '.join(missing)}")
    replacement = page.with_suffix(".new")
    replacement.write_text(render(found, made_with), encoding="utf-8")
    replacement.replace(page)
    return sorted(name for name, test in found.items() if test.outcome != PASSED)


def main() -> None:
    """Run the marked tests and write the page."""
    parser = argparse.ArgumentParser(prog="python -m tests.support", description=main.__doc__)
    parser.add_argument("--workers", type=int, default=2, help="processes that run the tests")
    workers = str(parser.parse_args().workers)
    found, made_with = run("--numprocesses", workers, "--dist", "loadfile")
    red = write_page(collected(), found, made_with)
    if red:
        sys.exit(f"{PAGE.relative_to(ROOT)}: written, with tests that did not pass: {red}")


if __name__ == "__main__":
    main()
