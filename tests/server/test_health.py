from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

import crosspool
from crosspool.core.info import LoadProgress
from crosspool.server.supervisor import EngineState

pytestmark = pytest.mark.integration


async def test_a_serving_server_is_live_and_ready(application) -> None:
    assert (await application.client.get("/health")).status_code == 200
    assert (await application.client.head("/health")).status_code == 200
    assert (await application.client.head("/ready")).status_code == 200
    response = await application.client.get("/ready")
    assert response.status_code == 200
    answer = response.json()
    assert (answer["ready"], answer["engine"], answer["draining"]) == (True, "ready", False)
    assert [(model["name"], model["ready"]) for model in answer["models"]] == [
        ("tiny", True),
        ("other", True),
        ("broken", False),
    ]
    assert "truncated" in answer["models"][2]["error"]
    info = application.state.llm.front("tiny").model
    assert answer["models"][0] == {
        "name": "tiny",
        "ready": True,
        "error": None,
        "residency": info.residency,
        "attention_bytes": info.attention_bytes,
        "ffn_bytes": info.ffn_bytes,
        "kv_bytes_per_token": info.kv_bytes_per_token,
        "prefix_cache": info.prefix_cache,
        "max_model_len": min(info.max_context, info.max_pool_tokens),
    }


@pytest.mark.parametrize(
    ("state", "live"),
    [(EngineState.LOADING, 200), (EngineState.RESTARTING, 200), (EngineState.DEAD, 503)],
)
async def test_without_an_engine_it_is_not_ready_and_dead_only_when_that_lasts(
    application, state: EngineState, live: int
) -> None:
    application.state.engine_state = lambda: state
    assert (await application.client.get("/health")).status_code == live
    response = await application.client.get("/ready")
    assert response.status_code == 503
    assert response.json()["engine"] == state
    assert not any(model["ready"] for model in response.json()["models"])
    refused = await application.post("/v1/completions", model="tiny", prompt="a")
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "engine_unavailable"
    assert int(refused.headers["Retry-After"]) >= 1
    assert "crosspool_kv_pages_total" not in (await application.client.get("/metrics")).text


async def test_while_loading_progress_is_told(application) -> None:
    llm, application.state.open_llm = application.state.open_llm, None
    application.state.loading["tiny"] = LoadProgress("tiny", 30, 100)
    response = await application.client.get("/ready")
    refused = await application.client.get("/v1/models")
    application.state.open_llm = llm
    assert response.status_code == 503
    assert response.json()["models"] == [
        {"name": "tiny", "ready": False, "error": None, "loaded_bytes": 30, "total_bytes": 100}
    ]
    assert refused.status_code == 503
    assert "loading" in refused.json()["error"]["message"]


async def test_while_draining_it_is_live_but_takes_nothing_new(application) -> None:
    application.state.admission.close()
    assert (await application.client.get("/health")).status_code == 200
    response = await application.client.get("/ready")
    assert (response.status_code, response.json()["draining"]) == (503, True)
    refused = await application.post("/v1/completions", model="tiny", prompt="a")
    assert refused.status_code == 503
    assert "shutting down" in refused.json()["error"]["message"]
    assert (await application.client.get("/v1/models")).status_code == 200


async def test_metrics_count_what_was_served(application) -> None:
    await application.post("/v1/completions", model="tiny", prompt="abc", max_tokens=5)
    response = await application.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    read = {
        (sample.name, sample.labels.get("model_name")): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }
    assert read["vllm:time_to_first_token_seconds_count", "tiny"] == 1
    assert read["vllm:inter_token_latency_seconds_count", "tiny"] == 4
    assert read["vllm:e2e_request_latency_seconds_count", "tiny"] == 1
    assert read["crosspool_kv_pages_total", None] == read["crosspool_kv_pages_free", None] == 64


async def test_the_version_is_told(application) -> None:
    assert (await application.client.get("/version")).json() == {"version": crosspool.__version__}
