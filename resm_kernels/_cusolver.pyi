from collections.abc import Callable, Sequence
from typing import Protocol

class CusolverError(RuntimeError): ...

class _Buffer(Protocol):
    def data_ptr(self) -> int: ...

class Array:
    def __init__(
        self, pointer: int, kind: str, shape: Sequence[int], strides: Sequence[int]
    ) -> None: ...

class Outcome:
    @property
    def failed(self) -> list[tuple[int, int]]: ...
    @property
    def nonfinite(self) -> list[int]: ...

class Library:
    def __init__(self, solver: Sequence[str], runtime: Sequence[str]) -> None: ...
    def missing(self) -> dict[str, str]: ...
    def version(self) -> str: ...
    def solver_path(self) -> str: ...
    def runtime_path(self) -> str: ...

class Solver:
    def __init__(
        self, library: Library, device: int, allocate: Callable[[int], _Buffer]
    ) -> None: ...
    @property
    def device_bytes(self) -> int: ...
    @property
    def host_bytes(self) -> int: ...
    def gesvdj_batched(
        self, matrices: Array, left: Array, values: Array, right: Array, status: Array, stream: int
    ) -> Outcome: ...
    def gesvda_batched(
        self,
        matrices: Array,
        rank: int,
        left: Array,
        values: Array,
        right: Array,
        status: Array,
        stream: int,
    ) -> Outcome: ...
    def syev_batched(
        self, matrices: Array, values: Array, status: Array, stream: int
    ) -> Outcome: ...
    def syevd(self, matrix: Array, values: Array, status: Array, stream: int) -> Outcome: ...
    def syevdx(
        self, matrix: Array, count: int, values: Array, status: Array, stream: int
    ) -> Outcome: ...
    def gesvdp(
        self, matrix: Array, left: Array, values: Array, right: Array, status: Array, stream: int
    ) -> tuple[Outcome, float]: ...
    def gesvdr(
        self,
        matrix: Array,
        rank: int,
        oversampling: int,
        iterations: int,
        left: Array,
        values: Array,
        right: Array,
        status: Array,
        stream: int,
    ) -> Outcome: ...
    def polar(
        self, matrix: Array, hermitian: Array, certificate: Array, status: Array, stream: int
    ) -> Outcome: ...
