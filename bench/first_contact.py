"""What a GPU makes of the kernels, in under three minutes: ``python -m bench.first_contact``.

Each step works in processes of its own, which append one line of JSON for each fact to
``first_contact.jsonl`` as soon as it is known. If a process crashes or hangs, its case is
noted and another process goes on with the next case: nothing else is lost. The steps:

    environment   versions, the GPU, the CUDA library (loaded, or built)
    compile       every kernel that the next steps launch, in parallel; registers and spills
    warm          the definition under torch.compile, in parallel, for its cache on the disk
    parity        both operations by each backend against float64, in a process for each pair
    time          the copy, the empty launch; then time, host time and launches of each kernel
                  beside the definition, plain and compiled

A table comes last; the same figures are rows in the CSV files of the benchmarks. The compiled
kernels are left in ``triton-cache.tgz``, and taken from it at the start if the checkout's folder
``.gpu`` has it. ``--again FILE`` repeats only the parity checks that failed in an earlier file.
``--rehearse`` runs tiny sizes on a CPU, in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import operator
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from bench import triton_cache
from bench.rows import Book, Row, aligned
from bench.shapes import MANY_TASKS, NAMED, QUICK, Shape

FILE = "first_contact.jsonl"
CACHE = "triton-cache.tgz"
# What travels to the machine beside the tracked files.
_ROOT = Path(__file__).resolve().parent.parent
_CARRIED = _ROOT / ".gpu"
KERNELS = ("triton", "cuda")
DEFINITION, COMPILED = "reference", "reference-compiled"
# In the order of their worth.
_SHAPES = ("t5-base", "llama-8b", "tasks-64")
_MASKS = ("none", "right", "holes")
_TABLE = "bfloat16"
# A process that gives no sign for so long hangs: seconds a case.
_CASE_SECONDS = 60
_PAIR = ("peer", "operation")  # their parity checks are one part
_CRASHES = 3  # of a part, before the rest of it is given up
_ROUNDS = 15
_QUANTILES = ("p20_ms", "p50_ms", "p80_ms")
# What a process is started by, before the description of its work.
_CHILD = (sys.executable, "-m", "bench.first_contact", "--child")
_LOST = 3  # its exit status: the context is dead, what happened is on record
# Errors after which every further call fails, such as an illegal access: PyTorch's, Triton's, ours.
_DEAD = re.compile(r"CUDA error|CUDA driver|\[CUDA\]")


# Cases


@dataclass(frozen=True)
class Case:
    """One check or measurement: an operation of :mod:`bench.peers` by a peer.

    ``mask``: none, right (padding of up to half a row) or holes (a quarter of the tokens).
    """

    operation: str
    peer: str
    shape: str
    mask: str


_NO_CASE = Case("", "", "", "")


def shapes(rehearse: bool) -> dict[str, Shape]:
    """The sizes by name, without padding."""
    found = QUICK if rehearse else [s for s in (*NAMED, *MANY_TASKS) if s.name in _SHAPES]
    return {shape.name: replace(shape, shortest=0) for shape in found}


def parity_cases(rehearse: bool) -> list[Case]:
    """Every backend, operation, shape and mask; reconstruction has no mask."""
    backends = KERNELS[:1] if rehearse else KERNELS
    return [
        Case(operation, backend, shape, mask)
        for backend in backends
        for operation in ("splice", "reconstruct")
        for shape in shapes(rehearse)
        for mask in (_MASKS if operation == "splice" else _MASKS[:1])
    ]


_WORKS = (
    ("splice", "right"),
    ("reconstruct", "none"),
    ("prompt path", "right"),
    ("splice", "none"),
    ("splice", "holes"),
)


def time_cases(rehearse: bool) -> list[Case]:
    """The whole path too, by all peers; those that are compared are adjacent."""
    return [
        Case(operation, peer, shape, mask)
        for operation, mask in (_WORKS[:2] if rehearse else _WORKS)
        for shape in list(shapes(rehearse))[: 1 if rehearse else None]
        for peer in ((KERNELS[0], DEFINITION) if rehearse else (*KERNELS, DEFINITION, COMPILED))
    ]


def directions(operation: str) -> tuple[str, ...]:
    """What is timed of an operation."""
    return ("both",) if operation == "prompt path" else ("forward", "backward")


# Facts


class Facts:
    """A file of JSON lines. Each is one write at the file's end, so several processes may add."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, step: str, **fact: Any) -> None:
        """Add a line; places in the checkout are named from its root."""
        line = json.dumps({"step": step, **fact}).replace(f"{_ROOT}/", "") + "\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def read(self) -> list[dict[str, Any]]:
        """All lines that are whole, one that follows on a line that was cut off too."""
        found = []
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    found.append(json.loads(line[max(0, line.rfind('{"step": ')) :]))
                except ValueError:
                    continue  # cut off
        return found

    def begun(self, process: int) -> int | None:
        """The number of the case that a process has begun last."""
        announced = [f for f in self.read() if f["step"] == "begin" and f["process"] == process]
        return announced[-1]["case"] if announced else None


