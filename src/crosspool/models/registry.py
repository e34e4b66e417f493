"""Architectures to families, and a model folder's config.json to its ModelSpec. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from crosspool.core.errors import CorruptCheckpointError, UnsupportedModelError
from crosspool.core.spec import DType, ModelSpec
from crosspool.models.families import (
    deepseek_v2,
    glm4_moe_lite,
    llama,
    mistral,
    mixtral,
    qwen2,
    qwen3,
    qwen3_moe,
)
from crosspool.models.families.common import Family, model_spec
from crosspool.models.public_config import PublicConfig, read_json
from crosspool.models.quantisation import read_quantisation

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        module.FAMILY.architecture: module.FAMILY
        for module in (llama, mistral, qwen2, qwen3, mixtral, qwen3_moe, deepseek_v2, glm4_moe_lite)
    }
)


def family(architecture: str) -> Family:
    """Raises UnsupportedModelError for an unknown architecture."""
    found = FAMILIES.get(architecture)
    if found is None:
        raise UnsupportedModelError(f"no family for {architecture}; supported: {', '.join(FAMILIES)}")
    return found


def read_spec(path: str | Path, dtype: str = "auto", weights_dtype: str = "auto") -> ModelSpec:
    """The geometry of the model in a folder, from config.json and, if there is one, generation_config.json.

    ``dtype`` "auto" is the one the config states (float32 where it states none, as the public config classes
    have it); "float32", "bfloat16" or "float16" override it. ``weights_dtype`` "int8" is for all large
    matrices and "float8" for those of FFNs; with "auto" FFNs are float8 that are stored so. Raises
    CorruptCheckpointError for a file that is missing or wrong, UnsupportedModelError for what no family
    covers.
    """
    folder = Path(path)
    file = folder / "config.json"
    values = read_json(file)
    chosen = _family(file, values)
    config = PublicConfig(file, values, chosen.defaults)
    stored = read_quantisation(config)
    spec = model_spec(chosen, config, _dtype(config, dtype), _eos_token_ids(folder, config))
    if weights_dtype == "int8":
        return replace(spec, int8_weights=True)
    if weights_dtype == "float8":
        return spec.with_float8(range(spec.num_layers))
    return spec if stored is None else spec.with_float8(stored.layers(spec, chosen.names))


def _family(file: Path, values: Mapping[str, Any]) -> Family:
    architectures = values.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise UnsupportedModelError(f"{file} names no architectures; supported: {', '.join(FAMILIES)}")
    for name in architectures:
        if isinstance(name, str) and name in FAMILIES:
            return FAMILIES[name]
    names = ", ".join(map(str, architectures))
    raise UnsupportedModelError(f"{file}: no family for {names}; supported: {', '.join(FAMILIES)}")


def _dtype(config: PublicConfig, override: str) -> DType:
    name = override if override != "auto" else config.get("dtype", "torch_dtype") or DType.FLOAT32
    if name not in tuple(DType):
        raise config.unsupported(f"dtype {name!r} is not supported, only {', '.join(DType)}")
    return DType(name)


def _eos_token_ids(folder: Path, config: PublicConfig) -> tuple[int, ...]:
    """End-of-sequence ids: generation_config.json's if it names any, otherwise config.json's."""
    file = folder / "generation_config.json"
    value = read_json(file).get("eos_token_id") if file.is_file() else None
    if value is None:
        file, value = config.file, config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise CorruptCheckpointError(
            f"{file}: eos_token_id must be an integer or a list of them, not {value!r}"
        )
    return tuple(dict.fromkeys(ids))
