"""Adapters in vLLM: the tokens of ``EPTModel.generate``, whatever else the engine does meanwhile.

``make test-vllm`` runs this in an environment that has vLLM; in others it is skipped.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

# Before vLLM reads them: one process, and a small cache.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
SECOND = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"  # of vLLM's two model runners
if SECOND:
    # It asks for a Triton that compiles for CPUs. Here its kernels run in Triton's interpreter.
    from triton.backends import backends

    class _Driver(next(iter(backends.values())).driver):
        is_active = staticmethod(lambda: True)

    (_backend, *_) = backends.values()
    backends["cpu"] = type(_backend)(compiler=_backend.compiler, driver=_Driver)

vllm = pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.lora.request import LoRARequest

import ept_fast.vllm.models
from ept_fast import export_plain, import_plain
from ept_fast.interchange.vllm import read_vllm_sizes
from ept_fast.storage.files import CheckpointError
from ept_fast.vllm import engine_arguments
from ept_fast.vllm.adapters import Adapters
from tests.vllm_models import FAMILIES, SIZES, WIDTH, Asked, Family, requests

pytestmark = pytest.mark.default_algorithms

ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "block_size": 32,
    "max_model_len": 128,
    "max_num_batched_tokens": 40,  # less than some requests have: these are read in chunks
    "max_num_seqs": 8,
    "skip_tokenizer_init": True,
    "enforce_eager": True,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp("llama"), "LlamaForCausalLM")


@pytest.fixture
def engine() -> Iterator[Callable[..., Any]]:
    """Makes an engine with the adapters of a family, and ends it after the test."""
    made: list[Any] = []

    def make(family: Family, **choices: Any) -> tuple[Any, Adapters]:
        arguments = {**ENGINE, **choices}
        llm = vllm.LLM(**engine_arguments(family.model, family.adapters, **arguments))
        made.append(llm)
        return llm, Adapters(llm, family.adapters)

    yield make
    while made:
        end(made.pop())


def end(llm: Any) -> None:
    """Stop an engine in this process, so that another one can start."""
    llm.llm_engine.engine_core.shutdown()
    gc.collect()
    vllm.distributed.cleanup_dist_env_and_memory()


def sampling(asked: Asked, **choices: Any) -> Any:
    kind = {"max_tokens": asked.new, "ignore_eos": True, "detokenize": False, **choices}
    return vllm.SamplingParams(temperature=0, **kind)


def generate(llm: Any, adapters: Adapters, asked: list[Asked]) -> list[Any]:
    return llm.generate(  # type: ignore[no-any-return]
        [{"prompt_token_ids": each.ids} for each in asked],
        [sampling(each) for each in asked],
        lora_request=adapters[[each.adapter for each in asked]],
        use_tqdm=False,
    )


def tokens(output: Any) -> list[int]:
    return list(output.outputs[0].token_ids)


class Stepped:
    """An engine whose steps the test takes, one by one."""

    def __init__(self, llm: Any) -> None:
        self.engine = llm.llm_engine
        core = self.engine.engine_core.engine_core
        self.scheduler = core.scheduler
        self.runner = core.model_executor.driver_worker.worker.model_runner
        self.preempted = 0
        self.done: dict[str, Any] = {}
        inner = self.scheduler._preempt_request

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.preempted += 1
            return inner(*args, **kwargs)

        self.scheduler._preempt_request = counted

    def add(self, name: str, asked: Asked, lora: Any) -> None:
        prompt = {"prompt_token_ids": asked.ids}
        self.engine.add_request(name, prompt, sampling(asked), lora_request=lora)

    def step(self) -> None:
        for output in self.engine.step():
            if output.finished:
                self.done[output.request_id] = output

    def finish(self) -> dict[str, Any]:
        while self.engine.has_unfinished_requests():
            self.step()
        return self.done


@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_every_family_answers_as_generate_does(
    architecture: str, tmp_path: Path, engine: Callable[..., Any]
) -> None:
    assert set(FAMILIES) == set(ept_fast.vllm.ARCHITECTURES)
    family = Family(tmp_path, architecture)
    name = f"EPT{architecture}"
    if architecture != "LlamaForCausalLM":  # the class itself: a name costs vLLM a process
        vllm.ModelRegistry.register_model(name, getattr(ept_fast.vllm.models, name))
    llm, adapters = engine(family)
    asked = requests(15, seed=1)
    asked.append(Asked("long", asked[0].ids, 80))  # beyond the longest offset of the engine
    for each, output in zip(asked, generate(llm, adapters, asked), strict=True):
        assert tokens(output) == family.answer(each), each
        assert output.prompt_token_ids == each.ids  # the client sees its text alone


def test_compiled_engine(llama: Family, engine: Callable[..., Any]) -> None:
    llm, adapters = engine(llama, enforce_eager=False)
    asked = requests(20, seed=2)
    for each, output in zip(asked, generate(llm, adapters, asked), strict=True):
        assert tokens(output) == llama.answer(each), each


@pytest.mark.parametrize("ahead", [False, True])
def test_answers_under_load(
    ahead: bool, llama: Family, engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Preemption, chunks, prefix hits, aborts, and an adapter that is replaced meanwhile."""
    platform = type(vllm.platforms.current_platform)
    settle = platform.check_and_update_config

    def with_scheduler(config: Any) -> None:  # vLLM leaves the one that runs ahead to GPUs
        settle(config)
        config.scheduler_config.async_scheduling = ahead

    monkeypatch.setattr(platform, "check_and_update_config", staticmethod(with_scheduler))
    sizes = {"num_gpu_blocks_override": 9, "max_num_seqs": 6, "max_adapters": 3}
    llm, adapters = engine(llama, **sizes)
    run = Stepped(llm)
    assert type(run.scheduler).__name__ == ("_AsyncScheduler" if ahead else "_Scheduler")
    assert type(run.runner).__module__.startswith("vllm.v1.worker.cpu.") == SECOND
    asked = requests(60, seed=3)
    expected: dict[str, Asked] = {}
    aborted = []
    folders = [llama.other, *(llama.adapters / name for name in SIZES)]
    checksums = {str(folder): read_vllm_sizes(folder).sha256 for folder in folders}
    for i, each in enumerate(asked):
        run.add(str(i), each, adapters[each.adapter])
        expected[str(i)] = each
        if i == 20:
            waiting = [each for n, each in enumerate(asked[:20]) if str(n) not in run.done]
            assert any(each.adapter == "mail" for each in waiting)
            adapters.replace("mail", llama.other)
        if i > 20 and each.adapter == "mail":
            expected[str(i)] = each._replace(adapter="other")
        if i % 9 == 4:
            run.engine.abort_request([str(i - 1)])
            aborted.append(str(i - 1))
        if i == 40:
            adapters.remove("plain")
            with pytest.raises(KeyError, match=r"long, mail, short, got 'plain'"):
                adapters["plain"]
            adapters.add("plain", llama.adapters / "plain")
        run.step()
        for request in run.scheduler.requests.values():
            lora = request.lora_request
            assert request.cache_salt == (None if lora is None else checksums[lora.lora_path])
    done = run.finish()
    answered = [name for name in expected if name not in aborted]
    assert len(answered) >= 40
    for name in answered:
        assert tokens(done[name]) == llama.answer(expected[name]), expected[name]
    assert run.preempted > 3
    assert {expected[n].adapter for n in answered} == {None, "other", *SIZES}


