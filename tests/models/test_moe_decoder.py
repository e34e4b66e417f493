"""The two halves of a model: what they refuse, what they leave alone, and lower precision."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from crosspool.core.errors import ConfigError, InvariantError
from crosspool.core.kv_layout import make_layout
from crosspool.kernels.reference import rms_norm
from crosspool.models.loader import Checkpoint, load_attention_side
from crosspool.models.moe_decoder import AttentionSide, ffn
from crosspool.models.registry import read_spec
from crosspool.models.weights import GqaWeights, MlaWeights
from helpers_model_configs import CONFIGS
from helpers_models import STALE, PagedModel, public_logprobs, random_model, save_model

pytestmark = pytest.mark.backend

PROMPT = [(29 * i + 7) % 97 for i in range(40)]


def paged(folder: Path, name: str, dtype: str = "auto") -> PagedModel:
    return PagedModel(save_model(random_model(CONFIGS[name]()), folder), dtype=dtype)


def table(*pages: int) -> torch.Tensor:
    return torch.tensor(pages, dtype=torch.int64)


def test_a_batch_says_where_queries_stand_and_where_their_kv_goes(tmp_path: Path) -> None:
    side = paged(tmp_path, "llama").side
    tables = [[table(5, 9, 2), table(1, 8, 3)], [table(4), table(6)]]
    batch = side.batch([18, 3], [3, 1], tables)
    assert batch.positions.tolist() == [18, 19, 20, 3]
    assert batch.query_starts == (0, 3, 4)
    assert batch.first_positions == (18, 3)
    assert [pages.tolist() for pages in batch.pages_written] == [[5, 9, 9, 4], [1, 8, 8, 6]]
    assert batch.slots_written.tolist() == [18, 0, 1, 3]
    assert batch.num_rows == 2
    assert batch.longest_context == 21
    assert batch.page_tables[1][1].tolist() == [6]


def test_pages_that_were_given_back_are_not_mistaken_for_the_last_of_the_arena(tmp_path: Path) -> None:
    side = paged(tmp_path, "mistral-window-one-kv-head").side
    given_back = [[table(-1, 5, 6), table(-1, 7, 8)]]
    assert side.batch([45], [1], given_back).pages_written[0].tolist() == [6]
    with pytest.raises(InvariantError, match="row 0, layer group 0: positions 40 to 40 need pages 0 to 2"):
        side.batch([40], [1], given_back)
    with pytest.raises(InvariantError, match="layer group 1"):
        side.batch([45], [1], [[table(-1, 5, 6), table(-1, 7, -1)]])


def test_a_page_table_that_is_too_short(tmp_path: Path) -> None:
    side = paged(tmp_path, "llama").side
    with pytest.raises(InvariantError, match=r"positions 18 to 19 need pages 0 to 1 of \[4\]"):
        side.batch([18], [2], [[table(4), table(5)]])


def test_only_the_pages_of_the_rows_are_written(tmp_path: Path) -> None:
    model = paged(tmp_path, "deepseek-v2-greedy")
    model.prefill("a", PROMPT)
    written = (model.arena != STALE).any(dim=1)
    assert int(written.sum()) == model.layout.pages(len(PROMPT))
    used = 19 * max(len(group.layers) for group in model.layout.groups) * model.layout.bytes_per_token_layer
    assert (model.arena[:, used:] == STALE).all()


def slot(model: PagedModel, page: int, layer: int, elements: int, place: int) -> torch.Tensor:
    """The ``elements`` numbers at ``place`` of a layer's part of a page, by core/kv_layout.py's words."""
    numbers = model.arena[page].view(torch.float32)
    layer_size = model.layout.tokens_per_page * model.layout.bytes_per_token_layer // 4
    begin = model.layout.place_of_layer[layer] * layer_size + place * elements
    return numbers[begin : begin + elements]


def layer_input(model: PagedModel, layer: int, tokens: list[int]) -> torch.Tensor:
    """Normed hidden states that go into a layer's attention."""
    batch = model.side.batch([0], [len(tokens)], [[torch.arange(3)] * len(model.layout.groups)])
    hidden, arena = model.side.embed(torch.tensor(tokens)), model.arena.clone()
    for before in range(layer):
        hidden, ffn_input = model.side.attention(before, hidden, batch, arena)
        hidden = hidden + ffn(model.spec.layers[before].ffn, model.ffns[before], ffn_input)
    return rms_norm(hidden, model.weights.layers[layer].input_norm, model.spec.norm_eps)


