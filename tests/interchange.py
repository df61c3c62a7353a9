"""Tiny models and adapters of other libraries' kinds, for the tests of import and export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ept_fast import EPTConfig, FusedEPTPrompt

D = 16
VOCABULARY = 50
M, N, R = 3, 12, 2

DEPT_CONFIG: dict[str, Any] = {
    "base_model_name_or_path": "t5-tiny",
    "bias": "none",
    "hidden_size": 768,  # DePT's default, which it never reads
    "inference_mode": True,
    "init_lora_weights": True,
    "load_lora_embedding_B": True,
    "load_lora_embeddings": True,
    "lora_alpha": 8,
    "max_length": N,
    "num_attention_heads": 2,
    "num_layers": 2,
    "num_transformer_submodules": 1,
    "num_virtual_tokens": M,
    "peft_type": "PROMPT_TUNING_LORA",
    "prompt_tuning_init": "TEXT",
    "prompt_tuning_init_text": "Classify this text:",
    "r": R,
    "revision": None,
    "save_lora_embeddings": True,
    "task_type": "SEQ_2_SEQ_LM",
    "token_dim": D,
    "tokenizer_name_or_path": "t5-tiny",
}

PEFT_CONFIG: dict[str, Any] = {
    "base_model_name_or_path": "llama-tiny",
    "inference_mode": True,
    "num_transformer_submodules": 1,
    "num_virtual_tokens": M,
    "peft_type": "PROMPT_TUNING",
    "task_type": "CAUSAL_LM",
    "token_dim": D,
}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values that a seed decides."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def dept_state(config: dict[str, Any]) -> dict[str, Tensor]:
    """Random tensors of the sizes in a DePT config, under the names that DePT saves."""
    rows = config["num_virtual_tokens"] * config["num_transformer_submodules"]
    return {
        "prompt_embeddings": random(rows, config["token_dim"], seed=1),
        "prompt_encoder.lora_embedding_A": random(config["max_length"], config["r"], seed=2),
        "prompt_encoder.lora_embedding_B": random(config["r"], config["token_dim"], seed=3),
    }


def peft_state(config: dict[str, Any]) -> dict[str, Tensor]:
    """A random prompt of the sizes in a PEFT config."""
    rows = config["num_virtual_tokens"] * config["num_transformer_submodules"]
    return {"prompt_embeddings": random(rows, config["token_dim"], seed=4)}


def save_adapter(
    folder: Path, config: dict[str, Any], state: Any, *, pickled: bool = False
) -> Path:
    """The two files as PEFT and DePT write them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    if pickled:
        torch.save(state, folder / "adapter_model.bin")
    else:
        save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def make_prompt(
    embedding: nn.Module | None = None, *, seed: int = 5, num_tasks: int | None = None, **sizes: Any
) -> FusedEPTPrompt:
    """An EPT prompt with every parameter at random."""
    values = {"num_virtual_tokens": M, "max_length": N, "rank": R, "num_spaces": 2, "space_dim": 2}
    config = EPTConfig(D, **{**values, **sizes})
    rows = torch.zeros(config.num_virtual_tokens + config.rank, D)
    prompt = FusedEPTPrompt(config, embedding, init=rows, num_tasks=num_tasks)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return prompt


def tiny_t5(**changes: Any) -> Any:
    """A random T5 of one layer."""
    import transformers

    values = {"vocab_size": VOCABULARY, "d_model": D, "d_kv": 8, "d_ff": 32, "num_heads": 2}
    values |= {"num_layers": 1, "decoder_start_token_id": 0, "dropout_rate": 0.0}
    return _strong(transformers.T5ForConditionalGeneration, transformers.T5Config, values, changes)


def tiny_llama(**changes: Any) -> Any:
    """A random Llama of one layer."""
    import transformers

    values = {"vocab_size": VOCABULARY, "hidden_size": D, "intermediate_size": 32}
    values |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    return _strong(transformers.LlamaForCausalLM, transformers.LlamaConfig, values, changes)


def tiny_bert(**changes: Any) -> Any:
    """A random BERT of one layer with a head for three classes."""
    import transformers

    values = {"vocab_size": VOCABULARY, "hidden_size": D, "intermediate_size": 32}
    values |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 3}
    values |= {"max_position_embeddings": 64}
    model = transformers.BertForSequenceClassification
    return _strong(model, transformers.BertConfig, values, changes)


def _strong(
    model: Callable[..., Any], config: Callable[..., Any], values: Any, changes: Any
) -> Any:
    """Weights at which every token shows in the logits."""
    torch.manual_seed(0)
    built = model(config(**{**values, **changes})).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.5)
    return built.requires_grad_(False)
