"""RLPrompt (arXiv 2205.12548): discrete prompts from a policy trained by soft Q-learning.

The policy is a small MLP inside a frozen language model: of the state h of the tokens so far,
the logits of the next are LMhead(MLP(h)). They are read as Q-values: V = logsumexp Q, and the
advantage A = Q(a) - V is the log-probability of the action. V' is V of a target network that
follows the policy slowly.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ept_fast.config import check_count, check_number

__all__ = [
    "PromptPolicy",
    "Score",
    "SearchResult",
    "gap_reward",
    "multi_step_loss",
    "one_step_loss",
    "random_search",
    "rl_search",
    "soft_q_loss",
    "standardised",
]

Score = Callable[[Tensor], Tensor]  # token ids [N, m] -> what is maximised, [N]


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        prompt: token ids ``[m]`` of the best score among all that were evaluated.
        score: that score.
        evaluations: how many prompts were evaluated.
        history: the best score so far after each batch of evaluations.
        greedy: the trained policy's own prompt ``[m]``, the paper's result; None of a search
            without a policy.
    """

    prompt: Tensor
    score: float
    evaluations: int
    history: tuple[float, ...]
    greedy: Tensor | None = None


class _Evaluations:
    """Calls of the score within the budget, and the best of them."""

    def __init__(self, score: Score, most: int) -> None:
        check_count("evaluations", most, 1)
        self._score = score
        self._most = most
        self._best: tuple[Tensor, float] | None = None
        self.done = 0
        self._history: list[float] = []

    @property
    def left(self) -> int:
        return self._most - self.done

    def __call__(self, prompts: Tensor) -> Tensor:
        scores = self._score(prompts)
        if scores.shape != prompts.shape[:1] or not bool(scores.isfinite().all()):
            got = f"{list(scores.shape)}, {int((~scores.isfinite()).sum())} not finite"
            raise ValueError(f"score: expected {len(prompts)} finite numbers, got {got}")
        self.done += len(prompts)
        at = int(scores.argmax())
        if self._best is None or float(scores[at]) > self._best[1]:
            self._best = prompts[at].clone(), float(scores[at])
        self._history.append(self._best[1])
        return scores

    def result(self, greedy: Tensor | None = None) -> SearchResult:
        assert self._best is not None
        return SearchResult(*self._best, self.done, tuple(self._history), greedy)


def random_search(
    score: Score,
    vocabulary: Tensor,
    *,
    length: int,
    evaluations: int,
    batch: int = 16,
    generator: torch.Generator | None = None,
) -> SearchResult:
    """Evaluate prompts drawn evenly from the vocabulary and keep the best.

    Args:
        score: what is maximised: token ids ``[N, m]`` to finite numbers ``[N]``.
        vocabulary: the token ids to draw from, ``[V]``.
        length: m.
        evaluations: how many prompts are evaluated.
        batch: N of a call.
        generator: on the vocabulary's device.

    Raises:
        TypeError, ValueError: arguments that do not fit; scores that are not N finite numbers.
    """
    check_count("length", length, 1)
    check_count("batch", batch, 1)
    _check_vocabulary(vocabulary)
    evaluate = _Evaluations(score, evaluations)
    while evaluate.left:
        shape = (min(batch, evaluate.left), length)
        drawn = torch.randint(len(vocabulary), shape, generator=generator, device=vocabulary.device)
        evaluate(vocabulary[drawn])
    return evaluate.result()


# The reward


