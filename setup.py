"""Builds ept_fast as a pure Python package; what it is made of stands in pyproject.toml.

A build takes neither torch nor CUDA, so that a wheel can be made where there is none of them.
"""

from setuptools import setup

setup()
