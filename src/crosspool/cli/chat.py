"""``crosspool chat``: talk to a model of a running server."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crosspool.cli.options import DEFAULT_URL, ApiKey, Json, Url
from crosspool.core.errors import ConfigError, CrossPoolError

if TYPE_CHECKING:
    from crosspool.cli.client import ServerClient

_HELP = "/reset forgets the conversation, /exit (or Ctrl-D) ends it, Ctrl-C stops an answer."


def chat(
    model: Annotated[str, typer.Argument(help="A model that the server serves; see `crosspool models`.")],
    question: Annotated[
        str | None, typer.Argument(help="Ask this, print the answer and end. Without it: a conversation.")
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 always takes the most probable token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample among the most probable tokens of this share.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.")] = None,
    as_json: Json = False,
) -> None:
    """Talk to a model of a running server.

    A conversation:

        crosspool chat smollm2-135m

    One question, given or piped in:

        crosspool chat smollm2-135m "What is the capital of France?"

        echo "Name three fruits." | crosspool chat smollm2-135m --temperature 0.7 --seed 1
    """
    from crosspool.cli.client import ServerClient

    body: dict[str, Any] = {"model": model, "max_tokens": max_tokens}
    body |= {"temperature": temperature, "top_p": top_p}
    if seed is not None:
        body["seed"] = seed
    opening = [] if system is None else [{"role": "system", "content": system}]
    if question is None and not _is_interactive():
        question = sys.stdin.read().rstrip("\n")
    if question is None and as_json:
        raise ConfigError("--json needs a question: crosspool chat MODEL QUESTION --json")
    if question is not None and not question.strip():
        raise ConfigError("the question is empty")
    with ServerClient(url, api_key) as client:
        if question is None:
            _check_served(client, model)
            _converse(client, body, opening)
        else:
            body["messages"] = [*opening, {"role": "user", "content": question}]
            _ask_once(client, body, as_json)


def _is_interactive() -> bool:
    return sys.stdin.isatty()


def _ask_once(client: ServerClient, body: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(client.chat(body), indent=2, ensure_ascii=False))
        return
    for piece in client.stream_chat(body):
        typer.echo(piece, nl=False)
    typer.echo()


def _check_served(client: ServerClient, model: str) -> None:
    names = [entry["name"] for entry in client.models()]
    if model not in names:
        raise CrossPoolError(f"the server has no model {model}; it has {', '.join(names) or 'none yet'}")


def _converse(client: ServerClient, body: dict[str, Any], opening: list[dict[str, str]]) -> None:
    import readline  # noqa: F401  (gives input() a history and editing keys)

    typer.echo(f"Talking to {body['model']}. {_HELP}")
    messages = list(opening)
    while True:
        try:
            question = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            typer.echo()
            return
        match question:
            case "":
                continue
            case "/exit":
                return
            case "/reset":
                messages = list(opening)
                continue
        messages.append({"role": "user", "content": question})
        try:
            answer = _print_answer(client, {**body, "messages": messages})
        except CrossPoolError as error:
            messages.pop()
            typer.echo(f"crosspool: {error}", err=True)
        else:
            messages.append({"role": "assistant", "content": answer})


def _print_answer(client: ServerClient, body: dict[str, Any]) -> str:
    """Print an answer as it comes and return it. Ctrl-C ends it early; what was said stays said."""
    answer = ""
    with closing(client.stream_chat(body)) as pieces:
        try:
            for piece in pieces:
                typer.echo(piece, nl=False)
                answer += piece
        except KeyboardInterrupt:
            typer.echo(" ...", nl=False)
    typer.echo()
    return answer
