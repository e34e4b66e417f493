"""A model as compiled code finds its way in it (model.py makes it): the model's words, and each layer's."""

from __future__ import annotations

from crosspool.kernels.numba.compile import inline
from crosspool.kernels.numba.intrinsics import words

LAYERS, HIDDEN, DTYPE, VOCABULARY, EMBEDDING, HEAD, LAYER_TABLE = range(7)
GROUPS, TOKENS_PER_PAGE, ROTARY_PAIRS, FREQUENCIES, ROTARY_GAIN, EPSILON = range(7, 13)
MODEL_WORDS = 16
"""EMBEDDING [V, H] and FREQUENCIES (float32 [ROTARY_PAIRS]) are addresses, as HEAD and LAYER_TABLE are those
of further words; ROTARY_GAIN and EPSILON are the bits of float64."""

LATENT, ATTENTION, ATTENTION_WORDS, INPUT_NORM, FFN_NORM, KV_OFFSET, KV_GROUP, KV_WINDOW, FFNS = range(9)
LAYER_WORDS = 16
"""ATTENTION is the address of the half's ATTENTION_WORDS words, of latent attention if LATENT; FFNS that of
(address, number) of each part's FFN words; where the layer's KV is as in kernels/numba/batch.py KvPlace."""


@inline
def model_at(address):
    """The model's words."""
    return words(address, MODEL_WORDS)


@inline
def layer_at(model, layer):
    """The words of a layer."""
    return words(model[LAYER_TABLE] + 8 * LAYER_WORDS * layer, LAYER_WORDS)
