"""Damaged checkpoints: every reader refuses each of them, and nothing else comes of it.

A damage stands in the table only where its format can notice it:

- A saved adapter keeps the SHA-256 of its config and tensors: any changed bit of those is refused.
  ``adapter.json`` has none of its own: another label or ``base_model`` is not noticed.
- A prompt's two files hold its config twice, and no checksum: any change of the config, of names,
  types, shapes and places is refused, of a value only one that makes it NaN or infinite. So it is
  for the two files of ``export_plain``.
- A model's state dict (``model.safetensors``) holds a checksum of its description and tensors: any
  changed bit of those is refused.
- PEFT's and DePT's safetensors hold no checksum either, and their config stands in one file:
  besides values, a field that fits any tensors (``lora_alpha``) can change unnoticed.
- Files for vLLM hold the SHA-256 of the tensors. The other fields of its LoRA are vLLM's.
- A file of ``torch.save`` is a zip archive, whose CRC-32 tells any changed bit of a record. What a
  crafted pickle costs in torch's unpickler is not limited and not in the table.
"""

from __future__ import annotations

import colorsys
import contextlib
import ctypes
import encodings.cp437  # noqa: F401  (zipfile would import it on the first odd name)
import faulthandler
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ept_fast import CheckpointError, EPTConfig, FusedEPTPrompt, get_ept_model
from ept_fast.interchange import (
    export_plain,
    export_vllm,
    import_dept,
    import_peft,
    import_plain,
)
from ept_fast.interchange.folder import open_state
from ept_fast.interchange.vllm import read_vllm_adapter
from ept_fast.prompts.base import CONFIG_FILE, TENSOR_FILE
from ept_fast.storage.files import json_bytes
from tests import damage
from tests import interchange as tiny
from tests.architectures import BY_NAME
from tests.damage import Damage

pytest.importorskip("transformers")

from ept_fast.transformers import adapter
from ept_fast.transformers.adapter import ADAPTER_FILE, DESCRIPTION, HEAD_FILE, STATE_FILE
from ept_fast.transformers.bank import EPTBank
from ept_fast.transformers.tasks import EPTModel

pytestmark = pytest.mark.usefixtures("one_thread")

LINUX = sys.platform == "linux"
SECRET = "what stands outside of the folder"
LABELS = ["bad", "fair", "good"]


# What is watched while a checkpoint is read


class Late(BaseException):
    """No Exception, which a reader could take for a sign of damage."""


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Interrupt what takes longer, and end the process if native code does not let it."""

    def interrupt(*_: Any) -> None:
        raise Late(f"not done within {seconds} s")

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(seconds)
    faulthandler.dump_traceback_later(3 * seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@contextlib.contextmanager
def memory_limit(size: int) -> Iterator[None]:
    """Have allocations fail that take more than ``size`` bytes from here on, native ones too."""
    if not LINUX:
        yield
        return
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


class Events:
    """What Python reports to its audit hooks from one thread."""

    def __init__(self) -> None:
        self.thread: int | None = None
        self.seen: list[tuple[str, Any]] = []
        sys.addaudithook(self._note)  # for as long as the process lives

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.thread is not None and self.thread == threading.get_ident():
            self.seen.append((event, arguments[0] if arguments else None))

    @contextlib.contextmanager
    def noted(self) -> Iterator[list[tuple[str, Any]]]:
        self.seen, self.thread = [], threading.get_ident()
        try:
            yield self.seen
        finally:
            self.thread = None


EVENTS = Events()
# All that a reader causes besides opening files: no import, no process, no code that is compiled.
QUIET = {"builtins.id", "object.__getattr__"}


class Opens:
    """What Linux reports of a folder's files that are opened, by native code too."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None)
        self._queue = self._libc.inotify_init1(os.O_NONBLOCK)

    @contextlib.contextmanager
    def noted(self, folder: Path) -> Iterator[list[bytes]]:
        """A list that holds the report, if there is one, at the end."""
        reports: list[bytes] = []
        in_open = 0x20
        watch = self._libc.inotify_add_watch(self._queue, os.fsencode(folder), in_open)
        assert watch > 0
        try:
            yield reports
        finally:
            with contextlib.suppress(BlockingIOError):
                reports.append(os.read(self._queue, 1 << 12))
            self._libc.inotify_rm_watch(self._queue, watch)
            with contextlib.suppress(BlockingIOError):
                os.read(self._queue, 1 << 12)  # that the watch has ended


OPENS = Opens() if LINUX else None


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Fail if a file outside of ``folder`` is opened, or anything happens but reading.

    ``OUTSIDE`` beside the folder is watched for native code as well, on Linux.
    """
    outside = folder.parent / damage.OUTSIDE
    native: Any = contextlib.nullcontext([]) if OPENS is None else OPENS.noted(outside)
    try:
        with native as opened, time_limit(20), memory_limit(256 << 20), EVENTS.noted() as events:
            yield
    finally:
        inside = os.path.realpath(folder) + os.sep
        for event, argument in events:
            if event == "open":
                assert os.path.realpath(os.fsdecode(argument)).startswith(inside), argument
            else:
                assert event in QUIET, (event, argument)
        assert not opened


# What has to stay as it is


def bits(module: nn.Module) -> list[Any]:
    """Every tensor to the bit, which of them are trained, and the modules' modes."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return [
        *((n, t.dtype, t.shape, t.requires_grad, t.detach().numpy().tobytes()) for n, t in tensors),
        *((name, type(part), part.training) for name, part in module.named_modules()),
    ]


