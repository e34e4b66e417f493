"""A model folder's config.json to its ModelSpec, and what is said about folders that cannot be served."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from crosspool.core.errors import CorruptCheckpointError, UnsupportedModelError
from crosspool.core.spec import DType, GqaSpec, ModelSpec
from crosspool.models.geometries import GEOMETRIES
from crosspool.models.registry import FAMILIES, family, read_spec

pytestmark = pytest.mark.unit

PUBLIC = GEOMETRIES
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "torch_dtype": "bfloat16",
}

FLOAT8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
MIXTURE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "n_routed_experts": 12,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
}


def spec_of(folder: Path, dtype: str = "auto", **changes: Any) -> ModelSpec:
    (folder / "config.json").write_text(json.dumps({**TINY, **changes}), encoding="utf-8")
    return read_spec(folder, dtype)


@pytest.mark.parametrize(
    ("name", "kv_bytes"),
    [("qwen3-30b-a3b", 98_304), ("deepseek-v2-lite", 31_104), ("glm-4.7-flash", 54_144)],
)
def test_kv_bytes_of_one_token(name: str, kv_bytes: int) -> None:
    assert read_spec(PUBLIC / name).kv_bytes_per_token == kv_bytes


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-3.1-8b", 8_030_261_248),
        ("mistral-7b-v0.1", 7_241_732_096),
        ("qwen2.5-7b-instruct", 7_615_616_512),
        ("qwen3-8b", 8_190_735_360),
        ("mixtral-8x7b-v0.1", 46_702_792_704),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("deepseek-v2-lite", 15_706_484_224),
        ("deepseek-v2", 235_741_434_880),
    ],
)
def test_total_parameters_are_those_of_the_model_card(name: str, parameters: int) -> None:
    spec = read_spec(PUBLIC / name)
    assert spec.attention_side_bytes + spec.total_ffn_bytes == 2 * parameters


def test_reading_a_spec_needs_no_torch() -> None:
    code = (
        "import sys; from crosspool.models.registry import read_spec; "
        f"read_spec({str(PUBLIC / 'glm-4.7-flash')!r}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_eight_families() -> None:
    assert set(FAMILIES) == {
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "MixtralForCausalLM",
        "Qwen3MoeForCausalLM",
        "DeepseekV2ForCausalLM",
        "Glm4MoeLiteForCausalLM",
    }
    assert family("MixtralForCausalLM").architecture == "MixtralForCausalLM"
    with pytest.raises(UnsupportedModelError, match="no family for Gpt2"):
        family("Gpt2")


def test_dtype_is_as_stored_or_as_asked(tmp_path: Path) -> None:
    assert spec_of(tmp_path).dtype is DType.BFLOAT16
    assert spec_of(tmp_path, torch_dtype="float16").dtype is DType.FLOAT16
    assert spec_of(tmp_path, dtype="float32").dtype is DType.FLOAT32
    assert read_spec(tmp_path, "float16").dtype is DType.FLOAT16
    without = {key: value for key, value in TINY.items() if key != "torch_dtype"}
    (tmp_path / "config.json").write_text(json.dumps(without), encoding="utf-8")
    assert read_spec(tmp_path).dtype is DType.FLOAT32
    with pytest.raises(UnsupportedModelError, match="dtype 'float8_e4m3fn' is not supported"):
        spec_of(tmp_path, torch_dtype="float8_e4m3fn")


def test_the_newer_dtype_key_goes_first(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "dtype": "float32"}), encoding="utf-8")
    assert read_spec(tmp_path).dtype is DType.FLOAT32


def test_end_of_sequence_ids(tmp_path: Path) -> None:
    generation = tmp_path / "generation_config.json"
    assert spec_of(tmp_path).eos_token_ids == (2,)
    assert spec_of(tmp_path, eos_token_id=None).eos_token_ids == ()
    assert spec_of(tmp_path, eos_token_id=[7, 9, 7]).eos_token_ids == (7, 9)
    generation.write_text('{"temperature": 0.6}', encoding="utf-8")
    assert spec_of(tmp_path, eos_token_id=5).eos_token_ids == (5,)
    generation.write_text('{"eos_token_id": [3, 4]}', encoding="utf-8")
    assert spec_of(tmp_path, eos_token_id=5).eos_token_ids == (3, 4)
    generation.write_text('{"eos_token_id": "</s>"}', encoding="utf-8")
    with pytest.raises(CorruptCheckpointError, match=r"generation_config.json: eos_token_id must be"):
        spec_of(tmp_path)
    generation.write_text("{", encoding="utf-8")
    with pytest.raises(CorruptCheckpointError, match=r"generation_config.json is not valid JSON"):
        spec_of(tmp_path)


def test_one_known_architecture_is_enough(tmp_path: Path) -> None:
    assert spec_of(tmp_path, architectures=["Custom", "LlamaForCausalLM"]).architecture == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": None}, "names no architectures; supported: Llama"),
        ({"architectures": []}, "names no architectures"),
        ({"architectures": "LlamaForCausalLM"}, "names no architectures"),
        ({"architectures": ["MambaForCausalLM", 3]}, "no family for MambaForCausalLM, 3; supported: Llama"),
        ({"quantization_config": {"quant_method": "gptq"}}, 'method gptq, .* supported: quant_method "fp8"'),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}, "method modelopt"),
        ({"quantization_config": "awq"}, "quantised with method awq"),
        ({"compression_config": {"format": "x"}}, "quantised with method unknown"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weight_block_size None .* [128, 128]"),
        ({"quantization_config": FLOAT8 | {"weight_block_size": [64, 128]}}, "weight_block_size [64, 128]"),
        ({"quantization_config": FLOAT8 | {"weight_block_size": [1, 32]}}, "weight_block_size [1, 32]"),
        ({"quantization_config": FLOAT8 | {"activation_scheme": "static"}}, "activation_scheme 'static'"),
        ({"quantization_config": FLOAT8 | {"fmt": "e5m2"}}, "fmt 'e5m2' .* fmt 'e4m3'"),
        ({"quantization_config": FLOAT8 | {"expert_dtype": "fp4"}}, "expert_dtype 'fp4'"),
        ({"hidden_act": "swish_glu"}, "hidden_act 'swish_glu' is not supported"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3 key-value heads"),
        ({"rope_scaling": {"type": "su", "factor": 2}}, "'su' is not supported"),
    ],
)
def test_models_that_are_not_covered(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        spec_of(tmp_path, **changes)
    assert str(tmp_path / "config.json") in str(error.value)
    for part in message.split(" .* "):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("kept", "float8"),
    [
        (None, [0, 1, 2, 3]),
        ([], [0, 1, 2, 3]),
        (["lm_head", "model.layers.1.mlp.gate", "model.layers.2.self_attn", "model.l"], [0, 1, 2, 3]),
        (["model.layers.1.mlp.experts.1"], [0, 2, 3]),
        (["model.layers.2.mlp.experts.11.down_proj"], [0, 1, 3]),
        (["model.layers.0.mlp.up_proj", "model.layers.3"], [1, 2]),
        (["shared_experts.gate_proj"], [0]),
        (["model"], []),
    ],
)
def test_ffns_are_float8_that_are_stored_so_wholly(
    tmp_path: Path, kept: list[str] | None, float8: list[int]
) -> None:
    """Names are of modules, or of what modules are in, or ends of names."""
    for key in ("modules_to_not_convert", "ignored_layers"):
        quantised = FLOAT8 | ({} if kept is None else {key: kept})
        spec = spec_of(tmp_path, quantization_config=quantised, **MIXTURE)
        assert [number for number, layer in enumerate(spec.layers) if layer.ffn.float8] == float8
        assert spec.weights_dtype == ("float8" if float8 else "bfloat16")


def test_what_is_asked_for_goes_before_what_is_stored(tmp_path: Path) -> None:
    plain = spec_of(tmp_path, **MIXTURE)
    float8 = read_spec(tmp_path, weights_dtype="float8")
    assert all(layer.ffn.float8 for layer in float8.layers) and float8.with_float8(()) == plain
    spec_of(tmp_path, quantization_config=FLOAT8 | {"modules_to_not_convert": ["model"]}, **MIXTURE)
    assert read_spec(tmp_path, weights_dtype="float8") == float8
    assert read_spec(tmp_path, weights_dtype="int8") == replace(plain, int8_weights=True)
    assert read_spec(tmp_path, weights_dtype="int8").weights_dtype == "int8"


def test_bytes_of_float8_ffns(tmp_path: Path) -> None:
    sizes = {"hidden_size": 130, "intermediate_size": 256, "n_shared_experts": 2}
    spec = spec_of(tmp_path, quantization_config=FLOAT8, **MIXTURE | sizes | {"moe_intermediate_size": 129})
    assert spec.ffn_bytes(0) == 3 * 130 * 256 + 4 * 3 * 2 * 2
    weights, blocks = 3 * 130 * (12 * 129 + 258), 3 * 2 * (12 * 2 + 3)
    assert spec.ffn_bytes(1) == weights + 4 * blocks + 2 * 12 * 130
    assert spec.ffn_bytes(1, parts=2) == spec.ffn_bytes(1)
    assert spec.attention_side_bytes == spec.with_float8(()).attention_side_bytes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "hidden_size must be an integer from 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be an integer from 1 to 65,536, not 0"),
        ({"num_hidden_layers": 2_000_000_000}, "not 2000000000"),
        ({"vocab_size": "50"}, "vocab_size must be"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps must be a number above 0"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
        *(
            (
                {"quantization_config": FLOAT8 | {"modules_to_not_convert": kept}},
                "modules_to_not_convert must be",
            )
            for kept in ("lm_head", [3], [""], ["model.layers.*.mlp"], {"a": 1})
        ),
    ],
)
def test_configs_that_are_wrong(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CorruptCheckpointError) as error:
        spec_of(tmp_path, **changes)
    assert str(tmp_path / "config.json") in str(error.value)
    assert message in str(error.value)


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpointError, match=r"config.json cannot be read"):
        read_spec(tmp_path / "nowhere")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CorruptCheckpointError, match=r"config.json cannot be read"):
        read_spec(tmp_path)


def test_derived_geometry(tmp_path: Path) -> None:
    attention = spec_of(tmp_path).attention
    assert isinstance(attention, GqaSpec)
    assert (attention.num_kv_heads, attention.head_dim) == (4, 6)
    assert attention.scale == pytest.approx(6**-0.5)