def test_blocks_are_shared_within_an_adapter_alone(
    llama: Family, engine: Callable[..., Any]
) -> None:
    llm, adapters = engine(llama, max_adapters=5)
    ids = [(7 * i) % 190 + 3 for i in range(60)]
    text = Asked(None, ids, 4)
    names: list[str | None] = [None, "long", "mail", "plain"]

    def cached(name: str | None) -> int:
        asked = text._replace(adapter=name)
        (output,) = generate(llm, adapters, [asked])
        assert tokens(output) == llama.answer(asked)
        return int(output.num_cached_tokens)

    assert [cached(name) for name in names] == [0, 0, 0, 0]
    # Whole blocks of 32 of prompt and text, in which the last token is never found.
    assert [cached(name) for name in names] == [32, 64, 32, 32]
    # 9 positions of the prompt and 23 of the text are a block.
    (output,) = generate(llm, adapters, [Asked("long", [*ids[:23], *ids[:20]], 4)])
    assert output.num_cached_tokens == 32
    adapters.replace("mail", llama.other)
    (output,) = generate(llm, adapters, [text._replace(adapter="mail")])
    assert output.num_cached_tokens == 0
    assert tokens(output) == llama.answer(text._replace(adapter="other"))


def test_requests_that_cannot_be_answered(llama: Family, engine: Callable[..., Any]) -> None:
    llm, adapters = engine(llama)
    fits = Asked("short", [5] * 24, 4)
    long = fits._replace(ids=[5] * 25)
    too_long = Asked("plain", [5] * 124, 1)  # 4 of the prompt and one new one
    outputs = generate(llm, adapters, [fits, long, too_long, too_long._replace(ids=[5] * 123)])
    assert [output.outputs[0].finish_reason for output in outputs] == [
        "length",
        "error",
        "error",
        "length",
    ]
    assert tokens(outputs[0]) == llama.answer(fits)
    for output, most, name in ((outputs[1], 24, "short"), (outputs[2], 123, "plain")):
        got = len(output.prompt_token_ids)
        assert output.outputs[0].stop_reason == (
            f"prompt: expected at most {most} tokens for the adapter '{name}', got {got}"
        )
    (output,) = llm.generate(
        {"prompt_token_ids": fits.ids},
        sampling(fits, prompt_logprobs=1),
        lora_request=adapters["short"],
        use_tqdm=False,
    )
    assert output.outputs[0].stop_reason == (
        "prompt_logprobs: expected None behind a prompt, got 1"
    )
    for _ in range(2):  # nothing else is there to be done
        (output,) = generate(llm, adapters, [long])
        assert output.outputs[0].finish_reason == "error"
    gone = LoRARequest("gone", 99, str(llama.folder / "gone"))
    with pytest.raises(LoRAAdapterNotFoundError, match="gone"):
        llm.llm_engine.add_lora(gone)
    (output,) = generate(llm, adapters, [fits])
    assert tokens(output) == llama.answer(fits)


