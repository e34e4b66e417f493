"""What it costs to read a Mixture-of-Experts model's weights from the mapped checkpoint, from copies in huge
pages, and from int8 copies: decode of single tokens that each choose experts of their own.

All places take turns in one process; a ratio is of two neighbours in time. Run:
python benchmarks/weights_memory.py FOLDER
"""

from __future__ import annotations

import argparse
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import numpy as np
import torch
from ffn_half import seconds
from machine import describe

from crosspool.backends.weights_memory import HugeArena
from crosspool.core.spec import ModelSpec
from crosspool.kernels.numba.ffn import ffn_half
from crosspool.kernels.numba.ffn_fields import Expert, describe_ffn, ffn_mine_bytes, ffn_room_bytes
from crosspool.kernels.numba.matrix import CODES
from crosspool.kernels.numba.router import describe_router
from crosspool.kernels.numba.team import SHARED_WORDS, new_own
from crosspool.models.checkpoint import Checkpoint
from crosspool.models.loader import load_ffn
from crosspool.models.placement import InArena, InPlace, Placement
from crosspool.models.registry import read_spec
from crosspool.models.weights import FfnWeights, torch_dtype


@numba.njit(nogil=True)
def run_tokens(shared, own, layers, normed, tokens, stride, dtype, room, mine, out) -> None:
    """Every token by itself through every layer's FFN half."""
    for token in range(tokens):
        for layer in range(len(layers)):
            ffn_half(shared, own, layers[layer], normed + token * stride, 1, dtype, room, mine, out)


class Placed:
    """All FFNs of a model in one place."""

    def __init__(self, spec: ModelSpec, folder: Path, place: InPlace | InArena) -> None:
        self.spec = spec
        self._keep: list[object] = []
        checkpoint, layers, begin = Checkpoint(folder), [], time.perf_counter()
        for layer in range(spec.num_layers):
            layers.append(self._describe(layer, load_ffn(spec, checkpoint, layer), place))
            if isinstance(place, InArena):
                place.finish()
                checkpoint.release()
        self.load_seconds = time.perf_counter() - begin
        self.layers = np.stack(layers)

    def _describe(self, layer: int, weights: FfnWeights, place: Placement) -> np.ndarray:
        router = self.spec.layers[layer].ffn.router
        if router is None or weights.router is None:
            raise SystemExit("a model whose every layer has experts, please")
        experts = [Expert(*(place.matrix(matrix) for matrix in expert)) for expert in weights.experts]
        gate = place.tensor(weights.router)
        self._keep += [experts, gate]
        rules = {"top_k": router.top_k, "scoring": router.scoring, "normalise": router.normalise}
        rules |= {"scale": router.scale, "groups": router.groups, "top_groups": router.top_groups}
        words = describe_router(gate, None, **rules, group_score=router.group_score)
        return describe_ffn(self.spec.layers[layer].ffn.activation, experts, words, None)

    def time(self, normed: torch.Tensor, threads: int) -> float:
        """Seconds a token."""
        out, shared = torch.empty_like(normed[0]), np.zeros(SHARED_WORDS, np.int64)
        room = np.zeros(ffn_room_bytes(self.layers[0], 1), np.uint8)
        mine = [np.zeros(ffn_mine_bytes(self.layers[0], 1), np.uint8) for _ in range(threads)]
        inputs = (self.layers, normed.data_ptr(), len(normed), normed.stride(0) * normed.element_size())
        fixed = (*inputs, CODES[normed.dtype], room.ctypes.data)
        shares: list[tuple[object, ...]] = [
            (shared.ctypes.data, new_own(i, threads), *fixed, own.ctypes.data, out.data_ptr())
            for i, own in enumerate(mine)
        ]
        return seconds(run_tokens, shares) / len(normed)


def memory() -> dict[str, int]:
    """Megabytes of this process."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    values = dict(line.split()[:2] for line in lines)
    return {name: int(values[f"{name}:"]) >> 10 for name in ("Rss", "Pss", "AnonHugePages")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--windows", type=int, default=25)
    o = parser.parse_args()
    print(describe(), vars(o))
    spec = read_spec(o.folder)
    torch.set_num_threads(1)
    threads = ThreadPoolExecutor(2)
    places: dict[str, Placed] = {}
    for name, place in (
        ("mapped", InPlace()),
        ("huge", InArena(HugeArena(), threads, int8=False)),
        ("int8", InArena(HugeArena(), threads, int8=True)),
    ):
        before = memory()
        places[name] = Placed(spec, o.folder, place)
        more = {key: value - before[key] for key, value in memory().items()}
        print(f"{name}: loaded in {places[name].load_seconds:.1f} s, megabytes more: {more}")
    for count in (1, 2):
        times: dict[str, list[float]] = {name: [] for name in places}
        for _ in range(o.windows):
            normed = torch.randn(o.tokens, spec.hidden_size).to(torch_dtype(spec.dtype))
            for name, placed in places.items():
                times[name].append(placed.time(normed, count))
        for name, found in times.items():
            ratios = [a / b for a, b in zip(times["mapped"][1:], found[1:], strict=True)]
            quarters = statistics.quantiles(ratios, n=4)
            print(
                f"{count} threads, {name}: {statistics.median(found[1:]) * 1e3:.2f} ms a token, "
                f"{quarters[1]:.3f} of mapped's speed (quartiles {quarters[0]:.3f}, {quarters[2]:.3f})"
            )


if __name__ == "__main__":
    main()
