"""Kernels compiled for GPUs that need not be there, and what the machine code is like.

It runs in a process of its own, where Triton compiles instead of interpreting; see helpers_triton_gates.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

FOLDER = Path.home() / ".cache" / "crosspool" / "triton-builds"
"""What is compiled stays here; Triton keeps it under a hash of sources, versions and options."""


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel as Triton sees it: types of arguments (``constexpr`` for constants), values of
    constants, names of arguments that are multiples of 16, and options such as ``num_warps``."""

    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Build:
    """Machine code of one launch on one target. ``registers`` is per thread; ``spilled`` counts what goes
    through local memory (bytes of stack and instructions); ``shared`` is in bytes; ``wide_loads`` counts
    loads of 128 bits from global memory."""

    registers: int
    spilled: int
    shared: int
    wide_loads: int


def compile_without_interpreter() -> None:
    """Before Triton is imported in this process."""
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ["TRITON_CACHE_DIR"] = str(FOLDER)


def build(launch: Launch, backend: str, arch: int | str, warp: int) -> Build:
    """Compile, or take from the folder."""
    compiled = _compile(launch, backend, arch, warp)
    read = _read_nvidia if backend == "cuda" else _read_amd
    return read(compiled.asm, compiled.metadata.shared)


def ptx(launch: Launch, arch: int) -> str:
    """The instructions for a chip of NVIDIA, before its assembler."""
    return str(_compile(launch, "cuda", arch, 32).asm["ptx"])


def _compile(launch: Launch, backend: str, arch: int | str, warp: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(import_module(launch.module), launch.kernel)
    aligned = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned}
    source = ASTSource(function, launch.signature, launch.constants, aligned)
    return triton.compile(source, GPUTarget(backend, arch, warp), options=launch.options)


def _read_nvidia(asm: Any, shared: int) -> Build:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(asm["cubin"])
        usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        code = _output(knobs.nvidia.nvdisasm.path, "-c", file.name)
    counts = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    local = len(re.findall(r"\b(?:LDL|STL)\b", code))
    wide = len(re.findall(r"\bLDG(?:STS)?\.[\w.]*128\b", code))
    return Build(counts["REG"], counts["STACK"] + counts["LOCAL"] + local, shared, wide)


def _read_amd(asm: Any, shared: int) -> Build:
    code = asm["amdgcn"]

    def count(name: str) -> int:
        return max(int(value) for value in re.findall(rf"\.{name}:\s+(\d+)", code))

    # Scalar registers spill into lanes of vector registers, not into memory.
    spilled = count("vgpr_spill_count") + count("private_segment_fixed_size")
    wide = len(re.findall(r"\b(?:global|buffer|flat)_load_dwordx4\b", code))
    return Build(count("vgpr_count"), spilled, shared, wide)


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
