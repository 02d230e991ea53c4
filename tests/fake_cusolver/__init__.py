"""cuSOLVER without a GPU: builds a library with its symbols and records what is called."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from resm_kernels.linalg import cusolver

ROOT = Path(__file__).parent.parent.parent
LATEST, OLDEST = 12400, 11400


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))


def build(folder: Path, version: int = LATEST) -> Path:
    """Compile the fake; CXXFLAGS as in the environment, so that it can be sanitised."""
    found = compiler()
    assert found is not None
    target = folder / f"libfake_cusolver_{version}.so"
    command = [
        found, "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC",
        f"-DFAKE_VERSION={version}", f"-I{ROOT / 'csrc'}",
        f"-Wl,-soname,{target.name}", *os.environ.get("CXXFLAGS", "").split(),
        "-o", str(target), str(Path(__file__).with_name("fake_cusolver.cpp")),
    ]  # fmt: skip
    # A sanitiser is preloaded for Python, not for the compiler.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def extension() -> ModuleType:
    """The built extension, or that of RESM_TEST_EXTENSION, which `make sanitize` names."""
    name = "resm_kernels._cusolver"
    path = os.environ.get("RESM_TEST_EXTENSION")
    if path is not None and name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return importlib.import_module(name)


class Fake:
    """A loaded fake: what it was told, what it was asked.

    `library` is what the extension opened; tensors on the CPU pose as the device's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library = extension().Library([str(path)], [str(path)])
        self._handle = ctypes.CDLL(str(path))
        self._handle.fake_calls.restype = ctypes.c_char_p
        self._handle.fake_size.argtypes = [ctypes.c_char_p, ctypes.c_longlong]

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let the Python face find this fake in place of cuSOLVER, and CPU tensors acceptable."""
        found = cusolver._Found(self.library, None, "cpu")
        monkeypatch.setattr(cusolver, "_found", lambda: found)
        self._handle.fake_reset()

    def calls(self, name: str = "") -> list[list[str]]:
        """Every recorded call whose function contains `name`, with its numbers."""
        lines = self._handle.fake_calls().decode().splitlines()
        return [line.split() for line in lines if name in line]

    def count(self, name: str) -> int:
        return len(self.calls(name))

    def report_info(self, entry: int, info: int) -> None:
        """The entry of each following call reports `info`."""
        self._handle.fake_info(entry, info)

    def report_status(self, function: str, status: int) -> None:
        self._handle.fake_status(function.encode(), status)

    def report_size(self, function: str, size: int) -> None:
        """Another workspace than the function needs, count of Xsyevdx, or 1e20 perturbation."""
        self._handle.fake_size(function.encode(), size)

    def gate(self, closed: bool) -> None:
        """While it is closed, Xsyevd waits (20 s at most, then it fails)."""
        self._handle.fake_gate(int(closed))

    @contextlib.contextmanager
    def current(self, device: int) -> Iterator[None]:
        """Another device than 0 is the current one of this thread."""
        self._handle.fake_device(device)
        try:
            yield
        finally:
            self._handle.fake_device(0)

    def live(self) -> int:
        """Handles and parameter objects that exist."""
        return int(self._handle.fake_live())
