"""Builds the optional cuSOLVER extension; without a C++ compiler the wheel is pure Python."""

from pathlib import Path

from setuptools import setup

try:
    from pybind11.setup_helpers import Pybind11Extension
except ImportError:
    extensions = []
else:
    extensions = [
        Pybind11Extension(
            "resm_kernels._cusolver",
            sorted(map(str, Path("csrc").glob("*.cpp"))),
            depends=sorted(map(str, Path("csrc").glob("*.h"))),
            cxx_std=17,
            extra_compile_args=["-Wall", "-Wextra", "-Wno-missing-field-initializers"],
            libraries=["dl"],
            optional=True,
        )
    ]

setup(ext_modules=extensions)
