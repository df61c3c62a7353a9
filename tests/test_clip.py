"""Learned contexts before the class names of a tiny frozen CLIP, and of a sentence encoder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ept_fast
from ept_fast import CheckpointError, CLIPPrompt, EPTConfig, FusedEPTPrompt
from ept_fast.prompts.mixture import MixtureConfig
from ept_fast.prompts.residual import ResidualConfig
from ept_fast.storage.files import tensor_bytes
from tests.toy_method import ToyConfig

transformers = pytest.importorskip("transformers")

from ept_fast.transformers.clip import SentenceEncoder  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

D, E, M, POSITIONS = 16, 12, 4, 24
CLASSES, VIRTUAL, NEW = ("cat", "dog", "old tree"), ("a.b", "x"), ("zebra", "fox")
TEMPLATES = ("a {}.", "pic of {}", "one {} here", "no {}!", "my {}.")
PLAIN = EPTConfig(D, num_virtual_tokens=M, rank=0, num_spaces=0)
MLP = ResidualConfig(D, M, bottleneck=3, layer_norm=False)
METHODS = {
    "CoOp": PLAIN,
    "PRE's MLP": MLP,
    "PRE's LSTM": ResidualConfig(D, M, encoder="lstm"),
    "another method": ToyConfig(D, num_virtual_tokens=M),
}
LASP = {"templates": TEMPLATES, "correction": True}


def make_tokenizer() -> Any:
    """CLIP's own, of letters: a name has as many tokens as letters, "a photo of a" has four."""
    letters = sorted(string.ascii_lowercase + ".!")
    parts = ["ph", "pho", "to</w>", "photo</w>", "of</w>"]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *parts]
    words += ["<|startoftext|>", "<|endoftext|>"]
    merges = [("p", "h"), ("ph", "o"), ("t", "o</w>"), ("pho", "to</w>"), ("o", "f</w>")]
    return transformers.CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=merges)


TOKENIZER = make_tokenizer()


def make_clip(legacy: bool = False, **changes: Any) -> Any:
    """With the end token in the config, or with the 2 of CLIP's older configs."""
    torch.manual_seed(5)
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "attention_dropout": 0.2}
    text = {
        "hidden_size": D, "intermediate_size": 24, "vocab_size": len(TOKENIZER),
        "max_position_embeddings": POSITIONS, "bos_token_id": TOKENIZER.bos_token_id,
        "eos_token_id": 2 if legacy else TOKENIZER.eos_token_id,
    }  # fmt: skip
    vision = {"hidden_size": 20, "intermediate_size": 24, "image_size": 8, "patch_size": 4}
    config = transformers.CLIPConfig(
        text_config={**layers, **text, **changes},
        vision_config={**layers, **vision},
        projection_dim=E,
    )
    model = transformers.CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
        model.logit_scale.fill_(1.5)
    return model


def images_of(count: int = 5) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(count))


def make(config: Any = PLAIN, **choices: Any) -> CLIPPrompt:
    """A model with every trained tensor moved, so that each of them shows."""
    model = choices.pop("model", None) or make_clip()
    built = CLIPPrompt(model, config, **{"tokenizer": TOKENIZER, "classes": CLASSES, **choices})
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained_of(built):
            noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            parameter += 0.3 * noise.to(parameter.dtype)
    return built


def trained_of(model: CLIPPrompt) -> list[nn.Parameter]:
    own = [] if model.correction is None else [model.correction]
    return [*model.prompt.parameters(), *own]


def moved(model: CLIPPrompt) -> CLIPPrompt:
    """In float64."""
    model.backbone.model.double()
    return model


LABELS = torch.tensor([0, 1, 2, 1, 0])


# The class texts


