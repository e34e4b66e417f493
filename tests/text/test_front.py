"""Prompts to requests, and every refusal with its numbers."""

import json
import random
from itertools import count

import pytest

from crosspool.core.errors import InvalidRequestError, RequestTooLargeError
from crosspool.core.ids import ModelIndex, RequestId
from crosspool.core.sampling import SamplingParams
from crosspool.text.front import ModelFront, child_seed
from helpers_engine import model_info
from helpers_tokenizers import byte_fallback, byte_level, save

pytestmark = pytest.mark.integration

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def front(tmp_path_factory):
    folder = save(byte_fallback(), tmp_path_factory.mktemp("model"), chat_template=TEMPLATE)
    front = ModelFront.open(model_info(index=2, path=str(folder), vocab_size=300, eos_token_ids=(2, 9)))
    yield front
    front.close()


@pytest.fixture
def bare():
    """A front without a tokenizer."""
    return ModelFront(model_info(), None)


def submit(front, prompt, generator_seed=0, **params):
    return front.submit(
        tuple(prompt), SamplingParams(**params), count().__next__, random.Random(generator_seed)
    )


# -- prompts --------------------------------------------------------------------------------------------


def test_a_text_begins_with_bos_and_a_rendered_chat_has_only_its_own(front):
    assert front.prompt_tokens("the")[0] == 1
    chat = front.chat_tokens([{"role": "user", "content": "the"}])
    assert chat.count(1) == 1
    assert chat[0] == 1
    assert front.detokenize(chat) == "<s> [user]the"
    assert front.detokenize(chat, skip_special_tokens=True) == "[user]the"


def test_token_ids_are_taken_as_they_are(front):
    assert front.prompt_tokens([5, 0, 299]) == (5, 0, 299)


@pytest.mark.parametrize("prompt", ["", [], ()])
def test_an_empty_prompt(front, prompt):
    with pytest.raises(InvalidRequestError, match="the prompt is empty"):
        front.prompt_tokens(prompt)


@pytest.mark.parametrize("token", [-1, 300, True, 1.0, "x", None])
def test_a_token_id_out_of_the_vocabulary(front, token):
    with pytest.raises(InvalidRequestError, match=r"token id .* is not in the vocabulary of a.* 300 tokens"):
        front.prompt_tokens([1, token])


@pytest.mark.parametrize("prompt", [5, None, {"a": 1}])
def test_a_prompt_of_another_type(front, prompt):
    with pytest.raises(InvalidRequestError, match="text or a list of token ids"):
        front.prompt_tokens(prompt)


def test_half_a_surrogate_pair_is_no_text(front):
    with pytest.raises(InvalidRequestError, match="surrogate"):
        front.prompt_tokens("a\ud800")
    with pytest.raises(InvalidRequestError, match="surrogate"):
        front.chat_tokens([{"role": "user", "content": "a\udfff"}])


class CountingTokenizer:
    """A token is at most 3 bytes; says which texts it was asked to encode."""

    longest_token_bytes = 3

    def __init__(self):
        self.texts = []

    def encode(self, text, *, add_special_tokens):
        self.texts.append(text)
        return [5]


class CountingTemplate:
    def __init__(self):
        self.renderings = 0

    def render(self, messages, **_):
        self.renderings += 1
        return "short"


@pytest.fixture
def counting():
    return ModelFront(
        model_info(max_context=100, max_pool_tokens=20), CountingTokenizer(), CountingTemplate()
    )


def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(counting):
    assert counting.prompt_tokens("é" * 30) == (5,)
    with pytest.raises(RequestTooLargeError, match=r"text of 62 bytes .* 20 tokens, which are 60 bytes"):
        counting.prompt_tokens("é" * 31)
    assert counting.tokenizer.texts == ["é" * 30]


def test_messages_that_cannot_fit_are_refused_before_they_are_rendered(counting):
    parts = [{"type": "text", "text": "x" * 29}]
    fits = [{"role": "user", "content": "x" * 31}, {"role": "user", "content": parts}]
    assert counting.chat_tokens(fits) == (5,)
    with pytest.raises(RequestTooLargeError, match="text of 61 bytes") as caught:
        counting.chat_tokens([*fits, {"role": "user", "content": "x"}])
    assert caught.value.parameter == "messages"
    assert counting._template.renderings == 1


def test_what_a_template_makes_of_messages_is_checked_again(counting):
    counting._template.render = lambda messages, **_: "x" * 61
    with pytest.raises(RequestTooLargeError, match="text of 61 bytes"):
        counting.chat_tokens([{"role": "user", "content": "x"}])
    assert counting.tokenizer.texts == []


def test_a_tokenizer_larger_than_the_model(tmp_path):
    small = ModelFront.open(model_info(path=str(save(byte_level(), tmp_path)), vocab_size=5))
    with pytest.raises(InvalidRequestError, match="which has 5 tokens"):
        small.prompt_tokens("the")


def test_a_template_that_renders_nothing(tmp_path):
    folder = save(byte_level(), tmp_path, chat_template="{# nothing #}")
    front = ModelFront.open(model_info(path=str(folder)))
    with pytest.raises(InvalidRequestError, match="empty prompt"):
        front.chat_tokens([{"role": "user", "content": "x"}])
    front.close()


# -- what a folder lacks --------------------------------------------------------------------------------


def test_without_a_chat_template(tmp_path):
    front = ModelFront.open(model_info(path=str(save(byte_level(), tmp_path))))
    with pytest.raises(InvalidRequestError, match="use /v1/completions"):
        front.chat_tokens([{"role": "user", "content": "x"}])


