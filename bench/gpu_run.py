"""The operations on a GPU against their definition: ``python -m bench.gpu_run --out FOLDER``.

A variant is timed on a shape only if its output and gradients there, against the definition in
float64, are about as near as the definition's own; the check runs on the very tensors that are
timed. Variants of a shape are timed one after the other in one process, beside the copy bandwidth
and an empty launch of the same run. Times on the device come from events: the second-level cache is
cold (other inputs each round, and a buffer of several times its size is read in between), and the
device sleeps until the host has enqueued the call, so that no launch waits for Python. Host time
(until the call returns) and elapsed time (until the device is done, called alone) are columns of
their own.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

import ept_fast
from bench.environment import commit
from ept_fast import backends, reference
from ept_fast.kernels.launch import run

_CACHE_READS = 4  # times the second-level cache that is read between two rounds
_SETS = 3  # inputs that take turns
_SCALING = 0.5
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """Sizes in METHOD's symbols; ``tasks=0``: one prompt."""

    name: str
    batch: int
    length: int
    hidden_size: int
    num_virtual_tokens: int
    max_length: int
    rank: int
    num_spaces: int
    space_dim: int
    vocabulary: int
    tasks: int = 0


SHAPES = (
    Shape("t5-base", 32, 256, 768, 40, 256, 30, 4, 8, 32128),
    Shape("llama-8b", 8, 2048, 4096, 60, 2048, 24, 4, 16, 128256),
    Shape("long", 1, 32768, 4096, 60, 32768, 24, 4, 16, 128256),
    Shape("bank", 64, 256, 768, 40, 256, 30, 4, 8, 32128, tasks=64),
)
TINY = (
    Shape("tiny", 3, 9, 32, 4, 12, 3, 2, 4, 50),
    Shape("tiny-bank", 3, 9, 32, 4, 12, 3, 2, 4, 50, 2),
)


@dataclass(frozen=True)
class Inputs:
    """One set of tensors: float32 parameters, a frozen table, a batch and the gradients."""

    parameters: dict[str, Tensor]
    prompt: Tensor
    weight: Tensor
    input_ids: Tensor
    task_ids: Tensor | None
    grad_prompt: Tensor
    grad_out: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values, everything that is floating in this type."""
        return replace(
            self,
            parameters={
                n: t.detach().to(dtype).requires_grad_() for n, t in self.parameters.items()
            },
            prompt=self.prompt.detach().to(dtype).requires_grad_(),
            weight=self.weight.to(dtype),
        )


def make_inputs(shape: Shape, table: torch.dtype, device: torch.device, count: int) -> list[Inputs]:
    """Sets of random tensors; they share the frozen table."""
    g = torch.Generator(device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(size, generator=g, device=device) * scale).to(dtype)

    def integers(high: int, *size: int) -> Tensor:
        return torch.randint(high, size, generator=g, device=device)

    s, d, k, h = shape, shape.hidden_size, shape.num_spaces, shape.space_dim
    lead = (s.tasks,) if s.tasks else ()
    sizes = {
        "short_prompt": ((s.num_virtual_tokens, d), 1.0),
        "offset_a": ((s.max_length, s.rank), 1.0),
        "offset_b": ((s.rank, d), 1.0),
        "space_down": ((k, d, h), d**-0.5),
        "space_up": ((k, h, d), h**-0.5),
        "gate_weight": ((d, k), d**-0.5),
        "gate_bias": ((k,), 1.0),
    }
    weight = normal(s.vocabulary, d, dtype=table)
    return [
        Inputs(
            {
                name: normal(*lead, *size, scale=scale).requires_grad_()
                for name, (size, scale) in sizes.items()
            },
            normal(*lead, s.num_virtual_tokens, d).requires_grad_(),
            weight,
            integers(s.vocabulary, s.batch, s.length),
            integers(s.tasks, s.batch) if s.tasks else None,
            normal(*lead, s.num_virtual_tokens, d),
            normal(s.batch, s.num_virtual_tokens + s.length, d, dtype=table),
        )
        for _ in range(count)
    ]


# Operations and variants

Forward = Callable[[Inputs], Tensor]


def _reconstruct(module: Any, inputs: Inputs, options: dict[str, str]) -> Tensor:
    out: Tensor = module.reconstruct_prompt(**inputs.parameters, scaling=_SCALING, **options)
    return out


def _splice(module: Any, prompt: Tensor, inputs: Inputs, options: dict[str, str]) -> Tensor:
    out: Tensor = module.splice_prompt(
        prompt,
        input_ids=inputs.input_ids,
        weight=inputs.weight,
        offset_a=inputs.parameters["offset_a"],
        offset_b=inputs.parameters["offset_b"],
        scaling=_SCALING,
        task_ids=inputs.task_ids,
        **options,
    )
    return out


def _variant(operation: str, backend: str) -> Forward:
    """The operation's forward; ``backend="compiled"``: the definition under torch.compile."""
    plain = backend in ("reference", "compiled")
    module: Any = reference if plain else ept_fast
    options = {} if plain else {"backend": backend}

    def forward(inputs: Inputs) -> Tensor:
        if operation == "reconstruct":
            return _reconstruct(module, inputs, options)
        if operation == "splice":
            return _splice(module, inputs.prompt, inputs, options)
        return _splice(module, _reconstruct(module, inputs, options), inputs, options)

    return torch.compile(forward, dynamic=False) if backend == "compiled" else forward


