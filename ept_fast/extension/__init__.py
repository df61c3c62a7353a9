"""The CUDA library of the ``cuda`` backend: how it is built, found and loaded.

Nothing is imported here: ``setup.py`` runs :mod:`ept_fast.extension.build` from its file, and the
backend imports :mod:`ept_fast.extension.library` when it is asked about a GPU.
"""
