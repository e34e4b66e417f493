from __future__ import annotations

import pytest

from helpers_tiny_tokenizer import BOS_ID, EOS, EOS_ID, VOCAB_SIZE

pytestmark = pytest.mark.integration


async def test_a_prompt_is_tokenized_and_back(application) -> None:
    answer = (await application.post("/tokenize", model="tiny", prompt="aé" + EOS)).json()
    assert answer["count"] == len(answer["tokens"]) == 4
    assert answer["tokens"][-1] == EOS_ID
    assert answer["max_model_len"] == 900
    assert answer["token_strs"] is None
    back = await application.post("/detokenize", model="tiny", tokens=answer["tokens"])
    assert back.json() == {"prompt": "aé" + EOS}


async def test_the_texts_of_tokens_are_told_when_asked_for(application) -> None:
    answer = await application.post("/tokenize", model="tiny", prompt="ab", return_token_strs=True)
    assert answer.json()["token_strs"] == ["a", "b"]


@pytest.mark.parametrize(
    ("with_prompt", "text"),
    [(True, "user:Hi\nassistant:"), (None, "user:Hi\nassistant:"), (False, "user:Hi\n")],
)
async def test_messages_are_rendered_first(application, with_prompt: bool | None, text: str) -> None:
    answer = await application.post(
        "/tokenize",
        model="tiny",
        messages=[{"role": "user", "content": "Hi"}],
        add_generation_prompt=with_prompt,
    )
    plain = await application.post("/tokenize", model="tiny", prompt=text)
    assert answer.json()["tokens"] == plain.json()["tokens"]


async def test_special_tokens_are_added_unless_they_are_not_wanted(application) -> None:
    with_bos = await application.post("/tokenize", model="other", prompt="a")
    without = await application.post("/tokenize", model="other", prompt="a", add_special_tokens=False)
    assert with_bos.json()["tokens"] == [BOS_ID, *without.json()["tokens"]]
    assert without.json()["count"] == 1
    null = await application.post("/tokenize", model="other", prompt="a", add_special_tokens=None)
    assert null.json() == with_bos.json()


async def test_an_empty_prompt_has_no_tokens(application) -> None:
    assert (await application.post("/tokenize", model="tiny", prompt="")).json()["tokens"] == []


@pytest.mark.parametrize(
    ("path", "fields", "parameter"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, "prompt"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {"tokens": [VOCAB_SIZE]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ("/detokenize", {}, "tokens"),
    ],
)
async def test_malformed_requests_are_refused(application, path: str, fields: dict, parameter: str) -> None:
    response = await application.post(path, model="tiny", **fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == parameter
