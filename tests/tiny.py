"""A tiny random encoder with a tokenizer, and a task that it can learn, for the training tests."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

GOOD = ("fine", "great", "lovely", "warm", "bright")
BAD = ("awful", "bleak", "cold", "dull", "grim")
PLAIN = ("the", "a", "play", "song", "walk", "soup", "was", "is", "and", "very", "rather")


def save_model(folder: Path, **choices: Any) -> Path:
    """A BERT of width 32 with random weights and a word tokenizer, saved in ``folder``."""
    import transformers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *PLAIN]
    tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    tokenizer.save_pretrained(folder)
    torch.manual_seed(7)
    config = transformers.BertConfig(
        vocab_size=len(words),
        **{
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 64,
            "initializer_range": 0.15,  # the default is too weak to carry a word that far
            **choices,
        },
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def task_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows of 3 to 12 plain words with one good (label 1) or bad (label 0) word among them."""
    draw = random.Random(seed)
    rows = []
    for index in range(count):
        words = draw.choices(PLAIN, k=draw.randint(3, 12))
        words.insert(draw.randrange(len(words)), draw.choice(GOOD if index % 2 else BAD))
        rows.append({"text": " ".join(words), "label": index % 2})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_task(folder: Path) -> Path:
    """``train.jsonl`` of 96 and ``validation.jsonl`` and ``test.jsonl`` of 40 rows."""
    for seed, (split, count) in enumerate({"train": 96, "validation": 40, "test": 40}.items()):
        write_rows(folder / f"{split}.jsonl", task_rows(count, seed))
    return folder


def small_run(model: Path, data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Arguments of a TrainConfig that takes a second or two."""
    return {
        "model": str(model),
        "data": str(data),
        "output": str(output),
        "prompt_length": 24,
        "num_virtual_tokens": 4,
        "max_length": 16,
        "num_spaces": 2,
        "space_dim": 2,
        "batch_size": 8,
        "max_steps": 30,
        "eval_steps": 10,
        "prompt_lr": 2e-2,
        "offset_lr": 1e-2,
        "space_lr": 1e-2,
        "head_lr": 3e-2,
        "device": "cpu",
        **changes,
    }
