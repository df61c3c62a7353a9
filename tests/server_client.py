"""A model with adapters for the server's tests, what each adapter answers alone, and a client."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import torch

from ept_fast import EPTConfig, EPTModel, get_ept_model
from tests.tiny import GOOD, PLAIN, save_llama

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 30.0  # how long anything may take before it counts as hanging
POSITIONS = 128
MARGIN = 1e-4  # between the best token and the next: a hundred times what a batch changes

# m, n and r of each adapter. The last is saved as `ept-fast train` does, with a separator.
SIZES = {"short": (2, 40, 3), "long": (6, 24, 2), "plain": (4, 8, 0), "formed": (3, 32, 2)}
FORM = {"task": "causal", "max_length": 16, "max_target_length": 16, "separator": " : yes"}
LIMITS = {"short": 40, "long": 24, "plain": 40, "formed": 32}  # tokens of a text


@dataclass(frozen=True)
class Answer:
    """What a request is answered with."""

    text: str
    finish_reason: str
    new_tokens: int

    @classmethod
    def of(cls, reply: dict[str, Any]) -> Answer:
        """The answer in the JSON of a reply."""
        return cls(reply["text"], reply["finish_reason"], reply["new_tokens"])


@dataclass(frozen=True)
class Case:
    """A request and the answer of its adapter alone."""

    adapter: str
    text: str
    max_new_tokens: int
    answer: Answer

    @property
    def body(self) -> dict[str, Any]:
        return {n: getattr(self, n) for n in ("adapter", "text", "max_new_tokens")}


class World:
    """A saved Llama, adapters that make different things of it, and cases.

    Attributes:
        model: folder of the model.
        adapters: folder of the adapters.
        cases: of all adapters, with texts and answers of many lengths.
    """

    def __init__(self, folder: Path) -> None:
        import transformers

        self.model = save_llama(folder / "model", steps=0, max_position_embeddings=POSITIONS)
        self.adapters = folder / "adapters"
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.model)
        llama = transformers.LlamaForCausalLM.from_pretrained(self.model)
        for number, (name, sizes) in enumerate(SIZES.items()):
            form = FORM if name == "formed" else None
            save_adapter(llama, self.adapters / name, sizes, number, form)
        draw = random.Random(5)
        self.cases = []
        for index in range(48):
            name = list(SIZES)[index % len(SIZES)]
            words = draw.choices((*PLAIN, *GOOD), k=draw.randint(0, 16))
            new = draw.choice((1, 3, 9, 20))
            model = EPTModel.from_pretrained(self.adapters / name, llama)
            self.cases.append(alone_case(model, self.tokenizer, name, " ".join(words), new))
            model.unload()


def alone_case(model: EPTModel, tokenizer: Any, name: str, text: str, new: int) -> Case:
    """A request and what ``generate`` gives for it with the adapter alone, without padding."""
    behind = FORM["separator"] if name == "formed" else ""
    ids = tokenizer(f"{text}{behind}", return_tensors="pt")["input_ids"]
    made = model.generate(
        ids,
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    for logits in made.logits:
        best, next_best = logits[0].topk(2).values
        assert best - next_best > MARGIN, (name, text)
    answer = made.sequences[0, ids.shape[1] :].tolist()
    reason = "stop" if 2 in answer else "length"
    kept = answer[: answer.index(2)] if 2 in answer else answer
    words = tokenizer.decode(kept, skip_special_tokens=True)
    return Case(name, text, new, Answer(words, reason, len(kept)))


def save_adapter(
    llama: Any,
    folder: Path,
    sizes: tuple[int, int, int],
    seed: int,
    form: dict[str, Any] | None = None,
) -> None:
    """A random adapter, so strong that answers are mostly its own."""
    m, n, r = sizes
    torch.manual_seed(seed)
    config = EPTConfig(32, num_virtual_tokens=m, max_length=n, rank=r, num_spaces=1, space_dim=2)
    model = get_ept_model(llama, config, "CAUSAL_LM", init="random")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.5 * torch.randn(parameter.shape)
    model.save_pretrained(folder, extra=form and {"form": form})
    model.unload()


def client(address: str) -> httpx2.Client:
    """A client of its own connection."""
    return httpx2.Client(base_url=address, timeout=SECONDS, trust_env=False)


def ask(http: httpx2.Client, body: dict[str, Any]) -> Answer:
    """The answer to a request, as a whole."""
    reply = http.post("/generate", json=body)
    assert reply.status_code == 200, reply.text
    return Answer.of(reply.json())


def ask_streaming(http: httpx2.Client, body: dict[str, Any]) -> Answer:
    """The answer to a request, put together from its pieces."""
    with http.stream("POST", "/generate", json={**body, "stream": True}) as reply:
        assert reply.status_code == 200, reply.read()
        return read_lines("\n".join(reply.iter_lines()))


def read_lines(text: str) -> Answer:
    """The answer in the lines of a stream that came to its end."""
    *pieces, end = (json.loads(line) for line in text.splitlines())
    assert all(set(piece) == {"text"} and piece["text"] for piece in pieces)
    return Answer.of({**end, "text": "".join(piece["text"] for piece in pieces)})


@contextmanager
def connected(address: str) -> Iterator[socket.socket]:
    """A bare connection to the server."""
    url = httpx2.URL(address)
    with socket.create_connection((url.host, url.port or 80), SECONDS) as connection:
        yield connection


def noted(owner: Any, method: str) -> list[Any]:
    """The first argument of each call of a method of this object from now on."""
    arguments: list[Any] = []
    call = getattr(owner, method)

    def note(argument: Any) -> Any:
        arguments.append(argument)
        return call(argument)

    setattr(owner, method, note)
    return arguments


def wait_for(condition: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """What the condition gives once that is true; fails after some seconds."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.01)
    return found


@dataclass
class Started:
    """A server's process.

    Attributes:
        process: it.
        log: what it writes.
        address: where it listens.
    """

    process: subprocess.Popen[bytes]
    log: Path
    address: str = ""

    def end(self, sent: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal; the exit code."""
        self.process.send_signal(sent)
        return self.process.wait(SECONDS)


@contextmanager
def started(world: World, log: Path, *options: str) -> Iterator[Started]:
    """``python -m examples.server`` on a free port of loopback; it does not outlive the block."""
    command = [sys.executable, "-m", "examples.server", "--port", "0", *options]
    command += ["--model", str(world.model), "--adapters", str(world.adapters)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        server = Started(process, log)

        def address() -> str | None:
            assert process.poll() is None, log.read_text()
            found = re.search(r"running on (http://127\.0\.0\.1:\d+) ", log.read_text())
            return found and found[1]

        server.address = wait_for(address, 2 * SECONDS)
        yield server
    finally:
        process.kill()
        process.wait()
