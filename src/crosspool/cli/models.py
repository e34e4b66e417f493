"""``crosspool models``: what a running server serves."""

from __future__ import annotations

import json
from typing import Any

import typer

from crosspool.cli.options import DEFAULT_URL, ApiKey, Json, Url


def models(url: Url = DEFAULT_URL, api_key: ApiKey = None, as_json: Json = False) -> None:
    """List the models of a running server: whether they serve, where their weights are, and their sizes.

    Of a server on this machine, on the usual port:

        crosspool models

    As JSON, sizes are numbers of bytes:

        crosspool models --url http://127.0.0.1:9000 --json
    """
    from crosspool.cli.client import ServerClient
    from crosspool.cli.tables import output_console, print_table

    with ServerClient(url, api_key) as client:
        entries = client.models()
    if as_json:
        typer.echo(json.dumps(entries, indent=2, ensure_ascii=False))
        return
    columns = ("model", "state", "attention side", "FFN weights", "KV per token", "longest sequence")
    console = output_console()
    print_table(console, f"Models of {url}", columns, [_row(entry) for entry in entries])
    for entry in entries:
        if entry["error"] is not None:
            console.print(f"{entry['name']}: {entry['error']}", markup=False, highlight=False, soft_wrap=True)


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    from crosspool.cli.sizes import format_bytes

    if entry["error"] is not None:
        return (entry["name"], "failed", "", "", "", "")
    if not entry["ready"]:
        return (entry["name"], "not ready", "", "", "", "")
    return (
        entry["name"],
        entry["residency"],
        format_bytes(entry["attention_bytes"]),
        format_bytes(entry["ffn_bytes"]),
        format_bytes(entry["kv_bytes_per_token"]),
        f"{entry['max_model_len']:,} tokens",
    )
