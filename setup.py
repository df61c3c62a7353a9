"""Builds ept_fast as a pure Python package.

Everything but this line is in pyproject.toml. Building takes neither torch nor CUDA, so that a wheel
can be made on a machine that has none of them.
"""

from setuptools import setup

setup()
