"""IPT alone: what its prompt is of, its special cases, and what it refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ept_fast import EPTConfig, FusedEPTPrompt, get_ept_model
from ept_fast.ops.types import Text
from ept_fast.prompts.base import Prompt, Seen
from ept_fast.prompts.instance import InstanceConfig, InstancePrompt
from tests.architectures import BY_NAME
from tests.methods import ROWS, Given, arrays_of, make
from tests.parity import needs_interpreter

pytestmark = pytest.mark.usefixtures("one_thread")

D, M, WORDS = 8, 3, 20
READING = {name: row for name, row in ROWS.items() if row.kind == "instance"}
EVERY = pytest.mark.parametrize("row", READING.values(), ids=READING)
DENSE = InstanceConfig(D, M, table_size=WORDS, table_rank=0)


def texts(rows: int = 4, length: int = 6) -> Tensor:
    return torch.randint(WORDS, (rows, length), generator=torch.Generator().manual_seed(1))


def test_a_constant_id_row_is_prompt_tuning() -> None:
    prompt = make(DENSE)
    plain = FusedEPTPrompt(EPTConfig(D, M, rank=0, num_spaces=0), prompt.embedding, init="random")
    ids = texts()
    ids[:, :M] = torch.tensor([4, 0, 11])
    with torch.no_grad():
        plain.short_prompt.copy_(prompt.table[ids[0, :M]])
    out, wanted = prompt(ids), plain(ids)
    for mine, theirs in zip(out, wanted, strict=True):
        assert torch.equal(mine, theirs)
    weights = torch.randn(out.inputs_embeds.shape, generator=torch.Generator().manual_seed(2))
    for each in (out, wanted):
        (each.inputs_embeds * weights).sum().backward()
    of_table = prompt.table.grad
    torch.testing.assert_close(of_table[ids[0, :M]], plain.short_prompt.grad)
    assert torch.count_nonzero(of_table.any(1)) == M


@pytest.mark.parametrize(
    "backend", ["eager", "reference", pytest.param("triton", marks=needs_interpreter)]
)
def test_it_is_torchs_embedding_before_the_text(backend: str) -> None:
    prompt = make(DENSE, backend=backend)
    ids = texts()
    ids[:, 1] = ids[:, 0]  # duplicates, whose gradients add up
    out = prompt(ids).inputs_embeds
    wanted = torch.cat([F.embedding(ids[:, :M], prompt.table), prompt.embedding(ids)], 1)
    assert torch.equal(out, wanted)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (got,), (expected,) = (
        torch.autograd.grad((each * weights).sum(), prompt.table) for each in (out, wanted)
    )
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("num_tasks", [None, 2])
def test_gathered_by_the_splice_or_before_it(num_tasks: int | None) -> None:
    prompt = make(dataclasses.replace(DENSE, table_size=7), num_tasks)
    ids, tasks = texts(), None if num_tasks is None else torch.tensor([1, 0, 0, 1])
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 0, 1], [0, 0, 0, 0, 0, 1], [0] * 6])
    out = prompt(ids, attention_mask=mask, task_ids=tasks).inputs_embeds
    text = Text(ids, prompt.embedding.weight, None, mask, tasks)
    made, _ = prompt.prompt_for(text, Seen(ids))
    assert torch.equal(out[:, :M], made)
    first = 0 if tasks is None else 7
    rows = prompt.table.flatten(0, -2)
    assert torch.equal(out[1, :M], rows[ids[1, [2, 3, 5]] % 7])
    assert torch.equal(out[2, 0], rows[ids[2, 5] % 7])
    assert torch.equal(out[0, :M], rows[first + ids[0, :M] % 7])
    assert not out[2, 1:M].any()
    assert not out[3, :M].any()


@EVERY
def test_padding_changes_no_bit_of_the_prompt(row: Any) -> None:
    """Neither its side, nor its amount, nor the ids in it."""
    prompt = make(row.config(D)).eval()
    ids = texts(1, 5)
    alone = prompt(ids).inputs_embeds[:, :M]
    for left, right, filler in ((0, 4, 0), (3, 0, 0), (2, 2, 19)):
        padded = F.pad(ids, (left, right), value=filler)
        mask = F.pad(torch.ones_like(ids), (left, right))
        out = prompt(padded, attention_mask=mask).inputs_embeds
        assert torch.equal(out[:, :M], alone)


@EVERY
@pytest.mark.parametrize("length", [0, 1, 2, 4, 9])
def test_texts_of_every_length(row: Any, length: int) -> None:
    """Six tokens are read: texts shorter than that, and than a convolution, and longer ones."""
    prompt = make(row.config(D, num_virtual_tokens=6), dtype=torch.float64).eval()
    ids = texts(2, length)
    out = prompt(ids).inputs_embeds
    for i, text in enumerate(ids):
        given = Given(text.numpy(), prompt.embedding.weight.detach()[text].numpy())
        wanted = row.definition(arrays_of(prompt), prompt.config, given)
        np.testing.assert_allclose(out[i, :6].detach().numpy(), wanted, rtol=1e-12, atol=1e-13)


def test_ids_count_modulo_the_table() -> None:
    prompt = make(dataclasses.replace(DENSE, table_size=7))
    ids = torch.tensor([[3, 10, 17, 1]])
    out = prompt(ids).inputs_embeds[0, :M]
    assert torch.equal(out, prompt.table[3].expand(M, D))
    out.sum().backward()
    assert torch.equal(prompt.table.grad[3], torch.full((D,), 3.0))


@EVERY
def test_a_generator_starts_at_rows_of_the_vocabulary(row: Any) -> None:
    layer = nn.Embedding(WORDS, D)
    given = torch.randn(7, D, generator=torch.Generator().manual_seed(3))
    config = row.config(D)
    out = InstancePrompt(config, layer, init=given)(texts()).inputs_embeds[:, :M]
    if config.generator != "none":
        assert torch.equal(out, given[:M].expand_as(out))
    elif not config.table_rank:
        assert torch.equal(out, given[texts()[:, :M] % 7])


def test_a_factored_table_starts_as_large_as_the_vocabulary() -> None:
    layer = nn.Embedding(500, 64)
    prompt: Any = InstancePrompt(InstanceConfig(64, 20, table_size=500), layer)
    table = (prompt.table_codes @ prompt.table_basis).detach()
    assert 0.8 < float(table.std() / layer.weight.detach().std()) < 1.2


@EVERY
def test_embeddings_alone_are_refused(row: Any) -> None:
    prompt = make(row.config(D))
    embeds = torch.zeros(2, 4, D)
    message = "input_ids: expected token ids, as the prompt is read .*, got inputs_embeds"
    with pytest.raises(ValueError, match=message):
        prompt(inputs_embeds=embeds)


def test_a_layer_that_is_no_plain_table_is_looked_up_by_itself() -> None:
    class Scaled(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    prompt = make(DENSE)
    layer = Scaled(WORDS, D)
    prompt.set_input_embeddings(layer)
    out = prompt(texts()).inputs_embeds
    assert torch.equal(out[:, M:], layer(texts()))
    assert torch.equal(out[:, :M], prompt.table[texts()[:, :M]])


TASKS = torch.tensor([0, 1, 1, 0])


@EVERY
@pytest.mark.parametrize(
    ("num_tasks", "change", "error", "message"),
    [
        (None, {"input_ids": torch.zeros(4, 6)}, TypeError, "input_ids: expected dtype int64 or"),
        (None, {"task_ids": TASKS}, ValueError, "task_ids: expected None beside a single table"),
        (2, {}, ValueError, r"task_ids: expected \[4\] integers to match table .*, got None"),
        (2, {"task_ids": TASKS[:3]}, ValueError, r"task_ids: expected shape \[4\] to match"),
        (2, {"task_ids": TASKS - 1}, IndexError, "task_ids: expected ids from 0 to 1, got -1 at"),
        (2, {"task_ids": TASKS + 1}, IndexError, "task_ids: expected ids from 0 to 1, got 2 at"),
        (
            None,
            {"attention_mask": torch.ones(4, 9, dtype=torch.int64)},
            ValueError,
            r"attention_mask: expected shape \[4, 6\] to match input_ids \[4, 6\], got \[4, 9\]",
        ),
        (
            None,
            {"input_ids": texts() + WORDS},
            IndexError,
            "input_ids: expected ids from 0 to 19, got",
        ),
    ],
)
def test_wrong_arguments(
    row: Any,
    num_tasks: int | None,
    change: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    prompt: Prompt = make(row.config(D), num_tasks)
    with pytest.raises(error, match=f"^{message}"):
        prompt(**{"input_ids": texts(), **change})


def test_a_model_without_token_ids_is_refused_when_it_is_called() -> None:
    llama = BY_NAME["Llama"].build("CAUSAL_LM")
    config = InstanceConfig(BY_NAME["Llama"].width, M, table_size=7, table_rank=2)
    model = get_ept_model(llama, config, "CAUSAL_LM").eval()
    embeds = llama.get_input_embeddings()(texts(2, 4))
    with pytest.raises(ValueError, match="input_ids: expected token ids"):
        model(inputs_embeds=embeds)
