"""Every architecture: what a row's tokens get does not depend on anything around the row.

Each row alone, without padding, goes through an untouched model behind embeddings that METHOD's
equations give in plain PyTorch. The wrapper has to give the same for any padding, batch, backend
and folding, with all tensors of the adapter filled, in training mode and with the model's dropout
on. Almost all of it in float64, where a defect cannot pass for rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from ept_fast import EPTConfig, get_ept_model, reference
from ept_fast.transformers.tasks import EPTModel
from tests.architectures import (
    ARCHITECTURES,
    BOTH,
    BY_NAME,
    DECODER,
    ENCODER,
    FURTHER,
    UNFIT,
    VOCABULARY,
    Architecture,
    in_float64,
)
from tests.parity import needs_interpreter
from tests.support import marks

# PEFT asks transformers for it by its old name.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated and will be removed:FutureWarning"
)

EXACT = {"rtol": 0.0, "atol": 1e-10}
LABELS = ("one", "two", "three")
M, N = 3, 16  # prompt and longest text
LENGTHS = (9, 1, 6)
TARGETS = 4  # tokens of an encoder-decoder's answer
PLACES = ("right", "left", "both", "holes")


class Row(NamedTuple):
    """One text: ``[S]`` ids and types, and the ``[T]`` ids of an answer."""

    ids: Tensor
    types: Tensor
    answer: Tensor


class Batch(NamedTuple):
    """Padded rows: ``[B, W]`` each, ``[B, T]`` answers and, of each row, its real columns."""

    ids: Tensor
    mask: Tensor
    types: Tensor
    answers: Tensor
    columns: list[Tensor]


@dataclass(frozen=True)
class Way:
    """An architecture for a task: the model's own head, or a linear one with this pooling."""

    name: str
    task: str
    head: str = "model"

    @property
    def architecture(self) -> Architecture:
        return BY_NAME[self.name]

    @property
    def bare(self) -> bool:
        return self.head != "model"

    def __str__(self) -> str:
        return f"{self.name}-{self.task}" + (f"-{self.head}" if self.bare else "")


def ways_of(architecture: Architecture) -> list[Way]:
    """Each task of an architecture, classification also by a linear head of ours."""
    pooling = {ENCODER: "mean", DECODER: "last", BOTH: "first"}[architecture.kind]
    found = [
        Way(architecture.name, "SEQ_CLS", pooling),
        Way(architecture.name, "TOKEN_CLS", "linear"),
    ]
    for task in architecture.tasks:
        if architecture.kind != BOTH or not task.endswith("CLS"):
            found.append(Way(architecture.name, task))
    return found


WAYS = [way for architecture in (*ARCHITECTURES, *FURTHER) for way in ways_of(architecture)]


def each_way(column: str, keep: Callable[[Way], bool] = lambda way: True) -> Any:
    """Parametrise a test of a column of the support matrix."""
    return pytest.mark.parametrize(
        "way",
        [
            pytest.param(way, id=str(way), marks=marks(way.name, way.task, column))
            for way in WAYS
            if keep(way)
        ],
    )


@dataclass
class Trial:
    """The wrapped model, an untouched copy, rows, and what each row's tokens have to get."""

    way: Way
    model: EPTModel
    plain: Any
    rows: list[Row]
    expected: list[Tensor] = field(default_factory=list)

    def tensors(self) -> dict[str, Tensor]:
        """The adapter's tensors."""
        return dict(self.model.prompt.named_parameters())


@torch.no_grad()
def fill(made: Trial, seed: int = 3) -> None:
    """Give all tensors of the prompt and the head values that show in the logits."""
    draw = torch.Generator().manual_seed(seed)
    model = made.model
    for name, tensor in (*model.prompt.named_parameters(), *model.heads.named_parameters()):
        if name != "short_prompt":
            value = 0.4 * torch.randn(tensor.shape, generator=draw, dtype=torch.float64)
            tensor += value.to(tensor.dtype)
    if isinstance(model.head, nn.ModuleDict):  # what stands in the untouched model in its place
        for name, module in model.head.items():
            getattr(made.plain, name).load_state_dict(module.state_dict())


def rows_for(plain: Any, lengths: tuple[int, ...] = LENGTHS, seed: int = 5) -> list[Row]:
    """Random texts; token types where the model has more than one."""
    draw = torch.Generator().manual_seed(seed)
    kinds = max(1, getattr(plain.config, "type_vocab_size", None) or 1)
    return [
        Row(
            torch.randint(3, VOCABULARY, (length,), generator=draw),
            torch.randint(kinds, (length,), generator=draw),
            torch.randint(3, VOCABULARY, (TARGETS,), generator=draw),
        )
        for length in lengths
    ]


