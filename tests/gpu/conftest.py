"""What the tests on a GPU share. They also run without the packages that the other tests need."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# cuBLAS reads it when it is first used; deterministic algorithms ask for it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
import torch.utils.deterministic

from tests import interpreter
from tests.gpu.support import DEVICE, LISTING, ON_GPU

HERE = Path(__file__).resolve().parent


def pytest_configure() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        interpreter.make_faster()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE not in item.path.parents:
            continue
        # Versions of PyTorch and Triton differ in what they warn of on a GPU.
        item.add_marker(pytest.mark.filterwarnings("default"))
        if ON_GPU and not LISTING and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


# After an illegal access every call of this process fails: its tests go to another one.
_dead: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            _dead.append(str(error))


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish() -> None:
    """What failed is reported; pytest-xdist starts another worker in this one's place."""
    if _dead and "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(1)


@pytest.fixture(autouse=True)
def _memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """torch.empty filled with NaN (integers: their largest value), unless the test is marked."""
    poison = request.node.get_closest_marker("default_algorithms") is None and not LISTING
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(poison, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = poison
    yield
    torch.use_deterministic_algorithms(before, warn_only=True)


@pytest.fixture(autouse=True)
def _full_float32() -> Iterator[None]:
    """No TF32 in PyTorch's own products, which are the yardstick."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(autouse=True)
def _free_memory() -> Iterator[None]:
    yield
    if DEVICE.type == "cuda" and torch.cuda.memory_reserved() > 4 << 30:
        torch.cuda.empty_cache()


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """A backend of fused kernels; skipped with its own reason if it does not work."""
    from ept_fast.ops import dispatch

    name: str = request.param
    working = {name: (works, why) for name, works, why in dispatch.describe()}
    works, why = working[name]
    if not works:
        pytest.skip(f"{name}: {why}")
    return name


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        from ept_fast.ops import dispatch

        names = [name for name, *_ in dispatch.describe() if name not in ("eager", "reference")]
        metafunc.parametrize("backend", names, indirect=True)
