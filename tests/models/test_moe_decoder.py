"""The two halves of a model: what they refuse, what they leave alone, and lower precision."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from crosspool.core.errors import ConfigError, InvariantError
from crosspool.core.kv_layout import make_layout
from crosspool.models.loader import Checkpoint, load_attention_side
from crosspool.models.moe_decoder import AttentionSide
from crosspool.models.registry import read_spec
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
