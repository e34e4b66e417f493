from __future__ import annotations

from collections.abc import Iterator

import pytest

from crosspool.cli.client import ServerClient, _lines
from crosspool.core.errors import ConfigError, CrossPoolError
from helpers_canned_server import CannedServer, canned_server

pytestmark = pytest.mark.integration

CHAT = "/v1/chat/completions"


@pytest.fixture
def server() -> Iterator[CannedServer]:
    with canned_server() as canned:
        yield canned


def piece(text: str | None) -> dict[str, object]:
    delta = {"role": "assistant"} if text is None else {"content": text}
    return {"choices": [{"index": 0, "delta": delta}]}


def test_a_stream_gives_its_text_piece_by_piece(server: CannedServer) -> None:
    server.answer_stream(CHAT, piece(None), piece("Pa"), piece("ris"), {"choices": []}, "[DONE]")
    with ServerClient(server.url, "secret") as client:
        assert "".join(client.stream_chat({"model": "a"})) == "Paris"
    assert server.bodies == [{"model": "a", "stream": True}]
    assert server.keys == ["Bearer secret"]


def test_only_newlines_end_a_line(server: CannedServer) -> None:
    text = "a\u2028b\u0085c\x1ed\x0be"
    server.answer_stream(CHAT, piece(text), "[DONE]")
    with ServerClient(server.url) as client:
        assert list(client.stream_chat({})) == [text]


def test_lines_are_put_together_from_whatever_arrives() -> None:
    chunks = [b"data: \xe2", b"\x80\xa8x\r", b"\n", b"\ndata: y\nz"]
    assert list(_lines(iter(chunks))) == ["data: \u2028x", "", "data: y"]


@pytest.mark.parametrize("key", ["é", "", "a\nb"])
def test_a_key_that_cannot_be_one(server: CannedServer, key: str) -> None:
    with pytest.raises(ConfigError, match="API key must be printable ASCII"):
        ServerClient(server.url, key)


def test_an_error_within_a_stream_is_raised_after_what_came_before(server: CannedServer) -> None:
    server.answer_stream(CHAT, piece("Pa"), {"error": {"message": "the engine process ended"}})
    with ServerClient(server.url) as client:
        pieces = client.stream_chat({"model": "a"})
        assert next(pieces) == "Pa"
        with pytest.raises(CrossPoolError, match="broke off: the engine process ended"):
            next(pieces)


def test_a_stream_that_ends_without_done_was_cut_off(server: CannedServer) -> None:
    server.answer_stream(CHAT, piece("Pa"))
    with ServerClient(server.url) as client, pytest.raises(CrossPoolError, match="cut off"):
        list(client.stream_chat({"model": "a"}))


@pytest.mark.parametrize("streaming", [False, True])
def test_the_servers_message_is_passed_on(server: CannedServer, streaming: bool) -> None:
    server.answer_json(CHAT, {"error": {"message": "the model a does not exist"}}, 404)
    with ServerClient(server.url) as client, pytest.raises(CrossPoolError, match="404: the model a does not"):
        list(client.stream_chat({})) if streaming else client.chat({})


def test_a_whole_answer(server: CannedServer) -> None:
    server.answer_json(CHAT, {"choices": []})
    with ServerClient(server.url + "/") as client:
        assert client.chat({"model": "a"}) == {"choices": []}


@pytest.mark.parametrize("status", [200, 503])
def test_models_are_listed_whether_the_server_is_ready_or_not(server: CannedServer, status: int) -> None:
    server.answer_json("/ready", {"models": [{"name": "a"}]}, status)
    with ServerClient(server.url) as client:
        assert client.models() == [{"name": "a"}]


def test_no_server() -> None:
    with canned_server() as gone:
        pass
    with (
        ServerClient(gone.url) as client,
        pytest.raises(CrossPoolError, match=f"no server at {gone.url}; start"),
    ):
        client.models()


@pytest.mark.parametrize("url", ["foo", "http://[", "ftp://127.0.0.1"])
def test_what_is_no_url_is_told(url: str) -> None:
    with pytest.raises(CrossPoolError, match=r"no (answer from|server at)"), ServerClient(url) as client:
        client.models()


def test_another_kind_of_server_is_told(server: CannedServer) -> None:
    server.answers["/ready"] = (200, "text/html", b"<html>")
    server.answer_stream(CHAT, {"greeting": "hello"})
    with ServerClient(server.url) as client:
        with pytest.raises(CrossPoolError, match="does not answer as an OpenAI-compatible server"):
            client.models()
        with pytest.raises(CrossPoolError, match="does not answer as an OpenAI-compatible server"):
            list(client.stream_chat({}))
