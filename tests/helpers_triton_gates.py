"""Gates that a kernel passes before it ever meets a GPU: what its launcher launches, at real sizes, is
compiled for each target; it must not spill, must load 128 bits at once, and must fit the chip."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import BaseBackend
from triton.runtime.interpreter import InterpretedFunction

from helpers_triton import INTERPRETED
from helpers_triton_builds import Launch, build, compile_without_interpreter, ptx

needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="launches are recorded by the interpreter")


@dataclass(frozen=True)
class Target:
    """A chip by Triton's names, and its shared memory that one program can have, in bytes."""

    backend: str
    arch: int | str
    warp: int
    shared: int

    def __str__(self) -> str:
        return f"sm_{self.arch}" if self.backend == "cuda" else str(self.arch)


SM_80 = Target("cuda", 80, 32, 166_912)
SM_90 = Target("cuda", 90, 32, 232_448)
SM_100 = Target("cuda", 100, 32, 232_448)
GFX942 = Target("hip", "gfx942", 64, 65_536)
ALL_TARGETS = (SM_80, SM_90, SM_100, GFX942)


def on_targets(
    launchers: dict[str, Callable[[], object]], targets: tuple[Target, ...] = ALL_TARGETS
) -> pytest.MarkDecorator:
    """Parametrise a test with ``launch`` and ``target``: each of the launchers on each of the targets."""
    cases = [
        pytest.param(launch, target, id=f"{name}-{target}")
        for name, launch in launchers.items()
        for target in targets
    ]
    return pytest.mark.parametrize(("launch", "target"), cases)


def assert_builds_well(launch: Callable[[], object], target: Target, wide_loads: bool = True) -> None:
    """Every kernel that ``launch`` launches compiles for the target, keeps everything in registers, fits its
    shared memory, and has loads of 128 bits (unless it is said to need none).

    ``launch`` calls a launcher with tensors of real sizes on the CPU; nothing is run or read.
    """
    with recorded() as launches, _on(target):
        launch()
    assert launches, "nothing was launched"
    for one in launches:
        built = _worker().submit(build, one, target.backend, target.arch, target.warp).result()
        seen = f"{one.kernel} on {target}: {built}"
        assert built.spilled == 0, f"{seen} spills"
        assert built.shared <= target.shared, f"{seen} wants more than {target.shared} bytes of shared memory"
        assert built.wide_loads > 0 or not wide_loads, f"{seen} loads nothing in 128 bits"


def instructions(launch: Callable[[], object], target: Target) -> str:
    """What the launches are for a chip of NVIDIA (PTX)."""
    with recorded() as launches, _on(target):
        launch()
    return "".join(_worker().submit(ptx, one, target.arch).result() for one in launches)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside, kernels are not run: their launches are appended to the list."""
    launches: list[Launch] = []

    def record(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(_launch_of(self, arguments, options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "run", record)
        yield launches


@contextmanager
def _on(target: Target) -> Iterator[None]:
    """Launchers see the target as torch would show it."""
    amd = target.backend == "hip"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.version, "hip", "7.0" if amd else None)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_device_capability", lambda: (9, 4) if amd else divmod(target.arch, 10))
        yield


def _launch_of(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Launch:
    """As Triton would specialise it: integers of value 1 and None are constants, addresses and integers that
    are multiples of 16 are known to be."""
    own = {name: options.pop(name) for name in list(options) if name in kernel.arg_names}
    bound = inspect.signature(kernel.fn).bind(*arguments, **own)
    bound.apply_defaults()
    annotations = inspect.get_annotations(kernel.fn)
    signature, constants, aligned = {}, {}, []
    for name, value in bound.arguments.items():
        kind, key = "constexpr", value
        if "constexpr" not in str(annotations.get(name)):
            special = name not in (kernel.kwargs.get("do_not_specialize") or ())
            kind, key = native_specialize_impl(BaseBackend, value, False, special, special)
        signature[name] = kind
        if kind == "constexpr":
            constants[name] = value
        elif key and "D" in key:
            aligned.append(name)
    return Launch(kernel.fn.__module__, kernel.fn.__name__, signature, constants, tuple(aligned), options)


@cache
def _worker() -> ProcessPoolExecutor:
    """One process for all gates; it ends with the tests."""
    return ProcessPoolExecutor(1, get_context("spawn"), compile_without_interpreter)
