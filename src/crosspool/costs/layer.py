"""The predicted time of a layer task: the larger of operations over rate and bytes over bandwidth (roofline,
Williams et al., 2009), plus a fixed overhead."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from crosspool.core.batch import Half
from crosspool.core.ids import Nanoseconds
from crosspool.core.spec import FfnSpec, GqaSpec, ModelSpec


@dataclass(frozen=True, slots=True)
class HardwareProfile:
    """One device: operations per second, bytes read per second, the fixed cost of a task in ns, and bytes
    copied per second between KV pages and host memory.

    The defaults are a cautious guess at two CPU cores; calibration corrects them within a few tasks.
    """

    operations_per_second: float = 100e9
    bytes_per_second: float = 15e9
    task_overhead: Nanoseconds = Nanoseconds(100_000)
    copy_bytes_per_second: float = 2e9

    def time(self, operations: float, bytes_read: float) -> Nanoseconds:
        seconds = max(operations / self.operations_per_second, bytes_read / self.bytes_per_second)
        return Nanoseconds(self.task_overhead + int(seconds * 1e9))

    def copy_time(self, size: int) -> Nanoseconds:
        return Nanoseconds(int(size / self.copy_bytes_per_second * 1e9))


@dataclass(frozen=True, slots=True)
class Work:
    """What a micro-batch asks of one layer.

    ``tokens`` of all rows; ``context``: positions whose KV is read, over all rows; ``attended``: pairs of a
    query and a position that it sees, over all rows (for a decode the same as ``context``).
    """

    tokens: int
    context: int
    attended: int


@dataclass(frozen=True, slots=True)
class LayerCosts:
    """Predicted times of one model's layer tasks on one kind of device.

    A layer is taken to be the model's last one: layers differ little, and where they do (leading dense
    layers) the last is the rule. Where windows differ, the widest counts.
    """

    spec: ModelSpec
    profile: HardwareProfile

    def work(self, rows: Iterable[tuple[int, int]]) -> Work:
        """Of a micro-batch, from each row's (start, number of tokens)."""
        windows = [layer.window for layer in self.spec.layers]
        window = None if None in windows else max(w for w in windows if w is not None)
        tokens = context = attended = 0
        for start, count in rows:
            seen = start + (count + 1) // 2
            tokens += count
            context += start + count if window is None else min(start, window) + count
            attended += count * (seen if window is None else min(seen, window))
        return Work(tokens, context, attended)

    def half(self, half: Half, work: Work) -> Nanoseconds:
        return self.attention(work) if half is Half.ATTENTION else self.ffn(work)

    def attention(self, work: Work) -> Nanoseconds:
        spec, attention = self.spec, self.spec.attention
        width = (
            attention.num_heads * attention.head_dim
            if isinstance(attention, GqaSpec)
            else attention.num_heads * (attention.kv_lora_rank + attention.qk_rope_head_dim)
        )
        operations = 2 * work.tokens * spec.attention_weights + 4 * width * work.attended
        bytes_read = spec.attention_bytes + work.context * spec.kv_bytes_per_token_layer
        return self.profile.time(operations, bytes_read)

    def ffn(self, work: Work) -> Nanoseconds:
        spec, ffn = self.spec, self.spec.layers[-1].ffn
        bytes_read = spec.ffn_bytes(spec.num_layers - 1) * active_share(ffn, work.tokens)
        operations = 2 * work.tokens * ffn.active_weights(spec.hidden_size)
        return self.profile.time(operations, bytes_read)

    def head(self, rows: int) -> Nanoseconds:
        """Final norm, LM head and token choice for ``rows`` rows."""
        weights = self.spec.vocab_size * self.spec.hidden_size
        return self.profile.time(2 * weights * rows, self.spec.head_bytes)


def active_share(ffn: FfnSpec, tokens: int) -> float:
    """Expected share of the experts that ``tokens`` tokens touch, were choices independent and uniform."""
    if ffn.router is None:
        return 1.0
    idle: float = (1 - ffn.router.top_k / ffn.router.num_experts) ** tokens
    return 1 - idle
