"""The benchmarks' own checks: what is wrong is not timed, and what is timed is what is said."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import parity, peers, suites
from bench.environment import slug
from bench.inputs import Inputs, make_inputs
from bench.rows import read
from bench.run import Case, Run, Settings, floor_bytes
from bench.shapes import MANY_TASKS, NAMED, QUICK, UNPADDED, Shape, sweeps
from bench.timing import Clock, Work, median_interval

CPU = torch.device("cpu")
CASE = Case("splice", "splice", "forward", QUICK[0], "float32", "reference")
# PEFT asks a model of transformers for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


class Benchmark:
    """What the suites use of pytest-benchmark's fixture (which is off in several processes)."""

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.group = ""
        self.extra_info: dict[str, Any] = {}
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[]))

    def pedantic(
        self,
        target: Callable[..., Any],
        *,
        setup: Callable[[], Any],
        teardown: Callable[..., Any],
        rounds: int,
    ) -> None:
        """Run the rounds and keep their times."""
        for _ in range(rounds):
            args, options = setup()
            begin = time.perf_counter()
            target(*args, **options)
            self.stats.stats.data.append(time.perf_counter() - begin)
            teardown(*args, **options)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """A quick run without torch.compile."""
    yield Run(CPU, Settings(True, 0, None, False, tmp_path))
    torch.compiler.reset()


def test_every_operation_leaves_rows(run: Run) -> None:
    wanted = [
        *suites.operation_cases(run, "prompt path", ("both",)),
        *suites.operation_cases(run, "splice", ("forward", "backward"))[:2],
        *suites.operation_cases(run, "reconstruct", ("forward", "backward"))[:2],
    ]
    for case in wanted:
        run.operation_row(case, Benchmark())
    rows = [row for row in read(run.settings.folder) if row.suite != "floor"]
    assert sorted((r.operation, r.direction, r.shape, r.peer) for r in rows) == sorted(
        (c.operation, c.direction, c.shape.name, c.peer) for c in wanted
    )
    assert {row.peer for row in rows} == {"eager", "reference", "dept", "peft-100"}
    for row in rows:
        assert 0 <= row.error <= 1
        assert 0 < row.p20_ms <= row.p80_ms
        assert all((row.peak_mb, row.commit, row.torch, row.device))


