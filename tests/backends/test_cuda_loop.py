"""What is asked of the driver to make a loop, of a driver that only writes it down."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
from collections.abc import Callable
from enum import IntEnum
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest

from crosspool.backends.cuda_loop import CONDITION, PTX, CudaLoops
from crosspool.core.errors import ConfigError

pytestmark = pytest.mark.backend

STREAM, WORD = 17, 4096


class Status(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2


class Driver(ModuleType):
    """Calls return a name of what they make. ``fails`` is a call that does."""

    CU_GRAPH_COND_ASSIGN_DEFAULT = 1
    CUgraphNodeType = SimpleNamespace(CU_GRAPH_NODE_TYPE_CONDITIONAL="conditional")
    CUgraphConditionalNodeType = SimpleNamespace(CU_GRAPH_COND_TYPE_WHILE="while")
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL="thread")
    RETURNS: ClassVar[dict[str, tuple[Any, ...]]] = {
        "cuModuleLoadData": ("module",),
        "cuModuleGetFunction": ("condition",),
        "cuCtxGetCurrent": ("context",),
        "cuGraphCreate": ("graph",),
        "cuGraphConditionalHandleCreate": (99,),
        "cuStreamGetCaptureInfo": ("active", 1, "graph", ("last",), (None,), 1),
        "cuStreamEndCapture": ("graph",),
        "cuGraphAddNode": ("node",),
        "cuGraphInstantiate": ("executable",),
    }

    def __init__(self, version: int = 13_000) -> None:
        super().__init__("driver")
        self.calls: list[tuple[Any, ...]] = []
        self.version = version
        self.fails = ""

    def CUgraphNodeParams(self) -> SimpleNamespace:  # noqa: N802 - CUDA's name
        return SimpleNamespace(type=None, conditional=SimpleNamespace(phGraph_out=["body"]))

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            if name == self.fails:
                return (Status.CUDA_ERROR_OUT_OF_MEMORY,)
            if name == "cuDriverGetVersion":
                return Status.CUDA_SUCCESS, self.version
            return Status.CUDA_SUCCESS, *self.RETURNS.get(name, ())

        return call

    def names(self) -> list[str]:
        return [call[0] for call in self.calls]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made, bindings = Driver(), ModuleType("cuda.bindings")
    bindings.driver = made  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setattr(metadata, "version", lambda name: "13.0.3")
    return made


def record(driver: Driver, launches: Callable[[], object] | None = None) -> Any:
    def note(name: str) -> Callable[[], object]:
        return lambda: driver.calls.append((name,))

    return CudaLoops().record(STREAM, note("first"), launches or note("launches"), WORD)


def test_first_and_body_end_with_the_condition(driver: Driver) -> None:
    loop = record(driver)
    loop.launch(STREAM)
    assert driver.names()[5:] == [
        "cuGraphConditionalHandleCreate",
        "cuStreamBeginCaptureToGraph",
        "first",
        "cuLaunchKernel",
        "cuStreamGetCaptureInfo",
        "cuStreamEndCapture",
        "cuGraphAddNode",
        "cuStreamBeginCaptureToGraph",
        "launches",
        "cuLaunchKernel",
        "cuStreamGetCaptureInfo",
        "cuStreamEndCapture",
        "cuGraphInstantiate",
        "cuGraphUpload",
        "cuGraphLaunch",
    ]
    calls = {name: [call[1:] for call in driver.calls if call[0] == name] for name in driver.names()}
    assert [graph for _, graph, *_ in calls["cuStreamBeginCaptureToGraph"]] == ["graph", "body"]
    graph, before, _, count, node = calls["cuGraphAddNode"][0]
    assert (graph, before, count) == ("graph", ["last"], 1)
    assert (node.conditional.handle, node.conditional.type, node.conditional.ctx) == (99, "while", "context")
    for function, *_, stream, ((handle, word), _), _ in calls["cuLaunchKernel"]:
        assert (function, stream, handle, word) == ("condition", STREAM, 99, WORD)
    # Not to go on is what a loop begins with, whatever the one before ended with.
    assert calls["cuGraphConditionalHandleCreate"] == [("graph", "context", 0, 1)]


def test_a_loop_gives_back_what_it_has_of_the_gpu(driver: Driver) -> None:
    loop = record(driver)
    assert not {"cuGraphDestroy", "cuGraphExecDestroy"} & set(driver.names())
    del loop
    gc.collect()
    assert {"cuGraphDestroy", "cuGraphExecDestroy"} <= set(driver.names())


def test_what_cannot_be_recorded_leaves_no_capture_behind(driver: Driver) -> None:
    def fails() -> None:
        raise ValueError("no such kernel")

    with pytest.raises(ValueError, match="no such kernel"):
        record(driver, fails)
    assert driver.names().count("cuStreamBeginCaptureToGraph") == driver.names().count("cuStreamEndCapture")
    driver.fails = "cuGraphInstantiate"
    with pytest.raises(RuntimeError, match="CUDA driver error 2: CUDA_ERROR_OUT_OF_MEMORY"):
        record(driver)


def test_a_driver_that_is_too_old_is_a_reason(driver: Driver) -> None:
    driver.version = 12_030
    with pytest.raises(ConfigError, match=r"the driver is for CUDA 12\.3, 12\.4 or later is needed"):
        CudaLoops()


def test_it_says_which_package_is_missing_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(ConfigError, match="the package cuda-bindings is not installed"):
        CudaLoops()
    monkeypatch.setattr(metadata, "version", lambda name: "12.9.4")
    with pytest.raises(ConfigError, match=r"cuda-bindings 12\.9\.4 is installed, 13 or later is needed"):
        CudaLoops()


@pytest.mark.parametrize("chip", ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_the_condition_compiles_for_chips(chip: str, tmp_path: Path) -> None:
    """By the assembler that Triton brings along. The function that it calls is left to the driver."""
    from triton import knobs

    assembler = knobs.nvidia.ptxas_blackwell if int(chip[3:]) >= 100 else knobs.nvidia.ptxas
    source, code = tmp_path / "condition.ptx", tmp_path / "condition.cubin"
    source.write_bytes(PTX)
    output(assembler.path, f"-arch={chip}", str(source), "-o", str(code))
    _, text = output(knobs.nvidia.nvdisasm.path, "-c", str(code)).split(f"\n{CONDITION.decode()}:", 1)
    operations = re.findall(r"\b(LDG\.E\.64|ISETP\.NE|CALL\.ABS|EXIT|LDL|STL)\b", text)
    assert list(dict.fromkeys(operations)) == ["LDG.E.64", "ISETP.NE", "CALL.ABS", "EXIT"]
    assert b"cudaGraphSetConditional" in code.read_bytes()


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
