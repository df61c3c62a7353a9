"""Prompts as modules: what is put before the text, trained, folded, saved and loaded.

Every file of this folder is imported, so that the method in it is registered.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
