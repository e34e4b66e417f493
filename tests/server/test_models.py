from __future__ import annotations

import pytest

pytestmark = pytest.mark.integration


async def test_models_that_serve_are_listed(application) -> None:
    answer = (await application.client.get("/v1/models")).json()
    assert answer["object"] == "list"
    assert [model["id"] for model in answer["data"]] == ["tiny", "other"]
    created = answer["data"][0].pop("created")
    assert created > 1_700_000_000
    assert answer["data"][0] == {
        "id": "tiny",
        "object": "model",
        "owned_by": "crosspool",
        "max_model_len": 900,
    }


async def test_one_model_is_told(application) -> None:
    assert (await application.client.get("/v1/models/other")).json()["id"] == "other"


@pytest.mark.parametrize("name", ["nobody", "a/b", "../../etc/passwd"])
async def test_an_unknown_model_is_not_found(application, name: str) -> None:
    for response in (
        await application.client.get(f"/v1/models/{name.replace('..', '%2e%2e')}"),
        await application.post("/v1/completions", model=name, prompt="a"),
        await application.post(
            "/v1/chat/completions", model=name, messages=[{"role": "user", "content": "a"}]
        ),
        await application.post("/tokenize", model=name, prompt="a"),
        await application.post("/detokenize", model=name, tokens=[1]),
    ):
        assert response.status_code == 404
        error = response.json()["error"]
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert name in error["message"]


async def test_a_model_that_failed_to_load_is_named(application) -> None:
    for response in (
        await application.client.get("/v1/models/broken"),
        await application.post("/v1/completions", model="broken", prompt="a"),
    ):
        assert response.status_code == 503
        error = response.json()["error"]
        assert error["code"] == "model_unavailable"
        assert "failed to load" in error["message"]
        assert "truncated" not in error["message"], "the file and its fault are for the log"