@pytest.mark.parametrize("legacy", [False, True], ids=["end token", "legacy"])
def test_the_words_it_starts_from_give_clips_own_features(legacy: bool) -> None:
    """Of names of all lengths, with CLIP's own padding; and so its own logits."""
    clip = make_clip(legacy).double().eval()
    texts = [f"a photo of a {name}." for name in CLASSES]
    tokens = TOKENIZER(texts, padding="max_length", max_length=POSITIONS, return_tensors="pt")
    images = images_of().double()
    with torch.no_grad():
        expected = clip(**tokens, pixel_values=images)
    model = CLIPPrompt(clip.train(), tokenizer=TOKENIZER, classes=CLASSES, dtype=torch.float64)
    assert model.prompt.reconstruct().shape == (1, M, D)
    exact = {"rtol": 1e-6, "atol": 1e-6}  # the rows to start from are read in float32
    torch.testing.assert_close(model.text_features()[0], expected.text_embeds, **exact)
    torch.testing.assert_close(model(images).logits, expected.logits_per_image, **exact)
    moved = make(model=make_clip(legacy).double(), dtype=torch.float64)
    assert not torch.allclose(moved.text_features()[0], expected.text_embeds, atol=0.01)


def plainly(model: CLIPPrompt, names: tuple[str, ...]) -> Tensor:
    """Unit features ``[G, C, e]``, a text at a time, by torch.cat and the library's layers."""
    clip = model.backbone.model
    text, table = clip.text_model, clip.text_model.embeddings.token_embedding.weight
    groups = []
    for context in model.prompt.reconstruct():
        features = []
        for name in names:
            start, *rest = TOKENIZER(f"{name}.")["input_ids"]
            states = torch.cat([table[[start]], context.to(table.dtype), table[rest]])
            states = states + text.embeddings.position_embedding.weight[: len(states)]
            mask = torch.full((len(states), len(states)), -torch.inf).triu(1).to(table.dtype)
            states = states.unsqueeze(0)
            for layer in text.encoder.layers:
                states = layer(states, mask[None, None])
            last = clip.text_projection(text.final_layer_norm(states[0, -1]))
            last = last.to(torch.promote_types(last.dtype, torch.float32))
            last = last if model.correction is None else last + model.correction[0]
            features.append(last / last.norm())
        groups.append(torch.stack(features))
    return torch.stack(groups)


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_features_and_gradients_are_those_of_torch_cat(
    method: str, groups: int, backend: str
) -> None:
    """Names of several lengths side by side: padding changes none."""
    model = make(
        METHODS[method], model=make_clip().double(), groups=groups, correction=True,
        dtype=torch.float64, backend=backend, virtual_classes=VIRTUAL,
    )  # fmt: skip
    trained = trained_of(model)
    features, expected = model.text_features(), plainly(model, (*CLASSES, *VIRTUAL))
    torch.testing.assert_close(features, expected, rtol=1e-9, atol=1e-9)
    weights = torch.randn(features.shape, dtype=torch.float64)
    found = torch.autograd.grad((features * weights).sum(), trained)
    for ours, theirs in zip(
        found, torch.autograd.grad((expected * weights).sum(), trained), strict=True
    ):
        assert bool(theirs.any())
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


def test_half_precision() -> None:
    """A bfloat16 CLIP behind a float32 context: logits are made in float32."""
    model = make(model=make_clip().bfloat16())
    images = images_of()
    logits = model(images).logits
    assert logits.dtype == torch.float32
    features = model.encode_images(images)
    expected = model.backbone.scale * (features @ model.text_features()[0].T)
    assert torch.equal(logits, expected)
    torch.testing.assert_close(model.text_features(), plainly(model, CLASSES), rtol=0.1, atol=0.05)
    model(images, labels=LABELS).loss.backward()
    assert bool(model.prompt.short_prompt.grad.any())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert make()(images).logits.dtype == torch.float32


# The loss


