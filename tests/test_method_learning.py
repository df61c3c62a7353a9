"""What each prompt method learns that plain prompt tuning learns worse, or that it learns as well.

A tiny frozen encoder with random weights, and a teacher's prompt before it: a student learns from
the encoder's outputs alone. Where a method is compared at equal parameters, its teacher is one of
its own kind, so that it can reach it, and a plain prompt of as many parameters is shorter or longer
than the teacher's.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from ept_fast import EPTConfig
from ept_fast.config import PromptConfig
from ept_fast.prompts.accept import ACCEPTConfig
from ept_fast.prompts.base import Prompt, prompt_class
from ept_fast.prompts.infoprompt import InfoPromptConfig
from ept_fast.prompts.instance import InstanceConfig
from ept_fast.prompts.lamp import LAMPConfig
from ept_fast.prompts.mixture import MixtureConfig, MixturePrompt
from ept_fast.prompts.residual import ResidualConfig
from ept_fast.prompts.stable import StableConfig
from ept_fast.prompts.ulpt import ULPTConfig
from tests.methods import filled

pytestmark = pytest.mark.usefixtures("one_thread")

D, WORDS, LENGTH = 32, 40, 8


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@functools.cache
def encoder() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=D,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.15,
    )
    model = transformers.BertModel(config, add_pooling_layer=False)
    return model.eval().requires_grad_(False)


def new_prompt(config: PromptConfig, seed: int, **options: Any) -> Prompt:
    layer = encoder().get_input_embeddings()
    return prompt_class(config)(config, layer, generator=seeded(seed), **options)


def texts(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(WORDS, (count, LENGTH), generator=generator)


def outputs(prompt: Prompt, ids: Tensor, task_ids: Tensor | None = None) -> Tensor:
    """The mean over the text of the encoder's last states, ``[B, d]``."""
    spliced = prompt(ids, task_ids=task_ids)._asdict()
    states: Tensor = encoder()(**spliced).last_hidden_state
    return states[:, prompt.config.num_virtual_tokens :].mean(1)


def learn(student: Prompt, teacher: Prompt, steps: int, rate: float = 0.1) -> float:
    """The student's loss on texts that it has not seen, after so many steps."""
    optimizer = torch.optim.Adam(student.parameter_groups(rate, 0.3 * rate, 0.3 * rate))
    draw = seeded(1)
    for _ in range(steps):
        ids = texts(16, draw)
        with torch.no_grad():
            wanted = outputs(teacher, ids)
        optimizer.zero_grad()
        F.mse_loss(outputs(student, ids), wanted).backward()
        optimizer.step()
    return judged(student, teacher)


@torch.no_grad()
def judged(student: Prompt, teacher: Prompt) -> float:
    ids = texts(64, seeded(2))
    return float(F.mse_loss(outputs(student.eval(), ids), outputs(teacher.eval(), ids)))


def plain(tokens: int) -> Prompt:
    return new_prompt(EPTConfig(D, tokens, rank=0, num_spaces=0), 101)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(
            LAMPConfig(D, 10, prompt_rank=2, window=4),
            marks=pytest.mark.support(row="LAMP", column="learning"),
        ),
        ULPTConfig(D, 12, prompt_rank=2),
        ACCEPTConfig(D, 6, LENGTH, num_blocks=2, codebook_size=2, offset_size=2),
    ],
    ids=lambda config: config.prompt_type,
)
def test_better_than_a_plain_prompt_of_as_many_parameters(config: Any) -> None:
    teacher = filled(new_prompt(config, 0), 0).eval()
    ours = learn(new_prompt(config, 100), teacher, 80)
    theirs = learn(plain(round(config.num_parameters / D)), teacher, 80)
    assert ours < 0.8 * theirs, (ours, theirs)  # 0.02 to 0.59 over three teachers


@pytest.mark.parametrize(
    "encoder_kind",
    [
        "mlp",
        pytest.param("lstm", marks=pytest.mark.support(row="PRE", column="learning")),
    ],
)
def test_a_residual_encoder_learns_what_a_plain_prompt_learns(encoder_kind: str) -> None:
    """No sooner: at this task and these rates it is neither faster nor better."""
    config = ResidualConfig(D, 6, encoder=encoder_kind, bottleneck=8)
    teacher = filled(new_prompt(config, 0), 0).eval()
    before = judged(new_prompt(config, 100), teacher)
    ours = learn(new_prompt(config, 100), teacher, 80)
    theirs = learn(plain(6), teacher, 80)
    assert ours < 0.05 * before
    assert ours < 5 * theirs, (ours, theirs)


