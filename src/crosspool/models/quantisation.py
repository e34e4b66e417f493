"""What a public config.json says of a quantised checkpoint. Standard library only.

One quantisation is read, that of DeepSeek-V3 (arXiv 2412.19437, section 3.3) and of Qwen3: a matrix
``x.weight`` in float8 (e4m3), and ``x.weight_scale_inv``, which has the factor of each of its blocks. The
config says which FFNs are held so; which tensors are stored so, their headers say (checkpoint.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType
from typing import Any

from crosspool.core.spec import FLOAT8_BLOCK, ModelSpec
from crosspool.models.public_config import PublicConfig
from crosspool.models.weight_names import WeightNames, ffn_slots

SUPPORTED = f'quant_method "fp8" with weight_block_size [{FLOAT8_BLOCK}, {FLOAT8_BLOCK}]'

FIELDS: Mapping[str, tuple[Any, Any]] = MappingProxyType(
    {
        "weight_block_size": ([FLOAT8_BLOCK, FLOAT8_BLOCK], None),
        "fmt": ("e4m3", "e4m3"),
        "activation_scheme": ("dynamic", "dynamic"),
        "expert_dtype": ("fp8", "fp8"),
    }
)
"""What each field must be, and what it is where it is left out. Activations are never quantised here: a
"dynamic" scheme has nothing of them in the checkpoint."""


@dataclass(frozen=True, slots=True)
class Float8Modules:
    """All linear modules of a checkpoint are float8 but those ``kept``: by their whole names, by the names of
    modules that they are in, or by ends of names."""

    kept: tuple[str, ...]

    def covers(self, module: str) -> bool:
        around = accumulate(module.split("."), "{}.{}".format)
        return not module.endswith(self.kept) and set(self.kept).isdisjoint(around)

    def layers(self, spec: ModelSpec, names: WeightNames) -> list[int]:
        """Layers whose FFN is float8: all of its matrices but the router."""
        return [layer for layer in range(spec.num_layers) if self._is_float8(spec, names, layer)]

    def _is_float8(self, spec: ModelSpec, names: WeightNames, layer: int) -> bool:
        slots = ffn_slots(spec, names, layer).matrices()
        return all(self.covers(slot.name.removesuffix(".weight")) for slot in slots)


def read_quantisation(config: PublicConfig) -> Float8Modules | None:
    """None if the checkpoint is not quantised. Raises UnsupportedModelError for a quantisation other than the
    SUPPORTED, CorruptCheckpointError for a list of modules that is none."""
    given = config.get("quantization_config") or config.get("compression_config")
    if not given:
        return None
    fields: dict[str, Any] = given if isinstance(given, dict) else {"quant_method": given}
    method = fields.get("quant_method", "unknown")
    if method != "fp8":
        raise config.unsupported(f"quantised with method {method}, which is not read; supported: {SUPPORTED}")
    for name, (wanted, default) in FIELDS.items():
        found = fields.get(name, default)
        if found != wanted:
            raise config.unsupported(
                f"quantised with method fp8 and {name} {found!r}, which is not read; supported: {SUPPORTED} "
                f"and {name} {wanted!r}"
            )
    kept = fields.get("modules_to_not_convert") or fields.get("ignored_layers") or ()
    if not isinstance(kept, list | tuple) or not all(_is_name(name) for name in kept):
        raise config.wrong("modules_to_not_convert", kept, "a list of names of modules")
    return Float8Modules(tuple(kept))


def _is_name(value: object) -> bool:
    """And no pattern, of which there are several kinds."""
    return isinstance(value, str) and re.fullmatch(r"[\w.-]+", value) is not None
