"""Chat templates: finding them, the messages they take, and what the sandbox gives and refuses."""

import json
from datetime import datetime

import jinja2
import pytest

from crosspool.core.errors import InvalidRequestError, ModelLoadError
from crosspool.text.chat_template import ChatTemplate, load_chat_template, normalise_messages
from crosspool.text.template_worker import make_environment, render

pytestmark = pytest.mark.integration

USER = {"role": "user", "content": "Hi"}


def rendered(source, limit=10_000, **variables):
    return render(make_environment().from_string(source), variables, limit)


# -- the environment ------------------------------------------------------------------------------------


def test_blocks_leave_no_lines_behind():
    source = "{% for m in messages %}\n    {%- if loop.first %}>{% endif %}\n  {% set x = m %}\n{{ x }}\n"
    source += "{% endfor %}"
    assert rendered(source, messages=["a", "b"]) == ">a\nb\n"


def test_loop_controls():
    source = "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}"
    source += "{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    assert rendered(source) == "023"


def test_tojson_is_plain_json():
    assert rendered("{{ x | tojson }}", x={"a": "<é> & '"}) == '{"a": "<é> & \'"}'
    assert rendered("{{ x | tojson(indent=2) }}", x={"b": 1}) == '{\n  "b": 1\n}'
    assert rendered("{{ x | tojson(ensure_ascii=True, sort_keys=true) }}", x={"b": "é", "a": 1}) == (
        '{"a": 1, "b": "\\u00e9"}'
    )


def test_strftime_now():
    assert rendered("{{ strftime_now('%Y') }}") in (str(datetime.now().year), str(datetime.now().year - 1))


def test_generation_blocks_are_plain():
    assert rendered("a{% generation %}{{ x }}{% endgeneration %}c", x="b") == "abc"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ messages.append(1) }}",
        "{% set _ = variables.update({'a': 1}) %}",
        "{{ '{0.__class__}'.format(messages) }}{{ messages.__class__.__base__ }}",
    ],
)
def test_the_sandbox_refuses(source):
    with pytest.raises((jinja2.exceptions.SecurityError, jinja2.exceptions.UndefinedError)):
        rendered(source, messages=[1], variables={})


def test_long_output_is_given_up():
    assert len(rendered("{% for i in range(100) %}0123456789{% endfor %}", limit=1000)) == 1000
    with pytest.raises(ValueError, match="longer than 999"):
        rendered("{% for i in range(100) %}0123456789{% endfor %}", limit=999)


# -- messages -------------------------------------------------------------------------------------------


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert normalise_messages([{"role": "user", "content": parts}]) == [{"role": "user", "content": "a\nb"}]


@pytest.mark.parametrize("nothing", [{}, {"content": None}, {"content": None, "tool_calls": []}])
def test_an_assistant_that_said_nothing_has_empty_content(nothing):
    (normal,) = normalise_messages([{"role": "assistant", **nothing}])
    assert normal["content"] == ""


def test_other_keys_are_kept_and_the_clients_messages_left_alone():
    message = {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "1", "function": {"name": "f", "arguments": '{"x": 1}'}},
            {"id": "2", "function": {"name": "f", "arguments": "no json"}},
            {"id": "3", "function": {"name": "f", "arguments": "[1]"}},
            {"id": "4", "function": {"name": "f", "arguments": {"y": 2}}},
        ],
    }
    before = json.dumps(message)
    (normal,) = normalise_messages([message])
    assert [call["function"]["arguments"] for call in normal["tool_calls"]] == [
        {"x": 1},
        "no json",
        "[1]",
        {"y": 2},
    ]
    assert normal["tool_calls"][0]["id"] == "1"
    assert normal["content"] is None
    assert json.dumps(message) == before


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "messages is empty"),
        (["hi"], r"messages\[0\] must be an object"),
        ([USER, {"content": "x"}], r"messages\[1\]\.role"),
        ([{"role": 1, "content": "x"}], r"messages\[0\]\.role"),
        ([{"role": "user"}], r"messages\[0\]\.content is missing"),
        ([{"role": "user", "content": 5}], r"messages\[0\]\.content must be text or a list"),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\]\.content\[0\]"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "all that is served"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], r"content\[0\]"),
        ([{"role": "assistant", "tool_calls": 5}], r"messages\[0\]\.tool_calls"),
    ],
)
def test_malformed_messages_are_named(messages, said):
    with pytest.raises(InvalidRequestError, match=said) as caught:
        normalise_messages(messages)
    assert caught.value.parameter == "messages"


# -- where templates are --------------------------------------------------------------------------------


def write_config(folder, **config):
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def loaded_text(folder, **kwargs):
    template = load_chat_template(folder, {"bos_token": "<s>"})
    try:
        return template.render([USER], **kwargs)
    finally:
        template.close()


def test_a_file_goes_before_the_config(tmp_path):
    write_config(tmp_path, chat_template="config")
    assert loaded_text(tmp_path) == "config"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}file é")
    assert loaded_text(tmp_path) == "<s>file é"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools | length }} tools")
    assert loaded_text(tmp_path) == "<s>file é"
    assert loaded_text(tmp_path, tools=[{}, {}]) == "2 tools"


def test_named_templates_in_the_config(tmp_path):
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    write_config(tmp_path, chat_template=named)
    assert loaded_text(tmp_path) == "D"
    assert loaded_text(tmp_path, tools=[{}]) == "T"


def test_no_template(tmp_path):
    assert load_chat_template(tmp_path, {}) is None
    write_config(tmp_path, chat_template=[{"name": "rag", "template": "R"}])
    assert load_chat_template(tmp_path, {}) is None


@pytest.mark.parametrize("entry", [5, ["x"], [{"name": "default"}]])
def test_a_config_with_something_else_in_its_place(tmp_path, entry):
    write_config(tmp_path, chat_template=entry)
    with pytest.raises(ModelLoadError, match="chat_template"):
        load_chat_template(tmp_path, {})


def test_files_that_are_no_template(tmp_path):
    path = tmp_path / "chat_template.jinja"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ModelLoadError, match=r"chat_template\.jinja"):
        load_chat_template(tmp_path, {})
    path.write_bytes(b"x" * (2**20 + 1))
    with pytest.raises(ModelLoadError, match="larger than"):
        load_chat_template(tmp_path, {})


# -- rendering ------------------------------------------------------------------------------------------


def test_what_a_template_is_given():
    source = "{{ [messages, tools, add_generation_prompt, bos_token, enable_thinking] | tojson }}"
    template = ChatTemplate({"default": source}, {"bos_token": "<s>"})
    text = template.render([USER], add_generation_prompt=False, variables={"enable_thinking": True})
    template.close()
    assert json.loads(text) == [[USER], None, False, "<s>", True]


@pytest.mark.parametrize("name", ["messages", "chat_template", "tools", "bos_token", "add_generation_prompt"])
def test_a_client_cannot_replace_what_the_front_gives(name):
    template = ChatTemplate({"default": ""}, {"bos_token": "<s>"})
    with pytest.raises(InvalidRequestError, match=name) as caught:
        template.render([USER], variables={name: "x"})
    assert caught.value.parameter == "chat_template_kwargs"