# The work of a step, in a process of its own


def _environment(facts: Facts, work: Work, _: Case) -> None:
    import torch

    from bench.environment import origin_of
    from ept_fast.ops import dispatch

    device = torch.device(work.device)
    facts.add("environment", **origin_of(device))
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        facts.add(
            "environment",
            multiprocessors=p.multi_processor_count,
            memory_mb=p.total_memory >> 20,
            cache_mb=p.L2_cache_size >> 20,
            capability=[p.major, p.minor],
        )
        from ept_fast.backends.cuda import library

        begin = time.perf_counter()
        loads = True
        try:
            library.load()
            text = library.state().text
        except library.ExtensionError as error:
            loads, text = False, str(error)[:2000]
        seconds = round(time.perf_counter() - begin, 1)
        facts.add("environment", library=text, loads=loads, seconds=seconds)
    for name, works, why in dispatch.describe():
        facts.add("environment", backend=name, works=works, why=why)


def _compile(facts: Facts, work: Work, _: Case) -> None:
    import torch

    from bench import compiled

    uses: list[compiled.Use] = []
    target = "sm_90"
    if work.device == "cuda":
        target = f"sm_{10 * torch.cuda.get_device_capability()[0]}"
    if missing := compiled.cuda_tools():
        facts.add("compile", problem=f"registers and spills are unknown: {missing}")
    for sizes in shapes(work.rehearse).values():
        types = ("bf16", "fp32")
        chosen: list[compiled.Case] = [compiled.Reconstruct(sizes, ("fp32",) * 3)]
        chosen += [compiled.Splice(sizes, types, mask=mask) for mask in (None, torch.int64)]
        uses += compiled.launches(chosen, [target])
    todo = list(dict.fromkeys(use.launch for use in uses))
    jobs = max(1, (os.cpu_count() or 1) - 4)
    begin = time.perf_counter()
    codes = compiled.compile_all(todo, jobs, chunk=1)
    for launch, code in codes.items():
        names = [f"{use.shape} {use.types}" for use in uses if use.launch == launch]
        fields = ("registers", "spills", "scratch", "shared", "num_warps", "error")
        figures = {name: getattr(code, name) for name in fields}
        facts.add("compile", kernel=launch.kernel, of=sorted(set(names)), **figures)
    facts.add("compile", compiled=len(codes), seconds=round(time.perf_counter() - begin, 1))


def _warm(facts: Facts, work: Work, case: Case) -> None:
    begin = time.perf_counter()
    _ready(work, case)
    facts.add("warm", **asdict(case), seconds=round(time.perf_counter() - begin, 1))


def _parity(facts: Facts, work: Work, case: Case) -> None:
    import torch
    import torch.utils.deterministic

    # Memory that nothing has written holds NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    from bench import parity

    peer, sets = _ready(work, case, sets=1)
    expected = parity.expected_of(peer, sets[0])
    found, second = (parity.results(peer.forward, peer.leaves, sets[0]) for _ in range(2))
    error, where = parity.compare(found, expected)
    same = all(torch.equal(t, second[name]) for name, t in found.items())
    ok = error <= 1 and same
    facts.add("parity", **asdict(case), ok=ok, error=error, where=where, same_bits=same)


