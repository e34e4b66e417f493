"""The tables through which kernels find a model, as int64 words in device memory.

A **lane** is where one micro-batch runs: its words and arrays stay where they are, so that a graph can be
recorded over them once. Its words say which model it runs now. What depends on the geometry alone (widths,
numbers of heads and experts, which parts there are) is known when a graph is recorded, and is no word.

Words that are addresses lead to contiguous row-major matrices that begin on 256 bytes. An address of 0 is
never read: the geometry says which parts there are.
"""

from __future__ import annotations

# -- a lane ------------------------------------------------------------------------------------------------
LAYERS, EMBEDDING, FINAL_NORM, HEAD, FREQUENCIES, ROWS, QUERIES, STEPS, GRANT, RECORDS, AGAIN, FAILED = range(
    12
)
LANE_WORDS = 16
MODEL_WORDS = 5
"""LAYERS is the address of the model's layers' words, LAYER_WORDS each. EMBEDDING and HEAD are [V, H],
FINAL_NORM [H], in model dtype; FREQUENCIES is float32 [rotary pairs], the angle per position of each. These
MODEL_WORDS are the grant's model's. ROWS and QUERIES of this pass; STEPS still to do. GRANT is the address of
the words of the grant that the lane runs (grant_words.py). RECORDS counts what the lane has ever written into
its ring. AGAIN is not 0 if a loop in the lane makes one more pass of the grant (pass_again.py). FAILED:
another device has not answered, and nothing of the grant crosses any more (crossing.py)."""

# -- a layer: attention ------------------------------------------------------------------------------------
INPUT_NORM, FFN_NORM, QKV, QKV_BIAS, QUERY_NORM, KEY_NORM, OUTPUT, OUTPUT_BIAS = range(8)
"""Grouped-query attention of N query heads and K key-value heads, D wide: QKV [(N + 2K) D, H] is the three
projections one after another, OUTPUT [H, N D]; the norms are those of heads, [D]."""

DOWN, DOWN_BIAS, LATENT_NORM, QUERY, EXPAND_KEY, EXPAND_VALUE = range(8, 14)
"""Latent attention besides: DOWN [(Q +) rank + rotary, H] takes hidden states to the query's latent (if
queries have one, of width Q), the KV latent and the rotary key, one after another; QUERY [N (nope + rotary),
Q or H]; QUERY_NORM [Q] and LATENT_NORM [rank]; EXPAND_KEY [N, nope, rank] and EXPAND_VALUE [N, value, rank];
OUTPUT [H, N value]."""

# -- a layer: FFN (the weight table of the weights pool) -----------------------------------------------------
ROUTER, SELECTION_BIAS, GATE_UP, GATE_UP_SCALES, EXPERT_DOWN, EXPERT_DOWN_SCALES = range(16, 22)
SHARED_GATE_UP, SHARED_GATE_UP_SCALES, SHARED_DOWN, SHARED_DOWN_SCALES = range(22, 26)
"""ROUTER [E, H] in model dtype and SELECTION_BIAS float32 [E]. GATE_UP [E, 2 I, H], gates before ups, and
EXPERT_DOWN [E, H, I]: of this device's shard. A dense FFN is one expert without router. With float8 (e4m3)
weights the scales are float32 [E, rows / 128, columns / 128], rounded up, of blocks of 128 x 128; of GATE_UP
the gates' blocks come before the ups', each rounded up by itself. Shared experts likewise, E = 1."""

LAYER_WORDS = 32
