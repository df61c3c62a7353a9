"""FusedEPTPrompt and its folded form: initialisation, forward, embedding layers, training."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ept_fast import EPTConfig, EPTOutput, FoldedEPTPrompt, FusedEPTPrompt, reference
from ept_fast.prompts.prototypes import k_means
from tests.cases import PADDINGS, SEVEN, make_mask

pytestmark = pytest.mark.usefixtures("one_thread")

D, M, N, VOCABULARY = 8, 3, 9, 23
SMALL = EPTConfig(D, num_virtual_tokens=M, max_length=N, rank=2, num_spaces=3, space_dim=2)
PARTS = {
    "ept": SMALL,
    "prompt gate": dataclasses.replace(SMALL, gate="prompt", temperature=0.5),
    "no fusion": dataclasses.replace(SMALL, fusion=False),
    "no spaces": dataclasses.replace(SMALL, num_spaces=0),
    "no offset": dataclasses.replace(SMALL, rank=0),
    "dept": dataclasses.replace(SMALL, fusion=False, num_spaces=0),
    "prompt tuning": dataclasses.replace(SMALL, rank=0, num_spaces=0),
}
BACKENDS = ("eager", "reference")
TASKS = (None, 3)
HALVES = (torch.bfloat16, torch.float16)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_table(dtype: torch.dtype = torch.float32, **options: Any) -> nn.Embedding:
    weight = torch.randn(VOCABULARY, D, generator=seeded(7), dtype=torch.float64).to(dtype)
    return nn.Embedding(VOCABULARY, D, _weight=weight, **options)


def make_ids(batch: int = 4, length: int = 6) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=seeded(1))


def make_prompt(
    config: EPTConfig = SMALL, embedding: nn.Module | None = None, **options: Any
) -> FusedEPTPrompt:
    embedding = make_table() if embedding is None else embedding
    return FusedEPTPrompt(config, embedding, generator=seeded(), **options)


def shaken(prompt: FusedEPTPrompt, seed: int = 3) -> FusedEPTPrompt:
    """Every parameter at random, so that every part has a say."""
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in prompt.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.5 * noise)
    return prompt


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_same_state(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


class ScaledEmbedding(nn.Embedding):
    """Gemma's way: the layer multiplies what it looks up."""

    scale = 3.3

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.scale


class LayerWithTable(nn.Module):
    """No nn.Embedding at all: a wrapper with a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(make_table().weight.detach().clone())

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight).tanh()


# Initialisation


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("part", PARTS)
def test_parameters_are_the_prompts_alone(part: str, tasks: int | None) -> None:
    table = make_table()
    prompt = make_prompt(PARTS[part], table, num_tasks=tasks)
    c, t = PARTS[part], () if tasks is None else (tasks,)
    shapes = {"short_prompt": (*t, M, D)}
    if c.rank:
        shapes |= {"offset_a": (*t, N, 2), "offset_b": (*t, 2, D)}
    if c.num_spaces:
        shapes |= {"space_down": (*t, 3, D, 2), "space_up": (*t, 3, 2, D)}
        shapes |= {"gate_weight": (*t, D, 3), "gate_bias": (*t, 3)}
    assert {name: tuple(p.shape) for name, p in prompt.named_parameters()} == shapes
    assert set(prompt.state_dict()) == set(shapes)
    assert all(getattr(prompt, name) is None for name in set(SEVEN) - set(shapes))
    assert all(p.requires_grad and p.is_leaf for p in prompt.parameters())
    assert all(p.is_contiguous() for p in prompt.parameters())
    assert not list(prompt.buffers())
    assert list(prompt.modules()) == [prompt]
    assert prompt.embedding is table
    assert sum(p.numel() for p in prompt.parameters()) == (tasks or 1) * c.num_parameters


def test_the_table_is_not_moved_or_trained() -> None:
    table = make_table()
    before = table.weight.detach().clone()
    prompt = shaken(make_prompt(SMALL, table))
    prompt.to(torch.float64).requires_grad_(False)
    assert {p.dtype for p in prompt.parameters()} == {torch.float64}
    assert table.weight.dtype == torch.float32
    assert table.weight.requires_grad
    prompt.requires_grad_(True)
    prompt(make_ids()).inputs_embeds.square().sum().backward()
    assert table.weight.grad is None
    assert torch.equal(table.weight, before)


@pytest.mark.parametrize("init", ["vocab", "text", "random", "tensor"])
@pytest.mark.parametrize("part", PARTS)
def test_zeros_and_partners(part: str, init: str) -> None:
    """A, U and b start at zero, and nothing else does."""
    options = {"init": init, "text": "x" * 9, "tokenizer": CharacterTokenizer()}
    if init == "tensor":
        options = {"init": torch.randn(M + 5, D, generator=seeded(2))}
    if init not in ("text", "tensor"):
        options = {"init": init}
    prompt = make_prompt(PARTS[part], **options)
    zero = {name for name, p in prompt.named_parameters() if not p.any()}
    assert zero == {"offset_a", "space_up", "gate_bias"} & set(prompt.state_dict())


@pytest.mark.parametrize("table", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("part", PARTS)
def test_a_fresh_prompt_is_plain_prompt_tuning(
    part: str, backend: str, tasks: int | None, table: torch.dtype
) -> None:
    """To the bit: the given rows, then the text's embeddings as they are."""
    embedding = make_table(table)
    rows = torch.randn(*(() if tasks is None else (tasks,)), M + 6, D, generator=seeded(5))
    prompt = make_prompt(PARTS[part], embedding, init=rows, num_tasks=tasks, backend=backend)
    ids, mask = make_ids(), make_mask("holes", 4, 6, seeded(2))
    task_ids = None if tasks is None else torch.tensor([2, 0, 2, 1])
    out = prompt(ids, attention_mask=mask, task_ids=task_ids).inputs_embeds
    head = rows[:M].expand(4, M, D) if task_ids is None else rows[task_ids, :M]
    assert out.dtype == table
    assert torch.equal(out[:, :M], head.to(table))
    assert torch.equal(out[:, M:], embedding.weight[ids])
    assert torch.equal(prompt.short_prompt, rows[..., :M, :])