def _time(facts: Facts, work: Work, case: Case) -> None:
    import torch

    from bench import timing
    from bench.run import floor_bytes, work_of

    device = torch.device(work.device)
    clock = timing.Clock(device, 0, 3, 3)

    def times(timed: timing.Work) -> dict[str, float]:
        found = clock.alone_ms(timed, 3 if work.rehearse else _ROUNDS)
        return dict(zip(_QUANTILES, timing.quantiles(found), strict=True))

    if case == work.cases[0]:
        floors = timing.floor_works(device, 1 << 22 if work.rehearse else 1 << 30)
        for name, (nothing, moved) in floors.items():
            found = times(nothing)
            speed = moved / 1e9 / found["p50_ms"] if moved else None
            facts.add("floor", of=name, **found, tb_per_s=speed)
        del floors
        torch.cuda.empty_cache()
    peer, sets = _ready(work, case, sets=3)
    shape = shapes(work.rehearse)[case.shape]
    for direction in directions(case.operation):
        timed = work_of(direction, peer, sets)
        facts.add(
            "time",
            **asdict(case),
            direction=direction,
            **times(timed),
            host_us=1e6 * clock.host_seconds(timed),
            floor_mb=floor_bytes(case.operation, direction, shape, sets[0]) / 1e6,
            launches=[(_plain(name), us) for name, us in clock.launches(timed)],
        )


def _plain(kernel: str) -> str:
    """A kernel's name without its type, namespaces and arguments."""
    name = kernel.replace("(anonymous namespace)::", "").removeprefix("void ")
    return re.split(r"[<(]", name)[0].rpartition("::")[2][:60]


_held: dict[tuple[str, str], Any] = {}


def _ready(work: Work, case: Case, sets: int = 1) -> tuple[Any, list[Any]]:
    """The peer, run once in each direction, and its inputs; those of one shape are held."""
    import torch

    from bench import parity, peers
    from bench.inputs import DTYPES, make_inputs

    torch.set_float32_matmul_precision("highest")
    device = torch.device(work.device)
    shape = shapes(work.rehearse)[case.shape]
    if (case.shape, case.mask) not in _held:
        _held.clear()
        torch.compiler.reset()
        padded = replace(shape, shortest=shape.length // 2 if case.mask == "right" else 0)
        made = make_inputs(padded, DTYPES[_TABLE], device, sets)
        if case.mask == "holes":
            g = torch.Generator(device).manual_seed(2)
            size = (shape.batch, shape.length)
            masks = [torch.rand(size, generator=g, device=device) < 0.75 for _ in made]
            made = [replace(i, attention_mask=m.long()) for i, m in zip(made, masks, strict=True)]
        _held[case.shape, case.mask] = made
    inputs = _held[case.shape, case.mask]
    peer = peers.make(case.operation, case.peer, inputs[0])
    parity.results(peer.forward, peer.leaves, inputs[0])
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return peer, inputs


_STEPS: dict[str, Callable[[Facts, Work, Case], None]] = {
    "environment": _environment,
    "compile": _compile,
    "warm": _warm,
    "parity": _parity,
    "time": _time,
}


@dataclass(frozen=True)
class Work:
    """What a process is told: what to do, from which case on, until when (epoch), and where."""

    step: str
    path: str
    cases: tuple[Case, ...]
    rehearse: bool
    start: int
    until: float

    @property
    def device(self) -> str:
        """The type of the device."""
        return "cpu" if self.rehearse else "cuda"


def child(text: str) -> int:
    """Do the work that ``text`` describes, in this process.

    Each case is announced before it is begun; what goes wrong with one is a fact.
    """
    told = json.loads(text)
    work = Work(**{**told, "cases": tuple(Case(**case) for case in told["cases"])})
    facts = Facts(Path(work.path))
    for i, case in list(enumerate(work.cases or (_NO_CASE,)))[work.start :]:
        of = asdict(case) if work.cases else {}
        if time.time() > work.until and of:
            facts.add(work.step, **of, left_out="no time left")
            continue
        if of:
            facts.add("begin", of=work.step, case=i, process=os.getpid())
        try:
            _STEPS[work.step](facts, work, case)
            if work.device == "cuda":
                import torch

                torch.cuda.synchronize()
        except Exception as error:
            lines = f"{type(error).__name__}: {error}".strip().splitlines()
            facts.add(work.step, **of, failed=" ".join(lines)[:2000])
            if not of or _DEAD.search(str(error)):
                return _LOST
    return 0


# The processes


@dataclass
class Run:
    """One first contact: where it writes and how long it may take."""

    facts: Facts
    rehearse: bool
    deadline: float  # epoch

    def part(self, step: str, cases: Iterable[Case] = (), **environment: str) -> bool:
        """Do a step's cases in a process, and in another behind each crash; True: all are done.

        Args:
            environment: variables of the processes.
        """
        chosen = tuple(cases)
        at, crashes = 0, 0
        while True:
            left = self.deadline - time.time()
            if left < 1:
                self.facts.add(step, problem="not run: no time left")
                return False
            path, until = str(self.facts.path), self.deadline - 4
            work = Work(step, path, chosen, self.rehearse, at, until)
            status, process, words = self._process(work, environment, left)
            if status == 0:
                known = [f for f in self.facts.read() if f["step"] == step and "left_out" in f]
                return not any(_case_of(fact) in chosen for fact in known)
            begun = self.facts.begun(process)
            if status != _LOST:
                case = {} if begun is None else asdict(chosen[begun])
                self.facts.add(step, **case, crashed=status, words=words[-1500:])
            crashes += 1
            if begun is None or begun + 1 == len(chosen):
                return False
            if crashes == _CRASHES:
                self.facts.add(step, problem=f"given up after {crashes} crashes")
                return False
            at = begun + 1

    def _process(
        self, work: Work, environment: dict[str, str], left: float
    ) -> tuple[int, int, str]:
        """Status (-9: it hung or the time was over), process number, last words of a process."""
        # A process that compiles must not have the interpreter.
        inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        own = {"TRITON_INTERPRET": "1"} if self.rehearse and work.step in ("parity", "time") else {}
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(
                [*_CHILD, json.dumps(asdict(work))],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**inherited, **own, **environment},
                start_new_session=True,
            )
            began = sign = time.monotonic()
            seen = None
            while process.poll() is None:
                if (begun := self.facts.begun(process.pid)) != seen:
                    seen, sign = begun, time.monotonic()
                hangs = bool(work.cases) and time.monotonic() - sign > _CASE_SECONDS
                if hangs or time.monotonic() - began > left:
                    # With what it started.
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                time.sleep(0.1)
            log.seek(0)
            words = log.read()
        return process.returncode, process.pid, words


