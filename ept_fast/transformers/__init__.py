"""Prompts inside other libraries' models; nothing here is imported by ``import ept_fast``."""

POOLINGS = ("mean", "first", "last", "model")
TASKS = ("SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")

__all__ = ["POOLINGS", "TASKS"]