class CharacterTokenizer:
    """Letters to ids in order of the alphabet; notes how it was called."""

    def __init__(self) -> None:
        self.calls: list[tuple[str | list[str], dict[str, Any]]] = []

    def __call__(self, text: str | list[str], **options: Any) -> dict[str, list[Any]]:
        self.calls.append((text, options))
        if isinstance(text, list):
            return {"input_ids": [self.ids(one) for one in text]}
        return {"input_ids": self.ids(text)}

    @staticmethod
    def ids(text: str) -> list[int]:
        return [(ord(c) - ord("a")) % VOCABULARY for c in text]


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize(
    ("text", "first"), [("abcdef", "abc"), ("abc", "abc"), ("ab", "aba"), ("c", "ccc")]
)
def test_init_text(text: str, first: str, tasks: int | None) -> None:
    """The first m tokens of the text, repeated where it is shorter."""
    table, tokenizer = make_table(), CharacterTokenizer()
    prompt = make_prompt(SMALL, table, init="text", text=text, tokenizer=tokenizer, num_tasks=tasks)
    assert tokenizer.calls == [(text, {"add_special_tokens": False})]
    rows = table.weight[[ord(c) - ord("a") for c in first]]
    assert torch.equal(prompt.short_prompt, rows.expand_as(prompt.short_prompt))


@pytest.mark.parametrize("tasks", TASKS)
def test_init_data_of_as_many_tokens_as_the_prompt(tasks: int | None) -> None:
    """The prompt is those tokens' embeddings, to the bit, however often each occurs."""
    table, tokenizer = make_table(), CharacterTokenizer()
    texts = ("bbbbbbb", "fdbf", "", "dddb")
    prompt = make_prompt(
        SMALL, table, init="data", text=texts, tokenizer=tokenizer, num_tasks=tasks
    )
    assert tokenizer.calls == [(list(texts), {"add_special_tokens": False})]
    rows = {tuple(row) for row in table.weight[[1, 3, 5]].tolist()}
    for short in prompt.short_prompt if tasks else prompt.short_prompt.unsqueeze(0):
        assert {tuple(row) for row in short.tolist()} == rows
    # Nothing is left for the offset, which starts from sampled rows as after a given prompt.
    assert bool((prompt.offset_b.norm(dim=-1) > 0.1).all())


def test_init_data_is_k_means_of_the_tokens() -> None:
    """Means that are the weighted means of their clusters; an offset of what they leave."""
    table = make_table()
    texts = ["abcdefghij", "aaaabbc", "klmnopqrstuv", "jjj"]
    prompt, again = (
        FusedEPTPrompt(
            SMALL, table, init="data", text=texts, tokenizer=CharacterTokenizer(),
            generator=seeded(seed),
        )
        for seed in (0, 1)
    )  # fmt: skip
    for name in ("short_prompt", "offset_b"):  # nothing of it is random
        assert torch.equal(getattr(prompt, name), getattr(again, name))
    ids = torch.tensor([ord(c) - ord("a") for text in texts for c in text])
    rows, means = table.weight[ids].double(), prompt.short_prompt.detach().double()
    nearest = torch.cdist(rows, means).argmin(1)
    for number in range(M):
        torch.testing.assert_close(means[number], rows[nearest == number].mean(0))
    left = rows - means[nearest]
    size = SMALL.initial_rows - M
    assert_leading_directions(prompt.offset_b, left * (size / len(ids)) ** 0.5, SMALL.rank)
    # Better than the best of a hundred draws of tokens.
    distance = left.square().sum()
    for seed in range(100):
        drawn = rows[torch.randperm(len(ids), generator=seeded(seed))[:M]]
        assert torch.cdist(rows, drawn).amin(1).square().sum() > distance


def test_init_data_with_few_tokens_takes_the_rest_of_the_table() -> None:
    table = make_table()
    prompt = make_prompt(SMALL, table, init="data", text=["aab"], tokenizer=CharacterTokenizer())
    rows = [tuple(row) for row in prompt.short_prompt.tolist()]
    every = {tuple(row) for row in table.weight.tolist()}
    assert {tuple(row) for row in table.weight[:2].tolist()} == set(rows[:2])
    assert rows[2] in every


@pytest.mark.parametrize("count", [1, 2, 5, 11])
def test_prototypes_are_rows_where_there_are_enough(count: int) -> None:
    """One weighted mean; all rows, to the bit; and in between clusters without an empty one."""
    rows = torch.randn(11, 4, generator=seeded(2))
    rows[5] = rows[9]  # 10 different ones
    weights = torch.tensor([3.0, 1, 7, 1, 1, 2, 9, 1, 13, 4, 1])
    means, nearest = k_means(rows, weights, count)
    assert len(means) == min(count, 10)
    assert set(nearest.tolist()) == set(range(len(means)))
    if count == 1:
        torch.testing.assert_close(means[0], (weights @ rows) / weights.sum())
    if count == 11:
        assert torch.equal(means[nearest], rows)