def gap_reward(
    logits: Tensor, labels: Tensor, correct: float = 200.0, incorrect: float = 180.0
) -> Tensor:
    """How far the label's probability is above every other's, unlike for right and wrong texts.

    The mean over the texts of ``gap * (correct if gap > 0 else incorrect)``, where the gap is the
    label's probability minus the largest of the others. arXiv 2205.12548, with the factors of its
    code.

    Args:
        logits: ``[..., B, C]``, as of a :class:`ept_fast.search.CandidateScorer`.
        labels: ``[B]`` integers.
        correct, incorrect: the factors.

    Returns:
        ``[...]``.

    Raises:
        ValueError: fewer than two classes.
    """
    if logits.shape[-1] < 2:
        raise ValueError(f"logits: expected at least 2 classes, got shape {list(logits.shape)}")
    p = logits.softmax(-1)
    index = labels.unsqueeze(-1).expand(*p.shape[:-1], 1)
    gap = p.gather(-1, index).squeeze(-1) - p.scatter(-1, index, -1.0).amax(-1)
    return (gap * torch.where(gap > 0, correct, incorrect)).mean(-1)


def standardised(rewards: Tensor, scale: float = 5.0) -> Tensor:
    """Rewards ``[N]`` of one step in standard deviations from their mean, times ``scale``.

    ``scale * (r - mean) / (std + 1e-4)`` with the standard deviation of the N numbers (divided by
    N), as in the code of arXiv 2205.12548.
    """
    return scale * (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-4)


# The losses


def one_step_loss(
    logits: Tensor, target_logits: Tensor, actions: Tensor, rewards: Tensor
) -> Tensor:
    """Consistency of each step with the next one's value; arXiv 2205.12548.

    The sum over t < L of ``(A_t - (V'_{t+1} - V'_t))²``, and ``(A_L - (r - V'_L))²`` for the last,
    averaged over the prompts.

    Args:
        logits: the policy's, ``[N, L, V]``.
        target_logits: the target network's at the same states, ``[N, L, V]``; no gradients.
        actions: the tokens taken, ``[N, L]`` indices below V.
        rewards: ``[N]``.

    Returns:
        A scalar. Zero at Q of ``Q_L = r`` and ``Q_t(a) = V_{t+1}`` after a, with both networks
        there.

    Raises:
        ValueError: shapes that do not fit.
    """
    advantages, values = _soft_q(logits, target_logits, actions, rewards)
    after = torch.cat([values[:, 1:], rewards.unsqueeze(1)], 1)
    return (advantages - (after - values)).square().sum(1).mean()


def multi_step_loss(
    logits: Tensor, target_logits: Tensor, actions: Tensor, rewards: Tensor
) -> Tensor:
    """Consistency of each step with the reward, over all steps that follow; arXiv 2205.12548.

    The sum over t of ``(sum_{l >= t} A_l - (r - V'_t))²``, averaged over the prompts. Arguments,
    result and errors are those of :func:`one_step_loss`.
    """
    advantages, values = _soft_q(logits, target_logits, actions, rewards)
    rest = advantages.flip(1).cumsum(1).flip(1)
    return (rest - (rewards.unsqueeze(1) - values)).square().sum(1).mean()


def soft_q_loss(logits: Tensor, target_logits: Tensor, actions: Tensor, rewards: Tensor) -> Tensor:
    """Half the sum of :func:`one_step_loss` and :func:`multi_step_loss`; arXiv 2205.12548.

    Both see Q through A alone, so that the level of Q at a state is not trained. Over prompts drawn
    from the policy itself the multi-step loss leads to probabilities proportional to exp(reward) in
    spite of it, and the one-step loss near them.
    """
    given = (logits, target_logits, actions, rewards)
    return (one_step_loss(*given) + multi_step_loss(*given)) / 2


def _soft_q(
    logits: Tensor, target_logits: Tensor, actions: Tensor, rewards: Tensor
) -> tuple[Tensor, Tensor]:
    """A of the actions and V', both ``[N, L]``."""
    if logits.dim() != 3:
        raise ValueError(f"logits: expected shape [N, L, V], got {list(logits.shape)}")
    shape = list(logits.shape)
    for name, tensor, expected in (
        ("target_logits", target_logits, shape),
        ("actions", actions, shape[:2]),
        ("rewards", rewards, shape[:1]),
    ):
        if list(tensor.shape) != expected:
            got = list(tensor.shape)
            raise ValueError(
                f"{name}: expected shape {expected} to match logits {shape}, got {got}"
            )
    advantages = logits.log_softmax(-1).gather(2, actions.unsqueeze(2)).squeeze(2)
    return advantages, target_logits.detach().logsumexp(-1)


