"""``pytest bench/``: options, the run, its order, and what it leaves at the end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# Before anything imports a library that reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

from bench import plots, rows
from bench.environment import origin_of, slug
from bench.run import Run, Settings


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ept-fast benchmarks")
    group.addoption("--quick", action="store_true", help="tiny sizes: a smoke test")
    group.addoption("--out", type=Path, help="folder for CSV and plots (bench/results/<device>)")
    group.addoption(
        "--device",
        choices=("cuda", "cpu"),
        help="where to measure (cuda if there is one); with --collect-only, cuda lists on any "
        "machine what a GPU would measure",
    )
    group.addoption("--row-seconds", type=float, help="about how long one row is measured")
    group.addoption("--seconds", type=float, help="start no row after that many seconds")
    group.addoption("--no-compiled", action="store_true", help="leave torch.compile out")


def _device(config: pytest.Config) -> torch.device:
    return torch.device(
        config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
    )


def pytest_configure(config: pytest.Config) -> None:
    device = _device(config)
    listing = config.getoption("collectonly")
    if device.type == "cuda" and not torch.cuda.is_available() and not listing:
        raise pytest.UsageError("--device: expected cpu on a machine without a CUDA device")
    torch.set_float32_matmul_precision("highest")
    quick = config.getoption("--quick")
    folder = config.getoption("--out")
    if folder is None:
        # The smoke test's figures mean nothing, so they do not take the place of measured ones.
        name = "quick" if quick or listing else slug(origin_of(device)["device"])
        folder = rows.RESULTS / name
    seconds = config.getoption("--row-seconds") or (0.5 if device.type == "cuda" else 2.5)
    settings = Settings(
        quick=quick,
        seconds=0 if quick else seconds,
        total=config.getoption("--seconds"),
        compiled=not config.getoption("--no-compiled"),
        folder=folder,
    )
    config.stash[_RUN] = Run(device, settings)


_RUN = pytest.StashKey[Run]()


@pytest.fixture(scope="session")
def run(pytestconfig: pytest.Config) -> Run:
    """What the rows of this run share."""
    return pytestconfig.stash[_RUN]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A suite's module lists its rows in ``cases(run)``."""
    if "case" in metafunc.fixturenames:
        cases = metafunc.module.cases(metafunc.config.stash[_RUN])
        metafunc.parametrize("case", cases, ids=[case.id for case in cases])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The most wanted rows first: the time may not be enough for the last."""
    suites = {f"test_{suite}.py": i for i, suite in enumerate(rows.SUITES)}
    on_gpu = config.stash[_RUN].on_gpu

    def worth(item: pytest.Item) -> tuple[int, int]:
        case = item.callspec.params["case"]  # type: ignore[attr-defined]
        return _tier(case) if on_gpu else 0, suites.get(item.path.name, len(suites))

    items.sort(key=worth)


_GOALS = ("t5-base", "llama-8b")
_LARGE = ("long", "tasks-64")


def _tier(case: Any) -> int:
    """On a GPU time is short: first the named goals' rows, then those of large sizes, the rest.

    What takes a minute to compile comes after what is there at once.
    """
    if "float32" in case.id:
        return 3
    shape = getattr(case, "shape", None)
    if shape is None:
        return 2
    name = shape.name.partition(",")[0]
    if name in _GOALS:
        return int("max-autotune" in case.id)
    return 1 if name in _LARGE else 2


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Draw the plots and say where the files are."""
    run = config.stash[_RUN]
    if not run.book.rows:
        return
    try:
        plots.draw(run.settings.folder)
    except ImportError as error:
        terminalreporter.write_line(f"no plots: {error}")
    terminalreporter.write_line(f"{len(run.book.rows)} rows in {run.settings.folder}")
