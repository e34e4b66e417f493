"""A server over the real engine: two tiny random models behind one endpoint, in two processes."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3MoeConfig

from crosspool.core.config import EngineConfig, ModelConfig
from crosspool.core.errors import ModelLoadError
from crosspool.server.config import ServerConfig
from crosspool.server.run import serve
from crosspool.server.supervisor import CELL_COMMAND
from helpers_models import random_model, save_model
from helpers_polling import wait_until
from helpers_server import RunningServer, running_server
from helpers_tiny_tokenizer import BOS_ID, EOS_ID, VOCAB_SIZE, save_tiny_tokenizer

pytestmark = pytest.mark.integration

CONTEXT = 32_768
POOLS = {"kv_pool_bytes": 16 << 20, "weights_pool_bytes": 64 << 20}
COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "dense": LlamaConfig(**COMMON, intermediate_size=64),
    "moe": Qwen3MoeConfig(
        **COMMON,
        head_dim=16,
        intermediate_size=64,
        moe_intermediate_size=24,
        num_experts=6,
        num_experts_per_tok=2,
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models that serve, and one whose weights are cut off."""
    torch.set_num_threads(1)
    folders = {}
    for name, config in CONFIGS.items():
        folders[name] = save_model(random_model(config), tmp_path_factory.mktemp(name))
        save_tiny_tokenizer(folders[name])
    cut = save_model(random_model(CONFIGS["dense"]), tmp_path_factory.mktemp("cut"))
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return {**folders, "cut": cut}


@pytest.fixture(scope="module")
def server(models: dict[str, Path]) -> Iterator[RunningServer]:
    with running_server(models, cell_command=CELL_COMMAND, pools=POOLS) as server:
        yield server


@pytest.fixture
async def client(server: RunningServer) -> openai.AsyncOpenAI:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120) as client:
        yield client


def greedy(folder: Path, prompt: list[int], count: int) -> list[int]:
    """What the public implementation continues with."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        output = model.generate(
            torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", list(CONFIGS))
async def test_greedy_tokens_are_those_of_the_public_implementation(
    client: openai.AsyncOpenAI, server: RunningServer, models: dict[str, Path], name: str
) -> None:
    prompt = [random.Random(1).randrange(256) for _ in range(100)]
    answer = await client.completions.create(
        model=name, prompt=prompt, max_tokens=20, temperature=0, logprobs=0, extra_body={"ignore_eos": True}
    )
    expected = greedy(models[name], prompt, 20)
    texts = httpx.post(f"{server.url}/detokenize", json={"model": name, "tokens": expected}).json()
    assert answer.choices[0].text == texts["prompt"]
    assert answer.usage.completion_tokens == 20
    assert answer.choices[0].finish_reason == "length"


async def test_chat_streams_the_same_answer_as_a_whole_one(client: openai.AsyncOpenAI) -> None:
    fields = {
        "model": "moe",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_completion_tokens": 30,
        "seed": 5,
    }
    whole = await client.chat.completions.create(**fields)
    stream = await client.chat.completions.create(**fields, stream=True)
    pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(pieces) == whole.choices[0].message.content


async def test_a_model_that_is_cut_off_fails_alone(client: openai.AsyncOpenAI, server: RunningServer) -> None:
    with pytest.raises(openai.InternalServerError, match="does not serve") as raised:
        await client.with_options(max_retries=0).completions.create(model="cut", prompt="a")
    assert raised.value.status_code == 503
    ready = httpx.get(f"{server.url}/ready")
    assert ready.status_code == 200
    assert {model["name"]: model["ready"] for model in ready.json()["models"]} == {
        "dense": True,
        "moe": True,
        "cut": False,
    }
    assert [model.id async for model in client.models.list()] == ["dense", "moe"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_gives_back_its_pages_within_500_ms(
    server: RunningServer, stream: bool
) -> None:
    await wait_until(server.all_pages_free, "pages are held from before", 10)
    for prompt in ("a", "x" * 3500):
        body = {"model": "moe", "prompt": prompt, "max_tokens": 20_000, "stream": stream, "ignore_eos": True}
        with server.send_request("/v1/completions", body):
            await wait_until(lambda: not server.all_pages_free(), "the request holds no pages", 20)
        await wait_until(server.all_pages_free, "pages are still held", 0.5)


async def test_many_requests_with_random_disconnects_leave_every_page_free(
    server: RunningServer,
) -> None:
    chance = random.Random(7)

    async def one(client: httpx.AsyncClient) -> int | None:
        body = {
            "model": chance.choice(["dense", "moe"]),
            "prompt": "x" * chance.randrange(1, 150),
            "max_tokens": chance.randrange(1, 20),
            "stream": chance.random() < 0.5,
        }
        patience = chance.choice([0.05, 0.3, 1.0, 120])
        try:
            async with asyncio.timeout(patience):
                return (await client.post(f"{server.url}/v1/completions", json=body)).status_code
        except TimeoutError:
            return None

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=120, limits=limits) as client:
        statuses = await asyncio.gather(*(one(client) for _ in range(40)))
    assert set(statuses) <= {200, None}
    assert 200 in statuses and None in statuses
    await wait_until(server.all_pages_free, "pages are still held", 5)


def test_if_no_model_loads_the_server_ends_and_says_why(models: dict[str, Path]) -> None:
    config = EngineConfig(models=(ModelConfig("cut", str(models["cut"])),))
    with pytest.raises(ModelLoadError, match=r"model\.safetensors"):
        serve(config, ServerConfig(port=0))


async def test_when_the_cell_is_killed_the_server_recovers(
    server: RunningServer, client: openai.AsyncOpenAI
) -> None:
    stream = await client.completions.create(
        model="dense", prompt="a", max_tokens=20_000, stream=True, extra_body={"ignore_eos": True}
    )
    await anext(stream)
    server.cell().send_signal(signal.SIGKILL)
    async with asyncio.timeout(2):
        with pytest.raises(openai.APIError):
            async for _ in stream:
                pass
    await wait_until(lambda: not server.ready(), "still ready", 2)
    await wait_until(server.ready, "not ready again", 60)
    answer = await client.completions.create(model="dense", prompt="a", max_tokens=3)
    assert answer.usage.completion_tokens <= 3


async def test_sigterm_drains(models: dict[str, Path]) -> None:
    patient = {"drain_timeout": 240}
    with running_server(models, cell_command=CELL_COMMAND, pools=POOLS, server=patient) as server:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120) as client:
            answer = client.completions.create(
                model="moe", prompt="a", max_tokens=10_000, extra_body={"ignore_eos": True}
            )
            running = asyncio.create_task(answer)
            await wait_until(lambda: not server.all_pages_free(), "nothing runs", 20)
            server.process.send_signal(signal.SIGTERM)
            assert (await running).usage.completion_tokens == 10_000
        assert server.process.wait(30) == 0
