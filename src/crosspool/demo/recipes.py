"""What is in the zoo, and how one model of it is written."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosspool.core.info import LoadProgress
from crosspool.demo.checkpoint import NamedTensor, weights_bytes, write_json, write_safetensors
from crosspool.demo.gguf_llama import GgufLlama
from crosspool.demo.random_models import (
    deepseek_v2_config,
    deepseek_v2_shapes,
    qwen3_moe_config,
    qwen3_moe_shapes,
    random_tensors,
)
from crosspool.demo.source import REQUIREMENT
from crosspool.demo.tokenizer import write_tokenizer
from crosspool.demo.upcycle import upcycle, upcycle_config
from crosspool.demo.zoo import Weights, ZooModel

Progress = Callable[[LoadProgress], None]

DENSE = "smollm2-135m"

_ORIGIN = (
    "SmolLM2-135M-Instruct by HuggingFaceTB, Apache-2.0, as quantised to GGUF Q4_1 in the Python package "
    f"{REQUIREMENT}"
)
_LICENCE = "Apache-2.0"


@dataclass(frozen=True, slots=True)
class Recipe:
    """One model, ready to be written. ``source`` is a sentence for its README."""

    name: str
    weights: Weights
    source: str
    config: dict[str, Any]
    tensors: list[NamedTensor]


def recipes(gguf: GgufLlama) -> Iterator[Recipe]:
    """The models of the zoo, one at a time, since each holds all its weights."""
    config, dense = gguf.config(), gguf.tensors()
    yield Recipe(DENSE, Weights.REAL, f"{_ORIGIN}; dequantised to bfloat16.", config, dense)
    for experts in (4, 8):
        source = f"{_ORIGIN}; dequantised to bfloat16, every FFN copied into {experts} experts."
        made = upcycle(dense, experts, seed=experts)
        yield Recipe(
            f"smollm2-moe-{experts}x", Weights.UPCYCLED, source, upcycle_config(config, experts), made
        )
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size")}
    qwen, deepseek = qwen3_moe_config(ids), deepseek_v2_config(ids)
    source = "Random weights of seed {}: the answers mean nothing. The tokenizer is SmolLM2's."
    for name, config, shapes, seed in (
        ("random-qwen3-moe", qwen, qwen3_moe_shapes(qwen), 1),
        ("random-deepseek-v2", deepseek, deepseek_v2_shapes(deepseek), 2),
    ):
        yield Recipe(name, Weights.RANDOM, source.format(seed), config, random_tensors(shapes, seed))


def write_model(recipe: Recipe, gguf: GgufLlama, licence: Path, folder: Path, progress: Progress) -> ZooModel:
    """Write one model to a new folder: config, tokenizer, weights, licence and README."""
    folder.mkdir()
    done, total = 0, weights_bytes(recipe.tensors)
    progress(LoadProgress(recipe.name, 0, total))

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(LoadProgress(recipe.name, done, total))

    write_json(folder / "config.json", recipe.config)
    ids = {key: recipe.config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", ids)
    write_tokenizer(gguf, folder)
    shutil.copyfile(licence, folder / "LICENSE")
    (folder / "README.md").write_text(
        f"# {recipe.name}\n\nWeights: {recipe.weights}. {recipe.source}\n\n"
        "Made by `crosspool demo build`; not a published model.\n",
        encoding="utf-8",
    )
    write_safetensors(folder / "model.safetensors", recipe.tensors, advance)
    return ZooModel(
        name=recipe.name,
        architecture=recipe.config["architectures"][0],
        weights=recipe.weights,
        parameters=sum(values.size for _, values in recipe.tensors),
        source=recipe.source,
        licence=_LICENCE,
        files={file.name: file.stat().st_size for file in sorted(folder.iterdir())},
    )