def test_without_a_tokenizer_token_ids_are_served(tmp_path, caplog):
    front = ModelFront.open(model_info(path=str(tmp_path)))
    assert str(tmp_path) in caplog.text
    assert front.tokenizer is None
    (request,) = submit(front, front.prompt_tokens([3, 4])).requests
    assert request.prompt_token_ids == (3, 4)


def test_without_a_tokenizer_text_is_refused(bare):
    for call in (
        lambda: bare.prompt_tokens("text"),
        lambda: bare.tokenize("t"),
        lambda: bare.detokenize([1]),
    ):
        with pytest.raises(InvalidRequestError, match="has no tokenizer"):
            call()
    with pytest.raises(InvalidRequestError, match="has no tokenizer") as caught:
        submit(bare, [1], stop="x")
    assert caught.value.parameter == "stop"


def test_a_bad_template_leaves_the_tokenizer(tmp_path, caplog):
    save(byte_level(), tmp_path, chat_template=5)
    front = ModelFront.open(model_info(path=str(tmp_path)))
    assert "chat_template" in caplog.text
    assert front.prompt_tokens("the")
    with pytest.raises(InvalidRequestError, match="no chat template"):
        front.chat_tokens([{"role": "user", "content": "x"}])


# -- requests -------------------------------------------------------------------------------------------


def test_a_request(front):
    params = SamplingParams(max_tokens=7, seed=5, stop_token_ids=(4,))
    submission = front.submit((1, 2, 3), params, lambda: RequestId(11), random.Random(0))
    (request,) = submission.requests
    assert (request.id, request.model, request.prompt_token_ids) == (11, ModelIndex(2), (1, 2, 3))
    assert (request.max_tokens, request.seed, request.sampling) == (7, 5, params)
    assert request.stop_token_ids == {2, 9, 4}
    assert submission.prompt_token_ids == (1, 2, 3)


def test_ignore_eos_leaves_the_clients_stop_tokens(front):
    (request,) = submit(front, [1], ignore_eos=True, stop_token_ids=(4,)).requests
    assert request.stop_token_ids == {4}


def test_n_requests_with_seeds_of_their_own(front):
    seeds = [request.seed for request in submit(front, [1], n=4, seed=5).requests]
    assert seeds[0] == 5
    assert len(set(seeds)) == 4
    assert seeds == [child_seed(5, i) for i in range(4)]
    assert [request.id for request in submit(front, [1], n=4).requests] == [0, 1, 2, 3]


def test_child_seeds_fit_and_do_not_change():
    seeds = {child_seed(seed, i) for seed in (-(2**63), -1, 0, 1, 2**63 - 1) for i in range(1, 16)}
    assert len(seeds) == 75
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert child_seed(0, 1) == 9221934688551543782


def test_without_a_seed_the_generator_gives_one(front):
    def seeds(seed):
        return [request.seed for request in submit(front, [1], generator_seed=seed, n=3).requests]

    assert seeds(1) == seeds(1)
    assert seeds(1) != seeds(2)
    assert 0 <= seeds(1)[0] < 2**63


def test_stop_token_ids_out_of_the_vocabulary(front):
    with pytest.raises(InvalidRequestError, match="token id 300") as caught:
        submit(front, [1], stop_token_ids=(300,))
    assert caught.value.parameter == "stop_token_ids"


@pytest.mark.parametrize(
    ("context", "pool", "said"),
    [
        (100, 1000, "the context of a, which is 100"),
        (1000, 100, "KV pool's room for one request, which is 100"),
    ],
)
def test_prompt_and_output_must_fit_context_and_pool(context, pool, said):
    front = ModelFront(model_info(max_context=context, max_pool_tokens=pool), None)
    (request,) = submit(front, [1] * 90, max_tokens=10).requests
    assert request.max_tokens == 10
    with pytest.raises(RequestTooLargeError, match=said) as caught:
        submit(front, [1] * 90, max_tokens=11)
    assert "90 prompt tokens and 11 to generate are 101 tokens" in str(caught.value)


def test_max_tokens_none_is_what_is_left():
    front = ModelFront(model_info(max_context=100, max_pool_tokens=80), None)
    (request,) = submit(front, [1] * 30, max_tokens=None).requests
    assert request.max_tokens == 50
    (request,) = submit(front, [1] * 79, max_tokens=None).requests
    assert request.max_tokens == 1
    with pytest.raises(RequestTooLargeError, match="80 prompt tokens and 1 to generate"):
        submit(front, [1] * 80, max_tokens=None)
    with pytest.raises(RequestTooLargeError, match="60 prompt tokens and 21 to generate"):
        submit(front, [1] * 60, max_tokens=None, min_tokens=21)


def test_assemblers_number_their_choices(front):
    assemblers = submit(front, [1], n=2).assemblers(first_index=4)
    assert [assembler._index for assembler in assemblers] == [4, 5]


def test_a_real_templates_habits(tmp_path):
    """Tools, arguments of earlier calls, and a switch of the model's own."""
    template = (
        "{% if tools %}{% for t in tools %}{{ t.function.name }} {% endfor %}{% endif %}"
        "{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls[0].function.arguments.city }} "
        "{% elif m.content is string %}{{ m.content | trim }} {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}"
        "{% if enable_thinking is defined and not enable_thinking %}!{% endif %}"
    )
    front = ModelFront.open(model_info(path=str(save(byte_level(), tmp_path, chat_template=template))))
    call = {"function": {"name": "weather", "arguments": json.dumps({"city": "Paris"})}}
    messages = [{"role": "user", "content": " hi "}, {"role": "assistant", "tool_calls": [call]}]
    tokens = front.chat_tokens(
        messages,
        tools=[{"type": "function", "function": {"name": "weather"}}],
        variables={"enable_thinking": False},
    )
    front.close()
    assert front.detokenize(tokens) == "weather hi Paris A:!"
