"""Measure what batches of several tasks bring, with concurrent clients on loopback.

    python -m examples.server.load
    python -m examples.server.load --model FOLDER_OR_ID --adapters FOLDER

The same requests are served in four ways by the same model in the same process, in turn:

- mixed: they come mixed, and a batch takes any, as the server does;
- one task a batch: they come mixed, and a batch takes those of one task, that of the oldest;
- one task after another: they come sorted, all those of a task before any of the next;
- one request a batch.

A client sends its next request once it has its answer. Without --model, a Llama with random weights
and random adapters is made; a trained one of its size would take as long.
"""

from __future__ import annotations

import asyncio
import random
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import httpx2
import tokenizers
import torch
import transformers
import uvicorn

from ept_fast import EPTConfig, get_ept_model
from examples.server.app import create_app
from examples.server.batching import Worker
from examples.server.engine import Engine, load_engine

__all__ = ["main", "serving"]


@dataclass(frozen=True)
class Way:
    """How requests are served.

    Attributes:
        worker: arguments of the worker.
        by_task: whether each task's requests have to be answered before the next one's are sent.
    """

    worker: Mapping[str, Any] = field(default_factory=dict)
    by_task: bool = False


WAYS = {
    "mixed": Way(),
    "one task a batch": Way({"mixed": False}),
    "one task after another": Way(by_task=True),
    "one request a batch": Way({"max_batch": 1}),
}
WORDS = 4000
MAX_TEXT, MAX_NEW = 48, 32  # tokens of texts and answers

Asked = list[tuple[int, dict[str, Any]]]  # bodies with their numbers


@contextmanager
def serving(server: uvicorn.Server) -> Iterator[str]:
    """Run a server in a thread, on a free port of loopback, during the block; its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def make_engine(folder: Path, tasks: int, hidden_size: int, layers: int) -> Engine:
    """A Llama with random weights, a tokenizer of words, and random adapters of several sizes."""
    words = ["<s>", "</s>", *(f"w{i}" for i in range(WORDS))]
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(words),
            hidden_size=hidden_size,
            intermediate_size=4 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=hidden_size // 64,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    folders = {}
    for number in range(tasks):
        config = EPTConfig(
            hidden_size, num_virtual_tokens=8 + 4 * (number % 3), max_length=128, rank=8
        )
        model = get_ept_model(llama, config, "CAUSAL_LM", init="random")
        folders[f"task-{number}"] = folder / f"task-{number}"
        model.save_pretrained(folders[f"task-{number}"])
        model.unload()
    llama.to("cuda" if torch.cuda.is_available() else "cpu")
    return Engine.of(llama, tokenizer, folders, MAX_TEXT)


def make_requests(engine: Engine, count: int) -> Asked:
    """Requests of all tasks in turn, with texts and answers of many lengths."""
    draw = random.Random(0)
    names = list(engine.tasks)
    requests = []
    for number in range(count):
        name = names[number % len(names)]
        words = [f"w{draw.randrange(WORDS)}" for _ in range(draw.randint(4, MAX_TEXT))]
        while len(words) > 1 and not _fits(engine, name, " ".join(words)):
            words.pop()
        new = draw.randint(MAX_NEW // 2, MAX_NEW)
        body = {"adapter": name, "text": " ".join(words), "max_new_tokens": new}
        requests.append((number, body))
    return requests


def _fits(engine: Engine, name: str, text: str) -> bool:
    try:
        engine.encode(name, text)
    except ValueError:
        return False
    return True


async def ask_all(address: str, groups: Iterable[Asked], clients: int) -> dict[int, str]:
    """The answers to requests by their number; those of a group come after the one before."""
    answers = {}
    async with httpx2.AsyncClient(base_url=address, timeout=None, trust_env=False) as http:

        async def client(waiting: Iterator[tuple[int, dict[str, Any]]]) -> None:
            for number, body in waiting:
                reply = await http.post("/generate", json=body)
                answers[number] = reply.raise_for_status().json()["text"]

        for group in groups:
            waiting = iter(group)
            await asyncio.gather(*(client(waiting) for _ in range(clients)))
    return answers


def measure(
    engine: Engine, way: Way, requests: Asked, clients: int
) -> tuple[float, float, dict[int, str]]:
    """Requests per second, rows of a batch, and the answers."""
    groups = [requests]
    if way.by_task:
        groups = [[r for r in requests if r[1]["adapter"] == name] for name in engine.tasks]
    worker = Worker(engine, queue=clients, **way.worker)
    config = uvicorn.Config(create_app(engine, worker), log_level="warning", access_log=False)
    with serving(uvicorn.Server(config)) as address:
        httpx2.get(f"{address}/health", trust_env=False).raise_for_status()  # it has started
        start = time.perf_counter()
        answers = asyncio.run(ask_all(address, groups, clients))
        seconds = time.perf_counter() - start
    counts = worker.counts()
    return len(requests) / seconds, counts["rows"] / counts["batches"], answers


def print_table(rates: Mapping[str, Sequence[float]], rows: Mapping[str, float]) -> None:
    """The median, least and most of each way, and how many times slower it is than the first."""
    print("| way | requests/s | least | most | rows per batch | mixed is faster by |")
    print("|---|---|---|---|---|---|")
    first = next(iter(rates.values()))
    for name, values in rates.items():
        middle = statistics.median(values)
        ratio = statistics.median(a / b for a, b in zip(first, values, strict=True))
        print(
            f"| {name} | {middle:.2f} | {min(values):.2f} | {max(values):.2f} "
            f"| {rows[name]:.1f} | {ratio:.2f} |"
        )


_count = click.IntRange(min=1)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--model", help="Folder or hub id of a decoder; with --adapters.")
@click.option("--adapters", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--tasks", default=8, type=_count, help="Adapters of the random model.")
@click.option("--hidden-size", default=512, type=click.IntRange(min=64), help="A multiple of 64.")
@click.option("--layers", default=6, type=_count, help="Of that model.")
@click.option("--requests", "count", default=64, type=_count, help="Of each round and way.")
@click.option("--clients", default=16, type=_count, help="At the same time.")
@click.option("--rounds", default=3, type=_count)
def main(
    model: str | None,
    adapters: Path | None,
    tasks: int,
    hidden_size: int,
    layers: int,
    count: int,
    clients: int,
    rounds: int,
) -> None:
    """Measure requests per second of mixed batches, and of tasks and requests one by one."""
    if (model is None) != (adapters is None):
        raise click.UsageError("--model and --adapters: expected both or neither, got one")
    with tempfile.TemporaryDirectory() as folder:
        if model is not None and adapters is not None:
            engine = load_engine(model, adapters, MAX_TEXT)
        else:
            engine = make_engine(Path(folder), tasks, hidden_size, layers)
    requests = make_requests(engine, count)
    rates: dict[str, list[float]] = {name: [] for name in WAYS}
    rows: dict[str, float] = {}
    expected: dict[int, str] = {}
    other = 0
    for number in range(rounds + 1):
        for name, way in WAYS.items():
            some = requests if number else requests[:clients]  # the first round only warms up
            rate, rows[name], answers = measure(engine, way, some, clients)
            if number:
                rates[name].append(rate)
                expected = expected or answers
                other += sum(answers[n] != text for n, text in expected.items())
    print(
        f"{len(engine.tasks)} tasks, {clients} clients, {count} requests, median of {rounds} "
        f"rounds, {torch.get_num_threads()} threads, on {engine.bank.bank.prompt.device}"
    )
    print_table(rates, rows)
    print(f"{other} of {rounds * count * len(WAYS)} answers differ from the first ones")


if __name__ == "__main__":
    main()
