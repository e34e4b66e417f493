from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from crosspool.cli import chat
from crosspool.cli.app import app
from helpers_canned_server import CannedServer, canned_server

pytestmark = pytest.mark.integration

CHAT = "/v1/chat/completions"


@pytest.fixture
def server() -> Iterator[CannedServer]:
    with canned_server() as canned:
        canned.answer_json("/ready", {"models": [{"name": "a"}, {"name": "b"}]})
        pieces = [{"choices": [{"delta": {"content": text}}]} for text in ("Pa", "ris")]
        canned.answer_stream(CHAT, *pieces, "[DONE]")
        yield canned


def test_one_question(server: CannedServer) -> None:
    result = CliRunner().invoke(app, ["chat", "a", "Capital of France?", "--url", server.url])
    assert (result.exit_code, result.stdout) == (0, "Paris\n")
    assert server.bodies == [
        {
            "model": "a",
            "max_tokens": 512,
            "temperature": 0.0,
            "top_p": 1.0,
            "messages": [{"role": "user", "content": "Capital of France?"}],
            "stream": True,
        }
    ]


def test_every_option_reaches_the_server(server: CannedServer) -> None:
    options = "--system Brief. --max-tokens 9 --temperature 0.5 --top-p 0.9 --seed 3 --api-key k"
    CliRunner().invoke(app, ["chat", "a", "hi", "--url", server.url, *options.split()])
    (body,) = server.bodies
    assert (body["max_tokens"], body["temperature"], body["top_p"], body["seed"]) == (9, 0.5, 0.9, 3)
    assert body["messages"][0] == {"role": "system", "content": "Brief."}
    assert server.keys == ["Bearer k"]


def test_a_question_that_is_piped_in(server: CannedServer) -> None:
    result = CliRunner().invoke(app, ["chat", "a", "--url", server.url], input="line 1\nline 2\n")
    assert result.stdout == "Paris\n"
    assert server.bodies[0]["messages"] == [{"role": "user", "content": "line 1\nline 2"}]


@pytest.mark.parametrize(("arguments", "piped"), [([], ""), ([], "\n"), ([" "], None)])
def test_an_empty_question_is_not_sent(server: CannedServer, arguments: list[str], piped: str | None) -> None:
    result = CliRunner().invoke(app, ["chat", "a", *arguments, "--url", server.url], input=piped)
    assert (result.exit_code, server.bodies) == (2, [])
    assert result.stderr == "crosspool: the question is empty\n"


def test_json_is_the_servers_whole_answer(server: CannedServer) -> None:
    server.answer_json(CHAT, {"choices": [{"message": {"content": "Paris"}}]})
    result = CliRunner().invoke(app, ["chat", "a", "hi", "--url", server.url, "--json"])
    assert json.loads(result.stdout) == {"choices": [{"message": {"content": "Paris"}}]}
    assert "stream" not in server.bodies[0]


def test_a_refusal_is_one_line(server: CannedServer) -> None:
    server.answer_json(CHAT, {"error": {"message": "the model z does not exist"}}, 404)
    result = CliRunner().invoke(app, ["chat", "z", "hi", "--url", server.url])
    assert result.exit_code == 1
    assert result.stderr == f"crosspool: {server.url} answered 404: the model z does not exist\n"


class Typist:
    """Types lines at the prompt, then Ctrl-D."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
        self.lines = list(lines)
        monkeypatch.setattr("builtins.input", self)
        monkeypatch.setattr(chat, "_is_interactive", lambda: True)

    def __call__(self, prompt: str) -> str:
        if not self.lines:
            raise EOFError
        return self.lines.pop(0)


def test_a_conversation_remembers_until_reset(server: CannedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    Typist(monkeypatch, "first", "", "second", "/reset", "third")
    result = CliRunner().invoke(app, ["chat", "a", "--url", server.url, "--system", "Brief."])
    assert result.exit_code == 0, result.output
    opening = {"role": "system", "content": "Brief."}
    first, second, third = ({"role": "user", "content": text} for text in ("first", "second", "third"))
    said = {"role": "assistant", "content": "Paris"}
    assert [body["messages"] for body in server.bodies] == [
        [opening, first],
        [opening, first, said, second],
        [opening, third],
    ]
    assert result.stdout.count("Paris\n") == 3


def test_a_failed_turn_is_forgotten_and_the_conversation_goes_on(
    server: CannedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    Typist(monkeypatch, "first", "second", "/exit", "never")
    server.answer_json(CHAT, {"error": {"message": "too long"}}, 400)
    result = CliRunner().invoke(app, ["chat", "a", "--url", server.url])
    assert result.exit_code == 0
    assert result.stderr.count("answered 400: too long") == 2
    assert [len(body["messages"]) for body in server.bodies] == [1, 1]


def test_a_conversation_with_no_such_model_does_not_begin(
    server: CannedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    Typist(monkeypatch, "first")
    result = CliRunner().invoke(app, ["chat", "z", "--url", server.url])
    assert (result.exit_code, server.bodies) == (1, [])
    assert "no model z; it has a, b" in result.stderr


def test_a_conversation_has_no_json(server: CannedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    Typist(monkeypatch)
    result = CliRunner().invoke(app, ["chat", "a", "--url", server.url, "--json"])
    assert result.exit_code == 2
    assert "--json needs a question" in result.stderr


def test_ctrl_c_ends_an_answer_but_not_the_conversation(
    server: CannedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from crosspool.cli.client import ServerClient

    def interrupted(self: ServerClient, body: dict[str, object]) -> Iterator[str]:
        server.bodies.append(json.loads(json.dumps(body)))
        yield "Pa"
        raise KeyboardInterrupt

    monkeypatch.setattr(ServerClient, "stream_chat", interrupted)
    Typist(monkeypatch, "first", "second")
    result = CliRunner().invoke(app, ["chat", "a", "--url", server.url])
    assert result.exit_code == 0
    assert server.bodies[1]["messages"][1] == {"role": "assistant", "content": "Pa"}