def make_trial(way: Way, *, dtype: torch.dtype = torch.float64, **choices: Any) -> Trial:
    """A trial whose parameters are in float64, or float32 for a model in lower precision."""
    build = way.architecture.build
    raw = build(way.task, bare=way.bare, dtype=dtype, **choices.pop("changes", {}))
    plain = copy.deepcopy(raw).eval()
    config = EPTConfig(
        way.architecture.width, M, max_length=N, rank=2, num_spaces=2, space_dim=3, alpha=2.0
    )
    if way.bare:
        choices["labels"] = LABELS
        choices["pooling"] = way.head if way.task == "SEQ_CLS" else None
    parameters = torch.promote_types(dtype, torch.float32)
    generator = torch.Generator().manual_seed(1)
    model = get_ept_model(
        raw,
        choices.pop("config", config),
        way.task,
        generator=generator,
        dtype=parameters,
        **choices,
    )
    if way.bare:
        model.heads.to(parameters)  # a copy of the model's own has the model's type
    model.heads.eval()  # in training their own dropout is on, as it should be
    return Trial(way, model, plain, rows_for(plain))


@cache
def trial(way: Way) -> Trial:
    """The trial that most tests share, which they leave as it is."""
    made = make_trial(way)
    fill(made)
    with torch.no_grad():
        made.expected = [defined(made, made.tensors(), row) for row in made.rows]
    return made


def defined(made: Trial, tensors: dict[str, Tensor], row: Row) -> Tensor:
    """What METHOD and the untouched model give a row alone: ``[S, C]``, ``[T, V]`` or ``[C]``."""
    output = plain_output(made, tensors, row)
    way = made.way
    if way.bare:
        head: Any = made.model.head
        hidden = output.last_hidden_state[0, M:]
        values = {"mean": hidden.mean(0), "first": hidden[0], "last": hidden[-1]}
        return F.linear(values.get(way.head, hidden), head.weight, head.bias)
    if way.task == "FEATURE_EXTRACTION":
        return output.last_hidden_state[0, M:]
    return output.logits[0, M:] if way.task in ("CAUSAL_LM", "TOKEN_CLS") else output.logits[0]


@in_float64()
def plain_output(made: Trial, tensors: dict[str, Tensor], row: Row, **kwargs: Any) -> Any:
    """The untouched model's output for prompt and row."""
    c = made.model.prompt.config
    choices = {"scaling": c.scaling, "activation": c.activation, "gate": c.gate}
    prompt = reference.reconstruct_prompt(**tensors, **choices, fusion=c.fusion)
    table = made.plain.get_input_embeddings()
    text = table(row.ids).detach()
    if "offset_a" in tensors:
        text = text + c.scaling * (tensors["offset_a"] @ tensors["offset_b"])[: len(row.ids)]
    embeds = torch.cat([prompt, text]).unsqueeze(0).to(table.weight.dtype)
    if int(row.types.max()) > 0:
        kwargs["token_type_ids"] = F.pad(row.types, (M, 0)).unsqueeze(0)
    if made.way.task == "SEQ_2_SEQ_LM":
        kwargs.setdefault("decoder_input_ids", row.answer.unsqueeze(0))
    mask = torch.ones(embeds.shape[:2], dtype=torch.int64)
    return made.plain(inputs_embeds=embeds, attention_mask=mask, **kwargs)