def _by(cases: Iterable[Case], *names: str) -> list[list[Case]]:
    """The cases in groups that have these fields in common."""
    key = operator.attrgetter(*names)
    return [list(group) for _, group in groupby(sorted(cases, key=key), key)]


def _done(futures: Iterable[Future[None]]) -> None:
    for future in list(futures):
        future.result()


def run(facts: Facts, rehearse: bool, seconds: float) -> None:
    """All steps; what needs the GPU to itself comes last."""
    contact = Run(facts, rehearse, time.time() + seconds)
    began = time.monotonic()

    def part(step: str, cases: Sequence[Case] = (), **environment: str) -> None:
        done = contact.part(step, cases, **environment)
        of = f" {cases[0].peer} {cases[0].operation}" if cases and step != "time" else ""
        state = "done" if done else "NOT COMPLETE"
        print(f"{time.monotonic() - began:5.1f} s  {step}{of}: {state}", flush=True)

    timed = time_cases(rehearse)
    with ThreadPoolExecutor() as pool:
        first = [pool.submit(part, "environment"), pool.submit(part, "compile")]
        warm = [
            pool.submit(part, "warm", mine, TORCHINDUCTOR_COMPILE_THREADS="1")
            for mine in _by((c for c in timed if c.mask != "holes"), "shape", "operation", "peer")
            if mine[0].peer == COMPILED
        ]
        _done(first)
        _done(pool.submit(part, "parity", mine) for mine in _by(parity_cases(rehearse), *_PAIR))
        _done(warm)
    part("time", timed)


def again(facts: Facts, rehearse: bool, seconds: float, earlier: Path) -> int:
    """Repeat the parity checks that were not passed in an earlier file; the number of those."""
    contact = Run(facts, rehearse, time.time() + seconds)
    passed = {_case_of(f) for f in Facts(earlier).read() if f["step"] == "parity" and f.get("ok")}
    todo = [case for case in parity_cases(rehearse) if case not in passed]
    for mine in _by(todo, *_PAIR):
        contact.part("parity", mine)
    return len(todo)


