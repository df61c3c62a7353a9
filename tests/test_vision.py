"""A prompt behind the class token of a frozen vision transformer, on scikit-learn's digits."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ept_fast
from ept_fast import CheckpointError, EPTConfig, VisionPrompt, from_prototypes
from ept_fast.ops.types import Text
from ept_fast.prompts.base import Seen
from ept_fast.prompts.mixture import MixtureConfig
from ept_fast.prompts.prototypes import HOWS
from tests.toy_method import ToyConfig

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

D, M, SIZE, PATCH = 16, 3, 8, 2
PLAIN = EPTConfig(D, num_virtual_tokens=M, rank=0, num_spaces=0)
SPACES = EPTConfig(D, num_virtual_tokens=M, rank=0, num_spaces=2, space_dim=3)
TOY = ToyConfig(D, num_virtual_tokens=M)
METHODS = {"plain": PLAIN, "subspaces": SPACES, "another method": TOY}
NAMES = ("zero", "one", "two", "three")


def vit_config(**changes: Any) -> Any:
    sizes = {
        "hidden_size": D,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "image_size": SIZE,
        "patch_size": PATCH,
        "num_channels": 1,
        "initializer_range": 0.3,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "num_labels": len(NAMES),
        "id2label": dict(enumerate(NAMES)),
    }
    return transformers.ViTConfig(**{**sizes, **changes})


def make_vit(headed: bool = False, **changes: Any) -> Any:
    torch.manual_seed(7)
    config = vit_config(**changes)
    kind = transformers.ViTForImageClassification if headed else transformers.ViTModel
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn(parameter.shape)
    return model


def images_of(count: int = 5, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def make(config: Any = SPACES, **choices: Any) -> VisionPrompt:
    """A prompt with every tensor filled, so that each of them shows."""
    choices = {"labels": NAMES, **choices}
    model = VisionPrompt(choices.pop("model", None) or make_vit(), config, **choices)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in (*model.prompt.parameters(), *model.head.parameters()):
            parameter += 0.5 * torch.randn(parameter.shape, generator=draw)
    return model


def plainly(model: VisionPrompt, images: Tensor) -> Tensor:
    """Logits by loops over images, patches, layers, heads and tokens, from the weights alone."""
    vit = model.backbone
    w = {name: p.detach() for name, p in vit.named_parameters()}

    def linear(name: str, x: Tensor) -> Tensor:
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        x = (x - x.mean()) / (x.var(correction=0) + vit.config.layer_norm_eps).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    kernel = w["embeddings.patch_embeddings.projection.weight"]
    places = w["embeddings.position_embeddings"][0]
    prompt = model.prompt.reconstruct().detach()
    logits = []
    for image in images:
        rows = [w["embeddings.cls_token"][0, 0] + places[0], *prompt]
        for number in range((SIZE // PATCH) ** 2):
            top, left = (PATCH * i for i in divmod(number, SIZE // PATCH))
            patch = image[:, top : top + PATCH, left : left + PATCH]
            embedded = torch.stack([(k * patch).sum() for k in kernel])
            bias = w["embeddings.patch_embeddings.projection.bias"]
            rows.append(embedded + bias + places[1 + number])
        for number in range(vit.config.num_hidden_layers):
            at, half = f"layers.{number}", D // 2
            normed = [norm(f"{at}.layernorm_before", x) for x in rows]
            q, k, v = ([linear(f"{at}.attention.{name}_proj", x) for x in normed] for name in "qkv")
            for i, x in enumerate(rows):
                heads = []
                for part in (slice(half), slice(half, D)):
                    scores = torch.stack([q[i][part] @ each[part] / math.sqrt(half) for each in k])
                    shares = scores.softmax(0)
                    heads.append(sum(s * each[part] for s, each in zip(shares, v, strict=True)))
                x = x + linear(f"{at}.attention.o_proj", torch.cat(heads))
                inner = linear(f"{at}.mlp.fc1", norm(f"{at}.layernorm_after", x))
                rows[i] = x + linear(f"{at}.mlp.fc2", F.gelu(inner))
        final = norm("layernorm", rows[0])
        logits.append(model.head.weight.detach() @ final + model.head.bias.detach())
    return torch.stack(logits)


@pytest.mark.parametrize("method", METHODS)
def test_logits_are_those_of_a_plain_loop(method: str) -> None:
    """In float64, in training mode: the backbone's dropout is off."""
    model = make(METHODS[method], model=make_vit().double(), dtype=torch.float64)
    images = images_of(2).double()
    embeds = model.backbone.embeddings(images)
    logits = model(images).logits
    assert embeds.dtype == torch.float64
    assert model.training
    # Logits are given in float32.
    torch.testing.assert_close(logits, plainly(model, images).float(), rtol=1e-6, atol=1e-6)
    spliced = model.backbone.layernorm(states_behind(model, images))
    exact = spliced[:, 0] @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(exact, plainly(model, images), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("folded", [False, True])
def test_a_prompt_of_each_image(folded: bool) -> None:
    model = make(MixtureConfig(D, M, num_modules=2, gates="attention", query_dim=3)).eval()
    images = images_of(2)
    embeds = model.backbone.embeddings(images)
    places = list(model.prompt.prompt_for(Text(inputs_embeds=embeds[:, 1:]), Seen())[0])
    assert not torch.allclose(*places)
    logits = []
    for image, own in zip(embeds, places, strict=True):
        states = torch.cat([image[:1], own, image[1:]]).unsqueeze(0)
        for layer in model.backbone.layers:
            states = layer(states)
        logits.append(model.head(model.backbone.layernorm(states[:, 0]))[0])
    if folded:
        model.fold()
    torch.testing.assert_close(model(images).logits, torch.stack(logits))


def test_gates_are_noisy_in_training_alone() -> None:
    model = make(MixtureConfig(D, M, num_modules=2)).train()
    images = images_of(2)
    assert not torch.equal(model(images).logits, model(images).logits)
    assert torch.equal(model.eval()(images).logits, model(images).logits)


def states_behind(model: VisionPrompt, images: Tensor) -> Tensor:
    """The last states behind the prompt, with torch.cat and the library's layers."""
    embeds = model.backbone.embeddings(images)
    prompt = model.prompt.reconstruct().expand(len(images), -1, -1).to(embeds.dtype)
    states = torch.cat([embeds[:, :1], prompt, embeds[:, 1:]], 1)
    for layer in model.backbone.layers:
        states = layer(states)
    return states


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_torch_cat(method: str, backend: str) -> None:
    """On prompt and head alone, and none is left out."""
    model = make(METHODS[method], backend=backend)
    images, classes = images_of(), torch.tensor([0, 1, 2, 3, 0])
    trained = [*model.prompt.parameters(), *model.head.parameters()]
    output = model(images, labels=classes)
    output.loss.backward()
    logits = model.head(model.backbone.layernorm(states_behind(model, images))[:, 0])
    expected = torch.autograd.grad(F.cross_entropy(logits, classes), trained)
    for parameter, gradient in zip(trained, expected, strict=True):
        assert bool(gradient.any())
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None and not p.requires_grad for p in model.backbone.parameters())
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trained}


