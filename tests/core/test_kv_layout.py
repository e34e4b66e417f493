"""How models lay tokens into pages."""

from __future__ import annotations

import pytest

from crosspool.core.errors import ConfigError
from crosspool.core.kv_layout import MIN_TOKENS_PER_PAGE, choose_page_bytes, make_layout
from helpers_specs import gqa_spec, mla_spec

pytestmark = pytest.mark.unit


def test_one_group_when_all_layers_fit() -> None:
    spec = gqa_spec(layers=4)
    layout = make_layout(spec, 16 * spec.kv_bytes_per_token)
    assert [group.layers for group in layout.groups] == [(0, 1, 2, 3)]
    assert layout.tokens_per_page == 16


def test_fewest_groups_and_what_is_left_goes_to_tokens() -> None:
    spec = gqa_spec(layers=5)
    layout = make_layout(spec, 16 * 4 * spec.kv_bytes_per_token_layer)
    assert [len(group.layers) for group in layout.groups] == [3, 2]
    assert layout.tokens_per_page == 21, "a page of 64 token-layers holds 21 tokens of 3 layers"
    assert (layout.chunks(21), layout.chunks(22), layout.pages(22)) == (1, 2, 4)


def test_windows_are_groups_of_their_own_and_free_what_nobody_sees() -> None:
    spec = gqa_spec(windows=(None, 20, None, 20))
    layout = make_layout(spec, 16 * 2 * spec.kv_bytes_per_token_layer)
    assert [(group.layers, group.window) for group in layout.groups] == [((0, 2), None), ((1, 3), 20)]
    assert layout.first_kept_chunk(0, 1000) == 0
    assert layout.first_kept_chunk(1, 18) == 0
    assert [layout.first_kept_chunk(1, position) for position in (34, 35, 51)] == [0, 1, 2]


def test_every_layer_has_a_place_and_a_page_holds_all_of_it() -> None:
    for spec in (gqa_spec(layers=7, kv_heads=3), mla_spec(layers=4), gqa_spec(windows=(8, None, 8, 9, None))):
        for factor in (16, 17, 33, 100):
            layout = make_layout(spec, factor * spec.kv_bytes_per_token_layer)
            places = {
                (layout.group_of_layer[layer], layout.place_of_layer[layer])
                for layer in range(spec.num_layers)
            }
            assert len(places) == spec.num_layers
            assert layout.tokens_per_page >= MIN_TOKENS_PER_PAGE
            widest = max(len(group.layers) for group in layout.groups)
            assert widest * layout.tokens_per_page * layout.bytes_per_token_layer <= layout.page_bytes


def test_a_page_too_small_for_one_layer_is_refused_with_numbers() -> None:
    with pytest.raises(ConfigError, match=r"100 bytes .* 16 tokens .* 512 bytes"):
        make_layout(gqa_spec(), 100)


def test_the_chosen_page_serves_all_models_with_little_waste() -> None:
    specs = [gqa_spec(layers=30, kv_heads=3, head_dim=64), mla_spec(layers=27, latent=512, rope=64)]
    page_bytes = choose_page_bytes(specs)
    assert page_bytes % 4096 == 0
    for spec in specs:
        layout = make_layout(spec, page_bytes)
        used = layout.tokens_per_page * spec.kv_bytes_per_token
        assert used / (page_bytes * len(layout.groups)) > 0.9
