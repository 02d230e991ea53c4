"""The LAPACK routines that torch does not bind, from SciPy's build, without the GIL.

SciPy publishes C entry points for Cython in `scipy.linalg.cython_lapack.__pyx_capi__`. Called
through ctypes they release the GIL, which SciPy's own wrappers hold: several weights can be
factored at once. Its OpenBLAS (what the wheels hold) runs on one thread meanwhile:
tridiagonalisation does not scale, and one thread gives the same bytes whatever else runs. A SciPy
on another BLAS keeps the threads it has.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from resm_kernels.errors import MissingDependencyError
from resm_kernels.held import Held

Vector = npt.NDArray[np.float64]
BLOCK = 64
"""Workspace columns per row; LAPACK's block sizes are at most this."""


@functools.cache
def _thread_counts() -> tuple[tuple[Callable[[], int], Callable[[int], None]], ...]:
    """How to read and set the threads of the OpenBLAS that SciPy loaded; empty for another BLAS."""
    import scipy.linalg
    from threadpoolctl import threadpool_info

    found = [pool["filepath"] for pool in threadpool_info() if pool["internal_api"] == "openblas"]
    own = str(Path(scipy.linalg.__file__).parents[2])
    counts = []
    for path in [f for f in found if f.startswith(own) and "scipy" in Path(f).parent.name] or found:
        library = ctypes.CDLL(path)
        for name in ("scipy_openblas_%s_num_threads", "openblas_%s_num_threads"):
            if hasattr(library, name % "set"):
                counts.append((getattr(library, name % "get"), getattr(library, name % "set")))
                break
    return tuple(counts)


# Not by threadpoolctl itself: it obeys the first Python thread that set a limit and no other.
_one_thread = Held(
    read=lambda: [get() for get, _ in _thread_counts()],
    write=lambda counts: [
        set_to(count) for (_, set_to), count in zip(_thread_counts(), counts, strict=True)
    ],
    value=lambda: [1] * len(_thread_counts()),
)


@functools.cache
def _routine(name: str, arguments: int) -> Callable[..., None]:
    """The routine of SciPy's LAPACK; SciPy is imported when the first matrix needs it."""
    from scipy.linalg import cython_lapack

    capsule = cython_lapack.__pyx_capi__[name]
    prototype = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)
    signature = prototype(("PyCapsule_GetName", ctypes.pythonapi))(capsule)
    if b"int *" not in signature or b"int64" in signature:
        raise MissingDependencyError(
            "SciPy's LAPACK takes 64-bit integers",
            got=signature.decode(),
            expected="a build with 32-bit integers, as every wheel on PyPI is",
            fix="pip install scipy",
        )
    prototype = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    address = prototype(("PyCapsule_GetPointer", ctypes.pythonapi))(capsule, signature)
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * arguments)(address)


def _call(name: str, *arguments: int | bytes | npt.NDArray[Any]) -> None:
    """Call a routine by reference and raise if its last argument, `info`, is not zero."""
    info = ctypes.c_int(0)
    held: list[Any] = []
    pointers: list[int | None] = []
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            pointers.append(argument.ctypes.data)
            continue
        value = ctypes.c_int(argument) if isinstance(argument, int) else ctypes.c_char(argument)
        held.append(value)
        pointers.append(ctypes.addressof(value))
    with _one_thread:
        _routine(name, len(pointers) + 1)(*pointers, ctypes.addressof(info))
    if info.value:
        raise np.linalg.LinAlgError(f"LAPACK {name} failed with info = {info.value}")


class Tridiagonal:
    """A symmetric matrix reduced to G = Q T Q^T with T tridiagonal.

    Parameters
    ----------
    gram : ndarray, n x n, float64, C-contiguous
        Its diagonal and upper triangle are overwritten: they keep the reflectors that make up Q.

    Attributes
    ----------
    diagonal, off_diagonal : ndarray, n and n - 1
        T.
    """

    def __init__(self, gram: npt.NDArray[np.float64]) -> None:
        n = gram.shape[0]
        self._reflectors, self._scales = gram, np.empty(max(n - 1, 1))
        self.diagonal, self.off_diagonal = np.empty(n), np.empty(max(n - 1, 0))
        off = self.off_diagonal if n > 1 else np.empty(1)
        work = np.empty(BLOCK * n)
        _call("dsytrd", b"L", n, gram, n, self.diagonal, off, self._scales, work, work.size)

    def eigenvalues(self) -> Vector:
        """All eigenvalues, ascending (sterf: implicit QL, absolute error about eps * ||T||)."""
        values, off = self.diagonal.copy(), np.append(self.off_diagonal, 0.0)
        _call("dsterf", values.size, values, off)
        return values

    def back_transform(self, vectors: npt.NDArray[np.float64]) -> None:
        """Replace r vectors, given as the rows of an r x n array, by Q times them."""
        count, n = vectors.shape
        work = np.empty(BLOCK * max(n, count))
        _call(
            "dormtr", b"L", b"L", b"N", n, count, self._reflectors, n, self._scales,
            vectors, n, work, work.size,
        )  # fmt: skip
