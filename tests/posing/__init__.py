"""CUDA devices posed by the CPU: what GPUs would run, run without one, and its streams watched.

    make posing

A `Posing` tensor says that it is on `cuda:0` and holds a tensor of the CPU. Every operation of
torch that meets one is done on the CPU, after what a device would mind was looked for: operands in
different places, memory past the limit, streams that race (`machine`), reads of memory that nobody
wrote (it is NaN). Kernels run in Triton's interpreter, solvers in the fake cuSOLVER. What this does
not show: speed, numerics of a card, the compiler, CUDA's own faults.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map

from tests import fake_cusolver as fakes
from tests.interpreter import DOWN_CAST, round_off
from tests.posing.machine import TOTAL, Block, Event, Stream, machine

NAME = "posing device"
METADATA = {"empty_like", "new_empty", "new_empty_strided", "zeros_like", "ones_like", "full_like",
            "new_zeros", "new_ones", "new_full", "rand_like", "randn_like"}  # fmt: skip
"""Operations that look at no entry of what they are given."""
WAITING = {"_local_scalar_dense", "equal", "nonzero", "is_nonzero", "_unique2", "masked_select",
           "_linalg_eigh", "_linalg_svd", "_linalg_check_errors"}  # fmt: skip
"""Operations for whose result torch makes the host wait; eigh and svd read an info."""
INDEXING = {"index", "index_put_", "index_put", "_index_put_impl_"}
"""Operations that bring their second argument, indices, from the CPU to the device."""
BY_CHANCE = {"bincount", "histc", "index_add", "kthvalue", "median", "put_", "scatter_add",
             "scatter_reduce"}  # fmt: skip
"""Operations by which floats may vary from run to run (`torch.use_deterministic_algorithms`)."""
FACTORIES = ("empty.memory_format", "empty_strided", "eye", "eye.m", "arange", "arange.start",
             "arange.start_step", "linspace")  # fmt: skip
COPYING = {"copy_", "_to_copy"}
SUBSTITUTES = {torch.ops.aten.mm.dtype: lambda a, b, dtype: a.to(dtype) @ b.to(dtype)}
"""What the CPU has no operation for."""
MOST_ADDRESSES = 64
KEPT: list[Any] = []
"""What lives as long as the process."""
KERNEL = threading.Lock()
"""Triton's interpreter runs one kernel at a time."""


class Posing(torch.Tensor):
    """A tensor on a device that the CPU poses as."""

    inner: torch.Tensor
    block: Block
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: int, block: Block) -> Posing:
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("cuda", device),
        )
        self.inner, self.block = inner, block
        return self

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if torch.is_inference_mode_enabled():  # where composite operations arrive whole
            parts = func.decompose(*args, **(kwargs or {}))
            if parts is not NotImplemented:
                return parts
        return dispatch(func, args, kwargs or {})

    def data_ptr(self) -> int:
        """For a library that reads there on the current stream, or writes where nobody has."""
        fresh = self.block.unwritten
        machine.access(self.device.index, [] if fresh else [self.block], [self.block] * fresh)
        return self.inner.data_ptr()

    def __getitem__(self, index: Any) -> torch.Tensor:
        # torch would bring a list to the device where no operation can be met.
        listed = isinstance(index, list)
        return super().__getitem__(torch.tensor(index, dtype=torch.long) if listed else index)

    def record_stream(self, stream: Stream) -> None:
        self.block.recorded.add(stream)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **given: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    def __repr__(self, **given: Any) -> str:
        return f"Posing({self.inner}, device={self.device})"

    def __format__(self, spec: str) -> str:
        return self.item().__format__(spec) if self.ndim == 0 else repr(self)


