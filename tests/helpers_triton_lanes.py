"""Lanes for tests of GPU kernels: models' words, a pass's arrays, and KV in pages of one arena."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from crosspool.kernels.triton import words
from crosspool.kernels.triton.batch import KvPlace, Pass
from helpers_triton import DEVICE


def on_device(tensor: Tensor) -> Tensor:
    """A contiguous copy where kernels run, aligned as weights are."""
    size = tensor.numel() * tensor.element_size()
    room = torch.empty(size + 256, dtype=torch.uint8, device=DEVICE)
    begin = -room.data_ptr() % 256
    copy = room[begin : begin + size].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


class ModelWords:
    """A model's layers' words on the device, and the lane words that lead to it. Keeps its tensors alive."""

    def __init__(self, layers: Sequence[dict[int, Tensor]], lane: dict[int, Tensor] | None = None) -> None:
        self._kept: list[Tensor] = []
        table = torch.zeros(len(layers), words.LAYER_WORDS, dtype=torch.int64)
        for number, layer in enumerate(layers):
            for word, tensor in layer.items():
                table[number, word] = self._address(tensor)
        self.lane = {word: self._address(tensor) for word, tensor in (lane or {}).items()}
        self.lane[words.LAYERS] = self._address(table)

    def _address(self, tensor: Tensor) -> int:
        self._kept.append(on_device(tensor))
        return self._kept[-1].data_ptr()


def lane_of(
    model: ModelWords,
    rows: Sequence[tuple[int, int]],
    pages: Tensor | None = None,
    spare_rows: int = 0,
    spare_queries: int = 0,
) -> Pass:
    """A pass of rows of (first position, queries) in a lane with room for more. ``pages`` [rows, groups,
    chunks]. What is beyond the pass's rows and queries leads nowhere."""
    counts = [count for _, count in rows]
    starts = [0, *accumulate(counts)]
    lane = torch.zeros(words.LANE_WORDS, dtype=torch.int64)
    for word, address in model.lane.items():
        lane[word] = address
    lane[words.ROWS], lane[words.QUERIES] = len(rows), starts[-1]
    nowhere = 2**30
    row_of = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(counts))
    tables = torch.full(
        (len(rows) + spare_rows, *(pages.shape[1:] if pages is not None else (1, 1))), nowhere
    )
    if pages is not None:
        tables[: len(rows)] = pages
    arrays = (
        torch.tensor(starts + [nowhere] * spare_rows),
        torch.tensor([first for first, _ in rows] + [nowhere] * spare_rows),
        torch.cat((row_of, torch.full((spare_queries,), nowhere))),
        tables,
    )
    return Pass(lane.to(DEVICE), *(array.to(torch.int32).to(DEVICE) for array in arrays))


class Arena:
    """Contexts of rows in shuffled pages, in the second of three layers' regions and the second of two layer
    groups. Whatever holds no token of a context is not a number, and no other page is in the tables."""

    def __init__(
        self,
        lengths: Sequence[int],
        inside: tuple[int, ...],
        tokens_per_page: int,
        dtype: torch.dtype,
        seed: int = 0,
    ) -> None:
        """``inside`` is the shape of a token in a page: (2, K, D), or (1, rank + rotary)."""
        generator = torch.Generator().manual_seed(seed)
        self.contexts = [torch.randn(length, *inside, generator=generator).to(dtype) for length in lengths]
        self.tokens_per_page, self.inside, self.dtype = tokens_per_page, inside, dtype
        chunks = [-(-length // tokens_per_page) for length in lengths]
        ids = torch.randperm(2 * sum(chunks), generator=generator)
        self.pages = torch.full((len(lengths), 2, max(chunks)), -1)
        self.elements = tokens_per_page * torch.Size(inside).numel()
        self.page_elements = -(-3 * self.elements // 64) * 64
        whole = torch.full((len(ids), self.page_elements), torch.nan, dtype=dtype)
        region = whole[:, self.elements : 2 * self.elements]
        tokens = region.unflatten(1, (inside[0], tokens_per_page, *inside[1:])).transpose(1, 2)
        for row, own in enumerate(ids[: sum(chunks)].split(chunks)):
            self.pages[row, 1, : len(own)] = own
            position = torch.arange(lengths[row])
            tokens[own[position // tokens_per_page], position % tokens_per_page] = self.contexts[row]
        self.whole = on_device(whole)

    def forget_outside_window(self, row: int, first: int, window: int) -> None:
        """Give back the pages that a query at position ``first`` or later cannot see."""
        self.pages[row, 1, : max(0, first - window + 1) // self.tokens_per_page] = -1

    def kv(self, window: int = 0) -> KvPlace:
        size = self.dtype.itemsize
        return KvPlace(
            arena=self.whole.view(torch.uint8),
            page_bytes=self.page_elements * size,
            offset=self.elements * size,
            tokens_per_page=self.tokens_per_page,
            group=1,
            window=window,
        )

    def tokens(self) -> Tensor:
        """A view of the region: [pages, tokens, *inside]."""
        region = self.whole[:, self.elements : 2 * self.elements]
        return region.unflatten(1, (self.inside[0], self.tokens_per_page, *self.inside[1:])).transpose(1, 2)
