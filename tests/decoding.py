"""Generation by the definition: the whole sequence computed anew for every token.

METHOD's equations in plain PyTorch (the reference) over text and generated tokens, offsets for the
first n of them, one row at a time and without padding, through an untouched copy of the model. Most
of it in float64, where a defect cannot pass for rounding.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ept_fast import EPTConfig, get_ept_model, reference
from ept_fast.transformers.tasks import EPTModel
from tests.architectures import BOTH, BY_NAME, VOCABULARY, in_float64

M, N = 3, 10  # prompt, and positions that the offset covers
LENGTHS = (7, 1, 4)
NEW = 9  # the longest row leaves the offset behind, the others come close or stay within
PLACES = ("left", "right", "both", "holes")
EXACT = {"rtol": 0.0, "atol": 1e-9}
ENDLESS = {"do_sample": False, "eos_token_id": None}
GREEDY = {"max_new_tokens": NEW, **ENDLESS}
LOGITS = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}


class Trial(NamedTuple):
    """The wrapped model, an untouched copy of the backbone, and texts."""

    name: str
    model: EPTModel
    plain: Any
    rows: list[Tensor]


@torch.no_grad()
def make_trial(
    name: str, dtype: torch.dtype = torch.float64, model: Any = None, **choices: Any
) -> Trial:
    """A model with all of the prompt's tensors filled."""
    architecture = BY_NAME[name]
    task = "SEQ_2_SEQ_LM" if architecture.kind == BOTH else "CAUSAL_LM"
    backbone = architecture.build(task, dtype=dtype) if model is None else model
    for key, tensor in backbone.named_parameters():
        if "EncDecAttention.o" in key:  # else random T5 repeats its start, whatever the text
            tensor *= 8
    plain = copy.deepcopy(backbone).eval()
    sizes: dict[str, Any] = {"num_virtual_tokens": M, "max_length": N, "rank": 4, "num_spaces": 2}
    width = plain.get_input_embeddings().weight.shape[1]
    config = EPTConfig(width, **{**sizes, **choices})
    seed = torch.Generator().manual_seed(choices.get("rank", 1))
    parameters = torch.promote_types(dtype, torch.float32)
    wrapped = get_ept_model(backbone, config, task, generator=seed, dtype=parameters)
    for tensor in wrapped.prompt.parameters():
        tensor += 0.5 * torch.randn(tensor.shape, generator=seed, dtype=torch.float64)
    draw = torch.Generator().manual_seed(5)
    rows = [torch.randint(3, VOCABULARY, (length,), generator=draw) for length in LENGTHS]
    return Trial(name, wrapped.eval(), plain, rows)


trial = cache(make_trial)


def embeddings(made: Trial, ids: Tensor, covered: int = N) -> Tensor:
    """``[1, m + L, d]`` by the definition, offsets for the first ``covered`` tokens only."""
    prompt, c = made.model.prompt, made.model.prompt.config
    tensors = dict(prompt.named_parameters())
    head = reference.reconstruct_prompt(**tensors, scaling=c.scaling)
    text = made.plain.get_input_embeddings()(ids.unsqueeze(0))
    offset = {name: tensors[name] for name in ("offset_a", "offset_b") if c.rank}
    first = reference.splice_prompt(
        head, inputs_embeds=text[:, :covered], scaling=c.scaling, **offset
    )
    return torch.cat([first, text[:, covered:]], 1)


def last_logits(made: Trial, ids: Tensor, covered: int = N) -> Tensor:
    """``[V]`` for the token after these."""
    rows = embeddings(made, ids, covered)
    mask = torch.ones(rows.shape[:2], dtype=torch.int64)
    output = made.plain(inputs_embeds=rows, attention_mask=mask, use_cache=False)
    return output.logits[0, -1]


@torch.no_grad()
def defined(made: Trial, ids: Tensor, new: int = NEW, covered: int = N) -> tuple[Tensor, Tensor]:
    """The greedy tokens after a text, ``[new]``, and the logits they come from, ``[new, V]``."""
    length, logits = len(ids), []
    for _ in range(new):
        logits.append(last_logits(made, ids, covered))
        ids = torch.cat([ids, logits[-1].argmax().view(1)])
    return ids[length:], torch.stack(logits)


@cache
def greedy(name: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """What every row of a trial has to get, ``[B, new]`` and ``[B, new, V]``."""
    made = trial(name, dtype)
    with in_float64() if dtype == torch.float64 else nullcontext():
        tokens, logits = zip(*(defined(made, row) for row in made.rows), strict=True)
    return torch.stack(tokens), torch.stack(logits)


def pad(rows: list[Tensor], place: str = "left", extra: int = 1) -> dict[str, Tensor]:
    """The rows in one batch; what stands in the padding is random."""
    draw = torch.Generator().manual_seed(9)
    width = max(map(len, rows)) + extra
    ids = torch.randint(3, VOCABULARY, (len(rows), width), generator=draw)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(rows):
        free = width - len(row)
        where = torch.arange(len(row)) + {"left": free, "both": free // 2}.get(place, 0)
        if place == "holes":
            where = torch.randperm(width, generator=draw)[: len(row)].sort().values
        ids[b, where], mask[b, where] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def assert_greedy(output: Any, given: Tensor, expected: tuple[Tensor, Tensor]) -> None:
    """The text as it was given, then the expected tokens, from the expected logits."""
    tokens, logits = expected
    assert output.sequences.tolist() == torch.cat([given, tokens], 1).tolist()
    torch.testing.assert_close(torch.stack(output.logits, 1), logits, **EXACT)
