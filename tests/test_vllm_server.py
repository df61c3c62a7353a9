"""vLLM's OpenAI server with adapters, over HTTP on the loopback: ``make test-vllm``."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")
httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")

from safetensors.torch import load_file, save_file

from tests.tiny import save_word_tokenizer
from tests.vllm_models import SIZES, VOCABULARY, Asked, Family, requests

BASE = "base"
TEMPLATE = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"


class Server:
    """The server's process, and clients of it."""

    def __init__(self, family: Family, log: Path) -> None:
        self.family = family
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "ept_fast.vllm", "serve"]
        command += ["--model", str(family.model), "--adapters", str(family.adapters)]
        command += ["--num-virtual-tokens", "10", "--max-adapters", "6"]
        command += ["--served-model-name", BASE, "--host", "127.0.0.1", "--port", str(port)]
        command += ["--dtype", "float32", "--block-size", "32", "--max-model-len", "128"]
        command += ["--max-num-batched-tokens", "40", "--max-num-seqs", "8", "--enforce-eager"]
        environment = {
            **os.environ,
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
        }
        environment.pop("VLLM_PLUGINS", None)
        self.log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
        self.http = httpx.Client(base_url=self.url, timeout=120)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def wait(self) -> None:
        for _ in range(600):
            assert self.process.poll() is None, self.log.read_text()[-6000:]
            try:
                if self.http.get("/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise AssertionError(self.log.read_text()[-6000:])

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)

    def body(self, asked: Asked, **choices: Any) -> dict[str, Any]:
        return {
            "model": asked.adapter or BASE,
            "prompt": asked.ids,
            "max_tokens": asked.new,
            "temperature": 0,
            "extra_body": {"ignore_eos": True, "return_token_ids": True},
            **choices,
        }

    def complete(self, asked: Asked) -> list[int]:
        answer = self.client.completions.create(**self.body(asked))
        assert answer.model == (asked.adapter or BASE)
        assert answer.usage.prompt_tokens == len(asked.ids)
        return list(answer.choices[0].token_ids)

    def post(self, path: str, body: Any) -> tuple[int, str]:
        data = body if isinstance(body, str) else json.dumps(body)
        answer = self.http.post(path, content=data, headers={"content-type": "application/json"})
        return answer.status_code, answer.text

    def names(self) -> set[str]:
        return {model.id for model in self.client.models.list()}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    family = Family(folder, "LlamaForCausalLM")
    words = [f"w{i:03}" for i in range(VOCABULARY)]
    size = save_word_tokenizer(family.model, start=False, end=False, padding=True, words=["user"])
    words = ["user", *words[: VOCABULARY - size]]
    save_word_tokenizer(family.model, start=False, end=False, padding=True, words=words)
    (family.model / "chat_template.jinja").write_text(TEMPLATE)
    started = Server(family, folder / "log")
    try:
        started.wait()
        yield started
    finally:
        started.stop()


def test_requests_name_their_adapter_as_the_model(server: Server) -> None:
    assert server.names() == {BASE, *SIZES}
    asked = requests(25, seed=11)
    with ThreadPoolExecutor(10) as pool:
        got = list(pool.map(server.complete, asked))
    for each, tokens in zip(asked, got, strict=True):
        assert tokens == server.family.answer(each), each