def _leaves(operation: str, inputs: Inputs) -> dict[str, Tensor]:
    if operation == "splice":
        names = ("offset_a", "offset_b")
        return {"prompt": inputs.prompt, **{name: inputs.parameters[name] for name in names}}
    return inputs.parameters


def _grad_of(operation: str, inputs: Inputs) -> Tensor:
    return inputs.grad_prompt if operation == "reconstruct" else inputs.grad_out


def _gradients(operation: str, out: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    leaves = list(_leaves(operation, inputs).values())
    return torch.autograd.grad(out, leaves, _grad_of(operation, inputs).to(out.dtype))


# Parity


def _results(operation: str, forward: Forward, inputs: Inputs) -> dict[str, Tensor]:
    out = forward(inputs)
    names = _leaves(operation, inputs)
    grads = _gradients(operation, out, inputs)
    return {"output": out.detach(), **dict(zip(names, grads, strict=True))}


def check(
    operation: str, forward: Forward, inputs: Inputs, exact: dict[str, Tensor]
) -> tuple[float, str]:
    """Largest error by what is allowed, and the tensor it is in; above 1 the variant is wrong.

    Allowed are four times the definition's own error, as on a CPU (bench.prompt_path), and, for
    summing in another order, four ULP of the tensor's scale in float32 or one of a shorter type.
    """
    plain = _results(operation, _variant(operation, "reference"), inputs)
    ours = _results(operation, forward, inputs)
    worst, where = 0.0, ""
    for name, expected in exact.items():
        error, own = ((t[name].double() - expected).abs().max().item() for t in (ours, plain))
        eps = max(torch.finfo(ours[name].dtype).eps, 4 * torch.finfo(torch.float32).eps)
        ratio = error / (4 * own + eps * expected.abs().max().item())
        if not ratio <= worst:  # NaN too
            worst, where = ratio, name
    return worst, where


# Times


@triton.jit
def _empty(x_ptr, BLOCK: tl.constexpr):
    pass


@dataclass(frozen=True)
class Timing:
    """Milliseconds, bytes, and how many rounds the quantiles are over."""

    device_p20: float
    device_p50: float
    device_p80: float
    host: float
    elapsed: float
    peak_bytes: int
    rounds: int


class Timer:
    """Times calls on one device; on a CPU, where it only rehearses, by the host's clock."""

    def __init__(self, device: torch.device, seconds: float, rounds: int) -> None:
        self.device, self.seconds, self.rounds = device, seconds, rounds
        self.on_gpu = device.type == "cuda"
        cache = torch.cuda.get_device_properties(device).L2_cache_size if self.on_gpu else 1 << 16
        self.buffer = torch.ones(_CACHE_READS * cache // 4, dtype=torch.float32, device=device)

    def _synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def time(self, prepare: Callable[[int], Any], call: Callable[[Any], Any]) -> Timing:
        """``call(prepare(i))`` round after round; only ``call`` is timed."""
        for i in range(3):
            call(prepare(i))
        host, elapsed = [], []
        for i in range(7):
            state = prepare(i)
            self._synchronize()
            begin = time.perf_counter()
            result = call(state)
            host.append(time.perf_counter() - begin)
            self._synchronize()
            elapsed.append(time.perf_counter() - begin)
            del result, state
        if not self.on_gpu:
            p20, p50, p80 = _quantiles([1e3 * t for t in elapsed])
            middle = 1e3 * statistics.median(host)
            return Timing(p20, p50, p80, middle, 1e3 * statistics.median(elapsed), 0, 7)
        state = prepare(0)
        self._synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_stats(self.device)["requested_bytes.all.current"]
        result = call(state)
        self._synchronize()
        peak = torch.cuda.memory_stats(self.device)["requested_bytes.all.peak"] - before
        del result, state
        # At 2 GHz: longer than the host takes to enqueue the call.
        cycles = int((statistics.median(host) * 1.5 + 5e-5) * 2e9)
        device: list[float] = []
        deadline = time.perf_counter() + self.seconds
        while len(device) < self.rounds and (len(device) < 5 or time.perf_counter() < deadline):
            state = prepare(len(device))
            self.buffer.sum()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(cycles)
            start.record()
            result = call(state)
            end.record()
            self._synchronize()
            device.append(start.elapsed_time(end))
            del result, state
        p20, p50, p80 = _quantiles(device)
        return Timing(
            p20,
            p50,
            p80,
            1e3 * statistics.median(host),
            1e3 * statistics.median(elapsed),
            peak,
            len(device),
        )


def _quantiles(times: list[float]) -> tuple[float, float, float]:
    ordered = sorted(times)
    p20, p50, p80 = (ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.5, 0.8))
    return p20, p50, p80


# Rows


@dataclass
class Row:
    """One variant of one operation at one shape; what does not apply is empty.

    ``bytes`` is the floor: what has to be read and written once. ``of_copy`` is the bandwidth that
    follows from it, by that of the copy. ``error`` is relative to what the parity check allows.
    """

    operation: str
    shape: str
    embeddings: str
    parameters: str
    variant: str
    device_ms_p20: float
    device_ms_p50: float
    device_ms_p80: float
    host_ms: float
    elapsed_ms: float
    peak_mb: float
    rounds: int
    bytes: int | str = ""
    gb_per_s: float | str = ""
    of_copy: float | str = ""
    times_reference: float | str = ""
    times_compiled: float | str = ""
    error: float | str = ""
    origin: dict[str, str] = field(default_factory=dict)

    def flat(self) -> dict[str, Any]:
        """Columns and values of the row, numbers to five digits."""
        values = {k: v for k, v in asdict(self).items() if k != "origin"}
        short = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in values.items()}
        return short | self.origin


