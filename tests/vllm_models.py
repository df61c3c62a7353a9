"""Tiny decoders with adapters of several sizes, saved for vLLM, and what they answer without it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ept_fast import EPTConfig, export_vllm, get_ept_model

VOCABULARY = 199
WIDTH = 64

# m, r and n of each; one has no offset, and the offset of another ends before its answers do.
SIZES = {"long": (9, 1, 64), "mail": (3, 2, 64), "plain": (4, 0, 64), "short": (5, 4, 24)}

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": WIDTH,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 256,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# By architecture: its model type, and what is not as in _SHAPE.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2LMHeadModel": ("gpt2", {}),
    "Gemma2ForCausalLM": ("gemma2", {"sliding_window": 32}),
    "GemmaForCausalLM": ("gemma", {}),
    "LlamaForCausalLM": ("llama", {}),
    "MistralForCausalLM": ("mistral", {"sliding_window": None}),
    "Qwen2ForCausalLM": ("qwen2", {}),
    "Qwen3ForCausalLM": ("qwen3", {}),
}


class Asked(NamedTuple):
    """A request: its adapter, or None, its text and how many tokens are to follow."""

    adapter: str | None
    ids: list[int]
    new: int


class Family:
    """A model of an architecture, with the adapters of :data:`SIZES`, another for ``mail``, and
    one whose offsets are for given tokens only, which is not exported.

    Args:
        folder: where ``model``, ``adapters`` and ``others`` are saved.
        architecture: of :data:`FAMILIES`.
    """

    def __init__(self, folder: Path, architecture: str) -> None:
        import transformers

        kind, own = FAMILIES[architecture]
        shape = _GPT2 if kind == "gpt2" else _SHAPE
        config = transformers.AutoConfig.for_model(kind, **{**shape, **own})
        torch.manual_seed(3)
        plain = transformers.AutoModelForCausalLM.from_config(config)
        assert type(plain).__name__ == architecture
        self.folder = folder
        self.model, self.adapters = folder / "model", folder / "adapters"
        self.other = folder / "others" / "mail"
        plain.save_pretrained(self.model)
        self.ept: Any = None
        for name in SIZES:
            self._add(name, SIZES[name])
            export_vllm(self.ept.prompts[name], self.adapters / name)
        self._add("other", (7, 3, 64))
        export_vllm(self.ept.prompts["other"], self.other)
        self._add("given", (6, 3, 64), offset_tokens="given")
        self.ept.eval()

    def _add(self, name: str, sizes: tuple[int, int, int], **choices: Any) -> None:
        m, r, n = sizes
        shape = {"num_virtual_tokens": m, "rank": r, "max_length": n, "num_spaces": 2}
        config = EPTConfig(WIDTH, **shape, **choices)
        if self.ept is None:
            self.ept = get_ept_model(self._plain_model(), config, "CAUSAL_LM", adapter_name=name)
        else:
            self.ept.add_adapter(name, config)
        draw = torch.Generator().manual_seed(len(self.ept.prompts))
        with torch.no_grad():
            for parameter in self.ept.prompts[name].parameters():
                parameter.normal_(0, 0.4, generator=draw)

    def _plain_model(self) -> Any:
        import transformers

        return transformers.AutoModelForCausalLM.from_pretrained(self.model)

    def answer(self, asked: Asked) -> list[int]:
        """What ``EPTModel.generate`` adds, greedily, whether it ends the text or not."""
        ids = torch.tensor([asked.ids])
        kind: dict[str, Any] = {"max_new_tokens": asked.new, "do_sample": False}
        kind["eos_token_id"] = None
        if asked.adapter is None:
            with self.ept.disable_adapter():
                out = self.ept.generate(ids, **kind)
        else:
            self.ept.set_adapter(asked.adapter)
            out = self.ept.generate(ids, **kind)
        return list(out[0, ids.shape[1] :].tolist())


def requests(
    number: int, seed: int, names: Sequence[str | None] = (None, *SIZES), longest: int = 24
) -> list[Asked]:
    """Requests of all adapters and of none, some with a beginning that others have too."""
    draw = random.Random(seed)

    def text(length: int) -> list[int]:
        return [draw.randrange(3, VOCABULARY) for _ in range(length)]

    start = text(longest)
    asked = []
    for i in range(number):
        length = draw.randrange(1, longest + 1)
        shared = start[:length] if draw.random() < 0.5 else []
        ids = (shared + text(length))[:length]
        asked.append(Asked(names[i % len(names)], ids, draw.randrange(8, 33)))
    return asked
