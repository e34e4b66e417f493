"""What ``crosspool serve`` says when it is ready: the models, both pools, and what to try."""

from __future__ import annotations

import json
from dataclasses import asdict

from crosspool.cli.sizes import format_bytes
from crosspool.cli.tables import output_console, print_table
from crosspool.core.info import EngineInfo, ModelInfo
from crosspool.server.config import ServerConfig

MODEL_COLUMNS = (
    *("model", "architecture", "dtype", "attention side", "FFN weights", "state"),
    *("KV per token", "longest sequence"),
)
QUESTION = "What is the capital of France?"


def json_summary(info: EngineInfo, url: str) -> str:
    return json.dumps({"url": url, **asdict(info)}, ensure_ascii=False)


def print_summary(info: EngineInfo, server: ServerConfig, url: str) -> None:
    console = output_console()
    console.print()
    print_table(console, "Models", MODEL_COLUMNS, [_model_row(model) for model in info.models])
    print_table(console, "Pools", ("pool", "devices", "size", "used by weights", "pages"), _pool_rows(info))
    serving = [model.name for model in info.models if model.error is None]
    if serving:
        console.print(_what_to_try(serving[0], server, url), markup=False, highlight=False, soft_wrap=True)


def _model_row(model: ModelInfo) -> tuple[str, ...]:
    if model.error is not None:
        return (model.name, "", "", "", "", "failed", "", "")
    longest = model.longest
    return (
        model.name,
        model.architecture.removesuffix("ForCausalLM"),
        model.dtype if model.weights_dtype in ("", model.dtype) else f"{model.dtype}, {model.weights_dtype}",
        format_bytes(model.attention_bytes),
        format_bytes(model.ffn_bytes),
        str(model.residency),
        format_bytes(model.kv_bytes_per_token),
        f"{longest:,} tokens",
    )


def _pool_rows(info: EngineInfo) -> list[tuple[str, ...]]:
    pages = f"{info.kv_pages:,} of {format_bytes(info.page_bytes)}, shared by all models"
    return [
        ("KV", ", ".join(info.kv_devices), format_bytes(info.kv_pool_bytes), "", pages),
        (
            "weights",
            ", ".join(info.weights_devices),
            format_bytes(info.weights_pool_bytes),
            format_bytes(info.weights_used_bytes),
            "",
        ),
        ("spill store", "host", format_bytes(info.spill_store_bytes), "", ""),
    ]


def _what_to_try(model: str, server: ServerConfig, url: str) -> str:
    key = "" if server.api_key is None else " \\\n    -H 'Authorization: Bearer YOUR_KEY'"
    option = "" if url == "http://127.0.0.1:8000" else f" --url {url}"
    option += "" if server.api_key is None else " --api-key YOUR_KEY"
    messages = [{"role": "user", "content": QUESTION}]
    body = json.dumps({"model": model, "messages": messages, "max_tokens": 32, "temperature": 0})
    return (
        f"Serving on {url}. Try:\n\n"
        f'  crosspool chat {model} "{QUESTION}"{option}\n\n'
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\\n    -d '{body}'\n\n"
        "Ctrl-C ends it."
    )