def test_damaged_adapters_do_not_reach_the_engine(
    llama: Family, engine: Callable[..., Any], tmp_path: Path
) -> None:
    llm, adapters = engine(llama)
    tensors = load_file(llama.adapters / "mail" / "adapter_model.safetensors")
    name = "base_model.model.ept.lora_B.weight"

    def damaged(folder: str, values: dict[str, torch.Tensor]) -> Path:
        shutil.copytree(llama.adapters / "mail", tmp_path / folder)
        save_file(values, tmp_path / folder / "adapter_model.safetensors")
        return tmp_path / folder

    nan = tensors[name].clone()
    nan[3, 1] = float("nan")
    wide = torch.zeros(WIDTH + 1, tensors[name].shape[1])
    for folder, value, wrong in (
        ("nan", nan, "lora_B: expected finite values, got NaN or infinity"),
        ("wide", wide, r"lora_B: expected \[64, 2 \+ m\] with 2 as in lora_A, got \[65, 5\]"),
        ("whole", nan.to(torch.int32), "lora_B: expected a floating tensor"),
        ("large", torch.zeros(WIDTH, 99), "num_virtual_tokens: expected at most 9"),
    ):
        path = damaged(folder, {**tensors, name: value})
        with pytest.raises(CheckpointError, match="sha256: expected"):
            adapters.add(folder, path)
        # And if nobody looked at the files before.
        if folder != "whole":  # vLLM makes it one
            with pytest.raises((TypeError, ValueError), match=wrong):
                llm.llm_engine.add_lora(LoRARequest(folder, 50 + len(folder), str(path)))
    config = json.loads((llama.adapters / "mail" / "adapter_config.json").read_text())
    (tmp_path / "foreign").mkdir()
    del config["ept_fast"]
    (tmp_path / "foreign" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="ept_fast: expected what export_vllm"):
        adapters.add("foreign", tmp_path / "foreign")
    assert adapters.names == tuple(SIZES)
    asked = requests(10, seed=5)
    for each, output in zip(asked, generate(llm, adapters, asked), strict=True):
        assert tokens(output) == llama.answer(each), each


