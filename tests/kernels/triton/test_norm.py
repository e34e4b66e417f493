"""Embeddings and norms, against the reference, for two models in one table each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crosspool.kernels import reference
from crosspool.kernels.triton import words
from crosspool.kernels.triton.batch import Pass
from crosspool.kernels.triton.norm import embed, final_norm, layer_norm
from helpers_attention_half import drawn
from helpers_triton import DEVICE
from helpers_triton_gates import SM_90, Target, assert_builds_well, needs_interpreter, on_targets
from helpers_triton_lanes import ModelWords, lane_of

pytestmark = pytest.mark.backend

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""One unit in the last place."""
EPSILON = 0.25
ROWS = [(7, 2), (0, 3), (4, 1)]
SPARE = 2


class Model:
    """Weights of three layers' norms, a final norm and an embedding."""

    def __init__(self, size: int, dtype: torch.dtype, seed: int) -> None:
        self.norms = [
            {word: 1 + drawn(size, seed=seed + 2 * layer + word).to(dtype) for word in NORMS}
            for layer in range(3)
        ]
        self.final = 1 + drawn(size, seed=seed + 20).to(dtype)
        self.embedding = drawn(11, size, seed=seed + 30).to(dtype)
        lane = {words.FINAL_NORM: self.final, words.EMBEDDING: self.embedding}
        self.words = ModelWords(self.norms, lane)

    def lane(self) -> Pass:
        return lane_of(self.words, ROWS, spare_rows=SPARE, spare_queries=SPARE)


NORMS = (words.INPUT_NORM, words.FFN_NORM)


def stream(size: int, dtype: torch.dtype, seed: int) -> Tensor:
    return (3 * size**0.5 * drawn(6 + SPARE, size, seed=seed)).to(dtype).to(DEVICE)


def assert_near(computed: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(computed.cpu(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [96, 45])
@pytest.mark.parametrize("word", NORMS)
def test_a_layers_norm_with_and_without_addition(dtype: torch.dtype, size: int, word: int) -> None:
    models = [Model(size, dtype, seed) for seed in (0, 100)]
    for model in models:
        batch, hidden, addend = model.lane(), stream(size, dtype, 1), stream(size, dtype, 2)
        before, out = hidden.cpu().clone(), torch.full_like(hidden, 7)
        layer_norm(batch, 1, word, hidden, None, out, EPSILON)
        assert_near(out[:6], reference.rms_norm(before, model.norms[1][word], EPSILON)[:6])
        assert torch.equal(hidden.cpu(), before)

        layer_norm(batch, 2, word, hidden, addend, out, EPSILON)
        total = before + addend.cpu()
        assert torch.equal(hidden[:6].cpu(), total[:6])
        assert_near(out[:6], reference.rms_norm(total, model.norms[2][word], EPSILON)[:6])
        assert torch.equal(hidden[6:].cpu(), before[6:])
        assert out[6:].eq(7).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_final_norm_is_of_each_rows_last_query(dtype: torch.dtype) -> None:
    model = Model(45, dtype, 0)
    hidden, addend = stream(45, dtype, 1), stream(45, dtype, 2)
    out = torch.full((3 + SPARE, 45), 7, dtype=dtype, device=DEVICE)
    final_norm(model.lane(), hidden, addend, out, EPSILON)
    total = hidden.cpu() + addend.cpu()
    assert_near(out[:3], reference.rms_norm(total[[1, 4, 5]], model.final, EPSILON))
    assert out[3:].eq(7).all()


def test_no_row_without_queries_has_a_final_norm() -> None:
    model = Model(45, torch.float32, 0)
    out = torch.full((3, 45), 7.0, device=DEVICE)
    hidden = stream(45, torch.float32, 1)
    final_norm(lane_of(model.words, [(0, 0), (0, 2), (3, 0)]), hidden, None, out, EPSILON)
    assert out[[0, 2]].eq(7).all()
    assert_near(out[1], reference.rms_norm(hidden[1].cpu(), model.final, EPSILON))


@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
def test_embeddings_are_copied(kind: torch.dtype) -> None:
    model = Model(45, torch.bfloat16, 0)
    tokens = torch.tensor([3, 0, 10, 3, 7, 1, 99, 99], dtype=kind, device=DEVICE)
    hidden = torch.full((8, 45), 7, dtype=torch.bfloat16, device=DEVICE)
    embed(model.lane(), tokens, hidden)
    assert torch.equal(hidden[:6].cpu(), model.embedding[tokens[:6].cpu()])
    assert hidden[6:].eq(7).all()


def launch_at_real_size() -> None:
    """Qwen3-30B-A3B, 32 rows."""
    batch = lane_of(ModelWords([{}]), [(0, 1)] * 32)
    hidden = torch.empty(32, 2048, dtype=torch.bfloat16)
    layer_norm(batch, 3, words.FFN_NORM, hidden, hidden, hidden, EPSILON)
    final_norm(batch, hidden, hidden, hidden, EPSILON)
    embed(batch, batch.row_of, hidden)


@needs_interpreter
@on_targets({"qwen3-30b-a3b": launch_at_real_size}, (SM_90,))
def test_gates(launch: object, target: Target) -> None:
    assert_builds_well(launch, target)
