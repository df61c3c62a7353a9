"""Prompts as modules: what is put before the text, trained, folded, saved and loaded."""