def dispatch(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """One operation on operands of which some are posing."""
    name = func._schema.name.partition("::")[2]
    leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    posing = [x for x in leaves if isinstance(x, Posing)]
    target = kwargs.get("device")
    target = posing[0].device if target is None else torch.device(target)
    check_places(func, name, args, kwargs)
    check_repeatable(func, name, args)

    reads, writes, pinned = accesses(func, name, args, kwargs)
    outer = {id(x.inner if isinstance(x, Posing) else x): x for x in leaves}
    given = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory", "driver")}
    if "device" in kwargs:
        given["device"] = torch.device("cpu")
    func = SUBSTITUTES.get(func, func)
    try:
        found = func(*tree_map(unposed, args), **tree_map(unposed, given))
    except NotImplementedError as error:
        raise AssertionError(f"{func} cannot pose") from error
    if name.startswith(("empty", "new_empty")):
        poison(found)

    device = machine.index(target) if target.type == "cuda" else posing[0].device.index
    blocks = name in COPYING and not asynchronous(name, args, kwargs, pinned)
    shared = {x.inner.untyped_storage().data_ptr(): x.block for x in posing}
    fresh: list[Block] = []

    def posed(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        if id(x) in outer:
            known = outer[id(x)]
            assert known.shape == x.shape, f"{func} resizes"
            return known
        if target.type == "cpu":
            return x
        start = x.untyped_storage().data_ptr()
        block = shared.get(start) if start else None
        if block is None:
            block = machine.allocate(device, x.untyped_storage().nbytes(), start)
            if name not in METADATA:
                fresh.append(block)
        return Posing(x, device, block)

    result = tree_map(posed, found)
    if reads or writes or fresh:
        machine.access(device, reads, [*writes, *fresh], waits=blocks or name in WAITING)
    return result


def unposed(x: Any) -> Any:
    return x.inner if isinstance(x, Posing) else x


def check_places(func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """What torch raises where operands are in different places; numbers of the CPU may be read."""
    if name in COPYING:
        if name == "_to_copy" and kwargs.get("non_blocking") and kwargs.get("device"):
            assert torch.device(kwargs["device"]).type == "cuda", "a host tensor nobody waits for"
        return
    places = set()
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        written = argument.alias_info is not None and argument.alias_info.is_write
        for x in tree_leaves(value):
            if not isinstance(x, torch.Tensor):
                continue
            indices = name in INDEXING and i == 1
            if x.is_cuda or written or (x.ndim and not indices):
                places.add(x.device)
    if len(places) > 1:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{' and '.join(sorted(map(str, places)))}! (in {name})"
        )


def check_repeatable(func: Any, name: str, args: Sequence[Any]) -> None:
    """Fail where a device would not give the same bytes in every run."""
    if not args or not isinstance(args[0], torch.Tensor) or not args[0].is_floating_point():
        return
    # A sum along one line is CUB's, which adds its blocks as they come; others have one order.
    line = name.rstrip("_") == "cumsum" and args[0].numel() == args[0].shape[args[1]]
    adds = name.startswith(("index_put", "_index_put")) and bool(args[3:] and args[3])
    varies = line or adds or name.rstrip("_") in BY_CHANCE
    assert not varies, f"{func} varies from run to run"


def accesses(
    func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[list[Block], list[Block], bool]:
    """Blocks that an operation reads and writes, by its schema; and whether one is pinned."""
    reads: list[Block] = []
    writes: list[Block] = []
    pinned = False
    if name in METADATA:
        return reads, writes, pinned
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        alias = argument.alias_info
        if alias is not None and not alias.is_write:
            continue  # a view of it
        for x in tree_leaves(value):
            if isinstance(x, torch.Tensor):
                block = x.block if isinstance(x, Posing) else pinned_block(x)
                pinned |= block is not None and block.device is None
                if block is not None:
                    (writes if alias is not None else reads).append(block)
    return reads, writes, pinned


def asynchronous(name: str, args: Sequence[Any], kwargs: dict[str, Any], pinned: bool) -> bool:
    """Whether a copy returns before it is done: between devices, or with pinned memory if asked."""
    given = kwargs.get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False)
    to = kwargs.get("device", args[0].device)
    source = args[1] if name == "copy_" else args[0]
    between = torch.device(to).type == source.device.type == "cuda"
    return between or (bool(given) and pinned)


def poison(found: Any) -> None:
    """What fresh memory holds is not to be relied on."""
    for x in tree_leaves(found):
        if isinstance(x, torch.Tensor) and x.numel():
            room = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
            room.fill_(1 if x.dtype == torch.bool else 0xFF)


def pinned_block(x: torch.Tensor) -> Block | None:
    return machine.pinned.get(x.untyped_storage().data_ptr())


def overload(name: str) -> Any:
    """`aten::eye.m` by its name."""
    operation, _, which = name.partition(".")
    return getattr(getattr(torch.ops.aten, operation), which or "default")


def made_by(factory: Any, *args: Any, device: Any = None, **given: Any) -> Posing:
    """A fresh tensor of one of torch's factories."""
    given.pop("pin_memory", None)
    inner, i = factory(*args, **given), machine.index(device)
    storage = inner.untyped_storage()
    block = machine.allocate(i, storage.nbytes(), storage.data_ptr())
    if factory._schema.name.startswith("aten::empty"):
        poison(inner)
    else:
        machine.access(i, [], [block])
    return Posing(inner, i, block)


def install() -> None:
    """Give this process two posing devices, for good."""
    library = torch.library.Library("aten", "IMPL")
    folder = tempfile.TemporaryDirectory(prefix="posing-")
    KEPT.extend([library, folder])
    machine.start(ctypes.CDLL(str(build_guard(Path(folder.name)))))
    for name in FACTORIES:
        library.impl(name, functools.partial(made_by, overload(name)), "CUDA")
    for name, value in faces().items():
        setattr(torch.cuda, name, value)
    torch.version.cuda = "13.0"
    pose_host()
    pose_triton()
    fake = fakes.Fake(fakes.build(Path(folder.name)))
    machine.tell = fake._handle.fake_device
    from resm_kernels.linalg import cusolver

    found = cusolver._Found(fake.library, None)
    cusolver._found = lambda: found


def build_guard(folder: Path) -> Path:
    """Compile what torch asks in C++."""
    root, target = Path(torch.__file__).parent, folder / "posing_guard.so"
    command = [fakes.compiler() or "c++", "-std=c++20", "-O1", "-shared", "-fPIC"]
    command += [f"-I{root / 'include'}", f"-L{root / 'lib'}", "-o", str(target)]
    source = Path(__file__).with_name("guard.cpp")
    subprocess.run([*command, str(source), "-lc10"], check=True)
    return target


def faces() -> dict[str, Any]:
    """What of `torch.cuda` this project and torch's Python half call."""
    properties = SimpleNamespace(
        name=NAME, total_memory=TOTAL, major=9, minor=0, multi_processor_count=8
    )

    def device_of(tensor: torch.Tensor) -> Any:
        on_device = isinstance(tensor, Posing)
        return machine.device(tensor.device) if on_device else contextlib.nullcontext()

    def set_fraction(fraction: float, device: Any = None) -> None:
        machine.limit[machine.index(device)] = int(fraction * TOTAL)

    def reset(device: Any = None) -> None:
        machine.peak[machine.index(device)] = machine.allocated[machine.index(device)]

    def free(device: Any = None) -> tuple[int, int]:
        i = machine.index(device)
        return machine.limit[i] - machine.allocated[i], TOTAL

    return {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: machine.count,
        "current_device": lambda: machine.current,
        "set_device": lambda device: machine.set_current(machine.index(device)),
        "device": machine.device,
        "device_of": device_of,
        "Stream": Stream,
        "Event": Event,
        "stream": machine.on,
        "current_stream": machine.current_stream,
        "default_stream": machine.default_stream,
        "synchronize": machine.synchronize,
        "empty_cache": lambda: None,
        "memory_allocated": lambda device=None: machine.allocated[machine.index(device)],
        "max_memory_allocated": lambda device=None: machine.peak[machine.index(device)],
        "reset_peak_memory_stats": reset,
        "mem_get_info": free,
        "set_per_process_memory_fraction": set_fraction,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: NAME,
    }


def pose_host() -> None:
    """Pinned memory, and what torch would move to a device without asking it."""
    plain_empty, plain_tensor, plain_numpy = torch.empty, torch.tensor, torch.Tensor.numpy

    def empty(*size: Any, pin_memory: bool = False, **given: Any) -> torch.Tensor:
        if not pin_memory:
            return plain_empty(*size, **given)
        meta = plain_empty(*size, **given, device="meta")
        room = np.empty(max(1, meta.nbytes), np.uint8)
        machine.pinned[room.ctypes.data] = Block(None, meta.nbytes, None)
        weakref.finalize(room, machine.pinned.pop, room.ctypes.data)
        return torch.from_numpy(room)[: meta.nbytes].view(meta.dtype).view(meta.shape)

    def tensor(data: Any, *, device: Any = None, **given: Any) -> torch.Tensor:
        made = plain_tensor(data, **given)
        return made if device is None else made.to(device)

    def numpy(x: torch.Tensor, **given: Any) -> Any:
        if block := pinned_block(x):
            machine.host_access(block)
        return plain_numpy(x, **given)

    class Generator(torch.Generator):
        def __new__(cls, device: Any = "cpu") -> Generator:
            return super().__new__(cls)

    torch.empty, torch.tensor, torch.Generator = empty, tensor, Generator
    torch.Tensor.numpy = numpy
    torch.Tensor.pin_memory = lambda x, device=None: empty(
        x.shape, dtype=x.dtype, pin_memory=True
    ).copy_(x)


def check_kernel(given: Sequence[torch.Tensor]) -> None:
    """What Triton raises, or CUDA, where a kernel's tensors are not on the current device."""
    for x in given:
        if not isinstance(x, Posing):
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        if x.device.index != machine.current:
            raise RuntimeError(f"a kernel on device {machine.current} is given {x.device}")


def pointed(x: Posing) -> list[Block]:
    """What a table of addresses points to."""
    if x.dtype != torch.int64 or x.numel() > MOST_ADDRESSES:
        return []
    found = map(machine.at, x.inner.flatten().tolist())
    return [block for block in found if block is not None]


def bytes_of(x: Posing) -> torch.Tensor:
    return x.inner.contiguous().view(-1).view(torch.uint8).clone()


def pose_triton() -> None:
    """Kernels in the interpreter, on the current device, given tensors that are there."""
    from triton.runtime import interpreter

    plain = interpreter.InterpretedFunction.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        check_kernel(given)
        with KERNEL:
            before = [bytes_of(x) for x in given]
            done = plain(self, *tree_map(unposed, args), **tree_map(unposed, kwargs))
            changed = [not torch.equal(b, bytes_of(x)) for b, x in zip(before, given, strict=True)]
        writes = [x.block for x, wrote in zip(given, changed, strict=True) if wrote]
        reads = [x.block for x, wrote in zip(given, changed, strict=True) if not wrote]
        reads += [block for x in given for block in pointed(x)]
        machine.access(machine.current, reads, writes)
        return done

    interpreter.InterpretedFunction.run = run
    setattr(interpreter.InterpreterBuilder, DOWN_CAST.rpartition(".")[2], round_off)


@contextlib.contextmanager
def no_races() -> Iterator[None]:
    """Fail where streams raced since."""
    machine.races.clear()
    yield
    found, machine.races[:] = list(dict.fromkeys(machine.races)), []
    assert not found, "\n".join(found)
