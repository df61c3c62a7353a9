"""The example server: each answer is its adapter's own, whatever else is in the batch."""

from __future__ import annotations

import copy
import json
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("transformers", reason="the `train` extra is not installed")
pytest.importorskip("fastapi", reason="the `serve` extra is not installed")
pytest.importorskip("uvicorn", reason="the `serve` extra is not installed")

import httpx2
import torch
import uvicorn

from ept_fast import EPTModel
from examples.server import load
from examples.server.__main__ import Server, main
from examples.server.app import create_app
from examples.server.batching import End, Ticket, Worker
from examples.server.engine import Engine, find_adapters
from examples.server.load import serving
from examples.server.text_stream import TextStream
from tests.server_client import (
    LIMITS,
    POSITIONS,
    SECONDS,
    SIZES,
    Answer,
    Case,
    Started,
    World,
    alone_case,
    ask,
    ask_streaming,
    client,
    connected,
    noted,
    read_lines,
    save_adapter,
    started,
    wait_for,
)

pytestmark = pytest.mark.usefixtures("one_thread")

BODY_BYTES = 20000
MAX_NEW = 20
LONGEST = max(m for m, _, _ in SIZES.values())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="module")
def engine(world: World) -> Engine:
    import transformers

    llama = transformers.LlamaForCausalLM.from_pretrained(world.model)
    return Engine.of(llama, world.tokenizer, find_adapters(world.adapters), 1024)


