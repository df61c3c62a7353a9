"""Training steps of frozen language models with random weights: ours, PEFT's, DePT's way, none.

A method is a loss with the tensors that it trains, and a definition: the embeddings, mask and
labels that the backbone has to see, in plain PyTorch. Through the definition a step is checked on a
copy of the backbone in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bench.parity import Expected
from bench.peers import DEPT, PEFT, PEFT_TOKENS, dept_definition, dept_embeds
from bench.shapes import Shape
from bench.timing import Work
from ept_fast import EPTConfig, FusedEPTPrompt, reference

BACKBONE = "backbone"
MAX_LENGTH = 256

_TARGETS = 8  # tokens of an encoder-decoder's answer
_IGNORED = -100  # the label that a loss leaves out
_EXACT_ROWS = 4  # of the batch at once in float64, which takes the most memory


@dataclass(frozen=True)
class Backbone:
    """The sizes of a random model; ``layers`` is of each half of an encoder-decoder."""

    name: str
    kind: str
    hidden_size: int
    inner_size: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    batch: int

    @property
    def note(self) -> str:
        """What a reader of a row has to know of the model."""
        layers = f"{self.layers}+{self.layers}" if self.kind == "t5" else f"{self.layers}"
        kind = "t5 with gelu" if self.kind == "t5" else self.kind
        return f"random {kind}, {layers} layers, vocabulary {self.vocabulary}"


ON_GPU = (
    Backbone("t5-base", "t5", 768, 3072, 12, 12, 12, 32128, 32),
    Backbone("gpt-2", "gpt2", 768, 3072, 12, 12, 12, 50257, 32),
    Backbone("llama-1b", "llama", 2048, 8192, 16, 32, 8, 128256, 32),
)
# Widths are real, layers are cut. If every position has logits the vocabulary is cut as well, so
# that the head's share of the work stays about that of the full model.
ON_CPU = (
    replace(ON_GPU[0], layers=4, batch=8),
    replace(ON_GPU[1], layers=4, batch=8, vocabulary=16384),
    Backbone("llama-small", "llama", 1024, 4096, 2, 16, 4, 8192, 8),
)
QUICK = (
    Backbone("t5-tiny", "t5", 32, 64, 2, 4, 4, 64, 2),
    Backbone("gpt2-tiny", "gpt2", 32, 64, 2, 4, 4, 64, 2),
    Backbone("llama-tiny", "llama", 32, 64, 2, 4, 2, 64, 2),
)
# Rows from the first to the second number of real tokens, padded on the right.
LENGTHS = {"20-40": (20, 40), "256": (256, 256)}


def shape_of(backbone: Backbone, lengths: str) -> Shape:
    """The sizes of a row: our prompt's at this backbone."""
    config = our_config(backbone)
    shortest, longest = LENGTHS[lengths]
    return Shape(
        name=f"{backbone.name} {lengths}",
        batch=backbone.batch,
        length=longest,
        hidden_size=backbone.hidden_size,
        num_virtual_tokens=config.num_virtual_tokens,
        max_length=config.max_length,
        rank=config.rank,
        num_spaces=config.num_spaces,
        space_dim=config.space_dim,
        vocabulary=backbone.vocabulary,
        shortest=0 if shortest == longest else shortest,
    )


def our_config(backbone: Backbone) -> EPTConfig:
    """Ours at the budget of a plain prompt."""
    return EPTConfig.from_budget(backbone.hidden_size, PEFT_TOKENS, max_length=MAX_LENGTH)


def dept_config(backbone: Backbone) -> EPTConfig:
    """DePT at the budget of a plain prompt: no fusion, no subspaces, so a larger rank."""
    return EPTConfig.from_budget(
        backbone.hidden_size, PEFT_TOKENS, max_length=MAX_LENGTH, num_spaces=0, fusion=False
    )


