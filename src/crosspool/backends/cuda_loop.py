"""Graphs that repeat their launches without the host: a WHILE node around them.

What may be in its body: kernels of one context, copies and fills of memory, and no launches from kernels
("Conditional Graph Nodes", CUDA programming guide). A pass has only kernels, which PyTorch's current stream
takes: it is captured into the body as it would be into a graph of its own.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from importlib import metadata
from typing import Any

from crosspool.core.errors import ConfigError

BINDINGS = "cuda-bindings"
LEAST_BINDINGS = 13
"""Major version, since which functions have the arguments that they have here."""

LEAST_DRIVER = 12_040
"""Version of CUDA that the driver must have: the first with conditional nodes."""

CONDITION = b"set_condition"
PTX = b"""
.version 8.0
.target sm_80
.address_size 64

.extern .func cudaGraphSetConditional(.param .b64 loop, .param .b32 value);

.visible .entry set_condition(.param .u64 loop, .param .u64 word)
{
    .reg .pred %again;
    .reg .b32 %value;
    .reg .b64 %loop, %at, %word;

    ld.param.u64 %loop, [loop];
    ld.param.u64 %at, [word];
    cvta.to.global.u64 %at, %at;
    ld.global.u64 %word, [%at];
    setp.ne.s64 %again, %word, 0;
    selp.b32 %value, 1, 0, %again;
    {
        .param .b64 which;
        .param .b32 what;
        st.param.b64 [which], %loop;
        st.param.b32 [what], %value;
        call.uni cudaGraphSetConditional, (which, what);
    }
    ret;
}
"""
"""A WHILE node goes on if the int64 at ``word`` is not 0: Triton has no word for that. The driver compiles
it, and has the function that it calls."""


class CudaLoops:
    """Makes loops on one GPU. Raises ConfigError where it cannot, and says why."""

    def __init__(self) -> None:
        _check_bindings()
        try:
            from cuda.bindings import driver

            version = _checked(driver.cuDriverGetVersion())
        except (ImportError, RuntimeError) as error:
            raise ConfigError(f"CUDA's bindings cannot be used: {error}") from error
        if version < LEAST_DRIVER:
            found, least = _version(version), _version(LEAST_DRIVER)
            raise ConfigError(f"the driver is for CUDA {found}, {least} or later is needed")
        self._driver = driver
        self._condition: Any = None

    def record(
        self, stream: int, first: Callable[[], object], launches: Callable[[], object], again: int
    ) -> CudaLoop:
        """See backends.device.Device.loop. The context of the ``stream``, which is PyTorch's current one, is
        current; ``again`` is the word's address. Raises RuntimeError, as PyTorch does."""
        driver = self._driver
        if self._condition is None:
            module = _checked(driver.cuModuleLoadData(PTX + b"\0"))
            self._condition = _checked(driver.cuModuleGetFunction(module, CONDITION))
        context = _checked(driver.cuCtxGetCurrent())
        graph = _checked(driver.cuGraphCreate(0))
        loop = CudaLoop(driver, graph)
        assign = driver.CU_GRAPH_COND_ASSIGN_DEFAULT
        handle = _checked(driver.cuGraphConditionalHandleCreate(graph, context, 0, assign))
        node = driver.CUgraphNodeParams()
        node.type = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
        node.conditional.handle = handle
        node.conditional.type = driver.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_WHILE
        node.conditional.size = 1
        node.conditional.ctx = context
        before = self._capture(stream, graph, first, handle, again)
        _checked(driver.cuGraphAddNode(graph, before, None, len(before), node))
        self._capture(stream, node.conditional.phGraph_out[0], launches, handle, again)
        loop.instantiate(stream)
        return loop

    def _capture(
        self, stream: int, graph: Any, launches: Callable[[], object], handle: Any, again: int
    ) -> list[Any]:
        """Into a graph: launches, and then what sets the condition. Returns the nodes that come last."""
        driver = self._driver
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        _checked(driver.cuStreamBeginCaptureToGraph(stream, graph, None, None, 0, mode))
        try:
            launches()
            arguments = (int(handle), again), (ctypes.c_uint64, ctypes.c_void_p)
            _checked(driver.cuLaunchKernel(self._condition, 1, 1, 1, 1, 1, 1, 0, stream, arguments, 0))
            last: list[Any] = list(_checked(driver.cuStreamGetCaptureInfo(stream))[3])
        except BaseException:
            driver.cuStreamEndCapture(stream)
            raise
        _checked(driver.cuStreamEndCapture(stream))
        return last


class CudaLoop:
    """A graph with a loop. What it takes of the GPU it gives back with the last reference to it."""

    def __init__(self, driver: Any, graph: Any) -> None:
        self._driver = driver
        self._graph = graph
        self._executable: Any = None
        weakref.finalize(self, driver.cuGraphDestroy, graph)

    def instantiate(self, stream: int) -> None:
        """Afterwards a launch allocates nothing."""
        driver = self._driver
        self._executable = _checked(driver.cuGraphInstantiate(self._graph, 0))
        weakref.finalize(self, driver.cuGraphExecDestroy, self._executable)
        _checked(driver.cuGraphUpload(self._executable, stream))

    def launch(self, stream: int) -> None:
        _checked(self._driver.cuGraphLaunch(self._executable, stream))


def _check_bindings() -> None:
    try:
        found = metadata.version(BINDINGS)
    except metadata.PackageNotFoundError:
        raise ConfigError(f"the package {BINDINGS} is not installed") from None
    if int(found.partition(".")[0]) < LEAST_BINDINGS:
        raise ConfigError(f"{BINDINGS} {found} is installed, {LEAST_BINDINGS} or later is needed")


def _checked(result: tuple[Any, ...]) -> Any:
    """What a call of the driver returns: nothing, a value, or a tuple of them. Raises RuntimeError."""
    status, *values = result
    if int(status):
        raise RuntimeError(f"CUDA driver error {int(status)}: {status.name}")
    return values[0] if len(values) == 1 else tuple(values)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
