"""The geometry of a model: everything that planning, pools and kernels need to know, and no weights.

A family (models/families) makes a ModelSpec from a public ``config.json``. Sizes are in elements unless the
name says bytes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from enum import StrEnum

FLOAT8_BLOCK = 128
"""A float8 matrix has a scale for each block of so many rows and columns."""


class DType(StrEnum):
    """Storage type of weights, hidden states and KV of one model."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @property
    def bytes(self) -> int:
        return 4 if self is DType.FLOAT32 else 2


class RopeKind(StrEnum):
    """Rotary embedding variants, by the names of the public configs."""

    DEFAULT = "default"
    LINEAR = "linear"
    DYNAMIC = "dynamic"
    LLAMA3 = "llama3"
    YARN = "yarn"


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding (arXiv 2104.09864) over the first ``dim`` elements of a head.

    ``interleaved``: pairs are neighbours (2i, 2i+1); otherwise halves (i, i + dim/2). Fields after
    ``factor`` belong to the variants: llama3 (model card of Llama 3.1), yarn (arXiv 2309.00071).
    """

    dim: int
    theta: float
    kind: RopeKind = RopeKind.DEFAULT
    interleaved: bool = False
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class GqaSpec:
    """Grouped-query attention. KV per token and layer: keys and values of ``num_kv_heads`` heads."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False

    @property
    def kv_elements_per_token(self) -> int:
        return 2 * self.num_kv_heads * self.head_dim

    def matrices(self, hidden: int) -> tuple[tuple[int, int], ...]:
        """Rows and columns of the projections, for a model of width ``hidden``."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return (queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)

    def other_weights(self, hidden: int) -> int:
        """Number of weights that are not of the projections."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        bias = (queries + 2 * keys if self.qkv_bias else 0) + (hidden if self.output_bias else 0)
        return bias + (2 * self.head_dim if self.qk_norm else 0)


@dataclass(frozen=True, slots=True)
class MlaSpec:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).

    KV per token and layer: the compressed latent and one rotary key shared by all heads, never the expanded
    keys and values. ``q_lora_rank`` None: queries are projected directly. ``latent_norm_eps`` is that of the
    norms of the latents, which public implementations do not take from the config.
    """

    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    scale: float
    bias: bool = False
    latent_norm_eps: float = 1e-6

    @property
    def num_kv_heads(self) -> int:
        """All heads read the same latents."""
        return 1

    @property
    def kv_elements_per_token(self) -> int:
        return self.kv_lora_rank + self.qk_rope_head_dim

    def matrices(self, hidden: int) -> tuple[tuple[int, int], ...]:
        """Rows and columns of the projections, for a model of width ``hidden``."""
        queries, rank = self.num_heads * (self.qk_nope_head_dim + self.qk_rope_head_dim), self.q_lora_rank
        query = ((queries, hidden),) if rank is None else ((rank, hidden), (queries, rank))
        return *query, (self.kv_elements_per_token, hidden), (hidden, self.num_heads * self.v_head_dim)

    def other_weights(self, hidden: int) -> int:
        """Number of weights that are not of the projections: what expands latents among them."""
        rank = self.q_lora_rank or 0
        expand = self.kv_lora_rank * self.num_heads * (self.qk_nope_head_dim + self.v_head_dim)
        bias = rank + self.kv_elements_per_token + hidden if self.bias else 0
        return expand + rank + self.kv_lora_rank + bias


AttentionSpec = GqaSpec | MlaSpec


class Scoring(StrEnum):
    """How a router turns logits into scores."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"


class GroupScore(StrEnum):
    """How a group-limited router ranks groups: by their best expert, or by the sum of the best two."""

    MAX = "max"
    TOP2_SUM = "top2_sum"


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """Expert choice. ``groups`` 1 means no group limit; otherwise the best ``top_groups`` groups compete.

    ``selection_bias``: a learned bias added to the scores for the choice only (arXiv 2412.19437).
    ``normalise``: the chosen weights are divided by their sum. ``scale`` multiplies them last.
    """

    num_experts: int
    top_k: int
    scoring: Scoring = Scoring.SOFTMAX
    normalise: bool = False
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_score: GroupScore = GroupScore.MAX
    selection_bias: bool = False


