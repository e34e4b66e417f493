"""The end of an executor: nothing runs on a device afterwards, whatever became of the thread that fed it."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from crosspool.core.errors import DeviceError, InvariantError
from crosspool.workers.cuda.executor import CudaExecutor

pytestmark = pytest.mark.backend


class Device:
    """``lost``: it answers nothing any more."""

    def __init__(self, *, lost: bool = False) -> None:
        self.lost = lost
        self.finished = 0

    def seal(self) -> None:
        pass

    def finish(self) -> None:
        self.finished += 1
        if self.lost:
            raise DeviceError("lost")

    def check_sealed(self) -> None:
        raise InvariantError("something was allocated")


def executor(devices: list[Device], *, dies: bool) -> CudaExecutor:
    def step() -> bool:
        raise AssertionError("a record is missing")

    feeder: Any = SimpleNamespace(idle=not dies, told=False, broken=None, step=step, take_events=list)
    copier: Any = SimpleNamespace(idle=True, told=False, step=lambda: False, take=list)
    given: Any = devices
    return CudaExecutor(feeder, copier, given)


def test_devices_have_finished_even_if_nobody_feeds_them(caplog: pytest.LogCaptureFixture) -> None:
    devices = [Device(lost=True), Device()]
    with caplog.at_level(logging.CRITICAL):
        it = executor(devices, dies=True)
        it.wait(10.0)
    with pytest.raises(InvariantError, match="no longer fed"):
        it.poll()
    it.close()
    assert [device.finished for device in devices] == [1, 1]


def test_a_device_that_is_lost_or_has_allocated_is_told_of_at_a_proper_end() -> None:
    with pytest.raises(DeviceError):
        executor([Device(lost=True)], dies=False).close()
    with pytest.raises(InvariantError, match="allocated"):
        executor([Device()], dies=False).close()