def assert_leading_directions(offset_b: Tensor, left_out: Tensor, rank: int) -> None:
    """Rows are ±√σ·v of the leading right-singular vectors v; from the eigenvectors of RᵀR."""
    rows = left_out.detach().double()
    squares, vectors = torch.linalg.eigh(rows.mT @ rows)  # ascending; eigenvalues are σ²
    expected = (squares.clamp_min(0) ** 0.25 * vectors).mT.flip(0)[:rank]
    got = offset_b.detach().double()
    signs = (got * expected).sum(-1, keepdim=True).sign()
    torch.testing.assert_close(got, signs * expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_offset_b_of_a_tensor(rank: int) -> None:
    config = dataclasses.replace(SMALL, rank=rank)
    rows = torch.randn(M + 12, D, generator=seeded(5))
    prompt = make_prompt(config, init=rows)
    assert_leading_directions(prompt.offset_b, rows[M:], rank)


@pytest.mark.parametrize("shared", [False, True], ids=["own rows", "one tensor for all"])
def test_offset_b_of_a_tensor_for_each_task(shared: bool) -> None:
    rows = torch.randn(*(() if shared else (3,)), M + 6, D, generator=seeded(5))
    prompt = make_prompt(SMALL, init=rows, num_tasks=3)
    for task, own in enumerate(rows.expand(3, M + 6, D)):
        assert torch.equal(prompt.short_prompt[task], own[:M])
        assert_leading_directions(prompt.offset_b[task], own[M:], 2)


def test_offset_b_of_the_vocabulary() -> None:
    """The long prompt has the length of the same budget: ceil(num_parameters / d) rows."""
    length = -(-SMALL.num_parameters // D)
    weight = torch.randn(length, D, generator=seeded(7))
    prompt = make_prompt(SMALL, nn.Embedding(length, D, _weight=weight))
    taken = (prompt.short_prompt.unsqueeze(1) == weight).all(-1).any(0)
    assert taken.sum() == M
    assert_leading_directions(prompt.offset_b, weight[~taken], 2)


def test_missing_rows_are_sampled_from_the_vocabulary() -> None:
    """A tensor of just m rows leaves none for the offset: r rows of the table then."""
    rows = torch.randn(M, D, generator=seeded(5))
    table = make_table()
    with torch.no_grad():
        table.weight[:, D // 2 :] = 0
    prompt = make_prompt(SMALL, table, init=rows)
    assert torch.equal(prompt.short_prompt, rows)
    assert prompt.offset_b[:, : D // 2].abs().amax(-1).gt(0.1).all()
    assert prompt.offset_b[:, D // 2 :].abs().max() < 1e-6


@pytest.mark.parametrize("padding_idx", [0, 3, -1])
def test_the_padding_row_is_never_sampled(padding_idx: int) -> None:
    weight = torch.randn(6, D, generator=seeded(7))
    weight[:, 0] = 0
    weight[padding_idx] = F.one_hot(torch.tensor(0), D) * 100.0
    table = nn.Embedding(6, D, padding_idx=padding_idx, _weight=weight)
    seen = set()
    for seed in range(20):
        prompt = FusedEPTPrompt(SMALL, table, generator=seeded(seed))
        assert not prompt.short_prompt[:, 0].any()
        assert prompt.offset_b[:, 0].abs().max() < 1e-6
        seen |= {int((row == weight).all(-1).nonzero()) for row in prompt.short_prompt.detach()}
    assert seen == set(range(6)) - {padding_idx % 6}


def test_vocabulary_rows_are_distinct_while_they_last() -> None:
    config = EPTConfig(D, num_virtual_tokens=VOCABULARY, rank=0, num_spaces=0)
    table = make_table()
    once = make_prompt(config, table).short_prompt
    assert torch.equal(once.sort(0).values, table.weight.sort(0).values)
    twice = make_prompt(dataclasses.replace(config, num_virtual_tokens=2 * VOCABULARY), table)
    assert torch.equal(
        twice.short_prompt.sort(0).values, table.weight.repeat_interleave(2, 0).sort(0).values
    )


def test_random_rows_have_the_tables_deviation() -> None:
    """Also where the first rows of the table differ from the rest, as unused tokens do."""
    weight = 0.3 * torch.randn(12_000, 16, generator=seeded(7))
    weight[:5000] = 0
    config = EPTConfig(16, num_virtual_tokens=2000, rank=0, num_spaces=0)
    prompt = make_prompt(config, nn.Embedding(12_000, 16, _weight=weight), init="random")
    rows = prompt.short_prompt.detach()
    assert rows.std().item() == pytest.approx(weight.std().item(), rel=0.05)
    assert abs(rows.mean().item()) < 0.01
    assert (rows != 0).all()


def test_deviations_of_the_projections() -> None:
    """1/√d for the spaces, 0.02 for the gate."""
    d = 1024
    config = EPTConfig(d, num_virtual_tokens=2, max_length=4, rank=1, num_spaces=8, space_dim=4)
    prompt = make_prompt(config, nn.Embedding(50, d))
    down, gate = prompt.space_down.detach(), prompt.gate_weight.detach()
    assert down.std().item() == pytest.approx(d**-0.5, rel=0.02)
    assert gate.std().item() == pytest.approx(0.02, rel=0.03)
    for tensor in (down, gate):
        assert abs(tensor.mean()) < 0.05 * tensor.std()
    assert not torch.equal(down[0], down[1])


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("init", ["vocab", "text", "random"])
def test_generator(init: str, tasks: int | None) -> None:
    """The same seed, the same bits; another one, others; the global generator stays as it is."""
    options = {"init": init, "num_tasks": tasks}
    if init == "text":
        options |= {"text": "abcd", "tokenizer": CharacterTokenizer()}
    table = make_table()
    before = torch.get_rng_state()
    first, again, other = (
        state(FusedEPTPrompt(SMALL, table, generator=seeded(seed), **options)) for seed in (5, 5, 6)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_state(again, first)
    zero = {"offset_a", "space_up", "gate_bias"} | ({"short_prompt"} if init == "text" else set())
    for name in set(first) - zero:
        assert not torch.equal(first[name], other[name]), name


def test_without_a_generator_the_global_one_is_used() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(11)
        states.append(state(FusedEPTPrompt(SMALL, make_table())))
    assert_same_state(*states)
    assert not torch.equal(
        FusedEPTPrompt(SMALL, make_table()).short_prompt, states[0]["short_prompt"]
    )


def test_tasks_start_from_different_rows() -> None:
    prompt = make_prompt(num_tasks=2)
    for name in ("short_prompt", "offset_b", "space_down", "gate_weight"):
        first, second = getattr(prompt, name)
        assert not torch.equal(first, second), name


@pytest.mark.parametrize("source", ["tensor", "table"])
@pytest.mark.parametrize("part", PARTS)
def test_init_rows_are_copied(part: str, source: str) -> None:
    """Training moves neither the caller's tensor, nor the frozen table, nor a second prompt."""
    table = make_table()
    rows = table.weight if source == "table" else torch.randn(M + 6, D, generator=seeded(5))
    before, weight = rows.detach().clone(), table.weight.detach().clone()
    first, second = (make_prompt(PARTS[part], table, init=rows) for _ in range(2))
    expected = state(second)
    shaken(first)
    assert torch.equal(rows, before)
    assert torch.equal(table.weight, weight)
    assert_same_state(state(second), expected)


@pytest.mark.parametrize("dtype", [torch.float64, *HALVES], ids=str)
def test_dtype_of_the_parameters(dtype: torch.dtype) -> None:
    prompt = make_prompt(dtype=dtype)
    assert {p.dtype for p in prompt.parameters()} == {dtype}
    assert_same_state(state(prompt), {k: v.to(dtype) for k, v in state(make_prompt()).items()})
    assert shaken(prompt)(make_ids()).inputs_embeds.dtype == torch.float32


def with_id(bad: int) -> Tensor:
    ids = make_ids()
    ids[2, 5] = bad
    return ids


def scaled_layer() -> nn.Embedding:
    return ScaledEmbedding(VOCABULARY, D)


Call = Callable[[], Any]
TEXT = {"init": "text", "tokenizer": CharacterTokenizer()}
NAN, INF = (torch.full((9, D), value) for value in (float("nan"), float("inf")))
BARE = PARTS["prompt tuning"]
LONG = "expected at most max_length 9 text positions (the rows of offset_a), got 10"

# What is called, the error's type and its message.
REFUSED: list[tuple[Call, type[Exception], str]] = [
    (
        lambda: FusedEPTPrompt({"hidden_size": D}, make_table()),
        TypeError,
        "config: expected an EPTConfig, got dict",
    ),
    (
        lambda: make_prompt(EPTConfig(16, rank=2)),
        ValueError,
        "embedding: expected width hidden_size 16, got 8",
    ),
    (
        lambda: make_prompt(backend="fast")(make_ids()),
        ValueError,
        "backend: expected one of triton, cuda, eager, reference, got 'fast'",
    ),
    (
        lambda: make_prompt(PARTS["no spaces"]).gate_weights(),
        ValueError,
        "num_spaces: expected at least 1 for gate weights, got 0",
    ),
    *(
        (
            lambda layer=layer: make_prompt(SMALL, layer),
            TypeError,
            f"embedding: expected a layer with a weight table [V, d], got {type(layer).__name__}",
        )
        for layer in (nn.Module(), torch.zeros(5, D))
    ),
    *(
        (lambda options=options: make_prompt(**options), error, message)
        for options, error, message in [
            ({"num_tasks": 0}, ValueError, "num_tasks: expected an integer >= 1, got 0"),
            ({"num_tasks": 1.0}, TypeError, "num_tasks: expected an integer, got float 1.0"),
            (
                {"dtype": torch.int64},
                TypeError,
                "dtype: expected a floating dtype, got torch.int64",
            ),
            ({"dtype": "float32"}, TypeError, "dtype: expected a floating dtype, got 'float32'"),
            (
                {"init": "zeros"},
                ValueError,
                "init: expected one of vocab, text, data, random, got 'zeros'",
            ),
            (
                {"init": None},
                ValueError,
                "init: expected one of vocab, text, data, random, got None",
            ),
            ({"init": NAN}, ValueError, "init: expected finite rows, got NaN or infinity"),
            (
                {"init": INF, "config": BARE},
                ValueError,
                "init: expected finite rows, got NaN or infinity",
            ),
            ({"init": NAN.long()}, TypeError, "init: expected a floating tensor, got torch.int64"),
            (
                {"init": torch.ones(2, 4, D), "num_tasks": 3},
                ValueError,
                "init: expected shape [(3,) at least 3, 8], got (2, 4, 8)",
            ),
            (
                TEXT,
                ValueError,
                'text, tokenizer: expected a string and a tokenizer for init="text", got text None '
                "and tokenizer CharacterTokenizer",
            ),
            (
                {"init": "text", "text": "ab"},
                ValueError,
                'text, tokenizer: expected a string and a tokenizer for init="text", got text '
                "'ab' and tokenizer NoneType",
            ),
            ({**TEXT, "text": ""}, ValueError, "text: expected at least one token, got ''"),
            (
                {**TEXT, "init": "vocab", "text": "ab"},
                ValueError,
                'text: expected None unless init="text" or init="data", got \'ab\'',
            ),
            *(
                (
                    {"init": "data", "text": text, "tokenizer": tokenizer},
                    ValueError,
                    f"text, tokenizer: expected a sequence of strings and a tokenizer for "
                    f'init="data", got text {said} and tokenizer {type(tokenizer).__name__}',
                )
                for text, tokenizer, said in [
                    ("ab", CharacterTokenizer(), "'ab'"),
                    (None, CharacterTokenizer(), "None"),
                    (["ab", 3], CharacterTokenizer(), "list ['ab', 3]"),
                    (["ab"], None, "list ['ab']"),
                ]
            ),
            *(
                (
                    {"init": "data", "text": text, "tokenizer": CharacterTokenizer()},
                    ValueError,
                    f"text: expected at least one token, got {said}",
                )
                for text, said in (([], "list []"), (("", ""), "tuple ('', '')"))
            ),
        ]
    ),
    *(
        (
            lambda shape=shape: make_prompt(init=torch.ones(shape)),
            ValueError,
            f"init: expected shape [at least 3, 8], got {shape}",
        )
        for shape in ((4, 7), (2, D), (D,), (2, 4, D))
    ),
    # Of a call of the prompt; a layer that is more than its table looks up ids by itself.
    *(
        (
            lambda layer=layer, text=text: make_prompt(SMALL, layer())(**text),
            error,
            message,
        )
        for layer in (make_table, scaled_layer)
        for text, error, message in [
            (
                {"input_ids": make_ids(), "inputs_embeds": torch.zeros(4, 6, D)},
                ValueError,
                "input_ids, inputs_embeds: expected exactly one of them, got both",
            ),
            ({}, ValueError, "input_ids, inputs_embeds: expected exactly one of them, got neither"),
            ({"inputs_embeds": torch.zeros(2, 10, D)}, ValueError, f"inputs_embeds: {LONG}"),
            ({"input_ids": [[1, 2]]}, TypeError, "input_ids: expected a tensor, got list"),
            (
                {"input_ids": torch.zeros(2, 3)},
                TypeError,
                "input_ids: expected dtype int64 or int32, got torch.float32",
            ),
            (
                {"input_ids": make_ids()[0]},
                ValueError,
                "input_ids: expected shape [B, S], got [6]",
            ),
            (
                {"input_ids": make_ids(), "task_ids": torch.zeros(4).long()},
                ValueError,
                "task_ids: expected None beside a single short_prompt [3, 8], got a tensor",
            ),
        ]
    ),
    *(
        (
            lambda folded=folded, layer=layer, bad=bad: (
                make_prompt(SMALL, layer()).fold() if folded else make_prompt(SMALL, layer())
            )(with_id(bad)),
            IndexError,
            f"input_ids: expected ids from 0 to 22, got {bad} at row 2, column 5",
        )
        for folded in (False, True)
        for layer in (make_table, scaled_layer)
        for bad in (VOCABULARY, -1, 2**40)
    ),
    (lambda: make_prompt()(make_ids(2, 10)), ValueError, f"input_ids: {LONG}"),
    (
        lambda: make_prompt()(make_ids(), attention_mask=torch.ones(4, 5).long()),
        ValueError,
        "attention_mask: expected shape [4, 6] to match input_ids [4, 6], got [4, 5]",
    ),
    (
        lambda: make_prompt(num_tasks=2)(make_ids()),
        ValueError,
        "task_ids: expected [4] integers to match short_prompt [2, 3, 8], got None",
    ),
    (
        lambda: make_prompt(num_tasks=2)(make_ids(), task_ids=torch.tensor([0, 1, 2, 0])),
        IndexError,
        "task_ids: expected ids from 0 to 1, got 2 at row 2",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[row[2] for row in REFUSED])
def test_refused(call: Call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$") as caught:
        call()
    assert type(caught.value) is error


@pytest.mark.parametrize("part", ["no offset", "prompt tuning"])
def test_without_an_offset_text_may_be_longer(part: str) -> None:
    assert make_prompt(PARTS[part])(make_ids(2, N + 5)).inputs_embeds.shape == (2, M + N + 5, D)


# Forward


def parameters_of(prompt: FusedEPTPrompt) -> dict[str, Tensor | None]:
    return {name: getattr(prompt, name) for name in SEVEN}


def by_definition(
    prompt: FusedEPTPrompt, embeds: Tensor, mask: Tensor | None, task_ids: Tensor | None
) -> Tensor:
    """METHOD's two operations on the module's tensors and config, c written out."""
    c = prompt.config
    scaling = c.alpha / c.rank**0.5 if c.rank else 1.0
    parameters = parameters_of(prompt)
    reconstructed = reference.reconstruct_prompt(
        **parameters,
        scaling=scaling,
        activation=c.activation,
        gate=c.gate,
        temperature=c.temperature,
        fusion=c.fusion,
    )
    return reference.splice_prompt(
        reconstructed,
        inputs_embeds=embeds,
        offset_a=parameters["offset_a"],
        offset_b=parameters["offset_b"],
        scaling=scaling,
        attention_mask=mask,
        task_ids=task_ids,
    )


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("part", [*PARTS, "other numbers"])
def test_forward_is_the_definition(part: str, padding: str, tasks: int | None) -> None:
    other = dataclasses.replace(SMALL, alpha=-3.0, temperature=2.5, activation="silu")
    config = PARTS.get(part, other)
    table = make_table(torch.float64)
    prompt = shaken(make_prompt(config, table, num_tasks=tasks, dtype=torch.float64))
    ids, mask = make_ids(), make_mask(padding, 4, 6, seeded(2))
    task_ids = None if tasks is None else torch.tensor([2, 0, 2, 1])
    expected = by_definition(prompt, table.weight[ids], mask, task_ids)
    for text in ({"input_ids": ids}, {"inputs_embeds": table.weight[ids]}):
        out = prompt(**text, attention_mask=mask, task_ids=task_ids)
        torch.testing.assert_close(out.inputs_embeds, expected, rtol=1e-12, atol=1e-12)


def rank_among_real(mask: Tensor) -> list[list[int]]:
    rows = []
    for row in mask.tolist():
        real, ranks = 0, []
        for value in row:
            real += int(value)
            ranks.append(max(real - 1, 0))
        rows.append(ranks)
    return rows


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("padding", PADDINGS)
def test_mask_and_positions(padding: str, dtype: torch.dtype) -> None:
    mask = make_mask(padding, 4, 6, seeded(2))
    mask = None if mask is None else mask.to(dtype)
    out = make_prompt()(make_ids(), attention_mask=mask)
    assert isinstance(out, EPTOutput)
    text = torch.ones(4, 6, dtype=torch.int64) if mask is None else mask
    expected = torch.cat([torch.ones(4, M, dtype=text.dtype), text], dim=1)
    assert torch.equal(out.attention_mask, expected)
    assert out.attention_mask.dtype == text.dtype
    assert out.position_ids.dtype == torch.int64
    assert out.position_ids.tolist() == rank_among_real(expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_bit_of_a_token(side: str) -> None:
    prompt, ids = shaken(make_prompt()), make_ids()
    plain = prompt(ids)
    pad = (3, 0) if side == "left" else (0, 3)
    padded = prompt(F.pad(ids, pad, value=9), attention_mask=F.pad(torch.ones_like(ids), pad))
    for got, expected in zip(padded, plain, strict=True):
        text = got[:, M + 3 :] if side == "left" else got[:, M : M + 6]
        assert torch.equal(got[:, :M], expected[:, :M])
        assert torch.equal(text, expected[:, M:])


@pytest.mark.parametrize(("batch", "length"), [(0, 6), (4, 0), (1, 1), (1, N)])
def test_small_and_empty_batches(batch: int, length: int) -> None:
    out = shaken(make_prompt())(make_ids(batch, length))
    assert out.inputs_embeds.shape == (batch, M + length, D)
    assert out.attention_mask.shape == out.position_ids.shape == (batch, M + length)


def test_gradients_of_inputs_embeds() -> None:
    table = make_table(torch.float64)
    prompt = shaken(make_prompt(SMALL, table, dtype=torch.float64))
    embeds = table.weight[make_ids()].detach().requires_grad_()
    mask = make_mask("holes", 4, 6, seeded(2))
    cotangent = torch.randn(4, M + 6, D, generator=seeded(4), dtype=torch.float64)
    leaves = [embeds, *prompt.parameters()]
    out = prompt(inputs_embeds=embeds, attention_mask=mask).inputs_embeds
    expected = by_definition(prompt, embeds, mask, None)
    got = torch.autograd.grad(out, leaves, cotangent)
    assert torch.equal(got[0], cotangent[:, M:])
    for left, right in zip(got, torch.autograd.grad(expected, leaves, cotangent), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("part", PARTS)
def test_a_bank_is_its_single_prompts(part: str) -> None:
    table = make_table(torch.float64)
    bank = shaken(make_prompt(PARTS[part], table, num_tasks=3, dtype=torch.float64))
    singles = []
    for task in range(3):
        single = make_prompt(PARTS[part], table, dtype=torch.float64)
        single.load_state_dict({name: tensor[task] for name, tensor in state(bank).items()})
        singles.append(single)
    close = {"rtol": 1e-12, "atol": 1e-12}
    for task, single in enumerate(singles):
        torch.testing.assert_close(bank.reconstruct()[task], single.reconstruct(), **close)
        if PARTS[part].num_spaces:
            torch.testing.assert_close(bank.gate_weights()[task], single.gate_weights(), **close)
    ids, mask = make_ids(), make_mask("holes", 4, 6, seeded(2))
    for tasks in ([0, 1, 2, 1], [2, 2, 2, 2]):
        out = bank(ids, attention_mask=mask, task_ids=torch.tensor(tasks, dtype=torch.int32))
        for row, task in enumerate(tasks):
            alone = singles[task](ids[row : row + 1], attention_mask=mask[row : row + 1])
            for got, expected in zip(out, alone, strict=True):
                torch.testing.assert_close(got[row : row + 1], expected, **close)


# the compiler itself makes an autograd.Function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("layer", [nn.Embedding, ScaledEmbedding])
def test_compiles_whole(layer: type[nn.Embedding]) -> None:
    """One graph, forward and backward, with the same bits."""
    torch.compiler.reset()
    prompt = shaken(make_prompt(SMALL, layer(VOCABULARY, D, _weight=make_table().weight)))
    ids, mask = make_ids(), make_mask("left", 4, 6, seeded(2))
    grads = []
    for call in (prompt, torch.compile(prompt, fullgraph=True, backend="aot_eager")):
        out = call(ids, attention_mask=mask)
        leaves = list(prompt.parameters())
        grads.append([*out, *torch.autograd.grad(out.inputs_embeds.square().sum(), leaves)])
    for got, expected in zip(*grads, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(("offset", "dynamic"), [(None, None), (None, True), ("table", True)])
def test_one_compiled_function_serves_prompts_of_any_config(
    offset: str | None, dynamic: bool | None
) -> None:
    torch.compiler.reset()
    ids, mask = make_ids(), make_mask("left", 4, 6, seeded(2))

    def call(prompt: nn.Module) -> EPTOutput:
        output: EPTOutput = prompt(ids, attention_mask=mask)
        return output

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for changes in ({}, {"alpha": 2.0, "temperature": 0.5}, {"alpha": 3, "rank": 1}):
        prompt = shaken(make_prompt(dataclasses.replace(SMALL, **changes)))
        module: nn.Module = prompt if offset is None else prompt.fold(offset=offset)
        for got, expected in zip(compiled(module), call(module), strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("offset", [None, "low_rank", "table"])
def test_dynamic_code_serves_all_sizes(offset: str | None) -> None:
    torch.compiler.reset()
    prompt = shaken(make_prompt())
    module: nn.Module = prompt if offset is None else prompt.fold(offset=offset)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for number, (batch, length) in enumerate(((4, 6), (2, 9), (7, 3), (3, 2))):
        ids, mask = make_ids(batch, length), make_mask("right", batch, length, seeded(2))
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            output = compiled(ids, attention_mask=mask)
        for got, expected in zip(output, module(ids, attention_mask=mask), strict=True):
            torch.testing.assert_close(got, expected)


class WithTable(nn.Module):
    """A prompt in a module that has its embedding layer, as a strict export needs it."""

    def __init__(self, prompt: FusedEPTPrompt | FoldedEPTPrompt) -> None:
        super().__init__()
        self.prompt, self.table = prompt, prompt.embedding

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Any, ...]:
        return tuple(self.prompt(input_ids, attention_mask=attention_mask))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(("padding", "strict"), [("none", False), ("left", True)])
@pytest.mark.parametrize("offset", [None, "low_rank", "table"])
def test_exported_program_serves_all_sizes(offset: str | None, padding: str, strict: bool) -> None:
    prompt = shaken(make_prompt())
    module = WithTable(prompt if offset is None else prompt.fold(offset=offset))
    sizes = {0: torch.export.Dim("B", min=1), 1: torch.export.Dim("S", min=1, max=N)}

    def inputs(batch: int, length: int) -> dict[str, Tensor]:
        given = {"input_ids": make_ids(batch, length)}
        mask = make_mask(padding, batch, length, seeded(2))
        return given if mask is None else {**given, "attention_mask": mask}

    example = inputs(4, 6)
    shapes = dict.fromkeys(example, sizes)
    program = torch.export.export(
        module, (), example, dynamic_shapes=shapes, strict=strict
    ).module()
    for size in ((4, 6), (2, N), (1, 4), (3, 1), (1, 1)):
        call = inputs(*size)
        for got, expected in zip(program(**call), module(**call), strict=True):
            torch.testing.assert_close(got, expected)


# Embedding layers


def hooked() -> nn.Embedding:
    table = make_table()
    table.register_forward_hook(lambda module, args, output: output * 2)
    return table


def pre_hooked() -> nn.Embedding:
    table = make_table()
    table.register_forward_pre_hook(lambda module, args: (VOCABULARY - 1 - args[0],))
    return table


def with_own_forward() -> nn.Embedding:
    """What accelerate does to layers that it dispatches."""
    table = make_table()
    plain = table.forward
    table.forward = lambda ids: plain(ids) - 1  # type: ignore[method-assign]
    return table


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "plain": make_table,
    "padding_idx": lambda: make_table(padding_idx=2),
    "scaled": lambda: ScaledEmbedding(VOCABULARY, D, _weight=make_table().weight),
    "scaled, bf16": lambda: ScaledEmbedding(
        VOCABULARY, D, _weight=make_table(torch.bfloat16).weight
    ),
    "max_norm": lambda: make_table(max_norm=1.0),
    "forward hook": hooked,
    "forward pre-hook": pre_hooked,
    "own forward": with_own_forward,
    "no nn.Embedding": LayerWithTable,
}


@pytest.mark.parametrize("folded", [False, True], ids=["trainable", "folded"])
@pytest.mark.parametrize("layer", LAYERS)
def test_text_goes_through_the_layer(layer: str, folded: bool) -> None:
    """The same bits as embedding(ids) handed over, and no gradient to the layer."""
    embedding = LAYERS[layer]()
    prompt = shaken(make_prompt(SMALL, embedding))
    call: nn.Module = prompt.fold() if folded else prompt
    ids, mask = make_ids(), make_mask("left", 4, 6, seeded(2))
    out = call(ids, attention_mask=mask)
    given = call(inputs_embeds=embedding(ids).detach(), attention_mask=mask)
    for got, expected in zip(out, given, strict=True):
        assert torch.equal(got, expected)
    fresh = make_prompt(PARTS["prompt tuning"], embedding)(ids).inputs_embeds
    assert torch.equal(fresh[:, M:], embedding(ids))
    if not folded:
        out.inputs_embeds.square().sum().backward()
        assert all(p.grad is not None for p in prompt.parameters())
    assert all(p.grad is None for p in embedding.parameters())


@pytest.mark.parametrize("layer", LAYERS)
def test_rows_come_from_the_layer(layer: str) -> None:
    """What the backbone would see for these tokens, not the bare table."""
    embedding = LAYERS[layer]()
    everything = embedding(torch.arange(VOCABULARY)).detach().float()
    prompt = make_prompt(SMALL, embedding)
    assert (prompt.short_prompt.unsqueeze(1) == everything).all(-1).any(1).all()
    of_text = make_prompt(
        SMALL, embedding, init="text", text="abcdefg", tokenizer=CharacterTokenizer()
    )
    assert torch.equal(of_text.short_prompt, everything[:M])
    assert_leading_directions(of_text.offset_b, everything[M:7], 2)


def test_max_norm_holds_for_rows_not_yet_looked_up() -> None:
    """The layer shortens rows of its table as they are asked for."""
    table = make_table(max_norm=1.0)
    prompt = make_prompt(PARTS["prompt tuning"], table, init=torch.zeros(M, D))
    assert table.weight.norm(dim=-1).min() > 1.1
    assert prompt(make_ids()).inputs_embeds.norm(dim=-1).max() < 1.0 + 1e-5


def test_random_rows_are_scaled_as_the_layer_scales() -> None:
    scaled = make_prompt(
        SMALL, ScaledEmbedding(VOCABULARY, D, _weight=make_table().weight), init="random"
    )
    plain = make_prompt(SMALL, init="random")
    torch.testing.assert_close(scaled.short_prompt, plain.short_prompt * ScaledEmbedding.scale)


def test_hooks_added_later_are_respected() -> None:
    table = make_table()
    prompt = make_prompt(PARTS["prompt tuning"], table)
    handle = table.register_forward_hook(lambda module, args, output: output * 2)
    assert torch.equal(prompt(make_ids()).inputs_embeds[:, M:], 2 * table.weight[make_ids()])
    handle.remove()
    assert torch.equal(prompt(make_ids()).inputs_embeds[:, M:], table.weight[make_ids()])


def twice(module: nn.Module, args: Any, output: Any) -> Any:
    return 2 * output if isinstance(module, nn.Embedding) else None


def next_ids(module: nn.Module, args: Any) -> Any:
    return ((args[0] + 1) % VOCABULARY,) if isinstance(module, nn.Embedding) else None


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("kind", "folded"), [("forward_hook", False), ("forward_pre_hook", True)])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Using `torch.compile.module.` when there are global hooks")
def test_hooks_of_all_modules_are_as_the_layers_own(
    kind: str, folded: bool, compiled: bool
) -> None:
    torch.compiler.reset()
    table, ids, hook = make_table(), make_ids(), twice if kind == "forward_hook" else next_ids
    prompt: nn.Module = shaken(make_prompt(SMALL, table))
    prompt = prompt.fold() if folded else prompt
    plain = prompt(ids).inputs_embeds
    own = getattr(table, f"register_{kind}")(hook)
    expected = prompt(ids).inputs_embeds
    own.remove()
    call = torch.compile(prompt, fullgraph=True, backend="aot_eager") if compiled else prompt
    of_all = getattr(nn.modules.module, f"register_module_{kind}")(hook)
    try:
        got = call(ids).inputs_embeds
    finally:
        of_all.remove()
    assert torch.equal(got, expected)
    assert not torch.equal(got, plain)
    assert torch.equal(call(ids).inputs_embeds, plain)


@pytest.mark.parametrize("parameters", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("table", HALVES, ids=str)
def test_half_precision_tied_table(table: torch.dtype, parameters: torch.dtype) -> None:
    """The output has the table's type; the table gets the head's gradient and nothing more."""
    embedding = make_table(table)
    head = nn.Linear(D, VOCABULARY, bias=False)
    head.weight = embedding.weight
    before = embedding.weight.detach().clone()
    prompt = shaken(make_prompt(SMALL, embedding, dtype=parameters))
    out = prompt(make_ids()).inputs_embeds
    assert out.dtype == table
    exact = by_definition(copy.deepcopy(prompt).double(), before[make_ids()].double(), None, None)
    scale = torch.finfo(table).eps + 4 * torch.finfo(parameters).eps * (parameters != torch.float32)
    assert (out.double() - exact).abs().max() <= scale * exact.abs().max()

    def loss(inputs: Tensor) -> Tensor:
        return head(inputs).float().square().mean()

    (alone,) = torch.autograd.grad(loss(out.detach()), embedding.weight)
    loss(out).backward()
    assert torch.equal(embedding.weight.grad, alone)
    assert torch.equal(embedding.weight, before)
    assert head.weight is embedding.weight
    for name, parameter in prompt.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == parameters
        assert parameter.grad.any(), name


def test_in_a_model_the_table_counts_once() -> None:
    """A copy of the whole model refers to the copied table."""
    model = nn.ModuleDict({"embedding": make_table()})
    model["prompt"] = shaken(make_prompt(SMALL, model["embedding"]))
    assert sum(p.numel() for p in model.parameters()) == VOCABULARY * D + SMALL.num_parameters
    twin = copy.deepcopy(model)
    assert twin["prompt"].embedding is twin["embedding"]
    assert twin["prompt"].embedding is not model["embedding"]


# Folding, gates, training


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("part", PARTS)
def test_fold(part: str, backend: str, tasks: int | None, parameters: torch.dtype) -> None:
    """The same bits for every input, nothing to train, and no part in later training."""
    table = make_table()
    prompt = shaken(
        make_prompt(PARTS[part], table, num_tasks=tasks, dtype=parameters, backend=backend)
    )
    folded = prompt.fold()
    assert isinstance(folded, FoldedEPTPrompt)
    assert not list(folded.parameters())
    present = {"prompt"} | {"offset_a", "offset_b"} & set(prompt.state_dict())
    assert set(folded.state_dict()) == present
    assert not any(isinstance(tensor, nn.Parameter) for tensor in folded.buffers())
    assert folded.embedding is table
    task_ids = None if tasks is None else torch.tensor([2, 0, 2, 1])
    ids = make_ids()
    calls = [
        {"input_ids": ids},
        {"inputs_embeds": table.weight[ids].detach()},
        *(
            {"input_ids": ids, "attention_mask": make_mask(padding, 4, 6, seeded(2))}
            for padding in PADDINGS
        ),
    ]
    # PyTorch's matmul, and with it the definition, takes another way where gradients are on.
    with torch.set_grad_enabled(backend == "eager"):
        expected = [prompt(**call, task_ids=task_ids) for call in calls]
        assert torch.equal(folded.reconstruct(), prompt.reconstruct())
    for trained in (False, True):
        if trained:
            shaken(prompt, seed=99)
            assert not torch.equal(prompt(ids, task_ids=task_ids)[0], expected[0][0])
        for call, outputs in zip(calls, expected, strict=True):
            out = folded(**call, task_ids=task_ids)
            assert not out.inputs_embeds.requires_grad
            for got, wanted in zip(out, outputs, strict=True):
                assert torch.equal(got, wanted)


def test_a_folded_prompt_passes_gradients_to_inputs_embeds() -> None:
    embeds = torch.randn(4, 6, D, requires_grad=True)
    shaken(make_prompt()).fold()(inputs_embeds=embeds).inputs_embeds.sum().backward()
    assert torch.equal(embeds.grad, torch.ones_like(embeds))


def gates_by_definition(prompt: FusedEPTPrompt) -> Tensor:
    """METHOD, steps 1, 2 and 4, in float64."""
    c = prompt.config
    tensors = {
        name: None if t is None else t.detach().double()
        for name, t in parameters_of(prompt).items()
    }
    fused = p = tensors["short_prompt"]
    if c.fusion and c.rank:
        delta = c.alpha / c.rank**0.5 * (tensors["offset_a"] @ tensors["offset_b"])
        fused = p + ((p @ delta.mT) / D**0.5).softmax(-1) @ delta
    logits = (fused @ tensors["gate_weight"] + tensors["gate_bias"].unsqueeze(-2)) / c.temperature
    if c.gate == "prompt":
        logits = logits.mean(-2, keepdim=True).expand_as(logits)
    return logits.softmax(-1)


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("part", ["ept", "prompt gate", "no fusion", "no offset"])
def test_gate_weights(part: str, tasks: int | None, dtype: torch.dtype, autocast: bool) -> None:
    prompt = shaken(make_prompt(PARTS[part], num_tasks=tasks, dtype=dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        gates = prompt.gate_weights()
    expected = gates_by_definition(prompt)
    assert gates.shape == expected.shape == (*(() if tasks is None else (tasks,)), M, 3)
    assert not gates.requires_grad
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(gates.double(), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(
        gates.double().sum(-1), torch.ones(gates.shape[:-1]).double(), rtol=0, atol=tolerance
    )
    same = (gates == gates[..., :1, :]).all()
    assert bool(same) == (part == "prompt gate")


@pytest.mark.parametrize(
    ("part", "groups"),
    [
        ("ept", ["prompt", "offset", "spaces"]),
        ("no spaces", ["prompt", "offset"]),
        ("no offset", ["prompt", "spaces"]),
        ("prompt tuning", ["prompt"]),
    ],
)
def test_parameter_groups(part: str, groups: list[str]) -> None:
    prompt = make_prompt(PARTS[part])
    got = prompt.parameter_groups(0.3, 0.02, 0.001)
    assert [group["name"] for group in got] == groups
    rates = {"prompt": 0.3, "offset": 0.02, "spaces": 0.001}
    assert all(set(g) == {"name", "params", "lr"} and g["lr"] == rates[g["name"]] for g in got)
    names = {id(p): name for name, p in prompt.named_parameters()}
    owner = [(names[id(p)], group["name"]) for group in got for p in group["params"]]
    assert len(owner) == len(dict(owner))  # each once
    assert set(dict(owner)) == set(names.values())
    of = {"short_prompt": "prompt", "offset_a": "offset", "offset_b": "offset"}
    assert all(group == of.get(name, "spaces") for name, group in owner)


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("part", PARTS)
def test_an_optimizer_step_changes_every_parameter(part: str, tasks: int | None) -> None:
    table = make_table()
    weight = table.weight.detach().clone()
    prompt = shaken(make_prompt(PARTS[part], table, num_tasks=tasks))
    before = state(prompt)
    optimizer = torch.optim.AdamW(prompt.parameter_groups(0.1, 0.1, 0.1), weight_decay=0.0)
    task_ids = None if tasks is None else torch.tensor([2, 0, 2, 1])
    cotangent = torch.randn(4, M + 6, D, generator=seeded(4))
    (prompt(make_ids(), task_ids=task_ids).inputs_embeds * cotangent).sum().backward()
    optimizer.step()
    for name, parameter in prompt.named_parameters():
        changed = (parameter != before[name]).flatten(1 if tasks else 0).any(-1)
        assert changed.all(), name
    assert torch.equal(table.weight, weight)


def test_training_from_a_fresh_prompt_reaches_every_parameter() -> None:
    """From A = 0 and U = 0, which alone stop the gradients of B, D and G in the first step."""
    prompt = make_prompt()
    before = state(prompt)
    optimizer = torch.optim.AdamW(prompt.parameter_groups(0.1, 0.1, 0.1), weight_decay=0.0)
    target = torch.randn(4, M + 6, D, generator=seeded(4))
    losses = []
    for _ in range(30):
        loss = (prompt(make_ids()).inputs_embeds - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    assert all((parameter != before[name]).any() for name, parameter in prompt.named_parameters())


# State


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("part", PARTS)
def test_deepcopy_and_state_dict(part: str, tasks: int | None) -> None:
    prompt = shaken(make_prompt(PARTS[part], num_tasks=tasks))
    before = state(prompt)
    twin = copy.deepcopy(prompt)
    assert twin.config == prompt.config
    assert twin.num_tasks == tasks
    other = FusedEPTPrompt(PARTS[part], make_table(), num_tasks=tasks, generator=seeded(8))
    other.load_state_dict(prompt.state_dict())
    task_ids = None if tasks is None else torch.tensor([2, 0, 2, 1])
    expected = prompt(make_ids(), task_ids=task_ids)
    for copied in (twin, other):
        assert_same_state(state(copied), before)
        for got, wanted in zip(copied(make_ids(), task_ids=task_ids), expected, strict=True):
            assert torch.equal(got, wanted)
        shaken(copied, seed=50)
        assert_same_state(state(prompt), before)


@pytest.mark.parametrize("dtype", [torch.float64, *HALVES], ids=str)
def test_to_another_type(dtype: torch.dtype) -> None:
    prompt = shaken(make_prompt())
    expected = {name: tensor.to(dtype) for name, tensor in state(prompt).items()}
    assert prompt.to(dtype) is prompt
    assert_same_state(state(prompt), expected)
    assert prompt.reconstruct().dtype == dtype
    for call in (prompt, prompt.fold()):
        assert call(make_ids()).inputs_embeds.dtype == torch.float32
    assert torch.equal(prompt(make_ids())[0], prompt.fold()(make_ids())[0])


def test_repr_shows_the_config() -> None:
    for module in (make_prompt(), make_prompt().fold()):
        text = repr(module)
        assert all(f"{k}={v!r}" in text for k, v in SMALL.to_dict().items())
