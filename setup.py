"""Builds ept_fast; what it is made of stands in pyproject.toml.

A build takes neither torch nor CUDA, so that a wheel can be made where there is none of them. With
EPT_FAST_BUILD_CUDA=1 it takes both (and no build isolation, so that it finds the torch at hand),
and the wheel holds the CUDA library: for one platform, and any Python 3.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


def load_build():
    """ept_fast.backends.cuda.build, without importing the package, which would import torch."""
    path = Path(__file__).resolve().parent / "ept_fast" / "backends" / "cuda" / "build.py"
    spec = importlib.util.spec_from_file_location("ept_fast_extension_build", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class BuildLibrary(build_ext):
    """Has the library compiled and copies it to where setuptools wants it."""

    def get_ext_filename(self, fullname):
        return f"{fullname.replace('.', '/')}.so"  # no interpreter's tag: it knows none

    def build_extension(self, ext):
        build = load_build()
        named = os.environ.get(build.ENVIRONMENT)
        wanted = build.parse_architectures(named) if named else build.WHEEL_ARCHITECTURES
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(build.build(wanted), target)


class AnyPython(bdist_wheel):
    """The library uses nothing of Python's, so the wheel is for any Python 3 of the platform."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


with_cuda = {
    "ext_modules": [Extension("ept_fast.backends.cuda.ept_fast_cuda", sources=[])],
    "cmdclass": {"build_ext": BuildLibrary, "bdist_wheel": AnyPython},
}
setup(**(with_cuda if os.environ.get("EPT_FAST_BUILD_CUDA") == "1" else {}))