def pad(rows: list[Row], place: str = "right", extra: int = 0, seed: int = 9) -> Batch:
    """The rows in one batch, ``extra`` columns wider than the longest.

    What stands in the padding is random: any of it that leaks shows.
    """
    draw = torch.Generator().manual_seed(seed)
    width = max(len(row.ids) for row in rows) + extra
    ids = torch.randint(VOCABULARY, (len(rows), width), generator=draw)
    types = torch.zeros_like(ids)
    mask = torch.zeros_like(ids)
    columns = []
    for b, row in enumerate(rows):
        free = width - len(row.ids)
        start = {"right": 0, "left": free, "both": free // 2}.get(place, 0)
        where = torch.arange(start, start + len(row.ids))
        if place == "holes":
            where = torch.randperm(width, generator=draw)[: len(row.ids)].sort().values
        ids[b, where], types[b, where], mask[b, where] = row.ids, row.types, 1
        columns.append(where)
    return Batch(ids, mask, types, torch.stack([row.answer for row in rows]), columns)


def arguments(way: Way, batch: Batch) -> dict[str, Tensor]:
    """What the wrapper is called with."""
    given = {"input_ids": batch.ids, "attention_mask": batch.mask}
    if int(batch.types.max()) > 0:
        given["token_type_ids"] = batch.types
    if way.task == "SEQ_2_SEQ_LM":
        given["decoder_input_ids"] = batch.answers
    return given


@in_float64()
def outputs(way: Way, model: Any, batch: Batch) -> list[Tensor]:
    """Each row's outputs of its real tokens, as :func:`defined` gives them."""
    output = model(**arguments(way, batch))
    values = output.last_hidden_state if way.task == "FEATURE_EXTRACTION" else output.logits
    if way.task in ("SEQ_CLS", "SEQ_2_SEQ_LM"):
        return list(values)
    assert values.shape[:2] == batch.ids.shape
    return [value[where] for value, where in zip(values, batch.columns, strict=True)]


def assert_rows(got: list[Tensor], expected: list[Tensor], what: str) -> None:
    for b, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        torch.testing.assert_close(
            mine, theirs, **EXACT, msg=lambda text, b=b: f"{what}, row {b}: {text}"
        )


@each_way("padding")
@torch.no_grad()
def test_padding(way: Way) -> None:
    made = trial(way)
    for place in PLACES:
        for extra in (0, 4):
            got = outputs(way, made.model, pad(made.rows, place, extra))
            assert_rows(got, made.expected, f"padding {place}, {extra} more")


@each_way("batch")
@torch.no_grad()
def test_batch(way: Way) -> None:
    made = trial(way)
    others = rows_for(made.plain, (12, 2, 5), seed=6)
    empty = Row(*(values[:0] for values in others[0][:2]), others[0].answer)
    for place in ("right", "left"):
        for b, row in enumerate(made.rows):
            alone = outputs(way, made.model, pad([row], place))
            assert_rows(alone, made.expected[b : b + 1], "alone")
        mixed = [others[0], made.rows[2], others[1], made.rows[0], empty, made.rows[1], others[2]]
        got = outputs(way, made.model, pad(mixed, place))
        assert_rows([got[i] for i in (3, 5, 1)], made.expected, f"among others, padding {place}")


@each_way("folding")
@torch.no_grad()
def test_folding(way: Way) -> None:
    made = trial(way)
    made.model.fold()
    try:
        for place in ("left", "right"):
            got = outputs(way, made.model, pad(made.rows, place, 1))
            assert_rows(got, made.expected, f"folded, padding {place}")
    finally:
        made.model.train().heads.eval()


@each_way("backends")
@torch.no_grad()
def test_backends(way: Way) -> None:
    made = trial(way)
    for backend in ("eager", "reference"):
        other = make_trial(way, backend=backend).model
        other.load_state_dict(made.model.state_dict())
        got = outputs(way, other, pad(made.rows, "left", 1))
        assert_rows(got, made.expected, backend)


def targets(made: Trial) -> list[Tensor]:
    """What each row is trained on, with some of a row's labels left out: ``[S]``, ``[T]`` or []."""
    way, found = made.way, []
    draw = torch.Generator().manual_seed(4)
    for row in made.rows:
        if way.task == "SEQ_CLS":
            found.append(torch.randint(len(LABELS), (), generator=draw))
            continue
        labels = row.answer if way.task == "SEQ_2_SEQ_LM" else row.ids
        if way.task == "TOKEN_CLS":
            labels = torch.randint(len(LABELS), row.ids.shape, generator=draw)
        kept = torch.rand(labels.shape, generator=draw) < 0.7
        kept[0] = True  # a causal model predicts a text's first token from the prompt
        found.append(torch.where(kept, labels, -100))
    return found


def defined_loss(made: Trial, tensors: dict[str, Tensor]) -> Tensor:
    """The mean cross-entropy over the labels of all rows; of hidden states, a sum of them."""
    task, logits = made.way.task, []
    labels = targets(made)
    for row, label in zip(made.rows, labels, strict=True):
        if task == "CAUSAL_LM":
            logits.append(plain_output(made, tensors, row).logits[0, M - 1 : -1])
        elif task == "SEQ_2_SEQ_LM":
            shifted = {"decoder_input_ids": None, "labels": label.unsqueeze(0)}
            logits.append(plain_output(made, tensors, row, **shifted).logits[0])
        else:
            logits.append(defined(made, tensors, row))
    if task == "FEATURE_EXTRACTION":
        return sum_of(logits)
    stacked = torch.stack(logits) if task == "SEQ_CLS" else torch.cat(logits)
    return F.cross_entropy(stacked, torch.hstack(labels))


def sum_of(hidden: list[Tensor]) -> Tensor:
    """A loss of hidden states that weights each of them differently."""
    return torch.stack([(value * value.detach().sin().flip(0)).sum() for value in hidden]).sum()


def labelled(made: Trial, batch: Batch) -> dict[str, Tensor]:
    """The same targets as a model is called with them."""
    given = arguments(made.way, batch)
    given.pop("decoder_input_ids", None)  # they follow from the labels
    if made.way.task in ("SEQ_CLS", "SEQ_2_SEQ_LM"):
        return {**given, "labels": torch.stack(targets(made))}
    labels = torch.full_like(batch.ids, -100)
    for b, (where, label) in enumerate(zip(batch.columns, targets(made), strict=True)):
        labels[b, where] = label
    return {**given, "labels": labels}


@in_float64()
def wrapped_loss(made: Trial, batch: Batch) -> Tensor:
    """The wrapper's own loss; of hidden states, the sum of them."""
    if made.way.task == "FEATURE_EXTRACTION":
        return sum_of(outputs(made.way, made.model, batch))
    return made.model(**labelled(made, batch)).loss


@each_way("loss")
def test_loss_and_gradients(way: Way) -> None:
    made = trial(way)
    trained = made.tensors()
    leaves = {name: t.detach().clone().requires_grad_() for name, t in trained.items()}
    expected = defined_loss(made, leaves)
    gradients = torch.autograd.grad(expected, list(leaves.values()))
    assert all(gradient.abs().max() > 1e-4 for gradient in gradients)
    for place in ("left", "right"):
        loss = wrapped_loss(made, pad(made.rows, place, 2))
        torch.testing.assert_close(loss, expected, **EXACT)
        got = torch.autograd.grad(loss, list(trained.values()))
        for name, mine, theirs in zip(trained, got, gradients, strict=True):
            torch.testing.assert_close(
                mine, theirs, **EXACT, msg=lambda text, name=name: f"{name}: {text}"
            )


def plain_config(way: Way) -> EPTConfig:
    """Plain prompt tuning."""
    return EPTConfig(way.architecture.width, M, max_length=N, rank=0, num_spaces=0)


def first_rows(way: Way) -> Tensor:
    """The rows that a prompt starts from, of a size that shows."""
    draw = torch.Generator().manual_seed(8)
    return 0.5 * torch.randn(M + 2, way.architecture.width, generator=draw)


@each_way("PEFT")
@torch.no_grad()
def test_fresh_adapter_is_plain_prompt_tuning(way: Way) -> None:
    """Training starts from the rows themselves: A and U are zero."""
    made = make_trial(way, init=first_rows(way))
    plain = make_trial(way, init=first_rows(way), config=plain_config(way))
    assert plain.tensors().keys() == {"short_prompt"}
    plain.model.heads.load_state_dict(made.model.heads.state_dict())
    batch = pad(made.rows, "left")
    expected = [defined(made, plain.tensors(), row) for row in made.rows]
    assert_rows(outputs(way, plain.model, batch), expected, "plain")
    assert_rows(outputs(way, made.model, batch), expected, "fresh")


def peft_model(made: Trial) -> Any:
    """PEFT's prompt tuning of the untouched model with the rows of our prompt."""
    config = peft.PromptTuningConfig(
        task_type=made.way.task,
        num_virtual_tokens=M,
        num_transformer_submodules=1,  # the encoder only, of an encoder-decoder
        token_dim=made.way.architecture.width,
        num_layers=2,
        num_attention_heads=2,
    )
    model = peft.get_peft_model(made.plain, config)
    embedding = model.prompt_encoder["default"].embedding
    embedding.weight.data = made.model.prompt.short_prompt.detach().clone()
    return model.eval()


@each_way("PEFT", lambda way: not way.bare)
@in_float64()
def test_prompt_tuning_of_peft(way: Way) -> None:
    """On the right-padded rows that PEFT is right for; the prompt's gradients too."""
    made = make_trial(way, init=first_rows(way), config=plain_config(way))
    if way.task == "SEQ_CLS" and way.architecture.kind == DECODER:
        made.rows = rows_for(made.plain, (7, 7, 7))  # PEFT classifies by the last column
    if way.task == "FEATURE_EXTRACTION":  # PEFT leaves token types out
        made.rows = [row._replace(types=torch.zeros_like(row.types)) for row in made.rows]
    batch = pad(made.rows)
    theirs = peft_model(made)
    output = theirs(**arguments(way, batch))
    values = output.last_hidden_state if way.task == "FEATURE_EXTRACTION" else output.logits
    if way.task not in ("SEQ_CLS", "SEQ_2_SEQ_LM"):
        values = [value[M + w] for value, w in zip(values, batch.columns, strict=True)]
    assert_rows(outputs(way, made.model, batch), list(values), "against PEFT")

    loss = wrapped_loss(made, batch)
    (mine,) = torch.autograd.grad(loss, [made.model.prompt.short_prompt])
    if way.task == "FEATURE_EXTRACTION":
        expected = sum_of(list(values))
    else:
        given = labelled(made, batch)
        if way.task == "TOKEN_CLS":  # PEFT leaves it to its user to give the prompt labels
            given["labels"] = F.pad(given["labels"], (M, 0), value=-100)
        expected = theirs(**given).loss
    torch.testing.assert_close(loss, expected, **EXACT)
    expected.backward()
    gradient = theirs.prompt_encoder["default"].embedding.weight.grad
    torch.testing.assert_close(mine, gradient, **EXACT)


MAIN = ("SEQ_2_SEQ_LM", "CAUSAL_LM", "SEQ_CLS")


def first_task(way: Way) -> bool:
    """One way for each architecture."""
    tasks = way.architecture.tasks
    return not way.bare and way.task == next((task for task in MAIN if task in tasks), None)


@each_way("padding", first_task)
@torch.no_grad()
def test_padding_with_attention_in_plain_pytorch(way: Way) -> None:
    """Its masks are made elsewhere in the library than those of the fused attention."""
    made = make_trial(way, changes={"attn_implementation": "eager"})
    assert made.plain.config._attn_implementation == "eager"
    fill(made)
    expected = [defined(made, made.tensors(), row) for row in made.rows]
    for place in PLACES:
        got = outputs(way, made.model, pad(made.rows, place, 2))
        assert_rows(got, expected, f"padding {place}")


def generates(way: Way) -> bool:
    """The other architectures' generation has a file of its own."""
    return way.architecture in FURTHER and way.task in ("CAUSAL_LM", "SEQ_2_SEQ_LM")


@each_way("generation", generates)
@torch.no_grad()
@in_float64()
def test_greedy_generation(way: Way) -> None:
    """Of a padded batch with a cache, against each row alone and computed anew for each token."""
    made, new = trial(way), 4
    batch = pad(made.rows, "left", 1)
    choices = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None}
    generated = made.model.generate(batch.ids, batch.mask, **choices)
    for row, ids in zip(made.rows, generated, strict=True):
        for known in range(len(ids) - new, len(ids)):
            if way.task == "SEQ_2_SEQ_LM":
                before = row._replace(answer=ids[:known])
            else:
                before = row._replace(ids=torch.cat([row.ids, ids[len(ids) - new : known]]))
            logits = plain_output(made, made.tensors(), before).logits
            assert logits[0, -1].argmax() == ids[known]


