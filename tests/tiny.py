"""Tiny models with word tokenizers, and tasks that they can learn, for the training tests."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

GOOD = ("fine", "great", "lovely", "warm", "bright")
BAD = ("awful", "bleak", "cold", "dull", "grim")
PLAIN = ("the", "a", "play", "song", "walk", "soup", "was", "is", "and", "very", "rather")
ANSWERS = ("bad it is", "yes good")


def save_model(folder: Path, *, words: Collection[str] = (), **choices: Any) -> Path:
    """A BERT of width 32 with random weights and a word tokenizer, saved in ``folder``.

    ``words`` are in its vocabulary besides those of the tasks here.
    """
    import transformers

    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *PLAIN]
    words = [*known, *sorted(set(words) - set(known))]
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


def save_word_tokenizer(
    folder: Path, *, start: bool, end: bool, padding: bool, words: Collection[str] = ()
) -> int:
    """A tokenizer of words, saved in ``folder``; its number of ids.

    Ids 0, 1 and 2 are padding, start and end.

    Args:
        folder: where to.
        start, end: whether a text gets the start and the end token.
        padding: whether the tokenizer knows of its padding token.
        words: further words of its vocabulary.
    """
    import tokenizers
    import transformers

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    known = [*special, *GOOD, *BAD, *PLAIN, "yes", "good", "bad", "it", ":"]
    words = [*known, *sorted(set(words) - set(known))]
    vocabulary = {word: i for i, word in enumerate(words)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    single = ["<s>"] * start + ["$A"] + ["</s>"] * end
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single=" ".join(single), special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>" if padding else None,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    tokenizer.save_pretrained(folder)
    return len(words)


def save_t5(folder: Path, *, steps: int = 120, words: Collection[str] = (), **choices: Any) -> Path:
    """A T5 of width 32, taught for some steps; its tokenizer ends every text."""
    import transformers

    size = save_word_tokenizer(folder, start=False, end=True, padding=True, words=words)
    torch.manual_seed(7)
    config = transformers.T5Config(
        vocab_size=size,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
        **{
            "d_model": 32,
            "d_kv": 16,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 2,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 16,
            **choices,
        },
    )
    _teach(transformers.T5ForConditionalGeneration(config), folder, steps).save_pretrained(folder)
    return folder


def save_llama(
    folder: Path, *, steps: int = 80, words: Collection[str] = (), **choices: Any
) -> Path:
    """A Llama of width 32, taught for some steps; its tokenizer starts texts and cannot pad."""
    import transformers

    size = save_word_tokenizer(folder, start=True, end=False, padding=False, words=words)
    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        vocab_size=size,
        pad_token_id=None,
        bos_token_id=1,
        eos_token_id=2,
        **{
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.15,
            **choices,
        },
    )
    _teach(transformers.LlamaForCausalLM(config), folder, steps).save_pretrained(folder)
    return folder


def _teach(model: Any, folder: Path, steps: int) -> Any:
    """Train the whole model to answer a text behind the word "it", and any other with "very".

    A prompt then has something to bring out of it, as of a pretrained model: the part of the word.
    """
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model.eval()  # no dropout
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(steps):
        rows = []
        for index, row in enumerate(task_rows(32, 1000 + step)):
            asked = index // 2 % 2
            text = f"it : {row['text']}" if asked else row["text"]
            answer = ANSWERS[row["label"]] if asked else "very"
            target = tokenizer(answer, add_special_tokens=False)["input_ids"]
            rows.append((tokenizer(text)["input_ids"], [*target, 2]))
        if not model.config.is_encoder_decoder:
            rows = [(text + target, [-100] * len(text) + target) for text, target in rows]
        ids, labels = (list(column) for column in zip(*rows, strict=True))
        inputs = _padded(ids, -1)
        loss = model(
            input_ids=inputs.clamp_min(0),
            attention_mask=(inputs >= 0).long(),
            labels=_padded(labels, -100),
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


def _padded(rows: list[list[int]], filler: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])


def answer_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """The rows of :func:`task_rows` with an answer of two or three words in place of a label."""
    return [
        {"text": row["text"], "target": ANSWERS[row["label"]]} for row in task_rows(count, seed)
    ]


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


def save_task(folder: Path, rows: Callable[[int, int], list[dict[str, Any]]] = task_rows) -> Path:
    """``train.jsonl`` of 96 and ``validation.jsonl`` and ``test.jsonl`` of 40 rows."""
    for seed, (split, count) in enumerate({"train": 96, "validation": 40, "test": 40}.items()):
        write_rows(folder / f"{split}.jsonl", rows(count, seed))
    return folder


def train(settings: dict[str, Any], **how: Any) -> dict[str, Any]:
    """The metrics of a run of these arguments of a TrainConfig, which says nothing meanwhile."""
    from ept_fast.training.config import TrainConfig
    from ept_fast.training.job import train as run

    return run(TrainConfig(**settings), progress=False, **how)


def random_states() -> tuple[Any, ...]:
    """What torch, Python and numpy draw from where no generator is named."""
    kind, keys, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), kind, list(keys), rest


def options(settings: dict[str, Any]) -> list[str]:
    """The words of the command line for these arguments of a TrainConfig."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]


def tensors_of(output: Path) -> dict[str, torch.Tensor]:
    """The tensors of a run's adapter."""
    files = sorted((output / "adapter").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def weights_of(output: Path) -> dict[str, bytes]:
    """The same, to the bit."""
    return {name: tensor.numpy().tobytes() for name, tensor in tensors_of(output).items()}


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