# The policy


class PromptPolicy(nn.Module):
    """An MLP between a frozen language model's last state and its head.

    Args:
        states: the state after tokens ``[N, t]``, t >= 0: ``[N, d]``; frozen.
        head: the language model's output embeddings of the vocabulary, ``[V, d]``; frozen.
        vocabulary: the token ids that a prompt may have, ``[V]``.
        hidden_size: width of the MLP.
        generator: of its first values.

    Attributes:
        mlp: what is trained: d -> hidden -> d with ReLU, of weights so small at the start (Xavier
            with gain 1e-4, biases -1e-4) that all tokens are about equally likely.

    Raises:
        TypeError, ValueError: tensors that do not fit together.
    """

    head: Tensor
    vocabulary: Tensor

    def __init__(
        self,
        states: Callable[[Tensor], Tensor],
        head: Tensor,
        vocabulary: Tensor,
        *,
        hidden_size: int = 2048,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_count("hidden_size", hidden_size, 1)
        _check_vocabulary(vocabulary)
        if head.dim() != 2 or len(head) != len(vocabulary):
            raise ValueError(
                f"head: expected shape [{len(vocabulary)}, d] to match vocabulary, "
                f"got {list(head.shape)}"
            )
        self._states = states
        self.register_buffer("head", head.detach())
        self.register_buffer("vocabulary", vocabulary)
        width = head.shape[1]
        kind: dict[str, Any] = {"dtype": head.dtype, "device": head.device}
        inner, outer = nn.Linear(width, hidden_size, **kind), nn.Linear(hidden_size, width, **kind)
        self.mlp = nn.Sequential(inner, nn.ReLU(), outer)
        for layer in (inner, outer):
            nn.init.xavier_uniform_(layer.weight, gain=1e-4, generator=generator)
            nn.init.constant_(layer.bias, -1e-4)

    @classmethod
    def of_model(
        cls,
        model: Any,
        vocabulary: Tensor,
        start: Sequence[int],
        *,
        scale: float = 1.0,
        hidden_size: int = 2048,
        generator: torch.Generator | None = None,
    ) -> PromptPolicy:
        """A policy in a model of ``transformers``, in float32.

        Its states are the last hidden states of the last token, its head the output embeddings, or
        the input embeddings of a model without any.

        Args:
            model: frozen, in evaluation mode.
            vocabulary, hidden_size, generator: as of the class.
            start: token ids before the prompt, one at least.
            scale: factor of the states. The paper's first values suit states of GPT-2's size, of a
                norm in the hundreds; a ReLU that starts below zero at every state stays there.

        Raises:
            TypeError, ValueError: as of the class; nothing to start from.
        """
        if not start:
            raise ValueError("start: expected at least one token id, got none")
        _check_vocabulary(vocabulary)
        first = torch.tensor([list(start)], device=vocabulary.device)
        encoder = getattr(model, "base_model", model)

        def states(tokens: Tensor) -> Tensor:
            ids = torch.cat([first.expand(len(tokens), -1), tokens], 1)
            return encoder(input_ids=ids).last_hidden_state[:, -1].float() * scale  # type: ignore[no-any-return]

        table = model.get_output_embeddings() or model.get_input_embeddings()
        head = table.weight.detach()[vocabulary].float()
        return cls(states, head, vocabulary, hidden_size=hidden_size, generator=generator)

    def forward(self, states: Tensor) -> Tensor:
        """Logits ``[..., V]`` of the next token, of states ``[..., d]``."""
        return self.mlp(states) @ self.head.T  # type: ignore[no-any-return]

    @torch.no_grad()
    def draw(
        self,
        count: int,
        length: int,
        *,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sample prompts token by token from the ``top_k`` likeliest; 1 is the greedy prompt.

        Args:
            count, length: N and L.
            top_k: all tokens if None or more than V.
            generator: on the head's device.

        Returns:
            Indices into the vocabulary ``[N, L]``, and the states before each, ``[N, L, d]``.
        """
        actions = torch.empty(count, 0, dtype=torch.int64, device=self.head.device)
        states = []
        for _ in range(length):
            states.append(self._states(self.vocabulary[actions]))
            k = min(top_k or len(self.vocabulary), len(self.vocabulary))
            likely = self(states[-1]).topk(k)
            at = torch.multinomial(likely.values.softmax(-1), 1, generator=generator)
            actions = torch.cat([actions, likely.indices.gather(1, at)], 1)
        return actions, torch.stack(states, 1)


def rl_search(
    score: Score,
    policy: PromptPolicy,
    *,
    length: int,
    evaluations: int,
    samples: int = 16,
    top_k: int = 256,
    learning_rate: float = 5e-5,
    clip: float = 5.0,
    polyak: float = 1e-3,
    shape: Callable[[Tensor], Tensor] = standardised,
    generator: torch.Generator | None = None,
) -> SearchResult:
    """Train the policy by :func:`soft_q_loss` until the evaluations are spent; arXiv 2205.12548.

    A step samples prompts, evaluates them, and takes one step of Adam. The defaults are those of
    the paper's code, which takes 12,000 steps.

    Args:
        score: what is maximised, such as :func:`gap_reward` of a scorer's logits: token ids
            ``[N, L]`` to finite numbers ``[N]``.
        policy: trained in place.
        length: L, tokens of a prompt.
        evaluations: how many prompts are evaluated.
        samples: N, prompts of a step.
        top_k: of sampling.
        learning_rate, clip: of Adam, and the largest norm of the gradients.
        polyak: how much of the policy the target network takes on after each step.
        shape: what the losses get of a step's scores ``[N]``.
        generator: on the policy's device.

    Returns:
        The best prompt seen, and the greedy prompt of the trained policy.

    Raises:
        TypeError, ValueError: numbers that do not fit; scores that are not N finite numbers.
    """
    for name, count in (("length", length), ("samples", samples), ("top_k", top_k)):
        check_count(name, count, 1)
    check_number("learning_rate", learning_rate, positive=True)
    check_number("clip", clip, positive=True)
    check_number("polyak", polyak)
    if not 0 < polyak <= 1:
        raise ValueError(f"polyak: expected 0 < polyak <= 1, got {polyak}")
    evaluate = _Evaluations(score, evaluations)
    target = copy.deepcopy(policy.mlp)
    optimizer = torch.optim.Adam(policy.mlp.parameters(), lr=learning_rate)
    while evaluate.left:
        count = min(samples, evaluate.left)
        actions, states = policy.draw(count, length, top_k=top_k, generator=generator)
        rewards = shape(evaluate(policy.vocabulary[actions])).to(policy.head.dtype)
        with torch.no_grad():
            target_logits = target(states) @ policy.head.T
        loss = soft_q_loss(policy(states), target_logits, actions, rewards)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(policy.mlp.parameters(), clip)
        optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(target.parameters(), policy.mlp.parameters(), strict=True):
                slow.lerp_(fast, polyak)
    actions, _ = policy.draw(1, length, top_k=1)
    return evaluate.result(policy.vocabulary[actions[0]])


def _check_vocabulary(vocabulary: Tensor) -> None:
    if vocabulary.is_floating_point() or vocabulary.dim() != 1 or len(vocabulary) == 0:
        got = f"{vocabulary.dtype} of shape {list(vocabulary.shape)}"
        raise ValueError(f"vocabulary: expected integer token ids [V], V >= 1, got {got}")