def error(values: list[Tensor], exact: list[Tensor]) -> float:
    """Root mean square error over all rows."""
    differences = [(v.double() - e).flatten() for v, e in zip(values, exact, strict=True)]
    return float(torch.cat(differences).square().mean().sqrt())


TYPED = [
    ("T5", "SEQ_2_SEQ_LM", torch.float32, "eager"),
    ("T5", "SEQ_2_SEQ_LM", torch.bfloat16, "eager"),
    ("Llama", "CAUSAL_LM", torch.float32, "eager"),
    ("Llama", "CAUSAL_LM", torch.bfloat16, "eager"),
    ("Gemma 2", "CAUSAL_LM", torch.bfloat16, "eager"),
    ("BERT", "TOKEN_CLS", torch.float32, "eager"),
    ("BERT", "TOKEN_CLS", torch.bfloat16, "eager"),
    pytest.param("BERT", "TOKEN_CLS", torch.float32, "triton", marks=needs_interpreter),
    pytest.param("Llama", "CAUSAL_LM", torch.float32, "triton", marks=needs_interpreter),
]


@pytest.mark.parametrize(("name", "task", "dtype", "backend"), TYPED)
@torch.no_grad()
def test_lower_precision(name: str, task: str, dtype: torch.dtype, backend: str) -> None:
    """At most twice the rounding error that the model itself makes for the row alone."""
    made = make_trial(Way(name, task), dtype=dtype, backend=backend)
    fill(made)
    tensors = made.tensors()
    exactly = replace(made, plain=copy.deepcopy(made.plain).double())
    doubles = {name: tensor.double() for name, tensor in tensors.items()}
    exact = [defined(exactly, doubles, row) for row in made.rows]
    alone = error([defined(made, tensors, row) for row in made.rows], exact)
    for place in PLACES:
        mine = error(outputs(made.way, made.model, pad(made.rows, place, 2)), exact)
        assert mine <= 2 * alone, f"padding {place}: {mine:.3g}, alone {alone:.3g}"


