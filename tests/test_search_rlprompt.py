"""RLPrompt: losses against scalar loops, a game whose solution is known, search by budget."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ept_fast.search import (
    PromptPolicy,
    SearchResult,
    gap_reward,
    multi_step_loss,
    one_step_loss,
    random_search,
    rl_search,
    soft_q_loss,
    standardised,
)

N, L, V = 4, 3, 6
FREE, LENGTH = 5, 2  # the game's vocabulary and length: 25 prompts
TOKENS = torch.tensor([30, 10, 50, 20, 40])  # its token ids
EVERY = torch.cartesian_prod(torch.arange(FREE), torch.arange(FREE))  # [25, 2] indices


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = draw(0)
    logits, target = (torch.randn(N, L, V, generator=g, dtype=torch.float64) for _ in range(2))
    rewards = torch.randn(N, generator=g, dtype=torch.float64)
    return logits, target, torch.randint(V, (N, L), generator=g), rewards


def by_loop(logits: Tensor, target: Tensor, actions: Tensor, rewards: Tensor, kind: str) -> float:
    """The definition, number by number."""
    total = 0.0
    for i in range(N):
        value = [math.log(sum(math.exp(x) for x in step)) for step in target[i].tolist()]
        own = [math.log(sum(math.exp(x) for x in step)) for step in logits[i].tolist()]
        a = [float(logits[i, t, actions[i, t]]) - own[t] for t in range(L)]
        r = float(rewards[i])
        for t in range(L):
            if kind == "multi":
                total += (sum(a[t:]) - (r - value[t])) ** 2
            elif t < L - 1:
                total += (a[t] - (value[t + 1] - value[t])) ** 2
            else:
                total += (a[t] - (r - value[t])) ** 2
    return total / N


@pytest.mark.support(row="RLPrompt", column="definition")
def test_losses_are_those_of_scalar_loops() -> None:
    one, multi = by_loop(*batch(), "one"), by_loop(*batch(), "multi")
    assert float(one_step_loss(*batch())) == pytest.approx(one, rel=1e-12)
    assert float(multi_step_loss(*batch())) == pytest.approx(multi, rel=1e-12)
    assert float(soft_q_loss(*batch())) == pytest.approx((one + multi) / 2, rel=1e-12)


@pytest.mark.support(row="RLPrompt", column="gradients")
@pytest.mark.parametrize("loss", [one_step_loss, multi_step_loss, soft_q_loss])
def test_losses_have_the_gradients_of_their_values(loss: Callable[..., Tensor]) -> None:
    logits, target, *rest = batch()
    target.requires_grad_()
    assert torch.autograd.gradcheck(lambda q: loss(q, target, *rest), (logits.requires_grad_(),))
    loss(logits, target, *rest).backward()
    assert target.grad is None


def rewards_of_the_game() -> Tensor:
    """Of every pair, [5, 5]; the best begins with a token that is not the best on average."""
    rewards = torch.randn(FREE, FREE, generator=draw(8), dtype=torch.float64)
    rewards[3] -= 1.0
    rewards[3, 1] = 3.0
    return rewards


def solution() -> tuple[Tensor, Tensor]:
    """Q* of the first step [5] and, after each token, of the second [5, 5]: backward recursion."""
    second = rewards_of_the_game()
    return second.logsumexp(1), second


def logits_of(first: Tensor, second: Tensor, actions: Tensor) -> Tensor:
    return torch.stack([first.expand(len(actions), -1), second[actions[:, 0]]], 1)


@pytest.mark.parametrize("loss", [one_step_loss, multi_step_loss])
def test_losses_are_zero_at_the_solution_and_only_there(loss: Callable[..., Tensor]) -> None:
    q = logits_of(*solution(), EVERY)
    rewards = rewards_of_the_game().flatten()
    assert float(loss(q, q, EVERY, rewards)) < 1e-25
    for step in range(LENGTH):
        other = q.clone()
        other[:, step, 2] += 0.1
        assert float(loss(other, other, EVERY, rewards)) > 1e-4


# Large, as a language model's: a unit of the MLP's first values is dead to small ones.
STATES = 10 * torch.eye(FREE + 1, dtype=torch.float64)


def one_hot(tokens: Tensor) -> Tensor:
    """A state for each beginning: 0 before the first token, 1 to 5 after one."""
    if tokens.shape[1] == 0:
        at = torch.zeros(len(tokens), dtype=torch.int64)
    else:
        at = 1 + (tokens[:, :1] == TOKENS).int().argmax(1)
    return STATES[at]


def game_policy(seed: int = 0) -> PromptPolicy:
    head = torch.eye(FREE, FREE + 1, dtype=torch.float64)
    return PromptPolicy(one_hot, head, TOKENS, hidden_size=64, generator=draw(seed))


def game_score(prompts: Tensor) -> Tensor:
    index = (prompts.unsqueeze(2) == TOKENS).int().argmax(2)
    return rewards_of_the_game()[index[:, 0], index[:, 1]]


def search_game(**changes: Any) -> tuple[PromptPolicy, SearchResult]:
    policy = game_policy()
    choices: dict[str, Any] = {
        "length": LENGTH, "evaluations": 20_000, "samples": 32, "learning_rate": 3e-3,
        "polyak": 0.1, "shape": lambda rewards: rewards, "generator": draw(1), **changes,
    }  # fmt: skip
    return policy, rl_search(game_score, policy, **choices)


def logits_and_probabilities(policy: PromptPolicy) -> tuple[Tensor, Tensor]:
    """At the states of all 25 prompts, and of these prompts."""
    states = torch.stack([one_hot(TOKENS[EVERY][:, :t]) for t in range(LENGTH)], 1)
    logits = policy(states)
    return logits, logits.log_softmax(-1).gather(2, EVERY.unsqueeze(2)).sum((1, 2)).exp()


@pytest.mark.parametrize(("loss", "error"), [(multi_step_loss, 0.002), (soft_q_loss, 0.02)])
def test_training_converges_to_the_solution(loss: Callable[..., Tensor], error: float) -> None:
    """A prompt's probability becomes proportional to exp(reward): its tokens' to exp(Q*).

    Expected over prompts drawn from the policy, as in training, but without the noise of drawing.
    The one-step loss compares values of states whose level is not trained, hence its error.
    """
    policy, rewards = game_policy(), rewards_of_the_game().flatten()
    target = copy.deepcopy(policy)
    optimizer = torch.optim.Adam(policy.parameters(), lr=5e-3)
    each = torch.func.vmap(lambda *given: loss(*(t.unsqueeze(0) for t in given)))
    for _ in range(500):
        with torch.no_grad():
            slow, _ = logits_and_probabilities(target)
        logits, p = logits_and_probabilities(policy)
        optimizer.zero_grad()
        (p.detach() * each(logits, slow, EVERY, rewards)).sum().backward()
        optimizer.step()
        with torch.no_grad():
            for mine, theirs in zip(target.parameters(), policy.parameters(), strict=True):
                mine.lerp_(theirs, 0.1)
    with torch.no_grad():
        logits, p = logits_and_probabilities(policy)
    torch.testing.assert_close(p, rewards.softmax(0), rtol=0, atol=error)
    assert int(p.argmax()) == int(rewards.argmax())


def test_the_level_of_q_is_not_trained() -> None:
    """Both losses see Q through A alone, which a constant added to all of Q leaves as it is."""
    logits, *rest = batch()
    soft_q_loss(logits.requires_grad_(), *rest).backward()
    assert logits.grad is not None
    assert float(logits.grad.sum(-1).abs().max()) < 1e-12
    assert float(logits.grad.abs().max()) > 1e-2


@pytest.mark.support(row="RLPrompt", column="learning")
def test_search_finds_the_best_prompt() -> None:
    """From its own samples; the greedy prompt is the best, and likely ones are about right."""
    policy, result = search_game()
    with torch.no_grad():
        _, p = logits_and_probabilities(policy)
    torch.testing.assert_close(p, rewards_of_the_game().flatten().softmax(0), rtol=0, atol=0.05)
    best = torch.tensor([20, 10])  # token ids of the pair (3, 1)
    assert result.greedy is not None
    assert result.greedy.equal(best)
    assert result.prompt.equal(best)
    assert result.score == 3.0


def test_the_same_seed_searches_the_same() -> None:
    choices: dict[str, Any] = {"evaluations": 4, "samples": 2}
    first, again, other = (search_game(**choices, generator=draw(seed))[1] for seed in (1, 1, 2))
    assert first.history == again.history
    assert first.history != other.history


@pytest.mark.parametrize("evaluations", [1, 16, 21])
def test_searches_keep_to_their_budget(evaluations: int) -> None:
    seen: list[Tensor] = []

    def score(prompts: Tensor) -> Tensor:
        seen.append(prompts)
        return game_score(prompts)

    for search in ("rl", "random"):
        seen.clear()
        if search == "rl":
            result = rl_search(score, game_policy(), length=2, evaluations=evaluations)
        else:
            result = random_search(
                score, TOKENS, length=2, evaluations=evaluations, generator=draw(3)
            )
        every = torch.cat(seen)
        assert len(every) == result.evaluations == evaluations
        assert result.score == float(game_score(every).max())
        assert game_score(result.prompt.unsqueeze(0)) == result.score
        assert result.history == tuple(
            float(game_score(torch.cat(seen[: i + 1])).max()) for i in range(len(seen))
        )


def test_top_k_keeps_the_likeliest() -> None:
    policy = game_policy()
    with torch.no_grad():
        policy.mlp[2].bias.copy_(torch.tensor([0.0, 4.0, 1.0, 3.0, 2.0, 0.0]))
    actions, states = policy.draw(300, 2, top_k=2, generator=draw(4))
    assert set(actions.flatten().tolist()) == {1, 3}
    share = (actions == 1).double().mean()
    assert abs(float(share) - 1 / (1 + math.exp(-1))) < 0.06
    assert torch.equal(states[:, 1], one_hot(TOKENS[actions[:, :1]]))


def test_the_first_policy_is_about_uniform() -> None:
    policy = game_policy()
    with torch.no_grad():
        p = policy(STATES).softmax(-1)
    torch.testing.assert_close(p, torch.full_like(p, 1 / FREE), rtol=0, atol=1e-4)
    for layer in (policy.mlp[0], policy.mlp[2]):
        assert bool((layer.bias.detach() == -1e-4).all())
        assert 0 < float(layer.weight.detach().abs().max()) < 1e-3


def test_gap_reward_is_that_of_a_loop() -> None:
    logits = torch.randn(3, 5, 4, generator=draw(5), dtype=torch.float64)
    labels = torch.tensor([0, 3, 1, 1, 2])
    for i in range(3):
        total = 0.0
        for b, label in enumerate(labels.tolist()):
            p = logits[i, b].softmax(0).tolist()
            gap = p[label] - max(x for c, x in enumerate(p) if c != label)
            total += gap * (200 if gap > 0 else 180)
        assert float(gap_reward(logits, labels)[i]) == pytest.approx(total / 5, rel=1e-12)


def test_rewards_are_standardised_among_the_prompts() -> None:
    rewards = torch.tensor([1.0, 3.0, 5.0, 7.0], dtype=torch.float64)
    std = math.sqrt(5.0)
    expected = [5 * (x - 4) / (std + 1e-4) for x in rewards.tolist()]
    assert standardised(rewards).tolist() == pytest.approx(expected, rel=1e-12)
    assert standardised(torch.ones(1)).tolist() == [0.0]


def test_a_policy_inside_a_language_model() -> None:
    from tests.architectures import BY_NAME

    model = BY_NAME["GPT-2"].build("CAUSAL_LM").eval()
    vocabulary = torch.tensor([7, 3, 19, 40])
    policy = PromptPolicy.of_model(model, vocabulary, [1, 2], hidden_size=8, generator=draw(6))
    assert [name for name, _ in policy.named_parameters()] == [
        "mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias",
    ]  # fmt: skip
    actions, states = policy.draw(3, 2, generator=draw(7))
    for i in range(3):
        ids = torch.tensor([[1, 2, int(vocabulary[actions[i, 0]])]])
        with torch.no_grad():
            hidden = model.transformer(ids).last_hidden_state
        torch.testing.assert_close(states[i], hidden[0, 1:])
    torch.testing.assert_close(
        policy(states), policy.mlp(states) @ model.lm_head.weight[vocabulary].T
    )


BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: soft_q_loss(batch()[0][0], *batch()[1:]), ValueError,
     "logits: expected shape [N, L, V], got [3, 6]"),
    (lambda: soft_q_loss(*batch()[:3], torch.ones(5)), ValueError,
     "rewards: expected shape [4] to match logits [4, 3, 6], got [5]"),
    (lambda: gap_reward(torch.ones(2, 3, 1), torch.zeros(3).long()), ValueError,
     "logits: expected at least 2 classes, got shape [2, 3, 1]"),
    (lambda: random_search(game_score, TOKENS.float(), length=2, evaluations=1), ValueError,
     "vocabulary: expected integer token ids [V], V >= 1, got torch.float32 of shape [5]"),
    (lambda: random_search(lambda p: torch.ones(1), TOKENS, length=2, evaluations=2), ValueError,
     "score: expected 2 finite numbers, got [1], 0 not finite"),
    (lambda: random_search(lambda p: p[:, 0] / 0.0, TOKENS, length=2, evaluations=2), ValueError,
     "score: expected 2 finite numbers, got [2], 2 not finite"),
    (lambda: search_game(evaluations=0), ValueError,
     "evaluations: expected an integer >= 1, got 0"),
    (lambda: search_game(polyak=0.0), ValueError, "polyak: expected 0 < polyak <= 1, got 0.0"),
    (lambda: PromptPolicy(one_hot, torch.ones(4, 6), TOKENS), ValueError,
     "head: expected shape [5, d] to match vocabulary, got [4, 6]"),
    (lambda: PromptPolicy.of_model(None, TOKENS, []), ValueError,
     "start: expected at least one token id, got none"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_mistakes(
    call: Callable[[], object], error: type[Exception], message: str, root: Path
) -> None:
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == message
    page = (root / "docs" / "errors.md").read_text(encoding="utf-8")
    assert f"| {error.__name__} | `{message}` |" in page
