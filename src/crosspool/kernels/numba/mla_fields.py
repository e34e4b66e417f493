"""The weights of a layer with latent attention (arXiv 2405.04434) as compiled code sees them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from crosspool.kernels.numba.attention_fields import address_of, check_types, piece_mine_bytes
from crosspool.kernels.numba.matrix import CODES, MATRIX_WORDS, Matrix, Weight, describe_matrix
from crosspool.kernels.numba.projection import projection_mine_bytes

QUERY, LATENT, OUTPUT, QUERY_DOWN = (MATRIX_WORDS * i for i in range(4))
EXPAND_KEY, EXPAND_VALUE, LATENT_NORM, QUERY_NORM, LATENT_BIAS, OUTPUT_BIAS, QUERY_DOWN_BIAS = range(
    4 * MATRIX_WORDS, 4 * MATRIX_WORDS + 7
)
HEADS, RANK, NOPE, ROTARY, VALUE, DTYPE, SCALE, EPSILON, INTERLEAVED, SCRATCH = range(
    4 * MATRIX_WORDS + 7, 4 * MATRIX_WORDS + 17
)
MLA_WORDS = 4 * MATRIX_WORDS + 17
"""Four matrices (QUERY_DOWN has no rows if queries have no latent), addresses (0: none), widths of a head's
parts in elements, the bits of float64 SCALE and EPSILON, and SCRATCH bytes of a thread's scratch for all but
attention. EXPAND_KEY is [heads, RANK, NOPE], the transposed
of what checkpoints have, for a product reads a matrix along what it adds up."""


class MlaTensors(NamedTuple):
    """One layer's weights, as in models/weights.py MlaWeights; the large matrices may be int8."""

    query: Weight
    latent: Weight
    latent_norm: Tensor
    expand_key: Tensor
    expand_value: Tensor
    output: Weight
    query_down: Weight | None = None
    query_down_bias: Tensor | None = None
    query_norm: Tensor | None = None
    latent_bias: Tensor | None = None
    output_bias: Tensor | None = None


def describe_mla(
    weights: MlaTensors, *, rotary: int, scale: float, epsilon: float, interleaved: bool
) -> tuple[np.ndarray, Tensor]:
    """The layer's descriptor, and a tensor that must live as long, like the weights.

    ``rotary`` is the width of the rotary part of queries and keys, ``epsilon`` that of the latents' norms.
    Raises ValueError for matrices that do not fit one another.
    """
    heads, nope, rank = weights.expand_key.shape
    value = weights.expand_value.shape[1]
    query, latent, output = (describe_matrix(w) for w in (weights.query, weights.latent, weights.output))
    down = Matrix(0, 0, 0, 0, 0, 0) if weights.query_down is None else describe_matrix(weights.query_down)
    _check(weights, query, latent, output, down, rotary)
    matrices = (weights.query, weights.latent, weights.output, weights.query_down)
    norms = (weights.latent_norm, weights.query_norm)
    vectors = (*norms, weights.latent_bias, weights.output_bias, weights.query_down_bias)
    check_types(matrices, (*vectors, weights.expand_value), weights.expand_key.dtype)
    turned = weights.expand_key.transpose(1, 2).contiguous()
    fields = np.zeros(MLA_WORDS, np.int64)
    fields[:EXPAND_KEY] = (*query, *latent, *output, *down)
    fields[EXPAND_KEY], fields[EXPAND_VALUE] = turned.data_ptr(), weights.expand_value.data_ptr()
    fields[LATENT_NORM:HEADS] = [address_of(vector) for vector in vectors]
    fields[HEADS:DTYPE] = heads, rank, nope, rotary, value
    fields.view(np.float64)[SCALE], fields.view(np.float64)[EPSILON] = scale, epsilon
    fields[DTYPE], fields[INTERLEAVED] = CODES[turned.dtype], interleaved
    key, values = describe_matrix(turned[0]), describe_matrix(weights.expand_value[0])
    products = max(projection_mine_bytes(matrix) for matrix in (query, latent, output, down, key, values))
    pieces = piece_mine_bytes(max(rank, rotary, down.rows))
    fields[SCRATCH] = -(-max(products, pieces) // 8) * 8
    return fields, turned


def _check(
    weights: MlaTensors, query: Matrix, latent: Matrix, output: Matrix, down: Matrix, rotary: int
) -> None:
    heads, nope, rank = weights.expand_key.shape
    value = weights.expand_value.shape[1]
    source = query.columns if weights.query_down is None else down.columns
    fits = (
        rotary % 2 == 0
        and query.rows == heads * (nope + rotary)
        and latent.rows == rank + rotary
        and output.columns == heads * value
        and latent.columns == output.rows == source
        and weights.expand_value.shape == (heads, value, rank)
        and (weights.query_down is None or (weights.query_norm is not None and down.rows == query.columns))
    )
    if not fits:
        raise ValueError(
            f"latent attention of rank {rank} with {heads} heads of {nope} + {rotary} and values of {value} "
            f"does not fit: query {query}, latent {latent}, output {output}, query down {down}, expand value "
            f"{list(weights.expand_value.shape)}"
        )
