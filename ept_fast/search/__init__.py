"""Discrete prompts: candidates scored many at a time, and what searches among them.

Nothing of it is imported with ``ept_fast``; it needs transformers.
"""

from ept_fast.search.batprompt import (
    PERTURBERS,
    RobustResult,
    adversarial_loss,
    perturb,
    robust_search,
    similarity,
    substitute,
    worst_case,
)
from ept_fast.search.rlprompt import (
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
from ept_fast.search.scoring import CandidateScorer, Head, LabelEmbeddings, LabelWords

__all__ = [
    "PERTURBERS",
    "CandidateScorer",
    "Head",
    "LabelEmbeddings",
    "LabelWords",
    "PromptPolicy",
    "RobustResult",
    "SearchResult",
    "adversarial_loss",
    "gap_reward",
    "multi_step_loss",
    "one_step_loss",
    "perturb",
    "random_search",
    "rl_search",
    "robust_search",
    "similarity",
    "soft_q_loss",
    "standardised",
    "substitute",
    "worst_case",
]
