"""Losses beside a task's own, as plain functions of tensors: one file for each kind."""