def _row(timing: Timing, origin: dict[str, str], **columns: Any) -> Row:
    return Row(
        device_ms_p20=timing.device_p20,
        device_ms_p50=timing.device_p50,
        device_ms_p80=timing.device_p80,
        host_ms=timing.host,
        elapsed_ms=timing.elapsed,
        peak_mb=timing.peak_bytes / 1e6,
        rounds=timing.rounds,
        origin=origin,
        **columns,
    )


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip() or "unknown"


def _commit() -> str:
    try:
        return os.environ.get("COMMIT") or commit()
    except OSError:  # no git
        return "unknown"


def origin_of(device: torch.device) -> dict[str, str]:
    """Where and with what a row was measured."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu (rehearsal)",
        "driver": _driver() if on_gpu else "",
        "cuda": torch.version.cuda or "",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


# What is measured


def _floor_bytes(shape: Shape, inputs: Inputs, backward: bool) -> int:
    """Used rows of the table and the output, each once; backward: the output's gradient once."""
    moved = inputs.grad_out.nbytes
    small = [inputs.prompt, inputs.parameters["offset_a"], inputs.parameters["offset_b"]]
    moved += sum(t.nbytes for t in small) * (2 if backward else 1)
    if not backward:
        used = inputs.input_ids.unique().numel()
        moved += used * shape.hidden_size * inputs.weight.itemsize + inputs.input_ids.nbytes
    return moved