def test_half_precision() -> None:
    """A bfloat16 model behind a float32 prompt: class token and patches are not rounded again."""
    model = make(model=make_vit().bfloat16())
    images = images_of()
    logits = model(images).logits
    assert logits.dtype == torch.float32
    final = model.backbone.layernorm(states_behind(model, images.bfloat16()))[:, 0]
    assert torch.equal(logits, model.head(final.float()))


def test_the_model_is_kept_frozen_and_given_back() -> None:
    vit = make_vit().train()
    vit.layernorm.weight.requires_grad_(False)
    before = {name: p.clone() for name, p in vit.named_parameters()}
    model = make(model=vit).train()
    assert model.backbone is vit
    assert not any(m.training for m in vit.modules())
    assert model.prompt.training
    optimizer = torch.optim.SGD(model.parameter_groups(1.0, 1.0, 1.0, 1.0))
    model(images_of(), labels=torch.zeros(5, dtype=torch.int64)).loss.backward()
    optimizer.step()
    assert {name.partition(".")[0] for name in model.state_dict()} == {"prompt", "head"}
    assert model.unload() is vit
    assert all(torch.equal(p, before[name]) for name, p in vit.named_parameters())
    assert all(m.training for m in vit.modules())
    frozen = [name for name, p in vit.named_parameters() if not p.requires_grad]
    assert frozen == ["layernorm.weight"]


