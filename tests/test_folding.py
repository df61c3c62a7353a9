"""Offsets of a folded prompt from a table, or inside the model's own table of positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ept_fast import EPTConfig, FusedEPTPrompt
from ept_fast.prompts.table import offset_table
from ept_fast.transformers.tasks import EPTModel, get_ept_model
from tests.architectures import BY_NAME, VOCABULARY, WIDTH, in_float64
from tests.decoding import EXACT, LOGITS, PLACES, M, N, assert_greedy, make_trial, pad

pytestmark = pytest.mark.usefixtures("one_thread")

D, TEXT = 12, 6
ROWS = 4


# A table of offsets


def make_prompt(
    tasks: int | None = None, dtype: torch.dtype = torch.float32, **choices: Any
) -> FusedEPTPrompt:
    """A prompt, or a bank of them, with all tensors filled."""
    draw = torch.Generator().manual_seed(1)
    sizes = {"num_virtual_tokens": 3, "max_length": 9, "rank": 4, "num_spaces": 2, **choices}
    table = nn.Embedding(20, D)
    prompt = FusedEPTPrompt(
        EPTConfig(D, **sizes), table, num_tasks=tasks, generator=draw, dtype=dtype
    )
    with torch.no_grad():
        for tensor in prompt.parameters():
            tensor += 0.3 * torch.randn(tensor.shape, generator=draw).to(dtype)
    return prompt


def inputs(tasks: int | None, mask: str) -> dict[str, Tensor | None]:
    draw = torch.Generator().manual_seed(2)
    masks = {
        "none": None,
        "ones": torch.ones(ROWS, TEXT, dtype=torch.int64),
        "left": (torch.arange(TEXT) >= torch.tensor([[0], [3], [6], [1]])).long(),
        "holes": torch.randint(0, 2, (ROWS, TEXT), generator=draw),
    }
    return {
        "input_ids": torch.randint(0, 20, (ROWS, TEXT), generator=draw),
        "attention_mask": masks[mask],
        "task_ids": None if tasks is None else torch.tensor([2, 0, 2, 1]),
    }


@pytest.mark.parametrize("checked", [True, False], ids=["checked", "as on a GPU"])
@pytest.mark.parametrize("mask", ["none", "ones", "left", "holes"])
@pytest.mark.parametrize("tasks", [None, 3], ids=["single", "bank"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_table(
    dtype: torch.dtype,
    tasks: int | None,
    mask: str,
    checked: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What A and B give, but for one more rounding: of the table."""
    monkeypatch.setattr("ept_fast.prompts.table.values_are_checked", lambda device: checked)
    prompt = make_prompt(tasks, dtype)
    prompt.embedding.to(dtype)
    folded, plain = prompt.fold(offset="table"), prompt.fold()
    assert not list(folded.parameters())
    assert folded.offset_table.dtype == dtype
    call = inputs(tasks, mask)
    got, expected = folded(**call), plain(**call)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        got.inputs_embeds, expected.inputs_embeds, rtol=2 * eps, atol=4 * eps
    )
    assert got.inputs_embeds.dtype == dtype
    for mine, theirs in zip(got[1:], expected[1:], strict=True):
        assert mine.equal(theirs)
    embeds = prompt.embedding(call.pop("input_ids")).detach()
    assert folded(inputs_embeds=embeds, **call).inputs_embeds.equal(got.inputs_embeds)


@pytest.mark.parametrize("tasks", [None, 3], ids=["single", "bank"])
@pytest.mark.parametrize("offset", ["low_rank", "table"])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_code_looks_at_values(offset: str, tasks: int | None) -> None:
    torch.compiler.reset()  # every test compiles the same functions, and their number is limited
    prompt = make_prompt(tasks)
    folded = prompt.fold(offset=offset)
    compiled = torch.compile(folded, fullgraph=True, backend="aot_eager")
    call = inputs(tasks, "holes")
    ids, mask, task_ids = call["input_ids"], call["attention_mask"], call["task_ids"]
    assert ids is not None
    assert mask is not None
    assert compiled(**call).inputs_embeds.equal(folded(**call).inputs_embeds)
    embeds = prompt.embedding(ids).detach().requires_grad_()
    out = compiled(inputs_embeds=embeds, attention_mask=mask, task_ids=task_ids).inputs_embeds
    (grad,) = torch.autograd.grad(out.square().sum(), embeds)
    assert grad.equal(2 * out[:, 3:])
    with pytest.raises(ValueError, match="attention_mask: expected only 0 and 1, got 2 at row 0"):
        compiled(**{**call, "attention_mask": mask + 1 + (mask == 0)})
    for wrong in (-1, 20):
        with pytest.raises(IndexError, match=f"input_ids: expected ids from 0 to 19, got {wrong}"):
            compiled(**{**call, "input_ids": ids * 0 + wrong})
    if task_ids is not None:
        with pytest.raises(IndexError, match="task_ids: expected ids from 0 to 2, got -1 at row 0"):
            compiled(**{**call, "task_ids": task_ids * 0 - 1})