@pytest.mark.support(row="MP2", column="learning")
def test_gates_alone_learn_a_new_task_from_few_rows() -> None:
    """Four tasks are mixtures of two skills; a fifth has eight rows, and K numbers to train."""
    config = MixtureConfig(D, 4, num_modules=2)
    skills: Any = filled(new_prompt(config, 0), 0).eval()
    logits = torch.tensor([[4.0, -4.0], [-4.0, 4.0], [0.0, 0.0], [1.0, -1.0]])
    teachers = _with_gates(skills, logits)
    student: Any = new_prompt(config, 100, num_tasks=4).train()
    optimizer = torch.optim.Adam(student.parameter_groups(0.05, 0.05, 0.05))
    draw = seeded(1)
    for _ in range(150):
        ids, tasks = texts(16, draw), torch.arange(4).repeat(4)
        with torch.no_grad():
            wanted = outputs(teachers, ids, tasks)
        optimizer.zero_grad()
        F.mse_loss(outputs(student, ids, tasks), wanted).backward()
        optimizer.step()

    new = _with_gates(skills, torch.tensor([-0.3, 0.9]))
    adapted: Any = new_prompt(config, 102).eval()  # few rows: without noise
    with torch.no_grad():
        adapted.module_prompts.copy_(student.module_prompts)
    before = adapted.module_prompts.detach().clone()
    few = texts(8, seeded(3))
    scratch = plain(4)
    for prompt, trained in ((adapted, [adapted.gate_logits]), (scratch, [*scratch.parameters()])):
        optimizer = torch.optim.Adam(trained, 0.1)
        for _ in range(30):
            with torch.no_grad():
                wanted = outputs(new, few)
            optimizer.zero_grad()
            F.mse_loss(outputs(prompt, few), wanted).backward()
            optimizer.step()
    ours, theirs = judged(adapted, new), judged(scratch, new)
    assert torch.equal(adapted.module_prompts, before)
    assert ours < 0.7 * theirs, (ours, theirs)


def _with_gates(skills: MixturePrompt, logits: Tensor) -> MixturePrompt:
    """The same modules under other gates, ``[(T,) K]``."""
    num_tasks = None if logits.dim() == 1 else len(logits)
    prompt: Any = new_prompt(skills.config, 0, num_tasks=num_tasks).eval()
    with torch.no_grad():
        prompt.module_prompts.copy_(skills.module_prompts)
        prompt.gate_logits.copy_(logits)
    return prompt  # type: ignore[no-any-return]


def learnt(config: PromptConfig, ids: Tensor, labels: Tensor) -> float:
    """What share of the second half of the texts a prompt gets right, trained on the first.

    The frozen readout cannot see the texts. A prompt that is the same before every text moves all
    logits alike, so it is right for one half of them.
    """
    torch.manual_seed(0)
    layer = nn.Embedding(WORDS, D).requires_grad_(False)
    readout = torch.zeros(D)
    readout[0] = 1.0
    layer.weight[:, 0] = 0.0
    prompt = prompt_class(config)(config, layer, generator=seeded(0))
    optimizer = torch.optim.Adam(prompt.parameter_groups(0.05, 0.05, 0.05))
    (seen, wanted), (unseen, truth) = zip(ids.chunk(2), labels.chunk(2), strict=True)
    for _ in range(200):
        logits = prompt(seen).inputs_embeds.mean(1) @ readout
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(logits, wanted.float()).backward()
        optimizer.step()
    logits = prompt.eval()(unseen).inputs_embeds.mean(1) @ readout
    return float(((logits > 0) == (truth == 1)).float().mean())


@pytest.mark.parametrize(
    "config",
    [
        MixtureConfig(D, 4, num_modules=2, gates="attention", query_dim=8),
        pytest.param(
            InfoPromptConfig(D, 4, bottleneck=8),
            marks=pytest.mark.support(row="InfoPrompt", column="learning"),
        ),
        pytest.param(
            StableConfig(D, 4, head_dim=8),
            marks=pytest.mark.support(row="StablePT", column="learning"),
        ),
    ],
    ids=["attempt", "infoprompt", "stable"],
)
def test_texts_of_one_task_get_different_prompts(config: PromptConfig) -> None:
    """The label is which of two words a text has."""
    ids = texts(128, seeded(1)).clamp_min(2)
    labels = torch.arange(128) % 2
    ids[:, 3] = labels
    assert learnt(EPTConfig(D, 4, rank=0, num_spaces=0), ids, labels) == 0.5
    assert learnt(config, ids, labels) > 0.95


@pytest.mark.support(row="IPT", column="learning")
@pytest.mark.parametrize(
    "choices",
    [{}, {"table_rank": 0}, {"generator": "cnn"}, {"generator": "mlp", "bottleneck": 8}],
    ids=["factored", "dense", "cnn", "mlp"],
)
def test_a_table_learns_what_each_word_stands_for(choices: dict[str, Any]) -> None:
    """The label is what a text's second word stands for, one of ten that nothing else tells of."""
    ids = texts(400, seeded(1)).clamp_min(10)
    labels = torch.arange(400) % 2
    ids[:, 1] = torch.randint(5, (400,), generator=seeded(2)) * 2 + labels
    assert learnt(EPTConfig(D, 4, rank=0, num_spaces=0), ids, labels) == 0.5
    config = InstanceConfig(D, 2, **{"table_size": WORDS, "table_rank": 8, **choices})
    assert learnt(config, ids, labels) > 0.95
