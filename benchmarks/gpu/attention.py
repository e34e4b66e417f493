"""Section 5: decode attention over contexts of 1K to 128K tokens, as the lanes launch it.

There are so many rows that a launch reads at least 256 MB, far more than the L2 cache holds. Tokens of a page
are a power of two, or odd, as pages that models share make them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from crosspool.core.batch import Phase
from crosspool.core.kv_layout import KvLayout, LayerGroup
from crosspool.core.spec import ModelSpec
from crosspool.workers.cuda.attention import Attend, HomeSurroundings, kv_place
from crosspool.workers.cuda.geometry import Geometry
from crosspool.workers.cuda.lane import Limits
from crosspool.workers.cuda.room import Room
from gpu.device import Gpu
from gpu.models import in_room, spec_of, write_config
from gpu.paged import decode_pass, random_arena
from gpu.results import Case, Figure, NotMeasured

TARGET = 0.85
KINDS = {"GQA": "qwen3-30b-a3b", "MLA": "deepseek-v2-lite"}
CONTEXTS = (1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 17)
TOKENS_PER_PAGE = (21, 64)
LEAST_READ, MOST_ROWS = 256 << 20, 512

TINY: dict[str, dict[str, Any]] = {
    "GQA": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    "MLA": {"num_attention_heads": 4, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16},
}


def one_layer(spec: ModelSpec, context: int, tokens_per_page: int) -> Geometry:
    """The attention of one of the model's layers, whose KV fills pages."""
    token = spec.kv_bytes_per_token_layer
    layout = KvLayout(tokens_per_page * token, tokens_per_page, (LayerGroup((0,), None),), token, (0,), (0,))
    alone = replace(spec, max_context=context, layers=spec.layers[:1])
    return Geometry.of(alone, layout)


def measure(gpu: Gpu, spec: ModelSpec, context: int, tokens_per_page: int) -> list[Figure]:
    geometry = one_layer(spec, context, tokens_per_page)
    of_row = context * spec.kv_bytes_per_token_layer
    rows = 2 if gpu.interpreted else min(-(-LEAST_READ // of_row), MOST_ROWS)
    layout = geometry.layout
    needed = rows * layout.chunks(context) * layout.page_bytes
    if needed > gpu.device.free_bytes // 2:
        raise NotMeasured(f"{needed:,} bytes of KV do not fit")
    arena = random_arena(gpu, rows * layout.chunks(context), layout.page_bytes)
    around = HomeSurroundings(arena, gpu.device.chip, gpu.device.processors, 0, rows, 1)

    def make(room: Room) -> tuple[Any, Attend]:
        batch = decode_pass(gpu, room, geometry, rows, context)
        return batch, Attend(geometry, Limits(rows, rows), Phase.DECODE, around, room)

    batch, attend = in_room(gpu, make)
    attend.query.copy_(gpu.random(*attend.query.shape))
    gpu.device.finish()
    seconds = gpu.seconds(gpu.recorded(lambda: attend(batch, kv_place(geometry, 0, arena))))
    assert bool(attend.attended.isfinite().all()), "not all outputs are numbers"
    return gpu.bandwidth_figures(f"{rows} rows", rows * of_row, seconds, TARGET)


def cases(gpu: Gpu) -> list[Case]:
    made = []
    for kind, name in KINDS.items():
        changes = TINY[kind] if gpu.interpreted else {}
        spec = spec_of(write_config(gpu.folder / name, name, **changes))
        contexts = (300,) if gpu.interpreted else CONTEXTS
        for context in contexts:
            for tokens in TOKENS_PER_PAGE:
                run = partial(measure, gpu, spec, context, tokens)
                made.append(Case(f"{kind}, {context} tokens, {tokens} a page", run))
    return made
