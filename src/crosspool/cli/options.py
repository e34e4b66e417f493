"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Url = Annotated[str, typer.Option("--url", help="Where the server is.")]
ApiKey = Annotated[
    str | None, typer.Option("--api-key", help="The key that the server asks for, if it does.")
]

DEFAULT_URL = "http://127.0.0.1:8000"