class Session:
    """One run: what it measured so far, and the time it has left."""

    def __init__(
        self, device: torch.device, out: Path, seconds: float, rounds: int, compiled: bool
    ) -> None:
        self.device, self.out, self.compiled = device, out, compiled
        self.deadline = time.perf_counter() + seconds
        self.timer = Timer(device, 1.0, rounds)
        self.origin = origin_of(device)
        self.rows: list[Row] = []
        self.wrong = 0
        self.copy_gb_per_s = float("nan")
        working = [name for name, works, _ in backends.describe() if works]
        # The interpreter works as well, but only where it is asked for.
        self.fused = [name for name in working if name not in ("eager", backends.REFERENCE)]

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.perf_counter()

    def add(self, rows: list[Row]) -> None:
        """Keep and show rows; the file is whole after every call."""
        for row in rows:
            self.rows.append(row)
            speed = f"{row.gb_per_s:7.0f} GB/s" if row.gb_per_s != "" else ""
            faster = f"{row.times_reference:6.2f}x" if row.times_reference != "" else ""
            print(
                f"{row.operation:18} {row.shape:9} {row.embeddings:9} {row.variant:10} device "
                f"{row.device_ms_p50:8.4f} ms  host {row.host_ms:7.3f} ms  elapsed "
                f"{row.elapsed_ms:8.3f} ms  peak {row.peak_mb:8.1f} MB {speed} {faster}",
                flush=True,
            )
        path = self.out / "gpu.csv"
        temporary = path.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            names = [f.name for f in fields(Row) if f.name != "origin"]
            writer = csv.DictWriter(file, fieldnames=[*names, *self.origin])
            writer.writeheader()
            writer.writerows(row.flat() for row in self.rows)
        temporary.replace(path)

    def ceilings(self) -> None:
        """A copy of tensors far larger than any cache, and a kernel that does nothing."""
        size = 1 << 30 if self.timer.on_gpu else 1 << 20
        pairs = [
            (torch.ones(size, dtype=torch.uint8, device=self.device) for _ in range(2))
            for _ in range(2)
        ]
        tensors = [tuple(pair) for pair in pairs]

        def copy(pair: tuple[Tensor, ...]) -> None:
            pair[0].copy_(pair[1])

        timing = self.timer.time(lambda i: tensors[i % 2], copy)
        self.copy_gb_per_s = 2 * size / timing.device_p50 / 1e6
        row = _row(
            timing,
            self.origin,
            operation="copy",
            shape=f"{size >> 20} MiB",
            embeddings="",
            parameters="",
            variant="torch",
            bytes=2 * size,
            gb_per_s=self.copy_gb_per_s,
            of_copy=1.0,
        )
        x = torch.ones(1, device=self.device)
        empty = self.timer.time(lambda i: x, lambda x: run(_empty, 1, self.device, x, BLOCK=1))
        columns = {"shape": "", "embeddings": "", "parameters": "", "variant": "triton"}
        self.add([row, _row(empty, self.origin, operation="empty launch", **columns)])

    def measure(self, operation: str, shape: Shape, table: str) -> None:
        """All variants of one operation at one shape, the definition first."""
        sets = make_inputs(shape, _DTYPES[table], self.device, _SETS)
        exact = _results(operation, _variant(operation, "reference"), sets[0].to(torch.float64))
        variants = ["reference", *self.fused]
        if operation == "path":
            variants.append("eager")
        # Compiling takes seconds; the rows after this one come first.
        if self.compiled and self.left() > 25:
            variants.append("compiled")
        timed: dict[str, dict[str, tuple[Timing, float]]] = {}
        for name in variants:
            torch.compiler.reset()
            forward = _variant(operation, name)
            begin = time.perf_counter()
            error, where = check(operation, forward, sets[0], exact)
            if name == "compiled":
                print(f"  compiled in {time.perf_counter() - begin:.1f} s", flush=True)
            if not error <= 1:
                self.wrong += name in self.fused
                print(
                    f"{operation:18} {shape.name:9} {table:9} {name:10} NOT TIMED: {where} is off "
                    f"by {error:.2f} of what is allowed",
                    flush=True,
                )
                continue
            for part, timing in self._parts(operation, forward, sets):
                timed.setdefault(part, {})[name] = (timing, error)
        del exact
        for part, times in timed.items():
            self.add(list(self._rows(part, shape, table, times, sets[0])))

    def _parts(
        self, operation: str, forward: Forward, sets: list[Inputs]
    ) -> Iterator[tuple[str, Timing]]:
        def chosen(i: int) -> Inputs:
            return sets[i % len(sets)]

        def both(inputs: Inputs) -> Any:
            return _gradients(operation, forward(inputs), inputs)

        if operation != "splice":
            yield operation, self.timer.time(chosen, both)
            return
        yield "splice forward", self.timer.time(chosen, forward)

        def with_output(i: int) -> tuple[Tensor, Inputs]:
            return forward(chosen(i)), chosen(i)

        yield (
            "splice backward",
            self.timer.time(with_output, lambda state: _gradients(operation, *state)),
        )

    def _rows(
        self,
        part: str,
        shape: Shape,
        table: str,
        times: dict[str, tuple[Timing, float]],
        inputs: Inputs,
    ) -> Iterator[Row]:
        def faster(timing: Timing, than: str) -> float | str:
            return times[than][0].device_p50 / timing.device_p50 if than in times else ""

        for name, (timing, error) in times.items():
            row = _row(
                timing,
                self.origin,
                operation=part,
                shape=shape.name,
                embeddings="" if part == "reconstruct" else table,
                parameters="float32",
                variant=name,
                times_reference=faster(timing, "reference"),
                times_compiled=faster(timing, "compiled"),
                error=error,
            )
            if part.startswith("splice"):
                row.bytes = _floor_bytes(shape, inputs, part.endswith("backward"))
                row.gb_per_s = row.bytes / timing.device_p50 / 1e6
                row.of_copy = row.gb_per_s / self.copy_gb_per_s
            yield row


