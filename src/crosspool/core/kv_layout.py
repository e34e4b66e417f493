"""How one model lays its tokens into pages.

A page is a fixed number of bytes and belongs to no model. A model cuts its layers into groups of the same
retention (full, or a window), and a page holds ``tokens_per_page`` tokens of one group, so a chunk of a
sequence is one page per group. Inside a page: ``[layer in group][token][kv element]`` for MLA and
``[layer in group][key or value][token][kv head][head_dim]`` for GQA, contiguous from the page's first byte.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from math import ceil

from crosspool.core.errors import ConfigError
from crosspool.core.spec import ModelSpec

MIN_TOKENS_PER_PAGE = 16
PAGE_ALIGNMENT = 4096


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers kept together in one page, and the window they share (None: every token is kept)."""

    layers: tuple[int, ...]
    window: int | None


@dataclass(frozen=True, slots=True)
class KvLayout:
    """One model's way to use pages of ``page_bytes``.

    ``group_of_layer[l]`` and ``place_of_layer[l]`` say in which group layer l is, and where in it.
    """

    page_bytes: int
    tokens_per_page: int
    groups: tuple[LayerGroup, ...]
    bytes_per_token_layer: int
    group_of_layer: tuple[int, ...]
    place_of_layer: tuple[int, ...]

    @property
    def has_windows(self) -> bool:
        return any(group.window is not None for group in self.groups)

    def chunks(self, tokens: int) -> int:
        """Number of chunks (one page per group each) that hold ``tokens`` tokens."""
        return -(-tokens // self.tokens_per_page)

    def pages(self, tokens: int) -> int:
        """Pages that ``tokens`` tokens need in all groups, were no window page given back."""
        return self.chunks(tokens) * len(self.groups)

    def first_kept_chunk(self, group: int, position: int) -> int:
        """The first chunk that a token at ``position`` or later can still see in this group."""
        window = self.groups[group].window
        return 0 if window is None else max(0, position - window + 1) // self.tokens_per_page


def make_layout(spec: ModelSpec, page_bytes: int, copies: int = 1) -> KvLayout:
    """The layout with the fewest groups such that a page holds at least 16 tokens of each group.

    A token takes the room of so many ``copies``, of which one is written. Raises ConfigError if not even one
    layer's 16 tokens fit.
    """
    token_layer = copies * spec.kv_bytes_per_token_layer
    most_layers = page_bytes // (MIN_TOKENS_PER_PAGE * token_layer)
    if most_layers < 1:
        raise ConfigError(
            f"a KV page of {page_bytes:,} bytes cannot hold {MIN_TOKENS_PER_PAGE} tokens of one layer of "
            f"{spec.architecture}, which take {MIN_TOKENS_PER_PAGE * token_layer:,} bytes"
        )
    groups = tuple(_groups(spec, most_layers))
    widest = max(len(group.layers) for group in groups)
    group_of, place_of = [0] * spec.num_layers, [0] * spec.num_layers
    for index, group in enumerate(groups):
        for place, layer in enumerate(group.layers):
            group_of[layer], place_of[layer] = index, place
    return KvLayout(
        page_bytes=page_bytes,
        tokens_per_page=page_bytes // (widest * token_layer),
        groups=groups,
        bytes_per_token_layer=spec.kv_bytes_per_token_layer,
        group_of_layer=tuple(group_of),
        place_of_layer=tuple(place_of),
    )


def _groups(spec: ModelSpec, most_layers: int) -> Iterable[LayerGroup]:
    """Layers by retention, each retention cut into the fewest groups of nearly equal size."""
    by_window = sorted(range(spec.num_layers), key=lambda layer: (spec.layers[layer].window or 0, layer))
    for window, members in groupby(by_window, key=lambda layer: spec.layers[layer].window):
        layers = list(members)
        count = ceil(len(layers) / most_layers)
        size = ceil(len(layers) / count)
        for first in range(0, len(layers), size):
            yield LayerGroup(tuple(layers[first : first + size]), window)


def choose_page_bytes(specs: Iterable[ModelSpec]) -> int:
    """The page size at which the worst-off of these models wastes least.

    Waste of a model at a page size: the bytes of a page that its tokens cannot fill, plus half a page per
    group for the last chunk of a sequence of 1,024 tokens. Candidates hold 16 to 64 tokens of 1 to 4 groups
    of some model. Within one percent of waste, fewer groups win: they make shorter page tables. Returns a
    multiple of 4,096 bytes.
    """
    models = list(specs)
    if not models:
        raise ConfigError("a page size is chosen from the models' layouts, and there is no model")
    floor = max(MIN_TOKENS_PER_PAGE * spec.kv_bytes_per_token_layer for spec in models)
    candidates = {_aligned(floor)}
    for spec in models:
        for groups in (1, 2, 3, 4):
            for tokens in (16, 32, 64):
                size = tokens * ceil(spec.num_layers / groups) * spec.kv_bytes_per_token_layer
                if size >= floor:
                    candidates.add(_aligned(size))
    return min(candidates, key=lambda size: _page_score(models, size))


def _aligned(size: int) -> int:
    return ceil(size / PAGE_ALIGNMENT) * PAGE_ALIGNMENT


def _page_score(specs: Iterable[ModelSpec], page_bytes: int) -> tuple[float, int, int]:
    layouts = [(spec, make_layout(spec, page_bytes)) for spec in specs]
    waste = max(_waste(spec, layout) for spec, layout in layouts)
    return round(waste, 2), sum(len(layout.groups) for _, layout in layouts), page_bytes


def _waste(spec: ModelSpec, layout: KvLayout, typical_tokens: int = 1024) -> float:
    """Share of the bytes held by a typical sequence that hold no token."""
    held = (typical_tokens / layout.tokens_per_page + 0.5) * len(layout.groups) * layout.page_bytes
    return 1 - typical_tokens * spec.kv_bytes_per_token / held