def test_the_default_is_a_plain_prompt_of_20_tokens() -> None:
    model = VisionPrompt(make_vit(), labels=NAMES)
    assert model.prompt.config == EPTConfig(D, rank=0, num_spaces=0)
    assert model.prompt.reconstruct().shape == (20, D)
    assert ept_fast.VisionPrompt is VisionPrompt


def test_the_models_own_head_is_copied() -> None:
    model = make_vit(headed=True)
    kept = VisionPrompt(model, PLAIN)
    assert kept.labels == NAMES
    assert kept.head is not model.classifier
    assert torch.equal(kept.head.weight, model.classifier.weight)
    assert kept.head.weight.requires_grad
    assert not model.classifier.weight.requires_grad
    new = VisionPrompt(model, PLAIN, labels=["a", "b"])
    assert new.head.weight.shape == (2, D)


def test_without_weight_a_prompt_of_copies_of_the_patches_changes_nothing() -> None:
    """Values for prompt tokens that repeat a patch leave attention's mean where it was."""
    model = make_vit(headed=True).eval()
    images = torch.zeros(2, 1, SIZE, SIZE)
    with torch.no_grad():
        model.vit.embeddings.position_embeddings.zero_()
        model.vit.embeddings.cls_token.copy_(
            model.vit.embeddings.patch_embeddings(images)[0, 0].expand(1, 1, D)
        )
    behind = VisionPrompt(model, PLAIN, init="data", images=images)
    torch.testing.assert_close(behind(images).logits, model(images).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [SIZE, 12])
def test_images_of_another_size(size: int) -> None:
    model = make()
    images = torch.rand(2, 1, size, size)
    logits = model(images, interpolate_pos_encoding=True).logits
    assert logits.shape == (2, len(NAMES))
    if size == SIZE:
        torch.testing.assert_close(logits, model(images).logits)


def test_folded() -> None:
    model, images = make(), images_of()
    trained = model(images).logits
    model.fold()
    assert not model.training
    assert torch.equal(model(images).logits, trained)
    assert "folded.prompt" not in model.state_dict()
    with torch.no_grad():
        model.prompt.short_prompt += 1
    assert torch.equal(model(images).logits, trained)
    assert not torch.equal(model.train()(images).logits, trained)
    half = make()
    half.fold(torch.bfloat16)
    torch.testing.assert_close(half(images).logits, trained, rtol=0.1, atol=0.1)


def test_parameter_groups() -> None:
    groups = make().parameter_groups(1e-2, 1e-3, 1e-4, 1e-5)
    assert [(g["name"], g["lr"]) for g in groups] == [
        ("prompt", 1e-2),
        ("spaces", 1e-4),
        ("head", 1e-5),
    ]


# Where training starts


@pytest.mark.parametrize("layer", [None, 0, 1])
@pytest.mark.parametrize("how", HOWS)
def test_prototypes_of_images(how: str, layer: int | None) -> None:
    """Patch embeddings before the positions, or what a layer reads, without the class token."""
    vit, images = make_vit(), images_of(40)
    model = VisionPrompt(
        vit, PLAIN, labels=NAMES, init="data", images=images, prototypes=how,
        prototype_layer=layer, generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    with torch.no_grad():
        if layer is None:
            kernel = vit.embeddings.patch_embeddings.projection
            patches = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)
            states = patches @ kernel.weight.view(D, -1).T + kernel.bias
        else:
            states = vit(images, output_hidden_states=True).hidden_states[layer][:, 1:]
    draw = torch.Generator().manual_seed(1)
    expected = from_prototypes(states, torch.ones(states.shape[:2]), M, how, draw)
    torch.testing.assert_close(model.prompt.reconstruct().detach(), expected, rtol=1e-4, atol=1e-4)


def test_other_starts() -> None:
    vit, draw = make_vit(), torch.Generator()
    rows = torch.randn(M + 2, D)
    assert torch.equal(
        VisionPrompt(vit, SPACES, labels=NAMES, init=rows).prompt.reconstruct(), rows[:M]
    )
    config = dataclasses.replace(PLAIN, num_virtual_tokens=200)
    uniform = VisionPrompt(vit, config, labels=NAMES, generator=draw).prompt.reconstruct()
    bound = math.sqrt(6 / (PATCH * PATCH + D))
    assert 0.98 * bound < float(uniform.detach().abs().max()) <= bound
    assert float(uniform.detach().mean().abs()) < 0.05 * bound
    one, other = (
        VisionPrompt(vit, labels=NAMES, generator=torch.Generator().manual_seed(4))
        for _ in range(2)
    )
    assert torch.equal(one.prompt.short_prompt, other.prompt.short_prompt)
    assert torch.equal(one.head.weight, other.head.weight)