def test_arguments_of_an_engine(llama: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine_arguments(llama.model, llama.adapters, rank=6, max_adapters=2)
    assert made["additional_config"] == {
        "ept_fast": {"num_virtual_tokens": 9, "max_length": 64, "rank": 6}
    }
    assert made["max_loras"] == 2
    with pytest.raises(ValueError, match="rank: expected at most 3, for which the engine has room"):
        engine_arguments(llama.model, llama.adapters, rank=3)
    with pytest.raises(ValueError, match="enable_lora: expected none, as engine_arguments sets it"):
        engine_arguments(llama.model, llama.adapters, enable_lora=True)
    with pytest.raises(ValueError, match="num_virtual_tokens: expected an integer >= 1, got 0"):
        engine_arguments(llama.model, {})
    with pytest.raises(ValueError, match="rank, max_length: expected both or neither to be 0"):
        engine_arguments(llama.model, {}, num_virtual_tokens=2, rank=3)
    with pytest.raises(ValueError, match="max_adapters: expected an integer >= 1, got 0"):
        engine_arguments(llama.model, {}, num_virtual_tokens=2)
    made = engine_arguments(llama.model, {}, num_virtual_tokens=2, max_adapters=3)
    assert made["max_cpu_loras"] == 6
    monkeypatch.setattr(vllm, "__version__", "0.31.4+cpu")
    with pytest.raises(ImportError, match=r"vllm: expected .*0\.32\.0.*, got 0\.31\.4\+cpu"):
        engine_arguments(llama.model, llama.adapters)


def test_plain_embeddings_on_a_vllm_without_the_plugin(llama: Family, tmp_path: Path) -> None:
    """What ``export_plain`` says: exact without offsets on generated tokens, else not."""
    table = llama.ept.get_input_embeddings().weight.detach()
    asked, prompts, kinds = [], [], {}
    for i, name in enumerate(("plain", "given", "mail")):
        export_plain(llama.ept.prompts[name], tmp_path / name)
        plain = import_plain(tmp_path / name)
        kinds[name] = plain.offset_tokens
        for each in requests(10, seed=20 + i, names=(name,)):
            embeds = table[torch.tensor(each.ids)]
            if plain.offset is not None:
                embeds = embeds + plain.offset[: len(each.ids)]
            asked.append(each)
            prompts.append({"prompt_embeds": torch.cat([plain.prompt_embeds, embeds])})
    assert kinds == {"plain": "none", "given": "given", "mail": "all"}
    llm = vllm.LLM(model=str(llama.model), enable_prompt_embeds=True, **ENGINE)
    outputs = llm.generate(prompts, [sampling(each) for each in asked], use_tqdm=False)
    same: dict[str, list[bool]] = {name: [] for name in kinds}
    for each, output in zip(asked, outputs, strict=True):
        answer = llama.answer(each)
        assert tokens(output)[0] == answer[0]
        same[str(each.adapter)].append(tokens(output) == answer)
    assert all(same["plain"])
    assert all(same["given"])
    assert not any(same["mail"])
    end(llm)
