"""Discrete prompts: candidates scored many at a time, and what searches among them."""
