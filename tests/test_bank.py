"""One frozen model for many tasks: each row of a batch as its own adapter alone would have it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from ept_fast import CheckpointError, EPTBank, EPTConfig, EPTModel, get_ept_model
from ept_fast.transformers.locks import ReadWriteLock
from tests.architectures import BY_NAME, in_float64

pytestmark = pytest.mark.usefixtures("one_thread")

# m, n and r of the adapters: shorter and longer prompts, one without an offset.
SIZES = {"short": (2, 20, 3), "long": (4, 12, 2), "plain": (5, 8, 0)}
ROWS = ("short", "long", "plain", "long", "short")
CASES = {
    "T5": ("T5", "SEQ_2_SEQ_LM", False),
    "BART": ("BART", "SEQ_2_SEQ_LM", False),
    "Llama": ("Llama", "CAUSAL_LM", False),
    "Mistral": ("Mistral", "CAUSAL_LM", False),
    "GPT-2": ("GPT-2", "CAUSAL_LM", False),
    "BLOOM": ("BLOOM", "CAUSAL_LM", False),
    "BERT": ("BERT", "SEQ_CLS", True),
    "BERT, its head": ("BERT", "SEQ_CLS", False),
    "RoBERTa, its head": ("RoBERTa", "SEQ_CLS", False),
    "DistilBERT": ("DistilBERT", "SEQ_CLS", True),
    "Llama classifier": ("Llama", "SEQ_CLS", False),
    "BERT, tokens": ("BERT", "TOKEN_CLS", True),
    "ELECTRA, features": ("ELECTRA", "FEATURE_EXTRACTION", True),
}


def config_of(width: int, m: int, n: int, r: int) -> EPTConfig:
    return EPTConfig(width, num_virtual_tokens=m, max_length=n, rank=r, num_spaces=1, space_dim=2)


def adapter(case: str, sizes: tuple[int, int, int], seed: int, classes: int = 2) -> EPTModel:
    """A model in float64 with all of its adapter's tensors filled."""
    name, task, bare = CASES[case]
    built = BY_NAME[name].build(task, bare=bare, dtype=torch.float64)
    labels = [str(i) for i in range(classes)] if bare and task.endswith("CLS") else None
    config = config_of(BY_NAME[name].width, *sizes)
    model = get_ept_model(built, config, task, labels=labels, dtype=torch.float64)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=draw)
    model.heads.double()
    return model.eval()