def test_values_lie_in_a_page_as_the_layout_says(tmp_path: Path) -> None:
    model = paged(tmp_path, "qwen2")
    tokens, layer = PROMPT[:22], 1
    assert model.layout.place_of_layer[layer] == 1
    normed = layer_input(model, layer, tokens)
    model.prefill("a", tokens)
    weights = model.weights.layers[layer].attention
    assert isinstance(weights, GqaWeights)
    values = functional.linear(normed, weights.value, weights.value_bias)
    pages = model.pages("a", model.layout.group_of_layer[layer])
    for position in (0, 18, 19, 21):
        page, token = pages[position // 19], position % 19
        stored = slot(model, page, layer, 3 * 14, 19 + token)
        torch.testing.assert_close(stored, values[position], atol=1e-5, rtol=1e-5)


def test_latents_lie_in_a_page_as_the_layout_says(tmp_path: Path) -> None:
    model = paged(tmp_path, "glm-query-latent")
    tokens, layer = PROMPT[:22], 1
    assert model.layout.place_of_layer[layer] == 1
    normed = layer_input(model, layer, tokens)
    model.prefill("a", tokens)
    weights = model.weights.layers[layer].attention
    assert isinstance(weights, MlaWeights)
    latents = rms_norm(functional.linear(normed, weights.latent)[:, :20], weights.latent_norm, 1e-6)
    pages = model.pages("a", model.layout.group_of_layer[layer])
    for position in (0, 18, 19, 21):
        page, token = pages[position // 19], position % 19
        stored = slot(model, page, layer, 26, token)[:20]
        torch.testing.assert_close(stored, latents[position], atol=1e-5, rtol=1e-5)


def test_two_models_share_an_arena(tmp_path: Path) -> None:
    """Of one page size, each with its own layout; what one gives back the other takes over."""
    first = paged(tmp_path / "first", "llama")
    second = paged(tmp_path / "second", "deepseek-v2-greedy")
    alone = second.prefill("a", PROMPT)
    other = PagedModel(tmp_path / "second")
    other.side = AttentionSide(
        other.spec,
        make_layout(other.spec, first.layout.page_bytes),
        load_attention_side(other.spec, Checkpoint(tmp_path / "second")),
    )
    other.layout, other.arena = other.side.layout, first.arena
    first.prefill("b", PROMPT)
    torch.testing.assert_close(other.prefill("a", PROMPT), alone, atol=1e-5, rtol=1e-5)


def test_a_page_that_elements_do_not_divide(tmp_path: Path) -> None:
    folder = save_model(random_model(CONFIGS["llama"]()), tmp_path)
    spec = read_spec(folder)
    with pytest.raises(ConfigError, match="9,999 bytes is not a multiple of 4"):
        AttentionSide(spec, make_layout(spec, 9999), load_attention_side(spec, Checkpoint(folder)))


def test_weights_of_another_kind_of_attention(tmp_path: Path) -> None:
    latent = paged(tmp_path / "latent", "deepseek-v2-greedy")
    grouped = paged(tmp_path / "grouped", "llama")
    spec = replace(latent.spec, attention=grouped.spec.attention)
    side = AttentionSide(
        spec,
        make_layout(spec, grouped.layout.page_bytes),
        load_attention_side(latent.spec, Checkpoint(tmp_path / "latent")),
    )
    batch = side.batch([0], [1], [[table(0)] * len(side.layout.groups)])
    with pytest.raises(InvariantError, match="weights of another kind of attention"):
        side.attention(0, side.embed(torch.tensor([1])), batch, grouped.arena)


def test_experts_without_their_router(tmp_path: Path) -> None:
    model = paged(tmp_path, "mixtral-3-experts")
    with pytest.raises(InvariantError, match="lack their router"):
        ffn(model.spec.layers[0].ffn, replace(model.ffns[0], router=None), torch.zeros(1, 36))


def test_attention_side_bytes(tmp_path: Path) -> None:
    model = paged(tmp_path, "qwen2")
    assert model.side.bytes == model.spec.attention_side_bytes


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["qwen3", "mixtral-3-experts", "deepseek-v2-yarn", "glm-query-latent"])
def test_lower_precision_agrees_with_float32(tmp_path: Path, name: str, dtype: str) -> None:
    """Log-probabilities near those of the public model in float32, logits in float32."""
    public = random_model(CONFIGS[name]())
    model = PagedModel(save_model(public, tmp_path), dtype=dtype)
    expected = public_logprobs(public, PROMPT)
    whole = model.prefill("whole", PROMPT)
    chunked = model.prefill("chunked", PROMPT, (7, 12, 20))
    assert whole.dtype is torch.float32
    assert model.arena.dtype is torch.uint8
    for ours in (whole, chunked):
        error = (ours - expected).abs()
        assert float(error.median()) < 0.05
        assert float((ours.argmax(-1) == expected.argmax(-1)).float().mean()) > 0.8
