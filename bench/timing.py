"""Time, memory and launches of two pieces of work, in pairs.

On a CPU a round times our work and then the peer's by the host's clock. On a GPU both are timed by
events: the second-level cache is cold (other inputs each round, and a buffer of several times its
size is read in between), and the device sleeps until the host has enqueued the call, so that no
launch waits for Python. Results and states are let go between the two, outside of what is timed.
"""

from __future__ import annotations

import functools
import gc
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_ON_THE_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_CACHE_READS = 4  # times the second-level cache that is read between two rounds


@dataclass(frozen=True)
class Work:
    """``call(prepare(i))`` in round i; only ``call`` is timed."""

    prepare: Callable[[int], Any]
    call: Callable[[Any], Any]


@dataclass(frozen=True)
class Timing:
    """Of the peer: milliseconds, megabytes, launches. Ratios: our time by the peer's."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    host_ms: float | None
    elapsed_ms: float
    peak_mb: float
    launches: int | None
    rounds: int
    ratio: float
    ratio_low: float
    ratio_high: float


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile, each one of the values."""
    ordered = sorted(values)
    p20, p50, p80 = (ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.5, 0.8))
    return p20, p50, p80


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The median and its 95% interval from the order of the values, whatever they are spread by."""
    ordered = sorted(values)
    n = len(ordered)
    cut = max(0, math.floor(n / 2 - 0.98 * math.sqrt(n)))
    return statistics.median(ordered), ordered[cut], ordered[n - 1 - cut]


@contextmanager
def no_collection() -> Any:
    """Python collects no garbage within."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Clock:
    """Measures on one device.

    Args:
        device: where the work is done.
        seconds: about how long the pairs of one row may take.
        fewest, most: bounds on their number.
    """

    def __init__(self, device: torch.device, seconds: float, fewest: int, most: int) -> None:
        self.device, self.seconds, self.fewest, self.most = device, seconds, fewest, most
        self.on_gpu = device.type == "cuda"

    @functools.cached_property
    def _buffer(self) -> torch.Tensor:
        """Read between two rounds, so that nothing else is left in the second-level cache."""
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        return torch.ones(_CACHE_READS * cache // 4, device=self.device)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def pair(self, ours: Work, peer: Work, benchmark: Any) -> Timing | None:
        """Measure a peer beside our work.

        Args:
            benchmark: pytest-benchmark's fixture; its figures are the peer's elapsed times. If
                it is disabled, both run once and there is no timing.
        """
        for work in (ours, peer):
            for i in range(2):
                work.call(work.prepare(i))
        if not benchmark.enabled:
            return None
        with no_collection():
            if self.on_gpu:
                return self._on_gpu(ours, peer, benchmark)
            return self._on_cpu(ours, peer, benchmark)

    def rounds(self, seconds_of_a_pair: float) -> int:
        """How many pairs the time allows."""
        return max(self.fewest, min(self.most, int(self.seconds / max(seconds_of_a_pair, 1e-9))))

    def _on_cpu(self, ours: Work, peer: Work, benchmark: Any) -> Timing:
        begin = time.perf_counter()
        for work in (ours, peer):
            work.call(work.prepare(0))
        rounds = self.rounds(time.perf_counter() - begin)
        own: list[float] = []
        results: list[Any] = []

        def setup() -> tuple[tuple[list[Any]], dict[str, Any]]:
            results.clear()
            state = ours.prepare(len(own))
            begin = time.perf_counter()
            results.append(ours.call(state))
            own.append(time.perf_counter() - begin)
            results.clear()
            del state
            return ([peer.prepare(len(own))],), {}

        def target(state: list[Any]) -> None:
            results.append(peer.call(state[0]))

        def teardown(state: list[Any]) -> None:
            state.clear()

        benchmark.pedantic(target, setup=setup, teardown=teardown, rounds=rounds)
        results.clear()
        times = [1e3 * seconds for seconds in benchmark.stats.stats.data]
        return self._timing([1e3 * t for t in own], times, peak_mb=self.peak_mb(peer))

    def _timing(self, own: Sequence[float], times: Sequence[float], **others: Any) -> Timing:
        """Of milliseconds in pairs; the time is the elapsed one if that is not among the others."""
        p20, p50, p80 = quantiles(times)
        ratio, low, high = median_interval([a / b for a, b in zip(own, times, strict=True)])
        others = {"host_ms": None, "elapsed_ms": p50, "launches": None, **others}
        return Timing(
            p20, p50, p80, rounds=len(times), ratio=ratio, ratio_low=low, ratio_high=high, **others
        )

    def _on_gpu(self, ours: Work, peer: Work, benchmark: Any) -> Timing:
        figures = {"peak_mb": self.peak_mb(peer), "launches": len(self.launches(peer))}
        our_host, host = (self.host_seconds(work) for work in (ours, peer))

        def both(i: int) -> tuple[float, float]:
            return self._device_ms(ours, i, our_host), self._device_ms(peer, i, host)

        begin = time.perf_counter()
        both(0)
        rounds = self.rounds(time.perf_counter() - begin)
        own, times = zip(*(both(i) for i in range(rounds)), strict=True)
        number = iter(range(1 << 30))

        def setup() -> tuple[tuple[list[Any]], dict[str, Any]]:
            state = peer.prepare(next(number))
            self.synchronize()
            return ([state],), {}

        def target(state: list[Any]) -> None:
            result = peer.call(state[0])
            self.synchronize()
            del result

        def teardown(state: list[Any]) -> None:
            state.clear()

        benchmark.pedantic(target, setup=setup, teardown=teardown, rounds=min(rounds, 10))
        figures["elapsed_ms"] = 1e3 * statistics.median(benchmark.stats.stats.data)
        return self._timing(own, times, host_ms=1e3 * host, **figures)

    def host_seconds(self, work: Work) -> float:
        """Median until the call returns, with an idle device."""
        seconds = []
        for i in range(7):
            state = work.prepare(i)
            self.synchronize()
            begin = time.perf_counter()
            result = work.call(state)
            seconds.append(time.perf_counter() - begin)
            self.synchronize()
            del result, state
        return statistics.median(seconds)

    def _device_ms(self, work: Work, i: int, host: float) -> float:
        state = work.prepare(i)
        self._buffer.sum()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # At 2 GHz: longer than the host takes to enqueue the call.
        torch.cuda._sleep(int((host * 1.5 + 5e-5) * 2e9))
        start.record()
        result = work.call(state)
        end.record()
        self.synchronize()
        del result, state
        return float(start.elapsed_time(end))

    def alone_ms(self, work: Work, rounds: int) -> list[float]:
        """Times of one piece of work by itself."""
        for i in range(3):
            work.call(work.prepare(i))
        if self.on_gpu:
            host = self.host_seconds(work)
            return [self._device_ms(work, i, host) for i in range(rounds)]
        times = []
        for i in range(rounds):
            state = work.prepare(i)
            begin = time.perf_counter()
            result = work.call(state)
            times.append(1e3 * (time.perf_counter() - begin))
            del result, state
        return times

    def peak_mb(self, work: Work) -> float:
        """Most memory that one call has allocated at once, in 10⁶ bytes."""
        state = work.prepare(0)
        if self.on_gpu:
            self.synchronize()
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_stats(self.device)["requested_bytes.all.current"]
            result = work.call(state)
            self.synchronize()
            peak = torch.cuda.memory_stats(self.device)["requested_bytes.all.peak"] - before
            del result
            return peak / 1e6
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
            result = work.call(state)
        del result
        held = peak = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        return peak / 1e6

    def launches(self, work: Work) -> list[tuple[str, float]]:
        """What one call runs on the device, in order: kernels, copies, fills, with microseconds."""
        state = work.prepare(0)
        self.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profile:
            result = work.call(state)
            self.synchronize()
        del result
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(trace))
            events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
        found = [event for event in events if event.get("cat") in _ON_THE_DEVICE]
        found.sort(key=lambda event: event["ts"])
        return [(event["name"], float(event["dur"])) for event in found]


def floor_works(device: torch.device, size: int) -> dict[str, tuple[Work, int]]:
    """What nothing can be faster than, with the bytes moved: a copy of tensors of this many bytes
    (more than any cache holds), the same into fresh memory, and a call that does nothing."""
    on_gpu = device.type == "cuda"
    pairs = [
        tuple(torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
        for _ in range(2)
    ]
    one = torch.ones(1, device=device)

    def nothing(x: torch.Tensor) -> Any:
        return x.add_(1)

    if on_gpu:
        from bench.empty_kernel import launch as nothing

    return {
        "copy": (Work(lambda i: pairs[i % 2], lambda p: p[0].copy_(p[1])), 2 * size),
        "copy into fresh memory": (Work(lambda i: pairs[i % 2], lambda p: p[1].clone()), 2 * size),
        "empty launch": (Work(lambda i: one, nothing), 0),
    }