@dataclass
class Live:
    """What is loaded already.

    Attributes:
        readers: every way to read a checkpoint, by its name.
        modules: whose values have to stay.
        names: what else has to stay.
    """

    readers: Mapping[str, Callable[[Path], Any]]
    modules: tuple[nn.Module, ...] = ()
    names: Callable[[], Any] = tuple

    def state(self) -> Any:
        return [bits(module) for module in self.modules], self.names()


# The formats


def build(bare: bool) -> Any:
    return BY_NAME["BERT"].build("SEQ_CLS", bare=bare)


def make_model(bare: bool, seed: int) -> EPTModel:
    """With a linear head, or with a copy of the model's own; every trained value is the seed's."""
    config = EPTConfig(32, num_virtual_tokens=3, max_length=9, rank=2, num_spaces=2, space_dim=2)
    generator = torch.Generator().manual_seed(seed)
    labels = LABELS if bare else None
    model = get_ept_model(build(bare), config, "SEQ_CLS", labels=labels, generator=generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def table() -> nn.Embedding:
    return nn.Embedding(17, tiny.D, _weight=tiny.random(17, tiny.D))


def live_prompt() -> Live:
    prompt = tiny.make_prompt(table(), seed=9)
    readers = {
        "from_pretrained": lambda folder: FusedEPTPrompt.from_pretrained(folder, prompt.embedding),
        "load_pretrained": prompt.load_pretrained,
    }
    return Live(readers, (prompt,))


def live_model(bare: bool) -> Live:
    model, served = make_model(bare, seed=2), make_model(bare, seed=3)
    backbone = build(bare).requires_grad_(False).eval()  # as `from_pretrained` makes it
    sizes: dict[str, Any] = {"num_virtual_tokens": 3, "max_length": 9, "rank": 2, "num_labels": 3}
    bank = EPTBank(build(bare), "SEQ_CLS", capacity=3, **sizes)
    bank.add("first", served)
    readers = {
        "load_adapter": lambda folder: model.load_adapter(folder, "second"),
        "load_pretrained": model.load_pretrained,
        "EPTModel.from_pretrained": lambda folder: EPTModel.from_pretrained(folder, backbone),
        "EPTBank.add": lambda folder: bank.add("second", folder),
        "EPTBank.replace": lambda folder: bank.replace("first", folder),
    }

    def names() -> Any:
        held = [
            (each.adapter_names, each.active_adapter, dict(each.descriptions), tuple(each.heads))
            for each in (model, bank.model)
        ]
        return held, [(name, bank.labels(name), bank.ids([name]).item()) for name in bank.names]

    return Live(readers, (model, backbone, bank), names)


def live_import(read: Callable[..., Any]) -> Live:
    layer = table()
    return Live({read.__name__: lambda folder: read(folder, layer)}, (layer,))


class Format(NamedTuple):
    """How an intact checkpoint is saved and what reads it."""

    save: Callable[[Path], Any]
    live: Callable[[], Live]
    sealed_again: bool = False


def seal(folder: Path) -> None:
    """Write down the checksums of the files as they are, so that these are not what is noticed."""
    path = folder / ADAPTER_FILE
    values = json.loads(path.read_text())
    for name in values["sha256"]:
        if (folder / name).stat().st_size < 1 << 30:
            values["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    path.write_text(json.dumps(values, indent=2))


def save_prompt(folder: Path, **changes: Any) -> None:
    tiny.make_prompt(**changes).save_pretrained(folder)


def save_dept(folder: Path, pickled: bool = False) -> None:
    tiny.save_adapter(folder, tiny.DEPT_CONFIG, tiny.dept_state(tiny.DEPT_CONFIG), pickled=pickled)


def save_peft(folder: Path, pickled: bool = False) -> None:
    tiny.save_adapter(folder, tiny.PEFT_CONFIG, tiny.peft_state(tiny.PEFT_CONFIG), pickled=pickled)


def save_model(folder: Path, bare: bool = True) -> None:
    make_model(bare, seed=1).save_pretrained(folder)


def save_state(folder: Path, bare: bool = True) -> None:
    """As transformers' Trainer does."""
    folder.mkdir()
    save_file(make_model(bare, seed=1).state_dict(), folder / STATE_FILE, {"format": "pt"})


def save_plain(folder: Path, offset: str = "table") -> None:
    export_plain(tiny.make_prompt(), folder, offset=offset)


def save_vllm(folder: Path) -> None:
    export_vllm(tiny.make_prompt(), folder)


FORMATS = {
    "prompt": Format(save_prompt, live_prompt),
    "adapter": Format(save_model, lambda: live_model(True)),
    "adapter sealed again": Format(save_model, lambda: live_model(True), True),
    "adapter of an own head": Format(
        lambda folder: save_model(folder, False), lambda: live_model(False), True
    ),
    "state": Format(save_state, lambda: live_model(True)),
    "state of an own head": Format(
        lambda folder: save_state(folder, False), lambda: live_model(False)
    ),
    "DePT": Format(save_dept, lambda: live_import(import_dept)),
    "DePT of torch.save": Format(
        lambda folder: save_dept(folder, True), lambda: live_import(import_dept)
    ),
    "PEFT": Format(save_peft, lambda: live_import(import_peft)),
    "PEFT of torch.save": Format(
        lambda folder: save_peft(folder, True), lambda: live_import(import_peft)
    ),
    "plain": Format(save_plain, lambda: Live({"import_plain": import_plain})),
    "plain factors": Format(
        lambda folder: save_plain(folder, "factors"), lambda: Live({"import_plain": import_plain})
    ),
    "vLLM": Format(save_vllm, lambda: Live({"read_vllm_adapter": read_vllm_adapter})),
}


# The table


def last_bit(path: Path) -> None:
    """The least bit of the last value, which stays finite."""
    data = bytearray(path.read_bytes())
    data[-4] ^= 1
    path.write_bytes(data)


def of_json(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """The object in a JSON file changed."""

    def made(path: Path) -> None:
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values, indent=2))

    return made


def of_another(**changes: Any) -> Damage:
    """The file of another prompt in place of this one's."""

    def made(path: Path) -> None:
        save_prompt(path.parent.parent / "another", **changes)
        shutil.copy(path.parent.parent / "another" / path.name, path)

    return made


def resealed(change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> Damage:
    """Description and tensors of a state dict changed, and the checksum with them."""

    def made(path: Path) -> None:
        tensors: dict[str, Any] = load_file(path)
        described = json.loads(tensors.pop(DESCRIPTION).numpy().tobytes())
        change(described, tensors)
        if isinstance(described.pop("sha256", None), str):
            described["sha256"] = adapter.state_checksum(described, tensors)
        text = bytearray(json_bytes(described))
        save_file({**tensors, DESCRIPTION: torch.frombuffer(text, dtype=torch.uint8)}, path)

    return made


def of_adapter(**changes: Any) -> Damage:
    """Fields of the description of the one adapter in a state dict changed."""
    return resealed(lambda described, _: described["adapters"]["default"].update(changes))


def renamed(name: str) -> Damage:
    def change(described: dict[str, Any], tensors: dict[str, Any]) -> None:
        described["active"] = name
        values = {**described["adapters"]["default"], "head": None, "labels": None}
        described["adapters"] = {name: values}

    return resealed(change)


def in_both(field: str, value: str) -> Damage:
    """A value in the config's file and in the copy of the config beside the tensors."""

    def made(path: Path) -> None:
        config = path.with_name(CONFIG_FILE)
        damage.raw_value(field, damage.VALUES[value])(config)
        text = json.dumps({"format_version": "1", "config": config.read_text()})
        damage.with_metadata({"ept_fast": text})(path)

    return made


SIZES = ("num_virtual_tokens", "max_length", "rank", "num_spaces", "space_dim")
JSON = {**damage.FILES, **damage.texts(), **damage.truncated(0.1, 0.5, 0.9, 1)}
BOTH = {
    f"{field} {value} in both files": in_both(field, value)
    for fields, values in (
        (("hidden_size", *SIZES, "num_tasks"), ("2^60", "10^400", "negative", "text")),
        (("alpha", "temperature"), ("10^400", "infinite", "list")),
        (("activation", "gate", "fusion", "offset_tokens"), ("10^12", "a path", "object")),
    )
    for field in fields
    for value in values
}
ADAPTERS = {
    **JSON,
    **damage.fields("head_dropout", but=("null", "real")),
    **damage.fields("task", "base_model_type", "pooling", "head", few=("format", "format_version")),
    **{
        f"{field} {value!r}": of_json(lambda v, field=field, value=value: v.update({field: value}))
        for field in ("labels", "sha256", "extra")
        for value in (3, 3.5, True, "../../secret", [[3]], {"a": {"b": 3}})
        if (field, type(value)) != ("extra", dict)
    },
    "a foreign field": of_json(lambda v: v.update(device="cuda")),
    "an older version": of_json(lambda v: v.update(format_version=1)),
    "a later version": of_json(lambda v: v.update(format_version=3)),
    "another format": of_json(lambda v: v.update(format="peft")),
    "a task of 3 MB": of_json(lambda v: v.update(task="a" * (3 << 20))),
    "another task": of_json(lambda v: v.update(task="TOKEN_CLS")),
    "another kind of model": of_json(lambda v: v.update(base_model_type="roberta")),
    "no head": of_json(lambda v: v.update(head=None, labels=None)),
    "dropout 1": of_json(lambda v: v.update(head_dropout=1)),
    "a label more": of_json(lambda v: v["labels"].append("more")),
    "a label twice": of_json(lambda v: v.update(labels=["bad", "bad", "good"])),
    "a label that is a number": of_json(lambda v: v.update(labels=["bad", 1, "good"])),
    "a label of 3 MB too many": of_json(lambda v: v["labels"].append("a" * (3 << 20))),
    "a million labels": of_json(lambda v: v.update(labels=[""] * 1_000_000)),
    "no labels": of_json(lambda v: v.update(labels=None)),
    "no checksums": of_json(lambda v: v.update(sha256={})),
    "a checksum more": of_json(lambda v: v["sha256"].update({"../outside/secret": "0" * 64})),
    "a checksum in capitals": of_json(
        lambda v: v["sha256"].update({HEAD_FILE: v["sha256"][HEAD_FILE].upper()})
    ),
    **damage.flips(
        20,
        damage.in_fields("task", "base_model_type", CONFIG_FILE, TENSOR_FILE, HEAD_FILE),
        damage.of_json,
    ),
}
# Whatever it does to the file, the checksum tells.
SEALED = {**damage.FILES, **damage.truncated(0.2, 1), **damage.flips(15, damage.anywhere)}

# Of those that rewrite a tensor, the first would be the description.
STATE_TENSORS = {
    **{name: change for name, change in damage.TENSORS.items() if "rewritten" not in name},
    **{
        f"{name} sealed again": resealed(lambda _, tensors, change=change: change(tensors))
        for name, change in damage.STATES.items()
    },
}
SPACE = torch.tensor([32], dtype=torch.uint8)
CONFIG_OF_STATE = make_model(True, seed=1).prompt.config.to_dict()
STATES = {
    **damage.FILES,
    **STATE_TENSORS,
    **damage.flips(30, damage.anywhere, damage.of_header),
    "a space more": damage.rewritten(
        lambda state: state.update({DESCRIPTION: torch.cat([state[DESCRIPTION], SPACE])})
    ),
    "no description": damage.rewritten(lambda state: state.pop(DESCRIPTION)),
    "two descriptions": damage.rewritten(
        lambda state: state.update({f"module.{DESCRIPTION}": state[DESCRIPTION].clone()})
    ),
    "a description of 5 MB": damage.rewritten(
        lambda state: state.update({DESCRIPTION: torch.zeros(5 << 20, dtype=torch.uint8)})
    ),
    "a foreign field": resealed(lambda d, t: d.update(device="cuda")),
    "a later version": resealed(lambda d, t: d.update(format_version=3)),
    "no checksum": resealed(lambda d, t: d.pop("sha256")),
    "a checksum that is a number": resealed(lambda d, t: d.update(sha256=3)),
    "adapters in a list": resealed(lambda d, t: d.update(adapters=[])),
    "an active adapter that is not there": resealed(lambda d, t: d.update(active="mine")),
    "no adapters": resealed(lambda d, t: d.update(adapters={})),
    "an adapter that is a text": resealed(lambda d, t: d.update(adapters={"default": "mine"})),
    "an adapter without tensors": resealed(
        lambda d, t: d["adapters"].update(mine=d["adapters"]["default"])
    ),
    "an adapter with a name of 1 MB": renamed("n" * (1 << 20)),
    "tensors of no adapter": resealed(
        lambda d, t: t.update({"prompts.mine.short_prompt": torch.zeros(3, 32)})
    ),
    "a backbone's tensor": resealed(lambda d, t: t.update({"backbone.weight": torch.zeros(3)})),
    "NaN in a tensor": resealed(lambda d, t: t["heads.default.bias"].fill_(float("nan"))),
    "int64 in a tensor": resealed(
        lambda d, t: t.update({"heads.default.bias": torch.zeros(3, dtype=torch.int64)})
    ),
    "a wrapper's name on some": resealed(
        lambda d, t: t.update({"module.heads.default.bias": t.pop("heads.default.bias")})
    ),
    "a width of 2^60": of_adapter(config={**CONFIG_OF_STATE, "hidden_size": damage.HUGE}),
    "a negative rank": of_adapter(config={**CONFIG_OF_STATE, "rank": -1}),
    "a config without a field": of_adapter(config={}),
    "a config that is a list": of_adapter(config=[3]),
    "a million labels": of_adapter(labels=[""] * 1_000_000),
    "a label less": of_adapter(labels=["bad", "good"]),
    "a label twice": of_adapter(labels=["bad", "bad", "good"]),
    "a pooling that is none": of_adapter(pooling="max"),
    "another task": of_adapter(task="TOKEN_CLS"),
    "another kind of model": of_adapter(base_model_type="roberta"),
    "no head": of_adapter(head=None, labels=None),
    "dropout 1": of_adapter(head_dropout=1),
    "checksums of files": of_adapter(sha256={}),
}

HEADS = {
    **damage.TENSORS,
    "a value beyond float32": damage.rewritten(damage.beyond_float32),
}


def narrower(state: damage.State) -> None:
    state["weight"] = state["weight"][:, 1:].clone()


TABLE: dict[tuple[str, str], dict[str, Damage]] = {
    ("state", STATE_FILE): STATES,
    ("state of an own head", STATE_FILE): {
        **STATE_TENSORS,
        "a head of other tensors": resealed(
            lambda d, t: t.update({"heads.default.mine": torch.zeros(3)})
        ),
        "a value beyond float32": resealed(
            lambda d, t: t.update(
                {"heads.default.bias": torch.full((3,), 1e300, dtype=torch.float64)}
            )
        ),
    },
    ("prompt", CONFIG_FILE): {
        **JSON,
        **damage.fields("hidden_size", "alpha", few=("num_virtual_tokens", "rank", "gate")),
        "another prompt's": of_another(num_spaces=1),
        "a foreign field": of_json(lambda v: v.update(heads=2)),
        **damage.flips(20, damage.anywhere, damage.of_json),
    },
    ("prompt", TENSOR_FILE): {
        **damage.FILES,
        **damage.TENSORS,
        **BOTH,
        "another prompt's": of_another(num_spaces=1),
        "no metadata": damage.with_metadata({}),
        "another package's metadata": damage.with_metadata({"format": "pt"}),
        **{
            f"metadata with {name}": damage.with_metadata({"ept_fast": json.dumps(values)})
            for name, values in {
                "a later version": {"format_version": "2", "config": "{}"},
                "no version": {"config": "{}"},
                "no config": {"format_version": "1"},
                "a config that is a number": {"format_version": "1", "config": 1},
                "a config that is nested": {"format_version": "1", "config": "[" * 100_000},
            }.items()
        },
        **damage.flips(30, damage.in_header, damage.of_header),
    },
    ("adapter", ADAPTER_FILE): ADAPTERS,
    **{("adapter", file): SEALED for file in (CONFIG_FILE, TENSOR_FILE, HEAD_FILE)},
    ("adapter sealed again", CONFIG_FILE): {
        **damage.fields(few=("hidden_size", "num_virtual_tokens", "rank", "activation")),
        "a prompt of another width": lambda path: save_prompt(path.parent),
        "a bank": lambda path: save_prompt(path.parent, num_tasks=2),
    },
    ("adapter sealed again", TENSOR_FILE): {**damage.TENSORS, **BOTH},
    ("adapter sealed again", HEAD_FILE): {**HEADS, "a narrower head": damage.rewritten(narrower)},
    ("adapter of an own head", HEAD_FILE): {
        **HEADS,
        **damage.flips(10, damage.in_entries, damage.of_header),
    },
    **{
        (kind, "adapter_config.json"): {
            **JSON,
            **damage.fields("peft_type", "token_dim", "num_virtual_tokens", *sizes),
            "another type": of_json(lambda v: v.update(peft_type="LORA")),
            "another task": of_json(lambda v: v.update(task_type="../../secret")),
            "a task that is a list": of_json(lambda v: v.update(task_type=["CAUSAL_LM"])),
            "two prompts of 10^4300 - 1": of_json(
                lambda v: v.update(
                    task_type="SEQ_2_SEQ_LM",
                    num_transformer_submodules=2,
                    num_virtual_tokens=damage.LONGEST,
                )
            ),
            **damage.flips(
                10,
                damage.in_fields("peft_type", "token_dim", "num_virtual_tokens", *sizes),
                damage.of_json,
            ),
        }
        for kind, sizes in (("DePT of torch.save", ("max_length", "r")), ("PEFT", ()))
    },
    **{
        (kind, "adapter_model.safetensors"): {
            **damage.FILES,
            **damage.TENSORS,
            **damage.flips(20, damage.in_entries, damage.of_header),
        }
        for kind in ("DePT", "PEFT")
    },
    **{
        (f"{kind} of torch.save", "adapter_model.bin"): {**damage.FILES, **damage.PICKLES}
        for kind in ("DePT", "PEFT")
    },
    ("plain", "prompt_embeddings.json"): {
        **JSON,
        **damage.fields("format_version", "hidden_size", few=("offset", "offset_tokens", "rank")),
        **damage.flips(10, damage.anywhere, damage.of_json),
    },
    **{
        (kind, "prompt_embeddings.safetensors"): {
            **damage.FILES,
            **damage.TENSORS,
            **damage.flips(20, damage.in_header, damage.of_header),
        }
        for kind in ("plain", "plain factors")
    },
    ("vLLM", "adapter_config.json"): {
        **JSON,
        "a LoRA of somebody else": of_json(lambda v: v.pop("ept_fast")),
        "a rank without a length": of_json(lambda v: v["ept_fast"].update(max_length=0)),
        "sizes that are a list": of_json(lambda v: v.update(ept_fast=[1, 2])),
        "another base that is a number": of_json(lambda v: v.update(base_model_name_or_path=1)),
        **damage.flips(
            10, damage.in_fields("hidden_size", "num_virtual_tokens", "sha256"), damage.of_json
        ),
    },
    ("vLLM", "adapter_model.safetensors"): {
        **damage.FILES,
        **damage.TENSORS,
        **damage.flips(20, damage.anywhere),
        "the last bit": last_bit,
    },
}


class Case(NamedTuple):
    """A damaged checkpoint."""

    format: str
    file: str
    damage: str

    def __str__(self) -> str:
        return ", ".join(self)


CASES = [Case(*place, name) for place, damages in TABLE.items() for name in damages]


def place(intact: Path, folder: Path, kind: str, file: str, change: Damage) -> Path:
    """A copy of a checkpoint, changed, beside a folder that none of its files stand in."""
    (folder / damage.OUTSIDE).mkdir(parents=True)
    (folder / damage.OUTSIDE / "secret").write_text(SECRET)
    copy = folder / "checkpoint"
    shutil.copytree(intact / kind, copy)
    change(copy / file)
    if FORMATS[kind].sealed_again:
        seal(copy)
    return copy


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An intact checkpoint of each format."""
    folder = tmp_path_factory.mktemp("intact")
    for name, kind in FORMATS.items():
        kind.save(folder / name)
    return folder


@pytest.fixture(scope="module")
def lives() -> dict[str, tuple[Live, Any]]:
    """For each format what is loaded already, and its state."""
    made = {name: kind.live() for name, kind in FORMATS.items()}
    return {name: (live, live.state()) for name, live in made.items()}


# The tests


# Two files that disagree: either can be the one that is named.
BESIDE = {
    CONFIG_FILE: TENSOR_FILE,
    TENSOR_FILE: CONFIG_FILE,
    ADAPTER_FILE: HEAD_FILE,
    STATE_FILE: ADAPTER_FILE,  # if there is neither
    "adapter_config.json": "adapter_model.",
    "prompt_embeddings.json": "prompt_embeddings.safetensors",
    "prompt_embeddings.safetensors": "prompt_embeddings.json",
}


def documented() -> dict[str, re.Pattern[str]]:
    """The messages of docs/errors.md about adapter files; "..." there is any text."""
    page = (Path(__file__).parent.parent / "docs/errors.md").read_text(encoding="utf-8")
    section = page.partition("\n## Adapter files\n")[2].partition("\n## ")[0]
    messages = re.findall(r"^- `(.+?)`", section, re.MULTILINE)
    patterns = {m: re.escape(m).replace(re.escape("..."), ".*") for m in messages}
    return {m: re.compile(pattern, re.DOTALL) for m, pattern in patterns.items()}


DOCUMENTED = documented()
RAISED: set[str] = set()
DONE: set[Case] = set()


def check_message(message: str, folder: Path, file: str) -> None:
    """It names the file, is one of the documented ones, and tells nothing from outside."""
    assert message.startswith(str(folder))
    told = message.replace(str(folder), "")
    # Whole, but for a module of other sizes: then it is the folder that does not fit.
    named = (file, BESIDE.get(file, file), ": expected EPTConfig(")
    assert any(name in told for name in named), message
    general = re.sub(r"^/[^:]+", "FILE", told) if told.startswith("/") else f"FOLDER{told}"
    known = {m for m, pattern in DOCUMENTED.items() if pattern.fullmatch(general)}
    assert known, message
    RAISED.update(known)
    assert len(told) < 2048, told[:4000]
    assert str(folder.parent) not in told
    assert SECRET not in told
    assert "memory" not in told.lower(), message  # of an allocation that failed


def digests(folder: Path) -> dict[str, Any]:
    """What stands in a folder; of what has no end, or one far away, its kind and size."""
    found = {}
    for path in folder.iterdir():
        known = path.lstat()
        plain = path.is_file() and not path.is_symlink() and known.st_size < 1 << 30
        found[path.name] = path.read_bytes() if plain else (known.st_mode, known.st_size)
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_refused(
    case: Case, intact: Path, lives: dict[str, tuple[Live, Any]], tmp_path: Path
) -> None:
    change = TABLE[case.format, case.file][case.damage]
    folder = place(intact, tmp_path, case.format, case.file, change)
    assert digests(folder) != digests(intact / case.format)
    live, before = lives[case.format]
    for name, read in live.readers.items():
        generator = torch.get_rng_state()
        try:
            with watched(folder):
                read(folder)
        except CheckpointError as error:
            check_message(str(error), folder, case.file)
        else:
            pytest.fail(f"{name} took it")
        assert torch.equal(torch.get_rng_state(), generator), name
    assert live.state() == before
    assert not (tmp_path / damage.CANARY).exists()
    shutil.rmtree(folder)  # files of a terabyte, with nothing in them
    DONE.add(case)


def test_how_many_there_are() -> None:
    assert len(set(map(str, CASES))) == len(CASES)
    assert len(CASES) >= 200
    for name in FORMATS:
        assert sum(case.format == name for case in CASES) >= 40, name


@pytest.mark.parametrize(("kind", "file"), TABLE)
def test_intact_ones_load(kind: str, file: str, intact: Path, tmp_path: Path) -> None:
    """So that a refusal is for the damage, and for nothing in how it is made or watched."""
    suffix = Path(file).suffix
    for how, change in {**damage.HARMLESS[""], **damage.HARMLESS[suffix]}.items():
        summed = kind == "adapter" and file != ADAPTER_FILE
        summed |= (kind, file) == ("vLLM", "adapter_model.safetensors")
        if summed and how not in damage.HARMLESS[""]:
            continue  # which the checksum refuses
        folder = place(intact, tmp_path / how, kind, file, change)
        live = FORMATS[kind].live()
        for read in live.readers.values():
            with watched(folder):
                read(folder)


def test_documented_messages_are_raised() -> None:
    if len(DONE) < len(CASES):
        pytest.skip("not all of the cases were run before")
    assert set(DOCUMENTED) == RAISED


# What the table leaves out


def refusal(read: Callable[[], Any], folder: Path, file: str) -> str:
    """The checked message of a refusal."""
    with pytest.raises(CheckpointError) as caught, watched(folder):
        read()
    check_message(str(caught.value), folder, file)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["DePT", "PEFT"])
def test_foreign_tensors_that_are_left_out(kind: str, intact: Path, tmp_path: Path) -> None:
    """With ``prompt_only`` they are read over, but not a terabyte of them."""
    read, file = (import_dept, import_peft)[kind == "PEFT"], "adapter_model.safetensors"
    change = damage.rewritten(lambda state: state.update(foreign=torch.zeros(2)))
    folder = place(intact, tmp_path / "small", kind, file, change)
    with watched(folder):
        read(folder, prompt_only=True)
    change = damage.TENSORS["a foreign tensor of 2^40 bytes"]
    folder = place(intact, tmp_path / "large", kind, file, change)
    refusal(lambda: read(folder, prompt_only=True), folder, file)
    shutil.rmtree(folder)


@pytest.mark.skipif(not LINUX, reason="the limit of memory is Linux's")
def test_values_of_torch_save_are_held_twice_at_most(tmp_path: Path) -> None:
    rows, width = 1 << 14, 1 << 10  # 64 MiB
    config = {**tiny.PEFT_CONFIG, "token_dim": width, "num_virtual_tokens": rows}
    state = {"prompt_embeddings": torch.ones(rows, width)}
    tiny.save_adapter(tmp_path, config, state, pickled=True)
    with memory_limit(160 << 20):
        loaded = open_state(tmp_path).load({"prompt_embeddings": (rows, width)})
    assert torch.equal(loaded["prompt_embeddings"], state["prompt_embeddings"])


REFUSED = {
    "2^40 bytes": "expected at most 1073741824 bytes",
    "os.system": "nothing else, got .*GLOBAL posix.system whose module posix is blocked",
    "eval": "nothing else, got .*GLOBAL eval was not an allowed global by default'$",
    "a number for a tensor": "nothing else, got 'ValueError: int under a key of type str'$",
    "a key that is a number": "nothing else, got 'ValueError: Tensor under a key of type int'$",
    "a tensor alone": "nothing else, got 'ValueError: Tensor'$",
    "a negated view": "nothing else, got .*a tensor that is not dense",
    "an expanded shape of 2^40 in both files": "nothing else, got .*in a smaller storage",
    "a compressed record": r"1.6 or newer\), got 'ValueError: a compressed record",
    "values twice": r"1.6 or newer\), got 'ValueError: two records of one name",
    "a flipped bit in the values": r"1.6 or newer\), got .*another checksum for",
    "before PyTorch 1.6": r"1.6 or newer\), got 'ValueError: no archive",
}


@pytest.mark.parametrize("name", REFUSED)
def test_why_a_file_of_torch_save_is_refused(name: str, intact: Path, tmp_path: Path) -> None:
    """For its own reason, and without torch's advice to run what is in it."""
    place_of = "PEFT of torch.save", "adapter_model.bin"
    folder = place(intact, tmp_path, *place_of, {**damage.FILES, **damage.PICKLES}[name])
    message = refusal(lambda: open_state(folder), folder, place_of[1])
    assert re.search(REFUSED[name], message), message
    assert "weights_only" not in message


def test_the_cache_of_a_hub(intact: Path, tmp_path: Path) -> None:
    """Its folders hold links to files that stand beside them, and to nothing else."""
    blobs, folder = tmp_path / "model/blobs", tmp_path / "model/snapshots/main"
    shutil.copytree(intact / "prompt", blobs)
    folder.mkdir(parents=True)
    for file in (CONFIG_FILE, TENSOR_FILE):
        (folder / file).symlink_to(f"../../blobs/{file}")
    FusedEPTPrompt.from_pretrained(folder)
    others = tmp_path / "other/blobs"
    shutil.copytree(blobs, others)
    for target in (others / TENSOR_FILE, "../../../other/blobs/" + TENSOR_FILE):
        (folder / TENSOR_FILE).unlink()
        (folder / TENSOR_FILE).symlink_to(target)
        with pytest.raises(CheckpointError, match="got a link that leaves it"):
            FusedEPTPrompt.from_pretrained(folder)


HASH = "ab" * 32


@pytest.mark.parametrize(
    ("repository", "blob", "allowed"),
    [
        ("models--user--name", f"blobs/ab/{HASH}", True),
        ("models--user--name", f"blobs/cd/{HASH}", False),
        ("models--user--name", f"blobs/{HASH}", False),
        ("models--user--name", f"others/ab/{HASH}", False),
        ("models--user--name", "blobs/ab/ab.safetensors", False),
        ("name", f"blobs/ab/{HASH}", False),
    ],
)
def test_blobs_that_repositories_share(
    repository: str, blob: str, allowed: bool, intact: Path, tmp_path: Path
) -> None:
    """A repository's blob is then a link itself, to a file of the cache by the name of its hash."""
    folder = tmp_path / repository / "snapshots/main"
    blobs = tmp_path / repository / "blobs"
    shutil.copytree(intact / "prompt", folder)
    blobs.mkdir()
    (tmp_path / blob).parent.mkdir(parents=True)
    (folder / TENSOR_FILE).rename(tmp_path / blob)
    (blobs / "etag").symlink_to(f"../../{blob}")
    (folder / TENSOR_FILE).symlink_to("../../blobs/etag")
    if allowed:
        FusedEPTPrompt.from_pretrained(folder)
        return
    with pytest.raises(CheckpointError, match="got a link that leaves it"):
        FusedEPTPrompt.from_pretrained(folder)


UNNOTICED = {
    ("prompt", TENSOR_FILE): last_bit,
    ("PEFT", "adapter_model.safetensors"): last_bit,
    ("DePT", "adapter_model.safetensors"): last_bit,
    ("plain", "prompt_embeddings.safetensors"): last_bit,
    ("DePT", "adapter_config.json"): of_json(lambda v: v.update(lora_alpha=9)),
    ("adapter", ADAPTER_FILE): of_json(lambda v: v.update(base_model="another")),
}


@pytest.mark.parametrize(("kind", "file"), UNNOTICED)
def test_what_no_checksum_tells(kind: str, file: str, intact: Path, tmp_path: Path) -> None:
    """The limits of the formats, as the top of this file states them."""
    folder = place(intact, tmp_path, kind, file, UNNOTICED[kind, file])
    for read in FORMATS[kind].live().readers.values():
        read(folder)


@pytest.mark.parametrize("field", ["pooling", "head"])
def test_another_kind_of_head(field: str, intact: Path, tmp_path: Path) -> None:
    """Weights that are trained for one way to take logits are not read into another."""
    values = {"pooling": {"pooling": "first"}, "head": {"head": "model"}}
    change = of_json(lambda v: v.update(values[field]))
    folder = place(intact, tmp_path, "adapter", ADAPTER_FILE, change)
    live = live_model(True)
    refusal(lambda: live.readers["load_pretrained"](folder), folder, ADAPTER_FILE)


def test_a_model_that_gets_no_adapter_stays_as_it_is(intact: Path, tmp_path: Path) -> None:
    change = damage.fields(few=("hidden_size",))["hidden_size 10^12"]
    folder = place(intact, tmp_path, "adapter sealed again", CONFIG_FILE, change)
    backbone = build(True)
    before = bits(backbone)
    refusal(lambda: EPTModel.from_pretrained(folder, backbone), folder, CONFIG_FILE)
    assert bits(backbone) == before


# The watch itself


def read_outside(outside: Path) -> None:
    (outside / "secret").read_text()


NOTICED: dict[str, Callable[[Path], Any]] = {
    "open": read_outside,
    "os.open": lambda outside: os.close(os.open(outside / "secret", os.O_RDONLY)),
    "a file of the system": lambda outside: Path("/etc/passwd").read_bytes(),
    "a process": lambda outside: os.system("true"),
    "code": lambda outside: eval("1"),
    "an import": lambda outside: importlib.reload(colorsys),
}
if LINUX:
    NOTICED["native code"] = lambda outside: torch.UntypedStorage.from_file(
        str(outside / "secret"), shared=False, nbytes=4
    )


@pytest.mark.parametrize("how", NOTICED)
def test_the_watch_notices(how: str, intact: Path, tmp_path: Path) -> None:
    folder = place(intact, tmp_path, "prompt", CONFIG_FILE, lambda path: None)
    with pytest.raises(AssertionError), watched(folder):
        NOTICED[how](tmp_path / damage.OUTSIDE)
    with watched(folder):
        (folder / CONFIG_FILE).read_text()


@pytest.mark.skipif(not LINUX, reason="the limit of memory is Linux's")
@pytest.mark.parametrize("allocate", [bytearray, lambda size: torch.empty(size // 4)])
def test_the_limit_of_memory(allocate: Callable[[int], Any]) -> None:
    with pytest.raises((MemoryError, RuntimeError), match=r"^$|can't allocate memory"):  # noqa: SIM117
        with memory_limit(256 << 20):
            allocate(1 << 30)


def test_the_limit_of_time(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Late), time_limit(1):
        (tmp_path / "pipe").read_bytes()
