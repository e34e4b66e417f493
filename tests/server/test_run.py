"""A server in processes of its own, over a fake engine: its life, its end, and the failures around it."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from crosspool.core.config import EngineConfig, ModelConfig
from crosspool.core.errors import ConfigError
from crosspool.server.config import ServerConfig
from crosspool.server.run import serve
from helpers_polling import wait_until
from helpers_server import RunningServer, running_server
from helpers_sse import read_events
from helpers_tiny_tokenizer import save_tiny_tokenizer

pytestmark = pytest.mark.integration

LONG = {"model": "tiny", "prompt": "abc", "max_tokens": 800}


@pytest.fixture
def models(tokenizer_folder: Path) -> dict[str, Path]:
    return {"tiny": tokenizer_folder, "broken": tokenizer_folder.parent / "broken"}


@pytest.fixture
def server(models: dict[str, Path]) -> Iterator[RunningServer]:
    with running_server(models) as server:
        yield server


def complete(server: RunningServer, **body: object) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json={**LONG, **body}, timeout=60)


async def test_the_official_client_can_chat_and_complete(server: RunningServer) -> None:
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none")
    messages = [{"role": "user", "content": "Hi"}]
    chat = await client.chat.completions.create(model="tiny", messages=messages, max_tokens=7)
    assert (chat.choices[0].message.content, chat.choices[0].finish_reason) == ("user:Hi", "length")
    stream = await client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=7, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content for chunk in chunks[:-1]) == "user:Hi"
    assert chunks[-1].usage.completion_tokens == 7
    text = await client.completions.create(model="tiny", prompt=["ab", "c"], max_tokens=3, logprobs=1)
    assert [choice.text for choice in text.choices] == ["aba", "ccc"]
    assert text.choices[0].logprobs.tokens == ["a", "b", "a"]
    streamed = await client.completions.create(model="tiny", prompt="ab", max_tokens=3, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in streamed]) == "aba"
    assert [model.id async for model in client.models.list()] == ["tiny"]
    assert (await client.models.retrieve("tiny")).id == "tiny"
    with pytest.raises(openai.NotFoundError):
        await client.completions.create(model="nobody", prompt="a")
    with pytest.raises(openai.BadRequestError, match="n must be within"):
        await client.completions.create(model="tiny", prompt="a", n=99)
    await client.close()


def test_the_api_process_does_not_load_torch(server: RunningServer) -> None:
    complete(server, max_tokens=3)
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "pydantic_core" in maps, "the test cannot see what is loaded"
    assert "libtorch" not in maps


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
async def test_a_client_that_leaves_gives_back_its_pages_within_500_ms(
    server: RunningServer, stream: bool, phase: str
) -> None:
    """The fake engine reads 4 tokens of a prompt in 5 ms, so 600 take it 0.75 s."""
    prompt, limit = ("x" * 600, 10) if phase == "prefill" else ("abc", 800)
    body = {"model": "tiny", "prompt": prompt, "max_tokens": limit, "stream": stream}
    with server.send_request("/v1/completions", body) as connection:
        if phase == "decode" and stream:
            connection.recv(10_000)
        await wait_until(lambda: not server.all_pages_free(), "the request holds no pages", 10)
    await wait_until(server.all_pages_free, "pages are still held", 0.5)
    metrics = httpx.get(f"{server.url}/metrics").text
    assert 'vllm:request_success_total{finished_reason="abort",model_name="tiny"} 1.0' in metrics


async def test_when_the_cell_is_killed_streams_end_with_an_error_and_the_server_recovers(
    server: RunningServer,
) -> None:
    async with httpx.AsyncClient(timeout=60) as client:
        request = client.stream("POST", f"{server.url}/v1/completions", json={**LONG, "stream": True})
        async with request as response:
            pieces = response.aiter_text()
            text = await anext(pieces)
            server.cell().send_signal(signal.SIGKILL)
            async with asyncio.timeout(2):
                text += "".join([piece async for piece in pieces])
    assert read_events(text)[-1]["error"]["code"] == "engine_unavailable"
    await wait_until(lambda: not server.ready(), "still ready", 2)
    assert httpx.get(f"{server.url}/health").status_code == 200
    refused = complete(server)
    assert refused.status_code == 503
    await wait_until(server.ready, "not ready again", 20)
    assert complete(server, max_tokens=3).json()["choices"][0]["text"] == "abc"
    assert server.metric("crosspool_engine_starts_total") == 2


async def test_after_a_restart_the_front_knows_the_models_of_the_new_engine(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    with running_server({"tiny": folder}) as server:
        assert "no tokenizer" in complete(server).json()["error"]["message"]
        save_tiny_tokenizer(folder)
        server.cell().kill()
        await wait_until(lambda: not server.ready(), "still ready", 5)
        await wait_until(server.ready, "not ready again", 20)
        assert complete(server, max_tokens=3).json()["choices"][0]["text"] == "abc"


def test_a_request_for_more_choices_than_the_queue_takes_is_not_told_to_come_back(
    models: dict[str, Path],
) -> None:
    with running_server(models, scheduler={"max_waiting": 2}) as server:
        assert complete(server, n=2, max_tokens=1).status_code == 200
        refused = complete(server, n=3)
        messages = [{"role": "user", "content": "a"}]
        chat = httpx.post(
            f"{server.url}/v1/chat/completions", json={"model": "tiny", "messages": messages, "n": 3}
        )
    for response in (refused, chat):
        assert response.status_code == 400
        assert "at most 2 are made" in response.json()["error"]["message"]


async def test_sigterm_drains_running_requests_and_refuses_new_ones(server: RunningServer) -> None:
    with ThreadPoolExecutor() as pool:
        running = [pool.submit(complete, server, max_tokens=400, stream=stream) for stream in (True, False)]
        await wait_until(lambda: not server.all_pages_free(), "nothing runs", 10)
        server.process.send_signal(signal.SIGTERM)
        await wait_until(lambda: not server.ready(), "still ready", 1)
        refused = complete(server)
        assert refused.status_code == 503
        assert "shutting down" in refused.json()["error"]["message"]
        streamed, whole = [future.result(60) for future in running]
    assert read_events(streamed.text)[-1] == "[DONE]"
    assert whole.json()["usage"]["completion_tokens"] == 400
    assert server.process.wait(30) == 0


async def test_what_does_not_finish_in_the_time_of_the_drain_ends_with_an_error(
    models: dict[str, Path],
) -> None:
    with running_server(models, server={"drain_timeout": 0.5}) as server:
        with ThreadPoolExecutor() as pool:
            running = [pool.submit(complete, server, stream=stream) for stream in (True, False)]
            await wait_until(lambda: not server.all_pages_free(), "nothing runs", 10)
            cell = server.cell()
            server.process.send_signal(signal.SIGTERM)
            streamed, whole = [future.result(60) for future in running]
        assert "shut down" in read_events(streamed.text)[-1]["error"]["message"]
        assert whole.status_code == 503
        assert server.process.wait(30) == 0
        assert not cell.is_running()


async def test_while_models_load_the_server_answers_and_can_be_stopped(models: dict[str, Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    silent = (sys.executable, "-c", "import time; time.sleep(600)", "--socket")
    with running_server(models, cell_command=silent, server={"port": port}, url=url) as server:
        await wait_until(lambda: answers(f"{url}/health"), "not live", 20)
        response = httpx.get(f"{url}/ready")
        assert (response.status_code, response.json()["engine"]) == (503, "loading")
        assert "loading" in complete(server).json()["error"]["message"]
        cell = server.cell()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        assert not cell.is_running()


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.ConnectError:
        return False


async def test_a_second_signal_ends_the_drain(server: RunningServer) -> None:
    with ThreadPoolExecutor() as pool:
        running = pool.submit(complete, server, stream=True)
        await wait_until(lambda: not server.all_pages_free(), "nothing runs", 10)
        server.process.send_signal(signal.SIGINT)
        await wait_until(lambda: not server.ready(), "still ready", 1)
        server.process.send_signal(signal.SIGINT)
        assert "error" in read_events(running.result(60).text)[-1]
    assert server.process.wait(30) == 0


async def test_the_cell_ends_when_the_api_process_is_killed(server: RunningServer) -> None:
    cell = server.cell()
    server.process.kill()
    await wait_until(lambda: not cell.is_running() or cell.status() == "zombie", "the cell lives on", 20)


@pytest.fixture(scope="module")
def impatient(tokenizer_folder: Path) -> Iterator[RunningServer]:
    limits = {"header_timeout": 0.5, "max_header_bytes": 4096}
    with running_server({"tiny": tokenizer_folder}, server={"limits": limits}) as server:
        yield server


def read_answer(connection: socket.socket) -> bytes:
    """An answer whose body is one JSON object."""
    answer = b""
    while not answer.endswith(b"}"):
        answer += connection.recv(1000)
    return answer


@pytest.mark.parametrize("content", [b"", b"GET /health HTTP/1.1\r\nHost:"])
def test_headers_that_do_not_arrive_are_not_waited_for(impatient: RunningServer, content: bytes) -> None:
    with impatient.connect() as connection:
        connection.sendall(content)
        assert connection.recv(100) == b""


async def test_a_connection_that_is_kept_has_the_same_time_for_each_request(impatient: RunningServer) -> None:
    with impatient.connect() as connection:
        for _ in range(2):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            assert b"200 OK" in read_answer(connection)
            await asyncio.sleep(0.7)
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        assert connection.recv(1000) == b""


@pytest.mark.parametrize("head", ["GET /health", "POST /v1/completions"])
def test_a_body_that_was_answered_before_its_end_is_not_waited_for(
    impatient: RunningServer, head: str
) -> None:
    with impatient.connect() as connection:
        connection.sendall(f"{head} HTTP/1.1\r\nHost: a\r\nContent-Length: 100000000\r\n\r\n".encode())
        assert connection.recv(10_000).startswith(b"HTTP/1.1")
        connection.sendall(b"x")
        connection.settimeout(10)
        while connection.recv(10_000):
            pass


async def test_a_connection_whose_body_came_after_the_answer_serves_the_next_request(
    impatient: RunningServer,
) -> None:
    with impatient.connect() as connection:
        connection.sendall(b"GET /version HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\n")
        assert b"version" in read_answer(connection)
        connection.sendall(b"xyzGET /version HTTP/1.1\r\nHost: a\r\n\r\n")
        assert b"version" in read_answer(connection)
        await asyncio.sleep(0.7)
        connection.sendall(b"GET /version HTTP/1.1\r\nHost: a\r\n\r\n")
        assert b"version" in read_answer(connection)


def test_headers_beyond_their_size_are_refused(impatient: RunningServer) -> None:
    with impatient.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 5000)
        assert b"400 Bad Request" in connection.recv(1000)


def test_a_port_in_use_is_told_before_anything_is_loaded(fake_config: EngineConfig) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1 is in use"):
            serve(fake_config, ServerConfig(port=port), cell_command=("/nothing/to/run",))


def test_a_host_that_is_not_ours_is_told(fake_config: EngineConfig) -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1"):
        serve(fake_config, ServerConfig(host="192.0.2.1", port=0), cell_command=("/nothing/to/run",))


def test_a_configuration_that_cannot_work_ends_the_server(
    tokenizer_folder: Path, fake_cell_command: tuple[str, ...]
) -> None:
    config = EngineConfig(models=(ModelConfig("a", str(tokenizer_folder.parent / "unusable")),))
    with pytest.raises(ConfigError, match="the pools do not fit"):
        serve(config, ServerConfig(port=0), cell_command=fake_cell_command)
