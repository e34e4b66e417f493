"""The weights of a layer with grouped-query attention (arXiv 2305.13245) as compiled code sees them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from crosspool.kernels.numba.attention_fields import address_of, check_types, piece_mine_bytes
from crosspool.kernels.numba.matrix import MATRIX_WORDS, Matrix, Weight, describe_matrix
from crosspool.kernels.numba.projection import projection_mine_bytes

QUERY, KEY, VALUE, OUTPUT = (MATRIX_WORDS * i for i in range(4))
QUERY_BIAS, KEY_BIAS, VALUE_BIAS, OUTPUT_BIAS, QUERY_NORM, KEY_NORM = range(
    4 * MATRIX_WORDS, 4 * MATRIX_WORDS + 6
)
HEADS, KV_HEADS, WIDTH, SCALE, EPSILON, INTERLEAVED, SCRATCH = range(
    4 * MATRIX_WORDS + 6, 4 * MATRIX_WORDS + 13
)
GQA_WORDS = 4 * MATRIX_WORDS + 13
"""Four matrices, addresses (0: none), WIDTH elements of a head, the bits of float64 SCALE and EPSILON, and
SCRATCH bytes of a thread's scratch for all but attention. The model's type is that of the pass: matrices may
all be int8."""


class GqaTensors(NamedTuple):
    """One layer's weights, as in models/weights.py GqaWeights; the matrices may be int8."""

    query: Weight
    key: Weight
    value: Weight
    output: Weight
    query_bias: Tensor | None = None
    key_bias: Tensor | None = None
    value_bias: Tensor | None = None
    output_bias: Tensor | None = None
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None


def describe_gqa(
    weights: GqaTensors, *, heads: int, kv_heads: int, scale: float, epsilon: float, interleaved: bool
) -> np.ndarray:
    """The layer's descriptor; the weights must live as long.

    ``scale`` multiplies the products of queries and keys, ``epsilon`` is that of the heads' norms, and
    ``interleaved`` says which elements are a pair, see ``rotate``. How many are rotated is up to the pass.
    Raises ValueError for tensors that do not fit one another.
    """
    matrices, vectors = weights[:4], weights[4:]
    dtype = next((weight.dtype for weight in weights if isinstance(weight, Tensor)), None)
    if dtype is not None:
        check_types(matrices, vectors, dtype)
    query, key, value, output = (describe_matrix(weight) for weight in matrices)
    width = query.rows // heads
    _check(weights, (query, key, value, output), heads, kv_heads, width)
    fields = np.zeros(GQA_WORDS, np.int64)
    fields[:QUERY_BIAS] = (*query, *key, *value, *output)
    fields[QUERY_BIAS:HEADS] = [address_of(vector) for vector in vectors]
    fields[HEADS:SCALE] = heads, kv_heads, width
    fields.view(np.float64)[SCALE], fields.view(np.float64)[EPSILON] = scale, epsilon
    fields[INTERLEAVED] = interleaved
    products = max(projection_mine_bytes(matrix) for matrix in (query, key, value, output))
    fields[SCRATCH] = -(-max(products, piece_mine_bytes(width)) // 8) * 8
    return fields


def _check(weights: GqaTensors, matrices: tuple[Matrix, ...], heads: int, kv_heads: int, width: int) -> None:
    query, key, value, output = matrices
    fits = (
        heads % kv_heads == 0
        and query.rows == output.columns == heads * width
        and key.rows == value.rows == kv_heads * width
        and query.columns == key.columns == value.columns == output.rows
        and (weights.query_norm is None) == (weights.key_norm is None)
    )
    if not fits:
        raise ValueError(
            f"{heads} heads of {width} that share {kv_heads} key-value heads do not fit: query {query}, key "
            f"{key}, value {value}, output {output}, query norm {_shape(weights.query_norm)}, key norm "
            f"{_shape(weights.key_norm)}"
        )
    lengths = (query.rows, key.rows, value.rows, output.rows, width, width)
    for name, length in zip(GqaTensors._fields[4:], lengths, strict=True):
        shape = _shape(getattr(weights, name))
        if shape not in (None, [length]):
            raise ValueError(f"{name} {shape} does not fit, [{length}] would")


def _shape(tensor: Tensor | None) -> list[int] | None:
    return None if tensor is None else list(tensor.shape)
