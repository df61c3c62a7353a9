"""Prompts as modules: what is put before the text, trained, folded, saved and loaded."""

from ept_fast.prompts import ept  # noqa: F401  # registers the method