def batch() -> tuple[Tensor, Tensor]:
    """Rows with padding on either side, of at most 8 tokens."""
    ids = torch.randint(5, 60, (5, 8), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(5, 8, dtype=torch.int64)
    mask[1, 5:] = mask[2, 7:] = mask[3, :2] = 0
    return ids, mask


def decoder_inputs(case: str) -> Tensor | None:
    ids = torch.randint(5, 60, (5, 3), generator=torch.Generator().manual_seed(4))
    return ids if CASES[case][1] == "SEQ_2_SEQ_LM" else None


def values_of(output: Any) -> Tensor:
    found: Tensor = output["logits"] if "logits" in output else output["last_hidden_state"]
    return found


class Alone:
    """The adapters of a case, each in a model of its own, and what their rows give."""

    def __init__(self, case: str, folder: Path) -> None:
        self.case, self.folders, self.models = case, {}, {}
        for number, (name, sizes) in enumerate(SIZES.items()):
            self.models[name] = adapter(case, sizes, seed=number, classes=2 + number)
            self.folders[name] = folder / name
            self.models[name].save_pretrained(folder / name)

    def bank(self, **choices: Any) -> EPTBank:
        return self.bank_of(torch.float64, **choices)

    def bank_of(self, dtype: torch.dtype, **choices: Any) -> EPTBank:
        """Its offsets in this type."""
        name, task, bare = CASES[self.case]
        built = BY_NAME[name].build(task, bare=bare, dtype=torch.float64)
        return EPTBank.from_adapters(built, self.folders, dtype=dtype, **choices)

    def row(self, name: str, number: int) -> Tensor:
        ids, mask = batch()
        kept = mask[number].bool()
        extra = decoder_inputs(self.case)
        inputs = {} if extra is None else {"decoder_input_ids": extra[number : number + 1]}
        with torch.no_grad():
            return values_of(self.models[name](ids[number : number + 1, kept], **inputs))[0]


def during(bank: EPTBank, call: Callable[[], Tensor], change: Callable[[], Any]) -> Tensor:
    """What ``call`` gives if another thread makes the change once the backbone is reached."""
    with ThreadPoolExecutor(1) as pool:
        changes: list[Future[Any]] = []

        def start(*_: Any) -> None:
            for hook in hooks:
                hook.remove()
            changes.append(pool.submit(change))
            wait(changes, timeout=0.3)
            assert not changes[0].done()

        # Some classifiers call what is inside of the backbone.
        modules = bank.model.backbone.children()
        hooks = [m.register_forward_pre_hook(start) for m in (bank.model.backbone, *modules)]
        got = call()
        changes[0].result(60)
    return got


@pytest.fixture(scope="module", params=CASES)
def alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    with in_float64():
        return Alone(request.param, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(autouse=True)
def _doubles() -> Iterator[None]:
    with in_float64():
        yield


def check_rows(bank: EPTBank, alone: Alone, tasks: tuple[str, ...] = ROWS) -> None:
    ids, mask = batch()
    extra = decoder_inputs(alone.case)
    inputs = {} if extra is None else {"decoder_input_ids": extra}
    got = values_of(bank(ids, mask, tasks=tasks, **inputs))
    for number, name in enumerate(tasks):
        expected = alone.row(name, number)
        row = got[number]
        if CASES[alone.case][1] in ("CAUSAL_LM", "TOKEN_CLS", "FEATURE_EXTRACTION"):
            row = row[mask[number].bool()]
        torch.testing.assert_close(row[..., : expected.shape[-1]], expected, rtol=1e-10, atol=1e-10)
        assert (row[..., expected.shape[-1] :] == -torch.inf).all()


@pytest.mark.parametrize("offset", ["auto", "low_rank", "table"])
def test_rows_of_different_tasks(alone: Alone, offset: str) -> None:
    bank = alone.bank(offset=offset)
    assert (bank.bank.offset_table is None) == (offset == "low_rank")
    assert bank.names == tuple(SIZES)
    check_rows(bank, alone)
    check_rows(bank, alone, ("long",) * 5)
    assert not any(p.requires_grad for p in bank.parameters())


def test_rows_by_slot(alone: Alone) -> None:
    bank = alone.bank()
    ids, mask = batch()
    extra = decoder_inputs(alone.case)
    inputs = {} if extra is None else {"decoder_input_ids": extra}
    by_name = values_of(bank(ids, mask, tasks=ROWS, **inputs))
    assert values_of(bank(ids, mask, tasks=bank.ids(ROWS), **inputs)).equal(by_name)


def test_add_replace_and_remove(alone: Alone) -> None:
    bank = alone.bank(capacity=4)
    buffers = {n: b for n, b in bank.named_buffers() if n.startswith("bank.")}
    bank.remove("long")
    assert bank.names == ("short", "plain")
    with pytest.raises(ValueError, match="tasks: expected names among short, plain, got 'long'"):
        bank(*batch(), tasks=ROWS)
    assert bank.add("again", alone.folders["long"]) == 1
    check_rows(bank, alone, ("short", "plain", "plain", "short", "plain"))
    ids, mask = batch()
    extra = decoder_inputs(alone.case)
    inputs = {} if extra is None else {"decoder_input_ids": extra}
    names = ["short", "again", "plain", "again", "short"]
    other = alone.bank()
    expected = values_of(other(ids, mask, tasks=ROWS, **inputs))
    torch.testing.assert_close(values_of(bank(ids, mask, tasks=names, **inputs)), expected)
    # The same name with another adapter, and a model in place of a folder.
    assert bank.replace("again", alone.models["plain"]) == 1
    swapped = values_of(bank(ids, mask, tasks=names, **inputs))
    named = ["short", "plain", "plain", "plain", "short"]
    torch.testing.assert_close(swapped, values_of(bank(ids, mask, tasks=named, **inputs)))
    after = dict(bank.named_buffers())
    assert all(after[n].data_ptr() == b.data_ptr() for n, b in buffers.items())


@pytest.mark.parametrize("offset", ["low_rank", "table"])
def test_memory(alone: Alone, offset: str) -> None:
    bank = alone.bank(capacity=5, offset=offset)
    sizes = bank.memory()
    assert set(sizes) == set(SIZES)
    config = bank.bank.config
    slot = 8 * (
        config.num_virtual_tokens * config.hidden_size
        + config.rank * (config.max_length + config.hidden_size)
        + (config.max_length * config.hidden_size if offset == "table" else 0)
    )
    for name, size in sizes.items():
        head: Any = alone.models[name].head
        if isinstance(head, nn.Linear):  # with the room of the bank's largest, 4 classes
            slot_head = 4 * (head.in_features + 1)
        else:
            slot_head = sum(p.numel() for p in alone.models[name].heads.parameters())
        assert size == slot + 8 * slot_head


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    with in_float64():
        return Alone("Llama", tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    with in_float64():
        return Alone("BERT", tmp_path_factory.mktemp("adapters"))


def test_text_longer_than_its_adapter_covers(llama: Alone) -> None:
    bank = llama.bank()
    ids = torch.full((2, 14), 7)
    bank(ids, tasks=["short", "plain"])  # 20 positions, and no offset at all
    with pytest.raises(ValueError, match=r"row 1: expected at most 12 tokens.*got 14"):
        bank(ids, tasks=["short", "long"])
    mask = torch.ones(2, 14, dtype=torch.int64)
    mask[1, :2] = 0
    bank(ids, mask, tasks=["short", "long"])
    with pytest.raises(ValueError, match=r"expected at most 20 columns, the bank's max_length"):
        bank(torch.full((1, 21), 7), tasks=["plain"])


def test_errors_leave_the_bank_as_it_was(llama: Alone, bert: Alone, tmp_path: Path) -> None:
    bank = llama.bank()
    with pytest.raises(ValueError, match="capacity: expected at most 3 adapters"):
        bank.add("more", llama.folders["long"])
    bank = llama.bank(capacity=4)
    with pytest.raises(ValueError, match="adapter_name: expected a new name, got 'long'"):
        bank.add("long", llama.folders["long"])
    for name in ("../up", "a/b", "", "x.y"):
        with pytest.raises(ValueError, match="adapter_name: expected letters"):
            bank.add(name, llama.folders["long"])
    with pytest.raises(CheckpointError, match="task: expected 'CAUSAL_LM'"):
        bank.add("more", bert.folders["long"])
    with pytest.raises(CheckpointError, match="expected a readable file"):
        bank.add("more", tmp_path / "nothing")
    big = adapter("Llama", (6, 20, 3), seed=9)
    with pytest.raises(ValueError, match="num_virtual_tokens: expected at most 5 as the bank has"):
        bank.add("more", big)
    with pytest.raises(ValueError, match="rank: expected at most 3"):
        bank.replace("long", adapter("Llama", (4, 20, 4), seed=9))
    with pytest.raises(ValueError, match="max_length: expected at most 20"):
        bank.replace("long", adapter("Llama", (4, 21, 3), seed=9))
    with pytest.raises(TypeError, match="adapter: expected a folder, an EPTModel"):
        bank.add("more", 3)
    assert bank.names == tuple(SIZES)
    check_rows(bank, llama)
    bank.add("more", llama.models["long"].prompt)  # no head, so a prompt is enough
    ids, mask = batch()
    assert bank(ids, mask, tasks=["more"] * 5).logits.equal(
        bank(ids, mask, tasks=["long"] * 5).logits
    )


def test_heads_have_to_agree(bert: Alone) -> None:
    bank = bert.bank(capacity=5)
    assert bank.labels("plain") == ("0", "1", "2", "3")
    built = BY_NAME["BERT"].build("SEQ_CLS", bare=True, dtype=torch.float64)
    sizes = config_of(32, 2, 8, 1)
    first = get_ept_model(built, sizes, "SEQ_CLS", labels=["a", "b"], pooling="first")
    with pytest.raises(ValueError, match="pooling: expected 'mean' as the bank's other adapters"):
        bank.add("more", first)
    first.unload()
    many = get_ept_model(built, sizes, "SEQ_CLS", labels=["a", "b", "c", "d", "e"])
    with pytest.raises(ValueError, match="num_labels: expected at most 4 classes"):
        bank.add("more", many)
    with pytest.raises(ValueError, match="adapter: expected a folder or a model with a head"):
        bank.add("more", many.prompt)
    assert bank.names == tuple(SIZES)
    check_rows(bank, bert)


def test_adapters_of_another_model(bert: Alone) -> None:
    """Refused before anything is written, with heads of the same task or without."""
    bank = bert.bank(capacity=4)
    other = adapter("RoBERTa, its head", (2, 8, 1), seed=1)
    for write in (lambda: bank.add("more", other), lambda: bank.replace("long", other)):
        with pytest.raises(ValueError, match="adapter: expected one for model_type bert, got robe"):
            write()
    check_rows(bank, bert)


def test_heads_of_an_empty_bank(bert: Alone) -> None:
    """A refused first adapter, and adapters that are gone, decide nothing."""
    bank = bert.bank()
    for name in SIZES:
        bank.remove(name)
    built = BY_NAME["BERT"].build("SEQ_CLS", bare=True, dtype=torch.float64)
    first = get_ept_model(
        built, config_of(32, 2, 8, 1), "SEQ_CLS", labels=["a", "b"], pooling="first"
    )
    first.heads.double()
    big = get_ept_model(
        BY_NAME["BERT"].build("SEQ_CLS", bare=True),
        config_of(32, 6, 8, 1),
        "SEQ_CLS",
        labels=["a", "b"],
        pooling="last",
    )
    with pytest.raises(ValueError, match="num_virtual_tokens: expected at most 5"):
        bank.add("big", big)
    bank.add("first", first)
    ids, mask = batch()
    got = bank(ids, mask, tasks=["first"] * 5).logits[:, :2]
    torch.testing.assert_close(got, first.eval()(ids, mask).logits, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="num_virtual_tokens"):
        bank.replace("first", big)
    torch.testing.assert_close(bank(ids, mask, tasks=["first"] * 5).logits[:, :2], got)


def test_heads_in_half_precision_are_kept_in_single(bert: Alone) -> None:
    bank = EPTBank(
        BY_NAME["BERT"].build("SEQ_CLS", bare=True),
        "SEQ_CLS",
        capacity=2,
        num_virtual_tokens=4,
        max_length=12,
        rank=2,
    )
    model = adapter("BERT", (4, 12, 2), seed=3)
    model.heads.bfloat16()
    bank.add("one", model)
    assert bank.model.head.weight.dtype == torch.float32


def test_values_beyond_the_bank_s_type(llama: Alone) -> None:
    bank = llama.bank_of(torch.bfloat16)
    big = adapter("Llama", (4, 12, 2), seed=3)
    big.prompt.offset_b.data[0, 0] = 1e300
    before = {name: buffer.clone() for name, buffer in bank.bank.named_buffers()}
    with pytest.raises(ValueError, match=r"offset_b: expected values within torch\.bfloat16"):
        bank.replace("long", big)
    assert all(before[name].equal(buffer) for name, buffer in bank.bank.named_buffers())


def test_unload(llama: Alone) -> None:
    backbone = BY_NAME["Llama"].build("CAUSAL_LM", dtype=torch.float64)
    assert EPTBank.from_adapters(backbone, llama.folders).unload() is backbone
    assert all(p.requires_grad for p in backbone.parameters())
    with pytest.raises(ValueError, match="num_virtual_tokens: expected at most 1"):
        EPTBank.from_adapters(backbone, llama.folders, num_virtual_tokens=1)
    assert all(p.requires_grad for p in backbone.parameters())


def test_bad_calls(llama: Alone) -> None:
    bank = llama.bank()
    ids, mask = batch()
    with pytest.raises(ValueError, match="tasks: expected names among short, long, plain"):
        bank(ids, mask, tasks=["nope"] * 5)
    with pytest.raises(ValueError, match="tasks: expected one for each of 5 rows, got 2"):
        bank(ids, mask, tasks=["long"] * 2)
    with pytest.raises(TypeError, match="tasks: expected a name for each row, got the string"):
        bank(ids, mask, tasks="long")
    with pytest.raises(ValueError, match=r"tasks: expected slots among \[0, 1, 2\], got \[7\]"):
        bank(ids, mask, tasks=torch.tensor([0, 1, 2, 7, 0]))
    with pytest.raises(ValueError, match="labels: expected None"):
        bank(ids, mask, tasks=ROWS, labels=ids)
    with pytest.raises(ValueError, match="adapters: expected at least one"):
        EPTBank.from_adapters(BY_NAME["Llama"].build("CAUSAL_LM"), {})


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_once_for_all_adapters(llama: Alone) -> None:
    """A task that is added or replaced is served by the code that is there."""
    bank = llama.bank(capacity=4)
    ids = batch()[0]
    counter = CompileCounterWithBackend("eager")
    call = torch.compile(
        lambda i, t: bank(i, tasks=t).logits, backend=counter, fullgraph=True, dynamic=False
    )
    slots = bank.ids(ROWS)
    torch.testing.assert_close(call(ids, slots), bank(ids, tasks=slots).logits)
    bank.add("more", llama.folders["long"])
    bank.replace("short", llama.folders["long"])
    slots = bank.ids(["more", "short", "long", "plain", "plain"])
    torch.testing.assert_close(call(ids, slots), bank(ids, tasks=slots).logits)
    assert counter.frame_count == 1


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("tasks", [ROWS, ("short",) * 5], ids=["mixed", "shorter"])
def test_unpadded_texts_behind_shorter_prompts(
    llama: Alone, tasks: tuple[str, ...], prefix: bool
) -> None:
    """A mask of ones, which ``generate`` drops, and one that is not given."""
    ids, bank = batch()[0], llama.bank()
    choices = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
    more = {"prefix": bank.prefix_cache()} if prefix else {}
    for mask in (torch.ones_like(ids), None):
        got = bank.generate(ids, mask, tasks=tasks, **choices, **more)
        for number, name in enumerate(tasks):
            (expected,) = llama.models[name].generate(ids[number : number + 1], **choices)
            assert got[number].equal(expected)


@pytest.mark.parametrize("offset", ["low_rank", "table"])
@pytest.mark.parametrize("choices", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generation(alone: Alone, choices: dict[str, Any], offset: str) -> None:
    """Past the positions that some of the offsets cover."""
    ids, mask = batch()
    bank = alone.bank(offset=offset)
    if CASES[alone.case][1] not in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        with pytest.raises(TypeError, match="generate: expected a task that generates"):
            bank.generate(ids, mask, tasks=ROWS)
        return
    choices = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, **choices}
    choices |= {"return_dict_in_generate": True, "output_logits": True}
    start = 0 if CASES[alone.case][1] == "SEQ_2_SEQ_LM" else ids.shape[1]
    got = bank.generate(ids, mask, tasks=ROWS, **choices)
    beams = choices.get("num_beams", 1)
    for number, name in enumerate(ROWS):
        text = ids[number : number + 1, mask[number].bool()]
        expected = alone.models[name].generate(text, **choices)
        new = expected.sequences[0, start and text.shape[1] :]
        assert got.sequences[number, start:].equal(new)
        rows = slice(number * beams, (number + 1) * beams)
        for step, logits in zip(got.logits, expected.logits, strict=True):
            torch.testing.assert_close(step[rows], logits, rtol=1e-9, atol=1e-9)
    # The tasks matter: other adapters see it otherwise.
    others = bank.generate(ids, mask, tasks=ROWS[1:] + ROWS[:1], **choices)
    assert not torch.allclose(others.logits[-1], got.logits[-1])


def test_a_change_waits_for_a_call(alone: Alone) -> None:
    """Whoever calls meanwhile sees the old adapter whole, and afterwards the new one whole."""
    ids, mask = batch()
    extra = decoder_inputs(alone.case)
    inputs = {} if extra is None else {"decoder_input_ids": extra}
    bank = alone.bank()

    def call() -> Tensor:
        return values_of(bank(ids, mask, tasks=["long"] * 5, **inputs))

    old = call()
    got = during(bank, call, lambda: bank.replace("long", alone.folders["short"]))
    torch.testing.assert_close(got, old, rtol=0, atol=0)
    torch.testing.assert_close(
        call(), values_of(bank(ids, mask, tasks=["short"] * 5, **inputs)), rtol=0, atol=0
    )
    during(bank, call, lambda: bank.remove("short"))
    during(bank, call, lambda: bank.add("more", alone.folders["short"]))


@pytest.mark.parametrize("prefix", [False, True])
def test_a_change_waits_for_generate(llama: Alone, prefix: bool) -> None:
    ids, mask = batch()
    bank = llama.bank()
    more: dict[str, Any] = {"prefix": bank.prefix_cache()} if prefix else {}

    def call() -> Tensor:
        choices = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
        output = bank.generate(ids, mask, tasks=ROWS, output_logits=True, **choices, **more)
        return torch.stack(output.logits)

    def change() -> None:
        bank.replace("long", llama.folders["short"])
        if prefix:
            more["prefix"].update()

    old = call()
    torch.testing.assert_close(during(bank, call, change), old, rtol=0, atol=0)
    assert not torch.allclose(call(), old)


def test_a_change_within_a_call_is_an_error(llama: Alone) -> None:
    """It would wait for itself."""
    ids, mask = batch()
    bank = llama.bank()
    hook = bank.model.backbone.register_forward_pre_hook(lambda *_: bank.remove("short"))
    with pytest.raises(RuntimeError, match="expected a change outside of forward and generate"):
        bank(ids, mask, tasks=ROWS)
    hook.remove()
    assert bank.names == tuple(SIZES)
    copied = copy.deepcopy(bank)
    copied.remove("short")
    assert bank.names == tuple(SIZES)


def test_a_lock_for_readers_and_a_writer() -> None:
    lock = ReadWriteLock()
    reading, release = threading.Event(), threading.Event()
    order: list[str] = []

    def read() -> None:
        with lock.reading(), lock.reading():  # the inner one passes those who wait to write
            reading.set()
            assert release.wait(60)
            order.append("first")

    def write() -> None:
        with lock.writing(), lock.writing(), lock.reading():
            order.append("writer")
        with pytest.raises(KeyError), lock.writing():
            raise KeyError

    def read_later() -> None:
        with lock.reading():
            order.append("later")

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(read)
        assert reading.wait(60)
        writer = pool.submit(write)
        while not lock._waiting:
            pass
        later = pool.submit(read_later)
        wait([writer, later], timeout=0.1)
        assert order == []
        release.set()
        for each in (first, writer, later):
            each.result(60)
    assert order[:2] == ["first", "writer"]
    assert sorted(order) == ["first", "later", "writer"]