PRETRAINED = ("padding", "batch", "folding", "backends")


@pytest.mark.parametrize(
    "task",
    [
        pytest.param(task, marks=marks("MiniLM, pretrained", task, *PRETRAINED))
        for task in ("SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION")
    ],
)
@torch.no_grad()
def test_pretrained_encoder(task: str, minilm: Path) -> None:
    """Real weights and the real tokenizer, on either side, alone, folded and by the definition."""
    raw = transformers.AutoModel.from_pretrained(minilm, dtype=torch.float64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    texts = ["A prompt.", "It goes before the text of every row, whatever its length is.", "So?"]
    config = EPTConfig(384, M, max_length=32, rank=2, num_spaces=2, space_dim=3)
    labels = None if task == "FEATURE_EXTRACTION" else LABELS
    model = get_ept_model(raw, config, task, labels=labels, dtype=torch.float64)
    model.heads.double()
    draw = torch.Generator().manual_seed(2)
    for parameter in model.prompt.parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64)

    @in_float64()
    def values(chosen: list[str], side: str) -> list[Tensor]:
        given = tokenizer(chosen, padding=True, padding_side=side, return_tensors="pt")
        output = model(**given)
        if task == "SEQ_CLS":
            return list(output.logits)
        found = output.logits if labels else output.last_hidden_state
        real = given["attention_mask"] == 1
        return [value[where] for value, where in zip(found, real, strict=True)]

    alone = [values([text], "right")[0] for text in texts]
    assert float((alone[0][0] - alone[2][0]).abs().max()) > 1e-2  # of a token that all begin with
    for change in ("nothing", "folded", "reference"):
        if change == "folded":
            model.fold()
        if change == "reference":
            model.unfold()
            model.prompt.backend = change
        for side in ("right", "left"):
            assert_rows(values(texts, side), alone, f"padding {side}, {change}")


