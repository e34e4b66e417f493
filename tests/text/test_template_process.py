"""Rendering in another process: whatever a template does, the caller gets an answer and the next one too."""

import os
import signal
import threading
from pathlib import Path

import pytest

from crosspool.core.errors import InvalidRequestError
from crosspool.text.template_process import TemplateLimits, TemplateProcess

pytestmark = pytest.mark.integration

ENDLESS = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
BOMB = (
    "{% set ns = namespace(x='0123456789') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
)


@pytest.fixture
def process():
    process = TemplateProcess(TemplateLimits(seconds=20))
    yield process
    process.close()


def worker_id(process):
    return process._process and process._process.pid


def test_renders_and_keeps_its_worker(process):
    assert worker_id(process) is None
    assert process.render("Hello {{ name }} é🙂", {"name": "you"}) == "Hello you é🙂"
    first = worker_id(process)
    assert process.render("", {}) == ""
    assert process.render("{{ x }}", {"x": "a" * 2_000_000}) == "a" * 2_000_000
    assert worker_id(process) == first


def test_the_templates_own_refusal_is_told(process):
    with pytest.raises(InvalidRequestError, match="refuses the messages: roles must alternate") as caught:
        process.render("{{ raise_exception('roles must alternate') }}", {})
    assert caught.value.parameter == "messages"
    assert process.render("still {{ 1 }}", {}) == "still 1"


@pytest.mark.parametrize(
    "template", ["{% if %}", "{{ missing.attribute }}", "{{ 1 / 0 }}", "{{ ''.__class__.x }}"]
)
def test_failures_tell_the_client_nothing_of_the_inside(process, template, caplog):
    with pytest.raises(InvalidRequestError, match=r"^the chat template cannot render these messages$"):
        process.render(template, {})
    assert "Error" in caplog.text
    assert process.render("ok", {}) == "ok"


def test_an_endless_template_is_killed(caplog):
    process = TemplateProcess(TemplateLimits(seconds=1))
    try:
        with pytest.raises(InvalidRequestError, match="cannot render"):
            process.render(ENDLESS, {})
        assert "stopped after 1 s" in caplog.text
        assert worker_id(process) is None
        assert process.render("ok", {}) == "ok"
    finally:
        process.close()


def test_the_worker_limits_its_own_processor_time(process, monkeypatch):
    """Without the front's deadline the system's limit still ends it."""
    monkeypatch.setattr(threading.Timer, "start", lambda self: None)
    monkeypatch.setattr(threading.Timer, "join", lambda self: None)
    process._limits = TemplateLimits(seconds=1)
    with pytest.raises(InvalidRequestError, match="cannot render"):
        process.render(ENDLESS, {})


def test_a_worker_that_waits_without_working_is_killed_too():
    process = TemplateProcess(TemplateLimits(seconds=1))
    try:
        process.render("", {})
        os.kill(worker_id(process), signal.SIGSTOP)
        with pytest.raises(InvalidRequestError, match="cannot render"):
            process.render("", {})
        assert process.render("ok", {}) == "ok"
    finally:
        process.close()


def test_a_memory_bomb_stays_within_its_limit(process, caplog):
    with pytest.raises(InvalidRequestError, match="cannot render"):
        process.render(BOMB, {})
    assert "memory" in caplog.text
    assert process.render("ok", {}) == "ok"


def test_address_space_is_bounded(process):
    process.render("", {})
    limits = Path(f"/proc/{worker_id(process)}/limits").read_text()
    (line,) = [line for line in limits.splitlines() if line.startswith("Max address space")]
    assert line.split()[3] == str(TemplateLimits().memory_bytes)


def test_long_output_is_refused(caplog):
    process = TemplateProcess(TemplateLimits(seconds=20, max_characters=1000))
    try:
        with pytest.raises(InvalidRequestError, match="cannot render"):
            process.render("{% for i in range(1001) %}x{% endfor %}", {})
        assert "longer than 1000" in caplog.text
    finally:
        process.close()


def test_a_worker_that_died_is_replaced(process):
    process.render("", {})
    process._process.kill()
    process._process.wait()
    assert process.render("ok", {}) == "ok"


def test_an_interrupt_leaves_no_answer_for_the_next(process, monkeypatch):
    process.render("", {})
    first = worker_id(process)

    def interrupted(self, size=-1):
        raise KeyboardInterrupt

    class Stdout:
        read = interrupted
        close = process._process.stdout.close

    monkeypatch.setattr(process._process, "stdout", Stdout())
    with pytest.raises(KeyboardInterrupt):
        process.render("first", {})
    assert process.render("second", {}) == "second"
    assert worker_id(process) != first


def test_threads_get_their_own_answers(process):
    results = {}

    def ask(i):
        results[i] = process.render("{{ x }}", {"x": i})

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: str(i) for i in range(16)}


def test_only_json_goes_in(process):
    for variables in ({"x": object()}, {"x": {1, 2}}):
        with pytest.raises(InvalidRequestError, match="plain JSON"):
            process.render("", variables)
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(InvalidRequestError, match="plain JSON"):
        process.render("", {"x": deep})


def test_closing_ends_the_worker(process):
    process.render("", {})
    worker = process._process
    process.close()
    assert worker.returncode is not None
    process.close()
