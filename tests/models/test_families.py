"""Every family against the public config class and the names and shapes of the public model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from crosspool.core.errors import CorruptCheckpointError, UnsupportedModelError
from crosspool.core.spec import GqaSpec, MlaSpec, ModelSpec
from crosspool.kernels.reference import ACTIVATIONS
from crosspool.models import weight_names
from crosspool.models.families import common
from crosspool.models.geometries import GEOMETRIES
from crosspool.models.registry import FAMILIES, read_spec

pytestmark = pytest.mark.backend

PUBLIC = GEOMETRIES
MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MixtralForCausalLM": "mixtral",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "Glm4MoeLiteForCausalLM": "glm4_moe_lite",
}
REQUIRED = {"DeepseekV2ForCausalLM": {"num_experts_per_tok": 6}}
"""Fields without a default in the public class."""


def public_config(architecture: str, values: dict[str, Any]) -> PreTrainedConfig:
    known = {key: value for key, value in values.items() if key != "auto_map"}
    config: PreTrainedConfig = CONFIG_MAPPING[MODEL_TYPES[architecture]].from_dict(known)
    return config


def public_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Shapes without storage."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def saved_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Names and shapes as in a saved checkpoint. A tied head is not saved."""
    saved = revert_weight_conversion(model, model.state_dict())
    shapes = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    if model.config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def asked_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    names = FAMILIES[spec.architecture].names
    slots = weight_names.all_slots(spec, names)
    return {slot.name: slot.shape for slot in slots}


def spec_of(folder: Path, architecture: str, **values: Any) -> ModelSpec:
    file = folder / "config.json"
    file.write_text(json.dumps({"architectures": [architecture], **values}), encoding="utf-8")
    return read_spec(folder)


