"""Losses beside a task's own: their values, and how they get into a training."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ept_fast import EPTConfig, get_ept_model
from ept_fast.losses.contrastive import supervised_contrastive
from ept_fast.losses.information import (
    gaussian_divergence,
    head_information,
    info_nce,
    representation_information,
)
from ept_fast.losses.named import NAMED_LOSSES
from ept_fast.losses.terms import LossInputs, LossTerm
from ept_fast.prompts.infoprompt import InfoPromptConfig
from ept_fast.prompts.stable import StableConfig
from ept_fast.training.config import TrainConfig
from ept_fast.training.job import train
from ept_fast.transformers.padding import Text
from ept_fast.transformers.states import PlainReader
from tests.architectures import BY_NAME
from tests.methods import filled
from tests.tiny import save_model, save_task, small_run, weights_of

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

BERT, LLAMA = BY_NAME["BERT"], BY_NAME["Llama"]
D = BERT.width
LABELS = ("a", "b", "c")
SMALL = EPTConfig(D, num_virtual_tokens=3, rank=0, num_spaces=0)
INFO = InfoPromptConfig(D, num_virtual_tokens=3, bottleneck=4, latent_size=2)
STABLE = StableConfig(D, num_virtual_tokens=3, num_heads=2, head_dim=3, mlp_dim=4)


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def batch(rows: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(5, 20, (rows, 6), generator=generator)
    mask = torch.arange(6) >= torch.arange(rows).unsqueeze(1)  # padded on the left
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": torch.arange(rows) % 3}


def model_of(config: Any = SMALL, *, bare: bool = True, task: str = "SEQ_CLS") -> Any:
    named = {"labels": LABELS} if task == "SEQ_CLS" and bare else {}
    architecture = BERT if task == "SEQ_CLS" else LLAMA
    backbone = architecture.build(task, bare=bare and task == "SEQ_CLS")
    generator = torch.Generator().manual_seed(1)
    return get_ept_model(backbone, config, task, generator=generator, **named)


# Values


def scalar_nce(positive: float, negatives: list[float]) -> float:
    total = sum(math.exp(score) for score in (positive, *negatives))
    return -math.log(math.exp(positive) / total)


def test_info_nce_is_the_negative_log_of_a_softmax() -> None:
    positive, negatives = draw(3), draw(3, 5, seed=1)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 0, 1], [0, 0, 0, 0, 0]])
    rows = []
    for i in range(3):
        kept = [float(negatives[i, j]) for j in range(5) if mask[i, j]]
        rows.append(scalar_nce(float(positive[i]), kept))
    assert rows[2] == 0  # nothing to be told from
    assert float(info_nce(positive, negatives, mask)) == pytest.approx(sum(rows) / 3, rel=1e-12)
    alike = torch.zeros(2, 7, dtype=torch.float64)
    assert float(info_nce(alike[:, 0], alike)) == pytest.approx(math.log(8))
    far = info_nce(torch.full((2,), 50.0), torch.zeros(2, 7))
    assert 0 <= float(far) < 1e-6


def test_a_limit_of_the_log_probability_takes_the_gradient_away() -> None:
    """The release has a limit of -2, and with 33 candidates starts at -3.5."""
    positive = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    negatives = torch.zeros(2, 32, dtype=torch.float64)
    (free,) = torch.autograd.grad(info_nce(positive, negatives), positive)
    (held,) = torch.autograd.grad(info_nce(positive, negatives, None, -2.0), positive)
    assert bool((free < -0.4).all())
    assert not bool(held.any())


@pytest.mark.parametrize("shared", [False, True])
def test_head_information_by_loops(shared: bool) -> None:
    m, d, s = 2, 4, 3
    prompt = draw(m, d) if shared else draw(2, m, d)
    weights, embeds = draw(5, d, seed=1), draw(2, s, d, seed=2)
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    rows = []
    for b in range(2):
        mean = [sum(float(weights[c, i]) for c in range(5)) / 5 for i in range(d)]
        own = prompt if shared else prompt[b]
        scores = [
            sum(float(row[i]) * mean[i] for i in range(d)) / math.sqrt(d)
            for row in (*own, *embeds[b])
        ]
        negatives = [score for score, real in zip(scores[m:], mask[b], strict=True) if real]
        rows.append(scalar_nce(sum(scores[:m]) / m, negatives))
    got = head_information(prompt, weights, embeds, mask)
    assert float(got) == pytest.approx(sum(rows) / 2, rel=1e-12)
    with pytest.raises(ValueError, match=r"class_weights: expected width 4 as of the .*, got 5"):
        head_information(prompt, draw(5, 5), embeds)


def test_representation_information_by_loops() -> None:
    z = 3
    context, positive, negatives = draw(2, z), draw(2, z, seed=1), draw(2, 4, z, seed=2)
    rows = []
    for b in range(2):
        scores = [
            sum(float(each[i] * context[b, i]) for i in range(z)) / math.sqrt(z)
            for each in (positive[b], *negatives[b])
        ]
        rows.append(scalar_nce(scores[0], scores[1:]))
    got = representation_information(context, positive, negatives)
    assert float(got) == pytest.approx(sum(rows) / 2, rel=1e-12)


def test_divergence_from_a_normal_distribution() -> None:
    mean, log_std = draw(3, 2), draw(3, 2, seed=1)
    normal = torch.distributions.Normal
    exact = torch.distributions.kl_divergence(normal(mean, log_std.exp()), normal(0.0, 1.0))
    torch.testing.assert_close(gaussian_divergence(mean, log_std), exact.mean())
    assert float(gaussian_divergence(torch.zeros(3), torch.zeros(3))) == 0


def scalar_contrastive(features: Tensor, labels: list[int], temperature: float) -> float:
    rows = [[float(x) for x in row] for row in features]
    norms = [math.sqrt(sum(x * x for x in row)) for row in rows]

    def score(i: int, j: int) -> float:
        dot = sum(x * y for x, y in zip(rows[i], rows[j], strict=True))
        return math.exp(dot / norms[i] / norms[j] / temperature)

    losses = []
    for i in range(len(rows)):
        total = sum(score(i, k) for k in range(len(rows)) if k != i)
        same = [j for j in range(len(rows)) if j != i and labels[j] == labels[i]]
        if same:
            losses.append(-sum(math.log(score(i, j) / total) for j in same) / len(same))
    return sum(losses) / len(losses) if losses else 0.0


@pytest.mark.parametrize(
    "labels",
    [[0, 1, 0, 1, 2], [0, 0, 0, 0, 0], [0, 1, 2, 3, 4], [3, 3, 0, 1, 2]],
    ids=["mixed", "one class", "no pair", "one pair"],
)
def test_supervised_contrastive_by_loops(labels: list[int]) -> None:
    features = draw(5, 4)
    features[2] = features[0]  # duplicates
    got = supervised_contrastive(features, torch.tensor(labels), 0.4)
    assert float(got) == pytest.approx(scalar_contrastive(features, labels, 0.4), rel=1e-12)
    alone = features[:1].clone().requires_grad_()
    one = supervised_contrastive(alone, torch.tensor(labels[:1]))
    (gradient,) = torch.autograd.grad(one, alone)
    assert one.item() == 0
    assert not bool(gradient.any())


def test_contrastive_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"labels: expected shape \[5\], got \[4\]"):
        supervised_contrastive(draw(5, 4), torch.zeros(4))
    with pytest.raises(ValueError, match=r"temperature: expected a number > 0, got 0\.0"):
        supervised_contrastive(draw(5, 4), torch.zeros(5), 0.0)


GRADIENTS = {
    "info_nce": (lambda p, n: info_nce(p, n), [(3,), (3, 4)]),
    "head": (lambda p, w, e: head_information(p, w, e), [(2, 2, 3), (4, 3), (2, 3, 3)]),
    "representation": (representation_information, [(2, 3), (2, 3), (2, 4, 3)]),
    "divergence": (gaussian_divergence, [(2, 3), (2, 3)]),
    "contrastive": (
        lambda f: supervised_contrastive(f, torch.tensor([0, 1, 0, 1, 2])),
        [(5, 4)],
    ),
}


@pytest.mark.parametrize(("function", "shapes"), GRADIENTS.values(), ids=GRADIENTS)
def test_gradients_of_losses(function: Any, shapes: list[tuple[int, ...]]) -> None:
    inputs = tuple(draw(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes))
    assert torch.autograd.gradcheck(function, inputs)


# Terms


def test_schedules() -> None:
    inputs = LossInputs(*[torch.ones(1)] * 5)
    constant = LossTerm("one", lambda x: x.logits.sum(), 3.0)
    linear = LossTerm("one", lambda x: x.logits.sum(), 3.0, "linear")
    for progress, wanted in ((0.0, 3.0), (0.25, 2.25), (1.0, 0.0)):
        assert float(constant(inputs, torch.tensor(progress))) == 3.0
        assert float(linear(inputs, torch.tensor(progress))) == wanted


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (("a", 3), TypeError, "function: expected a function of LossInputs, got int"),
        (("a", sum, "b"), TypeError, "weight: expected a real number, got str"),
        (("a", sum, math.inf), ValueError, "weight: expected a finite number, got inf"),
        (("a", sum, 1.0, "step"), ValueError, "schedule: expected one of constant, linear, got"),
    ],
)
def test_bad_terms(values: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LossTerm(*values)


@pytest.mark.parametrize("bare", [True, False], ids=["linear head", "the model's own head"])
def test_terms_are_added_in_training_only(bare: bool) -> None:
    model = model_of(bare=bare)
    given = batch()
    model.train()
    plain = model(**given)
    seen: list[LossInputs] = []

    def size(inputs: LossInputs) -> Tensor:
        seen.append(inputs)
        return inputs.prompt.square().mean() + inputs.pooled.square().mean()  # type: ignore[union-attr]

    model.add_loss(LossTerm("size", size, 0.5))
    model.add_loss(LossTerm("other", size, 2.0, "linear"))
    model.add_loss(LossTerm("nothing", size, 0.0))
    model.set_loss_progress(0.75)
    output = model(**given)
    assert len(seen) == 2
    inputs = seen[0]
    assert inputs.class_weights is not None
    assert inputs.pooled is not None
    assert inputs.class_weights.shape == (3, inputs.pooled.shape[1])
    table = model.backbone.get_input_embeddings().weight
    text = given["input_ids"][0]  # the row without padding
    assert torch.equal(inputs.embeds[0], table[text])
    assert torch.equal(inputs.prompt[1], model.prompt.short_prompt)
    assert inputs.attention_mask.sum(1).tolist() == [6, 5, 4, 3]
    expected = plain.loss + (0.5 + 2.0 * 0.25) * size(inputs)
    torch.testing.assert_close(output.loss, expected)
    part = model(**given, num_items_in_batch=8)  # half of a step of eight rows
    torch.testing.assert_close(part.loss, expected / 2)
    output.loss.backward()
    assert bool(model.prompt.short_prompt.grad.any())
    model.eval()
    torch.testing.assert_close(model(**given).loss, plain.loss)
    with pytest.raises(ValueError, match="progress: expected a number from 0 to 1, got 2"):
        model.set_loss_progress(2)
    with pytest.raises(TypeError, match="term: expected a LossTerm, got function"):
        model.add_loss(size)


@pytest.mark.parametrize("config", [INFO, STABLE], ids=["infoprompt", "stable"])
@pytest.mark.parametrize("bare", [True, False], ids=["linear head", "the model's own head"])
def test_a_methods_own_terms(config: Any, bare: bool) -> None:
    model = model_of(config, bare=bare)
    filled(model.prompt)
    given = batch()
    torch.manual_seed(0)
    loss = model.train()(**given).loss
    loss.backward()
    for name, parameter in model.prompt.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name
    terms = {term.name: term.weight for term in model.loss_terms}
    if config is STABLE:
        assert terms == {"contrastive": 1.0}
        evaluated = model.eval()(**given)
        rows, _ = model.rows(Text.of(given["input_ids"], None, given["attention_mask"], None), {})
        features = rows.inputs_embeds[:, :3].mean(1)
        wanted = evaluated.loss + supervised_contrastive(features, given["labels"], 0.3)
        torch.testing.assert_close(loss, wanted)
    else:
        assert terms == {
            "head_information": 0.1,
            "representation_information": 0.2,
            "divergence": 0.1,
        }
        torch.manual_seed(0)  # the draws of the representation come from torch's generator
        assert torch.equal(model.train()(**given).loss, loss)
        model.set_loss_progress(1.0)
        torch.testing.assert_close(model(**given).loss, model.eval()(**given).loss)


def test_every_named_loss_trains_any_prompt() -> None:
    for name, function in NAMED_LOSSES.items():
        model = model_of().train()
        model.add_loss(LossTerm(name, function))
        loss = model(**batch()).loss
        assert loss.item() > model.eval()(**batch()).loss.item()
        loss.backward()
        assert bool(model.prompt.short_prompt.grad.any())


@pytest.mark.parametrize("config", [INFO, STABLE], ids=["infoprompt", "stable"])
def test_other_tasks_say_what_is_missing(config: Any) -> None:
    model = model_of(dataclasses.replace(config, hidden_size=LLAMA.width), task="CAUSAL_LM")
    ids = batch()["input_ids"]
    message = {
        INFO: "head_information: expected a task that has class_weights .SEQ_CLS has.",
        STABLE: "contrastive: expected a task with one label for each text",
    }[config]
    with pytest.raises(ValueError, match=message):
        model.train()(input_ids=ids, labels=ids)
    model.eval()(input_ids=ids, labels=ids)


def test_terms_of_other_tasks_and_packed_rows() -> None:
    model = model_of(EPTConfig(LLAMA.width, 3, rank=0, num_spaces=0), task="CAUSAL_LM").train()
    ids = batch()["input_ids"]
    plain = model(input_ids=ids, labels=ids).loss
    model.add_loss(LossTerm("size", lambda inputs: inputs.prompt.square().mean(), 2.0))
    added = 2.0 * model.prompt.short_prompt.square().mean()
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, plain + added)
    count = (ids.numel()) * 2
    half = model(input_ids=ids, labels=ids, num_items_in_batch=count).loss
    torch.testing.assert_close(half, (plain + added) / 2)
    packed = torch.arange(ids.numel()).view(1, -1)
    with pytest.raises(ValueError, match=r"pack_index: expected no further terms .*, got size"):
        model(input_ids=ids, labels=ids, pack_index=packed)


def test_with_peft_and_the_trainer_of_transformers(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from ept_fast.peft import EPTPeftConfig
    from ept_fast.transformers.loss import LossProgress

    ours = model_of(INFO, bare=False)
    config = EPTPeftConfig.of(INFO, task_type="SEQ_CLS")
    theirs = peft.get_peft_model(BERT.build("SEQ_CLS"), config)
    theirs.ept_model.prompt.load_state_dict(ours.prompt.state_dict())
    losses = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(0)
        losses.append(model(**batch()).loss)
    torch.testing.assert_close(losses[1], losses[0])

    progress: list[float] = []

    def note(inputs: LossInputs) -> Tensor:
        progress.append(float(theirs.ept_model._progress))
        return inputs.prompt.sum() * 0

    theirs.add_loss(LossTerm("note", note, 1.0))
    rows = [{name: value[i] for name, value in batch().items()} for i in range(4)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
    )
    trainer = transformers.Trainer(
        model=theirs, args=arguments, train_dataset=rows, callbacks=[LossProgress()]
    )
    trainer.train()
    assert progress == [0.0, 0.25, 0.5, 0.75]


# The first pass


def text_of(given: dict[str, Tensor]) -> Text:
    return Text.of(given["input_ids"], None, given["attention_mask"], None)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", ["BERT", "Llama", "T5"])
def test_plain_states_are_those_of_the_plain_model(name: str, keep: bool) -> None:
    task = {"BERT": "SEQ_CLS", "Llama": "CAUSAL_LM", "T5": "SEQ_2_SEQ_LM"}[name]
    backbone = BY_NAME[name].build(task).eval()
    given = batch()
    states = PlainReader(backbone).states(text_of(given), keep)
    reader = backbone.get_encoder() if name == "T5" else backbone.base_model
    for ids, mask, found in zip(given["input_ids"], given["attention_mask"], states, strict=True):
        with torch.no_grad():
            wanted = reader(input_ids=ids[mask != 0].unsqueeze(0)).last_hidden_state[0]
        torch.testing.assert_close(found[mask != 0], wanted)


def test_rows_that_come_again_are_not_read_again() -> None:
    model = model_of(INFO).train()
    calls = []
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    given = batch()
    first = model._plain.states(text_of(given), keep=True)
    assert len(calls) == 4  # each alone
    again = model._plain.states(text_of(given), keep=True)
    assert len(calls) == 4
    assert torch.equal(again, first)
    turned = {name: value.flip(0) for name, value in given.items()}
    assert torch.equal(model._plain.states(text_of(turned), keep=True), first.flip(0))
    calls.clear()
    model(**given)
    assert len(calls) == 1  # the pass behind the prompt
    calls.clear()
    model.eval()(**given)
    assert len(calls) == 2  # nothing is kept for evaluation
    model.set_input_embeddings(model.backbone.get_input_embeddings())
    calls.clear()
    model.train()(**given)
    assert len(calls) == 5
    size = first[0].numel() * first.element_size()
    reader = PlainReader(model.backbone, limit=2 * size)
    reader.states(text_of(given), keep=True)
    assert sum(row.numel() for row in reader._rows.values()) * 4 <= 2 * size
    assert torch.equal(reader.states(text_of(given), keep=True), first)


def test_states_that_layers_of_peft_change_are_not_kept() -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["query"], init_lora_weights=False)
    backbone = peft.get_peft_model(BERT.build("SEQ_CLS", bare=True), lora)
    model: Any = get_ept_model(backbone, INFO, "SEQ_CLS", labels=LABELS).train()
    before = model._plain_states(text_of(batch()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.mul_(2)
    assert not torch.allclose(model._plain_states(text_of(batch())), before)


def test_states_of_another_width_are_refused() -> None:
    prompt = model_of(INFO).prompt
    with pytest.raises(ValueError, match=f"states: expected width hidden_size {D}, got 5"):
        prompt(batch()["input_ids"], states=torch.zeros(4, 6, 5))
    with pytest.raises(ValueError, match="task_ids: expected None, got a tensor of shape"):
        prompt(batch()["input_ids"], task_ids=torch.zeros(4, dtype=torch.int64))


# Training


@pytest.mark.parametrize("method", ["infoprompt", "stable"])
def test_a_run_that_goes_on_gives_the_same_weights(method: str, tmp_path: Path) -> None:
    model, data = save_model(tmp_path / "model"), save_task(tmp_path / "data")
    whole = small_run(model, data, tmp_path / "whole", method=method, max_steps=6, eval_steps=3)
    whole |= {"prompt_length": 60}
    metrics = train(TrainConfig(**whole))
    assert metrics["prompt"]["prompt_type"] == method
    part = tmp_path / "part"
    train(TrainConfig(**{**whole, "output": str(part)}))
    shutil.rmtree(part / "adapter")
    shutil.rmtree(part / "checkpoints" / "checkpoint-6")
    (part / "metrics.json").unlink()
    train(TrainConfig(**{**whole, "output": str(part)}), resume=True)
    assert weights_of(part) == weights_of(tmp_path / "whole")


def test_named_losses_of_a_run(tmp_path: Path) -> None:
    model, data = save_model(tmp_path / "model"), save_task(tmp_path / "data")
    plain = small_run(model, data, tmp_path / "plain", method="pt", max_steps=3)
    losses = {"supervised_contrastive": 0.5, "head_information": 0.1}
    more = {**plain, "output": str(tmp_path / "more"), "losses": losses, "loss_schedule": "linear"}
    first = train(TrainConfig(**plain))["curves"]["loss"]
    second = train(TrainConfig(**more))
    assert second["config"]["losses"] == losses
    assert second["curves"]["loss"][0] > first[0]
    for bad, message in (
        ({"entropy": 1.0}, "losses: expected one of head_information, supervised_contrastive, got"),
        ({"head_information": "a"}, "losses: head_information: expected a real number, got str"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            TrainConfig(**{**plain, "losses": bad})
    with pytest.raises(ValueError, match="losses: expected none for the task causal, got"):
        TrainConfig(**{**plain, "losses": losses, "task": "causal"})


def test_cross_entropy_alone_is_what_it_was() -> None:
    model = model_of().train()
    output = model(**batch())
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, batch()["labels"]))
