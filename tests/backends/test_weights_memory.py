"""Huge pages for weights, and giving a mapped file's memory back."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import psutil
import pytest
import torch

from crosspool.backends import weights_memory
from crosspool.backends.weights_memory import HugeArena, release
from crosspool.core.errors import OutOfMemoryError

pytestmark = pytest.mark.backend

MIB = 1 << 20
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def field(address: int, name: str) -> int:
    """Bytes that smaps says of the mapping at an address."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0]:
            first, last = (int(bound, 16) for bound in words[0].split("-"))
            found = first <= address < last
        elif found and words[0] == f"{name}:":
            return int(words[1]) << 10
    raise AssertionError(f"nothing is mapped at {address:x}")


def test_tensors_are_zero_aligned_and_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_memory, "SEGMENT", 2 * MIB)
    arena = HugeArena()
    shapes = [(3, 5), (1,), (0,), (700, 1000), (7,), (3 * MIB,), (33,)]
    dtypes = [
        torch.float32,
        torch.int8,
        torch.bfloat16,
        torch.bfloat16,
        torch.float16,
        torch.uint8,
        torch.int8,
    ]
    tensors = [arena.take(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    for number, tensor in enumerate(tensors):
        assert (tuple(tensor.shape), tensor.dtype) == (shapes[number], dtypes[number])
        assert tensor.data_ptr() % 64 == 0 and tensor.count_nonzero() == 0
        tensor.fill_(number + 1)
    for number, tensor in enumerate(tensors):
        assert tensor.eq(number + 1).all()


def test_memory_is_taken_when_written_and_freed_with_the_last_tensor() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    arena = HugeArena()
    first, second = (arena.take((100 * MIB,), torch.uint8) for _ in range(2))
    assert process.memory_info().rss - before < 20 * MIB
    first.fill_(1)
    second.fill_(1)
    assert process.memory_info().rss - before > 190 * MIB
    del arena, first
    assert second.eq(1).all()
    del second
    assert process.memory_info().rss - before < 20 * MIB


@pytest.mark.skipif(
    not ENABLED.is_file() or "[never]" in ENABLED.read_text(), reason="the system gives no huge pages"
)
def test_pages_are_huge() -> None:
    tensor = HugeArena().take((64 * MIB,), torch.uint8)
    assert tensor.data_ptr() % (2 * MIB) == 0
    tensor.fill_(1)
    assert field(tensor.data_ptr(), "AnonHugePages") >= 32 * MIB


def test_more_than_the_address_space_is_refused_in_bytes() -> None:
    with pytest.raises(OutOfMemoryError, match=r"address space for weights: .* bytes needed"):
        HugeArena().take((1 << 60,), torch.uint8)


def test_a_mapped_file_leaves_memory_and_can_still_be_read(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with file.open("wb") as written:
        written.write(b"crosspool" * MIB)
        os.fsync(written.fileno())
    with file.open("rb") as opened:
        memory = mmap.mmap(opened.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    view = torch.frombuffer(memory, dtype=torch.uint8)
    total = int(view.sum(dtype=torch.int64))
    assert field(view.data_ptr(), "Rss") == 9 * MIB
    release(file)
    assert field(view.data_ptr(), "Rss") == 0
    assert int(view.sum(dtype=torch.int64)) == total