@pytest.fixture(scope="module")
def process(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    """A server of its own process, with limits that the tests can reach."""
    log = tmp_path_factory.mktemp("log") / "server.log"
    limits = {"--max-body-bytes": BODY_BYTES, "--max-new-tokens": MAX_NEW, "--max-wait-ms": 2}
    options = [str(part) for pair in limits.items() for part in pair]
    with started(world, log, *options) as server:
        yield server
        assert server.end(signal.SIGINT) == 0  # where nothing is left to answer


class Gate:
    """Holds the model before the second token of its first batch, until it is opened."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.reached = threading.Event(), threading.Event()
        self.steps = 0
        generate = engine.bank.generate

        def held(*args: Any, stopping_criteria: Any, **kwargs: Any) -> Any:
            stopping_criteria.insert(0, self)
            return generate(*args, stopping_criteria=stopping_criteria, **kwargs)

        monkeypatch.setattr(engine.bank, "generate", held)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.steps += 1
        if self.steps == 2:
            self.reached.set()
            assert self.opened.wait(2 * SECONDS)
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.fixture
def gate(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    held = Gate(engine, monkeypatch)
    yield held
    held.opened.set()


@contextmanager
def served(engine: Engine, grace: float = SECONDS, **choices: Any) -> Iterator[tuple[str, Server]]:
    """The server in a thread of this process; its address and itself."""
    worker = Worker(engine, **choices)
    app = create_app(engine, worker, max_new_tokens=POSITIONS, grace=grace)
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=1)
    server = Server(config, worker, grace)
    with serving(server) as address:
        yield address, server


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(20) as threads:
        yield threads


def post(address: str, body: dict[str, Any]) -> httpx2.Response:
    """The reply to a request on a connection of its own."""
    with client(address) as http:
        return http.post("/generate", json=body)


def health(address: str) -> dict[str, Any]:
    with client(address) as http:
        return http.get("/health").json()  # type: ignore[no-any-return]


def long_case(world: World, adapter: str) -> Case:
    """A case with a long answer that starts with a word."""
    return next(
        case
        for case in world.cases
        if case.adapter == adapter
        and case.answer.finish_reason == "length"
        and case.answer.new_tokens == 9
    )


def test_cases_tell_adapters_apart(world: World) -> None:
    """Else nothing below would notice a wrong adapter: of the same text each makes its own."""
    assert {case.answer.finish_reason for case in world.cases} == {"stop", "length"}
    longest = [case.answer.text for case in world.cases if case.answer.new_tokens > 3]
    assert len(set(longest)) == len(longest) > 12


def test_answers(world: World, process: Started) -> None:
    """One by one: what ``generate`` gives with the adapter alone, as a whole and streamed."""
    with client(process.address) as http:
        for case in world.cases:
            assert ask(http, case.body) == case.answer
            assert ask_streaming(http, case.body) == case.answer


# Batches


def answers_of(worker: Worker, cases: Sequence[Case]) -> list[Answer]:
    """The answers to requests that all wait when the worker starts, so that batches are known."""
    events: list[list[str | End]] = [[] for _ in cases]
    for case, own in zip(cases, events, strict=True):
        ids = worker.engine.encode(case.adapter, case.text)
        worker.submit(Ticket(case.adapter, ids, case.max_new_tokens, own.append))
    worker.start()
    worker.close(SECONDS)
    assert worker.idle
    answers = []
    for *pieces, end in events:
        assert isinstance(end, End)
        assert all(isinstance(piece, str) and piece for piece in pieces)
        answers.append(Answer("".join(map(str, pieces)), end.reason, end.new_tokens))
    return answers


@pytest.mark.parametrize(
    ("choices", "batches", "mixed"),
    [({}, 3, 3), ({"max_batch": 48}, 1, 1), ({"mixed": False}, 4, 0), ({"max_batch": 1}, 48, 0)],
    ids=["mixed", "one batch", "one adapter a batch", "one request a batch"],
)
def test_batches(
    world: World, engine: Engine, choices: dict[str, Any], batches: int, mixed: int
) -> None:
    worker = Worker(engine, **choices)
    assert answers_of(worker, world.cases) == [case.answer for case in world.cases]
    counts = {"accepted": 48, "answered": 48, "batches": batches, "rows": 48, "mixed": mixed}
    counts |= {"waiting": 0, "running": 0, "cancelled": 0, "failed": 0}
    assert worker.counts() == counts


def random_gpt2() -> Any:
    """A GPT-2 of 32 positions, of which it has a table."""
    import transformers

    sizes = {"vocab_size": 256, "n_positions": 32, "n_embd": 32, "n_layer": 1, "n_head": 2}
    torch.manual_seed(3)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, initializer_range=0.15)
    )


def test_batches_fit_the_positions(world: World, tmp_path: Path) -> None:
    """A long text and a long answer, each of which fits alone, are not put side by side."""
    gpt2 = random_gpt2()
    folders = {name: tmp_path / name for name in ("a", "b")}
    for number, folder in enumerate(folders.values()):
        save_adapter(gpt2, folder, (2 + number, 32, 0), seed=number)
    engine = Engine.of(gpt2, world.tokenizer, folders, 1024)
    assert engine.columns == 32 - 3 + 1  # the last new token takes no position
    alone = {name: EPTModel.from_pretrained(folder, gpt2) for name, folder in folders.items()}
    words = " ".join(["warm"] * 19)
    asked = [("a", words, 10), ("b", "warm", 28), ("b", words, 2), ("a", words, 10)]
    cases = [alone_case(alone[name], world.tokenizer, name, *rest) for name, *rest in asked]
    worker = Worker(engine)
    assert answers_of(worker, cases) == [case.answer for case in cases]
    # The first, the third and the fourth, and then the second.
    assert {n: worker.counts()[n] for n in ("batches", "rows", "failed")} == {
        "batches": 2,
        "rows": 4,
        "failed": 0,
    }


def test_answers_of_bytes(tmp_path: Path) -> None:
    """Tokens that are no text for themselves, and answers that end within a character."""
    gpt2, tokenizer = random_gpt2(), byte_level()
    save_adapter(gpt2, tmp_path / "a", (3, 32, 2), seed=1)
    engine = Engine.of(gpt2, tokenizer, {"a": tmp_path / "a"}, 1024)
    alone = EPTModel.from_pretrained(tmp_path / "a", gpt2)
    cases = [alone_case(alone, tokenizer, "a", "é" * n, 15) for n in range(1, 7)]
    assert any(case.answer.text.endswith("\ufffd") for case in cases)
    assert answers_of(Worker(engine), cases) == [case.answer for case in cases]


def test_requests_wait_for_others(world: World, engine: Engine, pool: ThreadPoolExecutor) -> None:
    """For as long as they are told, or until the batch is full."""
    with served(engine, max_batch=3, max_wait=SECONDS) as (address, server):
        cases = world.cases[:3]
        replies = list(pool.map(lambda case: post(address, case.body), cases))
        assert [Answer.of(reply.json()) for reply in replies] == [case.answer for case in cases]
        assert server.worker.counts()["batches"] == 1
        # A server that is closing waits for nobody.
        start = time.monotonic()
        last = pool.submit(post, address, cases[0].body)
        wait_for(lambda: server.worker.counts()["waiting"])
        server.worker.close()
        assert Answer.of(last.result().json()) == cases[0].answer
        assert time.monotonic() - start < SECONDS


# Load


def ten_requests(world: World, address: str, seed: int) -> list[tuple[Case, Answer]]:
    """A client that asks for cases of all adapters, some of them streamed, one after another."""
    draw = random.Random(seed)
    with client(address) as http:
        return [
            (case, draw.choice((ask, ask_streaming))(http, case.body))
            for case in draw.sample(world.cases, 10)
        ]


def hang_up(world: World, address: str, seed: int) -> None:
    """A client that leaves after the first piece, five times."""
    draw = random.Random(seed)
    long = [case for case in world.cases if case.answer.new_tokens > 6]
    for case in draw.sample(long, 5):
        with client(address) as http:
            body = {**case.body, "stream": True}
            with http.stream("POST", "/generate", json=body) as reply:
                assert json.loads(next(reply.iter_lines()))["text"]


def test_load(world: World, process: Started, pool: ThreadPoolExecutor) -> None:
    """Sixteen clients, and four that hang up: no answer is lost or another one's."""
    before = health(process.address)
    leaving = [pool.submit(hang_up, world, process.address, seed) for seed in range(4)]
    asking = [pool.submit(ten_requests, world, process.address, seed) for seed in range(16)]
    pairs = [pair for done in asking for pair in done.result()]
    for done in leaving:
        done.result()
    assert len(pairs) == 160
    assert all(answer == case.answer for case, answer in pairs)

    def difference() -> dict[str, int] | None:
        now = health(process.address)
        assert now.pop("status") == "ok"
        return None if now["waiting"] or now["running"] else {n: now[n] - before[n] for n in now}

    counts = wait_for(difference)
    assert counts["accepted"] == counts["rows"] == 180
    assert counts["answered"] + counts["cancelled"] == 180
    assert counts["answered"] >= 160
    assert counts["failed"] == 0
    assert counts["rows"] > 2 * counts["batches"]
    assert 2 * counts["mixed"] > counts["batches"]


@pytest.mark.slow
def test_terminated_under_load(world: World, tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    """All that was accepted is answered, nothing after that; exit code 0."""

    def until_refused(seed: int) -> list[tuple[Case, Answer]]:
        draw = random.Random(seed)
        pairs = []
        with client(server.address) as http:
            while True:
                case, stream = draw.choice(world.cases), draw.random() < 0.5
                try:
                    with http.stream(
                        "POST", "/generate", json={**case.body, "stream": stream}
                    ) as r:
                        text = r.read().decode()
                except (httpx2.ConnectError, httpx2.RemoteProtocolError, httpx2.ReadError):
                    return pairs  # the server has closed, and the count below says it took nothing
                if r.status_code == 503:
                    assert r.headers["Retry-After"] == "1"
                    return pairs
                assert r.status_code == 200, text
                pairs.append((case, read_lines(text) if stream else Answer.of(json.loads(text))))

    with started(world, tmp_path / "log", "--max-batch", "4") as server:
        asking = [pool.submit(until_refused, seed) for seed in range(16)]
        wait_for(lambda: health(server.address)["answered"] > 40)
        assert server.end() == 0
        pairs = [pair for done in asking for pair in done.result()]
        assert all(answer == case.answer for case, answer in pairs)
        end = re.search(r"ended: (.*)", server.log.read_text())
    assert end is not None
    counts = {name: int(n) for n, name in (part.split() for part in end[1].split(", "))}
    assert counts["accepted"] == counts["answered"] == len(pairs) > 40
    assert counts["waiting"] == counts["running"] == counts["failed"] == counts["cancelled"] == 0


def test_closing(world: World, engine: Engine, gate: Gate, pool: ThreadPoolExecutor) -> None:
    """From the signal on 503 for what is new, until what was taken has its answer."""
    case, other = world.cases[2], world.cases[3]
    with served(engine, max_batch=1) as (address, server):
        running = pool.submit(post, address, case.body)
        assert gate.reached.wait(SECONDS)
        waiting = pool.submit(post, address, other.body)
        wait_for(lambda: health(address)["waiting"])
        server.handle_exit(signal.SIGTERM, None)
        asked = noted(server, "on_tick")
        wait_for(lambda: len(asked) > 2)  # whether it should shut down
        with client(address) as http:
            reply = http.post("/generate", json=case.body)
            assert (reply.status_code, reply.headers["Retry-After"]) == (503, "1")
            assert reply.json() == {"detail": "the server is shutting down"}
            reply = http.get("/health")
            assert (reply.status_code, reply.json()["status"]) == (503, "closing")
        gate.opened.set()
        assert Answer.of(running.result().json()) == case.answer
        assert Answer.of(waiting.result().json()) == other.answer
        wait_for(lambda: server.should_exit)
        assert not server.force_exit


@pytest.mark.parametrize("signals", [1, 2])
def test_closing_does_not_wait_for_ever(
    world: World, engine: Engine, gate: Gate, pool: ThreadPoolExecutor, signals: int
) -> None:
    grace = 0.2 if signals == 1 else SECONDS
    start = time.monotonic()
    with served(engine, grace=grace) as (address, server):
        stuck = pool.submit(post, address, world.cases[2].body)
        assert gate.reached.wait(SECONDS)
        for _ in range(signals):
            server.handle_exit(signal.SIGTERM, None)
        wait_for(lambda: server.should_exit)
    assert time.monotonic() - start < SECONDS
    assert server.force_exit == (signals == 2)
    assert stuck.exception() or stuck.result().status_code == 500
    gate.opened.set()
    wait_for(lambda: server.worker.idle)


# Clients that leave, batches that fail


def test_hanging_up(world: World, engine: Engine, gate: Gate, pool: ThreadPoolExecutor) -> None:
    """The row of a client that left ends, and the batch with the last other row."""
    left, stays = long_case(world, "plain"), long_case(world, "long")
    with served(engine, max_batch=2, max_wait=SECONDS) as (address, server):
        tickets = noted(server.worker, "submit")
        other = pool.submit(post, address, stays.body)
        with client(address) as http:
            body = {**left.body, "max_new_tokens": 100, "stream": True}
            with http.stream("POST", "/generate", json=body) as reply:
                assert json.loads(next(reply.iter_lines()))["text"]
        assert gate.reached.wait(SECONDS)
        wait_for(lambda: [t for t in tickets if t.cancelled and t.max_new_tokens == 100])
        gate.opened.set()
        assert Answer.of(other.result().json()) == stays.answer
        counts = wait_for(lambda: server.worker.idle and server.worker.counts())
        assert gate.steps == stays.answer.new_tokens
        assert (counts["answered"], counts["cancelled"]) == (1, 1)


def test_hanging_up_while_waiting(
    world: World, engine: Engine, gate: Gate, pool: ThreadPoolExecutor
) -> None:
    """A request that nobody waits for any more leaves the queue before the batch has ended."""
    case = world.cases[2]
    with served(engine, max_batch=1) as (address, server):
        running = pool.submit(post, address, case.body)
        assert gate.reached.wait(SECONDS)
        request = (
            "POST /generate HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(json.dumps(case.body))}\r\n\r\n{json.dumps(case.body)}"
        )
        with connected(address) as connection:
            connection.sendall(request.encode())
            wait_for(lambda: server.worker.counts()["waiting"])
        wait_for(lambda: server.worker.counts()["cancelled"])
        assert server.worker.counts()["waiting"] == 0
        gate.opened.set()
        assert Answer.of(running.result().json()) == case.answer
        assert server.worker.counts()["batches"] == 1


def test_failing_batch(
    world: World,
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    pool: ThreadPoolExecutor,
) -> None:
    """Each of its requests gets a 500, the next batch is as ever, and no text is logged."""
    cases = world.cases[2:4]
    with served(engine, max_batch=2, max_wait=SECONDS) as (address, server):
        with monkeypatch.context() as patched:

            def fail(*args: Any, **kwargs: Any) -> None:
                raise RuntimeError(f"no memory for {cases[0].text}")

            patched.setattr(engine.bank, "generate", fail)
            bodies = [cases[0].body, {**cases[1].body, "stream": True}]
            for reply in pool.map(lambda body: post(address, body), bodies):
                assert reply.status_code == 500
                assert reply.json() == {"detail": "RuntimeError in the batch of this request"}
        again = pool.map(lambda case: post(address, case.body), cases)
        assert [Answer.of(r.json()) for r in again] == [case.answer for case in cases]
        assert (server.worker.counts()["failed"], server.worker.counts()["answered"]) == (2, 2)
    assert "RuntimeError in a batch of 2 rows" in caplog.text
    assert "in fail" in caplog.text
    assert cases[0].text not in caplog.text


def test_failing_half_way(
    world: World, engine: Engine, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that has begun ends with what went wrong; an answer as a whole is a 500 still."""

    def fail(timeout: float) -> None:
        raise ValueError("half-way")

    monkeypatch.setattr(gate.opened, "wait", fail)
    case = long_case(world, "plain")
    failed = {"detail": "ValueError in the batch of this request"}
    with served(engine, max_batch=1) as (address, _):
        reply = post(address, {**case.body, "stream": True})
        assert reply.status_code == 200
        *pieces, last = (json.loads(line) for line in reply.text.splitlines())
        assert last == failed
        assert case.answer.text.startswith("".join(piece["text"] for piece in pieces))
        gate.steps = 0
        reply = post(address, case.body)
        assert (reply.status_code, reply.json()) == (500, failed)
        assert Answer.of(post(address, case.body).json()) == case.answer


# Limits


def test_full_queue(world: World, engine: Engine, gate: Gate, pool: ThreadPoolExecutor) -> None:
    """As many wait as the limit says; one more is told to come again, and does not get in."""
    cases = world.cases[2:5]
    with served(engine, max_batch=1, queue=2) as (address, server):
        running = pool.submit(post, address, cases[0].body)
        assert gate.reached.wait(SECONDS)
        waiting = [pool.submit(post, address, case.body) for case in cases[1:]]
        wait_for(lambda: server.worker.counts()["waiting"] == 2)
        reply = post(address, cases[0].body)
        assert (reply.status_code, reply.headers["Retry-After"]) == (503, "1")
        assert reply.json() == {"detail": "the queue is full: 2 requests are waiting"}
        gate.opened.set()
        answers = [Answer.of(done.result().json()) for done in (running, *waiting)]
        assert answers == [case.answer for case in cases]
        assert server.worker.counts()["accepted"] == 3


def sent(process: Started, content: Any, **headers: str) -> tuple[int, str]:
    """Status and detail of the reply to a raw body."""
    with client(process.address) as http:
        kind = {"Content-Type": "application/json", **headers}
        reply = http.post("/generate", content=content, headers=kind)
    return reply.status_code, reply.json().get("detail", "")


BODY = {"adapter": "short", "text": "warm soup", "max_new_tokens": 3}


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        ("", "body: Field required"),
        ("{", "body: JSON decode error"),
        ("[]", "body: Input should be a valid dictionary.*"),
        ('"warm soup"', "body: Input should be a valid dictionary.*"),
        ({"text": "warm"}, "adapter: Field required"),
        ({"adapter": "short"}, "text: Field required"),
        ({**BODY, "adapter": 3}, "adapter: Input should be a valid string"),
        ({**BODY, "adapter": ["short"]}, "adapter: Input should be a valid string"),
        ({**BODY, "text": None}, "text: Input should be a valid string"),
        ({**BODY, "text": "\ud800"}, "text: Value error, expected Unicode text, .*"),
        ({**BODY, "adapter": "\ud800"}, "adapter: Value error, expected Unicode text, .*"),
        ({**BODY, "stream": "yes"}, "stream: Input should be a valid boolean"),
        ({**BODY, "max_new_tokens": 0}, "max_new_tokens: Input should be greater than .*"),
        ({**BODY, "max_new_tokens": "3"}, "max_new_tokens: Input should be a valid integer"),
        ({**BODY, "max_new_tokens": True}, "max_new_tokens: Input should be a valid integer"),
        ({**BODY, "max_new_tokens": 3.0}, "max_new_tokens: Input should be a valid integer"),
        ({**BODY, "temperature": 1}, "temperature: Extra inputs are not permitted"),
        ({**BODY, "x" * 9000: 1}, "x{64}: Extra inputs are not permitted"),
    ],
)
def test_bodies_that_are_no_request(process: Started, content: Any, detail: str) -> None:
    raw = content if isinstance(content, str) else json.dumps(content)
    status, got = sent(process, raw.encode())
    assert status == 422
    assert re.fullmatch(detail, got), got


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"[" * 15000, b'{"adapter":"\xc3"}'])
def test_bodies_that_are_no_json(process: Started, content: bytes) -> None:
    assert sent(process, content)[0] in (400, 422)


def test_other_content(process: Started) -> None:
    raw = json.dumps(BODY).encode()
    assert sent(process, raw) == (200, "")
    assert sent(process, raw, **{"Content-Type": "text/plain"})[0] == 422


@pytest.mark.parametrize("chunked", [False, True], ids=["with its length", "in chunks"])
def test_largest_body(process: Started, chunked: bool) -> None:
    raw = json.dumps(BODY).encode()

    def content(size: int) -> Any:
        whole = raw + b" " * (size - len(raw))
        return (whole[i : i + 999] for i in range(0, size, 999)) if chunked else whole

    assert sent(process, content(BODY_BYTES)) == (200, "")
    refused = (413, f"body: expected at most {BODY_BYTES} bytes, got more")
    assert sent(process, content(BODY_BYTES + 1)) == refused
    assert sent(process, content(50 * BODY_BYTES)) == refused


def test_endless_body(process: Started) -> None:
    """The answer comes as soon as the limit is passed, while the client is sending still."""
    with connected(process.address) as connection:
        connection.sendall(b"POST /generate HTTP/1.1\r\nHost: here\r\n")
        connection.sendall(b"Transfer-Encoding: chunked\r\n\r\n")
        connection.sendall(f"{BODY_BYTES + 1:x}\r\n".encode() + b" " * (BODY_BYTES + 1) + b"\r\n")
        reply = b"".join(iter(lambda: connection.recv(4096), b""))
    assert reply.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in reply.lower()


@pytest.mark.parametrize("name", LIMITS)
def test_longest_text(process: Started, name: str) -> None:
    """Counted in tokens, the start token and the separator among them."""
    words = LIMITS[name] - (3 if name == "formed" else 1)
    body = {**BODY, "adapter": name, "text": " ".join(["warm"] * words)}
    assert sent(process, json.dumps(body)) == (200, "")
    body["text"] += " warm"
    expected = f"text: expected 1 to {LIMITS[name]} tokens for adapter {name}, "
    assert sent(process, json.dumps(body)) == (422, f"{expected}got {LIMITS[name] + 1}")


def test_longest_answer(world: World, engine: Engine, process: Started) -> None:
    """By the server's limit; and by the positions that are left behind a text."""
    assert sent(process, json.dumps({**BODY, "max_new_tokens": MAX_NEW})) == (200, "")
    expected = f"max_new_tokens: expected at most {MAX_NEW} after a text of 3 tokens, got "
    for asked in (MAX_NEW + 1, 10**30):
        body = json.dumps({**BODY, "max_new_tokens": asked})
        assert sent(process, body) == (422, f"{expected}{asked}")
    with client(process.address) as http:  # no wish is the limit
        plain = long_case(world, "plain")
        reply = http.post("/generate", json={"adapter": "plain", "text": plain.text}).json()
    assert reply["new_tokens"] <= MAX_NEW
    assert reply["text"].startswith(plain.answer.text)

    room = POSITIONS - LONGEST + 1 - 3
    with served(engine) as (address, _), client(address) as http:
        assert ask(http, {**BODY, "max_new_tokens": room}).new_tokens <= room
        reply = http.post("/generate", json={**BODY, "max_new_tokens": room + 1})
        assert reply.status_code == 422
        assert f"expected at most {room} after a text of 3 tokens" in reply.text
        assert ask(http, {"adapter": "short", "text": BODY["text"]}).new_tokens <= room


def test_texts_without_tokens(world: World, engine: Engine) -> None:
    bare = copy.deepcopy(world.tokenizer)
    bare.backend_tokenizer.post_processor = None  # no start token
    without = replace(engine, tokenizer=bare)
    with pytest.raises(ValueError, match="text: expected 1 to 40 tokens for adapter short, got 0"):
        without.encode("short", "")


NAMES = (
    "",
    ".",
    "..",
    "../outside",
    "../adapters/short",
    "a/b",
    "short/",
    "short/../short",
    "%2e%2e",
    "%2e%2e%2foutside",
    "..\\outside",
    "short\0",
    " short",
    "SHORT",
    "~",
    "file:///etc/passwd",
    "a" * 10000,
)


@pytest.mark.parametrize("name", [*NAMES, "absolute"], ids=lambda name: repr(name[:20]))
def test_names_reach_no_path(world: World, process: Started, name: str) -> None:
    """A name is one of those that were there at the start, or unknown."""
    outside = world.adapters.parent / "outside"
    shutil.copytree(world.adapters / "short", outside, dirs_exist_ok=True)
    name = str(outside) if name == "absolute" else name
    status, detail = sent(process, json.dumps({**BODY, "adapter": name}))
    assert status == 404
    known = ", ".join(sorted(SIZES))
    assert detail == f"adapter: expected one of {known}, got {name[:64]!r}"


def test_other_routes(process: Started) -> None:
    with client(process.address) as http:
        for path in ("/", "/adapters/short", "/adapters/..%2foutside", "/docs", "/%2e%2e/etc"):
            assert http.get(path).status_code == 404
        assert http.get("/generate").status_code == 405
        assert http.put("/adapters").status_code == 405


def test_adapters_and_health(world: World, engine: Engine, process: Started) -> None:
    with client(process.address) as http:
        found = http.get("/adapters").json()["adapters"]
        reply = http.get("/health")
    sizes = engine.bank.memory()
    assert found == [
        {"name": name, "bytes": sizes[name], "max_text_tokens": LIMITS[name]}
        for name in sorted(SIZES)
    ]
    assert (reply.status_code, reply.json()["status"]) == (200, "ok")


def test_no_text_in_the_log(process: Started) -> None:
    """Neither of requests that are answered nor of those that are refused."""
    secret = "zebra"
    bodies = [
        {**BODY, "text": secret},
        {**BODY, "text": " ".join([secret] * 100)},
        {**BODY, "text": [secret]},
        {**BODY, "adapter": secret},
        {**BODY, secret: secret},
        {**BODY, "text": secret + "\ud800"},
        {**BODY, "text": secret, "max_new_tokens": MAX_NEW + 1},
    ]
    statuses = [sent(process, json.dumps(body))[0] for body in bodies]
    statuses.append(sent(process, f'{{"text": "{secret}')[0])
    with client(process.address) as http:
        statuses.append(http.get(f"/generate?text={secret}").status_code)
    assert statuses == [200, 422, 422, 404, 422, 422, 422, 422, 405]
    assert "running on" in process.log.read_text()
    assert secret not in process.log.read_text()


# Adapters and the command line


@pytest.fixture
def folder(world: World, tmp_path: Path) -> Path:
    """A folder with the adapter ``short``."""
    shutil.copytree(world.adapters / "short", tmp_path / "adapters" / "short")
    return tmp_path / "adapters"


def test_found_adapters(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for other in ("run/adapter", "no.name", ".hidden"):
        shutil.copytree(folder / "short", folder / other)
    (folder / "empty").mkdir()
    (folder / "file").write_text("not a folder")
    found = {name: saved.path.parent for name, saved in find_adapters(folder).items()}
    assert found == {
        "run": folder / "run" / "adapter",
        "short": folder / "short",
    }
    for name in ("no.name", ".hidden"):
        expected = f"{folder / name} is left out: adapter_name: expected letters, digits, _ and -"
        assert expected in caplog.text
    assert len(caplog.records) == 2


@pytest.mark.parametrize("what", ["folder", "file", "adapter"])
def test_links_out_of_the_folder(folder: Path, what: str) -> None:
    outside = folder.parent / "outside"
    shutil.copytree(folder / "short", outside)
    (folder / "inside").symlink_to(folder / "short")
    assert set(find_adapters(folder)) == {"inside", "short"}
    link = folder / "more"
    if what == "folder":
        link.symlink_to(outside)
    elif what == "adapter":
        link.mkdir()
        (link / "adapter").symlink_to(outside)
    else:
        shutil.copytree(outside, link)
        tensors = next(link.glob("*.safetensors"))
        tensors.unlink()
        tensors.symlink_to(outside / tensors.name)
    with pytest.raises(ValueError, match=f"adapters: expected files in {folder}, got the link"):
        find_adapters(folder)


def test_adapters_that_cannot_be_served(world: World, folder: Path) -> None:
    for missing in (folder / "nothing", folder / "short"):
        with pytest.raises(ValueError, match="adapters: expected a folder of saved adapters"):
            find_adapters(missing)
    described = folder / "short" / "adapter.json"
    values = json.loads(described.read_text())
    described.write_text(json.dumps({**values, "task": "SEQ_2_SEQ_LM"}))
    with pytest.raises(
        ValueError, match="adapters: short: expected task CAUSAL_LM, got SEQ_2_SEQ_LM"
    ):
        find_adapters(folder)


def test_model_without_room(world: World, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    llama = engine.bank.model.backbone
    monkeypatch.setattr(llama.config, "max_position_embeddings", LONGEST)
    folders = find_adapters(world.adapters)
    with pytest.raises(ValueError, match=r"model: expected more than the 6 positions .* got 6"):
        Engine.of(llama, world.tokenizer, folders, 1024)


def test_command_line_errors(folder: Path, tmp_path: Path) -> None:
    """A user's mistake is one line and exit code 2."""
    (tmp_path / "empty").mkdir()
    for adapters, model, expected in (
        (tmp_path / "empty", "none", "adapters: expected a folder of saved adapters, got "),
        (folder, str(tmp_path / "none"), "model: expected a folder or hub id of a pretrained"),
    ):
        result = CliRunner().invoke(main, ["--adapters", str(adapters), "--model", model])
        assert result.exit_code == 2
        assert expected in result.output


# TextStream


def byte_level() -> Any:
    """Tokens are bytes."""
    import tokenizers
    import transformers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(alphabet)}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner)


def byte_fallback() -> Any:
    """As Llama 2's: words with a mark for the space before them, bytes for the rest."""
    import tokenizers
    import transformers

    vocabulary = {"<unk>": 0, **{f"<0x{i:02X}>": i + 1 for i in range(256)}}
    for piece in ("▁", *"abcdefghijklmnopqrstuvwxyz"):
        vocabulary[piece] = len(vocabulary)
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)
    )
    inner.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    inner.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


TEXT = "naïve  words: 你好, otter 🦦, flag 🏳️‍🌈 \n end "


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_pieces_are_whole_characters(make: Callable[[], Any]) -> None:
    """Each character comes when its last byte has come."""
    tokenizer = make()
    ids = tokenizer(TEXT)["input_ids"]
    assert len(ids) > len(TEXT)
    pieces = TextStream(tokenizer)
    seen = whole = ""
    for count, token in enumerate(ids, 1):
        piece = pieces.add(token)
        assert "\ufffd" not in piece
        seen += piece
        text = tokenizer.decode(ids[:count])
        whole = whole if text.endswith("\ufffd") else text
        assert seen == whole
    assert pieces.end() == ""
    assert seen == tokenizer.decode(ids) == TEXT


def test_pieces_of_broken_characters() -> None:
    """Bytes that are no text are handed on once it is certain, and nothing is lost."""
    tokenizer = byte_level()
    draw = random.Random(0)
    odd = [tokenizer.convert_tokens_to_ids(c) for c in tokenizer.tokenize("aé你🦦")]
    for length in range(40):
        ids = [draw.choice((*odd, draw.randrange(256))) for _ in range(length)]
        pieces = TextStream(tokenizer)
        parts = [pieces.add(token) for token in ids]
        assert not any(part.endswith("\ufffd") for part in parts)
        assert "".join(parts) + pieces.end() == tokenizer.decode(ids)


def test_pieces_of_an_answer_that_is_cut(world: World) -> None:
    """A limit within a character: what came of it is handed on in the end."""
    tokenizer = byte_level()
    ids = tokenizer("ok 🦦")["input_ids"][:-1]
    pieces = TextStream(tokenizer)
    assert "".join(pieces.add(token) for token in ids) == "ok "
    assert pieces.end() == "\ufffd"


# The measurement


@pytest.mark.slow
def test_measurement() -> None:
    sizes = {"tasks": 2, "hidden-size": 64, "layers": 1, "requests": 6, "clients": 3, "rounds": 1}
    options = [f"--{name}={value}" for name, value in sizes.items()]
    result = CliRunner().invoke(load.main, options, catch_exceptions=False)
    assert result.exit_code == 0
    for way in load.WAYS:
        assert f"| {way} | " in result.output
    assert "0 of 24 answers differ from the first ones" in result.output