@pytest.mark.parametrize(
    ("operation", "shape"),
    [("prompt path", QUICK[0]), ("splice", QUICK[1]), ("reconstruct", QUICK[1])],
    ids=["path", "splice", "reconstruct"],
)
def test_a_wrong_peer_is_not_timed(
    run: Run, operation: str, shape: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = peers.operation_of

    def wrong(operation: str, backend: str) -> peers.Forward:
        forward = right(operation, backend)
        if backend == peers.REFERENCE:
            return forward

        def off(inputs: Inputs) -> Tensor:
            changed = {**inputs.parameters, "offset_b": inputs.parameters["offset_b"] * 1.001}
            return forward(replace(inputs, parameters=changed))

        return off

    monkeypatch.setattr(peers, "operation_of", wrong)
    case = Case("splice", operation, "forward", shape, "float32", "reference")
    with pytest.raises(pytest.fail.Exception, match="parity: eager is not timed"):
        run.operation_row(case, Benchmark())
    assert not [row for row in run.book.rows if row.suite != "floor"]


@pytest.mark.parametrize("name", ["dept", "peft-100"])
def test_another_way_is_checked_too(name: str) -> None:
    (inputs,) = make_inputs(QUICK[0], torch.float32, CPU, 1)
    peer = peers.make("prompt path", name, inputs)
    expected = parity.expected_of(peer, inputs)
    assert parity.check(peer, inputs, expected)[0] <= 1
    wrong = replace(peer, forward=lambda inputs: peer.forward(inputs) * 1.0001)
    assert parity.check(wrong, inputs, expected)[0] > 10
    if name == "dept":  # it pads every row to the whole offset
        rows = QUICK[0].num_virtual_tokens + QUICK[0].max_length
        assert peer.forward(inputs).shape[1] == rows


@pytest.mark.parametrize(
    "wrong",
    [lambda t: torch.full_like(t, float("nan")), lambda t: t[:, :-1], lambda t: t + 1e-3],
    ids=["not a number", "another shape", "an offset"],
)
def test_a_wrong_output_is_named(wrong: Callable[[Tensor], Tensor]) -> None:
    value = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    expected = parity.Expected({"a": value.double(), "b": value.double()}, {"a": value, "b": value})
    assert parity.compare(expected.plain, expected) == (0.0, "")
    error, name = parity.compare({"a": value, "b": wrong(value)}, expected)
    assert not error <= 1
    assert name == "b"


def test_a_zero_has_to_be_zero() -> None:
    zero, one = {"output": torch.zeros(2)}, {"output": torch.full((2,), 1e-30)}
    expected = parity.Expected({"output": torch.zeros(2, dtype=torch.float64)}, zero)
    assert parity.compare(zero, expected) == (0.0, "")
    assert parity.compare(one, expected)[0] == float("inf")


def test_a_pair_times_the_peer_and_the_ratio_is_ours_by_its() -> None:
    """What is prepared is not timed."""

    def work(seconds: float) -> Work:
        return Work(lambda i: time.sleep(0.05), lambda state: time.sleep(seconds))

    timing = Clock(CPU, 0.2, 5, 9).pair(work(0.002), work(0.008), Benchmark())
    assert timing is not None
    assert 8 <= timing.p50_ms < 50
    assert 0.1 < timing.ratio_low <= timing.ratio <= timing.ratio_high < 0.8
    assert 5 <= timing.rounds <= 9


def test_where_pytest_benchmark_is_off_nothing_is_recorded(run: Run) -> None:
    assert run.operation_row(CASE, Benchmark(enabled=False)) is None
    assert not [row for row in run.book.rows if row.suite != "floor"]


def test_peak_memory_is_what_is_held_at_once() -> None:
    def call(size: int) -> Tensor:
        first = torch.empty(size, dtype=torch.uint8)
        second = torch.empty(size, dtype=torch.uint8)
        del first
        third = torch.empty(size // 2, dtype=torch.uint8)
        return torch.stack([second[0], third[0]])

    peak = Clock(CPU, 0, 3, 3).peak_mb(Work(lambda i: 1_000_000, call))
    assert peak == pytest.approx(2.0, abs=0.01)


def test_the_interval_of_a_median() -> None:
    assert median_interval([1.0, 2.0, 9.0]) == (2.0, 1.0, 9.0)
    middle, low, high = median_interval([float(i) for i in range(100)])
    assert (middle, low, high) == (49.5, 40.0, 59.0)


def test_what_has_to_be_moved() -> None:
    """Outputs and used rows once; of a bank only the parameters of tasks that a row has."""
    shape = replace(QUICK[1], batch=3, tasks=5)
    (inputs,) = make_inputs(shape, torch.bfloat16, CPU, 1)
    inputs = replace(
        inputs,
        task_ids=torch.tensor([1, 1, 3]),
        input_ids=torch.arange(27).reshape(3, 9) % 7,
    )
    s = shape
    out = s.batch * (s.num_virtual_tokens + s.length) * s.hidden_size * 2
    task = 4 * (s.num_virtual_tokens * s.hidden_size + s.rank * (s.max_length + s.hidden_size))
    ids = 27 * 8 + 3 * 8
    rows = 7 * s.hidden_size * 2
    assert floor_bytes("splice", "forward", s, inputs) == out + rows + ids + 2 * task
    assert floor_bytes("splice", "backward", s, inputs) == out + 2 * task + 5 * task


class Gpu:
    """A GPU's clock in miniature: what is enqueued takes its time when the device gets to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.slept: list[int] = []
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = gpu.now

            def elapsed_time(self, other: Any) -> float:
                return float(other.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(torch.cuda, "_sleep", self.slept.append)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
        counts = iter([100, 2_000_100])
        names = ("requested_bytes.all.current", "requested_bytes.all.peak")
        monkeypatch.setattr(
            torch.cuda, "memory_stats", lambda device: dict.fromkeys(names, next(counts))
        )

    def work(self, milliseconds: float) -> Work:
        """Work that the device takes so long for."""

        def call(state: int) -> None:
            self.now += milliseconds

        return Work(lambda i: i, call)


def test_on_a_gpu_times_are_the_devices_own(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    timer = Clock(CPU, 0.01, 4, 6)
    timer.on_gpu = True
    timer._buffer = torch.ones(4)
    timing = timer.pair(gpu.work(2.0), gpu.work(5.0), Benchmark())
    assert timing is not None
    assert (timing.p20_ms, timing.p50_ms, timing.p80_ms) == (5.0, 5.0, 5.0)
    assert timing.ratio == timing.ratio_low == timing.ratio_high == 0.4
    assert timing.peak_mb == 2.0
    assert timing.launches == 0
    assert timing.host_ms is not None
    assert timing.host_ms < 1
    assert timing.elapsed_ms < 1
    # A sleep before each timed call, longer than the host needs.
    assert len(gpu.slept) == 2 + 2 * timing.rounds
    assert min(gpu.slept) >= 1e5


def test_rows_stop_when_the_time_is_over(tmp_path: Path) -> None:
    late = Run(CPU, Settings(True, 0, 1e-9, False, tmp_path))
    with pytest.raises(pytest.skip.Exception, match="time of the run is over"):
        late.operation_row(CASE, Benchmark())


def test_names_of_rows_are_unique() -> None:
    names = [shape.name for shape in (*NAMED, *MANY_TASKS, *UNPADDED, *sweeps(False))]
    assert len(set(names)) == len(names)
    assert {"t5-base", "t5-large", "llama-1b", "llama-8b", "long"} <= set(names)
    on_gpu = [shape.name for shape in sweeps(True)]
    assert len(set(on_gpu)) == len(on_gpu)


@pytest.mark.parametrize("shape", [*NAMED, *MANY_TASKS, *UNPADDED], ids=lambda shape: shape.name)
def test_named_rows_are_padded_on_the_right(shape: Shape) -> None:
    """By half of the length at most; a batch of several is as long as its longest row."""
    small = replace(shape, hidden_size=1, rank=1, vocabulary=8, tasks=min(shape.tasks, 1))
    (inputs,) = make_inputs(small, torch.float32, CPU, 1)
    mask = inputs.attention_mask
    assert (mask is None) == (shape in UNPADDED)
    if mask is not None:
        lengths = mask.sum(1)
        assert mask.equal((torch.arange(shape.length) < lengths[:, None]).long())
        assert shape.length // 2 == shape.shortest <= lengths.min() < shape.length
        assert shape.batch == 1 or lengths.max() == shape.length


@pytest.mark.parametrize(
    ("device", "folder"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("Intel(R) Xeon(R) CPU E5-2690 v4 @ 2.60GHz, 8 cores", "intel-xeon-e5-2690-v4-8-cores"),
    ],
)
def test_a_devices_folder(device: str, folder: str) -> None:
    assert slug(device) == folder