# By value: what is most wanted comes first, and what the time does not reach is named.
JOBS = (
    ("path", "bfloat16"),
    ("splice", "bfloat16"),
    ("reconstruct", "bfloat16"),
    ("path", "float32"),
    ("splice", "float32"),
)


def plot(folder: Path) -> None:
    """Draw ``gpu.csv``: times faster than the definition, and bandwidth by that of the copy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with (folder / "gpu.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))

    def label(row: dict[str, str]) -> str:
        return " ".join(x for x in (row["operation"], row["shape"], row["embeddings"]) if x)

    def draw(name: str, title: str, line: float, bars: list[tuple[str, dict[str, float]]]) -> None:
        if not bars:
            return
        series = list(dict.fromkeys(key for _, values in bars for key in values))
        figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.45 * len(bars)))
        height = 0.8 / len(series)
        for number, key in enumerate(series):
            places = [i + number * height for i, (_, v) in enumerate(bars) if key in v]
            axes.barh(places, [v[key] for _, v in bars if key in v], height, label=key)
        axes.axvline(line, color="black", linewidth=0.8)
        axes.set_yticks([i + 0.4 - height / 2 for i in range(len(bars))], [b for b, _ in bars])
        axes.invert_yaxis()
        axes.set_title(f"{title}\n{rows[0]['device']}, commit {rows[0]['commit']}", fontsize=10)
        axes.legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(folder / name, dpi=120)
        pyplot.close(figure)

    faster, bandwidth = [], []
    for row in rows:
        if row["variant"] in ("torch", "reference", "compiled", "eager") or not row["error"]:
            continue
        columns = {"times_reference": "reference", "times_compiled": "reference-compiled"}
        values = {f"than {k}": float(row[c]) for c, k in columns.items() if row[c]}
        if values:
            faster.append((f"{label(row)} {row['variant']}", values))
        if row["of_copy"]:
            share = {"share": float(row["of_copy"])}
            bandwidth.append((f"{label(row)} {row['variant']}", share))
    draw("gpu_speed.png", "Times faster on the device (p50)", 1, faster)
    draw("gpu_bandwidth.png", "Bandwidth by that of a copy in the same run", 1, bandwidth)


def main(arguments: list[str] | None = None) -> int:
    """Measure, write ``gpu.csv`` and the plots; 1 where a fused backend failed its parity check."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the CSV and the plots")
    parser.add_argument("--seconds", type=float, default=170, help="start nothing after that long")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--shape", action="append", help="only these shapes")
    parser.add_argument("--no-compiled", action="store_true", help="leave torch.compile out")
    parser.add_argument("--device", default="cuda", help="cpu: rehearse on tiny shapes")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device on this machine", file=sys.stderr)
        return 2
    torch.set_float32_matmul_precision("highest")
    options.out.mkdir(parents=True, exist_ok=True)
    session = Session(device, options.out, options.seconds, options.rounds, not options.no_compiled)
    stopped = False
    try:
        _measure_all(session, options.shape)
    except KeyboardInterrupt:
        print("stopped: the rows so far are kept", flush=True)
        stopped = True
    try:
        plot(options.out)
    except ImportError as error:
        print(f"no plots: {error}", flush=True)
    return 1 if session.wrong or stopped else 0


def _measure_all(session: Session, names: list[str] | None) -> None:
    session.ceilings()
    on_gpu = session.device.type == "cuda"
    for operation, table in JOBS:
        for shape in SHAPES if on_gpu else TINY:
            if names and shape.name not in names:
                continue
            if session.left() < 5:
                print(f"left out, no time: {operation} {shape.name} {table}", flush=True)
                continue
            try:
                session.measure(operation, shape, table)
            except torch.OutOfMemoryError as error:
                print(f"left out, no memory: {operation} {shape.name} {table}: {error}", flush=True)
            if on_gpu:
                torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