def test_table_is_rounded_once() -> None:
    """c·A·B in the widest of its types, then in the type that was asked for."""
    prompt = make_prompt(dtype=torch.bfloat16)
    exact = (prompt.offset_a.double() * prompt.config.scaling) @ prompt.offset_b.double()
    table = prompt.fold(torch.float32, "table").offset_table
    torch.testing.assert_close(table.double(), exact, rtol=1e-6, atol=1e-6)
    assert prompt.fold(offset="table").offset_table.equal(table.to(torch.bfloat16))
    assert prompt.fold(torch.float32, "table").prompt.dtype == torch.float32
    got = offset_table(prompt.offset_a, prompt.offset_b, prompt.config.scaling, torch.float64)
    assert got.dtype == torch.float64


def test_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table where it is faster, and where nobody would miss the memory."""
    assert make_prompt().fold(offset="auto").offset_table is not None
    for choices in ({"rank": 0},):
        assert make_prompt(**choices).fold(offset="auto").offset_table is None
    prompt = make_prompt()
    prompt.backend = "reference"
    assert prompt.fold(offset="auto").offset_table is None
    monkeypatch.setattr("ept_fast.prompts.table._MOST_BYTES", 9 * D * 4 - 1)
    assert make_prompt().fold(offset="auto").offset_table is None
    assert make_prompt().fold(offset="table").offset_table is not None


@pytest.mark.parametrize("offset", ["low_rank", "table", "none"])
def test_text_longer_than_the_offset_covers(offset: str) -> None:
    folded = make_prompt().fold(offset=offset)
    folded(torch.zeros(1, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"input_ids: expected at most max_length 9 .*got 10"):
        folded(torch.zeros(1, 10, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"inputs_embeds: expected at most max_length 9 .*got 10"):
        folded(inputs_embeds=torch.zeros(1, 10, D))
    make_prompt(rank=0).fold(offset=offset)(torch.zeros(1, 10, dtype=torch.int64))


def test_bad_choices() -> None:
    prompt = make_prompt()
    with pytest.raises(ValueError, match="offset: expected one of low_rank, table, auto, none"):
        prompt.fold(offset="rows")
    with pytest.raises(TypeError, match="dtype: expected a floating dtype"):
        prompt.fold(torch.int64)


class Launches(TorchDispatchMode):
    """The operators that launch a kernel on a GPU: all but views and empty tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        silent = ("detach", "empty", "new_empty", "expand", "select", "slice", "unsqueeze", "view")
        if not func.overloadpacket.__name__.startswith(silent):
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def plain(prompt: Tensor, table: nn.Embedding, ids: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Prompt tuning as libraries have it: look up, concatenate, extend a mask that is given."""
    out = [torch.cat([prompt.expand(len(ids), -1, -1), table(ids)], 1)]
    if mask is not None:
        out.append(torch.cat([torch.ones(len(ids), len(prompt)), mask], 1))
    return out


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("offset", ["low_rank", "none"])
def test_one_launch_more_than_plain_prompt_tuning(
    offset: str, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And that is for the position ids, which plain prompt tuning leaves to the model.

    What a GPU would launch: without the looks at values that a CPU takes, and of the Triton kernel
    its launch.
    """
    prompt = make_prompt()
    prompt.backend = "triton"
    folded, table = prompt.fold(offset=offset), prompt.embedding.requires_grad_(False)
    ids = torch.randint(0, 20, (ROWS, TEXT))
    mask = torch.ones(ROWS, TEXT, dtype=torch.int64) if masked else None
    for module in ("ept_fast.ops.functional", "ept_fast.ops.splice"):
        monkeypatch.setattr(f"{module}.values_are_checked", lambda device: False)
    with Launches() as mine, torch.no_grad():
        monkeypatch.setattr(
            "ept_fast.kernels.splice.run", lambda kernel, *_, **__: mine.names.append("kernel")
        )
        folded(ids, attention_mask=mask)
    with Launches() as theirs:
        plain(folded.prompt, table, ids, mask)
    assert mine.names[0] == "kernel"
    assert len(mine.names) == len(theirs.names) + 1, (mine.names, theirs.names)


# Inside the table of positions

LEARNED = ("BART", "GPT-2", "OPT", "BERT", "RoBERTa", "DistilBERT", "ALBERT", "ELECTRA")
CASES = [
    (name, task)
    for name in LEARNED
    for task in BY_NAME[name].tasks
    if task in ("SEQ_2_SEQ_LM", "CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION")
    and (name, task) != ("BART", "SEQ_CLS")  # an encoder, as for FEATURE_EXTRACTION
]


def build(name: str, task: str, dtype: torch.dtype = torch.float64) -> Any:
    """A backbone whose table of positions is as wide as its embeddings."""
    choices = {"word_embed_proj_dim": WIDTH} if name == "OPT" else {}
    return BY_NAME[name].build(task, dtype=dtype, **choices)


def make_model(
    name: str, task: str, dtype: torch.dtype = torch.float64, backbone: Any = None
) -> EPTModel:
    """A wrapped backbone with all of its prompt's tensors filled."""
    backbone = build(name, task, dtype) if backbone is None else backbone
    width = backbone.get_input_embeddings().weight.shape[1]
    sizes = {"num_virtual_tokens": M, "max_length": N, "rank": 2, "num_spaces": 1}
    parameters = torch.promote_types(dtype, torch.float32)
    model = get_ept_model(backbone, EPTConfig(width, **sizes), task, dtype=parameters)
    fill(model.prompt, 1)
    return model.eval()


@torch.no_grad()
def fill(prompt: Any, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for tensor in prompt.parameters():
        tensor += 0.3 * torch.randn(tensor.shape, generator=draw).to(tensor.dtype)


def text_values(model: Any, task: str, batch: dict[str, Tensor]) -> Tensor:
    """What the model says of the text's real tokens, or of its rows."""
    more = {"decoder_input_ids": batch["input_ids"][:, :3]} if task == "SEQ_2_SEQ_LM" else {}
    with torch.no_grad():
        output = model(**batch, **more)
    values: Tensor = output["logits"] if "logits" in output else output["last_hidden_state"]
    return values if task in ("SEQ_2_SEQ_LM", "SEQ_CLS") else values[batch["attention_mask"] == 1]


def padded(place: str) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(8)
    return pad([torch.randint(5, VOCABULARY, (n,), generator=draw) for n in (7, 1, 4)], place)


@pytest.mark.parametrize(("name", "task"), CASES)
def test_positions(name: str, task: str) -> None:
    """The logits of the low-rank offset, whatever the padding; and the model as it was again."""
    with in_float64():
        backbone = build(name, task)
        before = {n: (id(p), p.clone()) for n, p in backbone.named_parameters()}
        model = make_model(name, task, backbone=backbone)
        expected = {place: text_values(model, task, padded(place)) for place in PLACES}
        offset = model.prompt.offset_a.detach().clone()
        model.prompt.offset_a.data.zero_()
        without = text_values(model, task, padded("left"))
        model.prompt.offset_a.data.copy_(offset)
        model.fold(offset="positions")
        assert model.active_prompt.offset_a is None
        for place in PLACES:
            got = text_values(model, task, padded(place))
            torch.testing.assert_close(got, expected[place], **EXACT)
        assert (expected["left"] - without).abs().max() > 1e-3
        with model.disable_adapter():
            plain = build(name, task).eval()
            assert text_values(model, task, padded("right")).equal(
                text_values(plain, task, padded("right"))
            )
        torch.testing.assert_close(
            text_values(model, task, padded("both")), expected["both"], **EXACT
        )
        model.unfold()
        for place in PLACES:
            assert text_values(model, task, padded(place)).equal(expected[place])
        model.fold(offset="positions")
        assert model.unload() is backbone
        after = dict(backbone.named_parameters())
        assert {n: id(p) for n, p in after.items()} == {n: i for n, (i, _) in before.items()}
        assert all(after[n].equal(value) for n, (_, value) in before.items())


@pytest.mark.parametrize("name", ["GPT-2", "OPT"])
def test_generation_with_positions(name: str) -> None:
    """Generated tokens have theirs, and none past max_length."""
    with in_float64():
        model = make_trial(name, model=build(name, "CAUSAL_LM")).model
        batch = padded("left")
        expected = model.generate(**batch, **LOGITS)
        model.fold(offset="positions")
        for more in ({}, {"prefix": model.prefix_cache()}, {"cache_implementation": "static"}):
            got = model.generate(**batch, **LOGITS, **more)
            assert_greedy(got, batch["input_ids"], (expected.sequences[:, 8:], stacked(expected)))


def stacked(output: Any) -> Tensor:
    return torch.stack(output.logits, 1)


def test_adapters_have_tables_of_their_own() -> None:
    with in_float64():
        model = make_model("GPT-2", "CAUSAL_LM")
        own = model.backbone.transformer.wpe
        sizes = {"num_virtual_tokens": 2, "max_length": 12}
        model.add_adapter("other", EPTConfig(WIDTH, rank=3, **sizes), dtype=torch.float64)
        model.add_adapter("bare", EPTConfig(WIDTH, rank=0, **sizes), dtype=torch.float64)
        fill(model.prompts["other"], 3)
        batch, expected = padded("left"), {}
        for name in model.adapter_names:
            model.set_adapter(name)
            expected[name] = text_values(model, "CAUSAL_LM", batch)
        model.fold(offset="positions")
        assert model.active_adapter == "bare"
        for name in (*model.adapter_names, "default"):
            model.set_adapter(name)
            assert (model.backbone.transformer.wpe is own) == (name == "bare")
            torch.testing.assert_close(
                text_values(model, "CAUSAL_LM", batch), expected[name], **EXACT
            )
        model.delete_adapter("other")
        assert set(model.position_tables) == {"default"}
        assert not any(p.requires_grad for p in model.position_tables.parameters())
        assert not [key for key in model.state_dict() if "position" in key or "wpe" in key]
        model.train()
        assert model.backbone.transformer.wpe is own
        assert not model.position_tables


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_positions_in_lower_precision(dtype: torch.dtype) -> None:
    """One rounding of the table in place of one of each sum."""
    model = make_model("BERT", "FEATURE_EXTRACTION", dtype)
    exact = make_model("BERT", "FEATURE_EXTRACTION", torch.float64)
    exact.backbone.load_state_dict(model.backbone.state_dict())
    exact.prompt.load_state_dict(model.prompt.state_dict())
    batch = padded("left")
    with in_float64():
        wanted = text_values(exact, "FEATURE_EXTRACTION", batch)
    errors = []
    for offset in ("low_rank", "positions"):
        model.fold(offset=offset)
        errors.append((text_values(model, "FEATURE_EXTRACTION", batch) - wanted).square().mean())
    assert errors[1] < 4 * errors[0]  # of squares


def test_moved_while_positions_are_folded() -> None:
    """The model's own table goes along."""
    model = make_model("GPT-2", "CAUSAL_LM", torch.float32)
    batch = padded("right")
    model.fold(offset="positions")
    model.to(torch.bfloat16)
    text_values(model, "CAUSAL_LM", batch)
    with model.disable_adapter():
        text_values(model, "CAUSAL_LM", batch)
    model.unfold()
    text_values(model, "CAUSAL_LM", batch)
    assert {p.dtype for p in model.unload().parameters()} == {torch.bfloat16}


def test_text_longer_than_positions_cover() -> None:
    model = make_model("GPT-2", "CAUSAL_LM", torch.float32)
    model.fold(offset="positions")
    with pytest.raises(ValueError, match=f"input_ids: expected at most max_length {N} text posit"):
        model(torch.full((1, N + 1), 7))


class Scaled(nn.Embedding):
    """A table whose rows are not what is added."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_models_that_are_refused() -> None:
    """They say why, and stay as they were: nothing is folded."""
    learned = "expected a model with a table of learned absolute positions"
    for name, task, message in (
        ("Llama", "CAUSAL_LM", learned),
        ("T5", "SEQ_2_SEQ_LM", learned),
        ("DeBERTa v3", "SEQ_CLS", learned),
    ):
        model = make_model(name, task, torch.float32)
        with pytest.raises(ValueError, match=rf"offset: {message} .* got {name[:2]}"):
            model.fold(offset="positions")
        assert not model.folded

    backbone = BY_NAME["OPT"].build("CAUSAL_LM")  # embeddings of 24, positions of 32
    config = EPTConfig(24, num_virtual_tokens=M, max_length=N, rank=2)
    model = get_ept_model(backbone, config, "CAUSAL_LM")
    with pytest.raises(ValueError, match=r"positions as wide as the embeddings, 24, .* got 32"):
        model.fold(offset="positions")
    assert not model.folded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_that_does_more_than_add_positions(dtype: torch.dtype) -> None:
    backbone = build("BERT", "FEATURE_EXTRACTION", dtype)
    embeddings = backbone.embeddings
    own = embeddings.position_embeddings
    embeddings.position_embeddings = Scaled.from_pretrained(own.weight.detach())
    model = make_model("BERT", "FEATURE_EXTRACTION", dtype, backbone=backbone)
    scaled = embeddings.position_embeddings
    with pytest.raises(ValueError, match="expected a model that adds positions to the text's"):
        model.fold(offset="positions")
    assert embeddings.position_embeddings is scaled
    assert not model.folded
    assert not model.position_tables
    with pytest.raises(ValueError, match="offset: expected one of low_rank, table, auto, positio"):
        model.fold(offset="none")