def loss_of(model: CLIPPrompt, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy and text-to-text loss from their definitions."""
    names = (*model.classes, *model.virtual_classes)
    texts, clip = plainly(model, names), model.backbone.model
    features = F.normalize(clip.get_image_features(images).pooler_output, dim=-1)
    scale = clip.logit_scale.exp()
    cosines = torch.stack([features @ each.T for each in texts])
    loss = F.cross_entropy(scale * cosines.mean(0), labels)
    parts = torch.arange(len(model.templates)).tensor_split(len(texts))
    owner = {int(i): g for g, part in enumerate(parts) for i in part}
    rows = []
    for number, template in enumerate(model.templates):
        for j, name in enumerate(names):
            ids = TOKENIZER(template.replace("{}", name), return_tensors="pt")
            h = F.normalize(clip.get_text_features(**ids).pooler_output[0], dim=-1)
            logits = scale * (texts[owner[number]] @ h)
            rows.append(F.cross_entropy(logits, torch.tensor(j)))
    return loss + model.weight * torch.stack(rows).mean() if rows else loss


@pytest.mark.support(row="LASP", column="definition")
@pytest.mark.parametrize("virtual", [(), VIRTUAL], ids=["no virtual classes", "virtual classes"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("templates", [(), TEMPLATES], ids=["CoOp", "LASP"])
def test_the_loss_is_that_of_the_definitions(
    templates: tuple[str, ...], groups: int, virtual: tuple[str, ...]
) -> None:
    model = make(
        model=make_clip().double(), templates=templates, groups=groups, virtual_classes=virtual,
        correction=True, dtype=torch.float64, weight=0.7,
    )  # fmt: skip
    images = images_of().double()
    loss = model.train()(images, labels=LABELS).loss
    expected = loss_of(model, images, LABELS)
    torch.testing.assert_close(loss, expected, rtol=1e-8, atol=0)
    found = torch.autograd.grad(loss, trained_of(model))
    for ours, theirs in zip(found, torch.autograd.grad(expected, trained_of(model)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    # Templates are for training.
    output = model.eval()(images, labels=LABELS)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, LABELS))
    assert output.logits.shape == (5, len(CLASSES) + len(virtual))


@pytest.mark.support(row="LASP", column="gradients")
@pytest.mark.parametrize("groups", [1, 2])
def test_gradcheck_of_the_whole_loss(groups: int) -> None:
    model = make(
        EPTConfig(D, num_virtual_tokens=1, rank=0, num_spaces=0), model=make_clip().double(),
        groups=groups, virtual_classes=VIRTUAL[:1], dtype=torch.float64, weight=0.7, **LASP,
    )  # fmt: skip
    features = model.encode_images(images_of(2).double())

    def loss(context: Tensor, correction: Tensor) -> Tensor:
        tensors = {"prompt.short_prompt": context, "correction": correction}
        given = {"image_features": features, "labels": LABELS[:2]}
        output = torch.func.functional_call(model, tensors, (), given)
        return output.loss

    assert model.training
    given = tuple(p.detach().clone().requires_grad_() for p in trained_of(model))
    assert torch.autograd.gradcheck(loss, given)


def step_of(model: CLIPPrompt) -> list[Tensor]:
    loss = model.train()(images_of(), labels=LABELS).loss
    return [loss, *torch.autograd.grad(loss, list(model.prompt.parameters()))]


def test_without_weight_lasp_is_coop_to_the_bit() -> None:
    lasp = CLIPPrompt(make_clip(), PLAIN, tokenizer=TOKENIZER, classes=CLASSES, weight=0.0, **LASP)
    coop = CLIPPrompt(make_clip(), PLAIN, tokenizer=TOKENIZER, classes=CLASSES)
    assert all(map(torch.equal, step_of(lasp), step_of(coop)))
    lasp.weight = 5.0
    assert not torch.equal(step_of(lasp)[0], step_of(coop)[0])


@pytest.mark.support(row="PRE", column="definition")
def test_pre_whose_mlp_gives_nothing_is_coop() -> None:
    pre, coop = make(MLP), make(PLAIN)
    assert not torch.allclose(pre.text_features(), coop.text_features(), atol=1e-3)
    with torch.no_grad():
        pre.prompt.up_weight.zero_()
        pre.prompt.up_bias.zero_()
        coop.prompt.short_prompt.copy_(pre.prompt.short_prompt)
    for ours, theirs in zip(step_of(pre), step_of(coop), strict=False):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_equal_contexts_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """G contexts of the same values have the logits of one, and one encoding for both losses."""
    one, three = make(**LASP), make(groups=3, **LASP)
    with torch.no_grad():
        three.prompt.short_prompt.copy_(one.prompt.short_prompt.expand(3, M, D))
        three.correction.copy_(one.correction)
    images, calls = images_of(), []
    torch.testing.assert_close(three(images).logits, one(images).logits, rtol=1e-5, atol=1e-5)
    three.train()(images, labels=LABELS)  # templates are encoded
    encode = three.backbone.forward
    monkeypatch.setattr(three.backbone, "forward", lambda *a: calls.append(a) or encode(*a))
    three(images, labels=LABELS)
    assert [len(ids) for _, ids, _ in calls] == [3 * len(CLASSES)]


def test_noise_is_seeded_and_in_training_alone() -> None:
    model = make(noise=0.3, **LASP)
    images = images_of()

    def training_loss(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model.train()(images, labels=LABELS).loss

    values = [training_loss(seed) for seed in range(12)]
    assert torch.equal(values[3], training_loss(3))
    without = make(**LASP)(images, labels=LABELS).loss
    quiet = sum(bool(torch.equal(value, without)) for value in values)
    assert 0 < quiet < 12
    assert torch.equal(model.eval()(images).logits, model(images).logits)


def test_gates_are_noisy_in_training_alone() -> None:
    model = make(MixtureConfig(D, M, num_modules=2)).train()
    assert not torch.equal(model.text_features(), model.text_features())
    assert torch.equal(model.eval().text_features(), model.text_features())


@pytest.mark.support(row="LASP", column="learning")
@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
def test_some_steps_lower_the_loss_and_move_nothing_frozen(config: Any) -> None:
    clip = make_clip().train()
    clip.logit_scale.requires_grad_(False)
    before = {name: p.clone() for name, p in clip.named_parameters()}
    model = make(config, model=clip, groups=2, **LASP).train()
    assert not any(m.training for m in clip.modules())
    trained = {id(p) for p in trained_of(model)}
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained
    groups = model.parameter_groups(1e-2, 0, 1e-2, 1e-2)
    assert {id(p) for group in groups for p in group["params"]} == trained
    optimizer = torch.optim.AdamW(groups)
    values = []
    for _ in range(15):
        loss = model(images_of(), labels=LABELS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.9 * values[0]
    assert all(p.grad is None for p in clip.parameters())
    assert {name.partition(".")[0] for name in model.state_dict()} == {"prompt", "correction"}
    assert model.unload() is clip
    assert all(torch.equal(p, before[name]) for name, p in clip.named_parameters())
    assert all(m.training for m in clip.modules())
    assert [n for n, p in clip.named_parameters() if not p.requires_grad] == ["logit_scale"]


# Serving


@pytest.mark.parametrize("groups", [1, 2])
def test_folded(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = make(groups=groups, virtual_classes=VIRTUAL, **LASP), images_of()
    logits = model.eval()(images).logits
    model.train().fold()
    assert not model.training
    with monkeypatch.context() as patch:
        patch.setattr(model.backbone, "forward", lambda *_: pytest.fail("the encoder is called"))
        assert torch.equal(model(images).logits, logits)
    assert model.names == (*CLASSES, *VIRTUAL)
    # New classes behind the trained context.
    new = model.text_features(NEW)
    model.fold(NEW)
    assert model.names == NEW
    output = model(images, labels=LABELS % 2)
    expected = model.backbone.scale * model.encode_images(images) @ new.mean(0).T
    torch.testing.assert_close(output.logits, expected)
    torch.testing.assert_close(output.loss, F.cross_entropy(expected, LABELS % 2))
    torch.testing.assert_close(new, plainly(model, NEW), rtol=1e-4, atol=1e-5)
    assert not any("folded" in name for name in model.state_dict())
    with torch.no_grad():
        for parameter in model.prompt.parameters():
            parameter *= -2
    assert torch.equal(model(images).logits, output.logits)
    changed = model.train().eval()(images).logits
    assert model.names == (*CLASSES, *VIRTUAL)
    assert not torch.allclose(changed, logits, atol=1e-3)
    model.fold()
    model.load_state_dict(model.state_dict())
    assert model.folded_features is None


# A text encoder in CLIP's place


def make_bert() -> tuple[Any, Any]:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, "a", "photo", "of", "cat", "dog", "old", "tree", "."]
    tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    torch.manual_seed(1)
    sizes = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(
        **sizes, vocab_size=len(words), intermediate_size=24, initializer_range=0.3
    )
    return transformers.BertModel(config), tokenizer


def test_a_sentence_encoder() -> None:
    """The mean over the real tokens; "images" are features of any frozen model."""
    bert, tokenizer = make_bert()
    encoder = SentenceEncoder(bert, scale=7.0)
    model = CLIPPrompt(encoder, tokenizer=tokenizer, classes=CLASSES).eval()
    texts = [f"a photo of a {name}." for name in CLASSES]
    expected = []
    for text in texts:
        states = bert(**tokenizer(text, return_tensors="pt")).last_hidden_state
        expected.append(F.normalize(states[0].mean(0), dim=0))
    features = torch.stack(expected)
    torch.testing.assert_close(model.text_features()[0], features)
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    both = encoder.encode(tokens["input_ids"], tokens["attention_mask"])
    assert not both.requires_grad
    torch.testing.assert_close(F.normalize(both, dim=-1), features)
    logits = model(image_features=both).logits
    torch.testing.assert_close(logits, 7.0 * features @ features.T)
    with pytest.raises(TypeError, match="a SentenceEncoder reads no images, got"):
        model(images_of())
    assert model.unload() is encoder


# Files


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_and_loaded(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    choices = {"groups": 2, "virtual_classes": VIRTUAL, "weight": 2.5, "noise": 0.1, **LASP}
    model, images = make(METHODS[method], dtype=dtype, **choices).eval(), images_of()
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "ept_config.json",
        "ept_model.safetensors",
        "correction.safetensors",
        "clip.json",
    }
    loaded = CLIPPrompt.from_pretrained(tmp_path, make_clip(), TOKENIZER)
    assert not loaded.training
    for name in ("classes", "virtual_classes", "templates", "weight", "noise", "names"):
        assert getattr(loaded, name) == getattr(model, name)
    assert loaded.correction.dtype == dtype
    assert torch.equal(loaded(images).logits, model(images).logits)
    losses = []
    for each in (loaded, model):
        torch.manual_seed(0)
        losses.append(each.train()(images, labels=LABELS).loss)
    assert torch.equal(*losses)
    losses[0].backward()
    assert all(p.grad is not None for p in trained_of(loaded))
    other = make(METHODS[method], dtype=dtype, **choices)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(images).logits, model.eval()(images).logits)


def test_saved_without_a_correction(tmp_path: Path) -> None:
    model = make().eval()
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "correction.safetensors").exists()
    loaded = CLIPPrompt.from_pretrained(tmp_path, make_clip(), TOKENIZER)
    assert loaded.correction is None
    assert torch.equal(loaded(images_of()).logits, model(images_of()).logits)


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / "clip.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no description": (
        lambda folder: (folder / "clip.json").unlink(),
        "expected a readable file",
    ),
    "another format": (lambda folder: _edit(folder, format="other"), "expected the fields"),
    "classes of another type": (
        lambda folder: _edit(folder, classes=[1, 2]),
        "clip.json: classes: expected a sequence of strings, got [1, 2]",
    ),
    "a weight of another type": (
        lambda folder: _edit(folder, weight="5"),
        "clip.json: weight: expected a real number, got str '5'",
    ),
    "a file of another save": (
        lambda folder: (folder / "correction.safetensors").write_bytes(b"1"),
        "sha256: expected the files it was saved with, got others",
    ),
    "no correction": (
        lambda folder: (folder / "correction.safetensors").unlink(),
        "expected a readable file",
    ),
    "a correction of another width": (
        lambda folder: _narrow(folder),
        "correction: expected shape (1, 12), got (1, 11)",
    ),
    "a single prompt": (
        lambda folder: _single(folder),
        "ept_config.json: num_tasks: expected an integer, got null",
    ),
}


def _summed(folder: Path) -> None:
    """The description with the checksums of the files that are there."""
    names = ("ept_config.json", "ept_model.safetensors", "correction.safetensors")
    sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    _edit(folder, sha256=sums)


def _narrow(folder: Path) -> None:
    row = {"correction": torch.zeros(1, E - 1)}
    (folder / "correction.safetensors").write_bytes(tensor_bytes(row, PLAIN.to_json()))
    _summed(folder)


def _single(folder: Path) -> None:
    """A prompt without an axis of contexts."""
    FusedEPTPrompt(PLAIN, init=torch.zeros(M, D)).save_pretrained(folder)
    _summed(folder)


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_files(what: str, tmp_path: Path) -> None:
    damage, message = DAMAGE[what]
    make(**LASP).save_pretrained(tmp_path)
    damage(tmp_path)
    clip = make_clip().train()
    with pytest.raises(CheckpointError, match=re.escape(message)):
        CLIPPrompt.from_pretrained(tmp_path, clip, TOKENIZER)
    assert clip.training
    assert all(p.requires_grad for p in clip.parameters())


def test_a_model_of_another_width(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="hidden_size: expected 24 as in the backbone, got"):
        CLIPPrompt.from_pretrained(tmp_path, make_clip(hidden_size=24), TOKENIZER)


# Mistakes


LONG = "abcdefghijklmnopqrs"
OFFSET = EPTConfig(D, max_length=8, rank=2, num_spaces=0)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"model": nn.Linear(2, 2)},
        TypeError,
        "model: expected a CLIPModel or a TextEncoder, got Linear",
    ),
    (
        {"config": EPTConfig(D + 1, rank=0)},
        ValueError,
        "hidden_size: expected 16 as in the backbone, got 17",
    ),
    (
        {"config": OFFSET},
        ValueError,
        "rank: expected 0, as an offset is for the tokens of a text, got 2",
    ),
    (
        {"config": MixtureConfig(D, M, num_modules=2, gates="attention", query_dim=3)},
        ValueError,
        "config: expected a prompt that is the same before every text, got a MixturePrompt that "
        "depends on it (MixtureConfig(hidden_size=16, num_virtual_tokens=4, num_modules=2, "
        "num_factors=0, gates='attention', temperature=1.0, query_dim=3, attend_to_target=True))",
    ),
    ({"classes": "ab"}, TypeError, "classes: expected a sequence of strings, got 'ab'"),
    ({"classes": ["a"]}, ValueError, "classes: expected at least 2 different names, got ['a']"),
    (
        {"virtual_classes": ["cat", "x"]},
        ValueError,
        "virtual_classes: expected names beside classes, got ['cat'] again",
    ),
    (
        {"classes": ["a", LONG]},
        ValueError,
        f"classes: expected at most 24 tokens in a text, got 26 (4 of the context) for '{LONG}.'",
    ),
    (
        {"templates": ["a {}.", LONG + " {}"]},
        ValueError,
        "templates: expected at most 24 tokens in a text, got 28 (0 of the context) for "
        f"'{LONG} old tree'",
    ),
    (
        {"templates": ["a photo"]},
        ValueError,
        "templates: expected one {} for the name in each, got 'a photo'",
    ),
    (
        {"templates": TEMPLATES[:2], "groups": 3},
        ValueError,
        "templates: expected at least 1 for each of 3 groups, got 2",
    ),
    ({"groups": 0}, ValueError, "groups: expected an integer >= 1, got 0"),
    ({"weight": -1.0}, ValueError, "weight: expected a number >= 0, got -1.0"),
    ({"noise": "1"}, TypeError, "noise: expected a real number, got str '1'"),
    ({"correction": 1}, TypeError, "correction: expected a bool, got int 1"),
    ({"tokenizer": None}, TypeError, "tokenizer: expected a tokenizer, got NoneType"),
    (
        {"tokenizer": lambda texts: {"input_ids": [[7] if text else [] for text in texts]}},
        ValueError,
        "tokenizer: expected one that puts a start token before every text, got the ids [7] for "
        "'a photo of a'",
    ),
    (
        {"init": torch.ones(2, D)},
        ValueError,
        "init: expected shape [(1,) at least 4, 16], got (2, 16)",
    ),
    ({"dtype": torch.int64}, TypeError, "dtype: expected a floating dtype, got torch.int64"),
]


@pytest.mark.parametrize(("choices", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_arguments(choices: dict[str, Any], error: type[Exception], message: str) -> None:
    """The model is as it was."""
    clip = make_clip()
    given = {"model": clip, "config": PLAIN, "tokenizer": TOKENIZER, "classes": CLASSES, **choices}
    with pytest.raises(error) as caught:
        CLIPPrompt(**given)
    assert str(caught.value) == message
    assert clip.training
    assert all(p.requires_grad for p in clip.parameters())


FEATURES = torch.zeros(5, E)
CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({}, ValueError, "pixel_values, image_features: expected one of them, got neither"),
    (
        {"pixel_values": images_of(), "image_features": FEATURES},
        ValueError,
        "pixel_values, image_features: expected one of them, got both",
    ),
    (
        {"pixel_values": [1]},
        TypeError,
        "pixel_values: expected a floating tensor, got list",
    ),
    (
        {"pixel_values": torch.zeros(5, 3, 12, 12)},
        ValueError,
        "pixel_values: expected shape [at least 1, 3, 8, 8], got [5, 3, 12, 12]",
    ),
    (
        {"image_features": FEATURES.long()},
        TypeError,
        "image_features: expected a floating tensor, got torch.int64",
    ),
    (
        {"image_features": FEATURES[:, 1:]},
        ValueError,
        "image_features: expected shape [at least 1, 12], got [5, 11]",
    ),
    (
        {"image_features": FEATURES, "labels": LABELS[:4]},
        ValueError,
        "labels: expected shape [5] to match image_features, got [4]",
    ),
    (
        {"image_features": FEATURES, "labels": LABELS + 1},
        ValueError,
        "labels: expected classes from 0 to 2, got from 1 to 3",
    ),
]


@pytest.mark.parametrize(("given", "error", "message"), CALLS, ids=[m for _, _, m in CALLS])
def test_bad_calls(given: dict[str, Any], error: type[Exception], message: str) -> None:
    """Virtual classes have no images, and so no labels."""
    with pytest.raises(error) as caught:
        make(virtual_classes=VIRTUAL)(**given)
    assert str(caught.value) == message


def test_names_that_cannot_be_folded_leave_it_as_it_was() -> None:
    model = make().train()
    with pytest.raises(ValueError, match="classes: expected at most 24 tokens in a text, got 26"):
        model.fold([LONG])
    assert model.training
    assert model.names == CLASSES


def test_scaled_embeddings_are_refused() -> None:
    class Scaled(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return 2 * super().forward(ids)

    bert, _ = make_bert()
    bert.set_input_embeddings(Scaled(13, D))
    with pytest.raises(TypeError, match="expected token embeddings in an nn"):
        SentenceEncoder(bert)


def test_the_public_name_and_the_default() -> None:
    assert ept_fast.CLIPPrompt is CLIPPrompt
    model = CLIPPrompt(make_clip(), tokenizer=TOKENIZER, classes=CLASSES)
    assert model.prompt.config == dataclasses.replace(PLAIN, num_virtual_tokens=4)
    assert (model.correction, model.weight, model.noise) == (None, 5.0, 0.0)


def test_the_example_of_the_page(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(
        r"^```python\n(.*?)^```$", (root / "docs" / "clip.md").read_text(), re.M | re.S
    )

    def loss_after(steps: int) -> float:
        torch.manual_seed(0)
        names: dict[str, Any] = {}
        exec(compile(code.replace("range(20)", f"range({steps})"), "clip.md", "exec"), names)
        assert (tmp_path / "animals" / "clip.json").is_file()
        assert names["model"].names == ("zebra", "horse")
        loss: float = names["loss"].item()
        return loss

    first, last = loss_after(1), loss_after(20)
    assert 0 < last < 0.9 * first