# The table


def _case_of(fact: dict[str, Any]) -> Case:
    return Case(*(fact.get(name, "") for name in ("operation", "peer", "shape", "mask")))


def _verdicts(facts: list[dict[str, Any]]) -> dict[Case, str]:
    """What the parity check of each case came to, in a word and the error by what is allowed."""
    found: dict[Case, str] = {}
    for fact in facts:
        if fact["step"] != "parity" or "operation" not in fact:
            continue
        case = _case_of(fact)
        if "error" in fact:
            word = "ok" if fact["ok"] else "not repeatable" if fact["error"] <= 1 else "WRONG"
            found[case] = f"{word} {fact['error']:.2g}"
        elif "left_out" not in fact:
            found[case] = "CRASHED" if "crashed" in fact else "FAILED"
    return found


def _timed(facts: list[dict[str, Any]]) -> dict[tuple[Case, str], dict[str, Any]]:
    """What was measured, by case and direction."""
    return {
        (_case_of(fact), fact["direction"]): fact
        for fact in facts
        if fact["step"] == "time" and "p50_ms" in fact
    }


def red(facts: list[dict[str, Any]], rehearse: bool) -> list[str]:
    """Why a first contact is not whole, one line per problem: causes come first."""
    lines = []
    for fact in facts:
        said = fact.get("failed") or fact.get("problem") or fact.get("error")
        if "crashed" in fact:
            last = (fact["words"].strip().splitlines() or ["without a word"])[-1]
            said = f"ended with status {fact['crashed']}: {last}"
        if isinstance(said, str) and said:
            lines.append(f"{fact['step']}: {said[:200]}")
    verdicts = _verdicts(facts)
    for case in parity_cases(rehearse):
        verdict = verdicts.get(case, "not checked")
        if not verdict.startswith("ok"):
            lines.append(f"{case.peer} {case.operation} {case.shape} {case.mask}: {verdict}")
    times = _timed(facts)
    expected = [(case, d) for case in time_cases(rehearse) for d in directions(case.operation)]
    if missing := sum(one not in times for one in expected):
        lines.append(f"time: {missing} of {len(expected)} are not measured")
    return list(dict.fromkeys(lines))


def table(facts: list[dict[str, Any]]) -> list[str]:
    """A line for each kernel, backend, shape and mask that was timed."""
    verdicts = _verdicts(facts)
    floor = {fact["of"]: fact for fact in facts if fact["step"] == "floor"}
    copy, empty = floor.get("copy"), floor.get("empty launch")
    times = _timed(facts)
    lines = []
    if copy and empty:
        empty_us = 1e3 * empty["p50_ms"]
        lines.append(f"copy {copy['tb_per_s']:.2f} TB/s, an empty launch {empty_us:.1f} µs")
    body = []
    for (case, direction), fact in times.items():
        if case.peer not in KERNELS:
            continue
        floor_ms = _floor_ms(fact, floor)
        share = f"{floor_ms / fact['p50_ms']:.0%}" if floor_ms else "-"
        ratios = []
        for peer in (DEFINITION, COMPILED):
            other = times.get((replace(case, peer=peer), direction))
            ratios.append(f"{fact['p50_ms'] / other['p50_ms']:.2f}" if other else "-")
        work = (f"{case.operation} {direction}", case.peer, case.shape, case.mask)
        times_us = (f"{1e3 * fact['p50_ms']:.1f}", share, f"{fact['host_us']:.0f}")
        body.append([*work, verdicts.get(case, "-"), *times_us, len(fact["launches"]), *ratios])
    header = ("kernel", "backend", "shape", "mask", "parity", "p50 µs", "copy", "host µs")
    return lines + aligned((*header, "launches", "of def.", "of comp."), body)


# What a suite of the benchmarks calls the sizes with such a mask.
_SUFFIX = {"right": "", "none": ", unpadded", "holes": ", holes"}


