"""What a training step at the sizes of a model with 1.2 billion parameters takes in memory.

``python -m bench.memory_report`` prints the tables of ``docs/memory.md``.
The step is the wrapper's own, run on tensors without data: PyTorch's fake tensors have a type, a
shape and a lifetime, so every tensor of the step is counted and none is allocated. What an operator
allocates inside itself is not seen. Attention is the fused kernel's, which keeps no S×S matrix.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.memory import PromptStep
from ept_fast import EPTConfig

PAGE = Path(__file__).parent.parent / "docs" / "memory.md"


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of the storages that operators make and that are still there.

    Attributes:
        now: bytes of them.
        peak: the most there has been.
    """

    def __init__(self, there: Iterable[Tensor] = (), left_out: Iterable[Tensor] = ()) -> None:
        """Tensors that are there already: those that are counted, and those that are not."""
        super().__init__()
        self.now = self.peak = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in left_out}
        for tensor in there:
            self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += self._sizes[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


@dataclass(frozen=True)
class Model:
    """A decoder's sizes, as its config names them, and a batch."""

    name: str
    config: dict[str, Any]
    batch: int
    length: int


LLAMA_1B = Model(
    "Llama-3.2-1B",
    {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    batch=4,
    length=512,
)


@contextmanager
def without_data() -> Iterator[None]:
    """Fake tensors, of which no values are asked, and kernels that are not launched."""
    runtime = "ept_fast.backends.triton.runtime"
    not_launched = patch(f"{runtime}.Plan.launch_all", lambda *arguments: None)
    # There are no addresses whose alignment could be asked.
    facts = patch(
        f"{runtime}.facts_of", lambda tensors: tuple(t if t is None else t.shape for t in tensors)
    )
    # Ids have no values that could be out of range.
    unchecked = patch("ept_fast.ops.path.values_are_checked", return_value=False)
    with FakeTensorMode(), not_launched, facts, unchecked:
        yield


@dataclass(frozen=True)
class Measured:
    """Bytes beside the frozen weights: what forward leaves for backward, and a step at its most.

    The prompt's own parameters and the optimizer's state are in both.
    """

    kept: int
    peak: int


def backbone_of(model: Model) -> Any:
    """The model with a type, shapes and no data."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**model.config)
    backbone = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return backbone.requires_grad_(False).eval()


def measure(model: Model, prompt: EPTConfig, checkpointing: bool = False) -> Measured:
    """Two steps of the wrapper; in the second the optimizer has its state from the beginning."""
    from ept_fast import get_ept_model

    with without_data():
        backbone = backbone_of(model)
        wrapped = get_ept_model(backbone, prompt, "CAUSAL_LM", backend="triton")
        if checkpointing:
            wrapped.gradient_checkpointing_enable()
        ids = torch.zeros(model.batch, model.length, dtype=torch.int64)
        parameters = list(wrapped.prompt.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, foreach=False)
        with LiveTensors(parameters, [*backbone.parameters(), *backbone.buffers(), ids]) as live:
            for _ in range(2):
                loss = wrapped(input_ids=ids, labels=ids).loss
                kept = live.now
                loss.backward()
                del loss
                optimizer.step()
                optimizer.zero_grad()
        return Measured(kept, live.peak)


def measure_backbone(model: Model, m: int, checkpointing: bool = False) -> Measured:
    """The same model and loss on embeddings of m positions more, whose gradient is asked for."""
    from ept_fast.transformers.checkpointing import Checkpointing
    from ept_fast.transformers.outputs import token_loss

    with without_data():
        backbone = backbone_of(model)
        if checkpointing:
            switches = Checkpointing()
            switches.backbone, switches.training = backbone, True
            switches.gradient_checkpointing_enable()
        shape = model.batch, m + model.length
        # The text's logits, and those of the prompt's last position.
        labels = torch.zeros(model.batch, model.length + bool(m), dtype=torch.int64)
        mask = torch.ones(*shape, dtype=torch.int64)
        positions = mask.cumsum(1)
        zero = torch.zeros((), dtype=torch.bfloat16, requires_grad=True)
        before = [*backbone.parameters(), *backbone.buffers(), labels, mask, positions, zero]
        with LiveTensors(left_out=before) as live:
            output = backbone(
                # Held by nobody but the model, as what a prompt makes.
                inputs_embeds=zero + zero.new_zeros(*shape, model.config["hidden_size"]),
                attention_mask=mask,
                position_ids=positions,
                use_cache=False,
                logits_to_keep=labels.shape[1],
            )
            loss = token_loss(output.logits, labels)
            del output
            kept = live.now
            loss.backward()
        return Measured(kept, live.peak)


def mb(size: float) -> str:
    """In 10⁶ bytes."""
    return f"{size / 1e6:,.2f}" if size < 1e8 else f"{size / 1e6:,.0f}"


def _table(header: str, rows: Iterable[Iterable[str]]) -> str:
    count = header.count("|") + 1
    lines = [f"| {header} |", "|---|" + "---:|" * (count - 1)]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


# A prompt of the trained parameters of 100 tokens, in 20.
M = 20
EPT = EPTConfig.from_budget(2048, 100, num_virtual_tokens=M, max_length=512)
PLAIN = EPTConfig(2048, num_virtual_tokens=100, max_length=512, rank=0, num_spaces=0)


def share_table() -> str:
    """The prompt's share by the formula: no library's version matters to it."""
    step = PromptStep(
        EPT, LLAMA_1B.batch, LLAMA_1B.length, torch.bfloat16, padding="side", backend="triton"
    )
    kernels = step.of_kernels
    rows = [
        ("parameters, float32 (N·p)", step.parameter_bytes),
        ("their gradients", step.parameter_bytes),
        ("AdamW's moments", step.optimizer_bytes),
        ("saved between forward and backward", step.saved_bytes),
        ("output, bfloat16 (E)", step.output_bytes),
        ("its gradient", step.output_bytes),
        ("workspace of the forward", kernels.forward),
        ("workspace of the backward", kernels.backward),
        ("**at once at most, without the backbone**", step.peak),
    ]
    return _table("part | MB", [(name, mb(size)) for name, size in rows])


def model_table() -> str:
    """The whole step, measured without data."""
    steps: dict[str, Callable[[bool], Measured]] = {
        f"backbone alone, {LLAMA_1B.length} positions": lambda c: measure_backbone(LLAMA_1B, 0, c),
        f"backbone alone, {M + LLAMA_1B.length} positions": lambda c: measure_backbone(
            LLAMA_1B, M, c
        ),
        f"EPT, {M} tokens and the offset": lambda c: measure(LLAMA_1B, EPT, c),
        "prompt tuning, 100 tokens": lambda c: measure(LLAMA_1B, PLAIN, c),
    }
    rows = []
    for name, step in steps.items():
        plain, checkpointed = step(False), step(True)
        rows.append(
            (name, *map(mb, (plain.kept, plain.peak, checkpointed.kept, checkpointed.peak)))
        )
    header = "step | kept | peak | kept, checkpointing | peak, checkpointing"
    with without_data():
        weights = sum(p.nbytes for p in backbone_of(LLAMA_1B).parameters())
    versions = ", ".join(f"{x} {version(x).partition('+')[0]}" for x in ("torch", "transformers"))
    note = f"The frozen weights, {mb(weights)} MB, come on top of each. {versions}."
    return f"{_table(header, rows)}\n\n{note}"


if __name__ == "__main__":
    # The kernels are not launched, but their module is imported, also without a GPU.
    os.environ["TRITON_INTERPRET"] = "1"
    print(f"{share_table()}\n\n{model_table()}")