NO_WAY_IN = "its forward takes no `inputs_embeds` or no `attention_mask`"


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        pytest.param(
            architecture,
            task,
            id=f"{architecture.name}-{task}",
            marks=pytest.mark.support(
                row=architecture.name, column=task, state="refused", reason=NO_WAY_IN
            ),
        )
        for architecture in UNFIT
        for task in architecture.tasks
    ],
)
def test_model_without_a_way_in(architecture: Architecture, task: str) -> None:
    raw = architecture.build(task)
    flags = [parameter.requires_grad for parameter in raw.parameters()]
    config = EPTConfig(architecture.width, M, max_length=N, rank=0, num_spaces=0)
    expected = (
        r"model: expected .* takes inputs_embeds and attention_mask, got " + type(raw).__name__
    )
    with pytest.raises(TypeError, match=expected):
        get_ept_model(raw, config, task, labels=LABELS if task.endswith("CLS") else None)
    assert [parameter.requires_grad for parameter in raw.parameters()] == flags


def test_head_that_reads_the_last_column() -> None:
    """It would read padding, as compacted rows have theirs on the right."""
    architecture = replace(BY_NAME["XLNet"], tasks=("SEQ_CLS",))
    config = EPTConfig(architecture.width, M, max_length=N, rank=0, num_spaces=0)
    with pytest.raises(ValueError, match='pooling: expected "mean", "first" or "last" for XLNet'):
        get_ept_model(architecture.build("SEQ_CLS"), config, "SEQ_CLS")
    model = get_ept_model(
        architecture.build("SEQ_CLS"), config, "SEQ_CLS", labels=LABELS, pooling="last"
    )
    assert isinstance(model.head, nn.Linear)