def rows(facts: list[dict[str, Any]]) -> list[Row]:
    """The same as rows of the benchmarks, for their tables, until their own take their places.

    A ratio is that of two medians, not the median of pairs, so it has no interval.
    """
    origin = next((f for f in facts if f["step"] == "environment" and "driver" in f), None)
    if origin is None:
        return []
    common = {name: value for name, value in origin.items() if name != "step"}
    common["rounds"] = _ROUNDS
    floor = {fact["of"]: fact for fact in facts if fact["step"] == "floor"}
    found = []
    for name, fact in floor.items():
        times = {name: fact[name] for name in _QUANTILES}
        if speed := fact["tb_per_s"]:
            times |= {"floor_mb": 1e3 * speed * fact["p50_ms"], "shape": "1024 MiB"}
        found.append(Row(suite="floor", operation=name, peer="torch", **times, **common))
    timed = _timed(facts)
    sizes = shapes(rehearse=False)
    for (case, direction), fact in timed.items():
        spliced = case.operation != "reconstruct"
        p50 = fact["p50_ms"]
        ours = timed.get((replace(case, peer=KERNELS[0]), direction))
        floor_ms = _floor_ms(fact, floor)
        row = Row(
            suite=case.operation.replace(" ", "_"),
            operation=case.operation,
            direction=direction,
            shape=case.shape + (_SUFFIX[case.mask] if spliced else ""),
            **sizes[case.shape].columns,
            embeddings=_TABLE if spliced else "",
            parameters="float32",
            peer=case.peer,
            ours=KERNELS[0],
            **{name: fact[name] for name in _QUANTILES},
            host_ms=fact["host_us"] / 1e3,
            launches=len(fact["launches"]),
            floor_mb=fact["floor_mb"],
            floor_ms=floor_ms,
            of_floor=floor_ms / p50 if floor_ms else None,
            ours_to_peer=ours["p50_ms"] / p50 if ours and ours is not fact else None,
            note="first contact: ratios of two medians",
            **common,
        )
        found.append(row)
    return found


def _floor_ms(fact: dict[str, Any], floor: dict[str, dict[str, Any]]) -> float | None:
    """The time of what has to be moved, no less than an empty launch; None if those are lost."""
    copy, empty = floor.get("copy"), floor.get("empty launch")
    if copy is None or empty is None:
        return None
    return float(max(fact["floor_mb"] / 1e3 / copy["tb_per_s"], empty["p50_ms"]))


def main(arguments: list[str]) -> int:
    """The command line: 0 if every check was made and passed, and all was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder of the JSON lines (a temporary one)")
    parser.add_argument("--seconds", type=float, default=165, help="for all steps")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--again", type=Path, metavar="FILE", help="what failed there, alone")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child is not None:
        return child(options.child)
    folder = options.out or Path(tempfile.mkdtemp(prefix="first-contact-"))
    folder.mkdir(parents=True, exist_ok=True)
    # Named, since torch.compile would have Triton keep its kernels elsewhere.
    cache = Path(tempfile.gettempdir()) / "ept-fast-triton"
    cache = Path(os.environ.setdefault("TRITON_CACHE_DIR", str(cache)))
    if not options.rehearse and (_CARRIED / CACHE).exists():
        try:
            triton_cache.unpack(_CARRIED / CACHE, cache)
        except (OSError, ValueError, tarfile.TarError) as error:
            print(f"{CACHE} is of no use: {error}")  # the kernels are compiled again
    path = folder / ("again.jsonl" if options.again else FILE)
    path.unlink(missing_ok=True)
    facts = Facts(path)
    if options.again is not None:
        count = again(facts, options.rehearse, options.seconds, options.again)
        print(f"{count} checks that had failed")
        failed = [f for f in facts.read() if f["step"] == "parity" and not f.get("ok")]
        for fact in failed:
            print(json.dumps(fact)[:300])
        return 1 if failed else 0
    run(facts, options.rehearse, options.seconds)
    triton_cache.pack(cache, folder / CACHE)
    known = facts.read()
    problems = red(known, options.rehearse)
    print("\n".join(problems[:10]))
    if len(problems) > 10:
        print(f"and {len(problems) - 10} more in {facts.path}")
    print("\n".join(table(known)[:60]))
    if not options.rehearse:
        for row in rows(known):
            Book(folder).add(row)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
