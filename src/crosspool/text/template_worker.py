"""The process that renders chat templates. Run by template_process.py as a script of its own.

A template comes with a model and is not to be trusted: it runs in Jinja2's immutable sandbox, here, with a
bounded address space and a bounded CPU time, where the worst it can do is to have this process killed.
Nothing of crosspool is imported: the process stays small and there is nothing to reach.

Requests and answers are JSON objects, each after its length as four bytes, big-endian. A request has
``template`` and ``variables``; an answer has ``text``, or ``error`` (the template's own words) or ``failure``
(what went wrong, for the log).
"""

from __future__ import annotations

import json
import resource
import struct
import sys
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, BinaryIO

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class RaisedByTemplateError(Exception):
    """The template called ``raise_exception``."""


class GenerationBlocks(Extension):
    """``{% generation %} ... {% endgeneration %}`` marks the assistant's words for training; no more here."""

    tags = {"generation"}  # noqa: RUF012 - the type is jinja2's

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def make_environment() -> ImmutableSandboxedEnvironment:
    """The sandbox with the functions and filters that public chat templates expect."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationBlocks]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def render(template: jinja2.Template, variables: Mapping[str, Any], max_characters: int) -> str:
    """Render, giving up with ValueError as soon as the text is longer than ``max_characters``."""
    parts: list[str] = []
    length = 0
    for part in template.generate(variables):
        length += len(part)
        if length > max_characters:
            raise ValueError(f"the text is longer than {max_characters} characters")
        parts.append(part)
    return "".join(parts)


def serve(requests: BinaryIO, answers: BinaryIO, cpu_seconds: int, max_characters: int) -> None:
    """Answer requests until there are no more."""
    compiled = lru_cache(maxsize=8)(make_environment().from_string)
    while (request := read_frame(requests)) is not None:
        _allow_cpu(cpu_seconds)
        write_frame(answers, _answer(compiled, request, max_characters))


def read_frame(stream: BinaryIO) -> dict[str, Any] | None:
    """The next object, or None at the end of the stream."""
    header = stream.read(4)
    if len(header) < 4:
        return None
    (length,) = struct.unpack(">I", header)
    payload = stream.read(length)
    if len(payload) < length:
        return None
    content: dict[str, Any] = json.loads(payload)
    return content


def write_frame(stream: BinaryIO, content: Mapping[str, Any]) -> None:
    payload = json.dumps(content).encode()
    stream.write(struct.pack(">I", len(payload)) + payload)
    stream.flush()


def _answer(compiled: Any, request: Mapping[str, Any], max_characters: int) -> dict[str, str]:
    try:
        return {"text": render(compiled(request["template"]), request["variables"], max_characters)}
    except RaisedByTemplateError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"failure": "out of memory"}
    except Exception as error:  # a template can raise anything
        return {"failure": f"{type(error).__name__}: {error}"[:1000]}


def _allow_cpu(seconds: int) -> None:
    """Let the process use so much CPU time from now on; beyond it the system kills it."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(usage.ru_utime + usage.ru_stime) + 1 + seconds, hard))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, where jinja2's own filter would escape it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: object) -> None:
    raise RaisedByTemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


if __name__ == "__main__":
    memory_bytes, cpu, characters = map(int, sys.argv[1:])
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    serve(sys.stdin.buffer, sys.stdout.buffer, cpu, characters)
