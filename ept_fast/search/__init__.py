"""Discrete prompts: candidates scored many at a time, and what searches among them.

Nothing of it is imported with ``ept_fast``; it needs transformers.
"""

from ept_fast.search.scoring import CandidateScorer, Head, LabelEmbeddings, LabelWords

__all__ = ["CandidateScorer", "Head", "LabelEmbeddings", "LabelWords"]