# Files


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_and_loaded(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, images = make(METHODS[method], dtype=dtype).eval(), images_of()
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "ept_config.json",
        "ept_model.safetensors",
        "head.safetensors",
        "vision.json",
    }
    loaded = VisionPrompt.from_pretrained(tmp_path, make_vit())
    assert not loaded.training
    assert loaded.labels == NAMES
    assert loaded.head.weight.dtype == dtype
    assert torch.equal(loaded(images).logits, model(images).logits)
    loaded.train()(images, labels=torch.zeros(5, dtype=torch.int64)).loss.backward()
    assert all(p.grad is not None for p in loaded.prompt.parameters())
    # The state dict is enough for the same model, folded or not.
    other = VisionPrompt(make_vit(), METHODS[method], labels=NAMES, dtype=dtype)
    other.fold()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images).logits, model(images).logits)


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / "vision.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no description": (
        lambda folder: (folder / "vision.json").unlink(),
        "expected a readable file",
    ),
    "another format": (lambda folder: _edit(folder, format="other"), "expected the fields"),
    "a foreign field": (lambda folder: _edit(folder, more=1), "expected the fields"),
    "labels of another type": (
        lambda folder: _edit(folder, labels=[1, 2]),
        "labels: expected strings, got [1, 2]",
    ),
    "labels that are not different": (
        lambda folder: _edit(folder, labels=["a", "a"]),
        "labels: expected at least 2 different names, got ['a', 'a']",
    ),
    "fewer labels than rows": (
        lambda folder: _edit(folder, labels=["a", "b"]),
        "weight: expected shape (2, 16), got (4, 16)",
    ),
    "a file of another save": (
        lambda folder: (folder / "head.safetensors").write_bytes(b"1"),
        "sha256: expected the files it was saved with, got others",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_files(what: str, tmp_path: Path) -> None:
    damage, message = DAMAGE[what]
    make().save_pretrained(tmp_path)
    damage(tmp_path)
    vit = make_vit().train()
    with pytest.raises(CheckpointError, match=re.escape(message)):
        VisionPrompt.from_pretrained(tmp_path, vit)
    assert vit.training
    assert all(p.requires_grad for p in vit.parameters())


def test_a_model_of_another_width(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="hidden_size: expected 24 as in the backbone, got"):
        VisionPrompt.from_pretrained(tmp_path, make_vit(hidden_size=24))


# Mistakes


OFFSET = EPTConfig(D, max_length=8, rank=2, num_spaces=0)
IMAGES = images_of()
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"model": nn.Linear(2, 2)},
        TypeError,
        "model: expected a ViTModel or a ViTForImageClassification, got Linear",
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
        {"config": 3},
        TypeError,
        "config: expected an EPTConfig or that of another registered method, got int",
    ),
    (
        {"labels": None},
        ValueError,
        "labels: expected names of the classes, as the model has no classifier, got None",
    ),
    ({"labels": "ab"}, TypeError, "labels: expected a sequence of strings, got 'ab'"),
    ({"labels": [1, 2]}, TypeError, "labels: expected a sequence of strings, got [1, 2]"),
    ({"labels": ["a"]}, ValueError, "labels: expected at least 2 different names, got ['a']"),
    ({"init": "vocab"}, ValueError, "init: expected one of random, data, got 'vocab'"),
    ({"init": torch.ones(2, D)}, ValueError, "init: expected shape [at least 3, 16], got (2, 16)"),
    ({"init": "data"}, ValueError, 'images: expected a tensor for init="data", got NoneType'),
    (
        {"images": IMAGES},
        ValueError,
        'images: expected None unless init="data", got torch.float32',
    ),
    (
        {"init": "data", "images": IMAGES[0]},
        ValueError,
        "images: expected shape [at least 1, 1, 8, 8], got [1, 8, 8]",
    ),
    (
        {"init": "data", "images": IMAGES[:0]},
        ValueError,
        "images: expected shape [at least 1, 1, 8, 8], got [0, 1, 8, 8]",
    ),
    (
        {"init": "data", "images": IMAGES.byte()},
        TypeError,
        "images: expected a floating tensor, got torch.uint8",
    ),
    (
        {"init": "data", "images": IMAGES, "prototypes": "median"},
        ValueError,
        "prototypes: expected one of kmeans, random, mean, max, got 'median'",
    ),
    (
        {"init": "data", "images": IMAGES, "prototype_layer": 2},
        ValueError,
        "prototype_layer: expected a layer from 0 to 1, got 2",
    ),
    (
        {"prototypes": "mean"},
        ValueError,
        'prototypes: expected "random" unless init="data", got \'mean\'',
    ),
    (
        {"prototype_layer": 1},
        ValueError,
        'prototype_layer: expected None unless init="data", got 1',
    ),
    ({"dtype": torch.int64}, TypeError, "dtype: expected a floating dtype, got torch.int64"),
]


