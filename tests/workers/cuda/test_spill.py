"""Tiny real models on interpreted devices: a sequence whose pages were copied to host memory and back, into
others, goes on with the tokens of one that never left."""

from __future__ import annotations

import random
import threading

import pytest

from crosspool.core.copies import CopiedEvent, Direction, PageCopy
from crosspool.core.errors import DeviceError, InvariantError
from crosspool.core.ids import CopyId, HostPage
from crosspool.workers.clock import MonotonicClock
from crosspool.workers.cuda.feeder import FAILED
from helpers_cuda_rig import HOST_PAGES, CudaRig, cuda_rig
from helpers_devices import InterpretedDevice, Past
from helpers_triton_gates import needs_interpreter
from helpers_workers import GQA, MLA, PATIENCE, PROMPTS, HandMade

pytestmark = pytest.mark.backend

CUDA = {"kv_devices": ("cuda:0",), "weights_devices": ("cuda:0",)}


def copy(it: CudaRig, sequence: HandMade, direction: Direction, host_pages: list[HostPage]) -> CopyId:
    pages = tuple(page for group in sequence.pages for page in group)
    number = CopyId(len(it.copied))
    size = len(pages) * it.arena.shape[1]
    own = tuple(host_pages[: len(pages)])
    it.executor.copy(PageCopy(number, sequence.id, direction, pages, own, size))
    return number


def take(it: CudaRig, number: CopyId) -> CopiedEvent:
    limit = MonotonicClock().now() + PATIENCE * 1e9
    while number not in it.copied:
        assert MonotonicClock().now() < limit, f"copy {number} was not over in time"
        it.executor.wait(PATIENCE)
        it.take()
    return it.copied[number]


def forget(it: CudaRig, sequence: HandMade) -> None:
    """Its pages are somebody else's: it has others, as many."""
    for group in sequence.pages:
        it.arena[list(group)] = 255
    old, home = sequence.pages, it.free[sequence.device]
    sequence.pages = tuple(tuple(home.pop() for _ in group) for group in old)
    home += [page for group in old for page in group]


@pytest.mark.parametrize(
    ("model", "placement"), [(GQA, {}), (MLA, {"weights_devices": ("cuda:1",)})], ids=["gqa", "mla"]
)
def test_who_was_spilled_goes_on_where_it_was(models, expected, model, placement):
    with cuda_rig(*models, **CUDA | placement) as it:
        leaving, staying = (it.sequence(PROMPTS[i], 6, model=model) for i in (3, 0))
        it.finish(it.prefill(leaving, staying))
        it.finish(it.decode(2, leaving, staying))
        host_pages = random.Random(0).sample([HostPage(page) for page in range(HOST_PAGES)], HOST_PAGES)
        out = take(it, copy(it, leaving, Direction.OUT, host_pages))
        forget(it, leaving)
        it.finish(it.decode(2, staying))
        back = take(it, copy(it, leaving, Direction.IN, host_pages))
        it.finish(it.decode(6, leaving, staying))
        assert leaving.output == expected[model][3][:6] and staying.output == expected[model][0][:6]
        assert [own.error for own in (out, back)] == [None, None] and min(out.time, back.time) > 0


def test_pages_on_two_kv_devices_come_back(models):
    """What the arena of the second begins with is not page 0."""
    devices = {"kv_devices": ("cuda:0", "cuda:1"), "weights_devices": ("cuda:0",)}
    with cuda_rig(models[GQA], **devices) as it:
        sequence = it.sequence(PROMPTS[1], 20, lent=lambda chunk: chunk % 2)
        pages = [page for group in sequence.pages for page in group]
        assert {it.places.device_of(page) for page in pages} == {0, 1}
        for page in pages:
            it.arena[page] = page % 251
        written = it.arena[pages].clone()
        host_pages = [HostPage(page) for page in range(len(pages))]
        take(it, copy(it, sequence, Direction.OUT, host_pages))
        it.arena.fill_(255)
        take(it, copy(it, sequence, Direction.IN, host_pages))
        assert bool((it.arena[pages] == written).all())
        others = set(range(it.places.total)) - set(pages)
        assert bool((it.arena[list(others)] == 255).all())


class Behind(Past):
    """An event of a device that does not come to it before it is told to."""

    go = threading.Event()

    def done(self) -> bool:
        return self.go.is_set()


@needs_interpreter
def test_a_cancelled_copy_is_over_and_its_executor_closes_in_the_middle_of_another(models, monkeypatch):
    monkeypatch.setattr(InterpretedDevice, "record", lambda self, stream: Behind())
    Behind.go.clear()
    with cuda_rig(models[GQA], **CUDA) as it:
        host_pages = [HostPage(page) for page in range(HOST_PAGES)]
        first, second = it.sequence(PROMPTS[1], 40), it.sequence(PROMPTS[1], 40)
        number = copy(it, first, Direction.OUT, host_pages)
        it.executor.cancel(first.id)
        assert it.executor.poll() == []
        Behind.go.set()
        assert take(it, number) == CopiedEvent(number, 0)
        Behind.go.clear()
        copy(it, second, Direction.OUT, host_pages)
        it.executor.close()
        assert it.executor.poll() == []
        with pytest.raises(InvariantError, match="copy 1 was submitted to an executor that is closed"):
            copy(it, second, Direction.IN, host_pages)


@needs_interpreter
def test_a_failed_device_ends_a_copy_with_an_error(models, monkeypatch, caplog):
    def lost(self: Behind) -> bool:
        raise DeviceError("cuda:0: an illegal memory access")

    with cuda_rig(models[GQA], **CUDA) as it:
        sequence = it.sequence(PROMPTS[2], 1)
        monkeypatch.setattr(Past, "done", lost)
        event = take(it, copy(it, sequence, Direction.OUT, [HostPage(0), HostPage(1)]))
        assert event == CopiedEvent(event.copy, 0, FAILED)
    assert "pages of cuda:0 are copied no more: cuda:0: an illegal memory access" in caplog.text


def test_without_room_in_the_store_a_copy_is_refused(models):
    with cuda_rig(models[GQA], **CUDA) as it:
        sequence = it.sequence(PROMPTS[2], 1)
        with pytest.raises(InvariantError, match=f"about host page {HOST_PAGES}; the spill store has"):
            copy(it, sequence, Direction.OUT, [HostPage(HOST_PAGES), HostPage(HOST_PAGES)])
