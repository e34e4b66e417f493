"""GPUs: memory, streams, events and graphs. Nothing else in CrossPool calls torch.cuda.

A device is named ``cuda:N``, the GPU of that number. ``cuda:N/0``, ``cuda:N/1``, ... are devices on the same
GPU, which share its memory: so one card can be two devices, each within the bytes that the configuration
gives a device.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor

from crosspool.backends import host_memory
from crosspool.backends.cuda_loop import CudaLoop, CudaLoops
from crosspool.core.errors import ConfigError, DeviceError, InvariantError, OutOfMemoryError
from crosspool.kernels.triton.chip import shared_bytes
from crosspool.kernels.triton.tiles import Chip

_log = logging.getLogger(__name__)

NAME = re.compile(r"cuda:(\d{1,2})(?:/(\d{1,2}))?")
LEAST_CAPABILITY = (8, 0)
"""Of a GPU: that of the first with bfloat16 and asynchronous copies into shared memory."""

FLOAT8_CAPABILITY = (8, 9)
URGENT, PATIENT = -1, 0
"""Priorities of streams."""


def make_cuda_devices(names: Sequence[str]) -> tuple[CudaDevice, ...]:
    """In their order. Raises ConfigError if this process cannot use such a GPU, and says why."""
    for name in names:
        if NAME.fullmatch(name) is None:
            raise ConfigError(f"device {name!r} is not a device name; names are like cuda:0 or cuda:0/1")
    _start(names[0])
    devices = tuple(CudaDevice(name) for name in names)
    for reason in {device.no_loops for device in devices} - {None}:
        _log.warning("the host launches each pass of a decode, which a GPU could repeat itself: %s", reason)
    return devices


def _start(name: str) -> None:
    if torch.version.cuda is None:
        raise ConfigError(f"device {name}: this PyTorch ({torch.__version__}) is built without CUDA")
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name}: CUDA cannot be used: {error}") from error


class CudaEvent:
    """A point in a stream of a GPU."""

    def __init__(self, name: str, stream: torch.cuda.Stream) -> None:
        self._name = name
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record(stream)

    @property
    def event(self) -> torch.cuda.Event:
        return self._event

    def done(self) -> bool:
        with _naming(self._name):
            return bool(self._event.query())

    def wait(self) -> None:
        with _naming(self._name):
            self._event.synchronize()

    def since(self, earlier: CudaEvent) -> int:
        with _naming(self._name):
            return int(earlier.event.elapsed_time(self._event) * 1e6)


class CudaDevice:
    """backends.device.Device: a GPU, or one of several devices on it. ``no_loops``: why it has none."""

    def __init__(self, name: str) -> None:
        match = NAME.fullmatch(name)
        assert match is not None
        self.name = name
        self._index = int(match[1])
        self.physical = f"cuda:{self._index}"
        found = torch.cuda.device_count()
        if self._index >= found:
            raise ConfigError(f"device {name}: this process sees {found} GPUs, cuda:0 to cuda:{found - 1}")
        properties = torch.cuda.get_device_properties(self._index)
        capability = (properties.major, properties.minor)
        if capability < LEAST_CAPABILITY:
            raise ConfigError(
                f"device {name}: {properties.name} has compute capability {_version(capability)}; "
                f"{_version(LEAST_CAPABILITY)} is needed"
            )
        self.chip = Chip(shared_bytes(self._index), capability >= FLOAT8_CAPABILITY)
        self.processors = properties.multi_processor_count
        self._loops: CudaLoops | None = None
        self.no_loops: str | None = None
        try:
            self._loops = CudaLoops()
        except ConfigError as error:
            self.no_loops = str(error)
        self._reached: dict[int, bool] = {}
        self._companions: dict[tuple[int, int], torch.cuda.Stream] = {}
        self._sealed: int | None = None

    @property
    def index(self) -> int:
        return self._index

    @property
    def total_bytes(self) -> int:
        return torch.cuda.mem_get_info(self._index)[1]

    @property
    def free_bytes(self) -> int:
        """Of the GPU, whichever of its devices asks."""
        return torch.cuda.mem_get_info(self._index)[0]

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        try:
            made = torch.zeros(tuple(shape), dtype=dtype, device=self.physical)
        except torch.OutOfMemoryError:
            needed = prod(shape) * dtype.itemsize
            raise OutOfMemoryError(f"memory of {self.name}", needed=needed, free=self.free_bytes) from None
        # Streams do not wait for the one in which zeros are written.
        self.finish()
        return made

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        try:
            return torch.zeros(tuple(shape), dtype=dtype, pin_memory=True)
        except RuntimeError as error:
            needed = prod(shape) * dtype.itemsize
            what, free = f"pinned host memory for {self.name}", host_memory.free_bytes()
            raise OutOfMemoryError(what, needed=needed, free=free) from error

    def stream(self, *, urgent: bool) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._index, priority=URGENT if urgent else PATIENT)

    def run(self, stream: torch.cuda.Stream, launches: Callable[[], object]) -> None:
        with self._watching(), torch.cuda.stream(stream):
            launches()

    def copy(self, stream: torch.cuda.Stream, target: Tensor, source: Tensor) -> None:
        """Between two GPUs, PyTorch makes the streams that are current on both wait for each other."""
        with self._watching(), torch.cuda.stream(stream):
            peers = {t.device.index for t in (target, source) if t.is_cuda} - {stream.device_index}
            if not peers:
                target.copy_(source, non_blocking=True)
                return
            companion = self._companion(stream, peers.pop())
            with torch.cuda.stream(companion), torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)

    def record(self, stream: torch.cuda.Stream) -> CudaEvent:
        with self._watching():
            return CudaEvent(self.name, stream)

    def follow(self, stream: torch.cuda.Stream, leader: torch.cuda.Stream) -> None:
        """By an event without timing, which is what a capture may record and wait for."""
        with self._watching():
            stream.wait_stream(leader)

    def reaches(self, other: CudaDevice) -> bool:
        if other.index not in self._reached:
            self._reached[other.index] = self._reach(other)
        return self._reached[other.index]

    def _reach(self, other: CudaDevice) -> bool:
        here, there = self._index, other.index
        if not torch.cuda.can_device_access_peer(here, there) or not _exchanges(here, there):
            return False
        # PyTorch opens the memory of its allocator, now and later, at the first copy from one to the other.
        torch.zeros(1, device=other.physical).copy_(torch.zeros(1, device=self.physical))
        return True

    def capture(self, stream: torch.cuda.Stream, launches: Callable[[], object]) -> torch.cuda.CUDAGraph:
        self.run(stream, launches)
        self.finish()
        graph = torch.cuda.CUDAGraph()
        with self._watching(), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            launches()
        return graph

    @property
    def loops(self) -> bool:
        return self._loops is not None

    def loop(
        self,
        stream: torch.cuda.Stream,
        first: Callable[[], object],
        launches: Callable[[], object],
        again: Tensor,
    ) -> CudaLoop:
        """Raises InvariantError if launches allocate: PyTorch does not know that they are recorded."""
        assert self._loops is not None
        for once in (first, launches):
            self.run(stream, once)
        self.finish()
        before = self._allocations()
        with self._watching(), torch.cuda.stream(stream):
            loop = self._loops.record(stream.cuda_stream, first, launches, again.data_ptr())
        if self._allocations() != before:
            raise InvariantError(f"{self.name}: what is recorded in a loop allocates")
        return loop

    def replay(self, stream: torch.cuda.Stream, graph: torch.cuda.CUDAGraph | CudaLoop) -> None:
        with self._watching(), torch.cuda.stream(stream):
            if isinstance(graph, CudaLoop):
                graph.launch(stream.cuda_stream)
            else:
                graph.replay()

    def check(self) -> None:
        with _naming(self.name):
            torch.cuda.current_stream(self._index).query()

    def finish(self) -> None:
        with _naming(self.name):
            torch.cuda.synchronize(self._index)

    def seal(self) -> None:
        self.finish()
        self._sealed = self._allocations()

    def check_sealed(self) -> None:
        now = self._allocations()
        if self._sealed is not None and now != self._sealed:
            raise InvariantError(f"{self.name}: {now - self._sealed} allocations while it served")

    def _allocations(self) -> int:
        """How many there have ever been on the GPU."""
        return int(torch.cuda.memory_stats(self._index).get("allocation.all.allocated", 0))

    def _companion(self, stream: torch.cuda.Stream, peer: int) -> torch.cuda.Stream:
        """The stream of another GPU in which copies to and from a stream of this one go."""
        key = (stream.cuda_stream, peer)
        if key not in self._companions:
            self._companions[key] = torch.cuda.Stream(peer, priority=stream.priority)
        return self._companions[key]

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """An error after which the GPU answers nothing any more becomes a DeviceError."""
        try:
            yield
        except Exception as error:
            if self._is_lost():
                raise DeviceError(f"{self.name}: {error}") from error
            raise

    def _is_lost(self) -> bool:
        try:
            torch.cuda.current_stream(self._index).query()
        except RuntimeError:
            return True
        return False


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """What CUDA says to whoever asks how far it is ends everything on the device."""
    try:
        yield
    except RuntimeError as error:
        raise DeviceError(f"{name}: {error}") from error


def _exchanges(here: int, there: int) -> bool:
    """Whether atomic operations of one GPU on another's memory are: over NVLink they are. Raises
    ConfigError."""
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise ConfigError(
            f"what lies between cuda:{here} and cuda:{there} is asked through a package that is missing: "
            f"{error}; install crosspool[cuda]"
        ) from error
    asked = runtime.cudaDeviceP2PAttr.cudaDevP2PAttrNativeAtomicSupported
    status, answer = runtime.cudaDeviceGetP2PAttribute(asked, here, there)
    return status == runtime.cudaError_t.cudaSuccess and bool(answer)


def _version(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