def make_model(backbone: Backbone, dtype: torch.dtype, device: torch.device) -> Any:
    """A model with random weights, the same on every call, frozen and without dropout."""
    import transformers

    b = backbone
    sizes = {
        "t5": {
            "d_model": b.hidden_size,
            "d_ff": b.inner_size,
            "d_kv": b.hidden_size // b.heads,
            "num_layers": b.layers,
            "num_heads": b.heads,
            # Not ReLU: a unit that float32 puts on the other side of its kink than float64 changes
            # gradients by more than rounding does, and the parity check could not tell why.
            "feed_forward_proj": "gelu",
            "pad_token_id": 0,
            "decoder_start_token_id": 0,
        },
        "gpt2": {
            "n_embd": b.hidden_size,
            "n_inner": b.inner_size,
            "n_layer": b.layers,
            "n_head": b.heads,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        "llama": {
            "hidden_size": b.hidden_size,
            "intermediate_size": b.inner_size,
            "num_hidden_layers": b.layers,
            "num_attention_heads": b.heads,
            "num_key_value_heads": b.key_value_heads,
            "tie_word_embeddings": True,
        },
    }[b.kind]
    # No cache of keys and values: a training step has no use for one.
    config = transformers.AutoConfig.for_model(
        b.kind, **sizes, vocab_size=b.vocabulary, use_cache=False
    )
    auto: Any = transformers.AutoModelForCausalLM
    if b.kind == "t5":
        auto = transformers.AutoModelForSeq2SeqLM
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        model = auto.from_config(config, dtype=dtype)
    if b.kind == "gpt2":
        # What it falls back to by itself, with a warning that breaks a compiled graph apart.
        model.loss_type = "ForCausalLM"
    return model.eval().requires_grad_(False)


class Batch(NamedTuple):
    """``[B, S]`` ids and mask; labels: ``[B, S]`` of the text itself, or an answer's tokens."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def make_batch(backbone: Backbone, shape: Shape, device: torch.device) -> Batch:
    """Random rows, the same on every call; the first has the full length."""
    g = torch.Generator().manual_seed(0)

    def integers(low: int, high: int, *size: int) -> Tensor:
        return torch.randint(low, high, size, generator=g)

    lengths = integers(shape.shortest or shape.length, shape.length + 1, shape.batch, 1)
    lengths[0] = shape.length
    mask = (torch.arange(shape.length) < lengths).long()
    ids = integers(1, backbone.vocabulary, shape.batch, shape.length) * mask
    if backbone.kind == "t5":
        labels = integers(1, backbone.vocabulary, shape.batch, _TARGETS)
    else:
        labels = ids.masked_fill(mask == 0, _IGNORED)
    return Batch(ids.to(device), mask.to(device), labels.to(device))


class Seen(NamedTuple):
    """What a backbone is called with."""

    inputs_embeds: Tensor
    attention_mask: Tensor
    labels: Tensor


Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        trained: the tensors that a step changes.
        groups: the optimizer's; none if there is nothing to optimize.
        loss: of a batch.
        seen: from tensors like ``trained``, a batch and an embedding table, what the backbone sees
            by definition.
        note: sizes that differ from ours.
    """

    name: str
    trained: Tensors
    groups: list[dict[str, Any]]
    loss: Callable[[Batch], Tensor]
    seen: Callable[[Tensors, Batch, Tensor], Seen]
    note: str = ""


def make(name: str, model: Any, backbone: Backbone, batch: Batch) -> Method:
    """A method by name on this model; any name but those of the peers is that of our backend."""
    if name == PEFT:
        return _peft(model, backbone)
    if name == DEPT:
        return _dept(model, backbone)
    if name == BACKBONE:
        return _backbone_alone(model, backbone, batch)
    return _ours(name, model, backbone)


def _prompt(model: Any, backbone: Backbone, backend: str) -> FusedEPTPrompt:
    prompt = FusedEPTPrompt(
        our_config(backbone),
        model.get_input_embeddings(),
        init="random",
        generator=torch.Generator().manual_seed(0),
        backend=backend,
    )
    fill(dict(prompt.named_parameters()), model)
    return prompt


def embeds_by_definition(
    trained: Tensors, ids: Tensor, table: Tensor, scaling: float, mask: Tensor | None = None
) -> Tensor:
    """The prompt of these tensors before the text."""
    return reference.splice_prompt(
        reference.reconstruct_prompt(**trained, scaling=scaling),
        input_ids=ids,
        weight=table,
        **{name: tensor for name, tensor in trained.items() if name.startswith("offset")},
        scaling=scaling,
        attention_mask=mask,
    )


def _ours(backend: str, model: Any, backbone: Backbone) -> Method:
    prompt = _prompt(model, backbone, backend)
    m = prompt.config.num_virtual_tokens

    def loss(batch: Batch) -> Tensor:
        embeds, mask, positions = prompt(batch.input_ids, attention_mask=batch.attention_mask)
        options = {} if backbone.kind == "t5" else {"position_ids": positions}
        out: Tensor = model(
            inputs_embeds=embeds,
            attention_mask=mask,
            labels=_labels(backbone, batch, m),
            **options,
        ).loss
        return out

    def seen(trained: Tensors, batch: Batch, table: Tensor) -> Seen:
        ids, mask = batch.input_ids, batch.attention_mask
        embeds = embeds_by_definition(trained, ids, table, prompt.config.scaling, mask)
        return Seen(embeds, _mask(batch, m), _labels(backbone, batch, m))

    groups = prompt.parameter_groups(0.0, 0.0, 0.0)
    return Method(backend, dict(prompt.named_parameters()), groups, loss, seen)


def _dept(model: Any, backbone: Backbone) -> Method:
    """DePT's way: rows padded to the offset's whole length, an offset by column for all of it."""
    config = dept_config(backbone)
    m, n, r, d = config.num_virtual_tokens, config.max_length, config.rank, config.hidden_size
    table = model.get_input_embeddings().weight
    trained = {
        name: torch.empty(size, device=table.device, requires_grad=True)
        for name, size in {"short_prompt": (m, d), "offset_a": (n, r), "offset_b": (r, d)}.items()
    }
    fill(trained, model)

    def seen_by(embeds: Tensor, batch: Batch) -> Seen:
        after = n - batch.input_ids.shape[1]
        return Seen(embeds, _mask(batch, m, after), _labels(backbone, batch, m, after))

    def loss(batch: Batch) -> Tensor:
        embeds = dept_embeds(*trained.values(), config.scaling, batch.input_ids, table)
        out: Tensor = model(**seen_by(embeds, batch)._asdict()).loss
        return out

    def seen(trained: Tensors, batch: Batch, table: Tensor) -> Seen:
        tensors = trained.values()
        embeds = dept_definition(*tensors, config.scaling, batch.input_ids, table)
        return seen_by(embeds, batch)

    note = f"{m} tokens, rank {r}, text padded to {n}"
    return Method(DEPT, trained, [{"params": list(trained.values())}], loss, seen, note)


def _peft(model: Any, backbone: Backbone) -> Method:
    """The real library; its prompt goes before the encoder alone if there is a decoder."""
    import peft

    wrapped = peft.get_peft_model(
        model,
        peft.PromptTuningConfig(
            task_type="SEQ_2_SEQ_LM" if backbone.kind == "t5" else "CAUSAL_LM",
            num_virtual_tokens=PEFT_TOKENS,
            num_transformer_submodules=1,
        ),
    ).eval()
    (prompt,) = (p for p in wrapped.parameters() if p.requires_grad)
    trained = {"short_prompt": prompt}
    fill(trained, model)

    def loss(batch: Batch) -> Tensor:
        out: Tensor = wrapped(**batch._asdict()).loss
        return out

    def seen(trained: Tensors, batch: Batch, table: Tensor) -> Seen:
        trained = {name: tensor.to(table.dtype) for name, tensor in trained.items()}
        embeds = embeds_by_definition(trained, batch.input_ids, table, 1.0)
        return Seen(embeds, _mask(batch, PEFT_TOKENS), _labels(backbone, batch, PEFT_TOKENS))

    return Method(PEFT, trained, [{"params": [prompt]}], loss, seen, f"{PEFT_TOKENS} tokens")


def _backbone_alone(model: Any, backbone: Backbone, batch: Batch) -> Method:
    """The model on embeddings that are there already and get a gradient, nothing to optimize."""
    prompt = _prompt(model, backbone, "reference")
    m = prompt.config.num_virtual_tokens
    with torch.no_grad():
        embeds, mask, _ = prompt(batch.input_ids, attention_mask=batch.attention_mask)
    trained = {"inputs_embeds": embeds.requires_grad_()}
    labels = _labels(backbone, batch, m)

    def loss(batch: Batch) -> Tensor:
        out: Tensor = model(**Seen(embeds, mask, labels)._asdict()).loss
        return out

    def seen(trained: Tensors, batch: Batch, table: Tensor) -> Seen:
        return Seen(trained["inputs_embeds"], mask, labels)

    return Method(BACKBONE, trained, [], loss, seen, f"no prompt path, {m} tokens before the text")


@torch.no_grad()
def fill(trained: Tensors, model: Any) -> None:
    """Values such that every tensor has a gradient and the offset is half an embedding's size; a
    fresh prompt has zeros, which hide errors."""
    table = model.get_input_embeddings().weight
    size, d = table[:4096].float().std().item(), table.shape[1]
    scales = {
        "short_prompt": size,
        "offset_a": 1 / 16,
        "offset_b": size,
        "space_down": d**-0.5,
        "space_up": 0.5,
        "gate_weight": 1 / (size * d**0.5),
        "gate_bias": 1.0,
    }
    g = torch.Generator().manual_seed(1)
    for name, tensor in trained.items():
        tensor.copy_(torch.randn(tensor.shape, generator=g) * scales[name])


def _mask(batch: Batch, before: int, after: int = 0) -> Tensor:
    return F.pad(F.pad(batch.attention_mask, (before, 0), value=1), (0, after))


def _labels(backbone: Backbone, batch: Batch, before: int, after: int = 0) -> Tensor:
    if backbone.kind == "t5":
        return batch.labels
    return F.pad(batch.labels, (before, after), value=_IGNORED)


# Parity


class Doubles(TorchFunctionMode):
    """Models take norms and softmaxes in float32, also of tensors in float64; here these stay."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = tuple(_double(a) for a in args)
            kwargs = {name: _double(a) for name, a in kwargs.items()}
        return func(*args, **kwargs)


def _double(argument: Any) -> Any:
    return torch.float64 if argument is torch.float32 else argument


def exact_copy(model: Any) -> Any:
    """The same model with its weights in float64."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    return model


def expected_of(method: Method, model: Any, exact: Any, batch: Batch) -> Expected:
    """Loss and gradients by the method's definition, on ``exact``, a copy of the model in float64,
    and on the model as it is.

    A single number can be exact by luck, so plain PyTorch's error in the loss is taken to be that
    in the loss of the worst row.
    """
    with Doubles():
        doubles = {n: t.detach().double().requires_grad_() for n, t in method.trained.items()}
        exactly, exact_rows = _by_definition(method, doubles, exact, batch, _EXACT_ROWS)
    same = {n: t.detach().requires_grad_() for n, t in method.trained.items()}
    plain, rows = _by_definition(method, same, model, batch, len(batch.input_ids))
    plain["loss"] = exactly["loss"] + (rows - exact_rows).abs().max()
    return Expected(exactly, {**_rounded(plain, model), "loss": plain["loss"]})


def results(method: Method, model: Any, batch: Batch) -> Tensors:
    """Loss and gradients as the method computes them, for :func:`bench.parity.compare`."""
    value = method.loss(batch)
    grads = torch.autograd.grad(value, list(method.trained.values()))
    return _rounded({"loss": value.detach(), **_named(method, grads)}, model)


def _by_definition(
    method: Method, trained: Tensors, model: Any, batch: Batch, at_once: int
) -> tuple[Tensors, Tensor]:
    """Loss and gradients, summed over so many rows of the batch at once; and the loss of each."""
    embeds, mask, labels = method.seen(trained, batch, model.get_input_embeddings().weight)
    grads, sums, counts = [], [], []
    total = (_answers(model, labels) != _IGNORED).sum()
    for first in range(0, len(embeds), at_once):
        part = slice(first, first + at_once)
        text = embeds[part].detach().requires_grad_()
        losses = _losses(model, text, mask[part], labels[part])
        grads += torch.autograd.grad(losses.sum() / total, text)
        sums.append(losses.detach().double().sum(1))
        counts.append((_answers(model, labels[part]) != _IGNORED).sum(1))
    rows = torch.cat(sums)
    leaves = list(trained.values())
    found = torch.autograd.grad(embeds, leaves, torch.cat(grads))
    return {"loss": rows.sum() / total, **_named(method, found)}, rows / torch.cat(counts)


def _answers(model: Any, labels: Tensor) -> Tensor:
    """The labels that a loss is taken at: of text itself, those after the first."""
    return labels if model.config.is_encoder_decoder else labels[:, 1:]


def _losses(model: Any, embeds: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of each label, written out: no use is made of the model's own loss."""
    options = {"inputs_embeds": embeds, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        start = model.config.decoder_start_token_id
        options["decoder_input_ids"] = F.pad(labels[:, :-1], (1, 0), value=start)
    answers = _answers(model, labels)
    logits = model(**options).logits[:, : answers.shape[1]]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), answers.flatten(), reduction="none").view_as(
        answers
    )


def _named(method: Method, grads: Any) -> Tensors:
    return dict(zip(method.trained, grads, strict=True))


def _rounded(values: Tensors, model: Any) -> Tensors:
    """In the backbone's type: none of it is known better than the backbone computes."""
    return {name: value.to(model.dtype) for name, value in values.items()}


# The step


def step(method: Method, batch: Batch) -> Work:
    """Loss, backward, AdamW and clearing of the gradients.

    The learning rate is 0: AdamW does all of its work and every step is that of the same values.
    """
    optimizer = torch.optim.AdamW(method.groups, lr=0.0) if method.groups else None

    def call(batch: Batch) -> Tensor:
        value = method.loss(batch)
        value.backward()
        if optimizer is not None:
            optimizer.step()
        for tensor in method.trained.values():
            tensor.grad = None
        return value

    return Work(lambda i: batch, call)
