from __future__ import annotations

import pytest

from crosspool.server.config import ServerConfig

pytestmark = pytest.mark.integration

PROMPT = {"model": "tiny", "prompt": "a", "max_tokens": 1}


async def test_errors_are_counted_by_status_whoever_answers(
    start_application, monkeypatch: pytest.MonkeyPatch
) -> None:
    application = await start_application(ServerConfig(api_key="key"))
    client = application.client
    await client.get("/nothing")
    client.headers["Authorization"] = "Bearer key"
    await client.get("/nothing")
    await application.post("/v1/completions", **PROMPT)
    await application.post("/v1/completions", **PROMPT, n=0)
    await application.post("/v1/completions", **{**PROMPT, "model": "nobody"})
    await application.post("/v1/completions", **{**PROMPT, "prompt": ["a"] * 9})
    application.state.admission.close()
    await application.post("/v1/completions", **PROMPT)
    await client.get("/ready")
    monkeypatch.setattr(type(application.state), "llm", None)
    await client.get("/v1/models")
    counter = application.state.metrics.error_responses
    samples = next(iter(counter.collect())).samples
    counted = {s.labels["status"]: s.value for s in samples if s.name.endswith("_total")}
    assert counted == {"401": 1, "400": 1, "404": 2, "503": 2, "500": 1}