@dataclass(frozen=True, slots=True)
class FfnSpec:
    """One layer's feed-forward half: dense, or routed experts with optional shared ones.

    ``intermediate`` is the width of the dense FFN or of one expert; ``shared_intermediate`` the width of the
    shared experts taken together (0: none). ``router`` None: dense. ``activation`` is the public name.
    ``float8``: all matrices but the router are held in e4m3 with a float32 scale for each block.
    """

    intermediate: int
    activation: str = "silu"
    router: RouterSpec | None = None
    shared_intermediate: int = 0
    float8: bool = False

    def weights(self, hidden: int) -> int:
        """Number of weights of this FFN, but for a selection bias, for a model of width ``hidden``."""
        return self.router_weights(hidden) + self.matrix_weights(hidden)

    def router_weights(self, hidden: int) -> int:
        return 0 if self.router is None else self.router.num_experts * hidden

    def matrix_weights(self, hidden: int) -> int:
        """Number of weights of all experts."""
        experts = 1 if self.router is None else self.router.num_experts
        return 3 * hidden * (experts * self.intermediate + self.shared_intermediate)

    def matrix_rows(self, hidden: int, parts: int = 1) -> int:
        """Rows of all experts' matrices. Where ``parts`` devices have a slice of each, all have as many rows
        of ``down`` as there are."""
        experts = 1 if self.router is None else self.router.num_experts
        outputs = parts * hidden * (experts + (self.shared_intermediate > 0))
        return 2 * (experts * self.intermediate + self.shared_intermediate) + outputs

    def matrix_blocks(self, hidden: int) -> int:
        """Blocks of all experts' matrices, as float8 has them."""
        experts = 1 if self.router is None else self.router.num_experts
        columns = experts * _blocks(self.intermediate) + _blocks(self.shared_intermediate)
        return 3 * _blocks(hidden) * columns

    @property
    def selection_bias_bytes(self) -> int:
        """The router's selection bias, which is kept in float32."""
        return 4 * self.router.num_experts if self.router is not None and self.router.selection_bias else 0

    def active_weights(self, hidden: int) -> int:
        """Weights that one token reads: router, its experts, shared experts."""
        if self.router is None:
            return self.weights(hidden)
        width = self.router.top_k * self.intermediate + self.shared_intermediate
        return self.router.num_experts * hidden + 3 * hidden * width


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One layer. ``window`` None is full attention; otherwise a token sees the last ``window`` positions."""

    ffn: FfnSpec
    window: int | None = None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only model: pre-norm layers of an attention half and an FFN half.

    ``int8_weights``: projections, experts and the LM head are held as int8 with one float32 scale a row. Then
    no FFN is float8.
    """

    architecture: str
    hidden_size: int
    vocab_size: int
    max_context: int
    layers: tuple[LayerSpec, ...]
    attention: AttentionSpec
    rope: RopeSpec
    norm_eps: float
    tied_embeddings: bool
    dtype: DType
    eos_token_ids: tuple[int, ...] = ()
    int8_weights: bool = False

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def kv_bytes_per_token_layer(self) -> int:
        return self.attention.kv_elements_per_token * self.dtype.bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV that one token holds in all layers, before any window frees some."""
        return self.kv_bytes_per_token_layer * self.num_layers

    def ffn_bytes(self, layer: int, parts: int = 1) -> int:
        """Bytes of the FFN weights of one layer, on the ``parts`` devices that share it together."""
        return self.bytes_of_ffn(self.layers[layer].ffn, parts)

    def bytes_of_ffn(self, ffn: FfnSpec, parts: int = 1) -> int:
        """Likewise, of an FFN that is like those of this model: one of them, or part of one."""
        hidden = self.hidden_size
        others = ffn.router_weights(hidden) * self.dtype.bytes + ffn.selection_bias_bytes
        if ffn.float8:
            return ffn.matrix_weights(hidden) + 4 * ffn.matrix_blocks(hidden) + others
        return self.matrix_bytes(ffn.matrix_weights(hidden), ffn.matrix_rows(hidden, parts)) + others

    @property
    def total_ffn_bytes(self) -> int:
        return sum(self.ffn_bytes(layer) for layer in range(self.num_layers))

    @property
    def weights_dtype(self) -> str:
        """Of its FFNs' matrices: "int8", "float8" if some are so, or the model's dtype."""
        if self.int8_weights:
            return "int8"
        return "float8" if any(layer.ffn.float8 for layer in self.layers) else self.dtype

    def with_float8(self, layers: Collection[int]) -> ModelSpec:
        """The same model where the FFNs of these layers, and of no others, are float8."""
        changed = (
            replace(layer, ffn=replace(layer.ffn, float8=number in layers))
            for number, layer in enumerate(self.layers)
        )
        return replace(self, layers=tuple(changed))

    def matrix_bytes(self, weights: int, rows: int) -> int:
        """Bytes of large matrices that have so many weights in so many rows."""
        return weights + 4 * rows if self.int8_weights else weights * self.dtype.bytes

    @property
    def attention_weights(self) -> int:
        """Number of attention weights of one layer, norms included."""
        matrices = sum(rows * columns for rows, columns in self.attention.matrices(self.hidden_size))
        return matrices + self.attention.other_weights(self.hidden_size) + 2 * self.hidden_size

    @property
    def attention_bytes(self) -> int:
        """Bytes of the attention weights of one layer, norms included."""
        matrices = self.attention.matrices(self.hidden_size)
        weights = sum(rows * columns for rows, columns in matrices)
        others = self.attention_weights - weights
        return self.matrix_bytes(weights, sum(rows for rows, _ in matrices)) + others * self.dtype.bytes

    @property
    def head_bytes(self) -> int:
        """Bytes of the LM head, be it the embedding or not."""
        return self.matrix_bytes(self.vocab_size * self.hidden_size, self.vocab_size)

    @property
    def attention_side_bytes(self) -> int:
        """Bytes of everything that is not FFN: embedding, norms, attention, LM head.

        An int8 head is a copy of its own even where the embedding is tied to it.
        """
        head = self.head_bytes if self.int8_weights or not self.tied_embeddings else 0
        others = (self.vocab_size + 1) * self.hidden_size * self.dtype.bytes
        return others + head + self.num_layers * self.attention_bytes


def _blocks(size: int) -> int:
    return -(-size // FLOAT8_BLOCK)
