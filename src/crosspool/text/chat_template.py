"""A model's chat template: where it is found, which messages it takes, how it is rendered.

Clients never send a template; they choose only what the model's own one is given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crosspool.core.errors import InvalidRequestError, ModelLoadError
from crosspool.text.template_process import TemplateLimits, TemplateProcess
from crosspool.text.tokenizer import read_json

MAX_TEMPLATE_BYTES = 2**20
RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "chat_template"})

Message = Mapping[str, Any]


class ChatTemplate:
    """The templates of one model by name: ``default``, and perhaps ``tool_use`` for calls with tools.

    ``special_tokens`` (``bos_token``, ``eos_token``, ...) are variables of every rendering. ``close`` ends
    the process that renders.
    """

    def __init__(
        self,
        sources: Mapping[str, str],
        special_tokens: Mapping[str, str],
        limits: TemplateLimits | None = None,
    ) -> None:
        self._sources = dict(sources)
        self._special_tokens = dict(special_tokens)
        self._process = TemplateProcess(limits)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text. Blocks while the template runs.

        ``messages`` come from ``normalise_messages``. ``tools`` are passed on as given. ``variables`` are
        further ones that the model's template knows (for instance ``enable_thinking``). Raises
        InvalidRequestError if the template refuses the messages.
        """
        overridden = sorted((RESERVED | self._special_tokens.keys()) & (variables or {}).keys())
        if overridden:
            raise InvalidRequestError(
                f"chat_template_kwargs may not set {', '.join(overridden)}", parameter="chat_template_kwargs"
            )
        given = {
            **self._special_tokens,
            **(variables or {}),
            "messages": list(messages),
            "tools": list(tools) if tools else None,
            "add_generation_prompt": add_generation_prompt,
        }
        name = "tool_use" if tools and "tool_use" in self._sources else "default"
        return self._process.render(self._sources[name], given)

    def close(self) -> None:
        self._process.close()


def load_chat_template(folder: str | Path, special_tokens: Mapping[str, str]) -> ChatTemplate | None:
    """The chat template of a model folder, or None if it has none.

    Looks for ``chat_template.jinja`` (with further ones in ``additional_chat_templates/``), then for
    ``chat_template`` in ``tokenizer_config.json``, one or a list of named ones. Raises ModelLoadError.
    """
    folder = Path(folder)
    main = folder / "chat_template.jinja"
    if main.is_file():
        sources = {"default": _read_template(main)}
        for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
            sources[path.stem] = _read_template(path)
    else:
        entry = read_json(folder / "tokenizer_config.json").get("chat_template")
        sources = _configured_templates(entry, folder)
    return ChatTemplate(sources, special_tokens) if "default" in sources else None


def normalise_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """OpenAI's messages as templates expect them: content is one text, its parts joined by newlines, and
    arguments of tool calls are objects.

    Raises InvalidRequestError, naming the message, for one that is malformed.
    """
    if not messages:
        raise InvalidRequestError("messages is empty", parameter="messages")
    return [_normalise_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _normalise_message(message: Message, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequestError(f"{where} must be an object", parameter="messages")
    if not isinstance(message.get("role"), str):
        raise InvalidRequestError(f"{where}.role must be text", parameter="messages")
    normal = dict(message)
    content = message.get("content")
    calls = message.get("tool_calls")
    if content is None and message["role"] != "assistant":
        raise InvalidRequestError(f"{where}.content is missing", parameter="messages")
    if content is not None:
        normal["content"] = content if isinstance(content, str) else _join_parts(content, where)
    elif not calls:
        # An answer that was empty, as OpenAI's clients send it back. Templates expect a text.
        normal["content"] = ""
    if calls:
        if not isinstance(calls, list):
            raise InvalidRequestError(f"{where}.tool_calls must be a list", parameter="messages")
        normal["tool_calls"] = [_with_parsed_arguments(call) for call in calls]
    return normal


def _join_parts(parts: Any, where: str) -> str:
    if not isinstance(parts, Sequence):
        raise InvalidRequestError(f"{where}.content must be text or a list of parts", parameter="messages")
    texts = []
    for i, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise InvalidRequestError(
                f"{where}.content[{i}] must be a part of type text, which is all that is served",
                parameter="messages",
            )
        texts.append(part["text"])
    return "\n".join(texts)


def _with_parsed_arguments(call: Any) -> Any:
    """A tool call whose arguments, JSON in a string by OpenAI's API, are the object that templates expect.

    Arguments that are no JSON object stay text: a model may have written them, and they are history.
    """
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    if not isinstance(arguments, dict):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _configured_templates(entry: Any, folder: Path) -> dict[str, str]:
    match entry:
        case None:
            return {}
        case str():
            return {"default": entry}
        case list() if all(
            isinstance(item, dict) and isinstance(item.get("template"), str) for item in entry
        ):
            return {str(item.get("name")): item["template"] for item in entry}
    raise ModelLoadError(
        f"{folder / 'tokenizer_config.json'}: chat_template is no template and no list of them"
    )


def _read_template(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_TEMPLATE_BYTES:
            raise ModelLoadError(f"{path} is larger than {MAX_TEMPLATE_BYTES:,} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} cannot be read: {error}") from error
