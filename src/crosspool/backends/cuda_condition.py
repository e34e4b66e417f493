"""The one kernel in CUDA C++: it says whether a WHILE node of a graph goes on, which Triton has no word for.

NVRTC compiles it and nvJitLink links it with the CUDA device runtime, whose cudaGraphSetConditional it calls.
None of them needs a driver.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

from crosspool.core.errors import ConfigError

NAME = b"set_condition"
SOURCE = b"""
extern "C" __global__ void set_condition(cudaGraphConditionalHandle loop, const long long *word) {
    cudaGraphSetConditional(loop, *word != 0);
}
"""
BINDINGS, RUNTIME, DEVICE_RUNTIME = "cuda-bindings", "nvidia-cuda-runtime", "libcudadevrt.a"
LEAST_BINDINGS = 13
"""Major version, since which functions have the arguments that they have here."""


def build_condition(capability: tuple[int, int]) -> bytes:
    """The code of ``set_condition`` for GPUs of a compute capability: it makes a WHILE node go on if an int64
    word is not 0. Raises ConfigError, which says what it lacks, if it cannot be built here."""
    check_bindings()
    chip = f"sm_{capability[0]}{capability[1]}"
    try:
        return _link(_compile(chip), chip)
    except (ImportError, RuntimeError) as error:
        # What the bindings raise, also for a library that they do not find.
        raise ConfigError(f"the condition of a loop cannot be built for {chip}: {error}") from error


def check_bindings() -> None:
    """Raises ConfigError if there are none of CUDA, or too old ones."""
    try:
        found = metadata.version(BINDINGS)
    except metadata.PackageNotFoundError:
        raise ConfigError(f"the package {BINDINGS} is not installed") from None
    if int(found.partition(".")[0]) < LEAST_BINDINGS:
        raise ConfigError(f"{BINDINGS} {found} is installed, {LEAST_BINDINGS} or later is needed")


def device_runtime() -> Path:
    """Where the library is that kernels are linked with. Raises ConfigError if it is nowhere."""
    try:
        files = metadata.files(RUNTIME) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == DEVICE_RUNTIME:
            return Path(str(file.locate()))
    raise ConfigError(f"the package {RUNTIME} is not installed, which has {DEVICE_RUNTIME}")


def _compile(chip: str) -> bytes:
    from cuda.bindings import nvrtc

    program = _checked(nvrtc.nvrtcCreateProgram(SOURCE, NAME + b".cu", 0, [], []))
    options = [f"--gpu-architecture={chip}".encode(), b"--relocatable-device-code=true"]
    try:
        done = nvrtc.nvrtcCompileProgram(program, len(options), options)
        log = bytes(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        _checked(done, log.rstrip(b"\0").decode())
        code = bytes(_checked(nvrtc.nvrtcGetCUBINSize(program)))
        _checked(nvrtc.nvrtcGetCUBIN(program, code))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return code


def _link(code: bytes, chip: str) -> bytes:
    from cuda.bindings import nvjitlink

    library = str(device_runtime())
    linker = nvjitlink.create(1, [f"-arch={chip}"])
    try:
        nvjitlink.add_data(linker, nvjitlink.InputType.CUBIN, code, len(code), NAME.decode())
        nvjitlink.add_file(linker, nvjitlink.InputType.LIBRARY, library)
        nvjitlink.complete(linker)
        linked = bytearray(nvjitlink.get_linked_cubin_size(linker))
        nvjitlink.get_linked_cubin(linker, linked)
    except nvjitlink.nvJitLinkError as error:
        raise RuntimeError(str(error)) from error
    finally:
        nvjitlink.destroy(linker)
    return bytes(linked)


def _checked(result: tuple[Any, ...], log: str = "") -> Any:
    """The value of a call of NVRTC. Raises RuntimeError."""
    if int(result[0]):
        raise RuntimeError(f"{result[0].name} {log}".strip())
    return result[1] if len(result) == 2 else None
