"""Prompts inside other libraries' models; nothing here is imported by ``import ept_fast``."""

POOLINGS = ("mean", "model")

__all__ = ["POOLINGS"]
