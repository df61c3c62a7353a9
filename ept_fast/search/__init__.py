"""Discrete prompts: candidates scored many at a time, and what searches among them.

Nothing of it is imported with ``ept_fast``; it needs transformers.
"""

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
    "CandidateScorer",
    "Head",
    "LabelEmbeddings",
    "LabelWords",
    "PromptPolicy",
    "SearchResult",
    "gap_reward",
    "multi_step_loss",
    "one_step_loss",
    "random_search",
    "rl_search",
    "soft_q_loss",
    "standardised",
]
