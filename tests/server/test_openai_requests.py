from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from crosspool.core.errors import InvalidRequestError
from crosspool.server.openai_requests import CompletionRequest, DetokenizeRequest

pytestmark = pytest.mark.unit


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"model": "tiny", "prompt": "a", **fields})


@pytest.mark.parametrize("items", [[0] * 1000, ["a", *[0] * 1000]])
def test_a_list_of_texts_ends_at_its_first_wrong_item(items: list[Any]) -> None:
    """Errors grow with the fields of a request and not with the items of its lists."""
    with pytest.raises(ValidationError) as caught:
        completion(stop=items)
    assert caught.value.error_count() == 2


def test_a_list_of_token_ids_ends_at_its_first_wrong_item() -> None:
    with pytest.raises(ValidationError) as caught:
        completion(stop_token_ids=["a"] * 1000)
    assert caught.value.error_count() == 1
    with pytest.raises(ValidationError) as caught:
        DetokenizeRequest.model_validate({"model": "tiny", "tokens": ["a"] * 1000})
    assert caught.value.error_count() == 1


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", ""], ["a", ""]), ([1, 2], [[1, 2]]), ([[1, 2], []], [[1, 2], []])],
)
def test_a_prompt_is_one_or_many(prompt: Any, prompts: list[Any]) -> None:
    assert completion(prompt=prompt).prompts(2) == prompts


@pytest.mark.parametrize(
    "prompt", [None, 3, True, {}, [None], [True], [{}], ["a", 1], ["a", []], [[1], "a"], [[1.0]], [[[1]]]]
)
def test_a_prompt_of_another_kind_is_refused(prompt: Any) -> None:
    with pytest.raises(InvalidRequestError, match="must be text, a list of texts"):
        completion(prompt=prompt).prompts(2)


class Sealed(list[int]):
    """Nobody may look into it."""

    def __iter__(self) -> Any:
        raise AssertionError("the prompt was looked into")


@pytest.mark.parametrize("item", ["a", Sealed()])
def test_too_many_prompts_are_refused_before_they_are_looked_into(item: Any) -> None:
    with pytest.raises(InvalidRequestError, match="has 3 prompts, at most 2"):
        completion(prompt=[item] * 3).prompts(2)