@pytest.mark.parametrize(("choices", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_arguments(choices: dict[str, Any], error: type[Exception], message: str) -> None:
    """The model is as it was."""
    vit = make_vit()
    given = {"model": vit, "config": PLAIN, "labels": NAMES, **choices}
    with pytest.raises(error) as caught:
        VisionPrompt(**given)
    assert str(caught.value) == message
    assert vit.training
    assert all(p.requires_grad for p in vit.parameters())


CLASSES = torch.zeros(5, dtype=torch.int64)
CALLS: list[tuple[tuple[Any, ...], type[Exception], str]] = [
    (([1],), TypeError, "pixel_values: expected a floating tensor, got list"),
    (
        (torch.zeros(5, 3, 8, 8),),
        ValueError,
        "pixel_values: expected shape [at least 1, 1, 8, 8], got [5, 3, 8, 8]",
    ),
    (
        (torch.zeros(5, 1, 12, 12),),
        ValueError,
        "pixel_values: expected shape [at least 1, 1, 8, 8], got [5, 1, 12, 12]",
    ),
    (
        (torch.zeros(5, 3, 12, 12), None, True),
        ValueError,
        "pixel_values: expected shape [at least 1, 1, H, W], got [5, 3, 12, 12]",
    ),
    ((IMAGES, CLASSES.float()), TypeError, "labels: expected an int64 tensor, got torch.float32"),
    (
        (IMAGES, CLASSES[:4]),
        ValueError,
        "labels: expected shape [5] to match pixel_values, got [4]",
    ),
    ((IMAGES, CLASSES + 4), ValueError, "labels: expected classes from 0 to 3, got from 4 to 4"),
]


@pytest.mark.parametrize(("given", "error", "message"), CALLS, ids=[m for _, _, m in CALLS])
def test_bad_calls(given: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        make()(*given)
    assert str(caught.value) == message


def test_the_example_of_the_page(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(
        r"^```python\n(.*?)^```$", (root / "docs" / "vision.md").read_text(), re.M | re.S
    )
    names: dict[str, Any] = {}
    exec(compile(code, "vision.md", "exec"), names)
    assert (tmp_path / "digits" / "vision.json").is_file()
    assert 0 < names["loss"].item() < 4


# Digits: what the start does, behind a small ViT that knows some of them


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """1,797 images of 8 x 8 in [-1, 1], shuffled, and their classes."""
    found = pytest.importorskip("sklearn.datasets").load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], torch.tensor(found.target)[order]


def learn(
    loss_of: Callable[[Tensor], Tensor], groups: Any, rows: int, steps: int, seed: int
) -> None:
    """Adam on batches of 32 drawn rows."""
    draw, optimizer = torch.Generator().manual_seed(seed), torch.optim.Adam(groups, lr=3e-3)
    for _ in range(steps):
        loss = loss_of(torch.randint(rows, (32,), generator=draw))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def old_digits(images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    return images[classes < 5], classes[classes < 5]


def new_digits(images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    return images[classes >= 5], classes[classes >= 5] - 5


def taught(digits: tuple[Tensor, Tensor], seed: int) -> Any:
    """A ViT that learnt the digits 0 to 4, from half of their images."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    names = {"num_labels": 5, "id2label": dict(enumerate("01234"))}
    torch.manual_seed(seed)
    model = transformers.ViTForImageClassification(
        vit_config(**sizes, **names, initializer_range=0.1)
    ).eval()
    images, classes = old_digits(*digits)

    def loss_of(at: Tensor) -> Tensor:
        loss: Tensor = model(images[at], labels=classes[at]).loss
        return loss

    learn(loss_of, model.parameters(), len(images) // 2, 120, seed)
    return model


EIGHT = EPTConfig(32, num_virtual_tokens=8, rank=0, num_spaces=0)


@torch.no_grad()
def judged(model: VisionPrompt, images: Tensor, classes: Tensor) -> tuple[float, float]:
    """Loss and accuracy."""
    output = model(images, labels=classes)
    return float(output.loss), float((output.logits.argmax(1) == classes).float().mean())


def starts_of(images: Tensor, *names: str) -> dict[str, dict[str, Any]]:
    """The arguments of starts: "uniform", a way of prototypes, or that of layer 0, as "mean 0"."""
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        how, _, layer = name.partition(" ")
        data = {"init": "data", "images": images, "prototypes": how}
        layers = {"prototype_layer": int(layer)} if layer else {}
        found[name] = {} if how == "uniform" else {**data, **layers}
    return found


def test_what_a_start_costs_before_training(digits: tuple[Tensor, Tensor]) -> None:
    """With the model's own head on digits that it knows: how much the prompt is in the way.

    Single patches are more in the way than VPT's noise if they bring their positions along, as
    a layer's input does, and more so than the means of windows of them.
    """
    model, (images, classes) = taught(digits, 0), old_digits(*digits)
    half = len(images) // 2
    losses: dict[str, float] = {}
    for name, start in starts_of(images[:half], "uniform", "random 0", "mean 0").items():
        found = []
        for seed in range(5):
            draw = torch.Generator().manual_seed(seed)
            behind = VisionPrompt(model, EIGHT, generator=draw, **start)
            found.append(judged(behind, images[half:], classes[half:])[0])
            behind.unload()
        losses[name] = mean(found)
    assert losses["random 0"] > losses["uniform"], losses
    assert losses["random 0"] > losses["mean 0"], losses


@pytest.mark.minutes
@pytest.mark.slow
@pytest.mark.support(row="SPT", column="learning")
def test_a_tuned_prompt_beats_its_head_alone(digits: tuple[Tensor, Tensor]) -> None:
    """On digits that the model has not seen, from every start; no start is far from another.

    ``pytest -m slow -s`` prints what docs/vision.md says.
    """
    images, classes = new_digits(*digits)
    half = len(images) // 2
    names = ("uniform", *HOWS, "random 0")
    scores: dict[str, list[float]] = {"head alone": [], **{name: [] for name in names}}
    first: dict[str, list[float]] = {name: [] for name in scores}
    for number in range(2):
        vit = taught(digits, number)
        old = old_digits(*digits)
        starts = {"head alone": {}, **starts_of(images[:half], *names)}
        known = {"head alone": {}, **starts_of(old[0][: len(old[0]) // 2], *names)}
        for name, start in starts.items():
            for seed in range(3):
                draw = torch.Generator().manual_seed(seed)
                own = VisionPrompt(vit, EIGHT, generator=draw, **known[name])
                first[name].append(judged(own, *(v[len(v) // 2 :] for v in old))[0])
                own.unload()
                draw = torch.Generator().manual_seed(seed)
                model = VisionPrompt(vit, EIGHT, labels=list("56789"), generator=draw, **start)

                def loss_of(at: Tensor, model: VisionPrompt = model) -> Tensor:
                    loss = model(images[at], classes[at]).loss
                    assert loss is not None
                    return loss

                groups = model.train().parameter_groups(3e-2, 0, 0, 1e-2)
                learn(loss_of, groups[name == "head alone" :], half, 100, seed)
                scores[name].append(judged(model, images[half:], classes[half:])[1])
                model.unload()
    accuracy = {name: mean(values) for name, values in scores.items()}
    for name, values in scores.items():
        low, high = min(values), max(values)
        print(f"{name:10} {accuracy[name]:.3f} ({low:.3f} to {high:.3f}), {mean(first[name]):.2f}")
    trained = [accuracy[name] for name in names]
    assert min(trained) > accuracy["head alone"] + 0.02, accuracy
    assert max(trained) - min(trained) < 0.1, accuracy