@pytest.mark.parametrize("name", sorted(folder.parent.name for folder in PUBLIC.glob("*/config.json")))
def test_public_checkpoints_have_what_is_asked_for(name: str) -> None:
    values = json.loads((PUBLIC / name / "config.json").read_text(encoding="utf-8"))
    spec = read_spec(PUBLIC / name)
    model = public_model(public_config(spec.architecture, values))
    assert asked_shapes(spec) == saved_shapes(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    biases = sum(buffer.numel() for key, buffer in model.named_buffers() if "correction_bias" in key)
    assert spec.attention_side_bytes + spec.total_ffn_bytes == 2 * parameters + 4 * biases


@pytest.mark.parametrize("architecture", FAMILIES)
def test_an_empty_config_is_the_default_of_the_public_class(tmp_path: Path, architecture: str) -> None:
    values = REQUIRED.get(architecture, {})
    spec = spec_of(tmp_path, architecture, **values)
    public = public_config(architecture, values)
    model = public_model(public)
    assert asked_shapes(spec) == saved_shapes(model)
    assert spec.max_context == public.max_position_embeddings
    assert spec.norm_eps == public.rms_norm_eps
    assert spec.tied_embeddings == public.tie_word_embeddings
    assert spec.rope.theta == public.rope_parameters["rope_theta"]
    assert spec.eos_token_ids == (() if public.eos_token_id is None else (public.eos_token_id,))
    assert spec.attention.scale == pytest.approx(model.model.layers[0].self_attn.scaling)
    assert {layer.ffn.activation for layer in spec.layers} == {public.hidden_act}
    windows = {layer.window for layer in spec.layers}
    assert windows == {getattr(public, "sliding_window", None)}
    check_routers(spec, public)
    check_heads(spec, public)


def check_routers(spec: ModelSpec, public: PreTrainedConfig) -> None:
    routers = [layer.ffn.router for layer in spec.layers if layer.ffn.router is not None]
    assert all(router == routers[0] for router in routers)
    if not routers:
        return
    router = routers[0]
    assert router.top_k == public.num_experts_per_tok
    assert router.scale == getattr(public, "routed_scaling_factor", 1.0)
    assert router.normalise == getattr(public, "norm_topk_prob", spec.architecture == "MixtralForCausalLM")
    assert router.groups == (getattr(public, "n_group", None) or 1)
    assert router.top_groups == (getattr(public, "topk_group", None) or 1)


def check_heads(spec: ModelSpec, public: PreTrainedConfig) -> None:
    assert spec.attention.num_heads == public.num_attention_heads
    if isinstance(spec.attention, GqaSpec):
        assert spec.attention.num_kv_heads == public.num_key_value_heads
        assert spec.rope.dim == spec.attention.head_dim
    else:
        assert spec.attention.qk_rope_head_dim == spec.rope.dim == public.qk_rope_head_dim


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize(
    "values",
    [
        {"use_sliding_window": True, "max_window_layers": 3, "sliding_window": 9},
        {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 9},
        {"use_sliding_window": True, "max_window_layers": 99},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
        {"use_sliding_window": False, "sliding_window": 9, "max_window_layers": 0},
        {
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 3,
        },
    ],
)
def test_windows_of_qwen(tmp_path: Path, architecture: str, values: dict[str, Any]) -> None:
    spec = spec_of(tmp_path, architecture, num_hidden_layers=5, **values)
    public = public_config(architecture, {"num_hidden_layers": 5, **values})
    expected = [public.sliding_window if kind == "sliding_attention" else None for kind in public.layer_types]
    assert [layer.window for layer in spec.layers] == expected


@pytest.mark.parametrize(
    "values",
    [
        {"decoder_sparse_step": 2},
        {"decoder_sparse_step": 3, "mlp_only_layers": [2]},
        {"mlp_only_layers": [0, 4, 77]},
        {"decoder_sparse_step": 9},
    ],
)
def test_sparse_layers_of_qwen3_moe(tmp_path: Path, values: dict[str, Any]) -> None:
    spec = spec_of(tmp_path, "Qwen3MoeForCausalLM", num_hidden_layers=6, **values)
    model = public_model(public_config("Qwen3MoeForCausalLM", {"num_hidden_layers": 6, **values}))
    assert asked_shapes(spec) == saved_shapes(model)


def test_heads_of_qwen3_are_128_wide_unless_said(tmp_path: Path) -> None:
    heads = {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8}
    spec = spec_of(tmp_path, "Qwen3ForCausalLM", **heads)
    assert isinstance(spec.attention, GqaSpec)
    assert spec.attention.head_dim == 128
    moe = spec_of(tmp_path, "Qwen3MoeForCausalLM", **heads)
    assert isinstance(moe.attention, GqaSpec)
    assert moe.attention.head_dim == 64


@pytest.mark.parametrize("first", [0, 1, 3, 9])
def test_leading_dense_layers(tmp_path: Path, first: int) -> None:
    for architecture in ("DeepseekV2ForCausalLM", "Glm4MoeLiteForCausalLM"):
        spec = spec_of(
            tmp_path,
            architecture,
            num_hidden_layers=5,
            num_experts_per_tok=2,
            first_k_dense_replace=first,
        )
        dense = [layer.ffn.router is None for layer in spec.layers]
        assert dense == [layer < first for layer in range(5)]


def test_shared_experts_may_be_absent(tmp_path: Path) -> None:
    for none in (0, None):
        spec = spec_of(tmp_path, "DeepseekV2ForCausalLM", num_experts_per_tok=2, n_shared_experts=none)
        assert spec.layers[0].ffn.shared_intermediate == 0
        assert weight_names.ffn_slots(spec, FAMILIES[spec.architecture].names, 0).shared is None


def test_groups_count_only_for_the_group_limited_method(tmp_path: Path) -> None:
    values = {"num_experts_per_tok": 3, "n_group": 8, "topk_group": 2}
    router = spec_of(tmp_path, "DeepseekV2ForCausalLM", **values).layers[0].ffn.router
    assert router is not None
    assert (router.groups, router.top_groups) == (1, 1)
    limited = {**values, "topk_method": "group_limited_greedy"}
    router = spec_of(tmp_path, "DeepseekV2ForCausalLM", **limited).layers[0].ffn.router
    assert router is not None
    assert (router.groups, router.top_groups) == (8, 2)


def test_scale_of_latent_attention_includes_yarn(tmp_path: Path) -> None:
    for name in ("deepseek-v2-lite", "deepseek-v2"):
        values = json.loads((PUBLIC / name / "config.json").read_text(encoding="utf-8"))
        attention = read_spec(PUBLIC / name).attention
        public = public_model(public_config("DeepseekV2ForCausalLM", {**values, "num_hidden_layers": 1}))
        assert isinstance(attention, MlaSpec)
        assert attention.scale == pytest.approx(public.model.layers[0].self_attn.scaling)
        assert attention.scale > 1.2 * 192**-0.5


@pytest.mark.parametrize(
    ("architecture", "values", "message"),
    [
        ("DeepseekV2ForCausalLM", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc'"),
        ("DeepseekV2ForCausalLM", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("DeepseekV2ForCausalLM", {"scoring_func": "sigmoid"}, "scoring_func 'sigmoid'"),
        ("DeepseekV2ForCausalLM", {"moe_layer_freq": 2}, "moe_layer_freq 2"),
        ("DeepseekV2ForCausalLM", {"mlp_bias": True}, "mlp_bias"),
        ("Glm4MoeLiteForCausalLM", {"topk_method": "greedy"}, "topk_method 'greedy'"),
        (
            "Qwen2ForCausalLM",
            {"num_hidden_layers": 1, "layer_types": ["chunked_attention"]},
            "chunked_attention",
        ),
    ],
)
def test_variants_that_are_refused(
    tmp_path: Path, architecture: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        spec_of(tmp_path, architecture, num_experts_per_tok=2, **values)


@pytest.mark.parametrize(
    ("architecture", "values", "message"),
    [
        ("MixtralForCausalLM", {"num_experts_per_tok": 9}, "at most the 8 experts to choose from, not 9"),
        ("Qwen3MoeForCausalLM", {"mlp_only_layers": ["1"]}, "mlp_only_layers must be a list"),
        ("Qwen3ForCausalLM", {"layer_types": ["full_attention"]}, "a list of 32 layer types"),
        (
            "Qwen3ForCausalLM",
            {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]},
            "sliding_window must be set",
        ),
        ("Glm4MoeLiteForCausalLM", {"n_group": 3}, "n_group must be a divisor of 64 experts, not 3"),
        ("Glm4MoeLiteForCausalLM", {"n_group": 64}, "at most half of 64 experts"),
        ("Glm4MoeLiteForCausalLM", {"n_group": 2, "topk_group": 3}, "topk_group must be at most the 2"),
        (
            "Glm4MoeLiteForCausalLM",
            {"n_group": 32, "topk_group": 1},
            "at most the 2 experts to choose from, not 4",
        ),
        ("Glm4MoeLiteForCausalLM", {"mlp_layer_types": ["dense", "sparse"]}, "a list of 47 times"),
        ("DeepseekV2ForCausalLM", {}, "num_experts_per_tok must be an integer"),
    ],
)
def test_configs_that_are_wrong(
    tmp_path: Path, architecture: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(CorruptCheckpointError, match=message):
        spec_of(tmp_path, architecture, **values)


def test_every_activation_that_a_config_may_name_has_a_kernel() -> None:
    assert set(common.ACTIVATIONS) == set(ACTIVATIONS)