def test_streamed_and_chat(server: Server) -> None:
    asked = Asked("long", [9, 8, 7, 6], 20)
    stream = server.client.completions.create(**server.body(asked, stream=True))
    pieces = [list(chunk.choices[0].token_ids) for chunk in stream if chunk.choices]
    assert len(pieces) > 5
    assert [token for piece in pieces for token in piece] == server.family.answer(asked)

    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(server.family.model)
    content = "w001 w002 the play was fine"
    ids = tokenizer(f"user {content} ", add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id not in ids
    asked = Asked("mail", ids, 12)
    body = server.body(asked, messages=[{"role": "user", "content": content}])
    del body["prompt"]
    answer = server.client.chat.completions.create(**body)
    assert list(answer.choices[0].token_ids) == server.family.answer(asked)
    chunks = server.client.chat.completions.create(**body, stream=True)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == answer.choices[0].message.content


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_bad_bodies(server: Server, path: str) -> None:
    chat = path.endswith("chat/completions")

    def body(words: int, **choices: Any) -> dict[str, Any]:
        text = " ".join(["fine"] * words)
        messages = [{"role": "user", "content": text}]
        asked = {"messages": messages} if chat else {"prompt": text}
        return {"model": "short", "max_tokens": 3, **asked, **choices}

    whole = 23 if chat else 24  # the template adds a word
    assert server.post(path, body(whole))[0] == 200
    status, text = server.post(path, body(whole + 1))
    assert status == 400
    assert "prompt: expected at most 24 tokens for the adapter 'short', got 25" in text
    for name, value in (("temperature", float("nan")), ("top_p", float("inf"))):
        for model in ("short", BASE):
            status, text = server.post(path, body(3, **{name: value, "model": model}))
            assert status == 400
            assert f"{name}: expected a finite number, got NaN or infinity" in text
    for choices in ({"prompt_logprobs": 1}, {"echo": True, "logprobs": True if chat else 1}):
        status, text = server.post(path, body(3, **choices))
        assert (status, "prompt_logprobs: expected none, nor echo" in text) == (400, True), text
    assert server.post(path, body(3, model="nobody"))[0] == 404
    assert server.post(path, body(3, max_tokens="many"))[0] in (400, 422)
    assert server.post(path, "{")[0] in (400, 422)
    assert server.post(path, [])[0] in (400, 422)
    assert server.post(path, body(whole))[0] == 200


def test_embeddings_are_not_taken_from_clients(server: Server) -> None:
    status, text = server.post(
        "/v1/completions", {"model": "mail", "prompt_embeds": "AAAA", "max_tokens": 3}
    )
    assert status == 400
    assert "prompt" in text
    assert server.complete(Asked("mail", [5], 3)) == server.family.answer(Asked("mail", [5], 3))


def test_adapters_come_change_and_go(server: Server, tmp_path: Path) -> None:
    family = server.family

    def load(name: str, folder: Path, **choices: Any) -> tuple[int, str]:
        body = {"lora_name": name, "lora_path": str(folder), **choices}
        return server.post("/v1/load_lora_adapter", body)

    for name, wrong in (("mail", "expected a new one"), (BASE, "name that no model has")):
        status, text = load(name, family.other)
        assert (status, wrong in text) == (400, True), text
    status, text = load("mail", family.adapters / "mail", load_inplace=True)
    assert (status, "lora_path: expected another folder" in text) == (400, True)
    nan = tmp_path / "nan"
    shutil.copytree(family.adapters / "mail", nan)
    tensors = load_file(nan / "adapter_model.safetensors")
    nans = {name: torch.full_like(tensor, float("nan")) for name, tensor in tensors.items()}
    save_file(nans, nan / "adapter_model.safetensors")
    none = tmp_path / "none"
    for folder, wrong in ((nan, "sha256: expected"), (none, "expected a readable file")):
        status, text = load("new", folder)
        assert (status, wrong in text) == (400, True), text
    assert server.names() == {BASE, *SIZES}

    # Requests that are under way while the name goes to another adapter.
    old = [Asked("mail", [5 + i, 6, 7], 60) for i in range(4)]
    first = threading.Event()

    def stream(asked: Asked) -> list[int]:
        tokens: list[int] = []
        for chunk in server.client.completions.create(**server.body(asked, stream=True)):
            tokens += chunk.choices[0].token_ids if chunk.choices else []
            if len(tokens) > 2:
                first.set()
        return tokens

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(stream, asked) for asked in old]
        assert first.wait(60)
        assert load("mail", family.other, load_inplace=True)[0] == 200
        assert not all(each.done() for each in running)
        new = [server.complete(asked) for asked in old]
        got = [each.result() for each in running]
    for asked, before, after in zip(old, got, new, strict=True):
        assert before == family.answer(asked)
        assert after == family.answer(asked._replace(adapter="other"))

    assert load("again", family.adapters / "mail")[0] == 200
    assert server.complete(old[0]._replace(adapter="again")) == family.answer(old[0])
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "again"})[0] == 200
    assert server.names() == {BASE, *SIZES}
    assert server.post("/v1/completions", {"model": "again", "prompt": [5]})[0] == 404
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "again"})[0] == 404
